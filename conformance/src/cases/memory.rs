//! Address spaces: mappings of every kind, and what is in them.

use std::ffi::c_void;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

use crate::case::{Case, Checkpoint};

mod changes;
mod kinds;

pub(super) const PAGE: usize = 4096;
const READ: i32 = libc::PROT_READ;
const WRITE: i32 = libc::PROT_WRITE;
const EXECUTE: i32 = libc::PROT_EXEC;

pub fn cases() -> Vec<Case> {
    let memory = &["memory"];
    let files = &["memory", "files"];
    let mut cases = vec![
        Case::new("memory/anonymous", memory, anonymous),
        Case::new("memory/file-private", files, file_private),
        Case::new("memory/file-shared", files, file_shared),
        Case::new("memory/file-deleted", files, file_deleted)
            .privileged("to follow map_files takes CAP_CHECKPOINT_RESTORE"),
        Case::new("memory/file-shorter-than-mapping", files, file_shorter_than_mapping),
        Case::new("memory/shared-anonymous", memory, shared_anonymous),
        Case::new("memory/copy-on-write", memory, copy_on_write),
        Case::new("memory/memfd", &["memory", "memfds"], memfd),
        Case::new("memory/stack-grows", memory, stack_grows),
        Case::new("memory/below-a-small-stack", memory, below_a_small_stack).needs(&["data right below a small stack"]),
        Case::new("memory/heap", memory, heap),
        Case::new("memory/protections", memory, protections),
        Case::new("memory/guard-pages", &["memory", "files", "memfds"], guard_pages)
            .privileged("shared memory with guard pages is copied through map_files"),
        Case::new("memory/reservations", memory, reservations),
        Case::new("memory/advice", memory, advice),
        Case::new("memory/locked", memory, locked),
        Case::new("memory/locked-future", memory, locked_future),
        Case::new("memory/written-code", memory, written_code),
        Case::new("memory/many-mappings", memory, many_mappings),
        Case::new("memory/vdso", memory, vdso),
        Case::new("memory/layout", memory, layout),
    ];
    cases.extend(changes::cases());
    cases.extend(kinds::cases());
    cases
}

/// A mapping of ours, never unmapped.
#[derive(Clone, Copy)]
pub(super) struct Pages {
    pub(super) start: *mut u8,
}

impl Pages {
    fn map(pages: usize, protection: i32, flags: i32, file: Option<(&dyn AsRawFd, usize)>) -> Result<Pages, String> {
        let (fd, offset) = file.map_or((-1, 0), |(file, page)| (file.as_raw_fd(), (page * PAGE) as i64));
        // SAFETY: a new mapping at a place that the kernel chooses.
        let start = unsafe { libc::mmap(ptr::null_mut(), pages * PAGE, protection, flags, fd, offset) };
        if start == libc::MAP_FAILED {
            return Err(format!("mmap of {pages} pages: {}", io::Error::last_os_error()));
        }
        Ok(Pages { start: start.cast() })
    }

    pub(super) fn anonymous(pages: usize) -> Result<Pages, String> {
        Pages::map(pages, READ | WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)
    }

    /// Fills a page with a pattern that only this `seed` has.
    pub(super) fn fill(self, page: usize, seed: u64) {
        for at in 0..PAGE / 8 {
            // SAFETY: within the mapping, aligned, and the caller has made the page writable.
            unsafe { self.start.add(page * PAGE).cast::<u64>().add(at).write_volatile(pattern(seed, at)) };
        }
    }

    pub(super) fn expect(self, page: usize, seed: u64, what: &str) -> Result<(), String> {
        for at in 0..PAGE / 8 {
            // SAFETY: within the mapping, aligned, and the caller has made the page readable.
            let found = unsafe { self.start.add(page * PAGE).cast::<u64>().add(at).read_volatile() };
            let expected = pattern(seed, at);
            if found != expected {
                return Err(format!("{what}: word {at} of page {page} should be {expected:#x}, is {found:#x}"));
            }
        }
        Ok(())
    }

    fn word(&self, page: usize) -> &AtomicU32 {
        // SAFETY: within the mapping, which is never unmapped, and aligned.
        unsafe { &*self.start.add(page * PAGE).cast::<AtomicU32>() }
    }

    pub(super) fn protect(self, page: usize, pages: usize, protection: i32) -> Result<(), String> {
        // SAFETY: changes pages of this mapping only.
        let result = unsafe { libc::mprotect(self.start.add(page * PAGE).cast(), pages * PAGE, protection) };
        if result == 0 { Ok(()) } else { Err(format!("mprotect: {}", io::Error::last_os_error())) }
    }

    pub(super) fn advise(self, page: usize, pages: usize, advice: i32) -> Result<(), String> {
        // SAFETY: advice used here takes no data away.
        let result = unsafe { libc::madvise(self.start.add(page * PAGE).cast(), pages * PAGE, advice) };
        if result == 0 { Ok(()) } else { Err(format!("madvise {advice}: {}", io::Error::last_os_error())) }
    }

    pub(super) fn address(self) -> u64 {
        self.start as u64
    }
}

/// Seed 0 stands for zeros.
pub(super) fn pattern(seed: u64, at: usize) -> u64 {
    seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(seed.min(1) * at as u64)
}

/// How a child ends that does this.
pub(super) fn in_child(work: impl FnOnce() -> i32) -> Result<WaitStatus, String> {
    // SAFETY: subjects that use this have one thread.
    match unsafe { fork() }.map_err(|error| format!("fork: {error}"))? {
        ForkResult::Child => {
            let status = work();
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(status) }
        }
        ForkResult::Parent { child } => waitpid(child, None).map_err(|error| format!("waitpid: {error}")),
    }
}

fn touching_kills(pages: Pages, page: usize, write: bool, signal: Signal, what: &str) -> Result<(), String> {
    let status = in_child(|| {
        // SAFETY: it is meant to be the end of the child.
        unsafe {
            let at = pages.start.add(page * PAGE);
            if write {
                at.write_volatile(1)
            } else {
                std::hint::black_box(at.read_volatile());
            }
        }
        0
    })?;
    match status {
        WaitStatus::Signaled(_, found, _) if found == signal => Ok(()),
        other => Err(format!("{what} should end in {signal}, ended in {other:?}")),
    }
}

/// The `VmFlags` of the mapping that holds an address, without what shows for as long as memory is still on its way after
/// a restore (`um`).
fn flags_at(address: u64) -> Result<String, String> {
    let smaps = fs::read_to_string("/proc/self/smaps").map_err(|error| error.to_string())?;
    let mut inside = false;
    for line in smaps.lines() {
        if let Some((start, end)) = line.split(' ').next().and_then(|range| range.split_once('-')) {
            if let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16)) {
                inside = (start..end).contains(&address);
            }
        } else if let Some(flags) = line.strip_prefix("VmFlags:").filter(|_| inside) {
            return Ok(flags.split_whitespace().filter(|&flag| flag != "um").collect::<Vec<_>>().join(" "));
        }
    }
    Err(format!("there is no mapping at {address:#x}"))
}

pub(super) fn same<T: PartialEq + std::fmt::Debug>(what: &str, before: T, after: T) -> Result<(), String> {
    if before == after { Ok(()) } else { Err(format!("{what}: was {before:?}, is {after:?}")) }
}

fn new_file(checkpoint: &Checkpoint, name: &str, pages: u64) -> Result<File, String> {
    let path = checkpoint.dir().join(name);
    let file = File::options().read(true).write(true).create_new(true).open(path);
    let file = file.map_err(|error| format!("{name}: {error}"))?;
    for page in 0..pages {
        let words: Vec<u8> = (0..PAGE / 8).flat_map(|at| pattern(page + 1, at).to_ne_bytes()).collect();
        file.write_all_at(&words, page * PAGE as u64).map_err(|error| error.to_string())?;
    }
    Ok(file)
}

fn file_page(file: &File, page: u64) -> Result<u64, String> {
    let mut word = [0; 8];
    file.read_exact_at(&mut word, page * PAGE as u64).map_err(|error| error.to_string())?;
    Ok(u64::from_ne_bytes(word))
}

fn anonymous(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = Pages::anonymous(1024)?;
    let seed = |page: usize| if page.is_multiple_of(3) { page as u64 + 1 } else { 0 };
    for page in (0..1024).filter(|&page| seed(page) != 0) {
        pages.fill(page, seed(page));
    }
    checkpoint.wait()?;
    for page in 0..1024 {
        pages.expect(page, seed(page), "anonymous memory")?;
        pages.fill(page, 77);
    }
    Ok(())
}

fn file_private(checkpoint: &Checkpoint) -> Result<(), String> {
    let file = new_file(checkpoint, "private", 4)?;
    let pages = Pages::map(4, READ | WRITE, libc::MAP_PRIVATE, Some((&file, 0)))?;
    let offset = Pages::map(2, READ, libc::MAP_PRIVATE, Some((&file, 2)))?;
    pages.fill(1, 100);
    checkpoint.wait()?;
    for (page, seed) in [(0, 1), (1, 100), (2, 3), (3, 4)] {
        pages.expect(page, seed, "private mapping")?;
    }
    offset.expect(0, 3, "mapping at an offset")?;
    pages.fill(2, 200);
    same("page 1 of the file", pattern(2, 0), file_page(&file, 1)?)?;
    same("page 2 of the file, after a private write", pattern(3, 0), file_page(&file, 2)?)?;
    // A page that was not written still shows the file.
    file.write_all_at(&[7; PAGE], 3 * PAGE as u64).map_err(|error| error.to_string())?;
    // SAFETY: within the mapping.
    same("a clean page after a write to the file", 7, unsafe { pages.start.add(3 * PAGE).read_volatile() })
}

fn file_shared(checkpoint: &Checkpoint) -> Result<(), String> {
    let file = new_file(checkpoint, "shared", 3)?;
    let pages = Pages::map(3, READ | WRITE, libc::MAP_SHARED, Some((&file, 0)))?;
    let readable = Pages::map(1, READ, libc::MAP_SHARED, Some((&file, 1)))?;
    pages.fill(0, 50);
    checkpoint.wait()?;
    for (page, seed) in [(0, 50), (1, 2), (2, 3)] {
        pages.expect(page, seed, "shared mapping")?;
    }
    pages.fill(1, 60);
    readable.expect(0, 60, "another mapping of the same page")?;
    same("the file after a write to the mapping", pattern(60, 0), file_page(&file, 1)?)
}

fn file_deleted(checkpoint: &Checkpoint) -> Result<(), String> {
    let file = new_file(checkpoint, "deleted", 3)?;
    let shared = Pages::map(3, READ | WRITE, libc::MAP_SHARED, Some((&file, 0)))?;
    let private = Pages::map(3, READ | WRITE, libc::MAP_PRIVATE, Some((&file, 0)))?;
    private.fill(2, 30);
    shared.fill(0, 40);
    fs::remove_file(checkpoint.dir().join("deleted")).map_err(|error| error.to_string())?;
    drop(file);
    checkpoint.wait()?;
    shared.expect(0, 40, "shared mapping of a deleted file")?;
    private.expect(0, 40, "private mapping of a deleted file")?;
    private.expect(1, 2, "private mapping of a deleted file")?;
    private.expect(2, 30, "written private mapping of a deleted file")?;
    shared.expect(2, 3, "shared mapping of a deleted file")?;
    shared.fill(1, 70);
    private.expect(1, 70, "the two mappings are of one file, so that")
}

fn file_shorter_than_mapping(checkpoint: &Checkpoint) -> Result<(), String> {
    let file = new_file(checkpoint, "short", 1)?;
    let private = Pages::map(3, READ | WRITE, libc::MAP_PRIVATE, Some((&file, 0)))?;
    let shared = Pages::map(3, READ | WRITE, libc::MAP_SHARED, Some((&file, 0)))?;
    checkpoint.wait()?;
    private.expect(0, 1, "the page that is in the file")?;
    touching_kills(private, 1, false, Signal::SIGBUS, "reading past the file (private)")?;
    touching_kills(shared, 2, true, Signal::SIGBUS, "writing past the file (shared)")?;
    file.set_len(3 * PAGE as u64).map_err(|error| error.to_string())?;
    shared.fill(2, 9);
    private.expect(2, 9, "after the file became longer")
}

fn shared_anonymous(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = Pages::map(8, READ | WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS, None)?;
    pages.fill(2, 5);
    // SAFETY: this subject has one thread; the child only uses async-signal-safe functions and leaves by _exit.
    let child = match unsafe { fork() }.map_err(|error| format!("fork: {error}"))? {
        ForkResult::Child => {
            let ok = checkpoint.wait_for_go().is_ok() && pages.expect(2, 5, "").is_ok();
            let word = pages.word(4);
            while word.load(SeqCst) != 1 {
                std::thread::yield_now();
            }
            pages.fill(6, 8);
            word.store(if ok { 2 } else { 3 }, SeqCst);
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(if ok { 0 } else { 1 }) }
        }
        ForkResult::Parent { child } => child,
    };
    checkpoint.wait()?;
    pages.expect(2, 5, "shared memory")?;
    pages.word(4).store(1, SeqCst);
    let status = waitpid(child, None);
    same("the child's end", Ok(WaitStatus::Exited(child, 0)), status)?;
    same("the word that the child has set", 2, pages.word(4).load(SeqCst))?;
    pages.expect(6, 8, "the page that the child has written")
}

fn copy_on_write(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = Pages::anonymous(64)?;
    for page in 0..64 {
        pages.fill(page, page as u64 + 1);
    }
    // SAFETY: as above.
    let child = match unsafe { fork() }.map_err(|error| format!("fork: {error}"))? {
        ForkResult::Child => {
            for page in 0..16 {
                pages.fill(page, 500);
            }
            let mut ok = checkpoint.ready().is_ok() && checkpoint.wait_for_go().is_ok();
            for page in 0..64 {
                ok &= pages.expect(page, if page < 16 { 500 } else { page as u64 + 1 }, "").is_ok();
            }
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(if ok { 0 } else { 1 }) }
        }
        ForkResult::Parent { child } => child,
    };
    for page in 16..32 {
        pages.fill(page, 600);
    }
    checkpoint.wait_for_go()?;
    for page in 0..64 {
        let written = (16..32).contains(&page);
        // The child may have been forked before or after the parent wrote: both have their own copies.
        pages.expect(page, if written { 600 } else { page as u64 + 1 }, "the parent's copy")?;
    }
    same("the child's end", Ok(WaitStatus::Exited(child, 0)), waitpid(child, None))
}

fn memfd(checkpoint: &Checkpoint) -> Result<(), String> {
    // SAFETY: a C string; the descriptor is owned from here on.
    let file = unsafe {
        let fd = libc::memfd_create(c"conformance".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
        if fd < 0 {
            return Err(format!("memfd_create: {}", io::Error::last_os_error()));
        }
        File::from(OwnedFd::from_raw_fd(fd))
    };
    file.set_len(8 * PAGE as u64).map_err(|error| error.to_string())?;
    let one = Pages::map(8, READ | WRITE, libc::MAP_SHARED, Some((&file, 0)))?;
    let other = Pages::map(2, READ | WRITE, libc::MAP_SHARED, Some((&file, 3)))?;
    one.fill(4, 11);
    // SAFETY: fcntl with integers on an open descriptor.
    let seals = || unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    // SAFETY: as above.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW) };
    let before = (seals(), file.metadata().map_err(|error| error.to_string())?.len());
    checkpoint.wait()?;
    one.expect(4, 11, "memfd mapping")?;
    other.expect(1, 11, "the same page of the memfd elsewhere")?;
    other.fill(0, 12);
    one.expect(3, 12, "after a write to the other mapping")?;
    same("the memfd read through its descriptor", pattern(12, 0), file_page(&file, 3)?)?;
    same("seals and length", before, (seals(), file.metadata().map_err(|error| error.to_string())?.len()))
}

#[inline(never)]
fn use_stack(frames: usize) -> u64 {
    let mut frame = [0_u8; 16 * 1024];
    for at in (0..frame.len()).step_by(512) {
        frame[at] = frames as u8;
    }
    std::hint::black_box(&mut frame);
    let below = if frames == 0 { 0 } else { use_stack(frames - 1) };
    below + u64::from(frame[512])
}

/// The main thread's stack, and one of MAP_GROWSDOWN, grow after the restore as before.
fn stack_grows(checkpoint: &Checkpoint) -> Result<(), String> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_GROWSDOWN;
    let area = Pages::map(512, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)?;
    // SAFETY: maps the last page of the area anew and takes the rest away, so that there is room below.
    let last = unsafe {
        let at = area.start.add(511 * PAGE).cast::<c_void>();
        let last = libc::mmap(at, PAGE, READ | WRITE, flags | libc::MAP_FIXED, -1, 0);
        libc::munmap(area.start.cast(), 511 * PAGE);
        last.cast::<u8>()
    };
    // SAFETY: within the mapping.
    unsafe { last.write_volatile(1) };
    let before = (use_stack(20), flags_at(last as u64)?);
    checkpoint.wait()?;
    same("the flags of a mapping that grows down", before.1, flags_at(last as u64)?)?;
    // SAFETY: one page further down each time: the kernel makes the mapping larger.
    unsafe {
        for page in 1..64 {
            last.sub(page * PAGE).write_volatile(page as u8);
        }
        same("the first byte of the grown stack", 1, last.read_volatile())?;
    }
    // 4.8 MiB below here, of the 8 MiB that a stack may have.
    if use_stack(300) == 0 {
        return Err("the stack held nothing".into());
    }
    same("what the stack held", before.0, use_stack(20))
}

/// A thread on a stack of its own making, with data of the program right below it, as coroutines have them: whoever makes
/// calls in its name wrote there, and that was what the image had.
fn below_a_small_stack(checkpoint: &Checkpoint) -> Result<(), String> {
    const DATA: usize = 16;
    let pages = Pages::anonymous(DATA + 2)?;
    let bytes = pages.address() as *mut u8;
    let expected = |at: usize| (at as u8).wrapping_mul(7);
    for at in 0..DATA * 4096 {
        // SAFETY: inside the mapping, which only this thread uses now.
        unsafe { bytes.add(at).write(expected(at)) };
    }
    let (stop, started) = (&AtomicU32::new(0), &AtomicU32::new(0));
    let top = pages.address() + (DATA as u64) * 4096 + 2048;
    let waited = std::thread::scope(|scope| {
        scope.spawn(move || {
            let pause = [0u64, 1_000_000];
            started.store(1, SeqCst);
            // SAFETY: nanosleep in a loop, with a stack pointer 2 KiB above the data, and nothing that uses a stack; it
            // is put back at the end.
            unsafe {
                std::arch::asm!(
                    "mov r12, rsp", "mov rsp, r13",
                    "2:", "mov eax, 35", "mov rdi, r14", "xor esi, esi", "syscall",
                    "cmp dword ptr [r15], 0", "je 2b",
                    "mov rsp, r12",
                    in("r13") top, in("r14") pause.as_ptr(),
                    in("r15") stop.as_ptr(), out("r12") _, out("rax") _, out("rcx") _, out("r11") _, out("rdi") _,
                    out("rsi") _,
                );
            }
        });
        // What a thread maps for itself when it starts is there before the tree is looked at.
        while started.load(SeqCst) == 0 {
            std::thread::yield_now();
        }
        let waited = checkpoint.wait();
        stop.store(1, SeqCst);
        waited
    });
    waited?;
    // SAFETY: inside the mapping, which only this thread uses again.
    let wrong = (0..DATA * 4096).find(|&at| unsafe { bytes.add(at).read() } != expected(at));
    wrong.map_or(Ok(()), |at| Err(format!("byte {at} of {} below the stack has changed", DATA * 4096)))
}

fn heap(checkpoint: &Checkpoint) -> Result<(), String> {
    // SAFETY: sbrk moves the end of the heap, which nothing but this does while it runs (one thread, no malloc between).
    let place = unsafe { libc::sbrk(64 * PAGE as isize) };
    let start = (place as usize).next_multiple_of(PAGE);
    let pages = Pages { start: start as *mut u8 };
    for page in 0..63 {
        pages.fill(page, page as u64 + 9);
    }
    // SAFETY: asks only.
    let end = unsafe { libc::sbrk(0) } as usize;
    checkpoint.wait()?;
    // SAFETY: asks only.
    same("the end of the heap", end, unsafe { libc::sbrk(0) } as usize)?;
    for page in 0..63 {
        pages.expect(page, page as u64 + 9, "the heap")?;
    }
    // SAFETY: as above.
    let more = unsafe { libc::sbrk(256 * PAGE as isize) } as usize;
    same("where the heap grows", end, more)?;
    // SAFETY: 256 new pages begin here.
    unsafe { ((end + 255 * PAGE) as *mut u8).write_volatile(1) };
    let allocated: Vec<Vec<u8>> = (1..200).map(|size| vec![size as u8; size * 100]).collect();
    same("what malloc gave", (1..200).sum::<usize>() * 100, allocated.iter().map(Vec::len).sum())
}

fn protections(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = Pages::anonymous(8)?;
    for page in 0..8 {
        pages.fill(page, page as u64 + 20);
    }
    pages.protect(0, 1, libc::PROT_NONE)?;
    pages.protect(2, 1, READ)?;
    pages.protect(4, 1, WRITE)?;
    pages.protect(6, 1, READ | EXECUTE)?;
    checkpoint.wait()?;
    touching_kills(pages, 0, false, Signal::SIGSEGV, "reading a guard page")?;
    touching_kills(pages, 0, true, Signal::SIGSEGV, "writing a guard page")?;
    touching_kills(pages, 2, true, Signal::SIGSEGV, "writing a read-only page")?;
    touching_kills(pages, 6, true, Signal::SIGSEGV, "writing a page of code")?;
    pages.protect(0, 8, READ)?;
    for page in 0..8 {
        pages.expect(page, page as u64 + 20, "under any protection")?;
    }
    Ok(())
}

const MADV_GUARD_INSTALL: i32 = 102;
const MADV_GUARD_REMOVE: i32 = 103;

/// What `write` gives that is to read a page: the kernel touches it for us.
fn touch(pipe: &OwnedFd, page: *const u8) -> Result<isize, i32> {
    // SAFETY: the kernel looks at the page; where it cannot, it says so.
    let result = unsafe { libc::write(pipe.as_raw_fd(), page.cast(), 1) };
    if result < 0 { Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)) } else { Ok(result) }
}

fn make_memfd(name: &str, pages: usize) -> Result<File, String> {
    let name = std::ffi::CString::new(name).expect("no NUL");
    // SAFETY: the name is a C string, and the new descriptor is owned by nobody else.
    let file = unsafe {
        let fd = libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(format!("memfd_create: {}", io::Error::last_os_error()));
        }
        File::from_raw_fd(fd)
    };
    file.set_len((pages * PAGE) as u64).map_err(|error| format!("ftruncate: {error}"))?;
    Ok(file)
}

/// Pages that no access may touch (`MADV_GUARD_INSTALL`), in memory of every kind, beside pages with data.
fn guard_pages(checkpoint: &Checkpoint) -> Result<(), String> {
    const COUNT: usize = 700;
    let path = checkpoint.dir().join("guarded");
    fs::write(&path, vec![b'f'; 8 * PAGE]).map_err(|error| format!("write: {error}"))?;
    let file = File::options().read(true).write(true).open(&path).map_err(|error| format!("open: {error}"))?;
    let memfd = make_memfd("guarded", 8)?;
    let private = Pages::anonymous(COUNT)?;
    let others = [
        (Pages::map(8, READ | WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS, None)?, true),
        (Pages::map(8, READ | WRITE, libc::MAP_PRIVATE, Some((&file, 0)))?, true),
        (Pages::map(8, READ | WRITE, libc::MAP_SHARED, Some((&file, 0)))?, true),
        (Pages::map(8, READ, libc::MAP_PRIVATE, Some((&file, 0)))?, false),
        (Pages::map(8, READ | WRITE, libc::MAP_SHARED, Some((&memfd, 0)))?, true),
        (Pages::anonymous(8)?, true),
    ];
    let locked = others[5].0;
    // Single ones and runs, more than a batch holds calls.
    let guarded = |page: usize| page.is_multiple_of(3) || (600..620).contains(&page);
    for page in 0..COUNT {
        if guarded(page) {
            private.advise(page, 1, MADV_GUARD_INSTALL)?;
        } else if !page.is_multiple_of(5) {
            private.fill(page, page as u64);
        }
    }
    for (index, (pages, writable)) in others.into_iter().enumerate() {
        if writable {
            pages.fill(1, 1000 + index as u64);
        }
        pages.advise(2, 2, MADV_GUARD_INSTALL)?;
        pages.advise(7, 1, MADV_GUARD_INSTALL)?;
    }
    // It says ENOMEM, as it cannot bring in a guard page, and locks nevertheless.
    // SAFETY: locks pages of this mapping.
    unsafe { libc::mlock(locked.start.cast(), 8 * PAGE) };
    let flags = || smaps_flags(locked.address());
    let before = flags()?;
    if !before.contains(" lo") {
        return Err(format!("the subject is wrong: locked memory has {before}"));
    }
    // SAFETY: makes two descriptors, which nobody else owns.
    let pipe = unsafe {
        let mut ends = [0; 2];
        if libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) < 0 {
            return Err(format!("pipe2: {}", io::Error::last_os_error()));
        }
        (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]))
    };

    checkpoint.wait()?;

    let expect = |pages: Pages, page: usize, expected: Result<isize, i32>, what: &str| {
        // SAFETY: an address within the mapping.
        let found = touch(&pipe.1, unsafe { pages.start.add(page * PAGE) });
        if found == expected { Ok(()) } else { Err(format!("{what}: touching page {page} gave {found:?}")) }
    };
    for page in 0..COUNT {
        if guarded(page) {
            expect(private, page, Err(libc::EFAULT), "private memory")?;
        } else {
            let seed = if page.is_multiple_of(5) { 0 } else { page as u64 };
            private.expect(page, seed, "private memory beside guard pages")?;
        }
    }
    for (index, (pages, writable)) in others.into_iter().enumerate() {
        let what = format!("memory of kind {index}");
        for page in [2, 3, 7] {
            expect(pages, page, Err(libc::EFAULT), &what)?;
        }
        for page in [0, 1, 4, 5, 6] {
            expect(pages, page, Ok(1), &what)?;
        }
        if writable {
            let seed = 1000 + index as u64;
            pages.expect(1, seed, &what)?;
        }
    }
    if flags()? != before {
        return Err(format!("locked memory had the flags{before}, and has{}", flags()?));
    }
    match in_child(|| {
        private.word(0).load(SeqCst);
        0
    })? {
        WaitStatus::Signaled(_, Signal::SIGSEGV, _) => {}
        other => return Err(format!("reading a guard page ended the child as {other:?}")),
    }
    private.advise(0, 1, MADV_GUARD_REMOVE)?;
    private.expect(0, 0, "a guard page that was taken away")
}

/// The `VmFlags` of the mapping at an address.
fn smaps_flags(address: u64) -> Result<String, String> {
    let smaps = fs::read_to_string("/proc/self/smaps").map_err(|error| format!("smaps: {error}"))?;
    let mapping = smaps.split_once(&format!("{address:08x}-")).ok_or("the mapping is not there")?.1;
    let flags = mapping.lines().find_map(|line| line.strip_prefix("VmFlags:"));
    Ok(flags.ok_or("no VmFlags")?.to_string())
}

fn reservations(checkpoint: &Checkpoint) -> Result<(), String> {
    const TERABYTE: usize = 1 << 40;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let reserved = Pages::map(TERABYTE / PAGE, libc::PROT_NONE, flags, None)?;
    let sparse = Pages::map(TERABYTE / PAGE, READ | WRITE, flags, None)?;
    let touched = [0, 12_345, 100_000_000, TERABYTE / PAGE - 1];
    for page in touched {
        sparse.fill(page, page as u64 + 1);
    }
    let before = (flags_at(reserved.address())?, flags_at(sparse.address())?);
    checkpoint.wait()?;
    for page in touched {
        sparse.expect(page, page as u64 + 1, "a sparse reservation")?;
    }
    sparse.expect(50_000_000, 0, "an untouched page")?;
    same("the flags", before, (flags_at(reserved.address())?, flags_at(sparse.address())?))?;
    reserved.protect(7_000_000, 1, READ | WRITE)?;
    reserved.fill(7_000_000, 3);
    reserved.expect(7_000_000, 3, "a page of the reservation")
}

fn advice(checkpoint: &Checkpoint) -> Result<(), String> {
    let advice = [
        libc::MADV_DONTFORK,
        libc::MADV_DONTDUMP,
        libc::MADV_WIPEONFORK,
        libc::MADV_HUGEPAGE,
        libc::MADV_NOHUGEPAGE,
        libc::MADV_RANDOM,
        libc::MADV_SEQUENTIAL,
    ];
    let pages = Pages::anonymous(advice.len() * 2 * 512)?;
    let first = |index: usize| (index * 2 + 1) * 512;
    for (index, &advice) in advice.iter().enumerate() {
        pages.advise(first(index), 512, advice)?;
        pages.fill(first(index), index as u64 + 1);
    }
    // MADV_WIPEONFORK is about children.
    let all = || {
        let flags = (0..advice.len() * 2).map(|half| flags_at(pages.address() + (half * 512 * PAGE) as u64));
        flags.collect::<Result<Vec<_>, String>>()
    };
    let before = all()?;
    checkpoint.wait()?;
    for (half, (before, after)) in before.into_iter().zip(all()?).enumerate() {
        same(&format!("the flags of part {half}"), before, after)?;
    }
    for index in 0..advice.len() {
        pages.expect(first(index), index as u64 + 1, "advised memory")?;
    }
    let status = in_child(|| if pages.expect(first(2), 0, "").is_ok() { 0 } else { 1 })?;
    if !matches!(status, WaitStatus::Exited(_, 0)) {
        return Err(format!("a child should see zeros where MADV_WIPEONFORK was said: {status:?}"));
    }
    touching_kills(pages, first(0), false, Signal::SIGSEGV, "touching MADV_DONTFORK memory in a child")
}

fn locked_kilobytes() -> Result<String, String> {
    let status = fs::read_to_string("/proc/self/status").map_err(|error| error.to_string())?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:"));
    Ok(line.ok_or("no VmLck line")?.trim().to_string())
}

fn locked(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = Pages::anonymous(16)?;
    // SAFETY: locks pages of ours.
    let results = unsafe {
        [
            libc::mlock(pages.start.add(2 * PAGE).cast(), 3 * PAGE),
            libc::mlock2(pages.start.add(8 * PAGE).cast(), 4 * PAGE, libc::MLOCK_ONFAULT as _),
        ]
    };
    same("mlock, mlock2", [0, 0], results)?;
    pages.fill(3, 1);
    let look = || -> Result<_, String> {
        let flags: Result<Vec<_>, _> =
            [0, 2, 8].map(|page| flags_at(pages.address() + (page * PAGE) as u64)).into_iter().collect();
        Ok((locked_kilobytes()?, flags?))
    };
    let before = look()?;
    checkpoint.wait()?;
    same("what is locked", before, look()?)?;
    pages.expect(3, 1, "a locked page")
}

/// `mlockall(MCL_FUTURE)` is about mappings to come, and shown nowhere.
fn locked_future(checkpoint: &Checkpoint) -> Result<(), String> {
    // SAFETY: takes flags only.
    same("mlockall", 0, unsafe { libc::mlockall(libc::MCL_FUTURE | libc::MCL_ONFAULT) })?;
    let new = || Pages::anonymous(4).and_then(|pages| flags_at(pages.address()));
    let before = new()?;
    if !before.split(' ').any(|flag| flag == "lo") {
        return Err(format!("a new mapping is not locked: {before}"));
    }
    checkpoint.wait()?;
    same("the flags of a new mapping", before, new()?)
}

fn written_code(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = Pages::map(1, READ | WRITE | EXECUTE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)?;
    // mov eax, 42; ret
    let code = [0xb8, 42, 0, 0, 0, 0xc3];
    // SAFETY: writes within the mapping.
    unsafe { ptr::copy_nonoverlapping(code.as_ptr(), pages.start, code.len()) };
    // SAFETY: the code just written is a function of this signature.
    let function: extern "C" fn() -> i32 = unsafe { std::mem::transmute(pages.start) };
    checkpoint.wait()?;
    same("what the code returns", 42, function())?;
    // SAFETY: within the mapping; the operand of the instruction.
    unsafe { pages.start.add(1).write_volatile(43) };
    same("what the changed code returns", 43, function())
}

fn many_mappings(checkpoint: &Checkpoint) -> Result<(), String> {
    const COUNT: usize = 3000;
    let pages = Pages::anonymous(COUNT)?;
    for page in 0..COUNT {
        if page % 5 == 0 {
            pages.fill(page, page as u64 + 1);
        }
        pages.protect(page, 1, [READ | WRITE, READ][page % 2])?;
    }
    checkpoint.wait()?;
    for page in 0..COUNT {
        pages.expect(page, if page % 5 == 0 { page as u64 + 1 } else { 0 }, "one of many mappings")?;
    }
    Ok(())
}

fn vdso(checkpoint: &Checkpoint) -> Result<(), String> {
    // SAFETY: asks the auxiliary vector.
    let place = || unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) };
    let mapped = || {
        let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
        maps.lines()
            .filter(|line| line.ends_with("[vdso]") || line.contains("[vvar"))
            .map(String::from)
            .collect::<Vec<_>>()
    };
    let before = (place(), mapped());
    let begin = std::time::Instant::now();
    checkpoint.wait()?;
    same("the vdso", before, (place(), mapped()))?;
    // Through the vdso, and through the kernel.
    let mut last = begin;
    for _ in 0..1000 {
        let now = std::time::Instant::now();
        if now < last {
            return Err("the monotonic clock went back".into());
        }
        last = now;
    }
    let mut kernel = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let mut fast = kernel;
    // SAFETY: two timespecs of ours.
    unsafe {
        libc::syscall(libc::SYS_clock_gettime, libc::CLOCK_REALTIME, &mut kernel);
        libc::clock_gettime(libc::CLOCK_REALTIME, &mut fast);
    }
    let apart = (fast.tv_sec - kernel.tv_sec) * 1_000_000_000 + fast.tv_nsec - kernel.tv_nsec;
    if (0..1_000_000_000).contains(&apart) { Ok(()) } else { Err(format!("vdso and kernel are {apart} ns apart")) }
}

/// Where code, data, heap, stack, arguments and environment are, as the kernel keeps it.
fn layout(checkpoint: &Checkpoint) -> Result<(), String> {
    let look = || -> Result<_, String> {
        let stat = fs::read_to_string("/proc/self/stat").map_err(|error| error.to_string())?;
        let fields: Vec<&str> = stat.rsplit_once(") ").ok_or("stat")?.1.split(' ').collect();
        // startcode, endcode, startstack; start_data, end_data, start_brk, arg_*, env_* (proc_pid_stat(5))
        let places: Vec<String> =
            [23, 24, 25, 42, 43, 44, 45, 46, 47, 48].iter().map(|&at| fields[at].to_string()).collect();
        let files = ["cmdline", "environ", "auxv"].map(|name| fs::read(format!("/proc/self/{name}")).ok());
        Ok((places, files, fs::read_link("/proc/self/exe").ok()))
    };
    let before = look()?;
    checkpoint.wait()?;
    same("the layout", before, look()?)
}
