//! Settings of a process and of a thread.

use crate::wire::{Bytes, wire_struct};

wire_struct! {
    pub struct ProcessV1 for ckpt_core::resource::attributes::Process {
        dumpable: u32,
        child_subreaper: bool,
        core_dump_filter: u64,
        oom_score_adj: i32,
        huge_pages_disabled: u32,
        memory_merge: bool,
        deny_write_execute: u32,
        cpu_features: u64,
        seccomp_filters: u32,
    }
}

wire_struct! {
    pub struct ThreadV1 for ckpt_core::resource::attributes::Thread {
        name: Bytes,
        personality: u32,
        parent_death_signal: i32,
        clear_child_tid: u64,
        robust_list: u64,
        machine_check_kill: Option<u32>,
        time_stamp_counter: bool,
        cpuid: bool,
        io_flusher: bool,
        speculation: [Option<u32>; 3],
    }
}
