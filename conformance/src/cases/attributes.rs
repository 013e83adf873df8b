//! Small settings of processes and threads.

use std::mem::zeroed;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use crate::case::{Case, Checkpoint};
use crate::expect::{done, equal, eventually, in_child, that};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("attributes/names", &["thread-attributes", "memory"], names),
        Case::new("attributes/process-title", &["attributes", "memory"], process_title),
        Case::new("attributes/of-the-process", &["attributes"], of_the_process),
        Case::new("attributes/not-dumpable", &["attributes"], not_dumpable)
            .privileged("a process that is not dumpable shows nothing to its user"),
        Case::new("attributes/deny-write-execute", &["attributes", "memory"], deny_write_execute),
        Case::new("attributes/huge-pages-but-advised", &["attributes"], huge_pages_but_advised),
        Case::new("attributes/subreaper", &["attributes", "tasks"], subreaper),
        Case::new("attributes/personality", &["thread-attributes"], personality),
        Case::new("attributes/of-threads", &["thread-attributes"], of_threads),
        Case::new("attributes/speculation", &["thread-attributes"], speculation),
        Case::new("attributes/no-time-stamp-counter", &["thread-attributes"], no_time_stamp_counter),
        Case::new("attributes/robust-mutex", &["thread-attributes"], robust_mutex),
        Case::new("attributes/join", &["thread-attributes"], join),
        Case::new("attributes/death-of-the-parent", &["thread-attributes"], death_of_the_parent),
        Case::new("attributes/end-of-the-restorer", &["thread-attributes"], end_of_the_restorer),
        Case::new("attributes/seccomp", &["attributes"], seccomp).refused_at_dump("seccomp"),
    ]
}

/// `prctl` with numbers.
fn prctl(option: i32, arguments: [u64; 4]) -> Result<i64, String> {
    let [second, third, fourth, fifth] = arguments;
    // SAFETY: callers give numbers, or addresses of what lives through the call.
    let result = unsafe { libc::syscall(libc::SYS_prctl, option, second, third, fourth, fifth) };
    done(&format!("prctl({option}, {second})"), result)
}

fn read(path: &str) -> Result<String, String> {
    std::fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .map_err(|error| format!("{path}: {error}"))
}

fn write(path: &str, text: &str) -> Result<(), String> {
    std::fs::write(path, text).map_err(|error| format!("{path}: {error}"))
}

/// Threads that set something up, wait for the restore, and compare what they see.
fn threads<T: PartialEq + std::fmt::Debug + 'static>(
    checkpoint: &Checkpoint,
    set_up: Vec<Box<dyn FnOnce() -> Result<(), String> + Send>>,
    look: fn() -> Result<T, String>,
) -> Result<(), String> {
    let barrier = Arc::new(Barrier::new(set_up.len() + 1));
    let threads: Vec<_> = set_up
        .into_iter()
        .map(|set_up| {
            let barrier = barrier.clone();
            std::thread::spawn(move || {
                let before = set_up().and_then(|()| look());
                barrier.wait();
                barrier.wait();
                equal("settings of a thread", before?, look()?)
            })
        })
        .collect();
    let before = look()?;
    barrier.wait();
    checkpoint.wait()?;
    barrier.wait();
    for thread in threads {
        thread.join().map_err(|_| "a thread panicked")??;
    }
    equal("settings of the main thread", before, look()?)
}

fn name() -> Result<(String, String), String> {
    let mut name = [0u8; 16];
    prctl(libc::PR_GET_NAME, [name.as_mut_ptr() as u64, 0, 0, 0])?;
    Ok((format!("{:?}", name.escape_ascii().to_string()), read("/proc/thread-self/comm")?))
}

fn set_name(name: &[u8]) -> Result<(), String> {
    let mut whole = [0u8; 16];
    whole[..name.len()].copy_from_slice(name);
    prctl(libc::PR_SET_NAME, [whole.as_ptr() as u64, 0, 0, 0]).map(drop)
}

fn names(checkpoint: &Checkpoint) -> Result<(), String> {
    set_name(b"a) R 1 (b")?;
    threads(
        checkpoint,
        vec![
            Box::new(|| set_name(b"")),
            Box::new(|| set_name(b"fifteen letters")),
            Box::new(|| set_name(b"\n\xff\\ \x01")),
            Box::new(|| Ok(())),
        ],
        name,
    )
}

/// Overwrites its arguments and environment in place, as servers do to show what they are at.
fn process_title(checkpoint: &Checkpoint) -> Result<(), String> {
    let stat = read("/proc/self/stat")?;
    let fields: Vec<u64> = stat
        .rsplit_once(") ")
        .map(|(_, rest)| rest.split_ascii_whitespace().map(|field| field.parse().unwrap_or(0)).collect())
        .ok_or("stat")?;
    // Fields 48 to 51 of the manual page; the first after the name is field 3.
    let (arguments, environment) = (fields[45]..fields[46], fields[47]..fields[48]);
    let fill = |area: &std::ops::Range<u64>, text: &[u8]| {
        // SAFETY: the area of the arguments is the program's own and writable; what is written has its length. The
        // standard library has copied nothing out of it that a later check uses.
        let area = unsafe { std::slice::from_raw_parts_mut(area.start as *mut u8, (area.end - area.start) as usize) };
        for (place, byte) in area.iter_mut().zip(text.iter().chain(std::iter::repeat(&0))) {
            *place = *byte;
        }
    };
    fill(&arguments, b"title: at work");
    fill(&environment, b"NEW=environment");
    let look = || Ok::<_, String>((read("/proc/self/cmdline")?, read("/proc/self/environ")?));
    let before = look()?;
    that("the title is the new one", before.0.starts_with("title: at work"))?;
    checkpoint.wait()?;
    equal("arguments and environment", &before, &look()?)?;
    // The areas are still where the program thinks they are.
    fill(&arguments, b"another one");
    that("the title can be changed", read("/proc/self/cmdline")?.starts_with("another one"))
}

fn settings_of_the_process() -> Result<Vec<String>, String> {
    let mut subreaper = 0i32;
    prctl(libc::PR_GET_CHILD_SUBREAPER, [&raw mut subreaper as u64, 0, 0, 0])?;
    const PR_GET_MEMORY_MERGE: i32 = 68;
    Ok(vec![
        format!("subreaper {subreaper}"),
        format!("dumpable {}", prctl(libc::PR_GET_DUMPABLE, [0; 4])?),
        format!("huge pages {}", prctl(libc::PR_GET_THP_DISABLE, [0; 4])?),
        format!("merge {:?}", prctl(PR_GET_MEMORY_MERGE, [0; 4]).unwrap_or(0)),
        read("/proc/self/coredump_filter")?,
        read("/proc/self/oom_score_adj")?,
    ])
}

fn of_the_process(checkpoint: &Checkpoint) -> Result<(), String> {
    prctl(libc::PR_SET_CHILD_SUBREAPER, [1, 0, 0, 0])?;
    prctl(libc::PR_SET_THP_DISABLE, [1, 0, 0, 0])?;
    write("/proc/self/coredump_filter", "0x1f")?;
    write("/proc/self/oom_score_adj", "321")?;
    let before = settings_of_the_process()?;
    checkpoint.wait()?;
    equal("settings", before, settings_of_the_process()?)
}

fn not_dumpable(checkpoint: &Checkpoint) -> Result<(), String> {
    prctl(libc::PR_SET_DUMPABLE, [0; 4])?;
    checkpoint.wait()?;
    equal("PR_GET_DUMPABLE", 0, prctl(libc::PR_GET_DUMPABLE, [0; 4])?)
}

fn deny_write_execute(checkpoint: &Checkpoint) -> Result<(), String> {
    const PR_SET_MDWE: i32 = 65;
    const PR_GET_MDWE: i32 = 66;
    const REFUSE_EXEC_GAIN: u64 = 1;
    prctl(PR_SET_MDWE, [REFUSE_EXEC_GAIN, 0, 0, 0])?;
    checkpoint.wait()?;
    equal("PR_GET_MDWE", REFUSE_EXEC_GAIN as i64, prctl(PR_GET_MDWE, [0; 4])?)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: fails, or maps memory that is never used.
    let mapped = unsafe { libc::mmap(null_mut(), 4096, libc::PROT_WRITE | libc::PROT_EXEC, flags, -1, 0) };
    that("memory to write and execute is refused", mapped == libc::MAP_FAILED)
}

fn huge_pages_but_advised(checkpoint: &Checkpoint) -> Result<(), String> {
    const EXCEPT_ADVISED: u64 = 2;
    // Kernel 6.18; an older one takes none at all.
    if prctl(libc::PR_SET_THP_DISABLE, [1, EXCEPT_ADVISED, 0, 0]).is_err() {
        prctl(libc::PR_SET_THP_DISABLE, [1, 0, 0, 0])?;
    }
    let before = prctl(libc::PR_GET_THP_DISABLE, [0; 4])?;
    checkpoint.wait()?;
    equal("PR_GET_THP_DISABLE", before, prctl(libc::PR_GET_THP_DISABLE, [0; 4])?)
}

/// A pipe by which grandchildren tell that they are ready.
struct Told([i32; 2]);

impl Told {
    fn new() -> Result<Told, String> {
        let mut ends = [0; 2];
        // SAFETY: room for two descriptors.
        done("pipe", unsafe { libc::pipe(ends.as_mut_ptr()) })?;
        Ok(Told(ends))
    }

    fn tell(&self) {
        // SAFETY: one byte to a pipe of our own.
        unsafe { libc::write(self.0[1], b"r".as_ptr().cast(), 1) };
    }

    fn wait(&self) -> Result<(), String> {
        // SAFETY: room for one byte, from a pipe of our own.
        done("read", unsafe { libc::read(self.0[0], [0u8].as_mut_ptr().cast(), 1) }).map(drop)
    }
}

/// A grandchild becomes ours when its parent ends after the restore.
fn subreaper(checkpoint: &Checkpoint) -> Result<(), String> {
    prctl(libc::PR_SET_CHILD_SUBREAPER, [1, 0, 0, 0])?;
    let subject = std::process::id();
    let told = Told::new()?;
    let child = in_child(|| {
        let parent = std::process::id();
        in_child(|| {
            told.tell();
            checkpoint.wait_for_go()?;
            // SAFETY: has no arguments.
            eventually("the subject is the parent", || unsafe { libc::getppid() } as u32 != parent)?;
            // SAFETY: has no arguments.
            equal("new parent", subject, unsafe { libc::getppid() } as u32)
        })?;
        checkpoint.wait_for_go()
    })?;
    told.wait()?;
    checkpoint.wait()?;
    child.passed()?;
    let mut status = 0;
    // SAFETY: waits for whatever child there is.
    done("waitpid", unsafe { libc::waitpid(-1, &mut status, 0) })?;
    equal("wait status of the grandchild", 0, status)
}

fn get_personality() -> Result<i64, String> {
    // SAFETY: asks only.
    done("personality", unsafe { libc::syscall(libc::SYS_personality, 0xffff_ffffu32) })
}

fn set_personality(flags: i32) -> Result<(), String> {
    // SAFETY: the flags used here change nothing of what runs already.
    done("personality", unsafe { libc::syscall(libc::SYS_personality, flags) }).map(drop)
}

fn personality(checkpoint: &Checkpoint) -> Result<(), String> {
    set_personality(libc::ADDR_NO_RANDOMIZE)?;
    threads(
        checkpoint,
        vec![
            Box::new(|| set_personality(libc::UNAME26 | libc::WHOLE_SECONDS)),
            Box::new(|| set_personality(0)),
            Box::new(|| Ok(())),
        ],
        get_personality,
    )
}

fn machine_check_policy() -> Result<i64, String> {
    prctl(libc::PR_MCE_KILL_GET, [0; 4])
}

fn of_threads(checkpoint: &Checkpoint) -> Result<(), String> {
    const EARLY: u64 = libc::PR_MCE_KILL_EARLY as u64;
    const LATE: u64 = libc::PR_MCE_KILL_LATE as u64;
    let set = |policy: u64| prctl(libc::PR_MCE_KILL, [libc::PR_MCE_KILL_SET as u64, policy, 0, 0]).map(drop);
    threads(checkpoint, vec![Box::new(move || set(EARLY)), Box::new(move || set(LATE))], machine_check_policy)
}

const STORE_BYPASS: u64 = 0;
const SPEC_PRCTL: i64 = 1;
const SPEC_DISABLE: u64 = 4;

fn speculation_of_a_thread() -> Result<i64, String> {
    Ok(prctl(libc::PR_GET_SPECULATION_CTRL, [STORE_BYPASS, 0, 0, 0]).unwrap_or(-1))
}

fn speculation(checkpoint: &Checkpoint) -> Result<(), String> {
    // Where the processor or the administrator leaves no choice there is nothing to set, and so nothing to lose.
    let choice = speculation_of_a_thread()? > 0 && speculation_of_a_thread()? & SPEC_PRCTL != 0;
    threads(
        checkpoint,
        vec![Box::new(move || match choice {
            true => prctl(libc::PR_SET_SPECULATION_CTRL, [STORE_BYPASS, SPEC_DISABLE, 0, 0]).map(drop),
            false => Ok(()),
        })],
        speculation_of_a_thread,
    )
}

/// A thread that may not use `rdtsc`; it must not ask for the time, which would.
fn no_time_stamp_counter(checkpoint: &Checkpoint) -> Result<(), String> {
    static STATE: AtomicI32 = AtomicI32::new(0);
    static SEEN: AtomicU64 = AtomicU64::new(0);
    let wait_until = |state: i32| {
        while STATE.load(Ordering::SeqCst) < state {
            // SAFETY: a futex in a static; wakes up at once if it has changed.
            unsafe { libc::syscall(libc::SYS_futex, &STATE, libc::FUTEX_WAIT, state - 1, 0) };
        }
    };
    let move_on = |state: i32| {
        STATE.store(state, Ordering::SeqCst);
        // SAFETY: a futex in a static.
        unsafe { libc::syscall(libc::SYS_futex, &STATE, libc::FUTEX_WAKE, i32::MAX) };
    };
    let thread = std::thread::spawn(move || {
        let set = prctl(libc::PR_SET_TSC, [libc::PR_TSC_SIGSEGV as u64, 0, 0, 0]);
        move_on(1);
        wait_until(2);
        let mut mode = 0i32;
        let got = prctl(libc::PR_GET_TSC, [&raw mut mode as u64, 0, 0, 0]);
        prctl(libc::PR_SET_TSC, [libc::PR_TSC_ENABLE as u64, 0, 0, 0])?;
        SEEN.store(mode as u64, Ordering::SeqCst);
        set.and(got).map(drop)
    });
    wait_until(1);
    checkpoint.wait()?;
    move_on(2);
    thread.join().map_err(|_| "the thread panicked")??;
    equal("PR_GET_TSC of the thread", libc::PR_TSC_SIGSEGV as u64, SEEN.load(Ordering::SeqCst))
}

struct Mutex(*mut libc::pthread_mutex_t);
// SAFETY: a mutex is there to be shared.
unsafe impl Send for Mutex {}

/// The owner of a robust mutex ends after the restore: the kernel finds the mutex by the thread's list and tells who
/// takes it next.
fn robust_mutex(checkpoint: &Checkpoint) -> Result<(), String> {
    // SAFETY: zeros are a mutex and its attributes before they are initialised; the box is leaked, so that it lives on.
    let mutex = unsafe {
        let mutex: &'static mut libc::pthread_mutex_t = Box::leak(Box::new(zeroed()));
        let mut attributes: libc::pthread_mutexattr_t = zeroed();
        libc::pthread_mutexattr_init(&mut attributes);
        equal("setrobust", 0, libc::pthread_mutexattr_setrobust(&mut attributes, libc::PTHREAD_MUTEX_ROBUST))?;
        equal("mutex_init", 0, libc::pthread_mutex_init(mutex, &attributes))?;
        mutex as *mut libc::pthread_mutex_t
    };
    let barrier = Arc::new(Barrier::new(2));
    let theirs = barrier.clone();
    let shared = Mutex(mutex);
    let thread = std::thread::spawn(move || {
        let shared = shared;
        // SAFETY: an initialised mutex that is never freed.
        let locked = unsafe { libc::pthread_mutex_lock(shared.0) };
        theirs.wait();
        theirs.wait();
        locked
    });
    barrier.wait();
    // SAFETY: an initialised mutex that is never freed.
    equal("trylock while the owner lives", libc::EBUSY, unsafe { libc::pthread_mutex_trylock(mutex) })?;
    checkpoint.wait()?;
    // SAFETY: as above.
    equal("trylock after the restore", libc::EBUSY, unsafe { libc::pthread_mutex_trylock(mutex) })?;
    barrier.wait();
    equal("lock by the thread", 0, thread.join().map_err(|_| "the thread panicked")?)?;
    // SAFETY: as above.
    equal("lock after the owner's end", libc::EOWNERDEAD, unsafe { libc::pthread_mutex_lock(mutex) })
}

/// `pthread_join` waits for the address that the kernel clears when the thread ends.
fn join(checkpoint: &Checkpoint) -> Result<(), String> {
    let barrier = Arc::new(Barrier::new(4));
    let threads: Vec<_> = (0..3)
        .map(|number| {
            let barrier = barrier.clone();
            std::thread::spawn(move || {
                barrier.wait();
                barrier.wait();
                std::thread::sleep(Duration::from_millis(number));
                number
            })
        })
        .collect();
    barrier.wait();
    checkpoint.wait()?;
    barrier.wait();
    for (number, thread) in threads.into_iter().enumerate() {
        equal("result of a thread", number as u64, thread.join().map_err(|_| "a thread panicked")?)?;
    }
    Ok(())
}

static DIED: AtomicI32 = AtomicI32::new(0);

extern "C" fn note(signal: i32) {
    DIED.store(signal, Ordering::SeqCst);
}

fn death_of_the_parent(checkpoint: &Checkpoint) -> Result<(), String> {
    prctl(libc::PR_SET_CHILD_SUBREAPER, [1, 0, 0, 0])?;
    let told = Told::new()?;
    let child = in_child(|| {
        in_child(|| {
            // SAFETY: the handler only stores to an atomic.
            unsafe { libc::signal(libc::SIGUSR1, note as *const () as usize) };
            prctl(libc::PR_SET_PDEATHSIG, [libc::SIGUSR1 as u64, 0, 0, 0])?;
            told.tell();
            checkpoint.wait_for_go()?;
            eventually("the parent's death is told", || DIED.load(Ordering::SeqCst) == libc::SIGUSR1)
        })?;
        checkpoint.wait_for_go()
    })?;
    told.wait()?;
    checkpoint.wait()?;
    child.passed()?;
    let mut status = 0;
    // SAFETY: waits for whatever child there is.
    done("waitpid", unsafe { libc::waitpid(-1, &mut status, 0) })?;
    equal("wait status of the grandchild", 0, status)
}

/// The root of a tree that is restored by a ckpt which then ends: that is not its parent's end.
fn end_of_the_restorer(checkpoint: &Checkpoint) -> Result<(), String> {
    prctl(libc::PR_SET_PDEATHSIG, [libc::SIGKILL as u64, 0, 0, 0])?;
    checkpoint.wait()
}

fn seccomp(checkpoint: &Checkpoint) -> Result<(), String> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, [1, 0, 0, 0])?;
    // BPF_RET | BPF_K: allow everything.
    let mut filter = [libc::sock_filter { code: 6, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW }];
    let program = libc::sock_fprog { len: 1, filter: filter.as_mut_ptr() };
    prctl(libc::PR_SET_SECCOMP, [libc::SECCOMP_MODE_FILTER.into(), &raw const program as u64, 0, 0])?;
    checkpoint.wait()?;
    equal("PR_GET_SECCOMP", 2, prctl(libc::PR_GET_SECCOMP, [0; 4])?)
}
