//! Signal actions, alternate stacks, and both kinds of queues of pending signals.
//!
//! The blocked mask of a thread is part of its [`Context`](crate::Context). In a skeleton every signal is blocked until
//! the release, so what is queued there stays queued.
//!
//! A pending signal is put back by the thread that will get it, to itself: the kernel takes any `si_code` then
//! (rt_sigqueueinfo(2)). Signals of interval and POSIX timers are not copied but made again by their timers, where the
//! timer still exists: only so the timer knows that its signal is on its way (see [`timers`]).
//!
//! Not kept: which of several threads the kernel would have chosen for a signal of the shared queue.

use crate::args;
use crate::batch::{Batch, Slot, Sysno};
use crate::error::{DumpError, RestoreError};
use crate::image;
use crate::resource::{Check, Collect, OfProcess, OfThread, Rebuild, Resource, timers};
use crate::target::{Queue, SigInfo};

/// The signals of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Process {
    /// Those that are not the default, sorted by signal.
    pub actions: Vec<Action>,
    /// Pending for the process, in their order.
    pub pending: Vec<SigInfo>,
}

/// What is done on a signal: `struct sigaction` as the kernel has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Action {
    pub signal: i32,
    /// `SIG_DFL` (0), `SIG_IGN` (1), or the address of a function.
    pub handler: u64,
    /// `SA_*`.
    pub flags: u64,
    pub restorer: u64,
    /// Signals blocked while the handler runs, bit `n-1` for signal `n`.
    pub mask: u64,
}

/// Signals there are (`_NSIG`).
pub const SIGNALS: i32 = 64;

/// Bytes of a `sigset_t` of the kernel.
const SIGSET_SIZE: usize = 8;
/// The part of a `siginfo_t` that the kernel uses; the rest is zero.
const SIGINFO_SIZE: usize = 128;

/// The signal of a `siginfo_t`.
pub fn signal_of(info: &SigInfo) -> i32 {
    word(info, 0)
}

/// Where a signal came from: `si_code`.
pub fn code_of(info: &SigInfo) -> i32 {
    word(info, 8)
}

/// The timer of a signal that a POSIX timer made, with `si_code` `SI_TIMER`.
pub fn timer_of(info: &SigInfo) -> Option<i32> {
    (code_of(info) == libc::SI_TIMER).then(|| word(info, 16))
}

/// The overruns that such a signal was delivered with.
pub fn overruns_of(info: &SigInfo) -> u32 {
    word(info, 20) as u32
}

fn word(info: &SigInfo, at: usize) -> i32 {
    i32::from_ne_bytes(info[at..at + 4].try_into().expect("four bytes"))
}

/// The signals whose action can be changed.
fn catchable() -> impl Iterator<Item = i32> {
    (1..=SIGNALS).filter(|&signal| signal != libc::SIGKILL && signal != libc::SIGSTOP)
}

/// A `struct kernel_sigaction` for each signal that can be caught.
pub type Asked = Vec<(i32, Slot)>;

pub fn ask(batch: &mut Batch) -> Asked {
    let ask = |signal| {
        let action = batch.room(32);
        batch.call(Sysno::rt_sigaction, args![signal, 0, action, SIGSET_SIZE]);
        (signal, action)
    };
    catchable().map(ask).collect()
}

/// Actions, and the pending signals of the process.
pub struct ProcessSignals;

impl Resource for ProcessSignals {
    const NAME: &'static str = "signals";
    type Scope = OfProcess;
    type Saved = Process;

    fn collect(context: &mut Collect<'_>) -> Result<Process, DumpError> {
        let asked = context.asked;
        let actions = asked.actions.iter().filter_map(|&(signal, action)| {
            let words = asked.replies.words(action);
            let action = Action { signal, handler: words[0], flags: words[1], restorer: words[2], mask: words[3] };
            (words != [0; 4]).then_some(action)
        });
        let actions = actions.collect();
        // Asked now, after the timers. To look at a queue takes a stop, to see that it is empty does not.
        let status = context.target.proc().status().map_err(|source| context.io_error("status", source))?;
        let pending = match status.mask("ShdPnd") {
            Some(0) => Vec::new(),
            _ => context.target.pending(Queue::Shared).map_err(|source| context.target_error(source))?,
        };
        Ok(Process { actions, pending })
    }

    fn check(saved: &Process, context: &mut Check<'_>) {
        check_queue(&saved.pending, context);
        let mut signals: Vec<i32> = saved.actions.iter().map(|action| action.signal).collect();
        signals.dedup();
        let good = signals.len() == saved.actions.len()
            && signals.is_sorted()
            && signals.iter().all(|&signal| catchable().any(|known| known == signal));
        if !good {
            context.refuse("actions", "they are not for a sorted list of signals", "the image is damaged");
        }
    }

    /// The actions. What is pending comes with [`rebuild_pending`], when the timers exist.
    fn rebuild(saved: &Process, context: &mut Rebuild<'_>) -> Result<(), RestoreError> {
        let mut batch = Batch::new();
        // Every one: a skeleton begins with ours (a Rust program ignores SIGPIPE, say).
        let default = batch.words(&[0; 4]);
        for signal in catchable() {
            let action = match saved.actions.binary_search_by_key(&signal, |action| action.signal) {
                Ok(found) => {
                    let Action { handler, flags, restorer, mask, .. } = saved.actions[found];
                    batch.words(&[handler, flags, restorer, mask])
                }
                Err(_) => default,
            };
            batch.call(Sysno::rt_sigaction, args![signal, action, 0, SIGSET_SIZE]);
        }
        context.run(&batch).map(drop)
    }
}

/// The signals of a thread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Thread {
    pub alternate_stack: Option<AlternateStack>,
    /// Pending for this thread, in their order.
    pub pending: Vec<SigInfo>,
}

/// `sigaltstack`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AlternateStack {
    pub address: u64,
    pub size: u64,
    /// `SS_AUTODISARM`: it is off while a handler runs on it.
    pub autodisarm: bool,
}

/// `linux/signal.h`.
const SS_AUTODISARM: i32 = 1 << 31;

/// Alternate stack and private queue of pending signals.
pub struct ThreadSignals;

impl Resource for ThreadSignals {
    const NAME: &'static str = "thread-signals";
    type Scope = OfThread;
    type Saved = Thread;

    fn collect(context: &mut Collect<'_>) -> Result<Thread, DumpError> {
        let (address, flags, size) = context.answers().altstack;
        // SS_ONSTACK says where the asker itself runs, and is no setting.
        let alternate_stack = (flags & libc::SS_DISABLE == 0 && size != 0).then_some(AlternateStack {
            address,
            size,
            autodisarm: flags & SS_AUTODISARM != 0,
        });
        // Timers are asked after the answers, and may have sent a signal since.
        let pending = match context.answers().status.mask("SigPnd") {
            Some(0) if !context.has_timers => Vec::new(),
            _ => {
                let queue = Queue::Thread(context.thread);
                context.target.pending(queue).map_err(|source| context.target_error(source))?
            }
        };
        Ok(Thread { alternate_stack, pending })
    }

    fn check(saved: &Thread, context: &mut Check<'_>) {
        check_queue(&saved.pending, context);
    }

    /// The alternate stack. What is pending comes with [`rebuild_pending`].
    fn rebuild(saved: &Thread, context: &mut Rebuild<'_>) -> Result<(), RestoreError> {
        let batch = context.later();
        let (address, flags, size) = match saved.alternate_stack {
            Some(stack) => (stack.address, if stack.autodisarm { SS_AUTODISARM } else { 0 }, stack.size),
            None => (0, libc::SS_DISABLE, 0),
        };
        let stack = batch.words(&[address, flags as u32 as u64, size]);
        batch.call(Sysno::sigaltstack, args![stack, 0]);
        discard(batch);
        Ok(())
    }
}

fn check_queue(pending: &[SigInfo], context: &mut Check<'_>) {
    for info in pending {
        let signal = signal_of(info);
        if !(1..=SIGNALS).contains(&signal) {
            context.refuse("pending signals", format!("there is no signal {signal}"), "the image is damaged");
        }
    }
}

/// Takes a signal that is pending for a thread of a skeleton. Nobody sends one to a single thread of it; this is against
/// a stray one.
fn discard(batch: &mut Batch) {
    let all = batch.words(&[u64::MAX]);
    let now = batch.words(&[0, 0]);
    batch.try_call(Sysno::rt_sigtimedwait, args![all, 0, now, SIGSET_SIZE]);
}

/// Empties the queues of the process and its main thread of what came by building the skeleton: SIGCHLD, mostly.
pub fn discard_all(context: &mut Rebuild<'_>) -> Result<(), RestoreError> {
    loop {
        let mut batch = Batch::new();
        let all = batch.words(&[u64::MAX]);
        let now = batch.words(&[0, 0]);
        let mut last = None;
        for _ in 0..4 {
            last = Some(batch.try_call(Sysno::rt_sigtimedwait, args![all, 0, now, SIGSET_SIZE]));
        }
        let replies = context.run(&batch)?;
        if last.is_some_and(|last| replies.result(last).is_err()) {
            return Ok(());
        }
    }
}

/// Puts every pending signal back in its queue, and starts the timers; the last step that queues are touched by.
pub fn rebuild_pending(process: &image::Process, context: &mut Rebuild<'_>) -> Result<(), RestoreError> {
    for (index, thread) in process.threads.iter().enumerate() {
        context.thread = index;
        queue(&thread.signals.pending, process, &mut context.section(ThreadSignals::NAME), Sysno::rt_tgsigqueueinfo)?;
    }
    context.thread = 0;
    queue(&process.signals.pending, process, &mut context.section(ProcessSignals::NAME), Sysno::rt_sigqueueinfo)
}

fn queue(
    pending: &[SigInfo],
    process: &image::Process,
    context: &mut Rebuild<'_>,
    call: Sysno,
) -> Result<(), RestoreError> {
    let (pid, tid) = (process.task.pid, context.target.threads()[context.thread]);
    let mut batch = Batch::new();
    for info in pending {
        if !batch.has_room(4, 2 * SIGINFO_SIZE) {
            context.run(&std::mem::take(&mut batch))?;
        }
        if let Some(timer) = timers::maker_of(info, &process.timers) {
            // So that it comes after those before it.
            if !batch.is_empty() {
                context.run(&std::mem::take(&mut batch))?;
            }
            timers::expire(timer, context)?;
            continue;
        }
        let signal = signal_of(info);
        let info = batch.bytes(info);
        match call {
            Sysno::rt_tgsigqueueinfo => batch.call(call, args![pid.0, tid.0, signal, info]),
            _ => batch.call(call, args![pid.0, signal, info]),
        };
    }
    if batch.is_empty() { Ok(()) } else { context.run(&batch).map(drop) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_siginfo() {
        let mut info = [0; SIGINFO_SIZE];
        info[0] = 34;
        info[8..12].copy_from_slice(&libc::SI_TIMER.to_ne_bytes());
        info[16] = 7;
        assert_eq!((signal_of(&info), code_of(&info), timer_of(&info)), (34, -2, Some(7)));
        info[8..12].copy_from_slice(&libc::SI_QUEUE.to_ne_bytes());
        assert_eq!(timer_of(&info), None);
    }

    #[test]
    fn two_signals_cannot_be_caught() {
        assert_eq!(catchable().count(), 62);
        assert!(!catchable().any(|signal| signal == libc::SIGKILL || signal == libc::SIGSTOP));
    }
}
