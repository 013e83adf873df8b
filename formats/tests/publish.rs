//! An image is there whole under its name, or it is not there; and what is there already is left alone.

mod common;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use ckpt_core::StoreError;
use ckpt_core::resource::descriptors::{Descriptor, FileId};
use ckpt_core::store::{ImageWriter, PageExtent};
use tempfile::TempDir;

fn place() -> (TempDir, PathBuf) {
    let place = tempfile::tempdir().unwrap();
    let directory = place.path().join("image");
    (place, directory)
}

/// The error for a directory that an image cannot be in.
fn refused(directory: &Path, why: &str) {
    match ckpt_formats::create(directory).err() {
        Some(StoreError::Directory { path, why: found }) if found.contains(why) => assert_eq!(path, directory),
        other => panic!("expected {why:?}, found {other:?}"),
    }
}

/// Everything in a directory, hidden entries too.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn filled(directory: &Path) -> Box<dyn ImageWriter> {
    let mut writer = ckpt_formats::create(directory).unwrap();
    common::fill(&mut *writer);
    writer
}

#[test]
fn nothing_is_left_of_an_image_that_was_not_published() {
    let (place, directory) = place();
    let writer = filled(&directory);
    assert_ne!(names(place.path()), ["image"], "it has its name before it is whole");
    drop(writer);
    assert_eq!(names(place.path()), [""; 0]);

    // Nor is a directory changed that was there.
    fs::create_dir(&directory).unwrap();
    let before = fs::metadata(&directory).unwrap();
    drop(filled(&directory));
    let after = fs::metadata(&directory).unwrap();
    assert_eq!(names(place.path()), ["image"]);
    assert_eq!(names(&directory), [""; 0]);
    assert_eq!((before.modified().unwrap(), before.mode()), (after.modified().unwrap(), after.mode()));
}

trait Mode {
    fn mode(&self) -> u32;
}
impl Mode for fs::Metadata {
    fn mode(&self) -> u32 {
        self.permissions().mode() & 0o7777
    }
}

#[test]
fn an_empty_directory_becomes_the_image_with_its_permissions() {
    let (place, directory) = place();
    fs::create_dir(&directory).unwrap();
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o750)).unwrap();
    common::write(&directory, &common::image_of(1)).unwrap();
    ckpt_formats::check(&directory).unwrap();
    assert_eq!(fs::metadata(&directory).unwrap().mode(), 0o750);
    assert_eq!(names(place.path()), ["image"]);
}

#[test]
fn a_symbolic_link_to_a_directory_is_followed() {
    let (place, directory) = place();
    fs::create_dir(&directory).unwrap();
    let link = place.path().join("link");
    symlink("image", &link).unwrap();
    common::write(&link, &common::image_of(1)).unwrap();
    ckpt_formats::check(&directory).unwrap();
    assert_eq!(names(place.path()), ["image", "link"]);
}

#[test]
fn places_where_no_image_can_be() {
    let (place, directory) = place();
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("something"), "").unwrap();
    refused(&directory, "is not empty");
    assert_eq!(names(&directory), ["something"]);
    refused(&directory.join("something"), "not a directory");
    refused(&directory.join("something").join("image"), "not a directory");
    refused(&place.path().join("no/image"), "make it first");
    refused(&place.path().join("no/.."), "does not name a directory");
    let link = place.path().join("dangling");
    symlink("no", &link).unwrap();
    refused(&link, "leads nowhere");
    refused(Path::new("/sys"), "is not empty");
    refused(Path::new("/sys/image"), "choose a place that can be written to");
    assert_eq!(names(place.path()), ["dangling", "image"]);
}

#[test]
fn the_current_directory_is_not_replaced() {
    let place = tempfile::tempdir().unwrap();
    in_a_process_of_its_own("current_directory", place.path(), |command| {
        command.current_dir(place.path());
    });
}

#[test]
#[ignore = "run by the_current_directory_is_not_replaced"]
fn current_directory() {
    refused(Path::new("."), "is the current directory");
    refused(&std::env::current_dir().unwrap(), "is the current directory");
    common::write(Path::new("image"), &common::image_of(1)).unwrap();
    ckpt_formats::check(Path::new("./image/")).unwrap();
}

#[test]
fn of_two_dumps_to_one_place_one_wins() {
    let (place, directory) = place();
    for existing in [false, true] {
        if existing {
            fs::create_dir(&directory).unwrap();
        }
        let (first, second) = (filled(&directory), filled(&directory));
        let (winner, loser) = (common::image_of(1), common::image_of(2));
        first.publish(&winner).unwrap();
        let error = second.publish(&loser).unwrap_err();
        assert!(matches!(&error, StoreError::Directory { why, .. } if why.contains("another dump")), "{error:?}");
        assert_eq!(ckpt_formats::open(&directory).unwrap().image(), &winner);
        assert_eq!(names(place.path()), ["image"]);
        fs::remove_dir_all(&directory).unwrap();
    }
}

/// A dump that is killed cannot clean up; the next one beside it does, but leaves those alone that are at work.
#[test]
fn leftovers_of_the_dead_are_removed() {
    let (place, directory) = place();
    let living = filled(&place.path().join("living"));
    let hidden = names(place.path());
    for _ in 0..3 {
        let mut dying = test_process("dies_in_the_middle", place.path());
        dying.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut dying = dying.spawn().unwrap();
        // It closes its output when it is in the middle.
        wait_for_end_of(dying.stdout.take().unwrap());
        assert_eq!(names(place.path()).len(), hidden.len() + 1);
        dying.kill().unwrap();
        dying.wait().unwrap();
    }
    // Something that is not ours is never removed.
    let strange = place.path().join(".ckpt-partial-strange");
    fs::create_dir(&strange).unwrap();
    fs::write(strange.join("diary"), "").unwrap();

    common::write(&directory, &common::image_of(1)).unwrap();
    let mut expected = hidden.clone();
    expected.extend([".ckpt-partial-strange".to_string(), "image".to_string()]);
    expected.sort();
    assert_eq!(names(place.path()), expected);
    assert_eq!(names(&strange), ["diary"]);
    living.publish(&common::image_of(2)).unwrap();
    ckpt_formats::check(&place.path().join("living")).unwrap();
}

#[test]
#[ignore = "run by leftovers_of_the_dead_are_removed"]
fn dies_in_the_middle() {
    let _writer = filled(&Path::new(&std::env::var_os("CKPT_TEST_PLACE").unwrap()).join("dead"));
    nix::unistd::close(1).unwrap();
    // Until it is killed, or the test has gone.
    wait_for_end_of(std::io::stdin());
}

fn wait_for_end_of(mut stream: impl std::io::Read) {
    let _ = std::io::copy(&mut stream, &mut std::io::sink());
}

/// A full disk is an error before the target has written anything, and leaves nothing.
#[test]
fn a_full_disk_is_an_error_that_leaves_nothing() {
    let place = tempfile::tempdir().unwrap();
    in_a_process_of_its_own("full_disk", place.path(), |command| {
        // A memory file system of 1 MiB, in a mount namespace of its own.
        let test = std::env::current_exe().unwrap();
        let script = "mount -t tmpfs -o size=1m tmpfs \"$CKPT_TEST_PLACE\" && exec \"$0\" \"$@\"";
        let mut unshare = Command::new("unshare");
        unshare.args(["--user", "--map-root-user", "--mount", "sh", "-c", script]).arg(test);
        unshare.args(command.get_args());
        unshare.env("CKPT_TEST_PLACE", place.path());
        *command = unshare;
    });
}

#[test]
#[ignore = "run by a_full_disk_is_an_error_that_leaves_nothing"]
fn full_disk() {
    let place = PathBuf::from(std::env::var_os("CKPT_TEST_PLACE").unwrap());
    refused(&place, "is a mount point");
    let is_full = |error: &StoreError| matches!(error, StoreError::Io { source, .. } if source.raw_os_error() == Some(nix::libc::ENOSPC));

    let mut writer = ckpt_formats::create(&place.join("pages")).unwrap();
    writer.reserve_pages(10).unwrap();
    let error = writer.reserve_pages(1 << 20).unwrap_err();
    assert!(is_full(&error), "{error:?}");
    drop(writer);

    let mut writer = ckpt_formats::create(&place.join("blob")).unwrap();
    let blob = tempfile::tempfile_in("/dev/shm").unwrap();
    std::os::unix::fs::FileExt::write_all_at(&blob, &vec![1; 2 << 20], 0).unwrap();
    let error = writer.blob(std::os::fd::AsFd::as_fd(&blob)).unwrap_err();
    assert!(is_full(&error), "{error:?}");
    drop(writer);

    let writer = filled(&place.join("manifest"));
    let mut image = common::image_of(1);
    image.losses = vec!["x".repeat(2 << 20)];
    let error = writer.publish(&image).unwrap_err();
    assert!(is_full(&error), "{error:?}");
    assert_eq!(names(&place), [""; 0]);
}

/// What could not be read must not be written: the dump fails, and the program goes on.
#[test]
fn a_faulty_image_is_not_written() {
    let (place, directory) = place();
    let fails = |writer: Box<dyn ImageWriter>, image: &ckpt_core::Image, expected: &str| {
        let error = writer.publish(image).unwrap_err();
        let found = matches!(&error, StoreError::Unwritable { why, .. } if why.contains(expected));
        assert!(found, "{error}");
        assert_eq!(names(place.path()), [""; 0]);
    };
    let image = common::rich_image();

    let mut wrong = image.clone();
    let file = FileId(common::BOUNDS.files);
    wrong.processes[0].descriptors.descriptors = vec![Descriptor { fd: 0, file, close_on_exec: false }];
    fails(filled(&directory), &wrong, "processes.0.descriptors.descriptors.0.file: FileId 40 of 40 files");

    let mut wrong = image.clone();
    let thread = wrong.processes[0].threads[0].clone();
    wrong.processes[0].threads.push(thread);
    fails(filled(&directory), &wrong, "twice");

    let mut writer = filled(&directory);
    writer.reserve_pages(1).unwrap();
    fails(writer, &image, "no checksum");

    let mut writer = filled(&directory);
    assert!(writer.page_checksums(PageExtent { first: 0, pages: 1 }, &[]).is_err());
    assert!(writer.page_checksums(PageExtent { first: 24, pages: 1 }, &[0]).is_err());
    assert!(writer.page_checksums(PageExtent { first: u64::MAX, pages: 1 }, &[0]).is_err());
    assert!(writer.reserve_pages(u64::MAX).is_err());
    drop(writer);
    assert_eq!(names(place.path()), [""; 0]);
}

/// This test program again, for one of its tests.
fn test_process(test: &str, place: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--ignored", "--nocapture"]).env("CKPT_TEST_PLACE", place);
    command
}

fn in_a_process_of_its_own(test: &str, place: &Path, adjust: impl FnOnce(&mut Command)) {
    let mut command = test_process(test, place);
    adjust(&mut command);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let passed = output.status.success() && text.contains("1 passed");
    assert!(passed, "{command:?}\n{text}\n{}", String::from_utf8_lossy(&output.stderr));
}
