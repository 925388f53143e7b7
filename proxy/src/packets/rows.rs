//! The table of features.
//!
//! Rows speak of what Kubernetes documents. Where a backend documents something else, it stands in
//! [`Expect::for_backend`], or with the question itself if it is about that one alone.

use std::net::SocketAddr;

use serde_json::{Value, json};

use super::{
    features::{
        Expect::{self, By, NoneHere, NotAdmitted, PassesBy, Refused, UnusedPort},
        Feature, Own, Part, Question,
        Seen::{Client, Node},
        pod,
    },
    fixture::{From, ON_NODE},
};
use crate::{DetectLocal, Mode, NodePortAddresses, ProxyConfig, model::Family};

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
    Feature { says, config: usual, service, slices, questions }
}

impl Feature {
    fn with(mut self, config: fn(&mut ProxyConfig)) -> Self {
        self.config = config;
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
    [addresses(), policies(), endpoints(), sources()].into_iter().flatten().collect()
}

fn addresses() -> Vec<Feature> {
    vec![
        feature(
            "a cluster address leads to each endpoint; pods keep their address, others don't",
            plain,
            two(),
            [
                ask(&[OUTSIDE, NODE], cluster, By(BOTH, Node)),
                ask(&[POD], cluster, By(BOTH, Client)),
                ask(&[OUTSIDE, NODE, POD], |own| (own.cluster(), 81).into(), UnusedPort),
            ],
        ),
        feature(
            "a node port leads to each endpoint and hides the client",
            on_node_ports,
            two(),
            [
                ask(&[OUTSIDE, NODE, POD], node_port, By(BOTH, Node)),
                ask(&[POD], cluster, By(BOTH, Client)),
                ask(
                    &[OUTSIDE],
                    |own| (own.addresses.node(), own.node_port() + 1000).into(),
                    Refused,
                ),
            ],
        ),
        feature(
            "node ports are on the node's primary addresses only, if so configured",
            on_node_ports,
            two(),
            [
                ask(&[OUTSIDE, NODE, POD], node_port, By(BOTH, Node)),
                ask(&[OUTSIDE, NODE, POD], node_port_elsewhere, Refused),
            ],
        )
        .with(|config| config.node_port_addresses = NodePortAddresses::Primary),
        feature(
            "node ports are on the addresses in nodePortAddresses only",
            on_node_ports,
            two(),
            [
                ask(&[OUTSIDE, NODE, POD], node_port_elsewhere, By(BOTH, Node)),
                ask(&[OUTSIDE, NODE, POD], node_port, Refused),
            ],
        )
        .with(|config| {
            let ranges = ["203.0.113.0/24", "2001:db8:113::/64"];
            config.node_port_addresses =
                NodePortAddresses::Ranges(ranges.map(|r| r.parse().unwrap()).into());
        }),
        feature(
            "external addresses lead to each endpoint and hide the client",
            |own| json!({"spec": {"externalIPs": [own.external()]}}),
            two(),
            [ask(&[OUTSIDE, NODE, POD], external, By(BOTH, Node))],
        ),
        feature(
            "load balancers' addresses lead to each endpoint and hide the client; node ports serve too",
            balanced,
            two(),
            [
                ask(&[OUTSIDE, NODE, POD], balancer, By(BOTH, Node)),
                ask(&[OUTSIDE, NODE, POD], node_port, By(BOTH, Node)),
            ],
        ),
        feature(
            "an address of ipMode Proxy is the load balancer's own affair",
            |own| {
                json!({"spec": {"type": "LoadBalancer"}, "status": {"loadBalancer":
                    {"ingress": [{"ip": own.balancer(), "ipMode": "Proxy"}]}}})
            },
            two(),
            [
                ask(&[OUTSIDE, NODE, POD], balancer, PassesBy),
                ask(&[OUTSIDE], node_port, By(BOTH, Node)),
            ],
        ),
        feature(
            "without node ports a load balancer's address serves all the same",
            |own| {
                json!({"spec": {"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false},
                    "status": {"loadBalancer": {"ingress": [{"ip": own.balancer()}]}}})
            },
            two(),
            [
                ask(&[OUTSIDE, POD], balancer, By(BOTH, Node)),
                ask(&[OUTSIDE, NODE], node_port, Refused),
            ],
        ),
        feature(
            "a Service of another proxy is left to it",
            |_| json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": "other"}}}),
            two(),
            [ask(&[OUTSIDE, NODE, POD], cluster, PassesBy)],
        ),
        feature(
            "without endpoints every address refuses at once",
            |own| {
                json!({"spec": {"type": "LoadBalancer", "externalIPs": [own.external()]},
                    "status": {"loadBalancer": {"ingress": [{"ip": own.balancer()}]}}})
            },
            vec![],
            [cluster, external, balancer, node_port]
                .map(|to| ask(&[OUTSIDE, NODE, POD], to, Refused)),
        ),
        feature(
            "a policy doesn't make a Service without endpoints drop",
            |own| {
                let mut service = external_local(own);
                service["spec"]["internalTrafficPolicy"] = "Local".into();
                service
            },
            vec![Part(8080, vec![pod(1).gone(), pod(2).starting()])],
            [cluster, external, balancer, node_port]
                .map(|to| ask(&[OUTSIDE, NODE, POD], to, Refused)),
        ),
        feature(
            "node ports are on loopback where a mode documents it",
            on_node_ports,
            two(),
            [ask(&[NODE], |own| (own.addresses.loopback(), own.node_port()).into(), Refused)],
        )
        .with(|config| {
            // All addresses is that mode's default.
            if config.mode == Mode::Iptables {
                let all = ["0.0.0.0/0", "::/0"].map(|range| range.parse().unwrap());
                config.node_port_addresses = NodePortAddresses::Ranges(all.into());
            }
        })
        .but(|mode, family| {
            // `localhostNodePorts`, as the kernel has no such thing for IPv6.
            (mode == Mode::Iptables && family == Family::V4).then_some(By(BOTH, Node))
        }),
    ]
}

fn policies() -> Vec<Feature> {
    vec![
        feature(
            "internalTrafficPolicy Local leads to endpoints on this node only",
            internal_local,
            two(),
            [
                ask(&[OUTSIDE, NODE], cluster, By(&[1], Node)),
                ask(&[POD], cluster, By(&[1], Client)),
            ],
        ),
        feature(
            "internalTrafficPolicy Local drops where this node has no endpoint",
            internal_local,
            elsewhere(),
            [ask(&[OUTSIDE, NODE, POD], cluster, NoneHere)],
        ),
        feature(
            "internalTrafficPolicy doesn't touch external addresses",
            |own| {
                json!({"spec": {"type": "NodePort", "internalTrafficPolicy": "Local",
                    "externalIPs": [own.external()]}})
            },
            two(),
            [
                ask(&[OUTSIDE, NODE, POD], external, By(BOTH, Node)),
                ask(&[OUTSIDE, NODE, POD], node_port, By(BOTH, Node)),
            ],
        ),
        feature(
            "externalTrafficPolicy Local keeps outside clients on this node, and their address",
            external_local,
            two(),
            [external, balancer, node_port].map(|to| ask(&[OUTSIDE], to, By(&[1], Client))),
        ),
        feature(
            "with externalTrafficPolicy Local pods and the node reach all endpoints",
            external_local,
            two(),
            [external, balancer, node_port].map(|to| {
                let mut questions = ask(&[POD], to, By(BOTH, Client));
                questions.extend(ask(&[NODE], to, By(BOTH, Node)));
                questions
            }),
        ),
        feature(
            "externalTrafficPolicy Local doesn't touch the cluster address",
            external_local,
            elsewhere(),
            [
                ask(&[OUTSIDE, NODE], cluster, By(&[2, 4], Node)),
                ask(&[POD], cluster, By(&[2, 4], Client)),
            ],
        ),
        feature(
            "externalTrafficPolicy Local drops what comes from outside where this node has no endpoint",
            external_local,
            elsewhere(),
            [external, balancer, node_port].map(|to| {
                let mut questions = ask(&[OUTSIDE], to, NoneHere);
                for question in &mut questions {
                    // Relays listen there for the others.
                    question.but = |mode, _| (mode == Mode::Userspace).then_some(NotAdmitted);
                }
                questions.extend(ask(&[POD], to, By(&[2, 4], Client)));
                questions.extend(ask(&[NODE], to, By(&[2, 4], Node)));
                questions
            }),
        ),
        feature(
            "source ranges admit to load balancers' addresses only those in them, pods too",
            |own| {
                let mut service = balanced(own);
                let ranges = [own.addresses.client(1), own.addresses.pod(3)];
                service["spec"]["externalIPs"] = json!([own.external()]);
                service["spec"]["loadBalancerSourceRanges"] =
                    json!(ranges.map(|address| own.addresses.only(address)));
                service
            },
            two(),
            [
                ask(&[OUTSIDE, POD], balancer, By(BOTH, Node)),
                ask(&[STRANGER, From::Pod(4)], balancer, NotAdmitted),
                ask(&[STRANGER], cluster, By(BOTH, Node)),
                ask(&[STRANGER], external, By(BOTH, Node)),
                ask(&[STRANGER], node_port, By(BOTH, Node)),
                ask(&[From::Pod(4)], cluster, By(BOTH, Client)),
            ],
        ),
        feature(
            "source ranges and externalTrafficPolicy Local hold together",
            |own| {
                let mut service = external_local(own);
                let ranges = [own.addresses.client(1), own.addresses.pod(3)];
                service["spec"]["loadBalancerSourceRanges"] =
                    json!(ranges.map(|address| own.addresses.only(address)));
                service
            },
            two(),
            [
                ask(&[OUTSIDE], balancer, By(&[1], Client)),
                ask(&[POD], balancer, By(BOTH, Client)),
                ask(&[STRANGER, From::Pod(4)], balancer, NotAdmitted),
                ask(&[STRANGER], external, By(&[1], Client)),
                ask(&[STRANGER], node_port, By(&[1], Client)),
            ],
        ),
        feature(
            "source ranges of the other family admit nobody",
            |own| {
                let mut service = balanced(own);
                let other =
                    if own.addresses.node().is_ipv4() { "2001:db8::/32" } else { "192.0.2.0/24" };
                service["spec"]["loadBalancerSourceRanges"] = json!([other]);
                service
            },
            two(),
            [ask(&[OUTSIDE, POD], balancer, NotAdmitted), ask(&[POD], cluster, By(BOTH, Client))],
        ),
    ]
}

fn endpoints() -> Vec<Feature> {
    vec![
        feature(
            "a pod reaches itself through its Service, and sees the node as the client",
            |own| {
                let mut service = balanced(own);
                service["spec"]["externalIPs"] = json!([own.external()]);
                service
            },
            vec![Part(8080, vec![pod(1)])],
            [cluster, external, balancer, node_port]
                .map(|to| ask(&[From::Pod(1)], to, By(&[1], Node))),
        ),
        feature(
            "a pod reaches itself through its Service with externalTrafficPolicy Local too",
            external_local,
            vec![Part(8080, vec![pod(1)])],
            [external, balancer, node_port].map(|to| ask(&[From::Pod(1)], to, By(&[1], Node))),
        ),
        feature(
            "an endpoint may be on the node's own address",
            on_node_ports,
            vec![Part(8080, vec![pod(ON_NODE)])],
            [
                ask(&[OUTSIDE, POD], cluster, By(&[ON_NODE], Client)),
                ask(&[NODE], cluster, By(&[ON_NODE], Node)),
                ask(&[OUTSIDE, POD], node_port, By(&[ON_NODE], Client)),
                ask(&[NODE], node_port, By(&[ON_NODE], Node)),
            ],
        ),
        feature(
            "endpoints that terminate or start get nothing while one is ready",
            on_node_ports,
            vec![Part(8080, vec![pod(1).draining(), pod(2), pod(3).starting(), pod(4).gone()])],
            [ask(&[POD], cluster, By(&[2], Client)), ask(&[OUTSIDE], node_port, By(&[2], Node))],
        ),
        feature(
            "endpoints that serve while they terminate are the last resort",
            on_node_ports,
            vec![Part(8080, vec![pod(1).draining(), pod(2).draining(), pod(4).gone()])],
            [ask(&[POD], cluster, By(BOTH, Client)), ask(&[OUTSIDE], node_port, By(BOTH, Node))],
        ),
        feature(
            "with Local, those that terminate on this node come before ready ones elsewhere",
            |own| {
                let mut service = external_local(own);
                service["spec"]["internalTrafficPolicy"] = "Local".into();
                service
            },
            vec![Part(8080, vec![pod(1).draining(), pod(2)])],
            [
                ask(&[POD], cluster, By(&[1], Client)),
                ask(&[OUTSIDE], node_port, By(&[1], Client)),
                ask(&[OUTSIDE], balancer, By(&[1], Client)),
                ask(&[POD], balancer, By(&[2], Client)),
            ],
        ),
        feature(
            "endpoints that are ready while they terminate are ready: publishNotReadyAddresses",
            plain,
            vec![Part(8080, vec![pod(1).published(), pod(2)])],
            [ask(&[POD], cluster, By(BOTH, Client))],
        ),
        feature(
            "hints keep clients to endpoints for their zone",
            on_node_ports,
            vec![Part(
                8080,
                vec![pod(1).for_zones(&["zone-b"]), pod(2).for_zones(&["zone-a", "zone-b"])],
            )],
            [
                ask(&[POD], cluster, By(&[2], Client)),
                ask(&[NODE], cluster, By(&[2], Node)),
                ask(&[OUTSIDE], node_port, By(&[2], Node)),
            ],
        ),
        feature(
            "hints for nodes come before those for zones",
            plain,
            vec![Part(
                8080,
                vec![
                    pod(1).for_zones(&["zone-a"]).for_nodes(&["here"]),
                    pod(2).for_zones(&["zone-a"]).for_nodes(&["there"]),
                ],
            )],
            [ask(&[POD], cluster, By(&[1], Client))],
        ),
        feature(
            "hints count only if every ready endpoint has one",
            plain,
            vec![Part(8080, vec![pod(1), pod(2).for_zones(&["zone-a"])])],
            [ask(&[POD], cluster, By(BOTH, Client))],
        ),
        feature(
            "hints count only if one is for here",
            plain,
            vec![Part(8080, vec![pod(1).for_zones(&["zone-b"]), pod(2).for_zones(&["zone-c"])])],
            [ask(&[POD], cluster, By(BOTH, Client))],
        ),
        feature(
            "a named port may have another number in each slice",
            plain,
            vec![Part(8080, vec![pod(1)]), Part(9090, vec![pod(2)])],
            [ask(&[POD], cluster, By(BOTH, Client))],
        ),
        feature(
            "an endpoint in two slices is one",
            plain,
            vec![Part(8080, vec![pod(1), pod(2)]), Part(8080, vec![pod(1).draining(), pod(4)])],
            [ask(&[POD], cluster, By(&[1, 2, 4], Client))],
        ),
    ]
}

fn sources() -> Vec<Feature> {
    vec![
        feature(
            "masqueradeAll hides pods too",
            plain,
            two(),
            [ask(&[OUTSIDE, NODE, POD], cluster, By(BOTH, Node))],
        )
        .with(|config| config.masquerade_all = true),
        feature(
            "without a way to tell pods nobody is hidden at cluster addresses",
            on_node_ports,
            two(),
            [
                ask(&[OUTSIDE, POD], cluster, By(BOTH, Client)),
                ask(&[OUTSIDE, POD], node_port, By(BOTH, Node)),
            ],
        )
        .with(|config| config.detect_local = DetectLocal::Nothing),
        feature(
            "pods are those behind interfaces with a prefix",
            external_local,
            two(),
            [
                ask(&[OUTSIDE, NODE], cluster, By(BOTH, Node)),
                ask(&[POD], cluster, By(BOTH, Client)),
                ask(&[OUTSIDE], balancer, By(&[1], Client)),
                ask(&[POD], balancer, By(BOTH, Client)),
                ask(&[POD], node_port, By(BOTH, Client)),
            ],
        )
        .with(|config| config.detect_local = DetectLocal::InterfacePrefix("pod".into())),
        feature(
            "pods are those behind one interface",
            external_local,
            two(),
            [
                ask(&[OUTSIDE, From::Pod(4)], cluster, By(BOTH, Node)),
                ask(&[POD], cluster, By(BOTH, Client)),
                ask(&[From::Pod(4)], balancer, By(&[1], Client)),
                ask(&[POD], balancer, By(BOTH, Client)),
            ],
        )
        .with(|config| config.detect_local = DetectLocal::Interface("pod3".into())),
    ]
}
