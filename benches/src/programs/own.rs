//! Our own programs: each has much of one thing, and sleeps in `futex(2)` until it is asked.
//!
//! The driver and the program share a page of a file. A question is a number there; each thread of the program looks at
//! its part of the state and puts the number beside its own. So an answer is an instant, it takes no connection that a
//! tool would have to save, and a thread that does not find what it should ends the program.
//!
//! Between a dump and its restore the driver must not write there: a file that has changed is rightly refused. So the
//! first answer after a restore is one that nobody asked for: the program *beats*, every 200 us, with a look at its memory.

use std::fs::File;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use super::{PATIENCE, Program, Session, Stamping, Stamps};

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    pub name: &'static str,
    kind: Kind,
    quick: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Tiny,
    Threads(usize),
    Processes(usize),
    Descriptors(usize),
    Mappings(usize),
    Memory {
        bytes: usize,
        fill: Fill,
        huge: bool,
    },
    /// Bytes a second, over memory of a size.
    Writes {
        bytes: usize,
        rate: usize,
    },
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fill {
    /// No compressor finds anything.
    Random,
    /// A line again and again, with a number in it.
    Text,
    /// One page of eight is random, the others were touched and are zeros.
    Zero,
}

const MIB: usize = 1 << 20;
const GIB: usize = 1 << 30;
const PAGE: usize = 4096;

const fn memory(name: &'static str, bytes: usize, fill: Fill, huge: bool, quick: bool) -> Load {
    Load { name, kind: Kind::Memory { bytes, fill, huge }, quick }
}

pub const LOADS: &[Load] = &[
    Load { name: "tiny", kind: Kind::Tiny, quick: true },
    Load { name: "threads-200", kind: Kind::Threads(200), quick: true },
    Load { name: "processes-100", kind: Kind::Processes(100), quick: true },
    Load { name: "descriptors-10000", kind: Kind::Descriptors(10_000), quick: true },
    Load { name: "mappings-5000", kind: Kind::Mappings(5_000), quick: true },
    memory("memory-10m-random", 10 * MIB, Fill::Random, false, true),
    memory("memory-256m-random", 256 * MIB, Fill::Random, false, true),
    memory("memory-256m-random-huge", 256 * MIB, Fill::Random, true, true),
    memory("memory-256m-text", 256 * MIB, Fill::Text, false, false),
    memory("memory-256m-text-huge", 256 * MIB, Fill::Text, true, false),
    memory("memory-256m-zero", 256 * MIB, Fill::Zero, false, true),
    memory("memory-256m-zero-huge", 256 * MIB, Fill::Zero, true, false),
    memory("memory-1g-random", GIB, Fill::Random, false, false),
    memory("memory-1g-random-huge", GIB, Fill::Random, true, false),
    memory("memory-1g-text", GIB, Fill::Text, false, false),
    memory("memory-1g-text-huge", GIB, Fill::Text, true, false),
    memory("memory-1g-zero", GIB, Fill::Zero, false, false),
    memory("memory-1g-zero-huge", GIB, Fill::Zero, true, false),
    memory("memory-4g-random", 4 * GIB, Fill::Random, false, false),
    memory("memory-4g-random-huge", 4 * GIB, Fill::Random, true, false),
    memory("memory-4g-text", 4 * GIB, Fill::Text, false, false),
    memory("memory-4g-text-huge", 4 * GIB, Fill::Text, true, false),
    memory("memory-4g-zero", 4 * GIB, Fill::Zero, false, false),
    memory("memory-4g-zero-huge", 4 * GIB, Fill::Zero, true, false),
    Load { name: "writes-100m", kind: Kind::Writes { bytes: 256 * MIB, rate: 100 * MIB }, quick: true },
    Load { name: "writes-500m", kind: Kind::Writes { bytes: 256 * MIB, rate: 500 * MIB }, quick: false },
];

/// What driver and program share: the file is of this size.
#[repr(C)]
struct Shared {
    /// Counted up by the driver, a futex.
    question: AtomicU32,
    /// The next answer is to be after a look at everything.
    thorough: AtomicU32,
    stamping: AtomicU32,
    beating: AtomicU32,
    /// Counted up by the program, a futex.
    beats: AtomicU32,
    ready: AtomicU32,
    /// Nanoseconds.
    gap: AtomicU64,
    behind: AtomicU64,
    /// The last question that each thread or process has answered; a futex, the first.
    answered: [AtomicU32; 500],
}

fn share(path: &Path, protection: libc::c_int) -> std::io::Result<&'static Shared> {
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
    file.set_len(PAGE as u64)?;
    const { assert!(size_of::<Shared>() <= PAGE) };
    // SAFETY: a shared mapping of a file that is not made shorter; every bit pattern is valid in atomics. What is mapped for
    // reading alone is only read.
    unsafe {
        let address = libc::mmap(std::ptr::null_mut(), PAGE, protection, libc::MAP_SHARED, file.as_raw_fd(), 0);
        if address == libc::MAP_FAILED { Err(std::io::Error::last_os_error()) } else { Ok(&*address.cast()) }
    }
}

/// Sleeps while the word is what it is said to be, for a time at most.
fn wait(word: &AtomicU32, value: u32, within: Option<Duration>) {
    let time = within
        .map(|within| libc::timespec { tv_sec: within.as_secs() as i64, tv_nsec: i64::from(within.subsec_nanos()) });
    let time = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the word is in a mapping that stays, the time lives for the call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, value, time) };
}

fn wake(word: &AtomicU32) {
    // SAFETY: the word is in a mapping that stays.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}

// ---- the driver's side

impl Load {
    /// Threads and processes that answer.
    fn answering(&self) -> usize {
        match self.kind {
            Kind::Threads(count) | Kind::Processes(count) => count,
            _ => 1,
        }
    }
}

impl Program for Load {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> String {
        let size =
            |bytes: usize| if bytes < GIB { format!("{} MiB", bytes / MIB) } else { format!("{} GiB", bytes / GIB) };
        match self.kind {
            Kind::Tiny => "one process, one thread, next to no memory".into(),
            Kind::Threads(count) => format!("{count} threads"),
            Kind::Processes(count) => format!("{count} processes"),
            Kind::Descriptors(count) => format!("{count} descriptors: files, pipes, eventfds"),
            Kind::Mappings(count) => format!("{count} mappings"),
            Kind::Memory { bytes, fill, huge } => {
                let fill = match fill {
                    Fill::Random => "random",
                    Fill::Text => "compressible",
                    Fill::Zero => "mostly zero",
                };
                format!("{} of {fill} memory{}", size(bytes), if huge { " in huge pages" } else { "" })
            }
            Kind::Writes { bytes, rate } => format!("writes to {} at {}/s", size(bytes), size(rate)),
        }
    }

    fn quick(&self) -> bool {
        self.quick
    }

    fn size(&self) -> u64 {
        match self.kind {
            Kind::Memory { bytes, .. } | Kind::Writes { bytes, .. } => bytes as u64,
            _ => 0,
        }
    }

    fn absent(&self) -> Option<String> {
        let needed = match self.kind {
            Kind::Descriptors(count) => count as u64 + 100,
            _ => return None,
        };
        match nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE) {
            Ok((_, hard)) if hard < needed => {
                Some(format!("{needed} descriptors are needed, and ulimit -Hn is {hard}"))
            }
            _ => None,
        }
    }

    fn prepare(&self, place: &Path) -> Result<(Command, Box<dyn Session>), String> {
        let path = place.join("shared");
        let share = |protection| share(&path, protection).map_err(|error| format!("{}: {error}", path.display()));
        let (shared, seen) = (share(libc::PROT_READ | libc::PROT_WRITE)?, share(libc::PROT_READ)?);
        let own = std::env::current_exe().map_err(|error| format!("the driver's own file: {error}"))?;
        let mut command = Command::new(own);
        command.args(["program", self.name]).arg(&path);
        Ok((command, Box::new(Asking { shared, seen, load: *self })))
    }
}

struct Asking {
    shared: &'static Shared,
    /// The same for reading alone. futex(2) asks for a page that can be written to where it may, also to wait: the file would
    /// get a new time, and not be what it was at the dump.
    seen: &'static Shared,
    load: Load,
}

impl Drop for Asking {
    fn drop(&mut self) {
        for mapping in [self.shared, self.seen] {
            // SAFETY: a mapping made in share(), which is not used after this.
            unsafe { libc::munmap(std::ptr::from_ref(mapping).cast_mut().cast(), PAGE) };
        }
    }
}

impl Asking {
    fn ask(&self, thorough: bool) -> u32 {
        self.shared.thorough.store(u32::from(thorough), SeqCst);
        let question = self.shared.question.fetch_add(1, SeqCst) + 1;
        wake(&self.shared.question);
        question
    }

    /// Asks, and waits for the answers of all threads and processes.
    fn await_all(&self, thorough: bool) -> Result<(), String> {
        let question = self.ask(thorough);
        (0..self.load.answering()).try_for_each(|who| self.expect(who, question))
    }

    fn expect(&self, who: usize, question: u32) -> Result<(), String> {
        let begun = Instant::now();
        loop {
            let answered = self.shared.answered[who].load(SeqCst);
            if answered == question {
                return Ok(());
            }
            let left = PATIENCE.checked_sub(begun.elapsed());
            let left = left.ok_or_else(|| format!("{} does not go on (thread or process {who})", self.load.name))?;
            // Only the first wakes us.
            let nap = left.min(Duration::from_millis(if who == 0 { 100 } else { 1 }));
            wait(&self.seen.answered[who], answered, Some(nap));
        }
    }
}

impl Session for Asking {
    fn ready(&mut self, give_up: &AtomicBool) -> Result<(), String> {
        super::wait_for(self.load.name, PATIENCE, give_up, || Ok(self.shared.ready.load(SeqCst) == 1))
    }

    fn answer(&mut self, within: Duration, give_up: &AtomicBool) -> Result<(), String> {
        let (begun, before) = (Instant::now(), self.shared.beats.load(SeqCst));
        while self.shared.beats.load(SeqCst) == before {
            let left = within.checked_sub(begun.elapsed()).filter(|_| !give_up.load(SeqCst));
            let left = left.ok_or_else(|| format!("{} does not go on", self.load.name))?;
            wait(&self.seen.beats, before, Some(left.min(Duration::from_millis(100))));
        }
        Ok(())
    }

    fn before_dump(&mut self) -> Result<(), String> {
        self.shared.beating.store(1, SeqCst);
        self.await_all(false)
    }

    fn verify(&mut self) -> Result<(), String> {
        self.await_all(true)
    }

    fn begin_stamps(&mut self) -> Result<Stamping, String> {
        self.shared.gap.store(0, SeqCst);
        self.shared.behind.store(0, SeqCst);
        self.shared.stamping.store(1, SeqCst);
        // So that it sees that it is to.
        self.await_all(false)?;
        Ok(Stamping::Begun)
    }

    fn end_stamps(&mut self) -> Result<Stamps, String> {
        self.await_all(false)?;
        self.shared.stamping.store(0, SeqCst);
        self.await_all(false)?;
        let nanoseconds = |word: &AtomicU64| Duration::from_nanos(word.load(SeqCst));
        let behind = matches!(self.load.kind, Kind::Writes { .. }).then(|| nanoseconds(&self.shared.behind));
        Ok(Stamps { gap: nanoseconds(&self.shared.gap), behind })
    }
}

// ---- the program's side

#[derive(Debug, clap::Args)]
pub struct Arguments {
    name: String,
    shared: PathBuf,
}

/// Between two stamps, and two looks at whether it is time to write.
const STAMP: Duration = Duration::from_micros(100);

/// Between two beats.
const BEAT: Duration = Duration::from_micros(200);

/// Is the program of this name, until it is killed.
pub fn run(arguments: &Arguments) -> ExitCode {
    let Some(load) = LOADS.iter().find(|load| load.name == arguments.name) else { return ExitCode::from(2) };
    match build(load, &arguments.shared) {
        Ok(never) => match never {},
        Err(error) => {
            eprintln!("{}: {error}", load.name);
            ExitCode::FAILURE
        }
    }
}

fn build(load: &Load, path: &Path) -> std::io::Result<std::convert::Infallible> {
    let shared = share(path, libc::PROT_READ | libc::PROT_WRITE)?;
    let mut state = State::Nothing;
    match load.kind {
        Kind::Tiny => {}
        Kind::Threads(count) => {
            for who in 1..count {
                let work = move || answer_on(shared, who, State::Nothing);
                std::thread::Builder::new().stack_size(64 * 1024).spawn(work)?;
            }
        }
        Kind::Processes(count) => {
            for who in 1..count {
                // SAFETY: one thread so far, and the child goes on as a process of its own.
                match unsafe { libc::fork() } {
                    -1 => return Err(std::io::Error::last_os_error()),
                    0 => answer_on(shared, who, State::Nothing),
                    _ => {}
                }
            }
        }
        Kind::Descriptors(count) => state = State::Pipes(open(count)?),
        Kind::Mappings(count) => state = State::Mapped(map_apart(count)?),
        Kind::Memory { bytes, fill, huge } => {
            let pages = allocate(bytes, huge)?;
            for (number, page) in pages.iter_mut().enumerate() {
                write_page(fill, number, page);
            }
            state = State::Filled(pages, fill);
        }
        Kind::Writes { bytes, rate } => {
            let pages = allocate(bytes, false)?;
            for page in pages.iter_mut() {
                page.fill(u64::from_ne_bytes(*b"written!"));
                (page[0], page[511]) = (0, 0);
            }
            let per_second = (rate / PAGE) as f64;
            state = State::Written { pages, per_second, since: Instant::now(), done: 0, total: 0 };
        }
    }
    shared.ready.store(1, SeqCst);
    answer_on(shared, 0, state)
}

type Page = [u64; 512];

enum State {
    Nothing,
    /// Pairs of ends.
    Pipes(Vec<(i32, i32)>),
    Mapped(Vec<&'static mut u64>),
    Filled(&'static mut [Page], Fill),
    /// `done` pages were written since an instant, `total` in all.
    Written {
        pages: &'static mut [Page],
        per_second: f64,
        since: Instant,
        done: u64,
        total: u64,
    },
}

/// Answers questions, stamps and writes where it is to, for ever.
fn answer_on(shared: &'static Shared, who: usize, mut state: State) -> ! {
    let mut answered = 0;
    let mut last = None;
    loop {
        let question = shared.question.load(SeqCst);
        if question != answered {
            if !state.is_right(question, shared.thorough.load(SeqCst) == 1) {
                std::process::abort();
            }
            answered = question;
            shared.answered[who].store(question, SeqCst);
            wake(&shared.answered[who]);
        }
        // Only one stamps: others are asleep, as most threads are.
        let stamping = who == 0 && shared.stamping.load(SeqCst) == 1;
        if stamping {
            let now = Instant::now();
            if let Some(last) = last.replace(now) {
                shared.gap.fetch_max(now.duration_since(last).as_nanos() as u64, SeqCst);
            }
        } else {
            last = None;
        }
        let beating = who == 0 && shared.beating.load(SeqCst) == 1;
        if beating {
            let beat = shared.beats.load(SeqCst).wrapping_add(1);
            if !state.is_right(beat, false) {
                std::process::abort();
            }
            shared.beats.store(beat, SeqCst);
            wake(&shared.beats);
        }
        let writing = state.write(if stamping { Some(&shared.behind) } else { None });
        let nap = if stamping || writing { Some(STAMP) } else { beating.then_some(BEAT) };
        wait(&shared.question, answered, nap);
    }
}

impl State {
    fn is_right(&self, question: u32, thorough: bool) -> bool {
        let some = question as usize * 7919;
        match self {
            State::Nothing => true,
            State::Pipes(pipes) => {
                let through = |&(reader, writer): &(i32, i32)| {
                    let (mut byte, expected) = ([0_u8], [question as u8]);
                    // SAFETY: buffers of one byte that live for the calls.
                    unsafe {
                        libc::write(writer, expected.as_ptr().cast(), 1) == 1
                            && libc::read(reader, byte.as_mut_ptr().cast(), 1) == 1
                            && byte == expected
                    }
                };
                if thorough { pipes.iter().all(through) } else { through(&pipes[some % pipes.len()]) }
            }
            State::Mapped(words) => {
                let number = some % words.len();
                let all = || words.iter().enumerate().all(|(number, word)| **word == number as u64);
                *words[number] == number as u64 && (!thorough || all())
            }
            State::Filled(pages, fill) => {
                let is_right = |number: usize| {
                    let mut expected = [0; 512];
                    write_page(*fill, number, &mut expected);
                    pages[number] == expected
                };
                is_right(some % pages.len()) && (!thorough || (0..pages.len()).all(is_right))
            }
            State::Written { pages, total, .. } => {
                let sound = |page: &Page| page[0] == page[511] && page[1] == u64::from_ne_bytes(*b"written!");
                let sum = || pages.iter().map(|page| page[0]).sum::<u64>();
                sound(&pages[some % pages.len()]) && (!thorough || (pages.iter().all(sound) && sum() == *total))
            }
        }
    }

    /// Writes what is due. Whether this program writes at all.
    fn write(&mut self, behind: Option<&AtomicU64>) -> bool {
        let State::Written { pages, per_second, since, done, total } = self else { return false };
        let due = (since.elapsed().as_secs_f64() * *per_second) as u64;
        let late = due.saturating_sub(*done);
        if let Some(behind) = behind {
            behind.fetch_max((late as f64 / *per_second * 1e9) as u64, SeqCst);
        }
        // What an absence of a second left undone is not made up for.
        if late as f64 > *per_second {
            (*since, *done) = (Instant::now(), 0);
            return true;
        }
        for _ in 0..late {
            let number = (*total * 7919 % pages.len() as u64) as usize;
            pages[number][0] += 1;
            pages[number][511] += 1;
            *total += 1;
        }
        *done = due;
        true
    }
}

fn write_page(fill: Fill, number: usize, page: &mut Page) {
    match fill {
        Fill::Zero if !number.is_multiple_of(8) => page.fill(0),
        Fill::Random | Fill::Zero => {
            let mut state = (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            for word in page {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                *word = state;
            }
        }
        Fill::Text => {
            const LINE: &[u8; 72] = b"One of the lines that compress well, as many do in logs and in heaps.. \n";
            let words = LINE.as_chunks().0.iter().cycle();
            for (word, bytes) in page.iter_mut().zip(words) {
                *word = u64::from_ne_bytes(*bytes);
            }
            page[0] = number as u64;
        }
    }
}

/// Private anonymous memory, aligned to huge pages.
fn allocate(bytes: usize, huge: bool) -> std::io::Result<&'static mut [Page]> {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping, large enough that an aligned part of the size is in it; it stays for ever, and zeros are
    // valid words.
    unsafe {
        let address = libc::mmap(std::ptr::null_mut(), bytes + 2 * MIB, protection, flags, -1, 0);
        if address == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        let aligned = (address as usize).next_multiple_of(2 * MIB);
        let advice = if huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        if libc::madvise(aligned as *mut libc::c_void, bytes, advice) != 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(std::slice::from_raw_parts_mut(aligned as *mut Page, bytes / PAGE))
    }
}

/// Mappings that do not merge: every second may be executed.
fn map_apart(count: usize) -> std::io::Result<Vec<&'static mut u64>> {
    let read_write = libc::PROT_READ | libc::PROT_WRITE;
    let mut words = Vec::with_capacity(count);
    // SAFETY: pages of one new mapping, each of which is used by its own word only; it stays for ever.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let address = libc::mmap(std::ptr::null_mut(), count * PAGE, read_write, flags, -1, 0);
        if address == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        for number in 0..count {
            let page = address.add(number * PAGE);
            let word = &mut *page.cast::<u64>();
            *word = number as u64;
            words.push(word);
            if number % 2 == 1 && libc::mprotect(page, PAGE, libc::PROT_READ) != 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
    }
    Ok(words)
}

/// Half of them ends of pipes, a quarter eventfds, a quarter regular files. Gives the pipes.
fn open(count: usize) -> std::io::Result<Vec<(i32, i32)>> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let own = std::env::current_exe()?;
    let mut pipes = Vec::new();
    for _ in 0..count / 4 {
        let (reader, writer) = nix::unistd::pipe()?;
        pipes.push((reader.into_raw_fd(), writer.into_raw_fd()));
        let _ = File::open(&own)?.into_raw_fd();
        // SAFETY: takes numbers; the descriptor is for the program's life.
        if unsafe { libc::eventfd(1, 0) } < 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(pipes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_have_what_their_fill_promises() {
        let page = |fill, number| {
            let mut page = [0; PAGE / 8];
            write_page(fill, number, &mut page);
            page
        };
        for fill in [Fill::Random, Fill::Text] {
            assert_ne!(page(fill, 1), page(fill, 2), "no two pages are alike");
        }
        let distinct = |page: &Page| page.iter().collect::<std::collections::HashSet<_>>().len();
        assert_eq!(distinct(&page(Fill::Random, 1)), PAGE / 8);
        assert_eq!(distinct(&page(Fill::Text, 1)), 72 / 8 + 1, "one line again and again, and the number");
        let zeros = (0..64).filter(|&number| page(Fill::Zero, number) == [0; PAGE / 8]).count();
        assert_eq!(zeros, 56, "seven of eight");
    }
}
