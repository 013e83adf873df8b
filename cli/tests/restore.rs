//! What ckpt does after a restore: as the parent of the tree, or detached; and the pid file.

mod common;

use std::fs;

use ckpt_core::Pid;
use ckpt_core::procfs::ProcDir;
use common::*;

/// Dumps a shell script, after its `first` part and in the middle of the `second`; it is gone then.
fn dumped_script(workshop: &Workshop, first: &str, second: &str) -> Pid {
    let mut shell = Companion::shell(&format!("{first}; true >ready; {second}"), workshop.path());
    wait_until("the script is ready", || workshop.path().join("ready").exists());
    run(&mut dump(shell.pid(), &workshop.image(), &[])).assert_done();
    assert!(!end_of(&mut shell.0).success(), "it was killed");
    shell.pid()
}

/// `restore -D IMAGE`, in the foreground.
fn stay(workshop: &Workshop, more: &[&str]) -> std::process::Command {
    let mut command = ckpt(["restore", "-D"]);
    command.arg(workshop.image()).args(more).current_dir(workshop.path());
    command
}

const UNTIL_TOLD: &str = "while [ ! -e go ]; do sleep 0.01; done";

#[test]
fn it_ends_with_the_status_of_the_tree() {
    for code in [0, 1, 3, 7] {
        let workshop = Workshop::new();
        let pid = dumped_script(&workshop, "true", &format!("{UNTIL_TOLD}; exit {code}"));
        let running = start(&mut stay(&workshop, &["--pidfile", "pid"]));
        wait_until("the pid file is there", || workshop.path().join("pid").exists());
        wait_until("it is back", || ProcDir::open(pid).is_ok());
        let parent = ProcDir::open(pid).unwrap().stat_line().unwrap().ppid;
        assert_eq!(parent.0 as u32, running.child.id(), "ckpt is its parent");
        fs::write(workshop.path().join("go"), "").unwrap();
        let outcome = running.wait();
        assert_eq!(outcome.code(), Some(code), "{outcome:#?}");
        assert_eq!(outcome.errors, Vec::<String>::new());
        assert_eq!(fs::read_to_string(workshop.path().join("pid")).unwrap(), format!("{pid}\n"));
    }
}

#[test]
fn it_ends_by_the_signal_that_the_tree_ended_by() {
    let workshop = Workshop::new();
    let pid = dumped_script(&workshop, "true", "while :; do printf x >>beats; sleep 0.01; done");
    let beats = || fs::metadata(workshop.path().join("beats")).map_or(0, |metadata| metadata.len());
    let before = beats();
    let running = start(&mut stay(&workshop, &[]));
    wait_until("it goes on", || beats() > before);
    kill(pid, libc::SIGKILL);
    assert_eq!(running.wait().signal(), Some(libc::SIGKILL));
}

#[test]
fn signals_are_passed_on() {
    let workshop = Workshop::new();
    let pid = dumped_script(
        &workshop,
        "trap 'echo usr1 >>got' USR1; trap 'echo term >>got; kill $!; exit 9' TERM",
        "sleep 1000 & while :; do wait $!; done",
    );
    let running = start(&mut stay(&workshop, &["--pidfile", "pid"]));
    let ckpt = Pid(running.child.id() as i32);
    wait_until("the pid file is there", || workshop.path().join("pid").exists());
    let got = || fs::read_to_string(workshop.path().join("got")).unwrap_or_default();
    kill(ckpt, libc::SIGUSR1);
    wait_until("it got SIGUSR1", || got() == "usr1\n");
    kill(ckpt, libc::SIGTERM);
    let outcome = running.wait();
    assert_eq!((outcome.code(), got().as_str()), (Some(9), "usr1\nterm\n"), "{outcome:?}");
    assert!(ProcDir::open(pid).is_err());
}

#[test]
fn a_failed_restore_leaves_no_pid_file() {
    let workshop = Workshop::new();
    fs::create_dir_all(workshop.image()).unwrap();
    run(&mut stay(&workshop, &["--pidfile", "pid"])).assert_error(FAILED, &["not a ckpt image"]);
    assert!(!workshop.path().join("pid").exists());
}

#[test]
fn an_existing_pid_file_stops_a_restore() {
    let workshop = Workshop::new();
    let pid = dumped_script(&workshop, "true", UNTIL_TOLD);
    fs::write(workshop.path().join("pid"), "17\n").unwrap();
    run(&mut stay(&workshop, &["--pidfile", "pid"])).assert_error(FAILED, &["pid file", "exists"]);
    assert!(ProcDir::open(pid).is_err(), "something of the tree runs");
    let outcome = run(&mut stay(&workshop, &["--pidfile", "nowhere/pid"]));
    outcome.assert_error(FAILED, &["pid file", "no such file"]);
    assert!(ProcDir::open(pid).is_err(), "something of the tree runs");
}

#[test]
fn after_the_dump_it_goes_on_or_is_stopped_as_wanted() {
    let workshop = Workshop::new();
    let subject = Subject::start(&workshop);
    let outcome = run(&mut dump(subject.pid, &workshop.image(), &["--leave-running"]));
    outcome.assert_done();
    assert!(outcome.out.starts_with(&format!("saved process {} (1 process, 3 threads, ", subject.pid)), "{outcome:?}");
    subject.assert_unharmed();
    let other = workshop.path().join("other-image");
    run(&mut dump(subject.pid, &other, &["--leave-stopped", "-q"])).assert_done();
    let state = || ProcDir::open(subject.pid).unwrap().stat_line().unwrap().state;
    assert_eq!(state(), 'T', "stopped as by SIGSTOP");
    kill(subject.pid, libc::SIGCONT);
    subject.assert_unharmed();
    subject.finish();
}

#[test]
fn an_image_is_shown_and_checked() {
    let workshop = Workshop::new();
    let (subject, image) = dumped(&workshop);
    let shown = run(ckpt(["show"]).arg(&image));
    shown.assert_done();
    for word in [&subject.pid.to_string(), "3 threads", "heap", "stack", "lines", "timerfd", "pipes", "/dev/null"] {
        assert!(shown.out.contains(word), "{word} in: {}", shown.out);
    }
    let json = run(ckpt(["show", "--json"]).arg(&image));
    json.assert_done();
    let json: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(json["processes"][0]["task"]["pid"], subject.pid.0);
    assert_eq!(json["processes"][0]["threads"].as_array().unwrap().len(), 3);
    run(ckpt(["check"]).arg(&image)).assert_done();
}

#[test]
fn a_process_is_examined_and_goes_on() {
    let workshop = Workshop::new();
    let subject = Subject::start(&workshop);
    let outcome = run(&mut ckpt(["check", "--pid", &subject.pid.to_string()]));
    outcome.assert_done();
    assert!(outcome.out.contains("ptrace") && outcome.out.contains("memory"), "{}", outcome.out);
    subject.assert_unharmed();
    subject.finish();
}

/// A cgroup that is removed again. Where none can be made, there is nothing that could be lost.
struct Cgroup(std::path::PathBuf);

impl Cgroup {
    fn make() -> Cgroup {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mount = mounts.lines().find(|line| line.contains(" - cgroup2 ")).expect("cgroups of version 2 are mounted");
        let path = std::path::Path::new(mount.split(' ').nth(4).unwrap());
        let path = path.join(format!("ckpt-restore-test-{}", std::process::id()));
        fs::create_dir(&path).expect("a cgroup can be made");
        Cgroup(path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn a_cgroup_that_is_gone_is_refused_and_may_be_ignored() {
    let workshop = Workshop::new();
    let cgroup = Cgroup::make();
    let join = format!("echo $$ >{}/cgroup.procs", cgroup.0.display());
    let pid = dumped_script(&workshop, &join, UNTIL_TOLD);
    fs::remove_dir(&cgroup.0).expect("nobody is in it");
    let refused = run(&mut restore(&workshop.image()));
    refused.assert_error(3, &["cgroups", "it is not there", "restore --cgroup ignore"]);
    assert!(ProcDir::open(pid).is_err(), "nothing was restored");
    let outcome = run(restore(&workshop.image()).args(["--cgroup", "ignore"]).current_dir(workshop.path()));
    outcome.assert_done();
    let said = format!("{outcome:?}");
    assert!(said.contains(&format!("lost, as allowed: process {pid} was in cgroup /ckpt-restore-test")), "{said}");
    kill(pid, libc::SIGKILL);
}
