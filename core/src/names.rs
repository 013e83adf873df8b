//! Ids by other names: an image says everything in the ids that the programs know, whatever the kernel calls them.
//!
//! In a tree with *virtual ids* the two differ. Resources know nothing of that: everything is collected in real ids, and
//! the whole image is renamed before it is written; it is renamed again before anything is rebuilt.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::image::{Image, Process, Task};
use crate::resource::descriptors::{FileKind, OpenFile};
use crate::resource::files::{File, Place};
use crate::resource::locks::Kind;
use crate::resource::terminals::Terminal;
use crate::target::{Pid, SigInfo};

/// What an id is to be called.
pub type Names = Box<dyn Fn(Pid) -> Pid + Send + Sync>;

impl Image {
    /// Gives every id in the image another name.
    pub fn rename(&mut self, name: &dyn Fn(Pid) -> Pid) {
        for process in &mut self.processes {
            rename_process(process, name);
        }
        for zombie in &mut self.zombies {
            rename_task(&mut zombie.task, name);
        }
        for file in &mut self.files {
            rename_file(file, name);
        }
        for segment in &mut self.sysvipc.segments {
            segment.creator = name(segment.creator);
        }
        for set in &mut self.sysvipc.semaphores {
            set.semaphores.iter_mut().for_each(|semaphore| semaphore.last = name(semaphore.last));
            set.undo.iter_mut().for_each(|undo| undo.process = name(undo.process));
        }
        for queue in &mut self.sysvipc.queues {
            queue.sender = name(queue.sender);
            queue.receiver = name(queue.receiver);
        }
        for lock in &mut self.locks {
            if let Kind::Posix { process } = &mut lock.kind {
                *process = name(*process);
            }
        }
    }
}

fn rename_task(task: &mut Task, name: &dyn Fn(Pid) -> Pid) {
    for id in [&mut task.pid, &mut task.ppid, &mut task.pgid, &mut task.sid] {
        *id = name(*id);
    }
}

fn rename_process(process: &mut Process, name: &dyn Fn(Pid) -> Pid) {
    rename_task(&mut process.task, name);
    process.signals.pending.iter_mut().for_each(|info| rename_sender(info, name));
    for thread in &mut process.threads {
        thread.tid = name(thread.tid);
        thread.signals.pending.iter_mut().for_each(|info| rename_sender(info, name));
    }
    for timer in &mut process.timers.posix {
        timer.thread = timer.thread.map(|thread| name(Pid(thread)).0);
        // A negative clock holds the complement of an id, and three bits, which are 3 for a device (clock_getres(2)).
        let id = !(timer.clock >> 3);
        if timer.clock < 0 && timer.clock & 7 != 3 && id > 0 {
            timer.clock = !name(Pid(id)).0 << 3 | timer.clock & 7;
        }
    }
}

fn rename_file(file: &mut OpenFile, name: &dyn Fn(Pid) -> Pid) {
    if let Some(owner) = &mut file.owner {
        // Some kernels' calls give groups as negative numbers.
        let id = name(Pid(owner.id.abs())).0;
        owner.id = if owner.id < 0 { -id } else { id };
    }
    match &mut file.kind {
        FileKind::File(File { place: Place::Proc { path }, .. }) => rename_proc_path(path, name),
        FileKind::Mqueue(open) => {
            let notification = open.queue.as_mut().and_then(|queue| queue.notification.as_mut());
            if let Some(notification) = notification {
                notification.process = name(notification.process);
            }
        }
        FileKind::Pidfd(pidfd) => pidfd.pid = name(pidfd.pid),
        FileKind::Terminal(Terminal::Master(master)) => {
            master.session = name(master.session);
            master.foreground = name(master.foreground);
        }
        FileKind::UnixSocket(socket) => {
            if let Some(peer) = &mut socket.peer {
                peer.pid = name(peer.pid);
            }
            for message in &mut socket.queue {
                if let Some((pid, ..)) = &mut message.credentials {
                    *pid = name(*pid);
                }
            }
        }
        _ => {}
    }
}

/// `/proc/PID` and `/proc/PID/task/TID`, and what is below.
fn rename_proc_path(path: &mut PathBuf, name: &dyn Fn(Pid) -> Pid) {
    let mut before = OsString::new();
    let renamed = path.iter().enumerate().map(|(place, part)| {
        let is_id = place == 2 || place == 4 && before == "task";
        before = part.to_owned();
        match part.to_str().and_then(|text| text.parse::<i32>().ok()) {
            Some(id) if is_id => name(Pid(id)).to_string().into(),
            _ => part.to_owned(),
        }
    });
    *path = renamed.collect();
}

/// The sender of a signal: of `kill`, `sigqueue`, `tgkill` and message queues, and the child that SIGCHLD is about.
fn rename_sender(info: &mut SigInfo, name: &dyn Fn(Pid) -> Pid) {
    let word = |at: usize| i32::from_ne_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]);
    let (signal, code, pid) = (word(0), word(8), word(16));
    let has_sender = matches!(code, libc::SI_USER | libc::SI_QUEUE | libc::SI_MESGQ | libc::SI_TKILL)
        || signal == libc::SIGCHLD && (1..=6).contains(&code);
    if has_sender && pid > 0 {
        info[16..20].copy_from_slice(&name(Pid(pid)).0.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_below_proc_are_renamed() {
        let rows = [
            ("/proc/7/maps", "/proc/107/maps"),
            ("/proc/7/task/8/stat", "/proc/107/task/108/stat"),
            ("/proc/7", "/proc/107"),
            ("/proc/7/fd/9", "/proc/107/fd/9"),
            ("/proc/sys/kernel/7", "/proc/sys/kernel/7"),
            ("/proc/loadavg", "/proc/loadavg"),
        ];
        for (before, after) in rows {
            let mut path = PathBuf::from(before);
            rename_proc_path(&mut path, &|id| Pid(id.0 + 100));
            assert_eq!(path, PathBuf::from(after));
        }
    }

    #[test]
    fn senders_are_renamed_and_values_are_not() {
        let info = |signal: i32, code: i32, pid: i32| {
            let mut info = [0; 128];
            for (at, word) in [(0, signal), (8, code), (16, pid)] {
                info[at..at + 4].copy_from_slice(&word.to_ne_bytes());
            }
            info
        };
        let plus = |id: Pid| Pid(id.0 + 1000);
        for (signal, code, renamed) in [
            (libc::SIGUSR1, libc::SI_USER, true),
            (libc::SIGUSR1, libc::SI_TKILL, true),
            (libc::SIGRTMIN(), libc::SI_QUEUE, true),
            (libc::SIGCHLD, libc::CLD_EXITED, true),
            (libc::SIGALRM, libc::SI_TIMER, false),
            (libc::SIGSEGV, 1, false),
        ] {
            let mut found = info(signal, code, 7);
            rename_sender(&mut found, &plus);
            assert_eq!(found, info(signal, code, if renamed { 1007 } else { 7 }), "signal {signal}, code {code}");
        }
    }
}
