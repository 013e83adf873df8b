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

use crate::record::{Distribution, Group, Measure, Ratio, Row, Skipped, Unit};
use crate::statistics::{Summary, paired_ratio, quantile};
use crate::tools::Tool;

/// What all measurements share.
pub struct Bench {
    pub tools: Vec<Box<dyn Tool>>,
    /// On the medium to measure.
    pub images: PathBuf,
    pub rounds: usize,
    pub within: Duration,
    pub timeout: Duration,
    pub rows: Vec<Row>,
    pub ratios: Vec<Ratio>,
    pub skipped: Vec<Skipped>,
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

/// Has all take turns: one round to warm up, then those that count, until there are enough or the time is up.
pub fn take_turns(rounds: usize, within: Duration, turns: &mut [Turn<'_>]) -> Vec<Result<Vec<Samples>, String>> {
    let mut results: Vec<Result<Vec<Samples>, String>> = turns.iter().map(|_| Ok(Vec::new())).collect();
    let mut begun = Instant::now();
    for round in 0..=rounds {
        if round > LEAST && begun.elapsed() > within {
            break;
        }
        // Each begins as often as any other.
        for turn in 0..turns.len() {
            let turn = (turn + round) % turns.len();
            let Ok(samples) = &mut results[turn] else { continue };
            match (turns[turn].1)() {
                Ok(_) if round == 0 => {}
                Ok(sample) => samples.push(sample),
                Err(failure) => results[turn] = Err(failure),
            }
        }
        if round == 0 {
            begun = Instant::now();
        }
    }
    results
}

/// A row of what a tool's rounds gave.
pub fn row(group: Group, workload: &str, tool: &str, size: u64, result: &Result<Vec<Samples>, String>) -> Row {
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
pub fn ratios(rows: &[Row], baseline: &str) -> Vec<Ratio> {
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
        let results = take_turns(3, Duration::from_secs(60), &mut [turn("a"), turn("b"), turn("c")]);
        assert_eq!(*log.borrow(), "abcbcacabab", "rounds: abc, bca, cab (c fails), ab");
        assert_eq!(results[0].as_ref().map(Vec::len), Ok(3));
        assert_eq!(results[2].as_ref().err().map(String::as_str), Some("no more"));
    }

    #[test]
    fn a_time_box_ends_the_rounds_but_the_first_three() {
        let nap = || {
            std::thread::sleep(Duration::from_millis(2));
            Ok(Samples::default())
        };
        let results = take_turns(1000, Duration::from_millis(1), &mut [("a".into(), Box::new(nap))]);
        assert_eq!(results[0].as_ref().map(Vec::len), Ok(LEAST));
    }
}
