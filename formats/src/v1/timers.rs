//! Timers of a process.

use crate::wire::wire_struct;

wire_struct! {
    pub struct TimersV1 for ckpt_core::resource::timers::Timers {}
}
