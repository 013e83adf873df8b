//! The `userfault` backend: restores with the memory still in the image, and brings pages in when they are touched.
//!
//! It is registered so that `ckpt backends` shows where it will stand; it is not built yet, and says so.

#![deny(unsafe_code)]

use ckpt_core::{Availability, Backend, Capability, Probe, inventory};

inventory::submit! {
    Backend {
        name: "userfault",
        summary: "restores at once and brings the memory in on demand (userfaultfd)",
        capability,
        probe,
        launcher: None,
        dumper: None,
        restorer: None,
    }
}

/// Nothing yet: what is claimed here is what the conformance suite runs.
fn capability() -> Capability {
    Capability {
        attach: false,
        launch: false,
        restore: false,
        resources: Vec::new(),
        lacks: Vec::new(),
        privileges: Vec::new(),
    }
}

fn probe() -> Probe {
    let restore = Availability::Unavailable("not built yet; use --backend ptrace".into());
    let dump = Availability::Unavailable("restores only; dump with --backend ptrace".into());
    Probe { dump, restore, features: Vec::new() }
}
