//! Writes an image.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::mpsc;

use ckpt_core::store::{BlobId, ImageWriter, PageExtent};
use ckpt_core::{Image, StoreError};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl, openat};
use nix::sys::stat::Mode;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use nix::unistd::ftruncate;

use crate::decode::{self, DecodeError, MAX_PAGES};
use crate::header::Header;
use crate::partial::{MANIFEST, PAGES, Partial, blob_name};
use crate::sparse::{self, Failure};
use crate::sys;
use crate::v1::{BlobV1, ImageV1, ManifestV1, VERSION};
use crate::wire::Wire;

const PAGE: u64 = ckpt_core::PAGE_SIZE;

/// Begins an image that will be in `directory`, which must be empty or not there.
///
/// Until it is published everything is in a hidden directory beside it. The files can be read by their owner only, as
/// they hold what the memory of the program held.
///
/// # Errors
/// [`StoreError::Directory`] when an image cannot be there.
pub fn create(directory: &Path) -> Result<Box<dyn ImageWriter>, StoreError> {
    let partial = Partial::create(directory)?;
    let pages = create_pages(&partial)?;
    let room = match fstatfs(&pages) {
        Ok(statfs) if statfs.filesystem_type() == TMPFS_MAGIC => Room::Checked,
        _ => Room::Allocated(0),
    };
    Ok(Box::new(Writer {
        partial,
        pages,
        room,
        cache: Cache::Used,
        beginner: None,
        reserved: 0,
        checksums: Vec::new(),
        covered: Vec::new(),
        blobs: Vec::new(),
    }))
}

struct Writer {
    partial: Partial,
    pages: File,
    room: Room,
    cache: Cache,
    /// Has the medium begin with pages. To tell it so takes as long as it is busy with others.
    beginner: Option<mpsc::Sender<PageExtent>>,
    /// Pages handed out so far.
    reserved: u64,
    /// Of each reserved page.
    checksums: Vec<u32>,
    /// The pages that have got their checksum: sorted, disjoint, neighbours joined.
    covered: Vec<PageExtent>,
    /// Kept open until they are synced.
    blobs: Vec<(BlobV1, File)>,
}

/// Whether the pages go through the page cache of the kernel, or past it to the medium (`O_DIRECT`).
///
/// Through the cache, a write is a copy, so that the program stands still for a shorter time, the medium gets it at the
/// same time ([`sync_file_range`](sys::begin_writing)), and a restore that follows finds it in memory. What is large
/// beside the memory that is free would drive everything else out of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cache {
    Used,
    Bypassed,
}

/// A page file of this size may be in the cache in any case, in bytes.
const SMALL: u64 = 32 << 20;

/// In pages.
const LARGE_PIECE: u64 = 256;
/// A manifest that is worth a thread to verify it, in bytes.
const LARGE_MANIFEST: usize = 128 << 10;

/// How it is made sure that there is room for the pages before the target writes them: a full disk is then our error
/// and not one of a system call in the target.
///
/// Measured here (ext4 on virtio, 1 GiB, one writer, O_DIRECT): the size of a write is what matters, 64 KiB 0.5 GB/s,
/// 256 KiB 1.2, 1 MiB 1.7, 4 MiB 2.1, 16 MiB 2.3, 64 MiB 2.4 (a gather of 1,024 pieces is as fast as one piece). How the
/// room was made does not: `fallocate` in steps of 64 MiB, of 1 GiB, `ftruncate` alone and nothing at all are within
/// the noise of each other, and a step costs 0.1 to 0.2 ms.
enum Room {
    /// `fallocate(2)` up to this page.
    Allocated(u64),
    /// `fallocate` would be of no use: of tmpfs, because it fills every page with zeros first; of some other file
    /// system, because it does not know it. The free space is asked for.
    Checked,
}

/// `fallocate` steps, in pages: at least 16 MiB, and a quarter of what is there for large images, at most 1 GiB.
fn step(reserved: u64) -> u64 {
    (reserved / 4).clamp(1 << 12, 1 << 18)
}

fn create_pages(partial: &Partial) -> Result<File, StoreError> {
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    match openat(partial.directory(), PAGES, flags, Mode::S_IRUSR | Mode::S_IWUSR) {
        Ok(opened) => Ok(File::from(opened)),
        Err(errno) => Err(io(partial, PAGES, "cannot be made", errno.into())),
    }
}

fn create_file(partial: &Partial, name: &str) -> Result<File, StoreError> {
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    match openat(partial.directory(), name, flags, Mode::S_IRUSR | Mode::S_IWUSR) {
        Ok(opened) => Ok(File::from(opened)),
        Err(errno) => Err(io(partial, name, "cannot be made", errno.into())),
    }
}

fn io(partial: &Partial, file: &str, what: &'static str, source: std::io::Error) -> StoreError {
    StoreError::Io { path: partial.path(file), what, source }
}

impl ImageWriter for Writer {
    fn pages(&self) -> BorrowedFd<'_> {
        self.pages.as_fd()
    }

    fn reserve_pages(&mut self, pages: u64) -> Result<PageExtent, StoreError> {
        let end = self.reserved.checked_add(pages).filter(|&end| end <= MAX_PAGES);
        let end = end.ok_or_else(|| self.faulty(format!("{pages} more pages than {} are too many", self.reserved)))?;
        self.make_room(end).map_err(|errno| io(&self.partial, PAGES, "has no room for the pages", errno.into()))?;
        if self.cache == Cache::Used && end * PAGE > SMALL && end * PAGE > ckpt_core::procfs::available_memory() / 4 {
            // From here on. Where the file system does not know O_DIRECT, the cache is used on.
            let _ = fcntl(&self.pages, FcntlArg::F_SETFL(OFlag::O_DIRECT));
            self.cache = Cache::Bypassed;
        }
        let extent = PageExtent { first: self.reserved, pages };
        self.reserved = end;
        self.checksums.resize(end as usize, 0);
        Ok(extent)
    }

    fn page_checksums(&mut self, extent: PageExtent, checksums: &[u32]) -> Result<(), StoreError> {
        let end = extent.first.checked_add(extent.pages).filter(|&end| end <= self.reserved);
        match end {
            Some(end) if checksums.len() as u64 == extent.pages => {
                self.checksums[extent.first as usize..end as usize].copy_from_slice(checksums);
                self.cover(extent);
                // Little pieces are brought there together, by the sync at the end.
                if self.cache == Cache::Used && extent.pages >= LARGE_PIECE {
                    self.begin_writing(extent)?;
                }
                Ok(())
            }
            _ => Err(self.faulty(format!(
                "{} checksums for {} pages from {} of {}",
                checksums.len(),
                extent.pages,
                extent.first,
                self.reserved
            ))),
        }
    }

    fn blob(&mut self, content: BorrowedFd<'_>) -> Result<BlobId, StoreError> {
        let id = self.blobs.len() as u32;
        let name = blob_name(id);
        let file = create_file(&self.partial, &name)?;
        let (size, checksum) = sparse::copy(content, file.as_fd()).map_err(|failure| match failure {
            Failure::Read(source) => io(&self.partial, &name, "cannot be read where it is copied from", source),
            Failure::Write(source) => io(&self.partial, &name, "cannot be written", source),
        })?;
        self.blobs.push((BlobV1 { size, checksum }, file));
        Ok(BlobId(id))
    }

    /// Every file is synced, then the directory, then it is renamed, then the directory that it is in is synced. On
    /// ext4 here that is 0.5 ms for the first file and 0.1 ms for each other step: the first commits the journal for all.
    /// Leaving out what ext4 alone would allow (one sync of the parent instead of all) would save 0.4 ms.
    fn publish(self: Box<Self>, image: &Image) -> Result<(), StoreError> {
        if !matches!(self.covered[..], [] if self.reserved == 0)
            && self.covered != [PageExtent { first: 0, pages: self.reserved }]
        {
            return Err(self.faulty("some pages have no checksum".into()));
        }
        if self.cache == Cache::Used {
            // What is not on its way yet, while we are busy with the rest.
            sys::begin_writing(self.pages.as_fd(), 0, 0);
        }
        let table: Vec<u8> = self.checksums.iter().flat_map(|checksum| checksum.to_le_bytes()).collect();
        let manifest = self.manifest(image, crc32c::crc32c(&table))?;
        let mut this = *self;
        this.beginner = None;
        if manifest.len() < LARGE_MANIFEST {
            this.verify(&manifest, image)?;
            this.write_manifest(&manifest, &table)?;
        } else {
            // Decoding takes as long as the medium does.
            std::thread::scope(|scope| {
                let verify = || this.verify(&manifest, image);
                let verifying = std::thread::Builder::new().spawn_scoped(scope, verify);
                let written = this.write_manifest(&manifest, &table);
                // Where no more threads may be started, one after the other.
                verifying.map_or_else(|_| verify(), |verifying| verifying.join().expect("no panic")).and(written)
            })?;
        }
        this.partial.publish()
    }
}

impl Writer {
    /// The dump that uses this writer did something wrong.
    fn faulty(&self, why: String) -> StoreError {
        StoreError::Unwritable { path: self.partial.path(""), why }
    }

    fn make_room(&mut self, pages: u64) -> Result<(), Errno> {
        if let Room::Allocated(allocated) = self.room {
            if pages <= allocated {
                return Ok(());
            }
            let generous = pages.max(allocated + step(self.reserved));
            let grow = |to: u64| {
                let (from, more) = (allocated * PAGE, (to - allocated) * PAGE);
                fallocate(&self.pages, FallocateFlags::empty(), from as i64, more as i64)
            };
            // On a nearly full disk, what is needed may fit where a whole step does not.
            let (result, reached) = match grow(generous) {
                Err(Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG) => (grow(pages), pages),
                result => (result, generous),
            };
            match result {
                Ok(()) => {
                    self.room = Room::Allocated(reached);
                    return Ok(());
                }
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => self.room = Room::Checked,
                Err(errno) => return Err(errno),
            }
        }
        // The size is set beforehand in any case: a write that extends a file is alone, others can be side by side.
        ftruncate(&self.pages, (pages * PAGE) as i64)?;
        let statfs = fstatfs(&self.pages)?;
        let free = statfs.blocks_available().saturating_mul(statfs.block_size() as u64);
        if free < (pages - self.reserved) * PAGE { Err(Errno::ENOSPC) } else { Ok(()) }
    }

    fn begin_writing(&mut self, extent: PageExtent) -> Result<(), StoreError> {
        if self.beginner.is_none() {
            let pages = self.pages.try_clone();
            let pages = pages.map_err(|source| io(&self.partial, PAGES, "cannot be shared with a thread", source))?;
            let (sender, extents) = mpsc::channel::<PageExtent>();
            // It ends with its sender. What it has not come to is done by the sync at the end, and so is all of it where no
            // more threads may be started.
            let _ = std::thread::Builder::new().spawn(move || {
                for extent in extents {
                    sys::begin_writing(pages.as_fd(), extent.first * PAGE, extent.pages * PAGE);
                }
            });
            self.beginner = Some(sender);
        }
        if let Some(beginner) = &self.beginner {
            let _ = beginner.send(extent);
        }
        Ok(())
    }

    fn cover(&mut self, extent: PageExtent) {
        let (mut first, mut end) = (extent.first, extent.first + extent.pages);
        if first == end {
            return;
        }
        let from = self.covered.partition_point(|known| known.first + known.pages < first);
        let to = self.covered.partition_point(|known| known.first <= end);
        if let [one, ..] = self.covered[from..to] {
            first = first.min(one.first);
        }
        if let [.., one] = self.covered[from..to] {
            end = end.max(one.first + one.pages);
        }
        self.covered.splice(from..to, [PageExtent { first, pages: end - first }]);
    }

    /// Writes the manifest, and brings all files to the medium.
    fn write_manifest(&self, manifest: &[u8], table: &[u8]) -> Result<(), StoreError> {
        ftruncate(&self.pages, (self.reserved * PAGE) as i64)
            .map_err(|errno| io(&self.partial, PAGES, "cannot be given its size", errno.into()))?;
        let mut file = create_file(&self.partial, MANIFEST)?;
        file.write_all(&Header::of(VERSION, manifest).encode())
            .and_then(|()| file.write_all(manifest))
            .and_then(|()| file.write_all(table))
            .map_err(|source| io(&self.partial, MANIFEST, "cannot be written", source))?;
        // All data first: then one commit of the file system's journal is enough for all files.
        let files = || [&self.pages, &file].into_iter().chain(self.blobs.iter().map(|(_, blob)| blob));
        files().for_each(|file| sys::begin_writing(file.as_fd(), 0, 0));
        files().for_each(|file| sys::write_out(file.as_fd()));
        file.sync_data().map_err(|source| io(&self.partial, MANIFEST, "cannot be synced", source))?;
        self.pages.sync_data().map_err(|source| io(&self.partial, PAGES, "cannot be synced", source))?;
        for (number, (_, blob)) in (0..).zip(&self.blobs) {
            blob.sync_data().map_err(|source| io(&self.partial, &blob_name(number), "cannot be synced", source))?;
        }
        Ok(())
    }

    /// Makes sure that a reader will accept the manifest, and find the image in it.
    fn verify(&self, manifest: &[u8], image: &Image) -> Result<(), StoreError> {
        match decode::manifest(manifest, self.reserved) {
            Ok(manifest) if manifest.image == *image => Ok(()),
            Ok(_) => Err(self.faulty("it would not be read as it was".into())),
            Err(DecodeError::Damaged(why)) => Err(self.faulty(why)),
            Err(error) => Err(self.faulty(format!("{error:?}"))),
        }
    }

    /// Encodes the manifest.
    fn manifest(&self, image: &Image, page_checksums: u32) -> Result<Vec<u8>, StoreError> {
        let wire = ManifestV1 {
            pages: self.reserved,
            page_checksums,
            blobs: self.blobs.iter().map(|(blob, _)| *blob).collect(),
            image: ImageV1::from_live(image),
        };
        let mut bytes = Vec::new();
        ciborium::ser::into_writer(&wire, &mut bytes).map_err(|error| self.faulty(error.to_string()))?;
        let most = decode::max_manifest(self.reserved);
        if bytes.len() as u64 > most {
            return Err(self.faulty(format!("its manifest would have {} bytes, {most} is the most", bytes.len())));
        }
        Ok(bytes)
    }
}
