//! What a row of the table of features says: a Service, what is behind it, who asks, and what
//! comes of it.

use std::net::{IpAddr, SocketAddr};

use serde_json::{Value, json};

use super::fixture::{Addresses, From, ON_NODE};
use crate::{
    Mode, ProxyConfig,
    model::{Family, Protocol},
};

/// What comes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expect {
    /// Each of these endpoints answers now and then, and nobody else; and this is whom they see.
    By(&'static [u8], Seen),
    /// There is no endpoint: refused at once.
    Refused,
    /// There are endpoints, but none here, where the policy wants them.
    NoneHere,
    /// The client is not in the source ranges.
    NotAdmitted,
    /// The address is a Service's, the port isn't.
    UnusedPort,
    /// The address is in the Services' ranges and no Service has it, though this pod may.
    Unclaimed(&'static [u8]),
    /// Nobody serves it: the packet goes its way as if there were no proxy, and is never answered.
    PassesBy,
    /// It came and went without an answer.
    Closed,
    /// No answer.
    Silence,
}

/// Whose address an endpoint sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// The client's own.
    Client,
    /// One of the node's.
    Node,
}

use Expect::*;
use Seen::{Client, Node};

impl Expect {
    /// What it is with this backend, as its documents say.
    pub(super) fn for_backend(self, mode: Mode, protocol: Protocol) -> Self {
        match (self, mode) {
            (PassesBy, _) => Silence,
            (Unclaimed(_), Mode::Nftables) => Silence,
            // As with kube-proxy, ranges are not known there.
            (Unclaimed(pods), _) => By(pods, Client),
            // There are no relays for it, and the address is the node's own.
            (_, Mode::Userspace) if protocol == Protocol::Sctp => Refused,
            // Relays connect by themselves: the client's address is lost.
            (By(endpoints, Client), Mode::Userspace) => By(endpoints, Node),
            // They can't drop: what is not listened on is refused.
            (NoneHere, Mode::Userspace) => Refused,
            // A connection is there before its source can be looked at; a datagram isn't answered.
            (NotAdmitted, Mode::Userspace) if protocol == Protocol::Tcp => Closed,
            // As with kube-proxy, only addresses and ports are known there.
            (UnusedPort, Mode::Iptables) => Silence,
            (UnusedPort, _) => Refused,
            (NoneHere | NotAdmitted, _) => Silence,
            (other, _) => other,
        }
    }
}

/// One endpoint, as a slice tells of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pod {
    n: u8,
    state: (bool, bool, bool),
    zones: &'static [&'static str],
    nodes: &'static [&'static str],
}

/// A ready endpoint: on this node if its number is odd.
pub(super) const fn pod(n: u8) -> Pod {
    Pod { n, state: (true, true, false), zones: &[], nodes: &[] }
}

impl Pod {
    /// Its number.
    pub(super) fn number(self) -> u8 {
        self.n
    }

    pub(super) const fn starting(mut self) -> Self {
        self.state = (false, false, false);
        self
    }

    pub(super) const fn draining(mut self) -> Self {
        self.state = (false, true, true);
        self
    }

    pub(super) const fn gone(mut self) -> Self {
        self.state = (false, false, true);
        self
    }

    /// Ready while it terminates, as with `publishNotReadyAddresses`.
    pub(super) const fn published(mut self) -> Self {
        self.state = (true, true, true);
        self
    }

    pub(super) const fn for_zones(mut self, zones: &'static [&'static str]) -> Self {
        self.zones = zones;
        self
    }

    pub(super) const fn for_nodes(mut self, nodes: &'static [&'static str]) -> Self {
        self.nodes = nodes;
        self
    }

    fn json(self, addresses: Addresses) -> Value {
        let address = if self.n == ON_NODE { addresses.node() } else { addresses.pod(self.n) };
        let here = self.n % 2 == 1 || self.n == ON_NODE;
        let names = |names: &[&str]| names.iter().map(|n| json!({"name": n})).collect::<Vec<_>>();
        let (ready, serving, terminating) = self.state;
        let mut endpoint = json!({
            "addresses": [address], "nodeName": if here { "here" } else { "there" },
            "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
        });
        if !(self.zones.is_empty() && self.nodes.is_empty()) {
            endpoint["hints"] =
                json!({"forZones": names(self.zones), "forNodes": names(self.nodes)});
        }
        endpoint
    }
}

/// A slice: the port of its endpoints, and these.
#[derive(Clone, Debug)]
pub(super) struct Part(pub(super) u16, pub(super) Vec<Pod>);

/// A Service's own names, so that no row meets another one's leftovers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Own {
    pub(super) addresses: Addresses,
    pub(super) n: u8,
}

impl Own {
    pub(super) fn cluster(self) -> IpAddr {
        self.addresses.cluster(self.n)
    }

    pub(super) fn external(self) -> IpAddr {
        self.addresses.external(self.n)
    }

    pub(super) fn balancer(self) -> IpAddr {
        self.addresses.external(100 + self.n)
    }

    pub(super) fn node_port(self) -> u16 {
        30_000 + u16::from(self.n)
    }

    /// The whole Service, from what a row says of it.
    pub(super) fn service(self, row: Value) -> Value {
        let mut object = row;
        object["kind"] = "Service".into();
        object["metadata"]["name"] = self.n.to_string().into();
        object["metadata"]["namespace"] = "d".into();
        let spec = &mut object["spec"];
        if spec["clusterIP"].is_null() {
            spec["clusterIP"] = json!(self.cluster());
        }
        if spec["ports"].is_null() {
            let mut ports = json!([
                {"name": "t", "port": 80, "protocol": "TCP"},
                {"name": "u", "port": 80, "protocol": "UDP"},
                {"name": "s", "port": 80, "protocol": "SCTP"},
            ]);
            if spec["type"] == "NodePort"
                || spec["type"] == "LoadBalancer" && spec["allocateLoadBalancerNodePorts"] != false
            {
                for port in ports.as_array_mut().unwrap() {
                    port["nodePort"] = self.node_port().into();
                }
            }
            spec["ports"] = ports;
        }
        object
    }

    /// A ServiceCIDR of its own.
    pub(super) fn ranges(self, ranges: &[String]) -> Value {
        json!({"kind": "ServiceCIDR", "metadata": {"name": self.n.to_string()},
            "spec": {"cidrs": ranges}})
    }

    /// One of its slices.
    pub(super) fn slice(self, part: usize, Part(port, pods): &Part) -> Value {
        let endpoints: Vec<Value> = pods.iter().map(|pod| pod.json(self.addresses)).collect();
        json!({
            "kind": "EndpointSlice", "addressType": self.addresses.0.as_str(),
            "endpoints": endpoints,
            "metadata": {"name": format!("{}-{part}", self.n), "namespace": "d",
                "labels": {"kubernetes.io/service-name": self.n.to_string()}},
            "ports": [{"name": "t", "port": port, "protocol": "TCP"},
                {"name": "u", "port": port, "protocol": "UDP"},
                {"name": "s", "port": port, "protocol": "SCTP"}],
        })
    }
}

/// A question and its answer.
pub(super) struct Question {
    pub(super) from: From,
    pub(super) to: fn(Own) -> SocketAddr,
    pub(super) expect: Expect,
    /// Where a backend documents another answer to just this.
    pub(super) but: fn(Mode, Family) -> Option<Expect>,
}

/// A row.
pub(super) struct Feature {
    /// The sentence of the documentation that it proves.
    pub(super) says: &'static str,
    pub(super) config: fn(&mut ProxyConfig),
    pub(super) service: fn(Own) -> Value,
    pub(super) slices: Vec<Part>,
    /// Ranges that cluster addresses are taken from.
    pub(super) ranges: fn(Own) -> Vec<String>,
    pub(super) questions: Vec<Question>,
}
