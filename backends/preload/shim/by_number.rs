//! `syscall(2)`: calls by number that the shim would wrap by name, and masks and actions that would take its signal away.

use core::arch::naked_asm;

use crate::altstack;
use crate::calls::{self, sys};
use crate::environment::OURS;
use crate::exec::{self, List, Text, execve, execveat};
use crate::freeze::{self, Action};
use crate::protocol::SIGNAL;

/// `syscall(2)`: what is not for the shim goes on to libc.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn syscall() -> i64 {
    naked_asm!(
        "cmp edi, 13", // rt_sigaction, of the shim's signal
        "jne 13f",
        "cmp esi, {signal}",
        "je 12f",
        "13:",
        "cmp edi, 14", // rt_sigprocmask
        "je 2f",
        "cmp edi, 130", // rt_sigsuspend
        "je 3f",
        "cmp edi, 131", // sigaltstack
        "je 6f",
        "cmp edi, 59", // execve
        "je 4f",
        "cmp edi, 322", // execveat
        "je 5f",
        // The number stays on the stack: the handler of a signal finds it there (`number_at`).
        "push rdi",
        "mov rax, rdi", "mov rdi, rsi", "mov rsi, rdx", "mov rdx, rcx", "mov r10, r8", "mov r8, r9",
        "mov r9, [rsp + 16]",
        "syscall",
        ".globl ckpt_after_call",
        ".hidden ckpt_after_call",
        "ckpt_after_call:",
        "lea rsp, [rsp + 8]",
        "cmp rax, -4095",
        "jae 9f",
        "ret",
        "9:", "mov rdi, rax", "jmp {failed}",
        "2:", "mov rdi, rsi", "mov rsi, rdx", "mov rdx, rcx", "mov rcx, r8", "jmp {mask}",
        "3:", "mov rdi, rsi", "mov rsi, rdx", "jmp {suspend}",
        "4:", "mov rdi, rsi", "mov rsi, rdx", "mov rdx, rcx", "jmp {execve}",
        "5:", "mov rdi, rsi", "mov rsi, rdx", "mov rdx, rcx", "mov rcx, r8", "mov r8, r9", "jmp {execveat}",
        "6:", "mov rdi, rsi", "mov rsi, rdx", "jmp {altstack}",
        "12:", "mov rdi, rsi", "mov rsi, rdx", "mov rdx, rcx", "mov rcx, r8", "jmp {action}",
        failed = sym failed,
        signal = const SIGNAL,
        action = sym change_action,
        altstack = sym altstack_by_number,
        mask = sym change_mask,
        suspend = sym suspend,
        execve = sym execve_by_number,
        execveat = sym execveat_by_number,
    )
}

unsafe extern "C" {
    /// The instruction after the system call above.
    static ckpt_after_call: u8;
}

/// The number of the call that a thread has made by [`syscall`], if that is where it is.
///
/// # Safety
/// The instruction and the stack pointer are a thread's.
pub unsafe fn number_at(instruction: u64, stack: u64) -> Option<u64> {
    // SAFETY: at that instruction it lies on top of the stack.
    unsafe { if instruction == &raw const ckpt_after_call as u64 { Some(*(stack as *const u64)) } else { None } }
}

/// The error of a call, as libc gives it.
///
/// # Safety
/// None: libc is there when a program calls it.
pub unsafe extern "C" fn failed(result: i64) -> i64 {
    // SAFETY: libc is there when a program calls it.
    unsafe { *exec::__errno_location() = -result as i32 };
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

/// The action of the shim's signal, which a program can set by number only, stays the shim's: the program's own runs for
/// signals that are not ours, with all others blocked, and is what the program sees.
unsafe extern "C" fn change_action(_signal: u64, new: *const Action, old: *mut Action, size: u64) -> i64 {
    const EINVAL: i64 = 22;
    // SAFETY: the caller's structures, if they have the size that the kernel wants.
    unsafe {
        if size != 8 {
            return failed(-EINVAL);
        }
        let before = freeze::others();
        if !new.is_null() {
            freeze::set_others(&*new);
        }
        if !old.is_null() {
            *old = before;
        }
        0
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

unsafe extern "C" fn altstack_by_number(new: *const altstack::Stack, old: *mut altstack::Stack) -> i64 {
    // SAFETY: as the caller of sigaltstack has to see to.
    unsafe { altstack::sigaltstack(new, old) as i64 }
}

unsafe extern "C" fn execve_by_number(path: Text, argv: List, envp: List) -> i64 {
    // SAFETY: as the caller of execve has to see to.
    unsafe { execve(path, argv, envp) as i64 }
}

unsafe extern "C" fn execveat_by_number(fd: i32, path: Text, argv: List, envp: List, flags: i32) -> i64 {
    // SAFETY: as the caller of execveat has to see to.
    unsafe { execveat(fd, path, argv, envp, flags) as i64 }
}
