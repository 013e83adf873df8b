//! Memory that was not touched since the restore, and to which something happens before it is: fork, mremap, munmap,
//! madvise, exec, accesses of the kernel. A restore that brings memory in on demand has to follow all of it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

use super::memory::{PAGE, Pages, in_child, pattern, same};
use crate::case::{Case, Checkpoint};

pub fn cases() -> Vec<Case> {
    let memory = &["memory"];
    vec![
        Case::new("untouched/fork", memory, forked),
        Case::new("untouched/fork-of-fork", memory, fork_of_fork),
        Case::new("untouched/fork-and-write", memory, fork_and_write),
        Case::new("untouched/fork-and-exec", memory, fork_and_exec),
        Case::new("untouched/wipe-on-fork", memory, wipe_on_fork),
        Case::new("untouched/given-back", memory, given_back),
        Case::new("untouched/freed", memory, freed),
        Case::new("untouched/moved", memory, moved),
        Case::new("untouched/moved-over", memory, moved_over),
        Case::new("untouched/moved-in-part", memory, moved_in_part),
        Case::new("untouched/unmapped", memory, unmapped),
        Case::new("untouched/mapped-over", memory, mapped_over),
        Case::new("untouched/protected", memory, protected),
        Case::new("untouched/locked-now", memory, locked_now),
        Case::new("untouched/read-by-kernel", memory, read_by_kernel),
        Case::new("untouched/written-by-kernel", memory, written_by_kernel),
        Case::new("untouched/read-by-another", memory, read_by_another)
            .privileged("process_vm_readv is what ordinary users are tried without"),
        Case::new("untouched/many-threads", memory, many_threads),
        Case::new("untouched/threads-that-change-it", memory, threads_that_change_it),
        Case::new("untouched/exit", memory, exit_with_it),
    ]
}

const COUNT: usize = 600;

fn seed(page: usize) -> u64 {
    // Some pages stay zeros, which the image does not have.
    if page % 7 == 3 { 0 } else { page as u64 + 1 }
}

fn filled() -> Result<Pages, String> {
    let pages = Pages::anonymous(COUNT)?;
    for page in (0..COUNT).filter(|&page| seed(page) != 0) {
        pages.fill(page, seed(page));
    }
    Ok(pages)
}

fn all_there(pages: Pages, what: &str) -> Result<(), String> {
    (0..COUNT).try_for_each(|page| pages.expect(page, seed(page), what))
}

fn exited(status: WaitStatus, what: &str) -> Result<(), String> {
    match status {
        WaitStatus::Exited(_, 0) => Ok(()),
        WaitStatus::Exited(_, page) => Err(format!("{what}: wrong memory (status {page})")),
        other => Err(format!("{what} ended in {other:?}")),
    }
}

fn check(result: i32, what: &str) -> Result<(), String> {
    if result == 0 { Ok(()) } else { Err(format!("{what}: {}", io::Error::last_os_error())) }
}

/// What a child finds, as its exit status.
fn verdict(pages: Pages) -> i32 {
    if all_there(pages, "").is_ok() { 0 } else { 1 }
}

fn forked(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = filled()?;
    checkpoint.wait()?;
    exited(in_child(|| verdict(pages))?, "the child")?;
    all_there(pages, "after a fork")
}

fn fork_of_fork(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = filled()?;
    checkpoint.wait()?;
    let status = in_child(|| {
        let inner = in_child(|| {
            let status = in_child(|| verdict(pages));
            if matches!(status, Ok(WaitStatus::Exited(_, 0))) { verdict(pages) } else { 2 }
        });
        if matches!(inner, Ok(WaitStatus::Exited(_, 0))) { verdict(pages) } else { 3 }
    })?;
    exited(status, "the child")?;
    all_there(pages, "after forks of forks")
}

/// Each has its own copy from the fork on, whoever touches it first.
fn fork_and_write(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = filled()?;
    checkpoint.wait()?;
    // SAFETY: this subject has one thread; the child leaves by _exit.
    let child = match unsafe { fork() }.map_err(|error| format!("fork: {error}"))? {
        ForkResult::Child => {
            let mut ok = true;
            for page in 0..COUNT {
                // What the parent does meanwhile is not seen.
                ok &= pages.expect(page, seed(page), "").is_ok();
                pages.fill(page, 7000);
            }
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(if ok { 0 } else { 1 }) }
        }
        ForkResult::Parent { child } => child,
    };
    for page in (0..COUNT).rev() {
        pages.expect(page, seed(page), "the parent's memory")?;
        pages.fill(page, 9000);
    }
    exited(waitpid(child, None).map_err(|error| error.to_string())?, "the child")?;
    (0..COUNT).try_for_each(|page| pages.expect(page, 9000, "what the parent wrote"))
}

fn fork_and_exec(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = filled()?;
    checkpoint.wait()?;
    for _ in 0..20 {
        let run = std::process::Command::new("/bin/true").status().map_err(|error| format!("exec: {error}"))?;
        same("the exit of /bin/true", true, run.success())?;
    }
    all_there(pages, "after other programs were started")
}

fn wipe_on_fork(checkpoint: &Checkpoint) -> Result<(), String> {
    let (before, after) = (filled()?, filled()?);
    before.advise(0, COUNT, libc::MADV_WIPEONFORK)?;
    checkpoint.wait()?;
    after.advise(0, COUNT, libc::MADV_WIPEONFORK)?;
    let status = in_child(|| {
        let zeros = |pages: Pages| (0..COUNT).all(|page| pages.expect(page, 0, "").is_ok());
        match (zeros(before), zeros(after)) {
            (true, true) => 0,
            (false, _) => 1,
            (_, false) => 2,
        }
    })?;
    exited(status, "a child that should see zeros")?;
    all_there(before, "the parent's wiped memory")?;
    all_there(after, "the parent's memory, wiped later")
}

fn given_back(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = filled()?;
    checkpoint.wait()?;
    pages.advise(100, 300, libc::MADV_DONTNEED)?;
    for page in 0..COUNT {
        let expected = if (100..400).contains(&page) { 0 } else { seed(page) };
        pages.expect(page, expected, "memory of which a part was given back")?;
    }
    // Also what had been touched.
    pages.fill(0, 5);
    pages.advise(0, 1, libc::MADV_DONTNEED)?;
    pages.expect(0, 0, "a page that was touched and given back")
}

fn freed(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = filled()?;
    checkpoint.wait()?;
    pages.advise(0, COUNT, libc::MADV_FREE)?;
    for page in 0..COUNT {
        // Either is right, but nothing else.
        if pages.expect(page, seed(page), "").is_err() {
            pages.expect(page, 0, "freed memory")?;
        }
        pages.fill(page, 44);
    }
    (0..COUNT).try_for_each(|page| pages.expect(page, 44, "what was written to freed memory"))
}

fn remap(pages: Pages, page: usize, count: usize, to: Option<*mut u8>) -> Result<Pages, String> {
    let fixed = to.map_or(0, |_| libc::MREMAP_FIXED);
    // SAFETY: moves memory of ours to where nothing is used.
    let moved = unsafe {
        libc::mremap(
            pages.start.add(page * PAGE).cast(),
            count * PAGE,
            count * PAGE,
            libc::MREMAP_MAYMOVE | fixed,
            to.map_or(std::ptr::null_mut(), <*mut u8>::cast::<libc::c_void>),
        )
    };
    if moved == libc::MAP_FAILED {
        Err(format!("mremap: {}", io::Error::last_os_error()))
    } else {
        Ok(Pages { start: moved.cast() })
    }
}

fn moved(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = filled()?;
    let place = Pages::anonymous(COUNT)?;
    checkpoint.wait()?;
    let moved = remap(pages, 0, COUNT, Some(place.start))?;
    let status = in_child(|| verdict(moved))?;
    exited(status, "a child after a move")?;
    all_there(moved, "moved memory")
}

/// Onto other memory that was not touched either.
fn moved_over(checkpoint: &Checkpoint) -> Result<(), String> {
    let (pages, under) = (filled()?, Pages::anonymous(COUNT)?);
    for page in 0..COUNT {
        under.fill(page, 31_000 + page as u64);
    }
    checkpoint.wait()?;
    let moved = remap(pages, 0, COUNT, Some(under.start))?;
    all_there(moved, "memory moved over other memory")
}

fn moved_in_part(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = filled()?;
    let place = Pages::anonymous(COUNT)?;
    checkpoint.wait()?;
    // Every other stretch of 50 pages, to the other end of another place.
    for start in (0..COUNT).step_by(100) {
        // SAFETY: inside of the place.
        let to = unsafe { place.start.add((COUNT - start - 50) * PAGE) };
        remap(pages, start, 50, Some(to))?;
    }
    for page in 0..COUNT {
        let start = page / 100 * 100;
        if page % 100 < 50 {
            let at = COUNT - start - 50 + page % 100;
            place.expect(at, seed(page), "a part that was moved")?;
        } else {
            pages.expect(page, seed(page), "a part that stayed")?;
        }
    }
    Ok(())
}

fn unmapped(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = filled()?;
    checkpoint.wait()?;
    // SAFETY: unmaps memory of ours, and maps it anew at the same place.
    unsafe {
        let middle = pages.start.add(200 * PAGE);
        check(libc::munmap(middle.cast(), 100 * PAGE), "munmap")?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let again = libc::mmap(middle.cast(), 100 * PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        same("where it is mapped again", middle.cast(), again)?;
    }
    for page in 0..COUNT {
        pages.expect(page, if (200..300).contains(&page) { 0 } else { seed(page) }, "memory mapped again")?;
    }
    Ok(())
}

fn mapped_over(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = filled()?;
    checkpoint.wait()?;
    // SAFETY: replaces memory of ours.
    unsafe {
        let middle = pages.start.add(200 * PAGE);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        let over = libc::mmap(middle.cast(), 100 * PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        same("where it is mapped", middle.cast(), over)?;
    }
    for page in 0..COUNT {
        pages.expect(page, if (200..300).contains(&page) { 0 } else { seed(page) }, "memory mapped over")?;
    }
    Ok(())
}

fn protected(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = filled()?;
    checkpoint.wait()?;
    for page in (0..COUNT).step_by(2) {
        pages.protect(page, 1, if page % 4 == 0 { libc::PROT_NONE } else { libc::PROT_READ })?;
    }
    for page in (1..COUNT).step_by(2) {
        pages.expect(page, seed(page), "between protected pages")?;
    }
    pages.protect(0, COUNT, libc::PROT_READ | libc::PROT_WRITE)?;
    all_there(pages, "memory that was protected for a while")
}

fn locked_now(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = filled()?;
    checkpoint.wait()?;
    // SAFETY: locks memory of ours, which brings it all in.
    check(unsafe { libc::mlock(pages.start.cast(), COUNT * PAGE) }, "mlock")?;
    let mut present = vec![0u8; COUNT];
    // SAFETY: a byte for each page.
    check(unsafe { libc::mincore(pages.start.cast(), COUNT * PAGE, present.as_mut_ptr()) }, "mincore")?;
    same("how many locked pages are there", COUNT, present.iter().filter(|&&byte| byte & 1 == 1).count())?;
    all_there(pages, "memory locked after the restore")
}

fn bytes_of(page: usize) -> Vec<u8> {
    (0..PAGE / 8).flat_map(|at| pattern(seed(page), at).to_ne_bytes()).collect()
}

/// By write(2) to a file and to a pipe, and by a read with O_DIRECT that pins it.
fn read_by_kernel(checkpoint: &Checkpoint) -> Result<(), String> {
    let (to_file, to_pipe) = (filled()?, filled()?);
    checkpoint.wait()?;
    let path = checkpoint.dir().join("written");
    let file =
        File::options().read(true).write(true).create_new(true).open(&path).map_err(|error| error.to_string())?;
    // SAFETY: the kernel reads memory of ours.
    let wrote = unsafe { libc::write(file.as_raw_fd(), to_file.start.cast(), COUNT * PAGE) };
    same("what write(2) wrote", (COUNT * PAGE) as isize, wrote)?;
    for page in 0..COUNT {
        let mut found = vec![0; PAGE];
        file.read_exact_at(&mut found, (page * PAGE) as u64).map_err(|error| error.to_string())?;
        if found != bytes_of(page) {
            return Err(format!("page {page} was written wrongly to a file"));
        }
    }
    let (reader, writer) = nix::unistd::pipe().map_err(|error| error.to_string())?;
    for page in (0..COUNT).rev() {
        // SAFETY: as above; a pipe holds a page.
        let wrote = unsafe { libc::write(writer.as_raw_fd(), to_pipe.start.add(page * PAGE).cast(), PAGE) };
        same("what went into the pipe", PAGE as isize, wrote)?;
        let mut found = vec![0; PAGE];
        let read = nix::unistd::read(&reader, &mut found).map_err(|error| error.to_string())?;
        if read != PAGE || found != bytes_of(page) {
            return Err(format!("page {page} was written wrongly to a pipe"));
        }
    }
    Ok(())
}

/// By read(2): half a page, so that the other half has to be brought in.
fn written_by_kernel(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = filled()?;
    checkpoint.wait()?;
    let zero = File::open("/dev/zero").map_err(|error| error.to_string())?;
    for page in 0..COUNT {
        // SAFETY: the kernel writes to memory of ours.
        let read = unsafe { libc::read(zero.as_raw_fd(), pages.start.add(page * PAGE).cast(), PAGE / 2) };
        same("what read(2) read", PAGE as isize / 2, read)?;
    }
    for page in 0..COUNT {
        for at in 0..PAGE / 8 {
            // SAFETY: inside of the mapping, and aligned.
            let found = unsafe { pages.start.add(page * PAGE).cast::<u64>().add(at).read_volatile() };
            let expected = if at < PAGE / 16 { 0 } else { pattern(seed(page), at) };
            same(&format!("word {at} of page {page}"), expected, found)?;
        }
    }
    Ok(())
}

/// By process_vm_readv(2) of a child.
fn read_by_another(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = filled()?;
    checkpoint.wait()?;
    let parent = std::process::id() as i32;
    let status = in_child(|| {
        let mut ok = true;
        for page in 0..COUNT {
            let mut found = vec![0u8; PAGE];
            let local = libc::iovec { iov_base: found.as_mut_ptr().cast(), iov_len: PAGE };
            let remote = libc::iovec { iov_base: pages.start.wrapping_add(page * PAGE).cast(), iov_len: PAGE };
            // SAFETY: the local vector is a buffer of ours; the remote one is the parent's.
            let read = unsafe { libc::process_vm_readv(parent, &local, 1, &remote, 1, 0) };
            ok &= read == PAGE as isize && found == bytes_of(page);
        }
        if ok { 0 } else { 1 }
    })?;
    exited(status, "a child that reads its parent's memory")
}

fn many_threads(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = filled()?;
    let start = pages.start as usize;
    checkpoint.wait()?;
    let failures = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for thread in 0..16 {
            let failures = &failures;
            scope.spawn(move || {
                let pages = Pages { start: start as *mut u8 };
                for step in 0..COUNT {
                    // All at once on the same pages, half of them from the other end.
                    let page = if thread % 2 == 0 { step } else { COUNT - 1 - step };
                    if pages.expect(page, seed(page), "").is_err() {
                        failures.fetch_add(1, SeqCst);
                    }
                }
            });
        }
    });
    same("pages that a thread found wrong", 0, failures.load(SeqCst))
}

/// One thread gives memory back and one protects it while others read what is next to it.
fn threads_that_change_it(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = filled()?;
    let start = pages.start as usize;
    checkpoint.wait()?;
    let failures = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let failures = &failures;
        let run = |work: fn(Pages) -> Result<(), String>| {
            scope.spawn(move || {
                if work(Pages { start: start as *mut u8 }).is_err() {
                    failures.fetch_add(1, SeqCst);
                }
            });
        };
        // Pages 0, 4, 8, ... are given back, and zeros right after that.
        run(|pages| {
            (0..COUNT).step_by(4).try_for_each(|page| {
                pages.advise(page, 1, libc::MADV_DONTNEED)?;
                pages.expect(page, 0, "")
            })
        });
        run(|pages| {
            (1..COUNT).step_by(4).try_for_each(|page| {
                pages.protect(page, 1, libc::PROT_READ)?;
                pages.expect(page, seed(page), "")
            })
        });
        run(|pages| (2..COUNT).step_by(4).try_for_each(|page| pages.expect(page, seed(page), "")));
        run(|pages| (3..COUNT).step_by(4).rev().try_for_each(|page| pages.expect(page, seed(page), "")));
    });
    same("threads that found wrong memory", 0, failures.load(SeqCst))?;
    (0..COUNT).step_by(4).try_for_each(|page| pages.expect(page, 0, "memory given back meanwhile"))
}

/// A process that ends, and one that never touches its memory, keep nobody waiting.
fn exit_with_it(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = filled()?;
    // SAFETY: this subject has one thread; the child leaves by _exit.
    let child = match unsafe { fork() }.map_err(|error| format!("fork: {error}"))? {
        ForkResult::Child => {
            let waited = checkpoint.wait_for_go();
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(if waited.is_ok() { 0 } else { 1 }) }
        }
        ForkResult::Parent { child } => child,
    };
    checkpoint.wait()?;
    exited(waitpid(child, None).map_err(|error| error.to_string())?, "the child")?;
    pages.expect(1, seed(1), "the memory of the one that is left")
}
