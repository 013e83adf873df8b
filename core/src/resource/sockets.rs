//! What the kinds of sockets have in common: their options, and what the kernel says of them through `sock_diag`.
//!
//! An option is saved where it differs from that of a new socket of the same kind in the same process: it is what the
//! program has set. The rest follows the defaults of the host, as it does for a program that is started there.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

use crate::args;
use crate::batch::{Arg, Batch, CallId, Replies, Slot, Sysno};
use crate::error::DumpError;
use crate::resource::descriptors::{Census, CollectFile, NAME};
use crate::target::{Target, TargetError};

/// What kind of socket it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketKind {
    /// `AF_*`.
    pub domain: i32,
    /// `SOCK_*`.
    pub kind: i32,
    /// `IPPROTO_*`, or 0.
    pub protocol: i32,
}

impl SocketKind {
    /// For messages: "netlink sockets".
    pub fn name(self) -> String {
        let kind = match self.kind {
            libc::SOCK_STREAM => "stream",
            libc::SOCK_DGRAM => "datagram",
            libc::SOCK_SEQPACKET => "seqpacket",
            libc::SOCK_RAW => "raw",
            _ => "other",
        };
        match (self.domain, self.protocol) {
            (libc::AF_UNIX, _) => format!("Unix {kind} sockets"),
            (libc::AF_INET | libc::AF_INET6, protocol) if self.kind == libc::SOCK_RAW => {
                format!("raw IP sockets (protocol {protocol})")
            }
            (libc::AF_INET | libc::AF_INET6, libc::IPPROTO_TCP) => "TCP sockets".into(),
            (libc::AF_INET | libc::AF_INET6, libc::IPPROTO_UDP) => "UDP sockets".into(),
            (libc::AF_INET | libc::AF_INET6, libc::IPPROTO_SCTP) => "SCTP sockets".into(),
            (libc::AF_INET | libc::AF_INET6, libc::IPPROTO_MPTCP) => "MPTCP sockets".into(),
            (libc::AF_INET | libc::AF_INET6, libc::IPPROTO_UDPLITE) => "UDP-Lite sockets".into(),
            (libc::AF_INET | libc::AF_INET6, libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6) => "ping (ICMP) sockets".into(),
            (libc::AF_INET | libc::AF_INET6, protocol) => format!("{kind} IP sockets of protocol {protocol}"),
            (libc::AF_NETLINK, protocol) => format!("netlink sockets (protocol {protocol})"),
            (libc::AF_PACKET, _) => "packet sockets".into(),
            (libc::AF_VSOCK, _) => "vsock sockets".into(),
            (libc::AF_ALG, _) => "kernel crypto (AF_ALG) sockets".into(),
            (libc::AF_BLUETOOTH, _) => "Bluetooth sockets".into(),
            (libc::AF_CAN, _) => "CAN sockets".into(),
            (libc::AF_XDP, _) => "XDP sockets".into(),
            (domain, _) => format!("{kind} sockets of address family {domain}"),
        }
    }
}

/// Asks for the kind of every socket of the tree, from a file on.
pub fn ask_kinds(targets: &mut [Box<dyn Target>], census: &mut Census, from: usize) -> Result<(), DumpError> {
    let is_socket = |index: &usize| census.seen[*index].link.as_bytes().starts_with(b"socket:[");
    let sockets: Vec<usize> = (from..census.seen.len()).filter(is_socket).collect();
    let processes: Vec<usize> = census.seen.iter().map(|seen| seen.process).collect();
    for group in sockets.chunk_by(|&one, &next| processes[one] == processes[next]) {
        for group in group.chunks(crate::batch::MAX_CALLS / 3) {
            let mut batch = Batch::new();
            let mut asked = Vec::with_capacity(group.len());
            for &index in group {
                let fd = census.seen[index].fd;
                asked.push([libc::SO_DOMAIN, libc::SO_TYPE, libc::SO_PROTOCOL].map(|option| {
                    let value = batch.room(4);
                    let length = batch.bytes(&4u32.to_ne_bytes());
                    batch.call(Sysno::getsockopt, args![fd, libc::SOL_SOCKET, option, value, length]);
                    value
                }));
            }
            let first = &census.seen[group[0]];
            let (process, pid) = (first.process, first.pid);
            let replies = targets[process].run(&batch);
            let replies = replies.map_err(|source| DumpError::Target { resource: NAME, pid, source })?;
            for (&index, values) in group.iter().zip(asked) {
                let [domain, kind, protocol] = values.map(|slot| replies.u32(slot) as i32);
                census.seen[index].socket = Some(SocketKind { domain, kind, protocol });
            }
        }
    }
    Ok(())
}

/// An option as `getsockopt` gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketOption {
    pub level: i32,
    pub option: i32,
    pub value: Vec<u8>,
}

/// An option that ckpt knows.
struct Known {
    level: i32,
    option: i32,
    name: &'static str,
    /// Bytes of its value, or the most of them.
    length: usize,
    /// Set when everything else is in place.
    late: bool,
}

/// A table of options of one level: a name, its number where `libc` has none, `[bytes]` of its value where these are not 4;
/// and `late` before what is set when everything else is in place.
macro_rules! options {
    ($level:ident; $($rest:tt)*) => { options!(@rows $level [] $($rest)*) };
    (@rows $level:ident [$($done:expr,)*]) => { &[$($done,)*] };
    (@rows $level:ident [$($done:expr,)*] late $name:ident $(= $number:literal)?, $($rest:tt)*) => {
        options!(@rows $level [$($done,)* options!(@row $level $name true 4 $($number)?),] $($rest)*)
    };
    (@rows $level:ident [$($done:expr,)*] $name:ident $(= $number:literal)? [$length:literal], $($rest:tt)*) => {
        options!(@rows $level [$($done,)* options!(@row $level $name false $length $($number)?),] $($rest)*)
    };
    (@rows $level:ident [$($done:expr,)*] $name:ident $(= $number:literal)?, $($rest:tt)*) => {
        options!(@rows $level [$($done,)* options!(@row $level $name false 4 $($number)?),] $($rest)*)
    };
    (@row $level:ident $name:ident $late:literal $length:literal) => {
        Known { level: libc::$level, option: libc::$name, name: stringify!($name), length: $length, late: $late }
    };
    (@row $level:ident $name:ident $late:literal $length:literal $number:literal) => {
        Known { level: libc::$level, option: $number, name: stringify!($name), length: $length, late: $late }
    };
}

pub const SO_BUF_LOCK: i32 = 72;
const SO_GET_FILTER: i32 = libc::SO_ATTACH_FILTER;
const SNDBUF_LOCK: u32 = 1;
const RCVBUF_LOCK: u32 = 2;

/// Options of every socket, in the order they are set in. The buffers stand apart: see [`Buffers`].
const COMMON: &[Known] = options! { SOL_SOCKET;
    SO_DEBUG, SO_REUSEADDR, SO_REUSEPORT, SO_DONTROUTE, SO_BROADCAST, SO_KEEPALIVE, SO_OOBINLINE, SO_NO_CHECK,
    SO_PRIORITY, SO_LINGER [8], SO_RCVLOWAT, SO_RCVTIMEO [16], SO_SNDTIMEO [16], SO_TIMESTAMP, SO_TIMESTAMPNS,
    SO_TIMESTAMP_NEW = 63, SO_TIMESTAMPNS_NEW = 64, SO_TIMESTAMPING [8], SO_TIMESTAMPING_NEW = 65 [8], SO_MARK,
    SO_RXQ_OVFL, SO_WIFI_STATUS, SO_NOFCS, SO_SELECT_ERR_QUEUE, SO_BUSY_POLL, SO_PREFER_BUSY_POLL = 69,
    SO_BUSY_POLL_BUDGET = 70, SO_MAX_PACING_RATE = 47 [8], SO_ZEROCOPY = 60, SO_TXTIME = 61 [8],
    SO_RESERVE_MEM = 73, SO_TXREHASH = 74, SO_RCVMARK = 75, SO_RCVPRIORITY = 82, SO_BINDTODEVICE [16],
    late SO_PEEK_OFF, late SO_PASSCRED, late SO_PASSSEC, late SO_PASSPIDFD = 76, late SO_PASSRIGHTS = 83,
};

const IP: &[Known] = options! { IPPROTO_IP;
    IP_TOS, IP_TTL, IP_OPTIONS = 4 [40], IP_RETOPTS = 7, IP_PKTINFO, IP_MTU_DISCOVER, IP_RECVERR, IP_RECVTTL,
    IP_RECVTOS, IP_FREEBIND, IP_PASSSEC = 18, IP_TRANSPARENT, IP_RECVORIGDSTADDR, IP_MINTTL, IP_CHECKSUM = 23,
    IP_BIND_ADDRESS_NO_PORT = 24, IP_RECVFRAGSIZE = 25, IP_RECVERR_RFC4884 = 26, IP_MULTICAST_IF,
    IP_MULTICAST_TTL, IP_MULTICAST_LOOP, IP_MULTICAST_ALL = 49, IP_UNICAST_IF = 50, IP_LOCAL_PORT_RANGE = 51,
};

const IPV6: &[Known] = options! { IPPROTO_IPV6;
    IPV6_V6ONLY, IPV6_UNICAST_HOPS, IPV6_MULTICAST_IF, IPV6_MULTICAST_HOPS, IPV6_MULTICAST_LOOP,
    IPV6_MULTICAST_ALL = 29, IPV6_MTU_DISCOVER, IPV6_RECVERR, IPV6_RECVERR_RFC4884 = 31, IPV6_RECVPKTINFO,
    IPV6_RECVHOPLIMIT, IPV6_RECVHOPOPTS, IPV6_RECVRTHDR, IPV6_RECVDSTOPTS, IPV6_RECVPATHMTU, IPV6_DONTFRAG,
    IPV6_RECVTCLASS, IPV6_TCLASS, IPV6_FLOWINFO_SEND = 33, IPV6_FLOWINFO = 11, IPV6_AUTOFLOWLABEL = 70,
    IPV6_ADDR_PREFERENCES = 72, IPV6_MINHOPCOUNT = 73, IPV6_RECVORIGDSTADDR = 74, IPV6_TRANSPARENT = 75,
    IPV6_UNICAST_IF = 76, IPV6_RECVFRAGSIZE = 77, IPV6_FREEBIND = 78,
};

const TCP: &[Known] = options! { IPPROTO_TCP;
    TCP_NODELAY, TCP_MAXSEG, TCP_CORK, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT, TCP_SYNCNT, TCP_LINGER2,
    TCP_DEFER_ACCEPT, TCP_WINDOW_CLAMP, TCP_CONGESTION [16], TCP_THIN_LINEAR_TIMEOUTS, TCP_USER_TIMEOUT,
    TCP_FASTOPEN, TCP_NOTSENT_LOWAT, TCP_SAVE_SYN, TCP_FASTOPEN_CONNECT, TCP_FASTOPEN_NO_COOKIE = 34,
    TCP_INQ = 36, TCP_TX_DELAY = 37, TCP_RTO_MAX_MS = 44, TCP_RTO_MIN_US = 45, TCP_DELACK_MAX_US = 46,
};

const UDP: &[Known] = options! { IPPROTO_UDP;
    UDP_CORK = 1, UDP_NO_CHECK6_TX = 101, UDP_NO_CHECK6_RX = 102, UDP_SEGMENT = 103, UDP_GRO = 104,
};

/// Set after everything, as it forbids changes of the filter.
const LOCK_FILTER: Known =
    Known { level: libc::SOL_SOCKET, option: libc::SO_LOCK_FILTER, name: "SO_LOCK_FILTER", length: 4, late: true };

/// A classic BPF program: `struct sock_filter`s of 8 bytes.
const FILTER: Known = Known {
    level: libc::SOL_SOCKET,
    option: libc::SO_ATTACH_FILTER,
    name: "SO_ATTACH_FILTER",
    length: 8 * 4096,
    late: true,
};

/// The options a socket of some kind has, but for buffers and filters.
fn options_of(kind: SocketKind) -> impl Iterator<Item = &'static Known> {
    let (ip, ipv6) = match kind.domain {
        libc::AF_INET => (IP, &[] as &[Known]),
        libc::AF_INET6 => (IP, IPV6),
        _ => (&[] as &[Known], &[] as &[Known]),
    };
    let transport = match kind.protocol {
        _ if ip.is_empty() => &[],
        libc::IPPROTO_TCP => TCP,
        libc::IPPROTO_UDP => UDP,
        _ => &[],
    };
    // A connection cannot be to a multicast group.
    let is_tcp = kind.protocol == libc::IPPROTO_TCP;
    [COMMON, ip, ipv6, transport]
        .into_iter()
        .flatten()
        .filter(move |known| !(is_tcp && known.name.contains("MULTICAST")))
}

/// Adds a `getsockopt` that may fail. Gives the call, the value and its length.
pub fn get(batch: &mut Batch, fd: impl Into<Arg>, level: i32, option: i32, length: usize) -> (CallId, Slot, Slot) {
    let value = batch.room(length);
    let room = batch.bytes(&(length as u32).to_ne_bytes());
    let call = batch.try_call(Sysno::getsockopt, &[fd.into(), level.into(), option.into(), value.into(), room.into()]);
    (call, value, room)
}

/// What such a call gave.
pub fn got(replies: &Replies, (call, value, length): (CallId, Slot, Slot)) -> Option<&[u8]> {
    replies.result(call).ok()?;
    replies.bytes(value).get(..replies.u32(length) as usize)
}

/// The first four bytes of a value.
pub fn number(value: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(value.get(..4)?.try_into().ok()?))
}

/// Collects what the program has set. A connection that is dropped has values that came with it and not from the
/// program: those are left out.
pub fn collect_options(
    context: &mut CollectFile<'_>,
    kind: SocketKind,
    dropped: bool,
) -> Result<Vec<SocketOption>, DumpError> {
    let fd = context.seen.fd;
    let mut batch = Batch::new();
    // It may fail for want of a free number: then every option counts as set.
    let fresh = batch.try_call(Sysno::socket, args![kind.domain, kind.kind | libc::SOCK_CLOEXEC, kind.protocol]);
    let asked: Vec<_> = options_of(kind)
        .map(|known| {
            let own = get(&mut batch, fd, known.level, known.option, known.length);
            (known, own, get(&mut batch, fresh, known.level, known.option, known.length))
        })
        .collect();
    let buffers = [libc::SO_SNDBUF, libc::SO_RCVBUF, SO_BUF_LOCK].map(|option| {
        let own = get(&mut batch, fd, libc::SOL_SOCKET, option, 4);
        (option, own, get(&mut batch, fresh, libc::SOL_SOCKET, option, 4))
    });
    let lock = get(&mut batch, fd, LOCK_FILTER.level, LOCK_FILTER.option, 4);
    // The length of a filter is counted in instructions.
    let filter = get(&mut batch, fd, libc::SOL_SOCKET, SO_GET_FILTER, 0);
    batch.try_call(Sysno::close, args![fresh]);
    let replies = context.run(&batch)?;

    let mut options = Vec::new();
    let mut keep = |level, option, own: Option<&[u8]>, fresh: Option<&[u8]>| {
        if let Some(value) = own.filter(|&value| Some(value) != fresh) {
            options.push(SocketOption { level, option, value: value.to_vec() });
        }
    };
    let of_connection = [libc::TCP_MAXSEG, libc::TCP_WINDOW_CLAMP];
    for (known, own, fresh) in asked {
        if dropped && known.level == libc::IPPROTO_TCP && of_connection.contains(&known.option) {
            continue;
        }
        keep(known.level, known.option, got(&replies, own), got(&replies, fresh));
    }
    let locked = got(&replies, buffers[2].1).and_then(number).unwrap_or(SNDBUF_LOCK | RCVBUF_LOCK);
    for (option, own, fresh) in buffers {
        let set = match option {
            libc::SO_SNDBUF => locked & SNDBUF_LOCK != 0,
            libc::SO_RCVBUF => locked & RCVBUF_LOCK != 0,
            _ => true,
        };
        if set || !dropped {
            keep(libc::SOL_SOCKET, option, got(&replies, own), got(&replies, fresh));
        }
    }
    match replies.result(filter.0) {
        Err(nix::errno::Errno::EACCES) => context.refuse(
            "an eBPF program is attached to it, which the kernel does not give back",
            "have the program detach it before the dump",
        ),
        Ok(_) if replies.u32(filter.2) != 0 => {
            let instructions = replies.u32(filter.2) as usize;
            let mut batch = Batch::new();
            let program = batch.room(instructions * 8);
            let length = batch.bytes(&(instructions as u32).to_ne_bytes());
            batch.call(Sysno::getsockopt, args![fd, libc::SOL_SOCKET, SO_GET_FILTER, program, length]);
            let replies = context.run(&batch)?;
            let value = replies.bytes(program).to_vec();
            options.push(SocketOption { level: libc::SOL_SOCKET, option: libc::SO_ATTACH_FILTER, value });
        }
        _ => {}
    }
    if let Some(value) = got(&replies, lock).filter(|value| number(value) == Some(1)) {
        options.push(SocketOption { level: LOCK_FILTER.level, option: LOCK_FILTER.option, value: value.to_vec() });
    }
    Ok(options)
}

/// When an option is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Right after the socket is made: it may be needed to bind it.
    Early,
    /// When name, peer and queue are in place.
    Late,
}

/// Calls that set options, to be judged when they have run.
#[derive(Debug, Default)]
pub struct Setting {
    calls: Vec<(CallId, String)>,
    buffers: Vec<((CallId, Slot, Slot), &'static str, u32)>,
}

/// The most calls, and bytes, that [`set_options`] adds for so many options.
pub fn room_for(options: &[SocketOption]) -> (usize, usize) {
    (options.len() * 3, options.iter().map(|option| option.value.len() + 96).sum())
}

/// Adds the calls that set the options of one time, but those `except`ed. Values that no dump gives are an error.
pub fn set_options(
    batch: &mut Batch,
    fd: impl Into<Arg> + Copy,
    kind: SocketKind,
    options: &[SocketOption],
    when: When,
) -> Setting {
    let mut setting = Setting::default();
    for saved in options {
        match (saved.level, saved.option) {
            (libc::SOL_SOCKET, option @ (libc::SO_SNDBUF | libc::SO_RCVBUF)) if when == When::Late => {
                let value = number(&saved.value).unwrap_or_default();
                let (name, force) = match option {
                    libc::SO_SNDBUF => ("SO_SNDBUF", libc::SO_SNDBUFFORCE),
                    _ => ("SO_RCVBUF", libc::SO_RCVBUFFORCE),
                };
                // The kernel doubles what it is given. Beyond the limit of the host it takes CAP_NET_ADMIN.
                let half = batch.bytes(&(value / 2).to_ne_bytes());
                for option in [option, force] {
                    batch.try_call(Sysno::setsockopt, &[fd.into(), 1.into(), option.into(), half.into(), 4.into()]);
                }
                setting.buffers.push((get(batch, fd, libc::SOL_SOCKET, option, 4), name, value));
            }
            (libc::SOL_SOCKET, libc::SO_SNDBUF | libc::SO_RCVBUF) => {}
            (libc::SOL_SOCKET, SO_BUF_LOCK) => {
                if when == When::Late {
                    setting.add(batch, fd, saved, "SO_BUF_LOCK");
                }
            }
            (libc::SOL_SOCKET, libc::SO_ATTACH_FILTER) => {
                if when == When::Late {
                    let program = batch.bytes(&saved.value);
                    let header = batch.words(&[(saved.value.len() / 8) as u64, 0]);
                    batch.pointer(header, 8, program);
                    let args = [fd.into(), saved.level.into(), saved.option.into(), header.into(), 16.into()];
                    let call = batch.try_call(Sysno::setsockopt, &args);
                    setting.calls.push((call, FILTER.name.to_string()));
                }
            }
            _ => {
                let known = options_of(kind).chain([&LOCK_FILTER]);
                let known = known.into_iter().find(|known| (known.level, known.option) == (saved.level, saved.option));
                if let Some(known) = known.filter(|known| known.late == (when == When::Late)) {
                    setting.add(batch, fd, saved, known.name);
                }
            }
        }
    }
    setting
}

impl Setting {
    fn add(&mut self, batch: &mut Batch, fd: impl Into<Arg>, saved: &SocketOption, name: &str) {
        let value = batch.bytes(&saved.value);
        let length = saved.value.len();
        let args = [fd.into(), saved.level.into(), saved.option.into(), value.into(), length.into()];
        let call = batch.try_call(Sysno::setsockopt, &args);
        self.calls.push((call, format!("{name} cannot be set to {}", show(&saved.value))));
    }

    /// # Errors
    /// What could not be set, in words.
    pub fn verify(self, replies: &Replies) -> Result<(), String> {
        for (call, what) in self.calls {
            replies.result(call).map_err(|errno| format!("{what}: {}", errno.desc()))?;
        }
        for (read, name, value) in self.buffers {
            let found = got(replies, read).and_then(number);
            if found != Some(value) {
                let found = found.map_or("unknown".to_string(), |found| found.to_string());
                let limit = if name == "SO_SNDBUF" { "net.core.wmem_max" } else { "net.core.rmem_max" };
                return Err(format!("{name} is {found} instead of {value}; raise {limit} or run with CAP_NET_ADMIN"));
            }
        }
        Ok(())
    }
}

/// A value as a message shows it.
fn show(value: &[u8]) -> String {
    match number(value) {
        Some(number) if value.len() == 4 => number.to_string(),
        _ => match value.strip_suffix(b"\0").unwrap_or(value) {
            text if text.iter().all(u8::is_ascii_graphic) => String::from_utf8_lossy(text).into_owned(),
            _ => format!("{value:02x?}"),
        },
    }
}

/// Whether every option is one that a dump of such a socket can give: an image may come from anywhere.
pub fn are_known(kind: SocketKind, options: &[SocketOption]) -> bool {
    options.iter().all(|saved| match (saved.level, saved.option) {
        (libc::SOL_SOCKET, libc::SO_SNDBUF | libc::SO_RCVBUF | SO_BUF_LOCK) => saved.value.len() == 4,
        (libc::SOL_SOCKET, libc::SO_ATTACH_FILTER) => {
            saved.value.len() <= FILTER.length && saved.value.len().is_multiple_of(8)
        }
        (level, option) => options_of(kind)
            .chain([&LOCK_FILTER])
            .any(|known| (known.level, known.option) == (level, option) && saved.value.len() <= known.length),
    })
}

/// The value of a saved option that is a number.
pub fn saved_number(options: &[SocketOption], level: i32, option: i32) -> Option<u32> {
    options.iter().find(|saved| (saved.level, saved.option) == (level, option)).and_then(|saved| number(&saved.value))
}

/// The value of a saved option that is a name, without its NUL.
pub fn saved_name(options: &[SocketOption], level: i32, option: i32) -> Option<OsString> {
    let saved = options.iter().find(|saved| (saved.level, saved.option) == (level, option))?;
    let name = saved.value.split(|&byte| byte == 0).next().unwrap_or_default();
    (!name.is_empty()).then(|| std::ffi::OsStr::from_bytes(name).to_os_string())
}

/// The inode in `socket:[17]`.
pub fn inode_of(link: &[u8]) -> Option<u32> {
    std::str::from_utf8(link).ok()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// A process that has a socket open, for messages. Looks through all of /proc.
pub fn process_with_socket(inode: u32) -> Option<String> {
    let link = format!("socket:[{inode}]");
    for entry in std::fs::read_dir("/proc").ok()?.flatten() {
        if !entry.file_name().as_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        let Ok(descriptors) = std::fs::read_dir(entry.path().join("fd")) else { continue };
        for descriptor in descriptors.flatten() {
            if std::fs::read_link(descriptor.path()).is_ok_and(|path| path.as_os_str() == link.as_str()) {
                let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
                return Some(format!("process {} ({})", entry.file_name().display(), name.trim_end()));
            }
        }
    }
    None
}

/// What `sock_diag` says of a Unix socket (linux/unix_diag.h).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnixDiag {
    /// `TCP_*`: 1 connected, 7 not, 10 listening.
    pub state: u8,
    /// The inode of the peer; 0 if the peer has none, because it was closed or not accepted yet.
    pub peer: Option<u32>,
    /// Inode and device of the file it is bound to.
    pub file: Option<(u32, u32)>,
    /// Of a listening socket: the inodes of those that wait to be accepted.
    pub waiting: Vec<u32>,
    /// Bytes in the queue, or connections that wait.
    pub receive_queue: u32,
    /// Bytes on the way to the peer; of a listening socket, the backlog.
    pub send_queue: u32,
    /// 1 for receiving, 2 for sending.
    pub shutdown: u8,
}

const NETLINK_SOCK_DIAG: i32 = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
/// `UDIAG_SHOW_*`: VFS, PEER, ICONS, RQLEN.
const SHOW: u32 = 2 | 4 | 8 | 16;

/// The request for one Unix socket: `struct nlmsghdr` and `struct unix_diag_req`.
fn unix_diag_request(inode: u32) -> Vec<u8> {
    let mut request = Vec::with_capacity(40);
    request.extend(40u32.to_ne_bytes());
    request.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend(NLM_F_REQUEST.to_ne_bytes());
    request.extend([0; 8]);
    request.extend([libc::AF_UNIX as u8, 0, 0, 0]);
    request.extend(u32::MAX.to_ne_bytes());
    request.extend(inode.to_ne_bytes());
    request.extend(SHOW.to_ne_bytes());
    // any cookie
    request.extend([0xff; 8]);
    request
}

/// The answer, or the error number in it. `None` if it has no form known here.
fn parse_unix_diag(answer: &[u8]) -> Option<Result<UnixDiag, i32>> {
    let word = |bytes: &[u8], at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let half = |bytes: &[u8], at: usize| Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let message = answer.get(..word(answer, 0)? as usize)?;
    match half(message, 4)? {
        NLMSG_ERROR => return Some(Err((word(message, 16)? as i32).wrapping_neg())),
        SOCK_DIAG_BY_FAMILY => {}
        _ => return None,
    }
    let mut diag = UnixDiag { state: *message.get(18)?, ..UnixDiag::default() };
    // struct unix_diag_msg has 16 bytes; after it, attributes aligned to 4
    let mut rest = message.get(32..)?;
    while rest.len() >= 4 {
        let length = half(rest, 0)? as usize;
        let value = rest.get(4..length)?;
        match half(rest, 2)? {
            1 => diag.file = Some((word(value, 0)?, word(value, 4)?)),
            2 => diag.peer = Some(word(value, 0)?),
            3 => diag.waiting = value.chunks_exact(4).filter_map(|inode| word(inode, 0)).collect(),
            4 => (diag.receive_queue, diag.send_queue) = (word(value, 0)?, word(value, 4)?),
            6 => diag.shutdown = *value.first()?,
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(Ok(diag))
}

/// Asks the kernel about a Unix socket, in the network namespace of its process.
pub fn unix_diag(context: &mut CollectFile<'_>, inode: u32) -> Result<UnixDiag, DumpError> {
    let diag = ask_unix_diag(context.target(), inode).map_err(|source| context.target_error(source))?;
    diag.map_err(|source| context.io_error("sock_diag", source))
}

/// The same, asked in any process of the namespace.
pub fn ask_unix_diag(target: &mut dyn Target, inode: u32) -> Result<std::io::Result<UnixDiag>, TargetError> {
    let mut batch = Batch::new();
    let request = batch.bytes(&unix_diag_request(inode));
    // enough for the connections of a backlog of 4096
    let answer = batch.room(20 * 1024);
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    let netlink = batch.call(Sysno::socket, args![libc::AF_NETLINK, kind, NETLINK_SOCK_DIAG]);
    batch.try_call(Sysno::sendto, args![netlink, request, request.len(), 0, 0, 0]);
    let length = batch.try_call(Sysno::recvfrom, args![netlink, answer, answer.len(), libc::MSG_DONTWAIT, 0, 0]);
    batch.call(Sysno::close, args![netlink]);
    let replies = target.run(&batch)?;
    let found = replies.result(length).map_err(|errno| errno as i32);
    let parsed = found.and_then(|length| {
        parse_unix_diag(&replies.bytes(answer)[..(length as usize).min(answer.len())]).unwrap_or(Err(libc::EBADMSG))
    });
    Ok(parsed.map_err(std::io::Error::from_raw_os_error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = ((value.len() + 4) as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = ((body.len() + 16) as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn a_listening_socket_with_two_waiting() {
        let mut body = vec![libc::AF_UNIX as u8, 1, 10, 0];
        body.extend([0; 12]);
        body.extend(attribute(0, b"/tmp/socket"));
        body.extend(attribute(1, &[7, 0, 0, 0, 8, 0, 0, 0]));
        body.extend(attribute(3, &[9, 0, 0, 0, 11, 0, 0, 0]));
        body.extend(attribute(4, &[2, 0, 0, 0, 64, 0, 0, 0]));
        body.extend(attribute(6, &[1]));
        let diag = parse_unix_diag(&message(SOCK_DIAG_BY_FAMILY, &body)).unwrap().unwrap();
        let waiting = vec![9, 11];
        let expected = UnixDiag {
            state: 10,
            peer: None,
            file: Some((7, 8)),
            waiting,
            receive_queue: 2,
            send_queue: 64,
            shutdown: 1,
        };
        assert_eq!(diag, expected);
    }

    #[test]
    fn errors_and_torn_answers() {
        let error = message(NLMSG_ERROR, &(-libc::ENOENT).to_ne_bytes());
        assert_eq!(parse_unix_diag(&error), Some(Err(libc::ENOENT)));
        let mut body = vec![1, 1, 1, 0];
        body.extend([0; 12]);
        body.extend(attribute(2, &[5, 0, 0, 0]));
        let whole = message(SOCK_DIAG_BY_FAMILY, &body);
        for length in 0..whole.len() {
            assert_eq!(parse_unix_diag(&whole[..length]), None, "{length} bytes");
        }
        // an attribute that says it is longer than the message, or shorter than its own header
        for length in [200u16, 3, 0] {
            let mut bad = whole.clone();
            bad[32..34].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(parse_unix_diag(&bad), None, "attribute of {length} bytes");
        }
    }

    #[test]
    fn only_known_options_of_the_kind() {
        let tcp = SocketKind { domain: libc::AF_INET, kind: libc::SOCK_STREAM, protocol: libc::IPPROTO_TCP };
        let unix = SocketKind { domain: libc::AF_UNIX, kind: libc::SOCK_STREAM, protocol: 0 };
        let option = |level, option, length| [SocketOption { level, option, value: vec![0; length] }];
        assert!(are_known(tcp, &option(libc::IPPROTO_TCP, libc::TCP_NODELAY, 4)));
        assert!(!are_known(unix, &option(libc::IPPROTO_TCP, libc::TCP_NODELAY, 4)));
        assert!(!are_known(tcp, &option(libc::IPPROTO_TCP, libc::TCP_NODELAY, 400)));
        assert!(!are_known(tcp, &option(libc::IPPROTO_TCP, libc::TCP_REPAIR, 4)));
        assert!(!are_known(unix, &option(libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, 12)), "half an instruction");
    }

    #[test]
    fn no_option_is_listed_twice() {
        let tcp = SocketKind { domain: libc::AF_INET6, kind: libc::SOCK_STREAM, protocol: libc::IPPROTO_TCP };
        let mut seen = std::collections::HashSet::new();
        for known in options_of(tcp).chain(UDP) {
            assert!(seen.insert((known.level, known.option)), "{}", known.name);
        }
    }

    #[test]
    fn links() {
        assert_eq!(inode_of(b"socket:[44055]"), Some(44055));
        assert_eq!(inode_of(b"pipe:[1]"), None);
    }

    #[test]
    fn values_in_messages() {
        assert_eq!(show(&5u32.to_ne_bytes()), "5");
        assert_eq!(show(b"eth0\0"), "eth0");
    }
}
