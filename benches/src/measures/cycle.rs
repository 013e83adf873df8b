//! Dump and restore: a program is started, saved while it goes on, saved for good, brought back, asked, and checked.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use super::{Bench, Comparison, Samples, Subject, Turn};
use crate::command::{self, Failure, Taken};
use crate::programs::{Program, Session, Stamping};
use crate::record::{Group, Unit, refusal};
use crate::tools::{self, Tool};

/// One workload with all tools; or why it cannot be run.
pub fn comparison<'a>(bench: &'a Bench, program: &'a dyn Program) -> Result<Comparison<'a>, String> {
    if bench.tools.is_empty() {
        return Err("there is no tool to run it with".into());
    }
    if let Some(why) = program.absent().or_else(|| no_room(&bench.images, program.size(), 1)) {
        return Err(why);
    }
    let turn = |tool: &'a dyn Tool| -> Turn<'a> {
        (tool.name().into(), Box::new(move || round(tool, program, &bench.images, bench.timeout)))
    };
    let turns = bench.tools.iter().map(|tool| turn(&**tool)).collect();
    let (workload, size) = (program.name().into(), program.size());
    let subject = Subject { group: Group::Cycle, workload, size, baseline: "ptrace" };
    Ok(Comparison::new(subject, bench.limits, turns))
}

/// Why memory of this size cannot be had, or so many images of it not be written.
pub fn no_room(images: &Path, size: u64, count: u64) -> Option<String> {
    const SPARE: u64 = 512 << 20;
    let statvfs = match nix::sys::statvfs::statvfs(images) {
        Ok(statvfs) => statvfs,
        Err(errno) => return Some(format!("{}: {errno}", images.display())),
    };
    let mebibytes = |bytes: u64| bytes >> 20;
    let free = statvfs.blocks_available() as u64 * statvfs.fragment_size() as u64;
    if size > 0 && free < count * size + SPARE {
        let (free, needed) = (mebibytes(free), mebibytes(count * size + SPARE));
        return Some(format!(
            "{} has {free} MiB free, {needed} are needed; choose another with --images",
            images.display()
        ));
    }
    let memory = crate::host::available_memory();
    (size > 0 && memory < size + SPARE)
        .then(|| format!("{} MiB of memory are free, {} are needed", mebibytes(memory), mebibytes(size + SPARE)))
}

fn round(tool: &dyn Tool, program: &dyn Program, images: &Path, timeout: Duration) -> Result<Samples, String> {
    let place = tempfile::tempdir_in(images).map_err(|error| format!("{}: {error}", images.display()))?;
    let result = live(tool, program, place.path(), timeout);
    let ended = command::end_descendants();
    result.and_then(|samples| ended.map(|()| samples))
}

/// One program's life.
fn live(tool: &dyn Tool, program: &dyn Program, place: &Path, timeout: Duration) -> Result<Samples, String> {
    let mut samples = Samples::default();
    let (command, mut session) = program.prepare(place)?;
    let root = tool.start(command, place, timeout)?;
    come_up(&mut *session, root, place)?;
    // The tools may use /run, /tmp and the same disk: what one has written is not to be paid for by the next.
    settle(place);
    if tool.dumps() && session.begin_stamps()? == Stamping::Begun {
        keep_running(tool, &mut *session, root, place, timeout, &mut samples)?;
        settle(place);
    }

    session.before_dump()?;
    let image = place.join("image");
    let taken = dump(tool, root, &image, false, place, timeout, &mut samples)?;
    if tool.dumps() {
        samples.add_time("dump", taken.wall);
        command::sync(&image).map_err(|error| format!("syncing {}: {error}", image.display()))?;
        samples.add_time("dump-durable", taken.begun.elapsed());
        add_usage(&mut samples, ["dump-cpu", "dump-peak"], &taken);
        let size = command::size_on_disk(&image).map_err(|error| format!("{}: {error}", image.display()))?;
        samples.add("image", Unit::Mebibytes, size as f64 / (1 << 20) as f64);
    }
    gone(root)?;

    let mut restore = tool.restore(&image)?;
    let log = place.join("restore.log");
    let running = command::start(&mut restore, "restore", &log).map_err(|failure| failure.reason)?;
    let begun = running.begun();
    let give_up = AtomicBool::new(false);
    let (taken, answered) = std::thread::scope(|scope| {
        let asking = std::thread::Builder::new()
            .spawn_scoped(scope, || session.answer(timeout, &give_up).map(|()| Instant::now()));
        let asking = match asking {
            Ok(asking) => asking,
            Err(error) => {
                running.kill();
                return (Err(format!("no thread to ask with: {error}")), Err(String::new()));
            }
        };
        let taken = if tool.detaches() {
            let taken = running.wait(timeout).map_err(|failure| failed(tool, failure)).map(Some);
            give_up.store(taken.is_err(), SeqCst);
            taken
        } else {
            // It stays as long as the program; end_descendants() ends both.
            Ok(None)
        };
        (taken, asking.join().unwrap_or_else(|_| Err("asking failed".into())))
    });
    if let Some(taken) = taken? {
        samples.add_time("restore", taken.wall);
        add_usage(&mut samples, ["restore-cpu", "restore-peak"], &taken);
    }
    let answered = answered.map_err(|error| format!("after the restore: {error}"))?;
    samples.add_time("answer", answered.duration_since(begun));
    session.verify().map_err(|error| format!("after the restore: {error}"))?;
    Ok(samples)
}

/// Saves a program that goes on, and asks it for how long it stood still.
fn keep_running(
    tool: &dyn Tool,
    session: &mut dyn Session,
    root: i32,
    place: &Path,
    timeout: Duration,
    samples: &mut Samples,
) -> Result<(), String> {
    // What it sees when nobody saves it.
    std::thread::sleep(Duration::from_millis(30));
    let before = session.end_stamps()?;
    samples.add_time("gap-undisturbed", before.gap);
    session.begin_stamps()?;
    let image = place.join("image-of-one-that-goes-on");
    let taken = dump(tool, root, &image, true, place, timeout, samples)?;
    let stamps = session.end_stamps().map_err(|error| format!("after a dump that leaves it running: {error}"))?;
    samples.add_time("freeze", stamps.gap);
    samples.add_time("dump-running", taken.wall);
    if let Some(behind) = stamps.behind {
        samples.add_time("behind", behind);
    }
    session.verify().map_err(|error| format!("after a dump that leaves it running: {error}"))?;
    std::fs::remove_dir_all(&image).map_err(|error| format!("{}: {error}", image.display()))
}

/// Saves it. What is refused with the advice to try again is tried again, nine times; that is counted, and a row has it.
fn dump(
    tool: &dyn Tool,
    root: i32,
    image: &Path,
    leave_running: bool,
    place: &Path,
    timeout: Duration,
    samples: &mut Samples,
) -> Result<Taken, String> {
    let what = if leave_running { "dump --leave-running" } else { "dump" };
    let mut refused = 0;
    loop {
        match run(tool, tool.dump(root, image, leave_running)?, what, place, timeout) {
            Err(why) if refused < 9 && why.contains("try again") => refused += 1,
            result => {
                if refused > 0 {
                    samples.add("refused-at-first", Unit::Count, f64::from(refused));
                }
                return result;
            }
        }
    }
}

pub fn run(
    tool: &dyn Tool,
    mut command: std::process::Command,
    what: &str,
    place: &Path,
    timeout: Duration,
) -> Result<Taken, String> {
    command::run(&mut command, what, &place.join("command.log"), timeout).map_err(|failure| failed(tool, failure))
}

fn failed(tool: &dyn Tool, failure: Failure) -> String {
    if failure.code.is_some() && failure.code == tool.refusal() { refusal(&failure.reason) } else { failure.reason }
}

fn add_usage(samples: &mut Samples, [cpu, peak]: [&'static str; 2], taken: &Taken) {
    samples.add_time(cpu, taken.cpu);
    samples.add(peak, Unit::Kibibytes, taken.peak);
}

/// Waits until a program has touched all its memory. One that ends instead is told with its last words.
pub fn come_up(session: &mut dyn Session, root: i32, place: &Path) -> Result<(), String> {
    let (ended, is_up) = (AtomicBool::new(false), AtomicBool::new(false));
    let watch = || {
        while !is_up.load(SeqCst) && !ended.load(SeqCst) {
            ended.store(has_ended(root), SeqCst);
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    let result = std::thread::scope(|scope| {
        // Without a thread it takes longer until that is told.
        let _ = std::thread::Builder::new().spawn_scoped(scope, watch);
        let result = session.ready(&ended);
        is_up.store(true, SeqCst);
        result
    });
    result.map_err(|error| match ended.load(SeqCst) {
        true => format!("it ended before it had come up: {}", tools::last_words(place)),
        false => format!("it did not come up: {error}"),
    })
}

/// Whether a child has ended; it stays to be waited for.
fn has_ended(pid: i32) -> bool {
    use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    !matches!(waitid(Id::Pid(nix::unistd::Pid::from_raw(pid)), flags), Ok(WaitStatus::StillAlive))
}

/// Waits until what was written is on the medium.
pub fn settle(place: &Path) {
    if let Ok(directory) = std::fs::File::open(place) {
        let _ = nix::unistd::syncfs(&directory);
    }
}

/// Waits for the dumped tree, so that its ids are free again.
pub fn gone(root: i32) -> Result<(), String> {
    use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut ended = false;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) if ended => return Ok(()),
            Err(nix::errno::Errno::ECHILD) if ended => return Ok(()),
            Ok(WaitStatus::StillAlive) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
            Ok(WaitStatus::StillAlive) => return Err("the program did not end with its dump".into()),
            Ok(WaitStatus::Exited(pid, code)) if pid.as_raw() == root => {
                return Err(format!("the program ended by itself, with exit code {code}"));
            }
            Ok(status) => ended |= status.pid().is_some_and(|pid| pid.as_raw() == root),
            Err(errno) => return Err(format!("the program is not ours to wait for: {errno}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::programs::Stamps;

    /// A program that never comes up by itself.
    struct Never;

    impl Session for Never {
        fn ready(&mut self, give_up: &AtomicBool) -> Result<(), String> {
            let begun = Instant::now();
            while !give_up.load(SeqCst) {
                assert!(begun.elapsed() < Duration::from_secs(60), "it is not told that the program has ended");
                std::thread::sleep(Duration::from_millis(1));
            }
            Err("given up".into())
        }

        fn before_dump(&mut self) -> Result<(), String> {
            unreachable!("it is not up")
        }

        fn answer(&mut self, _within: Duration, _give_up: &AtomicBool) -> Result<(), String> {
            unreachable!("it is not up")
        }

        fn verify(&mut self) -> Result<(), String> {
            unreachable!("it is not up")
        }

        fn begin_stamps(&mut self) -> Result<Stamping, String> {
            unreachable!("it is not up")
        }

        fn end_stamps(&mut self) -> Result<Stamps, String> {
            unreachable!("it is not up")
        }
    }

    #[test]
    fn a_program_that_ends_instead_of_coming_up_is_told_at_once() {
        let place = tempfile::tempdir().unwrap();
        let said = std::fs::File::create(place.path().join("said")).unwrap();
        let mut program = std::process::Command::new("sh");
        let mut child = program.args(["-c", "echo 'error: no memory'; exit 3"]).stdout(said).spawn().unwrap();
        let why = come_up(&mut Never, child.id() as i32, place.path()).unwrap_err();
        assert_eq!(why, "it ended before it had come up: error: no memory");
        assert_eq!(child.wait().unwrap().code(), Some(3), "it is still there to be waited for");
    }
}
