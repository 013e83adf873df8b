//! Starting a program with the shim: from a memfd that the program inherits, and that is gone when its first line runs.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
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
/// When there can be no memfd. Or when the shim could not be loaded into the program: it is statically linked, or runs
/// with other privileges.
pub fn prepare(command: &mut Command) -> io::Result<()> {
    if let Some(why) = find(command).as_deref().and_then(without_shim) {
        let program = command.get_program().display().to_string();
        return Err(io::Error::other(format!(
            "{program} {why}, so that it cannot have the shim; use --backend ptrace"
        )));
    }
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

/// The file that a command will be found in; whether it can be started, it says itself.
fn find(command: &Command) -> Option<PathBuf> {
    let program = Path::new(command.get_program());
    if program.components().count() > 1 {
        return Some(program.to_path_buf());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(program)).find(|file| file.is_file())
}

/// Why a program would not get the shim, if that can be seen.
fn without_shim(program: &Path) -> Option<&'static str> {
    const PT_INTERP: u32 = 3;
    let metadata = std::fs::metadata(program).ok()?;
    let is_others = metadata.uid() != nix::unistd::geteuid().as_raw();
    if metadata.mode() & 0o6000 != 0 && is_others {
        return Some("runs with other privileges (setuid)");
    }
    let mut head = Vec::new();
    std::fs::File::open(program).ok()?.take(4096).read_to_end(&mut head).ok()?;
    if head.get(..5)? != b"\x7fELF\x02" {
        return None;
    }
    let number = |at: usize| Some(u16::from_le_bytes(head.get(at..at + 2)?.try_into().ok()?) as usize);
    let first = u64::from_le_bytes(head.get(32..40)?.try_into().ok()?) as usize;
    let (size, count) = (number(54)?, number(56)?);
    for n in 0..count {
        let at = first.checked_add(n * size)?;
        // What lies further on is not looked at.
        if u32::from_le_bytes(head.get(at..at.checked_add(4)?)?.try_into().ok()?) == PT_INTERP {
            return None;
        }
    }
    Some("is statically linked")
}

/// A number that the limit of descriptors allows.
fn shim_number() -> i32 {
    let (soft, _) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
    SHIM_FD.min(soft.saturating_sub(1).min(i32::MAX as u64) as i32)
}
