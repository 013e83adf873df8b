//! What a run of the benchmarks found, as it stands in the JSON file.
//!
//! `version` is raised when a field changes its meaning; [`read`] refuses what it does not know.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::statistics::{Estimate, Summary};

pub const FORMAT: &str = "ckpt-bench";
pub const VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub format: String,
    pub version: u32,
    pub ckpt: String,
    pub host: Host,
    pub settings: Settings,
    /// Seconds since 1970.
    pub started: u64,
    /// Seconds.
    pub took: f64,
    pub tools: Vec<ToolFacts>,
    /// What was asked for and not run, and why.
    pub skipped: Vec<Skipped>,
    pub null: Option<Null>,
    pub rows: Vec<Row>,
    pub ratios: Vec<Ratio>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Host {
    pub kernel: String,
    pub cpu: String,
    pub cores: usize,
    /// Bytes.
    pub memory: u64,
    /// Of the place where images are written.
    pub file_system: String,
    pub huge_pages: String,
    pub root: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    pub quick: bool,
    pub runs: usize,
    /// Seconds for the rounds of a workload.
    pub within: f64,
    /// Seconds for one command.
    pub timeout: f64,
}

/// A way to checkpoint: a backend or a peer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ToolFacts {
    pub name: String,
    pub version: Option<String>,
    /// Why it was not run.
    pub absent: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Skipped {
    pub what: String,
    pub why: String,
}

/// What the driver adds to the time of a command: the same command, run by it and run bare, in turn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Null {
    /// Milliseconds.
    pub driver: Summary,
    pub bare: Summary,
    /// Driver to bare.
    pub ratio: Estimate,
    /// KiB that the driver shows for a command that needs nothing: no peak can be below.
    pub memory_floor: f64,
}

/// What is compared: rows of one group, workload and measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Group {
    /// Dump and restore.
    Cycle,
    /// Restores with the memory still in the image.
    Lazy,
    /// What a program costs more while it can be saved.
    Overhead,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub group: Group,
    pub workload: String,
    pub tool: String,
    /// Bytes of memory that the workload has touched; 0 where that is not what it is about.
    #[serde(default)]
    pub size: u64,
    /// Why its numbers do not count.
    pub failed: Option<String>,
    /// By name: `dump`, `restore`, ...
    pub measures: BTreeMap<String, Measure>,
    /// By name: quantiles of what was pooled over all rounds.
    #[serde(default)]
    pub distributions: BTreeMap<String, Distribution>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measure {
    pub unit: Unit,
    /// In the order of the rounds.
    pub samples: Vec<f64>,
    pub summary: Summary,
}

/// Pairs of a quantile (0 to 1) and the value there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Distribution {
    pub unit: Unit,
    pub count: usize,
    pub points: Vec<(f64, f64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unit {
    #[serde(rename = "ms")]
    Milliseconds,
    #[serde(rename = "us")]
    Microseconds,
    #[serde(rename = "ns")]
    Nanoseconds,
    #[serde(rename = "MiB")]
    Mebibytes,
    #[serde(rename = "KiB")]
    Kibibytes,
    /// How many.
    #[serde(rename = "")]
    Count,
}

/// How many times what `baseline` takes `tool` takes, from paired rounds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    pub group: Group,
    pub workload: String,
    pub measure: String,
    pub tool: String,
    pub baseline: String,
    pub estimate: Estimate,
}

impl Unit {
    pub fn name(self) -> &'static str {
        match self {
            Unit::Milliseconds => "ms",
            Unit::Microseconds => "us",
            Unit::Nanoseconds => "ns",
            Unit::Mebibytes => "MiB",
            Unit::Kibibytes => "KiB",
            Unit::Count => "",
        }
    }
}

impl Record {
    /// Whether everything of ckpt itself that was run has numbers that count, but for what it refused beforehand.
    pub fn is_good(&self) -> bool {
        let ours = |row: &&Row| !matches!(row.tool.as_str(), "criu" | "criu-lazy" | "dmtcp");
        self.rows.iter().filter(ours).all(|row| row.failed.as_deref().is_none_or(is_refusal))
    }

    pub fn row(&self, group: Group, workload: &str, tool: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.group == group && row.workload == workload && row.tool == tool)
    }

    pub fn to_json(&self) -> Result<String, String> {
        serde_json::to_string_pretty(self).map(|text| text + "\n").map_err(|error| format!("writing JSON: {error}"))
    }
}

const REFUSED: &str = "refused: ";

/// ckpt said beforehand that it does not do that: the row has no number, but nothing went wrong.
pub fn refusal(reason: &str) -> String {
    format!("{REFUSED}{reason}")
}

pub fn is_refusal(failure: &str) -> bool {
    failure.starts_with(REFUSED)
}

/// # Errors
/// A line that says which file, what is wrong with it, and what to do.
pub fn read(path: &Path) -> Result<Record, String> {
    let name = path.display();
    let text = std::fs::read_to_string(path).map_err(|error| format!("{name} cannot be read: {error}"))?;
    let value: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| format!("{name} is not JSON ({error}); give a bench.json"))?;
    if value.get("format").and_then(|format| format.as_str()) != Some(FORMAT) {
        return Err(format!("{name} is not from ckpt-bench; give a bench.json"));
    }
    match value.get("version").and_then(serde_json::Value::as_u64) {
        Some(version) if version == u64::from(VERSION) => {}
        version => {
            let version = version.map_or("unknown".into(), |version| version.to_string());
            return Err(format!("{name} is of version {version} and this program knows {VERSION}; measure anew"));
        }
    }
    serde_json::from_value(value).map_err(|error| format!("{name} is damaged: {error}; measure anew"))
}
