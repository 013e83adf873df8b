//! [`Case`]: one subject with how it is dumped, and [`Checkpoint`]: what a subject knows of its trial.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The subject creates it when it may be dumped.
pub const READY: &str = "ready";
/// The suite creates it when the subject shall judge itself.
pub const GO: &str = "go";
/// The subject writes it at its end: `pass`, or what was expected and what was found.
pub const VERDICT: &str = "verdict";
/// Standard output and standard error of the subject.
pub const OUTPUT: &str = "output";

/// The subject itself: sets state up, waits, checks it. An `Err` says what was expected and what was found.
pub type Subject = fn(&Checkpoint) -> Result<(), String>;

/// What is dumped.
#[derive(Clone, Debug)]
pub enum Root {
    Subject(Subject),
    Program(Program),
}

/// A real program.
///
/// It creates [`READY`], waits for [`GO`] and writes its [`VERDICT`] into its current directory, or has clients that do
/// all three; and it exits with status 0.
#[derive(Clone, Debug)]
pub struct Program {
    /// How to start it; standard streams, environment and directory are the suite's.
    pub command: fn(&Path) -> Command,
    /// Files that must be on this host, each with the Debian package it is in.
    pub needs: &'static [(&'static str, &'static str)],
    pub clients: Option<Clients>,
}

/// Who uses a program from outside its tree. Each is given the trial's directory.
#[derive(Clone, Debug)]
pub struct Clients {
    /// Returns when the program is ready to be dumped.
    pub prepare: fn(&Path) -> Result<(), String>,
    /// Right before the dump of a round, counted from 0.
    pub before_dump: fn(&Path, usize) -> Result<(), String>,
    /// Right after the restore of a round.
    pub after_restore: fn(&Path, usize) -> Result<(), String>,
    /// Judges it and ends it.
    pub finish: fn(&Path) -> Result<(), String>,
}

/// What a case needs of the CPU: its name, and whether it is there.
pub type CpuFeature = (&'static str, fn() -> bool);

/// One thing to try: a subject, and how it is dumped and restored.
#[derive(Clone, Debug)]
pub struct Case {
    /// `KIND/WHAT`, unique.
    pub name: &'static str,
    /// The sections that a backend must be able to save, out of `ckpt_core::resource::names()`.
    pub resources: &'static [&'static str],
    /// What else they must be able to, in the words of [`Capability::lacks`](ckpt_core::backend::Capability).
    pub needs: &'static [&'static str],
    /// Why it is not for an ordinary user, if so.
    pub privileged: Option<&'static str>,
    /// Why it has to have its own ids, if so.
    pub real_ids: Option<&'static str>,
    pub root: Root,
    pub shell_job: bool,
    pub tcp_close: bool,
    pub refused_at_dump: Option<&'static str>,
    pub refused_at_restore: Option<&'static str>,
    pub after_dump: Option<fn(&Path)>,
    pub unsteady: bool,
    pub restless: bool,
    pub snapshot: bool,
    pub loses_names: bool,
    pub passing_threads: bool,
    pub idle: bool,
    /// How often in a row it is dumped and restored.
    pub rounds: usize,
    /// What the CPU must have, and whether it has.
    pub cpu: Option<CpuFeature>,
    /// What this host must allow; an error says why it does not.
    pub host: Option<fn() -> Result<(), String>>,
}

impl Case {
    pub fn new(name: &'static str, resources: &'static [&'static str], subject: Subject) -> Case {
        Case::with_root(name, resources, Root::Subject(subject), 1)
    }

    /// A real program, which goes through five rounds.
    pub fn program(name: &'static str, resources: &'static [&'static str], program: Program) -> Case {
        Case::with_root(name, resources, Root::Program(program), 5)
    }

    pub(crate) fn with_root(name: &'static str, resources: &'static [&'static str], root: Root, rounds: usize) -> Case {
        Case {
            name,
            resources,
            needs: &[],
            privileged: None,
            real_ids: None,
            root,
            rounds,
            shell_job: false,
            tcp_close: false,
            refused_at_dump: None,
            refused_at_restore: None,
            after_dump: None,
            unsteady: false,
            restless: false,
            snapshot: false,
            loses_names: false,
            passing_threads: false,
            idle: false,
            cpu: None,
            host: None,
        }
    }

    /// A backend that says that it cannot do one of these things is not tried.
    pub fn needs(mut self, needs: &'static [&'static str]) -> Case {
        self.needs = needs;
        self
    }

    /// Not tried as an ordinary user: why.
    pub fn real_ids(mut self, why: &'static str) -> Case {
        self.real_ids = Some(why);
        self
    }

    pub fn privileged(mut self, why: &'static str) -> Case {
        self.privileged = Some(why);
        self
    }

    /// The subject is a job of a terminal: no session leader, its standard input is the terminal. Dumped and restored
    /// with `--shell-job`.
    pub fn shell_job(mut self) -> Case {
        self.shell_job = true;
        self
    }

    /// Dumped with `--tcp-close`.
    pub fn tcp_close(mut self) -> Case {
        self.tcp_close = true;
        self
    }

    /// The dump must be refused with a message that holds this text, and the subject must go on and pass.
    pub fn refused_at_dump(mut self, text: &'static str) -> Case {
        self.refused_at_dump = Some(text);
        self
    }

    /// Changes the world between dump and restore. It is given the trial's directory, and runs outside the tree. Not
    /// called where the subject is left running.
    pub fn after_dump(mut self, change: fn(&Path)) -> Case {
        self.after_dump = Some(change);
        self
    }

    /// The restore must be refused with a message that holds this text, and leave nothing behind.
    pub fn refused_at_restore(mut self, text: &'static str) -> Case {
        self.refused_at_restore = Some(text);
        self
    }

    /// Not tried on a CPU that lacks something.
    pub fn needs_cpu(mut self, what: &'static str, has: fn() -> bool) -> Case {
        self.cpu = Some((what, has));
        self
    }

    /// Skipped on a host that does not allow something.
    pub fn needs_host(mut self, allows: fn() -> Result<(), String>) -> Case {
        self.host = Some(allows);
        self
    }

    /// Dumped and restored so many times in a row before it judges itself.
    pub fn rounds(mut self, rounds: usize) -> Case {
        self.rounds = rounds;
        self
    }

    /// Links in `/proc` to a deleted file may show another name after the restore: its own is in use.
    pub fn loses_names(mut self) -> Case {
        self.loses_names = true;
        self
    }

    /// Threads of the subject come and go while it waits: of each process only the main thread is compared.
    pub fn passing_threads(mut self) -> Case {
        self.passing_threads = true;
        self
    }

    /// For most of a trial all wait for time to go by, so that several can be tried in the place of one.
    pub fn idle(mut self) -> Case {
        self.idle = true;
        self
    }

    /// It is dumped so that it goes on, too, and then restored from that image: the subject changes what it has all the time.
    pub fn snapshot(mut self) -> Case {
        self.snapshot = true;
        self
    }

    /// The subject goes on working while it waits: of what can be seen from outside only what it does not change by
    /// itself is compared ([`Visible::coarse`](crate::visible::Visible::coarse)).
    pub fn unsteady(mut self) -> Case {
        self.unsteady = true;
        self
    }

    /// The tree starts and ends processes or threads all the time. A dump that says that the tree changed meanwhile, and is
    /// to be tried again, is tried again, and what can be seen from outside is not compared: the subject says how it is.
    pub fn restless(mut self) -> Case {
        self.restless = true;
        self
    }
}

/// What a subject knows of its trial. May be used from every thread and from forked children.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    ready: CString,
    go: CString,
}

/// How long a subject waits before it says that it was forgotten.
const GO_DEADLINE: Duration = Duration::from_secs(300);

impl Checkpoint {
    /// The checkpoint of a trial in an absolute directory.
    pub fn new(dir: &Path) -> Checkpoint {
        let path = |name| CString::new(dir.join(name).as_os_str().as_bytes()).expect("a path without NUL");
        Checkpoint { dir: dir.to_path_buf(), ready: path(READY), go: path(GO) }
    }

    /// The trial's own directory, absolute; also the current directory of the subject.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Tells the suite to dump: `ready()`, then waits for the restore: `wait_for_go()`.
    pub fn wait(&self) -> Result<(), String> {
        self.ready()?;
        self.wait_for_go()
    }

    /// Tells the suite that the tree may be dumped from now on. Does not allocate; may be called more than once.
    pub fn ready(&self) -> Result<(), String> {
        // Not by open(2): whoever sees the file could still see the descriptor too.
        // SAFETY: `ready` is a C string that lives as long as `self`.
        let made = unsafe { libc::mknod(self.ready.as_ptr(), libc::S_IFREG | 0o666, 0) };
        let error = std::io::Error::last_os_error();
        if made < 0 && error.raw_os_error() != Some(libc::EEXIST) {
            return Err(format!("creating {:?} failed: {error}", self.ready));
        }
        Ok(())
    }

    /// Waits until the suite says that the subject was restored (or left running) and shall judge itself.
    ///
    /// Holds no descriptor and allocates nothing while it waits: `stat` and `nanosleep` of 1 ms in turn.
    pub fn wait_for_go(&self) -> Result<(), String> {
        let begin = Instant::now();
        while !self.is_go() {
            if begin.elapsed() > GO_DEADLINE {
                return Err(format!("no sign to go on came within {} s", GO_DEADLINE.as_secs()));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Whether the sign to go on is there. For subjects that work while they wait.
    pub fn is_go(&self) -> bool {
        // SAFETY: `go` is a C string that lives as long as `self`; access(2) writes nothing.
        unsafe { libc::access(self.go.as_ptr(), libc::F_OK) == 0 }
    }
}
