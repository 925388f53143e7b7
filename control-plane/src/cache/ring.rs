//! What happened to the objects of one resource lately.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::resource::{Event, TooOld};
use crate::store::Revision;

/// So many events are kept however old they are.
const KEEP_EVENTS: usize = 64;
/// More are kept up to this number …
const MAX_EVENTS: usize = 4096;
/// … and this many bytes of JSON …
const MAX_BYTES: usize = 2 << 20;
/// … and this age.
const MAX_AGE: Duration = Duration::from_secs(75);
/// So many of the newest are kept as trees, which watchers that keep up are handed as they are.
const FRESH_EVENTS: usize = 16;

/// Events in the order of their revisions, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Ring {
    packed: VecDeque<Packed>,
    fresh: VecDeque<Arc<Event>>,
    bytes: usize,
    /// Every event newer than this is here.
    floor: Revision,
}

/// An event with its objects as JSON.
#[derive(Debug)]
struct Packed {
    revision: Revision,
    key: Arc<str>,
    at: Instant,
    bytes: usize,
    deleted: bool,
    object: Arc<[u8]>,
    /// The object of the event before of this key, if that is here too.
    previous: Option<Arc<[u8]>>,
}

impl Packed {
    /// `before` are the events before it.
    fn new(event: &Event, before: &VecDeque<Self>) -> Self {
        let previous = event.previous.as_deref().map(|previous| {
            let same = before.iter().rfind(|packed| Arc::ptr_eq(&packed.key, &event.key));
            same.filter(|packed| !packed.deleted)
                .map_or_else(|| text(previous), |packed| Arc::clone(&packed.object))
        });
        Self {
            revision: event.revision,
            key: Arc::clone(&event.key),
            at: event.at,
            bytes: event.bytes,
            deleted: event.deleted,
            object: text(&event.object),
            previous,
        }
    }

    fn unpack(&self) -> Event {
        let tree = |text: &[u8]| Arc::new(serde_json::from_slice(text).unwrap_or_default());
        Event {
            revision: self.revision,
            object: tree(&self.object),
            previous: self.previous.as_deref().map(tree),
            deleted: self.deleted,
            key: Arc::clone(&self.key),
            at: self.at,
            bytes: self.bytes,
            encoded: Default::default(),
        }
    }
}

/// Values have no keys but strings, and memory does not fail to be written to.
fn text(object: &Value) -> Arc<[u8]> {
    serde_json::to_vec(object).unwrap_or_default().into()
}

impl Ring {
    /// An empty ring, of events after a revision.
    pub(super) fn from(floor: Revision) -> Self {
        Self { floor, ..Self::default() }
    }

    /// Takes in the newest event, and forgets what is too old or too much.
    pub(super) fn push(&mut self, event: Arc<Event>) {
        self.bytes += event.bytes;
        self.fresh.push_back(event);
        if self.fresh.len() > FRESH_EVENTS
            && let Some(event) = self.fresh.pop_front()
        {
            let packed = Packed::new(&event, &self.packed);
            self.packed.push_back(packed);
        }
        while self.packed.len() + self.fresh.len() > KEEP_EVENTS
            && let Some(oldest) = self.packed.front()
            && (self.packed.len() + self.fresh.len() > MAX_EVENTS
                || self.bytes > MAX_BYTES
                || oldest.at.elapsed() > MAX_AGE)
        {
            self.bytes -= oldest.bytes;
            self.floor = oldest.revision;
            self.packed.pop_front();
        }
    }

    /// Whether all events after a revision are here.
    ///
    /// # Errors
    /// [`TooOld`]: they are not.
    pub(super) fn check(&self, after: Revision) -> Result<(), TooOld> {
        if after < self.floor {
            return Err(TooOld { requested: after, oldest: self.floor });
        }
        Ok(())
    }

    /// All events after a revision.
    ///
    /// # Errors
    /// [`TooOld`]: some of them are no longer here.
    pub(super) fn since(&self, seen: Revision) -> Result<Vec<Arc<Event>>, TooOld> {
        self.check(seen)?;
        let packed = self.packed.partition_point(|event| event.revision <= seen);
        let fresh = self.fresh.partition_point(|event| event.revision <= seen);
        let unpacked = self.packed.range(packed..).map(|event| Arc::new(event.unpack()));
        Ok(unpacked.chain(self.fresh.range(fresh..).cloned()).collect())
    }
}
