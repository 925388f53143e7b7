//! Indexes over all objects of a resource, kept until the objects change.

use std::sync::{Arc, PoisonError, RwLock};

use serde_json::Value;

use crate::lookup::Lookup;

/// By what it is known that nothing changed.
enum Stamp {
    /// The lookup counts.
    Version(u64),
    /// It does not: the objects themselves. They are held, so that no other can have their address.
    Objects(Vec<Arc<Value>>),
}

impl Stamp {
    /// Whether the objects are still those of this stamp.
    fn holds(&self, version: Option<u64>, objects: Option<&[Arc<Value>]>) -> bool {
        match (self, objects) {
            (Self::Version(known), _) => version == Some(*known),
            (Self::Objects(known), Some(objects)) => {
                known.len() == objects.len()
                    && known.iter().zip(objects).all(|(a, b)| Arc::ptr_eq(a, b))
            }
            (Self::Objects(_), None) => false,
        }
    }
}

/// A value computed from all objects of one resource.
pub(crate) struct Derived<T> {
    group: &'static str,
    plural: &'static str,
    state: RwLock<Option<(Stamp, Arc<T>)>>,
}

impl<T> Derived<T> {
    pub(crate) const fn new(group: &'static str, plural: &'static str) -> Self {
        Self { group, plural, state: RwLock::new(None) }
    }

    /// The value for the objects as they are now. `compute` gets them and the value before.
    pub(crate) fn get(
        &self,
        lookup: &dyn Lookup,
        compute: impl FnOnce(&[Arc<Value>], Option<&T>) -> T,
    ) -> Arc<T> {
        // The version is read before the objects: a change in between makes the value look older
        // than it is, and it is computed once more.
        let version = lookup.version(self.group, self.plural);
        let list = || lookup.list(self.group, self.plural, None);
        let listed = if version.is_some() { None } else { Some(list()) };
        let current = |state: &Option<(Stamp, Arc<T>)>| {
            let (stamp, value) = state.as_ref()?;
            stamp.holds(version, listed.as_deref()).then(|| Arc::clone(value))
        };
        if let Some(value) = current(&self.state.read().unwrap_or_else(PoisonError::into_inner)) {
            return value;
        }
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        // Whoever had the lock before may have done it.
        if let Some(value) = current(&state) {
            return value;
        }
        let objects = listed.unwrap_or_else(list);
        let value = Arc::new(compute(&objects, state.as_ref().map(|(_, value)| &**value)));
        let stamp = version.map_or(Stamp::Objects(objects), Stamp::Version);
        *state = Some((stamp, Arc::clone(&value)));
        value
    }
}
