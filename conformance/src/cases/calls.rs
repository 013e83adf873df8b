//! System calls in progress at the dump: none returns early, none returns EINTR.

use std::cell::Cell;
use std::fs;
use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use crate::case::{Case, Checkpoint};

pub fn cases() -> Vec<Case> {
    let registers = &["registers"];
    let pipes = &["registers", "pipes"];
    let ended_by_time = vec![
        Case::new("calls/nanosleep", registers, |checkpoint| timed(checkpoint, 0, nanosleep)),
        Case::new("calls/clock-nanosleep-absolute", registers, |checkpoint| timed(checkpoint, 0, sleep_until)),
        Case::new("calls/poll-timeout", registers, |checkpoint| timed(checkpoint, 0, poll_timeout))
            .needs(&["what is left of a timeout, where the kernel does not tell"]),
        Case::new("calls/ppoll-timeout", registers, |checkpoint| timed(checkpoint, 0, ppoll_timeout)),
        Case::new("calls/select-timeout", registers, |checkpoint| timed(checkpoint, 0, select_timeout)),
        Case::new("calls/futex-timeout", registers, |checkpoint| timed(checkpoint, -libc::ETIMEDOUT, futex_timeout))
            .needs(&["what is left of a timeout, where the kernel does not tell"]),
        Case::new("calls/nanosleep-without-rest", registers, |checkpoint| timed(checkpoint, 0, nanosleep_without_rest))
            .needs(&["what is left of a timeout, where the kernel does not tell"]),
        Case::new("calls/epoll-timeout", &["registers", "epoll"], |checkpoint| timed(checkpoint, 0, epoll_timeout))
            .needs(&["what is left of a timeout, where the kernel does not tell"]),
        Case::new("calls/epoll-pwait-timeout", &["registers", "epoll"], |checkpoint| {
            timed(checkpoint, 0, epoll_pwait_timeout)
        })
        .needs(&["what is left of a timeout, where the kernel does not tell"]),
        Case::new("calls/epoll-pwait2-timeout", &["registers", "epoll"], |checkpoint| {
            timed(checkpoint, 0, epoll_pwait2_timeout)
        })
        .needs(&["what is left of a timeout, where the kernel does not tell"]),
        Case::new("calls/semtimedop-timeout", registers, |checkpoint| {
            timed(checkpoint, -libc::EAGAIN, semtimedop_timeout)
        })
        .needs(&["what is left of a timeout, where the kernel does not tell"]),
        Case::new("calls/timeout-in-a-register", &["registers", "epoll"], timeout_in_a_register),
        Case::new("calls/receive-timeout", &["registers", "unix_sockets"], receive_timeout),
        Case::new("calls/sigtimedwait-timeout", &["registers", "signals"], |checkpoint| {
            timed(checkpoint, -libc::EAGAIN, sigtimedwait_timeout)
        })
        .needs(&["what is left of a timeout, where the kernel does not tell"]),
    ];
    let ended_by_others = [
        Case::new("calls/read", pipes, read),
        Case::new("calls/write", pipes, write),
        Case::new("calls/poll", pipes, poll),
        Case::new("calls/select", pipes, select),
        Case::new("calls/epoll-wait", &["registers", "pipes", "epoll"], epoll_wait),
        Case::new("calls/futex", registers, futex),
        Case::new("calls/waitid", &["registers", "tasks"], waitid),
        Case::new("calls/sigsuspend", &["registers", "signals"], sigsuspend),
        Case::new("calls/flock", &["registers", "files", "locks"], flock),
    ];
    ended_by_time.into_iter().map(Case::idle).chain(ended_by_others).collect()
}

/// Long enough to be in progress at the dump and at the restore.
const LIMIT: Duration = Duration::from_millis(2400);

/// The result of a system call: not negative, or minus the error number.
fn result(value: impl Into<i64>) -> i32 {
    let value: i64 = value.into();
    if value >= 0 { value as i32 } else { -io::Error::last_os_error().raw_os_error().unwrap_or(0) }
}

/// Runs `call` on a thread of its own, is dumped while it waits in the kernel, does what ends the wait, and returns
/// what it returned and how long it took.
fn during(
    checkpoint: &Checkpoint,
    call: impl FnOnce() -> i32 + Send,
    end: impl FnOnce() -> Result<(), String>,
) -> Result<(i32, Duration), String> {
    in_progress(|| checkpoint.wait(), checkpoint, call, end)
}

/// The same, with `wait` for the wait.
fn in_progress(
    wait: impl FnOnce() -> Result<(), String>,
    checkpoint: &Checkpoint,
    call: impl FnOnce() -> i32 + Send,
    end: impl FnOnce() -> Result<(), String>,
) -> Result<(i32, Duration), String> {
    let thread_id = AtomicI32::new(0);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: asks only.
            thread_id.store(unsafe { libc::gettid() }, SeqCst);
            let begin = Instant::now();
            (call(), begin.elapsed())
        });
        wait_until_in_kernel(&thread_id)?;
        wait()?;
        end()?;
        let begin = Instant::now();
        while !thread.is_finished() {
            if begin.elapsed() > Duration::from_secs(20) {
                // The scope would wait for the thread for ever.
                eprintln!("the call does not return");
                fs::write(checkpoint.dir().join(crate::case::VERDICT), "the call does not return").ok();
                std::process::exit(1);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(thread.join().expect("no panic"))
    })
}

/// Until `/proc` shows the thread sleeping in a system call that is no futex of the start of a thread.
fn wait_until_in_kernel(thread_id: &AtomicI32) -> Result<(), String> {
    let begin = Instant::now();
    let mut seen = 0;
    // A thread that sleeps in one place each time we look is in its call: it has nothing else to wait for.
    while seen < 5 {
        std::thread::sleep(Duration::from_millis(1));
        let id = thread_id.load(SeqCst);
        let stat = fs::read_to_string(format!("/proc/self/task/{id}/stat")).unwrap_or_default();
        let asleep = id != 0 && stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('S'));
        seen = if asleep { seen + 1 } else { 0 };
        if begin.elapsed() > Duration::from_secs(10) {
            return Err("the thread does not wait in its call".into());
        }
    }
    Ok(())
}

/// A call that ends by its own time limit, [`LIMIT`]. It is dumped when half of that is over, and the other half is what is
/// left: but for the time between dump and restore, all is as if nothing had happened.
fn timed(checkpoint: &Checkpoint, expected: i32, call: fn() -> i32) -> Result<(), String> {
    let away = Cell::new(Duration::ZERO);
    let (stolen, waited) = (stolen(), AtomicU64::new(0));
    let (found, took) = in_progress(
        || {
            std::thread::sleep(LIMIT / 2);
            away.set(wait_and_measure(checkpoint)?);
            Ok(())
        },
        checkpoint,
        || {
            let result = call();
            waited.store(waited_for_processor(), SeqCst);
            result
        },
        || Ok(()),
    )?;
    if found != expected {
        return Err(format!("the call should return {expected}, returned {found} after {took:?}"));
    }
    let away = away.get();
    // A timer that fires while the host has taken its processor is late, and so is a thread that waits for one.
    let stalled = self::stolen().saturating_sub(stolen) + Duration::from_nanos(waited.into_inner());
    // Begun anew, it would take half as long again, and then some.
    if took < LIMIT || took > LIMIT + away + stalled + LIMIT * 4 / 10 {
        return Err(format!(
            "the call took {took:?} of {LIMIT:?}, with {away:?} between dump and restore and {stalled:?} without a processor"
        ));
    }
    Ok(())
}

/// For how long the host has taken processors from this machine (proc_stat(5): steal, in hundredths of a second).
fn stolen() -> Duration {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let ticks = text.lines().next().and_then(|line| line.split_ascii_whitespace().nth(8)?.parse().ok());
    Duration::from_millis(10 * ticks.unwrap_or(0))
}

/// For how long this thread could have run and had no processor, in nanoseconds.
fn waited_for_processor() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split_ascii_whitespace().nth(1).and_then(|field| field.parse().ok()).unwrap_or(0)
}

/// [`Checkpoint::wait`]. Gives how long we were away, as far as a thread that looks at the clock all the time can tell.
fn wait_and_measure(checkpoint: &Checkpoint) -> Result<Duration, String> {
    checkpoint.ready()?;
    let begin = Instant::now();
    let (mut last, mut away) = (begin, Duration::ZERO);
    while !checkpoint.is_go() {
        std::thread::sleep(Duration::from_millis(1));
        let now = Instant::now();
        if now - last > Duration::from_millis(5) {
            away += now - last;
        }
        last = now;
        if last - begin > Duration::from_secs(60) {
            return Err("no sign to go on came within 60 s".into());
        }
    }
    Ok(away)
}

fn expect(call: (i32, Duration), expected: i32) -> Result<(), String> {
    if call.0 == expected { Ok(()) } else { Err(format!("the call should return {expected}, returned {}", call.0)) }
}

fn timespec(time: Duration) -> libc::timespec {
    libc::timespec { tv_sec: time.as_secs() as i64, tv_nsec: i64::from(time.subsec_nanos()) }
}

fn nanosleep() -> i32 {
    let (wanted, mut left) = (timespec(LIMIT), timespec(Duration::ZERO));
    // SAFETY: two timespecs of ours.
    result(unsafe { libc::nanosleep(&wanted, &mut left) })
}

fn sleep_until() -> i32 {
    let mut time = timespec(Duration::ZERO);
    // SAFETY: a timespec of ours. clock_nanosleep returns the error number itself.
    unsafe {
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time);
        let until = timespec(Duration::new(time.tv_sec as u64, time.tv_nsec as u32) + LIMIT);
        -libc::clock_nanosleep(libc::CLOCK_MONOTONIC, libc::TIMER_ABSTIME, &until, ptr::null_mut())
    }
}

fn poll_timeout() -> i32 {
    // SAFETY: no descriptors.
    result(unsafe { libc::poll(ptr::null_mut(), 0, LIMIT.as_millis() as i32) })
}

fn ppoll_timeout() -> i32 {
    let limit = timespec(LIMIT);
    // SAFETY: no descriptors, a timespec and a signal set of ours.
    unsafe {
        let mut mask: libc::sigset_t = zeroed();
        libc::sigemptyset(&mut mask);
        result(libc::ppoll(ptr::null_mut(), 0, &limit, &mask))
    }
}

fn select_timeout() -> i32 {
    let mut limit = libc::timeval { tv_sec: LIMIT.as_secs() as i64, tv_usec: i64::from(LIMIT.subsec_micros()) };
    // SAFETY: no descriptors, a timeval of ours.
    result(unsafe { libc::select(0, ptr::null_mut(), ptr::null_mut(), ptr::null_mut(), &mut limit) })
}

fn futex_timeout() -> i32 {
    let (word, limit) = (AtomicU32::new(0), timespec(LIMIT));
    // SAFETY: a word and a timespec of ours.
    result(unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, 0, &limit) })
}

fn epoll_timeout() -> i32 {
    // SAFETY: a new epoll descriptor, room for one event.
    unsafe {
        let epoll = libc::epoll_create1(libc::EPOLL_CLOEXEC);
        let mut event: libc::epoll_event = zeroed();
        result(libc::epoll_wait(epoll, &mut event, 1, LIMIT.as_millis() as i32))
    }
}

fn nanosleep_without_rest() -> i32 {
    let wanted = timespec(LIMIT);
    // SAFETY: a timespec of ours.
    result(unsafe { libc::nanosleep(&wanted, ptr::null_mut()) })
}

fn epoll_pwait_timeout() -> i32 {
    // SAFETY: a new epoll descriptor, room for one event, a mask of ours.
    unsafe {
        let epoll = libc::epoll_create1(libc::EPOLL_CLOEXEC);
        let (mut event, mut mask): (libc::epoll_event, libc::sigset_t) = (zeroed(), zeroed());
        libc::sigaddset(&mut mask, libc::SIGUSR2);
        result(libc::epoll_pwait(epoll, &mut event, 1, LIMIT.as_millis() as i32, &mask))
    }
}

fn epoll_pwait2_timeout() -> i32 {
    let limit = timespec(LIMIT);
    // SAFETY: a new epoll descriptor, room for one event, a timespec of ours.
    let result = unsafe {
        let epoll = libc::epoll_create1(libc::EPOLL_CLOEXEC);
        let mut event: libc::epoll_event = zeroed();
        result(libc::syscall(libc::SYS_epoll_pwait2, epoll, &mut event, 1, &limit, ptr::null::<libc::sigset_t>(), 8))
    };
    // What is left is nowhere that a program can see.
    if (limit.tv_sec, limit.tv_nsec) == (timespec(LIMIT).tv_sec, timespec(LIMIT).tv_nsec) { result } else { -1000 }
}

fn semtimedop_timeout() -> i32 {
    let limit = timespec(LIMIT);
    let mut wait = libc::sembuf { sem_num: 0, sem_op: -1, sem_flg: 0 };
    // SAFETY: a set of semaphores of our own, which is removed again; an operation and a timespec of ours.
    unsafe {
        let semaphores = libc::semget(libc::IPC_PRIVATE, 1, 0o600);
        let result = result(libc::syscall(libc::SYS_semtimedop, semaphores, &mut wait, 1, &limit));
        libc::semctl(semaphores, 0, libc::IPC_RMID);
        result
    }
}

/// A program that makes its system calls inline has its timeout in a register, and uses it for the next call, too.
fn timeout_in_a_register(checkpoint: &Checkpoint) -> Result<(), String> {
    let limit = LIMIT.as_millis() as u64;
    let call = || {
        let mut left = limit;
        // SAFETY: a new epoll descriptor and room for one event; two calls in a row with the same arguments.
        unsafe {
            let epoll = libc::epoll_create1(libc::EPOLL_CLOEXEC);
            let mut event: libc::epoll_event = zeroed();
            std::arch::asm!(
                "mov r9d, 2",
                "2:", "mov eax, {number}", "syscall", "dec r9d", "jnz 2b",
                number = const libc::SYS_epoll_wait as i32,
                in("rdi") epoll, in("rsi") &mut event, in("rdx") 1, inout("r10") left,
                out("rax") _, out("rcx") _, out("r9") _, out("r11") _,
            );
        }
        left as i32
    };
    let wait = || {
        std::thread::sleep(LIMIT / 2);
        checkpoint.wait()
    };
    let (left, took) = in_progress(wait, checkpoint, call, || Ok(()))?;
    if left != limit as i32 || took < 2 * LIMIT {
        return Err(format!("two calls with {limit} ms took {took:?}, and the register has {left}"));
    }
    Ok(())
}

/// The timeout is the socket's: it may begin anew, but does not end early, and the socket keeps it.
fn receive_timeout(checkpoint: &Checkpoint) -> Result<(), String> {
    let (one, _other) = std::os::unix::net::UnixDatagram::pair().map_err(|error| format!("socketpair: {error}"))?;
    one.set_read_timeout(Some(LIMIT)).map_err(|error| format!("SO_RCVTIMEO: {error}"))?;
    let mut buffer = [0_u8; 8];
    // SAFETY: eight bytes of ours.
    let call = || result(unsafe { libc::recv(one.as_raw_fd(), buffer.as_mut_ptr().cast(), 8, 0) } as i64);
    let (found, took) = during(checkpoint, call, || Ok(()))?;
    if found != -libc::EAGAIN || took < LIMIT {
        return Err(format!("recv returned {found} after {took:?} of {LIMIT:?}"));
    }
    let now = one.read_timeout().map_err(|error| format!("SO_RCVTIMEO: {error}"))?;
    if now == Some(LIMIT) { Ok(()) } else { Err(format!("the timeout was {LIMIT:?}, is {now:?}")) }
}

fn sigtimedwait_timeout() -> i32 {
    let limit = timespec(LIMIT);
    // SAFETY: a set and a timespec of ours; the signal is blocked in this thread first.
    unsafe {
        let mut set: libc::sigset_t = zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGUSR1);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, ptr::null_mut());
        result(libc::sigtimedwait(&set, ptr::null_mut(), &limit))
    }
}

fn pipe() -> Result<(OwnedFd, OwnedFd), String> {
    nix::unistd::pipe().map_err(|error| format!("pipe: {error}"))
}

fn send(pipe: &OwnedFd) -> Result<(), String> {
    nix::unistd::write(pipe, b"abc").map(drop).map_err(|error| format!("write: {error}"))
}

fn read(checkpoint: &Checkpoint) -> Result<(), String> {
    let (reader, writer) = pipe()?;
    let mut buffer = [0_u8; 8];
    let call = during(
        checkpoint,
        // SAFETY: eight bytes of ours.
        || result(unsafe { libc::read(reader.as_raw_fd(), buffer.as_mut_ptr().cast(), 8) } as i64),
        || send(&writer),
    )?;
    expect(call, 3)?;
    if &buffer[..4] == b"abc\0" { Ok(()) } else { Err(format!("abc should be read, {buffer:?} was")) }
}

/// A write to a full pipe may return what it has written so far, as it does when a program is stopped and continued;
/// never EINTR, and no byte is lost or doubled.
fn write(checkpoint: &Checkpoint) -> Result<(), String> {
    let (reader, writer) = pipe()?;
    let bytes: Vec<u8> = (0..200_000_u32).map(|at| ((at * 7) >> 3) as u8).collect();
    let mut drained = Vec::new();
    let call = during(
        checkpoint,
        || {
            let mut written = 0;
            while written < bytes.len() {
                let rest = &bytes[written..];
                // SAFETY: as many bytes as the slice has.
                match result(unsafe { libc::write(writer.as_raw_fd(), rest.as_ptr().cast(), rest.len()) } as i64) {
                    some @ 1.. => written += some as usize,
                    other => return other,
                }
            }
            written as i32
        },
        || {
            let mut buffer = [0; 65536];
            while drained.len() < bytes.len() {
                let read = nix::unistd::read(&reader, &mut buffer).map_err(|error| format!("read: {error}"))?;
                drained.extend_from_slice(&buffer[..read]);
            }
            Ok(())
        },
    )?;
    expect(call, 200_000)?;
    match drained.iter().zip(&bytes).position(|(found, expected)| found != expected) {
        None => Ok(()),
        Some(at) => Err(format!("byte {at} of what came through the pipe is wrong")),
    }
}

fn poll(checkpoint: &Checkpoint) -> Result<(), String> {
    let (reader, writer) = pipe()?;
    let mut wanted = libc::pollfd { fd: reader.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd of ours.
    let call = during(checkpoint, || result(unsafe { libc::poll(&mut wanted, 1, -1) }), || send(&writer))?;
    expect(call, 1)
}

fn select(checkpoint: &Checkpoint) -> Result<(), String> {
    let (reader, writer) = pipe()?;
    let fd = reader.as_raw_fd();
    // SAFETY: a set of ours.
    let call = during(
        checkpoint,
        || unsafe {
            let mut set: libc::fd_set = zeroed();
            libc::FD_SET(fd, &mut set);
            let count = result(libc::select(fd + 1, &mut set, ptr::null_mut(), ptr::null_mut(), ptr::null_mut()));
            if libc::FD_ISSET(fd, &set) { count } else { 0 }
        },
        || send(&writer),
    )?;
    expect(call, 1)
}

fn epoll_wait(checkpoint: &Checkpoint) -> Result<(), String> {
    let (reader, writer) = pipe()?;
    // SAFETY: a new epoll descriptor and an event of ours.
    let (epoll, added) = unsafe {
        let epoll = libc::epoll_create1(libc::EPOLL_CLOEXEC);
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 99 };
        (epoll, libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, reader.as_raw_fd(), &mut event))
    };
    if added != 0 {
        return Err(format!("epoll_ctl: {}", io::Error::last_os_error()));
    }
    let call = during(
        checkpoint,
        || {
            // SAFETY: room for one event.
            let (count, event) = unsafe {
                let mut event: libc::epoll_event = zeroed();
                (result(libc::epoll_wait(epoll, &mut event, 1, -1)), event)
            };
            let data = event.u64;
            if data == 99 || count < 0 { count } else { 1000 }
        },
        || send(&writer),
    )?;
    expect(call, 1)
}

fn futex(checkpoint: &Checkpoint) -> Result<(), String> {
    let word = AtomicU32::new(5);
    let call = during(
        checkpoint,
        || {
            // SAFETY: a word of ours.
            result(unsafe {
                libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, 5, ptr::null::<libc::timespec>())
            })
        },
        || {
            let begin = Instant::now();
            // SAFETY: as above. The waiter may still be on its way back into its call.
            while unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, 1) } == 0 {
                if begin.elapsed() > Duration::from_secs(10) {
                    return Err("nobody waits for the futex".into());
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        },
    )?;
    expect(call, 0)
}

fn waitid(checkpoint: &Checkpoint) -> Result<(), String> {
    // SAFETY: this process has one thread now; the child only uses async-signal-safe functions and leaves by _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let status = if checkpoint.wait_for_go().is_ok() { 23 } else { 1 };
        // SAFETY: ends the child without running the parent's exit handlers.
        unsafe { libc::_exit(status) }
    }
    let mut status = 0;
    let call = during(
        checkpoint,
        // SAFETY: a status of ours.
        || result(unsafe { libc::waitpid(child, &mut status, 0) }),
        || Ok(()),
    )?;
    expect(call, child)?;
    if status == 23 << 8 { Ok(()) } else { Err(format!("the child should exit with 23, its status is {status:#x}")) }
}

extern "C" fn ignore(_: libc::c_int) {}

fn sigsuspend(checkpoint: &Checkpoint) -> Result<(), String> {
    // SAFETY: sets a handler that does nothing, and masks of ours.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = ignore as *const () as usize;
        libc::sigaction(libc::SIGUSR1, &action, ptr::null_mut());
        let mut blocked: libc::sigset_t = zeroed();
        libc::sigaddset(&mut blocked, libc::SIGUSR1);
        libc::pthread_sigmask(libc::SIG_BLOCK, &blocked, ptr::null_mut());
    }
    let thread = AtomicI32::new(0);
    let call = during(
        checkpoint,
        || {
            // SAFETY: a mask of ours; no signal but those sent below comes.
            unsafe {
                thread.store(libc::gettid(), SeqCst);
                let mut none: libc::sigset_t = zeroed();
                libc::sigemptyset(&mut none);
                let returned = result(libc::sigsuspend(&none));
                // The mask of before is in force again.
                let mut now: libc::sigset_t = zeroed();
                libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), &mut now);
                if libc::sigismember(&now, libc::SIGUSR1) == 1 { returned } else { 1000 }
            }
        },
        || {
            // SAFETY: signals a thread of this process.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread.load(SeqCst), libc::SIGUSR1) };
            Ok(())
        },
    )?;
    // That is how sigsuspend returns: after a handler.
    expect(call, -libc::EINTR)
}

fn flock(checkpoint: &Checkpoint) -> Result<(), String> {
    let path = checkpoint.dir().join("locked");
    let open = || fs::File::create(&path).map_err(|error| error.to_string());
    let (holder, waiter) = (open()?, open()?);
    // SAFETY: descriptors of ours.
    unsafe { libc::flock(holder.as_raw_fd(), libc::LOCK_EX) };
    let call = during(
        checkpoint,
        // SAFETY: as above.
        || result(unsafe { libc::flock(waiter.as_raw_fd(), libc::LOCK_EX) }),
        || {
            // SAFETY: as above.
            unsafe { libc::flock(holder.as_raw_fd(), libc::LOCK_UN) };
            Ok(())
        },
    )?;
    expect(call, 0)
}
