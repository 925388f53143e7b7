//! Which endpoints get traffic.

use serde_json::json;

use super::{
    BOTH, NODE, OUTSIDE, POD, ask, balanced, balancer, cluster, external, external_local, feature,
    node_port, on_node_ports, plain, two,
};
use crate::packets::{
    features::{
        Expect::By,
        Feature, Part,
        Seen::{Client, Node},
        pod,
    },
    fixture::{From, ON_NODE},
};

/// These rows.
pub(super) fn rows() -> Vec<Feature> {
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
            "hints keep clients to endpoints for their zone: PreferSameZone, PreferClose",
            |_| json!({"spec": {"type": "NodePort", "trafficDistribution": "PreferSameZone"}}),
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
            "hints for nodes come before those for zones: PreferSameNode",
            |_| json!({"spec": {"trafficDistribution": "PreferSameNode"}}),
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
            "endpoints may be spread over many slices",
            on_node_ports,
            [vec![pod(1)], vec![], vec![pod(2)], vec![pod(4)]].map(|pods| Part(8080, pods)).into(),
            [
                ask(&[POD], cluster, By(&[1, 2, 4], Client)),
                ask(&[OUTSIDE], node_port, By(&[1, 2, 4], Node)),
            ],
        ),
        feature(
            "trafficDistribution is carried out by hints: without them any endpoint will do",
            |_| json!({"spec": {"trafficDistribution": "PreferSameNode"}}),
            two(),
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
