//! The second signal ([`SECOND_SIGNAL`]): for a thread that takes the first one by `sigwaitinfo`.

use std::mem::offset_of;

use ckpt_agent::Channel;
use ckpt_agent::process::Process;
use ckpt_core::batch::{Batch, Sysno};
use ckpt_core::{Pid, SigInfo, TargetError, args};

use crate::frozen::alive;
use crate::protocol::{Lent, SECOND_SIGNAL, SIGNAL, TELL_TAG, VALUE_TAG};
use crate::sleeping::call_of;

/// The second signal of a process, which is the shim's only while a thread is asked by it. The shim gives it
/// back when we are gone.
pub struct SecondSignal {
    pid: Pid,
    /// Where the [`Lent`] is.
    at: u64,
    state: Second,
}

#[derive(Clone, Copy, PartialEq)]
enum Second {
    Free,
    Ours,
    /// Nothing handles it: where one came too late, it would end the process.
    Unusable,
}

impl SecondSignal {
    pub fn at(at: u64, pid: Pid) -> SecondSignal {
        SecondSignal { pid, at, state: Second::Free }
    }

    /// Has the shim's handler answer the second signal; false if it is not to be had.
    pub fn take(&mut self, main: &mut Channel) -> Result<bool, TargetError> {
        if self.state == Second::Free {
            let [ours, before] = [offset_of!(Lent, ours), offset_of!(Lent, before)].map(|at| self.at + at as u64);
            let mut batch = Batch::new();
            let now = batch.room(32);
            batch.call(Sysno::rt_sigaction, args![SECOND_SIGNAL, 0, now, 8]);
            let handler = main.run(&batch, &mut alive(self.pid))?.u64(now);
            if handler <= libc::SIG_IGN as u64 {
                self.state = Second::Unusable;
                return Ok(false);
            }
            let mut batch = Batch::new();
            batch.call(Sysno::rt_sigaction, args![SECOND_SIGNAL, 0, before, 8]);
            batch.call(Sysno::rt_sigaction, args![SECOND_SIGNAL, ours, 0, 8]);
            main.run(&batch, &mut alive(self.pid))?;
            self.state = Second::Ours;
        }
        Ok(self.state == Second::Ours)
    }

    /// Puts back what was there, when all threads have come. Those that have come by the first signal must not find the
    /// second when they go on.
    pub fn put_back<'a>(
        &mut self,
        main: &mut Channel,
        asked: impl Iterator<Item = (Pid, &'a mut Channel)>,
    ) -> Result<(), TargetError> {
        if self.state != Second::Ours {
            return Ok(());
        }
        for (tid, lane) in asked {
            let mut batch = Batch::new();
            let (set, no_time) = (batch.words(&[1 << (SECOND_SIGNAL - 1)]), batch.words(&[0, 0]));
            let taken = [(); 4].map(|()| {
                let info = batch.room(size_of::<SigInfo>());
                (info, batch.try_call(Sysno::rt_sigtimedwait, args![set, info, no_time, 8]))
            });
            let replies = lane.run(&batch, &mut alive(self.pid))?;
            let mut batch = Batch::new();
            for (info, taken) in taken {
                let info = replies.bytes(info);
                if replies.result(taken).is_ok() && !is_of_shim(info.try_into().expect("the size of the slot")) {
                    let info = batch.bytes(info);
                    batch.call(Sysno::rt_tgsigqueueinfo, args![self.pid.0, tid.0, SECOND_SIGNAL, info]);
                }
            }
            if !batch.is_empty() {
                lane.run(&batch, &mut alive(self.pid))?;
            }
        }
        let mut batch = Batch::new();
        let before = self.at + offset_of!(Lent, before) as u64;
        batch.call(Sysno::rt_sigaction, args![SECOND_SIGNAL, before, 0, 8]);
        main.run(&batch, &mut alive(self.pid))?;
        self.state = Second::Free;
        Ok(())
    }
}

/// Whether a signal is one by which a thread was asked to come, and that it has not taken: it came for another.
pub fn is_of_shim(info: &SigInfo) -> bool {
    let word = |at: usize| i32::from_ne_bytes(info[at..at + 4].try_into().expect("four bytes"));
    let value = u64::from_ne_bytes(info[24..32].try_into().expect("eight bytes"));
    let (signal, code, sender) = (word(0), word(8), word(16));
    // As the shim's handler tells them from others.
    matches!(signal, SIGNAL | SECOND_SIGNAL)
        && (code == libc::SI_QUEUE && (VALUE_TAG..=TELL_TAG).contains(&(value >> 48))
            || code == libc::SI_USER && sender == 0)
}

/// The signals that a thread blocks. While it waits for some, these are not among them.
pub fn blocked(process: &Process, tid: Pid) -> u64 {
    process.proc.thread_status(tid).ok().and_then(|status| status.mask("SigBlk")).unwrap_or(0)
}

pub fn lets_in(process: &Process, tid: Pid) -> bool {
    blocked(process, tid) >> (SECOND_SIGNAL - 1) & 1 == 0
}

/// Whether a thread lets in the second signal, but not the first, or may take that itself.
pub fn needs(process: &Process, tid: Pid) -> bool {
    lets_in(process, tid)
        && (blocked(process, tid) >> (SIGNAL - 1) & 1 == 1
            || call_of(process, tid).is_some_and(|call| call.waits_for_signals()))
}
