//! Regular files and directories.

use crate::wire::wire_struct;

wire_struct! {
    pub struct FileV1 for ckpt_core::resource::files::File {}
}

wire_struct! {
    pub struct IdentityV1 for ckpt_core::resource::files::Identity {
        device: u64,
        inode: u64,
        size: u64,
        modified: i64,
    }
}
