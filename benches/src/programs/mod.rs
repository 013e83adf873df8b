//! The programs that are saved and brought back: our own, each with much of one thing, and real ones as users run them.

pub mod http;
pub mod own;
mod postgresql;
pub mod redis;
mod servers;

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

/// A workload: a kind of program.
pub trait Program {
    fn name(&self) -> &'static str;
    fn about(&self) -> String;
    /// Whether `--quick` has it.
    fn quick(&self) -> bool;
    /// Bytes of memory that it touches, where that is what it is about; else 0.
    fn size(&self) -> u64;
    /// Why it cannot be run on this machine.
    fn absent(&self) -> Option<String>;
    /// Makes its files in a directory. The command is not started yet.
    fn prepare(&self, place: &Path) -> Result<(Command, Box<dyn Session>), String>;
}

/// One that is running, seen from outside.
pub trait Session: Send {
    /// Waits until it has come up and has touched all its memory.
    fn ready(&mut self, give_up: &AtomicBool) -> Result<(), String>;
    /// What must be done before a dump, so that the first answer after the restore can be seen.
    fn before_dump(&mut self) -> Result<(), String>;
    /// Waits for an answer that takes its memory, asking again until one is there, and checks it. This is what is timed.
    fn answer(&mut self, within: Duration, give_up: &AtomicBool) -> Result<(), String>;
    /// Makes sure that all of it has gone on, and that its memory is what it was.
    fn verify(&mut self) -> Result<(), String>;
    /// Has it stamp the time, and keep the largest gap between two stamps.
    fn begin_stamps(&mut self) -> Result<Stamping, String>;
    /// What it saw since.
    fn end_stamps(&mut self) -> Result<Stamps, String>;
}

/// Whether a program can stamp the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stamping {
    Begun,
    /// It has no way to, or only one over a connection, which could not be saved.
    Unable,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stamps {
    pub gap: Duration,
    /// How far a program that writes at a set rate fell behind it.
    pub behind: Option<Duration>,
}

/// How long a program may take to come up, and to be checked.
pub const PATIENCE: Duration = Duration::from_secs(120);

pub fn all() -> Vec<Box<dyn Program>> {
    let mut all: Vec<Box<dyn Program>> = Vec::new();
    all.extend(own::LOADS.iter().map(|load| Box::new(*load) as Box<dyn Program>));
    all.push(Box::new(redis::Redis { name: "redis", by_unix_socket: false, keys: 100_000, quick: true }));
    all.push(Box::new(postgresql::Postgresql));
    all.extend(servers::SERVERS.iter().map(|server| Box::new(*server) as Box<dyn Program>));
    all
}

/// Where a program is, on PATH.
fn on_path(program: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// Looks again and again, until a condition holds.
fn wait_for(
    what: &str,
    within: Duration,
    give_up: &AtomicBool,
    mut holds: impl FnMut() -> Result<bool, String>,
) -> Result<(), String> {
    let deadline = std::time::Instant::now() + within;
    while !holds()? {
        if give_up.load(SeqCst) {
            return Err(format!("{what}: given up"));
        }
        if std::time::Instant::now() > deadline {
            return Err(format!("{what}: not within {} s", within.as_secs_f64()));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}
