//! [`Target`]: a process that runs system calls for us and shows its memory.

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};

use nix::errno::Errno;

use crate::batch::{Arg, Batch, Replies, Sysno};
use crate::procfs::ProcDir;

/// A process or thread id, in the pid namespace that the tree and ckpt share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pid(pub i32);

impl fmt::Display for Pid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An address in a target. Never dereferenced here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RemotePtr(pub u64);

impl fmt::Display for RemotePtr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A descriptor number in a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RemoteFd(pub i32);

impl fmt::Display for RemoteFd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why a target did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TargetError {
    /// A system call failed in the target.
    #[error("{call} failed in process {pid}: {errno}")]
    Call { pid: Pid, call: Sysno, index: usize, errno: Errno },
    /// The agent's answer did not come: the process ended, or was killed.
    #[error("process {pid} ended while it was being worked on")]
    Gone { pid: Pid },
    /// The answer did not come in time.
    #[error("process {pid} did not answer within {seconds} s")]
    TimedOut { pid: Pid, seconds: u64 },
    /// A batch holds more than [`MAX_CALLS`](crate::batch::MAX_CALLS) or [`MAX_BYTES`](crate::batch::MAX_BYTES).
    #[error("a batch of {calls} calls and {bytes} bytes is too large")]
    BatchTooLarge { calls: usize, bytes: usize },
    /// The copy of a process ([`Frozen::copy`](crate::backend::Frozen::copy)) is not there any more.
    #[error(
        "the copy of process {pid} that writes its memory was ended from outside (killed, or out of memory); try again"
    )]
    CopyGone { pid: Pid },
    /// The driver's own side failed.
    #[error("{operation} failed for process {pid}: {source}")]
    Driver { pid: Pid, operation: &'static str, source: std::io::Error },
}

impl TargetError {
    /// The error number, where a system call in the target or in the driver gave one.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            TargetError::Call { errno, .. } => Some(*errno),
            TargetError::Driver { source, .. } => source.raw_os_error().map(Errno::from_raw),
            _ => None,
        }
    }
}

/// The registers of a thread, in the layouts of `ptrace`: the general ones as `struct user_regs_struct`
/// (`NT_PRSTATUS`), the rest as the kernel's uncompacted xsave area (`NT_X86_XSTATE`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registers {
    pub general: General,
    pub xsave: Vec<u8>,
}

/// `struct user_regs_struct` of x86-64, in its order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct General {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub orig_rax: u64,
    pub rip: u64,
    pub cs: u64,
    pub eflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub ds: u64,
    pub es: u64,
    pub fs: u64,
    pub gs: u64,
}

/// The rseq registration of a thread (`PTRACE_GET_RSEQ_CONFIGURATION`, kernel 5.13).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rseq {
    pub address: RemotePtr,
    pub size: u32,
    pub signature: u32,
    pub flags: u32,
}

/// What a frozen thread will go on with, and what only its freezer can tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Context {
    /// Ready to go on: an interrupted system call has been wound back so that it runs again.
    pub registers: Registers,
    /// Blocked signals, bit `n-1` for signal `n`.
    pub blocked: u64,
    pub rseq: Option<Rseq>,
    /// It waits in a call with a relative timeout, and so much of it is left, in nanoseconds; where the registers do not say
    /// so, and it is known.
    pub timeout_left: Option<u64>,
}

/// A raw `siginfo_t`.
pub type SigInfo = [u8; 128];

/// A queue of pending signals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// Of the whole process.
    Shared,
    /// Of one thread, by its index in [`Target::threads`].
    Thread(usize),
}

/// A run of pages, `start` page-aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    pub start: u64,
    pub pages: u64,
}

impl PageRun {
    pub fn end(self) -> u64 {
        self.start + self.pages * PAGE_SIZE
    }
}

/// What a page table knows that no file or shared memory object tells. Both are sorted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PrivatePages {
    /// Pages with data: anonymous ones, present or swapped, and copied pages of private file mappings; not the zero page.
    pub data: Vec<PageRun>,
    /// Pages that no access may touch (`MADV_GUARD_INSTALL`, kernel 6.13), in mappings of every kind.
    pub guards: Vec<PageRun>,
}

/// Bytes in a page. ckpt runs on x86-64 only for now.
pub const PAGE_SIZE: u64 = 4096;

/// A process that runs batches of system calls for us and shows its memory.
///
/// Duties of an implementation:
/// 1. Calls run in the target, in order, with its credentials, descriptors and namespaces; no signal handler of the
///    program runs in between.
/// 2. What is there only for this purpose (mappings, descriptors) is named by [`footprint`](Target::footprint), so that
///    nobody takes it for the program's.
/// 3. When the driver goes away, in whatever way, a frozen target goes on as if nothing had happened and a skeleton
///    exits.
///
/// Not promised: that the calls of two targets run in any order, or that a failed batch undoes its first calls.
pub trait Target: Send + std::any::Any {
    fn pid(&self) -> Pid;

    /// The thread ids, the main thread first.
    fn threads(&self) -> &[Pid];

    /// The process's directory in `/proc`.
    fn proc(&self) -> &ProcDir;

    /// Runs a batch on the main thread.
    ///
    /// # Errors
    /// [`TargetError::Call`] for the first call that failed and was not allowed to.
    fn run(&mut self, batch: &Batch) -> Result<Replies, TargetError> {
        self.run_on(0, batch)
    }

    /// Runs a batch on one thread, for what the kernel keeps by thread.
    fn run_on(&mut self, thread: usize, batch: &Batch) -> Result<Replies, TargetError> {
        self.start(thread, batch)?;
        self.finish(thread, batch)
    }

    /// Has a thread begin with a batch, and does not wait for it. [`finish`](Target::finish) of the same thread comes next:
    /// meanwhile there is time for other targets and other threads.
    fn start(&mut self, thread: usize, batch: &Batch) -> Result<(), TargetError>;

    /// Waits until a thread has run the batch that it was [started](Target::start) on.
    ///
    /// # Errors
    /// As [`run_on`](Target::run_on).
    fn finish(&mut self, thread: usize, batch: &Batch) -> Result<Replies, TargetError>;

    /// Reads the target's memory.
    fn read(&mut self, from: RemotePtr, buffer: &mut [u8]) -> Result<(), TargetError>;

    /// Writes the target's memory. The pages must be writable by the target.
    fn write(&mut self, to: RemotePtr, bytes: &[u8]) -> Result<(), TargetError>;

    /// Writes the target's memory, as [`write`](Target::write), from another thread while batches run; `None` where that is
    /// not possible.
    fn writer(&self) -> Option<Box<dyn MemoryWriter>>;

    /// Copies descriptors of the target to us.
    fn fds_out(&mut self, fds: &[RemoteFd]) -> Result<Vec<OwnedFd>, TargetError>;

    /// Copies descriptors of ours into the target, close-on-exec, with numbers from
    /// [`Footprint::spare_fds`] on, where no number of the program's is.
    fn fds_in(&mut self, fds: &[BorrowedFd<'_>]) -> Result<Vec<RemoteFd>, TargetError>;

    /// Adds the calls that take one descriptor of ours, which [`send_fd`](Target::send_fd) sends once the batch has been
    /// started. What it returns stands for its number in later calls of the batch, the last of which has to close it. Should
    /// we be lost before it is sent, it stands for no descriptor.
    fn receive_fd(&self, batch: &mut Batch) -> Result<Arg, TargetError>;

    /// Sends what a batch that was started on the main thread waits for.
    fn send_fd(&mut self, fd: BorrowedFd<'_>) -> Result<(), TargetError>;

    /// Closes descriptors that [`fds_in`](Target::fds_in) brought.
    fn fds_done(&mut self, fds: &[RemoteFd]) -> Result<(), TargetError>;

    /// Says that the descriptors of these numbers are ours from now on, and no longer those that were said before. The
    /// program has none of them. A frozen target closes them should we be lost; otherwise that is for us to do.
    fn hold_fds(&mut self, numbers: std::ops::Range<i32>);

    /// Orders two kernel objects by identity (`kcmp`): equal means that they are one.
    fn compare(&self, kind: Kcmp, mine: u64, other: Pid, theirs: u64) -> Result<std::cmp::Ordering, TargetError>;

    /// Opens (`O_PATH`) the file that a handle of a mounted file system stands for, with our own privileges
    /// (`open_by_handle_at`, which takes CAP_DAC_READ_SEARCH). `mount` is any file of that file system.
    fn file_of_handle(&self, mount: BorrowedFd<'_>, kind: i32, handle: &[u8]) -> Result<OwnedFd, TargetError>;

    /// What in `start..end` only the process's own page table knows. (`PAGEMAP_SCAN`)
    fn private_pages(&mut self, start: u64, end: u64) -> Result<PrivatePages, TargetError>;

    /// What we have written over in the memory of a frozen target for as long as it is ours, below the stacks of its threads:
    /// addresses, and what was there.
    fn covered(&self) -> Vec<(RemotePtr, Vec<u8>)>;

    /// What of the target is ours.
    fn footprint(&self) -> Footprint;

    // --- while frozen ---

    /// The context of a frozen thread.
    fn context(&mut self, thread: usize) -> Result<Context, TargetError>;

    /// The pending signals of a queue, left in place.
    fn pending(&mut self, queue: Queue) -> Result<Vec<SigInfo>, TargetError>;

    // --- while a skeleton ---

    /// Sets what a thread goes on with when it is released.
    fn set_context(&mut self, thread: usize, context: &Context) -> Result<(), TargetError>;
}

/// See [`Target::writer`].
pub trait MemoryWriter: Send + Sync {
    fn write(&self, to: RemotePtr, bytes: &[u8]) -> Result<(), TargetError>;
}

/// What a copy of a process must not have from it.
#[derive(Clone, Debug, Default)]
pub struct NotCopied {
    /// Mappings that must not be copied at all, not even for a moment: the kernel counts who has them.
    pub hidden: Vec<std::ops::Range<u64>>,
    /// Mappings that the copy gives back before the process goes on.
    pub given_back: Vec<std::ops::Range<u64>>,
}

/// What of a target is ckpt's own and no part of the program.
#[derive(Clone, Debug, Default)]
pub struct Footprint {
    pub mappings: Vec<std::ops::Range<u64>>,
    pub fds: Vec<RemoteFd>,
    /// The lowest descriptor number above all of the program's: temporary ones go here.
    pub spare_fds: i32,
    /// Skeletons: where the kernel's own mappings (`[vdso]`, `[vvar]`, ...) are kept until they get their place.
    pub special: Vec<(String, std::ops::Range<u64>)>,
}

/// What `kcmp` compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kcmp {
    /// Open file descriptions: the arguments are descriptor numbers.
    File,
    /// Address spaces.
    Vm,
    /// Descriptor tables.
    Files,
    /// Root, current directory and umask.
    Fs,
    /// Signal actions.
    Sighand,
    /// System V semaphore undo lists.
    Sysvsem,
    /// I/O contexts.
    Io,
    /// An open file description and what an epoll watches: `mine` is a descriptor number, `theirs` the epoll's.
    EpollTarget(EpollSlot),
}

/// Which entry of an epoll (`struct kcmp_epoll_slot`, with the epoll's own number).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpollSlot {
    /// The number that the entry was added under.
    pub target: i32,
    /// How many entries of the same number come before it in `fdinfo`.
    pub offset: u32,
}
