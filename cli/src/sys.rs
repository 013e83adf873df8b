//! The few raw system calls of the command line: signal handlers, signals with values, what a child does before exec.
//!
//! # Safety
//! Signal handlers here only store to atomics. What runs between fork and exec only makes system calls.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicI32, Ordering};

use ckpt_core::Pid;
use ckpt_core::dump::INTERRUPTED;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// The signals that end a dump or a restore with everything undone.
const INTERRUPTS: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// The last of them that came.
static CAME: AtomicI32 = AtomicI32::new(0);

extern "C" fn note(signal: libc::c_int) {
    CAME.store(signal, Ordering::Relaxed);
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// From now on SIGINT, SIGTERM and SIGHUP have a pipeline undo what it did; more of them change nothing. A signal that
/// is ignored (`nohup`) stays so.
pub fn interrupt_on_signals() {
    let action = SigAction::new(SigHandler::Handler(note), SaFlags::SA_RESTART, SigSet::empty());
    for signal in INTERRUPTS {
        // SAFETY: the handler only stores to atomics.
        let old = unsafe { sigaction(signal, &action) };
        if let Ok(old) = old
            && matches!(old.handler(), SigHandler::SigIgn)
        {
            // SAFETY: puts back what was there.
            let _ = unsafe { sigaction(signal, &old) };
        }
    }
}

/// The signal that interrupted us, if one did.
pub fn interruption() -> Option<Signal> {
    Signal::try_from(CAME.load(Ordering::Relaxed)).ok()
}

/// `pidfd_open(2)`: becomes readable when the process has ended, whatever its exit signal is.
pub fn pidfd_open(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the result is a new descriptor that nobody else owns.
    match unsafe { libc::syscall(libc::SYS_pidfd_open, pid.0, 0) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: see above.
        fd => Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) }),
    }
}

/// `sigqueue(3)`, for a signal that came with a value.
pub fn queue(pid: Pid, signal: i32, value: u64) {
    let value = libc::sigval { sival_ptr: value as *mut libc::c_void };
    // SAFETY: the pointer is a value that is passed through and never followed.
    unsafe { libc::sigqueue(pid.0, signal, value) };
}

/// `kill(2)` with a number, for real-time signals have no name in nix. `pid` may be the negative of a group.
pub fn kill(pid: i32, signal: i32) {
    // SAFETY: no pointers.
    unsafe { libc::kill(pid, signal) };
}

/// All real-time signals that programs may use.
pub fn real_time_signals() -> std::ops::RangeInclusive<i32> {
    libc::SIGRTMIN()..=libc::SIGRTMAX()
}

/// Blocks signals by number, and returns a descriptor that they can be read from.
pub fn hold(signals: &[i32]) -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset before it is used, and all calls get valid pointers to it.
    unsafe {
        let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        libc::sigemptyset(set.as_mut_ptr());
        for &signal in signals {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        let error = libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        match libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
            -1 => Err(io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

/// Has a signal do to us what it does by default, whatever was set for it, and blocks it again if we live on.
pub fn suffer(signal: Signal) {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: the default action is no handler.
    let _ = unsafe { sigaction(signal, &default) };
    let set = SigSet::from(signal);
    let _ = nix::sys::signal::raise(signal);
    let _ = set.thread_unblock();
    let _ = set.thread_block();
}

/// Has a command start in a session of its own, with nothing of ours but its standard descriptors.
pub fn in_own_session(command: &mut Command) {
    // SAFETY: between fork and exec this only makes system calls, which are async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            if libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int) != 0 {
                return Err(io::Error::last_os_error());
            }
            let mut none = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
            libc::sigemptyset(none.as_mut_ptr());
            libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut());
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
            Ok(())
        });
    }
}

/// Makes the orphans among our descendants our children (`PR_SET_CHILD_SUBREAPER`).
pub fn adopt_orphans() -> io::Result<()> {
    // SAFETY: no pointers.
    match unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What SIGTERM sets, in the demo's program.
static FLAG: std::sync::atomic::AtomicPtr<std::sync::atomic::AtomicBool> =
    std::sync::atomic::AtomicPtr::new(std::ptr::null_mut());

/// Has SIGTERM set a flag.
pub fn on_sigterm(flag: &'static std::sync::atomic::AtomicBool) {
    extern "C" fn set(_signal: libc::c_int) {
        // SAFETY: the pointer is of a static, and was stored before the handler was set.
        unsafe { (*FLAG.load(Ordering::Relaxed)).store(true, Ordering::Relaxed) };
    }
    FLAG.store(std::ptr::from_ref(flag).cast_mut(), Ordering::Relaxed);
    let action = SigAction::new(SigHandler::Handler(set), SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: the handler only stores to an atomic.
    let _ = unsafe { sigaction(Signal::SIGTERM, &action) };
}
