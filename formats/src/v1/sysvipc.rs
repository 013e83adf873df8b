//! System V shared memory, semaphores and message queues.

use crate::wire::{Bytes, wire_struct};

wire_struct! {
    pub struct SystemVV1 for ckpt_core::resource::sysvipc::SystemV {
        segments: Vec<SharedSegmentV1>,
        semaphores: Vec<SemaphoreSetV1>,
        queues: Vec<MessageQueueV1>,
    }
}

wire_struct! {
    pub struct PermissionsV1 for ckpt_core::resource::sysvipc::Permissions {
        id: i32,
        key: i32,
        mode: u32,
        uid: u32,
        gid: u32,
        cuid: u32,
        cgid: u32,
    }
}

wire_struct! {
    pub struct SharedSegmentV1 for ckpt_core::resource::sysvipc::Segment {
        permissions: PermissionsV1,
        creator: i32,
        object: u32,
        name_key: i32,
    }
}

wire_struct! {
    pub struct SemaphoreSetV1 for ckpt_core::resource::sysvipc::SemaphoreSet {
        permissions: PermissionsV1,
        semaphores: Vec<SemaphoreV1>,
        operated: bool,
        undo: Vec<UndoV1>,
    }
}

wire_struct! {
    pub struct SemaphoreV1 for ckpt_core::resource::sysvipc::Semaphore {
        value: u16,
        last: i32,
    }
}

wire_struct! {
    pub struct UndoV1 for ckpt_core::resource::sysvipc::Undo {
        process: i32,
        semaphore: u16,
        adjustment: i16,
    }
}

wire_struct! {
    pub struct MessageQueueV1 for ckpt_core::resource::sysvipc::MessageQueue {
        permissions: PermissionsV1,
        capacity: u64,
        sender: i32,
        receiver: i32,
        messages: Vec<QueuedMessageV1>,
    }
}

wire_struct! {
    pub struct QueuedMessageV1 for ckpt_core::resource::sysvipc::Message {
        kind: i64,
        data: Bytes,
    }
}
