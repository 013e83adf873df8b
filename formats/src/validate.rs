//! What core takes for granted of an image and the types cannot say. Every image passes here, after it is decoded and
//! before it is published.
//!
//! Ids of files, objects, blobs and pages are not checked here but where they are decoded: [`crate::wire::Bounds`].

use std::collections::HashSet;

use ckpt_core::image::{HostFacts, Process, Task};
use ckpt_core::resource::descriptors::{OpenFile, Table};
use ckpt_core::resource::files::DeletedFile;
use ckpt_core::resource::memory::{Mapping, Memory, Object, ObjectKind, Pages, Source};
use ckpt_core::{Context, Image, PAGE_SIZE, Pid};

use crate::wire::Invalid;

/// `PID_MAX_LIMIT` of 64-bit kernels (proc_sys_kernel(5), `pid_max`).
const PID_MAX: i32 = 1 << 22;
/// No user address is above it, with five levels of page tables.
const ADDRESS_MAX: u64 = 1 << 56;
/// `PATH_MAX`, and what `/proc` adds to a name.
const PATH_MAX: usize = 4096 + 16;
/// Descriptors are below it, whatever `nr_open` is set to.
const FD_MAX: i32 = 1 << 30;
/// A generous xsave area: the largest known, with AMX tiles, has 11 KiB.
const XSAVE_MAX: usize = 64 << 10;
const SIGNAL_MAX: i32 = 64;

macro_rules! require {
    ($condition:expr, $($why:tt)*) => {
        if !$condition {
            return Err(Invalid::new(format!($($why)*)));
        }
    };
}

/// # Errors
/// The first thing that is not as it must be.
pub fn validate(image: &Image) -> Result<(), Invalid> {
    host(&image.host).map_err(|invalid| invalid.within("host"))?;
    tree(image)?;
    each("processes", &image.processes, process)?;
    each("files", &image.files, file)?;
    each("deleted_files", &image.deleted_files, deleted_file)?;
    each("memory_objects", &image.memory_objects, object)
}

fn each<T>(name: &str, values: &[T], check: impl Fn(&T) -> Result<(), Invalid>) -> Result<(), Invalid> {
    for (index, value) in values.iter().enumerate() {
        check(value).map_err(|invalid| invalid.within(index).within(name))?;
    }
    Ok(())
}

fn host(host: &HostFacts) -> Result<(), Invalid> {
    require!(host.xsave_size as usize <= XSAVE_MAX, "xsave_size {}", host.xsave_size);
    Ok(())
}

/// Ids are there once each, and parents before their children.
fn tree(image: &Image) -> Result<(), Invalid> {
    require!(!image.processes.is_empty(), "an image without a process");
    let mut ids = HashSet::new();
    let mut add = |id: Pid| {
        require!((1..=PID_MAX).contains(&id.0), "process or thread id {id}");
        require!(ids.insert(id), "process or thread id {id} twice");
        Ok(())
    };
    let mut parents = HashSet::new();
    for (index, process) in image.processes.iter().enumerate() {
        let task = &process.task;
        require!(index == 0 || parents.contains(&task.ppid), "process {} before its parent {}", task.pid, task.ppid);
        parents.insert(task.pid);
        require!(!process.threads.is_empty(), "process {} without a thread", task.pid);
        require!(process.threads[0].tid == task.pid, "the main thread of process {} is not the first", task.pid);
        process.threads.iter().try_for_each(|thread| add(thread.tid))?;
        self::task(task)?;
    }
    for zombie in &image.zombies {
        add(zombie.task.pid)?;
        let task = &zombie.task;
        require!(parents.contains(&task.ppid), "zombie {} with a parent {} that is not there", task.pid, task.ppid);
        self::task(task)?;
    }
    Ok(())
}

fn task(task: &Task) -> Result<(), Invalid> {
    // 0 is an id from outside of the pid namespace.
    for id in [task.ppid, task.pgid, task.sid] {
        require!((0..=PID_MAX).contains(&id.0), "process {} with the id {id} in its place in the tree", task.pid);
    }
    require!((0..=SIGNAL_MAX).contains(&task.exit_signal), "exit signal {}", task.exit_signal);
    name(&task.comm, 15)
}

fn process(process: &Process) -> Result<(), Invalid> {
    memory(&process.memory).map_err(|invalid| invalid.within("memory"))?;
    for membership in &process.cgroups.memberships {
        path(&membership.path).map_err(|invalid| invalid.within("cgroups"))?;
    }
    table(&process.descriptors).map_err(|invalid| invalid.within("descriptors"))?;
    each("threads", &process.threads, |thread| context(&thread.context))
}

fn context(context: &Context) -> Result<(), Invalid> {
    let xsave = context.registers.xsave.len();
    require!(xsave <= XSAVE_MAX, "an xsave area of {xsave} bytes");
    Ok(())
}

fn memory(memory: &Memory) -> Result<(), Invalid> {
    let mut last_end = 0;
    for (index, mapping) in memory.mappings.iter().enumerate() {
        let check = || {
            require!(mapping.start >= last_end, "it begins at {:#x}, before the end of the one before", mapping.start);
            self::mapping(mapping)
        };
        check().map_err(|invalid: Invalid| invalid.within(index).within("mappings"))?;
        last_end = mapping.end;
    }
    require!(memory.auxv.len() <= 4096, "auxv of {} bytes", memory.auxv.len());
    path(&memory.exe)
}

fn mapping(mapping: &Mapping) -> Result<(), Invalid> {
    let (start, end) = (mapping.start, mapping.end);
    require!(start < end && end <= ADDRESS_MAX, "addresses {start:#x} to {end:#x}");
    require!(start % PAGE_SIZE == 0 && end % PAGE_SIZE == 0, "addresses {start:#x} to {end:#x}, not of pages");
    require!((0..8).contains(&mapping.protection), "protection {:#x}", mapping.protection);
    require!(mapping.protection_key < 16, "protection key {}", mapping.protection_key);
    let offset = match &mapping.source {
        Source::File { path, offset, .. } => {
            self::path(path)?;
            *offset
        }
        Source::Object { offset, .. } | Source::Deleted { offset, .. } => *offset,
        Source::Anonymous | Source::Vdso | Source::Vvar => 0,
    };
    require!(offset % PAGE_SIZE == 0 && offset <= i64::MAX as u64 - (end - start), "offset {offset:#x}");
    for flag in &mapping.flags {
        require!(flag.iter().all(u8::is_ascii_lowercase), "flag {:?}", flag.escape_ascii().to_string());
    }
    if let Some(anonymous) = &mapping.anonymous_name {
        name(anonymous, 79)?;
    }
    let guards = mapping.guards.iter().map(|run| (run.start, run.pages));
    runs(guards, start, end).map_err(|invalid| invalid.within("guards"))?;
    pages(&mapping.pages, start, end)
}

fn object(object: &Object) -> Result<(), Invalid> {
    require!(object.size <= i64::MAX as u64 - PAGE_SIZE, "{} bytes", object.size);
    if let ObjectKind::Memfd { name: memfd, .. } = &object.kind {
        name(memfd, 249)?;
    }
    pages(&object.pages, 0, object.size.next_multiple_of(PAGE_SIZE))
}

fn pages(pages: &[Pages], start: u64, end: u64) -> Result<(), Invalid> {
    runs(pages.iter().map(|run| (run.start, run.extent.pages)), start, end)
}

/// Runs of pages (start, number) are sorted, disjoint, and between `start` and `end`.
fn runs(runs: impl Iterator<Item = (u64, u64)>, start: u64, end: u64) -> Result<(), Invalid> {
    let mut least = start;
    for (at, pages) in runs {
        let run_end = pages.checked_mul(PAGE_SIZE).and_then(|length| at.checked_add(length));
        let fits = at % PAGE_SIZE == 0 && at >= least && run_end.is_some_and(|run_end| run_end <= end);
        require!(fits, "a run of {pages} pages at {at:#x}, where {least:#x} to {end:#x} is free");
        least = run_end.expect("it fits");
    }
    Ok(())
}

fn table(table: &Table) -> Result<(), Invalid> {
    let mut least = 0;
    for held in &table.descriptors {
        require!((least..FD_MAX).contains(&held.fd), "descriptor {} after {}", held.fd, least - 1);
        least = held.fd + 1;
    }
    Ok(())
}

fn file(file: &OpenFile) -> Result<(), Invalid> {
    if let Some(owner) = file.owner {
        require!((0..=SIGNAL_MAX).contains(&owner.signal), "owner's signal {}", owner.signal);
    }
    Ok(())
}

fn deleted_file(file: &DeletedFile) -> Result<(), Invalid> {
    for attribute in &file.extended_attributes {
        // XATTR_NAME_MAX and XATTR_SIZE_MAX of linux/limits.h.
        name(attribute.name.as_encoded_bytes(), 255)?;
        let size = attribute.value.len();
        require!(size <= 65536, "an extended attribute of {size} bytes");
    }
    path(&file.path)
}

fn path(path: &std::path::Path) -> Result<(), Invalid> {
    name(path.as_os_str().as_encoded_bytes(), PATH_MAX)
}

fn name(name: &[u8], most: usize) -> Result<(), Invalid> {
    require!(name.len() <= most, "a name of {} bytes, where {most} is the most", name.len());
    require!(!name.contains(&0), "a NUL byte in a name");
    Ok(())
}
