//! What a lazy restore did, in numbers.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What the pager tells at its end. Times are in microseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// From the start of the restore until the tree ran.
    pub release_us: u64,
    /// From the start of the restore until all memory was there, or nobody was left who could want it.
    pub complete_us: u64,
    /// From the release until then.
    pub sweep_us: u64,
    /// Pages that threads waited for.
    pub faults: u64,
    /// Of these, pages of zeros: not in the image.
    pub zero_faults: u64,
    /// From when the pager learned of a fault until it had put the page there.
    pub fault_latency_us: Percentiles,
    pub pages: Sources,
    /// How long it took to bring in the working set, before the release.
    pub working_set_us: u64,
    /// The working set is the guess of the dump: nothing was recorded.
    pub working_set_guessed: bool,
    /// Why a working set that is there was not used, or was not recorded.
    pub working_set_trouble: Option<String>,
    /// Of a recording.
    pub recorded: Option<Recorded>,
}

/// What a recording of the working set found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Recorded {
    /// Pages that were touched.
    pub pages: u64,
    /// Beside the working set that was recorded before.
    pub before: Option<Compared>,
}

/// How good a working set would have been.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Compared {
    pub pages: u64,
    /// Of the touched pages, those that it has.
    pub hits: u64,
    /// Hits, of all that was touched, in percent.
    pub hit_rate: f64,
    /// Pages that it has for nothing.
    pub wasted: u64,
}

/// Of a number of measurements; all 0 where there was none.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Percentiles {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

/// Pages, by why they were brought in.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sources {
    /// Before the release, as they are few or must be there (locked memory, changed pages of files).
    pub eager: u64,
    /// Of the working set, before the release.
    pub working_set: u64,
    /// A thread waited for them.
    pub fault: u64,
    /// Beside a page that a thread waited for.
    pub around: u64,
    /// In the background.
    pub sweep: u64,
    /// Given back by the program, or gone with its process, before they were brought in.
    pub never: u64,
}

/// Latencies, counted in classes of about 6 % width.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Vec<u32>,
    max: u64,
}

impl Histogram {
    pub fn new() -> Histogram {
        Histogram { counts: vec![0; 64 * 16], max: 0 }
    }

    pub fn add(&mut self, time: Duration) {
        let nanoseconds = time.as_nanos() as u64;
        self.counts[class(nanoseconds)] += 1;
        self.max = self.max.max(nanoseconds);
    }

    pub fn percentiles(&self) -> Percentiles {
        let total: u64 = self.counts.iter().map(|&count| u64::from(count)).sum();
        let at = |share: f64| {
            let mut wanted = (total as f64 * share).ceil() as u64;
            for (class, &count) in self.counts.iter().enumerate() {
                if wanted <= u64::from(count) && count > 0 {
                    return upper_end(class).min(self.max) as f64 / 1000.0;
                }
                wanted = wanted.saturating_sub(u64::from(count));
            }
            0.0
        };
        if total == 0 {
            return Percentiles::default();
        }
        Percentiles { p50: at(0.5), p90: at(0.9), p99: at(0.99), max: self.max as f64 / 1000.0 }
    }
}

/// 16 classes for each power of two.
fn class(value: u64) -> usize {
    if value < 16 {
        return value as usize;
    }
    let power = value.ilog2() as usize;
    (power - 3) * 16 + (value >> (power - 4)) as usize - 16
}

fn upper_end(class: usize) -> u64 {
    if class < 16 {
        return class as u64;
    }
    let (power, step) = (class / 16 + 3, class % 16);
    ((17 + step as u64) << (power - 4)) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_hold_what_they_say() {
        for value in (0..5000).chain([1 << 20, (1 << 33) + 12345, u64::MAX / 3]) {
            let class = class(value);
            assert!(value <= upper_end(class), "{value}");
            assert!(class == 0 || value > upper_end(class - 1), "{value}");
        }
    }

    #[test]
    fn percentiles() {
        let mut histogram = Histogram::new();
        assert_eq!(histogram.percentiles(), Percentiles::default());
        for microseconds in 1..=100 {
            histogram.add(Duration::from_micros(microseconds));
        }
        let found = histogram.percentiles();
        assert!((47.0..=54.0).contains(&found.p50), "{found:?}");
        assert!((98.0..=100.0).contains(&found.p99), "{found:?}");
        assert_eq!(found.max, 100.0);
    }
}
