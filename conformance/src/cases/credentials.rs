//! User and group ids, capabilities, securebits and `no_new_privs`.

use std::io::{Read, Write};
use std::sync::{Arc, Barrier};

use crate::case::{Case, Checkpoint};
use crate::expect::{done, equal, in_child, lines, that};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("credentials/user-with-one-capability", &["credentials"], user_with_one_capability)
            .privileged("capabilities take root"),
        Case::new("credentials/user-with-none", &["credentials"], user_with_none).privileged("several users take root"),
        Case::new("credentials/of-threads", &["credentials"], of_threads).privileged("several users take root"),
        Case::new("credentials/saved-and-filesystem-ids", &["credentials"], saved_and_filesystem_ids)
            .privileged("several users take root"),
        Case::new("credentials/small-bounding-set", &["credentials"], small_bounding_set)
            .privileged("capabilities take root"),
        Case::new("credentials/ambient-and-securebits", &["credentials"], ambient_and_securebits)
            .privileged("capabilities take root"),
        Case::new("credentials/no-new-privs", &["credentials"], no_new_privs),
    ]
}

const SHOWN: &[&str] = &["Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs"];

/// What `/proc` shows of the calling thread, and its securebits.
fn credentials() -> Result<(Vec<String>, i64), String> {
    // SAFETY: has only numbers.
    let securebits = done("PR_GET_SECUREBITS", unsafe { libc::syscall(libc::SYS_prctl, libc::PR_GET_SECUREBITS) })?;
    Ok((lines("/proc/thread-self/status", SHOWN)?, securebits))
}

/// A raw call with numbers only, which changes the calling thread alone.
fn call(name: &str, number: libc::c_long, arguments: [i64; 3]) -> Result<i64, String> {
    let [first, second, third] = arguments;
    // SAFETY: callers give numbers, or addresses of what lives through the call.
    done(name, unsafe { libc::syscall(number, first, second, third, 0, 0) })
}

fn prctl(option: i32, value: i64) -> Result<i64, String> {
    call(&format!("prctl({option}, {value})"), libc::SYS_prctl, [option.into(), value, 0])
}

fn capset(permitted: u64, effective: u64, inheritable: u64) -> Result<(), String> {
    let header = [0x2008_0522u32, 0];
    let mut data = [0u32; 6];
    for (half, shift) in [0, 32].into_iter().enumerate() {
        for (place, set) in [effective, permitted, inheritable].into_iter().enumerate() {
            data[half * 3 + place] = (set >> shift) as u32;
        }
    }
    call("capset", libc::SYS_capset, [header.as_ptr() as i64, data.as_ptr() as i64, 0]).map(drop)
}

/// Becomes a user with these groups that keeps `kept` of root's capabilities.
fn become_user(id: i64, groups: &[u32], kept: u64) -> Result<(), String> {
    call("setgroups", libc::SYS_setgroups, [groups.len() as i64, groups.as_ptr() as i64, 0])?;
    call("setresgid", libc::SYS_setresgid, [id, id, id])?;
    prctl(libc::PR_SET_KEEPCAPS, 1)?;
    call("setresuid", libc::SYS_setresuid, [id, id, id])?;
    prctl(libc::PR_SET_KEEPCAPS, 0)?;
    capset(kept, kept, 0)
}

const KILL: u64 = 1 << 5;
const NET_BIND_SERVICE: u64 = 1 << 10;

/// Sets up in a child, for the trial's directory is not the user's; the child judges itself.
fn in_a_child_as(
    checkpoint: &Checkpoint,
    set_up: fn() -> Result<(), String>,
    judge: fn() -> Result<(), String>,
) -> Result<(), String> {
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(|error| error.to_string())?;
    let child = in_child(|| {
        let mut theirs = theirs.try_clone().map_err(|error| error.to_string())?;
        set_up()?;
        let before = credentials()?;
        theirs.write_all(b"r").map_err(|error| error.to_string())?;
        theirs.read_exact(&mut [0]).map_err(|error| error.to_string())?;
        equal("credentials", before, credentials()?)?;
        judge()
    })?;
    drop(theirs);
    ours.read_exact(&mut [0]).map_err(|error| format!("the child is not ready: {error}"))?;
    checkpoint.wait()?;
    ours.write_all(b"g").map_err(|error| error.to_string())?;
    child.passed()
}

fn may_become_root() -> bool {
    call("setuid", libc::SYS_setuid, [0, 0, 0]).is_ok()
}

fn user_with_one_capability(checkpoint: &Checkpoint) -> Result<(), String> {
    in_a_child_as(
        checkpoint,
        || become_user(65_534, &[7, 1000, 70_000], NET_BIND_SERVICE),
        || {
            // The one it has works: a port below 1024.
            let bound = std::net::TcpListener::bind(("127.0.0.1", 81));
            that("CAP_NET_BIND_SERVICE works", bound.is_ok())?;
            // Those it has not do not: process 1 is another user's.
            // SAFETY: signal 0 is none.
            that("CAP_KILL is not there", unsafe { libc::kill(1, 0) } < 0)?;
            that("it cannot become root", !may_become_root())
        },
    )
}

fn user_with_none(checkpoint: &Checkpoint) -> Result<(), String> {
    in_a_child_as(
        checkpoint,
        || become_user(1234, &[], 0),
        || {
            that("it cannot read what is root's alone", std::fs::File::open("/etc/shadow").is_err())?;
            that("it cannot become root", !may_become_root())
        },
    )
}

fn of_threads(checkpoint: &Checkpoint) -> Result<(), String> {
    let barrier = Arc::new(Barrier::new(4));
    let set_up: [fn() -> Result<(), String>; 3] = [
        || become_user(1001, &[5], KILL),
        || become_user(1002, &[], 0),
        || {
            let all = u64::from_str_radix(lines("/proc/thread-self/status", &["CapPrm"])?[0][8..].trim(), 16);
            let all = all.map_err(|error| error.to_string())?;
            capset(all, all & !(KILL | NET_BIND_SERVICE), KILL)
        },
    ];
    let threads: Vec<_> = set_up
        .into_iter()
        .map(|set_up| {
            let barrier = barrier.clone();
            std::thread::spawn(move || {
                let before = set_up().and_then(|()| credentials());
                barrier.wait();
                barrier.wait();
                equal("credentials of a thread", before?, credentials()?)
            })
        })
        .collect();
    let before = credentials()?;
    barrier.wait();
    checkpoint.wait()?;
    barrier.wait();
    for thread in threads {
        thread.join().map_err(|_| "a thread panicked")??;
    }
    equal("credentials of the main thread", before, credentials()?)
}

fn saved_and_filesystem_ids(checkpoint: &Checkpoint) -> Result<(), String> {
    in_a_child_as(
        checkpoint,
        || {
            call("setresgid", libc::SYS_setresgid, [11, 12, 13])?;
            call("setfsgid", libc::SYS_setfsgid, [11, 0, 0])?;
            call("setresuid", libc::SYS_setresuid, [21, 22, 0])?;
            call("setfsuid", libc::SYS_setfsuid, [21, 0, 0]).map(drop)
        },
        || {
            // The saved id is root's, so it may come back.
            call("setresuid", libc::SYS_setresuid, [-1, 0, -1]).map(drop)
        },
    )
}

fn small_bounding_set(checkpoint: &Checkpoint) -> Result<(), String> {
    in_a_child_as(
        checkpoint,
        || {
            // Inheritable, but no longer in the bounding set.
            capset(u64::MAX >> 23 & current("CapPrm")?, current("CapEff")?, NET_BIND_SERVICE | KILL)?;
            (0..41)
                .filter(|&number| number != 5 && number != 6)
                .try_for_each(|number| prctl(libc::PR_CAPBSET_DROP, number).map(drop))
        },
        || that("dropping is for ever", prctl(libc::PR_CAPBSET_READ, 10)? == 0),
    )
}

fn current(set: &str) -> Result<u64, String> {
    let line = lines("/proc/thread-self/status", &[set])?;
    u64::from_str_radix(line[0][set.len() + 1..].trim(), 16).map_err(|error| error.to_string())
}

fn ambient_and_securebits(checkpoint: &Checkpoint) -> Result<(), String> {
    const AMBIENT_RAISE: i64 = 2;
    in_a_child_as(
        checkpoint,
        || {
            // SECBIT_NOROOT, locked, SECBIT_NO_SETUID_FIXUP, SECBIT_KEEP_CAPS.
            prctl(libc::PR_SET_SECUREBITS, 1 | 2 | 4 | 16)?;
            let all = current("CapPrm")?;
            capset(all, all, NET_BIND_SERVICE | KILL)?;
            call("PR_CAP_AMBIENT", libc::SYS_prctl, [libc::PR_CAP_AMBIENT.into(), AMBIENT_RAISE, 10])?;
            call("setresuid", libc::SYS_setresuid, [3000, 3000, 3000])?;
            capset(NET_BIND_SERVICE | KILL, KILL, NET_BIND_SERVICE | KILL)
        },
        || {
            equal("ambient set", NET_BIND_SERVICE, current("CapAmb")?)?;
            that("securebits are locked", prctl(libc::PR_SET_SECUREBITS, 0).is_err())
        },
    )
}

fn no_new_privs(checkpoint: &Checkpoint) -> Result<(), String> {
    let barrier = Arc::new(Barrier::new(2));
    let theirs = barrier.clone();
    let thread = std::thread::spawn(move || {
        let set = prctl(libc::PR_SET_NO_NEW_PRIVS, 1);
        theirs.wait();
        theirs.wait();
        set?;
        equal("no_new_privs of the thread", 1, prctl(libc::PR_GET_NO_NEW_PRIVS, 0)?)
    });
    barrier.wait();
    checkpoint.wait()?;
    barrier.wait();
    thread.join().map_err(|_| "the thread panicked")??;
    equal("no_new_privs of the main thread", 0, prctl(libc::PR_GET_NO_NEW_PRIVS, 0)?)
}
