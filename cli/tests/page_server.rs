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
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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
        let token = self.token.to_str().unwrap().to_string();
        self.serve_to(listen, &["--token-file", &token], before)
    }

    fn serve_to(&self, listen: &str, shown: &[&str], before: impl FnOnce(&mut Command)) -> Server {
        let said = self.workshop.path().join("server.out");
        let mut command = Command::new(CKPT);
        command.args(["page-server", "--listen", listen, "-D"]).arg(self.images());
        command.args(shown).current_dir(self.workshop.path()).stdin(Stdio::null());
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

    fn restore_by(&self, address: &str, shown: &[&str]) -> Command {
        let mut command = ckpt(["--backend", "userfault", "restore", "-d", "-D", "image", "--pages-from", address]);
        command.args(["--pages-timeout", "2"]).args(shown).current_dir(self.workshop.path());
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

/// A certificate authority, and certificates of it in files.
struct Authority {
    certificate: rcgen::Certificate,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Authority {
    fn new() -> Authority {
        let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = parameters.self_signed(&key).unwrap();
        Authority { certificate, issuer: rcgen::Issuer::new(parameters, key) }
    }

    /// Options with a certificate for a host, which accept those of this authority.
    fn options(&self, directory: &Path, name: &str, host: &str) -> Vec<String> {
        let key = rcgen::KeyPair::generate().unwrap();
        let parameters = rcgen::CertificateParams::new(vec![host.to_string()]).unwrap();
        let certificate = parameters.signed_by(&key, &self.issuer).unwrap();
        let path = |what: &str| directory.join(format!("{name}.{what}"));
        fs::write(path("crt"), certificate.pem()).unwrap();
        token(&path("key"), &key.serialize_pem());
        fs::write(path("ca"), self.certificate.pem()).unwrap();
        let file = |what: &str| path(what).to_str().unwrap().to_string();
        let options = ["--tls-certificate", "--tls-key", "--tls-ca"].map(String::from);
        options.into_iter().zip(["crt", "key", "ca"].map(file)).flat_map(|(option, file)| [option, file]).collect()
    }
}

fn strings(all: &[String]) -> Vec<&str> {
    all.iter().map(String::as_str).collect()
}

#[test]
fn memory_comes_by_tls_between_those_who_have_certificates() {
    let place = dumped();
    let authority = Authority::new();
    let here = place.workshop.path().to_path_buf();
    let of_server = authority.options(&here, "server", "127.0.0.1");
    let of_client = authority.options(&here, "client", "somebody");
    let server = place.serve_to("127.0.0.1:0", &strings(&of_server), |_| {});

    // Without a certificate, with one of another authority, with a token alone, and outside of its images.
    let token_file = place.token.to_str().unwrap().to_string();
    let outcome = run(&mut place.restore_by(&server.address, &["--token-file", &token_file]));
    outcome.assert_error(FAILED, &["page server", "no pages"]);
    let others = Authority::new().options(&here, "stranger", "somebody");
    run(&mut place.restore_by(&server.address, &strings(&others))).assert_error(FAILED, &["TLS", "certificate"]);
    // Accepts the server, but is a stranger to it.
    let mut stranger = others.clone();
    stranger[5] = of_client[5].clone();
    run(&mut place.restore_by(&server.address, &strings(&stranger))).assert_error(FAILED, &["TLS"]);
    let outside = place.restore_by(&server.address, &strings(&of_client));
    let arguments: Vec<_> =
        outside.get_args().map(|it| if it == "image" { "../images".into() } else { it.to_owned() }).collect();
    let mut outside = Command::new(outside.get_program());
    outside.args(arguments).current_dir(&here);
    run(&mut outside).assert_error(FAILED, &["no image"]);
    // A key that others may read, and half of what is needed.
    fs::set_permissions(&of_client[3], fs::Permissions::from_mode(0o644)).unwrap();
    run(&mut place.restore_by(&server.address, &strings(&of_client))).assert_error(FAILED, &["others may read"]);
    fs::set_permissions(&of_client[3], fs::Permissions::from_mode(0o600)).unwrap();
    run(&mut place.restore_by(&server.address, &strings(&of_client[..2]))).assert_error(BAD_USAGE, &["--tls-key"]);
    assert!(place.is_gone());

    let mut restore = place.restore_by(&server.address, &strings(&of_client));
    run(restore.arg("--no-sweep")).assert_done();
    place.wait_until_it_runs();
    place.check();
}

#[test]
fn a_server_with_a_certificate_for_another_host_is_not_believed() {
    let place = dumped();
    let authority = Authority::new();
    let here = place.workshop.path();
    let of_server = authority.options(here, "server", "elsewhere.example");
    let of_client = authority.options(here, "client", "somebody");
    let server = place.serve_to("127.0.0.1:0", &strings(&of_server), |_| {});
    run(&mut place.restore_by(&server.address, &strings(&of_client))).assert_error(FAILED, &["TLS", "certificate"]);
}

#[test]
fn certificate_and_token_are_both_asked_for_where_both_are_given() {
    let place = dumped();
    let authority = Authority::new();
    let here = place.workshop.path();
    let token_file = place.token.to_str().unwrap().to_string();
    let with_token = |mut options: Vec<String>| {
        options.extend(["--token-file".into(), token_file.clone()]);
        options
    };
    let of_server = with_token(authority.options(here, "server", "127.0.0.1"));
    let of_client = authority.options(here, "client", "somebody");
    let server = place.serve_to("127.0.0.1:0", &strings(&of_server), |_| {});
    run(&mut place.restore_by(&server.address, &strings(&of_client))).assert_error(FAILED, &["token"]);
    let outcome = run(place.restore_by(&server.address, &strings(&with_token(of_client))).arg("--json"));
    outcome.assert_done();
    place.check();
}

/// What stands between a client and a server, and how many bytes of the server's it lets through.
fn proxy(server: &str, pass: fn(&mut std::net::TcpStream, &[u8], u64) -> bool) -> (String, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (server, passed) = (server.to_string(), Arc::new(AtomicU64::new(0)));
    let count = passed.clone();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let Ok(upstream) = std::net::TcpStream::connect(&server) else { continue };
            // So that what is slow here is slow for the server.
            nix::sys::socket::setsockopt(&upstream, nix::sys::socket::sockopt::RcvBuf, &(64 << 10)).unwrap();
            let (mut from, mut to) = (client.try_clone().unwrap(), upstream.try_clone().unwrap());
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(std::net::Shutdown::Both);
            });
            let (mut from, mut to, count) = (upstream, client, count.clone());
            std::thread::spawn(move || {
                let mut bytes = vec![0; 16 << 10];
                let mut own = 0;
                while let Ok(read @ 1..) = from.read(&mut bytes) {
                    own += read as u64;
                    count.fetch_add(read as u64, Ordering::SeqCst);
                    if !pass(&mut to, &bytes[..read], own) {
                        break;
                    }
                }
                let _ = to.shutdown(std::net::Shutdown::Both);
                let _ = from.shutdown(std::net::Shutdown::Both);
            });
        }
    });
    (address, passed)
}

/// Every connection breaks after three megabytes, in the middle of an answer: it is made again, and nothing is lost.
#[test]
fn connections_that_break_are_made_again() {
    let place = dumped();
    let server = place.serve("127.0.0.1:0", |_| {});
    let (address, passed) = proxy(&server.address, |to, bytes, own| to.write_all(bytes).is_ok() && own < 3 << 20);
    run(&mut place.restore(&address, "image", &["-d", "--json"])).assert_done();
    place.check();
    assert!(passed.load(Ordering::SeqCst) > 9 << 20, "there was something to break");
}

/// On a slow line what can be compressed is: half of the program's memory is nearly zeros.
#[test]
fn on_a_slow_line_pages_are_compressed() {
    let place = dumped();
    let server = place.serve("127.0.0.1:0", |_| {});
    let (address, passed) = proxy(&server.address, |to, bytes, _| {
        std::thread::sleep(Duration::from_micros(500));
        to.write_all(bytes).is_ok()
    });
    run(&mut place.restore(&address, "image", &["-d", "--json"])).assert_done();
    place.check();
    let passed = passed.load(Ordering::SeqCst);
    let pages = fs::metadata(place.images().join("image/pages.bin")).unwrap().len();
    assert!(passed > 8 << 20, "what cannot be compressed has passed: {passed}");
    assert!(passed + (5 << 20) < pages, "{passed} bytes for {pages}, of which 8 MiB are nearly zeros");
}

/// What is recorded where the image is at a server stays on this host, and is used from there; what the server has beside
/// the image is used by all.
#[test]
fn working_sets_go_with_a_page_server() {
    let place = dumped();
    let server = place.serve("127.0.0.1:0", |_| {});
    let here = place.workshop.path();
    let sets = here.join("sets");
    fs::create_dir(&sets).unwrap();
    let sets = sets.to_str().unwrap();

    let without = run(&mut place.restore(&server.address, "image", &["-d", "--record-working-set"]));
    without.assert_error(BAD_USAGE, &["--pages-from", "--working-set DIR"]);
    let missing = ["-d", "--record-working-set", "--working-set", "nowhere"];
    run(&mut place.restore(&server.address, "image", &missing)).assert_error(FAILED, &["nowhere", "no working set"]);
    assert!(place.is_gone());

    // Restores it, has it check all of its memory, does something more, and ends it.
    let restored = |more: &[&str], before_the_end: &dyn Fn()| -> serde_json::Value {
        for file in ["check", "checked", "pid"] {
            let _ = fs::remove_file(here.join(file));
        }
        let options = [&["-d", "--json", "--pidfile", "pid"], more].concat();
        let running = start(&mut place.restore(&server.address, "image", &options));
        wait_until("it is back", || here.join("pid").exists());
        place.check();
        before_the_end();
        kill(place.pid, libc::SIGKILL);
        let outcome = running.wait();
        outcome.assert_done();
        wait_until("it is gone", || place.is_gone());
        serde_json::from_str(&outcome.out).unwrap()
    };
    let number = |figures: &serde_json::Value, path: &str| figures.pointer(path).unwrap().as_f64().unwrap();

    let plain = restored(&["--no-sweep"], &|| {});
    assert!(number(&plain, "/faults") > 4000.0, "{plain}");
    assert_eq!(plain["working_set_guessed"], true, "the guess of the dump is at the server: {plain}");
    assert!(number(&plain, "/pages/working_set") > 0.0, "{plain}");

    let recorded = restored(&["--record-working-set", "--working-set", sets], &|| {
        run(&mut ckpt(["working-set", "stop", "-D", sets])).assert_done();
    });
    assert!(number(&recorded, "/recorded/pages") > 4000.0, "{recorded}");
    assert_eq!(names(Path::new(sets)), ["working-set"]);
    assert!(!place.images().join("image/working-set").exists(), "a server is only read from");

    let few = |figures: &serde_json::Value| {
        assert!(number(figures, "/pages/working_set") > 4000.0, "{figures}");
        assert!(number(figures, "/faults") * 20.0 < number(&plain, "/faults"), "95 % fewer: {figures}");
        assert_eq!(figures["working_set_guessed"], false, "{figures}");
    };
    few(&restored(&["--no-sweep", "--working-set", sets], &|| {}));
    let ignored = restored(&["--no-sweep", "--ignore-working-set"], &|| {});
    assert_eq!(number(&ignored, "/pages/working_set"), 0.0, "{ignored}");
    // Put beside the image, all who restore it have it.
    fs::copy(Path::new(sets).join("working-set"), place.images().join("image/working-set")).unwrap();
    few(&restored(&["--no-sweep"], &|| {}));
    // One that is damaged is not taken, and that is said.
    fs::write(place.images().join("image/working-set"), "nonsense").unwrap();
    let damaged = restored(&["--no-sweep"], &|| {});
    assert!(number(&damaged, "/pages/working_set") < 1000.0, "{damaged}");
    assert!(damaged["working_set_trouble"].as_str().unwrap().contains("page server's working set"), "{damaged}");
}

/// However the command ends, nothing of what it has fetched stays on this host.
#[test]
fn a_killed_restore_leaves_no_files() {
    let place = dumped();
    let temporary = place.workshop.path().join("temporary");
    fs::create_dir(&temporary).unwrap();
    let server = place.serve("127.0.0.1:0", |_| {});
    // Three points: little of the manifest has come, all of it but not the pages, and the tree runs.
    let manifest = fs::metadata(place.images().join("image/image.cbor")).unwrap().len();
    static MOST: AtomicU64 = AtomicU64::new(0);
    for most in [manifest / 2, manifest + 4096, u64::MAX] {
        MOST.store(most, Ordering::SeqCst);
        let (address, passed) =
            proxy(&server.address, |to, bytes, own| own > MOST.load(Ordering::SeqCst) || to.write_all(bytes).is_ok());
        let mut running = start(place.restore(&address, "image", &["--no-sweep"]).env("TMPDIR", &temporary));
        let pid = Pid(running.child.id() as i32);
        let open = || {
            let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            fds.filter_map(|fd| fs::read_link(fd.path()).ok()).filter(|file| file.starts_with(&temporary)).count()
        };
        match most {
            u64::MAX => place.wait_until_it_runs(),
            most => {
                wait_until("so much has come", || passed.load(Ordering::SeqCst) > most);
                assert!(open() > 0, "what it has fetched is there");
            }
        }
        running.child.kill().unwrap();
        end_of(&mut running.child);
        assert_eq!(names(&temporary), Vec::<String>::new(), "left behind after {most} bytes");
    }
    place.check();
}

/// In the middle of its work a server stops to answer, or what comes is nonsense: the tree is given up in time.
#[test]
fn a_server_that_goes_bad_under_a_running_tree_ends_it() {
    type Pass = fn(&mut std::net::TcpStream, &[u8], u64) -> bool;
    static BAD: AtomicBool = AtomicBool::new(false);
    let kinds: [(&str, Pass); 2] = [
        ("stalls", |to, bytes, _| BAD.load(Ordering::SeqCst) || to.write_all(bytes).is_ok()),
        ("lies", |to, bytes, _| {
            let lie = vec![0x5a; bytes.len()];
            to.write_all(if BAD.load(Ordering::SeqCst) { &lie } else { bytes }).is_ok()
        }),
    ];
    for (what, pass) in kinds {
        BAD.store(false, Ordering::SeqCst);
        let place = dumped();
        let server = place.serve("127.0.0.1:0", |_| {});
        let (address, _) = proxy(&server.address, pass);
        let running = start(&mut place.restore(&address, "image", &["--no-sweep", "--pages-timeout", "1"]));
        place.wait_until_it_runs();
        BAD.store(true, Ordering::SeqCst);
        fs::write(place.workshop.path().join("check"), "").unwrap();
        let outcome = running.wait();
        assert_eq!(outcome.signal(), Some(libc::SIGKILL), "{what}: {outcome:#?}");
        assert!(outcome.errors.iter().any(|line| line.contains("has given no pages for")), "{what}: {outcome:#?}");
        assert!(!place.workshop.path().join("checked").exists(), "{what}: it did not go on without its memory");
    }
}
