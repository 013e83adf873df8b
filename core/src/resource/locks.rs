//! File locks: POSIX, open-file-description and flock locks, and leases.
//!
//! `/proc/PID/fdinfo/N` shows the locks that were taken through a descriptor (proc_pid_fdinfo(5)). They are taken again
//! when all descriptors are in place: POSIX locks belong to a process and are lost when it closes any descriptor of the
//! file. Who waits for a lock is in a system call that is run again.

use std::collections::HashSet;

use nix::errno::Errno;

use crate::args;
use crate::batch::{Batch, CallId, Sysno};
use crate::error::{DumpError, Refusal, RestoreError};
use crate::image::Image;
use crate::resource::Check;
use crate::resource::descriptors::{self, Census, FileId};
use crate::target::{Pid, Target};

/// The section name.
pub const NAME: &str = "locks";

/// A lock on an open file.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Lock {
    pub file: FileId,
    pub kind: Kind,
    /// For writing, and so exclusive; else for reading and shared.
    pub write: bool,
    /// The locked bytes; all of the file for flock locks and leases.
    pub start: u64,
    /// The last locked byte; `None`: however long the file grows.
    pub end: Option<u64>,
}

/// What a lock belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// `fcntl(F_SETLK)`: a process.
    Posix { process: Pid },
    /// `fcntl(F_OFD_SETLK)`: the open file description.
    OpenFile,
    /// `flock`: the open file description.
    Flock,
    /// `fcntl(F_SETLEASE)`: the open file description.
    Lease,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Posix { .. } => "POSIX lock",
            Kind::OpenFile => "open file description lock",
            Kind::Flock => "flock lock",
            Kind::Lease => "lease",
        }
    }
}

/// Collects the locks of the whole tree.
pub fn collect(
    targets: &mut [Box<dyn Target>],
    census: &Census,
    refusals: &mut Vec<Refusal>,
) -> Result<Vec<Lock>, DumpError> {
    let mut locks = Vec::new();
    // Descriptors that share an open file show its locks again.
    let mut known = HashSet::new();
    for (process, fd, line) in &census.locks {
        let pid = targets[*process].pid();
        let file = census.ids[&(*process, *fd)];
        if census.seen[file.0 as usize].in_queue {
            refusals.push(Refusal {
                resource: NAME,
                pid: Some(pid),
                subject: census.seen[file.0 as usize].subject(),
                why: "it has a lock, and no process has it open".into(),
                help: "dump again when the program has read the messages of the socket".into(),
            });
            continue;
        }
        match parse(line, file, pid) {
            Ok(lock) => {
                if known.insert(lock.clone()) {
                    locks.push(lock);
                }
            }
            Err(why) => refusals.push(Refusal {
                resource: NAME,
                pid: Some(pid),
                subject: census.seen[file.0 as usize].subject(),
                why: why.into(),
                help: "have the program give the lock up before the dump".into(),
            }),
        }
    }
    Ok(locks)
}

/// Parses what follows `lock:` in fdinfo: `1: POSIX  ADVISORY  WRITE 359 00:13:11691 0 EOF`.
fn parse(line: &str, file: FileId, pid: Pid) -> Result<Lock, &'static str> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [_, kind, state, access, _, _, start, end] = words[..] else {
        return Err("it has a lock that the kernel shows in a form unknown here");
    };
    let kind = match (kind, state) {
        ("POSIX", "ADVISORY") => Kind::Posix { process: pid },
        ("OFDLCK", "ADVISORY") => Kind::OpenFile,
        ("FLOCK", "ADVISORY") => Kind::Flock,
        ("LEASE", "ACTIVE") => Kind::Lease,
        ("LEASE", _) => return Err("it has a lease that somebody is just breaking"),
        _ => return Err("it has a lock of a kind that is not supported"),
    };
    let write = match access {
        "READ" => false,
        "WRITE" => true,
        _ => return Err("it has a lock that is just being given up"),
    };
    let number = |text: &str| text.parse::<u64>().map_err(|_| "it has a lock on a range unknown here");
    Ok(Lock { file, kind, write, start: number(start)?, end: if end == "EOF" { None } else { Some(number(end)?) } })
}

pub fn check(image: &Image, context: &mut Check<'_>) {
    context.resource = NAME;
    for lock in &image.locks {
        let range =
            lock.start <= i64::MAX as u64 && lock.end.is_none_or(|end| end >= lock.start && end < i64::MAX as u64);
        if !range || place(image, lock).is_none() {
            context.refuse(
                "",
                format!("a {} does not fit its file", lock.kind.name()),
                "use another copy of the image",
            );
        }
    }
}

/// The process to take a lock in, by its index, and the descriptor to take it through.
fn place(image: &Image, lock: &Lock) -> Option<(usize, i32)> {
    let process = match lock.kind {
        Kind::Posix { process } => image.process(process)?,
        _ => descriptors::holder(image, lock.file)?,
    };
    let table = &image.processes[process].descriptors.descriptors;
    Some((process, table.iter().find(|held| held.file == lock.file)?.fd))
}

/// Takes the locks again.
pub fn rebuild(targets: &mut [Box<dyn Target>], image: &Image) -> Result<(), RestoreError> {
    let mut by_process: Vec<Vec<(&Lock, i32)>> = vec![Vec::new(); targets.len()];
    for lock in &image.locks {
        let (process, fd) = place(image, lock).ok_or_else(|| RestoreError::Mismatch {
            resource: NAME,
            pid: image.processes[0].task.pid,
            what: format!("a {} does not fit its file", lock.kind.name()),
        })?;
        by_process[process].push((lock, fd));
    }
    for (target, locks) in targets.iter_mut().zip(by_process) {
        for locks in locks.chunks(crate::batch::MAX_CALLS) {
            take(&mut **target, locks, image)?;
        }
    }
    Ok(())
}

fn take(target: &mut dyn Target, locks: &[(&Lock, i32)], image: &Image) -> Result<(), RestoreError> {
    let pid = target.pid();
    let mut batch = Batch::new();
    let calls: Vec<CallId> = locks.iter().map(|&(lock, fd)| add_call(&mut batch, lock, fd)).collect();
    let replies = target.run(&batch).map_err(|source| RestoreError::Target { resource: NAME, pid, source })?;
    for (&(lock, fd), call) in locks.iter().zip(calls) {
        let Err(errno) = replies.result(call) else { continue };
        let path = image.files[lock.file.0 as usize].kind.path();
        let path = path.map_or(String::new(), |path| format!(" ({})", path.display()));
        let what = format!("descriptor {fd}{path}: the {} cannot be taken again", lock.kind.name());
        return Err(match errno {
            Errno::EAGAIN | Errno::EACCES => RestoreError::Mismatch {
                resource: NAME,
                pid,
                what: format!("{what}: another process holds one now; end it, then restore again"),
            },
            errno => RestoreError::Io { what: format!("{NAME} of process {pid}, {what}"), source: errno.into() },
        });
    }
    Ok(())
}

fn add_call(batch: &mut Batch, lock: &Lock, fd: i32) -> CallId {
    let access = if lock.write { libc::F_WRLCK } else { libc::F_RDLCK };
    match lock.kind {
        Kind::Flock => {
            let operation = if lock.write { libc::LOCK_EX } else { libc::LOCK_SH };
            batch.try_call(Sysno::flock, args![fd, operation | libc::LOCK_NB])
        }
        Kind::Lease => batch.try_call(Sysno::fcntl, args![fd, libc::F_SETLEASE, access]),
        Kind::Posix { .. } | Kind::OpenFile => {
            // struct flock: type and whence (16 bits each), padding, start, length, pid. Length 0 is to the end.
            let length = lock.end.map_or(0, |end| end - lock.start + 1);
            let flock = batch.words(&[access as u64 | (libc::SEEK_SET as u64) << 16, lock.start, length, 0]);
            let command = if lock.kind == Kind::OpenFile { libc::F_OFD_SETLK } else { libc::F_SETLK };
            batch.try_call(Sysno::fcntl, args![fd, command, flock])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_fdinfo() {
        let parse = |line| parse(line, FileId(3), Pid(7));
        let lock = |kind, write, start, end| Ok(Lock { file: FileId(3), kind, write, start, end });
        assert_eq!(
            parse("1: POSIX  ADVISORY  WRITE 359 00:13:11691 0 EOF"),
            lock(Kind::Posix { process: Pid(7) }, true, 0, None)
        );
        assert_eq!(parse("2: OFDLCK ADVISORY  READ -1 fe:00:99 5 14"), lock(Kind::OpenFile, false, 5, Some(14)));
        assert_eq!(parse("1: FLOCK  ADVISORY  WRITE 359 00:13:11691 0 EOF"), lock(Kind::Flock, true, 0, None));
        assert_eq!(parse("1: LEASE  ACTIVE    READ 359 00:13:11691 0 EOF"), lock(Kind::Lease, false, 0, None));
        for refused in [
            "1: LEASE  BREAKING  READ 359 00:13:11691 0 EOF",
            "1: DELEG  ACTIVE    READ 359 00:13:11691 0 EOF",
            "1: POSIX  ADVISORY  UNLCK 359 00:13:11691 0 EOF",
            "1: POSIX  ADVISORY  READ 359 00:13:11691 0 x",
            "1: POSIX",
            "",
        ] {
            assert!(parse(refused).is_err(), "{refused}");
        }
    }

    #[test]
    fn our_own_lock_has_the_form_that_is_parsed() {
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(std::env::temp_dir().join(format!("ckpt-lock-{}", std::process::id())))
            .unwrap();
        file.lock_shared().unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("lock:")).unwrap();
        assert_eq!(
            parse(line, FileId(0), Pid(1)),
            Ok(Lock { file: FileId(0), kind: Kind::Flock, write: false, start: 0, end: None })
        );
        std::fs::remove_file(std::env::temp_dir().join(format!("ckpt-lock-{}", std::process::id()))).unwrap();
    }
}
