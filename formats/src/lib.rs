//! The bytes of an image: format v1, its writer, reader and checker. SPEC.md describes it for other readers.

#![deny(unsafe_code)]

pub mod v1;
pub mod wire;
