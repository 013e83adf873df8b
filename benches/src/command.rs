//! Runs one command, and takes its time: nothing of the driver is between its start and its end but the wait itself.

use std::fs::{self, File};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// What one command took.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    pub begun: Instant,
    pub wall: Duration,
    /// User and system time, of the command and what it waited for.
    pub cpu: Duration,
    /// Largest resident size, in KiB.
    pub peak: f64,
}

/// Why a command has no time.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The exit code; none where it was a signal, or did not start, or did not end.
    pub code: Option<i32>,
    pub reason: String,
}

/// A command that was started.
pub struct Running {
    begun: Instant,
    pid: i32,
    pidfd: OwnedFd,
    what: String,
    log: std::path::PathBuf,
}

/// Runs a command to its end; what it says goes to a file.
pub fn run(command: &mut Command, what: &str, log: &Path, timeout: Duration) -> Result<Taken, Failure> {
    start(command, what, log)?.wait(timeout)
}

/// Starts a command in a process group of its own.
pub fn start(command: &mut Command, what: &str, log: &Path) -> Result<Running, Failure> {
    let failed = |reason: String| Failure { code: None, reason };
    let output = File::create(log).map_err(|error| failed(format!("{}: {error}", log.display())))?;
    let errors = output.try_clone().map_err(|error| failed(format!("{}: {error}", log.display())))?;
    command.stdin(Stdio::null()).stdout(output).stderr(errors).process_group(0);
    let begun = Instant::now();
    let child = command.spawn().map_err(|error| failed(format!("{what} cannot be started: {error}")))?;
    let pid = child.id() as i32;
    // SAFETY: pidfd_open(2) takes numbers, and the child was not waited for; what it returns is ours alone.
    let pidfd = unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        if fd < 0 {
            libc::kill(pid, libc::SIGKILL);
            return Err(failed(format!("pidfd_open: {}", std::io::Error::last_os_error())));
        }
        OwnedFd::from_raw_fd(fd as i32)
    };
    Ok(Running { begun, pid, pidfd, what: what.to_string(), log: log.to_path_buf() })
}

impl Running {
    pub fn begun(&self) -> Instant {
        self.begun
    }

    /// Waits for its end. One that takes too long is killed with its process group.
    pub fn wait(self, timeout: Duration) -> Result<Taken, Failure> {
        let ended = ends_within(&self.pidfd, timeout);
        if !ended {
            // SAFETY: the group that the child leads; the child was not waited for yet, so the number is its.
            unsafe { libc::kill(-self.pid, libc::SIGKILL) };
            // Not even a kill ends what the kernel does not let go of.
            if ends_within(&self.pidfd, Duration::from_secs(10)) {
                let _ = wait4(self.pid);
            }
            let reason = format!("{} did not end within {} s, and was killed", self.what, timeout.as_secs_f64());
            return Err(Failure { code: None, reason });
        }
        let waited = wait4(self.pid);
        let wall = self.begun.elapsed();
        let (status, usage) = waited.map_err(|reason| Failure { code: None, reason })?;
        let seconds = |time: libc::timeval| Duration::new(time.tv_sec as u64, time.tv_usec as u32 * 1000);
        if status == 0 {
            let cpu = seconds(usage.ru_utime) + seconds(usage.ru_stime);
            return Ok(Taken { begun: self.begun, wall, cpu, peak: usage.ru_maxrss as f64 });
        }
        let said = fs::read(&self.log).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        let code = libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status));
        let how = match code {
            Some(code) => format!("exit code {code}"),
            None => format!("signal {}", libc::WTERMSIG(status)),
        };
        Err(Failure { code, reason: format!("{} ended with {how}: {}", self.what, essence(&said)) })
    }

    /// Ends it, where it is to be ended.
    pub fn kill(self) {
        // SAFETY: the group that the child leads, which was not waited for yet.
        unsafe { libc::kill(-self.pid, libc::SIGKILL) };
        if ends_within(&self.pidfd, Duration::from_secs(10)) {
            let _ = wait4(self.pid);
        }
    }
}

fn ends_within(pidfd: &OwnedFd, timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut ready = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut ready, left) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(nix::errno::Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
}

/// What a tool said that tells most: its errors, else its last line.
pub fn essence(said: &str) -> String {
    let lines = || said.lines().map(str::trim).filter(|line| !line.is_empty());
    let errors: Vec<&str> =
        lines().filter(|line| ["error", "panicked"].iter().any(|word| line.to_lowercase().contains(word))).collect();
    let text = if errors.is_empty() {
        lines().next_back().unwrap_or("it said nothing").to_string()
    } else {
        errors.join("; ")
    };
    text.chars().take(500).collect()
}

/// The status and the usage of a child, which is waited for.
pub fn wait4(pid: i32) -> Result<(i32, libc::rusage), String> {
    let mut status = 0;
    // SAFETY: a zeroed rusage is valid, and both live for the call.
    let (result, usage) = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        (libc::wait4(pid, &mut status, 0, &mut usage), usage)
    };
    if result < 0 { Err(format!("wait4: {}", std::io::Error::last_os_error())) } else { Ok((status, usage)) }
}

/// Brings the files of an image to their medium, where they are not yet.
pub fn sync(image: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(image)? {
        File::open(entry?.path())?.sync_data()?;
    }
    File::open(image)?.sync_all()
}

/// Bytes that the files of an image take on the medium, holes not counted.
pub fn size_on_disk(image: &Path) -> std::io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    fs::read_dir(image)?.map(|entry| Ok(entry?.metadata()?.blocks() * 512)).sum()
}

/// Ends every process below this one, and waits for them. Restored trees come to us, as we are their subreaper.
pub fn end_descendants() -> Result<(), String> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        for child in children() {
            // SAFETY: kill(2) takes numbers; a child that was not waited for keeps its number.
            unsafe { libc::kill(child, libc::SIGKILL) };
        }
        let mut status = 0;
        // SAFETY: the status lives for the call.
        match unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) } {
            -1 => return Ok(()),
            0 if Instant::now() > deadline => {
                return Err(format!("processes that do not end: {:?}", children()));
            }
            0 => std::thread::sleep(Duration::from_millis(1)),
            _ => {}
        }
    }
}

fn children() -> Vec<i32> {
    let mut found = Vec::new();
    for task in fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
        let text = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        found.extend(text.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok()));
    }
    found
}
