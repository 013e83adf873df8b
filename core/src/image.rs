//! The model of a saved tree. `ckpt-formats` turns it into bytes; nothing here knows how.

use crate::resource::{
    attributes, cgroups, credentials, descriptors, files, filesystem, limits, locks, memory, scheduling, signals,
    sysvipc, timers,
};
use crate::target::{Context, Pid};

/// A saved tree.
#[derive(Clone, Debug, PartialEq)]
pub struct Image {
    pub host: HostFacts,
    /// Live processes, parents before children; the first is the root of the tree.
    pub processes: Vec<Process>,
    /// Processes that have exited and were not waited for.
    pub zombies: Vec<Zombie>,
    /// Open file descriptions of the whole tree; a [`descriptors::FileId`] is an index.
    pub files: Vec<descriptors::OpenFile>,
    /// Memory that several mappings or descriptors share; a [`memory::ObjectId`] is an index.
    pub memory_objects: Vec<memory::Object>,
    /// Files that no name leads to any more, open or mapped; a [`files::DeletedId`] is an index.
    pub deleted_files: Vec<files::DeletedFile>,
    pub locks: Vec<locks::Lock>,
    pub sysvipc: sysvipc::SystemV,
    /// The tree belongs to a session whose leader is not in it, and goes on in the session of the restorer.
    pub shell_job: bool,
    /// State that the user allowed to be lost, in words.
    pub losses: Vec<String>,
}

/// What the host of the dump was, as far as a restore depends on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFacts {
    /// `uname -m`.
    pub architecture: String,
    /// `uname -r`, for people.
    pub kernel: String,
    /// `XCR0` features the saved register areas may hold.
    pub xsave_features: u64,
    /// Bytes of the largest saved xsave area.
    pub xsave_size: u32,
    /// Names of the CPU features programs may have chosen code by, as in `/proc/cpuinfo`.
    pub cpu_features: Vec<String>,
    /// CRC-32C of the vdso: code in it may be on a saved stack.
    pub vdso_checksum: u32,
    /// `/proc/sys/kernel/random/boot_id` and `/etc/machine-id` (empty where there is none): whether inode numbers
    /// mean the same at the restore.
    pub boot_id: String,
    pub machine_id: String,
    /// Seconds since 1970 at the dump.
    pub time: u64,
    /// `CLOCK_MONOTONIC` and `CLOCK_BOOTTIME` at the freeze, in nanoseconds.
    pub monotonic: u64,
    pub boottime: u64,
    /// Version of the ckpt that wrote it.
    pub ckpt_version: String,
}

/// The ids of a process and its place in the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    pub pid: Pid,
    /// Of the root: the parent at the dump, which is not part of the tree.
    pub ppid: Pid,
    pub pgid: Pid,
    pub sid: Pid,
    /// The signal its parent gets when it exits.
    pub exit_signal: i32,
    pub comm: Vec<u8>,
}

/// A process that had exited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Zombie {
    pub task: Task,
    /// As `waitpid` gives it.
    pub status: i32,
}

/// A live process.
#[derive(Clone, Debug, PartialEq)]
pub struct Process {
    pub task: Task,
    /// Stopped by a signal (state `T`), and to be stopped again.
    pub stopped: bool,
    pub memory: memory::Memory,
    pub descriptors: descriptors::Table,
    pub filesystem: filesystem::Filesystem,
    pub signals: signals::Process,
    pub timers: timers::Timers,
    pub limits: limits::Limits,
    pub attributes: attributes::Process,
    pub cgroups: cgroups::Cgroups,
    /// The main thread first.
    pub threads: Vec<Thread>,
}

/// A thread.
#[derive(Clone, Debug, PartialEq)]
pub struct Thread {
    pub tid: Pid,
    pub context: Context,
    pub signals: signals::Thread,
    pub credentials: credentials::Credentials,
    pub scheduling: scheduling::Scheduling,
    pub attributes: attributes::Thread,
}

impl Image {
    /// The index of the live process with this id.
    pub fn process(&self, pid: Pid) -> Option<usize> {
        self.processes.iter().position(|process| process.task.pid == pid)
    }
}
