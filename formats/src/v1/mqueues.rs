//! POSIX message queues.

use crate::wire::{Bytes, wire_struct};

wire_struct! {
    pub struct OpenMqueueV1 for ckpt_core::resource::mqueues::OpenMqueue {
        inode: u64,
        queue: Option<MqueueV1>,
    }
}

wire_struct! {
    pub struct MqueueV1 for ckpt_core::resource::mqueues::Mqueue {
        name: Bytes,
        linked: bool,
        mode: u32,
        uid: u32,
        gid: u32,
        capacity: u64,
        largest: u64,
        messages: Vec<MqueueMessageV1>,
        notification: Option<NotificationV1>,
    }
}

wire_struct! {
    pub struct MqueueMessageV1 for ckpt_core::resource::mqueues::Message {
        priority: u32,
        data: Bytes,
    }
}

wire_struct! {
    pub struct NotificationV1 for ckpt_core::resource::mqueues::Notification {
        process: i32,
        notify: i32,
        signal: i32,
        value: u64,
    }
}
