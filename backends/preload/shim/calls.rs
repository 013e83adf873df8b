//! Raw system calls, by number: they touch no errno.

use core::arch::asm;

pub const READ: u64 = 0;
pub const WRITE: u64 = 1;
pub const OPEN: u64 = 2;
pub const CLOSE: u64 = 3;
pub const FSTAT: u64 = 5;
pub const MMAP: u64 = 9;
pub const MPROTECT: u64 = 10;
pub const MUNMAP: u64 = 11;
pub const LSEEK: u64 = 8;
pub const READLINK: u64 = 89;
pub const DUP3: u64 = 292;
pub const RT_SIGACTION: u64 = 13;
pub const RT_SIGPROCMASK: u64 = 14;
pub const PREAD: u64 = 17;
pub const ACCESS: u64 = 21;
pub const SCHED_YIELD: u64 = 24;
pub const MREMAP: u64 = 25;
pub const MINCORE: u64 = 27;
pub const MADVISE: u64 = 28;
pub const GETPID: u64 = 39;
pub const SENDTO: u64 = 44;
pub const SOCKET: u64 = 41;
pub const CONNECT: u64 = 42;
pub const RECVMSG: u64 = 47;
pub const GETSOCKOPT: u64 = 55;
pub const EXECVE: u64 = 59;
pub const KILL: u64 = 62;
pub const FCNTL: u64 = 72;
pub const GETEUID: u64 = 107;
pub const GETEGID: u64 = 108;
pub const RT_SIGPENDING: u64 = 127;
pub const RT_SIGSUSPEND: u64 = 130;
pub const SIGALTSTACK: u64 = 131;
pub const PRCTL: u64 = 157;
pub const ARCH_PRCTL: u64 = 158;
pub const GETTID: u64 = 186;
pub const FGETXATTR: u64 = 193;
pub const FUTEX: u64 = 202;
pub const EXIT_GROUP: u64 = 231;
pub const OPENAT: u64 = 257;
pub const GETRANDOM: u64 = 318;
pub const MEMFD_CREATE: u64 = 319;

pub const EINTR: i64 = 4;
pub const ENOMEM: i64 = 12;

/// # Safety
/// As the system call itself.
#[inline(always)]
pub unsafe fn call(number: u64, a: [u64; 6]) -> i64 {
    let result: i64;
    // SAFETY: the caller passes what the kernel expects of this number.
    unsafe {
        asm!("syscall", inlateout("rax") number as i64 => result,
            in("rdi") a[0], in("rsi") a[1], in("rdx") a[2], in("r10") a[3], in("r8") a[4], in("r9") a[5],
            out("rcx") _, out("r11") _);
    }
    result
}

macro_rules! sys {
    ($number:expr $(, $arg:expr)*) => {{
        let given = [$($arg as u64),*];
        let mut all = [0u64; 6];
        let mut n = 0;
        while n < given.len() {
            all[n] = given[n];
            n += 1;
        }
        crate::calls::call($number, all)
    }};
}
pub(crate) use sys;

/// # Safety
/// None beyond what the signal does.
pub unsafe fn kill_self(signal: i32) {
    // SAFETY: no memory is passed.
    unsafe {
        let none = 0u64;
        sys!(RT_SIGPROCMASK, 2, &raw const none, 0, 8);
        let pid = sys!(GETPID, 0);
        sys!(KILL, pid, signal);
    }
}

/// Writes a whole buffer.
///
/// # Safety
/// `from` has `len` bytes.
pub unsafe fn write_all(fd: i32, from: *const u8, len: usize) -> bool {
    let mut done = 0;
    while done < len {
        // SAFETY: inside the buffer.
        let wrote = unsafe { sys!(WRITE, fd, from.add(done), len - done) };
        match wrote {
            1.. => done += wrote as usize,
            interrupted if interrupted == -EINTR => {}
            _ => return false,
        }
    }
    true
}

/// # Safety
/// `text` ends in a zero byte.
pub unsafe fn length(text: *const u8) -> usize {
    let mut n = 0;
    // SAFETY: up to the zero byte.
    while unsafe { text.add(n).read_volatile() } != 0 {
        n += 1;
    }
    n
}

/// Whether a C string begins with some bytes.
///
/// # Safety
/// `text` ends in a zero byte.
pub unsafe fn begins_with(text: *const u8, with: &[u8]) -> bool {
    let mut n = 0;
    while n < with.len() {
        // SAFETY: a zero byte differs from every byte of `with`, so that nothing after it is read.
        if unsafe { *text.add(n) } != with[n] {
            return false;
        }
        n += 1;
    }
    true
}

/// A decimal number, and what follows it.
///
/// # Safety
/// `text` ends in a zero byte.
pub unsafe fn number(mut text: *const u8) -> (u64, *const u8) {
    let mut value = 0u64;
    // SAFETY: up to the first byte that is no digit, at most the zero byte.
    unsafe {
        while (*text).is_ascii_digit() {
            value = value.wrapping_mul(10).wrapping_add((*text - b'0') as u64);
            text = text.add(1);
        }
    }
    (value, text)
}

/// Puts a text into a buffer, as far as there is room, with a zero byte after it. Gives where that is.
pub fn append(to: &mut [u8], at: usize, text: &[u8]) -> usize {
    let mut n = 0;
    while n < text.len() && at + n + 1 < to.len() {
        to[at + n] = text[n];
        n += 1;
    }
    to[at + n] = 0;
    at + n
}

/// The same with a decimal number.
pub fn append_number(to: &mut [u8], at: usize, number: u64) -> usize {
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

// The compiler calls these by name. They are the shim's own, so that it needs no C library where it stands alone, and
// hidden, so that nobody else gets them.
core::arch::global_asm!(
    ".globl memset",
    ".hidden memset",
    ".type memset, @function",
    "memset:",
    "mov r8, rdi",
    "mov eax, esi",
    "mov rcx, rdx",
    "rep stosb",
    "mov rax, r8",
    "ret",
    ".globl memcpy",
    ".hidden memcpy",
    ".type memcpy, @function",
    "memcpy:",
    "mov rax, rdi",
    "mov rcx, rdx",
    "rep movsb",
    "ret",
);
