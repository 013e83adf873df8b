//! FIFOs, with the data in them.

use crate::v1::files::IdentityV1;
use crate::v1::pipes::SegmentV1;
use crate::wire::{Bytes, wire_struct};

wire_struct! {
    pub struct FifoV1 for ckpt_core::resource::fifos::Fifo {
        path: Bytes,
        identity: IdentityV1,
        first: u32,
        buffer: Option<BufferV1>,
        hangup: bool,
    }
}

wire_struct! {
    pub struct BufferV1 for ckpt_core::resource::fifos::Buffer {
        size: u32,
        data: Vec<SegmentV1>,
    }
}
