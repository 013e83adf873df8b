//! Descriptor tables: numbers, close-on-exec, sharing, owners.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};

use crate::case::{Case, Checkpoint};
use crate::expect::{done, equal, eventually, in_child};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("descriptors/numbers", &["descriptors", "files"], numbers),
        Case::new("descriptors/fork", &["descriptors", "files", "pipes"], fork),
        Case::new("descriptors/owner", &["descriptors", "pipes"], owner),
        Case::new("descriptors/no-standard-ones", &["descriptors", "files"], no_standard_ones),
        Case::new("descriptors/foreign-owner", &["descriptors", "pipes"], foreign_owner)
            .refused_at_dump("not part of the tree"),
    ]
}

type Verdict = Result<(), String>;

/// All numbers in use, with their `FD_CLOEXEC`.
fn table() -> Vec<(RawFd, i32)> {
    // SAFETY: F_GETFD takes no argument and fails on numbers that are not in use.
    let flags = |fd| unsafe { libc::fcntl(fd, libc::F_GETFD) };
    (0..1024).map(|fd| (fd, flags(fd))).filter(|&(_, flags)| flags >= 0).collect()
}

fn numbers(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.dir().join("text");
    fs::write(&path, "0123456789").map_err(|error| format!("write: {error}"))?;
    let mut file = File::open(&path).map_err(|error| format!("open: {error}"))?;
    for (number, flags) in [(20, 0), (21, libc::O_CLOEXEC), (300, 0), (1000, libc::O_CLOEXEC)] {
        // SAFETY: nothing of this process has these numbers.
        done("dup3", unsafe { libc::dup3(file.as_raw_fd(), number, flags) })?;
    }
    let before = table();
    checkpoint.wait()?;
    equal("numbers and FD_CLOEXEC", before, table())?;
    file.seek(SeekFrom::Start(6)).map_err(|error| format!("seek: {error}"))?;
    for number in [20, 21, 300, 1000] {
        // SAFETY: the number was made above and is owned by nobody else.
        let mut other = unsafe { File::from_raw_fd(number) };
        equal(&format!("the offset by {number}"), Some(6), other.stream_position().ok())?;
    }
    Ok(())
}

/// Parent, child and grandchild share what fork shared, and only that.
fn fork(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.dir().join("text");
    fs::write(&path, "0123456789").map_err(|error| format!("write: {error}"))?;
    let open = || File::open(&path).map_err(|error| format!("open: {error}"));
    let mut shared = open()?;
    let (mut from_child, mut to_parent) = pipe()?;
    let child = in_child(|| {
        let mut own = open()?;
        own.read_exact(&mut [0]).map_err(|error| format!("read: {error}"))?;
        let grandchild = in_child(|| {
            checkpoint.wait_for_go()?;
            shared.seek(SeekFrom::Start(5)).map(drop).map_err(|error| format!("seek: {error}"))
        })?;
        to_parent.write_all(b"r").map_err(|error| format!("write: {error}"))?;
        checkpoint.wait_for_go()?;
        grandchild.passed()?;
        equal("the offset that a grandchild set", Some(5), shared.stream_position().ok())?;
        equal("the offset of an own open", Some(1), own.stream_position().ok())?;
        to_parent.write_all(b"moved").map_err(|error| format!("write: {error}"))
    })?;
    drop(to_parent);
    from_child.read_exact(&mut [0]).map_err(|error| format!("read: {error}"))?;
    checkpoint.wait()?;
    let mut word = String::new();
    from_child.read_to_string(&mut word).map_err(|error| format!("read: {error}"))?;
    equal("what the child wrote until its end", "moved".to_string(), word)?;
    equal("the offset that a grandchild set", Some(5), shared.stream_position().ok())?;
    child.passed()
}

pub(super) fn pipe() -> Result<(File, File), String> {
    let mut ends = [0; 2];
    // SAFETY: room for two numbers.
    done("pipe2", unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) })?;
    // SAFETY: both were just made here.
    Ok(unsafe { (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1])) })
}

static SIGNALLED: AtomicI32 = AtomicI32::new(-1);

extern "C" fn note(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO a valid siginfo; si_fd stands behind si_band in it.
    let descriptor = unsafe { info.cast::<u8>().add(24).cast::<i32>().read() };
    SIGNALLED.store(descriptor, Ordering::SeqCst);
}

/// `O_ASYNC`, `F_SETOWN` and `F_SETSIG`: data that comes after the restore makes the chosen signal.
fn owner(checkpoint: &Checkpoint) -> Verdict {
    let (reader, mut writer) = pipe()?;
    let signal = libc::SIGRTMIN() + 3;
    // SAFETY: the handler only uses an atomic; the calls take integers.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = note as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        done("sigaction", libc::sigaction(signal, &action, std::ptr::null_mut()))?;
        done("F_SETOWN", libc::fcntl(reader.as_raw_fd(), libc::F_SETOWN, libc::getpid()))?;
        done("F_SETSIG", libc::fcntl(reader.as_raw_fd(), F_SETSIG, signal))?;
        done("F_SETFL", libc::fcntl(reader.as_raw_fd(), libc::F_SETFL, libc::O_ASYNC | libc::O_NONBLOCK))?;
    }
    checkpoint.wait()?;
    equal("signals that the dump or the restore made", -1, SIGNALLED.load(Ordering::SeqCst))?;
    // SAFETY: the calls take no arguments.
    let (owner, found, flags) = unsafe {
        let fd = reader.as_raw_fd();
        (libc::fcntl(fd, libc::F_GETOWN), libc::fcntl(fd, F_GETSIG), libc::fcntl(fd, libc::F_GETFL))
    };
    equal("F_GETOWN", std::process::id() as i32, owner)?;
    equal("F_GETSIG", signal, found)?;
    equal("F_GETFL", libc::O_ASYNC | libc::O_NONBLOCK, flags)?;
    writer.write_all(b"x").map_err(|error| format!("write: {error}"))?;
    eventually("the signal comes", || SIGNALLED.load(Ordering::SeqCst) == reader.as_raw_fd())
}

const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;

/// Input, output and error are closed, as daemons have them.
fn no_standard_ones(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.dir().join("text");
    fs::write(&path, "text").map_err(|error| format!("write: {error}"))?;
    let kept: Vec<OwnedFd> = (0..3)
        // SAFETY: copies of the standard descriptors, owned here.
        .map(|fd| unsafe { OwnedFd::from_raw_fd(libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 50)) })
        .collect();
    for fd in 0..3 {
        // SAFETY: they are put back below; nothing is printed meanwhile.
        unsafe { libc::close(fd) };
    }
    let before = table();
    let waited = checkpoint.wait();
    let after = table();
    for (fd, kept) in kept.into_iter().enumerate() {
        // SAFETY: the standard numbers are free.
        unsafe { libc::dup2(kept.into_raw_fd(), fd as i32) };
    }
    waited?;
    equal("numbers and FD_CLOEXEC", before, after)
}

fn foreign_owner(checkpoint: &Checkpoint) -> Verdict {
    let (reader, _writer) = pipe()?;
    // SAFETY: takes an integer.
    done("F_SETOWN", unsafe { libc::fcntl(reader.as_raw_fd(), libc::F_SETOWN, 1) })?;
    checkpoint.wait()?;
    // SAFETY: takes no argument.
    equal("F_GETOWN", 1, unsafe { libc::fcntl(reader.as_raw_fd(), libc::F_GETOWN) })
}
