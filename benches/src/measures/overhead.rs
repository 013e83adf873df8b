//! What a program costs more while it runs so that it can be saved later: for tools that wrap it.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::calls::{CALLS, Call};
use super::{Bench, Comparison, Limits, Samples, Subject, Turn};
use crate::command;
use crate::record::{Group, Unit};
use crate::tools::Tool;

/// A part of the command line's workloads.
pub struct Workload {
    pub name: &'static str,
    pub about: &'static str,
}

pub const WORKLOADS: &[Workload] = &[
    Workload { name: "overhead-calls", about: "calls, with and without the library of preload: each its own row" },
    Workload { name: "overhead-programs", about: "whole programs, the same way, and what a tiny one has in memory" },
];

/// A program that is run to its end, as one would type it.
struct Whole {
    name: &'static str,
    command: &'static [&'static str],
}

const PROGRAMS: &[Whole] = &[
    Whole { name: "true", command: &["/bin/true"] },
    Whole { name: "bash-loop", command: &["bash", "-c", "for i in {1..60}; do /bin/true; (exit 0); done"] },
    Whole {
        name: "python3",
        command: &["python3", "-c", "import json; print(sum(len(json.dumps([n] * 9)) for n in range(30000)))"],
    },
    Whole {
        name: "sqlite3",
        command: &[
            "sqlite3",
            ":memory:",
            "create table t as with recursive r(n) as (select 1 union all select n + 1 from r where n < 200000) \
             select n, hex(n) h from r; create index i on t(h); select count(distinct h) from t",
        ],
    },
    Whole {
        name: "sort",
        command: &["bash", "-c", "seq 200000 | sort -R --random-source=/dev/zero | sort -n | tail -n 1"],
    },
];

impl Workload {
    /// Its rows: each with those that wrap programs, if there are any.
    pub fn comparisons<'a>(&self, bench: &'a Bench) -> Vec<Comparison<'a>> {
        if self.name == "overhead-calls" {
            return CALLS
                .iter()
                .filter_map(|call| comparison(bench, call.name, move || counting(call), Told::Nanoseconds))
                .collect();
        }
        let memory = comparison(bench, "resident memory", || own(&["call", "rss", "0"]), Told::Kibibytes);
        let whole =
            PROGRAMS.iter().map(|program| comparison(bench, program.name, move || Ok(typed(program)), Told::Nothing));
        std::iter::once(memory).chain(whole).flatten().collect()
    }
}

fn counting(call: &Call) -> Result<Command, String> {
    own(&["call", call.name, &call.count.to_string()])
}

fn typed(program: &Whole) -> Command {
    let mut command = Command::new(program.command[0]);
    command.args(&program.command[1..]);
    command
}

/// What a program prints of itself.
#[derive(Clone, Copy, PartialEq)]
enum Told {
    Nothing,
    Nanoseconds,
    Kibibytes,
}

fn own(words: &[&str]) -> Result<Command, String> {
    let file = std::env::current_exe().map_err(|error| format!("the driver's own file: {error}"))?;
    let mut command = Command::new(file);
    command.args(words);
    Ok(command)
}

fn comparison<'a>(
    bench: &'a Bench,
    name: &str,
    program: impl Fn() -> Result<Command, String> + Copy + 'a,
    told: Told,
) -> Option<Comparison<'a>> {
    let turn = |tool: Option<&'a dyn Tool>| -> Turn<'a> {
        let name = tool.map_or("native", |tool| tool.name());
        (name.into(), Box::new(move || once(tool, program()?, &bench.images, bench.timeout, told)))
    };
    let wraps = |tool: &&dyn Tool| tool.wrap(&Command::new("true"), Path::new("/dev/null")).is_some();
    let tools: Vec<&dyn Tool> = bench.tools.iter().map(|tool| &**tool).filter(wraps).collect();
    if tools.is_empty() {
        return None;
    }
    let turns = std::iter::once(None).chain(tools.into_iter().map(Some)).map(turn).collect();
    let subject = Subject { group: Group::Overhead, workload: name.into(), size: 0, baseline: "native" };
    // They are short, so there can be more of them.
    let Limits { rounds, within, at_once } = bench.limits;
    let limits = Limits { rounds: rounds * 2, within: within / 4, at_once: at_once * 2 };
    Some(Comparison::new(subject, limits, turns))
}

fn once(
    tool: Option<&dyn Tool>,
    program: Command,
    images: &Path,
    timeout: Duration,
    told: Told,
) -> Result<Samples, String> {
    let place = tempfile::tempdir_in(images).map_err(|error| format!("{}: {error}", images.display()))?;
    let (log, output) = (place.path().join("log"), place.path().join("output"));
    let name = program.get_program().to_string_lossy().into_owned();
    let wrapped = tool.and_then(|tool| tool.wrap(&program, &output));
    let is_wrapped = wrapped.is_some();
    let mut command = wrapped.unwrap_or(program);
    let taken = command::run(&mut command, &name, &log, timeout).map_err(|failure| failure.reason)?;
    let said = std::fs::read_to_string(if is_wrapped && output.exists() { &output } else { &log }).unwrap_or_default();
    let mut samples = Samples::default();
    let number = || said.trim().parse::<f64>().map_err(|_| format!("{name} said {said:?}"));
    match told {
        Told::Nothing => samples.add_time("time", taken.wall),
        Told::Nanoseconds => samples.add("time", Unit::Nanoseconds, number()?),
        Told::Kibibytes => samples.add("memory", Unit::Kibibytes, number()?),
    }
    Ok(samples)
}
