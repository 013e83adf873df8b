//! Descriptors that were passed through Unix sockets and not received yet.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::mem::zeroed;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;

use crate::case::{Case, Checkpoint};
use crate::cases::eventfd;
use crate::cases::unix_sockets::{pair, set_option};
use crate::expect::{done, equal, in_child, that};

pub fn cases() -> Vec<Case> {
    const SECTIONS: &[&str] = &["unix_sockets", "eventfd"];
    vec![
        Case::new("unix_sockets/passed-shared", SECTIONS, shared),
        Case::new("unix_sockets/passed-only", &["unix_sockets", "eventfd", "files", "pipes", "memfds"], only),
        Case::new("unix_sockets/passed-in-a-stream", SECTIONS, in_a_stream),
        Case::new("unix_sockets/passed-in-messages", SECTIONS, in_messages),
        Case::new("unix_sockets/passed-most", SECTIONS, most),
        Case::new("unix_sockets/passed-nested", SECTIONS, nested),
        Case::new("unix_sockets/passed-in-a-circle", SECTIONS, in_a_circle),
        Case::new("unix_sockets/passed-by-the-dead", SECTIONS, by_the_dead),
        Case::new("unix_sockets/passed-with-credentials", SECTIONS, with_credentials),
        Case::new("unix_sockets/passed-with-a-lock", &["unix_sockets", "files", "locks"], with_a_lock)
            .refused_at_dump("it has a lock, and no process has it open"),
    ]
}

type Verdict = Result<(), String>;

fn failed(what: &str) -> impl Fn(std::io::Error) -> String + '_ {
    move |error| format!("{what}: {error}")
}

/// Sends data with descriptors.
fn pass(socket: &impl AsRawFd, data: &[u8], fds: &[RawFd]) -> Verdict {
    // struct cmsghdr: length, level and type; then the descriptors
    let mut control = vec![16 + 4 * fds.len() as u64, libc::SOL_SOCKET as u64 | (libc::SCM_RIGHTS as u64) << 32];
    let word = |fd: Option<&RawFd>| fd.map_or(0, |fd| *fd as u32 as u64);
    control.extend(fds.chunks(2).map(|two| word(two.first()) | word(two.get(1)) << 32));
    let mut vector = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    // SAFETY: all zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { zeroed() };
    (header.msg_iov, header.msg_iovlen) = (&mut vector, 1);
    if !fds.is_empty() {
        (header.msg_control, header.msg_controllen) = (control.as_mut_ptr().cast(), control.len() * 8);
    }
    // SAFETY: the message points at live memory of the lengths it says.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &header, libc::MSG_NOSIGNAL) };
    equal("bytes sent", data.len() as isize, done("sendmsg", sent)?)
}

/// What a `recvmsg` gives.
struct Received {
    data: Vec<u8>,
    files: Vec<File>,
    /// Pid, user and group.
    credentials: Option<[u32; 3]>,
}

/// Receives what is there, up to so many bytes. The files are close-on-exec if `flags` say so.
fn receive(socket: &impl AsRawFd, length: usize, flags: i32) -> Result<Received, ErrorKind> {
    let mut data = vec![0u8; length];
    let mut control = [0u64; 160];
    let mut vector = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: length };
    // SAFETY: all zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { zeroed() };
    (header.msg_iov, header.msg_iovlen) = (&mut vector, 1);
    (header.msg_control, header.msg_controllen) = (control.as_mut_ptr().cast(), size_of_val(&control));
    // SAFETY: the message points at live memory of the lengths it says.
    let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut header, flags | libc::MSG_DONTWAIT) };
    if got < 0 {
        return Err(std::io::Error::last_os_error().kind());
    }
    data.truncate(got as usize);
    let mut received = Received { data, files: Vec::new(), credentials: None };
    let words: Vec<u32> = control.iter().flat_map(|word| [*word as u32, (word >> 32) as u32]).collect();
    let mut rest = &words[..header.msg_controllen / 4];
    while rest.len() >= 4 {
        let length = rest[0] as usize / 4;
        match rest[3] as i32 {
            libc::SCM_RIGHTS => {
                // SAFETY: the kernel has just made this descriptor for us.
                let own = |&fd: &u32| unsafe { File::from_raw_fd(fd as i32) };
                received.files.extend(rest[4..length].iter().map(own));
            }
            _ => received.credentials = rest[4..length].try_into().ok(),
        }
        rest = rest.get(length.next_multiple_of(2)..).unwrap_or_default();
    }
    Ok(received)
}

/// Receives, and looks whether it is this data with so many files.
fn expect(socket: &impl AsRawFd, data: &[u8], files: usize) -> Result<Vec<File>, String> {
    let received = receive(socket, 300_000, 0).map_err(|kind| format!("recvmsg: {kind}"))?;
    let what = format!("{} bytes with {files} files, not {}", data.len(), received.data.len());
    that(&what, received.data == data)?;
    equal("files that came with it", files, received.files.len())?;
    Ok(received.files)
}

fn nothing_more(socket: &impl AsRawFd) -> Verdict {
    let received = receive(socket, 100, 0).map(|received| (received.data.len(), received.files.len()));
    equal("nothing more", Err(ErrorKind::WouldBlock), received)
}

/// The numbers of the descriptors that are open.
fn open_numbers() -> Result<Vec<i32>, String> {
    let listed = std::fs::read_dir("/proc/self/fd").map_err(failed("/proc/self/fd"))?;
    let mut numbers: Vec<i32> = listed.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// What is passed stays one with what the sender has, and with what is passed twice.
fn shared(checkpoint: &Checkpoint) -> Verdict {
    let (one, other) = pair(libc::SOCK_STREAM)?;
    let counter = eventfd::eventfd(3, 0)?;
    let passed_twice = eventfd::eventfd(7, 0)?;
    pass(&one, b"f", &[counter.as_raw_fd(), passed_twice.as_raw_fd()])?;
    pass(&one, b"g", &[passed_twice.as_raw_fd()])?;
    drop(passed_twice);
    let before = open_numbers()?;
    checkpoint.wait()?;
    equal("the descriptors that are open", before, open_numbers()?)?;
    let first = expect(&other, b"f", 2)?;
    let second = expect(&other, b"g", 1)?;
    nothing_more(&other)?;
    equal("the count of what was passed", Ok(3), eventfd::read(&first[0]))?;
    eventfd::write(&counter, 5)?;
    equal("what the sender has written since", Ok(5), eventfd::read(&first[0]))?;
    equal("the count of what was passed twice", Ok(7), eventfd::read(&first[1]))?;
    eventfd::write(&first[1], 9)?;
    equal("what was written to the one is in the other", Ok(9), eventfd::read(&second[0]))?;
    // SAFETY: takes no argument.
    let flags = unsafe { libc::fcntl(first[0].as_raw_fd(), libc::F_GETFD) };
    equal("received without MSG_CMSG_CLOEXEC", 0, flags)
}

/// Files of several kinds that no descriptor leads to.
fn only(checkpoint: &Checkpoint) -> Verdict {
    let (one, other) = pair(libc::SOCK_SEQPACKET)?;
    let path = checkpoint.dir().join("file");
    std::fs::write(&path, "0123456789").map_err(failed("write"))?;
    let mut file = File::options().read(true).append(true).open(&path).map_err(failed("open"))?;
    file.seek(SeekFrom::Start(4)).map_err(failed("seek"))?;
    let (read_end, write_end) = std::io::pipe().map_err(failed("pipe"))?;
    (&write_end).write_all(b"through the pipe").map_err(failed("write"))?;
    // SAFETY: makes a new descriptor, which the File owns.
    let mut memory = unsafe { File::from_raw_fd(done("memfd_create", libc::memfd_create(c"m".as_ptr(), 0))?) };
    memory.write_all(b"in memory").map_err(failed("write"))?;
    let deleted = checkpoint.dir().join("deleted");
    let mut gone = File::options().read(true).write(true).create_new(true).open(&deleted).map_err(failed("open"))?;
    gone.write_all(b"gone, and here").map_err(failed("write"))?;
    std::fs::remove_file(&deleted).map_err(failed("unlink"))?;
    let fds = [file.as_raw_fd(), read_end.as_raw_fd(), memory.as_raw_fd(), gone.as_raw_fd()];
    pass(&one, b"four", &fds)?;
    drop((file, read_end, memory, gone));
    checkpoint.wait()?;
    let mut files = expect(&other, b"four", 4)?.into_iter();
    let mut next = || files.next().expect("four have come");
    let (mut file, mut read_end, mut memory, mut gone) = (next(), next(), next(), next());
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(failed("read"))?;
    equal("the rest of a file", "456789", text.as_str())?;
    file.write_all(b"end").map_err(failed("write"))?;
    let whole = std::fs::read_to_string(&path).map_err(failed("read"))?;
    equal("what was appended", "0123456789end", whole.as_str())?;
    (&write_end).write_all(b", and more").map_err(failed("write"))?;
    drop(write_end);
    let mut text = String::new();
    read_end.read_to_string(&mut text).map_err(failed("read"))?;
    equal("what is in the pipe", "through the pipe, and more", text.as_str())?;
    for (file, content) in [(&mut memory, "in memory"), (&mut gone, "gone, and here")] {
        equal("the offset", content.len() as u64, file.stream_position().map_err(failed("lseek"))?)?;
        file.rewind().map_err(failed("lseek"))?;
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(failed("read"))?;
        equal("what is in a file without a name", content, text.as_str())?;
    }
    Ok(())
}

/// A read of a stream ends behind the bytes that descriptors came with.
fn in_a_stream(checkpoint: &Checkpoint) -> Verdict {
    let (one, other) = pair(libc::SOCK_STREAM)?;
    let counters = (1..=4).map(|count| eventfd::eventfd(count, 0)).collect::<Result<Vec<_>, _>>()?;
    let large: Vec<u8> = (0..36_000).map(|byte| (byte % 251) as u8).collect();
    pass(&one, b"partly read", &[])?;
    pass(&one, b"before ", &[])?;
    pass(&one, b"with one", &[counters[0].as_raw_fd()])?;
    pass(&one, &large, &[counters[1].as_raw_fd(), counters[2].as_raw_fd()])?;
    pass(&one, b"after it", &[])?;
    pass(&one, b"!", &[counters[3].as_raw_fd()])?;
    pass(&one, b"last", &[])?;
    let first = receive(&other, 7, 0).map_err(|kind| format!("recvmsg: {kind}"))?;
    equal("the first bytes", b"partly ".as_slice(), &first.data)?;
    drop(counters);
    set_option(&other, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 3)?;
    checkpoint.wait()?;
    equal("SO_PEEK_OFF", 3, super::unix_sockets::option(&other, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?)?;
    // Less than what comes before the first descriptor brings none.
    let some = receive(&other, 4, 0).map_err(|kind| format!("recvmsg: {kind}"))?;
    equal("a short read", (b"read".as_slice(), 0), (some.data.as_slice(), some.files.len()))?;
    let mut all = expect(&other, b"before with one", 1)?;
    all.extend(expect(&other, &large, 2)?);
    all.extend(expect(&other, b"after it!", 1)?);
    expect(&other, b"last", 0)?;
    nothing_more(&other)?;
    for (count, counter) in (1..).zip(&all) {
        equal("a count", Ok(count), eventfd::read(counter))?;
    }
    Ok(())
}

fn in_messages(checkpoint: &Checkpoint) -> Verdict {
    let mut pairs = Vec::new();
    let long = vec![5; 70_000];
    for kind in [libc::SOCK_DGRAM, libc::SOCK_SEQPACKET] {
        let (one, other) = pair(kind)?;
        let counters = (1..=3).map(|count| eventfd::eventfd(count, 0)).collect::<Result<Vec<_>, _>>()?;
        pass(&one, b"", &[counters[0].as_raw_fd()])?;
        pass(&one, b"none", &[])?;
        pass(&one, &long, &[counters[1].as_raw_fd(), counters[2].as_raw_fd()])?;
        pass(&one, b"none", &[])?;
        pairs.push((one, other));
    }
    // A datagram socket with a name, and who sends to it by that name.
    let path = checkpoint.dir().join("named");
    let named = UnixDatagram::bind(&path).map_err(failed("bind"))?;
    let sender = UnixDatagram::unbound().map_err(failed("socket"))?;
    sender.connect(&path).map_err(failed("connect"))?;
    pass(&sender, b"to a name", &[eventfd::eventfd(4, 0)?.as_raw_fd()])?;
    checkpoint.wait()?;
    for (_one, other) in &pairs {
        let mut all = expect(other, b"", 1)?;
        expect(other, b"none", 0)?;
        all.extend(expect(other, &long, 2)?);
        expect(other, b"none", 0)?;
        nothing_more(other)?;
        for (count, counter) in (1..).zip(&all) {
            equal("a count", Ok(count), eventfd::read(counter))?;
        }
    }
    equal("a count", Ok(4), eventfd::read(&expect(&named, b"to a name", 1)?[0]))
}

/// As many as one message carries, and some more.
fn most(checkpoint: &Checkpoint) -> Verdict {
    let (one, other) = pair(libc::SOCK_STREAM)?;
    let counters = (0..300).map(|count| eventfd::eventfd(count, 0)).collect::<Result<Vec<_>, _>>()?;
    let fds: Vec<RawFd> = counters.iter().map(AsRawFd::as_raw_fd).collect();
    pass(&one, b"m", &fds[..253])?;
    pass(&one, b"n", &fds[253..])?;
    drop(counters);
    let before = open_numbers()?;
    checkpoint.wait()?;
    equal("the descriptors that are open", before, open_numbers()?)?;
    let mut all = expect(&other, b"m", 253)?;
    all.extend(expect(&other, b"n", 47)?);
    for (count, counter) in all.iter().enumerate().skip(1) {
        equal("a count", Ok(count as u64), eventfd::read(counter))?;
    }
    Ok(())
}

/// A socket in a queue, with a queue that a socket is in, with a queue that a counter is in.
fn nested(checkpoint: &Checkpoint) -> Verdict {
    let (outer, received) = pair(libc::SOCK_STREAM)?;
    let (middle, middle_end) = pair(libc::SOCK_SEQPACKET)?;
    let (inner, inner_end) = pair(libc::SOCK_DGRAM)?;
    pass(&inner, b"i", &[eventfd::eventfd(8, 0)?.as_raw_fd()])?;
    pass(&middle, b"m", &[inner_end.as_raw_fd()])?;
    pass(&outer, b"o", &[middle_end.as_raw_fd()])?;
    drop((inner_end, middle_end));
    checkpoint.wait()?;
    let middle_end = &expect(&received, b"o", 1)?[0];
    let inner_end = &expect(middle_end, b"m", 1)?[0];
    let counter = &expect(inner_end, b"i", 1)?[0];
    equal("the count", Ok(8), eventfd::read(counter))?;
    pass(&inner, b"once more", &[])?;
    expect(inner_end, b"once more", 0)?;
    pass(inner_end, b"back", &[])?;
    expect(&inner, b"back", 0).map(drop)
}

/// A socket that is in the queue of its own other end, and in its own.
fn in_a_circle(checkpoint: &Checkpoint) -> Verdict {
    let (one, other) = pair(libc::SOCK_STREAM)?;
    pass(&one, b"1", &[one.as_raw_fd()])?;
    pass(&one, b"2", &[other.as_raw_fd()])?;
    drop(one);
    checkpoint.wait()?;
    let one = expect(&other, b"1", 1)?;
    let again = expect(&other, b"2", 1)?;
    pass(&one[0], b"through the circle", &[])?;
    expect(&again[0], b"through the circle", 0)?;
    pass(&other, b"and back", &[])?;
    expect(&one[0], b"and back", 0).map(drop)
}

/// The sender has closed its end, or has ended.
fn by_the_dead(checkpoint: &Checkpoint) -> Verdict {
    let mut ends: Vec<OwnedFd> = Vec::new();
    for kind in [libc::SOCK_STREAM, libc::SOCK_SEQPACKET, libc::SOCK_DGRAM] {
        let (one, other) = pair(kind)?;
        let child = in_child(|| pass(&one, b"will", &[eventfd::eventfd(6, 0)?.as_raw_fd()]))?;
        child.passed()?;
        ends.push(other);
    }
    checkpoint.wait()?;
    for end in &ends {
        let received = receive(end, 100, libc::MSG_CMSG_CLOEXEC).map_err(|kind| format!("recvmsg: {kind}"))?;
        equal("what was left", (b"will".as_slice(), 1), (received.data.as_slice(), received.files.len()))?;
        equal("the count", Ok(6), eventfd::read(&received.files[0]))?;
        // SAFETY: takes no argument.
        let flags = unsafe { libc::fcntl(received.files[0].as_raw_fd(), libc::F_GETFD) };
        equal("received with MSG_CMSG_CLOEXEC", libc::FD_CLOEXEC, flags)?;
    }
    for end in &ends[..2] {
        let after = receive(end, 100, 0).map(|received| received.data.len());
        equal("the end after it", Ok(0), after)?;
    }
    Ok(())
}

fn with_credentials(checkpoint: &Checkpoint) -> Verdict {
    let (one, other) = pair(libc::SOCK_STREAM)?;
    pass(&one, b"unasked", &[])?;
    set_option(&other, libc::SOL_SOCKET, libc::SO_PASSCRED, 1)?;
    pass(&one, b"asked", &[eventfd::eventfd(2, 0)?.as_raw_fd()])?;
    checkpoint.wait()?;
    // SAFETY: have no arguments.
    let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    let receive = || receive(&other, 100, 0).map_err(|kind| format!("recvmsg: {kind}"));
    let first = receive()?;
    equal("sent before", (b"unasked".as_slice(), 0), (first.data.as_slice(), first.files.len()))?;
    equal("its process", Some(0), first.credentials.map(|credentials| credentials[0]))?;
    let second = receive()?;
    equal("sent after", (b"asked".as_slice(), 1), (second.data.as_slice(), second.files.len()))?;
    equal("its credentials", Some([std::process::id(), uid, gid]), second.credentials)?;
    equal("the count", Ok(2), eventfd::read(&second.files[0]))
}

fn with_a_lock(checkpoint: &Checkpoint) -> Verdict {
    let (one, other) = pair(libc::SOCK_STREAM)?;
    let file = File::create(checkpoint.dir().join("locked")).map_err(failed("create"))?;
    file.lock().map_err(failed("flock"))?;
    pass(&one, b"l", &[file.as_raw_fd()])?;
    drop(file);
    checkpoint.wait()?;
    let received = expect(&other, b"l", 1)?;
    let again = File::open(checkpoint.dir().join("locked")).map_err(failed("open"))?;
    that("it is still locked", again.try_lock().is_err())?;
    drop(received);
    again.lock().map_err(failed("flock"))
}
