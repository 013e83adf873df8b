//! Regular files and directories, and files that were deleted.

use crate::wire::{Bytes, wire_enum, wire_struct};

wire_struct! {
    pub struct FileV1 for ckpt_core::resource::files::File {
        place: PlaceV1,
        position: i64,
    }
}

wire_enum! {
    pub enum PlaceV1 for ckpt_core::resource::files::Place {
        Path { path: Bytes, file_type: u32, identity: IdentityV1, former: Option<Bytes> },
        Proc { path: Bytes },
        Deleted { id: u32 },
    }
}

wire_struct! {
    pub struct DeletedFileV1 for ckpt_core::resource::files::DeletedFile {
        path: Bytes,
        mode: u32,
        uid: u32,
        gid: u32,
        size: u64,
        accessed: i64,
        modified: i64,
        linkable: bool,
        extended_attributes: Vec<ExtendedAttributeV1>,
        inode_flags: u32,
        content: u32,
    }
}

wire_struct! {
    pub struct ExtendedAttributeV1 for ckpt_core::resource::files::ExtendedAttribute {
        name: Bytes,
        value: Bytes,
    }
}

wire_struct! {
    pub struct IdentityV1 for ckpt_core::resource::files::Identity {
        device: u64,
        inode: u64,
        size: u64,
        modified: i64,
    }
}
