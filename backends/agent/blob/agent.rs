//! The agent: it waits for a batch, runs it, answers, and waits again.
//!
//! # Rules
//! This runs inside a foreign process, in threads that hold any lock and in any state. So: no allocation, no locks, no
//! std, no thread-local storage, no writable data of its own, no relocation. The only memory it writes is its lane, its
//! stack, and what the calls of a batch say. It knows no resource.
//!
//! # Safety
//! Addresses in the lane and in calls come from the driver, which lays them out inside the region or takes them from the
//! target's own mappings.
#![no_std]
#![no_main]

use core::arch::{asm, naked_asm};
use core::arch::x86_64::_mm_crc32_u64;
use core::sync::atomic::{AtomicU32, Ordering};

#[path = "../src/protocol.rs"]
#[allow(dead_code)]
mod protocol;
use protocol::*;

const SYS_READ: u64 = 0;
const SYS_POLL: u64 = 7;
const SYS_MPROTECT: u32 = 10;
const SYS_RT_SIGRETURN: u32 = 15;
const SYS_SOCKETPAIR: u64 = 53;
const SYS_PIDFD_OPEN: u64 = 434;
const AF_UNIX: u64 = 1;
const SOCK_SEQPACKET: u64 = 5;
const SOCK_CLOEXEC: u64 = 0o2000000;
const POLLIN: u32 = 1;
const SYS_CLOSE: u64 = 3;
const SYS_NANOSLEEP: u64 = 35;
const SYS_SENDTO: u64 = 44;
const SYS_KILL: u64 = 62;
const SYS_FUTEX: u64 = 202;
const SYS_EXIT_GROUP: u64 = 231;
const SYS_CLONE3: u64 = 435;
const SYS_CLONE: u64 = 56;
const SYS_EXIT: u64 = 60;
const SYS_WAIT4: u64 = 61;
const SYS_CLOSE_RANGE: u64 = 436;
const FUTEX_WAIT: u64 = 0;
const FUTEX_WAKE: u64 = 1;
const MSG_NOSIGNAL: u64 = 0x4000;
const EINTR: i64 = 4;
const EBADF: i64 = 9;
const CLONE_VM: u64 = 0x100;
const CLONE_FS: u64 = 0x200;
const CLONE_FILES: u64 = 0x400;
const CLONE_VFORK: u64 = 0x4000;
const CLONE_UNTRACED: u64 = 0x0080_0000;
const WALL: u64 = 0x4000_0000;
const ESRCH: i32 = 3;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// Entered with the lane in `rdi` and a stack of the agent's own.
///
/// In a frozen target, `rsi` and `rdx` are the part of the region that is to become writable, lane and stack included: it
/// was mapped with one call. Where that fails, the thread leaves through its frame at once.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".text.entry")]
#[unsafe(naked)]
unsafe extern "C" fn _start() -> ! {
    naked_asm!(
        "test rsi, rsi",
        "jz 2f",
        "mov r12, rdi",
        "mov rdi, rsi",
        "mov rsi, rdx",
        "mov edx, 3",
        "mov eax, {mprotect}",
        "syscall",
        "mov rdi, r12",
        "test rax, rax",
        "jz 3f",
        "mov rsp, [rdi + {frame}]",
        "mov eax, {sigreturn}",
        "syscall",
        "ud2",
        "3:",
        "and rsp, -16",
        "call {boot}",
        "ud2",
        "2:",
        "and rsp, -16",
        "call {serve}",
        "ud2",
        mprotect = const SYS_MPROTECT,
        sigreturn = const SYS_RT_SIGRETURN,
        frame = const core::mem::offset_of!(Lane, frame),
        boot = sym boot,
        serve = sym serve,
    )
}

/// Makes the sockets of a frozen target. Until the driver has its own, its end is watched for by other means.
unsafe extern "C" fn boot(lane: *mut Lane) -> ! {
    unsafe {
        let pair = &raw mut (*lane).pair;
        let made = system(SYS_SOCKETPAIR, [AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair as u64, 0, 0]);
        let [ours, theirs] = pair.read_volatile();
        (*lane).socket = ours;
        let driver = (*lane).driver;
        let pidfd = if driver == 0 { -1 } else { system(SYS_PIDFD_OPEN, [driver as u64, 0, 0, 0, 0, 0]) as i32 };
        (*lane).watch = pidfd;
        let state = &*(&raw const (*lane).boot).cast::<AtomicU32>();
        state.store(if made < 0 { made as u32 } else { BOOT_READY as u32 }, Ordering::Release);
        system(SYS_FUTEX, [&raw const (*lane).boot as u64, FUTEX_WAKE, 1, 0, 0, 0]);
        let pause = [0u64, 5_000_000];
        let is_gone = || driver != 0 && system(SYS_KILL, [driver as u64, 0, 0, 0, 0, 0]) == -(ESRCH as i64);
        if made < 0 {
            // The driver takes us out of here. Without descriptors there is little to notice its end by.
            let mut patience = 6_000;
            loop {
                system(SYS_NANOSLEEP, [&raw const pause as u64, 0, 0, 0, 0, 0]);
                patience -= 1;
                if is_gone() || patience == 0 {
                    let _ = state.compare_exchange(made as u32, BOOT_GONE as u32, Ordering::AcqRel, Ordering::Acquire);
                    sigreturn((*lane).frame);
                }
            }
        }
        // struct pollfd: descriptor, events, returned events. A descriptor below 0 is passed over.
        let events = POLLIN as u64;
        let mut watched = [ours as u32 as u64 | events << 32, pidfd as u32 as u64 | events << 32];
        // Whom we cannot watch at all has two seconds to take its socket.
        let mut patience = 20;
        loop {
            let ready = system(SYS_POLL, [watched.as_mut_ptr() as u64, 2, 100, 0, 0, 0]);
            if ready > 0 || state.load(Ordering::Acquire) == BOOT_TAKEN as u32 {
                break;
            }
            if ready < 0 {
                system(SYS_NANOSLEEP, [&raw const pause as u64, 0, 0, 0, 0, 0]);
            }
            if pidfd < 0 {
                patience -= 1;
                if is_gone() || (driver == 0 && patience == 0) {
                    break;
                }
            }
        }
        if pidfd >= 0 {
            system(SYS_CLOSE, [pidfd as u64, 0, 0, 0, 0, 0]);
        }
        let left = state.compare_exchange(BOOT_READY as u32, BOOT_GONE as u32, Ordering::AcqRel, Ordering::Acquire);
        if left.is_ok() {
            system(SYS_CLOSE, [ours as u64, 0, 0, 0, 0, 0]);
            system(SYS_CLOSE, [theirs as u64, 0, 0, 0, 0, 0]);
            sigreturn((*lane).frame);
        }
        system(SYS_CLOSE, [theirs as u64, 0, 0, 0, 0, 0]);
        serve(lane)
    }
}

#[inline(always)]
unsafe fn system(number: u64, a: [u64; 6]) -> i64 {
    let result: i64;
    unsafe {
        asm!("syscall", inlateout("rax") number as i64 => result,
            in("rdi") a[0], in("rsi") a[1], in("rdx") a[2], in("r10") a[3], in("r8") a[4], in("r9") a[5],
            out("rcx") _, out("r11") _);
    }
    result
}

/// `clone3`: the child finds its lane at the top of its new stack, and starts there.
#[inline(always)]
unsafe fn clone(args: u64, size: u64) -> i64 {
    let result: i64;
    unsafe {
        asm!("syscall", "test rax, rax", "jnz 2f", "pop rdi", "call {serve}", "ud2", "2:",
            serve = sym serve,
            inlateout("rax") SYS_CLONE3 as i64 => result, in("rdi") args, in("rsi") size,
            out("rcx") _, out("r11") _);
    }
    result
}

/// Makes a copy of the process, which serves at `lane` as a skeleton does: it ends with its driver. Gives its pid.
///
/// The copy is the child of a go-between that shares our memory, and ends before we go on: so it is no child of the program,
/// which could come to wait for it, but of whoever inherits orphans. Neither has a signal for its end (`exit_signal` 0), and
/// the go-between is waited for here: nobody else runs.
unsafe fn copy_process(lane: *mut Lane, stack: u64, socket: i32) -> i64 {
    if socket < 0 {
        return -EBADF;
    }
    unsafe {
        (&raw mut (*lane).socket).write_volatile(socket);
        let made = &raw mut (*lane).copy;
        let between: i64;
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            // The go-between, on our stack, which it leaves alone, as we are held until it ends. The copy has its own.
            "mov eax, {clone}",
            "mov edi, {untraced}",
            "mov rsi, r12",
            "xor edx, edx",
            "xor r10d, r10d",
            "xor r8d, r8d",
            "syscall",
            "test rax, rax",
            "jz 3f",
            "mov [r13], eax",
            "xor edi, edi",
            "mov eax, {exit}",
            "syscall",
            "ud2",
            "3:",
            "pop rdi",
            "and rsp, -16",
            "call {begin}",
            "ud2",
            "2:",
            clone = const SYS_CLONE,
            untraced = const CLONE_UNTRACED,
            exit = const SYS_EXIT,
            begin = sym begin_copy,
            inlateout("rax") SYS_CLONE as i64 => between,
            in("rdi") CLONE_VM | CLONE_VFORK | CLONE_FS | CLONE_FILES | CLONE_UNTRACED,
            in("rsi") 0u64, in("rdx") 0u64, in("r10") 0u64, in("r8") 0u64,
            in("r12") stack, in("r13") made,
            out("rcx") _, out("r11") _,
        );
        if between < 0 {
            return between;
        }
        while system(SYS_WAIT4, [between as u64, 0, WALL, 0, 0, 0]) == -EINTR {}
        made.read_volatile() as i64
    }
}

/// The first thing that a copy does is to give back what it has of the program's descriptors.
unsafe extern "C" fn begin_copy(lane: *mut Lane) -> ! {
    unsafe {
        let socket = (*lane).socket as u32 as u64;
        let below = if socket == 0 { 0 } else { system(SYS_CLOSE_RANGE, [0, socket - 1, 0, 0, 0, 0]) };
        let above = system(SYS_CLOSE_RANGE, [socket + 1, u32::MAX as u64, 0, 0, 0, 0]);
        if below < 0 || above < 0 {
            loop {
                system(SYS_EXIT_GROUP, [1, 0, 0, 0, 0, 0]);
            }
        }
        serve(lane)
    }
}

unsafe extern "C" fn serve(lane: *mut Lane) -> ! {
    unsafe {
        loop {
            if (*lane).wait == WAIT_SOCKET {
                let mut byte = 0u8;
                match system(SYS_READ, [(*lane).socket as u64, &raw mut byte as u64, 1, 0, 0, 0]) {
                    1 => {}
                    interrupted if interrupted == -EINTR => continue,
                    _ => leave(lane),
                }
                run(lane);
                let socket = (*lane).socket as u64;
                system(SYS_SENDTO, [socket, &raw const byte as u64, 1, MSG_NOSIGNAL, 0, 0]);
            } else {
                let command = &*(&raw const (*lane).command).cast::<AtomicU32>();
                let done = &*(&raw const (*lane).done).cast::<AtomicU32>();
                let number = command.load(Ordering::Acquire);
                if number == COMMAND_LEAVE {
                    sigreturn((*lane).frame);
                }
                if number == done.load(Ordering::Relaxed) {
                    system(SYS_FUTEX, [&raw const (*lane).command as u64, FUTEX_WAIT, number as u64, 0, 0, 0]);
                    continue;
                }
                run(lane);
                done.store(number, Ordering::Release);
                system(SYS_FUTEX, [&raw const (*lane).done as u64, FUTEX_WAKE, 1, 0, 0, 0]);
            }
        }
    }
}

unsafe fn run(lane: *mut Lane) {
    unsafe {
        let calls = (*lane).call_array as *mut Call;
        let mut index = 0;
        (*lane).ran = 0;
        while index < (*lane).calls {
            let call = calls.add(index as usize);
            let mut args = (*call).args;
            let mut n = 0;
            while n < 6 {
                if (*call).results & (1 << n) != 0 {
                    args[n] = (*calls.add(args[n] as usize)).result as u64;
                }
                if (*call).loads & (1 << n) != 0 {
                    args[n] = *(args[n] as *const i32) as u64;
                }
                n += 1;
            }
            let result = if (*call).number == CHECKSUM_PAGES {
                checksum_pages(args[0] as *const u64, args[1] as usize, args[2] as *mut u32);
                0
            } else if (*call).number == USE_TILES {
                use_tiles(args[0]);
                0
            } else if (*call).number == COPY_PROCESS {
                copy_process(args[0] as *mut Lane, args[1], args[2] as i32)
            } else if (*call).number == SYS_CLONE3 as u32 {
                clone(args[0], args[1])
            } else {
                system((*call).number as u64, args)
            };
            (*call).result = result;
            index += 1;
            (*lane).ran = index;
            if (-4095..0).contains(&result) && (*call).flags & MAY_FAIL == 0 {
                return;
            }
        }
    }
}

/// The driver is gone: the program goes on, or a skeleton that was never released ends.
unsafe fn leave(lane: *mut Lane) -> ! {
    unsafe {
        let control = &*((*lane).control as *const Control);
        let committed = &*(&raw const control.committed).cast::<AtomicU32>();
        let skeleton = (*lane).leave == LEAVE_SKELETON;
        if skeleton && committed.load(Ordering::Acquire) == 0 {
            loop {
                system(SYS_EXIT_GROUP, [1, 0, 0, 0, 0, 0]);
            }
        }
        let mut n = 0;
        while n < (*lane).thread_count {
            let thread = ((*lane).threads + n * (*lane).thread_stride) as *mut Lane;
            (*(&raw const (*thread).command).cast::<AtomicU32>()).store(COMMAND_LEAVE, Ordering::Release);
            system(SYS_FUTEX, [&raw const (*thread).command as u64, FUTEX_WAKE, 1, 0, 0, 0]);
            n += 1;
        }
        system(SYS_CLOSE, [(*lane).socket as u64, 0, 0, 0, 0, 0]);
        n = 0;
        while n < 4 {
            // One more than the number, so that 0 is none.
            let borrowed = (&raw const (*lane).borrowed).cast::<u32>().add(n as usize).read_volatile();
            if borrowed != 0 {
                system(SYS_CLOSE, [borrowed as u64 - 1, 0, 0, 0, 0, 0]);
            }
            n += 1;
        }
        let [first, end] = (&raw const (*lane).held).read_volatile();
        if first < end {
            system(SYS_CLOSE_RANGE, [first as u64, end as u64 - 1, 0, 0, 0, 0]);
        }
        // The region goes last: not before every other thread has said, from outside of it, that it is out. In a skeleton
        // all do, if only when they get a processor. In a frozen target, one that was just being sent in or taken out may
        // never say so: then the region stays.
        let pause = [0u64, 200_000];
        let mut patience = if skeleton { 50_000 } else { 500 };
        n = 0;
        while n < (*lane).thread_count {
            let thread = ((*lane).threads + n * (*lane).thread_stride) as *mut Lane;
            while (&raw const (*thread).left).read_volatile() == 0 {
                if patience == 0 {
                    sigreturn((*lane).plain_frame);
                }
                patience -= 1;
                system(SYS_NANOSLEEP, [&raw const pause as u64, 0, 0, 0, 0, 0]);
            }
            n += 1;
        }
        sigreturn((*lane).frame)
    }
}

unsafe fn sigreturn(frame: u64) -> ! {
    unsafe { asm!("mov rsp, {frame}", "mov eax, 15", "syscall", "ud2", frame = in(reg) frame, options(noreturn)) }
}

/// Uses a tile register. The first use traps, and the kernel gives the thread room for tiles.
unsafe fn use_tiles(configuration: u64) {
    unsafe { asm!("ldtilecfg [{at}]", "tilezero tmm0", "tilerelease", at = in(reg) configuration) }
}

/// CRC-32C of each page. Four pages at a time: the instruction has a latency of three cycles.
unsafe fn checksum_pages(mut from: *const u64, mut pages: usize, mut to: *mut u32) {
    const WORDS: usize = 512;
    unsafe {
        while pages >= 4 {
            let mut sums = [u32::MAX as u64; 4];
            let mut word = 0;
            while word < WORDS {
                sums[0] = _mm_crc32_u64(sums[0], *from.add(word));
                sums[1] = _mm_crc32_u64(sums[1], *from.add(WORDS + word));
                sums[2] = _mm_crc32_u64(sums[2], *from.add(2 * WORDS + word));
                sums[3] = _mm_crc32_u64(sums[3], *from.add(3 * WORDS + word));
                word += 1;
            }
            to.write_unaligned(!sums[0] as u32);
            to.add(1).write_unaligned(!sums[1] as u32);
            to.add(2).write_unaligned(!sums[2] as u32);
            to.add(3).write_unaligned(!sums[3] as u32);
            from = from.add(4 * WORDS);
            to = to.add(4);
            pages -= 4;
        }
        while pages > 0 {
            let mut sum = u32::MAX as u64;
            let mut word = 0;
            while word < WORDS {
                sum = _mm_crc32_u64(sum, *from.add(word));
                word += 1;
            }
            to.write_unaligned(!sum as u32);
            from = from.add(WORDS);
            to = to.add(1);
            pages -= 1;
        }
    }
}
