//! `ckpt run`: starts a command so that it can be dumped: in a session of its own, with nothing that leads outside.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::Context;
use ckpt_core::Pid;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::failure::Refused;
use crate::periodic::{Periodic, SAVED, Watch};
use crate::requests::Listener;
use crate::restore::Pidfile;
use crate::supervise::{self, Chore};
use crate::{backends, output, sys};

/// Start a command in a session of its own, ready to be dumped
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ckpt run -- python3 work.py                 start it, show its output, wait
  ckpt run -d -o work.log -- python3 work.py  start it in the background, and
                                              print its process id
  ckpt run --pidfile pid -- ./server          and then, from elsewhere:
                                              ckpt dump -t $(cat pid) -D image
  ckpt run -D saved --interval 10m --on-signal TERM -- ./job
                                              save it every ten minutes, and once
                                              more when a batch system ends it
  ckpt restore -D saved/latest                go on from the newest of these
  ckpt --backend preload run -D saved -- ./job
                                              save it when it asks for that: see
                                              ckpt api

The command gets no terminal and none of our descriptors but the standard ones,
so that nothing of it leads outside of what a dump saves. Where standard input
is not a file, it is /dev/null. Where standard output or error is not a file (but
a terminal or a pipe), it is a file, ckpt-run-PID.log, and what appears there is
shown; it is removed when the command has ended by itself. Signals are passed on
to the command, and ckpt ends with its status. When the command is dumped and
ended, ckpt ends by SIGKILL, as the command did.

Where --interval or --on-signal fails (a full disk, say), that is one line, and the
command goes on. When --on-signal has saved and ended it, ckpt exits with 85.")]
pub struct Run {
    /// Leave the command in the background; its process id is printed
    #[arg(short, long)]
    detach: bool,

    /// Append standard output and error to this file
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Take standard input from this file
    #[arg(short, long, value_name = "FILE")]
    input: Option<PathBuf>,

    /// Write the process id of the command to a new file
    #[arg(long, value_name = "FILE")]
    pidfile: Option<PathBuf>,

    #[command(flatten)]
    periodic: Periodic,

    /// The command with its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<std::ffi::OsString>,
}

pub fn run(backend: Option<&str>, verb: &Run) -> anyhow::Result<ExitCode> {
    let backend = backends::find(backend)?;
    let capability = (backend.capability)();
    if !capability.attach && !capability.launch {
        return Err(
            Refused(format!("the backend {} cannot start programs so that they can be dumped", backend.name)).into()
        );
    }
    let periodic = verb.periodic.prepare(backend)?;
    let mut pidfile = verb.pidfile.as_deref().map(Pidfile::new).transpose()?;

    let name = verb.command[0].clone();
    let mut command = Command::new(&name);
    command.args(&verb.command[1..]);
    if let Some(input) = &verb.input {
        let file = File::open(input).with_context(|| format!("{} cannot be read", input.display()))?;
        command.stdin(file);
    } else if !is_saveable(io::stdin().as_fd()) {
        command.stdin(Stdio::null());
    }
    let log = choose_output(&mut command, verb.output.as_deref())?;
    sys::in_own_session(&mut command);
    if let Some(launcher) = backend.launcher {
        let prepared = launcher(&mut command);
        prepared.with_context(|| format!("the backend {} cannot prepare the command", backend.name))?;
    }
    // Held before the command starts, so that none is lost; the command itself starts with none blocked.
    let signals = (!verb.detach).then(supervise::Signals::hold).transpose()?;
    // So that the command finds it from its first line on.
    let listener = (!verb.detach && backend.launcher.is_some()).then(Listener::new);
    let child = command.spawn().with_context(|| format!("{} cannot be started", name.display()))?;
    let pid = Pid(child.id() as i32);
    if let Some(pidfile) = &mut pidfile
        && let Err(error) = pidfile.write(pid)
    {
        sys::kill(pid.0, libc::SIGKILL);
        return Err(error);
    }
    if let Some(pidfile) = pidfile {
        pidfile.keep();
    }
    let log = log.map(|log| log.name_after(pid)).transpose()?;
    let place = log.as_ref().map(|log| format!("; output in {}", log.path.display())).unwrap_or_default();
    let Some(signals) = signals else {
        output::tell(&pid.to_string());
        if !place.is_empty() {
            output::tell_aside(&format!("process {pid} runs{place}"));
        }
        return Ok(ExitCode::SUCCESS);
    };
    output::tell_aside(&format!("process {pid} runs; save it with: ckpt dump -t {pid} -D DIR{place}"));
    let mut follower = log.map(Log::follow).transpose()?;
    let keeper = periodic.map(|prepared| prepared.watch(pid));
    let mut requests = listener.map(|listener| listener.serve(pid, keeper.clone()));
    let mut watch = keeper.map(Watch);
    // What the command has written is shown before it is saved.
    let mut chores: Vec<&mut dyn Chore> = Vec::new();
    chores.extend(follower.as_mut().map(|follower| follower as &mut dyn Chore));
    chores.extend(watch.as_mut().map(|watch| watch as &mut dyn Chore));
    chores.extend(requests.as_mut().map(|requests| requests as &mut dyn Chore));
    let status = supervise::wait(pid, signals, None, &mut chores)?;
    // One that was saved goes on with it.
    if let Some(follower) = follower
        && status != ExitCode::from(SAVED)
    {
        let _ = std::fs::remove_file(follower.path);
    }
    Ok(status)
}

/// Whether a dump saves what a standard descriptor leads to.
fn is_saveable(fd: BorrowedFd<'_>) -> bool {
    let Ok(fd) = fd.try_clone_to_owned() else { return false };
    let Ok(metadata) = File::from(fd).metadata() else { return false };
    let kind = metadata.file_type();
    if kind.is_char_device() {
        use std::os::unix::fs::MetadataExt;
        // /dev/null, zero, full, random, urandom
        let device = metadata.rdev();
        return libc::major(device) == 1 && matches!(libc::minor(device), 3 | 5 | 7 | 8 | 9);
    }
    kind.is_file()
}

/// The file that stands in for a terminal or a pipe.
struct Log {
    file: File,
    path: PathBuf,
}

fn choose_output(command: &mut Command, output: Option<&Path>) -> anyhow::Result<Option<Log>> {
    if let Some(path) = output {
        let file = OpenOptions::new().append(true).create(true).open(path);
        let file = file.with_context(|| format!("{} cannot be written", path.display()))?;
        command.stderr(file.try_clone()?).stdout(file);
        return Ok(None);
    }
    let (out, err) = (is_saveable(io::stdout().as_fd()), is_saveable(io::stderr().as_fd()));
    if out && err {
        return Ok(None);
    }
    let path = PathBuf::from(format!("ckpt-run-of-{}.log", std::process::id()));
    let file = OpenOptions::new().append(true).read(true).create_new(true).mode(0o600).open(&path);
    let file = file.with_context(|| format!("{} cannot be made; choose a file with --output", path.display()))?;
    if !out {
        command.stdout(file.try_clone()?);
    }
    if !err {
        command.stderr(file.try_clone()?);
    }
    Ok(Some(Log { file: File::open(&path).unwrap_or(file), path }))
}

impl Log {
    /// Its final name.
    fn name_after(self, pid: Pid) -> anyhow::Result<Log> {
        let path = PathBuf::from(format!("ckpt-run-{pid}.log"));
        std::fs::rename(&self.path, &path).with_context(|| format!("{} cannot be made", path.display()))?;
        Ok(Log { file: self.file, path })
    }

    fn follow(mut self) -> anyhow::Result<Follower> {
        self.file.seek(SeekFrom::Start(0))?;
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        inotify.add_watch(&self.path, AddWatchFlags::IN_MODIFY)?;
        Ok(Follower { file: self.file, path: self.path, inotify })
    }
}

/// Shows what a file gets.
struct Follower {
    file: File,
    path: PathBuf,
    inotify: Inotify,
}

impl Chore for Follower {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.inotify.as_fd())
    }

    fn work(&mut self) -> anyhow::Result<()> {
        while self.inotify.read_events().is_ok_and(|events| !events.is_empty()) {}
        let mut buffer = vec![0; 64 * 1024];
        loop {
            match self.file.read(&mut buffer)? {
                0 => return Ok(()),
                // A reader that went away is no reason to end the command.
                read => output::pass(&buffer[..read]),
            }
        }
    }

    fn take(&mut self, _signal: i32) -> Option<Option<ExitCode>> {
        None
    }
}
