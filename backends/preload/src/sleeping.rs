//! Which system call a thread was interrupted in: the kernel shows that of a thread that sleeps, and no more once a signal has
//! ended the call. The shim reads the number from the code before the call; where it is not there, the thread must have been
//! seen to sleep in the same call, with the same arguments.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use ckpt_agent::process::Process;
use ckpt_core::Pid;

/// A system call that a thread sleeps in.
#[derive(Debug, PartialEq)]
pub struct Call {
    pub number: i64,
    pub place: Place,
}

/// The registers of a thread in a system call, but for the number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    arguments: [u64; 6],
    stack: u64,
    /// The one after the call.
    pub instruction: u64,
}

impl Place {
    pub fn of(context: &[u64; 38]) -> Place {
        // rdi, rsi, rdx, r10, r8, r9, rsp, rip in a ucontext.
        let [a, b, c, d, e, f, stack, instruction] = [13, 14, 17, 7, 5, 6, 20, 21].map(|register| context[register]);
        Place { arguments: [a, b, c, d, e, f], stack, instruction }
    }
}

impl Call {
    pub fn waits_for_signals(&self) -> bool {
        self.number == libc::SYS_rt_sigtimedwait
    }

    /// `NUMBER ARGUMENTS... STACK INSTRUCTION`; a thread that runs shows a word.
    fn parse(text: &str) -> Option<Call> {
        let (number, registers) = text.trim_end().split_once(' ')?;
        let address = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
        let registers = registers.split(' ').map(address).collect::<Option<Vec<u64>>>()?;
        // One that sleeps outside of a call (-1) has no arguments.
        let [a, b, c, d, e, f, stack, instruction] = registers[..] else { return None };
        let place = Place { arguments: [a, b, c, d, e, f], stack, instruction };
        Some(Call { number: number.parse().ok()?, place })
    }
}

/// The same, of a thread that may be about to sleep: it is looked at until then.
pub fn call_until(process: &Process, tid: Pid, end: Instant) -> Option<Call> {
    loop {
        let text = process.proc.text(format!("task/{tid}/syscall")).ok()?;
        let call = Call::parse(&text);
        if call.is_some() || !text.starts_with("running") || Instant::now() >= end {
            return call;
        }
        std::thread::yield_now();
    }
}

/// The call that a thread sleeps in.
pub fn call_of(process: &Process, tid: Pid) -> Option<Call> {
    process.proc.text(format!("task/{tid}/syscall")).ok().and_then(|text| Call::parse(&text))
}

/// The calls that threads were seen to sleep in: the thread, what is the same when it is interrupted, and the number.
#[derive(Default)]
pub struct Known(HashMap<(Pid, Place), i64>);

impl Known {
    pub fn note(&mut self, tid: Pid, call: &Call) {
        if call.number >= 0 {
            self.0.insert((tid, call.place), call.number);
        }
    }

    /// The call of a thread that was interrupted there.
    pub fn number(&self, tid: Pid, place: Place) -> Option<i64> {
        self.0.get(&(tid, place)).copied()
    }

    /// Looks at a thread until it sleeps in the call before `instruction` again, or for a little while.
    pub fn watch(&mut self, pid: Pid, tid: Pid, instruction: u64) {
        let Ok(process) = Process::open(pid) else { return };
        let end = Instant::now() + Duration::from_millis(100);
        while Instant::now() < end {
            if let Some(call) = call_of(&process, tid) {
                self.note(tid, &call);
                if call.place.instruction == instruction {
                    return;
                }
            }
            std::thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sleeping_thread_shows_its_call() {
        let call = Call::parse("230 0x1 0x0 0x7ffc 0x7ffd 0x0 0x9 0x7ffeb0 0x7f12aa\n").unwrap();
        let place = Place { arguments: [1, 0, 0x7ffc, 0x7ffd, 0, 9], stack: 0x7ffeb0, instruction: 0x7f12aa };
        assert_eq!(call, Call { number: 230, place });
        assert_eq!(Call::parse("-1 0x7ffeb0 0x7f12aa\n"), None);
        assert!(Call::parse("running\n").is_none());
    }
}
