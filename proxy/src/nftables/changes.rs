//! Elements to write, set by set.

use std::collections::BTreeMap;

use super::batch::{Batch, Bytes, Data, Element};

/// Elements to remove from and to add to each set: removals first.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    removed: BTreeMap<&'static str, Vec<Element>>,
    added: BTreeMap<&'static str, Vec<Element>>,
}

impl Changes {
    /// Removes an element, which must be there.
    pub(crate) fn remove(&mut self, set: &'static str, key: Bytes) {
        self.removed.entry(set).or_default().push(Element { key, data: Data::None });
    }

    /// Adds an element, which must not be there, or must have been removed in the same breath.
    pub(crate) fn add(&mut self, set: &'static str, key: Bytes, data: Data) {
        self.added.entry(set).or_default().push(Element { key, data });
    }

    /// Replaces all elements of a set by others.
    pub(crate) fn replace(&mut self, set: &'static str, old: Vec<Element>, new: Vec<Element>) {
        for (list, elements) in [(&mut self.removed, old), (&mut self.added, new)] {
            if !elements.is_empty() {
                list.entry(set).or_default().extend(elements);
            }
        }
    }

    /// Whether there is nothing to do.
    pub(crate) fn is_empty(&self) -> bool {
        self.removed.is_empty() && self.added.is_empty()
    }

    /// How many elements are removed or added.
    pub(crate) fn len(&self) -> usize {
        self.removed.values().chain(self.added.values()).map(Vec::len).sum()
    }

    /// The elements to add to a set.
    pub(crate) fn added(&self, set: &str) -> &[Element] {
        self.added.get(set).map_or(&[], Vec::as_slice)
    }

    /// The elements to remove from each set.
    pub(crate) fn removals(&self) -> impl Iterator<Item = (&'static str, &[Element])> {
        self.removed.iter().map(|(set, elements)| (*set, &elements[..]))
    }

    /// Writes all of it.
    pub(crate) fn write(self, batch: &mut Batch) {
        for (set, elements) in self.removed {
            batch.elements(set, false, elements);
        }
        for (set, elements) in self.added {
            batch.elements(set, true, elements);
        }
    }
}
