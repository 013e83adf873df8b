//! Address spaces and shared memory objects. The pages themselves are in `pages.bin`.

use ckpt_core::PageRun;
use ckpt_core::resource::memory::Pages;
use serde::{Deserialize, Serialize};

use crate::v1::files::IdentityV1;
use crate::wire::{Bounds, Bytes, Entropy, Invalid, Item, Wire, wire_enum, wire_struct};

wire_struct! {
    pub struct MemoryV1 for ckpt_core::resource::memory::Memory {
        mappings: Vec<MappingV1>,
        layout: LayoutV1,
        auxv: Bytes,
        exe: Bytes,
        exe_identity: IdentityV1,
        exe_deleted: Option<u32>,
        lock_future: LockFutureV1,
    }
}

wire_enum! {
    pub enum LockFutureV1 for ckpt_core::resource::memory::LockFuture {
        No,
        Locked,
        OnFault,
    }
}

wire_struct! {
    pub struct LayoutV1 for ckpt_core::resource::memory::Layout {
        start_code: u64,
        end_code: u64,
        start_data: u64,
        end_data: u64,
        start_brk: u64,
        brk: u64,
        start_stack: u64,
        arg_start: u64,
        arg_end: u64,
        env_start: u64,
        env_end: u64,
    }
}

wire_struct! {
    pub struct MappingV1 for ckpt_core::resource::memory::Mapping {
        start: u64,
        end: u64,
        protection: i32,
        shared: bool,
        source: SourceV1,
        flags: Vec<Bytes>,
        anonymous_name: Option<Bytes>,
        protection_key: u32,
        pages: Vec<PagesV1>,
        guards: Vec<GuardsV1>,
    }
}

/// `[start, pages]`: a run of guard pages.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuardsV1(pub u64, pub u64);

impl Wire<PageRun> for GuardsV1 {
    fn from_live(live: &PageRun) -> GuardsV1 {
        GuardsV1(live.start, live.pages)
    }
    fn into_live(self, _bounds: &Bounds) -> Result<PageRun, Invalid> {
        Ok(PageRun { start: self.0, pages: self.1 })
    }
    fn any(entropy: &mut Entropy<'_>) -> PageRun {
        PageRun { start: entropy.number(), pages: entropy.number() }
    }
}

impl Item for GuardsV1 {}

/// `[start, first, pages]`: an array, as there may be a million of them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PagesV1(pub u64, pub u64, pub u64);

impl Wire<Pages> for PagesV1 {
    fn from_live(live: &Pages) -> PagesV1 {
        PagesV1(live.start, live.extent.first, live.extent.pages)
    }
    fn into_live(self, bounds: &Bounds) -> Result<Pages, Invalid> {
        Ok(Pages { start: self.0, extent: (self.1, self.2).into_live(bounds)? })
    }
    fn any(entropy: &mut Entropy<'_>) -> Pages {
        Pages { start: entropy.number(), extent: <(u64, u64)>::any(entropy) }
    }
}

impl Item for PagesV1 {}

wire_enum! {
    pub enum SourceV1 for ckpt_core::resource::memory::Source {
        Anonymous,
        File { path: Bytes, identity: IdentityV1, offset: u64, writable: bool },
        Deleted { id: u32, offset: u64, writable: bool },
        Object { id: u32, offset: u64, writable: bool },
        Vdso,
        Vvar,
    }
}

wire_struct! {
    pub struct ObjectV1 for ckpt_core::resource::memory::Object {
        kind: ObjectKindV1,
        size: u64,
        pages: Vec<PagesV1>,
    }
}

wire_enum! {
    pub enum ObjectKindV1 for ckpt_core::resource::memory::ObjectKind {
        Anonymous,
        Segment { id: i32, key: i32 },
        Memfd { name: Bytes, flags: u32, seals: u32, mode: u32, uid: u32, gid: u32 },
    }
}
