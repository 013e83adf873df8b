//! What a frozen Unix socket is, with whom it is connected, and what is in its queue.

use std::collections::HashMap;

use super::*;

/// What the socket itself says.
pub(super) struct Facts {
    pub(super) name: Vec<u8>,
    /// `None` if it has no peer.
    pub(super) peer_name: Option<Vec<u8>>,
    pub(super) peer: Option<Credentials>,
    /// `POLLERR`: an error waits to be reported.
    pub(super) error: bool,
}

pub(super) fn ask(context: &mut CollectFile<'_>) -> Result<Facts, DumpError> {
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
pub(super) fn state(
    context: &mut CollectFile<'_>,
    kind: i32,
    diag: &UnixDiag,
    facts: &Facts,
) -> Result<State, DumpError> {
    if diag.state == LISTEN {
        let mut waiting = Vec::with_capacity(diag.waiting.len());
        for &inode in &diag.waiting {
            if let Some(file) = file_of(context, inode) {
                waiting.push(file);
                continue;
            }
            let who = process_with_socket(inode).map_or("has closed it again".into(), |who| format!("is {who}"));
            context.refuse(
                format!("a connection waits to be accepted whose other end is not part of the tree: who made it {who}"),
                "dump again when the program has accepted it",
            );
        }
        return Ok(State::Listening { backlog: diag.send_queue, waiting });
    }
    let peer_name = facts.peer_name.clone().unwrap_or_default();
    let Some(inode) = diag.peer else { return Ok(State::Unconnected) };
    if inode == 0 {
        let own = inode_of(context.seen.link.as_bytes()).unwrap_or_default();
        if kind != libc::SOCK_DGRAM
            && let Some(at) = waits_at(context, own)?
        {
            if diag.send_queue != 0 {
                context.refuse(
                    format!("data was written into its connection to {}, which waits to be accepted", show(&peer_name)),
                    "dump again when the other end has accepted it",
                );
            }
            return Ok(State::Waiting { at });
        }
        let both = RCV_SHUTDOWN | SEND_SHUTDOWN;
        if kind != libc::SOCK_DGRAM && diag.shutdown & both != both {
            context.refuse(
                format!("its connection to {} waits to be accepted", show(&peer_name)),
                "dump again when the other end has accepted it",
            );
        }
        return Ok(State::Orphaned { name: peer_name, reset: facts.error });
    }
    if let Some(to) = file_of(context, inode) {
        return Ok(State::Connected { to });
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

/// The socket of the tree with an inode.
fn file_of(context: &CollectFile<'_>, inode: u32) -> Option<FileId> {
    let is_it = |seen: &Seen| inode_of(seen.link.as_bytes()) == Some(inode);
    context.census.seen.iter().position(is_it).map(|file| FileId(file as u32))
}

/// The listening socket of the tree that has not accepted a connection yet.
fn waits_at(context: &mut CollectFile<'_>, inode: u32) -> Result<Option<FileId>, DumpError> {
    let census = context.census;
    if census.waiting.borrow().is_none() {
        let mut waiting = HashMap::new();
        for (index, seen) in census.seen.iter().enumerate() {
            let connects = |socket: SocketKind| socket.domain == libc::AF_UNIX && socket.kind != libc::SOCK_DGRAM;
            let Some(listener) = inode_of(seen.link.as_bytes()).filter(|_| seen.socket.is_some_and(connects)) else {
                continue;
            };
            let target = &mut *context.targets[seen.process];
            let diag = sockets::ask_unix_diag(target, listener).map_err(|source| context.target_error(source))?;
            let diag = diag.map_err(|source| context.io_error("sock_diag", source))?;
            if diag.state == LISTEN {
                waiting.extend(diag.waiting.into_iter().map(|client| (client, FileId(index as u32))));
            }
        }
        *census.waiting.borrow_mut() = Some(waiting);
    }
    Ok(census.waiting.borrow().as_ref().and_then(|waiting| waiting.get(&inode).copied()))
}

/// Whether a datagram socket can be connected to an absolute path or an abstract name.
pub(super) fn connects(name: &[u8]) -> std::io::Result<()> {
    use std::os::linux::net::SocketAddrExt;
    let address = match name.split_first() {
        Some((0, name)) => std::os::unix::net::SocketAddr::from_abstract_name(name)?,
        Some((b'/', _)) => std::os::unix::net::SocketAddr::from_pathname(OsStr::from_bytes(name))?,
        _ => return Err(std::io::Error::from(std::io::ErrorKind::NotFound)),
    };
    UnixDatagram::unbound()?.connect_addr(&address)
}

/// The file of a name, if it is still the one that was bound.
pub(super) fn locate(context: &mut CollectFile<'_>, name: &[u8], inode: u32) -> Option<BoundFile> {
    let name = Path::new(OsStr::from_bytes(name));
    let holders = &context.census.holders[context.id.0 as usize];
    let mut processes: Vec<usize> = holders.iter().map(|&(process, _)| process).collect();
    if context.seen.in_queue {
        processes.push(context.seen.process);
    }
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

pub(super) fn is_overlay(path: &Path) -> bool {
    nix::sys::statfs::statfs(path).is_ok_and(|stat| stat.filesystem_type() == nix::sys::statfs::OVERLAYFS_SUPER_MAGIC)
}

/// One message of the queue, as peeked.
pub(super) struct Peeked {
    pub(super) data: Vec<u8>,
    /// Bytes that this message has from here on.
    pub(super) whole: usize,
    pub(super) sender: Vec<u8>,
    pub(super) credentials: Option<(Pid, u32, u32)>,
    /// There is more ancillary data than there was room for.
    pub(super) more: bool,
    /// Bytes of ancillary data that came.
    pub(super) ancillary: usize,
}

/// A `recvmsg` that leaves the message in the queue.
pub(super) struct Peek {
    call: CallId,
    header: Slot,
    data: Slot,
    name: Slot,
    pub(super) control: Option<Slot>,
}

impl Peek {
    /// Adds the call, with so much room for ancillary data. Where nothing comes there, all bits are set.
    pub(super) fn add(batch: &mut Batch, fd: RemoteFd, flags: i32, length: usize, room: usize) -> Peek {
        let (data, name) = (batch.room(length), batch.room(ADDRESS));
        let vector = batch.words(&[0, length as u64]);
        batch.pointer(vector, 0, data);
        let control = (room > 0).then(|| batch.bytes(&vec![0xff; room]));
        let header = batch.words(&[0, ADDRESS as u64, 0, 1, 0, room as u64, 0]);
        batch.pointer(header, 0, name);
        batch.pointer(header, 16, vector);
        if let Some(control) = control {
            batch.pointer(header, 32, control);
        }
        let flags = flags | libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
        let call = batch.try_call(Sysno::recvmsg, args![fd, header, flags]);
        Peek { call, header, data, name, control }
    }

    pub(super) fn take(&self, replies: &Replies) -> Result<Peeked, Errno> {
        let whole = replies.result(self.call)? as usize;
        let header = replies.words(self.header);
        let name_length = (header[1] as u32 as usize).min(ADDRESS);
        let flags = header[6] as u32 as i32;
        let credentials = self.control.filter(|_| header[5] >= 28).and_then(|control| {
            let bytes = replies.bytes(control);
            let word = |at: usize| number(&bytes[at..]);
            let is_credentials = word(8)? as i32 == libc::SOL_SOCKET && word(12)? as i32 == libc::SCM_CREDENTIALS;
            // A message that was sent before anybody asked for them has none, which looks like process 0.
            let pid = word(16)?;
            (is_credentials && pid != 0).then_some((Pid(pid as i32), word(20)?, word(24)?))
        });
        Ok(Peeked {
            data: replies.bytes(self.data)[..whole.min(self.data.len())].to_vec(),
            whole,
            sender: name_in(replies.bytes(self.name), name_length),
            credentials,
            more: flags & libc::MSG_CTRUNC != 0,
            ancillary: header[5] as usize,
        })
    }
}

/// Reads the queue and leaves it as it is. Offset and queue are put back within one batch: nothing can come between.
pub(super) fn queue(
    context: &mut CollectFile<'_>,
    kind: i32,
    diag: &UnixDiag,
    options: &[SocketOption],
) -> Result<Vec<Message>, DumpError> {
    let is_stream = kind == libc::SOCK_STREAM;
    let census = context.census;
    if let Some(queue) = census.queues.get(&context.id) {
        let mut messages = Vec::with_capacity(queue.len());
        for Queued { data, sender, credentials, files } in queue {
            let message = message(context, kind, data.clone(), sender, *credentials)?;
            messages.push(Message { descriptors: files.clone(), ..message });
        }
        return Ok(messages);
    }
    if is_stream && diag.receive_queue == 0 {
        return Ok(Vec::new());
    }
    let fd = context.seen.fd;
    let passes_credentials = sockets::saved_number(options, libc::SOL_SOCKET, libc::SO_PASSCRED).unwrap_or(0) != 0;
    // Room for credentials only: a queue with passed descriptors is read elsewhere.
    let room = if passes_credentials { 32 } else { 0 };
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
        let plain = first.then(|| Peek::add(&mut batch, fd, flags, 1, room));
        let set = batch.bytes(&(offset as u32).to_ne_bytes());
        let back = batch.bytes(&own_offset.to_ne_bytes());
        batch.call(Sysno::setsockopt, args![fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, set, 4]);
        let peeks: Vec<Peek> = (0..pieces).map(|_| Peek::add(&mut batch, fd, flags, length, room)).collect();
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
                    "what came with its messages (a security label, or a descriptor of the sender) has not been received",
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

pub(super) fn message(
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
pub(super) fn socket_named(context: &mut CollectFile<'_>, name: &[u8]) -> Result<Option<FileId>, DumpError> {
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
