//! Timer descriptors.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::mem::zeroed;
use std::os::fd::{AsRawFd, FromRawFd};
use std::time::{Duration, Instant};

use crate::case::{Case, Checkpoint};
use crate::expect::{done, equal, eventually, that};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("timerfd/relative", &["timerfd"], relative),
        Case::new("timerfd/periodic", &["timerfd"], periodic),
        Case::new("timerfd/absolute", &["timerfd"], absolute),
        Case::new("timerfd/unread", &["timerfd"], unread),
        Case::new("timerfd/expires-while-dumped", &["timerfd"], expires_while_dumped),
        Case::new("timerfd/not-armed", &["timerfd"], not_armed),
    ]
}

type Verdict = Result<(), String>;

fn timerfd(clock: i32, flags: i32) -> Result<File, String> {
    // SAFETY: makes a new descriptor, which the File owns.
    unsafe { Ok(File::from_raw_fd(done("timerfd_create", libc::timerfd_create(clock, flags))?)) }
}

fn timespec(time: Duration) -> libc::timespec {
    libc::timespec { tv_sec: time.as_secs() as i64, tv_nsec: i64::from(time.subsec_nanos()) }
}

fn duration(time: libc::timespec) -> Duration {
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn set(timer: &File, flags: i32, value: Duration, interval: Duration) -> Verdict {
    let setting = libc::itimerspec { it_interval: timespec(interval), it_value: timespec(value) };
    // SAFETY: reads a whole itimerspec.
    done("timerfd_settime", unsafe { libc::timerfd_settime(timer.as_raw_fd(), flags, &setting, std::ptr::null_mut()) })
        .map(drop)
}

/// Time left, and interval.
fn get(timer: &File) -> Result<(Duration, Duration), String> {
    // SAFETY: writes a whole itimerspec; all zero is one.
    unsafe {
        let mut setting: libc::itimerspec = zeroed();
        done("timerfd_gettime", libc::timerfd_gettime(timer.as_raw_fd(), &mut setting))?;
        Ok((duration(setting.it_value), duration(setting.it_interval)))
    }
}

fn now(clock: i32) -> Duration {
    // SAFETY: writes a whole timespec; the clocks exist.
    unsafe {
        let mut time: libc::timespec = zeroed();
        libc::clock_gettime(clock, &mut time);
        duration(time)
    }
}

fn expirations(mut timer: &File) -> Result<u64, ErrorKind> {
    let mut count = [0; 8];
    timer.read_exact(&mut count).map_err(|error| error.kind())?;
    Ok(u64::from_ne_bytes(count))
}

const SECOND: Duration = Duration::from_secs(1);

fn relative(checkpoint: &Checkpoint) -> Verdict {
    let long = timerfd(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK)?;
    let short = timerfd(libc::CLOCK_BOOTTIME, 0)?;
    set(&long, 0, 1000 * SECOND, Duration::ZERO)?;
    set(&short, 0, SECOND / 5, Duration::ZERO)?;
    checkpoint.wait()?;
    let (left, interval) = get(&long)?;
    that(&format!("900 to 1000 s are left of 1000: {left:?}"), left <= 1000 * SECOND && left > 900 * SECOND)?;
    equal("interval", Duration::ZERO, interval)?;
    equal("the long one", Err(ErrorKind::WouldBlock), expirations(&long))?;
    equal("the short one", Ok(1), expirations(&short))
}

fn periodic(checkpoint: &Checkpoint) -> Verdict {
    let timer = timerfd(libc::CLOCK_MONOTONIC, 0)?;
    set(&timer, 0, SECOND / 50, SECOND / 50)?;
    checkpoint.wait()?;
    equal("interval", SECOND / 50, get(&timer)?.1)?;
    that("it has expired", expirations(&timer).map_err(|error| error.to_string())? >= 1)?;
    let begin = Instant::now();
    let mut count = 0;
    while count < 5 {
        count += expirations(&timer).map_err(|error| error.to_string())?;
    }
    let took = begin.elapsed();
    that(&format!("five periods of 20 ms take more than 60 ms: {took:?}"), took > Duration::from_millis(60))
}

fn absolute(checkpoint: &Checkpoint) -> Verdict {
    let clocks = [libc::CLOCK_REALTIME, libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME];
    let mut timers = Vec::new();
    for clock in clocks {
        let (timer, deadline) = (timerfd(clock, 0)?, now(clock) + 1000 * SECOND);
        let cancel = if clock == libc::CLOCK_REALTIME { libc::TFD_TIMER_CANCEL_ON_SET } else { 0 };
        set(&timer, libc::TFD_TIMER_ABSTIME | cancel, deadline, 7 * SECOND)?;
        timers.push((clock, timer, deadline));
    }
    checkpoint.wait()?;
    for (clock, timer, deadline) in timers {
        let (left, interval) = get(&timer)?;
        let found = now(clock) + left;
        let off = found.abs_diff(deadline);
        that(&format!("clock {clock}: expires at {deadline:?}, not {found:?}"), off < SECOND / 10)?;
        equal("interval", 7 * SECOND, interval)?;
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", timer.as_raw_fd())).unwrap_or_default();
        let flags = if clock == libc::CLOCK_REALTIME { "settime flags: 03" } else { "settime flags: 01" };
        that(&format!("{flags} in {info:?}"), info.contains(flags))?;
    }
    Ok(())
}

fn unread(checkpoint: &Checkpoint) -> Verdict {
    let once = timerfd(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK)?;
    let often = timerfd(libc::CLOCK_MONOTONIC, 0)?;
    set(&once, 0, Duration::from_nanos(1), Duration::ZERO)?;
    // Expires five times at once, then not for a long time.
    let period = 500 * SECOND;
    set(
        &often,
        libc::TFD_TIMER_ABSTIME,
        now(libc::CLOCK_MONOTONIC).saturating_sub(2 * SECOND).max(SECOND / 100),
        period,
    )?;
    let expired = |timer: &File| {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", timer.as_raw_fd())).unwrap_or_default();
        info.contains("ticks: 1\n")
    };
    eventually("both expire", || expired(&once) && expired(&often))?;
    checkpoint.wait()?;
    equal("one expiration was not read", Ok(1), expirations(&once))?;
    equal("and no other", Err(ErrorKind::WouldBlock), expirations(&once))?;
    equal("time left of it", Duration::ZERO, get(&once)?.0)?;
    equal("of the periodic one", Ok(1), expirations(&often))?;
    let left = get(&often)?.0;
    that(&format!("the next is 490 s away or more: {left:?}"), left > 490 * SECOND && left <= period)
}

/// A date does not wait: it passes before, during or after the dump, and the program reads just one expiration.
fn expires_while_dumped(checkpoint: &Checkpoint) -> Verdict {
    let mut timers = Vec::new();
    for milliseconds in 1..=40 {
        let clock = if milliseconds % 2 == 0 { libc::CLOCK_REALTIME } else { libc::CLOCK_MONOTONIC };
        let (timer, deadline) = (timerfd(clock, 0)?, now(clock) + Duration::from_millis(milliseconds));
        set(&timer, libc::TFD_TIMER_ABSTIME, deadline, Duration::ZERO)?;
        timers.push((clock, timer, deadline));
    }
    checkpoint.wait()?;
    for (clock, timer, deadline) in timers {
        equal("expirations", Ok(1), expirations(&timer))?;
        that("not before its time", now(clock) >= deadline)?;
        equal("time left", Duration::ZERO, get(&timer)?.0)?;
    }
    Ok(())
}

fn not_armed(checkpoint: &Checkpoint) -> Verdict {
    let fresh = timerfd(libc::CLOCK_REALTIME, libc::TFD_NONBLOCK | libc::TFD_CLOEXEC)?;
    let stopped = timerfd(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK)?;
    set(&stopped, 0, 5 * SECOND, SECOND)?;
    set(&stopped, 0, Duration::ZERO, Duration::ZERO)?;
    checkpoint.wait()?;
    for timer in [&fresh, &stopped] {
        equal("time left", (Duration::ZERO, Duration::ZERO), get(timer)?)?;
        equal("expirations", Err(ErrorKind::WouldBlock), expirations(timer))?;
    }
    // Its clock is that of the wall: a date that has passed expires at once.
    set(&fresh, libc::TFD_TIMER_ABSTIME, now(libc::CLOCK_REALTIME) - SECOND, Duration::ZERO)?;
    eventually("a date that has passed expires", || expirations(&fresh) == Ok(1))
}
