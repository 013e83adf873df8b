//! Ways to checkpoint, side by side: what ckpt's backends and their peers take for the same work, in one run, in turn.
//!
//! ```text
//! arguments -> tools that are here -> comparisons, each in rounds over all tools -> record -> terminal, JSON, HTML
//! ```

mod arguments;
mod command;
mod compare;
mod host;
mod measures;
mod programs;
mod record;
mod report;
mod statistics;
mod tools;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use clap::Parser;

use arguments::{Arguments, Run, Verb};
use measures::{Bench, Comparison, Limits, cycle, lazy, null, overhead};
use record::{Ratio, Record, Row, Settings, Skipped, ToolFacts};
use tools::Found;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match &arguments.verb {
        Some(Verb::Program(program)) => return programs::own::run(program),
        Some(Verb::Call(call)) => return measures::calls::run(call),
        Some(Verb::Compare { before, after }) => compare(before, after),
        Some(Verb::Report { json, html }) => {
            record::read(json).and_then(|record| write(html, &report::html::page(&record))).map(|()| true)
        }
        None => measure(&arguments.run),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(message) => {
            eprintln!("ckpt-bench: error: {message}");
            ExitCode::FAILURE
        }
    }
}

fn compare(before: &Path, after: &Path) -> Result<bool, String> {
    let (before, after) = (record::read(before)?, record::read(after)?);
    print(&compare::text(&before, &after));
    // What became slower is for people to judge; CI must not fail on time.
    Ok(true)
}

/// `cargo run` has the dynamic linker look for each library in its own folders first: 0.2 ms more for each command.
fn forget_cargo() {
    if std::env::var_os("CARGO").is_some() {
        // SAFETY: this is the only thread yet, so nobody reads the environment meanwhile.
        unsafe { std::env::remove_var("LD_LIBRARY_PATH") };
    }
}

/// Whether all of ckpt that was run did what it should.
fn measure(run: &Run) -> Result<bool, String> {
    forget_cargo();
    let begun = Instant::now();
    let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let out = make_directory(&run.out)?;
    let temporary = match &run.images {
        Some(images) => tempfile::tempdir_in(make_directory(images)?),
        None => tempfile::tempdir_in(&out),
    };
    let temporary = temporary.map_err(|error| format!("no directory for images can be made: {error}; see --images"))?;
    let ckpt = match &run.ckpt {
        Some(ckpt) => {
            ckpt.canonicalize().map_err(|error| format!("{}: {error}; --ckpt names the program", ckpt.display()))?
        }
        None => build()?,
    };
    // What restored trees leave comes to us, so that we can end it.
    nix::sys::prctl::set_child_subreaper(true).map_err(|errno| format!("prctl(PR_SET_CHILD_SUBREAPER): {errno}"))?;

    let (mut present, mut facts) = (Vec::new(), Vec::new());
    for found in tools::find(&run.backends, &run.peers, &ckpt)? {
        match found {
            Found::Tool(tool) => {
                facts.push(tool.facts());
                present.push(tool);
            }
            Found::Absent(absent) => facts.push(absent),
        }
    }
    print(&report::terminal::tools(&facts));
    let bench = Bench {
        tools: present,
        images: temporary.path().to_path_buf(),
        limits: Limits { rounds: run.rounds(), within: run.time_box(), at_once: 1 },
        timeout: run.timeout,
    };
    let mut record = Record {
        format: record::FORMAT.into(),
        version: record::VERSION,
        ckpt: ckpt_version(&facts),
        host: host::facts(&bench.images),
        settings: Settings {
            quick: run.quick,
            runs: run.rounds(),
            within: run.time_box().as_secs_f64(),
            timeout: run.timeout.as_secs_f64(),
        },
        started,
        took: 0.0,
        tools: facts,
        skipped: Vec::new(),
        null: None,
        rows: Vec::new(),
        ratios: Vec::new(),
    };
    match null::measure(&bench.images, run.timeout) {
        Ok(null) => {
            print(&report::terminal::null(&null));
            record.null = Some(null);
        }
        Err(why) => record.skipped.push(Skipped { what: "null measurement".into(), why }),
    }
    run_all(run, &bench, &mut record);
    record.took = begun.elapsed().as_secs_f64();

    let (json, html) = (out.join("bench.json"), out.join("report.html"));
    print(&report::terminal::closing(&record));
    write(&json, &record.to_json()?)?;
    write(&html, &report::html::page(&record))?;
    print(&format!("\n{} and {} are written, after {:.0} s\n", json.display(), html.display(), record.took));
    Ok(record.is_good())
}

/// Everything that was asked for, pass after pass, and what came of it as soon as it is there.
fn run_all(run: &Run, bench: &Bench, record: &mut Record) {
    let programs = programs::all();
    let mut comparisons = Vec::new();
    for program in programs.iter().filter(|program| run.wants(program.name(), program.quick())) {
        let begin = || cycle::comparison(bench, &**program).map(|comparison| vec![comparison]);
        comparisons.extend(warm_up(program.name(), begin, record));
    }
    for workload in lazy::WORKLOADS.iter().filter(|workload| run.wants(workload.name, workload.quick)) {
        comparisons.extend(warm_up(workload.name, || lazy::comparisons(bench, workload), record));
    }
    for workload in overhead::WORKLOADS.iter().filter(|workload| run.wants(workload.name, true)) {
        comparisons.extend(warm_up(workload.name, || Ok(workload.comparisons(bench)), record));
    }
    let mut under_way: Vec<Option<Comparison<'_>>> = comparisons.into_iter().map(Some).collect();
    let mut found: Vec<(Vec<Row>, Vec<Ratio>)> = under_way.iter().map(|_| Default::default()).collect();
    let mut pass = 0;
    while under_way.iter().any(Option::is_some) {
        pass += 1;
        for (place, found) in under_way.iter_mut().zip(&mut found) {
            let Some(comparison) = place else { continue };
            if !comparison.is_done() {
                eprintln!("ckpt-bench: pass {pass}: {}", comparison.subject.workload);
                comparison.pass();
            }
            if comparison.is_done() {
                *found = comparison.found();
                print(&report::terminal::rows(&found.0, &found.1));
                // Its images go with it.
                *place = None;
            }
        }
    }
    for (rows, ratios) in found {
        record.rows.extend(rows);
        record.ratios.extend(ratios);
    }
}

/// Begins comparisons, and has each run once. Where it cannot be, that is noted.
fn warm_up<'a>(
    name: &str,
    begin: impl FnOnce() -> Result<Vec<Comparison<'a>>, String>,
    record: &mut Record,
) -> Vec<Comparison<'a>> {
    eprintln!("ckpt-bench: warming up: {name}");
    let mut begun = begin().unwrap_or_else(|why| {
        let skipped = Skipped { what: name.into(), why };
        print(&report::terminal::skipped(std::slice::from_ref(&skipped)));
        record.skipped.push(skipped);
        Vec::new()
    });
    begun.iter_mut().for_each(Comparison::pass);
    begun
}

/// Builds the ckpt of this source, where cargo runs us; else takes the one beside us.
fn build() -> Result<PathBuf, String> {
    let own = std::env::current_exe().map_err(|error| format!("the driver's own file: {error}"))?;
    let beside = own.with_file_name("ckpt");
    if let Some(cargo) = std::env::var_os("CARGO") {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
        let mut command = Command::new(cargo);
        command.args(["build", "--release", "--package", "ckpt", "--manifest-path"]).arg(manifest);
        let status = command.status().map_err(|error| format!("cargo cannot be run: {error}"))?;
        if !status.success() {
            return Err("ckpt cannot be built; see above".into());
        }
    }
    if beside.is_file() {
        return Ok(beside);
    }
    Err(format!("there is no {}; name one with --ckpt, or start this with cargo run --release", beside.display()))
}

fn ckpt_version(facts: &[ToolFacts]) -> String {
    let ours = facts.iter().find_map(|facts| facts.version.clone().filter(|version| version.starts_with("ckpt")));
    ours.unwrap_or_default()
}

fn make_directory(path: &Path) -> Result<PathBuf, String> {
    let made = fs::create_dir_all(path).and_then(|()| path.canonicalize());
    made.map_err(|error| format!("{} cannot be made: {error}; choose another directory", path.display()))
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    let written = fs::write(path, text);
    written.map_err(|error| format!("{} cannot be written: {error}; choose another with --out", path.display()))
}

/// A reader that went away is no reason to stop.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes()).and_then(|()| std::io::stdout().flush());
}
