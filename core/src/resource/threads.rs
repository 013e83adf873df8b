//! What the kernel keeps by thread, asked once for all kinds with as few round trips as it allows.
//!
//! Three ways lead to it, the cheaper first: `/proc/PID/task/TID` is read by us; calls that take a thread id run on the
//! main thread, for many threads in one batch; and only what a thread alone can be asked runs on it, in one batch.

use std::io;

use crate::args;
use crate::batch::{Batch, CallId, Replies, Slot, Sysno};
use crate::error::DumpError;
use crate::ourselves::ourselves;
use crate::procfs::{self, Stat, Status};
use crate::target::{Pid, RemotePtr, Target};

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

/// How many threads one batch of the main thread is about.
const THREADS_A_BATCH: usize = 64;

/// Asks about every thread of a frozen process, or of a skeleton.
pub fn ask(target: &mut dyn Target) -> Result<Vec<Answers>, DumpError> {
    let tids = target.threads().to_vec();
    let mut all = Vec::with_capacity(tids.len());
    for chunk in tids.chunks(THREADS_A_BATCH) {
        let mut batch = Batch::new();
        let asked: Vec<ByMain> = chunk.iter().map(|&tid| ByMain::ask(&mut batch, tid)).collect();
        let by_main = run(target, None, &batch)?;
        for (&tid, asked) in chunk.iter().zip(asked) {
            all.push(ask_one(target, tid, all.first(), &asked, &by_main, all.len())?);
        }
    }
    Ok(all)
}

/// Asks about the main thread only.
pub fn ask_main(target: &mut dyn Target) -> Result<Answers, DumpError> {
    let tid = target.threads()[0];
    let mut batch = Batch::new();
    let asked = ByMain::ask(&mut batch, tid);
    let by_main = run(target, None, &batch)?;
    ask_one(target, tid, None, &asked, &by_main, 0)
}

/// Runs a batch on a thread, or on whichever is the quickest.
fn run(target: &mut dyn Target, thread: Option<usize>, batch: &Batch) -> Result<Replies, DumpError> {
    let pid = target.pid();
    let replies = match thread {
        Some(thread) => target.run_on(thread, batch),
        None => target.run(batch),
    };
    replies.map_err(|source| DumpError::Target { resource: "tasks", pid, source })
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

/// `first` are the answers of the main thread, where this is another.
fn ask_one(
    target: &mut dyn Target,
    tid: Pid,
    first: Option<&Answers>,
    asked: &ByMain,
    by_main: &Replies,
    thread: usize,
) -> Result<Answers, DumpError> {
    let unreadable = |what: &str, source: io::Error| DumpError::Io { what: format!("{what} of thread {tid}"), source };
    let proc = target.proc();
    let status = proc.thread_status(tid).map_err(|source| unreadable("status", source))?;
    let stat = proc.thread_stat(tid).map_err(|source| unreadable("stat", source))?;
    // These two ask for more rights than status does; where we lack them the thread is asked itself.
    let personality = first.and_then(|_| {
        let text = proc.text(format!("task/{tid}/personality")).ok()?;
        u32::from_str_radix(text.trim(), 16).ok()
    });
    let timer_slack = first.and_then(|_| {
        // Not among the files of a thread in /proc/PID/task.
        procfs::of_thread(tid, "timerslack_ns").ok()?.trim().parse().ok()
    });

    let mut batch = Batch::new();
    let altstack = batch.room(24);
    batch.call(Sysno::sigaltstack, args![0, altstack]);
    let tid_address = batch.room(8);
    batch.call(Sysno::prctl, args![PR_GET_TID_ADDRESS, tid_address]);
    let parent_death_signal = batch.room(8);
    batch.call(Sysno::prctl, args![PR_GET_PDEATHSIG, parent_death_signal]);
    let securebits = batch.call(Sysno::prctl, args![PR_GET_SECUREBITS]);
    let tsc = batch.room(8);
    batch.call(Sysno::prctl, args![PR_GET_TSC, tsc]);
    let asked_personality = personality.is_none().then(|| batch.call(Sysno::personality, args![0xffff_ffffu32]));
    let asked_slack = timer_slack.is_none().then(|| batch.call(Sysno::prctl, args![PR_GET_TIMERSLACK]));
    // Where the processor cannot be told to fault, it never does.
    let cpuid = cpuid_can_fault().then(|| batch.try_call(Sysno::arch_prctl, args![ARCH_GET_CPUID, 0]));
    // With one node there is one place for all memory, whatever the policy: there the main thread speaks for those that
    // have inherited its lack of one.
    let default = first.is_some_and(|first| first.memory_policy == MemoryPolicy::default());
    let policy = (!default || ourselves().several_nodes).then(|| {
        let mode = batch.room(8);
        let nodes = batch.room(MOST_NODES / 8);
        (batch.try_call(Sysno::get_mempolicy, args![mode, nodes, MOST_NODES, 0, 0]), mode, nodes)
    });
    // Two of the three are in status in words: the same words mean the same setting. The third is off on most hosts.
    let same_speculation = first.filter(|first| {
        SPECULATION_FIELDS.iter().all(|field| first.status.field(field) == status.field(field))
            && first.speculation[2].is_none_or(|value| value & PR_SPEC_PRCTL == 0)
    });
    let speculation = match same_speculation {
        Some(_) => None,
        None => Some([0, 1, 2].map(|which| batch.try_call(Sysno::prctl, args![PR_GET_SPECULATION_CTRL, which]))),
    };
    let replies = run(target, Some(thread), &batch)?;

    let altstack = replies.words(altstack);
    let robust_list = by_main.words(asked.robust_list);
    Ok(Answers {
        tid,
        sched_attr: by_main.bytes(asked.attr).try_into().expect("the size of the slot"),
        // The system call gives 20 - nice, so that no result is negative.
        nice: 20 - by_main.value(asked.nice) as i32,
        io_priority: by_main.result(asked.io_priority).unwrap_or(0) as i32,
        robust_list: (robust_list[0], robust_list[1]),
        core_cookie: by_main.result(asked.core).ok().map(|_| by_main.u64(asked.cookie)),
        personality: personality.unwrap_or_else(|| asked_personality.map_or(0, |call| replies.value(call) as u32)),
        timer_slack: timer_slack.unwrap_or_else(|| asked_slack.map_or(0, |call| replies.value(call))),
        altstack: (altstack[0], altstack[1] as i32, altstack[2]),
        tid_address: RemotePtr(replies.u64(tid_address)),
        parent_death_signal: replies.u32(parent_death_signal) as i32,
        securebits: replies.value(securebits) as u32,
        time_stamp_counter: replies.u32(tsc) != PR_TSC_SIGSEGV,
        cpuid: cpuid.is_none_or(|call| replies.result(call) != Ok(0)),
        memory_policy: match policy {
            Some((call, mode, nodes)) if replies.result(call).is_ok() => {
                let mut nodes = replies.words(nodes);
                while nodes.last() == Some(&0) {
                    nodes.pop();
                }
                MemoryPolicy { mode: replies.u32(mode), nodes }
            }
            _ => MemoryPolicy::default(),
        },
        speculation: match (speculation, same_speculation) {
            (Some(calls), _) => calls.map(|call| replies.result(call).ok().map(|value| value as u32)),
            (None, Some(first)) => first.speculation,
            (None, None) => [None; 3],
        },
        status,
        stat,
    })
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
