//! Which connections a change leaves behind. Nothing here does I/O.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
};

use keelson_api::object::ObjectKey;

use super::table::Tuple;
use crate::{
    backend::Stale,
    model::{Endpoint, Family, Protocol, table::ServiceTable},
    ruleset::{Action, AddressSet, Frontend, Lane, Unit, desired::Desired, desired::Outcome},
};

/// Remembers what frontends did at the last commit, until the next one.
#[derive(Debug, Default)]
pub(crate) struct Tracker {
    /// Of which family, if not of all.
    family: Option<Family>,
    /// Whether TCP counts.
    tcp: bool,
    before: HashMap<Frontend, Vec<Endpoint>>,
    /// TCP frontends that are new: who tried to connect before got no answer, and tries again.
    opened: HashSet<Frontend>,
    /// TCP connections to endpoints that get no new ones but are there still, by Service.
    leaving: HashMap<ObjectKey, Vec<Stale>>,
}

impl Tracker {
    /// Looks at one family only, and at TCP connections to endpoints that are gone if `tcp`.
    pub(crate) fn of(family: Family, tcp: bool) -> Self {
        Self { family: Some(family), tcp, ..Self::default() }
    }

    fn counts(&self, frontend: &Frontend) -> bool {
        self.family.is_none_or(|family| family == frontend.family)
            && (frontend.protocol != Protocol::Tcp || self.tcp)
    }

    /// Notes what frontends did before a change. Of several changes between two commits the first
    /// one tells.
    pub(crate) fn changed(&mut self, outcome: &Outcome) {
        for (frontend, action) in &outcome.before {
            if self.counts(frontend) {
                self.before.entry(*frontend).or_insert_with(|| endpoints(Some(action)).to_vec());
            }
        }
        for unit in &outcome.dirty {
            let Unit::Frontend(frontend) = unit else { continue };
            if self.counts(frontend) {
                self.before.entry(*frontend).or_default();
            }
            // Only addresses: the node itself answers at its own ports.
            let new = || outcome.before.iter().all(|(before, _)| before != frontend);
            if frontend.protocol == Protocol::Tcp
                && frontend.address.is_some()
                && self.family.is_none_or(|family| family == frontend.family)
                && new()
            {
                self.opened.insert(*frontend);
            }
        }
    }

    /// Which connections are stale now that everything desired is in force.
    #[cfg(test)]
    pub(crate) fn settle(&mut self, desired: &Desired, objects: &ServiceTable) -> Vec<Stale> {
        self.settle_except(desired, objects, &HashSet::new())
    }

    /// As [`Self::settle`], where some units were refused: these go on as before.
    pub(crate) fn settle_except(
        &mut self,
        desired: &Desired,
        objects: &ServiceTable,
        refused: &HashSet<Unit>,
    ) -> Vec<Stale> {
        let mut stale = Vec::new();
        let mut closing = Vec::new();
        self.opened.retain(|frontend| {
            if refused.contains(&Unit::Frontend(*frontend)) {
                return true;
            }
            let itself =
                frontend.address.filter(|_| !endpoints(desired.action(frontend)).is_empty());
            stale.extend(itself.map(|address| Stale {
                frontend: *frontend,
                endpoint: Some(Endpoint { address, port: frontend.port }),
            }));
            false
        });
        for (frontend, before) in std::mem::take(&mut self.before) {
            if refused.contains(&Unit::Frontend(frontend)) {
                self.before.insert(frontend, before);
                continue;
            }
            let now = endpoints(desired.action(&frontend));
            // Clients inside may still use an endpoint that those outside may not, and the kernel's
            // entries look alike.
            let other = other_lane(frontend);
            let others = other.map_or(&[][..], |other| endpoints(desired.action(&other)));
            if before.is_empty() && !now.is_empty() && frontend.protocol != Protocol::Tcp {
                let untranslated = frontend.address.filter(|_| !others.is_empty());
                let endpoint =
                    untranslated.map(|address| Endpoint { address, port: frontend.port });
                stale.push(Stale { frontend, endpoint });
            }
            let there: HashSet<&Endpoint> = now.iter().chain(others).collect();
            let lost = before.into_iter().filter(|endpoint| !there.contains(endpoint));
            let lost = lost.map(|endpoint| Stale { frontend, endpoint: Some(endpoint) });
            if frontend.protocol == Protocol::Tcp {
                closing.extend(lost);
            } else {
                stale.extend(lost);
            }
        }
        for one in closing {
            let owner = desired.owner(&one.frontend).cloned().unwrap_or_default();
            self.leaving.entry(owner).or_default().push(one);
        }
        // An endpoint that terminates gets no new connections, but those that it has may end well.
        self.leaving.retain(|owner, waiting| {
            let there: HashSet<IpAddr> = addresses(objects, owner).collect();
            let (stay, gone) = waiting
                .drain(..)
                .partition(|s| s.endpoint.is_some_and(|e| there.contains(&e.address)));
            *waiting = stay;
            let gone: Vec<Stale> = gone;
            stale.extend(gone);
            !waiting.is_empty()
        });
        stale.sort_unstable_by_key(|s| (s.frontend, s.endpoint));
        stale
    }
}

fn addresses<'a>(
    objects: &'a ServiceTable,
    service: &'a ObjectKey,
) -> impl Iterator<Item = IpAddr> + 'a {
    objects.slices_of(service).flat_map(|slice| slice.endpoints.iter().map(|e| e.address))
}

fn endpoints(action: Option<&Action>) -> &[Endpoint] {
    match action {
        Some(Action::Forward { endpoints, .. }) => endpoints,
        _ => &[],
    }
}

/// The frontend of the same address and port for the other clients.
fn other_lane(frontend: Frontend) -> Option<Frontend> {
    let lane = match frontend.lane {
        Lane::Address => Lane::AddressInside,
        Lane::AddressInside => Lane::Address,
        Lane::NodePort => Lane::NodePortInside,
        Lane::NodePortInside => Lane::NodePort,
    };
    Some(Frontend { lane, ..frontend })
}

/// What clients of TCP connect to; a node port has no address.
type Port = (Option<IpAddr>, u16);

/// Where connections should go, all of it: to compare the kernel's whole table with.
#[derive(Debug)]
pub(crate) struct Expected {
    families: Vec<Family>,
    /// The others' endpoints, in order.
    frontends: HashMap<(Option<IpAddr>, Protocol, u16), Vec<Endpoint>>,
    /// TCP's in order, and whether they have any endpoint: most are TCP's, and take little so.
    tcp: Box<[(Port, bool)]>,
    node_addresses: HashSet<IpAddr>,
    /// Every endpoint's address, ready or not, if TCP counts.
    alive: Option<HashSet<IpAddr>>,
}

impl Expected {
    /// What follows from all that is desired.
    pub(crate) fn of(
        desired: &Desired,
        objects: &ServiceTable,
        families: &[Family],
        tcp: bool,
    ) -> Self {
        let mut frontends: HashMap<_, Vec<Endpoint>> = HashMap::new();
        let mut node_addresses = HashSet::new();
        let own_tcp = |unit: Unit| match unit {
            Unit::Frontend(frontend) if frontend.protocol == Protocol::Tcp => {
                families.contains(&frontend.family).then_some(frontend)
            }
            _ => None,
        };
        let mut served = Vec::with_capacity(desired.units().filter_map(own_tcp).count());
        served.extend(desired.units().filter_map(own_tcp).map(|frontend| {
            let some = !endpoints(desired.action(&frontend)).is_empty();
            ((frontend.address, frontend.port), some)
        }));
        served.sort_unstable();
        served.dedup_by(|next, kept| {
            let same = next.0 == kept.0;
            kept.1 |= same && next.1;
            same
        });
        for unit in desired.units() {
            match unit {
                Unit::Frontend(frontend) if frontend.protocol == Protocol::Tcp => {}
                Unit::Frontend(frontend) => {
                    let key = (frontend.address, frontend.protocol, frontend.port);
                    let all = frontends.entry(key).or_default();
                    all.extend_from_slice(endpoints(desired.action(&frontend)));
                }
                Unit::Address(AddressSet::NodeAddresses, address) => {
                    node_addresses.insert(address);
                }
                _ => {}
            }
        }
        frontends.values_mut().for_each(|endpoints| endpoints.sort_unstable());
        let alive = tcp.then(|| objects.keys().flat_map(|key| addresses(objects, key)).collect());
        Self { families: families.to_vec(), frontends, tcp: served.into(), node_addresses, alive }
    }

    /// The same where nothing is translated any more: every flow that still is.
    pub(crate) fn untranslated(mut self) -> Self {
        self.frontends.values_mut().for_each(|endpoints| *endpoints = Vec::new());
        Self { tcp: Box::default(), alive: None, ..self }
    }

    /// Which families there are.
    pub(crate) fn families(&self) -> impl Iterator<Item = Family> {
        self.families.iter().copied()
    }

    /// Whether a connection, as its client sees it and as the answers come, should be forgotten.
    pub(crate) fn is_stale(&self, original: &Tuple, reply: &Tuple) -> bool {
        let Some(protocol) = Protocol::from_number(original.protocol) else { return false };
        let server = Endpoint { address: reply.source, port: reply.source_port };
        let to = (original.destination, original.destination_port);
        let translated = (server.address, server.port) != to;
        // What is for this machine itself has no business with a node port's endpoints.
        let for_node = translated || self.node_addresses.contains(&to.0);
        if protocol == Protocol::Tcp {
            let served = |address| {
                let found = self.tcp.binary_search_by_key(&(address, to.1), |(key, _)| *key);
                found.ok().and_then(|at| self.tcp.get(at)).map(|(_, served)| *served)
            };
            let known = served(Some(to.0)).or_else(|| served(None).filter(|_| for_node));
            return known.is_some_and(|served| match (&self.alive, translated) {
                (Some(alive), true) => !alive.contains(&server.address),
                (None, true) => false,
                (_, false) => served && !reply.seen,
            });
        }
        let known = self
            .frontends
            .get(&(Some(to.0), protocol, to.1))
            .or_else(|| self.frontends.get(&(None, protocol, to.1)).filter(|_| for_node));
        let Some(endpoints) = known else { return false };
        if endpoints.is_empty() { translated } else { endpoints.binary_search(&server).is_err() }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        model::slices::{Hint, Slice, SliceEndpoint},
        ruleset::{Masquerade, desired::ServiceRules},
    };

    fn endpoint(last: u8) -> Endpoint {
        Endpoint { address: [10, 0, 0, last].into(), port: 8080 }
    }

    fn forward(lasts: &[u8]) -> Action {
        if lasts.is_empty() {
            return Action::Reject;
        }
        Action::Forward {
            endpoints: lasts.iter().map(|n| endpoint(*n)).collect(),
            masquerade: Masquerade::OffCluster,
            affinity: None,
            sources: None,
        }
    }

    fn frontend(protocol: Protocol, lane: Lane) -> Frontend {
        let address = lane.with_address().then(|| [10, 96, 0, 1].into());
        Frontend { family: Family::V4, lane, address, protocol, port: 80 }
    }

    fn key() -> ObjectKey {
        ObjectKey::new("d", "s")
    }

    fn want(desired: &mut Desired, tracker: &mut Tracker, frontends: Vec<(Frontend, Action)>) {
        let rules = ServiceRules { created: 1, frontends, ..ServiceRules::default() };
        tracker.changed(&desired.replace(&key(), Some(rules)));
    }

    fn slice_of(lasts: &[u8]) -> Slice {
        let endpoints = lasts.iter().map(|n| SliceEndpoint {
            address: endpoint(*n).address,
            ready: false,
            serving: true,
            terminating: true,
            local: false,
            maybe_local: false,
            node_hint: Hint::Absent,
            zone_hint: Hint::Absent,
        });
        Slice {
            service: key(),
            family: Family::V4,
            ports: Box::default(),
            endpoints: endpoints.collect::<Vec<_>>().into(),
            triggered: None,
        }
    }

    #[test]
    fn endpoints_that_a_udp_frontend_lost_are_stale_and_so_is_its_past_without_any() {
        type Case<'a> = (&'a str, &'a [u8], &'a [u8], &'a [Option<u8>]);
        let table: &[Case<'_>] = &[
            ("nothing changed", &[1, 2], &[1, 2], &[]),
            ("one more", &[1], &[1, 2], &[]),
            ("one less", &[1, 2], &[2], &[Some(1)]),
            ("another", &[1], &[2], &[Some(1)]),
            ("none left", &[1, 2], &[], &[Some(1), Some(2)]),
            ("the first", &[], &[1], &[None]),
        ];
        for protocol in [Protocol::Udp, Protocol::Sctp, Protocol::Tcp] {
            for (what, before, after, expected) in table {
                let frontend = frontend(protocol, Lane::Address);
                let (mut desired, mut tracker) = (Desired::default(), Tracker::default());
                let objects = ServiceTable::default();
                want(&mut desired, &mut tracker, vec![(frontend, forward(before))]);
                tracker.settle(&desired, &objects);
                want(&mut desired, &mut tracker, vec![(frontend, forward(&[9]))]);
                want(&mut desired, &mut tracker, vec![(frontend, forward(after))]);
                let found: Vec<_> =
                    tracker.settle(&desired, &objects).into_iter().map(|s| s.endpoint).collect();
                let expected: Vec<_> = expected.iter().map(|e| e.map(endpoint)).collect();
                let expected = if protocol == Protocol::Tcp { Vec::new() } else { expected };
                assert_eq!(found, expected, "{protocol} {what}");
            }
        }
    }

    #[test]
    fn tcp_counts_when_asked_for_once_the_endpoint_is_gone_altogether() {
        let frontend = frontend(Protocol::Tcp, Lane::Address);
        let (mut desired, mut tracker) = (Desired::default(), Tracker::of(Family::V4, true));
        let mut objects = ServiceTable::default();
        let slice = ObjectKey::new("d", "s-1");
        objects.set_slice(&slice, Some(slice_of(&[1, 2])));
        want(&mut desired, &mut tracker, vec![(frontend, forward(&[1, 2]))]);
        tracker.settle(&desired, &objects);
        want(&mut desired, &mut tracker, vec![(frontend, forward(&[2]))]);
        assert_eq!(tracker.settle(&desired, &objects), [], "it only terminates");
        objects.set_slice(&slice, Some(slice_of(&[2])));
        let stale = Stale { frontend, endpoint: Some(endpoint(1)) };
        assert_eq!(tracker.settle(&desired, &objects), [stale]);
        assert_eq!(tracker.settle(&desired, &objects), []);
    }

    #[test]
    fn who_tried_tcp_before_there_was_a_service_is_let_in() {
        let (own, node_port) =
            (frontend(Protocol::Tcp, Lane::Address), frontend(Protocol::Tcp, Lane::NodePort));
        let (mut desired, mut tracker) = (Desired::default(), Tracker::of(Family::V4, false));
        let objects = ServiceTable::default();
        want(&mut desired, &mut tracker, vec![(own, forward(&[1])), (node_port, forward(&[1]))]);
        let refused = HashSet::from([Unit::Frontend(own)]);
        assert_eq!(tracker.settle_except(&desired, &objects, &refused), []);
        let itself = Endpoint { address: own.address.unwrap(), port: own.port };
        let stale = Stale { frontend: own, endpoint: Some(itself) };
        assert!(stale.is_unanswered());
        assert_eq!(tracker.settle(&desired, &objects), [stale]);
        // What was refused before was told so, and isn't tracked.
        for lasts in [&[][..], &[2]] {
            want(&mut desired, &mut tracker, vec![(own, forward(lasts))]);
            assert_eq!(tracker.settle(&desired, &objects), []);
        }
    }

    #[test]
    fn what_was_refused_goes_on_until_it_is_in_force() {
        let frontend = frontend(Protocol::Udp, Lane::Address);
        let (mut desired, mut tracker) = (Desired::default(), Tracker::of(Family::V4, false));
        let objects = ServiceTable::default();
        want(&mut desired, &mut tracker, vec![(frontend, forward(&[1]))]);
        tracker.settle(&desired, &objects);
        want(&mut desired, &mut tracker, vec![(frontend, forward(&[2]))]);
        let refused = HashSet::from([Unit::Frontend(frontend)]);
        assert_eq!(tracker.settle_except(&desired, &objects, &refused), []);
        let stale = Stale { frontend, endpoint: Some(endpoint(1)) };
        assert_eq!(tracker.settle(&desired, &objects), [stale]);
        let mut other = Tracker::of(Family::V6, false);
        want(&mut desired, &mut other, vec![(frontend, forward(&[3]))]);
        assert_eq!(other.settle(&desired, &objects), [], "each family has its own");
    }

    #[test]
    fn what_clients_inside_may_use_is_not_stale() {
        let outside = frontend(Protocol::Udp, Lane::NodePort);
        let inside = frontend(Protocol::Udp, Lane::NodePortInside);
        let (mut desired, mut tracker) = (Desired::default(), Tracker::default());
        let objects = ServiceTable::default();
        let both = |local: &[u8]| vec![(outside, forward(local)), (inside, forward(&[1, 2]))];
        want(&mut desired, &mut tracker, both(&[1]));
        tracker.settle(&desired, &objects);
        want(&mut desired, &mut tracker, both(&[2]));
        assert_eq!(tracker.settle(&desired, &objects), []);
    }

    #[test]
    fn a_start_finds_what_went_meanwhile() {
        let address: IpAddr = [10, 96, 0, 1].into();
        let node: IpAddr = [192, 0, 2, 1].into();
        let mut desired = Desired::default();
        let rules = ServiceRules {
            created: 1,
            frontends: vec![
                (frontend(Protocol::Udp, Lane::Address), forward(&[1])),
                (frontend(Protocol::Udp, Lane::NodePort), forward(&[1])),
                (frontend(Protocol::Tcp, Lane::Address), forward(&[1])),
            ],
            addresses: vec![(AddressSet::NodeAddresses, node)],
            ..ServiceRules::default()
        };
        desired.replace(&key(), Some(rules));
        let mut objects = ServiceTable::default();
        objects.set_slice(&ObjectKey::new("d", "s-1"), Some(slice_of(&[1])));
        let service = |port: Option<u16>| {
            let balanced = json!({"clusterIP": address, "type": "LoadBalancer",
                "externalTrafficPolicy": "Local", "healthCheckNodePort": port});
            let object = serde_json::from_value(json!({"spec": balanced})).unwrap();
            crate::model::services::Service::read(&object).0.unwrap()
        };
        objects.set_service(&key(), Some(service(None)));
        let (udp, tcp) = (Protocol::Udp, Protocol::Tcp);
        let table = [
            ("to its endpoint", udp, address, 80, endpoint(1), false),
            ("to one that is gone", udp, address, 80, endpoint(2), true),
            ("to nobody", udp, address, 80, Endpoint { address, port: 80 }, true),
            ("another port", udp, address, 81, endpoint(2), false),
            ("a node port", udp, node, 80, endpoint(2), true),
            ("the node's own", udp, node, 80, Endpoint { address: node, port: 80 }, true),
            ("TCP to one that is there", tcp, address, 80, endpoint(1), false),
            ("TCP to one that is gone", tcp, address, 80, endpoint(2), true),
            ("TCP from before the rules", tcp, address, 80, Endpoint { address, port: 80 }, true),
        ];
        for tcp_counts in [false, true] {
            let expected = Expected::of(&desired, &objects, &[Family::V4], tcp_counts);
            for (what, protocol, destination, destination_port, server, stale) in &table {
                let client: IpAddr = [198, 51, 100, 1].into();
                let original = Tuple {
                    source: client,
                    destination: *destination,
                    protocol: protocol.number(),
                    source_port: 1024,
                    destination_port: *destination_port,
                    seen: true,
                };
                let reply = Tuple {
                    source: server.address,
                    destination: client,
                    protocol: protocol.number(),
                    source_port: server.port,
                    destination_port: 1024,
                    seen: (server.address, server.port) != (*destination, *destination_port),
                };
                let counts = tcp_counts || *protocol != tcp || !reply.seen;
                assert_eq!(expected.is_stale(&original, &reply), *stale && counts, "{what}");
            }
        }
    }

    #[test]
    fn a_flow_to_somebody_elses_address_is_none_of_a_node_ports() {
        let mut desired = Desired::default();
        let node_port = frontend(Protocol::Udp, Lane::NodePort);
        let node: IpAddr = [192, 0, 2, 1].into();
        let rules = ServiceRules {
            frontends: vec![(node_port, forward(&[1]))],
            addresses: vec![(AddressSet::NodeAddresses, node)],
            ..ServiceRules::default()
        };
        desired.replace(&key(), Some(rules));
        let expected = Expected::of(&desired, &ServiceTable::default(), &[Family::V4], false);
        let client: IpAddr = [198, 51, 100, 1].into();
        let elsewhere: IpAddr = [203, 0, 113, 5].into();
        // Untranslated, so that whom it is for answers.
        for (to, stale) in [(node, true), (elsewhere, false)] {
            let tuple = |source, destination, source_port, destination_port| Tuple {
                source,
                destination,
                protocol: Protocol::Udp.number(),
                source_port,
                destination_port,
                seen: true,
            };
            let original = tuple(client, to, 1024, node_port.port);
            let reply = tuple(to, client, node_port.port, 1024);
            assert_eq!(expected.is_stale(&original, &reply), stale, "{to}");
        }
    }
}
