//! Event counters.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};

use crate::case::{Case, Checkpoint};
use crate::expect::{done, equal, eventually, in_child};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("eventfd/counts", &["eventfd"], counts),
        Case::new("eventfd/semaphore", &["eventfd"], semaphore),
        Case::new("eventfd/waited-for", &["eventfd"], waited_for),
    ]
}

type Verdict = Result<(), String>;

pub fn eventfd(count: u32, flags: i32) -> Result<File, String> {
    // SAFETY: makes a new descriptor, which the File owns.
    unsafe { Ok(File::from_raw_fd(done("eventfd", libc::eventfd(count, flags))?)) }
}

pub fn read(mut counter: &File) -> Result<u64, ErrorKind> {
    let mut value = [0; 8];
    counter.read_exact(&mut value).map_err(|error| error.kind())?;
    Ok(u64::from_ne_bytes(value))
}

pub fn write(mut counter: &File, value: u64) -> Verdict {
    counter.write_all(&value.to_ne_bytes()).map_err(|error| format!("writing {value} to an eventfd: {error}"))
}

fn counts(checkpoint: &Checkpoint) -> Verdict {
    let small = eventfd(5, libc::EFD_CLOEXEC)?;
    let zero = eventfd(0, libc::EFD_NONBLOCK)?;
    let large = eventfd(0, 0)?;
    write(&large, u64::MAX - 1)?;
    let same = small.try_clone().map_err(|error| error.to_string())?;
    checkpoint.wait()?;
    equal("a small count", Ok(5), read(&same))?;
    equal("a count of zero, not blocking", Err(ErrorKind::WouldBlock), read(&zero))?;
    equal("the largest count", Ok(u64::MAX - 1), read(&large))?;
    write(&same, 3)?;
    equal("what was written to a duplicate", Ok(3), read(&small))?;
    // SAFETY: takes no argument.
    let flags = |file: &File, command| unsafe { libc::fcntl(file.as_raw_fd(), command) };
    equal("close-on-exec", libc::FD_CLOEXEC, flags(&small, libc::F_GETFD))?;
    equal("no close-on-exec", 0, flags(&zero, libc::F_GETFD))?;
    equal("O_NONBLOCK of the first", 0, flags(&small, libc::F_GETFL) & libc::O_NONBLOCK)
}

fn semaphore(checkpoint: &Checkpoint) -> Verdict {
    let semaphore = eventfd(3, libc::EFD_SEMAPHORE | libc::EFD_NONBLOCK)?;
    checkpoint.wait()?;
    for _ in 0..3 {
        equal("a read of a semaphore", Ok(1), read(&semaphore))?;
    }
    equal("an empty semaphore", Err(ErrorKind::WouldBlock), read(&semaphore))
}

/// A child sleeps in a read when it is dumped.
fn waited_for(checkpoint: &Checkpoint) -> Verdict {
    let counter = eventfd(0, 0)?;
    let child = in_child(|| equal("what the child read", Ok(7), read(&counter)))?;
    let asleep = || std::fs::read_to_string(format!("/proc/{}/stat", child.0)).is_ok_and(|stat| stat.contains(") S "));
    eventually("the child waits", asleep)?;
    checkpoint.wait()?;
    write(&counter, 7)?;
    child.passed()
}
