//! How a thread is scheduled: nice value, policy, priority and deadline, clamps, affinity, I/O priority, timer slack.
//!
//! Not kept: the cgroup, the nice value of the session's autogroup (`/proc/PID/autogroup`), the slack that
//! `PR_SET_TIMERSLACK` of 0 goes back to, and an I/O context shared by `CLONE_IO`. Refused: a core scheduling cookie, which
//! cannot be made again.

use crate::args;
use crate::batch::Sysno;
use crate::error::{DumpError, RestoreError};
use crate::ourselves::{Capability, ourselves};
use crate::resource::threads::{Answers, MOST_NODES, MemoryPolicy, SCHED_ATTR_SIZE};
use crate::resource::{Check, Collect, OfThread, Rebuild, Resource};

/// How a thread is scheduled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scheduling {
    /// `SCHED_*`.
    pub policy: u32,
    /// `SCHED_FLAG_*`.
    pub flags: u64,
    pub nice: i32,
    /// Of `SCHED_FIFO` and `SCHED_RR`.
    pub priority: u32,
    /// Nanoseconds: of `SCHED_DEADLINE`, or the slice of a fair policy (kernel 6.12).
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
    /// Utilisation clamps.
    pub util_min: u32,
    pub util_max: u32,
    /// CPUs it may run on, bit by bit; `None` if it may run on all that the host had.
    pub affinity: Option<Vec<u64>>,
    /// `ioprio_get`.
    pub io_priority: i32,
    /// Nanoseconds.
    pub timer_slack: u64,
    pub memory_policy: MemoryPolicy,
}

const SCHED_FLAG_UTIL_CLAMP: u64 = 0x60;
const IOPRIO_WHO_PROCESS: i32 = 1;
const IOPRIO_CLASS_REALTIME: i32 = 1;
const IOPRIO_CLASS_SHIFT: i32 = 13;
const PR_SET_TIMERSLACK: i32 = 29;
const SCHED_DEADLINE: u32 = 6;

impl Scheduling {
    fn read(answers: &Answers) -> Option<Scheduling> {
        let attr = &answers.sched_attr;
        let u32_at = |at: usize| u32::from_ne_bytes(attr[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_ne_bytes(attr[at..at + 8].try_into().expect("eight bytes"));
        let affinity = trimmed(cpu_mask(answers.status.field("Cpus_allowed")?)?);
        Some(Scheduling {
            policy: u32_at(4),
            flags: u64_at(8),
            nice: answers.nice,
            priority: u32_at(20),
            runtime: u64_at(24),
            deadline: u64_at(32),
            period: u64_at(40),
            util_min: u32_at(48),
            util_max: u32_at(52),
            affinity: (!covers(&affinity, &ourselves().online_cpus)).then_some(affinity),
            io_priority: answers.io_priority,
            timer_slack: answers.timer_slack,
            memory_policy: answers.memory_policy.clone(),
        })
    }

    fn is_fair(&self) -> bool {
        const FAIR: [i32; 3] = [libc::SCHED_OTHER, libc::SCHED_BATCH, libc::SCHED_IDLE];
        FAIR.contains(&(self.policy as i32))
    }

    /// The parts that `sched_setattr` sets.
    fn attributes(&self) -> [u64; 9] {
        let Scheduling { policy, flags, nice, priority, runtime, deadline, period, util_min, util_max, .. } = self;
        [
            u64::from(*policy),
            *flags,
            *nice as u64,
            u64::from(*priority),
            *runtime,
            *deadline,
            *period,
            u64::from(*util_min),
            u64::from(*util_max),
        ]
    }
}

/// Parses `Cpus_allowed`: hexadecimal words of 32 bits, the highest first.
fn cpu_mask(text: &str) -> Option<Vec<u64>> {
    let words: Option<Vec<u64>> = text.split(',').map(|word| u64::from_str_radix(word, 16).ok()).collect();
    let words: Vec<u64> = words?.into_iter().rev().collect();
    Some(words.chunks(2).map(|pair| pair[0] | pair.get(1).map_or(0, |high| high << 32)).collect())
}

fn trimmed(mut mask: Vec<u64>) -> Vec<u64> {
    while mask.last() == Some(&0) {
        mask.pop();
    }
    mask
}

/// Whether `mask` has every bit of `part`.
fn covers(mask: &[u64], part: &[u64]) -> bool {
    part.iter().enumerate().all(|(index, word)| word & !mask.get(index).copied().unwrap_or(0) == 0)
}

/// The way a thread is scheduled.
pub struct ThreadScheduling;

impl Resource for ThreadScheduling {
    const NAME: &'static str = "scheduling";
    type Scope = OfThread;
    type Saved = Scheduling;

    fn collect(context: &mut Collect<'_>) -> Result<Scheduling, DumpError> {
        let tid = context.tid();
        if context.answers().core_cookie.is_some_and(|cookie| cookie != 0) {
            context.refuse(
                format!("thread {tid}"),
                "it has a core scheduling cookie, which cannot be made again",
                "start the program without core scheduling",
            );
        }
        Scheduling::read(context.answers()).ok_or_else(|| {
            let source = std::io::Error::new(std::io::ErrorKind::InvalidData, "no Cpus_allowed");
            context.io_error("/proc/PID/status", source)
        })
    }

    fn check(saved: &Scheduling, context: &mut Check<'_>) {
        let ours = ourselves();
        if let Some(affinity) = &saved.affinity
            && !covers(&ours.online_cpus, affinity)
        {
            let missing = (0..affinity.len() * 64)
                .find(|cpu| affinity[cpu / 64] & !ours.online_cpus.get(cpu / 64).unwrap_or(&0) & 1 << (cpu % 64) != 0);
            context.refuse(
                "affinity",
                format!("it is bound to CPU {}, which this host has not", missing.unwrap_or(0)),
                "restore on a host that has it, or have the program change its affinity before the dump",
            );
        }
        let realtime = !saved.is_fair() || saved.io_priority >> IOPRIO_CLASS_SHIFT == IOPRIO_CLASS_REALTIME;
        if realtime && !ours.may(Capability::SYS_NICE) {
            context.refuse("policy", "it is a real-time one", "restore with CAP_SYS_NICE");
        }
        // RLIMIT_NICE counts the other way round: 20 - nice.
        let lowest = ours.nice.min(20 - ours.hard_limits[libc::RLIMIT_NICE as usize].min(40) as i32);
        if saved.nice < lowest && !ours.may(Capability::SYS_NICE) {
            context.refuse(
                "nice",
                format!("it was {}, and that of ckpt is {}", saved.nice, ours.nice),
                "restore with CAP_SYS_NICE, or raise RLIMIT_NICE",
            );
        }
        if saved.memory_policy.nodes.len() * 64 > MOST_NODES {
            context.refuse("memory policy", "it names impossible nodes", "the image is damaged");
        }
    }

    fn rebuild(saved: &Scheduling, context: &mut Rebuild<'_>) -> Result<(), RestoreError> {
        let initial = Scheduling::read(context.initial)
            .ok_or_else(|| context.mismatch("the skeleton's /proc/PID/status has no Cpus_allowed"))?;
        let batch = context.later();
        if saved.affinity != initial.affinity {
            // All: the kernel takes of it what there is.
            let mut mask = saved.affinity.clone().unwrap_or_else(|| vec![u64::MAX; 1024 / 64]);
            mask.resize(mask.len().max(1), 0);
            let mask = (batch.words(&mask), mask.len() * 8);
            batch.call(Sysno::sched_setaffinity, args![0, mask.1, mask.0]);
        }
        if saved.nice != initial.nice {
            batch.call(Sysno::setpriority, args![libc::PRIO_PROCESS, 0, saved.nice]);
        }
        let mut wanted = saved.clone();
        if saved.is_fair() && saved.runtime == initial.runtime {
            // The default slice; as a wish of the thread's own it would no longer follow the default.
            wanted.runtime = 0;
        }
        let clamped = (saved.util_min, saved.util_max) != (initial.util_min, initial.util_max);
        if saved.attributes() != initial.attributes() {
            let flags = wanted.flags | if clamped { SCHED_FLAG_UTIL_CLAMP } else { 0 };
            let half = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
            let attr = batch.words(&[
                half(SCHED_ATTR_SIZE as u32, wanted.policy),
                flags,
                half(wanted.nice as u32, wanted.priority),
                wanted.runtime,
                if wanted.policy == SCHED_DEADLINE { wanted.deadline } else { 0 },
                if wanted.policy == SCHED_DEADLINE { wanted.period } else { 0 },
                half(wanted.util_min, wanted.util_max),
            ]);
            batch.call(Sysno::sched_setattr, args![0, attr, 0]);
        }
        if saved.io_priority != initial.io_priority {
            batch.call(Sysno::ioprio_set, args![IOPRIO_WHO_PROCESS, 0, saved.io_priority]);
        }
        // Real-time threads have none.
        if saved.is_fair() && saved.timer_slack != initial.timer_slack {
            batch.call(Sysno::prctl, args![PR_SET_TIMERSLACK, saved.timer_slack]);
        }
        if saved.memory_policy != initial.memory_policy {
            let MemoryPolicy { mode, nodes } = &saved.memory_policy;
            // One more than there are bits: the kernel leaves out the last.
            let (nodes, count) =
                if nodes.is_empty() { (0.into(), 0) } else { (batch.words(nodes).into(), nodes.len() * 64 + 1) };
            let nodes: crate::batch::Arg = nodes;
            batch.call(Sysno::set_mempolicy, &[(*mode).into(), nodes, count.into()]);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_of_status() {
        assert_eq!(cpu_mask("3"), Some(vec![3]));
        assert_eq!(cpu_mask("00000001,00000000,80000000"), Some(vec![0x8000_0000, 1]));
        assert_eq!(cpu_mask("zz"), None);
    }

    #[test]
    fn one_mask_in_another() {
        assert!(covers(&[3], &[3]) && covers(&[7, 1], &[3]) && covers(&[1], &[]));
        assert!(!covers(&[1], &[3]) && !covers(&[u64::MAX], &[0, 1]));
    }
}
