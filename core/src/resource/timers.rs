//! Interval timers (`setitimer`) and POSIX timers (`timer_create`).
//!
//! The kernel tells the time that is left, not the instant that was asked for, and not whether it was asked for as an
//! absolute one. So every timer goes on with what was left of it: a restore later does not find it long expired, and
//! one that was to fire at a certain time of day fires that much later.
//!
//! A timer that has fired and whose signal is still pending fires again in the skeleton, once, by itself: a copy of the
//! signal would not be the timer's, which would then run on beside it instead of waiting for it to be taken, as
//! timer_getoverrun(2) describes. For the same reason a timer that was not asked yet how often it overran is made to
//! fire and overrun in the skeleton, and its signal is taken.
//!
//! Not kept: overruns of timers on CPU-time clocks and of pending signals of a single thread, and CPU time itself: it
//! begins anew. Refused: a timer on the CPU time
//! of "the calling thread" in a process of several threads, for the kernel does not tell whose.

use crate::args;
use crate::batch::{Batch, Slot, Sysno};
use crate::error::{DumpError, RestoreError};
use crate::ourselves::{Capability, ourselves};
use crate::resource::threads::Answers;
use crate::resource::{Check, Collect, OfProcess, Rebuild, Resource, signals};
use crate::target::{Queue, SigInfo};

/// All timers of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Timers {
    /// `ITIMER_REAL`, `ITIMER_VIRTUAL`, `ITIMER_PROF`.
    pub intervals: [Interval; 3],
    /// Sorted by id.
    pub posix: Vec<PosixTimer>,
}

/// An interval timer, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interval {
    /// Until it fires, 0 if it does not run.
    pub remaining: u64,
    /// From then on, 0 if it fires once.
    pub period: u64,
}

/// A POSIX timer. Times are in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PosixTimer {
    pub id: i32,
    /// `CLOCK_*`, or negative for CPU time.
    pub clock: i32,
    /// `sigev_notify`: `SIGEV_*`, with `SIGEV_THREAD_ID`.
    pub notify: i32,
    pub signal: i32,
    /// `sigev_value`.
    pub value: u64,
    /// The thread of `SIGEV_THREAD_ID`.
    pub thread: Option<i32>,
    /// Until it fires, 0 if it does not run.
    pub remaining: u64,
    /// 0 if it fires once.
    pub period: u64,
    /// How often it has overrun: while its signal is pending, since that was made; else before the last one was
    /// delivered, as `timer_getoverrun` gives it.
    pub overruns: u32,
    /// Its signal is pending.
    pub pending: bool,
}

impl PosixTimer {
    /// Its clock is CPU time: it does not go on in a skeleton.
    fn is_cpu_time(&self) -> bool {
        self.clock < 0 || self.clock == libc::CLOCK_PROCESS_CPUTIME_ID || self.clock == libc::CLOCK_THREAD_CPUTIME_ID
    }
}

const SIGEV_NONE: i32 = 1;
const SIGEV_THREAD_ID: i32 = 4;
const TIMER_ABSTIME: i32 = 1;
/// `linux/prctl.h`, kernel 6.16.
const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
/// The highest id that is reached by creating and deleting timers, on older kernels: half a second's work.
const HIGHEST_COUNTED_ID: i32 = 1_000_000;
const SIGSET_SIZE: usize = 8;
/// In nanoseconds.
const SECOND: u64 = 1_000_000_000;

/// A `struct itimerval` for each interval timer, by `ITIMER_*`.
pub type Asked = [Slot; 3];

pub fn ask(batch: &mut Batch) -> Asked {
    [libc::ITIMER_REAL, libc::ITIMER_VIRTUAL, libc::ITIMER_PROF].map(|which| {
        let value = batch.room(32);
        batch.call(Sysno::getitimer, args![which, value]);
        value
    })
}

/// Interval timers and POSIX timers.
pub struct ProcessTimers;

impl Resource for ProcessTimers {
    const NAME: &'static str = "timers";
    type Scope = OfProcess;
    type Saved = Timers;

    fn collect(context: &mut Collect<'_>) -> Result<Timers, DumpError> {
        let asked = context.asked;
        let mut intervals = asked.timers.map(|value| {
            // it_interval stands before it_value
            let words = asked.replies.words(value);
            Interval { remaining: words[2] * 1_000_000 + words[3], period: words[0] * 1_000_000 + words[1] }
        });
        let real = &mut intervals[libc::ITIMER_REAL as usize];
        if real.remaining == 0 && real.period != 0 {
            // It has fired, and waits for its SIGALRM to be taken before it counts on (a peculiarity of Linux). That
            // signal is pending, so when the timer fires once more in the skeleton it adds none and is as it was here.
            let pending = context.target.pending(Queue::Shared).map_err(|source| context.target_error(source))?;
            real.remaining = pending.iter().any(|info| signals::signal_of(info) == libc::SIGALRM).into();
        }
        // Needs CONFIG_CHECKPOINT_RESTORE; there is no other way to find the timers of a process.
        let text =
            context.target.proc().text("timers").map_err(|source| context.io_error("/proc/PID/timers", source))?;
        let mut posix = parse(&text).ok_or_else(|| {
            let source = std::io::Error::new(std::io::ErrorKind::InvalidData, text.clone());
            context.io_error("/proc/PID/timers has an unknown form", source)
        })?;
        posix.sort_unstable_by_key(|timer| timer.id);
        for chunk in posix.chunks_mut(128) {
            ask_times(chunk, context)?;
        }
        if !posix.is_empty() {
            find_pending(&mut posix, context)?;
        }
        for timer in posix.iter_mut().filter(|timer| timer.pending) {
            // What the last signal had overrun is overwritten with that of the pending one when that is delivered.
            let told = std::mem::take(&mut timer.overruns);
            if told == 0 {
                ask_pending_overruns(timer, context)?;
            }
        }
        for timer in &posix {
            refuse_clock(timer, context);
        }
        Ok(Timers { intervals, posix })
    }

    fn check(saved: &Timers, context: &mut Check<'_>) {
        for timer in &saved.posix {
            let subject = format!("POSIX timer {}", timer.id);
            let alarm = matches!(timer.clock, libc::CLOCK_REALTIME_ALARM | libc::CLOCK_BOOTTIME_ALARM);
            if alarm && !ourselves().may(Capability::WAKE_ALARM) {
                context.refuse(subject, "its clock wakes the system", "restore with CAP_WAKE_ALARM");
            } else if timer.id < 0
                || timer.remaining > i64::MAX as u64
                || timer.period > i64::MAX as u64
                || ((timer.pending || timer.overruns > 0) && !(1..=signals::SIGNALS).contains(&timer.signal))
            {
                context.refuse(subject, "it has impossible values", "the image is damaged");
            }
        }
        if let Some(last) = saved.posix.last()
            && last.id > HIGHEST_COUNTED_ID
            && !kernel_is_at_least(6, 16)
        {
            context.refuse(
                format!("POSIX timer {}", last.id),
                "the kernel of this host cannot give a timer so high an id",
                "restore on Linux 6.16 or later",
            );
        }
    }

    /// Makes the POSIX timers. They begin to run with [`signals::rebuild_pending`] and [`start`].
    fn rebuild(saved: &Timers, context: &mut Rebuild<'_>) -> Result<(), RestoreError> {
        if saved.posix.is_empty() {
            return Ok(());
        }
        create(&saved.posix, true, context)?;
        for timer in &saved.posix {
            if timer.overruns > 0 && !timer.pending && runs_by_itself(timer) {
                overrun(timer, context)?;
            }
        }
        Ok(())
    }
}

fn kernel_is_at_least(major: u32, minor: u32) -> bool {
    let Ok(name) = nix::sys::utsname::uname() else { return false };
    let release = name.release().to_string_lossy();
    let mut numbers = release.split(|char: char| !char.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (major, minor)
}

/// Parses `/proc/PID/timers` (proc_pid_timers(5)). Times are not in it.
fn parse(text: &str) -> Option<Vec<PosixTimer>> {
    let mut timers: Vec<PosixTimer> = Vec::new();
    for line in text.lines() {
        let (name, value) = line.split_once(':')?;
        let value = value.trim();
        if name == "ID" {
            let id = value.parse().ok()?;
            timers.push(PosixTimer {
                id,
                clock: 0,
                notify: 0,
                signal: 0,
                value: 0,
                thread: None,
                remaining: 0,
                period: 0,
                overruns: 0,
                pending: false,
            });
            continue;
        }
        let timer = timers.last_mut()?;
        match name {
            "signal" => {
                let (signal, value) = value.split_once('/')?;
                timer.signal = signal.parse().ok()?;
                timer.value = u64::from_str_radix(value, 16).ok()?;
            }
            "notify" => {
                let (kind, to) = value.split_once('/')?;
                let kind = ["signal", "none", "thread"].iter().position(|known| *known == kind)? as i32;
                let (whom, id) = to.split_once('.')?;
                timer.thread = if whom == "tid" { Some(id.parse().ok()?) } else { None };
                timer.notify = if timer.thread.is_some() { kind | SIGEV_THREAD_ID } else { kind };
            }
            "ClockID" => timer.clock = value.parse().ok()?,
            _ => return None,
        }
    }
    Some(timers)
}

/// `timer_gettime` and `timer_getoverrun`.
fn ask_times(timers: &mut [PosixTimer], context: &mut Collect<'_>) -> Result<(), DumpError> {
    let mut batch = Batch::new();
    let asked: Vec<_> = timers
        .iter()
        .map(|timer| {
            let times = batch.room(32);
            batch.call(Sysno::timer_gettime, args![timer.id, times]);
            (times, batch.call(Sysno::timer_getoverrun, args![timer.id]))
        })
        .collect();
    let replies = context.run(&batch)?;
    for (timer, (times, overruns)) in timers.iter_mut().zip(asked) {
        let words = replies.words(times);
        timer.period = words[0] * SECOND + words[1];
        timer.remaining = words[2] * SECOND + words[3];
        timer.overruns = replies.value(overruns) as u32;
    }
    Ok(())
}

/// Finds the timers whose signal is on its way.
fn find_pending(timers: &mut [PosixTimer], context: &mut Collect<'_>) -> Result<(), DumpError> {
    // Looked at anew: since the answers were given, timers may have fired.
    let proc = context.target.proc();
    let pending = |thread: &Answers| proc.thread_status(thread.tid).ok().and_then(|status| status.mask("SigPnd"));
    let threads = context.answers.iter().enumerate();
    let mut queues: Vec<(Queue, Option<i32>)> = threads
        .filter(|(_, thread)| pending(thread) != Some(0))
        .map(|(index, thread)| (Queue::Thread(index), Some(thread.tid.0)))
        .collect();
    queues.push((Queue::Shared, None));
    for (queue, thread) in queues {
        for info in context.target.pending(queue).map_err(|source| context.target_error(source))? {
            let made = signals::timer_of(&info);
            let signal = signals::signal_of(&info);
            if let Some(timer) = timers
                .iter_mut()
                .find(|timer| Some(timer.id) == made && timer.signal == signal && timer.thread == thread)
            {
                // One that fires once and has time left was set anew since: that signal is not its own any more.
                timer.pending = timer.period > 0 || timer.remaining == 0;
            }
        }
    }
    Ok(())
}

/// Finds out how often a timer has overrun while its signal is pending. The kernel counts, and tells only who takes the
/// signal.
///
/// So the signal is taken, and put back as a copy that says the same, in one batch, which the target finishes even if we
/// are killed meanwhile: then one more signal of the timer may follow, and together they count the same expirations.
/// Then the copy is taken and the timer set so that it fired, and overran, when it did; the target is as it was.
/// (`timer_getoverrun` gives 0 before and after; where it did not, the count of the pending signal begins anew with the
/// restore.) Where it could go wrong, nothing is done either.
fn ask_pending_overruns(timer: &mut PosixTimer, context: &mut Collect<'_>) -> Result<(), DumpError> {
    let bit = 1u64 << (timer.signal - 1);
    let pending = context.target.pending(Queue::Shared).map_err(|source| context.target_error(source))?;
    let same = pending.iter().filter(|info| signals::signal_of(info) == timer.signal).count();
    let by_threads = context.answers.iter().any(|thread| thread.status.mask("SigPnd").unwrap_or(bit) & bit != 0);
    // Room for one more in RLIMIT_SIGPENDING, or the copy would be lost.
    let room = context.answers[0].status.field("SigQ").and_then(|field| {
        let (queued, limit) = field.split_once('/')?;
        Some(queued.parse::<u64>().ok()?.saturating_add(2) <= limit.parse().ok()?)
    });
    let alone = timer.thread.is_none() && same == 1 && !by_threads && room == Some(true);
    if timer.period == 0 || !alone || timer.is_cpu_time() {
        return Ok(());
    }
    let run = |context: &mut Collect<'_>, batch: &Batch| {
        context.target.run(batch).map_err(|source| context.target_error(source))
    };
    let mut batch = Batch::new();
    let set = batch.words(&[bit]);
    let no_time = batch.words(&[0, 0]);
    let info = batch.room(std::mem::size_of::<SigInfo>());
    let pid = context.pid();
    batch.call(Sysno::rt_sigtimedwait, args![set, info, no_time, SIGSET_SIZE]);
    batch.call(Sysno::rt_sigqueueinfo, args![pid.0, timer.signal, info]);
    let times = batch.room(32);
    batch.call(Sysno::timer_gettime, args![timer.id, times]);
    let now = batch.room(16);
    batch.call(Sysno::clock_gettime, args![timer.clock, now]);
    let replies = run(context, &batch)?;
    let taken: SigInfo = replies.bytes(info).try_into().expect("the size of the slot");
    let overruns = signals::overruns_of(&taken);
    let (times, now) = (replies.words(times), replies.words(now));
    timer.remaining = times[2] * SECOND + times[3];
    timer.overruns = overruns;

    // It may have fired meanwhile, which it could not while its own signal was pending. The copy and its new signal count all
    // of its expirations between them, and to set it would lose some of these: they stay.
    let pending = context.target.pending(Queue::Shared).map_err(|source| context.target_error(source))?;
    if pending.iter().filter(|info| signals::signal_of(info) == timer.signal).count() != 1 {
        return Ok(());
    }
    let first = first_firing(timer, now[0] * SECOND + now[1]);
    let mut batch = Batch::new();
    let set = batch.words(&[bit]);
    let no_time = batch.words(&[0, 0]);
    let times = batch.words(&self::times(timer.period, first));
    batch.call(Sysno::rt_sigtimedwait, args![set, 0, no_time, SIGSET_SIZE]);
    batch.call(Sysno::timer_settime, args![timer.id, TIMER_ABSTIME, times, 0]);
    run(context, &batch).map(drop)
}

/// When a periodic timer must have fired first, on its own clock, to have overrun so often and have so much time left.
/// A clock that is younger than that (some begin with the system) can only show fewer overruns.
fn first_firing(timer: &PosixTimer, now: u64) -> u64 {
    let past = u128::from(timer.period) * (u128::from(timer.overruns) + 1);
    let first = (u128::from(now) + u128::from(timer.remaining)).saturating_sub(past);
    first.clamp(1, u128::from(now.max(1))) as u64
}

/// A clock that a restored timer could not have.
fn refuse_clock(timer: &PosixTimer, context: &mut Collect<'_>) {
    if timer.clock >= 0 && timer.clock != libc::CLOCK_THREAD_CPUTIME_ID {
        return;
    }
    let subject = format!("POSIX timer {}", timer.id);
    // A negative clock holds the complement of an id, and three bits: of a thread, and which time (clock_getres(2)).
    const OF_A_THREAD: i32 = 4;
    const DESCRIPTOR: i32 = 3;
    let id = !(timer.clock >> 3);
    if timer.clock < 0 && timer.clock & 7 == DESCRIPTOR {
        context.refuse(subject, "its clock is a device", "have the program delete it before the dump");
    } else if timer.clock == libc::CLOCK_THREAD_CPUTIME_ID || timer.clock & OF_A_THREAD != 0 && id == 0 {
        if context.answers.len() > 1 {
            context.refuse(
                subject,
                "it runs on the CPU time of the thread that made it, and the kernel does not tell which that was",
                "have the program name the thread's clock (pthread_getcpuclockid), or delete the timer before the dump",
            );
        }
    } else if id != 0 && id != context.pid().0 && !context.answers.iter().any(|thread| thread.tid.0 == id) {
        context.refuse(
            subject,
            format!("it runs on the CPU time of {id}, which is not part of the process"),
            "have the program delete it before the dump",
        );
    }
}

/// Makes timers with their ids, in a process that has none.
fn create(timers: &[PosixTimer], choose_ids: bool, context: &mut Rebuild<'_>) -> Result<(), RestoreError> {
    let mut batch = Batch::new();
    let choose = batch.try_call(Sysno::prctl, args![PR_TIMER_CREATE_RESTORE_IDS, u64::from(choose_ids)]);
    let chosen = choose_ids && context.run(&batch)?.result(choose).is_ok();
    let mut next = 0;
    for timer in timers {
        if !chosen && timer.id > HIGHEST_COUNTED_ID {
            return Err(context.mismatch(format!("the kernel cannot give a timer the id {}", timer.id)));
        }
        let mut batch = Batch::new();
        let unused = sigevent(&mut batch, SIGEV_NONE, 0, 0, 0);
        let id = batch.room(8);
        while !chosen && next < timer.id {
            if !batch.has_room(2, 0) {
                context.run(&batch)?;
                batch = Batch::new();
                sigevent(&mut batch, SIGEV_NONE, 0, 0, 0);
                batch.room(8);
            }
            batch.call(Sysno::timer_create, args![libc::CLOCK_MONOTONIC, unused, id]);
            batch.call(Sysno::timer_delete, args![next]);
            next += 1;
        }
        context.run(&batch)?;
        next = timer.id + 1;

        let mut batch = Batch::new();
        let thread = timer.thread.unwrap_or(0);
        // A timer whose thread has ended will never signal anyone.
        let orphan = timer.thread.is_some_and(|tid| !context.target.threads().iter().any(|known| known.0 == tid));
        let notify = if orphan { SIGEV_NONE } else { timer.notify };
        let event = sigevent(&mut batch, notify, timer.signal, timer.value, thread);
        let id = batch.bytes(&timer.id.to_ne_bytes());
        batch.call(Sysno::timer_create, args![timer.clock, event, id]);
        let made = context.run(&batch)?.u32(id) as i32;
        if made != timer.id {
            return Err(context.mismatch(format!("POSIX timer {} came back with the id {made}", timer.id)));
        }
    }
    if chosen {
        let mut batch = Batch::new();
        batch.call(Sysno::prctl, args![PR_TIMER_CREATE_RESTORE_IDS, 0]);
        context.run(&batch)?;
    }
    Ok(())
}

/// `struct sigevent`.
fn sigevent(batch: &mut Batch, notify: i32, signal: i32, value: u64, thread: i32) -> Slot {
    let mut event = [0; 64];
    event[..8].copy_from_slice(&value.to_ne_bytes());
    event[8..12].copy_from_slice(&signal.to_ne_bytes());
    event[12..16].copy_from_slice(&notify.to_ne_bytes());
    event[16..20].copy_from_slice(&thread.to_ne_bytes());
    batch.bytes(&event)
}

/// Whether it can be made to fire now: CPU time stands still in a skeleton.
fn runs_by_itself(timer: &PosixTimer) -> bool {
    !timer.is_cpu_time()
}

/// The timer that will make this pending signal again.
pub(super) fn maker_of<'a>(info: &SigInfo, timers: &'a Timers) -> Option<&'a PosixTimer> {
    let id = signals::timer_of(info)?;
    let timer = timers.posix.iter().find(|timer| timer.id == id)?;
    (timer.pending && timer.signal == signals::signal_of(info) && runs_by_itself(timer)).then_some(timer)
}

/// Makes a timer fire and overrun as often as it had, and takes its signal: `timer_getoverrun` then tells what it told.
fn overrun(timer: &PosixTimer, context: &mut Rebuild<'_>) -> Result<(), RestoreError> {
    let thread = context.thread;
    if let Some(tid) = timer.thread {
        match context.target.threads().iter().position(|known| known.0 == tid) {
            Some(index) => context.thread = index,
            None => return Ok(()),
        }
    }
    expire(timer, context)?;
    let mut batch = Batch::new();
    let set = batch.words(&[1 << (timer.signal - 1)]);
    let now = batch.words(&[0, 0]);
    batch.call(Sysno::rt_sigtimedwait, args![set, 0, now, SIGSET_SIZE]);
    context.run(&batch)?;
    context.thread = thread;
    Ok(())
}

/// Makes a timer fire, so that its signal is pending and has overrun as often as it had, and go on with what was left.
pub(super) fn expire(timer: &PosixTimer, context: &mut Rebuild<'_>) -> Result<(), RestoreError> {
    let mut batch = Batch::new();
    let now = batch.words(&[0, 0]);
    batch.call(Sysno::clock_gettime, args![timer.clock, now]);
    let before = batch.words(&[0]);
    batch.call(Sysno::rt_sigpending, args![before, SIGSET_SIZE]);
    let replies = context.run(&batch)?;
    let words = replies.words(now);
    let now = words[0] * SECOND + words[1];
    let bit = 1u64 << (timer.signal - 1);
    let one_before = replies.u64(before) & bit != 0;
    let first = if timer.period == 0 { 1 } else { first_firing(timer, now) };

    let mut batch = Batch::new();
    let times = batch.words(&times(timer.period, first));
    batch.call(Sysno::timer_settime, args![timer.id, TIMER_ABSTIME, times, 0]);
    context.run(&batch)?;
    // An instant that has passed fires at the next interrupt, which is at once.
    for _ in 0..MOST_WAITS {
        let mut batch = Batch::new();
        let after = batch.words(&[0]);
        let moment = batch.words(&[0, WAIT_NANOSECONDS]);
        batch.call(Sysno::nanosleep, args![moment, 0]);
        batch.call(Sysno::rt_sigpending, args![after, SIGSET_SIZE]);
        let pending = context.run(&batch)?.u64(after) & bit != 0;
        // Where one of the same kind was there before, there is nothing to see; a sleep that ended after the timer's
        // instant is the best there is.
        if pending || one_before {
            return Ok(());
        }
    }
    Err(context.mismatch(format!("POSIX timer {} does not fire", timer.id)))
}

const WAIT_NANOSECONDS: u64 = 50_000;
/// Two seconds and more.
const MOST_WAITS: usize = 20_000;

/// `struct itimerspec`.
fn times(period: u64, value: u64) -> [u64; 4] {
    [period / SECOND, period % SECOND, value / SECOND, value % SECOND]
}

/// Lets the timers run that do not yet.
pub fn start(saved: &Timers, context: &mut Rebuild<'_>) -> Result<(), RestoreError> {
    let mut batch = Batch::new();
    let tick = match saved.intervals[1..].iter().any(|interval| interval.remaining != 0) {
        true => {
            let mut batch = Batch::new();
            let tick = batch.room(16);
            batch.call(Sysno::clock_getres, args![libc::CLOCK_MONOTONIC_COARSE, tick]);
            context.section(ProcessTimers::NAME).run(&batch)?.words(tick)[1] / 1000
        }
        false => 0,
    };
    for (which, interval) in saved.intervals.iter().enumerate() {
        let Interval { mut remaining, period } = *interval;
        if remaining != 0 && which as i32 != libc::ITIMER_REAL {
            // To those of CPU time the kernel adds a tick, so that they are never short.
            remaining = remaining.saturating_sub(tick).max(1);
        }
        if remaining != 0 {
            const SECOND: u64 = 1_000_000;
            let value = batch.words(&[period / SECOND, period % SECOND, remaining / SECOND, remaining % SECOND]);
            batch.call(Sysno::setitimer, args![which, value, 0]);
        }
    }
    for timer in &saved.posix {
        let by_signal = timer.pending && runs_by_itself(timer);
        let by_overrun = timer.overruns > 0 && runs_by_itself(timer);
        if timer.remaining != 0 && !by_signal && !by_overrun {
            if !batch.has_room(1, 64) {
                context.run(&std::mem::take(&mut batch))?;
            }
            let times = batch.words(&times(timer.period, timer.remaining));
            batch.call(Sysno::timer_settime, args![timer.id, 0, times, 0]);
        }
    }
    if batch.is_empty() { Ok(()) } else { context.run(&batch).map(drop) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_of_proc() {
        let text = "ID: 1\nsignal: 60/00007fff86e452a8\nnotify: signal/pid.2634\nClockID: 0\n\
                    ID: 0\nsignal: 10/0000000000000005\nnotify: none/pid.1\nClockID: -6\n\
                    ID: 7\nsignal: 32/0000000000000001\nnotify: signal/tid.99\nClockID: 1\n";
        let timers = parse(text).unwrap();
        assert_eq!(timers.iter().map(|timer| (timer.id, timer.clock)).collect::<Vec<_>>(), [(1, 0), (0, -6), (7, 1)]);
        assert_eq!((timers[0].signal, timers[0].value, timers[0].notify), (60, 0x7fff_86e4_52a8, 0));
        assert_eq!((timers[1].notify, timers[1].thread), (SIGEV_NONE, None));
        assert_eq!((timers[2].notify, timers[2].thread), (SIGEV_THREAD_ID, Some(99)));
        assert_eq!(parse("what: 1\n"), None);
        assert_eq!(parse(""), Some(vec![]));
    }

    #[test]
    fn the_kernel_of_this_host() {
        assert!(kernel_is_at_least(3, 10));
        assert!(!kernel_is_at_least(99, 0));
    }
}
