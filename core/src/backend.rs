//! What a backend implements, and how it registers itself.

use std::time::Duration;

use crate::error::{DumpError, Refusal, RestoreError};
use crate::image::{Image, Zombie};
use crate::names::Names;
use crate::resource::memory::Filler;
use crate::target::{NotCopied, Pid, Target, TargetError};

/// A backend, as `inventory` holds it. A crate registers with
/// `inventory::submit! { Backend { name: "ptrace", .. } }`, and whoever links it names it (`use ckpt_ptrace as _;`).
pub struct Backend {
    pub name: &'static str,
    /// One line for people.
    pub summary: &'static str,
    pub capability: fn() -> Capability,
    pub probe: fn() -> Probe,
    /// Prepares a command so that what it starts can be dumped; for backends that do not attach.
    pub launcher: Option<fn(&mut std::process::Command) -> std::io::Result<()>>,
    pub dumper: Option<fn() -> Box<dyn Dumper>>,
    pub restorer: Option<fn() -> Box<dyn Restorer>>,
}

inventory::collect!(Backend);

/// What a backend can ever do, on any host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Dumps a process that was not prepared.
    pub attach: bool,
    /// Starts programs so that they can be dumped.
    pub launch: bool,
    pub restore: bool,
    /// Section names out of [`crate::resource::names`].
    pub resources: Vec<&'static str>,
    /// What it cannot do though it has the resource, in words: "stopped processes".
    pub lacks: Vec<&'static str>,
    /// The privileges it needs, in words: "CAP_SYS_PTRACE".
    pub privileges: Vec<&'static str>,
}

/// What this host allows now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    pub dump: Availability,
    pub restore: Availability,
    /// What of this host makes a difference.
    pub features: Vec<Feature>,
}

/// Something that a host has or has not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feature {
    /// "PAGEMAP_SCAN (kernel 6.7)".
    pub name: &'static str,
    pub there: bool,
    /// What is done where it is not there, in words; empty where there is nothing that could be.
    pub instead: &'static str,
}

impl Feature {
    pub const fn new(name: &'static str, there: bool, instead: &'static str) -> Feature {
        Feature { name, there, instead }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Availability {
    Available,
    /// It works, but what makes it worth choosing is not there. With what is missing, and what is done instead.
    Reduced(String),
    /// With the reason and, where there is one, the way out.
    Unavailable(String),
}

/// How to dump.
#[derive(Clone, Debug)]
pub struct DumpOptions {
    pub shell_job: bool,
    pub tcp_close: bool,
    /// For the freeze.
    pub timeout: Duration,
}

/// Brings a running tree to a stop and to a [`Target`] for each of its processes.
///
/// Duties:
/// 1. `freeze` returns with every thread of every process of the tree stopped, and no process of the tree outside it.
/// 2. From `freeze` on, should the dumper end in any way, the tree goes on as if nothing had happened.
/// 3. What must not be dumped ([`DumpError::NotDumpable`]) is refused before anything is touched.
pub trait Dumper {
    fn freeze(&self, root: Pid, options: &DumpOptions) -> Result<Box<dyn Frozen>, DumpError>;
}

/// A frozen tree. Dropping it thaws it.
pub trait Frozen {
    /// The live processes, parents before children.
    fn processes(&self) -> &[FrozenProcess];
    fn zombies(&self) -> &[Zombie];
    /// All targets, in the order of [`processes`](Frozen::processes).
    fn targets(&mut self) -> &mut [Box<dyn Target>];
    /// The ids by which the programs know their tree, if they are not the kernel's: see [`crate::names`].
    fn virtual_ids(&mut self) -> Result<Option<Names>, DumpError>;
    /// Makes a copy of a process, by its index: it has the private memory of this instant, whatever becomes of the process, and
    /// of its descriptors none. It runs batches on its only thread, and is there to write pages.
    ///
    /// Duties:
    /// 1. No process of the tree can wait for it, or gets a signal for it.
    /// 2. It ends when it is dropped, and when the dumper ends in any way.
    ///
    /// # Errors
    /// The process is as before.
    fn copy(&mut self, process: usize, without: &NotCopied) -> Result<Box<dyn Target>, TargetError>;
    /// Lets the tree go on.
    fn thaw(self: Box<Self>) -> Result<(), DumpError>;
    /// Leaves every process stopped as by SIGSTOP.
    fn stop(self: Box<Self>) -> Result<(), DumpError>;
    /// Ends every process, and waits until they are gone.
    fn kill(self: Box<Self>) -> Result<(), DumpError>;
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrozenProcess {
    pub task: crate::image::Task,
    /// It was stopped by a signal before the freeze.
    pub stopped: bool,
}

/// How to restore.
#[derive(Clone, Debug, Default)]
pub struct RestoreOptions {
    pub shell_job: bool,
    /// ckpt ends when the tree runs. To the root of the tree that is not the end of its parent, which it may have asked to
    /// be told (`PR_SET_PDEATHSIG`).
    pub detach: bool,
    /// The processes stay in the cgroups of ckpt, whatever theirs were.
    pub ignore_cgroups: bool,
}

/// Makes the empty process tree that the resources are rebuilt in.
///
/// Duties:
/// 1. `skeleton` makes every process and thread of the image with its id, parent, session and group, and the zombies. One
///    that [`renames`](Restorer::renames) may give them other ids, which the program never sees. Right
///    after a process has begun its session, it has it take its controlling terminal
///    ([`take_controlling`](crate::resource::terminals::take_controlling)): children inherit that.
/// 2. Until `release` has let go, no process of the tree runs a single instruction of the program, and should the
///    restorer end in any way, the whole tree is gone.
/// 3. `release` lets the whole tree go at once.
pub trait Restorer {
    /// What this backend on this host cannot bring back of the image. Touches nothing.
    fn check(&self, image: &Image) -> Vec<Refusal>;
    fn skeleton(&self, image: &Image) -> Result<Box<dyn Skeleton>, RestoreError>;
    /// Whether a tree can come back though its ids are taken.
    fn renames(&self) -> bool;
    /// Who fills the memory: [`crate::resource::memory::Eager`], or a pager.
    fn filler(&self) -> Box<dyn Filler>;
}

/// An empty process tree. Dropping it ends it.
pub trait Skeleton {
    /// All targets, in the order of [`Image::processes`].
    fn targets(&mut self) -> &mut [Box<dyn Target>];
    /// The ids that the tasks of the image have got, if they are not their own.
    fn real_ids(&self) -> Option<Names>;
    /// Lets the whole tree go. Afterwards it does not depend on us any more.
    fn release(self: Box<Self>) -> Result<(), RestoreError>;
}
