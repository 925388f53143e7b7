//! Packets that rules count: read when somebody asks for the metrics, but neither too often nor for
//! too long.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::Mutex;

use super::Metrics;
use crate::iptables::counters::{Counters, Packets};

/// What was read stays good for so long.
const PERIOD: Duration = Duration::from_secs(5);
/// So long a page may wait for it; then it shows what was read before.
const PATIENCE: Duration = Duration::from_secs(2);

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
        match tokio::time::timeout(PATIENCE, reading).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "reading the rules' counts failed"),
            // It goes on, alone, and the next page shows what it found.
            Err(_) => tracing::debug!("the rules' counts take long to read; older ones are shown"),
        }
    }
}
