//! Timer descriptors. Times are in nanoseconds.

use crate::wire::wire_struct;

wire_struct! {
    pub struct TimerfdV1 for ckpt_core::resource::timerfd::Timerfd {
        clock: i32,
        settime_flags: u32,
        ticks: u64,
        remaining: u64,
        interval: u64,
        deadline: Option<u64>,
    }
}
