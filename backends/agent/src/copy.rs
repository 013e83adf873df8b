//! A copy of a frozen process: it has the memory of that instant, and writes it while the process goes on.
//!
//! The agent makes it (`copy_process` in the blob), through a go-between that ends at once, so that it is the child of whoever
//! inherits orphans and no child of the program. It serves in a lane of its own, the last of the region, on a socket that was
//! made for it, and ends when that is closed.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use ckpt_core::batch::{Arg, Batch, MAX_CALLS, Replies, Sysno};
use ckpt_core::procfs::ProcDir;
use ckpt_core::resource::memory::COPY_NAME;
use ckpt_core::{
    Context, Footprint, Kcmp, MemoryWriter, NotCopied, Pid, PrivatePages, Queue, RemoteFd, RemotePtr, SigInfo, Target,
    TargetError, args,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use crate::channel::Channel;
use crate::sys;

/// A copy of a process. Dropped, it is gone.
pub struct Copied {
    /// The process that it is a copy of, as all messages have it.
    original: Pid,
    tids: [Pid; 1],
    proc: ProcDir,
    pidfd: OwnedFd,
    channel: Option<Channel>,
}

impl Copied {
    /// Has the agent of a frozen process make one. `idle` is called now and then while nothing comes.
    ///
    /// # Errors
    /// The process is as before, and there is no copy.
    pub fn make(
        original: Pid,
        agent: &mut Channel,
        without: &NotCopied,
        idle: &mut dyn FnMut() -> Result<(), TargetError>,
    ) -> Result<Copied, TargetError> {
        let failed = |operation: &'static str, source| TargetError::Driver { pid: original, operation, source };
        let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
        let (ours, theirs) = pair.map_err(|errno| failed("socketpair", errno.into()))?;
        let mut channel = agent.lane_of_copy(ours);
        // One batch, which is run to its end even if we are lost.
        let mut batch = Batch::new();
        if !batch.has_room(2 * without.hidden.len() + 3, 0) {
            return Err(failed("copying", io::Error::other("it has too many System V segments")));
        }
        let socket = agent.receive_one(&mut batch)?;
        for hidden in &without.hidden {
            batch.call(Sysno::madvise, args![hidden.start, hidden.end - hidden.start, libc::MADV_DONTFORK]);
        }
        let (_, stack_size) = channel.stack();
        let copied = batch.copy_process(channel.address(), channel.stack().0 + stack_size, socket);
        for hidden in &without.hidden {
            batch.try_call(Sysno::madvise, args![hidden.start, hidden.end - hidden.start, libc::MADV_DOFORK]);
        }
        batch.try_call(Sysno::close, &[socket]);
        agent.send(&batch)?;
        let passed = agent.pass(&[theirs.as_fd()]);
        drop(theirs);
        let replies = agent.finish(&batch, idle)?;
        passed?;
        let pid = match replies.result(copied) {
            Ok(pid) => Pid(pid as i32),
            Err(errno) => return Err(failed("clone", errno.into())),
        };
        channel.socket_is_known();
        // From here on it ends with the socket.
        let pidfd = sys::pidfd_open(pid.0).map_err(|source| failed("pidfd_open of the copy", source))?;
        let proc = ProcDir::open(pid).map_err(|source| failed("opening /proc of the copy", source))?;
        prepare(&mut channel, &without.given_back, original)?;
        // It has answered, so the pid is its own, and nobody else's.
        Ok(Copied { original, tids: [pid], proc, pidfd, channel: Some(channel) })
    }

    fn unsupported(&self, operation: &'static str) -> TargetError {
        TargetError::Driver { pid: self.original, operation, source: io::ErrorKind::Unsupported.into() }
    }

    fn gone(&self, error: TargetError) -> TargetError {
        match error {
            TargetError::Gone { pid } => TargetError::CopyGone { pid },
            other => other,
        }
    }
}

/// Has a new copy look like what it is, take no part in what the program does, and be the first to go when memory is short.
fn prepare(channel: &mut Channel, given_back: &[Range<u64>], original: Pid) -> Result<(), TargetError> {
    let mut batch = Batch::new();
    // Out of the group and the session, which get signals together.
    batch.call(Sysno::setsid, args![]);
    // Whatever class and processors the program has for itself.
    let priority = batch.words(&[0]);
    batch.try_call(Sysno::sched_setscheduler, args![0, libc::SCHED_OTHER, priority]);
    let processors = batch.bytes(&[0xff; 1024]);
    batch.try_call(Sysno::sched_setaffinity, args![0, processors.len(), processors]);
    let (path, most) = (batch.string(b"/proc/self/oom_score_adj"), batch.bytes(b"1000"));
    let file = batch.try_call(Sysno::openat, args![libc::AT_FDCWD, path, libc::O_WRONLY | libc::O_CLOEXEC]);
    batch.try_call(Sysno::write, args![file, most, most.len()]);
    batch.try_call(Sysno::close, args![file]);
    // Whoever finds it by its name finds it with nothing of its own open but the socket.
    let name = batch.string(COPY_NAME.as_bytes());
    batch.call(Sysno::prctl, args![libc::PR_SET_NAME, name]);
    for mapping in given_back {
        if !batch.has_room(1, 0) {
            run(channel, &std::mem::take(&mut batch), original)?;
        }
        batch.call(Sysno::munmap, args![mapping.start, mapping.end - mapping.start]);
    }
    run(channel, &batch, original)
}

fn run(channel: &mut Channel, batch: &Batch, original: Pid) -> Result<(), TargetError> {
    debug_assert!(batch.len() <= MAX_CALLS);
    match channel.run(batch, &mut || Ok(())) {
        Ok(_) => Ok(()),
        Err(TargetError::Gone { .. }) => Err(TargetError::CopyGone { pid: original }),
        Err(error) => Err(error),
    }
}

impl Drop for Copied {
    /// What it holds of the program's memory is free when this returns.
    fn drop(&mut self) {
        let _ = sys::pidfd_kill(self.pidfd.as_fd());
        // Where we may not kill it, it ends by itself.
        self.channel = None;
        let mut ended = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut ended, PollTimeout::from(10_000u16));
        // If we are who inherits orphans, it is ours to wait for.
        sys::reap(self.pidfd.as_fd());
    }
}

impl Target for Copied {
    fn pid(&self) -> Pid {
        self.original
    }

    fn threads(&self) -> &[Pid] {
        &self.tids
    }

    fn proc(&self) -> &ProcDir {
        &self.proc
    }

    fn start(&mut self, _thread: usize, batch: &Batch) -> Result<(), TargetError> {
        let sent = self.channel.as_mut().expect("there until it is dropped").send(batch);
        sent.map_err(|error| self.gone(error))
    }

    fn finish(&mut self, _thread: usize, batch: &Batch) -> Result<Replies, TargetError> {
        let finished = self.channel.as_mut().expect("there until it is dropped").finish(batch, &mut || Ok(()));
        finished.map_err(|error| self.gone(error))
    }

    fn read(&mut self, _from: RemotePtr, _buffer: &mut [u8]) -> Result<(), TargetError> {
        Err(self.unsupported("reading memory of a copy"))
    }

    fn write(&mut self, _to: RemotePtr, _bytes: &[u8]) -> Result<(), TargetError> {
        Err(self.unsupported("writing memory of a copy"))
    }

    fn writer(&self) -> Option<Box<dyn MemoryWriter>> {
        None
    }

    fn fds_out(&mut self, _fds: &[RemoteFd]) -> Result<Vec<OwnedFd>, TargetError> {
        Err(self.unsupported("fetching descriptors of a copy"))
    }

    fn fds_in(&mut self, _fds: &[BorrowedFd<'_>]) -> Result<Vec<RemoteFd>, TargetError> {
        Err(self.unsupported("passing descriptors to a copy"))
    }

    fn receive_fd(&self, batch: &mut Batch) -> Result<Arg, TargetError> {
        self.channel.as_ref().expect("there until it is dropped").receive_one(batch)
    }

    fn send_fd(&mut self, fd: BorrowedFd<'_>) -> Result<(), TargetError> {
        self.channel.as_ref().expect("there until it is dropped").pass(&[fd])
    }

    fn fds_done(&mut self, _fds: &[RemoteFd]) -> Result<(), TargetError> {
        Err(self.unsupported("passing descriptors to a copy"))
    }

    fn hold_fds(&mut self, _numbers: std::ops::Range<i32>) {}

    fn compare(&self, _: Kcmp, _: u64, _: Pid, _: u64) -> Result<std::cmp::Ordering, TargetError> {
        Err(self.unsupported("comparing a copy"))
    }

    fn file_of_handle(&self, _: BorrowedFd<'_>, _: i32, _: &[u8]) -> Result<OwnedFd, TargetError> {
        Err(self.unsupported("opening a handle for a copy"))
    }

    fn private_pages(&mut self, _: u64, _: u64) -> Result<PrivatePages, TargetError> {
        Err(self.unsupported("finding the pages of a copy"))
    }

    fn covered(&self) -> Vec<(RemotePtr, Vec<u8>)> {
        Vec::new()
    }

    fn footprint(&self) -> Footprint {
        Footprint::default()
    }

    fn context(&mut self, _thread: usize) -> Result<Context, TargetError> {
        Err(self.unsupported("registers of a copy"))
    }

    fn pending(&mut self, _queue: Queue) -> Result<Vec<SigInfo>, TargetError> {
        Err(self.unsupported("signals of a copy"))
    }

    fn set_context(&mut self, _thread: usize, _context: &Context) -> Result<(), TargetError> {
        Err(self.unsupported("setting registers of a copy"))
    }
}
