//! Where pages come from.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use ckpt_core::PAGE_SIZE;
use ckpt_core::resource::memory::Pages;
use ckpt_core::store::ImageReader;
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

/// The checksums of the pages of an image: in its file, where those that are wanted are looked up. There may be millions.
pub struct Checksums {
    file: OwnedFd,
    /// Where the first is.
    table: u64,
    end: u64,
}

impl Checksums {
    /// Of the table in a file, for pages up to the last of `runs`.
    pub fn new<'a>(file: OwnedFd, table: u64, runs: impl Iterator<Item = &'a Pages>) -> Checksums {
        let end = runs.map(|run| run.extent.first + run.extent.pages).max().unwrap_or(0);
        Checksums { file, table, end }
    }

    /// The number after that of the last page that will be needed.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// The number of the first page that is not what was saved. Allocates nothing where nothing fails.
    ///
    /// # Errors
    /// Where the table cannot be read, in words.
    pub fn first_wrong(&self, run: Run, content: &[u8]) -> Result<Option<u64>, String> {
        const AT_ONCE: usize = 64;
        let mut sums = [0; 4 * AT_ONCE];
        let blocks = content.chunks(AT_ONCE * PAGE_SIZE as usize);
        for (first, block) in (run.first..).step_by(AT_ONCE).zip(blocks) {
            let sums = &mut sums[..block.len() / PAGE_SIZE as usize * 4];
            read_all(&self.file, sums, self.table + first * 4).map_err(|why| why.said("table of checksums"))?;
            let (saved, _) = sums.as_chunks::<4>();
            let pages = block.chunks_exact(PAGE_SIZE as usize).zip(saved);
            let wrong = |(page, saved): (&[u8], &[u8; 4])| crc32c::crc32c(page) != u32::from_le_bytes(*saved);
            if let Some(at) = pages.map(wrong).position(|is_wrong| is_wrong) {
                return Ok(Some(first + at as u64));
            }
        }
        Ok(None)
    }
}

/// Why bytes of a file could not be read.
pub enum Unread {
    /// It ends before them.
    Short,
    Failed(Errno),
}

impl Unread {
    fn said(self, what: &str) -> String {
        match self {
            Unread::Short => format!("the image's {what} ends early: it was cut short while it was in use"),
            Unread::Failed(errno) => format!("reading the image's {what}: {}", io::Error::from(errno)),
        }
    }
}

/// Fills a buffer from a place in a file.
pub fn read_all(file: &OwnedFd, buffer: &mut [u8], place: u64) -> Result<(), Unread> {
    let mut done = 0;
    while done < buffer.len() {
        match nix::sys::uio::pread(file, &mut buffer[done..], place as i64 + done as i64) {
            Ok(0) => return Err(Unread::Short),
            Ok(read) => done += read,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(Unread::Failed(errno)),
        }
    }
    Ok(())
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
        let place = run.first * PAGE_SIZE + read as u64;
        read_all(&self.file, &mut buffer[read..], place).map_err(|why| why.said("page file"))?;
        match self.checksums.first_wrong(run, buffer)? {
            None => Ok(buffer),
            Some(page) => Err(self.reader.damaged_page(page).to_string()),
        }
    }
}
