//! Whose address endpoints see, by how pods are told.

use super::{
    BOTH, NODE, OUTSIDE, POD, ask, balancer, cluster, external_local, feature, node_port,
    on_node_ports, plain, two,
};
use crate::{
    DetectLocal,
    packets::{
        features::{
            Expect::By,
            Feature,
            Seen::{Client, Node},
        },
        fixture::From,
    },
};

/// These rows.
pub(super) fn rows() -> Vec<Feature> {
    vec![
        feature(
            "masqueradeAll hides pods too",
            plain,
            two(),
            [ask(&[OUTSIDE, NODE, POD], cluster, By(BOTH, Node))],
        )
        .with(|config| config.masquerade_all = true),
        feature(
            "masqueradeAll leaves addresses for the outside to their policy",
            external_local,
            two(),
            [
                ask(&[OUTSIDE], balancer, By(&[1], Client)),
                ask(&[OUTSIDE], node_port, By(&[1], Client)),
                ask(&[POD], cluster, By(BOTH, Node)),
            ],
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
