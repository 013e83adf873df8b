//! The environment of a program that is about to start, with the shim in it.
//!
//! The shim's file exists only from the call to the first line of the new program: a memfd without close-on-exec, that
//! `LD_PRELOAD` names as `/proc/self/fd/N`, with two variables before the caller's own.

use core::sync::atomic::Ordering;

use crate::calls::{self, sys};
use crate::commands;
use crate::exec::{List, Text};
use crate::ids;
use crate::protocol::{DESCRIPTOR_VARIABLE, SIGNAL};
use crate::start::{self, FILE, FILE_SIZE, PRELOAD_PREFIX};

const PRELOAD: &[u8] = b"LD_PRELOAD=";
/// Variables that fit on the stack; longer environments get memory of their own.
const USUAL: usize = 512;
/// The number for the shim's file: above what programs are given.
const LOWEST_FD: u64 = 900;

/// The shim's signal, as a mask.
pub static OURS: u64 = 1 << (SIGNAL - 1);

/// Has the shim's signal wait: over an exec, where it would have no handler and end the process until the new program's shim
/// lets it in, and between two calls that belong together.
///
/// # Safety
/// [`let_signal`] follows, or an exec.
pub unsafe fn hold_signal() {
    // SAFETY: a mask of 8 bytes.
    unsafe { sys!(calls::RT_SIGPROCMASK, 0, &raw const OURS, 0, 8) };
}

/// Lets it in again.
///
/// # Safety
/// None: it is never blocked otherwise.
pub unsafe fn let_signal() {
    // SAFETY: a mask of 8 bytes.
    unsafe { sys!(calls::RT_SIGPROCMASK, 1, &raw const OURS, 0, 8) };
}

/// An environment with the shim in it, and its file.
pub struct Prepared {
    fd: i32,
    pub list: List,
    /// Memory of its own, or null.
    memory: *mut u8,
    size: usize,
    descriptor: [u8; 32],
    preload: [u8; 4096],
    few: [*const u8; USUAL],
}

impl Prepared {
    pub const fn new() -> Prepared {
        Prepared {
            fd: -1,
            list: core::ptr::null(),
            memory: core::ptr::null_mut(),
            size: 0,
            descriptor: [0; 32],
            preload: [0; 4096],
            few: [core::ptr::null(); USUAL],
        }
    }

    /// The environment to pass on: the caller's own, if the shim cannot come along.
    pub unsafe fn make(&mut self, given: List) -> List {
        // SAFETY: an environment ends in a null pointer; everything is written inside its array.
        unsafe {
            self.list = given;
            let file = FILE.load(Ordering::Relaxed);
            if file.is_null() {
                return given;
            }
            self.fd = shim_file(file, FILE_SIZE.load(Ordering::Relaxed));
            if self.fd < 0 {
                return given;
            }
            let mut count = 0;
            let mut theirs: Text = core::ptr::null();
            if !given.is_null() {
                while !(*given.add(count)).is_null() {
                    if calls::begins_with(*given.add(count), PRELOAD) {
                        theirs = (*given.add(count)).add(PRELOAD.len());
                        if commands::is_for_now(*given.add(count)) {
                            theirs = after_colon(theirs);
                        }
                    }
                    count += 1;
                }
            }
            let wanted = count + 3;
            let list = if wanted <= USUAL {
                (&raw mut self.few).cast::<*const u8>()
            } else {
                if self.memory.is_null() || self.size < wanted * 8 {
                    self.free();
                    self.size = wanted * 8;
                    self.memory = start::allocate(self.size);
                }
                if self.memory.is_null() {
                    self.end();
                    return given;
                }
                self.memory.cast::<*const u8>()
            };
            let mut at = calls::append(&mut self.descriptor, 0, DESCRIPTOR_VARIABLE);
            calls::append_number(&mut self.descriptor, at, self.fd as u64);
            at = calls::append(&mut self.preload, 0, PRELOAD);
            at = calls::append(&mut self.preload, at, PRELOAD_PREFIX);
            at = calls::append_number(&mut self.preload, at, self.fd as u64);
            if !theirs.is_null() && *theirs != 0 {
                let length = calls::length(theirs);
                if at + length + 2 < self.preload.len() {
                    at = calls::append(&mut self.preload, at, b":");
                    calls::append(&mut self.preload, at, core::slice::from_raw_parts(theirs, length));
                }
            }
            *list = self.descriptor.as_ptr();
            *list.add(1) = self.preload.as_ptr();
            let mut to = 2;
            let mut n = 0;
            while n < count {
                let variable = *given.add(n);
                if !calls::begins_with(variable, PRELOAD) && !commands::is_for_now(variable) {
                    *list.add(to) = variable;
                    to += 1;
                }
                n += 1;
            }
            *list.add(to) = core::ptr::null();
            self.list = list;
            list
        }
    }

    /// Whether a variable is the one that names the shim's descriptor.
    pub fn is_its_descriptor(&self, variable: Text) -> bool {
        variable == self.descriptor.as_ptr()
    }

    pub fn is_its_preload(&self, variable: Text) -> bool {
        variable == self.preload.as_ptr()
    }

    /// Takes everything away again, where the process goes on. Leaves errno alone.
    pub unsafe fn end(&mut self) {
        // SAFETY: what `make` made.
        unsafe {
            self.close();
            self.free();
        }
    }

    /// Takes away all but the memory, which somebody may look into.
    pub unsafe fn close(&mut self) {
        // SAFETY: what `make` made.
        unsafe {
            if self.fd >= 0 {
                sys!(calls::CLOSE, self.fd);
                self.fd = -1;
            }
            let_signal();
        }
    }

    unsafe fn free(&mut self) {
        if !self.memory.is_null() {
            // SAFETY: what `make` made.
            unsafe { sys!(calls::MUNMAP, self.memory, self.size) };
            self.memory = core::ptr::null_mut();
        }
    }
}

/// What a list of libraries holds after its first one: null if nothing.
unsafe fn after_colon(mut text: Text) -> Text {
    // SAFETY: a C string.
    unsafe {
        while *text != 0 {
            text = text.add(1);
            if *text.sub(1) == b':' {
                return text;
            }
        }
    }
    core::ptr::null()
}

/// The shim in a memfd that outlives an exec, with a high number.
unsafe fn shim_file(bytes: *const u8, size: usize) -> i32 {
    const F_DUPFD: u64 = 0;
    // SAFETY: the copy that `start` made.
    unsafe {
        let memfd = sys!(calls::MEMFD_CREATE, c"ckpt-shim".as_ptr(), 0);
        if memfd < 0 {
            return -1;
        }
        let memfd = memfd as i32;
        if !calls::write_all(memfd, bytes, size) || !ids::write_trailer(memfd) {
            sys!(calls::CLOSE, memfd);
            return -1;
        }
        let high = sys!(calls::FCNTL, memfd, F_DUPFD, LOWEST_FD);
        if high < 0 {
            return memfd;
        }
        sys!(calls::CLOSE, memfd);
        high as i32
    }
}
