//! Reads an image.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ckpt_core::resource::memory::{Pages, Source};
use ckpt_core::store::{BlobId, ImageReader, PageExtent};
use ckpt_core::{Image, PAGE_SIZE, StoreError};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use crate::decode::{self, DecodeError};
use crate::header::{self, Header};
use crate::partial::{MANIFEST, PAGES, blob_name};
use crate::sparse::{self, Failure};
use crate::v1::BlobV1;

/// Opens the image in a directory, and checks all of it but the content of its pages and blobs.
///
/// # Errors
/// [`StoreError::NotAnImage`], [`StoreError::NewerVersion`], [`StoreError::Torn`] when something is missing at the end,
/// [`StoreError::Damaged`] for any other difference from what was written.
pub fn open(directory: &Path) -> Result<Box<dyn ImageReader>, StoreError> {
    Ok(Box::new(Reader::open(directory)?))
}

/// Opens an image whose files are open already, as [`open`] does one in a directory. `name` stands for its directory in
/// messages; the files are by their names there.
///
/// # Errors
/// As [`open`].
pub fn open_files(name: &Path, files: BTreeMap<String, File>) -> Result<Box<dyn ImageReader>, StoreError> {
    let files = Files { path: name.to_path_buf(), place: Place::Files(files) };
    Ok(Box::new(Reader::open_in(files)?))
}

/// An open image.
pub struct Reader {
    files: Files,
    image: Image,
    pages: File,
    pub(crate) page_count: u64,
    manifest: File,
    /// Where the page checksums begin in the manifest's file.
    table: u64,
    pub(crate) table_checksum: u32,
    pub(crate) blobs: Vec<BlobV1>,
}

impl Reader {
    pub fn open(directory: &Path) -> Result<Reader, StoreError> {
        let io = |what| move |source| StoreError::Io { path: directory.to_path_buf(), what, source };
        let opened = File::open(directory).map_err(io("cannot be opened"))?;
        if !opened.metadata().map_err(io("cannot be looked at"))?.is_dir() {
            let why = "an image is a directory".into();
            return Err(StoreError::NotAnImage { path: directory.to_path_buf(), why });
        }
        Reader::open_in(Files { path: directory.to_path_buf(), place: Place::Directory(opened) })
    }

    fn open_in(files: Files) -> Result<Reader, StoreError> {
        let directory = &*files.path.clone();
        let Some((manifest, manifest_size)) = files.open(MANIFEST)? else {
            let why = format!("it has no {MANIFEST}");
            return Err(StoreError::NotAnImage { path: directory.to_path_buf(), why });
        };
        let path = directory.join(MANIFEST);
        let read = |file: &File, size: u64, place: u64| read(file, size, place, &path);

        let start = read(&manifest, manifest_size.min(header::LENGTH as u64), 0)?;
        let header = Header::decode(&start).map_err(|error| error.at(&path))?;
        let Some((pages, pages_size)) = files.open(PAGES)? else {
            let why = format!("it has no {PAGES}");
            return Err(StoreError::Torn { path: directory.to_path_buf(), why });
        };
        let most = decode::max_manifest(pages_size / PAGE_SIZE);
        if header.length > most {
            let why = format!("a manifest of {} bytes, {most} is the most", header.length);
            return Err(StoreError::Damaged { path, why });
        }
        let table = header::LENGTH as u64 + header.length;
        if manifest_size < table {
            return Err(StoreError::Torn { path, why: format!("{manifest_size} bytes of {table}") });
        }
        let bytes = read(&manifest, header.length, header::LENGTH as u64)?;
        if crc32c::crc32c(&bytes) != header.checksum {
            return Err(StoreError::Damaged { path, why: "the manifest does not match its checksum".into() });
        }
        let decoded = decode::manifest(&bytes, pages_size / PAGE_SIZE).map_err(|error| error.at(&path))?;
        drop(bytes);

        size_is(&path, manifest_size, table + decoded.pages * 4)?;
        size_is(&directory.join(PAGES), pages_size, decoded.pages * PAGE_SIZE)?;
        for (number, blob) in decoded.blobs.iter().enumerate() {
            files.open_blob(number as u32, blob)?;
        }
        Ok(Reader {
            files,
            image: decoded.image,
            pages,
            page_count: decoded.pages,
            manifest,
            table,
            table_checksum: decoded.page_checksums,
            blobs: decoded.blobs,
        })
    }

    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.files.path.join(file)
    }

    /// Opens a blob. They may be many, so they are not kept open.
    pub(crate) fn open_blob(&self, number: u32) -> Result<(BlobV1, File), StoreError> {
        match self.blobs.get(number as usize) {
            Some(blob) => Ok((*blob, self.files.open_blob(number, blob)?)),
            None => {
                let why = format!("it is not among the {} of the manifest", self.blobs.len());
                Err(StoreError::Damaged { path: self.path(&blob_name(number)), why })
            }
        }
    }

    pub(crate) fn damaged_blob(&self, number: u32) -> StoreError {
        let path = self.path(&blob_name(number));
        StoreError::Damaged { path, why: "it does not match its checksum".into() }
    }

    /// The bytes of the table for a run of pages.
    pub(crate) fn table(&self, extent: PageExtent) -> Result<Vec<u8>, StoreError> {
        let end = extent.first.checked_add(extent.pages);
        if end.is_none_or(|end| end > self.page_count) {
            let why = format!("pages {} from {} of {}", extent.pages, extent.first, self.page_count);
            return Err(StoreError::Damaged { path: self.path(PAGES), why });
        }
        read(&self.manifest, extent.pages * 4, self.table + extent.first * 4, &self.path(MANIFEST))
    }
}

impl ImageReader for Reader {
    fn image(&self) -> &Image {
        &self.image
    }

    fn pages(&self) -> BorrowedFd<'_> {
        self.pages.as_fd()
    }

    fn page_checksums(&self, extent: PageExtent) -> Result<Vec<u32>, StoreError> {
        let bytes = self.table(extent)?;
        let (checksums, _) = bytes.as_chunks::<4>();
        Ok(checksums.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect())
    }

    fn checksum_table(&self) -> (BorrowedFd<'_>, u64) {
        (self.manifest.as_fd(), self.table)
    }

    fn damaged_page(&self, page: u64) -> StoreError {
        let owner = owner(&self.image, page).map(|owner| format!(", {owner},")).unwrap_or_default();
        let why = format!("page {page}{owner} does not match its checksum");
        StoreError::Damaged { path: self.path(PAGES), why }
    }

    fn copy_blob(&self, blob: BlobId, into: BorrowedFd<'_>) -> Result<(), StoreError> {
        let (saved, file) = self.open_blob(blob.0)?;
        let path = self.path(&blob_name(blob.0));
        match sparse::copy(file.as_fd(), into) {
            Ok(copied) if copied == (saved.size, saved.checksum) => Ok(()),
            Ok(_) => Err(self.damaged_blob(blob.0)),
            Err(Failure::Read(source)) => Err(StoreError::Io { path, what: "cannot be read", source }),
            Err(Failure::Write(source)) => {
                Err(StoreError::Io { path, what: "cannot be written to the restored file", source })
            }
        }
    }

    fn find_page(&self, process: usize, address: u64) -> Option<u64> {
        find_page(&self.image, process, address)
    }
}

/// The page of the page file that holds what was at an address of a process; `None` where the image has no page: the
/// content is what the mapping's source gives. Three binary searches at most, over what the manifest keeps sorted.
pub fn find_page(image: &Image, process: usize, address: u64) -> Option<u64> {
    let mappings = &image.processes.get(process)?.memory.mappings;
    let mapping = &mappings[mappings.partition_point(|mapping| mapping.end <= address)..].first()?;
    if address < mapping.start {
        return None;
    }
    find_in(&mapping.pages, address).or_else(|| match mapping.source {
        Source::Object { id, offset, .. } => {
            find_in(&image.memory_objects[id.0 as usize].pages, offset + (address - mapping.start))
        }
        _ => None,
    })
}

fn find_in(runs: &[Pages], start: u64) -> Option<u64> {
    let before = runs[..runs.partition_point(|run| run.start <= start)].last()?;
    let number = (start - before.start) / PAGE_SIZE;
    (number < before.extent.pages).then_some(before.extent.first + number)
}

/// Whose page it is, in words.
fn owner(image: &Image, page: u64) -> Option<String> {
    let within = |runs: &[Pages]| {
        let run = runs.iter().find(|run| run.extent.first <= page && page - run.extent.first < run.extent.pages)?;
        Some(run.start + (page - run.extent.first) * PAGE_SIZE)
    };
    for process in &image.processes {
        if let Some(address) = process.memory.mappings.iter().find_map(|mapping| within(&mapping.pages)) {
            return Some(format!("address {address:#x} of process {}", process.task.pid));
        }
    }
    let mut objects = image.memory_objects.iter().enumerate();
    objects.find_map(|(number, object)| Some(format!("offset {:#x} of shared memory {number}", within(&object.pages)?)))
}

/// The files of an image.
struct Files {
    path: PathBuf,
    place: Place,
}

enum Place {
    Directory(File),
    /// With no names but these.
    Files(BTreeMap<String, File>),
}

impl Files {
    fn open_blob(&self, number: u32, blob: &BlobV1) -> Result<File, StoreError> {
        let name = blob_name(number);
        let Some((file, size)) = self.open(&name)? else {
            return Err(StoreError::Torn { path: self.path.clone(), why: format!("it has no {name}") });
        };
        size_is(&self.path.join(name), size, blob.size)?;
        Ok(file)
    }

    /// Opens a file of the image, and says how large it is. `None` if it is not there. It must be a regular file, as
    /// others could make us wait for ever.
    fn open(&self, name: &str) -> Result<Option<(File, u64)>, StoreError> {
        let path = self.path.join(name);
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let opened = match &self.place {
            Place::Directory(directory) => openat(directory, name, flags, Mode::empty()),
            // Anew, so that nobody shares its offset.
            Place::Files(files) => files.get(name).map_or(Err(Errno::ENOENT), |file| {
                let path = format!("/proc/self/fd/{}", file.as_raw_fd());
                nix::fcntl::open(path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
            }),
        };
        let file = match opened {
            Ok(file) => File::from(file),
            Err(Errno::ENOENT) => return Ok(None),
            Err(Errno::ELOOP) => {
                return Err(StoreError::Damaged { path, why: "a symbolic link instead of a file".into() });
            }
            Err(errno) => return Err(StoreError::Io { path, what: "cannot be opened", source: errno.into() }),
        };
        match file.metadata() {
            Ok(metadata) if metadata.is_file() => Ok(Some((file, metadata.len()))),
            Ok(_) => Err(StoreError::Damaged { path, why: "not a regular file".into() }),
            Err(source) => Err(StoreError::Io { path, what: "cannot be looked at", source }),
        }
    }
}

/// Reads bytes that must be there: `length` is not more than the file's size.
fn read(file: &File, length: u64, place: u64, path: &Path) -> Result<Vec<u8>, StoreError> {
    let mut bytes = vec![0; length as usize];
    match file.read_exact_at(&mut bytes, place) {
        Ok(()) => Ok(bytes),
        Err(source) => Err(StoreError::Io { path: path.to_path_buf(), what: "cannot be read", source }),
    }
}

fn size_is(path: &Path, size: u64, expected: u64) -> Result<(), StoreError> {
    let why = format!("{size} bytes instead of {expected}");
    match size.cmp(&expected) {
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Less => Err(DecodeError::Torn(why).at(path)),
        std::cmp::Ordering::Greater => Err(DecodeError::Damaged(why).at(path)),
    }
}
