//! From bytes to a manifest, for bytes that may be anything.
//!
//! The order: header, length, checksum, [`cbor`], [`Wire`] conversion with its bounds, [`validate`](crate::validate).
//! Nothing is allocated for what the bytes only claim to hold.

use std::fmt;
use std::path::Path;

use ckpt_core::{Image, StoreError};

use crate::cbor;
use crate::header::NEWEST;
use crate::v1::{BlobV1, ManifestV1};
use crate::validate::validate;
use crate::wire::{Bounds, Wire};

/// Why bytes are not a manifest; [`at`](DecodeError::at) makes it an error about a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DecodeError {
    NotAnImage(String),
    Newer(u32),
    Torn(String),
    Damaged(String),
}

impl DecodeError {
    pub fn at(self, path: &Path) -> StoreError {
        let path = path.to_path_buf();
        match self {
            DecodeError::NotAnImage(why) => StoreError::NotAnImage { path, why },
            DecodeError::Newer(found) => StoreError::NewerVersion { path, found, newest: NEWEST },
            DecodeError::Torn(why) => StoreError::Torn { path, why },
            DecodeError::Damaged(why) => StoreError::Damaged { path, why },
        }
    }
}

fn damaged(why: impl fmt::Display) -> DecodeError {
    DecodeError::Damaged(why.to_string())
}

/// A decoded manifest, checked as far as it can be without the other files.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    /// Pages in the page file.
    pub pages: u64,
    /// CRC-32C of the table of page checksums.
    pub page_checksums: u32,
    pub blobs: Vec<BlobV1>,
    pub image: Image,
}

/// The page file may not be larger than this many pages (4 PiB).
pub const MAX_PAGES: u64 = 1 << 40;

/// Bytes a manifest may have, beside a page file of this many pages. A run of pages takes at most 28 bytes of it and has
/// at least one page, so a legitimate image stays far below.
pub fn max_manifest(pages: u64) -> u64 {
    (256 << 20) + pages.min(MAX_PAGES) * 64
}

/// CBOR items a manifest may have, which bounds what its structs take in memory.
pub fn max_items(pages: u64) -> u64 {
    (16 << 20) + pages.min(MAX_PAGES) * 8
}

/// Decodes the manifest of version 1, whose checksum has been checked.
pub fn manifest(bytes: &[u8], pages_in_file: u64) -> Result<Manifest, DecodeError> {
    let wire: ManifestV1 = cbor::decode(bytes, max_items(pages_in_file)).map_err(damaged)?;
    let bounds = wire.bounds();
    if bounds.pages > MAX_PAGES {
        return Err(damaged(format!("a page file of {} pages is too large", bounds.pages)));
    }
    let image = wire.image.into_live(&bounds).map_err(damaged)?;
    validate(&image).map_err(damaged)?;
    Ok(Manifest { pages: wire.pages, page_checksums: wire.page_checksums, blobs: wire.blobs, image })
}

impl ManifestV1 {
    pub fn bounds(&self) -> Bounds {
        Bounds {
            files: self.image.files.len() as u32,
            memory_objects: self.image.memory_objects.len() as u32,
            deleted_files: self.image.deleted_files.len() as u32,
            blobs: self.blobs.len() as u32,
            pages: self.pages,
        }
    }
}
