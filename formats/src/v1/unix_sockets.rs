//! Unix sockets, with the messages in them.

use crate::v1::sockets::SocketOptionV1;
use crate::wire::{Bytes, wire_enum, wire_struct};

wire_struct! {
    pub struct UnixSocketV1 for ckpt_core::resource::unix_sockets::UnixSocket {
        kind: i32,
        uid: u32,
        gid: u32,
        name: Bytes,
        file: Option<BoundFileV1>,
        state: UnixStateV1,
        shutdown: u8,
        peer: Option<PeerCredentialsV1>,
        options: Vec<SocketOptionV1>,
        queue: Vec<MessageV1>,
    }
}

wire_struct! {
    pub struct BoundFileV1 for ckpt_core::resource::unix_sockets::BoundFile {
        path: Bytes,
        mode: u32,
        uid: u32,
        gid: u32,
    }
}

wire_enum! {
    pub enum UnixStateV1 for ckpt_core::resource::unix_sockets::State {
        Unconnected,
        Listening { backlog: u32, waiting: Vec<u32> },
        Waiting { at: u32 },
        Connected { to: u32 },
        Outside { name: Bytes },
        Orphaned { name: Bytes, reset: bool },
    }
}

wire_struct! {
    pub struct PeerCredentialsV1 for ckpt_core::resource::unix_sockets::Credentials {
        pid: i32,
        uid: u32,
        gid: u32,
        groups: Vec<u32>,
    }
}

wire_struct! {
    pub struct MessageV1 for ckpt_core::resource::unix_sockets::Message {
        data: Bytes,
        sender: Option<u32>,
        credentials: Option<(i32, u32, u32)>,
        descriptors: Vec<u32>,
    }
}
