//! The raw system calls of the driver: signals with values, sockets without a file, processes by exec.
//!
//! # Safety
//! Structures passed to the kernel are `repr(C)` or arrays that match its headers, and live through the calls.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use ckpt_core::Pid;

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A `siginfo_t` of `SI_QUEUE` from us.
fn info_of_queued(signal: i32, value: u64) -> [u32; 32] {
    // siginfo_t: signal, errno, code, padding, sender's pid and uid, value
    let mut info = [0u32; 32];
    info[0] = signal as u32;
    info[2] = libc::SI_QUEUE as u32;
    info[4] = std::process::id();
    // SAFETY: no memory is passed.
    info[5] = unsafe { libc::getuid() };
    info[6] = value as u32;
    info[7] = (value >> 32) as u32;
    info
}

/// `rt_tgsigqueueinfo(2)` with `SI_QUEUE`: a signal with a value for one thread of our own user's.
pub fn queue_to_thread(pid: Pid, tid: Pid, signal: i32, value: u64) -> io::Result<()> {
    let info = info_of_queued(signal, value);
    // SAFETY: a siginfo of 128 bytes.
    check(unsafe { libc::syscall(libc::SYS_rt_tgsigqueueinfo, pid.0, tid.0, signal, info.as_ptr()) }).map(drop)
}

/// A signal with a value for a process (`SI_QUEUE`).
pub fn queue(pidfd: BorrowedFd<'_>, signal: i32, value: u64) -> io::Result<()> {
    let info = info_of_queued(signal, value);
    let fd = pidfd.as_raw_fd();
    // SAFETY: a siginfo of 128 bytes.
    check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, info.as_ptr(), 0) }).map(drop)
}

pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: no memory is passed.
    let result =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, std::ptr::null::<u8>(), 0) };
    check(result).map(drop)
}

/// 32 random bits (`getrandom`).
pub fn random() -> io::Result<u32> {
    let mut bytes = [0u8; 4];
    // SAFETY: the kernel writes four bytes.
    check(unsafe { libc::syscall(libc::SYS_getrandom, bytes.as_mut_ptr(), 4, 0) })?;
    Ok(u32::from_ne_bytes(bytes))
}

/// The user at the other end of a Unix socket (`SO_PEERCRED`).
pub fn peer_uid(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let credentials = nix::sys::socket::getsockopt(&socket, nix::sys::socket::sockopt::PeerCredentials)?;
    Ok(credentials.uid())
}

/// Takes over a descriptor that the kernel has just made.
pub fn own(fd: i32) -> OwnedFd {
    // SAFETY: callers pass what a system call has just returned, which nobody else has.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Reads a plain structure of the protocol out of bytes.
pub fn from_bytes<T: Copy>(bytes: &[u8]) -> T {
    assert_eq!(bytes.len(), size_of::<T>());
    // SAFETY: as long as the type, for which any bits are a value: the protocol's structures hold integers.
    unsafe { bytes.as_ptr().cast::<T>().read_unaligned() }
}

/// The bytes of a plain structure of the protocol.
pub fn to_bytes<T: Copy>(value: &T) -> &[u8] {
    // SAFETY: the protocol's structures hold integers without padding.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// Has a command start with these changes of its descriptor table, after everything else that was asked for it: a
/// descriptor of ours by a number that it keeps.
pub fn inherit(command: &mut std::process::Command, fd: OwnedFd, number: i32) {
    use std::os::unix::process::CommandExt;
    // SAFETY: between fork and exec this only makes system calls.
    unsafe {
        command.pre_exec(move || {
            // The copy has no close-on-exec.
            check(libc::dup2(fd.as_raw_fd(), number).into()).map(drop)
        });
    }
}

/// The xsave features that this CPU has for programs (CPUID leaf 13, as `XCR0`).
pub fn xsave_features() -> u64 {
    let leaf = std::arch::x86_64::__cpuid_count(13, 0);
    u64::from(leaf.edx) << 32 | u64::from(leaf.eax)
}

/// Bytes of an xsave area with all of them.
pub fn xsave_size() -> usize {
    std::arch::x86_64::__cpuid_count(13, 0).ebx as usize
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

impl CloneArguments {
    /// In its order.
    pub fn words(&self) -> [u64; 11] {
        [
            self.flags,
            self.pidfd,
            self.child_tid,
            self.parent_tid,
            self.exit_signal,
            self.stack,
            self.stack_size,
            self.tls,
            self.set_tid,
            self.set_tid_size,
            self.cgroup,
        ]
    }
}

/// Starts a program as a child of ours: with one environment, these three descriptors from a number on, and no other.
///
/// With a chosen id where there is one; EPERM says that it may not be chosen.
pub fn spawn(
    chosen: Option<Pid>,
    exit_signal: i32,
    program: &CStr,
    environment: &[CString],
    handed: &[OwnedFd; 3],
    first: i32,
) -> io::Result<Pid> {
    let argv = [program.as_ptr(), std::ptr::null()];
    let mut variables: Vec<*const libc::c_char> = environment.iter().map(|variable| variable.as_ptr()).collect();
    variables.push(std::ptr::null());
    let set_tid = chosen.map_or(0, |pid| pid.0);
    let arguments = CloneArguments {
        exit_signal: exit_signal as u64,
        set_tid: if chosen.is_some() { &raw const set_tid as u64 } else { 0 },
        set_tid_size: chosen.is_some().into(),
        ..CloneArguments::default()
    };
    let all = u64::MAX;
    let mut before = 0u64;
    // SAFETY: masks of 8 bytes, as the kernel has them. The child has to start with everything blocked.
    unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const all, &raw mut before, 8);
    }
    // SAFETY: without CLONE_VM and a stack, this is fork.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<CloneArguments>()) };
    if result == 0 {
        // SAFETY: the child only makes system calls, with what was prepared before, until it is another program or ends.
        unsafe {
            for (n, fd) in handed.iter().enumerate() {
                libc::syscall(libc::SYS_dup2, fd.as_raw_fd(), first + n as i32);
            }
            libc::syscall(libc::SYS_close_range, first + handed.len() as i32, u32::MAX, 0);
            libc::syscall(libc::SYS_close_range, 0, first - 1, 0);
            libc::syscall(libc::SYS_execve, program.as_ptr(), argv.as_ptr(), variables.as_ptr());
            loop {
                libc::syscall(libc::SYS_exit_group, 127);
            }
        }
    }
    let error = io::Error::last_os_error();
    // SAFETY: as above.
    unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const before, std::ptr::null::<u64>(), 8);
    }
    if result < 0 { Err(error) } else { Ok(Pid(result as i32)) }
}

/// Whether the kernel has an id in use in whatever way: for a process or thread, a group, a session, or one that has ended
/// an instant ago. `F_SETOWN` asks for no more of an id than that it is there.
pub fn id_in_use(probe: BorrowedFd<'_>, id: i32) -> bool {
    // SAFETY: no memory is passed. The owner of this descriptor's signals gets none: nothing sets O_ASYNC.
    unsafe { libc::fcntl(probe.as_raw_fd(), libc::F_SETOWN, id) == 0 }
}

/// A descriptor to ask [`id_in_use`] with.
pub fn id_probe() -> io::Result<OwnedFd> {
    Ok(nix::unistd::pipe()?.0)
}

/// SIGKILL.
pub fn kill(pid: Pid) {
    // SAFETY: no memory is passed.
    unsafe { libc::kill(pid.0, libc::SIGKILL) };
}

/// Waits for a child that has been killed.
pub fn reap(pid: Pid) {
    // SAFETY: no memory is passed.
    unsafe { libc::waitpid(pid.0, std::ptr::null_mut(), libc::__WALL) };
}

/// Whether we may choose the ids of new processes (CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE), as far as our capabilities
/// tell: whether they count in this pid namespace, only the attempt does.
pub fn may_choose_ids() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    effective & (1 << 21 | 1 << 40) != 0
}

extern "C" fn nothing(_: *mut libc::c_void) -> libc::c_int {
    0
}

/// Has the kernel give out its next id, to a thread of ours that ends at once. Gives the id.
pub fn give_out_id() -> io::Result<i32> {
    // Nobody waits for a thread, and with CLONE_VFORK it is over when we go on, so that its stack is free again.
    let flags = libc::CLONE_VM
        | libc::CLONE_VFORK
        | libc::CLONE_THREAD
        | libc::CLONE_SIGHAND
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SYSVSEM;
    let mut stack = [0u128; 256];
    // SAFETY: the stack is the new thread's until it has ended, which CLONE_VFORK waits for; it returns at once, and
    // touches nothing of ours.
    let id = unsafe { libc::clone(nothing, stack.as_mut_ptr().add(stack.len()).cast(), flags, std::ptr::null_mut()) };
    check(id.into()).map(|id| id as i32)
}
