//! Making the mappings of an image in a skeleton.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use crate::args;
use crate::batch::{Arg, Batch, Slot, Sysno};
use crate::crew;
use crate::error::RestoreError;
use crate::host::kernel_is_at_least;
use crate::image::Image;
use crate::resource::Check;
use crate::resource::files::{DeletedId, Expect, Identity, RebuiltDeleted, check_deleted, reopen};
use crate::resource::memory::objects::{self, Rebuilt};
use crate::resource::memory::{Filler, LockFuture, Mapping, Memory, NAME, Source};
use crate::store::ImageReader;
use crate::target::{PAGE_SIZE, RemoteFd, Target, TargetError};

/// Whether every file is as it was, and the kernel's own mappings are this kernel's.
pub fn check(memory: &Memory, context: &mut Check<'_>) {
    let mut files: HashMap<&Path, Identity> = HashMap::new();
    for mapping in &memory.mappings {
        if let Source::File { path, identity, .. } = &mapping.source {
            files.insert(path, *identity);
        }
    }
    if memory.mappings.iter().any(|mapping| !mapping.guards.is_empty()) && !kernel_is_at_least(6, 13) {
        let why = "it has guard pages (MADV_GUARD_INSTALL), which this kernel does not have";
        context.refuse("", why, "restore it under Linux 6.13 or later");
    }
    match memory.exe_deleted {
        None => _ = files.insert(&memory.exe, memory.exe_identity),
        Some(id) => check_deleted(id, context),
    }
    let mut files: Vec<_> = files.into_iter().collect();
    files.sort_unstable_by_key(|(path, _)| *path);
    for (path, identity) in files {
        if let Some(difference) = identity.difference(path, libc::S_IFREG, Expect::SameContent, &context.image.host) {
            let help = "its code or data is part of the program's memory: put the file back as it was at the dump";
            context.refuse(path.display().to_string(), difference, help);
        }
    }
}

/// Makes the memory that several mappings or descriptors share, with its content where the filler does not bring that.
///
/// The deleted files of the image go into what is returned.
pub fn rebuild_objects(
    targets: &mut [Box<dyn Target>],
    reader: &dyn ImageReader,
    deleted: RebuiltDeleted,
    filler: &mut dyn Filler,
) -> Result<Rebuilt, RestoreError> {
    let rebuilt = objects::rebuild(targets, reader, deleted, filler)?;
    filler.take_objects(reader.image(), &rebuilt.objects)?;
    Ok(rebuilt)
}

/// Makes the mappings of the image, without their pages.
pub fn map_all(
    targets: &mut [Box<dyn Target>],
    reader: &dyn ImageReader,
    rebuilt: &Rebuilt,
) -> Result<(), RestoreError> {
    crew::each(targets, &reader.image().processes, |_, target, process| map_process(target, &process.memory, rebuilt))?;
    objects::seal(&reader.image().memory_objects, &rebuilt.objects)
}

/// What is mapped, as a key: descriptors are opened once for all its mappings.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Opened {
    Path(PathBuf, bool),
    Ours(usize, bool),
}

struct Mapper<'a> {
    target: &'a mut dyn Target,
    batch: Batch,
    /// Files opened in this batch.
    open: HashMap<Opened, Arg>,
    /// Checks to be made once the batch has run: path, saved identity, `struct stat`.
    checks: Vec<(PathBuf, Identity, Slot)>,
}

fn map_process(target: &mut dyn Target, memory: &Memory, rebuilt: &Rebuilt) -> Result<(), RestoreError> {
    let pid = target.pid();
    let failed = |source: TargetError| RestoreError::Target { resource: NAME, pid, source };
    // Objects and deleted files that this process maps come in by descriptor.
    let all: Vec<&OwnedFd> = rebuilt.objects.iter().chain(&rebuilt.deleted.files).collect();
    let used = |mapping| ours(mapping, rebuilt.objects.len());
    let mut used: Vec<usize> =
        memory.mappings.iter().filter(|mapping| segment(mapping, rebuilt).is_none()).filter_map(used).collect();
    used.sort_unstable();
    used.dedup();
    let fds: Vec<_> = used.iter().map(|&index| all[index].as_fd()).collect();
    let passed: HashMap<usize, RemoteFd> = used.iter().copied().zip(target.fds_in(&fds).map_err(failed)?).collect();

    let special = target.footprint().special;
    let mut special = special.iter();
    let mut mapper = Mapper { target, batch: Batch::new(), open: HashMap::new(), checks: Vec::new() };
    for mapping in &memory.mappings {
        // With the files that are closed at its end.
        if !mapper.batch.has_room(8 + mapper.open.len(), 8192) {
            mapper.run()?;
        }
        if matches!(mapping.source, Source::Vdso | Source::Vvar) {
            let found = special.next().filter(|(_, parked)| parked.end - parked.start == mapping.end - mapping.start);
            let Some((_, parked)) = found else {
                let what = "this kernel's vdso is not like the one at the dump".to_string();
                return Err(RestoreError::Mismatch { resource: NAME, pid, what });
            };
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            let size = parked.end - parked.start;
            mapper.batch.call(Sysno::mremap, args![parked.start, size, size, flags, mapping.start]);
            continue;
        }
        if let Some((id, offset, writable)) = segment(mapping, rebuilt) {
            attach(mapping, id, offset, writable, &mut mapper.batch);
            continue;
        }
        let (file, offset) = mapper.source(mapping, rebuilt.objects.len(), &passed);
        let address = mapping.start;
        let size = mapping.end - mapping.start;
        mapper.batch.call(
            Sysno::mmap,
            &[
                address.into(),
                size.into(),
                first_protection(mapping).into(),
                map_flags(mapping).into(),
                file,
                offset.into(),
            ],
        );
    }
    for fd in passed.values() {
        if !mapper.batch.has_room(1 + mapper.open.len(), 0) {
            mapper.run()?;
        }
        mapper.batch.call(Sysno::close, args![*fd]);
    }
    mapper.run()
}

/// Of a mapping of a System V segment: its id, the offset, and whether it may be made writable.
fn segment(mapping: &Mapping, rebuilt: &Rebuilt) -> Option<(i32, u64, bool)> {
    let Source::Object { id, offset, writable } = mapping.source else { return None };
    Some((*rebuilt.segments.get(&id)?, offset, writable))
}

/// A segment is attached as a whole, and may be several mappings since. The plan has looked that all of it is there.
fn attach(mapping: &Mapping, id: i32, offset: u64, writable: bool, batch: &mut Batch) {
    let (flags, first) =
        if writable { (0, libc::PROT_READ | libc::PROT_WRITE) } else { (libc::SHM_RDONLY, libc::PROT_READ) };
    if offset == 0 {
        batch.call(Sysno::shmat, args![id, mapping.start, flags]);
    }
    if mapping.protection != first {
        batch.call(Sysno::mprotect, args![mapping.start, mapping.end - mapping.start, mapping.protection]);
    }
}

/// The index of what a mapping needs of ours: objects first, then deleted files.
fn ours(mapping: &Mapping, objects: usize) -> Option<usize> {
    match mapping.source {
        Source::Object { id, .. } => Some(id.0 as usize),
        Source::Deleted { id, .. } => Some(objects + id.0 as usize),
        _ => None,
    }
}

impl Mapper<'_> {
    /// The descriptor and offset for `mmap`.
    fn source(&mut self, mapping: &Mapping, objects: usize, passed: &HashMap<usize, RemoteFd>) -> (Arg, u64) {
        match &mapping.source {
            Source::Anonymous | Source::Vdso | Source::Vvar => (Arg::from(-1), 0),
            Source::File { path, identity, offset, writable } => {
                let key = Opened::Path(path.clone(), *writable);
                let known = self.open.get(&key).copied();
                let fd = known.unwrap_or_else(|| {
                    let name = self.batch.string(path.as_os_str().as_bytes());
                    let flags = if *writable { libc::O_RDWR } else { libc::O_RDONLY } | libc::O_CLOEXEC;
                    let fd = self.batch.call(Sysno::openat, args![libc::AT_FDCWD, name, flags]);
                    let stat = self.batch.room(size_of::<libc::stat>());
                    self.batch.call(Sysno::fstat, args![fd, stat]);
                    self.checks.push((path.clone(), *identity, stat));
                    fd.into()
                });
                self.open.insert(key, fd);
                (fd, *offset)
            }
            Source::Deleted { offset, writable, .. } | Source::Object { offset, writable, .. } => {
                let index = ours(mapping, objects).expect("it is one of ours");
                let fd = passed[&index];
                if *writable {
                    return (fd.into(), *offset);
                }
                // Opened for reading alone, so that it cannot be made writable.
                let key = Opened::Ours(index, false);
                let known = self.open.get(&key).copied();
                let fd = known.unwrap_or_else(|| {
                    let name = self.batch.string(format!("/proc/self/fd/{fd}").as_bytes());
                    let flags = libc::O_RDONLY | libc::O_CLOEXEC;
                    self.batch.call(Sysno::openat, args![libc::AT_FDCWD, name, flags]).into()
                });
                self.open.insert(key, fd);
                (fd, *offset)
            }
        }
    }

    /// Runs what there is, with the files it opened closed.
    fn run(&mut self) -> Result<(), RestoreError> {
        let pid = self.target.pid();
        let mut batch = std::mem::take(&mut self.batch);
        for (_, fd) in self.open.drain() {
            batch.call(Sysno::close, &[fd]);
        }
        let replies = self.target.run(&batch).map_err(|source| RestoreError::Target { resource: NAME, pid, source })?;
        for (path, saved, stat) in self.checks.drain(..) {
            // struct stat of x86-64: device, inode, ..., size at 48, seconds and nanoseconds of change at 88
            let words = replies.words(stat);
            let same = words[6] == saved.size
                && (words[11] as i64).saturating_mul(1_000_000_000).saturating_add(words[12] as i64) == saved.modified;
            if !same {
                let what = format!("{} was changed while it was being mapped", path.display());
                return Err(RestoreError::Mismatch { resource: NAME, pid, what });
            }
        }
        Ok(())
    }
}

/// Pages are filled through the mapping. And what was writable once counts towards the commit limit for good (`ac`).
fn first_protection(mapping: &Mapping) -> i32 {
    let accounted = mapping.flags.contains(b"ac");
    if !mapping.shared && (accounted || !mapping.pages.is_empty()) {
        // Without PROT_EXEC, which may not go with it.
        return libc::PROT_READ | libc::PROT_WRITE;
    }
    mapping.protection
}

fn map_flags(mapping: &Mapping) -> i32 {
    let mut flags = libc::MAP_FIXED_NOREPLACE;
    flags |= if mapping.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
    if mapping.source == Source::Anonymous {
        flags |= libc::MAP_ANONYMOUS;
    }
    if mapping.flags.contains(b"gd") {
        flags |= libc::MAP_GROWSDOWN;
    }
    if mapping.flags.contains(b"nr") {
        flags |= libc::MAP_NORESERVE;
    }
    flags
}

/// The executables of an image that were deleted, opened for reading: the kernel takes none that is open for writing, and
/// those in [`Rebuilt`] are.
pub fn deleted_executables(image: &Image, rebuilt: &Rebuilt) -> Result<HashMap<DeletedId, OwnedFd>, RestoreError> {
    let ids = image.processes.iter().filter_map(|process| process.memory.exe_deleted);
    let open = |id: DeletedId| {
        let file = reopen(rebuilt.deleted.files[id.0 as usize].as_fd(), libc::O_RDONLY | libc::O_CLOEXEC, 0);
        let failed = |source: Errno| RestoreError::Io {
            what: "a deleted executable could not be opened again".into(),
            source: source.into(),
        };
        Ok((id, file.map_err(failed)?))
    };
    ids.map(open).collect()
}

/// Final protections, advice and locks, and the layout.
pub fn finish(
    target: &mut dyn Target,
    memory: &Memory,
    deleted_executables: &HashMap<DeletedId, OwnedFd>,
) -> Result<(), RestoreError> {
    let pid = target.pid();
    let failed = |source: TargetError| RestoreError::Target { resource: NAME, pid, source };
    let mut batch = Batch::new();
    for mapping in &memory.mappings {
        // Before mlock, which keeps guard pages from being made.
        for guard in &mapping.guards {
            if !batch.has_room(1, 0) {
                target.run(&std::mem::take(&mut batch)).map_err(failed)?;
            }
            batch.call(Sysno::madvise, args![guard.start, guard.pages * PAGE_SIZE, MADV_GUARD_INSTALL]);
        }
        if !batch.has_room(16, 512) {
            target.run(&std::mem::take(&mut batch)).map_err(failed)?;
        }
        settle(mapping, &mut batch);
    }
    if !batch.has_room(4, 4096 + 256) {
        target.run(&std::mem::take(&mut batch)).map_err(failed)?;
    }
    let exe_fd = if let Some(id) = memory.exe_deleted {
        target.run(&batch).map_err(failed)?;
        target.fds_in(&[deleted_executables[&id].as_fd()]).map_err(failed)?[0]
    } else {
        let exe = batch.string(memory.exe.as_os_str().as_bytes());
        let exe_fd = batch.call(Sysno::openat, args![libc::AT_FDCWD, exe, libc::O_RDONLY | libc::O_CLOEXEC]);
        target.run(&batch).map_err(failed)?.fd(exe_fd)
    };
    // A skeleton begins with ckpt's own link. When that is the one wanted, because the program is a ckpt itself, it
    // must not be set: the kernel refuses to replace one that is mapped, even by itself.
    let is_set = memory.exe_deleted.is_none() && has_exe(target, &memory.exe);
    let new_exe = if is_set { u32::MAX } else { exe_fd.0 as u32 };

    let layout = &memory.layout;
    let mut batch = Batch::new();
    let auxv = batch.bytes(&memory.auxv);
    // struct prctl_mm_map
    let map = batch.words(&[
        layout.start_code,
        layout.end_code,
        layout.start_data,
        layout.end_data,
        layout.start_brk,
        layout.brk,
        layout.start_stack,
        layout.arg_start,
        layout.arg_end,
        layout.env_start,
        layout.env_end,
        0,
        u64::from(new_exe) << 32 | memory.auxv.len() as u64,
    ]);
    batch.pointer(map, 88, auxv);
    batch.call(Sysno::prctl, args![libc::PR_SET_MM, libc::PR_SET_MM_MAP, map, map.len(), 0]);
    batch.call(Sysno::close, args![exe_fd]);
    match memory.lock_future {
        LockFuture::No => {}
        LockFuture::Locked => _ = batch.call(Sysno::mlockall, args![libc::MCL_FUTURE]),
        LockFuture::OnFault => _ = batch.call(Sysno::mlockall, args![libc::MCL_FUTURE | libc::MCL_ONFAULT]),
    }
    target.run(&batch).map_err(failed)?;
    Ok(())
}

/// Whether `/proc/PID/exe` leads to a file already.
fn has_exe(target: &dyn Target, exe: &Path) -> bool {
    match (target.proc().stat("exe"), nix::sys::stat::stat(exe)) {
        (Ok(now), Ok(wanted)) => (now.st_dev, now.st_ino) == (wanted.st_dev, wanted.st_ino),
        _ => false,
    }
}

const PR_SET_VMA: i32 = 0x5356_4d41;
const PR_SET_VMA_ANON_NAME: i32 = 0;
const MLOCK_ONFAULT: i32 = 1;
/// Kernel 6.13.
const MADV_GUARD_INSTALL: i32 = 102;

/// What of one mapping is not set by `mmap`.
fn settle(mapping: &Mapping, batch: &mut Batch) {
    let (start, size) = (mapping.start, mapping.end - mapping.start);
    if matches!(mapping.source, Source::Vdso | Source::Vvar) {
        return;
    }
    if first_protection(mapping) != mapping.protection {
        batch.call(Sysno::mprotect, args![start, size, mapping.protection]);
    }
    let advice = [
        (b"sr", libc::MADV_SEQUENTIAL),
        (b"rr", libc::MADV_RANDOM),
        (b"dc", libc::MADV_DONTFORK),
        (b"dd", libc::MADV_DONTDUMP),
        (b"wf", libc::MADV_WIPEONFORK),
        (b"mg", libc::MADV_MERGEABLE),
        (b"hg", libc::MADV_HUGEPAGE),
        (b"nh", libc::MADV_NOHUGEPAGE),
    ];
    for (flag, advice) in advice {
        if mapping.flags.contains(flag) {
            batch.call(Sysno::madvise, args![start, size, advice]);
        }
    }
    if let Some(name) = &mapping.anonymous_name {
        let name = batch.string(name);
        batch.call(Sysno::prctl, args![PR_SET_VMA, PR_SET_VMA_ANON_NAME, start, size, name]);
    }
    if mapping.flags.contains(b"lf") {
        batch.call(Sysno::mlock2, args![start, size, MLOCK_ONFAULT]);
    } else if mapping.flags.contains(b"lo") {
        if mapping.guards.is_empty() {
            batch.call(Sysno::mlock, args![start, size]);
        } else {
            // It locks all, and then finds that it cannot bring in a guard page.
            batch.try_call(Sysno::mlock, args![start, size]);
        }
    }
    if mapping.flags.contains(b"sl") {
        const MSEAL: Sysno = Sysno::mseal;
        batch.call(MSEAL, args![start, size, 0]);
    }
}
