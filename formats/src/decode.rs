//! From bytes to a manifest, for bytes that may be anything.
//!
//! The order: header, length, checksum, [`scan`] (the shape of the CBOR and its size), serde, [`Wire`] conversion with its
//! bounds, [`validate`](crate::validate). Nothing is allocated for what the bytes only claim to hold.

use std::fmt;
use std::path::Path;

use ckpt_core::{Image, StoreError};

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

/// CBOR within CBOR within CBOR. The model needs fewer than half.
pub const MAX_DEPTH: usize = 32;

/// Decodes the manifest of version 1, whose checksum has been checked.
pub fn manifest(bytes: &[u8], pages_in_file: u64) -> Result<Manifest, DecodeError> {
    scan(bytes, max_items(pages_in_file))?;
    let wire: ManifestV1 = ciborium::de::from_reader(bytes).map_err(damaged)?;
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

/// Checks that bytes are exactly one CBOR item of the plain kind that v1 uses: lengths known and in the shortest form,
/// no tags, no floats, nesting and number of items bounded. What passes, a CBOR library decodes in linear time and space.
pub fn scan(bytes: &[u8], max_items: u64) -> Result<(), DecodeError> {
    let at = |place: usize, what: &str| DecodeError::Damaged(format!("{what} at byte {place} of the manifest"));
    let mut place = 0;
    let mut items = 0;
    // Items that are still to come, for each level that is open.
    let mut open: Vec<u64> = Vec::with_capacity(MAX_DEPTH);
    loop {
        let start = place;
        items += 1;
        if items > max_items {
            return Err(DecodeError::Damaged(format!("more than {max_items} items in the manifest")));
        }
        let first = *bytes.get(place).ok_or_else(|| at(start, "an item is missing"))?;
        place += 1;
        let (major, minor) = (first >> 5, first & 31);
        let argument = match minor {
            0..24 => u64::from(minor),
            24..28 => {
                let width = 1 << (minor - 24);
                let mut value = [0; 8];
                let field = bytes.get(place..place + width).ok_or_else(|| at(start, "a cut-off number"))?;
                value[8 - width..].copy_from_slice(field);
                place += width;
                let value = u64::from_be_bytes(value);
                let least = [24, 1 << 8, 1 << 16, 1 << 32][usize::from(minor - 24)];
                if value < least {
                    return Err(at(start, "a number that is not in its shortest form"));
                }
                value
            }
            _ => return Err(at(start, "an item of unknown length")),
        };
        let left = (bytes.len() - place) as u64;
        match major {
            0 | 1 => {}
            2 | 3 if argument <= left => place += argument as usize,
            // Each item to come has at least one byte.
            4 if argument <= left => open.push(argument),
            5 if argument <= left / 2 => open.push(argument * 2),
            2..=5 => return Err(at(start, "a length that goes beyond the end")),
            7 if matches!(first, 0xf4..=0xf6) => {}
            _ => return Err(at(start, "an item of a kind that no image has")),
        }
        if open.len() > MAX_DEPTH {
            return Err(at(start, "too deep nesting"));
        }
        // Close what is complete.
        loop {
            match open.last_mut() {
                None if place == bytes.len() => return Ok(()),
                None => return Err(at(place, "bytes after the end")),
                Some(0) => {
                    open.pop();
                    continue;
                }
                Some(left) => {
                    *left -= 1;
                    break;
                }
            }
        }
    }
}
