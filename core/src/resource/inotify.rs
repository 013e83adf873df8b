//! File watches (`inotify`): what is watched, by what number, for which events.
//!
//! The kernel shows a watch by the handle of its inode (`/proc/PID/fdinfo`), which is opened to learn its path
//! (`open_by_handle_at`). On file systems that have no handles the path is looked for among the files and directories
//! that the tree has open. Events cannot be read without being taken, so that unread ones are refused.

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::stat::{FileStat, lstat};

use crate::args;
use crate::batch::{Batch, CallId, Replies, Sysno};
use crate::error::{DumpError, RestoreError};
use crate::resource::descriptors::{CollectFile, FileResource, OfFile, RebuildFile, Seen};
use crate::resource::files::{Expect, Identity};
use crate::resource::{Check, Resource};

/// Its saved form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inotify {
    /// Sorted by number.
    pub watches: Vec<Watch>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watch {
    /// What `inotify_add_watch` gave.
    pub number: i32,
    pub path: PathBuf,
    /// `S_IFREG`, `S_IFDIR`, ...
    pub file_type: u32,
    pub identity: Identity,
    /// `IN_*`.
    pub mask: u32,
}

/// File watches.
pub struct Inotifies;

/// `_IOW('I', 0, __s32)`, with `CONFIG_CHECKPOINT_RESTORE`: the number of the next watch.
const INOTIFY_IOC_SETNEXTWD: u32 = 0x4004_4900;

impl Resource for Inotifies {
    const NAME: &'static str = "inotify";
    type Scope = OfFile;
    type Saved = Inotify;

    fn collect(context: &mut CollectFile<'_>) -> Result<Inotify, DumpError> {
        let Some(lines) = parse(&context.seen.info.rest) else {
            context.refuse(format!("its fdinfo has an unknown form: {:?}", context.seen.info.rest), "");
            return Ok(Inotify { watches: Vec::new() });
        };
        let mut batch = Batch::new();
        let unread = batch.room(4);
        batch.call(Sysno::ioctl, args![context.seen.fd, libc::FIONREAD, unread]);
        if context.run(&batch)?.u32(unread) != 0 {
            context.refuse("it has events that were not read", "dump again when the program has read them");
        }
        let mounts = context.target().proc().text("mountinfo");
        let mounts = mounts.map_err(|error| context.io_error("mountinfo", error))?;
        let mut watches = Vec::with_capacity(lines.len());
        for line in lines {
            match find(context, &line, &mounts) {
                Some((path, stat)) => watches.push(Watch {
                    number: line.number,
                    path,
                    file_type: stat.st_mode & libc::S_IFMT,
                    identity: Identity::of(&stat),
                    mask: line.mask,
                }),
                None => context.refuse(
                    format!("no path leads to what it watches (inode {} of device {:#x})", line.inode, line.device),
                    "have the program remove the watch before the dump",
                ),
            }
        }
        watches.sort_unstable_by_key(|watch| watch.number);
        Ok(Inotify { watches })
    }

    fn check(saved: &Inotify, context: &mut Check<'_>) {
        for watch in &saved.watches {
            let subject = watch.path.display().to_string();
            let expect = if watch.file_type == libc::S_IFREG { Expect::SameFile } else { Expect::Present };
            if !watch.path.is_absolute() || watch.number < 1 {
                context.refuse(subject, "it is no watch that a dump gives", "use another copy of the image");
            } else if let Some(difference) =
                watch.identity.difference(&watch.path, watch.file_type, expect, &context.image.host)
            {
                context.refuse(subject, difference, "put the watched file back as it was at the dump");
            }
        }
    }

    fn rebuild(_saved: &Inotify, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        let process = context.process();
        context.create(process, 1, 0, |batch| (batch.call(Sysno::inotify_init1, args![0]), |_: &Replies| Ok(())))
    }
}

impl FileResource for Inotifies {
    fn claims(seen: &Seen) -> bool {
        seen.is_anon_inode("inotify")
    }

    /// After all files have been opened: that is nothing the program shall be told.
    fn finish(saved: &Inotify, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        let process = context.process();
        let fd = context.bring(context.id, process)?;
        let mut batch = Batch::new();
        let mut added: Vec<(CallId, &Watch)> = Vec::new();
        for watch in &saved.watches {
            let path = watch.path.as_os_str().as_bytes();
            if !batch.has_room(2, path.len() + 32) {
                numbered(context, process, &std::mem::take(&mut batch), &std::mem::take(&mut added))?;
            }
            let path = batch.string(path);
            let mask = if watch.file_type == libc::S_IFLNK { watch.mask | libc::IN_DONT_FOLLOW } else { watch.mask };
            batch.call(Sysno::ioctl, args![fd, INOTIFY_IOC_SETNEXTWD, watch.number]);
            added.push((batch.call(Sysno::inotify_add_watch, args![fd, path, mask]), watch));
        }
        numbered(context, process, &batch, &added)
    }
}

/// Adds watches, and makes sure that each has got its number.
fn numbered(
    context: &mut RebuildFile<'_>,
    process: usize,
    batch: &Batch,
    added: &[(CallId, &Watch)],
) -> Result<(), RestoreError> {
    let replies = context.run(process, batch)?;
    for (call, watch) in added {
        let number = replies.value(*call);
        if number != watch.number as u64 {
            let path = watch.path.display();
            return Err(
                context.mismatch(format!("the watch of {path} has number {number} instead of {}", watch.number))
            );
        }
    }
    Ok(())
}

/// Finds a path that leads to a watched inode.
fn find(context: &mut CollectFile<'_>, line: &Line, mounts: &str) -> Option<(PathBuf, FileStat)> {
    let is_it = |path: &Path| {
        let stat = lstat(path).ok()?;
        let (major, minor) = (nix::sys::stat::major(stat.st_dev), nix::sys::stat::minor(stat.st_dev));
        let same = stat.st_ino == line.inode && (major << 20 | minor) == u64::from(line.device);
        same.then(|| (path.to_path_buf(), stat))
    };
    if let Some(found) = by_handle(context, line, mounts).and_then(|path| is_it(&path)) {
        return Some(found);
    }
    let open = context.census.seen.iter().map(|seen| PathBuf::from(&seen.link));
    let current = context.targets.iter().filter_map(|target| target.proc().link("cwd").ok().map(PathBuf::from));
    let known: Vec<PathBuf> = open.chain(current).filter(|path| path.is_absolute()).collect();
    known.iter().flat_map(|path| [Some(path.as_path()), path.parent()]).flatten().find_map(is_it)
}

/// Opens the handle of an inode in a mount of its file system, and reads where that is.
fn by_handle(context: &mut CollectFile<'_>, line: &Line, mounts: &str) -> Option<PathBuf> {
    for mount in mount_points(mounts, line.device) {
        let Ok(mount) = std::fs::File::open(mount) else { continue };
        match context.target().file_of_handle(mount.as_fd(), line.handle_type, &line.handle) {
            Ok(file) => {
                let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
                return Some(path);
            }
            // Below another mount of it there may be a path.
            Err(error) if error.errno() == Some(Errno::ESTALE) => continue,
            Err(_) => return None,
        }
    }
    None
}

/// The places where a device is mounted, from `/proc/PID/mountinfo`.
fn mount_points(mounts: &str, device: u32) -> Vec<PathBuf> {
    let device = format!("{}:{}", device >> 20, device & 0xf_ffff);
    let place = |line: &str| {
        let words: Vec<&str> = line.split(' ').take(5).collect();
        let is_it = words.get(2) == Some(&device.as_str());
        is_it.then(|| PathBuf::from(crate::procfs::unescape(words.get(4).unwrap_or(&"").as_bytes())))
    };
    mounts.lines().filter_map(place).collect()
}

/// A watch as `fdinfo` shows it.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    number: i32,
    inode: u64,
    /// As the kernel counts: `major << 20 | minor`.
    device: u32,
    mask: u32,
    /// Of the handle; -1 where there is none.
    handle_type: i32,
    handle: Vec<u8>,
}

/// `inotify wd:1 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:7e9e0000640d1b6d`,
/// hexadecimal.
fn parse(rest: &str) -> Option<Vec<Line>> {
    let watch = |line: &str| {
        let value = |name: &str| line.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix(':'));
        let number = |name: &str| u64::from_str_radix(value(name)?, 16).ok();
        let handle = value("f_handle").unwrap_or_default().as_bytes();
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
        Some(Line {
            number: number("wd")? as i32,
            inode: number("ino")?,
            device: number("sdev")? as u32,
            mask: number("mask")? as u32,
            handle_type: number("fhandle-type").map_or(-1, |kind| kind as i32),
            handle: handle.chunks(2).map(byte).collect::<Option<Vec<u8>>>()?,
        })
    };
    rest.lines().filter(|line| line.starts_with("inotify ")).map(watch).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_fdinfo() {
        let text = "inotify wd:3 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 fhandle-type:1 \
                    f_handle:7e9e0000640d1b6d\ninotify wd:a ino:1 sdev:2d mask:fff ignored_mask:0 \n";
        let lines = parse(text).unwrap();
        assert_eq!((lines[0].number, lines[0].inode, lines[0].device), (3, 0x9e7e, 0x80_0013));
        assert_eq!((lines[0].mask, lines[0].handle_type), (0x800_afce, 1));
        assert_eq!(lines[0].handle, [0x7e, 0x9e, 0, 0, 0x64, 0x0d, 0x1b, 0x6d]);
        assert_eq!((lines[1].number, lines[1].handle_type), (10, -1));
        assert_eq!(parse("inotify wd:3 ino:x"), None);
    }

    #[test]
    fn mounts_of_a_device() {
        let mounts = "22 1 254:0 / / rw - ext4 /dev/vda rw\n\
                      30 22 0:45 / /run/a\\040b rw - tmpfs tmpfs rw\n\
                      31 22 254:0 /srv /mnt rw - ext4 /dev/vda rw\n";
        assert_eq!(mount_points(mounts, 254 << 20), [PathBuf::from("/"), PathBuf::from("/mnt")]);
        assert_eq!(mount_points(mounts, 45), [PathBuf::from("/run/a b")]);
    }
}
