//! What is fuzzed. Each function takes any bytes, and must neither panic nor take long nor allocate much.

#![allow(dead_code)]

use std::fs;

use ckpt_formats::decode;
use ckpt_formats::header::Header;
use ckpt_formats::v1::VERSION;

/// Pages that the manifest is told the page file has.
pub const PAGES: u64 = 24;

/// The fixed header. What is taken for a good one must be encoded as it was read.
pub fn header(bytes: &[u8]) {
    if let Ok(header) = Header::decode(bytes) {
        assert_eq!(header.encode(), bytes[..32]);
    }
    // Behind the checksum, which no mutation finds the right value of.
    let mut sealed = bytes.to_vec();
    if sealed.len() >= 32 {
        let checksum = crc32c::crc32c(&sealed[..28]);
        sealed[28..32].copy_from_slice(&checksum.to_le_bytes());
        let _ = Header::decode(&sealed);
    }
}

/// The CBOR, the conversion into the model, and its validation. Returns whether it is a manifest.
pub fn manifest(bytes: &[u8]) -> bool {
    let Ok(manifest) = decode::manifest(bytes, PAGES) else { return false };
    // What is accepted can be used without a panic.
    for (index, process) in manifest.image.processes.iter().enumerate() {
        for mapping in &process.memory.mappings {
            let page = ckpt_formats::find_page(&manifest.image, index, mapping.start);
            assert!(page.is_none_or(|page| page < manifest.pages));
        }
    }
    true
}

/// A whole image directory: the bytes are a manifest, behind a header that fits, with an empty page table, or the file
/// as it is. The first byte decides.
pub fn directory(bytes: &[u8]) -> bool {
    let Some((&how, bytes)) = bytes.split_first() else { return false };
    let place = tempfile::tempdir().expect("a temporary directory");
    let mut content = Vec::new();
    if how & 1 == 0 {
        content.extend_from_slice(&Header::of(VERSION, bytes).encode());
    }
    content.extend_from_slice(bytes);
    if how & 2 == 0 {
        content.extend_from_slice(&[0; PAGES as usize * 4]);
    }
    fs::write(place.path().join("image.cbor"), content).expect("room for an image");
    let pages = fs::File::create(place.path().join("pages.bin")).expect("room for an image");
    pages.set_len(PAGES * 4096).expect("room for an image");
    for blob in ["blob-0", "blob-1"] {
        fs::write(place.path().join(blob), "").expect("room for an image");
    }
    let opened = ckpt_formats::open(place.path()).is_ok();
    let _ = ckpt_formats::check(place.path());
    opened
}
