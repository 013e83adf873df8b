//! The skeleton: the process tree of an image, with its ids, and nothing in it but agents.
//!
//! The root is forked from ckpt with `clone3(set_tid)`, and every other process is made by its own parent in the same way,
//! so that parentage is real. All of them share one region, which holds a lane for each thread of the tree. A process
//! whose socket closes before the release ends, so that nothing is left when ckpt is killed.

use std::any::Any;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use ckpt_agent::process::Process;
use ckpt_agent::{Channel, LaneKind, Region, Wait, frame};
use ckpt_core::backend::Skeleton;
use ckpt_core::batch::{Arg, Batch, Replies, Sysno};
use ckpt_core::error::RestoreError;
use ckpt_core::image::{self, Image, Task};
use ckpt_core::names::Names;
use ckpt_core::procfs::{Mapping, ProcDir};
use ckpt_core::resource::{limits, terminals};
use ckpt_core::{
    Context, Footprint, Kcmp, MemoryWriter, Pid, PrivatePages, Queue, RemoteFd, RemotePtr, SigInfo, Target,
    TargetError, args,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use crate::sys::{self, CloneArguments};
use crate::tracee::{self, TraceError};

/// A skeleton process, or one that is about to be made.
pub struct SkeletonTarget {
    pub(crate) task: Task,
    tids: Vec<Pid>,
    /// Opened once the process is there.
    pub(crate) process: Option<Process>,
    /// The main thread's lane, then those of the others.
    pub(crate) channels: Vec<Channel>,
    pub(crate) contexts: Vec<Option<Context>>,
    pub(crate) stopped: bool,
    ours: Range<u64>,
    special: Vec<(String, Range<u64>)>,
    agent_fd: RemoteFd,
    /// The agent's end of its socket, until the process is there.
    held: Option<OwnedFd>,
}

/// A skeleton tree. Dropped, it ends.
pub struct SkeletonTree {
    pub(crate) targets: Vec<Box<dyn Target>>,
    pub(crate) region: Arc<Region>,
    /// It runs, and is not ours any more.
    pub(crate) released: bool,
    /// Until the tree is released, or gone.
    _pinned: Pinned,
}

/// Where the lanes of a tree are in its region, and where the region is in its processes.
struct Layout {
    base: u64,
    region_size: usize,
    /// For each process, the offset of its main lane; those of its threads follow.
    lanes: Vec<usize>,
    /// For each zombie, the offset of its lane.
    zombie_lanes: Vec<usize>,
    /// For each group whose leader is gone, the offset of a lane for the leader of a moment.
    group_lanes: Vec<(Pid, usize)>,
    /// Where the kernel's own mappings are kept meanwhile.
    special: Vec<(String, Range<u64>)>,
    /// All of it.
    ours: Range<u64>,
}

fn failed(what: &str, source: io::Error) -> RestoreError {
    RestoreError::Io { what: what.to_string(), source }
}

fn target_failed(pid: Pid) -> impl Fn(TargetError) -> RestoreError {
    move |source| RestoreError::Target { resource: "tasks", pid, source }
}

/// Makes the tree of an image.
pub fn build(image: &Image) -> Result<SkeletonTree, RestoreError> {
    sys::raise_descriptor_limit();
    let pinned = Pinned::new();
    let our_mappings = std::fs::read("/proc/self/maps").map_err(|error| failed("/proc/self/maps", error))?;
    let our_mappings = Mapping::parse_all(&our_mappings).unwrap_or_default();
    let layout = lay_out(image, &our_mappings);
    let region = Region::create(layout.region_size).map_err(|error| failed("the region of the agents", error))?;
    let region = Arc::new(region);
    let fixed = region.map_at(layout.base).map_err(|error| failed("mapping the region of the agents", error))?;
    let highest = image.processes.iter().flat_map(|process| &process.descriptors.descriptors).map(|held| held.fd).max();
    let agent_fd = RemoteFd(highest.map_or(3, |fd| fd + 1).max(3));

    let mut tree = SkeletonTree { targets: Vec::new(), region: region.clone(), released: false, _pinned: pinned };
    let mut our_ends = Vec::with_capacity(image.processes.len());
    for (process, &lane) in image.processes.iter().zip(&layout.lanes) {
        let (ours, theirs) = connection()?;
        our_ends.push(ours.as_raw_fd());
        let pid = process.task.pid;
        let wait = Wait::Socket { ours, theirs: RemoteFd(theirs.as_raw_fd()) };
        let mut main = Channel::new(region.clone(), LaneKind::Main, lane, layout.base, pid, wait);
        main.take_turns();
        let mut channels = Vec::with_capacity(process.threads.len());
        let first_thread = lane + LaneKind::Main.size();
        main.set_threads(layout.base + first_thread as u64, process.threads.len() - 1);
        channels.push(main);
        for n in 0..process.threads.len() - 1 {
            let lane = first_thread + n * LaneKind::Thread.size();
            channels.push(Channel::new(region.clone(), LaneKind::Thread, lane, layout.base, pid, Wait::Futex));
        }
        tree.targets.push(Box::new(SkeletonTarget {
            task: process.task.clone(),
            tids: process.threads.iter().map(|thread| thread.tid).collect(),
            process: None,
            contexts: vec![None; channels.len()],
            channels,
            stopped: process.stopped,
            ours: layout.ours.clone(),
            special: layout.special.clone(),
            agent_fd,
            held: Some(theirs),
        }));
    }
    spawn_root(&mut tree, image, &layout, &our_mappings, &our_ends)?;
    drop(fixed);
    spawn_descendants(&mut tree, image, &layout, 0)?;
    join_groups(&mut tree, image, &layout)?;
    for process in 0..image.processes.len() {
        spawn_threads(&mut tree, process)?;
    }
    Ok(tree)
}

/// Keeps us, and the skeletons that inherit it, on one processor: they and we take turns all the time, and to wake
/// another processor takes several times as long as to switch. Each thread gets its true affinity with its scheduling;
/// ours comes back at the end.
pub(crate) struct Pinned {
    before: Option<CpuSet>,
}

impl Pinned {
    pub(crate) fn new() -> Pinned {
        let ourselves = nix::unistd::Pid::from_raw(0);
        let before = sched_getaffinity(ourselves).ok();
        let mut one = CpuSet::new();
        let here = sched_getcpu().unwrap_or(0);
        // Where it may not be, it is only slower.
        let _ = one.set(here).and_then(|()| sched_setaffinity(ourselves, &one));
        Pinned { before }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = sched_setaffinity(nix::unistd::Pid::from_raw(0), before);
        }
    }
}

fn connection() -> Result<(OwnedFd, OwnedFd), RestoreError> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(|errno| failed("a socket for an agent", errno.into()))
}

/// Finds a place for the region that is free in every process of the image and in our own.
fn lay_out(image: &Image, our_mappings: &[Mapping]) -> Layout {
    let mut offset = Channel::FIRST;
    let mut lanes = Vec::new();
    for process in &image.processes {
        lanes.push(offset);
        offset += LaneKind::Main.size() + (process.threads.len() - 1) * LaneKind::Thread.size();
    }
    let mut zombie_lanes = Vec::new();
    for _ in &image.zombies {
        zombie_lanes.push(offset);
        offset += LaneKind::Thread.size();
    }
    let mut group_lanes = Vec::new();
    for group in dead_groups(image) {
        group_lanes.push((group, offset));
        offset += LaneKind::Thread.size();
    }
    let special: Vec<&Mapping> = our_mappings.iter().filter(|mapping| is_special(mapping)).collect();
    let special_size: u64 = special.iter().map(|mapping| mapping.len()).sum();
    let size = (offset as u64).next_multiple_of(1 << 21) + special_size;

    let mut taken: Vec<Range<u64>> = our_mappings.iter().map(|mapping| mapping.start..mapping.end).collect();
    for process in &image.processes {
        taken.extend(process.memory.mappings.iter().map(|mapping| mapping.start..mapping.end));
        taken.push(process.memory.layout.start_brk..process.memory.layout.brk);
    }
    taken.sort_by_key(|range| range.start);
    // A distance, as stacks and heaps may grow while the skeleton is filled.
    const DISTANCE: u64 = 64 << 20;
    let mut base: u64 = 0x1000_0000_0000;
    for range in &taken {
        if range.end + DISTANCE <= base {
            continue;
        }
        if range.start >= base + size + DISTANCE {
            break;
        }
        base = (range.end + DISTANCE).next_multiple_of(1 << 21);
    }
    let mut at = base + (offset as u64).next_multiple_of(1 << 21);
    let mut parked = Vec::new();
    for mapping in special {
        parked.push((mapping.name.to_string_lossy().into_owned(), at..at + mapping.len()));
        at += mapping.len();
    }
    Layout { base, region_size: offset, lanes, zombie_lanes, group_lanes, special: parked, ours: base..at }
}

fn is_special(mapping: &Mapping) -> bool {
    let name = mapping.name.to_string_lossy();
    name == "[vdso]" || name.starts_with("[vvar")
}

/// Forks the root from ourselves, and leaves nothing of us in it.
fn spawn_root(
    tree: &mut SkeletonTree,
    image: &Image,
    layout: &Layout,
    our_mappings: &[Mapping],
    our_ends: &[RawFd],
) -> Result<(), RestoreError> {
    let task = &image.processes[0].task;
    let root = tree.target(0);
    let (low, size) = root.channels[0].stack();
    let (entry, lane) = (root.channels[0].entry(), root.channels[0].address());
    sys::spawn_agent(task.pid, task.exit_signal, entry, lane, low + size, our_ends).map_err(|error| {
        match error.raw_os_error() {
            Some(libc::EPERM) => RestoreError::NotPermitted { needs: crate::probe::RESTORE_NEEDS.into() },
            Some(libc::EEXIST) => failed(&format!("making process {}: the pid is in use", task.pid), error),
            _ => failed(&format!("making process {}", task.pid), error),
        }
    })?;
    drop(root.open()?);
    // It has our registration for rseq, at an address of ours.
    let rseq = rseq_of(task.pid).map_err(|error| failed("looking at the root of the skeleton", error))?;
    let mut batch = Batch::new();
    if let Some(rseq) = rseq {
        const RSEQ_FLAG_UNREGISTER: i32 = 1;
        batch.call(Sysno::rseq, args![rseq.address, rseq.size, RSEQ_FLAG_UNREGISTER, rseq.signature]);
    }
    root.settle_descriptors(&mut batch)?;
    for (mapping, (_, parked)) in our_mappings.iter().filter(|mapping| is_special(mapping)).zip(&layout.special) {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        batch.call(Sysno::mremap, args![mapping.start, mapping.len(), mapping.len(), flags, parked.start]);
    }
    limits::relax(&mut batch);
    let end_of_user_space: u64 = (1 << 47) - 4096;
    let region_end = layout.base + layout.region_size as u64;
    let special_start = layout.special.first().map_or(layout.ours.end, |(_, parked)| parked.start);
    batch.call(Sysno::munmap, args![0u64, layout.base]);
    batch.call(Sysno::munmap, args![region_end, special_start - region_end]);
    batch.call(Sysno::munmap, args![layout.ours.end, end_of_user_space - layout.ours.end]);
    if image.processes[0].task.sid == task.pid && children_before_setsid(image, 0).is_empty() {
        batch.call(Sysno::setsid, args![]);
    }
    root.run(&batch).map_err(target_failed(task.pid))?;
    Ok(())
}

fn rseq_of(pid: Pid) -> io::Result<Option<ckpt_core::Rseq>> {
    let error = |error: TraceError| io::Error::other(error.to_string());
    sys::seize(pid)?;
    sys::interrupt(pid)?;
    tracee::wait(pid, Duration::from_secs(10)).map_err(error)?;
    let rseq = sys::rseq(pid);
    sys::detach(pid, 0)?;
    rseq
}

/// Children that have the session their parent had before it made its own.
fn children_before_setsid(image: &Image, parent: usize) -> Vec<Pid> {
    let parent = &image.processes[parent].task;
    let leads = parent.sid == parent.pid;
    children(image, parent.pid)
        .filter(|task| leads && task.sid != parent.sid && task.sid != task.pid)
        .map(|task| task.pid)
        .collect()
}

fn children(image: &Image, parent: Pid) -> impl Iterator<Item = &Task> {
    let live = image.processes.iter().map(|process| &process.task);
    live.chain(image.zombies.iter().map(|zombie| &zombie.task)).filter(move |task| task.ppid == parent)
}

/// Has a process make its children, and these theirs.
fn spawn_descendants(
    tree: &mut SkeletonTree,
    image: &Image,
    layout: &Layout,
    parent: usize,
) -> Result<(), RestoreError> {
    let task = &image.processes[parent].task;
    let early = children_before_setsid(image, parent);
    spawn_children(tree, image, layout, parent, &early)?;
    if !early.is_empty() || (parent != 0 && task.sid == task.pid) {
        let mut batch = Batch::new();
        batch.call(Sysno::setsid, args![]);
        tree.target(parent).run(&batch).map_err(target_failed(task.pid))?;
    }
    if task.sid == task.pid {
        terminals::take_controlling(tree.target(parent), task.pid, image)?;
    }
    let late: Vec<Pid> = children(image, task.pid).map(|task| task.pid).filter(|pid| !early.contains(pid)).collect();
    spawn_children(tree, image, layout, parent, &late)?;
    for pid in early.into_iter().chain(late) {
        if let Some(child) = image.process(pid) {
            spawn_descendants(tree, image, layout, child)?;
        }
    }
    Ok(())
}

/// Has a process make some of its children.
fn spawn_children(
    tree: &mut SkeletonTree,
    image: &Image,
    layout: &Layout,
    parent: usize,
    pids: &[Pid],
) -> Result<(), RestoreError> {
    for pids in pids.chunks(100) {
        let failed = target_failed(image.processes[parent].task.pid);
        let live: Vec<usize> = pids.iter().filter_map(|&pid| image.process(pid)).collect();
        let sockets: Vec<OwnedFd> = live.iter().map(|&child| tree.target(child).release_socket()).collect();
        let borrowed: Vec<BorrowedFd<'_>> = sockets.iter().map(|socket| socket.as_fd()).collect();
        let passed = tree.target(parent).fds_in(&borrowed).map_err(&failed)?;
        let mut batch = Batch::new();
        for (&child, &socket) in live.iter().zip(&passed) {
            let child = tree.target(child);
            child.channels[0].socket_moved(socket);
            let exit_signal = child.task.exit_signal;
            push_clone(&mut batch, &child.channels[0], child.task.pid, 0, exit_signal);
        }
        for (zombie, &lane) in image.zombies.iter().zip(&layout.zombie_lanes) {
            if pids.contains(&zombie.task.pid) {
                let lane = zombie_lane(tree, zombie, lane, layout.base).map_err(&failed)?;
                push_clone(&mut batch, &lane, zombie.task.pid, 0, zombie.task.exit_signal);
            }
        }
        for socket in &passed {
            batch.call(Sysno::close, args![*socket]);
        }
        tree.target(parent).run(&batch).map_err(&failed)?;
        for child in live {
            let child = tree.target(child);
            child.open()?;
            let mut batch = Batch::new();
            child.settle_descriptors(&mut batch)?;
            child.run(&batch).map_err(target_failed(child.task.pid))?;
        }
    }
    Ok(())
}

/// Adds a `clone3` with a chosen id; the child starts in the agent, on the lane's own stack.
fn push_clone(batch: &mut Batch, lane: &Channel, id: Pid, flags: i32, exit_signal: i32) {
    let (stack, stack_size) = lane.stack();
    let set_tid = batch.bytes(&id.0.to_ne_bytes());
    let arguments = CloneArguments {
        flags: flags as u64,
        exit_signal: exit_signal as u64,
        stack,
        stack_size,
        set_tid_size: 1,
        ..CloneArguments::default()
    };
    let words = [
        arguments.flags,
        arguments.pidfd,
        arguments.child_tid,
        arguments.parent_tid,
        arguments.exit_signal,
        arguments.stack,
        arguments.stack_size,
        arguments.tls,
        arguments.set_tid,
        arguments.set_tid_size,
        arguments.cgroup,
    ];
    let place = batch.words(&words);
    batch.pointer(place, 64, set_tid);
    batch.call(Sysno::clone3, args![place, size_of::<CloneArguments>()]);
}

/// A lane whose thread finds its work as soon as it is there, and ends: a zombie to be.
fn zombie_lane(tree: &SkeletonTree, zombie: &image::Zombie, offset: usize, base: u64) -> Result<Channel, TargetError> {
    let task = &zombie.task;
    let mut lane = Channel::new(tree.region.clone(), LaneKind::Thread, offset, base, task.pid, Wait::Futex);
    let mut batch = Batch::new();
    if task.sid == task.pid {
        batch.call(Sysno::setsid, args![]);
    } else if task.pgid == task.pid {
        batch.call(Sysno::setpgid, args![0, 0]);
    }
    let name = batch.string(&task.comm);
    batch.try_call(Sysno::prctl, args![libc::PR_SET_NAME, name]);
    if libc::WIFEXITED(zombie.status) {
        batch.call(Sysno::exit_group, args![libc::WEXITSTATUS(zombie.status)]);
    }
    // By the signal that ended it, without a core file.
    let signal = libc::WTERMSIG(zombie.status);
    let (default, none) = (batch.words(&[0, 0, 0, 0]), batch.words(&[0]));
    batch.try_call(Sysno::prctl, args![libc::PR_SET_DUMPABLE, 0]);
    batch.try_call(Sysno::rt_sigaction, args![signal, default, 0, 8]);
    batch.call(Sysno::rt_sigprocmask, args![libc::SIG_SETMASK, none, 0, 8]);
    batch.call(Sysno::kill, args![task.pid.0, signal]);
    // Not reached: a signal to oneself is delivered before the call returns.
    batch.call(Sysno::exit_group, args![1]);
    lane.send(&batch)?;
    Ok(lane)
}

/// Puts every process into its group. A group whose leader is gone gets one for as long as it takes.
fn join_groups(tree: &mut SkeletonTree, image: &Image, layout: &Layout) -> Result<(), RestoreError> {
    // Leaders first: the group has to be there.
    for process in &image.processes {
        let task = &process.task;
        if task.pgid == task.pid && task.sid != task.pid {
            set_group(tree, image, task.pid, 0)?;
        }
    }
    for process in &image.processes {
        let task = &process.task;
        if task.pgid == task.pid || task.pgid == image.processes[0].task.pgid && !is_member(image, task.pgid) {
            // It leads, or it is in the group that the root was in, from outside of the tree: a job of this shell.
            continue;
        }
        if is_member(image, task.pgid) {
            set_group(tree, image, task.pid, task.pgid.0)?;
        } else {
            join_dead_group(tree, image, layout, task)?;
        }
    }
    // Those that have ended are put there by their parents.
    for zombie in &image.zombies {
        let task = &zombie.task;
        if task.pgid != task.pid
            && let Some(parent) = image.process(task.ppid)
        {
            let mut batch = Batch::new();
            batch.call(Sysno::setpgid, args![task.pid.0, task.pgid.0]);
            tree.target(parent).run(&batch).map_err(target_failed(task.pid))?;
        }
    }
    Ok(())
}

/// Whether a process of the image has this id.
fn is_member(image: &Image, pid: Pid) -> bool {
    image.process(pid).is_some() || image.zombies.iter().any(|zombie| zombie.task.pid == pid)
}

/// Groups without a leader in the tree that are not the outer group of a shell's job.
fn dead_groups(image: &Image) -> Vec<Pid> {
    let outer = image.processes[0].task.pgid;
    let mut groups: Vec<Pid> = image
        .processes
        .iter()
        .map(|process| process.task.pgid)
        .filter(|&group| group != outer && !is_member(image, group))
        .collect();
    groups.sort_unstable();
    groups.dedup();
    groups
}

fn set_group(tree: &mut SkeletonTree, image: &Image, pid: Pid, group: i32) -> Result<(), RestoreError> {
    let mut batch = Batch::new();
    batch.call(Sysno::setpgid, args![0, group]);
    let process = image.process(pid).expect("a process of the image");
    tree.target(process).run(&batch).map_err(target_failed(pid))?;
    Ok(())
}

/// Joins a group whose leader has ended: for a moment, a child with its id leads it.
fn join_dead_group(tree: &mut SkeletonTree, image: &Image, layout: &Layout, task: &Task) -> Result<(), RestoreError> {
    let process = image.process(task.pid).expect("a process of the image");
    let region = tree.region.clone();
    let target = tree.target(process);
    let mut batch = Batch::new();
    batch.call(Sysno::setpgid, args![0, task.pgid.0]);
    if target.run(&batch).is_ok() {
        // Another member was here before: the group is there.
        return Ok(());
    }
    let lane = layout.group_lanes.iter().find(|(group, _)| *group == task.pgid).expect("a lane for each dead group").1;
    let lane = Channel::new(region, LaneKind::Thread, lane, layout.base, task.pgid, Wait::Futex);
    let mut batch = Batch::new();
    // It waits on its futex until it is killed, all in one batch: it cannot be left behind.
    push_clone(&mut batch, &lane, task.pgid, 0, 0);
    batch.call(Sysno::setpgid, args![task.pgid.0, task.pgid.0]);
    batch.call(Sysno::setpgid, args![0, task.pgid.0]);
    batch.call(Sysno::kill, args![task.pgid.0, libc::SIGKILL]);
    batch.call(Sysno::wait4, args![task.pgid.0, 0, libc::__WALL, 0]);
    target.run(&batch).map_err(target_failed(task.pid))?;
    Ok(())
}

/// Has a process make its other threads.
fn spawn_threads(tree: &mut SkeletonTree, process: usize) -> Result<(), RestoreError> {
    let flags = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM;
    let target = tree.target(process);
    let pid = target.task.pid;
    let others: Vec<usize> = (1..target.tids.len()).collect();
    let mut batches = Vec::new();
    for threads in others.chunks(400) {
        let mut batch = Batch::new();
        for &thread in threads {
            push_clone(&mut batch, &target.channels[thread], target.tids[thread], flags, 0);
        }
        batches.push(batch);
    }
    for batch in batches {
        target.run(&batch).map_err(target_failed(pid))?;
    }
    Ok(())
}

impl SkeletonTarget {
    fn release_socket(&mut self) -> OwnedFd {
        self.held.take().expect("a socket for each process that is not there yet")
    }

    /// The process is there now.
    fn open(&mut self) -> Result<Option<OwnedFd>, RestoreError> {
        let process = Process::open(self.task.pid).map_err(|error| failed("a process of the skeleton", error))?;
        self.process = Some(process);
        Ok(self.held.take())
    }

    /// Moves its socket to its number. Adds the calls that close everything else.
    fn settle_descriptors(&mut self, batch: &mut Batch) -> Result<(), RestoreError> {
        let now = self.channels[0].their_socket().expect("the main lane has a socket");
        if now > self.agent_fd {
            // As good as the number that it was to have.
            self.agent_fd = now;
        }
        let agent_fd = self.agent_fd;
        if now < agent_fd {
            // By itself: until it has run, the new number may be that of its parent's socket.
            let mut first = Batch::new();
            first.call(Sysno::dup3, args![now, agent_fd, libc::O_CLOEXEC]);
            self.run(&first).map_err(target_failed(self.task.pid))?;
            self.channels[0].socket_moved(agent_fd);
        }
        batch.call(Sysno::close_range, args![0, agent_fd.0 - 1, 0]);
        batch.call(Sysno::close_range, args![agent_fd.0 + 1, u32::MAX, 0]);
        Ok(())
    }

    pub(crate) fn process(&self) -> &Process {
        self.process.as_ref().expect("the process was made")
    }

    pub(crate) fn ours(&self) -> Range<u64> {
        self.ours.clone()
    }

    pub(crate) fn agent_fd(&self) -> RemoteFd {
        self.agent_fd
    }
}

impl Target for SkeletonTarget {
    fn pid(&self) -> Pid {
        self.tids[0]
    }

    fn threads(&self) -> &[Pid] {
        &self.tids
    }

    fn proc(&self) -> &ProcDir {
        &self.process().proc
    }

    fn start(&mut self, thread: usize, batch: &Batch) -> Result<(), TargetError> {
        self.channels[thread].send(batch)
    }

    fn finish(&mut self, thread: usize, batch: &Batch) -> Result<Replies, TargetError> {
        let process = self.process.as_ref().expect("the process was made");
        let pid = self.tids[0];
        // A thread's lane does not notice that its process has ended.
        self.channels[thread].finish(batch, &mut || {
            let mut ended = [PollFd::new(process.pidfd().as_fd(), PollFlags::POLLIN)];
            match poll(&mut ended, PollTimeout::ZERO) {
                Ok(1..) => Err(TargetError::Gone { pid }),
                _ => Ok(()),
            }
        })
    }

    fn read(&mut self, from: RemotePtr, buffer: &mut [u8]) -> Result<(), TargetError> {
        self.process().read(from, buffer)
    }

    fn write(&mut self, to: RemotePtr, bytes: &[u8]) -> Result<(), TargetError> {
        self.process().write(to, bytes)
    }

    fn writer(&self) -> Option<Box<dyn MemoryWriter>> {
        Some(Box::new(Process::open(self.tids[0]).ok()?))
    }

    fn fds_out(&mut self, fds: &[RemoteFd]) -> Result<Vec<OwnedFd>, TargetError> {
        fds.iter().map(|&fd| self.process().fd(fd)).collect()
    }

    fn fds_in(&mut self, fds: &[BorrowedFd<'_>]) -> Result<Vec<RemoteFd>, TargetError> {
        let spare = self.footprint().spare_fds;
        self.channels[0].fds_in(fds, spare, &mut || Ok(()))
    }

    fn receive_fd(&self, batch: &mut Batch) -> Result<Arg, TargetError> {
        self.channels[0].receive_one(batch)
    }

    fn send_fd(&mut self, fd: BorrowedFd<'_>) -> Result<(), TargetError> {
        self.channels[0].pass(&[fd])
    }

    fn fds_done(&mut self, fds: &[RemoteFd]) -> Result<(), TargetError> {
        self.run(&crate::frozen::closing(fds)).map(drop)
    }

    /// It ends when we are lost.
    fn hold_fds(&mut self, _numbers: std::ops::Range<i32>) {}

    fn compare(&self, kind: Kcmp, mine: u64, other: Pid, theirs: u64) -> Result<std::cmp::Ordering, TargetError> {
        self.process().compare(kind, mine, other, theirs)
    }

    fn file_of_handle(&self, mount: BorrowedFd<'_>, kind: i32, handle: &[u8]) -> Result<OwnedFd, TargetError> {
        self.process().file_of_handle(mount, kind, handle)
    }

    fn private_pages(&mut self, start: u64, end: u64) -> Result<PrivatePages, TargetError> {
        self.process.as_mut().expect("the process was made").private_pages(start, end)
    }

    fn covered(&self) -> Vec<(RemotePtr, Vec<u8>)> {
        Vec::new()
    }

    fn footprint(&self) -> Footprint {
        Footprint {
            mappings: vec![self.ours.clone()],
            fds: vec![self.agent_fd],
            spare_fds: self.agent_fd.0 + 1,
            special: self.special.clone(),
        }
    }

    fn context(&mut self, _thread: usize) -> Result<Context, TargetError> {
        Err(self.process().error("reading registers of a skeleton", io::ErrorKind::Unsupported.into()))
    }

    fn pending(&mut self, _queue: Queue) -> Result<Vec<SigInfo>, TargetError> {
        Err(self.process().error("reading the signals of a skeleton", io::ErrorKind::Unsupported.into()))
    }

    fn set_context(&mut self, thread: usize, context: &Context) -> Result<(), TargetError> {
        let general = &context.registers.general;
        let mut batch = Batch::new();
        // A signal frame does not carry these two, so they are set now.
        const ARCH_SET_GS: i32 = 0x1001;
        const ARCH_SET_FS: i32 = 0x1002;
        if frame::has_tiles(&context.registers.xsave) {
            // Or the kernel would drop the tiles, and with them all but the SSE registers.
            batch.use_tiles();
        }
        batch.call(Sysno::arch_prctl, args![ARCH_SET_FS, general.fs_base]);
        batch.call(Sysno::arch_prctl, args![ARCH_SET_GS, general.gs_base]);
        if let Some(rseq) = context.rseq {
            batch.call(Sysno::rseq, args![rseq.address, rseq.size, 0, rseq.signature]);
        }
        self.run_on(thread, &batch)?;
        let channel = &mut self.channels[thread];
        let frame = frame::build(&context.registers, context.blocked, channel.frame_address());
        channel.set_frame(&frame);
        self.contexts[thread] = Some(context.clone());
        Ok(())
    }
}

impl SkeletonTree {
    pub(crate) fn each(&mut self) -> impl Iterator<Item = &mut SkeletonTarget> {
        self.targets.iter_mut().map(|target| {
            let target: &mut dyn Any = &mut **target;
            target.downcast_mut::<SkeletonTarget>().expect("a tree holds its own targets")
        })
    }

    fn target(&mut self, process: usize) -> &mut SkeletonTarget {
        let target: &mut dyn Any = &mut *self.targets[process];
        target.downcast_mut::<SkeletonTarget>().expect("a tree holds its own targets")
    }
}

impl Drop for SkeletonTree {
    fn drop(&mut self) {
        if self.released {
            return;
        }
        let pidfds: Vec<Process> = self.each().filter_map(|target| target.process.take()).collect();
        let root = self.each().next().map(|target| target.task.pid);
        // Each agent ends with its socket.
        self.targets.clear();
        for process in &pidfds {
            // Killed as well: a batch in progress would be finished first.
            let _ = sys::pidfd_send_signal(process.pidfd().as_fd(), libc::SIGKILL);
            let mut ended = [PollFd::new(process.pidfd().as_fd(), PollFlags::POLLIN)];
            let _ = poll(&mut ended, PollTimeout::from(2000u16));
        }
        if let (Some(root), false) = (root, pidfds.is_empty()) {
            let _ = sys::wait(root, false);
        }
    }
}

impl Skeleton for SkeletonTree {
    fn targets(&mut self) -> &mut [Box<dyn Target>] {
        &mut self.targets
    }

    /// Its trees have their own.
    fn real_ids(&self) -> Option<Names> {
        None
    }

    fn release(self: Box<Self>) -> Result<(), RestoreError> {
        crate::release::release(*self)
    }
}
