//! System calls that the freeze interrupted: the registers with which each runs again, as if never touched.
//!
//! A thread that was stopped in a call shows `-ERESTART*`, and the kernel would restart the call by itself only as long
//! as the thread is not made to do anything else. Whoever puts registers back by a signal frame, or in another process,
//! has to wind the call back by hand: the instruction pointer before the `syscall`, its number in `rax` again.

use ckpt_core::General;

const ERESTARTSYS: i64 = 512;
const ERESTARTNOINTR: i64 = 513;
const ERESTARTNOHAND: i64 = 514;
const ERESTART_RESTARTBLOCK: i64 = 516;
const EINTR: i64 = 4;

/// What a stopped thread was doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupted {
    /// In user code, or at the end of a call that is done.
    No,
    /// The kernel itself would run the call again, with all its arguments.
    Restarts,
    /// The kernel itself would run the rest of it, by its restart block.
    Continues,
    /// The call gave EINTR, and no signal came: the kernel would not run it again.
    GaveUp,
}

/// Calls that answer EINTR when they are interrupted without a signal handler having run.
const GIVES_EINTR: &[libc::c_long] = &[
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_wait,
    libc::SYS_io_getevents,
    libc::SYS_msgrcv,
    libc::SYS_msgsnd,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_write,
    libc::SYS_writev,
];

pub fn interrupted(general: &General) -> Interrupted {
    if (general.orig_rax as i64) < 0 {
        return Interrupted::No;
    }
    match -(general.rax as i64) {
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => Interrupted::Restarts,
        ERESTART_RESTARTBLOCK => Interrupted::Continues,
        EINTR if GIVES_EINTR.contains(&(general.orig_rax as i64)) => Interrupted::GaveUp,
        _ => Interrupted::No,
    }
}

/// The registers that run an interrupted call again. `code` reads the program's instructions before an address.
///
/// # Errors
/// The number of the call, where it cannot be told what to run again.
pub fn wind_back(general: &General, code: impl FnOnce(u64, &mut [u8]) -> bool) -> Result<General, u64> {
    let mut ready = *general;
    // The kernel takes -1 for "not in a call": nothing is restarted behind our back.
    ready.orig_rax = u64::MAX;
    let number = match interrupted(general) {
        Interrupted::No => return Ok(ready),
        Interrupted::Restarts | Interrupted::GaveUp => general.orig_rax as i64,
        Interrupted::Continues if general.orig_rax as i64 == libc::SYS_restart_syscall => {
            // It had been interrupted before, and the number is gone from the registers; the code has it.
            let mut before = [0; 24];
            if !code(general.rip - 2 - before.len() as u64, &mut before) {
                return Err(general.orig_rax);
            }
            number_in(&before).ok_or(general.orig_rax)?
        }
        Interrupted::Continues => general.orig_rax as i64,
    };
    ready.rip -= 2;
    ready.rax = number as u64;
    if interrupted(general) == Interrupted::Continues {
        // The kernel has written the time that remains where the program asked for it.
        if number == libc::SYS_nanosleep && general.rsi != 0 {
            ready.rdi = general.rsi;
        }
        if number == libc::SYS_clock_nanosleep && general.r10 != 0 {
            ready.rdx = general.r10;
        }
    }
    Ok(ready)
}

/// The number that the last `mov $N, %eax` before a `syscall` loads, if it is a call with a restart block.
fn number_in(code: &[u8]) -> Option<i64> {
    let blocks = [libc::SYS_nanosleep, libc::SYS_clock_nanosleep, libc::SYS_poll, libc::SYS_futex];
    (0..=code.len() - 5).rev().find_map(|at| {
        let immediate = i32::from_le_bytes(code[at + 1..at + 5].try_into().unwrap()) as i64;
        (code[at] == 0xb8 && blocks.contains(&immediate)).then_some(immediate)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stopped(number: i64, result: i64) -> General {
        General { orig_rax: number as u64, rax: result as u64, rip: 0x1002, rdi: 1, rsi: 2, ..General::default() }
    }

    fn back(general: General) -> (u64, u64, u64) {
        let ready = wind_back(&general, |_, _| false).unwrap();
        assert_eq!(ready.orig_rax, u64::MAX);
        (ready.rip, ready.rax, ready.rdi)
    }

    #[test]
    fn calls_are_wound_back() {
        assert_eq!(back(stopped(libc::SYS_read, -512)), (0x1000, 0, 1));
        assert_eq!(back(stopped(libc::SYS_epoll_wait, -4)), (0x1000, libc::SYS_epoll_wait as u64, 1));
        assert_eq!(back(stopped(libc::SYS_nanosleep, -516)), (0x1000, libc::SYS_nanosleep as u64, 2), "remaining time");
    }

    #[test]
    fn finished_calls_and_user_code_are_left_alone() {
        assert_eq!(back(stopped(libc::SYS_read, 5)), (0x1002, 5, 1));
        assert_eq!(back(stopped(libc::SYS_close, -4)), (0x1002, -4i64 as u64, 1));
        assert_eq!(back(stopped(-1, -512)), (0x1002, -512i64 as u64, 1), "a value of the program's");
    }

    #[test]
    fn a_call_interrupted_twice_is_found_in_the_code() {
        let stopped = stopped(libc::SYS_restart_syscall, -516);
        let ready = wind_back(&stopped, |_, code| {
            code[19..].copy_from_slice(&[0xb8, 230, 0, 0, 0]);
            true
        });
        assert_eq!(ready.unwrap().rax, libc::SYS_clock_nanosleep as u64);
        assert!(wind_back(&stopped, |_, _| true).is_err());
    }
}
