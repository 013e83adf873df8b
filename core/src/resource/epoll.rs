//! Event polls (`epoll`): what is watched, with events and data, from `/proc/PID/fdinfo`.
//!
//! An entry is known to the kernel by an open file description and the number it was added under. That number may have
//! been closed or given to another file since, while a duplicate keeps the entry alive: the file is found with
//! `kcmp(KCMP_EPOLL_TFD)` among all files of the tree, and the entry is made again under its old number.
//!
//! What is ready is found anew from the files. The kernel does not show which edge-triggered entries have been reported
//! already, so one that is ready is reported (again) after a restore: an edge is never lost, though one may be seen twice.
//! An `EPOLLONESHOT` entry that has fired stays disabled.

use std::cmp::Ordering;

use crate::args;
use crate::batch::{Batch, Replies, Sysno};
use crate::error::{DumpError, RestoreError};
use crate::resource::descriptors::{CollectFile, FileId, FileResource, OfFile, RebuildFile, Seen};
use crate::resource::{Check, Resource};
use crate::target::{EpollSlot, Kcmp, RemoteFd};

/// Its saved form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Epoll {
    /// In the kernel's order.
    pub entries: Vec<Entry>,
    /// `EPIOCGPARAMS`, where the program has set any.
    pub busy_poll: Option<BusyPoll>,
}

/// A file that is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub file: FileId,
    /// The number it was added under, which may lead elsewhere now.
    pub fd: i32,
    /// `EPOLL*`. Without any event, only flags: it is disabled.
    pub events: u32,
    pub data: u64,
}

/// `struct epoll_params` (kernel 6.9).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BusyPoll {
    pub microseconds: u32,
    pub budget: u16,
    pub prefer: bool,
}

/// Event polls.
pub struct Epolls;

const EPIOCSPARAMS: u32 = 0x4008_8a01;
const EPIOCGPARAMS: u32 = 0x8008_8a02;
const EPOLLWAKEUP: u32 = 1 << 29;
/// What a fired one-shot entry keeps (`EP_PRIVATE_BITS` of the kernel).
const FLAGS: u32 = (libc::EPOLLET | libc::EPOLLONESHOT | libc::EPOLLEXCLUSIVE) as u32 | EPOLLWAKEUP;
/// All that a file may be ready for.
const ANY_EVENT: u32 =
    (libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLPRI | libc::EPOLLRDNORM | libc::EPOLLWRNORM | libc::EPOLLRDHUP) as u32;

impl Resource for Epolls {
    const NAME: &'static str = "epoll";
    type Scope = OfFile;
    type Saved = Epoll;

    fn collect(context: &mut CollectFile<'_>) -> Result<Epoll, DumpError> {
        let Some(lines) = parse(&context.seen.info.rest) else {
            context.refuse(format!("its fdinfo has an unknown form: {:?}", context.seen.info.rest), "");
            return Ok(Epoll { entries: Vec::new(), busy_poll: None });
        };
        let mut entries = Vec::with_capacity(lines.len());
        for (index, line) in lines.iter().enumerate() {
            // Entries with one number are told apart by their place among themselves.
            let offset = lines[..index].iter().filter(|earlier| earlier.fd == line.fd).count() as u32;
            match find(context, line, offset)? {
                Some(file) => entries.push(Entry { file, fd: line.fd, events: line.events, data: line.data }),
                None => context.refuse(
                    format!(
                        "it watches a file, added as descriptor {} (inode {}), that no process of the tree has open \
                         in its descriptor table any more",
                        line.fd, line.inode
                    ),
                    "have the program remove the entry before it closes the descriptor, or dump the tree that has it open",
                ),
            }
        }
        Ok(Epoll { entries, busy_poll: busy_poll(context)? })
    }

    fn check(_saved: &Epoll, _context: &mut Check<'_>) {
        // It depends on the other files alone.
    }

    fn rebuild(saved: &Epoll, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        let process = context.process();
        context.create(process, 2, 16, |batch| {
            let fd = batch.call(Sysno::epoll_create1, args![0]);
            if let Some(busy_poll) = saved.busy_poll {
                let low = u64::from(busy_poll.microseconds);
                let high = u64::from(busy_poll.budget) | u64::from(busy_poll.prefer) << 16;
                let params = batch.words(&[low | high << 32]);
                batch.call(Sysno::ioctl, args![fd, EPIOCSPARAMS, params]);
            }
            (fd, |_: &Replies| Ok(()))
        })
    }
}

impl FileResource for Epolls {
    fn claims(seen: &Seen) -> bool {
        seen.is_anon_inode("[eventpoll]")
    }

    fn finish(saved: &Epoll, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        // Disabled entries first: to disable one it has to fire, and then no other entry may be there to fire instead.
        let (disabled, live): (Vec<_>, Vec<_>) = saved.entries.iter().partition(|entry| entry.is_disabled());
        for entry in disabled {
            add(entry, context)?;
        }
        // Most entries are under a number that leads to their file: those share batches.
        let process = context.process();
        let epoll = context.bring(context.id, process)?;
        let mut batch = Batch::new();
        for entry in live {
            if holds(context, process, entry) {
                if !batch.has_room(1, 32) {
                    context.run(process, &std::mem::take(&mut batch))?;
                }
                let event = batch.bytes(&event(entry.events, entry.data));
                batch.call(Sysno::epoll_ctl, args![epoll, libc::EPOLL_CTL_ADD, entry.fd, event]);
            } else {
                add(entry, context)?;
            }
        }
        context.run(process, &batch)?;
        Ok(())
    }
}

impl Entry {
    /// Whether it is a one-shot entry that has fired.
    fn is_disabled(&self) -> bool {
        self.events & !FLAGS == 0
    }
}

/// Whether the number of an entry leads to its file in a process.
fn holds(context: &RebuildFile<'_>, process: usize, entry: &Entry) -> bool {
    let table = &context.image.processes[process].descriptors.descriptors;
    table.iter().any(|held| held.fd == entry.fd && held.file == entry.file)
}

/// Makes one entry, wherever its file is.
fn add(entry: &Entry, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
    let holder = (0..context.targets.len()).find(|&process| holds(context, process, entry));
    let process = match holder {
        Some(process) => process,
        // The number must be borrowed for a moment: where it is not one of our own.
        None => (0..context.targets.len())
            .find(|&process| !context.targets[process].footprint().fds.contains(&RemoteFd(entry.fd)))
            .ok_or_else(|| context.mismatch(format!("descriptor number {} is not free for an entry", entry.fd)))?,
    };
    let epoll = context.bring(context.id, process)?;
    if holder.is_some() {
        return enter(entry, epoll, process, context);
    }
    let file = context.bring(entry.file, process)?;
    let spare = context.targets[process].footprint().spare_fds.max(entry.fd.saturating_add(1));
    let mut batch = Batch::new();
    let flags = batch.try_call(Sysno::fcntl, args![entry.fd, libc::F_GETFD]);
    let lent = batch.try_call(Sysno::fcntl, args![entry.fd, libc::F_DUPFD_CLOEXEC, spare]);
    batch.call(Sysno::dup3, args![file, entry.fd, libc::O_CLOEXEC]);
    let replies = context.run(process, &batch)?;
    // If the epoll itself, or the file, had that very number, it has moved.
    let moved =
        |fd: RemoteFd| if fd.0 == entry.fd { replies.result(lent).map_or(fd, |fd| RemoteFd(fd as i32)) } else { fd };
    enter(entry, moved(epoll), process, context)?;
    let mut batch = Batch::new();
    match (replies.result(flags), replies.result(lent)) {
        (Ok(flags), Ok(lent)) => {
            let close_on_exec = if flags as i32 & libc::FD_CLOEXEC != 0 { libc::O_CLOEXEC } else { 0 };
            batch.call(Sysno::dup3, args![lent, entry.fd, close_on_exec]);
            batch.call(Sysno::close, args![lent]);
        }
        _ => {
            batch.call(Sysno::close, args![entry.fd]);
        }
    }
    context.run(process, &batch)?;
    Ok(())
}

/// `EPOLL_CTL_ADD` where the number leads to the file, and for a disabled entry, has it fire.
fn enter(entry: &Entry, epoll: RemoteFd, process: usize, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
    let mut batch = Batch::new();
    let events = if entry.is_disabled() { entry.events | ANY_EVENT } else { entry.events };
    let value = batch.bytes(&event(events, entry.data));
    batch.call(Sysno::epoll_ctl, args![epoll, libc::EPOLL_CTL_ADD, entry.fd, value]);
    if !entry.is_disabled() {
        context.run(process, &batch)?;
        return Ok(());
    }
    let fired = batch.room(12);
    let count = batch.call(Sysno::epoll_wait, args![epoll, fired, 1, 0]);
    if context.run(process, &batch)?.value(count) != 0 {
        return Ok(());
    }
    // It is not ready for anything. A pipe can be made so, by a byte that is taken out again.
    let is_pipe = matches!(context.image.files[entry.file.0 as usize].kind.name(), "pipes" | "fifos");
    if is_pipe && fire_pipe(entry, epoll, process, context)? {
        return Ok(());
    }
    // What else can be ready for nothing (a timer, a signal, a counter, a listening socket) reports neither error nor
    // hang-up, which are all that the entry is left with.
    let mut batch = Batch::new();
    let value = batch.bytes(&event(entry.events, entry.data));
    batch.call(Sysno::epoll_ctl, args![epoll, libc::EPOLL_CTL_MOD, entry.fd, value]);
    context.run(process, &batch)?;
    Ok(())
}

/// Has an entry fire by a byte written to its pipe and read again. Says whether it did.
fn fire_pipe(
    entry: &Entry,
    epoll: RemoteFd,
    process: usize,
    context: &mut RebuildFile<'_>,
) -> Result<bool, RestoreError> {
    let mut batch = Batch::new();
    let path = batch.string(format!("/proc/self/fd/{}", entry.fd).as_bytes());
    let flags = libc::O_WRONLY | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let writer = batch.try_call(Sysno::openat, args![libc::AT_FDCWD, path, flags]);
    let Ok(writer) = context.run(process, &batch)?.result(writer) else { return Ok(false) };
    let mut batch = Batch::new();
    let (byte, fired) = (batch.room(1), batch.room(12));
    batch.call(Sysno::write, args![writer, byte, 1]);
    let count = batch.call(Sysno::epoll_wait, args![epoll, fired, 1, 0]);
    batch.call(Sysno::read, args![entry.fd, byte, 1]);
    batch.call(Sysno::close, args![writer]);
    Ok(context.run(process, &batch)?.value(count) != 0)
}

/// `struct epoll_event`, packed.
fn event(events: u32, data: u64) -> Vec<u8> {
    [events.to_ne_bytes().as_slice(), &data.to_ne_bytes()].concat()
}

fn busy_poll(context: &mut CollectFile<'_>) -> Result<Option<BusyPoll>, DumpError> {
    let mut batch = Batch::new();
    let params = batch.room(8);
    let asked = batch.try_call(Sysno::ioctl, args![context.seen.fd, EPIOCGPARAMS, params]);
    let replies = context.run(&batch)?;
    // A kernel without it has nothing set.
    if replies.result(asked).is_err() || replies.u64(params) == 0 {
        return Ok(None);
    }
    let bytes = replies.bytes(params);
    Ok(Some(BusyPoll {
        microseconds: replies.u32(params),
        budget: u16::from_ne_bytes([bytes[4], bytes[5]]),
        prefer: bytes[6] != 0,
    }))
}

/// The file of an entry, `offset` entries with the same number before it.
fn find(context: &mut CollectFile<'_>, line: &Line, offset: u32) -> Result<Option<FileId>, DumpError> {
    let census = context.census;
    // Most likely it is what its number leads to.
    let number = census.ids.get(&(context.seen.process, line.fd)).copied();
    let others = (0..census.seen.len() as u32).map(FileId).filter(|file| Some(*file) != number);
    for file in number.into_iter().chain(others) {
        let candidate = &census.seen[file.0 as usize];
        if candidate.info.inode != line.inode && candidate.info.inode != 0 {
            continue;
        }
        let slot = EpollSlot { target: line.fd, offset };
        // By a descriptor of the same process where it has one, and of the same number if that leads there: not every
        // backend can bring a file over and lend it a number that is in use.
        let seen = context.seen;
        let holders = &census.holders[file.0 as usize];
        let same_number = holders.iter().find(|holder| **holder == (seen.process, line.fd));
        let holder = same_number.or_else(|| holders.iter().find(|(process, _)| *process == seen.process));
        let (process, fd) = holder.copied().unwrap_or((candidate.process, candidate.fd.0));
        let from = &context.targets[process];
        let order = from.compare(Kcmp::EpollTarget(slot), fd as u64, seen.pid, seen.fd.0 as u64);
        if order.map_err(|source| context.target_error(source))? == Ordering::Equal {
            return Ok(Some(file));
        }
    }
    Ok(None)
}

/// An entry as `fdinfo` shows it.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    fd: i32,
    events: u32,
    data: u64,
    inode: u64,
}

/// `tfd:        5 events:       19 data:                5  pos:0 ino:1b6c sdev:9`, hexadecimal but for the number and pos.
fn parse(rest: &str) -> Option<Vec<Line>> {
    let entry = |line: &str| {
        let words: Vec<&str> = line.split([' ', ':']).filter(|word| !word.is_empty()).collect();
        let value = |name: &str| words.chunks_exact(2).find(|pair| pair[0] == name).map(|pair| pair[1]);
        Some(Line {
            fd: value("tfd")?.parse().ok()?,
            events: u32::from_str_radix(value("events")?, 16).ok()?,
            data: u64::from_str_radix(value("data")?, 16).ok()?,
            inode: u64::from_str_radix(value("ino")?, 16).ok()?,
        })
    };
    rest.lines().filter(|line| line.starts_with("tfd:")).map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_fdinfo() {
        let text = "tfd:        5 events:       19 data:     7fff00000005  pos:0 ino:1b6c sdev:9\n\
                    tfd:       11 events: 40000000 data: ffffffffffffffff  pos:12 ino:4 sdev:10\n";
        let lines = parse(text).unwrap();
        assert_eq!(lines[0], Line { fd: 5, events: 0x19, data: 0x7fff_0000_0005, inode: 0x1b6c });
        assert_eq!(lines[1], Line { fd: 11, events: libc::EPOLLONESHOT as u32, data: u64::MAX, inode: 4 });
        assert_eq!(parse("tfd: x events: 1 data: 1 ino: 1"), None);
    }

    #[test]
    fn only_a_fired_entry_is_disabled() {
        let entry = |events| Entry { file: FileId(0), fd: 3, events, data: 0 };
        assert!(entry((libc::EPOLLONESHOT | libc::EPOLLET) as u32).is_disabled());
        assert!(!entry((libc::EPOLLONESHOT | libc::EPOLLERR | libc::EPOLLHUP) as u32).is_disabled());
    }

    #[test]
    fn events_are_packed() {
        assert_eq!(event(1, 2), [1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    }
}
