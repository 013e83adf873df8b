//! No damage goes unnoticed: a file cut off anywhere, or with any byte changed, is an error that says which.

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ckpt_core::StoreError;
use ckpt_core::store::ImageReader;
use ckpt_formats::header::{Header, MAGIC};
use tempfile::TempDir;

/// A small image with everything: 6 KiB of manifest, 96 KiB of pages, blobs.
fn image() -> (TempDir, PathBuf) {
    let place = tempfile::tempdir().unwrap();
    let directory = place.path().join("image");
    common::write(&directory, &common::rich_image()).unwrap();
    (place, directory)
}

/// The error of `open`, and where that has none, the error of `check`.
fn error(directory: &Path) -> Option<StoreError> {
    ckpt_formats::open(directory).err().or_else(|| ckpt_formats::check(directory).err())
}

fn expect(what: &str, directory: &Path, expected: &dyn Fn(&StoreError) -> bool) {
    let error = error(directory).unwrap_or_else(|| panic!("{what}: not noticed"));
    let message = error.to_string();
    assert!(expected(&error), "{what}: {error:?}");
    assert!(message.starts_with(directory.to_str().unwrap()) && !message.contains('\n'), "{what}: {message}");
}

fn is_torn(error: &StoreError) -> bool {
    matches!(error, StoreError::Torn { .. })
}

fn is_damaged(error: &StoreError) -> bool {
    matches!(error, StoreError::Damaged { .. })
}

fn is_not_an_image(error: &StoreError) -> bool {
    matches!(error, StoreError::NotAnImage { .. })
}

#[test]
fn a_whole_image_passes() {
    let (_place, directory) = image();
    assert!(error(&directory).is_none());
}

#[test]
fn every_truncation_is_noticed() {
    let (_place, directory) = image();
    for name in ["image.cbor", "pages.bin", "blob-0"] {
        let path = directory.join(name);
        let whole = fs::read(&path).unwrap();
        // Every length of what is decoded, and a share of what is only content.
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        let step = if name == "image.cbor" { 1 } else { 4093 };
        for length in (0..whole.len()).rev().step_by(step) {
            file.set_len(length as u64).unwrap();
            expect(&format!("{name} cut to {length} of {}", whole.len()), &directory, &is_torn);
        }
        fs::write(&path, &whole).unwrap();
    }
}

#[test]
fn every_changed_byte_is_noticed() {
    let (_place, directory) = image();
    let mut random = common::Random(3);
    for name in ["image.cbor", "pages.bin", "blob-0"] {
        let path = directory.join(name);
        let whole = fs::read(&path).unwrap();
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        let step = if name == "image.cbor" { 1 } else { 97 };
        for place in (0..whole.len()).step_by(step) {
            let change = whole[place] ^ (1 + random.below(255) as u8);
            file.write_all_at(&[change], place as u64).unwrap();
            let magic = name == "image.cbor" && place < MAGIC.len();
            let expected = if magic { is_not_an_image } else { is_damaged };
            expect(&format!("{name} changed at {place}"), &directory, &expected);
            file.write_all_at(&whole[place..=place], place as u64).unwrap();
        }
    }
}

#[test]
fn anything_after_the_end_is_noticed() {
    let (_place, directory) = image();
    for name in ["image.cbor", "pages.bin", "blob-1"] {
        let path = directory.join(name);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
        expect(&format!("{name} with a byte more"), &directory, &is_damaged);
        fs::write(&path, &whole).unwrap();
    }
}

#[test]
fn missing_files_are_named() {
    for (name, expected) in
        [("image.cbor", &is_not_an_image as &dyn Fn(&_) -> bool), ("pages.bin", &is_torn), ("blob-1", &is_torn)]
    {
        let (_place, directory) = image();
        fs::remove_file(directory.join(name)).unwrap();
        expect(&format!("without {name}"), &directory, expected);
        assert!(error(&directory).unwrap().to_string().contains(name));
    }
}

/// A hostile image may hold anything instead of a file: opening a FIFO would wait for ever.
#[test]
fn only_regular_files_are_opened() {
    for name in ["image.cbor", "pages.bin", "blob-0"] {
        for replace in [
            &|path: &Path| nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap(),
            &|path: &Path| std::os::unix::fs::symlink("/dev/zero", path).unwrap(),
            &|path: &Path| fs::create_dir(path).unwrap(),
        ] as [&dyn Fn(&Path); 3]
        {
            let (_place, directory) = image();
            let path = directory.join(name);
            fs::remove_file(&path).unwrap();
            replace(&path);
            expect(&format!("{name} replaced"), &directory, &is_damaged);
        }
    }
}

#[test]
fn three_different_errors() {
    let (place, directory) = image();
    let path = directory.join("image.cbor");
    let whole = fs::read(&path).unwrap();

    let newer = Header { version: 2, checksum: 0, length: 10 };
    fs::write(&path, newer.encode()).unwrap();
    expect("a newer version", &directory, &|error| {
        matches!(error, StoreError::NewerVersion { found: 2, newest: 1, .. })
    });

    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    expect("half a file", &directory, &is_torn);

    fs::write(&path, b"#!/bin/sh\n").unwrap();
    expect("a script", &directory, &is_not_an_image);

    expect("a directory of other things", place.path(), &is_not_an_image);
    expect("a file", &path, &is_not_an_image);
    let nowhere = place.path().join("nowhere");
    expect("nothing", &nowhere, &|error| matches!(error, StoreError::Io { .. }));
}

/// The message leads to the page, and whose it was.
#[test]
fn a_damaged_page_is_named() {
    let (_place, directory) = image();
    let reader = ckpt_formats::open(&directory).unwrap();
    let (index, address) = first_page(&*reader);
    let number = reader.find_page(index, address).unwrap();
    let pid = reader.image().processes[index].task.pid;
    drop(reader);
    let path = directory.join("pages.bin");
    let mut content = fs::read(&path).unwrap();
    content[number as usize * 4096 + 123] ^= 1;
    fs::write(&path, content).unwrap();
    let message = ckpt_formats::check(&directory).unwrap_err().to_string();
    assert!(message.contains(&format!("page {number}, ")), "{message}");
    assert!(message.contains(&format!("of process {pid}, does not match")), "{message}");
}

fn first_page(reader: &dyn ImageReader) -> (usize, u64) {
    let processes = reader.image().processes.iter().enumerate();
    let mut runs = processes.flat_map(|(index, process)| {
        process.memory.mappings.iter().flat_map(move |mapping| mapping.pages.iter().map(move |run| (index, run.start)))
    });
    runs.next().expect("the image has a page of a process")
}
