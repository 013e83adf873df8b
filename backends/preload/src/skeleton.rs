//! The skeleton: the process tree of an image, with its ids, and nothing in it but agents.
//!
//! Each process is started from the program's own executable, with the shim as `LD_AUDIT`: that gives it the link
//! `/proc/PID/exe`, which an ordinary user cannot set, and the shim takes over before the dynamic linker has looked at
//! any library. From there on it is an agent, which empties its process and fills it again. A child whose executable is
//! its parent's is forked from it.
//!
//! A process whose socket closes before the release ends, so that nothing is left when ckpt is killed.

use std::any::Any;
use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ckpt_agent::process::Process;
use ckpt_agent::{Channel, LaneKind, Region, Wait, frame};
use ckpt_core::backend::Skeleton;
use ckpt_core::batch::{Arg, Batch, Replies, Sysno};
use ckpt_core::error::RestoreError;
use ckpt_core::image::{Image, Task, Zombie};
use ckpt_core::names::Names;
use ckpt_core::procfs::{Mapping, ProcDir};
use ckpt_core::resource::terminals;
use ckpt_core::{
    Context, Footprint, Kcmp, MemoryWriter, Pid, PrivatePages, Queue, RemoteFd, RemotePtr, SigInfo, Target,
    TargetError, args,
};
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use crate::frozen::{closing, read_memory, write_memory};
use crate::ids::{Ids, Step};
use crate::launch;
use crate::protocol::SKELETON_VARIABLE;
use crate::sys::{self, CloneArguments};
use crate::virtual_ids;

/// A skeleton process, or one that is about to be made.
pub struct SkeletonTarget {
    pub(crate) task: Task,
    tids: Vec<Pid>,
    /// Once the process is there.
    process: Option<Process>,
    /// The main thread's lane, then those of the others.
    pub(crate) channels: Vec<Channel>,
    pub(crate) contexts: Vec<Option<Context>>,
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
    /// The processes that are in a session of their own already.
    in_session: Vec<bool>,
    /// The ids that were given so far, by those of the image.
    made: BTreeMap<Pid, Pid>,
    /// Whether the processes have a table of virtual ids, from an earlier restore.
    has_table: bool,
    shim: OwnedFd,
    ids: Ids,
}

/// Where the lanes of a tree are in its region, and where the region is in its processes.
struct Layout {
    base: u64,
    region_size: usize,
    /// For each process, the offset of its main lane; those of its threads follow.
    lanes: Vec<usize>,
    /// For each zombie, the offset of its lane.
    zombie_lanes: Vec<usize>,
    /// Where the kernel's own mappings are kept meanwhile.
    special: Range<u64>,
}

/// Room for `[vdso]` and `[vvar]` mappings.
const SPECIAL_SIZE: u64 = 1 << 20;

fn failed(what: &str, source: io::Error) -> RestoreError {
    RestoreError::Io { what: what.to_string(), source }
}

fn target_failed(pid: Pid) -> impl Fn(TargetError) -> RestoreError {
    move |source| RestoreError::Target { resource: "tasks", pid, source }
}

/// What is made, one after the other.
#[derive(Clone, Copy, Debug)]
enum Part {
    Process(usize),
    Thread(usize, usize),
    Zombie(usize),
}

/// Makes the tree of an image.
pub fn build(image: &Image) -> Result<SkeletonTree, RestoreError> {
    raise_descriptor_limit();
    let ids = Ids::new(&all_ids(image)).map_err(|error| failed("process ids", error))?;
    match build_with(image, ids) {
        // It was free, and others on this host were faster: the tree gets other ids, as where they are taken from the start.
        Err(RestoreError::Io { source, .. }) if source.raw_os_error() == Some(libc::EEXIST) => {
            build_with(image, Ids::of_others())
        }
        result => result,
    }
}

fn build_with(image: &Image, ids: Ids) -> Result<SkeletonTree, RestoreError> {
    let layout = lay_out(image);
    let region = Region::create(layout.region_size).map_err(|error| failed("the region of the agents", error))?;
    let region = Arc::new(region);
    let highest = image.processes.iter().flat_map(|process| &process.descriptors.descriptors).map(|held| held.fd).max();
    let agent_fd = RemoteFd(highest.map_or(3, |fd| fd + 1).max(3));
    let mut tree = SkeletonTree {
        targets: Vec::new(),
        region: region.clone(),
        released: false,
        in_session: vec![false; image.processes.len()],
        made: BTreeMap::new(),
        has_table: image.virtual_ids,
        shim: launch::shim_file().map_err(|error| failed("the shim", error))?,
        ids,
    };
    for (process, &lane) in image.processes.iter().zip(&layout.lanes) {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(|errno| failed("a socket for an agent", errno.into()))?;
        let pid = process.task.pid;
        let wait = Wait::Socket { ours, theirs: agent_fd };
        let mut main = Channel::new(region.clone(), LaneKind::Main, lane, layout.base, pid, wait);
        let first_thread = lane + LaneKind::Main.size();
        main.set_threads(layout.base + first_thread as u64, process.threads.len() - 1);
        let mut channels = vec![main];
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
            ours: layout.base..layout.special.end,
            special: Vec::new(),
            agent_fd,
            held: Some(theirs),
        }));
    }
    make_all(&mut tree, image, &layout)?;
    match tree.real_ids() {
        None => join_groups(&mut tree, image)?,
        Some(names) => {
            let mut image = image.clone();
            image.rename(&names);
            join_groups(&mut tree, &image)?;
        }
    }
    Ok(tree)
}

/// The ids of all tasks.
fn all_ids(image: &Image) -> Vec<Pid> {
    let tids = image.processes.iter().flat_map(|process| process.threads.iter().map(|thread| thread.tid));
    tids.chain(image.zombies.iter().map(|zombie| zombie.task.pid)).collect()
}

/// Makes every process, thread and zombie, as far as it can be in the order of their ids: without the right to choose an
/// id, the ids have to be met as the kernel gives them out.
fn make_all(tree: &mut SkeletonTree, image: &Image, layout: &Layout) -> Result<(), RestoreError> {
    let mut waiting: Vec<(Pid, Part)> = Vec::new();
    for (index, process) in image.processes.iter().enumerate() {
        waiting.push((process.task.pid, Part::Process(index)));
        let threads = process.threads.iter().enumerate().skip(1);
        waiting.extend(threads.map(|(thread, saved)| (saved.tid, Part::Thread(index, thread))));
    }
    waiting.extend(image.zombies.iter().enumerate().map(|(n, zombie)| (zombie.task.pid, Part::Zombie(n))));
    waiting.sort_unstable_by_key(|(id, _)| *id);
    // In a circle, from the root on.
    let root = waiting.iter().position(|(_, part)| matches!(part, Part::Process(0))).expect("the root is there");
    waiting.rotate_left(root);
    while !waiting.is_empty() {
        let mut later = Vec::new();
        let before = waiting.len();
        for (id, part) in waiting {
            if !is_ready(tree, image, part) {
                later.push((id, part));
                continue;
            }
            match part {
                Part::Process(0) => make_root(tree, image, layout)?,
                Part::Process(process) => make_child(tree, image, layout, process)?,
                Part::Thread(process, thread) => make_thread(tree, process, thread)?,
                Part::Zombie(zombie) => make_zombie(tree, image, layout, zombie)?,
            }
            begin_sessions(tree, image)?;
        }
        if later.len() == before {
            let what = "the tree cannot be made in any order".into();
            return Err(RestoreError::Mismatch { resource: "tasks", pid: image.processes[0].task.pid, what });
        }
        waiting = later;
    }
    Ok(())
}

/// Whether what something needs is there: its process; its parent, in the session that it was born in.
fn is_ready(tree: &mut SkeletonTree, image: &Image, part: Part) -> bool {
    let task = match part {
        Part::Process(0) => return true,
        Part::Thread(process, _) => return tree.target(process).process.is_some(),
        Part::Process(process) => &image.processes[process].task,
        Part::Zombie(zombie) => &image.zombies[zombie].task,
    };
    let Some(parent) = image.process(task.ppid) else { return false };
    tree.target(parent).process.is_some() && (is_early(image, task) || !leads(image, parent) || tree.in_session[parent])
}

/// Whether a process is the leader of its session.
fn leads(image: &Image, process: usize) -> bool {
    let task = &image.processes[process].task;
    task.sid == task.pid
}

/// Whether a child has the session that its parent had before it made its own.
fn is_early(image: &Image, task: &Task) -> bool {
    image.process(task.ppid).is_some_and(|parent| {
        let parent = &image.processes[parent].task;
        parent.sid == parent.pid && task.sid != parent.sid && task.sid != task.pid
    })
}

/// Has every leader that has all the children from before begin its session.
fn begin_sessions(tree: &mut SkeletonTree, image: &Image) -> Result<(), RestoreError> {
    for process in 0..image.processes.len() {
        let pid = image.processes[process].task.pid;
        if !leads(image, process) || tree.in_session[process] || tree.target(process).process.is_none() {
            continue;
        }
        let early_missing = (0..image.processes.len()).any(|child| {
            let task = &image.processes[child].task;
            task.ppid == pid && is_early(image, task) && tree.target(child).process.is_none()
        });
        let early_zombies = image.zombies.iter().any(|zombie| zombie.task.ppid == pid && is_early(image, &zombie.task));
        let zombies_missing = early_zombies
            && image.zombies.iter().any(|zombie| {
                zombie.task.ppid == pid && is_early(image, &zombie.task) && !tree.made.contains_key(&zombie.task.pid)
            });
        if early_missing || zombies_missing {
            continue;
        }
        let mut batch = Batch::new();
        batch.call(Sysno::setsid, args![]);
        tree.target(process).run(&batch).map_err(target_failed(pid))?;
        terminals::take_controlling(tree.target(process), pid, image)?;
        tree.in_session[process] = true;
    }
    Ok(())
}

/// Skeletons need a few numbers above the program's own; each gets its true limit at the end.
fn raise_descriptor_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        // Where it cannot be raised, the first number that is too high says so.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Finds a place for the region that is free in every process of the image, and where the kernel puts nothing.
fn lay_out(image: &Image) -> Layout {
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
    let size = (offset as u64).next_multiple_of(1 << 21) + SPECIAL_SIZE;
    let mut taken: Vec<Range<u64>> = Vec::new();
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
    let special = base + (offset as u64).next_multiple_of(1 << 21);
    Layout { base, region_size: offset, lanes, zombie_lanes, special: special..special + SPECIAL_SIZE }
}

fn is_special(mapping: &Mapping) -> bool {
    let name = mapping.name.to_string_lossy();
    name == "[vdso]" || name.starts_with("[vvar")
}

/// How many numbers from the agent's on a process needs while it is started: its socket, the region, the shim.
const STARTING_FDS: i32 = 3;

/// The environment that a process is started with to become a skeleton.
fn skeleton_environment(target: &SkeletonTarget, region: &Region) -> Vec<CString> {
    let (socket, memfd, shim) = (target.agent_fd.0, target.agent_fd.0 + 1, target.agent_fd.0 + 2);
    let lane = &target.channels[0];
    let values = format!("{socket},{memfd},{},{},{}", lane.entry(), region.size(), lane.address());
    let variable = [SKELETON_VARIABLE, values.as_bytes()].concat();
    let audit = format!("LD_AUDIT=/proc/self/fd/{shim}");
    // Its registration would be at an address of the C library that is about to go.
    let tunables = "GLIBC_TUNABLES=glibc.pthread.rseq=0".to_string();
    [variable, audit.into_bytes(), tunables.into_bytes()]
        .into_iter()
        .map(|variable| CString::new(variable).expect("no zero byte in numbers"))
        .collect()
}

/// Starts the root, as our child.
fn make_root(tree: &mut SkeletonTree, image: &Image, layout: &Layout) -> Result<(), RestoreError> {
    let region = tree.region.clone();
    let shim = tree.shim.try_clone().map_err(|error| failed("the shim", error))?;
    let mut ids = tree.ids.take();
    let root = tree.target(0);
    let pid = root.task.pid;
    let agent_fd = root.agent_fd.0;
    let exe = path_string(&image.processes[0].memory.exe)?;
    let environment = skeleton_environment(root, &region);
    let socket = root.held.take().expect("the root is not there yet");
    // Out of the way of the numbers that they are to have.
    let above = agent_fd + STARTING_FDS;
    let lift = |fd: BorrowedFd<'_>| {
        let lifted = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(above)).map(sys::own);
        lifted.map_err(|errno| failed("descriptors of the skeleton", errno.into()))
    };
    let handed = [lift(socket.as_fd())?, lift(region.memfd())?, lift(shim.as_fd())?];
    drop(socket);
    let exit_signal = image.processes[0].task.exit_signal;
    let made = ids.make(pid, |step| match step {
        Step::Make(chosen) => sys::spawn(chosen, exit_signal, &exe, &environment, &handed, agent_fd),
        Step::Undo(stray) => {
            sys::kill(stray);
            sys::reap(stray);
            Ok(stray)
        }
    });
    let made = made.map_err(|error| not_made(pid, error))?;
    drop(handed);
    tree.made.insert(pid, made);
    let root = tree.target(0);
    root.open(made)?;
    tree.ids = ids;
    empty(tree, 0, layout)?;
    check_exe(tree, image, 0)
}

fn path_string(path: &Path) -> Result<CString, RestoreError> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| failed("the path of the executable", io::ErrorKind::InvalidInput.into()))
}

fn not_made(pid: Pid, error: io::Error) -> RestoreError {
    match error.raw_os_error() {
        Some(libc::EEXIST) => failed(&format!("making process {pid}: the id is in use"), error),
        _ => failed(&format!("making process {pid}"), error),
    }
}

/// The kernel tells the truth about what was started.
fn check_exe(tree: &mut SkeletonTree, image: &Image, process: usize) -> Result<(), RestoreError> {
    let target = tree.target(process);
    let wanted = &image.processes[process].memory.exe;
    let now = target.proc().link("exe").map_err(|error| failed("a process of the skeleton", error))?;
    if now.as_os_str() == wanted.as_os_str() {
        return Ok(());
    }
    let what = format!("its executable was to be {} and is {}", wanted.display(), Path::new(&now).display());
    Err(RestoreError::Mismatch { resource: "tasks", pid: target.task.pid, what })
}

/// Leaves nothing in a process that was just started but the agent, and the kernel's own mappings at their side.
fn empty(tree: &mut SkeletonTree, process: usize, layout: &Layout) -> Result<(), RestoreError> {
    let region_end = layout.base + layout.region_size as u64;
    let target = tree.target(process);
    let pid = target.task.pid;
    // The first batch waits until the process has come into the agent.
    let mut batch = Batch::new();
    batch.call(Sysno::getpid, args![]);
    target.run(&batch).map_err(|source| match source {
        TargetError::Gone { .. } => {
            let why = "its executable could not be started, or its dynamic linker took no LD_AUDIT";
            RestoreError::Mismatch { resource: "tasks", pid, what: why.into() }
        }
        source => target_failed(pid)(source),
    })?;
    let maps = target.proc().read("maps").map_err(|error| failed("a process of the skeleton", error))?;
    let mappings = Mapping::parse_all(&maps).unwrap_or_default();
    let mut batch = Batch::new();
    let mut at = layout.special.start;
    let mut parked = Vec::new();
    for mapping in mappings.iter().filter(|mapping| is_special(mapping)) {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        batch.call(Sysno::mremap, args![mapping.start, mapping.len(), mapping.len(), flags, at]);
        parked.push((mapping.name.to_string_lossy().into_owned(), at..at + mapping.len()));
        at += mapping.len();
    }
    let end_of_user_space: u64 = (1 << 47) - 4096;
    batch.call(Sysno::munmap, args![0u64, layout.base]);
    batch.call(Sysno::munmap, args![region_end.next_multiple_of(4096), layout.special.start - region_end]);
    batch.call(Sysno::munmap, args![at, end_of_user_space - at]);
    target.special = parked;
    target.close_others(&mut batch);
    // It was started without, so that it came through the exec.
    batch.call(Sysno::fcntl, args![target.agent_fd, libc::F_SETFD, libc::FD_CLOEXEC]);
    target.run(&batch).map_err(target_failed(pid))?;
    Ok(())
}

/// Has a process make a child, which becomes another program if it is to be one.
fn make_child(tree: &mut SkeletonTree, image: &Image, layout: &Layout, child: usize) -> Result<(), RestoreError> {
    let task = &image.processes[child].task;
    let parent = image.process(task.ppid).expect("its parent is there");
    let parent_failed = target_failed(task.ppid);
    let socket = tree.target(child).held.take().expect("it is not there yet");
    let passed = tree.target(parent).fds_in(&[socket.as_fd()]).map_err(&parent_failed)?[0];
    tree.target(child).channels[0].socket_moved(passed);
    let (pid, exit_signal) = (task.pid, task.exit_signal);
    let lane = tree.target(child).channels[0].again();
    let made = make_task(tree, parent, pid, &lane, 0, exit_signal)?;
    tree.target(parent).fds_done(&[passed]).map_err(&parent_failed)?;
    drop(socket);
    let special = tree.target(parent).special.clone();
    let target = tree.target(child);
    target.special = special;
    target.open(made)?;
    let agent_fd = target.agent_fd;
    // By itself: until it has run, the new number may be that of its parent's socket.
    let mut first = Batch::new();
    first.call(Sysno::dup3, args![passed, agent_fd, libc::O_CLOEXEC]);
    target.run(&first).map_err(target_failed(pid))?;
    target.channels[0].socket_moved(agent_fd);
    let mut batch = Batch::new();
    target.close_others(&mut batch);
    target.run(&batch).map_err(target_failed(pid))?;
    if image.processes[child].memory.exe != image.processes[parent].memory.exe {
        become_program(tree, image, layout, child)?;
    }
    check_exe(tree, image, child)
}

/// Has a skeleton execute the program that it is to be, so that it has the right `/proc/PID/exe`.
fn become_program(tree: &mut SkeletonTree, image: &Image, layout: &Layout, process: usize) -> Result<(), RestoreError> {
    let region = tree.region.clone();
    let shim = tree.shim.try_clone().map_err(|error| failed("the shim", error))?;
    let target = tree.target(process);
    let pid = target.task.pid;
    let to_error = target_failed(pid);
    let brought = target.fds_in(&[region.memfd(), shim.as_fd()]).map_err(&to_error)?;
    let agent_fd = target.agent_fd.0;
    let mut batch = Batch::new();
    // To a safe height first: a number that is wanted may be the other's.
    let high: Vec<_> =
        brought.iter().map(|fd| batch.call(Sysno::fcntl, args![*fd, libc::F_DUPFD_CLOEXEC, agent_fd + 16])).collect();
    for (number, fd) in high.into_iter().enumerate() {
        batch.call(Sysno::dup3, args![fd, agent_fd + 1 + number as i32, 0]);
    }
    batch.call(Sysno::fcntl, args![agent_fd, libc::F_SETFD, 0]);
    batch.call(Sysno::close_range, args![agent_fd + STARTING_FDS, u32::MAX, 0]);
    let path = path_string(&image.processes[process].memory.exe)?;
    let path = batch.bytes(path.as_bytes_with_nul());
    let arguments = batch.words(&[0, 0]);
    batch.pointer(arguments, 0, path);
    let variables = skeleton_environment(target, &region);
    let environment = batch.words(&vec![0; variables.len() + 1]);
    for (n, variable) in variables.iter().enumerate() {
        let variable = batch.bytes(variable.as_bytes_with_nul());
        batch.pointer(environment, n * 8, variable);
    }
    batch.try_call(Sysno::execve, args![path, arguments, environment]);
    let exe = target.proc().stat("exe").map_err(|error| failed("a process of the skeleton", error))?;
    target.channels[0].send(&batch).map_err(&to_error)?;
    // Nobody answers this batch, unless it fails.
    let begin = Instant::now();
    loop {
        if target.channels[0].has_message() {
            let _ = target.channels[0].wait(&mut || Ok(()));
            let what = format!("{} could not be executed", image.processes[process].memory.exe.display());
            return Err(RestoreError::Mismatch { resource: "tasks", pid, what });
        }
        match target.proc().stat("exe") {
            Ok(now) if (now.st_dev, now.st_ino) != (exe.st_dev, exe.st_ino) => break,
            Ok(_) if begin.elapsed() < Duration::from_secs(10) => {}
            Ok(_) => return Err(to_error(TargetError::TimedOut { pid, seconds: 10 })),
            Err(_) => return Err(to_error(TargetError::Gone { pid })),
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    empty(tree, process, layout)
}

/// Has a process make one other task, with a wanted id.
fn make_task(
    tree: &mut SkeletonTree,
    maker: usize,
    id: Pid,
    lane: &Channel,
    flags: i32,
    exit_signal: i32,
) -> Result<Pid, RestoreError> {
    let mut ids = tree.ids.take();
    let maker_pid = tree.target(maker).task.pid;
    let is_thread = flags & libc::CLONE_THREAD != 0;
    let result = ids.make(id, |step| {
        let target = tree.target(maker);
        let mut batch = Batch::new();
        match step {
            Step::Make(chosen) => {
                let call = push_clone(&mut batch, lane, chosen, flags, exit_signal);
                let replies = target.run(&batch).map_err(io::Error::other)?;
                Ok(Pid(replies.result(call)? as i32))
            }
            Step::Undo(stray) if is_thread => {
                batch.call(Sysno::exit, args![0]);
                let mut lane = lane.again();
                lane.send(&batch).map_err(io::Error::other)?;
                wait_until_gone(target, stray)?;
                lane.reset();
                Ok(stray)
            }
            Step::Undo(stray) => {
                batch.try_call(Sysno::kill, args![stray.0, libc::SIGKILL]);
                batch.call(Sysno::wait4, args![stray.0, 0, libc::__WALL, 0]);
                target.run(&batch).map_err(io::Error::other)?;
                lane.again().rearm();
                Ok(stray)
            }
        }
    });
    tree.ids = ids;
    match result {
        Ok(made) => {
            tree.made.insert(id, made);
            Ok(made)
        }
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Err(not_made(id, error)),
        Err(error) => Err(failed(&format!("process {maker_pid} making {id}"), error)),
    }
}

/// Waits until a thread has left its process.
fn wait_until_gone(target: &SkeletonTarget, tid: Pid) -> io::Result<()> {
    let begin = Instant::now();
    while target.proc().thread(tid).is_ok() {
        if begin.elapsed() > Duration::from_secs(10) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    Ok(())
}

/// Adds a `clone3`; the child starts in the agent, on the lane's own stack.
fn push_clone(
    batch: &mut Batch,
    lane: &Channel,
    id: Option<Pid>,
    flags: i32,
    exit_signal: i32,
) -> ckpt_core::batch::CallId {
    let (stack, stack_size) = lane.stack();
    let arguments = CloneArguments {
        flags: flags as u64,
        exit_signal: exit_signal as u64,
        stack,
        stack_size,
        set_tid_size: id.is_some().into(),
        ..CloneArguments::default()
    };
    let place = batch.words(&arguments.words());
    if let Some(id) = id {
        let set_tid = batch.bytes(&id.0.to_ne_bytes());
        batch.pointer(place, 64, set_tid);
    }
    batch.try_call(Sysno::clone3, args![place, size_of::<CloneArguments>()])
}

/// Has a process make one of its other threads.
fn make_thread(tree: &mut SkeletonTree, process: usize, thread: usize) -> Result<(), RestoreError> {
    let flags = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM;
    let target = tree.target(process);
    let tid = target.tids[thread];
    let lane = target.channels[thread].again();
    let made = make_task(tree, process, tid, &lane, flags, 0)?;
    tree.target(process).tids[thread] = made;
    Ok(())
}

/// Has a process make a child that ends at once.
fn make_zombie(tree: &mut SkeletonTree, image: &Image, layout: &Layout, zombie: usize) -> Result<(), RestoreError> {
    let offset = layout.zombie_lanes[zombie];
    let zombie = &image.zombies[zombie];
    let task = &zombie.task;
    let parent = image.process(task.ppid).expect("its parent is there");
    let lane = zombie_lane(tree, zombie, offset, layout.base).map_err(target_failed(task.pid))?;
    make_task(tree, parent, task.pid, &lane, 0, task.exit_signal).map(drop)
}

/// A lane whose thread finds its work as soon as it is there, and ends: a zombie to be.
fn zombie_lane(tree: &SkeletonTree, zombie: &Zombie, offset: usize, base: u64) -> Result<Channel, TargetError> {
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
    let ourselves = batch.call(Sysno::getpid, args![]);
    batch.call(Sysno::kill, args![ourselves, signal]);
    // Not reached: a signal to oneself is delivered before the call returns.
    batch.call(Sysno::exit_group, args![1]);
    lane.send(&batch)?;
    Ok(lane)
}

/// Puts every process into its group.
fn join_groups(tree: &mut SkeletonTree, image: &Image) -> Result<(), RestoreError> {
    // Leaders first: the group has to be there.
    for leaders in [true, false] {
        for (index, process) in image.processes.iter().enumerate() {
            let task = &process.task;
            let is_leader = task.pgid == task.pid;
            if is_leader != leaders || task.sid == task.pid {
                continue;
            }
            if !is_leader && image.process(task.pgid).is_none() {
                // The group that the root was in, from outside of the tree: a job of this shell. Others are refused.
                continue;
            }
            let mut batch = Batch::new();
            batch.call(Sysno::setpgid, args![0, if is_leader { 0 } else { task.pgid.0 }]);
            tree.target(index).run(&batch).map_err(target_failed(task.pid))?;
        }
    }
    // Those that have ended are put there by their parents.
    for zombie in &image.zombies {
        let task = &zombie.task;
        let Some(parent) = image.process(task.ppid) else { continue };
        let mut batch = Batch::new();
        if task.pgid != task.pid {
            batch.call(Sysno::setpgid, args![task.pid.0, task.pgid.0]);
        }
        // Until its end is there to be waited for, and stays so.
        let options = libc::WEXITED | libc::WNOWAIT | libc::__WALL;
        batch.call(Sysno::waitid, args![libc::P_PID, task.pid.0, 0, options, 0]);
        tree.target(parent).run(&batch).map_err(target_failed(task.pid))?;
    }
    Ok(())
}

impl SkeletonTarget {
    /// The process is there now, with an id of its own or another.
    fn open(&mut self, pid: Pid) -> Result<(), RestoreError> {
        self.task.pid = pid;
        self.tids[0] = pid;
        let process = Process::open(self.task.pid).map_err(|error| failed("a process of the skeleton", error))?;
        self.process = Some(process);
        Ok(())
    }

    /// Adds the calls that close everything but its socket.
    fn close_others(&self, batch: &mut Batch) {
        let agent_fd = self.agent_fd.0;
        batch.call(Sysno::close_range, args![0, agent_fd - 1, 0]);
        batch.call(Sysno::close_range, args![agent_fd + 1, u32::MAX, 0]);
    }

    pub(crate) fn ours(&self) -> Range<u64> {
        self.ours.clone()
    }

    fn process(&self) -> &Process {
        self.process.as_ref().expect("the process was made")
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
        let pid = self.tids[0];
        read_memory(from, buffer, pid, |batch| self.run_on(0, batch))
    }

    fn write(&mut self, to: RemotePtr, bytes: &[u8]) -> Result<(), TargetError> {
        let pid = self.tids[0];
        write_memory(to, bytes, pid, |batch| self.run_on(0, batch))
    }

    /// Only the process itself writes its memory.
    fn writer(&self) -> Option<Box<dyn MemoryWriter>> {
        None
    }

    fn fds_out(&mut self, fds: &[RemoteFd]) -> Result<Vec<OwnedFd>, TargetError> {
        self.channels[0].fds_out(fds, &mut || Ok(()))
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
        self.run(&closing(fds)).map(drop)
    }

    /// It ends when we are lost.
    fn hold_fds(&mut self, _numbers: std::ops::Range<i32>) {}

    fn compare(&self, _: Kcmp, _: u64, _: Pid, _: u64) -> Result<std::cmp::Ordering, TargetError> {
        Err(self.process().error("comparing skeletons", io::ErrorKind::Unsupported.into()))
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
        batch.call(Sysno::arch_prctl, args![ARCH_SET_FS, general.fs_base]);
        batch.call(Sysno::arch_prctl, args![ARCH_SET_GS, general.gs_base]);
        if let Some(rseq) = context.rseq {
            batch.call(Sysno::rseq, args![rseq.address, rseq.size, 0, rseq.signature]);
        }
        if frame::has_tiles(&context.registers.xsave) {
            // Before that, the kernel has no room for them in this thread.
            batch.use_tiles();
        }
        self.run_on(thread, &batch)?;
        self.contexts[thread] = Some(context.clone());
        Ok(())
    }
}

impl SkeletonTree {
    /// The table of virtual ids that the processes are to get, if they need one.
    pub(crate) fn table(&self) -> Option<Vec<u64>> {
        let pairs: Vec<(Pid, Pid)> = self.made.iter().map(|(id, real)| (*id, *real)).filter(|(a, b)| a != b).collect();
        (self.ids.others() || self.has_table).then(|| virtual_ids::table(&pairs))
    }

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
        let processes: Vec<Process> = self.each().filter_map(|target| target.process.take()).collect();
        let root = self.each().next().map(|target| target.task.pid);
        let root = root.and_then(|root| self.made.get(&root).copied());
        // Each agent ends with its socket.
        self.targets.clear();
        for process in &processes {
            // Killed as well: a batch in progress would be finished first.
            let _ = sys::pidfd_send_signal(process.pidfd().as_fd(), libc::SIGKILL);
            let mut ended = [PollFd::new(process.pidfd().as_fd(), PollFlags::POLLIN)];
            let _ = poll(&mut ended, PollTimeout::from(2000u16));
        }
        if let (Some(root), false) = (root, processes.is_empty()) {
            sys::reap(root);
        }
    }
}

impl Skeleton for SkeletonTree {
    fn targets(&mut self) -> &mut [Box<dyn Target>] {
        &mut self.targets
    }

    fn real_ids(&self) -> Option<Names> {
        let made = self.made.clone();
        self.ids.others().then(|| Box::new(move |id| made.get(&id).copied().unwrap_or(id)) as Names)
    }

    fn release(self: Box<Self>) -> Result<(), RestoreError> {
        crate::release::release(*self)
    }
}

/// Bytes that a frame for these registers takes.
pub fn frame_size(context: &Context) -> u64 {
    frame::size(context.registers.xsave.len()) as u64
}
