//! Processes that cannot be dumped, or that change while they are: one clear line, an exit code, nothing harmed.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use ckpt_core::Pid;
use ckpt_core::procfs::ProcDir;
use common::*;

#[test]
fn no_such_process() {
    let workshop = Workshop::new();
    let mut ended = Command::new("/bin/true").spawn().unwrap();
    end_of(&mut ended);
    run(&mut dump(Pid(ended.id() as i32), &workshop.image(), &[])).assert_error(FAILED, &["no process"]);
    workshop.assert_no_image();
}

#[test]
fn no_such_process_can_ever_be() {
    let workshop = Workshop::new();
    run(&mut dump(Pid(i32::MAX), &workshop.image(), &[])).assert_error(FAILED, &["no process 2147483647"]);
    workshop.assert_no_image();
}

#[test]
fn the_first_process() {
    let workshop = Workshop::new();
    run(&mut dump(Pid(1), &workshop.image(), &[])).assert_error(REFUSED, &["process 1"]);
    workshop.assert_no_image();
}

#[test]
fn ckpt_itself() {
    let workshop = Workshop::new();
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", "exec \"$0\" dump -t $$ -D \"$1\""]).arg(CKPT).arg(workshop.image());
    run(shell.env_remove("RUST_BACKTRACE")).assert_error(REFUSED, &["ckpt itself"]);
    workshop.assert_no_image();
}

#[test]
fn an_ancestor_of_ckpt() {
    let workshop = Workshop::new();
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", "(\"$0\" dump -t $$ -D \"$1\"; echo $?) >\"$2\"; echo alive"]);
    shell.arg(CKPT).arg(workshop.image()).arg(workshop.path().join("code")).env_remove("RUST_BACKTRACE");
    let outcome = run(&mut shell);
    assert_eq!(outcome.out, "alive\n", "the shell must survive: {outcome:?}");
    assert_eq!(fs::read_to_string(workshop.path().join("code")).unwrap(), "3\n");
    assert_eq!(outcome.errors.len(), 1, "{outcome:?}");
    workshop.assert_no_image();
}

#[test]
fn a_kernel_thread() {
    const PF_KTHREAD: u64 = 0x0020_0000;
    let workshop = Workshop::new();
    let proc = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    let is_kernel_thread = |pid: &i32| {
        let stat = ProcDir::open(Pid(*pid)).and_then(|proc| proc.stat_line());
        stat.is_ok_and(|stat| stat.flags & PF_KTHREAD != 0)
    };
    let thread = proc.into_iter().find(is_kernel_thread).expect("kernel threads are visible: not in a pid namespace");
    run(&mut dump(Pid(thread), &workshop.image(), &[])).assert_error(REFUSED, &["kernel thread"]);
    workshop.assert_no_image();
}

#[test]
fn a_zombie() {
    let workshop = Workshop::new();
    let mut ended = Command::new("/bin/true").spawn().unwrap();
    let pid = Pid(ended.id() as i32);
    wait_until("it is a zombie", || ProcDir::open(pid).unwrap().stat_line().unwrap().state == 'Z');
    run(&mut dump(pid, &workshop.image(), &[])).assert_error(REFUSED, &["zombie"]);
    workshop.assert_no_image();
    assert!(end_of(&mut ended).success(), "its status is still there for its parent");
}

#[test]
fn a_traced_process() {
    let workshop = Workshop::new();
    let subject = Subject::start(&workshop);
    let pid = nix::unistd::Pid::from_raw(subject.pid.0);
    nix::sys::ptrace::seize(pid, nix::sys::ptrace::Options::empty()).unwrap();
    let outcome = run(&mut dump(subject.pid, &workshop.image(), &["--leave-running"]));
    let tracer = ProcDir::open(subject.pid).unwrap().status().unwrap().field("TracerPid").unwrap().to_string();
    // Only a stopped process can be let go.
    nix::sys::ptrace::interrupt(pid).unwrap();
    nix::sys::wait::waitpid(pid, None).unwrap();
    nix::sys::ptrace::detach(pid, None).unwrap();
    outcome.assert_error(REFUSED, &["traced", &nix::unistd::gettid().to_string()]);
    assert_ne!(tracer, "0", "its tracer has lost it");
    workshop.assert_no_image();
    subject.assert_unharmed();
}

#[test]
fn no_privilege_names_the_capability() {
    let workshop = Workshop::new();
    let subject = Subject::start(&workshop);
    // Where nobody may go: the build directory may be root's alone.
    let ckpt = workshop.path().join("ckpt");
    copy_program(CKPT, &ckpt);
    fs::set_permissions(workshop.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let images = workshop.image().parent().unwrap().to_path_buf();
    fs::set_permissions(&images, fs::Permissions::from_mode(0o777)).unwrap();
    let mut command = Command::new(&ckpt);
    command.args(["dump", "-t"]).arg(subject.pid.to_string()).arg("-D").arg(workshop.image());
    run(command.uid(65534).gid(65534).env_remove("RUST_BACKTRACE")).assert_error(REFUSED, &["CAP_SYS_PTRACE"]);
    workshop.assert_no_image();
    subject.assert_unharmed();
}

#[test]
fn no_privilege_to_restore_names_the_capability() {
    let workshop = Workshop::new();
    let (subject, image) = dumped(&workshop);
    let ckpt = workshop.path().join("ckpt");
    copy_program(CKPT, &ckpt);
    for path in [workshop.path(), image.parent().unwrap(), &image] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    for file in names(&image) {
        fs::set_permissions(image.join(file), fs::Permissions::from_mode(0o644)).unwrap();
    }
    let mut command = Command::new(&ckpt);
    command.args(["restore", "-d", "-D"]).arg(&image).uid(65534).gid(65534).env_remove("RUST_BACKTRACE");
    run(&mut command).assert_error(REFUSED, &["CAP_CHECKPOINT_RESTORE"]);
    assert!(ProcDir::open(subject.pid).is_err(), "something of the tree runs");
}

/// Dumps a process that is never the same twice, many times; every dump ends well or in one clear line.
fn dump_restless(workshop: &Workshop, pid: Pid, rounds: usize) -> usize {
    let mut done = 0;
    for _ in 0..rounds {
        let image = workshop.image();
        let outcome = run(&mut dump(pid, &image, &["--leave-running"]));
        if outcome.code() == Some(DONE) {
            done += 1;
            fs::remove_dir_all(image).unwrap();
        } else {
            assert!(matches!(outcome.code(), Some(FAILED | REFUSED)), "{outcome:#?}");
            assert_eq!(outcome.errors.len(), 1, "{outcome:#?}");
            assert!(!outcome.errors[0].contains("a bug in ckpt"), "{outcome:#?}");
        }
        workshop.assert_no_image();
    }
    done
}

fn count(path: &std::path::Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

#[test]
fn a_target_that_forks_all_the_time() {
    let workshop = Workshop::new();
    let storm = Companion::shell("while :; do /bin/true; printf x >>count; done", workshop.path());
    let file = workshop.path().join("count");
    wait_until("it forks", || count(&file) > 3);
    let done = dump_restless(&workshop, storm.pid(), 30);
    assert!(done > 0, "not one dump of 30 was done");
    let before = count(&file);
    wait_until("it goes on", || count(&file) > before + 3);
}

#[test]
fn a_target_that_execs_all_the_time() {
    let workshop = Workshop::new();
    let script = workshop.path().join("again");
    fs::write(&script, "#!/bin/sh\nprintf x >>count\nexec ./again\n").unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let chain = Companion::shell("exec ./again", workshop.path());
    let file = workshop.path().join("count");
    wait_until("it execs", || count(&file) > 3);
    let done = dump_restless(&workshop, chain.pid(), 30);
    assert!(done > 0, "not one dump of 30 was done");
    let before = count(&file);
    wait_until("it goes on", || count(&file) > before + 3);
}

#[test]
fn a_target_that_exits_meanwhile() {
    let workshop = Workshop::new();
    for round in 0..30 {
        let mut ending = Companion::shell(&format!("sleep 0.{:03}; exit 7", round), workshop.path());
        let image = workshop.image();
        let outcome = run(&mut dump(ending.pid(), &image, &["--leave-running"]));
        if outcome.code() == Some(DONE) {
            fs::remove_dir_all(&image).unwrap();
        } else {
            assert!(matches!(outcome.code(), Some(FAILED | REFUSED)), "{outcome:#?}");
            assert_eq!(outcome.errors.len(), 1, "{outcome:#?}");
        }
        workshop.assert_no_image();
        assert_eq!(end_of(&mut ending.0).code(), Some(7), "it ended otherwise than it wanted");
    }
}

#[test]
fn two_dumps_of_one_process_at_once() {
    let workshop = Workshop::new();
    let subject = Subject::start(&workshop);
    let mut done = 0;
    for round in 0..10 {
        let images = [0, 1].map(|number| workshop.path().join(format!("image-{round}-{number}")));
        let running = images.each_ref().map(|image| {
            let started = start(&mut dump(subject.pid, image, &["--leave-running"]));
            std::thread::sleep(Duration::from_micros(300 * round));
            started
        });
        for (running, image) in running.into_iter().zip(&images) {
            let outcome = running.wait();
            match outcome.code() {
                Some(DONE) => done += 1,
                Some(FAILED | REFUSED) => {
                    assert_eq!(outcome.errors.len(), 1, "{outcome:#?}");
                    assert!(!image.exists());
                }
                _ => panic!("{outcome:#?}"),
            }
        }
    }
    assert!(done >= 10, "only {done} of 20 dumps were done");
    subject.assert_unharmed();
    subject.finish();
}
