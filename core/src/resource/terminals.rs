//! Terminals: a job of a terminal (`--shell-job`) goes on as a job of the restorer's; and pseudoterminals of which both sides
//! are in the tree (`pseudo.rs`).
//!
//! The other side of a job's terminal, an emulator or a line, is not part of the tree, so that there is nothing to bring
//! back but the connection: descriptors of the job's terminal come to lead to the one that the restorer has, with the
//! settings of the line discipline as they were (termios(3)). What was typed and not read stays with the old terminal.

mod pseudo;

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use crate::args;
use crate::batch::{Batch, Sysno};
use crate::error::{DumpError, RestoreError};
use crate::procfs::ProcDir;
use crate::resource::descriptors::{CollectFile, FileResource, OfFile, RebuildFile, Seen};
use crate::resource::{Check, Resource};
use crate::target::Pid;

pub use pseudo::{Master, Slave, examine, take_controlling, taken};

/// An open terminal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Terminal {
    /// The terminal that a job of a shell runs on.
    Job(Job),
    /// One side of a pseudoterminal of the tree.
    Master(Master),
    /// The other.
    Slave(Slave),
}

impl Terminal {
    pub fn path(&self) -> &Path {
        match self {
            Terminal::Job(Job { path, .. })
            | Terminal::Master(Master { path, .. })
            | Terminal::Slave(Slave { path, .. }) => path,
        }
    }
}

/// A descriptor of the job's terminal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// Where it was, for people.
    pub path: PathBuf,
    /// It was opened as `/dev/tty`, and its link still says so.
    pub by_dev_tty: bool,
    /// `struct termios2` of the kernel; at the first descriptor of a tree only.
    pub settings: Option<[u8; TERMIOS2]>,
}

/// Bytes of `struct termios2` (asm-generic/termbits.h).
pub const TERMIOS2: usize = 44;
/// `_IOR('T', 0x2A, struct termios2)` and `_IOW('T', 0x2B, struct termios2)`.
const TCGETS2: u32 = 0x802c_542a;
const TCSETS2: u32 = 0x402c_542b;

/// Terminals of shell jobs, and pseudoterminals.
pub struct Terminals;

impl Resource for Terminals {
    const NAME: &'static str = "terminals";
    type Scope = OfFile;
    type Saved = Terminal;

    fn collect(context: &mut CollectFile<'_>) -> Result<Terminal, DumpError> {
        if number(context.seen) == PTMX {
            return pseudo::collect_master(context);
        }
        match pseudo::collect_slave(context)? {
            Some(slave) => Ok(slave),
            None => collect_job(context).map(Terminal::Job),
        }
    }

    fn check(saved: &Terminal, context: &mut Check<'_>) {
        match saved {
            Terminal::Job(job) => check_job(job, context),
            Terminal::Master(master) => pseudo::check_master(master, context),
            Terminal::Slave(slave) => pseudo::check_slave(slave, context),
        }
    }

    fn rebuild(saved: &Terminal, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        match saved {
            Terminal::Job(job) => rebuild_job(job, context),
            Terminal::Master(master) => pseudo::rebuild_master(master, context),
            Terminal::Slave(slave) => pseudo::rebuild_slave(slave, context),
        }
    }
}

impl FileResource for Terminals {
    fn claims(seen: &Seen) -> bool {
        // Documentation/admin-guide/devices.txt: consoles and serial lines, /dev/tty and ptmx, pseudoterminals, USB
        // serial lines, and others.
        seen.file_type() == libc::S_IFCHR
            && seen.info.flags & libc::O_PATH == 0
            && matches!(number(seen).0, 4 | 5 | 136..=143 | 166 | 188 | 204 | 229)
    }

    fn finish(saved: &Terminal, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        let settings = match saved {
            Terminal::Job(job) => job.settings,
            Terminal::Master(master) => return pseudo::finish_master(master, context),
            Terminal::Slave(_) => None,
        };
        let Some(settings) = settings else { return Ok(()) };
        let process = context.process();
        let fd = context.bring(context.id, process)?;
        let mut batch = Batch::new();
        let settings = batch.bytes(&settings);
        batch.call(Sysno::ioctl, args![fd, TCSETS2, settings]);
        context.run(process, &batch).map(drop)
    }
}

fn collect_job(context: &mut CollectFile<'_>) -> Result<Job, DumpError> {
    let seen = context.seen;
    let by_dev_tty = number(seen) == DEV_TTY;
    let mut saved = Job { path: PathBuf::from(&seen.link), by_dev_tty, settings: None };
    if !context.options.shell_job {
        context.refuse(
            "it leads to a terminal",
            "use --shell-job to have it go on as a job of the terminal of the restore, or start the program with \
                 `ckpt run`",
        );
        return Ok(saved);
    }
    let others: Vec<&Seen> = context.census.seen[..context.id.0 as usize]
        .iter()
        .filter(|other| Terminals::claims(other) && number(other) != PTMX && !pseudo::is_of_tree(context.census, other))
        .collect();
    // Opened as /dev/tty it is the controlling terminal, which the others are as well, or are refused.
    let another = others.iter().find(|other| !by_dev_tty && number(other) != DEV_TTY && number(other) != number(seen));
    if let Some(another) = another {
        let why = format!("it is another terminal than that of {}", another.subject());
        context.refuse(why, "a job has one terminal: have the program close the other before the dump");
    } else if others.is_empty() {
        let mut batch = Batch::new();
        let settings = batch.room(TERMIOS2);
        let get = batch.try_call(Sysno::ioctl, args![seen.fd, TCGETS2, settings]);
        let replies = context.run(&batch)?;
        match replies.result(get) {
            Ok(_) => saved.settings = replies.bytes(settings).try_into().ok(),
            Err(Errno::EIO) => context.refuse("its terminal was closed", "have the program close it before the dump"),
            Err(errno) => return Err(context.io_error("its settings cannot be read", errno.into())),
        }
    }
    Ok(saved)
}

fn check_job(saved: &Job, context: &mut Check<'_>) {
    let subject = saved.path.display().to_string();
    if !context.options.shell_job {
        context.refuse(
            subject,
            "the image is of a job of a terminal",
            "use --shell-job to have it go on as a job of this terminal",
        );
    } else if our_terminal().is_none() {
        context.refuse(
            subject,
            "the image is of a job of a terminal, and ckpt has no terminal here",
            "restore it from a terminal, or under script(1)",
        );
    }
}

fn rebuild_job(saved: &Job, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
    let access = OFlag::from_bits_truncate(context.file().flags & libc::O_ACCMODE);
    let flags = access | OFlag::O_NOCTTY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    let named = if saved.by_dev_tty { None } else { our_terminal() };
    let path = named.unwrap_or_else(|| PathBuf::from("/dev/tty"));
    let terminal = nix::fcntl::open(&path, flags, Mode::empty())
        .map_err(|errno| RestoreError::Io { what: format!("the terminal {}", path.display()), source: errno.into() })?;
    context.give(context.id, context.process(), terminal)
}

/// `/dev/tty` and `/dev/ptmx`.
const DEV_TTY: (u32, u32) = (5, 0);
const PTMX: (u32, u32) = (5, 2);

/// Major and minor number.
fn number(seen: &Seen) -> (u32, u32) {
    (libc::major(seen.stat.st_rdev), libc::minor(seen.stat.st_rdev))
}

/// The terminal of ckpt: its controlling terminal, or what its standard descriptors lead to.
fn our_terminal() -> Option<PathBuf> {
    let own = ProcDir::open(Pid(std::process::id() as i32)).ok()?;
    let controlling = own.stat_line().ok().map(|stat| decode(stat.tty_nr)).filter(|&device| device != (0, 0));
    let standard = (0..3).filter_map(|fd| own.link(format!("fd/{fd}")).ok()).map(PathBuf::from);
    let pseudo = controlling.filter(|(major, _)| *major == 136).map(|(_, minor)| format!("/dev/pts/{minor}").into());
    let found = pseudo.into_iter().chain(standard).find(|path| match (device_at(path), controlling) {
        (Ok(device), Some(controlling)) => device == controlling,
        (Ok((major, _)), None) => matches!(major, 4 | 136..=143 | 166 | 188 | 204 | 229),
        (Err(_), _) => false,
    });
    // Its own name is not known: another name for it will do.
    found.or_else(|| controlling.map(|_| PathBuf::from("/dev/tty")))
}

fn device_at(path: &Path) -> io::Result<(u32, u32)> {
    let stat = nix::sys::stat::stat(path)?;
    if stat.st_mode & libc::S_IFMT != libc::S_IFCHR || !path.as_os_str().as_bytes().starts_with(b"/dev/") {
        return Err(io::ErrorKind::NotFound.into());
    }
    Ok((libc::major(stat.st_rdev), libc::minor(stat.st_rdev)))
}

/// Major and minor number of `tty_nr` in `/proc/PID/stat` (proc_pid_stat(5)).
fn decode(tty: i32) -> (u32, u32) {
    let tty = tty as u32;
    (tty >> 8 & 0xfff, tty & 0xff | tty >> 12 & 0xfff00)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_terminals() {
        assert_eq!(decode(34816), (136, 0));
        assert_eq!(decode(34816 + 17), (136, 17));
        assert_eq!(decode(0x0010_8801), (136, 257));
        assert_eq!(decode(1025), (4, 1));
    }
}
