//! Descriptor tables, and open file descriptions of every kind.
//!
//! A descriptor is a number in one process; what it leads to, an open file description, may be shared by several
//! numbers and several processes (`dup`, `fork`, `SCM_RIGHTS`), and keeps the offset and the status flags. The saved form
//! keeps the two apart: a [`Table`] for each process, and one list of [`OpenFile`]s for the tree. Sharing is found with
//! `kcmp`, among descriptors that look the same.
//!
//! Rebuilding: every file is created once, in the first process that has it, by its kind's `rebuild`, which stages it;
//! then the table of every process is filled; then each kind's `finish` does what needs all files in place (data in
//! pipes and queues, epoll sets).

mod collect;
mod rebuild;

use std::ffi::OsString;
use std::path::Path;

use nix::sys::stat::FileStat;

pub use collect::{Census, CollectFile, Collected, collect, look_at};
use rebuild::SPARE_NUMBERS;
pub use rebuild::{Placed, RebuildFile, holder, rebuild};

use crate::error::{DumpError, RestoreError};
use crate::image::Image;
use crate::resource::sockets::SocketKind;
use crate::resource::{Check, Resource, Scope};
use crate::target::{Pid, RemoteFd};

/// The section name of the tables; each kind of file has its own.
pub const NAME: &str = "descriptors";

/// Index of an [`OpenFile`] in [`Image::files`](crate::image::Image::files).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub u32);

/// The descriptor table of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Sorted by number.
    pub descriptors: Vec<Descriptor>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    pub fd: i32,
    pub file: FileId,
    pub close_on_exec: bool,
}

/// An open file description.
#[derive(Clone, Debug, PartialEq)]
pub struct OpenFile {
    /// Status flags and access mode, as `F_GETFL` gives them.
    pub flags: i32,
    /// Who gets SIGIO (`F_SETOWN`, `F_SETSIG`), if anyone.
    pub owner: Option<Owner>,
    pub kind: FileKind,
}

/// The owner of a file for signals (`F_GETOWN_EX`, `F_GETSIG`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// `F_OWNER_TID`, `F_OWNER_PID` or `F_OWNER_PGRP`.
    pub kind: i32,
    pub id: i32,
    /// 0 for SIGIO.
    pub signal: i32,
}

/// A kind of file: a [`Resource`] of scope [`OfFile`] that knows its own.
pub trait FileResource: Resource<Scope = OfFile> {
    /// Whether this descriptor is of this kind. The first kind of the list that says so gets it.
    fn claims(seen: &Seen) -> bool;

    /// What can be done only when all files of the tree are in place.
    fn finish(saved: &Self::Saved, context: &mut RebuildFile<'_>) -> Result<(), RestoreError>;
}

/// What is known of a descriptor before its kind is asked.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Index of the process it was first seen in.
    pub process: usize,
    pub pid: Pid,
    pub fd: RemoteFd,
    /// `readlink` of `/proc/PID/fd/N`.
    pub link: OsString,
    /// `stat` of what it leads to.
    pub stat: FileStat,
    /// `/proc/PID/fdinfo/N`.
    pub info: FdInfo,
    /// What kind of socket it is, if it is one.
    pub socket: Option<SocketKind>,
    /// No descriptor of the program leads to it: it is in the queue of a Unix socket, and `fd` is held for us.
    pub in_queue: bool,
}

impl Seen {
    /// `S_IFREG`, `S_IFIFO`, ..., or 0 for anonymous inodes.
    pub fn file_type(&self) -> u32 {
        self.stat.st_mode & libc::S_IFMT
    }
    /// Whether the link is a path, of a mount that we see or of another.
    pub fn has_path(&self) -> bool {
        self.link.as_encoded_bytes().starts_with(b"/") || self.link.as_encoded_bytes().starts_with(b"(unreachable)")
    }
    /// Whether the link is `anon_inode:[name]`.
    pub fn is_anon_inode(&self, name: &str) -> bool {
        self.link.to_str().is_some_and(|link| link.strip_prefix("anon_inode:") == Some(name))
    }
    /// For messages: `descriptor 5 (/tmp/x)`.
    pub fn subject(&self) -> String {
        if self.in_queue {
            return format!("a file in the queue of a Unix socket ({})", Path::new(&self.link).display());
        }
        format!("descriptor {} ({})", self.fd, Path::new(&self.link).display())
    }
}

/// `/proc/PID/fdinfo/N` (proc_pid_fdinfo(5)).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FdInfo {
    pub position: i64,
    /// As shown: the status flags, and `O_CLOEXEC`, which belongs to the descriptor.
    pub flags: i32,
    pub mount: i32,
    pub inode: u64,
    /// The other lines: what the kind shows, and `lock:` lines.
    pub rest: String,
}

impl FdInfo {
    pub fn parse(text: &str) -> Option<FdInfo> {
        let mut info = FdInfo::default();
        for line in text.lines() {
            match line.split_once(':') {
                Some(("pos", value)) => info.position = value.trim().parse().ok()?,
                Some(("flags", value)) => info.flags = i32::from_str_radix(value.trim(), 8).ok()?,
                Some(("mnt_id", value)) => info.mount = value.trim().parse().ok()?,
                Some(("ino", value)) => info.inode = value.trim().parse().ok()?,
                _ => {
                    info.rest.push_str(line);
                    info.rest.push('\n');
                }
            }
        }
        Some(info)
    }

    /// The text after `name:` among the other lines.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.rest.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
    }
}

/// A resource that is there once for each open file description.
pub struct OfFile;
impl Scope for OfFile {
    type Collect<'a> = CollectFile<'a>;
    type Rebuild<'a> = RebuildFile<'a>;
}

/// Declares the kinds of files: one line a kind, asked in this order.
macro_rules! file_kinds {
    ($($variant:ident: $resource:ty),* $(,)?) => {
        /// What an open file description leads to.
        #[derive(Clone, Debug, PartialEq)]
        pub enum FileKind {
            $($variant(<$resource as Resource>::Saved),)*
        }

        /// The section names of the kinds.
        pub const KIND_NAMES: &[&str] = &[NAME, $(<$resource as Resource>::NAME,)*];

        impl FileKind {
            /// The section name of its kind.
            pub fn name(&self) -> &'static str {
                match self { $(FileKind::$variant(_) => <$resource as Resource>::NAME,)* }
            }
        }

        fn collect_kind(context: &mut CollectFile<'_>) -> Result<Option<FileKind>, DumpError> {
            $(if <$resource as FileResource>::claims(context.seen) {
                context.resource = <$resource as Resource>::NAME;
                return Ok(Some(FileKind::$variant(<$resource as Resource>::collect(context)?)));
            })*
            Ok(None)
        }

        fn check_kind(kind: &FileKind, context: &mut Check<'_>) {
            match kind { $(FileKind::$variant(saved) => context.check::<$resource>(saved),)* }
        }

        fn rebuild_kind(kind: &FileKind, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
            context.resource = kind.name();
            match kind { $(FileKind::$variant(saved) => <$resource as Resource>::rebuild(saved, context),)* }
        }

        fn finish_kind(kind: &FileKind, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
            context.resource = kind.name();
            match kind { $(FileKind::$variant(saved) => <$resource as FileResource>::finish(saved, context),)* }
        }
    };
}

file_kinds! {
    Device: super::devices::Devices,
    Memfd: super::memfds::Memfds,
    Mqueue: super::mqueues::Mqueues,
    File: super::files::Files,
    Pipe: super::pipes::Pipes,
    Fifo: super::fifos::Fifos,
    Terminal: super::terminals::Terminals,
    Epoll: super::epoll::Epolls,
    Eventfd: super::eventfd::Eventfds,
    InetSocket: super::inet_sockets::InetSockets,
    Inotify: super::inotify::Inotifies,
    Pidfd: super::pidfds::Pidfds,
    Signalfd: super::signalfd::Signalfds,
    Timerfd: super::timerfd::Timerfds,
    UnixSocket: super::unix_sockets::UnixSockets,
}

impl FileKind {
    /// The path that leads to it, for messages.
    pub fn path(&self) -> Option<&Path> {
        match self {
            FileKind::Device(device) => Some(&device.path),
            FileKind::File(file) => file.path(),
            FileKind::Fifo(fifo) => Some(&fifo.path),
            FileKind::Terminal(terminal) => Some(terminal.path()),
            #[allow(unreachable_patterns)]
            _ => None,
        }
    }
}

const F_OWNER_PGRP: i32 = 2;
const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;
const F_SETOWN_EX: i32 = 15;
const F_GETOWN_EX: i32 = 16;

/// Checks every file of an image.
pub fn check(image: &Image, context: &mut Check<'_>) {
    let mut holders: Vec<Option<(Pid, i32)>> = vec![None; image.files.len()];
    let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard);
    for process in &image.processes {
        context.pid = Some(process.task.pid);
        context.resource = NAME;
        let mut before = -1;
        for held in &process.descriptors.descriptors {
            let subject = format!("descriptor {}", held.fd);
            match holders.get_mut(held.file.0 as usize) {
                Some(holder) if held.fd > before => _ = holder.get_or_insert((process.task.pid, held.fd)),
                Some(_) => context.refuse(subject, "the table is not sorted", INCONSISTENT),
                None => context.refuse(subject, "it leads to no file of the image", INCONSISTENT),
            }
            before = held.fd;
        }
        if before as i64 + SPARE_NUMBERS as i64 > limit as i64 {
            context.refuse(
                format!("descriptor {before}"),
                format!("only descriptors up to {limit} are allowed here"),
                format!("raise the limit: ulimit -Hn {}", before as i64 + SPARE_NUMBERS as i64 + 1),
            );
        }
    }
    for (file, holder) in image.files.iter().zip(holders) {
        context.pid = holder.map(|(pid, _)| pid);
        check_kind(&file.kind, context);
    }
    context.pid = None;
}

const INCONSISTENT: &str = "the image is inconsistent; use another copy of it";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fdinfo() {
        let text =
            "pos:\t12\nflags:\t02100002\nmnt_id:\t27\nino:\t99\nlock:\t1: FLOCK  ADVISORY  WRITE 9 00:13:99 0 EOF\n";
        let info = FdInfo::parse(text).unwrap();
        assert_eq!((info.position, info.mount, info.inode), (12, 27, 99));
        assert_eq!(info.flags, libc::O_RDWR | libc::O_CLOEXEC | 0o100000);
        assert_eq!(info.field("lock"), Some("1: FLOCK  ADVISORY  WRITE 9 00:13:99 0 EOF"));
        assert_eq!(info.field("eventfd-count"), None);
    }

    #[test]
    fn fdinfo_that_is_none() {
        for text in ["pos:\tx\n", "flags:\t9\n", "ino:\t-1\n"] {
            assert_eq!(FdInfo::parse(text), None, "{text:?}");
        }
    }
}
