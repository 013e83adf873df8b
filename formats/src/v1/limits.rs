//! Resource limits.

use crate::wire::wire_struct;

wire_struct! {
    pub struct LimitsV1 for ckpt_core::resource::limits::Limits { limits: Vec<LimitV1> }
}

wire_struct! {
    pub struct LimitV1 for ckpt_core::resource::limits::Limit { soft: u64, hard: u64 }
}
