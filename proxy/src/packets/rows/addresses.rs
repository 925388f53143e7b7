//! Which addresses and ports lead to a Service.

use serde_json::json;

use super::{
    BOTH, NODE, OUTSIDE, POD, ask, balanced, balancer, cluster, external, external_local, feature,
    node_port, node_port_elsewhere, on_node_ports, plain, two,
};
use crate::{
    Mode, NodePortAddresses,
    model::Family,
    packets::features::{
        Expect::{By, PassesBy, Refused, Unclaimed, UnusedPort},
        Feature, Part,
        Seen::{Client, Node},
        pod,
    },
};

/// These rows.
pub(super) fn rows() -> Vec<Feature> {
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
            "what is sent to an address of the Services' ranges that no Service has is dropped",
            plain,
            // A pod has it, so that it shows whether anything comes through.
            vec![Part(8080, vec![pod(1)]), Part(9090, vec![pod(4).gone()])],
            [
                ask(
                    &[OUTSIDE, NODE, POD],
                    |own| (own.addresses.pod(4), 9090).into(),
                    Unclaimed(&[4]),
                ),
                ask(&[OUTSIDE, NODE], cluster, By(&[1], Node)),
                ask(&[POD], cluster, By(&[1], Client)),
                ask(&[OUTSIDE, NODE, POD], |own| (own.cluster(), 81).into(), UnusedPort),
            ],
        )
        .with_ranges(|own| {
            [own.addresses.pod(4), own.cluster(), own.cluster()]
                .map(|address| own.addresses.only(address))
                .into()
        }),
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
            "a headless Service is a matter of DNS, whatever else stands in it",
            |own| {
                json!({"spec": {"type": "ClusterIP", "clusterIP": "None",
                    "externalIPs": [own.external()]}})
            },
            two(),
            [ask(&[OUTSIDE, NODE, POD], cluster, PassesBy), ask(&[OUTSIDE], external, PassesBy)],
        ),
        feature(
            "so is one of type ExternalName",
            |own| {
                json!({"spec": {"type": "ExternalName", "externalName": "db.example.com",
                    "externalIPs": [own.external()]}})
            },
            two(),
            [ask(&[OUTSIDE, NODE, POD], cluster, PassesBy), ask(&[OUTSIDE], external, PassesBy)],
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
            // All addresses is those modes' default.
            if config.mode != Mode::Nftables {
                let all = ["0.0.0.0/0", "::/0"].map(|range| range.parse().unwrap());
                config.node_port_addresses = NodePortAddresses::Ranges(all.into());
            }
        })
        .but(|mode, family| {
            // `localhostNodePorts`; to rules the kernel has no such thing for IPv6.
            let by_rules = mode == Mode::Iptables && family == Family::V4;
            (by_rules || mode == Mode::Userspace).then_some(By(BOTH, Node))
        }),
    ]
}
