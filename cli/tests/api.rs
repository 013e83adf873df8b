//! `ckpt api`: programs that want to know, in C and in Python. The examples are what runs here.

mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use ckpt_core::Pid;
use common::*;

/// `nobody`.
const NOBODY: u32 = 65534;
const LANGUAGES: [&str; 2] = ["c", "python"];

/// A directory in which an ordinary user has ckpt, the header, the module and the examples.
struct Lab {
    workshop: Workshop,
    uid: u32,
}

impl Lab {
    fn new() -> Lab {
        Lab::of(NOBODY)
    }

    fn of(uid: u32) -> Lab {
        let workshop = Workshop::new();
        let lab = Lab { workshop, uid };
        fs::set_permissions(lab.path(), fs::Permissions::from_mode(0o777)).unwrap();
        copy_program(CKPT, &lab.path().join("ckpt"));
        for (language, file) in LANGUAGES.iter().zip(["ckpt.h", "ckpt.py"]) {
            let outcome = run(&mut ckpt(["api", language]));
            outcome.assert_done();
            fs::write(lab.path().join(file), outcome.out).unwrap();
        }
        adopt_orphans();
        lab
    }

    fn path(&self) -> &Path {
        self.workshop.path()
    }

    /// A command of the user's.
    fn command<I: AsRef<std::ffi::OsStr>>(&self, program: &str, arguments: impl IntoIterator<Item = I>) -> Command {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(self.path()).env_clear().env("PATH", "/usr/bin:/bin");
        command.env("PYTHONDONTWRITEBYTECODE", "1").stdin(Stdio::null()).uid(self.uid).gid(self.uid);
        command
    }

    fn ckpt(&self, arguments: &[&str]) -> Command {
        self.command(self.path().join("ckpt").to_str().unwrap(), arguments)
    }

    /// How an example is started, after it was compiled where it must be.
    fn example(&self, language: &str, name: &str) -> Vec<String> {
        let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
        if language == "python" {
            fs::copy(examples.join(format!("{name}.py")), self.path().join(format!("{name}.py"))).unwrap();
            return vec!["/usr/bin/python3".into(), format!("{name}.py")];
        }
        self.compile("gcc", &examples.join(format!("{name}.c")), name);
        vec![format!("./{name}")]
    }

    fn compile(&self, compiler: &str, source: &Path, name: &str) {
        let mut command = Command::new(compiler);
        command.args(["-Wall", "-Wextra", "-Werror", "-O1", "-pthread", "-I."]).current_dir(self.path());
        let output = command.args(["-o", name]).arg(source).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// A program of a test's own, which imports the module.
    fn python(&self, program: &str) -> Vec<String> {
        fs::write(self.path().join("program.py"), program).unwrap();
        vec!["/usr/bin/python3".into(), "program.py".into()]
    }

    /// `ckpt run OPTIONS -- PROGRAM`, with its output in `output`.
    fn run(&self, options: &[&str], program: &[String]) -> Command {
        let mut command = self.ckpt(&["--backend", "preload", "run", "-o", "output"]);
        command.args(options).arg("--").args(program);
        command
    }

    /// The same in the background.
    fn start(&self, program: &[String]) -> Ended {
        let outcome = run(&mut self.run(&["-d"], program));
        outcome.assert_done();
        Ended(Pid(outcome.out.trim().parse().unwrap()))
    }

    fn dump(&self, pid: Pid, image: &str, more: &[&str]) -> Command {
        let mut command = self.ckpt(&["--backend", "preload", "dump", "-t", &pid.to_string(), "-D", image]);
        command.args(more);
        command
    }

    /// Into the background, while a stranger has the id of its first process: it gets others than it knows.
    fn restore(&self, image: &str) -> Ended {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let name = format!("pid-{}", NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
        let mut command = self.ckpt(&["--backend", "preload", "restore", "-d", "-D", image, "--pidfile", &name]);
        run(&mut command).assert_done();
        let pid = fs::read_to_string(self.path().join(name)).unwrap();
        Ended(Pid(pid.trim().parse().unwrap()))
    }

    fn output(&self) -> String {
        fs::read_to_string(self.path().join("output")).unwrap_or_default()
    }

    /// Waits for a line, which is there so many times.
    #[track_caller]
    fn says(&self, line: &str, times: usize) {
        let said = || self.output().lines().filter(|said| *said == line).count();
        wait_until(&format!("{line:?} is said {times} times"), || said() >= times);
        assert_eq!(said(), times, "{line:?} in {}", self.output());
    }

    fn touch(&self, name: &str) {
        fs::write(self.path().join(name), "").unwrap();
    }
}

/// Ends what a test has started, whatever becomes of the test.
struct Ended(Pid);

impl Drop for Ended {
    fn drop(&mut self) {
        kill(self.0, libc::SIGKILL);
        wait_for(self.0, None);
    }
}

/// The process that `ckpt run` has started: it says so.
fn root_of(outcome: &Outcome) -> Pid {
    let words: Vec<&str> = outcome.errors[0].split_whitespace().collect();
    assert_eq!(words[..2], ["ckpt:", "process"], "{outcome:?}");
    Pid(words[2].parse().unwrap())
}

fn lines(text: &str) -> Vec<&str> {
    text.lines().collect()
}

#[test]
fn without_ckpt_the_examples_work_and_say_so() {
    let lab = Lab::new();
    for language in LANGUAGES {
        let run_alone = |name: &str, arguments: &[&str]| {
            let program = lab.example(language, name);
            let outcome =
                run(&mut lab
                    .command(&program[0], program[1..].iter().map(String::as_str).chain(arguments.iter().copied())));
            outcome.assert_done();
            outcome.out
        };
        let said = run_alone("now", &[]);
        assert_eq!((lines(&said)[0].starts_with("not saved: "), lines(&said)[1]), (true, "sum 500500"), "{said}");
        assert_eq!(run_alone("regions", &["2"]), "round 0\nround 1\n");
        assert_eq!(run_alone("restored", &[]), "not under ckpt\n");
    }
    let source = lab.path().join("both.cc");
    fs::write(&source, "#include \"ckpt.h\"\nint main() { return ckpt_available() + ckpt_region_leave() + 1; }\n")
        .unwrap();
    lab.compile("g++", &source, "both");
    run(&mut lab.command("./both", [""; 0])).assert_done();
}

#[test]
fn a_program_has_itself_saved_and_goes_on_from_there() {
    for language in LANGUAGES {
        let lab = Lab::new();
        let program = lab.example(language, "now");
        let outcome = run(&mut lab.run(&["-D", "saved"], &program));
        outcome.assert_done();
        assert_eq!(lab.output(), "saved\nsum 500500\n", "{language}");
        // From one image, by both restorers, twice with other ids.
        let mut stranger = Some(Stranger::take(root_of(&outcome), NOBODY));
        for (backend, user) in [("preload", NOBODY), ("preload", NOBODY), ("ptrace", 0)] {
            if backend == "ptrace" {
                stranger.take().unwrap().assert_untouched();
            }
            lab.touch("output");
            let mut restore = lab.ckpt(&["--backend", backend, "restore", "-D", "saved/latest"]);
            run(restore.uid(user).gid(user)).assert_done();
            // It goes on at the end of the file, as it has opened it for that.
            assert_eq!(lab.output(), "restored\nsum 500500\n", "{language} {backend}");
        }
    }
}

/// Is saved by whichever ckpt waits for it: into the next image each time that it comes out of one.
const AGAIN: &str = r#"
import ckpt, os
saved = []
for name in ["first", "second", "third"]:
    outcome = ckpt.now(name)
    saved.append(outcome)
    print(name, outcome, ckpt.restored(), flush=True)
    if outcome == ckpt.SAVED:
        os._exit(0)
print(saved, flush=True)
"#;

#[test]
fn a_restored_program_has_itself_saved_again() {
    let lab = Lab::new();
    let program = lab.python(AGAIN);
    let outcome = run(&mut lab.run(&[], &program));
    outcome.assert_done();
    let stranger = Stranger::take(root_of(&outcome), NOBODY);
    for image in ["first", "second", "third"] {
        run(&mut lab.ckpt(&["--backend", "preload", "restore", "-D", image])).assert_done();
    }
    let expected = "first 0 0\nfirst 1 1\nsecond 0 1\nsecond 1 2\nthird 0 2\nthird 1 3\n[1, 1, 1]\n";
    assert_eq!(lab.output(), expected);
    stranger.assert_untouched();
}

/// Says why it could not be saved.
const REFUSED_NOW: &str = r#"
import ckpt, errno, sys
for image in [None, "", "taken", "x" * 4096, "nowhere/image"]:
    try:
        print(ckpt.now(image))
    except OSError as error:
        print(errno.errorcode[error.errno], flush=True)
try:
    with ckpt.uninterrupted():
        ckpt.now("image")
except RuntimeError:
    print("in a region", flush=True)
"#;

#[test]
fn why_a_program_was_not_saved_it_learns() {
    let lab = Lab::new();
    let program = lab.python(REFUSED_NOW);
    fs::create_dir(lab.path().join("taken")).unwrap();
    lab.touch("taken/file");
    let outcome = run(&mut lab.run(&[], &program));
    outcome.assert_done();
    assert_eq!(lines(&lab.output()), ["EDESTADDRREQ", "EINVAL", "EINVAL", "ENAMETOOLONG", "EINVAL", "in a region"]);
    // The line that says which process runs, and one for each that ckpt has tried.
    assert_eq!(outcome.errors.len(), 3, "{outcome:?}");
    fs::remove_file(lab.path().join("output")).unwrap();
    // Nobody waits for it.
    let _root = lab.start(&program);
    lab.says("in a region", 1);
    assert_eq!(lines(&lab.output()), ["ENOTCONN", "EINVAL", "ENOTCONN", "ENAMETOOLONG", "ENOTCONN", "in a region"]);
}

#[test]
fn each_life_is_counted_while_the_one_before_goes_on() {
    for language in LANGUAGES {
        let lab = Lab::new();
        let first = lab.start(&lab.example(language, "restored"));
        lab.says("life 0", 1);
        run(&mut lab.dump(first.0, "image-0", &["--leave-running"])).assert_done();
        let second = lab.restore("image-0");
        lab.says("life 1", 1);
        assert_ne!(first.0, second.0, "its id is taken");
        run(&mut lab.dump(second.0, "image-1", &[])).assert_done();
        let _third = lab.restore("image-1");
        lab.says("life 2", 1);
        let _fourth = lab.restore("image-1");
        lab.says("life 2", 2);
        assert_eq!(lab.output().matches("life").count(), 4, "{}", lab.output());
    }
}

#[test]
fn a_life_is_counted_whichever_backend_saves_and_restores() {
    let lab = Lab::of(0);
    let mut root = lab.start(&lab.example("c", "restored"));
    lab.says("life 0", 1);
    for (life, backend) in ["ptrace", "userfault", "ptrace"].into_iter().enumerate() {
        let image = format!("image-{life}");
        let pid = root.0;
        run(&mut lab.ckpt(&["--backend", "ptrace", "dump", "-t", &pid.to_string(), "-D", &image])).assert_done();
        drop(root);
        run(&mut lab.ckpt(&["--backend", backend, "restore", "-d", "-D", &image])).assert_done();
        root = Ended(pid);
        lab.says(&format!("life {}", life + 1), 1);
    }
}

/// What the accounts of the example hold.
fn accounts(lab: &Lab) -> (i64, i64) {
    let read = |name: &str| fs::read_to_string(lab.path().join(name)).unwrap().trim().parse().unwrap();
    (read("first"), read("second"))
}

#[test]
fn no_checkpoint_is_made_in_a_region() {
    for (language, backend, uid) in [("c", "preload", NOBODY), ("python", "preload", NOBODY), ("c", "ptrace", 0)] {
        let lab = Lab::of(uid);
        let mut root = Some(lab.start(&lab.example(language, "regions")));
        let mut rounds = 0;
        let mut stranger = None;
        for n in 0..3 {
            // Some time in one of its rounds, most of which is between the two writes.
            wait_until("it works", || lab.output().lines().count() > rounds);
            let image = format!("image-{n}");
            let pid = root.as_ref().unwrap().0.to_string();
            run(&mut lab.ckpt(&["--backend", backend, "dump", "-t", &pid, "-D", &image])).assert_done();
            drop(root.take());
            // That of its first life; later ones have others, which nobody needs to take.
            if backend == "preload" && stranger.is_none() {
                stranger = Some(Stranger::take(Pid(pid.parse().unwrap()), uid));
            }
            let (first, second) = accounts(&lab);
            assert_eq!(first, -second, "{language} {backend}: saved between the two");
            rounds = lab.output().lines().count();
            root = Some(match backend {
                "preload" => lab.restore(&image),
                _ => {
                    run(&mut lab.ckpt(&["--backend", backend, "restore", "-d", "-D", &image])).assert_done();
                    Ended(Pid(pid.parse().unwrap()))
                }
            });
        }
        wait_until("it works", || lab.output().lines().count() > rounds);
        let output = lab.output();
        assert!(output.lines().enumerate().all(|(n, line)| line == format!("round {n}")), "{output}");
    }
}

/// Stays in a region, twice, until it is let out.
const STAYS: &str = r#"
import ckpt, os, time
with ckpt.uninterrupted():
    with ckpt.uninterrupted():
        print("in", flush=True)
        while not os.path.exists("once"):
            time.sleep(0.001)
    print("once", flush=True)
    while not os.path.exists("twice"):
        time.sleep(0.001)
print("out", flush=True)
while not os.path.exists("end"):
    time.sleep(0.001)
    with ckpt.uninterrupted():
        pass
print("end", flush=True)
"#;

#[test]
fn a_dump_waits_for_the_end_of_a_region_and_not_for_ever() {
    let lab = Lab::new();
    let root = lab.start(&lab.python(STAYS));
    lab.says("in", 1);
    let pid = root.0.to_string();
    for said in ["in", "once"] {
        lab.says(said, 1);
        run(&mut lab.dump(root.0, "image", &["--timeout", "2"])).assert_error(FAILED, &[&pid, "region", "--timeout"]);
        assert!(!lab.path().join("image").exists());
        lab.touch("once");
    }
    let dump = start(&mut lab.dump(root.0, "image", &["--timeout", "60"]));
    let consent = || fs::read_to_string("/proc/net/unix").unwrap().contains("@ckpt-consent-");
    wait_until("the dump has begun", consent);
    assert_eq!(lab.output(), "in\nonce\n");
    lab.touch("twice");
    dump.wait().assert_done();
    drop(root);
    let stranger = Stranger::take(Pid(pid.parse().unwrap()), NOBODY);
    let _root = lab.restore("image");
    lab.touch("end");
    lab.says("end", 1);
    stranger.assert_untouched();
}

/// The far end of the connection that the example keeps.
struct Peer {
    listener: UnixListener,
    next: u64,
}

impl Peer {
    fn new(lab: &Lab) -> Peer {
        let path = lab.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
        Peer { listener, next: 0 }
    }

    /// Takes the next connection, which begins by saying something.
    fn connection(&mut self, begins: Option<&str>) -> BufReader<UnixStream> {
        let mut connection = BufReader::new(self.listener.accept().unwrap().0);
        connection.get_ref().set_read_timeout(Some(std::time::Duration::from_secs(60))).unwrap();
        if let Some(begins) = begins {
            let mut line = String::new();
            connection.read_line(&mut line).unwrap();
            assert_eq!(line.trim(), format!("again: {begins}"));
        }
        connection
    }

    /// Reads some numbers, or all that come until the connection is closed. They go on where those before ended.
    fn read(&mut self, connection: &mut BufReader<UnixStream>, most: u64) {
        let mut line = String::new();
        let end = self.next.saturating_add(most);
        while self.next < end && connection.read_line(&mut line).unwrap() > 0 {
            assert_eq!(line, format!("{}\n", self.next));
            self.next += 1;
            line.clear();
        }
    }
}

#[test]
fn hooks_close_what_cannot_be_saved_and_open_it_again() {
    for (language, backend, uid) in [("c", "preload", NOBODY), ("python", "preload", NOBODY), ("python", "ptrace", 0)] {
        let lab = Lab::of(uid);
        let mut peer = Peer::new(&lab);
        let mut program = lab.example(language, "hooks");
        program.push("socket".into());
        let root = lab.start(&program);
        let mut connection = peer.connection(None);
        peer.read(&mut connection, 5);
        let dump = |image: &str, more: &[&str]| {
            let pid = root.0.to_string();
            start(lab.ckpt(&["--backend", backend, "dump", "-t", &pid, "-D", image]).args(more))
        };
        let saved = dump("image-0", &["--leave-running"]);
        peer.read(&mut connection, u64::MAX);
        let mut connection = peer.connection(Some("saved"));
        saved.wait().assert_done();
        peer.read(&mut connection, 5);
        let saved = dump("image-1", &[]);
        peer.read(&mut connection, u64::MAX);
        saved.wait().assert_done();
        let pid = root.0;
        drop(root);
        let stranger = Stranger::take(pid, NOBODY);
        let _root = lab.restore("image-1");
        let mut connection = peer.connection(Some("restored"));
        peer.read(&mut connection, 5);
        stranger.assert_untouched();
    }
}

/// Without its hooks it is refused: that they are what makes the difference.
#[test]
fn without_its_hooks_the_example_is_refused() {
    let lab = Lab::new();
    let mut peer = Peer::new(&lab);
    let program =
        lab.python("import socket, time\ns = socket.socket(socket.AF_UNIX)\ns.connect('socket')\ntime.sleep(600)\n");
    let root = lab.start(&program);
    let _connection = peer.connection(None);
    run(&mut lab.dump(root.0, "image", &["--leave-running"])).assert_error(REFUSED, &["socket"]);
}

/// Its hooks say that they run, and do what they are told.
const TELLS: &str = r#"
import ckpt, os, threading, time
def exists(name):
    return os.path.exists(name)
@ckpt.before
def first():
    print("before 1", threading.get_native_id() != os.getpid(), flush=True)
@ckpt.after
def told(outcome):
    print("after 1", outcome, flush=True)
@ckpt.before
def second():
    print("before 2", flush=True)
    while exists("stay"):
        time.sleep(0.001)
    if exists("refuse"):
        raise Exception("refused")
@ckpt.after
def told_too(outcome):
    print("after 2", outcome, flush=True)
print("ready", flush=True)
while not exists("end"):
    time.sleep(0.001)
ckpt.remove(second)
ckpt.remove(told_too)
print("removed", flush=True)
while True:
    time.sleep(0.001)
"#;

#[test]
fn hooks_run_in_order_and_learn_what_came_of_it() {
    let lab = Lab::new();
    let root = lab.start(&lab.python(TELLS));
    let pid = root.0.to_string();
    lab.says("ready", 1);
    let said_since = |seen: usize| lines(&lab.output())[seen..].iter().map(ToString::to_string).collect::<Vec<_>>();
    run(&mut lab.dump(root.0, "saved", &["--leave-running"])).assert_done();
    lab.says("after 2 0", 1);
    assert_eq!(said_since(1), ["before 2", "before 1 True", "after 1 0", "after 2 0"]);
    // One refuses: what has run before it learns that nothing came of it.
    lab.touch("refuse");
    run(&mut lab.dump(root.0, "image", &[])).assert_error(FAILED, &[&pid, "hook", "refuses"]);
    lab.says("after 2 -1", 1);
    let said = said_since(5);
    let expected = ["before 2", "Exception: refused", "after 2 -1"];
    assert_eq!([&said[0], &said[said.len() - 2], &said[said.len() - 1]], expected, "{said:?}");
    let seen = lines(&lab.output()).len();
    fs::remove_file(lab.path().join("refuse")).unwrap();
    // One does not return.
    lab.touch("stay");
    run(&mut lab.dump(root.0, "image", &["--timeout", "2"])).assert_error(FAILED, &[&pid, "hooks", "--timeout"]);
    lab.says("before 2", 3);
    fs::remove_file(lab.path().join("stay")).unwrap();
    lab.says("after 2 -1", 2);
    assert_eq!(said_since(seen), ["before 2", "before 1 True", "after 1 -1", "after 2 -1"]);
    // ckpt is killed while it waits.
    lab.touch("stay");
    let mut dump = start(&mut lab.dump(root.0, "image", &[]));
    lab.says("before 2", 4);
    dump.child.kill().unwrap();
    end_of(&mut dump.child);
    fs::remove_file(lab.path().join("stay")).unwrap();
    lab.says("after 2 -1", 3);
    // And then all is as ever, but for those that were removed.
    lab.touch("end");
    lab.says("removed", 1);
    let seen = lines(&lab.output()).len();
    run(&mut lab.dump(root.0, "image", &[])).assert_done();
    drop(root);
    let stranger = Stranger::take(Pid(pid.parse().unwrap()), NOBODY);
    let _root = lab.restore("image");
    lab.says("after 1 1", 1);
    stranger.assert_untouched();
    assert_eq!(said_since(seen), ["before 1 True", "after 1 1"]);
}

/// A tree of three: a parent in a region now and then, a child with hooks of its own that is forked from one with hooks, and a
/// grandchild that has all of them saved.
const TREE: &str = r#"
import ckpt, os, sys, time
who = "parent"
@ckpt.before
def before():
    print(who, "before", flush=True)
@ckpt.after
def after(outcome):
    print(who, "after", outcome, flush=True)
if os.fork() == 0:
    who = "child"
    if os.fork() == 0:
        who = "grandchild"
        print(who, "now", ckpt.now("image"), ckpt.restored(), flush=True)
        os._exit(7)
    ckpt.after(after)
    print(who, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
    os._exit(8)
while True:
    with ckpt.uninterrupted():
        pid, status = os.waitpid(-1, os.WNOHANG)
    if pid:
        break
    time.sleep(0.0001)
print(who, os.waitstatus_to_exitcode(status), flush=True)
"#;

#[test]
fn all_programs_of_a_tree_are_asked_and_told() {
    let lab = Lab::new();
    let outcome = run(&mut lab.run(&[], &lab.python(TREE)));
    outcome.assert_done();
    let check = |before: usize, outcome: &str| {
        let output = lab.output().split_off(before);
        let mut said = lines(&output).iter().map(ToString::to_string).collect::<Vec<_>>();
        said.retain(|line| !line.ends_with("before"));
        said.sort();
        let mut expected = vec!["child 7".to_string(), "parent 8".into(), format!("parent after {outcome}")];
        expected.push(format!("grandchild now {outcome} {outcome}"));
        // The child may be too early for the ask.
        said.retain(|line| *line != format!("child after {outcome}"));
        expected.sort();
        assert_eq!(said, expected, "{output}");
    };
    check(0, "0");
    let before = lab.output().len();
    let stranger = Stranger::take(root_of(&outcome), NOBODY);
    run(&mut lab.ckpt(&["--backend", "preload", "restore", "-D", "image"])).assert_done();
    check(before, "1");
    stranger.assert_untouched();
}

/// What ckpt was asked for may come from anybody who can send to a socket.
#[test]
fn requests_of_others_are_not_granted() {
    let lab = Lab::new();
    let running = start(&mut lab.run(
        &["-D", "saved"],
        &lab.python("import os, time\nwhile not os.path.exists('end'):\n    time.sleep(0.001)\n"),
    ));
    let name = format!("ckpt-manager-{:08x}", running.child.id());
    let socket = std::os::unix::net::UnixDatagram::unbound().unwrap();
    use std::os::linux::net::SocketAddrExt;
    let address = std::os::unix::net::SocketAddr::from_abstract_name(name).unwrap();
    wait_until("it listens", || socket.connect_addr(&address).is_ok());
    // Nonsense; a request cut short; one from outside of the tree.
    let mut request = 0x636b_7074_6173_6b01u64.to_ne_bytes().to_vec();
    request.extend([1, 0, 0, 0]);
    for bytes in
        [&b"nonsense"[..], &[], &request, &[&request[..], &[9, 0, 0, 0]].concat(), &[&request[..], &[0; 4]].concat()]
    {
        socket.send(bytes).unwrap();
    }
    lab.touch("end");
    running.wait().assert_done();
    assert_eq!(names(&lab.path().join("saved")), [""; 0]);
}
