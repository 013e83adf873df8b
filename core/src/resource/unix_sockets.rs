//! Unix sockets: pairs, listening and bound sockets, with their names, options, credentials and unread messages.
//!
//! - Who is connected with whom is asked from `sock_diag`. A connection to a process outside the tree cannot be saved,
//!   but for a datagram socket that only has such a one as its default destination: it is connected again.
//! - Unread messages are read with `MSG_PEEK`, which leaves them in place, and sent again by the other end.
//! - `SO_PEERCRED` names who made a pair, connected or listened: each of these is done again in that process, with that
//!   user and group. Where that process has ended, its number is replaced by that of a process that has the socket.
//! - A name in the file system: the file of a socket is no good without the socket, so a restore replaces the dead one
//!   that the dump has left behind. It replaces nothing else.
//! - A connection that was accepted has the name of the socket it came through, and may outlive it. It is made through a
//!   listening socket of that name in a root directory of its own (`chroot`), where it meets nobody.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;

use crate::args;
use crate::batch::{Arg, Batch, CallId, MAX_BYTES, Replies, Slot, Sysno};
use crate::error::{DumpError, RestoreError};
use crate::image::Image;
use crate::resource::descriptors::{CollectFile, FileId, FileKind, FileResource, OfFile, RebuildFile, Seen};
use crate::resource::sockets::{
    self, SocketKind, SocketOption, UnixDiag, When, get, got, inode_of, number, process_with_socket, set_options,
    unix_diag,
};
use crate::resource::{Check, Resource};
use crate::target::{Pid, RemoteFd};

/// Its saved form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnixSocket {
    /// `SOCK_STREAM`, `SOCK_DGRAM` or `SOCK_SEQPACKET`.
    pub kind: i32,
    /// The owner of the socket itself (`fstat`).
    pub uid: u32,
    pub gid: u32,
    /// As it was bound: a path, or after a NUL, an abstract name. Empty if it has none.
    pub name: Vec<u8>,
    /// The file of that name, where it is still there.
    pub file: Option<BoundFile>,
    pub state: State,
    /// 1: no more is received, 2: no more is sent (`RCV_SHUTDOWN`, `SEND_SHUTDOWN` of the kernel).
    pub shutdown: u8,
    /// What `SO_PEERCRED` gives.
    pub peer: Option<Credentials>,
    pub options: Vec<SocketOption>,
    /// Received and not read.
    pub queue: Vec<Message>,
}

/// The file that a name leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BoundFile {
    /// Absolute.
    pub path: PathBuf,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

/// What it is connected with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    Unconnected,
    Listening {
        backlog: u32,
    },
    /// With a socket of the tree. A datagram socket may send to one that sends elsewhere.
    Connected {
        to: FileId,
    },
    /// A datagram socket with a default destination outside of the tree, by its name.
    Outside {
        name: Vec<u8>,
    },
    /// The other end was closed.
    Orphaned {
        /// The name that it had.
        name: Vec<u8>,
        /// It was closed before it had read everything: the next call fails with `ECONNRESET`.
        reset: bool,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    pub pid: Pid,
    pub uid: u32,
    pub gid: u32,
    /// `SO_PEERGROUPS`.
    pub groups: Vec<u32>,
}

/// One datagram, or a piece of a stream with the same ancillary data.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message {
    pub data: Vec<u8>,
    /// The socket it came from, where that has a name.
    pub sender: Option<FileId>,
    /// Pid, user and group that came with it (`SO_PASSCRED`).
    pub credentials: Option<(Pid, u32, u32)>,
    /// Descriptors that came with it (`SCM_RIGHTS`).
    pub descriptors: Vec<FileId>,
}

/// Unix sockets.
pub struct UnixSockets;

/// Longest `sun_path`.
const NAME_MAX: usize = 108;
/// `struct sockaddr_un` and what the kernel may add.
const ADDRESS: usize = 112;
const SO_PEERGROUPS: i32 = 59;
const LISTEN: u8 = 10;
const RCV_SHUTDOWN: u8 = 1;
const SEND_SHUTDOWN: u8 = 2;
/// What is sent or peeked at once.
const PIECE: usize = 32 * 1024;
/// The largest datagram that goes into a batch.
const LARGEST: usize = MAX_BYTES - 4096;

impl Resource for UnixSockets {
    const NAME: &'static str = "unix_sockets";
    type Scope = OfFile;
    type Saved = UnixSocket;

    fn collect(context: &mut CollectFile<'_>) -> Result<UnixSocket, DumpError> {
        let seen = context.seen;
        let kind = seen.socket.expect("a socket of this kind was claimed");
        let inode = inode_of(seen.link.as_bytes()).unwrap_or_default();
        let diag = unix_diag(context, inode)?;
        let facts = ask(context)?;
        let state = state(context, kind.kind, &diag, &facts)?;
        if diag.state == LISTEN && !diag.waiting.is_empty() {
            let client = process_with_socket(diag.waiting[0]).map_or(String::new(), |who| format!(", one from {who}"));
            context.refuse(
                format!("{} connections wait to be accepted{client}", diag.waiting.len()),
                "dump again when the program has accepted them",
            );
        }
        let is_path = facts.name.first().is_some_and(|&first| first != 0);
        let file = match diag.file {
            Some((inode, _)) if is_path => locate(context, &facts.name, inode),
            _ => None,
        };
        if is_path && file.is_none() && facts.name[0] != b'/' {
            context.refuse(
                format!(
                    "it is bound to the relative name {}, which is not in the current directory",
                    show(&facts.name)
                ),
                "have the program bind it to an absolute path",
            );
        }
        let options = sockets::collect_options(context, kind, false)?;
        let queue = if diag.state == LISTEN { Vec::new() } else { queue(context, kind.kind, &diag, &options)? };
        Ok(UnixSocket {
            kind: kind.kind,
            uid: seen.stat.st_uid,
            gid: seen.stat.st_gid,
            name: facts.name,
            file,
            state,
            shutdown: diag.shutdown & (RCV_SHUTDOWN | SEND_SHUTDOWN),
            peer: facts.peer,
            options,
            queue,
        })
    }

    fn check(saved: &UnixSocket, context: &mut Check<'_>) {
        let subject =
            if saved.name.is_empty() { "a socket".to_string() } else { format!("socket {}", show(&saved.name)) };
        let known = matches!(saved.kind, libc::SOCK_STREAM | libc::SOCK_DGRAM | libc::SOCK_SEQPACKET);
        if !known || saved.name.len() > NAME_MAX || !sockets::are_known(kind_of(saved), &saved.options) {
            return context.refuse(
                subject,
                "it has options or a name that no dump gives",
                "use another copy of the image",
            );
        }
        let fits = |message: &Message| message.data.len() <= LARGEST;
        if saved.kind != libc::SOCK_STREAM && !saved.queue.iter().all(fits) {
            return context.refuse(subject, "it has a message that no dump gives", "use another copy of the image");
        }
        if let Some(file) = &saved.file {
            if let Err((why, help)) = is_free(&file.path) {
                context.refuse(&*subject, why, help);
            }
            if directory_of(saved, &file.path).is_none() {
                context.refuse(&*subject, "its path does not end in its name", "use another copy of the image");
            }
        }
        let connected = matches!(saved.state, State::Connected { .. } | State::Orphaned { .. });
        if saved.name.first() == Some(&0) && !connected && !is_abstract_free(saved) {
            context.refuse(&*subject, "the abstract name is in use", "end the program that has bound it");
        }
        if let State::Outside { name } = &saved.state
            && let Err(error) = connects(name)
        {
            context.refuse(
                subject,
                format!("it sends to {}, which cannot be reached: {error}", show(name)),
                "start the program that listens there",
            );
        }
    }

    fn rebuild(saved: &UnixSocket, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        let unnamed = |file: FileId| unix_socket(context.image, file).is_some_and(|socket| socket.name.is_empty());
        match saved.state {
            State::Connected { to } if saved.kind != libc::SOCK_DGRAM || is_pair(context.image, context.id, to) => {
                let mutual = is_pair(context.image, context.id, to);
                match unix_socket(context.image, to) {
                    Some(peer) if mutual && peer.kind == saved.kind && to != context.id => {
                        if saved.kind == libc::SOCK_DGRAM && !unnamed(to) && !saved.name.is_empty() {
                            return single(saved, context);
                        }
                        pair(context, saved, Some(peer), to)
                    }
                    _ => Err(context.mismatch("it is connected with a socket that is not connected with it")),
                }
            }
            State::Orphaned { ref name, .. } if saved.kind != libc::SOCK_DGRAM || name.is_empty() => {
                pair(context, saved, None, context.id)
            }
            State::Listening { .. } if saved.name.first() == Some(&0) => {
                // What was accepted through an abstract name is made through that name: while it is not taken.
                for file in connections_of(context.image, &saved.name) {
                    context.require(file)?;
                }
                single(saved, context)
            }
            _ => single(saved, context),
        }
    }
}

impl FileResource for UnixSockets {
    fn claims(seen: &Seen) -> bool {
        seen.socket.is_some_and(|socket| socket.domain == libc::AF_UNIX)
    }

    fn finish(saved: &UnixSocket, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        let pairs = saved.kind != libc::SOCK_DGRAM
            || match &saved.state {
                State::Connected { to } => made_as_pair(context.image, context.id, *to),
                State::Orphaned { name, .. } => name.is_empty(),
                _ => false,
            };
        if pairs { Ok(()) } else { finish_datagrams(saved, context) }
    }
}

fn kind_of(saved: &UnixSocket) -> SocketKind {
    SocketKind { domain: libc::AF_UNIX, kind: saved.kind, protocol: 0 }
}

fn unix_socket(image: &Image, file: FileId) -> Option<&UnixSocket> {
    match &image.files.get(file.0 as usize)?.kind {
        FileKind::UnixSocket(socket) => Some(socket),
        _ => None,
    }
}

/// Whether two sockets are connected with each other.
fn is_pair(image: &Image, one: FileId, other: FileId) -> bool {
    unix_socket(image, other).is_some_and(|other| matches!(other.state, State::Connected { to } if to == one))
}

/// Whether two datagram sockets are made by one `socketpair`: they are connected, and one has no name to connect to.
fn made_as_pair(image: &Image, one: FileId, other: FileId) -> bool {
    let named = |file| unix_socket(image, file).is_some_and(|socket| !socket.name.is_empty());
    is_pair(image, one, other) && !(named(one) && named(other))
}

/// The sockets whose connection was made through a name.
fn connections_of(image: &Image, name: &[u8]) -> Vec<FileId> {
    let is_connection = |file: &FileId| {
        unix_socket(image, *file).is_some_and(|socket| {
            socket.kind != libc::SOCK_DGRAM
                && match &socket.state {
                    State::Connected { to } => {
                        socket.name == name || unix_socket(image, *to).is_some_and(|peer| peer.name == name)
                    }
                    State::Orphaned { name: peer, .. } => socket.name == name || peer == name,
                    _ => false,
                }
        })
    };
    (0..image.files.len() as u32).map(FileId).filter(is_connection).collect()
}

/// A name as a message shows it; an abstract one with `@`.
fn show(name: &[u8]) -> String {
    match name.split_first() {
        Some((0, rest)) => format!("@{}", String::from_utf8_lossy(rest)),
        _ => String::from_utf8_lossy(name).into_owned(),
    }
}

/// The name in a `struct sockaddr_un` of so many bytes. A path ends at its NUL.
fn name_in(address: &[u8], length: usize) -> Vec<u8> {
    let name = address.get(2..length).unwrap_or_default();
    match name.first() {
        None => Vec::new(),
        Some(0) => name.to_vec(),
        Some(_) => name.split(|&byte| byte == 0).next().unwrap_or_default().to_vec(),
    }
}

/// `struct sockaddr_un`; a path has a NUL after it, which is counted.
fn address(name: &[u8]) -> Vec<u8> {
    let mut address = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    address.extend(name);
    if name.first().is_some_and(|&first| first != 0) && name.len() < NAME_MAX {
        address.push(0);
    }
    address
}

// --- collecting ---

/// What the socket itself says.
struct Facts {
    name: Vec<u8>,
    /// `None` if it has no peer.
    peer_name: Option<Vec<u8>>,
    peer: Option<Credentials>,
    /// `POLLERR`: an error waits to be reported.
    error: bool,
}

fn ask(context: &mut CollectFile<'_>) -> Result<Facts, DumpError> {
    let fd = context.seen.fd;
    let mut batch = Batch::new();
    let mut name_of = |call| {
        let (address, length) = (batch.room(ADDRESS), batch.bytes(&(ADDRESS as u32).to_ne_bytes()));
        (batch.try_call(call, args![fd, address, length]), address, length)
    };
    let (own, other) = (name_of(Sysno::getsockname), name_of(Sysno::getpeername));
    let credentials = get(&mut batch, fd, libc::SOL_SOCKET, libc::SO_PEERCRED, 12);
    let groups = get(&mut batch, fd, libc::SOL_SOCKET, SO_PEERGROUPS, 4 * 256);
    let poll = batch.bytes(&[fd.0.to_ne_bytes(), [0; 4]].concat());
    batch.call(Sysno::poll, args![poll, 1, 0]);
    let replies = context.run(&batch)?;
    let name = |(call, address, length): (CallId, Slot, Slot)| {
        replies.result(call).ok()?;
        Some(name_in(replies.bytes(address), replies.u32(length) as usize))
    };
    let words = |value: &[u8]| value.chunks_exact(4).filter_map(number).collect::<Vec<u32>>();
    let peer = got(&replies, credentials).map(words).filter(|words| words.len() == 3 && words[0] != 0);
    let groups = got(&replies, groups).map(words).unwrap_or_default();
    let events = u16::from_ne_bytes([replies.bytes(poll)[6], replies.bytes(poll)[7]]);
    Ok(Facts {
        name: name(own).unwrap_or_default(),
        peer_name: name(other),
        peer: peer.map(|words| Credentials { pid: Pid(words[0] as i32), uid: words[1], gid: words[2], groups }),
        error: events & libc::POLLERR as u16 != 0,
    })
}

/// Finds the other end.
fn state(context: &mut CollectFile<'_>, kind: i32, diag: &UnixDiag, facts: &Facts) -> Result<State, DumpError> {
    if diag.state == LISTEN {
        return Ok(State::Listening { backlog: diag.send_queue });
    }
    let peer_name = facts.peer_name.clone().unwrap_or_default();
    let Some(inode) = diag.peer else { return Ok(State::Unconnected) };
    if inode == 0 {
        let both = RCV_SHUTDOWN | SEND_SHUTDOWN;
        if kind != libc::SOCK_DGRAM && diag.shutdown & both != both {
            context.refuse(
                format!("its connection to {} waits to be accepted", show(&peer_name)),
                "dump again when the other end has accepted it",
            );
        }
        return Ok(State::Orphaned { name: peer_name, reset: facts.error });
    }
    let census = context.census;
    let is_peer = |seen: &Seen| inode_of(seen.link.as_bytes()) == Some(inode);
    if let Some(file) = census.seen.iter().position(is_peer) {
        return Ok(State::Connected { to: FileId(file as u32) });
    }
    let with = match (peer_name.is_empty(), process_with_socket(inode)) {
        (false, Some(process)) => format!("{process}, by the name {}", show(&peer_name)),
        (true, Some(process)) => process,
        (false, None) => format!("{}, which no process has open", show(&peer_name)),
        (true, None) => "a socket that no process has open: it is being passed to one".into(),
    };
    if kind == libc::SOCK_DGRAM && connects(&peer_name).is_ok() {
        return Ok(State::Outside { name: peer_name });
    }
    context.refuse(
        format!("it is connected with {with}, which is not part of the tree"),
        "have the program close the connection before the dump, or dump a tree that holds both ends",
    );
    Ok(State::Unconnected)
}

/// Whether a datagram socket can be connected to an absolute path or an abstract name.
fn connects(name: &[u8]) -> std::io::Result<()> {
    use std::os::linux::net::SocketAddrExt;
    let address = match name.split_first() {
        Some((0, name)) => std::os::unix::net::SocketAddr::from_abstract_name(name)?,
        Some((b'/', _)) => std::os::unix::net::SocketAddr::from_pathname(OsStr::from_bytes(name))?,
        _ => return Err(std::io::Error::from(std::io::ErrorKind::NotFound)),
    };
    UnixDatagram::unbound()?.connect_addr(&address)
}

/// The file of a name, if it is still the one that was bound.
fn locate(context: &mut CollectFile<'_>, name: &[u8], inode: u32) -> Option<BoundFile> {
    let name = Path::new(OsStr::from_bytes(name));
    let holders = &context.census.holders[context.id.0 as usize];
    let mut processes: Vec<usize> = holders.iter().map(|&(process, _)| process).collect();
    processes.dedup();
    for process in processes {
        let proc = context.targets[process].proc();
        let (within, base) = match name.strip_prefix("/") {
            Ok(below) => (Path::new("root").join(below), PathBuf::from("/")),
            Err(_) => (Path::new("cwd").join(name), PathBuf::from(proc.link("cwd").ok()?)),
        };
        let Ok(stat) = proc.stat(&within) else { continue };
        // An overlay may show another inode number than the one the kernel holds.
        let same = stat.st_ino as u32 == inode || is_overlay(&base.join(name));
        if stat.st_mode & libc::S_IFMT == libc::S_IFSOCK && same {
            let path = base.join(name);
            return Some(BoundFile { path, mode: stat.st_mode & 0o7777, uid: stat.st_uid, gid: stat.st_gid });
        }
    }
    None
}

fn is_overlay(path: &Path) -> bool {
    nix::sys::statfs::statfs(path).is_ok_and(|stat| stat.filesystem_type() == nix::sys::statfs::OVERLAYFS_SUPER_MAGIC)
}

/// One message of the queue, as peeked.
struct Peeked {
    data: Vec<u8>,
    /// Bytes that this message has from here on.
    whole: usize,
    sender: Vec<u8>,
    credentials: Option<(Pid, u32, u32)>,
    /// There is more ancillary data than credentials.
    more: bool,
}

/// A `recvmsg` that leaves the message in the queue.
struct Peek {
    call: CallId,
    header: Slot,
    data: Slot,
    name: Slot,
    control: Option<Slot>,
}

impl Peek {
    fn add(batch: &mut Batch, fd: RemoteFd, flags: i32, length: usize, credentials: bool) -> Peek {
        let (data, name) = (batch.room(length), batch.room(ADDRESS));
        let vector = batch.words(&[0, length as u64]);
        batch.pointer(vector, 0, data);
        // Room for credentials only, so that descriptors stay where they are.
        let control = credentials.then(|| batch.room(32));
        let header = batch.words(&[0, ADDRESS as u64, 0, 1, 0, control.map_or(0, |_| 32), 0]);
        batch.pointer(header, 0, name);
        batch.pointer(header, 16, vector);
        if let Some(control) = control {
            batch.pointer(header, 32, control);
        }
        let flags = flags | libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
        let call = batch.try_call(Sysno::recvmsg, args![fd, header, flags]);
        Peek { call, header, data, name, control }
    }

    fn take(&self, replies: &Replies) -> Result<Peeked, Errno> {
        let whole = replies.result(self.call)? as usize;
        let header = replies.words(self.header);
        let name_length = (header[1] as u32 as usize).min(ADDRESS);
        let flags = header[6] as u32 as i32;
        let credentials = self.control.filter(|_| header[5] >= 28).and_then(|control| {
            let bytes = replies.bytes(control);
            let word = |at: usize| number(&bytes[at..]);
            let is_credentials = word(8)? as i32 == libc::SOL_SOCKET && word(12)? as i32 == libc::SCM_CREDENTIALS;
            is_credentials.then_some((Pid(word(16)? as i32), word(20)?, word(24)?))
        });
        Ok(Peeked {
            data: replies.bytes(self.data)[..whole.min(self.data.len())].to_vec(),
            whole,
            sender: name_in(replies.bytes(self.name), name_length),
            credentials,
            more: flags & libc::MSG_CTRUNC != 0,
        })
    }
}

/// Reads the queue and leaves it as it is. Offset and queue are put back within one batch: nothing can come between.
fn queue(
    context: &mut CollectFile<'_>,
    kind: i32,
    diag: &UnixDiag,
    options: &[SocketOption],
) -> Result<Vec<Message>, DumpError> {
    let is_stream = kind == libc::SOCK_STREAM;
    if is_stream && diag.receive_queue == 0 {
        return Ok(Vec::new());
    }
    let fd = context.seen.fd;
    let passes_credentials = sockets::saved_number(options, libc::SOL_SOCKET, libc::SO_PASSCRED).unwrap_or(0) != 0;
    let own_offset = sockets::saved_number(options, libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap_or(u32::MAX);
    // A datagram gives its full length with MSG_TRUNC; of a stream there is only what is there.
    let flags = if is_stream { 0 } else { libc::MSG_TRUNC };
    let mut messages: Vec<Message> = Vec::new();
    // Bytes of the last datagram that are still to come.
    let mut missing = 0;
    let mut offset = 0;
    loop {
        let first = offset == 0 && messages.is_empty();
        // Most queues are empty: ask with little room first.
        let (pieces, length) = if first { (1, 4096) } else { (4, PIECE) };
        let mut batch = Batch::new();
        let plain = first.then(|| Peek::add(&mut batch, fd, flags, 1, passes_credentials));
        let set = batch.bytes(&(offset as u32).to_ne_bytes());
        let back = batch.bytes(&own_offset.to_ne_bytes());
        batch.call(Sysno::setsockopt, args![fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, set, 4]);
        let peeks: Vec<Peek> =
            (0..pieces).map(|_| Peek::add(&mut batch, fd, flags, length, passes_credentials)).collect();
        batch.call(Sysno::setsockopt, args![fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, back, 4]);
        let replies = context.run(&batch)?;
        // An empty datagram at the front that was peeked at before is left out by a peek with offset.
        let empty_first = plain.is_some_and(|peek| {
            let ends = kind == libc::SOCK_SEQPACKET && diag.shutdown & RCV_SHUTDOWN != 0;
            !is_stream && !ends && peek.take(&replies).is_ok_and(|peeked| peeked.whole == 0)
        });
        for (index, peek) in peeks.iter().enumerate() {
            let peeked = match peek.take(&replies) {
                Ok(peeked) => peeked,
                // A socket of connections that has none says ENOTCONN.
                Err(Errno::EAGAIN | Errno::ENOTCONN) => {
                    if empty_first && index == 0 {
                        messages.push(Message::default());
                    }
                    return Ok(messages);
                }
                Err(errno) => return Err(context.io_error("reading its queue", errno.into())),
            };
            let ends = is_stream || diag.shutdown & RCV_SHUTDOWN != 0;
            if peeked.whole == 0 && missing == 0 && ends && kind != libc::SOCK_DGRAM {
                return Ok(messages);
            }
            if empty_first && index == 0 && peeked.whole != 0 {
                messages.push(Message::default());
            }
            if peeked.more {
                context.refuse(
                    "descriptors that were passed to it have not been received",
                    "dump again when the program has read its messages",
                );
                return Ok(messages);
            }
            offset += peeked.data.len();
            let data_length = peeked.data.len();
            if missing > 0 {
                messages.last_mut().expect("a message was begun").data.extend(&peeked.data);
            } else {
                let message = message(context, kind, peeked.data, &peeked.sender, peeked.credentials)?;
                messages.push(message);
            }
            missing = if is_stream { 0 } else { peeked.whole - data_length };
            let total = messages.last().expect("there is one").data.len();
            if !is_stream && total + missing > LARGEST {
                context.refuse(
                    format!("a message of {} bytes has not been read; {LARGEST} is the most", total + missing),
                    "dump again when the program has read its messages",
                );
                return Ok(messages);
            }
        }
    }
}

fn message(
    context: &mut CollectFile<'_>,
    kind: i32,
    data: Vec<u8>,
    sender: &[u8],
    credentials: Option<(Pid, u32, u32)>,
) -> Result<Message, DumpError> {
    let mut found = None;
    if kind == libc::SOCK_DGRAM && !sender.is_empty() {
        found = socket_named(context, sender)?;
        if found.is_none() {
            context.refuse(
                format!("a message from {} has not been read, and its sender is not part of the tree", show(sender)),
                "dump again when the program has read its messages",
            );
        }
    }
    if let Some((pid, ..)) = credentials
        && !context.targets.iter().any(|target| target.pid() == pid)
    {
        context.refuse(
            format!(
                "a message with the credentials of process {pid}, which is not part of the tree, has not been read"
            ),
            "dump again when the program has read its messages",
        );
    }
    Ok(Message { data, sender: found, credentials, descriptors: Vec::new() })
}

/// The datagram socket of the tree that has a name.
fn socket_named(context: &mut CollectFile<'_>, name: &[u8]) -> Result<Option<FileId>, DumpError> {
    let census = context.census;
    for (index, seen) in census.seen.iter().enumerate() {
        let is_datagram = |socket: SocketKind| socket.domain == libc::AF_UNIX && socket.kind == libc::SOCK_DGRAM;
        if !seen.socket.is_some_and(is_datagram) {
            continue;
        }
        let mut batch = Batch::new();
        let (address, length) = (batch.room(ADDRESS), batch.bytes(&(ADDRESS as u32).to_ne_bytes()));
        batch.call(Sysno::getsockname, args![seen.fd, address, length]);
        let replies = context.targets[seen.process].run(&batch).map_err(|source| context.target_error(source))?;
        if name_in(replies.bytes(address), replies.u32(length) as usize) == name {
            return Ok(Some(FileId(index as u32)));
        }
    }
    Ok(None)
}

// --- checking ---

/// Whether a socket can be bound to a path: nothing is there, or what is there is the file of a socket that is no more.
fn is_free(path: &Path) -> Result<(), (String, String)> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    if !directory.is_dir() {
        let why = format!("its directory {} is not there", directory.display());
        return Err((why, "make the directory".into()));
    }
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err((format!("its path cannot be looked at: {error}"), "run ckpt with the privilege".into())),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            Err(("another file is at its path".into(), format!("move {} away", path.display())))
        }
        Ok(_) if is_dead(path) => Ok(()),
        Ok(_) => Err(("another socket is bound to its path".into(), "end the program that has it open".into())),
    }
}

/// Whether no socket is bound to the file any more: a connection is refused, rather than made or of the wrong type.
fn is_dead(path: &Path) -> bool {
    let refused = |error: std::io::Error| error.raw_os_error() == Some(libc::ECONNREFUSED);
    UnixDatagram::unbound().and_then(|probe| probe.connect(path)).is_err_and(refused)
}

fn is_abstract_free(saved: &UnixSocket) -> bool {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, socket};
    let kind = match saved.kind {
        libc::SOCK_STREAM => SockType::Stream,
        libc::SOCK_DGRAM => SockType::Datagram,
        _ => SockType::SeqPacket,
    };
    let Ok(probe) = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None) else { return true };
    let Ok(address) = UnixAddr::new_abstract(&saved.name[1..]) else { return false };
    bind(std::os::fd::AsRawFd::as_raw_fd(&probe), &address) != Err(Errno::EADDRINUSE)
}

/// The directory that the name of a bound file is relative to; `/` for an absolute one.
fn directory_of(saved: &UnixSocket, path: &Path) -> Option<PathBuf> {
    let name = OsStr::from_bytes(&saved.name);
    if name.as_bytes().first() == Some(&b'/') {
        return (path == Path::new(name)).then(|| PathBuf::from("/"));
    }
    let whole = path.as_os_str().as_bytes();
    let base = whole.strip_suffix(name.as_bytes())?.strip_suffix(b"/")?;
    Some(PathBuf::from(OsStr::from_bytes(if base.is_empty() { b"/" } else { base })))
}

// --- rebuilding ---

/// A directory that stands for the root, or for the current directory, while a name is bound that nobody must find.
struct Hideout {
    directory: PathBuf,
    absolute: bool,
}

impl Hideout {
    fn new(context: &RebuildFile<'_>, name: &[u8]) -> Result<Hideout, RestoreError> {
        let name = Path::new(OsStr::from_bytes(name));
        if name.components().any(|component| component == Component::ParentDir) {
            return Err(context.mismatch(format!("its name {} leads upwards, and its file is gone", name.display())));
        }
        let pid = std::process::id();
        let directory = std::env::temp_dir().join(format!(".ckpt-sockets-{pid}-{}", context.id.0));
        let hideout = Hideout { directory, absolute: name.is_absolute() };
        let below = name.strip_prefix("/").unwrap_or(name).parent().unwrap_or(Path::new(""));
        let whole = hideout.directory.join(below);
        let levels = below.components().count();
        // Other users go through them.
        let made = std::fs::create_dir_all(&whole).and_then(|()| {
            whole
                .ancestors()
                .take(levels + 1)
                .try_for_each(|directory| std::fs::set_permissions(directory, PermissionsExt::from_mode(0o755)))
        });
        made.map_err(|source| RestoreError::Io { what: hideout.directory.display().to_string(), source })?;
        Ok(hideout)
    }

    /// Adds calls that go in. What they give is for [`leave`](Hideout::leave).
    fn enter(&self, batch: &mut Batch) -> [CallId; 2] {
        let open = |batch: &mut Batch, path: &[u8]| {
            let path = batch.string(path);
            let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
            batch.call(Sysno::openat, args![libc::AT_FDCWD, path, flags])
        };
        let back = [open(batch, b"/"), open(batch, b".")];
        let directory = batch.string(self.directory.as_os_str().as_bytes());
        batch.call(Sysno::chdir, args![directory]);
        if self.absolute {
            batch.call(Sysno::chroot, args![directory]);
        }
        back
    }

    fn leave(&self, batch: &mut Batch, [root, current]: [CallId; 2]) {
        if self.absolute {
            let here = batch.string(b".");
            batch.call(Sysno::fchdir, args![root]);
            batch.call(Sysno::chroot, args![here]);
        }
        batch.call(Sysno::fchdir, args![current]);
        batch.call(Sysno::close, args![root]);
        batch.call(Sysno::close, args![current]);
    }
}

impl Drop for Hideout {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// Where a name is to be used.
enum Place {
    /// Where it is found by everybody: an abstract name, or a path that others use.
    Open,
    Hidden(Hideout),
    /// A relative path, from its directory.
    In(PathBuf),
}

impl Place {
    /// Adds calls with `inner` at this place.
    fn at<T>(&self, batch: &mut Batch, inner: impl FnOnce(&mut Batch) -> T) -> T {
        match self {
            Place::Open => inner(batch),
            Place::Hidden(hideout) => {
                let back = hideout.enter(batch);
                let result = inner(batch);
                hideout.leave(batch, back);
                result
            }
            Place::In(directory) => {
                let here = batch.string(b".");
                let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
                let back = batch.call(Sysno::openat, args![libc::AT_FDCWD, here, flags]);
                let directory = batch.string(directory.as_os_str().as_bytes());
                batch.call(Sysno::chdir, args![directory]);
                let result = inner(batch);
                batch.call(Sysno::fchdir, args![back]);
                batch.call(Sysno::close, args![back]);
                result
            }
        }
    }
}

/// Where a name that nobody else shall use is bound: an abstract one has no other place.
fn hidden(context: &RebuildFile<'_>, name: &[u8]) -> Result<Place, RestoreError> {
    Ok(if name.first() == Some(&0) { Place::Open } else { Place::Hidden(Hideout::new(context, name)?) })
}

/// Where a socket of the image is bound. A dead file that is in the way is removed.
fn place_of(context: &RebuildFile<'_>, saved: &UnixSocket) -> Result<Place, RestoreError> {
    let Some(file) = &saved.file else { return hidden(context, &saved.name) };
    let path = &file.path;
    if let Err((why, _)) = is_free(path) {
        return Err(context.mismatch(format!("{}: {why}", show(&saved.name))));
    }
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            return Err(RestoreError::Io { what: format!("removing the old {}", path.display()), source });
        }
        _ => {}
    }
    let directory = directory_of(saved, path);
    let directory = directory.ok_or_else(|| context.mismatch("its path does not end in its name"))?;
    Ok(if saved.name[0] == b'/' { Place::Open } else { Place::In(directory) })
}

/// Adds the call that binds, so that the file gets just these permissions.
fn add_bind(batch: &mut Batch, fd: impl Into<Arg>, name: &[u8], place: &Place, mode: u32) {
    let address = address(name);
    place.at(batch, |batch| {
        let slot = batch.bytes(&address);
        let old = batch.call(Sysno::umask, args![!mode & 0o777]);
        batch.call(Sysno::bind, &[fd.into(), slot.into(), address.len().into()]);
        batch.call(Sysno::umask, args![old]);
    });
}

/// Gives the file of a bound socket its owner, and the permissions that a umask cannot give.
fn own_file(file: &BoundFile) -> Result<(), RestoreError> {
    let error = |source| RestoreError::Io { what: format!("owner of {}", file.path.display()), source };
    let found = std::fs::symlink_metadata(&file.path).map_err(error)?;
    if (found.uid(), found.gid()) != (file.uid, file.gid) {
        std::os::unix::fs::lchown(&file.path, Some(file.uid), Some(file.gid)).map_err(error)?;
    }
    if found.permissions().mode() & 0o7777 != file.mode {
        std::fs::set_permissions(&file.path, PermissionsExt::from_mode(file.mode)).map_err(error)?;
    }
    Ok(())
}

/// Who a process is before a socket is made in it, to be put back.
struct Identity {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
}

fn identity(context: &mut RebuildFile<'_>, process: usize) -> Result<Identity, RestoreError> {
    let mut batch = Batch::new();
    let uid = batch.call(Sysno::geteuid, &[]);
    let gid = batch.call(Sysno::getegid, &[]);
    let groups = batch.room(4 * 1024);
    let count = batch.call(Sysno::getgroups, args![1024, groups]);
    let replies = context.run(process, &batch)?;
    let groups = replies.bytes(groups).chunks_exact(4).take(replies.value(count) as usize).filter_map(number).collect();
    Ok(Identity { uid: replies.value(uid) as u32, gid: replies.value(gid) as u32, groups })
}

/// Adds `inner` as another user: the kernel notes the effective ids of who makes a pair, connects or listens.
fn as_user<T>(batch: &mut Batch, user: Option<&Credentials>, own: &Identity, inner: impl FnOnce(&mut Batch) -> T) -> T {
    let Some(user) = user.filter(|user| (user.uid, user.gid) != (own.uid, own.gid) || user.groups != own.groups) else {
        return inner(batch);
    };
    let set_groups = |batch: &mut Batch, groups: &[u32]| {
        let bytes: Vec<u8> = groups.iter().flat_map(|group| group.to_ne_bytes()).collect();
        let slot = batch.bytes(&bytes);
        batch.call(Sysno::setgroups, args![groups.len(), slot]);
    };
    let groups_differ = user.groups != own.groups;
    if groups_differ {
        set_groups(batch, &user.groups);
    }
    batch.call(Sysno::setresgid, args![-1, user.gid, -1]);
    batch.call(Sysno::setresuid, args![-1, user.uid, -1]);
    let result = inner(batch);
    batch.call(Sysno::setresuid, args![-1, own.uid, -1]);
    batch.call(Sysno::setresgid, args![-1, own.gid, -1]);
    if groups_differ {
        set_groups(batch, &own.groups);
    }
    result
}

/// The process with these credentials, or one that has the socket.
fn process_of(context: &RebuildFile<'_>, user: Option<&Credentials>) -> usize {
    user.and_then(|user| context.image.process(user.pid)).unwrap_or_else(|| context.process())
}

/// Adds the owner of the socket itself, which the kernel also takes for that of its packets.
fn add_owner(batch: &mut Batch, fd: impl Into<Arg>, saved: &UnixSocket, own: &Identity) {
    if (saved.uid, saved.gid) != (own.uid, own.gid) {
        batch.call(Sysno::fchown, &[fd.into(), saved.uid.into(), saved.gid.into()]);
    }
}

/// Makes a socket that is no end of a pair.
fn single(saved: &UnixSocket, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
    let process = process_of(context, saved.peer.as_ref());
    let own = identity(context, process)?;
    let mut batch = Batch::new();
    let fd = batch.call(Sysno::socket, args![libc::AF_UNIX, saved.kind | libc::SOCK_CLOEXEC, 0]);
    let fd = context.lift(process, &mut batch, fd);
    add_owner(&mut batch, fd, saved, &own);
    let setting = set_options(&mut batch, fd, kind_of(saved), &saved.options, When::Early);
    let place = if saved.name.is_empty() { Place::Open } else { place_of(context, saved)? };
    if !saved.name.is_empty() {
        add_bind(&mut batch, fd, &saved.name, &place, saved.file.as_ref().map_or(0o777, |file| file.mode));
    }
    let replies = context.run(process, &batch)?;
    let fd = replies.fd(fd);
    setting.verify(&replies).map_err(|what| context.mismatch(what))?;
    if let Some(file) = &saved.file {
        own_file(file)?;
    }
    let mut batch = Batch::new();
    if let State::Listening { backlog } = saved.state {
        as_user(&mut batch, saved.peer.as_ref(), &own, |batch| {
            batch.call(Sysno::listen, args![fd, backlog]);
        });
    }
    // It holds a directory that has to be there until the batch has run.
    let _lost = match &saved.state {
        State::Orphaned { name, .. } => Some(add_lost_peer(context, &mut batch, fd, name)?),
        _ => None,
    };
    let is_datagram = saved.kind == libc::SOCK_DGRAM;
    let setting = if is_datagram {
        None
    } else {
        add_shutdown(&mut batch, fd, saved);
        Some(set_options(&mut batch, fd, kind_of(saved), &saved.options, When::Late))
    };
    let replies = context.run(process, &batch)?;
    if let Some(setting) = setting {
        setting.verify(&replies).map_err(|what| context.mismatch(what))?;
    }
    context.stage(context.id, process, fd)
}

/// Has a datagram socket be connected to one that was bound to a name and is closed. What it gives has to live until the
/// batch has run.
fn add_lost_peer(
    context: &RebuildFile<'_>,
    batch: &mut Batch,
    fd: RemoteFd,
    name: &[u8],
) -> Result<Place, RestoreError> {
    let place = hidden(context, name)?;
    let lost = batch.call(Sysno::socket, args![libc::AF_UNIX, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0]);
    add_bind(batch, lost, name, &place, 0o777);
    place.at(batch, |batch| add_connect(batch, fd, name));
    batch.call(Sysno::close, args![lost]);
    Ok(place)
}

fn add_connect(batch: &mut Batch, fd: impl Into<Arg>, name: &[u8]) {
    let address = address(name);
    let slot = batch.bytes(&address);
    batch.call(Sysno::connect, &[fd.into(), slot.into(), address.len().into()]);
}

fn add_shutdown(batch: &mut Batch, fd: RemoteFd, saved: &UnixSocket) {
    let how = match saved.shutdown {
        0 => return,
        RCV_SHUTDOWN => libc::SHUT_RD,
        SEND_SHUTDOWN => libc::SHUT_WR,
        _ => libc::SHUT_RDWR,
    };
    batch.call(Sysno::shutdown, args![fd, how]);
}

/// One end of a pair that is being made.
struct End<'a> {
    /// `None` if this end is closed again.
    saved: Option<(FileId, &'a UnixSocket)>,
    name: &'a [u8],
    process: usize,
    fd: RemoteFd,
}

impl<'a> End<'a> {
    fn of(file: FileId, saved: &'a UnixSocket) -> End<'a> {
        End { saved: Some((file, saved)), name: &saved.name, process: 0, fd: RemoteFd(-1) }
    }

    fn credentials(&self) -> Option<&'a Credentials> {
        self.saved.and_then(|(_, saved)| saved.peer.as_ref())
    }

    fn queue(&self) -> &'a [Message] {
        self.saved.map_or(&[], |(_, saved)| &saved.queue)
    }
}

/// Makes both ends of a connection, or one whose other end is closed again.
fn pair(
    context: &mut RebuildFile<'_>,
    saved: &UnixSocket,
    peer: Option<&UnixSocket>,
    peer_file: FileId,
) -> Result<(), RestoreError> {
    let mut one = End::of(context.id, saved);
    let mut other = match (peer, &saved.state) {
        (Some(peer), _) => End::of(peer_file, peer),
        (None, State::Orphaned { name, .. }) => End { saved: None, name, process: 0, fd: RemoteFd(-1) },
        (None, _) => return Err(context.mismatch("it has no other end")),
    };
    if saved.kind == libc::SOCK_DGRAM || (one.name.is_empty() && other.name.is_empty()) {
        socketpair(context, saved.kind, [&mut one, &mut other])?;
    } else if is_accepted(|name| listens(context.image, name), one.name, other.name) {
        connection(context, saved.kind, &mut other, &mut one)?;
    } else {
        connection(context, saved.kind, &mut one, &mut other)?;
    }
    fill(context, &other, &one)?;
    fill(context, &one, &other)?;
    if other.saved.is_none() {
        let mut batch = Batch::new();
        if matches!(saved.state, State::Orphaned { reset: true, .. }) {
            let byte = batch.room(1);
            batch.call(Sysno::sendto, args![one.fd, byte, 1, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT, 0, 0]);
            context.run(one.process, &std::mem::take(&mut batch))?;
        }
        batch.call(Sysno::close, args![other.fd]);
        context.run(other.process, &batch)?;
    }
    for end in [&one, &other] {
        let Some((file, saved)) = end.saved else { continue };
        let mut batch = Batch::new();
        add_shutdown(&mut batch, end.fd, saved);
        let setting = set_options(&mut batch, end.fd, kind_of(saved), &saved.options, When::Late);
        let replies = context.run(end.process, &batch)?;
        setting.verify(&replies).map_err(|what| context.mismatch(what))?;
        context.stage(file, end.process, end.fd)?;
    }
    Ok(())
}

/// Which of two connected sockets, at least one of them with a name, was accepted: it has the name of the listening one,
/// while the other has one only if it was bound before it was connected.
fn is_accepted(listens: impl Fn(&[u8]) -> bool, name: &[u8], other: &[u8]) -> bool {
    // NUL and five hexadecimal digits: given by the kernel to a socket that connects with SO_PASSCRED.
    let automatic = |name: &[u8]| name.len() == 6 && name[0] == 0 && name[1..].iter().all(u8::is_ascii_hexdigit);
    match (name.is_empty(), other.is_empty()) {
        (false, true) => true,
        (true, _) => false,
        (false, false) => listens(name) || (!listens(other) && !automatic(name)),
    }
}

/// Whether a socket of the image listens under a name.
fn listens(image: &Image, name: &[u8]) -> bool {
    let sockets = (0..image.files.len() as u32).filter_map(|file| unix_socket(image, FileId(file)));
    sockets.into_iter().any(|socket| matches!(socket.state, State::Listening { .. }) && socket.name == name)
}

/// Adds what belongs to a socket from its beginning.
fn add_beginning(context: &mut RebuildFile<'_>, end: &End<'_>, own: &Identity, bind: bool) -> Result<(), RestoreError> {
    let mut batch = Batch::new();
    let mut file = None;
    let mut setting = None;
    if let Some((_, saved)) = end.saved {
        add_owner(&mut batch, end.fd, saved, own);
        setting = Some(set_options(&mut batch, end.fd, kind_of(saved), &saved.options, When::Early));
        file = saved.file.as_ref();
    }
    let place = match end.saved {
        _ if !bind || end.name.is_empty() => Place::Open,
        Some((_, saved)) => place_of(context, saved)?,
        None => hidden(context, end.name)?,
    };
    if bind && !end.name.is_empty() {
        add_bind(&mut batch, end.fd, end.name, &place, file.map_or(0o777, |file| file.mode));
    }
    let replies = context.run(end.process, &batch)?;
    if let Some(setting) = setting {
        setting.verify(&replies).map_err(|what| context.mismatch(what))?;
    }
    match file.filter(|_| bind) {
        Some(file) => own_file(file),
        None => Ok(()),
    }
}

/// Two sockets made together. Of datagram sockets one may have a name.
fn socketpair(context: &mut RebuildFile<'_>, kind: i32, ends: [&mut End<'_>; 2]) -> Result<(), RestoreError> {
    let credentials = ends[0].credentials().or(ends[1].credentials());
    let process = process_of(context, credentials);
    let own = identity(context, process)?;
    let mut batch = Batch::new();
    let fds = batch.room(8);
    as_user(&mut batch, credentials, &own, |batch| {
        batch.call(Sysno::socketpair, args![libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0, fds]);
    });
    let replies = context.run(process, &batch)?;
    let made = [replies.u32(fds), replies.u32(fds.after(4))].map(|fd| RemoteFd(fd as i32));
    let spare = context.targets[process].footprint().spare_fds;
    let mut batch = Batch::new();
    let lifted = made.map(|fd| batch.call(Sysno::fcntl, args![fd, libc::F_DUPFD_CLOEXEC, spare]));
    for fd in made {
        batch.call(Sysno::close, args![fd]);
    }
    let replies = context.run(process, &batch)?;
    for (end, lifted) in ends.into_iter().zip(lifted) {
        (end.process, end.fd) = (process, replies.fd(lifted));
        add_beginning(context, end, &own, true)?;
    }
    Ok(())
}

/// A client that connects, and what a listening socket gives for it.
fn connection(
    context: &mut RebuildFile<'_>,
    kind: i32,
    client: &mut End<'_>,
    server: &mut End<'_>,
) -> Result<(), RestoreError> {
    let place = hidden(context, server.name)?;
    // Each end shows who was on the other side.
    (client.process, server.process) =
        (process_of(context, server.credentials()), process_of(context, client.credentials()));
    let (own, others) = (identity(context, server.process)?, identity(context, client.process)?);
    let mut batch = Batch::new();
    let listener = batch.call(Sysno::socket, args![libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0]);
    let listener = context.lift(server.process, &mut batch, listener);
    add_bind(&mut batch, listener, server.name, &place, 0o777);
    as_user(&mut batch, client.credentials(), &own, |batch| batch.call(Sysno::listen, args![listener, 16]));
    let listener = context.run(server.process, &batch)?.fd(listener);

    let mut batch = Batch::new();
    let fd = batch.call(Sysno::socket, args![libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0]);
    let fd = context.lift(client.process, &mut batch, fd);
    client.fd = context.run(client.process, &batch)?.fd(fd);
    add_beginning(context, client, &others, true)?;
    let mut batch = Batch::new();
    place.at(&mut batch, |batch| {
        as_user(batch, server.credentials(), &others, |batch| add_connect(batch, client.fd, server.name))
    });
    context.run(client.process, &batch)?;

    // An abstract name can be found by others: what they connected is not ours.
    let expected = context.targets[client.process].pid();
    for _ in 0..64 {
        let mut batch = Batch::new();
        let flags = libc::SOCK_CLOEXEC;
        let fd = batch.call(Sysno::accept4, args![listener, 0, 0, flags]);
        let fd = context.lift(server.process, &mut batch, fd);
        let peer = get(&mut batch, fd, libc::SOL_SOCKET, libc::SO_PEERCRED, 12);
        let replies = context.run(server.process, &batch)?;
        let mut batch = Batch::new();
        if got(&replies, peer).and_then(number) == Some(expected.0 as u32) {
            server.fd = replies.fd(fd);
            batch.call(Sysno::close, args![listener]);
            context.run(server.process, &batch)?;
            return add_beginning(context, server, &own, false);
        }
        batch.call(Sysno::close, args![replies.fd(fd)]);
        context.run(server.process, &batch)?;
    }
    Err(context.mismatch(format!("others connect to {} all the time", show(server.name))))
}

/// Where messages are sent from, and to.
struct Route<'a> {
    process: usize,
    fd: RemoteFd,
    /// Of a datagram socket that is not connected.
    to: Option<&'a [u8]>,
}

/// Sends what one end had not read from the other.
fn fill(context: &mut RebuildFile<'_>, from: &End<'_>, to: &End<'_>) -> Result<(), RestoreError> {
    let Some((_, saved)) = to.saved else { return Ok(()) };
    send(context, saved.kind, to.queue(), &Route { process: from.process, fd: from.fd, to: None })
}

fn send(context: &mut RebuildFile<'_>, kind: i32, messages: &[Message], route: &Route<'_>) -> Result<(), RestoreError> {
    if messages.is_empty() {
        return Ok(());
    }
    let total: usize = messages.iter().map(|message| message.data.len() + 1024).sum();
    let before = room_to_send(context, route, total)?;
    let mut batch = Batch::new();
    let mut sent: Vec<(CallId, usize)> = Vec::new();
    for message in messages {
        let piece = if kind == libc::SOCK_STREAM { PIECE } else { message.data.len().max(1) };
        // An empty datagram is a message too.
        let empty = [[].as_slice()];
        let pieces: Vec<&[u8]> =
            if message.data.is_empty() { empty.to_vec() } else { message.data.chunks(piece).collect() };
        for data in pieces {
            if !batch.has_room(1, data.len() + 512) {
                send_batch(context, route, &std::mem::take(&mut batch), &std::mem::take(&mut sent))?;
            }
            sent.push((add_send(&mut batch, route, data, message.credentials), data.len()));
        }
    }
    send_batch(context, route, &batch, &sent)?;
    let mut batch = Batch::new();
    if let Some((size, lock)) = before {
        let half = batch.bytes(&(size / 2).to_ne_bytes());
        let lock = batch.bytes(&lock.to_ne_bytes());
        for option in [libc::SO_SNDBUF, libc::SO_SNDBUFFORCE] {
            batch.try_call(Sysno::setsockopt, args![route.fd, libc::SOL_SOCKET, option, half, 4]);
        }
        batch.try_call(Sysno::setsockopt, args![route.fd, libc::SOL_SOCKET, sockets::SO_BUF_LOCK, lock, 4]);
        context.run(route.process, &batch)?;
    }
    Ok(())
}

fn send_batch(
    context: &mut RebuildFile<'_>,
    route: &Route<'_>,
    batch: &Batch,
    sent: &[(CallId, usize)],
) -> Result<(), RestoreError> {
    let replies = context.run(route.process, batch)?;
    match sent.iter().find(|(call, length)| replies.value(*call) != *length as u64) {
        Some((call, length)) => {
            let went = replies.value(*call);
            Err(context.mismatch(format!("of a message of {length} bytes in its queue, {went} were taken")))
        }
        None => Ok(()),
    }
}

/// Makes the send buffer large enough for a long queue. Gives size and lock to be put back.
fn room_to_send(
    context: &mut RebuildFile<'_>,
    route: &Route<'_>,
    total: usize,
) -> Result<Option<(u32, u32)>, RestoreError> {
    if total < 64 * 1024 {
        return Ok(None);
    }
    let mut batch = Batch::new();
    let size = get(&mut batch, route.fd, libc::SOL_SOCKET, libc::SO_SNDBUF, 4);
    let lock = get(&mut batch, route.fd, libc::SOL_SOCKET, sockets::SO_BUF_LOCK, 4);
    let large = batch.bytes(&(total.saturating_mul(2).min(1 << 30) as u32).to_ne_bytes());
    for option in [libc::SO_SNDBUF, libc::SO_SNDBUFFORCE] {
        batch.try_call(Sysno::setsockopt, args![route.fd, libc::SOL_SOCKET, option, large, 4]);
    }
    let replies = context.run(route.process, &batch)?;
    let value = |read| got(&replies, read).and_then(number);
    Ok(value(size).map(|size| (size, value(lock).unwrap_or_default())))
}

fn add_send(batch: &mut Batch, route: &Route<'_>, data: &[u8], credentials: Option<(Pid, u32, u32)>) -> CallId {
    let content = batch.bytes(data);
    let vector = batch.words(&[0, data.len() as u64]);
    batch.pointer(vector, 0, content);
    let name = route.to.map(address);
    let control = credentials.map(|(pid, uid, gid)| {
        // struct cmsghdr of 16 bytes, struct ucred of 12
        let mut control = 28u64.to_ne_bytes().to_vec();
        for word in [libc::SOL_SOCKET as u32, libc::SCM_CREDENTIALS as u32, pid.0 as u32, uid, gid, 0] {
            control.extend(word.to_ne_bytes());
        }
        batch.bytes(&control)
    });
    let name_length = name.as_ref().map_or(0, |name| name.len() as u64);
    let header = batch.words(&[0, name_length, 0, 1, 0, control.map_or(0, |_| 32), 0]);
    if let Some(name) = name {
        let name = batch.bytes(&name);
        batch.pointer(header, 0, name);
    }
    batch.pointer(header, 16, vector);
    if let Some(control) = control {
        batch.pointer(header, 32, control);
    }
    batch.call(Sysno::sendmsg, args![route.fd, header, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL])
}

/// A name by which a datagram socket of the image is reached from anywhere.
fn reach(context: &RebuildFile<'_>, saved: &UnixSocket) -> Result<Vec<u8>, RestoreError> {
    match &saved.file {
        _ if saved.name.first() == Some(&0) => Ok(saved.name.clone()),
        Some(file) if file.path.as_os_str().len() <= NAME_MAX => Ok(file.path.as_os_str().as_bytes().to_vec()),
        _ => Err(context.mismatch(format!("{} cannot be reached to send to it", show(&saved.name)))),
    }
}

/// What a datagram socket gets when all names are there: its queue, and then its destination.
fn finish_datagrams(saved: &UnixSocket, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
    let process = context.process();
    let fd = context.bring(context.id, process)?;
    let flags = context.file().flags;
    let notifies = flags & libc::O_ASYNC != 0 && !saved.queue.is_empty();
    if notifies {
        // The signal for these messages was sent long ago.
        let mut batch = Batch::new();
        batch.call(Sysno::fcntl, args![fd, libc::F_SETFL, flags & !libc::O_ASYNC]);
        context.run(process, &batch)?;
    }
    for message in &saved.queue {
        let to = reach(context, saved)?;
        let route = match message.sender {
            Some(sender) => {
                let process = context.process_of(sender);
                Route { process, fd: context.bring(sender, process)?, to: Some(&to) }
            }
            None => {
                let mut batch = Batch::new();
                let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
                let fd = batch.call(Sysno::socket, args![libc::AF_UNIX, kind, 0]);
                Route { process, fd: context.run(process, &batch)?.fd(fd), to: Some(&to) }
            }
        };
        send(context, saved.kind, std::slice::from_ref(message), &route)?;
        if message.sender.is_none() {
            context.close(route.process, route.fd)?;
        }
    }
    let mut batch = Batch::new();
    match &saved.state {
        State::Connected { to } => {
            let peer = unix_socket(context.image, *to).ok_or_else(|| context.mismatch("its peer is no Unix socket"))?;
            add_connect(&mut batch, fd, &reach(context, peer)?);
        }
        State::Outside { name } => add_connect(&mut batch, fd, name),
        _ => {}
    }
    add_shutdown(&mut batch, fd, saved);
    let setting = set_options(&mut batch, fd, kind_of(saved), &saved.options, When::Late);
    if notifies {
        batch.call(Sysno::fcntl, args![fd, libc::F_SETFL, flags]);
    }
    let replies = context.run(process, &batch)?;
    setting.verify(&replies).map_err(|what| context.mismatch(what))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_addresses() {
        assert_eq!(name_in(b"\x01\x00", 2), b"", "unbound");
        assert_eq!(name_in(b"\x01\x00/tmp/a\0rest", 9), b"/tmp/a");
        assert_eq!(name_in(b"\x01\x00\0a\0b", 6), b"\0a\0b", "an abstract name holds what it likes");
        for name in [b"".as_slice(), b"/tmp/a", b"\0abc", b"relative"] {
            let address = address(name);
            assert_eq!(name_in(&address, address.len()), name);
        }
        let longest = vec![b'x'; NAME_MAX];
        assert_eq!(address(&longest).len(), 2 + NAME_MAX, "no room for a NUL, and none is needed");
    }

    #[test]
    fn directories_of_relative_names() {
        let socket = |name: &str| UnixSocket {
            kind: libc::SOCK_STREAM,
            uid: 0,
            gid: 0,
            name: name.into(),
            file: None,
            state: State::Unconnected,
            shutdown: 0,
            peer: None,
            options: vec![],
            queue: vec![],
        };
        let directory = |name, path| directory_of(&socket(name), Path::new(path));
        assert_eq!(directory("a/b", "/x/y/a/b"), Some("/x/y".into()));
        assert_eq!(directory("b", "/b"), Some("/".into()));
        assert_eq!(directory("b", "/x/ab"), None);
        assert_eq!(directory("/x/a", "/x/a"), Some("/".into()));
        assert_eq!(directory("/x/a", "/etc/a"), None, "an image must not name one thing and mean another");
    }

    #[test]
    fn a_dead_socket_is_told_from_a_live_one() {
        let directory = std::env::temp_dir().join(format!("ckpt-test-unix-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("socket");
        assert!(is_free(&path).is_ok(), "nothing is there");
        let live = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(is_free(&path).unwrap_err().0.contains("another socket"));
        drop(live);
        assert!(is_free(&path).is_ok(), "a dead one");
        std::fs::remove_file(&path).unwrap();
        let live = UnixDatagram::bind(&path).unwrap();
        assert!(is_free(&path).is_err());
        drop(live);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        assert!(is_free(&path).unwrap_err().0.contains("another file"));
        std::fs::remove_dir_all(&directory).unwrap();
        assert!(is_free(&path).unwrap_err().0.contains("directory"));
    }

    #[test]
    fn automatic_names_belong_to_clients() {
        let nobody = |_: &[u8]| false;
        assert!(is_accepted(nobody, b"/tmp/server", b""));
        assert!(!is_accepted(nobody, b"", b"/tmp/server"));
        assert!(!is_accepted(nobody, b"\x000001a", b"/tmp/server"));
        assert!(is_accepted(nobody, b"/tmp/server", b"\x000001a"));
        let server = |name: &[u8]| name == b"/tmp/server";
        assert!(!is_accepted(server, b"/tmp/client", b"/tmp/server"));
        assert!(is_accepted(server, b"/tmp/server", b"/tmp/client"));
    }
}
