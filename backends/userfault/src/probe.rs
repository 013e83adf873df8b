//! What this host allows the backend now, and why not.

use ckpt_core::{Availability, Probe, registry};

use crate::sys::{self, Userfault};

/// Without these a program could see wrong memory (all kernel 4.14 or older).
pub const FEATURES: u64 = sys::FEATURE_EVENT_FORK
    | sys::FEATURE_EVENT_REMAP
    | sys::FEATURE_EVENT_REMOVE
    | sys::FEATURE_EVENT_UNMAP
    | sys::FEATURE_THREAD_ID;

const NAMES: [(&str, u64); 5] = [
    ("userfaultfd events of fork", sys::FEATURE_EVENT_FORK),
    ("of mremap", sys::FEATURE_EVENT_REMAP),
    ("of madvise", sys::FEATURE_EVENT_REMOVE),
    ("of munmap", sys::FEATURE_EVENT_UNMAP),
    ("userfaultfd thread ids", sys::FEATURE_THREAD_ID),
];

/// The backend that makes processes and lets them go.
pub const UNDERNEATH: &str = "ptrace";

/// What is better with it, and goes without.
const WISHES: [(&str, u64); 1] = [("userfaultfd for shared memory", sys::FEATURE_MISSING_SHMEM)];

/// Whether this kernel registers shared memory (4.11): without that it is filled before the release.
pub fn can_register_shared_memory() -> bool {
    static CAN: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *CAN.get_or_init(|| {
        let kernel = Userfault::create().and_then(|fault| fault.enable(0));
        kernel.is_ok_and(|has| has & sys::FEATURE_MISSING_SHMEM != 0)
    })
}

pub fn probe() -> Probe {
    let dump = Availability::Unavailable("restores only; dump with --backend ptrace".into());
    let kernel = Userfault::create().and_then(|fault| fault.enable(0));
    let has = *kernel.as_ref().unwrap_or(&0);
    let features = NAMES.iter().chain(&WISHES).map(|&(name, bit)| (name, has & bit != 0)).collect();
    let restore = match restorer_underneath().and_then(|()| userfault(kernel)) {
        Ok(()) => Availability::Available,
        Err(why) => Availability::Unavailable(why),
    };
    Probe { dump, restore, features }
}

fn restorer_underneath() -> Result<(), String> {
    let backend = registry::backend(UNDERNEATH).ok().filter(|backend| backend.restorer.is_some());
    let backend = backend.ok_or(format!("this ckpt was built without the restorer of {UNDERNEATH}, which it uses"))?;
    match (backend.probe)().restore {
        Availability::Available => Ok(()),
        Availability::Unavailable(why) => Err(why),
    }
}

/// Whether memory can be registered with all events, and faults of the kernel as well as those of programs.
fn userfault(kernel: std::io::Result<u64>) -> Result<(), String> {
    let has = match kernel {
        Ok(has) => has,
        Err(error) => {
            return Err(match error.raw_os_error() {
                Some(libc::ENOSYS) => {
                    "this kernel has no userfaultfd (CONFIG_USERFAULTFD); use --backend ptrace".into()
                }
                Some(libc::EPERM) => "userfaultfd is not permitted: it needs CAP_SYS_PTRACE, or \
                                      vm.unprivileged_userfaultfd=1; use --backend ptrace"
                    .into(),
                _ => format!("userfaultfd: {error}; use --backend ptrace"),
            });
        }
    };
    if let Some((name, _)) = NAMES.iter().find(|(_, bit)| has & bit == 0) {
        return Err(format!("this kernel's userfaultfd lacks a feature ({name}, kernel 4.14); use --backend ptrace"));
    }
    // To be told of forks takes a capability in the initial user namespace.
    let tried = Userfault::create().and_then(|fault| fault.enable(FEATURES));
    tried.map(drop).map_err(|error| {
        format!("to follow forks userfaultfd needs CAP_SYS_PTRACE on the host ({error}); use --backend ptrace")
    })
}
