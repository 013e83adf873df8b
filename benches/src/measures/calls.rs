//! What one call takes: a program that makes it many times, and prints nanoseconds. It runs with and without a tool.

use std::process::ExitCode;
use std::time::{Duration, Instant};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    name: String,
    /// How many; milliseconds of `spin`
    count: u64,
}

/// A call, and how many make a measurement of about 20 ms.
pub struct Call {
    pub name: &'static str,
    pub count: u64,
    run: fn(u64) -> bool,
}

pub const CALLS: &[Call] = &[
    Call { name: "open+close", count: 20_000, run: open_close },
    Call { name: "stat", count: 30_000, run: stat },
    Call { name: "malloc+free", count: 1_000_000, run: malloc_free },
    Call { name: "read+write", count: 30_000, run: read_write },
    Call { name: "pipe+close", count: 8_000, run: pipe_close },
    Call { name: "mutex", count: 2_000_000, run: mutex },
    Call { name: "clock_gettime", count: 800_000, run: clock },
    Call { name: "getpid", count: 200_000, run: getpid },
    Call { name: "pthread", count: 1_000, run: thread },
    Call { name: "fork+wait", count: 150, run: fork },
    Call { name: "spawn-true", count: 25, run: spawn },
];

pub fn run(arguments: &Arguments) -> ExitCode {
    if arguments.name == "spin" {
        let (begun, time) = (Instant::now(), Duration::from_millis(arguments.count));
        while begun.elapsed() < time {}
        return ExitCode::SUCCESS;
    }
    if arguments.name == "rss" {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
        println!("{}", line.trim().trim_end_matches(" kB"));
        return ExitCode::SUCCESS;
    }
    let Some(call) = CALLS.iter().find(|call| call.name == arguments.name) else { return ExitCode::from(2) };
    // A tenth to warm up.
    if !(call.run)(arguments.count / 10 + 1) {
        return ExitCode::FAILURE;
    }
    let begun = Instant::now();
    let good = (call.run)(arguments.count);
    let took = begun.elapsed();
    println!("{}", took.as_nanos() as f64 / arguments.count as f64);
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

const NULL: *const libc::c_char = c"/dev/null".as_ptr();
const ZERO: *const libc::c_char = c"/dev/zero".as_ptr();

fn open_close(count: u64) -> bool {
    // SAFETY: a text that lives for ever, and the descriptor that was just opened.
    (0..count).all(|_| unsafe { libc::close(libc::open(NULL, libc::O_RDONLY)) == 0 })
}

fn stat(count: u64) -> bool {
    // SAFETY: a text that lives for ever, and room for the answer.
    (0..count).all(|_| unsafe {
        let mut found: libc::stat = std::mem::zeroed();
        libc::stat(NULL, &mut found) == 0
    })
}

fn malloc_free(count: u64) -> bool {
    // SAFETY: what was allocated is written to once, within its size, and freed once.
    (0..count).all(|_| unsafe {
        let memory = std::hint::black_box(libc::malloc(64));
        let good = !memory.is_null();
        if good {
            memory.cast::<u8>().write_volatile(1);
        }
        libc::free(memory);
        good
    })
}

fn read_write(count: u64) -> bool {
    // SAFETY: descriptors of ours, and a buffer of the size that is said.
    unsafe {
        let (zero, null) = (libc::open(ZERO, libc::O_RDONLY), libc::open(NULL, libc::O_WRONLY));
        let mut buffer = [0_u8; 512];
        let good = (0..count).all(|_| {
            libc::read(zero, buffer.as_mut_ptr().cast(), 512) == 512
                && libc::write(null, buffer.as_ptr().cast(), 512) == 512
        });
        libc::close(zero);
        libc::close(null);
        good
    }
}

fn pipe_close(count: u64) -> bool {
    // SAFETY: room for two descriptors, each closed once.
    (0..count).all(|_| unsafe {
        let mut ends = [0; 2];
        libc::pipe(ends.as_mut_ptr()) == 0 && libc::close(ends[0]) == 0 && libc::close(ends[1]) == 0
    })
}

fn mutex(count: u64) -> bool {
    // SAFETY: a mutex of this function, which it holds and lets go in turn.
    unsafe {
        let mut mutex = libc::PTHREAD_MUTEX_INITIALIZER;
        let mutex = std::hint::black_box(&raw mut mutex);
        (0..count).all(|_| libc::pthread_mutex_lock(mutex) == 0 && libc::pthread_mutex_unlock(mutex) == 0)
    }
}

fn clock(count: u64) -> bool {
    // SAFETY: room for the time.
    (0..count).all(|_| unsafe {
        let mut time: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) == 0
    })
}

fn getpid(count: u64) -> bool {
    // SAFETY: no memory is passed.
    (0..count).all(|_| unsafe { libc::getpid() > 0 })
}

extern "C" fn nothing(argument: *mut libc::c_void) -> *mut libc::c_void {
    argument
}

fn thread(count: u64) -> bool {
    // SAFETY: a thread that does nothing, joined at once.
    (0..count).all(|_| unsafe {
        let mut thread = std::mem::zeroed();
        libc::pthread_create(&mut thread, std::ptr::null(), nothing, std::ptr::null_mut()) == 0
            && libc::pthread_join(thread, std::ptr::null_mut()) == 0
    })
}

fn fork(count: u64) -> bool {
    // SAFETY: one thread; the child ends at once, and is waited for.
    (0..count).all(|_| unsafe {
        let child = libc::fork();
        if child == 0 {
            libc::_exit(0);
        }
        child > 0 && libc::waitpid(child, std::ptr::null_mut(), 0) == child
    })
}

unsafe extern "C" {
    static environ: *const *mut libc::c_char;
}

fn spawn(count: u64) -> bool {
    let name = c"/bin/true".as_ptr();
    // SAFETY: lists that end with a null, of texts that live for ever; the child is waited for. One thread.
    (0..count).all(|_| unsafe {
        let (mut child, list) = (0, [name.cast_mut(), std::ptr::null_mut()]);
        libc::posix_spawn(&mut child, name, std::ptr::null(), std::ptr::null(), list.as_ptr(), environ) == 0
            && libc::waitpid(child, std::ptr::null_mut(), 0) == child
    })
}
