//! The `preload` backend: inside the process from its start (`LD_PRELOAD`), for users without privileges.
//!
//! [`launch`] starts a program with the shim (`shim/`), a small library that is part of this crate. The
//! shim has each thread enter the agent from a signal handler, and from there on the process is a target like any other.
//!
//! ```text
//! dump:     freeze (signal, meet) -> frozen (run batches) -> hang up: each process goes on by itself
//! restore:  skeleton (exec under the shim, real ids) -> batches -> release (commit, hang up)
//! ```
//!
//! No ptrace, no `process_vm_*`, no `kcmp`, no `pidfd_getfd`: signals to processes of one's own, sockets, `/proc`.

#![deny(unsafe_code)]

pub mod find;
mod freeze;
mod frozen;
mod ids;
pub mod interface;
pub mod launch;
mod probe;
#[allow(dead_code)]
mod protocol;
mod release;
mod second;
mod skeleton;
mod sleeping;
#[allow(unsafe_code)]
mod sys;
// What only the shim uses of it.
#[allow(dead_code, unsafe_code)]
mod translation;
mod virtual_ids;

use ckpt_core::backend::{Backend, Capability, DumpOptions, Dumper, Frozen, Restorer, Skeleton};
use ckpt_core::resource::memory::{Eager, Filler};
use ckpt_core::{DumpError, Image, Pid, Refusal, RestoreError, inventory, resource};

inventory::submit! {
    Backend {
        name: "preload",
        summary: "is inside the process from its start (LD_PRELOAD); needs no privilege",
        capability,
        probe: probe::probe,
        launcher: Some(launch::prepare),
        dumper: Some(|| Box::new(PreloadDumper)),
        restorer: Some(|| Box::new(PreloadRestorer)),
    }
}

fn capability() -> Capability {
    Capability {
        attach: false,
        launch: true,
        restore: true,
        resources: resource::names(),
        lacks: vec![
            // A stopped process takes no signal, and to continue it would be seen by its parent.
            "stopped processes",
            // Its signal is taken and queued again, which makes the timer begin to count anew.
            "overruns of a timer whose signal is pending",
            // Without kcmp they cannot be told apart.
            "several entries of an epoll under one closed number",
            // Its agent's own descriptors may have the number that the entry is under.
            "entries of an epoll for files that only a queue has",
            "what is left of a timeout, where the kernel does not tell",
            "deleted executables",
            // Its shim cannot map the region, and says no more than that it does not come.
            "naming the limit that is in the way",
            // The way out of a skeleton lies there, and nobody is left to put back what it lies over.
            "data right below a small stack",
        ],
        privileges: Vec::new(),
    }
}

/// Freezes trees by a signal that the shim takes.
pub struct PreloadDumper;

impl Dumper for PreloadDumper {
    fn freeze(&self, root: Pid, options: &DumpOptions) -> Result<Box<dyn Frozen>, DumpError> {
        frozen::freeze(root, options)
    }
}

/// Builds trees from the programs' own executables, and releases them by hanging up.
pub struct PreloadRestorer;

impl Restorer for PreloadRestorer {
    fn check(&self, image: &Image) -> Vec<Refusal> {
        probe::check(image)
    }

    fn skeleton(&self, image: &Image) -> Result<Box<dyn Skeleton>, RestoreError> {
        Ok(Box::new(skeleton::build(image)?))
    }

    /// The shim translates.
    fn renames(&self) -> bool {
        true
    }

    fn filler(&self) -> Box<dyn Filler> {
        Box::new(Eager)
    }
}
