//! Pipes, with the data in them.

use crate::wire::{Bytes, wire_struct};

wire_struct! {
    pub struct PipeV1 for ckpt_core::resource::pipes::Pipe {
        first: u32,
        buffer: Option<BufferV1>,
    }
}

wire_struct! {
    pub struct BufferV1 for ckpt_core::resource::pipes::Buffer {
        size: u32,
        mode: u32,
        uid: u32,
        gid: u32,
        data: Vec<SegmentV1>,
    }
}

wire_struct! {
    pub struct SegmentV1 for ckpt_core::resource::pipes::Segment {
        packet: bool,
        bytes: Bytes,
    }
}
