//! File locks: POSIX, open-file-description and flock locks, and leases.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::case::{Case, Checkpoint};
use crate::expect::{done, equal, in_child};

pub fn cases() -> Vec<Case> {
    let files = &["files", "locks"];
    vec![
        Case::new("locks/posix", files, posix),
        Case::new("locks/posix-of-two", files, posix_of_two),
        Case::new("locks/open-file", files, open_file),
        Case::new("locks/flock", files, flock),
        Case::new("locks/lease", files, lease),
        Case::new("locks/taken", files, flock).after_dump(take).refused_at_restore("another process holds one now"),
    ]
}

type Verdict = Result<(), String>;

fn make(checkpoint: &Checkpoint) -> Result<File, String> {
    let path = checkpoint.dir().join("locked");
    fs::write(&path, [0; 100]).map_err(|error| format!("write: {error}"))?;
    open(checkpoint)
}

fn open(checkpoint: &Checkpoint) -> Result<File, String> {
    let path = checkpoint.dir().join("locked");
    OpenOptions::new().read(true).write(true).open(path).map_err(|error| format!("open: {error}"))
}

fn range(kind: i32, start: i64, length: i64) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: start, l_len: length, l_pid: 0 }
}

fn lock(file: &File, command: i32, kind: i32, start: i64, length: i64) -> Verdict {
    let lock = range(kind, start, length);
    // SAFETY: the structure lives as long as the call.
    done("fcntl to lock", unsafe { libc::fcntl(file.as_raw_fd(), command, &lock) }).map(drop)
}

/// The lock that is in the way of a write lock, as (type, start, length, pid).
fn blocker(file: &File, command: i32, start: i64, length: i64) -> Result<(i32, i64, i64, i32), String> {
    let mut lock = range(libc::F_WRLCK, start, length);
    // SAFETY: the structure lives as long as the call.
    done("fcntl to ask for a lock", unsafe { libc::fcntl(file.as_raw_fd(), command, &mut lock) })?;
    Ok((lock.l_type as i32, lock.l_start, lock.l_len, lock.l_pid))
}

/// Ranges of both types, also behind the end of the file, seen from another process.
fn posix(checkpoint: &Checkpoint) -> Verdict {
    let file = make(checkpoint)?;
    lock(&file, libc::F_SETLK, libc::F_WRLCK, 0, 10)?;
    lock(&file, libc::F_SETLK, libc::F_RDLCK, 20, 5)?;
    lock(&file, libc::F_SETLK, libc::F_WRLCK, 1000, 0)?;
    checkpoint.wait()?;
    let parent = std::process::id() as i32;
    let other = in_child(|| {
        let file = open(checkpoint)?;
        let at = |start| blocker(&file, libc::F_GETLK, start, 1);
        equal("the lock at 5", (libc::F_WRLCK, 0, 10, parent), at(5)?)?;
        equal("the lock at 15", libc::F_UNLCK, at(15)?.0)?;
        equal("the lock at 24", (libc::F_RDLCK, 20, 5, parent), at(24)?)?;
        equal("the lock at 25", libc::F_UNLCK, at(25)?.0)?;
        equal("the lock at 5000", (libc::F_WRLCK, 1000, 0, parent), at(5000)?)
    })?;
    other.passed()?;
    // The locks are this process's own, which may change them.
    lock(&file, libc::F_SETLK, libc::F_UNLCK, 0, 0)?;
    let other = in_child(|| lock(&open(checkpoint)?, libc::F_SETLK, libc::F_WRLCK, 0, 0))?;
    other.passed()
}

/// Parent and child have locks of their own through one open file.
fn posix_of_two(checkpoint: &Checkpoint) -> Verdict {
    let file = make(checkpoint)?;
    let (mut from_child, mut to_parent) = super::descriptors::pipe()?;
    lock(&file, libc::F_SETLK, libc::F_WRLCK, 0, 10)?;
    let parent = std::process::id() as i32;
    let child = in_child(|| {
        lock(&file, libc::F_SETLK, libc::F_WRLCK, 50, 10)?;
        std::io::Write::write_all(&mut to_parent, b"r").map_err(|error| format!("write: {error}"))?;
        checkpoint.wait_for_go()?;
        equal("the parent's lock", (libc::F_WRLCK, 0, 10, parent), blocker(&file, libc::F_GETLK, 0, 1)?)?;
        equal("its own lock is not in the way", libc::F_UNLCK, blocker(&file, libc::F_GETLK, 50, 1)?.0)?;
        std::io::Write::write_all(&mut to_parent, b"d").map_err(|error| format!("write: {error}"))?;
        // Held until the parent has looked.
        checkpoint_passed(&file)
    })?;
    let mut read = || std::io::Read::read_exact(&mut from_child, &mut [0]).map_err(|error| format!("read: {error}"));
    read()?;
    checkpoint.wait()?;
    read()?;
    equal("the child's lock", (libc::F_WRLCK, 50, 10, child.0), blocker(&file, libc::F_GETLK, 50, 1)?)?;
    lock(&file, libc::F_SETLK, libc::F_UNLCK, 0, 10)?;
    child.passed()
}

/// Waits until the parent gives its lock up.
fn checkpoint_passed(file: &File) -> Verdict {
    let lock = range(libc::F_WRLCK, 0, 10);
    // SAFETY: the structure lives as long as the call.
    done("fcntl to wait for a lock", unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLKW, &lock) }).map(drop)
}

fn open_file(checkpoint: &Checkpoint) -> Verdict {
    let file = make(checkpoint)?;
    lock(&file, libc::F_OFD_SETLK, libc::F_WRLCK, 0, 10)?;
    lock(&file, libc::F_OFD_SETLK, libc::F_RDLCK, 20, 5)?;
    checkpoint.wait()?;
    let other = open(checkpoint)?;
    equal("the lock at 5", (libc::F_WRLCK, 0, 10, -1), blocker(&other, libc::F_OFD_GETLK, 5, 1)?)?;
    equal("the lock at 24", (libc::F_RDLCK, 20, 5, -1), blocker(&other, libc::F_OFD_GETLK, 24, 1)?)?;
    equal("its own lock is not in the way", libc::F_UNLCK, blocker(&file, libc::F_OFD_GETLK, 0, 1)?.0)?;
    drop(file);
    equal("the lock when the file is closed", libc::F_UNLCK, blocker(&other, libc::F_OFD_GETLK, 5, 1)?.0)
}

fn flock(checkpoint: &Checkpoint) -> Verdict {
    let file = make(checkpoint)?;
    let shared = File::open(checkpoint.dir()).map_err(|error| format!("open: {error}"))?;
    // SAFETY: these calls take integers.
    let flock = |file: &File, operation| unsafe { libc::flock(file.as_raw_fd(), operation | libc::LOCK_NB) };
    done("flock", flock(&file, libc::LOCK_EX))?;
    done("flock", flock(&shared, libc::LOCK_SH))?;
    let again = file.try_clone().map_err(|error| format!("dup: {error}"))?;
    checkpoint.wait()?;
    let other = open(checkpoint)?;
    equal("another's flock of the file", -1, flock(&other, libc::LOCK_SH))?;
    let directory = File::open(checkpoint.dir()).map_err(|error| format!("open: {error}"))?;
    equal("another's exclusive flock of the directory", -1, flock(&directory, libc::LOCK_EX))?;
    equal("another's shared flock of the directory", 0, flock(&directory, libc::LOCK_SH))?;
    drop(file);
    equal("another's flock while a copy is open", -1, flock(&other, libc::LOCK_SH))?;
    drop(again);
    equal("another's flock when all are closed", 0, flock(&other, libc::LOCK_SH))
}

/// Somebody is quicker. The descriptor stays open until the trial ends.
fn take(dir: &Path) {
    let file = File::open(dir.join("locked")).expect("the subject made it");
    file.lock_shared().expect("nobody holds it");
    std::mem::forget(file);
}

fn lease(checkpoint: &Checkpoint) -> Verdict {
    drop(make(checkpoint)?);
    let file = File::open(checkpoint.dir().join("locked")).map_err(|error| format!("open: {error}"))?;
    // SAFETY: these calls take integers.
    done("F_SETLEASE", unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) })?;
    checkpoint.wait()?;
    // SAFETY: takes no argument.
    equal("F_GETLEASE", libc::F_RDLCK, unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLEASE) })
}
