//! The handler of the shim's signal: a thread that takes it goes into the agent, and comes back as if never touched.
//!
//! A thread that comes back leaves by a frame on its own stack into code of the shim, which no driver can take away, and
//! from there by the frame that the kernel made for the signal. The thread that mapped the region unmaps it, when all
//! others are out ([`USERS`]).
//!
//! The kernel puts its frame on the alternate stack, where there is one, or below what the thread has on its stack, as with
//! any other signal. There it is certain of room for its frame, and of nothing more: an alternate stack of the size that the
//! kernel asks for (AT_MINSIGSTKSZ) is full with it. So the handler touches neither: its first step takes a stack of its own
//! from the kernel ([`handle`]), which it gives back at the end. What takes an alternate stack that is too small even for the
//! frame is met in `altstack.rs`.

use core::arch::{asm, naked_asm};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::agent::{CODE_SIZE, CONTROL_SIZE, COPY_LANE_SIZE, FRAME_SIZE, Lane, MAIN_LANE_SIZE, THREAD_LANE_SIZE};
use crate::calls::{self, sys};
use crate::protocol::{
    ASK_TAG, Arrival, HANDLER_STACK, Hello, Lent, MAGIC, MOST_XSAVE, NO_CALL, Ready, SECOND_SIGNAL, SIGNAL, SOCKET_NAME, TELL_TAG,
    UNKNOWN_CALL, VALUE_TAG, Welcome, XSAVE_AT, nonce_of_process, socket_name,
};
use crate::{ids, interface};
use crate::by_number;
use crate::start::{self, HAS_RSEQ, RSEQ_OFFSET};

/// The freeze that is going on: its nonce and one of the states below, or 0. In a restored process it tells of the
/// freeze that it was saved in, which is over: then the region is not there.
static SESSION: AtomicU64 = AtomicU64::new(0);
/// What the low half of [`SESSION`] says.
const OPENING: u64 = 1;
const OPEN: u64 = 2;
const CLOSING: u64 = 3;
/// Threads that may touch the region.
static USERS: AtomicU32 = AtomicU32::new(0);
/// Raised with each change of the session, to wait for one.
static CHANGES: AtomicU32 = AtomicU32::new(0);
static BASE: AtomicU64 = AtomicU64::new(0);
static SIZE: AtomicU64 = AtomicU64::new(0);

/// The action that the signal would have without us, word by word: glibc's, in a program that cancels threads.
static OTHERS: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];

/// The second signal, while a driver has it: see [`SECOND_SIGNAL`].
static LENT: [AtomicU64; size_of::<Lent>() / 8] = [const { AtomicU64::new(0) }; size_of::<Lent>() / 8];

/// `struct sigaction` of the kernel.
#[repr(C)]
pub struct Action {
    handler: u64,
    flags: u64,
    restorer: u64,
    mask: u64,
}

const SA_SIGINFO: u64 = 4;
const SA_ONSTACK: u64 = 0x0800_0000;
const SA_RESTART: u64 = 0x1000_0000;
const SA_RESTORER: u64 = 0x0400_0000;

/// What the program believes that the signal does: it never gets away from us, and what is not ours goes there.
pub fn others() -> Action {
    let [handler, flags, restorer, mask] = &OTHERS;
    let word = |word: &AtomicU64| word.load(Ordering::Relaxed);
    Action { handler: word(handler), flags: word(flags), restorer: word(restorer), mask: word(mask) }
}

pub fn set_others(action: &Action) {
    let words = [action.handler, action.flags, action.restorer, action.mask];
    for (place, word) in OTHERS.iter().zip(words) {
        place.store(word, Ordering::Relaxed);
    }
}

#[unsafe(naked)]
unsafe extern "C" fn restorer() {
    naked_asm!("mov eax, 15", "syscall", "ud2")
}

/// Installs the handler, over whatever the signal had.
///
/// # Safety
/// None: what was there is still called for signals that are not ours.
pub unsafe fn take_signal() {
    let ours = Action {
        handler: handle as *const () as u64,
        flags: SA_SIGINFO | SA_ONSTACK | SA_RESTART | SA_RESTORER,
        restorer: restorer as *const () as u64,
        mask: u64::MAX,
    };
    let mut before = Action { handler: 0, flags: 0, restorer: 0, mask: 0 };
    // SAFETY: two structures of the kernel's form.
    unsafe {
        sys!(calls::RT_SIGACTION, SIGNAL, &raw const ours, &raw mut before, 8);
        for (place, word) in LENT.iter().zip([ours.handler, ours.flags, ours.restorer, ours.mask]) {
            place.store(word, Ordering::Relaxed);
        }
        if before.handler != ours.handler && before.handler > 1 {
            set_others(&before);
        }
        // Whoever started us may have blocked it.
        let only = 1u64 << (SIGNAL - 1);
        sys!(calls::RT_SIGPROCMASK, 1, &raw const only, 0, 8);
    }
}

/// The word of [`LENT`] where [`Lent::before`] begins.
const BEFORE: usize = core::mem::offset_of!(Lent, before) / 8;

/// Gives the second signal back, should a driver have gone away with it.
unsafe fn return_second_signal() {
    let mut now = Action { handler: 0, flags: 0, restorer: 0, mask: 0 };
    // SAFETY: structures of the kernel's form.
    unsafe {
        sys!(calls::RT_SIGACTION, SECOND_SIGNAL, 0, &raw mut now, 8);
        if now.handler == handle as *const () as u64 {
            sys!(calls::RT_SIGACTION, SECOND_SIGNAL, LENT[BEFORE].as_ptr(), 0, 8);
        }
    }
}

type Handler = unsafe extern "C" fn(i32, *mut i32, *mut u64);

/// The handler: of a signal that is ours, on a stack of its own; of another, the program's handler on the stack that it has.
///
/// Up to there it uses no stack at all. The stack is shared memory, so that it never becomes one mapping with another that
/// the program has beside it. Without memory for it, the thread goes on as if no signal had come, and the driver says that
/// it does not answer.
#[unsafe(naked)]
unsafe extern "C" fn handle(signal: i32, info: *mut i32, context: *mut u64) {
    naked_asm!(
        // siginfo: the code at 8, the sender at 16, the value at 24. SI_QUEUE with one of our marks is ours,
        "cmp dword ptr [rsi + 8], -1",
        "jne 2f",
        "mov rax, [rsi + 24]",
        "shr rax, 48",
        "sub eax, {tag}",
        "cmp eax, {last_tag}",
        "jbe 3f",
        "jmp {pass_on}",
        // and SI_USER from nobody: the kernel had no room for what came with the signal.
        "2:",
        "cmp dword ptr [rsi + 8], 0",
        "jne {pass_on}",
        "cmp dword ptr [rsi + 16], 0",
        "jne {pass_on}",
        // All registers are in the frame.
        "3:",
        "mov rbp, rsp",
        "mov r12, rsi",
        "mov r13, rdx",
        "xor edi, edi",
        "mov esi, {size}",
        "mov edx, 3", // PROT_READ | PROT_WRITE
        "mov r10d, 0x21", // MAP_SHARED | MAP_ANONYMOUS
        "mov r8, -1",
        "xor r9d, r9d",
        "mov eax, {mmap}",
        "syscall",
        "cmp rax, -4095",
        "jae 4f",
        "mov rbx, rax",
        "lea rsp, [rax + {size}]",
        "mov rdi, r12",
        "mov rsi, r13",
        "mov rdx, rbx",
        "call {answer}",
        "mov rsp, rbp",
        "mov rdi, rbx",
        "mov esi, {size}",
        "mov eax, {munmap}",
        "syscall",
        "4:",
        "ret",
        tag = const VALUE_TAG,
        last_tag = const TELL_TAG - VALUE_TAG,
        size = const HANDLER_STACK,
        mmap = const calls::MMAP,
        munmap = const calls::MUNMAP,
        pass_on = sym pass_on,
        answer = sym answer,
    )
}

/// A signal that is not ours goes to who had it before.
unsafe extern "C" fn pass_on(signal: i32, info: *mut i32, context: *mut u64) {
    let generation = ids::generation();
    let others = if signal == SECOND_SIGNAL { LENT[BEFORE].load(Ordering::Relaxed) } else { others().handler };
    if others > 1 {
        // SAFETY: what was installed as a handler of this kind.
        unsafe {
            if others != ids::trampoline as *const () as u64 {
                ids::translate_signal(info, generation);
            }
            let handler: Handler = core::mem::transmute(others);
            handler(signal, info, context);
        }
    }
}

/// A signal of ours. Returns if nothing came of it.
unsafe extern "C" fn answer(info: *const i32, context: *mut u64, stack: u64) {
    const SI_QUEUE: i32 = -1;
    /// Words of a `ucontext`: `stack_t`, its flags in the second.
    const ALTERNATE: usize = 2;
    const SS_AUTODISARM: u64 = 1 << 31;
    // SAFETY: the kernel passes a siginfo (the code at 8, the value at 24) and a ucontext.
    unsafe {
        // The kernel has taken it away for as long as the handler runs: put back, whoever looks at this thread sees it.
        if *context.add(ALTERNATE + 1) & SS_AUTODISARM != 0 {
            sys!(calls::SIGALTSTACK, context.add(ALTERNATE), 0);
        }
        if *info.add(2) == SI_QUEUE {
            let value = *info.add(6).cast::<u64>();
            match value >> 48 {
                ASK_TAG => interface::asked(value as u32),
                TELL_TAG => interface::told(value as u32, (value >> 32) as u16),
                _ => freeze((value >> 32) as u16 as u64, value as u32, context, stack),
            }
        } else {
            freeze(0, nonce_of_process(sys!(calls::GETPID, 0) as i32), context, stack);
        }
        // The driver went away before the thread had come: it has seen nothing of that either.
        go_on(context, interrupted_call(context));
    }
}

fn set_session(session: u64) {
    SESSION.store(session, Ordering::SeqCst);
    changed();
}

fn changed() {
    CHANGES.fetch_add(1, Ordering::SeqCst);
    // SAFETY: a static.
    unsafe { sys!(calls::FUTEX, CHANGES.as_ptr(), 1, i32::MAX) };
}

/// Waits for a change after `seen`, a little while.
fn wait_for_change(seen: u32) {
    let pause = [0u64, 10_000_000];
    // SAFETY: a static and a timespec.
    unsafe { sys!(calls::FUTEX, CHANGES.as_ptr(), 0, seen, pause.as_ptr()) };
}

/// What a thread needs on its way out. It lies on the handler's stack.
#[repr(C)]
struct Leave {
    context: *mut u64,
    /// The handler's stack.
    stack: u64,
    /// Its lane; the main lane for the host.
    lane: *mut Lane,
    arrival: *const Arrival,
    host: bool,
}

/// Takes part in a freeze, or finds that there is none.
unsafe fn freeze(index: u64, nonce: u32, context: *mut u64, stack: u64) {
    let session = (nonce as u64) << 32;
    // SAFETY: the context that the kernel made.
    unsafe { ids::settle(context) };
    loop {
        let seen = CHANGES.load(Ordering::SeqCst);
        let now = SESSION.load(Ordering::SeqCst);
        if now == 0 {
            if SESSION.compare_exchange(0, session | OPENING, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                // SAFETY: as for this function.
                unsafe { host(index, nonce, context, stack) };
                // It did not get in: there is no driver.
                set_session(0);
                return;
            }
        } else if now == session | OPEN {
            USERS.fetch_add(1, Ordering::SeqCst);
            if SESSION.load(Ordering::SeqCst) == now {
                // SAFETY: the region stays as long as we are counted.
                unsafe { guest(index, context, stack) };
            }
            USERS.fetch_sub(1, Ordering::SeqCst);
        } else if now >> 32 == nonce as u64 || is_mapped(BASE.load(Ordering::SeqCst)) {
            if now as u32 as u64 == OPEN {
                // Another driver has this process.
                return;
            }
            wait_for_change(seen);
        } else {
            // The one that this process was saved in.
            let _ = SESSION.compare_exchange(now, 0, Ordering::SeqCst, Ordering::SeqCst);
        }
    }
}

/// Whether this process has come out of an image that was made through [`freeze`] and was not noticed yet. Notices it.
pub fn was_saved() -> bool {
    let now = SESSION.load(Ordering::SeqCst);
    // Open, but with no region. Whoever closes one says so before the region goes.
    now as u32 as u64 == OPEN
        && !is_mapped(BASE.load(Ordering::SeqCst))
        && SESSION.compare_exchange(now, 0, Ordering::SeqCst, Ordering::SeqCst).is_ok()
}

fn is_mapped(page: u64) -> bool {
    let mut resident = 0u8;
    // SAFETY: asks about one page.
    page != 0 && unsafe { sys!(calls::MINCORE, page, 4096, &raw mut resident) } != -calls::ENOMEM
}

const F_DUPFD_CLOEXEC: u64 = 1030;
/// For our socket, where the limit of descriptors allows it.
const LOWEST_FD: u64 = 900;

/// Connects to the driver, maps the region, and enters the main lane. Returns only if that did not come about.
unsafe fn host(index: u64, nonce: u32, context: *mut u64, stack: u64) {
    const AF_UNIX_SEQPACKET: (u64, u64) = (1, 5 | 0o2000000);
    BASE.store(0, Ordering::SeqCst);
    USERS.store(1, Ordering::SeqCst);
    // SAFETY: structures of the kernel's form on our stack; the region is what the driver sent.
    unsafe {
        let socket = sys!(calls::SOCKET, AF_UNIX_SEQPACKET.0, AF_UNIX_SEQPACKET.1, 0);
        if socket < 0 {
            return;
        }
        // Away from the low numbers: to epoll, one that the program has closed may still mean something.
        let high = sys!(calls::FCNTL, socket, F_DUPFD_CLOEXEC, LOWEST_FD);
        let socket = if high < 0 {
            socket as i32
        } else {
            sys!(calls::CLOSE, socket);
            high as i32
        };
        let mut memfd = -1;
        if connect(socket, nonce) {
            let hello = Hello {
                magic: MAGIC,
                pid: sys!(calls::GETPID, 0) as i32,
                tid: sys!(calls::GETTID, 0) as i32,
                index: index as u32,
                has_rseq: HAS_RSEQ.load(Ordering::Relaxed),
                rseq_offset: RSEQ_OFFSET.load(Ordering::Relaxed),
                ids: (&raw const ids::HEADER) as u64,
                generation: ids::generation(),
                lent: LENT.as_ptr() as u64,
            };
            let mut welcome = Welcome { size: 0 };
            if send(socket, &raw const hello) && receive(socket, &raw mut welcome, &mut memfd) && memfd >= 0 {
                if let Some(base) = map(memfd, welcome.size) {
                    sys!(calls::CLOSE, memfd);
                    memfd = -1;
                    BASE.store(base, Ordering::SeqCst);
                    SIZE.store(welcome.size, Ordering::SeqCst);
                    let lane = (base + (CODE_SIZE + CONTROL_SIZE) as u64) as *mut Lane;
                    let arrival = lane.cast::<u8>().add(MAIN_LANE_SIZE - FRAME_SIZE).cast::<Arrival>();
                    arrive(arrival, context, stack);
                    let leave = Leave { context, stack, lane, arrival, host: true };
                    let mut way_out = WayOut::EMPTY;
                    let frame = way_out.build(&raw const leave);
                    let ready = Ready { base, frame, socket, _reserved: 0 };
                    let mut go = 0u8;
                    let mut none = -1;
                    if send(socket, &raw const ready) && receive(socket, &raw mut go, &mut none) {
                        set_session((nonce as u64) << 32 | OPEN);
                        enter_keeping(base, lane as u64, MAIN_LANE_SIZE, &raw const leave, &raw const way_out);
                    }
                    BASE.store(0, Ordering::SeqCst);
                    sys!(calls::MUNMAP, base, welcome.size);
                }
            }
        }
        if memfd >= 0 {
            sys!(calls::CLOSE, memfd);
        }
        sys!(calls::CLOSE, socket);
    }
}

/// Enters the lane of this thread. Returns if the region was laid out without one.
unsafe fn guest(index: u64, context: *mut u64, stack: u64) {
    let base = BASE.load(Ordering::SeqCst);
    let at = (CODE_SIZE + CONTROL_SIZE + MAIN_LANE_SIZE) as u64 + index * THREAD_LANE_SIZE as u64;
    if at + (THREAD_LANE_SIZE + COPY_LANE_SIZE) as u64 > SIZE.load(Ordering::SeqCst) {
        return;
    }
    // SAFETY: inside the region, as just checked; the lane is this thread's alone.
    unsafe {
        let lane = (base + at) as *mut Lane;
        let arrival = lane.cast::<u8>().add(THREAD_LANE_SIZE - FRAME_SIZE).cast::<Arrival>();
        arrive(arrival, context, stack);
        let leave = Leave { context, stack, lane, arrival, host: false };
        let mut way_out = WayOut::EMPTY;
        let frame = way_out.build(&raw const leave);
        (&raw mut (*lane).frame).write_volatile(frame);
        (&raw mut (*lane).plain_frame).write_volatile(frame);
        (&raw mut (*lane).left).write_volatile(0);
        let arrived = &*(&raw const (*lane).arrived).cast::<AtomicU32>();
        arrived.store(1, Ordering::SeqCst);
        sys!(calls::FUTEX, arrived.as_ptr(), 1, i32::MAX);
        enter_keeping(base, lane as u64, THREAD_LANE_SIZE, &raw const leave, &raw const way_out);
    }
}

/// Enters the agent from a handler: what the way out needs stays on this stack, which nobody else uses.
unsafe fn enter_keeping(base: u64, lane: u64, size: usize, leave: *const Leave, way_out: *const WayOut) -> ! {
    // SAFETY: the pointers are used, as far as the compiler knows.
    unsafe {
        asm!("/* {0} {1} */", in(reg) leave, in(reg) way_out);
        enter(base, lane, size)
    }
}

/// Enters the agent with a lane, on the lane's own stack.
///
/// # Safety
/// The region is mapped at `base`, and the driver has laid out the lane, which has this size.
pub unsafe fn enter(base: u64, lane: u64, size: usize) -> ! {
    // As `Channel` has it: the stack ends where the frame begins at the latest.
    let stack = lane + (size - FRAME_SIZE) as u64 - 64;
    // SAFETY: the agent's code is at the beginning of the region, and never returns.
    unsafe {
        asm!("mov rsp, {stack}", "jmp {base}", stack = in(reg) stack, base = in(reg) base, in("rdi") lane,
            in("rsi") 0u64, options(noreturn))
    }
}

/// Notes where a thread was.
unsafe fn arrive(arrival: *mut Arrival, context: *const u64, stack: u64) {
    const ARCH_GET_FS: u64 = 0x1003;
    const ARCH_GET_GS: u64 = 0x1004;
    // SAFETY: a ucontext of the kernel, whose word 28 leads to its xsave area (asm/sigcontext.h).
    unsafe {
        let mut n = 0;
        while n < 38 {
            (*arrival).context[n] = *context.add(n);
            n += 1;
        }
        sys!(calls::ARCH_PRCTL, ARCH_GET_FS, &raw mut (*arrival).fs_base);
        sys!(calls::ARCH_PRCTL, ARCH_GET_GS, &raw mut (*arrival).gs_base);
        (*arrival).interrupted = interrupted_call(context);
        (*arrival).stack = stack;
        (*arrival).tid = sys!(calls::GETTID, 0) as i32;
        let area = *context.add(28) as *const u8;
        // sw_reserved: magic1, extended size, features, xstate size
        let size = if area.is_null() { 0 } else { *area.add(464 + 16).cast::<u32>() as usize };
        let size = if size > MOST_XSAVE { MOST_XSAVE } else { size };
        (*arrival).xsave_size = size as u64;
        let to = arrival.cast::<u8>().add(XSAVE_AT);
        asm!("rep movsb", inout("rcx") size => _, inout("rsi") area => _, inout("rdi") to => _,
            options(nostack, preserves_flags));
    }
}

/// Words of a `ucontext`.
const RSI: usize = 14;
const RDI: usize = 13;
const RDX: usize = 17;
const R10: usize = 7;
const RAX: usize = 18;
const RCX: usize = 19;
const RSP: usize = 20;
const RIP: usize = 21;
const MASK: usize = 37;

/// Calls that answer EINTR when a handler has run, whatever SA_RESTART says (signal(7)).
const GIVE_EINTR: [u16; 31] = [
    0, 1, 7, 19, 20, 23, 34, 35, 42, 43, 44, 45, 46, 47, 65, 69, 70, 128, 130, 202, 208, 220, 230, 232, 270, 271, 281,
    288, 299, 307, 441,
];

fn gives_eintr(number: u32) -> bool {
    let mut n = 0;
    while n < GIVE_EINTR.len() {
        if GIVE_EINTR[n] as u32 == number {
            return true;
        }
        n += 1;
    }
    false
}

/// The number of the call that gave EINTR because of our signal.
///
/// The kernel does not keep it in the frame. That it was a call can be told: `syscall` leaves the address after it in
/// `rcx`. Its number is in the code before it, where it was loaded.
unsafe fn interrupted_call(context: *const u64) -> i64 {
    // SAFETY: the instruction before `rip` was just run; the scan stays in its page.
    unsafe {
        let rip = *context.add(RIP);
        if *context.add(RAX) as i64 != -calls::EINTR || *context.add(RCX) != rip {
            return NO_CALL;
        }
        if let Some(number) = ids::number_of(context) {
            return if GIVE_EINTR.contains(&(number as u16)) { number as i64 } else { UNKNOWN_CALL };
        }
        if let Some(number) = by_number::number_at(rip, *context.add(RSP)) {
            return if gives_eintr(number as u32) { number as i64 } else { NO_CALL };
        }
        let code = rip - 2;
        if *(code as *const u8) != 0x0f || *((code + 1) as *const u8) != 0x05 {
            return NO_CALL;
        }
        if let Some(number) = number_in_register(code, context) {
            return number as i64;
        }
        let low = if code & 4095 < 32 { code & !4095 } else { code - 32 };
        let mut at = code.wrapping_sub(5);
        while at >= low && at < code {
            // mov $N, %eax
            if *(at as *const u8) == 0xb8 {
                let number = (at as *const u8).add(1).cast::<u32>().read_unaligned();
                if gives_eintr(number) {
                    return number as i64;
                }
            }
            at -= 1;
        }
        // xor %eax, %eax: read
        if *((code - 2) as *const u8) == 0x31 && *((code - 1) as *const u8) == 0xc0 {
            return 0;
        }
        UNKNOWN_CALL
    }
}

/// The number of a call that gives EINTR, where the instruction before it has loaded it from a register that the call leaves
/// as it was.
///
/// # Safety
/// The context of a thread that has just run the `syscall` at `code`.
unsafe fn number_in_register(code: u64, context: *const u64) -> Option<u64> {
    /// Where a ucontext has the registers that an instruction numbers from 0 on; none for rax, rcx and r11.
    const PLACES: [usize; 16] = [0, 0, RDX, 16, RSP, 15, RSI, RDI, 5, 6, R10, 0, 9, 10, 11, 12];
    if code & 4095 < 3 {
        return None;
    }
    // SAFETY: both bytes are in the page of the call; the context has all registers.
    unsafe {
        // mov %REG, %eax (89 /r), with a prefix for r8 to r15 or 64 bits.
        let form = *((code - 1) as *const u8);
        if *((code - 2) as *const u8) != 0x89 || form & 0xc7 != 0xc0 {
            return None;
        }
        // What looks like a prefix may be the end of another instruction.
        let prefix = *((code - 3) as *const u8);
        let high = prefix & 0xf0 == 0x40 && prefix & 4 != 0;
        let mut register = (form >> 3 & 7) as usize + if high { 8 } else { 0 };
        loop {
            let number = *context.add(PLACES[register]) as u32;
            if PLACES[register] != 0 && gives_eintr(number) {
                return Some(number as u64);
            }
            if register < 8 {
                return None;
            }
            register -= 8;
        }
    }
}

/// A signal frame without vector state, and a stack to leave by.
#[repr(C, align(16))]
struct WayOut {
    stack: [u64; 128],
    frame: [u64; 40],
}

impl WayOut {
    const EMPTY: WayOut = WayOut { stack: [0; 128], frame: [0; 40] };

    /// The frame that leads to [`leave`].
    fn build(&mut self, to: *const Leave) -> u64 {
        let mut segments = 0u64;
        // SAFETY: reads two registers.
        unsafe { asm!("mov {0:e}, cs", "mov {1:e}, ss", "shl {1}, 48", "or {0}, {1}", out(reg) segments, out(reg) _) };
        // As `frame::build_plain` of the driver has it.
        self.frame[0] = 2 | 4;
        self.frame[3] = 0x4000_0000;
        self.frame[RDI] = to as u64;
        self.frame[20] = (&raw const self.stack) as u64 + (size_of::<[u64; 128]>() as u64) - 8;
        self.frame[RIP] = leave as *const () as u64;
        self.frame[22] = 0x202;
        self.frame[23] = segments;
        self.frame[MASK] = u64::MAX;
        (&raw const self.frame) as u64
    }
}

/// Out of the agent: the region goes with the last thread, and each goes back to where its signal came.
unsafe extern "C" fn leave(leave: *const Leave) -> ! {
    // SAFETY: the thread is still counted in USERS, so the region is there until it says otherwise.
    unsafe {
        let Leave { context, stack, lane, arrival, host } = leave.read();
        let interrupted = (&raw const (*arrival).interrupted).read_volatile();
        go_on(context, interrupted);
        if host {
            let session = SESSION.load(Ordering::SeqCst);
            set_session(session & !0xffff_ffff | CLOSING);
            USERS.fetch_sub(1, Ordering::SeqCst);
            loop {
                let seen = CHANGES.load(Ordering::SeqCst);
                if USERS.load(Ordering::SeqCst) == 0 {
                    break;
                }
                wait_for_change(seen);
            }
            return_second_signal();
            let base = BASE.swap(0, Ordering::SeqCst);
            sys!(calls::MUNMAP, base, SIZE.load(Ordering::SeqCst));
            set_session(0);
        } else {
            (&raw mut (*lane).left).write_volatile(1);
            USERS.fetch_sub(1, Ordering::SeqCst);
            changed();
        }
        // From here on without a stack.
        asm!("syscall", "mov rsp, r12", "mov eax, 15", "syscall", "ud2", in("rax") calls::MUNMAP, in("rdi") stack,
            in("rsi") HANDLER_STACK, in("r12") context, options(noreturn))
    }
}

/// Whether a handler of the program will run on the way back: then EINTR is the truth.
unsafe fn is_signalled(context: *const u64) -> bool {
    let mut pending = 0u64;
    // SAFETY: structures of the kernel's form.
    unsafe {
        sys!(calls::RT_SIGPENDING, &raw mut pending, 8);
        let mut left = pending & !*context.add(MASK);
        while left != 0 {
            let signal = left.trailing_zeros() + 1;
            left &= left - 1;
            let mut action = Action { handler: 0, flags: 0, restorer: 0, mask: 0 };
            sys!(calls::RT_SIGACTION, signal, 0, &raw mut action, 8);
            if action.handler > 1 && signal != SIGNAL as u32 {
                return true;
            }
        }
    }
    false
}

/// Before a thread goes on where it was: a call that was interrupted by nothing but our signal goes on, too.
unsafe fn go_on(context: *mut u64, interrupted: i64) {
    // SAFETY: a ucontext of the kernel.
    unsafe {
        if interrupted >= 0 && !is_signalled(context) {
            wind_back(context, interrupted as u64);
        }
    }
}

/// Has a call that was interrupted run again, with the time that was left where the kernel has told it.
unsafe fn wind_back(context: *mut u64, number: u64) {
    const NANOSLEEP: u64 = 35;
    const CLOCK_NANOSLEEP: u64 = 230;
    // SAFETY: a ucontext of the kernel.
    unsafe {
        *context.add(RIP) -= 2;
        *context.add(RAX) = number;
        if number == NANOSLEEP && *context.add(RSI) != 0 {
            *context.add(RDI) = *context.add(RSI);
        }
        // Not of an absolute time.
        if number == CLOCK_NANOSLEEP && *context.add(R10) != 0 && *context.add(RSI) & 1 == 0 {
            *context.add(RDX) = *context.add(R10);
        }
        ids::settle(context);
    }
}

/// Finds the driver, and makes sure that it is our user's or root's.
unsafe fn connect(socket: i32, nonce: u32) -> bool {
    let mut address = [0u8; 2 + SOCKET_NAME];
    address[0] = 1;
    let name = socket_name(nonce);
    let mut n = 0;
    while n < SOCKET_NAME {
        address[2 + n] = name[n];
        n += 1;
    }
    let mut peer = [0u32; 3];
    let mut size = 12u32;
    // SAFETY: structures of the kernel's form on our stack.
    unsafe {
        if sys!(calls::CONNECT, socket, address.as_ptr(), address.len()) != 0 {
            return false;
        }
        sys!(calls::GETSOCKOPT, socket, 1, 17, peer.as_mut_ptr(), &raw mut size) == 0
            && (peer[1] == 0 || peer[1] as i64 == sys!(calls::GETEUID, 0))
    }
}

unsafe fn send<T>(socket: i32, message: *const T) -> bool {
    const MSG_NOSIGNAL: u64 = 0x4000;
    // SAFETY: the message is as large as its type.
    unsafe { sys!(calls::SENDTO, socket, message, size_of::<T>(), MSG_NOSIGNAL, 0, 0) == size_of::<T>() as i64 }
}

/// A message of this size, and the descriptor that came with it.
unsafe fn receive<T>(socket: i32, message: *mut T, fd: &mut i32) -> bool {
    const MSG_CMSG_CLOEXEC: u64 = 0x4000_0000;
    let vector = [message as u64, size_of::<T>() as u64];
    let mut control = [0u64; 3];
    let header = [0, 0, vector.as_ptr() as u64, 1, control.as_mut_ptr() as u64, 24, 0];
    loop {
        // SAFETY: structures of the kernel's form on our stack.
        let got = unsafe { sys!(calls::RECVMSG, socket, header.as_ptr(), MSG_CMSG_CLOEXEC) };
        if got == -calls::EINTR {
            continue;
        }
        // SAFETY: written by the kernel.
        let control = unsafe { core::ptr::read_volatile(&raw const control) };
        // Length 20, SOL_SOCKET, SCM_RIGHTS.
        if control[0] == 20 && control[1] == 1 << 32 | 1 {
            *fd = control[2] as i32;
        }
        return got == size_of::<T>() as i64;
    }
}

/// Maps the region where nothing of a program is likely to come.
unsafe fn map(memfd: i32, size: u64) -> Option<u64> {
    let mut n = 0;
    while n < 256 {
        let base = 0x2000_0000_0000 + n * 0x10_0000_0000;
        // SAFETY: nothing is replaced.
        if unsafe { start::map_region(memfd, base, size) } {
            return Some(base);
        }
        n += 1;
    }
    None
}
