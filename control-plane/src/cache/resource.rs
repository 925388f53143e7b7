//! One resource: its objects, its ring of events, and its watchers.

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock, PoisonError, RwLock},
    time::Instant,
};

use bytes::Bytes;
use serde_json::Value;
use tokio::sync::watch;

use super::{ring::Ring, set_resource_version};
use crate::store::Revision;

/// What a watcher is told of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// It is new, or new to what the watcher asked for.
    Added,
    /// It changed.
    Modified,
    /// It is gone, or no longer what the watcher asked for.
    Deleted,
}

impl EventKind {
    /// As in a watch event's `type`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Added => "ADDED",
            Self::Modified => "MODIFIED",
            Self::Deleted => "DELETED",
        }
    }
}

/// A change of one object.
#[derive(Debug)]
pub struct Event {
    /// When.
    pub revision: Revision,
    /// The object afterwards; if it was deleted, as it was last, at the deletion's revision.
    pub object: Arc<Value>,
    /// The object before, if there was one.
    pub previous: Option<Arc<Value>>,
    /// Whether it was deleted.
    pub deleted: bool,
    pub(super) key: Arc<str>,
    pub(super) at: Instant,
    /// The length of the object as JSON, as far as it is known.
    pub(super) bytes: usize,
    pub(super) encoded: [OnceLock<Bytes>; 3],
}

/// What an event is to one watcher.
#[derive(Clone, Debug)]
pub struct Selected {
    /// In its eyes.
    pub kind: EventKind,
    /// The object to show.
    pub object: Arc<Value>,
    /// Whether that is the event's own object, so that the encoded form is everybody's.
    pub shared: bool,
}

impl Event {
    /// `namespace/name`, or the name.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// What this is to a watcher who wants objects that match; `None` if nothing.
    pub fn select(&self, matches: impl Fn(&Arc<Value>) -> bool) -> Option<Selected> {
        let now = !self.deleted && matches(&self.object);
        let before = self.previous.as_ref().is_some_and(&matches);
        let shared = |kind| Selected { kind, object: Arc::clone(&self.object), shared: true };
        match (now, before) {
            (true, false) => Some(shared(EventKind::Added)),
            (true, true) => Some(shared(EventKind::Modified)),
            (false, false) => None,
            (false, true) if self.deleted => Some(shared(EventKind::Deleted)),
            // It does not match any more. It is shown as it was when it did, at the revision of
            // the change, as Kubernetes' own cache has it.
            (false, true) => {
                let mut object = self.previous.as_deref().cloned().unwrap_or_default();
                set_resource_version(&mut object, self.revision);
                let object = Arc::new(object);
                Some(Selected { kind: EventKind::Deleted, object, shared: false })
            }
        }
    }

    /// The event as a line of a JSON watch, made once for each kind.
    pub fn encoded(&self, kind: EventKind) -> Bytes {
        self.encoded[kind as usize].get_or_init(|| encode(kind, &self.object)).clone()
    }
}

/// A line of a JSON watch.
pub(crate) fn encode(kind: EventKind, object: &Value) -> Bytes {
    let mut line = Vec::with_capacity(1024);
    line.extend_from_slice(br#"{"type":""#);
    line.extend_from_slice(kind.as_str().as_bytes());
    line.extend_from_slice(br#"","object":"#);
    // Values have no keys but strings, and memory does not fail to be written to.
    let _ = serde_json::to_writer(&mut line, object);
    line.extend_from_slice(b"}\n");
    line.into()
}

#[derive(Debug, Default)]
struct State {
    objects: BTreeMap<Arc<str>, Arc<Value>>,
    ring: Ring,
    /// The newest event.
    latest: Revision,
}

/// The objects of one resource. See the [module](super).
#[derive(Debug)]
pub struct ResourceCache {
    state: RwLock<State>,
    changed: watch::Sender<Revision>,
    applied: Arc<watch::Sender<Revision>>,
}

/// Objects as of a revision.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// By key.
    pub items: Vec<(Arc<str>, Arc<Value>)>,
    /// As of when.
    pub revision: Revision,
}

/// A watch from a revision that is no longer kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too old resource version: {requested} ({oldest})")]
pub struct TooOld {
    /// From where.
    pub requested: Revision,
    /// The oldest that is left.
    pub oldest: Revision,
}

/// A place in the ring.
#[derive(Debug)]
pub struct Watcher {
    cache: Arc<ResourceCache>,
    changed: watch::Receiver<Revision>,
    seen: Revision,
}

impl ResourceCache {
    pub(super) fn new(applied: Arc<watch::Sender<Revision>>) -> Self {
        Self { state: RwLock::default(), changed: watch::Sender::new(Revision(0)), applied }
    }

    fn read<T>(&self, read: impl FnOnce(&State) -> T) -> T {
        read(&self.state.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn replace(&self, objects: Vec<(Arc<str>, Arc<Value>)>, revision: Revision) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        *state = State {
            objects: objects.into_iter().collect(),
            ring: Ring::from(revision),
            latest: revision,
        };
        drop(state);
        self.changed.send_replace(revision);
    }

    pub(super) fn put(&self, key: &str, object: Value, bytes: usize, revision: Revision) {
        let object = Arc::new(object);
        self.change(revision, |state| {
            let (key, previous) = match state.objects.get_key_value(key) {
                Some((key, previous)) => (Arc::clone(key), Some(Arc::clone(previous))),
                None => (Arc::from(key), None),
            };
            state.objects.insert(Arc::clone(&key), Arc::clone(&object));
            Some((key, object, previous, false, bytes))
        });
    }

    pub(super) fn delete(&self, key: &str, revision: Revision) {
        self.change(revision, |state| {
            let (key, previous) = state.objects.remove_entry(key)?;
            let mut object = (*previous).clone();
            set_resource_version(&mut object, revision);
            Some((key, Arc::new(object), Some(previous), true, 0))
        });
    }

    fn change(
        &self,
        revision: Revision,
        change: impl FnOnce(
            &mut State,
        ) -> Option<(Arc<str>, Arc<Value>, Option<Arc<Value>>, bool, usize)>,
    ) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if let Some((key, object, previous, deleted, bytes)) = change(&mut state) {
            state.ring.push(Arc::new(Event {
                revision,
                object,
                previous,
                deleted,
                key,
                at: Instant::now(),
                bytes,
                encoded: Default::default(),
            }));
            state.latest = revision;
        }
        drop(state);
        self.changed.send_replace(revision);
    }

    /// One object.
    pub fn get(&self, key: &str) -> Option<Arc<Value>> {
        self.read(|state| state.objects.get(key).cloned())
    }

    /// How many objects there are.
    pub fn count(&self) -> usize {
        self.read(|state| state.objects.len())
    }

    /// Objects, of one namespace or of all, as of now.
    pub fn snapshot(&self, namespace: Option<&str>) -> Snapshot {
        self.page(namespace, None, usize::MAX, |_| true).0
    }

    /// Objects that match, behind a key, at most so many; and how many follow them, matching or
    /// not.
    pub fn page(
        &self,
        namespace: Option<&str>,
        after: Option<&str>,
        limit: usize,
        matches: impl Fn(&Arc<Value>) -> bool,
    ) -> (Snapshot, Page) {
        // Read first: all events up to here are in the state that is looked at next.
        let applied = *self.applied.borrow();
        self.read(|state| {
            let revision = applied.max(state.latest);
            let prefix = namespace.filter(|ns| !ns.is_empty()).map(|ns| format!("{ns}/"));
            let prefix = prefix.as_deref().unwrap_or_default();
            let from = match after {
                Some(after) if after >= prefix => std::ops::Bound::Excluded(after),
                _ => std::ops::Bound::Included(prefix),
            };
            let mut range = state
                .objects
                .range::<str, _>((from, std::ops::Bound::Unbounded))
                .take_while(|(key, _)| key.starts_with(prefix));
            let mut items = Vec::new();
            let mut page = Page::default();
            while let Some((key, object)) = range.next() {
                if !matches(object) {
                    continue;
                }
                if items.len() == limit {
                    page.more = true;
                    page.remaining = 1 + range.count();
                    break;
                }
                items.push((Arc::clone(key), Arc::clone(object)));
            }
            (Snapshot { items, revision }, page)
        })
    }

    /// The revision of the newest event.
    pub fn latest(&self) -> Revision {
        self.read(|state| state.latest)
    }

    /// Whether no object has changed since `revision`, so that what is here is as of then too.
    pub fn unchanged_since(&self, revision: Revision) -> bool {
        self.read(|state| state.latest <= revision)
    }

    /// A watcher who is told of all that is newer than `after`.
    ///
    /// # Errors
    /// [`TooOld`]: some of that is no longer kept.
    pub fn watch(self: &Arc<Self>, after: Revision) -> Result<Watcher, TooOld> {
        let changed = self.changed.subscribe();
        self.read(|state| state.ring.check(after))?;
        Ok(Watcher { cache: Arc::clone(self), changed, seen: after })
    }
}

/// What is behind a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// Whether more objects match.
    pub more: bool,
    /// How many objects follow, whether they match or not.
    pub remaining: usize,
}

impl Watcher {
    /// Waits for events beyond those already handed out, and returns all there are. Loses nothing
    /// when dropped before it is ready.
    ///
    /// # Errors
    /// [`TooOld`]: this watcher has been too slow, and must list again.
    pub async fn next(&mut self) -> Result<Vec<Arc<Event>>, TooOld> {
        loop {
            self.changed.borrow_and_update();
            let events = self.pending()?;
            if let Some(last) = events.last() {
                self.seen = last.revision;
                return Ok(events);
            }
            // Fails only when the sender is gone, and the cache holds it.
            let _ = self.changed.changed().await;
        }
    }

    /// A revision that this watcher has seen all up to, to go on from there later.
    ///
    /// # Errors
    /// The events that are still to be handed out before it.
    pub fn bookmark(&mut self) -> Result<Result<Revision, Vec<Arc<Event>>>, TooOld> {
        // Read first: all events up to here are in the ring that is looked at next.
        let applied = *self.cache.applied.borrow();
        let events = self.pending()?;
        if let Some(last) = events.last() {
            self.seen = last.revision;
            return Ok(Err(events));
        }
        self.seen = self.seen.max(applied);
        Ok(Ok(self.seen))
    }

    fn pending(&self) -> Result<Vec<Arc<Event>>, TooOld> {
        self.cache.read(|state| state.ring.since(self.seen))
    }
}
