//! The freeze: every thread of the tree takes the shim's signal, and goes into the agent from its handler.
//!
//! Nothing of it needs a privilege: the signal is one that a user may send to processes of his own, and the thread that
//! takes it connects to us.

use std::io::{self, IoSliceMut};
use std::mem::offset_of;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ckpt_agent::process::Process;
use ckpt_agent::{Channel, LaneKind, Region, Wait};
use ckpt_core::backend::{DumpOptions, FrozenProcess};
use ckpt_core::error::{DumpError, Refusal};
use ckpt_core::image::{Task, Zombie};
use ckpt_core::procfs::{ProcDir, Stat, Status};
use ckpt_core::{Pid, RemoteFd, TargetError};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind, listen, recvmsg,
    sendmsg, socket,
};

use crate::protocol::{
    Arrival, Hello, MAGIC, Ready, SECOND_SIGNAL, SIGNAL, UNKNOWN_CALL, Welcome, XSAVE_AT, nonce_of_process,
    signal_value, socket_name,
};
use crate::second::{SecondSignal, blocked, lets_in, needs};
use crate::sleeping::{Call, Known, Place, call_until};
use crate::sys;

/// A process whose threads are all in the agent.
pub struct StoppedProcess {
    pub frozen: FrozenProcess,
    pub process: Process,
    /// The main thread first.
    pub threads: Vec<StoppedThread>,
    /// The main thread's lane.
    pub channel: Channel,
    pub base: u64,
    pub size: usize,
    /// `__rseq_offset` of its C library.
    pub rseq_offset: Option<i64>,
    /// Where the header of its virtual ids is, and their generation.
    pub ids: (u64, u64),
}

pub struct StoppedThread {
    pub tid: Pid,
    /// Its lane; the main thread is in another.
    pub lane: Channel,
    pub arrival: Arrival,
    pub xsave: Vec<u8>,
}

/// The start command, for messages.
pub const START: &str = "start the program with: ckpt run --backend preload -- CMD";

/// Whether a process has the shim, as far as can be seen without asking it: whether it handles the signal, which no
/// program can do by itself (but one that cancels threads).
pub fn handles_signal(status: &Status) -> bool {
    status.mask("SigCgt").is_some_and(|caught| caught >> (SIGNAL - 1) & 1 == 1)
}

/// Refuses what cannot be dumped in this way, before anything is touched.
pub fn validate(root: Pid) -> Result<(), DumpError> {
    let refuse =
        |why: &str, help: &str| Err(DumpError::NotDumpable { pid: root, why: why.to_string(), help: help.to_string() });
    if root.0 < 1 {
        return Err(DumpError::NoSuchProcess(root));
    }
    let proc = ProcDir::open(root).map_err(|error| gone(root, error))?;
    let stat = proc.stat_line().map_err(|error| gone(root, error))?;
    let status = proc.status().map_err(|error| gone(root, error))?;
    if root.0 == 1 {
        return refuse("it is the init process", "dump the process that you mean, by its own pid");
    }
    if stat.state == 'Z' {
        return refuse("it is a zombie: it has ended already", "its parent has to wait for it");
    }
    if status.field("Tgid").and_then(|tgid| tgid.parse().ok()) != Some(root.0) {
        return refuse("it is a thread", &format!("dump its process, {}", status.field("Tgid").unwrap_or("?")));
    }
    let mut ancestor = Pid(std::process::id() as i32);
    while ancestor.0 > 0 {
        if ancestor == root {
            return refuse(
                "it is ckpt itself or one of the processes that ckpt runs under",
                "run ckpt from outside of the tree that is to be dumped",
            );
        }
        ancestor = match ProcDir::open(ancestor).and_then(|proc| proc.stat_line()) {
            Ok(stat) => stat.ppid,
            Err(_) => break,
        };
    }
    if !handles_signal(&status) {
        return refuse("it was not started with the shim, so nothing in it listens to ckpt", START);
    }
    Ok(())
}

pub fn gone(pid: Pid, error: io::Error) -> DumpError {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) => DumpError::NoSuchProcess(pid),
        _ => DumpError::Io { what: format!("/proc/{pid}"), source: error },
    }
}

/// How often it is tried to stop a thread in a place where it is told only beforehand which call it makes.
const TRIES: usize = 8;

/// Stops the whole tree under `root`. What is dropped of it goes on.
pub fn freeze(root: Pid, options: &DumpOptions) -> Result<(Vec<StoppedProcess>, Vec<Zombie>), DumpError> {
    validate(root)?;
    let mut known = Known::default();
    for _ in 1..TRIES {
        match try_freeze(root, options, &mut known) {
            Err(Failed::UnknownCall { pid, tid, instruction }) => known.watch(pid, tid, instruction),
            Err(Failed::Dump(error)) => return Err(error),
            Ok(frozen) => return Ok(frozen),
        }
    }
    try_freeze(root, options, &mut known).map_err(|failed| match failed {
        Failed::Dump(error) => error,
        Failed::UnknownCall { pid, tid, .. } => {
            let why = format!("thread {tid} was in a system call that its code does not tell, each of {TRIES} times");
            refusal(pid, "registers", &why, "use --backend ptrace")
        }
    })
}

/// Why a tree could not be stopped.
enum Failed {
    Dump(DumpError),
    /// A call was interrupted, and it is not known which: the instruction after it.
    UnknownCall {
        pid: Pid,
        tid: Pid,
        instruction: u64,
    },
}

impl From<DumpError> for Failed {
    fn from(error: DumpError) -> Failed {
        Failed::Dump(error)
    }
}

fn try_freeze(
    root: Pid,
    options: &DumpOptions,
    known: &mut Known,
) -> Result<(Vec<StoppedProcess>, Vec<Zombie>), Failed> {
    let mut meeting = Meeting::new(options.timeout)
        .map_err(|source| DumpError::Io { what: "a socket for the shim to connect to".into(), source })?;
    let (mut processes, mut zombies) = (Vec::new(), Vec::new());
    let mut next = vec![root];
    // Parents are stopped before their children are looked for, so that no child can appear behind us.
    while let Some(pid) = next.pop() {
        let process = match Process::open(pid) {
            Ok(process) => process,
            // A child that ended, and that its parent or init has waited for already.
            Err(_) if pid != root => continue,
            Err(error) => return Err(gone(pid, error).into()),
        };
        let stopped = match meeting.stop(process, known) {
            // The same, while it was looked at.
            Err(Failed::Dump(DumpError::NoSuchProcess(gone))) if gone == pid && pid != root => continue,
            other => other?,
        };
        match stopped {
            Stopped::Process(stopped) => {
                let mut children = stopped.process.proc.children().map_err(|error| gone(pid, error))?;
                children.reverse();
                next.extend(children);
                processes.push(*stopped);
            }
            Stopped::Zombie(_) if pid == root => {
                return Err(DumpError::Changed { pid, what: "ended".to_string() }.into());
            }
            Stopped::Zombie(zombie) => zombies.push(zombie),
        }
    }
    Ok((processes, zombies))
}

fn task(pid: Pid, stat: &Stat) -> Task {
    Task {
        pid,
        ppid: stat.ppid,
        pgid: stat.pgrp,
        sid: stat.session,
        exit_signal: stat.exit_signal,
        comm: stat.comm.clone(),
    }
}

enum Stopped {
    Process(Box<StoppedProcess>),
    Zombie(Zombie),
}

/// Where the threads of one freeze come to.
struct Meeting {
    begun: Instant,
    nonce: u32,
    listener: OwnedFd,
    deadline: Instant,
    timeout: Duration,
}

/// How long a freeze looks at threads that run, to see what they sleep in the next time. Most work for longer, or sleep.
const LOOK: Duration = Duration::from_millis(1);

/// Threads that may appear while a process is being stopped.
const NEW_THREADS: usize = 16;

/// A process that let us in.
struct Entered {
    channel: Channel,
    base: u64,
    rseq_offset: Option<i64>,
    ids: (u64, u64),
    second: SecondSignal,
}

/// A thread that was asked to come.
struct Asked {
    tid: Pid,
    /// By the second signal.
    by_second: bool,
    /// What it was doing, as `/proc/PID/task/TID/syscall` says, where that may be read.
    call: Option<Call>,
}

fn listen_at(nonce: u32) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    bind(listener.as_raw_fd(), &UnixAddr::new_abstract(&socket_name(nonce)[1..])?)?;
    listen(&listener, Backlog::new(64)?)?;
    Ok(listener)
}

impl Meeting {
    fn new(timeout: Duration) -> io::Result<Meeting> {
        let nonce = sys::random()?;
        let begun = Instant::now();
        Ok(Meeting { begun, nonce, listener: listen_at(nonce)?, deadline: begun + timeout, timeout })
    }

    /// Stops all threads of a process, until no new one appears.
    fn stop(&mut self, process: Process, known: &mut Known) -> Result<Stopped, Failed> {
        let pid = process.proc.pid();
        let stat = self.wait_for_shim(&process)?;
        if stat.state == 'X' {
            return Err(DumpError::NoSuchProcess(pid).into());
        }
        if stat.state == 'Z' && stat.num_threads <= 1 {
            return Ok(Stopped::Zombie(Zombie { task: task(pid, &stat), status: stat.exit_code }));
        }
        if stat.state == 'Z' {
            return Err(
                refusal(pid, "tasks", "its main thread has exited while others go on", "have it keep that").into()
            );
        }
        let first = tids(&process)?;
        let lanes = first.len() + NEW_THREADS;
        let kinds = std::iter::once(LaneKind::Main).chain(std::iter::repeat_n(LaneKind::Thread, lanes));
        let kinds = kinds.chain([LaneKind::Copy]);
        let region = Region::create(Region::size_for(kinds))
            .map_err(|source| DumpError::Io { what: "the region of the agent".into(), source })?;
        let region = Arc::new(region);
        let mut asked = Vec::new();
        let full = match self.ask(&process, pid, &mut asked, None) {
            Err(DumpError::Io { source, .. }) if source.raw_os_error() == Some(libc::EAGAIN) => true,
            other => other.map(|()| false)?,
        };
        let general = if full { Some(self.ask_without_words(&process, pid, first.len())?) } else { None };
        let entered = self.let_in(&process, &region);
        if let Some(general) = general {
            self.nonce_and_listener(general);
        }
        let Some(mut entered) = entered? else {
            return Ok(self.ended_or_silent(&process, pid)?);
        };
        for &tid in &first[1..] {
            self.ask(&process, tid, &mut asked, Some(&mut entered))?;
        }
        let base = entered.base;
        let lane = |index: usize| {
            let offset = Channel::FIRST + LaneKind::Main.size() + index * LaneKind::Thread.size();
            Channel::attach(region.clone(), LaneKind::Thread, offset, base, pid, Wait::Futex)
        };
        // From here on the loss of `channel` lets all threads go on.
        let mut threads = Vec::new();
        loop {
            while threads.len() < asked.len() {
                let index = threads.len();
                let thread = lane(index);
                let arrived = index == 0 || self.wait_for(&process, index, &mut asked[index], &thread, &mut entered)?;
                let Asked { tid, call, .. } = &asked[index];
                if let Some(call) = call {
                    known.note(*tid, call);
                }
                threads.push(arrived.then(|| come(*tid, thread, index == 0, &entered.channel, known)));
            }
            let now = tids(&process)?;
            let new: Vec<Pid> = now.into_iter().filter(|tid| !asked.iter().any(|asked| asked.tid == *tid)).collect();
            if new.is_empty() {
                break;
            }
            if asked.len() + new.len() > lanes {
                return Err(DumpError::Changed { pid, what: "went on making threads".to_string() }.into());
            }
            for tid in new {
                self.ask(&process, tid, &mut asked, Some(&mut entered))?;
            }
        }
        let by_second = threads.iter_mut().zip(&asked).filter(|(_, asked)| asked.by_second);
        let by_second =
            by_second.filter_map(|(thread, _)| thread.as_mut().map(|thread| (thread.tid, &mut thread.lane)));
        entered.second.put_back(&mut entered.channel, by_second).map_err(failed_in(pid))?;
        let mut threads: Vec<StoppedThread> = threads.into_iter().flatten().collect();
        threads.sort_by_key(|thread| (thread.tid != pid, thread.tid));
        if let Some(thread) = threads.iter().find(|thread| thread.arrival.interrupted == UNKNOWN_CALL) {
            return Err(Failed::UnknownCall {
                pid,
                tid: thread.tid,
                instruction: Place::of(&thread.arrival.context).instruction,
            });
        }
        let stat = process.proc.stat_line().map_err(|error| gone(pid, error))?;
        let Entered { channel, base, rseq_offset, ids, .. } = entered;
        Ok(Stopped::Process(Box::new(StoppedProcess {
            frozen: FrozenProcess { task: task(pid, &stat), stopped: false },
            threads,
            channel,
            base,
            size: region.size(),
            rseq_offset,
            ids,
            process,
        })))
    }

    /// Looks at a process until it can be asked, or has ended. A program that was just started has no handler yet, and in the
    /// middle of its start, as of its end, the kernel lets nobody look at it, as if it were not dumpable: it gets a little time.
    fn wait_for_shim(&self, process: &Process) -> Result<Stat, DumpError> {
        const LOADING: Duration = Duration::from_secs(1);
        let pid = process.proc.pid();
        let end = (Instant::now() + LOADING).min(self.deadline);
        loop {
            let stat = process.proc.stat_line().map_err(|error| gone(pid, error))?;
            if matches!(stat.state, 'Z' | 'X') {
                return Ok(stat);
            }
            match refuse_unreachable(pid, &process.proc, &stat) {
                Ok(()) => return Ok(stat),
                Err(refusal) if is_stopped(&stat) || Instant::now() >= end => return Err(refusal),
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// Queues the signal for a thread. One that has ended meanwhile is in the list all the same.
    fn ask(
        &self,
        process: &Process,
        tid: Pid,
        asked: &mut Vec<Asked>,
        entered: Option<&mut Entered>,
    ) -> Result<(), DumpError> {
        let pid = process.proc.pid();
        let index = u16::try_from(asked.len())
            .map_err(|_| refusal(pid, "tasks", "it has more than 65,535 threads", "have it end some"))?;
        let call = call_until(process, tid, self.begun + LOOK);
        // What waits for signals may take the first itself.
        let by_second = match entered {
            Some(entered) if call.as_ref().is_some_and(Call::waits_for_signals) && lets_in(process, tid) => {
                entered.second.take(&mut entered.channel).map_err(failed_in(pid))?
            }
            _ => false,
        };
        asked.push(Asked { tid, by_second, call });
        self.queue(pid, tid, if by_second { SECOND_SIGNAL } else { SIGNAL }, index)
    }

    fn queue(&self, pid: Pid, tid: Pid, signal: i32, index: u16) -> Result<(), DumpError> {
        match sys::queue_to_thread(pid, tid, signal, signal_value(index, self.nonce)) {
            Ok(()) => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                let needs = "it belongs to another user: run ckpt as that user".to_string();
                Err(DumpError::NotPermitted { pid, needs })
            }
            Err(source) => Err(DumpError::Io { what: format!("signalling thread {tid} of process {pid}"), source }),
        }
    }

    /// For a process whose queue of signals is full (`RLIMIT_SIGPENDING`): one that comes from kill(2) gets through, with
    /// nothing in it. It reaches some thread, so there must be one only. Gives what was listened on before.
    fn ask_without_words(&mut self, process: &Process, pid: Pid, threads: usize) -> Result<(u32, OwnedFd), DumpError> {
        if threads > 1 {
            let why = "its user has too many pending signals (RLIMIT_SIGPENDING), so that its threads cannot be asked";
            return Err(refusal(
                pid,
                "signals",
                why,
                "raise its limit: prlimit --sigpending, or have it take its signals",
            ));
        }
        let failed = |source| DumpError::Io { what: format!("signalling process {pid}"), source };
        let nonce = nonce_of_process(pid.0);
        let own = std::mem::replace(&mut self.listener, listen_at(nonce).map_err(failed)?);
        let before = (std::mem::replace(&mut self.nonce, nonce), own);
        sys::pidfd_send_signal(process.pidfd().as_fd(), SIGNAL).map_err(failed)?;
        Ok(before)
    }

    fn nonce_and_listener(&mut self, (nonce, listener): (u32, OwnedFd)) {
        self.nonce = nonce;
        self.listener = listener;
    }

    /// Waits for the main thread of a process to connect, and lays the region out with it. `None` if it does not come.
    fn let_in(&self, process: &Process, region: &Arc<Region>) -> Result<Option<Entered>, DumpError> {
        let pid = process.proc.pid();
        let end = self.deadline;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let millis = PollTimeout::try_from(left.as_millis().max(1)).unwrap_or(PollTimeout::MAX);
            let mut ready = [
                PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
                PollFd::new(process.pidfd().as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut ready, millis) {
                Ok(0) if Instant::now() >= end => return Ok(None),
                Ok(0) | Err(Errno::EINTR) => continue,
                Ok(_) => {}
                Err(errno) => return Err(DumpError::Io { what: "poll".into(), source: errno.into() }),
            }
            if ready[0].any() != Some(true) {
                // It has ended.
                return Ok(None);
            }
            let Ok(connected) = accept4(self.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) else { continue };
            let connected = sys::own(connected);
            match self.greet(&connected, pid, region) {
                Ok(Some(entered)) => {
                    let Greeted { hello, ready } = entered;
                    let wait = Wait::Socket { ours: connected, theirs: RemoteFd(ready.socket) };
                    let mut channel =
                        Channel::new(region.clone(), LaneKind::Main, Channel::FIRST, ready.base, pid, wait);
                    channel.set_healing(ready.frame, ready.frame);
                    let first = Channel::FIRST + LaneKind::Main.size();
                    let lanes = (region.size() - first - LaneKind::Copy.size()) / LaneKind::Thread.size();
                    for index in 0..lanes {
                        let offset = first + index * LaneKind::Thread.size();
                        Channel::new(region.clone(), LaneKind::Thread, offset, ready.base, pid, Wait::Futex).expect();
                    }
                    // All of them are told to leave, those in which nobody is as well: a thread may yet come.
                    channel.set_threads(ready.base + first as u64, lanes);
                    channel.wake().map_err(|source| DumpError::Target { resource: "tasks", pid, source })?;
                    return Ok(Some(Entered {
                        channel,
                        base: ready.base,
                        rseq_offset: (hello.has_rseq != 0).then_some(hello.rseq_offset),
                        ids: (hello.ids, hello.generation),
                        second: SecondSignal::at(hello.lent, pid),
                    }));
                }
                // A stranger, or one that went away.
                Ok(None) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The first words with whoever has connected.
    fn greet(&self, socket: &OwnedFd, pid: Pid, region: &Region) -> Result<Option<Greeted>, DumpError> {
        // Our own user or root, as the shim asks of us.
        let ours = nix::unistd::geteuid().as_raw();
        if sys::peer_uid(socket.as_fd()).map_or(true, |uid| uid != ours && ours != 0) {
            return Ok(None);
        }
        let Some(hello) = self.receive::<Hello>(socket) else { return Ok(None) };
        if hello.magic != MAGIC {
            let why = "it has the shim of another version of ckpt".to_string();
            let help = "use the ckpt that it was started with, or start it anew".to_string();
            return Err(DumpError::NotDumpable { pid, why, help });
        }
        if hello.pid != pid.0 || hello.index != 0 {
            return Ok(None);
        }
        let welcome = Welcome { size: region.size() as u64 };
        let memfd = [region.memfd().as_raw_fd()];
        let message = [io::IoSlice::new(sys::to_bytes(&welcome))];
        let rights = [ControlMessage::ScmRights(&memfd)];
        if sendmsg::<()>(socket.as_raw_fd(), &message, &rights, MsgFlags::MSG_NOSIGNAL, None).is_err() {
            return Ok(None);
        }
        Ok(self.receive::<Ready>(socket).map(|ready| Greeted { hello, ready }))
    }

    /// A message of the protocol, if it comes in time and is one.
    fn receive<T: Copy>(&self, socket: &OwnedFd) -> Option<T> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let millis = PollTimeout::try_from(left.as_millis().max(1)).unwrap_or(PollTimeout::MAX);
        let mut ready = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        while poll(&mut ready, millis) == Err(Errno::EINTR) {}
        if ready[0].any() != Some(true) {
            return None;
        }
        let mut bytes = vec![0; size_of::<T>()];
        let mut vector = [IoSliceMut::new(&mut bytes)];
        let got = recvmsg::<()>(socket.as_raw_fd(), &mut vector, None, MsgFlags::MSG_CMSG_CLOEXEC).ok()?.bytes;
        (got == bytes.len()).then(|| sys::from_bytes(&bytes))
    }

    /// Waits for the thread that was asked as `index` to be in its lane; false if it ended instead.
    fn wait_for(
        &self,
        process: &Process,
        index: usize,
        asked: &mut Asked,
        lane: &Channel,
        entered: &mut Entered,
    ) -> Result<bool, DumpError> {
        let pid = process.proc.pid();
        let tid = asked.tid;
        let mut looks = 0;
        loop {
            if lane.has_arrived() {
                return Ok(true);
            }
            looks += 1;
            if looks < 200 {
                std::thread::yield_now();
                continue;
            }
            if !asked.by_second
                && needs(process, tid)
                && entered.second.take(&mut entered.channel).map_err(failed_in(pid))?
            {
                self.queue(pid, tid, SECOND_SIGNAL, index as u16)?;
                asked.by_second = true;
            }
            let state = process.proc.thread_stat(tid).map(|stat| stat.state);
            match state {
                Ok('Z' | 'X') => return Ok(lane.has_arrived()),
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {
                    return Ok(lane.has_arrived());
                }
                _ => {}
            }
            if Instant::now() > self.deadline {
                return Err(self.silent(process, tid, state.unwrap_or('?')));
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Nobody came.
    fn ended_or_silent(&self, process: &Process, pid: Pid) -> Result<Stopped, DumpError> {
        let stat = match process.proc.stat_line() {
            Ok(stat) => stat,
            Err(_) => return Err(DumpError::Changed { pid, what: "ended".to_string() }),
        };
        if stat.state == 'Z' && stat.num_threads <= 1 {
            return Ok(Stopped::Zombie(Zombie { task: task(pid, &stat), status: stat.exit_code }));
        }
        Err(self.silent(process, pid, stat.state))
    }

    /// A thread that did not come in time: why, as far as can be seen.
    ///
    /// Not seen at once, as the shim itself holds the signal back while one program becomes another.
    fn silent(&self, process: &Process, tid: Pid, state: char) -> DumpError {
        let pid = process.proc.pid();
        let blocked = blocked(process, tid);
        if state != 'D' && blocked >> (SIGNAL - 1) & 1 == 1 {
            let why =
                format!("thread {tid} blocks every signal, those of the shim ({SIGNAL}, {SECOND_SIGNAL}) as well");
            return refusal(pid, "tasks", &why, "try again when it lets them in, or use --backend ptrace");
        }
        DumpError::FreezeTimedOut { pid, seconds: self.timeout.as_secs(), state }
    }
}

fn failed_in(pid: Pid) -> impl Fn(TargetError) -> DumpError {
    move |source| DumpError::Target { resource: "tasks", pid, source }
}

struct Greeted {
    hello: Hello,
    ready: Ready,
}

fn is_stopped(stat: &Stat) -> bool {
    matches!(stat.state, 'T' | 't')
}

/// What can be seen beforehand to have no answer.
fn refuse_unreachable(pid: Pid, proc: &ProcDir, stat: &Stat) -> Result<(), DumpError> {
    let status = proc.status().map_err(|error| gone(pid, error))?;
    if !handles_signal(&status) {
        let name = String::from_utf8_lossy(&stat.comm).into_owned();
        let why = format!(
            "it ({name}) runs without the shim: it is statically linked, has other privileges, or has just been started"
        );
        return Err(refusal(
            pid,
            "tasks",
            &why,
            "have the tree start dynamically linked programs only, or use --backend ptrace",
        ));
    }
    if is_stopped(stat) {
        return Err(refusal(
            pid,
            "tasks",
            "it is stopped, so that it cannot answer",
            &format!("continue it first: kill -CONT {pid}"),
        ));
    }
    // Without this right nothing of it can be looked at.
    if let Err(error) = proc.numbers("fd") {
        if error.raw_os_error() == Some(libc::EACCES) {
            return Err(refusal(
                pid,
                "tasks",
                "it is not dumpable (PR_SET_DUMPABLE), or belongs to another user",
                "run ckpt as its user, and have it stay dumpable",
            ));
        }
        return Err(gone(pid, error));
    }
    Ok(())
}

fn refusal(pid: Pid, resource: &'static str, why: &str, help: &str) -> DumpError {
    DumpError::Unsupported(vec![Refusal {
        resource,
        pid: Some(pid),
        subject: String::new(),
        why: why.to_string(),
        help: help.to_string(),
    }])
}

/// The threads of a process, the main one first.
fn tids(process: &Process) -> Result<Vec<Pid>, DumpError> {
    let pid = process.proc.pid();
    let mut tids: Vec<Pid> =
        process.proc.numbers("task").map_err(|error| gone(pid, error))?.into_iter().map(Pid).collect();
    if tids.is_empty() {
        return Err(DumpError::Changed { pid, what: "ended".to_string() });
    }
    tids.sort_by_key(|tid| (*tid != pid, *tid));
    Ok(tids)
}

/// A thread that is in its lane.
fn come(tid: Pid, lane: Channel, is_host: bool, main: &Channel, known: &Known) -> StoppedThread {
    let at = if is_host { main } else { &lane };
    let mut bytes = vec![0; size_of::<Arrival>()];
    at.read_arrival(0, &mut bytes);
    let mut arrival: Arrival = sys::from_bytes(&bytes);
    // The same call that it was seen to sleep in: the shim cannot see its number in every code, the kernel tells.
    let seen = known.number(tid, Place::of(&arrival.context));
    if let (UNKNOWN_CALL, Some(number)) = (arrival.interrupted, seen) {
        arrival.interrupted = number;
        at.write_arrival(offset_of!(Arrival, interrupted), &number.to_ne_bytes());
    }
    let mut xsave = vec![0; (arrival.xsave_size as usize).min(crate::protocol::MOST_XSAVE)];
    at.read_arrival(XSAVE_AT, &mut xsave);
    StoppedThread { tid, lane, arrival, xsave }
}
