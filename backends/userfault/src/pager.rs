//! The pager: a process of its own that answers the faults of a restored tree, brings in the rest, and ends.
//!
//! It has one thread (and one that reads ahead for it, `ahead.rs`). Between two steps of the background sweep it looks for faults, so it needs no lock between the two,
//! and an answer waits for one step at most. What the tree does to its memory meanwhile (fork, mremap, munmap,
//! `MADV_DONTNEED`) comes as an event, and whoever did it waits until the event was taken. While it waits, the kernel
//! refuses to put pages into that address space, so that none can get where it no longer belongs. That is why events are
//! applied before any fault of the same reading is answered.
//!
//! Shared memory is another matter (`shared.rs`).

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ckpt_core::procfs::ProcDir;
use ckpt_core::resource::memory::{Memory, Object, Pages};
use ckpt_core::store::ImageReader;
use ckpt_core::{PAGE_SIZE, Pid};
use nix::cmsg_space;
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use crate::figures::{Compared, Figures, Histogram, Recorded};
use crate::guardian::{self, Guarded, LastLine, Notes};
use crate::outstanding::{Outstanding, Run};
use crate::page_server::client::Remote;
use crate::shared::Kind;
use crate::source::{Checksums, PageFile, Source};
use crate::sys::{self, Event, Obstacle, Userfault};
use crate::working_set::{Recording, WorkingSet};
use crate::{Options, WorkingSetUse, lazy_mappings, lazy_objects};

/// Pages that one step of the sweep brings in: 64 KiB. An answer to a fault may have to wait for as long as that takes.
const STEP: u64 = 16;
/// Pages announced ahead of the sweep: 8 MiB.
const AHEAD: u64 = 2048;
/// One request touches several missing pages, one soon after the other: for so long after a fault the sweep does nothing, unless
/// it has waited for so long already. Measured (redis, 256 MiB, 2 processors, GETs of random keys while it loads): the 99th
/// percentile of a GET is 0.25 to 0.36 ms (medians of two runs of seven) and was 1.5 ms without, and all pages are there after
/// 0.35 s instead of 0.23. It is the time that counts and not the faults, as one that a page server answers takes ten times as
/// long as another.
const NEXT_FAULT: Duration = Duration::from_micros(40);
const MOST_WAIT: Duration = Duration::from_micros(250);
/// Until it is looked again whether pages of the working set have come from a server.
const SOON: Duration = Duration::from_micros(50);
/// Descriptors that the pager will hardly have open at a time: so many, and so many more for each process of the tree. The
/// kernel's table grows with the numbers that are used, so the limit itself is not the number to use.
const DESCRIPTORS: (u64, u64) = (4096, 8);

/// What the restore command says to the pager: a new address space (with its userfaultfd); that it waits until the pager
/// has taken all that it was sent and is guarded; that the tree runs.
pub mod message {
    pub const SPACE: u8 = b'S';
    /// A shared object (with a descriptor of it); what a process maps of such (with its userfaultfd for that).
    pub const OBJECT: u8 = b'O';
    pub const SHARED: u8 = b'M';
    pub const PREPARE: u8 = b'P';
    pub const RELEASED: u8 = b'R';
    /// And back: that it is prepared; and last of all figures as JSON, or what went wrong, in words.
    pub const PREPARED: u8 = b'A';
    pub const DONE: u8 = b'D';
    pub const FAILED: u8 = b'F';
}

/// Is the pager, from the fork to its end.
pub fn run(reader: &dyn ImageReader, options: &Options, control: RawFd, affinity: Option<&CpuSet>) -> ! {
    // Nothing of this process may unwind into what its parent was doing.
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| serve(reader, options, control, affinity)));
    let failure = match ended {
        Ok(Ok(())) => sys::exit(0),
        Ok(Err(text)) => text,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            format!("a bug in the pager: {text}")
        }
    };
    tell(control, message::FAILED, &failure);
    sys::log_error(&failure);
    // The guardian does to the tree what has to be done.
    sys::exit(1)
}

fn tell(control: RawFd, kind: u8, text: &str) {
    let mut message = vec![kind];
    message.extend_from_slice(text.as_bytes());
    let _ = nix::sys::socket::send(control, &message, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT);
}

fn serve(reader: &dyn ImageReader, options: &Options, control: RawFd, affinity: Option<&CpuSet>) -> Result<(), String> {
    sys::ignore_signals();
    sys::note_sweep_signal();
    sys::set_name(c"ckpt-pager");
    let _ = nix::unistd::setsid();
    // Threads of the tree wait for us. Where it is not permitted, they wait for longer on a busy machine.
    sys::raise_priority(10);
    let _ = std::env::set_current_dir("/");
    if let Some(affinity) = affinity {
        let _ = sched_setaffinity(nix::unistd::Pid::from_raw(0), affinity);
    }
    std::panic::set_hook(Box::new(|_| {}));
    let image = reader.image();
    let lazy = image.processes.iter().flat_map(|process| lazy_mappings(&process.memory, options));
    let lazy = lazy.flat_map(|mapping| &mapping.pages);
    let lazy = lazy.chain(lazy_objects(image, options).flat_map(|(_, object)| &object.pages));
    let pages = reader.pages().as_raw_fd();
    let (sums, table) = reader.checksum_table();
    let sums = sums.as_raw_fd();
    sys::keep_only(&[control, pages, sums])
        .map_err(|error| format!("closing what the pager does not need: {error}"))?;
    let checksums = Checksums::new(owned(sums), table, lazy);
    let source: Box<dyn Source> = match &options.pages_from {
        Some(from) => Box::new(Remote::new(from.clone(), checksums, reader)),
        None => Box::new(PageFile::new(owned(pages), checksums, reader)),
    };
    let control = owned(control);

    let pids: Vec<Pid> = image.processes.iter().map(|process| process.task.pid).collect();
    let members = pids.iter().map(|&pid| sys::pidfd_open(pid)).collect::<Result<Vec<_>, _>>();
    let members = members.map_err(|error| format!("opening the processes of the tree: {error}"))?;
    let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).map_or(1024, |it| it.0);
    // Where it cannot be had, the guardian is what there is.
    let numbers = limit.min(DESCRIPTORS.0 + DESCRIPTORS.1 * pids.len() as u64);
    let last_line = LastLine::arm(&pids, numbers as RawFd).ok();
    let notes = Notes::new().map_err(|error| format!("memory to share with the guardian: {error}"))?;
    let failed = |errno: Errno| format!("epoll: {errno}");
    // Never dropped, also where it fails or panics: that would close the descriptors, and a page that is missing then is one
    // of zeros.
    let pager = Box::leak(Box::new(Pager {
        pids,
        memories: image.processes.iter().map(|process| &process.memory).collect(),
        objects: &image.memory_objects,
        options,
        sweep: options.sweep,
        source,
        epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed)?,
        control,
        spaces: Vec::new(),
        deferred: Vec::new(),
        hot: VecDeque::new(),
        turn: 0,
        last_fault: None,
        last_step: Instant::now(),
        stuck: false,
        released: None,
        members,
        notes,
        last_line,
        guardian: None,
        buffer: vec![0; (STEP * PAGE_SIZE) as usize],
        recorder: None,
        latencies: Histogram::new(),
        figures: Figures::default(),
    }));
    pager.epoll.add(&pager.control, EpollEvent::new(EpollFlags::EPOLLIN, CONTROL)).map_err(failed)?;
    for member in &pager.members {
        pager
            .epoll
            .add(member, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, MEMBER))
            .map_err(failed)?;
    }
    pager.start_guardian()?;
    pager.serve()
}

#[allow(unsafe_code)]
fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: kept open by `keep_only`; what owned it before the fork is never used again in this process.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

// Tokens of the epoll; below these, the index of a space.
const CONTROL: u64 = 1 << 32;
const MEMBER: u64 = 2 << 32;
const GUARDIAN: u64 = 3 << 32;

/// One address space, with what of it is private; or a shared object; or what an address space maps of such.
pub(crate) struct Space {
    pub fault: Userfault,
    pub kind: Kind,
    pub left: Outstanding,
    /// Where the sweep goes on.
    pub cursor: u64,
    /// Up to where the source was told.
    pub announced: u64,
    /// Whose it is: of a process that the tree made since, not known until it touches a missing page.
    pub pid: Option<Pid>,
    /// Its index in the image.
    pub process: Option<usize>,
    /// What a child of it finds as zeros, as it was when it was forked itself (`MADV_WIPEONFORK`).
    pub wiped: Vec<(u64, u64)>,
}

/// Why a page is brought in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    WorkingSet,
    Fault,
    Around,
    Sweep,
}

/// The recording of a working set.
struct Recorder {
    directory: PathBuf,
    until: Option<Instant>,
    touched: WorkingSet,
    _note: Recording,
}

pub(crate) struct Pager<'a> {
    /// Of the processes of the image.
    pids: Vec<Pid>,
    memories: Vec<&'a Memory>,
    pub(crate) objects: &'a [Object],
    options: &'a Options,
    /// Bring in what nobody asked for, too. SIGUSR1 begins with it, where that was not wanted before.
    sweep: bool,
    pub(crate) source: Box<dyn Source + 'a>,
    epoll: Epoll,
    control: OwnedFd,
    /// By their tokens; none, where one is done with.
    pub(crate) spaces: Vec<Option<Space>>,
    /// Faults that could not be answered while their address space was being changed, and when they came.
    deferred: Vec<(usize, u64, Instant)>,
    /// What lies around pages that were wanted.
    hot: VecDeque<(usize, u64, u64)>,
    /// The space that is swept.
    turn: usize,
    last_fault: Option<Instant>,
    /// Of the sweep.
    last_step: Instant,
    /// The last step could do nothing, because an address space was being changed.
    stuck: bool,
    released: Option<Instant>,
    members: Vec<OwnedFd>,
    notes: Notes,
    last_line: Option<LastLine>,
    guardian: Option<(Pid, OwnedFd)>,
    buffer: Vec<u8>,
    recorder: Option<Recorder>,
    latencies: Histogram,
    pub(crate) figures: Figures,
}

impl Pager<'_> {
    fn serve(&mut self) -> Result<(), String> {
        let mut ready = [EpollEvent::empty(); 32];
        loop {
            if self.released.is_some() && self.spaces.iter().all(Option::is_none) {
                return self.finish();
            }
            self.sweep |= sys::sweep_signal_came();
            if self.recorder.as_ref().is_some_and(|it| it.until.is_some_and(|until| until <= Instant::now()))
                || sys::sweep_signal_came()
            {
                self.end_recording();
            }
            let busy = self.may_sweep() && !self.stuck;
            let patience = match (busy, self.stuck || !self.deferred.is_empty()) {
                (true, _) => EpollTimeout::ZERO,
                (false, true) => EpollTimeout::from(1u8),
                (false, false) if self.recorder.is_some() => EpollTimeout::from(20u8),
                (false, false) => EpollTimeout::from(500u16),
            };
            self.stuck = false;
            let count = match self.epoll.wait(&mut ready, patience) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(errno) => return Err(format!("epoll: {errno}")),
            };
            for event in &ready[..count] {
                match event.data() {
                    CONTROL => self.hear()?,
                    MEMBER => self.bury(),
                    GUARDIAN => self.replace_guardian()?,
                    space => self.take_events(space as usize)?,
                }
            }
            for (space, address, since) in std::mem::take(&mut self.deferred) {
                self.answer(space, address, since)?;
            }
            if count == 0 && !busy {
                self.bury();
            }
            if self.may_sweep() && !self.expects_a_fault() {
                self.step()?;
                self.last_step = Instant::now();
            }
        }
    }

    /// Whether a thread whose fault was just answered will probably touch the next missing page in a moment, and would have to
    /// wait for a step of the sweep.
    fn expects_a_fault(&self) -> bool {
        self.last_step.elapsed() < MOST_WAIT && self.last_fault.is_some_and(|last| last.elapsed() < NEXT_FAULT)
    }

    fn may_sweep(&self) -> bool {
        self.released.is_some() && self.sweep && self.recorder.is_none() && self.spaces.iter().any(Option::is_some)
    }

    fn finish(&mut self) -> Result<(), String> {
        self.end_recording();
        self.notes.set_done();
        if let Some(last_line) = &mut self.last_line {
            last_line.disarm();
        }
        self.figures.complete_us = self.options.begun.elapsed().as_micros() as u64;
        self.figures.sweep_us = self.released.map_or(0, |released| released.elapsed().as_micros() as u64);
        self.figures.fault_latency_us = self.latencies.percentiles();
        let text = serde_json::to_string(&self.figures).map_err(|error| error.to_string())?;
        tell(self.control.as_raw_fd(), message::DONE, &text);
        Ok(())
    }

    // --- the command ---

    /// Takes one message of the restore command.
    fn hear(&mut self) -> Result<(), String> {
        let mut bytes = [0u8; 64];
        let mut vectors = [std::io::IoSliceMut::new(&mut bytes)];
        let mut space = cmsg_space!([RawFd; 1]);
        let (length, fd) =
            match recvmsg::<()>(self.control.as_raw_fd(), &mut vectors, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
                Ok(message) => {
                    let fds = message.cmsgs().ok().and_then(|mut all| {
                        all.find_map(|one| match one {
                            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
                            _ => None,
                        })
                    });
                    (message.bytes, fds.map(owned))
                }
                Err(Errno::EINTR | Errno::EAGAIN) => return Ok(()),
                // The other end was closed with something of ours unread.
                Err(_) => (0, None),
            };
        let word = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        match (if length == 0 { 0 } else { bytes[0] }, fd) {
            (message::SPACE, Some(fd)) => {
                let process = word(8) as usize;
                self.figures.pages.eager += word(16);
                let mut left = Outstanding::default();
                for mapping in
                    self.memory_of(process).into_iter().flat_map(|memory| lazy_mappings(memory, self.options))
                {
                    for run in &mapping.pages {
                        left.add(Run { start: run.start, first: run.extent.first, pages: run.extent.pages });
                    }
                }
                self.add_space(fd, Kind::Private, left, Some(process), Vec::new())
            }
            (message::OBJECT, Some(fd)) => self.add_object(word(8) as usize, fd),
            (message::SHARED, Some(fd)) => {
                let process = word(8) as usize;
                self.figures.pages.eager += word(16);
                let windows = self.windows_of(process);
                self.add_space(fd, Kind::Windows(windows), Outstanding::default(), Some(process), Vec::new())
            }
            (message::PREPARE, _) => {
                self.bring_working_set()?;
                self.begin_recording();
                tell(self.control.as_raw_fd(), message::PREPARED, "");
                Ok(())
            }
            (message::RELEASED, _) => {
                self.figures.release_us = word(8);
                let released = *self.released.get_or_insert_with(Instant::now);
                if let (Some(recorder), WorkingSetUse::Record { within, .. }) =
                    (&mut self.recorder, &self.options.working_set)
                {
                    recorder.until = within.map(|within| released + within);
                }
                Ok(())
            }
            // The command is gone. If that was before the release, so is the tree, or soon; but whether it was, we cannot
            // know: as long as there is memory that misses pages, we stay.
            _ => {
                let _ = self.epoll.delete(&self.control);
                self.released.get_or_insert_with(Instant::now);
                Ok(())
            }
        }
    }

    pub(crate) fn add_space(
        &mut self,
        fd: OwnedFd,
        kind: Kind,
        left: Outstanding,
        process: Option<usize>,
        wiped: Vec<(u64, u64)>,
    ) -> Result<(), String> {
        let fault = Userfault::from_fd(fd);
        let token = self.spaces.len() as u64;
        let pid = process.and_then(|process| self.pids.get(process).copied());
        let event = EpollEvent::new(EpollFlags::EPOLLIN, token);
        self.epoll.add(fault.fd(), event).map_err(|errno| format!("watching a userfaultfd: {errno}"))?;
        self.spaces.push(Some(Space { fault, kind, left, cursor: 0, announced: 0, pid, process, wiped }));
        self.close_if_done(token as usize);
        Ok(())
    }

    pub(crate) fn memory_of(&self, process: usize) -> Option<&Memory> {
        self.memories.get(process).copied()
    }

    // --- the working set ---

    /// Brings in what was touched first the last time.
    fn bring_working_set(&mut self) -> Result<(), String> {
        let WorkingSetUse::Use { directory, fetched } = &self.options.working_set else { return Ok(()) };
        let begun = Instant::now();
        let (set, trouble) = WorkingSet::choose(directory.as_deref(), fetched);
        self.figures.working_set_trouble = trouble;
        let Some((set, is_guess)) = set else { return Ok(()) };
        self.figures.working_set_guessed = is_guess;
        // Where the pages of the page file belong: number, how many, address, space.
        let mut places = Vec::new();
        for (index, space) in self.spaces.iter().enumerate() {
            let mut note = |run: &Pages, base: u64| {
                places.push((run.extent.first, run.extent.pages, base + run.start, index));
            };
            match space.as_ref().map(|space| (&space.kind, space.process)) {
                Some((Kind::Private, Some(process))) => lazy_mappings(self.memories[process], self.options)
                    .flat_map(|mapping| &mapping.pages)
                    .for_each(|run| note(run, 0)),
                Some((Kind::Object { id, window }, _)) => {
                    self.objects[*id].pages.iter().for_each(|run| note(run, window.address()));
                }
                _ => {}
            }
        }
        places.sort_unstable();
        let mut runs = Vec::new();
        for (first, pages) in set.sorted() {
            let from = places.partition_point(|(start, length, ..)| start + length <= first);
            for &(start, length, address, index) in &places[from..] {
                let (page, end) = (start.max(first), (start + length).min(first + pages));
                if start >= first + pages {
                    break;
                }
                let run = Run { start: address + (page - start) * PAGE_SIZE, first: page, pages: end - page };
                runs.push((index, run));
            }
        }
        // From far away they come one behind the other, instead of each when it is asked for.
        if self.options.pages_from.is_some() {
            runs.iter().for_each(|(_, run)| self.source.announce(*run));
        }
        for (index, mut rest) in runs {
            while rest.pages > 0 {
                let run = Run { pages: rest.pages.min(STEP), ..rest };
                while !self.source.is_ready(run)? {
                    std::thread::sleep(SOON);
                }
                self.bring(index, run, Reason::WorkingSet)?;
                rest = rest.after(run.pages);
            }
        }
        for index in 0..self.spaces.len() {
            self.close_if_done(index);
        }
        self.figures.working_set_us = begun.elapsed().as_micros() as u64;
        Ok(())
    }

    fn begin_recording(&mut self) {
        let WorkingSetUse::Record { directory, .. } = &self.options.working_set else { return };
        // Not to be able to record is no reason to end the tree.
        let note = match Recording::begin(directory) {
            Ok(note) => note,
            Err(error) => {
                self.figures.working_set_trouble = Some(format!("recording in {}: {error}", directory.display()));
                return;
            }
        };
        let (directory, touched) = (directory.clone(), WorkingSet::default());
        self.recorder = Some(Recorder { directory, until: None, touched, _note: note });
    }

    fn end_recording(&mut self) {
        let Some(recorder) = self.recorder.take() else { return };
        let touched = recorder.touched;
        let before = WorkingSet::load(&recorder.directory).ok().flatten().map(|before| {
            let (pages, hits) = (before.pages(), before.shared(&touched));
            let hit_rate = 100.0 * hits as f64 / touched.pages().max(1) as f64;
            Compared { pages, hits, hit_rate, wasted: pages - hits }
        });
        self.figures.recorded = Some(Recorded { pages: touched.pages(), before });
        if let Err(error) = touched.store(&recorder.directory) {
            let text = format!("writing the working set of {}: {error}", recorder.directory.display());
            self.figures.working_set_trouble = Some(text);
        }
    }

    // --- the guardian ---

    fn start_guardian(&mut self) -> Result<(), String> {
        let failed = |error: std::io::Error| format!("starting the guardian: {error}");
        let control = self.control.as_fd();
        let pager = Pid(std::process::id() as i32);
        let (members, notes, on_loss) = (&self.members[..], &self.notes, self.options.on_loss);
        let guardian = guardian::start(&Guarded { pager, members, notes, on_loss, control }).map_err(failed)?;
        let pidfd = sys::pidfd_open(guardian).map_err(failed)?;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, GUARDIAN);
        self.epoll.add(&pidfd, event).map_err(|errno| format!("watching the guardian: {errno}"))?;
        self.guardian = Some((guardian, pidfd));
        Ok(())
    }

    /// Somebody killed it.
    fn replace_guardian(&mut self) -> Result<(), String> {
        if let Some((guardian, pidfd)) = self.guardian.take() {
            let _ = self.epoll.delete(&pidfd);
            sys::reap(guardian);
        }
        self.start_guardian()
    }

    // --- what the tree does ---

    fn take_events(&mut self, index: usize) -> Result<(), String> {
        let Some(space) = &mut self.spaces[index] else { return Ok(()) };
        if let Kind::Windows(_) = space.kind {
            return self.take_shared_events(index);
        }
        let mut events = Vec::new();
        space.fault.events(&mut events).map_err(|error| format!("reading a userfaultfd: {error}"))?;
        let now = Instant::now();
        let mut faults = Vec::new();
        for event in events {
            let Some(space) = &mut self.spaces[index] else { break };
            match event {
                Event::Fault { address, tid } => {
                    self.meet(index, tid);
                    faults.push(address);
                }
                Event::Fork(fd) => {
                    let mut left = space.left.clone();
                    let wiped = space.pid.and_then(wiped_on_fork).unwrap_or_else(|| space.wiped.clone());
                    for &(start, end) in &wiped {
                        left.take(start, end);
                    }
                    self.add_space(fd, Kind::Private, left, None, wiped)?;
                }
                Event::Moved { from, to, len } => {
                    space.left.shift(from, to, len);
                    (space.cursor, space.announced) = (0, 0);
                }
                Event::Removed { start, end } | Event::Unmapped { start, end } => {
                    self.figures.pages.never += space.left.take(start, end);
                }
            }
        }
        for address in faults {
            self.figures.faults += 1;
            self.answer(index, address, now)?;
        }
        self.close_if_done(index);
        Ok(())
    }

    /// Learns whose an address space is, where it was not known, by one of its threads.
    pub(crate) fn meet(&mut self, index: usize, tid: Pid) {
        if let Some(space) = &mut self.spaces[index]
            && space.pid.is_none()
            && let Some(pid) = leader_of(tid)
            && let Ok(pidfd) = sys::pidfd_open(pid)
        {
            space.pid = Some(pid);
            self.notes.add_member(pidfd.as_raw_fd());
            self.members.push(pidfd);
        }
    }

    /// Gives a thread the page it waits for.
    pub(crate) fn answer(&mut self, index: usize, address: u64, since: Instant) -> Result<(), String> {
        // Shared memory is in another place, and the same for all who wait.
        let (owner, place) = self.place_of(index, address);
        let missing = self.spaces[owner].as_ref().and_then(|space| space.left.page(place));
        let outcome = match missing {
            Some(run) => {
                let step = STEP * PAGE_SIZE;
                let window = place / step * step;
                if let Some(recorder) = &mut self.recorder {
                    recorder.touched.push(run.first);
                } else if self.sweep {
                    self.hot.push_back((owner, window, window + step));
                }
                self.last_fault = Some(Instant::now());
                self.bring(owner, run, Reason::Fault)?
            }
            None => Outcome::Done,
        };
        let Some(space) = &mut self.spaces[index] else { return Ok(()) };
        let outcome = match missing {
            Some(_) => {
                if owner != index {
                    space.fault.wake(address, PAGE_SIZE);
                    self.close_if_done(owner);
                }
                outcome
            }
            None => match space.fault.zero(address, PAGE_SIZE).1 {
                None => {
                    self.figures.zero_faults += 1;
                    Outcome::Done
                }
                Some(Obstacle::Changing) => Outcome::Changing,
                Some(Obstacle::Gone) => {
                    self.drop_space(index);
                    return Ok(());
                }
                Some(Obstacle::There | Obstacle::NotMapped) => {
                    space.fault.wake(address, PAGE_SIZE);
                    Outcome::Done
                }
                Some(Obstacle::Other(errno)) => return Err(refused("a page of zeros", address, errno)),
            },
        };
        match outcome {
            Outcome::Done => self.latencies.add(since.elapsed()),
            Outcome::Changing => self.deferred.push((index, address, since)),
        }
        Ok(())
    }

    /// Puts pages into an address space.
    pub(crate) fn bring(&mut self, index: usize, run: Run, reason: Reason) -> Result<Outcome, String> {
        let content = self.source.read(run, reason == Reason::Sweep, &mut self.buffer[..run.bytes() as usize])?;
        let mut done = 0;
        // Where the whole does not fit one mapping any more, page by page.
        let mut at_once = run.pages;
        while done < run.pages {
            let Some(space) = &mut self.spaces[index] else { return Ok(Outcome::Done) };
            let rest = run.after(done);
            let pages = rest.pages.min(at_once);
            let from = (done * PAGE_SIZE) as usize;
            let (bytes, obstacle) = space.fault.copy(rest.start, &content[from..from + (pages * PAGE_SIZE) as usize]);
            let copied = space.left.take(rest.start, rest.start + bytes);
            done += bytes / PAGE_SIZE;
            match reason {
                Reason::WorkingSet => self.figures.pages.working_set += copied,
                Reason::Fault => self.figures.pages.fault += copied,
                Reason::Around => self.figures.pages.around += copied,
                Reason::Sweep => self.figures.pages.sweep += copied,
            }
            match obstacle {
                None => continue,
                Some(Obstacle::There) => space.fault.wake(rest.start, PAGE_SIZE),
                Some(Obstacle::Changing) => return Ok(Outcome::Changing),
                Some(Obstacle::NotMapped) if pages > 1 => {
                    at_once = 1;
                    continue;
                }
                Some(Obstacle::NotMapped) => {
                    // Either it was unmapped, or it is on its way to somewhere else and the event is yet to come. In that
                    // case the kernel says so first, whatever the address.
                    match space.fault.probe() {
                        Obstacle::NotMapped => {}
                        Obstacle::Gone => {
                            self.drop_space(index);
                            return Ok(Outcome::Done);
                        }
                        _ => return Ok(Outcome::Changing),
                    }
                    space.fault.wake(rest.start, PAGE_SIZE);
                    self.figures.pages.never += 1;
                }
                Some(Obstacle::Gone) => {
                    self.drop_space(index);
                    return Ok(Outcome::Done);
                }
                Some(Obstacle::Other(errno)) => return Err(refused("a page", rest.start, errno)),
            }
            space.left.take(rest.start, rest.start + PAGE_SIZE);
            done += 1;
        }
        Ok(Outcome::Done)
    }

    // --- the sweep ---

    /// Brings in the next few pages.
    fn step(&mut self) -> Result<(), String> {
        while let Some((index, start, end)) = self.hot.pop_front() {
            let Some(space) = &self.spaces[index] else { continue };
            let Some(run) = space.left.next(start, end, STEP) else { continue };
            if !self.source.is_ready(run)? {
                // It comes with the sweep.
                continue;
            }
            if run.end() < end {
                self.hot.push_front((index, run.end(), end));
            }
            if self.bring(index, run, Reason::Around)? == Outcome::Changing {
                self.stuck = true;
            }
            self.close_if_done(index);
            return Ok(());
        }
        for _ in 0..self.spaces.len() {
            let index = self.turn % self.spaces.len();
            let Some(space) = &mut self.spaces[index] else {
                self.turn += 1;
                continue;
            };
            let next = space.left.next(space.cursor, u64::MAX, STEP).or_else(|| space.left.next(0, u64::MAX, STEP));
            let Some(run) = next else {
                self.close_if_done(index);
                continue;
            };
            if space.announced < run.start + AHEAD / 2 * PAGE_SIZE {
                let from = space.announced.max(run.start);
                if let Some(ahead) = space.left.next(from, u64::MAX, AHEAD) {
                    self.source.announce(ahead);
                    space.announced = ahead.end();
                }
            }
            if !self.source.is_ready(run)? {
                self.stuck = true;
                return Ok(());
            }
            space.cursor = run.end();
            if self.bring(index, run, Reason::Sweep)? == Outcome::Changing {
                // Another one meanwhile.
                self.turn += 1;
                self.stuck = true;
                continue;
            }
            self.stuck = false;
            self.close_if_done(index);
            return Ok(());
        }
        Ok(())
    }

    /// Lets go of an address space that misses nothing any more: the kernel unregisters its memory, wakes who waits for a
    /// page of zeros, and nothing is left to be seen.
    pub(crate) fn close_if_done(&mut self, index: usize) {
        let Some(space) = &self.spaces[index] else { return };
        let is_done = match &space.kind {
            Kind::Windows(_) => !self.misses_shared(index),
            Kind::Private | Kind::Object { .. } => space.left.left() == 0,
        };
        if is_done {
            self.drop_space(index);
        }
    }

    pub(crate) fn drop_space(&mut self, index: usize) {
        let Some(space) = self.spaces[index].take() else { return };
        self.figures.pages.never += space.left.left();
        match space.kind {
            Kind::Private => _ = self.epoll.delete(space.fault.fd()),
            Kind::Windows(windows) => {
                let _ = self.epoll.delete(space.fault.fd());
                self.drop_unseen(&windows);
            }
            Kind::Object { .. } => {
                for index in 0..self.spaces.len() {
                    if matches!(&self.spaces[index], Some(Space { kind: Kind::Windows(_), .. })) {
                        self.close_if_done(index);
                    }
                }
            }
        }
    }

    /// Lets go of the address spaces that are no more.
    fn bury(&mut self) {
        for index in 0..self.spaces.len() {
            if self.spaces[index].as_ref().is_some_and(|space| space.kind.is_of_tree() && space.fault.is_gone()) {
                self.drop_space(index);
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Done,
    /// The address space is being changed: once more, when the event was taken.
    Changing,
}

fn refused(what: &str, address: u64, errno: i32) -> String {
    format!("putting {what} at {address:#x}: {}", std::io::Error::from_raw_os_error(errno))
}

/// The registered memory of a process that a child finds as zeros (`MADV_WIPEONFORK`): only `/proc/PID/smaps` shows it.
fn wiped_on_fork(pid: Pid) -> Option<Vec<(u64, u64)>> {
    let smaps = ProcDir::open(pid).and_then(|proc| proc.read("smaps")).ok()?;
    let mappings = ckpt_core::procfs::Mapping::parse_all(&smaps)?;
    let wiped = mappings.iter().filter(|mapping| mapping.has("wf") && mapping.has("um"));
    Some(wiped.map(|mapping| (mapping.start, mapping.end)).collect())
}

/// The process of a thread.
fn leader_of(tid: Pid) -> Option<Pid> {
    let status = ProcDir::open(tid).and_then(|proc| proc.status()).ok()?;
    Some(Pid(*status.numbers("Tgid")?.first()? as i32))
}
