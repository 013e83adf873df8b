//! Version 1 of the image format: the wire structs, one file a kind.
//!
//! # Adding a kind of state (until v1 is released)
//! 1. Write `v1/KIND.rs` with [`wire_struct!`](crate::wire) and `wire_enum!`, fields named as in the live struct, and
//!    add `pub mod KIND;` below. The table of types is in `wire.rs`.
//! 2. A kind of file: one line in `FileKindV1` in `descriptors.rs`, `Pipe(PipeV1)`, the variant named as in
//!    `file_kinds!`. State of a process or thread: its struct is there as a placeholder already, extend it.
//! 3. What the types cannot say (an index in range, a number that core takes for granted) goes into `validate.rs`.
//! 4. Its values are in the property tests and the golden image without further ado ([`Wire::any`](crate::wire::Wire::any)),
//!    its documentation in SPEC-v1.cddl is that of the live struct.
//!
//! `CKPT_UPDATE=1 cargo test -p ckpt-formats` makes the schema, the hashes in SPEC.md and the golden image anew; look at
//! the difference.
//!
//! After the release of v1 these files do not change: what is new makes a `v2`.

pub mod attributes;
pub mod cgroups;
pub mod credentials;
pub mod descriptors;
pub mod devices;
pub mod epoll;
pub mod eventfd;
pub mod fifos;
pub mod files;
pub mod filesystem;
pub mod host;
pub mod inet_sockets;
pub mod inotify;
pub mod limits;
pub mod locks;
pub mod memfds;
pub mod memory;
pub mod mqueues;
pub mod pidfds;
pub mod pipes;
pub mod registers;
pub mod scheduling;
pub mod signalfd;
pub mod signals;
pub mod sockets;
pub mod sysvipc;
pub mod tasks;
pub mod terminals;
pub mod timerfd;
pub mod timers;
pub mod unix_sockets;

use serde::{Deserialize, Serialize};

use crate::wire::wire_struct;

/// The number in the header.
pub const VERSION: u32 = 1;

/// The manifest: what the CBOR in `image.cbor` holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestV1 {
    /// Pages in `pages.bin`.
    pub pages: u64,
    /// CRC-32C of the table of page checksums, which stands after the CBOR.
    pub page_checksums: u32,
    /// `blob-0`, `blob-1` and so on.
    pub blobs: Vec<BlobV1>,
    pub image: ImageV1,
}

/// A file of the image beside the page file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlobV1 {
    /// Bytes.
    pub size: u64,
    /// CRC-32C of its content, holes as zeros.
    pub checksum: u32,
}

wire_struct! {
    pub struct ImageV1 for ckpt_core::Image {
        host: host::HostFactsV1,
        processes: Vec<tasks::ProcessV1>,
        zombies: Vec<tasks::ZombieV1>,
        files: Vec<descriptors::OpenFileV1>,
        memory_objects: Vec<memory::ObjectV1>,
        deleted_files: Vec<files::DeletedFileV1>,
        locks: Vec<locks::LockV1>,
        sysvipc: sysvipc::SystemVV1,
        shell_job: bool,
        virtual_ids: bool,
        losses: Vec<String>,
    }
}
