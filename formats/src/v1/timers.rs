//! Timers of a process.

use crate::wire::wire_struct;

wire_struct! {
    pub struct TimersV1 for ckpt_core::resource::timers::Timers {
        intervals: [IntervalV1; 3],
        posix: Vec<PosixTimerV1>,
    }
}

wire_struct! {
    pub struct IntervalV1 for ckpt_core::resource::timers::Interval { remaining: u64, period: u64 }
}

wire_struct! {
    pub struct PosixTimerV1 for ckpt_core::resource::timers::PosixTimer {
        id: i32,
        clock: i32,
        notify: i32,
        signal: i32,
        value: u64,
        thread: Option<i32>,
        remaining: u64,
        period: u64,
        overruns: u32,
        pending: bool,
    }
}
