//! Pipes: their ends, size, packet mode, and the data in them.
//!
//! A pipe is an inode with any number of open file descriptions, its ends. The first of them (in
//! [`Image::files`](crate::image::Image)) carries what belongs to the pipe, the others name the first. Data is copied
//! with `tee`, which leaves it where it is. Pipes are made anew by the restorer, which fills them and hands the ends
//! over.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, tee};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;

use crate::error::{DumpError, RestoreError};
use crate::procfs::ProcDir;
use crate::resource::descriptors::{CollectFile, FileId, FileKind, FileResource, OfFile, RebuildFile, Seen};
use crate::resource::{Check, Resource};
use crate::target::Pid;

/// An end of a pipe; which one, the access mode says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pipe {
    /// The first end of the same pipe: maybe this one.
    pub first: FileId,
    /// What belongs to the pipe; at the first end only.
    pub buffer: Option<Buffer>,
}

/// The pipe itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Bytes (`F_GETPIPE_SZ`).
    pub size: u32,
    /// Permission bits and owner of the inode: opening `/proc/self/fd/N` depends on them.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub data: Vec<Segment>,
}

/// A piece of what is in a pipe, oldest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Written in packet mode (`O_DIRECT`): one read gets it, and only it.
    pub packet: bool,
    pub bytes: Vec<u8>,
}

/// Pipes: their ends, size, packet mode, and the data in them.
pub struct Pipes;

impl Resource for Pipes {
    const NAME: &'static str = "pipes";
    type Scope = OfFile;
    type Saved = Pipe;

    fn collect(context: &mut CollectFile<'_>) -> Result<Pipe, DumpError> {
        let census = context.census;
        let mut ends: Vec<FileId> = census.same_inode(context.seen).to_vec();
        ends.sort_unstable();
        let first = ends[0];
        if first != context.id {
            return Ok(Pipe { first, buffer: None });
        }
        refuse_outside_ends(&ends, context)?;
        let end = context.reopen(OFlag::O_RDONLY | OFlag::O_NONBLOCK)?;
        let buffer = read_buffer(&end).map_err(|source| context.io_error("its data cannot be read", source))?;
        let stat = &context.seen.stat;
        let (size, data) = buffer;
        Ok(Pipe {
            first,
            buffer: Some(Buffer { size, mode: stat.st_mode & 0o7777, uid: stat.st_uid, gid: stat.st_gid, data }),
        })
    }

    fn check(saved: &Pipe, context: &mut Check<'_>) {
        let whole = match &saved.buffer {
            Some(buffer) => fits(buffer.size, &buffer.data),
            None => matches!(
                context.image.files.get(saved.first.0 as usize).map(|first| &first.kind),
                Some(FileKind::Pipe(Pipe { buffer: Some(_), .. }))
            ),
        };
        if !whole {
            context.refuse(
                "",
                "the ends of a pipe do not fit together",
                "the image is damaged; use another copy of it",
            );
        }
        if let Some(buffer) = &saved.buffer {
            check_size(buffer.size, context);
        }
    }

    fn rebuild(saved: &Pipe, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        // All ends at once: until the last is handed over, we hold the pipe.
        let first = saved.first;
        let image = context.image;
        let buffer = match &image.files[first.0 as usize].kind {
            FileKind::Pipe(Pipe { buffer: Some(buffer), .. }) => buffer,
            _ => return Err(context.mismatch("the ends of a pipe do not fit together")),
        };
        let error = |errno: Errno| RestoreError::Io { what: "a pipe could not be made".into(), source: errno.into() };
        let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(error)?;
        set_size(writer.as_fd(), buffer.size).map_err(error)?;
        write_data(reader.as_fd(), &buffer.data)
            .map_err(|source| RestoreError::Io { what: "a pipe could not be filled".into(), source })?;
        nix::unistd::fchown(&reader, Some(buffer.uid.into()), Some(buffer.gid.into())).map_err(error)?;
        nix::sys::stat::fchmod(&reader, Mode::from_bits_truncate(buffer.mode)).map_err(error)?;
        let mut made = [(libc::O_RDONLY, Some(reader.try_clone())), (libc::O_WRONLY, Some(writer.try_clone()))];
        for (index, file) in image.files.iter().enumerate() {
            if !matches!(&file.kind, FileKind::Pipe(pipe) if pipe.first == first) {
                continue;
            }
            let access = file.flags & libc::O_ACCMODE;
            let original = made.iter_mut().find(|(mode, _)| *mode == access).and_then(|(_, end)| end.take());
            let end = match original {
                Some(end) => {
                    end.map_err(|source| RestoreError::Io { what: "a pipe could not be made".into(), source })?
                }
                // Another open file description of an end comes from opening it in /proc.
                None => reopen(reader.as_fd(), access).map_err(error)?,
            };
            let file = FileId(index as u32);
            context.give(file, context.process_of(file), end)?;
        }
        Ok(())
    }
}

impl FileResource for Pipes {
    fn claims(seen: &Seen) -> bool {
        seen.file_type() == libc::S_IFIFO && seen.link.as_bytes().starts_with(b"pipe:[")
    }

    fn finish(_saved: &Pipe, _context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        // All was done when the pipe was made.
        Ok(())
    }
}

/// Refuses a pipe whose other side is held outside of the tree.
fn refuse_outside_ends(ends: &[FileId], context: &mut CollectFile<'_>) -> Result<(), DumpError> {
    let census = context.census;
    let has = |mode: i32| {
        ends.iter().any(|end| {
            let access = census.seen[end.0 as usize].info.flags & libc::O_ACCMODE;
            access == mode || access == libc::O_RDWR
        })
    };
    let (reader, writer) = (has(libc::O_RDONLY), has(libc::O_WRONLY));
    // An end of our own beside that of the tree shows whether the other side is still there.
    let other_side = match (reader, writer) {
        (true, true) => {
            // Both are here. Who else has the pipe would be an ancestor that made it.
            return refuse_ancestors(context);
        }
        (true, false) => {
            let end = context.reopen(OFlag::O_RDONLY | OFlag::O_NONBLOCK)?;
            !events(end.as_fd(), PollFlags::POLLIN).contains(PollFlags::POLLHUP)
        }
        (false, _) => {
            let end = context.reopen(OFlag::O_WRONLY | OFlag::O_NONBLOCK)?;
            !events(end.as_fd(), PollFlags::POLLOUT).contains(PollFlags::POLLERR)
        }
    };
    if other_side {
        let side = if reader { "write" } else { "read" };
        let wanted = if reader { libc::O_WRONLY } else { libc::O_RDONLY };
        let holders = census.strangers.holders(context.targets, &census.seen, &context.seen.link, Some(wanted));
        refuse_holders(side, &holders, context);
    }
    Ok(())
}

fn refuse_ancestors(context: &mut CollectFile<'_>) -> Result<(), DumpError> {
    let census = context.census;
    let holders = census.strangers.ancestors(context.targets, &census.seen, &context.seen.link);
    if !holders.is_empty() {
        refuse_holders("other", &holders, context);
    }
    Ok(())
}

/// What to say of an end that is held outside of the tree.
fn refuse_holders(side: &str, holders: &[String], context: &mut CollectFile<'_>) {
    let who = match holders {
        [] => "a process that is not part of the tree".to_string(),
        [one] => format!("process {one}, which is not part of the tree"),
        several => format!("processes {}, which are not part of the tree", several.join(", ")),
    };
    let side = if side == "other" { "it is also held by".to_string() } else { format!("its {side} end is held by") };
    let help = match context.seen.fd.0 {
        0 => "start the program with its input from a file or /dev/null, or dump the tree that holds both ends",
        1 | 2 => "start the program with its output to a file, or dump the tree that holds both ends",
        _ => "dump the tree that holds both ends",
    };
    context.refuse(format!("{side} {who}"), help);
}

/// `poll` without waiting.
fn events(fd: BorrowedFd<'_>, wanted: PollFlags) -> PollFlags {
    let mut list = [PollFd::new(fd, wanted)];
    match poll(&mut list, PollTimeout::ZERO) {
        Ok(_) => list[0].revents().unwrap_or(PollFlags::empty()),
        Err(_) => PollFlags::empty(),
    }
}

/// Another open file description of what a descriptor of ours leads to.
pub(super) fn reopen(fd: BorrowedFd<'_>, access: i32) -> nix::Result<OwnedFd> {
    let flags = OFlag::from_bits_truncate(access) | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    nix::fcntl::open(format!("/proc/self/fd/{}", fd.as_raw_fd()).as_str(), flags, Mode::empty())
}

/// Sets the size, if it is not right: without privilege even asking for what is there may be refused.
pub(super) fn set_size(pipe: BorrowedFd<'_>, size: u32) -> nix::Result<()> {
    if fcntl(pipe, FcntlArg::F_GETPIPE_SZ)? != size as i32 {
        fcntl(pipe, FcntlArg::F_SETPIPE_SZ(size as i32))?;
    }
    Ok(())
}

/// Whether the data of an image can have been in a pipe of this size.
pub(super) fn fits(size: u32, data: &[Segment]) -> bool {
    let bytes: usize = data.iter().map(|segment| segment.bytes.len()).sum();
    size <= i32::MAX as u32 && bytes <= size as usize && data.iter().all(|segment| !segment.bytes.is_empty())
}

/// A size above the limit needs CAP_SYS_RESOURCE.
pub(super) fn check_size(size: u32, context: &mut Check<'_>) {
    let text = std::fs::read_to_string("/proc/sys/fs/pipe-max-size").unwrap_or_default();
    let limit: u32 = text.trim().parse().unwrap_or(u32::MAX);
    let privileged = ProcDir::open(Pid(std::process::id() as i32))
        .and_then(|proc| proc.status())
        .is_ok_and(|status| status.mask("CapEff").unwrap_or(0) & (1 << CAP_SYS_RESOURCE) != 0);
    if size > limit && !privileged {
        context.refuse(
            "",
            format!("a pipe of {size} bytes is larger than /proc/sys/fs/pipe-max-size allows here ({limit})"),
            "raise that limit, or restore with CAP_SYS_RESOURCE",
        );
    }
}

const CAP_SYS_RESOURCE: u32 = 24;

// --- data ---

/// Size and data of a pipe, left in place. `pipe` is a read end of ours, `O_NONBLOCK`.
pub(super) fn read_buffer(pipe: &File) -> io::Result<(u32, Vec<Segment>)> {
    let size = fcntl(pipe, FcntlArg::F_GETPIPE_SZ)?;
    if !events(pipe.as_fd(), PollFlags::POLLIN).contains(PollFlags::POLLIN) {
        return Ok((size as u32, Vec::new()));
    }
    // A copy of all, to be taken apart; and one of what a single read gets.
    let whole = Scratch::new(size)?;
    let mut left = tee_into(pipe.as_fd(), &whole, size as usize)?;
    let mut data: Vec<Segment> = Vec::new();
    let mut buffer = vec![0; size as usize];
    while left > 0 {
        let got = one_read(&whole, size, &mut buffer)?;
        // How the piece falls apart when it is read byte by byte: a packet is lost but for its first byte.
        let stream = stream_bytes(&whole, size, got, got == left && data.is_empty())?;
        let read = (&whole.reader).read(&mut buffer)?;
        if read != got {
            return Err(io::Error::other("a copy of the pipe does not read like the pipe"));
        }
        for (packet, bytes) in [(false, &buffer[..stream]), (true, &buffer[stream..got])] {
            if bytes.is_empty() {
                continue;
            }
            match data.last_mut() {
                Some(last) if !packet && !last.packet => last.bytes.extend_from_slice(bytes),
                _ => data.push(Segment { packet, bytes: bytes.to_vec() }),
            }
        }
        left -= got;
    }
    Ok((size as u32, data))
}

/// A pipe of our own to copy into.
struct Scratch {
    reader: File,
    writer: OwnedFd,
}

impl Scratch {
    fn new(size: i32) -> io::Result<Scratch> {
        let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        set_size(writer.as_fd(), size as u32)?;
        Ok(Scratch { reader: File::from(reader), writer })
    }
}

/// Copies up to `bytes` of what is in a pipe; 0 if it is empty.
fn tee_into(from: BorrowedFd<'_>, into: &Scratch, bytes: usize) -> io::Result<usize> {
    match tee(from, &into.writer, bytes, SpliceFFlags::SPLICE_F_NONBLOCK) {
        Err(Errno::EAGAIN) => Ok(0),
        other => Ok(other?),
    }
}

/// What the next read gets at most, without taking it.
fn one_read(whole: &Scratch, size: i32, buffer: &mut [u8]) -> io::Result<usize> {
    let copy = Scratch::new(size)?;
    tee_into(whole.reader.as_fd(), &copy, size as usize)?;
    (&copy.reader).read(buffer)
}

/// How many of the next `got` bytes, which one read gets, are before a packet: all, if there is none.
///
/// `alone`: nothing else is in the pipe. Then a stream is taken to be one to its end: nobody mixes modes.
fn stream_bytes(whole: &Scratch, size: i32, got: usize, alone: bool) -> io::Result<usize> {
    let copy = Scratch::new(size)?;
    tee_into(whole.reader.as_fd(), &copy, got)?;
    let mut rest = vec![0; got];
    if got == 1 {
        // One byte is as good as the other, unless a boundary follows.
        return Ok(if alone { 1 } else { 0 });
    }
    for stream in 0..got - 1 {
        (&copy.reader).read_exact(&mut rest[..1])?;
        if alone && stream == 0 {
            return match (&copy.reader).read(&mut rest) {
                Ok(_) => Ok(got),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
                Err(error) => Err(error),
            };
        }
        if !events(copy.reader.as_fd(), PollFlags::POLLIN).contains(PollFlags::POLLIN) {
            return Ok(stream);
        }
    }
    Ok(got)
}

/// Fills an empty pipe of ours.
pub(super) fn write_data(pipe: BorrowedFd<'_>, data: &[Segment]) -> io::Result<()> {
    for segment in data {
        let mut writer = File::from(reopen(pipe, libc::O_WRONLY)?);
        if segment.packet {
            // Only fcntl can: opening with O_DIRECT is for files.
            fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_DIRECT | OFlag::O_NONBLOCK))?;
        }
        writer.write_all(&segment.bytes)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn there_and_back(data: &[Segment]) -> Vec<Segment> {
        let (reader, _writer) = nix::unistd::pipe2(OFlag::O_NONBLOCK).unwrap();
        write_data(reader.as_fd(), data).unwrap();
        let reader = File::from(reader);
        let (size, found) = read_buffer(&reader).unwrap();
        assert_eq!(size, 65536);
        let (_, again) = read_buffer(&reader).unwrap();
        assert_eq!(found, again, "it was left in place");
        found
    }

    fn stream(bytes: &[u8]) -> Segment {
        Segment { packet: false, bytes: bytes.to_vec() }
    }
    fn packet(bytes: &[u8]) -> Segment {
        Segment { packet: true, bytes: bytes.to_vec() }
    }

    #[test]
    fn data_is_read_as_it_was_written() {
        for data in [
            vec![],
            vec![stream(b"x")],
            vec![stream(b"some bytes")],
            vec![stream(&[7; 65536])],
            vec![packet(b"alone")],
            vec![packet(b"one"), packet(b"two"), packet(&[0; 4096]), packet(b"\0\0\0")],
            vec![packet(b"a"), packet(b"b"), packet(b"c")],
            // The kernel adds a packet to a stream as long as there is room in its last page.
            vec![packet(b"first"), stream(&[9; 4096]), packet(b"last")],
            vec![packet(b"same"), packet(b"ame"), packet(b"me")],
        ] {
            assert_eq!(there_and_back(&data), data);
        }
    }

    #[test]
    fn a_packet_is_got_by_one_read() {
        let (reader, _writer) = nix::unistd::pipe2(OFlag::O_NONBLOCK).unwrap();
        write_data(reader.as_fd(), &[packet(b"one"), packet(b"three")]).unwrap();
        let mut reader = File::from(reader);
        let mut buffer = [0; 100];
        assert_eq!(reader.read(&mut buffer).unwrap(), 3);
        assert_eq!(reader.read(&mut buffer).unwrap(), 5);
    }

    #[test]
    fn what_does_not_fit_is_no_pipe() {
        assert!(fits(4096, &[stream(&[0; 4096])]));
        assert!(!fits(4096, &[stream(&[0; 4096]), stream(b"x")]));
        assert!(!fits(u32::MAX, &[]));
        assert!(!fits(4096, &[stream(b"")]));
    }
}
