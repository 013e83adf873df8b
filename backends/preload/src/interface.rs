//! The other side of `shim/interface.rs`: asks programs before a dump, tells them, and takes their requests.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ckpt_agent::process::Process;
use ckpt_core::backend::FrozenProcess;
use ckpt_core::consent::{Asking, Consent};
use ckpt_core::error::DumpError;
use ckpt_core::inventory;
use ckpt_core::procfs::ProcDir;
use ckpt_core::{Pid, dump};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, UnixCredentials, bind, recvmsg,
    setsockopt, socket, sockopt,
};

use crate::find::wants_to_be_asked;
use crate::protocol::{
    Answer, BUSY, CONSENT_PREFIX, IN_HOOKS, IN_REGION, INTERFACE_MAGIC, MANAGER_PREFIX, READY, REFUSES, Request,
    SIGNAL, ask_value, socket_name_of, tell_value,
};
use crate::sys;

/// The header for C and C++.
pub const C_HEADER: &str = include_str!("../include/ckpt.h");
/// The module for Python.
pub const PYTHON_MODULE: &str = include_str!("../include/ckpt.py");

inventory::submit! {
    Consent { begin: || Box::new(Programs::default()) }
}

/// The programs of one dump.
#[derive(Default)]
struct Programs {
    /// Once there is somebody to ask.
    place: Option<Place>,
    asked: BTreeMap<Pid, Asked>,
    saved: bool,
}

/// Where they answer: it is there as long as the dump goes on.
struct Place {
    nonce: u32,
    socket: OwnedFd,
}

struct Asked {
    process: Process,
    /// What it has said last.
    state: Option<u32>,
    at: Instant,
}

/// A socket that takes datagrams, and tells who sent each.
fn listen(prefix: &[u8; 13], number: u32) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Datagram, flags, None)?;
    setsockopt(&socket, sockopt::PassCred, &true)?;
    bind(socket.as_raw_fd(), &UnixAddr::new_abstract(&socket_name_of(prefix, number)[1..])?)?;
    Ok(socket)
}

/// The next datagram, and who sent it. None if there is none.
fn receive<'a>(socket: &OwnedFd, buffer: &'a mut [u8]) -> Option<(&'a [u8], UnixCredentials)> {
    let (length, sender) = {
        let mut vector = [IoSliceMut::new(buffer)];
        let mut space = nix::cmsg_space!(UnixCredentials);
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(socket.as_raw_fd(), &mut vector, Some(&mut space), flags).ok()?;
        let sender = message.cmsgs().ok()?.find_map(|control| match control {
            ControlMessageOwned::ScmCredentials(sender) => Some(sender),
            _ => None,
        });
        (message.bytes, sender?)
    };
    Some((&buffer[..length], sender))
}

impl Programs {
    fn place(&mut self) -> Result<&Place, DumpError> {
        if self.place.is_none() {
            let failed = |source| DumpError::Io { what: "a socket for the programs to answer to".into(), source };
            let nonce = sys::random().map_err(failed)? | 1;
            self.place = Some(Place { nonce, socket: listen(CONSENT_PREFIX, nonce).map_err(failed)? });
        }
        Ok(self.place.as_ref().expect("just made"))
    }

    /// Finds those under `root` that want to be asked and were not. One that has ended is nobody.
    fn find(&self, root: Pid) -> Vec<Process> {
        let mut found = Vec::new();
        let mut next = vec![root];
        while let Some(pid) = next.pop() {
            let Ok(process) = Process::open(pid) else { continue };
            next.extend(process.proc.children().unwrap_or_default());
            if !self.asked.contains_key(&pid) && wants_to_be_asked(&process.proc) {
                found.push(process);
            }
        }
        found
    }

    fn hear(&mut self) {
        let Some(Place { nonce, socket }) = &self.place else { return };
        let mut buffer = [0; size_of::<Answer>()];
        while let Some((bytes, sender)) = receive(socket, &mut buffer) {
            if bytes.len() != size_of::<Answer>() {
                continue;
            }
            let answer: Answer = sys::from_bytes(bytes);
            if (answer.magic, answer.nonce) != (INTERFACE_MAGIC, *nonce) {
                continue;
            }
            if let Some(asked) = self.asked.get_mut(&Pid(sender.pid()))
                && asked.state != Some(READY)
            {
                asked.state = Some(answer.state);
                if answer.state == REFUSES {
                    tracing::info!("a hook of process {} refuses with {}", sender.pid(), answer.code);
                }
            }
        }
    }

    /// Who has not agreed yet, with what he is at; asks again where an answer may be lost.
    fn waiting_for(&mut self) -> Option<(Pid, Option<u32>)> {
        const NO_ANSWER: Duration = Duration::from_millis(50);
        const LAST_ANSWER: Duration = Duration::from_millis(500);
        let nonce = self.place.as_ref()?.nonce;
        self.asked.retain(|_, asked| asked.process.proc.stat_line().is_ok_and(|stat| !matches!(stat.state, 'Z' | 'X')));
        let mut found = None;
        for (pid, asked) in &mut self.asked {
            let patience = match asked.state {
                Some(READY) => continue,
                None | Some(BUSY) => NO_ANSWER,
                Some(_) => LAST_ANSWER,
            };
            found = found.or(Some((*pid, asked.state)));
            if asked.at.elapsed() > patience {
                asked.at = Instant::now();
                let _ = sys::queue(asked.process.pidfd().as_fd(), SIGNAL, ask_value(nonce));
            }
        }
        found
    }

    fn tell(&self, errno: u16) {
        if let Some(Place { nonce, .. }) = &self.place {
            for asked in self.asked.values() {
                // One that has ended need not know.
                let _ = sys::queue(asked.process.pidfd().as_fd(), SIGNAL, tell_value(*nonce, errno));
            }
        }
    }
}

impl Asking for Programs {
    fn ask(&mut self, root: Pid, deadline: Instant) -> Result<(), DumpError> {
        // The freeze says what is wrong with that.
        if root.0 <= 1 {
            return Ok(());
        }
        for process in self.find(root) {
            let pid = process.proc.pid();
            if process.proc.stat_line().is_ok_and(|stat| matches!(stat.state, 'T' | 't')) {
                let why = "is stopped, so that it cannot be asked whether it may be saved".to_string();
                return Err(DumpError::NotNow { pid, why, help: format!("continue it first: kill -CONT {pid}") });
            }
            let nonce = self.place()?.nonce;
            match sys::queue(process.pidfd().as_fd(), SIGNAL, ask_value(nonce)) {
                // Its hooks may begin at once.
                Ok(()) => self.asked.insert(pid, Asked { process, state: None, at: Instant::now() }),
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => continue,
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                    let needs = "it belongs to another user: run ckpt as that user".to_string();
                    return Err(DumpError::NotPermitted { pid, needs });
                }
                Err(source) => return Err(DumpError::Io { what: format!("asking process {pid}"), source }),
            };
        }
        loop {
            self.hear();
            let Some((pid, state)) = self.waiting_for() else { return Ok(()) };
            if state == Some(REFUSES) {
                let why = "does not want to be saved now: one of its hooks refuses".to_string();
                return Err(DumpError::NotNow { pid, why, help: "try again a moment later".to_string() });
            }
            if Instant::now() >= deadline {
                let why = match state {
                    Some(IN_REGION) => "has been in a region in which no checkpoint may happen (ckpt_region_enter)",
                    Some(IN_HOOKS) => "has been in its hooks for a checkpoint (ckpt_hooks_add)",
                    Some(BUSY) => "has been saved by another ckpt",
                    _ => "has not answered whether it may be saved",
                };
                let why = format!("{why} until the time was over");
                return Err(DumpError::NotNow { pid, why, help: "try again, or use a longer --timeout".to_string() });
            }
            if dump::INTERRUPTED.load(std::sync::atomic::Ordering::Relaxed) {
                return Err(DumpError::Interrupted);
            }
            let socket = &self.place.as_ref().expect("somebody was asked").socket;
            let mut ready = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
            match poll(&mut ready, PollTimeout::from(20u8)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(DumpError::Io { what: "poll".into(), source: errno.into() }),
            }
        }
    }

    fn covers(&self, tree: &[FrozenProcess]) -> bool {
        tree.iter().all(|process| {
            let pid = process.task.pid;
            self.asked.contains_key(&pid) || !ProcDir::open(pid).is_ok_and(|proc| wants_to_be_asked(&proc))
        })
    }

    fn saved(mut self: Box<Self>) {
        self.saved = true;
        self.tell(0);
    }
}

impl Drop for Programs {
    fn drop(&mut self) {
        if !self.saved {
            self.tell(libc::ECANCELED as u16);
        }
    }
}

/// Takes the requests of programs that are below this process.
pub struct Manager {
    socket: OwnedFd,
}

/// A program waits to be saved. Dropped, it learns that it was not.
pub struct Requested {
    process: Process,
    nonce: u32,
    /// The name of the image, if it chose one.
    pub image: Option<PathBuf>,
    /// Its user.
    pub uid: u32,
    told: bool,
}

impl Manager {
    /// # Errors
    /// When there can be no such socket. Another process of this number in another pid namespace may have it.
    pub fn new() -> io::Result<Manager> {
        Ok(Manager { socket: listen(MANAGER_PREFIX, std::process::id())? })
    }

    /// Readable when there is a request.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The next request.
    pub fn next(&self) -> Option<Requested> {
        const HEAD: usize = std::mem::offset_of!(Request, image);
        let mut buffer = [0; size_of::<Request>()];
        loop {
            let (bytes, sender) = receive(&self.socket, &mut buffer)?;
            let word =
                |at: usize| bytes.get(at..at + 4).map(|word| u32::from_ne_bytes(word.try_into().expect("four bytes")));
            let magic = bytes.get(..8).map(|word| u64::from_ne_bytes(word.try_into().expect("eight bytes")));
            let (Some(INTERFACE_MAGIC), Some(nonce), Some(length)) = (magic, word(8), word(12)) else { continue };
            let Some(name) = bytes.get(HEAD..).filter(|name| name.len() == length as usize) else { continue };
            let Ok(process) = Process::open(Pid(sender.pid())) else { continue };
            let name = (!name.is_empty()).then(|| Path::new(OsStr::from_bytes(name)));
            // Relative to where the program is.
            let image = name.map(|name| match process.proc.link("cwd") {
                Ok(directory) => Path::new(&directory).join(name),
                Err(_) => name.to_path_buf(),
            });
            return Some(Requested { process, nonce, image, uid: sender.uid(), told: false });
        }
    }
}

impl Requested {
    pub fn pid(&self) -> Pid {
        self.process.proc.pid()
    }

    /// Whether the program is in the tree of a process.
    pub fn is_below(&self, root: Pid) -> bool {
        let mut pid = self.pid();
        while pid.0 > 0 && pid != root {
            match ProcDir::open(pid).and_then(|proc| proc.stat_line()) {
                Ok(stat) => pid = stat.ppid,
                Err(_) => return false,
            }
        }
        pid == root
    }

    /// Tells it: 0, or an errno.
    pub fn tell(mut self, errno: i32) {
        self.told = true;
        self.tell_it(errno);
    }

    fn tell_it(&self, errno: i32) {
        // One that has ended need not know.
        let value = tell_value(self.nonce, u16::try_from(errno).unwrap_or(libc::EIO as u16));
        let _ = sys::queue(self.process.pidfd().as_fd(), SIGNAL, value);
    }
}

impl Drop for Requested {
    fn drop(&mut self) {
        if !self.told {
            self.tell_it(libc::ECANCELED);
        }
    }
}
