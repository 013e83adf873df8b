//! The core of ckpt: the model of a saved process tree, the traits that backends implement, and the order of work.
//!
//! ```text
//! dump:     task tree -> freeze -> resources (collect) -> image -> thaw or kill
//! restore:  image -> plan -> skeleton -> resources (rebuild) -> memory -> release
//! ```
//!
//! core knows no backend and makes no raw system call: what has to be asked of or done to a process is a
//! [`Batch`] that its [`Target`] runs.

#![deny(unsafe_code)]

pub mod backend;
pub mod batch;
pub mod consent;
pub mod crew;
pub mod dump;
pub mod error;
pub mod host;
pub mod image;
pub mod names;
pub mod ourselves;
pub mod plan;
pub mod procfs;
pub mod progress;
pub mod registry;
pub mod resource;
pub mod restore;
pub mod store;
mod target;

pub use backend::{Availability, Backend, Capability, Dumper, Feature, Frozen, Probe, Restorer, Skeleton};
pub use batch::{Batch, Replies};
pub use error::{DumpError, Refusal, RestoreError, StoreError};
pub use image::Image;
pub use target::*;

// For what backends need to register.
pub use inventory;
