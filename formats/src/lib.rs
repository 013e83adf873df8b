//! The bytes of an image: format v1, its writer, reader and checker. SPEC.md describes it for other readers.
//!
//! ```text
//! write:  create -> pages, blobs -> Image -> v1 structs -> CBOR -> publish
//! read:   open -> header -> CBOR -> v1 structs -> bounds, validate -> Image -> pages, blobs, on demand
//! ```

#![deny(unsafe_code)]

pub mod cbor;
mod check;
mod checksum;
pub mod decode;
pub mod header;
mod partial;
mod reader;
mod sparse;
#[allow(unsafe_code)]
mod sys;
pub mod v1;
pub mod validate;
pub mod wire;
mod writer;

pub use check::{CheckReport, check};
pub use reader::{Reader, find_page, open, open_files};
pub use writer::create;
