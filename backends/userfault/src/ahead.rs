//! A thread that reads and checks pages ahead of the sweep, so that the pager only has to put them into place.
//!
//! It allocates nothing: the pager may have to fork while it runs (`guardian.rs`), and what is forked then finds the
//! allocator as it is in that instant. What it cannot read, or what is damaged, it leaves to the pager, which finds out
//! again, and says so.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use ckpt_core::PAGE_SIZE;

use crate::outstanding::Run;
use crate::source::{Checksums, read_all};
use crate::sys;

/// Pages that are read at a time: 256 KiB.
const PAGES: u64 = 64;
/// So many of these wait to be put: what fits the cache of a processor.
const WAITING: usize = 4;

/// Pages that follow each other in the page file, read and checked.
pub struct Chunk {
    pub first: u64,
    pub pages: u64,
    bytes: Vec<u8>,
}

impl Chunk {
    fn has(&self, page: u64) -> bool {
        (self.first..self.first + self.pages).contains(&page)
    }

    /// The content of pages from one that it has on, at most so many.
    pub fn content(&self, page: u64, most: u64) -> Option<&[u8]> {
        let from = self.has(page).then(|| page - self.first)?;
        let to = self.pages.min(from.saturating_add(most));
        Some(&self.bytes[(from * PAGE_SIZE) as usize..(to * PAGE_SIZE) as usize])
    }
}

struct State {
    wanted: VecDeque<(u64, u64)>,
    /// Being read.
    busy: Option<(u64, u64)>,
    ready: VecDeque<Chunk>,
    free: Vec<Vec<u8>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    file: Arc<OwnedFd>,
    checksums: Arc<Checksums>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}

pub struct Ahead(Arc<Shared>);

impl Ahead {
    /// Starts the thread, if there is a processor for it.
    pub fn start(file: Arc<OwnedFd>, checksums: Arc<Checksums>) -> Option<Ahead> {
        if std::thread::available_parallelism().map_or(1, |it| it.get()) < 2 {
            return None;
        }
        // All that it will ever need. One chunk is in the hands of each side.
        let free = (0..WAITING + 2).map(|_| vec![0; (PAGES * PAGE_SIZE) as usize]).collect();
        let ready = VecDeque::with_capacity(WAITING + 2);
        let state = Mutex::new(State { wanted: VecDeque::new(), busy: None, ready, free });
        let shared = Arc::new(Shared { state, changed: Condvar::new(), file, checksums });
        let theirs = shared.clone();
        std::thread::Builder::new().name("ckpt-ahead".into()).spawn(move || work(&theirs)).ok()?;
        Some(Ahead(shared))
    }

    /// These will be asked for next, in this order.
    pub fn announce(&self, run: Run) {
        let mut state = self.0.lock();
        let mut done = 0;
        while done < run.pages {
            let pages = PAGES.min(run.pages - done);
            state.wanted.push_back((run.first + done, pages));
            done += pages;
        }
        self.0.changed.notify_all();
    }

    /// The chunk with a page, in exchange for one that is done with. What was announced before it is not wanted any more.
    pub fn take(&self, page: u64, done: Option<Chunk>) -> Option<Chunk> {
        let mut state = self.0.lock();
        state.free.extend(done.map(|chunk| chunk.bytes));
        let has = |&(first, pages): &(u64, u64)| (first..first + pages).contains(&page);
        loop {
            if let Some(at) = state.ready.iter().position(|chunk| chunk.has(page)) {
                for _ in 0..at {
                    let passed = state.ready.pop_front().map(|chunk| chunk.bytes);
                    state.free.extend(passed);
                }
                let found = state.ready.pop_front();
                self.0.changed.notify_all();
                return found;
            }
            if state.busy.as_ref().is_none_or(|busy| !has(busy)) {
                break;
            }
            state = self.0.wait(state);
        }
        // The pager is faster: it reads this one itself.
        if let Some(at) = state.wanted.iter().position(has) {
            state.wanted.drain(..=at);
            while let Some(chunk) = state.ready.pop_front() {
                state.free.push(chunk.bytes);
            }
        }
        self.0.changed.notify_all();
        None
    }
}

/// Reads what is wanted, for ever.
fn work(shared: &Shared) {
    // Others wait for the pager, and not for this.
    sys::raise_priority(-10);
    let mut state = shared.lock();
    loop {
        let next = if state.ready.len() < WAITING && !state.free.is_empty() { state.wanted.pop_front() } else { None };
        let (Some((first, pages)), Some(mut bytes)) = (next, next.and_then(|_| state.free.pop())) else {
            state = shared.wait(state);
            continue;
        };
        state.busy = Some((first, pages));
        drop(state);
        let content = &mut bytes[..(pages * PAGE_SIZE) as usize];
        let run = Run { start: 0, first, pages };
        let is_good = read_all(&shared.file, content, first * PAGE_SIZE).is_ok()
            && matches!(shared.checksums.first_wrong(run, content), Ok(None));
        state = shared.lock();
        state.busy = None;
        if is_good {
            state.ready.push_back(Chunk { first, pages, bytes });
        } else {
            state.free.push(bytes);
        }
        shared.changed.notify_all();
    }
}
