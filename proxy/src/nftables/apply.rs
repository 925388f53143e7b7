//! Writing: one transaction for each change, and only the difference.

use std::collections::HashSet;

use super::{
    batch::Batch,
    held::{Changes, Held, Next, Stale},
    layout::{Layout, PickChain},
    observe::{Found, observe},
    socket::{NftError, NftSocket},
};
use crate::{
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

/// What came of writing.
#[derive(Debug, Default)]
pub(crate) struct Applied {
    /// Elements removed or added.
    pub(crate) elements: usize,
    /// Whether the whole table was made anew, and why.
    pub(crate) rebuilt: Option<String>,
    /// What the connection table still knows of endpoints that are gone.
    pub(crate) stale: Vec<Stale>,
    /// What the kernel refused; the old state of these stays, all others are written.
    pub(crate) refused: Vec<(Unit, NftError)>,
}

impl Table {
    /// Opens a socket for the table; nothing is read or written yet.
    ///
    /// # Errors
    /// When there are no netfilter sockets to be had.
    pub(crate) fn open(layout: Layout) -> Result<Self, NftError> {
        Ok(Self { socket: NftSocket::open()?, layout, held: Held::default() })
    }

    /// Which family this table is for.
    pub(crate) fn family(&self) -> Family {
        self.layout.family
    }

    /// The number by which the kernel names this table's socket in notifications.
    pub(crate) fn port(&self) -> u32 {
        self.socket.port()
    }

    /// The generation of the kernel's tables.
    ///
    /// # Errors
    /// When the kernel doesn't say.
    pub(crate) fn generation(&mut self) -> Result<u32, NftError> {
        self.socket.generation()
    }

    /// What the table is known to hold.
    pub(crate) fn held(&self) -> &Held {
        &self.held
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
        let mut picks: HashSet<PickChain> = Layout::common_picks().collect();
        picks.extend(Layout::one_pick_of_each());
        self.socket.check(&mut self.static_part(&picks))
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
        let mut chains: HashSet<PickChain> = Layout::common_picks().collect();
        chains.extend(units.iter().filter_map(|unit| needed_chain(*unit, desired)));
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
                    self.held.enter(next, &mut applied.stale);
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

    fn static_part(&self, picks: &HashSet<PickChain>) -> Batch {
        let mut batch = Batch::new(self.layout.family);
        let fingerprint = self.layout.fingerprint();
        // Adding first makes the removal valid whether there is a table or not.
        batch.add_table("");
        batch.delete_table();
        batch.add_table(&fingerprint);
        for set in self.layout.sets() {
            batch.add_set(&set);
        }
        let mut picks: Vec<PickChain> = picks.iter().copied().collect();
        picks.sort_unstable();
        let chains: Vec<_> = self
            .layout
            .chains()
            .into_iter()
            .chain(picks.into_iter().map(|pick| self.layout.pick_chain(pick)))
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
                [unit] => applied.refused.push((*unit, error)),
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
            self.held.enter(next, &mut applied.stale);
        }
        Ok(())
    }

    /// Makes the chains that these units will point to and that aren't there, in a transaction of
    /// their own.
    fn make_chains(&mut self, units: &[Unit], desired: &Desired) -> Result<(), NftError> {
        let family = self.layout.family;
        let missing: HashSet<PickChain> = units
            .iter()
            .filter(|unit| unit.family() == family)
            .filter_map(|unit| needed_chain(*unit, desired))
            .filter(|chain| !self.held.chains.contains(chain))
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let mut batch = Batch::new(family);
        for pick in &missing {
            let chain = self.layout.pick_chain(*pick);
            batch.add_chain(&chain);
            batch.add_rules(&chain);
        }
        self.socket.commit(&mut batch)?;
        self.held.chains.extend(missing);
        Ok(())
    }
}

fn needed_chain(unit: Unit, desired: &Desired) -> Option<PickChain> {
    let Unit::Frontend(frontend) = unit else { return None };
    match desired.action(&frontend)? {
        Action::Forward { endpoints, masquerade, .. } => Some(PickChain {
            lane: frontend.lane,
            masquerade: *masquerade,
            count: u32::try_from(endpoints.len()).ok()?,
        }),
        Action::Drop | Action::Reject => None,
    }
}

/// Whether reading back and writing the difference may help.
fn may_be_cured(error: &NftError) -> bool {
    !matches!(error.errno(), Some(libc::EPERM | libc::EACCES))
}
