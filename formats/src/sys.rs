//! A system call that no wrapper has.
//!
//! # Safety
//! No pointers are passed to the kernel.

use std::os::fd::{AsRawFd, BorrowedFd};

/// Has the kernel begin to write a part of a file to its medium, and does not wait for it (`sync_file_range(2)`). A hint:
/// what it is for is done by the sync at the end.
pub fn begin_writing(file: BorrowedFd<'_>, offset: u64, length: u64) {
    // SAFETY: no pointers; the descriptor is open.
    unsafe { libc::sync_file_range(file.as_raw_fd(), offset as i64, length as i64, libc::SYNC_FILE_RANGE_WRITE) };
}

/// Writes a file to its medium, without what makes it last: its place on the medium and the medium's own cache.
pub fn write_out(file: BorrowedFd<'_>) {
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: no pointers; the descriptor is open.
    unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, flags) };
}
