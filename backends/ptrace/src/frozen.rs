//! A frozen tree: an agent in each process, and letting go.

use std::any::Any;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, LazyLock};

use ckpt_agent::process::Process;
use ckpt_agent::protocol::CODE_SIZE;
use ckpt_agent::{Channel, Copied, LaneKind, Region, Wait};
use ckpt_core::args;
use ckpt_core::backend::{DumpOptions, Frozen, FrozenProcess};
use ckpt_core::batch::{Arg, Batch, Replies, Sysno};
use ckpt_core::error::DumpError;
use ckpt_core::image::Zombie;
use ckpt_core::names::Names;
use ckpt_core::procfs::{Mapping, ProcDir};
use ckpt_core::{
    Context, Footprint, Kcmp, MemoryWriter, NotCopied, Pid, PrivatePages, Queue, RemoteFd, RemotePtr, SigInfo, Target,
    TargetError,
};
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::entrance::{self, Entrance, Search};
use crate::freeze::{self, StoppedProcess};
use crate::sys;
use crate::tracee::{Injection, TraceError, Tracee, resume_all};

/// A frozen process with an agent in it.
pub struct FrozenTarget {
    process: Process,
    tids: Vec<Pid>,
    tracees: Vec<Tracee>,
    entrance: Entrance,
    /// Index of the thread that the agent runs in.
    host: usize,
    channel: Channel,
    /// The lanes of other threads, in the order they were sent into them.
    lanes: Vec<(usize, Channel)>,
    /// Descriptors of ours that it has.
    borrowed: Vec<RemoteFd>,
    mappings: Vec<Mapping>,
    region: (u64, u64),
}

/// Freezes the tree under `root`, and gets into each process.
pub fn freeze(root: Pid, options: &DumpOptions) -> Result<Box<dyn Frozen>, DumpError> {
    sys::raise_descriptor_limit();
    // Until there is a tree of targets, what is stopped is let go of by this.
    let mut stopped = freeze::freeze(root, options)?;
    let mut entries = Vec::with_capacity(stopped.processes.len());
    let entered = enter_all(&mut stopped.processes, &mut entries);
    if entered.is_err() {
        for (process, entry) in stopped.processes.iter_mut().zip(&mut entries) {
            entry.give_up(process);
        }
    }
    entered.map_err(|(pid, error)| freeze::dump_error(pid, error))?;
    let mut tree =
        FrozenTree { processes: Vec::new(), zombies: std::mem::take(&mut stopped.zombies), targets: Vec::new() };
    for (process, entry) in std::mem::take(&mut stopped.processes).into_iter().zip(entries) {
        let StoppedProcess { frozen, process, tracees } = process;
        tree.processes.push(frozen);
        tree.targets.push(Box::new(FrozenTarget {
            process,
            tids: tracees.iter().map(|tracee| tracee.tid).collect(),
            tracees,
            entrance: entry.entrance,
            host: entry.host,
            channel: entry.channel.expect("every process was entered"),
            lanes: Vec::new(),
            borrowed: Vec::new(),
            mappings: entry.mappings,
            region: (entry.base, entry.size as u64),
        }));
    }
    Ok(Box::new(tree))
}

/// How far we are into one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Nothing was called in it.
    Outside,
    /// It is on its way into, or out of, the call that maps the region.
    Calling(Injection),
    /// It has called.
    Called,
    /// The agent runs.
    Inside,
}

/// A process that we get into.
struct Entry {
    entrance: Entrance,
    mappings: Vec<Mapping>,
    /// Index of the thread that the agent runs in.
    host: usize,
    base: u64,
    size: usize,
    /// The way back that takes the region along.
    frame: u64,
    channel: Option<Channel>,
    step: Step,
}

/// Maps the agent into each process and starts it on one of its threads: all of them take each step together, as each step
/// takes a wake-up of the process.
fn enter_all(processes: &mut [StoppedProcess], entries: &mut Vec<Entry>) -> Result<(), (Pid, TraceError)> {
    let mut search = Search::default();
    // A place of its own for each: those that share memory are refused later, and until then are not in each other's way.
    let mut lowest = 0x2000_0000_0000;
    for process in &mut *processes {
        let entry = Entry::prepare(process, &mut search, lowest).map_err(|error| (process.frozen.task.pid, error))?;
        lowest = entry.base + entry.size as u64;
        entries.push(entry);
    }
    for step in [Entry::call, Entry::continue_call, Entry::start_agent, Entry::connect] {
        for (process, entry) in processes.iter_mut().zip(&mut *entries) {
            step(entry, process).map_err(|error| (process.frozen.task.pid, error))?;
        }
    }
    Ok(())
}

impl Entry {
    /// Finds out how to get in, and lays out the way back.
    fn prepare(stopped: &mut StoppedProcess, search: &mut Search, lowest: u64) -> Result<Entry, TraceError> {
        let process = &stopped.process;
        let mappings = Mapping::parse_all(&process.proc.read("maps")?).unwrap_or_default();
        let entrance = search.entrance(process, &mappings)?;
        let others = stopped.tracees.len() - 1;
        let lanes = std::iter::once(LaneKind::Main).chain(std::iter::repeat_n(LaneKind::Thread, others));
        let lanes = lanes.chain([LaneKind::Copy]);
        let size = Region::size_for(lanes);
        if mappings.len() + 3 > most_mappings() {
            // The call that maps the region would succeed, and the agent could not split it.
            return Err(TraceError::NoRoom { bytes: size, errno: nix::errno::Errno::ENOMEM });
        }
        let base = free_range(&mappings, size as u64, lowest);
        let mut found = Err(TraceError::NoStack(stopped.frozen.task.pid));
        for (index, tracee) in stopped.tracees.iter_mut().enumerate() {
            match tracee.establish(process, &entrance, &mappings) {
                // Another thread may have the room.
                Err(TraceError::NoStack(_)) => {}
                Err(error) => {
                    found = Err(error);
                    break;
                }
                Ok(()) => {
                    // One call, whose result is known before: the way back undoes it at each instant.
                    let unmap = (libc::SYS_munmap, [base, size as u64]);
                    found = tracee.undo_with(process, &entrance, &[unmap]).map(|frame| (index, frame));
                    break;
                }
            }
        }
        if found.is_err() {
            entrance::remove_stub(process, &entrance);
        }
        let (host, frame) = found?;
        Ok(Entry { entrance, mappings, host, base, size, frame, channel: None, step: Step::Outside })
    }

    fn call(&mut self, stopped: &mut StoppedProcess) -> Result<(), TraceError> {
        let protection = (libc::PROT_READ | libc::PROT_EXEC) as u64;
        let flags = (libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
        let args = [self.base, self.size as u64, protection, flags, u64::MAX, 0];
        let begun = stopped.tracees[self.host].begin_call(&self.entrance, libc::SYS_mmap, args)?;
        self.step = Step::Calling(begun);
        Ok(())
    }

    fn continue_call(&mut self, stopped: &mut StoppedProcess) -> Result<(), TraceError> {
        if let Step::Calling(begun) = self.step {
            self.step = Step::Calling(stopped.tracees[self.host].continue_call(begun)?);
        }
        Ok(())
    }

    fn start_agent(&mut self, stopped: &mut StoppedProcess) -> Result<(), TraceError> {
        let StoppedProcess { process, tracees, .. } = stopped;
        let tracee = &mut tracees[self.host];
        let Step::Calling(begun) = self.step else { return Ok(()) };
        let mapped = tracee.end_call(begun)?;
        self.step = Step::Called;
        ckpt_core::batch::decode(mapped).map_err(|errno| TraceError::NoRoom { bytes: self.size, errno })?;
        let (base, size) = (self.base, self.size);
        let name = format!("map_files/{base:x}-{:x}", base + size as u64);
        let memory = process.proc.open_with(name, OFlag::O_RDWR)?;
        let region = Arc::new(Region::adopt(memory.into(), size)?);
        let pid = process.proc.pid();
        let mut channel = Channel::new(region, LaneKind::Main, Channel::FIRST, base, pid, Wait::Booting);
        channel.set_healing(self.frame, tracee.plain_frame());
        if process.proc.link("ns/pid").ok() == own_pid_namespace() {
            channel.set_driver(std::process::id() as i32);
        }
        // The code stays as it is; what the agent writes to becomes writable when it comes there.
        tracee.enter_agent(&channel, Some(base + CODE_SIZE as u64..base + size as u64))?;
        self.channel = Some(channel);
        self.step = Step::Inside;
        Ok(())
    }

    fn connect(&mut self, stopped: &mut StoppedProcess) -> Result<(), TraceError> {
        let StoppedProcess { process, tracees, .. } = stopped;
        let (tracee, pid) = (&tracees[self.host], process.proc.pid());
        let channel = self.channel.as_mut().expect("the agent was started");
        Ok(channel.connect(&mut || keep_running(tracee, pid), |fd| process.fd(fd))?)
    }

    /// Takes back what was done, after an error here or in another process: in a stop where nothing is left of us but what
    /// the tracee itself puts back.
    fn give_up(&mut self, stopped: &mut StoppedProcess) {
        let tracee = &mut stopped.tracees[self.host];
        let mut take_back = || -> Result<(), TraceError> {
            match self.step {
                Step::Outside => return Ok(()),
                Step::Calling(begun) => _ = tracee.end_call(begun)?,
                Step::Called => {}
                Step::Inside => {
                    tracee.leave_agent()?;
                    let channel = self.channel.as_ref().expect("the agent was started");
                    if channel.has_left() {
                        tracee.has_left();
                        return Ok(());
                    }
                    let fds = channel.their_socket().map_or_else(|| channel.boot_descriptors(), |fd| vec![fd]);
                    for fd in fds {
                        tracee.inject(&self.entrance, libc::SYS_close, [fd.0 as u64, 0, 0, 0, 0, 0])?;
                    }
                }
            }
            tracee.undo_nothing();
            tracee.inject(&self.entrance, libc::SYS_munmap, [self.base, self.size as u64, 0, 0, 0, 0])?;
            Ok(())
        };
        // A process that has ended has nothing to take back.
        let _ = take_back();
        entrance::remove_stub(&stopped.process, &self.entrance);
    }
}

/// `vm.max_map_count`.
fn most_mappings() -> usize {
    static MOST: LazyLock<usize> = LazyLock::new(|| {
        let text = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap_or_default();
        text.trim().parse().unwrap_or(65_530)
    });
    *MOST
}

fn own_pid_namespace() -> Option<std::ffi::OsString> {
    static OURS: LazyLock<Option<std::ffi::OsString>> =
        LazyLock::new(|| std::fs::read_link("/proc/self/ns/pid").ok().map(Into::into));
    OURS.clone()
}

/// A range that no mapping has, with a good distance to its neighbours.
fn free_range(mappings: &[Mapping], size: u64, lowest: u64) -> u64 {
    const DISTANCE: u64 = 16 << 20;
    let mut low = lowest.next_multiple_of(1 << 21);
    for mapping in mappings {
        if mapping.end + DISTANCE <= low {
            continue;
        }
        if mapping.start >= low + size + DISTANCE {
            break;
        }
        low = (mapping.end + DISTANCE).next_multiple_of(1 << 21);
    }
    low
}

impl FrozenTarget {
    fn driver_error(&self, operation: &'static str, error: TraceError) -> TargetError {
        match error {
            TraceError::Target(error) => error,
            TraceError::Ended(pid) => TargetError::Gone { pid },
            TraceError::TimedOut(pid) => TargetError::TimedOut { pid, seconds: 10 },
            TraceError::Io(source) => self.process.error(operation, source),
            other => self.process.error(operation, std::io::Error::other(other.to_string())),
        }
    }

    /// Sends another thread into a lane of its own. Gives the lane's place in the list.
    fn enter_lane(&mut self, thread: usize) -> Result<usize, TraceError> {
        let offset = Channel::FIRST + LaneKind::Main.size() + self.lanes.len() * LaneKind::Thread.size();
        let (pid, base) = (self.tids[0], self.region.0);
        let mut lane = Channel::new(self.channel.region(), LaneKind::Thread, offset, base, pid, Wait::Futex);
        let tracee = &mut self.tracees[thread];
        tracee.establish(&self.process, &self.entrance, &self.mappings)?;
        // Written by the kernel for a call that is made outside of the region, so that the main thread knows that this one
        // does not need it any more.
        let left = [lane.left_address(), 0];
        let frame = tracee.undo_with(&self.process, &self.entrance, &[(libc::SYS_time, left)])?;
        lane.set_healing(frame, frame);
        let first = self.lanes.first().map_or(lane.address(), |(_, first)| first.address());
        // Before it is there, so that at no instant it is there and would not be told to leave.
        self.channel.set_threads(first, self.lanes.len() + 1);
        let entered = tracee.enter_agent(&lane, None);
        self.lanes.push((thread, lane));
        entered?;
        Ok(self.lanes.len() - 1)
    }

    /// Takes the agent out and puts all threads back as the freeze found them, still stopped.
    fn put_back(&mut self) -> Result<(), TraceError> {
        for (thread, lane) in &mut self.lanes {
            let tracee = &mut self.tracees[*thread];
            if tracee.is_agent() {
                tracee.leave_agent()?;
                tracee.leave_lane(&self.entrance, lane)?;
                tracee.put_back_registers()?;
            }
        }
        let tracee = &mut self.tracees[self.host];
        if tracee.is_agent() {
            tracee.leave_agent()?;
            let (base, size) = self.region;
            // Should we be lost now, the way back still begins with the call that takes the region away.
            if let Some(socket) = self.channel.their_socket() {
                tracee.inject(&self.entrance, libc::SYS_close, [socket.0 as u64, 0, 0, 0, 0, 0])?;
            }
            tracee.undo_nothing();
            tracee.inject(&self.entrance, libc::SYS_munmap, [base, size, 0, 0, 0, 0])?;
        }
        for tracee in &mut self.tracees {
            tracee.put_back(&self.process)?;
        }
        entrance::remove_stub(&self.process, &self.entrance);
        Ok(())
    }
}

/// A batch that closes descriptors.
pub fn closing(fds: &[RemoteFd]) -> Batch {
    let mut batch = Batch::new();
    for &fd in fds {
        batch.call(Sysno::close, args![fd]);
    }
    batch
}

/// While an agent runs, its thread is to leave whatever stop it comes into.
fn keep_running(tracee: &Tracee, pid: Pid) -> Result<(), TargetError> {
    match tracee.keep_running() {
        Ok(true) => Ok(()),
        Ok(false) => Err(TargetError::Gone { pid }),
        // Another thread of ours drives this target: ptrace answers only the one that attached.
        Err(error) if error.raw_os_error() == Some(libc::ECHILD) => Ok(()),
        Err(source) => Err(TargetError::Driver { pid, operation: "waitpid", source }),
    }
}

impl FrozenTarget {
    /// After SIGKILL, until there is nothing of it but what its parent waits for.
    fn wait_ended(&self) {
        // We are told first, and only then the parent. The main thread ends last.
        for tracee in self.tracees.iter().rev() {
            while !matches!(sys::wait(tracee.tid, true), Ok(Some(sys::Stop::Ended(_))) | Err(_)) {}
        }
        let mut ended = [PollFd::new(self.process.pidfd().as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut ended, PollTimeout::from(10_000u16));
    }
}

impl Target for FrozenTarget {
    fn pid(&self) -> Pid {
        self.tids[0]
    }

    fn threads(&self) -> &[Pid] {
        &self.tids
    }

    fn proc(&self) -> &ProcDir {
        &self.process.proc
    }

    /// On the thread that the agent runs in, whichever that is.
    fn run(&mut self, batch: &Batch) -> Result<Replies, TargetError> {
        self.run_on(self.host, batch)
    }

    fn start(&mut self, thread: usize, batch: &Batch) -> Result<(), TargetError> {
        if thread == self.host {
            return self.channel.send(batch);
        }
        let lane = match self.lanes.iter().position(|(known, _)| *known == thread) {
            Some(lane) => lane,
            None => self.enter_lane(thread).map_err(|error| self.driver_error("entering a thread", error))?,
        };
        self.lanes[lane].1.send(batch)
    }

    fn finish(&mut self, thread: usize, batch: &Batch) -> Result<Replies, TargetError> {
        let (pid, tracee) = (self.tids[thread], &self.tracees[thread]);
        let lane = self.lanes.iter_mut().find(|(known, _)| *known == thread);
        let channel = lane.map_or(&mut self.channel, |(_, lane)| lane);
        channel.finish(batch, &mut || keep_running(tracee, pid))
    }

    fn read(&mut self, from: RemotePtr, buffer: &mut [u8]) -> Result<(), TargetError> {
        self.process.read(from, buffer)
    }

    fn write(&mut self, to: RemotePtr, bytes: &[u8]) -> Result<(), TargetError> {
        self.process.write(to, bytes)
    }

    /// Nobody fills a frozen process.
    fn writer(&self) -> Option<Box<dyn MemoryWriter>> {
        None
    }

    fn fds_out(&mut self, fds: &[RemoteFd]) -> Result<Vec<OwnedFd>, TargetError> {
        fds.iter().map(|&fd| self.process.fd(fd)).collect()
    }

    fn fds_in(&mut self, fds: &[BorrowedFd<'_>]) -> Result<Vec<RemoteFd>, TargetError> {
        let brought = self.channel.fds_in(fds, 0, &mut || Ok(()))?;
        self.borrowed.extend(&brought);
        self.channel.set_borrowed(&self.borrowed);
        Ok(brought)
    }

    fn receive_fd(&self, batch: &mut Batch) -> Result<Arg, TargetError> {
        self.channel.receive_one(batch)
    }

    fn send_fd(&mut self, fd: BorrowedFd<'_>) -> Result<(), TargetError> {
        self.channel.pass(&[fd])
    }

    fn fds_done(&mut self, fds: &[RemoteFd]) -> Result<(), TargetError> {
        // First: the number may be the program's the moment after.
        self.borrowed.retain(|fd| !fds.contains(fd));
        self.channel.set_borrowed(&self.borrowed);
        self.run(&closing(fds)).map(drop)
    }

    fn hold_fds(&mut self, numbers: std::ops::Range<i32>) {
        self.channel.set_held(numbers);
    }

    fn compare(&self, kind: Kcmp, mine: u64, other: Pid, theirs: u64) -> Result<std::cmp::Ordering, TargetError> {
        self.process.compare(kind, mine, other, theirs)
    }

    fn file_of_handle(&self, mount: BorrowedFd<'_>, kind: i32, handle: &[u8]) -> Result<OwnedFd, TargetError> {
        self.process.file_of_handle(mount, kind, handle)
    }

    fn private_pages(&mut self, start: u64, end: u64) -> Result<PrivatePages, TargetError> {
        self.process.private_pages(start, end)
    }

    fn covered(&self) -> Vec<(RemotePtr, Vec<u8>)> {
        self.tracees.iter().filter_map(Tracee::covered).collect()
    }

    fn footprint(&self) -> Footprint {
        let (start, size) = self.region;
        let region = start..start + size;
        Footprint {
            mappings: vec![region],
            fds: self.channel.their_socket().into_iter().collect(),
            spare_fds: 0,
            special: Vec::new(),
        }
    }

    fn context(&mut self, thread: usize) -> Result<Context, TargetError> {
        Ok(self.tracees[thread].context())
    }

    fn pending(&mut self, queue: Queue) -> Result<Vec<SigInfo>, TargetError> {
        let (thread, shared) = match queue {
            Queue::Shared => (self.host, true),
            Queue::Thread(thread) => (thread, false),
        };
        self.tracees[thread].pending(shared).map_err(|error| self.driver_error("PTRACE_PEEKSIGINFO", error))
    }

    fn set_context(&mut self, _thread: usize, _context: &Context) -> Result<(), TargetError> {
        Err(self.process.error("setting registers of a frozen process", std::io::ErrorKind::Unsupported.into()))
    }
}

/// A frozen tree. Dropped, it goes on.
pub struct FrozenTree {
    processes: Vec<FrozenProcess>,
    zombies: Vec<Zombie>,
    targets: Vec<Box<dyn Target>>,
}

impl FrozenTree {
    fn each(&mut self) -> impl Iterator<Item = &mut FrozenTarget> {
        self.targets.iter_mut().map(|target| {
            let target: &mut dyn Any = &mut **target;
            target.downcast_mut::<FrozenTarget>().expect("a tree holds its own targets")
        })
    }

    /// Puts all processes back, sends each a signal if there is one, and lets all go.
    fn let_go(&mut self, signal: Option<i32>) -> Result<(), DumpError> {
        let mut first_error = None;
        for target in self.each() {
            if let Err(error) = target.put_back() {
                first_error.get_or_insert(freeze::dump_error(target.pid(), error));
            }
        }
        let mut asleep = Vec::new();
        for target in self.each() {
            if let Some(signal) = signal {
                let _ = sys::pidfd_send_signal(target.process.pidfd().as_fd(), signal);
            }
            for tracee in &target.tracees {
                if signal.is_some() {
                    let _ = sys::detach(tracee.tid, 0);
                } else if let Some(thread) = tracee.let_go_for_now(&target.process) {
                    asleep.push(thread);
                } else {
                    tracee.let_go(&target.process);
                }
            }
        }
        resume_all(asleep);
        self.targets.clear();
        first_error.map_or(Ok(()), Err)
    }
}

impl Drop for FrozenTree {
    fn drop(&mut self) {
        let _ = self.let_go(None);
    }
}

impl Frozen for FrozenTree {
    fn processes(&self) -> &[FrozenProcess] {
        &self.processes
    }

    fn zombies(&self) -> &[Zombie] {
        &self.zombies
    }

    fn targets(&mut self) -> &mut [Box<dyn Target>] {
        &mut self.targets
    }

    /// Its trees have the kernel's ids.
    fn virtual_ids(&mut self) -> Result<Option<Names>, DumpError> {
        Ok(None)
    }

    fn copy(&mut self, process: usize, without: &NotCopied) -> Result<Box<dyn Target>, TargetError> {
        let target = self.each().nth(process).expect("a process of the tree");
        let (pid, tracee) = (target.tids[0], &target.tracees[target.host]);
        let copied = Copied::make(pid, &mut target.channel, without, &mut || keep_running(tracee, pid))?;
        Ok(Box::new(copied))
    }

    fn thaw(mut self: Box<Self>) -> Result<(), DumpError> {
        self.let_go(None)
    }

    fn stop(mut self: Box<Self>) -> Result<(), DumpError> {
        self.let_go(Some(libc::SIGSTOP))
    }

    /// Children before parents, which wait for them first: nothing is left to whoever inherits orphans.
    fn kill(mut self: Box<Self>) -> Result<(), DumpError> {
        let parents: Vec<Pid> = self.processes.iter().map(|frozen| frozen.task.ppid).collect();
        let zombies: Vec<(Pid, Pid)> = self.zombies.iter().map(|zombie| (zombie.task.ppid, zombie.task.pid)).collect();
        let pids: Vec<Pid> = self.processes.iter().map(|frozen| frozen.task.pid).collect();
        let mut alive: Vec<usize> = (0..pids.len()).collect();
        while !alive.is_empty() {
            let (inner, leaves): (Vec<usize>, Vec<usize>) =
                alive.iter().partition(|&&parent| alive.iter().any(|&child| parents[child] == pids[parent]));
            let dead = |pid: Pid| {
                let children =
                    pids.iter().zip(&parents).filter(move |(_, parent)| **parent == pid).map(|(&child, _)| child);
                children.chain(zombies.iter().filter(move |(parent, _)| *parent == pid).map(|&(_, zombie)| zombie))
            };
            for (index, target) in self.each().enumerate() {
                if leaves.contains(&index) {
                    let mut batch = Batch::new();
                    for child in dead(pids[index]).take(ckpt_core::batch::MAX_CALLS) {
                        batch.try_call(Sysno::wait4, args![child.0, 0, libc::__WALL | libc::WNOHANG, 0]);
                    }
                    let _ = target.run(&batch);
                    let _ = sys::pidfd_send_signal(target.process.pidfd().as_fd(), libc::SIGKILL);
                }
            }
            for (index, target) in self.each().enumerate() {
                if leaves.contains(&index) {
                    target.wait_ended();
                }
            }
            alive = inner;
        }
        self.targets.clear();
        Ok(())
    }
}
