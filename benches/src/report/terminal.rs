//! Tables in the terminal.

use super::number;
use crate::record::{Group, Null, Ratio, Record, Row, Skipped, ToolFacts};

/// The measures of each group that the terminal shows, in their order; JSON and HTML have all.
const SHOWN: &[(Group, &[&str])] = &[
    (
        Group::Cycle,
        &[
            "dump",
            "dump-durable",
            "freeze",
            "behind",
            "restore",
            "answer",
            "image",
            "dump-peak",
            "restore-peak",
            "refused-at-first",
        ],
    ),
    (Group::Lazy, &["ping", "first-get", "get-p99", "all-pages", "fault-p50", "fault-p99", "request-faults"]),
    (Group::Overhead, &["time", "memory"]),
];

pub fn tools(facts: &[ToolFacts]) -> String {
    let mut text = String::new();
    for facts in facts {
        let said = match (&facts.absent, &facts.version) {
            (Some(why), _) => format!("absent: {why}"),
            (None, Some(version)) => version.clone(),
            (None, None) => "present".into(),
        };
        text += &format!("{:<10} {said}\n", facts.name);
    }
    text
}

pub fn null(null: &Null) -> String {
    let (estimate, percent) = (null.ratio, |ratio: f64| (ratio - 1.0) * 100.0);
    format!(
        "\nnull: the driver adds {:+.2} % [{:+.2}, {:+.2}] to a command of {} ms; no peak can be below {} KiB\n",
        percent(estimate.value),
        percent(estimate.low),
        percent(estimate.high),
        number(null.bare.median),
        number(null.memory_floor)
    )
}

pub fn skipped(skipped: &[Skipped]) -> String {
    skipped.iter().map(|skipped| format!("{}: skipped: {}\n", skipped.what, skipped.why)).collect()
}

/// A table for each workload: a line for each tool.
pub fn rows(rows: &[Row], ratios: &[Ratio]) -> String {
    let mut text = String::new();
    let mut at = 0;
    while at < rows.len() {
        let (group, workload) = (rows[at].group, &rows[at].workload);
        let same = rows[at..].iter().take_while(|row| row.group == group && row.workload == *workload).count();
        text += &table(&rows[at..at + same], ratios);
        at += same;
    }
    text
}

fn table(rows: &[Row], ratios: &[Ratio]) -> String {
    let (group, workload) = (rows[0].group, &rows[0].workload);
    let all = SHOWN.iter().find(|(shown, _)| *shown == group).map_or(&[][..], |(_, measures)| measures);
    let shown: Vec<&str> =
        all.iter().copied().filter(|name| rows.iter().any(|row| row.measures.contains_key(*name))).collect();
    let runs = rows.iter().flat_map(|row| row.measures.values()).map(|measure| measure.samples.len());
    let mut lines = vec![vec![format!("{workload} ({} rounds)", runs.max().unwrap_or(0))]];
    lines[0].extend(shown.iter().map(|name| {
        let unit = rows.iter().find_map(|row| row.measures.get(*name)).map_or("", |measure| measure.unit.name());
        format!("{name} {unit}")
    }));
    let mut failures = String::new();
    for row in rows {
        if let Some(failure) = &row.failed {
            let failure =
                if crate::record::is_refusal(failure) { failure.clone() } else { format!("failed: {failure}") };
            failures += &format!("  {:<10} {failure}\n", row.tool);
            continue;
        }
        let mut line = vec![format!("  {}", row.tool)];
        for name in &shown {
            line.push(match row.measures.get(*name) {
                None => "-".into(),
                Some(measure) => {
                    let summary = &measure.summary;
                    let (low, high) = (number(summary.low), number(summary.high));
                    format!("{} [{low}, {high}]{}", number(summary.median), ratio(row, name, ratios))
                }
            });
        }
        lines.push(line);
    }
    if lines.len() == 1 {
        lines[0].truncate(1);
    }
    let widths: Vec<usize> = (0..lines[0].len())
        .map(|column| {
            lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    let mut text = String::from("\n");
    for line in &lines {
        for (column, cell) in line.iter().enumerate() {
            let width = widths[column];
            text += &if column == 0 { format!("{cell:<width$}") } else { format!("  {cell:>width$}") };
        }
        text = text.trim_end().to_string() + "\n";
    }
    text + &failures
}

/// How many times the baseline's, where that is known.
fn ratio(row: &Row, measure: &str, ratios: &[Ratio]) -> String {
    let found = ratios.iter().find(|ratio| {
        ratio.group == row.group && ratio.workload == row.workload && ratio.measure == measure && ratio.tool == row.tool
    });
    found.map_or(String::new(), |ratio| format!(" {}x", number(ratio.estimate.value)))
}

/// What does not count, again at the end, where it is not overlooked.
pub fn closing(record: &Record) -> String {
    let failed: Vec<_> = record.rows.iter().filter(|row| row.failed.is_some()).collect();
    let rows = record.rows.len() - failed.len();
    let mut text = format!(
        "\n{rows} rows, {} without numbers, {} skipped; [95 % interval of the median], x: times what ptrace (cycle), \
         userfault (lazy), native (overhead) took\n",
        failed.len(),
        record.skipped.len()
    );
    for row in failed {
        text += &format!("  {} {}: {}\n", row.workload, row.tool, row.failed.as_deref().unwrap_or(""));
    }
    text + &skipped(&record.skipped)
}
