use ckpt_core::store::*;
use std::os::fd::AsFd;
use std::time::Instant;
#[path = "../tests/common/mod.rs"]
mod common;
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let procs: usize = args[1].parse().unwrap();
    let maps: usize = args[2].parse().unwrap();
    let pages: u64 = args[3].parse().unwrap();
    let dir = std::path::PathBuf::from(&args[4]);
    let base = common::rich_image();
    let mut image = base.clone();
    let proc0 = base.processes.iter().find(|p| !p.memory.mappings.is_empty()).unwrap().clone();
    image.processes.clear();
    image.zombies.clear();
    let m0 = proc0.memory.mappings.iter().find(|m| !m.pages.is_empty()).unwrap().clone();
    for n in 0..procs {
        let mut p = proc0.clone();
        let pid = ckpt_core::Pid(1000 + n as i32 * 300);
        p.task.pid = pid;
        p.task.ppid = if n == 0 { ckpt_core::Pid(1) } else { ckpt_core::Pid(1000) };
        p.threads.truncate(1);
        p.threads[0].tid = pid;
        p.threads[0].context.registers.xsave = vec![7; 2696];
        p.memory.mappings.clear();
        for k in 0..maps {
            let mut m = m0.clone();
            m.start = 0x10000 + k as u64 * 0x100000;
            m.end = m.start + 0x80000;
            m.pages = vec![ckpt_core::resource::memory::Pages {
                start: m.start,
                extent: PageExtent { first: (k as u64) % (pages - 1), pages: 1 },
            }];
            p.memory.mappings.push(m);
        }
        image.processes.push(p);
    }
    let rounds = 21;
    let mut t: Vec<[f64; 5]> = Vec::new();
    let page = vec![7u8; 4096];
    let crc = crc32c::crc32c(&page);
    let layout = std::alloc::Layout::from_size_align(64 << 20, 4096).unwrap();
    let buffer = unsafe { std::slice::from_raw_parts_mut(std::alloc::alloc(layout), 64 << 20) };
    buffer.fill(7);
    for _ in 0..rounds {
        let _ = std::fs::remove_dir_all(&dir);
        let t0 = Instant::now();
        let mut w = ckpt_formats::create(&dir).unwrap();
        let t1 = Instant::now();
        let file = std::fs::File::from(w.pages().try_clone_to_owned().unwrap());
        let mut left = pages;
        let chunk: u64 = args.get(5).map_or(4096, |c| c.parse().unwrap());
        while left > 0 {
            let n = left.min(chunk);
            let e = w.reserve_pages(n).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, &buffer[..n as usize * 4096], e.first * 4096).unwrap();
            w.page_checksums(e, &vec![crc; n as usize]).unwrap();
            left -= n;
        }
        for _ in 0..2 {
            w.blob(tempfile::tempfile().unwrap().as_fd()).unwrap();
        }
        let t2 = Instant::now();
        w.publish(&image).unwrap();
        let t3 = Instant::now();
        let r = ckpt_formats::open(&dir).unwrap();
        let t4 = Instant::now();
        drop(r);
        let c0 = Instant::now();
        ckpt_formats::check(&dir).unwrap();
        let c1 = Instant::now();
        t.push([
            (t1 - t0).as_secs_f64() * 1e3,
            (t2 - t1).as_secs_f64() * 1e3,
            (t3 - t2).as_secs_f64() * 1e3,
            (t4 - t3).as_secs_f64() * 1e3,
            (c1 - c0).as_secs_f64() * 1e3,
        ]);
    }
    let med = |k: usize| {
        let mut v: Vec<f64> = t.iter().map(|x| x[k]).collect();
        v.sort_by(|a, b| a.total_cmp(b));
        (v[0], v[v.len() / 2])
    };
    let size = std::fs::metadata(dir.join("image.cbor")).unwrap().len();
    println!(
        "{procs} procs x {maps} mappings, {pages} pages, image.cbor {size}: (min, median) ms create {:.2?} write {:.2?} publish {:.2?} open {:.2?} check {:.2?}",
        med(0),
        med(1),
        med(2),
        med(3),
        med(4)
    );
    let _ = std::fs::remove_dir_all(&dir);
}
