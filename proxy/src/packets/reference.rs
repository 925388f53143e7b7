//! What Services mean, slow and obvious: written from Kubernetes' documentation and not from the
//! proxy's own model.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::{
    features::{Expect, Own, Seen},
    fixture::From,
};

/// A Service.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spec {
    /// Which of the claimed addresses and node ports it wants.
    pub(super) claim: u8,
    pub(super) created: u8,
    pub(super) kind: Kind,
    pub(super) external_ip: bool,
    pub(super) internal_local: bool,
    pub(super) external_local: bool,
    pub(super) affinity: bool,
    /// Admits the first client and the third pod to its load balancer's address.
    pub(super) ranges: bool,
}

/// `spec.type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    ClusterIp,
    NodePort,
    LoadBalancer,
}

/// An endpoint in a slice.
#[derive(Clone, Copy, Debug)]
pub(super) struct Point {
    pub(super) pod: u8,
    pub(super) ready: bool,
    pub(super) serving: bool,
    pub(super) terminating: bool,
    /// For this zone, for another one, or for any.
    pub(super) zone: Option<bool>,
}

/// What a client connects to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum To {
    Cluster(u8),
    Balancer(u8),
    External(u8),
    NodePort(u8),
}

/// Everything there is.
#[derive(Debug, Default)]
pub(super) struct World {
    pub(super) services: BTreeMap<u8, Spec>,
    pub(super) slices: BTreeMap<(u8, u8), Vec<Point>>,
}

/// One of these pods, which sees this; or something else.
pub(super) type Outcome = Result<(BTreeSet<u8>, Seen), Expect>;

impl World {
    /// A Service's endpoints, each once. What any slice says for one counts.
    fn points(&self, n: u8) -> Vec<Point> {
        let mut all: BTreeMap<u8, Point> = BTreeMap::new();
        for (_, points) in self.slices.iter().filter(|((service, _), _)| *service == n) {
            for point in points {
                let known = all.entry(point.pod).or_insert(*point);
                known.ready |= point.ready;
                known.serving |= point.serving;
                known.terminating &= point.terminating;
                known.zone = match (known.zone, point.zone) {
                    (Some(true), _) | (_, Some(true)) => Some(true),
                    (Some(false), _) | (_, Some(false)) => Some(false),
                    (None, None) => None,
                };
            }
        }
        all.into_values().collect()
    }

    /// Endpoints for traffic that may go anywhere: hints count if every ready endpoint has one and
    /// one is for here; without any ready one, those serve that terminate.
    fn anywhere(&self, n: u8) -> BTreeSet<u8> {
        let points = self.points(n);
        let ready: Vec<&Point> = points.iter().filter(|p| p.ready).collect();
        let by_zone =
            ready.iter().all(|p| p.zone.is_some()) && ready.iter().any(|p| p.zone == Some(true));
        if ready.is_empty() {
            return points.iter().filter(|p| p.serving && p.terminating).map(|p| p.pod).collect();
        }
        ready.iter().filter(|p| !by_zone || p.zone == Some(true)).map(|p| p.pod).collect()
    }

    /// Endpoints for traffic that must stay on this node.
    fn here(&self, n: u8) -> BTreeSet<u8> {
        let points = self.points(n);
        let local: Vec<&Point> = points.iter().filter(|p| p.pod % 2 == 1).collect();
        let ready: BTreeSet<u8> = local.iter().filter(|p| p.ready).map(|p| p.pod).collect();
        if !ready.is_empty() {
            return ready;
        }
        local.iter().filter(|p| p.serving && p.terminating).map(|p| p.pod).collect()
    }

    /// The oldest Service for which this holds, then the first by name.
    fn owner(&self, wants: impl Fn(&Spec) -> bool) -> Option<u8> {
        let all = self.services.iter().filter(|(_, spec)| wants(spec));
        all.min_by_key(|(n, spec)| (spec.created, **n)).map(|(n, _)| *n)
    }

    /// What comes of a connection.
    pub(super) fn outcome(&self, from: From, to: To) -> Outcome {
        let found = match to {
            To::Cluster(n) | To::Balancer(n) => self.services.get(&n).map(|_| n),
            To::External(k) => self.owner(|s| s.external_ip && s.claim == k),
            To::NodePort(k) => self.owner(|s| s.kind >= Kind::NodePort && s.claim == k),
        };
        let Some(n) = found else {
            // The node itself answers for ports of its own that nobody has.
            let on_node = matches!(to, To::NodePort(_));
            return Err(if on_node { Expect::Refused } else { Expect::PassesBy });
        };
        let spec = &self.services[&n];
        if matches!(to, To::Balancer(_)) && spec.kind != Kind::LoadBalancer {
            return Err(Expect::PassesBy);
        }
        let inside = !matches!(from, From::Client(_));
        let kept = if matches!(from, From::Pod(_)) { Seen::Client } else { Seen::Node };
        let (anywhere, here) = (self.anywhere(n), self.here(n));
        // What there is no pod for at all is refused, whatever the policy.
        let none =
            if anywhere.is_empty() && here.is_empty() { Expect::Refused } else { Expect::NoneHere };
        let (endpoints, seen) = match to {
            To::Cluster(_) if spec.internal_local => (here, kept),
            To::Cluster(_) => (anywhere, kept),
            // An external address on a Service that is only for inside has a policy too.
            _ if spec.external_local && inside && !anywhere.is_empty() => (anywhere, kept),
            _ if spec.external_local => (here, Seen::Client),
            _ => (anywhere, Seen::Node),
        };
        if endpoints.is_empty() {
            return Err(none);
        }
        if matches!(to, To::Balancer(_))
            && spec.ranges
            && !matches!(from, From::Client(1) | From::Pod(3))
        {
            return Err(Expect::NotAdmitted);
        }
        Ok((endpoints, seen))
    }
}

impl To {
    /// Its address and port.
    pub(super) fn socket(self, own: impl Fn(u8) -> Own) -> std::net::SocketAddr {
        let node = own(1).addresses.node();
        match self {
            Self::Cluster(n) => (own(n).cluster(), 80).into(),
            Self::Balancer(n) => (own(n).balancer(), 80).into(),
            Self::External(k) => (own(50 + k).external(), 80).into(),
            Self::NodePort(k) => (node, own(50 + k).node_port()).into(),
        }
    }
}

impl Spec {
    /// As the API has it.
    pub(super) fn object(self, own: Own) -> Value {
        let claimed = Own { n: 50 + self.claim, ..own };
        let policy = |local| if local { "Local" } else { "Cluster" };
        let mut ports = json!([
            {"name": "t", "port": 80, "protocol": "TCP"},
            {"name": "u", "port": 80, "protocol": "UDP"},
        ]);
        if self.kind >= Kind::NodePort {
            for port in ports.as_array_mut().unwrap() {
                port["nodePort"] = claimed.node_port().into();
            }
        }
        let kind = match self.kind {
            Kind::ClusterIp => "ClusterIP",
            Kind::NodePort => "NodePort",
            Kind::LoadBalancer => "LoadBalancer",
        };
        let mut spec = json!({"type": kind, "ports": ports,
            "sessionAffinity": if self.affinity { "ClientIP" } else { "None" },
            "internalTrafficPolicy": policy(self.internal_local),
            "externalTrafficPolicy": policy(self.external_local)});
        if self.external_ip {
            spec["externalIPs"] = json!([claimed.external()]);
        }
        if self.ranges {
            let admitted = [own.addresses.client(1), own.addresses.pod(3)];
            spec["loadBalancerSourceRanges"] = json!(admitted.map(|a| own.addresses.only(a)));
        }
        own.service(json!({
            "metadata": {"creationTimestamp": format!("2026-01-01T00:00:0{}Z", self.created)},
            "spec": spec, "status": {"loadBalancer": {"ingress": [{"ip": own.balancer()}]}},
        }))
    }
}

/// A slice as the API has it.
pub(super) fn slice(own: Own, part: u8, points: &[Point]) -> Value {
    let endpoints: Vec<Value> = points
        .iter()
        .map(|point| {
            let mut endpoint = json!({
                "addresses": [own.addresses.pod(point.pod)],
                "nodeName": if point.pod % 2 == 1 { "here" } else { "there" },
                "conditions": {"ready": point.ready, "serving": point.serving,
                    "terminating": point.terminating}});
            if let Some(ours) = point.zone {
                let zone = if ours { "zone-a" } else { "zone-b" };
                endpoint["hints"] = json!({"forZones": [{"name": zone}]});
            }
            endpoint
        })
        .collect();
    json!({"kind": "EndpointSlice", "addressType": own.addresses.0.as_str(),
        "endpoints": endpoints,
        "metadata": {"name": format!("{}-{part}", own.n), "namespace": "d",
            "labels": {"kubernetes.io/service-name": own.n.to_string()}},
        "ports": [{"name": "t", "port": 8080, "protocol": "TCP"},
            {"name": "u", "port": 8080, "protocol": "UDP"}]})
}
