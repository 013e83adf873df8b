//! ptrace(2), waitpid(2) and the few other raw calls of this backend.
//!
//! # Safety
//! Requests pass addresses of live local buffers with their true sizes. Nothing here touches memory of ours on behalf of
//! a tracee.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use ckpt_agent::frame;
use ckpt_core::{General, Pid, RemotePtr, Rseq, SigInfo};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

const NT_PRSTATUS: usize = 1;
const NT_X86_XSTATE: usize = 0x202;

const PTRACE_SEIZE: u32 = 0x4206;
const PTRACE_INTERRUPT: u32 = 0x4207;
const PTRACE_PEEKSIGINFO: u32 = 0x4209;
const PTRACE_GETSIGMASK: u32 = 0x420a;
const PTRACE_SETSIGMASK: u32 = 0x420b;
const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;
const PTRACE_PEEKSIGINFO_SHARED: u32 = 1;

/// The event of a stop by `PTRACE_INTERRUPT` or a group stop.
pub const PTRACE_EVENT_STOP: i32 = 128;

/// Marks system-call stops, to tell them from SIGTRAP.
const PTRACE_O_TRACESYSGOOD: usize = 1;

fn ptrace(request: u32, pid: Pid, address: usize, data: usize) -> io::Result<i64> {
    // SAFETY: callers pass addresses of live buffers of theirs; the request and sizes say how much is used.
    let result = unsafe { libc::ptrace(request, pid.0, address, data) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

pub fn seize(tid: Pid) -> io::Result<()> {
    ptrace(PTRACE_SEIZE, tid, 0, PTRACE_O_TRACESYSGOOD).map(drop)
}

pub fn interrupt(tid: Pid) -> io::Result<()> {
    ptrace(PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}

/// Lets a stopped thread run, with a signal to deliver or 0.
pub fn resume(tid: Pid, signal: i32) -> io::Result<()> {
    ptrace(libc::PTRACE_CONT, tid, 0, signal as usize).map(drop)
}

/// Lets it run to the next entry to or exit from a system call.
pub fn resume_to_call(tid: Pid) -> io::Result<()> {
    ptrace(libc::PTRACE_SYSCALL, tid, 0, 0).map(drop)
}

pub fn detach(tid: Pid, signal: i32) -> io::Result<()> {
    ptrace(libc::PTRACE_DETACH, tid, 0, signal as usize).map(drop)
}

pub fn general(tid: Pid) -> io::Result<General> {
    let mut general = General::default();
    let mut vector = libc::iovec { iov_base: (&raw mut general).cast(), iov_len: size_of::<General>() };
    ptrace(libc::PTRACE_GETREGSET, tid, NT_PRSTATUS, &raw mut vector as usize)?;
    if vector.iov_len != size_of::<General>() {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "a 32-bit program"));
    }
    Ok(general)
}

pub fn set_general(tid: Pid, general: &General) -> io::Result<()> {
    let mut general = *general;
    let mut vector = libc::iovec { iov_base: (&raw mut general).cast(), iov_len: size_of::<General>() };
    ptrace(libc::PTRACE_SETREGSET, tid, NT_PRSTATUS, &raw mut vector as usize).map(drop)
}

/// The uncompacted xsave area, as far as there is anything in it.
pub fn xsave(tid: Pid) -> io::Result<Vec<u8>> {
    let mut area = vec![0u8; 16 * 1024];
    let mut vector = libc::iovec { iov_base: area.as_mut_ptr().cast(), iov_len: area.len() };
    ptrace(libc::PTRACE_GETREGSET, tid, NT_X86_XSTATE, &raw mut vector as usize)?;
    area.truncate(vector.iov_len);
    area.truncate(frame::extent(&area));
    area.shrink_to_fit();
    Ok(area)
}

pub fn set_xsave(tid: Pid, area: &[u8]) -> io::Result<()> {
    // The kernel wants all of it: the size of what XCR0 has enabled (CPUID leaf 13).
    static WHOLE: LazyLock<usize> = LazyLock::new(|| std::arch::x86_64::__cpuid_count(13, 0).ebx as usize);
    let whole = *WHOLE;
    let mut area = area.to_vec();
    area.resize(whole.max(area.len()), 0);
    let mut vector = libc::iovec { iov_base: area.as_mut_ptr().cast(), iov_len: area.len() };
    ptrace(libc::PTRACE_SETREGSET, tid, NT_X86_XSTATE, &raw mut vector as usize).map(drop)
}

pub fn blocked(tid: Pid) -> io::Result<u64> {
    let mut mask = 0u64;
    ptrace(PTRACE_GETSIGMASK, tid, 8, &raw mut mask as usize)?;
    Ok(mask)
}

pub fn set_blocked(tid: Pid, mask: u64) -> io::Result<()> {
    let mut mask = mask;
    ptrace(PTRACE_SETSIGMASK, tid, 8, &raw mut mask as usize).map(drop)
}

/// `struct ptrace_rseq_configuration`, kernel 5.13.
pub fn rseq(tid: Pid) -> io::Result<Option<Rseq>> {
    #[repr(C)]
    #[derive(Default)]
    struct Configuration {
        address: u64,
        size: u32,
        signature: u32,
        flags: u32,
        pad: u32,
    }
    let mut found = Configuration::default();
    ptrace(PTRACE_GET_RSEQ_CONFIGURATION, tid, size_of::<Configuration>(), &raw mut found as usize)?;
    Ok((found.address != 0).then_some(Rseq {
        address: RemotePtr(found.address),
        size: found.size,
        signature: found.signature,
        flags: found.flags,
    }))
}

/// The signals pending in one queue, left there.
pub fn pending(tid: Pid, shared: bool) -> io::Result<Vec<SigInfo>> {
    #[repr(C)]
    struct Argument {
        offset: u64,
        flags: u32,
        count: i32,
    }
    const AT_ONCE: usize = 32;
    let mut all = Vec::new();
    loop {
        let flags = if shared { PTRACE_PEEKSIGINFO_SHARED } else { 0 };
        let mut argument = Argument { offset: all.len() as u64, flags, count: AT_ONCE as i32 };
        let mut some = [[0u8; 128]; AT_ONCE];
        let got = ptrace(PTRACE_PEEKSIGINFO, tid, &raw mut argument as usize, some.as_mut_ptr() as usize)? as usize;
        all.extend_from_slice(&some[..got]);
        if got < AT_ONCE {
            return Ok(all);
        }
    }
}

/// What `waitpid` tells of a tracee.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// By `PTRACE_INTERRUPT`.
    Interrupted,
    /// A group stop, by this signal.
    Group(i32),
    /// About to be given this signal.
    Signal(i32),
    /// Entry to or exit from a system call.
    Call,
    /// It has ended, with this status.
    Ended(i32),
}

/// `waitpid(tid, __WALL)`: `None` if there is nothing yet.
pub fn wait(tid: Pid, block: bool) -> io::Result<Option<Stop>> {
    let mut status = 0;
    let flags = libc::__WALL | if block { 0 } else { libc::WNOHANG };
    let pid = loop {
        // SAFETY: `status` lives for the call.
        let pid = unsafe { libc::waitpid(tid.0, &mut status, flags) };
        if pid >= 0 {
            break pid;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    };
    if pid == 0 {
        return Ok(None);
    }
    if !libc::WIFSTOPPED(status) {
        return Ok(Some(Stop::Ended(status)));
    }
    let signal = libc::WSTOPSIG(status);
    Ok(Some(match status >> 16 {
        PTRACE_EVENT_STOP if signal == libc::SIGTRAP => Stop::Interrupted,
        PTRACE_EVENT_STOP => Stop::Group(signal),
        _ if signal == libc::SIGTRAP | 0x80 => Stop::Call,
        _ => Stop::Signal(signal),
    }))
}

/// The same for what comes within microseconds: looks a few times before it pauses between looks, longer and longer. `None`
/// if nothing came within `timeout`.
///
/// Not by a blocking `waitpid`: the end of a main thread is not told as long as other threads of its process, which we trace
/// as well, have yet to be waited for; so if the process is killed now, it would never return.
pub fn wait_soon(tid: Pid, timeout: Option<Duration>) -> io::Result<Option<Stop>> {
    for _ in 0..100 {
        if let Some(stop) = wait(tid, false)? {
            return Ok(Some(stop));
        }
        std::thread::yield_now();
    }
    let begin = Instant::now();
    let mut pause = Duration::from_micros(20);
    loop {
        if let Some(stop) = wait(tid, false)? {
            return Ok(Some(stop));
        }
        if pause > Duration::from_millis(1) && has_ended(tid) {
            return Ok(Some(Stop::Ended(libc::SIGKILL)));
        }
        if timeout.is_some_and(|timeout| begin.elapsed() > timeout) {
            return Ok(None);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(2));
    }
}

/// Whether a thread is a zombie, or no more.
fn has_ended(tid: Pid) -> bool {
    let stat = ckpt_core::procfs::ProcDir::open(tid).and_then(|proc| proc.stat_line());
    stat.map_or(true, |stat| matches!(stat.state, 'Z' | 'X'))
}

pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: no memory is passed.
    let result =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, std::ptr::null::<u8>(), 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `struct clone_args` (linux/sched.h), all 88 bytes of it.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct CloneArguments {
    pub flags: u64,
    pub pidfd: u64,
    pub child_tid: u64,
    pub parent_tid: u64,
    pub exit_signal: u64,
    pub stack: u64,
    pub stack_size: u64,
    pub tls: u64,
    pub set_tid: u64,
    pub set_tid_size: u64,
    pub cgroup: u64,
}

const _: () = assert!(size_of::<CloneArguments>() == 88);

/// Makes a child with a chosen pid that runs nothing but the agent, from its first instruction after `clone3`.
///
/// The region has to be mapped, at the address that `entry` and `lane` are in. The child closes `our_ends` first: with a
/// copy of our end of its socket, it would not see that we are gone, should we be killed now.
pub fn spawn_agent(
    pid: Pid,
    exit_signal: i32,
    entry: u64,
    lane: u64,
    stack_top: u64,
    our_ends: &[RawFd],
) -> io::Result<()> {
    let set_tid = pid.0;
    let arguments = CloneArguments {
        exit_signal: exit_signal as u64,
        set_tid: &raw const set_tid as u64,
        set_tid_size: 1,
        ..CloneArguments::default()
    };
    let all = u64::MAX;
    let mut before = 0u64;
    // SAFETY: masks of 8 bytes, as the kernel has them. The child has to start with everything blocked.
    unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const all, &raw mut before, 8);
    }
    // SAFETY: without CLONE_VM and a stack, this is fork: the child has a copy of our memory, and leaves it at once.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<CloneArguments>()) };
    if result == 0 {
        for &fd in our_ends {
            // SAFETY: numbers in the child's own table; a system call and nothing else.
            unsafe { libc::syscall(libc::SYS_close, fd) };
        }
        // SAFETY: the region is mapped with the agent's code at `entry`, and the stack belongs to the lane. Nothing of ours
        // runs in the child, so that it does not matter in what state our copy of the memory is.
        unsafe {
            std::arch::asm!("mov rsp, {stack}", "jmp {entry}", stack = in(reg) stack_top, entry = in(reg) entry,
                in("rdi") lane, in("rsi") 0, options(noreturn));
        }
    }
    let error = io::Error::last_os_error();
    // SAFETY: as above.
    unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const before, std::ptr::null::<u64>(), 8);
    }
    if result < 0 { Err(error) } else { Ok(()) }
}

/// The xsave features that this CPU has for programs (CPUID leaf 13, as `XCR0`).
pub fn xsave_features() -> u64 {
    // The instruction is there on every x86-64; a leaf that is not gives zeros.
    let leaf = std::arch::x86_64::__cpuid_count(13, 0);
    u64::from(leaf.edx) << 32 | u64::from(leaf.eax)
}

/// Raises our soft limit of descriptors to the hard one: each process of a tree takes several of ours, and a skeleton, which
/// gets its true limit at the end, a few numbers above the program's own.
pub fn raise_descriptor_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        // Where it cannot be raised, the first descriptor that is too many says so.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Whether a thread has no seccomp filter, for sure (`PTRACE_SECCOMP_GET_FILTER`, which needs CAP_SYS_ADMIN).
pub fn has_no_filter(tid: Pid) -> bool {
    const PTRACE_SECCOMP_GET_FILTER: u32 = 0x420c;
    matches!(ptrace(PTRACE_SECCOMP_GET_FILTER, tid, 0, 0), Err(error) if error.raw_os_error() == Some(libc::EINVAL))
}

#[cfg(test)]
mod tests {
    use super::*;

    extern "C" fn sleep_for_ever(_: *mut libc::c_void) -> i32 {
        loop {
            // SAFETY: takes no memory.
            unsafe { libc::pause() };
        }
    }

    /// A process of two threads.
    fn two_threads() -> Pid {
        // SAFETY: the child makes a thread on a stack of its own, and both of them sleep until they are killed.
        unsafe {
            let child = libc::fork();
            if child == 0 {
                let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
                let stack = libc::mmap(std::ptr::null_mut(), 1 << 16, protection, flags, -1, 0);
                let flags = libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD;
                libc::clone(sleep_for_ever, stack.add(1 << 16), flags, std::ptr::null_mut());
                sleep_for_ever(std::ptr::null_mut());
            }
            assert!(child > 0);
            Pid(child)
        }
    }

    #[test]
    fn the_end_of_a_main_thread_whose_other_threads_were_not_waited_for() {
        let main = two_threads();
        let threads = || -> Vec<i32> {
            let entries = std::fs::read_dir(format!("/proc/{main}/task")).unwrap();
            entries.map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect()
        };
        while threads().len() < 2 {
            std::thread::yield_now();
        }
        let other = Pid(threads().into_iter().find(|&tid| tid != main.0).unwrap());
        for tid in [main, other] {
            seize(tid).unwrap();
            interrupt(tid).unwrap();
        }
        // SAFETY: a child of ours that was not waited for.
        unsafe { libc::kill(main.0, libc::SIGKILL) };
        // The stop may come before the end.
        let last = |tid| loop {
            match wait_soon(tid, Some(Duration::from_secs(60))).unwrap() {
                Some(Stop::Interrupted) => {}
                stop => return stop,
            }
        };
        assert!(matches!(last(main), Some(Stop::Ended(_))), "the main thread");
        assert!(matches!(last(other), Some(Stop::Ended(_))), "the other");
        assert!(matches!(last(main), Some(Stop::Ended(_))), "the main thread, when nobody is left");
    }
}
