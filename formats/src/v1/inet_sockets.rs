//! TCP and UDP sockets.

use crate::v1::sockets::{SocketAddressV1, SocketOptionV1};
use crate::wire::{Bytes, wire_enum, wire_struct};

wire_struct! {
    pub struct InetSocketV1 for ckpt_core::resource::inet_sockets::InetSocket {
        domain: i32,
        protocol: i32,
        uid: u32,
        gid: u32,
        local: Option<SocketAddressV1>,
        state: InetStateV1,
        options: Vec<SocketOptionV1>,
        memberships: Vec<MembershipV1>,
    }
}

wire_enum! {
    pub enum InetStateV1 for ckpt_core::resource::inet_sockets::State {
        Closed,
        Listening { backlog: u32 },
        Connected { remote: SocketAddressV1 },
        Established(ConnectionV1),
        Waiting { remote: SocketAddressV1 },
        Reset { error: bool },
    }
}

wire_struct! {
    pub struct ConnectionV1 for ckpt_core::resource::inet_sockets::Connection {
        remote: SocketAddressV1,
        to: Option<u32>,
        shutdown: u8,
        queue: Bytes,
    }
}

wire_struct! {
    pub struct MembershipV1 for ckpt_core::resource::inet_sockets::Membership {
        group: Bytes,
        interface: String,
        include: bool,
        sources: Vec<Bytes>,
    }
}
