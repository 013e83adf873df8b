//! Two runs: what became slower or larger, faster or smaller, as far as their intervals do not meet.

use crate::record::{Record, Row};
use crate::report::number;
use crate::statistics::Summary;

/// How far apart the intervals of two runs have to be. What changes from run to run and not from round to round, as where
/// memory comes to lie and how fast the host is just now, is in neither of them; and of several hundred measures with 95 %
/// each, some do not meet by chance.
const LEAST: f64 = 0.05;

pub fn text(before: &Record, after: &Record) -> String {
    let mut text = String::new();
    if before.host != after.host {
        text += "note: the machines, kernels or file systems are not the same:\n";
        text += &format!("  before {:?}\n  after  {:?}\n", before.host, after.host);
    }
    if let (Some(before), Some(after)) = (&before.null, &after.null) {
        let change = after.bare.median / before.bare.median;
        text += &format!("the null command took {}x of before: how much the machine itself changed\n", number(change));
    }
    let (mut worse, mut better, mut same) = (Vec::new(), Vec::new(), 0);
    for row in &after.rows {
        let Some(old) = before.row(row.group, &row.workload, &row.tool) else {
            text += &format!("new: {} {}\n", row.workload, row.tool);
            continue;
        };
        match (&old.failed, &row.failed) {
            (None, Some(why)) => text += &format!("fails now: {} {}: {why}\n", row.workload, row.tool),
            (Some(_), None) => text += &format!("works now: {} {}\n", row.workload, row.tool),
            _ => {}
        }
        for (name, measure) in &row.measures {
            let Some(other) = old.measures.get(name) else { continue };
            let summaries = Summary::of(&other.samples).zip(Summary::of(&measure.samples));
            let Some((before, after)) = summaries else { continue };
            let ratio = after.median / before.median;
            let line = || line(row, name, &before, &after, measure.unit.name());
            if after.low > before.high * (1.0 + LEAST) {
                worse.push((ratio, line()));
            } else if after.high * (1.0 + LEAST) < before.low {
                better.push((ratio, line()));
            } else {
                same += 1;
            }
        }
    }
    for old in &before.rows {
        if after.row(old.group, &old.workload, &old.tool).is_none() {
            text += &format!("not run any more: {} {}\n", old.workload, old.tool);
        }
    }
    worse.sort_by(|a, b| b.0.total_cmp(&a.0));
    better.sort_by(|a, b| a.0.total_cmp(&b.0));
    for (title, lines) in [("slower or larger", &worse), ("faster or smaller", &better)] {
        text += &format!("\n{title}: {}\n", lines.len());
        text.extend(lines.iter().map(|(_, line)| line.as_str()));
    }
    text + &format!("\nintervals that meet, or less than {:.0} % apart: {same}\n", LEAST * 100.0)
}

fn line(row: &Row, measure: &str, before: &Summary, after: &Summary, unit: &str) -> String {
    let shown =
        |summary: &Summary| format!("{} [{}, {}]", number(summary.median), number(summary.low), number(summary.high));
    format!(
        "  {:<26} {:<10} {:<16} {:>22} -> {:>22} {unit:<5} {}x\n",
        row.workload,
        row.tool,
        measure,
        shown(before),
        shown(after),
        number(after.median / before.median),
    )
}
