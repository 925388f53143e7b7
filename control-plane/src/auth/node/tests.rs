//! The sentences of "Using Node Authorization".

use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::auth::fixture::{Objects, node, path, resource, user};

fn pod(name: &str, on: &str, mirror: bool) -> Value {
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": "a", "uid": format!("uid-{name}") },
        "spec": {
            "nodeName": on,
            "serviceAccountName": format!("sa-{name}"),
            "imagePullSecrets": [{ "name": format!("pull-{name}") }],
            "initContainers": [{ "envFrom": [{ "configMapRef": { "name": format!("env-{name}") } }] }],
            "containers": [{ "env": [
                { "name": "A", "valueFrom": { "secretKeyRef": { "name": format!("key-{name}"), "key": "k" } } },
            ]}],
            "volumes": [
                { "name": "s", "secret": { "secretName": format!("vol-{name}") } },
                { "name": "c", "persistentVolumeClaim": { "claimName": format!("claim-{name}") } },
                { "name": "p", "projected": { "sources": [
                    { "configMap": { "name": format!("projected-{name}") } },
                    { "serviceAccountToken": { "path": "token" } },
                ]}},
            ],
        },
    });
    if mirror {
        pod["metadata"]["annotations"] = json!({ graph::MIRROR: "hash" });
    }
    pod
}

fn cluster() -> Objects {
    Objects::of([
        pod("p1", "n1", false),
        pod("p2", "n2", false),
        pod("m1", "n1", true),
        json!({ "apiVersion": "v1", "kind": "PersistentVolume", "metadata": { "name": "pv" },
            "spec": { "claimRef": { "namespace": "a", "name": "claim-p1" } } }),
        json!({ "apiVersion": "storage.k8s.io/v1", "kind": "VolumeAttachment",
            "metadata": { "name": "va" }, "spec": { "nodeName": "n1" } }),
    ])
}

#[test]
fn what_a_kubelet_may() {
    let authorizer = NodeAuthorizer::new(Arc::new(cluster()));
    let n1 = node("n1");
    let get =
        |what: &str, namespace: &str, name: &str| resource(&n1, "get", "", what, namespace, name);
    let pods_of = |value: &str| Attributes {
        field_selector: vec![("spec.nodeName".into(), value.into())],
        ..resource(&n1, "watch", "", "pods", "", "")
    };
    let lease = |verb: &str, namespace: &str, name: &str| {
        resource(&n1, verb, "coordination.k8s.io", "leases", namespace, name)
    };
    let table = [
        ("a secret of its pod's volume", get("secrets", "a", "vol-p1"), true),
        ("… of its variable", get("secrets", "a", "key-p1"), true),
        ("… to pull its image", get("secrets", "a", "pull-p1"), true),
        ("… watched by name", resource(&n1, "watch", "", "secrets", "a", "vol-p1"), true),
        ("no secret of another node's pod", get("secrets", "a", "vol-p2"), false),
        ("… nor of that name elsewhere", get("secrets", "b", "vol-p1"), false),
        ("… nor all", resource(&n1, "list", "", "secrets", "a", ""), false),
        ("… nor written", resource(&n1, "update", "", "secrets", "a", "vol-p1"), false),
        ("a config map of an init container", get("configmaps", "a", "env-p1"), true),
        ("… of a projected volume", get("configmaps", "a", "projected-p1"), true),
        ("no config map of another's", get("configmaps", "a", "env-p2"), false),
        ("mirror pods open nothing", get("secrets", "a", "vol-m1"), false),
        ("a claim", get("persistentvolumeclaims", "a", "claim-p1"), true),
        ("a volume of that claim", get("persistentvolumes", "", "pv"), true),
        (
            "an attachment to it",
            resource(&n1, "get", "storage.k8s.io", "volumeattachments", "", "va"),
            true,
        ),
        (
            "a token of its pod's account",
            resource(&n1, "create", "", "serviceaccounts/token", "a", "sa-p1"),
            true,
        ),
        (
            "no token of another",
            resource(&n1, "create", "", "serviceaccounts/token", "a", "sa-p2"),
            false,
        ),
        ("its pods", pods_of("n1"), true),
        ("no other's pods", pods_of("n2"), false),
        ("nor all pods", resource(&n1, "list", "", "pods", "", ""), false),
        ("its pod", get("pods", "a", "p1"), true),
        ("no other's pod", get("pods", "a", "p2"), false),
        ("mirror pods are made", resource(&n1, "create", "", "pods", "a", ""), true),
        ("… and deleted", resource(&n1, "delete", "", "pods", "a", "m1"), true),
        ("pods are not changed", resource(&n1, "update", "", "pods", "a", "p1"), false),
        ("but their status", resource(&n1, "patch", "", "pods/status", "a", "p1"), true),
        ("pods are evicted", resource(&n1, "create", "", "pods/eviction", "a", "p1"), true),
        ("its node", get("nodes", "", "n1"), true),
        ("no other node", get("nodes", "", "n2"), false),
        ("it registers", resource(&n1, "create", "", "nodes", "", ""), true),
        ("and does not delete itself", resource(&n1, "delete", "", "nodes", "", "n1"), false),
        ("its lease", lease("update", "kube-node-lease", "n1"), true),
        ("made", lease("create", "kube-node-lease", ""), true),
        ("no other's lease", lease("update", "kube-node-lease", "n2"), false),
        ("nor elsewhere", lease("update", "a", "n1"), false),
        ("services", resource(&n1, "watch", "", "services", "", ""), true),
        ("no endpoints", resource(&n1, "watch", "", "endpoints", "", ""), false),
        ("events", resource(&n1, "create", "", "events", "a", ""), true),
        (
            "token reviews",
            resource(&n1, "create", "authentication.k8s.io", "tokenreviews", "", ""),
            true,
        ),
        ("its CSI node", resource(&n1, "patch", "storage.k8s.io", "csinodes", "", "n1"), true),
        ("no deployments", resource(&n1, "list", "apps", "deployments", "", ""), false),
        ("no metrics", path(&n1, "get", "/metrics"), false),
    ];
    for (sentence, request, expected) in table {
        let decision = authorizer.authorize(&request);
        assert_eq!(matches!(decision, Decision::Allow(_)), expected, "{sentence}: {decision:?}");
    }
    // "a username of system:node:<nodeName> in the system:nodes group" is a node, and nobody else.
    for other in [user("system:node:n1", &[]), user("system:node:", &["system:nodes"])] {
        let request = resource(&other, "get", "", "secrets", "a", "vol-p1");
        assert_eq!(authorizer.authorize(&request), Decision::NoOpinion(String::new()));
    }
}

#[test]
fn the_graph_follows_the_pods() {
    for counts in [true, false] {
        let objects = Arc::new(cluster().counting(counts));
        let authorizer = NodeAuthorizer::new(Arc::clone(&objects) as Arc<dyn Lookup>);
        let may = |on: &str, secret: &str| {
            let request = resource(&node(on), "get", "", "secrets", "a", secret);
            matches!(authorizer.authorize(&request), Decision::Allow(_))
        };
        assert!(!may("n1", "vol-p3"));
        let third = pod("p3", "n1", false);
        objects.add(third.clone());
        assert!(may("n1", "vol-p3"));
        let mut changed = third.clone();
        changed["status"] = json!({ "phase": "Running" });
        objects.add(changed);
        assert!(may("n1", "vol-p3") && may("n1", "vol-p1"));
        objects.remove(&third);
        assert!(!may("n1", "vol-p3") && may("n1", "vol-p1") && may("n2", "vol-p2"));
        // Deleted and made again under the same name, on another node.
        let mut again = pod("p1", "n2", false);
        again["metadata"]["uid"] = json!("other");
        objects.add(again);
        assert!(!may("n1", "vol-p1") && may("n2", "vol-p1"));
    }
}
