//! What is written is what is read.

mod common;

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use ckpt_core::store::{BlobId, PageExtent};
use ckpt_core::{Image, PAGE_SIZE};
use ckpt_formats::v1::{BlobV1, ImageV1, ManifestV1};
use ckpt_formats::wire::Wire;
use ckpt_formats::{cbor, decode};
use proptest::prelude::*;

fn entropy() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 0..6000)
}

/// The manifest that the writer would make.
fn encode(image: &Image) -> Vec<u8> {
    let blobs = vec![BlobV1 { size: 0, checksum: 0 }; common::BOUNDS.blobs as usize];
    let image = ImageV1::from_live(image);
    let manifest = ManifestV1 { pages: common::BOUNDS.pages, page_checksums: 0, blobs, image };
    let mut bytes = Vec::new();
    ciborium::ser::into_writer(&manifest, &mut bytes).unwrap();
    bytes
}

proptest! {
    #[test]
    fn any_image_survives_cbor(bytes in entropy()) {
        let image = common::image(&bytes);
        let manifest = decode::manifest(&encode(&image), common::BOUNDS.pages);
        prop_assert_eq!(manifest.map(|manifest| manifest.image), Ok(image));
    }

    /// Both decoders agree.
    #[test]
    fn it_is_cbor(bytes in entropy()) {
        let encoded = encode(&common::image(&bytes));
        let by_library: ManifestV1 = ciborium::de::from_reader(&encoded[..]).unwrap();
        prop_assert_eq!(cbor::decode(&encoded, u64::MAX), Ok(by_library));
    }

    #[test]
    fn encoding_is_a_function_of_the_image(bytes in entropy()) {
        let first = encode(&common::image(&bytes));
        let again = encode(&decode::manifest(&first, common::BOUNDS.pages).unwrap().image);
        prop_assert_eq!(first, again);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn any_image_survives_the_disk(bytes in entropy()) {
        let place = tempfile::tempdir().unwrap();
        let directory = place.path().join("image");
        let image = common::image(&bytes);
        common::write(&directory, &image).unwrap();
        let reader = ckpt_formats::open(&directory).unwrap();
        prop_assert_eq!(reader.image(), &image);
        ckpt_formats::check(&directory).unwrap();
    }
}

#[test]
fn pages_and_blobs_come_back() {
    let place = tempfile::tempdir().unwrap();
    let directory = place.path().join("image");
    let image = common::image_of(1);
    common::write(&directory, &image).unwrap();

    let reader = ckpt_formats::open(&directory).unwrap();
    let whole = PageExtent { first: 0, pages: common::BOUNDS.pages };
    let checksums = reader.page_checksums(whole).unwrap();
    assert_eq!(reader.page_checksums(PageExtent { first: 3, pages: 2 }).unwrap(), checksums[3..5]);
    assert!(reader.page_checksums(PageExtent { first: 3, pages: common::BOUNDS.pages }).is_err());
    assert!(reader.page_checksums(PageExtent { first: u64::MAX, pages: 2 }).is_err());
    let pages = fs::File::from(reader.pages().try_clone_to_owned().unwrap());
    let mut content = vec![0; PAGE_SIZE as usize];
    for (number, checksum) in (0..).zip(checksums) {
        pages.read_exact_at(&mut content, number * PAGE_SIZE).unwrap();
        assert_eq!(content, common::page(number), "page {number}");
        assert_eq!(crc32c::crc32c(&content), checksum, "checksum of page {number}");
    }

    for number in 0..common::BOUNDS.blobs {
        let copy = tempfile::tempfile().unwrap();
        reader.copy_blob(BlobId(number), copy.as_fd()).unwrap();
        let original = common::blob(number);
        assert_eq!(read(&copy), read(&original), "blob {number}");
        let original_blocks = original.metadata().unwrap().blocks();
        assert_eq!(copy.metadata().unwrap().blocks(), original_blocks, "holes of blob {number}");
    }
    assert!(reader.copy_blob(BlobId(common::BOUNDS.blobs), tempfile::tempfile().unwrap().as_fd()).is_err());

    let report = ckpt_formats::check(&directory).unwrap();
    assert_eq!(report.pages, common::BOUNDS.pages);
    assert_eq!(report.processes, image.processes.len());
    assert_eq!(report.blob_bytes, 100_000);
}

fn read(file: &fs::File) -> Vec<u8> {
    let mut content = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut content, 0).unwrap();
    content
}

/// Memory is nobody's business but the owner's: no file of an image may be read by others.
#[test]
fn images_are_private() {
    let place = tempfile::tempdir().unwrap();
    let directory = place.path().join("image");
    common::write(&directory, &common::image_of(1)).unwrap();
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&directory), 0o700);
    let mut names = Vec::new();
    for entry in fs::read_dir(&directory).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(mode(&entry.path()), 0o600, "{:?}", entry.path());
        names.push(entry.file_name().into_string().unwrap());
    }
    names.sort();
    assert_eq!(names, ["blob-0", "blob-1", "image.cbor", "pages.bin"]);
}

/// The blob's file may be the program's own open file description: its offset is not ours to move.
#[test]
fn offset_of_a_blob_is_left_alone() {
    use std::io::{Seek, SeekFrom};
    let place = tempfile::tempdir().unwrap();
    let mut writer = ckpt_formats::create(&place.path().join("image")).unwrap();
    let mut content = common::blob(0);
    content.seek(SeekFrom::Start(77)).unwrap();
    writer.blob(content.as_fd()).unwrap();
    assert_eq!(content.stream_position().unwrap(), 77);
}

/// Every page of every mapping is found by its address, and no other address finds one.
#[test]
fn find_page_agrees_with_a_walk_over_all_runs() {
    let place = tempfile::tempdir().unwrap();
    let (mut found, mut shared) = (0, 0);
    for seed in 0..400 {
        let directory = place.path().join(seed.to_string());
        let image = common::image_of(seed);
        common::write(&directory, &image).unwrap();
        let reader = ckpt_formats::open(&directory).unwrap();
        for (index, process) in image.processes.iter().enumerate() {
            let end = process.memory.mappings.last().map_or(0x20000, |mapping| mapping.end + PAGE_SIZE);
            for address in (0..end).step_by(PAGE_SIZE as usize / 2) {
                let expected = walk(&image, index, address);
                assert_eq!(reader.find_page(index, address), expected, "{address:#x} of {index}, seed {seed}");
                let of_process = process.memory.mappings.iter().flat_map(|mapping| &mapping.pages);
                let own = of_process.map(|run| run.extent).any(|extent| {
                    expected.is_some_and(|page| (extent.first..extent.first + extent.pages).contains(&page))
                });
                found += usize::from(expected.is_some());
                shared += usize::from(expected.is_some() && !own);
            }
        }
        assert_eq!(reader.find_page(image.processes.len(), 0), None);
        assert_eq!(reader.find_page(0, u64::MAX), None);
    }
    assert!(found > 500 && shared > 5, "only {found} pages found, {shared} of them of shared memory");
}

fn walk(image: &Image, process: usize, address: u64) -> Option<u64> {
    use ckpt_core::resource::memory::{Pages, Source};
    let within = |runs: &[Pages], place: u64| {
        let mut pages = runs
            .iter()
            .flat_map(|run| (0..run.extent.pages).map(|n| (run.start + n * PAGE_SIZE, run.extent.first + n)));
        pages.find(|(start, _)| (*start..start + PAGE_SIZE).contains(&place)).map(|(_, page)| page)
    };
    let mappings = &image.processes[process].memory.mappings;
    let mapping = mappings.iter().find(|mapping| (mapping.start..mapping.end).contains(&address))?;
    within(&mapping.pages, address).or_else(|| match mapping.source {
        Source::Object { id, offset, .. } => {
            within(&image.memory_objects[id.0 as usize].pages, address - mapping.start + offset)
        }
        _ => None,
    })
}
