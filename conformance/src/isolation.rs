//! A small world for one trial: pid, mount, ipc and network namespaces of its own, with an init that reaps.
//!
//! Pids are free again after a dump, ports and shared memory of two trials never meet, and nothing leaks: when the init
//! ends, the kernel ends everything in its pid namespace.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

/// Runs `init` as pid 1 of new namespaces, and returns its exit status; `None` when it took longer than `deadline` and
/// was ended with everything in them. The caller must have one thread.
///
/// # Errors
/// When this host does not let us make the namespaces.
pub fn run(deadline: Duration, init: impl FnOnce() -> i32) -> io::Result<Option<i32>> {
    let flags =
        CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWNET;
    unshare(flags)?;
    // SAFETY: this process has one thread, so that its child may do whatever it likes.
    let child = match unsafe { fork() }? {
        ForkResult::Child => {
            let status = match set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from).and_then(|()| furnish()) {
                Ok(()) => init(),
                Err(error) => {
                    println!("furnishing the trial's namespaces failed: {error}");
                    1
                }
            };
            std::process::exit(status)
        }
        ForkResult::Parent { child } => child,
    };
    let begin = Instant::now();
    loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG))? {
            WaitStatus::Exited(_, status) => return Ok(Some(status)),
            WaitStatus::Signaled(_, signal, _) => return Err(io::Error::other(format!("init was ended by {signal}"))),
            _ if begin.elapsed() > deadline => {
                kill(child, Signal::SIGKILL)?;
                waitpid(child, None)?;
                return Ok(None);
            }
            _ => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

/// Whether [`run`] is possible here, and why not. Asked in a child, so that the caller stays where it is.
pub fn probe() -> Result<(), String> {
    let output = std::process::Command::new("/proc/self/exe").arg(PROBE).output().map_err(|error| error.to_string())?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stdout).trim().to_string()) }
}

/// The argument by which a program that calls [`probe`] is asked to run [`answer_probe`].
pub const PROBE: &str = "--ckpt-probe-isolation";

pub fn answer_probe() -> i32 {
    match run(Duration::from_secs(10), || 0) {
        Ok(Some(status)) => status,
        Ok(None) => 1,
        Err(error) => {
            println!("no namespaces of our own: {error} (needs CAP_SYS_ADMIN)");
            1
        }
    }
}

/// What a program expects of the world: its own `/proc`, terminals, `/dev/shm`, and a loopback that is up.
fn furnish() -> io::Result<()> {
    let none = None::<&Path>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let tight = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), tight, none)?;
    mount(Some("tmpfs"), "/dev/shm", Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=1777"))?;
    let terminals = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(Some("devpts"), "/dev/pts", Some("devpts"), terminals, Some("newinstance,ptmxmode=0666,mode=0620,gid=5"))?;
    loopback_up()
}

fn loopback_up() -> io::Result<()> {
    // SAFETY: a zeroed ifreq is valid; the ioctls get a pointer to it that lives through the calls, and the descriptor
    // is used and closed only here.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[0] = b'l' as libc::c_char;
        request.ifr_name[1] = b'o' as libc::c_char;
        let socket = Errno::result(libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0))?;
        let result = Errno::result(libc::ioctl(socket, libc::SIOCGIFFLAGS, &mut request)).and_then(|_| {
            request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short;
            Errno::result(libc::ioctl(socket, libc::SIOCSIFFLAGS, &request))
        });
        libc::close(socket);
        result?;
    }
    Ok(())
}
