//! The raw system calls and the shared memory of the driver's side.
//!
//! # Safety
//! Shared memory is written by the agent while we look on: it is only reached by copies and atomics, never by reference.
//! Structures passed to the kernel are `repr(C)` and match its headers.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::AtomicU32;
use std::time::Duration;

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A shared mapping of a memfd.
#[derive(Debug)]
pub struct SharedMapping {
    address: *mut u8,
    size: usize,
}

// SAFETY: the memory is reached only by copies and atomics, from whatever thread.
unsafe impl Send for SharedMapping {}
// SAFETY: as above; concurrent copies of one lane are excluded by `Channel`'s `&mut self`.
unsafe impl Sync for SharedMapping {}

impl SharedMapping {
    pub fn new(memfd: BorrowedFd<'_>, size: usize) -> io::Result<SharedMapping> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let address =
            unsafe { libc::mmap(std::ptr::null_mut(), size, protection, libc::MAP_SHARED, memfd.as_raw_fd(), 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(SharedMapping { address: address.cast(), size })
    }

    pub fn len(&self) -> usize {
        self.size
    }

    pub fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.size);
        // SAFETY: inside the mapping, as asserted.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.address.add(at), bytes.len()) }
    }

    pub fn read(&self, at: usize, bytes: &mut [u8]) {
        assert!(at + bytes.len() <= self.size);
        // SAFETY: inside the mapping, as asserted.
        unsafe { std::ptr::copy_nonoverlapping(self.address.add(at), bytes.as_mut_ptr(), bytes.len()) }
    }

    /// Copies a plain structure of the protocol in.
    pub fn put<T: Copy>(&self, at: usize, value: T) {
        assert!(at + size_of::<T>() <= self.size);
        // SAFETY: inside the mapping, as asserted; the protocol's structures have no padding that matters.
        unsafe { self.address.add(at).cast::<T>().write_unaligned(value) }
    }

    /// Copies a plain structure of the protocol out.
    pub fn get<T: Copy>(&self, at: usize) -> T {
        assert!(at + size_of::<T>() <= self.size);
        // SAFETY: inside the mapping, as asserted; T is one of the protocol's, for which any bits are a value.
        unsafe { self.address.add(at).cast::<T>().read_unaligned() }
    }

    pub fn atomic(&self, at: usize) -> &AtomicU32 {
        assert!(at.is_multiple_of(4) && at + 4 <= self.size);
        // SAFETY: inside the mapping and aligned; it lives as long as self.
        unsafe { AtomicU32::from_ptr(self.address.add(at).cast()) }
    }
}

impl Drop for SharedMapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping, of which no reference outlives us.
        unsafe { libc::munmap(self.address.cast(), self.size) };
    }
}

/// A region mapped at an address that skeletons will have it at.
#[derive(Debug)]
pub struct FixedMapping {
    address: u64,
    size: usize,
}

impl FixedMapping {
    pub fn new(memfd: BorrowedFd<'_>, address: u64, size: usize, code: usize) -> io::Result<FixedMapping> {
        let part = |at: usize, len: usize, protection| {
            // SAFETY: MAP_FIXED_NOREPLACE takes no address that anything of ours has.
            let mapped = unsafe {
                libc::mmap(
                    (address as usize + at) as *mut libc::c_void,
                    len,
                    protection,
                    libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE,
                    memfd.as_raw_fd(),
                    at as i64,
                )
            };
            if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
        };
        part(0, code, libc::PROT_READ | libc::PROT_EXEC)?;
        let mapping = FixedMapping { address, size };
        part(code, size - code, libc::PROT_READ | libc::PROT_WRITE)?;
        Ok(mapping)
    }
}

impl Drop for FixedMapping {
    fn drop(&mut self) {
        // SAFETY: made by `new`, where nothing of ours was.
        unsafe { libc::munmap(self.address as *mut libc::c_void, self.size) };
    }
}

/// `futex(FUTEX_WAKE)` on a word of a shared mapping.
pub fn futex_wake(word: &AtomicU32) {
    // SAFETY: the word is valid for the call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, 1) };
}

/// `futex(FUTEX_WAIT)` until the word is no longer `seen`, a wake-up, or the time is over.
pub fn futex_wait(word: &AtomicU32, seen: u32, timeout: Duration) {
    let timeout = libc::timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: timeout.subsec_nanos() as i64 };
    // SAFETY: the word and the timeout are valid for the call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, seen, &timeout) };
}

/// Takes over a descriptor that the kernel has just made.
pub fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: callers pass what a system call has just returned, which nobody else has.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: a new descriptor, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// SIGKILL.
pub fn pidfd_kill(pidfd: BorrowedFd<'_>) -> io::Result<()> {
    let (fd, none) = (pidfd.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
    // SAFETY: a null pointer stands for an ordinary signal.
    check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, none, 0) }).map(drop)
}

/// Waits for a process that has ended, should it be a child of ours.
pub fn reap(pidfd: BorrowedFd<'_>) {
    let options = libc::WEXITED | libc::WNOHANG | libc::__WALL;
    let fd = pidfd.as_raw_fd() as libc::id_t;
    // SAFETY: zero is a value of this structure, which the kernel fills.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: the structure outlives the call.
    unsafe { libc::waitid(libc::P_PIDFD, fd, &mut info, options) };
}

pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) })?;
    // SAFETY: a new descriptor, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

pub fn kcmp(pid1: i32, pid2: i32, kind: i32, index1: u64, index2: u64) -> io::Result<i64> {
    // SAFETY: the indices are numbers; kinds that take addresses are not used.
    check(unsafe { libc::syscall(libc::SYS_kcmp, pid1, pid2, kind, index1, index2) })
}

/// `open_by_handle_at` with `O_PATH`.
pub fn open_by_handle(mount: BorrowedFd<'_>, kind: i32, handle: &[u8]) -> io::Result<OwnedFd> {
    // struct file_handle: the number of bytes, the type, and the bytes
    let mut bytes = (handle.len() as u32).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(handle);
    let flags = libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    let mount = mount.as_raw_fd();
    // SAFETY: the handle is as long as it says, and is only read.
    let fd = check(unsafe { libc::syscall(libc::SYS_open_by_handle_at, mount, bytes.as_ptr(), flags) })?;
    // SAFETY: a new descriptor, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// `KCMP_EPOLL_TFD`: `slot` is `struct kcmp_epoll_slot`, the numbers of the epoll and of its entry, and an offset.
pub fn kcmp_epoll(pid1: i32, pid2: i32, file: u64, slot: [u32; 3]) -> io::Result<i64> {
    const KCMP_EPOLL_TFD: i32 = 7;
    // SAFETY: the kernel reads the slot, which lives until the call returns.
    check(unsafe { libc::syscall(libc::SYS_kcmp, pid1, pid2, KCMP_EPOLL_TFD, file, slot.as_ptr()) })
}

pub fn process_vm_read(pid: i32, from: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let remote = libc::iovec { iov_base: from as *mut libc::c_void, iov_len: buffer.len() };
    // SAFETY: the local iovec describes `buffer`; the remote one is the other process's.
    Ok(check(unsafe { libc::process_vm_readv(pid, &local, 1, &remote, 1, 0) } as libc::c_long)? as usize)
}

pub fn process_vm_write(pid: i32, to: u64, bytes: &[u8]) -> io::Result<usize> {
    let local = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let remote = libc::iovec { iov_base: to as *mut libc::c_void, iov_len: bytes.len() };
    // SAFETY: the local iovec describes `bytes`, which is only read; the remote one is the other process's.
    Ok(check(unsafe { libc::process_vm_writev(pid, &local, 1, &remote, 1, 0) } as libc::c_long)? as usize)
}

/// `struct page_region` of `PAGEMAP_SCAN`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct PageRegion {
    pub start: u64,
    pub end: u64,
    pub categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct ScanArgument {
    pub size: u64,
    pub flags: u64,
    pub start: u64,
    pub end: u64,
    pub walk_end: u64,
    pub vec: u64,
    pub vec_len: u64,
    pub max_pages: u64,
    pub category_inverted: u64,
    pub category_mask: u64,
    pub category_anyof_mask: u64,
    pub return_mask: u64,
}

const _: () = assert!(size_of::<ScanArgument>() == 96 && size_of::<PageRegion>() == 24);

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;

/// `ioctl(PAGEMAP_SCAN)`, kernel 6.7: fills `regions`, returns how many, and where the walk ended.
pub fn pagemap_scan(
    pagemap: BorrowedFd<'_>,
    argument: &mut ScanArgument,
    regions: &mut [PageRegion],
) -> io::Result<usize> {
    argument.size = size_of::<ScanArgument>() as u64;
    argument.vec = regions.as_mut_ptr() as u64;
    argument.vec_len = regions.len() as u64;
    // SAFETY: the argument describes `regions`, which outlives the call.
    Ok(check(unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, argument) } as libc::c_long)? as usize)
}
