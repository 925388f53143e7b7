//! What the kernel holds, whose it is, and what has to change.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
};

use keelson_api::object::ObjectKey;

use super::{
    base::{Base, BaseChain, CHAINS, Guest},
    chain::{Kind, OwnChain, Place, Table},
    service::Rendered,
};
use crate::ruleset::Frontend;

/// From how many removals on a chain is written anew: each means a walk through the chain.
const ANEW: usize = 32;

/// Rules' fingerprint, and how many they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Content {
    digest: u64,
    rules: u32,
}

impl Content {
    /// Whether there is no rule.
    pub(crate) fn is_empty(&self) -> bool {
        self.rules == 0
    }

    /// That of these rules, in this order.
    pub(crate) fn of<'a>(rules: impl IntoIterator<Item = &'a str>) -> Self {
        let mut content = Contents::default();
        rules.into_iter().for_each(|rule| content.add(rule));
        content.finish()
    }
}

/// A [`Content`] that is being made.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    hasher: DefaultHasher,
    rules: u32,
}

impl Contents {
    /// One more rule.
    pub(crate) fn add(&mut self, rule: &str) {
        rule.hash(&mut self.hasher);
        self.rules += 1;
    }

    /// All of them.
    pub(crate) fn finish(&self) -> Content {
        Content { digest: self.hasher.finish(), rules: self.rules }
    }
}

/// Lines in a chain that Services share.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lines {
    pub(crate) set: HashSet<Arc<str>>,
    /// A line stands twice, or not where it should.
    pub(crate) disorderly: bool,
}

/// What is in the kernel.
#[derive(Clone, Debug, Default)]
pub(crate) struct Present {
    pub(crate) own: HashMap<OwnChain, Content>,
    pub(crate) base: HashMap<(Table, &'static str), Content>,
    pub(crate) places: BTreeMap<Place, Lines>,
    pub(crate) tail: Vec<Arc<str>>,
    pub(crate) guests: BTreeSet<Guest>,
    /// Chains that guests stand in, other than the kernel's own.
    pub(crate) guest_chains: BTreeSet<(Table, &'static str)>,
    /// Chains of earlier proxies.
    pub(crate) outdated: Vec<String>,
    /// Chains of kube-proxy's ipvs mode.
    pub(crate) of_ipvs: Vec<(Table, &'static str)>,
    /// All rules in others' chains that lead to a proxy's.
    pub(crate) jumps: Vec<Jump>,
    /// Whether the note of who has set `route_localnet` is there.
    pub(crate) noted: bool,
}

/// A rule in somebody else's chain that leads to a proxy's chain, whoever wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Jump {
    pub(crate) table: Table,
    pub(crate) chain: String,
    pub(crate) rule: String,
    pub(crate) target: String,
}

impl Jump {
    /// Whether it stands in a chain of the kernel's own, where proxies put theirs, and not in one
    /// that another program has made.
    pub(crate) fn is_built_in(&self) -> bool {
        ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"].contains(&&*self.chain)
    }
}

/// What should be there.
#[derive(Debug, Default)]
pub(crate) struct Next {
    /// What Services share, if that is looked at.
    pub(crate) base: Option<Base>,
    /// Services; `None` if one is gone.
    pub(crate) services: Vec<(ObjectKey, Option<Rendered>)>,
    /// Whether what is there and isn't named above has to go, but for that of refused Services.
    pub(crate) sweep: bool,
}

/// Changes of a chain that Services share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PlaceDelta {
    /// The chain isn't there.
    pub(crate) missing: bool,
    pub(crate) added: Vec<Arc<str>>,
    pub(crate) removed: Vec<Arc<str>>,
    /// All lines, if the chain is written anew.
    pub(crate) anew: Option<Vec<Arc<str>>>,
}

/// Rules as text.
type Texts = Vec<Arc<str>>;

/// The difference between what is there and what should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Delta {
    pub(crate) chains: Vec<BaseChain>,
    pub(crate) unchained: Vec<(Table, &'static str)>,
    pub(crate) guest_chains: Vec<(Table, &'static str)>,
    pub(crate) guests: Vec<Guest>,
    /// Rules among others' that go; only a clean-up has such.
    pub(crate) farewells: Vec<Jump>,
    pub(crate) places: BTreeMap<Place, PlaceDelta>,
    /// The last rules of `KUBE-SERVICES`: those that go, those that come.
    pub(crate) tail: Option<(Texts, Texts)>,
    pub(crate) own: Vec<(OwnChain, Vec<Arc<str>>)>,
    pub(crate) gone: Vec<OwnChain>,
    pub(crate) outdated: Vec<String>,
    /// The chains in these two are only emptied, as somebody else's rules lead to them.
    pub(crate) emptied: bool,
    /// To these chains somebody else's rules lead: if they go, they are only emptied.
    pub(crate) led_to: BTreeSet<(Table, String)>,
}

#[derive(Debug, Default)]
struct Entry {
    chains: Box<[OwnChain]>,
    lines: Box<[(Place, Arc<str>)]>,
    frontends: Box<[Frontend]>,
    endpoints: usize,
    /// These are old rules of a Service whose new ones were refused.
    refused: bool,
}

/// What is in the kernel, and whose it is.
#[derive(Debug, Default)]
pub(crate) struct Held {
    pub(crate) present: Present,
    /// Grows when rules are read, or may have been written.
    pub(crate) version: u64,
    services: HashMap<ObjectKey, Entry>,
    frontends: HashMap<Frontend, ObjectKey>,
    endpoints: usize,
    /// Whether the note of who has set `route_localnet` should be there.
    pub(crate) note: bool,
}

impl Held {
    /// Which Service has a frontend, as far as the kernel knows.
    pub(crate) fn owner(&self, frontend: &Frontend) -> Option<&ObjectKey> {
        self.frontends.get(frontend)
    }

    /// All Services that have something there, but those whose new rules were refused.
    pub(crate) fn services(&self) -> impl Iterator<Item = &ObjectKey> {
        self.services.iter().filter_map(|(key, entry)| (!entry.refused).then_some(key))
    }

    /// How many frontends are in force.
    pub(crate) fn units(&self) -> usize {
        self.frontends.len()
    }

    /// How many endpoints there will be once these Services are as they should be.
    pub(crate) fn endpoints_after(&self, services: &[(ObjectKey, Option<Rendered>)]) -> usize {
        services.iter().fold(self.endpoints, |count, (key, next)| {
            let before = self.services.get(key).map_or(0, |entry| entry.endpoints);
            (count + next.as_ref().map_or(0, Rendered::endpoints)).saturating_sub(before)
        })
    }

    /// Takes over what was read from the kernel. Whose it is must be entered anew.
    pub(crate) fn observed(&mut self, present: Present) {
        self.version += 1;
        // Who flushes all rules doesn't set that back.
        self.note |= present.noted;
        self.present = present;
        self.services.clear();
        self.endpoints = 0;
    }

    /// Has a Service whose new rules were refused keep its old ones: all of its lines, and these
    /// chains. `desired` are its frontends, in case it has rules of an earlier run.
    pub(crate) fn keep(
        &mut self,
        service: &ObjectKey,
        chains: BTreeSet<OwnChain>,
        desired: impl Iterator<Item = Frontend>,
    ) {
        let lines: Vec<_> = self.present.lines_of(service).collect();
        let known = self.frontends.iter().filter(|(_, owner)| *owner == service);
        let mut frontends: Vec<Frontend> = known.map(|(frontend, _)| *frontend).collect();
        if frontends.is_empty() && !lines.is_empty() {
            frontends = desired.filter(|f| !self.frontends.contains_key(f)).collect();
            let owned = frontends.iter().map(|frontend| (*frontend, service.clone()));
            self.frontends.extend(owned);
        }
        let entry = Entry {
            endpoints: chains.iter().filter(|chain| chain.kind() == Kind::Endpoint).count(),
            chains: chains.into_iter().collect(),
            lines: lines.into(),
            frontends: frontends.into(),
            refused: true,
        };
        self.endpoints += entry.endpoints;
        if let Some(before) = self.services.insert(service.clone(), entry) {
            self.endpoints -= before.endpoints;
        }
    }

    fn refused(&self) -> impl Iterator<Item = &Entry> {
        self.services.values().filter(|entry| entry.refused)
    }

    /// All of it was taken away.
    pub(crate) fn removed(&mut self) {
        *self = Self { version: self.version + 1, ..Self::default() };
    }

    /// What has to change so that all is as it should be.
    pub(crate) fn plan(&self, next: &Next) -> Delta {
        let mut delta = Delta::default();
        if let Some(base) = &next.base {
            self.present.plan_base(base, &mut delta);
        }
        self.plan_lines(next, &mut delta);
        self.plan_chains(next, &mut delta);
        self.present.plan_tail(next.base.as_ref(), &mut delta);
        delta
    }

    fn plan_lines(&self, next: &Next, delta: &mut Delta) {
        let mut changes: BTreeMap<Place, PlaceDelta> = BTreeMap::new();
        let mut wanted: HashSet<(Place, &Arc<str>)> = HashSet::new();
        for (key, rendered) in &next.services {
            for (place, line) in rendered.iter().flat_map(|r| &r.lines) {
                wanted.insert((*place, line));
                if !self.present.has(*place, line) {
                    changes.entry(*place).or_default().added.push(Arc::clone(line));
                }
            }
            let before = self.services.get(key).map_or(&[][..], |entry| &entry.lines);
            for (place, line) in before {
                let stays = rendered
                    .as_ref()
                    .is_some_and(|r| r.lines.contains(&(*place, Arc::clone(line))));
                if !next.sweep && !stays && self.present.has(*place, line) {
                    changes.entry(*place).or_default().removed.push(Arc::clone(line));
                }
            }
        }
        for place in Place::ALL {
            let Some(present) = self.present.places.get(&place) else {
                if next.base.is_some() {
                    changes.entry(place).or_default().missing = true;
                }
                continue;
            };
            if next.sweep {
                let kept: HashSet<&Arc<str>> = self
                    .refused()
                    .flat_map(|entry| &entry.lines)
                    .filter_map(|(at, line)| (*at == place).then_some(line))
                    .collect();
                let mut gone: Vec<_> = present
                    .set
                    .iter()
                    .filter(|line| !wanted.contains(&(place, *line)) && !kept.contains(line))
                    .cloned()
                    .collect();
                gone.sort_unstable();
                if !gone.is_empty() {
                    changes.entry(place).or_default().removed = gone;
                }
            }
            if next.base.is_some() && present.disorderly {
                changes.entry(place).or_default();
            }
        }
        for (place, change) in &mut changes {
            let present = self.present.places.get(place);
            let anew = change.missing
                || change.removed.len() >= ANEW
                || (next.base.is_some() && present.is_some_and(|p| p.disorderly));
            if anew {
                let gone: HashSet<&Arc<str>> = change.removed.iter().collect();
                let present = present.into_iter().flat_map(|p| &p.set);
                let mut lines: Vec<_> = present
                    .filter(|line| !gone.contains(line))
                    .chain(&change.added)
                    .cloned()
                    .collect();
                lines.sort_unstable();
                lines.dedup();
                change.anew = Some(lines);
            }
        }
        delta.places = changes;
    }

    fn plan_chains(&self, next: &Next, delta: &mut Delta) {
        let mut wanted: HashSet<OwnChain> = HashSet::new();
        for (key, rendered) in &next.services {
            let chains = rendered.as_ref().map(|r| &r.chains);
            for (chain, rules) in chains.into_iter().flatten() {
                if next.sweep {
                    wanted.insert(*chain);
                }
                let content = Content::of(rules.iter().map(|rule| &**rule));
                if self.present.own.get(chain) != Some(&content) {
                    delta.own.push((*chain, rules.clone()));
                }
            }
            if next.sweep {
                continue;
            }
            let before = self.services.get(key).map_or(&[][..], |entry| &entry.chains);
            delta.gone.extend(before.iter().filter(|chain| {
                chains.is_none_or(|c| !c.contains_key(chain))
                    && self.present.own.contains_key(chain)
            }));
        }
        if next.sweep {
            wanted.extend(self.refused().flat_map(|entry| &entry.chains));
            delta.gone = self.present.own.keys().filter(|c| !wanted.contains(c)).copied().collect();
            delta.gone.sort_unstable();
            delta.outdated.clone_from(&self.present.outdated);
        }
    }

    /// Enters what was written.
    pub(crate) fn enter(&mut self, next: Next, delta: Delta) {
        self.present.enter(delta);
        let mut touched: Vec<Frontend> = Vec::new();
        for (key, _) in &next.services {
            let Some(entry) = self.services.remove(key) else { continue };
            self.endpoints -= entry.endpoints;
            touched.extend(entry.frontends);
        }
        let keys: HashSet<&ObjectKey> = next.services.iter().map(|(key, _)| key).collect();
        if next.base.is_some() {
            // Everything was read anew, and whose it was is only known from here.
            touched.extend(self.frontends.keys());
        }
        // First all that goes: a frontend may move from one Service to another.
        for frontend in touched {
            let owner = self.frontends.get(&frontend);
            let refused = |owner| self.services.get(owner).is_some_and(|entry| entry.refused);
            if owner.is_some_and(|owner| keys.contains(owner) || (next.sweep && !refused(owner))) {
                self.frontends.remove(&frontend);
            }
        }
        for (key, rendered) in next.services {
            let Some(rendered) = rendered else { continue };
            let entry = Entry {
                endpoints: rendered.endpoints(),
                chains: rendered.chains.into_keys().collect(),
                lines: rendered.lines.into_iter().collect(),
                frontends: rendered.frontends.iter().copied().collect(),
                refused: false,
            };
            let owned = rendered.frontends.into_iter().map(|f| (f, key.clone()));
            self.frontends.extend(owned);
            self.endpoints += entry.endpoints;
            self.services.insert(key, entry);
        }
    }
}

impl Present {
    fn has(&self, place: Place, line: &Arc<str>) -> bool {
        self.places.get(&place).is_some_and(|lines| lines.set.contains(line))
    }

    /// Whether nothing of a proxy is there.
    pub(crate) fn is_empty(&self) -> bool {
        self.places.is_empty() && self.base.is_empty() && self.own.is_empty()
    }

    /// How many rules of the proxy are in a table.
    pub(crate) fn rules(&self, table: Table) -> usize {
        let own = self.own.values().filter(|_| table == Table::Nat);
        let base = self.base.iter().filter(|((t, _), _)| *t == table).map(|(_, content)| content);
        let places = self.places.iter().filter(|(place, _)| place.table() == table);
        let tail = if table == Table::Nat { self.tail.len() } else { 0 };
        own.chain(base).map(|content| content.rules as usize).sum::<usize>()
            + places.map(|(_, lines)| lines.set.len()).sum::<usize>()
            + self.guests.iter().filter(|guest| guest.table == table).count()
            + tail
    }

    fn plan_base(&self, base: &Base, delta: &mut Delta) {
        for chain in &base.chains {
            let content = Content::of(chain.rules.iter().map(|rule| &**rule));
            if self.base.get(&(chain.table, chain.name)) != Some(&content) {
                delta.chains.push(chain.clone());
            }
        }
        for at in CHAINS {
            let wanted = base.chains.iter().any(|c| (c.table, c.name) == at);
            if !wanted && self.base.contains_key(&at) {
                delta.unchained.push(at);
            }
        }
        for guest in base.guests.iter().filter(|guest| !self.guests.contains(guest)) {
            let at = (guest.table, guest.chain);
            if guest.chain.starts_with("KUBE-") && !self.guest_chains.contains(&at) {
                delta.guest_chains.push(at);
            }
            delta.guests.push(guest.clone());
        }
    }

    fn plan_tail(&self, base: Option<&Base>, delta: &mut Delta) {
        let anew = delta.places.get(&Place::Services).is_some_and(|change| change.anew.is_some());
        let before = if anew { Vec::new() } else { self.tail.clone() };
        let after = base.map_or(&self.tail, |base| &base.tail);
        if anew || before != *after {
            delta.tail = Some((before, after.clone()));
        }
    }

    pub(super) fn enter(&mut self, delta: Delta) {
        for chain in delta.chains {
            let content = Content::of(chain.rules.iter().map(|rule| &**rule));
            self.base.insert((chain.table, chain.name), content);
        }
        for at in &delta.unchained {
            self.base.remove(at);
        }
        self.guest_chains.extend(delta.guest_chains);
        self.guests.extend(delta.guests);
        for (place, change) in delta.places {
            let lines = self.places.entry(place).or_default();
            lines.set.extend(change.added);
            for line in &change.removed {
                lines.set.remove(line);
            }
            if change.anew.is_some() {
                lines.disorderly = false;
            }
        }
        if let Some((_, tail)) = delta.tail {
            self.tail = tail;
        }
        for (chain, rules) in &delta.own {
            self.own.insert(*chain, Content::of(rules.iter().map(|rule| &**rule)));
        }
        for chain in &delta.gone {
            if delta.emptied {
                self.own.insert(*chain, Content::of([]));
            } else {
                self.own.remove(chain);
            }
        }
        if !delta.outdated.is_empty() && !delta.emptied {
            self.outdated.clear();
        }
    }

    /// The lines in shared chains that say in their comment that they are this Service's.
    pub(super) fn lines_of(&self, service: &ObjectKey) -> impl Iterator<Item = (Place, Arc<str>)> {
        let name = format!("--comment \"{service}");
        self.places.iter().flat_map(move |(place, lines)| {
            let own = lines.set.iter().filter(|line| {
                let rest = line.split_once(&*name).map(|(_, rest)| rest);
                rest.is_some_and(|rest| rest.starts_with([' ', ':', '"']))
            });
            own.map(|line| (*place, Arc::clone(line))).collect::<Vec<_>>()
        })
    }
}
