//! Images that are damaged, foreign, or from another machine: an error, and nothing of the tree runs.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ckpt_core::procfs::ProcDir;
use common::*;

/// An image in which one thing is wrong: `check` and `restore` both say so, and nothing runs.
#[track_caller]
fn assert_unusable(subject: &Subject, image: &Path, what: &str, codes: &[i32]) {
    let mut check = ckpt(["check"]);
    check.arg(image);
    for mut command in [check, restore(image)] {
        let outcome = run(&mut command);
        assert!(outcome.code().is_some_and(|code| codes.contains(&code)), "{what}: {outcome:#?}");
        assert_eq!(outcome.errors.len(), 1, "{what}: {outcome:#?}");
        assert!(!outcome.errors[0].contains("a bug in ckpt"), "{what}: {outcome:#?}");
        assert!(ProcDir::open(subject.pid).is_err(), "{what}: something of the tree runs");
    }
}

/// The files of an image, with their lengths; without the hint of what is touched first, which a restore can do without.
fn files(image: &Path) -> Vec<(PathBuf, u64)> {
    let files = names(image).into_iter().filter(|name| !name.starts_with("working-set")).map(|name| image.join(name));
    files.map(|path| (path.clone(), fs::metadata(path).unwrap().len())).collect()
}

#[test]
fn truncated_at_any_length() {
    let workshop = Workshop::new();
    let (subject, image) = dumped(&workshop);
    for (path, length) in files(&image) {
        for shorter in sample(length, 12) {
            // The end comes back as it was, and nothing of it stays in the file system meanwhile.
            let file = File::options().read(true).write(true).open(&path).unwrap();
            let mut end = vec![0; (length - shorter) as usize];
            file.read_exact_at(&mut end, shorter).unwrap();
            file.set_len(shorter).unwrap();
            assert_unusable(&subject, &image, &format!("{} of {shorter} bytes", path.display()), &[FAILED]);
            file.write_all_at(&end, shorter).unwrap();
        }
    }
    bring_back(subject, &image);
}

#[test]
fn with_any_byte_flipped() {
    let workshop = Workshop::new();
    let (subject, image) = dumped(&workshop);
    for (path, length) in files(&image) {
        for place in sample(length, 24) {
            let file = File::options().read(true).write(true).open(&path).unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, place).unwrap();
            file.write_all_at(&[byte[0] ^ 1 << (place % 8)], place).unwrap();
            assert_unusable(&subject, &image, &format!("{} with byte {place} flipped", path.display()), &[FAILED]);
            file.write_all_at(&byte, place).unwrap();
        }
    }
    bring_back(subject, &image);
}

/// The image is what it was, so it can be restored: the checks above did not fail for another reason.
fn bring_back(mut subject: Subject, image: &Path) {
    run(&mut restore(image)).assert_done();
    subject.adopt();
    subject.assert_unharmed();
    subject.finish();
}

#[test]
fn wrong_magic() {
    let workshop = Workshop::new();
    let (subject, image) = dumped(&workshop);
    let file = File::options().write(true).open(image.join("image.cbor")).unwrap();
    file.write_all_at(b"\x7fELF", 0).unwrap();
    assert_unusable(&subject, &image, "wrong magic", &[FAILED]);
    run(&mut restore(&image)).assert_error(FAILED, &["not a ckpt image"]);
}

#[test]
fn a_newer_version() {
    use ckpt_formats::header::{Header, LENGTH, NEWEST};
    let workshop = Workshop::new();
    let (subject, image) = dumped(&workshop);
    let file = File::options().read(true).write(true).open(image.join("image.cbor")).unwrap();
    let mut bytes = [0; LENGTH];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let mut header = Header::decode(&bytes).unwrap();
    header.version = NEWEST + 1;
    file.write_all_at(&header.encode(), 0).unwrap();
    assert_unusable(&subject, &image, "newer version", &[REFUSED]);
    run(&mut restore(&image)).assert_error(REFUSED, &["version", "newer ckpt"]);
}

#[test]
fn no_image_at_all() {
    let workshop = Workshop::new();
    let nothing = workshop.path().join("nothing");
    run(&mut restore(&nothing)).assert_error(FAILED, &["nothing", "no such file"]);
    fs::create_dir(&nothing).unwrap();
    run(&mut restore(&nothing)).assert_error(FAILED, &["not a ckpt image"]);
    fs::remove_dir(&nothing).unwrap();
    fs::write(&nothing, "text").unwrap();
    run(&mut restore(&nothing)).assert_error(FAILED, &["not a ckpt image"]);
}

/// An image like another, but from a host that has something we have not. Without its pages: a restore must not come
/// so far as to read them.
fn from_another_host(image: &Path, change: impl FnOnce(&mut ckpt_core::image::HostFacts)) -> PathBuf {
    let reader = ckpt_formats::open(image).unwrap();
    let mut changed = reader.image().clone();
    change(&mut changed.host);
    let mappings = changed.processes.iter_mut().flat_map(|process| &mut process.memory.mappings);
    mappings.for_each(|mapping| mapping.pages.clear());
    changed.memory_objects.iter_mut().for_each(|object| object.pages.clear());
    let path = image.with_file_name("changed");
    ckpt_formats::create(&path).unwrap().publish(&changed).unwrap();
    path
}

#[test]
fn a_cpu_feature_missing_here() {
    let workshop = Workshop::new();
    let (subject, image) = dumped(&workshop);
    let changed = from_another_host(&image, |host| host.cpu_features.push("avx2048".into()));
    run(&mut restore(&changed)).assert_error(REFUSED, &["avx2048"]);
    assert!(ProcDir::open(subject.pid).is_err(), "something of the tree runs");
}

#[test]
fn another_architecture() {
    let workshop = Workshop::new();
    let (subject, image) = dumped(&workshop);
    let changed = from_another_host(&image, |host| host.architecture = "riscv64".into());
    let outcome = run(&mut restore(&changed));
    assert_eq!(outcome.code(), Some(REFUSED), "{outcome:#?}");
    assert!(outcome.errors.iter().any(|line| line.contains("riscv64")), "{outcome:#?}");
    assert!(ProcDir::open(subject.pid).is_err(), "something of the tree runs");
}
