//! Image directories that cannot be written, and descriptors of the world that changed.

mod common;

use std::fs;
use std::process::{Command, Stdio};

use common::*;
use nix::mount::MsFlags;

#[test]
fn a_full_disk() {
    let workshop = Workshop::new();
    let place = mount(&workshop, "mounted", "size=256k", MsFlags::empty());
    let subject = Subject::start(&workshop);
    run(&mut dump(subject.pid, &place.join("image"), &["--leave-running"])).assert_error(FAILED, &["no space left"]);
    assert_eq!(names(&place), Vec::<String>::new(), "left behind");
    subject.assert_unharmed();
    subject.finish();
    nix::mount::umount(&place).unwrap();
}

#[test]
fn a_read_only_disk() {
    let workshop = Workshop::new();
    let place = mount(&workshop, "mounted", "", MsFlags::MS_RDONLY);
    let subject = Subject::start(&workshop);
    run(&mut dump(subject.pid, &place.join("image"), &["--leave-running"])).assert_error(FAILED, &["read-only"]);
    subject.assert_unharmed();
    subject.finish();
    nix::mount::umount(&place).unwrap();
}

#[test]
fn a_directory_that_is_not_empty() {
    let workshop = Workshop::new();
    let subject = Subject::start(&workshop);
    let image = workshop.image();
    fs::create_dir(&image).unwrap();
    fs::write(image.join("precious"), "data").unwrap();
    run(&mut dump(subject.pid, &image, &[])).assert_error(FAILED, &["not empty"]);
    assert_eq!(names(&image), ["precious"]);
    subject.assert_unharmed();
}

#[test]
fn an_image_that_is_there_already() {
    let workshop = Workshop::new();
    let subject = Subject::start(&workshop);
    let image = workshop.image();
    run(&mut dump(subject.pid, &image, &["--leave-running"])).assert_done();
    let before = fs::read(image.join("image.cbor")).unwrap();
    run(&mut dump(subject.pid, &image, &["--leave-running"])).assert_error(FAILED, &["image"]);
    assert_eq!(fs::read(image.join("image.cbor")).unwrap(), before, "the old image is as it was");
    subject.assert_unharmed();
}

#[test]
fn a_directory_in_no_directory() {
    let workshop = Workshop::new();
    let subject = Subject::start(&workshop);
    let image = workshop.path().join("nowhere/image");
    run(&mut dump(subject.pid, &image, &[])).assert_error(FAILED, &["nowhere"]);
    subject.assert_unharmed();
}

#[test]
fn a_file_where_the_directory_shall_be() {
    let workshop = Workshop::new();
    let subject = Subject::start(&workshop);
    let image = workshop.image();
    fs::write(&image, "a file").unwrap();
    run(&mut dump(subject.pid, &image, &[])).assert_error(FAILED, &["image"]);
    assert_eq!(fs::read_to_string(&image).unwrap(), "a file");
    subject.assert_unharmed();
}

/// Dumps the subject, changes its file, and expects a refusal that names it; then puts the file back, and all is well.
fn a_file_that_is(how: &str, change: impl FnOnce(&std::path::Path), says: &[&str]) {
    let workshop = Workshop::new();
    let (mut subject, image) = dumped(&workshop);
    let file = subject.file("lines");
    let saved = workshop.path().join("saved");
    // Another name of the same file, so that it can come back as itself.
    fs::hard_link(&file, &saved).unwrap();
    let content = fs::read(&file).unwrap();
    let modified = fs::metadata(&file).unwrap().modified().unwrap();
    change(&file);
    let mut says = says.to_vec();
    says.push("lines");
    run(&mut restore(&image)).assert_error(REFUSED, &says);
    assert!(ckpt_core::procfs::ProcDir::open(subject.pid).is_err(), "{how}: something of the tree runs");
    let _ = fs::remove_file(&file);
    fs::write(&saved, content).unwrap();
    fs::File::options().write(true).open(&saved).unwrap().set_modified(modified).unwrap();
    fs::hard_link(&saved, &file).unwrap();
    run(&mut restore(&image)).assert_done();
    subject.adopt();
    subject.assert_unharmed();
    subject.finish();
}

#[test]
fn a_file_that_is_gone() {
    a_file_that_is("gone", |file| fs::remove_file(file).unwrap(), &[]);
}

#[test]
fn a_file_that_is_replaced() {
    a_file_that_is(
        "replaced",
        |file| {
            let content = fs::read(file).unwrap();
            fs::remove_file(file).unwrap();
            fs::write(file, content.iter().map(|byte| byte ^ 1).collect::<Vec<u8>>()).unwrap();
        },
        &[],
    );
}

#[test]
fn a_file_that_is_shorter() {
    a_file_that_is("shorter", |file| fs::File::options().write(true).open(file).unwrap().set_len(1).unwrap(), &[]);
}

#[test]
fn a_program_that_was_written_to() {
    let workshop = Workshop::new();
    let program = workshop.path().join("program");
    copy_program("/bin/sleep", &program);
    let mut command = Command::new(&program);
    command.arg("1000").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut sleeping = Companion::start(command);
    let image = workshop.image();
    run(&mut dump(sleeping.pid(), &image, &[])).assert_done();
    end_of(&mut sleeping.0);
    let modified = fs::metadata(&program).unwrap().modified().unwrap();
    let touch = |time| fs::File::options().write(true).open(&program).unwrap().set_modified(time).unwrap();
    touch(modified + std::time::Duration::from_nanos(1));
    run(&mut restore(&image)).assert_error(REFUSED, &["memory: process", &program.display().to_string(), "written to"]);
    touch(modified);
    run(&mut restore(&image)).assert_done();
    kill(sleeping.pid(), libc::SIGKILL);
}

#[test]
fn a_process_id_in_use() {
    let workshop = Workshop::new();
    let subject = Subject::start(&workshop);
    let image = workshop.image();
    run(&mut dump(subject.pid, &image, &["--leave-running"])).assert_done();
    let outcome = run(&mut restore(&image));
    assert_eq!(outcome.code(), Some(REFUSED), "{outcome:#?}");
    assert!(outcome.errors.iter().any(|line| line.contains(&subject.pid.to_string())), "{outcome:#?}");
    subject.assert_unharmed();
    subject.finish();
}

#[test]
fn a_port_in_use() {
    let workshop = Workshop::new();
    let program = "use IO::Socket::INET; \
                   $s = IO::Socket::INET->new(Listen => 5, LocalAddr => '127.0.0.1', LocalPort => 0) or die; \
                   open(F, '>', 'port.new'); print F $s->sockport; close(F); rename('port.new', 'port'); \
                   sleep 1000";
    let mut command = Command::new("perl");
    command.args(["-e", program]).current_dir(workshop.path());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut listener = Companion::start(command);
    let port_file = workshop.path().join("port");
    wait_until("it listens", || port_file.exists());
    let port: u16 = fs::read_to_string(port_file).unwrap().parse().unwrap();
    let image = workshop.image();
    run(&mut dump(listener.pid(), &image, &[])).assert_done();
    end_of(&mut listener.0);
    let other = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    let outcome = run(&mut restore(&image));
    assert!(matches!(outcome.code(), Some(FAILED | REFUSED)), "{outcome:#?}");
    assert!(outcome.errors.iter().any(|line| line.contains(&port.to_string())), "{outcome:#?}");
    assert!(ckpt_core::procfs::ProcDir::open(listener.pid()).is_err(), "something of the tree runs");
    drop(other);
}
