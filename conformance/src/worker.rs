//! A program of many threads that check their own state all the time: the subject of `programs/worker`, and what the
//! crash safety trials dump.
//!
//! Every thread counts what it has done on a [`Board`] in a shared file, where others can see that it goes on. No
//! thread allocates once it runs, so that from outside its mappings stay the same, but for those of the churning thread,
//! which stay inside [`WINDOW`].

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::case::Checkpoint;

/// The board's file in the worker's directory.
pub const BOARD: &str = "board";
/// Where the churning thread maps and unmaps.
pub const WINDOW: Range<u64> = 0x5a00_0000_0000..0x5a00_1000_0000;
/// Threads that check, besides the main thread.
pub const THREADS: usize = 14;

/// What the threads have done so far.
#[repr(C)]
pub struct Board {
    pub progress: [AtomicU64; THREADS],
    /// 1 as soon as a thread has found something wrong.
    pub failed: AtomicU64,
}

impl Board {
    /// Maps the board of the worker in `dir`, for as long as this process lives.
    pub fn open(dir: &Path) -> io::Result<&'static Board> {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(dir.join(BOARD))?;
        file.set_len(4096)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a shared mapping of a file that is never made shorter, as large as the board and never unmapped.
        // Every bit pattern is a valid board.
        unsafe {
            let address = libc::mmap(ptr::null_mut(), 4096, protection, libc::MAP_SHARED, file.as_raw_fd(), 0);
            if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(&*address.cast::<Board>()) }
        }
    }

    pub fn counts(&self) -> [u64; THREADS] {
        std::array::from_fn(|index| self.progress[index].load(SeqCst))
    }
}

/// What a thread needs to know.
struct Thread {
    index: usize,
    board: &'static Board,
    stop: Arc<AtomicBool>,
}

impl Thread {
    /// Counts one more piece of work; whether there is more to do.
    fn done_one(&self) -> bool {
        self.board.progress[self.index].fetch_add(1, SeqCst);
        !self.stop.load(SeqCst)
    }
}

type Work = fn(&Thread, &Shared) -> Result<(), String>;

/// What threads share with each other.
struct Shared {
    baton: [AtomicU32; 2],
    pipes: [(OwnedFd, OwnedFd); 2],
    sum: Mutex<(u64, u64)>,
}

const WORK: [(&str, Work); THREADS] = [
    ("permute", permute),
    ("permute", permute),
    ("permute", permute),
    ("vectors", vectors),
    ("vectors", vectors),
    ("floats", floats),
    ("futex ping", |thread, shared| futex(thread, shared, 0)),
    ("futex pong", |thread, shared| futex(thread, shared, 1)),
    ("pipe ping", |thread, shared| pipe(thread, shared, 0)),
    ("pipe pong", |thread, shared| pipe(thread, shared, 1)),
    ("sleep", sleep),
    ("churn", churn),
    ("signal", signal),
    ("lock", lock),
];

/// The subject.
pub fn worker(checkpoint: &Checkpoint) -> Result<(), String> {
    let board = Board::open(checkpoint.dir()).map_err(|error| format!("the board: {error}"))?;
    let stop = Arc::new(AtomicBool::new(false));
    let new_pipe = || nix::unistd::pipe().map_err(|error| format!("pipe: {error}"));
    let shared = Shared {
        baton: [AtomicU32::new(0), AtomicU32::new(0)],
        pipes: [new_pipe()?, new_pipe()?],
        sum: Mutex::new((0, 0)),
    };
    install_counting_handler()?;
    let failure = std::thread::scope(|scope| {
        let threads = WORK.iter().enumerate().map(|(index, (name, work))| {
            let thread = Thread { index, board, stop: stop.clone() };
            let shared = &shared;
            let body = move || {
                let result = work(&thread, shared).map_err(|failure| format!("thread {index} ({name}): {failure}"));
                if result.is_err() {
                    thread.board.failed.store(1, SeqCst);
                }
                result
            };
            std::thread::Builder::new().name(format!("{name} {index}")).spawn_scoped(scope, body).expect("a thread")
        });
        let threads: Vec<_> = threads.collect();
        let waited = wait_until_all_move(board).and_then(|()| checkpoint.ready()).and_then(|()| {
            while !checkpoint.is_go() && board.failed.load(SeqCst) == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
            // Nobody may have come to a halt while the others went on.
            if board.failed.load(SeqCst) == 0 { wait_until_all_move(board) } else { Ok(()) }
        });
        stop.store(true, SeqCst);
        let mut failures: Vec<String> = waited.err().into_iter().collect();
        if !failures.is_empty() {
            // Whoever hangs would be waited for without end.
            eprintln!("{failures:?}");
            std::fs::write(checkpoint.dir().join(crate::case::VERDICT), failures.join("; ")).ok();
            std::process::exit(1);
        }
        failures.extend(threads.into_iter().filter_map(|thread| thread.join().expect("no panic").err()));
        failures
    });
    if failure.is_empty() { Ok(()) } else { Err(failure.join("; ")) }
}

/// Waits until every thread has done more than it has now.
fn wait_until_all_move(board: &Board) -> Result<(), String> {
    let before = board.counts();
    let begin = Instant::now();
    loop {
        let still: Vec<&str> =
            (0..THREADS).filter(|&index| board.counts()[index] <= before[index]).map(|index| WORK[index].0).collect();
        if still.is_empty() || board.failed.load(SeqCst) != 0 {
            return Ok(());
        }
        if begin.elapsed() > Duration::from_secs(30) {
            return Err(format!("threads stand still: {still:?}"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn rest() {
    std::thread::sleep(Duration::from_micros(300));
}

/// Swaps words of half a mebibyte at random: their sum and their exclusive or stay.
fn permute(thread: &Thread, _shared: &Shared) -> Result<(), String> {
    let mut random = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(thread.index as u64 + 1);
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let mut words: Vec<u64> = (0..1 << 16).map(|_| next()).collect();
    let sums =
        |words: &[u64]| words.iter().fold((0_u64, 0_u64), |(sum, xor), &word| (sum.wrapping_add(word), xor ^ word));
    let expected = sums(&words);
    while thread.done_one() {
        for _ in 0..4096 {
            let (one, other) = (next() as usize % words.len(), next() as usize % words.len());
            words.swap(one, other);
        }
        let found = sums(&words);
        if found != expected {
            return Err(format!("the sums of memory were {expected:x?}, are {found:x?}"));
        }
        rest();
    }
    Ok(())
}

/// Holds a pattern in the vector registers through a loop that touches none of them.
fn vectors(thread: &Thread, _shared: &Shared) -> Result<(), String> {
    let wide = std::is_x86_feature_detected!("avx");
    let mut round = 0_u8;
    while thread.done_one() {
        round = round.wrapping_add(1);
        let pattern: [u8; 256] = std::array::from_fn(|at| (at as u8).wrapping_mul(7).wrapping_add(round));
        let mut found = [0_u8; 256];
        // SAFETY: reads and writes 128 or 256 bytes of arrays of 256; every changed register is declared. AVX
        // instructions only where the CPU has them.
        unsafe {
            if wide {
                hold_avx(&pattern, &mut found);
            } else {
                hold_sse(&pattern, &mut found);
                found[128..].copy_from_slice(&pattern[128..]);
            }
        }
        if found != pattern {
            let at = (0..256).find(|&at| found[at] != pattern[at]).unwrap_or(0);
            return Err(format!("vector register byte {at} was {:#x}, is {:#x}", pattern[at], found[at]));
        }
        rest();
    }
    Ok(())
}

/// # Safety
/// The CPU has SSE2, as every x86-64 has.
unsafe fn hold_sse(pattern: &[u8; 256], found: &mut [u8; 256]) {
    // SAFETY: see the declared operands: 8 registers of 16 bytes each.
    unsafe {
        std::arch::asm!(
            "movdqu xmm0, [{p}]", "movdqu xmm1, [{p} + 16]", "movdqu xmm2, [{p} + 32]", "movdqu xmm3, [{p} + 48]",
            "movdqu xmm4, [{p} + 64]", "movdqu xmm5, [{p} + 80]", "movdqu xmm6, [{p} + 96]", "movdqu xmm7, [{p} + 112]",
            "2:", "dec {n}", "jnz 2b",
            "movdqu [{f}], xmm0", "movdqu [{f} + 16], xmm1", "movdqu [{f} + 32], xmm2", "movdqu [{f} + 48], xmm3",
            "movdqu [{f} + 64], xmm4", "movdqu [{f} + 80], xmm5", "movdqu [{f} + 96], xmm6", "movdqu [{f} + 112], xmm7",
            p = in(reg) pattern.as_ptr(), f = in(reg) found.as_mut_ptr(), n = inout(reg) 200_000_u64 => _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
        );
    }
}

/// # Safety
/// The CPU has AVX.
#[target_feature(enable = "avx")]
unsafe fn hold_avx(pattern: &[u8; 256], found: &mut [u8; 256]) {
    // SAFETY: see the declared operands: 8 registers of 32 bytes each.
    unsafe {
        std::arch::asm!(
            "vmovdqu ymm0, [{p}]", "vmovdqu ymm1, [{p} + 32]", "vmovdqu ymm2, [{p} + 64]", "vmovdqu ymm3, [{p} + 96]",
            "vmovdqu ymm12, [{p} + 128]", "vmovdqu ymm13, [{p} + 160]", "vmovdqu ymm14, [{p} + 192]", "vmovdqu ymm15, [{p} + 224]",
            "2:", "dec {n}", "jnz 2b",
            "vmovdqu [{f}], ymm0", "vmovdqu [{f} + 32], ymm1", "vmovdqu [{f} + 64], ymm2", "vmovdqu [{f} + 96], ymm3",
            "vmovdqu [{f} + 128], ymm12", "vmovdqu [{f} + 160], ymm13", "vmovdqu [{f} + 192], ymm14", "vmovdqu [{f} + 224], ymm15",
            p = in(reg) pattern.as_ptr(), f = in(reg) found.as_mut_ptr(), n = inout(reg) 200_000_u64 => _,
            out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _,
            out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
        );
    }
}

/// Sums a series twice: any bit lost on the way gives another sum.
fn floats(thread: &Thread, _shared: &Shared) -> Result<(), String> {
    let series = || (1..20_000_u32).map(|n| 1.0 / f64::from(std::hint::black_box(n)).sqrt()).sum::<f64>();
    let expected = series();
    while thread.done_one() {
        let found = series();
        if found.to_bits() != expected.to_bits() {
            return Err(format!("a sum of floats was {expected}, is {found}"));
        }
        rest();
    }
    Ok(())
}

/// Hands a number to the other side and back, sleeping in the kernel until it comes.
fn futex(thread: &Thread, shared: &Shared, side: usize) -> Result<(), String> {
    let (mine, theirs) = (&shared.baton[side], &shared.baton[1 - side]);
    let mut turn = 0_u32;
    while thread.done_one() {
        turn += 1;
        if side == 0 {
            give(theirs, turn);
        }
        if !take(mine, turn, thread)? {
            break;
        }
        if side == 1 {
            give(theirs, turn);
        }
        rest();
    }
    Ok(())
}

fn give(word: &AtomicU32, value: u32) {
    word.store(value, SeqCst);
    // SAFETY: FUTEX_WAKE only uses the address of a live word.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, 1) };
}

/// Waits for the word to have this value. False if there is nothing more to come.
fn take(word: &AtomicU32, value: u32, thread: &Thread) -> Result<bool, String> {
    loop {
        let found = word.load(SeqCst);
        if found == value {
            return Ok(true);
        }
        if thread.stop.load(SeqCst) {
            return Ok(false);
        }
        if found != value - 1 {
            return Err(format!("the futex word should be {} or {value}, is {found}", value - 1));
        }
        // The time limit is far off: only the end of the program can meet it.
        let limit = libc::timespec { tv_sec: 1, tv_nsec: 0 };
        // SAFETY: a live word and a live timespec.
        let result = unsafe {
            libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG, found, &limit)
        };
        let error = io::Error::last_os_error().raw_os_error();
        if result != 0 && !matches!(error, Some(libc::EAGAIN | libc::ETIMEDOUT)) {
            return Err(format!("futex wait: {}", io::Error::last_os_error()));
        }
    }
}

/// Sends a number through one pipe and gets it back through the other.
fn pipe(thread: &Thread, shared: &Shared, side: usize) -> Result<(), String> {
    let (inbound, outbound) = (&shared.pipes[side].0, &shared.pipes[1 - side].1);
    let send = |number: u64| match nix::unistd::write(outbound, &number.to_ne_bytes()) {
        Ok(8) => Ok(()),
        other => Err(format!("write to a pipe: {other:?}")),
    };
    let mut number = 0_u64;
    loop {
        if side == 0 {
            // The last number tells the other side to end.
            let last = thread.stop.load(SeqCst);
            send(if last { u64::MAX } else { number })?;
            if last {
                return Ok(());
            }
        }
        let mut bytes = [0; 8];
        let read = nix::unistd::read(inbound, &mut bytes);
        if read != Ok(8) {
            return Err(format!("read from a pipe: {read:?}"));
        }
        let found = u64::from_ne_bytes(bytes);
        if side == 1 && found == u64::MAX {
            return Ok(());
        }
        if found != number {
            return Err(format!("{number} should come through the pipe, {found} did"));
        }
        if side == 1 {
            send(number)?;
        }
        number += 1;
        thread.done_one();
        rest();
    }
}

/// Sleeps, and wakes neither early nor interrupted.
fn sleep(thread: &Thread, _shared: &Shared) -> Result<(), String> {
    let wanted = Duration::from_millis(3);
    while thread.done_one() {
        let request = libc::timespec { tv_sec: 0, tv_nsec: wanted.as_nanos() as libc::c_long };
        let begin = Instant::now();
        // SAFETY: a live timespec; the remaining time is not asked for.
        let result = unsafe { libc::nanosleep(&request, ptr::null_mut()) };
        if result != 0 {
            return Err(format!("nanosleep: {}", io::Error::last_os_error()));
        }
        if begin.elapsed() < wanted {
            return Err(format!("slept {:?}, asked for {wanted:?}", begin.elapsed()));
        }
    }
    Ok(())
}

/// Maps, fills, checks and unmaps memory.
fn churn(thread: &Thread, _shared: &Shared) -> Result<(), String> {
    const LENGTH: usize = 64 << 10;
    let mut round = 0_u64;
    while thread.done_one() {
        round += 1;
        let at = (WINDOW.start + round % 64 * LENGTH as u64) as *mut c_void;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: a new mapping where none is, used within its length and unmapped here.
        unsafe {
            let address = libc::mmap(at, LENGTH, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            if address != at {
                return Err(format!("mmap at {at:?}: {}", io::Error::last_os_error()));
            }
            let words = std::slice::from_raw_parts_mut(address.cast::<u64>(), LENGTH / 8);
            if words.iter().any(|&word| word != 0) {
                return Err("a new mapping is not zero".into());
            }
            words.fill(round);
            rest();
            if let Some(word) = words.iter().find(|&&word| word != round) {
                return Err(format!("a mapping filled with {round} holds {word}"));
            }
            if libc::munmap(at, LENGTH) != 0 {
                return Err(format!("munmap: {}", io::Error::last_os_error()));
            }
        }
    }
    Ok(())
}

static SIGNALS: AtomicI64 = AtomicI64::new(0);

extern "C" fn count_signal(_: libc::c_int) {
    SIGNALS.fetch_add(1, SeqCst);
}

fn install_counting_handler() -> Result<(), String> {
    let action = SigAction::new(SigHandler::Handler(count_signal), SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: the handler only touches an atomic.
    unsafe { sigaction(Signal::SIGUSR2, &action) }.map(drop).map_err(|error| format!("sigaction: {error}"))
}

/// Sends itself a signal, which arrives before the call returns, and once.
fn signal(thread: &Thread, _shared: &Shared) -> Result<(), String> {
    while thread.done_one() {
        let before = SIGNALS.load(SeqCst);
        // SAFETY: signals this thread, by its own ids.
        let result = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), libc::SIGUSR2) };
        if result != 0 {
            return Err(format!("tgkill: {}", io::Error::last_os_error()));
        }
        let arrived = SIGNALS.load(SeqCst) - before;
        if arrived != 1 {
            return Err(format!("one signal was sent, {arrived} arrived"));
        }
        rest();
    }
    Ok(())
}

/// Keeps two numbers equal under a lock.
fn lock(thread: &Thread, shared: &Shared) -> Result<(), String> {
    while thread.done_one() {
        let mut pair = shared.sum.lock().map_err(|_| "the lock is poisoned")?;
        if pair.0 != pair.1 {
            return Err(format!("two equal numbers are {pair:?}"));
        }
        pair.0 += 1;
        std::hint::black_box(&mut *pair);
        pair.1 += 1;
        drop(pair);
        rest();
    }
    Ok(())
}
