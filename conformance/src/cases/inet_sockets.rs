//! TCP and UDP sockets.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage};

use super::unix_sockets::{option, set_option};
use crate::case::{Case, Checkpoint};
use crate::expect::{done, equal, that};

pub fn cases() -> Vec<Case> {
    const SECTIONS: &[&str] = &["inet_sockets"];
    vec![
        Case::new("inet_sockets/tcp-listening", SECTIONS, tcp_listening),
        Case::new("inet_sockets/tcp-not-connected", SECTIONS, tcp_not_connected),
        Case::new("inet_sockets/tcp-options", SECTIONS, tcp_options).privileged("the options take CAP_NET_ADMIN"),
        Case::new("inet_sockets/tcp-both-families", SECTIONS, tcp_both_families),
        Case::new("inet_sockets/udp", SECTIONS, udp),
        Case::new("inet_sockets/udp-options", SECTIONS, udp_options),
        Case::new("inet_sockets/shared-port", SECTIONS, shared_port),
        Case::new("inet_sockets/multicast", SECTIONS, multicast),
        Case::new("inet_sockets/filter", SECTIONS, filter),
        Case::new("inet_sockets/tcp-closed", SECTIONS, tcp_closed).tcp_close(),
        Case::new("inet_sockets/tcp-was-reset", SECTIONS, tcp_was_reset),
        Case::new("inet_sockets/tcp-waiting", SECTIONS, tcp_waiting),
        Case::new("inet_sockets/tcp-waiting-with-data", SECTIONS, tcp_waiting_with_data)
            .refused_at_dump("waits to be accepted, and the 5 bytes"),
        Case::new("inet_sockets/udp-unread", SECTIONS, udp_unread).refused_at_dump("received and not read"),
        Case::new("inet_sockets/port-taken", SECTIONS, port_taken)
            .after_dump(take_port)
            .refused_at_restore("is in use"),
        Case::new("inet_sockets/netlink", SECTIONS, netlink).refused_at_dump("netlink sockets"),
        Case::new("inet_sockets/raw", SECTIONS, raw)
            .privileged("raw sockets take CAP_NET_RAW")
            .refused_at_dump("raw IP sockets"),
    ]
}

type Verdict = Result<(), String>;

fn failed(what: &str) -> impl Fn(std::io::Error) -> String + '_ {
    move |error| format!("{what}: {error}")
}

fn errno(what: &str) -> impl Fn(nix::errno::Errno) -> String + '_ {
    move |error| format!("{what}: {error}")
}

fn socket(address: SocketAddr, kind: SockType) -> Result<OwnedFd, String> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    nix::sys::socket::socket(family, kind, SockFlag::SOCK_CLOEXEC, None).map_err(errno("socket"))
}

fn bind(socket: &OwnedFd, address: SocketAddr) -> Verdict {
    nix::sys::socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(address)).map_err(errno("bind"))
}

fn exchange(listener: &TcpListener, address: SocketAddr) -> Verdict {
    let mut client = TcpStream::connect(address).map_err(failed("connect"))?;
    let (mut server, from) = listener.accept().map_err(failed("accept"))?;
    equal("who connected", client.local_addr().map_err(failed("getsockname"))?.port(), from.port())?;
    client.write_all(b"hello").map_err(failed("write"))?;
    let mut text = [0; 5];
    server.read_exact(&mut text).map_err(failed("read"))?;
    equal("through a new connection", b"hello", &text)
}

const LOOPBACK: [SocketAddr; 2] = [
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0),
    SocketAddr::new(std::net::IpAddr::V6(Ipv6Addr::LOCALHOST), 0),
];

fn tcp_listening(checkpoint: &Checkpoint) -> Verdict {
    let mut listeners = Vec::new();
    for address in LOOPBACK {
        let listener = TcpListener::bind(address).map_err(failed("bind"))?;
        listener.set_nonblocking(true).map_err(failed("O_NONBLOCK"))?;
        let address = listener.local_addr().map_err(failed("getsockname"))?;
        listeners.push((listener, address));
    }
    checkpoint.wait()?;
    for (listener, address) in listeners {
        equal("its address", address, listener.local_addr().map_err(failed("getsockname"))?)?;
        equal("SO_ACCEPTCONN", 1, option(&listener, libc::SOL_SOCKET, libc::SO_ACCEPTCONN)?)?;
        equal("nobody waits", Some(ErrorKind::WouldBlock), listener.accept().err().map(|error| error.kind()))?;
        exchange(&listener, address)?;
    }
    Ok(())
}

fn tcp_not_connected(checkpoint: &Checkpoint) -> Verdict {
    let fresh = socket(LOOPBACK[0], SockType::Stream)?;
    let bound = socket(LOOPBACK[0], SockType::Stream)?;
    bind(&bound, LOOPBACK[0])?;
    let bound = TcpListener::from(bound);
    let address = bound.local_addr().map_err(failed("getsockname"))?;
    checkpoint.wait()?;
    equal("the bound one", address, bound.local_addr().map_err(failed("getsockname"))?)?;
    equal("SO_ACCEPTCONN", 0, option(&bound, libc::SOL_SOCKET, libc::SO_ACCEPTCONN)?)?;
    nix::sys::socket::listen(&bound, Backlog::new(3).map_err(errno("backlog"))?).map_err(errno("listen"))?;
    let to = SockaddrStorage::from(address);
    nix::sys::socket::connect(fresh.as_raw_fd(), &to).map_err(errno("connect"))?;
    bound.accept().map_err(failed("accept")).map(drop)
}

/// (level, option, value)
type Option3 = (i32, i32, i32);

fn keeps(checkpoint: &Checkpoint, socket: &OwnedFd, set: &[Option3], then: impl FnOnce() -> Verdict) -> Verdict {
    for &(level, name, value) in set {
        set_option(socket, level, name, value).map_err(|error| format!("option {level}, {name}: {error}"))?;
    }
    then()?;
    let all = || set.iter().map(|&(level, name, _)| option(socket, level, name)).collect::<Result<Vec<_>, _>>();
    let before = all()?;
    checkpoint.wait()?;
    equal("the options", before, all()?)
}

fn tcp_options(checkpoint: &Checkpoint) -> Verdict {
    let listener = socket(LOOPBACK[0], SockType::Stream)?;
    let set = [
        (libc::SOL_SOCKET, libc::SO_REUSEADDR, 1),
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
        (libc::SOL_SOCKET, libc::SO_RCVBUF, 123_456),
        (libc::SOL_SOCKET, libc::SO_SNDBUF, 65_432),
        (libc::SOL_SOCKET, libc::SO_MARK, 9),
        (libc::SOL_SOCKET, libc::SO_PRIORITY, 3),
        (libc::IPPROTO_TCP, libc::TCP_NODELAY, 1),
        (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 77),
        (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 7),
        (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 3),
        (libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 9),
        (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 12_345),
        (libc::IPPROTO_TCP, libc::TCP_FASTOPEN, 5),
        (libc::IPPROTO_TCP, libc::TCP_MAXSEG, 1000),
        (libc::IPPROTO_IP, libc::IP_TOS, 0x10),
        (libc::IPPROTO_IP, libc::IP_TTL, 33),
        (libc::IPPROTO_IP, libc::IP_FREEBIND, 1),
    ];
    let reno = *b"reno\0";
    // SAFETY: reads the name.
    let result = unsafe {
        let value = reno.as_ptr().cast();
        libc::setsockopt(listener.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_CONGESTION, value, 5)
    };
    done("TCP_CONGESTION", result)?;
    keeps(checkpoint, &listener, &set, || {
        // No address of this host.
        bind(&listener, "192.0.2.77:7777".parse().map_err(|_| "address")?)?;
        nix::sys::socket::listen(&listener, Backlog::new(17).map_err(errno("backlog"))?).map_err(errno("listen"))
    })?;
    let (mut name, mut length) = ([0u8; 16], 16);
    // SAFETY: room for the name.
    let result = unsafe {
        let value = name.as_mut_ptr().cast();
        libc::getsockopt(listener.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_CONGESTION, value, &mut length)
    };
    done("TCP_CONGESTION", result)?;
    that(&format!("reno is its congestion control: {name:?}"), name.starts_with(b"reno\0"))?;
    // tcpi_sacked of a listening socket is its backlog
    let mut info = [0u32; 26];
    let mut length = 104;
    // SAFETY: room for as much of the structure as it says.
    let result = unsafe {
        let value = info.as_mut_ptr().cast();
        libc::getsockopt(listener.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, value, &mut length)
    };
    done("TCP_INFO", result)?;
    equal("backlog", 17, info[7])
}

/// One port, by a socket of each family.
fn tcp_both_families(checkpoint: &Checkpoint) -> Verdict {
    let four = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(failed("bind"))?;
    let port = four.local_addr().map_err(failed("getsockname"))?.port();
    let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let six = socket(address, SockType::Stream)?;
    set_option(&six, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)?;
    bind(&six, address)?;
    nix::sys::socket::listen(&six, Backlog::new(3).map_err(errno("backlog"))?).map_err(errno("listen"))?;
    let six = TcpListener::from(six);
    checkpoint.wait()?;
    equal("IPV6_V6ONLY", 1, option(&six, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY)?)?;
    exchange(&four, (Ipv4Addr::LOCALHOST, port).into())?;
    exchange(&six, (Ipv6Addr::LOCALHOST, port).into())
}

fn udp(checkpoint: &Checkpoint) -> Verdict {
    let mut all = Vec::new();
    for address in LOOPBACK {
        let bind = || UdpSocket::bind(address).map_err(failed("bind"));
        let (bound, connected) = (bind()?, bind()?);
        let to = bound.local_addr().map_err(failed("getsockname"))?;
        connected.connect(to).map_err(failed("connect"))?;
        let from = connected.local_addr().map_err(failed("getsockname"))?;
        all.push((bound, to, connected, from));
    }
    let unbound = socket(LOOPBACK[0], SockType::Datagram)?;
    checkpoint.wait()?;
    for (bound, to, connected, from) in all {
        equal("the destination", to, connected.peer_addr().map_err(failed("getpeername"))?)?;
        connected.send(b"there").map_err(failed("send"))?;
        let mut buffer = [0; 64];
        let (length, sender) = bound.recv_from(&mut buffer).map_err(failed("recvfrom"))?;
        equal("what comes, from whom", (b"there".as_slice(), from), (&buffer[..length], sender))?;
        bound.send_to(b"and back", from).map_err(failed("sendto"))?;
        let length = connected.recv(&mut buffer).map_err(failed("recv"))?;
        equal("what comes back", b"and back".as_slice(), &buffer[..length])?;
    }
    let unbound = UdpSocket::from(unbound);
    equal("no port", 0, unbound.local_addr().map_err(failed("getsockname"))?.port())
}

fn udp_options(checkpoint: &Checkpoint) -> Verdict {
    let six = socket(LOOPBACK[1], SockType::Datagram)?;
    let set = [
        (libc::SOL_SOCKET, libc::SO_BROADCAST, 1),
        (libc::SOL_SOCKET, libc::SO_RCVBUF, 54_321),
        (libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, 1),
        (libc::SOL_SOCKET, libc::SO_RXQ_OVFL, 1),
        (libc::IPPROTO_IP, libc::IP_PKTINFO, 1),
        (libc::IPPROTO_IP, libc::IP_RECVERR, 1),
        (libc::IPPROTO_IPV6, libc::IPV6_RECVERR, 1),
        (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1),
        (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, 9),
        (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_HOPS, 4),
        (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_LOOP, 0),
        (libc::IPPROTO_IPV6, libc::IPV6_TCLASS, 0x20),
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, 3),
        (libc::IPPROTO_UDP, 104, 1), // UDP_GRO
    ];
    keeps(checkpoint, &six, &set, || bind(&six, LOOPBACK[1]))
}

fn shared_port(checkpoint: &Checkpoint) -> Verdict {
    let mut sockets = Vec::new();
    let mut address = LOOPBACK[0];
    for _ in 0..3 {
        let next = socket(address, SockType::Stream)?;
        set_option(&next, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
        bind(&next, address)?;
        nix::sys::socket::listen(&next, Backlog::new(3).map_err(errno("backlog"))?).map_err(errno("listen"))?;
        let next = TcpListener::from(next);
        address = next.local_addr().map_err(failed("getsockname"))?;
        sockets.push(next);
    }
    checkpoint.wait()?;
    for socket in &sockets {
        equal("its address", address, socket.local_addr().map_err(failed("getsockname"))?)?;
        equal("SO_REUSEPORT", 1, option(socket, libc::SOL_SOCKET, libc::SO_REUSEPORT)?)?;
    }
    TcpStream::connect(address).map_err(failed("connect")).map(drop)
}

fn multicast(checkpoint: &Checkpoint) -> Verdict {
    let group = Ipv4Addr::new(239, 1, 2, 3);
    let member = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(failed("bind"))?;
    let stranger = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(failed("bind"))?;
    member.join_multicast_v4(&group, &Ipv4Addr::LOCALHOST).map_err(failed("join"))?;
    let group6: Ipv6Addr = "ff02::1234".parse().map_err(|_| "address")?;
    let member6 = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).map_err(failed("bind"))?;
    member6.join_multicast_v6(&group6, 1).map_err(failed("join"))?;
    checkpoint.wait()?;
    // Who is a member can leave, and join only after that.
    let again = member.join_multicast_v4(&group, &Ipv4Addr::LOCALHOST).map_err(|error| error.kind());
    equal("joining again", Err(ErrorKind::AddrInUse), again)?;
    member.leave_multicast_v4(&group, &Ipv4Addr::LOCALHOST).map_err(failed("leave"))?;
    member6.leave_multicast_v6(&group6, 1).map_err(failed("leave IPv6"))?;
    let left = stranger.leave_multicast_v4(&group, &Ipv4Addr::LOCALHOST).map_err(|error| error.kind());
    equal("who is no member cannot leave", Err(ErrorKind::AddrNotAvailable), left)
}

/// A classic BPF program that lets only four bytes of a datagram through.
fn filter(checkpoint: &Checkpoint) -> Verdict {
    let receiver = UdpSocket::bind(LOOPBACK[0]).map_err(failed("bind"))?;
    // ret #12: the UDP header has 8 bytes
    let program = [libc::sock_filter { code: 6, jt: 0, jf: 0, k: 12 }];
    let header = libc::sock_fprog { len: 1, filter: program.as_ptr().cast_mut() };
    // SAFETY: reads the program.
    let result = unsafe {
        let value = (&raw const header).cast();
        libc::setsockopt(receiver.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, value, 16)
    };
    done("SO_ATTACH_FILTER", result)?;
    checkpoint.wait()?;
    let to = receiver.local_addr().map_err(failed("getsockname"))?;
    UdpSocket::bind(LOOPBACK[0]).and_then(|sender| sender.send_to(b"longer", to)).map_err(failed("sendto"))?;
    let mut buffer = [0; 64];
    let length = receiver.recv(&mut buffer).map_err(failed("recv"))?;
    equal("what the filter lets through", b"long".as_slice(), &buffer[..length])
}

fn connection() -> Result<(TcpListener, TcpStream, TcpStream), String> {
    let listener = TcpListener::bind(LOOPBACK[0]).map_err(failed("bind"))?;
    let client =
        TcpStream::connect(listener.local_addr().map_err(failed("getsockname"))?).map_err(failed("connect"))?;
    let (server, _) = listener.accept().map_err(failed("accept"))?;
    Ok((listener, client, server))
}

/// After `--tcp-close` a connection is as if its other end had reset it. With `--leave-running` it goes on.
fn tcp_closed(checkpoint: &Checkpoint) -> Verdict {
    let listener = TcpListener::bind(LOOPBACK[0]).map_err(failed("bind"))?;
    let address = listener.local_addr().map_err(failed("getsockname"))?;
    // What is sent before it is accepted cannot be saved.
    let mut client = TcpStream::connect(address).map_err(failed("connect"))?;
    client.write_all(b"early").map_err(failed("write"))?;
    let six = TcpListener::bind(LOOPBACK[1]).map_err(failed("bind"))?;
    let six_client = TcpStream::connect(six.local_addr().map_err(failed("getsockname"))?).map_err(failed("connect"))?;
    (&six_client).write_all(b"early").map_err(failed("write"))?;
    client.set_nodelay(true).map_err(failed("TCP_NODELAY"))?;
    checkpoint.wait()?;
    equal("TCP_NODELAY", true, client.nodelay().map_err(failed("TCP_NODELAY"))?)?;
    let error = |result: std::io::Result<usize>| result.map_err(|error| error.kind());
    client.set_nonblocking(true).map_err(failed("O_NONBLOCK"))?;
    if error(client.read(&mut [0])) == Err(ErrorKind::WouldBlock) {
        // It was left running.
        return client.write_all(b"x").map_err(failed("write"));
    }
    equal("the next read", Ok(0), error(client.read(&mut [0])))?;
    equal("a write", Err(ErrorKind::BrokenPipe), error(client.write(b"x")))?;
    equal("of IPv6", Err(ErrorKind::ConnectionReset), error((&six_client).read(&mut [0])))?;
    equal("no peer", Some(ErrorKind::NotConnected), client.peer_addr().err().map(|error| error.kind()))?;
    exchange(&listener, address)
}

fn tcp_was_reset(checkpoint: &Checkpoint) -> Verdict {
    let (_listener, client, server) = connection()?;
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    // SAFETY: reads the structure.
    let result = unsafe {
        let value = (&raw const linger).cast();
        libc::setsockopt(server.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, value, 8)
    };
    done("SO_LINGER", result)?;
    drop(server);
    crate::expect::eventually("the reset comes", || {
        let mut poll = libc::pollfd { fd: client.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
        // SAFETY: one structure.
        unsafe { libc::poll(&mut poll, 1, 0) == 1 }
    })?;
    checkpoint.wait()?;
    let error = |result: std::io::Result<usize>| result.map_err(|error| error.kind());
    equal("the first read", Err(ErrorKind::ConnectionReset), error((&client).read(&mut [0])))?;
    equal("the next", Ok(0), error((&client).read(&mut [0])))
}

fn tcp_waiting(checkpoint: &Checkpoint) -> Verdict {
    let listener = TcpListener::bind(LOOPBACK[0]).map_err(failed("bind"))?;
    let address = listener.local_addr().map_err(failed("getsockname"))?;
    let clients = (0..3).map(|_| TcpStream::connect(address)).collect::<Result<Vec<_>, _>>();
    let mut clients = clients.map_err(failed("connect"))?;
    clients[1].set_nonblocking(true).map_err(failed("O_NONBLOCK"))?;
    clients[2].set_nodelay(true).map_err(failed("TCP_NODELAY"))?;
    let own = |clients: &[TcpStream]| clients.iter().map(TcpStream::local_addr).collect::<Result<Vec<_>, _>>();
    let before = own(&clients).map_err(failed("getsockname"))?;
    checkpoint.wait()?;
    equal("addresses", before.clone(), own(&clients).map_err(failed("getsockname"))?)?;
    equal("TCP_NODELAY", true, clients[2].nodelay().map_err(failed("TCP_NODELAY"))?)?;
    for _ in &before {
        let (mut server, from) = listener.accept().map_err(failed("accept"))?;
        let number = before.iter().position(|own| *own == from).ok_or("a stranger has connected")?;
        clients[number].write_all(&[number as u8]).map_err(failed("write"))?;
        let mut byte = [9];
        server.read_exact(&mut byte).map_err(failed("read"))?;
        equal("what a client writes", [number as u8], byte)?;
    }
    Ok(())
}

fn tcp_waiting_with_data(checkpoint: &Checkpoint) -> Verdict {
    let listener = TcpListener::bind(LOOPBACK[0]).map_err(failed("bind"))?;
    let address = listener.local_addr().map_err(failed("getsockname"))?;
    let mut client = TcpStream::connect(address).map_err(failed("connect"))?;
    client.write_all(b"early").map_err(failed("write"))?;
    checkpoint.wait()?;
    let (mut server, _) = listener.accept().map_err(failed("accept"))?;
    let mut text = [0; 5];
    server.read_exact(&mut text).map_err(failed("read"))?;
    equal("what was sent early", b"early", &text)
}

fn udp_unread(checkpoint: &Checkpoint) -> Verdict {
    let receiver = UdpSocket::bind(LOOPBACK[0]).map_err(failed("bind"))?;
    let to = receiver.local_addr().map_err(failed("getsockname"))?;
    UdpSocket::bind(LOOPBACK[0]).and_then(|sender| sender.send_to(b"here", to)).map_err(failed("sendto"))?;
    checkpoint.wait()?;
    let mut buffer = [0; 64];
    equal("bytes", 4, receiver.recv(&mut buffer).map_err(failed("recv"))?)
}

fn port_taken(checkpoint: &Checkpoint) -> Verdict {
    let listener = TcpListener::bind(LOOPBACK[0]).map_err(failed("bind"))?;
    let address = listener.local_addr().map_err(failed("getsockname"))?;
    std::fs::write(checkpoint.dir().join("address"), address.to_string()).map_err(failed("address"))?;
    checkpoint.wait()?;
    exchange(&listener, address)
}

fn take_port(dir: &Path) {
    let address = std::fs::read_to_string(dir.join("address")).expect("the subject has written it");
    let listener = TcpListener::bind(address).expect("its port is free");
    // Until the end of the trial.
    std::mem::forget(listener);
}

fn netlink(checkpoint: &Checkpoint) -> Verdict {
    // SAFETY: makes a new descriptor, which the OwnedFd owns.
    let _socket = unsafe {
        let fd = libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE);
        OwnedFd::from_raw_fd(done("socket", fd)?)
    };
    checkpoint.wait()
}

fn raw(checkpoint: &Checkpoint) -> Verdict {
    // SAFETY: makes a new descriptor, which the OwnedFd owns.
    let _socket = unsafe {
        OwnedFd::from_raw_fd(done("socket", libc::socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP))?)
    };
    checkpoint.wait()
}
