//! Jobs of a terminal.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::termios::{LocalFlags, SetArg, SpecialCharacterIndices, tcgetattr, tcsetattr};

use crate::case::{Case, Checkpoint};
use crate::expect::{equal, that};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("terminals/job", &["terminals"], job).shell_job().after_dump(reset),
        Case::new("terminals/by-dev-tty", &["terminals"], by_dev_tty).shell_job(),
        Case::new("terminals/pair", &["terminals"], pair).refused_at_dump("pseudoterminal"),
    ]
}

type Verdict = Result<(), String>;

fn failed<E: std::fmt::Display>(what: &str) -> impl Fn(E) -> String + '_ {
    move |error| format!("{what}: {error}")
}

fn link(fd: i32) -> String {
    let link = std::fs::read_link(format!("/proc/self/fd/{fd}"));
    link.map_or(String::new(), |link| link.display().to_string())
}

fn job(checkpoint: &Checkpoint) -> Verdict {
    // SAFETY: standard input is open all the time.
    let input = unsafe { BorrowedFd::borrow_raw(0) };
    let before = tcgetattr(input).map_err(failed("tcgetattr"))?;
    let mut raw = before.clone();
    raw.local_flags &= !(LocalFlags::ECHO | LocalFlags::ICANON);
    raw.control_chars[SpecialCharacterIndices::VMIN as usize] = 3;
    tcsetattr(input, SetArg::TCSANOW, &raw).map_err(failed("tcsetattr"))?;
    let name = link(0);
    that("standard input is a terminal", name.starts_with("/dev/pts/"))?;
    // SAFETY: takes a descriptor.
    let group = || unsafe { libc::tcgetpgrp(0) };
    let (session, foreground) = (nix::unistd::getsid(None), group());
    checkpoint.wait()?;
    equal("the terminal", name, link(0))?;
    equal("the session", session, nix::unistd::getsid(None))?;
    equal("the foreground group", foreground, group())?;
    let after = tcgetattr(input).map_err(failed("tcgetattr"))?;
    equal("local flags", raw.local_flags, after.local_flags)?;
    equal("VMIN", 3, after.control_chars[SpecialCharacterIndices::VMIN as usize])?;
    tcsetattr(input, SetArg::TCSANOW, &before).map_err(failed("tcsetattr"))?;
    // SAFETY: takes a descriptor.
    that("it is still a terminal", unsafe { libc::isatty(0) } == 1)
}

/// As a shell does when a job of its terminal has ended.
fn reset(_dir: &Path) {
    let terminal = OpenOptions::new().read(true).write(true).open("/dev/tty").expect("the suite has a terminal");
    let mut settings = tcgetattr(&terminal).expect("it is a terminal");
    settings.local_flags |= LocalFlags::ECHO | LocalFlags::ICANON;
    settings.control_chars[SpecialCharacterIndices::VMIN as usize] = 1;
    // In the background this would stop us.
    let stop = SigSet::from(Signal::SIGTTOU);
    stop.thread_block().expect("a signal that can be blocked");
    tcsetattr(&terminal, SetArg::TCSANOW, &settings).expect("settings that it had");
    stop.thread_unblock().expect("it was blocked");
}

fn by_dev_tty(checkpoint: &Checkpoint) -> Verdict {
    let mut terminal = OpenOptions::new().read(true).write(true).open("/dev/tty").map_err(failed("/dev/tty"))?;
    checkpoint.wait()?;
    equal("its name", "/dev/tty".to_string(), link(terminal.as_raw_fd()))?;
    terminal.write_all(b"still here\n").map_err(failed("write"))?;
    File::open("/dev/tty").map(drop).map_err(failed("there is no controlling terminal"))
}

/// A pseudoterminal inside of the tree.
fn pair(checkpoint: &Checkpoint) -> Verdict {
    let pair = nix::pty::openpty(None, None).map_err(failed("openpty"))?;
    checkpoint.wait()?;
    // SAFETY: takes a descriptor.
    that("it is still a terminal", unsafe { libc::isatty(pair.slave.as_raw_fd()) } == 1)
}
