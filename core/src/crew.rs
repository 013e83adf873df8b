//! Threads that work on the processes of a tree at the same time, each on a processor of its own with its processes.
//!
//! A skeleton and whoever drives it take turns: to switch between them on one processor takes a fraction of the time of
//! waking another. So a restorer keeps them together, and here they are moved together.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid as RawPid;

use crate::error::RestoreError;
use crate::target::Target;

/// So many processes are worth a thread.
const ENOUGH: usize = 8;

/// Does something with each target, in several threads where there are many.
///
/// # Errors
/// One of those that happened; what the others do is ended at the next target.
pub fn each<T: Sync>(
    targets: &mut [Box<dyn Target>],
    items: &[T],
    work: impl Fn(usize, &mut dyn Target, &T) -> Result<(), RestoreError> + Sync,
) -> Result<(), RestoreError> {
    let processors = processors();
    let crews = processors.len().min(targets.len() / ENOUGH).max(1);
    if crews == 1 {
        let mut all = targets.iter_mut().zip(items).enumerate();
        return all.try_for_each(|(index, (target, item))| work(index, &mut **target, item));
    }
    let part = targets.len().div_ceil(crews);
    let failed = AtomicBool::new(false);
    let parts: Vec<_> = targets.chunks_mut(part).zip(items.chunks(part)).map(Mutex::new).collect();
    // The part of a number, by whoever comes first.
    let attend = |number: usize| {
        let processor = processors[number];
        pin(RawPid::from_raw(0), processor);
        let (targets, items) = &mut *parts[number].lock().expect("no panic");
        for (index, (target, item)) in targets.iter_mut().zip(*items).enumerate() {
            if failed.load(Ordering::Relaxed) {
                break;
            }
            for tid in target.threads() {
                pin(RawPid::from_raw(tid.0), processor);
            }
            let done = work(number * part + index, &mut **target, item);
            if done.is_err() {
                failed.store(true, Ordering::Relaxed);
                return done;
            }
        }
        Ok(())
    };
    let attend = &attend;
    std::thread::scope(|scope| {
        let begin =
            |number| std::thread::Builder::new().spawn_scoped(scope, move || attend(number)).map_err(|_| number);
        let threads: Vec<_> = (0..parts.len()).map(begin).collect();
        threads.into_iter().try_for_each(|begun| match begun {
            Ok(thread) => thread.join().expect("no panic"),
            // No more threads may be started: it is our own work then.
            Err(number) => attend(number),
        })
    })
}

/// The processors that ckpt may use, before anything is pinned.
static PROCESSORS: OnceLock<Vec<usize>> = OnceLock::new();

/// The processors that ckpt may use. Asked for the first time before a restorer keeps us on one of them.
pub fn processors() -> &'static [usize] {
    PROCESSORS.get_or_init(|| {
        let Ok(allowed) = sched_getaffinity(RawPid::from_raw(0)) else { return vec![0] };
        (0..CpuSet::count()).filter(|&processor| allowed.is_set(processor).unwrap_or(false)).collect()
    })
}

fn pin(thread: RawPid, processor: usize) {
    let mut one = CpuSet::new();
    // Where it may not be, it is only slower.
    let _ = one.set(processor).and_then(|()| sched_setaffinity(thread, &one));
}

/// Lets the calling thread run beside a skeleton, on any processor that is ours.
pub fn leave_pin() {
    let mut all = CpuSet::new();
    for &processor in processors() {
        let _ = all.set(processor);
    }
    let _ = sched_setaffinity(RawPid::from_raw(0), &all);
}
