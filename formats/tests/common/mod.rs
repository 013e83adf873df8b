//! Images for tests: anything that the wire can hold, put in order so that it is a valid image.

#![allow(dead_code)]

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use ckpt_core::resource::descriptors::OpenFile;
use ckpt_core::resource::memory::{ObjectKind, Pages, Source};
use ckpt_core::store::{ImageWriter, PageExtent};
use ckpt_core::{Image, PAGE_SIZE, PageRun, Pid, StoreError};
use ckpt_formats::v1::ImageV1;
use ckpt_formats::v1::descriptors::OpenFileV1;
use ckpt_formats::v1::files::DeletedFileV1;
use ckpt_formats::v1::memory::ObjectV1;
use ckpt_formats::v1::tasks::ProcessV1;
use ckpt_formats::wire::{Bounds, Entropy, Wire};

/// What the images of tests hold.
pub const BOUNDS: Bounds = Bounds { files: 40, memory_objects: 2, deleted_files: 2, blobs: 2, pages: 24 };

/// Made of `bytes`, with at least one process.
pub fn image(bytes: &[u8]) -> Image {
    let entropy = &mut Entropy { bytes, bounds: BOUNDS };
    let mut image = ImageV1::any(entropy);
    if image.processes.is_empty() {
        image.processes.push(ProcessV1::any(entropy));
    }
    image.files = (0..BOUNDS.files).map(|_| OpenFileV1::any(entropy)).collect();
    image.memory_objects = (0..BOUNDS.memory_objects).map(|_| ObjectV1::any(entropy)).collect();
    image.deleted_files = (0..BOUNDS.deleted_files).map(|_| DeletedFileV1::any(entropy)).collect();
    put_in_order(&mut image);
    image
}

/// As [`image`], of bytes that follow from a number.
pub fn image_of(seed: u64) -> Image {
    image(&random_bytes(seed, 6_000))
}

/// One with everything: every kind of file, pages of processes and of shared memory, zombies.
pub fn rich_image() -> Image {
    let kinds = ckpt_core::resource::descriptors::KIND_NAMES;
    let is_rich = |image: &Image| {
        let mappings = || image.processes.iter().flat_map(|process| &process.memory.mappings);
        image.processes.len() > 1
            && image.processes.iter().any(|process| process.threads.len() > 1)
            && !image.zombies.is_empty()
            && !image.locks.is_empty()
            && !image.sysvipc.segments.is_empty()
            && mappings().any(|mapping| !mapping.pages.is_empty())
            && mappings().any(|mapping| matches!(mapping.source, Source::Object { .. }))
            && image.memory_objects.iter().any(|object| !object.pages.is_empty())
            // The first of the names is that of the tables.
            && kinds[1..].iter().all(|kind| image.files.iter().any(|file| file.kind.name() == *kind))
    };
    (0..10_000).map(image_of).find(is_rich).expect("one of these images has everything")
}

/// The same bytes for the same seed, for ever (splitmix64).
pub fn random_bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut random = Random(seed);
    (0..length).map(|_| random.next() as u8).collect()
}

pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}

/// Makes hold what `ckpt_formats::validate` asks for.
fn put_in_order(image: &mut Image) {
    image.host.xsave_size %= 4096;
    let mut next_id = 100;
    let mut id = || {
        next_id += 1;
        Pid(next_id)
    };
    let mut parent = Pid(1);
    let task = |task: &mut ckpt_core::image::Task, pid, ppid| {
        (task.pid, task.ppid, task.pgid, task.sid) = (pid, ppid, pid, Pid(0));
        task.exit_signal = task.exit_signal.rem_euclid(65);
        tidy_name(&mut task.comm, 15);
    };
    for process in &mut image.processes {
        let pid = id();
        task(&mut process.task, pid, parent);
        parent = pid;
        if process.threads.is_empty() {
            process.threads.push(ckpt_formats::v1::tasks::ThreadV1::any(&mut Entropy { bytes: &[], bounds: BOUNDS }));
        }
        process.threads[0].tid = pid;
        process.threads.iter_mut().skip(1).for_each(|thread| thread.tid = id());
        let mut address = 0x10000;
        for mapping in &mut process.memory.mappings {
            mapping.start = address;
            let pages = lay_out(&mut mapping.pages, address);
            mapping.end = mapping.start + (pages + 1) * PAGE_SIZE;
            address = mapping.end;
            // In the page that no run of pages has.
            mapping.guards.truncate(1);
            mapping.guards.iter_mut().for_each(|run| *run = PageRun { start: mapping.start, pages: 1 });
            mapping.protection &= 7;
            mapping.protection_key &= 15;
            mapping.flags.iter_mut().flatten().for_each(|letter| *letter = b'a' + *letter % 26);
            mapping.anonymous_name.iter_mut().for_each(|name| tidy_name(name, 79));
            match &mut mapping.source {
                Source::File { offset, .. } | Source::Deleted { offset, .. } => *offset = (*offset % 1000) * PAGE_SIZE,
                // So that mapping and object overlap.
                Source::Object { offset, .. } => *offset = (*offset % 3) * PAGE_SIZE,
                Source::Anonymous | Source::Vdso | Source::Vvar => {}
            }
        }
        for (number, held) in process.descriptors.descriptors.iter_mut().enumerate() {
            held.fd = 3 * number as i32;
        }
    }
    for zombie in &mut image.zombies {
        task(&mut zombie.task, id(), parent);
    }
    for OpenFile { owner, .. } in &mut image.files {
        owner.iter_mut().for_each(|owner| owner.signal = owner.signal.rem_euclid(65));
    }
    for object in &mut image.memory_objects {
        object.size = lay_out(&mut object.pages, 0) * PAGE_SIZE + object.size % 10_000;
        if let ObjectKind::Memfd { name, .. } = &mut object.kind {
            tidy_name(name, 249);
        }
    }
}

/// Puts runs one after the other with gaps, and returns how many pages they take.
fn lay_out(runs: &mut [Pages], start: u64) -> u64 {
    let mut pages = 0;
    for run in runs {
        pages += 1;
        run.start = start + pages * PAGE_SIZE;
        pages += run.extent.pages;
    }
    pages
}

fn tidy_name(name: &mut Vec<u8>, most: usize) {
    name.truncate(most);
    name.iter_mut().for_each(|byte| *byte = (*byte).max(1));
}

/// The content of a page in the images of tests: different ones, but small in a repository.
pub fn page(number: u64) -> Vec<u8> {
    random_bytes(number, 32).repeat(PAGE_SIZE as usize / 32)
}

/// The content of the blobs: one with holes, one that is empty.
pub fn blob(number: u32) -> fs::File {
    let file = tempfile::tempfile().unwrap();
    if number == 0 {
        file.write_all_at(b"before the hole", 0).unwrap();
        file.write_all_at(b"after the hole", 70_000).unwrap();
        file.set_len(100_000).unwrap();
    }
    file
}

/// Writes pages and blobs as a dump would, the pages last to first.
pub fn fill(writer: &mut dyn ImageWriter) {
    let pages = fs::File::from(writer.pages().try_clone_to_owned().unwrap());
    let mut reserved = 0;
    for share in [1, 5, 0, BOUNDS.pages - 6] {
        let extent = writer.reserve_pages(share).unwrap();
        assert_eq!(extent, PageExtent { first: reserved, pages: share });
        reserved += share;
    }
    for number in (0..BOUNDS.pages).rev() {
        let content = page(number);
        write_aligned(&pages, &content, number * PAGE_SIZE);
        let extent = PageExtent { first: number, pages: 1 };
        writer.page_checksums(extent, &[crc32c::crc32c(&content)]).unwrap();
    }
    for number in 0..BOUNDS.blobs {
        assert_eq!(writer.blob(blob(number).as_fd()).unwrap().0, number);
    }
}

/// For a file that is open with `O_DIRECT`, from memory at the start of a page.
fn write_aligned(file: &fs::File, content: &[u8], place: u64) {
    let mut room = vec![0; content.len() + PAGE_SIZE as usize];
    let start = room.as_ptr().align_offset(PAGE_SIZE as usize);
    room[start..start + content.len()].copy_from_slice(content);
    file.write_all_at(&room[start..start + content.len()], place).unwrap();
}

/// Writes a whole image.
pub fn write(directory: &Path, image: &Image) -> Result<(), StoreError> {
    let mut writer = ckpt_formats::create(directory)?;
    fill(&mut *writer);
    writer.publish(image)
}
