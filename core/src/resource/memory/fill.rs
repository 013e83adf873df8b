//! Page data on its way back: into a skeleton whose mappings are there.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::args;
use crate::batch::{Arg, Batch, Sysno};
use crate::crew;
use crate::error::RestoreError;
use crate::image::{Image, Process};
use crate::progress::Meter;
use crate::resource::memory::objects::checksums;
use crate::resource::memory::pages::{Load, loads, sums};
use crate::resource::memory::{Memory, NAME, ObjectId, Pages, Source};
use crate::restore::interruption;
use crate::store::{ImageReader, PageExtent};
use crate::target::{MemoryWriter, PAGE_SIZE, RemotePtr, Target, TargetError};

/// Brings the pages of an image into a skeleton whose mappings are there.
pub trait Filler {
    /// Whether it brings in the content of an object that is shared, too. Of all others it is there before the mappings are.
    fn brings_object(&self, image: &Image, object: ObjectId) -> bool;

    /// Is given all objects, by their ids, before the mappings are made.
    fn take_objects(&mut self, image: &Image, objects: &[OwnedFd]) -> Result<(), RestoreError>;

    /// Fills the private pages of one process.
    fn fill(
        &mut self,
        process: usize,
        target: &mut dyn Target,
        memory: &Memory,
        reader: &dyn ImageReader,
        meter: &mut Meter<'_>,
    ) -> Result<(), RestoreError>;

    /// Fills all processes of a tree, one after the other.
    fn fill_all(
        &mut self,
        targets: &mut [Box<dyn Target>],
        processes: &[Process],
        reader: &dyn ImageReader,
        meter: &mut Meter<'_>,
    ) -> Result<(), RestoreError> {
        for (index, (target, process)) in targets.iter_mut().zip(processes).enumerate() {
            interruption()?;
            self.fill(index, &mut **target, &process.memory, reader, meter)?;
        }
        Ok(())
    }
}

/// Reads every page before the release, and checks it.
///
/// The target reads pages itself. Of a large process, a thread of ours brings in others at the same time, from the end: to
/// copy is what takes the time, and that is the work of one processor.
pub struct Eager;

/// Pages in one load at most.
const LOAD_PAGES: u64 = 2048;
/// Pages that are read and then checked while they are in the processor's cache: half of the time that a check takes is to
/// get at what is to be checked.
const PIECE_PAGES: u64 = 128;
/// Of so many pages in a row the kernel is asked for all at once, before they are read into: to find them one by one takes
/// as long as the copying.
const ROW: u64 = 8;
/// So many times in a piece at most, as a batch has an end.
const ROWS: usize = 4;
/// From so many pages on it is worth another thread.
const LARGE: u64 = 8192;

/// Kernel 5.14 (`include/uapi/asm-generic/mman-common.h`).
const MADV_POPULATE_WRITE: i32 = 23;

/// Loads that nobody has taken yet.
type Queue = Mutex<VecDeque<Load>>;

impl Filler for Eager {
    fn brings_object(&self, _image: &Image, _object: ObjectId) -> bool {
        false
    }

    fn take_objects(&mut self, _image: &Image, _objects: &[OwnedFd]) -> Result<(), RestoreError> {
        Ok(())
    }

    fn fill(
        &mut self,
        _process: usize,
        target: &mut dyn Target,
        memory: &Memory,
        reader: &dyn ImageReader,
        meter: &mut Meter<'_>,
    ) -> Result<(), RestoreError> {
        fill(target, memory, reader, &mut |bytes| meter.add(bytes))
    }

    /// Several at the same time.
    fn fill_all(
        &mut self,
        targets: &mut [Box<dyn Target>],
        processes: &[Process],
        reader: &dyn ImageReader,
        meter: &mut Meter<'_>,
    ) -> Result<(), RestoreError> {
        let meter = Mutex::new(meter);
        crew::each(targets, processes, |_, target, process| {
            interruption()?;
            fill(target, &process.memory, reader, &mut |bytes| meter.lock().expect("no panic").add(bytes))
        })
    }
}

fn fill(
    target: &mut dyn Target,
    memory: &Memory,
    reader: &dyn ImageReader,
    done: &mut dyn FnMut(u64),
) -> Result<(), RestoreError> {
    let pid = target.pid();
    let mut saved: Vec<Pages> = memory.mappings.iter().flat_map(|mapping| mapping.pages.iter().copied()).collect();
    saved.sort_unstable_by_key(|pages| pages.extent.first);
    let pages: u64 = saved.iter().map(|pages| pages.extent.pages).sum();
    let loads = loads(saved.into_iter(), LOAD_PAGES);
    let Some(first) = loads.first() else { return Ok(()) };
    announce(reader, first);
    prefer_huge_pages(target, memory).map_err(|source| RestoreError::Target { resource: NAME, pid, source })?;
    let queue = Mutex::new(VecDeque::from(loads));
    let helper = if pages >= LARGE { target.writer() } else { None };
    let Some(helper) = helper else { return fill_by_target(target, &queue, reader, &mut |bytes| done(bytes)) };
    let copied = AtomicU64::new(0);
    std::thread::scope(|scope| {
        // Where no more threads may be started, the target does it all.
        let helping = std::thread::Builder::new().spawn_scoped(scope, || {
            crew::leave_pin();
            let result = fill_by_us(&*helper, &queue, reader, &copied);
            if result.is_err() {
                queue.lock().expect("no panic").clear();
            }
            result
        });
        let result =
            fill_by_target(target, &queue, reader, &mut |bytes| done(bytes + copied.swap(0, Ordering::Relaxed)));
        if result.is_err() {
            queue.lock().expect("no panic").clear();
        }
        let helped = helping.map_or(Ok(()), |helping| helping.join().expect("no panic"));
        done(copied.swap(0, Ordering::Relaxed));
        result?;
        helped.map_err(|failure| match failure {
            Failure::Restore(error) => error,
            Failure::Target(source) => RestoreError::Target { resource: NAME, pid, source },
        })
    })
}

/// Has the target read loads from the front of the queue until there are no more.
fn fill_by_target(
    target: &mut dyn Target,
    queue: &Queue,
    reader: &dyn ImageReader,
    done: &mut dyn FnMut(u64),
) -> Result<(), RestoreError> {
    let pid = target.pid();
    let failed = |source: TargetError| RestoreError::Target { resource: NAME, pid, source };
    loop {
        let mut batch = Batch::new();
        let file = target.receive_fd(&mut batch).map_err(failed)?;
        let (mut reading, mut pages) = (Vec::new(), 0);
        loop {
            let mut queue = queue.lock().expect("no panic");
            let fits = queue.front().is_some_and(|next| {
                let pieces = (next.pages / PIECE_PAGES) as usize + 1;
                let runs = next.runs.len() + pieces;
                // A vector has 16 bytes, and so has each checksum's room.
                let room = runs * 48 + next.pages as usize * 4 + 128;
                let calls = runs + pieces * (1 + ROWS);
                pages == 0 || pages + next.pages <= LOAD_PAGES && batch.has_room(calls + 4, room)
            });
            if !fits {
                if let Some(next) = queue.front() {
                    announce(reader, next);
                }
                break;
            }
            let load = queue.pop_front().expect("there is one");
            drop(queue);
            pages += load.pages;
            for piece in load.pieces(PIECE_PAGES) {
                for run in piece.runs.iter().filter(|run| run.pages >= ROW).take(ROWS) {
                    // A hint: what is not there is found by the read.
                    batch.try_call(Sysno::madvise, args![run.start, run.pages * PAGE_SIZE, MADV_POPULATE_WRITE]);
                }
                let vectors = piece.vectors(&mut batch);
                let (count, place) = (piece.runs.len(), piece.first * PAGE_SIZE);
                let read =
                    batch.call(Sysno::preadv, &[file, vectors.into(), count.into(), place.into(), Arg::Value(0)]);
                let slots = piece.checksums(&mut batch);
                reading.push((piece, read, slots));
            }
        }
        if reading.is_empty() {
            return Ok(());
        }
        batch.call(Sysno::close, &[file]);
        target.start(0, &batch).map_err(failed)?;
        target.send_fd(reader.pages()).map_err(failed)?;
        let replies = target.finish(0, &batch).map_err(failed)?;
        for (piece, read, slots) in reading {
            check(&piece, &sums(&replies, &slots), reader)?;
            if replies.value(read) != piece.bytes() {
                return Err(reader.damaged_page(piece.first).into());
            }
            done(piece.bytes());
        }
    }
}

/// What a copying thread failed with.
enum Failure {
    Restore(RestoreError),
    Target(TargetError),
}

/// Copies loads from the end of the queue until there are no more.
fn fill_by_us(
    writer: &dyn MemoryWriter,
    queue: &Queue,
    reader: &dyn ImageReader,
    copied: &AtomicU64,
) -> Result<(), Failure> {
    let file = reader.pages().try_clone_to_owned().map(std::fs::File::from);
    let file = file.map_err(|source| Failure::Restore(RestoreError::Io { what: "the page file".into(), source }))?;
    let mut buffer = vec![0; (PIECE_PAGES * PAGE_SIZE) as usize];
    loop {
        let mut waiting = queue.lock().expect("no panic");
        let Some(load) = waiting.pop_back() else { return Ok(()) };
        if let Some(next) = waiting.back() {
            announce(reader, next);
        }
        drop(waiting);
        for piece in load.pieces(PIECE_PAGES) {
            let bytes = &mut buffer[..piece.bytes() as usize];
            file.read_exact_at(bytes, piece.first * PAGE_SIZE).map_err(|source| match source.kind() {
                std::io::ErrorKind::UnexpectedEof => Failure::Restore(reader.damaged_page(piece.first).into()),
                _ => Failure::Restore(RestoreError::Io { what: "reading the page file".into(), source }),
            })?;
            check(&piece, &checksums(bytes), reader).map_err(Failure::Restore)?;
            let mut rest = &bytes[..];
            for run in &piece.runs {
                let (piece, more) = rest.split_at((run.pages * PAGE_SIZE) as usize);
                writer.write(RemotePtr(run.start), piece).map_err(Failure::Target)?;
                rest = more;
            }
            copied.fetch_add(piece.bytes(), Ordering::Relaxed);
        }
    }
}

fn check(load: &Load, found: &[u32], reader: &dyn ImageReader) -> Result<(), RestoreError> {
    let saved = reader.page_checksums(PageExtent { first: load.first, pages: load.pages })?;
    match found.iter().zip(&saved).position(|(found, saved)| found != saved) {
        Some(bad) => Err(reader.damaged_page(load.first + bad as u64).into()),
        None => Ok(()),
    }
}

/// Has the kernel fetch the pages of a load from the medium while those of another are copied.
fn announce(reader: &dyn ImageReader, load: &Load) {
    let (offset, length) = ((load.first * PAGE_SIZE) as i64, load.bytes() as i64);
    // A hint: without it they are only fetched later.
    let _ = posix_fadvise(reader.pages(), offset, length, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
}

/// How long a huge page may take to be found. Where the kernel has to move others out of the way for it, it can take a
/// hundred times as long; small pages for the same memory cost about 0.3 ms.
const WORTH: Duration = Duration::from_millis(1);

/// Has the kernel back by huge pages what will be filled in whole: reading into them takes half the time of reading into
/// small pages that have yet to be found one by one. `MADV_COLLAPSE` (kernel 6.1) leaves no mark on the mapping; where it is
/// not to be had, or not soon, the pages are small, which is no error.
fn prefer_huge_pages(target: &mut dyn Target, memory: &Memory) -> Result<(), TargetError> {
    const HUGE: u64 = 2 << 20;
    const AT_ONCE: usize = 16;
    const MADV_COLLAPSE: i32 = 25;
    let wanted = memory
        .mappings
        .iter()
        .filter(|mapping| mapping.source == Source::Anonymous && !mapping.shared && !mapping.flags.contains(b"nh"));
    let places = wanted.flat_map(|mapping| &mapping.pages).flat_map(|run| {
        let end = (run.start + run.extent.pages * PAGE_SIZE) / HUGE * HUGE;
        (run.start.next_multiple_of(HUGE)..end).step_by(HUGE as usize)
    });
    let places: Vec<u64> = places.collect();
    for some in places.chunks(AT_ONCE) {
        let begun = Instant::now();
        let mut batch = Batch::new();
        for &at in some {
            // A page has to be there for the others to be put beside it.
            batch.try_call(Sysno::madvise, args![at, PAGE_SIZE, MADV_POPULATE_WRITE]);
            batch.try_call(Sysno::madvise, args![at, HUGE, MADV_COLLAPSE]);
        }
        target.run(&batch)?;
        if begun.elapsed() > WORTH * some.len() as u32 {
            break;
        }
    }
    Ok(())
}
