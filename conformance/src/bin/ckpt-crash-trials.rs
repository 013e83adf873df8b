//! Kills `ckpt` at random instants while it works on a program of many threads that check themselves all the time.
//!
//! A killed `ckpt dump --leave-running` must leave the program as it was: going on, neither traced nor stopped, with its
//! mappings and descriptors, and no copy of it. A killed `ckpt restore` must leave nothing, or, if it had let the tree go already, all
//! of it running rightly. Everything happens in namespaces of its own ([`isolation`]).

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant, SystemTime};

use ckpt_conformance::case::{GO, OUTPUT, READY, VERDICT};
use ckpt_conformance::isolation;
use ckpt_conformance::visible::{Visible, numbers};
use ckpt_conformance::worker::{BOARD, Board, WINDOW};
use ckpt_core::{Backend, registry};

const USAGE: &str =
    "usage: ckpt-crash-trials [--backend NAME] [--trials N] [--restore-trials N] [--seed N] [--ckpt FILE]

Kills ckpt in N dumps and, unless said otherwise, in as many restores. --backend is ptrace, or another that does both;
--ckpt is the program, else the one beside this.";

/// For what must happen at once, on a machine that may be busy.
const DEADLINE: Duration = Duration::from_secs(20);
/// For what is ours to go from a program that goes on.
const LEFT_DEADLINE: Duration = Duration::from_secs(2);
/// How a failure begins that is no more than something of ours left in a program that goes on.
const LEFT: &str = "it goes on, but something was left in it: ";
/// One program lives through so many trials, and then gives its own verdict.
const TRIALS_PER_PROGRAM: usize = 50;
/// Complete runs that tell how long one takes.
const MEASURED: usize = 9;

struct Options {
    trials: usize,
    restore_trials: usize,
    seed: u64,
    backend: &'static Backend,
    ckpt: PathBuf,
    subject: PathBuf,
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(message) => {
            eprintln!("{message}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let total = Duration::from_secs(120) + Duration::from_secs(2) * (options.trials + options.restore_trials) as u32;
    let result = isolation::run(total, || match all(&options) {
        Ok(true) => 0,
        Ok(false) => 1,
        Err(failure) => {
            println!("crash trials: {failure}");
            1
        }
    });
    match result {
        Ok(Some(0)) => ExitCode::SUCCESS,
        Ok(Some(_)) => ExitCode::FAILURE,
        Ok(None) => {
            println!("crash trials: they did not end within {} s", total.as_secs());
            ExitCode::FAILURE
        }
        Err(error) => {
            println!("crash trials: no namespaces of our own: {error}");
            ExitCode::FAILURE
        }
    }
}

fn options() -> Result<Options, String> {
    let beside = |name: &str| {
        let own = std::env::current_exe().map_err(|error| error.to_string())?;
        Ok::<_, String>(own.with_file_name(name))
    };
    let (mut trials, mut restore_trials, mut seed, mut ckpt) = (60, None, None, beside("ckpt")?);
    let mut backend = "ptrace".to_string();
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or(format!("{name} needs a value"))?;
        let number = || value.parse::<u64>().map_err(|_| format!("{name} {value}: not a number"));
        match name.as_str() {
            "--trials" => trials = number()? as usize,
            "--restore-trials" => restore_trials = Some(number()? as usize),
            "--seed" => seed = Some(number()?),
            "--backend" => backend = value,
            "--ckpt" => ckpt = PathBuf::from(value),
            _ => return Err(format!("there is no option {name}")),
        }
    }
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |time| time.as_nanos() as u64);
    Ok(Options {
        trials,
        restore_trials: restore_trials.unwrap_or(trials),
        seed: seed.unwrap_or_else(now) | 1,
        backend: registry::backend(&backend)
            .map_err(|known| format!("there is no backend {backend}, but: {}", known.join(", ")))?,
        ckpt: fs::canonicalize(&ckpt).map_err(|error| format!("{}: {error}", ckpt.display()))?,
        subject: beside("ckpt-subject")?,
    })
}

/// A xorshift generator: the same seed gives the same instants.
struct Random(u64);

impl Random {
    /// Uniform over 0 to `limit`.
    fn within(&mut self, limit: Duration) -> Duration {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        limit.mul_f64((self.0 >> 11) as f64 / (1_u64 << 53) as f64)
    }
}

/// Whether every trial ended as it should.
fn all(options: &Options) -> Result<bool, String> {
    println!("crash trials: {}, seed {}", options.backend.name, options.seed);
    let mut random = Random(options.seed);
    let dumps = dump_trials(options, &mut random)?;
    dumps.print("dump", "the program went on");
    let restores = restore_trials(options, &mut random)?;
    restores.print("restore", "nothing was left, or all of it ran");
    Ok(dumps.is_right() && restores.is_right())
}

/// What came of the trials of one kind.
struct Tally {
    wanted: usize,
    right: usize,
    failures: Vec<String>,
    longest: Duration,
    /// Kills by the tenth of `longest` they came in.
    tenths: [usize; 10],
    /// Of the right ones, those in which a descriptor or a mapping of ckpt stayed.
    left: usize,
    /// Runs that were done before their instant came: they count for nothing.
    too_late: usize,
    remark: String,
}

impl Tally {
    fn new(wanted: usize, longest: Duration) -> Tally {
        Tally {
            wanted,
            right: 0,
            left: 0,
            failures: vec![],
            longest,
            tenths: [0; 10],
            too_late: 0,
            remark: String::new(),
        }
    }

    fn count(&mut self, instant: Duration, result: Result<(), String>) {
        let tenth = (instant.as_secs_f64() / self.longest.as_secs_f64() * 10.0) as usize;
        self.tenths[tenth.min(9)] += 1;
        match result {
            Ok(()) => self.right += 1,
            // It goes on, neither stopped nor corrupted: that is what is promised. What is left in it is told apart.
            Err(remains) if remains.starts_with(LEFT) => {
                println!("killed after {instant:?}: {remains}");
                self.right += 1;
                self.left += 1;
            }
            Err(failure) => {
                println!("killed after {instant:?}: {failure}");
                self.failures.push(failure);
            }
        }
    }

    fn done(&self) -> usize {
        self.right + self.failures.len()
    }

    fn is_right(&self) -> bool {
        self.done() == self.wanted && self.failures.is_empty()
    }

    fn print(&self, what: &str, right: &str) {
        println!(
            "crash trials: {what}: {} of {}: {right}{}; in {} of these something of ckpt was left in it (killed within {:.1} ms, by tenths {:?}; {} were done before)",
            self.right,
            self.wanted,
            self.remark,
            self.left,
            self.longest.as_secs_f64() * 1e3,
            self.tenths,
            self.too_late,
        );
    }
}

/// The program under test, a child of ours (or restored, and then ours by adoption).
struct Program {
    dir: tempfile::TempDir,
    root: i32,
    board: &'static Board,
    /// How it looks from outside.
    looks: Visible,
}

impl Program {
    fn start(options: &Options) -> Result<Program, String> {
        let fail = |error: std::io::Error| format!("starting the program: {error}");
        let dir = tempfile::Builder::new().prefix("ckpt-crash-").tempdir().map_err(fail)?;
        fs::set_permissions(dir.path(), Permissions::from_mode(0o777)).map_err(fail)?;
        let output = File::create(dir.path().join(OUTPUT)).map_err(fail)?;
        let mut command = Command::new(&options.subject);
        command.arg("programs/worker").current_dir(dir.path()).stdin(Stdio::null());
        command.stdout(output.try_clone().map_err(fail)?).stderr(output);
        // SAFETY: setsid(2) is async-signal-safe.
        unsafe { command.pre_exec(|| Ok(nix::unistd::setsid().map(drop)?)) };
        if let Some(launcher) = options.backend.launcher {
            launcher(&mut command).map_err(fail)?;
        }
        let root = command.spawn().map_err(fail)?.id() as i32;
        let board = Board::open(dir.path()).map_err(fail)?;
        wait_for("the program to be ready", || dir.path().join(READY).exists())?;
        let looks = look(root);
        Ok(Program { dir, root, board, looks })
    }

    /// It goes on: every thread, untraced, not stopped, looking as before.
    fn goes_on(&self) -> Result<(), String> {
        let task = PathBuf::from(format!("/proc/{}/task", self.root));
        let begin = Instant::now();
        let before = self.board.counts();
        loop {
            if self.board.failed.load(SeqCst) != 0 {
                // It ends by itself then, and says what it found.
                let _ = wait_for("its verdict", || {
                    fs::read_to_string(self.path(VERDICT)).is_ok_and(|said| !said.is_empty())
                });
                let verdict = fs::read_to_string(self.path(VERDICT)).unwrap_or_default();
                return Err(format!("the program found itself corrupted: {verdict} {}", self.output()));
            }
            let counts = self.board.counts();
            let still: Vec<usize> = (0..counts.len()).filter(|&index| counts[index] <= before[index]).collect();
            let traced: Vec<String> = numbers(&task).iter().filter_map(|tid| hindrance(&task, *tid)).collect();
            let differences = self.looks.difference(&look(self.root));
            // A copy of it that has written its memory ends with ckpt, if not at once.
            reap();
            let mut others = processes();
            others.remove(&self.root);
            if still.is_empty() && traced.is_empty() && others.is_empty() {
                if differences.is_empty() {
                    return Ok(());
                }
                // What was ours goes when its last user has gone: a moment later, or never.
                if begin.elapsed() > LEFT_DEADLINE {
                    return Err(format!("{LEFT}{}", differences.join("\n")));
                }
            }
            if !task.exists() || begin.elapsed() > DEADLINE {
                return Err(format!(
                    "threads that stand still: {still:?}; {traced:?}; other processes: {others:?}; {}\n{}",
                    differences.join("\n"),
                    self.output()
                ));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Tells it to end, and takes its own verdict.
    fn verdict(&self) -> Result<(), String> {
        File::create(self.dir.path().join(GO)).map_err(|error| error.to_string())?;
        wait_for("the program to end", || reap().contains(&self.root) || !exists(self.root))?;
        let verdict = fs::read_to_string(self.dir.path().join(VERDICT)).unwrap_or_else(|_| "no verdict".into());
        if verdict == "pass" { Ok(()) } else { Err(format!("its own verdict: {verdict}\n{}", self.output())) }
    }

    fn output(&self) -> String {
        fs::read_to_string(self.dir.path().join(OUTPUT)).unwrap_or_default()
    }

    fn end(&self) {
        // SAFETY: a process that we started, or its restored self, and have not waited for.
        unsafe { libc::kill(self.root, libc::SIGKILL) };
        let _ = wait_for("the program to be gone", || {
            reap();
            !exists(self.root)
        });
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

fn look(root: i32) -> Visible {
    Visible::look(&BTreeSet::from([root])).outside(WINDOW)
}

/// Why a thread cannot go on, if so.
fn hindrance(task: &Path, tid: i32) -> Option<String> {
    let status = fs::read_to_string(task.join(format!("{tid}/status"))).ok()?;
    let value = |name: &str| status.lines().find_map(|line| Some(line.strip_prefix(name)?.trim().to_string()));
    let (state, tracer) = (value("State:")?, value("TracerPid:")?);
    let hindered = tracer != "0" || state.starts_with(['T', 't', 'Z']);
    hindered.then(|| format!("thread {tid}: {state}, traced by {tracer}"))
}

fn exists(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// Waits for all children that have ended; their pids.
fn reap() -> Vec<i32> {
    let mut ended = Vec::new();
    loop {
        let mut status = 0;
        // SAFETY: waitpid writes to an integer of ours.
        let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
        if pid <= 0 {
            return ended;
        }
        ended.push(pid);
    }
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) -> Result<(), String> {
    let begin = Instant::now();
    while !condition() {
        if begin.elapsed() > DEADLINE {
            return Err(format!("waited {} s for {what}", DEADLINE.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn spawn(options: &Options, arguments: &[&str], log: &Path) -> Result<Child, String> {
    let log = File::options().create(true).append(true).open(log).map_err(|error| error.to_string())?;
    let mut command = Command::new(&options.ckpt);
    command.args(["--quiet", "--backend", options.backend.name]).args(arguments).stdin(Stdio::null());
    command.stdout(log.try_clone().map_err(|error| error.to_string())?).stderr(log);
    command.spawn().map_err(|error| format!("{}: {error}", options.ckpt.display()))
}

/// Runs `ckpt` to its end, which must be good; how long it took.
fn run(options: &Options, arguments: &[&str], log: &Path) -> Result<Duration, String> {
    let begin = Instant::now();
    let status = spawn(options, arguments, log)?.wait().map_err(|error| error.to_string())?;
    let took = begin.elapsed();
    if status.success() {
        return Ok(took);
    }
    let said = fs::read_to_string(log).unwrap_or_default();
    Err(format!("ckpt {} ended with {status}: {said}", arguments.join(" ")))
}

/// Runs `ckpt` and kills it after `instant`. False if it was done before.
fn run_and_kill(options: &Options, arguments: &[&str], log: &Path, instant: Duration) -> Result<bool, String> {
    let begin = Instant::now();
    let mut child = spawn(options, arguments, log)?;
    if let Some(rest) = instant.checked_sub(begin.elapsed()) {
        std::thread::sleep(rest);
    }
    child.kill().map_err(|error| error.to_string())?;
    let status = child.wait().map_err(|error| error.to_string())?;
    let killed = std::os::unix::process::ExitStatusExt::signal(&status) == Some(libc::SIGKILL);
    if killed || status.success() {
        return Ok(killed);
    }
    let said = fs::read_to_string(log).unwrap_or_default();
    Err(format!("ckpt {} ended with {status}: {said}", arguments.join(" ")))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in a temporary directory")
}

fn dump_trials(options: &Options, random: &mut Random) -> Result<Tally, String> {
    let mut program = Program::start(options)?;
    // A directory of its own for each dump takes along what a killed one leaves in its temporary place.
    let dump = |program: &Program, killed_after: Option<Duration>| {
        let place = program.path("dumps");
        fs::create_dir_all(&place).map_err(|error| error.to_string())?;
        let (root, image, log) = (program.root.to_string(), place.join("image"), program.path("ckpt.log"));
        let arguments = ["dump", "-t", &root, "-D", text(&image), "--leave-running"];
        let result = match killed_after {
            None => run(options, &arguments, &log).map(|took| (false, took)),
            Some(instant) => run_and_kill(options, &arguments, &log, instant).map(|killed| (killed, instant)),
        };
        fs::remove_dir_all(&place).map_err(|error| error.to_string())?;
        result
    };
    let mut took = Vec::new();
    for _ in 0..MEASURED {
        took.push(dump(&program, None)?.1);
        program.goes_on()?;
    }
    let longest = whole_length(took);
    let mut tally = Tally::new(options.trials, longest);
    let mut of_this_program = 0;
    while tally.done() < tally.wanted {
        let instant = random.within(longest);
        match dump(&program, Some(instant)) {
            Ok((false, _)) => tally.too_late += 1,
            killed => {
                let result = killed.and_then(|_| program.goes_on());
                of_this_program += 1;
                let hurt = result.is_err();
                let last = of_this_program == TRIALS_PER_PROGRAM || tally.done() + 1 == tally.wanted;
                let result = if last { result.and_then(|()| program.verdict()) } else { result };
                tally.count(instant, result);
                if hurt || last {
                    program.end();
                    program = Program::start(options)?;
                    of_this_program = 0;
                }
            }
        }
        if tally.too_late > 10 * tally.wanted + 100 {
            return Err("the dumps are done before they can be killed".into());
        }
    }
    program.end();
    Ok(tally)
}

fn restore_trials(options: &Options, random: &mut Random) -> Result<Tally, String> {
    let program = Program::start(options)?;
    let (root, image, log) = (program.root.to_string(), program.path("image"), program.path("ckpt.log"));
    run(options, &["dump", "-t", &root, "-D", text(&image)], &log)?;
    let restore = ["restore", "-D", text(&image), "--detach"];
    wait_for("the program to be gone", || {
        reap();
        !exists(program.root)
    })?;
    // The board is memory and file at once: a restore wants it as it was at the dump.
    let board = BoardAtDump::keep(&program.path(BOARD))?;
    let mut took = Vec::new();
    for _ in 0..MEASURED {
        board.put_back()?;
        took.push(run(options, &restore, &log)?);
        program.goes_on()?;
        program.end();
    }
    let longest = whole_length(took);
    let mut tally = Tally::new(options.restore_trials, longest);
    let (mut gone, mut running) = (0, 0);
    while tally.done() < tally.wanted {
        let instant = random.within(longest);
        board.put_back()?;
        match run_and_kill(options, &restore, &log, instant) {
            Ok(false) => {
                tally.too_late += 1;
                program.end();
            }
            killed => {
                let result = killed.and_then(|_| all_or_nothing(&program));
                match &result {
                    Ok(true) => running += 1,
                    Ok(false) => gone += 1,
                    Err(_) => {}
                }
                program.end();
                let left = processes();
                let left = if left.is_empty() { Ok(()) } else { Err(format!("processes are left: {left:?}")) };
                tally.count(instant, result.and(left));
            }
        }
        if tally.too_late > 10 * tally.wanted + 100 {
            return Err("the restores are done before they can be killed".into());
        }
    }
    tally.remark = format!(": {gone} times nothing, {running} times all");
    // The image is as good as ever.
    board.put_back()?;
    run(options, &restore, &log)?;
    program.goes_on()?;
    program.verdict()?;
    Ok(tally)
}

/// Up to here a run can be killed: a little more than the usual length, so that its end is met too. What is done before
/// its instant comes does not count.
fn whole_length(mut took: Vec<Duration>) -> Duration {
    took.sort_unstable();
    took[took.len() / 2].mul_f64(1.1)
}

/// The content of the board's file, and when it was written.
struct BoardAtDump {
    file: File,
    content: Vec<u8>,
    modified: SystemTime,
}

impl BoardAtDump {
    fn keep(path: &Path) -> Result<BoardAtDump, String> {
        let keep = || {
            let file = File::options().read(true).write(true).open(path)?;
            let modified = file.metadata()?.modified()?;
            Ok(BoardAtDump { content: fs::read(path)?, modified, file })
        };
        keep().map_err(|error: std::io::Error| format!("{}: {error}", path.display()))
    }

    fn put_back(&self) -> Result<(), String> {
        let put_back = || {
            self.file.write_all_at(&self.content, 0)?;
            self.file.set_modified(self.modified)
        };
        put_back().map_err(|error| format!("putting the board back: {error}"))
    }
}

/// After a killed restore: true for all of the tree, running; false for nothing of it.
fn all_or_nothing(program: &Program) -> Result<bool, String> {
    let begin = Instant::now();
    loop {
        reap();
        let left = processes();
        if left.is_empty() {
            return Ok(false);
        }
        // Skeletons end by themselves, in their own time; whoever computes goes on.
        let before = program.board.counts();
        std::thread::sleep(Duration::from_millis(2));
        if program.board.counts() != before {
            return program.goes_on().map(|()| true);
        }
        if begin.elapsed() > DEADLINE {
            let states: Vec<_> = left.iter().map(|pid| fs::read_to_string(format!("/proc/{pid}/stat"))).collect();
            return Err(format!("a part of the tree is left and does not run: {states:?}"));
        }
    }
}

fn processes() -> BTreeSet<i32> {
    let mut pids = numbers(Path::new("/proc"));
    pids.remove(&1);
    pids
}
