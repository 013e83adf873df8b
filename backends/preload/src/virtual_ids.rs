//! The driver's side of virtual ids: what a tree calls itself, and how a tree learns its new ids.
//!
//! A restored process whose ids are not its own gets a table of them, and the system calls of its C library are led to the
//! shim, which translates (`shim/ids/`). This is done while it is a skeleton, right before the release. A process that has
//! been through this before is patched already, and gets one more table.

use std::ffi::OsStr;
use std::io;
use std::mem::offset_of;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use ckpt_core::batch::{Batch, Sysno};
use ckpt_core::names::Names;
use ckpt_core::procfs::Mapping;
use ckpt_core::{Context, Pid, RemotePtr, Target, TargetError, args};
use memchr::memmem;

use crate::protocol::SIGNAL;
use crate::translation::{HEADER_MAGIC, Header, KEPT, Stubs, Table, is_c_library, patch};

/// The words of a table.
pub fn table(pairs: &[(Pid, Pid)]) -> Vec<u64> {
    let word = |high: Pid, low: Pid| u64::from(high.0 as u32) << 32 | u64::from(low.0 as u32);
    let mut by_virtual: Vec<u64> = pairs.iter().map(|&(id, real)| word(id, real)).collect();
    let mut by_real: Vec<u64> = pairs.iter().map(|&(id, real)| word(real, id)).collect();
    by_virtual.sort_unstable();
    by_real.sort_unstable();
    [vec![pairs.len() as u64], by_virtual, by_real].concat()
}

/// What the programs of a frozen tree call an id.
pub fn names_of(target: &mut dyn Target, header: u64, generation: u64) -> Result<Names, TargetError> {
    let pid = target.pid();
    let invalid = || TargetError::Driver {
        pid,
        operation: "reading its table of ids",
        source: io::Error::from(io::ErrorKind::InvalidData),
    };
    let slot = header + (offset_of!(Header, tables) + 8 * (generation as usize % KEPT)) as u64;
    let address = read_word(target, slot)?;
    let count = read_word(target, address)?;
    const MOST: u64 = 1 << 22;
    if count > MOST {
        return Err(invalid());
    }
    let mut bytes = vec![0; 8 * (1 + 2 * count as usize)];
    target.read(RemotePtr(address), &mut bytes)?;
    let words: Vec<u64> =
        bytes.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().expect("8 bytes"))).collect();
    Table::from_words(&words).ok_or_else(invalid)?;
    Ok(Box::new(move |id: Pid| {
        let table = Table::from_words(&words).unwrap_or(Table::EMPTY);
        Pid(table.result(id.0))
    }))
}

fn read_word(target: &mut dyn Target, at: u64) -> Result<u64, TargetError> {
    let mut word = [0; 8];
    target.read(RemotePtr(at), &mut word)?;
    Ok(u64::from_ne_bytes(word))
}

/// A process that is to translate its ids.
struct Installation<'a> {
    target: &'a mut dyn Target,
    mappings: Vec<Mapping>,
    header: u64,
    words: Vec<u64>,
}

/// Gives a skeleton a table. Its contexts may change: a call that was about to be made begins anew.
pub fn install(target: &mut dyn Target, contexts: &mut [Option<Context>], table: &[u64]) -> Result<(), TargetError> {
    let pid = target.pid();
    let failed = |source| TargetError::Driver { pid, operation: "reading maps", source };
    let maps = target.proc().read("maps").map_err(failed)?;
    let mappings: Vec<Mapping> = Mapping::parse_all(&maps).unwrap_or_default();
    let Some(header) = find_header(target, &mappings)? else {
        let source = io::Error::other(
            "its ids are taken, and it has no shim (or that of another version of ckpt) that could translate others; \
             end the processes that have them, or restore in a pid namespace of its own",
        );
        return Err(TargetError::Driver { pid, operation: "giving it other ids", source });
    };
    let mut bytes = vec![0; size_of::<Header>()];
    target.read(RemotePtr(header), &mut bytes)?;
    let words = bytes.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().expect("8 bytes"))).collect();
    let mut installation = Installation { target, mappings, header, words };
    if installation.get(offset_of!(Header, generation)) == 0 {
        installation.patch_libraries()?;
        installation.stand_before_handlers()?;
    }
    installation.rewind(contexts);
    installation.add_table(table)
}

/// The shim is plain memory that begins as a library does.
fn find_header(target: &mut dyn Target, mappings: &[Mapping]) -> Result<Option<u64>, TargetError> {
    const LARGEST: u64 = 512 * 1024;
    let magic: Vec<u8> = HEADER_MAGIC.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let ours = target.footprint().mappings;
    let is_plain = |mapping: &Mapping| {
        mapping.read && mapping.name.as_os_str().is_empty() && !ours.iter().any(|range| range.contains(&mapping.start))
    };
    for (index, first) in mappings.iter().enumerate() {
        if !is_plain(first) || first.write || first.execute {
            continue;
        }
        let mut begin = [0; 4];
        if target.read(RemotePtr(first.start), &mut begin).is_err() || begin != *b"\x7fELF" {
            continue;
        }
        let mut end = first.start;
        for mapping in &mappings[index..] {
            if mapping.start != end || mapping.end - first.start > LARGEST || !is_plain(mapping) {
                break;
            }
            end = mapping.end;
            if !mapping.write {
                continue;
            }
            let mut bytes = vec![0; mapping.len() as usize];
            target.read(RemotePtr(mapping.start), &mut bytes)?;
            if let Some(at) = memmem::find(&bytes, &magic) {
                return Ok(Some(mapping.start + at as u64));
            }
        }
    }
    Ok(None)
}

impl Installation<'_> {
    fn get(&self, offset: usize) -> u64 {
        self.words[offset / 8]
    }

    fn set(&mut self, offset: usize, value: u64) {
        self.words[offset / 8] = value;
    }

    fn error(&self, operation: &'static str, why: &str) -> TargetError {
        TargetError::Driver { pid: self.target.pid(), operation, source: io::Error::other(why.to_string()) }
    }

    fn patch_libraries(&mut self) -> Result<(), TargetError> {
        let address = self.get(offset_of!(Header, stubs));
        let mut room = vec![0; self.get(offset_of!(Header, stubs_size)) as usize];
        let mut stubs = Stubs {
            address,
            room: &mut room,
            used: 0,
            entry: self.get(offset_of!(Header, entry)),
            cloned: self.get(offset_of!(Header, cloned)),
            generation: self.header + offset_of!(Header, generation) as u64,
        };
        let mut calls = 0;
        for mapping in &self.mappings {
            let file = Path::new(&mapping.name).file_name().map(OsStr::as_bytes).unwrap_or_default();
            if !mapping.execute || !is_c_library(file) {
                continue;
            }
            let mut code = vec![0; mapping.len() as usize];
            self.target.read(RemotePtr(mapping.start), &mut code)?;
            let before = code.clone();
            calls += patch(&mut code, mapping.start, &mut stubs).calls;
            const PAGE: usize = 4096;
            for (page, (new, old)) in code.chunks(PAGE).zip(before.chunks(PAGE)).enumerate() {
                if new != old {
                    self.target.write(RemotePtr(mapping.start + (page * PAGE) as u64), new)?;
                }
            }
        }
        let used = stubs.used;
        if calls == 0 {
            return Err(self.error("giving it other ids", "it has no C library that is known"));
        }
        self.target.write(RemotePtr(address), &room[..used])?;
        self.set(offset_of!(Header, stubs_used), used as u64);
        let mut batch = Batch::new();
        batch.call(Sysno::mprotect, args![address, room.len(), libc::PROT_READ | libc::PROT_EXEC]);
        self.target.run(&batch).map(drop)
    }

    /// The handlers that the program has now.
    fn stand_before_handlers(&mut self) -> Result<(), TargetError> {
        const SIGNALS: i32 = 64;
        let trampoline = self.get(offset_of!(Header, trampoline));
        let mut batch = Batch::new();
        let slots: Vec<_> = (1..=SIGNALS)
            .filter(|signal| ![libc::SIGKILL, libc::SIGSTOP, SIGNAL].contains(signal))
            .map(|signal| {
                let slot = batch.room(32);
                batch.call(Sysno::rt_sigaction, args![signal, 0, slot, 8]);
                (signal, slot)
            })
            .collect();
        let replies = self.target.run(&batch)?;
        let mut batch = Batch::new();
        for (signal, slot) in slots {
            let mut action = replies.words(slot);
            const SIG_IGN: u64 = 1;
            if action[0] <= SIG_IGN || action[0] == trampoline {
                continue;
            }
            self.set(offset_of!(Header, handlers) + 8 * signal as usize, action[0]);
            action[0] = trampoline;
            let new = batch.words(&action);
            batch.call(Sysno::rt_sigaction, args![signal, new, 0, 8]);
        }
        self.target.run(&batch).map(drop)
    }

    /// A thread that was about to make a call translates its ids again.
    fn rewind(&self, contexts: &mut [Option<Context>]) {
        let gate = self.get(offset_of!(Header, gate))..self.get(offset_of!(Header, gate_end));
        for context in contexts.iter_mut().flatten() {
            let general = &mut context.registers.general;
            if gate.contains(&general.rip) {
                general.rip = self.get(offset_of!(Header, again));
            }
        }
    }

    fn add_table(&mut self, table: &[u64]) -> Result<(), TargetError> {
        let size = size_of_val(table).next_multiple_of(4096);
        let mut batch = Batch::new();
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let place = batch.call(Sysno::mmap, args![0, size, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0]);
        let address = self.target.run(&batch)?.value(place);
        let bytes: Vec<u8> = table.iter().flat_map(|word| word.to_ne_bytes()).collect();
        self.target.write(RemotePtr(address), &bytes)?;
        let generation = self.get(offset_of!(Header, generation)) + 1;
        self.set(offset_of!(Header, tables) + 8 * (generation as usize % KEPT), address);
        self.set(offset_of!(Header, generation), generation);
        let bytes: Vec<u8> = self.words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        self.target.write(RemotePtr(self.header), &bytes)
    }
}
