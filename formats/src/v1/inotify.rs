//! File watches.

use crate::v1::files::IdentityV1;
use crate::wire::{Bytes, wire_struct};

wire_struct! {
    pub struct InotifyV1 for ckpt_core::resource::inotify::Inotify {
        watches: Vec<WatchV1>,
    }
}

wire_struct! {
    pub struct WatchV1 for ckpt_core::resource::inotify::Watch {
        number: i32,
        path: Bytes,
        file_type: u32,
        identity: IdentityV1,
        mask: u32,
    }
}
