//! `ckpt restore`: brings a process tree back.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use ckpt_core::Pid;
use ckpt_core::backend::RestoreOptions;
use ckpt_core::image::Image;
use ckpt_core::procfs::ProcDir;
use ckpt_core::resource::cgroups;
use ckpt_core::restore::prepare;

use crate::progress::Bar;
use crate::supervise::{self, Terminal};
use crate::{backends, human, output, sys};

/// Bring the processes of an image back, with their old ids
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ckpt restore -D image                   bring the tree back, wait for it, and
                                          end with its status
  ckpt restore -D image -d --pidfile pid  bring it back into the background
  ckpt restore -D image --shell-job       bring a job back onto this terminal

Without --detach ckpt stays as the parent of the tree's first process: it passes
on the signals it gets, stops and continues with it, and ends with its status.
If anything is in the way, nothing of the tree ever runs.")]
pub struct Restore {
    /// The directory of the image
    #[arg(short = 'D', long = "dir", value_name = "DIR")]
    directory: PathBuf,

    /// End when the tree runs, instead of waiting for it
    #[arg(short, long)]
    detach: bool,

    /// Write the id of the tree's first process to a new file, just before the tree goes on
    #[arg(long, value_name = "FILE")]
    pidfile: Option<PathBuf>,

    /// The image is of a job of a terminal: go on as a job of this one
    #[arg(long)]
    shell_job: bool,

    /// What to do about the cgroups of the processes: put them back there, or leave them in that of ckpt
    #[arg(long, value_name = "HOW", default_value = "join")]
    cgroup: Cgroups,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Cgroups {
    Join,
    Ignore,
}

pub fn run(backend: Option<&str>, verb: &Restore) -> anyhow::Result<ExitCode> {
    let begun = Instant::now();
    let restorer = backends::restorer(backend)?;
    let mut pidfile = verb.pidfile.as_deref().map(Pidfile::new).transpose()?;
    sys::interrupt_on_signals();
    let reader = ckpt_formats::open(&verb.directory)?;
    wait_for_the_dead(reader.image());
    let ignore_cgroups = verb.cgroup == Cgroups::Ignore;
    let options = RestoreOptions { shell_job: verb.shell_job, detach: verb.detach, ignore_cgroups };
    let lost = if ignore_cgroups { cgroups::losses(reader.image()) } else { Vec::new() };
    // A restore that fails gives its settings back.
    let terminal = if verb.shell_job { Terminal::open() } else { None };
    let mut bar = Bar::new();
    let prepared = prepare(&*restorer, &*reader, &options, &mut bar)?;
    drop(bar);

    let root = prepared.root();
    // From here on signals wait: what comes before the release undoes it, what comes after it is passed on.
    let signals = (!verb.detach).then(supervise::Signals::hold).transpose()?;
    if let Some(pidfile) = &mut pidfile {
        pidfile.write(root)?;
    }
    if let Some(terminal) = terminal.as_ref().filter(|_| !verb.detach) {
        terminal.give(root);
    }
    prepared.release()?;
    for loss in lost {
        output::tell_aside(&format!("lost, as allowed: {loss}"));
    }
    if let Some(terminal) = &terminal {
        terminal.keep_settings();
        // Another terminal has another size, and an empty screen.
        supervise::tell_of_window(root);
    }
    if let Some(pidfile) = pidfile {
        pidfile.keep();
    }
    tracing::info!("process {root} goes on after {}", human::duration(begun.elapsed()));
    drop(reader);
    match signals {
        Some(signals) => supervise::wait(root, signals, terminal.as_ref(), None),
        None => {
            output::tell(&format!(
                "restored process {root} from {} in {}",
                verb.directory.display(),
                human::duration(begun.elapsed())
            ));
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Right after a dump the processes that it ended may not have been waited for, and still have their ids: init, which
/// inherits most of them, may take a moment. If they stay, the plan refuses them by name.
fn wait_for_the_dead(image: &Image) {
    let deadline = Instant::now() + Duration::from_secs(2);
    let live = image.processes.iter().map(|process| process.task.pid);
    for pid in live.chain(image.zombies.iter().map(|zombie| zombie.task.pid)) {
        let is_zombie = || ProcDir::open(pid).and_then(|proc| proc.stat_line()).is_ok_and(|stat| stat.state == 'Z');
        while is_zombie() && Instant::now() < deadline && sys::interruption().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A file with a process id that is there if and only if that process was let go: so an existing one is never
/// overwritten, and a failure removes it again.
pub struct Pidfile {
    path: PathBuf,
    written: bool,
}

impl Pidfile {
    /// Looks early for what would be found late.
    pub fn new(path: &Path) -> anyhow::Result<Pidfile> {
        if path.symlink_metadata().is_ok() {
            let path = path.display();
            anyhow::bail!("the pid file {path} exists; remove it if the process that it names has ended");
        }
        Ok(Pidfile { path: path.to_path_buf(), written: false })
    }

    pub fn write(&mut self, pid: Pid) -> anyhow::Result<()> {
        let failed = || format!("the pid file {} cannot be written", self.path.display());
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(&self.path);
        let file = file.as_mut().map_err(|error| anyhow::anyhow!("{error}")).with_context(failed)?;
        self.written = true;
        file.write_all(format!("{pid}\n").as_bytes())
            .with_context(|| format!("the pid file {} cannot be written", self.path.display()))
    }

    pub fn keep(mut self) {
        self.written = false;
    }
}

impl Drop for Pidfile {
    fn drop(&mut self) {
        if self.written {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
