//! Processes with the shim, as they can be told from outside by any user who may look at them.

use std::io;
use std::sync::LazyLock;

use ckpt_core::Pid;
use ckpt_core::procfs::{Mapping, ProcDir};

use crate::freeze::handles_signal;
use crate::launch::SHIM;

/// All of them that we may look at, by number.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn processes() -> io::Result<Vec<Pid>> {
    let entries = std::fs::read_dir("/proc")?;
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok().map(Pid));
    let mut found: Vec<Pid> = pids.filter(|pid| has_shim(*pid)).collect();
    found.sort_unstable();
    Ok(found)
}

/// Whether a process has the shim of this version: it handles the signal, as a program that cancels threads does as well,
/// and the shim's code lies in memory that no file stands behind.
pub fn has_shim(pid: Pid) -> bool {
    let Ok(proc) = ProcDir::open(pid) else { return false };
    if !proc.status().is_ok_and(|status| handles_signal(&status)) {
        return false;
    }
    let maps = proc.read("maps").ok().and_then(|maps| Mapping::parse_all(&maps));
    maps.is_some_and(|maps| maps.windows(2).any(is_shim))
}

/// Whether a program with the shim wants to be asked before it is dumped: then a page of the shim cannot be touched, which
/// lies between two that can.
pub fn wants_to_be_asked(proc: &ProcDir) -> bool {
    if !proc.status().is_ok_and(|status| handles_signal(&status)) {
        return false;
    }
    let maps = proc.read("maps").ok().and_then(|maps| Mapping::parse_all(&maps)).unwrap_or_default();
    let Some(code) = maps.windows(2).position(is_shim) else { return false };
    let of_shim = maps[code..].windows(2).take_while(|pair| pair[0].end == pair[1].start).map(|pair| &pair[1]);
    let is_mark = |mapping: &Mapping| !mapping.read && !mapping.write && !mapping.execute && mapping.len() == 4096;
    of_shim.take_while(|mapping| mapping.inode == 0 && mapping.name.as_os_str().is_empty()).any(is_mark)
}

/// Two mappings beside each other: what stands before the shim's code, and its code.
fn is_shim(pair: &[Mapping]) -> bool {
    let [before, code] = pair else { return false };
    let plain = |mapping: &Mapping| mapping.inode == 0 && !mapping.write && !mapping.shared && mapping.read;
    plain(before)
        && plain(code)
        && before.name.as_os_str().is_empty()
        && code.name.as_os_str().is_empty()
        && !before.execute
        && code.execute
        && before.end == code.start
        && Some(code.len()) == *CODE_SIZE
}

/// Bytes of the shim's code in memory: its executable segment, in whole pages.
static CODE_SIZE: LazyLock<Option<u64>> = LazyLock::new(|| {
    const PT_LOAD: u64 = 1;
    const EXECUTE: u64 = 1;
    let number = |at: usize, bytes: usize| {
        let found = SHIM.get(at..at + bytes)?;
        Some(found.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    };
    let (first, count) = (number(32, 8)? as usize, number(56, 2)? as usize);
    let segment = (0..count)
        .map(|n| first + n * 56)
        .find(|&at| number(at, 4) == Some(PT_LOAD) && number(at + 4, 4).is_some_and(|flags| flags & EXECUTE != 0))?;
    let (address, size) = (number(segment + 16, 8)?, number(segment + 40, 8)?);
    Some((address + size).next_multiple_of(4096) - address / 4096 * 4096)
});
