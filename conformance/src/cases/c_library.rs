//! What the C library does behind a program's back, with signals and handlers of its own: cancelling threads, handlers
//! around fork, many threads, and the signals that it keeps for itself; and programs that have it do so all the time.

use std::mem::zeroed;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Barrier};

use super::compiled::{self, Compiled};
use crate::case::{Case, Checkpoint, Program};
use crate::expect::{done, equal, eventually, in_child};

pub fn cases() -> Vec<Case> {
    let signals = &["signals", "tasks"];
    vec![
        Case::new("c_library/cancel", signals, cancel),
        Case::new("c_library/handlers-around-fork", &["tasks"], handlers_around_fork),
        Case::new("c_library/handlers-for-every-signal", signals, handlers_for_every_signal),
        Case::new("c_library/its-own-signal", signals, its_own_signal),
        Case::new("c_library/many-threads", &["tasks", "registers"], many_threads),
        restless("c_library/cancel-all-the-time", compiled::program(|dir| CANCEL.command(dir))),
        steady("c_library/contexts", compiled::program(|dir| CONTEXTS.command(dir))),
        steady("c_library/jemalloc", compiled::needing(|dir| JEMALLOC.command(dir), WITH_JEMALLOC)),
        steady("c_library/jemalloc-preloaded", compiled::needing(|dir| PRELOADED.command(dir), WITH_JEMALLOC)),
        steady("c_library/jumps", compiled::program(|dir| JUMPS.command(dir))),
        restless("c_library/libraries-come-and-go", compiled::program(|dir| LIBRARIES.command(dir))),
        steady("c_library/malloc", compiled::program(|dir| MALLOC.command(dir))),
        steady("c_library/malloc-of-its-own", compiled::program(|dir| OWN_MALLOC.command(dir))),
        steady("c_library/signals-in-flight", compiled::program(|dir| SIGNALS.command(dir))),
    ]
}

const ROUNDS: usize = 3;
const COMPILED: &[&str] = &["memory", "registers", "signals", "tasks"];

fn steady(name: &'static str, program: Program) -> Case {
    Case::program(name, COMPILED, program).unsteady().rounds(ROUNDS)
}

fn restless(name: &'static str, program: Program) -> Case {
    Case::program(name, COMPILED, program).restless().rounds(ROUNDS)
}

const CANCEL: Compiled = Compiled::new(include_str!("compiled/cancel.c"));
const CONTEXTS: Compiled = Compiled::new(include_str!("compiled/contexts.c"));
const JUMPS: Compiled = Compiled::new(include_str!("compiled/jumps.c"));
const SIGNALS: Compiled = Compiled::new(include_str!("compiled/signals.c"));
const MALLOC: Compiled = Compiled::new(include_str!("compiled/malloc.c"));
const OWN_MALLOC: Compiled = Compiled { flags: "-fno-builtin -DOWN", ..MALLOC };

const LIBJEMALLOC: &str = "/usr/lib/x86_64-linux-gnu/libjemalloc.so.2";
const WITH_JEMALLOC: &[(&str, &str)] = &[compiled::GCC, (LIBJEMALLOC, "libjemalloc2")];
const JEMALLOC: Compiled = Compiled { flags: "-DFROM='\"jemalloc\"' -l:libjemalloc.so.2", ..MALLOC };
const PRELOADED: Compiled =
    Compiled { flags: "-DFROM='\"jemalloc\"'", by: "env LD_PRELOAD=libjemalloc.so.2", ..MALLOC };

const LIBRARIES: Compiled = Compiled {
    before: concat!(
        "cat > plugin.c <<'END'\n",
        include_str!("compiled/plugin.c"),
        "\nEND\nfor n in 1 2 3 4; do gcc -shared -fPIC -DNUMBER=$n -o plugin$n.so plugin.c || exit 1; done"
    ),
    ..Compiled::new(include_str!("compiled/dlopen.c"))
};

unsafe extern "C" {
    fn pthread_cancel(thread: libc::pthread_t) -> i32;
    /// As the start of a thread: it waits until it is cancelled, and has no frame of Rust, which could not be unwound.
    fn pause(unused: *mut libc::c_void) -> *mut libc::c_void;
}

fn start_pausing() -> Result<libc::pthread_t, String> {
    let mut thread = 0;
    // SAFETY: pause(2) takes nothing and ends only by being cancelled.
    let start: extern "C" fn(*mut libc::c_void) -> *mut libc::c_void =
        unsafe { std::mem::transmute(pause as *const ()) };
    // SAFETY: the identifier is written before it is used.
    equal("pthread_create", 0, unsafe { libc::pthread_create(&mut thread, null(), start, null_mut()) })?;
    // While it starts, the C library has it block all signals.
    eventually("the thread waits", || {
        let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
        let status = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
        let waiting = |status: &String| {
            let has = |line: &str| status.lines().any(|found| found == line);
            has("SigBlk:\t0000000000000000") && has("State:\tS (sleeping)")
        };
        tasks.map(status).filter(waiting).count() == 1
    })?;
    Ok(thread)
}

fn cancelled(thread: libc::pthread_t) -> Result<(), String> {
    const PTHREAD_CANCELED: usize = usize::MAX;
    let mut result = null_mut();
    // SAFETY: a thread of ours that nobody has joined.
    unsafe {
        equal("pthread_cancel", 0, pthread_cancel(thread))?;
        equal("pthread_join", 0, libc::pthread_join(thread, &mut result))?;
    }
    equal("what a cancelled thread gives", PTHREAD_CANCELED, result as usize)
}

/// One before, which has the C library take its signal, and one after.
fn cancel(checkpoint: &Checkpoint) -> Result<(), String> {
    cancelled(start_pausing()?)?;
    let thread = start_pausing()?;
    checkpoint.wait()?;
    cancelled(thread)?;
    cancelled(start_pausing()?)
}

static CALLED: [AtomicU32; 3] = [const { AtomicU32::new(0) }; 3];

extern "C" fn before_fork() {
    CALLED[0].fetch_add(1, SeqCst);
}

extern "C" fn in_parent() {
    CALLED[1].fetch_add(1, SeqCst);
}

extern "C" fn in_new_child() {
    CALLED[2].fetch_add(1, SeqCst);
}

fn handlers_around_fork(checkpoint: &Checkpoint) -> Result<(), String> {
    // SAFETY: the handlers only count.
    let set = unsafe { libc::pthread_atfork(Some(before_fork), Some(in_parent), Some(in_new_child)) };
    equal("pthread_atfork", 0, set)?;
    let called = || [0, 1, 2].map(|which: usize| CALLED[which].load(SeqCst));
    in_child(|| Ok(()))?.passed()?;
    // Nobody but the program forks it.
    equal("handlers called", [1, 1, 0], called())?;
    checkpoint.wait()?;
    equal("handlers called", [1, 1, 0], called())?;
    in_child(move || equal("handlers called in the child", [2, 1, 1], called()))?.passed()?;
    equal("handlers called", [2, 2, 0], called())
}

static CAUGHT: AtomicU64 = AtomicU64::new(0);
/// The code of the last one.
static CODE: AtomicI32 = AtomicI32::new(0);

extern "C" fn catch(signal: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    CAUGHT.fetch_or(1 << (signal - 1), SeqCst);
    // SAFETY: the kernel passes a siginfo.
    CODE.store(unsafe { (*info).si_code }, SeqCst);
}

fn handlers_for_every_signal(checkpoint: &Checkpoint) -> Result<(), String> {
    let mut caught = 0_u64;
    for signal in 1..=64 {
        // SAFETY: the handler only stores to atomics.
        unsafe {
            let mut action: libc::sigaction = zeroed();
            action.sa_sigaction = catch as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
            if libc::sigaction(signal, &action, null_mut()) == 0 {
                caught |= 1 << (signal - 1);
            }
        }
    }
    equal("signals that a program may catch", 60, caught.count_ones())?;
    checkpoint.wait()?;
    equal("signals caught meanwhile", 0, CAUGHT.load(SeqCst))?;
    for signal in (1..=64).filter(|signal| caught >> (signal - 1) & 1 == 1) {
        // SAFETY: every one of them has a handler.
        done("kill", unsafe { libc::kill(libc::getpid(), signal) })?;
    }
    eventually("all signals are caught", || CAUGHT.load(SeqCst) == caught)
}

/// The first of those that libc lets nobody have.
const KEPT: i32 = 32;

/// `struct sigaction` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Action {
    handler: u64,
    flags: u64,
    restorer: u64,
    mask: u64,
}

fn kernel_action(new: Option<&Action>) -> Result<Action, String> {
    let mut old = Action::default();
    let new = new.map_or(null(), |new| new as *const Action);
    // SAFETY: structures of the kernel's form.
    done("rt_sigaction", unsafe { libc::syscall(libc::SYS_rt_sigaction, KEPT, new, &raw mut old, 8) })?;
    Ok(old)
}

/// A program without pthread_cancel that uses this signal by system calls, past the C library.
fn its_own_signal(checkpoint: &Checkpoint) -> Result<(), String> {
    // The restorer of an action that the C library has set.
    let mut known = Action::default();
    // SAFETY: the handler only stores to atomics; structures of the kernel's form.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = catch as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGUSR1, &action, null_mut());
        libc::syscall(libc::SYS_rt_sigaction, libc::SIGUSR1, null::<u8>(), &raw mut known, 8);
    }
    kernel_action(Some(&known))?;
    let raise = || {
        CAUGHT.store(0, SeqCst);
        // SAFETY: it has a handler.
        done("tgkill", unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), KEPT) })?;
        eventually("the signal is caught", || CAUGHT.load(SeqCst) == 1 << (KEPT - 1))?;
        equal("its code", libc::SI_TKILL, CODE.load(SeqCst))
    };
    raise()?;
    equal("the action", known, kernel_action(None)?)?;
    CAUGHT.store(0, SeqCst);
    checkpoint.wait()?;
    equal("signals caught meanwhile", 0, CAUGHT.load(SeqCst))?;
    equal("the action", known, kernel_action(None)?)?;
    raise()
}

/// More threads than fit into any table of a fixed size.
fn many_threads(checkpoint: &Checkpoint) -> Result<(), String> {
    const COUNT: usize = 1100;
    std::thread_local!(static OWN: std::cell::Cell<usize> = const { std::cell::Cell::new(0) });
    let barrier = Arc::new(Barrier::new(COUNT + 1));
    let mut threads = Vec::with_capacity(COUNT);
    for number in 0..COUNT {
        let barrier = barrier.clone();
        let thread = std::thread::Builder::new().stack_size(64 * 1024).spawn(move || {
            OWN.set(number);
            // SAFETY: takes nothing.
            let tid = unsafe { libc::gettid() };
            barrier.wait();
            barrier.wait();
            // SAFETY: takes nothing.
            equal("number and id of a thread", (number, tid), (OWN.get(), unsafe { libc::gettid() }))
        });
        threads.push(thread.map_err(|error| format!("thread {number}: {error}"))?);
    }
    barrier.wait();
    checkpoint.wait()?;
    barrier.wait();
    threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread panicked")?)
}
