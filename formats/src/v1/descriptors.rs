//! Descriptor tables and open file descriptions.

use crate::v1::{
    devices, epoll, eventfd, fifos, files, inet_sockets, inotify, memfds, mqueues, pidfds, pipes, signalfd, terminals,
    timerfd, unix_sockets,
};
use crate::wire::{wire_enum, wire_struct};

wire_struct! {
    pub struct TableV1 for ckpt_core::resource::descriptors::Table {
        descriptors: Vec<DescriptorV1>,
    }
}

wire_struct! {
    pub struct DescriptorV1 for ckpt_core::resource::descriptors::Descriptor {
        fd: i32,
        file: u32,
        close_on_exec: bool,
    }
}

wire_struct! {
    pub struct OpenFileV1 for ckpt_core::resource::descriptors::OpenFile {
        flags: i32,
        owner: Option<OwnerV1>,
        kind: FileKindV1,
    }
}

wire_struct! {
    pub struct OwnerV1 for ckpt_core::resource::descriptors::Owner {
        kind: i32,
        id: i32,
        signal: i32,
    }
}

wire_enum! {
    /// One line a kind of file.
    pub enum FileKindV1 for ckpt_core::resource::descriptors::FileKind {
        Device(devices::DeviceV1),
        Memfd(memfds::MemfdV1),
        File(files::FileV1),
        Mqueue(mqueues::OpenMqueueV1),
        Pipe(pipes::PipeV1),
        Fifo(fifos::FifoV1),
        Terminal(terminals::TerminalV1),
        Epoll(epoll::EpollV1),
        Eventfd(eventfd::EventfdV1),
        InetSocket(inet_sockets::InetSocketV1),
        Inotify(inotify::InotifyV1),
        Pidfd(pidfds::PidfdV1),
        Signalfd(signalfd::SignalfdV1),
        Timerfd(timerfd::TimerfdV1),
        UnixSocket(unix_sockets::UnixSocketV1),
    }
}
