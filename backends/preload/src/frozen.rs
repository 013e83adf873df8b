//! A frozen tree: batches through the agents, and letting go.
//!
//! What other backends ask the kernel by `kcmp` and `ptrace` is found here by what an ordinary user may do:
//!
//! - *One open file description or two:* the status flag `O_NONBLOCK` belongs to the description. A batch turns it on one
//!   descriptor, looks at the other in `/proc/PID/fdinfo`, and turns it back. Only descriptors that agree in inode,
//!   offset, flags and mount are asked; where these are many, in one go by `F_SETSIG`.
//! - *What an epoll watches:* adding what is there already says EEXIST.
//! - *Descriptor tables that are shared* show the agent's socket; *a shared umask* shows what another thread sets.
//! - *Pending signals* are taken and queued again, in one batch, by the thread that has them.
//! - *Memory* is read and written by the process itself, through a memfd or its own `/proc/self/mem`.

use std::any::Any;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use ckpt_agent::process::Process;
use ckpt_agent::{Channel, Copied};
use ckpt_core::backend::{DumpOptions, Frozen, FrozenProcess};
use ckpt_core::batch::{Arg, Batch, CallId, Replies, Slot, Sysno};
use ckpt_core::error::{DumpError, Refusal};
use ckpt_core::image::Zombie;
use ckpt_core::names::Names;
use ckpt_core::procfs::ProcDir;
use ckpt_core::resource::descriptors::FdInfo;
use ckpt_core::{
    Context, EpollSlot, Footprint, General, Kcmp, MemoryWriter, NotCopied, Pid, PrivatePages, Queue, Registers,
    RemoteFd, RemotePtr, Rseq, SigInfo, Target, TargetError, args,
};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::freeze::{self, StoppedProcess, StoppedThread};
use crate::protocol::{Arrival, HANDLER_STACK, SIGNAL};
use crate::{second, sys, virtual_ids};

/// A frozen process.
pub struct FrozenTarget {
    process: Process,
    tids: Vec<Pid>,
    agents: Arc<Agents>,
    index: usize,
    region: (u64, usize),
    socket: RemoteFd,
    threads: Vec<Found>,
    rseq_offset: Option<i64>,
    /// Where the header of its virtual ids is, and their generation.
    ids: (u64, u64),
}

/// Where a thread was.
struct Found {
    arrival: Arrival,
    xsave: Vec<u8>,
}

/// The agents of a whole tree: a question about two processes is asked in one of them.
pub struct Agents {
    pids: Vec<Pid>,
    agents: Vec<Mutex<Agent>>,
    /// Which open file description each descriptor leads to, once somebody has asked.
    files: Mutex<HashMap<(usize, i32), usize>>,
}

/// Inode, offset, flags, mount: descriptors that differ in one of them have nothing in common.
type Likeness = ((u64, u64), i64, i32, i32);

/// The agent of one process.
struct Agent {
    pid: Pid,
    /// Of the main thread.
    channel: Channel,
    /// Of the others; the first is not used.
    lanes: Vec<Channel>,
    borrowed: Vec<RemoteFd>,
}

impl Agent {
    fn lane(&mut self, thread: usize) -> &mut Channel {
        if thread == 0 { &mut self.channel } else { &mut self.lanes[thread] }
    }

    fn run_on(&mut self, thread: usize, batch: &Batch) -> Result<Replies, TargetError> {
        let pid = self.pid;
        self.lane(thread).run(batch, &mut alive(pid))
    }

    fn run(&mut self, batch: &Batch) -> Result<Replies, TargetError> {
        self.run_on(0, batch)
    }
}

/// Whether a process is there, asked while it does not answer. A thread's lane does not notice its end.
pub fn alive(pid: Pid) -> impl FnMut() -> Result<(), TargetError> {
    move || match ProcDir::open(pid).and_then(|proc| proc.stat_line()) {
        Ok(stat) if stat.state != 'Z' => Ok(()),
        _ => Err(TargetError::Gone { pid }),
    }
}

impl Agents {
    fn index(&self, pid: Pid) -> Option<usize> {
        self.pids.iter().position(|known| *known == pid)
    }

    fn lock(&self, index: usize) -> MutexGuard<'_, Agent> {
        self.agents[index].lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Orders the open file descriptions that two descriptors lead to.
    fn compare(&self, one: (usize, i32), other: (usize, i32)) -> Result<Ordering, TargetError> {
        let mut files = self.files.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // Also anew when descriptors have come that are ours for a while: no number stands for two files in a dump.
        if !files.contains_key(&one) || !files.contains_key(&other) {
            *files = self.classify()?;
        }
        let description = |descriptor: (usize, i32)| {
            files.get(&descriptor).ok_or_else(|| {
                let pid = self.pids[descriptor.0];
                TargetError::Driver { pid, operation: "comparing descriptors", source: io::ErrorKind::NotFound.into() }
            })
        };
        Ok(description(one)?.cmp(description(other)?))
    }

    /// Finds out for all descriptors of the tree which lead to one description.
    fn classify(&self) -> Result<HashMap<(usize, i32), usize>, TargetError> {
        let mut alike: BTreeMap<Likeness, Vec<(usize, i32)>> = BTreeMap::new();
        for (process, &pid) in self.pids.iter().enumerate() {
            let failed = |source| TargetError::Driver { pid, operation: "listing descriptors", source };
            let numbers = ProcDir::open(pid).and_then(|proc| proc.numbers("fd")).map_err(failed)?;
            let socket = self.lock(process).channel.their_socket();
            for fd in numbers.into_iter().filter(|&fd| Some(RemoteFd(fd)) != socket) {
                let (info, inode) = self.info((process, fd))?;
                let flags = info.flags & !libc::O_CLOEXEC;
                alike.entry((inode, info.position, flags, info.mount)).or_default().push((process, fd));
            }
        }
        let mut classes = HashMap::new();
        let mut next = 0;
        for (likeness, members) in alike {
            // What was opened by O_PATH has no state that could be shared.
            let has_no_state = likeness.2 & libc::O_PATH != 0;
            let labels = match members.len() {
                1 => vec![0],
                count if has_no_state => (0..count).collect(),
                2..=6 => self.label_by_pairs(&members)?,
                _ => self.label_by_signals(&members)?,
            };
            let most = labels.iter().copied().max().unwrap_or(0);
            classes.extend(members.into_iter().zip(labels).map(|(member, label)| (member, next + label)));
            next += most + 1;
        }
        Ok(classes)
    }

    /// For few descriptors: each is compared with those before it.
    fn label_by_pairs(&self, members: &[(usize, i32)]) -> Result<Vec<usize>, TargetError> {
        let mut labels: Vec<usize> = Vec::with_capacity(members.len());
        for (index, &member) in members.iter().enumerate() {
            let mut label = index;
            for (other, &known) in members[..index].iter().enumerate() {
                if labels[other] == other && self.is_one_description(known, member)? {
                    label = other;
                    break;
                }
            }
            labels.push(label);
        }
        Ok(labels)
    }

    /// For many: the signal of asynchronous I/O (`F_SETSIG`) belongs to the description, and takes one of 64 values. Every
    /// descriptor writes a digit of its index there, and then reads which index was written last. It means nothing unless
    /// asynchronous I/O is on; where it is, or a signal was chosen, they are compared in pairs.
    fn label_by_signals(&self, members: &[(usize, i32)]) -> Result<Vec<usize>, TargetError> {
        const F_SETSIG: i32 = 10;
        const F_GETSIG: i32 = 11;
        const DIGITS: usize = 64;
        let each = |number: i32, value: &dyn Fn(usize) -> i32| -> Result<Vec<u64>, TargetError> {
            let mut values = Vec::with_capacity(members.len());
            let mut start = 0;
            while start < members.len() {
                let process = members[start].0;
                let rest = members[start..].iter().take(ckpt_core::batch::MAX_CALLS);
                let end = start + rest.take_while(|member| member.0 == process).count();
                let mut batch = Batch::new();
                let calls: Vec<CallId> = (start..end)
                    .map(|index| batch.call(Sysno::fcntl, args![members[index].1, number, value(index)]))
                    .collect();
                let replies = self.lock(process).run(&batch)?;
                values.extend(calls.into_iter().map(|call| replies.value(call)));
                start = end;
            }
            Ok(values)
        };
        if each(F_GETSIG, &|_| 0)?.iter().any(|&signal| signal != 0) {
            return self.label_by_pairs(members);
        }
        let mut labels = vec![0; members.len()];
        let mut weight = 1;
        while weight < members.len() {
            each(F_SETSIG, &|index| (index / weight % DIGITS) as i32)?;
            for (label, digit) in labels.iter_mut().zip(each(F_GETSIG, &|_| 0)?) {
                *label += digit as usize * weight;
            }
            weight *= DIGITS;
        }
        each(F_SETSIG, &|_| 0)?;
        Ok(labels)
    }

    fn info(&self, (process, fd): (usize, i32)) -> Result<(FdInfo, (u64, u64)), TargetError> {
        let pid = self.pids[process];
        let failed = |source| TargetError::Driver { pid, operation: "reading fdinfo", source };
        let path = format!("/proc/{pid}/fdinfo/{fd}");
        let info = std::fs::read_to_string(&path).map_err(failed)?;
        let info = FdInfo::parse(&info).ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))?;
        let stat = nix::sys::stat::stat(format!("/proc/{pid}/fd/{fd}").as_str());
        let stat = stat.map_err(|errno| failed(errno.into()))?;
        Ok((info, (stat.st_dev, stat.st_ino)))
    }

    /// Of two that are alike.
    fn is_one_description(&self, one: (usize, i32), other: (usize, i32)) -> Result<bool, TargetError> {
        let (mine, _) = self.info(one)?;
        let flags = mine.flags & !libc::O_CLOEXEC;
        let mut batch = Batch::new();
        let path = batch.string(format!("/proc/{}/fdinfo/{}", self.pids[other.0], other.1).as_bytes());
        let text = batch.room(256);
        let file = batch.call(Sysno::openat, args![libc::AT_FDCWD, path, libc::O_RDONLY | libc::O_CLOEXEC]);
        batch.call(Sysno::fcntl, args![one.1, libc::F_SETFL, flags ^ libc::O_NONBLOCK]);
        let read = batch.try_call(Sysno::read, args![file, text, text.len() - 1]);
        batch.try_call(Sysno::fcntl, args![one.1, libc::F_SETFL, flags]);
        batch.call(Sysno::close, args![file]);
        let replies = self.lock(one.0).run(&batch)?;
        let pid = self.pids[one.0];
        let read = replies.result(read);
        let failed = |source| TargetError::Driver { pid, operation: "comparing descriptors", source };
        let length = read.map_err(|errno| failed(errno.into()))? as usize;
        let text = String::from_utf8_lossy(&replies.bytes(text)[..length]).into_owned();
        // Cut off after what matters; a half line at the end is among the rest.
        let now = FdInfo::parse(&text).ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))?;
        Ok(now.flags & !libc::O_CLOEXEC == flags ^ libc::O_NONBLOCK)
    }

    /// Whether an entry of an epoll, under the number `slot.target`, is a file that the same process has as `fd`. Where
    /// that number is closed, it is lent to the file for the question.
    fn is_watched(&self, process: usize, epoll: i32, slot: EpollSlot, fd: i32) -> Result<bool, TargetError> {
        let number = slot.target;
        let (info, _) = self.info((process, epoll))?;
        let same = info.rest.lines().filter(|line| {
            let rest = line.strip_prefix("tfd:");
            rest.and_then(|rest| rest.split_whitespace().next()?.parse().ok()) == Some(number)
        });
        if same.count() > 1 {
            let why =
                format!("an epoll watches several files under the number {number}, and they cannot be told apart");
            return Err(TargetError::Driver {
                pid: self.pids[process],
                operation: "comparing descriptors",
                source: io::Error::other(why),
            });
        }
        let mut agent = self.lock(process);
        let lent = number != fd;
        if lent && std::fs::symlink_metadata(format!("/proc/{}/fd/{number}", self.pids[process])).is_ok() {
            // It leads elsewhere now.
            return Ok(false);
        }
        let mut batch = Batch::new();
        let event = batch.bytes(&[0; 12]);
        if lent {
            batch.call(Sysno::dup3, args![fd, number, libc::O_CLOEXEC]);
        }
        let added = batch.try_call(Sysno::epoll_ctl, args![epoll, libc::EPOLL_CTL_ADD, number, event]);
        if lent {
            batch.call(Sysno::close, args![number]);
        }
        let replies = agent.run(&batch)?;
        match replies.result(added) {
            Err(Errno::EEXIST) => Ok(true),
            Err(_) => Ok(false),
            Ok(_) => {
                let mut batch = Batch::new();
                if lent {
                    batch.call(Sysno::dup3, args![fd, number, libc::O_CLOEXEC]);
                }
                batch.call(Sysno::epoll_ctl, args![epoll, libc::EPOLL_CTL_DEL, number, 0]);
                if lent {
                    batch.call(Sysno::close, args![number]);
                }
                agent.run(&batch)?;
                Ok(false)
            }
        }
    }
}

impl Agents {
    /// The same about a file of another process, which is brought over for it.
    fn is_watched_from_afar(
        &self,
        process: usize,
        epoll: i32,
        slot: EpollSlot,
        (other, fd): (usize, i32),
    ) -> Result<bool, TargetError> {
        let file = {
            let mut agent = self.lock(other);
            let pid = agent.pid;
            agent.channel.fds_out(&[RemoteFd(fd)], &mut alive(pid))?
        };
        let brought = {
            let mut agent = self.lock(process);
            let pid = agent.pid;
            agent.channel.fds_in(&[file[0].as_fd()], slot.target + 1, &mut alive(pid))?[0]
        };
        let watched = self.is_watched(process, epoll, slot, brought.0);
        self.lock(process).run(&closing(&[brought]))?;
        watched
    }
}

/// Freezes the tree under `root`.
pub fn freeze(root: Pid, options: &DumpOptions) -> Result<Box<dyn Frozen>, DumpError> {
    let (stopped, zombies) = freeze::freeze(root, options)?;
    let mut tree = FrozenTree { processes: Vec::new(), zombies, targets: Vec::new() };
    let mut agents = Vec::new();
    let mut targets = Vec::new();
    for (index, stopped) in stopped.into_iter().enumerate() {
        let StoppedProcess { frozen, process, threads, channel, base, size, rseq_offset, ids } = stopped;
        let tids: Vec<Pid> = threads.iter().map(|thread| thread.tid).collect();
        let socket = channel.their_socket().expect("the main lane has a socket");
        let (lanes, threads) = threads
            .into_iter()
            .map(|StoppedThread { lane, arrival, xsave, .. }| (lane, Found { arrival, xsave }))
            .unzip();
        agents.push((tids[0], Mutex::new(Agent { pid: tids[0], channel, lanes, borrowed: Vec::new() })));
        tree.processes.push(frozen);
        targets.push((process, tids, index, (base, size), socket, threads, rseq_offset, ids));
    }
    let (pids, agents) = agents.into_iter().unzip();
    let agents = Arc::new(Agents { pids, agents, files: Mutex::default() });
    for (process, tids, index, region, socket, threads, rseq_offset, ids) in targets {
        let agents = agents.clone();
        tree.targets.push(Box::new(FrozenTarget {
            process,
            tids,
            agents,
            index,
            region,
            socket,
            threads,
            rseq_offset,
            ids,
        }));
    }
    let mut refusals = Vec::new();
    let tables = tables(&mut tree);
    for target in tree.each() {
        target.examine(&tables, &mut refusals).map_err(|source| {
            let pid = target.tids[0];
            DumpError::Target { resource: "tasks", pid, source }
        })?;
    }
    if refusals.is_empty() { Ok(Box::new(tree)) } else { Err(DumpError::Unsupported(refusals)) }
}

/// The processes, by index, in whose descriptor table an agent's socket is, by its link.
type Tables = HashMap<OsString, Vec<usize>>;

/// Looks in every process at the numbers that agents' sockets have somewhere.
fn tables(tree: &mut FrozenTree) -> Tables {
    let numbers: BTreeSet<i32> = tree.each().map(|target| target.socket.0).collect();
    let mut tables = Tables::new();
    for (index, target) in tree.each().enumerate() {
        for link in numbers.iter().filter_map(|number| target.process.proc.link(format!("fd/{number}")).ok()) {
            tables.entry(link).or_default().push(index);
        }
    }
    tables
}

/// How a saved frame keeps its own facts about the xsave area (`struct _fpx_sw_bytes`).
const SOFTWARE_BYTES: usize = 464;
const SMALLEST_XSAVE: usize = 576;

impl FrozenTarget {
    fn error(&self, operation: &'static str, source: io::Error) -> TargetError {
        TargetError::Driver { pid: self.tids[0], operation, source }
    }

    fn agent(&self) -> MutexGuard<'_, Agent> {
        self.agents.lock(self.index)
    }

    /// What of the sharing of kernel state is not supported, so that [`compare`](Target::compare) needs to know no more.
    /// Of two processes, the later is told of the earlier.
    fn examine(&self, tables: &Tables, refusals: &mut Vec<Refusal>) -> Result<(), TargetError> {
        let pid = self.tids[0];
        let mut refuse = |pid: Pid, subject: String, why: String, help: &str| {
            refusals.push(Refusal { resource: "tasks", pid: Some(pid), subject, why, help: help.to_string() });
        };
        let socket = format!("fd/{}", self.socket);
        let ours = self.process.proc.link(&socket).map_err(|source| self.error("reading descriptors", source))?;
        for tid in &self.tids[1..] {
            if self.process.proc.link(format!("task/{tid}/{socket}")).ok().as_ref() != Some(&ours) {
                let why = "it does not share the descriptor table with its process, which is not supported";
                refuse(pid, format!("thread {tid}"), why.into(), "have the thread not call unshare");
            }
        }
        let seen_in = tables.get(&ours).map_or(&[][..], Vec::as_slice);
        for &other in seen_in.iter().filter(|&&other| other > self.index) {
            let why = format!("it shares the descriptor table with process {pid}, which is not supported");
            let help = "have the program use fork, not clone(CLONE_FILES)";
            refuse(self.agents.pids[other], String::new(), why, help);
        }
        let later = &self.agents.pids[self.index + 1..];
        let asked: Vec<Pid> = self.tids[1..].iter().chain(later).copied().collect();
        for asked in asked.chunks(120) {
            for (&who, shares) in asked.iter().zip(self.shares_umask(asked)?) {
                let is_thread = self.tids.contains(&who);
                if is_thread && !shares {
                    let why = "it does not share root, current directory and umask with its process";
                    refuse(pid, format!("thread {who}"), why.into(), "have the thread not call unshare");
                }
                if !is_thread && shares {
                    let why = format!("it shares root, current directory and umask with process {pid}");
                    refuse(who, String::new(), why, "have the program use fork, not clone(CLONE_FS)");
                }
            }
        }
        Ok(())
    }

    /// Whether threads and processes have the umask that this one sets.
    fn shares_umask(&self, others: &[Pid]) -> Result<Vec<bool>, TargetError> {
        let probe = (sys::random().map_err(|source| self.error("getrandom", source))? & 0o777) as i32;
        let mut shares = self.have_umask(others, probe)?;
        // Once more with another value, for those that had the first by chance.
        let again: Vec<Pid> = others.iter().zip(&shares).filter(|(_, same)| **same).map(|(&other, _)| other).collect();
        if !again.is_empty() {
            let confirmed = self.have_umask(&again, probe ^ 0o111)?;
            shares.iter_mut().filter(|same| **same).zip(confirmed).for_each(|(same, confirmed)| *same = confirmed);
        }
        Ok(shares)
    }

    /// Which of the others show a umask while this process has it.
    fn have_umask(&self, others: &[Pid], umask: i32) -> Result<Vec<bool>, TargetError> {
        let mut batch = Batch::new();
        let before = batch.call(Sysno::umask, args![umask]);
        let texts: Vec<Slot> = others
            .iter()
            .map(|other| {
                let path = batch.string(format!("/proc/{other}/status").as_bytes());
                let text = batch.room(128);
                let file = batch.try_call(Sysno::openat, args![libc::AT_FDCWD, path, libc::O_RDONLY | libc::O_CLOEXEC]);
                batch.try_call(Sysno::read, args![file, text, text.len() - 1]);
                batch.try_call(Sysno::close, args![file]);
                text
            })
            .collect();
        batch.call(Sysno::umask, args![before]);
        let replies = self.agent().run(&batch)?;
        let shown = |text: Slot| {
            let text = String::from_utf8_lossy(replies.bytes(text)).into_owned();
            let line = text.lines().find_map(|line| line.strip_prefix("Umask:"))?;
            i32::from_str_radix(line.trim().trim_end_matches('\0'), 8).ok()
        };
        Ok(texts.into_iter().map(|text| shown(text) == Some(umask)).collect())
    }

    /// The registration of a thread: it is known where glibc has it, and the kernel refuses exactly that one (EBUSY).
    fn rseq(&self, thread: usize) -> Result<Option<Rseq>, TargetError> {
        /// `RSEQ_SIG` of x86.
        const SIGNATURE: u32 = 0x5305_3053;
        const UNREGISTER: i32 = 1;
        let fs_base = self.threads[thread].arrival.fs_base;
        let address = self.rseq_offset.map_or(0, |offset| fs_base.wrapping_add_signed(offset));
        // Where glibc has none, any aligned address in the lane will do: if the thread has no registration, it gets one for
        // a moment.
        let mut batch = Batch::new();
        let place = batch.room(128);
        // glibc registers 32 bytes, or as many as the kernel has features for.
        let sizes = [32u32, 33, 28, 40, 48, 64];
        let aligned = place.after((64 - place.offset() % 64) % 64);
        let (known, calls): (bool, Vec<_>) = (
            address != 0,
            sizes
                .iter()
                .map(|&size| match address {
                    0 => batch.try_call(Sysno::rseq, args![aligned, 32, 0, SIGNATURE]),
                    address => batch.try_call(Sysno::rseq, args![address, size, 0, SIGNATURE]),
                })
                .collect(),
        );
        let undo = batch.try_call(Sysno::rseq, args![aligned, 32, UNREGISTER, SIGNATURE]);
        let replies = self.agents.lock(self.index).run_on(thread, &batch)?;
        let _ = undo;
        for (call, size) in calls.iter().zip(sizes) {
            match replies.result(*call) {
                Err(Errno::EBUSY) if known => {
                    let address = RemotePtr(address);
                    return Ok(Some(Rseq { address, size, signature: SIGNATURE, flags: 0 }));
                }
                // It had none, and has one now: away with it.
                Ok(_) if known => {
                    let mut batch = Batch::new();
                    batch.call(Sysno::rseq, args![address, size, UNREGISTER, SIGNATURE]);
                    self.agents.lock(self.index).run_on(thread, &batch)?;
                    return Ok(None);
                }
                Ok(_) => return Ok(None),
                Err(Errno::ENOSYS) => return Ok(None),
                Err(_) => {}
            }
        }
        let why = "a thread has a restartable sequence (rseq) that its C library has not registered";
        Err(self.error("registers", io::Error::other(why)))
    }

    /// The pending signals of a set, which are pending again afterwards, in the same order.
    fn take_and_put_back(
        &mut self,
        queue: Queue,
        thread: usize,
        tid: Pid,
        set: u64,
    ) -> Result<Vec<SigInfo>, TargetError> {
        // Both in one batch, which is finished even if we are lost.
        const MOST: usize = 28;
        let mut batch = Batch::new();
        let set = batch.words(&[set]);
        let now = batch.words(&[0, 0]);
        let taken: Vec<_> = (0..MOST)
            .map(|_| {
                let info = batch.room(128);
                (info, batch.try_call(Sysno::rt_sigtimedwait, args![set, info, now, 8]))
            })
            .collect();
        for &(info, signal) in &taken {
            match queue {
                Queue::Shared => batch.try_call(Sysno::rt_sigqueueinfo, args![self.tids[0].0, signal, info]),
                Queue::Thread(_) => {
                    batch.try_call(Sysno::rt_tgsigqueueinfo, args![self.tids[0].0, tid.0, signal, info])
                }
            };
        }
        let replies = self.agent().run_on(thread, &batch)?;
        let found: Vec<SigInfo> = taken
            .iter()
            .filter(|(_, signal)| replies.result(*signal).is_ok())
            .map(|(info, _)| replies.bytes(*info).try_into().expect("128 bytes"))
            .collect();
        if found.len() == MOST {
            let why = "more signals of one number are pending than can be taken and put back at once";
            return Err(self.error("taking pending signals", io::Error::other(why)));
        }
        Ok(found.into_iter().filter(|info| !second::is_of_shim(info)).collect())
    }

    /// Whether a handler of the program will run when a thread goes on.
    fn is_signalled(&self, thread: usize) -> Result<bool, TargetError> {
        let status = self.process.proc.thread_status(self.tids[thread]);
        let status = status.map_err(|source| self.error("reading status", source))?;
        let mask = |name: &str| status.mask(name).unwrap_or(0);
        let blocked = self.threads[thread].arrival.context[37];
        let pending = (mask("SigPnd") | mask("ShdPnd")) & !blocked & mask("SigCgt");
        Ok(pending & !(1 << (SIGNAL - 1)) != 0)
    }
}

/// The registers of a signal frame.
fn general(context: &[u64; 38], fs_base: u64, gs_base: u64) -> General {
    let segments = context[23];
    General {
        r8: context[5],
        r9: context[6],
        r10: context[7],
        r11: context[8],
        r12: context[9],
        r13: context[10],
        r14: context[11],
        r15: context[12],
        rdi: context[13],
        rsi: context[14],
        rbp: context[15],
        rbx: context[16],
        rdx: context[17],
        rax: context[18],
        rcx: context[19],
        rsp: context[20],
        rip: context[21],
        eflags: context[22],
        cs: segments & 0xffff,
        gs: segments >> 16 & 0xffff,
        fs: segments >> 32 & 0xffff,
        ss: segments >> 48,
        orig_rax: u64::MAX,
        fs_base,
        gs_base,
        ..General::default()
    }
}

/// The registers that run an interrupted call again; as the shim has it.
fn wind_back(general: &mut General, number: i64) {
    general.rip -= 2;
    general.rax = number as u64;
    if number == libc::SYS_nanosleep && general.rsi != 0 {
        general.rdi = general.rsi;
    }
    const ABSOLUTE: u64 = 1;
    if number == libc::SYS_clock_nanosleep && general.r10 != 0 && general.rsi & ABSOLUTE == 0 {
        general.rdx = general.r10;
    }
}

/// Bytes of memory that one batch reads or writes.
const AT_ONCE: usize = 128 * 1024;

/// The two ways for a process to move bytes between its memory and a batch.
#[derive(Clone, Copy)]
enum By {
    /// Through a memfd of a moment: asks for no rights, but for memory that may be read or written.
    Memfd,
    /// Through `/proc/self/mem`, whatever the protection is.
    Mem,
}

/// Adds the calls that copy `slot` from or to an address. Gives the one that touches the memory.
fn move_bytes(batch: &mut Batch, by: By, write: bool, slot: Slot, address: u64) -> CallId {
    match by {
        By::Mem => {
            let path = batch.string(b"/proc/self/mem");
            let file = batch.try_call(Sysno::openat, args![libc::AT_FDCWD, path, libc::O_RDWR | libc::O_CLOEXEC]);
            let call = if write { Sysno::pwrite64 } else { Sysno::pread64 };
            let moved = batch.try_call(call, args![file, slot, slot.len(), address]);
            batch.try_call(Sysno::close, args![file]);
            moved
        }
        By::Memfd => {
            let name = batch.string(b"ckpt");
            let file = batch.call(Sysno::memfd_create, args![name, libc::MFD_CLOEXEC]);
            let moved;
            if write {
                batch.try_call(Sysno::pwrite64, args![file, slot, slot.len(), 0]);
                moved = batch.try_call(Sysno::pread64, args![file, address, slot.len(), 0]);
            } else {
                moved = batch.try_call(Sysno::pwrite64, args![file, address, slot.len(), 0]);
                batch.try_call(Sysno::pread64, args![file, slot, slot.len(), 0]);
            }
            batch.try_call(Sysno::close, args![file]);
            moved
        }
    }
}

/// Moves some bytes, in whichever way works.
fn move_part(
    batch_of: impl Fn(By) -> (Batch, Slot, CallId),
    length: usize,
    run: &mut impl FnMut(&Batch) -> Result<Replies, TargetError>,
) -> Result<Vec<u8>, Result<TargetError, io::Error>> {
    let mut last = io::Error::from(io::ErrorKind::UnexpectedEof);
    for by in [By::Memfd, By::Mem] {
        let (batch, slot, moved) = batch_of(by);
        let replies = run(&batch).map_err(Ok)?;
        match replies.result(moved) {
            Ok(moved) if moved == length as u64 => return Ok(replies.bytes(slot).to_vec()),
            Ok(_) => {}
            Err(errno) => last = errno.into(),
        }
    }
    Err(Err(last))
}

/// Reads memory of a target by itself.
pub fn read_memory(
    from: RemotePtr,
    buffer: &mut [u8],
    pid: Pid,
    mut run: impl FnMut(&Batch) -> Result<Replies, TargetError>,
) -> Result<(), TargetError> {
    let mut at = from.0;
    for part in buffer.chunks_mut(AT_ONCE) {
        let batch_of = |by| {
            let mut batch = Batch::new();
            let slot = batch.room(part.len());
            let moved = move_bytes(&mut batch, by, false, slot, at);
            (batch, slot, moved)
        };
        let bytes = move_part(batch_of, part.len(), &mut run).map_err(|error| {
            error.unwrap_or_else(|source| TargetError::Driver { pid, operation: "reading memory", source })
        })?;
        part.copy_from_slice(&bytes);
        at += part.len() as u64;
    }
    Ok(())
}

/// Writes memory of a target by itself.
pub fn write_memory(
    to: RemotePtr,
    bytes: &[u8],
    pid: Pid,
    mut run: impl FnMut(&Batch) -> Result<Replies, TargetError>,
) -> Result<(), TargetError> {
    let mut at = to.0;
    for part in bytes.chunks(AT_ONCE) {
        let batch_of = |by| {
            let mut batch = Batch::new();
            let slot = batch.bytes(part);
            let moved = move_bytes(&mut batch, by, true, slot, at);
            (batch, slot, moved)
        };
        move_part(batch_of, part.len(), &mut run).map_err(|error| {
            error.unwrap_or_else(|source| TargetError::Driver { pid, operation: "writing memory", source })
        })?;
        at += part.len() as u64;
    }
    Ok(())
}

/// A batch that closes descriptors.
pub fn closing(fds: &[RemoteFd]) -> Batch {
    let mut batch = Batch::new();
    for &fd in fds {
        batch.call(Sysno::close, args![fd]);
    }
    batch
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

    fn start(&mut self, thread: usize, batch: &Batch) -> Result<(), TargetError> {
        self.agent().lane(thread).send(batch)
    }

    fn finish(&mut self, thread: usize, batch: &Batch) -> Result<Replies, TargetError> {
        let pid = self.tids[0];
        self.agent().lane(thread).finish(batch, &mut alive(pid))
    }

    fn read(&mut self, from: RemotePtr, buffer: &mut [u8]) -> Result<(), TargetError> {
        read_memory(from, buffer, self.tids[0], |batch| self.agents.lock(self.index).run(batch))
    }

    fn write(&mut self, to: RemotePtr, bytes: &[u8]) -> Result<(), TargetError> {
        write_memory(to, bytes, self.tids[0], |batch| self.agents.lock(self.index).run(batch))
    }

    /// Only the process itself writes its memory.
    fn writer(&self) -> Option<Box<dyn MemoryWriter>> {
        None
    }

    fn fds_out(&mut self, fds: &[RemoteFd]) -> Result<Vec<OwnedFd>, TargetError> {
        let pid = self.tids[0];
        self.agent().channel.fds_out(fds, &mut alive(pid))
    }

    fn fds_in(&mut self, fds: &[BorrowedFd<'_>]) -> Result<Vec<RemoteFd>, TargetError> {
        let pid = self.tids[0];
        let mut agent = self.agent();
        let brought = agent.channel.fds_in(fds, 0, &mut alive(pid))?;
        agent.borrowed.extend(&brought);
        let borrowed = agent.borrowed.clone();
        agent.channel.set_borrowed(&borrowed);
        Ok(brought)
    }

    fn receive_fd(&self, batch: &mut Batch) -> Result<Arg, TargetError> {
        self.agent().channel.receive_one(batch)
    }

    fn send_fd(&mut self, fd: BorrowedFd<'_>) -> Result<(), TargetError> {
        self.agent().channel.pass(&[fd])
    }

    fn fds_done(&mut self, fds: &[RemoteFd]) -> Result<(), TargetError> {
        let mut agent = self.agent();
        // First: the number may be the program's the moment after.
        agent.borrowed.retain(|fd| !fds.contains(fd));
        let borrowed = agent.borrowed.clone();
        agent.channel.set_borrowed(&borrowed);
        agent.run(&closing(fds)).map(drop)
    }

    fn hold_fds(&mut self, numbers: std::ops::Range<i32>) {
        self.agent().channel.set_held(numbers);
    }

    fn compare(&self, kind: Kcmp, mine: u64, other: Pid, theirs: u64) -> Result<Ordering, TargetError> {
        let unsupported = || self.error("comparing processes", io::ErrorKind::Unsupported.into());
        match kind {
            Kcmp::File => {
                let other = self.agents.index(other).ok_or_else(unsupported)?;
                self.agents.compare((self.index, mine as i32), (other, theirs as i32))
            }
            Kcmp::EpollTarget(slot) => {
                let process = self.agents.index(other).ok_or_else(unsupported)?;
                let watched = if process == self.index {
                    self.agents.is_watched(process, theirs as i32, slot, mine as i32)?
                } else {
                    self.agents.is_watched_from_afar(process, theirs as i32, slot, (self.index, mine as i32))?
                };
                Ok(if watched { Ordering::Equal } else { Ordering::Greater })
            }
            // What is not shared as usual has been refused at the freeze.
            Kcmp::Vm | Kcmp::Files | Kcmp::Fs | Kcmp::Sighand if self.tids.contains(&other) => Ok(Ordering::Equal),
            Kcmp::Vm | Kcmp::Files | Kcmp::Fs | Kcmp::Sighand => Ok(self.tids[0].cmp(&other)),
            Kcmp::Sysvsem | Kcmp::Io => Err(unsupported()),
        }
    }

    fn file_of_handle(&self, mount: BorrowedFd<'_>, kind: i32, handle: &[u8]) -> Result<OwnedFd, TargetError> {
        self.process.file_of_handle(mount, kind, handle)
    }

    fn private_pages(&mut self, start: u64, end: u64) -> Result<PrivatePages, TargetError> {
        self.process.private_pages(start, end)
    }

    fn covered(&self) -> Vec<(RemotePtr, Vec<u8>)> {
        Vec::new()
    }

    fn footprint(&self) -> Footprint {
        let (start, size) = self.region;
        let stacks = self.threads.iter().map(|found| found.arrival.stack);
        let stacks = stacks.map(|stack| stack..stack + HANDLER_STACK as u64);
        let mappings = std::iter::once(start..start + size as u64).chain(stacks).collect();
        Footprint { mappings, fds: vec![self.socket], spare_fds: 0, special: Vec::new() }
    }

    fn context(&mut self, thread: usize) -> Result<Context, TargetError> {
        let arrival = self.threads[thread].arrival;
        let mut general = general(&arrival.context, arrival.fs_base, arrival.gs_base);
        if arrival.interrupted >= 0 && !self.is_signalled(thread)? {
            wind_back(&mut general, arrival.interrupted);
        }
        let mut xsave = self.threads[thread].xsave.clone();
        if xsave.len() < SMALLEST_XSAVE {
            return Err(self.error("registers", io::Error::other("the kernel saved no vector state")));
        }
        // In a frame these bytes say more; in a saved area, as ptrace has it, only which features there are.
        let features: [u8; 8] = xsave[SOFTWARE_BYTES + 8..][..8].try_into().expect("eight bytes");
        xsave[SOFTWARE_BYTES..SOFTWARE_BYTES + 48].fill(0);
        xsave[SOFTWARE_BYTES..SOFTWARE_BYTES + 8].copy_from_slice(&features);
        // A frame leaves out what takes leave to use (AMX) and was not used; a saved area has room for all there is.
        xsave.resize(xsave.len().max(sys::xsave_size()), 0);
        let rseq = self.rseq(thread)?;
        Ok(Context { registers: Registers { general, xsave }, blocked: arrival.context[37], rseq, timeout_left: None })
    }

    fn pending(&mut self, queue: Queue) -> Result<Vec<SigInfo>, TargetError> {
        let (thread, name, other) = match queue {
            // A signal that is queued for the process can be queued again by its main thread only.
            Queue::Shared => (0, "ShdPnd", "SigPnd"),
            Queue::Thread(thread) => (thread, "SigPnd", "ShdPnd"),
        };
        let tid = self.tids[thread];
        let status = self.process.proc.thread_status(tid).map_err(|source| self.error("reading status", source))?;
        let wanted = status.mask(name).unwrap_or(0);
        if wanted == 0 {
            return Ok(Vec::new());
        }
        if wanted & status.mask(other).unwrap_or(0) != 0 {
            let why = "a signal is pending for a thread and for its process at once, and the two cannot be told apart";
            return Err(self.error("taking pending signals", io::Error::other(why)));
        }
        // Of signals below those of real time there is one of each; of the others each has a queue of its own.
        const STANDARD: u64 = (1 << 31) - 1;
        let queues = (31..64).map(|signal| 1 << signal);
        let mut found = Vec::new();
        for set in std::iter::once(STANDARD).chain(queues).map(|set: u64| set & wanted).filter(|set| *set != 0) {
            found.extend(self.take_and_put_back(queue, thread, tid, set)?);
        }
        Ok(found)
    }

    fn set_context(&mut self, _thread: usize, _context: &Context) -> Result<(), TargetError> {
        Err(self.error("setting registers of a frozen process", io::ErrorKind::Unsupported.into()))
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

    /// Hangs up: every process goes on by itself.
    fn let_go(&mut self) {
        let leaving = self.each().map(|target| {
            let blocked = target.tids.iter().zip(&target.threads).map(|(tid, found)| (*tid, found.arrival.context[37]));
            Leaving { pid: target.tids[0], base: target.region.0, blocked: blocked.collect() }
        });
        let leaving: Vec<Leaving> = leaving.collect();
        self.targets.clear();
        wait_until_left(&leaving);
    }
}

/// A process whose agents are on their way out.
pub struct Leaving {
    pub pid: Pid,
    /// Where the region is that it unmaps.
    pub base: u64,
    /// The signals that each thread blocks when it is back.
    pub blocked: Vec<(Pid, u64)>,
}

/// What an agent blocks: all but SIGKILL and SIGSTOP.
const ALL_BLOCKED: u64 = !(1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1));

/// Waits until processes are out of our hands, so that whoever looks at them now sees them as they are.
///
/// It does not depend on us any more, and takes a moment, on a busy machine a longer one; it is not waited for without end.
pub fn wait_until_left(all: &[Leaving]) {
    let deadline = Instant::now() + Duration::from_secs(10);
    for leaving in all {
        let Ok(proc) = ProcDir::open(leaving.pid) else { continue };
        let start = format!("{:x}-", leaving.base);
        let has_region = || proc.text("maps").is_ok_and(|maps| maps.lines().any(|line| line.starts_with(&start)));
        let is_in = |&(tid, blocked): &(Pid, u64)| {
            blocked & ALL_BLOCKED != ALL_BLOCKED
                && proc.thread_status(tid).is_ok_and(|status| status.mask("SigBlk") == Some(ALL_BLOCKED))
        };
        while Instant::now() < deadline && (has_region() || leaving.blocked.iter().any(is_in)) {
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

impl Drop for FrozenTree {
    fn drop(&mut self) {
        self.let_go();
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

    /// All of its processes have the same, and those that it has started since.
    fn virtual_ids(&mut self) -> Result<Option<Names>, DumpError> {
        let Some(target) = self.each().find(|target| target.ids.1 != 0) else { return Ok(None) };
        let (pid, (header, generation)) = (target.tids[0], target.ids);
        let names = virtual_ids::names_of(target, header, generation);
        names.map(Some).map_err(|source| DumpError::Target { resource: "tasks", pid, source })
    }

    fn copy(&mut self, process: usize, without: &NotCopied) -> Result<Box<dyn Target>, TargetError> {
        let target = self.each().nth(process).expect("a process of the tree");
        let pid = target.tids[0];
        let copied = Copied::make(pid, &mut target.agent().channel, without, &mut alive(pid))?;
        Ok(Box::new(copied))
    }

    fn thaw(mut self: Box<Self>) -> Result<(), DumpError> {
        self.let_go();
        Ok(())
    }

    /// The stop is there before the agent is left, so that nothing of the program runs in between: what is of us in it
    /// goes when it is continued.
    fn stop(mut self: Box<Self>) -> Result<(), DumpError> {
        for target in self.each() {
            let _ = sys::pidfd_send_signal(target.process.pidfd().as_fd(), libc::SIGSTOP);
        }
        self.targets.clear();
        Ok(())
    }

    /// Children before parents, which wait for them first: nothing is left to whoever inherits orphans.
    ///
    /// The kernel tells of the end of a process an instant before the ids of its last threads are free. That is waited for,
    /// as a restore at once would find them taken.
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
                    let mut ended = [PollFd::new(target.process.pidfd().as_fd(), PollFlags::POLLIN)];
                    let _ = poll(&mut ended, PollTimeout::from(10_000u16));
                }
            }
            alive = inner;
        }
        let deadline = Instant::now() + Duration::from_secs(1);
        let tids: Vec<Pid> = self.each().flat_map(|target| target.tids[1..].to_vec()).collect();
        if let (false, Ok(probe)) = (tids.is_empty(), sys::id_probe()) {
            while Instant::now() < deadline && tids.iter().any(|tid| sys::id_in_use(probe.as_fd(), tid.0)) {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
        self.targets.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_run_again_with_the_time_that_was_left() {
        let mut sleeping = General { rip: 0x1002, rax: -4i64 as u64, rsi: 0, rdx: 7, r10: 9, ..General::default() };
        wind_back(&mut sleeping, libc::SYS_clock_nanosleep);
        assert_eq!((sleeping.rip, sleeping.rax, sleeping.rdx), (0x1000, 230, 9));
        let mut absolute = General { rip: 0x1002, rsi: 1, rdx: 7, r10: 9, ..General::default() };
        wind_back(&mut absolute, libc::SYS_clock_nanosleep);
        assert_eq!(absolute.rdx, 7);
    }
}
