//! Signals of a process and of a thread.

use crate::wire::{Bytes, wire_struct};

wire_struct! {
    pub struct ProcessV1 for ckpt_core::resource::signals::Process { actions: Vec<ActionV1>, pending: Vec<Bytes> }
}

wire_struct! {
    pub struct ActionV1 for ckpt_core::resource::signals::Action {
        signal: i32,
        handler: u64,
        flags: u64,
        restorer: u64,
        mask: u64,
    }
}

wire_struct! {
    pub struct ThreadV1 for ckpt_core::resource::signals::Thread {
        alternate_stack: Option<AlternateStackV1>,
        pending: Vec<Bytes>,
    }
}

wire_struct! {
    pub struct AlternateStackV1 for ckpt_core::resource::signals::AlternateStack {
        address: u64,
        size: u64,
        autodisarm: bool,
    }
}
