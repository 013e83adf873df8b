//! Credentials of a thread.

use crate::wire::wire_struct;

wire_struct! {
    pub struct CredentialsV1 for ckpt_core::resource::credentials::Credentials {
        uid: IdsV1,
        gid: IdsV1,
        groups: Vec<u32>,
        inheritable: u64,
        permitted: u64,
        effective: u64,
        bounding: u64,
        ambient: u64,
        securebits: u32,
        no_new_privs: bool,
    }
}

wire_struct! {
    pub struct IdsV1 for ckpt_core::resource::credentials::Ids {
        real: u32,
        effective: u32,
        saved: u32,
        filesystem: u32,
    }
}
