//! Where pages come from.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use ckpt_core::resource::memory::Pages;
use ckpt_core::store::{ImageReader, PageExtent};
use ckpt_core::{PAGE_SIZE, StoreError};
use nix::errno::Errno;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::ahead::{Ahead, Chunk};
use crate::outstanding::Run;

/// Gives the content of pages of an image, checked.
pub trait Source {
    /// These pages will be asked for soon.
    fn announce(&mut self, run: Run);

    /// Whether [`read`](Source::read) of a run would return soon: else there may be something better to do.
    ///
    /// # Errors
    /// As `read`.
    fn is_ready(&mut self, run: Run) -> Result<bool, String>;

    /// The content of a run of pages: in `buffer`, which is as long, or where it is already. `in_order` where it is asked for
    /// in the order in which it was announced.
    ///
    /// # Errors
    /// Where it cannot be read, or is not what was saved, in words for people. Nothing of the buffer may be used then.
    fn read<'a>(&'a mut self, run: Run, in_order: bool, buffer: &'a mut [u8]) -> Result<&'a [u8], String>;
}

/// The checksums of the pages that will be needed.
pub struct Checksums {
    first: u64,
    sums: Vec<u32>,
}

impl Checksums {
    /// Reads those of `runs`, and of what lies between them in the page file.
    pub fn load<'a>(reader: &dyn ImageReader, runs: impl Iterator<Item = &'a Pages>) -> Result<Checksums, StoreError> {
        let (mut first, mut end) = (u64::MAX, 0);
        for run in runs {
            first = first.min(run.extent.first);
            end = end.max(run.extent.first + run.extent.pages);
        }
        if end == 0 {
            return Ok(Checksums { first: 0, sums: Vec::new() });
        }
        let sums = reader.page_checksums(PageExtent { first, pages: end - first })?;
        Ok(Checksums { first, sums })
    }

    /// The number after that of the last page that has one.
    pub fn end(&self) -> u64 {
        self.first + self.sums.len() as u64
    }

    /// The number of the first page that is not what was saved.
    pub fn first_wrong(&self, run: Run, content: &[u8]) -> Option<u64> {
        let pages = content.chunks_exact(PAGE_SIZE as usize);
        let wrong = |(number, page): (u64, &[u8])| {
            let saved = self.sums.get((number - self.first) as usize);
            saved != Some(&crc32c::crc32c(page))
        };
        (run.first..).zip(pages).find(|page| wrong(*page)).map(|(number, _)| number)
    }
}

/// The page file of an image on this host.
pub struct PageFile<'a> {
    file: Arc<OwnedFd>,
    checksums: Arc<Checksums>,
    reader: &'a dyn ImageReader,
    /// From the first announcement on: whoever makes the pager has one thread.
    ahead: Option<Ahead>,
    is_started: bool,
    chunk: Option<Chunk>,
}

impl<'a> PageFile<'a> {
    pub fn new(file: OwnedFd, checksums: Checksums, reader: &'a dyn ImageReader) -> PageFile<'a> {
        let (file, checksums) = (Arc::new(file), Arc::new(checksums));
        PageFile { file, checksums, reader, ahead: None, is_started: false, chunk: None }
    }
}

impl Source for PageFile<'_> {
    fn announce(&mut self, run: Run) {
        let (offset, length) = ((run.first * PAGE_SIZE) as i64, run.bytes() as i64);
        // A hint: without it they are only fetched later.
        let _ = posix_fadvise(self.file.as_fd(), offset, length, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
        if !std::mem::replace(&mut self.is_started, true) {
            self.ahead = Ahead::start(self.file.clone(), self.checksums.clone());
        }
        if let Some(ahead) = &self.ahead {
            ahead.announce(run);
        }
    }

    fn is_ready(&mut self, _run: Run) -> Result<bool, String> {
        Ok(true)
    }

    fn read<'a>(&'a mut self, run: Run, in_order: bool, buffer: &'a mut [u8]) -> Result<&'a [u8], String> {
        if let Some(ahead) = self.ahead.as_ref().filter(|_| in_order) {
            let has =
                |chunk: &Option<Chunk>| chunk.as_ref().is_some_and(|it| it.content(run.first, run.pages).is_some());
            if !has(&self.chunk) {
                self.chunk = ahead.take(run.first, self.chunk.take());
            }
        }
        let here = self.chunk.as_ref().filter(|_| in_order).and_then(|chunk| chunk.content(run.first, run.pages));
        let mut read = 0;
        match here {
            Some(content) if content.len() == buffer.len() => return Ok(content),
            // Its end only: the rest is read here, and all of it is checked once more.
            Some(content) => {
                buffer[..content.len()].copy_from_slice(content);
                read = content.len();
            }
            None => {}
        }
        while read < buffer.len() {
            let at = (run.first * PAGE_SIZE) as i64 + read as i64;
            match nix::sys::uio::pread(&self.file, &mut buffer[read..], at) {
                Ok(0) => {
                    let page = run.first + read as u64 / PAGE_SIZE;
                    return Err(format!("the page file ends before page {page}: it was cut short while it was in use"));
                }
                Ok(got) => read += got,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(format!("reading the page file: {}", io::Error::from(errno))),
            }
        }
        match self.checksums.first_wrong(run, buffer) {
            None => Ok(buffer),
            Some(page) => Err(self.reader.damaged_page(page).to_string()),
        }
    }
}
