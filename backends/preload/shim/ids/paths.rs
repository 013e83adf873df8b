//! Ids in paths below `/proc`, in what links there say, in its listings, and in the files that tell ids.
//!
//! A path is walked component by component, with `.` and `..`, from the root or from where a directory descriptor or the
//! current directory leads; so it does not matter how a program spells it. Symbolic links of the user's own into `/proc`
//! are not followed.
//!
//! `stat`, `status`, `children`, `timers` and `fdinfo` of a process or thread are read at once when they are opened: the program gets a
//! memfd with that content in its own ids. It does not change afterwards, as the file would.

use super::{BUFFER, Frame};
use crate::calls::{self, sys};
use crate::start;
use crate::translation::Table;

const AT_FDCWD: i32 = -100;
const O_ACCMODE: u64 = 3;
const O_CLOEXEC: u64 = 0o2_000_000;
const O_PATH: u64 = 0o10_000_000;

/// What a directory below `/proc` is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Root,
    Proc,
    Process,
    Tasks,
    Thread,
    /// Files that tell ids.
    Stat,
    Status,
    Children,
    Timers,
    /// `fdinfo`, and a file in it.
    Descriptors,
    Descriptor,
    Other,
}

/// Where a path has led so far.
struct Walk {
    way: [Place; 24],
    depth: usize,
}

impl Walk {
    const fn new() -> Walk {
        Walk { way: [Place::Root; 24], depth: 0 }
    }

    fn here(&self) -> Place {
        if self.depth >= self.way.len() { Place::Other } else { self.way[self.depth] }
    }

    fn enter(&mut self, place: Place) {
        self.depth += 1;
        if self.depth < self.way.len() {
            self.way[self.depth] = place;
        }
    }

    /// Walks on, and writes the same path with other ids. False if there is no room for it.
    fn walk(&mut self, path: &[u8], out: &mut Text<'_>, to: &dyn Fn(u32) -> u32) -> bool {
        let mut at = 0;
        while at < path.len() {
            if path[at] == b'/' {
                out.push(b'/');
                at += 1;
                continue;
            }
            let mut end = at;
            while end < path.len() && path[end] != b'/' {
                end += 1;
            }
            let name = &path[at..end];
            at = end;
            match (self.here(), name, number(name)) {
                (_, b".", _) => {}
                (_, b"..", _) => self.depth = self.depth.saturating_sub(1),
                (place @ (Place::Proc | Place::Tasks), _, Some(id)) => {
                    self.enter(if place == Place::Proc { Place::Process } else { Place::Thread });
                    out.number(to(id));
                    continue;
                }
                (Place::Root, b"proc", _) => self.enter(Place::Proc),
                (Place::Proc, b"self", _) => self.enter(Place::Process),
                (Place::Proc, b"thread-self", _) => self.enter(Place::Thread),
                (Place::Process, b"task", _) => self.enter(Place::Tasks),
                (Place::Process | Place::Thread, b"stat", _) => self.enter(Place::Stat),
                (Place::Process | Place::Thread, b"status", _) => self.enter(Place::Status),
                (Place::Process | Place::Thread, b"timers", _) => self.enter(Place::Timers),
                (Place::Process | Place::Thread, b"fdinfo", _) => self.enter(Place::Descriptors),
                (Place::Descriptors, _, Some(_)) => self.enter(Place::Descriptor),
                (Place::Descriptors, b"0", _) => self.enter(Place::Descriptor),
                (Place::Thread, b"children", _) => self.enter(Place::Children),
                _ => self.enter(Place::Other),
            }
            out.bytes(name);
        }
        out.fits
    }
}

/// A decimal number without a sign or leading zeros, as names of processes are.
fn number(text: &[u8]) -> Option<u32> {
    if text.is_empty() || text.len() > 10 || text[0] == b'0' {
        return None;
    }
    let mut value = 0u64;
    for &byte in text {
        if !byte.is_ascii_digit() {
            return None;
        }
        value = value * 10 + (byte - b'0') as u64;
    }
    (value <= i32::MAX as u64).then_some(value as u32)
}

/// Text that is being written.
struct Text<'a> {
    to: &'a mut [u8],
    length: usize,
    fits: bool,
}

impl Text<'_> {
    fn new(to: &mut [u8]) -> Text<'_> {
        Text { to, length: 0, fits: true }
    }

    fn push(&mut self, byte: u8) {
        // One place is left for a zero byte.
        if self.length + 1 < self.to.len() {
            self.to[self.length] = byte;
            self.length += 1;
        } else {
            self.fits = false;
        }
    }

    fn bytes(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.push(byte);
        }
    }

    fn number(&mut self, mut number: u32) {
        let mut digits = [0u8; 10];
        let mut n = digits.len();
        loop {
            n -= 1;
            digits[n] = b'0' + (number % 10) as u8;
            number /= 10;
            if number == 0 {
                break;
            }
        }
        self.bytes(&digits[n..]);
    }
}

/// Which argument of a call is a path, and which the directory that it begins in.
fn path_of(call: u64) -> Option<(usize, Option<usize>)> {
    match call {
        // open, stat, lstat, access, chdir, readlink, statfs
        2 | 4 | 6 | 21 | 80 | 89 | 137 => Some((0, None)),
        // inotify_add_watch
        254 => Some((1, None)),
        // openat, newfstatat, readlinkat, faccessat, statx, openat2, faccessat2
        257 | 262 | 267 | 269 | 332 | 437 | 439 => Some((1, Some(0))),
        _ => None,
    }
}

/// How the names of files begin that tell ids.
const FILES: [&[u8]; 4] = [b"stat", b"children", b"timers", b"fdinfo"];

/// Whether a path could lead to an id below `/proc`. For most it takes a look at five bytes.
fn is_suspect(path: &[u8]) -> bool {
    match path {
        [b'/', b'p', b'r', b'o', b'c', ..] | [b'/', b'/' | b'.', ..] => true,
        [b'/', ..] => false,
        _ => {
            let mut begins = true;
            let mut n = 0;
            while n < path.len() {
                let rest = &path[n..];
                if begins && (rest[0].is_ascii_digit() || FILES.iter().any(|name| rest.starts_with(name))) {
                    return true;
                }
                begins = path[n] == b'/';
                n += 1;
            }
            false
        }
    }
}

/// What the link in `/proc/self` says of a descriptor, or of the working directory.
#[inline(never)]
pub(super) fn link_of(fd: i32, link: &mut [u8; 128]) -> Option<&[u8]> {
    // SAFETY: a C string and a buffer of ours.
    let length = unsafe {
        if fd == AT_FDCWD {
            sys!(calls::READLINK, c"/proc/self/cwd".as_ptr(), link.as_mut_ptr(), link.len())
        } else {
            let mut name = [0u8; 40];
            let mut text = Text::new(&mut name);
            text.bytes(b"/proc/self/fd/");
            text.number(fd as u32);
            sys!(calls::READLINK, name.as_ptr(), link.as_mut_ptr(), link.len())
        }
    };
    link.get(..usize::try_from(length).ok()?)
}

/// Where a directory leads that a relative path begins in; nothing if that is not below `/proc`.
fn begin(directory: i32) -> Option<Walk> {
    let mut link = [0u8; 128];
    let link = link_of(directory, &mut link)?;
    if !link.starts_with(b"/proc") || link.len() > 5 && link[5] != b'/' {
        return None;
    }
    let mut walk = Walk::new();
    walk.walk(link, &mut Text::new(&mut [0; 130]), &|id| id);
    Some(walk)
}

/// A path that goes to the kernel.
///
/// # Safety
/// The program's own call: its path is a C string.
pub unsafe fn before(frame: &mut Frame, table: &Table<'_>) {
    if frame.number == 217 {
        return shorten(frame);
    }
    let Some((argument, directory)) = path_of(frame.number) else { return };
    let text = frame.args[argument] as *const u8;
    // SAFETY: as promised by the caller.
    let path = unsafe {
        if text.is_null() || *text == 0 {
            return;
        }
        core::slice::from_raw_parts(text, calls::length(text))
    };
    if !is_suspect(path) {
        return;
    }
    let mut walk = Walk::new();
    if path[0] != b'/' {
        let directory = directory.map_or(AT_FDCWD, |argument| frame.args[argument] as i32);
        match begin(directory) {
            Some(begun) => walk = begun,
            None => return,
        }
    }
    let mut out = Text::new(&mut frame.buffer);
    let fits = walk.walk(path, &mut out, &|id| table.to_real(id));
    let length = out.length;
    frame.buffer[length] = 0;
    // One that is longer than any below /proc: if it leads to an id, then to none that is there.
    if fits {
        frame.real[argument] = frame.buffer.as_ptr() as u64;
    } else if walk.way[1] == Place::Proc {
        frame.buffer[..7].copy_from_slice(b"/proc/-");
        frame.buffer[7] = 0;
        frame.real[argument] = frame.buffer.as_ptr() as u64;
    }
    frame.notes[0] = walk.here() as u64;
}

/// What comes back: a descriptor of a file that tells ids, what a link says, a listing.
///
/// # Safety
/// The program's own call, which has worked.
pub unsafe fn after(frame: &mut Frame, table: &Table<'_>) {
    let args = frame.args;
    let place = frame.notes[0];
    // SAFETY: as promised by the caller.
    unsafe {
        match frame.number {
            2 | 257 | 437 => {
                let flags = match frame.number {
                    2 => args[1],
                    257 => args[2],
                    _ => *(args[2] as *const u64),
                };
                let tells = [Place::Stat, Place::Status, Place::Children, Place::Timers, Place::Descriptor]
                    .iter().find(|&&kind| kind as u64 == place);
                if let (Some(kind), true) = (tells, flags & (O_ACCMODE | O_PATH) == 0) {
                    tell(frame.result as i32, *kind, flags & O_CLOEXEC, table);
                }
            }
            89 => link(frame, args[1], args[2], place, table),
            267 => link(frame, args[2], args[3], place, table),
            // getcwd: its length counts the zero byte
            79 => {
                frame.result -= 1;
                link(frame, args[0], args[1].saturating_sub(1), Place::Other as u64, table);
                *(args[0] as *mut u8).add(frame.result as usize) = 0;
                frame.result += 1;
            }
            217 => list(frame, table),
            _ => {}
        }
    }
}

/// What a link says: `/proc/self` and `/proc/thread-self` say ids, others paths.
unsafe fn link(frame: &mut Frame, to: u64, size: u64, place: u64, table: &Table<'_>) {
    let length = frame.result as usize;
    let mut said = [0u8; BUFFER];
    if length == 0 || length > said.len() {
        return;
    }
    // SAFETY: the kernel has written so many bytes there.
    unsafe { super::values::copy_bytes(to as *const u8, said.as_mut_ptr(), length) };
    let said = &said[..length];
    let mut walk = Walk::new();
    if [Place::Process as u64, Place::Thread as u64].contains(&place) && said[0].is_ascii_digit() {
        walk.enter(Place::Proc);
    } else if !said.starts_with(b"/proc/") {
        return;
    }
    let mut out = Text::new(&mut frame.buffer);
    if walk.walk(said, &mut out, &|id| table.to_virtual(id)) {
        let length = out.length.min(size as usize);
        // SAFETY: not more than the program has room for.
        unsafe { super::values::copy_bytes(frame.buffer.as_ptr(), to as *mut u8, length) };
        frame.result = length as i64;
    }
}

/// Whether a directory lists processes or threads.
fn lists_ids(fd: i32) -> bool {
    begin(fd).is_some_and(|walk| matches!(walk.here(), Place::Proc | Place::Tasks))
}

/// Names become longer, and their entries: the kernel gets a smaller buffer.
fn shorten(frame: &mut Frame) {
    let size = frame.args[2];
    frame.notes[1] = lists_ids(frame.args[0] as i32) as u64;
    if frame.notes[1] != 0 && size >= 512 {
        frame.real[2] = size / 3 * 2;
    }
}

/// `struct linux_dirent64`: the length at 16, the type at 18, the name at 19.
unsafe fn list(frame: &mut Frame, table: &Table<'_>) {
    const LENGTH: usize = 16;
    const NAME: usize = 19;
    let (buffer, room, got) = (frame.args[1] as *mut u8, frame.args[2] as usize, frame.result as usize);
    if frame.notes[1] == 0 || got == 0 {
        return;
    }
    // SAFETY: the kernel has filled so many bytes; the copy has the same.
    unsafe {
        let copy = start::allocate(got);
        if copy.is_null() {
            return;
        }
        super::values::copy_bytes(buffer, copy, got);
        let (mut from, mut to) = (0, 0);
        while from < got {
            let entry = copy.add(from);
            let size = entry.add(LENGTH).cast::<u16>().read_unaligned() as usize;
            let name = core::slice::from_raw_parts(entry.add(NAME), calls::length(entry.add(NAME)));
            from += size;
            let mut digits = [0u8; 12];
            let mut text = Text::new(&mut digits);
            let id = number(name);
            if let Some(id) = id {
                text.number(table.to_virtual(id));
            }
            let length = if id.is_some() { text.length } else { name.len() };
            let needed = (NAME + length + 1).next_multiple_of(8);
            if to + needed > room {
                break;
            }
            let out = buffer.add(to);
            super::values::copy_bytes(entry, out, NAME);
            let name = if id.is_some() { digits.as_ptr() } else { name.as_ptr() };
            super::values::copy_bytes(name, out.add(NAME), length);
            let mut n = NAME + length;
            while n < needed {
                out.add(n).write_volatile(0);
                n += 1;
            }
            out.add(LENGTH).cast::<u16>().write_unaligned(needed as u16);
            to += needed;
        }
        sys!(calls::MUNMAP, copy, got);
        frame.result = to as i64;
    }
}

/// Puts a copy with other ids behind the descriptor of a file that tells ids.
unsafe fn tell(fd: i32, kind: Place, close_on_exec: u64, table: &Table<'_>) {
    const ROOM: usize = 64 * 1024;
    const MFD_CLOEXEC: u64 = 1;
    // SAFETY: memory and descriptors of ours.
    unsafe {
        let memory = start::allocate(2 * ROOM);
        if memory.is_null() {
            return;
        }
        let mut length = 0;
        while length < ROOM {
            let read = sys!(calls::PREAD, fd, memory.add(length), ROOM - length, length);
            if read <= 0 {
                break;
            }
            length += read as usize;
        }
        let text = core::slice::from_raw_parts(memory, length);
        let mut out = Text::new(core::slice::from_raw_parts_mut(memory.add(ROOM), ROOM));
        match kind {
            Place::Stat => stat(text, &mut out, table),
            Place::Status | Place::Descriptor => lines(text, &mut out, table, &STATUS),
            Place::Timers => lines(text, &mut out, table, &[b"notify:"]),
            _ => numbers(text, &mut out, table, usize::MAX),
        }
        let copy = sys!(calls::MEMFD_CREATE, c"proc".as_ptr(), MFD_CLOEXEC);
        if length > 0 && out.fits && copy >= 0 && calls::write_all(copy as i32, memory.add(ROOM), out.length) {
            sys!(calls::LSEEK, copy, 0, 0);
            sys!(calls::DUP3, copy, fd, close_on_exec);
        }
        if copy >= 0 {
            sys!(calls::CLOSE, copy);
        }
        sys!(calls::MUNMAP, memory, 2 * ROOM);
    }
}

/// Translates the first so many numbers, and copies the rest.
fn numbers(text: &[u8], out: &mut Text<'_>, table: &Table<'_>, mut most: usize) {
    let mut at = 0;
    while at < text.len() {
        let mut end = at;
        while end < text.len() && text[end].is_ascii_digit() {
            end += 1;
        }
        if end > at && most > 0 {
            most -= 1;
            let signed = at > 0 && text[at - 1] == b'-';
            match number(&text[at..end]) {
                Some(id) if !signed => out.number(table.to_virtual(id)),
                _ => out.bytes(&text[at..end]),
            }
            at = end;
        } else {
            out.push(text[at]);
            at += 1;
        }
    }
}

/// `pid (name) state ppid pgrp session tty tpgid ...`. A name may have brackets.
fn stat(text: &[u8], out: &mut Text<'_>, table: &Table<'_>) {
    let open = text.iter().position(|&byte| byte == b'(').unwrap_or(0);
    let close = text.iter().rposition(|&byte| byte == b')').unwrap_or(0);
    numbers(&text[..open], out, table, 1);
    out.bytes(&text[open..close]);
    // After the state three ids, the terminal, and an id.
    let mut at = close;
    let mut field = 0;
    while at < text.len() {
        let mut end = at + 1;
        while end < text.len() && text[end] != b' ' {
            end += 1;
        }
        let translated = matches!(field, 2..=4 | 6);
        numbers(&text[at..end], out, table, translated as usize);
        field += 1;
        at = end;
    }
}

/// Lines of `status` and `fdinfo` that begin with an id.
const STATUS: [&[u8]; 8] = [b"Tgid:", b"Pid:", b"PPid:", b"TracerPid:", b"NStgid:", b"NSpid:", b"NSpgid:", b"NSsid:"];

/// Translates the first number in each line that begins so.
fn lines(text: &[u8], out: &mut Text<'_>, table: &Table<'_>, names: &[&[u8]]) {
    let mut at = 0;
    while at < text.len() {
        let mut end = at;
        while end < text.len() && text[end] != b'\n' {
            end += 1;
        }
        end = (end + 1).min(text.len());
        let line = &text[at..end];
        let tells = names.iter().any(|name| line.starts_with(name));
        numbers(line, out, table, tells as usize);
        at = end;
    }
}
