//! What a program does to its memory right after a restore, when pages of it may not be there yet: each operation must find
//! the content that was saved, and mean what it always means.

use std::ffi::c_void;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr;
use std::sync::atomic::Ordering::SeqCst;

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use super::{PAGE, Pages, READ, WRITE, in_child, make_memfd, pattern, same};
use crate::case::{Case, Checkpoint};

pub fn cases() -> Vec<Case> {
    let memory = &["memory"];
    vec![
        Case::new("memory/then-advised", memory, advised),
        Case::new("memory/then-moved", memory, moved),
        Case::new("memory/then-unmapped", memory, unmapped),
        Case::new("memory/then-protected", memory, protected),
        Case::new("memory/then-forked", memory, forked),
        Case::new("memory/then-left", memory, left),
        Case::new("memory/then-touched-by-the-kernel", memory, touched_by_the_kernel)
            .privileged("process_vm_readv is what ordinary users are tried without"),
        Case::new("memory/then-touched-by-all-threads", memory, touched_by_all_threads),
        Case::new("memory/shared-large", memory, shared_large)
            .privileged("a memory file without a descriptor is found through map_files"),
        Case::new("memory/shared-then-given-back", memory, shared_then_given_back),
        Case::new("memory/shared-then-moved", memory, shared_then_moved),
    ]
}

const COUNT: usize = 256;

/// Every third page is a hole.
fn seed(page: usize) -> u64 {
    if page.is_multiple_of(3) { 0 } else { page as u64 + 1 }
}

fn filled(pages: Pages, count: usize) -> Pages {
    (0..count).filter(|&page| seed(page) != 0).for_each(|page| pages.fill(page, seed(page)));
    pages
}

fn expect_all(pages: Pages, range: std::ops::Range<usize>, what: &str) -> Result<(), String> {
    range.into_iter().try_for_each(|page| pages.expect(page, seed(page), what))
}

fn check(what: &str, result: i32) -> Result<(), String> {
    if result == 0 { Ok(()) } else { Err(format!("{what}: {}", std::io::Error::last_os_error())) }
}

/// mremap(2).
fn remap(pages: Pages, page: usize, old: usize, new: usize, to: Option<Pages>) -> Result<Pages, String> {
    let flags = libc::MREMAP_MAYMOVE | if to.is_some() { libc::MREMAP_FIXED } else { 0 };
    let to = to.map_or(ptr::null_mut(), |to| to.start);
    // SAFETY: from one mapping of ours to a place of ours, or one that the kernel chooses.
    let start = unsafe {
        libc::mremap(pages.start.add(page * PAGE).cast(), old * PAGE, new * PAGE, flags, to.cast::<c_void>())
    };
    if start == libc::MAP_FAILED {
        return Err(format!("mremap: {}", std::io::Error::last_os_error()));
    }
    Ok(Pages { start: start.cast() })
}

fn unmap(pages: Pages, page: usize, count: usize) -> Result<(), String> {
    // SAFETY: pages of ours, which nothing is in that is used again.
    check("munmap", unsafe { libc::munmap(pages.start.add(page * PAGE).cast(), count * PAGE) })
}

fn advised(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = filled(Pages::anonymous(COUNT)?, COUNT);
    checkpoint.wait()?;
    pages.advise(32, 32, libc::MADV_DONTNEED)?;
    pages.advise(96, 32, libc::MADV_FREE)?;
    for page in 32..64 {
        pages.expect(page, 0, "after MADV_DONTNEED")?;
    }
    for page in 96..128 {
        // What was there, or zeros: the kernel may choose, for each page.
        if pages.expect(page, 0, "").is_err() {
            pages.expect(page, seed(page), "after MADV_FREE")?;
        }
        pages.fill(page, 7000 + page as u64);
    }
    for page in 96..128 {
        pages.expect(page, 7000 + page as u64, "what was written after MADV_FREE")?;
    }
    for range in [0..32, 64..96, 128..COUNT] {
        expect_all(pages, range, "beside what was given back")?;
    }
    pages.fill(40, 40);
    pages.expect(40, 40, "what was written after MADV_DONTNEED")?;
    pages.expect(41, 0, "after MADV_DONTNEED")
}

fn moved(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = filled(Pages::anonymous(COUNT)?, COUNT);
    let room = Pages::map(COUNT, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)?;
    checkpoint.wait()?;
    // A part from the middle, larger than before.
    let part = remap(pages, 64, 64, 96, Some(room))?;
    for page in 0..64 {
        part.expect(page, seed(64 + page), "memory that was moved")?;
    }
    for page in 64..96 {
        part.expect(page, 0, "what moved memory has grown by")?;
    }
    // Others in its place.
    let fixed = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: where the part was that is elsewhere now.
    let new = unsafe { libc::mmap(pages.start.add(64 * PAGE).cast(), 64 * PAGE, READ | WRITE, fixed, -1, 0) };
    same("the place of a new mapping", pages.address() + 64 * PAGE as u64, new as u64)?;
    for page in 64..128 {
        pages.expect(page, 0, "new memory where moved memory was")?;
    }
    // And back again, with what has not been touched meanwhile of another part.
    let again = remap(pages, 192, 64, 64, Some(Pages { start: room.start.wrapping_add(128 * PAGE) }))?;
    let back = remap(again, 0, 64, 64, Some(Pages { start: pages.start.wrapping_add(192 * PAGE) }))?;
    for page in 0..64 {
        back.expect(page, seed(192 + page), "memory that was moved there and back")?;
    }
    expect_all(pages, 0..64, "beside what was moved")?;
    expect_all(pages, 128..192, "beside what was moved")
}

fn unmapped(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = filled(Pages::anonymous(COUNT)?, COUNT);
    checkpoint.wait()?;
    unmap(pages, 64, 64)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: where nothing is.
    let new = unsafe { libc::mmap(pages.start.add(80 * PAGE).cast(), 16 * PAGE, READ | WRITE, flags, -1, 0) };
    same("the place of a new mapping", pages.address() + 80 * PAGE as u64, new as u64)?;
    for page in 80..96 {
        pages.expect(page, 0, "new memory where other memory was")?;
    }
    expect_all(pages, 0..64, "below what was unmapped")?;
    expect_all(pages, 128..COUNT, "above what was unmapped")
}

fn protected(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = filled(Pages::anonymous(COUNT)?, COUNT);
    checkpoint.wait()?;
    pages.protect(0, 64, libc::PROT_NONE)?;
    pages.protect(64, 64, READ)?;
    pages.protect(0, 32, READ)?;
    expect_all(pages, 0..32, "after PROT_NONE and PROT_READ")?;
    expect_all(pages, 64..COUNT, "memory to be read")?;
    // SAFETY: locks pages of ours, which brings them in.
    check("mlock", unsafe { libc::mlock(pages.start.add(128 * PAGE).cast(), 16 * PAGE) })?;
    expect_all(pages, 128..144, "locked memory")?;
    pages.protect(0, 128, READ | WRITE)?;
    expect_all(pages, 0..128, "memory to be written again")
}

fn forked(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = filled(Pages::anonymous(COUNT)?, COUNT);
    checkpoint.wait()?;
    let mut ends = [0; 2];
    // SAFETY: makes two descriptors, which nobody else owns.
    let (reader, writer) = unsafe {
        check("pipe2", libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC))?;
        (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]))
    };
    // SAFETY: one thread.
    let child = match unsafe { fork() }.map_err(|error| format!("fork: {error}"))? {
        ForkResult::Child => {
            // The parent writes to some pages first, and waits for the child with others.
            let mut told = [0u8];
            let _ = nix::unistd::read(&reader, &mut told);
            let mut ok = expect_all(pages, 0..COUNT, "").is_ok();
            (0..64).for_each(|page| pages.fill(page, 900));
            let grandchild = in_child(|| {
                let own = (0..64).all(|page| pages.expect(page, 900, "").is_ok());
                i32::from(!(own && expect_all(pages, 64..COUNT, "").is_ok()))
            });
            ok &= matches!(grandchild, Ok(WaitStatus::Exited(_, 0)));
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(i32::from(!ok)) }
        }
        ForkResult::Parent { child } => child,
    };
    (128..192).for_each(|page| pages.fill(page, 800));
    nix::unistd::write(&writer, b"x").map_err(|error| error.to_string())?;
    same("the child's end", Ok(WaitStatus::Exited(child, 0)), waitpid(child, None))?;
    expect_all(pages, 0..128, "the parent's, after the child wrote")?;
    (128..192).try_for_each(|page| pages.expect(page, 800, "what the parent wrote"))?;
    expect_all(pages, 192..COUNT, "the parent's")
}

/// Exit and exec while pages are missing; of others nothing is lost by it.
fn left(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = filled(Pages::anonymous(COUNT)?, COUNT);
    checkpoint.wait()?;
    for round in 0..8 {
        let ended = in_child(|| i32::from(pages.expect(round * 16 + 1, seed(round * 16 + 1), "").is_err()))?;
        if !matches!(ended, WaitStatus::Exited(_, 0)) {
            return Err(format!("a child that left early ended as {ended:?}"));
        }
    }
    let shell = c"/bin/sh";
    let arguments = [shell.as_ptr(), c"-c".as_ptr(), c"exit 42".as_ptr(), ptr::null()];
    let executed = in_child(|| {
        // SAFETY: strings and an array that live through the call.
        unsafe { libc::execv(shell.as_ptr(), arguments.as_ptr()) };
        1
    })?;
    if !matches!(executed, WaitStatus::Exited(_, 42)) {
        return Err(format!("a child that runs another program ended as {executed:?}"));
    }
    // SAFETY: the child of vfork only calls execv and _exit, with what was made before.
    let child = unsafe {
        #[allow(deprecated)]
        let child = libc::vfork();
        if child == 0 {
            libc::execv(shell.as_ptr(), arguments.as_ptr());
            libc::_exit(1);
        }
        Pid::from_raw(child)
    };
    same("the end of a child of vfork", Ok(WaitStatus::Exited(child, 42)), waitpid(child, None))?;
    expect_all(pages, 0..COUNT, "after all children have left")
}

fn touched_by_the_kernel(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = filled(Pages::anonymous(COUNT)?, COUNT);
    checkpoint.wait()?;
    let file = make_memfd("through", 4)?;
    let bytes = |from: usize, count: usize| {
        // SAFETY: within the mapping, which lives on; nobody writes to it meanwhile.
        unsafe { std::slice::from_raw_parts(pages.start.add(from * PAGE), count * PAGE) }
    };
    let word = |bytes: &[u8], at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    // write(2) reads four pages that nobody has touched.
    file.write_all_at(bytes(16, 4), 0).map_err(|error| error.to_string())?;
    let mut found = vec![0; 4 * PAGE];
    file.read_exact_at(&mut found, 0).map_err(|error| error.to_string())?;
    for page in 0..4 {
        same("what write(2) has read", pattern(seed(16 + page), 9), word(&found, page * PAGE + 72))?;
    }
    // read(2) writes into the middle of two of them.
    // SAFETY: as above, and nothing else is borrowed of it.
    let place = unsafe { std::slice::from_raw_parts_mut(pages.start.add(32 * PAGE + 2048), PAGE) };
    file.read_exact_at(place, PAGE as u64).map_err(|error| error.to_string())?;
    same("before what read(2) has written", pattern(seed(32), 255), word(bytes(32, 1), 2040))?;
    same("what read(2) has written", pattern(seed(17), 0), word(bytes(32, 1), 2048))?;
    same("after what read(2) has written", pattern(seed(33), 256), word(bytes(33, 1), 2048))?;
    // process_vm_readv(2) of ourselves.
    let mut copy = vec![0u8; PAGE];
    let ours = libc::iovec { iov_base: copy.as_mut_ptr().cast(), iov_len: PAGE };
    let theirs = libc::iovec { iov_base: pages.start.wrapping_add(50 * PAGE).cast(), iov_len: PAGE };
    // SAFETY: two vectors that live through the call.
    let read = unsafe { libc::process_vm_readv(libc::getpid(), &ours, 1, &theirs, 1, 0) };
    same("process_vm_readv", PAGE as isize, read)?;
    same("what process_vm_readv has read", pattern(seed(50), 3), word(&copy, 24))?;
    // /proc/self/mem says that it cannot, or gives what is there; it never gives something else.
    let memory = std::fs::File::open("/proc/self/mem").map_err(|error| error.to_string())?;
    for page in 60..70 {
        match memory.read_exact_at(&mut copy, pages.address() + (page * PAGE) as u64) {
            Ok(()) => same("what /proc/self/mem has", pattern(seed(page), 5), word(&copy, 40))?,
            Err(error) if error.raw_os_error() == Some(libc::EIO) => {}
            Err(error) => return Err(format!("/proc/self/mem: {error}")),
        }
    }
    // A futex word in a page that is not there.
    // SAFETY: a word of the mapping; the value differs, so that it does not wait.
    let waited = unsafe {
        let word = pages.start.add(80 * PAGE).cast::<u32>();
        libc::syscall(libc::SYS_futex, word, libc::FUTEX_WAIT, pattern(seed(80), 0) as u32 ^ 1, ptr::null::<u8>())
    };
    same("futex", (-1, Some(libc::EAGAIN)), (waited, std::io::Error::last_os_error().raw_os_error()))?;
    expect_all(pages, 34..COUNT, "after the kernel has touched it")
}

fn touched_by_all_threads(checkpoint: &Checkpoint) -> Result<(), String> {
    const THREADS: usize = 8;
    let pages = Pages::anonymous(COUNT)?;
    let first = |page: usize| pages.word(page).load(SeqCst);
    for page in 0..COUNT {
        pages.word(page).store(page as u32 * 100, SeqCst);
    }
    let addresses: Vec<usize> = (0..COUNT).map(|page| std::ptr::from_ref(pages.word(page)) as usize).collect();
    // As they will be, before the tree is looked at.
    let started = std::sync::Arc::new(std::sync::Barrier::new(THREADS + 1));
    let threads: Vec<_> = (0..THREADS)
        .map(|thread| {
            let (addresses, checkpoint, started) = (addresses.clone(), checkpoint.clone(), started.clone());
            std::thread::spawn(move || {
                started.wait();
                checkpoint.wait_for_go()?;
                for turn in 0..COUNT {
                    // All of them begin at other pages, and each page is some thread's first.
                    let page = (turn * 97 + thread * (COUNT / THREADS)) % COUNT;
                    // SAFETY: words of a mapping that is never unmapped.
                    let word = unsafe { &*(addresses[page] as *const std::sync::atomic::AtomicU32) };
                    word.fetch_add(1, SeqCst);
                }
                Ok::<(), String>(())
            })
        })
        .collect();
    started.wait();
    checkpoint.ready()?;
    for thread in threads {
        thread.join().map_err(|_| "a thread panicked".to_string())??;
    }
    (0..COUNT)
        .try_for_each(|page| same("what all threads have added to", page as u32 * 100 + THREADS as u32, first(page)))
}

/// A child that waits for the sign to go on, does something and says whether it went well.
fn companion(checkpoint: &Checkpoint, work: impl FnOnce() -> bool) -> Result<Pid, String> {
    // SAFETY: one thread; the child uses what it has and leaves by _exit.
    match unsafe { fork() }.map_err(|error| format!("fork: {error}"))? {
        ForkResult::Child => {
            let ok = checkpoint.wait_for_go().is_ok() && work();
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(i32::from(!ok)) }
        }
        ForkResult::Parent { child } => Ok(child),
    }
}

fn ended_well(child: Pid) -> Result<(), String> {
    same("the child's end", Ok(WaitStatus::Exited(child, 0)), waitpid(child, None))
}

fn shared(count: usize) -> Result<Pages, String> {
    Pages::map(count, READ | WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS, None)
}

/// Waits until another process has set a word, for so long that it must have been lost.
fn wait_for(pages: Pages, page: usize, value: u32) -> bool {
    let begun = std::time::Instant::now();
    while pages.word(page).load(SeqCst) != value {
        if begun.elapsed() > std::time::Duration::from_secs(30) {
            return false;
        }
        std::thread::yield_now();
    }
    true
}

/// In several processes, one of which has it elsewhere, beside a memory file that no descriptor leads to any more.
fn shared_large(checkpoint: &Checkpoint) -> Result<(), String> {
    let memory = filled(shared(COUNT)?, COUNT);
    let words = shared(1)?;
    let file = make_memfd("nameless", COUNT)?;
    let nameless = filled(Pages::map(COUNT, READ | WRITE, libc::MAP_SHARED, Some((&file, 0)))?, COUNT);
    drop(file);
    let look = |memory: Pages, nameless: Pages| {
        let before = expect_all(memory, 0..COUNT, "").and_then(|()| expect_all(nameless, 0..COUNT, "")).is_ok();
        words.word(0).fetch_add(1, SeqCst);
        before
            && wait_for(words, 0, 100)
            && (0..COUNT).step_by(5).all(|page| memory.expect(page, 300 + page as u64, "").is_ok())
            && (0..COUNT).step_by(7).all(|page| nameless.expect(page, 400 + page as u64, "").is_ok())
    };
    let child = companion(checkpoint, || look(memory, nameless))?;
    let elsewhere = remap(memory, 0, 0, COUNT, None)?;
    let other = companion(checkpoint, || unmap(memory, 0, COUNT).is_ok() && look(elsewhere, nameless))?;
    checkpoint.wait()?;
    expect_all(memory, 0..COUNT, "shared memory")?;
    expect_all(elsewhere, 0..COUNT, "shared memory elsewhere")?;
    expect_all(nameless, 0..COUNT, "a memory file without a descriptor")?;
    if !wait_for(words, 0, 2) {
        return Err("the children have not looked".into());
    }
    (0..COUNT).step_by(5).for_each(|page| memory.fill(page, 300 + page as u64));
    (0..COUNT).step_by(7).for_each(|page| nameless.fill(page, 400 + page as u64));
    words.word(0).store(100, SeqCst);
    ended_well(child)?;
    ended_well(other)
}

fn shared_then_given_back(checkpoint: &Checkpoint) -> Result<(), String> {
    let memory = filled(shared(COUNT)?, COUNT);
    let words = shared(1)?;
    let child = companion(checkpoint, || {
        // Not to be touched before the parent has given it back.
        wait_for(words, 0, 1)
            && (64..128).all(|page| memory.expect(page, 0, "").is_ok())
            && expect_all(memory, 0..64, "").is_ok()
            && expect_all(memory, 128..COUNT, "").is_ok()
            && {
                memory.fill(70, 71);
                true
            }
    })?;
    checkpoint.wait()?;
    // Out of this mapping only: the content is that of the object.
    memory.advise(0, 64, libc::MADV_DONTNEED)?;
    expect_all(memory, 0..64, "shared memory after MADV_DONTNEED")?;
    // A hole in the object.
    memory.advise(64, 64, libc::MADV_REMOVE)?;
    for page in 64..128 {
        memory.expect(page, 0, "shared memory after MADV_REMOVE")?;
    }
    words.word(0).store(1, SeqCst);
    ended_well(child)?;
    memory.expect(70, 71, "what the child has written into the hole")?;
    expect_all(memory, 128..COUNT, "shared memory beside a hole")
}

fn shared_then_moved(checkpoint: &Checkpoint) -> Result<(), String> {
    let memory = filled(shared(COUNT)?, COUNT);
    let words = shared(1)?;
    let child = companion(checkpoint, || wait_for(words, 0, 1) && memory.expect(65, 165, "").is_ok())?;
    checkpoint.wait()?;
    // First of all a child, which finds what is not there yet as well.
    let forked =
        in_child(|| unmap(memory, 0, 16).is_ok() as i32 * 2 + expect_all(memory, 200..COUNT, "").is_ok() as i32)?;
    if !matches!(forked, WaitStatus::Exited(_, 3)) {
        return Err(format!("a child that was forked ended as {forked:?}"));
    }
    // Once more, where it is as well.
    let twice = remap(memory, 0, 0, COUNT, None)?;
    expect_all(twice, 128..192, "shared memory that is mapped twice")?;
    let away = remap(memory, 64, 32, 32, None)?;
    for page in 0..32 {
        away.expect(page, seed(64 + page), "shared memory that was moved")?;
    }
    away.fill(1, 165);
    twice.expect(65, 165, "the same page elsewhere")?;
    unmap(memory, 0, 64)?;
    expect_all(twice, 0..64, "what was unmapped elsewhere")?;
    words.word(0).store(1, SeqCst);
    ended_well(child)
}
