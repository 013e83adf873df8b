//! Programs that cannot have the shim: they are said when they start.

use crate::calls::{self, sys};
use crate::exec::{List, Text};

/// Says on standard error when a program that is about to start cannot have the shim.
///
/// # Safety
/// `path` is a C string.
pub unsafe fn warn_of(path: Text, list: List) {
    // SAFETY: a C string of the caller's; structures of the kernel's form on our stack.
    unsafe {
        if list.is_null() {
            return;
        }
        let why = match without_shim(path) {
            Some(why) => why,
            None => return,
        };
        for part in [
            b"ckpt: " as &[u8],
            core::slice::from_raw_parts(path, calls::length(path)),
            why,
            b": it runs unprotected, and a dump is refused as long as it runs\n",
        ] {
            calls::write_all(2, part.as_ptr(), part.len());
        }
    }
}

/// Why a program will not get the shim, if that can be seen.
unsafe fn without_shim(path: Text) -> Option<&'static [u8]> {
    const O_RDONLY_CLOEXEC: u64 = 0o2000000;
    const S_ISUID_OR_SGID: u32 = 0o6000;
    const PT_INTERP: u32 = 3;
    const PROGRAM_HEADERS: usize = 32;
    const HEADER_SIZE: usize = 54;
    // SAFETY: the path is the caller's C string; reads stay inside the buffer.
    unsafe {
        let fd = sys!(calls::OPEN, path, O_RDONLY_CLOEXEC, 0);
        if fd < 0 {
            return None;
        }
        let mut stat = [0u32; 36];
        let mut head = [0u8; 1024];
        let known = sys!(calls::FSTAT, fd, stat.as_mut_ptr()) == 0;
        let read = sys!(calls::PREAD, fd, head.as_mut_ptr(), head.len(), 0);
        sys!(calls::CLOSE, fd);
        // struct stat: the mode at 24, the owner at 28
        if known && stat[6] & S_ISUID_OR_SGID != 0 && stat[7] as i64 != sys!(calls::GETEUID, 0) {
            return Some(b" runs with other privileges (setuid)");
        }
        if read < 64 || !calls::begins_with(head.as_ptr(), b"\x7fELF\x02") {
            return None;
        }
        let first = head.as_ptr().add(PROGRAM_HEADERS).cast::<u64>().read_unaligned() as usize;
        let size = head.as_ptr().add(HEADER_SIZE).cast::<u16>().read_unaligned() as usize;
        let count = head.as_ptr().add(HEADER_SIZE + 2).cast::<u16>().read_unaligned() as usize;
        let mut n = 0;
        while n < count {
            let at = first.wrapping_add(n * size);
            if at + 4 > read as usize {
                return None;
            }
            if head.as_ptr().add(at).cast::<u32>().read_unaligned() == PT_INTERP {
                return None;
            }
            n += 1;
        }
        Some(b" is statically linked")
    }
}
