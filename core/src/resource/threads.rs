//! What the kernel keeps by thread, asked once for all kinds with as few round trips as it allows.
//!
//! Three ways lead to it, the cheaper first: `/proc/PID/task/TID` is read by us; calls that take a thread id run on the
//! main thread, for many threads in one batch; and only what a thread alone can be asked runs on it, in one batch, while
//! others run theirs.

use std::io;

use crate::args;
use crate::batch::{Batch, CallId, Replies, Slot, Sysno};
use crate::error::DumpError;
use crate::ourselves::ourselves;
use crate::procfs::{self, Stat, Status};
use crate::target::{Pid, RemotePtr, Target, TargetError};

/// What is known of one thread.
#[derive(Clone, Debug)]
pub struct Answers {
    pub tid: Pid,
    /// `/proc/PID/task/TID/status`.
    pub status: Status,
    /// `/proc/PID/task/TID/stat`: the name as it is, and the `PF_*` flags.
    pub stat: Stat,
    /// `struct sched_attr`, as `sched_getattr` fills it.
    pub sched_attr: [u8; SCHED_ATTR_SIZE],
    /// `getpriority`: also for threads whose policy makes no use of it.
    pub nice: i32,
    /// `ioprio_get`.
    pub io_priority: i32,
    /// `get_robust_list`: head and length.
    pub robust_list: (u64, u64),
    /// `prctl(PR_SCHED_CORE_GET)`; `None` where the kernel has no core scheduling.
    pub core_cookie: Option<u64>,
    /// `personality(0xffffffff)`.
    pub personality: u32,
    /// `PR_GET_TIMERSLACK`, in nanoseconds.
    pub timer_slack: u64,
    /// `stack_t` as `sigaltstack` gives it: address, flags, size.
    pub altstack: (u64, i32, u64),
    /// `PR_GET_TID_ADDRESS`.
    pub tid_address: RemotePtr,
    /// `PR_GET_PDEATHSIG`.
    pub parent_death_signal: i32,
    /// `PR_GET_SECUREBITS`.
    pub securebits: u32,
    /// `PR_GET_TSC`: whether `rdtsc` is allowed.
    pub time_stamp_counter: bool,
    /// `ARCH_GET_CPUID`: whether `cpuid` is allowed.
    pub cpuid: bool,
    /// `get_mempolicy`.
    pub memory_policy: MemoryPolicy,
    /// `PR_GET_SPECULATION_CTRL` of `PR_SPEC_STORE_BYPASS`, `PR_SPEC_INDIRECT_BRANCH` and `PR_SPEC_L1D_FLUSH`; `None` where
    /// the kernel does not know it.
    pub speculation: [Option<u32>; 3],
}

/// The NUMA policy of a thread (`set_mempolicy`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryPolicy {
    /// `MPOL_*` with its flags; 0 is the default.
    pub mode: u32,
    /// Bit by bit, without trailing zero words.
    pub nodes: Vec<u64>,
}

/// `sizeof(struct sched_attr)` with the utilisation clamps (kernel 5.3).
pub const SCHED_ATTR_SIZE: usize = 56;

/// Nodes that a memory policy can name here: the kernel refuses a smaller room than it has nodes.
pub const MOST_NODES: usize = 1024;

// linux/prctl.h
const PR_GET_TSC: i32 = 25;
const PR_GET_SECUREBITS: i32 = 27;
const PR_GET_TIMERSLACK: i32 = 30;
const PR_GET_TID_ADDRESS: i32 = 40;
const PR_GET_SPECULATION_CTRL: i32 = 52;
const PR_GET_PDEATHSIG: i32 = 2;
const PR_SCHED_CORE: i32 = 62;
const PR_SCHED_CORE_GET: i32 = 0;
const PR_TSC_SIGSEGV: u32 = 2;
const ARCH_GET_CPUID: i32 = 0x1011;
const IOPRIO_WHO_PROCESS: i32 = 1;
/// `prctl` of these looks at a single thread.
const PIDTYPE_PID: i32 = 0;

/// How many threads one batch of the main thread is about, and how many are asked at once.
pub const THREADS_AT_ONCE: usize = 64;

/// What the main thread is asked of the first threads of a process: with the questions of other kinds, in their batch.
pub struct Asked {
    by_main: Vec<ByMain>,
    main: Own,
}

impl Asked {
    pub fn ask(target: &dyn Target, batch: &mut Batch) -> Asked {
        let tids = &target.threads()[..THREADS_AT_ONCE.min(target.threads().len())];
        let by_main = tids.iter().map(|&tid| ByMain::ask(batch, tid)).collect();
        Asked { by_main, main: Own::ask(batch, Known::default(), None) }
    }

    /// The answers of every thread, the main thread's first. Those of the others are asked now.
    pub fn answers(&self, target: &mut dyn Target, replies: &Replies) -> Result<Vec<Answers>, DumpError> {
        let tids = target.threads().to_vec();
        let mut all = vec![self.main.answers(look(target, tids[0])?, &self.by_main[0], replies, replies)];
        ask_others(target, &tids[1..self.by_main.len()], &self.by_main[1..], replies, &mut all)?;
        for chunk in tids[self.by_main.len()..].chunks(THREADS_AT_ONCE) {
            let mut batch = Batch::new();
            let by_main: Vec<ByMain> = chunk.iter().map(|&tid| ByMain::ask(&mut batch, tid)).collect();
            let replies = target.run(&batch).map_err(failed(target.pid()))?;
            ask_others(target, chunk, &by_main, &replies, &mut all)?;
        }
        Ok(all)
    }
}

/// Asks about the main thread of a skeleton.
pub fn ask_main(target: &mut dyn Target) -> Result<Answers, DumpError> {
    let tid = target.threads()[0];
    let mut batch = Batch::new();
    let by_main = ByMain::ask(&mut batch, tid);
    let own = Own::ask(&mut batch, Known::default(), None);
    let replies = target.run(&batch).map_err(failed(target.pid()))?;
    Ok(own.answers(look(target, tid)?, &by_main, &replies, &replies))
}

/// A failure while a process is asked.
pub fn failed(pid: Pid) -> impl Fn(TargetError) -> DumpError {
    move |source| DumpError::Target { resource: "tasks", pid, source }
}

/// What `/proc` shows of a thread.
struct Looked {
    tid: Pid,
    status: Status,
    stat: Stat,
}

fn look(target: &dyn Target, tid: Pid) -> Result<Looked, DumpError> {
    let unreadable = |what: &str, source: io::Error| DumpError::Io { what: format!("{what} of thread {tid}"), source };
    let proc = target.proc();
    let status = proc.thread_status(tid).map_err(|source| unreadable("status", source))?;
    let stat = proc.thread_stat(tid).map_err(|source| unreadable("stat", source))?;
    Ok(Looked { tid, status, stat })
}

/// Asks some threads what only they can tell, all at the same time.
fn ask_others(
    target: &mut dyn Target,
    tids: &[Pid],
    by_main: &[ByMain],
    replies: &Replies,
    all: &mut Vec<Answers>,
) -> Result<(), DumpError> {
    let mut asked = Vec::with_capacity(tids.len());
    for (n, &tid) in tids.iter().enumerate() {
        let looked = look(target, tid)?;
        // These two ask for more rights than status does; where we lack them the thread is asked itself.
        let personality = target.proc().text(format!("task/{tid}/personality")).ok();
        // Not among the files of a thread in /proc/PID/task.
        let timer_slack = procfs::of_thread(tid, "timerslack_ns").ok();
        let known = Known {
            personality: personality.and_then(|text| u32::from_str_radix(text.trim(), 16).ok()),
            timer_slack: timer_slack.and_then(|text| text.trim().parse().ok()),
        };
        let mut batch = Batch::new();
        let own = Own::ask(&mut batch, known, Some((&all[0], &looked.status)));
        target.start(all.len() + n, &batch).map_err(failed(target.pid()))?;
        asked.push((looked, own, batch));
    }
    for ((looked, own, batch), by_main) in asked.into_iter().zip(by_main) {
        let own_replies = target.finish(all.len(), &batch).map_err(failed(target.pid()))?;
        all.push(own.answers(looked, by_main, replies, &own_replies));
    }
    Ok(())
}

/// Calls that take a thread id, so that the main thread can make them.
struct ByMain {
    attr: Slot,
    nice: CallId,
    io_priority: CallId,
    robust_list: Slot,
    core: CallId,
    cookie: Slot,
}

impl ByMain {
    fn ask(batch: &mut Batch, tid: Pid) -> ByMain {
        let attr = batch.room(SCHED_ATTR_SIZE);
        let robust_list = batch.room(16);
        let cookie = batch.room(8);
        batch.call(Sysno::sched_getattr, args![tid.0, attr, SCHED_ATTR_SIZE, 0]);
        let nice = batch.call(Sysno::getpriority, args![libc::PRIO_PROCESS, tid.0]);
        let io_priority = batch.try_call(Sysno::ioprio_get, args![IOPRIO_WHO_PROCESS, tid.0]);
        batch.call(Sysno::get_robust_list, args![tid.0, robust_list, robust_list.after(8)]);
        let core = batch.try_call(Sysno::prctl, args![PR_SCHED_CORE, PR_SCHED_CORE_GET, tid.0, PIDTYPE_PID, cookie]);
        ByMain { attr, nice, io_priority, robust_list, core, cookie }
    }
}

/// What `/proc` has told already.
#[derive(Clone, Copy, Default)]
struct Known {
    personality: Option<u32>,
    timer_slack: Option<u64>,
}

/// Calls that only the thread itself can make.
struct Own {
    known: Known,
    altstack: Slot,
    tid_address: Slot,
    parent_death_signal: Slot,
    securebits: CallId,
    tsc: Slot,
    personality: Option<CallId>,
    timer_slack: Option<CallId>,
    cpuid: Option<CallId>,
    policy: Option<(CallId, Slot, Slot)>,
    speculation: Result<[CallId; 3], [Option<u32>; 3]>,
}

impl Own {
    /// `first` is the main thread, where this is another, whose status follows.
    fn ask(batch: &mut Batch, known: Known, first: Option<(&Answers, &Status)>) -> Own {
        let [altstack, tid_address, parent_death_signal, tsc] = [24, 8, 8, 8].map(|size| batch.room(size));
        batch.call(Sysno::sigaltstack, args![0, altstack]);
        batch.call(Sysno::prctl, args![PR_GET_TID_ADDRESS, tid_address]);
        batch.call(Sysno::prctl, args![PR_GET_PDEATHSIG, parent_death_signal]);
        batch.call(Sysno::prctl, args![PR_GET_TSC, tsc]);
        // With one node there is one place for all memory, whatever the policy: there the main thread speaks for those
        // that have inherited its lack of one.
        let default = first.is_some_and(|(first, _)| first.memory_policy == MemoryPolicy::default());
        let policy = (!default || ourselves().several_nodes).then(|| {
            let mode = batch.room(8);
            let nodes = batch.room(MOST_NODES / 8);
            (batch.try_call(Sysno::get_mempolicy, args![mode, nodes, MOST_NODES, 0, 0]), mode, nodes)
        });
        // Two of the three are in status in words: the same words mean the same setting. The third is off on most hosts.
        let same_speculation = first.filter(|(first, status)| {
            SPECULATION_FIELDS.iter().all(|field| first.status.field(field) == status.field(field))
                && first.speculation[2].is_none_or(|value| value & PR_SPEC_PRCTL == 0)
        });
        Own {
            known,
            altstack,
            tid_address,
            parent_death_signal,
            securebits: batch.call(Sysno::prctl, args![PR_GET_SECUREBITS]),
            tsc,
            personality: known.personality.is_none().then(|| batch.call(Sysno::personality, args![0xffff_ffffu32])),
            timer_slack: known.timer_slack.is_none().then(|| batch.call(Sysno::prctl, args![PR_GET_TIMERSLACK])),
            // Where the processor cannot be told to fault, it never does.
            cpuid: cpuid_can_fault().then(|| batch.try_call(Sysno::arch_prctl, args![ARCH_GET_CPUID, 0])),
            policy,
            speculation: match same_speculation {
                Some((first, _)) => Err(first.speculation),
                None => Ok([0, 1, 2].map(|which| batch.try_call(Sysno::prctl, args![PR_GET_SPECULATION_CTRL, which]))),
            },
        }
    }

    fn answers(&self, looked: Looked, asked: &ByMain, by_main: &Replies, replies: &Replies) -> Answers {
        let altstack = replies.words(self.altstack);
        let robust_list = by_main.words(asked.robust_list);
        Answers {
            tid: looked.tid,
            sched_attr: by_main.bytes(asked.attr).try_into().expect("the size of the slot"),
            // The system call gives 20 - nice, so that no result is negative.
            nice: 20 - by_main.value(asked.nice) as i32,
            io_priority: by_main.result(asked.io_priority).unwrap_or(0) as i32,
            robust_list: (robust_list[0], robust_list[1]),
            core_cookie: by_main.result(asked.core).ok().map(|_| by_main.u64(asked.cookie)),
            personality: self
                .personality
                .map_or(self.known.personality, |call| Some(replies.value(call) as u32))
                .unwrap_or(0),
            timer_slack: self.timer_slack.map_or(self.known.timer_slack, |call| Some(replies.value(call))).unwrap_or(0),
            altstack: (altstack[0], altstack[1] as i32, altstack[2]),
            tid_address: RemotePtr(replies.u64(self.tid_address)),
            parent_death_signal: replies.u32(self.parent_death_signal) as i32,
            securebits: replies.value(self.securebits) as u32,
            time_stamp_counter: replies.u32(self.tsc) != PR_TSC_SIGSEGV,
            cpuid: self.cpuid.is_none_or(|call| replies.result(call) != Ok(0)),
            memory_policy: match self.policy {
                Some((call, mode, nodes)) if replies.result(call).is_ok() => {
                    let mut nodes = replies.words(nodes);
                    while nodes.last() == Some(&0) {
                        nodes.pop();
                    }
                    MemoryPolicy { mode: replies.u32(mode), nodes }
                }
                _ => MemoryPolicy::default(),
            },
            speculation: match self.speculation {
                Ok(calls) => calls.map(|call| replies.result(call).ok().map(|value| value as u32)),
                Err(same) => same,
            },
            status: looked.status,
            stat: looked.stat,
        }
    }
}

/// The thread may set it itself (`linux/prctl.h`).
pub const PR_SPEC_PRCTL: u32 = 1;

const SPECULATION_FIELDS: [&str; 2] = ["Speculation_Store_Bypass", "SpeculationIndirectBranch"];

/// Whether `/proc/cpuinfo` has `cpuid_fault`.
fn cpuid_can_fault() -> bool {
    static CAN: std::sync::LazyLock<bool> = std::sync::LazyLock::new(|| {
        let Ok(text) = std::fs::read_to_string("/proc/cpuinfo") else { return true };
        let flags = text.lines().find(|line| line.starts_with("flags"));
        flags.is_none_or(|flags| flags.split_ascii_whitespace().any(|flag| flag == "cpuid_fault"))
    });
    *CAN
}
