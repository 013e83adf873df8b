//! The codec seam: where an image goes and comes from. `ckpt-formats` implements it; core never sees bytes.

use std::os::fd::BorrowedFd;

use crate::error::StoreError;
use crate::image::Image;

/// Names a blob of an image: the content of a deleted file, say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlobId(pub u32);

/// A place in the page file: page number `first`, `pages` pages long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageExtent {
    pub first: u64,
    pub pages: u64,
}

/// An image being written. Dropped without [`publish`](ImageWriter::publish), it leaves nothing behind.
pub trait ImageWriter {
    /// The page file, for the target itself to write to: page `n` is at byte `n * 4096`. Writes are page aligned in
    /// memory, length and place, so that it may be open with `O_DIRECT`, or become so as more pages are reserved. Large writes (4 MiB and more) are what makes
    /// it fast. A target whose `RLIMIT_FSIZE` is below the end of its extent must not be asked: it would get SIGXFSZ.
    fn pages(&self) -> BorrowedFd<'_>;

    /// Reserves room for pages, right after what was reserved before.
    fn reserve_pages(&mut self, pages: u64) -> Result<PageExtent, StoreError>;

    /// The CRC-32C of each page of (a part of) what was reserved, once they are written. Every reserved page must get one.
    fn page_checksums(&mut self, extent: PageExtent, checksums: &[u32]) -> Result<(), StoreError>;

    /// Copies the whole content of a file, holes kept.
    fn blob(&mut self, content: BorrowedFd<'_>) -> Result<BlobId, StoreError>;

    /// Syncs everything and gives the image its final name.
    fn publish(self: Box<Self>, image: &Image) -> Result<(), StoreError>;
}

/// An image that was opened: the manifest is whole and checked; pages and blobs are checked as they are read.
pub trait ImageReader: Send + Sync {
    fn image(&self) -> &Image;

    /// The page file, for the skeleton itself to read from.
    fn pages(&self) -> BorrowedFd<'_>;

    /// The saved CRC-32C of each page of an extent.
    fn page_checksums(&self, extent: PageExtent) -> Result<Vec<u32>, StoreError>;

    /// Where the same are for all pages: a file, and the place in it of the first; four bytes for each, little-endian. For
    /// whoever wants a few of very many, or is another process.
    fn checksum_table(&self) -> (BorrowedFd<'_>, u64);

    /// A damaged page, for the error: which file and page it was.
    fn damaged_page(&self, page: u64) -> StoreError;

    /// Writes a blob's content to an empty file, holes kept, and checks it.
    fn copy_blob(&self, blob: BlobId, into: BorrowedFd<'_>) -> Result<(), StoreError>;

    /// The page of the page file that holds what was at an address of a process (an index in
    /// [`Image::processes`]), whether it is the process's own or of shared memory. `None` where the image has no page:
    /// the content is what the mapping's source gives.
    fn find_page(&self, process: usize, address: u64) -> Option<u64>;
}

/// Takes an image and keeps nothing of it: for a dump that only asks what could be dumped.
pub struct Nowhere {
    null: std::fs::File,
    pages: u64,
    blobs: u32,
}

impl Nowhere {
    pub fn new() -> Result<Nowhere, StoreError> {
        let path = std::path::PathBuf::from("/dev/null");
        match std::fs::OpenOptions::new().write(true).open(&path) {
            Ok(null) => Ok(Nowhere { null, pages: 0, blobs: 0 }),
            Err(source) => Err(StoreError::Io { path, what: "cannot be opened", source }),
        }
    }
}

impl ImageWriter for Nowhere {
    fn pages(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.null)
    }

    fn reserve_pages(&mut self, pages: u64) -> Result<PageExtent, StoreError> {
        let first = self.pages;
        self.pages += pages;
        Ok(PageExtent { first, pages })
    }

    fn page_checksums(&mut self, _extent: PageExtent, _checksums: &[u32]) -> Result<(), StoreError> {
        Ok(())
    }

    fn blob(&mut self, _content: BorrowedFd<'_>) -> Result<BlobId, StoreError> {
        self.blobs += 1;
        Ok(BlobId(self.blobs - 1))
    }

    fn publish(self: Box<Self>, _image: &Image) -> Result<(), StoreError> {
        Ok(())
    }
}
