use std::time::Instant;
#[path = "../tests/common/mod.rs"]
mod common;
use ckpt_formats::v1::*;
use ckpt_formats::wire::Wire;
fn main() {
    let mut image = common::rich_image();
    let proc0 = image.processes.iter().find(|p| !p.memory.mappings.is_empty()).unwrap().clone();
    image.processes.clear();
    image.zombies.clear();
    let m0 = proc0.memory.mappings.iter().find(|m| !m.pages.is_empty()).unwrap().clone();
    let mut p = proc0.clone();
    p.task.ppid = ckpt_core::Pid(1);
    p.threads.truncate(1);
    p.memory.mappings.clear();
    for k in 0..4000 {
        let mut m = m0.clone();
        m.start = 0x10000 + k as u64 * 0x100000;
        m.end = m.start + 0x80000;
        m.pages.truncate(1);
        for p in &mut m.pages {
            p.start = m.start;
        }
        p.memory.mappings.push(m);
    }
    image.processes.push(p);
    let mut best = [1e9f64; 7];
    for _ in 0..50 {
        let t0 = Instant::now();
        let wire = ManifestV1 {
            pages: 24,
            page_checksums: 0,
            blobs: vec![BlobV1 { size: 0, checksum: 0 }; 2],
            image: ImageV1::from_live(&image),
        };
        let t1 = Instant::now();
        let mut bytes = Vec::new();
        ciborium::ser::into_writer(&wire, &mut bytes).unwrap();
        let t2 = Instant::now();
        let _: ManifestV1 = ckpt_formats::cbor::decode(&bytes, u64::MAX).unwrap();
        let t3 = Instant::now();
        let back: ManifestV1 = ciborium::de::from_reader(&bytes[..]).unwrap();
        let t4 = Instant::now();
        let b = wire.bounds();
        let live = back.image.into_live(&b).unwrap();
        let t5 = Instant::now();
        ckpt_formats::validate::validate(&live).unwrap();
        let t6 = Instant::now();
        assert!(live == image);
        let t7 = Instant::now();
        for (k, (a, b)) in
            [(t0, t1), (t1, t2), (t2, t3), (t3, t4), (t4, t5), (t5, t6), (t6, t7)].into_iter().enumerate()
        {
            best[k] = best[k].min((b - a).as_secs_f64() * 1e3);
        }
    }
    println!(
        "from_live {:.2} encode {:.2} own {:.2} decode {:.2} into_live {:.2} validate {:.2} eq {:.2}",
        best[0], best[1], best[2], best[3], best[4], best[5], best[6]
    );
}
