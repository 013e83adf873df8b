//! Pseudoterminals of which both sides are in the tree (pty(7)): what an emulator, `script` or `tmux` has.
//!
//! A master is opened anew until the kernel gives it the old number, which programs keep (`ttyname`, utmp): one that is in
//! use is refused. A session gets its controlling terminal when it begins, before its leader has children, who inherit it:
//! see [`take_controlling`], which restorers call. Data on its way from one side to the other can only be read for good, and
//! is refused. Not kept, as they cannot be seen: an unfinished line that the kernel edits (`ICANON`), output that was stopped
//! (`^S`), and what packet mode has not told yet.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use nix::errno::Errno;

use super::{DEV_TTY, PTMX, TCGETS2, TCSETS2, TERMIOS2, Terminal, Terminals, number};
use crate::args;
use crate::batch::{Batch, Sysno};
use crate::error::{DumpError, Refusal, RestoreError};
use crate::image::Image;
use crate::resource::descriptors::{
    Census, CollectFile, FdInfo, FileId, FileKind, FileResource, OpenFile, RebuildFile, Seen,
};
use crate::resource::threads::Answers;
use crate::resource::{Check, Resource};
use crate::target::{Pid, RemoteFd, Target, TargetError};

/// The master side, with what the kernel keeps for both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Master {
    /// As it was opened: `/dev/ptmx`.
    pub path: PathBuf,
    /// Of the other side: `/dev/pts/3`.
    pub number: u32,
    /// `struct termios2` of the slave.
    pub settings: [u8; TERMIOS2],
    /// `struct winsize`: rows, columns, and their size in pixels.
    pub size: [u16; 4],
    /// `TIOCSPTLCK`: the other side cannot be opened.
    pub locked: bool,
    /// `TIOCPKT`.
    pub packets: bool,
    /// The session that it controls, and its foreground process group; 0 for none.
    pub session: Pid,
    pub foreground: Pid,
    /// Owner, group and mode of `/dev/pts/3`.
    pub owner: (u32, u32, u32),
}

/// The other side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slave {
    /// `/dev/pts/3`, or `/dev/tty`.
    pub path: PathBuf,
    pub master: FileId,
}

const TIOCSCTTY: u32 = 0x540e;
const TIOCGPGRP: u32 = 0x540f;
const TIOCSPGRP: u32 = 0x5410;
const TIOCGWINSZ: u32 = 0x5413;
const TIOCSWINSZ: u32 = 0x5414;
const FIONREAD: u32 = 0x541b;
const TIOCPKT: u32 = 0x5420;
const TIOCGETD: u32 = 0x5424;
const TIOCGSID: u32 = 0x5429;
const TIOCGPTPEER: u32 = 0x5441;
const TIOCGPTN: u32 = 0x8004_5430;
const TIOCSPTLCK: u32 = 0x4004_5431;
const TIOCGDEV: u32 = 0x8004_5432;
const TIOCGPKT: u32 = 0x8004_5438;
const TIOCGPTLCK: u32 = 0x8004_5439;
const TIOCGEXCL: u32 = 0x8004_5440;

/// Majors of the slaves of pseudoterminals.
const SLAVES: std::ops::RangeInclusive<u32> = 136..=143;

/// The number of the other side that a master's fdinfo has.
fn index(info: &FdInfo) -> Option<u32> {
    info.field("tty-index")?.parse().ok()
}

/// Whether a slave, not opened as `/dev/tty`, has its master in the tree.
pub(super) fn is_of_tree(census: &Census, seen: &Seen) -> bool {
    let (major, minor) = number(seen);
    SLAVES.contains(&major) && master_of(census, (major - 136) << 8 | minor).is_some()
}

fn master_of(census: &Census, wanted: u32) -> Option<FileId> {
    let is_it = |other: &Seen| Terminals::claims(other) && number(other) == PTMX && index(&other.info) == Some(wanted);
    census.seen.iter().position(is_it).map(|id| FileId(id as u32))
}

pub(super) fn collect_master(context: &mut CollectFile<'_>) -> Result<Terminal, DumpError> {
    let seen = context.seen;
    let mut batch = Batch::new();
    let mut get = |request: u32, room: usize| {
        let slot = batch.room(room);
        (batch.try_call(Sysno::ioctl, args![seen.fd, request, slot]), slot)
    };
    let (numbered, locked, packets, exclusive) =
        (get(TIOCGPTN, 4), get(TIOCGPTLCK, 4), get(TIOCGPKT, 4), get(TIOCGEXCL, 4));
    let (settings, size, session, foreground) =
        (get(TCGETS2, TERMIOS2), get(TIOCGWINSZ, 8), get(TIOCGSID, 4), get(TIOCGPGRP, 4));
    let (output, discipline) = (get(FIONREAD, 4), get(TIOCGETD, 4));
    let replies = context.run(&batch)?;
    for (asked, _) in [numbered, locked, packets, exclusive, settings, size, output, discipline] {
        replies.result(asked).map_err(|errno| context.io_error("asking a pseudoterminal", errno.into()))?;
    }
    // Without a session there is none to tell.
    let pid = |(asked, slot)| Pid(if replies.result(asked).is_ok() { replies.u32(slot) as i32 } else { 0 });
    let number = replies.u32(numbered.1);
    let path = PathBuf::from(format!("/dev/pts/{number}"));
    let owner = match nix::sys::stat::stat(&path) {
        Ok(stat) if (libc::major(stat.st_rdev), libc::minor(stat.st_rdev)) == (136 + (number >> 8), number & 0xff) => {
            (stat.st_uid, stat.st_gid, stat.st_mode & 0o7777)
        }
        _ => {
            let why = format!("{} is not its other side: it is of another devpts", path.display());
            context.refuse(why, "run ckpt where the program's devpts is mounted at /dev/pts");
            (0, 0, 0)
        }
    };
    let pending = replies.u32(output.1);
    if pending != 0 {
        let why = format!("{pending} bytes were written to its terminal and not read, and cannot be copied");
        context.refuse(why, "dump it again in a moment, when they have been read");
    }
    if replies.u32(exclusive.1) != 0 || replies.u32(discipline.1) != 0 {
        context.refuse("it is in exclusive mode, or has a line discipline of its own", "have the program end that");
    }
    let bytes = replies.bytes(size.1);
    let saved = Master {
        path: PathBuf::from(&seen.link),
        number,
        settings: replies.bytes(settings.1).try_into().unwrap_or([0; TERMIOS2]),
        size: std::array::from_fn(|at| u16::from_ne_bytes([bytes[2 * at], bytes[2 * at + 1]])),
        locked: replies.u32(locked.1) != 0,
        packets: replies.u32(packets.1) != 0,
        session: pid(session),
        foreground: pid(foreground),
        owner,
    };
    if context.seen.link.as_bytes().ends_with(b"(deleted)") {
        context.refuse("it was opened by a name that is gone", "have the program open it again");
    }
    if saved.session.0 != 0 && !context.targets.iter().any(|target| target.pid() == saved.session) {
        let why = format!("it controls session {}, whose leader is not part of the tree", saved.session);
        context.refuse(why, "dump a tree that has both");
    }
    Ok(Terminal::Master(saved))
}

/// The other side of a master of the tree, if it is that.
pub(super) fn collect_slave(context: &mut CollectFile<'_>) -> Result<Option<Terminal>, DumpError> {
    let seen = context.seen;
    let mut device = number(seen);
    let by_dev_tty = device == DEV_TTY;
    let mut batch = Batch::new();
    let slot = batch.room(4);
    let asked = batch.try_call(Sysno::ioctl, args![seen.fd, TIOCGDEV, slot]);
    let waiting = batch.room(4);
    let counted = batch.try_call(Sysno::ioctl, args![seen.fd, FIONREAD, waiting]);
    let replies = context.run(&batch)?;
    if by_dev_tty && replies.result(asked).is_ok() {
        // As new_encode_dev of the kernel writes it.
        let encoded = replies.u32(slot);
        device = (encoded >> 8 & 0xfff, encoded & 0xff | encoded >> 12 & 0xfff00);
    }
    if !SLAVES.contains(&device.0) {
        return Ok(None);
    }
    let wanted = (device.0 - 136) << 8 | device.1;
    let Some(master) = master_of(context.census, wanted) else { return Ok(None) };
    if replies.result(counted) == Err(Errno::EIO) {
        context.refuse("its terminal was closed", "have the program close it before the dump");
    }
    let pending = if replies.result(counted).is_ok() { replies.u32(waiting) } else { 0 };
    if pending != 0 {
        let why = format!("{pending} bytes were typed and not read, and cannot be copied");
        context.refuse(why, "dump it again in a moment, when they have been read");
    }
    Ok(Some(Terminal::Slave(Slave { path: PathBuf::from(&seen.link), master })))
}

/// Refuses what controlling terminals could not come back.
pub fn examine(
    targets: &[Box<dyn Target>],
    answers: &[&[Answers]],
    image_files: &[OpenFile],
    refusals: &mut Vec<Refusal>,
) {
    let masters: Vec<&Master> = image_files
        .iter()
        .filter_map(|file| match &file.kind {
            FileKind::Terminal(Terminal::Master(master)) => Some(master),
            _ => None,
        })
        .collect();
    for (target, answers) in targets.iter().zip(answers) {
        let Some(stat) = answers.first().map(|answers| &answers.stat) else { continue };
        let has_one = stat.tty_nr != 0;
        let leader_is_in_tree = targets.iter().any(|other| other.pid() == stat.session);
        let controlled = masters.iter().any(|master| master.session == stat.session);
        let (why, help) = match (has_one, leader_is_in_tree, controlled) {
            (true, true, false) => (
                "its session is in the tree, and its controlling terminal is not",
                "dump the program that has the terminal's other side as well",
            ),
            (false, true, true) => (
                "it has no controlling terminal, though its session has",
                "have it begin a session of its own (setsid)",
            ),
            _ => continue,
        };
        refusals.push(Refusal {
            resource: Terminals::NAME,
            pid: Some(target.pid()),
            subject: String::new(),
            why: why.into(),
            help: help.into(),
        });
    }
}

pub(super) fn check_master(saved: &Master, context: &mut Check<'_>) {
    let path = format!("/dev/pts/{}", saved.number);
    if std::fs::symlink_metadata(&path).is_ok() {
        let help = "close that terminal, or restore where devpts is mounted anew (unshare --mount; mount -t devpts -o \
                    newinstance,ptmxmode=0666 devpts /dev/pts)";
        context.refuse(path, "it is in use", help);
    }
}

pub(super) fn check_slave(saved: &Slave, context: &mut Check<'_>) {
    let master = context.image.files.get(saved.master.0 as usize).map(|file| &file.kind);
    if !matches!(master, Some(FileKind::Terminal(Terminal::Master(_)))) {
        context.refuse(saved.path.display().to_string(), "its other side is missing", "use another copy of the image");
    }
}

fn failed(pid: Pid) -> impl Fn(TargetError) -> RestoreError {
    move |source| RestoreError::Target { resource: Terminals::NAME, pid, source }
}

/// Opens a master in a process, above its own descriptors, until it is the one with the number.
fn open(target: &mut dyn Target, saved: &Master, flags: i32) -> Result<RemoteFd, RestoreError> {
    let pid = target.pid();
    let spare = target.footprint().spare_fds;
    let mut others = Vec::new();
    let found = loop {
        let mut batch = Batch::new();
        let path = batch.string(saved.path.as_os_str().as_bytes());
        let flags = flags & (libc::O_ACCMODE | libc::O_NONBLOCK) | libc::O_NOCTTY | libc::O_CLOEXEC;
        let opened = batch.call(Sysno::openat, args![libc::AT_FDCWD, path, flags]);
        let lifted = batch.call(Sysno::fcntl, args![opened, libc::F_DUPFD_CLOEXEC, spare]);
        batch.call(Sysno::close, args![opened]);
        let number = batch.room(4);
        batch.call(Sysno::ioctl, args![lifted, TIOCGPTN, number]);
        let replies = target.run(&batch).map_err(failed(pid))?;
        let (fd, number) = (replies.fd(lifted), replies.u32(number));
        if number == saved.number {
            break Some(fd);
        }
        others.push(fd);
        // The kernel gives the lowest that is free.
        if number > saved.number {
            break None;
        }
    };
    for others in others.chunks(200) {
        let mut batch = Batch::new();
        for fd in others {
            batch.call(Sysno::close, args![*fd]);
        }
        target.run(&batch).map_err(failed(pid))?;
    }
    let Some(fd) = found else {
        let what = format!("/dev/pts/{} is in use; close that terminal, then restore again", saved.number);
        return Err(RestoreError::Mismatch { resource: Terminals::NAME, pid, what });
    };
    let mut batch = Batch::new();
    let unlocked = batch.bytes(&0_i32.to_ne_bytes());
    batch.call(Sysno::ioctl, args![fd, TIOCSPTLCK, unlocked]);
    target.run(&batch).map_err(failed(pid))?;
    Ok(fd)
}

fn masters(image: &Image) -> impl Iterator<Item = (FileId, i32, &Master)> {
    image.files.iter().enumerate().filter_map(|(id, file)| match &file.kind {
        FileKind::Terminal(Terminal::Master(master)) => Some((FileId(id as u32), file.flags, master)),
        _ => None,
    })
}

/// Gives a new session its controlling terminal, if it had one: right after its leader, this process, has begun it, and before
/// that has any child in it. The master stays open in the process, above all numbers of the program, until the descriptors
/// are rebuilt. The image calls the session by a name that may not be the kernel's.
pub fn take_controlling(target: &mut dyn Target, session: Pid, image: &Image) -> Result<(), RestoreError> {
    let pid = target.pid();
    let Some((_, flags, saved)) = masters(image).find(|(_, _, master)| master.session == session) else {
        return Ok(());
    };
    let master = open(target, saved, flags)?;
    let mut batch = Batch::new();
    let slave = batch.call(Sysno::ioctl, args![master, TIOCGPTPEER, libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC]);
    batch.call(Sysno::ioctl, args![slave, TIOCSCTTY, 0]);
    batch.call(Sysno::close, args![slave]);
    target.run(&batch).map_err(failed(pid)).map(drop)
}

/// The masters that [`take_controlling`] has left open, by their numbers.
pub fn taken(targets: &mut [Box<dyn Target>], image: &Image) -> Result<HashMap<u32, OwnedFd>, RestoreError> {
    let mut taken = HashMap::new();
    for (_, _, saved) in masters(image) {
        let Some(leader) = image.process(saved.session) else { continue };
        let target = &mut targets[leader];
        let pid = target.pid();
        let looked = |source| RestoreError::Io { what: format!("{} of process {pid}", Terminals::NAME), source };
        for fd in target.proc().numbers("fd").map_err(looked)? {
            let info = target.proc().text(format!("fdinfo/{fd}")).unwrap_or_default();
            let info = FdInfo::parse(&info).unwrap_or_default();
            if index(&info) == Some(saved.number) {
                let out = target.fds_out(&[RemoteFd(fd)]).map_err(failed(pid))?;
                taken.extend(out.into_iter().map(|fd| (saved.number, fd)));
                break;
            }
        }
    }
    Ok(taken)
}

pub(super) fn rebuild_master(saved: &Master, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
    let (id, process, flags) = (context.id, context.process(), context.file().flags);
    let fd = match context.taken(saved.number) {
        Some(master) => context.fds_in(process, &[std::os::fd::AsFd::as_fd(&master)])?[0],
        None if context.image.process(saved.session).is_some() => {
            return Err(context.mismatch(format!("/dev/pts/{} does not control its session", saved.number)));
        }
        None => {
            context.run(process, &Batch::new())?;
            open(&mut *context.targets[process], saved, flags)?
        }
    };
    let (uid, gid, mode) = saved.owner;
    let mut batch = Batch::new();
    let slave = batch.call(Sysno::ioctl, args![fd, TIOCGPTPEER, libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC]);
    // An ordinary user owns it from the start.
    batch.try_call(Sysno::fchown, args![slave, uid, gid]);
    batch.call(Sysno::fchmod, args![slave, mode]);
    batch.call(Sysno::close, args![slave]);
    context.run(process, &batch)?;
    context.stage(id, process, fd)
}

pub(super) fn rebuild_slave(saved: &Slave, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
    context.require(saved.master)?;
    let (process, flags) = (context.process(), context.file().flags);
    // The other side may have been made elsewhere, and that has to be before.
    for process in 0..context.targets.len() {
        context.run(process, &Batch::new())?;
    }
    context.create(process, 1, 64 + saved.path.as_os_str().len(), |batch| {
        let path = batch.string(saved.path.as_os_str().as_bytes());
        let flags = flags & libc::O_ACCMODE | libc::O_NOCTTY | libc::O_NONBLOCK | libc::O_CLOEXEC;
        (batch.call(Sysno::openat, args![libc::AT_FDCWD, path, flags]), |_: &crate::Replies| Ok(()))
    })
}

/// Settings, size and foreground, when both sides are there.
pub(super) fn finish_master(saved: &Master, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
    let process = context.process();
    let fd = context.bring(context.id, process)?;
    let mut batch = Batch::new();
    let settings = batch.bytes(&saved.settings);
    batch.call(Sysno::ioctl, args![fd, TCSETS2, settings]);
    let size = batch.bytes(&saved.size.map(u16::to_ne_bytes).concat());
    batch.call(Sysno::ioctl, args![fd, TIOCSWINSZ, size]);
    let one = batch.bytes(&1_i32.to_ne_bytes());
    if saved.packets {
        batch.call(Sysno::ioctl, args![fd, TIOCPKT, one]);
    }
    if saved.locked {
        batch.call(Sysno::ioctl, args![fd, TIOCSPTLCK, one]);
    }
    context.run(process, &batch)?;
    let Some(leader) = context.image.process(saved.session) else { return Ok(()) };
    let is_group = context.image.processes.iter().map(|process| &process.task);
    let is_group = is_group.chain(context.image.zombies.iter().map(|zombie| &zombie.task));
    // A group that has nobody left cannot be made, and has nobody to tell.
    if saved.foreground.0 == 0 || !is_group.into_iter().any(|task| task.pgid == saved.foreground) {
        return Ok(());
    }
    let fd = context.bring(context.id, leader)?;
    let mut batch = Batch::new();
    let group = batch.bytes(&saved.foreground.0.to_ne_bytes());
    batch.call(Sysno::ioctl, args![fd, TIOCSPGRP, group]);
    context.run(leader, &batch).map(drop)
}
