//! What this host allows the backend now, and what is done instead of what it does not allow.

use std::sync::OnceLock;

use ckpt_core::{Availability, Feature, Probe, registry};
use nix::errno::Errno;

use crate::sys::{self, Userfault};

/// Without these a program could see wrong memory (all kernel 4.14 or older), so that none of it may follow.
pub const NEEDED: u64 = sys::FEATURE_EVENT_FORK
    | sys::FEATURE_EVENT_REMAP
    | sys::FEATURE_EVENT_REMOVE
    | sys::FEATURE_EVENT_UNMAP
    | sys::FEATURE_THREAD_ID;

/// Without this shared memory does not follow (kernel 4.11).
pub const SHARED: u64 = sys::FEATURE_MISSING_SHMEM;

const ALL_BEFORE: &str = "all memory is brought in before the release";
const NAMES: [(&str, u64, &str); 6] = [
    ("userfaultfd events of fork", sys::FEATURE_EVENT_FORK, ALL_BEFORE),
    ("userfaultfd events of mremap", sys::FEATURE_EVENT_REMAP, ALL_BEFORE),
    ("userfaultfd events of madvise", sys::FEATURE_EVENT_REMOVE, ALL_BEFORE),
    ("userfaultfd events of munmap", sys::FEATURE_EVENT_UNMAP, ALL_BEFORE),
    ("userfaultfd thread ids", sys::FEATURE_THREAD_ID, ALL_BEFORE),
    ("userfaultfd for shared memory", SHARED, "shared memory is brought in before the release"),
];

/// The backend that makes processes and lets them go.
pub const UNDERNEATH: &str = "ptrace";

/// How a userfaultfd is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// userfaultfd(2).
    Call,
    /// `/dev/userfaultfd` (kernel 6.1), where the call is forbidden: by a seccomp filter of a container, or to whoever is
    /// not privileged.
    Device,
}

/// What a host has for this backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Whether userfaultfd(2) makes one that sees faults of the kernel, too.
    pub call: Result<(), Errno>,
    /// Whether `/dev/userfaultfd` does.
    pub device: Result<(), Errno>,
    /// Whether the call is for everybody (`vm.unprivileged_userfaultfd`).
    pub for_everybody: bool,
    /// The bits of `UFFDIO_API`.
    pub features: u64,
    /// Whether the kernel agrees on those that are [`NEEDED`]: to be told of forks takes a capability in the initial user
    /// namespace.
    pub agrees: Result<(), Errno>,
}

impl Host {
    /// This host, as it was when it was looked at first.
    pub fn here() -> &'static Host {
        static HERE: OnceLock<Host> = OnceLock::new();
        HERE.get_or_init(Host::look)
    }

    fn look() -> Host {
        let errno = |error: std::io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        let call = Userfault::by_call().map(drop).map_err(errno);
        let device = sys::open_device().and_then(|device| Userfault::by_device(&device)).map(drop).map_err(errno);
        let everybody = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap_or_default();
        let ask = |features| Userfault::create().and_then(|fault| fault.enable(features));
        let features = ask(0).unwrap_or(0);
        let agrees = ask(features & NEEDED).map(drop).map_err(errno);
        Host { call, device, for_everybody: everybody.trim() == "1", features, agrees }
    }

    /// How a userfaultfd is made; none where there is no way.
    pub fn way(&self) -> Option<Way> {
        match (self.call, self.device) {
            (Ok(()), _) => Some(Way::Call),
            (_, Ok(())) => Some(Way::Device),
            _ => None,
        }
    }

    /// Whether memory may follow at all.
    pub fn lets_memory_follow(&self) -> bool {
        self.way().is_some() && self.features & NEEDED == NEEDED && self.agrees.is_ok()
    }

    /// Whether shared memory may.
    pub fn lets_shared_memory_follow(&self) -> bool {
        self.lets_memory_follow() && self.features & SHARED != 0
    }

    /// Why no memory may follow, in words, with what is done instead.
    pub fn obstacle(&self) -> Option<String> {
        if self.lets_memory_follow() {
            return None;
        }
        let missing: Vec<&str> =
            NAMES.iter().filter(|(_, bit, _)| NEEDED & bit != 0 && self.features & bit == 0).map(|it| it.0).collect();
        let why = match (self.way(), self.call, self.device) {
            (None, Err(Errno::ENOSYS), Err(Errno::ENOENT)) => {
                "this kernel has no userfaultfd (CONFIG_USERFAULTFD)".to_string()
            }
            (None, call, device) => {
                let said = |result: Result<(), Errno>| result.err().map_or("fine", |errno| errno.desc());
                format!(
                    "userfaultfd is not permitted: the call takes CAP_SYS_PTRACE on the host or \
                     vm.unprivileged_userfaultfd=1 ({}), and {} cannot be used instead ({})",
                    said(call),
                    sys::DEVICE,
                    said(device)
                )
            }
            _ if !missing.is_empty() => format!("this kernel has no {}", missing.join(", no ")),
            _ => format!(
                "to follow forks userfaultfd needs CAP_SYS_PTRACE on the host ({})",
                self.agrees.err().map_or("refused", |errno| errno.desc())
            ),
        };
        Some(format!("{ALL_BEFORE}: {why}"))
    }

    /// The rows of the probe.
    fn rows(&self) -> Vec<Feature> {
        let instead_of_call = match self.way() {
            Some(_) => "/dev/userfaultfd is used",
            None => ALL_BEFORE,
        };
        let instead_of_everybody = match (self.call, self.device) {
            (Ok(()), _) => "the call is permitted by CAP_SYS_PTRACE",
            (_, Ok(())) => "/dev/userfaultfd is used",
            _ => ALL_BEFORE,
        };
        let instead_of_device = match self.way() {
            Some(_) => "the call is used",
            None => ALL_BEFORE,
        };
        let mut rows = vec![
            Feature::new("userfaultfd(2)", self.call.is_ok(), instead_of_call),
            Feature::new("vm.unprivileged_userfaultfd", self.for_everybody, instead_of_everybody),
            Feature::new("/dev/userfaultfd (kernel 6.1)", self.device.is_ok(), instead_of_device),
        ];
        rows.extend(NAMES.map(|(name, bit, instead)| Feature::new(name, self.features & bit != 0, instead)));
        let may_follow = self.agrees.is_ok() && self.way().is_some();
        rows.push(Feature::new("CAP_SYS_PTRACE on the host, to follow forks", may_follow, ALL_BEFORE));
        rows
    }

    /// What the backend can do on such a host, where the backend underneath can do this.
    pub fn probe(&self, underneath: Result<(), String>) -> Probe {
        let restore = match (underneath, self.obstacle()) {
            (Err(why), _) => Availability::Unavailable(why),
            (Ok(()), Some(why)) => Availability::Reduced(why),
            (Ok(()), None) => Availability::Available,
        };
        let dump = Availability::Unavailable("restores only; dump with --backend ptrace".into());
        Probe { dump, restore, features: self.rows() }
    }
}

pub fn probe() -> Probe {
    Host::here().probe(restorer_underneath())
}

fn restorer_underneath() -> Result<(), String> {
    let backend = registry::backend(UNDERNEATH).ok().filter(|backend| backend.restorer.is_some());
    let backend = backend.ok_or(format!("this ckpt was built without the restorer of {UNDERNEATH}, which it uses"))?;
    match (backend.probe)().restore {
        Availability::Available | Availability::Reduced(_) => Ok(()),
        Availability::Unavailable(why) => Err(why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = NEEDED | SHARED;

    fn host() -> Host {
        Host { call: Ok(()), device: Ok(()), for_everybody: false, features: ALL, agrees: Ok(()) }
    }

    /// What is said of a host: whether the backend works there, and what is missing with what is done instead.
    fn check(host: Host, restore: Option<&[&str]>, missing: &[(&str, &str)]) {
        let probe = host.probe(Ok(()));
        match (&probe.restore, restore) {
            (Availability::Available, None) => {}
            (Availability::Reduced(why), Some(words)) => {
                for word in words.iter().chain(&["all memory is brought in before the release"]) {
                    assert!(why.contains(word), "{word:?} in {why:?}");
                }
            }
            (other, _) => panic!("{other:?} of {host:?}"),
        }
        assert_eq!(restore.is_none(), host.lets_memory_follow());
        let found: Vec<_> = probe.features.iter().filter(|it| !it.there).map(|it| (it.name, it.instead)).collect();
        assert_eq!(found, missing, "{host:?}");
    }

    #[test]
    fn whatever_a_host_lacks_is_said_with_what_is_done_instead() {
        let nobody = ("vm.unprivileged_userfaultfd", "the call is permitted by CAP_SYS_PTRACE");
        check(host(), None, &[nobody]);
        check(Host { for_everybody: true, ..host() }, None, &[]);
        let old = ("/dev/userfaultfd (kernel 6.1)", "the call is used");
        check(Host { device: Err(Errno::ENOENT), ..host() }, None, &[nobody, old]);
        let forbidden = Host { call: Err(Errno::EPERM), ..host() };
        let by_device = "/dev/userfaultfd is used";
        check(forbidden.clone(), None, &[("userfaultfd(2)", by_device), (nobody.0, by_device)]);
        assert_eq!(forbidden.way(), Some(Way::Device));

        let every = |instead: &'static str| NAMES.map(|it| (it.0, if it.1 == SHARED { it.2 } else { instead }));
        let ways = [("userfaultfd(2)", ALL_BEFORE), (nobody.0, ALL_BEFORE), (old.0, ALL_BEFORE)];
        let cap = ("CAP_SYS_PTRACE on the host, to follow forks", ALL_BEFORE);
        let nothing: Vec<_> = ways.into_iter().chain(every(ALL_BEFORE)).chain([cap]).collect();
        let none = Host { features: 0, agrees: Err(Errno::EPERM), device: Err(Errno::EACCES), ..forbidden };
        check(none.clone(), Some(&["not permitted", "/dev/userfaultfd", "Permission denied"]), &nothing);
        let absent = Host { call: Err(Errno::ENOSYS), device: Err(Errno::ENOENT), ..none };
        check(absent, Some(&["CONFIG_USERFAULTFD"]), &nothing);
        check(Host { agrees: Err(Errno::EPERM), ..host() }, Some(&["CAP_SYS_PTRACE on the host"]), &[nobody, cap]);
    }

    #[test]
    fn each_feature_that_a_kernel_lacks_is_said() {
        for (name, bit, instead) in NAMES {
            let lacking = Host { for_everybody: true, features: ALL & !bit, ..host() };
            let words = [name];
            check(lacking.clone(), (bit != SHARED).then_some(&words[..]), &[(name, instead)]);
            assert!(!lacking.lets_shared_memory_follow(), "{name}");
        }
    }
}
