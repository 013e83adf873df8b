//! What the tests of bad input share: ckpt as a process, a program to save, and the checks that nothing was harmed.
//!
//! Every test starts its own processes and ends them, and works in a directory of its own.

#![allow(dead_code)] // not every test file needs all of it

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use ckpt_core::Pid;
use ckpt_core::procfs::ProcDir;

pub const CKPT: &str = env!("CARGO_BIN_EXE_ckpt");

/// How long anything may take before it counts as hanging.
const PATIENCE: Duration = Duration::from_secs(60);

/// The exit codes, as documented.
pub const DONE: i32 = 0;
pub const FAILED: i32 = 1;
pub const BAD_USAGE: i32 = 2;
pub const REFUSED: i32 = 3;

/// `ckpt ARGUMENTS`.
pub fn ckpt<I: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = I>) -> Command {
    let mut command = Command::new(CKPT);
    command.args(arguments).stdin(Stdio::null()).env_remove("RUST_BACKTRACE");
    command
}

/// How a command ended.
#[derive(Debug)]
pub struct Outcome {
    pub status: ExitStatus,
    pub out: String,
    pub errors: Vec<String>,
}

/// Runs a command to its end.
pub fn run(command: &mut Command) -> Outcome {
    start(command).wait()
}

/// Copies a program, by a process of its own: what another test forks in the meantime would have ours open for writing, and
/// the copy could not be started (ETXTBSY).
pub fn copy_program(from: &str, to: &Path) {
    run(Command::new("cp").arg(from).arg(to)).assert_done();
}

/// A command that is running.
pub struct Running {
    pub child: Child,
    out: File,
    errors: File,
}

pub fn start(command: &mut Command) -> Running {
    // Files, so that nobody waits for a reader.
    let (out, errors) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    command.stdout(out.try_clone().unwrap()).stderr(errors.try_clone().unwrap());
    // SAFETY: async-signal-safe. A shell that started the tests in the background has had them ignore it.
    unsafe {
        command.pre_exec(|| {
            libc::signal(libc::SIGINT, libc::SIG_DFL);
            Ok(())
        })
    };
    let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    Running { child, out, errors }
}

impl Running {
    pub fn wait(mut self) -> Outcome {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None if Instant::now() > deadline => {
                    let _ = self.child.kill();
                    panic!("it hangs; it has said: {}", content(&mut self.errors));
                }
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        let errors = content(&mut self.errors).lines().map(str::to_string).collect();
        Outcome { status, out: content(&mut self.out), errors }
    }
}

fn content(file: &mut File) -> String {
    use std::io::Seek;
    let mut text = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    text
}

impl Outcome {
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    pub fn signal(&self) -> Option<i32> {
        self.status.signal()
    }

    #[track_caller]
    pub fn assert_done(&self) {
        assert_eq!(self.code(), Some(DONE), "{self:#?}");
    }

    /// It failed with this code and one clear line, which says all of these.
    #[track_caller]
    pub fn assert_error(&self, code: i32, says: &[&str]) {
        assert_eq!(self.code(), Some(code), "{self:#?}");
        assert_eq!(self.errors.len(), 1, "one line: {self:#?}");
        let line = &self.errors[0];
        assert!(line.starts_with("ckpt: error: "), "{line}");
        for word in says {
            assert!(line.to_lowercase().contains(&word.to_lowercase()), "{word:?} in: {line}");
        }
        assert!(!line.ends_with('.') && !line.contains("a bug in ckpt"), "{line}");
    }
}

/// A directory of a test's own.
pub struct Workshop(tempfile::TempDir);

impl Workshop {
    pub fn new() -> Workshop {
        Workshop(tempfile::Builder::new().prefix("ckpt-test-").tempdir().unwrap())
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Where images go: a directory with nothing else in it.
    pub fn image(&self) -> PathBuf {
        let images = self.path().join("images");
        fs::create_dir_all(&images).unwrap();
        images.join("image")
    }

    /// Neither an image nor anything begun is left.
    #[track_caller]
    pub fn assert_no_image(&self) {
        assert_eq!(names(self.image().parent().unwrap()), Vec::<String>::new(), "left behind");
    }
}

/// A file system of this thread's and its children's own: nobody else sees it, and it is gone with the thread.
pub fn mount(workshop: &Workshop, name: &str, data: &str, flags: nix::mount::MsFlags) -> PathBuf {
    let place = workshop.path().join(name);
    fs::create_dir(&place).unwrap();
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    let nothing = None::<&str>;
    nix::mount::mount(nothing, "/", nothing, nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE, nothing)
        .unwrap();
    nix::mount::mount(Some("tmpfs"), &place, Some("tmpfs"), flags, Some(data)).unwrap();
    place
}

pub fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The program of `ckpt demo`: threads, memory with sums over it, a file, a pipe, a timer. It checks itself all the
/// time and shows that it is alive by counting.
pub struct Subject {
    pub pid: Pid,
    directory: PathBuf,
    child: Option<Child>,
}

impl Subject {
    pub fn start(workshop: &Workshop) -> Subject {
        adopt_orphans();
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let directory = workshop.path().join(format!("subject-{}", NUMBER.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir(&directory).unwrap();
        let output = File::create(directory.join("output")).unwrap();
        let mut command = Command::new(CKPT);
        command.arg("demo-program").arg(&directory).stdin(Stdio::null()).current_dir(&directory);
        command.stdout(output.try_clone().unwrap()).stderr(output);
        let child = in_own_session(command).spawn().unwrap();
        let subject = Subject { pid: Pid(child.id() as i32), directory, child: Some(child) };
        subject.wait_for_ticks(1);
        subject
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// pid, secret, threads, ticks, rounds
    fn report(&self) -> Option<Vec<u64>> {
        let text = fs::read_to_string(self.file("report")).ok()?;
        text.split_whitespace().map(|word| word.parse().ok()).collect()
    }

    pub fn ticks(&self) -> u64 {
        self.report().map_or(0, |report| report[3])
    }

    #[track_caller]
    pub fn wait_for_ticks(&self, ticks: u64) {
        wait_until("the subject goes on", || self.ticks() >= ticks);
    }

    /// It runs, all of its threads work, and nobody traces it.
    #[track_caller]
    pub fn assert_unharmed(&self) {
        let proc = ProcDir::open(self.pid).unwrap_or_else(|error| panic!("the subject is gone: {error}"));
        for tid in proc.numbers("task").unwrap() {
            let status = proc.thread(Pid(tid)).unwrap().status().unwrap();
            assert_eq!(status.field("TracerPid"), Some("0"), "thread {tid} is traced");
            let state = status.field("State").unwrap();
            assert!(matches!(state.as_bytes()[0], b'R' | b'S' | b'D'), "thread {tid} is {state}");
        }
        let report = self.report().expect("a report");
        self.wait_for_ticks(report[3] + 3);
        wait_until("the subject's threads work", || self.report().is_some_and(|later| later[4] > report[4]));
        let later = self.report().unwrap();
        assert_eq!(later[..3], report[..3], "it is another program, or has other threads");
    }

    /// It is gone, as after a dump.
    pub fn reap(&mut self) {
        end_of(&mut self.child.take().expect("a child"));
    }

    /// It is back.
    pub fn adopt(&mut self) {
        wait_until("the subject is back", || ProcDir::open(self.pid).is_ok());
    }

    /// Has it end and say whether all was right.
    #[track_caller]
    pub fn finish(mut self) {
        kill(self.pid, libc::SIGTERM);
        let code = wait_for(self.pid, self.child.take());
        assert_eq!(code, Some(0), "{}", fs::read_to_string(self.file("output")).unwrap());
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        // Ours, or one that we adopted: nobody else can have the id while we have not waited for it.
        if ProcDir::open(self.pid).and_then(|proc| proc.stat_line()).is_ok_and(|stat| is_ours(stat.ppid)) {
            kill(self.pid, libc::SIGKILL);
            wait_for(self.pid, self.child.take());
        }
    }
}

fn is_ours(parent: Pid) -> bool {
    parent.0 as u32 == std::process::id()
}

/// Waits for a process of ours, with a deadline. Gives its exit code, if it has one.
pub fn wait_for(pid: Pid, child: Option<Child>) -> Option<i32> {
    if let Some(mut child) = child {
        return end_of(&mut child).code();
    }
    let mut code = None;
    wait_until("an adopted process ends", || {
        use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
        match waitpid(nix::unistd::Pid::from_raw(pid.0), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => return false,
            Ok(WaitStatus::Exited(_, status)) => code = Some(status),
            _ => {}
        }
        true
    });
    code
}

/// Waits for a child, with a deadline.
#[track_caller]
pub fn end_of(child: &mut Child) -> ExitStatus {
    let mut status = None;
    wait_until("a child ends", || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    status.expect("it ended")
}

pub fn kill(pid: Pid, signal: i32) {
    let signal = nix::sys::signal::Signal::try_from(signal).unwrap();
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.0), signal);
}

/// A process that a test started: ended with it.
pub struct Companion(pub Child);

impl Companion {
    pub fn start(command: Command) -> Companion {
        Companion(in_own_session(command).spawn().unwrap())
    }

    /// A shell script, in a directory.
    pub fn shell(script: &str, directory: &Path) -> Companion {
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(script).current_dir(directory).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        Companion::start(command)
    }

    /// A Python program, in a directory.
    pub fn python(program: &str, directory: &Path) -> Companion {
        let mut command = Command::new("/usr/bin/python3");
        command.arg("-c").arg(program).current_dir(directory).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        Companion::start(command)
    }

    pub fn pid(&self) -> Pid {
        Pid(self.0.id() as i32)
    }
}

impl Drop for Companion {
    fn drop(&mut self) {
        // It leads its session: its children, if any, are in its group.
        let _ = nix::sys::signal::killpg(nix::unistd::Pid::from_raw(self.0.id() as i32), nix::sys::signal::SIGKILL);
        end_of(&mut self.0);
    }
}

/// Somebody who has the id of a process that has ended, and whom nothing may reach: ended when it is dropped. With how he
/// looked when nobody knew him.
pub struct Stranger(pub Pid, String);

impl Stranger {
    /// Takes an id as soon as it is free. He is of this user, blocks every signal and waits.
    #[track_caller]
    pub fn take(pid: Pid, uid: u32) -> Stranger {
        wait_until(&format!("the id {pid} is free"), || Stranger::make(pid.0, uid));
        let rests = || fs::read_to_string(format!("/proc/{pid}/syscall")).is_ok_and(|call| call.starts_with("34 "));
        wait_until("the stranger rests", rests);
        Stranger(pid, Stranger::look(pid))
    }

    fn make(id: i32, uid: u32) -> bool {
        let mut arguments = [0u64; 11];
        arguments[4] = libc::SIGCHLD as u64;
        arguments[8] = (&raw const id) as u64;
        arguments[9] = 1;
        // SAFETY: `struct clone_args`, as a fork with a chosen id (set_tid at 64); the child only makes system calls.
        let made = unsafe { libc::syscall(libc::SYS_clone3, arguments.as_ptr(), size_of_val(&arguments)) };
        if made != 0 {
            return made > 0;
        }
        // SAFETY: as above; the mask is the kernel's, so that it has the signals of the C library too.
        unsafe {
            let all = u64::MAX;
            libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const all, 0, 8);
            libc::close_range(0, u32::MAX, 0);
            libc::syscall(libc::SYS_setresgid, uid, uid, uid);
            libc::syscall(libc::SYS_setresuid, uid, uid, uid);
            loop {
                libc::pause();
            }
        }
    }

    /// What a call that takes an id can leave behind: signals, a state, ids, priorities, processors, limits.
    fn look(pid: Pid) -> String {
        let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
        let (stat, status) = (read("stat"), read("status"));
        let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        // State, parent, group, session, priority, nice, policy.
        let mut text = [0, 1, 2, 3, 15, 16, 38].map(|n| fields[n]).join(" ");
        const KEPT: [&str; 6] = ["TracerPid", "SigPnd", "ShdPnd", "SigBlk", "Cpus_allowed:", "Threads"];
        for line in status.lines().filter(|line| KEPT.iter().any(|name| line.starts_with(name))) {
            text += "\n";
            text += line;
        }
        text + "\n" + &read("limits")
    }

    /// Nobody has reached him.
    #[track_caller]
    pub fn assert_untouched(&self) {
        assert_eq!(Stranger::look(self.0), self.1, "the stranger with id {}", self.0);
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        kill(self.0, libc::SIGKILL);
        wait_for(self.0, None);
    }
}

fn in_own_session(mut command: Command) -> Command {
    // SAFETY: setsid and close_range are plain system calls.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            keep_nothing()
        })
    };
    command
}

/// For a child before its exec: closes what it has inherited of whoever started the tests, but the standard streams.
pub fn keep_nothing() -> std::io::Result<()> {
    // SAFETY: no pointers.
    match unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// What is restored into the background becomes ours, so that a test can wait for it.
pub fn adopt_orphans() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| nix::sys::prctl::set_child_subreaper(true).unwrap());
}

#[track_caller]
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// `dump -t PID -D IMAGE`, with more options.
pub fn dump(pid: Pid, image: &Path, more: &[&str]) -> Command {
    let mut command = ckpt(["dump", "-t"]);
    command.arg(pid.to_string()).arg("-D").arg(image).args(more);
    command
}

/// `restore -d -D IMAGE`.
pub fn restore(image: &Path) -> Command {
    let mut command = ckpt(["restore", "-d", "-D"]);
    command.arg(image);
    command
}

/// A subject that was dumped and is gone, with its image.
pub fn dumped(workshop: &Workshop) -> (Subject, PathBuf) {
    let mut subject = Subject::start(workshop);
    subject.wait_for_ticks(3);
    let image = workshop.image();
    run(&mut dump(subject.pid, &image, &[])).assert_done();
    subject.reap();
    (subject, image)
}

/// The tests that look at whole files at a few places take these: the first and last bytes, and some between, the same
/// in every run.
pub fn sample(length: u64, between: u64) -> Vec<u64> {
    let mut places: Vec<u64> = (0..length.min(20)).chain(length.saturating_sub(4)..length).collect();
    let mut random = 0x9e37_79b9_7f4a_7c15u64 ^ length;
    for _ in 0..between {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        places.push((random >> 20) % length.max(1));
    }
    places.sort_unstable();
    places.dedup();
    places
}
