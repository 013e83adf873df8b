//! The constructor: in a program that begins, it makes the shim invisible and takes its signal; in one that is to become
//! a skeleton, it enters the agent and never returns.

use core::sync::atomic::{AtomicI64, AtomicPtr, AtomicU32, AtomicUsize, Ordering};

use crate::calls::{self, sys};
use crate::protocol::{DESCRIPTOR_VARIABLE, SKELETON_VARIABLE};
use crate::{agent, exec, freeze, ids};

/// The bytes of the shim's own file, for the programs that this one starts.
pub static FILE: AtomicPtr<u8> = AtomicPtr::new(core::ptr::null_mut());
pub static FILE_SIZE: AtomicUsize = AtomicUsize::new(0);
/// `__rseq_offset` of glibc 2.35 and later.
pub static HAS_RSEQ: AtomicU32 = AtomicU32::new(0);
pub static RSEQ_OFFSET: AtomicI64 = AtomicI64::new(0);

const PRELOAD_VARIABLE: &[u8] = b"LD_PRELOAD=";
/// How `LD_PRELOAD` names the shim: this, and a number.
pub const PRELOAD_PREFIX: &[u8] = b"/proc/self/fd/";

#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: unsafe extern "C" fn(i32, *const *const u8, *mut *mut u8) = construct;

unsafe extern "C" {
    fn dlsym(handle: *mut u8, name: *const u8) -> *mut u8;
    static __ehdr_start: u8;
}

// As `LD_AUDIT` the shim stands alone: then nothing has this function, and nobody calls it.
core::arch::global_asm!(".weak dlsym");

/// A function or variable that the next library has, after ours.
///
/// # Safety
/// `name` ends in a zero byte.
pub unsafe fn next(name: &[u8]) -> *mut u8 {
    // SAFETY: RTLD_NEXT with a C string.
    unsafe { dlsym(-1isize as *mut u8, name.as_ptr()) }
}

unsafe extern "C" fn construct(_count: i32, _arguments: *const *const u8, environment: *mut *mut u8) {
    // SAFETY: the dynamic linker passes the environment that the kernel made, which ends in a null pointer.
    unsafe {
        let mut fd = -1i32;
        let mut place = environment;
        while !(*place).is_null() {
            if calls::begins_with(*place, SKELETON_VARIABLE) {
                become_skeleton((*place).add(SKELETON_VARIABLE.len()));
            }
            if calls::begins_with(*place, DESCRIPTOR_VARIABLE) {
                fd = calls::number((*place).add(DESCRIPTOR_VARIABLE.len())).0 as i32;
                remove(place);
            } else {
                place = place.add(1);
            }
        }
        if fd >= 0 {
            forget_preload(environment);
            keep_file(fd);
            sys!(calls::CLOSE, fd);
        }
        become_anonymous();
        ids::prepare();
        if fd >= 0 {
            let file = FILE.load(Ordering::Relaxed);
            FILE_SIZE.store(ids::begin(file, FILE_SIZE.load(Ordering::Relaxed)), Ordering::Relaxed);
        }
        let offset = next(b"__rseq_offset\0").cast::<i64>();
        let size = next(b"__rseq_size\0").cast::<u32>();
        if !offset.is_null() && !size.is_null() && *size != 0 {
            RSEQ_OFFSET.store(*offset, Ordering::Relaxed);
            HAS_RSEQ.store(1, Ordering::Relaxed);
        }
        exec::find_real();
        freeze::take_signal();
    }
}

/// Takes a variable out of an environment.
unsafe fn remove(mut place: *mut *mut u8) {
    // SAFETY: up to the null pointer at the end.
    unsafe {
        while !(*place).is_null() {
            *place = *place.add(1);
            place = place.add(1);
        }
    }
}

/// Takes the shim out of `LD_PRELOAD`, where it stands first, and leaves what the user had there.
unsafe fn forget_preload(environment: *mut *mut u8) {
    // SAFETY: strings of the environment, which may be written to.
    unsafe {
        let mut place = environment;
        while !(*place).is_null() {
            let text = *place;
            if calls::begins_with(text, PRELOAD_VARIABLE) {
                let value = text.add(PRELOAD_VARIABLE.len());
                if calls::begins_with(value, PRELOAD_PREFIX) {
                    let rest = calls::number(value.add(PRELOAD_PREFIX.len())).1;
                    if *rest == 0 {
                        remove(place);
                        return;
                    }
                    let rest = rest.add(1);
                    let length = calls::length(rest);
                    let mut n = 0;
                    while n <= length {
                        value.add(n).write_volatile(*rest.add(n));
                        n += 1;
                    }
                }
                return;
            }
            place = place.add(1);
        }
    }
}

const PROT_READ: u64 = 1;
const PROT_WRITE: u64 = 2;
const PROT_EXEC: u64 = 4;
const MAP_SHARED: u64 = 1;
const MAP_PRIVATE: u64 = 2;
const MAP_ANONYMOUS: u64 = 0x20;
const MAP_FIXED_NOREPLACE: u64 = 0x10_0000;

/// Fresh memory, or null.
///
/// # Safety
/// None: a new mapping where nothing is.
pub unsafe fn allocate(size: usize) -> *mut u8 {
    // SAFETY: the kernel chooses the place.
    let at = unsafe { sys!(calls::MMAP, 0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1i64, 0) };
    if (-4095..0).contains(&at) { core::ptr::null_mut() } else { at as *mut u8 }
}

/// Copies the shim's file into memory.
unsafe fn keep_file(fd: i32) {
    let mut stat = [0u64; 18];
    // SAFETY: `struct stat` has 144 bytes, the size at 48; the copy is as large as the file.
    unsafe {
        if sys!(calls::FSTAT, fd, stat.as_mut_ptr()) != 0 {
            return;
        }
        let size = stat[6] as usize;
        let copy = allocate(size);
        if copy.is_null() {
            return;
        }
        let mut done = 0;
        while done < size {
            let read = sys!(calls::PREAD, fd, copy.add(done), size - done, done);
            if read <= 0 {
                return;
            }
            done += read as usize;
        }
        FILE.store(copy, Ordering::Relaxed);
        FILE_SIZE.store(size, Ordering::Relaxed);
    }
}

/// `Elf64_Phdr`.
#[repr(C)]
pub struct Segment {
    pub kind: u32,
    pub flags: u32,
    offset: u64,
    pub address: u64,
    physical: u64,
    file_size: u64,
    pub memory_size: u64,
    alignment: u64,
}

const PT_LOAD: u32 = 1;
const PT_GNU_RELRO: u32 = 0x6474_e552;

/// Replaces the mappings of the shim's file by copies that no file stands behind: so the file is gone, and a dump finds
/// plain memory of the program.
unsafe fn become_anonymous() {
    // SAFETY: the program headers of the shim itself, as the dynamic linker mapped them. Each move replaces a mapping by
    // one with the same content.
    unsafe {
        let header = &raw const __ehdr_start;
        let base = header as u64;
        let segments = header.add(*header.add(32).cast::<u64>() as usize).cast::<Segment>();
        let count = *header.add(56).cast::<u16>() as usize;
        let mut n = 0;
        while n < count {
            let segment = &*segments.add(n);
            n += 1;
            if segment.kind != PT_LOAD {
                continue;
            }
            let start = (base + segment.address) & !4095;
            let end = (base + segment.address + segment.memory_size + 4095) & !4095;
            let flags = segment.flags as u64;
            let protection = (flags >> 2 & 1) * PROT_READ | (flags >> 1 & 1) * PROT_WRITE | (flags & 1) * PROT_EXEC;
            if protection & PROT_READ == 0 {
                continue;
            }
            move_to_copy(start, end - start, protection);
        }
        n = 0;
        while n < count {
            let segment = &*segments.add(n);
            n += 1;
            if segment.kind == PT_GNU_RELRO {
                let start = (base + segment.address) & !4095;
                let end = (base + segment.address + segment.memory_size) & !4095;
                if end > start {
                    sys!(calls::MPROTECT, start, end - start, PROT_READ);
                }
            }
        }
    }
}

unsafe fn move_to_copy(start: u64, size: u64, protection: u64) {
    const MAYMOVE_FIXED: u64 = 3;
    // SAFETY: nobody writes to these pages meanwhile: this is the only thread, and it writes to its stack alone.
    unsafe {
        let copy = allocate(size as usize);
        if copy.is_null() {
            return;
        }
        core::arch::asm!("rep movsb", inout("rcx") size => _, inout("rsi") start => _, inout("rdi") copy => _,
            options(nostack, preserves_flags));
        sys!(calls::MPROTECT, copy, size, protection);
        if sys!(calls::MREMAP, copy, size, size, MAYMOVE_FIXED, start) < 0 {
            sys!(calls::MUNMAP, copy, size);
        }
    }
}

/// `SOCKET,MEMFD,BASE,SIZE,LANE` in decimal. Maps the region, and enters the agent.
unsafe fn become_skeleton(text: *const u8) -> ! {
    // SAFETY: the driver wrote the variable, and has laid out the lane. Nothing of the program runs any more.
    unsafe {
        let mut values = [0u64; 5];
        let mut text = text;
        let mut n = 0;
        while n < 5 {
            (values[n], text) = calls::number(text);
            if *text == b',' {
                text = text.add(1);
            }
            n += 1;
        }
        let [_, memfd, base, size, lane] = values;
        // The handlers of the program are not there, and no signal is to end what is being built.
        let all = u64::MAX;
        sys!(calls::RT_SIGPROCMASK, 2, &raw const all, 0, 8);
        if map_region(memfd as i32, base, size) {
            sys!(calls::CLOSE, memfd);
            // The lane of a main thread.
            freeze::enter(base, lane, agent::MAIN_LANE_SIZE);
        }
        loop {
            sys!(calls::EXIT_GROUP, 1);
        }
    }
}

/// Maps a region at a place where nothing is: its code executable, the rest writable.
///
/// # Safety
/// The descriptor is that of a region of this size.
pub unsafe fn map_region(memfd: i32, base: u64, size: u64) -> bool {
    let code = agent::CODE_SIZE as u64;
    let flags = MAP_SHARED | MAP_FIXED_NOREPLACE;
    // SAFETY: nothing is replaced.
    unsafe {
        if sys!(calls::MMAP, base, code, PROT_READ | PROT_EXEC, flags, memfd, 0) != base as i64 {
            return false;
        }
        let rest = sys!(calls::MMAP, base + code, size - code, PROT_READ | PROT_WRITE, flags, memfd, code);
        if rest != (base + code) as i64 {
            sys!(calls::MUNMAP, base, code);
            return false;
        }
    }
    true
}
