//! Terminals of shell jobs.

use crate::wire::{Bytes, wire_struct};

wire_struct! {
    pub struct TerminalV1 for ckpt_core::resource::terminals::Terminal {
        path: Bytes,
        by_dev_tty: bool,
        settings: Option<Bytes>,
    }
}
