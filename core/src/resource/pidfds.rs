//! Descriptors of processes (`pidfd_open`): which process or thread, from `/proc/PID/fdinfo`.
//!
//! Only those of the tree: another one is not the same after a restore, and one that has been waited for cannot be made
//! again.

use crate::args;
use crate::batch::{Replies, Sysno};
use crate::error::{DumpError, RestoreError};
use crate::image::Image;
use crate::resource::descriptors::{CollectFile, FileResource, OfFile, RebuildFile, Seen};
use crate::resource::{Check, Resource};
use crate::target::Pid;

/// Its saved form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pidfd {
    pub pid: Pid,
    /// It is of a thread, by its id (`PIDFD_THREAD`, kernel 6.9).
    pub thread: bool,
}

/// Descriptors of processes.
pub struct Pidfds;

/// The flag of an open file that says `PIDFD_THREAD`.
const PIDFD_THREAD: i32 = libc::O_EXCL;

impl Resource for Pidfds {
    const NAME: &'static str = "pidfds";
    type Scope = OfFile;
    type Saved = Pidfd;

    fn collect(context: &mut CollectFile<'_>) -> Result<Pidfd, DumpError> {
        let info = &context.seen.info;
        let thread = info.flags & PIDFD_THREAD != 0;
        let pid = info.field("Pid").and_then(|pid| pid.parse().ok()).map(Pid);
        let help = "have the program close it before the dump";
        match pid {
            None => context.refuse(format!("its fdinfo has an unknown form: {:?}", info.rest), help),
            Some(Pid(..=0)) => context.refuse("its process has ended, and was waited for", help),
            Some(pid) if !is_member(context, pid) => {
                context.refuse(format!("it is of process {pid}, which is not part of the tree"), help);
            }
            Some(_) => {}
        }
        Ok(Pidfd { pid: pid.unwrap_or(Pid(0)), thread })
    }

    fn check(saved: &Pidfd, context: &mut Check<'_>) {
        if !is_of(context.image, saved.pid) {
            let why = format!("it is of process {}, which is not part of the image", saved.pid);
            context.refuse("", why, "use another copy of the image");
        }
    }

    fn rebuild(saved: &Pidfd, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        let process = context.process();
        let flags = context.file().flags & libc::O_NONBLOCK | if saved.thread { PIDFD_THREAD } else { 0 };
        context.create(process, 1, 0, |batch| {
            let fd = batch.call(Sysno::pidfd_open, args![saved.pid.0, flags]);
            (fd, |_: &Replies| Ok(()))
        })
    }
}

impl FileResource for Pidfds {
    fn claims(seen: &Seen) -> bool {
        // With the file system of its own, kernel 6.9, some versions showed `pidfd:[INODE]`.
        seen.is_anon_inode("[pidfd]") || seen.link.to_str().is_some_and(|link| link.starts_with("pidfd:["))
    }

    fn finish(_saved: &Pidfd, _context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        Ok(())
    }
}

/// Whether a process, living or not, or a thread is of the frozen tree.
fn is_member(context: &CollectFile<'_>, pid: Pid) -> bool {
    let live = context.targets.iter().any(|target| target.threads().contains(&pid));
    live || context.zombies.iter().any(|zombie| zombie.task.pid == pid)
}

fn is_of(image: &Image, pid: Pid) -> bool {
    let mut threads = image.processes.iter().flat_map(|process| &process.threads);
    threads.any(|thread| thread.tid == pid) || image.zombies.iter().any(|zombie| zombie.task.pid == pid)
}
