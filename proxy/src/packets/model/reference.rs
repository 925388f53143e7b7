//! What comes of each connection, slow and obvious: written from Kubernetes' documentation and not
//! from the proxy's own model.

use std::collections::{BTreeMap, BTreeSet};

use super::world::{Families, Here, Kind, Point, Ranges, Spec, To, World};
use crate::packets::{
    features::{Expect, Seen},
    fixture::From,
};

/// An endpoint: a pod, and the port that is meant.
pub(super) type Pair = (u8, u16);

/// One of these endpoints, which sees this; or something else.
pub(super) type Outcome = Result<(BTreeSet<Pair>, Seen), Expect>;

/// What all slices together say of one endpoint.
#[derive(Clone, Copy)]
struct Known {
    ready: bool,
    /// Serves although it terminates.
    draining: (bool, bool),
    here: bool,
    zone: Option<bool>,
    node: Option<bool>,
}

impl Known {
    fn of(point: &Point, seen_from: Here) -> Self {
        // "A nil value should be interpreted as true" for ready; for serving "the consumer should
        // defer to ready"; for terminating it is false.
        let (ready, serving, terminating) = point.state.unwrap_or((true, true, false));
        let (zone, node) = (point.zone.map(|zone| seen_from.zone == Some(zone)), point.node);
        Self { ready, draining: (serving, terminating), here: point.here(), zone, node }
    }

    /// "Consumers must handle an endpoint that is in several slices": what says that it can be
    /// used counts.
    fn and(self, other: Self) -> Self {
        let hint = |a: Option<bool>, b: Option<bool>| match (a, b) {
            (Some(a), Some(b)) => Some(a || b),
            (one, other) => one.or(other),
        };
        Self {
            ready: self.ready || other.ready,
            draining: (self.draining.0 || other.draining.0, self.draining.1 && other.draining.1),
            here: self.here || other.here,
            zone: hint(self.zone, other.zone),
            node: hint(self.node, other.node),
        }
    }
}

impl World {
    /// The endpoints of a Service's port of this name, each once.
    fn known(&self, service: u8, name: u8) -> BTreeMap<Pair, Known> {
        let mut all = BTreeMap::new();
        let slices = self.slices.values().filter(|s| s.service == service && !s.other_family);
        for slice in slices {
            let Some(number) = slice.ports[usize::from(name)] else { continue };
            for point in &slice.points {
                let known = Known::of(point, self.here);
                all.entry((point.pod, number))
                    .and_modify(|before: &mut Known| *before = before.and(known))
                    .or_insert(known);
            }
        }
        all
    }

    /// Endpoints for traffic that may go anywhere: hints count if every ready endpoint has one and
    /// one is for here, those for nodes before those for zones; without any ready one, those serve
    /// that terminate.
    fn anywhere(&self, service: u8, name: u8) -> BTreeSet<Pair> {
        let known = self.known(service, name);
        let ready: Vec<_> = known.iter().filter(|(_, k)| k.ready).collect();
        if ready.is_empty() {
            return draining(&known, |_| true);
        }
        let decides = |hint: fn(&Known) -> Option<bool>| {
            ready.iter().all(|(_, k)| hint(k).is_some())
                && ready.iter().any(|(_, k)| hint(k) == Some(true))
        };
        let meant: fn(&Known) -> bool = if decides(|k| k.node) {
            |k| k.node == Some(true)
        } else if decides(|k| k.zone) {
            |k| k.zone == Some(true)
        } else {
            |_| true
        };
        ready.into_iter().filter(|(_, k)| meant(k)).map(|(pair, _)| *pair).collect()
    }

    /// Endpoints for traffic that must stay on this node.
    fn here(&self, service: u8, name: u8) -> BTreeSet<Pair> {
        let known = self.known(service, name);
        let ready: BTreeSet<Pair> =
            known.iter().filter(|(_, k)| k.here && k.ready).map(|(pair, _)| *pair).collect();
        if ready.is_empty() { draining(&known, |k| k.here) } else { ready }
    }

    /// Services of this family that this proxy serves.
    fn served(&self) -> impl Iterator<Item = (u8, &Spec)> {
        let all = self.services.iter().map(|(n, spec)| (*n, spec));
        all.filter(|(_, s)| s.kind >= Kind::ClusterIp && s.families != Families::Other)
    }

    /// Who claims an address.
    fn claimants(&self, to: To) -> impl Iterator<Item = (u8, &Spec)> {
        self.served().filter(move |(_, s)| match to {
            To::Cluster(n, _) => s.cluster == n,
            To::Balancer(k, _) => s.kind == Kind::LoadBalancer && !s.proxied && s.claim == k,
            To::External(k, _) => s.external_ip && s.claim == k,
            To::NodePort(k, _) => {
                self.here.usual == Some(true) && s.has_node_ports() && s.claim == k
            }
            To::NodePortElsewhere(k, _) => {
                self.here.usual == Some(false) && s.has_node_ports() && s.claim == k
            }
        })
    }

    /// The oldest Service that claims an address and port, then the first by name; and the name of
    /// its port.
    pub(super) fn owner(&self, to: To) -> Option<(&Spec, u8, u8)> {
        let with_port = self
            .claimants(to)
            .filter_map(|(n, spec)| Some((spec, n, spec.ports[usize::from(to.port())]?)));
        with_port.min_by_key(|(spec, n, _)| (spec.created, *n))
    }

    /// What clients outside meet at a node port if every address of the node has it.
    pub(super) fn at_any_address(&self, to: To) -> Option<Outcome> {
        let to = match to {
            To::NodePortElsewhere(k, p) => To::NodePort(k, p),
            other => other,
        };
        let mut there = self.clone();
        there.here.usual = Some(true);
        there.owner(to).map(|_| there.outcome(From::Client(1), to))
    }

    /// Whether the address, whatever the port, is one of a Service.
    pub(super) fn knows_address(&self, to: To) -> bool {
        self.claimants(to).next().is_some()
    }

    /// What comes of a connection.
    pub(super) fn outcome(&self, from: From, to: To) -> Outcome {
        let Some((spec, service, name)) = self.owner(to) else {
            return Err(match to {
                // The node itself answers for ports of its own that nobody has.
                To::NodePort(..) | To::NodePortElsewhere(..) => Expect::Refused,
                To::Cluster(..) if self.knows_address(to) => Expect::UnusedPort,
                _ if self.ranges.have(to) => Expect::Unclaimed(&[]),
                _ => Expect::PassesBy,
            });
        };
        let inside = !matches!(from, From::Client(_));
        let kept = if matches!(from, From::Pod(_)) { Seen::Client } else { Seen::Node };
        let (anywhere, here) = (self.anywhere(service, name), self.here(service, name));
        // What there is no pod for at all is refused, whatever the policy.
        let none =
            if anywhere.is_empty() && here.is_empty() { Expect::Refused } else { Expect::NoneHere };
        let (endpoints, seen) = match to {
            To::Cluster(..) if spec.internal_local => (here, kept),
            To::Cluster(..) => (anywhere, kept),
            _ if spec.external_local && inside && !anywhere.is_empty() => (anywhere, kept),
            _ if spec.external_local => (here, Seen::Client),
            _ => (anywhere, Seen::Node),
        };
        if endpoints.is_empty() {
            return Err(none);
        }
        let admitted = match spec.ranges {
            Ranges::Anybody => true,
            Ranges::Some => matches!(from, From::Client(1) | From::Pod(3)),
            Ranges::OtherFamily => false,
            Ranges::Odd => matches!(from, From::Client(_)),
        };
        if matches!(to, To::Balancer(..)) && !admitted {
            return Err(Expect::NotAdmitted);
        }
        Ok((endpoints, seen))
    }
}

fn draining(known: &BTreeMap<Pair, Known>, among: fn(&Known) -> bool) -> BTreeSet<Pair> {
    let those = known.iter().filter(|(_, k)| among(k) && k.draining == (true, true));
    those.map(|(pair, _)| *pair).collect()
}

impl To {
    fn port(self) -> u8 {
        match self {
            Self::Cluster(_, p) | Self::Balancer(_, p) | Self::External(_, p) => p,
            Self::NodePort(_, p) | Self::NodePortElsewhere(_, p) => p,
        }
    }
}
