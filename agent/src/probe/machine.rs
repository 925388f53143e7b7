//! When a probe's results become a verdict: thresholds, as a pure state machine.

use std::time::Duration;

use k8s_openapi::api::core::v1::Probe;

use super::{Kind, Verdict};

/// A probe's numbers, with their documented defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Timing {
    /// From the container's start to the first try.
    pub(crate) initial_delay: Duration,
    /// Between tries.
    pub(crate) period: Duration,
    /// How long one try may take.
    pub(crate) timeout: Duration,
    /// Failures in a row that count.
    pub(crate) failure_threshold: u32,
    /// Successes in a row that count.
    pub(crate) success_threshold: u32,
}

impl Timing {
    /// The probe's numbers; what is absent or below the least allowed value gets its default.
    pub(crate) fn of(probe: &Probe) -> Self {
        let at_least_one = |value: Option<i32>, default: u32| {
            value
                .and_then(|value| u32::try_from(value).ok())
                .filter(|value| *value > 0)
                .unwrap_or(default)
        };
        let seconds = |value, default| Duration::from_secs(at_least_one(value, default).into());
        let delay = probe.initial_delay_seconds.and_then(|delay| u64::try_from(delay).ok());
        Self {
            initial_delay: Duration::from_secs(delay.unwrap_or(0)),
            period: seconds(probe.period_seconds, 10),
            timeout: seconds(probe.timeout_seconds, 1),
            failure_threshold: at_least_one(probe.failure_threshold, 3),
            success_threshold: at_least_one(probe.success_threshold, 1),
        }
    }
}

/// Counts results in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Machine {
    timing: Timing,
    verdict: Verdict,
    last: Option<bool>,
    row: u32,
}

impl Machine {
    /// A machine before its first result.
    ///
    /// A container counts as alive until its liveness probe fails, and as neither started nor ready
    /// until the probe for it succeeds. `seed` is what was known before the agent restarted.
    pub(crate) fn new(kind: Kind, timing: Timing, seed: Option<Verdict>) -> Self {
        let first = match kind {
            Kind::Liveness => Verdict::Success,
            Kind::Startup | Kind::Readiness => Verdict::Unknown,
        };
        Self { timing, verdict: seed.unwrap_or(first), last: None, row: 0 }
    }

    /// The verdict so far.
    pub(crate) fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// Takes one result in.
    pub(crate) fn record(&mut self, success: bool) -> Verdict {
        self.row = if self.last == Some(success) { self.row.saturating_add(1) } else { 1 };
        self.last = Some(success);
        let threshold =
            if success { self.timing.success_threshold } else { self.timing.failure_threshold };
        if self.row >= threshold {
            self.verdict = if success { Verdict::Success } else { Verdict::Failure };
        }
        self.verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Row = (Kind, i32, i32, &'static [bool], &'static [Verdict]);

    fn timing(failures: i32, successes: i32) -> Timing {
        Timing::of(&Probe {
            failure_threshold: Some(failures),
            success_threshold: Some(successes),
            ..Default::default()
        })
    }

    #[test]
    fn verdicts_follow_the_thresholds() {
        use Verdict::{Failure, Success, Unknown};
        let rows: [Row; 4] = [
            (Kind::Readiness, 1, 1, &[true, false, true], &[Success, Failure, Success]),
            (
                Kind::Readiness,
                3,
                2,
                &[true, true, false, false, false],
                &[Unknown, Success, Success, Success, Failure],
            ),
            (
                Kind::Liveness,
                3,
                1,
                &[false, false, true, false, false, false],
                &[Success, Success, Success, Success, Success, Failure],
            ),
            (Kind::Startup, 2, 1, &[false, false], &[Unknown, Failure]),
        ];
        for (kind, failures, successes, results, verdicts) in rows {
            let mut machine = Machine::new(kind, timing(failures, successes), None);
            let seen: Vec<_> = results.iter().map(|result| machine.record(*result)).collect();
            assert_eq!(seen, verdicts, "{kind:?} {failures}/{successes}: {results:?}");
        }
    }

    #[test]
    fn absent_numbers_get_the_documented_defaults() {
        let timing = Timing::of(&Probe::default());
        assert_eq!(timing.period, Duration::from_secs(10));
        assert_eq!(timing.timeout, Duration::from_secs(1));
        assert_eq!((timing.failure_threshold, timing.success_threshold), (3, 1));
    }
}
