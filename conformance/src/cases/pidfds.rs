//! Descriptors of processes.

use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::SeqCst};

use crate::case::{Case, Checkpoint};
use crate::expect::{done, equal, eventually, in_child};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("pidfds/members", &["pidfds", "tasks"], members),
        Case::new("pidfds/thread", &["pidfds", "tasks"], thread),
        Case::new("pidfds/foreign", &["pidfds"], foreign).refused_at_dump("which is not part of the tree"),
        Case::new("pidfds/waited-for", &["pidfds"], waited_for).refused_at_dump("was waited for"),
    ]
}

type Verdict = Result<(), String>;

fn pidfd_open(pid: i32, flags: i32) -> Result<OwnedFd, String> {
    // SAFETY: makes a new descriptor, which nobody else owns.
    unsafe { Ok(OwnedFd::from_raw_fd(done("pidfd_open", libc::syscall(libc::SYS_pidfd_open, pid, flags))? as i32)) }
}

/// The process that a descriptor is of, as its fdinfo says.
fn pid_of(pidfd: &OwnedFd) -> Result<i32, String> {
    let path = format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd());
    let info = fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
    let pid = info.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok());
    pid.ok_or_else(|| format!("no pid in {info}"))
}

fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut poll = libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd of ours.
    unsafe { libc::poll(&mut poll, 1, 0) == 1 }
}

fn flags(pidfd: &OwnedFd) -> i32 {
    // SAFETY: takes no argument.
    unsafe { libc::fcntl(pidfd.as_raw_fd(), libc::F_GETFL) }
}

fn signal(pidfd: &OwnedFd, signal: i32) -> Result<i64, String> {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: no memory is passed.
    done("pidfd_send_signal", unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, none, 0) })
}

/// Of oneself, of a child, of one that waits to be waited for; and the parent's, which a child has.
fn members(checkpoint: &Checkpoint) -> Verdict {
    let own = pidfd_open(std::process::id() as i32, 0)?;
    let parent = std::process::id() as i32;
    let child = in_child(|| {
        checkpoint.wait_for_go()?;
        equal("the process of the parent's descriptor", parent, pid_of(&own)?)?;
        // Until its parent ends it.
        loop {
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    })?;
    let ended = in_child(|| Ok(()))?;
    let (of_child, of_ended) = (pidfd_open(child.0, libc::O_NONBLOCK)?, pidfd_open(ended.0, 0)?);
    eventually("the end of a child", || has_ended(&of_ended))?;
    let look = || -> Result<_, String> {
        Ok((pid_of(&own)?, pid_of(&of_child)?, pid_of(&of_ended)?, flags(&own), flags(&of_child)))
    };
    let before = look()?;
    checkpoint.wait()?;
    equal("pids and flags", before, look()?)?;
    equal(
        "whether they have ended",
        (false, false, true),
        (has_ended(&own), has_ended(&of_child), has_ended(&of_ended)),
    )?;
    ended.passed()?;
    signal(&of_child, libc::SIGKILL)?;
    eventually("the end of the other child", || has_ended(&of_child))?;
    let mut status = 0;
    // SAFETY: waits for our own child.
    done("waitpid", unsafe { libc::waitpid(child.0, &mut status, 0) })?;
    equal("its status", libc::SIGKILL, status)
}

/// Of a thread that is not the main one (`PIDFD_THREAD`, kernel 6.9).
fn thread(checkpoint: &Checkpoint) -> Verdict {
    let (id, stop) = (AtomicI32::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // SAFETY: asks only.
            id.store(unsafe { libc::gettid() }, SeqCst);
            while !stop.load(SeqCst) {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        });
        let judged = (|| {
            eventually("the thread's id", || id.load(SeqCst) != 0)?;
            let pidfd = pidfd_open(id.load(SeqCst), libc::O_EXCL)?;
            checkpoint.wait()?;
            equal("the thread", id.load(SeqCst), pid_of(&pidfd)?)?;
            equal("whether it has ended", false, has_ended(&pidfd))?;
            equal("PIDFD_THREAD", libc::O_EXCL, flags(&pidfd) & libc::O_EXCL)?;
            signal(&pidfd, 0)?;
            stop.store(true, SeqCst);
            eventually("its end", || has_ended(&pidfd))
        })();
        stop.store(true, SeqCst);
        judged
    })
}

/// Of the parent, which is not part of the tree.
fn foreign(checkpoint: &Checkpoint) -> Verdict {
    // SAFETY: asks only.
    let parent = unsafe { libc::getppid() };
    let pidfd = pidfd_open(parent, 0)?;
    checkpoint.wait()?;
    equal("the process", parent, pid_of(&pidfd)?)
}

fn waited_for(checkpoint: &Checkpoint) -> Verdict {
    let child = in_child(|| Ok(()))?;
    let pidfd = pidfd_open(child.0, 0)?;
    child.passed()?;
    checkpoint.wait()?;
    equal("the process", -1, pid_of(&pidfd)?)
}
