//! Getting the ids of an image back.
//!
//! With CAP_CHECKPOINT_RESTORE (or CAP_SYS_ADMIN) in the pid namespace, `clone3(set_tid)` makes a task with a chosen id.
//! Anyone may have that right in a user and pid namespace of his own (`unshare -Ucpf --keep-caps --mount-proc`).
//! Without it the kernel gives ids out one after the other, up to `/proc/sys/kernel/pid_max` and around: tasks are made
//! and ended until the wanted one is next. That takes about a second for each round of 32,768 ids, so it is tried only
//! where the range is that small. Ids below 300 are given out once, when the namespace is young, and cannot be met again.
//!
//! Where an id is taken, is given to others before us, or is out of reach, the whole tree gets others, and sees its own: see
//! `virtual_ids.rs`.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use ckpt_core::Pid;

use crate::sys;

/// Largest `pid_max` that is worth a walk: 4,194,304, the default of large hosts, takes minutes.
pub const LARGEST_RANGE: u64 = 131_072;
/// `RESERVED_PIDS` of the kernel: once it has given out all ids, it begins anew with this one.
pub const LOWEST: i32 = 300;
/// How long the id of a thread that has ended may be in use.
const SETTLING: Duration = Duration::from_secs(1);
/// How long one id may be in use by others, and how many rounds a tree may lose to them: where they are given the wanted one just
/// before us again and again, the tree gets other ids.
const PATIENCE: Duration = Duration::from_secs(5);
const MOST_LOST: u32 = 5;

/// How ids are got.
#[derive(Debug, Default)]
pub struct Ids {
    /// The tree gets the ids that the kernel gives, and its shim translates.
    others: bool,
    /// Whether `set_tid` is known not to be permitted.
    walking: bool,
    /// The last id that the kernel gave out to us.
    last: Option<i32>,
    range: u64,
    /// Rounds in which others were given what we waited for.
    lost: u32,
    /// To ask what is in use with.
    probe: Option<OwnedFd>,
}

/// `/proc/sys/kernel/pid_max`.
pub fn range() -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/sys/kernel/pid_max")?;
    text.trim().parse().map_err(|_| io::ErrorKind::InvalidData.into())
}

impl Ids {
    /// For the ids of an image: its own, where the kernel allows that.
    pub fn new(wanted: &[Pid]) -> io::Result<Ids> {
        let range = range()?;
        let mut ids = Ids { others: false, walking: !sys::may_choose_ids(), last: None, range, lost: 0, probe: None };
        for id in wanted {
            let out_of_reach = ids.walking && (range > LARGEST_RANGE || id.0 < LOWEST);
            if out_of_reach || id.0 as u64 >= range || ids.stays_in_use(*id)? {
                ids.others = true;
                break;
            }
        }
        Ok(ids)
    }

    /// Whatever ids the kernel gives.
    pub fn of_others() -> Ids {
        Ids { others: true, ..Ids::default() }
    }

    /// Whether the tree gets other ids than its own.
    pub fn others(&self) -> bool {
        self.others
    }

    /// Lends it out: for the time that a tree is borrowed otherwise.
    pub fn take(&mut self) -> Ids {
        std::mem::take(self)
    }

    /// Has a task made with an id: chosen, where that is permitted; else `work` makes one without a choice and says which
    /// id it got, and undoes it if it was the wrong one.
    ///
    /// # Errors
    /// As `work`; EEXIST if the id is in use or cannot be met.
    pub fn make(&mut self, id: Pid, mut work: impl FnMut(Step) -> io::Result<Pid>) -> io::Result<Pid> {
        if self.others {
            return work(Step::Make(None));
        }
        self.make_with(id, work).map(|()| id)
    }

    fn make_with(&mut self, id: Pid, mut work: impl FnMut(Step) -> io::Result<Pid>) -> io::Result<()> {
        if !self.walking {
            match self.choose(id, &mut work) {
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => self.walking = true,
                other => return other,
            }
        }
        if self.range > LARGEST_RANGE {
            return Err(io::Error::other(format!("{NOT_PERMITTED} (pid_max is {})", self.range)));
        }
        let mut in_use_since = None;
        loop {
            let in_use = self.in_use(id.0)?;
            let waited = in_use.then(|| in_use_since.get_or_insert_with(Instant::now).elapsed());
            if self.lost > MOST_LOST || waited.is_some_and(|waited| waited > PATIENCE) {
                return Err(io::Error::from_raw_os_error(libc::EEXIST));
            }
            if in_use {
                // It was free when the plan was made: most likely it belongs to something short, as most do.
                self.last = None;
                std::thread::sleep(Duration::from_millis(10));
                continue;
            }
            if !self.walk_to(id.0)? {
                self.lost += 1;
                continue;
            }
            let made = work(Step::Make(None))?;
            self.last = Some(made.0);
            if made == id {
                return Ok(());
            }
            // Somebody was faster. What was made has the wrong id.
            self.lost += 1;
            work(Step::Undo(made))?;
        }
    }

    fn in_use(&mut self, id: i32) -> io::Result<bool> {
        let probe = match &mut self.probe {
            Some(probe) => probe,
            none => none.insert(sys::id_probe()?),
        };
        Ok(sys::id_in_use(probe.as_fd(), id))
    }

    /// Whether an id is in use, and not only until a thread that has just ended is done with it: that is gone from `/proc` a
    /// moment before. An id that only a group or session has is not to be seen there either.
    fn stays_in_use(&mut self, id: Pid) -> io::Result<bool> {
        let begin = Instant::now();
        while self.in_use(id.0)? {
            if self.is_taken(id) || begin.elapsed() > SETTLING {
                return Ok(true);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(false)
    }

    /// Whether a process or thread has an id.
    fn is_taken(&self, id: Pid) -> bool {
        std::path::Path::new(&format!("/proc/{id}")).exists()
    }

    /// Where ids may be chosen. That of a thread which has just ended is free a moment after it is gone from /proc.
    fn choose(&self, id: Pid, work: &mut impl FnMut(Step) -> io::Result<Pid>) -> io::Result<()> {
        let begin = Instant::now();
        loop {
            match work(Step::Make(Some(id))) {
                Err(error)
                    if error.raw_os_error() == Some(libc::EEXIST)
                        && !self.is_taken(id)
                        && begin.elapsed() < SETTLING =>
                {
                    std::thread::sleep(Duration::from_millis(1));
                }
                other => return other.map(drop),
            }
        }
    }

    /// Has the kernel give out ids until the wanted one should be next. False after a whole round.
    fn walk_to(&mut self, id: i32) -> io::Result<bool> {
        for _ in 0..self.range + self.range / 4 {
            let last = match self.last.take() {
                Some(last) => last,
                None => sys::give_out_id()?,
            };
            // Those in between are not given out as long as they are in use.
            if last < id && id - last < 64 {
                let mut between = last + 1..id;
                if between.try_fold(true, |all, id| Ok::<_, io::Error>(all && self.in_use(id)?))? {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

/// What is to be done for an id.
pub enum Step {
    /// Make the task, with the given id or the next.
    Make(Option<Pid>),
    /// End what was made.
    Undo(Pid),
}

/// What is missing, and the way out.
pub const NOT_PERMITTED: &str = "choosing process ids needs CAP_CHECKPOINT_RESTORE, or a pid namespace of one's own: \
                                 unshare -Ucpf --keep-caps --mount-proc ckpt --backend preload restore ...";
