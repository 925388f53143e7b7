//! Whether the agent's loop still turns, as `/healthz` and the watchdog ask.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// The longest that one turn may take; turns come every few seconds although nothing happens.
const LONGEST_TURN: Duration = Duration::from_secs(60);

/// When the agent's loop last turned.
#[derive(Debug)]
pub struct Pulse(Mutex<Instant>);

impl Default for Pulse {
    fn default() -> Self {
        Self(Mutex::new(Instant::now()))
    }
}

impl Pulse {
    /// The loop turns.
    pub(crate) fn beat(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Whether it has turned not long ago.
    pub fn is_alive(&self) -> bool {
        self.is_alive_at(Instant::now())
    }

    fn is_alive_at(&self, now: Instant) -> bool {
        let last = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        now.saturating_duration_since(last) <= LONGEST_TURN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_that_hangs_is_not_alive() {
        let pulse = Pulse::default();
        let begun = Instant::now();
        assert!(pulse.is_alive_at(begun + LONGEST_TURN / 2));
        assert!(!pulse.is_alive_at(begun + LONGEST_TURN + Duration::from_secs(1)));
    }
}
