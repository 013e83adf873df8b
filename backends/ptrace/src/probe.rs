//! What this host allows the backend now, and why not.

use ckpt_agent::frame;
use ckpt_core::backend::{Availability, Feature, Probe};
use ckpt_core::host::kernel_is_at_least;
use ckpt_core::image::Image;
use ckpt_core::procfs::ProcDir;
use ckpt_core::{Pid, Refusal};

use crate::sys;

/// Numbers of capabilities(7).
const CAP_SYS_PTRACE: u32 = 19;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_CHECKPOINT_RESTORE: u32 = 40;

/// What is missing to attach to any process.
pub const DUMP_NEEDS: &str = "attaching to processes needs CAP_SYS_PTRACE (run ckpt as root)";
/// What is missing to make processes with the ids of an image.
pub const RESTORE_NEEDS: &str = "choosing process ids needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN, and releasing \
                                 processes CAP_SYS_PTRACE (run ckpt as root)";

fn capabilities() -> u64 {
    let status = ProcDir::open(Pid(std::process::id() as i32)).and_then(|proc| proc.status());
    status.ok().and_then(|status| status.mask("CapEff")).unwrap_or(0)
}

fn has(capabilities: u64, number: u32) -> bool {
    capabilities >> number & 1 == 1
}

pub fn may_dump() -> bool {
    has(capabilities(), CAP_SYS_PTRACE)
}

pub fn may_restore() -> bool {
    let held = capabilities();
    has(held, CAP_SYS_PTRACE) && (has(held, CAP_CHECKPOINT_RESTORE) || has(held, CAP_SYS_ADMIN))
}

pub fn probe() -> Probe {
    let availability = |allowed: bool, needs: &str| {
        if !cfg!(target_arch = "x86_64") {
            Availability::Unavailable("it is there for x86-64 only".into())
        } else if allowed {
            Availability::Available
        } else {
            Availability::Unavailable(needs.into())
        }
    };
    Probe {
        dump: availability(may_dump(), DUMP_NEEDS),
        restore: availability(may_restore(), RESTORE_NEEDS),
        features: vec![
            Feature::new("PAGEMAP_SCAN (kernel 6.7)", ckpt_agent::process::has_pagemap_scan(), ""),
            Feature::new("PTRACE_GET_RSEQ_CONFIGURATION (kernel 5.13)", kernel_is_at_least(5, 13), ""),
            Feature::new("clone3(set_tid) (kernel 5.5)", kernel_is_at_least(5, 5), ""),
            Feature::new("pidfd_getfd (kernel 5.6)", kernel_is_at_least(5, 6), ""),
        ],
    }
}

/// What of an image this backend cannot bring back here.
pub fn check(image: &Image) -> Vec<Refusal> {
    let refusal = |resource: &'static str, why: String, help: &str| Refusal {
        resource,
        pid: None,
        subject: String::new(),
        why,
        help: help.to_string(),
    };
    let mut refusals = Vec::new();
    if !may_restore() {
        refusals.push(refusal("tasks", "not permitted to restore".into(), RESTORE_NEEDS));
    }
    for thread in image.processes.iter().flat_map(|process| &process.threads) {
        let size = thread.context.registers.xsave.len();
        if size < frame::SMALLEST_AREA {
            let why = format!("thread {} has {size} bytes of vector registers, which no CPU has", thread.tid);
            refusals.push(refusal("registers", why, "the image is damaged; use another copy of it"));
        }
        // The segments of 64-bit programs (`__USER_CS`, `__USER_DS`).
        let general = &thread.context.registers.general;
        if (general.cs, general.ss) != (0x33, 0x2b) {
            let why = format!("thread {} runs in segment {:#x}, not as a 64-bit program", thread.tid, general.cs);
            refusals.push(refusal("registers", why, "only 64-bit programs can be restored"));
        }
    }
    let here = sys::xsave_features();
    let missing = image.host.xsave_features & !here;
    if missing != 0 {
        let why = format!("saved registers have state (xsave features {missing:#x}) that this CPU does not have");
        refusals.push(refusal("registers", why, "restore it on a CPU that has it"));
    }
    refusals
}
