//! The table of features.
//!
//! Rows speak of what Kubernetes documents. Where a backend documents something else, it stands in
//! [`Expect::for_backend`], or with the question itself if it is about that one alone.
//!
//! What a Service can be, and where it is proved for each backend and family:
//!
//! | feature | rows, or another test |
//! |---|---|
//! | ClusterIP; unused ports of service addresses | [`addresses`] |
//! | addresses of the Services' ranges that no Service has | [`addresses`] |
//! | headless, ExternalName, another proxy's | [`addresses`] |
//! | NodePort, `nodePortAddresses`, node ports on loopback | [`addresses`] |
//! | loopback is kept from outside (CVE-2020-8558) | `rejects_test` |
//! | LoadBalancer: `ipMode` VIP and Proxy, `allocateLoadBalancerNodePorts` | [`addresses`] |
//! | external addresses | [`addresses`] |
//! | no endpoints: refused; how it is told | [`addresses`]; `rejects_test` |
//! | TCP, UDP, IPv4, IPv6 | every row |
//! | dual stack | `whole_test` |
//! | session affinity: holds, expires, changes | `changes_test` |
//! | even choice | `changes_test` |
//! | `internalTrafficPolicy`, `externalTrafficPolicy` | [`policies`] |
//! | health-check node ports | `whole_test` |
//! | `loadBalancerSourceRanges` | [`policies`] |
//! | terminating and serving endpoints, `publishNotReadyAddresses` | [`endpoints`] |
//! | `trafficDistribution`, topology hints | [`endpoints`] |
//! | hairpin | [`endpoints`] |
//! | endpoints on the node itself | [`endpoints`] |
//! | named ports, many slices, duplicates | [`endpoints`] |
//! | masquerade by ranges, bridge, prefix of interfaces, `masqueradeAll` | [`sources`] |
//! | masquerade by the node's own range | `whole_test` |
//! | two Services that claim one address or node port | `changes_test` |
//! | flows of UDP follow, connections stay, restarts write nothing | `changes_test` |
//! | everything at once, in random order | `model` |

mod addresses;
mod endpoints;
mod policies;
mod sources;

use std::net::SocketAddr;

use serde_json::{Value, json};

use super::{
    features::{Expect, Feature, Own, Part, Question, pod},
    fixture::From,
};
use crate::{Mode, ProxyConfig, model::Family};

const OUTSIDE: From = From::Client(1);
const STRANGER: From = From::Client(2);
const POD: From = From::Pod(3);
const NODE: From = From::Node;

fn usual(_: &mut ProxyConfig) {}

fn cluster(own: Own) -> SocketAddr {
    SocketAddr::new(own.cluster(), 80)
}

fn external(own: Own) -> SocketAddr {
    SocketAddr::new(own.external(), 80)
}

fn balancer(own: Own) -> SocketAddr {
    SocketAddr::new(own.balancer(), 80)
}

fn node_port(own: Own) -> SocketAddr {
    SocketAddr::new(own.addresses.node(), own.node_port())
}

fn node_port_elsewhere(own: Own) -> SocketAddr {
    SocketAddr::new(own.addresses.node_other(), own.node_port())
}

/// The same question from several.
fn ask(from: &[From], to: fn(Own) -> SocketAddr, expect: Expect) -> Vec<Question> {
    let question = |from: &From| Question { from: *from, to, expect, but: |_, _| None };
    from.iter().map(question).collect()
}

fn feature(
    says: &'static str,
    service: fn(Own) -> Value,
    slices: Vec<Part>,
    questions: impl IntoIterator<Item = Vec<Question>>,
) -> Feature {
    let questions = questions.into_iter().flatten().collect();
    Feature { says, config: usual, service, slices, ranges: |_| Vec::new(), questions }
}

impl Feature {
    fn with(mut self, config: fn(&mut ProxyConfig)) -> Self {
        self.config = config;
        self
    }

    fn with_ranges(mut self, ranges: fn(Own) -> Vec<String>) -> Self {
        self.ranges = ranges;
        self
    }

    /// What a backend documents otherwise, for all questions of this row.
    fn but(mut self, but: fn(Mode, Family) -> Option<Expect>) -> Self {
        for question in &mut self.questions {
            question.but = but;
        }
        self
    }
}

fn plain(_: Own) -> Value {
    json!({})
}

fn on_node_ports(_: Own) -> Value {
    json!({"spec": {"type": "NodePort"}})
}

fn balanced(own: Own) -> Value {
    json!({"spec": {"type": "LoadBalancer"},
        "status": {"loadBalancer": {"ingress": [{"ip": own.balancer()}]}}})
}

fn external_local(own: Own) -> Value {
    json!({"spec": {"type": "LoadBalancer", "externalTrafficPolicy": "Local",
            "externalIPs": [own.external()]},
        "status": {"loadBalancer": {"ingress": [{"ip": own.balancer(), "ipMode": "VIP"}]}}})
}

fn internal_local(_: Own) -> Value {
    json!({"spec": {"internalTrafficPolicy": "Local"}})
}

const BOTH: &[u8] = &[1, 2];

/// One endpoint here and one elsewhere.
fn two() -> Vec<Part> {
    vec![Part(8080, vec![pod(1), pod(2)])]
}

/// No endpoint here.
fn elsewhere() -> Vec<Part> {
    vec![Part(8080, vec![pod(2), pod(4)])]
}

/// Every row.
pub(super) fn table() -> Vec<Feature> {
    [addresses::rows(), policies::rows(), endpoints::rows(), sources::rows()]
        .into_iter()
        .flatten()
        .collect()
}
