//! `ckpt run --interval --keep --on-signal`, and `ckpt ps`: jobs that are saved while they run, and found again.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use ckpt_core::Pid;
use ckpt_core::procfs::ProcDir;
use common::*;

/// Both save what they started themselves.
const BACKENDS: [&str; 2] = ["preload", "ptrace"];
/// `nobody`.
const NOBODY: u32 = 65534;

/// Counts until there is a file `end`, and writes its own id first.
const COUNT: &str =
    "echo $$ >pid.new; mv pid.new pid; n=0; while [ ! -e end ]; do echo $n; n=$((n+1)); sleep 0.01; done";

/// `ckpt run OPTIONS -- CMD` that counts into `output`.
fn run_counting(workshop: &Workshop, backend: &str, options: &[&str]) -> Command {
    let mut command = ckpt(["--backend", backend, "run", "-o", "output"]);
    command.args(options).args(["--", "/bin/bash", "-c", COUNT]).current_dir(workshop.path());
    command
}

fn numbers(directory: &Path) -> Vec<String> {
    let output = fs::read_to_string(directory.join("output")).unwrap_or_default();
    output.lines().map(str::to_string).collect()
}

#[track_caller]
fn assert_goes_on(directory: &Path) {
    let before = numbers(directory).len();
    wait_until("it goes on", || numbers(directory).len() > before + 3);
    let found = numbers(directory);
    // The last one may be on its way.
    for (n, number) in found[..found.len() - 1].iter().enumerate() {
        assert_eq!(*number, n.to_string(), "after {:?}", &found[..n]);
    }
}

fn pid_of(workshop: &Workshop) -> Pid {
    wait_until("it runs", || workshop.path().join("pid").exists());
    Pid(fs::read_to_string(workshop.path().join("pid")).unwrap().trim().parse().unwrap())
}

fn images(directory: &Path) -> Vec<u64> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut found: Vec<u64> = entries.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok()).collect();
    found.sort_unstable();
    found
}

fn newest(directory: &Path) -> u64 {
    fs::read_link(directory.join("latest")).ok().and_then(|link| link.to_str()?.parse().ok()).unwrap_or(0)
}

/// Ends a process of a test and waits for it.
struct Ended(Pid);

impl Drop for Ended {
    fn drop(&mut self) {
        kill(self.0, libc::SIGKILL);
        wait_for(self.0, None);
    }
}

#[test]
fn a_job_is_saved_again_and_again_and_the_oldest_image_goes() {
    for backend in BACKENDS {
        let workshop = Workshop::new();
        adopt_orphans();
        let saved = workshop.path().join("saved");
        let mut command = run_counting(&workshop, backend, &["-D", "saved", "--interval", "150ms", "--keep", "3"]);
        let running = start(&mut command);
        let pid = pid_of(&workshop);
        wait_until("it is saved five times", || newest(&saved) >= 5);
        assert_goes_on(workshop.path());
        wait_until("the oldest are gone", || images(&saved).len() <= 4 && !saved.join("1").exists());
        // The end of the job ends the saving, and the last image is whole.
        fs::write(workshop.path().join("end"), "").unwrap();
        let outcome = running.wait();
        assert_eq!((outcome.code(), outcome.errors.len()), (Some(0), 1), "{backend}: {outcome:?}");
        fs::remove_file(workshop.path().join("end")).unwrap();
        let left = images(&saved);
        assert_eq!((left.len(), left.last()), (3, Some(&newest(&saved))), "{backend}: {left:?}");
        assert_eq!(names(&saved).len(), 4, "three images and the link: {:?}", names(&saved));
        run(&mut ckpt(["check", saved.join("latest").to_str().unwrap()])).assert_done();
        // It goes on from there: what it has written since is written once more.
        let mut restore = ckpt(["--backend", backend, "restore", "-d", "-D", "saved/latest"]);
        run(restore.current_dir(workshop.path())).assert_done();
        let _root = Ended(pid);
        let before = numbers(workshop.path()).len();
        wait_until("it goes on", || numbers(workshop.path()).len() > before + 3);
    }
}

#[test]
fn a_job_is_saved_and_ended_on_a_signal() {
    for backend in BACKENDS {
        let workshop = Workshop::new();
        adopt_orphans();
        let mut command = run_counting(&workshop, backend, &["-D", "saved", "--on-signal", "TERM"]);
        let running = start(&mut command);
        let pid = pid_of(&workshop);
        assert_goes_on(workshop.path());
        kill(Pid(running.child.id() as i32), libc::SIGTERM);
        let outcome = running.wait();
        assert_eq!(outcome.code(), Some(85), "{backend}: {outcome:?}");
        assert!(ProcDir::open(pid).is_err(), "{backend}: it is still there");
        let mut restore = ckpt(["--backend", backend, "restore", "-d", "-D", "saved/latest"]);
        run(restore.current_dir(workshop.path())).assert_done();
        let _root = Ended(pid);
        assert_goes_on(workshop.path());
    }
}

#[test]
fn another_signal_is_passed_on() {
    let workshop = Workshop::new();
    let mut command = run_counting(&workshop, "preload", &["-D", "saved", "--on-signal", "USR1"]);
    let running = start(&mut command);
    pid_of(&workshop);
    kill(Pid(running.child.id() as i32), libc::SIGTERM);
    assert_eq!(running.wait().signal(), Some(libc::SIGTERM));
    assert_eq!(images(&workshop.path().join("saved")), [0; 0]);
}

#[test]
fn a_save_that_fails_is_a_line_and_the_job_goes_on() {
    for backend in BACKENDS {
        let workshop = Workshop::new();
        let saved = mount(&workshop, "saved", "size=64k", nix::mount::MsFlags::empty());
        let options = &["-D", "saved", "--interval", "100ms", "--on-signal", "TERM"];
        let running = start(&mut run_counting(&workshop, backend, options));
        let pid = pid_of(&workshop);
        let ckpt = Pid(running.child.id() as i32);
        assert_goes_on(workshop.path());
        kill(ckpt, libc::SIGTERM);
        assert_goes_on(workshop.path());
        kill(pid, libc::SIGKILL);
        let outcome = running.wait();
        let left = names(&saved);
        nix::mount::umount(&saved).unwrap();
        assert_eq!(left, [""; 0], "{backend}: no half image");
        assert_eq!(outcome.signal(), Some(libc::SIGKILL), "{backend}: {outcome:?}");
        assert!(outcome.errors.len() >= 2, "{backend}: {outcome:?}");
        for line in &outcome.errors[1..] {
            for word in ["ckpt: error: ", "could not be saved, and goes on", "o space left"] {
                assert!(line.contains(word), "{backend}: {word:?} in {line}");
            }
        }
    }
}

/// At instants all over a dump of the job, and between two.
#[test]
fn a_ckpt_that_is_killed_leaves_the_job_alone() {
    for backend in BACKENDS {
        for trial in 0..6u64 {
            let workshop = Workshop::new();
            adopt_orphans();
            let saved = workshop.path().join("saved");
            let mut running = start(&mut run_counting(&workshop, backend, &["-D", "saved", "--interval", "100ms"]));
            let root = Ended(pid_of(&workshop));
            assert_goes_on(workshop.path());
            // In the first half of the trials as soon as an image is begun, and a little later each time.
            match trial {
                0..3 => {
                    wait_until("an image is begun", || fs::read_dir(&saved).is_ok_and(|mut all| all.next().is_some()))
                }
                _ => wait_until("an image is there", || newest(&saved) >= trial - 2),
            }
            for _ in 0..trial % 3 * 500 {
                std::hint::black_box(fs::metadata(&saved).unwrap());
            }
            running.child.kill().unwrap();
            end_of(&mut running.child);
            assert_goes_on(workshop.path());
            // Nothing is left in it: another saves it, and it comes back.
            let pid = root.0.to_string();
            let mut dump = ckpt(["--backend", backend, "dump", "-t", &pid, "-D", "image"]);
            run(dump.current_dir(workshop.path())).assert_done();
            let pid = root.0;
            drop(root);
            let mut restore = ckpt(["--backend", backend, "restore", "-d", "-D", "image"]);
            run(restore.current_dir(workshop.path())).assert_done();
            let _root = Ended(pid);
            assert_goes_on(workshop.path());
            if newest(&saved) > 0 {
                run(&mut ckpt(["check", saved.join("latest").to_str().unwrap()])).assert_done();
            }
        }
    }
}

#[test]
fn what_is_asked_for_wrongly_is_said() {
    let workshop = Workshop::new();
    for (options, says) in [
        (&["--interval", "30s"][..], "--dir"),
        (&["--on-signal", "TERM"], "--dir"),
        (&["-D", "saved", "-d"], "--detach"),
        (&["-D", "saved", "--interval", "30"], "unit"),
        (&["-D", "saved", "--on-signal", "KILL"], "one of"),
        (&["-D", "saved", "--interval", "1h", "--keep", "0"], "--keep"),
        (&["-D", "saved", "--interval", "1h", "-d"], "--detach"),
    ] {
        run(&mut run_counting(&workshop, "preload", options)).assert_error(BAD_USAGE, &[says]);
    }
    // With the shim, the program may say when itself.
    run(&mut run_counting(&workshop, "ptrace", &["-D", "saved"])).assert_error(BAD_USAGE, &["--interval"]);
    assert_eq!(names(workshop.path()), [""; 0], "nothing was started");
}

/// As nobody, in a copy of ckpt that nobody may run.
#[test]
fn an_ordinary_user_finds_his_jobs_and_saves_them_without_naming_the_backend() {
    let workshop = Workshop::new();
    fs::set_permissions(workshop.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let program = workshop.path().join("ckpt");
    copy_program(CKPT, &program);
    let as_nobody = |arguments: &[&str]| {
        let mut command = Command::new(&program);
        command.args(arguments).current_dir(workshop.path()).env_clear().env("PATH", "/usr/bin:/bin");
        command.stdin(std::process::Stdio::null()).uid(NOBODY).gid(NOBODY);
        command
    };
    adopt_orphans();
    let outcome =
        run(&mut as_nobody(&["--backend", "preload", "run", "-d", "-o", "output", "--", "/bin/bash", "-c", COUNT]));
    outcome.assert_done();
    let root = Ended(Pid(outcome.out.trim().parse().unwrap()));
    pid_of(&workshop);
    let find = || -> Vec<i64> {
        let outcome = run(&mut as_nobody(&["ps", "--json"]));
        outcome.assert_done();
        let all: serde_json::Value = serde_json::from_str(&outcome.out).unwrap();
        let all = all.as_array().unwrap();
        assert!(all.iter().all(|found| found["backend"] == "preload" && found["age_seconds"].as_f64().is_some()));
        let root = all.iter().find(|found| found["pid"] == root.0.0).expect("it is shown");
        assert_eq!(root["command"][0], "/bin/bash");
        all.iter().filter_map(|found| found["pid"].as_i64()).collect()
    };
    assert!(!find().contains(&i64::from(std::process::id())), "this test has no shim");
    let table = run(&mut as_nobody(&["ps"]));
    table.assert_done();
    assert!(table.out.contains(&root.0.to_string()) && table.out.contains("/bin/bash -c"), "{}", table.out);
    let pid = root.0.to_string();
    run(&mut as_nobody(&["dump", "-t", &pid, "-D", "image", "--leave-running"])).assert_done();
    assert_goes_on(workshop.path());
    // It is found after the dump as before.
    find();
}
