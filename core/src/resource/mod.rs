//! The kinds of state that the kernel holds for a program, one file a kind.
//!
//! Each says what its saved form is, how to collect it from a frozen [`Target`] and how to rebuild it in a skeleton.
//! It is written once, in terms of a [`Target`], and never asks which backend it runs under.

pub mod attributes;
pub mod cgroups;
pub mod credentials;
pub mod descriptors;
pub mod devices;
pub mod epoll;
pub mod eventfd;
pub mod fifos;
pub mod files;
pub mod filesystem;
pub mod inet_sockets;
pub mod inotify;
pub mod limits;
pub mod locks;
pub mod memfds;
pub mod memory;
pub mod mqueues;
pub mod pidfds;
pub mod pipes;
pub mod questions;
pub mod scheduling;
pub mod signalfd;
pub mod signals;
pub mod sockets;
pub mod strangers;
pub mod sysvipc;
pub mod tasks;
pub mod terminals;
pub mod threads;
pub mod timerfd;
pub mod timers;
pub mod unix_sockets;

use crate::backend::{DumpOptions, RestoreOptions};
use crate::batch::{Batch, Replies};
use crate::error::{DumpError, Refusal, RestoreError};
use crate::image::Image;
use crate::target::{Pid, Target, TargetError};

/// One kind of state.
///
/// Duties:
/// 1. `collect` leaves the target as it was. What it cannot save truly it refuses through its context, and goes on, so
///    that a user sees all that is in the way at once; an `Err` is for what failed.
/// 2. `check` says everything that can be known to go wrong on this host, and makes nothing.
/// 3. `rebuild` brings exactly what was saved, or fails.
///
/// There are no default bodies: "nothing to save" is written out.
pub trait Resource {
    /// The section's name: in the image, the conformance cases, `ckpt show` and every message.
    const NAME: &'static str;
    /// One process, one thread, or one open file description.
    type Scope: Scope;
    /// What is saved.
    type Saved;

    fn collect(context: &mut <Self::Scope as Scope>::Collect<'_>) -> Result<Self::Saved, DumpError>;
    fn check(saved: &Self::Saved, context: &mut Check<'_>);
    fn rebuild(saved: &Self::Saved, context: &mut <Self::Scope as Scope>::Rebuild<'_>) -> Result<(), RestoreError>;
}

/// What one saved value is about, and so what `collect` and `rebuild` are handed.
pub trait Scope {
    type Collect<'a>;
    type Rebuild<'a>;
}

/// A resource that is there once for each process.
pub struct OfProcess;
impl Scope for OfProcess {
    type Collect<'a> = Collect<'a>;
    type Rebuild<'a> = Rebuild<'a>;
}

/// A resource that is there once for each thread: [`Collect::thread`] and [`Rebuild::thread`] say which, and `run`
/// runs on it.
pub struct OfThread;
impl Scope for OfThread {
    type Collect<'a> = Collect<'a>;
    type Rebuild<'a> = Rebuild<'a>;
}

/// The sections, sorted: every kind that can be saved.
pub fn names() -> Vec<&'static str> {
    let mut names = vec![
        attributes::Attributes::NAME,
        attributes::ThreadAttributes::NAME,
        cgroups::NAME,
        credentials::ThreadCredentials::NAME,
        filesystem::ProcessFilesystem::NAME,
        limits::ResourceLimits::NAME,
        locks::NAME,
        memory::NAME,
        scheduling::ThreadScheduling::NAME,
        signals::ProcessSignals::NAME,
        signals::ThreadSignals::NAME,
        timers::ProcessTimers::NAME,
        "registers",
        sysvipc::NAME,
        tasks::NAME,
    ];
    names.extend(descriptors::KIND_NAMES);
    names.sort_unstable();
    names.dedup();
    names
}

/// A frozen process or thread, to collect from.
pub struct Collect<'a> {
    pub target: &'a mut dyn Target,
    /// Index of the thread; 0, the main thread, for what is there once for each process.
    pub thread: usize,
    pub options: &'a DumpOptions,
    pub refusals: &'a mut Vec<Refusal>,
    /// What was asked of the process, once for all kinds.
    pub asked: &'a questions::Asked,
    /// What was asked about each thread, once for all kinds.
    pub answers: &'a [threads::Answers],
    /// It has POSIX timers: signals can come while it is frozen.
    pub has_timers: bool,
    /// The section being collected.
    pub resource: &'static str,
}

impl Collect<'_> {
    /// The same process and thread, with another section's name in all messages.
    pub fn section(&mut self, resource: &'static str) -> Collect<'_> {
        Collect {
            target: &mut *self.target,
            thread: self.thread,
            options: self.options,
            refusals: &mut *self.refusals,
            asked: self.asked,
            answers: self.answers,
            has_timers: self.has_timers,
            resource,
        }
    }

    /// Collects another resource of the same process or thread.
    pub fn collect<R>(&mut self) -> Result<R::Saved, DumpError>
    where
        R: Resource,
        R::Scope: for<'x> Scope<Collect<'x> = Collect<'x>>,
    {
        R::collect(&mut self.section(R::NAME))
    }

    pub fn pid(&self) -> Pid {
        self.target.pid()
    }

    /// The id of the thread being collected from.
    pub fn tid(&self) -> Pid {
        self.target.threads()[self.thread]
    }

    /// What was asked about the thread being collected from.
    pub fn answers(&self) -> &threads::Answers {
        &self.answers[self.thread]
    }

    /// Runs a batch on the thread being collected from.
    pub fn run(&mut self, batch: &Batch) -> Result<Replies, DumpError> {
        let (resource, pid) = (self.resource, self.pid());
        self.target.run_on(self.thread, batch).map_err(|source| DumpError::Target { resource, pid, source })
    }

    /// Notes something that cannot be saved. The dump ends with all of these, before anything is harmed.
    pub fn refuse(&mut self, subject: impl Into<String>, why: impl Into<String>, help: impl Into<String>) {
        self.refusals.push(Refusal {
            resource: self.resource,
            pid: Some(self.target.pid()),
            subject: subject.into(),
            why: why.into(),
            help: help.into(),
        });
    }

    pub fn target_error(&self, source: TargetError) -> DumpError {
        DumpError::Target { resource: self.resource, pid: self.pid(), source }
    }

    /// For a file of `/proc/PID` that could not be read.
    pub fn io_error(&self, what: &str, source: std::io::Error) -> DumpError {
        DumpError::Io { what: format!("{} of process {}: {what}", self.resource, self.pid()), source }
    }
}

/// An image, to be checked against this host before anything is made.
pub struct Check<'a> {
    pub image: &'a Image,
    pub options: &'a RestoreOptions,
    pub refusals: &'a mut Vec<Refusal>,
    pub resource: &'static str,
    /// The process that the checked value belongs to, where it belongs to one.
    pub pid: Option<Pid>,
}

impl Check<'_> {
    /// Checks another resource, of the same process.
    pub fn check<R: Resource>(&mut self, saved: &R::Saved) {
        let mut section = Check {
            image: self.image,
            options: self.options,
            refusals: &mut *self.refusals,
            resource: R::NAME,
            pid: self.pid,
        };
        R::check(saved, &mut section);
    }

    pub fn refuse(&mut self, subject: impl Into<String>, why: impl Into<String>, help: impl Into<String>) {
        self.refusals.push(Refusal {
            resource: self.resource,
            pid: self.pid,
            subject: subject.into(),
            why: why.into(),
            help: help.into(),
        });
    }
}

/// A skeleton process or thread, to rebuild in.
pub struct Rebuild<'a> {
    pub target: &'a mut dyn Target,
    pub thread: usize,
    pub options: &'a RestoreOptions,
    /// What the main thread of the skeleton was like before anything was rebuilt in it. Its other threads are copies of
    /// it, so what is the same there needs no call.
    pub initial: &'a threads::Answers,
    /// Calls that wait to be run on this thread with one wake-up.
    pub deferred: &'a mut Deferred,
    /// The section being rebuilt.
    pub resource: &'static str,
}

/// Calls of several kinds for one thread, to be run together.
#[derive(Debug, Default)]
pub struct Deferred {
    batch: Batch,
    /// Where the calls of each kind begin, for errors.
    sections: Vec<(usize, &'static str)>,
}

impl Rebuild<'_> {
    /// Rebuilds another resource of the same process or thread.
    pub fn rebuild<R>(&mut self, saved: &R::Saved) -> Result<(), RestoreError>
    where
        R: Resource,
        R::Scope: for<'x> Scope<Rebuild<'x> = Rebuild<'x>>,
    {
        R::rebuild(saved, &mut self.section(R::NAME))
    }

    /// The same process and thread, with another section's name in all messages.
    pub fn section(&mut self, resource: &'static str) -> Rebuild<'_> {
        Rebuild {
            target: &mut *self.target,
            thread: self.thread,
            options: self.options,
            initial: self.initial,
            deferred: &mut *self.deferred,
            resource,
        }
    }

    /// The batch for calls that need not run at once: they run on this thread with the next
    /// [`flush`](Rebuild::flush), in their order.
    pub fn later(&mut self) -> &mut Batch {
        let deferred = &mut *self.deferred;
        if deferred.sections.last().is_none_or(|&(_, resource)| resource != self.resource) {
            deferred.sections.push((deferred.batch.len(), self.resource));
        }
        &mut deferred.batch
    }

    /// Runs what waits in [`later`](Rebuild::later).
    pub fn flush(&mut self) -> Result<(), RestoreError> {
        let Deferred { batch, sections } = std::mem::take(&mut *self.deferred);
        if batch.is_empty() {
            return Ok(());
        }
        let pid = self.pid();
        self.target.run_on(self.thread, &batch).map(drop).map_err(|source| {
            let failed = if let TargetError::Call { index, .. } = source { index } else { 0 };
            let section = sections.iter().rev().find(|&&(begin, _)| begin <= failed);
            RestoreError::Target { resource: section.map_or(self.resource, |&(_, resource)| resource), pid, source }
        })
    }

    pub fn pid(&self) -> Pid {
        self.target.pid()
    }

    /// Runs a batch on the thread being rebuilt.
    pub fn run(&mut self, batch: &Batch) -> Result<Replies, RestoreError> {
        let (resource, pid) = (self.resource, self.pid());
        self.target.run_on(self.thread, batch).map_err(|source| RestoreError::Target { resource, pid, source })
    }

    pub fn target_error(&self, source: TargetError) -> RestoreError {
        RestoreError::Target { resource: self.resource, pid: self.pid(), source }
    }

    /// What was rebuilt is not what was saved.
    pub fn mismatch(&self, what: impl Into<String>) -> RestoreError {
        RestoreError::Mismatch { resource: self.resource, pid: self.pid(), what: what.into() }
    }
}
