//! Runs the matrix on libtest-mimic, prints it, and writes it to a file.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Condvar, LazyLock, Mutex};
use std::time::{Duration, Instant};

use ckpt_core::Backend;
use libtest_mimic::{Arguments, Trial};
use serde::Serialize;

use crate::case::Case;
use crate::isolation;
use crate::matrix::{self, Cell, Host, Required, Todo};
use crate::trial;

/// The exit code where nothing failed, but this host kept something from being tried.
const SKIPPED: u8 = 77;
/// As the standard test runner has it.
const FAILED: u8 = 101;

/// What became of a cell.
#[derive(Clone, Debug, Serialize)]
pub struct Result {
    pub case: &'static str,
    /// `dumper+restorer`, or `dumper+running`.
    pub way: String,
    /// `passed`; `failed`; `skipped`, because of this host; `cannot`, as a backend says itself; or `filtered`, for what
    /// was not asked for.
    pub outcome: &'static str,
    /// Of a failure or a skip.
    pub reason: Option<String>,
    pub seconds: f64,
}

/// A suite that was run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub results: Vec<Result>,
    /// Backends that there is nothing to try of, and why.
    pub idle: Vec<String>,
}

/// The command line. If it does not say, there are as many trials at a time as there is [`Room`] for.
pub fn arguments() -> Arguments {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert_with(|| ROOM.size);
    arguments
}

/// How much may be tried at a time: one trial more than there are processors, as every trial waits now and then; in the place
/// of one, several that do little else.
pub struct Room {
    size: usize,
    free: Mutex<usize>,
    freed: Condvar,
}

pub static ROOM: LazyLock<Room> = LazyLock::new(|| {
    let size = Room::PLACE * (1 + std::thread::available_parallelism().map_or(1, usize::from));
    Room { size, free: Mutex::new(size), freed: Condvar::new() }
});

impl Room {
    /// What a trial takes of it, and an idle one one of these.
    const PLACE: usize = 4;

    /// Runs something when there is room for a trial of this case.
    pub fn with_place<T>(&self, case: &Case, run: impl FnOnce() -> T) -> T {
        let needed = if case.idle { 1 } else { Room::PLACE };
        let free = self.free.lock().expect("nothing in between panics");
        *self.freed.wait_while(free, |free| *free < needed).expect("nothing in between panics") -= needed;
        // Also when it panics, which the library makes a failure of.
        let _place = Place { room: self, size: needed };
        run()
    }
}

struct Place<'a> {
    room: &'a Room,
    size: usize,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        *self.room.free.lock().expect("nothing in between panics") += self.size;
        self.room.freed.notify_all();
    }
}

/// Tries all `cases` with all `backends`, prints what came of it and writes it to `target/conformance-matrix.{txt,json}`.
///
/// The exit code is 0 only if something was tried, nothing that was tried or required failed, and this host kept nothing
/// from being tried (or `CKPT_ALLOW_SKIPS=1` accepts that).
pub fn main(cases: &[Case], backends: &[&'static Backend], subject: &Path, files: Option<&Path>) -> ExitCode {
    let arguments = arguments();
    let required = Required::from_environment();
    let unknown = required.unknown(backends);
    if !unknown.is_empty() {
        eprintln!("CKPT_REQUIRE names {unknown:?}, which is no backend, nor programs, namespaces or all");
        return ExitCode::FAILURE;
    }
    let host = Host { namespaces: isolation::probe(), required };
    if arguments.list {
        let (cells, _) = matrix::generate(cases, backends, &host);
        libtest_mimic::run(&arguments, trials(&cells, subject, &Default::default())).exit();
    }
    let report = run(cases, backends, &host, subject, &arguments);
    print!("{}", report.text());
    if let Some(stem) = files {
        let write = |extension: &str, content: String| std::fs::write(stem.with_extension(extension), content);
        let json = serde_json::to_string_pretty(&report).expect("strings and numbers");
        if let Err(error) = write("txt", report.text()).and_then(|()| write("json", json)) {
            eprintln!("writing {}: {error}", stem.display());
            return ExitCode::FAILURE;
        }
    }
    report.exit_code()
}

/// Tries all cells that `arguments` do not filter out.
pub fn run(
    cases: &[Case],
    backends: &[&'static Backend],
    host: &Host,
    subject: &Path,
    arguments: &Arguments,
) -> Report {
    let (cells, idle) = matrix::generate(cases, backends, host);
    let ended: Ended = Arc::default();
    let _ = libtest_mimic::run(arguments, trials(&cells, subject, &ended));
    let ended = ended.lock().expect("a trial's thread panicked");
    let results = cells.iter().map(|cell| {
        let way = cell.way.name();
        let (outcome, reason, seconds) = match (&cell.todo, ended.get(&(cell.case.name, way.clone()))) {
            (Todo::Skip(why), _) => ("skipped", Some(why.clone()), 0.0),
            (Todo::Cannot(why), _) => ("cannot", Some(why.clone()), 0.0),
            (_, Some((Ok(()), took))) => ("passed", None, took.as_secs_f64()),
            (_, Some((Err(why), took))) => ("failed", Some(why.clone()), took.as_secs_f64()),
            (_, None) => ("filtered", None, 0.0),
        };
        Result { case: cell.case.name, way, outcome, reason, seconds }
    });
    Report { results: results.collect(), idle }
}

/// By case and way.
type Ended = Arc<Mutex<BTreeMap<(&'static str, String), (trial::Verdict, Duration)>>>;

fn trials(cells: &[Cell], subject: &Path, ended: &Ended) -> Vec<Trial> {
    let trials = cells.iter().map(|cell| {
        let (cell, subject, ended) = (cell.clone(), PathBuf::from(subject), ended.clone());
        let name = format!("{} {}", cell.way.name(), cell.case.name);
        let skipped = matches!(cell.todo, Todo::Skip(_) | Todo::Cannot(_));
        let trial = Trial::test(name, move || {
            let (verdict, took) = match &cell.todo {
                Todo::Try => ROOM.with_place(&cell.case, || {
                    let begin = Instant::now();
                    (trial::run(&cell.case, &cell.way, &subject), begin.elapsed())
                }),
                Todo::Skip(why) | Todo::Cannot(why) => return Err(format!("skipped: {why}").into()),
                Todo::Fail(why) => (Err(why.clone()), Duration::ZERO),
            };
            let key = (cell.case.name, cell.way.name());
            ended.lock().expect("a trial's thread panicked").insert(key, (verdict.clone(), took));
            Ok(verdict?)
        });
        trial.with_ignored_flag(skipped)
    });
    trials.collect()
}

impl Report {
    pub fn count(&self, outcome: &str) -> usize {
        self.results.iter().filter(|result| result.outcome == outcome).count()
    }

    /// Says in words what the exit code says, where it is not simply good or bad.
    pub fn exit_code(&self) -> ExitCode {
        let accepted = std::env::var("CKPT_ALLOW_SKIPS").is_ok_and(|value| value == "1");
        match (self.count("passed"), self.count("failed"), self.count("skipped")) {
            (1.., 0, 0) => ExitCode::SUCCESS,
            (1.., 0, _) if accepted => ExitCode::SUCCESS,
            (1.., 0, _) => {
                println!(
                    "conformance: nothing failed, but a skip is no pass; CKPT_ALLOW_SKIPS=1 accepts the skips above"
                );
                ExitCode::from(SKIPPED)
            }
            (0, 0, _) => {
                println!("conformance: nothing was tried, which is a failure");
                ExitCode::from(FAILED)
            }
            _ => ExitCode::from(FAILED),
        }
    }

    /// The matrix, every reason of a skip, every failure, and the numbers: who sees only the end sees what matters.
    pub fn text(&self) -> String {
        let mut ways: Vec<&str> = Vec::new();
        let mut rows: Vec<(&str, BTreeMap<&str, &Result>)> = Vec::new();
        for result in self.results.iter().filter(|result| result.outcome != "filtered") {
            if !ways.contains(&result.way.as_str()) {
                ways.push(&result.way);
            }
            match rows.iter_mut().find(|(case, _)| *case == result.case) {
                Some((_, row)) => drop(row.insert(&result.way, result)),
                None => rows.push((result.case, BTreeMap::from([(result.way.as_str(), result)]))),
            }
        }
        let wide = rows.iter().map(|(case, _)| case.len()).max().unwrap_or(0);
        let mut text = String::new();
        let mut line = |first: &str, cells: &mut dyn Iterator<Item = &str>| {
            let cells: String = ways
                .iter()
                .zip(cells)
                .map(|(way, cell)| format!("  {cell:>width$}", width = way.len().max(7)))
                .collect();
            let _ = writeln!(text, "{first:wide$}{cells}");
        };
        line("", &mut ways.iter().copied());
        for (case, row) in &rows {
            let outcomes = ways.iter().map(|way| match row.get(way).map(|result| result.outcome) {
                Some("failed") => "FAILED",
                Some(outcome) => outcome,
                None => "",
            });
            line(case, &mut outcomes.collect::<Vec<_>>().into_iter());
        }
        let mut reasons: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for result in self.results.iter().filter(|result| ["skipped", "cannot"].contains(&result.outcome)) {
            let cell = format!("{} {}", result.way, result.case);
            reasons.entry(result.reason.as_deref().unwrap_or("")).or_default().push(cell);
        }
        for (reason, cells) in reasons {
            let _ = writeln!(text, "not tried: {reason}: {} ({})", cells.len(), shortened(&cells));
        }
        for idle in &self.idle {
            let _ = writeln!(text, "{idle}");
        }
        for result in self.results.iter().filter(|result| result.outcome == "failed") {
            let reason = result.reason.as_deref().unwrap_or("").trim_end();
            let _ = writeln!(text, "FAILED {} {}: {reason}", result.way, result.case);
        }
        let [passed, failed, skipped, cannot] =
            ["passed", "failed", "skipped", "cannot"].map(|outcome| self.count(outcome));
        let skipped = skipped + cannot;
        let _ = writeln!(text, "conformance: {passed} passed, {failed} failed, {skipped} skipped");
        text
    }
}

fn shortened(cells: &[String]) -> String {
    let more = cells.len().saturating_sub(3);
    let first = cells[..cells.len() - more].join(", ");
    if more > 0 { format!("{first}, and {more} more") } else { first }
}
