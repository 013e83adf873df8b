//! The fuzz targets, with a bounded number of inputs that are the same each time, under an allocator that counts.

#[path = "../fuzz/targets.rs"]
mod targets;

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use ciborium::Value;
use ckpt_formats::decode;
use ckpt_formats::header::Header;
use ckpt_formats::v1::{BlobV1, ImageV1, ManifestV1};
use ckpt_formats::wire::Wire;
use common::Random;

/// Knows how much this thread's test could have allocated at most: all of the process.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is System's; the counters allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(now, Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs it and says how many bytes there were at most beyond those at the start.
fn peak(run: impl FnOnce()) -> usize {
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    run();
    PEAK.load(Relaxed).saturating_sub(before)
}

fn encode(manifest: &ManifestV1) -> Vec<u8> {
    let mut bytes = Vec::new();
    ciborium::ser::into_writer(manifest, &mut bytes).unwrap();
    bytes
}

fn good_manifest() -> Vec<u8> {
    let image = ImageV1::from_live(&common::rich_image());
    let blobs = vec![BlobV1 { size: 0, checksum: 0 }; 2];
    encode(&ManifestV1 { pages: targets::PAGES, page_checksums: 0, blobs, image })
}

/// Changes bytes as a fuzzer does.
fn mutate(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..1 + random.below(4) {
        let place = random.below(bytes.len());
        let end = (place + random.below(40)).min(bytes.len());
        match random.below(8) {
            0 => bytes[place] ^= 1 << random.below(8),
            1 => bytes[place] = random.next() as u8,
            2 => drop(bytes.drain(place..end)),
            3 => {
                let piece = bytes[place..end].to_vec();
                let at = random.below(bytes.len());
                bytes.splice(at..at, piece);
            }
            4 => bytes.truncate(place.max(1)),
            // Numbers at the edges, in the place of what is there.
            5 => drop(bytes.splice(place..(place + 1).min(end), [0x1b, 255, 255, 255, 255, 255, 255, 255, 255])),
            6 => drop(bytes.splice(place..(place + 1).min(end), [0x3b, 0x7f, 255, 255, 255, 255, 255, 255, 255])),
            // Heads of every kind with lengths of every size.
            _ => {
                let head = (random.next() as u8 & 0xe0) | [24, 25, 26, 27, 31][random.below(5)];
                bytes.splice(place..place, [head, 0x7f, 255, 255, 255, 255, 255, 255, 255]);
            }
        }
        if bytes.is_empty() {
            bytes.push(0);
        }
    }
    bytes
}

/// Changes items and keeps the CBOR well-formed: such inputs get as far as the conversions and their checks.
fn mutate_items(good: &Value, random: &mut Random) -> Vec<u8> {
    let mut value = good.clone();
    let total = count(&mut value);
    for _ in 0..1 + random.below(3) {
        let donor = nth(&mut value, &mut random.below(total)).cloned();
        if let Some(item) = nth(&mut value, &mut random.below(total)) {
            match (random.below(4), &mut *item, donor) {
                (0, _, Some(donor)) => *item = donor,
                (1, Value::Array(items), _) => {
                    let copy = items.get(random.below(items.len())).cloned();
                    items.extend(copy);
                }
                (1, Value::Map(pairs), _) => drop(pairs.pop()),
                (2, Value::Array(items), _) => drop(items.pop()),
                (2, Value::Bytes(bytes), _) => bytes.resize(random.below(5000), 0),
                (_, Value::Integer(_), _) => {
                    let edges = [0, 1, -1, 40, 4095, 4096, 1 << 31, (1 << 32) - 1, i64::MAX, i64::MIN, i64::MAX - 4095];
                    *item = match random.below(edges.len() + 2) {
                        0 => Value::from(u64::MAX),
                        1 => Value::from(u64::MAX - 4095),
                        edge => Value::from(edges[edge - 2]),
                    };
                }
                _ => *item = Value::Null,
            }
        }
    }
    let mut bytes = Vec::new();
    ciborium::ser::into_writer(&value, &mut bytes).unwrap();
    bytes
}

fn children(value: &mut Value) -> Vec<&mut Value> {
    match value {
        Value::Array(items) => items.iter_mut().collect(),
        // Not the names: a wrong one is found at once.
        Value::Map(pairs) => pairs.iter_mut().map(|(_, value)| value).collect(),
        _ => Vec::new(),
    }
}

fn count(value: &mut Value) -> usize {
    1 + children(value).into_iter().map(count).sum::<usize>()
}

/// The item with this number, counted from the top.
fn nth<'a>(value: &'a mut Value, number: &mut usize) -> Option<&'a mut Value> {
    if *number == 0 {
        return Some(value);
    }
    *number -= 1;
    children(value).into_iter().find_map(|child| nth(child, number))
}

/// One test, so that the counters are of one thing.
#[test]
fn hostile_bytes_do_no_harm() {
    let start = Instant::now();
    let manifest = good_manifest();
    assert!(targets::manifest(&manifest), "the good one is not taken");
    assert!(targets::directory(&[&[0], &manifest[..]].concat()), "the good one is not taken");
    let mut random = Random(1);

    let header = Header::of(1, &manifest).encode();
    for _ in 0..20_000 {
        targets::header(&mutate(&header, &mut random));
    }
    targets::header(&[]);

    let mut accepted = 0;
    let good: Value = ciborium::de::from_reader(&manifest[..]).unwrap();
    for round in 0..20_000 {
        let bytes = if round % 2 == 0 { mutate(&manifest, &mut random) } else { mutate_items(&good, &mut random) };
        let most = peak(|| accepted += u32::from(targets::manifest(&bytes)));
        assert!(most <= 64 * bytes.len() + 1000, "{most} bytes for a manifest of {}", bytes.len());
    }
    assert!(accepted > 500, "only {accepted} mutations got to the end: the rest tests little");
    for length in 0..2000 {
        let bytes = common::random_bytes(length, length as usize);
        let most = peak(|| _ = targets::manifest(&bytes));
        assert!(most <= 64 * bytes.len() + 1000, "{most} bytes for a manifest of {}", bytes.len());
    }

    for _ in 0..1000 {
        let mut bytes = mutate(&manifest, &mut random);
        bytes.insert(0, [0, 0, 0, 1, 2][random.below(5)]);
        targets::directory(&bytes);
    }

    claims_are_not_believed();
    nesting_ends();
    small_items_stay_small();
    assert!(start.elapsed() < Duration::from_secs(120), "it took {:?}", start.elapsed());
}

/// A length of 2^60 allocates nothing.
fn claims_are_not_believed() {
    for major in 2..6 {
        for minor in [24, 25, 26, 27] {
            for value in [0x7f, 0x10, 0xff] {
                let bytes = [&[(major << 5) | minor], &[value; 9][..]].concat();
                let most = peak(|| assert!(!targets::manifest(&bytes)));
                assert!(most < 2000, "{most} bytes for {bytes:?}");
            }
        }
    }
    // Behind the good beginning of a manifest, where serde would make a list.
    let manifest = good_manifest();
    let place = manifest.windows(9).position(|window| window == b"processes").unwrap() + 9;
    let mut bytes = manifest[..place].to_vec();
    bytes.extend_from_slice(&[0x9b, 0, 0, 0, 1, 0, 0, 0, 0]);
    bytes.extend_from_slice(&manifest[place + 1..]);
    let most = peak(|| assert!(!targets::manifest(&bytes)));
    assert!(most < 10_000, "{most} bytes");

    // The header's claim: nothing is read before the file is known to have it.
    let place = tempfile::tempdir().unwrap();
    std::fs::write(place.path().join("pages.bin"), "").unwrap();
    for length in [1, 1 << 20, 1 << 28, 1 << 40, u64::MAX - 31, u64::MAX] {
        let header = Header { version: 1, checksum: 0, length };
        std::fs::write(place.path().join("image.cbor"), header.encode()).unwrap();
        let most = peak(|| assert!(ckpt_formats::open(place.path()).is_err()));
        assert!(most < 100_000, "{most} bytes for a header that claims {length}");
    }
}

/// Nesting as deep as the input is long ends no stack.
fn nesting_ends() {
    for head in [&[0x81][..], &[0xa1, 0x00], &[0xa1, 0x61, b'x'], &[0x9f], &[0xbf], &[0xc1], &[0xd9, 0xd9, 0xf7]] {
        let bytes = head.repeat(300_000);
        let most = peak(|| assert!(!targets::manifest(&bytes)));
        assert!(most < 10_000, "{most} bytes for {head:?}");
    }
}

/// A list of the smallest things takes no more than a fixed multiple of its bytes.
fn small_items_stay_small() {
    let manifest = good_manifest();
    let list = |field: &[u8], item: &[u8], count: u32| {
        let place = manifest.windows(field.len()).rposition(|window| window == field).unwrap() + field.len();
        let mut bytes = manifest[..place].to_vec();
        bytes.push(0x9a);
        bytes.extend_from_slice(&count.to_be_bytes());
        bytes.extend_from_slice(&item.repeat(count as usize));
        bytes.extend_from_slice(&manifest[place + 1..]);
        bytes
    };
    for (field, item) in [
        (&b"losses"[..], &[0x60][..]),
        (b"cpu_features", &[0x60]),
        (b"losses", &[0xa0]),
        (b"locks", &[0xa0]),
        (b"processes", &[0xf6]),
    ] {
        let bytes = list(field, item, 200_000);
        let most = peak(|| _ = targets::manifest(&bytes));
        assert!(most <= 100 * bytes.len(), "{most} bytes for {} of {item:?}", bytes.len());
    }
    assert!(decode::max_items(0) < u64::from(u32::MAX));
}
