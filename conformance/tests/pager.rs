//! What becomes of a lazily restored tree when those who bring in its memory are killed, or the image is damaged under
//! them: it must never read a wrong byte.
//!
//! The subject checks its memory all the time: several threads read pages, have the kernel write them to a pipe, and fork
//! children that do the same. What it finds wrong it notes in a file that outlives it. It is dumped once, and restored again
//! and again. Everything happens in namespaces of its own.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};

use ckpt_conformance::visible::numbers;
use ckpt_conformance::{isolation, trial};
use ckpt_core::backend::{DumpOptions, RestoreOptions};
use ckpt_core::dump::After;
use ckpt_core::progress::Silent;
use ckpt_core::{Pid, registry};
use ckpt_userfault::{Host, OnLoss, Options, Told, UserfaultRestorer};
use libtest_mimic::{Arguments, Trial};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{ForkResult, fork};

const SUBJECT: &str = "--watchful-subject";
const TRIAL: &str = "--pager-trial";
/// Memory of the subject: what a sweep needs some milliseconds for.
const PAGES: usize = 12_000;
const PAGE: usize = 4096;
const DEADLINE: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    trial::be_a_trial_if_asked();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [SUBJECT, forks] => watch(forks == "forks"),
        [TRIAL, kind, dir] => return run_kind(kind, Path::new(dir)),
        _ => {}
    }
    let kinds = KINDS.iter().map(|kind| Trial::test(kind.name, || Ok(start_kind(kind)?)));
    libtest_mimic::run(&Arguments::from_args(), kinds.collect()).exit_code()
}

// --- the subject ---

/// Words that outlive the subject, in a file that it maps: what it found wrong, and how much it looked at.
struct Board(&'static [AtomicU32]);

const BOARD: &str = "board";
const WRONG: usize = 0;
const LOOKED: usize = 1;
const READY: usize = 2;

impl Board {
    fn open(dir: &Path) -> Board {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(dir.join(BOARD)).unwrap();
        file.set_len(PAGE as u64).unwrap();
        // SAFETY: a new shared mapping of the file, never unmapped; all access is atomic.
        unsafe {
            let flags = libc::PROT_READ | libc::PROT_WRITE;
            let place = libc::mmap(std::ptr::null_mut(), PAGE, flags, libc::MAP_SHARED, file.as_raw_fd(), 0);
            assert_ne!(place, libc::MAP_FAILED);
            Board(std::slice::from_raw_parts(place.cast::<AtomicU32>(), 3))
        }
    }
}

fn word(page: usize) -> u64 {
    (page as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn random(state: &mut u64) -> usize {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state >> 8) as usize
}

fn watch(forks: bool) -> ! {
    let board = Board::open(Path::new("."));
    // A half of it is shared with the children that it forks.
    // SAFETY: two new mappings, the second over a half of the first, which nothing refers to yet; never unmapped.
    let memory: &'static mut [u64] = unsafe {
        let (protection, anonymous) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_ANONYMOUS);
        let place = libc::mmap(std::ptr::null_mut(), PAGES * PAGE, protection, anonymous | libc::MAP_PRIVATE, -1, 0);
        assert_ne!(place, libc::MAP_FAILED);
        let half = place.add(PAGES / 2 * PAGE);
        let flags = anonymous | libc::MAP_SHARED | libc::MAP_FIXED;
        assert_eq!(libc::mmap(half, PAGES / 2 * PAGE, protection, flags, -1, 0), half);
        std::slice::from_raw_parts_mut(place.cast(), PAGES * PAGE / 8)
    };
    for (page, content) in memory.chunks_exact_mut(PAGE / 8).enumerate() {
        content[0] = word(page);
        content[PAGE / 8 - 1] = word(page);
    }
    let memory: &'static [u64] = memory;
    let board = board.0;
    let first = |page: usize| &memory[page * PAGE / 8];
    let look = move |page: usize| {
        // SAFETY: inside of the memory, and aligned.
        let found = unsafe { std::ptr::from_ref(first(page)).read_volatile() };
        board[LOOKED].fetch_add(1, SeqCst);
        if found != word(page) {
            board[WRONG].fetch_add(1, SeqCst);
        }
    };
    for seed in 1..4u64 {
        std::thread::spawn(move || {
            let mut state = seed * 77;
            loop {
                look(random(&mut state) % PAGES);
            }
        });
    }
    std::thread::spawn(move || {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let mut state = 9;
        loop {
            let page = random(&mut state) % PAGES;
            let bytes = std::ptr::from_ref(first(page)).cast::<libc::c_void>();
            // SAFETY: a page of ours; what is read goes to a buffer of its length.
            let (wrote, found) = unsafe {
                let mut found = [0u8; PAGE];
                let wrote = libc::write(writer.as_raw_fd(), bytes, PAGE);
                if wrote > 0 {
                    libc::read(reader.as_raw_fd(), found.as_mut_ptr().cast(), wrote as usize);
                }
                (wrote, found)
            };
            if wrote == PAGE as isize && found[..8] != word(page).to_ne_bytes() {
                board[WRONG].fetch_add(1, SeqCst);
            }
        }
    });
    let mut state = 5;
    board[READY].store(1, SeqCst);
    loop {
        if !forks {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        }
        // SAFETY: the child only reads memory, and leaves by _exit.
        unsafe {
            let child = libc::fork();
            if child == 0 {
                for _ in 0..100 {
                    look(random(&mut state) % PAGES);
                }
                libc::_exit(0);
            }
            random(&mut state);
            libc::waitpid(child, std::ptr::null_mut(), 0);
        }
    }
}

// --- the trials ---

struct Kind {
    name: &'static str,
    trials: usize,
    forks: bool,
    on_loss: OnLoss,
    sweep: bool,
    /// What the host lacks.
    host: fn(&mut Host),
    /// Whether private and shared memory follow on such a host.
    follow: (bool, bool),
    work: fn(&World, &mut u64) -> Result<Ended, String>,
}

/// How a trial ended, if as it should.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// There was something to be lost.
    Tried,
    /// The memory was there before.
    TooLate,
}

const KINDS: &[Kind] = &[
    kind("the pager is killed", 150, kill_pager),
    Kind { forks: true, ..kind("the pager of a tree that forks is killed", 100, kill_pager) },
    Kind { sweep: false, ..kind("the pager without a sweep is killed", 50, kill_pager) },
    Kind { on_loss: OnLoss::Stop, ..kind("the pager is killed, and the tree stopped", 40, kill_pager_and_stop) },
    Kind { forks: true, ..kind("the guardian is killed, twice", 30, kill_guardian) },
    kind("pager and guardian are killed at once", 150, kill_both),
    kind("a bit of the image flips", 20, flip_a_bit),
    Kind { sweep: false, ..kind("the image is cut short", 10, cut_short) },
    kind("the restore command is killed", 60, kill_command),
    Kind { sweep: false, follow: (true, true), ..kind("a host with all there is to wish for", 2, look_what_follows) },
    Kind {
        sweep: false,
        host: |host| host.features &= !ckpt_userfault::SHARED,
        follow: (true, false),
        ..kind("a kernel without userfaultfd for shared memory", 2, look_what_follows)
    },
    Kind {
        sweep: false,
        // The events of mremap alone, say.
        host: |host| host.features &= !(ckpt_userfault::NEEDED & 1 << 2),
        ..kind("a kernel without a needed event", 2, look_what_follows)
    },
    Kind {
        sweep: false,
        host: |host| host.call = Err(nix::errno::Errno::EPERM),
        follow: (true, true),
        ..kind("a host that forbids the system call", 2, look_what_follows)
    },
];

const fn kind(name: &'static str, trials: usize, work: fn(&World, &mut u64) -> Result<Ended, String>) -> Kind {
    let (host, follow): (fn(&mut Host), _) = (|_| {}, (false, false));
    Kind { name, trials, forks: false, on_loss: OnLoss::Kill, sweep: true, host, follow, work }
}

fn start_kind(kind: &Kind) -> Result<(), String> {
    let dir = tempfile::Builder::new().prefix("ckpt-pager-").tempdir().map_err(|error| error.to_string())?;
    let output = Command::new("/proc/self/exe").args([TRIAL, kind.name]).arg(dir.path()).stdin(Stdio::null()).output();
    let output = output.map_err(|error| error.to_string())?;
    if output.status.success() {
        print!("{}", String::from_utf8_lossy(&output.stdout));
        return Ok(());
    }
    Err(format!("{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)))
}

fn run_kind(name: &str, dir: &Path) -> ExitCode {
    let kind = KINDS.iter().find(|kind| kind.name == name).expect("a kind of trial");
    let deadline = Duration::from_secs(60) + Duration::from_secs(2) * kind.trials as u32;
    let result = isolation::run(deadline, || match run_trials(kind, dir) {
        Ok(()) => 0,
        Err(failure) => {
            println!("{failure}");
            1
        }
    });
    match result {
        Ok(Some(0)) => ExitCode::SUCCESS,
        Ok(Some(_)) => ExitCode::FAILURE,
        Ok(None) => {
            println!("the trials did not end within {} s", deadline.as_secs());
            ExitCode::FAILURE
        }
        Err(error) => {
            println!("no namespaces of our own: {error}");
            ExitCode::FAILURE
        }
    }
}

struct World<'a> {
    kind: &'a Kind,
    image: PathBuf,
    root: i32,
}

fn run_trials(kind: &Kind, dir: &Path) -> Result<(), String> {
    let board = Board::open(dir);
    let root = start_subject(kind, dir, &board)?;
    let image = dir.join("image");
    in_child(|| {
        let dumper = registry::backend("ptrace").ok().and_then(|backend| backend.dumper).ok_or("no dumper")?();
        let options = DumpOptions { shell_job: false, tcp_close: false, timeout: Duration::from_secs(10) };
        let store = ckpt_formats::create(&image).map_err(|error| error.to_string())?;
        let dumped = ckpt_core::dump::dump(&*dumper, Pid(root), &options, After::Kill, store, &mut Silent);
        dumped.map(drop).map_err(|error| error.to_string())
    })?
    .join()?;
    nothing_lives()?;
    // The image says when the file that the subject maps was last written to.
    let dumped_at =
        fs::metadata(dir.join(BOARD)).and_then(|found| found.modified()).map_err(|error| error.to_string())?;
    let world = World { kind, image, root };
    let mut state =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |now| now.as_nanos() as u64) | 1;
    let before = board.0[LOOKED].load(SeqCst);
    let mut tried = 0;
    for trial in 0..kind.trials {
        let seed = state;
        // Above all that the tree needs.
        fs::write("/proc/sys/kernel/ns_last_pid", "1000").map_err(|error| format!("ns_last_pid: {error}"))?;
        let board_file = File::options().write(true).open(dir.join(BOARD)).map_err(|error| error.to_string())?;
        board_file.set_modified(dumped_at).map_err(|error| error.to_string())?;
        let ended = (kind.work)(&world, &mut state);
        let failed = |what: String| format!("trial {trial} of {} (state {seed:#x}): {what}", kind.trials);
        tried += usize::from(ended.map_err(failed)? == Ended::Tried);
        end_everything().map_err(failed)?;
        let wrong = board.0[WRONG].load(SeqCst);
        if wrong > 0 {
            return Err(failed(format!("the tree read wrong memory {wrong} times")));
        }
    }
    let looked = board.0[LOOKED].load(SeqCst) - before;
    println!("{}: {tried} of {} trials in time, {looked} looks", kind.name, kind.trials);
    if looked < 1000 {
        return Err(format!("the restored trees looked at their memory only {looked} times"));
    }
    if tried * 4 < kind.trials {
        return Err(format!("only {tried} of {} trials came before all memory was there", kind.trials));
    }
    Ok(())
}

fn start_subject(kind: &Kind, dir: &Path, board: &Board) -> Result<i32, String> {
    let mut command = Command::new("/proc/self/exe");
    command.args([SUBJECT, if kind.forks { "forks" } else { "alone" }]).current_dir(dir).env_clear();
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: setsid(2) and close_range(2) are async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int);
            Ok(nix::unistd::setsid().map(drop)?)
        })
    };
    let root = command.spawn().map_err(|error| error.to_string())?.id() as i32;
    wait_for("the subject to be ready", || board.0[READY].load(SeqCst) == 1)?;
    Ok(root)
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) -> Result<(), String> {
    let begin = Instant::now();
    while !condition() {
        if begin.elapsed() > DEADLINE {
            return Err(format!("waited {} s for {what}", DEADLINE.as_secs()));
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok(())
}

/// A child of ours at work.
struct Child(i32);

/// Runs something in a child; what goes wrong there is in a file.
fn in_child(work: impl FnOnce() -> Result<(), String>) -> Result<Child, String> {
    // SAFETY: this process has one thread.
    match unsafe { fork() }.map_err(|errno| errno.to_string())? {
        ForkResult::Child => {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            let result = result.unwrap_or_else(|_| Err("panicked".into()));
            if let Err(text) = &result {
                let _ = fs::write(format!("/dev/shm/failure-{}", std::process::id()), text);
            }
            // SAFETY: does not return.
            unsafe { libc::_exit(i32::from(result.is_err())) }
        }
        ForkResult::Parent { child } => Ok(Child(child.as_raw())),
    }
}

impl Child {
    fn is_running(&self) -> bool {
        // SAFETY: only looks.
        unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
            libc::waitid(libc::P_PID, self.0 as libc::id_t, &mut info, flags) == 0 && info.si_pid() == 0
        }
    }

    fn join(self) -> Result<(), String> {
        wait_for("a child of the trial", || !self.is_running())?;
        let mut status = 0;
        // SAFETY: the status is ours.
        unsafe { libc::waitpid(self.0, &mut status, 0) };
        let text =
            fs::read_to_string(format!("/dev/shm/failure-{}", self.0)).unwrap_or_else(|_| format!("status {status}"));
        if status == 0 { Ok(()) } else { Err(text) }
    }
}

impl World<'_> {
    fn options(&self) -> Options {
        let mut host = Host::here().clone();
        (self.kind.host)(&mut host);
        Options { on_loss: self.kind.on_loss, sweep: self.kind.sweep, host, ..Options::default() }
    }

    /// Restores in a child, which listens to the pager then, if that is wanted.
    fn restore(&self, listen: bool) -> Result<Child, String> {
        in_child(|| {
            let begin = Instant::now();
            loop {
                let restorer = UserfaultRestorer::new(self.options());
                let reader = ckpt_formats::open(&self.image).map_err(|error| error.to_string())?;
                let options = RestoreOptions { detach: true, ..RestoreOptions::default() };
                match ckpt_core::restore::restore(&restorer, &*reader, &options, &mut Silent) {
                    Ok(_) => {}
                    // The kernel lets a process be waited for an instant before the ids of its threads are free.
                    Err(error) if error.to_string().contains("EEXIST") && begin.elapsed() < DEADLINE => continue,
                    Err(error) => return Err(restorer.failure().unwrap_or(error.to_string())),
                }
                return match restorer.pager().filter(|_| listen).map(|pager| pager.listen()) {
                    None | Some(Told::Done(_)) => Ok(()),
                    Some(Told::Failed(why)) => Err(why),
                };
            }
        })
    }

    /// How often the subject has looked at its memory until now. By reading, which leaves the file that it maps as it is.
    fn looked(&self) -> u32 {
        let mut word = [0; 4];
        let board = File::open(self.image.with_file_name(BOARD));
        let read = board.and_then(|board| board.read_exact_at(&mut word, LOOKED as u64 * 4));
        read.map_or(0, |()| u32::from_ne_bytes(word))
    }

    /// Every process but init, us and the pagers.
    fn tree(&self, but: &Child) -> Vec<i32> {
        let all = living();
        all.into_iter().filter(|&pid| pid != but.0 && !is_named(pid, PAGER) && !is_named(pid, GUARDIAN)).collect()
    }

    /// The tree is gone, or had all its memory before. Else it is in one of the states that must not be.
    fn is_dead_or_whole(&self, restore: Child, killed: &[i32]) -> Result<Ended, String> {
        wait_for("the killed to be dead", || killed.iter().all(|&pid| !is_alive(pid)))?;
        wait_for("the restore command", || !restore.is_running())
            .map_err(|error| format!("{error}; {}", what_lives()))?;
        let begin = Instant::now();
        loop {
            reap();
            let tree = self.tree(&restore);
            if tree.is_empty() {
                return Ok(Ended::Tried);
            }
            let guarded = living().into_iter().any(|pid| is_named(pid, PAGER) || is_named(pid, GUARDIAN));
            if !guarded && tree.iter().all(|&pid| !misses_memory(pid)) {
                return Ok(Ended::TooLate);
            }
            if begin.elapsed() > DEADLINE {
                let states: Vec<_> = tree.iter().map(|&pid| (pid, state(pid), misses_memory(pid))).collect();
                return Err(format!("the tree lives and is not whole (guarded: {guarded}): {states:?}"));
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

const PAGER: &str = "ckpt-pager";
const GUARDIAN: &str = "ckpt-guard";

fn is_named(pid: i32, name: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim_end() == name)
}

fn state(pid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

fn is_alive(pid: i32) -> bool {
    !matches!(state(pid), None | Some('Z' | 'X'))
}

/// All that lives in this namespace but init.
fn living() -> BTreeSet<i32> {
    numbers(Path::new("/proc")).into_iter().filter(|&pid| pid != 1 && is_alive(pid)).collect()
}

/// Registered with a userfaultfd, which is closed when nothing is missing.
fn misses_memory(pid: i32) -> bool {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    smaps.lines().any(|line| line.starts_with("VmFlags:") && line.contains(" um"))
}

/// Who lives, and where in the kernel.
fn what_lives() -> String {
    let tell = |pid: i32| {
        let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
        format!("{pid} {} {:?}: {}", read("comm").trim_end(), state(pid), read("stack").replace('\n', " "))
    };
    living().into_iter().map(tell).collect::<Vec<_>>().join("\n")
}

fn reap() {
    // SAFETY: takes no memory.
    while unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) } > 0 {}
}

fn nothing_lives() -> Result<(), String> {
    wait_for("everything to be gone", || {
        reap();
        numbers(Path::new("/proc")).len() == 1
    })
}

/// The tree first: those who bring in its memory end when it is gone, and not before.
fn end_everything() -> Result<(), String> {
    let kill_all = |which: &dyn Fn(i32) -> bool| {
        for pid in living().into_iter().filter(|&pid| which(pid)) {
            kill_now(pid);
        }
        reap();
    };
    wait_for("the tree to be gone", || {
        let of_tree = |pid| !is_named(pid, PAGER) && !is_named(pid, GUARDIAN);
        kill_all(&of_tree);
        !living().into_iter().any(of_tree)
    })?;
    nothing_lives().map_err(|error| format!("{error}; {}", what_lives()))
}

fn find(name: &str) -> Option<i32> {
    living().into_iter().find(|&pid| is_named(pid, name))
}

fn kill_now(pid: i32) {
    let _ = kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
}

/// Restores, and returns somewhen between the first look of the pager and the end of its work.
fn restore_and_wait(
    world: &World,
    state: &mut u64,
    from_release: bool,
    listen: bool,
) -> Result<Option<(Child, i32, i32)>, String> {
    let restore = world.restore(listen)?;
    let begin = Instant::now();
    let (pager, guardian) = loop {
        match (find(PAGER), find(GUARDIAN)) {
            (Some(pager), Some(guardian)) => break (pager, guardian),
            // Faster than we could look.
            _ if !restore.is_running() => return restore.join().map(|()| None),
            _ if begin.elapsed() > DEADLINE => return Err("there is no pager".into()),
            _ => {}
        }
    };
    if from_release {
        wait_for("the restore", || !restore.is_running())?;
    }
    let wait = Duration::from_micros(random(state) as u64 % 20_000);
    let begin = Instant::now();
    while begin.elapsed() < wait {
        std::hint::spin_loop();
    }
    Ok(Some((restore, pager, guardian)))
}

fn kill_pager(world: &World, state: &mut u64) -> Result<Ended, String> {
    let Some((restore, pager, _)) = restore_and_wait(world, state, false, false)? else { return Ok(Ended::TooLate) };
    kill_now(pager);
    world.is_dead_or_whole(restore, &[pager])
}

fn kill_both(world: &World, state: &mut u64) -> Result<Ended, String> {
    let Some((restore, pager, guardian)) = restore_and_wait(world, state, true, false)? else {
        return Ok(Ended::TooLate);
    };
    let order = random(state) % 2;
    for pid in if order == 0 { [pager, guardian] } else { [guardian, pager] } {
        kill_now(pid);
    }
    world.is_dead_or_whole(restore, &[pager, guardian])
}

fn kill_pager_and_stop(world: &World, state: &mut u64) -> Result<Ended, String> {
    let Some((restore, pager, _)) = restore_and_wait(world, state, true, false)? else { return Ok(Ended::TooLate) };
    kill_now(pager);
    wait_for("the pager to be dead", || !is_alive(pager))?;
    let mut too_late = false;
    wait_for("the tree to be stopped", || {
        let tree = world.tree(&restore);
        too_late = find(GUARDIAN).is_none() && !tree.is_empty() && tree.iter().all(|&pid| !misses_memory(pid));
        too_late || !tree.is_empty() && tree.iter().all(|&pid| self::state(pid) == Some('T'))
    })?;
    if too_late {
        return Ok(Ended::TooLate);
    }
    // Whoever goes on and touches a missing page is stopped again. Where only a few are missing it may not come to that.
    let _ = kill(nix::unistd::Pid::from_raw(world.root), Signal::SIGCONT);
    let begin = Instant::now();
    while self::state(world.root) != Some('T') && begin.elapsed() < Duration::from_millis(300) {
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(Ended::Tried)
}

fn kill_guardian(world: &World, state: &mut u64) -> Result<Ended, String> {
    let Some((restore, pager, guardian)) = restore_and_wait(world, state, false, true)? else {
        return Ok(Ended::TooLate);
    };
    kill_now(guardian);
    let second = || living().into_iter().find(|&pid| pid != guardian && is_named(pid, GUARDIAN));
    wait_for("another guardian", || second().is_some() || !is_alive(pager))?;
    let ended = match second() {
        Some(second) => {
            kill_now(second);
            Ended::Tried
        }
        None => Ended::TooLate,
    };
    // The pager goes on, and all of the memory comes in.
    restore.join()?;
    if is_alive(world.root) { Ok(ended) } else { Err("the tree is dead, though only guardians were killed".into()) }
}

/// The page file of another image with the same content, so that it can be damaged.
fn damaged(world: &World, damage: impl Fn(&File, u64)) -> Result<Ended, String> {
    let pages = File::options()
        .read(true)
        .write(true)
        .open(world.image.join("pages.bin"))
        .map_err(|error| error.to_string())?;
    let size = pages.metadata().map_err(|error| error.to_string())?.len();
    let copy = world.image.with_file_name("whole");
    fs::copy(world.image.join("pages.bin"), &copy).map_err(|error| error.to_string())?;
    // Before the sweep can have come so far, and after what is read before the release.
    damage(&pages, size);
    let restore = world.restore(true)?;
    let result = restore.join();
    let gone = wait_for("the tree to be killed", || {
        reap();
        living().is_empty()
    });
    fs::copy(&copy, world.image.join("pages.bin")).map_err(|error| error.to_string())?;
    gone?;
    match result {
        Err(why) if why.contains("does not match its checksum") || why.contains("cut short") => Ok(Ended::Tried),
        Err(why) if why.contains("torn image") => Ok(Ended::TooLate),
        other => Err(format!("the damage was not reported: {other:?}")),
    }
}

fn flip_a_bit(world: &World, state: &mut u64) -> Result<Ended, String> {
    // Somewhere in the middle, which is memory of the subject.
    let at = random(state) as u64;
    damaged(world, |pages, size| {
        let at = size / 4 + at % (size / 2);
        let mut byte = [0];
        pages.read_exact_at(&mut byte, at).expect("inside of the file");
        pages.write_all_at(&[byte[0] ^ 4], at).expect("inside of the file");
    })
}

/// Under the pager, which has it open.
fn cut_short(world: &World, state: &mut u64) -> Result<Ended, String> {
    let pages = File::options().write(true).open(world.image.join("pages.bin")).map_err(|error| error.to_string())?;
    let size = pages.metadata().map_err(|error| error.to_string())?.len();
    let copy = world.image.with_file_name("whole");
    fs::copy(world.image.join("pages.bin"), &copy).map_err(|error| error.to_string())?;
    let before = world.looked();
    let Some((restore, pager, _)) = restore_and_wait(world, &mut (*state | 1), false, true)? else {
        return Ok(Ended::TooLate);
    };
    // However slow this machine is just now: some of it was there.
    wait_for("the tree to look at its memory", || world.looked() > before + 200)?;
    pages.set_len(size / 8).map_err(|error| error.to_string())?;
    random(state);
    let result = restore.join();
    wait_for("the pager to be gone", || !is_alive(pager))?;
    let ended = match result {
        Err(why) if why.contains("cut short") => {
            wait_for("the tree to be killed", || {
                reap();
                living().is_empty()
            })?;
            Ended::Tried
        }
        Ok(()) => Ended::TooLate,
        Err(why) => return Err(format!("the damage was not reported: {why}")),
    };
    fs::copy(&copy, world.image.join("pages.bin")).map_err(|error| error.to_string())?;
    Ok(ended)
}

/// What of the tree's memory follows, and what was there before, is as the host allows it; and all of it is right.
fn look_what_follows(world: &World, _state: &mut u64) -> Result<Ended, String> {
    let before = world.looked();
    let restore = world.restore(false)?;
    wait_for("the restore", || !restore.is_running())?;
    restore.join()?;
    let smaps = fs::read(format!("/proc/{}/smaps", world.root)).map_err(|error| error.to_string())?;
    let mappings = ckpt_core::procfs::Mapping::parse_all(&smaps).ok_or("smaps that cannot be read")?;
    // The two halves of the subject's memory.
    let half = (PAGES / 2 * PAGE) as u64;
    let follows = |shared: bool| {
        let mut halves = mappings.iter().filter(|it| it.shared == shared && it.end - it.start >= half);
        halves.any(|it| it.has("um"))
    };
    let found = (follows(false), follows(true));
    if found != world.kind.follow {
        return Err(format!("(private, shared) memory should follow: {:?}, and does: {found:?}", world.kind.follow));
    }
    let has_pager = living().into_iter().any(|pid| is_named(pid, PAGER));
    if has_pager != (world.kind.follow.0 || world.kind.follow.1) {
        return Err(format!("there is a pager: {has_pager}"));
    }
    wait_for("the tree to look at its memory", || world.looked() > before + 5000)?;
    Ok(Ended::Tried)
}

/// At any moment, also before the release: the tree is gone, or goes on with a pager that does not need the command.
fn kill_command(world: &World, state: &mut u64) -> Result<Ended, String> {
    let restore = world.restore(true)?;
    let wait = Duration::from_micros(random(state) as u64 % 15_000);
    let begin = Instant::now();
    while begin.elapsed() < wait {
        std::hint::spin_loop();
    }
    kill_now(restore.0);
    wait_for("the restore command to be dead", || !is_alive(restore.0))?;
    wait_for("the pager to end", || {
        reap();
        find(PAGER).is_none() && find(GUARDIAN).is_none()
    })?;
    wait_for("the tree to be gone or whole", || {
        reap();
        living().iter().all(|&pid| !misses_memory(pid))
    })?;
    Ok(Ended::Tried)
}
