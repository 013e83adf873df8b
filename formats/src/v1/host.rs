//! What the host of the dump was.

use crate::wire::wire_struct;

wire_struct! {
    pub struct HostFactsV1 for ckpt_core::image::HostFacts {
        architecture: String,
        kernel: String,
        xsave_features: u64,
        xsave_size: u32,
        cpu_features: Vec<String>,
        vdso_checksum: u32,
        boot_id: String,
        machine_id: String,
        time: u64,
        monotonic: u64,
        boottime: u64,
        ckpt_version: String,
    }
}
