//! Medians, their intervals, and ratios of paired runs.
//!
//! Times of commands are skewed and have outliers, so the middle is the median. Of six samples and more, its interval is
//! between two of them, and assumes no distribution: the median is above a sample as often as a coin shows heads. Fewer
//! samples cannot hold it with 95 % (three do with 75 %). Their interval takes logarithms to be normal (Student's t), and is
//! as wide as so few deserve.

use serde::{Deserialize, Serialize};

/// Of a confidence of 95 %, what is left on each side.
const TAIL: f64 = 0.025;

/// That quantile of Student's t distribution, for one to four degrees of freedom.
const STUDENT: [f64; 4] = [12.706, 4.303, 3.182, 2.776];

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
        let estimate = estimate(samples)?;
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
    estimate(&pairs)
}

fn estimate(samples: &[f64]) -> Option<Estimate> {
    if samples.is_empty() {
        return None;
    }
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (low, high) = match rank(sorted.len()) {
        Some(rank) => (sorted[rank], sorted[sorted.len() - 1 - rank]),
        None => by_student(&sorted),
    };
    Some(Estimate { value: median(samples), low, high })
}

/// How many of so many sorted samples may be left out on each side, so that the rest still holds the median with 95 %; `None`
/// if that takes more samples.
fn rank(count: usize) -> Option<usize> {
    // The probability that at most so many samples are below it.
    let mut below = 0.0;
    let mut of_exactly = 0.5_f64.powi(i32::try_from(count).ok()?);
    let mut left_out = None;
    for number in 0..count / 2 {
        below += of_exactly;
        if below > TAIL {
            break;
        }
        left_out = Some(number);
        of_exactly *= (count - number) as f64 / (number + 1) as f64;
    }
    left_out
}

/// The interval of few samples. One alone has none.
fn by_student(samples: &[f64]) -> (f64, f64) {
    let positive = samples.iter().all(|sample| *sample > 0.0);
    let scaled: Vec<f64> = samples.iter().map(|sample| if positive { sample.ln() } else { *sample }).collect();
    let count = scaled.len() as f64;
    let mean = scaled.iter().sum::<f64>() / count;
    let Some(student) = scaled.len().checked_sub(2).and_then(|freedom| STUDENT.get(freedom)) else {
        return (samples[0], samples[0]);
    };
    let variance = scaled.iter().map(|sample| (sample - mean).powi(2)).sum::<f64>() / (count - 1.0);
    let half = student * (variance / count).sqrt();
    if positive { ((mean - half).exp(), (mean + half).exp()) } else { ((mean - half).max(0.0), mean + half) }
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

    /// splitmix64.
    struct Random(u64);

    impl Random {
        /// From 0 to 1.
        fn next(&mut self) -> f64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = self.0;
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (mixed ^ (mixed >> 31)) as f64 / u64::MAX as f64
        }
    }

    /// Of 1,000 experiments with a known median, 95 % of the intervals or more must hold it, however few samples they have;
    /// and not so many more that they say nothing.
    #[test]
    fn intervals_hold_the_median_as_often_as_they_say() {
        let mut random = Random(7);
        for count in [2, 3, 4, 5, 6, 7, 8, 15, 25, 60] {
            let held = (0..1000).filter(|_| {
                // Skewed, as times are; its median is exp(0) = 1.
                let samples: Vec<f64> =
                    (0..count).map(|_| ((0..12).map(|_| random.next()).sum::<f64>() - 6.0).exp()).collect();
                let summary = Summary::of(&samples).unwrap();
                summary.low <= 1.0 && 1.0 <= summary.high
            });
            let held = held.count();
            // Of eight samples the interval is either 99 % or 93 %.
            assert!((935..=995).contains(&held), "of {count} samples, {held} of 1000");
        }
    }

    #[test]
    fn the_interval_of_many_samples_is_between_two_of_them() {
        let ranks = [(1, None), (5, None), (6, Some(0)), (8, Some(0)), (9, Some(1)), (15, Some(3)), (25, Some(7))];
        for (count, expected) in ranks {
            assert_eq!(rank(count), expected, "of {count}");
        }
        assert_eq!(estimate(&[5.0]), Some(Estimate { value: 5.0, low: 5.0, high: 5.0 }));
        let zeros = estimate(&[0.0, 0.0, 3.0]).unwrap();
        assert!(zeros.low == 0.0 && zeros.high > 3.0, "{zeros:?}");
    }

    /// A disturbance that is the same for both of a pair is not in their ratio.
    #[test]
    fn pairs_take_out_what_disturbs_both() {
        let disturbance = [1.0, 5.0, 2.0, 9.0, 3.0, 1.5, 7.0];
        let a: Vec<f64> = disturbance.iter().map(|d| 3.0 * d).collect();
        let paired = paired_ratio(&a, &disturbance).unwrap();
        assert!((paired.value - 3.0).abs() < 1e-9 && paired.high - paired.low < 1e-9, "{paired:?}");
        let alone = Summary::of(&disturbance).unwrap();
        assert!(alone.high - alone.low > 1.0, "{alone:?}");
        assert_eq!(paired_ratio(&[1.0], &[0.0]), None);
        assert_eq!(paired_ratio(&[], &[]), None);
    }
}
