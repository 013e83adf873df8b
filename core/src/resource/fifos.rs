//! FIFOs: pipes with a name.
//!
//! The name leads to the inode again; what is in the pipe is gone with its last end, and is saved like that of a pipe
//! without a name. Opening a FIFO may wait for the other side and tells it that somebody came, so that the ends are
//! opened in an order that leaves the same hang-up state as before (fifo(7), `poll(2)`).

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;

use crate::args;
use crate::batch::{Batch, Sysno};
use crate::error::{DumpError, RestoreError};
use crate::resource::descriptors::{CollectFile, FileId, FileKind, FileResource, OfFile, RebuildFile, Seen};
use crate::resource::files::{self, Expect, Identity, Located};
use crate::resource::pipes::{self, Segment};
use crate::resource::{Check, Resource};

/// An open end of a FIFO; which one, the access mode says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fifo {
    pub path: PathBuf,
    pub identity: Identity,
    /// The first end of the same FIFO: maybe this one.
    pub first: FileId,
    /// What is in it; at the first end only.
    pub buffer: Option<Buffer>,
    /// `poll` shows POLLHUP: there were writers, and all of them left.
    pub hangup: bool,
}

/// The pipe behind the name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Bytes (`F_GETPIPE_SZ`).
    pub size: u32,
    pub data: Vec<Segment>,
}

/// FIFOs: pipes with a name.
pub struct Fifos;

impl Resource for Fifos {
    const NAME: &'static str = "fifos";
    type Scope = OfFile;
    type Saved = Fifo;

    fn collect(context: &mut CollectFile<'_>) -> Result<Fifo, DumpError> {
        let seen = context.seen;
        let identity = Identity::of(&seen.stat);
        let path = match files::locate(&seen.link, &seen.stat) {
            Located::Path(path) => path,
            Located::Deleted => {
                context.refuse("a FIFO that was deleted cannot be brought back", "");
                PathBuf::new()
            }
            Located::Elsewhere(why) => {
                context.refuse(why, "");
                PathBuf::new()
            }
        };
        let hangup = collect_hangup(context)?;
        let mut ends: Vec<FileId> = context.census.same_inode(seen).to_vec();
        ends.sort_unstable();
        let first = ends[0];
        if first != context.id {
            return Ok(Fifo { path, identity, first, buffer: None, hangup });
        }
        let census = context.census;
        let holders = census.strangers.holders(context.targets, &census.seen, &seen.link, None);
        if !holders.is_empty() {
            context.refuse(
                format!("it is also open in processes outside of the tree: {}", holders.join(", ")),
                "end them, or dump the tree that holds all ends",
            );
        }
        let end = context.reopen(OFlag::O_RDONLY | OFlag::O_NONBLOCK)?;
        let read = pipes::read_buffer(&end);
        let (size, data) = read.map_err(|source| context.io_error("its data cannot be read", source))?;
        Ok(Fifo { path, identity, first, buffer: Some(Buffer { size, data }), hangup })
    }

    fn check(saved: &Fifo, context: &mut Check<'_>) {
        let subject = saved.path.display().to_string();
        let whole = match &saved.buffer {
            Some(buffer) => pipes::fits(buffer.size, &buffer.data),
            None => matches!(
                context.image.files.get(saved.first.0 as usize).map(|first| &first.kind),
                Some(FileKind::Fifo(Fifo { buffer: Some(_), .. }))
            ),
        };
        if !whole || !saved.path.is_absolute() {
            return context.refuse(
                subject,
                "the ends do not fit together",
                "the image is damaged; use another copy of it",
            );
        }
        if let Some(buffer) = &saved.buffer {
            pipes::check_size(buffer.size, context);
        }
        // A FIFO keeps nothing between uses: another one with its name does as well.
        let host = &context.image.host;
        if let Some(difference) = saved.identity.difference(&saved.path, libc::S_IFIFO, Expect::Present, host) {
            context.refuse(subject, difference, "make the FIFO again: mkfifo");
        }
    }

    fn rebuild(saved: &Fifo, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        let first = saved.first;
        let image = context.image;
        let (path, buffer) = match &image.files[first.0 as usize].kind {
            FileKind::Fifo(Fifo { path, buffer: Some(buffer), .. }) => (path, buffer),
            _ => return Err(context.mismatch("the ends of a FIFO do not fit together")),
        };
        let io_error = |source| RestoreError::Io { what: format!("the FIFO {}", path.display()), source };
        let error = |errno: Errno| io_error(errno.into());
        let ends: Vec<(FileId, i32, bool)> = image
            .files
            .iter()
            .enumerate()
            .filter_map(|(index, file)| match &file.kind {
                FileKind::Fifo(fifo) if fifo.first == first => {
                    Some((FileId(index as u32), file.flags & libc::O_ACCMODE, fifo.hangup))
                }
                _ => None,
            })
            .collect();
        let fifo = open_named(path).map_err(error)?;
        let mut made: Vec<(FileId, OwnedFd)> = Vec::new();
        let writers = ends.iter().any(|&(_, access, _)| access != libc::O_RDONLY);
        let never = |&&(_, access, hangup): &&(FileId, i32, bool)| access == libc::O_RDONLY && !writers && !hangup;
        // While we hold both sides, nobody waits, and readers that are opened have had a writer.
        if buffer.data.is_empty() && ends.iter().all(|end| never(&end)) {
            // No writer ever came.
        } else {
            let both = pipes::reopen(fifo.as_fd(), libc::O_RDWR).map_err(error)?;
            let mut state = [PollFd::new(both.as_fd(), PollFlags::POLLIN)];
            poll(&mut state, PollTimeout::ZERO).map_err(error)?;
            if state[0].any() == Some(true) {
                return Err(context.mismatch(format!("the FIFO {} is in use by another process", path.display())));
            }
            pipes::set_size(both.as_fd(), buffer.size).map_err(error)?;
            pipes::write_data(both.as_fd(), &buffer.data).map_err(io_error)?;
            for &(file, access, _) in ends.iter().filter(|end| !never(end)) {
                made.push((file, pipes::reopen(fifo.as_fd(), access).map_err(error)?));
            }
        }
        for &(file, access, _) in ends.iter().filter(never) {
            let end = pipes::reopen(fifo.as_fd(), access).map_err(error)?;
            pipes::set_size(end.as_fd(), buffer.size).map_err(error)?;
            made.push((file, end));
        }
        for (file, end) in made {
            context.give(file, context.process_of(file), end)?;
        }
        Ok(())
    }
}

impl FileResource for Fifos {
    fn claims(seen: &Seen) -> bool {
        seen.file_type() == libc::S_IFIFO && seen.has_path() && seen.info.flags & libc::O_PATH == 0
    }

    fn finish(_saved: &Fifo, _context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        // All was done when it was opened.
        Ok(())
    }
}

/// The FIFO of this name, as a place (`O_PATH`): nothing else is opened by mistake, whatever the name leads to.
fn open_named(path: &Path) -> nix::Result<File> {
    let place = nix::fcntl::open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    if nix::sys::stat::fstat(&place)?.st_mode & libc::S_IFMT != libc::S_IFIFO {
        return Err(Errno::ENXIO);
    }
    Ok(File::from(place))
}

/// Asks the program's own descriptor: whether a hang-up shows depends on when it was opened.
fn collect_hangup(context: &mut CollectFile<'_>) -> Result<bool, DumpError> {
    let mut batch = Batch::new();
    // struct pollfd
    let list = batch.bytes(&[&context.seen.fd.0.to_ne_bytes()[..], &libc::POLLIN.to_ne_bytes(), &[0, 0]].concat());
    batch.call(Sysno::poll, args![list, 1, 0]);
    let replies = context.run(&batch)?;
    let revents = i16::from_ne_bytes([replies.bytes(list)[6], replies.bytes(list)[7]]);
    Ok(revents & libc::POLLHUP != 0)
}
