//! Virtual ids, in a restored tree whose old ids were taken.
//!
//! The driver (or, in a program that such a tree starts, the constructor) has patched the C library: every system call
//! that takes, gives or shows an id arrives at [`ids_entry`], with all registers as they were. So what the program sees
//! does not depend on the function that it called, and a tree with its real ids pays nothing.
//!
//! A call is made in three steps: [`before`] translates what goes to the kernel, the gate makes the call, [`after`]
//! translates what came. Both speak of the generation that was read first. Should the tree be saved in between and come
//! back under other ids, then the gate, or whoever finds a thread in it, sends the call back to its first step, and
//! answers are still understood by the table of the generation that they came under.
//!
//! Handlers of signals stand behind one of ours, which translates the sender and sends interrupted calls back likewise.

use core::arch::{global_asm, naked_asm};
use core::mem::offset_of;
use core::sync::atomic::{Ordering, compiler_fence};

use crate::calls::{self, sys};
use crate::translation::{HEADER_MAGIC, Header, KEPT, Table};

mod library;
mod paths;
mod values;

pub use library::{begin, write_trailer};

/// Room for code between patches and the entry.
const STUBS_SIZE: usize = 32 * 1024;

#[repr(C, align(4096))]
struct Room([u8; STUBS_SIZE]);
static mut STUBS: Room = Room([0; STUBS_SIZE]);

pub static mut HEADER: Header = Header {
    magic: HEADER_MAGIC,
    entry: 0,
    cloned: 0,
    again: 0,
    gate: 0,
    gate_end: 0,
    trampoline: 0,
    stubs: 0,
    stubs_size: 0,
    stubs_used: 0,
    generation: 0,
    tables: [0; KEPT],
    handlers: [0; 65],
};

/// One call on its way. Its layout is that of the code below.
#[repr(C)]
pub struct Frame {
    number: u64,
    args: [u64; 6],
    result: i64,
    generation: u64,
    /// What the kernel gets.
    real_number: u64,
    real: [u64; 6],
    vectors: [u8; 256],
    /// What [`before`] has to tell [`after`].
    notes: [u64; 2],
    buffer: [u8; BUFFER],
}

const BUFFER: usize = 512;
const FRAME: usize = size_of::<Frame>();
const _: () = assert!(FRAME.is_multiple_of(16));

unsafe extern "C" {
    pub fn ids_entry();
    fn ids_cloned();
    fn ids_again();
    fn ids_gate();
    fn ids_gate_end();
}

// `ret 128` takes back the distance that the stub kept from the red zone. The unwinder sees the caller in the library.
global_asm!(
    ".globl ids_entry", ".hidden ids_entry", ".globl ids_cloned", ".hidden ids_cloned",
    ".globl ids_again", ".hidden ids_again", ".globl ids_gate", ".hidden ids_gate",
    ".globl ids_gate_end", ".hidden ids_gate_end",
    ".macro ids_vectors op",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "ids_vector \\op, \\n",
    ".endr",
    ".endm",
    ".macro ids_vector op, n",
    ".ifc \\op, save",
    "movups [rsp + {vectors} + 16 * \\n], xmm\\n",
    ".else",
    "movups xmm\\n, [rbx + {vectors} + 16 * \\n]",
    ".endif",
    ".endm",
    "ids_entry:",
    ".cfi_startproc",
    ".cfi_def_cfa rsp, 136",
    ".cfi_offset rip, -136",
    "push rbp",
    ".cfi_def_cfa_offset 144",
    ".cfi_offset rbp, -144",
    "mov rbp, rsp",
    ".cfi_def_cfa_register rbp",
    "push rbx",
    ".cfi_offset rbx, -152",
    "and rsp, -16",
    "sub rsp, {frame}",
    "mov [rsp + {number}], rax",
    "mov [rsp + {args}], rdi",
    "mov [rsp + {args} + 8], rsi",
    "mov [rsp + {args} + 16], rdx",
    "mov [rsp + {args} + 24], r10",
    "mov [rsp + {args} + 32], r8",
    "mov [rsp + {args} + 40], r9",
    "mov qword ptr [rsp + {notes}], 0",
    "mov qword ptr [rsp + {notes} + 8], 0",
    "ids_vectors save",
    "mov rbx, rsp",
    "ids_again:",
    "mov rdi, rbx",
    "call {before}",
    "test eax, eax",
    "jnz 3f",
    "ids_gate:",
    "mov rax, [rip + {header} + {current}]",
    "cmp rax, [rbx + {generation}]",
    "jne ids_again",
    "mov rax, [rbx + {real_number}]",
    "mov rdi, [rbx + {real}]",
    "mov rsi, [rbx + {real} + 8]",
    "mov rdx, [rbx + {real} + 16]",
    "mov r10, [rbx + {real} + 24]",
    "mov r8, [rbx + {real} + 32]",
    "mov r9, [rbx + {real} + 40]",
    "syscall",
    "ids_gate_end:",
    "mov [rbx + {result}], rax",
    "mov rdi, rbx",
    "call {after}",
    "3:",
    "ids_vectors load",
    "mov rdi, [rbx + {args}]",
    "mov rsi, [rbx + {args} + 8]",
    "mov rdx, [rbx + {args} + 16]",
    "mov r10, [rbx + {args} + 24]",
    "mov r8, [rbx + {args} + 32]",
    "mov r9, [rbx + {args} + 40]",
    "mov rax, [rbx + {result}]",
    "mov rbx, [rbp - 8]",
    "mov rsp, rbp",
    ".cfi_def_cfa_register rsp",
    "pop rbp",
    ".cfi_def_cfa_offset 136",
    "ret 128",
    ".cfi_endproc",
    "ids_cloned:",
    ".cfi_startproc",
    ".cfi_def_cfa rsp, 136",
    ".cfi_offset rip, -136",
    "push rbp",
    ".cfi_def_cfa_offset 144",
    ".cfi_offset rbp, -144",
    "mov rbp, rsp",
    ".cfi_def_cfa_register rbp",
    "push rbx",
    ".cfi_offset rbx, -152",
    "and rsp, -16",
    "sub rsp, {frame}",
    "mov [rsp + {args}], rdi",
    "mov [rsp + {args} + 8], rsi",
    "mov [rsp + {args} + 16], rdx",
    "mov [rsp + {args} + 24], r10",
    "mov [rsp + {args} + 32], r8",
    "mov [rsp + {args} + 40], r9",
    "ids_vectors save",
    "mov rbx, rsp",
    "mov rdi, rax",
    "mov rsi, rcx",
    "call {cloned}",
    "mov [rbx + {result}], rax",
    "jmp 3b",
    ".cfi_endproc",
    frame = const FRAME,
    number = const offset_of!(Frame, number),
    args = const offset_of!(Frame, args),
    result = const offset_of!(Frame, result),
    generation = const offset_of!(Frame, generation),
    real_number = const offset_of!(Frame, real_number),
    real = const offset_of!(Frame, real),
    vectors = const offset_of!(Frame, vectors),
    notes = const offset_of!(Frame, notes),
    current = const offset_of!(Header, generation),
    header = sym HEADER,
    before = sym before,
    after = sym after,
    cloned = sym cloned,
);

/// Fills in what the driver looks for.
///
/// # Safety
/// Called by the constructor, where there is one thread.
pub unsafe fn prepare() {
    let header = &raw mut HEADER;
    // SAFETY: nobody else looks at it yet.
    unsafe {
        (*header).entry = ids_entry as *const () as u64;
        (*header).cloned = ids_cloned as *const () as u64;
        (*header).again = ids_again as *const () as u64;
        (*header).gate = ids_gate as *const () as u64;
        (*header).gate_end = ids_gate_end as *const () as u64;
        (*header).trampoline = trampoline as *const () as u64;
        (*header).stubs = (&raw const STUBS) as u64;
        (*header).stubs_size = STUBS_SIZE as u64;
    }
}

pub fn generation() -> u64 {
    // SAFETY: a word that only a driver changes, while no thread runs.
    let generation = unsafe { (&raw const HEADER.generation).read_volatile() };
    compiler_fence(Ordering::SeqCst);
    generation
}

/// The table of a generation.
fn table(generation: u64) -> Table<'static> {
    if generation == 0 {
        return Table::EMPTY;
    }
    // SAFETY: the driver or `begin` wrote the address of a table.
    unsafe { Table::at((&raw const HEADER.tables[generation as usize % KEPT]).read_volatile() as *const u64) }
}

/// Puts a context that a signal has interrupted where no id is on its way: a call that is at the gate begins anew, a
/// clone that has just come back is translated, and a handler that has not begun knows how old the id of its sender is.
///
/// # Safety
/// A ucontext of the kernel.
pub unsafe fn settle(context: *mut u64) {
    const RAX: usize = 18;
    const RCX: usize = 19;
    const RIP: usize = 21;
    let (gate, end) = (ids_gate as *const () as u64, ids_gate_end as *const () as u64);
    // SAFETY: as promised by the caller; the stubs are our own code, where two bytes precede what follows a call.
    unsafe {
        let rip = *context.add(RIP);
        if (gate..end).contains(&rip) {
            *context.add(RIP) = ids_again as *const () as u64;
        }
        // Most often so: the signal that freezes was sent while another was pending, and the kernel has made both frames.
        if rip == trampoline as *const () as u64 {
            *context.add(RCX) = generation();
            *context.add(RIP) = arrived as *const () as u64;
        }
        let stubs = (&raw const STUBS) as u64;
        if rip.wrapping_sub(stubs + 2) < STUBS_SIZE as u64 - 48 && *context.add(RAX) as i64 > 0 {
            // See `Stubs::add`: the place to return to is in the two instructions after the next two.
            let code = rip as *const u8;
            if code.sub(2).cast::<[u8; 2]>().read() == [0x0f, 0x05] {
                let (low, high) = (code.add(18).cast::<u32>(), code.add(26).cast::<u32>());
                *context.add(RAX) = table(generation()).result(*context.add(RAX) as i32) as u64;
                *context.add(RIP) = low.read_unaligned() as u64 | (high.read_unaligned() as u64) << 32;
            }
        }
    }
}

/// The number of the call that a context has just come back from, if it came through the gate.
///
/// # Safety
/// A ucontext of the kernel.
pub unsafe fn number_of(context: *const u64) -> Option<u64> {
    const RIP: usize = 21;
    const RBX: usize = 16;
    // SAFETY: right after the gate, rbx is the frame.
    unsafe {
        (*context.add(RIP) == ids_gate_end as *const () as u64)
            .then(|| (*(*context.add(RBX) as *const Frame)).real_number)
    }
}

/// Whether a siginfo with this signal and code says who sent it.
fn has_sender(signal: i32, code: i32) -> bool {
    const SIGCHLD: i32 = 17;
    // SI_USER, SI_QUEUE, SI_MESGQ, SI_TKILL, and what became of a child.
    matches!(code, 0 | -1 | -3 | -6) || signal == SIGCHLD && (1..=6).contains(&code)
}

/// Who sent a signal, as the program knows him.
///
/// # Safety
/// A siginfo.
#[inline(never)]
pub unsafe fn translate_info(table: &Table<'_>, info: *mut i32, to_real: bool) {
    const CODE: usize = 2;
    const PID: usize = 4;
    // SAFETY: as promised by the caller.
    unsafe {
        if has_sender(*info, *info.add(CODE)) {
            let pid = info.add(PID);
            *pid = if to_real { table.argument(*pid) } else { table.result(*pid) };
        }
    }
}

/// The same, for a signal that came in a generation.
///
/// # Safety
/// A siginfo of the kernel.
pub unsafe fn translate_signal(info: *mut i32, generation: u64) {
    if generation != 0 && !info.is_null() {
        // SAFETY: as promised by the caller.
        unsafe { translate_info(&table(generation), info, false) };
    }
}

/// Stands before every handler of the program. With its first instruction it is known in which generation the signal came;
/// who is frozen before that is taken there by [`settle`].
#[unsafe(naked)]
pub unsafe extern "C" fn trampoline(signal: i32, info: *mut i32, context: *mut u64) {
    naked_asm!(
        "mov rcx, qword ptr [rip + {header} + {generation}]",
        "jmp {arrived}",
        header = sym HEADER,
        generation = const core::mem::offset_of!(Header, generation),
        arrived = sym arrived,
    )
}

unsafe extern "C" fn arrived(signal: i32, info: *mut i32, context: *mut u64, generation: u64) {
    // SAFETY: what the kernel passes to a handler; the program's own was noted when it was set.
    unsafe {
        translate_signal(info, generation);
        settle(context);
        let handler = (&raw const HEADER.handlers[signal as usize % 65]).read_volatile();
        if handler > 1 {
            let handler: unsafe extern "C" fn(i32, *mut i32, *mut u64) = core::mem::transmute(handler);
            handler(signal, info, context);
        }
    }
}

/// Translates what goes to the kernel. 1 if no call is needed.
unsafe extern "C" fn before(frame: &mut Frame) -> u32 {
    frame.generation = generation();
    frame.real_number = frame.number;
    frame.real = frame.args;
    // SAFETY: the program's own call.
    unsafe {
        let table = table(frame.generation);
        values::before(frame, &table);
        paths::before(frame, &table);
    }
    0
}

/// Translates what came from it.
unsafe extern "C" fn after(frame: &mut Frame) {
    if (-4095..0).contains(&frame.result) {
        // SAFETY: as below.
        unsafe { values::failed(frame) };
        return;
    }
    // SAFETY: the program's own call, which has worked.
    unsafe {
        let table = table(frame.generation);
        values::after(frame, &table);
        paths::after(frame, &table);
    }
}

/// Both sides of a clone: the maker learns the id, and what was made finds its own where the kernel wrote it.
/// The result is of a generation.
unsafe extern "C" fn cloned(result: i64, of: u64) -> i64 {
    const PR_GET_TID_ADDRESS: u64 = 40;
    if result > 0 {
        return table(of).result(result as i32) as i64;
    }
    if result == 0 {
        // SAFETY: the place that the C library named for its id.
        unsafe {
            let (mut now, mut real);
            loop {
                now = generation();
                real = sys!(calls::GETTID, 0) as i32;
                if now == generation() {
                    break;
                }
            }
            let id = table(now).result(real);
            let mut place: *mut i32 = core::ptr::null_mut();
            if id != real
                && sys!(calls::PRCTL, PR_GET_TID_ADDRESS, &raw mut place) == 0
                && !place.is_null()
                && *place == real
            {
                *place = id;
            }
        }
    }
    result
}
