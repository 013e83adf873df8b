//! Device nodes without state.

use crate::wire::wire_struct;

wire_struct! {
    pub struct DeviceV1 for ckpt_core::resource::devices::Device {}
}
