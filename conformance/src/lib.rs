//! One suite for all backends: cases x dumper x restorer.
//!
//! A [`Case`](case::Case) holds a subject, a program that sets some state up, is dumped and restored, and then judges
//! itself. What is tried is generated from what the registered backends say they can do ([`matrix`]); each trial runs
//! in namespaces of its own ([`isolation`]) and also compares what can be seen of the tree from outside ([`visible`]).

pub mod backends;
pub mod case;
pub mod cases;
pub mod driver;
pub mod expect;
pub mod isolation;
pub mod matrix;
pub mod ordinary;
pub mod strangers;
pub mod suite;
pub mod trial;
pub mod visible;
pub mod worker;
