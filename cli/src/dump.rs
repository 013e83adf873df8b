//! `ckpt dump`: saves a process tree.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use ckpt_core::Pid;
use ckpt_core::backend::DumpOptions;
use ckpt_core::dump::After;

use crate::progress::Bar;
use crate::{backends, human, output, sys};

/// Save a process and its descendants into an image, and end them
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ckpt dump -t 1234 -D image                  save process 1234 and all its
                                              descendants, and end them
  ckpt dump -t 1234 -D image --leave-running  save them, and let them go on
  ckpt dump -t $! -D image --shell-job        save a job of this terminal

If the dump fails, is refused, interrupted or even killed, the processes go on
as if nothing had happened, and the directory is not made. `ckpt check --pid`
says beforehand whether a dump would work.")]
pub struct Dump {
    /// The process to save, with all its descendants
    #[arg(short = 't', long = "pid", visible_alias = "tree", value_name = "PID", value_parser = pid)]
    pub pid: Pid,

    /// The directory to make for the image: it must not exist, or be empty
    #[arg(short = 'D', long = "dir", value_name = "DIR")]
    pub directory: PathBuf,

    /// Let the processes go on afterwards
    #[arg(long, conflicts_with = "leave_stopped")]
    pub leave_running: bool,

    /// Leave the processes stopped afterwards, as by SIGSTOP
    #[arg(long)]
    pub leave_stopped: bool,

    #[command(flatten)]
    pub how: How,
}

/// What `dump` and `check --pid` share.
#[derive(Debug, clap::Args)]
pub struct How {
    /// The processes are a job of a terminal, and will go on as a job of the terminal they are restored on
    #[arg(long)]
    pub shell_job: bool,

    /// Drop TCP connections out of the tree: the program will find them reset
    #[arg(long)]
    pub tcp_close: bool,

    /// How long the processes may take to come to a stop, in seconds
    #[arg(long, value_name = "S", default_value = "10", value_parser = seconds)]
    pub timeout: Duration,
}

impl How {
    pub fn options(&self) -> DumpOptions {
        DumpOptions { shell_job: self.shell_job, tcp_close: self.tcp_close, timeout: self.timeout }
    }
}

/// A process id on the command line.
pub fn pid(text: &str) -> Result<Pid, String> {
    match text.parse() {
        Ok(pid @ 1..) => Ok(Pid(pid)),
        _ => Err("a process id is a number from 1 on".into()),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let wrong = || "a number of seconds above 0 and up to 3600".to_string();
    let seconds: f64 = text.parse().map_err(|_| wrong())?;
    if seconds > 0.0 && seconds <= 3600.0 { Ok(Duration::from_secs_f64(seconds)) } else { Err(wrong()) }
}

pub fn run(backend: Option<&str>, verb: &Dump) -> anyhow::Result<ExitCode> {
    let begun = Instant::now();
    let backend = backend.or_else(|| backends::for_process(verb.pid));
    let dumper = backends::dumper(backend)?;
    sys::interrupt_on_signals();
    let store = ckpt_formats::create(&verb.directory)?;
    let after = match (verb.leave_running, verb.leave_stopped) {
        (true, _) => After::LeaveRunning,
        (_, true) => After::LeaveStopped,
        _ => After::Kill,
    };
    let mut bar = Bar::new();
    let summary = ckpt_core::dump::dump(&*dumper, verb.pid, &verb.how.options(), after, store, &mut bar)?;
    drop(bar);
    // A hint for restores whose memory follows: no reason to fail.
    let guessed = ckpt_formats::open(&verb.directory).map_err(|error| error.to_string());
    if let Err(why) = guessed.and_then(|image| ckpt_userfault::leave_first_guess(&verb.directory, &*image)) {
        tracing::info!("{why}");
    }
    output::tell(&format!(
        "saved process {} ({}, {}, {} of memory) to {} in {}{}",
        verb.pid,
        human::count(summary.processes, "process", "processes"),
        human::count(summary.threads, "thread", "threads"),
        human::size(summary.page_bytes),
        verb.directory.display(),
        human::duration(begun.elapsed()),
        match after {
            After::Kill => "",
            After::LeaveRunning => "; it goes on",
            After::LeaveStopped => "; it is stopped",
        }
    ));
    Ok(ExitCode::SUCCESS)
}
