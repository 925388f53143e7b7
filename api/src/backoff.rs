//! How long to wait before trying again.

use std::time::Duration;

/// Doubling waits with jitter, so that many who fail together don't try again together.
#[derive(Clone, Debug)]
pub struct Backoff {
    initial: Duration,
    max: Duration,
    current: Duration,
}

impl Backoff {
    /// Starts at `initial` and doubles up to `max`.
    pub fn new(initial: Duration, max: Duration) -> Self {
        Self { initial, max, current: initial }
    }

    /// The next wait: between the present step and one and a half times it. `max` bounds the step,
    /// not the jitter.
    pub fn next_wait(&mut self) -> Duration {
        let step = self.current;
        self.current = step.saturating_mul(2).min(self.max);
        step.mul_f64(1.0 + rand::random::<f64>() / 2.0)
    }

    /// Begins again at the first step, after a success.
    pub fn reset(&mut self) {
        self.current = self.initial;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_double_up_to_the_maximum_and_begin_again() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(4));
        for step in [1, 2, 4, 4] {
            let wait = backoff.next_wait();
            assert!(wait >= Duration::from_secs(step), "{wait:?} is shorter than {step} s");
            assert!(
                wait <= Duration::from_millis(step * 1500),
                "{wait:?} is longer than 1.5 × {step} s"
            );
        }
        backoff.reset();
        assert!(backoff.next_wait() <= Duration::from_millis(1500));
    }
}
