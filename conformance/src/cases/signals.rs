//! Signal actions, alternate stacks, and pending signals.

use std::mem::{size_of, zeroed};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};

use crate::case::{Case, Checkpoint};
use crate::expect::{done, equal, eventually, in_child, that};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("signals/actions", &["signals"], actions),
        Case::new("signals/pending", &["signals"], pending),
        Case::new("signals/pending-of-a-thread", &["signals", "thread-signals"], pending_of_a_thread),
        Case::new("signals/pending-of-two-processes", &["signals"], pending_of_two_processes),
        Case::new("signals/pending-and-ignored", &["signals"], pending_and_ignored),
        Case::new("signals/no-new-ones", &["signals", "thread-signals"], no_new_ones),
        Case::new("signals/none-of-a-zombie", &["signals", "tasks"], none_of_a_zombie),
        Case::new("signals/on-the-alternate-stack", &["thread-signals"], on_the_alternate_stack),
        Case::new("signals/alternate-stack-that-disarms", &["thread-signals"], alternate_stack_that_disarms),
        Case::new("signals/alternate-stacks-of-threads", &["thread-signals"], alternate_stacks_of_threads),
        Case::new("signals/alternate-stacks-without-room", &["thread-signals"], alternate_stacks_without_room),
        Case::new("signals/masks-of-threads", &["registers"], masks_of_threads),
    ]
}

/// `struct sigaction` of the kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
struct KernelAction {
    handler: u64,
    flags: u64,
    restorer: u64,
    mask: u64,
}

fn action(signal: i32, new: Option<&KernelAction>) -> Result<KernelAction, String> {
    let mut old = KernelAction { handler: 0, flags: 0, restorer: 0, mask: 0 };
    let new = new.map_or(null(), |new| new as *const KernelAction);
    // SAFETY: both point to structures of the kernel's form, or nowhere; a handler set here is one that may be called.
    done("rt_sigaction", unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, new, &mut old, 8) })?;
    Ok(old)
}

static CAUGHT: AtomicI32 = AtomicI32::new(0);
static VALUE: AtomicU64 = AtomicU64::new(0);

extern "C" fn catch(signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    CAUGHT.store(signal, Ordering::SeqCst);
    // SAFETY: the kernel gives a handler with SA_SIGINFO a valid siginfo.
    VALUE.store(unsafe { (*info).si_value().sival_ptr } as u64, Ordering::SeqCst);
}

fn handle(signal: i32, flags: i32, handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void)) {
    // SAFETY: the handlers of this file only use atomics and async-signal-safe calls.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = flags | libc::SA_SIGINFO;
        assert_eq!(libc::sigaction(signal, &action, null_mut()), 0);
    }
}

fn actions(checkpoint: &Checkpoint) -> Result<(), String> {
    handle(libc::SIGUSR1, libc::SA_RESTART | libc::SA_ONSTACK, catch);
    // The C library's own restorer, so that each of these could return.
    let known = action(libc::SIGUSR1, None)?;
    let plain =
        |handler, flags, mask| KernelAction { handler, flags: known.flags & !0x1000_0000 | flags, mask, ..known };
    let nodefer = plain(known.handler, libc::SA_NODEFER as u64, 1 << 5 | 1 << 63);
    let set = [
        (libc::SIGUSR2, nodefer),
        (libc::SIGHUP, plain(1, 0, 0)),
        (libc::SIGPIPE, plain(0, 0, 0)),
        (libc::SIGCHLD, plain(1, (libc::SA_NOCLDSTOP | libc::SA_NOCLDWAIT) as u64, 7)),
        (libc::SIGTERM, plain(known.handler, libc::SA_RESETHAND as u64, u64::MAX)),
        (33, plain(known.handler, 0, 1)),
        (64, plain(known.handler, 0, 0)),
    ];
    for (signal, new) in &set {
        action(*signal, Some(new))?;
    }
    let all = || (1..=64).map(|signal| action(signal, None)).collect::<Result<Vec<_>, _>>();
    let before = all()?;
    checkpoint.wait()?;
    let after = all()?;
    for (signal, (before, after)) in before.into_iter().zip(after).enumerate() {
        equal(&format!("action of signal {}", signal + 1), before, after)?;
    }
    for signal in [libc::SIGUSR1, libc::SIGUSR2, libc::SIGTERM, 64] {
        // SAFETY: the signal has a handler.
        unsafe { libc::raise(signal) };
        equal("signal caught", signal, CAUGHT.swap(0, Ordering::SeqCst))?;
    }
    equal("action of SIGTERM after SA_RESETHAND", 0, action(libc::SIGTERM, None)?.handler)
}

fn mask(how: i32, set: u64) -> Result<u64, String> {
    let mut old = 0u64;
    // SAFETY: both are sets of the kernel's size.
    done("rt_sigprocmask", unsafe { libc::syscall(libc::SYS_rt_sigprocmask, how, &set, &mut old, 8) })?;
    Ok(old)
}

fn pending_set() -> Result<u64, String> {
    let mut set = 0u64;
    // SAFETY: a set of the kernel's size.
    done("rt_sigpending", unsafe { libc::syscall(libc::SYS_rt_sigpending, &mut set, 8) })?;
    Ok(set)
}

/// A whole `siginfo_t` with a value.
fn info(signal: i32, code: i32, value: u64) -> [u8; 128] {
    let mut info = [0; 128];
    info[..4].copy_from_slice(&signal.to_ne_bytes());
    info[4..8].copy_from_slice(&77i32.to_ne_bytes());
    info[8..12].copy_from_slice(&code.to_ne_bytes());
    info[16..20].copy_from_slice(&4711i32.to_ne_bytes());
    info[20..24].copy_from_slice(&12i32.to_ne_bytes());
    info[24..32].copy_from_slice(&value.to_ne_bytes());
    info
}

fn queue(info: &[u8; 128], tid: Option<i32>) -> Result<(), String> {
    let signal = i32::from_ne_bytes(info[..4].try_into().expect("four bytes"));
    let pid = std::process::id() as i32;
    // SAFETY: `info` is a whole siginfo_t.
    let result = unsafe {
        match tid {
            None => libc::syscall(libc::SYS_rt_sigqueueinfo, pid, signal, info),
            Some(tid) => libc::syscall(libc::SYS_rt_tgsigqueueinfo, pid, tid, signal, info),
        }
    };
    done("queueing a signal", result).map(drop)
}

/// Takes every pending signal, the way the kernel orders them.
fn take_all() -> Vec<[u8; 128]> {
    let mut taken = Vec::new();
    loop {
        let (all, now) = (u64::MAX, [0u64; 2]);
        let mut info = [0u8; 128];
        // SAFETY: a set of the kernel's size, room for a siginfo_t, a timespec of zero.
        if unsafe { libc::syscall(libc::SYS_rt_sigtimedwait, &all, &mut info, &now, 8) } < 0 {
            return taken;
        }
        taken.push(info);
    }
}

fn compare(expected: &[[u8; 128]], found: &[[u8; 128]]) -> Result<(), String> {
    let signals = |infos: &[[u8; 128]]| infos.iter().map(|info| info[0]).collect::<Vec<_>>();
    equal("pending signals", signals(expected), signals(found))?;
    for (index, (expected, found)) in expected.iter().zip(found).enumerate() {
        equal(&format!("siginfo of pending signal number {index}"), &expected[..48], &found[..48])?;
    }
    Ok(())
}

fn tid() -> i32 {
    // SAFETY: has no arguments.
    unsafe { libc::gettid() }
}

const BLOCKABLE: u64 = !(1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1));

/// In the order in which the kernel hands them out: those of faults, by number, and first come first served.
fn some_signals() -> Vec<[u8; 128]> {
    vec![
        info(libc::SIGSEGV, 1, 0xdead_beef),
        info(libc::SIGHUP, libc::SI_QUEUE, 1),
        info(libc::SIGUSR1, libc::SI_USER, 0),
        info(libc::SIGALRM, libc::SI_TIMER, 5),
        info(libc::SIGCHLD, libc::CLD_EXITED, 6),
        info(libc::SIGIO, libc::SI_KERNEL, 9),
        info(34, libc::SI_QUEUE, 30),
        info(34, libc::SI_QUEUE, 10),
        info(34, libc::SI_MESGQ, 20),
        info(34, libc::SI_QUEUE, 10),
        info(50, libc::SI_ASYNCIO, u64::MAX),
        info(64, libc::SI_TKILL, 3),
    ]
}

fn pending(checkpoint: &Checkpoint) -> Result<(), String> {
    mask(libc::SIG_SETMASK, BLOCKABLE)?;
    take_all();
    let signals = some_signals();
    for info in &signals {
        queue(info, None)?;
    }
    let before = pending_set()?;
    checkpoint.wait()?;
    equal("set of pending signals", before, pending_set()?)?;
    compare(&signals, &take_all())
}

fn pending_of_a_thread(checkpoint: &Checkpoint) -> Result<(), String> {
    mask(libc::SIG_SETMASK, BLOCKABLE)?;
    let barrier = Arc::new(Barrier::new(2));
    let theirs = barrier.clone();
    let thread = std::thread::spawn(move || {
        for info in some_signals() {
            queue(&info, Some(tid()))?;
        }
        theirs.wait();
        theirs.wait();
        compare(&some_signals(), &take_all())
    });
    barrier.wait();
    let own = [info(35, libc::SI_QUEUE, 100), info(35, libc::SI_QUEUE, 99)];
    for info in &own {
        queue(info, Some(tid()))?;
    }
    checkpoint.wait()?;
    let found = take_all();
    barrier.wait();
    compare(&own, &found)?;
    thread.join().map_err(|_| "the thread panicked")?
}

fn pending_of_two_processes(checkpoint: &Checkpoint) -> Result<(), String> {
    mask(libc::SIG_SETMASK, BLOCKABLE)?;
    take_all();
    let own = [info(40, libc::SI_QUEUE, 3)];
    queue(&own[0], None)?;
    let parent = std::process::id();
    let child = in_child(|| {
        let own = [info(40, libc::SI_QUEUE, 1), info(41, libc::SI_QUEUE, 2)];
        for info in &own {
            queue(info, None)?;
        }
        eventually("SIGTERM is pending", || pending_set().is_ok_and(|set| set & 1 << (libc::SIGTERM - 1) != 0))?;
        checkpoint.wait()?;
        let found = take_all();
        equal("signals that are pending", 3, found.len())?;
        let sender = u32::from_ne_bytes(found[0][16..20].try_into().expect("four bytes"));
        equal("signal and sender", (libc::SIGTERM as u8, parent), (found[0][0], sender))?;
        compare(&own, &found[1..])
    })?;
    // SAFETY: a signal to our own child, which blocks it.
    done("kill", unsafe { libc::kill(child.0, libc::SIGTERM) })?;
    checkpoint.wait_for_go()?;
    let found: Vec<_> = take_all().into_iter().filter(|info| info[0] != libc::SIGCHLD as u8).collect();
    compare(&own, &found)?;
    child.passed()
}

/// Ignored, but blocked: Linux keeps such a signal, so that a handler set later gets it.
fn pending_and_ignored(checkpoint: &Checkpoint) -> Result<(), String> {
    mask(libc::SIG_SETMASK, BLOCKABLE)?;
    take_all();
    // SAFETY: ignoring a signal runs nothing.
    unsafe { libc::signal(libc::SIGUSR2, libc::SIG_IGN) };
    let signals = [info(libc::SIGUSR2, libc::SI_QUEUE, 4)];
    queue(&signals[0], None)?;
    that("the kernel keeps an ignored signal that is blocked", pending_set()? != 0)?;
    checkpoint.wait()?;
    compare(&signals, &take_all())
}

fn no_new_ones(checkpoint: &Checkpoint) -> Result<(), String> {
    mask(libc::SIG_SETMASK, BLOCKABLE)?;
    let mut children = Vec::new();
    for _ in 0..3 {
        children.push(in_child(|| {
            checkpoint.wait_for_go()?;
            equal("pending signals of a child", 0, pending_set()?)
        })?);
    }
    let barrier = Arc::new(Barrier::new(2));
    let theirs = barrier.clone();
    let thread = std::thread::spawn(move || {
        theirs.wait();
        theirs.wait();
        pending_set()
    });
    // It has made all that a new thread makes, before its mappings are looked at.
    barrier.wait();
    checkpoint.ready()?;
    // Not by wait_for_go(), for the children end at the same sign.
    while !checkpoint.is_go() {
        equal("pending signals while waiting", 0, pending_set()? & !(1 << (libc::SIGCHLD - 1)))?;
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    barrier.wait();
    let found = thread.join().map_err(|_| "the thread panicked")??;
    equal("pending signals, but SIGCHLD", 0, found & !(1 << (libc::SIGCHLD - 1)))?;
    children.into_iter().try_for_each(|child| child.passed())
}

/// A child has ended, and its SIGCHLD was taken, but nobody has waited for it. That a restore makes the child end again
/// must not be told a second time.
fn none_of_a_zombie(checkpoint: &Checkpoint) -> Result<(), String> {
    mask(libc::SIG_SETMASK, BLOCKABLE)?;
    let child = in_child(|| Ok(()))?;
    const SIGCHLD: u64 = 1 << (libc::SIGCHLD - 1);
    eventually("SIGCHLD is pending", || pending_set().is_ok_and(|set| set & SIGCHLD != 0))?;
    take_all();
    checkpoint.wait()?;
    equal("pending signals", 0, pending_set()?)?;
    child.passed()
}

const STACK_SIZE: usize = 256 * 1024;

fn set_stack(stack: &mut [u8], flags: i32) -> Result<(), String> {
    let new = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: flags, ss_size: stack.len() };
    // SAFETY: the stack lives until the end of the subject.
    done("sigaltstack", unsafe { libc::sigaltstack(&new, null_mut()) }).map(drop)
}

fn get_stack() -> (u64, i32, usize) {
    // SAFETY: a stack_t of zeros is one, and the call only fills it.
    unsafe {
        let mut old: libc::stack_t = zeroed();
        libc::sigaltstack(null(), &mut old);
        (old.ss_sp as u64, old.ss_flags, old.ss_size)
    }
}

static mut WAITING: Option<Checkpoint> = None;
static STACK: AtomicU64 = AtomicU64::new(0);
static JUDGEMENT: AtomicI32 = AtomicI32::new(0);
static FLAGS_INSIDE: AtomicI32 = AtomicI32::new(0);

/// Waits for the restore inside of a handler.
extern "C" fn wait_inside(signal: i32, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    let mut local = [0u64; 512];
    for (index, word) in local.iter_mut().enumerate() {
        *word = index as u64 ^ STACK.load(Ordering::SeqCst);
    }
    let at = std::hint::black_box(&mut local).as_ptr() as u64;
    let flags = get_stack().1;
    // SAFETY: set before the signal is raised, and never changed afterwards.
    let checkpoint = unsafe { (*std::ptr::addr_of!(WAITING)).as_ref() };
    let waited = checkpoint.is_some_and(|checkpoint| checkpoint.wait().is_ok());
    let begin = STACK.load(Ordering::SeqCst);
    let on_it = (begin..begin + STACK_SIZE as u64).contains(&at);
    let whole = local.iter().enumerate().all(|(index, word)| *word == index as u64 ^ begin);
    FLAGS_INSIDE.store(if get_stack().1 == flags { flags } else { -1 }, Ordering::SeqCst);
    JUDGEMENT.store(if waited && on_it && whole { signal } else { -signal }, Ordering::SeqCst);
}

fn dumped_in_a_handler(checkpoint: &Checkpoint, stack_flags: i32, flags_inside: i32) -> Result<(), String> {
    let stack = Vec::leak(vec![0; STACK_SIZE]);
    STACK.store(stack.as_ptr() as u64, Ordering::SeqCst);
    set_stack(stack, stack_flags)?;
    // SAFETY: there is one thread, and no handler runs yet.
    unsafe { WAITING = Some(checkpoint.clone()) };
    handle(libc::SIGUSR1, libc::SA_ONSTACK, wait_inside);
    let before = (get_stack(), mask(libc::SIG_BLOCK, 0)?);
    // SAFETY: the signal has a handler.
    unsafe { libc::raise(libc::SIGUSR1) };
    equal("the handler's judgement", libc::SIGUSR1, JUDGEMENT.swap(0, Ordering::SeqCst))?;
    equal("flags of the stack inside of the handler", flags_inside, FLAGS_INSIDE.load(Ordering::SeqCst))?;
    equal("alternate stack and mask after the handler", before, (get_stack(), mask(libc::SIG_BLOCK, 0)?))?;
    // It is still good for another.
    // SAFETY: the signal has a handler, which now finds the sign at once.
    unsafe { libc::raise(libc::SIGUSR1) };
    equal("the handler's judgement", libc::SIGUSR1, JUDGEMENT.load(Ordering::SeqCst))
}

fn on_the_alternate_stack(checkpoint: &Checkpoint) -> Result<(), String> {
    dumped_in_a_handler(checkpoint, 0, libc::SS_ONSTACK)
}

fn alternate_stack_that_disarms(checkpoint: &Checkpoint) -> Result<(), String> {
    const SS_AUTODISARM: i32 = 1 << 31;
    dumped_in_a_handler(checkpoint, SS_AUTODISARM, libc::SS_DISABLE)
}

/// Threads with alternate stacks that a signal frame fills, or for which it is too large: whatever a dump needs of the
/// threads, it may not need room there. And one that is off while a handler runs, dumped while none does.
fn alternate_stacks_without_room(checkpoint: &Checkpoint) -> Result<(), String> {
    const SS_AUTODISARM: i32 = 1 << 31;
    // SAFETY: asks the kernel's own list.
    let full = unsafe { libc::getauxval(libc::AT_MINSIGSTKSZ) } as usize;
    let stacks = [(full.max(libc::MINSIGSTKSZ), 0), (libc::MINSIGSTKSZ, 0), (65_536, SS_AUTODISARM)];
    let barrier = Arc::new(Barrier::new(stacks.len() + 1));
    let threads: Vec<_> = stacks
        .into_iter()
        .map(|(size, flags)| {
            let barrier = barrier.clone();
            std::thread::spawn(move || {
                let stack = Vec::leak(vec![0; size]);
                set_stack(stack, flags)?;
                let expected = (stack.as_ptr() as u64, flags, size);
                equal("alternate stack before", expected, get_stack())?;
                barrier.wait();
                barrier.wait();
                equal("alternate stack of a thread", expected, get_stack())
            })
        })
        .collect();
    barrier.wait();
    checkpoint.wait()?;
    barrier.wait();
    threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread panicked")?)
}

fn alternate_stacks_of_threads(checkpoint: &Checkpoint) -> Result<(), String> {
    let barrier = Arc::new(Barrier::new(4));
    let threads: Vec<_> = (1..4usize)
        .map(|number| {
            let barrier = barrier.clone();
            std::thread::spawn(move || {
                if number == 3 {
                    let off = libc::stack_t { ss_sp: null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
                    // SAFETY: takes the stack away that the standard library has set.
                    done("sigaltstack", unsafe { libc::sigaltstack(&off, null_mut()) })?;
                } else {
                    set_stack(Vec::leak(vec![0; number * 65_536]), 0)?;
                }
                let before = get_stack();
                barrier.wait();
                barrier.wait();
                equal("alternate stack of a thread", before, get_stack())
            })
        })
        .collect();
    let before = get_stack();
    barrier.wait();
    checkpoint.wait()?;
    barrier.wait();
    equal("alternate stack of the main thread", before, get_stack())?;
    threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread panicked")?)
}

fn masks_of_threads(checkpoint: &Checkpoint) -> Result<(), String> {
    let barrier = Arc::new(Barrier::new(3));
    let threads: Vec<_> = [1 << 9 | 1 << 40, BLOCKABLE]
        .into_iter()
        .map(|set: u64| {
            let barrier = barrier.clone();
            std::thread::spawn(move || {
                mask(libc::SIG_SETMASK, set)?;
                barrier.wait();
                barrier.wait();
                equal("mask of a thread", set, mask(libc::SIG_BLOCK, 0)?)
            })
        })
        .collect();
    mask(libc::SIG_SETMASK, 1 << 11)?;
    barrier.wait();
    checkpoint.wait()?;
    equal("mask of the main thread", 1 << 11, mask(libc::SIG_SETMASK, 0)?)?;
    barrier.wait();
    for thread in threads {
        thread.join().map_err(|_| "a thread panicked")??;
    }
    // A signal for the process finds the only thread that does not block it.
    handle(libc::SIGUSR2, 0, catch);
    // SAFETY: the signal has a handler.
    unsafe { libc::kill(libc::getpid(), libc::SIGUSR2) };
    eventually("SIGUSR2 is caught", || CAUGHT.load(Ordering::SeqCst) == libc::SIGUSR2)
}

const _: () = assert!(size_of::<libc::siginfo_t>() == 128);
