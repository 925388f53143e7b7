//! Pods that wait for a node.
//!
//! ```text
//! new ──► active ──► (being placed) ──► bound, forgotten
//!           ▲              │ no node
//!           │              ▼
//!        backoff ◄── unschedulable
//!   when its time is up   when something changed that may help
//! ```

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::core::v1::Pod;
use keelson_api::object::ObjectKey;
use tokio::time::Instant;

/// The wait after a first failure (`podInitialBackoffSeconds`' default).
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
/// The longest wait (`podMaxBackoffSeconds`' default).
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);
/// A pod that nothing seems to help is tried again after this all the same.
const LONGEST_UNSCHEDULABLE: Duration = Duration::from_secs(300);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Active(Slot),
    Backoff(Instant, u64),
    Unschedulable {
        tried: Instant,
    },
    InFlight {
        moves: u64,
    },
    /// Scheduling gates keep it from being tried.
    Gated,
}

/// Higher priorities first, then who came first.
type Slot = (Reverse<i32>, u64);

#[derive(Debug)]
struct Entry {
    pod: Arc<Pod>,
    place: Place,
    attempts: u32,
    /// When it came.
    since: Instant,
}

/// How many pods wait where, in the words of the metric `scheduler_pending_pods`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) active: i64,
    pub(crate) backoff: i64,
    pub(crate) unschedulable: i64,
    pub(crate) gated: i64,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    entries: HashMap<ObjectKey, Entry>,
    active: BTreeMap<Slot, ObjectKey>,
    backoff: BTreeMap<(Instant, u64), ObjectKey>,
    sequence: u64,
    /// How often something changed that may help.
    moves: u64,
}

/// A pod to be placed.
#[derive(Clone, Debug)]
pub(crate) struct Attempt {
    pub(crate) pod: Arc<Pod>,
    /// This attempt's number, from 1.
    pub(crate) number: u32,
    /// When the pod came.
    pub(crate) since: Instant,
}

impl Pending {
    /// Takes in a pod without a node, new or changed.
    pub(crate) fn set(&mut self, pod: Arc<Pod>, now: Instant) {
        let key = ObjectKey::of(&pod.metadata);
        let gated = is_gated(&pod);
        let same_pod = |old: &Entry| old.pod.metadata.uid == pod.metadata.uid;
        match self.entries.get_mut(&key) {
            Some(entry) if same_pod(entry) => {
                let was_gated = entry.place == Place::Gated;
                let changed =
                    entry.pod.spec != pod.spec || entry.pod.metadata.labels != pod.metadata.labels;
                entry.pod = pod;
                if was_gated && !gated {
                    self.activate(&key);
                } else if changed && !was_gated {
                    self.retry(&key, now);
                }
            }
            _ => {
                self.remove(&key);
                let entry = Entry { pod, place: Place::Gated, attempts: 0, since: now };
                self.entries.insert(key.clone(), entry);
                if !gated {
                    self.activate(&key);
                }
            }
        }
    }

    /// Forgets a pod.
    pub(crate) fn remove(&mut self, key: &ObjectKey) {
        if let Some(entry) = self.entries.remove(key) {
            self.leave(entry.place);
        }
    }

    /// The next pod to place.
    pub(crate) fn pop(&mut self, now: Instant) -> Option<Attempt> {
        self.wake(now);
        let (_, key) = self.active.pop_first()?;
        let moves = self.moves;
        let entry = self.entries.get_mut(&key)?;
        entry.place = Place::InFlight { moves };
        entry.attempts += 1;
        Some(Attempt { pod: entry.pod.clone(), number: entry.attempts, since: entry.since })
    }

    /// When the next pod becomes active by itself.
    pub(crate) fn next_wake(&self) -> Option<Instant> {
        let backoff = self.backoff.first_key_value().map(|((at, _), _)| *at);
        let flush = self
            .entries
            .values()
            .filter_map(|entry| match entry.place {
                Place::Unschedulable { tried } => Some(tried + LONGEST_UNSCHEDULABLE),
                _ => None,
            })
            .min();
        backoff.into_iter().chain(flush).min()
    }

    /// No node could take the pod.
    pub(crate) fn failed(&mut self, key: &ObjectKey, now: Instant) {
        let moves = self.moves;
        let Some(entry) = self.entries.get_mut(key) else { return };
        if let Place::InFlight { moves: at_start } = entry.place {
            entry.place = Place::Unschedulable { tried: now };
            if at_start != moves {
                self.retry(key, now);
            }
        }
    }

    /// The pod had a node, but to say so failed. Returns whether the pod is still waiting.
    pub(crate) fn refused(&mut self, key: &ObjectKey, now: Instant) -> bool {
        let Some(entry) = self.entries.get_mut(key) else { return false };
        entry.place = Place::Unschedulable { tried: now };
        self.retry(key, now);
        true
    }

    /// Something changed that may help pods that could not be placed.
    pub(crate) fn retry_all(&mut self, now: Instant) {
        self.retry_where(now, |_| true);
    }

    /// The same, but it can help only some pods.
    pub(crate) fn retry_where(&mut self, now: Instant, may_help: impl Fn(&Pod) -> bool) {
        self.moves += 1;
        let waiting: Vec<ObjectKey> = self
            .entries
            .iter()
            .filter(|(_, entry)| {
                matches!(entry.place, Place::Unschedulable { .. }) && may_help(&entry.pod)
            })
            .map(|(key, _)| key.clone())
            .collect();
        for key in waiting {
            self.retry(&key, now);
        }
    }

    pub(crate) fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for entry in self.entries.values() {
            match entry.place {
                Place::Active(_) | Place::InFlight { .. } => counts.active += 1,
                Place::Backoff(..) => counts.backoff += 1,
                Place::Unschedulable { .. } => counts.unschedulable += 1,
                Place::Gated => counts.gated += 1,
            }
        }
        counts
    }

    /// Makes an unschedulable pod active, now or when its back-off is over.
    fn retry(&mut self, key: &ObjectKey, now: Instant) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        let Place::Unschedulable { tried } = entry.place else { return };
        let doublings = entry.attempts.saturating_sub(1).min(8);
        let at = tried + (FIRST_BACKOFF * (1 << doublings)).min(LONGEST_BACKOFF);
        if at <= now {
            self.activate(key);
        } else {
            self.sequence += 1;
            entry.place = Place::Backoff(at, self.sequence);
            self.backoff.insert((at, self.sequence), key.clone());
        }
    }

    fn activate(&mut self, key: &ObjectKey) {
        self.sequence += 1;
        let Some(entry) = self.entries.get_mut(key) else { return };
        let priority = entry.pod.spec.as_ref().and_then(|s| s.priority).unwrap_or(0);
        let slot = (Reverse(priority), self.sequence);
        let left = std::mem::replace(&mut entry.place, Place::Active(slot));
        self.active.insert(slot, key.clone());
        self.leave(left);
    }

    fn leave(&mut self, place: Place) {
        match place {
            Place::Active(slot) => {
                self.active.remove(&slot);
            }
            Place::Backoff(at, sequence) => {
                self.backoff.remove(&(at, sequence));
            }
            Place::Unschedulable { .. } | Place::InFlight { .. } | Place::Gated => {}
        }
    }

    fn wake(&mut self, now: Instant) {
        while let Some((&(at, _), key)) = self.backoff.first_key_value() {
            if at > now {
                break;
            }
            let key = key.clone();
            self.activate(&key);
        }
        let stale: Vec<ObjectKey> = self
            .entries
            .iter()
            .filter(|(_, entry)| {
                matches!(entry.place, Place::Unschedulable { tried }
                    if tried + LONGEST_UNSCHEDULABLE <= now)
            })
            .map(|(key, _)| key.clone())
            .collect();
        for key in stale {
            self.activate(&key);
        }
    }
}

/// Whether a pod asks not to be scheduled yet.
pub(crate) fn is_gated(pod: &Pod) -> bool {
    pod.spec.as_ref().and_then(|s| s.scheduling_gates.as_ref()).is_some_and(|g| !g.is_empty())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(name: &str, priority: i32) -> Arc<Pod> {
        let pod = json!({"metadata": {"name": name, "namespace": "d", "uid": name},
            "spec": {"containers": [], "priority": priority}});
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    fn key(name: &str) -> ObjectKey {
        ObjectKey::new("d", name)
    }

    fn popped(pending: &mut Pending, now: Instant) -> Option<String> {
        pending.pop(now).and_then(|attempt| attempt.pod.metadata.name.clone())
    }

    #[tokio::test]
    async fn the_important_come_first_then_the_early() {
        let now = Instant::now();
        let mut pending = Pending::default();
        pending.set(pod("a", 0), now);
        pending.set(pod("b", 0), now);
        pending.set(pod("c", 9), now);
        let order: Vec<_> = std::iter::from_fn(|| popped(&mut pending, now)).collect();
        assert_eq!(order, ["c", "a", "b"]);
    }

    #[tokio::test]
    async fn a_pod_that_found_no_node_waits_for_a_change_and_its_backoff() {
        let now = Instant::now();
        let mut pending = Pending::default();
        pending.set(pod("a", 0), now);
        assert!(pending.pop(now).is_some());
        pending.failed(&key("a"), now);
        assert_eq!(pending.counts(), Counts { unschedulable: 1, ..Counts::default() });
        pending.retry_all(now);
        assert_eq!(pending.counts(), Counts { backoff: 1, ..Counts::default() });
        assert!(pending.pop(now).is_none());
        assert_eq!(pending.next_wake(), Some(now + FIRST_BACKOFF));
        assert!(pending.pop(now + FIRST_BACKOFF).is_some());
        // A change during the attempt counts.
        pending.retry_all(now + FIRST_BACKOFF);
        pending.failed(&key("a"), now + FIRST_BACKOFF);
        assert_eq!(pending.next_wake(), Some(now + FIRST_BACKOFF * 3));
        pending.remove(&key("a"));
        assert_eq!(pending.next_wake(), None);
    }

    #[tokio::test]
    async fn the_unschedulable_are_tried_again_some_time() {
        let now = Instant::now();
        let mut pending = Pending::default();
        pending.set(pod("a", 0), now);
        assert!(pending.pop(now).is_some());
        pending.failed(&key("a"), now);
        assert!(pending.pop(now + LONGEST_UNSCHEDULABLE).is_some());
    }
}
