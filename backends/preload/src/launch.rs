//! Starting a program with the shim: from a memfd that the program inherits, and that is gone when its first line runs.

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::sys;

/// The shim, a shared library.
pub const SHIM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/shim.so"));

/// The number that the shim's descriptor has in a program that is being started: above what programs are given.
pub const SHIM_FD: i32 = 1000;

/// The shim as a file without a name.
pub fn shim_file() -> io::Result<OwnedFd> {
    let memfd = memfd_create(c"ckpt-shim", MFdFlags::MFD_CLOEXEC)?;
    std::fs::File::from(memfd.try_clone()?).write_all(SHIM)?;
    // Out of the way of what else is inherited.
    let high = fcntl(memfd.as_fd(), FcntlArg::F_DUPFD_CLOEXEC(64)).map(sys::own);
    Ok(high.unwrap_or(memfd))
}

/// Has a command start with the shim.
///
/// # Errors
/// When there can be no memfd.
pub fn prepare(command: &mut Command) -> io::Result<()> {
    let number = shim_number();
    let mut preload = OsString::from(format!("/proc/self/fd/{number}"));
    if let Some(others) = std::env::var_os("LD_PRELOAD").filter(|others| !others.is_empty()) {
        preload.push(":");
        preload.push(others);
    }
    command.env("LD_PRELOAD", preload).env("CKPT_SHIM_FD", number.to_string());
    sys::inherit(command, shim_file()?, number);
    Ok(())
}

/// A number that the limit of descriptors allows.
fn shim_number() -> i32 {
    let (soft, _) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
    SHIM_FD.min(soft.saturating_sub(1).min(i32::MAX as u64) as i32)
}
