//! A program that a tree with virtual ids starts: it finds the table behind the shim's own file, and patches itself.

use super::{HEADER, generation};
use crate::calls::{self, sys};
use crate::start;
use crate::translation::{Header, KEPT, Stubs, is_c_library, patch};

/// Ends a file of the shim that has a table behind it; before it stands the number of its words.
const TRAILER: u64 = 0x6c62_6174_7364_692d;

fn words() -> Option<(*const u64, usize)> {
    let generation = generation();
    if generation == 0 {
        return None;
    }
    // SAFETY: the table of the current generation; its first word is the number of pairs.
    unsafe {
        let table = (&raw const HEADER.tables[generation as usize % KEPT]).read_volatile() as *const u64;
        Some((table, 1 + 2 * *table as usize))
    }
}

/// Writes them.
///
/// # Safety
/// A descriptor of ours.
pub unsafe fn write_trailer(fd: i32) -> bool {
    let Some((table, count)) = words() else { return true };
    let end = [count as u64, TRAILER];
    // SAFETY: the table and our stack.
    unsafe {
        calls::write_all(fd, table.cast(), count * 8) && calls::write_all(fd, end.as_ptr().cast(), size_of_val(&end))
    }
}

/// Begins with the table that came with the shim's file, if there is one. Gives the size of the file without it.
///
/// # Safety
/// Called by the constructor, where there is one thread; `file` is the whole file in memory.
pub unsafe fn begin(file: *const u8, size: usize) -> usize {
    // SAFETY: inside the file, as its last words say; words in it may be at odd places.
    unsafe {
        if size < 24 || file.add(size - 8).cast::<u64>().read_unaligned() != TRAILER {
            return size;
        }
        let count = file.add(size - 16).cast::<u64>().read_unaligned() as usize;
        let Some(rest) = count.checked_mul(8).and_then(|bytes| (size - 16).checked_sub(bytes)) else { return size };
        let table = start::allocate(count * 8);
        if table.is_null() {
            return size;
        }
        super::values::copy_bytes(file.add(rest), table, count * 8);
        HEADER.tables[1] = table as u64;
        HEADER.generation = 1;
        dl_iterate_phdr(patch_library, core::ptr::null_mut());
        sys!(calls::MPROTECT, HEADER.stubs, HEADER.stubs_size, 5);
        rest
    }
}

#[repr(C)]
struct Library {
    base: u64,
    name: *const u8,
    segments: *const start::Segment,
    count: u16,
}

unsafe extern "C" {
    fn dl_iterate_phdr(visit: unsafe extern "C" fn(*const Library, usize, *mut u8) -> i32, with: *mut u8) -> i32;
}
core::arch::global_asm!(".weak dl_iterate_phdr");

unsafe extern "C" fn patch_library(library: *const Library, _: usize, _: *mut u8) -> i32 {
    const PT_LOAD: u32 = 1;
    const EXECUTE: u32 = 1;
    // SAFETY: what the dynamic linker says of its libraries. This is the only thread; nothing it runs here is patched
    // code in the middle of a call.
    unsafe {
        let name = (*library).name;
        if name.is_null() || !is_c_library(file_name(name)) {
            return 0;
        }
        let mut n = 0;
        while n < (*library).count as usize {
            let segment = &*(*library).segments.add(n);
            n += 1;
            if segment.kind != PT_LOAD || segment.flags & EXECUTE == 0 {
                continue;
            }
            let at = (*library).base + segment.address;
            let (first, end) = (at & !4095, (at + segment.memory_size + 4095) & !4095);
            if sys!(calls::MPROTECT, first, end - first, 7) < 0 {
                continue;
            }
            let header = &raw mut HEADER;
            let mut stubs = stubs_of(&mut *header);
            let code = core::slice::from_raw_parts_mut(at as *mut u8, segment.memory_size as usize);
            patch(code, at, &mut stubs);
            (*header).stubs_used = stubs.used as u64;
            sys!(calls::MPROTECT, first, end - first, 5);
        }
        0
    }
}

unsafe fn stubs_of(header: &mut Header) -> Stubs<'static> {
    Stubs {
        address: header.stubs,
        // SAFETY: the static that `prepare` named.
        room: unsafe { core::slice::from_raw_parts_mut(header.stubs as *mut u8, header.stubs_size as usize) },
        used: header.stubs_used as usize,
        entry: header.entry,
        cloned: header.cloned,
        generation: (&raw const HEADER.generation) as u64,
    }
}

unsafe fn file_name(path: *const u8) -> &'static [u8] {
    // SAFETY: a C string of the dynamic linker's.
    unsafe {
        let length = calls::length(path);
        let mut begin = length;
        while begin > 0 && *path.add(begin - 1) != b'/' {
            begin -= 1;
        }
        core::slice::from_raw_parts(path.add(begin), length - begin)
    }
}
