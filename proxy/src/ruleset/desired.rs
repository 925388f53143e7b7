//! The whole desired ruleset, kept by unit, changed one Service at a time.
//!
//! Two Services may claim one frontend (the API server prevents it, but a proxy sees states in
//! between). The older one has it; of the same age, the first by name. So the result depends only
//! on what there is and not on the order in which it came.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
};

use ipnet::IpNet;
use keelson_api::object::ObjectKey;

use super::{Action, AddressSet, Frontend, Unit};
use crate::model::Family;

/// What one Service wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ServiceRules {
    /// When the Service was created, in seconds since 1970.
    pub(crate) created: i64,
    /// Its frontends.
    pub(crate) frontends: Vec<(Frontend, Action)>,
    /// Addresses in sets, each once.
    pub(crate) addresses: Vec<(AddressSet, IpAddr)>,
    /// A digest of what rules with a Service's name tell of it besides: where it changes, all of
    /// them may have to be written.
    pub(crate) told: u64,
}

/// Who claims a frontend; the smallest has it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Claimant {
    created: i64,
    service: ObjectKey,
}

#[derive(Debug)]
struct Claim {
    by: Claimant,
    action: Action,
}

/// What a change of one Service came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// Units that may have to be written.
    pub(crate) dirty: Vec<Unit>,
    /// Frontends that the Service wants and another one has.
    pub(crate) taken: Vec<(Frontend, ObjectKey)>,
    /// Frontends that another Service had and that are this one's now.
    pub(crate) won: Vec<(Frontend, ObjectKey)>,
    /// What dirty frontends did before; those that are new are not in it, and one that passed
    /// through several states is in it with each, the oldest first.
    pub(crate) before: Vec<(Frontend, Action)>,
}

/// Everything that the kernel should hold.
#[derive(Debug, Default)]
pub(crate) struct Desired {
    /// Boxed, as a table that grew last is up to half empty.
    frontends: HashMap<Frontend, Box<Claim>>,
    /// Who else wants a frontend.
    waiting: HashMap<Frontend, BTreeMap<Claimant, Action>>,
    addresses: HashMap<(AddressSet, IpAddr), u32>,
    service_ranges: Option<Box<[IpNet]>>,
    /// What [`AddressSet::NodeAddresses`] has.
    node: Vec<IpAddr>,
    services: HashMap<ObjectKey, Box<Entry>>,
}

#[derive(Debug)]
struct Entry {
    created: i64,
    told: u64,
    frontends: Box<[Frontend]>,
    addresses: Box<[(AddressSet, IpAddr)]>,
}

impl Desired {
    /// What a frontend's traffic should do; `None` if there should be no such frontend.
    pub(crate) fn action(&self, frontend: &Frontend) -> Option<&Action> {
        let action = self.frontends.get(frontend).map(|claim| &claim.action);
        action.filter(|action| **action != Action::Nothing)
    }

    /// Whether an address should be in a set.
    pub(crate) fn has_address(&self, set: AddressSet, address: IpAddr) -> bool {
        self.addresses.contains_key(&(set, address))
    }

    /// Which Service a frontend belongs to.
    pub(crate) fn owner(&self, frontend: &Frontend) -> Option<&ObjectKey> {
        self.frontends.get(frontend).map(|claim| &claim.by.service)
    }

    /// Everything that should be there.
    pub(crate) fn units(&self) -> impl Iterator<Item = Unit> + '_ {
        let addresses = self.addresses.keys().map(|(set, address)| Unit::Address(*set, *address));
        let frontends = self.frontends.keys().map(|frontend| Unit::Frontend(*frontend));
        let known = self.service_ranges.is_some().then_some([Family::V4, Family::V6]);
        addresses.chain(frontends).chain(known.into_iter().flatten().map(Unit::ServiceRanges))
    }

    /// The node's addresses.
    pub(crate) fn node_addresses(&self) -> &[IpAddr] {
        &self.node
    }

    /// The ranges that cluster addresses are taken from, of both families; `None` as long as nobody
    /// has told.
    pub(crate) fn service_ranges(&self) -> Option<&[IpNet]> {
        self.service_ranges.as_deref()
    }

    /// Puts the ranges in place that cluster addresses are taken from now, sorted.
    pub(crate) fn set_service_ranges(&mut self, ranges: Vec<IpNet>) -> Outcome {
        let before = self.service_ranges.replace(ranges.into());
        let of = |ranges: &[IpNet], family| -> Vec<IpNet> {
            ranges.iter().filter(|range| Family::of(range.addr()) == family).copied().collect()
        };
        let now = self.service_ranges().unwrap_or_default();
        let changed = [Family::V4, Family::V6].into_iter().filter(|family| {
            before.as_deref().is_none_or(|before| of(before, *family) != of(now, *family))
        });
        Outcome { dirty: changed.map(Unit::ServiceRanges).collect(), ..Outcome::default() }
    }

    /// Puts in place what a Service wants now (`None` if it is gone), instead of what it wanted.
    pub(crate) fn replace(&mut self, service: &ObjectKey, rules: Option<ServiceRules>) -> Outcome {
        let mut outcome = Outcome::default();
        let (key, before) = match self.services.remove_entry(service) {
            Some((key, entry)) => (key, Some(entry)),
            None => (service.clone(), None),
        };
        let rules = rules.filter(|r| !r.frontends.is_empty() || !r.addresses.is_empty());
        let mut dirty = HashSet::new();

        // Addresses: first the new ones, so that a count that stays doesn't pass through zero.
        for address in rules.iter().flat_map(|r| &r.addresses) {
            let count = self.addresses.entry(*address).or_insert(0);
            *count += 1;
            if *count == 1 {
                dirty.insert(Unit::Address(address.0, address.1));
            }
        }
        for address in before.iter().flat_map(|entry| &entry.addresses) {
            if let Some(count) = self.addresses.get_mut(address) {
                *count -= 1;
                if *count == 0 {
                    self.addresses.remove(address);
                    dirty.insert(Unit::Address(address.0, address.1));
                }
            }
        }

        if dirty.iter().any(|unit| matches!(unit, Unit::Address(AddressSet::NodeAddresses, _))) {
            self.note_node(&mut dirty);
        }

        let created = rules.as_ref().map_or(0, |r| r.created);
        let wanted: HashMap<Frontend, &Action> =
            rules.iter().flat_map(|r| &r.frontends).map(|(f, a)| (*f, a)).collect();
        if let Some(entry) = &before {
            let by = Claimant { created: entry.created, service: key.clone() };
            for frontend in &entry.frontends {
                if entry.created != created || !wanted.contains_key(frontend) {
                    let before = self.withdraw(frontend, &by);
                    outcome.before.extend(before.map(|action| (*frontend, action)));
                    dirty.insert(Unit::Frontend(*frontend));
                }
            }
        }
        for (frontend, action) in &wanted {
            let by = Claimant { created, service: key.clone() };
            if let Some(present) = self.frontends.get(frontend).map(|claim| &claim.by)
                && by < *present
                && present.service != key
            {
                outcome.won.push((*frontend, present.service.clone()));
            }
            if let Some(before) = self.claim(*frontend, by, (*action).clone()) {
                outcome.before.extend(before.map(|action| (*frontend, action)));
                dirty.insert(Unit::Frontend(*frontend));
            }
            if let Some(claim) = self.frontends.get(frontend)
                && claim.by.service != key
            {
                outcome.taken.push((*frontend, claim.by.service.clone()));
            }
        }
        if let Some(rules) = &rules {
            if before.is_some_and(|entry| entry.told != rules.told) {
                dirty.extend(wanted.keys().map(|frontend| Unit::Frontend(*frontend)));
            }
            let entry = Entry {
                created,
                told: rules.told,
                frontends: wanted.keys().copied().collect(),
                addresses: rules.addresses.clone().into(),
            };
            self.services.insert(key, Box::new(entry));
        }
        outcome.dirty = dirty.into_iter().collect();
        // The same change is written in the same order each time.
        outcome.dirty.sort_unstable();
        outcome.taken.sort_unstable();
        outcome.won.sort_unstable();
        outcome
    }

    /// Notes the node's addresses, and who depends on them: whom source ranges admit.
    fn note_node(&mut self, dirty: &mut HashSet<Unit>) {
        let node = self.addresses.keys().filter(|(set, _)| *set == AddressSet::NodeAddresses);
        self.node = node.map(|(_, address)| *address).collect();
        let limited = self
            .frontends
            .iter()
            .filter(|(_, claim)| matches!(claim.action, Action::Forward { sources: Some(_), .. }));
        dirty.extend(limited.map(|(frontend, _)| Unit::Frontend(*frontend)));
    }

    /// Enters a claim. If that may change what the frontend does: what it did before, if it was
    /// there.
    fn claim(
        &mut self,
        frontend: Frontend,
        by: Claimant,
        action: Action,
    ) -> Option<Option<Action>> {
        let Some(present) = self.frontends.get_mut(&frontend) else {
            self.frontends.insert(frontend, Box::new(Claim { by, action }));
            return Some(None);
        };
        if present.by == by {
            if present.action == action {
                return None;
            }
            return Some(Some(std::mem::replace(&mut present.action, action)));
        }
        let wins = by < present.by;
        let loser = if wins {
            std::mem::replace(&mut **present, Claim { by, action })
        } else {
            Claim { by, action }
        };
        let before = wins.then(|| Some(loser.action.clone()));
        self.waiting.entry(frontend).or_default().insert(loser.by, loser.action);
        before
    }

    /// Takes a claim back. What the frontend did before, if the claim was in force.
    fn withdraw(&mut self, frontend: &Frontend, by: &Claimant) -> Option<Action> {
        if let Some(waiting) = self.waiting.get_mut(frontend) {
            waiting.remove(by);
        }
        let mut before = None;
        if self.frontends.get(frontend).is_some_and(|claim| claim.by == *by) {
            let next = self.waiting.get_mut(frontend).and_then(BTreeMap::pop_first);
            let was = match next {
                Some((by, action)) => {
                    self.frontends.insert(*frontend, Box::new(Claim { by, action }))
                }
                None => self.frontends.remove(frontend),
            };
            before = was.map(|claim| claim.action);
        }
        if self.waiting.get(frontend).is_some_and(BTreeMap::is_empty) {
            self.waiting.remove(frontend);
        }
        before
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Lane, *};
    use crate::model::Protocol;

    fn frontend(port: u16) -> Frontend {
        Frontend {
            family: Family::V4,
            lane: Lane::NodePort,
            address: None,
            protocol: Protocol::Tcp,
            port,
        }
    }

    fn rules(created: i64, port: u16, action: Action) -> Option<ServiceRules> {
        Some(ServiceRules {
            created,
            frontends: vec![(frontend(port), action)],
            addresses: vec![(AddressSet::Hairpin, [10, 0, 0, 1].into())],
            told: 0,
        })
    }

    #[test]
    fn what_else_is_told_of_a_service_concerns_all_its_frontends() {
        let service = ObjectKey::new("d", "a");
        let mut desired = Desired::default();
        desired.replace(&service, rules(1, 30_000, Action::Drop));
        let again = desired.replace(&service, rules(1, 30_000, Action::Drop));
        assert_eq!(again, Outcome::default());
        let told = rules(1, 30_000, Action::Drop).map(|rules| ServiceRules { told: 7, ..rules });
        let outcome = desired.replace(&service, told);
        assert_eq!(outcome.dirty, [Unit::Frontend(frontend(30_000))]);
        assert_eq!(outcome.before, [], "packets go where they went");
    }

    #[test]
    fn the_older_service_has_a_port_whichever_came_first() {
        let (old, new) = (ObjectKey::new("d", "old"), ObjectKey::new("d", "new"));
        for order in [[&old, &new], [&new, &old]] {
            let mut desired = Desired::default();
            for service in order {
                let created = if service == &old { 1 } else { 2 };
                let action = if service == &old { Action::Drop } else { Action::Reject };
                let outcome = desired.replace(service, rules(created, 30_000, action.clone()));
                // The younger one is told, whichever comes second.
                let second = service == order[1];
                let told = |other: &ObjectKey| vec![(frontend(30_000), other.clone())];
                let taken = if second && service == &new { told(&old) } else { Vec::new() };
                let won = if second && service == &old { told(&new) } else { Vec::new() };
                assert_eq!((outcome.taken, outcome.won), (taken.clone(), won));
                // … and once.
                let again = desired.replace(service, rules(created, 30_000, action));
                assert_eq!((again.taken, again.won), (taken, Vec::new()));
            }
            assert_eq!(desired.action(&frontend(30_000)), Some(&Action::Drop));
            assert_eq!(desired.owner(&frontend(30_000)), Some(&old));
            let outcome = desired.replace(&old, None);
            assert!(outcome.dirty.contains(&Unit::Frontend(frontend(30_000))));
            assert_eq!(desired.action(&frontend(30_000)), Some(&Action::Reject));
            desired.replace(&new, None);
            assert_eq!(desired.units().count(), 0);
            assert!(desired.waiting.is_empty() && desired.services.is_empty());
        }
    }

    #[test]
    fn the_same_again_touches_nothing() {
        let mut desired = Desired::default();
        let key = ObjectKey::new("d", "s");
        assert_eq!(desired.replace(&key, rules(1, 30_000, Action::Drop)).dirty.len(), 2);
        assert!(desired.replace(&key, rules(1, 30_000, Action::Drop)).dirty.is_empty());
        let other = ObjectKey::new("d", "t");
        let outcome = desired.replace(&other, rules(2, 30_000, Action::Drop));
        assert_eq!(outcome.dirty, []);
        assert_eq!(outcome.taken.len(), 1);
        assert!(desired.has_address(AddressSet::Hairpin, [10, 0, 0, 1].into()));
    }
}
