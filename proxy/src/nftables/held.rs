//! What the kernel holds, by unit, and what to write to get to what it should hold.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use super::{
    batch::Data,
    changes::Changes,
    expression::Verdict,
    intervals::Intervals,
    keys::{address_element, endpoint_bytes, frontend_key, own_balancer_key},
    layout::{self, DynamicChain, Layout, PickChain},
    sources::{Sources, SourcesId},
};
use crate::{
    backend::Forget,
    model::Endpoint,
    ruleset::{Action, AddressSet, Frontend, Lane, Unit, desired::Desired, slots},
};

/// What a verdict map has for a frontend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Chosen {
    /// One of its endpoints is picked.
    Pick(PickChain),
    /// Drop.
    Drop,
    /// Something that the proxy doesn't write.
    Foreign,
}

impl Chosen {
    fn verdict(&self) -> Verdict {
        match self {
            Self::Pick(chain) => Verdict::Goto(chain.name()),
            Self::Drop | Self::Foreign => Verdict::Drop,
        }
    }

    /// The chains that this leads to: that of a sticky service leads to another.
    fn chains(&self) -> impl Iterator<Item = DynamicChain> + use<> {
        let pick = match self {
            Self::Pick(pick) => Some(*pick),
            Self::Drop | Self::Foreign => None,
        };
        let afresh = pick.filter(|p| p.sticky).map(|p| PickChain { sticky: false, ..p });
        pick.into_iter().chain(afresh).map(DynamicChain::Pick)
    }

    pub(super) fn read(verdict: &Verdict) -> Self {
        match verdict {
            Verdict::Drop => Self::Drop,
            Verdict::Goto(chain) => PickChain::parse(chain).map_or(Self::Foreign, Self::Pick),
        }
    }
}

/// What the kernel holds for a frontend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct HeldFrontend {
    /// In the verdict map.
    pub(crate) chosen: Option<Chosen>,
    /// In the map of those without endpoints.
    pub(crate) rejected: bool,
    /// The endpoints by index; where their order is the desired one too, both share it.
    pub(crate) slots: Arc<[Endpoint]>,
}

/// What the kernel holds in one table.
#[derive(Debug, Default)]
pub(crate) struct Held {
    pub(super) frontends: HashMap<Frontend, HeldFrontend>,
    pub(super) addresses: HashSet<(AddressSet, IpAddr)>,
    /// `None` for none.
    pub(super) service_ranges: Option<Intervals>,
    /// From where clients may come. Lanes of one address share this and the next two.
    pub(super) firewall: HashMap<Frontend, SourcesId>,
    /// Whether the node may come from the very address of a load balancer, whatever the list.
    pub(super) own: HashSet<Frontend>,
    /// For how many seconds a client's endpoint is remembered.
    pub(super) sticky: HashMap<Frontend, u32>,
    /// How many frontends lead to each chain that isn't always there; a list of sources is there
    /// together with the chain of its name.
    chains: HashMap<DynamicChain, usize>,
    /// Those that nothing leads to.
    unused: BTreeSet<DynamicChain>,
}

/// How to get from what is held to what is desired.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// Comes a transaction earlier, together with the chains that are new: who may not come is
    /// dropped before there is anywhere to go.
    pub(crate) early: Changes,
    /// Held as soon as `early` is written.
    pub(crate) early_next: Vec<Next>,
    /// Everything else.
    pub(crate) changes: Changes,
    /// Held as soon as `changes` is written.
    pub(crate) next: Vec<Next>,
    /// Frontends whose lanes share elements that are planned already.
    pub(super) shared: HashSet<Frontend>,
}

/// A unit's next state, to be entered once the kernel has it.
#[derive(Debug)]
pub(crate) enum Next {
    /// An address is in a set or isn't.
    Address(AddressSet, IpAddr, bool),
    /// Ranges of Services' addresses.
    ServiceRanges(Intervals),
    /// A frontend, or none.
    Frontend(Frontend, Option<HeldFrontend>),
    /// From where clients of a frontend may come.
    Firewall(Frontend, Option<SourcesId>),
    /// Whether the node may come from the address itself.
    Own(Frontend, bool),
    /// For how many seconds clients of a frontend are remembered.
    Sticky(Frontend, Option<u32>),
}

impl Held {
    /// Everything that is there.
    pub(crate) fn units(&self) -> impl Iterator<Item = Unit> + '_ {
        let addresses = self.addresses.iter().map(|(set, address)| Unit::Address(*set, *address));
        let frontends = self
            .frontends
            .keys()
            .chain(self.firewall.keys())
            .chain(self.sticky.keys())
            .chain(&self.own);
        let ranges = self.service_ranges.iter().map(|held| Unit::ServiceRanges(held.family()));
        addresses.chain(frontends.map(|f| Unit::Frontend(*f))).chain(ranges)
    }

    /// What is there for a frontend.
    pub(crate) fn frontend(&self, frontend: &Frontend) -> Option<&HeldFrontend> {
        self.frontends.get(frontend)
    }

    /// How many units are there.
    pub(crate) fn len(&self) -> usize {
        self.frontends.len() + self.addresses.len()
    }

    /// Plans what to write to bring a unit to what is desired.
    pub(crate) fn plan(&self, unit: Unit, desired: &Desired, plan: &mut Plan) {
        match unit {
            Unit::Address(set, address) => {
                let wanted = desired.has_address(set, address);
                if wanted == self.addresses.contains(&(set, address)) {
                    return;
                }
                let (name, key) = address_element(set, address);
                if wanted {
                    plan.changes.add(name, key, Data::None);
                } else {
                    plan.changes.remove(name, key);
                }
                plan.next.push(Next::Address(set, address, wanted));
            }
            Unit::ServiceRanges(family) => {
                // As long as nobody knows, what is there stays.
                let Some(wanted) = desired.service_ranges() else { return };
                let wanted = Intervals::new(family, wanted);
                let held = self.service_ranges.as_ref();
                if held.is_some_and(|held| *held == wanted) || held.is_none() && wanted.is_empty() {
                    return;
                }
                let before = held.map(Intervals::elements).unwrap_or_default();
                plan.changes.replace(layout::SERVICE_RANGES, before, wanted.elements());
                plan.next.push(Next::ServiceRanges(wanted));
            }
            Unit::Frontend(frontend) => {
                let held = self.frontends.get(&frontend);
                let action = desired.action(&frontend);
                let next = plan_frontend(&frontend, held, action, &mut plan.changes);
                // What was read from the kernel gives way to what is shared with `desired`.
                let same_place =
                    |(a, b): (&HeldFrontend, &HeldFrontend)| Arc::ptr_eq(&a.slots, &b.slots);
                if held != next.as_ref() || !held.zip(next.as_ref()).is_none_or(same_place) {
                    plan.next.push(Next::Frontend(frontend, next));
                }
                self.plan_shared(&frontend, desired, plan);
            }
        }
    }

    /// Plans what the lanes of a frontend share.
    fn plan_shared(&self, frontend: &Frontend, desired: &Desired, plan: &mut Plan) {
        let shared = shared(frontend);
        let maps = layout::lane_maps(shared.lane);
        let list = maps.firewall.and_then(|_| Sources::of(&shared, desired));
        let sources = list.as_ref().map(Sources::id);
        let held_sources = self.firewall.get(&shared).copied();
        let own = list.is_some_and(|list| list.has_node(desired));
        let held_own = self.own.contains(&shared);
        let sticky = affinity_seconds(&shared, desired);
        let held_sticky = self.sticky.get(&shared).copied();
        let same = (sources, own, sticky) == (held_sources, held_own, held_sticky);
        if same || !plan.shared.insert(shared) {
            return;
        }
        let key = frontend_key(&shared);
        let goto = |chain: DynamicChain| Data::Verdict(Verdict::Goto(chain.name()));
        if let Some(map) = maps.firewall
            && sources != held_sources
        {
            let next = Next::Firewall(shared, sources);
            match (held_sources, sources) {
                (None, Some(id)) => {
                    plan.early.add(map, key, goto(DynamicChain::Sources(id)));
                    plan.early_next.push(next);
                }
                (_, sources) => {
                    plan.changes.remove(map, key);
                    if let Some(id) = sources {
                        plan.changes.add(map, key, goto(DynamicChain::Sources(id)));
                    }
                    plan.next.push(next);
                }
            }
        }
        if own != held_own {
            let key = own_balancer_key(&shared);
            if own {
                plan.changes.add(layout::OWN_BALANCERS, key, Data::None);
            } else {
                plan.changes.remove(layout::OWN_BALANCERS, key);
            }
            plan.next.push(Next::Own(shared, own));
        }
        if sticky != held_sticky {
            if held_sticky.is_some() {
                plan.changes.remove(maps.sticky, key);
            }
            if let Some(seconds) = sticky {
                plan.changes.add(maps.sticky, key, goto(DynamicChain::Remember(seconds)));
            }
            plan.next.push(Next::Sticky(shared, sticky));
        }
    }

    /// Enters what the kernel has taken, and notes what old connections and clients still think.
    pub(crate) fn enter(&mut self, next: Next, forget: &mut Vec<Forget>) {
        match next {
            Next::Address(set, address, true) => {
                self.addresses.insert((set, address));
            }
            Next::Address(set, address, false) => {
                self.addresses.remove(&(set, address));
            }
            Next::ServiceRanges(ranges) => {
                self.service_ranges = Some(ranges).filter(|ranges| !ranges.is_empty());
            }
            Next::Firewall(frontend, sources) => self.enter_sources(frontend, sources),
            Next::Own(frontend, true) => {
                self.own.insert(frontend);
            }
            Next::Own(frontend, false) => {
                self.own.remove(&frontend);
            }
            Next::Sticky(frontend, next) => {
                let before = match next {
                    Some(seconds) => self.sticky.insert(frontend, seconds),
                    None => self.sticky.remove(&frontend),
                };
                next.into_iter().for_each(|seconds| self.lead_to(DynamicChain::Remember(seconds)));
                before.into_iter().for_each(|seconds| self.leave(DynamicChain::Remember(seconds)));
            }
            Next::Frontend(frontend, next) => {
                let before = self.frontends.get(&frontend);
                if before.is_some_and(HeldFrontend::is_sticky) {
                    stale_choices(&frontend, before, next.as_ref(), forget);
                }
                let after = next.as_ref().and_then(|next| next.chosen.clone());
                let before = match next {
                    Some(next) => self.frontends.insert(frontend, next),
                    None => self.frontends.remove(&frontend),
                };
                let before = before.and_then(|before| before.chosen);
                if before != after {
                    after.iter().flat_map(Chosen::chains).for_each(|chain| self.lead_to(chain));
                    before.iter().flat_map(Chosen::chains).for_each(|chain| self.leave(chain));
                }
            }
        }
    }

    /// Enters from where clients may come.
    pub(super) fn enter_sources(&mut self, frontend: Frontend, sources: Option<SourcesId>) {
        let before = match sources {
            Some(id) => self.firewall.insert(frontend, id),
            None => self.firewall.remove(&frontend),
        };
        sources.into_iter().for_each(|id| self.lead_to(DynamicChain::Sources(id)));
        before.into_iter().for_each(|id| self.leave(DynamicChain::Sources(id)));
    }

    /// Enters that a chain is there, whether anything leads to it or not.
    pub(super) fn enter_chain(&mut self, chain: DynamicChain) {
        if *self.chains.entry(chain).or_default() == 0 && !Layout::is_common(chain) {
            self.unused.insert(chain);
        }
    }

    /// Enters the chains that were found, after all elements were read, but for the lists of sources,
    /// which were [entered](Self::enter_sources) then.
    pub(super) fn enter_found(&mut self, chains: impl IntoIterator<Item = DynamicChain>) {
        let chosen = self.frontends.values().filter_map(|held| held.chosen.clone());
        let used: Vec<DynamicChain> = chosen
            .flat_map(|chosen| chosen.chains())
            .chain(self.sticky.values().map(|seconds| DynamicChain::Remember(*seconds)))
            .collect();
        used.into_iter().for_each(|chain| self.lead_to(chain));
        chains.into_iter().for_each(|chain| self.enter_chain(chain));
    }

    /// Enters that a chain is gone.
    pub(super) fn remove_chain(&mut self, chain: DynamicChain) {
        self.chains.remove(&chain);
        self.unused.remove(&chain);
    }

    /// Chains that nothing leads to. Those that lead to others come first.
    pub(super) fn unused_chains(&self) -> Vec<DynamicChain> {
        let mut unused: Vec<DynamicChain> = self.unused.iter().copied().collect();
        unused.sort_by_key(|chain| !chain.is_sticky());
        unused
    }

    /// Whether a chain is there.
    pub(super) fn has_chain(&self, chain: DynamicChain) -> bool {
        self.chains.contains_key(&chain)
    }

    fn lead_to(&mut self, chain: DynamicChain) {
        *self.chains.entry(chain).or_default() += 1;
        self.unused.remove(&chain);
    }

    fn leave(&mut self, chain: DynamicChain) {
        if let Some(uses) = self.chains.get_mut(&chain) {
            *uses = uses.saturating_sub(1);
            if *uses == 0 && !Layout::is_common(chain) {
                self.unused.insert(chain);
            }
        }
    }
}

/// The frontend under whose name the lanes of one address, or of one node port, share elements.
fn shared(frontend: &Frontend) -> Frontend {
    let lane = if frontend.lane.with_address() { Lane::Address } else { Lane::NodePort };
    Frontend { lane, ..*frontend }
}

/// For how many seconds clients of a frontend are remembered, in whichever lane.
pub(crate) fn affinity_seconds(frontend: &Frontend, desired: &Desired) -> Option<u32> {
    let shared = shared(frontend);
    let inside =
        if shared.lane.with_address() { Lane::AddressInside } else { Lane::NodePortInside };
    let seconds = |lane| match desired.action(&Frontend { lane, ..shared }) {
        Some(Action::Forward { affinity, .. }) => {
            Some(affinity.and_then(|time| u32::try_from(time.as_secs()).ok()))
        }
        _ => None,
    };
    seconds(shared.lane).or_else(|| seconds(inside)).flatten()
}

fn plan_frontend(
    frontend: &Frontend,
    held: Option<&HeldFrontend>,
    action: Option<&Action>,
    changes: &mut Changes,
) -> Option<HeldFrontend> {
    let maps = layout::lane_maps(frontend.lane);
    let key = frontend_key(frontend);
    let held_slots = held.map_or(&[][..], |held| &held.slots);
    let wanted: &[Endpoint] = match action {
        Some(Action::Forward { endpoints, .. }) => endpoints,
        _ => &[],
    };
    let (slots, slot_changes) = slots::assign(held_slots, wanted);
    for change in slot_changes {
        let index_key = key.part(&change.index.to_ne_bytes());
        if change.before.is_some() {
            changes.remove(maps.endpoints, index_key);
        }
        if let Some(endpoint) = change.after {
            changes.add(maps.endpoints, index_key, Data::Value(endpoint_bytes(endpoint)));
        }
    }
    let chosen = match action {
        Some(Action::Forward { masquerade, affinity, .. }) => Some(Chosen::Pick(PickChain {
            lane: frontend.lane,
            masquerade: *masquerade,
            sticky: affinity.is_some(),
            count: slots.len() as u32,
        })),
        Some(Action::Drop) => Some(Chosen::Drop),
        Some(Action::Reject | Action::Nothing) | None => None,
    };
    let before = held.and_then(|held| held.chosen.as_ref());
    if before != chosen.as_ref() {
        if before.is_some() {
            changes.remove(maps.verdicts, key);
        }
        if let Some(chosen) = &chosen {
            changes.add(maps.verdicts, key, Data::Verdict(chosen.verdict()));
        }
    }
    let mut rejected = false;
    if let Some(map) = maps.rejects {
        rejected = matches!(action, Some(Action::Reject));
        let before = held.is_some_and(|held| held.rejected);
        if rejected && !before {
            changes.add(map, key, Data::Verdict(Verdict::Goto(layout::REJECT.into())));
        } else if before && !rejected {
            changes.remove(map, key);
        }
    }
    let slots: Arc<[Endpoint]> = match action? {
        Action::Forward { endpoints, .. } if **endpoints == *slots => Arc::clone(endpoints),
        _ => slots.into(),
    };
    Some(HeldFrontend { chosen, rejected, slots })
}

impl HeldFrontend {
    fn is_sticky(&self) -> bool {
        matches!(self.chosen, Some(Chosen::Pick(PickChain { sticky: true, .. })))
    }
}

fn stale_choices(
    frontend: &Frontend,
    before: Option<&HeldFrontend>,
    after: Option<&HeldFrontend>,
    forget: &mut Vec<Forget>,
) {
    let Some(after) = after.filter(|after| after.is_sticky()) else {
        forget.push(Forget { frontend: *frontend, endpoint: None });
        return;
    };
    let there: HashSet<&Endpoint> = after.slots.iter().collect();
    forget.extend(
        before
            .iter()
            .flat_map(|before| before.slots.iter())
            .filter(|endpoint| !there.contains(endpoint))
            .map(|endpoint| Forget { frontend: *frontend, endpoint: Some(*endpoint) }),
    );
}
