//! Address spaces: mappings, pages, heap, vdso, and memory that several mappings or descriptors share.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use crate::error::{DumpError, RestoreError};
use crate::image::Image;
use crate::progress::Meter;
use crate::resource::files::{DeletedFiles, DeletedId, Identity};
use crate::resource::{Check, Collect};
use crate::store::{ImageReader, ImageWriter, PageExtent};
use crate::target::{PAGE_SIZE, Target};

/// The section name.
pub const NAME: &str = "memory";

/// Index of an [`Object`] in [`Image::memory_objects`](crate::image::Image::memory_objects).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId(pub u32);

/// An address space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Sorted by address.
    pub mappings: Vec<Mapping>,
    pub layout: Layout,
    /// `/proc/PID/auxv`.
    pub auxv: Vec<u8>,
    /// What `/proc/PID/exe` leads to.
    pub exe: PathBuf,
    pub exe_identity: Identity,
}

/// What `prctl(PR_SET_MM_MAP)` sets (`struct prctl_mm_map`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    pub start_code: u64,
    pub end_code: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub brk: u64,
    pub start_stack: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
}

/// One mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub start: u64,
    pub end: u64,
    /// `PROT_*`.
    pub protection: i32,
    pub shared: bool,
    pub source: Source,
    /// What else the kernel keeps of it: the two-letter codes of `VmFlags` that can be brought back (`gd`, `lo`, `nr`,
    /// and those of `madvise`), sorted.
    pub flags: Vec<[u8; 2]>,
    /// `PR_SET_VMA_ANON_NAME`.
    pub anonymous_name: Option<Vec<u8>>,
    pub protection_key: u32,
    /// Pages whose content is in the image; of the others, the content is what the source gives.
    pub pages: Vec<Pages>,
}

/// A run of saved pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages {
    /// Address of the first page; in an [`Object`], its offset in bytes.
    pub start: u64,
    pub extent: PageExtent,
}

/// What is mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    Anonymous,
    File {
        path: PathBuf,
        identity: Identity,
        /// In bytes.
        offset: u64,
        /// Opened for writing: `mprotect` may make a shared mapping writable.
        writable: bool,
    },
    /// A file that was deleted: see [`DeletedFiles`].
    Deleted {
        id: DeletedId,
        /// In bytes.
        offset: u64,
        writable: bool,
    },
    Object {
        id: ObjectId,
        offset: u64,
        writable: bool,
    },
    Vdso,
    Vvar,
}

/// Memory that several mappings or descriptors share and no path leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    pub kind: ObjectKind,
    /// Bytes.
    pub size: u64,
    /// Sorted by offset; the rest is holes.
    pub pages: Vec<Pages>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ObjectKind {
    /// `mmap(MAP_SHARED | MAP_ANONYMOUS)`.
    Anonymous,
    /// `memfd_create`, with its name, the flags it must be made with, and its seals.
    Memfd { name: Vec<u8>, flags: u32, seals: u32, mode: u32, uid: u32, gid: u32 },
}

/// The objects of a tree, as they are found.
#[derive(Debug, Default)]
pub struct Objects {
    /// Deleted files, of descriptors and mappings.
    pub deleted: DeletedFiles,
}

/// The objects of a skeleton, as descriptors of ours.
#[derive(Debug, Default)]
pub struct Rebuilt {
    pub objects: Vec<OwnedFd>,
    /// The deleted files, by [`DeletedId`], open for reading and writing.
    pub deleted: Vec<OwnedFd>,
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

/// Reads every page before the release.
pub struct Eager;

impl Filler for Eager {
    fn fill(
        &mut self,
        _process: usize,
        _target: &mut dyn Target,
        _memory: &Memory,
        _reader: &dyn ImageReader,
        _meter: &mut Meter<'_>,
    ) -> Result<(), RestoreError> {
        Ok(())
    }
}

/// Bytes of page data in an image.
pub fn page_bytes(image: &Image) -> u64 {
    let private =
        image.processes.iter().flat_map(|process| &process.memory.mappings).flat_map(|mapping| &mapping.pages);
    let shared = image.memory_objects.iter().flat_map(|object| &object.pages);
    private.chain(shared).map(|pages| pages.extent.pages * PAGE_SIZE).sum()
}

/// Collects the mappings of a process, without their pages.
pub fn collect(_context: &mut Collect<'_>, _objects: &mut Objects) -> Result<Memory, DumpError> {
    todo!()
}

/// Has the target write its pages into the image.
pub fn write_pages(
    _target: &mut dyn Target,
    _memory: &mut Memory,
    _store: &mut dyn ImageWriter,
    _meter: &mut Meter<'_>,
) -> Result<(), DumpError> {
    todo!()
}

impl Objects {
    /// Writes the content of all objects into the image.
    pub fn write(
        &mut self,
        _targets: &mut [Box<dyn Target>],
        _store: &mut dyn ImageWriter,
        _meter: &mut Meter<'_>,
    ) -> Result<Vec<Object>, DumpError> {
        todo!()
    }
}

pub fn check(_memory: &Memory, _context: &mut Check<'_>) {}

/// Clears every skeleton and makes the mappings of the image, without their pages.
///
/// `deleted` are the deleted files of the image, by [`DeletedId`]; they go into what is returned.
pub fn map_all(
    _targets: &mut [Box<dyn Target>],
    _reader: &dyn ImageReader,
    _deleted: Vec<OwnedFd>,
) -> Result<Rebuilt, RestoreError> {
    todo!()
}

/// Final protections, locks and advice, and the layout.
pub fn finish(_target: &mut dyn Target, _memory: &Memory) -> Result<(), RestoreError> {
    todo!()
}
