//! Images of format v1 stay readable: those under `testdata/v1` are opened and compared with what was in them.
//!
//! Until v1 is released, `CKPT_UPDATE=1 cargo test -p ckpt-formats` makes them anew. Afterwards they are only added to.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use ckpt_core::resource::descriptors::KIND_NAMES;
use ckpt_core::store::PageExtent;
use ckpt_formats::v1::ImageV1;
use ckpt_formats::wire::Wire;

fn testdata() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/v1")
}

/// What is in an image, in words: the wire structs show bytes as text.
fn dump(directory: &Path) -> String {
    let report = ckpt_formats::check(directory).unwrap();
    let reader = ckpt_formats::open(directory).unwrap();
    let checksums = reader.page_checksums(PageExtent { first: 0, pages: report.pages }).unwrap();
    format!("{report:#?}\npage checksums {checksums:08x?}\n{:#?}\n", ImageV1::from_live(reader.image()))
}

#[test]
fn golden_images_hold_what_they_held_and_every_kind_of_file() {
    let testdata = testdata();
    if std::env::var_os("CKPT_UPDATE").is_some() {
        let directory = testdata.join("everything");
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&testdata).unwrap();
        common::write(&directory, &common::rich_image()).unwrap();
        fs::write(testdata.join("everything.txt"), dump(&directory)).unwrap();
    }
    let mut opened = 0;
    for entry in fs::read_dir(&testdata).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            let expected = fs::read_to_string(path.with_extension("txt")).unwrap();
            let found = dump(&path);
            let differing = found.lines().zip(expected.lines()).find(|(found, expected)| found != expected);
            assert!(found == expected, "{}: found and expected {differing:?}", path.display());
            opened += 1;
        }
    }
    assert!(opened > 0, "no golden image in {}", testdata.display());

    let reader = ckpt_formats::open(&testdata.join("everything")).unwrap();
    for kind in &KIND_NAMES[1..] {
        let found = reader.image().files.iter().any(|file| file.kind.name() == *kind);
        assert!(found, "no {kind} in it; `CKPT_UPDATE=1 cargo test -p ckpt-formats` makes it anew");
    }
}
