//! Programs that cannot have the shim: they are said on standard error when they start.

use crate::calls::{self, sys};
use crate::exec::{self, List, Text};

/// Where a program's file is.
#[derive(Clone, Copy)]
pub struct File {
    pub directory: i32,
    pub path: Text,
    pub flags: i32,
}

pub const AT_FDCWD: i32 = -100;
const AT_EMPTY_PATH: i32 = 0x1000;

impl File {
    pub fn at(path: Text) -> File {
        File { directory: AT_FDCWD, path, flags: 0 }
    }

    pub fn open_already(fd: i32) -> File {
        File { directory: fd, path: c"".as_ptr().cast(), flags: AT_EMPTY_PATH }
    }

    /// To read it; negative if that is not allowed.
    unsafe fn open(self) -> i64 {
        const O_RDONLY_CLOEXEC: u64 = 0o2000000;
        let File { directory, path, flags } = self;
        // SAFETY: a C string of the caller's, and buffers of our own.
        unsafe {
            if flags & AT_EMPTY_PATH != 0 && *path == 0 {
                let mut link = [0u8; 40];
                let at = calls::append(&mut link, 0, b"/proc/self/fd/");
                calls::append_number(&mut link, at, directory as u64);
                return sys!(calls::OPEN, link.as_ptr(), O_RDONLY_CLOEXEC, 0);
            }
            sys!(calls::OPENAT, directory, path, O_RDONLY_CLOEXEC, 0)
        }
    }
}

/// Says it, where a program that is about to start will not have the shim. `list` is its environment.
///
/// # Safety
/// The path is a C string.
pub unsafe fn warn_of(file: File, list: List) {
    // SAFETY: as for this function.
    unsafe {
        // Nobody asked for the shim where there is no environment to ask in.
        if list.is_null() || file.path.is_null() {
            return;
        }
        let fd = file.open();
        if fd < 0 {
            return;
        }
        let why = without_shim(fd as i32);
        let mut name = [0u8; 512];
        if why.is_some() {
            let mut link = [0u8; 40];
            let at = calls::append(&mut link, 0, b"/proc/self/fd/");
            calls::append_number(&mut link, at, fd as u64);
            sys!(calls::READLINK, link.as_ptr(), name.as_mut_ptr(), name.len() - 1);
        }
        sys!(calls::CLOSE, fd);
        let Some(why) = why else { return };
        let length = calls::length(name.as_ptr());
        let name = core::slice::from_raw_parts(name.as_ptr(), length);
        let ending = b": it runs unprotected, and a dump is refused as long as it runs\n";
        for part in [b"ckpt: " as &[u8], name, why, ending] {
            calls::write_all(2, part.as_ptr(), part.len());
        }
    }
}

/// The same of a program that is looked for in `PATH`.
///
/// # Safety
/// `name` is a C string.
pub unsafe fn warn_of_found(name: Text, list: List) {
    // SAFETY: C strings of the caller's and of the environment; `append` stays inside of the buffer.
    unsafe {
        if name.is_null() {
            return;
        }
        let length = calls::length(name);
        let name = core::slice::from_raw_parts(name, length);
        if name.contains(&b'/') {
            return warn_of(File::at(name.as_ptr()), list);
        }
        let mut directories = exec::variable(b"PATH=").unwrap_or(c"/bin:/usr/bin".as_ptr().cast());
        // The stack may be a small one; a longer path is not looked at.
        let mut path = [0u8; 1024];
        loop {
            let mut end = 0;
            while *directories.add(end) != 0 && *directories.add(end) != b':' {
                end += 1;
            }
            if end + length + 2 < path.len() {
                let directory = if end == 0 { b"." } else { core::slice::from_raw_parts(directories, end) };
                let at = calls::append(&mut path, 0, directory);
                let at = calls::append(&mut path, at, b"/");
                calls::append(&mut path, at, name);
                const X_OK: u64 = 1;
                if sys!(calls::ACCESS, path.as_ptr(), X_OK) == 0 {
                    return warn_of(File::at(path.as_ptr()), list);
                }
            }
            if *directories.add(end) == 0 {
                return;
            }
            directories = directories.add(end + 1);
        }
    }
}

/// Why a program will not get the shim, if that can be seen.
unsafe fn without_shim(fd: i32) -> Option<&'static [u8]> {
    const PT_INTERP: u32 = 3;
    const PROGRAM_HEADERS: usize = 32;
    const HEADER_SIZE: usize = 54;
    // SAFETY: reads stay inside the buffer.
    unsafe {
        if has_privileges(fd) {
            return Some(b" runs with other privileges (setuid)");
        }
        let mut head = [0u8; 1024];
        let read = sys!(calls::PREAD, fd, head.as_mut_ptr(), head.len(), 0);
        if read < 64 || !calls::begins_with(head.as_ptr(), b"\x7fELF\x02") {
            return None;
        }
        let first = head.as_ptr().add(PROGRAM_HEADERS).cast::<u64>().read_unaligned() as usize;
        let size = head.as_ptr().add(HEADER_SIZE).cast::<u16>().read_unaligned() as usize;
        let count = head.as_ptr().add(HEADER_SIZE + 2).cast::<u16>().read_unaligned() as usize;
        let mut n = 0;
        while n < count {
            let at = first.wrapping_add(n * size);
            if at.wrapping_add(4) > read as usize || at > read as usize {
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

/// Whether a program gets privileges from its file, which makes the dynamic linker leave the shim out.
unsafe fn has_privileges(fd: i32) -> bool {
    const S_ISUID: u32 = 0o4000;
    /// Without the execute bit of the group it means something else.
    const S_ISGID_AND_XGRP: u32 = 0o2010;
    const PR_GET_NO_NEW_PRIVS: u64 = 39;
    let mut stat = [0u32; 36];
    let mut capabilities = [0u8; 32];
    // SAFETY: structures of the kernel's form on our stack. struct stat: mode at 24, owner at 28, group at 32.
    unsafe {
        if sys!(calls::PRCTL, PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1 || sys!(calls::FSTAT, fd, stat.as_mut_ptr()) != 0 {
            return false;
        }
        let user = sys!(calls::GETEUID, 0);
        let [mode, owner, group] = [stat[6], stat[7], stat[8]];
        let name = c"security.capability".as_ptr();
        (mode & S_ISUID != 0 && owner as i64 != user)
            || (mode & S_ISGID_AND_XGRP == S_ISGID_AND_XGRP && group as i64 != sys!(calls::GETEGID, 0))
            || (user != 0 && sys!(calls::FGETXATTR, fd, name, capabilities.as_mut_ptr(), capabilities.len()) > 0)
    }
}
