//! The freeze: every thread of every process of the tree in a ptrace stop (`PTRACE_SEIZE`, `PTRACE_INTERRUPT`).

use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, Instant};

use ckpt_agent::process::Process;
use ckpt_core::backend::{DumpOptions, FrozenProcess};
use ckpt_core::error::{DumpError, Refusal};
use ckpt_core::image::{Task, Zombie};
use ckpt_core::procfs::{ProcDir, Stat};
use ckpt_core::resource::attributes;
use ckpt_core::{Pid, TargetError};

use nix::errno::Errno;

use crate::probe::DUMP_NEEDS;
use crate::sys::{self, Stop};
use crate::timeouts::{Clocks, Sleeper};
use crate::tracee::{TraceError, Tracee, wait};

/// A stopped process.
pub struct StoppedProcess {
    pub frozen: FrozenProcess,
    pub process: Process,
    pub tracees: Vec<Tracee>,
}

/// A stopped tree. Dropped, it goes on.
#[derive(Default)]
pub struct StoppedTree {
    pub processes: Vec<StoppedProcess>,
    pub zombies: Vec<Zombie>,
}

impl Drop for StoppedTree {
    fn drop(&mut self) {
        for process in &mut self.processes {
            for tracee in &mut process.tracees {
                // A thread that ended meanwhile has nothing to put back.
                let _ = tracee.put_back(&process.process);
            }
        }
        for process in &self.processes {
            for tracee in &process.tracees {
                let _ = sys::detach(tracee.tid, 0);
            }
        }
    }
}

/// `PF_KTHREAD` of the kernel.
const PF_KTHREAD: u64 = 0x0020_0000;

/// Refuses what is never dumped, before anything is touched.
pub fn validate(root: Pid) -> Result<(), DumpError> {
    let refuse =
        |why: &str, help: &str| Err(DumpError::NotDumpable { pid: root, why: why.to_string(), help: help.to_string() });
    if root.0 < 1 {
        return Err(DumpError::NoSuchProcess(root));
    }
    let proc = ProcDir::open(root).map_err(|error| gone(root, error))?;
    let stat = proc.stat_line().map_err(|error| gone(root, error))?;
    if root.0 == 1 {
        return refuse("it is the init process", "dump the process that you mean, by its own pid");
    }
    if stat.flags & PF_KTHREAD != 0 {
        return refuse("it is a kernel thread", "only programs can be dumped");
    }
    if stat.state == 'Z' {
        return refuse("it is a zombie: it has ended already", "its parent has to wait for it");
    }
    let status = proc.status().map_err(|error| gone(root, error))?;
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
    refuse_traced(root, &proc)
}

fn refuse_traced(pid: Pid, proc: &ProcDir) -> Result<(), DumpError> {
    let status = proc.status().map_err(|error| gone(pid, error))?;
    match status.field("TracerPid").and_then(|tracer| tracer.parse::<i32>().ok()) {
        None | Some(0) => Ok(()),
        Some(tracer) => {
            let name = std::fs::read_to_string(format!("/proc/{tracer}/comm")).unwrap_or_default();
            Err(DumpError::NotDumpable {
                pid,
                why: format!("it is being traced by process {tracer} ({})", name.trim_end()),
                help: "end the debugger, or have it detach".to_string(),
            })
        }
    }
}

fn gone(pid: Pid, error: io::Error) -> DumpError {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) => DumpError::NoSuchProcess(pid),
        _ => DumpError::Io { what: format!("/proc/{pid}"), source: error },
    }
}

/// Stops the whole tree under `root`.
pub fn freeze(root: Pid, options: &DumpOptions) -> Result<StoppedTree, DumpError> {
    validate(root)?;
    let deadline = Instant::now() + options.timeout;
    let mut tree = StoppedTree::default();
    let (mut begun, mut clocks) = (Begun::new(), Clocks::default());
    let result = freeze_all(root, options, deadline, &mut tree, &mut begun, &mut clocks);
    if result.is_err() {
        detach_all(&begun.into_keys().collect::<Vec<_>>());
    }
    result.map(|()| tree)
}

/// Threads that were told to stop, and whether each was asleep then.
type Begun = BTreeMap<Pid, Option<Sleeper>>;

/// Tells a seized thread to stop.
fn interrupt(tid: Pid, clocks: &mut Clocks) -> (io::Result<()>, Option<Sleeper>) {
    let mut sleeper = Sleeper::look(tid, clocks);
    if let Some(sleeper) = &mut sleeper {
        sleeper.about_to_be_interrupted();
    }
    (sys::interrupt(tid), sleeper)
}

/// `begun` are main threads that were told to stop and are in no process of the tree yet: children come to their stop while
/// we look after their brothers.
fn freeze_all(
    root: Pid,
    options: &DumpOptions,
    deadline: Instant,
    tree: &mut StoppedTree,
    begun: &mut Begun,
    clocks: &mut Clocks,
) -> Result<(), DumpError> {
    let mut next = vec![root];
    // Parents are stopped before their children are looked for, so that no child can appear behind us.
    while let Some(pid) = next.pop() {
        let process = match Process::open(pid) {
            Ok(process) => process,
            // A child that ended, and that its parent or init has waited for already.
            Err(_) if pid != root => {
                if begun.remove(&pid).is_some() {
                    let _ = sys::wait(pid, false);
                }
                continue;
            }
            Err(error) => return Err(gone(pid, error)),
        };
        let stat = process.proc.stat_line().map_err(|error| gone(pid, error))?;
        if stat.state == 'Z' && stat.num_threads <= 1 {
            tree.zombies.push(Zombie { task: task(pid, &stat), status: stat.exit_code });
            continue;
        }
        // In the tree before its threads are stopped, so that a failure lets go of those that are.
        let frozen = FrozenProcess { task: task(pid, &stat), stopped: false };
        tree.processes.push(StoppedProcess { frozen, process, tracees: Vec::new() });
        let stopped = tree.processes.last_mut().expect("just pushed");
        let outcome = stop_threads(stopped, begun, clocks, deadline, options.timeout);
        let stat = stopped.process.proc.stat_line();
        let ended = match &stat {
            Ok(stat) => stat.state == 'Z' && stat.num_threads <= 1,
            Err(error) => matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)),
        };
        if ended {
            // It did so before its stop.
            tree.processes.pop();
            match stat {
                _ if pid == root => return Err(DumpError::Changed { pid, what: "ended".to_string() }),
                Ok(stat) => tree.zombies.push(Zombie { task: task(pid, &stat), status: stat.exit_code }),
                // Nobody wants to know its status.
                Err(_) => {}
            }
            continue;
        }
        outcome?;
        refuse_filtered(stopped)?;
        let stat = stat.map_err(|error| gone(pid, error))?;
        stopped.frozen.task = task(pid, &stat);
        let mut children = stopped.process.proc.children().map_err(|error| gone(pid, error))?;
        children.reverse();
        for &child in &children {
            // What is wrong with it is found, and said, when its turn comes.
            if sys::seize(child).is_ok() {
                let (_, sleeper) = interrupt(child, clocks);
                begun.insert(child, sleeper);
            }
        }
        next.extend(children);
    }
    Ok(())
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

/// Seizes and stops all threads of a process, until no new one appears.
fn stop_threads(
    stopped: &mut StoppedProcess,
    begun: &mut Begun,
    clocks: &mut Clocks,
    deadline: Instant,
    timeout: Duration,
) -> Result<(), DumpError> {
    let pid = stopped.frozen.task.pid;
    loop {
        let tids = stopped.process.proc.numbers("task").map_err(|error| gone(pid, error))?;
        let mut seized = Vec::new();
        let mut sleepers = Vec::new();
        for tid in tids.into_iter().map(Pid) {
            if stopped.tracees.iter().any(|tracee| tracee.tid == tid) {
                continue;
            }
            if let Some(sleeper) = begun.remove(&tid) {
                seized.push(tid);
                sleepers.push(sleeper);
                continue;
            }
            match sys::seize(tid) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => continue,
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                    detach_all(&seized);
                    if is_dead(stopped, tid) {
                        return Err(unsupported_leader(pid));
                    }
                    refuse_traced(pid, &stopped.process.proc)?;
                    return Err(DumpError::NotPermitted { pid, needs: DUMP_NEEDS.to_string() });
                }
                Err(source) => {
                    detach_all(&seized);
                    return Err(DumpError::Io { what: format!("PTRACE_SEIZE of process {pid}, thread {tid}"), source });
                }
            }
            seized.push(tid);
            let (told, sleeper) = interrupt(tid, clocks);
            sleepers.push(sleeper);
            if let Err(error) = told
                && error.raw_os_error() != Some(libc::ESRCH)
            {
                detach_all(&seized);
                return Err(DumpError::Io { what: format!("PTRACE_INTERRUPT of thread {tid}"), source: error });
            }
        }
        if seized.is_empty() {
            break;
        }
        for (index, (&tid, sleeper)) in seized.iter().zip(&sleepers).enumerate() {
            match settle(stopped, tid, deadline, timeout) {
                Ok(()) => {
                    if let (Some(sleeper), Some(tracee)) = (sleeper, stopped.tracees.last_mut())
                        && tracee.tid == tid
                    {
                        tracee.note_timeout(&stopped.process, sleeper, clocks);
                    }
                }
                Err(error) => {
                    detach_all(&seized[index..]);
                    return Err(error);
                }
            }
        }
    }
    if stopped.tracees.is_empty() {
        return Err(DumpError::Changed { pid, what: "ended".to_string() });
    }
    // The main thread first, whatever the order in /proc.
    stopped.tracees.sort_by_key(|tracee| (tracee.tid != pid, tracee.tid));
    if stopped.tracees[0].tid != pid {
        return Err(unsupported_leader(pid));
    }
    Ok(())
}

/// A thread with a seccomp filter may be killed for a call that is made in its name, so it is refused before the first.
fn refuse_filtered(stopped: &StoppedProcess) -> Result<(), DumpError> {
    let pid = stopped.frozen.task.pid;
    for tracee in &stopped.tracees {
        // Of the others the cheaper question is enough: a strict mode without filters comes from the main thread.
        if tracee.tid != pid && sys::has_no_filter(tracee.tid) {
            continue;
        }
        let status = stopped.process.proc.thread_status(tracee.tid).map_err(|error| gone(pid, error))?;
        if let Some(refusal) = attributes::refuse_seccomp(pid, tracee.tid, &status) {
            return Err(DumpError::Unsupported(vec![refusal]));
        }
    }
    Ok(())
}

fn unsupported_leader(pid: Pid) -> DumpError {
    DumpError::Unsupported(vec![Refusal {
        resource: "tasks",
        pid: Some(pid),
        subject: String::new(),
        why: "its main thread has exited while others go on, which is not supported".to_string(),
        help: "have the program keep its main thread".to_string(),
    }])
}

fn is_dead(stopped: &StoppedProcess, tid: Pid) -> bool {
    let stat = stopped.process.proc.thread(tid).and_then(|thread| thread.stat_line());
    stat.is_ok_and(|stat| matches!(stat.state, 'Z' | 'X'))
}

fn detach_all(tids: &[Pid]) {
    for &tid in tids {
        // Not stopped yet, it cannot be detached: it has to come to its stop first. Where it does not come, the kernel lets
        // go of it when we exit.
        let _ = wait(tid, Duration::from_millis(200));
        let _ = sys::detach(tid, 0);
    }
}

/// How long a thread may take to get a signal that is pending for it. Usually it is there at once.
const DELIVERY: Duration = Duration::from_millis(2);

/// Waits until a seized thread is in its stop with no signal about to be delivered, and takes it over.
fn settle(stopped: &mut StoppedProcess, tid: Pid, deadline: Instant, timeout: Duration) -> Result<(), DumpError> {
    let pid = stopped.frozen.task.pid;
    let mut delivering = false;
    loop {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let stop = wait(tid, if delivering { left.min(DELIVERY) } else { left });
        if std::mem::take(&mut delivering) && matches!(stop, Ok(Stop::Signal(_)) | Err(TraceError::TimedOut(_))) {
            // The signal is here, or another thread has got it: from now on the thread shall stop.
            sys::interrupt(tid).map_err(|source| changed(pid, source))?;
            if stop.is_err() {
                continue;
            }
        }
        match stop {
            Ok(Stop::Interrupted) => {}
            Ok(Stop::Group(_)) => stopped.frozen.stopped = true,
            Ok(Stop::Signal(signal)) => {
                // It was on its way: the handler's frame is set up, and the stop comes right after.
                sys::resume(tid, signal).map_err(|source| changed(pid, source))?;
                continue;
            }
            Ok(Stop::Call) => {
                sys::resume(tid, 0).map_err(|source| changed(pid, source))?;
                continue;
            }
            Ok(Stop::Ended(_)) | Err(TraceError::Ended(_)) => return Ok(()),
            Err(TraceError::TimedOut(_)) => {
                let state = stopped.process.proc.thread(tid).and_then(|thread| thread.stat_line());
                let state = state.map_or('?', |stat| stat.state);
                return Err(DumpError::FreezeTimedOut { pid, seconds: timeout.as_secs(), state });
            }
            Err(error) => return Err(dump_error(pid, error)),
        }
        // A signal that is pending and not blocked belongs to the call that is being interrupted: it is delivered first.
        let thread_pending = sys::pending(tid, false).map_err(|source| changed(pid, source))?;
        let shared_pending = sys::pending(tid, true).map_err(|source| changed(pid, source))?;
        let deliverable = !(thread_pending.is_empty() && shared_pending.is_empty()) && {
            let status = stopped.process.proc.thread(tid).and_then(|thread| thread.status());
            let blocked = status.ok().and_then(|status| status.mask("SigBlk")).unwrap_or(u64::MAX);
            let signal = |info: &ckpt_core::SigInfo| i32::from_ne_bytes(info[..4].try_into().unwrap());
            thread_pending.iter().chain(&shared_pending).any(|info| blocked >> (signal(info) - 1) & 1 == 0)
        };
        if deliverable && !stopped.frozen.stopped {
            // Not interrupted before it is delivered: the kernel looks for that first, and would stop again and again.
            sys::resume(tid, 0).map_err(|source| changed(pid, source))?;
            delivering = true;
            continue;
        }
        let tracee = Tracee::new(tid, &stopped.process).map_err(|error| dump_error(pid, error))?;
        stopped.tracees.push(tracee);
        return Ok(());
    }
}

fn changed(pid: Pid, source: io::Error) -> DumpError {
    match source.raw_os_error() {
        Some(libc::ESRCH) => DumpError::Changed { pid, what: "ended".to_string() },
        _ => DumpError::Io { what: format!("ptrace of process {pid}"), source },
    }
}

/// A failure with a tracee, in the words of a dump.
pub fn dump_error(pid: Pid, error: TraceError) -> DumpError {
    let refuse = |why: String, help: &str| {
        DumpError::Unsupported(vec![Refusal {
            resource: "registers",
            pid: Some(pid),
            subject: String::new(),
            why,
            help: help.to_string(),
        }])
    };
    match error {
        TraceError::Io(source) if source.kind() == io::ErrorKind::Unsupported => {
            refuse(source.to_string(), "it cannot be dumped by this backend")
        }
        TraceError::Io(source) => changed(pid, source),
        TraceError::Target(source) => DumpError::Target { resource: "registers", pid, source },
        TraceError::Ended(_) => DumpError::Changed { pid, what: "ended".to_string() },
        TraceError::TimedOut(tid) => {
            DumpError::Target { resource: "registers", pid, source: TargetError::TimedOut { pid: tid, seconds: 10 } }
        }
        TraceError::NoRoom { bytes, errno } => DumpError::Unsupported(vec![no_room(pid, bytes, errno)]),
        other @ (TraceError::NoStack(_) | TraceError::UnknownRestart(_)) => {
            refuse(other.to_string(), "try again a moment later")
        }
    }
}

/// Why a process cannot take us in, and what would help.
fn no_room(pid: Pid, bytes: usize, errno: Errno) -> Refusal {
    let limits = ProcDir::open(pid).and_then(|proc| proc.text("limits")).unwrap_or_default();
    let limit = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_ascii_whitespace().next()?.parse::<u64>().ok()
    };
    let (why, help) = match (errno, limit("Max address space"), limit("Max locked memory")) {
        (Errno::ENOMEM, Some(limit), _) => (
            format!("its address space is as large as it may be (RLIMIT_AS, {limit} bytes)"),
            format!("raise the limit for the dump: prlimit --pid {pid} --as={}", limit + (bytes as u64).max(1 << 20)),
        ),
        (Errno::EAGAIN, _, Some(limit)) => (
            format!("all that it maps is locked, and it may lock no more (RLIMIT_MEMLOCK, {limit} bytes)"),
            format!(
                "raise the limit for the dump: prlimit --pid {pid} --memlock={}",
                limit + (bytes as u64).max(1 << 20)
            ),
        ),
        _ => (
            format!("the kernel gives it no more memory ({errno})"),
            "it may have as many mappings as it may (sysctl vm.max_map_count), or all memory is committed".to_string(),
        ),
    };
    let why = format!("{why}, and ckpt needs {bytes} bytes in it for a moment");
    Refusal { resource: "memory", pid: Some(pid), subject: String::new(), why, help }
}
