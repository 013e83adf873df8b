//! Signals of a process and of a thread.

use crate::wire::wire_struct;

wire_struct! {
    pub struct ProcessV1 for ckpt_core::resource::signals::Process {}
}

wire_struct! {
    pub struct ThreadV1 for ckpt_core::resource::signals::Thread {}
}
