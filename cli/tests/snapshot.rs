//! Dumps of programs that go on: copies of their processes write the memory meanwhile. What happens to the copy, to ckpt, or to
//! the medium then is not the program's business.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use ckpt_core::Pid;
use ckpt_core::procfs::ProcDir;
use common::*;
use nix::mount::MsFlags;

/// Writes to 96 MiB all the time, and knows what must be in it.
const WRITES: &str = r#"
import os, sys, time
memory = bytearray(os.urandom(1 << 20) * 96)
total, count = sum(memory[::4096]), 0
open("ready", "w").close()
while not os.path.exists("end"):
    for _ in range(500):
        count += 1
        at = count * 7919 % (len(memory) // 4096) * 4096
        total += (count & 255) - memory[at]
        memory[at] = count & 255
    with open("count.new", "w") as file:
        file.write(str(count))
    os.rename("count.new", "count")
right = total == sum(memory[::4096])
with open("verdict", "w") as file:
    file.write("right" if right else "wrong")
"#;

struct Writer {
    companion: Companion,
    directory: PathBuf,
}

impl Writer {
    fn start(workshop: &Workshop, more: &str) -> Writer {
        adopt_orphans();
        // By its name the copy of this one is told from others.
        let program = format!("name = '{}'\n{more}\n{WRITES}", workshop.path().display());
        let companion = Companion::python(&program, workshop.path());
        let writer = Writer { companion, directory: workshop.path().to_path_buf() };
        wait_until("it is ready", || writer.count() > 0);
        writer
    }

    fn pid(&self) -> Pid {
        self.companion.pid()
    }

    fn count(&self) -> u64 {
        fs::read_to_string(self.directory.join("count")).ok().and_then(|text| text.parse().ok()).unwrap_or(0)
    }

    fn goes_on(&self) {
        let before = self.count();
        wait_until("it goes on", || self.count() > before);
    }

    /// It goes on, and its memory is what it must be.
    fn judge(mut self) {
        self.goes_on();
        fs::write(self.directory.join("end"), "").unwrap();
        assert!(end_of(&mut self.companion.0).success());
        assert_eq!(fs::read_to_string(self.directory.join("verdict")).unwrap(), "right");
    }

    /// A copy of it that has not ended.
    fn copy(&self) -> Option<Pid> {
        let is_copy = |pid: &Pid| {
            let Ok(proc) = ProcDir::open(*pid) else { return false };
            let is_named = proc.stat_line().is_ok_and(|stat| stat.comm == b"ckpt-copy" && stat.state != 'Z');
            is_named && proc.text("cmdline").is_ok_and(|line| line.contains(self.directory.to_str().unwrap()))
        };
        ckpt_core::procfs::all_pids().into_iter().find(is_copy)
    }

    /// Waits for copies that have ended: we are who inherits orphans here.
    fn reap() {
        for pid in ckpt_core::procfs::all_pids() {
            let stat = ProcDir::open(pid).and_then(|proc| proc.stat_line());
            let is_copy = |stat: ckpt_core::procfs::Stat| stat.state == 'Z' && stat.comm == b"ckpt-copy";
            if stat.is_ok_and(|stat| stat.ppid.0 as u32 == std::process::id() && is_copy(stat)) {
                wait_for(pid, None);
            }
        }
    }

    /// Begins to dump it, and stops the copy before it has written everything.
    fn dump_and_stop_copy(&self, image: &Path) -> (Running, Pid) {
        for _ in 0..20 {
            let _ = fs::remove_dir_all(image);
            Writer::reap();
            let mut running = start(&mut dump(self.pid(), image, &["--leave-running"]));
            while running.child.try_wait().unwrap().is_none() {
                let Some(copy) = self.copy() else { continue };
                kill(copy, libc::SIGSTOP);
                let state = || ProcDir::open(copy).and_then(|proc| proc.stat_line()).map_or('X', |stat| stat.state);
                wait_until("it stops or ends", || matches!(state(), 'T' | 'Z' | 'X'));
                if state() == 'T' && running.child.try_wait().unwrap().is_none() {
                    // While it stands still, the program does not.
                    self.goes_on();
                    return (running, copy);
                }
            }
        }
        panic!("the dumps are done before the copy is seen");
    }
}

#[test]
fn the_program_goes_on_while_it_is_saved() {
    let workshop = Workshop::new();
    let writer = Writer::start(&workshop, "");
    let (running, copy) = writer.dump_and_stop_copy(&workshop.image());
    let directory = format!("/proc/{copy}/fd");
    let open = names(Path::new(&directory)).into_iter();
    let open: Vec<_> = open.map(|fd| fs::read_link(Path::new(&directory).join(fd)).unwrap()).collect();
    let images = workshop.image().parent().unwrap().to_path_buf();
    let (pages, others): (Vec<_>, Vec<_>) = open.iter().partition(|file| file.starts_with(&images));
    assert!(
        pages.len() <= 1 && others.len() == 1 && others[0].to_string_lossy().starts_with("socket:"),
        "it has its socket, and what it writes to, and nothing of the program's: {open:?}"
    );
    let status = ProcDir::open(copy).unwrap().status().unwrap();
    assert_eq!(status.field("PPid").unwrap(), std::process::id().to_string(), "it is a child of who inherits orphans");
    kill(copy, libc::SIGCONT);
    running.wait().assert_done();
    assert_eq!(writer.copy(), None, "a copy is left");
    run(&mut ckpt(["check", workshop.image().to_str().unwrap()])).assert_done();
    writer.judge();
}

#[test]
fn a_copy_that_is_killed() {
    let workshop = Workshop::new();
    let writer = Writer::start(&workshop, "");
    let (running, copy) = writer.dump_and_stop_copy(&workshop.image());
    kill(copy, libc::SIGKILL);
    let pid = writer.pid().to_string();
    running.wait().assert_error(FAILED, &["memory", &pid, "copy", "try again"]);
    workshop.assert_no_image();
    assert_eq!(writer.copy(), None);
    writer.judge();
}

#[test]
fn a_copy_whose_ckpt_is_killed() {
    let workshop = Workshop::new();
    let writer = Writer::start(&workshop, "");
    let (mut running, copy) = writer.dump_and_stop_copy(&workshop.image());
    running.child.kill().unwrap();
    kill(copy, libc::SIGCONT);
    wait_until("the copy ends", || writer.copy().is_none());
    assert!(!workshop.image().exists(), "half an image");
    writer.judge();
}

#[test]
fn a_dump_that_is_interrupted() {
    let workshop = Workshop::new();
    let writer = Writer::start(&workshop, "");
    let (running, copy) = writer.dump_and_stop_copy(&workshop.image());
    kill(Pid(running.child.id() as i32), libc::SIGTERM);
    kill(copy, libc::SIGCONT);
    let outcome = running.wait();
    assert_ne!(outcome.code(), Some(DONE), "{outcome:#?}");
    assert_eq!(writer.copy(), None);
    workshop.assert_no_image();
    writer.judge();
}

#[test]
fn a_disk_that_fills_up_meanwhile() {
    let workshop = Workshop::new();
    let place = mount(&workshop, "mounted", "size=160m", MsFlags::empty());
    let writer = Writer::start(&workshop, "");
    let (running, copy) = writer.dump_and_stop_copy(&place.join("image"));
    let filler = fs::File::create(place.join("filler")).unwrap();
    let (none, mut size) = (nix::fcntl::FallocateFlags::empty(), 0);
    for step in [1 << 20, 4096] {
        while nix::fcntl::fallocate(&filler, none, size, step).is_ok() {
            size += step;
        }
    }
    kill(copy, libc::SIGCONT);
    running.wait().assert_error(FAILED, &["no space left"]);
    assert_eq!(names(&place), ["filler"], "left behind");
    assert_eq!(writer.copy(), None);
    writer.judge();
    drop(filler);
    nix::mount::umount(&place).unwrap();
}

/// Says with `-v` how the memory was written.
fn verbose(writer: &Writer, image: &Path) -> String {
    Writer::reap();
    let mut command = ckpt(["-v", "dump", "--leave-running", "-t"]);
    let outcome = run(command.arg(writer.pid().to_string()).arg("-D").arg(image));
    outcome.assert_done();
    outcome.errors.join("\n")
}

const STANDS_STILL: &str = "stands still while its memory is written";

#[test]
fn who_inherits_orphans_is_not_given_one() {
    let workshop = Workshop::new();
    let inherits = "import ctypes\nassert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0";
    let writer = Writer::start(&workshop, inherits);
    let said = verbose(&writer, &workshop.image());
    assert!(said.contains(STANDS_STILL) && said.contains("inherits orphans"), "{said}");
    writer.judge();
    let workshop = Workshop::new();
    let writer = Writer::start(&workshop, "");
    let said = verbose(&writer, &workshop.image());
    assert!(!said.contains(STANDS_STILL), "{said}");
    writer.judge();
}

/// For an ordinary user: root may have as many processes as it likes.
#[test]
fn a_user_who_may_have_no_more_processes() {
    let workshop = Workshop::new();
    std::os::unix::fs::chown(workshop.path(), Some(UNUSED), Some(UNUSED)).unwrap();
    let limited = format!(
        "import os, resource\nresource.setrlimit(resource.RLIMIT_NPROC, (1, 1))\nos.setresgid({UNUSED}, {UNUSED}, {UNUSED})\n\
         os.setresuid({UNUSED}, {UNUSED}, {UNUSED})"
    );
    let writer = Writer::start(&workshop, &limited);
    let said = verbose(&writer, &workshop.image());
    assert!(said.contains(STANDS_STILL) && said.contains("cannot be copied"), "{said}");
    assert_eq!(writer.copy(), None);
    writer.judge();
}

/// A user whom nobody is.
const UNUSED: u32 = 64_321;
