//! Small settings of processes and threads, most of them from prctl(2), that no other kind owns.
//!
//! Of a process: dumpable, child subreaper, core dump filter, OOM score adjustment, transparent huge pages, page
//! merging, memory-deny-write-execute, dynamic CPU features (AMX). Of a thread: name, personality, the signal it gets
//! when its parent dies, robust futexes, clear_child_tid, machine checks, `rdtsc` and `cpuid` faults, speculation control, I/O
//! flusher.
//!
//! Refused, because they cannot be read in full or made again: seccomp, shadow stacks, linear address masking. Cannot be seen, and so not kept: who may trace (`PR_SET_PTRACER`), system call user
//! dispatch, port permissions (`ioperm`). Begins anew: times, counts of faults and I/O, the audit session; the size of
//! the private futex hash, which has no effect but on speed.

use std::io::Write;

use nix::fcntl::OFlag;

use crate::args;
use crate::batch::{Batch, CallId, Slot, Sysno};
use crate::error::{DumpError, Refusal, RestoreError};
use crate::ourselves::{Capability, ourselves};
use crate::procfs::{ProcDir, Status};
use crate::resource::threads::{Answers, PR_SPEC_PRCTL};
use crate::resource::{Check, Collect, OfProcess, OfThread, Rebuild, Resource};
use crate::target::{Pid, RemotePtr};

/// The settings of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Process {
    /// `PR_GET_DUMPABLE`: 0, 1 or 2.
    pub dumpable: u32,
    pub child_subreaper: bool,
    /// `/proc/PID/coredump_filter`.
    pub core_dump_filter: u64,
    /// `/proc/PID/oom_score_adj`.
    pub oom_score_adj: i32,
    /// `PR_GET_THP_DISABLE`: 0, 1, or 3 if all but advised memory (kernel 6.18).
    pub huge_pages_disabled: u32,
    /// `PR_GET_MEMORY_MERGE`.
    pub memory_merge: bool,
    /// `PR_GET_MDWE`.
    pub deny_write_execute: u32,
    /// Dynamic CPU features that the process asked for (`ARCH_GET_XCOMP_PERM`), bit by bit: of these, AMX.
    pub cpu_features: u64,
    /// How many seccomp filters it had, which ckpt had as well: those of a container.
    pub seccomp_filters: u32,
}

const PR_SET_PDEATHSIG: i32 = 1;
const PR_GET_DUMPABLE: i32 = 3;
const PR_SET_DUMPABLE: i32 = 4;
const PR_SET_NAME: i32 = 15;
const PR_SET_TSC: i32 = 26;
const PR_TSC_SIGSEGV: i32 = 2;
const PR_MCE_KILL: i32 = 33;
const PR_MCE_KILL_SET: i32 = 1;
const PR_SET_CHILD_SUBREAPER: i32 = 36;
const PR_GET_CHILD_SUBREAPER: i32 = 37;
const PR_SET_THP_DISABLE: i32 = 41;
const PR_GET_THP_DISABLE: i32 = 42;
const PR_SET_SPECULATION_CTRL: i32 = 53;
const PR_SET_IO_FLUSHER: i32 = 57;
const PR_SET_MDWE: i32 = 65;
const PR_GET_MDWE: i32 = 66;
const PR_SET_MEMORY_MERGE: i32 = 67;
const PR_GET_MEMORY_MERGE: i32 = 68;
const ARCH_SET_CPUID: i32 = 0x1012;
const ARCH_GET_XCOMP_PERM: i32 = 0x1022;
const ARCH_REQ_XCOMP_PERM: i32 = 0x1023;
/// The features that a process must ask for: tile data of AMX.
const DYNAMIC_FEATURES: u64 = 1 << 18;
/// Flags of a task that `/proc/PID/stat` shows (`linux/sched.h`).
const PF_MCE_PROCESS: u64 = 0x80;
const PF_MCE_EARLY: u64 = 0x0800_0000;
const PF_IO_FLUSHER: u64 = 0x0008_0000 | 0x0010_0000;

/// The calls that ask for the settings of a process.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    dumpable: CallId,
    subreaper: Slot,
    huge_pages: CallId,
    merge: CallId,
    deny: CallId,
    features: Slot,
    has_features: CallId,
}

pub fn ask(batch: &mut Batch) -> Asked {
    let (subreaper, features) = (batch.room(8), batch.room(8));
    batch.call(Sysno::prctl, args![PR_GET_CHILD_SUBREAPER, subreaper]);
    Asked {
        dumpable: batch.call(Sysno::prctl, args![PR_GET_DUMPABLE]),
        subreaper,
        // What the kernel is too old for, nobody has set.
        huge_pages: batch.try_call(Sysno::prctl, args![PR_GET_THP_DISABLE, 0, 0, 0, 0]),
        merge: batch.try_call(Sysno::prctl, args![PR_GET_MEMORY_MERGE, 0, 0, 0, 0]),
        deny: batch.try_call(Sysno::prctl, args![PR_GET_MDWE, 0, 0, 0, 0]),
        features,
        has_features: batch.try_call(Sysno::arch_prctl, args![ARCH_GET_XCOMP_PERM, features]),
    }
}

/// Settings of a process.
pub struct Attributes;

impl Resource for Attributes {
    const NAME: &'static str = "attributes";
    type Scope = OfProcess;
    type Saved = Process;

    fn collect(context: &mut Collect<'_>) -> Result<Process, DumpError> {
        refuse_lost(context)?;
        let Asked { dumpable, subreaper, huge_pages, merge, deny, features, has_features } = context.asked.attributes;
        let replies = &context.asked.replies;
        let proc = context.target.proc();
        let number = |name: &str, radix| {
            let text = proc.text(name).map_err(|source| context.io_error(name, source))?;
            i64::from_str_radix(text.trim(), radix)
                .map_err(|error| context.io_error(name, std::io::Error::new(std::io::ErrorKind::InvalidData, error)))
        };
        Ok(Process {
            dumpable: replies.value(dumpable) as u32,
            child_subreaper: replies.u32(subreaper) != 0,
            core_dump_filter: number("coredump_filter", 16)? as u64,
            oom_score_adj: number("oom_score_adj", 10)? as i32,
            huge_pages_disabled: replies.result(huge_pages).unwrap_or(0) as u32,
            memory_merge: replies.result(merge).unwrap_or(0) != 0,
            deny_write_execute: replies.result(deny).unwrap_or(0) as u32,
            cpu_features: replies.result(has_features).map_or(0, |_| replies.u64(features) & DYNAMIC_FEATURES),
            seccomp_filters: seccomp_filters(&context.answers[0].status),
        })
    }

    fn check(saved: &Process, context: &mut Check<'_>) {
        let ours = ourselves();
        let filters = seccomp_filters(&ours.status);
        if saved.seccomp_filters != filters {
            context.refuse(
                "seccomp",
                format!("it had {} filter(s) of its container, and ckpt has {filters} here", saved.seccomp_filters),
                "restore it in a container with the same profile",
            );
        }
        // Below what it is only with the privilege; and what ours may be at least is not to be seen.
        if saved.oom_score_adj < ours.oom_score_adj.min(0) && !ours.may(Capability::SYS_RESOURCE) {
            context.refuse(
                "OOM score adjustment",
                format!("it was {}, and that of ckpt is {}", saved.oom_score_adj, ours.oom_score_adj),
                "restore with CAP_SYS_RESOURCE",
            );
        }
    }

    /// All that does not hinder what comes after; see [`finish`].
    fn rebuild(saved: &Process, context: &mut Rebuild<'_>) -> Result<(), RestoreError> {
        let mut batch = Batch::new();
        batch.call(Sysno::prctl, args![PR_SET_CHILD_SUBREAPER, u32::from(saved.child_subreaper), 0, 0, 0]);
        let (disable, flags) = (saved.huge_pages_disabled & 1, saved.huge_pages_disabled & !1);
        batch.call(Sysno::prctl, args![PR_SET_THP_DISABLE, disable, flags, 0, 0]);
        if saved.memory_merge {
            batch.call(Sysno::prctl, args![PR_SET_MEMORY_MERGE, 1, 0, 0, 0]);
        }
        for feature in (0..64).filter(|feature| saved.cpu_features >> feature & 1 != 0) {
            batch.call(Sysno::arch_prctl, args![ARCH_REQ_XCOMP_PERM, feature]);
        }
        context.run(&batch)?;
        let proc = context.target.proc();
        let failed =
            |name: &str, source| RestoreError::Io { what: format!("{name} of process {}", proc.pid()), source };
        set(proc, "coredump_filter", format!("{:#x}", saved.core_dump_filter))
            .map_err(|source| failed("coredump_filter", source))?;
        set(proc, "oom_score_adj", saved.oom_score_adj.to_string()).map_err(|source| failed("oom_score_adj", source))
    }
}

/// Writes a file of `/proc/PID`, unless it says the same already.
fn set(proc: &ProcDir, name: &str, value: String) -> std::io::Result<()> {
    let number = |text: &str| {
        let text = text.trim();
        match text.strip_prefix("0x") {
            Some(digits) => i64::from_str_radix(digits, 16).ok(),
            None if name == "coredump_filter" => i64::from_str_radix(text, 16).ok(),
            None => text.parse().ok(),
        }
    };
    if number(&proc.text(name)?) == number(&value) {
        return Ok(());
    }
    proc.open_with(name, OFlag::O_WRONLY)?.write_all(value.as_bytes())
}

/// The settings of a process that would hinder the others: the last step in a process, after the credentials, whose
/// change takes `dumpable` away.
pub fn finish(saved: &Process, context: &mut Rebuild<'_>) -> Result<(), RestoreError> {
    let mut context = context.section(Attributes::NAME);
    let mut batch = Batch::new();
    if saved.deny_write_execute != 0 {
        batch.call(Sysno::prctl, args![PR_SET_MDWE, saved.deny_write_execute, 0, 0, 0]);
    }
    let dumpable = batch.call(Sysno::prctl, args![PR_GET_DUMPABLE]);
    let replies = context.run(&batch)?;
    if replies.value(dumpable) as u32 != saved.dumpable {
        let mut batch = Batch::new();
        // 2, only root may read a dump, is given by the kernel alone, where /proc/sys/fs/suid_dumpable says so; where
        // it does not, no dump at all is what it gives in its stead.
        batch.call(Sysno::prctl, args![PR_SET_DUMPABLE, u32::from(saved.dumpable == 1), 0, 0, 0]);
        context.run(&batch)?;
    }
    Ok(())
}

/// A thread with a seccomp filter, which may not even be asked by those who make calls in its name.
pub fn refuse_seccomp(pid: Pid, tid: Pid, status: &Status) -> Option<Refusal> {
    let filtered = status.field("Seccomp").is_some_and(|mode| mode != "0") && !has_our_seccomp(status);
    filtered.then(|| Refusal {
        resource: Attributes::NAME,
        pid: Some(pid),
        subject: format!("thread {tid}"),
        why: "it has a seccomp filter that ckpt does not have".to_string(),
        help: "start the program without one, or run ckpt in the same container".to_string(),
    })
}

/// State of a process that cannot be brought back.
fn refuse_lost(context: &mut Collect<'_>) -> Result<(), DumpError> {
    let mut refusals = Vec::new();
    for answers in context.answers {
        let thread = format!("thread {}", answers.tid);
        let status = &answers.status;
        context.refusals.extend(refuse_seccomp(context.target.pid(), answers.tid, status));
        if let Some(features) = status.field("x86_Thread_features").filter(|features| !features.is_empty()) {
            refusals.push((
                thread,
                format!("it has a shadow stack ({features})"),
                "start the program with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off",
            ));
        }
    }
    let masked = |mask: &str| mask != "0xffffffffffffffff";
    if let Some(mask) = context.answers[0].status.field("untag_mask").filter(|mask| masked(mask)) {
        refusals.push((
            "linear address masking".into(),
            format!("it is on (mask {mask})"),
            "start the program without tagged addresses",
        ));
    }
    for (subject, why, help) in refusals {
        context.refuse(subject, why, help);
    }
    Ok(())
}

/// `Seccomp_filters` of a status (kernel 5.9), 0 where there is none.
fn seccomp_filters(status: &Status) -> u32 {
    status.field("Seccomp_filters").and_then(|count| count.parse().ok()).unwrap_or(0)
}

/// Whether a thread has just as many seccomp filters as ckpt itself: then they are those of the container that both are in,
/// which a skeleton is born with. Filters cannot be read without privileges, but none is taken off ever, so a program
/// in our container has at least ours.
fn has_our_seccomp(status: &Status) -> bool {
    let ours = &ourselves().status;
    let filters = seccomp_filters(status);
    filters > 0 && filters == seccomp_filters(ours) && status.field("Seccomp") == ours.field("Seccomp")
}

/// The settings of a thread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Thread {
    /// The name, `/proc/PID/task/TID/comm`, up to 15 bytes.
    pub name: Vec<u8>,
    /// `personality(0xffffffff)`.
    pub personality: u32,
    /// The signal it gets when its parent dies, or 0.
    pub parent_death_signal: i32,
    /// Where the kernel writes 0 and wakes a waiter when the thread ends (`set_tid_address`), or 0.
    pub clear_child_tid: u64,
    /// Head of the list of robust futexes, or 0.
    pub robust_list: u64,
    /// `PR_MCE_KILL`: 0 is late, 1 early; `None` as the system has it.
    pub machine_check_kill: Option<u32>,
    /// `rdtsc` and `cpuid` are allowed.
    pub time_stamp_counter: bool,
    pub cpuid: bool,
    pub io_flusher: bool,
    /// `PR_GET_SPECULATION_CTRL` of `PR_SPEC_STORE_BYPASS`, `PR_SPEC_INDIRECT_BRANCH`, `PR_SPEC_L1D_FLUSH`, where the thread may
    /// choose.
    pub speculation: [Option<u32>; 3],
}

/// `sizeof(struct robust_list_head)`, the only length there is.
const ROBUST_LIST_SIZE: u64 = 24;
/// `PR_SPEC_ENABLE` and the other choices.
const SPECULATION_CHOICES: u32 = 0x1e;

impl Thread {
    fn read(answers: &Answers) -> Thread {
        let flags = answers.stat.flags;
        let (head, length) = answers.robust_list;
        Thread {
            name: answers.stat.comm.clone(),
            personality: answers.personality,
            parent_death_signal: answers.parent_death_signal,
            clear_child_tid: answers.tid_address.0,
            robust_list: if length == ROBUST_LIST_SIZE { head } else { 0 },
            machine_check_kill: (flags & PF_MCE_PROCESS != 0).then_some((flags & PF_MCE_EARLY != 0).into()),
            time_stamp_counter: answers.time_stamp_counter,
            cpuid: answers.cpuid,
            io_flusher: flags & PF_IO_FLUSHER == PF_IO_FLUSHER,
            speculation: answers.speculation.map(|value| value.filter(|value| value & PR_SPEC_PRCTL != 0)),
        }
    }
}

/// Settings of a thread.
pub struct ThreadAttributes;

impl Resource for ThreadAttributes {
    const NAME: &'static str = "thread-attributes";
    type Scope = OfThread;
    type Saved = Thread;

    fn collect(context: &mut Collect<'_>) -> Result<Thread, DumpError> {
        Ok(Thread::read(context.answers()))
    }

    fn check(saved: &Thread, context: &mut Check<'_>) {
        if saved.io_flusher && !ourselves().may(Capability::SYS_RESOURCE) {
            context.refuse("I/O flusher", "only a privileged thread may be one", "restore with CAP_SYS_RESOURCE");
        }
        if saved.name.len() > 15 || !(0..=64).contains(&saved.parent_death_signal) {
            context.refuse("thread", "name or signal are impossible", "the image is damaged");
        }
    }

    /// All but what a change of credentials takes away; see [`after_credentials`].
    fn rebuild(saved: &Thread, context: &mut Rebuild<'_>) -> Result<(), RestoreError> {
        let initial = Thread::read(context.initial);
        let batch = context.later();
        let name = batch.string(&saved.name);
        batch.call(Sysno::prctl, args![PR_SET_NAME, name]);
        batch.call(Sysno::set_tid_address, args![RemotePtr(saved.clear_child_tid)]);
        if saved.robust_list != 0 || initial.robust_list != 0 {
            batch.call(Sysno::set_robust_list, args![saved.robust_list, ROBUST_LIST_SIZE]);
        }
        if saved.personality != initial.personality {
            batch.call(Sysno::personality, args![saved.personality]);
        }
        if saved.machine_check_kill != initial.machine_check_kill {
            let policy = saved.machine_check_kill.unwrap_or(2);
            batch.call(Sysno::prctl, args![PR_MCE_KILL, PR_MCE_KILL_SET, policy, 0, 0]);
        }
        if saved.io_flusher != initial.io_flusher {
            batch.call(Sysno::prctl, args![PR_SET_IO_FLUSHER, u32::from(saved.io_flusher), 0, 0, 0]);
        }
        for (which, (saved, initial)) in saved.speculation.iter().zip(initial.speculation).enumerate() {
            if let Some(value) = saved
                && Some(*value) != initial
            {
                batch.call(Sysno::prctl, args![PR_SET_SPECULATION_CTRL, which, value & SPECULATION_CHOICES, 0, 0]);
            }
        }
        if !saved.time_stamp_counter {
            batch.call(Sysno::prctl, args![PR_SET_TSC, PR_TSC_SIGSEGV]);
        }
        if !saved.cpuid {
            batch.call(Sysno::arch_prctl, args![ARCH_SET_CPUID, 0]);
        }
        Ok(())
    }
}

/// What a change of credentials takes from a thread.
///
/// The root of a tree has ckpt for a parent. Where ckpt is about to end, the end of that parent must not be told it.
pub fn after_credentials(saved: &Thread, is_root: bool, context: &mut Rebuild<'_>) -> Result<(), RestoreError> {
    let wanted = if is_root && context.options.detach { 0 } else { saved.parent_death_signal };
    if wanted == 0 && context.initial.parent_death_signal == 0 {
        return Ok(());
    }
    let mut batch = Batch::new();
    batch.call(Sysno::prctl, args![PR_SET_PDEATHSIG, wanted]);
    context.section(ThreadAttributes::NAME).run(&batch).map(drop)
}
