//! Terminals of shell jobs, and pseudoterminals.

use crate::wire::{Bytes, wire_enum, wire_struct};

wire_enum! {
    pub enum TerminalV1 for ckpt_core::resource::terminals::Terminal {
        Job(JobV1),
        Master(MasterV1),
        Slave(SlaveV1),
    }
}

wire_struct! {
    pub struct JobV1 for ckpt_core::resource::terminals::Job {
        path: Bytes,
        by_dev_tty: bool,
        settings: Option<Bytes>,
    }
}

wire_struct! {
    pub struct MasterV1 for ckpt_core::resource::terminals::Master {
        path: Bytes,
        number: u32,
        settings: Bytes,
        size: [u16; 4],
        locked: bool,
        packets: bool,
        session: i32,
        foreground: i32,
        owner: (u32, u32, u32),
    }
}

wire_struct! {
    pub struct SlaveV1 for ckpt_core::resource::terminals::Slave {
        path: Bytes,
        master: u32,
    }
}
