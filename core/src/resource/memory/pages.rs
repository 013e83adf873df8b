//! Page data: the target itself moves it between its memory and the image.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

use nix::fcntl::{OFlag, PosixFadviseAdvice, posix_fadvise};

use crate::args;
use crate::batch::{Arg, Batch, CallId, Slot, Sysno};
use crate::dump::interruption;
use crate::error::{DumpError, RestoreError};
use crate::image::Process;
use crate::progress::Meter;
use crate::resource::memory::objects::{Buffer, checksums, write_direct};
use crate::resource::memory::{Mapping, Memory, NAME, Pages, Source};
use crate::store::{ImageReader, ImageWriter, PageExtent};
use crate::target::{PAGE_SIZE, PageRun, RemoteFd, RemotePtr, Target, TargetError};

/// Pages that one batch moves at most: its checksums have to fit, and a slow disk is not to outlast the time-out.
const BATCH_PAGES: u64 = 8192;
/// Runs in one batch at most.
const BATCH_RUNS: usize = 400;

/// Runs of pages that lie one after the other in the page file, and fit one batch.
#[derive(Debug, Default)]
struct Load {
    runs: Vec<PageRun>,
    pages: u64,
    /// Number of the first page in the page file.
    first: u64,
}

/// Cuts saved pages into loads. `runs` are in the order of the page file.
fn loads(runs: impl Iterator<Item = Pages>) -> Vec<Load> {
    let mut loads: Vec<Load> = Vec::new();
    for run in runs {
        let (mut start, mut extent) = (run.start, run.extent);
        while extent.pages > 0 {
            let fits = loads.last().is_some_and(|load| {
                load.runs.len() < BATCH_RUNS && load.pages < BATCH_PAGES && load.first + load.pages == extent.first
            });
            if !fits {
                loads.push(Load { first: extent.first, ..Load::default() });
            }
            let load = loads.last_mut().expect("there is one");
            let pages = extent.pages.min(BATCH_PAGES - load.pages);
            load.runs.push(PageRun { start, pages });
            load.pages += pages;
            start += pages * PAGE_SIZE;
            extent = PageExtent { first: extent.first + pages, pages: extent.pages - pages };
        }
    }
    loads
}

impl Load {
    fn bytes(&self) -> u64 {
        self.pages * PAGE_SIZE
    }

    /// The iovecs of its runs.
    fn vectors(&self, batch: &mut Batch) -> Slot {
        let words: Vec<u64> = self.runs.iter().flat_map(|run| [run.start, run.pages * PAGE_SIZE]).collect();
        batch.words(&words)
    }

    /// Adds the checksums of its pages, in order.
    fn checksums(&self, batch: &mut Batch) -> Vec<Slot> {
        self.runs.iter().map(|run| batch.checksum_pages(RemotePtr(run.start), run.pages as usize)).collect()
    }
}

fn sums(replies: &crate::batch::Replies, slots: &[Slot]) -> Vec<u32> {
    let words = slots.iter().flat_map(|&slot| replies.bytes(slot).chunks_exact(4));
    words.map(|word| u32::from_ne_bytes(word.try_into().expect("four bytes"))).collect()
}

/// Has all targets write their private pages into the image, at the same time.
pub fn write_pages(
    targets: &mut [Box<dyn Target>],
    processes: &mut [Process],
    store: &mut dyn ImageWriter,
    meter: &mut Meter<'_>,
) -> Result<(), DumpError> {
    let mut writings = Vec::with_capacity(targets.len());
    let result = write_all(targets, processes, &mut writings, store, meter);
    if result.is_err() {
        // What was begun has a descriptor of ours until it is done.
        for (target, running) in targets.iter_mut().zip(&writings).filter_map(|(t, w)| Some((t, w.running.as_ref()?))) {
            let _ = target.finish(0, &running.batch);
        }
    }
    result
}

fn write_all(
    targets: &mut [Box<dyn Target>],
    processes: &mut [Process],
    writings: &mut Vec<Writing>,
    store: &mut dyn ImageWriter,
    meter: &mut Meter<'_>,
) -> Result<(), DumpError> {
    for (target, process) in targets.iter_mut().zip(processes) {
        let (loads, by_us) = plan_writing(&mut **target, process, store)?;
        writings.push(Writing { loads: loads.into(), by_us, running: None });
        writings.last_mut().expect("just pushed").start_next(&mut **target, store)?;
    }
    let mut busy: Vec<usize> = (0..writings.len()).collect();
    while !busy.is_empty() {
        let mut still = Vec::new();
        for index in busy {
            interruption()?;
            let (target, writing) = (&mut *targets[index], &mut writings[index]);
            if writing.finish_one(target, store, meter)? {
                writing.start_next(target, store)?;
                still.push(index);
            }
        }
        busy = still;
    }
    for (target, writing) in targets.iter_mut().zip(writings) {
        write_by_us(&mut **target, &writing.by_us, store, meter)?;
    }
    Ok(())
}

/// Finds the pages of a process and their places in the page file: those that it writes itself, and those for us.
fn plan_writing(
    target: &mut dyn Target,
    process: &mut Process,
    store: &mut dyn ImageWriter,
) -> Result<(Vec<Load>, Vec<Pages>), DumpError> {
    let pid = target.pid();
    let memory = &mut process.memory;
    let end = memory.mappings.last().map_or(0, |mapping| mapping.end);
    let found = target.private_pages(0, end);
    let runs = found.map_err(|source| DumpError::Target { resource: NAME, pid, source })?;
    let mut runs = runs.into_iter().peekable();
    let mut total = 0;
    for mapping in &mut memory.mappings {
        let private = !mapping.shared && !matches!(mapping.source, Source::Vdso | Source::Vvar);
        while let Some(run) = runs.peek().copied() {
            let start = run.start.max(mapping.start);
            let stop = run.end().min(mapping.end);
            if run.start >= mapping.end {
                break;
            }
            if private && start < stop {
                // Its place in the page file follows once it is known how many there are.
                let extent = PageExtent { first: total, pages: (stop - start) / PAGE_SIZE };
                total += extent.pages;
                mapping.pages.push(Pages { start, extent });
            }
            if run.end() > mapping.end {
                break;
            }
            runs.next();
        }
    }
    let first = store.reserve_pages(total)?.first;
    for pages in memory.mappings.iter_mut().flat_map(|mapping| &mut mapping.pages) {
        pages.extent.first += first;
    }
    let readable = |mapping: &&Mapping| mapping.protection & libc::PROT_READ != 0;
    let pages = |mapping: &'_ Mapping| mapping.pages.clone();
    // Memory that its owner may not read is copied by us.
    let mut by_us: Vec<Pages> =
        memory.mappings.iter().filter(|mapping| !readable(mapping)).flat_map(pages).collect();
    let by_target = memory.mappings.iter().filter(readable).flat_map(pages);
    if process.limits.limits[libc::RLIMIT_FSIZE as usize].soft != u64::MAX {
        // The program may not write a file as large as the image: we do it.
        by_us.extend(by_target);
        return Ok((Vec::new(), by_us));
    }
    Ok((loads(by_target), by_us))
}

/// A target that writes its pages.
struct Writing {
    loads: VecDeque<Load>,
    by_us: Vec<Pages>,
    running: Option<Running>,
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
        let sums = load.checksums(&mut batch);
        let vectors = load.vectors(&mut batch);
        let (pieces, place) = (load.runs.len(), load.first * PAGE_SIZE);
        let wrote = batch.try_call(
            Sysno::pwritev,
            &[file, vectors.into(), pieces.into(), place.into(), Arg::Value(0)],
        );
        batch.try_call(Sysno::close, &[file]);
        target.start(0, &batch).map_err(failed)?;
        self.running = Some(Running { load, batch, sums, wrote });
        target.send_fd(store.pages()).map_err(failed)
    }

    /// Waits for the load that is being written. Tells whether there was one.
    fn finish_one(
        &mut self,
        target: &mut dyn Target,
        store: &mut dyn ImageWriter,
        meter: &mut Meter<'_>,
    ) -> Result<bool, DumpError> {
        let Some(Running { load, batch, sums: slots, wrote }) = self.running.take() else { return Ok(false) };
        let pid = target.pid();
        let replies = target.finish(0, &batch);
        let replies = replies.map_err(|source| DumpError::Target { resource: NAME, pid, source })?;
        store.page_checksums(PageExtent { first: load.first, pages: load.pages }, &sums(&replies, &slots))?;
        match replies.result(wrote) {
            Ok(wrote) if wrote == load.bytes() => meter.add(load.bytes()),
            // A full disk gives a short count first. The same pages once more give the reason, or are written.
            Ok(_) => write_by_us(target, &saved_runs(&load), store, meter)?,
            Err(errno) => {
                return Err(DumpError::Io { what: "writing pages into the image".into(), source: errno.into() });
            }
        }
        Ok(true)
    }
}

/// The runs of a load, with their places in the page file.
fn saved_runs(load: &Load) -> Vec<Pages> {
    let mut first = load.first;
    let mut runs = Vec::new();
    for run in &load.runs {
        runs.push(Pages { start: run.start, extent: PageExtent { first, pages: run.pages } });
        first += run.pages;
    }
    runs
}

fn pass(target: &mut dyn Target, file: BorrowedFd<'_>) -> Result<RemoteFd, TargetError> {
    Ok(target.fds_in(&[file])?[0])
}

/// Copies pages by `/proc/PID/mem`, which reads whatever the protection is.
fn write_by_us(
    target: &mut dyn Target,
    runs: &[Pages],
    store: &mut dyn ImageWriter,
    meter: &mut Meter<'_>,
) -> Result<(), DumpError> {
    use std::os::unix::fs::FileExt;
    if runs.is_empty() {
        return Ok(());
    }
    let pid = target.pid();
    let failed = |what: &'static str| {
        move |source: io::Error| DumpError::Io { what: format!("{NAME} of process {pid}: {what}"), source }
    };
    let memory = target.proc().open_with("mem", OFlag::O_RDONLY).map_err(failed("opening it"))?;
    let mut buffer = Buffer::new();
    for run in runs {
        let mut done = 0;
        while done < run.extent.pages {
            let pages = (run.extent.pages - done).min(Buffer::PAGES);
            let first = run.extent.first + done;
            let bytes = buffer.pages(pages);
            memory.read_exact_at(bytes, run.start + done * PAGE_SIZE).map_err(failed("reading it"))?;
            store.page_checksums(PageExtent { first, pages }, &checksums(bytes))?;
            write_direct(store, first, bytes).map_err(failed("writing it into the image"))?;
            meter.add(bytes.len() as u64);
            done += pages;
        }
    }
    Ok(())
}

/// Brings the pages of an image into a skeleton whose mappings are there.
pub trait Filler {
    /// Fills the private pages of one process.
    fn fill(
        &mut self,
        process: usize,
        target: &mut dyn Target,
        memory: &Memory,
        reader: &dyn ImageReader,
        meter: &mut Meter<'_>,
    ) -> Result<(), RestoreError>;
}

/// Reads every page before the release, and checks it.
pub struct Eager;

impl Filler for Eager {
    fn fill(
        &mut self,
        _process: usize,
        target: &mut dyn Target,
        memory: &Memory,
        reader: &dyn ImageReader,
        meter: &mut Meter<'_>,
    ) -> Result<(), RestoreError> {
        let pid = target.pid();
        let failed = |source: TargetError| RestoreError::Target { resource: NAME, pid, source };
        let loads = loads(memory.mappings.iter().flat_map(|mapping| mapping.pages.iter().copied()));
        if loads.is_empty() {
            return Ok(());
        }
        announce(reader, &loads[0]);
        prefer_huge_pages(target, memory).map_err(failed)?;
        let file = pass(target, reader.pages()).map_err(failed)?;
        for (index, load) in loads.iter().enumerate() {
            if let Some(next) = loads.get(index + 1) {
                announce(reader, next);
            }
            let mut batch = Batch::new();
            let vectors = load.vectors(&mut batch);
            let place = load.first * PAGE_SIZE;
            let read = batch.call(Sysno::preadv, args![file, vectors, load.runs.len(), place, 0]);
            let slots = load.checksums(&mut batch);
            let replies = target.run(&batch).map_err(failed)?;
            let saved = reader.page_checksums(PageExtent { first: load.first, pages: load.pages })?;
            let found = sums(&replies, &slots);
            if replies.value(read) != load.bytes() || found != saved {
                let bad = found.iter().zip(&saved).position(|(found, saved)| found != saved).unwrap_or(0);
                return Err(reader.damaged_page(load.first + bad as u64).into());
            }
            meter.add(load.bytes());
        }
        let mut batch = Batch::new();
        batch.call(Sysno::close, args![file]);
        target.run(&batch).map_err(failed)?;
        Ok(())
    }
}

/// Has the kernel fetch the pages of a load from the medium while those of another are copied.
fn announce(reader: &dyn ImageReader, load: &Load) {
    let (offset, length) = ((load.first * PAGE_SIZE) as i64, load.bytes() as i64);
    // A hint: without it they are only fetched later.
    let _ = posix_fadvise(reader.pages(), offset, length, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
}

/// Has the kernel back by huge pages what will be filled in whole: reading into them takes half the time of reading into
/// small pages that have yet to be found one by one. `MADV_COLLAPSE` (kernel 6.1) leaves no mark on the mapping; where it is
/// not to be had, the pages are small, which is no error.
fn prefer_huge_pages(target: &mut dyn Target, memory: &Memory) -> Result<(), TargetError> {
    const HUGE: u64 = 2 << 20;
    const MADV_POPULATE_WRITE: i32 = 23;
    const MADV_COLLAPSE: i32 = 25;
    let mut batch = Batch::new();
    for mapping in &memory.mappings {
        if mapping.source != Source::Anonymous || mapping.shared || mapping.flags.contains(b"nh") {
            continue;
        }
        for run in &mapping.pages {
            let start = run.start.next_multiple_of(HUGE);
            let end = (run.start + run.extent.pages * PAGE_SIZE) / HUGE * HUGE;
            for at in (start..end).step_by(HUGE as usize) {
                // A page has to be there for the others to be put beside it.
                batch.try_call(Sysno::madvise, args![at, PAGE_SIZE, MADV_POPULATE_WRITE]);
                batch.try_call(Sysno::madvise, args![at, HUGE, MADV_COLLAPSE]);
                if !batch.has_room(2, 0) {
                    target.run(&std::mem::take(&mut batch))?;
                }
            }
        }
    }
    target.run(&batch)?;
    Ok(())
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
        let loads = loads(runs.into_iter());
        assert_eq!(loads.len(), 2, "a gap in the page file begins a new load");
        assert_eq!((loads[0].pages, loads[0].runs.len(), loads[1].first), (5, 2, 9));
    }

    #[test]
    fn a_large_run_is_cut() {
        let loads = loads([pages(0, 0, 3 * BATCH_PAGES + 1)].into_iter());
        assert_eq!(loads.iter().map(|load| load.pages).collect::<Vec<_>>(), [8192, 8192, 8192, 1]);
        assert_eq!(loads[3].runs[0].start, 3 * BATCH_PAGES * PAGE_SIZE);
        assert_eq!(saved_runs(&loads[1])[0], pages(8192 * PAGE_SIZE, 8192, 8192));
    }
}
