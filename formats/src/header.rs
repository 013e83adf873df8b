//! The fixed header that stands before any CBOR.
//!
//! | bytes | content, integers little endian |
//! |---|---|
//! | 0..8 | magic |
//! | 8..12 | format version |
//! | 12..16 | CRC-32C of the manifest |
//! | 16..24 | length of the manifest in bytes |
//! | 24..28 | zero |
//! | 28..32 | CRC-32C of bytes 0..28 |
//!
//! This layout is the same in every version, so that any ckpt can tell a newer version from damage.

use crate::decode::DecodeError;

pub const LENGTH: usize = 32;

/// As PNG's: a high bit and line ends, so that a transfer that mangles either is noticed at once.
pub const MAGIC: [u8; 8] = *b"\x89CKPT\r\n\x1a";

/// The newest version that this ckpt reads.
pub const NEWEST: u32 = crate::v1::VERSION;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub version: u32,
    /// CRC-32C of the manifest.
    pub checksum: u32,
    /// Bytes of the manifest, which follows.
    pub length: u64,
}

impl Header {
    /// The header of a manifest.
    pub fn of(version: u32, manifest: &[u8]) -> Header {
        Header { version, checksum: crc32c::crc32c(manifest), length: manifest.len() as u64 }
    }

    pub fn encode(&self) -> [u8; LENGTH] {
        let mut bytes = [0; LENGTH];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&self.version.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.checksum.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.length.to_le_bytes());
        let checksum = crc32c::crc32c(&bytes[..28]);
        bytes[28..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads a header off the start of a file. Only the version that it says is known to be readable.
    pub fn decode(bytes: &[u8]) -> Result<Header, DecodeError> {
        let start = bytes.len().min(MAGIC.len());
        if bytes[..start] != MAGIC[..start] {
            return Err(DecodeError::NotAnImage("it does not begin like one".into()));
        }
        let Some(bytes) = bytes.first_chunk::<LENGTH>() else {
            return Err(DecodeError::Torn(format!("{} bytes of a header of {LENGTH}", bytes.len())));
        };
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        if crc32c::crc32c(&bytes[..28]) != u32_at(28) {
            return Err(DecodeError::Damaged("the header does not match its checksum".into()));
        }
        let header = Header {
            version: u32_at(8),
            checksum: u32_at(12),
            length: u64::from_le_bytes(bytes[16..24].try_into().expect("8 bytes")),
        };
        match header.version {
            0 => Err(DecodeError::Damaged("format version 0 does not exist".into())),
            version if version > NEWEST => Err(DecodeError::Newer(version)),
            _ if u32_at(24) != 0 => Err(DecodeError::Damaged("the header has something where zero must be".into())),
            _ => Ok(header),
        }
    }
}
