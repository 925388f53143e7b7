//! What the kernel holds, by unit, and what to write to get to what it should hold.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use super::{
    batch::{Batch, Bytes, Data, Element},
    expression::Verdict,
    layout::{self, DynamicChain, PickChain},
};
use crate::{
    backend::{Aftermath, Forget, Stale},
    model::{Endpoint, Family, Protocol},
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

    fn read(verdict: &Verdict) -> Self {
        match verdict {
            Verdict::Drop => Self::Drop,
            Verdict::Goto(chain) => PickChain::parse(chain).map_or(Self::Foreign, Self::Pick),
            Verdict::Jump(_) => Self::Foreign,
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
    /// For how many seconds a client's endpoint is remembered.
    pub(crate) sticky: Option<u32>,
    /// The endpoints by index.
    pub(crate) slots: Box<[Endpoint]>,
}

/// What the kernel holds in one table.
#[derive(Debug, Default)]
pub(crate) struct Held {
    frontends: HashMap<Frontend, HeldFrontend>,
    addresses: HashSet<(AddressSet, IpAddr)>,
    /// The chains that were made when they were needed.
    pub(crate) chains: HashSet<DynamicChain>,
}

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

    /// Whether there is nothing to do.
    pub(crate) fn is_empty(&self) -> bool {
        self.removed.is_empty() && self.added.is_empty()
    }

    /// How many elements are removed or added.
    pub(crate) fn len(&self) -> usize {
        self.removed.values().chain(self.added.values()).map(Vec::len).sum()
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

/// A unit's next state, to be entered once the kernel has it.
#[derive(Debug)]
pub(crate) enum Next {
    /// An address is in a set or isn't.
    Address(AddressSet, IpAddr, bool),
    /// A frontend, or none.
    Frontend(Frontend, Option<HeldFrontend>),
}

impl Held {
    /// Everything that is there.
    pub(crate) fn units(&self) -> impl Iterator<Item = Unit> + '_ {
        let addresses = self.addresses.iter().map(|(set, address)| Unit::Address(*set, *address));
        addresses.chain(self.frontends.keys().map(|f| Unit::Frontend(*f)))
    }

    /// How many units are there.
    pub(crate) fn len(&self) -> usize {
        self.frontends.len() + self.addresses.len()
    }

    /// What to write to bring a unit to what is desired: elements into `changes`, and what is then
    /// held. `None` if it is there already.
    pub(crate) fn plan(
        &self,
        unit: Unit,
        desired: &Desired,
        changes: &mut Changes,
    ) -> Option<Next> {
        match unit {
            Unit::Address(set, address) => {
                let wanted = desired.has_address(set, address);
                if wanted == self.addresses.contains(&(set, address)) {
                    return None;
                }
                let (name, key) = address_element(set, address);
                if wanted {
                    changes.add(name, key, Data::None);
                } else {
                    changes.remove(name, key);
                }
                Some(Next::Address(set, address, wanted))
            }
            Unit::Frontend(frontend) => {
                let held = self.frontends.get(&frontend);
                let next = plan_frontend(&frontend, held, desired.action(&frontend), changes);
                (held != next.as_ref()).then_some(Next::Frontend(frontend, next))
            }
        }
    }

    /// Enters what the kernel has taken, and notes what old connections and clients still think.
    pub(crate) fn enter(&mut self, next: Next, aftermath: &mut Aftermath) {
        match next {
            Next::Address(set, address, true) => {
                self.addresses.insert((set, address));
            }
            Next::Address(set, address, false) => {
                self.addresses.remove(&(set, address));
            }
            Next::Frontend(frontend, next) => {
                let before = match next.clone() {
                    Some(next) => self.frontends.insert(frontend, next),
                    None => self.frontends.remove(&frontend),
                };
                if frontend.protocol == Protocol::Udp {
                    stale_connections(
                        &frontend,
                        before.as_ref(),
                        next.as_ref(),
                        &mut aftermath.stale,
                    );
                }
                if before.as_ref().is_some_and(HeldFrontend::is_sticky) {
                    stale_choices(&frontend, before.as_ref(), next.as_ref(), &mut aftermath.forget);
                }
            }
        }
    }

    /// Takes in one element of a set as the kernel lists it; what the proxy can't have written
    /// goes to `strays`, to be removed. Call [`Reading::finish`] after the last.
    pub(crate) fn reading(family: Family) -> Reading {
        Reading {
            family,
            held: Self::default(),
            indices: HashMap::new(),
            strays: Changes::default(),
        }
    }
}

/// For how many seconds clients of a frontend are remembered.
pub(crate) fn affinity_seconds(action: &Action) -> Option<u32> {
    match action {
        Action::Forward { affinity: Some(affinity), .. } => u32::try_from(affinity.as_secs()).ok(),
        _ => None,
    }
}

/// Reads an element of the affinity map: what the client connected to, and where it was sent.
pub(crate) fn read_choice(family: Family, element: &Element) -> Option<(Frontend, Endpoint)> {
    let (_, rest) = read_address(element.key.as_slice(), family)?;
    let (frontend, rest) = read_frontend(rest, family, Lane::Address)?;
    let Data::Value(value) = &element.data else { return None };
    let endpoint = read_endpoint(value.as_slice(), family)?;
    rest.is_empty().then_some((frontend, endpoint))
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
    let mut sticky = None;
    if let Some(map) = maps.sticky {
        sticky = action.and_then(affinity_seconds);
        let before = held.and_then(|held| held.sticky);
        if before != sticky {
            if before.is_some() {
                changes.remove(map, key);
            }
            if let Some(seconds) = sticky {
                let chain = DynamicChain::Remember(seconds).name();
                changes.add(map, key, Data::Verdict(Verdict::Goto(chain)));
            }
        }
    }
    action?;
    Some(HeldFrontend { chosen, rejected, sticky, slots: slots.into() })
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
    forget.extend(
        before
            .iter()
            .flat_map(|before| &before.slots)
            .filter(|endpoint| !after.slots.contains(endpoint))
            .map(|endpoint| Forget { frontend: *frontend, endpoint: Some(*endpoint) }),
    );
}

fn stale_connections(
    frontend: &Frontend,
    before: Option<&HeldFrontend>,
    after: Option<&HeldFrontend>,
    stale: &mut Vec<Stale>,
) {
    let (before, after) =
        (before.map_or(&[][..], |f| &f.slots), after.map_or(&[][..], |f| &f.slots));
    if before.is_empty() && !after.is_empty() {
        stale.push(Stale { frontend: *frontend, endpoint: None });
    }
    stale.extend(
        before
            .iter()
            .filter(|e| !after.contains(e))
            .map(|e| Stale { frontend: *frontend, endpoint: Some(*e) }),
    );
}

fn address_bytes(key: Bytes, address: IpAddr) -> Bytes {
    match address {
        IpAddr::V4(v4) => key.part(&v4.octets()),
        IpAddr::V6(v6) => key.part(&v6.octets()),
    }
}

fn address_element(set: AddressSet, address: IpAddr) -> (&'static str, Bytes) {
    let key = address_bytes(Bytes::new(), address);
    match set {
        AddressSet::ClusterAddresses => (layout::CLUSTER_IPS, key),
        AddressSet::Hairpin => (layout::HAIRPIN, address_bytes(key, address)),
        AddressSet::NodeAddresses => (layout::NODEPORT_IPS, key),
    }
}

/// The key of a frontend in its verdict maps.
pub(crate) fn frontend_key(frontend: &Frontend) -> Bytes {
    let key = match frontend.address {
        Some(address) => address_bytes(Bytes::new(), address),
        None => Bytes::new(),
    };
    key.part(&[frontend.protocol.number()]).part(&frontend.port.to_be_bytes())
}

fn endpoint_bytes(endpoint: Endpoint) -> Bytes {
    address_bytes(Bytes::new(), endpoint.address).part(&endpoint.port.to_be_bytes())
}

/// Takes an address off the front of a key.
fn read_address(bytes: &[u8], family: Family) -> Option<(IpAddr, &[u8])> {
    match family {
        Family::V4 => {
            let (address, rest) = bytes.split_first_chunk::<4>()?;
            Some((Ipv4Addr::from(*address).into(), rest))
        }
        Family::V6 => {
            let (address, rest) = bytes.split_first_chunk::<16>()?;
            Some((Ipv6Addr::from(*address).into(), rest))
        }
    }
}

fn read_port(bytes: &[u8]) -> Option<(u16, &[u8])> {
    let (part, rest) = bytes.split_first_chunk::<4>()?;
    let port = u16::from_be_bytes([part[0], part[1]]);
    (port != 0 && part[2..] == [0, 0]).then_some((port, rest))
}

fn read_endpoint(bytes: &[u8], family: Family) -> Option<Endpoint> {
    let (address, rest) = read_address(bytes, family)?;
    let (port, rest) = read_port(rest)?;
    rest.is_empty().then_some(Endpoint { address, port })
}

/// Takes a frontend off the front of a key.
fn read_frontend(bytes: &[u8], family: Family, lane: Lane) -> Option<(Frontend, &[u8])> {
    let (address, rest) = if lane.with_address() {
        let (address, rest) = read_address(bytes, family)?;
        (Some(address), rest)
    } else {
        (None, bytes)
    };
    let (protocol, rest) = rest.split_first_chunk::<4>()?;
    let protocol = Protocol::from_number(protocol[0]).filter(|_| protocol[1..] == [0, 0, 0])?;
    let (port, rest) = read_port(rest)?;
    Some((Frontend { family, lane, address, protocol, port }, rest))
}

/// The kernel's elements, as they are being listed.
#[derive(Debug)]
pub(crate) struct Reading {
    family: Family,
    held: Held,
    indices: HashMap<Frontend, BTreeMap<u32, Endpoint>>,
    strays: Changes,
}

impl Reading {
    /// Takes in an element of a set.
    pub(crate) fn element(&mut self, set: &'static str, element: &Element) {
        if self.take(set, element).is_none() {
            self.strays.remove(set, element.key);
        }
    }

    /// All that was read, and what to remove because it makes no sense.
    pub(crate) fn finish(mut self) -> (Held, Changes) {
        for (frontend, indices) in self.indices {
            let maps = layout::lane_maps(frontend.lane);
            let mut slots = Vec::new();
            for (index, endpoint) in indices {
                // Only a row without holes from 0 on is of use.
                if index as usize == slots.len() {
                    slots.push(endpoint);
                } else {
                    let key = frontend_key(&frontend).part(&index.to_ne_bytes());
                    self.strays.remove(maps.endpoints, key);
                }
            }
            self.held.frontends.entry(frontend).or_default().slots = slots.into();
        }
        (self.held, self.strays)
    }

    fn take(&mut self, set: &'static str, element: &Element) -> Option<()> {
        let key = element.key.as_slice();
        for lane in Lane::ALL {
            let maps = layout::lane_maps(lane);
            let sets = [Some(maps.verdicts), Some(maps.endpoints), maps.rejects, maps.sticky];
            if !sets.contains(&Some(set)) {
                continue;
            }
            let (frontend, rest) = read_frontend(key, self.family, lane)?;
            if maps.endpoints == set {
                let index = u32::from_ne_bytes(*rest.first_chunk::<4>()?);
                let Data::Value(value) = &element.data else { return None };
                let endpoint = read_endpoint(value.as_slice(), self.family)?;
                self.indices.entry(frontend).or_default().insert(index, endpoint);
                return Some(());
            }
            let Data::Verdict(verdict) = &element.data else { return None };
            if maps.verdicts == set {
                let chosen = Chosen::read(verdict);
                self.held.frontends.entry(frontend).or_default().chosen = Some(chosen);
            } else if maps.sticky == Some(set) {
                let Verdict::Goto(chain) = verdict else { return None };
                let DynamicChain::Remember(seconds) = DynamicChain::parse(chain)? else {
                    return None;
                };
                self.held.frontends.entry(frontend).or_default().sticky = Some(seconds);
            } else {
                if *verdict != Verdict::Goto(layout::REJECT.into()) {
                    return None;
                }
                self.held.frontends.entry(frontend).or_default().rejected = true;
            }
            return Some(());
        }
        let (address, rest) = read_address(key, self.family)?;
        let set = match set {
            layout::CLUSTER_IPS => AddressSet::ClusterAddresses,
            layout::NODEPORT_IPS => AddressSet::NodeAddresses,
            layout::HAIRPIN => {
                let (second, _) = read_address(rest, self.family)?;
                (second == address).then_some(AddressSet::Hairpin)?
            }
            _ => return None,
        };
        self.held.addresses.insert((set, address));
        Some(())
    }
}
