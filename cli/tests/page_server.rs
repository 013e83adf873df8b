//! `ckpt page-server` and `restore --pages-from`: between network namespaces, and with servers that are not what they should
//! be.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use ckpt_core::Pid;
use ckpt_core::procfs::ProcDir;
use common::*;

/// Memory that a program checks when it is told to; half of it can be compressed.
const PROGRAM: &str = r#"
import os, random, time
random.seed(1)
memory = bytearray(8 << 20) + random.randbytes(8 << 20)
for at in range(0, len(memory), 4096):
    memory[at:at + 8] = at.to_bytes(8, "little")
open("ready", "w").close()
while not os.path.exists("check"):
    open("beat", "w").close()
    time.sleep(0.002)
good = all(int.from_bytes(memory[at:at + 8], "little") == at for at in range(0, len(memory), 4096))
open("checked", "w").write("good" if good else "bad")
"#;

struct Place {
    workshop: Workshop,
    pid: Pid,
    token: PathBuf,
    /// The last before the dump.
    beat: Option<SystemTime>,
}

fn token(path: &Path, text: &str) -> PathBuf {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    path.to_path_buf()
}

fn dumped() -> Place {
    let workshop = Workshop::new();
    let mut program = Companion::python(PROGRAM, workshop.path());
    wait_until("the program is ready", || workshop.path().join("ready").exists());
    let pid = program.pid();
    run(&mut dump(pid, &workshop.image(), &[])).assert_done();
    end_of(&mut program.0);
    let beat = beat(&workshop);
    let token = token(&workshop.path().join("token"), "a secret of some length\n");
    Place { workshop, pid, token, beat }
}

/// When the program last said that it runs. The file stays as it was: it may have been open at the dump.
fn beat(workshop: &Workshop) -> Option<SystemTime> {
    fs::metadata(workshop.path().join("beat")).and_then(|found| found.modified()).ok()
}

/// A page server, ended with the test.
struct Server {
    companion: Companion,
    address: String,
}

impl Place {
    fn images(&self) -> PathBuf {
        self.workshop.path().join("images")
    }

    fn serve(&self, listen: &str, before: impl FnOnce(&mut Command)) -> Server {
        let said = self.workshop.path().join("server.out");
        let mut command = Command::new(CKPT);
        command.args(["page-server", "--listen", listen, "-D"]).arg(self.images());
        command.arg("--token-file").arg(&self.token).stdin(Stdio::null());
        command.stdout(fs::File::create(&said).unwrap()).stderr(Stdio::null());
        before(&mut command);
        let companion = Companion::start(command);
        wait_until("the server listens", || fs::read_to_string(&said).is_ok_and(|text| text.ends_with('\n')));
        let text = fs::read_to_string(&said).unwrap();
        Server { companion, address: text.trim().rsplit(' ').next().unwrap().to_string() }
    }

    fn restore(&self, address: &str, image: &str, more: &[&str]) -> Command {
        let mut command = ckpt(["--backend", "userfault", "restore", "-D", image, "--pages-from", address]);
        command.arg("--token-file").arg(&self.token).args(more).current_dir(self.workshop.path());
        command
    }

    fn wait_until_it_runs(&self) {
        wait_until("it runs", || beat(&self.workshop) != self.beat);
    }

    fn check(&self) {
        fs::write(self.workshop.path().join("check"), "").unwrap();
        let answer = self.workshop.path().join("checked");
        wait_until("the program has checked", || fs::read_to_string(&answer).is_ok_and(|text| !text.is_empty()));
        assert_eq!(fs::read_to_string(&answer).unwrap(), "good");
    }

    fn is_gone(&self) -> bool {
        ProcDir::open(self.pid).and_then(|proc| proc.stat_line()).map_or(true, |stat| stat.state == 'Z')
    }
}

/// Runs something in a network namespace of its own, which is joined by its path.
fn in_namespace(command: &mut Command, name: &str) {
    let path = std::ffi::CString::new(format!("/run/netns/{name}")).unwrap();
    // SAFETY: open and setns are plain system calls.
    unsafe {
        command.pre_exec(move || {
            let fd = libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
            match libc::setns(fd, libc::CLONE_NEWNET) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        })
    };
}

/// Two network namespaces with a wire between them.
struct Wire(String, String);

impl Wire {
    fn new() -> Wire {
        let id = std::process::id();
        let wire = Wire(format!("ckpt-{id}-a"), format!("ckpt-{id}-b"));
        let (a, b) = (&wire.0, &wire.1);
        for line in [
            format!("netns add {a}"),
            format!("netns add {b}"),
            format!("-n {a} link add wire type veth peer name wire netns {b}"),
            format!("-n {a} addr add 10.77.0.1/24 dev wire"),
            format!("-n {b} addr add 10.77.0.2/24 dev wire"),
            format!("-n {a} link set wire up"),
            format!("-n {b} link set wire up"),
        ] {
            let run = Command::new("ip").args(line.split(' ')).output().unwrap();
            assert!(run.status.success(), "ip {line}: {}", String::from_utf8_lossy(&run.stderr));
        }
        wire
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        for name in [&self.0, &self.1] {
            let _ = Command::new("ip").args(["netns", "del", name]).output();
        }
    }
}

#[test]
fn memory_comes_from_another_network_namespace() {
    let place = dumped();
    let wire = Wire::new();
    let _server = place.serve("10.77.0.1:7070", |command| in_namespace(command, &wire.0));
    let mut command = place.restore("10.77.0.1:7070", "image", &["-d", "--json"]);
    in_namespace(&mut command, &wire.1);
    let outcome = run(&mut command);
    outcome.assert_done();
    let figures: serde_json::Value = serde_json::from_str(&outcome.out).unwrap();
    assert!(figures["pages"]["sweep"].as_f64().unwrap() > 2000.0, "{figures}");
    place.check();
}

#[test]
fn every_page_may_come_by_a_fault() {
    let place = dumped();
    let server = place.serve("127.0.0.1:0", |_| {});
    run(&mut place.restore(&server.address, "image", &["-d", "--no-sweep"])).assert_done();
    place.wait_until_it_runs();
    place.check();
}

#[test]
fn nothing_is_served_without_the_token_or_outside_of_the_directory() {
    let mut place = dumped();
    let server = place.serve("127.0.0.1:0", |_| {});
    let outside = place.workshop.path().join("outside");
    fs::rename(place.images().join("image"), &outside).unwrap();
    symlink(&outside, place.images().join("link")).unwrap();
    for name in ["../outside", "/etc", ".", "image", "link", "link/../../outside"] {
        run(&mut place.restore(&server.address, name, &["-d"])).assert_error(FAILED, &["no image"]);
    }
    fs::rename(&outside, place.images().join("image")).unwrap();
    place.token = token(&place.workshop.path().join("other"), "another secret, as long");
    run(&mut place.restore(&server.address, "image", &["-d"])).assert_error(FAILED, &["token"]);
    place.token = token(&place.workshop.path().join("short"), "short");
    run(&mut place.restore(&server.address, "image", &["-d"])).assert_error(FAILED, &["token file", "head -c 32"]);
    fs::set_permissions(&place.token, fs::Permissions::from_mode(0o644)).unwrap();
    run(&mut place.restore(&server.address, "image", &["-d"])).assert_error(FAILED, &["others may read it"]);
    assert!(place.is_gone());
}

#[test]
fn a_server_that_comes_back_is_used_again() {
    let place = dumped();
    let mut server = place.serve("127.0.0.1:0", |_| {});
    run(&mut place.restore(&server.address, "image", &["-d", "--no-sweep"])).assert_done();
    place.wait_until_it_runs();
    server.companion.0.kill().unwrap();
    end_of(&mut server.companion.0);
    fs::write(place.workshop.path().join("check"), "").unwrap();
    let address = server.address.clone();
    // The port may not be free at once.
    wait_until("the port is free", || TcpListener::bind(&address).is_ok());
    let _again = place.serve(&address, |_| {});
    place.check();
}

#[test]
fn a_server_that_stays_away_ends_the_tree() {
    let place = dumped();
    let mut server = place.serve("127.0.0.1:0", |_| {});
    let running = start(&mut place.restore(&server.address, "image", &["--no-sweep", "--pages-timeout", "1"]));
    place.wait_until_it_runs();
    server.companion.0.kill().unwrap();
    end_of(&mut server.companion.0);
    fs::write(place.workshop.path().join("check"), "").unwrap();
    let outcome = running.wait();
    assert_eq!(outcome.signal(), Some(libc::SIGKILL), "{outcome:#?}");
    assert!(outcome.errors.iter().any(|line| line.contains("has given no pages for")), "{outcome:#?}");
    assert!(!place.workshop.path().join("checked").exists(), "it did not go on without its memory");
}

#[test]
fn a_server_with_a_damaged_image_ends_the_tree() {
    let place = dumped();
    let server = place.serve("127.0.0.1:0", |_| {});
    let running = start(&mut place.restore(&server.address, "image", &["--no-sweep"]));
    place.wait_until_it_runs();
    let pages = fs::OpenOptions::new().write(true).open(place.images().join("image/pages.bin")).unwrap();
    let size = pages.metadata().unwrap().len();
    for at in (0..size).step_by(4096) {
        std::os::unix::fs::FileExt::write_all_at(&pages, b"other", at + 100).unwrap();
    }
    fs::write(place.workshop.path().join("check"), "").unwrap();
    let outcome = running.wait();
    assert_eq!(outcome.signal(), Some(libc::SIGKILL), "{outcome:#?}");
    assert!(outcome.errors.iter().any(|line| line.contains("checksum")), "{outcome:#?}");
}

/// Servers that stall, send nonsense, or hang up: the restore ends in time, with an error.
#[test]
fn servers_that_are_none_are_bounded() {
    let place = dumped();
    type Behaviour = fn(std::net::TcpStream);
    let behaviours: [(&str, Behaviour); 4] = [
        ("stalls", |stream| {
            let _ = (&stream).read(&mut [0; 1]);
            std::thread::sleep(Duration::from_secs(30));
        }),
        ("drips", |mut stream| {
            for _ in 0..3000 {
                if stream.write_all(b"C").is_err() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }),
        ("babbles", |mut stream| while stream.write_all(&[0x5a; 4096]).is_ok() {}),
        ("hangs up", drop),
    ];
    for (what, behave) in behaviours {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || behave(stream));
            }
        });
        let begun = Instant::now();
        let outcome = run(&mut place.restore(&address, "image", &["-d", "--pages-timeout", "1"]));
        outcome.assert_error(FAILED, &["page server", "no pages"]);
        assert!(begun.elapsed() < Duration::from_secs(15), "{what}: {:?}", begun.elapsed());
    }
}

#[test]
fn what_goes_with_it_is_asked_for() {
    let place = dumped();
    let mut command = ckpt(["--backend", "userfault", "restore", "-D", "image", "--pages-from", "127.0.0.1:1"]);
    run(&mut command).assert_error(BAD_USAGE, &["--token-file"]);
    let mut command = ckpt(["restore", "-D", "image", "--pages-from", "127.0.0.1:1", "--token-file"]);
    run(command.arg(&place.token)).assert_error(BAD_USAGE, &["--backend userfault"]);
}
