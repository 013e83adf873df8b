//! userfaultfd(2), and the few other raw calls of the pager and its guardian.
//!
//! Layouts and numbers are those of `linux/userfaultfd.h`; each is asserted against what `_IOWR` makes of it.
//!
//! # Safety
//! Ioctls get pointers to live local structures of the size in their number. Addresses in these structures are of the
//! restored process, but for the source of a copy, which is a slice of ours. What runs after a fork uses only what one
//! thread left behind.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use ckpt_core::{PAGE_SIZE, Pid};
use nix::errno::Errno;

const UFFD_API: u64 = 0xaa;

pub const FEATURE_EVENT_FORK: u64 = 1 << 1;
pub const FEATURE_EVENT_REMAP: u64 = 1 << 2;
pub const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
pub const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
pub const FEATURE_EVENT_UNMAP: u64 = 1 << 6;
pub const FEATURE_THREAD_ID: u64 = 1 << 8;

const REGISTER_MODE_MISSING: u64 = 1;

/// `_IOC(dir, 0xaa, number, size)`: 1 writes to the kernel, 2 reads from it.
const fn ioctl_number(direction: u64, number: u64, size: usize) -> libc::c_ulong {
    direction << 30 | (size as u64) << 16 | UFFD_API << 8 | number
}

const UFFDIO_API: libc::c_ulong = ioctl_number(3, 0x3f, size_of::<Api>());
const UFFDIO_REGISTER: libc::c_ulong = ioctl_number(3, 0x00, size_of::<Register>());
const UFFDIO_UNREGISTER: libc::c_ulong = ioctl_number(2, 0x01, size_of::<Range>());
const UFFDIO_WAKE: libc::c_ulong = ioctl_number(2, 0x02, size_of::<Range>());
const UFFDIO_COPY: libc::c_ulong = ioctl_number(3, 0x03, size_of::<Copy>());
const UFFDIO_ZEROPAGE: libc::c_ulong = ioctl_number(3, 0x04, size_of::<ZeroPage>());
const UFFDIO_POISON: libc::c_ulong = ioctl_number(3, 0x08, size_of::<Poison>());

/// Makes a userfaultfd by [`DEVICE`]: `_IO(0xaa, 0)`.
pub const USERFAULTFD_IOC_NEW: libc::c_ulong = UFFD_API << 8;

/// Of every userfaultfd here. Without `UFFD_USER_MODE_ONLY`: faults of the kernel have to be answered, too.
pub const FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK;

/// Gives a userfaultfd to whoever may open it (kernel 6.1).
pub const DEVICE: &str = "/dev/userfaultfd";

pub fn open_device() -> io::Result<OwnedFd> {
    Ok(File::options().read(true).write(true).open(DEVICE)?.into())
}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
struct ZeroPage {
    range: Range,
    mode: u64,
    zeropage: i64,
}

#[repr(C)]
struct Poison {
    range: Range,
    mode: u64,
    updated: i64,
}

/// `struct uffd_msg`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    arguments: [u64; 3],
}

const _: () = {
    assert!(size_of::<Message>() == 32);
    assert!(UFFDIO_API == 0xc018_aa3f);
    assert!(UFFDIO_REGISTER == 0xc020_aa00);
    assert!(UFFDIO_WAKE == 0x8010_aa02);
    assert!(UFFDIO_COPY == 0xc028_aa03);
    assert!(UFFDIO_ZEROPAGE == 0xc020_aa04);
    assert!(UFFDIO_POISON == 0xc020_aa08);
    assert!(USERFAULTFD_IOC_NEW == 0xaa00);
};

/// What a userfaultfd tells.
#[derive(Debug)]
pub enum Event {
    /// A thread waits for the page at an address.
    Fault { address: u64, tid: Pid },
    /// The process forked; this is the descriptor for the child's memory.
    Fork(OwnedFd),
    /// mremap(2) moved memory.
    Moved { from: u64, to: u64, len: u64 },
    /// Memory is given back (`MADV_DONTNEED`, `MADV_FREE`, `MADV_REMOVE`): which of these, the kernel does not say.
    Removed { start: u64, end: u64 },
    /// Memory is no longer mapped.
    Unmapped { start: u64, end: u64 },
}

/// Why the kernel did not do what it was asked to.
#[derive(Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// The page is there already.
    There,
    /// The address space is being changed, and waits for us to read the event.
    Changing,
    /// There is no such registered memory (any more).
    NotMapped,
    /// The process has ended, or runs another program.
    Gone,
    Other(i32),
}

impl Obstacle {
    fn of(errno: i32) -> Obstacle {
        match errno {
            libc::EEXIST => Obstacle::There,
            libc::EAGAIN => Obstacle::Changing,
            libc::ENOENT => Obstacle::NotMapped,
            libc::ESRCH => Obstacle::Gone,
            other => Obstacle::Other(other),
        }
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

/// A userfaultfd: of whatever process made it, whoever holds it now.
#[derive(Debug)]
pub struct Userfault(OwnedFd);

impl Userfault {
    /// Of our own memory, in whatever way this host allows.
    pub fn create() -> io::Result<Userfault> {
        Userfault::by_call().or_else(|refused| {
            let device = open_device().map_err(|_| refused)?;
            Userfault::by_device(&device)
        })
    }

    /// By userfaultfd(2).
    pub fn by_call() -> io::Result<Userfault> {
        // SAFETY: no memory is passed.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) };
        let fd = check(fd as libc::c_int)?;
        // SAFETY: a new descriptor, which nobody else has.
        Ok(Userfault(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// By [`DEVICE`].
    pub fn by_device(device: &OwnedFd) -> io::Result<Userfault> {
        // SAFETY: takes flags only.
        let fd = check(unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, FLAGS) })?;
        // SAFETY: a new descriptor, which nobody else has.
        Ok(Userfault(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    pub fn from_fd(fd: OwnedFd) -> Userfault {
        Userfault(fd)
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.0.as_fd()
    }

    /// Agrees with the kernel on features. Returns all that the kernel has.
    pub fn enable(&self, features: u64) -> io::Result<u64> {
        let mut api = Api { api: UFFD_API, features, ioctls: 0 };
        // SAFETY: the structure is as long as the number says.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_API, &mut api) })?;
        Ok(api.features)
    }

    /// From now on threads that touch a missing page of the range wait until it is given to them.
    pub fn register(&self, start: u64, len: u64) -> io::Result<()> {
        let mut register = Register { range: Range { start, len }, mode: REGISTER_MODE_MISSING, ioctls: 0 };
        // SAFETY: the structure is as long as the number says.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_REGISTER, &mut register) }).map(drop)
    }

    /// Puts pages into the process, and wakes who waits for them. Returns how many bytes were put, and what was in the
    /// way of the rest.
    pub fn copy(&self, to: u64, pages: &[u8]) -> (u64, Option<Obstacle>) {
        let mut copy = Copy { dst: to, src: pages.as_ptr() as u64, len: pages.len() as u64, mode: 0, copy: 0 };
        // SAFETY: the structure is as long as the number says, and its source is a slice of ours.
        if unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_COPY, &mut copy) } == 0 {
            return (copy.len, None);
        }
        // A part that was copied is told there; the obstacle of the rest is seen by trying again.
        match copy.copy {
            1.. => (copy.copy as u64, None),
            _ => (0, Some(Obstacle::of(errno()))),
        }
    }

    /// Maps the zero page, and wakes who waits.
    pub fn zero(&self, start: u64, len: u64) -> (u64, Option<Obstacle>) {
        let mut zero = ZeroPage { range: Range { start, len }, mode: 0, zeropage: 0 };
        // SAFETY: the structure is as long as the number says.
        if unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_ZEROPAGE, &mut zero) } == 0 {
            return (len, None);
        }
        match zero.zeropage {
            1.. => (zero.zeropage as u64, None),
            _ => (0, Some(Obstacle::of(errno()))),
        }
    }

    /// Marks a missing page as one that cannot be had (kernel 6.6): a program that touches it gets SIGBUS, a system call
    /// EFAULT. Returns whether that was possible.
    pub fn poison(&self, address: u64) -> bool {
        let mut poison = Poison { range: Range { start: address, len: PAGE_SIZE }, mode: 0, updated: 0 };
        // SAFETY: the structure is as long as the number says.
        unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_POISON, &mut poison) == 0 }
    }

    /// Has all who wait look again: faults that somebody took and did not answer are told once more.
    pub fn wake_all(&self) {
        let end_of_user_space: u64 = (1 << 47) - PAGE_SIZE;
        self.wake(nowhere(), end_of_user_space - nowhere());
    }

    /// Wakes who waits for pages of the range, to look again.
    pub fn wake(&self, start: u64, len: u64) {
        let range = Range { start, len };
        // SAFETY: the structure is as long as the number says.
        unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_WAKE, &range) };
    }

    /// Whether the address space is gone: the process has ended, or runs another program.
    pub fn is_gone(&self) -> bool {
        match self.probe() {
            Obstacle::Gone => true,
            // Who is killed in the middle of a fork may leave it "being changed" for ever, and the kernel looks at that first.
            // Where something is unregistered, it only looks whether the address space is there.
            Obstacle::Changing => self.unregister_nothing() == Some(Errno::ENOMEM),
            _ => false,
        }
    }

    /// What the kernel says to unregistering a page where nothing is mapped.
    fn unregister_nothing(&self) -> Option<Errno> {
        let range = Range { start: nowhere(), len: PAGE_SIZE };
        // SAFETY: the range is a live local, and nothing is mapped there.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_UNREGISTER, &range) };
        Errno::result(result).err()
    }

    /// Asks to put a page where none can be put: [`Obstacle::Changing`] while the address space is being changed and an
    /// event is still to be taken, [`Obstacle::Gone`] when it is no more, else [`Obstacle::NotMapped`].
    pub fn probe(&self) -> Obstacle {
        let page = [0u8; PAGE_SIZE as usize];
        self.copy(nowhere(), &page).1.unwrap_or(Obstacle::Other(libc::EIO))
    }

    /// Takes what there is to tell, without waiting. A process that forks, moves or gives memory back waits until it is
    /// taken.
    pub fn events(&self, into: &mut Vec<Event>) -> io::Result<()> {
        self.read(&mut [Message::default(); 16], into)
    }

    /// The same, but one at most: faults come before everything else.
    pub fn event(&self) -> io::Result<Option<Event>> {
        let mut event = Vec::new();
        self.read(&mut [Message::default()], &mut event)?;
        Ok(event.pop())
    }

    /// Whether there is something to be taken other than faults, which leaves whoever made it waiting until it is taken.
    pub fn has_changes(&self) -> io::Result<bool> {
        let mut ready = [nix::poll::PollFd::new(self.fd(), nix::poll::PollFlags::POLLIN)];
        if nix::poll::poll(&mut ready, nix::poll::PollTimeout::ZERO)? == 0 {
            return Ok(false);
        }
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.0.as_raw_fd()))?;
        let pending = text.lines().find_map(|line| line.strip_prefix("pending:"));
        let pending: Option<u64> = pending.and_then(|number| number.trim().parse().ok());
        Ok(pending.ok_or(io::ErrorKind::InvalidData)? == 0)
    }

    fn read(&self, messages: &mut [Message], into: &mut Vec<Event>) -> io::Result<()> {
        // SAFETY: the kernel writes whole messages, at most as many as fit.
        let got = unsafe {
            libc::read(self.0.as_raw_fd(), messages.as_mut_ptr().cast(), size_of_val(messages) as libc::size_t)
        };
        if got < 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(()),
                _ => Err(error),
            };
        }
        for message in &messages[..got as usize / size_of::<Message>()] {
            let [first, second, third] = message.arguments;
            into.push(match message.event {
                0x12 => Event::Fault { address: second & !(PAGE_SIZE - 1), tid: Pid(third as i32) },
                // SAFETY: the kernel has just made this descriptor for us.
                0x13 => Event::Fork(unsafe { OwnedFd::from_raw_fd(first as u32 as RawFd) }),
                0x14 => Event::Moved { from: first, to: second, len: third },
                0x15 => Event::Removed { start: first, end: second },
                0x16 => Event::Unmapped { start: first, end: second },
                other => return Err(io::Error::other(format!("userfaultfd tells an unknown event {other:#x}"))),
            });
        }
        Ok(())
    }
}

/// The lowest address that a program can map. The backend registers nothing there ([`crate::LOWEST`]).
fn nowhere() -> u64 {
    static LOWEST: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    *LOWEST.get_or_init(|| {
        let text = std::fs::read_to_string("/proc/sys/vm/mmap_min_addr").unwrap_or_default();
        text.trim().parse::<u64>().unwrap_or(0).max(0x10000).next_multiple_of(PAGE_SIZE)
    })
}

/// `pidfd_open(2)`.
pub fn pidfd_open(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.0, 0) } as libc::c_int)?;
    // SAFETY: a new descriptor, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `pidfd_send_signal(2)`, by the number of a descriptor.
pub fn pidfd_send_signal(pidfd: RawFd, signal: i32) {
    // SAFETY: no memory is passed. Fails where the process is gone, which is what is wanted.
    unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd, signal, std::ptr::null::<u8>(), 0) };
}

pub fn kill(pid: Pid, signal: i32) {
    // SAFETY: no memory is passed.
    unsafe { libc::kill(pid.0, signal) };
}

/// Which side of a fork one is on.
pub enum Fork {
    Parent(Pid),
    Child,
}

/// fork(2).
pub fn fork() -> io::Result<Fork> {
    // SAFETY: the child runs the pager, which needs nothing of other threads: glibc sees to its own locks.
    match check(unsafe { libc::fork() })? {
        0 => Ok(Fork::Child),
        pid => Ok(Fork::Parent(Pid(pid))),
    }
}

/// A process with a copy of our memory that shares our table of descriptors (`CLONE_FILES`): what one of the two opens or
/// closes, the other has or has not, and what is open stays so until both are gone.
pub fn fork_sharing_descriptors() -> io::Result<Fork> {
    // SAFETY: like fork(2): the child goes on with a copy of our memory. The caller has one thread.
    match check(unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_FILES | libc::SIGCHLD, 0, 0, 0, 0) } as libc::c_int)?
    {
        0 => Ok(Fork::Child),
        pid => Ok(Fork::Parent(Pid(pid))),
    }
}

/// Takes the status of a child that has ended.
pub fn reap(pid: Pid) {
    let mut status = 0;
    // SAFETY: the status lives through the call.
    unsafe { libc::waitpid(pid.0, &mut status, libc::WNOHANG) };
}

/// Ends without running destructors: what our parent left in our memory is not ours.
pub fn exit(status: i32) -> ! {
    // SAFETY: does not return.
    unsafe { libc::_exit(status) }
}

/// Asks the kernel to send `signal` to `pid` when something happens at a descriptor: for a pipe, when its other end is
/// closed (`F_SETOWN`, `F_SETSIG`, `O_ASYNC`, fcntl(2)).
pub fn signal_on_hang_up(fd: BorrowedFd<'_>, pid: Pid, signal: i32) -> io::Result<()> {
    let fd = fd.as_raw_fd();
    // SAFETY: these calls take integers.
    unsafe {
        check(libc::fcntl(fd, libc::F_SETOWN, pid.0))?;
        const F_SETSIG: libc::c_int = 10;
        check(libc::fcntl(fd, F_SETSIG, signal))?;
        check(libc::fcntl(fd, libc::F_SETFL, libc::O_RDONLY | libc::O_NONBLOCK | libc::O_ASYNC))?;
    }
    Ok(())
}

/// A copy of a descriptor, with the lowest free number from `from` on.
pub fn duplicate_from(fd: BorrowedFd<'_>, from: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: takes integers.
    let new = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, from) })?;
    // SAFETY: a new descriptor, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}

/// Leaves nothing open but the standard descriptors, which lead nowhere, and those given, under their old numbers.
pub fn keep_only(keep: &[RawFd]) -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    // SAFETY: the standard descriptors are replaced, and all others that are not to be kept are closed: whatever of this
    // process's memory believes to own them is never used again, as this process never returns to it.
    unsafe {
        for standard in 0..3 {
            check(libc::dup2(null.as_raw_fd(), standard))?;
        }
        let mut keep: Vec<u32> = keep.iter().map(|&fd| fd as u32).collect();
        keep.sort_unstable();
        let mut from = 3;
        for fd in keep {
            if fd > from {
                check(libc::close_range(from, fd - 1, 0))?;
            }
            from = fd + 1;
        }
        check(libc::close_range(from, u32::MAX, 0))?;
    }
    std::mem::forget(null);
    Ok(())
}

/// How many bytes of a socket the other side has not confirmed yet (`SIOCOUTQ`, tcp(7)); 0 where that cannot be seen.
pub fn bytes_unsent(socket: BorrowedFd<'_>) -> usize {
    let mut bytes: libc::c_int = 0;
    // SAFETY: writes an integer of ours.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &mut bytes) } {
        0 => usize::try_from(bytes).unwrap_or(0),
        _ => 0,
    }
}

/// Takes our nice value down by so much.
pub fn raise_priority(by: i32) {
    // SAFETY: no memory is passed.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, libc::getpriority(libc::PRIO_PROCESS, 0) - by) };
}

/// Ignores what a terminal, a service manager or a closed socket would end us with: the tree needs us as long as it runs.
pub fn ignore_signals() {
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGPIPE, libc::SIGTSTP] {
        // SAFETY: no handler is set.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

static SWEEP_NOW: AtomicBool = AtomicBool::new(false);

/// From now on SIGUSR1 is noted.
pub fn note_sweep_signal() {
    extern "C" fn note(_signal: libc::c_int) {
        SWEEP_NOW.store(true, Ordering::Relaxed);
    }
    // SAFETY: the handler only stores to an atomic.
    unsafe { libc::signal(libc::SIGUSR1, note as extern "C" fn(libc::c_int) as libc::sighandler_t) };
}

/// Whether it came.
pub fn sweep_signal_came() -> bool {
    SWEEP_NOW.load(Ordering::Relaxed)
}

/// `PR_SET_NAME`: what `ps` shows.
pub fn set_name(name: &std::ffi::CStr) {
    // SAFETY: the string lives through the call.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// Writes a line to the system's log.
pub fn log_error(text: &str) {
    let Ok(text) = std::ffi::CString::new(text.replace('\0', " ")) else { return };
    // SAFETY: the format takes one string, and both live through the calls.
    unsafe {
        libc::openlog(c"ckpt".as_ptr(), libc::LOG_PID, libc::LOG_DAEMON);
        libc::syslog(libc::LOG_ERR, c"%s".as_ptr(), text.as_ptr());
        libc::closelog();
    }
}

/// A shared mapping of ours that nobody reads or writes: pages are put into what it is of through it.
pub struct Window {
    address: u64,
    len: u64,
}

impl Window {
    /// A window on all of a memory file.
    pub fn on(file: BorrowedFd<'_>, len: u64) -> io::Result<Window> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_NORESERVE);
        // SAFETY: a new mapping, wherever the kernel finds room.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), len as usize, protection, flags, file.as_raw_fd(), 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let window = Window { address: address as u64, len };
        // SAFETY: our own mapping. A guardian has no use for it.
        check(unsafe { libc::madvise(address, len as usize, libc::MADV_DONTFORK) })?;
        Ok(window)
    }

    pub fn address(&self) -> u64 {
        self.address
    }

    pub fn len(&self) -> u64 {
        self.len
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nobody has a reference into.
        unsafe { libc::munmap(self.address as *mut libc::c_void, self.len as usize) };
    }
}

/// A few words that the pager and its guardian both see.
pub struct SharedWords {
    address: *mut AtomicU32,
    words: usize,
}

// SAFETY: the words are only reached as atomics.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Zeros, shared with what we fork from now on. Never unmapped.
    pub fn new(words: usize) -> io::Result<SharedWords> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, wherever the kernel finds room.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), words * 4, protection, flags, -1, 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(SharedWords { address: address.cast(), words })
    }

    pub fn len(&self) -> usize {
        self.words
    }

    pub fn word(&self, index: usize) -> &AtomicU32 {
        assert!(index < self.words);
        // SAFETY: inside of the mapping, which is never unmapped; all access is atomic.
        unsafe { &*self.address.add(index) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_as_long_as_the_kernel_has_them() {
        assert_eq!(std::mem::offset_of!(Message, arguments), 8);
    }
}
