//! `ckpt restore`: brings a process tree back.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use ckpt_core::backend::RestoreOptions;
use ckpt_core::image::Image;
use ckpt_core::procfs::ProcDir;
use ckpt_core::resource::cgroups;
use ckpt_core::restore::prepare;
use ckpt_core::store::ImageReader;
use ckpt_core::{Pid, RestoreError, Restorer};

use ckpt_userfault::{Figures, Host, OnLoss, Pager, PagesFrom, Stub, Told, UserfaultRestorer, WorkingSetUse};

use crate::failure::Usage;
use crate::page_server::Shown;
use crate::progress::Bar;
use crate::requests::Listener;
use crate::supervise::{self, Chore, Terminal};
use crate::{backends, human, output, sys};

/// Bring the processes of an image back, with their old ids as far as they can see
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ckpt restore -D image                   bring the tree back, wait for it, and
                                          end with its status
  ckpt restore -D image -d --pidfile pid  bring it back into the background
  ckpt restore -D image --shell-job       bring a job back onto this terminal
  ckpt --backend userfault restore -D image -d
                                          have it run at once; its memory follows

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

    /// What becomes of the tree if whoever brings in its memory is lost, or finds the image damaged
    #[arg(long, value_name = "WHAT", help_heading = LAZY)]
    on_pager_loss: Option<Loss>,

    /// With --detach: stay until all memory is there, and print figures as JSON
    #[arg(long, requires = "detach", help_heading = LAZY)]
    json: bool,

    /// Note which pages are touched first, for so many seconds or until `ckpt working-set stop`; the next restore
    /// brings them in before the release
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, require_equals = true, help_heading = LAZY)]
    record_working_set: Option<Option<u64>>,

    /// Do not bring in the recorded working set before the release
    #[arg(long, conflicts_with = "record_working_set", help_heading = LAZY)]
    ignore_working_set: bool,

    /// Record the working set in this directory, and look for it there, instead of beside the image: if that is at a
    /// page server, or not to be written
    #[arg(long, value_name = "DIR", conflicts_with = "ignore_working_set", help_heading = LAZY)]
    working_set: Option<PathBuf>,

    /// Get the image from a page server: -D is its name there
    #[arg(long, value_name = "HOST:PORT", help_heading = LAZY)]
    pages_from: Option<String>,

    #[command(flatten)]
    shown: Shown,

    /// How long the page server may be gone before the tree is given up (30)
    #[arg(long, value_name = "SECONDS", requires = "pages_from", help_heading = LAZY)]
    pages_timeout: Option<u64>,

    /// Bring in only what is asked for: for tests
    #[arg(long, hide = true, help_heading = LAZY)]
    no_sweep: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Cgroups {
    Join,
    Ignore,
}

const LAZY: &str = "With --backend userfault";

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Loss {
    /// It is killed (the default)
    Kill,
    /// It is stopped, to be looked at
    Stop,
}

fn is_lazy(backend: Option<&str>) -> bool {
    backend == Some("userfault")
}

impl Restore {
    /// Options that are of no use with this backend, or with each other.
    fn check(&self, backend: Option<&str>) -> anyhow::Result<()> {
        let lazy = [
            ("--on-pager-loss", self.on_pager_loss.is_some()),
            ("--json", self.json),
            ("--record-working-set", self.record_working_set.is_some()),
            ("--ignore-working-set", self.ignore_working_set),
            ("--working-set", self.working_set.is_some()),
            ("--pages-from", self.pages_from.is_some()),
            ("--token-file or --tls-certificate", self.shown.is_given()),
        ];
        if let Some((option, _)) = lazy.into_iter().find(|(_, given)| *given && !is_lazy(backend)) {
            return Err(Usage(format!("{option} goes with --backend userfault")).into());
        }
        if self.pages_from.is_some() && self.record_working_set.is_some() && self.working_set.is_none() {
            let why = "with --pages-from a recording takes --working-set DIR, a directory of this host to keep it in";
            return Err(Usage(why.into()).into());
        }
        Ok(())
    }

    fn page_server(&self) -> anyhow::Result<Option<PagesFrom>> {
        let Some(address) = &self.pages_from else {
            if self.shown.is_given() {
                return Err(Usage("tokens and certificates go with --pages-from".into()).into());
            }
            return Ok(None);
        };
        let image = self.directory.to_str().ok_or_else(|| Usage("the image's name must be UTF-8".into()))?;
        Ok(Some(PagesFrom {
            address: address.clone(),
            image: image.to_string(),
            credentials: self.shown.read()?,
            patience: Duration::from_secs(self.pages_timeout.unwrap_or(30)),
        }))
    }

    fn working_set(&self, stub: Option<&Stub>) -> anyhow::Result<WorkingSetUse> {
        if self.ignore_working_set {
            return Ok(WorkingSetUse::Ignore);
        }
        let beside = stub.is_none().then_some(&self.directory);
        let Some(within) = self.record_working_set else {
            // The pager works in another directory.
            let directory = self.working_set.as_ref().or(beside).and_then(|directory| directory.canonicalize().ok());
            let fetched = stub.map(Stub::working_sets).cloned().unwrap_or_default();
            return Ok(WorkingSetUse::Use { directory, fetched });
        };
        let directory = self.working_set.as_ref().unwrap_or(&self.directory);
        let failed = |why: String| anyhow::anyhow!("no working set can be recorded in {}: {why}", directory.display());
        let found = directory.canonicalize().map_err(|error| failed(error.to_string()))?;
        nix::unistd::access(&found, nix::unistd::AccessFlags::W_OK).map_err(|errno| failed(errno.to_string()))?;
        Ok(WorkingSetUse::Record { directory: found, within: within.map(Duration::from_secs) })
    }
}

/// The restorer, and the same as what it is where its memory follows.
enum Way {
    Plain(Box<dyn Restorer>),
    Lazy(Box<UserfaultRestorer>),
}

impl Way {
    fn lazy(verb: &Restore, begun: Instant, server: Option<(PagesFrom, &Stub)>) -> anyhow::Result<Way> {
        if let Some(why) = Host::here().obstacle() {
            output::tell_aside(&why);
        }
        let working_set = verb.working_set(server.as_ref().map(|(_, stub)| *stub))?;
        Ok(Way::Lazy(Box::new(UserfaultRestorer::new(ckpt_userfault::Options {
            on_loss: match verb.on_pager_loss {
                Some(Loss::Stop) => OnLoss::Stop,
                _ => OnLoss::Kill,
            },
            sweep: !verb.no_sweep,
            working_set,
            pages_from: server.map(|(from, _)| from),
            begun,
            ..Default::default()
        }))))
    }

    fn restorer(&self) -> &dyn Restorer {
        match self {
            Way::Plain(restorer) => &**restorer,
            Way::Lazy(restorer) => &**restorer,
        }
    }

    fn fetch_eager(&self, stub: Option<&Stub>, reader: &dyn ImageReader) -> anyhow::Result<()> {
        if let (Way::Lazy(restorer), Some(stub)) = (self, stub)
            && let Some(from) = &restorer.options().pages_from
        {
            ckpt_userfault::fetch_eager(from, stub, reader, restorer.options()).map_err(anyhow::Error::msg)?;
        }
        Ok(())
    }

    /// With the cause, where that is what befell the pager.
    fn explain(&self, error: RestoreError) -> anyhow::Error {
        let cause = match self {
            Way::Lazy(restorer) if !matches!(error, RestoreError::Refused(_) | RestoreError::Interrupted) => {
                restorer.failure()
            }
            _ => None,
        };
        match cause {
            Some(cause) => anyhow::anyhow!("{cause}; nothing of the tree runs ({error})"),
            None => error.into(),
        }
    }

    fn pager(&self) -> Option<Pager> {
        match self {
            Way::Plain(_) => None,
            Way::Lazy(restorer) => restorer.pager(),
        }
    }
}

/// The pager, listened to while ckpt waits for the tree.
struct Listening {
    pager: Option<Pager>,
}

impl Chore for Listening {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.pager.as_ref().map(Pager::fd)
    }

    fn work(&mut self) -> anyhow::Result<()> {
        let Some(pager) = &self.pager else { return Ok(()) };
        let mut ready = [nix::poll::PollFd::new(pager.fd(), nix::poll::PollFlags::POLLIN)];
        if !matches!(nix::poll::poll(&mut ready, nix::poll::PollTimeout::ZERO), Ok(1..)) {
            return Ok(());
        }
        match pager.listen() {
            Told::Done(figures) => tracing::info!("{}", in_words(&figures)),
            Told::Failed(why) => output::tell_aside(&format!("error: {why}")),
        }
        self.pager = None;
        Ok(())
    }

    fn take(&mut self, _signal: i32) -> Option<Option<ExitCode>> {
        None
    }
}

/// The figures of a lazy restore in a line.
fn in_words(figures: &Figures) -> String {
    let pages = &figures.pages;
    let mut text = format!(
        "all memory is there after {}: {} pages before the release, {} by {} faults (median {:.0} us, 99 % within {:.0} us), \
         {} in the background",
        human::duration(Duration::from_micros(figures.complete_us)),
        pages.eager,
        pages.fault + pages.around,
        figures.faults,
        figures.fault_latency_us.p50,
        figures.fault_latency_us.p99,
        pages.sweep,
    );
    if pages.working_set > 0 {
        text += &format!(", {} of the working set", pages.working_set);
    }
    if let Some(recorded) = &figures.recorded {
        text += &format!("; recorded a working set of {} pages", recorded.pages);
        if let Some(before) = &recorded.before {
            let (rate, wasted) = (before.hit_rate, before.wasted);
            text += &format!(", of which the one before had {rate:.1} %, and {wasted} pages for nothing");
        }
    }
    if let Some(trouble) = &figures.working_set_trouble {
        text += &format!("; {trouble}");
    }
    text
}

pub fn run(backend: Option<&str>, verb: &Restore) -> anyhow::Result<ExitCode> {
    let begun = Instant::now();
    let plain = backends::restorer(backend)?;
    verb.check(backend)?;
    let from = verb.page_server()?;
    let mut pidfile = verb.pidfile.as_deref().map(Pidfile::new).transpose()?;
    sys::interrupt_on_signals();
    let stub = from.as_ref().map(|from| ckpt_userfault::fetch(from).map_err(anyhow::Error::msg)).transpose()?;
    let way = match is_lazy(backend) {
        false => Way::Plain(plain),
        true => Way::lazy(verb, begun, from.zip(stub.as_ref()))?,
    };
    let reader = match &stub {
        None => ckpt_formats::open(&verb.directory)?,
        Some(stub) => ckpt_formats::open_files(stub.name(), stub.files().context("opening what was fetched")?)?,
    };
    way.fetch_eager(stub.as_ref(), &*reader)?;
    wait_for_the_dead(reader.image());
    let ignore_cgroups = verb.cgroup == Cgroups::Ignore;
    let options = RestoreOptions { shell_job: verb.shell_job, detach: verb.detach, ignore_cgroups };
    let lost = if ignore_cgroups { cgroups::losses(reader.image()) } else { Vec::new() };
    // A restore that fails gives its settings back.
    let terminal = if verb.shell_job { Terminal::open() } else { None };
    let mut bar = Bar::new();
    let prepared = prepare(way.restorer(), &*reader, &options, &mut bar).map_err(|error| way.explain(error))?;
    drop(bar);

    let root = prepared.root();
    // From here on signals wait: what comes before the release undoes it, what comes after it is passed on.
    let signals = (!verb.detach).then(supervise::Signals::hold).transpose()?;
    let listener = (!verb.detach).then(Listener::new);
    if let Some(pidfile) = &mut pidfile {
        pidfile.write(root)?;
    }
    if let Some(terminal) = terminal.as_ref().filter(|_| !verb.detach) {
        terminal.give(root);
    }
    prepared.release().map_err(|error| way.explain(error))?;
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
    drop(stub);
    let pager = way.pager();
    let Some(signals) = signals else {
        output::tell_apart(
            verb.json,
            &format!(
                "restored process {root} from {} in {}{}",
                verb.directory.display(),
                human::duration(begun.elapsed()),
                if pager.is_some() { "; its memory follows" } else { "" }
            ),
        );
        if !verb.json {
            return Ok(ExitCode::SUCCESS);
        }
        let figures = match (pager.map(|pager| pager.listen()), &way) {
            (Some(Told::Done(figures)), _) => *figures,
            (Some(Told::Failed(why)), _) => return Err(anyhow::anyhow!(why)),
            (None, Way::Lazy(restorer)) => restorer.figures_without_pager(),
            (None, Way::Plain(_)) => return Ok(ExitCode::SUCCESS),
        };
        output::print(&format!("{}\n", serde_json::to_string_pretty(&figures)?));
        return Ok(ExitCode::SUCCESS);
    };
    let mut listening = Listening { pager };
    let mut requests = listener.map(|listener| listener.serve(root, None));
    let mut chores: Vec<&mut dyn Chore> = vec![&mut listening];
    chores.extend(requests.as_mut().map(|requests| requests as &mut dyn Chore));
    supervise::wait(root, signals, terminal.as_ref(), &mut chores)
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
