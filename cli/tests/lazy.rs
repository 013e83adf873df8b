//! `--backend userfault restore`: what a user sees of a restore whose memory follows.

mod common;

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use ckpt_core::Pid;
use ckpt_core::procfs::ProcDir;
use common::*;

/// The names in a directory that are numbers.
fn numbers_in(directory: &Path) -> Vec<i32> {
    names(directory).iter().filter_map(|name| name.parse().ok()).collect()
}

/// 16 MiB of memory that a program checks whenever it is told to, and says so.
const PROGRAM: &str = r#"
import os, time
memory = bytearray(16 << 20)
for at in range(0, len(memory), 4096):
    memory[at:at + 8] = at.to_bytes(8, "little")
open("ready", "w").close()
turn = 0
while True:
    turn += 1
    while not os.path.exists("check-%d" % turn):
        open("beat", "w").close()
        time.sleep(0.002)
    good = all(int.from_bytes(memory[at:at + 8], "little") == at for at in range(0, len(memory), 4096))
    open("checked-%d" % turn, "w").write("good" if good else "bad")
"#;

fn dumped(workshop: &Workshop) -> Pid {
    dumped_in(workshop, |command| command)
}

/// The same, where something is done to each command before it runs.
fn dumped_in(workshop: &Workshop, container: fn(&mut Command) -> &mut Command) -> Pid {
    let mut command = Command::new("/usr/bin/python3");
    command.arg("-c").arg(PROGRAM).current_dir(workshop.path()).stdin(Stdio::null());
    container(command.stdout(Stdio::null()).stderr(Stdio::null()));
    let mut program = Companion::start(command);
    wait_until("the program is ready", || workshop.path().join("ready").exists());
    run(container(&mut dump(program.pid(), &workshop.image(), &[]))).assert_done();
    let pid = program.pid();
    assert!(!end_of(&mut program.0).success(), "it was killed");
    pid
}

fn restore(workshop: &Workshop, more: &[&str]) -> Command {
    let mut command = ckpt(["--backend", "userfault", "restore", "-D"]);
    command.arg(workshop.image()).args(more).current_dir(workshop.path());
    command
}

/// Whether memory of a process is registered with a userfaultfd.
fn misses_memory(pid: Pid) -> bool {
    let smaps = ProcDir::open(pid).and_then(|proc| proc.read("smaps")).unwrap_or_default();
    let all = ckpt_core::procfs::Mapping::parse_all(&smaps).unwrap_or_default();
    all.iter().any(|mapping| mapping.has("um"))
}

fn check(workshop: &Workshop, turn: usize) {
    fs::write(workshop.path().join(format!("check-{turn}")), "").unwrap();
    let answer = workshop.path().join(format!("checked-{turn}"));
    wait_until("the program has checked", || fs::read_to_string(&answer).is_ok_and(|text| !text.is_empty()));
    assert_eq!(fs::read_to_string(&answer).unwrap(), "good");
}

#[test]
fn figures_come_when_all_memory_is_there() {
    let workshop = Workshop::new();
    let pid = dumped(&workshop);
    let outcome = run(&mut restore(&workshop, &["-d", "--json"]));
    outcome.assert_done();
    let figures: serde_json::Value = serde_json::from_str(&outcome.out).unwrap();
    let number =
        |path: &str| figures.pointer(path).and_then(serde_json::Value::as_f64).unwrap_or_else(|| panic!("{path}"));
    assert!(number("/pages/sweep") + number("/pages/fault") + number("/pages/around") >= 4096.0, "{figures}");
    assert!(number("/release_us") > 0.0 && number("/complete_us") > number("/release_us"), "{figures}");
    assert!(!misses_memory(pid), "nothing of it is left to be seen");
    let fds = numbers_in(Path::new(&format!("/proc/{pid}/fd")));
    assert!(fds.iter().all(|&fd| fd <= 2), "{fds:?}");
    check(&workshop, 1);
    kill(pid, libc::SIGKILL);
}

/// Has a command's userfaultfd(2) fail with EPERM, as the filters of containers do.
fn without_userfaultfd(command: &mut Command) -> &mut Command {
    let filter = |code: u32, k: u32, jump_true: u8| libc::sock_filter { code: code as u16, jt: jump_true, jf: 0, k };
    let program = [
        // The number of the call; of this architecture is what runs here.
        filter(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        filter(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, libc::SYS_userfaultfd as u32, 1),
        filter(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0),
        filter(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32, 0),
    ];
    // SAFETY: prctl with a filter that lives through the call.
    unsafe {
        command.pre_exec(move || {
            let program = libc::sock_fprog { len: 4, filter: program.as_ptr().cast_mut() };
            match libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        })
    }
}

#[test]
fn where_the_system_call_is_forbidden_the_device_is_used() {
    let workshop = Workshop::new();
    let pid = dumped_in(&workshop, without_userfaultfd);
    let features = |command: &mut Command| {
        let outcome = run(command);
        outcome.assert_done();
        let all: serde_json::Value = serde_json::from_str(&outcome.out).unwrap();
        all[0]["probe"].clone()
    };
    let here = features(&mut ckpt(["--backend", "userfault", "backends", "--json"]));
    assert_eq!(here["features"]["userfaultfd(2)"], true, "{here}");
    let forbidden = features(without_userfaultfd(&mut ckpt(["--backend", "userfault", "backends", "--json"])));
    assert_eq!(forbidden["features"]["userfaultfd(2)"], false, "{forbidden}");
    assert_eq!(forbidden["instead"]["userfaultfd(2)"], "/dev/userfaultfd is used", "{forbidden}");
    assert_eq!(forbidden["restore"], serde_json::json!({ "available": true }), "{forbidden}");
    let said = run(without_userfaultfd(&mut ckpt(["--backend", "userfault", "check"])));
    assert!(said.out.contains("has no   userfaultfd(2): /dev/userfaultfd is used"), "{said:#?}");

    run(without_userfaultfd(&mut restore(&workshop, &["-d", "--no-sweep"]))).assert_done();
    assert!(misses_memory(pid), "it follows");
    check(&workshop, 1);
    kill(pid, libc::SIGKILL);
}

#[test]
fn where_neither_is_there_all_memory_comes_before_the_release_and_that_is_said() {
    let workshop = Workshop::new();
    let pid = dumped_in(&workshop, without_userfaultfd);
    // In a file system namespace of its own, where the device cannot be opened.
    let mut command = restore(&workshop, &["-d", "--json"]);
    let device = std::ffi::CString::new("/dev/userfaultfd").unwrap();
    let elsewhere = std::ffi::CString::new("/dev/null").unwrap();
    // SAFETY: plain system calls, with strings that live through them.
    unsafe {
        command.pre_exec(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
            let nothing = std::ptr::null();
            let private = libc::mount(nothing, c"/".as_ptr(), nothing, libc::MS_REC | libc::MS_PRIVATE, nothing.cast());
            match private | libc::mount(elsewhere.as_ptr(), device.as_ptr(), nothing, libc::MS_BIND, nothing.cast()) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    let outcome = run(without_userfaultfd(&mut command));
    outcome.assert_done();
    let said = "all memory is brought in before the release: userfaultfd is not permitted";
    assert!(outcome.errors.iter().any(|line| line.contains(said)), "{outcome:#?}");
    assert!(!misses_memory(pid));
    let figures: serde_json::Value = serde_json::from_str(&outcome.out).unwrap();
    assert!(figures["pages"]["eager"].as_f64().unwrap() >= 4096.0, "{figures}");
    assert_eq!(figures["faults"], 0, "{figures}");
    check(&workshop, 1);
    kill(pid, libc::SIGKILL);
}

#[test]
fn a_tree_whose_memory_is_still_missing_is_not_dumped() {
    let workshop = Workshop::new();
    let pid = dumped(&workshop);
    run(&mut restore(&workshop, &["-d", "--no-sweep"])).assert_done();
    assert!(misses_memory(pid));
    let again = workshop.path().join("again");
    let outcome = run(&mut dump(pid, &again, &[]));
    assert_eq!(outcome.code(), Some(REFUSED), "{outcome:#?}");
    assert!(outcome.errors[0].contains("until all of its memory is there"), "{outcome:#?}");
    check(&workshop, 1);
    kill(pid, libc::SIGKILL);
}

#[test]
fn a_lost_pager_is_reported_and_ends_the_tree() {
    let workshop = Workshop::new();
    let pid = dumped(&workshop);
    // The file stays as it was: it may have been open at the dump.
    let beat = || fs::metadata(workshop.path().join("beat")).and_then(|found| found.modified()).ok();
    let before = beat();
    let running = start(&mut restore(&workshop, &["--no-sweep"]));
    wait_until("it runs", || beat() != before);
    assert!(misses_memory(pid));
    let command = running.child.id();
    let is_pager = |pid: &Pid| {
        let stat = ProcDir::open(*pid).and_then(|proc| proc.stat_line());
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        stat.is_ok_and(|stat| stat.ppid.0 as u32 == command) && name.trim_end() == "ckpt-pager"
    };
    let pagers: Vec<Pid> = numbers_in(Path::new("/proc")).into_iter().map(Pid).filter(is_pager).collect();
    assert_eq!(pagers.len(), 1, "the pager is a child of the command");
    kill(pagers[0], libc::SIGKILL);
    let outcome = running.wait();
    assert_eq!(outcome.signal(), Some(libc::SIGKILL), "{outcome:#?}");
    assert!(outcome.errors.iter().any(|line| line.contains("before all memory was restored")), "{outcome:#?}");
}

#[test]
fn a_recorded_working_set_saves_the_faults_of_the_next_time() {
    let workshop = Workshop::new();
    let pid = dumped(&workshop);
    let restored = |more: &[&str], turn: usize, before_the_end: &dyn Fn()| -> serde_json::Value {
        let running = start(&mut restore(&workshop, &[&["-d", "--json", "--pidfile", "pid"], more].concat()));
        wait_until("it is back", || workshop.path().join("pid").exists());
        fs::remove_file(workshop.path().join("pid")).unwrap();
        let _ = fs::remove_file(workshop.path().join(format!("checked-{turn}")));
        check(&workshop, turn);
        fs::remove_file(workshop.path().join(format!("check-{turn}"))).unwrap();
        before_the_end();
        // The figures come when the memory is there, or nobody is left who could want it.
        kill(pid, libc::SIGKILL);
        let outcome = running.wait();
        outcome.assert_done();
        wait_until("it is gone", || {
            ProcDir::open(pid).and_then(|proc| proc.stat_line()).is_ok_and(|it| it.state == 'Z')
                || ProcDir::open(pid).is_err()
        });
        serde_json::from_str(&outcome.out).unwrap()
    };
    let number = |figures: &serde_json::Value, path: &str| figures.pointer(path).unwrap().as_f64().unwrap();

    let plain = restored(&["--no-sweep"], 1, &|| {});
    assert!(number(&plain, "/faults") > 4096.0, "{plain}");
    // What the dump has guessed is a few pages, and each is one that is wanted.
    assert_eq!(plain["working_set_guessed"], true, "{plain}");
    let none = restored(&["--no-sweep", "--ignore-working-set"], 1, &|| {});
    let (guessed, saved) = (number(&plain, "/pages/working_set"), number(&none, "/faults") - number(&plain, "/faults"));
    assert!(guessed > 0.0 && guessed < 1000.0 && saved > 0.0, "{plain} {none}");
    let recorded = restored(&["--record-working-set"], 1, &|| {
        run(ckpt(["working-set", "stop", "-D"]).arg(workshop.image())).assert_done();
    });
    assert!(number(&recorded, "/recorded/pages") > 4096.0, "{recorded}");
    let used = restored(&["--no-sweep"], 1, &|| {});
    assert!(number(&used, "/pages/working_set") > 4096.0, "{used}");
    assert!(number(&used, "/faults") * 20.0 < number(&plain, "/faults"), "95 % fewer: {used}");
    let ignored = restored(&["--no-sweep", "--ignore-working-set"], 1, &|| {});
    assert_eq!(number(&ignored, "/pages/working_set"), 0.0, "{ignored}");
    // A new recording, which ends by itself, is compared with the one before.
    let again = restored(&["--record-working-set=1"], 1, &|| {
        wait_until("the recording is over", || !workshop.image().join("working-set.recording").exists());
    });
    let before = |what: &str| number(&again, &format!("/recorded/before/{what}"));
    assert_eq!(before("pages"), number(&recorded, "/recorded/pages"), "{again}");
    assert_eq!(before("pages"), before("hits") + before("wasted"), "{again}");
    let rate = 100.0 * before("hits") / number(&again, "/recorded/pages");
    assert!(rate > 90.0 && (before("hit_rate") - rate).abs() < 0.01, "the same work: {again}");

    // A damaged one is a hint that is not taken.
    let file = workshop.image().join("working-set");
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&file, bytes).unwrap();
    let damaged = restored(&["--no-sweep"], 1, &|| {});
    assert!(number(&damaged, "/pages/working_set") < 1000.0, "{damaged}");
    assert!(damaged["working_set_trouble"].as_str().unwrap().contains("not used"), "{damaged}");

    let nothing = run(ckpt(["working-set", "stop", "-D"]).arg(workshop.image()));
    nothing.assert_error(FAILED, &["no recording"]);
}

#[test]
fn its_options_are_of_no_use_to_others() {
    let workshop = Workshop::new();
    for options in [&["--on-pager-loss", "stop"][..], &["-d", "--json"], &["--record-working-set"]] {
        let mut command = ckpt(["restore", "-D"]);
        let outcome = run(command.arg(workshop.path()).args(options));
        outcome.assert_error(BAD_USAGE, &["--backend userfault"]);
    }
}

/// Shared memory that only mappings lead to follows like private memory; what a descriptor leads to is there before.
#[test]
fn shared_memory_follows_too() {
    const SHARED: &str = r#"
import mmap, os, time
shared = mmap.mmap(-1, 16 << 20)
file = os.memfd_create("reachable")
os.ftruncate(file, 16 << 20)
reachable = mmap.mmap(file, 16 << 20)
for memory in shared, reachable:
    for at in range(0, len(memory), 4096):
        memory[at:at + 8] = at.to_bytes(8, "little")
open("ready", "w").close()
while not os.path.exists("check-1"):
    open("beat", "w").close()
    time.sleep(0.002)
good = all(int.from_bytes(os.pread(file, 8, at), "little") == at for at in range(0, 16 << 20, 4096))
good = good and all(int.from_bytes(shared[at:at + 8], "little") == at for at in range(0, len(shared), 4096))
open("checked-1", "w").write("good" if good else "bad")
"#;
    let workshop = Workshop::new();
    let mut program = Companion::python(SHARED, workshop.path());
    wait_until("the program is ready", || workshop.path().join("ready").exists());
    let pid = program.pid();
    run(&mut dump(pid, &workshop.image(), &[])).assert_done();
    end_of(&mut program.0);
    let beat = || fs::metadata(workshop.path().join("beat")).and_then(|found| found.modified()).ok();
    let before = beat();
    let running = start(&mut restore(&workshop, &["--no-sweep"]));
    wait_until("it runs", || beat() != before);
    let smaps = ProcDir::open(pid).and_then(|proc| proc.read("smaps")).unwrap();
    let all = ckpt_core::procfs::Mapping::parse_all(&smaps).unwrap();
    let large = |name: &str| all.iter().find(|it| it.shared && it.name.to_string_lossy().contains(name)).unwrap();
    assert!(large("/dev/zero").has("um"), "it follows");
    assert!(!large("reachable").has("um"), "it was there before");
    check(&workshop, 1);
    assert_eq!(running.wait().code(), Some(0));
}
