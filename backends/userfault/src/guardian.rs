//! What stands between a lost pager and a wrong byte.
//!
//! When the last descriptor of a userfaultfd is closed, the kernel gives zeros for every page that is still missing. So a
//! pager that is killed must not be the last to hold them. The guardian is a process that shares the pager's table of
//! descriptors (`CLONE_FILES`) and nothing else: whatever the pager has open, also the descriptors that a fork of the tree
//! adds, stays open as long as the guardian lives. It sleeps until the pager ends. If that was before its work was done, the
//! guardian kills or stops the tree, and goes on holding the descriptors until no memory is left that misses a page: a
//! process that touches one is killed or stopped then, instead of going on with zeros.
//!
//! A pager that loses its guardian starts another. Should both be killed at once, the kernel ends the tree: see
//! [`LastLine`].

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering;
use std::time::Duration;

use ckpt_core::Pid;
use ckpt_core::procfs::{Mapping, ProcDir};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::MsgFlags;

use crate::OnLoss;
use crate::sys::{self, Event, SharedWords, Userfault};

/// What pager and guardian tell each other: whether the work is done, and who joined the tree.
pub struct Notes(SharedWords);

impl Notes {
    const DONE: usize = 0;
    const COUNT: usize = 1;
    const FIRST: usize = 2;

    pub fn new() -> io::Result<Notes> {
        Ok(Notes(SharedWords::new(4096)?))
    }

    /// Nothing of the tree misses a page any more.
    pub fn set_done(&self) {
        self.0.word(Notes::DONE).store(1, Ordering::SeqCst);
    }

    fn is_done(&self) -> bool {
        self.0.word(Notes::DONE).load(Ordering::SeqCst) == 1
    }

    /// A process that the tree made since, by its descriptor in the table that both share. More than there is room for
    /// are still caught when they touch a missing page.
    pub fn add_member(&self, pidfd: RawFd) {
        let count = self.0.word(Notes::COUNT).load(Ordering::SeqCst) as usize;
        if Notes::FIRST + count < self.0.len() {
            self.0.word(Notes::FIRST + count).store(pidfd as u32, Ordering::SeqCst);
            self.0.word(Notes::COUNT).store(count as u32 + 1, Ordering::SeqCst);
        }
    }

    fn members(&self) -> impl Iterator<Item = RawFd> + '_ {
        let count = self.0.word(Notes::COUNT).load(Ordering::SeqCst) as usize;
        (0..count).map(|n| self.0.word(Notes::FIRST + n).load(Ordering::SeqCst) as RawFd)
    }
}

/// What a guardian needs to know. All descriptors are in the table that it shares with the pager.
pub struct Guarded<'a> {
    pub pager: Pid,
    /// The processes of the image.
    pub members: &'a [OwnedFd],
    pub notes: &'a Notes,
    pub on_loss: OnLoss,
    /// Where the restore command listens, as long as it runs.
    pub control: BorrowedFd<'a>,
}

/// What the guardian says to the command when the pager was lost.
pub const LOST: u8 = b'L';

/// Starts a guardian. Call with one thread, or with others that allocate nothing and hold no lock that it would need.
pub fn start(guarded: &Guarded<'_>) -> io::Result<Pid> {
    match sys::fork_sharing_descriptors()? {
        sys::Fork::Parent(guardian) => Ok(guardian),
        sys::Fork::Child => {
            sys::set_name(c"ckpt-guard");
            let watched = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| guard(guarded)));
            // What it holds is let go only by its end: where it cannot work, it must not end either.
            while watched.is_err() {
                std::thread::sleep(Duration::from_secs(3600));
            }
            sys::exit(0)
        }
    }
}

fn guard(guarded: &Guarded<'_>) {
    wait_for_end(guarded.pager);
    if guarded.notes.is_done() {
        return;
    }
    let signal = guarded.on_loss.signal();
    let done = if signal == libc::SIGKILL { "killed" } else { "stopped" };
    let text = format!("the pager ended before all memory was restored: the processes were {done}");
    // Told first, so that the command that sees the tree end knows why. Nothing can go wrong meanwhile: who touches a missing
    // page waits.
    let mut message = vec![LOST];
    message.extend_from_slice(text.as_bytes());
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    let _ = nix::sys::socket::send(guarded.control.as_raw_fd(), &message, flags);
    let members = guarded.members.iter().map(|member| member.as_raw_fd());
    for member in members.chain(guarded.notes.members()) {
        sys::pidfd_send_signal(member, signal);
    }
    sys::log_error(&text);
    hold_until_gone(signal);
}

/// Waits until a process has ended. It may not be our child.
fn wait_for_end(pid: Pid) {
    // A pid that is in use by another by now would have to be reused within the instant since it forked us.
    let Ok(pidfd) = sys::pidfd_open(pid) else { return };
    loop {
        let mut ended = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        if matches!(poll(&mut ended, PollTimeout::NONE), Ok(1..)) {
            return;
        }
    }
}

/// Holds every userfaultfd until its memory is gone. Whoever touches a missing page gets the signal.
fn hold_until_gone(signal: i32) {
    loop {
        let mut held = 0;
        for fd in userfaultfds() {
            let userfault = wrap(fd);
            if userfault.is_gone() {
                drop(userfault);
                continue;
            }
            held += 1;
            let mut events = Vec::new();
            let _ = userfault.events(&mut events);
            for event in events {
                match event {
                    Event::Fault { tid, .. } if misses_memory(tid) => sys::kill(tid, signal),
                    // A debugger, say, that reads the memory of the tree, and keeps it alive by that. It gets an error.
                    Event::Fault { tid, address } => {
                        if !userfault.poison(address) {
                            sys::kill(tid, libc::SIGKILL);
                        }
                        userfault.wake(address, ckpt_core::PAGE_SIZE);
                    }
                    // It is in the table now, and found in the next round.
                    Event::Fork(fd) => std::mem::forget(fd),
                    _ => {}
                }
            }
            // What the pager had taken and did not get to.
            userfault.wake_all();
            std::mem::forget(userfault);
        }
        if held == 0 {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether a thread is of a process with registered memory: of the tree, or of what it has become.
fn misses_memory(tid: Pid) -> bool {
    // A pid of another namespace, which has no meaning here.
    if tid.0 <= 0 {
        return false;
    }
    let smaps = ProcDir::open(tid).and_then(|proc| proc.read("smaps"));
    let mappings = smaps.ok().and_then(|smaps| Mapping::parse_all(&smaps)).unwrap_or_default();
    mappings.iter().any(|mapping| mapping.has("um"))
}

#[allow(unsafe_code)]
fn wrap(fd: RawFd) -> Userfault {
    // SAFETY: the pager is gone, and with it all that owned the table's descriptors; the caller forgets what it keeps.
    Userfault::from_fd(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The numbers of all userfaultfds in our table.
fn userfaultfds() -> Vec<RawFd> {
    let entries = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let is_one = |entry: &std::fs::DirEntry| {
        std::fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str() == "anon_inode:[userfaultfd]")
    };
    entries.filter(is_one).filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// A kill switch in the kernel: when the last of pager and guardian is gone, and before their userfaultfds are closed, it
/// sends SIGKILL to every process of the image.
///
/// It is made of two pipes. Each process of the tree owns (`F_SETOWN`) a reading end of both, with SIGKILL as the signal
/// that says that something happened there (`F_SETSIG`, `O_ASYNC`). When the table of descriptors dies, the kernel closes
/// one after the other, and the first of the writing ends to go is what happens. One writing end has a number below those
/// of all userfaultfds and the other one above, so that it does not matter from which side the kernel begins: the signal
/// is pending before a page can read as zeros, and a process with a pending SIGKILL never gets back to its own code.
pub struct LastLine {
    /// Above all userfaultfds: closing these first disarms it.
    readers: Vec<OwnedFd>,
    _low: OwnedFd,
    _high: OwnedFd,
}

impl LastLine {
    /// To be made before the first userfaultfd comes. `numbers` is how many descriptors may be open.
    pub fn arm(members: &[Pid], numbers: RawFd) -> io::Result<LastLine> {
        let mut readers = Vec::new();
        // From the top: the writer, below it the readers, and far below what comes later.
        let top = numbers - 1;
        let room = (members.len() as RawFd + 1) * 2;
        let (low_reader, low) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        let reader_number = low_reader.as_raw_fd();
        let (high_reader, high) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        let high = sys::duplicate_from(high.as_fd(), top)?;
        for &member in members {
            for pipe in [&low_reader, &high_reader] {
                // Opened anew: the owner belongs to the open file, not to the descriptor.
                let path = format!("/proc/self/fd/{}", pipe.as_raw_fd());
                let own = std::fs::OpenOptions::new().read(true).open(path)?;
                let own = sys::duplicate_from(own.as_fd(), top - room)?;
                sys::signal_on_hang_up(own.as_fd(), member, libc::SIGKILL)?;
                readers.push(own);
            }
        }
        // The reader's number is free again, and the lowest: it is to be that of the writer.
        drop(low_reader);
        let low = sys::duplicate_from(low.as_fd(), reader_number)?;
        Ok(LastLine { readers, _low: low, _high: high })
    }

    /// Nothing is missing any more: the end of the pager is no reason to kill.
    pub fn disarm(&mut self) {
        self.readers.clear();
    }
}
