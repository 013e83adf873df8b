//! Descriptors of memory files.

use crate::wire::wire_struct;

wire_struct! {
    pub struct MemfdV1 for ckpt_core::resource::memfds::Memfd {
        object: u32,
        position: i64,
    }
}
