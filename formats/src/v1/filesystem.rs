//! Root, current directory and umask.

use crate::v1::files::IdentityV1;
use crate::wire::{Bytes, wire_struct};

wire_struct! {
    pub struct FilesystemV1 for ckpt_core::resource::filesystem::Filesystem {
        cwd: DirectoryV1,
        root: Option<DirectoryV1>,
        umask: u32,
    }
}

wire_struct! {
    pub struct DirectoryV1 for ckpt_core::resource::filesystem::Directory {
        path: Bytes,
        identity: IdentityV1,
    }
}
