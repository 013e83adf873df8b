//! Resource limits.

use crate::wire::wire_struct;

wire_struct! {
    pub struct LimitsV1 for ckpt_core::resource::limits::Limits {}
}
