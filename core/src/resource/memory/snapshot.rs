//! Snapshots: of a tree that goes on, copies of the processes write the memory, while the processes are let go.
//!
//! A copy is a fork (`clone(2)` without CLONE_VM), so the kernel keeps a page for it from the moment when the program writes
//! to it. What a fork does not copy is written before: shared memory and deleted files, which are not copied on write;
//! mappings with MADV_DONTFORK and MADV_WIPEONFORK; and what ckpt writes itself (memory without read permission, pages of
//! `rseq`). All copies are made before the first process goes on, so that the image is of one instant.

use crate::backend::Frozen;
use crate::error::DumpError;
use crate::image::{Image, Process};
use crate::procfs::{self, ProcDir};
use crate::progress::{Meter, Phase, Progress};
use crate::resource::memory::{Later, Mapping, ObjectKind, Source};
use crate::store::ImageWriter;
use crate::target::{NotCopied, PAGE_SIZE, Pid, Target};

/// What the kernel shows as the name of a copy (`comm`).
pub const COPY_NAME: &str = "ckpt-copy";

/// From so many pages on a process gets a copy. Not measured on a quiet machine yet.
pub const WORTH_A_COPY: u64 = 256;

/// Whether a fork has the private pages of a mapping.
pub(super) fn is_copied(mapping: &Mapping) -> bool {
    !mapping.shared && !mapping.flags.iter().any(|flag| [b"dc", b"wf"].contains(&flag))
}

/// Whether copies of processes may write the memory of a tree that goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Snapshot {
    Possible,
    /// Each process writes its memory itself before it goes on.
    No,
}

impl Snapshot {
    /// Asked before the freeze, as it takes a look at all processes.
    pub fn asked() -> Snapshot {
        match unreaped_copy() {
            Some(pid) => not_possible(&format!(
                "the copy {pid} of an earlier dump has ended, and its parent, which inherits orphans, does not wait for it"
            )),
            None => Snapshot::Possible,
        }
    }

    /// Asked when everything is collected.
    pub fn of(self, targets: &[Box<dyn Target>], image: &Image) -> Snapshot {
        if self == Snapshot::No {
            return self;
        }
        // The copies are orphans: who inherits orphans would be told of them.
        let inherits =
            |target: &dyn Target, process: &Process| process.attributes.child_subreaper || is_init(target.proc());
        match targets.iter().zip(&image.processes).find(|(target, process)| inherits(&***target, process)) {
            Some((target, _)) => not_possible(&format!("process {} of the tree inherits orphans", target.pid())),
            None => self,
        }
    }

    /// Whether so many pages of one process shall be written by a copy of it.
    pub fn may_wait(&self, pages: u64) -> bool {
        *self == Snapshot::Possible && pages >= WORTH_A_COPY
    }
}

fn not_possible(why: &str) -> Snapshot {
    tracing::info!("the program stands still while its memory is written: {why}");
    Snapshot::No
}

/// Whether it is the init of its pid namespace.
fn is_init(proc: &ProcDir) -> bool {
    proc.status()
        .is_ok_and(|status| status.field("NSpid").is_some_and(|ids| ids.split_whitespace().next_back() == Some("1")))
}

/// A copy that has ended, and that nobody has waited for in good time.
fn unreaped_copy() -> Option<Pid> {
    /// Some look after their children every few seconds only.
    const GOOD_TIME: f64 = 60.0;
    let uptime: f64 = std::fs::read_to_string("/proc/uptime").ok()?.split_whitespace().next()?.parse().ok()?;
    let is_one = |pid: &Pid| {
        let stat = ProcDir::open(*pid).and_then(|proc| proc.stat_line());
        stat.is_ok_and(|stat| {
            // A tick is 10 ms to every program (USER_HZ).
            let age = uptime - stat.starttime as f64 / 100.0;
            stat.state == 'Z' && stat.comm == COPY_NAME.as_bytes() && age > GOOD_TIME
        })
    };
    procfs::all_pids().into_iter().find(is_one)
}

/// Writes what could wait: lets the tree go, and has copies write it, or, where there can be none, the processes before
/// they go.
pub fn write_later(
    mut frozen: Box<dyn Frozen>,
    image: &Image,
    later: Later,
    store: &mut dyn ImageWriter,
    progress: &mut dyn Progress,
) -> Result<(), DumpError> {
    if later.is_empty() {
        return frozen.thaw();
    }
    let copies = make_copies(&mut *frozen, image, &later);
    let Some(mut copies) = copies else {
        let writers = frozen.targets().iter_mut().map(|target| Some(&mut **target));
        later.write(writers, false, store, &mut Meter::new(progress, Phase::WritePages, None))?;
        return frozen.thaw();
    };
    frozen.thaw()?;
    let writers = copies.iter_mut().map(|copy| copy.as_mut().map(|copy| &mut **copy));
    later.write(writers, true, store, &mut Meter::new(progress, Phase::WritePages, None))
}

/// A copy of each process that has something to write; none at all, if one cannot be made.
fn make_copies(frozen: &mut dyn Frozen, image: &Image, later: &Later) -> Option<Vec<Option<Box<dyn Target>>>> {
    let pages: u64 = later.pages().sum();
    if pages * PAGE_SIZE > procfs::available_memory() {
        // If the program writes to all of it meanwhile, all of it is there twice.
        not_possible("there may be too little free memory for what it writes to meanwhile");
        return None;
    }
    let mut copies = Vec::with_capacity(image.processes.len());
    for (index, (pages, process)) in later.pages().zip(&image.processes).enumerate() {
        if pages == 0 {
            copies.push(None);
            continue;
        }
        match frozen.copy(index, &not_copied(process, image)) {
            Ok(copy) => copies.push(Some(copy)),
            Err(error) => {
                not_possible(&format!("process {} cannot be copied: {error}", process.task.pid));
                return None;
            }
        }
    }
    Some(copies)
}

/// What is shared is none of a copy's business. The kernel counts who has a System V segment, and notes who last came and went.
fn not_copied(process: &Process, image: &Image) -> NotCopied {
    let mut without = NotCopied::default();
    for mapping in process.memory.mappings.iter().filter(|mapping| mapping.shared) {
        let object = match mapping.source {
            Source::Object { id, .. } => image.memory_objects.get(id.0 as usize),
            _ => None,
        };
        if mapping.flags.contains(b"dc") {
            // It is not copied anyway.
        } else if object.is_some_and(|object| matches!(object.kind, ObjectKind::Segment { .. })) {
            without.hidden.push(mapping.start..mapping.end);
        } else {
            without.given_back.push(mapping.start..mapping.end);
        }
    }
    without
}
