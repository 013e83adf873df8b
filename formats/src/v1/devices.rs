//! Device nodes without state.

use crate::wire::{Bytes, wire_struct};

wire_struct! {
    pub struct DeviceV1 for ckpt_core::resource::devices::Device {
        path: Bytes,
        major: u32,
        minor: u32,
    }
}
