//! The signal frame that `rt_sigreturn` restores: how a thread gets all its registers back at once, without us.

use std::sync::LazyLock;

use ckpt_core::{General, Registers};

/// Byte offsets in `struct ucontext` of x86-64 (`asm/ucontext.h`, `asm/sigcontext.h`).
const FLAGS: usize = 0;
const STACK_FLAGS: usize = 24;
const MACHINE: usize = 40;
const FP_STATE: usize = MACHINE + 184;
const SIGNAL_MASK: usize = MACHINE + 256;
const SIZE: usize = SIGNAL_MASK + 8;

const UC_FP_XSTATE: u64 = 1;
const UC_SIGCONTEXT_SS: u64 = 2;
const UC_STRICT_RESTORE_SS: u64 = 4;

/// `sw_reserved` of the legacy area, where the frame says how much xsave state there is.
const SOFTWARE_BYTES: usize = 464;
/// `XSTATE_BV` of the header behind the legacy area: which components are not in their initial state.
const COMPONENTS: usize = 512;
/// The legacy area and the header.
pub const SMALLEST_AREA: usize = 576;
const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;
const FP_XSTATE_MAGIC2: u32 = 0x4650_5845;

/// Bytes that a frame takes, with room to align its xsave area to 64.
pub fn size(xsave: usize) -> usize {
    SIZE.next_multiple_of(64) + 64 + xsave + 4
}

/// Whether an xsave area has tile data of AMX (component 18) that is not in its initial state.
pub fn has_tiles(xsave: &[u8]) -> bool {
    const TILE_DATA: u64 = 1 << 18;
    let components = xsave.get(COMPONENTS..COMPONENTS + 8).and_then(|bytes| bytes.try_into().ok());
    components.is_some_and(|components| u64::from_ne_bytes(components) & TILE_DATA != 0)
}

/// How much of an xsave area there is to keep: as far as the last component that is not in its initial state.
///
/// `rt_sigreturn` drops all but the SSE registers without a word when a frame says more than the thread's own buffer holds
/// (`check_xstate_in_sigframe`), and that buffer has no room for a component that takes leave to use (AMX) before it is
/// used. ptrace gives the area of all components.
pub fn extent(xsave: &[u8]) -> usize {
    let components = u64::from_ne_bytes(xsave[COMPONENTS..][..8].try_into().unwrap());
    // The uncompacted layout is the CPU's own: CPUID leaf 13 gives size and offset of each component. Asked once: to a
    // virtual machine the instruction is a call of its host.
    static ENDS: LazyLock<[usize; 64]> = LazyLock::new(|| {
        let supported = std::arch::x86_64::__cpuid_count(13, 0);
        let supported = u64::from(supported.edx) << 32 | u64::from(supported.eax);
        std::array::from_fn(|component| match component {
            2.. if supported >> component & 1 == 1 => {
                let leaf = std::arch::x86_64::__cpuid_count(13, component as u32);
                (leaf.ebx + leaf.eax) as usize
            }
            _ => SMALLEST_AREA,
        })
    });
    let used = (0..64).filter(|component| components >> component & 1 == 1);
    used.map(|component| ENDS[component]).max().unwrap_or(0).max(SMALLEST_AREA).min(xsave.len())
}

/// A `struct ucontext` to lie at `address`, with its xsave area behind it. `fs_base` and `gs_base` are not part of a frame.
pub fn build(registers: &Registers, blocked: u64, address: u64) -> Vec<u8> {
    let mut frame = build_plain(&registers.general, blocked);
    let xsave = &registers.xsave[..extent(&registers.xsave)];
    frame.resize(size(registers.xsave.len()), 0);
    let flags = UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS;
    put(&mut frame, FLAGS, flags);
    let extended = (address as usize + SIZE).next_multiple_of(64) - address as usize;
    put(&mut frame, FP_STATE, address + extended as u64);
    let size = xsave.len() as u32;
    frame[extended..][..xsave.len()].copy_from_slice(xsave);
    // What ptrace has in the software bytes is the mask of features; the frame has it elsewhere.
    let features: [u8; 8] = xsave[SOFTWARE_BYTES..][..8].try_into().unwrap();
    let software = &mut frame[extended + SOFTWARE_BYTES..][..48];
    software.fill(0);
    software[0..4].copy_from_slice(&FP_XSTATE_MAGIC1.to_ne_bytes());
    software[4..8].copy_from_slice(&(size + 4).to_ne_bytes());
    software[8..16].copy_from_slice(&features);
    software[16..20].copy_from_slice(&size.to_ne_bytes());
    frame[extended + size as usize..][..4].copy_from_slice(&FP_XSTATE_MAGIC2.to_ne_bytes());
    frame
}

/// The same without vector state: the kernel clears it.
pub fn build_plain(general: &General, blocked: u64) -> Vec<u8> {
    let mut frame = vec![0; SIZE];
    put(&mut frame, FLAGS, UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS);
    // rt_sigreturn sets the alternate stack as well, and ignores an error in it: an unknown flag leaves it alone.
    put(&mut frame, STACK_FLAGS, 0x4000_0000);
    #[rustfmt::skip]
    let in_order = [
        general.r8, general.r9, general.r10, general.r11, general.r12, general.r13, general.r14, general.r15,
        general.rdi, general.rsi, general.rbp, general.rbx, general.rdx, general.rax, general.rcx, general.rsp,
        general.rip, general.eflags,
    ];
    for (n, value) in in_order.into_iter().enumerate() {
        put(&mut frame, MACHINE + n * 8, value);
    }
    // cs, gs, fs, ss: 16 bits each
    put(&mut frame, MACHINE + 144, general.cs | general.gs << 16 | general.fs << 32 | general.ss << 48);
    put(&mut frame, SIGNAL_MASK, blocked);
    frame
}

fn put(frame: &mut [u8], at: usize, value: u64) {
    frame[at..at + 8].copy_from_slice(&value.to_ne_bytes());
}
