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

use std::cell::RefCell;
use std::cmp::Ordering;
use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::fcntl::OFlag;
use nix::sys::stat::FileStat;
use nix::sys::statfs::{FsType, statfs};

use crate::args;
use crate::backend::{DumpOptions, RestoreOptions};
use crate::batch::{Arg, Batch, CallId, Replies, Sysno};
use crate::error::{DumpError, Refusal, RestoreError};
use crate::image::Image;
use crate::resource::sockets::{self, SocketKind};
use crate::resource::{Check, Resource, Scope, memory};
use crate::store::{ImageReader, ImageWriter};
use crate::target::{Kcmp, Pid, RemoteFd, Target, TargetError};

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
}

impl Seen {
    /// `S_IFREG`, `S_IFIFO`, ..., or 0 for anonymous inodes.
    pub fn file_type(&self) -> u32 {
        self.stat.st_mode & libc::S_IFMT
    }
    /// Whether the link is `anon_inode:[name]`.
    pub fn is_anon_inode(&self, name: &str) -> bool {
        self.link.to_str().is_some_and(|link| link.strip_prefix("anon_inode:") == Some(name))
    }
    /// For messages: `descriptor 5 (/tmp/x)`.
    pub fn subject(&self) -> String {
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
    File: super::files::Files,
    Pipe: super::pipes::Pipes,
    Fifo: super::fifos::Fifos,
    Terminal: super::terminals::Terminals,
    Epoll: super::epoll::Epolls,
    Eventfd: super::eventfd::Eventfds,
    InetSocket: super::inet_sockets::InetSockets,
    Inotify: super::inotify::Inotifies,
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
            FileKind::Terminal(terminal) => Some(&terminal.path),
            #[allow(unreachable_patterns)]
            _ => None,
        }
    }
}

/// What every kind may know of the whole tree while its files are collected.
#[derive(Debug, Default)]
pub struct Census {
    /// (process, descriptor) of the whole tree, and what it leads to.
    pub ids: HashMap<(usize, i32), FileId>,
    /// One descriptor for each file: the first it was seen by.
    pub seen: Vec<Seen>,
    /// All descriptors that lead to each file: (process, descriptor), by [`FileId`].
    pub holders: Vec<Vec<(usize, i32)>>,
    /// The files with one inode, by (device, inode): the ends of a pipe, say.
    pub inodes: HashMap<(u64, u64), Vec<FileId>>,
    /// (process, descriptor, what follows `lock:` in its fdinfo): the POSIX locks of a process are shown to it only.
    pub locks: Vec<(usize, i32, String)>,
    /// The type of file system of each device that was asked for.
    filesystems: RefCell<HashMap<u64, FsType>>,
}

impl Census {
    /// The files of the tree with the inode of this one, itself among them.
    pub fn same_inode(&self, seen: &Seen) -> &[FileId] {
        self.inodes.get(&(seen.stat.st_dev, seen.stat.st_ino)).map_or(&[], Vec::as_slice)
    }
}

/// One open file description of a frozen tree, to collect from.
pub struct CollectFile<'a> {
    pub targets: &'a mut [Box<dyn Target>],
    pub id: FileId,
    pub seen: &'a Seen,
    pub census: &'a Census,
    /// Memory that is shared with mappings: memfd and the like.
    pub objects: &'a mut memory::Objects,
    pub store: &'a mut dyn ImageWriter,
    pub options: &'a DumpOptions,
    pub refusals: &'a mut Vec<Refusal>,
    /// What the user has allowed to be lost, in words.
    pub losses: &'a mut Vec<String>,
    pub resource: &'static str,
}

impl CollectFile<'_> {
    /// Notes something that is lost because an option allows it.
    pub fn lose(&mut self, what: impl fmt::Display) {
        let (resource, pid, subject) = (self.resource, self.seen.pid, self.seen.subject());
        self.losses.push(format!("{resource}: process {pid}, {subject}: {what}"));
    }

    /// The process that the descriptor was seen in.
    pub fn target(&mut self) -> &mut dyn Target {
        &mut *self.targets[self.seen.process]
    }

    /// Runs a batch in the process that the descriptor was seen in.
    pub fn run(&mut self, batch: &Batch) -> Result<Replies, DumpError> {
        let (resource, pid) = (self.resource, self.seen.pid);
        self.target().run(batch).map_err(|source| DumpError::Target { resource, pid, source })
    }

    pub fn refuse(&mut self, why: impl Into<String>, help: impl Into<String>) {
        self.refusals.push(Refusal {
            resource: self.resource,
            pid: Some(self.seen.pid),
            subject: self.seen.subject(),
            why: why.into(),
            help: help.into(),
        });
    }

    pub fn target_error(&self, source: TargetError) -> DumpError {
        DumpError::Target { resource: self.resource, pid: self.seen.pid, source }
    }

    pub fn io_error(&self, what: &str, source: std::io::Error) -> DumpError {
        let subject = self.seen.subject();
        DumpError::Io { what: format!("{} of process {}, {subject}: {what}", self.resource, self.seen.pid), source }
    }

    /// The type of file system that it is on.
    pub fn filesystem(&self) -> Result<FsType, DumpError> {
        let device = self.seen.stat.st_dev;
        if let Some(known) = self.census.filesystems.borrow().get(&device) {
            return Ok(*known);
        }
        let path = format!("/proc/{}/fd/{}", self.seen.pid, self.seen.fd);
        let found =
            statfs(path.as_str()).map_err(|errno| self.io_error("cannot tell its file system", errno.into()))?;
        self.census.filesystems.borrow_mut().insert(device, found.filesystem_type());
        Ok(found.filesystem_type())
    }

    /// Opens what the descriptor leads to anew, by `/proc/PID/fd`: for content, without touching the offset.
    pub fn reopen(&mut self, flags: OFlag) -> Result<File, DumpError> {
        let path = format!("fd/{}", self.seen.fd);
        let file = self.target().proc().open_with(&path, flags);
        file.map_err(|source| self.io_error("cannot be opened again", source))
    }
}

/// The descriptors of a frozen tree, saved.
pub struct Collected {
    pub census: Census,
    /// By process.
    pub tables: Vec<Table>,
    /// By [`FileId`], unless something was refused.
    pub files: Vec<OpenFile>,
    /// What the user has allowed to be lost, in words.
    pub losses: Vec<String>,
}

/// Collects the tables and files of the whole tree.
pub fn collect(
    targets: &mut [Box<dyn Target>],
    objects: &mut memory::Objects,
    store: &mut dyn ImageWriter,
    options: &DumpOptions,
    refusals: &mut Vec<Refusal>,
) -> Result<Collected, DumpError> {
    let io_error = |target: &dyn Target, source| DumpError::Io {
        what: format!("descriptors of process {}", target.pid()),
        source,
    };
    let mut links = Vec::with_capacity(targets.len());
    for target in targets.iter() {
        links.push(read_links(&**target).map_err(|source| io_error(&**target, source))?);
    }
    refuse_fuse_servers(targets, &links)?;
    let mut seen = Vec::new();
    for (process, (target, links)) in targets.iter().zip(links).enumerate() {
        look(process, &**target, links, &mut seen).map_err(|source| io_error(&**target, source))?;
    }
    let (mut census, tables) = identify(targets, seen)?;
    sockets::ask_kinds(targets, &mut census)?;
    let owners = collect_owners(targets, &census)?;
    let mut files = Vec::with_capacity(census.seen.len());
    let mut losses = Vec::new();
    for (index, (seen, owner)) in census.seen.iter().zip(owners).enumerate() {
        let mut context = CollectFile {
            targets: &mut *targets,
            id: FileId(index as u32),
            seen,
            census: &census,
            objects: &mut *objects,
            store: &mut *store,
            options,
            refusals: &mut *refusals,
            losses: &mut losses,
            resource: NAME,
        };
        let Some(kind) = collect_kind(&mut context)? else {
            context.refuse(unsupported(seen), "have the program close it before the dump");
            continue;
        };
        context.resource = NAME;
        refuse_foreign_owner(owner, &mut context);
        // O_CLOEXEC is the descriptor's.
        files.push(OpenFile { flags: seen.info.flags & !libc::O_CLOEXEC, owner, kind });
    }
    Ok(Collected { census, tables, files, losses })
}

/// What a kind of file is that nobody claims.
fn unsupported(seen: &Seen) -> String {
    if let Some(socket) = seen.socket {
        return format!("{} are not supported", socket.name());
    }
    let link = seen.link.to_string_lossy();
    let name = match link.strip_prefix("anon_inode:") {
        Some("[io_uring]") => "io_uring instances",
        Some("[perf_event]") => "perf events",
        Some("[userfaultfd]") => "userfaultfd descriptors",
        Some("[fanotify]") => "fanotify groups",
        Some("[pidfd]") => "pidfds",
        Some("bpf-prog" | "bpf-map" | "bpf_link" | "btf") => "bpf objects",
        Some(_) => "descriptors of this kind",
        None if link.starts_with("pidfd:") => "pidfds",
        None if link.starts_with("socket:") => "sockets of this kind",
        None => match seen.file_type() {
            libc::S_IFCHR => "devices of this kind",
            libc::S_IFBLK => "block devices",
            libc::S_IFREG => "namespace files and others without a path",
            _ => "files of this kind",
        },
    };
    format!("{name} are not supported")
}

type Links = Vec<(RemoteFd, OsString)>;

/// All descriptors of a process that are the program's, and where they lead.
fn read_links(target: &dyn Target) -> io::Result<Links> {
    let footprint = target.footprint();
    let proc = target.proc();
    let numbers = proc.numbers("fd")?.into_iter().map(RemoteFd);
    numbers.filter(|fd| !footprint.fds.contains(fd)).map(|fd| Ok((fd, proc.link(format!("fd/{fd}"))?))).collect()
}

/// A process that serves a FUSE file system is frozen now: whoever looked at a file of it would wait for ever.
fn refuse_fuse_servers(targets: &[Box<dyn Target>], links: &[Links]) -> Result<(), DumpError> {
    let mut refusals = Vec::new();
    for (target, links) in targets.iter().zip(links) {
        for (fd, link) in links.iter().filter(|(_, link)| link == "/dev/fuse") {
            refusals.push(Refusal {
                resource: NAME,
                pid: Some(target.pid()),
                subject: format!("descriptor {fd} ({})", Path::new(link).display()),
                why: "it serves a FUSE file system, and the kernel's side of that cannot be saved".into(),
                help: "unmount the file system before the dump".into(),
            });
        }
    }
    if refusals.is_empty() { Ok(()) } else { Err(DumpError::Unsupported(refusals)) }
}

/// Reads what /proc says about every descriptor of a process.
fn look(process: usize, target: &dyn Target, links: Links, seen: &mut Vec<Seen>) -> io::Result<()> {
    let proc = target.proc();
    for (fd, link) in links {
        let info = proc.text(format!("fdinfo/{fd}"))?;
        seen.push(Seen {
            process,
            pid: target.pid(),
            fd,
            link,
            stat: proc.stat(format!("fd/{fd}"))?,
            info: FdInfo::parse(&info)
                .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("fdinfo/{fd}: {info:?}")))?,
            socket: None,
        });
    }
    Ok(())
}

/// Finds out which descriptors lead to one open file description.
fn identify(targets: &[Box<dyn Target>], all: Vec<Seen>) -> Result<(Census, Vec<Table>), DumpError> {
    let mut census = Census::default();
    let mut tables = vec![Table::default(); targets.len()];
    for seen in all {
        // Only what has one inode can be the same; offset and flags may be changed by others while we look.
        // Kept sorted by kcmp's order, so that each descriptor needs few comparisons.
        let group = census.inodes.entry((seen.stat.st_dev, seen.stat.st_ino)).or_default();
        let mut failed = None;
        let place = group.binary_search_by(|&FileId(known)| {
            let known = &census.seen[known as usize];
            let target = &targets[known.process];
            target.compare(Kcmp::File, known.fd.0 as u64, seen.pid, seen.fd.0 as u64).unwrap_or_else(|source| {
                failed = Some(DumpError::Target { resource: NAME, pid: known.pid, source });
                Ordering::Less
            })
        });
        if let Some(error) = failed {
            return Err(error);
        }
        let (process, fd) = (seen.process, seen.fd.0);
        let close_on_exec = seen.info.flags & libc::O_CLOEXEC != 0;
        let locks = seen.info.rest.lines().filter_map(|line| line.strip_prefix("lock:"));
        census.locks.extend(locks.map(|lock| (process, fd, lock.to_string())));
        let file = match place {
            Ok(known) => group[known],
            Err(place) => {
                let new = FileId(census.seen.len() as u32);
                group.insert(place, new);
                census.seen.push(seen);
                census.holders.push(Vec::new());
                new
            }
        };
        census.ids.insert((process, fd), file);
        census.holders[file.0 as usize].push((process, fd));
        tables[process].descriptors.push(Descriptor { fd, file, close_on_exec });
    }
    Ok((census, tables))
}

/// `F_GETOWN_EX` and `F_GETSIG` of every file, by [`FileId`].
fn collect_owners(targets: &mut [Box<dyn Target>], census: &Census) -> Result<Vec<Option<Owner>>, DumpError> {
    let mut owners = vec![None; census.seen.len()];
    // First seen in process order, so that those of one process stand together.
    let asked: Vec<usize> =
        (0..census.seen.len()).filter(|&file| census.seen[file].info.flags & libc::O_PATH == 0).collect();
    for files in asked.chunk_by(|&one, &next| census.seen[one].process == census.seen[next].process) {
        for files in files.chunks(crate::batch::MAX_CALLS / 2) {
            let first = &census.seen[files[0]];
            let mut batch = Batch::new();
            let calls: Vec<_> = files
                .iter()
                .map(|&file| {
                    let fd = census.seen[file].fd;
                    let owner = batch.room(8);
                    batch.call(Sysno::fcntl, args![fd, F_GETOWN_EX, owner]);
                    (file, owner, batch.call(Sysno::fcntl, args![fd, F_GETSIG]))
                })
                .collect();
            let error = |source| DumpError::Target { resource: NAME, pid: first.pid, source };
            let replies = targets[first.process].run(&batch).map_err(error)?;
            for (file, owner, signal) in calls {
                let (kind, id) = (replies.u32(owner) as i32, replies.u32(owner.after(4)) as i32);
                let signal = replies.value(signal) as i32;
                owners[file] = (id != 0 || signal != 0).then_some(Owner { kind, id, signal });
            }
        }
    }
    Ok(owners)
}

/// A signal for a process outside of the tree would reach nobody, or a stranger, after the restore.
fn refuse_foreign_owner(owner: Option<Owner>, context: &mut CollectFile<'_>) {
    let Some(owner) = owner.filter(|owner| owner.id != 0) else {
        return;
    };
    let id = Pid(owner.id);
    let inside = match owner.kind {
        F_OWNER_PGRP => {
            context.targets.iter().any(|target| target.proc().stat_line().is_ok_and(|stat| stat.pgrp == id))
        }
        _ => context.targets.iter().any(|target| target.threads().contains(&id)),
    };
    if !inside {
        let what = if owner.kind == F_OWNER_PGRP { "process group" } else { "process" };
        context.refuse(
            format!("its signals (F_SETOWN) go to {what} {id}, which is not part of the tree"),
            "dump the tree that holds both",
        );
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

/// Numbers above the program's that a skeleton may need at one time.
const SPARE_NUMBERS: u64 = 512;

/// The first process that has a file.
pub fn holder(image: &Image, file: FileId) -> Option<usize> {
    image.processes.iter().position(|process| process.descriptors.descriptors.iter().any(|held| held.file == file))
}

/// Where the files of a skeleton are so far, and what its processes have yet to be asked to do.
#[derive(Default)]
pub struct Placed {
    /// By file: the processes that have it, with a number it has there.
    places: Vec<Vec<(usize, RemoteFd)>>,
    /// By file: its numbers in the tables of the image, sorted by process.
    numbers: Vec<Vec<(usize, Descriptor)>>,
    /// By process: calls that wait, so that one round trip makes many files.
    pending: Vec<Pending>,
}

/// Looks at the results of calls that were put off: what is wrong with them.
type Verify = Box<dyn FnOnce(&Replies) -> Result<(), String>>;

#[derive(Default)]
struct Pending {
    batch: Batch,
    /// (first call, file, how to judge the results), in order.
    parts: Vec<(usize, FileId, Option<Verify>)>,
    /// Files that were made by us, to be handed over.
    given: Vec<(FileId, OwnedFd)>,
}

/// One open file description of a skeleton, to rebuild.
///
/// Files are made in spare numbers, above all of the program's, and take their own by [`stage`](RebuildFile::stage) or
/// [`create`](RebuildFile::create). Both only put their calls in line: [`run`](RebuildFile::run) has the calls that
/// wait for the same process done first.
pub struct RebuildFile<'a> {
    pub targets: &'a mut [Box<dyn Target>],
    pub image: &'a Image,
    pub reader: &'a dyn ImageReader,
    pub options: &'a RestoreOptions,
    pub id: FileId,
    /// Descriptors of the memory objects that are there already, in our own table.
    pub objects: &'a memory::Rebuilt,
    pub placed: &'a mut Placed,
    pub resource: &'static str,
}

impl RebuildFile<'_> {
    /// The process to create this file in: the first that has it.
    pub fn process(&self) -> usize {
        self.process_of(self.id)
    }

    /// The process to create another file in.
    pub fn process_of(&self, file: FileId) -> usize {
        self.placed.numbers[file.0 as usize].first().map_or(0, |&(process, _)| process)
    }

    /// This file, with its flags and owner.
    pub fn file(&self) -> &OpenFile {
        &self.image.files[self.id.0 as usize]
    }

    /// Runs a batch in a process, after what waits for it.
    pub fn run(&mut self, process: usize, batch: &Batch) -> Result<Replies, RestoreError> {
        self.flush(process)?;
        let resource = self.resource;
        let pid = self.targets[process].pid();
        self.targets[process].run(batch).map_err(|source| RestoreError::Target { resource, pid, source })
    }

    /// Makes this file with calls that can wait: no round trip of its own.
    ///
    /// `calls` adds at most `calls_needed` calls with `bytes_needed` bytes to a batch, and gives the one whose result
    /// is the new descriptor, and how to judge the results. The descriptor then takes its numbers.
    pub fn create<V>(
        &mut self,
        process: usize,
        calls_needed: usize,
        bytes_needed: usize,
        calls: impl FnOnce(&mut Batch) -> (CallId, V),
    ) -> Result<(), RestoreError>
    where
        V: FnOnce(&Replies) -> Result<(), String> + 'static,
    {
        let file = self.id;
        let numbers = self.numbers_in(file, process);
        // Few enough for one batch, and a number is known to find it by: all others take two steps.
        let at_once = !numbers.is_empty() && numbers.len() < 256;
        self.make_room(process, calls_needed + if at_once { numbers.len() + 8 } else { 2 }, bytes_needed + 64)?;
        let spare = self.targets[process].footprint().spare_fds;
        let pending = &mut self.placed.pending[process];
        let first = pending.batch.len();
        let (fd, verify) = calls(&mut pending.batch);
        let lifted = lift_to(spare, &mut pending.batch, fd);
        pending.parts.push((first, file, Some(Box::new(verify))));
        if at_once {
            let open = &self.image.files[file.0 as usize];
            add_settings(open, &mut pending.batch, lifted.into());
            for held in &numbers {
                pending.batch.call(Sysno::dup3, args![lifted, held.fd, cloexec(held)]);
            }
            add_async(open, &mut pending.batch, numbers[0].fd.into());
            pending.batch.call(Sysno::close, args![lifted]);
            self.placed.places[file.0 as usize].push((process, RemoteFd(numbers[0].fd)));
            return Ok(());
        }
        let replies = self.flush_calls(process)?.expect("calls were added");
        self.stage(file, process, replies.fd(lifted))
    }

    /// Says that a file now exists, as a descriptor of ours: `process` gets it, with its flags, its owner, and its
    /// numbers there.
    pub fn give(&mut self, file: FileId, process: usize, fd: OwnedFd) -> Result<(), RestoreError> {
        let Some(place) = self.numbers_in(file, process).first().map(|held| RemoteFd(held.fd)) else {
            let brought = self.fds_in(process, &[fd.as_fd()])?[0];
            return self.stage(file, process, brought);
        };
        self.placed.places[file.0 as usize].push((process, place));
        self.placed.pending[process].given.push((file, fd));
        if self.placed.pending[process].given.len() >= HAND_OVER {
            self.flush(process)?;
        }
        Ok(())
    }

    /// Closes a spare descriptor of a process, some time.
    pub fn close(&mut self, process: usize, fd: RemoteFd) -> Result<(), RestoreError> {
        self.make_room(process, 1, 0)?;
        let pending = &mut self.placed.pending[process];
        pending.parts.push((pending.batch.len(), self.id, None));
        pending.batch.call(Sysno::close, args![fd]);
        Ok(())
    }

    /// Adds the calls that move a new descriptor out of the way of the program's numbers. Descriptors handed to
    /// [`stage`](RebuildFile::stage) come from here.
    pub fn lift(&self, process: usize, batch: &mut Batch, fd: CallId) -> CallId {
        lift_to(self.targets[process].footprint().spare_fds, batch, fd)
    }

    /// Says that a file now exists, as a lifted descriptor of `process`: it takes its flags, its owner, and its numbers
    /// there.
    pub fn stage(&mut self, file: FileId, process: usize, fd: RemoteFd) -> Result<(), RestoreError> {
        let place = self.settle(file, process, fd)?;
        self.placed.places[file.0 as usize].push((process, place.unwrap_or(fd)));
        Ok(())
    }

    /// Puts the calls in line that give a new file its settings and its numbers; the first of these, if it has any.
    fn settle(&mut self, file: FileId, process: usize, fd: RemoteFd) -> Result<Option<RemoteFd>, RestoreError> {
        let numbers = self.numbers_in(file, process);
        self.make_room(process, 8, 64)?;
        let pending = &mut self.placed.pending[process];
        pending.parts.push((pending.batch.len(), file, None));
        add_settings(&self.image.files[file.0 as usize], &mut pending.batch, fd.into());
        for held in &numbers {
            self.make_room(process, 2, 0)?;
            let pending = &mut self.placed.pending[process];
            if pending.batch.is_empty() {
                pending.parts.push((0, file, None));
            }
            pending.batch.call(Sysno::dup3, args![fd, held.fd, cloexec(held)]);
        }
        let place = numbers.first().map(|held| RemoteFd(held.fd));
        self.make_room(process, 2, 0)?;
        let pending = &mut self.placed.pending[process];
        if pending.batch.is_empty() {
            pending.parts.push((0, file, None));
        }
        add_async(&self.image.files[file.0 as usize], &mut pending.batch, place.unwrap_or(fd).into());
        if place.is_some() {
            pending.batch.call(Sysno::close, args![fd]);
        }
        Ok(place)
    }

    pub fn is_staged(&self, file: FileId) -> bool {
        !self.placed.places[file.0 as usize].is_empty()
    }

    /// Rebuilds another file of the tree first, if it is not there yet.
    pub fn require(&mut self, file: FileId) -> Result<(), RestoreError> {
        if self.is_staged(file) {
            return Ok(());
        }
        let image = self.image;
        let mut context = RebuildFile {
            targets: &mut *self.targets,
            image,
            reader: self.reader,
            options: self.options,
            id: file,
            objects: self.objects,
            placed: &mut *self.placed,
            resource: NAME,
        };
        rebuild_kind(&image.files[file.0 as usize].kind, &mut context)
    }

    /// A descriptor for a staged file in any process; one that the program has, or a spare one.
    pub fn bring(&mut self, file: FileId, process: usize) -> Result<RemoteFd, RestoreError> {
        let places = &self.placed.places[file.0 as usize];
        if let Some(&(_, fd)) = places.iter().find(|(at, _)| *at == process) {
            return Ok(fd);
        }
        let (from, fd) = places[0];
        let ours = self.fds_out(from, &[fd])?;
        let brought = self.fds_in(process, &[ours[0].as_fd()])?[0];
        self.placed.places[file.0 as usize].push((process, brought));
        Ok(brought)
    }

    /// Copies descriptors of a process to us, after what waits for it.
    pub fn fds_out(&mut self, process: usize, fds: &[RemoteFd]) -> Result<Vec<OwnedFd>, RestoreError> {
        self.flush(process)?;
        let target = &mut self.targets[process];
        let (resource, pid) = (self.resource, target.pid());
        target.fds_out(fds).map_err(|source| RestoreError::Target { resource, pid, source })
    }

    /// Copies descriptors of ours to spare ones of a process, after what waits for it.
    pub fn fds_in(&mut self, process: usize, fds: &[BorrowedFd<'_>]) -> Result<Vec<RemoteFd>, RestoreError> {
        self.flush(process)?;
        let target = &mut self.targets[process];
        let (resource, pid) = (self.resource, target.pid());
        target.fds_in(fds).map_err(|source| RestoreError::Target { resource, pid, source })
    }

    pub fn target_error(&self, source: TargetError) -> RestoreError {
        RestoreError::Target { resource: self.resource, pid: self.targets[self.process()].pid(), source }
    }

    pub fn mismatch(&self, what: impl Into<String>) -> RestoreError {
        let pid = self.targets[self.process()].pid();
        RestoreError::Mismatch { resource: self.resource, pid, what: what.into() }
    }

    /// The numbers that a process has for a file.
    fn numbers_in(&self, file: FileId, process: usize) -> Vec<Descriptor> {
        let numbers = &self.placed.numbers[file.0 as usize];
        let first = numbers.partition_point(|&(holder, _)| holder < process);
        numbers[first..].iter().take_while(|&&(holder, _)| holder == process).map(|&(_, held)| held).collect()
    }

    /// Has the calls that wait done if so many more do not fit.
    fn make_room(&mut self, process: usize, calls: usize, bytes: usize) -> Result<(), RestoreError> {
        if !self.placed.pending[process].batch.has_room(calls, bytes) {
            self.flush_calls(process)?;
        }
        Ok(())
    }

    /// Hands over to a process what is for it, and has the calls that wait for it done.
    fn flush(&mut self, process: usize) -> Result<(), RestoreError> {
        self.flush_calls(process)?;
        let given = std::mem::take(&mut self.placed.pending[process].given);
        if given.is_empty() {
            return Ok(());
        }
        let fds: Vec<BorrowedFd<'_>> = given.iter().map(|(_, fd)| fd.as_fd()).collect();
        let target = &mut self.targets[process];
        let pid = target.pid();
        let brought = target.fds_in(&fds).map_err(|source| RestoreError::Target { resource: NAME, pid, source })?;
        for ((file, _), fd) in given.into_iter().zip(brought) {
            self.settle(file, process, fd)?;
        }
        self.flush_calls(process).map(drop)
    }

    /// Has the calls that wait for a process done.
    fn flush_calls(&mut self, process: usize) -> Result<Option<Replies>, RestoreError> {
        let pending = &mut self.placed.pending[process];
        let (batch, parts) = (std::mem::take(&mut pending.batch), std::mem::take(&mut pending.parts));
        if batch.is_empty() {
            return Ok(None);
        }
        let target = &mut self.targets[process];
        let pid = target.pid();
        let image = self.image;
        let name = |file: FileId| image.files.get(file.0 as usize).map_or(NAME, |file| file.kind.name());
        let replies = target.run(&batch).map_err(|source| {
            let file = match &source {
                TargetError::Call { index, .. } => parts.iter().rev().find(|(first, ..)| first <= index),
                _ => None,
            };
            match (file, source) {
                (Some(&(_, file, _)), TargetError::Call { call, errno, .. }) => RestoreError::Io {
                    what: format!("{} of process {pid}, {}: {call} failed", name(file), describe(image, process, file)),
                    source: errno.into(),
                },
                (_, source) => RestoreError::Target { resource: NAME, pid, source },
            }
        })?;
        for (_, file, verify) in parts {
            if let Some(Err(what)) = verify.map(|verify| verify(&replies)) {
                let what = format!("{}: {what}", describe(image, process, file));
                return Err(RestoreError::Mismatch { resource: name(file), pid, what });
            }
        }
        Ok(Some(replies))
    }
}

/// A file as a message names it: `descriptor 5 (/tmp/x)`.
fn describe(image: &Image, process: usize, file: FileId) -> String {
    let table = &image.processes[process].descriptors.descriptors;
    let number = table.iter().find(|held| held.file == file).map(|held| format!("descriptor {}", held.fd));
    let number = number.unwrap_or_else(|| format!("file {}", file.0));
    match image.files.get(file.0 as usize).and_then(|file| file.kind.path()) {
        Some(path) => format!("{number} ({})", path.display()),
        None => number,
    }
}

fn cloexec(held: &Descriptor) -> i32 {
    if held.close_on_exec { libc::O_CLOEXEC } else { 0 }
}

fn lift_to(spare: i32, batch: &mut Batch, fd: CallId) -> CallId {
    let lifted = batch.call(Sysno::fcntl, args![fd, libc::F_DUPFD_CLOEXEC, spare]);
    batch.call(Sysno::close, args![fd]);
    lifted
}

/// Adds what every kind of file has: owner, signal, status flags. At most 3 calls with 64 bytes.
fn add_settings(open: &OpenFile, batch: &mut Batch, fd: Arg) {
    if open.flags & libc::O_PATH != 0 {
        return;
    }
    if let Some(owner) = open.owner {
        let value = batch.bytes(&[owner.kind.to_ne_bytes(), owner.id.to_ne_bytes()].concat());
        batch.call(Sysno::fcntl, &[fd, F_SETSIG.into(), owner.signal.into()]);
        if owner.id != 0 {
            batch.call(Sysno::fcntl, &[fd, F_SETOWN_EX.into(), value.into()]);
        }
    }
    batch.call(Sysno::fcntl, &[fd, libc::F_SETFL.into(), (open.flags & !libc::O_ASYNC).into()]);
}

/// Signal-driven I/O keeps the number that it was switched on by, and tells it to the program (`si_fd`). At most 1 call.
fn add_async(open: &OpenFile, batch: &mut Batch, fd: Arg) {
    if open.flags & libc::O_ASYNC != 0 && open.flags & libc::O_PATH == 0 {
        batch.call(Sysno::fcntl, &[fd, libc::F_SETFL.into(), open.flags.into()]);
    }
}

/// Rebuilds every file and fills every table.
pub fn rebuild(
    targets: &mut [Box<dyn Target>],
    reader: &dyn ImageReader,
    objects: &memory::Rebuilt,
    options: &RestoreOptions,
) -> Result<(), RestoreError> {
    let image = reader.image();
    let mut placed = Placed {
        places: vec![Vec::new(); image.files.len()],
        numbers: vec![Vec::new(); image.files.len()],
        pending: Vec::new(),
    };
    placed.pending.resize_with(targets.len(), Pending::default);
    for (index, process) in image.processes.iter().enumerate() {
        for held in &process.descriptors.descriptors {
            placed.numbers[held.file.0 as usize].push((index, *held));
        }
    }
    let mut context =
        RebuildFile { targets, image, reader, options, id: FileId(0), objects, placed: &mut placed, resource: NAME };
    for process in 0..image.processes.len() {
        make_way(&mut context, process)?;
    }
    for index in 0..image.files.len() {
        context.require(FileId(index as u32))?;
    }
    share(&mut context)?;
    for (index, file) in image.files.iter().enumerate() {
        context.id = FileId(index as u32);
        finish_kind(&file.kind, &mut context)?;
    }
    context.resource = NAME;
    for process in 0..image.processes.len() {
        let spare = context.targets[process].footprint().spare_fds;
        let batch = close_all(&context, process, spare, i32::MAX);
        context.run(process, &batch)?;
    }
    Ok(())
}

/// Empties the table of a skeleton, and allows it all the numbers that are needed. The limits of the image come later.
fn make_way(context: &mut RebuildFile<'_>, process: usize) -> Result<(), RestoreError> {
    let footprint = context.targets[process].footprint();
    let table = &context.image.processes[process].descriptors.descriptors;
    if let Some(held) = table.iter().find(|held| footprint.fds.contains(&RemoteFd(held.fd))) {
        let pid = context.targets[process].pid();
        let what = format!("descriptor {} of the program is in use by ckpt itself", held.fd);
        return Err(RestoreError::Mismatch { resource: NAME, pid, what });
    }
    let mut batch = close_all(context, process, 0, i32::MAX);
    let needed = footprint.spare_fds as u64 + SPARE_NUMBERS;
    let (soft, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
        .map_err(|errno| RestoreError::Io { what: "the limit of descriptors".into(), source: errno.into() })?;
    if soft < needed {
        let limit = batch.words(&[hard, hard]);
        batch.call(Sysno::prlimit64, args![0, libc::RLIMIT_NOFILE, limit, 0]);
    }
    context.run(process, &batch).map(drop)
}

/// Calls that close all descriptors of a skeleton in a range, but those that ckpt needs there.
fn close_all(context: &RebuildFile<'_>, process: usize, first: i32, last: i32) -> Batch {
    let mut ours: Vec<i32> = context.targets[process].footprint().fds.iter().map(|fd| fd.0).collect();
    ours.sort_unstable();
    let mut batch = Batch::new();
    let mut next = first;
    for fd in ours.into_iter().filter(|fd| (first..=last).contains(fd)) {
        if next < fd {
            batch.call(Sysno::close_range, args![next, fd - 1, 0]);
        }
        next = fd + 1;
    }
    batch.call(Sysno::close_range, args![next, last, 0]);
    batch
}

/// Most descriptors handed over at once: a message of a Unix socket may carry 253 (`SCM_MAX_FD`).
const HAND_OVER: usize = 200;

/// Fills the tables with files that were made in another process: what `fork` and passing descriptors shared.
fn share(context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
    let files = 0..context.image.files.len();
    let shared: Vec<usize> = files.filter(|&file| !missing_in(context, file).is_empty()).collect();
    for files in shared.chunks(HAND_OVER) {
        let mut ours: HashMap<usize, OwnedFd> = HashMap::new();
        let mut homes: HashMap<usize, Vec<(usize, RemoteFd)>> = HashMap::new();
        let mut wanted: Vec<Vec<usize>> = vec![Vec::new(); context.targets.len()];
        for &file in files {
            let (home, fd) = context.placed.places[file][0];
            homes.entry(home).or_default().push((file, fd));
            for process in missing_in(context, file) {
                wanted[process].push(file);
            }
        }
        for (home, list) in homes {
            let numbers: Vec<RemoteFd> = list.iter().map(|&(_, fd)| fd).collect();
            let out = context.fds_out(home, &numbers)?;
            ours.extend(list.into_iter().map(|(file, _)| file).zip(out));
        }
        for (process, files) in wanted.into_iter().enumerate().filter(|(_, files)| !files.is_empty()) {
            let handed: Vec<BorrowedFd<'_>> = files.iter().map(|file| ours[file].as_fd()).collect();
            let brought = context.fds_in(process, &handed)?;
            for (file, fd) in files.into_iter().zip(brought) {
                place_shared(context, file, process, fd)?;
            }
        }
    }
    for process in 0..context.targets.len() {
        context.flush(process)?;
    }
    Ok(())
}

/// The processes whose table should have a file and has not.
fn missing_in(context: &RebuildFile<'_>, file: usize) -> Vec<usize> {
    let mut processes: Vec<usize> = context.placed.numbers[file].iter().map(|&(process, _)| process).collect();
    processes.dedup();
    processes.retain(|&process| {
        let spare = context.targets[process].footprint().spare_fds;
        !context.placed.places[file].iter().any(|&(at, fd)| at == process && fd.0 < spare)
    });
    processes
}

/// Gives a descriptor that was handed over its numbers.
fn place_shared(context: &mut RebuildFile<'_>, file: usize, process: usize, fd: RemoteFd) -> Result<(), RestoreError> {
    let id = FileId(file as u32);
    let numbers = context.numbers_in(id, process);
    for held in &numbers {
        context.make_room(process, 2, 0)?;
        let pending = &mut context.placed.pending[process];
        pending.parts.push((pending.batch.len(), id, None));
        pending.batch.call(Sysno::dup3, args![fd, held.fd, cloexec(held)]);
    }
    context.placed.pending[process].batch.call(Sysno::close, args![fd]);
    let places = &mut context.placed.places[file];
    // A spare one that was brought before is closed with all the others.
    places.retain(|(at, _)| *at != process);
    places.push((process, RemoteFd(numbers[0].fd)));
    Ok(())
}

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
