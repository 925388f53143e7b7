//! What was done but not yet seen through the watch.
//!
//! Between a write and its event the cache is behind. A ReplicaSet that acted on it would make
//! pods twice. So what it made (by name, which is known beforehand) and what it deleted (by UID) is
//! noted, and no more is made or deleted until all of it was seen.

use std::{
    collections::{HashMap, HashSet},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use keelson_api::object::ObjectKey;
use tokio::time::Instant;

/// After this the cache is trusted all the same; an event was lost.
const LONGEST: Duration = Duration::from_secs(300);

#[derive(Debug)]
struct Expected {
    created: HashSet<String>,
    deleted: HashSet<String>,
    since: Instant,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Expectations {
    by_owner: Mutex<HashMap<ObjectKey, Expected>>,
}

impl Expectations {
    fn lock(&self) -> MutexGuard<'_, HashMap<ObjectKey, Expected>> {
        self.by_owner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what is about to be done.
    pub(crate) fn expect(
        &self,
        owner: &ObjectKey,
        created: impl IntoIterator<Item = String>,
        deleted: impl IntoIterator<Item = String>,
    ) {
        let mut by_owner = self.lock();
        let entry = by_owner.entry(owner.clone()).or_insert_with(|| Expected {
            created: HashSet::new(),
            deleted: HashSet::new(),
            since: Instant::now(),
        });
        entry.created.extend(created);
        entry.deleted.extend(deleted);
        entry.since = Instant::now();
    }

    /// An object with this name is there, or will never be.
    pub(crate) fn created(&self, owner: &ObjectKey, name: &str) {
        if let Some(entry) = self.lock().get_mut(owner) {
            entry.created.remove(name);
        }
    }

    /// An object with this UID is going, or will not go.
    pub(crate) fn deleted(&self, owner: &ObjectKey, uid: &str) {
        if let Some(entry) = self.lock().get_mut(owner) {
            entry.deleted.remove(uid);
        }
    }

    /// Forgets an owner that is gone.
    pub(crate) fn forget(&self, owner: &ObjectKey) {
        self.lock().remove(owner);
    }

    /// Whether all that was done has been seen.
    pub(crate) fn are_met(&self, owner: &ObjectKey) -> bool {
        self.lock().get(owner).is_none_or(|entry| {
            (entry.created.is_empty() && entry.deleted.is_empty())
                || entry.since.elapsed() >= LONGEST
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn all_must_be_seen_or_time_out() {
        let owner = ObjectKey::new("d", "web");
        let expectations = Expectations::default();
        assert!(expectations.are_met(&owner));
        expectations.expect(&owner, ["a".to_owned()], ["u".to_owned()]);
        expectations.created(&owner, "a");
        assert!(!expectations.are_met(&owner));
        expectations.deleted(&owner, "u");
        assert!(expectations.are_met(&owner));
        expectations.expect(&owner, ["b".to_owned()], []);
        assert!(!expectations.are_met(&owner));
        tokio::time::advance(LONGEST).await;
        assert!(expectations.are_met(&owner));
    }
}
