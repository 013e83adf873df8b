//! What the driver can do for a target from outside, by pid: read and write memory, compare, fetch descriptors, scan pages.

use std::cmp::Ordering;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use ckpt_core::procfs::ProcDir;
use ckpt_core::{Kcmp, MemoryWriter, PAGE_SIZE, PageRun, Pid, PrivatePages, RemoteFd, RemotePtr, TargetError};

use crate::sys::{self, PageRegion, ScanArgument};

/// A process, by descriptors that never mean another one.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    pidfd: OwnedFd,
    pub proc: ProcDir,
    pagemap: Option<File>,
}

const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
/// Kernel 6.16.
const PAGE_IS_GUARD: u64 = 1 << 8;

impl Process {
    pub fn open(pid: Pid) -> io::Result<Process> {
        Ok(Process { pid, pidfd: sys::pidfd_open(pid.0)?, proc: ProcDir::open(pid)?, pagemap: None })
    }

    pub fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    pub fn fd(&self, fd: RemoteFd) -> Result<OwnedFd, TargetError> {
        sys::pidfd_getfd(self.pidfd.as_fd(), fd.0).map_err(|source| self.error("pidfd_getfd", source))
    }

    pub fn read(&self, from: RemotePtr, buffer: &mut [u8]) -> Result<(), TargetError> {
        let wanted = buffer.len();
        match sys::process_vm_read(self.pid.0, from.0, buffer) {
            Ok(got) if got == wanted => Ok(()),
            Ok(_) => Err(self.error("process_vm_readv", io::ErrorKind::UnexpectedEof.into())),
            Err(source) => Err(self.error("process_vm_readv", source)),
        }
    }

    pub fn write(&self, to: RemotePtr, bytes: &[u8]) -> Result<(), TargetError> {
        match sys::process_vm_write(self.pid.0, to.0, bytes) {
            Ok(put) if put == bytes.len() => Ok(()),
            Ok(_) => Err(self.error("process_vm_writev", io::ErrorKind::WriteZero.into())),
            Err(source) => Err(self.error("process_vm_writev", source)),
        }
    }

    /// Writes through `/proc/PID/mem`: also to read-only private pages, and below a stack that has yet to grow.
    pub fn force_write(&self, to: RemotePtr, bytes: &[u8]) -> Result<(), TargetError> {
        use std::os::unix::fs::FileExt;
        let memory = self.proc.open_with("mem", nix::fcntl::OFlag::O_RDWR);
        memory.and_then(|memory| memory.write_all_at(bytes, to.0)).map_err(|source| self.error("writing mem", source))
    }

    pub fn compare(&self, kind: Kcmp, mine: u64, other: Pid, theirs: u64) -> Result<Ordering, TargetError> {
        let number = match kind {
            Kcmp::EpollTarget(slot) => {
                let slot = [theirs as u32, slot.target as u32, slot.offset];
                let order = sys::kcmp_epoll(self.pid.0, other.0, mine, slot);
                return order.map(ordering).map_err(|source| self.error("kcmp", source));
            }
            Kcmp::File => 0,
            Kcmp::Vm => 1,
            Kcmp::Files => 2,
            Kcmp::Fs => 3,
            Kcmp::Sighand => 4,
            Kcmp::Io => 5,
            Kcmp::Sysvsem => 6,
        };
        let order = sys::kcmp(self.pid.0, other.0, number, mine, theirs);
        order.map(ordering).map_err(|source| self.error("kcmp", source))
    }

    /// See [`ckpt_core::Target::file_of_handle`].
    pub fn file_of_handle(&self, mount: BorrowedFd<'_>, kind: i32, handle: &[u8]) -> Result<OwnedFd, TargetError> {
        sys::open_by_handle(mount, kind, handle).map_err(|source| self.error("open_by_handle_at", source))
    }

    /// See [`ckpt_core::Target::private_pages`].
    pub fn private_pages(&mut self, start: u64, end: u64) -> Result<PrivatePages, TargetError> {
        if self.pagemap.is_none() {
            let pagemap = self.proc.file("pagemap").map_err(|source| self.error("opening pagemap", source))?;
            self.pagemap = Some(pagemap);
        }
        let pagemap = self.pagemap.as_ref().expect("just opened");
        let mut found = PrivatePages::default();
        // A guard page shows as a swapped one. Of the categories only what all have alike (FILE) or what tells a guard page,
        // so that the kernel does not cut runs where others change.
        let mut argument = ScanArgument {
            start,
            end,
            category_inverted: PAGE_IS_FILE | PAGE_IS_PFNZERO,
            category_mask: PAGE_IS_FILE | PAGE_IS_PFNZERO,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_FILE | PAGE_IS_GUARD,
            ..ScanArgument::default()
        };
        let mut regions = [PageRegion::default(); 512];
        while argument.start < end {
            let count = match sys::pagemap_scan(pagemap.as_fd(), &mut argument, &mut regions) {
                Ok(count) => count,
                // A kernel without the ioctl, or one that does not know guard pages in it (before 6.16).
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
                    return self.read_pagemap(start, end);
                }
                Err(source) => return Err(self.error("PAGEMAP_SCAN", source)),
            };
            for region in &regions[..count] {
                let guard = region.categories & PAGE_IS_GUARD != 0;
                let runs = if guard { &mut found.guards } else { &mut found.data };
                push(runs, region.start, (region.end - region.start) / PAGE_SIZE);
            }
            argument.start = argument.walk_end;
        }
        Ok(found)
    }

    /// The same for kernels before 6.16, from the entries of `pagemap`.
    fn read_pagemap(&self, start: u64, end: u64) -> Result<PrivatePages, TargetError> {
        use std::os::unix::fs::FileExt;
        let pagemap = self.pagemap.as_ref().expect("opened by the caller");
        let mut found = PrivatePages::default();
        let mut buffer = vec![0; 128 * 1024];
        let mut at = start;
        while at < end {
            let entries = ((end - at) / PAGE_SIZE).min(buffer.len() as u64 / 8) as usize;
            let bytes = &mut buffer[..entries * 8];
            pagemap.read_exact_at(bytes, at / PAGE_SIZE * 8).map_err(|source| self.error("reading pagemap", source))?;
            for (n, entry) in bytes.chunks_exact(8).enumerate() {
                // Bits 63 present, 62 swapped, 61 file page or shared anonymous, 58 guard page (kernel 6.15).
                let entry = u64::from_ne_bytes(entry.try_into().unwrap());
                if entry & (1 << 58) != 0 {
                    push(&mut found.guards, at + n as u64 * PAGE_SIZE, 1);
                } else if entry >> 62 != 0 && entry & (1 << 61) == 0 {
                    push(&mut found.data, at + n as u64 * PAGE_SIZE, 1);
                }
            }
            at += entries as u64 * PAGE_SIZE;
        }
        Ok(found)
    }

    pub fn error(&self, operation: &'static str, source: io::Error) -> TargetError {
        if source.raw_os_error() == Some(libc::ESRCH) {
            return TargetError::Gone { pid: self.pid };
        }
        TargetError::Driver { pid: self.pid, operation, source }
    }
}

impl MemoryWriter for Process {
    fn write(&self, to: RemotePtr, bytes: &[u8]) -> Result<(), TargetError> {
        Process::write(self, to, bytes)
    }
}

/// Whether this kernel has `PAGEMAP_SCAN` (6.7).
pub fn has_pagemap_scan() -> bool {
    let Ok(pagemap) = File::open("/proc/self/pagemap") else { return false };
    let mut argument = ScanArgument { return_mask: PAGE_IS_FILE, ..ScanArgument::default() };
    sys::pagemap_scan(pagemap.as_fd(), &mut argument, &mut [PageRegion::default()]).is_ok()
}

/// Appends to a list of runs, and joins what touches.
fn push(runs: &mut Vec<PageRun>, start: u64, pages: u64) {
    match runs.last_mut() {
        Some(last) if last.end() == start => last.pages += pages,
        _ => runs.push(PageRun { start, pages }),
    }
}

/// kcmp(2): 0 equal, 1 less, 2 greater, 3 unequal without an order.
fn ordering(order: i64) -> Ordering {
    match order {
        0 => Ordering::Equal,
        1 => Ordering::Less,
        _ => Ordering::Greater,
    }
}
