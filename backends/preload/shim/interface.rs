//! What a program may ask of ckpt: `include/ckpt.h` and `include/ckpt.py` find it here by name.
//!
//! A program that has found it is marked, by a page that nobody may touch ([`MARK`]), which a driver sees in its mappings.
//! From then on it is asked before each dump, and told afterwards, by signals with a value; it answers with datagrams:
//!
//! ```text
//! driver -> program   ask      once nobody is in a region the gate is closed: who would enter one, waits
//! program -> driver   READY    the hooks `before` have run
//!                     freeze, save, let go
//! driver -> program   tell     the hooks `after` run, the gate is open
//! ```
//!
//! Nothing is kept open in between, so that nothing of it is saved. That the driver was lost is seen by its socket, which
//! is gone; that this is another life of the process, out of an image of that dump, by the instant when the kernel made it,
//! which is noted when the gate is closed. Somebody who waits looks a few times in a second.
//!
//! Hooks run in a thread that the C library makes for the first of them, and in no signal handler.

use core::arch::naked_asm;
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering::SeqCst};

use crate::calls::{self, sys};
use crate::protocol::{
    Answer, BUSY, CONSENT_PREFIX, IN_HOOKS, IN_REGION, INTERFACE_MAGIC, MANAGER_PREFIX, MOST_IMAGE, READY, REFUSES,
    Request, SIGNAL, SOCKET_NAME, socket_name_of,
};
use crate::{freeze, start};

/// Version 1. What a later version adds comes behind, and makes `size` larger.
#[repr(C)]
pub struct Interface {
    version: u32,
    size: u32,
    attach: unsafe extern "C" fn() -> i32,
    restored: unsafe extern "C" fn() -> i32,
    enter: unsafe extern "C" fn() -> i32,
    leave: unsafe extern "C" fn() -> i32,
    now: unsafe extern "C" fn(*const u8) -> i32,
    add: unsafe extern "C" fn(*mut u8, *mut u8, *mut u8) -> i32,
    remove: unsafe extern "C" fn(*mut u8, *mut u8, *mut u8) -> i32,
}

/// What a program looks up. Its functions give a number, or an errno below zero.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)]
pub static ckpt_interface_v1: Interface =
    Interface { version: 1, size: size_of::<Interface>() as u32, attach, restored, enter, leave, now, add, remove };

const EAGAIN: i32 = 11;
const EINVAL: i32 = 22;
const ENOSPC: i32 = 28;
const EDEADLK: i32 = 35;
const ENAMETOOLONG: i32 = 36;
const ENOSYS: i32 = 38;
const ECONNRESET: i32 = 104;
const ENOTCONN: i32 = 107;

/// How a dump ended for this process.
const SAVED: u32 = 1;
const RESTORED: u32 = 2;
const FAILED: u32 = 3;

/// The nonce of the dump that asks, from bit 32; then whether the gate is closed for it; then how many are in regions.
static GATE: AtomicU64 = AtomicU64::new(0);
const CLOSED: u64 = 1 << 31;
const COUNT: u64 = CLOSED - 1;

/// The nonce of the dump that the gate is closed for, and how it ended; 0 as long as that is not known.
static OUTCOME: AtomicU64 = AtomicU64::new(0);
static RESTORES: AtomicU32 = AtomicU32::new(0);
/// When the kernel made this process, and on which boot of which host; as noted when the gate was closed.
static BORN: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];

/// What was told last: a nonce and an errno.
static TOLD: [AtomicU64; 16] = [const { AtomicU64::new(0) }; 16];
static TOLD_NEXT: AtomicU32 = AtomicU32::new(0);

/// Raised with every change, to wait for one.
static BELL: AtomicU32 = AtomicU32::new(0);

/// How far the hooks are.
static HOOKS: AtomicU32 = AtomicU32::new(IDLE);
const IDLE: u32 = 0;
const WANTED: u32 = 1;
const RUNNING: u32 = 2;
/// Those before have run, and the driver was told.
const DONE: u32 = 3;

/// How many there may be.
const MOST_HOOKS: usize = 64;
static COUNT_OF_HOOKS: AtomicU32 = AtomicU32::new(0);
static HOOK: [Hook; MOST_HOOKS] = [const { Hook::NONE }; MOST_HOOKS];

struct Hook {
    /// 0 while it is made or was removed.
    there: AtomicU32,
    before: AtomicPtr<u8>,
    after: AtomicPtr<u8>,
    argument: AtomicPtr<u8>,
}

impl Hook {
    const NONE: Hook = Hook {
        there: AtomicU32::new(0),
        before: AtomicPtr::new(core::ptr::null_mut()),
        after: AtomicPtr::new(core::ptr::null_mut()),
        argument: AtomicPtr::new(core::ptr::null_mut()),
    };
}

const PAGE: usize = 4096;

#[repr(C, align(4096))]
struct Pages {
    mark: [u8; PAGE],
    own: Own,
    rest: [u8; PAGE - size_of::<Own>()],
}

/// What a child does not inherit: it has no thread for hooks.
#[repr(C)]
struct Own {
    /// 0, 1 while it is made, 2.
    state: AtomicU32,
    tid: AtomicU32,
}

static mut MARK: Pages = Pages {
    mark: [0; PAGE],
    own: Own { state: AtomicU32::new(0), tid: AtomicU32::new(0) },
    rest: [0; PAGE - size_of::<Own>()],
};

fn own() -> &'static Own {
    // SAFETY: atomics, in a page that stays readable and writable.
    unsafe { &*(&raw const MARK.own) }
}

fn has_hooks() -> bool {
    own().state.load(SeqCst) == 2 && HOOK.iter().any(|hook| hook.there.load(SeqCst) == 1)
}

fn tid() -> u32 {
    // SAFETY: no memory is passed.
    unsafe { sys!(calls::GETTID) as u32 }
}

fn in_hook() -> bool {
    own().state.load(SeqCst) == 2 && own().tid.load(SeqCst) == tid()
}

/// Says that this program wants to be asked.
unsafe extern "C" fn attach() -> i32 {
    // SAFETY: a page of ours with nothing in it.
    unsafe { sys!(calls::MPROTECT, &raw const MARK.mark, PAGE, 0) as i32 }
}

/// How many times this process, or who forked it, has come out of an image.
unsafe extern "C" fn restored() -> i32 {
    let gate = GATE.load(SeqCst);
    if gate & CLOSED != 0 {
        settle((gate >> 32) as u32);
    }
    RESTORES.load(SeqCst) as i32
}

/// Enters a region. Waits while a dump goes on.
unsafe extern "C" fn enter() -> i32 {
    loop {
        let bell = BELL.load(SeqCst);
        let gate = GATE.load(SeqCst);
        if gate & CLOSED == 0 {
            if GATE.compare_exchange(gate, gate + 1, SeqCst, SeqCst).is_ok() {
                return 0;
            }
        } else if in_hook() {
            return 0;
        } else {
            wait(bell);
            settle((gate >> 32) as u32);
        }
    }
}

/// Leaves it. Who leaves the last one lets in the dump that waits.
unsafe extern "C" fn leave() -> i32 {
    loop {
        let gate = GATE.load(SeqCst);
        if gate & COUNT == 0 {
            return if gate & CLOSED != 0 && in_hook() { 0 } else { -EINVAL };
        }
        let closes = gate & COUNT == 1 && gate >> 32 != 0;
        let next = if closes { gate >> 32 << 32 | CLOSED } else { gate - 1 };
        if GATE.compare_exchange(gate, next, SeqCst, SeqCst).is_ok() {
            if closes {
                closed((gate >> 32) as u32);
            }
            return 0;
        }
    }
}

/// The driver asks.
pub fn asked(nonce: u32) {
    loop {
        let gate = GATE.load(SeqCst);
        let before = (gate >> 32) as u32;
        if before == nonce {
            // It asks once more; or this is a child of one that was asked.
            let state = match gate & CLOSED {
                0 => IN_REGION,
                _ if own().state.load(SeqCst) == 2 && matches!(HOOKS.load(SeqCst), WANTED | RUNNING) => IN_HOOKS,
                _ => READY,
            };
            answer(nonce, state, 0);
            return;
        }
        if before != 0 {
            settle(before);
            if GATE.load(SeqCst) >> 32 == before as u64 {
                answer(nonce, BUSY, 0);
                return;
            }
            continue;
        }
        let at_once = gate & COUNT == 0;
        let next = (nonce as u64) << 32 | if at_once { CLOSED } else { gate & COUNT };
        if GATE.compare_exchange(gate, next, SeqCst, SeqCst).is_ok() {
            if at_once {
                closed(nonce);
            } else {
                answer(nonce, IN_REGION, 0);
            }
            return;
        }
    }
}

/// The driver tells how a dump, or a request, has ended.
pub fn told(nonce: u32, errno: u16) {
    let place = TOLD_NEXT.fetch_add(1, SeqCst) as usize % TOLD.len();
    TOLD[place].store((nonce as u64) << 32 | errno as u64, SeqCst);
    if GATE.load(SeqCst) >> 32 == nonce as u64 {
        finish(nonce, if errno == 0 { SAVED } else { FAILED });
    }
    ring();
}

/// Nobody is in a region, and nobody enters one.
fn closed(nonce: u32) {
    let (made, host) = born();
    BORN[0].store(made, SeqCst);
    BORN[1].store(host, SeqCst);
    if has_hooks() {
        HOOKS.store(WANTED, SeqCst);
        answer(nonce, IN_HOOKS, 0);
        ring();
    } else {
        answer(nonce, READY, 0);
    }
}

/// How a dump has ended, once.
fn finish(nonce: u32, outcome: u32) {
    if OUTCOME.compare_exchange(0, (nonce as u64) << 32 | outcome as u64, SeqCst, SeqCst).is_err() {
        return;
    }
    if outcome == RESTORED {
        RESTORES.fetch_add(1, SeqCst);
    }
    if own().state.load(SeqCst) != 2 || HOOKS.load(SeqCst) == IDLE {
        open(nonce);
    }
    ring();
}

/// Lets everybody into regions again.
fn open(nonce: u32) {
    HOOKS.store(IDLE, SeqCst);
    let outcome = OUTCOME.load(SeqCst);
    if outcome >> 32 == nonce as u64 {
        let _ = OUTCOME.compare_exchange(outcome, 0, SeqCst, SeqCst);
    }
    loop {
        let gate = GATE.load(SeqCst);
        if gate >> 32 != nonce as u64 || GATE.compare_exchange(gate, gate & COUNT, SeqCst, SeqCst).is_ok() {
            break;
        }
    }
    ring();
}

/// Looks whether the driver of a dump is gone without a word, and what that means.
fn settle(nonce: u32) {
    if nonce == 0 || is_there(CONSENT_PREFIX, nonce) {
        return;
    }
    // What it has told may wait for a thread that takes it: this one does.
    let mask = hold();
    let_go(mask);
    let gate = GATE.load(SeqCst);
    if gate >> 32 == nonce as u64 && OUTCOME.load(SeqCst) == 0 {
        let restored = gate & CLOSED != 0 && is_another_life();
        finish(nonce, if restored { RESTORED } else { FAILED });
    }
}

/// Whether this process is not the one that closed the gate, but has come out of its image.
fn is_another_life() -> bool {
    let noted = (BORN[0].load(SeqCst), BORN[1].load(SeqCst));
    let now = born();
    // Each tells by itself; where one cannot be read, there is the other.
    let was_saved = freeze::was_saved();
    was_saved || noted.0 != 0 && now.0 != 0 && noted != now
}

/// The time at which the kernel made this process, in ticks since the boot, and a sum of the boot's id.
fn born() -> (u64, u64) {
    let mut text = [0u8; 512];
    let mask = hold();
    let mut made = 0;
    let length = read_file(b"/proc/self/stat\0", &mut text);
    // Field 22; the second, in parentheses, may hold anything.
    if let Some(close) = text[..length].iter().rposition(|byte| *byte == b')') {
        made = field(&text[close..length], 20);
    }
    let mut host = 0xcbf2_9ce4_8422_2325u64;
    let length = read_file(b"/proc/sys/kernel/random/boot_id\0", &mut text);
    for byte in &text[..length] {
        host = (host ^ *byte as u64).wrapping_mul(0x100_0000_01b3);
    }
    let_go(mask);
    (made, host)
}

/// A number in a text, by how many spaces stand before it.
fn field(text: &[u8], spaces: usize) -> u64 {
    let (mut seen, mut value) = (0, 0u64);
    for byte in text {
        match byte {
            b' ' => seen += 1,
            b'0'..=b'9' if seen == spaces => value = value.wrapping_mul(10).wrapping_add((byte - b'0') as u64),
            _ => {}
        }
    }
    value
}

/// Reads a short file; gives how much there was. Nothing of ours is open when it is over.
fn read_file(path: &[u8], into: &mut [u8]) -> usize {
    const O_CLOEXEC: u64 = 0o2000000;
    // SAFETY: a C string and our buffer.
    unsafe {
        let fd = sys!(calls::OPEN, path.as_ptr(), O_CLOEXEC, 0);
        if fd < 0 {
            return 0;
        }
        let got = sys!(calls::READ, fd, into.as_mut_ptr(), into.len());
        sys!(calls::CLOSE, fd);
        if got < 0 { 0 } else { got as usize }
    }
}

/// Blocks every signal, so that no dump finds what is open for an instant.
fn hold() -> u64 {
    let (all, mut before) = (u64::MAX, 0u64);
    // SAFETY: masks of 8 bytes.
    unsafe {
        sys!(calls::RT_SIGPROCMASK, 2, &raw const all, &raw mut before, 8);
        (&raw const before).read_volatile()
    }
}

fn let_go(mask: u64) {
    // SAFETY: a mask of 8 bytes.
    unsafe { sys!(calls::RT_SIGPROCMASK, 2, &raw const mask, 0, 8) };
}

/// Sends a datagram to a name.
///
/// Should a dump come about meanwhile, it finds a socket that leads nowhere.
fn send(prefix: &[u8; 13], number: u32, message: *const u8, size: usize) -> i64 {
    const NOSIGNAL_DONTWAIT: u64 = 0x4040;
    let mut address = [0u8; 2 + SOCKET_NAME];
    address[0] = 1;
    address[2..].copy_from_slice(&socket_name_of(prefix, number));
    let mask = hold();
    // SAFETY: an address of the kernel's form, and as much of a message as the caller has.
    let result = unsafe {
        let socket = sys!(calls::SOCKET, 1, 2 | 0o2000000, 0);
        if socket < 0 {
            socket
        } else {
            let sent = sys!(calls::SENDTO, socket, message, size, NOSIGNAL_DONTWAIT, address.as_ptr(), address.len());
            sys!(calls::CLOSE, socket);
            sent
        }
    };
    let_go(mask);
    result
}

/// Whether somebody listens at a name. Where that cannot be asked, he does. He gets a datagram without a word.
fn is_there(prefix: &[u8; 13], number: u32) -> bool {
    const ECONNREFUSED: i64 = 111;
    send(prefix, number, [].as_ptr(), 0) != -ECONNREFUSED
}

/// Tells the driver. Should that fail, it will ask again.
fn answer(nonce: u32, state: u32, code: i32) {
    let answer = Answer { magic: INTERFACE_MAGIC, nonce, state, code, _reserved: 0 };
    send(CONSENT_PREFIX, nonce, (&raw const answer).cast(), size_of::<Answer>());
}

fn ring() {
    BELL.fetch_add(1, SeqCst);
    // SAFETY: a static.
    unsafe { sys!(calls::FUTEX, BELL.as_ptr(), 1, i32::MAX) };
}

/// Waits for a change after `seen`, a little while.
fn wait(seen: u32) {
    let pause = [0u64, 20_000_000];
    // SAFETY: a static and a timespec.
    unsafe { wait_on(BELL.as_ptr(), 0, seen, pause.as_ptr()) };
}

/// `futex`: a call whose number a freeze finds in the code before it.
#[unsafe(naked)]
unsafe extern "C" fn wait_on(word: *mut u32, operation: u64, value: u32, timeout: *const u64) -> i64 {
    naked_asm!("mov r10, rcx", "mov eax, {futex}", "syscall", "ret", futex = const calls::FUTEX)
}

/// Has whoever is responsible for this tree save it, into an image of this name or one of his own, and waits for it. 0 if it
/// was saved, 1 in a process that has come out of the image.
unsafe extern "C" fn now(image: *const u8) -> i32 {
    if in_hook() {
        return -EDEADLK;
    }
    let mut request = Request { magic: INTERFACE_MAGIC, nonce: 0, length: 0, image: [0; MOST_IMAGE] };
    // SAFETY: a C string, or null; our own memory.
    unsafe {
        let length = if image.is_null() { 0 } else { calls::length(image) };
        if length >= MOST_IMAGE {
            return -ENAMETOOLONG;
        }
        if !image.is_null() && length == 0 {
            return -EINVAL;
        }
        request.image[..length].copy_from_slice(core::slice::from_raw_parts(image, length));
        request.length = length as u32;
        if sys!(calls::GETRANDOM, &raw mut request.nonce, 4, 0) != 4 {
            return -EAGAIN;
        }
    }
    // What is open while it is looked for is not to be saved.
    // SAFETY: our own functions.
    let (lives, manager) = unsafe {
        enter();
        let lives = RESTORES.load(SeqCst);
        let manager = send_to_manager(&request);
        leave();
        (lives, manager)
    };
    let Some(manager) = manager else { return -ENOTCONN };
    loop {
        let bell = BELL.load(SeqCst);
        let gate = GATE.load(SeqCst);
        if gate & CLOSED == 0 {
            if RESTORES.load(SeqCst) != lives {
                return 1;
            }
            if let Some(errno) = answer_to(request.nonce) {
                return -errno;
            }
        }
        wait(bell);
        if gate & CLOSED != 0 {
            settle((gate >> 32) as u32);
        } else if !is_there(MANAGER_PREFIX, manager) {
            let mask = hold();
            let_go(mask);
            let nothing_new = RESTORES.load(SeqCst) == lives && answer_to(request.nonce).is_none();
            if nothing_new && GATE.load(SeqCst) & CLOSED == 0 {
                return -ECONNRESET;
            }
        }
    }
}

fn answer_to(nonce: u32) -> Option<i32> {
    let found = TOLD.iter().map(|told| told.load(SeqCst)).find(|told| told >> 32 == nonce as u64);
    found.map(|told| told as u16 as i32)
}

/// Finds the ckpt that is an ancestor of this process, and sends it a request.
fn send_to_manager(request: &Request) -> Option<u32> {
    const MOST: usize = 64;
    // SAFETY: no memory is passed.
    let mut pid = unsafe { sys!(calls::GETPID) as u64 };
    let mut generations = 0;
    while generations < MOST {
        generations += 1;
        pid = parent(pid)?;
        loop {
            let size = core::mem::offset_of!(Request, image) + request.length as usize;
            let sent = send(MANAGER_PREFIX, pid as u32, (request as *const Request).cast(), size);
            if sent > 0 {
                return Some(pid as u32);
            }
            if sent != -(EAGAIN as i64) {
                break;
            }
            // Many have asked it.
            wait(BELL.load(SeqCst));
        }
    }
    None
}

fn parent(pid: u64) -> Option<u64> {
    let mut path = [0u8; 40];
    let at = calls::append(&mut path, 0, b"/proc/");
    let at = calls::append_number(&mut path, at, pid);
    calls::append(&mut path, at, b"/stat");
    let mut text = [0u8; 512];
    let mask = hold();
    let length = read_file(&path, &mut text);
    let_go(mask);
    let close = text[..length].iter().rposition(|byte| *byte == b')')?;
    Some(field(&text[close..length], 2)).filter(|parent| *parent > 0)
}

type Before = unsafe extern "C" fn(*mut u8) -> i32;
type After = unsafe extern "C" fn(i32, *mut u8);

/// Adds a pair of hooks, behind those there are.
unsafe extern "C" fn add(before: *mut u8, after: *mut u8, argument: *mut u8) -> i32 {
    if before.is_null() && after.is_null() {
        return -EINVAL;
    }
    // SAFETY: called by the program outside of signal handlers, as the header says.
    let started = unsafe { start_thread() };
    if started < 0 {
        return started;
    }
    let place = COUNT_OF_HOOKS.fetch_add(1, SeqCst) as usize;
    let Some(hook) = HOOK.get(place) else {
        COUNT_OF_HOOKS.fetch_sub(1, SeqCst);
        return -ENOSPC;
    };
    hook.before.store(before, SeqCst);
    hook.after.store(after, SeqCst);
    hook.argument.store(argument, SeqCst);
    hook.there.store(1, SeqCst);
    0
}

/// Removes a pair of hooks. When it comes back, neither runs any more.
unsafe extern "C" fn remove(before: *mut u8, after: *mut u8, argument: *mut u8) -> i32 {
    let is_it = |hook: &&Hook| {
        hook.there.load(SeqCst) == 1
            && hook.before.load(SeqCst) == before
            && hook.after.load(SeqCst) == after
            && hook.argument.load(SeqCst) == argument
    };
    let Some(hook) = HOOK.iter().find(is_it) else { return -EINVAL };
    hook.there.store(0, SeqCst);
    loop {
        let bell = BELL.load(SeqCst);
        if HOOKS.load(SeqCst) == IDLE || own().state.load(SeqCst) != 2 || in_hook() {
            return 0;
        }
        wait(bell);
    }
}

/// Has the C library make the thread for hooks, if there is none.
unsafe fn start_thread() -> i32 {
    const MADV_WIPEONFORK: u64 = 18;
    type Create = unsafe extern "C" fn(*mut u64, *const u8, unsafe extern "C" fn(*mut u8) -> *mut u8, *mut u8) -> i32;
    // All but what the C library itself needs (SIGSETXID), the shim's, and what a fault of a hook raises.
    const LET_IN: u64 = 1 << (SIGNAL - 1) | 1 << 32 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 10;
    // SAFETY: a page of ours; the C library's own function, with our mask around it.
    unsafe {
        if sys!(calls::MADVISE, &raw const MARK.own, PAGE, MADV_WIPEONFORK) != 0 {
            return -ENOSYS;
        }
        loop {
            match own().state.compare_exchange(0, 1, SeqCst, SeqCst) {
                Ok(_) => break,
                Err(2) => return 0,
                Err(_) => wait(BELL.load(SeqCst)),
            }
        }
        let create = start::next(b"pthread_create\0");
        let mut made = ENOSYS;
        if !create.is_null() {
            // A child has none of its parent's, and no part in a dump that they were running for.
            for hook in &HOOK {
                hook.there.store(0, SeqCst);
            }
            COUNT_OF_HOOKS.store(0, SeqCst);
            HOOKS.store(IDLE, SeqCst);
            let create: Create = core::mem::transmute(create);
            let (blocked, mut before, mut thread) = (!LET_IN, 0u64, 0u64);
            sys!(calls::RT_SIGPROCMASK, 0, &raw const blocked, &raw mut before, 8);
            made = create(&raw mut thread, core::ptr::null(), serve, core::ptr::null_mut());
            let_go((&raw const before).read_volatile());
        }
        own().state.store(if made == 0 { 2 } else { 0 }, SeqCst);
        ring();
        -made
    }
}

/// The thread of the hooks.
unsafe extern "C" fn serve(_: *mut u8) -> *mut u8 {
    const PR_SET_NAME: u64 = 15;
    // SAFETY: a C string.
    unsafe { sys!(calls::PRCTL, PR_SET_NAME, b"ckpt-hooks\0".as_ptr()) };
    loop {
        own().tid.store(tid(), SeqCst);
        let bell = BELL.load(SeqCst);
        let gate = GATE.load(SeqCst);
        if HOOKS.load(SeqCst) != WANTED {
            // SAFETY: a static. Without a timeout: nothing is to be done until somebody rings.
            unsafe { wait_on(BELL.as_ptr(), 0, bell, core::ptr::null()) };
        } else if gate & CLOSED == 0 || HOOKS.compare_exchange(WANTED, RUNNING, SeqCst, SeqCst).is_err() {
            // It was given up before it began.
            let _ = HOOKS.compare_exchange(WANTED, IDLE, SeqCst, SeqCst);
        } else {
            // SAFETY: the program's own functions.
            unsafe { run_hooks((gate >> 32) as u32) };
        }
    }
}

/// The hooks of one dump: `before` from the last one to the first, `after` from the first one to the last.
unsafe fn run_hooks(nonce: u32) {
    let count = (COUNT_OF_HOOKS.load(SeqCst) as usize).min(MOST_HOOKS);
    let hooks = &HOOK[..count];
    let mut refusal = 0;
    // Those from here on have run.
    let mut first = count;
    while first > 0 && refusal == 0 {
        first -= 1;
        let hook = &hooks[first];
        let before = hook.before.load(SeqCst);
        if hook.there.load(SeqCst) == 1 && !before.is_null() {
            // SAFETY: as the program gave it.
            refusal = unsafe { core::mem::transmute::<*mut u8, Before>(before)(hook.argument.load(SeqCst)) };
        }
    }
    if refusal != 0 {
        // Its own `before` has done nothing that would have to be undone.
        first += 1;
        answer(nonce, REFUSES, refusal);
    } else {
        HOOKS.store(DONE, SeqCst);
        answer(nonce, READY, 0);
    }
    let outcome = loop {
        // In a restored process the thread may have another id.
        own().tid.store(tid(), SeqCst);
        let bell = BELL.load(SeqCst);
        let outcome = OUTCOME.load(SeqCst);
        if outcome >> 32 == nonce as u64 {
            break outcome as u32;
        }
        if GATE.load(SeqCst) >> 32 != nonce as u64 {
            break FAILED;
        }
        wait(bell);
        settle(nonce);
    };
    let outcome = match outcome {
        SAVED => 0,
        RESTORED => 1,
        _ => -1,
    };
    for hook in &hooks[first.min(count)..] {
        let after = hook.after.load(SeqCst);
        if hook.there.load(SeqCst) == 1 && !after.is_null() {
            // SAFETY: as the program gave it.
            unsafe { core::mem::transmute::<*mut u8, After>(after)(outcome, hook.argument.load(SeqCst)) };
        }
    }
    open(nonce);
}
