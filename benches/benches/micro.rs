//! The small things that the large figures are made of: `cargo bench -p ckpt-bench`. One group each; `-- --test` runs each
//! once, to see that it works.

use std::hint::black_box;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use ckpt_agent::process::Process;
use ckpt_core::backend::{DumpOptions, Dumper};
use ckpt_core::batch::{Batch, Sysno};
use ckpt_core::{PAGE_SIZE, Pid, RemotePtr};
use ckpt_formats::v1::{ImageV1, ManifestV1};
use ckpt_formats::wire::Wire;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

/// The golden image: one of everything, no large memory.
fn image_codec(criterion: &mut Criterion) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../formats/testdata/v1/everything");
    let reader = match ckpt_formats::open(&path) {
        Ok(reader) => reader,
        Err(error) => return println!("image codec: skipped: {error}"),
    };
    let encode = || {
        let manifest = ManifestV1 {
            pages: 1 << 20,
            page_checksums: 0,
            blobs: Vec::new(),
            image: ImageV1::from_live(reader.image()),
        };
        let mut bytes = Vec::new();
        ciborium::into_writer(&manifest, &mut bytes).map(|()| bytes)
    };
    let bytes = match encode() {
        Ok(bytes) => bytes,
        Err(error) => return println!("image codec: skipped: {error}"),
    };
    let mut group = criterion.benchmark_group("image codec");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("encode", |bencher| bencher.iter(|| black_box(encode().map(|bytes| bytes.len()))));
    group.bench_function("decode and check", |bencher| {
        bencher.iter(|| black_box(ckpt_formats::decode::manifest(black_box(&bytes), 1 << 20).is_ok()))
    });
    group.bench_function("open", |bencher| bencher.iter(|| black_box(ckpt_formats::open(&path).is_ok())));
    group.finish();
}

/// 64 MiB of our own memory: every page written, and every second one.
fn page_scan(criterion: &mut Criterion) {
    const SIZE: usize = 64 << 20;
    let mut process = match Process::open(Pid(std::process::id() as i32)) {
        Ok(process) => process,
        Err(error) => return println!("page scan: skipped: {error}"),
    };
    let mut group = criterion.benchmark_group("page scan");
    group.throughput(Throughput::Bytes(SIZE as u64));
    for (name, step) in [("every page", 1), ("every second page", 2)] {
        let mut memory = vec![0_u8; SIZE];
        for page in (0..SIZE / PAGE_SIZE as usize).step_by(step) {
            memory[page * PAGE_SIZE as usize + 2048] = 1;
        }
        let start = (memory.as_ptr() as u64).next_multiple_of(PAGE_SIZE);
        let end = start + SIZE as u64 - PAGE_SIZE;
        group.bench_function(name, |bencher| {
            bencher.iter(|| black_box(process.private_pages(start, end).map(|found| found.data.len()).ok()))
        });
        drop(memory);
    }
    group.finish();
}

fn checksum(criterion: &mut Criterion) {
    let memory: Vec<u8> = (0..1 << 20).map(|n: u32| ((n * 31) >> 3) as u8).collect();
    let mut group = criterion.benchmark_group("checksum");
    group.throughput(Throughput::Bytes(memory.len() as u64));
    group.bench_function("CRC-32C of pages, driver", |bencher| {
        bencher.iter(|| memory.chunks_exact(4096).map(crc32c::crc32c).fold(0, |sum, crc| sum ^ black_box(crc)))
    });
    with_target(|target| {
        let Some(start) = some_memory(target) else { return println!("checksum in a target: skipped: no memory") };
        group.bench_function("CRC-32C of pages, agent", |bencher| {
            bencher.iter(|| {
                let mut batch = Batch::new();
                batch.checksum_pages(RemotePtr(start), 256);
                black_box(target.run(&batch).is_ok())
            })
        });
    });
    group.finish();
}

fn batch_round_trip(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("batch round trip");
    with_target(|target| {
        for calls in [1, 100] {
            let mut batch = Batch::new();
            for _ in 0..calls {
                batch.call(Sysno::getppid, &[]);
            }
            group.bench_function(format!("calls: {calls}"), |bencher| {
                bencher.iter(|| black_box(target.run(&batch).is_ok()));
            });
        }
    });
    group.finish();
}

/// The functions that the library of preload wraps, and one that it does not, through it and without it.
fn wrapper_cost(criterion: &mut Criterion) {
    let bench = env!("CARGO_BIN_EXE_ckpt-bench");
    let ckpt = Path::new(bench).with_file_name("ckpt");
    if !ckpt.is_file() {
        return println!("wrapper cost: skipped: {} is not there; cargo build --release -p ckpt", ckpt.display());
    }
    let folder = match tempfile::tempdir() {
        Ok(folder) => folder,
        Err(error) => return println!("wrapper cost: skipped: {error}"),
    };
    let mut group = criterion.benchmark_group("wrapper cost");
    group.sample_size(10);
    for call in ["getpid", "open+close", "spawn-true"] {
        for with in [false, true] {
            let output = folder.path().join("output");
            let run = |count: u64| {
                let _ = std::fs::remove_file(&output);
                let mut command = Command::new(if with { ckpt.as_os_str() } else { bench.as_ref() });
                if with {
                    command
                        .args(["--quiet", "--backend", "preload", "run", "--output"])
                        .arg(&output)
                        .arg("--")
                        .arg(bench);
                } else if let Ok(file) = std::fs::File::create(&output) {
                    command.stdout(file);
                }
                let status = command.args(["call", call]).arg(count.to_string()).status();
                assert!(status.is_ok_and(|status| status.success()), "{call} does not run");
                let said = std::fs::read_to_string(&output).unwrap_or_default();
                let nanoseconds: f64 = said.trim().parse().unwrap_or_else(|_| panic!("{call} said {said:?}"));
                Duration::from_secs_f64(nanoseconds * count as f64 / 1e9)
            };
            let name = format!("{call}, {}", if with { "preload" } else { "native" });
            group.bench_function(name, |bencher| bencher.iter_custom(run));
        }
    }
    group.finish();
}

/// A process of ours that sleeps, frozen.
fn with_target(work: impl FnOnce(&mut dyn ckpt_core::Target)) {
    let mut child = match Command::new("sleep").arg("3600").spawn() {
        Ok(child) => child,
        Err(error) => return println!("a target: skipped: {error}"),
    };
    if let Err(why) = frozen(&child, work) {
        println!("a target: skipped: {why}");
    }
    let _ = child.kill().and_then(|()| child.wait());
}

fn frozen(child: &Child, work: impl FnOnce(&mut dyn ckpt_core::Target)) -> Result<(), String> {
    let pid = child.id() as i32;
    // It sleeps once its program has been loaded; before, it has no libc to get in through.
    let begun = Instant::now();
    while !std::fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default().contains("nanosleep") {
        if begun.elapsed() > Duration::from_secs(10) {
            return Err("sleep does not sleep".into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let options = DumpOptions { shell_job: false, tcp_close: false, timeout: Duration::from_secs(10) };
    let mut frozen = ckpt_ptrace::PtraceDumper.freeze(Pid(pid), &options).map_err(|error| error.to_string())?;
    work(&mut *frozen.targets()[0]);
    frozen.thaw().map_err(|error| error.to_string())
}

/// A mebibyte in the target.
fn some_memory(target: &mut dyn ckpt_core::Target) -> Option<u64> {
    let mut batch = Batch::new();
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
    let mapped =
        batch.call(Sysno::mmap, ckpt_core::args![0, 1 << 20, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0]);
    target.run(&batch).ok().map(|replies| replies.value(mapped))
}

criterion_group! {
    name = micro;
    config = Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    targets = image_codec, page_scan, checksum, batch_round_trip, wrapper_cost
}
criterion_main!(micro);
