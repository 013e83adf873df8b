//! Unix sockets: pairs, listening and bound sockets, with their names, options, credentials and unread messages.
//!
//! - Who is connected with whom is asked from `sock_diag`. A connection to a process outside the tree cannot be saved,
//!   but for a datagram socket that only has such a one as its default destination: it is connected again.
//! - Unread messages are read with `MSG_PEEK`, which leaves them in place, and sent again by the other end, with the files
//!   that were passed in them: see [`passed`].
//! - `SO_PEERCRED` names who made a pair, connected or listened: each of these is done again in that process, with that
//!   user and group. Where that process has ended, its number is replaced by that of a process that has the socket.
//! - Connections that wait to be accepted are made anew, in their order, by who has the other end: `SO_PEERCRED` will name
//!   that process. What was written into them before they were accepted nobody can read: that is refused.
//! - A name in the file system: the file of a socket is no good without the socket, so a restore replaces the dead one
//!   that the dump has left behind. It replaces nothing else.
//! - A connection that was accepted has the name of the socket it came through, and may outlive it. It is made through a
//!   listening socket of that name in a root directory of its own (`chroot`), where it meets nobody; without the privilege
//!   for that, where the name leads to, whose file is moved aside before anybody listens.

mod collect;
mod connections;
mod messages;
mod names;
pub mod passed;

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
use collect::*;
use connections::*;
use messages::*;
use names::*;
pub use passed::Queued;

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
        /// Who has connected and was not accepted yet, in order.
        waiting: Vec<FileId>,
    },
    /// Connected with a listening socket of the tree, which has not accepted it yet.
    Waiting {
        at: FileId,
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
const SO_PASSPIDFD: i32 = 76;
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
        let is_path = facts.name.first().is_some_and(|&first| first != 0);
        let file = match diag.file {
            Some((inode, _)) if is_path => locate(context, &facts.name, inode),
            _ => None,
        };
        let is_connection = kind.kind != libc::SOCK_DGRAM && diag.peer.is_some();
        if is_path && file.is_none() && facts.name[0] != b'/' && !is_connection {
            context.refuse(
                format!(
                    "it is bound to the relative name {}, which is not in the current directory",
                    show(&facts.name)
                ),
                "have the program bind it to an absolute path",
            );
        }
        if is_path && file.is_none() && matches!(&state, State::Listening { waiting, .. } if !waiting.is_empty()) {
            context.refuse(
                format!("connections wait to be accepted, and {} does not lead to it any more", show(&facts.name)),
                "dump again when the program has accepted them",
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
        let files = context.image.files.len();
        let passes = |message: &Message| {
            message.descriptors.len() <= passed::MOST
                && message.descriptors.iter().all(|file| (file.0 as usize) < files)
                && (message.descriptors.is_empty() || fits(message))
        };
        if (saved.kind != libc::SOCK_STREAM && !saved.queue.iter().all(fits)) || !saved.queue.iter().all(passes) {
            return context.refuse(subject, "it has a message that no dump gives", "use another copy of the image");
        }
        if !waits_consistently(saved, context.image) {
            let why = "it waits where nobody listens, or nobody waits where it listens";
            return context.refuse(subject, why, "use another copy of the image");
        }
        let accepted = was_accepted(saved, context.image);
        let hidden = [
            (accepted || saved.file.is_none()).then_some(saved.name.as_slice()), //
            saved.state.lost_name(),
        ];
        for name in hidden.into_iter().flatten() {
            if name.len() > NAME_MAX || (name.first() != Some(&0) && leads_upwards(name)) {
                let why = format!("the file of {} is gone, and that name leads upwards", show(name));
                context.refuse(&*subject, why, "have the program bind such a socket to a plain path");
            } else if let Err((why, help)) = can_be_hidden(name) {
                context.refuse(&*subject, why, help);
            }
        }
        if let Some(file) = saved.file.as_ref().filter(|_| !accepted) {
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
        if let State::Listening { waiting, .. } = &saved.state {
            return finish_waiting(saved, waiting, context);
        }
        let pairs = saved.kind != libc::SOCK_DGRAM
            || match &saved.state {
                State::Connected { to } => made_as_pair(context.image, context.id, *to),
                State::Orphaned { name, .. } => name.is_empty(),
                _ => false,
            };
        if pairs { finish_pair(saved, context) } else { finish_datagrams(saved, context) }
    }
}

/// Whether a socket came from a listening one, whose name it shows. Nothing is bound to that name for it.
fn was_accepted(saved: &UnixSocket, image: &Image) -> bool {
    let peer = match &saved.state {
        _ if saved.kind == libc::SOCK_DGRAM => None,
        State::Connected { to } => unix_socket(image, *to).map(|peer| peer.name.as_slice()),
        state => state.lost_name(),
    };
    peer.is_some_and(|peer| is_accepted(|name| listens(image, name), &saved.name, peer))
}

impl State {
    /// The name of a peer that is no more.
    fn lost_name(&self) -> Option<&[u8]> {
        match self {
            State::Orphaned { name, .. } => Some(name),
            _ => None,
        }
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

/// Whether those that wait and those that they wait for are the same.
fn waits_consistently(saved: &UnixSocket, image: &Image) -> bool {
    match &saved.state {
        State::Listening { waiting, .. } => waiting.iter().all(|&client| {
            unix_socket(image, client).is_some_and(|client| {
                client.kind == saved.kind
                    && matches!(client.state, State::Waiting { at } if unix_socket(image, at) == Some(saved))
            })
        }),
        State::Waiting { at } => unix_socket(image, *at).is_some_and(|listener| {
            matches!(&listener.state, State::Listening { waiting, .. }
                if waiting.iter().any(|&client| unix_socket(image, client) == Some(saved)))
        }),
        _ => true,
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
