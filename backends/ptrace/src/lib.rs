//! The ptrace backend: dumps any running process, with nothing prepared, and restores trees.
//!
//! ```text
//! dump:     freeze (stop every thread) -> entrance, tracee (get in) -> frozen (run batches) -> put back, detach
//! restore:  skeleton (clone3 with the old ids) -> batches -> release (commit, hand over, detach)
//! ```

#![deny(unsafe_code)]

mod entrance;
mod freeze;
mod frozen;
mod probe;
mod release;
mod restart;
mod skeleton;
#[allow(unsafe_code)]
mod sys;
mod timeouts;
mod tracee;

use ckpt_core::backend::{Backend, Capability, DumpOptions, Dumper, Frozen, Restorer, Skeleton};
use ckpt_core::resource::memory::{Eager, Filler};
use ckpt_core::{DumpError, Image, Pid, Refusal, RestoreError, inventory, resource};

inventory::submit! {
    Backend {
        name: "ptrace",
        summary: "attaches to any running process; nothing has to be prepared",
        capability,
        probe: probe::probe,
        launcher: None,
        dumper: Some(|| Box::new(PtraceDumper)),
        restorer: Some(|| Box::new(PtraceRestorer)),
    }
}

fn capability() -> Capability {
    Capability {
        attach: true,
        launch: false,
        restore: true,
        resources: resource::names(),
        lacks: Vec::new(),
        privileges: vec!["CAP_SYS_PTRACE", "CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE"],
    }
}

/// Freezes trees by ptrace(2).
pub struct PtraceDumper;

impl Dumper for PtraceDumper {
    fn freeze(&self, root: Pid, options: &DumpOptions) -> Result<Box<dyn Frozen>, DumpError> {
        frozen::freeze(root, options)
    }
}

/// Builds trees with `clone3(set_tid)`, and releases them by ptrace(2).
pub struct PtraceRestorer;

impl Restorer for PtraceRestorer {
    fn check(&self, image: &Image) -> Vec<Refusal> {
        probe::check(image)
    }

    fn skeleton(&self, image: &Image) -> Result<Box<dyn Skeleton>, RestoreError> {
        Ok(Box::new(skeleton::build(image)?))
    }

    fn renames(&self) -> bool {
        false
    }

    fn filler(&self) -> Box<dyn Filler> {
        Box::new(Eager)
    }
}
