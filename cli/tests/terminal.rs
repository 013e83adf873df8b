//! A job of one terminal, saved and brought back as a job of another: under a real shell with job control.

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use ckpt_core::Pid;
use ckpt_core::procfs::ProcDir;
use common::*;

/// A terminal with an interactive shell in it.
struct Screen {
    keyboard: File,
    shown: Arc<Mutex<String>>,
    shell: Child,
    /// How much of what was shown has been waited for.
    seen: usize,
}

nix::ioctl_write_int_bad!(set_controlling_terminal, libc::TIOCSCTTY);

impl Screen {
    fn open(directory: &Path) -> Screen {
        let pty = nix::pty::openpty(None, None).unwrap();
        let terminal = File::from(pty.slave);
        let mut command = Command::new("bash");
        command.args(["--norc", "--noprofile", "-i"]).env("PS1", "$ ").env("TERM", "dumb").env_remove("RUST_BACKTRACE");
        command.current_dir(directory).env("CKPT", CKPT);
        command.stdin(terminal.try_clone().unwrap()).stdout(terminal.try_clone().unwrap());
        command.stderr(Stdio::from(terminal));
        // SAFETY: three plain system calls.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                set_controlling_terminal(0, 0)?;
                keep_nothing()
            });
        }
        let shell = command.spawn().unwrap();
        // Or else the terminal would never be seen to close.
        drop(command);
        let keyboard = File::from(pty.master);
        let mut screen = keyboard.try_clone().unwrap();
        let shown = Arc::new(Mutex::new(String::new()));
        let into = shown.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = screen.read(&mut buffer) {
                into.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..read]));
            }
        });
        let mut screen = Screen { keyboard, shown, shell, seen: 0 };
        screen.wait_for("$ ");
        screen
    }

    fn type_in(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until something new is shown.
    #[track_caller]
    fn wait_for(&mut self, text: &str) {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        loop {
            let shown = self.shown.lock().unwrap().clone();
            if let Some(place) = shown[self.seen..].find(text) {
                self.seen += place + text.len();
                return;
            }
            assert!(std::time::Instant::now() < deadline, "{text:?} was not shown, but: {:?}", &shown[self.seen..]);
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // The shell hangs up its jobs.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.shell.id() as i32), nix::sys::signal::SIGHUP);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while matches!(self.shell.try_wait(), Ok(None)) {
            if std::time::Instant::now() > deadline {
                let _ = self.shell.kill();
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}

/// Answers every line; remembers only in its memory how many there were.
const ANSWERER: &str = r#"$| = 1; open(F, ">", "pid.new"); print F $$; close(F); rename("pid.new", "pid");
print "here\n"; while (<STDIN>) { chomp; $n++; print "answer $n to <$_>\n"; } print "bye\n"; exit(5);"#;

fn start_answerer(workshop: &Workshop) -> (Screen, Pid) {
    std::fs::write(workshop.path().join("answerer"), ANSWERER).unwrap();
    let mut screen = Screen::open(workshop.path());
    screen.type_in("perl answerer\n");
    screen.wait_for("here");
    let pid = std::fs::read_to_string(workshop.path().join("pid")).unwrap().parse().unwrap();
    screen.type_in("first\n");
    screen.wait_for("answer 1 to <first>");
    (screen, Pid(pid))
}

#[test]
fn a_job_of_a_terminal_is_refused_without_the_option() {
    let workshop = Workshop::new();
    let (mut screen, pid) = start_answerer(&workshop);
    let outcome = run(&mut dump(pid, &workshop.image(), &[]));
    assert_eq!(outcome.code(), Some(REFUSED), "{outcome:#?}");
    assert!(outcome.errors.iter().all(|line| line.contains("--shell-job")), "{outcome:#?}");
    workshop.assert_no_image();
    screen.type_in("second\n");
    screen.wait_for("answer 2 to <second>");
}

#[test]
fn a_job_goes_on_on_another_terminal_with_job_control() {
    let workshop = Workshop::new();
    let (mut old, pid) = start_answerer(&workshop);
    run(&mut dump(pid, &workshop.image(), &["--shell-job"])).assert_done();
    old.wait_for("Killed");
    old.wait_for("$ ");
    drop(old);

    let mut new = Screen::open(workshop.path());
    new.type_in("\"$CKPT\" restore --shell-job -D images/image\n");
    new.type_in("second\n");
    new.wait_for("answer 2 to <second>");
    let proc = ProcDir::open(pid).unwrap();
    let stat = proc.stat_line().unwrap();
    assert_eq!(stat.tpgid, stat.pgrp.0, "it is the terminal's foreground job");
    // The keys of job control.
    new.type_in("\x1a");
    new.wait_for("Stopped");
    new.wait_for("$ ");
    assert_eq!(proc.stat_line().unwrap().state, 'T');
    new.type_in("echo shell $((6 * 7))\n");
    new.wait_for("shell 42");
    new.type_in("fg\n");
    new.type_in("third\n");
    new.wait_for("answer 3 to <third>");
    new.type_in("\x1a");
    new.wait_for("Stopped");
    new.type_in("bg; sleep 0.2; jobs; fg\n");
    new.type_in("fourth\n");
    new.wait_for("answer 4 to <fourth>");
    // The end of input ends it, and its status is ckpt's.
    new.type_in("\x04");
    new.wait_for("bye");
    new.wait_for("$ ");
    new.type_in("echo status $?\n");
    new.wait_for("status 5");
}

#[test]
fn the_interrupt_key_ends_a_restored_job() {
    let workshop = Workshop::new();
    let (old, pid) = start_answerer(&workshop);
    run(&mut dump(pid, &workshop.image(), &["--shell-job"])).assert_done();
    drop(old);
    let mut new = Screen::open(workshop.path());
    new.type_in("\"$CKPT\" restore --shell-job -D images/image\n");
    new.type_in("second\n");
    new.wait_for("answer 2 to <second>");
    new.type_in("\x03");
    new.wait_for("$ ");
    new.type_in("echo status $?\n");
    new.wait_for("status 130");
    assert!(ProcDir::open(pid).is_err());
}

#[test]
fn a_job_is_not_restored_without_a_terminal() {
    let workshop = Workshop::new();
    let (old, pid) = start_answerer(&workshop);
    run(&mut dump(pid, &workshop.image(), &["--shell-job"])).assert_done();
    drop(old);
    let mut command = Command::new("setsid");
    command.args(["--wait", CKPT, "restore", "--shell-job", "-D"]).arg(workshop.image()).stdin(Stdio::null());
    let outcome = run(command.env_remove("RUST_BACKTRACE"));
    assert_eq!(outcome.code(), Some(REFUSED), "{outcome:#?}");
    assert!(outcome.errors.iter().all(|line| line.contains("terminal")), "{outcome:#?}");
    let outcome = run(&mut restore(&workshop.image()));
    assert_eq!(outcome.code(), Some(REFUSED), "{outcome:#?}");
    assert!(outcome.errors.iter().all(|line| line.contains("--shell-job")), "{outcome:#?}");
    assert!(ProcDir::open(pid).is_err());
}
