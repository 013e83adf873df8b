//! Processes, threads and zombies.

use crate::v1::{
    attributes, cgroups, credentials, descriptors, filesystem, limits, memory, registers, scheduling, signals, timers,
};
use crate::wire::{Bytes, wire_struct};

wire_struct! {
    pub struct TaskV1 for ckpt_core::image::Task {
        pid: i32,
        ppid: i32,
        pgid: i32,
        sid: i32,
        exit_signal: i32,
        comm: Bytes,
    }
}

wire_struct! {
    pub struct ZombieV1 for ckpt_core::image::Zombie {
        task: TaskV1,
        status: i32,
    }
}

wire_struct! {
    pub struct ProcessV1 for ckpt_core::image::Process {
        task: TaskV1,
        stopped: bool,
        memory: memory::MemoryV1,
        descriptors: descriptors::TableV1,
        filesystem: filesystem::FilesystemV1,
        signals: signals::ProcessV1,
        timers: timers::TimersV1,
        limits: limits::LimitsV1,
        attributes: attributes::ProcessV1,
        cgroups: cgroups::CgroupsV1,
        threads: Vec<ThreadV1>,
    }
}

wire_struct! {
    pub struct ThreadV1 for ckpt_core::image::Thread {
        tid: i32,
        context: registers::ContextV1,
        signals: signals::ThreadV1,
        credentials: credentials::CredentialsV1,
        scheduling: scheduling::SchedulingV1,
        attributes: attributes::ThreadV1,
    }
}
