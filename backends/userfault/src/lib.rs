//! The `userfault` backend: restores with the memory still in the image, and brings pages in when they are touched.
//!
//! ```text
//! restore:  skeleton, resources, release   by the ptrace backend
//!           memory                         restorer (registers, hands over) -> pager (faults, sweep) <- guardian
//! ```
//!
//! The restorer of the ptrace backend does everything but the memory. Private anonymous memory is registered with a
//! userfaultfd (userfaultfd(2)) that each process of the skeleton makes and passes out; the rest is filled as ever. The
//! pager (`pager.rs`) is a process of its own, which answers faults and brings the rest in behind them. When it has, it
//! closes the descriptors, and nothing of it is left. What happens when it is killed before that is the business of the
//! guardian (`guardian.rs`).
//!
//! Shared memory that only mappings lead to is registered as well, in every process that maps it, with a userfaultfd of its
//! own. The pager puts pages into the memory itself, through a mapping that it makes of it.
//!
//! Filled before the release, as the kernel or the promise of the memory wants it so: changed pages of private file
//! mappings, shared memory that descriptors lead to (what goes through these does not wait for a page), locked memory, and
//! mappings with only a few pages.

#![deny(unsafe_code)]

mod ahead;
mod figures;
mod guardian;
mod guess;
mod outstanding;
mod page_server;
mod pager;
mod probe;
mod restorer;
mod shared;
mod source;
#[allow(unsafe_code)]
mod sys;
mod working_set;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use ckpt_core::resource::descriptors::FileKind;
use ckpt_core::resource::memory::{Mapping, Memory, Object, ObjectId, ObjectKind, Source};
use ckpt_core::{Backend, Capability, Image, inventory, resource};

pub use figures::{Compared, Figures, Percentiles, Recorded, Sources};
pub use guess::leave_first_guess;
pub use page_server::Token;
pub use page_server::channel::{Credentials, Tls};
pub use page_server::client::{PagesFrom, Stub, fetch, fetch_eager};
pub use page_server::server::PageServer;
pub use restorer::{Pager, Told, UserfaultRestorer};
pub use working_set::{Fetched, WorkingSet, stop_recording};

inventory::submit! {
    Backend {
        name: "userfault",
        summary: "restores at once, and brings the memory in on demand (userfaultfd)",
        capability,
        probe: probe::probe,
        launcher: None,
        dumper: None,
        restorer: Some(|| Box::new(UserfaultRestorer::new(Options::default()))),
    }
}

/// What it can ever do. Also for those who register it once more, with other options.
pub fn capability() -> Capability {
    Capability {
        attach: false,
        launch: false,
        restore: true,
        resources: resource::names(),
        lacks: Vec::new(),
        privileges: vec!["those of the ptrace backend, whose restorer it uses"],
    }
}

pub use probe::{Host, NEEDED, SHARED, Way, probe};

/// How to restore lazily.
#[derive(Clone, Debug)]
pub struct Options {
    /// What becomes of the tree if the pager is lost.
    pub on_loss: OnLoss,
    /// Bring in what nobody asked for, too. Without it every page comes by a fault, by itself, until the pager gets
    /// SIGUSR1: for tests.
    pub sweep: bool,
    /// Mappings with at most so many saved pages are filled before the release: a fault costs as much as ten pages.
    pub eager_pages: u64,
    /// What to do with the working set of the image.
    pub working_set: WorkingSetUse,
    /// What of the memory may follow.
    pub host: Host,
    /// A page server, where the page file is only the stub of one ([`fetch`]).
    pub pages_from: Option<PagesFrom>,
    /// When the restore began, for the figures.
    pub begun: Instant,
}

/// What to do with the working set of an image: a file in its directory, or in another that is meant for it. Paths are
/// absolute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WorkingSetUse {
    Ignore,
    /// Bring it in before the release, if there is one.
    Use {
        directory: Option<PathBuf>,
        fetched: Fetched,
    },
    /// Note which pages are touched from the release on, for as long as this, or until [`stop_recording`]. Meanwhile
    /// nothing else is brought in. One that was there before is not used, but compared.
    Record {
        directory: PathBuf,
        within: Option<Duration>,
    },
}

impl Default for Options {
    fn default() -> Options {
        Options {
            on_loss: OnLoss::Kill,
            sweep: true,
            eager_pages: 16,
            working_set: WorkingSetUse::Ignore,
            host: Host::here().clone(),
            pages_from: None,
            begun: Instant::now(),
        }
    }
}

/// What becomes of the tree if its memory can no longer be brought in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnLoss {
    /// It is killed.
    Kill,
    /// It is stopped, to be looked at. Whoever is continued and touches a missing page is stopped again.
    Stop,
}

impl OnLoss {
    fn signal(self) -> i32 {
        match self {
            OnLoss::Kill => libc::SIGKILL,
            OnLoss::Stop => libc::SIGSTOP,
        }
    }
}

/// Below this nothing is registered: see [`sys::Userfault::probe`].
const LOWEST: u64 = 16 << 20;

/// The objects whose pages are brought in later: those that nobody can reach but through mappings of the tree, which are
/// all registered. A descriptor leads around that: `read` would find a hole where a page is missing.
fn lazy_objects<'a>(image: &'a Image, options: &'a Options) -> impl Iterator<Item = (ObjectId, &'a Object)> {
    let all = image.memory_objects.iter().enumerate().map(|(index, object)| (ObjectId(index as u32), object));
    all.filter(|(id, object)| is_lazy_object(image, *id, object, options))
}

fn is_lazy_object(image: &Image, id: ObjectId, object: &Object, options: &Options) -> bool {
    const NO_MORE_WRITES: u32 = (libc::F_SEAL_WRITE | libc::F_SEAL_FUTURE_WRITE) as u32;
    let is_unreachable = match &object.kind {
        ObjectKind::Anonymous => true,
        // Whoever has its id may attach it.
        ObjectKind::Segment { .. } => false,
        ObjectKind::Memfd { seals, .. } => {
            let is_it = |kind: &FileKind| matches!(kind, FileKind::Memfd(memfd) if memfd.object == id);
            seals & NO_MORE_WRITES == 0 && !image.files.iter().any(|file| is_it(&file.kind))
        }
    };
    let pages: u64 = object.pages.iter().map(|run| run.extent.pages).sum();
    if !is_unreachable || pages <= options.eager_pages || !options.host.lets_shared_memory_follow() {
        return false;
    }
    let mappings = image.processes.iter().flat_map(|process| &process.memory.mappings);
    let mut windows = mappings.filter(|mapping| object_of(mapping).is_some_and(|(of, _)| of == id)).peekable();
    windows.peek().is_some()
        && windows.all(|mapping| {
            // The kernel registers only what may be made writable.
            let writable = matches!(mapping.source, Source::Object { writable: true, .. });
            mapping.shared && writable && !is_locked(mapping) && mapping.guards.is_empty() && mapping.start >= LOWEST
        })
}

/// The object that a mapping is of, and where it begins in it.
fn object_of(mapping: &Mapping) -> Option<(ObjectId, u64)> {
    match mapping.source {
        Source::Object { id, offset, .. } => Some((id, offset)),
        _ => None,
    }
}

/// Locked memory was promised to be there.
fn is_locked(mapping: &Mapping) -> bool {
    mapping.flags.contains(b"lo") && !mapping.flags.contains(b"lf")
}

/// The mappings whose pages are brought in later.
fn lazy_mappings<'a>(memory: &'a Memory, options: &'a Options) -> impl Iterator<Item = &'a Mapping> {
    memory.mappings.iter().filter(|mapping| is_lazy(memory, mapping, options))
}

fn is_lazy(memory: &Memory, mapping: &Mapping, options: &Options) -> bool {
    let pages: u64 = mapping.pages.iter().map(|run| run.extent.pages).sum();
    // Whoever reads /proc/PID/cmdline or environ does not wait for a fault to be answered, but gets nothing.
    let layout = &memory.layout;
    let named =
        layout.arg_start.min(layout.env_start) < mapping.end && layout.arg_end.max(layout.env_end) > mapping.start;
    options.host.lets_memory_follow()
        && mapping.source == Source::Anonymous
        && !mapping.shared
        && !is_locked(mapping)
        && !named
        && pages > options.eager_pages
        && mapping.start >= LOWEST
}
