//! Connections that changes leave behind, handed on to be forgotten.

use std::time::{Duration, Instant};

use super::wanted::Wanted;
use crate::{
    backend::Stale,
    conntrack::{Cleaner, stale::Expected},
    model::Family,
};

/// How long after there was no room for more it is looked whether there is some.
const AGAIN: Duration = Duration::from_secs(1);

/// What is told to the thread that forgets connections.
pub(super) struct Connections {
    /// `None` where connections don't live in the kernel's table.
    cleaner: Option<Cleaner>,
    /// Whether TCP connections can be stale.
    tcp: bool,
    /// When everything is compared, since something was not handed on.
    compare_at: Option<Instant>,
}

impl Connections {
    /// Hands on to this thread.
    pub(super) fn new(cleaner: Option<Cleaner>) -> Self {
        Self { cleaner, tcp: false, compare_at: None }
    }

    /// Counts TCP connections to endpoints that are gone among the stale ones too.
    pub(super) fn count_tcp(&mut self, tcp: bool) {
        self.tcp = tcp;
    }

    /// When there is something to do though nothing changes.
    pub(super) fn wakes_at(&self) -> Option<Instant> {
        self.compare_at
    }

    /// Has these forgotten; if too many wait already, everything is compared when there is room.
    pub(super) fn forget(&mut self, stale: Vec<Stale>, now: Instant) {
        let Some(cleaner) = &self.cleaner else { return };
        if !cleaner.forget(stale) && self.compare_at.is_none() {
            tracing::warn!(
                "too many stale connections wait to be removed; the whole table is compared later"
            );
            self.compare_at = Some(now + AGAIN);
        }
    }

    /// Has all connections of these families compared with what is desired.
    pub(super) fn compare(&self, wanted: &Wanted, families: &[Family]) {
        if let Some(cleaner) = self.cleaner.as_ref().filter(|_| !families.is_empty()) {
            let (desired, objects) = (&wanted.desired, &wanted.objects);
            cleaner.compare(Expected::of(desired, objects, families, self.tcp));
        }
    }

    /// Makes up for what was not handed on.
    pub(super) fn make_up(&mut self, wanted: &Wanted, now: Instant) {
        if self.compare_at.is_none_or(|at| at > now) {
            return;
        }
        self.compare_at = match &self.cleaner {
            Some(cleaner) if !cleaner.is_idle() => Some(now + AGAIN),
            _ => {
                self.compare(wanted, &wanted.families);
                None
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use prometheus::Registry;

    use super::*;
    use crate::{
        metrics::Metrics, model::Protocol, netns::Namespace, ruleset::Frontend, until::until,
    };

    #[test]
    fn a_flood_is_made_up_by_comparing_everything() {
        let (host, registry) = (Namespace::new(), Registry::new());
        let metrics = Metrics::register(&registry).unwrap();
        let cleaner = host.run(move || Cleaner::start(metrics).unwrap());
        let mut connections = Connections::new(Some(cleaner));
        let (wanted, now) = (Wanted::new(vec![Family::V4]), Instant::now());
        let frontend = Frontend::at([10, 96, 0, 1], Protocol::Udp, 53);
        connections.forget(vec![Stale { frontend, endpoint: None }; 100_000], now);
        let at = connections.wakes_at().unwrap();
        connections.make_up(&wanted, now);
        assert_eq!(connections.wakes_at(), Some(at), "not yet");
        connections.make_up(&wanted, at);
        assert_eq!(connections.wakes_at(), None);
        let compared = "conntrack_reconciler_sync_duration_seconds_count{ip_family=\"IPv4\"} 1";
        until("the table is compared", || {
            keelson_api::metrics::encode(&registry).unwrap().contains(compared)
        });
    }
}
