//! Nice values, policies, affinity, I/O priority, timer slack and memory policy of threads.

use std::sync::{Arc, Barrier};

use crate::case::{Case, Checkpoint};
use crate::expect::{done, equal, that};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("scheduling/of-the-process", &["scheduling"], of_the_process),
        Case::new("scheduling/policies", &["scheduling"], policies).privileged("the policies take CAP_SYS_NICE"),
        Case::new("scheduling/deadline", &["scheduling"], deadline).privileged("the policies take CAP_SYS_NICE"),
        Case::new("scheduling/affinity", &["scheduling"], affinity),
        Case::new("scheduling/small-settings", &["scheduling"], small_settings)
            .privileged("the priorities take CAP_SYS_NICE"),
    ]
}

/// `struct sched_attr`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
struct Attr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
    util_min: u32,
    util_max: u32,
}

const SIZE: u32 = size_of::<Attr>() as u32;
const RESET_ON_FORK: u64 = 1;

impl Attr {
    fn new(policy: i32) -> Attr {
        Attr { size: SIZE, policy: policy as u32, ..Attr::default() }
    }

    fn set(self) -> Result<(), String> {
        // SAFETY: a sched_attr.
        let set = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &self, 0) };
        done(&format!("sched_setattr({self:?})"), set).map(drop)
    }

    fn get() -> Result<Attr, String> {
        let mut attr = Attr::default();
        // SAFETY: room for a sched_attr.
        done("sched_getattr", unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &mut attr, SIZE, 0) })?;
        Ok(attr)
    }
}

fn nice() -> i64 {
    // SAFETY: has only numbers; gives 20 - nice.
    20 - unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, 0) }
}

fn set_nice(nice: i32) -> Result<(), String> {
    // SAFETY: has only numbers.
    done("setpriority", unsafe { libc::syscall(libc::SYS_setpriority, libc::PRIO_PROCESS, 0, nice) }).map(drop)
}

/// Threads that set something up, wait for the restore, and compare.
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
                equal("scheduling of a thread", before?, look()?)
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
    equal("scheduling of the main thread", before, look()?)
}

fn look() -> Result<(Attr, i64), String> {
    Ok((Attr::get()?, nice()))
}

fn of_the_process(checkpoint: &Checkpoint) -> Result<(), String> {
    set_nice(7)?;
    threads(checkpoint, vec![Box::new(|| set_nice(11)), Box::new(|| Ok(()))], look)
}

fn policies(checkpoint: &Checkpoint) -> Result<(), String> {
    threads(
        checkpoint,
        vec![
            Box::new(|| Attr { priority: 5, ..Attr::new(libc::SCHED_FIFO) }.set()),
            Box::new(|| {
                // The nice value is kept for when the policy is a fair one again.
                set_nice(3)?;
                Attr { priority: 2, flags: RESET_ON_FORK, ..Attr::new(libc::SCHED_RR) }.set()
            }),
            Box::new(|| Attr { nice: -4, ..Attr::new(libc::SCHED_BATCH) }.set()),
            Box::new(|| Attr::new(libc::SCHED_IDLE).set()),
            Box::new(|| Attr { nice: 1, flags: RESET_ON_FORK, ..Attr::new(libc::SCHED_OTHER) }.set()),
            Box::new(|| Attr { runtime: 3_000_000, ..Attr::new(libc::SCHED_OTHER) }.set()),
        ],
        look,
    )
}

fn deadline(checkpoint: &Checkpoint) -> Result<(), String> {
    threads(
        checkpoint,
        vec![Box::new(|| {
            let (runtime, deadline, period) = (2_000_000, 20_000_000, 50_000_000);
            Attr { runtime, deadline, period, ..Attr::new(libc::SCHED_DEADLINE) }.set()
        })],
        look,
    )
}

fn cpus() -> Result<Vec<u8>, String> {
    let mut mask = vec![0u8; 1024];
    // SAFETY: room for a mask.
    let size = unsafe { libc::syscall(libc::SYS_sched_getaffinity, 0, mask.len(), mask.as_mut_ptr()) };
    mask.truncate(done("sched_getaffinity", size)? as usize);
    Ok(mask)
}

/// Binds the thread to the first or last of its CPUs.
fn bind(last: bool) -> Result<(), String> {
    let mask = cpus()?;
    let mut all = (0..mask.len() * 8).filter(|cpu| mask[cpu / 8] >> (cpu % 8) & 1 != 0);
    let cpu = if last { all.next_back() } else { all.next() }.ok_or("there is no CPU")?;
    let mut one = vec![0u8; mask.len()];
    one[cpu / 8] = 1 << (cpu % 8);
    // SAFETY: a mask of this length.
    done("sched_setaffinity", unsafe { libc::syscall(libc::SYS_sched_setaffinity, 0, one.len(), one.as_ptr()) })
        .map(drop)
}

fn affinity(checkpoint: &Checkpoint) -> Result<(), String> {
    threads(checkpoint, vec![Box::new(|| bind(false)), Box::new(|| bind(true)), Box::new(|| Ok(()))], cpus)
}

/// I/O priority, timer slack, memory policy.
fn small() -> Result<(i64, i64, i32, u64), String> {
    let (mut mode, mut nodes) = (0i32, [0u64; 16]);
    // SAFETY: all have numbers, or room for what they write.
    unsafe {
        Ok((
            done("ioprio_get", libc::syscall(libc::SYS_ioprio_get, 1, 0))?,
            done("PR_GET_TIMERSLACK", libc::syscall(libc::SYS_prctl, libc::PR_GET_TIMERSLACK))?,
            {
                done("get_mempolicy", libc::syscall(libc::SYS_get_mempolicy, &mut mode, &mut nodes, 1024, 0, 0))?;
                mode
            },
            nodes[0],
        ))
    }
}

fn set_slack(nanoseconds: u64) -> Result<(), String> {
    // SAFETY: has only numbers.
    done("PR_SET_TIMERSLACK", unsafe { libc::syscall(libc::SYS_prctl, libc::PR_SET_TIMERSLACK, nanoseconds) }).map(drop)
}

fn set_io_priority(class: i32, level: i32) -> Result<(), String> {
    // SAFETY: has only numbers.
    done("ioprio_set", unsafe { libc::syscall(libc::SYS_ioprio_set, 1, 0, class << 13 | level) }).map(drop)
}

fn small_settings(checkpoint: &Checkpoint) -> Result<(), String> {
    const MPOL_PREFERRED: i32 = 1;
    set_slack(123_456)?;
    set_io_priority(2, 6)?;
    let nodes = [1u64];
    // SAFETY: a mask of 64 nodes.
    let set = unsafe { libc::syscall(libc::SYS_set_mempolicy, MPOL_PREFERRED, &nodes, 64) };
    done("set_mempolicy", set)?;
    that("the settings are there", small()?.0 == (2 << 13 | 6))?;
    threads(
        checkpoint,
        vec![
            Box::new(|| set_slack(1)),
            Box::new(|| set_slack(50_000)),
            Box::new(|| set_io_priority(3, 0)),
            Box::new(|| set_io_priority(1, 4)),
        ],
        small,
    )
}
