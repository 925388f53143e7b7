//! Which endpoints a service port's traffic may go to.

use super::{
    Endpoint, Family, Protocol,
    services::ServicePort,
    slices::{Hint, Slice, SliceEndpoint},
};

/// The most endpoints behind one port; each costs an element in the kernel, and each change of one
/// looks at all of them.
pub(crate) const ENDPOINTS_MAX: usize = 65_536;

/// The endpoints of one service port in one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Eligible {
    /// For traffic that may go anywhere; this and the next two in order.
    pub(crate) cluster: Vec<Endpoint>,
    /// For traffic that must stay on this node.
    pub(crate) local: Vec<Endpoint>,
    /// Those of either that may be on this node, and so may be their own client by any address.
    pub(crate) hairpin: Vec<Endpoint>,
    /// Which hints narrowed [`Self::cluster`] down.
    pub(crate) topology: Topology,
    /// Whether there are more endpoints than are looked at.
    pub(crate) too_many: bool,
}

impl Eligible {
    /// Chooses from all slices of a service. An endpoint that several slices name counts once.
    ///
    /// Ready endpoints are taken; where there are none, those that still serve while they
    /// terminate (KEP-1669), on the node and in the cluster each for itself. Of the ready ones in
    /// the cluster, those count that the slices' hints mean for this node or else for its zone, if
    /// every ready endpoint has a hint and one is meant for here (KEP-2433, KEP-3015).
    pub(crate) fn of<'a>(
        slices: impl IntoIterator<Item = &'a Slice>,
        port: &ServicePort,
        family: Family,
    ) -> Self {
        let (endpoints, too_many) = merged_endpoints(slices, port, family);
        let chosen = |wanted: &dyn Fn(&SliceEndpoint) -> bool| -> Vec<Endpoint> {
            endpoints.iter().filter(|(_, state)| wanted(state)).map(|(e, _)| *e).collect()
        };
        let or_draining = |ready: Vec<Endpoint>, among: fn(&SliceEndpoint) -> bool| {
            if ready.is_empty() {
                chosen(&|state| among(state) && state.serving && state.terminating)
            } else {
                ready
            }
        };
        let topology = Topology::of(endpoints.iter().map(|(_, state)| state));
        let cluster = or_draining(chosen(&|state| state.ready && topology.admits(state)), |_| true);
        let local = or_draining(chosen(&|state| state.ready && state.local), |state| state.local);
        let hairpin = endpoints
            .iter()
            .filter(|(endpoint, state)| {
                state.maybe_local
                    && [&cluster, &local].iter().any(|them| them.binary_search(endpoint).is_ok())
            })
            .map(|(endpoint, _)| *endpoint)
            .collect();
        Self { cluster, local, hairpin, topology, too_many }
    }
}

/// Which hints decide.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Topology {
    /// None: any endpoint will do.
    #[default]
    Anywhere,
    /// Those that name this node.
    Node,
    /// Those that name this node's zone.
    Zone,
}

impl Topology {
    fn of<'a>(endpoints: impl Iterator<Item = &'a SliceEndpoint> + Clone) -> Self {
        let ready = endpoints.filter(|endpoint| endpoint.ready);
        let decides = |hint: fn(&SliceEndpoint) -> Hint| {
            ready.clone().all(|endpoint| hint(endpoint) != Hint::Absent)
                && ready.clone().any(|endpoint| hint(endpoint) == Hint::Here)
        };
        if decides(|endpoint| endpoint.node_hint) {
            Self::Node
        } else if decides(|endpoint| endpoint.zone_hint) {
            Self::Zone
        } else {
            Self::Anywhere
        }
    }

    /// Whether an endpoint is meant for clients here.
    pub(crate) fn admits(self, endpoint: &SliceEndpoint) -> bool {
        match self {
            Self::Anywhere => true,
            Self::Node => endpoint.node_hint == Hint::Here,
            Self::Zone => endpoint.zone_hint == Hint::Here,
        }
    }
}

/// All endpoints of one service port, whatever their state, each once and in order; and whether
/// there are more than [`ENDPOINTS_MAX`], of which the first are taken.
///
/// A Service of thousands of endpoints goes through here with every change of one. The endpoints of
/// a [`Slice`] are in order, so sorting them all is little more than going through them once.
pub(crate) fn merged_endpoints<'a>(
    slices: impl IntoIterator<Item = &'a Slice>,
    port: &ServicePort,
    family: Family,
) -> (Vec<(Endpoint, SliceEndpoint)>, bool) {
    let mut endpoints = Vec::new();
    let mut too_many = false;
    for slice in slices.into_iter().filter(|slice| slice.family == family) {
        for number in target_ports(slice, &port.name, port.protocol) {
            endpoints.extend(slice.endpoints.iter().map(|found| {
                let endpoint = Endpoint { address: found.address, port: number };
                (endpoint, *found)
            }));
            if endpoints.len() > ENDPOINTS_MAX {
                merge(&mut endpoints);
                too_many |= endpoints.len() > ENDPOINTS_MAX;
                endpoints.truncate(ENDPOINTS_MAX);
            }
        }
    }
    merge(&mut endpoints);
    (endpoints, too_many)
}

/// Brings endpoints in order, and those that are there twice together.
fn merge(endpoints: &mut Vec<(Endpoint, SliceEndpoint)>) {
    endpoints.sort_by_key(|(endpoint, _)| *endpoint);
    endpoints.dedup_by(|(next, state), (kept, known)| {
        let same = next == kept;
        if same {
            *known = merged(*known, *state);
        }
        same
    });
}

/// Named ports may differ from slice to slice.
fn target_ports<'a>(
    slice: &'a Slice,
    name: &'a str,
    protocol: Protocol,
) -> impl Iterator<Item = u16> + 'a {
    slice
        .ports
        .iter()
        .filter(move |(n, p, _)| **n == *name && *p == protocol)
        .map(|(_, _, number)| *number)
}

/// Two slices may tell of one endpoint while it moves from one to the other; what says that it can
/// be used wins, whichever was read first.
fn merged(a: SliceEndpoint, b: SliceEndpoint) -> SliceEndpoint {
    SliceEndpoint {
        address: a.address,
        ready: a.ready || b.ready,
        serving: a.serving || b.serving,
        terminating: a.terminating && b.terminating,
        local: a.local || b.local,
        maybe_local: a.maybe_local || b.maybe_local,
        node_hint: merged_hint(a.node_hint, b.node_hint),
        zone_hint: merged_hint(a.zone_hint, b.zone_hint),
    }
}

fn merged_hint(a: Hint, b: Hint) -> Hint {
    match (a, b) {
        (Hint::Here, _) | (_, Hint::Here) => Hint::Here,
        (Hint::Elsewhere, _) | (_, Hint::Elsewhere) => Hint::Elsewhere,
        (Hint::Absent, Hint::Absent) => Hint::Absent,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use keelson_api::object::ObjectKey;
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const READY: (bool, bool, bool) = (true, true, false);
    const DRAINING: (bool, bool, bool) = (false, true, true);
    const GONE: (bool, bool, bool) = (false, false, true);
    const STARTING: (bool, bool, bool) = (false, false, false);

    fn endpoint(last: u8, state: (bool, bool, bool), local: bool) -> SliceEndpoint {
        SliceEndpoint {
            address: [10, 0, 0, last].into(),
            ready: state.0,
            serving: state.1,
            terminating: state.2,
            local,
            maybe_local: local,
            node_hint: Hint::Absent,
            zone_hint: Hint::Absent,
        }
    }

    #[test]
    fn hints_decide_where_every_ready_endpoint_has_one_and_one_is_for_here() {
        use Hint::{Absent, Elsewhere, Here};
        type Case<'a> = (&'a str, &'a [(u8, Hint, Hint)], &'a [u8], Topology);
        let table: &[Case<'_>] = &[
            ("none", &[(1, Absent, Absent), (2, Absent, Absent)], &[1, 2], Topology::Anywhere),
            ("zone", &[(1, Absent, Here), (2, Absent, Elsewhere)], &[1], Topology::Zone),
            ("one without", &[(1, Absent, Here), (2, Absent, Absent)], &[1, 2], Topology::Anywhere),
            ("none for here", &[(1, Elsewhere, Elsewhere)], &[1], Topology::Anywhere),
            (
                "the node before the zone",
                &[(1, Elsewhere, Here), (2, Here, Here)],
                &[2],
                Topology::Node,
            ),
            (
                "no node: the zone",
                &[(1, Elsewhere, Here), (2, Elsewhere, Elsewhere)],
                &[1],
                Topology::Zone,
            ),
        ];
        let port =
            ServicePort { name: "web".into(), protocol: Protocol::Tcp, port: 80, node_port: None };
        for (what, hints, cluster, topology) in table {
            let mut endpoints: Vec<_> = hints
                .iter()
                .map(|(n, node_hint, zone_hint)| SliceEndpoint {
                    node_hint: *node_hint,
                    zone_hint: *zone_hint,
                    ..endpoint(*n, READY, false)
                })
                .collect();
            // What isn't ready needs no hint.
            endpoints.push(endpoint(9, STARTING, false));
            let found = Eligible::of(&[slice(8080, &endpoints)], &port, Family::V4);
            assert_eq!(
                (&last_bytes(&found.cluster)[..], found.topology),
                (*cluster, *topology),
                "{what}"
            );
        }
    }

    fn slice(port: u16, endpoints: &[SliceEndpoint]) -> Slice {
        Slice {
            service: ObjectKey::new("d", "s"),
            family: Family::V4,
            ports: [("web".into(), Protocol::Tcp, port)].into(),
            endpoints: endpoints.into(),
            triggered: None,
        }
    }

    fn last_bytes(endpoints: &[Endpoint]) -> Vec<u8> {
        endpoints
            .iter()
            .map(|e| match e.address {
                std::net::IpAddr::V4(v4) => v4.octets()[3],
                std::net::IpAddr::V6(_) => 0,
            })
            .collect()
    }

    #[test]
    fn ready_ones_and_else_those_that_drain() {
        type Case<'a> = (&'a str, &'a [(u8, (bool, bool, bool), bool)], &'a [u8], &'a [u8]);
        let table: &[Case<'_>] = &[
            ("ready are taken", &[(1, READY, true), (2, READY, false)], &[1, 2], &[1]),
            ("starting are not", &[(1, READY, false), (2, STARTING, true)], &[1], &[]),
            (
                "draining are not while one is ready",
                &[(1, READY, true), (2, DRAINING, true)],
                &[1],
                &[1],
            ),
            (
                "draining are when none is ready",
                &[(1, DRAINING, true), (2, GONE, true)],
                &[1],
                &[1],
            ),
            (
                "local and cluster each for itself",
                &[(1, DRAINING, true), (2, READY, false)],
                &[2],
                &[1],
            ),
            ("nothing", &[], &[], &[]),
        ];
        let port =
            ServicePort { name: "web".into(), protocol: Protocol::Tcp, port: 80, node_port: None };
        for (what, endpoints, cluster, local) in table {
            let endpoints: Vec<_> =
                endpoints.iter().map(|(n, s, l)| endpoint(*n, *s, *l)).collect();
            let found = Eligible::of(&[slice(8080, &endpoints)], &port, Family::V4);
            assert_eq!(last_bytes(&found.cluster), *cluster, "{what}");
            assert_eq!(last_bytes(&found.local), *local, "{what}");
        }
    }

    #[test]
    fn one_in_two_slices_counts_once_and_named_ports_may_differ() {
        let port =
            ServicePort { name: "web".into(), protocol: Protocol::Tcp, port: 80, node_port: None };
        let slices = [
            slice(8080, &[endpoint(1, READY, true)]),
            slice(8080, &[endpoint(1, DRAINING, true)]),
            slice(9090, &[endpoint(2, READY, false)]),
        ];
        let found = Eligible::of(&slices, &port, Family::V4);
        let ports: Vec<_> = found.cluster.iter().map(|e| e.port).collect();
        assert_eq!((last_bytes(&found.cluster), ports), (vec![1, 2], vec![8080, 9090]));
        assert!(Eligible::of(&slices, &port, Family::V6).cluster.is_empty());
    }

    proptest! {
        #[test]
        fn an_endpoint_of_many_slices_is_what_all_of_them_say(
            slices in vec((vec((0u8..9, any::<[bool; 5]>()), 0..9), 8080u16..8083), 0..6),
        ) {
            let slices: Vec<Slice> = slices
                .iter()
                .map(|(endpoints, port)| {
                    let mut all: Vec<SliceEndpoint> = endpoints
                        .iter()
                        .map(|(n, [ready, serving, terminating, local, near])| SliceEndpoint {
                            zone_hint: if *near { Hint::Here } else { Hint::Elsewhere },
                            ..endpoint(*n, (*ready, *serving, *terminating), *local)
                        })
                        .collect();
                    all.sort_by_key(|endpoint| endpoint.address);
                    slice(*port, &all)
                })
                .collect();
            let port = ServicePort {
                name: "web".into(),
                protocol: Protocol::Tcp,
                port: 80,
                node_port: None,
            };
            let mut expected: BTreeMap<Endpoint, SliceEndpoint> = BTreeMap::new();
            for slice in &slices {
                for state in slice.endpoints.iter() {
                    let endpoint = Endpoint { address: state.address, port: slice.ports[0].2 };
                    let known = expected.entry(endpoint).or_insert(*state);
                    *known = merged(*known, *state);
                }
            }
            let forwards = merged_endpoints(&slices, &port, Family::V4);
            prop_assert_eq!(&forwards, &(expected.into_iter().collect(), false));
            prop_assert_eq!(forwards, merged_endpoints(slices.iter().rev(), &port, Family::V4));
        }
    }
}
