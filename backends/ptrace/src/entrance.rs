//! Where in a program's own code a first system call can be injected, and how a killed driver is survived.
//!
//! Two pieces of the program's code are enough: a `syscall; ret`, and a signal restorer (`mov $15, %eax; syscall`). With
//! the stack pointer at the restorer's address, followed by a signal frame, a thread that is sent to the first piece
//! makes the call, returns into the restorer, and goes on from the frame. Every libc has both.

use std::collections::HashMap;
use std::io;

use ckpt_agent::process::Process;
use ckpt_core::RemotePtr;
use ckpt_core::procfs::Mapping;
use memchr::memmem;

/// Addresses in one process.
#[derive(Clone, Copy, Debug)]
pub struct Entrance {
    pub syscall_ret: u64,
    pub restorer: u64,
    /// Where a stub was written over padding, because the program has no such code.
    pub stub: Option<u64>,
}

const SYSCALL_RET: &[u8] = &[0x0f, 0x05, 0xc3];
/// `mov $15, %rax; syscall` (glibc, musl), and the shorter `mov $15, %eax; syscall`.
const RESTORERS: [&[u8]; 2] = [&[0x48, 0xc7, 0xc0, 15, 0, 0, 0, 0x0f, 0x05], &[0xb8, 15, 0, 0, 0, 0x0f, 0x05]];
/// Both, for programs that have neither.
const STUB: &[u8] = &[0x0f, 0x05, 0xc3, 0xb8, 15, 0, 0, 0, 0x0f, 0x05];

/// What was found in one executable mapping of a file: offsets from its start.
type Found = (Option<u64>, Option<u64>);

/// Remembers what was searched: the processes of a tree mostly share their libraries.
#[derive(Debug, Default)]
pub struct Search {
    known: HashMap<(u32, u32, u64, u64), Found>,
}

impl Search {
    /// Finds both pieces in a process; libc first, as it has them.
    pub fn entrance(&mut self, process: &Process, mappings: &[Mapping]) -> io::Result<Entrance> {
        let mut executable: Vec<&Mapping> =
            mappings.iter().filter(|mapping| mapping.execute && mapping.read && mapping.start < 1 << 47).collect();
        executable.sort_by_key(|mapping| !mapping.name.to_string_lossy().contains("libc"));
        let (mut call, mut restorer) = (None, None);
        for mapping in &executable {
            let found = self.look(process, mapping);
            call = call.or(found.0.map(|offset| mapping.start + offset));
            restorer = restorer.or(found.1.map(|offset| mapping.start + offset));
            if let (Some(syscall_ret), Some(restorer)) = (call, restorer) {
                return Ok(Entrance { syscall_ret, restorer, stub: None });
            }
        }
        self.write_stub(process, &executable)
    }

    fn look(&mut self, process: &Process, mapping: &Mapping) -> Found {
        let key = (mapping.major, mapping.minor, mapping.inode, mapping.offset);
        if mapping.inode != 0
            && let Some(&found) = self.known.get(&key)
        {
            return found;
        }
        let mut found = (None, None);
        const PIECE: usize = 128 * 1024;
        let mut code = vec![0; PIECE];
        let mut at = mapping.start;
        while at < mapping.end && (found.0.is_none() || found.1.is_none()) {
            let code = &mut code[..PIECE.min((mapping.end - at) as usize)];
            if process.read(RemotePtr(at), code).is_err() {
                break;
            }
            let offset = at - mapping.start;
            found.0 = found.0.or(memmem::find(code, SYSCALL_RET).map(|n| offset + n as u64));
            found.1 = found.1.or_else(|| {
                RESTORERS.iter().find_map(|pattern| memmem::find(code, pattern)).map(|n| offset + n as u64)
            });
            // Pieces overlap, so that no pattern is cut in two.
            at += code.len() as u64 - if at + (code.len() as u64) < mapping.end { 16 } else { 0 };
        }
        self.known.insert(key, found);
        found
    }

    /// Writes both over the zeros that pad the last page of an executable mapping.
    fn write_stub(&self, process: &Process, executable: &[&Mapping]) -> io::Result<Entrance> {
        for mapping in executable {
            let at = mapping.end - 32;
            let mut tail = [0xff; 32];
            let readable = process.read(RemotePtr(at), &mut tail).is_ok();
            if readable && !mapping.shared && tail == [0; 32] && process.force_write(RemotePtr(at), STUB).is_ok() {
                return Ok(Entrance { syscall_ret: at, restorer: at + 3, stub: Some(at) });
            }
        }
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "the program has no code to make a system call with, and no padding to put it in",
        ))
    }
}

/// Puts the padding back that a stub was written over.
pub fn remove_stub(process: &Process, entrance: &Entrance) {
    if let Some(at) = entrance.stub {
        let _ = process.force_write(RemotePtr(at), &[0; STUB.len()]);
    }
}
