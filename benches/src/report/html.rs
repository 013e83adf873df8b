//! The report: one file with everything in it, plots and tables, for wide and narrow screens, light and dark.

use std::collections::BTreeMap;

use super::number;
use super::svg::{Axis, Bar, Line, Scale, bars, escape, lines};
use crate::record::{Group, Record, Row};

pub fn page(record: &Record) -> String {
    let mut body = String::from("<h1>Ways to checkpoint, side by side</h1>\n");
    body += &facts(record);
    body += &tools(record);
    body += &cycle(record);
    body += &sizes(record);
    body += &lazy(record);
    body += &overhead(record);
    body += &without_numbers(record);
    body += &ratios(record);
    body += &everything(record);
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>ckpt benchmarks</title>\n<style>\n{}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n",
        include_str!("report.css")
    )
}

fn facts(record: &Record) -> String {
    let (host, settings) = (&record.host, &record.settings);
    let mut text = format!(
        "<p>{}; kernel {}; {}, {} cores, {:.0} GiB; images on {}; huge pages: {}. Up to {} rounds in turn, {:.0} s a workload{}. \
         It took {:.0} s.</p>\n",
        escape(&record.ckpt),
        escape(&host.kernel),
        escape(&host.cpu),
        host.cores,
        host.memory as f64 / f64::from(1 << 30),
        escape(&host.file_system),
        escape(&host.huge_pages),
        settings.runs,
        settings.within,
        if settings.quick { ", the quick choice of workloads" } else { "" },
        record.took
    );
    if let Some(null) = &record.null {
        let percent = |ratio: f64| format!("{:+.2} %", (ratio - 1.0) * 100.0);
        text += &format!(
            "<p>The driver itself adds {} (95 % interval {} to {}) to a command of {} ms.</p>\n",
            percent(null.ratio.value),
            percent(null.ratio.low),
            percent(null.ratio.high),
            number(null.bare.median)
        );
    }
    text + "<p>Bars are medians, thick lines 95 % intervals of the median, thin lines the spread of all rounds. \
            All tools did the same work in turn; a program that did not go on has no number.</p>\n"
}

fn tools(record: &Record) -> String {
    let mut text = String::from("<ul class=\"tools\">\n");
    for tool in &record.tools {
        let said = match (&tool.absent, &tool.version) {
            (Some(why), _) => format!("absent: {why}"),
            (None, version) => version.clone().unwrap_or_default(),
        };
        text += &format!("<li><b class=\"tool-{0}\">{0}</b> {1}</li>\n", escape(&tool.name), escape(&said));
    }
    text + "</ul>\n"
}

/// The workloads of a group, in the order of the rows.
fn workloads(record: &Record, group: Group) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for row in record.rows.iter().filter(|row| row.group == group) {
        if !names.contains(&row.workload.as_str()) {
            names.push(&row.workload);
        }
    }
    names
}

/// A plot of bars for each workload, of one measure. Empty where nobody has it.
fn bar_plots(record: &Record, group: Group, measure: &str) -> String {
    let mut text = String::new();
    for workload in workloads(record, group) {
        let rows = record.rows.iter().filter(|row| row.group == group && row.workload == workload);
        let mut unit = "";
        let found: Vec<Bar> = rows
            .filter_map(|row| {
                let measure = row.measures.get(measure)?;
                unit = measure.unit.name();
                let summary = measure.summary;
                let (low, high, min, max) = (summary.low, summary.high, summary.min, summary.max);
                Some(Bar { tool: row.tool.clone(), median: summary.median, low, high, min, max })
            })
            .collect();
        if !found.is_empty() {
            text += &bars(workload, unit, &found);
        }
    }
    text
}

fn section(title: &str, about: &str, plots: &str) -> String {
    if plots.is_empty() {
        return String::new();
    }
    let (title, about) = (escape(title), escape(about));
    format!("<section>\n<h2>{title}</h2>\n<p>{about}</p>\n<div class=\"plots\">\n{plots}</div>\n</section>\n")
}

fn cycle(record: &Record) -> String {
    let plots = |measure| bar_plots(record, Group::Cycle, measure);
    [
        section("Dump", "Wall time of the whole command. ckpt ends when the image is on its medium.", &plots("dump")),
        section(
            "Dump, on the medium",
            "The same until all files of the image are synced, for those that leave that to the kernel.",
            &plots("dump-durable"),
        ),
        section(
            "Freeze",
            "How long a program that goes on stood still, as it saw that itself: the largest gap between two of its time stamps.",
            &plots("freeze"),
        ),
        section("Restore", "Wall time of the whole command.", &plots("restore")),
        section(
            "Time to the first answer",
            "From the start of the restore command until the program has answered out of its memory.",
            &plots("answer"),
        ),
        section("Image", "What its files take on the medium.", &plots("image")),
        section("Peak memory of the dump", "Of the command, its largest process; what the program itself writes is not in it.", &plots("dump-peak")),
        section("CPU time of the dump", "Of the command and what it waited for; not of the program.", &plots("dump-cpu")),
    ]
    .concat()
}

/// Time against the size of the memory, a plot for each kind of memory.
fn sizes(record: &Record) -> String {
    let mut plots = String::new();
    for measure in ["dump", "freeze", "restore", "answer"] {
        type Points<'a> = BTreeMap<&'a str, Vec<(f64, f64)>>;
        let mut kinds: BTreeMap<String, Points<'_>> = BTreeMap::new();
        for row in record.rows.iter().filter(|row| row.group == Group::Cycle) {
            let Some((_, kind)) = row.workload.strip_prefix("memory-").and_then(|rest| rest.split_once('-')) else {
                continue;
            };
            let Some(measure) = row.measures.get(measure) else { continue };
            let point = (row.size as f64 / f64::from(1 << 20), measure.summary.median);
            kinds.entry(kind.into()).or_default().entry(&row.tool).or_default().push(point);
        }
        for (kind, tools) in kinds {
            let several = tools.into_iter().filter(|(_, points)| points.len() > 1);
            let all: Vec<Line> = several
                .map(|(tool, mut points)| {
                    points.sort_by(|a, b| a.0.total_cmp(&b.0));
                    Line { tool: tool.into(), points }
                })
                .collect();
            if !all.is_empty() {
                let horizontal = Axis { name: "MiB of memory", scale: Scale::Logarithmic, text: &number };
                let vertical = Axis { name: "ms", scale: Scale::Logarithmic, text: &number };
                plots += &lines(&format!("{measure}, {kind} memory"), &horizontal, &vertical, &all);
            }
        }
    }
    section("Time against size", "Both axes are logarithmic.", &plots)
}

fn lazy(record: &Record) -> String {
    let mut distributions = String::new();
    for workload in workloads(record, Group::Lazy) {
        let rows = record.rows.iter().filter(|row| row.group == Group::Lazy && row.workload == workload);
        let mut by_name: BTreeMap<&str, Vec<Line>> = BTreeMap::new();
        for row in rows {
            for (name, distribution) in &row.distributions {
                let points = distribution.points.iter().map(|(share, value)| (*value, share * 100.0)).collect();
                by_name.entry(name).or_default().push(Line { tool: row.tool.clone(), points });
            }
        }
        for (name, all) in by_name {
            let horizontal = Axis { name: "us, logarithmic", scale: Scale::Logarithmic, text: &number };
            let percent = |value: f64| format!("{value:.0} %");
            let vertical = Axis { name: "answered within", scale: Scale::Linear, text: &percent };
            distributions += &lines(&format!("{workload}: {name}"), &horizontal, &vertical, &all);
        }
    }
    let plots = |measure| bar_plots(record, Group::Lazy, measure);
    [
        section("Lazy restore: first PING", "From the start of the restore command.", &plots("ping")),
        section("Lazy restore: first GET", "The same, of a key out of the memory that was saved.", &plots("first-get")),
        section(
            "Lazy restore: GET while loading",
            "99 of 100 random GETs on one connection were answered within this, while memory came in.",
            &plots("get-p99"),
        ),
        section("Latency distribution", "GETs while memory came in, of all rounds together.", &distributions),
        section("Lazy restore: all pages in", "From the start of the restore command.", &plots("all-pages")),
    ]
    .concat()
}

fn overhead(record: &Record) -> String {
    let plots = bar_plots(record, Group::Overhead, "time") + &bar_plots(record, Group::Overhead, "memory");
    section(
        "Run-time overhead",
        "The same program, or one call of it, as it is and started so that it can be saved later.",
        &plots,
    )
}

fn without_numbers(record: &Record) -> String {
    let mut lines = String::new();
    for row in record.rows.iter() {
        if let Some(failure) = &row.failed {
            let (workload, tool) = (escape(&row.workload), escape(&row.tool));
            lines += &format!("<tr><td>{workload}</td><td>{tool}</td><td>{}</td></tr>\n", escape(failure));
        }
    }
    for skipped in &record.skipped {
        lines += &format!(
            "<tr><td>{}</td><td></td><td>skipped: {}</td></tr>\n",
            escape(&skipped.what),
            escape(&skipped.why)
        );
    }
    if lines.is_empty() {
        return String::new();
    }
    format!(
        "<section>\n<h2>Without numbers</h2>\n<div class=\"scroll\"><table class=\"reasons\">\n{lines}</table></div>\n</section>\n"
    )
}

fn ratios(record: &Record) -> String {
    if record.ratios.is_empty() {
        return String::new();
    }
    let mut text = String::from(
        "<section>\n<h2>Ratios</h2>\n<p>Of paired rounds, with their 95 % intervals: how many times as much.</p>\n\
         <details><summary>All ratios</summary>\n<div class=\"scroll\"><table>\n\
         <tr><th>workload<th>measure<th>tool<th>to<th>ratio<th>interval</tr>\n",
    );
    for ratio in &record.ratios {
        let estimate = ratio.estimate;
        text += &format!(
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td class=\"n\">{}</td><td class=\"n\">{} to {}</td></tr>\n",
            escape(&ratio.workload),
            escape(&ratio.measure),
            escape(&ratio.tool),
            escape(&ratio.baseline),
            number(estimate.value),
            number(estimate.low),
            number(estimate.high)
        );
    }
    text + "</table></div></details>\n</section>\n"
}

fn everything(record: &Record) -> String {
    let mut text = String::from(
        "<section>\n<h2>All numbers</h2>\n<details><summary>Every measure of every row</summary>\n\
         <div class=\"scroll\"><table>\n\
         <tr><th>workload<th>tool<th>measure<th>median<th>interval<th>spread<th>unit<th>rounds</tr>\n",
    );
    let told = |row: &Row| -> String {
        let mut text = String::new();
        for (name, measure) in &row.measures {
            let summary = measure.summary;
            text += &format!(
                "<tr><td>{}</td><td>{}</td><td>{}</td><td class=\"n\">{}</td><td class=\"n\">{} to {}</td>\
                 <td class=\"n\">{} to {}</td><td>{}</td><td class=\"n\">{}</td></tr>\n",
                escape(&row.workload),
                escape(&row.tool),
                escape(name),
                number(summary.median),
                number(summary.low),
                number(summary.high),
                number(summary.min),
                number(summary.max),
                measure.unit.name(),
                measure.samples.len()
            );
        }
        text
    };
    text.extend(record.rows.iter().map(told));
    text + "</table></div></details>\n</section>\n"
}
