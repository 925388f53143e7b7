//! A map that never grows over its limit: what was used longest ago makes room.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
};

/// A map of bounded size that knows the order of use.
#[derive(Debug)]
pub(super) struct Recent<K, V> {
    entries: HashMap<K, (V, u64)>,
    order: BTreeMap<u64, K>,
    next: u64,
    limit: usize,
}

impl<K: Copy + Eq + Hash, V> Recent<K, V> {
    /// An empty map for at most `limit` entries, at least one.
    pub(super) fn new(limit: usize) -> Self {
        Self { entries: HashMap::new(), order: BTreeMap::new(), next: 0, limit: limit.max(1) }
    }

    /// The value of a key, which counts as used now.
    pub(super) fn touch(&mut self, key: &K) -> Option<&mut V> {
        let (value, used) = self.entries.get_mut(key)?;
        if *used + 1 != self.next {
            self.order.remove(used);
            *used = self.next;
            self.order.insert(self.next, *key);
            self.next += 1;
        }
        Some(value)
    }

    /// The value of a key, which doesn't count as use.
    pub(super) fn get(&self, key: &K) -> Option<&V> {
        self.entries.get(key).map(|(value, _)| value)
    }

    /// Puts in a value; what had to make room for it, or stood there before, is returned.
    pub(super) fn insert(&mut self, key: K, value: V) -> Option<V> {
        let before = self
            .remove(&key)
            .or_else(|| if self.entries.len() < self.limit { None } else { self.evict() });
        self.entries.insert(key, (value, self.next));
        self.order.insert(self.next, key);
        self.next += 1;
        before
    }

    /// Takes out what was used longest ago.
    pub(super) fn evict(&mut self) -> Option<V> {
        let (_, oldest) = self.order.pop_first()?;
        self.entries.remove(&oldest).map(|(value, _)| value)
    }

    /// Takes out a key.
    pub(super) fn remove(&mut self, key: &K) -> Option<V> {
        let (value, used) = self.entries.remove(key)?;
        self.order.remove(&used);
        Some(value)
    }

    /// Keeps what is still wanted.
    pub(super) fn retain(&mut self, mut keep: impl FnMut(&K, &mut V) -> bool) {
        let order = &mut self.order;
        self.entries.retain(|key, (value, used)| {
            let stays = keep(key, value);
            if !stays {
                order.remove(used);
            }
            stays
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_one_that_was_used_longest_ago_makes_room() {
        let mut recent = Recent::new(2);
        assert_eq!(recent.insert('a', 1), None);
        assert_eq!(recent.insert('b', 2), None);
        assert_eq!(recent.touch(&'a'), Some(&mut 1));
        assert_eq!(recent.insert('c', 3), Some(2), "b makes room");
        assert_eq!(recent.get(&'a'), Some(&1));
        assert_eq!(recent.insert('a', 4), Some(1), "replaced, and nobody else goes");
        assert_eq!(recent.entries.len(), 2);
        recent.retain(|key, _| *key == 'c');
        assert_eq!((recent.entries.len(), recent.order.len()), (1, 1));
        assert_eq!(recent.evict(), Some(3));
        assert_eq!(recent.evict(), None);
    }
}
