//! Traffic policies and source ranges.

use serde_json::json;

use super::{
    BOTH, NODE, OUTSIDE, POD, STRANGER, ask, balanced, balancer, cluster, elsewhere, external,
    external_local, feature, internal_local, node_port, two,
};
use crate::{
    Mode,
    packets::{
        features::{
            Expect::{By, NoneHere, NotAdmitted},
            Feature, Part,
            Seen::{Client, Node},
            pod,
        },
        fixture::From,
    },
};

/// These rows.
pub(super) fn rows() -> Vec<Feature> {
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
            "an endpoint of another node reaches its own Service by this one",
            external_local,
            vec![Part(8080, vec![pod(2)])],
            [external, balancer, node_port].map(|to| ask(&[From::Pod(2)], to, By(&[2], Node))),
        ),
        feature(
            "externalTrafficPolicy counts for external addresses whatever the type",
            |own| {
                json!({"spec": {"externalTrafficPolicy": "Local",
                    "externalIPs": [own.external()]}})
            },
            two(),
            [ask(&[OUTSIDE], external, By(&[1], Client)), ask(&[POD], external, By(BOTH, Client))],
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
            "a source range of half of all addresses doesn't admit the other half",
            |own| {
                let mut service = balanced(own);
                // Clients are in it, and pods are not.
                let half = if own.addresses.node().is_ipv4() { "128.0.0.0/1" } else { "::/1" };
                service["spec"]["loadBalancerSourceRanges"] = json!([half]);
                service
            },
            two(),
            [ask(&[OUTSIDE], balancer, By(BOTH, Node)), ask(&[POD], balancer, NotAdmitted)],
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
