//! Strangers: processes of the same user that have the ids of a tree while it is away. Nothing of the tree may reach them.

use std::collections::BTreeSet;
use std::fs;
use std::io;

use nix::errno::Errno;

use crate::ordinary;

/// All of them, each with how it looked when nobody knew it.
#[derive(Default)]
pub struct Strangers(Vec<(i32, String)>);

impl Strangers {
    /// Has strangers take ids that are free. The caller has one thread.
    pub fn take(&mut self, ids: &BTreeSet<i32>) -> io::Result<()> {
        for &id in ids {
            if self.pids().any(|known| known == id) {
                continue;
            }
            make(id).map_err(|error| io::Error::other(format!("a stranger with id {id}: {error}")))?;
            // Once it waits for good, nothing about it changes by itself.
            let begin = std::time::Instant::now();
            while !is_settled(id) {
                if begin.elapsed() > std::time::Duration::from_secs(10) {
                    return Err(io::Error::other(format!("the stranger with id {id} does not come to rest")));
                }
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
            self.0.push((id, look(id)));
        }
        Ok(())
    }

    pub fn pids(&self) -> impl Iterator<Item = i32> {
        self.0.iter().map(|(pid, _)| *pid)
    }

    /// What has become of any that something has reached.
    pub fn touched(&self) -> Result<(), String> {
        for (pid, before) in &self.0 {
            let now = look(*pid);
            if now == *before {
                continue;
            }
            let differing = before.lines().zip(now.lines()).find(|(before, now)| before != now);
            return Err(format!("the stranger with id {pid} was reached: {differing:?}"));
        }
        Ok(())
    }
}

/// Blocks every signal and waits: what comes stays pending, to be seen.
fn make(id: i32) -> io::Result<()> {
    let mut arguments = [0u64; 11];
    arguments[4] = libc::SIGCHLD as u64;
    arguments[8] = (&raw const id) as u64;
    arguments[9] = 1;
    // SAFETY: `struct clone_args`, as a fork with a chosen id (set_tid at 64); the child only makes system calls.
    let made = unsafe { libc::syscall(libc::SYS_clone3, arguments.as_ptr(), size_of_val(&arguments)) };
    if Errno::result(made)? != 0 {
        return Ok(());
    }
    // SAFETY: as above; the mask is the kernel's, so that it has the signals of the C library too.
    unsafe {
        let all = u64::MAX;
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const all, 0, 8);
        libc::close_range(0, u32::MAX, 0);
        if ordinary::become_ordinary().is_err() {
            libc::_exit(1);
        }
        loop {
            libc::pause();
        }
    }
}

fn is_settled(pid: i32) -> bool {
    let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
    read("syscall").split(' ').next() == Some(&libc::SYS_pause.to_string())
}

/// What a call that takes an id can change or leave behind.
fn look(pid: i32) -> String {
    let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
    let stat = read("stat");
    // State, parent, group, session; priority and nice; policy.
    let fields: Vec<&str> = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ').collect();
    let of = |n: usize| fields.get(n).copied().unwrap_or("gone");
    let mut text = format!("stat {} {} {} {} {} {} {}\n", of(0), of(1), of(2), of(3), of(15), of(16), of(38));
    const KEPT: [&str; 7] = ["TracerPid", "SigPnd", "ShdPnd", "SigBlk", "Cpus_allowed:", "Mems_allowed:", "Threads"];
    let status = read("status");
    for line in status.lines().filter(|line| KEPT.iter().any(|name| line.starts_with(name))) {
        text += line;
        text.push('\n');
    }
    text + &read("limits")
}
