//! The agent, and the driver's side of it.
//!
//! The agent is a small position-independent piece of code (`blob/agent.rs`) that waits in a target for a batch of
//! system calls, runs it, and answers. [`Region`] is the memory that it shares with the driver, [`Channel`] one lane of
//! it, [`frame`] builds the signal frame through which it hands the thread back, [`process`] holds what the driver can
//! do for a target from outside, and [`Copied`] is a copy of a frozen target that writes its memory while the target goes on.

#![deny(unsafe_code)]

mod channel;
mod copy;
pub mod frame;
pub mod process;
pub mod protocol;
mod region;
#[allow(unsafe_code)]
mod sys;

pub use channel::{Channel, Wait};
pub use copy::Copied;
pub use region::{LaneKind, Region};

/// The agent's code, with its entry at the first byte.
pub const BLOB: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/agent.bin"));
