//! Ids in arguments, results and structures, call by call.

use super::{BUFFER, Frame, HEADER, has_sender, paths, translate_info, trampoline};
use crate::calls;
use crate::translation::Table;

const F_SETOWN: u64 = 8;
const F_GETOWN: u64 = 9;
const F_SETOWN_EX: u64 = 15;
const F_GETOWN_EX: u64 = 16;
const F_GETLK: u64 = 5;
const F_OFD_GETLK: u64 = 36;

const TIOCGPGRP: u64 = 0x540f;
const TIOCSPGRP: u64 = 0x5410;
const TIOCGSID: u64 = 0x5429;
const FIOSETOWN: u64 = 0x8901;
const SIOCSPGRP: u64 = 0x8902;
const FIOGETOWN: u64 = 0x8903;
const SIOCGPGRP: u64 = 0x8904;

const SOL_SOCKET: u64 = 1;
const SO_PEERCRED: u64 = 17;
const SCM_CREDENTIALS: u32 = 2;
const PR_SET_PTRACER: u64 = 0x5961_6d61;
const GETPID: u64 = 11;
const IPC_STAT: u64 = 2;
const MSG_STAT: u64 = 11;
const MSG_STAT_ANY: u64 = 13;
const SHM_STAT: u64 = 13;
const SHM_STAT_ANY: u64 = 15;
const SIGEV_THREAD_ID: u32 = 4;
const SIGINFO_SIZE: usize = 128;
const SIGNALFD_SIGINFO_SIZE: usize = 128;

impl Frame {
    fn id(&mut self, table: &Table<'_>, n: usize) {
        self.real[n] = table.argument(self.args[n] as i32) as i64 as u64;
    }

    /// Has the kernel read a copy of what an argument points to.
    unsafe fn copy(&mut self, n: usize, size: usize) -> Option<*mut u8> {
        if self.args[n] == 0 || size > BUFFER {
            return None;
        }
        let to = self.buffer.as_mut_ptr();
        // SAFETY: the program's own structure; the buffer has room.
        unsafe { copy_bytes(self.args[n] as *const u8, to, size) };
        self.real[n] = to as u64;
        Some(to)
    }
}

pub unsafe fn copy_bytes(from: *const u8, to: *mut u8, size: usize) {
    // SAFETY: as the caller has it.
    unsafe {
        core::arch::asm!("rep movsb", inout("rcx") size => _, inout("rsi") from => _, inout("rdi") to => _,
            options(nostack, preserves_flags));
    }
}

unsafe fn place<T>(base: *mut u8, offset: usize) -> *mut T {
    // SAFETY: inside the structure that the caller has.
    unsafe { base.add(offset).cast() }
}

unsafe fn change(place: *mut i32, to: impl Fn(i32) -> i32) {
    // SAFETY: a place in a structure of the program's.
    unsafe { place.write_unaligned(to(place.read_unaligned())) };
}

/// What goes to the kernel.
///
/// # Safety
/// The program's own call: its pointers lead to what the call is about.
pub unsafe fn before(frame: &mut Frame, table: &Table<'_>) {
    let args = frame.args;
    let argument = |id| table.argument(id);
    // SAFETY: as promised by the caller.
    unsafe {
        match frame.number {
            // kill, getpgid, getsid, wait4, tkill, pidfd_open; sched_*, prlimit64, process_vm_*; migrate_pages,
            // move_pages, get_robust_list
            62 | 121 | 124 | 61 | 200 | 434 | 142..=145 | 148 | 203 | 204 | 302 | 310 | 311 | 314 | 315 | 256 | 279
            | 274 => frame.id(table, 0),
            // setpgid, tgkill, kcmp
            109 | 234 | 312 => {
                frame.id(table, 0);
                frame.id(table, 1);
            }
            // ptrace, perf_event_open
            101 | 298 => frame.id(table, 1),
            // waitid: P_PID, P_PGID
            247 if args[0] == 1 || args[0] == 2 => frame.id(table, 1),
            // getpriority, setpriority: PRIO_PROCESS, PRIO_PGRP. ioprio_get, ioprio_set: the same, from 1
            140 | 141 if args[0] < 2 => frame.id(table, 1),
            251 | 252 if args[0] == 1 || args[0] == 2 => frame.id(table, 1),
            // rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_send_signal
            129 => {
                frame.id(table, 0);
                if let Some(info) = frame.copy(2, SIGINFO_SIZE) {
                    translate_info(table, info.cast(), true);
                }
            }
            297 => {
                frame.id(table, 0);
                frame.id(table, 1);
                if let Some(info) = frame.copy(3, SIGINFO_SIZE) {
                    translate_info(table, info.cast(), true);
                }
            }
            424 => {
                if let Some(info) = frame.copy(2, SIGINFO_SIZE) {
                    translate_info(table, info.cast(), true);
                }
            }
            // capget, capset: the id follows the version
            125 | 126 => {
                if let Some(header) = frame.copy(0, 8) {
                    change(place(header, 4), argument);
                }
            }
            // prctl
            157 if args[0] == PR_SET_PTRACER => frame.id(table, 1),
            // timer_create: sigev_notify at 12, the thread at 16
            222 => {
                if let Some(event) = frame.copy(1, 64)
                    && *place::<u32>(event, 12) & SIGEV_THREAD_ID != 0
                {
                    change(place(event, 16), argument);
                }
            }
            // fcntl
            72 => match args[1] {
                F_SETOWN => frame.id(table, 2),
                F_SETOWN_EX => {
                    if let Some(owner) = frame.copy(2, 8) {
                        change(place(owner, 4), argument);
                    }
                }
                _ => {}
            },
            // ioctl
            16 if matches!(args[1], TIOCSPGRP | FIOSETOWN | SIOCSPGRP) => {
                if let Some(id) = frame.copy(2, 4) {
                    change(id.cast(), argument);
                }
            }
            // sendmsg: a copy of the header, and behind it of the control messages
            46 => copy_control(frame, table),
            // rt_sigaction
            13 => action_before(frame),
            _ => {}
        }
    }
}

/// What came from it.
///
/// # Safety
/// The program's own call, which has worked.
pub unsafe fn after(frame: &mut Frame, table: &Table<'_>) {
    let args = frame.args;
    let result = |id| table.result(id);
    // SAFETY: as promised by the caller.
    unsafe {
        match frame.number {
            // getpid, gettid, getppid, getpgrp, setsid, getpgid, getsid, wait4, set_tid_address; clones by number
            39 | 186 | 110 | 111 | 112 | 121 | 124 | 61 | 218 | 56..=58 | 435 => {
                frame.result = result(frame.result as i32) as i64;
            }
            // read
            0 => senders(args[0] as i32, args[1] as *mut u8, frame.result as usize, table),
            // waitid
            247 if args[2] != 0 => translate_info(table, args[2] as *mut i32, false),
            // rt_sigtimedwait
            128 if args[1] != 0 => translate_info(table, args[1] as *mut i32, false),
            72 => match args[1] {
                F_GETOWN => frame.result = result(frame.result as i32) as i64,
                F_GETOWN_EX => change(place(args[2] as *mut u8, 4), result),
                // struct flock: l_pid at 24, where a lock was found
                F_GETLK | F_OFD_GETLK if *(args[2] as *const i16) != 2 => {
                    change(place(args[2] as *mut u8, 24), result);
                }
                _ => {}
            },
            16 if matches!(args[1], TIOCGPGRP | TIOCGSID | FIOGETOWN | SIOCGPGRP) => {
                change(args[2] as *mut i32, result);
            }
            // getsockopt
            55 if args[1] == SOL_SOCKET && args[2] == SO_PEERCRED && args[3] != 0 => {
                let size = args[4] as *const u32;
                if !size.is_null() && size.read_unaligned() >= 4 {
                    change(args[3] as *mut i32, result);
                }
            }
            // recvmsg, recvmmsg
            47 => translate_control(args[1] as *const u64, result),
            299 => {
                // struct mmsghdr has 64 bytes.
                let mut n = 0;
                while n < frame.result as usize {
                    translate_control((args[1] as *const u64).add(8 * n), result);
                    n += 1;
                }
            }
            // semctl, msgctl, shmctl
            66 if args[2] == GETPID => frame.result = result(frame.result as i32) as i64,
            71 if matches!(args[1], IPC_STAT | MSG_STAT | MSG_STAT_ANY) => {
                change(place(args[2] as *mut u8, 96), result);
                change(place(args[2] as *mut u8, 100), result);
            }
            31 if matches!(args[1], IPC_STAT | SHM_STAT | SHM_STAT_ANY) => {
                change(place(args[2] as *mut u8, 80), result);
                change(place(args[2] as *mut u8, 84), result);
            }
            13 => action_after(frame),
            _ => {}
        }
    }
}

/// A call that did not work: what was noted for it is taken back.
///
/// # Safety
/// As for [`after`].
pub unsafe fn failed(frame: &mut Frame) {
    if frame.number == 13 && frame.notes[0] != 0 {
        // SAFETY: the signal was checked.
        unsafe { (&raw mut HEADER.handlers[frame.args[0] as usize]).write_volatile(frame.notes[1]) };
    }
    let _ = calls::EINTR;
}

/// `struct signalfd_siginfo`, if that is what was read: the signal at 0, the code at 8, the sender at 12.
unsafe fn senders(fd: i32, buffer: *mut u8, length: usize, table: &Table<'_>) {
    if length == 0 || !length.is_multiple_of(SIGNALFD_SIGINFO_SIZE) {
        return;
    }
    if paths::link_of(fd, &mut [0; 128]) != Some(b"anon_inode:[signalfd]") {
        return;
    }
    for n in 0..length / SIGNALFD_SIGINFO_SIZE {
        // SAFETY: the kernel has written so many of them.
        unsafe {
            let info = buffer.add(n * SIGNALFD_SIGINFO_SIZE);
            if has_sender(place::<i32>(info, 0).read_unaligned(), place::<i32>(info, 8).read_unaligned()) {
                change(place(info, 12), |id| table.result(id));
            }
        }
    }
}

/// `struct msghdr`: the control messages at word 4, their length at word 5.
unsafe fn translate_control(message: *const u64, result: impl Fn(i32) -> i32 + Copy) {
    // SAFETY: the kernel has filled it.
    unsafe {
        if !message.is_null() {
            each_credentials(*message.add(4) as *mut u8, *message.add(5) as usize, result);
        }
    }
}

/// `struct cmsghdr`: length, level, type; what follows begins with the id.
unsafe fn each_credentials(control: *mut u8, length: usize, to: impl Fn(i32) -> i32 + Copy) {
    const HEADER: usize = 16;
    let mut at = 0;
    // SAFETY: inside the control messages, as far as their own lengths allow.
    unsafe {
        while !control.is_null() && at + HEADER <= length {
            let here = control.add(at);
            let size = here.cast::<u64>().read_unaligned() as usize;
            if size < HEADER || size > length - at {
                return;
            }
            let kind = (here.add(8).cast::<u32>().read_unaligned(), here.add(12).cast::<u32>().read_unaligned());
            if kind == (SOL_SOCKET as u32, SCM_CREDENTIALS) && size >= HEADER + 4 {
                change(place(here, HEADER), to);
            }
            at += size.next_multiple_of(8);
        }
    }
}

unsafe fn copy_control(frame: &mut Frame, table: &Table<'_>) {
    const MESSAGE: usize = 56;
    // SAFETY: the program's own message.
    unsafe {
        let message = frame.args[1] as *const u64;
        if message.is_null() || *message.add(4) == 0 {
            return;
        }
        let length = *message.add(5) as usize;
        // Longer ones hold descriptors; the kernel refuses an id that is not the sender's.
        if length > BUFFER - MESSAGE {
            return;
        }
        let control = *message.add(4) as *const u8;
        if let Some(copy) = frame.copy(1, MESSAGE) {
            copy_bytes(control, copy.add(MESSAGE), length);
            *copy.cast::<u64>().add(4) = copy.add(MESSAGE) as u64;
            each_credentials(copy.add(MESSAGE), length, |id| table.argument(id));
        }
    }
}

/// `rt_sigaction`: the kernel gets our handler, and the program sees its own.
unsafe fn action_before(frame: &mut Frame) {
    let [signal, new, _, size, ..] = frame.args;
    if new == 0 || signal == 0 || signal > 64 || size != 8 {
        return;
    }
    let ours = trampoline as *const () as u64;
    // SAFETY: the program's own structure: the handler is its first word.
    unsafe {
        let Some(copy) = frame.copy(1, 32) else { return };
        let handler = *copy.cast::<u64>();
        if handler > 1 && handler != ours {
            let noted = &raw mut HEADER.handlers[signal as usize];
            if frame.notes[0] == 0 {
                frame.notes = [1, noted.read_volatile()];
            }
            noted.write_volatile(handler);
            *copy.cast::<u64>() = ours;
        }
    }
}

unsafe fn action_after(frame: &mut Frame) {
    let [signal, _, old, ..] = frame.args;
    if old == 0 || signal == 0 || signal > 64 {
        return;
    }
    // SAFETY: the kernel has filled it.
    unsafe {
        let old = old as *mut u64;
        if *old == trampoline as *const () as u64 {
            let noted = (&raw const HEADER.handlers[signal as usize]).read_volatile();
            *old = if frame.notes[0] != 0 { frame.notes[1] } else { noted };
        }
    }
}
