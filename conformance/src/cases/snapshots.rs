//! Programs that change their memory all the time, and go on while they are saved: what is saved is of one instant.

use std::io;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

use crate::case::{Case, Checkpoint};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("snapshots/one-instant", &["memory", "tasks"], one_instant).unsteady().snapshot(),
        Case::new("snapshots/not-forked", &["memory"], not_forked).unsteady().snapshot(),
    ]
}

const PAGE: usize = 4096;
/// Enough for a copy of the process to be worth it.
const COUNT: usize = 2048;

/// Memory of our own, never unmapped, and seen as a counter at the start of each page.
#[derive(Clone, Copy)]
struct Counters(&'static [[AtomicU64; PAGE / 8]]);

impl Counters {
    fn map(count: usize, flags: i32) -> Result<Counters, String> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at a place that the kernel chooses, and any bits are counters.
        unsafe {
            let start = libc::mmap(ptr::null_mut(), count * PAGE, protection, flags | libc::MAP_ANONYMOUS, -1, 0);
            if start == libc::MAP_FAILED {
                return Err(format!("mmap: {}", io::Error::last_os_error()));
            }
            Ok(Counters(std::slice::from_raw_parts(start.cast(), count)))
        }
    }

    fn private() -> Result<Counters, String> {
        Counters::map(COUNT, libc::MAP_PRIVATE)
    }

    fn at(&self, page: usize) -> &AtomicU64 {
        &self.0[page][0]
    }

    fn advise(&self, advice: i32) -> Result<(), String> {
        // SAFETY: advice for this mapping that takes nothing away.
        let result = unsafe { libc::madvise(self.0.as_ptr().cast_mut().cast(), self.0.len() * PAGE, advice) };
        if result == 0 { Ok(()) } else { Err(format!("madvise: {}", io::Error::last_os_error())) }
    }

    /// Counts all pages up, one after the other, again and again. Before that, each must be where this thread has left it.
    fn sweep(&self, board: Board) {
        for page in 0..self.0.len() {
            self.at(page).store(1, SeqCst);
        }
        board.begun().fetch_add(1, SeqCst);
        let mut round = 1;
        while !board.is_over() {
            for page in 0..self.0.len() {
                let found = self.at(page).load(SeqCst);
                if found != round {
                    return board.fail(page as u64, round, found);
                }
                self.at(page).store(round + 1, SeqCst);
            }
            round += 1;
        }
    }
}

/// What all processes of a subject share.
#[derive(Clone, Copy)]
struct Board(Counters);

impl Board {
    fn map() -> Result<Board, String> {
        Ok(Board(Counters::map(1, libc::MAP_SHARED)?))
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        &self.0.0[0][index]
    }

    /// What the parent, and what its child, counts.
    fn said(&self, child: bool) -> &AtomicU64 {
        self.word(child as usize * 8)
    }

    fn over(&self) -> &AtomicU64 {
        self.word(16)
    }

    fn begun(&self) -> &AtomicU64 {
        self.word(17)
    }

    fn is_over(&self) -> bool {
        self.over().load(SeqCst) != 0
    }

    /// The first failure counts.
    fn fail(&self, what: u64, expected: u64, found: u64) {
        if self.over().compare_exchange(0, 2, SeqCst, SeqCst).is_ok() {
            for (index, value) in [what, expected, found].into_iter().enumerate() {
                self.word(18 + index).store(value, SeqCst);
            }
            self.over().store(3, SeqCst);
        }
    }

    fn verdict(&self) -> Result<(), String> {
        while self.over().load(SeqCst) == 2 {
            thread::yield_now();
        }
        if self.over().load(SeqCst) != 3 {
            return Ok(());
        }
        let [what, expected, found] = [18, 19, 20].map(|index| self.word(index).load(SeqCst));
        Err(format!("counter {what} (page, or 10000 and on: a process) should be {expected}, is {found}"))
    }

    /// Says that the subject is ready once so many threads are at work, and waits for the sign to end.
    fn attend(&self, threads: u64, checkpoint: &Checkpoint) -> Result<(), String> {
        while self.begun().load(SeqCst) < threads && !self.is_over() {
            thread::yield_now();
        }
        checkpoint.ready()?;
        while !checkpoint.is_go() && !self.is_over() {
            thread::sleep(std::time::Duration::from_millis(1));
        }
        let _ = self.over().compare_exchange(0, 1, SeqCst, SeqCst);
        Ok(())
    }
}

/// Two processes count in turn, each in memory of its own and then in shared memory. At each instant the four agree but for the
/// one that is next; and each knows, where it is in its code, which that is.
fn take_turns(board: Board, child: bool) -> Result<(), String> {
    let own = Counters::private()?;
    let mut page = 0;
    board.begun().fetch_add(1, SeqCst);
    while !board.is_over() {
        let count = own.at(page).load(SeqCst);
        let other = board.said(!child).load(SeqCst);
        let said = board.said(child).load(SeqCst);
        if said != count {
            board.fail(10_000 + child as u64, count, said);
            break;
        }
        // The parent is ahead by one, or both are where they were.
        let (mine, ahead) =
            if child { (other == count + 1, other == count) } else { (other == count, other + 1 == count) };
        if mine {
            // Through all of the memory, so that each page is of another instant.
            page = (page + 1) % COUNT;
            own.at(page).store(count + 1, SeqCst);
            board.said(child).store(count + 1, SeqCst);
        } else if ahead {
            thread::yield_now();
        } else {
            board.fail(10_002 + child as u64, count, other);
        }
    }
    Ok(())
}

fn one_instant(checkpoint: &Checkpoint) -> Result<(), String> {
    let board = Board::map()?;
    // SAFETY: this subject has one thread up to here; the child leaves by _exit.
    let pid = match unsafe { fork() }.map_err(|error| format!("fork: {error}"))? {
        ForkResult::Child => {
            let sweeper = Counters::private().map(|memory| thread::spawn(move || memory.sweep(board)));
            let worked = sweeper.and_then(|sweeper| {
                take_turns(board, true)?;
                sweeper.join().map_err(|_| "a panic".to_string())
            });
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(worked.is_err() as i32) }
        }
        ForkResult::Parent { child } => child,
    };
    let worked = thread::scope(|scope| {
        for _ in 0..2 {
            let memory = Counters::private()?;
            scope.spawn(move || memory.sweep(board));
        }
        scope.spawn(move || take_turns(board, false));
        board.attend(5, checkpoint)
    });
    let ended = waitpid(pid, None).map_err(|error| format!("waitpid: {error}"))?;
    worked.and(board.verdict())?;
    if ended == WaitStatus::Exited(pid, 0) { Ok(()) } else { Err(format!("the child ended as {ended:?}")) }
}

/// Memory that a fork has not, or has as zeros, beside some that it has.
fn not_forked(checkpoint: &Checkpoint) -> Result<(), String> {
    let board = Board::map()?;
    thread::scope(|scope| {
        for advice in [libc::MADV_DONTFORK, libc::MADV_WIPEONFORK, libc::MADV_NORMAL] {
            let memory = Counters::private()?;
            memory.advise(advice)?;
            scope.spawn(move || memory.sweep(board));
        }
        board.attend(3, checkpoint)
    })?;
    board.verdict()
}
