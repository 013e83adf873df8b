//! Jobs of a terminal.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use nix::fcntl::OFlag;
use nix::pty::{Winsize, posix_openpt, ptsname_r, unlockpt};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::termios::{LocalFlags, SetArg, SpecialCharacterIndices, tcgetattr, tcsetattr};
use nix::unistd::Pid;

use crate::case::{Case, Checkpoint};
use crate::expect::{done, equal, eventually, in_child, make_sign, that};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("terminals/job", &["terminals"], job).shell_job().after_dump(reset),
        Case::new("terminals/by-dev-tty", &["terminals"], by_dev_tty).shell_job(),
        Case::new("terminals/pair", &["terminals"], pair).rounds(3),
        Case::new("terminals/session", &["terminals", "tasks"], session).rounds(3),
        Case::new("terminals/packets", &["terminals"], packets),
        Case::new("terminals/several", &["terminals"], several),
        Case::new("terminals/typed-before", &["terminals"], typed_before)
            .refused_at_dump("bytes were typed and not read"),
        Case::new("terminals/written-before", &["terminals"], written_before)
            .refused_at_dump("bytes were written to its terminal and not read"),
        Case::new("terminals/master-elsewhere", &["terminals"], master_elsewhere)
            .refused_at_dump("its controlling terminal is not"),
        Case::new("terminals/number-in-use", &["terminals"], pair)
            .after_dump(take_numbers)
            .refused_at_restore("it is in use"),
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

/// What a terminal does with a line that is typed: both sides see it.
fn talk(master: &mut File, slave: &mut File, line: &str) -> Verdict {
    master.write_all(format!("{line}\n").as_bytes()).map_err(failed("typing"))?;
    let mut room = [0; 100];
    let size = slave.read(&mut room).map_err(failed("reading what was typed"))?;
    equal("the line that was typed", format!("{line}\n"), String::from_utf8_lossy(&room[..size]).into_owned())?;
    slave.write_all(b"answer\n").map_err(failed("writing"))?;
    let mut seen = String::new();
    // The echo, and the answer: a new line goes out as two characters.
    let expected = format!("{line}\r\nanswer\r\n");
    while seen.len() < expected.len() {
        let size = master.read(&mut room).map_err(failed("reading what was written"))?;
        seen.push_str(&String::from_utf8_lossy(&room[..size]));
    }
    equal("what is seen on the screen", expected, seen)
}

fn open_pair(size: &Winsize) -> Result<(File, File), String> {
    let pair = nix::pty::openpty(size, None).map_err(failed("openpty"))?;
    Ok((pair.master.into(), pair.slave.into()))
}

const SIZE: Winsize = Winsize { ws_row: 31, ws_col: 97, ws_xpixel: 5, ws_ypixel: 6 };

fn size(fd: &File) -> Result<Winsize, String> {
    let mut size = Winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: writes to the struct.
    done("TIOCGWINSZ", unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, &mut size) })?;
    Ok(size)
}

/// A pseudoterminal inside of the tree.
fn pair(checkpoint: &Checkpoint) -> Verdict {
    let (mut master, mut slave) = open_pair(&SIZE)?;
    let mut changed = tcgetattr(&slave).map_err(failed("tcgetattr"))?;
    changed.control_chars[SpecialCharacterIndices::VERASE as usize] = b'#';
    tcsetattr(&slave, SetArg::TCSANOW, &changed).map_err(failed("tcsetattr"))?;
    talk(&mut master, &mut slave, "before")?;
    let names = [link(master.as_raw_fd()), link(slave.as_raw_fd())];
    std::fs::set_permissions(&names[1], std::fs::Permissions::from_mode(0o601)).map_err(failed("chmod"))?;
    checkpoint.wait()?;
    // SAFETY: takes a descriptor.
    that("it is still a terminal", unsafe { libc::isatty(slave.as_raw_fd()) } == 1)?;
    equal("the names", names.clone(), [link(master.as_raw_fd()), link(slave.as_raw_fd())])?;
    equal("the size", SIZE, size(&slave)?)?;
    let mode = std::fs::metadata(&names[1]).map_err(failed("stat"))?.permissions().mode() & 0o7777;
    equal("its mode", 0o601, mode)?;
    let now = tcgetattr(&slave).map_err(failed("tcgetattr"))?;
    equal("settings", changed.control_chars, now.control_chars)?;
    talk(&mut master, &mut slave, "after")?;
    drop(slave);
    equal(
        "reading when the other side is closed",
        Some(libc::EIO),
        master.read(&mut [0]).err().and_then(|e| e.raw_os_error()),
    )
}

/// As a terminal emulator with a shell and a job in it: the job gets what is typed, and the signal of ^C.
fn session(checkpoint: &Checkpoint) -> Verdict {
    let (mut master, slave) = open_pair(&SIZE)?;
    let name = link(slave.as_raw_fd());
    let dir = checkpoint.dir().to_path_buf();
    let (interrupted, begun) = (dir.join("interrupted"), dir.join("begun"));
    let shell = in_child(|| {
        nix::unistd::setsid().map_err(failed("setsid"))?;
        // SAFETY: takes numbers.
        done("TIOCSCTTY", unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0) })?;
        let number = std::fs::read_to_string("/proc/self/stat").map_err(failed("stat"))?;
        let terminal = |text: &str| text.split_whitespace().nth(6).map(str::to_string);
        let number = terminal(&number);
        let job = in_child(|| {
            nix::unistd::setpgid(Pid::from_raw(0), Pid::from_raw(0)).map_err(failed("setpgid"))?;
            let group = Pid::from_raw(std::process::id() as i32);
            SigSet::from(Signal::SIGTTOU).thread_block().map_err(failed("sigprocmask"))?;
            nix::unistd::tcsetpgrp(&slave, group).map_err(failed("tcsetpgrp"))?;
            let interrupt = SigSet::from(Signal::SIGINT);
            interrupt.thread_block().map_err(failed("sigprocmask"))?;
            make_sign(&begun)?;
            equal("the signal", Signal::SIGINT, interrupt.wait().map_err(failed("sigwait"))?)?;
            let stat = std::fs::read_to_string("/proc/self/stat").map_err(failed("stat"))?;
            equal("the job's controlling terminal", &number, &terminal(&stat))?;
            equal("its group in the foreground", Ok(group), nix::unistd::tcgetpgrp(&slave))?;
            let mut terminal =
                OpenOptions::new().read(true).write(true).open("/dev/tty").map_err(failed("/dev/tty"))?;
            terminal.write_all(b"interrupted\n").map_err(failed("write"))?;
            make_sign(&interrupted)
        })?;
        job.passed()?;
        let stat = std::fs::read_to_string("/proc/self/stat").map_err(failed("stat"))?;
        equal("the shell's controlling terminal", number, terminal(&stat))?;
        let session = nix::sys::termios::tcgetsid(&slave).map_err(failed("tcgetsid"))?;
        equal("the session", std::process::id() as i32, session.as_raw())
    })?;
    drop(slave);
    eventually("the job has begun", || begun.exists())?;
    checkpoint.wait()?;
    that("nobody was interrupted", !interrupted.exists())?;
    master.write_all(b"\x03").map_err(failed("typing ^C"))?;
    eventually("the job was interrupted", || interrupted.exists())?;
    shell.passed()?;
    let mut seen = String::new();
    let mut room = [0; 100];
    // When all have closed the other side it is EIO.
    while let Ok(size) = master.read(&mut room) {
        seen.push_str(&String::from_utf8_lossy(&room[..size]));
    }
    that("what the job said is seen", seen.ends_with("interrupted\r\n"))?;
    that("a terminal has a name", name.starts_with("/dev/pts/"))
}

/// A master in packet mode, whose other side nobody has open, and which is locked.
fn packets(checkpoint: &Checkpoint) -> Verdict {
    let (mut master, mut slave) = open_pair(&SIZE)?;
    let one = 1_i32;
    // SAFETY: reads a number.
    done("TIOCPKT", unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCPKT, &one) })?;
    let locked = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY).map_err(failed("posix_openpt"))?;
    let other = ptsname_r(&locked).map_err(failed("ptsname"))?;
    checkpoint.wait()?;
    let open = || OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(&other);
    equal("opening one that is locked", Some(libc::EIO), open().err().and_then(|error| error.raw_os_error()))?;
    unlockpt(&locked).map_err(failed("unlockpt"))?;
    open().map(drop).map_err(failed("opening one that is not"))?;
    slave.write_all(b"data").map_err(failed("write"))?;
    let mut room = [0; 100];
    let size = master.read(&mut room).map_err(failed("read"))?;
    equal("a packet with data", b"\0data".to_vec(), room[..size].to_vec())
}

/// Opened in an order that is not that of their numbers, several times, and some closed again.
fn several(checkpoint: &Checkpoint) -> Verdict {
    let mut pairs: Vec<(File, File)> = (0..5).map(|_| open_pair(&SIZE)).collect::<Result<_, _>>()?;
    drop(pairs.remove(1));
    pairs.reverse();
    let again = OpenOptions::new().write(true).custom_flags(libc::O_NOCTTY).open(link(pairs[0].1.as_raw_fd()));
    let mut again = again.map_err(failed("opening it again"))?;
    let names: Vec<String> = pairs.iter().map(|(_, slave)| link(slave.as_raw_fd())).collect();
    checkpoint.wait()?;
    equal("the names", names, pairs.iter().map(|(_, slave)| link(slave.as_raw_fd())).collect())?;
    pairs.iter_mut().try_for_each(|(master, slave)| talk(master, slave, "a line"))?;
    again.write_all(b"x").map_err(failed("write"))?;
    let mut room = [0; 10];
    equal("what was written to the first", 1, pairs[0].0.read(&mut room).map_err(failed("read"))?)
}

fn typed_before(checkpoint: &Checkpoint) -> Verdict {
    let (mut master, mut slave) = open_pair(&SIZE)?;
    let mut quiet = tcgetattr(&slave).map_err(failed("tcgetattr"))?;
    quiet.local_flags &= !LocalFlags::ECHO;
    tcsetattr(&slave, SetArg::TCSANOW, &quiet).map_err(failed("tcsetattr"))?;
    master.write_all(b"early\n").map_err(failed("typing"))?;
    checkpoint.wait()?;
    let mut room = [0; 100];
    let size = slave.read(&mut room).map_err(failed("read"))?;
    equal("what was typed", b"early\n".to_vec(), room[..size].to_vec())
}

fn written_before(checkpoint: &Checkpoint) -> Verdict {
    let (mut master, mut slave) = open_pair(&SIZE)?;
    slave.write_all(b"early").map_err(failed("write"))?;
    checkpoint.wait()?;
    let mut room = [0; 100];
    let size = master.read(&mut room).map_err(failed("read"))?;
    equal("what was written", b"early".to_vec(), room[..size].to_vec())
}

/// A session in the tree has its terminal from a process that is not.
fn master_elsewhere(checkpoint: &Checkpoint) -> Verdict {
    let (master, slave) = open_pair(&SIZE)?;
    let holder = checkpoint.dir().join("holder");
    in_child(|| {
        in_child(|| {
            make_sign(&holder)?;
            let result = checkpoint.wait_for_go();
            drop(master.try_clone());
            result
        })?;
        Ok(())
    })?
    .passed()?;
    eventually("the other process has it", || holder.exists())?;
    drop(master);
    let (begun, end) = (checkpoint.dir().join("begun"), checkpoint.dir().join("end"));
    let child = in_child(|| {
        nix::unistd::setsid().map_err(failed("setsid"))?;
        // SAFETY: takes numbers.
        done("TIOCSCTTY", unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0) })?;
        // SAFETY: none of these is used.
        (0..100).for_each(|fd| _ = unsafe { libc::close(fd) });
        make_sign(&begun)?;
        eventually("the end", || end.exists())
    })?;
    drop(slave);
    eventually("the session has begun", || begun.exists())?;
    checkpoint.wait()?;
    make_sign(end)?;
    // It may have been told by SIGHUP that the other process has gone.
    let mut status = 0;
    // SAFETY: waits for our own child.
    done("waitpid", unsafe { libc::waitpid(child.0, &mut status, 0) }).map(drop)
}

/// Takes all low numbers, for as long as the trial lasts.
fn take_numbers(_dir: &Path) {
    for _ in 0..4 {
        std::mem::forget(posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY));
    }
}
