//! Telling states of the rules from each other, by a number for what is in each table.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
};

use super::{
    chain::Table,
    held::{Delta, Present},
};

/// A number for what is in each table.
pub(crate) type Digests = BTreeMap<Table, u64>;

impl Present {
    /// A number for each table that tells two states from each other, whatever the order of lines.
    pub(crate) fn digest(&self) -> Digests {
        fn hashed(thing: impl Hash) -> u64 {
            let mut hasher = DefaultHasher::new();
            thing.hash(&mut hasher);
            hasher.finish()
        }
        let mut digests = Digests::default();
        let mut add = |table: Table, number: u64| {
            let digest = digests.entry(table).or_default();
            *digest = digest.wrapping_add(number);
        };
        add(Table::Nat, hashed(&self.tail));
        self.own.iter().for_each(|entry| add(Table::Nat, hashed(entry)));
        self.base.iter().for_each(|entry| add(entry.0.0, hashed(entry)));
        self.guests.iter().for_each(|guest| add(guest.table, hashed(guest)));
        for (place, lines) in &self.places {
            add(place.table(), hashed((place, lines.disorderly)));
            lines.set.iter().for_each(|line| add(place.table(), hashed((place, line))));
        }
        digests
    }

    /// Whether this change leads to what was found, whole or cut short: tables are written one after
    /// the other, the filter table twice. If it doesn't, others have written.
    pub(crate) fn may_become(&self, change: &Delta, found: &Self) -> bool {
        let found = found.digest();
        let mut half = change.clone();
        for place in half.places.values_mut() {
            place.removed = Vec::new();
            place.anew = None;
        }
        let after = |change: Delta| {
            let mut after = self.clone();
            after.enter(change);
            after.digest()
        };
        let outcomes = [self.digest(), after(half), after(change.clone())];
        Table::ALL
            .iter()
            .all(|table| outcomes.iter().any(|outcome| outcome.get(table) == found.get(table)))
    }
}
