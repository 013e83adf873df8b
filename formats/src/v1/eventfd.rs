//! Event counters.

use crate::wire::wire_struct;

wire_struct! {
    pub struct EventfdV1 for ckpt_core::resource::eventfd::Eventfd {
        count: u64,
        semaphore: bool,
    }
}
