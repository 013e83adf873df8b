//! Collecting: what the descriptors of a frozen tree lead to, and who shares what.

use std::cell::RefCell;
use std::cmp::Ordering;
use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io;
use std::path::Path;

use nix::fcntl::OFlag;
use nix::sys::statfs::{FsType, statfs};

use super::{
    Descriptor, F_GETOWN_EX, F_GETSIG, F_OWNER_PGRP, FdInfo, FileId, NAME, OpenFile, Owner, Seen, Table, collect_kind,
};
use crate::args;
use crate::backend::DumpOptions;
use crate::batch::{Batch, Replies, Sysno};
use crate::error::{DumpError, Refusal};
use crate::image::Zombie;
use crate::resource::strangers::Strangers;
use crate::resource::unix_sockets::{Queued, passed};
use crate::resource::{inet_sockets, memory};
use crate::store::ImageWriter;
use crate::target::{Kcmp, Pid, RemoteFd, Target, TargetError};

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
    /// Who else has the pipes and FIFOs.
    pub strangers: Strangers,
    /// What is in the queues of Unix sockets that have passed descriptors in them.
    pub queues: HashMap<FileId, Vec<Queued>>,
    /// The Unix sockets that wait to be accepted, by inode, and where, once one was asked for.
    pub waiting: RefCell<Option<HashMap<u32, FileId>>>,
    /// The ends of TCP connections, once one was asked for.
    pub ends: RefCell<Option<inet_sockets::connections::Ends>>,
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
    /// The processes of the tree that have ended.
    pub zombies: &'a [Zombie],
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
    zombies: &[Zombie],
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
    let (census, tables) = identify(targets, seen)?;
    let mut collected = Collected { census, tables, files: Vec::new(), losses: Vec::new() };
    let mut held = passed::Held::none(targets.len());
    let result = collect_files(targets, zombies, objects, store, options, refusals, &mut collected, &mut held);
    held.release(targets)?;
    result.map(|()| collected)
}

/// Collects the files themselves. What the targets hold for it afterwards is to be released in any case.
#[allow(clippy::too_many_arguments)]
fn collect_files(
    targets: &mut [Box<dyn Target>],
    zombies: &[Zombie],
    objects: &mut memory::Objects,
    store: &mut dyn ImageWriter,
    options: &DumpOptions,
    refusals: &mut Vec<Refusal>,
    collected: &mut Collected,
    held: &mut passed::Held,
) -> Result<(), DumpError> {
    let Collected { census, files, losses, .. } = collected;
    passed::find(targets, census, held, refusals)?;
    let owners = collect_owners(targets, census)?;
    for (index, (seen, owner)) in census.seen.iter().zip(owners).enumerate() {
        let mut context = CollectFile {
            targets: &mut *targets,
            zombies,
            id: FileId(index as u32),
            seen,
            census,
            objects: &mut *objects,
            store: &mut *store,
            options,
            refusals: &mut *refusals,
            losses: &mut *losses,
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
    Ok(())
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
        Some("bpf-prog" | "bpf-map" | "bpf_link" | "btf") => "bpf objects",
        Some(_) => "descriptors of this kind",
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
    for (fd, link) in links {
        seen.push(look_at(process, target, fd, link)?);
    }
    Ok(())
}

/// The same of one descriptor.
pub fn look_at(process: usize, target: &dyn Target, fd: RemoteFd, link: OsString) -> io::Result<Seen> {
    let proc = target.proc();
    let info = proc.text(format!("fdinfo/{fd}"))?;
    Ok(Seen {
        process,
        pid: target.pid(),
        fd,
        link,
        stat: proc.stat(format!("fd/{fd}"))?,
        info: FdInfo::parse(&info)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("fdinfo/{fd}: {info:?}")))?,
        socket: None,
        in_queue: false,
    })
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
