//! Strangers: processes outside of the tree that hold a pipe or FIFO of it.
//!
//! `/proc/PID/fd` of other processes is read once a dump, when it is asked for first, however many pipes the tree has. What
//! may not be read there is not known to be held.

use std::cell::OnceCell;
use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};

use super::descriptors::{FdInfo, Seen};
use crate::procfs::{self, ProcDir};
use crate::target::{Pid, Target};

/// What strangers hold of the tree's pipes and FIFOs.
#[derive(Debug, Default)]
pub struct Strangers {
    ancestors: OnceCell<Held>,
    all: OnceCell<Held>,
}

/// By the link of the file: who has it, and as which descriptor.
type Held = HashMap<OsString, Vec<(Pid, i32)>>;

impl Strangers {
    /// The ancestors of the tree that have a descriptor with this link: `12 (cat)`.
    pub fn ancestors(&self, tree: &[Box<dyn Target>], files: &[Seen], link: &OsStr) -> Vec<String> {
        let held = self.ancestors.get_or_init(|| {
            let parent = |proc: &ProcDir| proc.stat_line().map_or(Pid(0), |stat| stat.ppid);
            let mut next = parent(tree[0].proc());
            let line = std::iter::from_fn(|| {
                let proc = (next.0 > 0).then(|| ProcDir::open(next).ok()).flatten()?;
                next = parent(&proc);
                Some(proc)
            });
            look(line, files)
        });
        names(held, link, None)
    }

    /// The processes outside of the tree, other than ckpt, that have a descriptor with this link, and this access mode if
    /// one is wanted.
    pub fn holders(&self, tree: &[Box<dyn Target>], files: &[Seen], link: &OsStr, access: Option<i32>) -> Vec<String> {
        let held = self.all.get_or_init(|| {
            let ours: HashSet<Pid> = tree.iter().map(|target| target.pid()).collect();
            let strangers =
                procfs::all_pids().into_iter().filter(|pid| pid.0 as u32 != std::process::id() && !ours.contains(pid));
            look(strangers.filter_map(|pid| ProcDir::open(pid).ok()), files)
        });
        names(held, link, access)
    }
}

/// Which of the pipes and FIFOs among these files the processes hold.
fn look(processes: impl Iterator<Item = ProcDir>, files: &[Seen]) -> Held {
    let wanted: HashSet<&OsStr> =
        files.iter().filter(|seen| seen.file_type() == libc::S_IFIFO).map(|seen| seen.link.as_os_str()).collect();
    let mut held = Held::new();
    for proc in processes {
        for fd in proc.numbers("fd").unwrap_or_default() {
            if let Ok(link) = proc.link(format!("fd/{fd}"))
                && wanted.contains(link.as_os_str())
            {
                held.entry(link).or_default().push((proc.pid(), fd));
            }
        }
    }
    held
}

/// The names of those that hold it, each once.
fn names(held: &Held, link: &OsStr, access: Option<i32>) -> Vec<String> {
    let mut names = Vec::new();
    for process in held.get(link).map_or(&[][..], Vec::as_slice).chunk_by(|one, next| one.0 == next.0) {
        let Ok(proc) = ProcDir::open(process[0].0) else { continue };
        if process.iter().any(|&(_, fd)| access.is_none_or(|wanted| has_mode(&proc, fd, wanted))) {
            let name = proc.text("comm").unwrap_or_default();
            names.push(format!("{} ({})", proc.pid(), name.trim_end()));
        }
    }
    names
}

/// Whether a descriptor has an access mode, or both. If that cannot be read, it may have.
fn has_mode(proc: &ProcDir, fd: i32, wanted: i32) -> bool {
    let info = proc.text(format!("fdinfo/{fd}")).ok().and_then(|text| FdInfo::parse(&text));
    info.is_none_or(|info| [wanted, libc::O_RDWR].contains(&(info.flags & libc::O_ACCMODE)))
}
