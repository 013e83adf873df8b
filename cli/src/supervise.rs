//! ckpt as the parent of a tree: passes signals on, hands the terminal over, stops and continues with it, and ends with
//! its status.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;

use anyhow::Context;
use ckpt_core::Pid;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::termios::{SetArg, Termios, tcgetattr, tcsetattr};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{getpgid, getpgrp, tcgetpgrp, tcsetpgrp};

use crate::sys;

/// What is passed on, besides the real-time signals. Not among them: what the kernel sends us for our own doings
/// (SIGPIPE, SIGTTOU, SIGSEGV, ...), and what cannot be caught.
pub const PASSED: [Signal; 11] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGTERM,
    Signal::SIGCONT,
    Signal::SIGTSTP,
    Signal::SIGWINCH,
    Signal::SIGPWR,
];

/// Our signals, which wait to be read from here on.
pub struct Signals(File);

impl Signals {
    pub fn hold() -> anyhow::Result<Signals> {
        let mut numbers: Vec<i32> = PASSED.iter().map(|signal| *signal as i32).collect();
        numbers.push(libc::SIGCHLD);
        numbers.extend(sys::real_time_signals());
        let fd = sys::hold(&numbers).context("the signals cannot be held")?;
        Ok(Signals(File::from(fd)))
    }

    fn next(&mut self) -> io::Result<Option<Came>> {
        // struct signalfd_siginfo, signalfd(2)
        let mut info = [0u8; 128];
        match self.0.read(&mut info) {
            Ok(128) => {
                let word = |at: usize| i32::from_ne_bytes(info[at..at + 4].try_into().expect("four bytes"));
                let value = u64::from_ne_bytes(info[48..56].try_into().expect("eight bytes"));
                Ok(Some(Came { number: word(0), code: word(8), value }))
            }
            Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// A signal that came.
struct Came {
    number: i32,
    code: i32,
    /// `ssi_ptr`, of `sigqueue`.
    value: u64,
}

/// `si_code` of a signal from the kernel: from the terminal, as far as the ones passed on go.
const SI_KERNEL: i32 = 0x80;
const SI_QUEUE: i32 = -1;

/// Something else to look after while waiting.
pub trait Chore {
    /// Readable when there is something to do; none when there will be nothing more.
    fn fd(&self) -> Option<BorrowedFd<'_>>;
    fn work(&mut self) -> anyhow::Result<()>;
    /// Whether a signal is meant for this chore, and is not passed on; and whether it has ended what was waited for.
    fn take(&mut self, signal: i32) -> Option<Option<ExitCode>>;
}

/// Waits for a child, passing signals on, and returns its exit code; or ends by the signal that it ended by.
pub fn wait(
    root: Pid,
    mut signals: Signals,
    terminal: Option<&Terminal>,
    chores: &mut [&mut dyn Chore],
) -> anyhow::Result<ExitCode> {
    // What interrupted the pipeline too late to be undone is the tree's now.
    if let Some(signal) = sys::interruption() {
        sys::kill(root.0, signal as i32);
    }
    let ended: OwnedFd = sys::pidfd_open(root).with_context(|| format!("process {root} cannot be waited for"))?;
    loop {
        while let Some(came) = signals.next().context("signals")? {
            match chores.iter_mut().find_map(|chore| chore.take(came.number)) {
                None => pass_on(root, &came, terminal),
                Some(None) => {}
                Some(Some(status)) => {
                    finish(terminal, chores)?;
                    return Ok(status);
                }
            }
        }
        for chore in chores.iter_mut() {
            chore.work()?;
        }
        let flags = WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED | WaitPidFlag::WCONTINUED | WaitPidFlag::__WALL;
        match waitpid(nix::unistd::Pid::from_raw(root.0), Some(flags)) {
            Ok(WaitStatus::StillAlive) => {}
            Ok(WaitStatus::Exited(_, code)) => {
                finish(terminal, chores)?;
                return Ok(ExitCode::from(code as u8));
            }
            Ok(WaitStatus::Signaled(_, signal, _)) => {
                finish(terminal, chores)?;
                return Ok(end_by(signal));
            }
            Ok(WaitStatus::Stopped(..)) => {
                if let Some(terminal) = terminal {
                    terminal.take_back();
                    // The shell sees its job stop; when it continues us, SIGCONT is passed on.
                    sys::suffer(Signal::SIGTSTP);
                }
                continue;
            }
            Ok(_) => continue,
            Err(Errno::EINTR) => continue,
            Err(error) => return Err(error).with_context(|| format!("process {root} cannot be waited for")),
        }
        let mut fds =
            vec![PollFd::new(signals.0.as_fd(), PollFlags::POLLIN), PollFd::new(ended.as_fd(), PollFlags::POLLIN)];
        fds.extend(chores.iter().filter_map(|chore| chore.fd()).map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("waiting"),
        }
    }
}

fn finish(terminal: Option<&Terminal>, chores: &mut [&mut dyn Chore]) -> anyhow::Result<()> {
    if let Some(terminal) = terminal {
        terminal.take_back();
    }
    chores.iter_mut().try_for_each(|chore| chore.work())
}

/// Ends as the tree ended, so that our parent sees the same; without a core dump of ours.
fn end_by(signal: Signal) -> ExitCode {
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    sys::suffer(signal);
    // Only for a signal that does not end us after all.
    ExitCode::from(128 + signal as u8)
}

fn pass_on(root: Pid, came: &Came, terminal: Option<&Terminal>) {
    let group = group_of(root);
    // What the terminal sends goes to a whole group.
    let everyone = group.map_or(root.0, |group| -group);
    match Signal::try_from(came.number) {
        Ok(Signal::SIGCHLD) => {}
        Ok(Signal::SIGTSTP) => {
            sys::kill(everyone, libc::SIGTSTP);
            // In a session without job control the default action of SIGTSTP does nothing.
            if !handles(root, Signal::SIGTSTP) {
                sys::kill(everyone, libc::SIGSTOP);
            }
            sys::suffer(Signal::SIGTSTP);
        }
        Ok(Signal::SIGCONT) => {
            if let Some(terminal) = terminal {
                terminal.give(root);
            }
            sys::kill(everyone, libc::SIGCONT);
        }
        _ if came.code == SI_KERNEL => sys::kill(everyone, came.number),
        _ if came.code == SI_QUEUE => sys::queue(root, came.number, came.value),
        _ => sys::kill(root.0, came.number),
    }
}

/// Has a job look at the size of its terminal and draw itself anew, as after a change of the window (SIGWINCH, which is
/// ignored by default).
pub fn tell_of_window(root: Pid) {
    sys::kill(group_of(root).map_or(root.0, |group| -group), libc::SIGWINCH);
}

/// The process group of a process, if it is not ours.
fn group_of(root: Pid) -> Option<i32> {
    let group = getpgid(Some(nix::unistd::Pid::from_raw(root.0))).ok()?;
    (group != getpgrp()).then_some(group.as_raw())
}

/// Whether a process catches or ignores a signal.
fn handles(pid: Pid, signal: Signal) -> bool {
    let status = ckpt_core::procfs::ProcDir::open(pid).and_then(|proc| proc.status());
    let mask = |name| status.as_ref().ok().and_then(|status| status.mask(name)).unwrap_or(0);
    (mask("SigCgt") | mask("SigIgn")) & (1 << (signal as u64 - 1)) != 0
}

/// Our controlling terminal.
pub struct Terminal {
    device: File,
    /// The group that we made the foreground one.
    given: Cell<Option<i32>>,
    /// As they were, to be put back should the restore fail.
    settings: Cell<Option<Termios>>,
}

impl Terminal {
    /// None without a controlling terminal.
    pub fn open() -> Option<Terminal> {
        let device = File::options().read(true).write(true).open("/dev/tty").ok()?;
        let settings = Cell::new(tcgetattr(&device).ok());
        Some(Terminal { device, given: Cell::new(None), settings })
    }

    /// Makes a process's group the foreground one, if we are that now. One in the background stays there.
    pub fn give(&self, root: Pid) {
        if let Some(group) = group_of(root)
            && tcgetpgrp(&self.device) == Ok(getpgrp())
        {
            self.given.set(Some(group));
            self.set(group);
        }
    }

    /// Makes us the foreground group again, if it is still the one we gave it to, or nobody is left in it.
    pub fn take_back(&self) {
        let Ok(now) = tcgetpgrp(&self.device) else { return };
        let empty = nix::sys::signal::killpg(now, None) == Err(Errno::ESRCH);
        if self.given.get().is_some_and(|given| given == now.as_raw() || empty) {
            self.set(getpgrp().as_raw());
        }
    }

    /// The tree goes on, and its settings with it.
    pub fn keep_settings(&self) {
        self.settings.take();
    }

    fn set(&self, group: i32) {
        if let Err(error) = unstopped(|| tcsetpgrp(&self.device, nix::unistd::Pid::from_raw(group))) {
            tracing::warn!("the terminal cannot be given to group {group}: {error}");
        }
    }
}

/// Does something to the terminal that would stop us in the background (SIGTTOU).
fn unstopped<T>(action: impl FnOnce() -> T) -> T {
    let ttou = SigSet::from(Signal::SIGTTOU);
    let blocked = ttou.thread_block();
    let done = action();
    if blocked.is_ok() {
        let _ = ttou.thread_unblock();
    }
    done
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(settings) = self.settings.take() {
            self.take_back();
            let _ = unstopped(|| tcsetattr(&self.device, SetArg::TCSANOW, &settings));
        }
    }
}
