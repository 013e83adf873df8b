//! The programs that are dumped. Each counts on in a shared file, so that it can be seen that it works.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

pub struct Load {
    pub name: &'static str,
    /// Touched memory of the root, in MiB.
    memory: usize,
    processes: usize,
    threads: usize,
}

pub const LOADS: &[Load] = &[
    Load { name: "tiny", memory: 0, processes: 1, threads: 1 },
    Load { name: "10-mib", memory: 10, processes: 1, threads: 1 },
    Load { name: "1-gib", memory: 1024, processes: 1, threads: 1 },
    Load { name: "tree-100", memory: 0, processes: 100, threads: 1 },
    Load { name: "threads-200", memory: 0, processes: 1, threads: 200 },
];

/// One counter for each thread of the load, on a page of its own file.
type Counters = [AtomicU64; 512];

fn counters(path: &Path) -> std::io::Result<&'static Counters> {
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
    file.set_len(4096)?;
    // SAFETY: a shared mapping of a file that is not made shorter, never unmapped; every bit pattern is a valid counter.
    unsafe {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        let address = libc::mmap(std::ptr::null_mut(), 4096, protection, flags, file.as_raw_fd(), 0);
        if address == libc::MAP_FAILED { Err(std::io::Error::last_os_error()) } else { Ok(&*address.cast()) }
    }
}

impl Load {
    fn counted(&self) -> usize {
        self.processes * self.threads
    }

    /// Waits until each thread of the load has counted on from where it is now.
    pub fn wait_until_it_works(&self, progress: &Path) -> Result<(), String> {
        let counters = counters(progress).map_err(|error| format!("{}: {error}", progress.display()))?;
        let before: Vec<u64> = counters[..self.counted()].iter().map(|counter| counter.load(SeqCst)).collect();
        let begin = Instant::now();
        let still = |(counter, before): (&AtomicU64, &u64)| counter.load(SeqCst) <= *before;
        while counters.iter().zip(&before).any(still) {
            if begin.elapsed() > Duration::from_secs(60) {
                return Err(format!("{} does not go on", self.name));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        // SAFETY: the mapping made above, which nothing uses any more.
        unsafe { libc::munmap(counters.as_ptr() as *mut libc::c_void, 4096) };
        Ok(())
    }
}

/// Is the load of this name, until it is killed.
pub fn run(name: &str, progress: &Path) -> ExitCode {
    let Some(load) = LOADS.iter().find(|load| load.name == name) else { return ExitCode::from(2) };
    let Ok(counters) = counters(progress) else { return ExitCode::FAILURE };
    // Pages that no two of are alike, and none is zero.
    let mut memory = vec![0_u64; load.memory << 17];
    for (index, word) in memory.iter_mut().enumerate() {
        *word = (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    let mut index = 0;
    for child in 1..load.processes {
        // SAFETY: one thread so far, and the child goes on as a process of its own.
        if unsafe { libc::fork() } == 0 {
            index = child;
            break;
        }
    }
    for counter in &counters[1..load.threads] {
        std::thread::spawn(move || count(counter, &[]));
    }
    count(&counters[index], &memory)
}

/// Checks a page of the memory each time, so that memory that is not what it was is an end of the counting.
fn count(counter: &AtomicU64, memory: &[u64]) -> ! {
    let mut at = 0;
    loop {
        if !memory.is_empty() {
            at = (at + 12_345 * 512) % memory.len();
            if memory[at] != (at as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) {
                std::process::abort();
            }
        }
        counter.fetch_add(1, SeqCst);
        std::thread::sleep(Duration::from_millis(5));
    }
}
