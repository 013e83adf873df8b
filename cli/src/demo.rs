//! `ckpt demo`: starts a small program, dumps it, restores it, and proves that it went on.
//!
//! It runs the very commands that a user would, as processes of their own, and shows them.

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use ckpt_core::Pid;
use ckpt_core::procfs::ProcDir;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use crate::{backends, human, output, sys};

/// See it work: a small program is started, saved, ended, brought back, and asked whether it noticed
#[derive(Debug, clap::Args)]
pub struct Demo {}

/// The small program itself.
#[derive(Debug, clap::Args)]
pub struct DemoProgram {
    /// Where it keeps its file, and reports
    directory: PathBuf,
}

/// How long anything in the demo may take: far more than it needs.
const PATIENCE: Duration = Duration::from_secs(20);

const MESSAGE: &[u8] = b"written before the dump, read after the restore";

/// Words of memory that each worker keeps a sum over.
const WORDS: usize = 256 * 1024;
const WORKERS: u64 = 2;

pub fn run(backend: Option<&str>, _verb: &Demo) -> anyhow::Result<ExitCode> {
    // What is missing is said before anything is started.
    backends::dumper(backend)?;
    backends::restorer(backend)?;
    let workshop = Workshop::new()?;
    let image = workshop.directory.join("image");
    sys::adopt_orphans()?;
    sys::interrupt_on_signals();
    let backend: Vec<String> = backend.map(|name| format!("--backend={name}")).into_iter().collect();

    output::tell("Does a program notice that it was saved, ended, and brought back?\n");
    let mut program = Program::start(&workshop.directory)?;
    let pid = program.pid;
    let before = program.report_after(&workshop.directory, 10, 1)?;
    output::tell(&format!(
        "  started   process {pid}: {} threads, {} of memory, an open file, a pipe with data, a timer",
        before.threads,
        human::size((WORDS * 8) as u64 * WORKERS)
    ));

    let dump = ["dump", "-t", &pid.to_string(), "-D"].map(String::from);
    let dump_time = command(&[&backend, &dump[..]].concat(), &image, &[])?;
    program.reap()?;
    // The report of the last moment before the freeze.
    let before = Report::read(&workshop.directory)?;
    output::tell(&format!("  saved     ckpt dump -t {pid} -D {}", image.display()));
    output::tell(&format!("            in {}, {} of image", human::duration(dump_time), human::size(usage(&image)?)));
    ensure!(ProcDir::open(pid).is_err(), "process {pid} is still there after the dump");
    output::tell(&format!("  gone      there is no process {pid} any more"));

    let restore = ["restore", "-d", "-D"].map(String::from);
    let restore_time = command(&[&backend, &restore[..]].concat(), &image, &[])?;
    program.alive = true;
    output::tell(&format!("  restored  ckpt restore -d -D {}", image.display()));
    output::tell(&format!("            in {}", human::duration(restore_time)));

    let after = program.report_after(&workshop.directory, before.ticks + 10, before.rounds + 1)?;
    ensure!(after.pid == before.pid, "its process id was {} and is {}", before.pid, after.pid);
    ensure!(after.secret == before.secret, "it is not the program that was saved, but one that started anew");
    ensure!(after.rounds > before.rounds, "its threads do not work any more");
    ensure!(after.threads == before.threads, "it had {} threads and has {}", before.threads, after.threads);
    let verdict = program.end()?;
    ensure!(verdict.is_empty(), "it says: {verdict}");
    let lines = check_lines(&workshop.directory)?;
    output::tell(&format!(
        "  goes on   as process {pid}, with its {} threads\n\
         \x20           its timer ticked {} times before, and went on to {}\n\
         \x20           its threads had done {} rounds of work, and went on to {}; all sums over its memory are right\n\
         \x20           its file has {lines} lines, none missing, none twice\n\
         \x20           its pipe still held what was in it",
        after.threads, before.ticks, after.ticks, before.rounds, after.rounds,
    ));
    output::tell("\nIt did not notice. Now try it with a program of yours: see ckpt dump --help");
    Ok(ExitCode::SUCCESS)
}

/// Runs ckpt itself; what it says is of interest only when it fails.
fn command(arguments: &[String], image: &Path, more: &[&str]) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    let output = Command::new("/proc/self/exe")
        .arg0("ckpt")
        .args(arguments)
        .arg(image)
        .args(more)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .context("ckpt cannot start itself")?;
    let taken = begun.elapsed();
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said: Vec<&str> = said.lines().map(|line| line.trim_start_matches("ckpt: error: ")).collect();
        bail!("{}", said.join("\n"));
    }
    Ok(taken)
}

/// A directory of the demo's own, which is gone afterwards.
struct Workshop {
    directory: PathBuf,
}

impl Workshop {
    fn new() -> anyhow::Result<Workshop> {
        use std::os::unix::fs::DirBuilderExt;
        let directory = std::env::temp_dir().join(format!("ckpt-demo-{}", std::process::id()));
        let made = fs::DirBuilder::new().mode(0o700).create(&directory);
        made.with_context(|| format!("{} cannot be made", directory.display()))?;
        Ok(Workshop { directory })
    }
}

impl Drop for Workshop {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Bytes on disk of an image.
fn usage(image: &Path) -> anyhow::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut bytes = 0;
    for entry in fs::read_dir(image)? {
        bytes += entry?.metadata()?.blocks() * 512;
    }
    Ok(bytes)
}

/// The program, as our child: first because we started it, after the restore because we adopt orphans.
struct Program {
    pid: Pid,
    alive: bool,
    _child: Child,
}

impl Program {
    fn start(directory: &Path) -> anyhow::Result<Program> {
        let errors = File::create(directory.join("errors"))?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("ckpt-demo").arg("demo-program").arg(directory);
        command.stdin(Stdio::null()).stdout(errors.try_clone()?).stderr(errors).current_dir(directory);
        sys::in_own_session(&mut command);
        let child = command.spawn().context("the program cannot be started")?;
        Ok(Program { pid: Pid(child.id() as i32), alive: true, _child: child })
    }

    /// The first report with at least so many ticks of its timer, and rounds of its threads; on a busy host one may come
    /// long after the other. The last report, should the rounds never come.
    fn report_after(&self, directory: &Path, ticks: u64, rounds: u64) -> anyhow::Result<Report> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Report::read(directory) {
                Ok(report) if report.ticks >= ticks && (report.rounds >= rounds || Instant::now() > deadline) => {
                    return Ok(report);
                }
                _ if Instant::now() > deadline => bail!("the program says nothing any more"),
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    fn reap(&mut self) -> anyhow::Result<WaitStatus> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let pid = nix::unistd::Pid::from_raw(self.pid.0);
            match waitpid(pid, Some(WaitPidFlag::WNOHANG)).context("waiting for the program")? {
                WaitStatus::StillAlive if Instant::now() > deadline => bail!("the program does not end"),
                WaitStatus::StillAlive => std::thread::sleep(Duration::from_millis(1)),
                status => {
                    self.alive = false;
                    return Ok(status);
                }
            }
        }
    }

    /// Asks it to end; returns what it found wrong.
    fn end(&mut self) -> anyhow::Result<String> {
        let directory = ProcDir::open(self.pid)?.link("cwd").map(PathBuf::from)?;
        sys::kill(self.pid.0, libc::SIGTERM);
        match self.reap()? {
            WaitStatus::Exited(_, 0) => Ok(String::new()),
            status => Ok(format!("{} ({status:?})", fs::read_to_string(directory.join("errors"))?.trim())),
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if self.alive {
            sys::kill(self.pid.0, libc::SIGKILL);
            let _ = self.reap();
        }
    }
}

/// What the program says of itself, several times a second.
#[derive(Debug, Default)]
struct Report {
    pid: u64,
    /// Chosen at its start, and kept in its memory only.
    secret: u64,
    threads: u64,
    ticks: u64,
    rounds: u64,
}

impl Report {
    fn read(directory: &Path) -> anyhow::Result<Report> {
        let text = fs::read_to_string(directory.join("report"))?;
        let mut numbers = text.split_whitespace().map(str::parse);
        let mut next = || numbers.next().context("a short report")?.context("no number");
        Ok(Report { pid: next()?, secret: next()?, threads: next()?, ticks: next()?, rounds: next()? })
    }

    /// Written aside and renamed, so that no half of it is ever read.
    fn write(&self, directory: &Path) -> anyhow::Result<()> {
        let Report { pid, secret, threads, ticks, rounds } = self;
        fs::write(directory.join("report.new"), format!("{pid} {secret} {threads} {ticks} {rounds}\n"))?;
        fs::rename(directory.join("report.new"), directory.join("report"))?;
        Ok(())
    }
}

/// The program wrote the numbers from 1 on, a line each.
fn check_lines(directory: &Path) -> anyhow::Result<u64> {
    let text = fs::read_to_string(directory.join("lines"))?;
    let mut count = 0;
    for line in text.lines() {
        count += 1;
        ensure!(line == count.to_string(), "line {count} of its file says {line}");
    }
    Ok(count)
}

static ENDING: AtomicBool = AtomicBool::new(false);

/// The small program: it does a little of everything until SIGTERM, and exits with 0 if all was right all the time.
pub fn program(verb: &DemoProgram) -> anyhow::Result<ExitCode> {
    sys::on_sigterm(&ENDING);
    let (mut reader, mut writer) = std::io::pipe()?;
    writer.write_all(MESSAGE)?;
    let mut lines = File::create_new(verb.directory.join("lines"))?;
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC)?;
    let period = Duration::from_millis(2).into();
    timer.set(Expiration::Interval(period), TimerSetTimeFlags::empty())?;

    let rounds = Arc::new(AtomicU64::new(0));
    let wrong = Arc::new(AtomicBool::new(false));
    let workers: Vec<_> = (0..WORKERS)
        .map(|number| {
            let (rounds, wrong) = (rounds.clone(), wrong.clone());
            std::thread::spawn(move || work(number + 1, &rounds, &wrong))
        })
        .collect();

    let mut report = Report {
        pid: u64::from(std::process::id()),
        secret: std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_nanos() as u64,
        ..Report::default()
    };
    let mut line = 0u64;
    while !ENDING.load(Ordering::Relaxed) {
        report.ticks += expirations(timer.as_fd().try_clone_to_owned()?)?;
        report.rounds = rounds.load(Ordering::Relaxed);
        report.threads = fs::read_dir("/proc/self/task")?.count() as u64;
        line += 1;
        writeln!(lines, "{line}")?;
        ensure!(u64::from(std::process::id()) == report.pid, "its process id changed");
        report.write(&verb.directory)?;
    }
    for worker in workers {
        worker.join().ok().context("a thread of it failed")?;
    }
    ensure!(!wrong.load(Ordering::Relaxed), "a sum over its memory is wrong");
    ensure!(lines.stream_position()? == lines.metadata()?.len(), "its file has another offset");
    drop(writer);
    let mut message = Vec::new();
    reader.read_to_end(&mut message)?;
    ensure!(message == MESSAGE, "its pipe held {:?}", String::from_utf8_lossy(&message));
    Ok(ExitCode::SUCCESS)
}

/// Waits for the next tick; says how many there were.
fn expirations(timer: OwnedFd) -> anyhow::Result<u64> {
    let mut count = [0; 8];
    File::from(timer).read_exact(&mut count)?;
    Ok(u64::from_ne_bytes(count))
}

/// Changes memory all the time and keeps count of its sum; every round it adds all up again.
fn work(seed: u64, rounds: &AtomicU64, wrong: &AtomicBool) {
    let mut memory: Vec<u64> = (0..WORDS as u64).map(|word| word.wrapping_mul(seed)).collect();
    let mut sum = memory.iter().fold(0u64, |sum, word| sum.wrapping_add(*word));
    let mut place = seed as usize;
    while !ENDING.load(Ordering::Relaxed) {
        for _ in 0..10_000 {
            place = place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let word = &mut memory[(place >> 33) % WORDS];
            *word = word.wrapping_add(seed);
            sum = sum.wrapping_add(seed);
        }
        if memory.iter().fold(0u64, |sum, word| sum.wrapping_add(*word)) != sum {
            wrong.store(true, Ordering::Relaxed);
        }
        rounds.fetch_add(1, Ordering::Relaxed);
        // The machine is not ours alone.
        std::thread::sleep(Duration::from_millis(1));
    }
}
