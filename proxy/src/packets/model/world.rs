//! Services and slices as random steps leave them, and as the API has them.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use serde_json::{Value, json};

use super::oddities::{Oddity, Stray, misspelled, text};
use crate::{
    model::{Family, slices::Place},
    packets::{
        backends::{Node, place},
        features::Own,
        fixture::Addresses,
    },
};

/// What Services quarrel about: addresses and node ports have numbers from 0 on.
pub(super) const CLAIMS: u8 = 2;
/// The Services' ports.
pub(super) const PORTS: [u16; 2] = [80, 81];
/// Where claimed addresses and node ports begin.
const CLAIMED: u8 = 50;

/// `spec.type`, and what keeps a Service from being served at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Headless,
    ExternalName,
    OtherProxy,
    ClusterIp,
    NodePort,
    LoadBalancer,
}

/// Of which families a Service or slice is: that of the test, both, or the other one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Families {
    This,
    Both,
    Other,
}

/// `spec.loadBalancerSourceRanges`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ranges {
    Anybody,
    /// The first client and the third pod.
    Some,
    /// Ranges of the other family only.
    OtherFamily,
    /// The clients' network, by an address in it, one of them once more, and what is no range.
    Odd,
}

/// The zones that nodes and hints are of.
pub(super) const ZONES: [&str; 2] = ["zone-a", "zone-b"];

/// What the node's object says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Here {
    /// Whether the address of this family is the usual one or the other; `None` if it has none.
    pub(super) usual: Option<bool>,
    /// Which of [`ZONES`] it is in, if any.
    pub(super) zone: Option<u8>,
}

impl Here {
    /// For a proxy.
    pub(super) fn node(self, family: Family) -> Node {
        let addresses = Addresses(family);
        let of_family =
            self.usual.map(|usual| if usual { addresses.node() } else { addresses.node_other() });
        let others = Addresses(other(family)).node();
        let zone = self.zone.map(|zone| ZONES[usize::from(zone)].to_owned());
        Node {
            addresses: of_family.into_iter().chain([others]).collect(),
            place: Place { zone, ..place() },
        }
    }
}

impl Default for Here {
    fn default() -> Self {
        Self { usual: Some(true), zone: Some(0) }
    }
}

/// A Service.
#[derive(Clone, Debug)]
pub(super) struct Spec {
    pub(super) kind: Kind,
    pub(super) families: Families,
    /// Which cluster address it has.
    pub(super) cluster: u8,
    /// Which of the claimed addresses and node ports it wants.
    pub(super) claim: u8,
    pub(super) created: u8,
    /// The names of [`PORTS`], of those that it has.
    pub(super) ports: [Option<u8>; 2],
    pub(super) external_ip: bool,
    /// `ipMode: Proxy`.
    pub(super) proxied: bool,
    /// `allocateLoadBalancerNodePorts: false`.
    pub(super) unallocated: bool,
    pub(super) internal_local: bool,
    pub(super) external_local: bool,
    /// For how many seconds.
    pub(super) affinity: Option<u32>,
    pub(super) ranges: Ranges,
    /// `healthCheckNodePort`, if any.
    pub(super) health_check: Option<u16>,
    pub(super) publish_not_ready: bool,
    pub(super) oddity: Oddity,
}

/// A slice.
#[derive(Clone, Debug)]
pub(super) struct Slice {
    /// Of which Service.
    pub(super) service: u8,
    pub(super) other_family: bool,
    /// The numbers of named ports.
    pub(super) ports: [Option<u16>; 2],
    /// What is in it too.
    pub(super) stray: Option<Stray>,
    /// Whether its addresses are written in another way.
    pub(super) spelled: bool,
    pub(super) points: Vec<Point>,
}

/// An endpoint in a slice.
#[derive(Clone, Copy, Debug)]
pub(super) struct Point {
    pub(super) pod: u8,
    /// Ready, serving and terminating, unless nothing is said of it.
    pub(super) state: Option<(bool, bool, bool)>,
    /// Whether it is said on which node it is.
    pub(super) placed: bool,
    /// Hints: for which of [`ZONES`].
    pub(super) zone: Option<u8>,
    /// For this node or another one.
    pub(super) node: Option<bool>,
}

/// What a client connects to; the second number is that of the port in [`PORTS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum To {
    Cluster(u8, u8),
    Balancer(u8, u8),
    External(u8, u8),
    NodePort(u8, u8),
    /// The same port at the node's other address.
    NodePortElsewhere(u8, u8),
}

/// Everything there is.
#[derive(Clone, Debug, Default)]
pub(super) struct World {
    pub(super) services: BTreeMap<u8, Spec>,
    pub(super) slices: BTreeMap<u8, Slice>,
    pub(super) ranges: ServiceRanges,
    pub(super) here: Here,
}

/// The ServiceCIDR: ranges of addresses that Services may have, or may have had.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ServiceRanges {
    /// All cluster addresses.
    pub(super) clusters: bool,
    /// The second and the third of them.
    pub(super) some_clusters: bool,
    /// What load balancers and the like may have.
    pub(super) external: bool,
}

impl ServiceRanges {
    /// Whether an address is in one of them.
    pub(super) fn have(self, to: To) -> bool {
        match to {
            To::Cluster(n, _) => self.clusters || self.some_clusters && (2..=3).contains(&n),
            To::Balancer(..) | To::External(..) => self.external,
            To::NodePort(..) | To::NodePortElsewhere(..) => false,
        }
    }

    /// As the API has it.
    pub(super) fn object(self, family: Family) -> Value {
        let ranges = match family {
            Family::V4 => ["10.96.0.0/16", "10.96.0.2/31", "198.51.100.0/24"],
            Family::V6 => ["fd00:96::/108", "fd00:96::2/127", "2001:db8:51::/64"],
        };
        let is_there = [self.clusters, self.some_clusters, self.external];
        let cidrs = ranges.into_iter().zip(is_there).filter(|(_, there)| *there);
        let cidrs: Vec<&str> = cidrs.map(|(range, _)| range).collect();
        json!({"kind": "ServiceCIDR", "metadata": {"name": "kubernetes"}, "spec": {"cidrs": cidrs}})
    }
}

impl World {
    /// As the API has it.
    pub(super) fn objects(&self, family: Family) -> Vec<Value> {
        let services = self.services.iter().map(|(n, spec)| spec.object(*n, family));
        let slices = self.slices.iter().map(|(id, slice)| slice.object(*id, family));
        services.chain(slices).chain([self.ranges.object(family)]).collect()
    }
}

impl To {
    /// Whether it is a node port.
    pub(super) fn is_node_port(self) -> bool {
        matches!(self, Self::NodePort(..) | Self::NodePortElsewhere(..))
    }

    /// All there are, with these many cluster addresses.
    pub(super) fn all(clusters: u8) -> impl Iterator<Item = Self> {
        (0..2).flat_map(move |port| {
            let cluster = (1..=clusters).map(move |n| Self::Cluster(n, port));
            cluster.chain((0..CLAIMS).flat_map(move |k| {
                let node_ports = [Self::NodePort(k, port), Self::NodePortElsewhere(k, port)];
                [Self::Balancer(k, port), Self::External(k, port)].into_iter().chain(node_ports)
            }))
        })
    }

    /// Its address and port.
    pub(super) fn socket(self, addresses: Addresses) -> SocketAddr {
        let own = |n| Own { addresses, n };
        let port = |port: u8| PORTS[usize::from(port)];
        match self {
            Self::Cluster(n, p) => (own(n).cluster(), port(p)).into(),
            Self::Balancer(k, p) => (own(CLAIMED + k).balancer(), port(p)).into(),
            Self::External(k, p) => (own(CLAIMED + k).external(), port(p)).into(),
            Self::NodePort(k, p) => (addresses.node(), node_port(k, p)).into(),
            Self::NodePortElsewhere(k, p) => (addresses.node_other(), node_port(k, p)).into(),
        }
    }
}

fn node_port(claim: u8, port: u8) -> u16 {
    30_000 + u16::from(CLAIMED + claim + 10 * port)
}

/// The other family.
pub(super) fn other(family: Family) -> Family {
    if family == Family::V4 { Family::V6 } else { Family::V4 }
}

fn name_of(protocol: &str, name: u8) -> String {
    format!("{}{name}", protocol.to_lowercase())
}

impl Spec {
    /// A Service with a cluster address and a node port.
    pub(super) const PLAIN: Self = Self {
        kind: Kind::NodePort,
        families: Families::This,
        cluster: 1,
        claim: 0,
        created: 0,
        ports: [Some(0), None],
        external_ip: false,
        proxied: false,
        unallocated: false,
        internal_local: false,
        external_local: false,
        affinity: None,
        ranges: Ranges::Anybody,
        health_check: None,
        publish_not_ready: false,
        oddity: Oddity::None,
    };

    /// As the API has it.
    pub(super) fn object(&self, n: u8, family: Family) -> Value {
        let (this, others) = (Addresses(family), Addresses(other(family)));
        let claimed = Own { addresses: this, n: CLAIMED + self.claim };
        let cluster = |addresses| Own { addresses, n: self.cluster }.cluster();
        let mut addresses: Vec<IpAddr> = match self.families {
            Families::This => vec![cluster(this)],
            Families::Both => vec![cluster(this), cluster(others)],
            Families::Other => vec![cluster(others)],
        };
        let mut families: Vec<Family> = addresses.iter().map(|a| Family::of(*a)).collect();
        match self.oddity {
            Oddity::FamiliesLie => families.iter_mut().for_each(|family| *family = other(*family)),
            Oddity::SecondAddress => {
                let second = |a: &IpAddr| {
                    Own { addresses: Addresses(Family::of(*a)), n: self.cluster % 3 + 1 }.cluster()
                };
                let second: Vec<IpAddr> = addresses.iter().map(second).collect();
                addresses.extend(second);
            }
            _ => {}
        }
        let families: Vec<&str> = families.iter().map(|family| family.as_str()).collect();
        let spelled = self.oddity == Oddity::Spelled;
        let addresses: Vec<String> = addresses.into_iter().map(|a| text(a, spelled)).collect();
        let policy = |local| if local { "Local" } else { "Cluster" };
        let mut spec = json!({"type": self.kind.as_str(), "ports": self.ports(),
            "internalTrafficPolicy": policy(self.internal_local),
            "externalTrafficPolicy": policy(self.external_local),
            "publishNotReadyAddresses": self.publish_not_ready});
        match self.kind {
            Kind::Headless => {
                spec["clusterIP"] = "None".into();
                spec["clusterIPs"] = json!(["None"]);
            }
            Kind::ExternalName => spec["externalName"] = "db.example.com".into(),
            _ => {
                spec["clusterIP"] = json!(addresses[0]);
                spec["clusterIPs"] = json!(addresses);
                spec["ipFamilies"] = json!(families);
            }
        }
        if let Some(seconds) = self.affinity {
            spec["sessionAffinity"] = "ClientIP".into();
            spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": seconds}});
        }
        if let Some(port) = self.health_check {
            spec["healthCheckNodePort"] = port.into();
        }
        if self.external_ip {
            spec["externalIPs"] = json!([text(claimed.external(), spelled)]);
        }
        let mut ingress = vec![json!({"ip": text(claimed.balancer(), spelled),
            "ipMode": if self.proxied { "Proxy" } else { "VIP" }})];
        if self.oddity == Oddity::BadAddresses {
            let bad = [this.loopback().to_string(), misspelled(this.external(1)), "x".to_owned()];
            let listed = spec["externalIPs"].as_array().cloned().unwrap_or_default();
            spec["externalIPs"] = bad.iter().map(|text| json!(text)).chain(listed).collect();
            ingress.extend(bad.map(|text| json!({"ip": text})));
        }
        let admitted = match self.ranges {
            Ranges::Anybody => vec![],
            Ranges::Some => [this.client(1), this.pod(3)].map(|a| this.only(a)).into(),
            Ranges::OtherFamily => vec![others.only(others.client(1))],
            Ranges::Odd => {
                let host = this.client(1);
                let (all, v4) = (if host.is_ipv4() { "/24" } else { "/64" }, "010.0.0.0/8");
                vec![format!(" {host}{all} "), "x".to_owned(), v4.to_owned(), this.only(host)]
            }
        };
        spec["loadBalancerSourceRanges"] = json!(admitted);
        spec["allocateLoadBalancerNodePorts"] = (!self.unallocated).into();
        let mut object = json!({"kind": "Service", "metadata": {"name": n.to_string(),
                "namespace": "d", "creationTimestamp": format!("2026-01-01T00:00:0{}Z", self.created)},
            "spec": spec, "status": {"loadBalancer":
                {"ingress": ingress}}});
        if self.kind == Kind::OtherProxy {
            object["metadata"]["labels"] =
                json!({"service.kubernetes.io/service-proxy-name": "other"});
        }
        object
    }

    fn ports(&self) -> Vec<Value> {
        let has = |port: usize| self.ports[port].map(|name| (port, name));
        let ports = [0, 1].into_iter().filter_map(has);
        let each = ports.flat_map(|(port, name)| ["TCP", "UDP"].map(|p| (port, name, p)));
        let each = each.map(|(port, name, protocol)| {
            let mut object = json!({"name": name_of(protocol, name), "port": PORTS[port],
                "protocol": protocol});
            if self.has_node_ports() {
                let port = u8::try_from(port).unwrap();
                object["nodePort"] = node_port(self.claim, port).into();
            }
            object
        });
        let mut ports: Vec<Value> = each.collect();
        match self.oddity {
            Oddity::TwinPorts => {
                let twins: Vec<Value> = ports
                    .iter()
                    .map(|port| {
                        let name = format!("{}-again", port["name"].as_str().unwrap());
                        json!({"name": name, "port": port["port"], "protocol": port["protocol"],
                        "nodePort": 30_200})
                    })
                    .collect();
                ports.extend(twins);
            }
            Oddity::BadPorts => ports
                .splice(
                    0..0,
                    [
                        json!({"name": "zero", "port": 0}),
                        json!({"name": "odd", "port": PORTS[0], "protocol": "ICMP"}),
                    ],
                )
                .for_each(drop),
            _ => {}
        }
        ports
    }

    /// Whether it has node ports.
    pub(super) fn has_node_ports(&self) -> bool {
        self.kind == Kind::NodePort || self.kind == Kind::LoadBalancer && !self.unallocated
    }
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Headless | Self::OtherProxy | Self::ClusterIp => "ClusterIP",
            Self::ExternalName => "ExternalName",
            Self::NodePort => "NodePort",
            Self::LoadBalancer => "LoadBalancer",
        }
    }
}

impl Slice {
    /// Ready endpoints of the first Service.
    pub(super) fn plain(pods: &[u8]) -> Self {
        let point =
            |pod: &u8| Point { pod: *pod, state: None, placed: true, zone: None, node: None };
        Self {
            service: 1,
            other_family: false,
            ports: [Some(8080), None],
            stray: None,
            spelled: false,
            points: pods.iter().map(point).collect(),
        }
    }

    /// As the API has it.
    pub(super) fn object(&self, id: u8, family: Family) -> Value {
        let family = if self.other_family { other(family) } else { family };
        let addresses = Addresses(family);
        let mut endpoints: Vec<Value> =
            self.points.iter().map(|point| point.object(addresses, self.spelled)).collect();
        if let Some(stray) = self.stray {
            // One that nothing else is said of is ready.
            endpoints.push(json!({"addresses": [stray.text(family)]}));
        }
        let has = |name: u8| self.ports[usize::from(name)].map(|number| (name, number));
        let ports = [0, 1].into_iter().filter_map(has);
        let ports: Vec<Value> = ports
            .flat_map(|(name, number)| ["TCP", "UDP"].map(|p| (name_of(p, name), number, p)))
            .map(|(name, number, p)| json!({"name": name, "port": number, "protocol": p}))
            .collect();
        json!({"kind": "EndpointSlice", "addressType": family.as_str(),
            "endpoints": endpoints, "ports": ports,
            "metadata": {"name": Self::name(id), "namespace": "d",
                "labels": {"kubernetes.io/service-name": self.service.to_string()}}})
    }

    /// Its name.
    pub(super) fn name(id: u8) -> String {
        format!("slice-{id}")
    }
}

impl Point {
    /// Whether it is known to be on this node.
    pub(super) fn here(&self) -> bool {
        self.placed && self.pod % 2 == 1
    }

    fn object(&self, addresses: Addresses, spelled: bool) -> Value {
        let mut endpoint = json!({"addresses": [text(addresses.pod(self.pod), spelled)]});
        if let Some((ready, serving, terminating)) = self.state {
            endpoint["conditions"] =
                json!({"ready": ready, "serving": serving, "terminating": terminating});
        }
        if self.placed {
            endpoint["nodeName"] = if self.pod % 2 == 1 { "here" } else { "there" }.into();
        }
        if let Some(zone) = self.zone {
            endpoint["hints"]["forZones"] = json!([{"name": ZONES[usize::from(zone)]}]);
        }
        if let Some(ours) = self.node {
            endpoint["hints"]["forNodes"] = json!([{"name": if ours { "here" } else { "there" }}]);
        }
        endpoint
    }
}
