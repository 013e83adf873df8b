//! Calls that start programs: what they start has the shim too, whatever the environment it is given.
//!
//! Wrapped, because nothing could be asked of the kernel later: a program that was started without the shim has none.
//!
//! | function | why |
//! |---|---|
//! | `execve`, `execv`, `execvp`, `execvpe`, `execl`, `execlp`, `execle`, `execveat`, `fexecve` | the new program's environment |
//! | `posix_spawn`, `posix_spawnp` | libc makes the exec of these inside itself |
//! | `system`, `popen` | the same, with the environment of the process: `commands.rs` |
//! | `syscall` | the same calls by number; and a mask that would block the shim's signal, which libc's own calls leave out |
//! | `pthread_cancel` | its first call takes the shim's signal: afterwards the shim takes it back, and passes on what is not its own |
//!
//! A system call instruction of the program's own is not seen: what it starts runs unprotected, and a dump says so.

use core::arch::naked_asm;
use core::sync::atomic::{AtomicPtr, Ordering};

use crate::calls::{self, sys};
use crate::environment::{Prepared, hold_signal};
use crate::unprotected::{File, warn_of, warn_of_found};
use crate::{commands, freeze, start};

pub type Text = *const u8;
pub type List = *const *const u8;

unsafe extern "C" {
    pub static mut environ: List;
    pub fn __errno_location() -> *mut i32;
}
core::arch::global_asm!(".weak environ", ".weak __errno_location");

/// The functions that ours stand before, looked up once: `dlsym` takes locks, which a child after fork may not.
const NAMES: [&[u8]; 6] = [
    b"execvpe\0",
    b"fexecve\0",
    b"execveat\0",
    b"posix_spawn\0",
    b"posix_spawnp\0",
    b"pthread_cancel\0",
];
static REAL: [AtomicPtr<u8>; NAMES.len()] = [const { AtomicPtr::new(core::ptr::null_mut()) }; NAMES.len()];
const EXECVPE: usize = 0;
const FEXECVE: usize = 1;
const EXECVEAT: usize = 2;
const POSIX_SPAWN: usize = 3;
const POSIX_SPAWNP: usize = 4;
const PTHREAD_CANCEL: usize = 5;

/// Finds them all.
///
/// # Safety
/// Called by the constructor, where there is one thread.
pub unsafe fn find_real() {
    // SAFETY: as this one is called.
    unsafe { commands::find_real() };
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

/// A variable of the process's own environment, by its name with `=`.
///
/// # Safety
/// `environ` is what libc says.
pub unsafe fn variable(name: &[u8]) -> Option<Text> {
    // SAFETY: an environment ends in a null pointer.
    unsafe {
        let mut place = environ;
        while !place.is_null() && !(*place).is_null() {
            if calls::begins_with(*place, name) {
                return Some((*place).add(name.len()));
            }
            place = place.add(1);
        }
    }
    None
}

/// Becomes another program: only a failure comes back. The shim's signal waits until its handler is there again.
unsafe fn exec_with(envp: List, exec: impl FnOnce(List) -> i32) -> i32 {
    // SAFETY: as the caller of the function that is wrapped has to see to.
    unsafe {
        let mut prepared = Prepared::new();
        let list = prepared.make(envp);
        hold_signal();
        let result = exec(list);
        prepared.end();
        result
    }
}

/// Starts another program beside this one.
unsafe fn spawn_with(envp: List, spawn: impl FnOnce(List) -> i32) -> i32 {
    // SAFETY: as the caller of the function that is wrapped has to see to.
    unsafe {
        let mut prepared = Prepared::new();
        let result = spawn(prepared.make(envp));
        prepared.end();
        result
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn execve(path: Text, argv: List, envp: List) -> i32 {
    // SAFETY: as the caller of execve has to see to.
    unsafe {
        exec_with(envp, |list| {
            warn_of(File::at(path), list);
            let result = sys!(calls::EXECVE, path, argv, list);
            *__errno_location() = -result as i32;
            -1
        })
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
        exec_with(envp, |list| {
            warn_of_found(file, list);
            real!(EXECVPE, unsafe extern "C" fn(Text, List, List) -> i32)(file, argv, list)
        })
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
        exec_with(envp, |list| {
            warn_of(File::open_already(fd), list);
            real!(FEXECVE, unsafe extern "C" fn(i32, List, List) -> i32)(fd, argv, list)
        })
    }
}

type ExecveAt = unsafe extern "C" fn(i32, Text, List, List, i32) -> i32;

#[unsafe(no_mangle)]
pub unsafe extern "C" fn execveat(fd: i32, path: Text, argv: List, envp: List, flags: i32) -> i32 {
    // SAFETY: as the caller of execveat has to see to.
    unsafe {
        exec_with(envp, |list| {
            warn_of(File { directory: fd, path, flags }, list);
            real!(EXECVEAT, ExecveAt)(fd, path, argv, list, flags)
        })
    }
}

type Spawn = unsafe extern "C" fn(*mut i32, Text, *const u8, *const u8, List, List) -> i32;

/// Two functions that differ in how they look for the file.
macro_rules! spawn {
    ($name:ident, $real:ident, $warn:expr) => {
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            pid: *mut i32,
            path: Text,
            actions: *const u8,
            attributes: *const u8,
            argv: List,
            envp: List,
        ) -> i32 {
            // SAFETY: as the caller of posix_spawn has to see to.
            unsafe {
                spawn_with(envp, |list| {
                    $warn(path, list);
                    real!($real, Spawn)(pid, path, actions, attributes, argv, list)
                })
            }
        }
    };
}
spawn!(posix_spawn, POSIX_SPAWN, |path, list| warn_of(File::at(path), list));
spawn!(posix_spawnp, POSIX_SPAWNP, |path, list| warn_of_found(path, list));

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
