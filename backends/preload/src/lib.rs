//! The `preload` backend: inside the process from its start (`LD_PRELOAD`), for users without privileges.
//!
//! It is registered so that `ckpt backends` shows where it will stand; it is not built yet, and says so.

#![deny(unsafe_code)]

use ckpt_core::{Availability, Backend, Capability, Probe, inventory};

inventory::submit! {
    Backend {
        name: "preload",
        summary: "is inside the process from its start (LD_PRELOAD); needs no privilege",
        capability,
        probe,
        dumper: None,
        restorer: None,
    }
}

/// Nothing yet: what is claimed here is what the conformance suite runs.
fn capability() -> Capability {
    Capability { attach: false, launch: false, restore: false, resources: Vec::new(), privileges: Vec::new() }
}

fn probe() -> Probe {
    let unavailable = Availability::Unavailable("not built yet; use --backend ptrace".into());
    Probe { dump: unavailable.clone(), restore: unavailable, features: Vec::new() }
}
