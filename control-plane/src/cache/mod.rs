//! The present objects in memory, and what happened to them lately.
//!
//! ```text
//!   store ── one watch of everything ──► Cache::run ──► per resource: objects by key
//!                                                                    ring of events
//!                                                          ▲              ▲
//!                                                   get, list, Lookup   watchers, each at its
//!                                                                       own place in the ring
//! ```
//!
//! An object is parsed once and held once, as an `Arc<Value>` that lists, watches, authorization
//! and admission share. An event is encoded once, by whoever sends it first, for all its watchers.
//!
//! Objects as trees take ten times the room of their JSON, and a pod that starts has ten versions
//! within a second. So the ring keeps only the newest events as trees; older ones are JSON, and are
//! parsed again for the rare watcher who comes late.
//!
//! A watcher holds no queue: it has a place in the ring, and reads on from there when it can. One
//! that is so slow that the ring has moved on is told [`TooOld`] and has to list again, so that no
//! client can make the server hold more than the ring.

mod resource;
mod ring;
#[cfg(test)]
mod tests;

use std::{collections::HashMap, sync::Arc, time::Duration};

use serde_json::Value;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub(crate) use resource::encode;
pub use resource::{Event, EventKind, ResourceCache, Selected, Snapshot, TooOld, Watcher};

use crate::{
    lookup::Lookup,
    registry::{Registry, StorageKey},
    store::{Change, ListRange, Revision, Store, StoreError},
};

/// Objects that are read from the store at a time when the cache is filled.
const LOAD_PAGE: usize = 500;
/// Revisions of history with which the rings are filled at start, so that the watches of clients
/// go on over a restart.
const REPLAY: u64 = 1000;
/// How long to wait before the store is asked again after it failed.
const RETRY: Duration = Duration::from_millis(200);

/// The watch caches of all resources. See the [module](self).
#[derive(Debug)]
pub struct Cache {
    /// By storage group and plural name.
    resources: HashMap<String, HashMap<String, Arc<ResourceCache>>>,
    /// All changes up to here are in the caches.
    applied: Arc<watch::Sender<Revision>>,
}

/// The part of a store key that all objects of a resource share, with the slash at its end.
pub fn prefix(storage: &StorageKey) -> String {
    let group = if storage.group.is_empty() { "core" } else { &storage.group };
    format!("{group}/{}/", storage.plural)
}

/// An object's key within its resource: `namespace/name`, or the name alone.
pub fn object_key(namespace: &str, name: &str) -> String {
    if namespace.is_empty() { name.to_owned() } else { format!("{namespace}/{name}") }
}

/// A stored object with its revision in it.
pub(crate) fn parse(value: &[u8], revision: Revision) -> Result<Value, serde_json::Error> {
    let mut object: Value = serde_json::from_slice(value)?;
    set_resource_version(&mut object, revision);
    Ok(object)
}

/// Writes the revision into an object's metadata.
pub(crate) fn set_resource_version(object: &mut Value, revision: Revision) {
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.insert("resourceVersion".to_owned(), Value::from(revision.to_string()));
    }
}

impl Cache {
    /// Fills the caches from the store. [`Self::run`] keeps them current.
    ///
    /// # Errors
    /// The store failed.
    pub async fn load(registry: &Registry, store: &dyn Store) -> Result<Self, StoreError> {
        let mut resources: HashMap<String, HashMap<String, Arc<ResourceCache>>> = HashMap::new();
        let applied = Arc::new(watch::Sender::new(Revision(0)));
        for resource in registry.stored() {
            let StorageKey { group, plural } = &resource.storage;
            resources
                .entry(group.clone())
                .or_default()
                .insert(plural.clone(), Arc::new(ResourceCache::new(Arc::clone(&applied))));
        }
        let cache = Self { resources, applied };
        let current = store.current_revision().await?;
        let begin = store.compacted().await?.max(Revision(current.0.saturating_sub(REPLAY)));
        cache.fill(store, begin.max(Revision(1))).await?;
        Ok(cache)
    }

    /// Follows the store until `shutdown`.
    pub async fn run(self: Arc<Self>, store: Arc<dyn Store>, shutdown: CancellationToken) {
        loop {
            let followed = tokio::select! {
                followed = self.follow(&*store) => followed,
                () = shutdown.cancelled() => return,
            };
            match followed {
                Ok(()) => return, // the store was closed
                Err(StoreError::Compacted { .. }) => {
                    tracing::warn!("the watch cache fell behind the store's history: reading anew");
                    let refill = async {
                        let current = store.current_revision().await?;
                        self.fill(&*store, current).await
                    };
                    if let Err(error) = refill.await {
                        tracing::error!(%error, "could not fill the watch cache");
                    }
                }
                Err(error) => tracing::error!(%error, "the watch of the store broke off"),
            }
            tokio::select! {
                () = tokio::time::sleep(RETRY) => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    /// Replaces all objects by those of one revision.
    async fn fill(&self, store: &dyn Store, revision: Revision) -> Result<(), StoreError> {
        for (group, plurals) in &self.resources {
            for (plural, cache) in plurals {
                let prefix = prefix(&StorageKey { group: group.clone(), plural: plural.clone() });
                let mut objects = Vec::new();
                let mut after = None;
                loop {
                    let range = ListRange {
                        prefix: prefix.clone(),
                        after: after.take(),
                        revision: Some(revision),
                        limit: LOAD_PAGE,
                    };
                    let page = store.list(range).await?;
                    after = page.items.last().map(|item| item.key.to_string());
                    for item in page.items {
                        match parse(&item.value, item.modified) {
                            Ok(object) => {
                                objects.push((item.key[prefix.len()..].into(), Arc::new(object)));
                            }
                            Err(error) => report_unreadable(&item.key, item.modified, &error),
                        }
                    }
                    if !page.more {
                        break;
                    }
                }
                cache.replace(objects, revision);
            }
        }
        self.applied.send_replace(revision);
        Ok(())
    }

    async fn follow(&self, store: &dyn Store) -> Result<(), StoreError> {
        let from = *self.applied.borrow();
        let mut watch = store.watch("", from).await?;
        while let Some(changes) = watch.next().await {
            self.apply(&changes?);
        }
        Ok(())
    }

    fn apply(&self, changes: &[Change]) {
        for change in changes {
            let mut parts = change.key.splitn(3, '/');
            let (Some(group), Some(plural), Some(key)) = (parts.next(), parts.next(), parts.next())
            else {
                continue;
            };
            let group = if group == "core" { "" } else { group };
            let Some(cache) = self.resource(group, plural) else { continue };
            match &change.value {
                None => cache.delete(key, change.revision),
                Some(value) => match parse(value, change.revision) {
                    Ok(object) => cache.put(key, object, value.len(), change.revision),
                    Err(error) => report_unreadable(&change.key, change.revision, &error),
                },
            }
        }
        if let Some(last) = changes.last() {
            self.applied.send_replace(last.revision);
        }
    }

    /// The cache of what is stored under this group and plural name.
    pub fn resource(&self, group: &str, plural: &str) -> Option<&Arc<ResourceCache>> {
        self.resources.get(group)?.get(plural)
    }

    /// All caches, by group and plural name.
    pub fn resources(&self) -> impl Iterator<Item = (&str, &str, &Arc<ResourceCache>)> {
        self.resources.iter().flat_map(|(group, plurals)| {
            plurals.iter().map(move |(plural, cache)| (group.as_str(), plural.as_str(), cache))
        })
    }

    /// All changes up to this revision are here.
    pub fn applied(&self) -> Revision {
        *self.applied.borrow()
    }

    /// Waits until all changes up to `revision` are here.
    pub async fn reach(&self, revision: Revision) {
        if self.applied() >= revision {
            return;
        }
        // Fails only when the sender is gone, and this holds it.
        let _ = self.applied.subscribe().wait_for(|applied| *applied >= revision).await;
    }
}

fn report_unreadable(key: &str, revision: Revision, error: &serde_json::Error) {
    tracing::error!(key, %revision, %error, "an object in the store is not JSON: it is left out");
}

impl Lookup for Cache {
    fn get(
        &self,
        group: &str,
        plural: &str,
        namespace: Option<&str>,
        name: &str,
    ) -> Option<Arc<Value>> {
        self.resource(group, plural)?.get(&object_key(namespace.unwrap_or_default(), name))
    }

    fn list(&self, group: &str, plural: &str, namespace: Option<&str>) -> Vec<Arc<Value>> {
        let Some(cache) = self.resource(group, plural) else { return Vec::new() };
        cache.snapshot(namespace).items.into_iter().map(|(_, object)| object).collect()
    }

    fn version(&self, group: &str, plural: &str) -> Option<u64> {
        self.resource(group, plural).map(|cache| cache.latest().0)
    }
}
