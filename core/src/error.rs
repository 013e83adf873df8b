//! One error enum a phase, and [`Refusal`]: state that cannot be saved or brought back, said in full.

use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::target::{Pid, TargetError};

/// Something that ckpt will not save, or not bring back, because it could not do it truly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The resource, by its section name.
    pub resource: &'static str,
    /// The process, where it is about one.
    pub pid: Option<Pid>,
    /// What of it: "descriptor 5 (/tmp/x)", "mapping 7f00-7f10", or empty.
    pub subject: String,
    /// What is the matter.
    pub why: String,
    /// What the user can do.
    pub help: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.resource)?;
        if let Some(pid) = self.pid {
            write!(f, "process {pid}, ")?;
        }
        if !self.subject.is_empty() {
            write!(f, "{}: ", self.subject)?;
        }
        write!(f, "{}", self.why)?;
        if !self.help.is_empty() {
            write!(f, "; {}", self.help)?;
        }
        Ok(())
    }
}

fn list(refusals: &[Refusal]) -> String {
    refusals.iter().map(Refusal::to_string).collect::<Vec<_>>().join("\n")
}

/// Why a dump did not happen. The target goes on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DumpError {
    #[error("there is no process {0}")]
    NoSuchProcess(Pid),
    /// A process that is never dumped: pid 1, ckpt itself, a kernel thread, a zombie, one that is being traced.
    #[error("process {pid} cannot be dumped: {why}; {help}")]
    NotDumpable { pid: Pid, why: String, help: String },
    #[error("not permitted to attach to process {pid}: {needs}")]
    NotPermitted { pid: Pid, needs: String },
    #[error("process {pid} {what} while it was being frozen; try again")]
    Changed { pid: Pid, what: String },
    #[error(
        "process {pid} did not stop within {seconds} s (state {state}); wait until it leaves the kernel, or use a longer --timeout"
    )]
    FreezeTimedOut { pid: Pid, seconds: u64, state: char },
    /// A program that uses the interface does not want to be saved now, or has not said in time that it may be.
    #[error("process {pid} {why}; {help}")]
    NotNow { pid: Pid, why: String, help: String },
    #[error("{}", list(.0))]
    Unsupported(Vec<Refusal>),
    #[error("{resource} of process {pid}: {source}")]
    Target { resource: &'static str, pid: Pid, source: TargetError },
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("interrupted; the target goes on")]
    Interrupted,
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why a restore did not happen. Nothing of the tree runs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Found by the plan, before anything was made.
    #[error("{}", list(.0))]
    Refused(Vec<Refusal>),
    #[error("not permitted to restore: {needs}")]
    NotPermitted { needs: String },
    #[error("{resource} of process {pid}: {source}")]
    Target { resource: &'static str, pid: Pid, source: TargetError },
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    /// What was rebuilt is not what was saved.
    #[error("{resource} of process {pid}: {what}")]
    Mismatch { resource: &'static str, pid: Pid, what: String },
    #[error("interrupted; nothing of the tree was left behind")]
    Interrupted,
}

/// Why an image could not be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    #[error("{path}: {what}: {source}", path = path.display())]
    Io { path: PathBuf, what: &'static str, source: io::Error },
    #[error("{path}: not a ckpt image ({why})", path = .path.display())]
    NotAnImage { path: PathBuf, why: String },
    #[error("{path}: image format version {found}, this ckpt reads up to {newest}; use a newer ckpt", path = .path.display())]
    NewerVersion { path: PathBuf, found: u32, newest: u32 },
    #[error("{path}: torn image ({why}); the dump or a copy of it did not finish", path = .path.display())]
    Torn { path: PathBuf, why: String },
    #[error("{path}: damaged image ({why}); use another copy of it", path = .path.display())]
    Damaged { path: PathBuf, why: String },
    /// What was to be written could not have been read. Nothing was written.
    #[error("{path}: the image was not written, as it would be faulty ({why}); this is a mistake in ckpt", path = .path.display())]
    Unwritable { path: PathBuf, why: String },
    #[error("{path}: {why}", path = .path.display())]
    Directory { path: PathBuf, why: String },
}
