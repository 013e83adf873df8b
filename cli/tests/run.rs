//! `ckpt run`: what the command gets, and what ckpt does while it waits.

mod common;

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use ckpt_core::Pid;
use ckpt_core::procfs::ProcDir;
use common::*;

/// `ckpt -q run OPTIONS -- /bin/sh -c SCRIPT` in a directory.
fn run_script(directory: &Path, options: &[&str], script: &str) -> Command {
    let mut command = ckpt(["-q", "run"]);
    command.args(options).args(["--", "/bin/sh", "-c", script]).current_dir(directory);
    command
}

#[test]
fn it_ends_with_the_status_of_the_command() {
    let workshop = Workshop::new();
    for code in [0, 1, 3, 7, 255] {
        assert_eq!(run(&mut run_script(workshop.path(), &[], &format!("exit {code}"))).code(), Some(code));
    }
    for signal in [libc::SIGTERM, libc::SIGKILL, libc::SIGINT] {
        let outcome = run(&mut run_script(workshop.path(), &[], &format!("kill -{signal} $$")));
        assert_eq!(outcome.signal(), Some(signal), "{outcome:?}");
    }
}

#[test]
fn a_command_that_cannot_be_started() {
    let workshop = Workshop::new();
    let outcome = run(ckpt(["run", "--pidfile", "pid", "--", "no-such-command"]).current_dir(workshop.path()));
    outcome.assert_error(FAILED, &["no-such-command", "no such file"]);
    assert_eq!(names(workshop.path()), Vec::<String>::new());
}

#[test]
fn the_command_has_a_session_of_its_own_and_nothing_of_ours() {
    let workshop = Workshop::new();
    let script = "ls -l /proc/$$/fd >fds; read line </proc/self/stat; echo $$ $(cut -d' ' -f6,7 /proc/$$/stat) >session; \
                  while read line; do echo \"$line\"; done </proc/$$/status >signals";
    // A descriptor that is not close-on-exec, as shells leave them behind.
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "exec 9</etc/passwd; exec \"$@\"", "sh", CKPT, "-q", "run", "--", "/bin/sh", "-c", script]);
    run(command.current_dir(workshop.path()).stdin(Stdio::null())).assert_done();
    let read = |name: &str| fs::read_to_string(workshop.path().join(name)).unwrap();
    assert!(!read("fds").contains("/etc/passwd"), "{}", read("fds"));
    let session: Vec<String> = read("session").split_whitespace().map(str::to_string).collect();
    assert_eq!(session[0], session[1], "it leads its session");
    assert_eq!(session[2], "0", "it has no terminal");
    let mask = |name: &str| {
        let signals = read("signals");
        let line = signals.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
        u64::from_str_radix(line.trim(), 16).unwrap()
    };
    assert_eq!(mask("SigBlk"), 0, "no signal is blocked");
    assert_eq!(mask("SigIgn") >> (libc::SIGPIPE - 1) & 1, 0, "SIGPIPE is not ignored, as it is in ckpt");
}

#[test]
fn what_goes_to_a_pipe_goes_through_a_file_and_is_shown() {
    let workshop = Workshop::new();
    let mut command = run_script(workshop.path(), &[], "echo one; readlink /proc/self/fd/1; echo two >&2");
    let output = command.stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap();
    let out = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines.len(), 3, "{out}");
    assert_eq!((lines[0], lines[2]), ("one", "two"));
    assert!(lines[1].contains("ckpt-run-") && lines[1].ends_with(".log"), "{out}");
    assert_eq!(names(workshop.path()), Vec::<String>::new(), "the log is gone with the command");
}

#[test]
fn files_are_handed_on_as_they_are() {
    let workshop = Workshop::new();
    let outcome = run(&mut run_script(workshop.path(), &[], "readlink /proc/self/fd/0; echo out"));
    assert_eq!(outcome.out, "/dev/null\nout\n");
    fs::write(workshop.path().join("in"), "text").unwrap();
    let mut command = run_script(workshop.path(), &["--input", "in", "--output", "out"], "cat; echo !; echo err >&2");
    run(&mut command).assert_done();
    assert_eq!(fs::read_to_string(workshop.path().join("out")).unwrap(), "text!\nerr\n");
}

#[test]
fn signals_are_passed_on() {
    let workshop = Workshop::new();
    // Not SIGHUP: under nohup it is ignored, and a shell cannot trap what it was started to ignore.
    let script = "trap 'echo usr1 >>got' USR1; trap 'echo term >>got; exit 9' TERM; trap 'echo usr2 >>got' USR2; \
                  echo $$ >pid.new; mv pid.new pid; while :; do sleep 0.01; done";
    let running = start(&mut run_script(workshop.path(), &[], script));
    let ckpt = Pid(running.child.id() as i32);
    wait_until("it runs", || workshop.path().join("pid").exists());
    let got = || fs::read_to_string(workshop.path().join("got")).unwrap_or_default();
    kill(ckpt, libc::SIGUSR1);
    wait_until("it got SIGUSR1", || got() == "usr1\n");
    kill(ckpt, libc::SIGUSR2);
    wait_until("it got SIGUSR2", || got() == "usr1\nusr2\n");
    kill(ckpt, libc::SIGTERM);
    let outcome = running.wait();
    assert_eq!(outcome.code(), Some(9), "{outcome:?}");
    assert_eq!(got(), "usr1\nusr2\nterm\n");
}

#[test]
fn in_the_background() {
    let workshop = Workshop::new();
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    let mut command = ckpt(["run", "--detach", "--pidfile", "pid", "--", "sleep", "1000"]);
    let outcome = run(command.current_dir(workshop.path()));
    outcome.assert_done();
    let pid: i32 = outcome.out.trim().parse().unwrap();
    assert_eq!(fs::read_to_string(workshop.path().join("pid")).unwrap(), format!("{pid}\n"));
    assert!(ProcDir::open(Pid(pid)).is_ok());
    kill(Pid(pid), libc::SIGKILL);
    wait_for(Pid(pid), None);
}

#[test]
fn a_pid_file_is_never_overwritten() {
    let workshop = Workshop::new();
    fs::write(workshop.path().join("pid"), "17\n").unwrap();
    let mut command = run_script(workshop.path(), &["--pidfile", "pid"], "touch ran");
    run(&mut command).assert_error(FAILED, &["pid file", "exists"]);
    assert_eq!(names(workshop.path()), ["pid"]);
    assert_eq!(fs::read_to_string(workshop.path().join("pid")).unwrap(), "17\n");
}

/// From a terminal: the signals of its keys reach the whole group of the command, as they would without ckpt between.
#[test]
fn stop_and_continue() {
    let workshop = Workshop::new();
    // No shell that starts commands: it may do so by vfork, and one that waits in that for a child which is stopped is not
    // stopped itself (state D), but later.
    let mut command = run_script(workshop.path(), &[], "echo $$ >pid.new; mv pid.new pid; exec sleep 1000");
    // A group of its own, with a parent in the session: so that stopping is job control's, as under a shell.
    let running = start(command.process_group(0));
    let ckpt = Pid(running.child.id() as i32);
    wait_until("it runs", || workshop.path().join("pid").exists());
    let pid = Pid(fs::read_to_string(workshop.path().join("pid")).unwrap().trim().parse().unwrap());
    let state = |pid: Pid| ProcDir::open(pid).unwrap().stat_line().unwrap().state;
    kill(ckpt, libc::SIGTSTP);
    wait_until("both are stopped", || state(pid) == 'T' && state(ckpt) == 'T');
    kill(ckpt, libc::SIGCONT);
    wait_until("both go on", || state(pid) != 'T' && state(ckpt) != 'T');
    kill(ckpt, libc::SIGTERM);
    assert_eq!(running.wait().signal(), Some(libc::SIGTERM));
}
