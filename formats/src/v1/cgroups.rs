//! Control groups.

use crate::wire::{Bytes, wire_struct};

wire_struct! {
    pub struct CgroupsV1 for ckpt_core::resource::cgroups::Cgroups {
        memberships: Vec<MembershipV1>,
    }
}

wire_struct! {
    pub struct MembershipV1 for ckpt_core::resource::cgroups::Membership {
        hierarchy: String,
        path: Bytes,
    }
}
