//! Alternate stacks too small for a signal frame, which the kernel lets a program have (2,048 bytes are enough for it).
//!
//! Wrapped: `sigaltstack`, also by `syscall`. On a CPU with large vector registers a frame does not fit there, and the
//! kernel ends a thread that gets a signal: the program's own, or ours. Such a thread gets a larger stack in its place, and
//! is told of its own when it asks. What is large enough is passed on as it is. Not seen is a system call instruction of
//! the program's own.

use core::arch::x86_64::{__cpuid_count, _xgetbv};

use crate::calls::{self, sys};
use crate::environment::{hold_signal, let_signal};
use crate::{by_number, start};

/// `stack_t`
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Stack {
    address: u64,
    flags: u32,
    _reserved: u32,
    size: u64,
}

/// What a thread has asked for, and the memory that it has instead: all 0 where it has what it asked for.
#[repr(C)]
#[derive(Clone, Copy)]
struct Shadow {
    asked: Stack,
    own: u64,
}

core::arch::global_asm!(".section .tbss,\"awT\",@nobits", ".balign 8", "ckpt_altstack:", ".zero 32", ".text");

/// This thread's.
fn shadow() -> *mut Shadow {
    let at: *mut Shadow;
    // SAFETY: the offset that the dynamic linker gave the variable, from this thread's pointer.
    unsafe {
        core::arch::asm!("mov {0}, qword ptr [rip + ckpt_altstack@GOTTPOFF]", "add {0}, qword ptr fs:[0]", out(reg) at);
    }
    at
}

const SS_DISABLE: u32 = 2;
/// What a program may need beside the frame.
const ROOM: u64 = 8192;
/// Tile data of AMX: in the frame only of threads that asked for it, for which the kernel looks at the size itself.
const ASKED_FOR: u32 = 18;

/// Bytes that a frame may take without what a program has to ask for.
fn frame_size() -> u64 {
    // SAFETY: asks the CPU; Linux on x86-64 with AVX has set up xgetbv, which leaf 1 says.
    unsafe {
        let mut vector = 576;
        if __cpuid_count(1, 0).ecx >> 27 & 1 == 1 {
            let enabled = xgetbv();
            let mut feature = 2;
            while feature < 63 {
                if enabled >> feature & 1 == 1 && feature != ASKED_FOR {
                    let found = __cpuid_count(13, feature);
                    let end = found.ebx as u64 + found.eax as u64;
                    if end > vector {
                        vector = end;
                    }
                }
                feature += 1;
            }
        }
        // ucontext, siginfo, alignment (arch/x86/kernel/signal.c).
        vector + 576
    }
}

#[target_feature(enable = "xsave")]
fn xgetbv() -> u64 {
    // SAFETY: the caller has asked whether there is the instruction.
    unsafe { _xgetbv(0) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sigaltstack(new: *const Stack, old: *mut Stack) -> i32 {
    // SAFETY: as the caller of sigaltstack has to see to.
    let result = unsafe { change(new, old) };
    if result < 0 {
        // SAFETY: libc is there when a program calls it.
        return unsafe { by_number::failed(result) } as i32;
    }
    0
}

/// The call, and its result as the kernel gives it.
///
/// # Safety
/// As for sigaltstack.
pub unsafe fn change(new: *const Stack, old: *mut Stack) -> i64 {
    // SAFETY: as for this function; the kernel has looked at both pointers before they are used here.
    unsafe {
        let shadow = shadow();
        let before = *shadow;
        // Between the program's stack and ours, no signal of ours may come.
        hold_signal();
        // Both may be one.
        let again = if !new.is_null() && new == old.cast_const() { Some(*new) } else { None };
        let result = sys!(calls::SIGALTSTACK, new, old);
        if result == 0 && !new.is_null() {
            (*shadow).asked = Stack { address: 0, flags: 0, _reserved: 0, size: 0 };
            let asked = match again {
                Some(asked) => asked,
                None => *new,
            };
            let needed = frame_size();
            if asked.flags & SS_DISABLE == 0 && asked.size < needed {
                // For AMX as well, should the program ask for it later.
                let size = (needed + ROOM + 16384) & !4095;
                if before.own == 0 {
                    (*shadow).own = start::allocate(size as usize) as u64;
                }
                if (*shadow).own != 0 {
                    let ours = Stack { address: (*shadow).own, size, ..asked };
                    if sys!(calls::SIGALTSTACK, &raw const ours, 0) == 0 {
                        (*shadow).asked = asked;
                    }
                }
            }
        }
        let_signal();
        if result == 0 && !old.is_null() && before.asked.size != 0 && (*old).address == before.own {
            (*old).address = before.asked.address;
            (*old).size = before.asked.size;
        }
        result
    }
}
