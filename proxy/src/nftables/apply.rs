//! Writing: one transaction for each change, and only the difference.

use std::collections::HashSet;

use super::{
    attribute::Attributes,
    batch::{Batch, Element, TABLE},
    held::{Changes, Held, Next, affinity_seconds, read_choice},
    layout::{self, DynamicChain, PickChain},
    observe::{Found, observe},
    rules::Layout,
    socket::{NftError, NftSocket},
    uapi::{
        NFT_MSG_GETSETELEM, NFTA_SET_ELEM_LIST_ELEMENTS, NFTA_SET_ELEM_LIST_SET,
        NFTA_SET_ELEM_LIST_TABLE,
    },
};
use crate::{
    backend::{Applied, Backend, BackendError, Forget, Goal},
    model::Family,
    ruleset::{Action, Unit, desired::Desired},
};

/// The proxy's table in one family, and what it is known to hold.
#[derive(Debug)]
pub(crate) struct Table {
    socket: NftSocket,
    layout: Layout,
    held: Held,
}

impl Table {
    /// Opens a socket for the table; nothing is read or written yet.
    ///
    /// # Errors
    /// When there are no netfilter sockets to be had.
    pub(crate) fn open(layout: Layout) -> Result<Self, NftError> {
        Ok(Self { socket: NftSocket::open()?, layout, held: Held::default() })
    }

    /// The number by which the kernel names this table's socket in notifications.
    pub(crate) fn port(&self) -> u32 {
        self.socket.port()
    }

    /// Reads what the kernel holds and writes the difference to what is desired, or the whole
    /// table if it isn't as it should be; either way in one transaction, with no gap for packets.
    ///
    /// # Errors
    /// When the kernel can't be read or takes not even the empty table.
    pub(crate) fn synchronize(&mut self, desired: &Desired) -> Result<Applied, NftError> {
        let mut applied = Applied::default();
        let mut strays = Changes::default();
        match observe(&mut self.socket, &self.layout)? {
            Found::Intact { held, strays: found } => {
                self.held = held;
                strays = found;
            }
            Found::Different(why) => {
                self.rebuild(desired, &mut applied)?;
                applied.rebuilt = Some(why);
            }
        }
        let units: HashSet<Unit> = desired
            .units()
            .filter(|unit| unit.family() == self.layout.family)
            .chain(self.held.units())
            .collect();
        let mut units: Vec<Unit> = units.into_iter().collect();
        units.sort_unstable();
        applied.elements += strays.len();
        if !strays.is_empty() {
            let mut batch = Batch::new(self.layout.family);
            strays.write(&mut batch);
            self.socket.commit(&mut batch)?;
        }
        self.bisect(&units, desired, &mut applied);
        Ok(applied)
    }

    /// Writes what has changed in these units.
    ///
    /// # Errors
    /// When nothing can be written at all; single units that the kernel refuses are in what is
    /// returned.
    pub(crate) fn apply(&mut self, units: &[Unit], desired: &Desired) -> Result<Applied, NftError> {
        let mut applied = Applied::default();
        match self.commit(units, desired, &mut applied) {
            Ok(()) => Ok(applied),
            // Somebody may have edited the table: look before blaming a unit.
            Err(error) if may_be_cured(&error) => {
                tracing::warn!(%error, "the kernel refused a change; reading back what it holds");
                self.synchronize(desired)
            }
            Err(error) => Err(error),
        }
    }

    /// Has the kernel check all chains, rules and maps without keeping them, in a table that is
    /// made and removed in one transaction. Nothing changes, and no packet sees it.
    ///
    /// # Errors
    /// When the kernel lacks something, with the rule that needs it.
    pub(crate) fn probe(&mut self) -> Result<(), NftError> {
        if let Found::Intact { .. } = observe(&mut self.socket, &self.layout)? {
            // It has taken them before.
            return Ok(());
        }
        let chains = Layout::common_chains().chain(Layout::one_of_each()).collect();
        self.socket.check(&mut self.static_part(&chains))
    }

    /// Removes the table; it is no error if there is none.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) fn remove(&mut self) -> Result<(), NftError> {
        let mut batch = Batch::new(self.layout.family);
        batch.add_table("");
        batch.delete_table();
        self.socket.commit(&mut batch)?;
        self.held = Held::default();
        Ok(())
    }

    /// Makes the table anew with all that is desired, in one transaction. If the kernel refuses
    /// that, the table is made empty, and the units are tried one by one afterwards.
    fn rebuild(&mut self, desired: &Desired, applied: &mut Applied) -> Result<(), NftError> {
        let family = self.layout.family;
        let mut units: Vec<Unit> = desired.units().filter(|u| u.family() == family).collect();
        units.sort_unstable();
        let mut chains: HashSet<DynamicChain> = Layout::common_chains().collect();
        chains.extend(units.iter().flat_map(|unit| needed_chains(*unit, desired)));
        let mut fresh = Held::default();
        fresh.chains = chains.clone();
        let mut changes = Changes::default();
        let next: Vec<Next> =
            units.iter().filter_map(|u| fresh.plan(*u, desired, &mut changes)).collect();

        let mut batch = self.static_part(&chains);
        let elements = changes.len();
        changes.write(&mut batch);
        match self.socket.commit(&mut batch) {
            Ok(()) => {
                self.held = fresh;
                applied.elements += elements;
                for next in next {
                    self.held.enter(next, &mut applied.aftermath);
                }
                Ok(())
            }
            Err(error) if elements > 0 => {
                tracing::warn!(%error, "the kernel refused the ruleset as a whole; writing it in parts");
                self.socket.commit(&mut self.static_part(&chains))?;
                self.held = fresh;
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn static_part(&self, dynamic: &HashSet<DynamicChain>) -> Batch {
        let mut batch = Batch::new(self.layout.family);
        let fingerprint = self.layout.fingerprint();
        // Adding first makes the removal valid whether there is a table or not.
        batch.add_table("");
        batch.delete_table();
        batch.add_table(&fingerprint);
        for set in self.layout.sets() {
            batch.add_set(&set);
        }
        let mut dynamic: Vec<DynamicChain> = dynamic.iter().copied().collect();
        dynamic.sort_unstable();
        let chains: Vec<_> = self
            .layout
            .chains()
            .into_iter()
            .chain(dynamic.into_iter().map(|chain| self.layout.dynamic_chain(chain)))
            .collect();
        for chain in &chains {
            batch.add_chain(chain);
        }
        for chain in &chains {
            batch.add_rules(chain);
        }
        batch
    }

    /// Writes these units in one transaction, or, where the kernel refuses, in halves, until only
    /// those are left out that it refuses by themselves.
    fn bisect(&mut self, units: &[Unit], desired: &Desired, applied: &mut Applied) {
        match self.commit(units, desired, applied) {
            Ok(()) => {}
            Err(error) => match units {
                [] => {}
                [unit] => applied.refused.push((*unit, error.into())),
                _ => {
                    let (first, second) = units.split_at(units.len() / 2);
                    self.bisect(first, desired, applied);
                    self.bisect(second, desired, applied);
                }
            },
        }
    }

    fn commit(
        &mut self,
        units: &[Unit],
        desired: &Desired,
        applied: &mut Applied,
    ) -> Result<(), NftError> {
        let family = self.layout.family;
        let mut changes = Changes::default();
        let next: Vec<Next> = units
            .iter()
            .filter(|unit| unit.family() == family)
            .filter_map(|unit| self.held.plan(*unit, desired, &mut changes))
            .collect();
        self.make_chains(units, desired)?;
        let elements = changes.len();
        let mut batch = Batch::new(family);
        changes.write(&mut batch);
        self.socket.commit(&mut batch)?;
        applied.elements += elements;
        for next in next {
            self.held.enter(next, &mut applied.aftermath);
        }
        Ok(())
    }

    /// Makes the chains that these units will point to and that aren't there, in a transaction of
    /// their own.
    fn make_chains(&mut self, units: &[Unit], desired: &Desired) -> Result<(), NftError> {
        let family = self.layout.family;
        let missing: HashSet<DynamicChain> = units
            .iter()
            .filter(|unit| unit.family() == family)
            .flat_map(|unit| needed_chains(*unit, desired))
            .filter(|chain| !self.held.chains.contains(chain))
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let mut batch = Batch::new(family);
        let chains: Vec<_> = missing.iter().map(|c| self.layout.dynamic_chain(*c)).collect();
        for chain in &chains {
            batch.add_chain(chain);
        }
        for chain in &chains {
            batch.add_rules(chain);
        }
        self.socket.commit(&mut batch)?;
        self.held.chains.extend(missing);
        Ok(())
    }

    /// Makes sticky clients forget endpoints that are gone.
    ///
    /// # Errors
    /// When the map can't be read or the kernel refuses.
    pub(crate) fn forget(&mut self, forget: &[Forget]) -> Result<(), NftError> {
        if forget.is_empty() {
            return Ok(());
        }
        let family = self.layout.family;
        let mut gone = Vec::new();
        self.socket.list(
            family,
            NFT_MSG_GETSETELEM,
            |w| {
                w.text_attribute(NFTA_SET_ELEM_LIST_TABLE, TABLE);
                w.text_attribute(NFTA_SET_ELEM_LIST_SET, layout::AFFINITY);
            },
            |message| {
                let Some(list) = message.attributes().find(NFTA_SET_ELEM_LIST_ELEMENTS) else {
                    return;
                };
                let elements = Attributes(list).filter_map(|(_, e)| Element::parse(Attributes(e)));
                gone.extend(elements.filter(|element| {
                    read_choice(family, element).is_some_and(|(frontend, endpoint)| {
                        forget.iter().any(|f| f.concerns(&frontend, endpoint))
                    })
                }));
            },
            || {},
        )?;
        for element in gone {
            let mut batch = Batch::new(family);
            batch.elements(layout::AFFINITY, false, [element]);
            match self.socket.commit(&mut batch) {
                Ok(()) => {}
                // Its time was up meanwhile.
                Err(error) if error.errno() == Some(libc::ENOENT) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Backend for Table {
    fn family(&self) -> Family {
        self.layout.family
    }

    fn synchronize(&mut self, goal: Goal<'_>) -> Result<Applied, BackendError> {
        Ok(self.synchronize(goal.desired)?)
    }

    fn apply(&mut self, units: &[Unit], goal: Goal<'_>) -> Result<Applied, BackendError> {
        Ok(self.apply(units, goal.desired)?)
    }

    fn forget(&mut self, forget: &[Forget]) -> Result<(), BackendError> {
        Ok(self.forget(forget)?)
    }

    fn generation(&mut self) -> Option<u32> {
        self.socket.generation().ok()
    }

    fn units(&self) -> usize {
        self.held.len()
    }

    fn remove(&mut self) -> Result<(), BackendError> {
        Ok(self.remove()?)
    }
}

/// The chains that a unit's elements will point to, with those that these point to.
fn needed_chains(unit: Unit, desired: &Desired) -> Vec<DynamicChain> {
    let Unit::Frontend(frontend) = unit else { return Vec::new() };
    let Some(action) = desired.action(&frontend) else { return Vec::new() };
    let Action::Forward { endpoints, masquerade, .. } = action else { return Vec::new() };
    let seconds = affinity_seconds(action);
    let pick = |sticky| {
        DynamicChain::Pick(PickChain {
            lane: frontend.lane,
            masquerade: *masquerade,
            sticky,
            count: u32::try_from(endpoints.len()).unwrap_or(u32::MAX),
        })
    };
    let mut chains = vec![pick(false)];
    if let Some(seconds) = seconds {
        chains.extend([pick(true), DynamicChain::Remember(seconds)]);
    }
    chains
}

/// Whether reading back and writing the difference may help.
fn may_be_cured(error: &NftError) -> bool {
    !matches!(error.errno(), Some(libc::EPERM | libc::EACCES))
}
