//! The release: the whole tree goes on at once, and nothing of us stays in it.
//!
//! Below the stack of each thread lies its way out: a frame that makes one more system call with the program's own code,
//! which takes away the region or says that it is not needed any more, and a frame with the thread's registers. One store
//! to a word that the whole tree shares commits; then we hang up, and every agent leaves by itself.

use std::io;

use ckpt_agent::frame;
use ckpt_core::error::RestoreError;
use ckpt_core::procfs::Mapping;
use ckpt_core::{Context, General, RemotePtr, Target, TargetError};
use memchr::memmem;

use crate::frozen::{Leaving, wait_until_left};
use crate::skeleton::{SkeletonTarget, SkeletonTree, frame_size};
use crate::virtual_ids;

pub fn release(mut tree: SkeletonTree) -> Result<(), RestoreError> {
    let table = tree.table();
    for target in tree.each() {
        let pid = target.task.pid;
        if let Some(table) = &table {
            let mut contexts = std::mem::take(&mut target.contexts);
            let installed = virtual_ids::install(target, &mut contexts, table);
            target.contexts = contexts;
            installed.map_err(|source| RestoreError::Target { resource: "tasks", pid, source })?;
        }
        prepare(target).map_err(|source| RestoreError::Target { resource: "registers", pid, source })?;
    }
    let leaving = tree.each().map(|target| {
        let blocked = target.contexts.iter().map(|context| context.as_ref().map_or(0, |context| context.blocked));
        let blocked = target.threads().iter().copied().zip(blocked).collect();
        Leaving { pid: target.task.pid, base: target.ours().start, blocked }
    });
    let leaving: Vec<Leaving> = leaving.collect();
    tree.region.commit();
    tree.released = true;
    tree.targets.clear();
    wait_until_left(&leaving);
    Ok(())
}

/// Below the stack pointer, the program may have data.
const RED_ZONE: u64 = 128;
/// Bytes of a frame without vector state, and what stands before it.
const PLAIN_FRAME: u64 = 512;

/// Lays the ways out of all threads of a process.
fn prepare(target: &mut SkeletonTarget) -> Result<(), TargetError> {
    let code = find_code(target)?;
    let ours = target.ours();
    for thread in 0..target.contexts.len() {
        let context = target.contexts[thread].clone().expect("every thread of a skeleton has a context");
        if thread == 0 {
            let unmap = (libc::SYS_munmap, [ours.start, ours.end - ours.start]);
            let frame = lay_way_out(target, &context, &code, unmap)?;
            let plain = frame.plain;
            target.channels[0].set_way(frame.first, plain);
        } else {
            // The kernel writes the word, for a call that is made outside of the region.
            let says = (libc::SYS_time, [target.channels[thread].left_address(), 0]);
            let frame = lay_way_out(target, &context, &code, says)?;
            target.channels[thread].set_way(frame.first, frame.plain);
        }
    }
    Ok(())
}

/// Addresses of frames.
struct WayOut {
    /// Makes the call, and leads to the plain one.
    first: u64,
    /// Goes on with the program.
    plain: u64,
}

/// Writes the frames below the stack of a thread.
fn lay_way_out(
    target: &mut SkeletonTarget,
    context: &Context,
    code: &Code,
    (number, args): (libc::c_long, [u64; 2]),
) -> Result<WayOut, TargetError> {
    let general = &context.registers.general;
    let last_frame = (general.rsp.wrapping_sub(RED_ZONE + frame_size(context))) & !63;
    let last_slot = last_frame.wrapping_sub(8);
    let mut bytes = code.restorer.to_ne_bytes().to_vec();
    bytes.extend(frame::build(&context.registers, context.blocked, last_frame));
    put(target, last_slot, &bytes)?;
    let call = General {
        rip: code.syscall_ret,
        rsp: last_slot,
        rax: number as u64,
        rdi: args[0],
        rsi: args[1],
        orig_rax: u64::MAX,
        eflags: 0x202,
        cs: general.cs,
        ss: general.ss,
        ..General::default()
    };
    let first = (last_slot - PLAIN_FRAME) & !15;
    let bytes = frame::build_plain(&call, u64::MAX);
    assert!(bytes.len() as u64 <= PLAIN_FRAME);
    put(target, first, &bytes)?;
    Ok(WayOut { first, plain: last_frame })
}

fn put(target: &mut SkeletonTarget, at: u64, bytes: &[u8]) -> Result<(), TargetError> {
    let pid = target.pid();
    target.write(RemotePtr(at), bytes).map_err(|error| match error {
        TargetError::Driver { .. } => TargetError::Driver {
            pid,
            operation: "laying the way out below a stack",
            source: io::Error::other("a thread has no room on its stack"),
        },
        other => other,
    })
}

/// Two pieces of the program's own code: `syscall; ret`, and a signal restorer. Every libc has both.
struct Code {
    syscall_ret: u64,
    restorer: u64,
}

const SYSCALL_RET: &[u8] = &[0x0f, 0x05, 0xc3];
/// `mov $15, %rax; syscall` (glibc, musl), and the shorter `mov $15, %eax; syscall` (the shim).
const RESTORERS: [&[u8]; 2] = [&[0x48, 0xc7, 0xc0, 15, 0, 0, 0, 0x0f, 0x05], &[0xb8, 15, 0, 0, 0, 0x0f, 0x05]];

fn find_code(target: &mut SkeletonTarget) -> Result<Code, TargetError> {
    let pid = target.pid();
    let failed = |source| TargetError::Driver { pid, operation: "reading maps", source };
    let maps = target.proc().read("maps").map_err(failed)?;
    let ours = target.ours();
    let mut executable: Vec<Mapping> = Mapping::parse_all(&maps).unwrap_or_default();
    executable
        .retain(|mapping| mapping.execute && mapping.read && mapping.start < 1 << 47 && !ours.contains(&mapping.start));
    executable.sort_by_key(|mapping| !mapping.name.to_string_lossy().contains("libc"));
    let (mut call, mut restorer) = (None, None);
    const PIECE: usize = 128 * 1024;
    let mut buffer = vec![0; PIECE];
    for mapping in &executable {
        let mut at = mapping.start;
        while at < mapping.end {
            let piece = &mut buffer[..PIECE.min((mapping.end - at) as usize)];
            if target.read(RemotePtr(at), piece).is_err() {
                break;
            }
            call = call.or(memmem::find(piece, SYSCALL_RET).map(|n| at + n as u64));
            restorer = restorer
                .or_else(|| RESTORERS.iter().find_map(|pattern| memmem::find(piece, pattern)).map(|n| at + n as u64));
            if let (Some(syscall_ret), Some(restorer)) = (call, restorer) {
                return Ok(Code { syscall_ret, restorer });
            }
            // Pieces overlap, so that no pattern is cut in two.
            at += piece.len() as u64 - if at + (piece.len() as u64) < mapping.end { 16 } else { 0 };
        }
    }
    let source = io::Error::other("the program has no code to make a system call with");
    Err(TargetError::Driver { pid, operation: "releasing it", source })
}
