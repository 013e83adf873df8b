//! Descriptors of processes.

use crate::wire::wire_struct;

wire_struct! {
    pub struct PidfdV1 for ckpt_core::resource::pidfds::Pidfd {
        pid: i32,
        thread: bool,
    }
}
