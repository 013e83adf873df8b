//! Unix sockets.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::Path;

use crate::case::{Case, Checkpoint};
use crate::expect::{done, equal, eventually, in_child, make_sign, that};

pub fn cases() -> Vec<Case> {
    const SECTIONS: &[&str] = &["unix_sockets"];
    vec![
        Case::new("unix_sockets/stream-pair", SECTIONS, stream_pair),
        Case::new("unix_sockets/message-pairs", SECTIONS, message_pairs),
        Case::new("unix_sockets/full-queue", SECTIONS, full_queue),
        Case::new("unix_sockets/pair-of-processes", SECTIONS, pair_of_processes),
        Case::new("unix_sockets/shut-down", SECTIONS, shut_down),
        Case::new("unix_sockets/peer-gone", SECTIONS, peer_gone),
        Case::new("unix_sockets/peer-credentials", SECTIONS, peer_credentials).privileged("several users take root"),
        Case::new("unix_sockets/message-credentials", SECTIONS, message_credentials)
            .privileged("another sender takes CAP_SYS_ADMIN"),
        Case::new("unix_sockets/options", SECTIONS, options).privileged("the options take CAP_NET_ADMIN"),
        Case::new("unix_sockets/listening", SECTIONS, listening).privileged("chown takes CAP_CHOWN"),
        Case::new("unix_sockets/listening-relative", SECTIONS, listening_relative),
        Case::new("unix_sockets/listening-abstract", SECTIONS, listening_abstract),
        Case::new("unix_sockets/accepted", SECTIONS, accepted),
        Case::new("unix_sockets/accepted-abstract", SECTIONS, accepted_abstract),
        Case::new("unix_sockets/accepted-in-a-child", SECTIONS, accepted_in_a_child),
        Case::new("unix_sockets/listener-gone", SECTIONS, listener_gone),
        Case::new("unix_sockets/datagrams", SECTIONS, datagrams),
        Case::new("unix_sockets/unbound", SECTIONS, unbound),
        Case::new("unix_sockets/waiting-to-be-accepted", SECTIONS, waiting_to_be_accepted),
        Case::new("unix_sockets/waiting-with-data", SECTIONS, waiting_with_data)
            .refused_at_dump("data was written into its connection"),
        Case::new("unix_sockets/peer-outside", SECTIONS, peer_outside).refused_at_dump("not part of the tree"),
        Case::new("unix_sockets/path-taken", SECTIONS, path_taken)
            .after_dump(take_path)
            .refused_at_restore("another file is at its path"),
    ]
}

type Verdict = Result<(), String>;

fn failed(what: &str) -> impl Fn(std::io::Error) -> String + '_ {
    move |error| format!("{what}: {error}")
}

/// An integer option of `SOL_SOCKET`.
pub fn option(socket: &impl AsRawFd, level: i32, option: i32) -> Result<i32, String> {
    let (mut value, mut length) = (0i32, 4);
    // SAFETY: room for the integer it says there is.
    let result = unsafe { libc::getsockopt(socket.as_raw_fd(), level, option, (&raw mut value).cast(), &mut length) };
    done("getsockopt", result).map(|_| value)
}

pub fn set_option(socket: &impl AsRawFd, level: i32, option: i32, value: i32) -> Verdict {
    // SAFETY: reads the integer.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), 4) };
    done("setsockopt", result).map(drop)
}

fn socket(kind: i32) -> Result<OwnedFd, String> {
    // SAFETY: makes a new descriptor, which the OwnedFd owns.
    unsafe { Ok(OwnedFd::from_raw_fd(done("socket", libc::socket(libc::AF_UNIX, kind, 0))?)) }
}

pub fn pair(kind: i32) -> Result<(OwnedFd, OwnedFd), String> {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors, which the OwnedFds own.
    unsafe {
        done("socketpair", libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()))?;
        Ok((OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])))
    }
}

fn send(socket: &impl AsRawFd, data: &[u8]) -> Verdict {
    // SAFETY: reads the data.
    let sent = unsafe { libc::send(socket.as_raw_fd(), data.as_ptr().cast(), data.len(), libc::MSG_NOSIGNAL) };
    equal("bytes sent", data.len() as isize, done("send", sent)?)
}

fn receive_message(socket: &impl AsRawFd) -> Result<Vec<u8>, ErrorKind> {
    let mut buffer = vec![0; 300_000];
    // SAFETY: room for as many bytes as it says.
    let got = unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_DONTWAIT) };
    if got < 0 {
        return Err(std::io::Error::last_os_error().kind());
    }
    buffer.truncate(got as usize);
    Ok(buffer)
}

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Credentials {
    pid: i32,
    uid: u32,
    gid: u32,
}

fn peer_of(socket: &impl AsRawFd) -> Result<Credentials, String> {
    let mut credentials = Credentials { pid: 0, uid: 0, gid: 0 };
    let mut length = size_of::<Credentials>() as u32;
    // SAFETY: room for the structure it says there is, `struct ucred`.
    let result = unsafe {
        let value = (&raw mut credentials).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, value, &mut length)
    };
    done("SO_PEERCRED", result).map(|_| credentials)
}

/// `struct msghdr` with one byte, and room for ancillary data.
struct Ancillary {
    byte: [u8; 1],
    control: [u64; 8],
}

impl Ancillary {
    /// Calls `with` a message of one byte and so much ancillary data.
    fn message<T>(&mut self, length: usize, with: impl FnOnce(&mut libc::msghdr) -> T) -> T {
        let mut vector = libc::iovec { iov_base: self.byte.as_mut_ptr().cast(), iov_len: 1 };
        // SAFETY: all zero is a valid msghdr.
        let mut header: libc::msghdr = unsafe { zeroed() };
        header.msg_iov = &mut vector;
        header.msg_iovlen = 1;
        header.msg_control = self.control.as_mut_ptr().cast();
        header.msg_controllen = length;
        with(&mut header)
    }
}

/// Sends a descriptor along with a byte.
pub fn pass(socket: &impl AsRawFd, fd: RawFd) -> Verdict {
    // struct cmsghdr: length, level and type; then the descriptor
    let header = (libc::SOL_SOCKET as u64) | (libc::SCM_RIGHTS as u64) << 32;
    let mut message = Ancillary { byte: *b"f", control: [20, header, fd as u64, 0, 0, 0, 0, 0] };
    // SAFETY: the message points at live memory of the lengths it says.
    let sent = message.message(24, |header| unsafe { libc::sendmsg(socket.as_raw_fd(), header, 0) });
    done("sendmsg", sent).map(drop)
}

/// Receives a byte and the descriptor that came with it.
pub fn receive(socket: &impl AsRawFd) -> Result<File, String> {
    let mut message = Ancillary { byte: [0], control: [0; 8] };
    // SAFETY: as above.
    let got = message.message(24, |header| unsafe { libc::recvmsg(socket.as_raw_fd(), header, 0) });
    equal("bytes received", 1, done("recvmsg", got)?)?;
    that("a descriptor came", message.control[0] == 20)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { File::from_raw_fd(message.control[2] as i32) })
}

fn stream_pair(checkpoint: &Checkpoint) -> Verdict {
    let (mut one, mut other) = UnixStream::pair().map_err(failed("socketpair"))?;
    one.write_all(b"to the other").map_err(failed("write"))?;
    other.write_all(b"to ").map_err(failed("write"))?;
    other.write_all(b"the one").map_err(failed("write"))?;
    one.set_nonblocking(true).map_err(failed("O_NONBLOCK"))?;
    checkpoint.wait()?;
    let mut text = [0; 12];
    other.read_exact(&mut text).map_err(failed("read"))?;
    equal("read by the other", b"to the other", &text)?;
    let mut text = [0; 64];
    let got = one.read(&mut text).map_err(failed("read"))?;
    equal("read by the one", b"to the one".as_slice(), &text[..got])?;
    equal("nothing more", Err(ErrorKind::WouldBlock), one.read(&mut text).map_err(|error| error.kind()))?;
    one.write_all(b"new").map_err(failed("write"))?;
    drop(one);
    let mut rest = String::new();
    other.read_to_string(&mut rest).map_err(failed("read"))?;
    equal("what comes last", "new", rest.as_str())
}

fn message_pairs(checkpoint: &Checkpoint) -> Verdict {
    let messages: [&[u8]; 5] = [b"one", b"", &[7; 100_000], b"four", &[9; 1]];
    let mut pairs = Vec::new();
    for kind in [libc::SOCK_DGRAM, libc::SOCK_SEQPACKET] {
        let (one, other) = pair(kind)?;
        for message in messages {
            send(&one, message)?;
        }
        send(&other, b"back")?;
        pairs.push((one, other));
    }
    checkpoint.wait()?;
    for (one, other) in pairs {
        for message in messages {
            let found = receive_message(&other).map_err(|error| error.to_string())?;
            that(&format!("a message of {} bytes, not {}", message.len(), found.len()), found == message)?;
        }
        equal("no more", Err(ErrorKind::WouldBlock), receive_message(&other))?;
        equal("the answer", Ok(b"back".to_vec()), receive_message(&one))?;
    }
    Ok(())
}

/// As much as goes in, with the smallest and with usual writes.
fn full_queue(checkpoint: &Checkpoint) -> Verdict {
    let mut pairs = Vec::new();
    for piece in [1, 4096, 50_000] {
        let (one, other) = UnixStream::pair().map_err(failed("socketpair"))?;
        one.set_nonblocking(true).map_err(failed("O_NONBLOCK"))?;
        let mut sent = Vec::new();
        loop {
            let data: Vec<u8> = (0..piece).map(|byte| ((sent.len() + byte) % 251) as u8).collect();
            match (&one).write(&data) {
                Ok(count) => sent.extend(&data[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(failed("write")(error)),
            }
        }
        pairs.push((one, other, sent));
    }
    let sizes = |pairs: &[(UnixStream, UnixStream, Vec<u8>)]| {
        pairs.iter().map(|(one, ..)| option(one, libc::SOL_SOCKET, libc::SO_SNDBUF)).collect::<Result<Vec<_>, _>>()
    };
    let before = sizes(&pairs)?;
    checkpoint.wait()?;
    equal("SO_SNDBUF", before, sizes(&pairs)?)?;
    for (one, mut other, sent) in pairs {
        drop(one);
        let mut found = Vec::new();
        other.read_to_end(&mut found).map_err(failed("read"))?;
        that(&format!("{} bytes, not {}", sent.len(), found.len()), found == sent)?;
    }
    Ok(())
}

fn pair_of_processes(checkpoint: &Checkpoint) -> Verdict {
    let (mut ours, mut theirs) = UnixStream::pair().map_err(failed("socketpair"))?;
    let pid = std::process::id() as i32;
    let child = in_child(|| {
        let mut text = [0; 4];
        checkpoint.wait_for_go()?;
        theirs.read_exact(&mut text).map_err(failed("read"))?;
        equal("what the child reads", b"down", &text)?;
        equal("the child's peer", pid, peer_of(&theirs)?.pid)?;
        theirs.write_all(b"up").map_err(failed("write"))
    })?;
    drop(theirs);
    ours.write_all(b"down").map_err(failed("write"))?;
    checkpoint.wait()?;
    let mut text = String::new();
    ours.read_to_string(&mut text).map_err(failed("read"))?;
    equal("what the child says", "up", text.as_str())?;
    child.passed()
}

fn shut_down(checkpoint: &Checkpoint) -> Verdict {
    let (one, other) = UnixStream::pair().map_err(failed("socketpair"))?;
    (&one).write_all(b"last").map_err(failed("write"))?;
    one.shutdown(std::net::Shutdown::Write).map_err(failed("shutdown"))?;
    checkpoint.wait()?;
    let mut text = String::new();
    (&other).read_to_string(&mut text).map_err(failed("read"))?;
    equal("what was sent before", "last", text.as_str())?;
    let sent = (&one).write(b"x").map_err(|error| error.kind());
    equal("a write after it", Err(ErrorKind::BrokenPipe), sent)?;
    (&other).write_all(b"still open").map_err(failed("write"))?;
    let mut text = [0; 10];
    (&one).read_exact(&mut text).map_err(failed("read"))?;
    equal("the other way", b"still open", &text)
}

fn peer_gone(checkpoint: &Checkpoint) -> Verdict {
    let make = || UnixStream::pair().map_err(failed("socketpair"));
    let (mut left_data, gone) = make()?;
    (&gone).write_all(b"will").map_err(failed("write"))?;
    drop(gone);
    let (mut reset, gone) = make()?;
    reset.write_all(b"unread").map_err(failed("write"))?;
    drop(gone);
    let (datagrams, gone) = UnixDatagram::pair().map_err(failed("socketpair"))?;
    gone.send(b"farewell").map_err(failed("send"))?;
    drop(gone);
    checkpoint.wait()?;
    let mut text = String::new();
    left_data.read_to_string(&mut text).map_err(failed("read"))?;
    equal("what the peer left", "will", text.as_str())?;
    let error = |result: std::io::Result<usize>| result.map_err(|error| error.kind());
    equal("a write to nobody", Err(ErrorKind::BrokenPipe), error(left_data.write(b"x")))?;
    equal("a read of the other", Err(ErrorKind::ConnectionReset), error(reset.read(&mut [0])))?;
    equal("the next", Ok(0), error(reset.read(&mut [0])))?;
    equal("the last datagram", Ok(b"farewell".to_vec()), receive_message(&datagrams))?;
    equal("a datagram to nobody", Err(ErrorKind::ConnectionRefused), error(datagrams.send(b"x")))
}

/// Pairs made by another user, and by a child that lives and has no end of it.
fn peer_credentials(checkpoint: &Checkpoint) -> Verdict {
    // SAFETY: changes our own ids, and back.
    let become_user = |uid: u32, gid: u32| unsafe {
        if uid == 0 {
            done("setresuid", libc::setresuid(u32::MAX, uid, u32::MAX))?;
        }
        done("setresgid", libc::setresgid(u32::MAX, gid, u32::MAX))?;
        done("setresuid", libc::setresuid(u32::MAX, uid, u32::MAX)).map(drop)
    };
    become_user(12345, 54321)?;
    let (one, other) = UnixStream::pair().map_err(failed("socketpair"))?;
    become_user(0, 0)?;
    let path = checkpoint.dir().join("socket");
    let listener = UnixListener::bind(&path).map_err(failed("bind"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).map_err(failed("chmod"))?;
    let passed = checkpoint.dir().join("passed");
    let child = in_child(|| {
        let client = UnixStream::connect(&path).map_err(failed("connect"))?;
        pass(&client, client.as_raw_fd())?;
        drop(client);
        make_sign(&passed)?;
        checkpoint.wait_for_go()
    })?;
    let (server, _) = listener.accept().map_err(failed("accept"))?;
    let client = receive(&server)?;
    let stat = |socket: &dyn AsRawFd| {
        let metadata = fs::metadata(format!("/proc/self/fd/{}", socket.as_raw_fd())).map_err(failed("fstat"))?;
        Ok::<_, String>((metadata.uid(), metadata.gid()))
    };
    let all = || {
        Ok::<_, String>((
            [peer_of(&one)?, peer_of(&other)?, peer_of(&server)?, peer_of(&client)?],
            [stat(&one)?, stat(&other)?, stat(&server)?, stat(&client)?],
        ))
    };
    let before = all()?;
    equal("the user before", (12345, 54321), (before.0[0].uid, before.0[0].gid))?;
    equal("who connected", child.0, before.0[2].pid)?;
    eventually("the child has let go of its end", || passed.exists())?;
    checkpoint.wait()?;
    equal("credentials of the peers, and owners", before, all()?)?;
    child.passed()
}

fn message_credentials(checkpoint: &Checkpoint) -> Verdict {
    let (one, other) = pair(libc::SOCK_STREAM)?;
    set_option(&other, libc::SOL_SOCKET, libc::SO_PASSCRED, 1)?;
    send(&one, b"p")?;
    let child = in_child(|| {
        send(&one, b"c")?;
        checkpoint.wait_for_go()
    })?;
    // The child has sent its byte when there are two.
    crate::expect::eventually("the child sends", || {
        let mut count = 0;
        // SAFETY: FIONREAD writes an integer.
        unsafe { libc::ioctl(other.as_raw_fd(), libc::FIONREAD, &mut count) };
        count == 2
    })?;
    checkpoint.wait()?;
    // SAFETY: have no arguments.
    let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    for (byte, pid) in [(*b"p", std::process::id() as i32), (*b"c", child.0)] {
        let mut message = Ancillary { byte: [0], control: [0; 8] };
        // SAFETY: the message points at live memory of the lengths it says.
        let got = message.message(64, |header| unsafe { libc::recvmsg(other.as_raw_fd(), header, 0) });
        equal("bytes received", 1, done("recvmsg", got)?)?;
        equal("the byte", byte, message.byte)?;
        let expected = [pid as u64 | u64::from(uid) << 32, gid.into()];
        equal("its credentials", expected, [message.control[2], message.control[3] & 0xffff_ffff])?;
    }
    child.passed()
}

fn options(checkpoint: &Checkpoint) -> Verdict {
    let (one, other) = UnixStream::pair().map_err(failed("socketpair"))?;
    let set = [
        (libc::SO_SNDBUF, 40_000),
        (libc::SO_RCVBUF, 30_000),
        (libc::SO_PASSCRED, 1),
        (libc::SO_PRIORITY, 5),
        (libc::SO_MARK, 77),
        (libc::SO_PEEK_OFF, 2),
        (libc::SO_RCVLOWAT, 3),
        (libc::SO_TIMESTAMP, 1),
    ];
    for (option, value) in set {
        set_option(&one, libc::SOL_SOCKET, option, value)?;
    }
    one.set_read_timeout(Some(std::time::Duration::from_millis(1500))).map_err(failed("SO_RCVTIMEO"))?;
    let all = |socket: &UnixStream| {
        set.iter().map(|&(name, _)| option(socket, libc::SOL_SOCKET, name)).collect::<Result<Vec<_>, _>>()
    };
    let before = (all(&one)?, all(&other)?);
    checkpoint.wait()?;
    equal("options of both", before, (all(&one)?, all(&other)?))?;
    equal("SO_RCVTIMEO", Some(std::time::Duration::from_millis(1500)), one.read_timeout().map_err(failed("timeout"))?)?;
    equal("no SO_SNDTIMEO", None, one.write_timeout().map_err(failed("timeout"))?)
}

/// Connects, has the connection accepted, and sends a word through it.
fn try_listener(listener: &UnixListener, connect: impl FnOnce() -> std::io::Result<UnixStream>) -> Verdict {
    let mut client = connect().map_err(failed("connect"))?;
    let (mut server, _) = listener.accept().map_err(failed("accept"))?;
    client.write_all(b"hello").map_err(failed("write"))?;
    let mut text = [0; 5];
    server.read_exact(&mut text).map_err(failed("read"))?;
    equal("through a new connection", b"hello", &text)
}

fn listening(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.dir().join("listening socket");
    let listener = UnixListener::bind(&path).map_err(failed("bind"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).map_err(failed("chmod"))?;
    std::os::unix::fs::chown(&path, Some(1234), Some(4321)).map_err(failed("chown"))?;
    let look = |path: &Path| {
        let metadata = fs::symlink_metadata(path).map_err(failed("stat"))?;
        Ok::<_, String>((metadata.file_type().is_socket(), metadata.mode(), metadata.uid(), metadata.gid()))
    };
    let before = look(&path)?;
    checkpoint.wait()?;
    equal("the file of the socket", before, look(&path)?)?;
    let address = listener.local_addr().map_err(failed("getsockname"))?;
    equal("its name", Some(path.as_path()), address.as_pathname())?;
    equal("SO_ACCEPTCONN", 1, option(&listener, libc::SOL_SOCKET, libc::SO_ACCEPTCONN)?)?;
    try_listener(&listener, || UnixStream::connect(&path))
}

fn listening_relative(checkpoint: &Checkpoint) -> Verdict {
    fs::create_dir(checkpoint.dir().join("below")).map_err(failed("mkdir"))?;
    let listener = UnixListener::bind("below/socket").map_err(failed("bind"))?;
    checkpoint.wait()?;
    let address = listener.local_addr().map_err(failed("getsockname"))?;
    equal("its name", Some(Path::new("below/socket")), address.as_pathname())?;
    try_listener(&listener, || UnixStream::connect(checkpoint.dir().join("below/socket")))
}

fn abstract_address(checkpoint: &Checkpoint) -> Result<SocketAddr, String> {
    let name = format!("ckpt {}", checkpoint.dir().display());
    SocketAddr::from_abstract_name(name).map_err(failed("name"))
}

fn listening_abstract(checkpoint: &Checkpoint) -> Verdict {
    let address = abstract_address(checkpoint)?;
    let listener = UnixListener::bind_addr(&address).map_err(failed("bind"))?;
    checkpoint.wait()?;
    let found = listener.local_addr().map_err(failed("getsockname"))?;
    equal("its name", address.as_abstract_name(), found.as_abstract_name())?;
    try_listener(&listener, || UnixStream::connect_addr(&address))
}

/// Connections keep names and data, and the listening socket goes on.
fn connections(checkpoint: &Checkpoint, address: SocketAddr) -> Verdict {
    let listener = UnixListener::bind_addr(&address).map_err(failed("bind"))?;
    let mut ends = Vec::new();
    for number in 0..3u8 {
        let client = UnixStream::connect_addr(&address).map_err(failed("connect"))?;
        let (server, _) = listener.accept().map_err(failed("accept"))?;
        (&client).write_all(&[number; 5]).map_err(failed("write"))?;
        (&server).write_all(&[number + 10; 5]).map_err(failed("write"))?;
        ends.push((client, server));
    }
    checkpoint.wait()?;
    for (number, (mut client, mut server)) in (0u8..).zip(ends) {
        let name = |address: std::io::Result<SocketAddr>| {
            address.map(|address| format!("{address:?}")).map_err(failed("address of a connection"))
        };
        equal("the server's name", format!("{address:?}"), name(server.local_addr())?)?;
        equal("the client's peer", format!("{address:?}"), name(client.peer_addr())?)?;
        equal("the client's name", "(unnamed)".into(), name(client.local_addr())?)?;
        equal("the server's peer", "(unnamed)".into(), name(server.peer_addr())?)?;
        let mut text = [0; 5];
        server.read_exact(&mut text).map_err(failed("read"))?;
        equal("what the server reads", [number; 5], text)?;
        client.read_exact(&mut text).map_err(failed("read"))?;
        equal("what the client reads", [number + 10; 5], text)?;
    }
    try_listener(&listener, || UnixStream::connect_addr(&address))
}

fn accepted(checkpoint: &Checkpoint) -> Verdict {
    connections(checkpoint, SocketAddr::from_pathname(checkpoint.dir().join("socket")).map_err(failed("name"))?)
}

fn accepted_abstract(checkpoint: &Checkpoint) -> Verdict {
    connections(checkpoint, abstract_address(checkpoint)?)
}

/// A server that forks for each connection, and a client in a process of its own.
fn accepted_in_a_child(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.dir().join("socket");
    let listener = UnixListener::bind(&path).map_err(failed("bind"))?;
    let pid = std::process::id() as i32;
    let client = in_child(|| {
        let mut client = UnixStream::connect(&path).map_err(failed("connect"))?;
        client.write_all(b"ping").map_err(failed("write"))?;
        checkpoint.wait_for_go()?;
        let mut text = [0; 4];
        client.read_exact(&mut text).map_err(failed("read"))?;
        equal("the answer", b"pong", &text)?;
        equal("who listened", pid, peer_of(&client)?.pid)
    })?;
    let (mut server, _) = listener.accept().map_err(failed("accept"))?;
    let worker = in_child(|| {
        checkpoint.wait_for_go()?;
        let mut text = [0; 4];
        server.read_exact(&mut text).map_err(failed("read"))?;
        equal("the question", b"ping", &text)?;
        equal("who connected", client.0, peer_of(&server)?.pid)?;
        server.write_all(b"pong").map_err(failed("write"))
    })?;
    drop(server);
    checkpoint.wait()?;
    client.passed()?;
    worker.passed()
}

/// The socket that a connection came through is closed, its path removed, and used by another socket.
fn listener_gone(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.dir().join("socket");
    let listener = UnixListener::bind(&path).map_err(failed("bind"))?;
    let mut client = UnixStream::connect(&path).map_err(failed("connect"))?;
    let (mut server, _) = listener.accept().map_err(failed("accept"))?;
    drop(listener);
    fs::remove_file(&path).map_err(failed("unlink"))?;
    let unlinked = UnixListener::bind(&path).map_err(failed("bind"))?;
    fs::remove_file(&path).map_err(failed("unlink"))?;
    let other = UnixListener::bind(&path).map_err(failed("bind"))?;
    client.write_all(b"data").map_err(failed("write"))?;
    checkpoint.wait()?;
    for socket in [&unlinked, &other] {
        let address = socket.local_addr().map_err(failed("getsockname"))?;
        equal("a listener's name", Some(path.as_path()), address.as_pathname())?;
    }
    let address = server.local_addr().map_err(failed("getsockname"))?;
    equal("the connection's name", Some(path.as_path()), address.as_pathname())?;
    let mut text = [0; 4];
    server.read_exact(&mut text).map_err(failed("read"))?;
    equal("what was sent", b"data", &text)?;
    try_listener(&other, || UnixStream::connect(&path))
}

fn datagrams(checkpoint: &Checkpoint) -> Verdict {
    let dir = checkpoint.dir();
    let receiver = UnixDatagram::bind(dir.join("receiver")).map_err(failed("bind"))?;
    let sender = UnixDatagram::bind(dir.join("sender")).map_err(failed("bind"))?;
    let nameless = UnixDatagram::unbound().map_err(failed("socket"))?;
    sender.connect(dir.join("receiver")).map_err(failed("connect"))?;
    sender.send(b"from sender").map_err(failed("send"))?;
    nameless.send_to(b"from nobody", dir.join("receiver")).map_err(failed("sendto"))?;
    nameless.connect(dir.join("receiver")).map_err(failed("connect"))?;
    checkpoint.wait()?;
    let receive = || {
        let mut buffer = [0; 64];
        let (length, from) = receiver.recv_from(&mut buffer).map_err(failed("recvfrom"))?;
        Ok::<_, String>((buffer[..length].to_vec(), from.as_pathname().map(Path::to_path_buf)))
    };
    equal("the first", (b"from sender".to_vec(), Some(dir.join("sender"))), receive()?)?;
    equal("the second", (b"from nobody".to_vec(), None), receive()?)?;
    sender.send(b"again").map_err(failed("send"))?;
    nameless.send(b"and again").map_err(failed("send"))?;
    equal("the third", (b"again".to_vec(), Some(dir.join("sender"))), receive()?)?;
    equal("the fourth", (b"and again".to_vec(), None), receive()?)?;
    nameless
        .send_to(b"to sender", dir.join("sender"))
        .map_err(|error| error.to_string())
        .err()
        .map_or(Err("a socket that sends to another took a message".into()), |_| Ok(()))
}

fn unbound(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.dir().join("socket");
    let stream = socket(libc::SOCK_STREAM)?;
    let bound = socket(libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK)?;
    let address = nix::sys::socket::UnixAddr::new(&path).map_err(|error| error.to_string())?;
    nix::sys::socket::bind(bound.as_raw_fd(), &address).map_err(|error| error.to_string())?;
    checkpoint.wait()?;
    let kind = option(&bound, libc::SOL_SOCKET, libc::SO_TYPE)?;
    equal("its type", libc::SOCK_SEQPACKET, kind)?;
    // SAFETY: takes no argument.
    let flags = unsafe { libc::fcntl(bound.as_raw_fd(), libc::F_GETFL) };
    that("O_NONBLOCK", flags & libc::O_NONBLOCK != 0)?;
    let backlog = nix::sys::socket::Backlog::new(5).map_err(|error| error.to_string())?;
    nix::sys::socket::listen(&bound, backlog).map_err(|error| format!("listen: {error}"))?;
    equal("connecting another type", Err(nix::errno::Errno::EPROTOTYPE), {
        nix::sys::socket::connect(stream.as_raw_fd(), &address)
    })
}

/// Clients, some in a child, wait in their order; by a path, and by an abstract name.
fn waiting_to_be_accepted(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.dir().join("socket");
    let by_path = SocketAddr::from_pathname(&path).map_err(failed("name"))?;
    let mut all = Vec::new();
    for address in [by_path, abstract_address(checkpoint)?] {
        let listener = UnixListener::bind_addr(&address).map_err(failed("bind"))?;
        let sign = checkpoint.dir().join(if address.as_pathname().is_some() { "by-path" } else { "by-name" });
        let first = UnixStream::connect_addr(&address).map_err(failed("connect"))?;
        first.set_nonblocking(true).map_err(failed("O_NONBLOCK"))?;
        let child = in_child(|| {
            let mut client = UnixStream::connect_addr(&address).map_err(failed("connect"))?;
            make_sign(&sign)?;
            checkpoint.wait_for_go()?;
            client.write_all(b"child").map_err(failed("write"))
        })?;
        eventually("the child has connected", || sign.exists())?;
        let third = UnixStream::connect_addr(&address).map_err(failed("connect"))?;
        third.shutdown(std::net::Shutdown::Read).map_err(failed("shutdown"))?;
        all.push((listener, first, child, third));
    }
    checkpoint.wait()?;
    for (listener, mut first, child, mut third) in all {
        first.write_all(b"first").map_err(failed("write"))?;
        third.write_all(b"third").map_err(failed("write"))?;
        equal("what the third reads", 0, third.read(&mut [0]).map_err(failed("read"))?)?;
        for (expected, pid) in
            [(b"first", std::process::id() as i32), (b"child", child.0), (b"third", std::process::id() as i32)]
        {
            let (mut server, _) = listener.accept().map_err(failed("accept"))?;
            equal("who connected", pid, peer_of(&server)?.pid)?;
            let mut text = [0; 5];
            server.read_exact(&mut text).map_err(failed("read"))?;
            equal("what was sent", expected, &text)?;
        }
        equal("who listened", std::process::id() as i32, peer_of(&first)?.pid)?;
        child.passed()?;
        try_listener(&listener, || UnixStream::connect_addr(&listener.local_addr()?))?;
    }
    Ok(())
}

fn waiting_with_data(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.dir().join("socket");
    let listener = UnixListener::bind(&path).map_err(failed("bind"))?;
    let mut client = UnixStream::connect(&path).map_err(failed("connect"))?;
    client.write_all(b"early").map_err(failed("write"))?;
    checkpoint.wait()?;
    let (mut server, _) = listener.accept().map_err(failed("accept"))?;
    let mut text = [0; 5];
    server.read_exact(&mut text).map_err(failed("read"))?;
    equal("what was sent early", b"early", &text)
}

/// A grandchild whose parent has ended is no part of the tree any more.
fn peer_outside(checkpoint: &Checkpoint) -> Verdict {
    let (mut ours, mut theirs) = UnixStream::pair().map_err(failed("socketpair"))?;
    let child = in_child(|| {
        let _grandchild = in_child(|| {
            let mut byte = [0];
            theirs.read_exact(&mut byte).map_err(failed("read"))?;
            theirs.write_all(&byte).map_err(failed("write"))
        })?;
        Ok(())
    })?;
    child.passed()?;
    drop(theirs);
    checkpoint.wait()?;
    ours.write_all(b"x").map_err(failed("write"))?;
    let mut text = String::new();
    ours.read_to_string(&mut text).map_err(failed("read"))?;
    equal("the answer", "x", text.as_str())
}

fn path_taken(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.dir().join("socket");
    let listener = UnixListener::bind(&path).map_err(failed("bind"))?;
    checkpoint.wait()?;
    try_listener(&listener, || UnixStream::connect(&path))
}

fn take_path(dir: &Path) {
    fs::remove_file(dir.join("socket")).expect("the dead socket is there");
    fs::write(dir.join("socket"), "precious").expect("a file in its place");
}
