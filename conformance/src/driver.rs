//! Dump and restore through core's pipelines, each as a process of its own, as a user's `ckpt` would be.

use std::any::Any;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use ckpt_core::Pid;
use ckpt_core::backend::{Backend, DumpOptions, RestoreOptions};
use ckpt_core::dump::After;
use ckpt_core::progress::Silent;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

use crate::case::Case;

/// Why a driver did not do its work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It said so, with this message.
    Said(String),
    /// It crashed or hung.
    Broke(String),
}

/// A dump or a restore that takes longer hangs.
const DEADLINE: Duration = Duration::from_secs(60);
/// Standard output and error of drivers, in the trial's directory.
pub const LOG: &str = "driver.log";
const MESSAGE: &str = "driver.message";

/// Dumps the tree under `root` into `image`.
pub fn dump(
    backend: &Backend,
    case: &Case,
    root: i32,
    image: &Path,
    after: After,
    ordinary: bool,
) -> Result<(), Failure> {
    let options =
        DumpOptions { shell_job: case.shell_job, tcp_close: case.tcp_close, timeout: Duration::from_secs(10) };
    drive(image.parent().expect("a trial's directory"), ordinary, || {
        let dumper = backend.dumper.ok_or("it has no dumper")?();
        let store = ckpt_formats::create(image).map_err(|error| error.to_string())?;
        ckpt_core::dump::dump(&*dumper, Pid(root), &options, after, store, &mut Silent)
            .map(drop)
            .map_err(|error| error.to_string())
    })
}

/// Brings the tree of `image` back. The root is then a child of whoever reaps orphans.
pub fn restore(backend: &Backend, case: &Case, root: i32, image: &Path, ordinary: bool) -> Result<(), Failure> {
    let options = RestoreOptions { shell_job: case.shell_job, detach: true, ..RestoreOptions::default() };
    drive(image.parent().expect("a trial's directory"), ordinary, || {
        let opened = crate::backends::open(backend, image)?;
        let restored = ckpt_core::restore::restore(&*opened.restorer, &*opened.reader, &options, &mut Silent)
            .map_err(|error| error.to_string())?;
        if restored == Pid(root) { Ok(()) } else { Err(format!("process {root} was dumped, {restored} restored")) }
    })
}

/// Runs `work` in a child process and waits for its end. The caller must have one thread.
fn drive(dir: &Path, ordinary: bool, work: impl FnOnce() -> Result<(), String>) -> Result<(), Failure> {
    let message = dir.join(MESSAGE);
    let _ = fs::remove_file(&message);
    // SAFETY: this process has one thread, so that its child may do whatever it likes.
    let child = match unsafe { fork() }.map_err(|error| Failure::Broke(format!("fork: {error}")))? {
        ForkResult::Child => {
            let work = || {
                if ordinary {
                    crate::ordinary::become_ordinary()
                        .map_err(|error| format!("becoming an ordinary user: {error}"))?;
                }
                work()
            };
            let status = match catch_unwind(AssertUnwindSafe(|| logged(dir, work))) {
                Ok(Ok(())) => 0,
                Ok(Err(text)) => fs::write(&message, text).map_or(3, |()| 1),
                Err(panic) => fs::write(&message, panic_text(&*panic)).map_or(3, |()| 2),
            };
            std::process::exit(status)
        }
        ForkResult::Parent { child } => child,
    };
    let text = || fs::read_to_string(&message).unwrap_or_else(|_| "no message".into());
    let begin = Instant::now();
    loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, 0)) => return Ok(()),
            Ok(WaitStatus::Exited(_, 1)) => return Err(Failure::Said(text())),
            Ok(WaitStatus::Exited(_, 2)) => return Err(Failure::Broke(format!("panicked: {}", text()))),
            Ok(WaitStatus::StillAlive) if begin.elapsed() > DEADLINE => {
                let _ = kill(child, Signal::SIGKILL);
                let _ = waitpid(child, None);
                return Err(Failure::Broke(format!("did not end within {} s", DEADLINE.as_secs())));
            }
            Ok(WaitStatus::StillAlive) => std::thread::sleep(Duration::from_micros(500)),
            other => return Err(Failure::Broke(format!("ended as {other:?}"))),
        }
    }
}

/// Has standard output and error go to the log: a driver must not hold what the suite reads from.
fn logged(dir: &Path, work: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    let log = File::options().create(true).append(true).open(dir.join(LOG)).map_err(|error| error.to_string())?;
    for fd in [1, 2] {
        // SAFETY: replaces a standard stream of this process, which nothing else owns, by an open file.
        unsafe { libc::dup2(log.as_raw_fd(), fd) };
    }
    drop(log);
    work()
}

/// What a panic said.
pub fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("(no text)")
}
