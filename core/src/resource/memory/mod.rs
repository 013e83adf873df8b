//! Address spaces: mappings, pages, heap, vdso, and memory that several mappings or descriptors share.
//!
//! Three steps each way. Dump: [`collect`] reads what is mapped (`/proc/PID/smaps`), [`write_pages`] has the target write
//! its own pages into the image, [`Objects::write`] copies shared memory; of a tree that goes on, [`snapshot`] has copies
//! of the processes write the most of it. Restore: [`map_all`] makes the mappings, a
//! [`Filler`] brings the pages in, [`finish`] sets what may be set only then.
//!
//! Not visible to anyone, and so not kept: protection keys that are allocated but not used.

mod collect;
mod fill;
mod objects;
mod pages;
mod rebuild;
pub mod snapshot;

pub use collect::{Looks, collect};
pub use fill::{Eager, Filler};
pub use objects::{Objects, Rebuilt, memfd_name};
pub use pages::{Later, write_pages};
pub use rebuild::{check, deleted_executables, finish, map_all, rebuild_objects};
pub use snapshot::COPY_NAME;

use std::path::PathBuf;

use crate::image::Image;
use crate::resource::files::{DeletedId, Identity};
use crate::store::PageExtent;
use crate::target::{PAGE_SIZE, PageRun};

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
    /// What `/proc/PID/exe` leads to; where that was deleted, its former path.
    pub exe: PathBuf,
    pub exe_identity: Identity,
    /// It was deleted or replaced since the program started.
    pub exe_deleted: Option<DeletedId>,
    /// `mlockall(MCL_FUTURE)`: what is mapped from now on is locked.
    pub lock_future: LockFuture,
}

/// What becomes of memory that is mapped later (mlockall(2)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LockFuture {
    #[default]
    No,
    /// `MCL_FUTURE`.
    Locked,
    /// `MCL_FUTURE | MCL_ONFAULT`.
    OnFault,
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
    /// Pages that no access may touch, made with `MADV_GUARD_INSTALL`; sorted.
    pub guards: Vec<PageRun>,
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
    /// A file that was deleted: see [`DeletedFiles`](crate::resource::files::DeletedFiles).
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
    /// A System V segment (see [`sysvipc`](crate::resource::sysvipc)), with its id and the key in the name of its mappings.
    Segment { id: i32, key: i32 },
    /// `memfd_create`, with its name, the flags it must be made with, and its seals.
    Memfd { name: Vec<u8>, flags: u32, seals: u32, mode: u32, uid: u32, gid: u32 },
}

/// Bytes of page data in an image.
pub fn page_bytes(image: &Image) -> u64 {
    let private =
        image.processes.iter().flat_map(|process| &process.memory.mappings).flat_map(|mapping| &mapping.pages);
    let shared = image.memory_objects.iter().flat_map(|object| &object.pages);
    private.chain(shared).map(|pages| pages.extent.pages * PAGE_SIZE).sum()
}
