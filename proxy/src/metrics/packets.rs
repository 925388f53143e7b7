//! Packets that rules count: read when somebody asks for the metrics, but neither too often nor for
//! too long.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::Mutex;

use super::Metrics;
use crate::iptables::counters::Counters;

/// What was read stays good for so long.
const PERIOD: Duration = Duration::from_secs(5);
/// So long a page may wait for it; then it shows what was read before.
const PATIENCE: Duration = Duration::from_secs(2);

/// How many packets met rules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Packets {
    /// Dropped, since the connection table can't place them.
    pub(crate) invalid_dropped: u64,
    /// The first ones of connections to node ports on loopback.
    pub(crate) localhost_accepted: u64,
}

impl Packets {
    /// What came since an earlier reading; a rule that was made anew began at zero.
    fn since(self, before: Self) -> Self {
        let more = |now: u64, before: u64| if now >= before { now - before } else { now };
        Self {
            invalid_dropped: more(self.invalid_dropped, before.invalid_dropped),
            localhost_accepted: more(self.localhost_accepted, before.localhost_accepted),
        }
    }
}

/// Keeps the metrics as fresh as who asks for them needs. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Freshener {
    metrics: Metrics,
    families: Arc<Mutex<Families>>,
}

#[derive(Debug)]
struct Families {
    /// Of each family, with what was read last.
    counters: Vec<(Counters, Packets)>,
    read_at: Option<Instant>,
}

impl Freshener {
    /// Reads these counters into those metrics.
    pub(crate) fn new(counters: Vec<Counters>, metrics: Metrics) -> Self {
        let counters = counters.into_iter().map(|one| (one, Packets::default())).collect();
        let families = Families { counters, read_at: None };
        Self { metrics, families: Arc::new(Mutex::new(families)) }
    }

    /// Reads what rules have counted, unless somebody does so just now or did so a moment ago.
    pub(crate) async fn refresh(&self) {
        let Ok(mut families) = Arc::clone(&self.families).try_lock_owned() else { return };
        let now = Instant::now();
        if families.counters.is_empty()
            || families.read_at.is_some_and(|at| now.duration_since(at) < PERIOD)
        {
            return;
        }
        families.read_at = Some(now);
        let metrics = self.metrics.clone();
        // It runs programs and waits for them.
        let reading = tokio::task::spawn_blocking(move || {
            for (counters, before) in &mut families.counters {
                match counters.read() {
                    Ok(found) => {
                        metrics.packets(found.since(*before));
                        *before = found;
                    }
                    Err(error) => tracing::warn!(%error, "packets that rules count can't be read"),
                }
            }
        });
        if tokio::time::timeout(PATIENCE, reading).await.is_err() {
            tracing::debug!("the rules' counts take long to read; older ones are shown");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_that_was_made_anew_counts_on() {
        let at = |n| Packets { invalid_dropped: n, localhost_accepted: 0 };
        assert_eq!(at(5).since(at(3)), at(2));
        assert_eq!(at(2).since(at(5)), at(2));
        assert_eq!(at(5).since(at(5)), at(0));
    }
}
