//! The tree: pids, parents, sessions, groups, threads and zombies.

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork, getpgrp, getpid, getppid, getsid, gettid};

use crate::case::{Case, Checkpoint};

pub fn cases() -> Vec<Case> {
    vec![Case::new("tasks/ids", &["tasks"], ids), Case::new("tasks/children", &["tasks"], children)]
}

fn ids(checkpoint: &Checkpoint) -> Result<(), String> {
    let ids = || (getpid(), gettid(), getppid(), getpgrp(), getsid(None));
    let before = ids();
    checkpoint.wait()?;
    let after = ids();
    if before == after { Ok(()) } else { Err(format!("pid, tid, ppid, pgrp, sid were {before:?}, are {after:?}")) }
}

fn children(checkpoint: &Checkpoint) -> Result<(), String> {
    let parent = getpid();
    let mut children = Vec::new();
    for number in 0..4 {
        // SAFETY: this process has one thread; the child only uses async-signal-safe functions and leaves by _exit.
        match unsafe { fork() }.map_err(|error| format!("fork: {error}"))? {
            ForkResult::Child => {
                let waited = checkpoint.wait_for_go().is_ok();
                let status = if waited && getppid() == parent { 40 + number } else { 1 };
                // SAFETY: ends the child without running the parent's exit handlers.
                unsafe { libc::_exit(status) }
            }
            ForkResult::Parent { child } => children.push(child),
        }
    }
    checkpoint.wait()?;
    for (number, child) in children.into_iter().enumerate() {
        let expected = WaitStatus::Exited(child, 40 + number as i32);
        let found = waitpid(child, None);
        if found != Ok(expected) {
            return Err(format!("waitpid({child}): expected {expected:?}, found {found:?}"));
        }
    }
    Ok(())
}
