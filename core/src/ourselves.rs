//! What this process, ckpt, is and may do: what a plan compares a saved process with.
//!
//! The skeletons of a restore begin with our credentials and limits, so what we lack they cannot be given.

use std::sync::LazyLock;

use nix::sys::resource::{Resource, getrlimit};

use crate::procfs::{ProcDir, Status};
use crate::target::Pid;

/// `CAP_*` of `linux/capability.h`, by number.
const CAPABILITIES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// A capability, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability(pub u32);

impl Capability {
    pub const SETGID: Capability = Capability(6);
    pub const SETUID: Capability = Capability(7);
    pub const SETPCAP: Capability = Capability(8);
    pub const SYS_CHROOT: Capability = Capability(18);
    pub const SYS_NICE: Capability = Capability(23);
    pub const SYS_RESOURCE: Capability = Capability(24);
    pub const WAKE_ALARM: Capability = Capability(35);

    pub fn is_in(self, set: u64) -> bool {
        set >> self.0 & 1 != 0
    }
}

/// The names of a set of capabilities: `CAP_KILL, CAP_SETUID`.
pub fn capability_names(set: u64) -> String {
    let name = |number: u32| match CAPABILITIES.get(number as usize) {
        Some(name) => name.to_string(),
        None => format!("capability {number}"),
    };
    (0..64).filter(|&number| Capability(number).is_in(set)).map(name).collect::<Vec<_>>().join(", ")
}

/// This process.
#[derive(Debug)]
pub struct Ourselves {
    /// `/proc/self/status`.
    pub status: Status,
    pub nice: i32,
    /// Hard limits, by `RLIMIT_*`.
    pub hard_limits: [u64; 16],
    /// `/proc/self/oom_score_adj`.
    pub oom_score_adj: i32,
    /// The label of a Linux security module (`/proc/self/attr/current`), empty where there is none.
    pub security_label: Vec<u8>,
    /// `/sys/devices/system/cpu/online`, bit by bit; empty where it cannot be read.
    pub online_cpus: Vec<u64>,
    /// `/sys/devices/system/node/online` has more than one.
    pub several_nodes: bool,
}

impl Ourselves {
    /// Whether a capability is effective.
    pub fn may(&self, capability: Capability) -> bool {
        self.status.mask("CapEff").is_some_and(|effective| capability.is_in(effective))
    }
}

/// This process, looked at once.
///
/// # Panics
/// If `/proc` is not mounted: nothing of ckpt works then.
pub fn ourselves() -> &'static Ourselves {
    static OURSELVES: LazyLock<Ourselves> = LazyLock::new(|| {
        let proc = ProcDir::open(Pid(std::process::id() as i32)).expect("/proc is mounted");
        Ourselves {
            status: proc.status().expect("/proc/self/status can be read"),
            nice: proc.stat_line().map_or(0, |stat| stat.nice),
            hard_limits: LIMITS.map(|limit| getrlimit(limit).map_or(0, |(_, hard)| hard)),
            oom_score_adj: proc.text("oom_score_adj").ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0),
            security_label: security_label(&proc),
            online_cpus: host_list("/sys/devices/system/cpu/online"),
            several_nodes: host_list("/sys/devices/system/node/online")
                .iter()
                .map(|word| word.count_ones())
                .sum::<u32>()
                > 1,
        }
    });
    &OURSELVES
}

/// `/proc/PID/attr/current`, without the end of line or NUL; empty where no security module has a say.
pub fn security_label(proc: &ProcDir) -> Vec<u8> {
    let mut label = proc.read("attr/current").unwrap_or_default();
    while label.last().is_some_and(|&last| last == b'\n' || last == 0) {
        label.pop();
    }
    label
}

/// Reads a list like `0-3,8` as a bit mask.
fn host_list(path: &str) -> Vec<u64> {
    std::fs::read_to_string(path).ok().and_then(|list| parse_list(&list)).unwrap_or_default()
}

fn parse_list(list: &str) -> Option<Vec<u64>> {
    let mut mask = Vec::new();
    for range in list.trim().split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        for number in first.parse::<usize>().ok()?..=last.parse::<usize>().ok()? {
            if mask.len() <= number / 64 {
                mask.resize(number / 64 + 1, 0);
            }
            mask[number / 64] |= 1 << (number % 64);
        }
    }
    Some(mask)
}

/// The limits in the order of their numbers.
const LIMITS: [Resource; 16] = [
    Resource::RLIMIT_CPU,
    Resource::RLIMIT_FSIZE,
    Resource::RLIMIT_DATA,
    Resource::RLIMIT_STACK,
    Resource::RLIMIT_CORE,
    Resource::RLIMIT_RSS,
    Resource::RLIMIT_NPROC,
    Resource::RLIMIT_NOFILE,
    Resource::RLIMIT_MEMLOCK,
    Resource::RLIMIT_AS,
    Resource::RLIMIT_LOCKS,
    Resource::RLIMIT_SIGPENDING,
    Resource::RLIMIT_MSGQUEUE,
    Resource::RLIMIT_NICE,
    Resource::RLIMIT_RTPRIO,
    Resource::RLIMIT_RTTIME,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus() {
        assert_eq!(parse_list("0-3,8\n"), Some(vec![0x10f]));
        assert_eq!(parse_list("64"), Some(vec![0, 1]));
        assert_eq!(parse_list(""), Some(vec![]));
        assert_eq!(parse_list("x"), None);
    }

    #[test]
    fn names_of_capabilities() {
        assert_eq!(capability_names(1 << 7 | 1 << 24), "CAP_SETUID, CAP_SYS_RESOURCE");
        assert_eq!(capability_names(1 << 60), "capability 60");
    }

    #[test]
    fn limits_are_in_the_order_of_their_numbers() {
        for (number, limit) in LIMITS.into_iter().enumerate() {
            assert_eq!(limit as usize, number);
        }
    }

    #[test]
    fn this_process() {
        assert!(ourselves().status.mask("CapBnd").is_some());
        assert!(!ourselves().online_cpus.is_empty());
    }
}
