//! Event polls.

use crate::wire::wire_struct;

wire_struct! {
    pub struct EpollV1 for ckpt_core::resource::epoll::Epoll {
        entries: Vec<EntryV1>,
        busy_poll: Option<BusyPollV1>,
    }
}

wire_struct! {
    pub struct EntryV1 for ckpt_core::resource::epoll::Entry {
        file: u32,
        fd: i32,
        events: u32,
        data: u64,
    }
}

wire_struct! {
    pub struct BusyPollV1 for ckpt_core::resource::epoll::BusyPoll {
        microseconds: u32,
        budget: u16,
        prefer: bool,
    }
}
