//! Which endpoint has which index.
//!
//! The kernel picks a random index below N and looks up who is there, so the indices in use are
//! always 0 to N−1. Endpoints that stay keep their index: the fewest elements are written, and a
//! restart with nothing changed writes none.

use std::borrow::Cow;

use crate::model::Endpoint;

/// One index whose endpoint changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlotChange {
    pub(crate) index: u32,
    /// Who was there, so that the element is removed first.
    pub(crate) before: Option<Endpoint>,
    /// Who is there now.
    pub(crate) after: Option<Endpoint>,
}

/// The new indices for `wanted` (none twice), and what to change to get there from `held`.
pub(crate) fn assign(held: &[Endpoint], wanted: &[Endpoint]) -> (Vec<Endpoint>, Vec<SlotChange>) {
    let mut wanted = Cow::Borrowed(wanted);
    if !wanted.is_sorted() {
        wanted.to_mut().sort_unstable();
    }
    let mut stays = vec![false; wanted.len()];
    // What is held is mostly in order too: most stand right after the one before.
    let mut next = 0;
    let mut slots: Vec<Option<Endpoint>> = held
        .iter()
        .map(|endpoint| {
            let place = match wanted.get(next) {
                Some(there) if there == endpoint => next,
                _ => wanted.binary_search(endpoint).ok()?,
            };
            next = place + 1;
            // An endpoint that stands twice in what is held keeps its first place only.
            (!std::mem::replace(&mut stays[place], true)).then_some(*endpoint)
        })
        .collect();
    let mut waiting = wanted.iter().zip(stays).filter(|(_, stays)| !stays).map(|(e, _)| *e);
    for slot in &mut slots {
        if slot.is_none() {
            *slot = waiting.next();
        }
    }
    slots.extend(waiting.map(Some));
    // What is still empty is filled from the end.
    let mut after: Vec<Endpoint> = Vec::with_capacity(wanted.len());
    let mut next = 0;
    while next < slots.len() {
        if let Some(endpoint) = slots[next] {
            after.push(endpoint);
            next += 1;
        } else if let Some(last) = slots.pop()
            && next < slots.len()
        {
            slots[next] = last;
        }
    }
    let changes = (0..held.len().max(after.len()))
        .filter_map(|index| {
            let (before, after) = (held.get(index).copied(), after.get(index).copied());
            let index = u32::try_from(index).ok()?;
            (before != after).then_some(SlotChange { index, before, after })
        })
        .collect();
    (after, changes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn endpoints(numbers: &[u8]) -> Vec<Endpoint> {
        numbers.iter().map(|n| Endpoint { address: [10, 0, 0, *n].into(), port: 80 }).collect()
    }

    #[test]
    fn the_fewest_indices_change() {
        type Case<'a> = (&'a str, &'a [u8], &'a [u8], &'a [u8], usize);
        let table: &[Case<'_>] = &[
            ("nothing changed", &[3, 1, 2], &[1, 2, 3], &[3, 1, 2], 0),
            ("one more goes to the end", &[1, 2], &[1, 2, 3], &[1, 2, 3], 1),
            ("one replaced takes its place", &[1, 2, 3], &[1, 3, 4], &[1, 4, 3], 1),
            ("the last moves into the hole", &[1, 2, 3], &[2, 3], &[3, 2], 2),
            ("the last one goes", &[1, 2, 3], &[1, 2], &[1, 2], 1),
            ("all go", &[1, 2], &[], &[], 2),
            ("one that was held twice", &[1, 1, 2], &[1, 2], &[1, 2], 2),
        ];
        for (what, held, wanted, expected, changed) in table {
            let (after, changes) = assign(&endpoints(held), &endpoints(wanted));
            assert_eq!(after, endpoints(expected), "{what}");
            assert_eq!(changes.len(), *changed, "{what}: {changes:?}");
        }
    }

    proptest! {
        #[test]
        fn the_wanted_ones_stand_there_once_each(
            held in proptest::collection::vec(0u8..12, 0..12),
            wanted in proptest::collection::btree_set(0u8..12, 0..12)
                .prop_map(|wanted| wanted.into_iter().collect::<Vec<u8>>()),
            turn in 0usize..12,
        ) {
            // In order, and not in order.
            let mut turned = wanted.clone();
            turned.rotate_left(turn.min(wanted.len()));
            let (mut after, changes) = assign(&endpoints(&held), &endpoints(&turned));
            let mut rebuilt: Vec<Option<Endpoint>> = endpoints(&held).into_iter().map(Some).collect();
            for change in changes {
                let index = change.index as usize;
                rebuilt.resize(rebuilt.len().max(index + 1), None);
                prop_assert_eq!(rebuilt[index], change.before);
                rebuilt[index] = change.after;
            }
            let rebuilt: Vec<Endpoint> = rebuilt.into_iter().flatten().collect();
            prop_assert_eq!(&rebuilt, &after);
            after.sort();
            prop_assert_eq!(after, endpoints(&wanted));
        }
    }
}
