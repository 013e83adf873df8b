//! Signal descriptors.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsRawFd, FromRawFd};

use crate::case::{Case, Checkpoint};
use crate::expect::{done, equal};

pub fn cases() -> Vec<Case> {
    vec![Case::new("signalfd/mask", &["signalfd", "signals"], mask)]
}

fn signalfd(signals: &[i32], flags: i32) -> Result<File, String> {
    let mask: u64 = signals.iter().map(|signal| 1 << (signal - 1)).sum();
    // SAFETY: a mask of the kernel's size; makes a new descriptor, which the File owns.
    unsafe {
        let fd = done("signalfd4", libc::syscall(libc::SYS_signalfd4, -1, &mask, 8, flags))?;
        Ok(File::from_raw_fd(fd as i32))
    }
}

/// The next signal, and who sent it: `struct signalfd_siginfo` has its number at 0, and `ssi_pid` at 12.
fn next(mut from: &File) -> Result<(i32, i32), ErrorKind> {
    let mut info = [0; 128];
    from.read_exact(&mut info).map_err(|error| error.kind())?;
    let word = |at: usize| i32::from_ne_bytes(info[at..at + 4].try_into().expect("four bytes"));
    Ok((word(0), word(12)))
}

fn mask(checkpoint: &Checkpoint) -> Result<(), String> {
    let all = (1u64 << (libc::SIGUSR1 - 1)) | (1 << (libc::SIGUSR2 - 1)) | (1 << (63 - 1));
    // SAFETY: a set of the kernel's size.
    done("sigprocmask", unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, &all, 0, 8) })?;
    let first = signalfd(&[libc::SIGUSR1], libc::SFD_NONBLOCK)?;
    let second = signalfd(&[libc::SIGUSR2, 63], libc::SFD_NONBLOCK | libc::SFD_CLOEXEC)?;
    // SAFETY: takes no argument.
    let ourselves = unsafe { libc::getpid() };
    // SAFETY: a blocked signal to ourselves.
    done("kill", unsafe { libc::kill(ourselves, libc::SIGUSR1) })?;
    checkpoint.wait()?;
    equal("a pending signal of the other", Err(ErrorKind::WouldBlock), next(&second))?;
    equal("the signal that was pending", Ok((libc::SIGUSR1, ourselves)), next(&first))?;
    equal("no more", Err(ErrorKind::WouldBlock), next(&first))?;
    for signal in [63, libc::SIGUSR2] {
        // SAFETY: blocked signals to ourselves.
        done("kill", unsafe { libc::kill(ourselves, signal) })?;
        equal("a signal of the second, for the first", Err(ErrorKind::WouldBlock), next(&first))?;
        equal("a signal of the second", Ok((signal, ourselves)), next(&second))?;
    }
    // SAFETY: takes no argument.
    equal("close-on-exec", libc::FD_CLOEXEC, unsafe { libc::fcntl(second.as_raw_fd(), libc::F_GETFD) })
}
