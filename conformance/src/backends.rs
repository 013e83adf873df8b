//! The backends under test: a crate that nobody names registers nothing. One line joins.

use ckpt_core::{Backend, inventory};
use ckpt_preload as _;
use ckpt_ptrace as _;
use ckpt_userfault::{Options, UserfaultRestorer};

// Once more with no sweep and nothing filled beforehand that need not be: every page comes by a fault.
inventory::submit! {
    Backend {
        name: "userfault-by-fault",
        summary: "as userfault, but every page comes by a fault",
        capability: ckpt_userfault::capability,
        probe: ckpt_userfault::probe,
        launcher: None,
        dumper: None,
        restorer: Some(|| Box::new(UserfaultRestorer::new(Options { sweep: false, eager_pages: 0, ..Options::default() }))),
    }
}
