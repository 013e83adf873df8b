//! File locks.

use crate::wire::{wire_enum, wire_struct};

wire_struct! {
    pub struct LockV1 for ckpt_core::resource::locks::Lock {
        file: u32,
        kind: KindV1,
        write: bool,
        start: u64,
        end: Option<u64>,
    }
}

wire_enum! {
    pub enum KindV1 for ckpt_core::resource::locks::Kind {
        Posix { process: i32 },
        OpenFile,
        Flock,
        Lease,
    }
}
