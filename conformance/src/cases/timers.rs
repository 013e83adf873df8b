//! Interval timers and POSIX timers.

use std::mem::zeroed;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use crate::case::{Case, Checkpoint};
use crate::expect::{done, equal, eventually, that};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("timers/interval", &["timers"], interval).unsteady(),
        Case::new("timers/interval-time-left", &["timers"], interval_time_left),
        Case::new("timers/interval-with-its-signal-pending", &["timers", "signals"], interval_pending),
        Case::new("timers/interval-of-cpu-time", &["timers"], interval_of_cpu_time),
        Case::new("timers/ids", &["timers"], ids),
        Case::new("timers/many", &["timers"], many),
        Case::new("timers/time-left", &["timers"], time_left),
        Case::new("timers/notifications", &["timers"], notifications).unsteady(),
        Case::new("timers/of-a-thread", &["timers", "thread-signals"], of_a_thread).unsteady(),
        Case::new("timers/pending-once", &["timers", "signals"], pending_once),
        Case::new("timers/pending-and-overrunning", &["timers", "signals"], pending_and_overrunning)
            .needs(&["overruns of a timer whose signal is pending"]),
        Case::new("timers/overruns-to-be-asked-for", &["timers", "signals"], overruns_to_be_asked_for).idle(),
        Case::new("timers/cpu-time", &["timers"], cpu_time),
        Case::new("timers/cpu-time-of-one-thread", &["timers"], cpu_time_of_one_thread)
            .refused_at_dump("CPU time of the thread that made it"),
        Case::new("timers/functions-in-threads", &["timers", "signals", "tasks"], functions_in_threads)
            .unsteady()
            .passing_threads(),
    ]
}

static CAUGHT: AtomicU64 = AtomicU64::new(0);
static VALUE: AtomicU64 = AtomicU64::new(0);
static BY: AtomicI32 = AtomicI32::new(0);

extern "C" fn count(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO a valid siginfo; gettid has no arguments.
    unsafe {
        VALUE.store((*info).si_value().sival_ptr as u64, Ordering::SeqCst);
        BY.store(libc::gettid(), Ordering::SeqCst);
    }
    CAUGHT.fetch_add(1, Ordering::SeqCst);
}

fn handle(signal: i32) {
    // SAFETY: the handler only uses atomics and gettid.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = count as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
        assert_eq!(libc::sigaction(signal, &action, null_mut()), 0);
    }
}

fn block(signal: i32, blocked: bool) -> Result<(), String> {
    let set = 1u64 << (signal - 1);
    let how = if blocked { libc::SIG_BLOCK } else { libc::SIG_UNBLOCK };
    // SAFETY: a set of the kernel's size.
    done("rt_sigprocmask", unsafe { libc::syscall(libc::SYS_rt_sigprocmask, how, &set, 0, 8) }).map(drop)
}

fn is_pending(signal: i32) -> bool {
    let mut set = 0u64;
    // SAFETY: a set of the kernel's size.
    unsafe { libc::syscall(libc::SYS_rt_sigpending, &mut set, 8) };
    set >> (signal - 1) & 1 != 0
}

/// The `siginfo_t` of a pending signal, taken from the queue.
fn take(signal: i32) -> Result<TimerInfo, String> {
    let set = 1u64 << (signal - 1);
    let mut info = [0u8; 128];
    let limit = [10u64, 0];
    // SAFETY: a set of the kernel's size, room for a siginfo_t, a timespec.
    let taken = unsafe { libc::syscall(libc::SYS_rt_sigtimedwait, &set, &mut info, &limit, 8) };
    done("rt_sigtimedwait", taken)?;
    let word = |at: usize| i32::from_ne_bytes(info[at..at + 4].try_into().expect("four bytes"));
    let value = u64::from_ne_bytes(info[24..32].try_into().expect("eight bytes"));
    Ok(TimerInfo { code: word(8), timer: word(16), overrun: word(20), value })
}

#[derive(Debug, PartialEq)]
struct TimerInfo {
    code: i32,
    timer: i32,
    overrun: i32,
    value: u64,
}

fn set_interval(which: libc::c_int, value: Duration, interval: Duration) -> Result<(), String> {
    let time = |duration: Duration| libc::timeval {
        tv_sec: duration.as_secs() as i64,
        tv_usec: duration.subsec_micros().into(),
    };
    let new = libc::itimerval { it_interval: time(interval), it_value: time(value) };
    // SAFETY: an itimerval that lives through the call. The C library's type for `which` differs between systems.
    done("setitimer", unsafe { libc::syscall(libc::SYS_setitimer, which, &new, 0) }).map(drop)
}

/// (time left, interval)
fn get_interval(which: libc::c_int) -> (Duration, Duration) {
    // SAFETY: an itimerval of zeros is one, and the call fills it.
    let old = unsafe {
        let mut old: libc::itimerval = zeroed();
        libc::syscall(libc::SYS_getitimer, which, &mut old);
        old
    };
    let duration = |time: libc::timeval| Duration::new(time.tv_sec as u64, time.tv_usec as u32 * 1000);
    (duration(old.it_value), duration(old.it_interval))
}

const REAL: libc::c_int = 0;
const VIRTUAL: libc::c_int = 1;
const PROF: libc::c_int = 2;

fn goes_on(what: &str, times: u64) -> Result<(), String> {
    let before = CAUGHT.load(Ordering::SeqCst);
    eventually(what, || CAUGHT.load(Ordering::SeqCst) >= before + times)
}

fn interval(checkpoint: &Checkpoint) -> Result<(), String> {
    handle(libc::SIGALRM);
    let period = Duration::from_millis(15);
    set_interval(REAL, period, period)?;
    goes_on("the timer fires before the dump", 2)?;
    checkpoint.wait()?;
    equal("period", period, get_interval(REAL).1)?;
    let begin = Instant::now();
    goes_on("the timer fires after the restore", 5)?;
    that("five periods are no shorter than four", begin.elapsed() >= 4 * period)
}

fn interval_time_left(checkpoint: &Checkpoint) -> Result<(), String> {
    set_interval(REAL, Duration::from_secs(1000), Duration::from_secs(77))?;
    let before = get_interval(REAL);
    checkpoint.wait()?;
    let after = get_interval(REAL);
    equal("period", before.1, after.1)?;
    that("the time left went on from what it was", after.0 <= before.0 && after.0 + Duration::from_secs(60) > before.0)
}

fn interval_pending(checkpoint: &Checkpoint) -> Result<(), String> {
    handle(libc::SIGALRM);
    block(libc::SIGALRM, true)?;
    let period = Duration::from_millis(10);
    set_interval(REAL, period, period)?;
    eventually("SIGALRM is pending", || is_pending(libc::SIGALRM))?;
    checkpoint.wait()?;
    equal("period", period, get_interval(REAL).1)?;
    that("SIGALRM is pending after the restore", is_pending(libc::SIGALRM))?;
    block(libc::SIGALRM, false)?;
    goes_on("the timer fires again when its signal was taken", 4)
}

/// Uses the CPU until something is so.
fn busy_until(what: &str, mut so: impl FnMut() -> bool) -> Result<(), String> {
    let begin = Instant::now();
    while !so() {
        std::hint::black_box((0..10_000u64).fold(0, |sum, number| sum ^ std::hint::black_box(number)));
        if begin.elapsed() > Duration::from_secs(20) {
            return Err(format!("{what}: not within 20 s"));
        }
    }
    Ok(())
}

fn interval_of_cpu_time(checkpoint: &Checkpoint) -> Result<(), String> {
    handle(libc::SIGVTALRM);
    let period = Duration::from_millis(40);
    set_interval(VIRTUAL, period, period)?;
    set_interval(PROF, Duration::from_secs(500), Duration::from_secs(3))?;
    let before = get_interval(PROF);
    checkpoint.wait()?;
    equal("period of ITIMER_VIRTUAL", period, get_interval(VIRTUAL).1)?;
    let after = get_interval(PROF);
    equal("period of ITIMER_PROF", before.1, after.1)?;
    that("ITIMER_PROF went on", after.0 <= before.0 && after.0 + Duration::from_secs(10) > before.0)?;
    let count = CAUGHT.load(Ordering::SeqCst);
    busy_until("ITIMER_VIRTUAL fires three times", || CAUGHT.load(Ordering::SeqCst) >= count + 3)
}

#[derive(Clone, Copy)]
struct Timer(i32);

/// `sigev_notify` of the kernel.
const SIGNAL: i32 = 0;
const NONE: i32 = 1;
const THREAD_ID: i32 = 4;

impl Timer {
    fn new(clock: i32, notify: i32, signal: i32, value: u64, thread: i32) -> Result<Timer, String> {
        let mut event = [0u8; 64];
        event[..8].copy_from_slice(&value.to_ne_bytes());
        event[8..12].copy_from_slice(&signal.to_ne_bytes());
        event[12..16].copy_from_slice(&notify.to_ne_bytes());
        event[16..20].copy_from_slice(&thread.to_ne_bytes());
        let mut id = -1i32;
        // SAFETY: a sigevent of the kernel's form, and room for an id. Raw, because the C library has ids of its own.
        done("timer_create", unsafe { libc::syscall(libc::SYS_timer_create, clock, &event, &mut id) })?;
        Ok(Timer(id))
    }

    fn signal(signal: i32, value: u64) -> Result<Timer, String> {
        Timer::new(libc::CLOCK_MONOTONIC, SIGNAL, signal, value, 0)
    }

    fn delete(self) -> Result<(), String> {
        // SAFETY: has only a number.
        done("timer_delete", unsafe { libc::syscall(libc::SYS_timer_delete, self.0) }).map(drop)
    }

    fn set(self, value: Duration, period: Duration) -> Result<(), String> {
        let words = |time: Duration| [time.as_secs(), time.subsec_nanos().into()];
        let new = [words(period), words(value)];
        // SAFETY: an itimerspec.
        done("timer_settime", unsafe { libc::syscall(libc::SYS_timer_settime, self.0, 0, &new, 0) }).map(drop)
    }

    /// (time left, period)
    fn get(self) -> Result<(Duration, Duration), String> {
        let mut old = [[0u64; 2]; 2];
        // SAFETY: room for an itimerspec.
        let got = unsafe { libc::syscall(libc::SYS_timer_gettime, self.0, &mut old) };
        done(&format!("timer_gettime({})", self.0), got)?;
        Ok((Duration::new(old[1][0], old[1][1] as u32), Duration::new(old[0][0], old[0][1] as u32)))
    }

    fn overrun(self) -> Result<i32, String> {
        // SAFETY: has only a number.
        done("timer_getoverrun", unsafe { libc::syscall(libc::SYS_timer_getoverrun, self.0) }).map(|count| count as i32)
    }
}

fn proc_timers() -> Result<String, String> {
    std::fs::read_to_string("/proc/self/timers").map_err(|error| error.to_string())
}

fn ids(checkpoint: &Checkpoint) -> Result<(), String> {
    let timers = (0..40).map(|number| Timer::signal(40, number)).collect::<Result<Vec<_>, _>>()?;
    let kept = |index: usize| matches!(index, 3 | 4 | 17 | 38);
    for (index, timer) in timers.iter().enumerate() {
        if kept(index) {
            timer.set(Duration::from_secs(1000 + index as u64), Duration::from_secs(index as u64))?;
        } else {
            timer.delete()?;
        }
    }
    let before = proc_timers()?;
    checkpoint.wait()?;
    equal("/proc/self/timers", before, proc_timers()?)?;
    for (index, timer) in timers.iter().enumerate() {
        match timer.get() {
            Ok((left, period)) => {
                that(&format!("timer {} was there before", timer.0), kept(index))?;
                equal("period", Duration::from_secs(index as u64), period)?;
                let end = Duration::from_secs(1000 + index as u64);
                that("its time went on", left <= end && left + Duration::from_secs(60) > end)?;
            }
            Err(error) => that(&error, !kept(index))?,
        }
    }
    // A new one gets an id that none has.
    let new = Timer::signal(40, 0)?;
    that("a new timer has a new id", !(0..timers.len()).any(|index| kept(index) && timers[index].0 == new.0))
}

fn many(checkpoint: &Checkpoint) -> Result<(), String> {
    let timers = (0..700).map(|number| Timer::signal(41, number)).collect::<Result<Vec<_>, _>>()?;
    for (index, timer) in timers.iter().enumerate() {
        timer.set(Duration::from_secs(500), Duration::from_nanos(1_000_000_000 + index as u64))?;
    }
    checkpoint.wait()?;
    for (index, timer) in timers.iter().enumerate() {
        equal("period", Duration::from_nanos(1_000_000_000 + index as u64), timer.get()?.1)?;
    }
    Ok(())
}

fn time_left(checkpoint: &Checkpoint) -> Result<(), String> {
    let clocks = [libc::CLOCK_REALTIME, libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME, libc::CLOCK_TAI];
    let timers = clocks
        .into_iter()
        .map(|clock| {
            let timer = Timer::new(clock, SIGNAL, 40, 0, 0)?;
            timer.set(Duration::from_secs(2000), Duration::ZERO)?;
            Ok(timer)
        })
        .collect::<Result<Vec<_>, String>>()?;
    let idle = Timer::signal(40, 0)?;
    checkpoint.wait()?;
    for (timer, clock) in timers.into_iter().zip(clocks) {
        let (left, period) = timer.get()?;
        let went_on = left <= Duration::from_secs(2000) && left > Duration::from_secs(1940);
        that(&format!("the timer of clock {clock} went on, {left:?} are left"), went_on)?;
        equal("period", Duration::ZERO, period)?;
    }
    equal("time left of a timer that does not run", Duration::ZERO, idle.get()?.0)
}

fn notifications(checkpoint: &Checkpoint) -> Result<(), String> {
    handle(45);
    let period = Duration::from_millis(20);
    let signal = Timer::signal(45, 0x1234_5678_9abc_def0)?;
    let none = Timer::new(libc::CLOCK_MONOTONIC, NONE, 46, 7, 0)?;
    none.set(period, period)?;
    let before = proc_timers()?;
    signal.set(period, period)?;
    goes_on("the timer fires before the dump", 1)?;
    checkpoint.wait()?;
    equal("/proc/self/timers", before, proc_timers()?)?;
    VALUE.store(0, Ordering::SeqCst);
    goes_on("the timer fires after the restore", 3)?;
    equal("its value", 0x1234_5678_9abc_def0, VALUE.load(Ordering::SeqCst))?;
    let (left, _) = none.get()?;
    that("the timer without notification runs", left > Duration::ZERO && left <= period)
}

fn of_a_thread(checkpoint: &Checkpoint) -> Result<(), String> {
    handle(47);
    let barrier = Arc::new(Barrier::new(2));
    let theirs = barrier.clone();
    let tid = Arc::new(AtomicI32::new(0));
    let told = tid.clone();
    let thread = std::thread::spawn(move || {
        // SAFETY: has no arguments.
        let own = unsafe { libc::gettid() };
        // One that fires while the thread sleeps, and one whose signal is pending for the thread.
        let fires = Timer::new(libc::CLOCK_MONOTONIC, THREAD_ID, 47, 11, own)?;
        let pends = Timer::new(libc::CLOCK_MONOTONIC, THREAD_ID, 48, 12, own)?;
        block(48, true)?;
        pends.set(Duration::from_millis(1), Duration::ZERO)?;
        fires.set(Duration::from_millis(20), Duration::from_millis(20))?;
        eventually("the signal is pending", || is_pending(48))?;
        told.store(own, Ordering::SeqCst);
        theirs.wait();
        theirs.wait();
        let expected = TimerInfo { code: libc::SI_TIMER, timer: pends.0, overrun: 0, value: 12 };
        equal("the pending signal", expected, take(48)?)
    });
    barrier.wait();
    block(48, true)?;
    checkpoint.wait()?;
    VALUE.store(0, Ordering::SeqCst);
    goes_on("the thread's timer fires", 3)?;
    equal("value", 11, VALUE.load(Ordering::SeqCst))?;
    equal("thread that got the signal", tid.load(Ordering::SeqCst), BY.load(Ordering::SeqCst))?;
    barrier.wait();
    thread.join().map_err(|_| "the thread panicked")?
}

/// A timer whose signal was pending may be set again, fires again, and may be deleted.
fn pending_once(checkpoint: &Checkpoint) -> Result<(), String> {
    block(50, true)?;
    let timers = (0..3).map(|number| Timer::signal(50, 100 + number)).collect::<Result<Vec<_>, _>>()?;
    for timer in &timers {
        timer.set(Duration::from_millis(1), Duration::ZERO)?;
        // One after the other, for their order is checked.
        eventually("the timer fires", || timer.get().is_ok_and(|(left, _)| left == Duration::ZERO))?;
    }
    that("the signals are pending", is_pending(50))?;
    checkpoint.wait()?;
    for (index, timer) in timers.iter().enumerate() {
        equal("time left of a timer that fired", Duration::ZERO, timer.get()?.0)?;
        let value = 100 + index as u64;
        let expected = TimerInfo { code: libc::SI_TIMER, timer: timer.0, overrun: 0, value };
        equal("pending signal", expected, take(50)?)?;
    }
    that("no further signal is pending", !is_pending(50))?;
    timers[1].set(Duration::from_millis(1), Duration::ZERO)?;
    equal("signal of the timer set again", timers[1].0, take(50)?.timer)?;
    timers.into_iter().try_for_each(Timer::delete)
}

fn pending_and_overrunning(checkpoint: &Checkpoint) -> Result<(), String> {
    const PERIOD: Duration = Duration::from_millis(5);
    block(51, true)?;
    let begin = Instant::now();
    let timer = Timer::signal(51, 3)?;
    timer.set(PERIOD, PERIOD)?;
    std::thread::sleep(20 * PERIOD);
    checkpoint.ready()?;
    checkpoint.wait_for_go()?;
    // It overruns on, while the restored process does not take its signal.
    let restored = Instant::now();
    std::thread::sleep(20 * PERIOD);
    let after_restore = restored.elapsed().as_millis() / PERIOD.as_millis();
    that("its signal is pending", is_pending(51))?;
    let info = take(51)?;
    let at_most = begin.elapsed().as_millis() / PERIOD.as_millis();
    equal("code, timer and value", (libc::SI_TIMER, timer.0, 3), (info.code, info.timer, info.value))?;
    let overruns = info.overrun as u128;
    that(
        &format!("{overruns} overruns are at least the {after_restore} since the restore and the 18 before it"),
        overruns + 1 >= after_restore + 18,
    )?;
    that(&format!("{overruns} overruns are at most {at_most}"), overruns <= at_most)?;
    equal("timer_getoverrun", info.overrun, timer.overrun()?)?;
    that("there is one signal at a time", timer.get()?.1 == PERIOD)?;
    equal("the next signal is the timer's", timer.0, take(51)?.timer)
}

fn overruns_to_be_asked_for(checkpoint: &Checkpoint) -> Result<(), String> {
    const PERIOD: Duration = Duration::from_millis(700);
    block(52, true)?;
    let timer = Timer::signal(52, 4)?;
    timer.set(Duration::from_millis(1), PERIOD)?;
    // Fires, overruns twice, and has most of a period until it fires again.
    std::thread::sleep(2 * PERIOD + Duration::from_millis(20));
    let info = take(52)?;
    equal("overruns", 2, info.overrun)?;
    checkpoint.wait()?;
    equal("timer_getoverrun after the restore", 2, timer.overrun()?)?;
    equal("period", PERIOD, timer.get()?.1)?;
    equal("the next signal is the timer's", timer.0, take(52)?.timer)
}

fn cpu_time(checkpoint: &Checkpoint) -> Result<(), String> {
    handle(53);
    let period = Duration::from_millis(30);
    let process = Timer::new(libc::CLOCK_PROCESS_CPUTIME_ID, SIGNAL, 53, 8, 0)?;
    process.set(period, period)?;
    // This thread, by name.
    // SAFETY: has no arguments.
    let of_thread = !unsafe { libc::gettid() } << 3 | 6;
    let thread = Timer::new(of_thread, SIGNAL, 53, 9, 0)?;
    thread.set(Duration::from_secs(500), Duration::ZERO)?;
    checkpoint.wait()?;
    equal("period", period, process.get()?.1)?;
    let left = thread.get()?.0;
    that("the thread's timer went on", left <= Duration::from_secs(500) && left > Duration::from_secs(490))?;
    let count = CAUGHT.load(Ordering::SeqCst);
    busy_until("the timer fires three times", || CAUGHT.load(Ordering::SeqCst) >= count + 3)?;
    equal("value", 8, VALUE.load(Ordering::SeqCst))
}

fn cpu_time_of_one_thread(checkpoint: &Checkpoint) -> Result<(), String> {
    let barrier = Arc::new(Barrier::new(2));
    let theirs = barrier.clone();
    let thread = std::thread::spawn(move || {
        let timer = Timer::new(libc::CLOCK_THREAD_CPUTIME_ID, NONE, 0, 0, 0);
        theirs.wait();
        theirs.wait();
        timer?.delete()
    });
    barrier.wait();
    checkpoint.wait()?;
    barrier.wait();
    thread.join().map_err(|_| "the thread panicked")?
}

/// A timer of the C library that has a function run in a thread of its own (SIGEV_THREAD). The library has one more thread for
/// them, which blocks all signals and waits for one.
struct ThreadTimer(libc::timer_t);

/// How often the function was run, by the value of the timer.
static RUN: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];

extern "C" fn note_run(value: libc::sigval) {
    RUN[value.sival_ptr as usize].fetch_add(1, Ordering::SeqCst);
}

fn run(value: usize) -> u64 {
    RUN[value].load(Ordering::SeqCst)
}

impl ThreadTimer {
    fn new(value: usize, first: Duration, period: Duration) -> Result<ThreadTimer, String> {
        const SIGEV_THREAD: u32 = 2;
        // struct sigevent: value, signal and kind, function, attributes of the thread.
        let mut event = [value as u64, u64::from(SIGEV_THREAD) << 32, note_run as *const () as u64, 0, 0, 0, 0, 0];
        let words = |time: Duration| [time.as_secs(), time.subsec_nanos().into()];
        let new = [words(period), words(first)];
        let mut timer: libc::timer_t = null_mut();
        // SAFETY: a sigevent and an itimerspec, and room for an id.
        unsafe {
            done("timer_create", libc::timer_create(libc::CLOCK_MONOTONIC, event.as_mut_ptr().cast(), &mut timer))?;
            done("timer_settime", libc::timer_settime(timer, 0, new.as_ptr().cast(), null_mut()))?;
        }
        Ok(ThreadTimer(timer))
    }

    /// (time left, period)
    fn get(&self) -> Result<(Duration, Duration), String> {
        let mut old = [[0u64; 2]; 2];
        // SAFETY: a timer of ours, and room for an itimerspec.
        done("timer_gettime", unsafe { libc::timer_gettime(self.0, old.as_mut_ptr().cast()) })?;
        Ok((Duration::new(old[1][0], old[1][1] as u32), Duration::new(old[0][0], old[0][1] as u32)))
    }

    fn delete(self) -> Result<(), String> {
        // SAFETY: a timer of ours.
        unsafe {
            done("timer_getoverrun", libc::timer_getoverrun(self.0))?;
            done("timer_delete", libc::timer_delete(self.0)).map(drop)
        }
    }
}

fn functions_in_threads(checkpoint: &Checkpoint) -> Result<(), String> {
    const PERIOD: Duration = Duration::from_millis(10);
    // One that goes on, one that has fired, one that has not, and one that fires once about now.
    let periodic = ThreadTimer::new(0, PERIOD, PERIOD)?;
    let late = ThreadTimer::new(1, Duration::from_secs(2000), Duration::ZERO)?;
    eventually("the first function is run", || run(0) >= 3)?;
    let once = ThreadTimer::new(2, Duration::from_millis(1), Duration::ZERO)?;
    checkpoint.wait()?;
    let before = run(0);
    eventually("the first function is run after the restore", || run(0) >= before + 5)?;
    equal("its period", PERIOD, periodic.get()?.1)?;
    eventually("the function that is to run once is run", || run(2) >= 1)?;
    equal("what is left of its timer", (Duration::ZERO, Duration::ZERO), once.get()?)?;
    let left = late.get()?.0;
    that("the late timer went on", left <= Duration::from_secs(2000) && left > Duration::from_secs(1940))?;
    equal("runs of a late function", 0, run(1))?;
    let new = ThreadTimer::new(3, Duration::from_millis(1), PERIOD)?;
    eventually("the function of a new timer is run", || run(3) >= 3)?;
    equal("runs of a function that is to run once", 1, run(2))?;
    [periodic, late, once, new].into_iter().try_for_each(ThreadTimer::delete)
}
