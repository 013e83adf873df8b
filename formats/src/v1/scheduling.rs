//! Scheduling of a thread.

use crate::wire::wire_struct;

wire_struct! {
    pub struct SchedulingV1 for ckpt_core::resource::scheduling::Scheduling {}
}
