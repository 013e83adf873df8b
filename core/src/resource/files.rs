//! Regular files and directories, deleted files with their content, `O_PATH` descriptors.
//!
//! A file is saved by the path that leads to it, with its [`Identity`]; its content stays where it is. A file that no
//! name leads to any more is different: its content goes into the image, once for each inode, however many descriptors
//! and mappings have it ([`DeletedFiles`]).

mod deleted;

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat};
use nix::sys::stat::{FileStat, Mode};
use nix::sys::statfs::FsType;
use nix::unistd::{UnlinkatFlags, linkat};

pub(crate) use deleted::attribute_names;
pub use deleted::{
    DeletedFile, DeletedFiles, DeletedId, ExtendedAttribute, RebuiltDeleted, check_deleted, guard_deleted,
    rebuild_deleted,
};

use crate::args;
use crate::batch::{Replies, Slot, Sysno};
use crate::error::{DumpError, RestoreError};
use crate::image::HostFacts;
use crate::resource::descriptors::{CollectFile, FileResource, OfFile, RebuildFile, Seen};
use crate::resource::memfds::Memfds;
use crate::resource::{Check, Resource};

/// The section name.
pub const NAME: &str = "files";

/// An open file or directory, or an `O_PATH` descriptor of anything that has a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    pub place: Place,
    /// Where the next `read` or `write` is, in bytes; for a directory, what `lseek` gave.
    pub position: i64,
}

impl File {
    /// The path that leads to it, for messages.
    pub fn path(&self) -> Option<&Path> {
        match &self.place {
            Place::Path { path, .. } | Place::Proc { path } => Some(path),
            Place::Deleted { .. } => None,
        }
    }
}

/// Where a file is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// By name.
    Path {
        path: PathBuf,
        /// `S_IFREG`, `S_IFDIR`, ...
        file_type: u32,
        identity: Identity,
        /// The name that it was opened by, which was deleted: links in `/proc` show it.
        former: Option<PathBuf>,
    },
    /// In `/proc/PID` of a process of the tree, or in the part of `/proc` that is about no process: there is nothing
    /// to identify it by, and opening it again gives the same.
    Proc { path: PathBuf },
    /// Nowhere.
    Deleted { id: DeletedId },
}

/// Which file a path led to, so that a restore can tell whether it still does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    pub device: u64,
    pub inode: u64,
    /// Bytes.
    pub size: u64,
    /// Nanoseconds since 1970.
    pub modified: i64,
}

/// What of a file must be as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// The content: pages that are not in the image are read from it.
    SameContent,
    /// The file itself, no shorter. To a program with an open file, a restore is like a long sleep: others may have
    /// written meanwhile, log files have grown. But what it had read or written must not have vanished.
    SameFile,
    /// That the path leads to something of this type: directories, and what is only pointed at (`O_PATH`).
    Present,
}

impl Identity {
    pub fn of(stat: &FileStat) -> Identity {
        Identity {
            device: stat.st_dev,
            inode: stat.st_ino,
            size: stat.st_size as u64,
            modified: nanoseconds(stat.st_mtime, stat.st_mtime_nsec),
        }
    }

    /// Whether `path` still leads to this file: `None`, or what is the matter with it, to be read after the path.
    ///
    /// Inode numbers are compared where they mean the same as at the dump: since the same boot, or on a real device of
    /// the same machine. Elsewhere (another machine, a memory file system after a reboot) there are only size and time
    /// of change to go by, so that a copy must have kept its time or be newer.
    pub fn difference(&self, path: &Path, file_type: u32, expect: Expect, host: &HostFacts) -> Option<String> {
        let now = match nix::sys::stat::lstat(path) {
            Ok(link) if link.st_mode & libc::S_IFMT == libc::S_IFLNK && file_type != libc::S_IFLNK => {
                nix::sys::stat::stat(path)
            }
            other => other,
        };
        match now {
            Ok(now) => {
                let found = now.st_mode & libc::S_IFMT;
                self.difference_to(&Identity::of(&now), found, file_type, expect, inodes_comparable(host, self.device))
            }
            Err(Errno::ENOENT | Errno::ENOTDIR) => Some("it is gone".into()),
            Err(errno) => Some(format!("it cannot be looked at: {errno}")),
        }
    }

    fn difference_to(
        &self,
        now: &Identity,
        found: u32,
        file_type: u32,
        expect: Expect,
        comparable: bool,
    ) -> Option<String> {
        if found != file_type {
            return Some(format!("it was {}, and now there is {}", type_name(file_type), type_name(found)));
        }
        if expect == Expect::Present {
            return None;
        }
        if comparable && (self.device, self.inode) != (now.device, now.inode) {
            return Some("it was replaced by another file since the dump".into());
        }
        if now.size < self.size {
            return Some(format!("it is shorter than at the dump: {} bytes then, {} now", self.size, now.size));
        }
        if expect == Expect::SameContent && now.size != self.size {
            return Some(format!("it is longer than at the dump: {} bytes then, {} now", self.size, now.size));
        }
        if expect == Expect::SameContent && now.modified != self.modified {
            return Some("it was written to since the dump".into());
        }
        if !comparable && now.modified < self.modified {
            return Some("it is older than the one at the dump".into());
        }
        None
    }
}

fn nanoseconds(seconds: i64, nanoseconds: i64) -> i64 {
    seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)
}

fn type_name(file_type: u32) -> &'static str {
    match file_type {
        libc::S_IFREG => "a regular file",
        libc::S_IFDIR => "a directory",
        libc::S_IFLNK => "a symbolic link",
        libc::S_IFIFO => "a FIFO",
        libc::S_IFSOCK => "a socket",
        libc::S_IFCHR => "a character device",
        libc::S_IFBLK => "a block device",
        _ => "something without a file type",
    }
}

/// The two ids that [`HostFacts`] keeps of this host: boot and machine.
pub fn host_ids() -> (String, String) {
    static IDS: OnceLock<(String, String)> = OnceLock::new();
    let read = |path| std::fs::read_to_string(path).unwrap_or_default().trim().to_string();
    IDS.get_or_init(|| (read("/proc/sys/kernel/random/boot_id"), read("/etc/machine-id"))).clone()
}

/// Whether device and inode numbers of the dump can be compared with those of now.
fn inodes_comparable(host: &HostFacts, device: u64) -> bool {
    let (boot, machine) = host_ids();
    let same_boot = !boot.is_empty() && boot == host.boot_id;
    let same_machine = !machine.is_empty() && machine == host.machine_id;
    // Devices with major number 0 (tmpfs, overlay, btrfs, NFS) are numbered as they are mounted.
    same_boot || (same_machine && libc::major(device) != 0)
}

/// Open status flags that opening again may ask for. Never `O_CREAT` or `O_TRUNC`, whatever an image says.
const REOPEN_FLAGS: i32 = libc::O_ACCMODE
    | libc::O_APPEND
    | libc::O_NONBLOCK
    | libc::O_SYNC
    | libc::O_DSYNC
    | libc::O_DIRECT
    | libc::O_DIRECTORY
    | libc::O_NOFOLLOW
    | libc::O_NOATIME
    | libc::O_PATH;

/// `__O_TMPFILE`, without the `O_DIRECTORY` that belongs to `O_TMPFILE`: `fdinfo` shows it of an open file.
const TMPFILE_BIT: i32 = libc::O_TMPFILE & !libc::O_DIRECTORY;

/// The flags to open a file with that had these.
pub fn reopen_flags(flags: i32) -> i32 {
    let mut flags = flags;
    if flags & TMPFILE_BIT != 0 {
        flags &= !libc::O_TMPFILE;
    }
    (flags & REOPEN_FLAGS) | libc::O_CLOEXEC | libc::O_NOCTTY
}

/// Regular files and directories, deleted files with their content, O_PATH descriptors.
pub struct Files;

impl Resource for Files {
    const NAME: &'static str = NAME;
    type Scope = OfFile;
    type Saved = File;

    fn collect(context: &mut CollectFile<'_>) -> Result<File, DumpError> {
        let seen = context.seen;
        let proc_link = format!("fd/{}", seen.fd);
        let magic = context.filesystem()?;
        if let Some(name) = stateful_filesystem(magic) {
            context.refuse(format!("files of {name} are not supported"), "have the program close it before the dump");
        }
        let place = match locate(seen.link.as_os_str(), &seen.stat) {
            Located::Path(path) if magic == nix::sys::statfs::PROC_SUPER_MAGIC => {
                if let Some(pid) = proc_pid(&path)
                    && !context.targets.iter().any(|target| target.pid().0 == pid)
                {
                    context.refuse(
                        format!("it is about process {pid}, which is not part of the tree"),
                        "have the program close it before the dump",
                    );
                }
                Place::Proc { path }
            }
            Located::Path(path) => {
                let former = (path.as_os_str() != seen.link).then(|| without_deleted(&seen.link)).flatten();
                Place::Path {
                    path,
                    file_type: seen.file_type(),
                    identity: Identity::of(&seen.stat),
                    former: former.map(PathBuf::from),
                }
            }
            Located::Deleted if seen.file_type() == libc::S_IFREG => {
                let target = &context.targets[seen.process];
                let added = context.objects.deleted.add(target.proc(), &proc_link, &seen.stat, &seen.link);
                match added.map_err(|source| context.io_error("cannot be opened to read it", source))? {
                    Ok(id) => Place::Deleted { id },
                    Err(why) => {
                        context.refuse(why, "have the program close it before the dump");
                        Place::Proc { path: PathBuf::new() }
                    }
                }
            }
            Located::Deleted => {
                let kind = type_name(seen.file_type());
                context.refuse(format!("{kind} that was deleted cannot be brought back"), "");
                Place::Proc { path: PathBuf::new() }
            }
            Located::Elsewhere(why) => {
                context.refuse(why, "");
                Place::Proc { path: PathBuf::new() }
            }
        };
        Ok(File { place, position: seen.info.position })
    }

    fn check(saved: &File, context: &mut Check<'_>) {
        match &saved.place {
            Place::Path { path, file_type, identity, .. } => {
                if !path.is_absolute() {
                    return context.refuse("", format!("{} is not a full path", path.display()), USE_ANOTHER_COPY);
                }
                let expect = if *file_type == libc::S_IFREG { Expect::SameFile } else { Expect::Present };
                if let Some(difference) = identity.difference(path, *file_type, expect, &context.image.host) {
                    context.refuse(path.display().to_string(), difference, "put the file back as it was at the dump");
                }
            }
            Place::Proc { path } => {
                if !path.starts_with("/proc") {
                    context.refuse("", format!("{} is not in /proc", path.display()), USE_ANOTHER_COPY);
                }
            }
            Place::Deleted { id } => check_deleted(*id, context),
        }
    }

    fn rebuild(saved: &File, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        let process = context.process();
        let flags = reopen_flags(context.file().flags);
        let position = saved.position;
        match &saved.place {
            Place::Path { path, former: Some(former), identity, file_type: libc::S_IFREG } => {
                if let Some(file) = open_by_former_name(path, former, identity, flags, position) {
                    return context.give(context.id, process, file);
                }
                let (identity, comparable) = (*identity, inodes_comparable(&context.image.host, identity.device));
                open(context, process, path.as_os_str(), flags, position, move |now| {
                    identity.difference_to(&now.identity, now.file_type, libc::S_IFREG, Expect::SameFile, comparable)
                })
            }
            Place::Path { path, file_type, identity, .. } => {
                let comparable = inodes_comparable(&context.image.host, identity.device);
                let expect = if *file_type == libc::S_IFREG { Expect::SameFile } else { Expect::Present };
                let (file_type, identity) = (*file_type, *identity);
                open(context, process, path.as_os_str(), flags, position, move |now| {
                    identity.difference_to(&now.identity, now.file_type, file_type, expect, comparable)
                })
            }
            Place::Proc { path } => open(context, process, path.as_os_str(), flags, position, |_| None),
            Place::Deleted { id } => {
                let deleted = &context.objects.deleted.files[id.0 as usize];
                // What O_TMPFILE gave keeps that flag: only the file as it was made has it.
                let as_made = context.file().flags & (libc::O_ACCMODE | TMPFILE_BIT) == libc::O_RDWR | TMPFILE_BIT;
                let opened = match context.objects.deleted.unfollowed.get(&context.id) {
                    Some(opened) => same(opened, position),
                    None if as_made => same(deleted, position),
                    None => reopen(deleted.as_fd(), flags, position),
                };
                let file = opened.map_err(|errno| RestoreError::Io {
                    what: "a deleted file could not be opened again".into(),
                    source: errno.into(),
                })?;
                context.give(context.id, process, file)
            }
        }
    }
}

/// The very open file description.
fn same(file: &OwnedFd, position: i64) -> nix::Result<OwnedFd> {
    nix::unistd::lseek(file, position, nix::unistd::Whence::SeekSet)?;
    file.try_clone().map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EMFILE)))
}

/// Opens a file by a name that it had, if nothing else has it now. `None` if that is not possible: any other name will
/// do as well.
fn open_by_former_name(path: &Path, former: &Path, identity: &Identity, flags: i32, position: i64) -> Option<OwnedFd> {
    let parent = open_directory(former.parent()?).ok()?;
    let there = nix::fcntl::open(path, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty()).ok()?;
    if Identity::of(&nix::sys::stat::fstat(&there).ok()?).inode != identity.inode {
        return None;
    }
    let flags = OFlag::from_bits_retain(flags);
    let named = named_for_a_moment(&parent, former.file_name()?, &there, &[flags]).ok()??.pop()?;
    if position != 0 && !flags.contains(OFlag::O_PATH) {
        nix::unistd::lseek(&named, position, nix::unistd::Whence::SeekSet).ok()?;
    }
    Some(named)
}

/// A new open file description of what a descriptor of ours leads to: a deleted file, a memory file.
pub fn reopen(file: BorrowedFd<'_>, flags: i32, position: i64) -> nix::Result<OwnedFd> {
    // The name in /proc is a symbolic link.
    let flags = OFlag::from_bits_retain(flags & !libc::O_NOFOLLOW);
    let opened = nix::fcntl::open(format!("/proc/self/fd/{}", file.as_raw_fd()).as_str(), flags, Mode::empty())?;
    if position != 0 && !flags.contains(OFlag::O_PATH) {
        nix::unistd::lseek(&opened, position, nix::unistd::Whence::SeekSet)?;
    }
    Ok(opened)
}

const USE_ANOTHER_COPY: &str = "the image is inconsistent; use another copy of it";

/// Opens a file in a skeleton, looks whether it is the right one, and puts its offset where it was.
pub fn open(
    context: &mut RebuildFile<'_>,
    process: usize,
    path: &OsStr,
    flags: i32,
    position: i64,
    differs: impl FnOnce(&Opened) -> Option<String> + 'static,
) -> Result<(), RestoreError> {
    let bytes = path.len() + STAT_BYTES;
    let seekable = position != 0 && flags & libc::O_PATH == 0;
    context.create(process, 4, bytes, |batch| {
        let path = batch.string(path.as_bytes());
        let fd = batch.call(Sysno::openat, args![libc::AT_FDCWD, path, flags]);
        let stat = batch.room(STAT_BYTES);
        let empty = batch.string(b"");
        batch.call(Sysno::newfstatat, args![fd, empty, stat, libc::AT_EMPTY_PATH]);
        let seek = seekable.then(|| batch.call(Sysno::lseek, args![fd, position, libc::SEEK_SET]));
        let verify = move |replies: &Replies| {
            if let Some(difference) = differs(&read_stat(replies, stat)) {
                return Err(difference);
            }
            match seek.map(|seek| replies.value(seek) as i64) {
                Some(now) if now != position => Err(format!("its offset is {now} and should be {position}")),
                _ => Ok(()),
            }
        };
        (fd, verify)
    })
}

/// Bytes of `struct stat`.
const STAT_BYTES: usize = 144;

/// What a skeleton has opened.
pub struct Opened {
    pub identity: Identity,
    /// `S_IFREG`, `S_IFDIR`, ...
    pub file_type: u32,
    /// Of a device.
    pub device_number: u64,
}

/// Reads the kernel's `struct stat` of x86-64.
fn read_stat(replies: &Replies, stat: Slot) -> Opened {
    let words = replies.words(stat);
    let modified = nanoseconds(words[11] as i64, words[12] as i64);
    Opened {
        identity: Identity { device: words[0], inode: words[1], size: words[6], modified },
        file_type: words[3] as u32 & libc::S_IFMT,
        device_number: words[5],
    }
}

impl FileResource for Files {
    fn claims(seen: &Seen) -> bool {
        // O_PATH is only a place, whatever is there.
        let place_only = seen.info.flags & libc::O_PATH != 0;
        seen.has_path()
            && !Memfds::claims(seen)
            && (place_only || matches!(seen.file_type(), libc::S_IFREG | libc::S_IFDIR))
    }

    fn finish(_saved: &File, _context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        // All was done when it was opened.
        Ok(())
    }
}

/// Where a link of `/proc` leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Located {
    /// By this path, seen from ckpt.
    Path(PathBuf),
    /// No name is left.
    Deleted,
    /// It has a name that ckpt does not find or must not use: why.
    Elsewhere(String),
}

/// Finds the file of a link of `/proc` (`fd/N`, `map_files/A-B`, `cwd`, `exe`) by its identity and not by its text:
/// a file may really be called `x (deleted)`.
pub fn locate(link: &OsStr, stat: &FileStat) -> Located {
    let is_it = |path: &Path| {
        nix::sys::stat::lstat(path).is_ok_and(|found| (found.st_dev, found.st_ino) == (stat.st_dev, stat.st_ino))
    };
    if link.as_bytes().starts_with(b"(unreachable)") {
        return Located::Elsewhere("it is on a mount that ckpt does not see".into());
    }
    let path = Path::new(link);
    if is_it(path) {
        return Located::Path(path.to_path_buf());
    }
    let old = without_deleted(link);
    // The kernel counts no link to a removed directory, on some file systems one to itself.
    let is_directory = stat.st_mode & libc::S_IFMT == libc::S_IFDIR;
    if stat.st_nlink == 0 || (is_directory && old.is_some()) {
        return Located::Deleted;
    }
    let Some(old) = old else {
        return Located::Elsewhere("its path leads to another file now: something is mounted over it".into());
    };
    // Deleted by this name, but there is another: linked into place, most often in the same directory.
    let old = Path::new(old);
    let directory = old.parent().unwrap_or(Path::new("/"));
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        use std::os::unix::fs::DirEntryExt;
        if entry.ino() == stat.st_ino && is_it(&entry.path()) {
            return Located::Path(entry.path());
        }
    }
    Located::Elsewhere(format!(
        "it was deleted by this name, but has {} other name(s), in another directory that is not known",
        stat.st_nlink
    ))
}

/// The path before ` (deleted)`.
pub(crate) fn without_deleted(link: &OsStr) -> Option<&OsStr> {
    link.as_bytes().strip_suffix(b" (deleted)").map(OsStr::from_bytes)
}

/// The process that a path in /proc is about.
fn proc_pid(path: &Path) -> Option<i32> {
    let mut parts = path.strip_prefix("/proc").ok()?.iter();
    parts.next()?.to_str()?.parse().ok()
}

/// File systems whose open files are more than a path and an offset.
fn stateful_filesystem(magic: FsType) -> Option<&'static str> {
    // linux/magic.h
    Some(match magic.0 as u64 & 0xffff_ffff {
        0x1980_0202 => "mqueue (POSIX message queues)",
        0x6e73_6673 => "nsfs (namespaces)",
        0x5049_4446 => "pidfs (pidfds)",
        0x7472_6163 => "tracefs",
        0x6462_6720 => "debugfs",
        0xcafe_4a11 => "bpf",
        0xf97c_ff8c => "selinuxfs",
        0x5345_434d => "secretmem",
        _ => return None,
    })
}

fn open_directory(path: &Path) -> nix::Result<OwnedFd> {
    nix::fcntl::open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
}

/// Opens a file, once with each of `flags`, by a name that it gets for this moment, so that links in `/proc` show that name
/// as deleted. `None` if the name is in use: it is left alone.
fn named_for_a_moment(
    parent: &OwnedFd,
    name: &OsStr,
    file: &OwnedFd,
    flags: &[OFlag],
) -> nix::Result<Option<Vec<OwnedFd>>> {
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    if linkat(AT_FDCWD, link.as_str(), parent, name, AtFlags::AT_SYMLINK_FOLLOW).is_err() {
        return Ok(None);
    }
    // Not with O_NOFOLLOW where it is not asked for: the file would keep it among its flags.
    let open = |&flags| openat(parent, name, flags | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK, Mode::empty());
    let named: nix::Result<Vec<OwnedFd>> = flags.iter().map(open).collect();
    let ours = nix::sys::stat::fstat(file)?;
    let is_ours = |stat: FileStat| (ours.st_dev, ours.st_ino) == (stat.st_dev, stat.st_ino);
    // Somebody may have put another file there meanwhile: that one is not removed.
    if nix::sys::stat::fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW).is_ok_and(is_ours) {
        nix::unistd::unlinkat(parent, name, UnlinkatFlags::NoRemoveDir)?;
    }
    let named = named?;
    for opened in &named {
        if !is_ours(nix::sys::stat::fstat(opened)?) {
            return Ok(None);
        }
    }
    Ok(Some(named))
}

#[cfg(test)]
mod tests {
    use std::fs::File as StdFile;

    use super::*;

    const REGULAR: u32 = libc::S_IFREG;

    fn identity(inode: u64, size: u64, modified: i64) -> Identity {
        Identity { device: 1, inode, size, modified }
    }

    #[test]
    fn what_is_still_the_same_file() {
        use Expect::{Present, SameContent, SameFile};
        let saved = identity(7, 100, 1000);
        let rows = [
            // now, expected, comparable inodes -> the same?
            (identity(7, 100, 1000), SameContent, true, true),
            (identity(7, 100, 1001), SameContent, true, false),
            (identity(7, 101, 1000), SameContent, true, false),
            (identity(8, 100, 1000), SameContent, true, false),
            (identity(8, 100, 1000), SameContent, false, true),
            (identity(7, 101, 1001), SameFile, true, true),
            (identity(7, 99, 1001), SameFile, true, false),
            (identity(8, 101, 1001), SameFile, true, false),
            (identity(8, 101, 1001), SameFile, false, true),
            (identity(8, 101, 999), SameFile, false, false),
            // utimes may set any time; the inode says that it is the same
            (identity(7, 101, 999), SameFile, true, true),
            (identity(8, 1, 1), Present, true, true),
        ];
        for (now, expect, comparable, same) in rows {
            let difference = saved.difference_to(&now, REGULAR, REGULAR, expect, comparable);
            assert_eq!(difference.is_none(), same, "{now:?} {expect:?} {comparable}: {difference:?}");
        }
        let difference = saved.difference_to(&saved, libc::S_IFIFO, REGULAR, Present, true);
        assert_eq!(difference.as_deref(), Some("it was a regular file, and now there is a FIFO"));
    }

    #[test]
    fn no_image_can_have_a_file_made_or_cut() {
        let flags = reopen_flags(!TMPFILE_BIT);
        assert_eq!(flags & (libc::O_CREAT | libc::O_TRUNC | libc::O_EXCL | TMPFILE_BIT | libc::O_ASYNC), 0);
        assert_eq!(reopen_flags(libc::O_TMPFILE | libc::O_RDWR) & (TMPFILE_BIT | libc::O_DIRECTORY), 0);
        assert_eq!(reopen_flags(libc::O_DIRECTORY) & libc::O_DIRECTORY, libc::O_DIRECTORY);
        assert_eq!(reopen_flags(0) & (libc::O_NOCTTY | libc::O_CLOEXEC), libc::O_NOCTTY | libc::O_CLOEXEC);
    }

    #[test]
    fn a_file_is_found_by_identity_and_not_by_text() {
        let directory = std::env::temp_dir().join(format!("ckpt-files-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let locate = |file: &StdFile| {
            let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
            locate(link.as_os_str(), &nix::sys::stat::fstat(file).unwrap())
        };
        let create = |name: &str| {
            let path = directory.join(name);
            (StdFile::create(&path).unwrap(), path)
        };
        let (odd, odd_path) = create("x (deleted)");
        assert_eq!(locate(&odd), Located::Path(odd_path.clone()));
        let (plain, plain_path) = create("x");
        std::fs::remove_file(&plain_path).unwrap();
        assert_eq!(locate(&plain), Located::Deleted);
        let (linked, linked_path) = create("linked");
        std::fs::hard_link(&linked_path, directory.join("other")).unwrap();
        std::fs::remove_file(&linked_path).unwrap();
        assert_eq!(locate(&linked), Located::Path(directory.join("other")));
        std::fs::create_dir(directory.join("inner")).unwrap();
        std::fs::rename(directory.join("other"), directory.join("inner/other")).unwrap();
        assert!(matches!(locate(&linked), Located::Elsewhere(_)));
        std::fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn processes_in_paths() {
        assert_eq!(proc_pid(Path::new("/proc/12/status")), Some(12));
        assert_eq!(proc_pid(Path::new("/proc/sys/kernel/12")), None);
        assert_eq!(proc_pid(Path::new("/proc")), None);
    }
}
