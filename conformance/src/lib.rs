//! One suite for all backends: cases x dumper x restorer.
//!
//! A [`Case`](case::Case) holds a subject, a program that sets some state up, is dumped and restored, and then judges
//! itself. What is tried is generated from what the registered backends say they can do.

pub mod case;
pub mod cases;
pub mod dry;
