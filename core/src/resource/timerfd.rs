//! Timer descriptors (`timerfd`): clock, setting, remaining time and expirations not read yet.
//!
//! What happens to the time between dump and restore:
//! - A relative timer goes on with the time that remained.
//! - An absolute timer of `CLOCK_REALTIME` keeps its date: one that has passed meanwhile expires at once.
//! - An absolute timer of a clock that counts from the boot (`CLOCK_MONOTONIC`, `CLOCK_BOOTTIME`) keeps its time as long
//!   as the boot is the same, because the program sees the same clock go on. After another boot that clock says nothing
//!   about the old time, and the timer goes on with the time that remained.
//!
//! The expirations of a periodic timer during the dump are counted. That the clock was set
//! (`TFD_TIMER_CANCEL_ON_SET`) and the program has not yet been told is the one thing the kernel does not show.

use std::io;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::args;
use crate::batch::{Batch, Replies, Sysno};
use crate::error::{DumpError, RestoreError};
use crate::resource::descriptors::{CollectFile, FileResource, OfFile, RebuildFile, Seen};
use crate::resource::{Check, Resource};

/// Its saved form. All times are in nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timerfd {
    /// `CLOCK_*`.
    pub clock: i32,
    /// As given to `timerfd_settime`: `TFD_TIMER_ABSTIME`, `TFD_TIMER_CANCEL_ON_SET`.
    pub settime_flags: u32,
    /// Expirations that were not read.
    pub ticks: u64,
    /// Until the next expiration; 0 if it is not armed.
    pub remaining: u64,
    /// 0 if it expires once.
    pub interval: u64,
    /// Of an armed absolute timer: the next expiration on its clock.
    pub deadline: Option<u64>,
}

/// Timer descriptors.
pub struct Timerfds;

const NANOSECONDS: u64 = 1_000_000_000;
const TFD_TIMER_ABSTIME: u32 = 1;
/// `_IOW('T', 0, __u64)`, with `CONFIG_CHECKPOINT_RESTORE`.
const TFD_IOC_SET_TICKS: u32 = 0x4008_5400;

impl Resource for Timerfds {
    const NAME: &'static str = "timerfd";
    type Scope = OfFile;
    type Saved = Timerfd;

    fn collect(context: &mut CollectFile<'_>) -> Result<Timerfd, DumpError> {
        let mut saved = settled(context)?;
        if saved.remaining != 0 && saved.settime_flags & TFD_TIMER_ABSTIME != 0 {
            // The clock is read after the remaining time, so that the result is never before the true time.
            let (now, remaining) = now_and_remaining(context, saved.clock)?;
            saved.deadline = Some(now.saturating_add(remaining.unwrap_or(saved.remaining)));
        }
        Ok(saved)
    }

    fn check(saved: &Timerfd, context: &mut Check<'_>) {
        // There are clocks up to CLOCK_TAI; a number outside that range comes from no dump.
        if !(0..=libc::CLOCK_TAI).contains(&saved.clock) {
            context.refuse(format!("timer of clock {}", saved.clock), "there is no such clock", "use another image");
        }
    }

    fn rebuild(saved: &Timerfd, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        let process = context.process();
        context.create(process, 1, 0, |batch| {
            (batch.call(Sysno::timerfd_create, args![saved.clock, 0]), |_: &Replies| Ok(()))
        })
    }
}

impl FileResource for Timerfds {
    fn claims(seen: &Seen) -> bool {
        seen.is_anon_inode("[timerfd]")
    }

    /// Armed as late as possible: the time that a restore takes is not the program's.
    fn finish(saved: &Timerfd, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        let process = context.process();
        let fd = context.bring(context.id, process)?;
        let mut batch = Batch::new();
        let time = batch.room(16);
        batch.call(Sysno::clock_gettime, args![saved.clock, time]);
        let now = nanoseconds(&context.run(process, &batch)?.words(time));
        let same_boot = !counts_from_boot(saved.clock) || boot_id() == context.image.host.boot_id;
        let setting = setting(saved, now, same_boot);
        let mut batch = Batch::new();
        let value = batch.words(&[
            setting.interval / NANOSECONDS,
            setting.interval % NANOSECONDS,
            setting.value / NANOSECONDS,
            setting.value % NANOSECONDS,
        ]);
        batch.call(Sysno::timerfd_settime, args![fd, saved.settime_flags, value, 0]);
        let ticks = (setting.ticks != 0).then(|| {
            let ticks = batch.words(&[setting.ticks]);
            batch.try_call(Sysno::ioctl, args![fd, TFD_IOC_SET_TICKS, ticks])
        });
        let replies = context.run(process, &batch)?;
        match ticks.map(|call| replies.result(call)) {
            Some(Err(Errno::ENOTTY)) => Err(context.mismatch(
                "expirations that were not read cannot be set on this kernel; it needs CONFIG_CHECKPOINT_RESTORE",
            )),
            Some(Err(errno)) => Err(context.mismatch(format!("expirations that were not read cannot be set: {errno}"))),
            _ => Ok(()),
        }
    }
}

/// What to give to `timerfd_settime` and `TFD_IOC_SET_TICKS`.
#[derive(Debug, PartialEq, Eq)]
struct Setting {
    value: u64,
    interval: u64,
    ticks: u64,
}

fn setting(saved: &Timerfd, now: u64, same_boot: bool) -> Setting {
    let plain = |value| Setting { value, interval: saved.interval, ticks: saved.ticks };
    if saved.remaining == 0 {
        return plain(0);
    }
    let Some(deadline) = saved.deadline else { return plain(saved.remaining) };
    if !same_boot {
        return plain(now.saturating_add(saved.remaining));
    }
    if saved.ticks != 0 && deadline <= now && saved.interval != 0 {
        // Arming it in the past would expire it before the old expirations can be set, and setting them would
        // then forget the new one: so count what has passed here.
        let missed = (now - deadline) / saved.interval + 1;
        let value = deadline.saturating_add(missed.saturating_mul(saved.interval));
        return Setting { value, interval: saved.interval, ticks: saved.ticks.saturating_add(missed) };
    }
    plain(deadline.max(1))
}

/// Whether a clock starts anew with the kernel.
fn counts_from_boot(clock: i32) -> bool {
    matches!(clock, libc::CLOCK_MONOTONIC | libc::CLOCK_BOOTTIME | libc::CLOCK_BOOTTIME_ALARM)
}

fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_string()
}

/// `struct timespec`.
fn nanoseconds(words: &[u64]) -> u64 {
    words[0].saturating_mul(NANOSECONDS).saturating_add(words[1])
}

/// The time of the timer's clock, and the remaining time of the timer, if it still runs, right before.
fn now_and_remaining(context: &mut CollectFile<'_>, clock: i32) -> Result<(u64, Option<u64>), DumpError> {
    let mut batch = Batch::new();
    let (setting, time) = (batch.room(32), batch.room(16));
    batch.call(Sysno::timerfd_gettime, args![context.seen.fd, setting]);
    batch.call(Sysno::clock_gettime, args![clock, time]);
    let replies = context.run(&batch)?;
    let remaining = nanoseconds(&replies.words(setting)[2..]);
    Ok((nanoseconds(&replies.words(time)), (remaining != 0).then_some(remaining)))
}

/// How long a timer has to look disarmed before it is believed. One that is about to expire looks the same, without
/// expirations and without remaining time, from its time on until the kernel has run its interrupt.
const DISARMED_FOR: Duration = Duration::from_micros(100);

/// Reads the timer until it can be told: it goes on while its process is frozen.
fn settled(context: &mut CollectFile<'_>) -> Result<Timerfd, DumpError> {
    let begun = Instant::now();
    let mut readings = Vec::new();
    loop {
        readings.push(reading(context)?);
        match settle(&readings, begun.elapsed()) {
            Some(settled) => return Ok(settled),
            None => std::thread::yield_now(),
        }
    }
}

/// What the timer is, if the readings so far tell.
fn settle(readings: &[Timerfd], elapsed: Duration) -> Option<Timerfd> {
    let (last, earlier) = readings.split_last()?;
    let looks_disarmed = |timer: &Timerfd| timer.remaining == 0 && timer.ticks == 0;
    if looks_disarmed(last) {
        if earlier.iter().all(looks_disarmed) {
            return (!earlier.is_empty() && elapsed >= DISARMED_FOR).then(|| last.clone());
        }
        // It ran a moment ago, so it is expiring, and its interrupt is late: it expires at once.
        return (elapsed >= 100 * DISARMED_FOR).then(|| Timerfd { remaining: 1, ..last.clone() });
    }
    let known = earlier.last()?;
    if known.ticks == last.ticks && (last.interval == 0 || last.remaining != 0) {
        return Some(last.clone());
    }
    // So short a period that it expires between any two looks: the next expiration is a period away.
    (earlier.len() >= 8).then(|| match last.remaining {
        0 => Timerfd { remaining: last.interval, ..last.clone() },
        _ => last.clone(),
    })
}

fn reading(context: &mut CollectFile<'_>) -> Result<Timerfd, DumpError> {
    // Of a periodic timer, the kernel counts what has expired only when it is asked: fdinfo alone does not.
    let mut batch = Batch::new();
    let setting = batch.room(32);
    batch.call(Sysno::timerfd_gettime, args![context.seen.fd, setting]);
    context.run(&batch)?;
    let name = format!("fdinfo/{}", context.seen.fd);
    let text = context.target().proc().text(&name).map_err(|error| context.io_error(&name, error))?;
    parse(&text).ok_or_else(|| {
        context.io_error(&name, io::Error::new(io::ErrorKind::InvalidData, format!("unknown form: {text:?}")))
    })
}

/// The lines of `fdinfo`; the times in parentheses are seconds and nanoseconds, the flags octal.
fn parse(text: &str) -> Option<Timerfd> {
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
    let time = |name: &str| {
        let (seconds, nanoseconds) = field(name)?.strip_prefix('(')?.strip_suffix(')')?.split_once(", ")?;
        seconds.parse::<u64>().ok()?.checked_mul(NANOSECONDS)?.checked_add(nanoseconds.parse().ok()?)
    };
    Some(Timerfd {
        clock: field("clockid")?.parse().ok()?,
        settime_flags: u32::from_str_radix(field("settime flags")?, 8).ok()?,
        ticks: field("ticks")?.parse().ok()?,
        remaining: time("it_value")?,
        interval: time("it_interval")?,
        deadline: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = "pos:\t0\nflags:\t02004002\nmnt_id:\t16\nino:\t4\nclockid: 1\nticks: 3\nsettime flags: 01\n\
                          it_value: (2, 500000000)\nit_interval: (4, 7)\n";

    #[test]
    fn all_fields_of_fdinfo() {
        let timer = parse(SAMPLE).unwrap();
        assert_eq!((timer.clock, timer.settime_flags, timer.ticks), (1, 1, 3));
        assert_eq!((timer.remaining, timer.interval), (2_500_000_000, 4_000_000_007));
        assert_eq!(parse(&SAMPLE.replace("it_value", "value")), None);
    }

    fn saved(deadline: Option<u64>) -> Timerfd {
        Timerfd { remaining: 500, interval: 100, ticks: 2, deadline, ..parse(SAMPLE).unwrap() }
    }

    /// A restored program waited for its periodic timer without end, about once in 300 dumps on a busy machine: of a timer
    /// that ran and was read in the moment of its expiration, the kernel showed neither remaining time nor expirations.
    #[test]
    fn a_timer_that_is_expiring_is_not_disarmed() {
        let timer = |ticks, remaining, interval| Timerfd { ticks, remaining, interval, ..parse(SAMPLE).unwrap() };
        let soon = Duration::from_micros(30);
        let later = 2 * DISARMED_FOR;
        for interval in [0, 2_000_000] {
            let (running, expiring) = (timer(0, 400, interval), timer(0, 0, interval));
            assert_eq!(settle(&[running.clone(), expiring.clone()], later), None);
            assert_eq!(settle(&[expiring.clone(), expiring.clone()], soon), None);
            assert_eq!(settle(std::slice::from_ref(&expiring), later), None);
            assert_eq!(settle(&[expiring.clone(), expiring.clone()], later), Some(expiring.clone()), "it is disarmed");
            let late = settle(&[running.clone(), expiring.clone()], 200 * DISARMED_FOR).unwrap();
            assert_eq!((late.remaining, late.interval), (1, interval), "it expires at once");
        }
        let expired = timer(1, 0, 0);
        assert_eq!(settle(&[timer(0, 0, 0), expired.clone(), expired.clone()], soon), Some(expired));
        let periodic = timer(1, 1_900_000, 2_000_000);
        assert_eq!(settle(&[timer(0, 0, 2_000_000), periodic.clone()], soon), None, "once more, to be sure");
        assert_eq!(settle(&[timer(0, 400, 2_000_000), periodic.clone(), periodic.clone()], soon), Some(periodic));
    }

    #[test]
    fn a_relative_timer_goes_on_where_it_was() {
        assert_eq!(setting(&saved(None), 9_000, true), Setting { value: 500, interval: 100, ticks: 2 });
    }

    #[test]
    fn an_absolute_timer_keeps_its_date() {
        assert_eq!(setting(&saved(Some(9_500)), 9_000, true), Setting { value: 9_500, interval: 100, ticks: 2 });
    }

    #[test]
    fn expirations_while_dumped_are_counted() {
        // due at 9,500, 9,600, ... 10,000: six, and two from before
        assert_eq!(setting(&saved(Some(9_500)), 10_000, true), Setting { value: 10_100, interval: 100, ticks: 8 });
    }

    #[test]
    fn after_another_boot_the_remaining_time_counts() {
        assert_eq!(setting(&saved(Some(9_500)), 70, false), Setting { value: 570, interval: 100, ticks: 2 });
    }

    #[test]
    fn an_expired_timer_stays_expired() {
        let timer = Timerfd { remaining: 0, interval: 0, ticks: 1, ..saved(None) };
        assert_eq!(setting(&timer, 9_000, true), Setting { value: 0, interval: 0, ticks: 1 });
    }
}
