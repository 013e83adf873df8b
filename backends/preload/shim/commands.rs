//! `system` and `popen`: the C library starts the shell of these by itself, with the environment of the process.
//!
//! | function | why |
//! |---|---|
//! | `system` | the shell has to have the shim. Done here as POSIX has it, with `posix_spawn`: it may last as long as it likes, and other threads have their environment and descriptors meanwhile |
//! | `popen` | the same. What it gives is the C library's own, so that does it, with an environment that is there only until the shell was started |

use core::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use crate::calls::{self, sys};
use crate::environment::Prepared;
use crate::exec::{__errno_location, List, Text, environ, posix_spawn};
use crate::start;

const SIGINT: u64 = 2;
const SIGKILL: i32 = 9;
const SIGQUIT: u64 = 3;
const SIGCHLD: u64 = 17;
const SIG_IGN: u64 = 1;
const EINTR: i32 = 4;
/// `WEXITSTATUS` 127: the shell could not be started.
const NOT_STARTED: i32 = 127 << 8;

/// `struct sigaction` of the kernel.
#[repr(C)]
#[derive(Clone, Copy)]
struct Action([u64; 4]);

/// Of glibc and musl: at most as large.
#[repr(C, align(16))]
struct Attributes([u64; 64]);

/// `sigset_t` of the C library: the kernel's mask comes first.
#[repr(C, align(16))]
struct Set([u64; 16]);

/// `struct _pthread_cleanup_buffer`.
#[repr(C)]
struct Cleanup([u64; 6]);

unsafe extern "C" {
    fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32;
    fn kill(pid: i32, signal: i32) -> i32;
    fn posix_spawnattr_init(attributes: *mut Attributes) -> i32;
    fn posix_spawnattr_setflags(attributes: *mut Attributes, flags: i16) -> i32;
    fn posix_spawnattr_setsigmask(attributes: *mut Attributes, set: *const Set) -> i32;
    fn posix_spawnattr_setsigdefault(attributes: *mut Attributes, set: *const Set) -> i32;
    fn _pthread_cleanup_push(buffer: *mut Cleanup, routine: unsafe extern "C" fn(*mut u8), argument: *mut u8);
    fn _pthread_cleanup_pop(buffer: *mut Cleanup, run: i32);
}
core::arch::global_asm!(
    ".weak waitpid",
    ".weak kill",
    ".weak posix_spawnattr_init",
    ".weak posix_spawnattr_setflags",
    ".weak posix_spawnattr_setsigmask",
    ".weak posix_spawnattr_setsigdefault",
    ".weak _pthread_cleanup_push",
    ".weak _pthread_cleanup_pop",
);

/// A lock that a child of fork does not find taken: it names the process.
struct Lock(AtomicU32);

impl Lock {
    fn take(&self) {
        loop {
            // SAFETY: takes nothing.
            let own = unsafe { sys!(calls::GETPID, 0) } as u32;
            let found = self.0.load(Ordering::Relaxed);
            if found != own && self.0.compare_exchange(found, own, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                return;
            }
            // SAFETY: takes nothing.
            unsafe { sys!(calls::SCHED_YIELD, 0) };
        }
    }

    fn give_back(&self) {
        self.0.store(0, Ordering::Release);
    }
}

/// What `system` changes of the process as long as one runs, for all that do at the same time.
struct Quiet {
    lock: Lock,
    count: AtomicU32,
    before: [core::cell::UnsafeCell<Action>; 2],
}

// SAFETY: the actions are used by who has the lock.
unsafe impl Sync for Quiet {}

static QUIET: Quiet = Quiet {
    lock: Lock(AtomicU32::new(0)),
    count: AtomicU32::new(0),
    before: [const { core::cell::UnsafeCell::new(Action([0; 4])) }; 2],
};

impl Quiet {
    /// Has the process ignore interrupts. Gives those that it did not ignore before, as a mask.
    unsafe fn begin(&self) -> u64 {
        let ignore = Action([SIG_IGN, 0, 0, 0]);
        let mut handled = 0;
        self.lock.take();
        let first = self.count.fetch_add(1, Ordering::Relaxed) == 0;
        for (signal, before) in [SIGINT, SIGQUIT].into_iter().zip(&self.before) {
            // SAFETY: structures of the kernel's form, under the lock.
            unsafe {
                if first {
                    sys!(calls::RT_SIGACTION, signal, &raw const ignore, before.get(), 8);
                }
                if (*before.get()).0[0] != SIG_IGN {
                    handled |= 1 << (signal - 1);
                }
            }
        }
        self.lock.give_back();
        handled
    }

    unsafe fn end(&self, mask: &u64) {
        self.lock.take();
        let last = self.count.fetch_sub(1, Ordering::Relaxed) == 1;
        // SAFETY: as above.
        unsafe {
            if last {
                for (signal, before) in [SIGINT, SIGQUIT].into_iter().zip(&self.before) {
                    sys!(calls::RT_SIGACTION, signal, before.get(), 0, 8);
                }
            }
            sys!(calls::RT_SIGPROCMASK, 2, &raw const *mask, 0, 8);
        }
        self.lock.give_back();
    }
}

/// What a thread that is cancelled has to undo.
struct Waiting {
    pid: i32,
    mask: u64,
}

unsafe extern "C" fn cancelled(waiting: *mut u8) {
    // SAFETY: `system` passes it, and its frame is still there.
    unsafe {
        let waiting = &*waiting.cast::<Waiting>();
        kill(waiting.pid, SIGKILL);
        wait(waiting.pid);
        QUIET.end(&waiting.mask);
    }
}

/// Its status; -1 where it cannot be waited for.
unsafe fn wait(pid: i32) -> i32 {
    let mut status = -1;
    // SAFETY: a status of ours; libc is there when a program calls it.
    unsafe {
        loop {
            let found = waitpid(pid, &raw mut status, 0);
            if found == pid {
                return status;
            }
            if found >= 0 || *__errno_location() != EINTR {
                return -1;
            }
        }
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn system(command: Text) -> i32 {
    const SETSIGDEF: i16 = 4;
    const SETSIGMASK: i16 = 8;
    if command.is_null() {
        // SAFETY: a string; whether there is a shell.
        return i32::from(unsafe { system(c"exit 0".as_ptr().cast()) } == 0);
    }
    // SAFETY: as the caller of system has to see to; structures of the C library are at least as large as it has them.
    unsafe {
        let handled = QUIET.begin();
        let mut waiting = Waiting { pid: 0, mask: 0 };
        let child: u64 = 1 << (SIGCHLD - 1);
        sys!(calls::RT_SIGPROCMASK, 0, &raw const child, &raw mut waiting.mask, 8);
        let (mut mask, mut defaults) = (Set([0; 16]), Set([0; 16]));
        (mask.0[0], defaults.0[0]) = (waiting.mask, handled);
        let mut attributes = Attributes([0; 64]);
        posix_spawnattr_init(&raw mut attributes);
        posix_spawnattr_setsigmask(&raw mut attributes, &raw const mask);
        posix_spawnattr_setsigdefault(&raw mut attributes, &raw const defaults);
        posix_spawnattr_setflags(&raw mut attributes, SETSIGDEF | SETSIGMASK);
        let arguments = [c"sh".as_ptr().cast(), c"-c".as_ptr().cast(), command, core::ptr::null()];
        let shell = c"/bin/sh".as_ptr().cast();
        let attributes = (&raw const attributes).cast();
        let failure = posix_spawn(&raw mut waiting.pid, shell, core::ptr::null(), attributes, arguments.as_ptr(), environ);
        let mut status = NOT_STARTED;
        if failure == 0 {
            let mut cleanup = Cleanup([0; 6]);
            _pthread_cleanup_push(&raw mut cleanup, cancelled, (&raw mut waiting).cast());
            status = wait(waiting.pid);
            _pthread_cleanup_pop(&raw mut cleanup, 0);
        }
        QUIET.end(&waiting.mask);
        if failure != 0 {
            *__errno_location() = failure;
        }
        status
    }
}

type Popen = unsafe extern "C" fn(Text, Text) -> *mut u8;
static REAL_POPEN: AtomicPtr<u8> = AtomicPtr::new(core::ptr::null_mut());

/// Finds it: `dlsym` takes locks, which a child after fork may not.
///
/// # Safety
/// Called by the constructor, where there is one thread.
pub unsafe fn find_real() {
    // SAFETY: a C string.
    REAL_POPEN.store(unsafe { start::next(b"popen\0") }, Ordering::Relaxed);
}

/// The environment while a shell is started. It stays: another thread may still look into it when that was done.
static COMMON: AtomicPtr<Prepared> = AtomicPtr::new(core::ptr::null_mut());
static COMMON_LOCK: Lock = Lock(AtomicU32::new(0));

/// Whether a variable is there only until `popen` has started its shell. Another thread that starts a program just then finds
/// it in its environment.
pub fn is_for_now(variable: Text) -> bool {
    let common = COMMON.load(Ordering::Relaxed);
    // SAFETY: it stays, and nothing of it is looked at but where it is.
    !common.is_null() && unsafe { (*common).is_its_descriptor(variable) || (*common).is_its_preload(variable) }
}

unsafe fn common() -> *mut Prepared {
    let mut common = COMMON.load(Ordering::Relaxed);
    if common.is_null() {
        // SAFETY: new memory, as large as it has to be.
        unsafe {
            common = start::allocate(size_of::<Prepared>()).cast();
            if !common.is_null() {
                common.write(Prepared::new());
            }
        }
        COMMON.store(common, Ordering::Relaxed);
    }
    common
}

/// Takes what is ours out of an environment that another thread has made of ours meanwhile.
unsafe fn clean(list: List, ours: &Prepared, before: List) {
    // SAFETY: environments end in a null pointer.
    unsafe {
        let mut preload = core::ptr::null();
        let mut place = before;
        while !place.is_null() && !(*place).is_null() {
            if calls::begins_with(*place, b"LD_PRELOAD=") {
                preload = *place;
            }
            place = place.add(1);
        }
        let (mut from, mut to) = (list, list.cast_mut());
        while !from.is_null() && !(*from).is_null() {
            let kept = if ours.is_its_preload(*from) { preload } else { *from };
            if !kept.is_null() && !ours.is_its_descriptor(kept) {
                *to = kept;
                to = to.add(1);
            }
            from = from.add(1);
        }
        if !to.is_null() {
            *to = core::ptr::null();
        }
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn popen(command: Text, mode: Text) -> *mut u8 {
    // SAFETY: as the caller of popen has to see to: it returns when the command has been started.
    unsafe {
        let mut real = REAL_POPEN.load(Ordering::Relaxed);
        if real.is_null() {
            real = start::next(b"popen\0");
        }
        let real = core::mem::transmute::<*mut u8, Popen>(real);
        COMMON_LOCK.take();
        let prepared = common();
        if prepared.is_null() {
            COMMON_LOCK.give_back();
            return real(command, mode);
        }
        let before = environ;
        let list = (*prepared).make(before);
        environ = list;
        let result = real(command, mode);
        if environ == list {
            environ = before;
        } else {
            clean(environ, &*prepared, before);
        }
        (*prepared).close();
        COMMON_LOCK.give_back();
        result
    }
}
