//! Relative timeouts that the kernel does not show: how much of one is left, and the call run again with that.
//!
//! A call like `epoll_wait` that is interrupted says EINTR and nothing else; run again as it was, it would wait for its
//! whole timeout. But the scheduler shows when a thread was put off its processor (`se.exec_start` in
//! `/proc/PID/task/TID/sched`), and that of a thread asleep is when it fell asleep. What is read before the interruption is
//! believed only if the thread slept on until it was interrupted, as far as the clocks of processors can tell, and every
//! doubt makes the time that is left longer, never shorter.
//!
//! The call is run again with another argument, and that in a register that the program could look at afterwards: in the
//! x86-64 ABI all registers of arguments are lost in a call, but a program may make its system calls inline. So it is done
//! only where the code after the call shows that nobody looks. A timeout in memory is left alone: the register leads to
//! another place below the stack, which the kernel has read before the program runs a single instruction.
//!
//! Waits whose timeout is the socket's (`SO_RCVTIMEO`, `SO_SNDTIMEO`) begin anew: the only place to put the rest is the
//! socket, where others see it and where it would stay if we were killed. So does `recvmmsg`, as the kernel itself looks at
//! its timeout only when a message comes, and begins anew after every interruption.

use std::collections::HashMap;
use std::io::Read;

use ckpt_agent::process::Process;
use ckpt_core::procfs::of_thread;
use ckpt_core::{General, Pid, RemotePtr};
use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, OpAccess, OpKind, Register,
};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};

/// How a call is told its timeout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// An `int`, in milliseconds.
    Milliseconds,
    /// The address of a `struct timespec`.
    Time,
}

/// Which argument of a call is its relative timeout, if it has one and the kernel does not show what is left of it.
fn timeout_argument(number: i64, args: &[u64; 6]) -> Option<(usize, Form)> {
    const FUTEX_WAIT: u64 = 0;
    const FUTEX_FLAGS: u64 = 128 | 256;
    let (index, form) = match number {
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => (3, Form::Milliseconds),
        libc::SYS_poll => (2, Form::Milliseconds),
        libc::SYS_epoll_pwait2 | libc::SYS_semtimedop => (3, Form::Time),
        libc::SYS_rt_sigtimedwait => (2, Form::Time),
        libc::SYS_futex if args[1] & !FUTEX_FLAGS == FUTEX_WAIT => (3, Form::Time),
        // With a place for the rest, the kernel writes it there.
        libc::SYS_nanosleep if args[1] == 0 => (0, Form::Time),
        libc::SYS_clock_nanosleep if args[1] == 0 && args[3] == 0 && matches!(args[0], 0 | 1 | 7) => (2, Form::Time),
        _ => return None,
    };
    let finite = match form {
        Form::Milliseconds => args[index] as i32 > 0,
        Form::Time => args[index] != 0,
    };
    finite.then_some((index, form))
}

/// The arguments of a system call, in their order.
fn arguments(general: &General) -> [u64; 6] {
    [general.rdi, general.rsi, general.rdx, general.r10, general.r8, general.r9]
}

/// `CLOCK_MONOTONIC`, in nanoseconds.
pub fn monotonic() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every kernel has this clock");
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

/// What the scheduler shows of a thread: nanoseconds of the clock of the processor it was on last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Schedule {
    /// When its time on the processor was last reckoned: when it was put off it.
    exec_start: u64,
    /// Its time on processors, and waiting for one.
    ran: u64,
    waited: u64,
    /// How often it went to sleep, and how often it was put off although it wanted to run.
    voluntary: u64,
    involuntary: u64,
}

impl Schedule {
    /// Parses `/proc/PID/task/TID/sched` (`CONFIG_SCHED_DEBUG`), and `schedstat` beside it (`CONFIG_SCHED_INFO`).
    fn parse(text: &str, statistics: &str) -> Option<Schedule> {
        let field = |name: &str| {
            let line = text.lines().find(|line| line.split_once(':').is_some_and(|(found, _)| found.trim() == name))?;
            Some(line.rsplit_once(':')?.1.trim())
        };
        // Milliseconds with six digits after the point.
        let time = |name: &str| {
            let (whole, part) = field(name)?.split_once('.')?;
            let part = (part.len() == 6).then(|| part.parse::<u64>().ok())??;
            Some(whole.parse::<u64>().ok()? * 1_000_000 + part)
        };
        Some(Schedule {
            exec_start: time("se.exec_start")?,
            ran: time("se.sum_exec_runtime")?,
            waited: statistics.split_ascii_whitespace().nth(1)?.parse().ok()?,
            voluntary: field("nr_voluntary_switches")?.parse().ok()?,
            involuntary: field("nr_involuntary_switches")?.parse().ok()?,
        })
    }

    fn of(tid: Pid) -> Option<Schedule> {
        Schedule::parse(&of_thread(tid, "sched").ok()?, &of_thread(tid, "schedstat").ok()?)
    }
}

/// The processor that a thread was on last (field 39 of `/proc/PID/stat`).
fn processor(tid: Pid) -> Option<usize> {
    of_thread(tid, "stat").ok()?.rsplit_once(") ")?.1.split_ascii_whitespace().nth(36)?.parse().ok()
}

/// The clocks of processors, as distances from `CLOCK_MONOTONIC`: at least and at most, in nanoseconds.
#[derive(Debug, Default)]
pub struct Clocks {
    known: HashMap<usize, Option<(i64, i64)>>,
}

impl Clocks {
    fn distance(&mut self, cpu: usize) -> Option<(i64, i64)> {
        *self.known.entry(cpu).or_insert_with(|| measure(cpu))
    }
}

/// Goes to a processor for a moment, and looks at its clock: at what it shows of ourselves right after our own time has been
/// reckoned, which to ask for our time on the processor does.
fn measure(cpu: usize) -> Option<(i64, i64)> {
    let ourselves = nix::unistd::Pid::from_raw(0);
    let before = sched_getaffinity(ourselves).ok()?;
    let mut one = CpuSet::new();
    one.set(cpu).and_then(|()| sched_setaffinity(ourselves, &one)).ok()?;
    let look = || {
        let earliest = monotonic() as i64;
        clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).ok()?;
        let mut text = [0; 4096];
        let length = std::fs::File::open("/proc/thread-self/sched").and_then(|mut file| file.read(&mut text)).ok()?;
        let latest = monotonic() as i64;
        let clock = Schedule::parse(&String::from_utf8_lossy(&text[..length]), "0 0")?.exec_start as i64;
        Some((earliest - clock, latest - clock))
    };
    let mut distance: Option<(i64, i64)> = None;
    for _ in 0..6 {
        if let Some((least, most)) = look() {
            let (known_least, known_most) = distance.unwrap_or((least, most));
            distance = Some((known_least.max(least), known_most.min(most)));
        }
    }
    let _ = sched_setaffinity(ourselves, &before);
    distance.filter(|(least, most)| least <= most)
}

/// A thread that is asleep in a call with a timeout, before it is interrupted.
#[derive(Clone, Debug)]
pub struct Sleeper {
    number: i64,
    args: [u64; 6],
    schedule: Schedule,
    /// When that was so, by `CLOCK_MONOTONIC`.
    looked: u64,
    cpu: usize,
    /// By `CLOCK_MONOTONIC`.
    interrupted: u64,
}

impl Sleeper {
    /// Looks whether a thread is asleep in such a call. One small file is read for those that are not.
    pub fn look(tid: Pid, clocks: &mut Clocks) -> Option<Sleeper> {
        let text = of_thread(tid, "syscall").ok()?;
        // Number and six arguments, stack pointer, instruction pointer; or `running`.
        let mut words = text.split_ascii_whitespace();
        let number: i64 = words.next()?.parse().ok()?;
        let mut args = [0; 6];
        for arg in &mut args {
            *arg = u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok()?;
        }
        timeout_argument(number, &args)?;
        // Now, as it takes longer than all the rest.
        clocks.distance(processor(tid)?)?;
        let schedule = Schedule::of(tid)?;
        let looked = monotonic();
        // It may have woken up meanwhile, and be asleep again on another one. If it sleeps from here on, this is the one.
        let cpu = processor(tid)?;
        Some(Sleeper { number, args, schedule, looked, cpu, interrupted: u64::MAX })
    }

    /// To be called right before it is interrupted.
    pub fn about_to_be_interrupted(&mut self) {
        self.interrupted = monotonic();
    }

    /// When its timeout ends (`CLOCK_MONOTONIC`, nanoseconds; rather too late), if the stopped thread slept in the same call
    /// until it was interrupted.
    pub fn deadline(&self, process: &Process, tid: Pid, stopped: &General, clocks: &mut Clocks) -> Option<u64> {
        if stopped.orig_rax as i64 != self.number || arguments(stopped) != self.args {
            return None;
        }
        let (index, form) = timeout_argument(self.number, &self.args)?;
        let timeout = match form {
            Form::Milliseconds => self.args[index] * 1_000_000,
            Form::Time => read_time(process, self.args[index])?,
        };
        let now = Schedule::of(tid)?;
        // It went to sleep once since, in its stop. So it woke up once; and that was not before we interrupted it. Otherwise
        // it may have been another call, made with the same arguments.
        if now.voluntary != self.schedule.voluntary + 1 {
            return None;
        }
        let ran = now.exec_start.checked_sub(now.ran.checked_sub(self.schedule.ran)?)?;
        let woke = ran.checked_sub(now.waited.checked_sub(self.schedule.waited)?)?;
        let began = if now.involuntary == self.schedule.involuntary { ran } else { woke };
        let cpu = processor(tid)?;
        let (least, _) = clocks.distance(cpu)?;
        let interrupted = i64::try_from(self.interrupted).ok()?;
        // The clock of a processor stands still while the host has taken it, so that what was measured before may put `began`
        // too early. What is measured now bounds it. A call that was made between the two, and not slept in, is not told
        // apart; it would be a call with the same arguments, made within microseconds of a wake-up just before ours.
        if (began as i64 + least) < interrupted && (began as i64 + measure(cpu)?.1) < interrupted {
            return None;
        }
        let (_, most) = clocks.distance(self.cpu)?;
        let asleep_since = u64::try_from(self.schedule.exec_start as i64 + most).ok()?.min(self.looked);
        let slept = monotonic().saturating_sub(asleep_since);
        // The clocks of processors and the one of timeouts are not corrected alike: by a thousandth at most.
        asleep_since.checked_add(slept / 1000)?.checked_add(timeout)
    }
}

fn read_time(process: &Process, address: u64) -> Option<u64> {
    let mut words = [0; 16];
    process.read(RemotePtr(address), &mut words).ok()?;
    let word = |at: usize| u64::from_ne_bytes(words[at..at + 8].try_into().expect("eight bytes"));
    word(0).checked_mul(1_000_000_000)?.checked_add(word(8))
}

/// Below the part of the stack that is the program's: where a timeout is put for the kernel to read.
const BELOW_STACK: u64 = 128 + 64;

/// How a call is made to wait for the rest of its timeout.
pub enum Rest {
    /// With these registers.
    Registers(General),
    /// With these, which lead to a time below the stack that is to be [written](Rest::write) first.
    Time(General),
}

/// How a thread that is to make its call again, as `ready` says, waits until `deadline`; `None` if it has to wait for its
/// whole timeout.
pub fn rest(process: &Process, ready: &General, deadline: u64) -> Option<Rest> {
    let args = arguments(ready);
    let (index, form) = timeout_argument(ready.rax as i64, &args)?;
    let register = [Register::RDI, Register::RSI, Register::RDX, Register::R10, Register::R8, Register::R9][index];
    if !nobody_looks(&mut |at, code| read_code(process, at, code), ready.rip + 2, register) {
        return None;
    }
    let value = match form {
        Form::Milliseconds => deadline.saturating_sub(monotonic()).div_ceil(1_000_000).min(args[index]),
        Form::Time => (ready.rsp - BELOW_STACK) & !15,
    };
    let mut general = *ready;
    match index {
        0 => general.rdi = value,
        2 => general.rdx = value,
        3 => general.r10 = value,
        _ => return None,
    }
    Some(match form {
        Form::Milliseconds => Rest::Registers(general),
        Form::Time => Rest::Time(general),
    })
}

impl Rest {
    /// Writes the time below the stack, and gives the registers that lead to it.
    pub fn write(&self, process: &Process, deadline: u64) -> Option<General> {
        let (Rest::Time(general) | Rest::Registers(general)) = self;
        let left = deadline.saturating_sub(monotonic());
        let place = RemotePtr((general.rsp - BELOW_STACK) & !15);
        let time = [(left / 1_000_000_000).to_ne_bytes(), (left % 1_000_000_000).to_ne_bytes()].concat();
        process.write(place, &time).or_else(|_| process.force_write(place, &time)).ok()?;
        Some(*general)
    }
}

/// Reads what there is of 15 bytes of code, the longest instruction. Gives how many.
fn read_code(process: &Process, at: u64, code: &mut [u8; 15]) -> usize {
    let in_page = (4096 - at % 4096).min(15) as usize;
    if process.read(RemotePtr(at), code).is_ok() {
        return 15;
    }
    if process.read(RemotePtr(at), &mut code[..in_page]).is_ok() { in_page } else { 0 }
}

/// Instructions that are looked at before it is too much.
const MOST_INSTRUCTIONS: usize = 600;

/// Whether all code that can run from an address on leaves alone what is in a register, until it is written over or, at the
/// end of the function, lost.
fn nobody_looks(read: &mut dyn FnMut(u64, &mut [u8; 15]) -> usize, from: u64, register: Register) -> bool {
    let mut factory = InstructionInfoFactory::new();
    let mut next = vec![from];
    let mut seen = std::collections::HashSet::new();
    while let Some(at) = next.pop() {
        if !seen.insert(at) {
            continue;
        }
        if seen.len() > MOST_INSTRUCTIONS {
            return false;
        }
        let mut code = [0; 15];
        let length = read(at, &mut code);
        let instruction = Decoder::with_ip(64, &code[..length], at, DecoderOptions::NONE).decode();
        if instruction.is_invalid() || instruction.code() == Code::Syscall {
            return false;
        }
        match uses(&mut factory, &instruction, register) {
            Use::Looks => return false,
            Use::WritesOver => continue,
            Use::No => {}
        }
        match instruction.flow_control() {
            FlowControl::Next => next.push(instruction.next_ip()),
            FlowControl::UnconditionalBranch => next.push(instruction.near_branch_target()),
            FlowControl::ConditionalBranch => {
                next.push(instruction.near_branch_target());
                next.push(instruction.next_ip());
            }
            FlowControl::Call if instruction.op0_kind() == OpKind::NearBranch64 => {
                next.push(instruction.near_branch_target());
                next.push(instruction.next_ip());
            }
            // No argument of a function is in r10.
            FlowControl::IndirectCall if register == Register::R10 => next.push(instruction.next_ip()),
            // To its caller it is lost.
            FlowControl::Return => {}
            _ => return false,
        }
    }
    true
}

enum Use {
    No,
    Looks,
    WritesOver,
}

fn uses(factory: &mut InstructionInfoFactory, instruction: &Instruction, register: Register) -> Use {
    let mut result = Use::No;
    for used in factory.info(instruction).used_registers() {
        if used.register().full_register() != register {
            continue;
        }
        match used.access() {
            OpAccess::None | OpAccess::NoMemAccess | OpAccess::CondWrite => {}
            // A write to the lower half clears the upper one; one to a byte leaves the rest.
            OpAccess::Write if used.register().size() >= 4 => result = Use::WritesOver,
            OpAccess::Write => {}
            _ => return Use::Looks,
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn looks(code: &[u8], register: Register) -> bool {
        let mut read = |at: u64, bytes: &mut [u8; 15]| {
            let rest = (at as usize).checked_sub(0x1000).and_then(|from| code.get(from..)).unwrap_or_default();
            let length = rest.len().min(15);
            bytes[..length].copy_from_slice(&rest[..length]);
            length
        };
        !nobody_looks(&mut read, 0x1000, register)
    }

    #[test]
    fn who_looks_at_a_register() {
        use Register::{R10, RDX};
        let rows: [(&[u8], Register, bool, &str); 9] = [
            (b"\xc3", R10, false, "ret"),
            (b"\x48\x3d\x00\xf0\xff\xff\x77\x01\xc3\xf7\xd8\xc3", R10, false, "cmp rax, -4096; ja; ret; neg eax; ret"),
            (b"\x4c\x89\xd0\xc3", R10, true, "mov rax, r10"),
            (b"\x45\x31\xd2\x4c\x89\xd0\xc3", R10, false, "xor r10d, r10d; mov rax, r10"),
            (b"\x75\xfe\x0f\x05", R10, true, "a loop to itself, then syscall"),
            (b"\xeb\xf0", R10, true, "to code that cannot be read"),
            (b"\xb2\x01\x89\xd0\xc3", RDX, true, "mov dl, 1; mov eax, edx"),
            (b"\xff\xd0\xc3", RDX, true, "call rax"),
            (b"\xff\xd0\xc3", R10, false, "call rax"),
        ];
        for (code, register, expected, what) in rows {
            assert_eq!(looks(code, register), expected, "{what} ({register:?})");
        }
    }

    #[test]
    fn calls_with_a_timeout_that_is_not_shown() {
        let index = |number, args| timeout_argument(number, &args).map(|(index, _)| index);
        assert_eq!(index(libc::SYS_epoll_wait, [3, 4, 1, 500, 0, 0]), Some(3));
        assert_eq!(index(libc::SYS_epoll_wait, [3, 4, 1, u32::MAX.into(), 0, 0]), None, "for ever");
        assert_eq!(index(libc::SYS_futex, [8, 128, 0, 16, 0, 0]), Some(3));
        assert_eq!(index(libc::SYS_futex, [8, 128 | 9, 0, 16, 0, 0]), None, "until a time");
        assert_eq!(index(libc::SYS_nanosleep, [16, 32, 0, 0, 0, 0]), None, "the kernel writes what is left");
    }

    #[test]
    fn the_clock_of_this_processor() {
        let cpu = nix::sched::sched_getcpu().unwrap();
        // A kernel without the file has no such clocks.
        if std::fs::exists("/proc/self/sched").unwrap() {
            let (least, most) = measure(cpu).expect("our own processor has a clock");
            assert!(least <= most && most - least < 1_000_000_000, "{least} {most}");
        }
        let text = "se.exec_start   :  12.000345\nse.sum_exec_runtime : 1.5\n";
        assert_eq!(Schedule::parse(text, "1 2 3"), None);
    }
}
