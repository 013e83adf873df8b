//! What this host allows the backend now, and why not.

use ckpt_core::backend::{Availability, Feature, Probe};
use ckpt_core::image::Image;
use ckpt_core::{Pid, Refusal};

use crate::{ids, sys};

pub fn probe() -> Probe {
    let unavailable = |why: &str| Availability::Unavailable(why.into());
    let is_known = cfg!(target_arch = "x86_64");
    Probe {
        dump: if is_known { Availability::Available } else { unavailable("it is there for x86-64 only") },
        restore: match (is_known, ids::range()) {
            (false, _) => unavailable("it is there for x86-64 only"),
            (_, Err(error)) => unavailable(&format!("/proc/sys/kernel/pid_max: {error}")),
            _ => Availability::Available,
        },
        features: vec![
            Feature::new("PAGEMAP_SCAN (kernel 6.7)", ckpt_agent::process::has_pagemap_scan(), ""),
            Feature::new(
                "ids can be chosen (CAP_CHECKPOINT_RESTORE)",
                sys::may_choose_ids(),
                "they are waited for, or virtual ids are given",
            ),
        ],
    }
}

/// What of an image this backend cannot bring back here.
pub fn check(image: &Image) -> Vec<Refusal> {
    let refusal = |resource: &'static str, pid: Option<Pid>, why: String, help: &str| Refusal {
        resource,
        pid,
        subject: String::new(),
        why,
        help: help.to_string(),
    };
    let mut refusals = Vec::new();
    let missing = image.host.xsave_features & !sys::xsave_features();
    if missing != 0 {
        let why = format!("saved registers have state (xsave features {missing:#x}) that this CPU does not have");
        refusals.push(refusal("registers", None, why, "restore it on a CPU that has it"));
    }
    let outer = image.processes[0].task.pgid;
    for process in &image.processes {
        let task = &process.task;
        if !process.memory.exe.exists() {
            let why = format!("its executable {} was deleted", process.memory.exe.display());
            refusals.push(refusal("memory", Some(task.pid), why, "restore with --backend ptrace"));
        }
        if process.stopped {
            let why = "it is to be stopped, which this backend does not bring back".to_string();
            refusals.push(refusal("tasks", Some(task.pid), why, "restore with --backend ptrace"));
        }
        if task.pgid != outer && image.process(task.pgid).is_none() {
            let why = format!("the leader of its process group {} has ended", task.pgid);
            refusals.push(refusal("tasks", Some(task.pid), why, "restore with --backend ptrace"));
        }
    }
    refusals
}
