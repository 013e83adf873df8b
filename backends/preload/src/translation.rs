//! Virtual ids: what the shim and its driver share. Compiled into both.
//!
//! A restored tree whose old ids are taken runs under others, and keeps seeing the old ones: its *virtual* ids. A table
//! says which real id each has. Every restore adds a table, a *generation*, so that what was asked of the kernel under
//! one generation is understood under the next.
//!
//! Ids that are in no table mean themselves: those of programs outside of the tree and of tasks made since. Should such
//! a real id be equal to a virtual one, it is shown a step of [`STEP`] higher, where the kernel gives out none.
//!
//! System calls come into the shim by a patch: [`patch`] finds them in the C library's code.

/// `PID_MAX_LIMIT` of the kernel: no id is as large.
pub const STEP: u32 = 1 << 22;
/// An id that nobody has.
pub const NOBODY: u32 = 0x3fff_ffff;
/// Generations that are kept.
pub const KEPT: usize = 64;

/// Begins the [`Header`].
pub const HEADER_MAGIC: [u64; 2] = [0x7364_692d_7470_6b63, 0x9d1f_63b8_e2a5_7c01];

/// Where the driver finds what it needs in the shim.
#[repr(C)]
pub struct Header {
    pub magic: [u64; 2],
    /// Patched system calls arrive here.
    pub entry: u64,
    /// Here the two that a clone has made.
    pub cloned: u64,
    /// A call that was interrupted between these two is made again from the first line on, with the ids as they are then.
    pub again: u64,
    pub gate: u64,
    pub gate_end: u64,
    /// The handler that stands before those of the program.
    pub trampoline: u64,
    /// Room for the code between a patch and [`entry`](Header::entry).
    pub stubs: u64,
    pub stubs_size: u64,
    pub stubs_used: u64,
    /// The current one; 0 in a program that has its real ids and no patch.
    pub generation: u64,
    /// Addresses of tables, by generation modulo [`KEPT`]; see [`Table::at`].
    pub tables: [u64; KEPT],
    /// The program's own handlers, by signal.
    pub handlers: [u64; 65],
}

/// Pairs of ids of one generation.
#[derive(Clone, Copy)]
pub struct Table<'a> {
    /// `virtual << 32 | real`, sorted.
    by_virtual: &'a [u64],
    /// `real << 32 | virtual`, sorted.
    by_real: &'a [u64],
}

impl<'a> Table<'a> {
    pub const EMPTY: Table<'static> = Table { by_virtual: &[], by_real: &[] };

    /// The words of a table: the number of pairs, and the pairs in both orders.
    pub fn from_words(words: &'a [u64]) -> Option<Table<'a>> {
        let (count, pairs) = words.split_first()?;
        let count = usize::try_from(*count).ok()?;
        if pairs.len() < count.checked_mul(2)? {
            return None;
        }
        let (by_virtual, rest) = pairs.split_at(count);
        Some(Table { by_virtual, by_real: &rest[..count] })
    }

    /// A table in this process's memory.
    ///
    /// # Safety
    /// Null, or the words of a table.
    pub unsafe fn at(words: *const u64) -> Table<'a> {
        if words.is_null() {
            return Table { by_virtual: &[], by_real: &[] };
        }
        // SAFETY: as promised by the caller.
        unsafe {
            let count = *words as usize;
            Table {
                by_virtual: core::slice::from_raw_parts(words.add(1), count),
                by_real: core::slice::from_raw_parts(words.add(1 + count), count),
            }
        }
    }

    fn find(pairs: &[u64], key: u32) -> Option<u32> {
        let (mut low, mut high) = (0, pairs.len());
        while low < high {
            let middle = low + (high - low) / 2;
            let pair = pairs[middle];
            match (pair >> 32) as u32 {
                found if found == key => return Some(pair as u32),
                found if found < key => low = middle + 1,
                _ => high = middle,
            }
        }
        None
    }

    /// The real id that the program means.
    pub fn to_real(self, id: u32) -> u32 {
        if let Some(real) = Table::find(self.by_virtual, id) {
            return real;
        }
        if id >= STEP && self.to_virtual(id % STEP) == id {
            return id % STEP;
        }
        // One that the program does not see under this number.
        if Table::find(self.by_real, id).is_some() { NOBODY } else { id }
    }

    /// The id by which the program knows a real one.
    pub fn to_virtual(self, real: u32) -> u32 {
        if let Some(id) = Table::find(self.by_real, real) {
            return id;
        }
        let mut id = real;
        while Table::find(self.by_virtual, id).is_some() {
            id += STEP;
        }
        id
    }

    /// As arguments are: of a group if negative, and 0 and -1 mean themselves.
    pub fn argument(&self, id: i32) -> i32 {
        match id {
            1.. => self.to_real(id as u32) as i32,
            -1 | 0 | i32::MIN => id,
            _ => -(self.to_real(-id as u32) as i32),
        }
    }

    /// The same for results.
    pub fn result(&self, id: i32) -> i32 {
        match id {
            1.. => self.to_virtual(id as u32) as i32,
            -1 | 0 | i32::MIN => id,
            _ => -(self.to_virtual(-id as u32) as i32),
        }
    }
}

pub const CLONE: u32 = 56;
pub const FORK: u32 = 57;
pub const VFORK: u32 = 58;
pub const CLONE3: u32 = 435;

/// Whether a system call takes, gives or shows ids: every one that is patched.
pub const fn bears_ids(number: u32) -> bool {
    matches!(
        number,
        // read (signalfd), open, stat, lstat, rt_sigaction, ioctl, access
        0 | 2 | 4 | 6 | 13 | 16 | 21
        // getpid, sendmsg, recvmsg, getsockopt, clone, fork, vfork, wait4, kill
        | 39 | 46 | 47 | 55 | 56 | 57 | 58 | 61 | 62
        // semctl, msgctl, shmctl, fcntl, getdents, getcwd, chdir, readlink
        | 66 | 71 | 31 | 72 | 78 | 79 | 80 | 89
        // ptrace, setpgid, getppid, getpgrp, setsid, getpgid, getsid, capget, capset
        | 101 | 109 | 110 | 111 | 112 | 121 | 124 | 125 | 126
        // rt_sigtimedwait, rt_sigqueueinfo, statfs, getpriority, setpriority, sched_*
        | 128 | 129 | 137 | 140 | 141 | 142 | 143 | 144 | 145 | 148
        // prctl, gettid, tkill, sched_setaffinity, sched_getaffinity, getdents64, set_tid_address
        | 157 | 186 | 200 | 203 | 204 | 217 | 218
        // timer_create, tgkill, waitid, ioprio_set, ioprio_get, inotify_add_watch, migrate_pages, openat
        | 222 | 234 | 247 | 251 | 252 | 254 | 256 | 257
        // newfstatat, readlinkat, faccessat, get_robust_list, move_pages, rt_tgsigqueueinfo, perf_event_open
        | 262 | 267 | 269 | 274 | 279 | 297 | 298
        // recvmmsg, prlimit64, sendmmsg, process_vm_readv, process_vm_writev, kcmp, sched_setattr, sched_getattr
        | 299 | 302 | 307 | 310 | 311 | 312 | 314 | 315
        // statx, pidfd_send_signal, pidfd_open, clone3, openat2, faccessat2
        | 332 | 424 | 434 | 435 | 437 | 439
    )
}

/// Where the stubs go.
pub struct Stubs<'a> {
    /// Where the code will be.
    pub address: u64,
    pub room: &'a mut [u8],
    pub used: usize,
    pub entry: u64,
    pub cloned: u64,
    /// The address of [`Header::generation`].
    pub generation: u64,
}

/// What became of the system calls of some code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Patched {
    pub calls: usize,
    /// Those that bear ids, and whose surroundings have no room.
    pub left: usize,
}

const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// `mov $imm32, %eax`, `jmp rel32`, `jmp rel8`.
const MOV_EAX: u8 = 0xb8;
const JMP: u8 = 0xe9;
const JMP_SHORT: u8 = 0xeb;

/// Leads the system calls of a library's code, which is (or will be) at `base`, to the shim. Three forms are known:
///
/// - `mov $N, %eax; syscall`: the first becomes a jump to a stub, the second a jump back to the first;
/// - `mov $N, %eax`, a few simple instructions, `syscall`: the first becomes a jump to a stub that has the others, too;
/// - any other, `N` in a register: `syscall` becomes a jump to a stub by way of a `nop` that is long enough.
pub fn patch(code: &mut [u8], base: u64, stubs: &mut Stubs<'_>) -> Patched {
    let mut patched = Patched::default();
    let mut at = 5;
    while at + 8 <= code.len() {
        if code[at] != SYSCALL[0] || code[at + 1] != SYSCALL[1] {
            at += 1;
            continue;
        }
        let here = at;
        at += 2;
        let direct = number_at(code, here - 5);
        if direct.is_none() && !is_checked(code, here + 2) {
            continue;
        }
        if let Some(number) = direct {
            if bears_ids(number) {
                let stub = stubs.add(Some(number), &[], base + here as u64 + 2);
                match stub {
                    Some(stub) if jump(code, here - 5, base, stub) => {
                        code[here] = JMP_SHORT;
                        code[here + 1] = 0xf9;
                        patched.calls += 1;
                    }
                    _ => patched.left += 1,
                }
            }
            continue;
        }
        match number_before(code, here) {
            Some((_, number)) if !bears_ids(number) => {}
            Some((start, number)) => {
                // A loop that jumps to between the two would have nothing to set %eax.
                let (between, rest) = (start + 5, base + here as u64 + 2);
                match stubs.add(Some(number), &code[between..here], rest) {
                    Some(stub) if jump(code, start, base, stub) => patched.calls += 1,
                    _ => patched.left += 1,
                }
            }
            None => match by_way_of_nop(code, here, base, stubs) {
                true => patched.calls += 1,
                false => patched.left += 1,
            },
        }
    }
    patched
}

/// What follows a system call in C libraries: `cmp $-4096, %rax` or `%eax`. So these two bytes are one, and not a part of
/// another instruction.
fn is_checked(code: &[u8], at: usize) -> bool {
    let after = &code[at..];
    let wide = after.len() >= 6 && after[0] == 0x48 && after[1] == 0x3d && after[2] < 2 && after[3] == 0xf0;
    let narrow = after.len() >= 5 && after[0] == 0x3d && after[1] < 2 && after[2] == 0xf0;
    wide && after[4] == 0xff && after[5] == 0xff || narrow && after[3] == 0xff && after[4] == 0xff
}

/// `mov $N, %eax`, with an N that is a number of a system call.
fn number_at(code: &[u8], at: usize) -> Option<u32> {
    if code[at] != MOV_EAX || code[at + 3] != 0 || code[at + 4] != 0 || code[at + 2] > 1 {
        return None;
    }
    Some(code[at + 1] as u32 | (code[at + 2] as u32) << 8)
}

/// The same with simple instructions between it and the system call.
fn number_before(code: &[u8], here: usize) -> Option<(usize, u32)> {
    let mut start = here.checked_sub(7)?;
    while here - start <= 21 {
        if let Some(number) = number_at(code, start) {
            let mut at = start + 5;
            while at < here {
                match simple(&code[at..here]) {
                    Some(length) => at += length,
                    None => break,
                }
            }
            if at == here {
                return Some((start, number));
            }
        }
        start = start.checked_sub(1)?;
    }
    None
}

/// The length of an instruction that means the same anywhere, and leaves %eax alone.
fn simple(code: &[u8]) -> Option<usize> {
    let rex = code.first().is_some_and(|first| first & 0xf0 == 0x40) as usize;
    let first = *code.get(rex)?;
    let extended = if rex == 1 { code[0] } else { 0 };
    // mov $imm32, %reg
    if first & 0xf8 == 0xb8 && first != MOV_EAX && extended & 8 == 0 {
        return Some(rex + 5);
    }
    let (opcode, immediate) = match first {
        // xor, cmp, test, mov, lea
        0x31 | 0x39 | 0x3b | 0x85 | 0x89 | 0x8b | 0x8d => (1, 0),
        // mov $imm32, r/m
        0xc7 => (1, 4),
        // cmov
        0x0f if code.get(rex + 1)? & 0xf0 == 0x40 => (2, 0),
        _ => return None,
    };
    let modrm = *code.get(rex + opcode)?;
    let (mode, register, memory) = (modrm >> 6, modrm >> 3 & 7 | (extended & 4) << 1, modrm & 7);
    let written = match first {
        0x31 | 0x89 | 0xc7 if mode == 3 => memory | (extended & 1) << 3,
        0x8b | 0x8d | 0x0f => register,
        _ => 1,
    };
    if written == 0 {
        return None;
    }
    let sib = (mode != 3 && memory == 4) as usize;
    let displacement = match (mode, memory) {
        // Relative to the instruction.
        (0, 5) => return None,
        (0, 4) if code.get(rex + opcode + 1)? & 7 == 5 => 4,
        (1, _) => 1,
        (2, _) => 4,
        _ => 0,
    };
    Some(rex + opcode + 1 + sib + displacement + immediate)
}

/// Writes `jmp target` at an offset.
fn jump(code: &mut [u8], at: usize, base: u64, target: u64) -> bool {
    let distance = target.wrapping_sub(base + at as u64 + 5) as i64;
    let Ok(distance) = i32::try_from(distance) else { return false };
    code[at] = JMP;
    code[at + 1..at + 5].copy_from_slice(&distance.to_le_bytes());
    true
}

/// A `nop` near the call gets two jumps: one over the other, for who runs through it, and one to the stub.
fn by_way_of_nop(code: &mut [u8], here: usize, base: u64, stubs: &mut Stubs<'_>) -> bool {
    const NEEDED: usize = 7;
    let low = here.saturating_sub(110);
    let high = (here + 120).min(code.len().saturating_sub(16));
    let mut at = low;
    while at < high {
        let length = nop(&code[at..]);
        if length < NEEDED {
            at += 1;
            continue;
        }
        let Some(stub) = stubs.add(None, &[], base + here as u64 + 2) else { return false };
        if !jump(code, at + 2, base, stub) {
            return false;
        }
        code[at] = JMP_SHORT;
        code[at + 1] = (length - 2) as u8;
        code[here] = JMP_SHORT;
        code[here + 1] = ((at + 2) as i64 - (here as i64 + 2)) as i8 as u8;
        return true;
    }
    false
}

/// The length of one long `nop`, as assemblers write it.
fn nop(code: &[u8]) -> usize {
    const LONG: [&[u8]; 4] = [
        &[0x66, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0],
        &[0x66, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0],
        &[0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0],
        &[0x0f, 0x1f, 0x80, 0, 0, 0, 0],
    ];
    let mut n = 0;
    while n < LONG.len() {
        let form = LONG[n];
        if code.len() >= form.len() && code[..form.len()] == *form {
            return form.len();
        }
        n += 1;
    }
    0
}

impl Stubs<'_> {
    /// Code that comes from a patch and goes to the shim, which returns to `back`:
    ///
    /// ```text
    /// (instructions of the program)
    /// mov  $N, %eax
    /// lea  -136(%rsp), %rsp      past the red zone
    /// movl $low, (%rsp)          the place to return to
    /// movl $high, 4(%rsp)
    /// jmp  entry                 which ends in `ret $128`
    /// ```
    ///
    /// A clone is made by the stub itself: its child may have another stack, or the same. The id that it gives is of the
    /// generation that is in %rcx from the next instruction on (`mov generation(%rip), %rcx`): whoever is frozen in what
    /// follows may go on in another one. What follows writes to the stack, which a fork has just made a page fault of.
    fn add(&mut self, number: Option<u32>, between: &[u8], back: u64) -> Option<u64> {
        const MOST: usize = 48;
        if self.used + between.len() + MOST > self.room.len() {
            return None;
        }
        let start = self.used;
        self.put(between);
        if let Some(number) = number {
            self.put(&[MOV_EAX]);
            self.put(&number.to_le_bytes());
        }
        let clones = matches!(number, Some(CLONE | FORK | VFORK | CLONE3));
        if clones {
            self.put(&SYSCALL);
            self.put(&[0x48, 0x8b, 0x0d]);
            let distance = self.generation.wrapping_sub(self.address + self.used as u64 + 4) as i64;
            self.put(&i32::try_from(distance).ok()?.to_le_bytes());
        }
        self.put(&[0x48, 0x8d, 0xa4, 0x24, 0x78, 0xff, 0xff, 0xff]);
        self.put(&[0xc7, 0x04, 0x24]);
        self.put(&(back as u32).to_le_bytes());
        self.put(&[0xc7, 0x44, 0x24, 0x04]);
        self.put(&((back >> 32) as u32).to_le_bytes());
        let target = if clones { self.cloned } else { self.entry };
        let distance = target.wrapping_sub(self.address + self.used as u64 + 5) as i64;
        let distance = i32::try_from(distance).ok()?;
        self.put(&[JMP]);
        self.put(&distance.to_le_bytes());
        Some(self.address + start as u64)
    }

    fn put(&mut self, bytes: &[u8]) {
        let mut n = 0;
        while n < bytes.len() {
            self.room[self.used] = bytes[n];
            self.used += 1;
            n += 1;
        }
    }
}

/// Whether a library is patched: a C library, by its file name.
pub fn is_c_library(name: &[u8]) -> bool {
    const NAMES: [&[u8]; 4] = [b"libc.so", b"libc-2", b"libpthread", b"ld-musl"];
    let mut n = 0;
    while n < NAMES.len() {
        if name.starts_with(NAMES[n]) {
            return true;
        }
        n += 1;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_id_means_two_tasks() {
        // 100 became 200, 200 became 300; 100 and 300 are strangers' now.
        let words = [2, 100 << 32 | 200, 200 << 32 | 300, 200 << 32 | 100, 300 << 32 | 200];
        let table = Table::from_words(&words).unwrap();
        let all = [(100, 200), (200, 300), (STEP + 100, 100), (7, 7)];
        for (id, real) in all {
            assert_eq!((table.to_real(id), table.to_virtual(real)), (real, id));
        }
        assert_eq!(table.to_real(300), NOBODY, "a member is not reached by its real id");
        assert_eq!((table.argument(-100), table.result(-300)), (-200, -200));
        assert_eq!((table.argument(0), table.argument(-1)), (0, -1));
    }

    fn patched(code: &[u8]) -> (Vec<u8>, Vec<u8>, Patched) {
        let (mut code, mut room) = (code.to_vec(), vec![0; 256]);
        code.resize(code.len().max(64), 0xcc);
        let mut stubs =
            Stubs { address: 0x2000, room: &mut room, used: 0, entry: 0x3000, cloned: 0x3100, generation: 0x3200 };
        let patched = patch(&mut code, 0x1000, &mut stubs);
        (code, room, patched)
    }

    #[test]
    fn calls_that_bear_ids_are_led_away_and_no_others() {
        // mov $39, %eax; syscall; ret
        let (code, room, found) = patched(&[0xb8, 39, 0, 0, 0, 0x0f, 0x05, 0xc3]);
        assert_eq!(
            (found, &code[..8]),
            (Patched { calls: 1, left: 0 }, &[0xe9, 0xfb, 0x0f, 0, 0, 0xeb, 0xf9, 0xc3][..])
        );
        assert_eq!(room[..5], [0xb8, 39, 0, 0, 0]);
        // fork: the stub makes the call itself, and notes the generation (at 0x3200) before anything else.
        let (_, room, found) = patched(&[0xb8, 57, 0, 0, 0, 0x0f, 0x05, 0xc3]);
        assert_eq!((found.calls, &room[..10]), (1, &[0xb8, 57, 0, 0, 0, 0x0f, 0x05, 0x48, 0x8b, 0x0d][..]));
        assert_eq!(room[10..14], (0x3200_u32 - 0x200e).to_le_bytes());
        // getuid; and two bytes that are part of something else
        for code in [&[0xb8, 102, 0, 0, 0, 0x0f, 0x05, 0xc3][..], &[0x90, 0x90, 0x90, 0x90, 0x90, 0x0f, 0x05, 0x90]] {
            assert_eq!(patched(code).2, Patched::default());
        }
        // tgkill, with mov 16(%r8), %esi between
        let code = [0xb8, 234, 0, 0, 0, 0x41, 0x8b, 0x70, 0x10, 0x0f, 0x05, 0x3d, 0, 0xf0, 0xff, 0xff];
        let (code, room, found) = patched(&code);
        assert_eq!((found.calls, code[0]), (1, 0xe9));
        assert_eq!(room[..9], [0x41, 0x8b, 0x70, 0x10, 0xb8, 234, 0, 0, 0]);
    }

    /// What is left in the C library of this host is a thread's or a lock's, not an id's.
    #[test]
    fn the_c_library_of_this_host_is_known() {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let library = maps.lines().find(|line| line.contains("r-xp") && line.contains("/libc.so.6")).unwrap();
        let (range, _) = library.split_once(' ').unwrap();
        let (start, end) = range.split_once('-').unwrap();
        let [start, end] = [start, end].map(|text| u64::from_str_radix(text, 16).unwrap());
        // SAFETY: mapped and readable, as the kernel has just said.
        let code = unsafe { std::slice::from_raw_parts(start as *const u8, (end - start) as usize) };
        let (mut code, mut room) = (code.to_vec(), vec![0; 32 * 1024]);
        let address = end + 4096;
        let mut stubs =
            Stubs { address, room: &mut room, used: 0, entry: address, cloned: address, generation: address };
        let found = patch(&mut code, start, &mut stubs);
        assert!(found.calls > 100, "{found:?}");
        assert!(found.left < 16, "{found:?}");
    }
}
