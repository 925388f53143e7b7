//! How long a watch that fails waits before it tries again.

use std::time::{Duration, Instant};

use kube::runtime::utils::Backoff as Waits;

use keelson_api::backoff::Backoff;

/// The first and the longest step, as client-go's.
const STEPS: (Duration, Duration) = (Duration::from_millis(800), Duration::from_secs(30));
/// After so long without a failure the first step is the next one again.
const CALM: Duration = Duration::from_secs(120);

/// The waits of one watch. A watch that begins again says so before it has asked for anything, which
/// is no success: only time without a failure counts.
pub(crate) struct Patience {
    backoff: Backoff,
    last: Option<Instant>,
}

impl Patience {
    /// Of a watch that hasn't failed.
    pub(crate) fn new() -> Self {
        Self { backoff: Backoff::new(STEPS.0, STEPS.1), last: None }
    }

    fn failed(&mut self, now: Instant) -> Duration {
        if self.last.is_some_and(|last| now.duration_since(last) > CALM) {
            self.backoff.reset();
        }
        self.last = Some(now);
        self.backoff.next_wait()
    }
}

impl Iterator for Patience {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(self.failed(Instant::now()))
    }
}

impl Waits for Patience {
    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_stays_away_is_asked_less_and_less_until_it_was_there_for_long() {
        let mut patience = Patience::new();
        let mut now = Instant::now();
        for step in [800, 1_600, 3_200, 6_400, 12_800, 25_600, 30_000, 30_000] {
            // What every new try begins with.
            patience.reset();
            let wait = patience.failed(now);
            let step = Duration::from_millis(step);
            assert!(wait >= step && wait <= step.mul_f64(1.5), "{wait:?} {step:?}");
            now += wait;
        }
        let wait = patience.failed(now + CALM);
        assert!(wait <= STEPS.0.mul_f64(1.5), "{wait:?}");
    }
}
