//! What a frozen TCP connection is, and what is on its way through it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::{AsFd, AsRawFd};

use super::*;
use crate::resource::descriptors::Census;
use crate::target::{Target, TargetError};

// States of linux/tcp_states.h
const ESTABLISHED: u8 = 1;
const FIN_WAIT1: u8 = 4;
const FIN_WAIT2: u8 = 5;
const TIME_WAIT: u8 = 6;
const CLOSE_WAIT: u8 = 8;
const CLOSING: u8 = 11;

const TCP_REPAIR_OFF_NO_WP: i32 = -1;
const TCP_SEND_QUEUE: i32 = 2;
const TCP_ULP: i32 = 31;
/// More than any buffer of TCP holds.
const MOST: u64 = 256 << 20;

/// Whether a connection is in a state that can last.
fn is_lasting(state: u8) -> bool {
    matches!(state, ESTABLISHED | FIN_WAIT1 | FIN_WAIT2 | CLOSE_WAIT | CLOSING)
}

fn has_sent_end(state: u8) -> bool {
    matches!(state, FIN_WAIT1 | FIN_WAIT2 | CLOSING)
}

fn has_received_end(state: u8) -> bool {
    matches!(state, CLOSE_WAIT | CLOSING)
}

/// The TCP sockets that the tree has.
#[derive(Debug, Default)]
pub struct Ends {
    /// Connected ones, by (own address, other's address).
    connected: HashMap<[Address; 2], FileId>,
    /// Where others listen.
    listening: Vec<Address>,
}

impl Ends {
    /// Ends that are connected to an address, and whose other end the tree does not have.
    pub(in super::super) fn waiting_at(&self, listener: SocketAddr) -> usize {
        let is_single = |&&[one, other]: &&[Address; 2]| {
            is_reached(plain(listener), other) && !self.connected.contains_key(&[other, one])
        };
        self.connected.keys().filter(is_single).count()
    }
}

/// Whether a listening socket gets what is sent to an address.
fn is_reached(listener: Address, address: Address) -> bool {
    listener.1 == address.1 && (listener.0 == address.0 || listener.0.is_unspecified())
}

/// Does something with all TCP sockets of the tree.
pub(in super::super) fn with_ends<T>(
    context: &mut CollectFile<'_>,
    with: impl FnOnce(&Ends) -> T,
) -> Result<T, DumpError> {
    let census = context.census;
    if census.ends.borrow().is_none() {
        let found = ends(context.targets, census).map_err(|source| context.target_error(source))?;
        *census.ends.borrow_mut() = Some(found);
    }
    Ok(with(census.ends.borrow().as_ref().expect("they were just found")))
}

fn ends(targets: &mut [Box<dyn Target>], census: &Census) -> Result<Ends, TargetError> {
    let mut ends = Ends::default();
    for (index, seen) in census.seen.iter().enumerate() {
        if seen.socket.is_none_or(|socket| socket.protocol != libc::IPPROTO_TCP) {
            continue;
        }
        let mut batch = Batch::new();
        let asked = [Sysno::getsockname, Sysno::getpeername].map(|call| address_of(&mut batch, seen.fd, call));
        let listens = get(&mut batch, seen.fd, libc::SOL_SOCKET, libc::SO_ACCEPTCONN, 4);
        let replies = targets[seen.process].run(&batch)?;
        match asked.map(|asked| address_in(&replies, asked)) {
            [Some(local), Some(remote)] => {
                ends.connected.insert([plain(local), plain(remote)], FileId(index as u32));
            }
            [Some(local), None] if got(&replies, listens).and_then(sockets::number) == Some(1) => {
                ends.listening.push(plain(local));
            }
            _ => {}
        }
    }
    Ok(ends)
}

/// Collects a connection whose other end is in the tree, or was closed. If it is elsewhere: words for who has it.
pub(in super::super) fn collect(
    context: &mut CollectFile<'_>,
    facts: &Facts,
    [local, remote]: [SocketAddr; 2],
) -> Result<Result<State, String>, DumpError> {
    let (to, is_ours) = with_ends(context, |ends| {
        let is_ours = ends.listening.iter().any(|&listener| is_reached(listener, plain(remote)));
        (ends.connected.get(&[plain(remote), plain(local)]).copied(), is_ours)
    })?;
    if to == Some(context.id) {
        return Ok(Err("it is connected with itself".into()));
    }
    if to.is_none() {
        match other_end(context, facts.tcp_state, [local, remote]) {
            OtherEnd::Closed => {}
            OtherEnd::Waits if is_ours && facts.tcp_state == ESTABLISHED => {
                let (process, fd) = (context.seen.process, context.seen.fd);
                let sent = traffic(context, process, fd)?.sent;
                return Ok(match sent {
                    0 => Ok(State::Waiting { remote }),
                    _ => Err(format!("it waits to be accepted, and the {sent} bytes sent to it cannot be read there")),
                });
            }
            OtherEnd::Waits => return Ok(Err("it waits to be accepted".into())),
            OtherEnd::Elsewhere(who) => return Ok(Err(who)),
        }
    }
    let has = |event: i16| facts.events & i32::from(event) != 0;
    let mut batch = Batch::new();
    let fd = context.seen.fd;
    let ulp = get(&mut batch, fd, libc::IPPROTO_TCP, TCP_ULP, 16);
    let replies = context.run(&batch)?;
    let ulp = got(&replies, ulp).is_some_and(|name| name.iter().any(|&byte| byte != 0));
    for (found, what) in [
        (has(libc::POLLPRI), "urgent data has been received and not read"),
        (has(libc::POLLERR), "an error has been received and not read"),
        (ulp, "the kernel encrypts it or the like (TCP_ULP)"),
        (!is_lasting(facts.tcp_state), "it is just being made or closed"),
    ] {
        if found {
            context.refuse(format!("a TCP connection from {local} to {remote}: {what}"), "dump again in a moment");
        }
    }
    let mut queue = received(context)?;
    if let Some(to) = to {
        queue.extend(sent(context, to)?);
    }
    let mut shutdown = 0;
    if has(libc::POLLRDHUP) && !has_received_end(facts.tcp_state) {
        shutdown |= RCV_SHUTDOWN;
    }
    if has_sent_end(facts.tcp_state) {
        shutdown |= SEND_SHUTDOWN;
    }
    Ok(Ok(State::Established(Connection { remote, to, shutdown, queue })))
}

/// Where the end of a connection is that the tree does not have.
enum OtherEnd {
    Closed,
    /// Nobody has accepted it yet.
    Waits,
    /// Who has it, in words.
    Elsewhere(String),
}

fn other_end(context: &mut CollectFile<'_>, state: u8, [local, remote]: [SocketAddr; 2]) -> OtherEnd {
    let ip = remote.ip().to_canonical();
    if !ip.is_loopback() && ip != local.ip().to_canonical() {
        return OtherEnd::Elsewhere("it may be on another host".into());
    }
    let proc = context.targets[context.seen.process].proc();
    let tables = ["net/tcp", "net/tcp6"].map(|table| proc.text(table).unwrap_or_default());
    let inode = tables.iter().find_map(|table| inode_in(table, plain(remote), plain(local)));
    match inode {
        Some(inode) if inode != 0 => OtherEnd::Elsewhere(
            sockets::process_with_socket(inode)
                .map_or("no process of the tree has it".into(), |process| format!("{process} has it")),
        ),
        // It waits for the last words of ours, or has waited long enough.
        _ if has_received_end(state) => OtherEnd::Closed,
        _ => OtherEnd::Waits,
    }
}

/// The inode of a socket in `/proc/net/tcp` or `tcp6`; 0 if no process has it open any more.
pub(super) fn inode_in(table: &str, local: Address, remote: Address) -> Option<u32> {
    let mut lines = table.lines().filter_map(line_of);
    lines.find(|line| line.local == local && line.remote == remote).map(|line| line.inode)
}

/// Whether a socket of this host has an address, other than in `TIME_WAIT`.
pub(in super::super) fn is_in_use(address: SocketAddr) -> bool {
    let tables = ["/proc/self/net/tcp", "/proc/self/net/tcp6"].map(std::fs::read_to_string);
    let is_it = |line: Line| line.state != TIME_WAIT && is_reached(line.local, plain(address));
    tables.iter().flatten().any(|table| table.lines().filter_map(line_of).any(is_it))
}

/// A socket in such a table.
struct Line {
    local: Address,
    remote: Address,
    state: u8,
    inode: u32,
}

fn line_of(line: &str) -> Option<Line> {
    let address = |text: &str| {
        let (ip, port) = text.split_once(':')?;
        // Words of 32 bits, each in the order of the machine.
        let words = ip.as_bytes().chunks(8).map(|word| u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok());
        let bytes: Vec<u8> = words.collect::<Option<Vec<u32>>>()?.into_iter().flat_map(u32::to_ne_bytes).collect();
        let ip = match <[u8; 4]>::try_from(bytes.as_slice()) {
            Ok(bytes) => IpAddr::from(bytes),
            Err(_) => IpAddr::from(<[u8; 16]>::try_from(bytes.as_slice()).ok()?),
        };
        Some((ip.to_canonical(), u16::from_str_radix(port, 16).ok()?))
    };
    let words: Vec<&str> = line.split_whitespace().collect();
    Some(Line {
        local: address(words.get(1)?)?,
        remote: address(words.get(2)?)?,
        state: u8::from_str_radix(words.get(3)?, 16).ok()?,
        inode: words.get(9)?.parse().ok()?,
    })
}

/// What waits to be read.
fn received(context: &mut CollectFile<'_>) -> Result<Vec<u8>, DumpError> {
    let fd = context.seen.fd;
    let mut batch = Batch::new();
    let waiting = batch.room(4);
    batch.call(Sysno::ioctl, args![fd, libc::FIONREAD, waiting]);
    let waiting = context.run(&batch)?.u32(waiting) as usize;
    if waiting == 0 {
        return Ok(Vec::new());
    }
    // In our own process there is room for all of it. Nothing more can come: who would send is frozen, and what was on its
    // way has arrived.
    let ours = context.target().fds_out(&[fd]).map_err(|source| context.target_error(source))?;
    let mut data = vec![0; waiting];
    use nix::sys::socket::{MsgFlags, recv};
    let got = recv(ours[0].as_raw_fd(), &mut data, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT);
    match got {
        Ok(length) if length == waiting => Ok(data),
        Ok(length) => {
            let what = format!("{length} of {waiting} bytes in its queue could be read");
            Err(context.io_error("reading its queue", std::io::Error::other(what)))
        }
        Err(errno) => Err(context.io_error("reading its queue", errno.into())),
    }
}

/// Bytes that an end has put into its connection, and that have come out of it (`struct tcp_info`).
fn traffic(context: &mut CollectFile<'_>, process: usize, fd: RemoteFd) -> Result<Traffic, DumpError> {
    let mut batch = Batch::new();
    let info = get(&mut batch, fd, libc::IPPROTO_TCP, libc::TCP_INFO, 240);
    let unacknowledged = batch.room(4);
    batch.call(Sysno::ioctl, args![fd, libc::TIOCOUTQ, unacknowledged]);
    let replies = context.targets[process].run(&batch).map_err(|source| context.target_error(source))?;
    let info = got(&replies, info).unwrap_or_default();
    let word = |at: usize| info.get(at..).and_then(sockets::number).unwrap_or_default();
    let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
    // tcpi_bytes_received at 128, tcpi_notsent_bytes at 144, tcpi_bytes_sent and tcpi_bytes_retrans at 200 and 208
    let state = info.first().copied().unwrap_or_default();
    // The end of the data (FIN) counts as a byte once it is received, and while it is not sent.
    let not_sent = word(144) - u32::from(has_sent_end(state) && word(144) > 0);
    Ok(Traffic {
        received: long(128).wrapping_sub(u64::from(has_received_end(state))),
        sent: long(200).wrapping_sub(long(208)).wrapping_add(u64::from(not_sent)),
        unacknowledged: u64::from(replies.u32(unacknowledged)),
    })
}

struct Traffic {
    received: u64,
    sent: u64,
    unacknowledged: u64,
}

/// What the other end has sent, and what has not arrived.
fn sent(context: &mut CollectFile<'_>, to: FileId) -> Result<Vec<u8>, DumpError> {
    let census = context.census;
    let other = &census.seen[to.0 as usize];
    let (process, fd) = (context.seen.process, context.seen.fd);
    let own = traffic(context, process, fd)?;
    let others = traffic(context, other.process, other.fd)?;
    let missing = others.sent.wrapping_sub(own.received);
    if missing == 0 {
        return Ok(Vec::new());
    }
    if missing > others.unacknowledged || others.unacknowledged > MOST {
        let what = format!("{missing} bytes are on their way, and {} with the sender", others.unacknowledged);
        return Err(context.io_error("asking for its traffic", std::io::Error::other(what)));
    }
    match unacknowledged(context, other.process, other.fd, others.unacknowledged as usize)? {
        Ok(data) if data.len() >= missing as usize => Ok(data[data.len() - missing as usize..].to_vec()),
        Ok(data) => {
            let what = format!("{missing} bytes are on their way, and {} with the sender", data.len());
            Err(context.io_error("asking for its traffic", std::io::Error::other(what)))
        }
        Err(errno) => {
            context.refuse(
                format!(
                    "{missing} bytes that were sent to it have not arrived, as it has no room for them, and cannot be \
                     read where they are: {}",
                    errno.desc()
                ),
                "dump again when the program has read what it was sent, or run it and ckpt with CAP_NET_ADMIN",
            );
            Ok(Vec::new())
        }
    }
}

/// The send queue of a socket, in which nothing changes. The system calls stand in one batch, which ends whatever happens to
/// us.
fn unacknowledged(
    context: &mut CollectFile<'_>,
    process: usize,
    fd: RemoteFd,
    length: usize,
) -> Result<Result<Vec<u8>, Errno>, DumpError> {
    let error = |source: std::io::Error| DumpError::Io { what: "memory for a queue".into(), source };
    let content = nix::sys::memfd::memfd_create("ckpt-queue", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
        .map_err(|errno| error(errno.into()))?;
    let target = &mut context.targets[process];
    let pid = target.pid();
    let resource = context.resource;
    let failed = |source| DumpError::Target { resource, pid, source };
    let level = libc::IPPROTO_TCP;
    let mut batch = Batch::new();
    let memory = target.receive_fd(&mut batch).map_err(failed)?;
    let [on, off, queue] = [1, TCP_REPAIR_OFF_NO_WP, TCP_SEND_QUEUE].map(|value| batch.bytes(&value.to_ne_bytes()));
    let (reuse, size) = (batch.room(4), batch.bytes(&4u32.to_ne_bytes()));
    // Repair leaves SO_REUSEADDR switched off.
    batch.try_call(Sysno::getsockopt, args![fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse, size]);
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let room = batch.try_call(Sysno::mmap, args![0, length, protection, flags, -1, 0]);
    let begun = batch.try_call(Sysno::setsockopt, args![fd, level, libc::TCP_REPAIR, on, 4]);
    batch.try_call(Sysno::setsockopt, args![fd, level, libc::TCP_REPAIR_QUEUE, queue, 4]);
    let read = batch.try_call(Sysno::recvfrom, args![fd, room, length, libc::MSG_PEEK | libc::MSG_DONTWAIT, 0, 0]);
    batch.try_call(Sysno::setsockopt, args![fd, level, libc::TCP_REPAIR, off, 4]);
    batch.try_call(Sysno::setsockopt, args![fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse, 4]);
    let written = batch.try_call(Sysno::write, &[memory, room.into(), length.into()]);
    batch.try_call(Sysno::munmap, args![room, length]);
    batch.call(Sysno::close, &[memory]);
    target.start(0, &batch).map_err(failed)?;
    let handed = target.send_fd(content.as_fd());
    let replies = target.finish(0, &batch).map_err(failed)?;
    handed.map_err(failed)?;
    for call in [room, begun, read, written] {
        if let Err(errno) = replies.result(call) {
            return Ok(Err(errno));
        }
    }
    let mut file = File::from(content);
    let mut data = Vec::with_capacity(length);
    file.rewind().and_then(|()| file.read_to_end(&mut data)).map_err(error)?;
    data.truncate(replies.value(read) as usize);
    Ok(Ok(data))
}
