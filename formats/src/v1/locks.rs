//! File locks.

use crate::wire::wire_struct;

wire_struct! {
    pub struct LockV1 for ckpt_core::resource::locks::Lock {}
}
