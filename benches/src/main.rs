//! Times whole commands: `ckpt dump`, `ckpt restore`, and the same of a peer, in turn, on the same programs.
//!
//! Every run starts a program anew, waits until it has touched its memory, dumps it, restores it, and sees to it that it
//! goes on; a row whose program did not go on says so and has no time. Given are medians (and minima) of the wall time,
//! the same of a dump until its files are synced, and the largest resident size of the command itself.

mod load;

use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use load::{LOADS, Load};

const USAGE: &str = "usage: ckpt-bench [--runs N] [--dir DIR] [--only NAME] [--ckpt FILE] [--criu COMMAND]

  --runs N        interleaved runs of each row (default 9)
  --dir DIR       where images are written (default: a temporary directory)
  --only NAME     one load only: tiny, 10-mib, 1-gib, tree-100, threads-200
  --ckpt FILE     the program (default: the one beside this)
  --criu COMMAND  how to run CRIU; benches/peers.sh fetches it, and says how";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let ["--load", name, progress] = arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        return load::run(name, Path::new(progress));
    }
    match Bench::parse(&arguments).and_then(|bench| bench.run()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(message) => {
            eprintln!("ckpt-bench: {message}\n{USAGE}");
            ExitCode::from(2)
        }
    }
}

struct Bench {
    runs: usize,
    dir: PathBuf,
    only: Option<String>,
    ckpt: PathBuf,
    criu: Option<Vec<String>>,
    /// Removed at the end.
    _temporary: Option<tempfile::TempDir>,
}

/// A tool that dumps and restores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tool {
    Ckpt,
    Criu,
}

/// One command that was timed.
#[derive(Clone, Copy)]
struct Timed {
    took: Duration,
    /// Until the image was on its medium as well. ckpt ends only then; others leave that to the kernel.
    durable: Duration,
    /// Largest resident size, in KiB.
    peak: i64,
}

/// All runs of one tool on one load.
#[derive(Default)]
struct Row {
    dumps: Vec<Timed>,
    restores: Vec<Timed>,
    failure: Option<String>,
}

impl Bench {
    fn parse(arguments: &[String]) -> Result<Bench, String> {
        let own = std::env::current_exe().map_err(|error| error.to_string())?;
        let (mut runs, mut dir, mut only, mut ckpt, mut criu) = (9, None, None, own.with_file_name("ckpt"), None);
        let mut words = arguments.iter();
        while let Some(name) = words.next() {
            let value = words.next().ok_or(format!("{name} needs a value"))?;
            match name.as_str() {
                "--runs" => runs = value.parse().ok().filter(|&runs| runs > 0).ok_or(format!("--runs {value}"))?,
                "--dir" => dir = Some(PathBuf::from(value)),
                "--only" => only = Some(value.clone()),
                "--ckpt" => ckpt = PathBuf::from(value),
                "--criu" => criu = Some(value.split_whitespace().map(String::from).collect()),
                _ => return Err(format!("there is no option {name}")),
            }
        }
        if let Some(only) = &only
            && !LOADS.iter().any(|load| load.name == only)
        {
            return Err(format!("there is no load {only}"));
        }
        let temporary = match dir {
            Some(_) => None,
            None => Some(tempfile::tempdir().map_err(|error| error.to_string())?),
        };
        let dir = dir.unwrap_or_else(|| temporary.as_ref().expect("made without --dir").path().to_path_buf());
        Ok(Bench { runs, dir, only, ckpt, criu, _temporary: temporary })
    }

    /// Whether every program of every row went on.
    fn run(&self) -> Result<bool, String> {
        // Orphans of a restore come to us, so that we can end and reap them.
        nix::sys::prctl::set_child_subreaper(true).map_err(|error| error.to_string())?;
        let mut tools = vec![Tool::Ckpt];
        match &self.criu {
            Some(_) => tools.push(Tool::Criu),
            None => println!("criu: absent (--criu names it; benches/peers.sh fetches it)"),
        }
        println!("median (minimum) of {} interleaved runs, wall time of the whole command", self.runs);
        println!(
            "{:<12} {:<5} {:>21} {:>21} {:>21} {:>12} {:>12}",
            "load", "tool", "dump", "dump and sync", "restore", "dump peak", "restore peak"
        );
        let mut good = true;
        for load in LOADS.iter().filter(|load| self.only.as_deref().is_none_or(|only| only == load.name)) {
            let mut rows: Vec<Row> = tools.iter().map(|_| Row::default()).collect();
            for _ in 0..self.runs {
                for (tool, row) in tools.iter().zip(&mut rows).filter(|(_, row)| row.failure.is_none()) {
                    match self.once(load, *tool) {
                        Ok((dump, restore)) => {
                            row.dumps.push(dump);
                            row.restores.push(restore);
                        }
                        Err(failure) => row.failure = Some(failure),
                    }
                }
            }
            for (tool, row) in tools.iter().zip(&rows) {
                good &= row.failure.is_none() || *tool != Tool::Ckpt;
                row.print(load.name, *tool);
            }
        }
        Ok(good)
    }

    /// One program's life: started, dumped, restored, seen to go on, ended.
    fn once(&self, load: &Load, tool: Tool) -> Result<(Timed, Timed), String> {
        let place = tempfile::tempdir_in(&self.dir).map_err(|error| error.to_string())?;
        let progress = place.path().join("progress");
        let image = place.path().join("image");
        fs::create_dir(&image).map_err(|error| error.to_string())?;
        let root = start(load, &progress)?;
        let result = (|| {
            load.wait_until_it_works(&progress)?;
            let dump = self.command(tool, "dump", root, &image)?;
            gone(root)?;
            let restore = self.command(tool, "restore", root, &image)?;
            load.wait_until_it_works(&progress)?;
            Ok((dump, restore))
        })();
        end(root);
        result
    }

    fn command(&self, tool: Tool, verb: &str, root: i32, image: &Path) -> Result<Timed, String> {
        let root = root.to_string();
        let mut command = match tool {
            Tool::Ckpt => Command::new(&self.ckpt),
            Tool::Criu => {
                let words = self.criu.as_ref().expect("only with --criu");
                let mut command = Command::new(&words[0]);
                command.args(&words[1..]);
                command
            }
        };
        match (tool, verb) {
            (Tool::Ckpt, "dump") => command.args(["--quiet", "dump", "-t", &root, "-D"]).arg(image),
            (Tool::Ckpt, _) => command.args(["--quiet", "restore", "--detach", "-D"]).arg(image),
            (Tool::Criu, "dump") => command.args(["dump", "-v0", "-t", &root, "-D"]).arg(image),
            (Tool::Criu, _) => command.args(["restore", "-v0", "-d", "-D"]).arg(image),
        };
        let log = image.with_extension("log");
        let output = fs::File::create(&log).map_err(|error| error.to_string())?;
        command.stdin(Stdio::null()).stdout(output.try_clone().map_err(|error| error.to_string())?).stderr(output);
        let begin = Instant::now();
        let child = command.spawn().map_err(|error| format!("{tool:?}: {error}"))?;
        let (status, peak) = wait4(child.id() as i32)?;
        let took = begin.elapsed();
        if status == 0 {
            sync(image).map_err(|error| format!("syncing the image: {error}"))?;
            return Ok(Timed { took, durable: begin.elapsed(), peak });
        }
        let said = fs::read_to_string(&log).unwrap_or_default();
        Err(format!("{verb} ended with status {status:#x}: {}", said.lines().last().unwrap_or("")))
    }
}

impl Row {
    fn print(&self, load: &str, tool: Tool) {
        let tool = format!("{tool:?}").to_lowercase();
        if let Some(failure) = &self.failure {
            println!("{load:<12} {tool:<5} failed: {failure}");
        } else {
            let peak = |runs: &[Timed]| format!("{} KiB", runs.iter().map(|run| run.peak).max().unwrap_or(0));
            let (dumps, restores) = (&self.dumps, &self.restores);
            println!(
                "{load:<12} {tool:<5} {:>21} {:>21} {:>21} {:>12} {:>12}",
                times(dumps, |run| run.took),
                times(dumps, |run| run.durable),
                times(restores, |run| run.took),
                peak(dumps),
                peak(restores)
            );
        }
        let _ = std::io::stdout().flush();
    }
}

/// Brings the files of an image to their medium, where they are not yet.
fn sync(image: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(image)? {
        fs::File::open(entry?.path())?.sync_data()?;
    }
    fs::File::open(image)?.sync_all()
}

/// The median, and the minimum in parentheses.
fn times(runs: &[Timed], of: impl Fn(&Timed) -> Duration) -> String {
    let mut times: Vec<f64> = runs.iter().map(|run| of(run).as_secs_f64() * 1e3).collect();
    times.sort_by(f64::total_cmp);
    format!("{:.1} ({:.1}) ms", times[times.len() / 2], times[0])
}

/// Starts a load in a session of its own, with no descriptor but the standard ones, which lead to `/dev/null`.
fn start(load: &Load, progress: &Path) -> Result<i32, String> {
    let mut command = Command::new("/proc/self/exe");
    command.args(["--load", load.name]).arg(progress);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
    // SAFETY: setsid(2) and close_range(2) are async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int);
            Ok(())
        })
    };
    // The child is waited for by its pid, as its restored self will have to be.
    Ok(command.spawn().map_err(|error| format!("starting {}: {error}", load.name))?.id() as i32)
}

/// Waits for the dumped root, so that its pid is free again.
fn gone(root: i32) -> Result<(), String> {
    let (status, _) = wait4(root)?;
    if libc::WIFSIGNALED(status) { Ok(()) } else { Err(format!("the program ended by itself, status {status:#x}")) }
}

/// Ends the program with all of its tree, whose group it leads.
fn end(root: i32) {
    // SAFETY: the group of a process that we started, or of its restored self.
    unsafe { libc::kill(-root, libc::SIGKILL) };
    // Of the tree only; commands have been waited for.
    while wait4(-1).is_ok() {}
}

/// Its status, and the largest resident size in KiB.
fn wait4(pid: i32) -> Result<(i32, i64), String> {
    let mut status = 0;
    // SAFETY: a zeroed rusage is valid, and both live for the call.
    let (result, usage) = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        (libc::wait4(pid, &mut status, 0, &mut usage), usage)
    };
    if result < 0 { Err(format!("wait4: {}", std::io::Error::last_os_error())) } else { Ok((status, usage.ru_maxrss)) }
}
