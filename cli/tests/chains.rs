//! `--backend preload`, as an ordinary user whose ids are taken: one image restored several times at once, or beside others who
//! are given ids all the time, and the same tree saved and restored ten times. It goes on seeing its own ids, and reaches
//! nobody who has them.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use ckpt_core::Pid;
use ckpt_core::procfs::ProcDir;
use common::*;

/// `nobody`.
const NOBODY: u32 = 65534;

/// A parent and a child that do to each other, by their ids, whatever could hit a stranger. Each round is a line; at the end it
/// says whether the child has counted the same.
const FAMILY: &str = r#"
import os, resource, signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
parent = os.getpid()
read, write = os.pipe()
child = os.fork()
if child == 0:
    rounds = 0
    def count(*_):
        global rounds
        rounds += 1
        if os.getppid() != parent:
            os._exit(255)
        os.write(write, b"%d\n" % rounds)
    signal.signal(signal.SIGUSR1, count)
    os.write(write, b"0\n")
    while signal.SIGUSR2 not in signal.sigpending():
        time.sleep(0.01)
    info = signal.sigwaitinfo([signal.SIGUSR2])
    os._exit(rounds % 200 if info.si_pid == parent else 255)
os.close(write)
answers = os.fdopen(read)
assert answers.readline() == "0\n"
group, session = os.getpgid(0), os.getsid(0)
n = 0
while not os.path.exists("end"):
    n += 1
    os.kill(child, signal.SIGUSR1)
    assert answers.readline() == f"{n}\n"
    assert (os.getpid(), os.getpgid(child), os.getsid(child)) == (parent, group, session)
    stat = open(f"/proc/{child}/stat").read().rsplit(")", 1)[1].split()
    assert [int(id) for id in stat[1:4]] == [parent, group, session], stat
    assert os.readlink("/proc/self") == str(parent) and str(child) in os.listdir("/proc")
    os.setpriority(os.PRIO_PROCESS, child, 5)
    assert os.getpriority(os.PRIO_PROCESS, child) == 5
    os.sched_setaffinity(child, os.sched_getaffinity(0))
    resource.prlimit(child, resource.RLIMIT_CORE, (0, 0))
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    print(n, flush=True)
    time.sleep(0.001)
os.kill(child, signal.SIGUSR2)
pid, status = os.waitpid(child, 0)
print("end", pid == child, os.waitstatus_to_exitcode(status) == n % 200, flush=True)
"#;

/// A directory of an ordinary user, with a ckpt of his.
struct Home(Workshop);

impl Home {
    fn new() -> Home {
        let home = Home(Workshop::new());
        fs::set_permissions(home.path(), fs::Permissions::from_mode(0o777)).unwrap();
        copy_program(CKPT, &home.path().join("ckpt"));
        adopt_orphans();
        home
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn ckpt(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.path().join("ckpt"));
        command.args(["--backend", "preload"]).args(arguments).current_dir(self.path());
        command.env_clear().env("PATH", "/usr/bin:/bin").stdin(Stdio::null()).uid(NOBODY).gid(NOBODY);
        command
    }

    fn start(&self) -> Family {
        let mut command = self.ckpt(&["run", "-d", "-o", "output", "--", "/usr/bin/python3", "-c", FAMILY]);
        let outcome = run(&mut command);
        outcome.assert_done();
        let root = Pid(outcome.out.trim().parse().unwrap());
        wait_until("it works", || self.rounds() > 3);
        Family { root }
    }

    fn dump(&self, family: &Family, image: &str, more: &[&str]) {
        let mut command = self.ckpt(&["dump", "-t", &family.root.to_string(), "-D", image]);
        run(command.args(more)).assert_done();
    }

    fn restore(&self, image: &str, pidfile: &str) -> Family {
        run(&mut self.ckpt(&["restore", "-d", "-D", image, "--pidfile", pidfile])).assert_done();
        let root = fs::read_to_string(self.path().join(pidfile)).unwrap();
        Family { root: Pid(root.trim().parse().unwrap()) }
    }

    fn output(&self) -> String {
        fs::read_to_string(self.path().join("output")).unwrap_or_default()
    }

    /// The last round that it has told.
    fn rounds(&self) -> u64 {
        self.output().lines().rev().find_map(|line| line.parse().ok()).unwrap_or(0)
    }

    fn end(&self) {
        fs::write(self.path().join("end"), "").unwrap();
    }
}

/// A tree that runs, with the ids that the kernel knows it by. Ended with its test.
struct Family {
    root: Pid,
}

impl Family {
    fn ids(&self) -> Vec<Pid> {
        let children = ProcDir::open(self.root).and_then(|proc| proc.children()).unwrap();
        assert_eq!(children.len(), 1, "the child");
        [&[self.root], &children[..]].concat()
    }

    /// It ends by itself, and has found nothing wrong.
    fn finish(self) {
        assert_eq!(wait_for(self.root, None), Some(0));
        std::mem::forget(self);
    }
}

impl Drop for Family {
    fn drop(&mut self) {
        let children = ProcDir::open(self.root).and_then(|proc| proc.children()).unwrap_or_default();
        // The child becomes ours when its parent has ended.
        for pid in [&[self.root], &children[..]].concat() {
            kill(pid, libc::SIGKILL);
            wait_for(pid, None);
        }
    }
}

#[test]
fn ten_times_over_no_call_reaches_whoever_has_the_old_ids() {
    let home = Home::new();
    let mut family = home.start();
    let mut strangers: Vec<Stranger> = Vec::new();
    for round in 0..10 {
        let image = format!("image-{round}");
        let ids = family.ids();
        home.dump(&family, &image, &[]);
        // They have ended. The child is ours, now that its parent is gone.
        std::mem::forget(family);
        for pid in &ids {
            wait_for(*pid, None);
        }
        strangers.extend(ids.into_iter().map(|pid| Stranger::take(pid, NOBODY)));
        let before = home.rounds();
        family = home.restore(&image, &format!("pid-{round}"));
        for pid in family.ids() {
            assert!(strangers.iter().all(|stranger| stranger.0 != pid), "{pid} is a stranger's");
        }
        wait_until("it goes on", || home.rounds() > before + 5);
        fs::remove_dir_all(home.path().join(&image)).unwrap();
    }
    home.end();
    family.finish();
    let output = home.output();
    assert_eq!(output.lines().next_back(), Some("end True True"), "{output}");
    let numbers = output.lines().count() as u64 - 1;
    assert_eq!(home.rounds(), numbers, "each round is told once");
    assert_eq!(strangers.len(), 20);
    strangers.iter().for_each(Stranger::assert_untouched);
}

#[test]
fn one_image_is_restored_several_times_at_once() {
    let home = Home::new();
    let family = home.start();
    home.dump(&family, "image", &["--leave-running"]);
    // All at the same time, beside the one that goes on.
    let pidfiles = ["pid-0", "pid-1", "pid-2"];
    let restores =
        pidfiles.map(|pidfile| start(&mut home.ckpt(&["restore", "-d", "-D", "image", "--pidfile", pidfile])));
    restores.into_iter().for_each(|restore| restore.wait().assert_done());
    let copies = pidfiles.map(|pidfile| {
        let root = fs::read_to_string(home.path().join(pidfile)).unwrap();
        Family { root: Pid(root.trim().parse().unwrap()) }
    });
    let mut ids: Vec<Pid> = copies.iter().chain([&family]).flat_map(Family::ids).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 8, "each has ids of its own");
    let told = || home.output().lines().count();
    let before = told();
    wait_until("all go on", || told() > before + 40);
    home.end();
    copies.into_iter().chain([family]).for_each(Family::finish);
    let output = home.output();
    assert_eq!(output.lines().filter(|line| *line == "end True True").count(), 4, "{output}");
    assert_eq!(output.lines().filter(|line| line.parse::<u64>().is_err()).count(), 4, "nothing else is said: {output}");
}

/// Forks without an end, until it is dropped.
struct Storm(std::process::Child);

impl Storm {
    fn new() -> Storm {
        // Its children end at once.
        const FORKS: &str = "import os
while True:
    for pid in [os.fork() or os._exit(0) for _ in range(9)]: os.waitpid(pid, 0)";
        Storm(Command::new("/usr/bin/python3").args(["-c", FORKS]).stdin(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Storm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn ids_that_others_are_given_first() {
    let home = Home::new();
    let family = home.start();
    let seen = family.ids();
    home.dump(&family, "image", &[]);
    std::mem::forget(family);
    for pid in seen {
        wait_for(pid, None);
    }
    let storm = Storm::new();
    let family = home.restore("image", "pid");
    drop(storm);
    let before = home.rounds();
    wait_until("it goes on", || home.rounds() > before + 5);
    home.end();
    family.finish();
    let output = home.output();
    assert_eq!(output.lines().next_back(), Some("end True True"), "{output}");
}
