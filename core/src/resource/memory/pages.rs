//! Page data on its way into the image: the target itself writes it, or a copy of it ([`snapshot`](super::snapshot)).
//! [`fill`](super::fill) is the way back.

use std::collections::VecDeque;
use std::io;

use nix::errno::Errno;
use nix::fcntl::OFlag;

use crate::args;
use crate::batch::{Arg, Batch, CallId, Slot, Sysno};
use crate::dump::interruption;
use crate::error::DumpError;
use crate::image::Process;
use crate::progress::Meter;
use crate::resource::memory::objects::{Buffer, checksums, write_direct};
use crate::resource::memory::{Mapping, Memory, NAME, Pages, Source, snapshot};
use crate::store::{ImageWriter, PageExtent};
use crate::target::{PAGE_SIZE, PageRun, PrivatePages, RemotePtr, Rseq, Target, TargetError};

/// Pages that one batch writes: the medium begins with them when they are there, while the next are copied.
const WRITE_PAGES: u64 = 1024;
/// Runs in one batch at most.
const BATCH_RUNS: usize = 400;

/// Runs of pages that lie one after the other in the page file, and fit one batch.
#[derive(Debug, Default)]
pub(super) struct Load {
    pub runs: Vec<PageRun>,
    pub pages: u64,
    /// Number of the first page in the page file.
    pub first: u64,
}

/// Cuts saved pages into loads of so many pages at most. `runs` are in the order of the page file.
pub(super) fn loads(runs: impl Iterator<Item = Pages>, most: u64) -> Vec<Load> {
    let mut loads: Vec<Load> = Vec::new();
    for run in runs {
        let (mut start, mut extent) = (run.start, run.extent);
        while extent.pages > 0 {
            let fits = loads.last().is_some_and(|load| {
                load.runs.len() < BATCH_RUNS && load.pages < most && load.first + load.pages == extent.first
            });
            if !fits {
                loads.push(Load { first: extent.first, ..Load::default() });
            }
            let load = loads.last_mut().expect("there is one");
            let pages = extent.pages.min(most - load.pages);
            load.runs.push(PageRun { start, pages });
            load.pages += pages;
            start += pages * PAGE_SIZE;
            extent = PageExtent { first: extent.first + pages, pages: extent.pages - pages };
        }
    }
    loads
}

impl Load {
    pub fn bytes(&self) -> u64 {
        self.pages * PAGE_SIZE
    }

    /// Itself in pieces of so many pages at most.
    pub fn pieces(&self, most: u64) -> Vec<Load> {
        let mut first = self.first;
        let runs = self.runs.iter().map(|run| {
            let extent = PageExtent { first, pages: run.pages };
            first += run.pages;
            Pages { start: run.start, extent }
        });
        loads(runs, most)
    }

    /// The iovecs of its runs.
    pub fn vectors(&self, batch: &mut Batch) -> Slot {
        let words: Vec<u64> = self.runs.iter().flat_map(|run| [run.start, run.pages * PAGE_SIZE]).collect();
        batch.words(&words)
    }

    /// Adds the checksums of its pages, in order.
    pub fn checksums(&self, batch: &mut Batch) -> Vec<Slot> {
        self.runs.iter().map(|run| batch.checksum_pages(RemotePtr(run.start), run.pages as usize)).collect()
    }
}

pub(super) fn sums(replies: &crate::batch::Replies, slots: &[Slot]) -> Vec<u32> {
    let words = slots.iter().flat_map(|&slot| replies.bytes(slot).chunks_exact(4));
    words.map(|word| u32::from_ne_bytes(word.try_into().expect("four bytes"))).collect()
}

/// Has all targets write their private pages into the image, at the same time: all that `may_wait` says nothing else of. It is
/// asked about the pages of each process that a copy of it would have as well, by their number; what may wait has its place in
/// the image all the same.
pub fn write_pages(
    targets: &mut [Box<dyn Target>],
    processes: &mut [Process],
    may_wait: &dyn Fn(u64) -> bool,
    store: &mut dyn ImageWriter,
    meter: &mut Meter<'_>,
) -> Result<Later, DumpError> {
    let mut writings = Vec::with_capacity(targets.len());
    let result = write_all(targets, processes, may_wait, &mut writings, store, meter);
    if result.is_err() {
        // What was begun has a descriptor of ours until it is done.
        for (target, writing) in targets.iter_mut().zip(&writings) {
            writing.give_up(&mut **target);
        }
    }
    result
}

/// Pages that have their places in the image and are not written yet.
pub struct Later {
    /// Of each process.
    loads: Vec<VecDeque<Load>>,
}

impl Later {
    pub fn is_empty(&self) -> bool {
        self.loads.iter().all(VecDeque::is_empty)
    }

    /// The pages of each process.
    pub fn pages(&self) -> impl Iterator<Item = u64> + '_ {
        self.loads.iter().map(|loads| loads.iter().map(|load| load.pages).sum())
    }

    /// Has them written, by a process or its copy for each that has some.
    pub fn write<'a>(
        self,
        writers: impl Iterator<Item = Option<&'a mut dyn Target>>,
        are_copies: bool,
        store: &mut dyn ImageWriter,
        meter: &mut Meter<'_>,
    ) -> Result<(), DumpError> {
        let (mut targets, mut writings) = (Vec::new(), Vec::new());
        for (target, loads) in writers.zip(self.loads) {
            if let (Some(target), false) = (target, loads.is_empty()) {
                targets.push(target);
                writings.push(Writing { loads, gives_back: are_copies, ..Writing::default() });
            }
        }
        let mut all = || {
            for (target, writing) in targets.iter_mut().zip(&mut writings) {
                writing.start_next(*target, store)?;
            }
            finish_all(&mut targets, &mut writings, store, meter)
        };
        let result = all();
        if result.is_err() {
            for (target, writing) in targets.iter_mut().zip(&writings) {
                writing.give_up(*target);
            }
        }
        result
    }
}

fn write_all(
    targets: &mut [Box<dyn Target>],
    processes: &mut [Process],
    may_wait: &dyn Fn(u64) -> bool,
    writings: &mut Vec<Writing>,
    store: &mut dyn ImageWriter,
    meter: &mut Meter<'_>,
) -> Result<Later, DumpError> {
    let (mut by_us, mut later) = (Vec::new(), Vec::new());
    for (target, process) in targets.iter_mut().zip(&mut *processes) {
        let pages = find_pages(&mut **target, process)?;
        let mappings = &process.memory.mappings;
        let is_copied = |(index, _): &(usize, PageRun)| snapshot::is_copied(&mappings[*index]);
        let (copied, mut at_once): (Vec<_>, Vec<_>) = pages.by_target.iter().copied().partition(is_copied);
        if may_wait(copied.iter().map(|(_, run)| run.pages).sum()) {
            let places = place(&mut process.memory, &copied, store)?;
            later.push(loads(places.into_iter(), WRITE_PAGES).into());
        } else {
            at_once = pages.by_target;
            later.push(VecDeque::new());
        }
        let by_target = place(&mut process.memory, &at_once, store)?;
        writings.push(Writing { loads: loads(by_target.into_iter(), WRITE_PAGES).into(), ..Writing::default() });
        writings.last_mut().expect("just pushed").start_next(&mut **target, store)?;
        by_us.push(pages.by_us);
        for (mapping, run) in pages.guards {
            process.memory.mappings[mapping].guards.push(run);
        }
    }
    // Behind all others, and so beside each other.
    let mut copies = Vec::new();
    for (index, (process, pages)) in processes.iter_mut().zip(by_us).enumerate() {
        copies.extend(place(&mut process.memory, &pages, store)?.into_iter().map(|pages| (index, pages)));
    }
    for mapping in processes.iter_mut().flat_map(|process| &mut process.memory.mappings) {
        mapping.pages.sort_unstable_by_key(|pages| pages.start);
    }
    let mut all: Vec<&mut dyn Target> = targets.iter_mut().map(|target| &mut **target).collect();
    finish_all(&mut all, writings, store, meter)?;
    copy_pages(&mut all, &copies, store, meter)?;
    Ok(Later { loads: later })
}

/// Writes on until nobody has anything left to write.
fn finish_all(
    targets: &mut [&mut dyn Target],
    writings: &mut [Writing],
    store: &mut dyn ImageWriter,
    meter: &mut Meter<'_>,
) -> Result<(), DumpError> {
    let mut busy: Vec<usize> = (0..writings.len()).collect();
    while !busy.is_empty() {
        let mut still = Vec::new();
        for index in busy {
            interruption()?;
            let (target, writing) = (&mut *targets[index], &mut writings[index]);
            if let Some(written) = writing.finish_one(target)? {
                // The next is on its way before the store looks after this one.
                writing.start_next(target, store)?;
                written.note(target, store, meter)?;
                still.push(index);
            }
        }
        busy = still;
    }
    Ok(())
}

/// Private pages of a process, each run within one mapping: (index of the mapping, run).
#[derive(Default)]
struct Found {
    by_target: Vec<(usize, PageRun)>,
    /// What is copied by us: memory that its owner may not read; and the pages that the kernel writes to while the owner
    /// runs our calls, which would not be the same in the checksum and on the disk (the processor's number of `rseq`); and
    /// those that we have written to ourselves, where what was there has to be put in.
    by_us: Vec<(usize, PageRun)>,
    guards: Vec<(usize, PageRun)>,
}

fn find_pages(target: &mut dyn Target, process: &Process) -> Result<Found, DumpError> {
    let pid = target.pid();
    let mappings = &process.memory.mappings;
    let end = mappings.last().map_or(0, |mapping| mapping.end);
    let pages = target.private_pages(0, end);
    let PrivatePages { data, guards } = pages.map_err(|source| DumpError::Target { resource: NAME, pid, source })?;
    // A program that may not write a file as large as the image leaves all to us.
    let limited = process.limits.limits[libc::RLIMIT_FSIZE as usize].soft != u64::MAX;
    let rseqs = process.threads.iter().filter_map(|thread| thread.context.rseq);
    let areas = rseqs.map(|Rseq { address, size, .. }| (address.0, u64::from(size.max(1))));
    let covered = target.covered().into_iter().map(|(start, bytes)| (start.0, bytes.len() as u64));
    let pages = |(start, size): (u64, u64)| {
        (start / PAGE_SIZE..(start + size).div_ceil(PAGE_SIZE)).map(|page| page * PAGE_SIZE)
    };
    let mut changing: Vec<u64> = areas.chain(covered).flat_map(pages).collect();
    changing.sort_unstable();
    changing.dedup();
    let mut found = Found { guards: cut(&guards, mappings), ..Found::default() };
    for (index, run) in cut(&data, mappings) {
        let mapping = &mappings[index];
        if mapping.shared || matches!(mapping.source, Source::Vdso | Source::Vvar) {
            continue;
        }
        let mut at = run.start;
        while at < run.end() {
            let next = changing[changing.partition_point(|&page| page < at)..].first().copied();
            let end = match next {
                Some(page) if page == at => at + PAGE_SIZE,
                next => next.map_or(run.end(), |page| page.min(run.end())),
            };
            let ours = limited || mapping.protection & libc::PROT_READ == 0 || next == Some(at);
            let pieces = if ours { &mut found.by_us } else { &mut found.by_target };
            pieces.push((index, PageRun { start: at, pages: (end - at) / PAGE_SIZE }));
            at = end;
        }
    }
    Ok(found)
}

/// Cuts runs where mappings begin and end: (index of the mapping, run). Both are sorted.
fn cut(runs: &[PageRun], mappings: &[Mapping]) -> Vec<(usize, PageRun)> {
    let mut pieces = Vec::with_capacity(runs.len());
    let mut index = 0;
    for run in runs {
        let mut at = run.start;
        while at < run.end() {
            while index < mappings.len() && mappings[index].end <= at {
                index += 1;
            }
            let Some(mapping) = mappings.get(index) else { return pieces };
            let (start, end) = (at.max(mapping.start), run.end().min(mapping.end));
            if start < end {
                pieces.push((index, PageRun { start, pages: (end - start) / PAGE_SIZE }));
            }
            at = start.max(end);
        }
    }
    pieces
}

/// Gives runs of pages their places in the page file, one after the other.
fn place(memory: &mut Memory, runs: &[(usize, PageRun)], store: &mut dyn ImageWriter) -> Result<Vec<Pages>, DumpError> {
    let mut first = store.reserve_pages(runs.iter().map(|(_, run)| run.pages).sum())?.first;
    let place = |&(mapping, run): &(usize, PageRun)| {
        let pages = Pages { start: run.start, extent: PageExtent { first, pages: run.pages } };
        first += run.pages;
        memory.mappings[mapping].pages.push(pages);
        pages
    };
    Ok(runs.iter().map(place).collect())
}

/// A target that writes its pages.
#[derive(Default)]
struct Writing {
    loads: VecDeque<Load>,
    running: Option<Running>,
    /// It is done by a copy, which is there for nothing else: it gives back what it has written, so that the program does not
    /// have to copy that any more when it writes to it.
    gives_back: bool,
    /// From where to where that is, of the load before.
    written: Option<(u64, u64)>,
}

/// A load that is being written.
struct Running {
    load: Load,
    batch: Batch,
    sums: Vec<Slot>,
    wrote: CallId,
}

impl Writing {
    fn start_next(&mut self, target: &mut dyn Target, store: &mut dyn ImageWriter) -> Result<(), DumpError> {
        let Some(load) = self.loads.pop_front() else { return Ok(()) };
        let pid = target.pid();
        let failed = |source: TargetError| DumpError::Target { resource: NAME, pid, source };
        let mut batch = Batch::new();
        let file = target.receive_fd(&mut batch).map_err(failed)?;
        if let Some((start, end)) = self.written.take() {
            // Between the runs is nothing that is written later. Holes in between are passed over, and said to be there.
            batch.try_call(Sysno::madvise, args![start, end - start, libc::MADV_DONTNEED]);
        }
        let sums = load.checksums(&mut batch);
        let vectors = load.vectors(&mut batch);
        let (pieces, place) = (load.runs.len(), load.first * PAGE_SIZE);
        let wrote = batch.try_call(Sysno::pwritev, &[file, vectors.into(), pieces.into(), place.into(), Arg::Value(0)]);
        batch.try_call(Sysno::close, &[file]);
        target.start(0, &batch).map_err(failed)?;
        self.running = Some(Running { load, batch, sums, wrote });
        target.send_fd(store.pages()).map_err(failed)
    }

    /// Waits for the load that is being written, if there is one.
    fn finish_one(&mut self, target: &mut dyn Target) -> Result<Option<Written>, DumpError> {
        let Some(Running { load, batch, sums: slots, wrote }) = self.running.take() else { return Ok(None) };
        let pid = target.pid();
        let replies = target.finish(0, &batch);
        let replies = replies.map_err(|source| DumpError::Target { resource: NAME, pid, source })?;
        let wrote = replies.result(wrote);
        if self.gives_back && wrote == Ok(load.bytes()) {
            self.written = load.runs.first().zip(load.runs.last()).map(|(first, last)| (first.start, last.end()));
        }
        Ok(Some(Written { load, sums: sums(&replies, &slots), wrote }))
    }

    /// Waits for what is being written, after a failure.
    fn give_up(&self, target: &mut dyn Target) {
        if let Some(running) = &self.running {
            let _ = target.finish(0, &running.batch);
        }
    }
}

/// A load that was written, or not.
struct Written {
    load: Load,
    sums: Vec<u32>,
    wrote: Result<u64, Errno>,
}

impl Written {
    fn note(
        self,
        target: &mut dyn Target,
        store: &mut dyn ImageWriter,
        meter: &mut Meter<'_>,
    ) -> Result<(), DumpError> {
        match self.wrote {
            Ok(wrote) if wrote == self.load.bytes() => {
                store.page_checksums(PageExtent { first: self.load.first, pages: self.load.pages }, &self.sums)?;
                meter.add(wrote);
                Ok(())
            }
            // A full disk gives a short count first. The same pages once more give the reason, or are written.
            Ok(_) => copy_pages(&mut [target], &saved_runs(&self.load), store, meter),
            Err(errno) => Err(DumpError::Io { what: "writing pages into the image".into(), source: errno.into() }),
        }
    }
}

/// The runs of a load, with their places in the page file.
fn saved_runs(load: &Load) -> Vec<(usize, Pages)> {
    let mut first = load.first;
    let mut runs = Vec::new();
    for run in &load.runs {
        runs.push((0, Pages { start: run.start, extent: PageExtent { first, pages: run.pages } }));
        first += run.pages;
    }
    runs
}

/// See [`Target::covered`].
type Covered = Vec<(RemotePtr, Vec<u8>)>;

/// Copies pages by `/proc/PID/mem`, which reads whatever the protection is. Each comes with the index of its process.
fn copy_pages(
    targets: &mut [&mut dyn Target],
    runs: &[(usize, Pages)],
    store: &mut dyn ImageWriter,
    meter: &mut Meter<'_>,
) -> Result<(), DumpError> {
    use std::os::unix::fs::FileExt;
    let mut copier = Copier { buffer: Buffer::new(), first: 0, pages: 0 };
    let mut open: Option<(usize, std::fs::File, Covered)> = None;
    for &(index, run) in runs {
        let pid = targets[index].pid();
        let failed = |what: &'static str| {
            move |source: io::Error| DumpError::Io { what: format!("{NAME} of process {pid}: {what}"), source }
        };
        let (_, memory, covered) = match &mut open {
            Some(known) if known.0 == index => known,
            other => {
                let memory = targets[index].proc().open_with("mem", OFlag::O_RDONLY).map_err(failed("opening it"))?;
                other.insert((index, memory, targets[index].covered()))
            }
        };
        let mut done = 0;
        while done < run.extent.pages {
            let bytes = copier.room(run.extent.first + done, run.extent.pages - done, store, meter)?;
            let pages = bytes.len() as u64 / PAGE_SIZE;
            let start = run.start + done * PAGE_SIZE;
            memory.read_exact_at(bytes, start).map_err(failed("reading it"))?;
            for (address, before) in &*covered {
                uncover(bytes, start, address.0, before);
            }
            done += pages;
        }
    }
    copier.flush(store, meter)
}

/// Puts back, in a copy of the memory from `start` on, what was at an address.
fn uncover(copy: &mut [u8], start: u64, address: u64, before: &[u8]) {
    let (from, to) = (address.max(start), (address + before.len() as u64).min(start + copy.len() as u64));
    if from < to {
        let bytes = &before[(from - address) as usize..(to - address) as usize];
        copy[(from - start) as usize..(to - start) as usize].copy_from_slice(bytes);
    }
}

/// Gathers pages that are beside each other in the page file, so that many are written at once.
struct Copier {
    buffer: Buffer,
    /// The pages in the buffer.
    first: u64,
    pages: u64,
}

impl Copier {
    /// Room for the pages from `first` on, for some of `wanted` at least. Whoever asks fills all of it.
    fn room(
        &mut self,
        first: u64,
        wanted: u64,
        store: &mut dyn ImageWriter,
        meter: &mut Meter<'_>,
    ) -> Result<&mut [u8], DumpError> {
        if self.first + self.pages != first || self.pages == Buffer::PAGES {
            self.flush(store, meter)?;
            self.first = first;
        }
        let pages = wanted.min(Buffer::PAGES - self.pages);
        let from = (self.pages * PAGE_SIZE) as usize;
        self.pages += pages;
        Ok(&mut self.buffer.pages(self.pages)[from..])
    }

    fn flush(&mut self, store: &mut dyn ImageWriter, meter: &mut Meter<'_>) -> Result<(), DumpError> {
        let bytes = self.buffer.pages(self.pages);
        write_direct(store, self.first, bytes)
            .map_err(|source| DumpError::Io { what: format!("{NAME}: writing it into the image"), source })?;
        store.page_checksums(PageExtent { first: self.first, pages: self.pages }, &checksums(bytes))?;
        meter.add(bytes.len() as u64);
        self.pages = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(start: u64, first: u64, pages: u64) -> Pages {
        Pages { start, extent: PageExtent { first, pages } }
    }

    #[test]
    fn loads_hold_what_fits_and_what_is_in_sequence() {
        let runs = [pages(0x1000, 0, 2), pages(0x9000, 2, 3), pages(0x20000, 9, 1)];
        let loads = loads(runs.into_iter(), 8192);
        assert_eq!(loads.len(), 2, "a gap in the page file begins a new load");
        assert_eq!((loads[0].pages, loads[0].runs.len(), loads[1].first), (5, 2, 9));
    }

    #[test]
    fn what_was_covered_comes_back() {
        let rows: [(u64, &[u8], &[u8; 8]); 5] = [
            (102, b"ab", b"..ab...."),
            (98, b"abcd", b"cd......"),
            (106, b"abcd", b"......ab"),
            (96, b"0123456789abcdef", b"456789ab"),
            (108, b"ab", b"........"),
        ];
        for (address, before, expected) in rows {
            let mut copy = *b"........";
            uncover(&mut copy, 100, address, before);
            assert_eq!(&copy, expected, "{address}");
        }
    }

    #[test]
    fn a_large_run_is_cut() {
        let loads = loads([pages(0, 0, 3 * 8192 + 1)].into_iter(), 8192);
        assert_eq!(loads.iter().map(|load| load.pages).collect::<Vec<_>>(), [8192, 8192, 8192, 1]);
        assert_eq!(loads[3].runs[0].start, 3 * 8192 * PAGE_SIZE);
        assert_eq!(saved_runs(&loads[1])[0], (0, pages(8192 * PAGE_SIZE, 8192, 8192)));
    }
}
