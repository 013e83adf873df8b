//! How a thread is scheduled.

use crate::wire::wire_struct;

wire_struct! {
    pub struct SchedulingV1 for ckpt_core::resource::scheduling::Scheduling {
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        runtime: u64,
        deadline: u64,
        period: u64,
        util_min: u32,
        util_max: u32,
        affinity: Option<Vec<u64>>,
        io_priority: i32,
        timer_slack: u64,
        memory_policy: MemoryPolicyV1,
    }
}

wire_struct! {
    pub struct MemoryPolicyV1 for ckpt_core::resource::threads::MemoryPolicy { mode: u32, nodes: Vec<u64> }
}
