//! Calls that start programs: what they start has the shim too, whatever the environment it is given.
//!
//! Wrapped, because nothing could be asked of the kernel later: a program that was started without the shim has none.
//!
//! | function | why |
//! |---|---|
//! | `execve`, `execv`, `execvp`, `execvpe`, `execl`, `execlp`, `execle`, `execveat`, `fexecve` | the new program's environment |
//! | `posix_spawn`, `posix_spawnp` | libc makes the exec of these inside itself |
//! | `system`, `popen` | the same, with the environment of the process |
//! | `syscall` | the same calls by number; and a mask that would block the shim's signal, which libc's own calls leave out |
//! | `pthread_cancel` | its first call takes the shim's signal: afterwards the shim takes it back, and passes on what is not its own |
//!
//! A system call instruction of the program's own is not seen: what it starts runs unprotected, and a dump says so.
//!
//! The shim's file exists only from the call to the first line of the new program: a memfd without close-on-exec, that
//! `LD_PRELOAD` names as `/proc/self/fd/N`, with two variables before the caller's own.

use core::arch::naked_asm;
use core::sync::atomic::{AtomicPtr, Ordering};

use crate::calls::{self, sys};
use crate::freeze;
use crate::ids;
use crate::protocol::DESCRIPTOR_VARIABLE;
use crate::start::{self, FILE, FILE_SIZE, PRELOAD_PREFIX};

type Text = *const u8;
type List = *const *const u8;

const PRELOAD: &[u8] = b"LD_PRELOAD=";
/// Variables that fit on the stack; longer environments get memory of their own.
const USUAL: usize = 512;
/// The number for the shim's file: above what programs are given.
const LOWEST_FD: u64 = 900;

unsafe extern "C" {
    static mut environ: List;
    fn __errno_location() -> *mut i32;
}
core::arch::global_asm!(".weak environ", ".weak __errno_location");

/// An environment with the shim in it, and its file.
struct Prepared {
    fd: i32,
    list: List,
    /// Memory of its own, or null.
    memory: *mut u8,
    size: usize,
    descriptor: [u8; 32],
    preload: [u8; 4096],
    few: [*const u8; USUAL],
}

impl Prepared {
    const fn new() -> Prepared {
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
    unsafe fn make(&mut self, given: List) -> List {
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
                    }
                    count += 1;
                }
            }
            let wanted = count + 3;
            let list = if wanted <= USUAL {
                (&raw mut self.few).cast::<*const u8>()
            } else {
                self.size = wanted * 8;
                self.memory = start::allocate(self.size);
                if self.memory.is_null() {
                    self.end();
                    return given;
                }
                self.memory.cast::<*const u8>()
            };
            let mut at = append(&mut self.descriptor, 0, DESCRIPTOR_VARIABLE);
            append_number(&mut self.descriptor, at, self.fd as u64);
            at = append(&mut self.preload, 0, PRELOAD);
            at = append(&mut self.preload, at, PRELOAD_PREFIX);
            at = append_number(&mut self.preload, at, self.fd as u64);
            if !theirs.is_null() && *theirs != 0 {
                let length = calls::length(theirs);
                if at + length + 2 < self.preload.len() {
                    at = append(&mut self.preload, at, b":");
                    append(&mut self.preload, at, core::slice::from_raw_parts(theirs, length));
                }
            }
            *list = self.descriptor.as_ptr();
            *list.add(1) = self.preload.as_ptr();
            let mut to = 2;
            let mut n = 0;
            while n < count {
                let variable = *given.add(n);
                if !calls::begins_with(variable, PRELOAD) {
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

    /// From here to the first line of the new program, the shim's signal waits: in between it would have no handler, and
    /// end the process. The new program's shim lets it in, when its handler is there.
    unsafe fn hold_signal(&self) {
        // SAFETY: a mask of 8 bytes.
        unsafe { sys!(calls::RT_SIGPROCMASK, 0, &raw const OURS, 0, 8) };
    }

    /// Takes everything away again, where the process goes on. Leaves errno alone.
    unsafe fn end(&mut self) {
        // SAFETY: what `make` made.
        unsafe {
            if self.fd >= 0 {
                sys!(calls::CLOSE, self.fd);
                self.fd = -1;
            }
            sys!(calls::RT_SIGPROCMASK, 1, &raw const OURS, 0, 8);
            if !self.memory.is_null() {
                sys!(calls::MUNMAP, self.memory, self.size);
                self.memory = core::ptr::null_mut();
            }
        }
    }
}

fn append(to: &mut [u8], at: usize, text: &[u8]) -> usize {
    let mut n = 0;
    while n < text.len() && at + n + 1 < to.len() {
        to[at + n] = text[n];
        n += 1;
    }
    to[at + n] = 0;
    at + n
}

fn append_number(to: &mut [u8], at: usize, number: u64) -> usize {
    let mut digits = [0u8; 20];
    let mut n = digits.len();
    let mut left = number;
    loop {
        n -= 1;
        digits[n] = b'0' + (left % 10) as u8;
        left /= 10;
        if left == 0 {
            break;
        }
    }
    append(to, at, &digits[n..])
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

/// The functions that ours stand before, looked up once: `dlsym` takes locks, which a child after fork may not.
const NAMES: [&[u8]; 8] = [
    b"execvpe\0",
    b"fexecve\0",
    b"execveat\0",
    b"posix_spawn\0",
    b"posix_spawnp\0",
    b"system\0",
    b"popen\0",
    b"pthread_cancel\0",
];
static REAL: [AtomicPtr<u8>; NAMES.len()] = [const { AtomicPtr::new(core::ptr::null_mut()) }; NAMES.len()];
const EXECVPE: usize = 0;
const FEXECVE: usize = 1;
const EXECVEAT: usize = 2;
const POSIX_SPAWN: usize = 3;
const POSIX_SPAWNP: usize = 4;
const SYSTEM: usize = 5;
const POPEN: usize = 6;
const PTHREAD_CANCEL: usize = 7;

/// Finds them all.
///
/// # Safety
/// Called by the constructor, where there is one thread.
pub unsafe fn find_real() {
    for (real, name) in REAL.iter().zip(NAMES) {
        // SAFETY: a C string.
        real.store(unsafe { start::next(name) }, Ordering::Relaxed);
    }
}

/// One of them. A C library that lacks it has nobody to call ours either; libraries in the program's start may, before the
/// constructor has run.
macro_rules! real {
    ($which:expr, $kind:ty) => {{
        let mut found = REAL[$which].load(Ordering::Relaxed);
        if found.is_null() {
            found = start::next(NAMES[$which]);
        }
        core::mem::transmute::<*mut u8, $kind>(found)
    }};
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn execve(path: Text, argv: List, envp: List) -> i32 {
    // SAFETY: as the caller of execve has to see to.
    unsafe {
        let mut prepared = Prepared::new();
        let list = prepared.make(envp);
        warn_of(path, list);
        prepared.hold_signal();
        // Only a failure comes back.
        let result = sys!(calls::EXECVE, path, argv, list);
        prepared.end();
        *__errno_location() = -result as i32;
        -1
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn execv(path: Text, argv: List) -> i32 {
    // SAFETY: as the caller of execv has to see to.
    unsafe { execve(path, argv, environ) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn execvpe(file: Text, argv: List, envp: List) -> i32 {
    // SAFETY: as the caller of execvpe has to see to.
    unsafe {
        let mut prepared = Prepared::new();
        let list = prepared.make(envp);
        prepared.hold_signal();
        let result = real!(EXECVPE, unsafe extern "C" fn(Text, List, List) -> i32)(file, argv, list);
        prepared.end();
        result
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn execvp(file: Text, argv: List) -> i32 {
    // SAFETY: as the caller of execvp has to see to.
    unsafe { execvpe(file, argv, environ) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn fexecve(fd: i32, argv: List, envp: List) -> i32 {
    // SAFETY: as the caller of fexecve has to see to.
    unsafe {
        let mut prepared = Prepared::new();
        let list = prepared.make(envp);
        prepared.hold_signal();
        let result = real!(FEXECVE, unsafe extern "C" fn(i32, List, List) -> i32)(fd, argv, list);
        prepared.end();
        result
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn execveat(fd: i32, path: Text, argv: List, envp: List, flags: i32) -> i32 {
    // SAFETY: as the caller of execveat has to see to.
    unsafe {
        let mut prepared = Prepared::new();
        let list = prepared.make(envp);
        let function = real!(EXECVEAT, unsafe extern "C" fn(i32, Text, List, List, i32) -> i32);
        prepared.hold_signal();
        let result = function(fd, path, argv, list, flags);
        prepared.end();
        result
    }
}

type Spawn = unsafe extern "C" fn(*mut i32, Text, *const u8, *const u8, List, List) -> i32;

#[unsafe(no_mangle)]
pub unsafe extern "C" fn posix_spawn(
    pid: *mut i32,
    path: Text,
    actions: *const u8,
    attributes: *const u8,
    argv: List,
    envp: List,
) -> i32 {
    // SAFETY: as the caller of posix_spawn has to see to.
    unsafe {
        let mut prepared = Prepared::new();
        let list = prepared.make(envp);
        let result = real!(POSIX_SPAWN, Spawn)(pid, path, actions, attributes, argv, list);
        prepared.end();
        result
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn posix_spawnp(
    pid: *mut i32,
    file: Text,
    actions: *const u8,
    attributes: *const u8,
    argv: List,
    envp: List,
) -> i32 {
    // SAFETY: as the caller of posix_spawnp has to see to.
    unsafe {
        let mut prepared = Prepared::new();
        let list = prepared.make(envp);
        let result = real!(POSIX_SPAWNP, Spawn)(pid, file, actions, attributes, argv, list);
        prepared.end();
        result
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn system(command: Text) -> i32 {
    // SAFETY: as the caller of system has to see to. libc takes the environment from `environ`: for as long as the
    // command runs, that is one with the shim, which nobody but the command has use for.
    unsafe {
        let function = real!(SYSTEM, unsafe extern "C" fn(Text) -> i32);
        if command.is_null() {
            return function(command);
        }
        let before = environ;
        let mut prepared = Prepared::new();
        environ = prepared.make(before);
        let result = function(command);
        if environ == prepared.list {
            environ = before;
        }
        prepared.end();
        result
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn popen(command: Text, mode: Text) -> *mut u8 {
    // SAFETY: as for `system`; popen returns when the command has been started.
    unsafe {
        let before = environ;
        let mut prepared = Prepared::new();
        environ = prepared.make(before);
        let result = real!(POPEN, unsafe extern "C" fn(Text, Text) -> *mut u8)(command, mode);
        if environ == prepared.list {
            environ = before;
        }
        prepared.end();
        result
    }
}

/// The first call has libc install its handler, over the shim's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pthread_cancel(thread: u64) -> i32 {
    // SAFETY: as the caller of pthread_cancel has to see to. Until the line after it, a signal of the shim's reaches
    // libc's handler, which ignores it: a dump just then takes longer, or says that the thread did not stop.
    unsafe {
        let result = real!(PTHREAD_CANCEL, unsafe extern "C" fn(u64) -> i32)(thread);
        freeze::take_signal();
        result
    }
}

/// `syscall(2)`: what is not for the shim goes on to libc.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn syscall() -> i64 {
    naked_asm!(
        "cmp edi, 14", // rt_sigprocmask
        "je 2f",
        "cmp edi, 130", // rt_sigsuspend
        "je 3f",
        "cmp edi, 59", // execve
        "je 4f",
        "cmp edi, 322", // execveat
        "je 5f",
        "mov rax, rdi", "mov rdi, rsi", "mov rsi, rdx", "mov rdx, rcx", "mov r10, r8", "mov r8, r9",
        "mov r9, [rsp + 8]",
        "cmp qword ptr [rip + {header} + {generation}], 0",
        "jne 8f",
        "syscall",
        "7:", "cmp rax, -4095",
        "jae 9f",
        "ret",
        // Virtual ids: as from a patch in the C library.
        "8:", "lea rcx, [rip + 7b]",
        "lea rsp, [rsp - 136]",
        "mov [rsp], rcx",
        "jmp {ids}",
        "9:", "mov rdi, rax", "jmp {failed}",
        "2:", "mov rdi, rsi", "mov rsi, rdx", "mov rdx, rcx", "mov rcx, r8", "jmp {mask}",
        "3:", "mov rdi, rsi", "mov rsi, rdx", "jmp {suspend}",
        "4:", "mov rdi, rsi", "mov rsi, rdx", "mov rdx, rcx", "jmp {execve}",
        "5:", "mov rdi, rsi", "mov rsi, rdx", "mov rdx, rcx", "mov rcx, r8", "mov r8, r9", "jmp {execveat}",
        header = sym ids::HEADER,
        generation = const core::mem::offset_of!(crate::translation::Header, generation),
        ids = sym ids::ids_entry,
        failed = sym failed,
        mask = sym change_mask,
        suspend = sym suspend,
        execve = sym execve_by_number,
        execveat = sym execveat_by_number,
    )
}

unsafe extern "C" fn failed(result: i64) -> i64 {
    // SAFETY: libc is there when a program calls it.
    unsafe { *__errno_location() = -result as i32 };
    -1
}

// Whether a thread believes that it blocks the shim's signal, which is never really blocked: a byte of each thread's own.
core::arch::global_asm!(".section .tbss,\"awT\",@nobits", "ckpt_believes:", ".zero 1", ".text",);

/// Reads the thread's belief, and sets it if `new` is not negative.
fn believes(new: i32) -> u64 {
    let at: *mut u8;
    // SAFETY: the offset that the dynamic linker gave the byte, from this thread's pointer.
    unsafe {
        core::arch::asm!("mov {0}, qword ptr [rip + ckpt_believes@GOTTPOFF]", "add {0}, qword ptr fs:[0]", out(reg) at);
        let old = *at;
        if new >= 0 {
            *at = new as u8;
        }
        old as u64
    }
}

static OURS: u64 = 1 << (crate::protocol::SIGNAL - 1);

unsafe extern "C" fn change_mask(how: u64, set: *const u64, before: *mut u64, size: u64) -> i64 {
    const SIG_BLOCK: u64 = 0;
    const SIG_UNBLOCK: u64 = 1;
    // SAFETY: the caller's sets, if they have the size that the kernel wants.
    unsafe {
        let mut changed = 0;
        let mut passed = set;
        let mut belief = -1;
        if !set.is_null() && size == 8 {
            let named = *set & OURS != 0;
            changed = *set & !OURS;
            passed = &raw const changed;
            belief = match how {
                SIG_BLOCK | SIG_UNBLOCK if !named => -1,
                SIG_UNBLOCK => 0,
                _ => named as i32,
            };
        }
        let result = sys!(calls::RT_SIGPROCMASK, how, passed, before, size);
        let _ = changed;
        if result < 0 {
            return failed(result);
        }
        let old = believes(belief);
        if !before.is_null() {
            *before |= old * OURS;
        }
        result
    }
}

unsafe extern "C" fn suspend(set: *const u64, size: u64) -> i64 {
    // SAFETY: as above.
    unsafe {
        let mut changed = 0;
        let mut passed = set;
        if !set.is_null() && size == 8 {
            changed = *set & !OURS;
            passed = &raw const changed;
        }
        let result = sys!(calls::RT_SIGSUSPEND, passed, size);
        let _ = changed;
        if result < 0 { failed(result) } else { result }
    }
}

unsafe extern "C" fn execve_by_number(path: Text, argv: List, envp: List) -> i64 {
    // SAFETY: as the caller of execve has to see to.
    unsafe { execve(path, argv, envp) as i64 }
}

unsafe extern "C" fn execveat_by_number(fd: i32, path: Text, argv: List, envp: List, flags: i32) -> i64 {
    // SAFETY: as the caller of execveat has to see to.
    unsafe { execveat(fd, path, argv, envp, flags) as i64 }
}

/// Arguments as a variadic function gets them: five registers, a return address, and the stack.
///
/// # Safety
/// `saved` is what the naked functions below push.
unsafe fn argument(saved: *const u64, n: usize) -> u64 {
    // SAFETY: the caller's arguments end in a null pointer, and nothing after it is read.
    unsafe { if n < 5 { *saved.add(n) } else { *saved.add(6 + n - 5) } }
}

/// Arguments that fit on the stack.
const MOST_ARGUMENTS: usize = 1024;
const E2BIG: i32 = 7;

/// Collects the arguments up to the null pointer. Gives the index after it; 0 if they are too many.
unsafe fn collect(saved: *const u64, list: &mut [*const u8; MOST_ARGUMENTS]) -> usize {
    let mut n = 0;
    while n < MOST_ARGUMENTS {
        // SAFETY: see `argument`.
        let value = unsafe { argument(saved, n) } as *const u8;
        list[n] = value;
        n += 1;
        if value.is_null() {
            return n;
        }
    }
    // SAFETY: libc is there when a program calls it.
    unsafe { *__errno_location() = E2BIG };
    0
}

unsafe extern "C" fn execl_with(path: Text, saved: *const u64) -> i32 {
    let mut list = [core::ptr::null(); MOST_ARGUMENTS];
    // SAFETY: as the caller of execl has to see to.
    unsafe { if collect(saved, &mut list) == 0 { -1 } else { execve(path, list.as_ptr(), environ) } }
}

unsafe extern "C" fn execlp_with(file: Text, saved: *const u64) -> i32 {
    let mut list = [core::ptr::null(); MOST_ARGUMENTS];
    // SAFETY: as the caller of execlp has to see to.
    unsafe { if collect(saved, &mut list) == 0 { -1 } else { execvpe(file, list.as_ptr(), environ) } }
}

unsafe extern "C" fn execle_with(path: Text, saved: *const u64) -> i32 {
    let mut list = [core::ptr::null(); MOST_ARGUMENTS];
    // SAFETY: as the caller of execle has to see to: the environment follows the null pointer.
    unsafe {
        let after = collect(saved, &mut list);
        if after == 0 { -1 } else { execve(path, list.as_ptr(), argument(saved, after) as List) }
    }
}

/// A variadic function on stable Rust: the registers that arguments may be in go to the stack, below the others.
macro_rules! variadic {
    ($name:ident, $with:ident) => {
        #[unsafe(no_mangle)]
        #[unsafe(naked)]
        pub unsafe extern "C" fn $name() -> i32 {
            naked_asm!(
                "push r9", "push r8", "push rcx", "push rdx", "push rsi",
                "mov rsi, rsp",
                "call {with}",
                "add rsp, 40",
                "ret",
                with = sym $with
            )
        }
    };
}
variadic!(execl, execl_with);
variadic!(execlp, execlp_with);
variadic!(execle, execle_with);

/// Says on standard error when a program that is about to start cannot have the shim.
unsafe fn warn_of(path: Text, list: List) {
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
