//! What every kubelet may do whichever node it is.

use crate::auth::{
    bootstrap::{Grant, rules},
    rbac::Rule,
};

/// The rules of `system:node` but for what the node authorizer decides object by object.
const FOR_ALL_NODES: &[Grant] = &[
    // To answer for its own HTTPS port who asks, and whether they may.
    Grant::Api("create", "authentication.k8s.io", "tokenreviews"),
    Grant::Api("create", "authorization.k8s.io", "subjectaccessreviews localsubjectaccessreviews"),
    // Service environment variables.
    Grant::Api("get list watch", "core", "services"),
    Grant::Api("create patch update", "core events.k8s.io", "events"),
    Grant::Api("create get list watch", "certificates.k8s.io", "certificatesigningrequests"),
    Grant::Api("get list watch", "storage.k8s.io", "csidrivers"),
    Grant::Api("get list watch", "node.k8s.io", "runtimeclasses"),
    Grant::Api("get list watch", "certificates.k8s.io", "clustertrustbundles"),
];

pub(crate) fn for_all_nodes() -> Vec<Rule> {
    rules(FOR_ALL_NODES)
}
