//! Resource limits.

use crate::case::{Case, Checkpoint};
use crate::expect::{done, equal, that};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("limits/all", &["limits"], all),
        Case::new("limits/below-what-is-used", &["limits", "descriptors"], below_what_is_used)
            .real_ids("the limit of its address space leaves no room for a table of ids"),
        Case::new("limits/no-room", &["limits", "memory"], no_room)
            .refused_at_dump("RLIMIT_AS")
            .needs(&["naming the limit that is in the way"]),
    ]
}

fn get(number: u32) -> Result<(u64, u64), String> {
    let mut limit = [0u64; 2];
    // SAFETY: room for a rlimit64.
    done("prlimit64", unsafe { libc::syscall(libc::SYS_prlimit64, 0, number, 0, &mut limit) })?;
    Ok((limit[0], limit[1]))
}

fn set(number: u32, soft: u64, hard: u64) -> Result<(), String> {
    let limit = [soft, hard];
    // SAFETY: a rlimit64.
    done("prlimit64", unsafe { libc::syscall(libc::SYS_prlimit64, 0, number, &limit, 0) }).map(drop)
}

fn all(checkpoint: &Checkpoint) -> Result<(), String> {
    for number in 0..16u32 {
        let (_, hard) = get(number)?;
        // Each another one, below what is allowed and above what is needed.
        let new = match number {
            libc::RLIMIT_CPU => 1000,
            libc::RLIMIT_NICE | libc::RLIMIT_RTPRIO => 3,
            libc::RLIMIT_CORE => 0,
            libc::RLIMIT_NOFILE | libc::RLIMIT_NPROC | libc::RLIMIT_SIGPENDING => 200 + u64::from(number),
            _ => (1 << 34) + 4096 * u64::from(number),
        };
        set(number, new.min(hard), if number % 2 == 0 { hard } else { (new + 1).min(hard) })?;
    }
    let limits = || (0..16).map(get).collect::<Result<Vec<_>, _>>();
    let before = limits()?;
    checkpoint.wait()?;
    equal("limits", before, limits()?)
}

/// What was had before the limits were lowered is kept, and no more is to be had.
fn below_what_is_used(checkpoint: &Checkpoint) -> Result<(), String> {
    // SAFETY: duplicates standard input, which is there, to a high number.
    let high = done("dup2", unsafe { libc::dup2(0, 777) })?;
    let area = vec![7u8; 64 << 20];
    for (number, limit) in [
        (libc::RLIMIT_NOFILE, 20),
        (libc::RLIMIT_DATA, 1 << 20),
        (libc::RLIMIT_STACK, 64 << 10),
        (libc::RLIMIT_FSIZE, 4096),
        (libc::RLIMIT_NPROC, 1),
        (libc::RLIMIT_SIGPENDING, 0),
        (libc::RLIMIT_MEMLOCK, 0),
    ] {
        set(number, limit, limit)?;
    }
    // Room for what a dumper needs, and not for what the check below wants.
    let statm = std::fs::read_to_string("/proc/self/statm").map_err(|error| error.to_string())?;
    let pages: u64 = statm.split(' ').next().and_then(|pages| pages.parse().ok()).ok_or("statm")?;
    let limit = pages * 4096 + (64 << 20);
    set(libc::RLIMIT_AS, limit, limit)?;
    checkpoint.wait()?;
    that("the memory is there", area.iter().all(|&byte| byte == 7))?;
    // SAFETY: only looks at a descriptor.
    done("fcntl of a descriptor above the limit", unsafe { libc::fcntl(high, libc::F_GETFD) })?;
    // SAFETY: fails, or makes a descriptor that is never used.
    that("no descriptor above the limit can be made", unsafe { libc::dup2(0, 778) } < 0)?;
    // SAFETY: fails, or maps memory that is never used.
    let mapped =
        unsafe { libc::mmap(std::ptr::null_mut(), 1 << 30, 3, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0) };
    that("no memory above the limit can be had", mapped == libc::MAP_FAILED)?;
    equal("RLIMIT_SIGPENDING", (0, 0), get(libc::RLIMIT_SIGPENDING)?)
}

/// As much address space as it may have: there is no room for whoever wants to dump it.
fn no_room(checkpoint: &Checkpoint) -> Result<(), String> {
    let (soft, hard) = get(libc::RLIMIT_AS)?;
    set(libc::RLIMIT_AS, 4096, hard)?;
    let waited = checkpoint.wait();
    set(libc::RLIMIT_AS, soft, hard)?;
    waited
}
