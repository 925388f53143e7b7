//! What a series of measurements says.

use serde_json::{Value, json};

/// Measurements of one thing, in one unit.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    /// One measurement.
    pub(crate) fn one(value: f64) -> Self {
        Self(vec![value])
    }

    /// Takes in another measurement.
    pub(crate) fn add(&mut self, value: f64) {
        self.0.push(value);
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    /// The smallest value that is not below `share` of all: 0.5 is the median. Zero if there are
    /// no measurements.
    pub(crate) fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (share * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
    }

    /// The median.
    pub(crate) fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// All that is worth keeping, for programs.
    pub(crate) fn to_json(&self) -> Value {
        json!({
            "n": self.count(),
            "median": self.median(),
            "min": self.quantile(0.0),
            "p99": self.quantile(0.99),
            "max": self.quantile(1.0),
            "samples": self.0,
        })
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        Self(values.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_measured_values() {
        let samples: Samples = (1..=100).rev().map(f64::from).collect();
        for (share, value) in [(0.0, 1.0), (0.5, 50.0), (0.99, 99.0), (1.0, 100.0)] {
            assert_eq!(samples.quantile(share), value, "{share}");
        }
        assert_eq!(Samples::one(7.0).quantile(0.99), 7.0);
        assert_eq!(Samples::default().median(), 0.0);
    }
}
