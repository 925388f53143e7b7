//! Roles of the controllers: `system:controller:<name>`, bound to the service account `<name>` of
//! `kube-system`.
//!
//! To what Kubernetes documents, each role adds `list` and `watch` on what its controller follows, so
//! that one may run under its own name alone, and `patch` where `update` is granted: the controllers
//! here write small changes, not whole objects.

use super::Grant::{self, Api};

/// A controller and what it may do.
pub(super) struct Controller {
    pub(super) name: &'static str,
    pub(super) grants: &'static [Grant],
}

const READ: &str = "get list watch";
const KEEP: &str = "create delete get list patch update watch";

const EVENTS: Grant = Api("create patch update", "core events.k8s.io", "events");

macro_rules! controllers {
    ($($name:literal: [$($grant:expr),* $(,)?]),* $(,)?) => {
        &[$(Controller { name: $name, grants: &[$($grant),*] }),*]
    };
}

pub(super) const CONTROLLERS: &[Controller] = controllers! {
    "attachdetach-controller": [
        Api("list watch", "core", "persistentvolumeclaims persistentvolumes"),
        Api(READ, "core", "nodes"),
        Api("patch update", "core", "nodes/status"),
        Api("list watch", "core", "pods"),
        Api("create delete get list watch", "storage.k8s.io", "volumeattachments"),
        Api(READ, "storage.k8s.io", "csidrivers csinodes"),
        EVENTS,
    ],
    "clusterrole-aggregation-controller": [
        // It may hand out what it does not hold: that is its purpose.
        Api("escalate get list patch update watch", "rbac.authorization.k8s.io", "clusterroles"),
    ],
    "cronjob-controller": [
        Api("get list update watch", "batch", "cronjobs"),
        Api(KEEP, "batch", "jobs"),
        Api("patch update", "batch", "cronjobs/status cronjobs/finalizers"),
        Api("delete list", "core", "pods"),
        EVENTS,
    ],
    "daemon-set-controller": [
        Api(READ, "apps", "daemonsets"),
        Api("patch update", "apps", "daemonsets/finalizers daemonsets/status"),
        Api("list watch", "core", "nodes"),
        Api("create delete list patch watch", "core", "pods"),
        Api("create", "core", "pods/binding"),
        Api(KEEP, "apps", "controllerrevisions"),
        EVENTS,
    ],
    "deployment-controller": [
        Api("get list patch update watch", "apps", "deployments"),
        Api("patch update", "apps", "deployments/finalizers deployments/status"),
        Api(KEEP, "apps", "replicasets"),
        Api("get list update watch", "core", "pods"),
        EVENTS,
    ],
    "disruption-controller": [
        Api(READ, "apps", "deployments replicasets statefulsets"),
        Api(READ, "core", "replicationcontrollers"),
        Api(READ, "policy", "poddisruptionbudgets"),
        Api("patch update", "policy", "poddisruptionbudgets/status"),
        Api("list watch", "core", "pods"),
        Api("patch update", "core", "pods/status"),
        Api("get", "*", "*/scale"),
        EVENTS,
    ],
    "endpoint-controller": [
        Api(READ, "core", "nodes pods services"),
        Api(KEEP, "core", "endpoints"),
        Api("create", "core", "endpoints/restricted"),
        EVENTS,
    ],
    "endpointslice-controller": [
        Api(READ, "core", "nodes pods services"),
        Api("update", "core", "services/finalizers"),
        Api(KEEP, "discovery.k8s.io", "endpointslices"),
        Api("create", "discovery.k8s.io", "endpointslices/restricted"),
        EVENTS,
    ],
    "endpointslicemirroring-controller": [
        Api(READ, "core", "endpoints services"),
        Api("update", "core", "services/finalizers endpoints/finalizers"),
        Api(KEEP, "discovery.k8s.io", "endpointslices"),
        Api("create", "discovery.k8s.io", "endpointslices/restricted"),
        EVENTS,
    ],
    "generic-garbage-collector": [
        // It deletes objects of every kind, and takes finalizers from them.
        Api("delete get list patch update watch", "*", "*"),
        EVENTS,
    ],
    "horizontal-pod-autoscaler": [
        Api(READ, "autoscaling", "horizontalpodautoscalers"),
        Api("patch update", "autoscaling", "horizontalpodautoscalers/status"),
        Api("get update", "*", "*/scale"),
        Api("list watch", "core", "pods"),
        Api("list", "metrics.k8s.io", "pods"),
        Api("get list", "custom.metrics.k8s.io external.metrics.k8s.io", "*"),
        EVENTS,
    ],
    "job-controller": [
        Api("get list patch update watch", "batch", "jobs"),
        Api("patch update", "batch", "jobs/finalizers jobs/status"),
        Api("create delete list patch watch", "core", "pods"),
        EVENTS,
    ],
    "namespace-controller": [
        Api("delete get list watch", "core", "namespaces"),
        Api("patch update", "core", "namespaces/finalize namespaces/status"),
        Api("delete deletecollection get list", "*", "*"),
    ],
    "node-controller": [
        Api("delete get list patch update watch", "core", "nodes"),
        Api("patch update", "core", "nodes/status"),
        Api("patch update", "core", "pods/status"),
        Api("delete get list watch", "core", "pods"),
        Api(READ, "coordination.k8s.io", "leases"),
        EVENTS,
    ],
    "persistent-volume-binder": [
        Api(KEEP, "core", "persistentvolumes"),
        Api("patch update", "core", "persistentvolumes/status"),
        Api("get list update watch", "core", "persistentvolumeclaims"),
        Api("patch update", "core", "persistentvolumeclaims/status"),
        Api("create delete get list watch", "core", "pods"),
        Api(READ, "storage.k8s.io", "storageclasses"),
        Api("get list", "core", "nodes"),
        EVENTS,
    ],
    "pod-garbage-collector": [
        Api("delete get list watch", "core", "pods"),
        Api("get list watch", "core", "nodes"),
        Api("patch", "core", "pods/status"),
    ],
    "pv-protection-controller": [
        Api("get list update watch", "core", "persistentvolumes"),
        EVENTS,
    ],
    "pvc-protection-controller": [
        Api("get list update watch", "core", "persistentvolumeclaims"),
        Api(READ, "core", "pods"),
        EVENTS,
    ],
    "replicaset-controller": [
        Api("get list patch update watch", "apps", "replicasets"),
        Api("patch update", "apps", "replicasets/finalizers replicasets/status"),
        Api("create delete get list patch watch", "core", "pods"),
        EVENTS,
    ],
    "replication-controller": [
        Api("get list update watch", "core", "replicationcontrollers"),
        Api("patch update", "core", "replicationcontrollers/finalizers replicationcontrollers/status"),
        Api("create delete get list patch watch", "core", "pods"),
        EVENTS,
    ],
    "resourcequota-controller": [
        Api("list watch", "*", "*"),
        Api("patch update", "core", "resourcequotas/status"),
        EVENTS,
    ],
    "root-ca-cert-publisher": [
        Api("create get list patch update watch", "core", "configmaps"),
        Api("list watch", "core", "namespaces"),
        EVENTS,
    ],
    "service-account-controller": [
        Api("create get list watch", "core", "serviceaccounts"),
        Api("list watch", "core", "namespaces"),
        EVENTS,
    ],
    "service-controller": [
        Api(READ, "core", "services"),
        Api("patch update", "core", "services/status"),
        Api("list watch", "core", "nodes"),
        EVENTS,
    ],
    "statefulset-controller": [
        Api(READ, "core", "pods"),
        Api(READ, "apps", "statefulsets"),
        Api("patch update", "apps", "statefulsets/finalizers statefulsets/status"),
        Api("create delete get patch update", "core", "pods"),
        Api(KEEP, "apps", "controllerrevisions"),
        Api("create delete get list update watch", "core", "persistentvolumeclaims"),
        EVENTS,
    ],
    "ttl-after-finished-controller": [
        Api("delete get list watch", "batch", "jobs"),
        EVENTS,
    ],
    "ttl-controller": [
        Api("list patch update watch", "core", "nodes"),
        EVENTS,
    ],
};
