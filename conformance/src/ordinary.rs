//! An ordinary user in a strict container: uid nobody, no capability, and no system call that reaches into another process.

use std::io;

use nix::errno::Errno;

/// `nobody`.
const NOBODY: u32 = 65534;
/// `linux/capability.h`.
const LAST_CAPABILITY: i32 = 63;

/// The calls by which other tools reach into a process. None of them is needed here, and each fails with EPERM.
pub const BLOCKED: [libc::c_long; 5] =
    [libc::SYS_ptrace, libc::SYS_process_vm_readv, libc::SYS_process_vm_writev, libc::SYS_kcmp, libc::SYS_pidfd_getfd];

/// Whether a pid namespace has a `pid_max` of its own (kernel 6.14): [`furnish`] makes that small, so that an ordinary user
/// meets an id again in a moment.
pub fn probe() -> Result<(), String> {
    let release = nix::sys::utsname::uname().map_err(|errno| errno.to_string())?;
    let release = release.release().to_string_lossy().into_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse::<u32>().ok());
    match (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (6, 14) {
        true => Ok(()),
        false => Err(format!("kernel {release} has no pid_max of each pid namespace (6.14)")),
    }
}

/// Gives a file to the ordinary user, as who logs in on a terminal owns it.
pub fn give(file: &std::os::fd::OwnedFd) -> nix::Result<()> {
    use std::os::fd::AsFd;
    nix::unistd::fchown(file.as_fd(), Some(nix::unistd::Uid::from_raw(NOBODY)), None)
}

/// Prepares a new pid namespace, as its init: few ids, and those that are given out but once (below 300) used up.
pub fn furnish() -> io::Result<()> {
    const FEW: &str = "4096";
    const GIVEN_OUT_ONCE: i32 = 310;
    std::fs::write("/proc/sys/kernel/pid_max", FEW)?;
    loop {
        // SAFETY: this process has one thread, and the child ends at once.
        match unsafe { nix::unistd::fork() }? {
            // SAFETY: ends the child.
            nix::unistd::ForkResult::Child => unsafe { libc::_exit(0) },
            nix::unistd::ForkResult::Parent { child } => {
                nix::sys::wait::waitpid(child, None)?;
                if child.as_raw() > GIVEN_OUT_ONCE {
                    return Ok(());
                }
            }
        }
    }
}

/// Makes this process one of that user's. Only makes system calls, for it runs between fork and exec as well.
pub fn become_ordinary() -> io::Result<()> {
    let filter = filter();
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    let done = |result: libc::c_long| Errno::result(result).map(drop).map_err(io::Error::from);
    // SAFETY: the filter lives through the call that copies it; the other calls take numbers.
    unsafe {
        done(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program).into())?;
        for capability in 0..=LAST_CAPABILITY {
            // Numbers above the kernel's last fail.
            libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0);
        }
        done(libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<u32>()))?;
        done(libc::syscall(libc::SYS_setresgid, NOBODY, NOBODY, NOBODY))?;
        // Takes the capabilities away.
        done(libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY))?;
        // A process that did not exec since is not its user's to look at otherwise.
        done(libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0).into())
    }
}

const fn load(offset: u32) -> libc::sock_filter {
    libc::sock_filter { code: 0x20, jt: 0, jf: 0, k: offset }
}

/// Loads the number, compares it with each, and answers.
const fn filter() -> [libc::sock_filter; BLOCKED.len() + 3] {
    const ALLOW: u32 = 0x7fff_0000;
    const ERRNO: u32 = 0x0005_0000;
    const RETURN: u16 = 0x06;
    const JUMP_EQUAL: u16 = 0x15;
    let mut filter = [load(0); BLOCKED.len() + 3];
    let mut n = 0;
    while n < BLOCKED.len() {
        // To the last line of all if it is equal.
        let jt = (BLOCKED.len() - n) as u8;
        filter[1 + n] = libc::sock_filter { code: JUMP_EQUAL, jt, jf: 0, k: BLOCKED[n] as u32 };
        n += 1;
    }
    filter[1 + n] = libc::sock_filter { code: RETURN, jt: 0, jf: 0, k: ALLOW };
    filter[2 + n] = libc::sock_filter { code: RETURN, jt: 0, jf: 0, k: ERRNO | libc::EPERM as u32 };
    filter
}

#[cfg(test)]
mod tests {
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    use super::*;

    /// Gives up everything in a child, and looks what is left.
    #[test]
    fn nothing_is_left() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        // SAFETY: the child only makes system calls and ends.
        let ForkResult::Parent { child } = unsafe { fork() }.unwrap() else {
            let status = match become_ordinary() {
                Ok(()) => check(),
                Err(_) => 9,
            };
            // SAFETY: ends the child.
            unsafe { libc::_exit(status) }
        };
        assert_eq!(waitpid(child, None).unwrap(), WaitStatus::Exited(child, 0));
    }

    fn check() -> i32 {
        for number in BLOCKED {
            // SAFETY: fails before it looks at anything.
            let result = unsafe { libc::syscall(number, 0, 0, 0, 0, 0, 0) };
            if result != -1 || Errno::last() != Errno::EPERM {
                return 1;
            }
        }
        // SAFETY: takes a number.
        let may_set_uid = unsafe { libc::setuid(0) } == 0;
        if may_set_uid { 2 } else { 0 }
    }
}
