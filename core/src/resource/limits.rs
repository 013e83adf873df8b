//! Resource limits (`getrlimit`), soft and hard.
//!
//! A skeleton begins with the limits of ckpt. While it is being built its soft limits are as high as its hard ones
//! ([`relax`]), which the root hands on to its descendants, so that a program with more descriptors than our soft limit
//! can be rebuilt; the saved limits come late.
//! What is counted against them is not saved but counted anew: CPU time begins at zero.

use crate::args;
use crate::batch::{Batch, Slot, Sysno};
use crate::error::{DumpError, RestoreError};
use crate::ourselves::{Capability, ourselves};
use crate::resource::{Check, Collect, OfProcess, Rebuild, Resource};

/// The limits, by number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// One for each `RLIMIT_*`, in the order of their numbers.
    pub limits: Vec<Limit>,
}

/// One limit, in its own unit; `RLIM_INFINITY` is `u64::MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    pub soft: u64,
    pub hard: u64,
}

/// The names, by number (`asm-generic/resource.h`).
pub const NAMES: [&str; 16] = [
    "RLIMIT_CPU",
    "RLIMIT_FSIZE",
    "RLIMIT_DATA",
    "RLIMIT_STACK",
    "RLIMIT_CORE",
    "RLIMIT_RSS",
    "RLIMIT_NPROC",
    "RLIMIT_NOFILE",
    "RLIMIT_MEMLOCK",
    "RLIMIT_AS",
    "RLIMIT_LOCKS",
    "RLIMIT_SIGPENDING",
    "RLIMIT_MSGQUEUE",
    "RLIMIT_NICE",
    "RLIMIT_RTPRIO",
    "RLIMIT_RTTIME",
];

/// Resource limits.
pub struct ResourceLimits;

impl Resource for ResourceLimits {
    const NAME: &'static str = "limits";
    type Scope = OfProcess;
    type Saved = Limits;

    fn collect(context: &mut Collect<'_>) -> Result<Limits, DumpError> {
        let asked = context.asked;
        let limits = asked.limits.map(|limit| {
            let words = asked.replies.words(limit);
            Limit { soft: words[0], hard: words[1] }
        });
        Ok(Limits { limits: limits.to_vec() })
    }

    fn check(saved: &Limits, context: &mut Check<'_>) {
        if saved.limits.len() != NAMES.len() || saved.limits.iter().any(|limit| limit.soft > limit.hard) {
            context.refuse("", "they are no set of limits", "the image is damaged");
            return;
        }
        let raising = ourselves().may(Capability::SYS_RESOURCE);
        for ((limit, ours), name) in saved.limits.iter().zip(ourselves().hard_limits).zip(NAMES) {
            if limit.hard > ours && !raising {
                context.refuse(
                    name,
                    format!("the hard limit was {}, and that of ckpt is {}", shown(limit.hard), shown(ours)),
                    "restore with CAP_SYS_RESOURCE, or raise the hard limit of the shell before",
                );
            }
        }
    }

    fn rebuild(saved: &Limits, context: &mut Rebuild<'_>) -> Result<(), RestoreError> {
        let mut batch = Batch::new();
        for (number, limit) in saved.limits.iter().enumerate() {
            let limit = batch.words(&[limit.soft, limit.hard]);
            batch.call(Sysno::prlimit64, args![0, number, limit, 0]);
        }
        context.run(&batch).map(drop)
    }
}

/// A `struct rlimit` for each limit.
pub type Asked = [Slot; 16];

/// Asked inside: prlimit(2) on a process of other ids needs CAP_SYS_RESOURCE.
pub fn ask(batch: &mut Batch) -> Asked {
    std::array::from_fn(|number| {
        let limit = batch.room(16);
        batch.call(Sysno::prlimit64, args![0, number, 0, limit]);
        limit
    })
}

fn shown(limit: u64) -> String {
    if limit == libc::RLIM_INFINITY { "unlimited".into() } else { limit.to_string() }
}

/// Raises the soft limits of whoever runs the batch to its hard ones, which are ours, so that none is in the way.
pub fn relax(batch: &mut Batch) {
    for (number, &hard) in ourselves().hard_limits.iter().enumerate() {
        let limit = batch.words(&[hard, hard]);
        batch.call(Sysno::prlimit64, args![0, number, limit, 0]);
    }
}
