//! Memory that is not like the rest: huge pages, locked pages, pages of zeros, holes, and what the program watches itself.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::time::{Duration, Instant};

use super::{PAGE, Pages, READ, WRITE, flags_at, same};
use crate::case::{Case, Checkpoint};

pub fn cases() -> Vec<Case> {
    let memory = &["memory"];
    vec![
        Case::new("memory/huge-pages", memory, huge_pages).needs_host(has_huge_pages),
        Case::new("memory/huge-page-file-system", memory, huge_page_file_system)
            .needs_host(has_huge_page_file_system)
            .refused_at_dump("huge-page memory (hugetlb)"),
        Case::new("memory/locked-large", memory, locked_large),
        Case::new("memory/zeros-and-holes", memory, zeros_and_holes),
        Case::new("memory/own-userfaultfd", memory, own_userfaultfd)
            .needs_host(|| own_fault().map(drop))
            .refused_at_dump("memory registered with userfaultfd"),
    ]
}

const HUGE: usize = 512;

fn has_huge_pages() -> Result<(), String> {
    let path = "/sys/kernel/mm/transparent_hugepage/enabled";
    match fs::read_to_string(path) {
        Ok(text) if text.contains("[never]") => Err(format!("{path} is never")),
        Ok(_) => Ok(()),
        Err(error) => Err(format!("{path}: {error}")),
    }
}

/// A field of the mapping at an address in `/proc/self/smaps`, in KiB.
fn kilobytes_at(address: u64, field: &str) -> Result<u64, String> {
    let smaps = fs::read_to_string("/proc/self/smaps").map_err(|error| format!("smaps: {error}"))?;
    let mapping = smaps.split_once(&format!("{address:08x}-")).ok_or("the mapping is not there")?.1;
    let value = mapping.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    value.and_then(|text| text.split_whitespace().next()?.parse().ok()).ok_or_else(|| format!("no {field}"))
}

/// Four huge pages: they may come back small, and can be made huge again; of the last, a half was given back.
fn huge_pages(checkpoint: &Checkpoint) -> Result<(), String> {
    const COUNT: usize = 4 * HUGE;
    let room = Pages::anonymous(COUNT + HUGE)?;
    let start = room.address().next_multiple_of((HUGE * PAGE) as u64);
    let pages = Pages { start: start as *mut u8 };
    // So that its mapping begins where it begins.
    for (page, count) in [(0, COUNT), (COUNT - 1, 1)] {
        pages.advise(page, count, libc::MADV_HUGEPAGE)?;
    }
    let seed = |page: usize| if page < COUNT - HUGE / 2 { page as u64 + 1 } else { 0 };
    (0..COUNT).for_each(|page| pages.fill(page, page as u64 + 1));
    let huge = kilobytes_at(start, "AnonHugePages")?;
    if huge == 0 {
        return Err("the subject is wrong: it has no huge pages".into());
    }
    pages.advise(COUNT - HUGE / 2, HUGE / 2, libc::MADV_DONTNEED)?;
    let flags = flags_at(start)?;
    checkpoint.wait()?;
    same("the flags", flags, flags_at(start)?)?;
    (0..COUNT).try_for_each(|page| pages.expect(page, seed(page), "memory of huge pages"))?;
    // What is small of it is huge again when it is wanted; that may take until nobody brings in pages any more.
    const MADV_COLLAPSE: i32 = 25;
    let begun = Instant::now();
    while let Err(error) = pages.advise(0, 3 * HUGE, MADV_COLLAPSE) {
        if begun.elapsed() > Duration::from_secs(20) {
            return Err(format!("it does not become huge again: {error}"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let after = kilobytes_at(start, "AnonHugePages")?;
    if after < (3 * HUGE * PAGE / 1024) as u64 {
        return Err(format!("of 6 MiB, {after} KiB are huge pages again"));
    }
    (0..COUNT).try_for_each(|page| pages.expect(page, seed(page), "memory that was made huge again"))?;
    pages.fill(COUNT - 1, 99);
    pages.expect(COUNT - 1, 99, "what was given back, written")
}

fn huge_page() -> Result<Pages, String> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_NORESERVE;
    Pages::map(HUGE, READ | WRITE, flags, None)
}

fn has_huge_page_file_system() -> Result<(), String> {
    let pages = huge_page()?;
    // SAFETY: just mapped, and nobody has seen it.
    match unsafe { libc::munmap(pages.start.cast(), HUGE * PAGE) } {
        0 => Ok(()),
        _ => Err(format!("munmap: {}", io::Error::last_os_error())),
    }
}

fn huge_page_file_system(checkpoint: &Checkpoint) -> Result<(), String> {
    let pages = huge_page()?;
    let before = flags_at(pages.address())?;
    checkpoint.wait()?;
    same("the flags", before, flags_at(pages.address())?)
}

/// Which pages are there (mincore(2)).
fn present(pages: Pages, page: usize, count: usize) -> Result<Vec<bool>, String> {
    let mut there = vec![0u8; count];
    // SAFETY: a range of a mapping of ours; a byte for each page is written.
    let result = unsafe { libc::mincore(pages.start.add(page * PAGE).cast(), count * PAGE, there.as_mut_ptr()) };
    if result != 0 {
        return Err(format!("mincore: {}", io::Error::last_os_error()));
    }
    Ok(there.into_iter().map(|byte| byte & 1 == 1).collect())
}

/// Locked memory was promised to be there, so it is there before anything else happens; what is to be locked when it is
/// touched may follow.
fn locked_large(checkpoint: &Checkpoint) -> Result<(), String> {
    const COUNT: usize = 64;
    let (locked, later) = (Pages::anonymous(COUNT)?, Pages::anonymous(COUNT)?);
    for page in 0..COUNT {
        locked.fill(page, page as u64 + 1);
        later.fill(page, page as u64 + 101);
    }
    // SAFETY: locks pages of ours.
    let results = unsafe {
        [
            libc::mlock(locked.start.cast(), COUNT * PAGE),
            libc::mlock2(later.start.cast(), COUNT * PAGE, libc::MLOCK_ONFAULT as _),
        ]
    };
    same("mlock, mlock2", [0, 0], results)?;
    let flags = || Ok::<_, String>((flags_at(locked.address())?, flags_at(later.address())?));
    let before = flags()?;
    checkpoint.wait()?;
    same("what of locked memory is there", vec![true; COUNT], present(locked, 0, COUNT)?)?;
    same("the flags", before, flags()?)?;
    for page in 0..COUNT {
        locked.expect(page, page as u64 + 1, "locked memory")?;
        later.expect(page, page as u64 + 101, "memory that is locked when it is touched")?;
    }
    Ok(())
}

/// Pages with data, pages of written zeros, pages that were only read, pages that were given back, and pages that nobody
/// has touched, side by side; and a large hole behind them, which stays one.
fn zeros_and_holes(checkpoint: &Checkpoint) -> Result<(), String> {
    const COUNT: usize = 500;
    const HOLE: usize = 2000;
    let pages = Pages::anonymous(COUNT + HOLE)?;
    let kind = |page: usize| page % 5;
    for page in 0..COUNT {
        match kind(page) {
            0 | 3 => pages.fill(page, page as u64 + 1),
            1 => pages.fill(page, 0),
            2 => pages.expect(page, 0, "a page that was never written")?,
            _ => {}
        }
    }
    (0..COUNT).filter(|&page| kind(page) == 3).try_for_each(|page| pages.advise(page, 1, libc::MADV_DONTNEED))?;
    let seed = |page: usize| if kind(page) == 0 { page as u64 + 1 } else { 0 };
    checkpoint.wait()?;
    (0..COUNT).try_for_each(|page| pages.expect(page, seed(page), "data, zeros and holes"))?;
    same("what of a hole is there", vec![false; HOLE], present(pages, COUNT, HOLE)?)?;
    for page in COUNT..COUNT + HOLE {
        pages.expect(page, 0, "a hole")?;
    }
    (0..COUNT).step_by(3).for_each(|page| pages.fill(page, 7000 + page as u64));
    for page in 0..COUNT {
        let seed = if page.is_multiple_of(3) { 7000 + page as u64 } else { seed(page) };
        pages.expect(page, seed, "after some were written")?;
    }
    Ok(())
}

// linux/userfaultfd.h
const UFFD_USER_MODE_ONLY: i32 = 1;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;

/// A userfaultfd as anybody may have one.
fn own_fault() -> Result<OwnedFd, String> {
    // SAFETY: takes flags; the new descriptor is owned by nobody else.
    let fault = unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | UFFD_USER_MODE_ONLY);
        if fd < 0 {
            return Err(format!("userfaultfd: {}", io::Error::last_os_error()));
        }
        OwnedFd::from_raw_fd(fd as i32)
    };
    ask(&fault, UFFDIO_API, &mut [0xaa, 0, 0])?;
    Ok(fault)
}

fn ask(fault: &OwnedFd, what: libc::c_ulong, words: &mut [u64]) -> Result<(), String> {
    // SAFETY: as many words as the request has.
    match unsafe { libc::ioctl(fault.as_raw_fd(), what, words.as_mut_ptr()) } {
        0 => Ok(()),
        _ => Err(format!("userfaultfd ioctl {what:#x}: {}", io::Error::last_os_error())),
    }
}

/// A program that brings in its own pages: it is refused, and goes on with that.
fn own_userfaultfd(checkpoint: &Checkpoint) -> Result<(), String> {
    let fault = own_fault()?;
    let pages = Pages::anonymous(16)?;
    ask(&fault, UFFDIO_REGISTER, &mut [pages.address(), (16 * PAGE) as u64, 1, 0])?;
    checkpoint.wait()?;
    let address = pages.address() as usize;
    let touching = std::thread::spawn(move || {
        // SAFETY: within the mapping, which is never unmapped.
        unsafe { ptr::read_volatile((address + 5 * PAGE) as *const u64) }
    });
    let mut message = [0u8; 32];
    let read = nix::unistd::read(&fault, &mut message).map_err(|error| format!("reading a userfaultfd: {error}"))?;
    let word = |at: usize| u64::from_ne_bytes(message[at..at + 8].try_into().expect("eight bytes"));
    same("the fault", (32, 0x12, (address + 5 * PAGE) as u64), (read, message[0], word(16)))?;
    ask(&fault, UFFDIO_ZEROPAGE, &mut [(address + 5 * PAGE) as u64, PAGE as u64, 0, 0])?;
    same("the page that was brought in", 0, touching.join().map_err(|_| "the thread panicked")?)
}
