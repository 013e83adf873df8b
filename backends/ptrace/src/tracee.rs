//! One stopped thread of a target: what it was doing, and system calls made in its name.

use std::io;
use std::ops::Range;
use std::time::Duration;

use ckpt_agent::process::Process;
use ckpt_agent::{Channel, frame};
use ckpt_core::procfs::Mapping;
use ckpt_core::{Context, General, Pid, Registers, RemotePtr, Rseq, SigInfo};
use nix::errno::Errno;

use crate::entrance::Entrance;
use crate::restart::{self, Interrupted};
use crate::sys::{self, Stop};
use crate::timeouts::{self, Clocks, Rest, Sleeper};

/// A thread in a ptrace stop.
#[derive(Debug)]
pub struct Tracee {
    pub tid: Pid,
    /// As the freeze found it.
    original: General,
    blocked: u64,
    xsave: Vec<u8>,
    rseq: Option<Rseq>,
    /// Where it will go on, however it is let go.
    ready: General,
    /// When the timeout of the call that it waits in ends (`CLOCK_MONOTONIC`, nanoseconds), where only we know.
    deadline: Option<u64>,
    position: Position,
    foothold: Option<Foothold>,
}

/// Where a tracee stands now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Position {
    /// In the stop of the freeze, with its registers untouched.
    Frozen,
    /// At the end of a system call that was injected.
    Injected,
    /// Running the agent.
    Agent,
    /// Out of the agent by itself: it runs the program, and there is nothing to put back.
    Left,
}

/// What was written below the stack of a tracee, so that it finds its way back without us.
#[derive(Debug)]
struct Foothold {
    /// Lowest address of what was overwritten, and what was there.
    low: u64,
    saved: Vec<u8>,
    /// The address of the restorer, followed by `undo` frames, and last the frame with the thread's registers.
    slot: u64,
    last_slot: u64,
}

/// The part of the stack below the stack pointer that belongs to the program (x86-64 psABI).
const RED_ZONE: u64 = 128;
/// A frame without vector state, and the address of the restorer before it.
const UNDO_SLOT: u64 = 384;
/// Calls that the way back may begin with.
const MOST_UNDOS: u64 = 3;

/// A call that a tracee makes in our name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injection {
    /// It is on its way to the stop before the call.
    Entering,
    /// It is on its way to the stop after it.
    Leaving,
}

/// `-ENOSYS` and the like as the kernel returns them.
type RawResult = i64;

impl Tracee {
    /// Takes over a thread that is in an interrupt or group stop.
    pub fn new(tid: Pid, process: &Process) -> Result<Tracee, TraceError> {
        let original = sys::general(tid)?;
        let rseq = sys::rseq(tid)?;
        let read = |at: u64, code: &mut [u8]| process.read(RemotePtr(at), code).is_ok();
        let ready = restart::wind_back(&original, read).map_err(TraceError::UnknownRestart)?;
        let mut tracee = Tracee {
            tid,
            original,
            blocked: sys::blocked(tid)?,
            xsave: sys::xsave(tid)?,
            rseq,
            ready,
            deadline: None,
            position: Position::Frozen,
            foothold: None,
        };
        tracee.leave_critical_section(process);
        Ok(tracee)
    }

    /// Takes over a thread of a skeleton, seized and stopped in its agent, which is to go on with a context.
    pub fn of_skeleton(tid: Pid, context: &Context) -> Tracee {
        Tracee {
            tid,
            original: context.registers.general,
            blocked: context.blocked,
            xsave: context.registers.xsave.clone(),
            rseq: context.rseq,
            ready: context.registers.general,
            deadline: context.timeout_left.map(|left| timeouts::monotonic().saturating_add(left)),
            position: Position::Injected,
            foothold: None,
        }
    }

    /// Sets the vector state of a thread of a skeleton, which its agent does without.
    pub fn try_vector_state(&self) -> Result<(), TraceError> {
        Ok(sys::set_xsave(self.tid, &self.xsave)?)
    }

    /// A thread of a skeleton gets what it goes on with.
    pub fn set_context(&self) -> Result<(), TraceError> {
        sys::set_xsave(self.tid, &self.xsave)?;
        sys::set_blocked(self.tid, self.blocked)?;
        Ok(sys::set_general(self.tid, &self.ready)?)
    }

    /// A restartable sequence (rseq(2)) that was interrupted ends at its abort handler, as the kernel would have it: it
    /// cannot see the program's instruction pointer once we have moved it.
    fn leave_critical_section(&mut self, process: &Process) {
        let Some(rseq) = self.rseq else { return };
        let mut pointer = [0; 8];
        if process.read(RemotePtr(rseq.address.0 + 8), &mut pointer).is_err() || pointer == [0; 8] {
            return;
        }
        // struct rseq_cs: version, flags, start_ip, post_commit_offset, abort_ip
        let mut section = [0; 32];
        if process.read(RemotePtr(u64::from_ne_bytes(pointer)), &mut section).is_err() {
            return;
        }
        let word = |n: usize| u64::from_ne_bytes(section[n * 8..][..8].try_into().unwrap());
        let (start, length, abort) = (word(1), word(2), word(3));
        if self.ready.rip.wrapping_sub(start) < length {
            self.ready.rip = abort;
            self.original = self.ready;
            let _ = process.write(RemotePtr(rseq.address.0 + 8), &[0; 8]);
        }
    }

    pub fn context(&self) -> Context {
        Context {
            registers: Registers { general: self.ready, xsave: self.xsave.clone() },
            blocked: self.blocked,
            rseq: self.rseq,
            timeout_left: self.deadline.map(|deadline| deadline.saturating_sub(timeouts::monotonic())),
        }
    }

    /// Notes when its timeout ends, if it was seen asleep in the call that it was stopped in.
    pub fn note_timeout(&mut self, process: &Process, sleeper: &Sleeper, clocks: &mut Clocks) {
        if restart::interrupted(&self.original) != Interrupted::No {
            self.deadline = sleeper.deadline(process, self.tid, &self.original, clocks);
        }
    }

    pub fn is_agent(&self) -> bool {
        self.position == Position::Agent
    }

    /// Whether the frames fit below its stack.
    fn room_below(&self, mappings: &[Mapping]) -> bool {
        let top = self.ready.rsp;
        let low = top.saturating_sub(self.foothold_size());
        // The first write may still have to grow a stack.
        mappings.iter().any(|mapping| {
            mapping.write
                && mapping.start <= top.saturating_sub(1)
                && top <= mapping.end
                && (mapping.start <= low || (mapping.name.as_os_str() == "[stack]" && low + (1 << 20) > mapping.start))
        })
    }

    fn foothold_size(&self) -> u64 {
        RED_ZONE + frame::size(self.xsave.len()) as u64 + MOST_UNDOS * UNDO_SLOT + 256
    }

    /// Writes the way back below the stack. Without room for it, nothing is written.
    pub fn establish(
        &mut self,
        process: &Process,
        entrance: &Entrance,
        mappings: &[Mapping],
    ) -> Result<(), TraceError> {
        if self.foothold.is_some() {
            return Ok(());
        }
        if !self.room_below(mappings) {
            return Err(TraceError::NoStack(self.tid));
        }
        let registers = Registers { general: self.ready, xsave: self.xsave.clone() };
        let size = frame::size(self.xsave.len()) as u64;
        let last_frame = (self.ready.rsp - RED_ZONE - size) & !63;
        let last_slot = last_frame - 8;
        let low = last_slot - MOST_UNDOS * UNDO_SLOT;
        let mut saved = vec![0; (last_frame + size - low) as usize];
        // A stack that has yet to grow holds zeros there.
        let _ = process.read(RemotePtr(low), &mut saved);
        let mut bytes = entrance.restorer.to_ne_bytes().to_vec();
        bytes.extend(frame::build(&registers, self.blocked, last_frame));
        write(process, last_slot, &bytes)?;
        self.foothold = Some(Foothold { low, saved, slot: last_slot, last_slot });
        Ok(())
    }

    /// From now on the way back begins with these system calls (number and two arguments), [`MOST_UNDOS`] at most. Gives the
    /// address of the frame that makes the first.
    pub fn undo_with(
        &mut self,
        process: &Process,
        entrance: &Entrance,
        calls: &[(libc::c_long, [u64; 2])],
    ) -> Result<u64, TraceError> {
        let foothold = self.foothold.as_mut().expect("the way back was established");
        let mut next = foothold.last_slot;
        // The last call first: each frame returns to the slot of the one after it.
        for &(number, args) in calls.iter().rev() {
            let general = General {
                rip: entrance.syscall_ret,
                rsp: next,
                rax: number as u64,
                rdi: args[0],
                rsi: args[1],
                orig_rax: u64::MAX,
                eflags: 0x202,
                cs: self.original.cs,
                ss: self.original.ss,
                ..General::default()
            };
            next -= UNDO_SLOT;
            let mut bytes = entrance.restorer.to_ne_bytes().to_vec();
            bytes.extend(frame::build_plain(&general, u64::MAX));
            assert!(bytes.len() as u64 <= UNDO_SLOT && next >= foothold.low);
            write(process, next, &bytes)?;
        }
        foothold.slot = next;
        Ok(next + 8)
    }

    /// The signals pending for it, or for its whole process.
    pub fn pending(&self, shared: bool) -> Result<Vec<SigInfo>, TraceError> {
        if self.position != Position::Agent {
            return Ok(sys::pending(self.tid, shared)?);
        }
        // The agent waits in a `read` of its socket, which the kernel restarts.
        sys::interrupt(self.tid)?;
        self.wait_interrupted()?;
        let pending = sys::pending(self.tid, shared);
        sys::resume(self.tid, 0)?;
        Ok(pending?)
    }

    /// The way back is the plain one again.
    pub fn undo_nothing(&mut self) {
        let foothold = self.foothold.as_mut().expect("the way back was established");
        foothold.slot = foothold.last_slot;
    }

    /// Makes one system call in its name, once the way back is there. Should we be gone in the middle, it makes the call
    /// and goes on.
    pub fn inject(
        &mut self,
        entrance: &Entrance,
        number: libc::c_long,
        args: [u64; 6],
    ) -> Result<RawResult, TraceError> {
        let begun = self.begin_call(entrance, number, args)?;
        self.end_call(begun)
    }

    /// The first third of [`inject`](Tracee::inject): sends it to the call.
    pub fn begin_call(
        &mut self,
        entrance: &Entrance,
        number: libc::c_long,
        args: [u64; 6],
    ) -> Result<Injection, TraceError> {
        self.aim(entrance, number, args)?;
        if self.position == Position::Frozen {
            // Only now: a thread that is let go before this line has its own mask, after it the frame brings it back.
            self.position = Position::Injected;
            sys::set_blocked(self.tid, u64::MAX)?;
        }
        sys::resume_to_call(self.tid)?;
        Ok(Injection::Entering)
    }

    /// Puts it before a call, which it makes when it is let go: then it goes the way back.
    pub fn aim(&self, entrance: &Entrance, number: libc::c_long, args: [u64; 6]) -> Result<(), TraceError> {
        let foothold = self.foothold.as_ref().expect("the way back was established");
        let general = General {
            rip: entrance.syscall_ret,
            rsp: foothold.slot,
            rax: number as u64,
            rdi: args[0],
            rsi: args[1],
            rdx: args[2],
            r10: args[3],
            r8: args[4],
            r9: args[5],
            orig_rax: u64::MAX,
            eflags: 0x202,
            ..self.original
        };
        Ok(sys::set_general(self.tid, &general)?)
    }

    /// A thread that was stopped in a lane is out of it from now on: at each instant it either says so itself when it is let
    /// go, or has been said to be.
    pub fn leave_lane(&mut self, entrance: &Entrance, lane: &mut Channel) -> Result<(), TraceError> {
        self.undo_nothing();
        self.aim(entrance, libc::SYS_time, [lane.left_address(), 0, 0, 0, 0, 0])?;
        lane.set_left();
        Ok(())
    }

    /// The second: from its beginning into the call.
    pub fn continue_call(&self, begun: Injection) -> Result<Injection, TraceError> {
        if begun == Injection::Entering {
            self.wait_for_call()?;
            sys::resume_to_call(self.tid)?;
        }
        Ok(Injection::Leaving)
    }

    /// The last: to its end, and its result.
    pub fn end_call(&self, begun: Injection) -> Result<RawResult, TraceError> {
        self.continue_call(begun)?;
        self.wait_for_call()?;
        Ok(sys::general(self.tid)?.rax as i64)
    }

    fn wait_for_call(&self) -> Result<(), TraceError> {
        loop {
            // Calls that are injected do not wait for anything.
            match sys::wait_soon(self.tid, None)? {
                Some(Stop::Call) => return Ok(()),
                Some(Stop::Ended(_)) => return Err(TraceError::Ended(self.tid)),
                // A group stop: it takes effect when we let go.
                _ => sys::resume_to_call(self.tid)?,
            }
        }
    }

    /// It has gone the way back by itself.
    pub fn has_left(&mut self) {
        self.position = Position::Left;
        self.foothold = None;
    }

    /// What its way back lies over.
    pub fn covered(&self) -> Option<(RemotePtr, Vec<u8>)> {
        self.foothold.as_ref().map(|foothold| (RemotePtr(foothold.low), foothold.saved.clone()))
    }

    /// Whether its way back is there.
    pub fn has_way(&self) -> bool {
        self.foothold.is_some()
    }

    /// The frame that leads back and does nothing else.
    pub fn plain_frame(&self) -> u64 {
        self.foothold.as_ref().expect("the way back was established").last_slot + 8
    }

    /// Sends it into the agent, with the lane's address in `rdi`, on the lane's own stack: the program's is part of what
    /// is saved, and stays as it is.
    ///
    /// `writable` is what the agent has to make writable first, where it comes into a region that was just mapped.
    pub fn enter_agent(&mut self, channel: &Channel, writable: Option<Range<u64>>) -> Result<(), TraceError> {
        let (stack, stack_size) = channel.stack();
        let general = General {
            rip: channel.entry(),
            rdi: channel.address(),
            rsi: writable.as_ref().map_or(0, |part| part.start),
            rdx: writable.as_ref().map_or(0, |part| part.end - part.start),
            rsp: stack + stack_size,
            rax: 0,
            orig_rax: u64::MAX,
            eflags: 0x202,
            ..self.original
        };
        sys::set_general(self.tid, &general)?;
        if self.position == Position::Frozen {
            self.position = Position::Injected;
            sys::set_blocked(self.tid, u64::MAX)?;
        }
        sys::resume(self.tid, 0)?;
        self.position = Position::Agent;
        Ok(())
    }

    /// While the agent runs: a stop that was not asked for is left at once. Tells whether the thread is still there.
    pub fn keep_running(&self) -> io::Result<bool> {
        match sys::wait(self.tid, false)? {
            None => Ok(true),
            Some(Stop::Ended(_)) => Ok(false),
            Some(Stop::Signal(signal)) => sys::resume(self.tid, signal).map(|()| true),
            Some(_) => sys::resume(self.tid, 0).map(|()| true),
        }
    }

    /// Out of the agent, into a stop where calls can be injected again.
    pub fn leave_agent(&mut self) -> Result<(), TraceError> {
        sys::interrupt(self.tid)?;
        self.wait_interrupted()?;
        self.position = Position::Injected;
        Ok(())
    }

    fn wait_interrupted(&self) -> Result<(), TraceError> {
        loop {
            match wait(self.tid, Duration::from_secs(10))? {
                Stop::Interrupted | Stop::Group(_) => return Ok(()),
                Stop::Ended(_) => return Err(TraceError::Ended(self.tid)),
                Stop::Signal(signal) => sys::resume(self.tid, signal)?,
                Stop::Call => sys::resume(self.tid, 0)?,
            }
        }
    }

    /// Puts everything back as the freeze found it, in a stop like that of the freeze. In each instant of it the thread
    /// would go on rightly if it were let go.
    pub fn put_back(&mut self, process: &Process) -> Result<(), TraceError> {
        if self.position == Position::Left {
            return Ok(());
        }
        if self.position == Position::Frozen {
            self.clear_way(process);
            // The kernel restarts what it stopped, but for the calls that gave up.
            if restart::interrupted(&self.original) == Interrupted::GaveUp {
                sys::set_general(self.tid, &self.ready)?;
            }
            return Ok(());
        }
        self.begin_put_back()?;
        self.end_put_back(process)
    }

    /// The first half of [`put_back`](Tracee::put_back), where a call was injected or the agent runs: sends it into a stop.
    pub fn begin_put_back(&mut self) -> Result<(), TraceError> {
        // The kernel looks at restarts only on its way out of a signal stop.
        sys::interrupt(self.tid)?;
        if self.position != Position::Agent {
            sys::resume(self.tid, 0)?;
        }
        Ok(())
    }

    /// The second half.
    pub fn end_put_back(&mut self, process: &Process) -> Result<(), TraceError> {
        self.wait_interrupted()?;
        self.position = Position::Injected;
        self.put_back_registers()?;
        self.clear_way(process);
        Ok(())
    }

    /// Puts back what is below its stack, once it has its registers.
    pub fn clear_way(&mut self, process: &Process) {
        if let Some(foothold) = self.foothold.take() {
            // Below the stack pointer: the program does not look there, but nothing is to stay.
            let _ = process.write(RemotePtr(foothold.low), &foothold.saved);
        }
    }

    /// Lets it go on, once it was put back or has its context. A call that it waits in gets what is left of its timeout.
    pub fn let_go(&self, process: &Process) {
        let signal = match self.resume_call(process) {
            Ok(LetGo::Now(signal)) => signal,
            Ok(LetGo::WithUs) => return,
            Err(_) => 0,
        };
        let _ = sys::detach(self.tid, signal);
    }

    /// Prepares the call that it waits in for what is left of its timeout.
    fn resume_call(&self, process: &Process) -> io::Result<LetGo> {
        // What continues by its restart block has its own time. In a skeleton, nothing does.
        let continues = restart::interrupted(&self.original) == Interrupted::Continues;
        let (Some(deadline), false) = (self.deadline, continues) else { return Ok(LetGo::Now(0)) };
        let Some(rest) = timeouts::rest(process, &self.ready, deadline) else { return Ok(LetGo::Now(0)) };
        if let Rest::Registers(general) = rest {
            sys::set_general(self.tid, &general)?;
            return Ok(LetGo::Now(0));
        }
        enter_call(self.tid, process, &self.ready, &rest, deadline)
    }

    /// For a thread whose call is to be let go of by the end of its tracer: that of another thread of ours, as this one may
    /// have long to live. It is detached here, and [`resume_all`] does the rest.
    pub fn let_go_for_now(&self, process: &Process) -> Option<Asleep> {
        let gave_up = restart::interrupted(&self.original) == Interrupted::GaveUp;
        let deadline = self.deadline.filter(|_| gave_up)?;
        let Some(Rest::Time(_)) = timeouts::rest(process, &self.ready, deadline) else { return None };
        let _ = sys::detach(self.tid, 0);
        Some(Asleep { pid: process.proc.pid(), tid: self.tid, ready: self.ready, deadline })
    }

    /// Puts back what it was found with, in a stop by an interrupt.
    pub fn put_back_registers(&mut self) -> Result<(), TraceError> {
        sys::set_xsave(self.tid, &self.xsave)?;
        sys::set_blocked(self.tid, self.blocked)?;
        let gave_up = restart::interrupted(&self.original) == Interrupted::GaveUp;
        sys::set_general(self.tid, if gave_up { &self.ready } else { &self.original })?;
        self.position = Position::Frozen;
        Ok(())
    }
}

/// A thread that was let go of into its call, with the whole timeout.
pub struct Asleep {
    pid: Pid,
    tid: Pid,
    /// Before its call.
    ready: General,
    deadline: u64,
}

/// Gives threads what is left of their timeouts, and ends as their tracer.
pub fn resume_all(asleep: Vec<Asleep>) {
    if asleep.is_empty() {
        return;
    }
    let resume = || {
        for thread in &asleep {
            // One that has ended, or is traced by another by now, is left as it is.
            let _ = thread.resume();
        }
    };
    std::thread::scope(|scope| {
        // Where no more threads may be started we stay the tracer, until ckpt ends.
        if std::thread::Builder::new().spawn_scoped(scope, resume).is_err() {
            resume();
        }
    });
}

impl Asleep {
    fn resume(&self) -> Result<(), TraceError> {
        let process = Process::open(self.pid)?;
        sys::seize(self.tid)?;
        sys::interrupt(self.tid)?;
        let signal = match wait(self.tid, Duration::from_secs(10))? {
            Stop::Interrupted => match self.resume_stopped(&process)? {
                LetGo::Now(signal) => signal,
                LetGo::WithUs => return Ok(()),
            },
            Stop::Signal(signal) => signal,
            _ => 0,
        };
        Ok(sys::detach(self.tid, signal)?)
    }

    fn resume_stopped(&self, process: &Process) -> Result<LetGo, TraceError> {
        let (now, ready) = (sys::general(self.tid)?, &self.ready);
        let args = |general: &General| {
            [general.rdi, general.rsi, general.rdx, general.r10, general.r8, general.r9, general.rsp]
        };
        let before_call = (now.rip, now.rax, now.orig_rax) == (ready.rip, ready.rax, u64::MAX);
        let in_call = restart::interrupted(&now) == Interrupted::GaveUp
            && (now.rip, now.orig_rax) == (ready.rip + 2, ready.rax)
            && args(&now) == args(ready);
        // A signal that came meanwhile has interrupted the call indeed.
        if !before_call && (!in_call || self.has_signal()?) {
            return Ok(LetGo::Now(0));
        }
        sys::set_general(self.tid, ready)?;
        match timeouts::rest(process, ready, self.deadline) {
            Some(rest) => Ok(enter_call(self.tid, process, ready, &rest, self.deadline)?),
            None => Ok(LetGo::Now(0)),
        }
    }

    /// Whether a signal is about to be delivered.
    fn has_signal(&self) -> io::Result<bool> {
        let blocked = sys::blocked(self.tid)?;
        let mut pending = sys::pending(self.tid, false)?;
        pending.extend(sys::pending(self.tid, true)?);
        let number = |info: &SigInfo| i32::from_ne_bytes(info[..4].try_into().expect("four bytes"));
        Ok(pending.iter().any(|info| blocked >> (number(info) - 1) & 1 == 0))
    }
}

/// Brings a stopped thread to where it is about to make its call, and changes the timeout there: a handler would write over
/// what lies below the stack, but between that point and the kernel's look at it, the program runs nothing.
fn enter_call(tid: Pid, process: &Process, ready: &General, rest: &Rest, deadline: u64) -> io::Result<LetGo> {
    sys::resume_to_call(tid)?;
    match sys::wait_soon(tid, None)? {
        Some(Stop::Call) => {}
        Some(Stop::Signal(signal)) => return Ok(LetGo::Now(signal)),
        _ => return Ok(LetGo::Now(0)),
    }
    let now = sys::general(tid)?;
    if (now.orig_rax, now.rip) == (ready.rax, ready.rip + 2)
        && let Some(general) = rest.write(process, deadline)
    {
        let (rax, orig_rax, rcx, r11) = (now.rax, now.orig_rax, now.rcx, now.r11);
        sys::set_general(tid, &General { rax, orig_rax, rip: now.rip, rcx, r11, ..general })?;
    }
    // To be let go of here would interrupt the call; once it is asleep, it would as well. The end of a tracer disturbs
    // nobody.
    sys::resume(tid, 0)?;
    Ok(LetGo::WithUs)
}

/// How a thread is let go.
enum LetGo {
    /// With this signal, or 0.
    Now(i32),
    /// By the end of the thread of ours that traces it.
    WithUs,
}

/// Writes below a stack, which may have to grow for it.
fn write(process: &Process, at: u64, bytes: &[u8]) -> Result<(), TraceError> {
    if process.write(RemotePtr(at), bytes).is_err() {
        process.force_write(RemotePtr(at), bytes)?;
    }
    Ok(())
}

/// Waits for the next stop of a tracee, or its end.
pub fn wait(tid: Pid, timeout: Duration) -> Result<Stop, TraceError> {
    sys::wait_soon(tid, Some(timeout))?.ok_or(TraceError::TimedOut(tid))
}

/// Why something could not be done with a tracee.
#[derive(Debug)]
pub enum TraceError {
    Io(io::Error),
    Target(ckpt_core::TargetError),
    Ended(Pid),
    TimedOut(Pid),
    /// The stack pointer has no room below it.
    NoStack(Pid),
    /// A call with this number continues by a restart block that cannot be told.
    UnknownRestart(u64),
    /// The kernel refused so many bytes more in an address space.
    NoRoom {
        bytes: usize,
        errno: Errno,
    },
}

impl From<io::Error> for TraceError {
    fn from(error: io::Error) -> TraceError {
        TraceError::Io(error)
    }
}

impl From<ckpt_core::TargetError> for TraceError {
    fn from(error: ckpt_core::TargetError) -> TraceError {
        TraceError::Target(error)
    }
}

impl std::fmt::Display for TraceError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            TraceError::Io(error) => error.fmt(f),
            TraceError::Target(error) => error.fmt(f),
            TraceError::Ended(tid) => write!(f, "thread {tid} ended"),
            TraceError::TimedOut(tid) => write!(f, "thread {tid} did not stop"),
            TraceError::NoRoom { bytes, errno } => write!(f, "no room for {bytes} bytes more in its memory: {errno}"),
            TraceError::NoStack(tid) => write!(f, "thread {tid} has no room on its stack"),
            TraceError::UnknownRestart(number) => {
                write!(f, "a thread is in system call {number}, interrupted twice, and what to run again is not known")
            }
        }
    }
}
