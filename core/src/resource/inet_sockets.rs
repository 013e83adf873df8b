//! TCP and UDP sockets, IPv4 and IPv6: unbound, bound and listening ones, UDP sockets with a default destination, and TCP
//! connections within the tree (see [`connections`]).
//!
//! - A TCP connection out of the tree is refused: its other end goes on without us. With `--tcp-close` it is dropped, and the
//!   program finds it as after a reset by the peer: `ECONNRESET` once, then end of file and `EPIPE`, `POLLHUP` and `POLLERR`,
//!   never a wait. That state is made with a real connection to a listening socket of our own, which resets it.
//! - Datagrams that were received and not read are refused too: they cannot be put back with the address of their sender.
//!   A program that reads its socket leaves none after a moment; with `--tcp-close` they are dropped, as a network may do.
//! - A port is tried before anything is made. A TCP port is bound with `SO_REUSEADDR`, whatever the program had set, because
//!   connections of before the dump may still be in `TIME_WAIT`; then the program's setting is put back. Connections that were
//!   accepted by a program without that setting, and closed by its side, keep the port for a minute.
//! - The kernel does not give back eBPF programs of `SO_REUSEPORT` groups and TCP-MD5 keys, nor does it show that there are
//!   any.

pub mod connections;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

use nix::errno::Errno;

use crate::args;
use crate::batch::{Arg, Batch, CallId, Replies, Slot, Sysno};
use crate::error::{DumpError, RestoreError};
use crate::resource::descriptors::{CollectFile, FileResource, OfFile, RebuildFile, Seen};
use crate::resource::sockets::{self, SocketKind, SocketOption, When, get, got, saved_name, saved_number, set_options};
use crate::resource::{Check, Resource};
use crate::target::RemoteFd;
pub use connections::Connection;

/// Its saved form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InetSocket {
    /// `AF_INET` or `AF_INET6`.
    pub domain: i32,
    /// `IPPROTO_TCP` or `IPPROTO_UDP`.
    pub protocol: i32,
    /// The owner of the socket itself (`fstat`), by which the kernel tells who may share a port.
    pub uid: u32,
    pub gid: u32,
    pub local: Option<SocketAddr>,
    pub state: State,
    pub options: Vec<SocketOption>,
    pub memberships: Vec<Membership>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Bound or not.
    Closed,
    Listening {
        backlog: u32,
    },
    /// UDP: where it sends to.
    Connected {
        remote: SocketAddr,
    },
    /// TCP: connected within the tree.
    Established(Connection),
    /// TCP: connected with a listening socket of the tree, which has not accepted it yet.
    Waiting {
        remote: SocketAddr,
    },
    /// TCP: it had a connection.
    Reset {
        /// The next call fails with `ECONNRESET`.
        error: bool,
    },
}

/// A multicast group that the socket has joined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    pub group: IpAddr,
    /// The name of the interface.
    pub interface: String,
    /// Whether only these sources are wanted, or all others.
    pub include: bool,
    pub sources: Vec<IpAddr>,
}

/// TCP and UDP sockets.
pub struct InetSockets;

// States of linux/tcp_states.h
const TCP_CLOSE: u8 = 7;
const TCP_LISTEN: u8 = 10;
/// `struct sockaddr_in6`.
const ADDRESS: usize = 28;

impl Resource for InetSockets {
    const NAME: &'static str = "inet_sockets";
    type Scope = OfFile;
    type Saved = InetSocket;

    fn collect(context: &mut CollectFile<'_>) -> Result<InetSocket, DumpError> {
        let kind = context.seen.socket.expect("a socket of this kind was claimed");
        let facts = ask(context, kind)?;
        let is_bound = |address: &SocketAddr| address.port() != 0 || !address.ip().is_unspecified();
        let local = facts.local.filter(is_bound);
        let state = match kind.protocol {
            libc::IPPROTO_TCP => tcp_state(context, &facts)?,
            _ => udp_state(context, &facts),
        };
        let dropped = matches!(state, State::Reset { .. });
        let connected = dropped || matches!(state, State::Established(_) | State::Waiting { .. });
        let options = sockets::collect_options(context, kind, connected)?;
        if saved_number(&options, libc::IPPROTO_UDP, UDP_CORK).unwrap_or(0) != 0 && facts.unsent != 0 {
            context
                .refuse("a datagram is being put together in it (UDP_CORK)", "dump again when the program has sent it");
        }
        if facts.encapsulation != 0 {
            context.refuse("the kernel uses it for a tunnel (UDP_ENCAP)", "have the program close it before the dump");
        }
        let memberships = match kind.protocol {
            libc::IPPROTO_UDP => memberships(context)?,
            _ => Vec::new(),
        };
        Ok(InetSocket {
            domain: kind.domain,
            protocol: kind.protocol,
            uid: context.seen.stat.st_uid,
            gid: context.seen.stat.st_gid,
            local: local.filter(|_| !dropped),
            state,
            options,
            memberships,
        })
    }

    fn check(saved: &InetSocket, context: &mut Check<'_>) {
        let subject = match saved.local {
            Some(local) => format!("{} socket {local}", protocol_name(saved.protocol)),
            None => format!("{} socket", protocol_name(saved.protocol)),
        };
        let family = |address: &SocketAddr| address.is_ipv4() == (saved.domain == libc::AF_INET);
        let remote = match &saved.state {
            State::Connected { remote } | State::Waiting { remote } => Some(remote),
            State::Established(connection) => Some(&connection.remote),
            _ => None,
        };
        let is_tcp = saved.protocol == libc::IPPROTO_TCP;
        let is_valid = matches!(saved.domain, libc::AF_INET | libc::AF_INET6)
            && matches!(saved.protocol, libc::IPPROTO_TCP | libc::IPPROTO_UDP)
            && match &saved.state {
                State::Connected { .. } => !is_tcp,
                State::Waiting { .. } => is_tcp && saved.local.is_some(),
                State::Established(connection) => {
                    is_tcp && connections::is_consistent(saved, connection, context.image)
                }
                _ => true,
            }
            && saved.local.iter().chain(remote).all(family)
            && saved.memberships.iter().all(|membership| {
                membership.sources.len() <= 4096
                    && membership.sources.iter().all(|source| source.is_ipv4() == membership.group.is_ipv4())
            })
            && sockets::are_known(kind_of(saved), &saved.options);
        if !is_valid {
            return context.refuse(subject, "it has a state that no dump gives", "use another copy of the image");
        }
        if let Some(name) = saved_name(&saved.options, libc::IPPROTO_TCP, libc::TCP_CONGESTION) {
            let known = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control");
            let name = name.to_string_lossy();
            if !known.unwrap_or_default().split_whitespace().any(|known| known == name) {
                let help = format!("load it: modprobe tcp_{name}");
                context.refuse(&*subject, format!("this host has no congestion control {name}"), help);
            }
        }
        let device = saved_name(&saved.options, libc::SOL_SOCKET, libc::SO_BINDTODEVICE);
        let device = device.map(|name| name.to_string_lossy().into_owned());
        let joined = saved.memberships.iter().map(|membership| membership.interface.clone());
        for interface in device.into_iter().chain(joined) {
            if nix::net::if_::if_nametoindex(interface.as_str()).is_err() {
                let help = "restore it where there is one of that name";
                context.refuse(&*subject, format!("this host has no network interface {interface}"), help);
            }
        }
        if let Err((why, help)) = try_bind(saved) {
            context.refuse(subject, why, help);
        }
    }

    fn rebuild(saved: &InetSocket, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        match &saved.state {
            State::Reset { error } => return rebuild_reset(saved, *error, context),
            State::Established(connection) => return connections::rebuild(saved, connection, context),
            State::Waiting { .. } => return connections::rebuild_waiting(saved, context),
            // Connections are made through listening sockets of our own, for which there is no room beside this one.
            State::Listening { .. } if saved.protocol == libc::IPPROTO_TCP => {
                for file in connections::all(context.image) {
                    context.require(file)?;
                }
            }
            _ => {}
        }
        let process = context.process();
        let (calls, bytes) = sockets::room_for(&saved.options);
        let joins: usize = saved.memberships.iter().map(|membership| membership.sources.len() + 1).sum();
        let saved = saved.clone();
        let interfaces: Vec<u32> = saved.memberships.iter().map(interface_index).collect();
        context.create(process, calls + joins + 16, bytes + joins * 288 + 256, |batch| {
            let kind = kind_of(&saved);
            let fd = batch.call(Sysno::socket, args![kind.domain, kind.kind | libc::SOCK_CLOEXEC, kind.protocol]);
            add_owner(batch, fd, &saved);
            // All before it is bound: a connection inherits what it finds.
            let settings = [When::Early, When::Late].map(|when| set_options(batch, fd, kind, &saved.options, when));
            if let Some(local) = saved.local {
                add_bind(batch, fd, &saved, local);
            }
            for (membership, interface) in saved.memberships.iter().zip(interfaces) {
                add_membership(batch, fd, membership, interface);
            }
            match saved.state {
                // Without an address of its own it gets one.
                State::Listening { backlog } if saved.local.is_none() => {
                    batch.call(Sysno::listen, args![fd, backlog]);
                }
                State::Connected { remote } => {
                    let address = to_bytes(remote);
                    let slot = batch.bytes(&address);
                    batch.call(Sysno::connect, args![fd, slot, address.len()]);
                }
                State::Closed
                | State::Listening { .. }
                | State::Established(_)
                | State::Waiting { .. }
                | State::Reset { .. } => {}
            }
            (fd, move |replies: &Replies| settings.into_iter().try_for_each(|setting| setting.verify(replies)))
        })
    }
}

impl FileResource for InetSockets {
    fn claims(seen: &Seen) -> bool {
        seen.socket.is_some_and(|socket| {
            matches!(socket.domain, libc::AF_INET | libc::AF_INET6)
                && matches!(
                    (socket.kind, socket.protocol),
                    (libc::SOCK_STREAM, libc::IPPROTO_TCP) | (libc::SOCK_DGRAM, libc::IPPROTO_UDP)
                )
        })
    }

    fn finish(saved: &InetSocket, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        match saved.state {
            State::Established(_) => connections::finish(saved, context),
            State::Waiting { remote } => connections::finish_waiting(saved, remote, context),
            _ => Ok(()),
        }
    }
}

fn kind_of(saved: &InetSocket) -> SocketKind {
    let kind = if saved.protocol == libc::IPPROTO_TCP { libc::SOCK_STREAM } else { libc::SOCK_DGRAM };
    SocketKind { domain: saved.domain, kind, protocol: saved.protocol }
}

fn protocol_name(protocol: i32) -> &'static str {
    if protocol == libc::IPPROTO_TCP { "TCP" } else { "UDP" }
}

// --- addresses ---

/// `struct sockaddr_in` or `sockaddr_in6`.
fn to_bytes(address: SocketAddr) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(ADDRESS);
    match address {
        SocketAddr::V4(address) => {
            bytes.extend((libc::AF_INET as u16).to_ne_bytes());
            bytes.extend(address.port().to_be_bytes());
            bytes.extend(address.ip().octets());
            bytes.extend([0; 8]);
        }
        SocketAddr::V6(address) => {
            bytes.extend((libc::AF_INET6 as u16).to_ne_bytes());
            bytes.extend(address.port().to_be_bytes());
            bytes.extend(address.flowinfo().to_be_bytes());
            bytes.extend(address.ip().octets());
            bytes.extend(address.scope_id().to_ne_bytes());
        }
    }
    bytes
}

fn from_bytes(bytes: &[u8]) -> Option<SocketAddr> {
    let family = u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?);
    let port = u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?);
    match i32::from(family) {
        libc::AF_INET => {
            let ip: [u8; 4] = bytes.get(4..8)?.try_into().ok()?;
            Some(SocketAddrV4::new(Ipv4Addr::from(ip), port).into())
        }
        libc::AF_INET6 => {
            let flow = u32::from_be_bytes(bytes.get(4..8)?.try_into().ok()?);
            let ip: [u8; 16] = bytes.get(8..24)?.try_into().ok()?;
            let scope = u32::from_ne_bytes(bytes.get(24..28)?.try_into().ok()?);
            Some(SocketAddrV6::new(Ipv6Addr::from(ip), port, flow, scope).into())
        }
        _ => None,
    }
}

/// `struct sockaddr_storage` of an address without port.
fn storage(ip: IpAddr) -> Vec<u8> {
    let mut bytes = to_bytes(SocketAddr::new(ip, 0));
    bytes.resize(128, 0);
    bytes
}

// --- collecting ---

/// What the socket itself says.
struct Facts {
    local: Option<SocketAddr>,
    remote: Option<SocketAddr>,
    /// `POLL*`.
    events: i32,
    /// Of TCP: state, connections that wait, backlog.
    tcp_state: u8,
    waiting: u32,
    backlog: u32,
    /// `SIOCOUTQ`.
    unsent: u32,
    encapsulation: u32,
}

const UDP_CORK: i32 = 1;
const UDP_ENCAP: i32 = 100;

fn ask(context: &mut CollectFile<'_>, kind: SocketKind) -> Result<Facts, DumpError> {
    let fd = context.seen.fd;
    let mut batch = Batch::new();
    let [local, remote] = [Sysno::getsockname, Sysno::getpeername].map(|call| address_of(&mut batch, fd, call));
    let asked = (libc::POLLIN | libc::POLLPRI | libc::POLLRDHUP) as u16;
    let poll = batch.bytes(&[fd.0.to_ne_bytes().as_slice(), &asked.to_ne_bytes(), &[0; 2]].concat());
    batch.call(Sysno::poll, args![poll, 1, 0]);
    let info = get(&mut batch, fd, libc::IPPROTO_TCP, libc::TCP_INFO, 104);
    let encapsulation = get(&mut batch, fd, libc::IPPROTO_UDP, UDP_ENCAP, 4);
    let unsent = batch.room(4);
    batch.try_call(Sysno::ioctl, args![fd, libc::TIOCOUTQ, unsent]);
    let replies = context.run(&batch)?;
    let info = got(&replies, info).unwrap_or_default();
    let word = |at: usize| info.get(at..).and_then(sockets::number).unwrap_or_default();
    let is_udp = kind.protocol == libc::IPPROTO_UDP;
    Ok(Facts {
        local: address_in(&replies, local),
        remote: address_in(&replies, remote),
        events: i32::from(i16::from_ne_bytes([replies.bytes(poll)[6], replies.bytes(poll)[7]])),
        tcp_state: info.first().copied().unwrap_or(TCP_CLOSE),
        // tcpi_unacked and tcpi_sacked: of a listening socket, sk_ack_backlog and sk_max_ack_backlog
        waiting: word(24),
        backlog: word(28),
        unsent: replies.u32(unsent),
        encapsulation: got(&replies, encapsulation).and_then(sockets::number).filter(|_| is_udp).unwrap_or_default(),
    })
}

/// Adds a call that asks for an address, and may fail.
fn address_of(batch: &mut Batch, fd: impl Into<Arg>, call: Sysno) -> (CallId, Slot) {
    let (address, length) = (batch.room(ADDRESS), batch.bytes(&(ADDRESS as u32).to_ne_bytes()));
    (batch.try_call(call, &[fd.into(), address.into(), length.into()]), address)
}

/// What it gave.
fn address_in(replies: &Replies, (call, address): (CallId, Slot)) -> Option<SocketAddr> {
    replies.result(call).ok()?;
    from_bytes(replies.bytes(address))
}

fn tcp_state(context: &mut CollectFile<'_>, facts: &Facts) -> Result<State, DumpError> {
    let has = |event: i16| facts.events & i32::from(event) != 0;
    let address = |address: Option<SocketAddr>| address.map_or("an unknown address".into(), |known| known.to_string());
    Ok(match facts.tcp_state {
        TCP_CLOSE if has(libc::POLLRDHUP) => State::Reset { error: has(libc::POLLERR) },
        TCP_CLOSE => State::Closed,
        TCP_LISTEN => {
            let ours = match facts.local {
                Some(local) if facts.waiting != 0 => connections::with_ends(context, |ends| ends.waiting_at(local))?,
                _ => 0,
            };
            if facts.waiting as usize > ours {
                let what = format!("{} connections to {} wait to be accepted", facts.waiting, address(facts.local));
                if context.options.tcp_close {
                    context.lose(format!("{what}: they were dropped"));
                } else {
                    context
                        .refuse(what, "dump again when the program has accepted them, or drop them with --tcp-close");
                }
            }
            State::Listening { backlog: facts.backlog }
        }
        _ => {
            let mut who = String::new();
            if let (Some(local), Some(remote)) = (facts.local, facts.remote) {
                match connections::collect(context, facts, [local, remote])? {
                    Ok(state) => return Ok(state),
                    Err(found) => who = format!(": {found}"),
                }
            }
            let what = format!("TCP connection from {} to {}", address(facts.local), address(facts.remote));
            if context.options.tcp_close {
                context.lose(format!("{what}: it was dropped"));
            } else {
                context.refuse(
                    format!("it is a {what}, whose other end is not part of the tree{who}"),
                    "close the connection, have it dropped with --tcp-close, or dump the tree that has both ends",
                );
            }
            State::Reset { error: true }
        }
    })
}

fn udp_state(context: &mut CollectFile<'_>, facts: &Facts) -> State {
    let has = |event: i16| facts.events & i32::from(event) != 0;
    if has(libc::POLLRDHUP) || has(libc::POLLHUP) {
        context.refuse("it was shut down", "have the program close it before the dump");
    }
    for (waits, what) in [
        (has(libc::POLLIN) && !has(libc::POLLRDHUP), "datagrams have been received and not read"),
        (has(libc::POLLERR), "an error has been received and not read"),
    ] {
        if !waits {
            continue;
        }
        if context.options.tcp_close {
            context.lose(format!("UDP socket: {what}: dropped"));
        } else {
            context.refuse(
                what,
                "dump again when the program has read them, or drop them, as a network may do, with --tcp-close",
            );
        }
    }
    match facts.remote {
        Some(remote) => State::Connected { remote },
        None => State::Closed,
    }
}

// --- multicast groups ---

const MCAST_JOIN_GROUP: i32 = 42;
const MCAST_BLOCK_SOURCE: i32 = 43;
const MCAST_JOIN_SOURCE_GROUP: i32 = 46;
const MCAST_MSFILTER: i32 = 48;
const MCAST_INCLUDE: u32 = 1;
/// `struct group_filter` before its list.
const FILTER: usize = 144;
/// Sources that fit what is asked with first.
const FEW_SOURCES: usize = 8;

/// The groups that a socket has joined. The kernel lists groups by interface only: each is asked of the socket.
fn memberships(context: &mut CollectFile<'_>) -> Result<Vec<Membership>, DumpError> {
    let fd = context.seen.fd;
    let proc = context.target().proc();
    let mut groups = parse_igmp(&proc.text("net/igmp").unwrap_or_default());
    groups.extend(parse_igmp6(&proc.text("net/igmp6").unwrap_or_default()));
    groups.sort_unstable();
    groups.dedup();
    let mut found = Vec::new();
    for groups in groups.chunks(64) {
        let mut batch = Batch::new();
        let asked: Vec<_> = groups
            .iter()
            .map(|(interface, _, group)| {
                let mut head = filter_head(*interface, *group, FEW_SOURCES as u32);
                head.resize(FILTER + FEW_SOURCES * 128, 0);
                let filter = batch.bytes(&head);
                let length = batch.bytes(&(head.len() as u32).to_ne_bytes());
                let level = level_of(*group);
                (batch.try_call(Sysno::getsockopt, args![fd, level, MCAST_MSFILTER, filter, length]), filter)
            })
            .collect();
        let replies = context.run(&batch)?;
        for ((_, interface, group), (call, filter)) in groups.iter().zip(asked) {
            if replies.result(call).is_err() {
                continue;
            }
            let filter = replies.bytes(filter);
            let word = |at: usize| sockets::number(&filter[at..]).unwrap_or_default();
            let count = word(FILTER - 4) as usize;
            if count > FEW_SOURCES {
                context.refuse(
                    format!(
                        "it has a list of {count} sources for the multicast group {group}; {FEW_SOURCES} are supported"
                    ),
                    "have the program leave the group before the dump",
                );
                continue;
            }
            let source = |place: &[u8]| from_bytes(place).map(|address| address.ip());
            found.push(Membership {
                group: *group,
                interface: interface.clone(),
                include: word(FILTER - 8) == MCAST_INCLUDE,
                sources: filter[FILTER..].chunks_exact(128).take(count).filter_map(source).collect(),
            });
        }
    }
    Ok(found)
}

fn level_of(group: IpAddr) -> i32 {
    if group.is_ipv4() { libc::IPPROTO_IP } else { libc::IPPROTO_IPV6 }
}

/// `struct group_filter` without its list.
fn filter_head(interface: u32, group: IpAddr, sources: u32) -> Vec<u8> {
    let mut head = interface.to_ne_bytes().to_vec();
    head.extend([0; 4]);
    head.extend(storage(group));
    head.extend(MCAST_INCLUDE.to_ne_bytes());
    head.extend(sources.to_ne_bytes());
    head
}

/// A multicast group that somebody on the host has joined: index and name of the interface, and the group.
type Group = (u32, String, IpAddr);

/// `/proc/net/igmp`: a line for each interface, and below it, indented, one for each group.
fn parse_igmp(text: &str) -> Vec<Group> {
    let mut groups = Vec::new();
    let mut interface = None;
    for line in text.lines().skip(1) {
        let mut words = line.split_whitespace();
        if line.starts_with(char::is_whitespace) {
            let group = words.next().and_then(|word| u32::from_str_radix(word, 16).ok());
            if let (Some((index, name)), Some(group)) = (&interface, group) {
                groups.push((*index, String::clone(name), Ipv4Addr::from(group.to_ne_bytes()).into()));
            }
        } else {
            interface = words.next().and_then(|index| Some((index.parse().ok()?, words.next()?.to_string())));
        }
    }
    groups
}

/// `/proc/net/igmp6`: index, interface, group, and more.
fn parse_igmp6(text: &str) -> Vec<Group> {
    let group = |line: &str| {
        let mut words = line.split_whitespace();
        let (index, name) = (words.next()?.parse().ok()?, words.next()?.to_string());
        let group = u128::from_str_radix(words.next()?, 16).ok()?;
        Some((index, name, Ipv6Addr::from(group).into()))
    };
    text.lines().filter_map(group).collect()
}

fn interface_index(membership: &Membership) -> u32 {
    nix::net::if_::if_nametoindex(membership.interface.as_str()).unwrap_or(0)
}

/// Adds the calls that join a group.
fn add_membership(batch: &mut Batch, fd: CallId, membership: &Membership, interface: u32) {
    let level = level_of(membership.group);
    let mut request = interface.to_ne_bytes().to_vec();
    request.extend([0; 4]);
    request.extend(storage(membership.group));
    if !membership.include {
        let join = batch.bytes(&request);
        batch.call(Sysno::setsockopt, args![fd, level, MCAST_JOIN_GROUP, join, request.len()]);
    }
    let option = if membership.include { MCAST_JOIN_SOURCE_GROUP } else { MCAST_BLOCK_SOURCE };
    for source in &membership.sources {
        let mut request = request.clone();
        request.extend(storage(*source));
        let value = batch.bytes(&request);
        batch.call(Sysno::setsockopt, args![fd, level, option, value, request.len()]);
    }
}

// --- checking ---

/// Binds a socket of our own to the address for a moment.
fn try_bind(saved: &InetSocket) -> Result<(), (String, String)> {
    use nix::sys::socket::{SockFlag, SockType, SockaddrStorage, bind, setsockopt, socket, sockopt};
    let Some(local) = saved.local else { return Ok(()) };
    let is_set = |level, option| saved_number(&saved.options, level, option).unwrap_or(0) != 0;
    let is_tcp = saved.protocol == libc::IPPROTO_TCP;
    let family =
        if local.is_ipv4() { nix::sys::socket::AddressFamily::Inet } else { nix::sys::socket::AddressFamily::Inet6 };
    let kind = if is_tcp { SockType::Stream } else { SockType::Datagram };
    let failed = |errno: Errno| (format!("no socket can be made here: {}", errno.desc()), String::new());
    let probe = socket(family, kind, SockFlag::SOCK_CLOEXEC, None).map_err(failed)?;
    let reuse = is_tcp || is_set(libc::SOL_SOCKET, libc::SO_REUSEADDR);
    setsockopt(&probe, sockopt::ReuseAddr, &reuse).map_err(failed)?;
    if is_set(libc::SOL_SOCKET, libc::SO_REUSEPORT) {
        setsockopt(&probe, sockopt::ReusePort, &true).map_err(failed)?;
    }
    if local.is_ipv6() {
        let only = is_set(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY);
        setsockopt(&probe, sockopt::Ipv6V6Only, &only).map_err(failed)?;
    }
    if let Some(device) = saved_name(&saved.options, libc::SOL_SOCKET, libc::SO_BINDTODEVICE) {
        // Without it another bind may be in the way; that is told below.
        let _ = setsockopt(&probe, sockopt::BindToDevice, &device);
    }
    // Allowed to be bound to what is no address of this host.
    let foreign = [
        (libc::IPPROTO_IP, libc::IP_FREEBIND),
        (libc::IPPROTO_IP, libc::IP_TRANSPARENT),
        (libc::IPPROTO_IPV6, 78),
        (libc::IPPROTO_IPV6, 75),
    ]
    .iter()
    .any(|&(level, option)| is_set(level, option));
    match bind(std::os::fd::AsRawFd::as_raw_fd(&probe), &SockaddrStorage::from(local)) {
        // What is left of connections of before is in nobody's way.
        Err(Errno::EADDRINUSE)
            if matches!(saved.state, State::Established(_) | State::Waiting { .. })
                && !connections::is_in_use(local) =>
        {
            Ok(())
        }
        Err(Errno::EADDRINUSE) => Err((
            format!("{} port {} is in use", protocol_name(saved.protocol), local.port()),
            "end the program that uses it (ss -lntup shows it)".into(),
        )),
        Err(Errno::EADDRNOTAVAIL) if !foreign => Err((
            format!("{} is no address of this host", local.ip()),
            "add the address to an interface, or restore it where it is".into(),
        )),
        Err(Errno::EACCES) => {
            Err((format!("port {} may not be bound", local.port()), "run ckpt with CAP_NET_BIND_SERVICE".into()))
        }
        Err(Errno::EADDRNOTAVAIL) | Ok(()) => Ok(()),
        Err(errno) => Err((format!("it cannot be bound: {}", errno.desc()), String::new())),
    }
}

// --- rebuilding ---

/// Adds owner of the socket, which a port may be shared by.
fn add_owner(batch: &mut Batch, fd: impl Into<Arg>, saved: &InetSocket) {
    batch.call(Sysno::fchown, &[fd.into(), saved.uid.into(), saved.gid.into()]);
}

fn add_bind(batch: &mut Batch, fd: CallId, saved: &InetSocket, local: SocketAddr) {
    let reuse = saved_number(&saved.options, libc::SOL_SOCKET, libc::SO_REUSEADDR).unwrap_or(0);
    let is_tcp = saved.protocol == libc::IPPROTO_TCP;
    let set = |batch: &mut Batch, value: u32| {
        let value = batch.bytes(&value.to_ne_bytes());
        batch.call(Sysno::setsockopt, args![fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, value, 4]);
    };
    if is_tcp {
        set(batch, 1);
    }
    let address = to_bytes(local);
    let slot = batch.bytes(&address);
    batch.call(Sysno::bind, args![fd, slot, address.len()]);
    // Listening asks for the port once more: connections with it are there already.
    if let State::Listening { backlog } = saved.state {
        batch.call(Sysno::listen, args![fd, backlog]);
    }
    if is_tcp {
        set(batch, reuse);
    }
}

/// Makes a socket whose connection was reset by the other end.
fn rebuild_reset(saved: &InetSocket, error: bool, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
    let process = context.process();
    let kind = kind_of(saved);
    let mut batch = Batch::new();
    let fd = batch.call(Sysno::socket, args![kind.domain, kind.kind | libc::SOCK_CLOEXEC, kind.protocol]);
    let fd = context.lift(process, &mut batch, fd);
    let fd = context.run(process, &batch)?.fd(fd);
    let loopback: &[IpAddr] = match saved.domain {
        libc::AF_INET => &[IpAddr::V4(Ipv4Addr::LOCALHOST)],
        _ => &[IpAddr::V6(Ipv6Addr::LOCALHOST), IpAddr::V6(Ipv4Addr::LOCALHOST.to_ipv6_mapped())],
    };
    for &address in loopback {
        if reset_over(context, process, fd, address, error)? {
            break;
        }
        // Without a loopback device it stays as it is: not connected, which fails as soon, with ENOTCONN and EPIPE.
    }
    let mut batch = Batch::new();
    add_owner(&mut batch, fd, saved);
    let settings = [When::Early, When::Late].map(|when| set_options(&mut batch, fd, kind, &saved.options, when));
    let replies = context.run(process, &batch)?;
    for setting in settings {
        setting.verify(&replies).map_err(|what| context.mismatch(what))?;
    }
    context.stage(context.id, process, fd)
}

/// Connects a socket to one of our own, which resets the connection. Says whether that could be done.
fn reset_over(
    context: &mut RebuildFile<'_>,
    process: usize,
    fd: RemoteFd,
    loopback: IpAddr,
    error: bool,
) -> Result<bool, RestoreError> {
    let mut batch = Batch::new();
    let family = if loopback.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let address = to_bytes(SocketAddr::new(loopback, 0));
    let slot = batch.bytes(&address);
    let length = batch.bytes(&(address.len() as u32).to_ne_bytes());
    let listener = batch.call(Sysno::socket, args![family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0]);
    batch.try_call(Sysno::bind, args![listener, slot, address.len()]);
    batch.try_call(Sysno::listen, args![listener, 1]);
    batch.try_call(Sysno::getsockname, args![listener, slot, length]);
    let connected = batch.try_call(Sysno::connect, args![fd, slot, address.len()]);
    let replies = context.run(process, &batch)?;
    let (listener, connected) = (replies.fd(listener), replies.result(connected).is_ok());
    let mut batch = Batch::new();
    if connected {
        let accepted = batch.call(Sysno::accept4, args![listener, 0, 0, libc::SOCK_CLOEXEC]);
        let linger = batch.bytes(&[1u32.to_ne_bytes(), 0u32.to_ne_bytes()].concat());
        batch.call(Sysno::setsockopt, args![accepted, libc::SOL_SOCKET, libc::SO_LINGER, linger, 8]);
        batch.call(Sysno::close, args![accepted]);
        // It has come when there is something to be told: a second is far more than the loopback device needs.
        let poll =
            batch.bytes(&[fd.0.to_ne_bytes().as_slice(), &(libc::POLLRDHUP as u16).to_ne_bytes(), &[0; 2]].concat());
        batch.call(Sysno::poll, args![poll, 1, 1000]);
        if !error {
            get(&mut batch, fd, libc::SOL_SOCKET, libc::SO_ERROR, 4);
        }
    }
    batch.call(Sysno::close, args![listener]);
    context.run(process, &batch)?;
    Ok(connected)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_round_trip() {
        for text in ["127.0.0.1:80", "[::1]:443", "0.0.0.0:65535"] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(from_bytes(&to_bytes(address)), Some(address));
        }
        let scoped = SocketAddrV6::new("fe80::1".parse().unwrap(), 5, 7, 3).into();
        assert_eq!(from_bytes(&to_bytes(scoped)), Some(scoped));
        assert_eq!(from_bytes(&to_bytes(scoped)[..27]), None);
        assert_eq!(from_bytes(&[0; 28]), None, "AF_UNSPEC is no address");
    }

    #[test]
    fn groups_of_the_host() {
        let igmp = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
                    1\tlo        :     1      V3\n\
                    \t\t\t\t010000E0     1 0:00000000\t\t0\n\
                    2\teth0      :     2      V3\n\
                    \t\t\t\tFB0000E0     1 0:00000000\t\t0\n\
                    \t\t\t\t010000E0     1 0:00000000\t\t0\n";
        let group = |index, name: &str, group: &str| (index, name.to_string(), group.parse().unwrap());
        let expected = [group(1, "lo", "224.0.0.1"), group(2, "eth0", "224.0.0.251"), group(2, "eth0", "224.0.0.1")];
        assert_eq!(parse_igmp(igmp), expected);
        let igmp6 = "1    lo              ff020000000000000000000000000001     1 0000000C 0\n\
                     2    eth0            ff0200000000000000000000000000fb     1 00000004 0\n";
        assert_eq!(parse_igmp6(igmp6), [group(1, "lo", "ff02::1"), group(2, "eth0", "ff02::fb")]);
    }

    #[test]
    fn a_port_in_use_is_told_by_name() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = |local| InetSocket {
            domain: libc::AF_INET,
            protocol: libc::IPPROTO_TCP,
            uid: 0,
            gid: 0,
            local: Some(local),
            state: State::Listening { backlog: 1 },
            options: vec![],
            memberships: vec![],
        };
        let local = listener.local_addr().unwrap();
        let (why, _) = try_bind(&socket(local)).unwrap_err();
        assert_eq!(why, format!("TCP port {} is in use", local.port()));
        drop(listener);
        assert_eq!(try_bind(&socket(local)), Ok(()));
        let (why, _) = try_bind(&socket("192.0.2.1:1".parse().unwrap())).unwrap_err();
        assert!(why.contains("no address of this host"), "{why}");
    }
}
