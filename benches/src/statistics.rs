//! Medians, their intervals, and ratios of paired runs: all by resampling (bootstrap), with a fixed seed.
//!
//! Times of commands are skewed and have outliers, so nothing here assumes a distribution, and the middle is the median.

use serde::{Deserialize, Serialize};

/// Resamples for an interval.
const RESAMPLES: usize = 4000;

/// A median with the interval that holds it with 95 % confidence, and how far the samples spread.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    pub median: f64,
    pub low: f64,
    pub high: f64,
    pub min: f64,
    pub max: f64,
}

/// An estimate with its 95 % confidence interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    pub value: f64,
    pub low: f64,
    pub high: f64,
}

impl Summary {
    /// `None` of no samples.
    pub fn of(samples: &[f64]) -> Option<Summary> {
        let estimate = estimate(samples, median)?;
        let (min, max) = samples.iter().fold((f64::MAX, f64::MIN), |(min, max), &x| (min.min(x), max.max(x)));
        Some(Summary { median: estimate.value, low: estimate.low, high: estimate.high, min, max })
    }
}

/// The middle of the samples; of an even number, between the two in the middle.
pub fn median(samples: &[f64]) -> f64 {
    quantile(samples, 0.5)
}

/// By linear interpolation between the samples; 0 of none.
pub fn quantile(samples: &[f64], share: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let place = share.clamp(0.0, 1.0) * last as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    below + (above - below) * place.fract()
}

/// The median of what `a` took for each that `b` took, round by round. What disturbs a round disturbs both.
///
/// `None` where there are no pairs, or one took no time at all.
pub fn paired_ratio(a: &[f64], b: &[f64]) -> Option<Estimate> {
    let pairs: Vec<f64> = a.iter().zip(b).map(|(a, b)| a / b).collect();
    if pairs.iter().any(|ratio| !ratio.is_finite()) {
        return None;
    }
    estimate(&pairs, median)
}

/// The ratio of two medians of runs that are not paired: of different days, say.
pub fn unpaired_ratio(a: &[f64], b: &[f64]) -> Option<Estimate> {
    if a.is_empty() || b.is_empty() || median(b) == 0.0 {
        return None;
    }
    let mut random = Random::new();
    let ratios = (0..RESAMPLES).map(|_| median(&random.resample(a)) / median(&random.resample(b)));
    let ratios: Vec<f64> = ratios.filter(|ratio| ratio.is_finite()).collect();
    if ratios.is_empty() {
        return None;
    }
    Some(Estimate { value: median(a) / median(b), low: quantile(&ratios, 0.025), high: quantile(&ratios, 0.975) })
}

fn estimate(samples: &[f64], of: fn(&[f64]) -> f64) -> Option<Estimate> {
    if samples.is_empty() {
        return None;
    }
    let mut random = Random::new();
    let resampled: Vec<f64> = (0..RESAMPLES).map(|_| of(&random.resample(samples))).collect();
    Some(Estimate { value: of(samples), low: quantile(&resampled, 0.025), high: quantile(&resampled, 0.975) })
}

/// splitmix64: the same samples give the same interval each time.
struct Random(u64);

impl Random {
    fn new() -> Random {
        Random(0x636b_7074)
    }

    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((u128::from(mixed ^ (mixed >> 31)) * bound as u128) >> 64) as usize
    }

    fn resample(&mut self, samples: &[f64]) -> Vec<f64> {
        (0..samples.len()).map(|_| samples[self.below(samples.len())]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_quantiles() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(quantile(&[1.0, 2.0, 3.0, 4.0, 5.0], 0.25), 2.0);
        assert_eq!(quantile(&[], 0.5), 0.0);
    }

    /// Of 200 experiments with a known median, about 95 % of the intervals must hold it.
    #[test]
    fn intervals_hold_the_median_as_often_as_they_say() {
        let mut random = Random(7);
        let mut held = 0;
        for _ in 0..200 {
            // Skewed, as times are; its median is exp(0) = 1.
            let samples: Vec<f64> = (0..25)
                .map(|_| {
                    let sum: f64 = (0..12).map(|_| random.below(1_000_000) as f64 / 1e6).sum();
                    (sum - 6.0).exp()
                })
                .collect();
            let summary = Summary::of(&samples).unwrap();
            held += usize::from(summary.low <= 1.0 && 1.0 <= summary.high);
        }
        assert!((176..=199).contains(&held), "{held} of 200");
    }

    /// A disturbance that is the same for both of a pair is not in their ratio.
    #[test]
    fn pairs_take_out_what_disturbs_both() {
        let disturbance = [1.0, 5.0, 2.0, 9.0, 3.0, 1.5, 7.0];
        let a: Vec<f64> = disturbance.iter().map(|d| 3.0 * d).collect();
        let paired = paired_ratio(&a, &disturbance).unwrap();
        assert!((paired.value - 3.0).abs() < 1e-9 && paired.high - paired.low < 1e-9, "{paired:?}");
        let unpaired = unpaired_ratio(&a, &disturbance).unwrap();
        assert!(unpaired.high - unpaired.low > 1.0, "{unpaired:?}");
        assert_eq!(paired_ratio(&[1.0], &[0.0]), None);
        assert_eq!(paired_ratio(&[], &[]), None);
    }
}
