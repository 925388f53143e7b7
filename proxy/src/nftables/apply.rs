//! Writing: one transaction for each change, and only the difference.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    batch::{Batch, Chain, TABLE},
    changes::Changes,
    held::{Held, Next, Plan, affinity_seconds},
    layout::{DynamicChain, Layout, PickChain},
    look::has_table,
    monitor::{Ears, Writing},
    observe::{Found, observe, was_taken},
    socket::{NftError, NftSocket},
    sources::{Sources, SourcesId},
};
use crate::{
    backend::{Applied, Backend, BackendError, Forget, Goal},
    memory,
    model::Family,
    ruleset::{Action, Unit, desired::Desired},
};

/// What a table has of what is desired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Written {
    /// All, but for what the kernel refuses.
    All,
    /// All, unless another program changed it since.
    Unsure,
    /// Nothing but what is the same whatever is desired.
    Nothing,
}

/// The proxy's table in one family, and what it is known to hold.
#[derive(Debug)]
pub(crate) struct Table {
    pub(super) socket: NftSocket,
    ears: Ears,
    pub(super) layout: Layout,
    pub(super) held: Held,
}

impl Table {
    /// Opens a socket for the table; nothing is read or written yet.
    ///
    /// # Errors
    /// When there are no netfilter sockets to be had.
    pub(crate) fn open(layout: Layout) -> Result<Self, NftError> {
        Ok(Self::over(NftSocket::open()?, layout))
    }

    /// Talks over this socket.
    pub(crate) fn over(socket: NftSocket, layout: Layout) -> Self {
        Self { socket, ears: Ears::default(), layout, held: Held::default() }
    }

    /// What a monitor has to know, to be deaf to what is written here.
    pub(crate) fn writing(&self) -> Writing {
        Writing { port: self.socket.port(), ears: self.ears.clone() }
    }

    /// Reads what the kernel holds and writes the difference to what is desired, or the whole
    /// table if it isn't as it should be; either way in one transaction, with no gap for packets.
    ///
    /// # Errors
    /// When the kernel can't be read or takes not even the empty table.
    pub(crate) fn synchronize(&mut self, desired: &Desired) -> Result<Applied, NftError> {
        let mut applied = Applied::default();
        let generation = self.socket.generation()?;
        let mut result = self.compare_and_write(desired, &mut applied, Some(generation));
        if let Ok(Written::Unsure) = result {
            result = self.compare_and_write(desired, &mut applied, None);
        }
        memory::give_back();
        result.map(|_| applied)
    }

    /// Compares and writes. If the tables are in this generation, it may be done unheard by the
    /// monitor.
    pub(super) fn compare_and_write(
        &mut self,
        desired: &Desired,
        applied: &mut Applied,
        generation: Option<u32>,
    ) -> Result<Written, NftError> {
        let mut strays = Changes::default();
        match observe(&mut self.socket, &self.layout)? {
            Found::Intact { held, strays: found } => {
                self.held = *held;
                strays = found;
            }
            Found::Different(why) => {
                applied.rebuilt = Some(why);
                let written = self.rebuild(desired, applied, generation)?;
                if written != Written::Nothing {
                    return Ok(written);
                }
            }
        }
        let mut units: Vec<Unit> = desired
            .units()
            .filter(|unit| unit.family() == self.layout.family)
            .chain(self.held.units())
            .collect();
        units.sort_unstable();
        units.dedup();
        applied.elements += strays.len();
        if !strays.is_empty() {
            let mut batch = Batch::new(self.layout.family);
            strays.write(&mut batch);
            self.socket.commit(&mut batch)?;
        }
        self.bisect(&units, desired, applied)?;
        self.drop_unused();
        match self.forget_strangers() {
            Ok(strangers) => applied.elements += strangers,
            Err(error) => {
                tracing::warn!(%error, "sticky clients may be sent to endpoints that are gone");
            }
        }
        Ok(Written::All)
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
        if was_taken(&mut self.socket, &self.layout)? {
            return Ok(());
        }
        let mut needed = Needed::default();
        needed.chains.extend(Layout::common_chains().chain(Layout::one_of_each()));
        needed.lists.insert(SourcesId::default(), Sources::new(self.layout.family, &[]));
        self.socket.check(&mut static_part(&self.layout, &needed))
    }

    /// Removes the table; if there is none, nothing is written.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) fn remove(&mut self) -> Result<(), NftError> {
        if !has_table(&mut self.socket, self.layout.family, TABLE)? {
            return Ok(());
        }
        let mut batch = Batch::new(self.layout.family);
        batch.add_table("");
        batch.delete_table();
        self.socket.commit(&mut batch)?;
        self.held = Held::default();
        Ok(())
    }

    /// Makes the table anew with all that is desired, in one transaction. If the kernel refuses
    /// that, the table is made empty, for the units to be tried one by one afterwards.
    fn rebuild(
        &mut self,
        desired: &Desired,
        applied: &mut Applied,
        generation: Option<u32>,
    ) -> Result<Written, NftError> {
        let Whole { needed, mut plan } = whole(&self.layout, desired);
        let mut batch = static_part(&self.layout, &needed);
        let elements = plan.early.len() + plan.changes.len();
        std::mem::take(&mut plan.early).write(&mut batch);
        std::mem::take(&mut plan.changes).write(&mut batch);
        let mut commit = || self.socket.commit(&mut batch);
        let result = match generation {
            Some(_) => self.ears.covered(commit),
            None => commit(),
        };
        drop(batch);
        if let Err(error) = result {
            if elements == 0 {
                return Err(error);
            }
            tracing::warn!(%error, "the kernel refused the ruleset as a whole; writing it in parts");
            self.socket.commit(&mut static_part(&self.layout, &needed))?;
            self.held = needed.held();
            return Ok(Written::Nothing);
        }
        self.held = needed.held();
        applied.elements += elements;
        for next in plan.early_next.into_iter().chain(plan.next) {
            self.held.enter(next, &mut applied.forget);
        }
        // One generation is this one. What another program wrote meanwhile was not heard.
        let missed = match generation {
            Some(generation) => self.socket.generation()? != generation.wrapping_add(1),
            None => false,
        };
        Ok(if missed { Written::Unsure } else { Written::All })
    }

    /// Writes these units in one transaction, or, where the kernel refuses, in halves, until only
    /// those are left out that it refuses by themselves.
    ///
    /// # Errors
    /// When it would refuse any.
    fn bisect(
        &mut self,
        units: &[Unit],
        desired: &Desired,
        applied: &mut Applied,
    ) -> Result<(), NftError> {
        match self.commit(units, desired, applied) {
            Err(error) if may_be_cured(&error) => match units {
                [] => {}
                [unit] => applied.refused.push((*unit, error.into())),
                _ => {
                    let (first, second) = units.split_at(units.len() / 2);
                    self.bisect(first, desired, applied)?;
                    self.bisect(second, desired, applied)?;
                }
            },
            result => return result,
        }
        Ok(())
    }

    fn commit(
        &mut self,
        units: &[Unit],
        desired: &Desired,
        applied: &mut Applied,
    ) -> Result<(), NftError> {
        let family = self.layout.family;
        let units = units.iter().filter(|unit| unit.family() == family);
        let mut plan = Plan::default();
        let mut needed = Needed::default();
        for unit in units {
            self.held.plan(*unit, desired, &mut plan);
            needed.add(*unit, desired);
        }
        let elements = plan.early.len() + plan.changes.len();
        self.prepare(needed, plan.early, plan.early_next)?;
        let mut batch = Batch::new(family);
        plan.changes.write(&mut batch);
        self.socket.commit(&mut batch)?;
        applied.elements += elements;
        for next in plan.next {
            self.held.enter(next, &mut applied.forget);
        }
        Ok(())
    }

    /// Makes what is needed and isn't there, and writes what has to be there first, in a
    /// transaction of its own. Chains and lists that an earlier one left without use go in the same
    /// breath: in that earlier one a packet might have been on its way to them.
    fn prepare(
        &mut self,
        mut needed: Needed,
        early: Changes,
        early_next: Vec<Next>,
    ) -> Result<(), NftError> {
        let mut unused = self.held.unused_chains();
        unused.retain(|chain| !needed.chains.contains(chain));
        needed.chains.retain(|chain| !self.held.has_chain(*chain));
        needed.lists.retain(|id, _| !self.held.has_chain(DynamicChain::Sources(*id)));
        if needed.chains.is_empty() && early.is_empty() && unused.is_empty() {
            return Ok(());
        }
        let mut batch = Batch::new(self.layout.family);
        for chain in &unused {
            batch.delete_chain(&chain.name());
            if let DynamicChain::Sources(id) = chain {
                batch.delete_set(id.name());
            }
        }
        needed.write(&self.layout, Vec::new(), &mut batch);
        early.write(&mut batch);
        self.socket.commit(&mut batch)?;
        unused.into_iter().for_each(|chain| self.held.remove_chain(chain));
        needed.chains.into_iter().for_each(|chain| self.held.enter_chain(chain));
        // These are about who may come, which leaves nothing stale.
        let mut forget = Vec::new();
        for next in early_next {
            self.held.enter(next, &mut forget);
        }
        Ok(())
    }

    fn drop_unused(&mut self) {
        if let Err(error) = self.prepare(Needed::default(), Changes::default(), Vec::new()) {
            tracing::warn!(%error, "chains that nothing leads to stay in the kernel");
        }
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

/// Everything that a table should hold.
#[derive(Debug)]
pub(super) struct Whole {
    pub(super) needed: Needed,
    pub(super) plan: Plan,
}

/// All that is desired of a table, as if nothing were there.
pub(super) fn whole(layout: &Layout, desired: &Desired) -> Whole {
    let mut units: Vec<Unit> = desired.units().filter(|u| u.family() == layout.family).collect();
    units.sort_unstable();
    let mut needed = Needed::default();
    needed.chains.extend(Layout::common_chains());
    let (fresh, mut plan) = (Held::default(), Plan::default());
    for unit in units {
        needed.add(unit, desired);
        fresh.plan(unit, desired, &mut plan);
    }
    // Nothing is looked up twice here.
    plan.shared.clear();
    Whole { needed, plan }
}

/// What elements point to and what is made when it is needed.
#[derive(Debug, Default)]
pub(super) struct Needed {
    pub(super) chains: BTreeSet<DynamicChain>,
    pub(super) lists: BTreeMap<SourcesId, Sources>,
}

impl Needed {
    /// Adds the chains that a unit's elements will point to, with those that these point to.
    fn add(&mut self, unit: Unit, desired: &Desired) {
        let Unit::Frontend(frontend) = unit else { return };
        let Some(Action::Forward { endpoints, masquerade, affinity, sources }) =
            desired.action(&frontend)
        else {
            return;
        };
        let pick = |sticky| {
            DynamicChain::Pick(PickChain {
                lane: frontend.lane,
                masquerade: *masquerade,
                sticky,
                count: u32::try_from(endpoints.len()).unwrap_or(u32::MAX),
            })
        };
        self.chains.insert(pick(false));
        if affinity.is_some() {
            self.chains.insert(pick(true));
            let seconds = affinity_seconds(&frontend, desired);
            self.chains.extend(seconds.map(DynamicChain::Remember));
        }
        if let Some(ranges) = sources {
            let list = Sources::new(frontend.family, ranges);
            self.chains.insert(DynamicChain::Sources(list.id()));
            self.lists.insert(list.id(), list);
        }
    }

    /// Writes the table's own sets and chains, if any, and then these.
    pub(super) fn write(&self, layout: &Layout, own: Vec<Chain>, batch: &mut Batch) {
        for (id, list) in &self.lists {
            batch.add_set(&layout.source_set(*id));
            batch.elements(id.name(), true, list.elements());
        }
        let mut chains = own;
        chains.extend(self.chains.iter().map(|chain| layout.dynamic_chain(*chain)));
        for chain in &chains {
            batch.add_chain(chain);
        }
        for chain in &chains {
            batch.add_rules(chain);
        }
    }

    /// A table that holds this and no elements.
    fn held(self) -> Held {
        let mut held = Held::default();
        self.chains.into_iter().for_each(|chain| held.enter_chain(chain));
        held
    }
}

/// The table without its elements, instead of what there is of it.
pub(super) fn static_part(layout: &Layout, needed: &Needed) -> Batch {
    let mut batch = Batch::new(layout.family);
    // Adding first makes the removal valid whether there is a table or not.
    batch.add_table("");
    batch.delete_table();
    batch.add_table(&layout.fingerprint());
    for set in layout.sets() {
        batch.add_set(&set);
    }
    needed.write(layout, layout.chains(), &mut batch);
    batch
}

/// Whether reading back and writing the difference may help.
fn may_be_cured(error: &NftError) -> bool {
    !matches!(error.errno(), Some(libc::EPERM | libc::EACCES))
}
