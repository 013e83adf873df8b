//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::{measures, programs, tools};

/// Ways to checkpoint, side by side: the backends of ckpt and its peers, in turn, in one run
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true, after_help = after_help())]
pub struct Arguments {
    #[command(subcommand)]
    pub verb: Option<Verb>,

    #[command(flatten)]
    pub run: Run,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Show what became slower, faster, larger or smaller from one run to another
    Compare {
        /// The bench.json from before
        before: PathBuf,
        /// The bench.json from now
        after: PathBuf,
    },
    /// Make the HTML report of a bench.json anew
    Report {
        json: PathBuf,
        /// The file to write
        html: PathBuf,
    },
    /// Is the program that is measured
    #[command(hide = true)]
    Program(programs::own::Arguments),
    /// Makes one kind of call many times, and prints what one took
    #[command(hide = true)]
    Call(measures::calls::Arguments),
}

#[derive(Clone, Debug, Args)]
pub struct Run {
    /// Backends of ckpt: preload, ptrace, userfault, or none
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_parser = backend, default_value = "ptrace,preload,userfault")]
    pub backends: Vec<&'static str>,

    /// Peers: criu, dmtcp, or none; one that is not on this machine is reported as absent
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_parser = peer, default_value = "criu,dmtcp")]
    pub peers: Vec<&'static str>,

    /// What to measure; a name may end with * (default: all, or with --quick those that are marked below)
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_parser = workload)]
    pub workloads: Option<Vec<Names>>,

    /// Fewer and smaller workloads, and fewer rounds: a report within ten minutes
    #[arg(long)]
    pub quick: bool,

    /// Where bench.json and report.html are written
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    pub out: PathBuf,

    /// Where images are written, on the medium to measure (default: in a temporary directory in --out)
    #[arg(long, value_name = "DIR")]
    pub images: Option<PathBuf>,

    /// Rounds of each workload, after one to warm up (default: 15, or 7 with --quick)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: Option<u32>,

    /// No new round of a workload begins after so many seconds, but for the first three (default: 120, or 20 with --quick)
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub within: Option<Duration>,

    /// A command that takes longer is ended, and its row says failed
    #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "60")]
    pub timeout: Duration,

    /// The ckpt to measure (default: built from this source)
    #[arg(long, value_name = "FILE")]
    pub ckpt: Option<PathBuf>,
}

impl Run {
    pub fn rounds(&self) -> usize {
        self.runs.unwrap_or(if self.quick { 7 } else { 15 }) as usize
    }

    pub fn time_box(&self) -> Duration {
        self.within.unwrap_or(Duration::from_secs(if self.quick { 20 } else { 120 }))
    }

    /// Whether a workload is to be run.
    pub fn wants(&self, name: &str, quick: bool) -> bool {
        match &self.workloads {
            Some(given) => given.iter().any(|names| names.0.contains(&name)),
            None => quick || !self.quick,
        }
    }
}

/// The workloads that one word on the command line names.
#[derive(Clone, Debug)]
pub struct Names(pub Vec<&'static str>);

/// Every workload with what it is about, and whether `--quick` has it.
pub fn workloads() -> Vec<(&'static str, String, bool)> {
    let programs = programs::all().into_iter().map(|program| (program.name(), program.about(), program.quick()));
    let lazy = measures::lazy::WORKLOADS.iter().map(|lazy| (lazy.name, lazy.about(), lazy.quick));
    let calls = measures::overhead::WORKLOADS.iter().map(|work| (work.name, work.about.to_string(), true));
    programs.chain(lazy).chain(calls).collect()
}

fn after_help() -> String {
    let mut text = String::from("Workloads (* also with --quick):\n");
    for (name, about, quick) in workloads() {
        text += &format!("  {} {name:<24} {about}\n", if quick { '*' } else { ' ' });
    }
    text + "\nExamples:
  ckpt-bench --quick
  ckpt-bench --workloads 'memory-1g-*' --peers criu --images /dev/shm
  ckpt-bench compare before/bench.json target/bench/bench.json

benches/peers.sh fetches CRIU. benches/README.md says how each number is taken, and what it does not show."
}

fn one_of(kind: &str, name: &str, known: &[&'static str]) -> Result<&'static str, String> {
    let found = known.iter().find(|known| **known == name);
    found.copied().ok_or_else(|| format!("there is no {kind} {name}; known are: {}", known.join(", ")))
}

fn backend(name: &str) -> Result<&'static str, String> {
    one_of("backend", name, &[tools::BACKENDS, &["none"]].concat())
}

fn peer(name: &str) -> Result<&'static str, String> {
    one_of("peer", name, &[tools::PEERS, &["none"]].concat())
}

fn workload(name: &str) -> Result<Names, String> {
    let known: Vec<&'static str> = workloads().into_iter().map(|(name, ..)| name).collect();
    if let Some(start) = name.strip_suffix('*') {
        let found: Vec<_> = known.iter().copied().filter(|known| known.starts_with(start)).collect();
        if !found.is_empty() {
            return Ok(Names(found));
        }
    }
    one_of("workload", name, &known).map(|name| Names(vec![name]))
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds > 0.0 && seconds <= 86_400.0 => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("a number of seconds above 0 and up to 86400".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn names_are_unique_and_stars_choose() {
        let mut names: Vec<_> = workloads().into_iter().map(|(name, ..)| name).collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
        assert!(workload("memory-*").unwrap().0.len() > 2);
        let error = workload("memry-*").unwrap_err();
        assert!(error.contains("no workload memry-*") && error.contains("tiny"), "{error}");
        assert!(backend("ptrac").unwrap_err().contains("ptrace"));
        assert!(peer("krium").unwrap_err().contains("criu"));
    }
}
