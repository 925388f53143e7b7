//! Where sticky clients went before: written by packets, and cleaned of what doesn't count any more.

use std::collections::{HashMap, HashSet};

use super::{
    apply::Table,
    attribute::Attributes,
    batch::{Batch, Element, TABLE},
    held::Held,
    keys::read_choice,
    layout::AFFINITY,
    socket::NftError,
    uapi::{
        NFT_MSG_GETSETELEM, NFTA_SET_ELEM_LIST_ELEMENTS, NFTA_SET_ELEM_LIST_SET,
        NFTA_SET_ELEM_LIST_TABLE,
    },
};
use crate::{
    backend::Forget,
    model::Endpoint,
    ruleset::{Frontend, Lane},
};

impl Table {
    /// Makes sticky clients forget endpoints that are gone.
    ///
    /// # Errors
    /// When the map can't be read or the kernel refuses.
    pub(crate) fn forget(&mut self, forget: &[Forget]) -> Result<(), NftError> {
        if forget.is_empty() {
            return Ok(());
        }
        let gone = self.choices(|_, choice| {
            choice.is_some_and(|(frontend, endpoint)| {
                forget.iter().any(|f| f.concerns(&frontend, endpoint))
            })
        })?;
        self.remove_choices(&gone)
    }

    /// Removes what leads to no endpoint of what the client asked for: only another program can
    /// have written it, or it is from a time when the proxy was away. How many these were.
    ///
    /// # Errors
    /// As [`Self::forget`].
    pub(super) fn forget_strangers(&mut self) -> Result<usize, NftError> {
        let mut known: HashMap<Frontend, HashSet<Endpoint>> = HashMap::new();
        let strangers = self.choices(|held, choice| {
            choice.is_none_or(|(frontend, endpoint)| {
                let known = known.entry(frontend).or_insert_with(|| endpoints(held, frontend));
                !known.contains(&endpoint)
            })
        })?;
        self.remove_choices(&strangers)?;
        Ok(strangers.len())
    }

    /// The remembered choices that are not wanted, each once.
    fn choices(
        &mut self,
        mut unwanted: impl FnMut(&Held, Option<(Frontend, Endpoint)>) -> bool,
    ) -> Result<Vec<Element>, NftError> {
        let (family, held) = (self.layout.family, &self.held);
        let mut found = Vec::new();
        self.socket.list(
            family,
            NFT_MSG_GETSETELEM,
            |w| {
                w.text_attribute(NFTA_SET_ELEM_LIST_TABLE, TABLE);
                w.text_attribute(NFTA_SET_ELEM_LIST_SET, AFFINITY);
            },
            |message| {
                let Some(list) = message.attributes().find(NFTA_SET_ELEM_LIST_ELEMENTS) else {
                    return;
                };
                let elements = Attributes(list).filter_map(|(_, e)| Element::parse(Attributes(e)));
                found.extend(elements.filter(|e| unwanted(held, read_choice(family, e))));
            },
            || {},
        )?;
        // What was listed twice, as the listing was begun again, goes once.
        found.sort_unstable_by_key(|element| element.key);
        found.dedup_by_key(|element| element.key);
        Ok(found)
    }

    fn remove_choices(&mut self, gone: &[Element]) -> Result<(), NftError> {
        let mut batch = Batch::new(self.layout.family);
        batch.elements(AFFINITY, false, gone.iter().cloned());
        match self.socket.commit(&mut batch) {
            // The time of one of them was up meanwhile.
            Err(error) if error.errno() == Some(libc::ENOENT) => match gone {
                [] | [_] => Ok(()),
                _ => {
                    let (first, second) = gone.split_at(gone.len() / 2);
                    self.remove_choices(first)?;
                    self.remove_choices(second)
                }
            },
            result => result,
        }
    }
}

/// The endpoints that a client may have been sent to, in whichever lane: by the address, or by a
/// node port on it.
fn endpoints(held: &Held, asked: Frontend) -> HashSet<Endpoint> {
    let lanes = Lane::ALL.into_iter().map(|lane| {
        let address = asked.address.filter(|_| lane.with_address());
        Frontend { lane, address, ..asked }
    });
    lanes.filter_map(|f| held.frontend(&f)).flat_map(|f| f.slots.iter().copied()).collect()
}
