//! One trial: a subject is started, dumped, restored, and judged, in namespaces of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Permissions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use ckpt_core::dump::After;
use ckpt_core::registry;

use crate::case::{Case, GO, OUTPUT, READY, Root, VERDICT};
use crate::driver::{self, Failure};
use crate::strangers::Strangers;
use crate::visible::{Visible, numbers};
use crate::{cases, isolation, ordinary};

/// What is done to the subject.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// Nothing: a subject that does not pass so is broken itself.
    Dry,
    /// Dumped with `--leave-running` by this backend.
    Running(&'static str),
    /// Dumped with `--leave-running`, ended some time later, and restored from that image, by one backend.
    Snapshot(&'static str),
    /// Dumped by one backend and restored by another, so many times in a row.
    Restored { dumper: &'static str, restorer: &'static str, rounds: usize },
    /// The same with one backend, all by an [ordinary user](crate::ordinary).
    Ordinary { backend: &'static str, rounds: usize },
    /// The same, and while the tree is away its ids are [taken](crate::strangers).
    Taken { backend: &'static str, rounds: usize },
    /// Nothing, by an ordinary user.
    OrdinaryDry,
}

/// Ends the names of ways of an ordinary user.
const BY_NOBODY: &str = "@nobody";
/// Ends those of ways where the ids are taken.
const TAKEN: &str = "@taken";

impl Way {
    /// The name of its column in the matrix; also how a trial's process is told.
    pub fn name(&self) -> String {
        match self {
            Way::Dry => "dry".into(),
            Way::Running(dumper) => format!("{dumper}+running"),
            Way::Snapshot(backend) => format!("{backend}+snapshot"),
            Way::Restored { dumper, restorer, .. } => format!("{dumper}+{restorer}"),
            Way::Ordinary { backend, .. } => format!("{backend}{BY_NOBODY}"),
            Way::Taken { backend, .. } => format!("{backend}{TAKEN}"),
            Way::OrdinaryDry => format!("dry{BY_NOBODY}"),
        }
    }

    /// The backend that dumps, which may have to start the subject as well.
    fn dumper(&self) -> Option<&'static str> {
        match self {
            Way::Dry | Way::OrdinaryDry => None,
            Way::Running(dumper)
            | Way::Snapshot(dumper)
            | Way::Restored { dumper, .. }
            | Way::Ordinary { backend: dumper, .. }
            | Way::Taken { backend: dumper, .. } => Some(dumper),
        }
    }

    fn is_ordinary(&self) -> bool {
        matches!(self, Way::Ordinary { .. } | Way::Taken { .. } | Way::OrdinaryDry)
    }

    fn parse(name: &str, rounds: usize) -> Option<Way> {
        let known = |name: &str| registry::backend(name).ok().map(|backend| backend.name);
        if let Some(name) = name.strip_suffix(BY_NOBODY) {
            return match name {
                "dry" => Some(Way::OrdinaryDry),
                name => Some(Way::Ordinary { backend: known(name)?, rounds }),
            };
        }
        if let Some(name) = name.strip_suffix(TAKEN) {
            return Some(Way::Taken { backend: known(name)?, rounds });
        }
        match name.split_once('+') {
            None => (name == "dry").then_some(Way::Dry),
            Some((dumper, "running")) => Some(Way::Running(known(dumper)?)),
            Some((backend, "snapshot")) => Some(Way::Snapshot(known(backend)?)),
            Some((dumper, restorer)) => {
                Some(Way::Restored { dumper: known(dumper)?, restorer: known(restorer)?, rounds })
            }
        }
    }
}

/// How a trial ended.
pub type Verdict = Result<(), String>;

const SWITCH: &str = "--ckpt-trial";
/// From the start until the subject says that it is ready.
const READY_DEADLINE: Duration = Duration::from_secs(60);
/// From the sign to go on until it has ended.
const VERDICT_DEADLINE: Duration = Duration::from_secs(60);
/// Until every thread is back where it was.
const SETTLED: Duration = Duration::from_millis(500);
/// How often a restless tree is dumped until it succeeds.
const MOST_TRIES: usize = 30;
/// For one round of dump and restore.
const ROUND_DEADLINE: Duration = Duration::from_secs(120);

/// Every program that runs trials calls this first: it is started again for each of them.
pub fn be_a_trial_if_asked() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [isolation::PROBE] => std::process::exit(isolation::answer_probe()),
        [SWITCH, case, way, rounds, dir, subject] => {
            let rounds = rounds.parse().unwrap_or(1);
            let (Some(case), Some(way)) = (cases::find(case), Way::parse(way, rounds)) else {
                println!("no such trial");
                std::process::exit(2)
            };
            let total = READY_DEADLINE + VERDICT_DEADLINE + ROUND_DEADLINE * rounds as u32;
            let status = isolation::run(total, || {
                let mut init = Init::new(&case, PathBuf::from(dir), PathBuf::from(subject));
                match catch_unwind(AssertUnwindSafe(|| init.attend(&way))) {
                    Ok(Ok(())) => 0,
                    Ok(Err(failure)) => {
                        println!("{failure}");
                        1
                    }
                    Err(panic) => {
                        println!("the trial itself panicked: {}", driver::panic_text(&*panic));
                        1
                    }
                }
            });
            std::process::exit(match status {
                Ok(Some(status)) => status,
                Ok(None) => {
                    println!("the trial did not end within {} s", total.as_secs());
                    1
                }
                Err(error) => {
                    println!("running the trial failed: {error}");
                    1
                }
            })
        }
        _ => {}
    }
}

/// Runs one trial in processes of its own. `subject` is the program `ckpt-subject`.
pub fn run(case: &Case, way: &Way, subject: &Path) -> Verdict {
    let dir = tempfile::Builder::new().prefix("ckpt-trial-").tempdir().map_err(|error| error.to_string())?;
    // A subject may have become another user when it writes its verdict.
    fs::set_permissions(dir.path(), Permissions::from_mode(0o777)).map_err(|error| error.to_string())?;
    let rounds = match way {
        Way::Restored { rounds, .. } | Way::Ordinary { rounds, .. } | Way::Taken { rounds, .. } => *rounds,
        Way::Dry | Way::Running(_) | Way::Snapshot(_) | Way::OrdinaryDry => 1,
    };
    let mut command = Command::new("/proc/self/exe");
    command.args([SWITCH, case.name, &way.name(), &rounds.to_string()]).arg(dir.path()).arg(subject);
    // SAFETY: prctl(2) is async-signal-safe.
    unsafe { command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?)) };
    let output = command.stdin(Stdio::null()).output().map_err(|error| format!("starting the trial: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let mut text = String::from_utf8_lossy(&output.stdout).trim_end().to_string();
    if text.is_empty() {
        text = format!("the trial ended with {}", output.status);
    }
    let standard_error = String::from_utf8_lossy(&output.stderr).into_owned();
    let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap_or_default();
    for (what, content) in [("subject", read(OUTPUT)), ("drivers", read(driver::LOG)), ("trial", standard_error)] {
        if !content.is_empty() {
            text.push_str(&format!("\n--- output of the {what}:\n{}", last_lines(&content, 40)));
        }
    }
    if std::env::var_os("CKPT_KEEP").is_some() {
        text.push_str(&format!("\n--- kept: {}", dir.keep().display()));
    }
    Err(text)
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// Pid 1 of a trial: parent of the subject, and of every orphan.
struct Init<'a> {
    case: &'a Case,
    dir: PathBuf,
    subject: PathBuf,
    root: i32,
    ended: BTreeMap<i32, ExitStatus>,
    /// The other end of the subject's terminal.
    terminal: Option<OwnedFd>,
    /// Subject and drivers are an ordinary user's.
    ordinary: bool,
    /// Who has the ids of the tree, where it is to come back under others.
    strangers: Option<Strangers>,
}

impl Init<'_> {
    fn new(case: &Case, dir: PathBuf, subject: PathBuf) -> Init<'_> {
        Init { case, dir, subject, root: 0, ended: BTreeMap::new(), terminal: None, ordinary: false, strangers: None }
    }

    fn attend(&mut self, way: &Way) -> Verdict {
        self.ordinary = way.is_ordinary();
        if self.ordinary {
            ordinary::furnish().map_err(|error| format!("furnishing a world for ordinary users: {error}"))?;
        }
        self.start(way)?;
        self.wait_until_ready()?;
        match *way {
            Way::Dry | Way::OrdinaryDry => {
                self.before_dump(0)?;
                self.after_restore(0)?;
            }
            Way::Running(dumper) => self.leave_running(dumper)?,
            Way::Snapshot(backend) => self.snapshot(backend)?,
            Way::Restored { dumper, restorer, rounds } => {
                if !self.rounds(dumper, restorer, rounds)? {
                    return Ok(());
                }
            }
            Way::Taken { backend, rounds } => {
                self.strangers = Some(Strangers::default());
                if !self.rounds(backend, backend, rounds)? {
                    return Ok(());
                }
            }
            Way::Ordinary { backend, rounds } => {
                if !self.rounds(backend, backend, rounds)? {
                    return Ok(());
                }
            }
        }
        self.judge()
    }

    /// Dumps and restores, so many times. Says whether there is a tree to judge.
    fn rounds(&mut self, dumper: &str, restorer: &str, rounds: usize) -> Result<bool, String> {
        for round in 0..rounds {
            let restored = self.dump_and_restore(dumper, restorer, round);
            if !restored.map_err(|failure| format!("round {} of {rounds}: {failure}", round + 1))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn start(&mut self, way: &Way) -> Verdict {
        let fail = |error: std::io::Error| format!("starting the subject: {error}");
        let mut command = match &self.case.root {
            Root::Subject(_) => {
                let mut command = Command::new(&self.subject);
                command.arg(self.case.name);
                command
            }
            Root::Program(program) => (program.command)(&self.dir),
        };
        let output = File::create(self.dir.join(OUTPUT)).map_err(fail)?;
        fs::set_permissions(self.dir.join(OUTPUT), Permissions::from_mode(0o666)).map_err(fail)?;
        command.current_dir(&self.dir).stdout(output.try_clone().map_err(fail)?).stderr(output);
        command.env_clear().env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command.env("LANG", "C.UTF-8").env("HOME", &self.dir).env("TMPDIR", &self.dir);
        // SAFETY: async-signal-safe. Whoever started the suite may have left descriptors open, and ignore signals, as a shell
        // does for what it starts in the background; both are no part of this.
        unsafe {
            command.pre_exec(|| {
                libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int);
                for signal in 1..=libc::SIGRTMAX() {
                    libc::signal(signal, libc::SIG_DFL);
                }
                Ok(())
            })
        };
        if let Some(launcher) = way.dumper().and_then(|dumper| backend(dumper).launcher) {
            launcher(&mut command).map_err(fail)?;
        }
        let is_ordinary = self.ordinary;
        // SAFETY: async-signal-safe, as it says. After whatever a launcher does.
        unsafe { command.pre_exec(move || if is_ordinary { ordinary::become_ordinary() } else { Ok(()) }) };
        if self.case.shell_job {
            let terminal = self.open_terminal().map_err(|error| format!("opening a terminal: {error}"))?;
            let number = terminal.as_raw_fd();
            command.stdin(Stdio::from(terminal.try_clone().map_err(fail)?));
            // SAFETY: async-signal-safe calls on a descriptor that stays open until after the fork.
            unsafe {
                command.pre_exec(move || {
                    libc::setpgid(0, 0);
                    // A background process may not choose the foreground unless SIGTTOU is out of the way.
                    libc::signal(libc::SIGTTOU, libc::SIG_IGN);
                    let result = libc::tcsetpgrp(number, libc::getpid());
                    libc::signal(libc::SIGTTOU, libc::SIG_DFL);
                    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
                })
            };
            self.root = command.spawn().map_err(fail)?.id() as i32;
        } else {
            // SAFETY: setsid(2) is async-signal-safe.
            unsafe { command.pre_exec(|| Ok(nix::unistd::setsid().map(drop)?)) };
            self.root = command.stdin(Stdio::null()).spawn().map_err(fail)?.id() as i32;
        }
        Ok(())
    }

    /// Gives the session of init a terminal, and returns the subject's end.
    fn open_terminal(&mut self) -> nix::Result<OwnedFd> {
        nix::unistd::setsid()?;
        let pair = nix::pty::openpty(None, None)?;
        for fd in [&pair.master, &pair.slave] {
            nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
        }
        // SAFETY: TIOCSCTTY takes an integer, and the descriptor is open.
        nix::errno::Errno::result(unsafe { libc::ioctl(pair.slave.as_raw_fd(), libc::TIOCSCTTY, 0) })?;
        if self.ordinary {
            ordinary::give(&pair.slave)?;
        }
        self.terminal = Some(pair.master);
        Ok(pair.slave)
    }

    fn wait_until_ready(&mut self) -> Verdict {
        if let Some(clients) = self.clients() {
            return (clients.prepare)(&self.dir).map_err(|failure| format!("preparing: {failure}"));
        }
        let begin = Instant::now();
        let marker = self.dir.join(READY);
        // A shell's redirection has the file open for an instant more, which is not yet how the tree will look.
        while !marker.exists() || is_open_anywhere(&marker) {
            self.reap();
            if let Some(status) = self.ended.get(&self.root) {
                return Err(format!("the subject ended ({status}) before it was ready: {}", self.verdict()));
            }
            if begin.elapsed() > READY_DEADLINE {
                return Err(format!("the subject was not ready within {} s", READY_DEADLINE.as_secs()));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn clients(&self) -> Option<&crate::case::Clients> {
        match &self.case.root {
            Root::Program(program) => program.clients.as_ref(),
            Root::Subject(_) => None,
        }
    }

    /// A dump that leaves the tree running, or is refused: in both the tree must not be able to tell.
    fn leave_running(&mut self, dumper: &str) -> Verdict {
        self.before_dump(0)?;
        let before = self.look();
        let image = self.dir.join("image");
        let files = self.files();
        // A dump that is not refused as it should be ends the subject, which is then missed.
        let after = if self.case.refused_at_dump.is_some() { After::Kill } else { After::LeaveRunning };
        let result = self.dump(dumper, &image, after);
        match (result, self.case.refused_at_dump) {
            (Ok(()), None) => {}
            (Ok(()), Some(text)) => return Err(format!("the dump was not refused; expected: {text}")),
            (Err(Failure::Said(message)), Some(text)) if message.contains(text) => {
                let left: Vec<_> = self.files().difference(&files).cloned().collect();
                if !left.is_empty() {
                    return Err(format!("the refused dump left {left:?} behind"));
                }
            }
            (Err(Failure::Said(message)), Some(text)) => {
                return Err(format!("the dump was refused, but not for {text:?}: {message}"));
            }
            (Err(failure), _) => return Err(format!("the dump failed: {failure:?}")),
        }
        if !self.case.restless {
            self.compare(before, "after the dump")?;
        }
        self.after_restore(0)
    }

    /// One dump; of a restless tree as many as it takes, within limits.
    fn dump(&mut self, dumper: &str, image: &Path, after: After) -> Result<(), Failure> {
        let mut tries = 1;
        loop {
            let result = driver::dump(backend(dumper), self.case, self.root, image, after, self.ordinary);
            match result {
                Err(Failure::Said(message)) if self.case.restless && tries < MOST_TRIES && changed(&message) => {
                    tries += 1;
                    self.reap();
                }
                Err(Failure::Said(message)) if tries > 1 => {
                    return Err(Failure::Said(format!("{message} (try {tries})")));
                }
                result => return result,
            }
        }
    }

    /// A dump that leaves the tree running, and what is restored from it while the tree is gone.
    fn snapshot(&mut self, name: &str) -> Verdict {
        let image = self.dir.join("image");
        driver::dump(backend(name), self.case, self.root, &image, After::LeaveRunning, self.ordinary)
            .map_err(|failure| format!("the dump failed: {failure:?}"))?;
        // It has gone on, and its verdict on that is the business of another way.
        for pid in self.processes() {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
        let begin = Instant::now();
        while !self.processes().is_empty() {
            self.reap();
            if begin.elapsed() > Duration::from_secs(20) {
                return Err(format!("processes {:?} do not end", self.processes()));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.ended.clear();
        match driver::restore(backend(name), self.case, &image, self.ordinary) {
            Ok(root) if root == self.root => Ok(()),
            Ok(root) => Err(format!("process {} was dumped, {root} restored", self.root)),
            Err(failure) => Err(format!("the restore failed: {failure:?}")),
        }
    }

    /// One round. Says whether there is a tree to judge.
    fn dump_and_restore(&mut self, dumper: &str, restorer: &str, round: usize) -> Result<bool, String> {
        self.no_pagers_left("the restore of the round before")?;
        if let Some(before) = round.checked_sub(1) {
            let _ = fs::remove_dir_all(self.dir.join(format!("image-{before}")));
        }
        self.before_dump(round)?;
        let before = self.look();
        // Those that the programs know, and those that they have, should they differ by now.
        let mut ids: BTreeSet<i32> =
            before.0.iter().flat_map(|pid| numbers(Path::new(&format!("/proc/{pid}/task")))).collect();
        let image = self.dir.join(format!("image-{round}"));
        self.dump(dumper, &image, After::Kill).map_err(|failure| format!("the dump failed: {failure:?}"))?;
        self.nothing_left("the dump")?;
        self.ended.clear();
        if let Some(strangers) = &mut self.strangers {
            if self.case.restless {
                ids.extend(ids_of(&image)?);
            }
            strangers.take(&ids).map_err(|error| error.to_string())?;
        }
        if let Some(change) = self.case.after_dump.filter(|_| round == 0) {
            change(&self.dir);
        }
        let result = driver::restore(backend(restorer), self.case, &image, self.ordinary);
        match (result, self.case.refused_at_restore) {
            (Ok(root), None) if self.strangers.is_some() => self.root = root,
            (Ok(root), None) if root == self.root => {}
            (Ok(root), None) => return Err(format!("process {} was dumped, {root} restored", self.root)),
            (Ok(_), Some(text)) => return Err(format!("the restore was not refused; expected: {text}")),
            (Err(Failure::Said(message)), Some(text)) if message.contains(text) => {
                self.nothing_left("the refused restore")?;
                return Ok(false);
            }
            (Err(Failure::Said(message)), Some(text)) => {
                return Err(format!("the restore was refused, but not for {text:?}: {message}"));
            }
            (Err(failure), _) => return Err(format!("the restore failed: {failure:?}")),
        }
        if self.case.shell_job {
            give_terminal(self.root).map_err(|error| format!("giving the terminal to the subject: {error}"))?;
        }
        if self.case.restless {
            if !self.processes().contains(&self.root) {
                return Err(format!("after the restore process {} is not there: {}", self.root, self.verdict()));
            }
        } else if self.strangers.is_some() {
            // It looks otherwise from outside. Whether it does from inside, the subject says.
            let (was, is) = (before.0.len(), self.look().0.len());
            if was != is {
                return Err(format!("after the restore there are {is} processes, expected {was}"));
            }
        } else {
            self.compare(before, "after the restore")?;
        }
        self.after_restore(round)?;
        Ok(true)
    }

    fn before_dump(&mut self, round: usize) -> Verdict {
        let Some(clients) = self.clients() else { return Ok(()) };
        (clients.before_dump)(&self.dir, round).map_err(|failure| format!("before the dump: {failure}"))
    }

    fn after_restore(&mut self, round: usize) -> Verdict {
        let Some(clients) = self.clients() else { return Ok(()) };
        (clients.after_restore)(&self.dir, round).map_err(|failure| format!("after the restore: {failure}"))
    }

    /// All processes but the strangers.
    fn processes(&self) -> BTreeSet<i32> {
        let mut pids = all_processes();
        for stranger in self.strangers.iter().flat_map(Strangers::pids) {
            pids.remove(&stranger);
        }
        pids
    }

    fn files(&self) -> BTreeSet<String> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| !name.starts_with("driver.") && name != OUTPUT).collect()
    }

    fn look(&mut self) -> (BTreeSet<i32>, Visible) {
        self.reap();
        let pids = self.processes();
        let visible = Visible::look(&pids);
        let visible = if self.ordinary { visible.with_shared_memory_as_memfd() } else { visible };
        let visible = if self.case.unsteady { visible.coarse() } else { visible };
        let visible = if self.case.passing_threads { visible.without_other_threads() } else { visible };
        (pids, if self.case.loses_names { visible.without_deleted_names() } else { visible })
    }

    /// Compares the tree with how it looked. A thread that was interrupted in a call may not be back in it at once (of
    /// `sigsuspend` that shows in its mask), so a difference has to stay.
    fn compare(&mut self, before: (BTreeSet<i32>, Visible), when: &str) -> Verdict {
        let begin = Instant::now();
        loop {
            let difference = self.difference(&before, when);
            if difference.is_ok() || begin.elapsed() > SETTLED {
                return difference;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn difference(&mut self, before: &(BTreeSet<i32>, Visible), when: &str) -> Verdict {
        let after = self.look();
        if !after.0.contains(&self.root) {
            let status = self.ended.get(&self.root).map(|status| format!(" ({status})")).unwrap_or_default();
            return Err(format!("{when} process {} is not there{status}: {}", self.root, self.verdict()));
        }
        if before.0 != after.0 {
            return Err(format!("{when} there are processes {:?}, expected {:?}", after.0, before.0));
        }
        let mut lines = before.1.difference(&after.1);
        if lines.is_empty() {
            return Ok(());
        }
        let count = lines.len();
        lines.truncate(15);
        Err(format!("{when} {count} things of the tree look otherwise:\n{}", lines.join("\n")))
    }

    /// The tree is gone: nothing lives in the namespace but init. Waits for the dead only.
    fn nothing_left(&mut self, what: &str) -> Verdict {
        let begin = Instant::now();
        loop {
            self.reap();
            let left = self.processes();
            if left.is_empty() {
                return Ok(());
            }
            let living = left.iter().filter(|&&pid| !matches!(state(pid), None | Some('Z' | 'X')));
            let living: Vec<_> = living.map(|pid| (pid, state(*pid))).collect();
            if !living.is_empty() || begin.elapsed() > Duration::from_secs(5) {
                return Err(format!("{what} left processes behind: {living:?} of {left:?}"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until whoever brings in memory after a restore has ended, and asks those that were told not to hurry to go on
    /// with it. Memory that is not there yet cannot be dumped.
    fn no_pagers_left(&mut self, what: &str) -> Verdict {
        let begin = Instant::now();
        loop {
            self.reap();
            let left: Vec<i32> = numbers(Path::new("/proc")).into_iter().filter(|&pid| is_pager(pid)).collect();
            if left.is_empty() {
                return Ok(());
            }
            if begin.elapsed() > Duration::from_secs(20) {
                let left: Vec<String> = left.into_iter().map(doing).collect();
                return Err(format!("{what} left pagers behind that did not end within 20 s: {}", left.join("; ")));
            }
            for pid in left.into_iter().filter(|&pid| name(pid) == PAGERS[0]) {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGUSR1);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Lets the subject go on, and waits for its end and its verdict.
    fn judge(&mut self) -> Verdict {
        File::create(self.dir.join(GO)).map_err(|error| format!("the sign to go on: {error}"))?;
        let judged_by_clients = match self.clients() {
            Some(clients) => {
                (clients.finish)(&self.dir).map_err(|failure| format!("at the end: {failure}"))?;
                true
            }
            None => false,
        };
        let begin = Instant::now();
        while !self.ended.contains_key(&self.root) {
            if begin.elapsed() > VERDICT_DEADLINE {
                let state = state(self.root);
                return Err(format!("process {} did not end after the sign to go on (state {state:?})", self.root));
            }
            std::thread::sleep(Duration::from_millis(1));
            self.reap();
        }
        self.no_pagers_left("the end of the tree")?;
        if let Some(strangers) = &self.strangers {
            strangers.touched()?;
        }
        let status = self.ended[&self.root];
        let verdict = if judged_by_clients { "pass".into() } else { self.verdict() };
        if verdict == "pass" && status.success() { Ok(()) } else { Err(format!("{verdict} ({status})")) }
    }

    fn verdict(&self) -> String {
        let text = fs::read_to_string(self.dir.join(VERDICT));
        text.map_or_else(|_| "no verdict".into(), |text| text.trim_end().to_string())
    }

    fn reap(&mut self) {
        let mut status = 0;
        loop {
            // SAFETY: waitpid writes to an integer of ours.
            let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
            if pid <= 0 {
                return;
            }
            self.ended.insert(pid, ExitStatus::from_raw(status));
        }
    }
}

/// Whether a dump says that the tree did not stand still for it.
fn changed(message: &str) -> bool {
    ["try again", "dump again"].iter().any(|what| message.contains(what))
}

/// The ids of the processes and threads of an image.
fn ids_of(image: &Path) -> Result<BTreeSet<i32>, String> {
    let reader = ckpt_formats::open(image).map_err(|error| error.to_string())?;
    let processes = &reader.image().processes;
    Ok(processes.iter().flat_map(|process| process.threads.iter().map(|thread| thread.tid.0)).collect())
}

/// All processes of the namespace but init, and but those that bring in memory after a restore or serve it.
fn all_processes() -> BTreeSet<i32> {
    let mut pids = numbers(Path::new("/proc"));
    pids.remove(&1);
    pids.retain(|&pid| !is_pager(pid) && name(pid) != crate::backends::SERVER);
    pids
}

/// The names of the processes that bring in the memory of a tree, and watch over that: ckpt's own, and no part of the tree.
const PAGERS: [&str; 2] = ["ckpt-pager", "ckpt-guard"];

fn is_pager(pid: i32) -> bool {
    PAGERS.contains(&name(pid).as_str())
}

fn name(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim_end().to_string()
}

/// What a process does, for whoever has to find out why it does not end.
fn doing(pid: i32) -> String {
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let stat = read("stat");
    let fields: Vec<&str> = stat.rsplit_once(") ").map(|(_, rest)| rest.split(' ').collect()).unwrap_or_default();
    let ticks = fields.get(11..13).unwrap_or_default().join("+");
    let (call, place) = (read("syscall"), read("wchan"));
    format!("{} {pid} {:?} in {place:?} (call {}, {ticks} ticks)", name(pid), state(pid), call.trim())
}

fn state(pid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

fn backend(name: &str) -> &'static ckpt_core::Backend {
    registry::backend(name).unwrap_or_else(|names| panic!("no backend {name} among {names:?}"))
}

/// Makes the group of a restored job the foreground one, as the command line and a shell do: that the old group had the
/// same number does not count.
fn give_terminal(root: i32) -> std::io::Result<()> {
    let terminal = File::options().read(true).write(true).open("/dev/tty")?;
    // SAFETY: these calls take integers; a background process may not choose the foreground with SIGTTOU in the way.
    let result = unsafe {
        libc::signal(libc::SIGTTOU, libc::SIG_IGN);
        let result = libc::tcsetpgrp(terminal.as_raw_fd(), libc::getpgid(root));
        libc::signal(libc::SIGTTOU, libc::SIG_DFL);
        result
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Whether a process, of those in this pid namespace, has a file open.
fn is_open_anywhere(file: &Path) -> bool {
    let tables = std::fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.path().join("fd"));
    let mut descriptors = tables.filter_map(|table| std::fs::read_dir(table).ok()).flatten().flatten();
    descriptors.any(|descriptor| std::fs::read_link(descriptor.path()).is_ok_and(|link| link == file))
}
