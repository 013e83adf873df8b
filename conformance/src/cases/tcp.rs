//! TCP connections within the tree.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

use super::unix_sockets::{option, set_option};
use crate::case::{Case, Checkpoint};
use crate::expect::{equal, eventually, in_child, that};

pub fn cases() -> Vec<Case> {
    const SECTIONS: &[&str] = &["inet_sockets"];
    vec![
        Case::new("inet_sockets/tcp-connections", SECTIONS, connections).rounds(2),
        Case::new("inet_sockets/tcp-processes", SECTIONS, processes).rounds(2),
        Case::new("inet_sockets/tcp-half-closed", SECTIONS, half_closed),
        Case::new("inet_sockets/tcp-peer-gone", SECTIONS, peer_gone),
        Case::new("inet_sockets/tcp-full", SECTIONS, full).privileged("the queue of a sender takes CAP_NET_ADMIN"),
        Case::new("inet_sockets/tcp-connection-options", SECTIONS, connection_options),
        Case::new("inet_sockets/tcp-one-port", SECTIONS, one_port),
        Case::new("inet_sockets/tcp-urgent", SECTIONS, urgent).refused_at_dump("urgent data"),
        Case::new("inet_sockets/tcp-outside", SECTIONS, outside).refused_at_dump("not part of the tree"),
    ]
}

type Verdict = Result<(), String>;

fn failed(what: &str) -> impl Fn(std::io::Error) -> String + '_ {
    move |error| format!("{what}: {error}")
}

/// A listening socket, and a connection through it: client and server.
fn connection(
    listen: impl Into<SocketAddr>,
    connect: impl Into<std::net::IpAddr>,
) -> Result<(TcpListener, TcpStream, TcpStream), String> {
    let listener = TcpListener::bind(listen.into()).map_err(failed("bind"))?;
    let port = listener.local_addr().map_err(failed("getsockname"))?.port();
    let client = TcpStream::connect((connect.into(), port)).map_err(failed("connect"))?;
    let (server, _) = listener.accept().map_err(failed("accept"))?;
    Ok((listener, client, server))
}

fn addresses(socket: &TcpStream) -> Result<[SocketAddr; 2], String> {
    Ok([socket.local_addr().map_err(failed("getsockname"))?, socket.peer_addr().map_err(failed("getpeername"))?])
}

fn read(mut socket: &TcpStream, length: usize) -> Result<Vec<u8>, String> {
    let mut data = vec![0; length];
    socket.read_exact(&mut data).map_err(failed("read"))?;
    Ok(data)
}

fn write(mut socket: &TcpStream, data: &[u8]) -> Verdict {
    socket.write_all(data).map_err(failed("write"))
}

fn ends(mut socket: &TcpStream) -> Verdict {
    equal("the end", 0, socket.read(&mut [0]).map_err(failed("read"))?)
}

/// Waits until so much can be read.
fn arrived(socket: &TcpStream, length: usize) -> Verdict {
    eventually("the data arrives", || {
        let mut waiting = 0;
        // SAFETY: FIONREAD writes an integer.
        unsafe { libc::ioctl(socket.as_raw_fd(), libc::FIONREAD, &mut waiting) };
        waiting as usize == length
    })
}

/// IPv4, IPv6, and IPv4 through a socket of IPv6; unread data both ways.
fn connections(checkpoint: &Checkpoint) -> Verdict {
    let all = [
        connection((Ipv4Addr::LOCALHOST, 0), Ipv4Addr::LOCALHOST)?,
        connection((Ipv4Addr::UNSPECIFIED, 0), Ipv4Addr::new(127, 0, 0, 9))?,
        connection((Ipv6Addr::LOCALHOST, 0), Ipv6Addr::LOCALHOST)?,
        connection((Ipv6Addr::UNSPECIFIED, 0), Ipv4Addr::LOCALHOST)?,
    ];
    let mut before = Vec::new();
    for (_, client, server) in &all {
        write(client, b"to the server")?;
        write(server, b"to the client")?;
        equal("a part", b"to ".to_vec(), read(server, 3)?)?;
        before.push([addresses(client)?, addresses(server)?]);
    }
    checkpoint.wait()?;
    for ((listener, client, server), before) in all.iter().zip(before) {
        equal("addresses", before, [addresses(client)?, addresses(server)?])?;
        equal("what the server had not read", b"the server".to_vec(), read(server, 10)?)?;
        equal("what the client had not read", b"to the client".to_vec(), read(client, 13)?)?;
        write(client, b"more")?;
        equal("more", b"more".to_vec(), read(server, 4)?)?;
        let another = TcpStream::connect(before[0][1]).map_err(failed("connect"))?;
        let (accepted, _) = listener.accept().map_err(failed("accept"))?;
        write(&accepted, b"new")?;
        equal("a new connection", b"new".to_vec(), read(&another, 3)?)?;
    }
    for (_, client, server) in all {
        drop(client);
        ends(&server)?;
    }
    Ok(())
}

/// Both ends wait for the other, in processes of their own.
fn processes(checkpoint: &Checkpoint) -> Verdict {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(failed("bind"))?;
    let address = listener.local_addr().map_err(failed("getsockname"))?;
    let sum = |data: &[u8]| data.iter().fold(7u64, |sum, &byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
    let child = in_child(|| {
        // Nothing changes in memory while it waits.
        let mut data = vec![1; 300_000];
        let mut client = TcpStream::connect(address).map_err(failed("connect"))?;
        write(&client, b"hello")?;
        // The answer comes after the checkpoint.
        client.read_exact(&mut data).map_err(failed("read"))?;
        write(&client, &sum(&data).to_ne_bytes())?;
        ends(&client)
    })?;
    let (server, _) = listener.accept().map_err(failed("accept"))?;
    drop(listener);
    equal("hello", b"hello".to_vec(), read(&server, 5)?)?;
    checkpoint.wait()?;
    let data: Vec<u8> = (0..300_000).map(|byte| (byte % 253) as u8).collect();
    write(&server, &data)?;
    equal("the sum", sum(&data).to_ne_bytes().to_vec(), read(&server, 8)?)?;
    drop(server);
    child.passed()
}

fn half_closed(checkpoint: &Checkpoint) -> Verdict {
    let (_l, client, server) = connection((Ipv4Addr::LOCALHOST, 0), Ipv4Addr::LOCALHOST)?;
    write(&client, b"last words")?;
    client.shutdown(Shutdown::Write).map_err(failed("shutdown"))?;
    // One that has the end of the data before it, and one that only receives no more.
    let (_m, early, late) = connection((Ipv6Addr::LOCALHOST, 0), Ipv6Addr::LOCALHOST)?;
    late.shutdown(Shutdown::Write).map_err(failed("shutdown"))?;
    ends(&early)?;
    let (_n, deaf, speaker) = connection((Ipv4Addr::LOCALHOST, 0), Ipv4Addr::LOCALHOST)?;
    deaf.shutdown(Shutdown::Read).map_err(failed("shutdown"))?;
    checkpoint.wait()?;
    equal("what was sent before", b"last words".to_vec(), read(&server, 10)?)?;
    ends(&server)?;
    equal("a write after it", Err(ErrorKind::BrokenPipe), (&client).write(b"x").map_err(|error| error.kind()))?;
    write(&server, b"the answer")?;
    equal("the other way", b"the answer".to_vec(), read(&client, 10)?)?;
    drop(server);
    ends(&client)?;
    ends(&early)?;
    write(&early, b"still open")?;
    equal("from the early end", b"still open".to_vec(), read(&late, 10)?)?;
    ends(&deaf)?;
    write(&deaf, b"it speaks")?;
    equal("from the deaf end", b"it speaks".to_vec(), read(&speaker, 9)?)
}

fn peer_gone(checkpoint: &Checkpoint) -> Verdict {
    let (_l, client, server) = connection((Ipv4Addr::LOCALHOST, 0), Ipv4Addr::LOCALHOST)?;
    write(&server, b"will")?;
    drop(server);
    arrived(&client, 4)?;
    eventually("the end arrives", || {
        let mut poll = libc::pollfd { fd: client.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
        // SAFETY: one structure.
        unsafe { libc::poll(&mut poll, 1, 0) == 1 }
    })?;
    let before = addresses(&client)?;
    checkpoint.wait()?;
    equal("addresses", before, addresses(&client)?)?;
    equal("what was left", b"will".to_vec(), read(&client, 4)?)?;
    ends(&client)?;
    // The first write finds out that nobody is there.
    write(&client, b"x")?;
    eventually("a write fails", || (&client).write(b"x").is_err())
}

/// As much as goes in, both ways.
fn full(checkpoint: &Checkpoint) -> Verdict {
    let (_l, client, server) = connection((Ipv4Addr::LOCALHOST, 0), Ipv4Addr::LOCALHOST)?;
    let mut sent = Vec::new();
    for (number, socket) in [&client, &server].into_iter().enumerate() {
        socket.set_nonblocking(true).map_err(failed("O_NONBLOCK"))?;
        let mut all = Vec::<u8>::new();
        let mut tries = 0;
        while tries < 20 {
            let data: Vec<u8> = (0..50_000).map(|byte| ((all.len() + byte + number) % 251) as u8).collect();
            match (&mut &*socket).write(&data) {
                Ok(count) => all.extend(&data[..count]),
                // The kernel makes room for a while.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    tries += 1;
                    std::thread::yield_now();
                }
                Err(error) => return Err(failed("write")(error)),
            }
        }
        sent.push(all);
    }
    client.shutdown(Shutdown::Write).map_err(failed("shutdown"))?;
    checkpoint.wait()?;
    client.set_nonblocking(false).map_err(failed("O_NONBLOCK"))?;
    server.set_nonblocking(false).map_err(failed("O_NONBLOCK"))?;
    let found = read(&server, sent[0].len())?;
    that(&format!("{} bytes of the client", sent[0].len()), found == sent[0])?;
    ends(&server)?;
    let found = read(&client, sent[1].len())?;
    that(&format!("{} bytes of the server", sent[1].len()), found == sent[1])?;
    drop(server);
    ends(&client)
}

fn connection_options(checkpoint: &Checkpoint) -> Verdict {
    let (listener, client, server) = connection((Ipv6Addr::UNSPECIFIED, 0), Ipv6Addr::LOCALHOST)?;
    let set = [
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
        (libc::SOL_SOCKET, libc::SO_RCVBUF, 50_000),
        (libc::SOL_SOCKET, libc::SO_SNDBUF, 60_000),
        (libc::IPPROTO_TCP, libc::TCP_NODELAY, 1),
        (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 77),
        (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 3),
        (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 12_345),
        (libc::IPPROTO_IPV6, libc::IPV6_TCLASS, 0x20),
    ];
    for (level, name, value) in set {
        set_option(&server, level, name, value)?;
    }
    set_option(&client, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    client.set_read_timeout(Some(Duration::from_millis(4321))).map_err(failed("SO_RCVTIMEO"))?;
    let names = set.map(|(level, name, _)| (level, name));
    let all = |socket: &TcpStream| {
        let few = names.iter().filter(|(_, name)| ![libc::SO_RCVBUF, libc::SO_SNDBUF].contains(name));
        few.map(|&(level, name)| option(socket, level, name)).collect::<Result<Vec<_>, _>>()
    };
    let buffers =
        || Ok::<_, String>([libc::SO_RCVBUF, libc::SO_SNDBUF].map(|name| option(&server, libc::SOL_SOCKET, name)));
    let only = || option(&listener, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY);
    let before = (all(&client)?, all(&server)?, buffers()?, only()?);
    checkpoint.wait()?;
    equal("the options", before, (all(&client)?, all(&server)?, buffers()?, only()?))?;
    let timeout = client.read_timeout().map_err(failed("SO_RCVTIMEO"))?;
    that(&format!("SO_RCVTIMEO is {timeout:?}"), timeout.is_some_and(|timeout| timeout.as_millis() / 10 == 432))?;
    write(&client, b"works")?;
    equal("through it", b"works".to_vec(), read(&server, 5)?)
}

/// Many clients of one server, which has bound its port without `SO_REUSEADDR`, and one more than it listens for.
fn one_port(checkpoint: &Checkpoint) -> Verdict {
    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, listen, socket};
    let listener = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None);
    let listener = listener.map_err(|error| error.to_string())?;
    bind(listener.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0)).map_err(|error| error.to_string())?;
    let backlog = Backlog::new(60).map_err(|error| error.to_string())?;
    listen(&listener, backlog).map_err(|error| error.to_string())?;
    let listener = TcpListener::from(listener);
    let address = listener.local_addr().map_err(failed("getsockname"))?;
    let mut pairs = Vec::new();
    for number in 0..40u8 {
        let client = TcpStream::connect(address).map_err(failed("connect"))?;
        let (server, _) = listener.accept().map_err(failed("accept"))?;
        write(&client, &[number; 10])?;
        pairs.push((client, server));
    }
    checkpoint.wait()?;
    equal("SO_REUSEADDR", 0, option(&pairs[0].1, libc::SOL_SOCKET, libc::SO_REUSEADDR)?)?;
    for (number, (client, server)) in pairs.iter().enumerate() {
        equal("what a client has sent", vec![number as u8; 10], read(server, 10)?)?;
        write(server, &[number as u8])?;
        equal("the answer", vec![number as u8], read(client, 1)?)?;
    }
    TcpStream::connect(address).map_err(failed("connect"))?;
    listener.accept().map_err(failed("accept")).map(drop)
}

fn urgent(checkpoint: &Checkpoint) -> Verdict {
    let (_l, client, server) = connection((Ipv4Addr::LOCALHOST, 0), Ipv4Addr::LOCALHOST)?;
    // SAFETY: reads one byte.
    let sent = unsafe { libc::send(client.as_raw_fd(), c"!".as_ptr().cast(), 1, libc::MSG_OOB) };
    equal("bytes sent", 1, sent)?;
    eventually("it arrives", || {
        let mut poll = libc::pollfd { fd: server.as_raw_fd(), events: libc::POLLPRI, revents: 0 };
        // SAFETY: one structure.
        unsafe { libc::poll(&mut poll, 1, 0) == 1 }
    })?;
    checkpoint.wait()?;
    let mut byte = 0u8;
    // SAFETY: room for one byte.
    let got = unsafe { libc::recv(server.as_raw_fd(), (&raw mut byte).cast(), 1, libc::MSG_OOB) };
    equal("the urgent byte", (1, b'!'), (got, byte))
}

/// A grandchild whose parent has ended is no part of the tree any more.
fn outside(checkpoint: &Checkpoint) -> Verdict {
    let (_l, client, server) = connection((Ipv4Addr::LOCALHOST, 0), Ipv4Addr::LOCALHOST)?;
    hand_out(server)?;
    checkpoint.wait()?;
    write(&client, b"x")?;
    equal("the answer", b"x".to_vec(), read(&client, 1)?)
}

/// Gives an end of a connection to a process outside of the tree, which sends one byte back and ends.
fn hand_out(end: TcpStream) -> Verdict {
    let child = in_child(|| {
        let _grandchild = in_child(|| {
            let byte = read(&end, 1)?;
            write(&end, &byte)
        })?;
        Ok(())
    })?;
    child.passed()
}
