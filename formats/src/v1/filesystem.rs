//! Root, current directory and umask.

use crate::wire::wire_struct;

wire_struct! {
    pub struct FilesystemV1 for ckpt_core::resource::filesystem::Filesystem {}
}
