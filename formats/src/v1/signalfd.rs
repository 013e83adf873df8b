//! Signal descriptors.

use crate::wire::wire_struct;

wire_struct! {
    pub struct SignalfdV1 for ckpt_core::resource::signalfd::Signalfd {
        mask: u64,
    }
}
