//! Verifies an image in full.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use ckpt_core::store::{ImageReader, PageExtent};
use ckpt_core::{PAGE_SIZE, StoreError};

use crate::partial::{MANIFEST, PAGES, blob_name};
use crate::reader::Reader;
use crate::sparse::{self, Failure};

/// What was found whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    pub processes: usize,
    pub threads: usize,
    pub zombies: usize,
    pub pages: u64,
    pub blobs: usize,
    /// Bytes of all blobs.
    pub blob_bytes: u64,
}

/// Reads everything in an image and compares it with its checksums. Takes a few MiB of memory, whatever the image's size.
///
/// # Errors
/// As [`open`](crate::open), and [`StoreError::Damaged`] for the first page or blob that is not what was written.
pub fn check(directory: &Path) -> Result<CheckReport, StoreError> {
    let reader = Reader::open(directory)?;
    check_table(&reader)?;
    check_pages(&reader)?;
    let mut blob_bytes = 0;
    for number in 0..reader.blobs.len() as u32 {
        let (saved, file) = reader.open_blob(number)?;
        match sparse::read(file.as_fd(), |_, _| Ok(())) {
            Ok(found) if found == (saved.size, saved.checksum) => blob_bytes += saved.size,
            Ok(_) => return Err(reader.damaged_blob(number)),
            Err(Failure::Read(source) | Failure::Write(source)) => {
                return Err(StoreError::Io { path: reader.path(&blob_name(number)), what: "cannot be read", source });
            }
        }
    }
    let image = reader.image();
    Ok(CheckReport {
        processes: image.processes.len(),
        threads: image.processes.iter().map(|process| process.threads.len()).sum(),
        zombies: image.zombies.len(),
        pages: reader.page_count,
        blobs: reader.blobs.len(),
        blob_bytes,
    })
}

/// Pages read at once: 1 MiB.
const CHUNK: u64 = 256;

fn check_table(reader: &Reader) -> Result<(), StoreError> {
    let mut checksum = 0;
    let mut first = 0;
    while first < reader.page_count {
        let pages = (reader.page_count - first).min(CHUNK * CHUNK);
        checksum = crc32c::crc32c_append(checksum, &reader.table(PageExtent { first, pages })?);
        first += pages;
    }
    if checksum == reader.table_checksum {
        Ok(())
    } else {
        let why = "the page checksums do not match their own".into();
        Err(StoreError::Damaged { path: reader.path(MANIFEST), why })
    }
}

/// Checks every page, on all cores.
fn check_pages(reader: &Reader) -> Result<(), StoreError> {
    let next = AtomicU64::new(0);
    let failed = AtomicBool::new(false);
    let work = || -> Result<(), (u64, StoreError)> {
        let pages = reader.pages().try_clone_to_owned().map(std::fs::File::from);
        let unreadable = |source| StoreError::Io { path: reader.path(PAGES), what: "cannot be read", source };
        let pages = pages.map_err(|source| (0, unreadable(source)))?;
        let mut buffer = vec![0; (CHUNK * PAGE_SIZE) as usize];
        while !failed.load(Ordering::Relaxed) {
            let first = next.fetch_add(CHUNK, Ordering::Relaxed);
            if first >= reader.page_count {
                break;
            }
            let extent = PageExtent { first, pages: (reader.page_count - first).min(CHUNK) };
            let checksums = reader.page_checksums(extent).map_err(|error| (first, error))?;
            let bytes = &mut buffer[..(extent.pages * PAGE_SIZE) as usize];
            pages.read_exact_at(bytes, first * PAGE_SIZE).map_err(|source| (first, unreadable(source)))?;
            let content = bytes.chunks_exact(PAGE_SIZE as usize);
            for (page, (content, saved)) in (first..).zip(content.zip(checksums)) {
                if crc32c::crc32c(content) != saved {
                    return Err((page, reader.damaged_page(page)));
                }
            }
        }
        Ok(())
    };
    let work = || work().inspect_err(|_| failed.store(true, Ordering::Relaxed));
    let threads = match reader.page_count / CHUNK {
        0..=4 => 1,
        _ => std::thread::available_parallelism().map_or(1, |cores| cores.get().min(8)),
    };
    let results: Vec<_> = std::thread::scope(|scope| {
        // Where no more threads may be started, there are fewer.
        let others: Vec<_> =
            (1..threads).map_while(|_| std::thread::Builder::new().spawn_scoped(scope, work).ok()).collect();
        let ours = work();
        others.into_iter().map(|thread| thread.join().expect("a checker panicked")).chain([ours]).collect()
    });
    // The first of those that were found.
    match results.into_iter().filter_map(Result::err).min_by_key(|(page, _)| *page) {
        None => Ok(()),
        Some((_, error)) => Err(error),
    }
}
