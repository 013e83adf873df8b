//! `--backend preload`: programs that have the shim from their start, and what is said where that cannot be.

mod common;

use std::fs;
use std::path::Path;

use ckpt_core::Pid;
use common::*;

fn preload<const N: usize>(arguments: [&str; N]) -> std::process::Command {
    let mut command = ckpt(["--backend", "preload"]);
    command.args(arguments);
    command
}

/// Ends what a test has started, whatever becomes of the test.
struct Ended(Pid);

impl Drop for Ended {
    fn drop(&mut self) {
        kill(self.0, libc::SIGKILL);
        wait_for(self.0, None);
    }
}

/// Starts a shell script in the background with the shim.
fn start_script(workshop: &Workshop, script: &str) -> Ended {
    let mut command = preload(["run", "-d", "-o", "output", "--", "/bin/bash", "-c", script]);
    adopt_orphans();
    let outcome = run(command.current_dir(workshop.path()));
    outcome.assert_done();
    Ended(Pid(outcome.out.trim().parse().unwrap()))
}

/// Counts, each number by another program.
const COUNT: &str = "n=0; while :; do /usr/bin/env echo $n; n=$((n+1)); /usr/bin/env sleep 0.01; done";

fn last_number(directory: &Path) -> u64 {
    let output = fs::read_to_string(directory.join("output")).unwrap_or_default();
    output.lines().next_back().and_then(|line| line.parse().ok()).unwrap_or(0)
}

fn numbers_are_in_order(directory: &Path) -> bool {
    let output = fs::read_to_string(directory.join("output")).unwrap();
    output.lines().enumerate().all(|(n, line)| line == n.to_string())
}

#[test]
fn a_shell_with_its_children_is_saved_and_brought_back() {
    let workshop = Workshop::new();
    let root = start_script(&workshop, COUNT);
    let pid = root.0.to_string();
    for round in 0..3 {
        let begun = last_number(workshop.path());
        wait_until("it counts", || last_number(workshop.path()) >= begun + 5);
        let image = workshop.path().join(format!("image-{round}"));
        let image = image.to_str().unwrap();
        run(preload(["dump", "-t", &pid, "-D", image]).current_dir(workshop.path())).assert_done();
        wait_for(root.0, None);
        let saved = last_number(workshop.path());
        run(preload(["restore", "-d", "-D", image]).current_dir(workshop.path())).assert_done();
        wait_until("it goes on", || last_number(workshop.path()) >= saved + 5);
    }
    assert!(numbers_are_in_order(workshop.path()));
}

#[test]
fn nothing_of_the_shim_is_to_be_seen() {
    let workshop = Workshop::new();
    let script = "ls /proc/$$/fd >fds; env >environment; cat /proc/$$/maps >maps; while :; do sleep 1; done";
    let _root = start_script(&workshop, script);
    let read = |name: &str| fs::read_to_string(workshop.path().join(name)).unwrap_or_default();
    wait_until("it has looked", || read("maps").contains("[stack]"));
    assert_eq!(read("fds").split_whitespace().collect::<Vec<_>>(), ["0", "1", "2"]);
    for word in ["CKPT_SHIM_FD", "LD_PRELOAD"] {
        assert!(!read("environment").contains(word), "{}", read("environment"));
    }
    assert!(!read("maps").contains("memfd") && !read("maps").contains("ckpt"), "{}", read("maps"));
}

#[test]
fn a_program_without_the_shim_says_how_to_start_it() {
    let workshop = Workshop::new();
    let subject = Subject::start(&workshop);
    let pid = subject.pid.to_string();
    let image = workshop.image();
    run(&mut preload(["dump", "-t", &pid, "-D", image.to_str().unwrap()]))
        .assert_error(REFUSED, &["shim", "ckpt run --backend preload"]);
    workshop.assert_no_image();
    subject.assert_unharmed();
}

#[test]
fn a_stopped_program_is_refused_and_stays_stopped() {
    let workshop = Workshop::new();
    let root = start_script(&workshop, COUNT);
    wait_until("it counts", || last_number(workshop.path()) >= 1);
    kill(root.0, libc::SIGSTOP);
    let state = || ckpt_core::procfs::ProcDir::open(root.0).unwrap().stat_line().unwrap().state;
    wait_until("it is stopped", || state() == 'T');
    let image = workshop.image();
    run(&mut preload(["dump", "-t", &root.0.to_string(), "-D", image.to_str().unwrap()]))
        .assert_error(REFUSED, &["stopped", "kill -CONT"]);
    assert_eq!(state(), 'T');
}

/// exit(0)
const EXITS: &[u8] = &[0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05];
/// pause()
const WAITS: &[u8] = &[0xb8, 34, 0, 0, 0, 0x0f, 0x05];

/// An ELF file without an interpreter: what a statically linked program is, as far as the kernel and the shim care.
fn write_static_program(path: &Path, code: &[u8]) {
    use std::os::unix::fs::PermissionsExt;
    let mut elf = vec![0u8; 120];
    elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    // Type, machine, version, entry, program headers at 64, sizes, count.
    elf[16..20].copy_from_slice(&[2, 0, 62, 0]);
    elf[20] = 1;
    elf[24..32].copy_from_slice(&0x40_0078u64.to_le_bytes());
    elf[32] = 64;
    elf[52..58].copy_from_slice(&[64, 0, 56, 0, 1, 0]);
    // PT_LOAD, readable and executable, the whole file.
    elf[64] = 1;
    elf[68] = 5;
    elf[80..88].copy_from_slice(&0x40_0000u64.to_le_bytes());
    elf.extend(code);
    let size = (elf.len() as u64).to_le_bytes();
    elf[96..104].copy_from_slice(&size);
    elf[104..112].copy_from_slice(&size);
    elf[112..114].copy_from_slice(&[0, 0x10]);
    fs::write(path, elf).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn a_static_program_is_not_started_and_one_in_the_tree_is_named() {
    let workshop = Workshop::new();
    let program = workshop.path().join("static");
    write_static_program(&program, EXITS);
    assert!(std::process::Command::new(&program).status().unwrap().success(), "it is a program");
    let program = program.to_str().unwrap();
    run(preload(["run", "--", program]).current_dir(workshop.path())).assert_error(FAILED, &["statically linked"]);
    let mut command = preload(["run", "-o", "output", "--", "/bin/bash", "-c", "\"$0\"; echo $?", program]);
    run(command.current_dir(workshop.path())).assert_done();
    let output = fs::read_to_string(workshop.path().join("output")).unwrap();
    assert!(output.contains(&format!("{program} is statically linked: it runs unprotected")), "{output}");
    assert!(output.ends_with("0\n"), "{output}");
}

/// Starts the program that it is given in every way there is, one after the other.
const ALL_WAYS: &str = r#"
import ctypes, os, subprocess, sys
program = sys.argv[1]
directory, name = os.path.split(program)
os.environ["PATH"] = "/nowhere:" + directory
libc = ctypes.CDLL(None, use_errno=True)
def strings(*values):
    return (ctypes.c_char_p * (len(values) + 1))(*[value.encode() for value in values], None)
def in_child(start):
    pid = os.fork()
    if pid == 0:
        try:
            start()
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]
def spawned(pid):
    return os.waitpid(pid, 0)[1]
ways = {
    "execv": lambda: in_child(lambda: os.execv(program, [program])),
    "execve": lambda: in_child(lambda: os.execve(program, [program], {})),
    "execvp": lambda: in_child(lambda: libc.execvp(name.encode(), strings(name))),
    "execlp": lambda: in_child(lambda: libc.execlp(name.encode(), name.encode(), None)),
    "execl": lambda: in_child(lambda: libc.execl(program.encode(), name.encode(), None)),
    "fexecve": lambda: in_child(lambda: os.execve(os.open(program, os.O_RDONLY), [program], {"A": "B"})),
    "execveat": lambda: in_child(lambda: libc.execveat(os.open(directory, os.O_RDONLY), name.encode(), strings(name), strings("A=B"), 0)),
    "execve by number": lambda: in_child(lambda: libc.syscall(59, program.encode(), strings(name), strings("A=B"))),
    "posix_spawn": lambda: spawned(os.posix_spawn(program, [program], {})),
    "posix_spawnp": lambda: spawned(os.posix_spawnp(name, [name], {"C": "D"})),
    "subprocess": lambda: subprocess.run([program]).returncode,
    "system": lambda: os.system(program),
    "popen": lambda: os.popen(program).close() or 0,
}
for way, start in ways.items():
    status = start()
    print("way", way, status, flush=True)
"#;

#[test]
fn a_static_program_is_named_in_whichever_way_it_is_started() {
    let workshop = Workshop::new();
    let program = workshop.path().join("a-static-program");
    write_static_program(&program, EXITS);
    let program = program.to_str().unwrap();
    let mut command = preload(["run", "-o", "output", "--", "/usr/bin/python3", "-c", ALL_WAYS, program]);
    run(command.current_dir(workshop.path())).assert_done();
    let output = fs::read_to_string(workshop.path().join("output")).unwrap();
    let said =
        format!("ckpt: {program} is statically linked: it runs unprotected, and a dump is refused as long as it runs");
    let mut lines = output.lines();
    let mut ways = 0;
    // Each way says it once, and then the status that the program ended with.
    while let Some(line) = lines.next() {
        let way = lines.next().unwrap_or_default();
        assert!(line == said && way.starts_with("way ") && way.ends_with(" 0"), "{line:?}, {way:?} in {output}");
        ways += 1;
    }
    assert_eq!(ways, 13, "{output}");
}

#[test]
fn a_tree_with_a_static_program_is_refused_as_long_as_that_runs() {
    let workshop = Workshop::new();
    let program = workshop.path().join("waits");
    write_static_program(&program, WAITS);
    let script = format!("{} & echo $! >waiting; {COUNT}", program.display());
    let root = start_script(&workshop, &script);
    wait_until("it counts", || last_number(workshop.path()) >= 1);
    let (pid, image) = (root.0.to_string(), workshop.image());
    let image = image.to_str().unwrap();
    let mut dump = preload(["dump", "-t", &pid, "-D", image, "--leave-running"]);
    run(&mut dump).assert_error(REFUSED, &["waits", "without the shim", "statically linked"]);
    workshop.assert_no_image();
    let begun = last_number(workshop.path());
    wait_until("it goes on", || last_number(workshop.path()) > begun);
    let waiting = fs::read_to_string(workshop.path().join("waiting")).unwrap();
    kill(Pid(waiting.trim().parse().unwrap()), libc::SIGKILL);
    wait_until("it is gone", || !Path::new(&format!("/proc/{}", waiting.trim())).exists());
    run(&mut dump).assert_done();
    let begun = last_number(workshop.path());
    wait_until("it goes on", || last_number(workshop.path()) > begun);
}

/// Starts a Python program in the background with the shim.
fn start_python(workshop: &Workshop, program: &str) -> Ended {
    let mut command = preload(["run", "-d", "-o", "output", "--", "/usr/bin/python3", "-c", program]);
    adopt_orphans();
    let outcome = run(command.current_dir(workshop.path()));
    outcome.assert_done();
    Ended(Pid(outcome.out.trim().parse().unwrap()))
}

fn says(workshop: &Workshop, word: &str) {
    wait_until(word, || fs::read_to_string(workshop.path().join("output")).unwrap_or_default().contains(word));
}

/// By a system call instruction of its own: neither libc nor the shim has a say in it.
const BLOCKS_ALL: &str = r#"
import ctypes, mmap, os, struct, time
code = mmap.mmap(-1, 4096, prot=7)
mask = ctypes.c_uint64(0xffffffffffffffff)
# rt_sigprocmask(SIG_SETMASK, &mask, NULL, 8)
code.write(b"\x48\xbe" + struct.pack("<Q", ctypes.addressof(mask)) +
    b"\xbf\x02\0\0\0\x31\xd2\x41\xba\x08\0\0\0\xb8\x0e\0\0\0\x0f\x05\xc3")
call = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
if call() == 0:
    print("blocked", flush=True)
while not os.path.exists("let-in"):
    time.sleep(0.001)
mask.value = 0
call()
print("let in", flush=True)
while True:
    time.sleep(0.001)
"#;

#[test]
fn a_thread_that_blocks_every_signal_is_named() {
    let workshop = Workshop::new();
    let root = start_python(&workshop, BLOCKS_ALL);
    says(&workshop, "blocked");
    let (pid, image) = (root.0.to_string(), workshop.image());
    let mut dump = preload(["dump", "-t", &pid, "--timeout", "0.3", "--leave-running", "-D", image.to_str().unwrap()]);
    run(&mut dump).assert_error(REFUSED, &["thread", &pid, "blocks every signal"]);
    workshop.assert_no_image();
    // What was asked in vain does not come back to it when it lets signals in.
    fs::write(workshop.path().join("let-in"), "").unwrap();
    says(&workshop, "let in");
    run(&mut dump).assert_done();
}

/// Naps by a system call instruction before which nothing tells what is called: the number came in a register that is in use
/// for something else by then.
const NAPS: &str = r#"
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
# mov rax, rdi; mov rdi, rsi; mov rsi, rdx; mov rdx, rcx; mov r10, r8; syscall; ret
code.write(bytes.fromhex("4889f8 4889f7 4889d6 4889ca 4d89c2 0f05 c3"))
address = ctypes.addressof(ctypes.c_char.from_buffer(code))
call = ctypes.CFUNCTYPE(ctypes.c_long, *[ctypes.c_long] * 5)(address)
word = ctypes.c_int(0)
nap = (ctypes.c_long * 2)(0, 100_000)
print("naps", flush=True)
while True:
    # futex(&word, FUTEX_WAIT, 0, &nap)
    call(202, ctypes.addressof(word), 0, 0, ctypes.addressof(nap))
"#;

/// The kernel shows which call a thread sleeps in, but not which it was interrupted in. Such dumps were refused when the
/// thread happened not to sleep when it was looked at, with the advice to try again.
#[test]
fn a_call_that_its_code_does_not_tell_is_known_all_the_same() {
    let workshop = Workshop::new();
    let root = start_python(&workshop, NAPS);
    says(&workshop, "naps");
    let pid = root.0.to_string();
    for round in 0..30 {
        let image = workshop.path().join(format!("image-{round}"));
        run(&mut preload(["dump", "-t", &pid, "--leave-running", "-D", image.to_str().unwrap()])).assert_done();
    }
}

/// posix_spawn waits for its child in the kernel, without a signal being able to change that.
const HANGS: &str = r#"
import os, time
os.mkfifo("fifo")
print("hangs", flush=True)
pid = os.posix_spawn("/bin/true", ["true"], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 0, "fifo", os.O_RDONLY, 0)])
print("status", os.waitpid(pid, 0)[1], flush=True)
while True:
    time.sleep(0.001)
"#;

#[test]
fn a_hung_call_is_named_when_the_time_is_over() {
    let workshop = Workshop::new();
    let root = start_python(&workshop, HANGS);
    says(&workshop, "hangs");
    let proc = ckpt_core::procfs::ProcDir::open(root.0).unwrap();
    wait_until("it hangs", || !proc.children().unwrap().is_empty() && proc.stat_line().unwrap().state == 'D');
    let (pid, image) = (root.0.to_string(), workshop.image());
    let mut dump = preload(["dump", "-t", &pid, "--timeout", "0.3", "--leave-running", "-D", image.to_str().unwrap()]);
    run(&mut dump).assert_error(FAILED, &[&pid, "did not stop", "state D", "--timeout"]);
    workshop.assert_no_image();
    drop(fs::OpenOptions::new().write(true).open(workshop.path().join("fifo")).unwrap());
    says(&workshop, "status 0");
    fs::remove_file(workshop.path().join("fifo")).unwrap();
    run(&mut dump).assert_done();
}

/// Another version of the shim is made from this one: the number that tells them apart stands in its code.
#[test]
fn a_shim_of_another_version_is_named() {
    let workshop = Workshop::new();
    let mut program = fs::read(CKPT).unwrap();
    // `protocol::MAGIC` without its last byte, the version.
    let places: Vec<usize> =
        program.windows(8).enumerate().filter(|(_, word)| word[1..] == *b"mhstpkc").map(|(at, _)| at).collect();
    assert!(places.len() >= 2, "in the shim and in the driver");
    for at in places {
        program[at] = 0x7f;
    }
    let other = workshop.path().join("other-ckpt");
    fs::write(&other, program).unwrap();
    fs::set_permissions(&other, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut command = std::process::Command::new(&other);
    command.args(["--backend", "preload", "run", "-d", "-o", "output", "--", "/bin/bash", "-c", COUNT]);
    adopt_orphans();
    let outcome = run(command.current_dir(workshop.path()).stdin(std::process::Stdio::null()));
    outcome.assert_done();
    let root = Ended(Pid(outcome.out.trim().parse().unwrap()));
    wait_until("it counts", || last_number(workshop.path()) >= 1);
    let (pid, image) = (root.0.to_string(), workshop.image());
    let arguments = ["dump", "-t", &pid, "--leave-running", "-D", image.to_str().unwrap()];
    run(&mut preload(arguments)).assert_error(REFUSED, &[&pid, "shim of another version"]);
    workshop.assert_no_image();
    let begun = last_number(workshop.path());
    wait_until("it goes on", || last_number(workshop.path()) > begun);
    run(std::process::Command::new(&other).args(["--backend", "preload"]).args(arguments)).assert_done();
    assert!(numbers_are_in_order(workshop.path()));
}

#[test]
fn a_killed_dump_leaves_the_program_as_it_was() {
    let workshop = Workshop::new();
    let root = start_script(&workshop, COUNT);
    wait_until("it counts", || last_number(workshop.path()) >= 1);
    let pid = root.0.to_string();
    let mut killed = 0;
    for trial in 0..60u64 {
        let image = workshop.path().join("image");
        let _ = fs::remove_dir_all(&image);
        let mut dump = preload(["dump", "-t", &pid, "--leave-running", "-D", image.to_str().unwrap()]);
        let mut dump = dump.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
        // Spread over the time that one takes; which instant it hits does not matter, that it hits some does.
        std::thread::sleep(std::time::Duration::from_micros(500 * (trial % 30)));
        let _ = dump.kill();
        killed += u32::from(!dump.wait().unwrap().success());
        let begun = last_number(workshop.path());
        wait_until("it goes on", || last_number(workshop.path()) > begun);
    }
    assert!(killed >= 10, "only {killed} dumps were killed before they were done");
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    assert!(!maps.contains("ckpt-agent"), "{maps}");
    assert_eq!(names(Path::new(&format!("/proc/{pid}/fd"))), ["0", "1", "2"]);
    assert!(numbers_are_in_order(workshop.path()));
}

/// Three loops that start programs and wait for them, and nothing else.
/// Each loop goes on until it is told, or until its directory is gone with the test.
const STORM: &str = "for n in 1 2 3; do (while [ -e output -a ! -e over ]; do /bin/true || exit 1; \
    (exit 3); [ $? = 3 ] || exit 1; [ \"$(/usr/bin/env echo $n)\" = $n ] || exit 1; echo $n; done) & done; wait";

#[test]
fn a_storm_of_programs_is_dumped_or_refused_and_never_harmed() {
    let workshop = Workshop::new();
    let root = start_script(&workshop, STORM);
    let lines = || fs::read_to_string(workshop.path().join("output")).unwrap_or_default();
    let of_each = || ["1", "2", "3"].map(|n| lines().lines().filter(|line| *line == n).count());
    wait_until("all loops go", || of_each().iter().all(|count| *count > 2));
    let (pid, image) = (root.0.to_string(), workshop.image());
    let mut done = 0;
    for _ in 0..40 {
        let outcome = run(&mut preload(["dump", "-t", &pid, "--leave-running", "-D", image.to_str().unwrap()]));
        if outcome.code() == Some(DONE) {
            done += 1;
            fs::remove_dir_all(&image).unwrap();
        } else {
            assert!(matches!(outcome.code(), Some(FAILED | REFUSED)), "{outcome:#?}");
            assert_eq!(outcome.errors.len(), 1, "{outcome:#?}");
            assert!(!outcome.errors[0].contains("a bug in ckpt"), "{outcome:#?}");
        }
        workshop.assert_no_image();
    }
    assert!(done > 0, "not one dump of 40 was done");
    let before = of_each();
    wait_until("all loops go on", || of_each().iter().zip(before).all(|(now, before)| *now > before + 2));
    fs::write(workshop.path().join("over"), "").unwrap();
    assert_eq!(wait_for(root.0, None), Some(0));
    std::mem::forget(root);
    assert!(lines().lines().all(|line| ["1", "2", "3"].contains(&line)), "{}", lines());
}

/// Fills a file system again and again, and reads back what it could write.
const FILLS: &str = r#"
import errno, os
full = 0
block = bytes(range(256)) * 16
while not os.path.exists("over"):
    fd = os.open("mounted/file", os.O_CREAT | os.O_RDWR | os.O_TRUNC)
    written = 0
    while True:
        try:
            written += os.write(fd, block)
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
            break
    for n in range(300):
        try:
            os.write(fd, block)
            assert False, "it is not full any more"
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
    assert os.fstat(fd).st_size == written >= 200000, written
    assert os.pread(fd, written, 0) == (block * (written // 4096 + 1))[:written]
    os.close(fd)
    full += 1
    print("full", full, flush=True)
print("all is well", flush=True)
"#;

#[test]
fn a_full_disk_of_the_programs_own_stays_full() {
    let workshop = Workshop::new();
    let mounted = mount(&workshop, "mounted", "size=256k", nix::mount::MsFlags::empty());
    let root = start_python(&workshop, FILLS);
    let output = || fs::read_to_string(workshop.path().join("output")).unwrap_or_default();
    let pid = root.0.to_string();
    for round in 0..3 {
        let before = output().lines().count();
        wait_until("it fills the disk", || output().lines().count() > before + 2);
        let image = workshop.path().join(format!("image-{round}"));
        let image = image.to_str().unwrap();
        run(preload(["dump", "-t", &pid, "-D", image]).current_dir(workshop.path())).assert_done();
        wait_for(root.0, None);
        run(preload(["restore", "-d", "-D", image]).current_dir(workshop.path())).assert_done();
    }
    let before = output().lines().count();
    wait_until("it goes on", || output().lines().count() > before + 2);
    fs::write(workshop.path().join("over"), "").unwrap();
    let status = wait_for(root.0, None);
    nix::mount::umount(&mounted).unwrap();
    assert!(output().ends_with("all is well\n") && status == Some(0), "{status:?}: {}", output());
    // It has ended; there is nothing to end any more.
    std::mem::forget(root);
}

#[test]
fn who_asks_and_is_gone_changes_nothing() {
    let workshop = Workshop::new();
    let root = start_script(&workshop, COUNT);
    wait_until("it counts", || last_number(workshop.path()) >= 1);
    // As `protocol::signal_value` has it, of a socket that nobody listens at.
    const TAG: u64 = 0xc4b7 << 48;
    for asked in 0..100u64 {
        let mut info = [0u64; 16];
        // struct siginfo: signal and errno, code SI_QUEUE, sender, value
        (info[0], info[1], info[3]) = (32, 0xffff_ffff, TAG | (0x1234_0000 + asked));
        // SAFETY: a siginfo of ours.
        unsafe { libc::syscall(libc::SYS_rt_sigqueueinfo, root.0.0, 32, info.as_ptr()) };
    }
    let begun = last_number(workshop.path());
    wait_until("it goes on", || last_number(workshop.path()) > begun + 3);
    assert_eq!(names(Path::new(&format!("/proc/{}/fd", root.0))), ["0", "1", "2"]);
    let (pid, image) = (root.0.to_string(), workshop.image());
    run(&mut preload(["dump", "-t", &pid, "--leave-running", "-D", image.to_str().unwrap()])).assert_done();
    assert!(numbers_are_in_order(workshop.path()));
}
