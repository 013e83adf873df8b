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

use std::cmp::Ordering;
use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use nix::fcntl::OFlag;
use nix::sys::stat::FileStat;

use crate::args;
use crate::backend::{DumpOptions, RestoreOptions};
use crate::batch::{Batch, CallId, Replies, Sysno};
use crate::error::{DumpError, Refusal, RestoreError};
use crate::image::Image;
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
    File: super::files::Files,
}

/// What every kind may know of the whole tree while its files are collected.
#[derive(Debug, Default)]
pub struct Census {
    /// (process, descriptor) of the whole tree, and what it leads to.
    pub ids: HashMap<(usize, i32), FileId>,
    /// One descriptor for each file: the first it was seen by.
    pub seen: Vec<Seen>,
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
    pub resource: &'static str,
}

impl CollectFile<'_> {
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

    /// Opens what the descriptor leads to anew, by `/proc/PID/fd`: for content, without touching the offset.
    pub fn reopen(&mut self, flags: OFlag) -> Result<File, DumpError> {
        let path = format!("fd/{}", self.seen.fd);
        let file = self.target().proc().open_with(&path, flags);
        file.map_err(|source| self.io_error("cannot be opened again", source))
    }
}

/// Collects the tables and files of the whole tree.
pub fn collect(
    targets: &mut [Box<dyn Target>],
    objects: &mut memory::Objects,
    store: &mut dyn ImageWriter,
    options: &DumpOptions,
    refusals: &mut Vec<Refusal>,
) -> Result<(Vec<Table>, Vec<OpenFile>), DumpError> {
    let mut seen = Vec::new();
    for (process, target) in targets.iter().enumerate() {
        look(process, &**target, &mut seen)
            .map_err(|source| DumpError::Io { what: format!("descriptors of process {}", target.pid()), source })?;
    }
    let (census, tables) = identify(targets, seen)?;
    let mut files = Vec::with_capacity(census.seen.len());
    for (index, seen) in census.seen.iter().enumerate() {
        let mut context = CollectFile {
            targets: &mut *targets,
            id: FileId(index as u32),
            seen,
            census: &census,
            objects: &mut *objects,
            store: &mut *store,
            options,
            refusals: &mut *refusals,
            resource: NAME,
        };
        match collect_kind(&mut context)? {
            Some(kind) => {
                let owner = collect_owner(&mut context)?;
                // O_CLOEXEC is the descriptor's, and O_LARGEFILE is always on.
                let flags = seen.info.flags & !libc::O_CLOEXEC;
                files.push(OpenFile { flags, owner, kind });
            }
            None => context.refuse("this kind of file is not supported", "have the program close it before the dump"),
        }
    }
    Ok((tables, files))
}

/// Reads what /proc says about every descriptor of a process.
fn look(process: usize, target: &dyn Target, seen: &mut Vec<Seen>) -> io::Result<()> {
    let footprint = target.footprint();
    let proc = target.proc();
    for number in proc.numbers("fd")? {
        let fd = RemoteFd(number);
        if footprint.fds.contains(&fd) {
            continue;
        }
        let path = format!("fd/{number}");
        let info = proc.text(format!("fdinfo/{number}"))?;
        seen.push(Seen {
            process,
            pid: target.pid(),
            fd,
            link: proc.link(&path)?,
            stat: proc.stat(&path)?,
            info: FdInfo::parse(&info)
                .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("fdinfo/{number}: {info:?}")))?,
        });
    }
    Ok(())
}

/// Finds out which descriptors lead to one open file description.
fn identify(targets: &[Box<dyn Target>], all: Vec<Seen>) -> Result<(Census, Vec<Table>), DumpError> {
    // Only what looks the same can be the same.
    let mut groups: HashMap<(u64, u64, i64, i32), Vec<FileId>> = HashMap::new();
    let mut census = Census::default();
    let mut tables = vec![Table::default(); targets.len()];
    for seen in all {
        let flags = seen.info.flags & !libc::O_CLOEXEC;
        let group = groups.entry((seen.stat.st_dev, seen.stat.st_ino, seen.info.position, flags)).or_default();
        // Kept sorted by kcmp's order, so that each descriptor needs few comparisons.
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
        let file = match place {
            Ok(known) => group[known],
            Err(place) => {
                let new = FileId(census.seen.len() as u32);
                group.insert(place, new);
                census.seen.push(seen.clone());
                new
            }
        };
        census.ids.insert((seen.process, seen.fd.0), file);
        let close_on_exec = seen.info.flags & libc::O_CLOEXEC != 0;
        tables[seen.process].descriptors.push(Descriptor { fd: seen.fd.0, file, close_on_exec });
    }
    Ok((census, tables))
}

/// `F_GETOWN_EX` and `F_GETSIG`.
fn collect_owner(context: &mut CollectFile<'_>) -> Result<Option<Owner>, DumpError> {
    if context.seen.info.flags & libc::O_PATH != 0 {
        return Ok(None);
    }
    let mut batch = Batch::new();
    let owner = batch.room(8);
    batch.call(Sysno::fcntl, args![context.seen.fd, F_GETOWN_EX, owner]);
    let signal = batch.call(Sysno::fcntl, args![context.seen.fd, F_GETSIG]);
    let replies = context.run(&batch)?;
    let (kind, id) = (replies.u32(owner) as i32, replies.u32(owner.after(4)) as i32);
    let signal = replies.value(signal) as i32;
    Ok((id != 0 || signal != 0).then_some(Owner { kind, id, signal }))
}

const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;
const F_SETOWN_EX: i32 = 15;
const F_GETOWN_EX: i32 = 16;

/// Checks every file of an image.
pub fn check(image: &Image, context: &mut Check<'_>) {
    for (index, file) in image.files.iter().enumerate() {
        context.pid = holder(image, FileId(index as u32)).map(|process| image.processes[process].task.pid);
        check_kind(&file.kind, context);
    }
    context.pid = None;
}

/// The first process that has a file.
pub fn holder(image: &Image, file: FileId) -> Option<usize> {
    image.processes.iter().position(|process| process.descriptors.descriptors.iter().any(|held| held.file == file))
}

/// Where the files of a skeleton are so far.
#[derive(Debug, Default)]
pub struct Placed {
    /// For each file, the processes that have it, with a number it has there.
    places: HashMap<FileId, Vec<(usize, RemoteFd)>>,
    /// For each file, the first process that has it in its table.
    holders: HashMap<FileId, usize>,
}

/// One open file description of a skeleton, to rebuild.
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
        self.placed.holders.get(&file).copied().unwrap_or(0)
    }

    /// This file, with its flags and owner.
    pub fn file(&self) -> &OpenFile {
        &self.image.files[self.id.0 as usize]
    }

    pub fn run(&mut self, process: usize, batch: &Batch) -> Result<Replies, RestoreError> {
        let resource = self.resource;
        let pid = self.targets[process].pid();
        self.targets[process].run(batch).map_err(|source| RestoreError::Target { resource, pid, source })
    }

    /// Adds the calls that move a new descriptor out of the way of the program's numbers. Descriptors handed to
    /// [`stage`](RebuildFile::stage) come from here.
    pub fn lift(&self, process: usize, batch: &mut Batch, fd: CallId) -> CallId {
        let spare = self.targets[process].footprint().spare_fds;
        let lifted = batch.call(Sysno::fcntl, args![fd, libc::F_DUPFD_CLOEXEC, spare]);
        batch.call(Sysno::close, args![fd]);
        lifted
    }

    /// Says that a file now exists, as a lifted descriptor of `process`: it takes its numbers there at once.
    pub fn stage(&mut self, file: FileId, process: usize, fd: RemoteFd) -> Result<(), RestoreError> {
        let open = &self.image.files[file.0 as usize];
        let mut batch = Batch::new();
        if open.flags & libc::O_PATH == 0 {
            if let Some(owner) = open.owner {
                let value = batch.bytes(&[owner.kind.to_ne_bytes(), owner.id.to_ne_bytes()].concat());
                batch.call(Sysno::fcntl, args![fd, F_SETSIG, owner.signal]);
                batch.call(Sysno::fcntl, args![fd, F_SETOWN_EX, value]);
            }
            batch.call(Sysno::fcntl, args![fd, libc::F_SETFL, open.flags]);
        }
        let mut place = None;
        for held in &self.image.processes[process].descriptors.descriptors {
            if held.file == file {
                batch.call(Sysno::dup3, args![fd, held.fd, if held.close_on_exec { libc::O_CLOEXEC } else { 0 }]);
                place.get_or_insert(RemoteFd(held.fd));
                if !batch.has_room(8, 64) {
                    self.run(process, &std::mem::take(&mut batch))?;
                }
            }
        }
        if place.is_some() {
            batch.call(Sysno::close, args![fd]);
        }
        self.run(process, &batch)?;
        self.placed.places.entry(file).or_default().push((process, place.unwrap_or(fd)));
        Ok(())
    }

    pub fn is_staged(&self, file: FileId) -> bool {
        self.placed.places.contains_key(&file)
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
        let places = &self.placed.places[&file];
        if let Some(&(_, fd)) = places.iter().find(|(at, _)| *at == process) {
            return Ok(fd);
        }
        let (from, fd) = places[0];
        let resource = self.resource;
        let pid = self.targets[from].pid();
        let error = |source| RestoreError::Target { resource, pid, source };
        let ours = self.targets[from].fds_out(&[fd]).map_err(error)?;
        let brought = self.targets[process].fds_in(&[ours[0].as_fd()]).map_err(error)?[0];
        self.placed.places.get_mut(&file).unwrap().push((process, brought));
        Ok(brought)
    }

    pub fn target_error(&self, source: TargetError) -> RestoreError {
        RestoreError::Target { resource: self.resource, pid: self.targets[self.process()].pid(), source }
    }

    pub fn mismatch(&self, what: impl Into<String>) -> RestoreError {
        let pid = self.targets[self.process()].pid();
        RestoreError::Mismatch { resource: self.resource, pid, what: what.into() }
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
    let mut placed = Placed::default();
    for (index, process) in image.processes.iter().enumerate() {
        for held in &process.descriptors.descriptors {
            placed.holders.entry(held.file).or_insert(index);
        }
    }
    let mut context =
        RebuildFile { targets, image, reader, options, id: FileId(0), objects, placed: &mut placed, resource: NAME };
    for index in 0..image.files.len() {
        context.require(FileId(index as u32))?;
    }
    // What other processes share with the one it was made in.
    for (process, saved) in image.processes.iter().enumerate() {
        share(&mut context, process, &saved.descriptors)?;
    }
    for (index, file) in image.files.iter().enumerate() {
        context.id = FileId(index as u32);
        finish_kind(&file.kind, &mut context)?;
    }
    for process in 0..image.processes.len() {
        let spare = context.targets[process].footprint().spare_fds;
        let mut batch = Batch::new();
        batch.call(Sysno::close_range, args![spare, u32::MAX, 0]);
        context.resource = NAME;
        context.run(process, &batch)?;
    }
    Ok(())
}

/// Fills the table of one process with files made in others.
fn share(context: &mut RebuildFile<'_>, process: usize, table: &Table) -> Result<(), RestoreError> {
    let mut wanted: Vec<FileId> = table
        .descriptors
        .iter()
        .map(|held| held.file)
        .filter(|file| {
            !context.placed.places[file].iter().any(|(at, fd)| *at == process && !is_spare(context, process, *fd))
        })
        .collect();
    wanted.sort_unstable();
    wanted.dedup();
    let mut batch = Batch::new();
    for file in wanted {
        let fd = context.bring(file, process)?;
        let mut first = None;
        for held in table.descriptors.iter().filter(|held| held.file == file) {
            if !batch.has_room(2, 0) {
                context.run(process, &std::mem::take(&mut batch))?;
            }
            batch.call(Sysno::dup3, args![fd, held.fd, if held.close_on_exec { libc::O_CLOEXEC } else { 0 }]);
            first.get_or_insert(RemoteFd(held.fd));
        }
        batch.call(Sysno::close, args![fd]);
        let places = context.placed.places.get_mut(&file).unwrap();
        places.retain(|(at, _)| *at != process);
        places.extend(first.map(|fd| (process, fd)));
    }
    context.run(process, &batch)?;
    Ok(())
}

fn is_spare(context: &RebuildFile<'_>, process: usize, fd: RemoteFd) -> bool {
    fd.0 >= context.targets[process].footprint().spare_fds
}
