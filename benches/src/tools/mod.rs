//! The ways to checkpoint: the backends of ckpt, and its peers. One file each says how it is called.

mod ckpt;
mod criu;
mod dmtcp;

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::command;
use crate::record::ToolFacts;

pub const BACKENDS: &[&str] = &["preload", "ptrace", "userfault"];
pub const PEERS: &[&str] = &["criu", "dmtcp"];

/// One that is there and can be run.
pub trait Tool: Sync {
    fn name(&self) -> &'static str;
    fn facts(&self) -> ToolFacts;
    /// Starts a program so that it can be saved, and gives its process id.
    fn start(&self, program: Command, place: &Path, timeout: Duration) -> Result<i32, String>;
    /// The command that saves.
    fn dump(&self, root: i32, image: &Path, leave_running: bool) -> Result<Command, String>;
    /// Whether saving is its own work, and to be timed.
    fn dumps(&self) -> bool;
    /// The command that brings back.
    fn restore(&self, image: &Path) -> Result<Command, String>;
    /// Whether that command ends when the tree runs.
    fn detaches(&self) -> bool;
    /// Restores with the memory following.
    fn lazily(&self) -> Option<Lazily>;
    /// An exit code that says that it refuses beforehand.
    fn refusal(&self) -> Option<i32>;
    /// Has a program wrapped for its whole run, in the foreground. `None` where it needs nothing to be prepared.
    fn wrap(&self, program: &Command, output: &Path) -> Option<Command>;
}

/// How a tool brings memory in behind a tree that runs.
pub struct Lazily {
    pub name: &'static str,
    /// What must be started before, and ends when all memory is there.
    pub daemon: Option<fn(&dyn Tool, &Path) -> Command>,
    /// What restores. Without a daemon it ends when all memory is there, and prints figures.
    pub restore: fn(&dyn Tool, &Path) -> Command,
}

/// A tool that was asked for.
pub enum Found {
    Tool(Box<dyn Tool>),
    Absent(ToolFacts),
}

/// Looks for the tools by name.
pub fn find(backends: &[&str], peers: &[&str], ckpt: &Path) -> Result<Vec<Found>, String> {
    let mut found = ckpt::find(backends, ckpt)?;
    for peer in peers {
        match *peer {
            "criu" => found.push(criu::find()),
            "dmtcp" => found.push(dmtcp::find()),
            _ => {}
        }
    }
    Ok(found)
}

fn absent(name: &str, why: impl Into<String>) -> Found {
    Found::Absent(ToolFacts { name: name.into(), version: None, absent: Some(why.into()) })
}

/// What a program says when asked for its version.
fn version(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).output().ok()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    said.lines().next().map(|line| line.trim().to_string())
}

/// Starts a program in a session of its own, with no descriptor but the standard ones.
fn start_alone(mut program: Command, place: &Path) -> Result<i32, String> {
    let said = said(place)?;
    let errors = said.try_clone().map_err(|error| error.to_string())?;
    program.stdin(Stdio::null()).stdout(said).stderr(errors).current_dir("/");
    // SAFETY: setsid(2) and close_range(2) are async-signal-safe.
    unsafe {
        program.pre_exec(|| {
            nix::unistd::setsid()?;
            libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int);
            Ok(())
        })
    };
    let name = program.get_program().to_string_lossy().into_owned();
    // The child is waited for by its pid, as its restored self will have to be.
    Ok(program.spawn().map_err(|error| format!("{name} cannot be started: {error}"))?.id() as i32)
}

/// Where what a program says goes.
fn said_path(place: &Path) -> PathBuf {
    place.join("said")
}

fn said(place: &Path) -> Result<File, String> {
    let path = said_path(place);
    File::options().append(true).create(true).open(&path).map_err(|error| format!("{}: {error}", path.display()))
}

/// The line that says most of what a program has written.
pub fn last_words(place: &Path) -> String {
    let said = std::fs::read(said_path(place)).unwrap_or_default();
    command::essence(&String::from_utf8_lossy(&said))
}

/// The same command, started by another.
fn behind(mut wrapper: Command, program: &Command) -> Command {
    wrapper.arg(program.get_program()).args(program.get_args()).current_dir("/");
    wrapper
}

/// Runs a command that is not measured.
fn run_aside(mut wrapper: Command, what: &str, place: &Path, timeout: Duration) -> Result<(), String> {
    let log = place.join("aside.log");
    command::run(&mut wrapper, what, &log, timeout).map(|_| ()).map_err(|failure| failure.reason)
}
