//! TCP connections made again.

use std::time::{Duration, Instant};

use super::*;

/// One end that is being made.
struct End<'a> {
    saved: Option<&'a InetSocket>,
    process: usize,
    domain: i32,
    local: SocketAddr,
    fd: RemoteFd,
}

/// Options that only a socket without a port takes, or one without a connection.
const BEFORE: &[(i32, i32)] = &[
    (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY),
    (libc::IPPROTO_IPV6, 75), // IPV6_TRANSPARENT
    (libc::IPPROTO_IPV6, 78), // IPV6_FREEBIND
    (libc::IPPROTO_IP, libc::IP_FREEBIND),
    (libc::IPPROTO_IP, libc::IP_TRANSPARENT),
    (libc::SOL_SOCKET, libc::SO_BINDTODEVICE),
];

/// Those of a connection that are set on it when it is there, and those before. `SO_REUSEADDR` is set last of all.
pub(super) fn split(options: &[SocketOption]) -> (Vec<SocketOption>, Vec<SocketOption>) {
    let reuse = (libc::SOL_SOCKET, libc::SO_REUSEADDR);
    let others = options.iter().filter(|option| (option.level, option.option) != reuse).cloned();
    others.partition(|option| BEFORE.contains(&(option.level, option.option)))
}

/// How long the kernel is asked again for an address that a connection of before still has (`TIME_WAIT`).
const PATIENCE: Duration = Duration::from_secs(5);

/// Makes a connection, both ends of it.
pub(in super::super) fn rebuild(
    saved: &InetSocket,
    connection: &Connection,
    context: &mut RebuildFile<'_>,
) -> Result<(), RestoreError> {
    let local = saved.local.ok_or_else(|| context.mismatch("a connection has no address"))?;
    let image = context.image;
    let peer = connection.to.map(|to| (to, connection_of(image, to)));
    let (peer, peer_process) = match peer {
        Some((to, Some((peer, _)))) => (Some(peer), context.process_of(to)),
        Some((_, None)) => return Err(context.mismatch("it is connected with a socket that is not connected with it")),
        None => (None, context.process()),
    };
    let remote = peer.and_then(|peer| peer.local).unwrap_or(connection.remote);
    let domain = if remote.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let fd = RemoteFd(-1);
    let mut one = End { saved: Some(saved), process: context.process(), domain: saved.domain, local, fd };
    let mut other = End { saved: peer, process: peer_process, domain, local: remote, fd };
    // Where one end still has a connection of before in TIME_WAIT, it is the other that may connect.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut tried = Err(Errno::EADDRNOTAVAIL);
        for port in [Port::Chosen, Port::Bound] {
            for swapped in [false, true] {
                let (client, server) = if swapped { (&mut other, &mut one) } else { (&mut one, &mut other) };
                if tried.is_err() {
                    tried = connect(context, client, server, port)?;
                }
            }
        }
        match tried {
            Ok(()) => break,
            Err(errno) if Instant::now() > deadline => {
                return Err(context.mismatch(format!(
                    "the connection between {local} and {remote} cannot be made again: {}; end the program that uses \
                     these ports, or wait until the kernel has forgotten the connection of before (a minute)",
                    errno.desc()
                )));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
    let others = connection.to.and_then(|to| connection_of(image, to)).map(|(_, others)| others);
    send(context, &other, &one, &connection.queue)?;
    if let Some(others) = others {
        send(context, &one, &other, &others.queue)?;
    }
    for (end, connection) in [(&one, Some(connection)), (&other, others)] {
        match connection {
            Some(connection) => complete(context, end, connection.shutdown)?,
            None => {
                let mut batch = Batch::new();
                batch.call(Sysno::close, args![end.fd]);
                context.run(end.process, &batch)?;
            }
        }
    }
    context.stage(context.id, one.process, one.fd)?;
    match connection.to {
        Some(to) => context.stage(to, other.process, other.fd),
        None => Ok(()),
    }
}

/// Options, owner and what is shut down.
fn complete(context: &mut RebuildFile<'_>, end: &End<'_>, shutdown: u8) -> Result<(), RestoreError> {
    let Some(saved) = end.saved else { return Ok(()) };
    let mut batch = Batch::new();
    add_owner(&mut batch, end.fd, saved);
    let (_, options) = split(&saved.options);
    let kind = kind_of(saved);
    let settings = [When::Early, When::Late].map(|when| set_options(&mut batch, end.fd, kind, &options, when));
    let how = match shutdown {
        0 => None,
        RCV_SHUTDOWN => Some(libc::SHUT_RD),
        SEND_SHUTDOWN => Some(libc::SHUT_WR),
        _ => Some(libc::SHUT_RDWR),
    };
    if let Some(how) = how {
        batch.call(Sysno::shutdown, args![end.fd, how]);
    }
    let replies = context.run(end.process, &batch)?;
    settings.into_iter().try_for_each(|setting| setting.verify(&replies)).map_err(|what| context.mismatch(what))
}

/// Makes an end that will wait to be accepted.
pub(in super::super) fn rebuild_waiting(saved: &InetSocket, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
    let local = saved.local.ok_or_else(|| context.mismatch("a connection has no address"))?;
    let (process, fd) = (context.process(), RemoteFd(-1));
    let end = End { saved: Some(saved), process, domain: saved.domain, local, fd };
    let mut batch = Batch::new();
    let bound = add_bound(&mut batch, context, &end, Port::Chosen);
    let replies = context.run(process, &batch)?;
    let (fd, bound) = bound.get(context, &replies)?;
    bound.map_err(|errno| context.mismatch(format!("{local} cannot be bound: {}", errno.desc())))?;
    context.stage(context.id, process, fd)
}

/// Connects it, when all who listen are there.
pub(in super::super) fn finish_waiting(
    saved: &InetSocket,
    remote: SocketAddr,
    context: &mut RebuildFile<'_>,
) -> Result<(), RestoreError> {
    let (process, fd) = context.place(context.id);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut batch = Batch::new();
        let address = to_bytes(remote);
        let slot = batch.bytes(&address);
        let connected = batch.try_call(Sysno::connect, args![fd, slot, address.len()]);
        // One that does not block is connected a moment later.
        let poll = [fd.0.to_ne_bytes().as_slice(), &libc::POLLOUT.to_ne_bytes(), &[0; 2]].concat();
        let poll = batch.bytes(&poll);
        batch.call(Sysno::poll, args![poll, 1, 1000]);
        match context.run(process, &batch)?.result(connected) {
            Ok(_) | Err(Errno::EINPROGRESS) => break,
            Err(Errno::EADDRNOTAVAIL) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(50)),
            Err(errno) => {
                return Err(context.mismatch(format!("{remote} cannot be connected to again: {}", errno.desc())));
            }
        }
    }
    let mut batch = Batch::new();
    let own = address_of(&mut batch, fd, Sysno::getsockname);
    add_choice(&mut batch, fd.into(), IP_BIND_ADDRESS_NO_PORT, 0);
    add_choice(&mut batch, fd.into(), IP_LOCAL_PORT_RANGE, 0);
    let replies = context.run(process, &batch)?;
    let local = saved.local.unwrap_or(remote);
    if address_in(&replies, own).map(plain) != Some(plain(local)) {
        return Err(context.mismatch(format!("{local} cannot be had again; end the program that uses that port")));
    }
    let end = End { saved: Some(saved), process, domain: saved.domain, local, fd };
    complete(context, &end, 0)?;
    finish(saved, context)
}

/// What is set on a connection when all sockets with its port are there: one without `SO_REUSEADDR` is in the way of others.
pub(in super::super) fn finish(saved: &InetSocket, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
    let reuse = saved_number(&saved.options, libc::SOL_SOCKET, libc::SO_REUSEADDR).unwrap_or(0);
    let (process, fd) = context.place(context.id);
    let mut batch = Batch::new();
    let value = batch.bytes(&reuse.to_ne_bytes());
    batch.call(Sysno::setsockopt, args![fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, value, 4]);
    context.run(process, &batch).map(drop)
}

/// How an end gets its port.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Port {
    /// By `bind`, which a connection of before may be in the way of.
    Bound,
    /// By `connect`, which chooses among one (`IP_LOCAL_PORT_RANGE`, kernel 6.3): another connection may have it.
    Chosen,
}

const IP_BIND_ADDRESS_NO_PORT: i32 = 24;
const IP_LOCAL_PORT_RANGE: i32 = 51;

/// Sets one of the options that choose a port. They are options of IP, for sockets of IPv6 as well.
fn add_choice(batch: &mut Batch, fd: Arg, option: i32, value: u32) {
    let value = batch.bytes(&value.to_ne_bytes());
    batch.try_call(Sysno::setsockopt, &[fd, libc::IPPROTO_IP.into(), option.into(), value.into(), 4.into()]);
}

/// Adds a socket that is bound to the address of an end.
fn add_bound(batch: &mut Batch, context: &RebuildFile<'_>, end: &End<'_>, port: Port) -> Bound {
    let kind = SocketKind { domain: end.domain, kind: libc::SOCK_STREAM, protocol: libc::IPPROTO_TCP };
    let fd = batch.call(Sysno::socket, args![kind.domain, kind.kind | libc::SOCK_CLOEXEC, kind.protocol]);
    let fd = context.lift(end.process, batch, fd);
    let setting = end.saved.map(|saved| set_options(batch, fd, kind, &split(&saved.options).0, When::Early));
    let reuse = batch.bytes(&1u32.to_ne_bytes());
    batch.call(Sysno::setsockopt, args![fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse, 4]);
    let mut local = end.local;
    if port == Port::Chosen {
        let number = u32::from(local.port());
        local.set_port(0);
        add_choice(batch, fd.into(), IP_BIND_ADDRESS_NO_PORT, 1);
        add_choice(batch, fd.into(), IP_LOCAL_PORT_RANGE, number << 16 | number);
    }
    let address = to_bytes(local);
    let slot = batch.bytes(&address);
    let bound = batch.try_call(Sysno::bind, args![fd, slot, address.len()]);
    Bound { fd, setting, bound }
}

struct Bound {
    fd: CallId,
    setting: Option<sockets::Setting>,
    bound: CallId,
}

impl Bound {
    /// The socket, and whether it has its address.
    fn get(self, context: &RebuildFile<'_>, replies: &Replies) -> Result<(RemoteFd, Result<(), Errno>), RestoreError> {
        let setting = self.setting.map_or(Ok(()), |setting| setting.verify(replies));
        setting.map_err(|what| context.mismatch(what))?;
        Ok((replies.fd(self.fd), replies.result(self.bound).map(drop)))
    }
}

/// Has one end connect to the other. An address that cannot be had just now is told by its error.
fn connect(
    context: &mut RebuildFile<'_>,
    client: &mut End<'_>,
    server: &mut End<'_>,
    port: Port,
) -> Result<Result<(), Errno>, RestoreError> {
    let mut batch = Batch::new();
    let listener = add_bound(&mut batch, context, server, Port::Bound);
    let listening = batch.try_call(Sysno::listen, args![listener.fd, 16]);
    let replies = context.run(server.process, &batch)?;
    let (listener, bound) = listener.get(context, &replies)?;
    if let Err(errno) = bound.and(replies.result(listening).map(drop)) {
        context.close(server.process, listener)?;
        return Ok(Err(errno));
    }
    let mut batch = Batch::new();
    let made = add_bound(&mut batch, context, client, port);
    let to = match server.local {
        // As the client names it.
        SocketAddr::V4(address) if client.domain == libc::AF_INET6 => {
            SocketAddr::new(address.ip().to_ipv6_mapped().into(), address.port())
        }
        SocketAddr::V6(address) if client.domain == libc::AF_INET => {
            SocketAddr::new(IpAddr::from(*address.ip()).to_canonical(), address.port())
        }
        address => address,
    };
    let address = to_bytes(to);
    let slot = batch.bytes(&address);
    let connected = batch.try_call(Sysno::connect, args![made.fd, slot, address.len()]);
    let own = address_of(&mut batch, made.fd, Sysno::getsockname);
    if port == Port::Chosen {
        add_choice(&mut batch, made.fd.into(), IP_BIND_ADDRESS_NO_PORT, 0);
        add_choice(&mut batch, made.fd.into(), IP_LOCAL_PORT_RANGE, 0);
    }
    let replies = context.run(client.process, &batch)?;
    let (fd, bound) = made.get(context, &replies)?;
    client.fd = fd;
    let mut found = bound.and(replies.result(connected).map(drop));
    // A kernel that cannot choose so gives any port.
    if found.is_ok() && address_in(&replies, own).map(plain) != Some(plain(client.local)) {
        found = Err(Errno::EADDRNOTAVAIL);
    }
    // Others may connect to that address as well.
    while found.is_ok() {
        let mut batch = Batch::new();
        let fd = batch.call(Sysno::accept4, args![listener, 0, 0, libc::SOCK_CLOEXEC]);
        let fd = context.lift(server.process, &mut batch, fd);
        let asked = address_of(&mut batch, fd, Sysno::getpeername);
        let replies = context.run(server.process, &batch)?;
        let fd = replies.fd(fd);
        if address_in(&replies, asked).map(plain) == Some(plain(client.local)) {
            server.fd = fd;
            break;
        }
        context.close(server.process, fd)?;
    }
    context.close(server.process, listener)?;
    if found.is_err() {
        context.close(client.process, client.fd)?;
    }
    Ok(found)
}

/// Sends what an end had not read. What the other side has no room for waits here, as it does for any program.
fn send(context: &mut RebuildFile<'_>, from: &End<'_>, to: &End<'_>, queue: &[u8]) -> Result<(), RestoreError> {
    if queue.is_empty() {
        return Ok(());
    }
    for (end, option, force) in [
        (to, libc::SO_RCVBUF, libc::SO_RCVBUFFORCE), //
        (from, libc::SO_SNDBUF, libc::SO_SNDBUFFORCE),
    ] {
        let mut batch = Batch::new();
        // What the kernel keeps beside the data counts as well.
        let size = batch.bytes(&(queue.len().saturating_mul(2).clamp(128 << 10, 1 << 30) as u32).to_ne_bytes());
        let free = batch.bytes(&0u32.to_ne_bytes());
        for option in [option, force] {
            batch.try_call(Sysno::setsockopt, args![end.fd, libc::SOL_SOCKET, option, size, 4]);
        }
        // From here on the kernel chooses again, unless the program has.
        batch.try_call(Sysno::setsockopt, args![end.fd, libc::SOL_SOCKET, sockets::SO_BUF_LOCK, free, 4]);
        context.run(end.process, &batch)?;
    }
    let mut done = 0;
    let deadline = Instant::now() + PATIENCE;
    while done < queue.len() {
        let piece = &queue[done..queue.len().min(done + 128 * 1024)];
        let mut batch = Batch::new();
        let data = batch.bytes(piece);
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let sent = batch.try_call(Sysno::sendto, args![from.fd, data, piece.len(), flags, 0, 0]);
        match context.run(from.process, &batch)?.result(sent) {
            Ok(length) => done += length as usize,
            // The kernel brings it over, and makes room.
            Err(Errno::EAGAIN) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
            Err(Errno::EAGAIN) => {
                return Err(context.mismatch(format!(
                    "of {} bytes on their way from {} to {}, {done} were taken; raise net.core.rmem_max and \
                     net.core.wmem_max, or run with CAP_NET_ADMIN",
                    queue.len(),
                    from.local,
                    to.local,
                )));
            }
            Err(errno) => return Err(context.mismatch(format!("its data cannot be sent again: {}", errno.desc()))),
        }
    }
    Ok(())
}
