//! Descriptors that were passed through Unix sockets (`SCM_RIGHTS`) and not received yet.
//!
//! `fdinfo` tells how many are in a queue (`scm_fds`). Peeking at a message with them gives the reader new descriptors: the
//! same batch moves them above all numbers of the program, and the target holds them ([`Target::hold_fds`]) until all files
//! of the tree are collected. So a file that is in a queue and nowhere else is collected like any other, through that
//! descriptor; it may be a Unix socket that has such a queue itself. Those that the tree has open elsewhere, or that are in
//! several queues, are told by `kcmp`.
//!
//! A read of a stream ends behind the bytes that descriptors came with. Where those bytes begin the kernel does not tell; but a
//! read that runs into bad memory gives what it has copied of whole parts before: memory that ends one byte early leaves out
//! the last part.

use std::cmp::Ordering;
use std::ops::Range;

use super::*;
use crate::error::Refusal;
use crate::resource::descriptors::{Census, look_at};
use crate::target::{Kcmp, Target, TargetError};

/// The most descriptors that a message carries (`SCM_MAX_FD` of the kernel).
pub const MOST: usize = 253;
/// More than one part of a stream holds: a page and what comes in fragments (`SKB_MAX_HEAD` and `UNIX_SKB_FRAGS_SZ`).
const PART: usize = 40 * 1024;
/// An address where programs have nothing.
const NO_MEMORY: u64 = 4096;
/// `struct cmsghdr`, and one with `struct ucred`, aligned.
const HEAD: usize = 16;
const WITH_CREDENTIALS: usize = 32;
/// Room in which the kernel puts no descriptor, but the head of whatever comes behind them (`SO_INQ`, say, which it does not
/// show otherwise).
const PROBE: usize = HEAD + 3;

/// A message of a queue that has descriptors in it, as it was peeked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Queued {
    pub data: Vec<u8>,
    /// The name of the socket it came from.
    pub sender: Vec<u8>,
    pub credentials: Option<(Pid, u32, u32)>,
    pub files: Vec<FileId>,
}

/// Numbers that the targets hold for us, by process.
pub struct Held(Vec<Range<i32>>);

impl Held {
    pub fn none(processes: usize) -> Held {
        Held(vec![0..0; processes])
    }

    /// Has the next descriptors of a process held, however many a message brings. Gives the lowest number for them: what
    /// the message brings first gets lower ones.
    fn expect(&mut self, targets: &mut [Box<dyn Target>], process: usize) -> Result<i32, DumpError> {
        let held = &mut self.0[process];
        let target = &mut targets[process];
        if held.start == held.end {
            let numbers = target
                .proc()
                .numbers("fd")
                .map_err(|source| DumpError::Io { what: format!("descriptors of process {}", target.pid()), source })?;
            let first = numbers.into_iter().max().unwrap_or(2) + 1 + MOST as i32;
            *held = first..first;
        }
        target.hold_fds(held.start..held.end + MOST as i32);
        Ok(held.end)
    }

    /// Closes all of them.
    pub fn release(&mut self, targets: &mut [Box<dyn Target>]) -> Result<(), DumpError> {
        let mut result = Ok(());
        for (target, held) in targets.iter_mut().zip(&mut self.0) {
            let numbers = std::mem::replace(held, 0..0);
            if numbers.start == numbers.end {
                continue;
            }
            let mut batch = Batch::new();
            batch.call(Sysno::close_range, args![numbers.start, numbers.end - 1, 0]);
            let closed = target.run(&batch);
            target.hold_fds(0..0);
            let pid = target.pid();
            if let Err(source) = closed {
                result = Err(DumpError::Target { resource: UnixSockets::NAME, pid, source });
            }
        }
        result
    }
}

/// Finds all files that are in queues, and what else is in those queues. Asks for the kind of every socket on the way.
pub fn find(
    targets: &mut [Box<dyn Target>],
    census: &mut Census,
    held: &mut Held,
    refusals: &mut Vec<Refusal>,
) -> Result<(), DumpError> {
    let mut from = 0;
    while from < census.seen.len() {
        sockets::ask_kinds(targets, census, from)?;
        let end = census.seen.len();
        let mut queues = Vec::new();
        for index in from..end {
            let seen = &census.seen[index];
            let in_queue = seen.info.field("scm_fds").and_then(|count| count.parse().ok()).unwrap_or(0usize);
            if in_queue == 0 || seen.socket.is_none_or(|socket| socket.domain != libc::AF_UNIX) {
                continue;
            }
            let mut reader = Reader { targets: &mut *targets, held: &mut *held, seen, options: Options::default() };
            match reader.read(in_queue)? {
                Ok(messages) => queues.push((FileId(index as u32), messages)),
                Err((why, help)) => {
                    let (resource, pid, subject) = (UnixSockets::NAME, Some(seen.pid), seen.subject());
                    refusals.push(Refusal { resource, pid, subject, why, help });
                    queues.push((FileId(index as u32), Vec::new()));
                }
            }
        }
        for (socket, messages) in queues {
            let process = census.seen[socket.0 as usize].process;
            let mut queue = Vec::with_capacity(messages.len());
            for message in messages {
                let mut files = Vec::with_capacity(message.fds.len());
                for fd in message.fds {
                    files.push(identify(targets, census, process, fd)?);
                }
                let Part { data, sender, credentials, .. } = message;
                queue.push(Queued { data, sender, credentials, files });
            }
            census.queues.insert(socket, queue);
        }
        from = end;
    }
    Ok(())
}

/// The file that a held descriptor leads to: one of those that are known, or a new one.
fn identify(
    targets: &[Box<dyn Target>],
    census: &mut Census,
    process: usize,
    fd: RemoteFd,
) -> Result<FileId, DumpError> {
    let target = &*targets[process];
    let failed = |source| DumpError::Io { what: format!("descriptors of process {}", target.pid()), source };
    let link = target.proc().link(format!("fd/{fd}")).map_err(failed)?;
    let mut seen = look_at(process, target, fd, link).map_err(failed)?;
    seen.in_queue = true;
    let group = census.inodes.entry((seen.stat.st_dev, seen.stat.st_ino)).or_default();
    for &file in group.iter() {
        let known = &census.seen[file.0 as usize];
        let order = targets[known.process].compare(Kcmp::File, known.fd.0 as u64, seen.pid, fd.0 as u64);
        let order =
            order.map_err(|source| DumpError::Target { resource: UnixSockets::NAME, pid: known.pid, source })?;
        if order == Ordering::Equal {
            return Ok(file);
        }
    }
    let new = FileId(census.seen.len() as u32);
    group.push(new);
    let locks = seen.info.rest.lines().filter_map(|line| line.strip_prefix("lock:"));
    census.locks.extend(locks.map(|lock| (process, fd.0, lock.to_string())));
    census.ids.insert((process, fd.0), new);
    census.seen.push(seen);
    census.holders.push(Vec::new());
    Ok(new)
}

/// Why a queue cannot be saved, and what to do.
type Obstacle = (String, String);

/// What a read would give at once.
struct Part {
    data: Vec<u8>,
    /// Of a datagram, its bytes from the offset on, even those that were not asked for.
    whole: usize,
    sender: Vec<u8>,
    credentials: Option<(Pid, u32, u32)>,
    /// In the spare numbers of the target.
    fds: Vec<RemoteFd>,
    /// It has ancillary data that there was no room for.
    more: bool,
    ancillary: usize,
}

/// The program's own settings of what it reads.
#[derive(Default)]
struct Options {
    peek_offset: u32,
    credentials: bool,
}

impl Options {
    /// What comes before the descriptors.
    fn room(&self) -> usize {
        if self.credentials { WITH_CREDENTIALS } else { 0 }
    }
}

/// Reads one queue, and leaves it as it is.
struct Reader<'a> {
    targets: &'a mut [Box<dyn Target>],
    held: &'a mut Held,
    seen: &'a Seen,
    options: Options,
}

const AGAIN: &str = "dump again when the program has read its messages";

impl Reader<'_> {
    fn error(&self, source: TargetError) -> DumpError {
        DumpError::Target { resource: UnixSockets::NAME, pid: self.seen.pid, source }
    }

    fn run(&mut self, batch: &Batch) -> Result<Replies, DumpError> {
        self.targets[self.seen.process].run(batch).map_err(|source| self.error(source))
    }

    /// The messages of the queue, in order, which has `in_queue` descriptors in it.
    fn read(&mut self, in_queue: usize) -> Result<Result<Vec<Part>, Obstacle>, DumpError> {
        let fd = self.seen.fd;
        let kind = self.seen.socket.map_or(0, |socket| socket.kind);
        let inode = inode_of(self.seen.link.as_bytes()).unwrap_or_default();
        let target = &mut *self.targets[self.seen.process];
        let diag = sockets::ask_unix_diag(target, inode).map_err(|source| self.error(source))?;
        let diag = diag.map_err(|source| DumpError::Io {
            what: format!("sock_diag for process {}, {}", self.seen.pid, self.seen.subject()),
            source,
        })?;
        if diag.state == LISTEN {
            // They are in connections that wait to be accepted, which are looked at as such.
            return Ok(Ok(Vec::new()));
        }
        let mut batch = Batch::new();
        let asked = [libc::SO_PEEK_OFF, libc::SO_PASSCRED, libc::SO_PASSSEC, SO_PASSPIDFD]
            .map(|option| get(&mut batch, fd, libc::SOL_SOCKET, option, 4));
        let replies = self.run(&batch)?;
        let [offset, credentials, label, pidfd] = asked.map(|read| got(&replies, read).and_then(number));
        let is_set = |option: Option<u32>| option.unwrap_or(0) != 0;
        if is_set(label) || is_set(pidfd) {
            let why = "passed descriptors wait in it, and it asks for security labels or process descriptors with its \
                       messages (SO_PASSSEC, SO_PASSPIDFD)";
            return Ok(Err((why.into(), AGAIN.into())));
        }
        self.options = Options { peek_offset: offset.unwrap_or(u32::MAX), credentials: is_set(credentials) };
        let ends = kind == libc::SOCK_SEQPACKET && diag.shutdown & RCV_SHUTDOWN != 0;
        let messages = match kind {
            libc::SOCK_STREAM if !self.lacks_memory()? => {
                return Ok(Err((
                    "passed descriptors wait in it, and its process has memory at address 0".into(),
                    AGAIN.into(),
                )));
            }
            libc::SOCK_STREAM => self.stream()?,
            _ => self.datagrams(ends)?,
        };
        Ok(messages.and_then(|messages| {
            let found: usize = messages.iter().map(|message| message.fds.len()).sum();
            if found == in_queue {
                return Ok(messages);
            }
            Err((format!("{in_queue} passed descriptors wait in it, and {found} of them can be seen"), AGAIN.into()))
        }))
    }

    /// Whether nothing is mapped at [`NO_MEMORY`], as usual (`vm.mmap_min_addr`).
    fn lacks_memory(&self) -> Result<bool, DumpError> {
        let maps = self.targets[self.seen.process].proc().text("maps");
        let maps =
            maps.map_err(|source| DumpError::Io { what: format!("maps of process {}", self.seen.pid), source })?;
        let first = maps.split('-').next().and_then(|start| u64::from_str_radix(start, 16).ok());
        Ok(first.is_none_or(|start| start >= NO_MEMORY + PART as u64))
    }

    fn stream(&mut self) -> Result<Result<Vec<Part>, Obstacle>, DumpError> {
        let mut parts = Vec::new();
        let mut offset = 0;
        loop {
            let mut part = match self.look(offset, PART, 0)? {
                Some(part) if !part.data.is_empty() => part,
                _ => return Ok(Ok(parts)),
            };
            if part.ancillary > self.options.room() {
                let why = "passed descriptors wait in it, and it asks for more with its messages than is known here";
                return Ok(Err((why.into(), AGAIN.into())));
            }
            if part.more {
                match self.whole_parts(offset, part.data.len() - 1)? {
                    0 => match self.receive(offset, PART, 0)? {
                        Ok(Some(received)) => part = received,
                        Ok(None) => return Ok(Ok(parts)),
                        Err(obstacle) => return Ok(Err(obstacle)),
                    },
                    before => part.data.truncate(before),
                }
            }
            offset += part.data.len() as u32;
            parts.push(part);
        }
    }

    fn datagrams(&mut self, ends: bool) -> Result<Result<Vec<Part>, Obstacle>, DumpError> {
        let mut parts: Vec<Part> = Vec::new();
        let mut offset = 0;
        loop {
            // With an offset, an empty message that was peeked at before is left out: the first is asked for without.
            let at = if parts.is_empty() { u32::MAX } else { offset };
            let mut part = match self.receive(at, PIECE, libc::MSG_TRUNC)? {
                Ok(Some(part)) if part.whole != 0 || !ends => part,
                Ok(_) => return Ok(Ok(parts)),
                Err(obstacle) => return Ok(Err(obstacle)),
            };
            if part.whole > LARGEST {
                let why = format!("a message of {} bytes has not been read; {LARGEST} is the most", part.whole);
                return Ok(Err((why, AGAIN.into())));
            }
            while part.data.len() < part.whole {
                let more = self.look(offset + part.data.len() as u32, PIECE, libc::MSG_TRUNC)?;
                match more.filter(|more| !more.data.is_empty()) {
                    Some(more) => part.data.extend(more.data),
                    None => return Ok(Err(("a message in it changes while it is read".into(), AGAIN.into()))),
                }
            }
            offset += part.whole as u32;
            parts.push(part);
        }
    }

    /// Peeks with no room for descriptors.
    fn look(&mut self, offset: u32, length: usize, flags: i32) -> Result<Option<Part>, DumpError> {
        let mut batch = Batch::new();
        let peek = self.add(&mut batch, offset, length, flags, self.options.room() + PROBE);
        let replies = self.run(&batch)?;
        self.take(&replies, &peek)
    }

    /// How many bytes of a stream come before what does not fit into so many.
    fn whole_parts(&mut self, offset: u32, room: usize) -> Result<usize, DumpError> {
        let mut batch = Batch::new();
        let data = batch.room(room);
        let vector = batch.words(&[0, room as u64, NO_MEMORY, PART as u64]);
        batch.pointer(vector, 0, data);
        let header = batch.words(&[0, 0, 0, 2, 0, 0, 0]);
        batch.pointer(header, 16, vector);
        let peek = |batch: &mut Batch, fd| {
            batch.try_call(Sysno::recvmsg, args![fd, header, libc::MSG_PEEK | libc::MSG_DONTWAIT])
        };
        let call = self.at(&mut batch, offset, peek);
        match self.run(&batch)?.result(call) {
            Ok(length) => Ok(length as usize),
            Err(Errno::EFAULT) => Ok(0),
            Err(errno) => Err(self.cannot_read(errno)),
        }
    }

    /// Peeks, and has what comes held.
    fn receive(&mut self, offset: u32, length: usize, flags: i32) -> Result<Result<Option<Part>, Obstacle>, DumpError> {
        let process = self.seen.process;
        let spare = self.held.expect(self.targets, process)?;
        let begin = self.options.room();
        let mut batch = Batch::new();
        let peek = self.add(&mut batch, offset, length, flags, begin + HEAD + MOST.next_multiple_of(2) * 4);
        let control = peek.control.expect("there is room").after(begin + HEAD);
        // Where none has come, its number is -1.
        let lifted: Vec<CallId> = (0..MOST)
            .map(|index| {
                let low = Arg::Loaded(control.after(index * 4));
                let lifted = batch.try_call(Sysno::fcntl, &[low, libc::F_DUPFD_CLOEXEC.into(), spare.into()]);
                batch.try_call(Sysno::close, &[low]);
                lifted
            })
            .collect();
        let replies = self.run(&batch)?;
        let Some(mut part) = self.take(&replies, &peek)? else { return Ok(Ok(None)) };
        let come = replies.bytes(control).chunks_exact(4).take(MOST).take_while(|fd| **fd != [0xff; 4]).count();
        part.fds = lifted.iter().filter_map(|call| replies.result(*call).ok()).map(|fd| RemoteFd(fd as i32)).collect();
        self.held.0[process].end += part.fds.len() as i32;
        if part.more || part.fds.len() != come {
            let why = "passed descriptors wait in it, and the process may not have so many more open";
            return Ok(Err((why.into(), "raise its limit of open files: prlimit --nofile".into())));
        }
        Ok(Ok(Some(part)))
    }

    /// Adds a peek at an offset.
    fn add(&self, batch: &mut Batch, offset: u32, length: usize, flags: i32, room: usize) -> Peek {
        self.at(batch, offset, |batch, fd| Peek::add(batch, fd, flags, length, room))
    }

    /// Adds calls for which the socket has an offset. The program's own is put back behind them.
    fn at<T>(&self, batch: &mut Batch, offset: u32, calls: impl FnOnce(&mut Batch, RemoteFd) -> T) -> T {
        let fd = self.seen.fd;
        let set = batch.bytes(&offset.to_ne_bytes());
        let back = batch.bytes(&self.options.peek_offset.to_ne_bytes());
        batch.call(Sysno::setsockopt, args![fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, set, 4]);
        let result = calls(batch, fd);
        batch.call(Sysno::setsockopt, args![fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, back, 4]);
        result
    }

    fn take(&self, replies: &Replies, peek: &Peek) -> Result<Option<Part>, DumpError> {
        match peek.take(replies) {
            Ok(Peeked { data, whole, sender, credentials, more, ancillary }) => {
                Ok(Some(Part { data, whole, sender, credentials, fds: Vec::new(), more, ancillary }))
            }
            Err(Errno::EAGAIN | Errno::ENOTCONN) => Ok(None),
            Err(errno) => Err(self.cannot_read(errno)),
        }
    }

    fn cannot_read(&self, errno: Errno) -> DumpError {
        DumpError::Io {
            what: format!("reading the queue of process {}, {}", self.seen.pid, self.seen.subject()),
            source: errno.into(),
        }
    }
}
