//! `ckpt run -D --interval --keep --on-signal`: a job that is saved again and again while it runs, when it is told to end,
//! and when one of its programs wants that.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::Context;
use ckpt_core::backend::DumpOptions;
use ckpt_core::dump::After;
use ckpt_core::procfs::ProcDir;
use ckpt_core::{Backend, Pid};
use nix::sys::signal::Signal;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::sys::wait::{WaitPidFlag, waitpid};

use crate::failure::{self, Usage};
use crate::progress::Bar;
use crate::supervise::{self, Chore};
use crate::{human, output};

/// Ends `ckpt run` when the job was saved on its signal: not one that programs commonly end with.
pub const SAVED: u8 = 85;

/// When the job is saved, and where.
#[derive(Debug, clap::Args)]
pub struct Periodic {
    /// The directory for the images: DIR/1, DIR/2, ..., and DIR/latest, a link to the newest
    #[arg(short = 'D', long = "dir", value_name = "DIR", conflicts_with = "detach")]
    directory: Option<PathBuf>,

    /// Save the command again and again, so long after another: 30s, 10m, 2h
    #[arg(long, value_name = "TIME", value_parser = interval, requires = "directory", conflicts_with = "detach")]
    interval: Option<Duration>,

    /// How many images stay: when there are more, the oldest goes
    #[arg(long, value_name = "N", default_value = "2", value_parser = clap::value_parser!(u32).range(1..))]
    keep: u32,

    /// When ckpt gets this signal, save the command, end it, and exit with 85
    #[arg(long, value_name = "SIGNAL", value_parser = signal, requires = "directory", conflicts_with = "detach")]
    on_signal: Option<Signal>,
}

fn interval(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(time) if time >= Duration::from_millis(100) => Ok(time),
        Ok(_) => Err("at least 100ms".into()),
        Err(_) => Err("a number with a unit: 30s, 10m, 2h".into()),
    }
}

/// `TERM`, `SIGTERM` or `15`.
fn signal(text: &str) -> Result<Signal, String> {
    let name = text.to_uppercase();
    let name = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
    let number = text.parse::<i32>().ok().and_then(|number| Signal::try_from(number).ok());
    let found = number.or_else(|| name.parse().ok()).filter(|signal| supervise::PASSED.contains(signal));
    found.ok_or_else(|| {
        let names: Vec<&str> = supervise::PASSED.iter().map(|signal| &signal.as_str()[3..]).collect();
        format!("one of {}", names.join(", "))
    })
}

impl Periodic {
    /// Prepares the directory, before the command is started. `None` if nothing of it was asked for.
    pub fn prepare(&self, backend: &'static Backend) -> anyhow::Result<Option<Prepared>> {
        let Some(directory) = &self.directory else { return Ok(None) };
        // Programs with the shim may say when themselves.
        if self.interval.is_none() && self.on_signal.is_none() && backend.launcher.is_none() {
            return Err(Usage("-D says where to save, but neither --interval nor --on-signal when".into()).into());
        }
        crate::backends::dumper(Some(backend.name))?;
        fs::create_dir_all(directory).with_context(|| format!("{} cannot be made", directory.display()))?;
        // Where the job is, it may change its own directory; ours stays.
        let directory = fs::canonicalize(directory).with_context(|| format!("{}", directory.display()))?;
        let timer = self.interval.map(timer).transpose().context("a timer for --interval")?;
        Ok(Some(Prepared { backend, directory, timer, keep: self.keep as usize, on_signal: self.on_signal }))
    }
}

fn timer(interval: Duration) -> nix::Result<TimerFd> {
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)?;
    timer.set(Expiration::Interval(interval.into()), TimerSetTimeFlags::empty())?;
    Ok(timer)
}

/// All that can be made ready before there is a job.
pub struct Prepared {
    backend: &'static Backend,
    directory: PathBuf,
    timer: Option<TimerFd>,
    keep: usize,
    on_signal: Option<Signal>,
}

impl Prepared {
    pub fn watch(self, root: Pid) -> Rc<Keeper> {
        Rc::new(Keeper { prepared: self, root })
    }
}

/// Saves a job while it runs.
pub struct Keeper {
    prepared: Prepared,
    root: Pid,
}

/// [`Keeper`], when the time has come or a signal.
pub struct Watch(pub Rc<Keeper>);

impl Keeper {
    /// Saves the job into the next image. The newest image is always whole, and `latest` leads to it.
    pub fn save(&self, after: After) -> anyhow::Result<PathBuf> {
        let Prepared { backend, directory, keep, .. } = &self.prepared;
        let numbers = images(directory)?;
        let number = numbers.last().map_or(1, |last| last + 1);
        let image = directory.join(number.to_string());
        save_into(backend, self.root, &image, after)?;
        // From here on it is saved; what fails now is said, and takes nothing away from that.
        let told = lead_to(directory, number).and_then(|()| remove_oldest(directory, *keep));
        if let Err(error) = told {
            failure::report(&error);
        }
        Ok(image)
    }
}

/// Saves a job into an image.
pub fn save_into(backend: &Backend, root: Pid, image: &Path, after: After) -> anyhow::Result<()> {
    let begun = Instant::now();
    let dumper = crate::backends::dumper(Some(backend.name))?;
    let store = ckpt_formats::create(image)?;
    let options = DumpOptions { shell_job: false, tcp_close: false, timeout: Duration::from_secs(10) };
    let mut bar = Bar::new();
    let summary = ckpt_core::dump::dump(&*dumper, root, &options, after, store, &mut bar)?;
    drop(bar);
    let (size, time) = (human::size(summary.page_bytes), human::duration(begun.elapsed()));
    tracing::info!("saved process {root} ({size}) to {} in {time}", image.display());
    Ok(())
}

fn has_ended(root: Pid) -> bool {
    let state = ProcDir::open(root).and_then(|proc| proc.stat_line()).map(|stat| stat.state);
    !state.is_ok_and(|state| !matches!(state, 'Z' | 'X'))
}

/// Says that it could not be saved, and that nothing has happened to it.
pub fn not_saved(root: Pid, error: anyhow::Error) {
    if !has_ended(root) {
        failure::report(&error.context(format!("process {root} could not be saved, and goes on")));
    }
}

/// The numbers of the images in a directory, the oldest first.
fn images(directory: &Path) -> anyhow::Result<Vec<u64>> {
    let entries = fs::read_dir(directory).with_context(|| format!("{} cannot be read", directory.display()))?;
    let mut numbers: Vec<u64> = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// Has `latest` lead to an image, in one step.
fn lead_to(directory: &Path, number: u64) -> anyhow::Result<()> {
    let (new, link) = (directory.join(".latest"), directory.join("latest"));
    let made = match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => std::os::unix::fs::symlink(number.to_string(), &new).and_then(|()| fs::rename(&new, &link)),
    };
    made.with_context(|| format!("{} cannot be made", link.display()))
}

/// Removes the oldest images, so that some stay. First out of its name, so that no half of one is taken for an image.
fn remove_oldest(directory: &Path, keep: usize) -> anyhow::Result<()> {
    let numbers = images(directory)?;
    for number in &numbers[..numbers.len().saturating_sub(keep)] {
        let (image, gone) = (directory.join(number.to_string()), directory.join(format!(".removed-{number}")));
        // Only what is an image, whatever else somebody has put there.
        if image.join("image.cbor").is_file() {
            let removed = fs::rename(&image, &gone).and_then(|()| fs::remove_dir_all(&gone));
            removed.with_context(|| format!("{} cannot be removed", image.display()))?;
        }
    }
    Ok(())
}

impl Chore for Watch {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.prepared.timer.as_ref().map(AsFd::as_fd)
    }

    fn work(&mut self) -> anyhow::Result<()> {
        let mut times = [0; 8];
        let due = self.fd().is_some_and(|timer| nix::unistd::read(timer, &mut times).is_ok());
        let root = self.0.root;
        if due
            && !has_ended(root)
            && let Err(error) = self.0.save(After::LeaveRunning)
        {
            not_saved(root, error);
        }
        Ok(())
    }

    fn take(&mut self, signal: i32) -> Option<Option<ExitCode>> {
        let root = self.0.root;
        if self.0.prepared.on_signal.map(|wanted| wanted as i32) != Some(signal) {
            return None;
        }
        match self.0.save(After::Kill) {
            Ok(image) => {
                let _ = waitpid(nix::unistd::Pid::from_raw(root.0), Some(WaitPidFlag::__WALL));
                let place = image.display();
                output::tell_aside(&format!("process {root} is saved; go on with: ckpt restore -D {place}"));
                Some(Some(ExitCode::from(SAVED)))
            }
            Err(error) => {
                not_saved(root, error);
                Some(None)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_has_a_unit() {
        assert_eq!(interval("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(interval("1h 30m"), Ok(Duration::from_secs(5400)));
        for wrong in ["30", "", "0s", "-1s", "1 fortnight"] {
            assert!(interval(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_signal_has_three_names() {
        for name in ["TERM", "SIGTERM", "15", "term"] {
            assert_eq!(signal(name), Ok(Signal::SIGTERM), "{name}");
        }
        for wrong in ["KILL", "9", "SEGV", "", "TERMINATE"] {
            assert!(signal(wrong).is_err(), "{wrong}");
        }
    }
}
