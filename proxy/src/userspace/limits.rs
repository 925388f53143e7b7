//! How much there may be of what, so that a flood takes down a port and not the node.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::metrics::{Counted, RelayMetrics};
use crate::model::{Family, Protocol};

/// File descriptors that are left to the rest of the process.
const SPARE: u64 = 1_024;
/// What a system without a limit is taken to have.
const ENOUGH: u64 = 1 << 20;
/// How often at most the log is told that there are too many connections.
const COMPLAIN: Duration = Duration::from_secs(60);

/// How much one family may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Sockets that are listened on.
    pub(crate) listeners: usize,
    /// TCP connections, and as many UDP clients.
    pub(crate) connections: usize,
    /// UDP clients of one listener; the one that was silent longest makes room for another.
    pub(crate) udp_clients: usize,
    /// Clients of one listener whose endpoint is remembered.
    pub(crate) affinity: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { listeners: 1_024, connections: 4_096, udp_clients: 4_096, affinity: 65_536 }
    }
}

impl Limits {
    /// What the process's limit of open files allows each of this many families. The limit is
    /// raised as far as the process may.
    pub(crate) fn of_this_process(families: usize) -> Self {
        let files = match getrlimit(Resource::RLIMIT_NOFILE) {
            Ok((soft, hard)) if setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() => {
                soft.max(hard)
            }
            Ok((soft, _)) => soft,
            Err(_) => SPARE,
        };
        Self::of_files(files.min(ENOUGH), families)
    }

    /// A quarter is for listeners and one for UDP clients; TCP connections take two each.
    fn of_files(files: u64, families: usize) -> Self {
        let mine = files.saturating_sub(SPARE.min(files / 4)) / (families.max(1) as u64);
        let part = |n: u64| usize::try_from(mine / n).unwrap_or(usize::MAX);
        Self { listeners: part(4), connections: part(4), ..Self::default() }
    }
}

/// What is left for connections of one family.
#[derive(Debug)]
pub(super) struct Quota {
    family: Family,
    tcp: Arc<Semaphore>,
    /// Of their own: clients that are only remembered must not keep out connections.
    udp: Arc<Semaphore>,
    metrics: Option<RelayMetrics>,
    complained: Mutex<Option<Instant>>,
}

/// A connection's place; it is free again when this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    _slot: OwnedSemaphorePermit,
    _counted: Option<Counted>,
}

impl Quota {
    /// All of it.
    pub(super) fn new(family: Family, limits: Limits, metrics: Option<RelayMetrics>) -> Self {
        let slots = || Arc::new(Semaphore::new(limits.connections.min(Semaphore::MAX_PERMITS)));
        Self { family, tcp: slots(), udp: slots(), metrics, complained: Mutex::new(None) }
    }

    /// A place for a connection, if there is one.
    pub(super) fn take(&self, protocol: Protocol) -> Option<Place> {
        let slots = if protocol == Protocol::Udp { &self.udp } else { &self.tcp };
        let slot = Arc::clone(slots).try_acquire_owned().ok()?;
        let metrics = self.metrics.as_ref();
        let counted = metrics.map(|m| m.connection(self.family, protocol));
        Some(Place { _slot: slot, _counted: counted })
    }

    /// A connection was not relayed for lack of a place.
    pub(super) fn exceeded(&self) {
        self.refused("limit");
        let mut complained = self.complained.lock().unwrap_or_else(PoisonError::into_inner);
        if complained.is_none_or(|at| at.elapsed() >= COMPLAIN) {
            *complained = Some(Instant::now());
            tracing::warn!(
                family = self.family.as_str(),
                "too many connections to relay; new ones are refused (raise the limit of open files)"
            );
        }
    }

    /// A connection was not relayed.
    pub(super) fn refused(&self, reason: &str) {
        if let Some(metrics) = &self.metrics {
            metrics.refused(self.family, reason);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_it_together_stays_below_the_limit_of_open_files() {
        for files in [64, 1_024, 20_000, 1 << 20] {
            for families in [1, 2] {
                let limits = Limits::of_files(files, families);
                let used = families * (limits.listeners + 3 * limits.connections);
                assert!(used as u64 <= files - files.min(SPARE * 4) / 4, "{files}: {limits:?}");
                assert!(limits.listeners > 0 && limits.connections > 0);
            }
        }
    }
}
