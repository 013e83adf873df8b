//! The tree: pids, parents, sessions, groups, threads and zombies.

use std::fs;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};

use nix::sys::signal::{Signal, kill, raise};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getpgrp, getpid, getppid, getsid, gettid, setpgid, setsid};

use super::compiled::{self, Compiled};
use crate::case::{Case, Checkpoint};

pub fn cases() -> Vec<Case> {
    let tasks = &["tasks"];
    vec![
        Case::new("tasks/ids", tasks, ids),
        Case::new("tasks/children", tasks, children),
        Case::new("tasks/deep", tasks, deep),
        Case::new("tasks/orphans", tasks, orphans),
        Case::new("tasks/sessions-and-groups", tasks, sessions_and_groups),
        Case::new("tasks/zombies", tasks, zombies),
        Case::new("tasks/zombie-with-core", tasks, zombie_with_core).refused_at_dump("with a core dump"),
        Case::new("tasks/exit-signal", tasks, exit_signal),
        Case::new("tasks/threads", tasks, threads),
        Case::new("tasks/threads-of-children", tasks, threads_of_children),
        Case::new("tasks/stopped-child", &["tasks", "signals"], stopped_child).needs(&["stopped processes"]),
        Case::program("tasks/calls-by-number", tasks, compiled::program(|dir| BY_NUMBER.command(dir))).rounds(3),
        Case::program(
            "tasks/started-in-all-ways",
            &["files", "pipes", "tasks"],
            compiled::program(|dir| STARTED.command(dir)),
        )
        .rounds(3),
        Case::program("tasks/storm", tasks, compiled::program(|dir| STORM.command(dir))).restless().rounds(3),
    ]
}

const BY_NUMBER: Compiled = Compiled::new(include_str!("compiled/raw.c"));
const STARTED: Compiled = Compiled::new(include_str!("compiled/starts.c"));
const STORM: Compiled = Compiled::new(include_str!("compiled/storm.c"));

fn text(what: &'static str) -> impl Fn(nix::Error) -> String {
    move |error| format!("{what}: {error}")
}

/// A child that runs `work` and exits with what it returns. Of a process with one thread.
fn child(work: impl FnOnce() -> i32) -> Result<Pid, String> {
    // SAFETY: this process has one thread, and the child leaves by _exit.
    match unsafe { fork() }.map_err(text("fork"))? {
        ForkResult::Child => {
            let status = work();
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(status) }
        }
        ForkResult::Parent { child } => Ok(child),
    }
}

fn expect_end(child: Pid, expected: WaitStatus) -> Result<(), String> {
    match waitpid(child, None) {
        Ok(found) if found == expected => Ok(()),
        found => Err(format!("waitpid({child}): expected {expected:?}, found {found:?}")),
    }
}

/// Words in memory that all processes of the subject share.
fn shared_words() -> Result<&'static [AtomicU32; 64], String> {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping that is never unmapped, of zeros, which are valid words.
    unsafe {
        let address = libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0);
        if address == libc::MAP_FAILED { Err("mmap failed".into()) } else { Ok(&*address.cast()) }
    }
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) -> Result<(), String> {
    let begin = std::time::Instant::now();
    while !condition() {
        if begin.elapsed().as_secs() > 20 {
            return Err(format!("waited in vain for {what}"));
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    Ok(())
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
        children.push(child(|| {
            let own = getpid();
            let waited = checkpoint.wait_for_go().is_ok();
            if waited && getppid() == parent && getpid() == own { 40 + number } else { 1 }
        })?);
    }
    checkpoint.wait()?;
    for (number, child) in children.into_iter().enumerate() {
        expect_end(child, WaitStatus::Exited(child, 40 + number as i32))?;
    }
    Ok(())
}

/// A chain of ten processes, each the parent of the next.
fn deep(checkpoint: &Checkpoint) -> Result<(), String> {
    fn descend(checkpoint: &Checkpoint, left: i32) -> i32 {
        if left == 0 {
            return if checkpoint.ready().and_then(|()| checkpoint.wait_for_go()).is_ok() { 0 } else { 1 };
        }
        match child(|| descend(checkpoint, left - 1)) {
            Ok(next) if expect_end(next, WaitStatus::Exited(next, 0)).is_ok() => 0,
            _ => 1,
        }
    }
    let first = child(|| descend(checkpoint, 9))?;
    checkpoint.wait_for_go()?;
    expect_end(first, WaitStatus::Exited(first, 0))
}

/// Grandchildren whose parent has ended: the subject, a subreaper, is their parent now.
fn orphans(checkpoint: &Checkpoint) -> Result<(), String> {
    nix::sys::prctl::set_child_subreaper(true).map_err(text("prctl"))?;
    let words = shared_words()?;
    let subject = getpid();
    let between = child(|| {
        let orphan = child(|| {
            let waited = wait_for("the new parent", || getppid() == subject).is_ok();
            words[0].store(1, SeqCst);
            if waited && checkpoint.wait_for_go().is_ok() && getppid() == subject { 31 } else { 1 }
        });
        words[1].store(orphan.map_or(0, |pid| pid.as_raw() as u32), SeqCst);
        0
    })?;
    expect_end(between, WaitStatus::Exited(between, 0))?;
    wait_for("the orphan", || words[0].load(SeqCst) == 1)?;
    checkpoint.wait()?;
    let orphan = Pid::from_raw(words[1].load(SeqCst) as i32);
    expect_end(orphan, WaitStatus::Exited(orphan, 31))?;
    // And it still is one who adopts.
    let between =
        child(|| i32::from(child(|| if wait_for("", || getppid() == subject).is_ok() { 32 } else { 1 }).is_err()))?;
    expect_end(between, WaitStatus::Exited(between, 0))?;
    match waitpid(None, None) {
        Ok(WaitStatus::Exited(_, 32)) => Ok(()),
        other => Err(format!("a later orphan was not adopted: {other:?}")),
    }
}

fn sessions_and_groups(checkpoint: &Checkpoint) -> Result<(), String> {
    let words = shared_words()?;
    let settled = |place: usize, as_expected: &dyn Fn() -> bool| {
        let before = as_expected();
        words[place].store(1, SeqCst);
        let waited = checkpoint.wait_for_go().is_ok();
        if before && waited && as_expected() { 0 } else { 1 }
    };
    let session = getsid(None).map_err(text("getsid"))?;
    // 0: in a group of its own. 1: in the group of 0. 2: in a session of its own, 3: in that session, a group of its own.
    let leader = child(|| {
        let made = setpgid(Pid::from_raw(0), Pid::from_raw(0)).is_ok();
        settled(0, &|| made && getpgrp() == getpid() && getsid(None) == Ok(session))
    })?;
    wait_for("the first group", || words[0].load(SeqCst) == 1)?;
    let member = child(|| {
        let joined = setpgid(Pid::from_raw(0), leader).is_ok();
        settled(1, &|| joined && getpgrp() == leader && getsid(None) == Ok(session))
    })?;
    let other = child(|| {
        let own = setsid();
        let inner = child(|| {
            let made = setpgid(Pid::from_raw(0), Pid::from_raw(0)).is_ok();
            settled(3, &|| made && getpgrp() == getpid() && getsid(None) == own)
        });
        let status = settled(2, &|| getsid(None) == own && own == Ok(getpid()) && getpgrp() == getpid());
        match inner {
            Ok(inner) if expect_end(inner, WaitStatus::Exited(inner, 0)).is_ok() => status,
            _ => 1,
        }
    })?;
    wait_for("all groups", || (0..4).all(|place| words[place].load(SeqCst) == 1))?;
    checkpoint.wait()?;
    for child in [leader, member, other] {
        expect_end(child, WaitStatus::Exited(child, 0))?;
    }
    Ok(())
}

fn zombies(checkpoint: &Checkpoint) -> Result<(), String> {
    let exited = child(|| 17)?;
    let killed = child(|| {
        // SAFETY: limits only what this child leaves behind.
        unsafe { libc::setrlimit(libc::RLIMIT_CORE, &libc::rlimit { rlim_cur: 0, rlim_max: 0 }) };
        let _ = raise(Signal::SIGTERM);
        1
    })?;
    // A zombie that leads a group whose member lives on.
    let leader = child(|| {
        let made = setpgid(Pid::from_raw(0), Pid::from_raw(0));
        if made.is_ok() { 5 } else { 1 }
    })?;
    for zombie in [exited, killed, leader] {
        waitid(Id::Pid(zombie), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT).map_err(text("waitid"))?;
    }
    checkpoint.wait()?;
    expect_end(exited, WaitStatus::Exited(exited, 17))?;
    expect_end(killed, WaitStatus::Signaled(killed, Signal::SIGTERM, false))?;
    expect_end(leader, WaitStatus::Exited(leader, 5))
}

/// A child that dumped core. No restored one could say so of itself: the kernel says it only of those that did.
fn zombie_with_core(checkpoint: &Checkpoint) -> Result<(), String> {
    let dumped = child(|| {
        let unlimited = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
        // SAFETY: a limit of ours.
        unsafe { libc::setrlimit(libc::RLIMIT_CORE, &unlimited) };
        let _ = raise(Signal::SIGQUIT);
        1
    })?;
    waitid(Id::Pid(dumped), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT).map_err(text("waitid"))?;
    checkpoint.wait()?;
    expect_end(dumped, WaitStatus::Signaled(dumped, Signal::SIGQUIT, true))
}

static SIGNALLED: AtomicU32 = AtomicU32::new(0);

extern "C" fn note(_: libc::c_int) {
    SIGNALLED.fetch_add(1, SeqCst);
}

/// A child whose end is told by SIGUSR1 and not SIGCHLD.
fn exit_signal(checkpoint: &Checkpoint) -> Result<(), String> {
    // SAFETY: the handler only touches an atomic; this process has one thread, and the child leaves by _exit.
    let child = unsafe {
        libc::signal(libc::SIGUSR1, note as *const () as libc::sighandler_t);
        let child = libc::syscall(libc::SYS_clone, libc::SIGUSR1, 0, 0, 0, 0);
        if child == 0 {
            libc::_exit(if checkpoint.wait_for_go().is_ok() { 3 } else { 1 });
        }
        child as i32
    };
    checkpoint.wait()?;
    let mut status = 0;
    // SAFETY: a status of ours.
    let found = unsafe { libc::waitpid(child, &mut status, libc::__WALL) };
    if (found, status) != (child, 3 << 8) {
        return Err(format!("waitpid({child}) with __WALL: {found}, status {status:#x}"));
    }
    match SIGNALLED.load(SeqCst) {
        1 => Ok(()),
        count => Err(format!("SIGUSR1 should come once at the child's end, came {count} times")),
    }
}

/// Fifty threads, with names, ids and something each on its stack.
fn threads(checkpoint: &Checkpoint) -> Result<(), String> {
    threads_while(|| checkpoint.wait())
}

fn threads_while(wait: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    const COUNT: usize = 50;
    let (all_there, stop) = (Barrier::new(COUNT + 1), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..COUNT)
            .map(|number| {
                let (all_there, stop) = (&all_there, &stop);
                let body = move || {
                    let look = || (gettid(), fs::read_to_string("/proc/thread-self/comm").unwrap_or_default());
                    let mut stack = [number as u8; 1000];
                    std::hint::black_box(&mut stack);
                    let before = look();
                    all_there.wait();
                    while !stop.load(SeqCst) {
                        std::thread::sleep(std::time::Duration::from_millis(2));
                    }
                    let after = look();
                    let expected = format!("number {number}\n");
                    if before != after || after.1 != expected {
                        return Err(format!("thread {number} was {before:?}, is {after:?}"));
                    }
                    match stack.iter().find(|&&byte| byte != number as u8) {
                        None => Ok(()),
                        Some(byte) => Err(format!("thread {number} finds {byte} on its stack")),
                    }
                };
                std::thread::Builder::new()
                    .name(format!("number {number}"))
                    .spawn_scoped(scope, body)
                    .expect("a thread")
            })
            .collect();
        all_there.wait();
        let waited = wait();
        stop.store(true, SeqCst);
        let results = threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"));
        waited.and(results)
    })
}

fn threads_of_children(checkpoint: &Checkpoint) -> Result<(), String> {
    let words = shared_words()?;
    let mut children = Vec::new();
    for word in &words[..2] {
        children.push(child(|| {
            let result = threads_while(|| {
                word.store(1, SeqCst);
                checkpoint.wait_for_go()
            });
            result.map_or_else(
                |failure| {
                    eprintln!("{failure}");
                    1
                },
                |()| 0,
            )
        })?);
    }
    wait_for("the threads of the children", || (0..2).all(|place| words[place].load(SeqCst) == 1))?;
    checkpoint.wait()?;
    for child in children {
        expect_end(child, WaitStatus::Exited(child, 0))?;
    }
    Ok(())
}

/// Stopped by SIGSTOP before the dump: it stays stopped until SIGCONT comes.
fn stopped_child(checkpoint: &Checkpoint) -> Result<(), String> {
    let words = shared_words()?;
    let stopped = child(|| {
        let _ = raise(Signal::SIGSTOP);
        words[0].store(1, SeqCst);
        9
    })?;
    match waitpid(stopped, Some(WaitPidFlag::WUNTRACED)) {
        Ok(WaitStatus::Stopped(_, Signal::SIGSTOP)) => {}
        other => return Err(format!("the child did not stop: {other:?}")),
    }
    checkpoint.wait()?;
    let state = fs::read_to_string(format!("/proc/{stopped}/stat")).unwrap_or_default();
    if words[0].load(SeqCst) != 0 || !state.contains(") T ") {
        return Err(format!("the child does not stay stopped: {state}"));
    }
    kill(stopped, Signal::SIGCONT).map_err(text("kill"))?;
    expect_end(stopped, WaitStatus::Exited(stopped, 9))
}
