//! What is measured, each in rounds: every tool in turn, again and again, so that what disturbs one disturbs all.

pub mod calls;
pub mod cycle;
pub mod lazy;
pub mod null;
pub mod overhead;
pub mod working_set;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::record::{Distribution, Group, Measure, Ratio, Row, Unit};
use crate::statistics::{Summary, paired_ratio, quantile};
use crate::tools::Tool;

/// What all measurements share.
pub struct Bench {
    pub tools: Vec<Box<dyn Tool>>,
    /// On the medium to measure.
    pub images: PathBuf,
    pub limits: Limits,
    pub timeout: Duration,
}

/// When a comparison has enough.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub rounds: usize,
    /// No new round is begun after so much, but for the first three.
    pub within: Duration,
    /// Rounds in a pass.
    pub at_once: usize,
}

/// What one round of one tool gave.
#[derive(Default)]
pub struct Samples {
    pub values: Vec<(&'static str, Unit, f64)>,
    /// To be pooled over the rounds.
    pub pooled: Vec<(&'static str, Unit, Vec<f64>)>,
}

impl Samples {
    pub fn add(&mut self, name: &'static str, unit: Unit, value: f64) {
        self.values.push((name, unit, value));
    }

    pub fn add_time(&mut self, name: &'static str, time: Duration) {
        self.add(name, Unit::Milliseconds, time.as_secs_f64() * 1e3);
    }
}

/// One of those that take turns: its name, and what it does in a round.
pub type Turn<'a> = (String, Box<dyn FnMut() -> Result<Samples, String> + 'a>);

/// Rounds that are begun whatever the time-box says.
const LEAST: usize = 3;

/// What a comparison is of.
pub struct Subject {
    pub group: Group,
    pub workload: String,
    /// Bytes of memory that it has touched, or 0.
    pub size: u64,
    /// The one to which all others are set in relation.
    pub baseline: &'static str,
}

/// Those that take turns at one workload, and what they gave so far.
///
/// Its rounds are not run in one go: a machine changes within minutes, and what a round does not see its interval does not
/// have. All comparisons of a run take their turns, pass after pass.
pub struct Comparison<'a> {
    pub subject: Subject,
    limits: Limits,
    turns: Vec<Turn<'a>>,
    results: Vec<Result<Vec<Samples>, String>>,
    /// With the one to warm up.
    rounds: usize,
    spent: Duration,
}

impl<'a> Comparison<'a> {
    pub fn new(subject: Subject, limits: Limits, turns: Vec<Turn<'a>>) -> Comparison<'a> {
        let results = turns.iter().map(|_| Ok(Vec::new())).collect();
        Comparison { subject, limits, turns, results, rounds: 0, spent: Duration::ZERO }
    }

    /// Has each take its turn: the first time to warm up, then as often as a pass has rounds.
    pub fn pass(&mut self) {
        for _ in 0..if self.rounds == 0 { 1 } else { self.limits.at_once } {
            if !self.is_done() {
                self.round();
            }
        }
    }

    fn round(&mut self) {
        let begun = Instant::now();
        // Each begins as often as any other.
        for turn in 0..self.turns.len() {
            let turn = (turn + self.rounds) % self.turns.len();
            let Ok(samples) = &mut self.results[turn] else { continue };
            match (self.turns[turn].1)() {
                Ok(_) if self.rounds == 0 => {}
                Ok(sample) => samples.push(sample),
                Err(failure) => self.results[turn] = Err(failure),
            }
        }
        if self.rounds > 0 {
            self.spent += begun.elapsed();
        }
        self.rounds += 1;
    }

    pub fn is_done(&self) -> bool {
        self.rounds > self.limits.rounds
            || self.rounds > LEAST && self.spent > self.limits.within
            || self.results.iter().all(Result::is_err)
    }

    /// What came of it.
    pub fn found(&self) -> (Vec<Row>, Vec<Ratio>) {
        let Subject { group, workload, size, baseline } = &self.subject;
        let turns = self.turns.iter().zip(&self.results);
        let rows: Vec<_> = turns.map(|((tool, _), result)| row(*group, workload, tool, *size, result)).collect();
        let ratios = ratios(&rows, baseline);
        (rows, ratios)
    }
}

/// A row of what a tool's rounds gave.
fn row(group: Group, workload: &str, tool: &str, size: u64, result: &Result<Vec<Samples>, String>) -> Row {
    let mut row = Row {
        group,
        workload: workload.into(),
        tool: tool.into(),
        size,
        failed: None,
        measures: BTreeMap::new(),
        distributions: BTreeMap::new(),
    };
    let rounds = match result {
        Ok(rounds) => rounds,
        Err(failure) => {
            row.failed = Some(failure.clone());
            return row;
        }
    };
    let mut values: BTreeMap<&str, (Unit, Vec<f64>)> = BTreeMap::new();
    let mut pooled: BTreeMap<&str, (Unit, Vec<f64>)> = BTreeMap::new();
    for round in rounds {
        for (name, unit, value) in &round.values {
            values.entry(name).or_insert((*unit, Vec::new())).1.push(*value);
        }
        for (name, unit, more) in &round.pooled {
            pooled.entry(name).or_insert((*unit, Vec::new())).1.extend(more);
        }
    }
    for (name, (unit, samples)) in values {
        if let Some(summary) = Summary::of(&samples) {
            row.measures.insert(name.into(), Measure { unit, samples, summary });
        }
    }
    for (name, (unit, samples)) in pooled.into_iter().filter(|(_, (_, samples))| !samples.is_empty()) {
        let shares = (0..=90).step_by(5).map(|share| share as f64 / 100.0).chain([0.95, 0.99, 0.995, 0.999, 1.0]);
        let mut sorted = samples;
        sorted.sort_by(f64::total_cmp);
        let points = shares.map(|share| (share, quantile(&sorted, share))).collect();
        row.distributions.insert(name.into(), Distribution { unit, count: sorted.len(), points });
    }
    row
}

/// The ratios of every tool to the baseline, of all measures that both have in every round.
fn ratios(rows: &[Row], baseline: &str) -> Vec<Ratio> {
    let mut found = Vec::new();
    for row in rows.iter().filter(|row| row.tool != baseline && row.failed.is_none()) {
        let same = |other: &&Row| other.tool == baseline && other.workload == row.workload && other.failed.is_none();
        let Some(base) = rows.iter().find(same) else { continue };
        for (name, measure) in &row.measures {
            let Some(other) = base.measures.get(name).filter(|other| other.samples.len() == measure.samples.len())
            else {
                continue;
            };
            if let Some(estimate) = paired_ratio(&measure.samples, &other.samples) {
                found.push(Ratio {
                    group: row.group,
                    workload: row.workload.clone(),
                    measure: name.clone(),
                    tool: row.tool.clone(),
                    baseline: baseline.into(),
                    estimate,
                });
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_interleaved_and_the_first_is_to_warm_up() {
        let log = std::cell::RefCell::new(String::new());
        let turn = |name: &'static str| -> Turn<'_> {
            let log = &log;
            let work = move || {
                log.borrow_mut().push_str(name);
                let mut samples = Samples::default();
                samples.add("n", Unit::Count, log.borrow().len() as f64);
                if name == "c" && log.borrow().len() > 6 { Err("no more".into()) } else { Ok(samples) }
            };
            (name.to_string(), Box::new(work))
        };
        let mut turns = comparison(Limits { rounds: 3, ..ONE_GO }, vec![turn("a"), turn("b"), turn("c")]);
        while !turns.is_done() {
            turns.pass();
        }
        assert_eq!(*log.borrow(), "abcbcacabab", "rounds: abc, bca, cab (c fails), ab");
        assert_eq!(turns.results[0].as_ref().map(Vec::len), Ok(3));
        assert_eq!(turns.results[2].as_ref().err().map(String::as_str), Some("no more"));
        let (rows, _) = turns.found();
        assert_eq!((rows.len(), rows[2].failed.as_deref()), (3, Some("no more")));
    }

    const ONE_GO: Limits = Limits { rounds: 1000, within: Duration::from_secs(60), at_once: 2 };

    fn comparison(limits: Limits, turns: Vec<Turn<'_>>) -> Comparison<'_> {
        Comparison::new(Subject { group: Group::Cycle, workload: "w".into(), size: 0, baseline: "a" }, limits, turns)
    }

    #[test]
    fn a_time_box_ends_the_rounds_but_the_first_three() {
        let nap = || {
            std::thread::sleep(Duration::from_millis(2));
            Ok(Samples::default())
        };
        let limits = Limits { within: Duration::from_millis(1), ..ONE_GO };
        let mut turns = comparison(limits, vec![("a".into(), Box::new(nap))]);
        turns.pass();
        assert_eq!(turns.rounds, 1, "the one to warm up is a pass");
        turns.pass();
        assert_eq!(turns.rounds, 3);
        while !turns.is_done() {
            turns.pass();
        }
        assert_eq!(turns.results[0].as_ref().map(Vec::len), Ok(LEAST));
    }

    #[test]
    fn where_all_have_failed_nothing_is_left_to_do() {
        let mut turns = comparison(ONE_GO, vec![("a".into(), Box::new(|| Err("no".into())))]);
        turns.pass();
        assert!(turns.is_done());
    }
}
