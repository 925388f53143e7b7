//! Which objects the pods of a node refer to.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use serde_json::Value;

use crate::{
    auth::{
        derived::Derived,
        fields::{at, list, name, namespace, text, uid},
    },
    lookup::Lookup,
};

/// A kind of object that pods refer to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Secret,
    ConfigMap,
    Claim,
    ResourceClaim,
    ServiceAccount,
}

/// The annotation of mirror pods, which stand in the API for pods of a manifest folder.
pub(crate) const MIRROR: &str = "kubernetes.io/config.mirror";

/// What a pod refers to, all within its namespace.
#[derive(PartialEq, Eq)]
struct Edges {
    node: String,
    namespace: String,
    to: Vec<(Kind, String)>,
}

/// Namespace → kind and name → nodes.
type Nodes = HashMap<String, HashMap<(Kind, String), HashSet<String>>>;

/// All references, and of which pods they come.
pub(super) struct References {
    /// By UID.
    pods: HashMap<String, (Arc<Value>, Arc<Edges>)>,
    nodes: Arc<Nodes>,
}

impl References {
    /// The references of these pods. What did not change since `before` is not looked at again: most
    /// changes of pods are of their status alone.
    fn next(objects: &[Arc<Value>], before: Option<&Self>) -> Self {
        let mut pods = HashMap::with_capacity(objects.len());
        let mut same = true;
        for pod in objects {
            let known = before.and_then(|before| before.pods.get(uid(pod)));
            let edges = match known {
                Some((known_pod, edges)) if Arc::ptr_eq(known_pod, pod) => Arc::clone(edges),
                known => {
                    let edges = Edges::of(pod);
                    match known {
                        Some((_, known)) if **known == edges => Arc::clone(known),
                        _ => {
                            same = false;
                            Arc::new(edges)
                        }
                    }
                }
            };
            pods.insert(uid(pod).to_owned(), (Arc::clone(pod), edges));
        }
        let nodes = match before {
            Some(before) if same && before.pods.len() == pods.len() => Arc::clone(&before.nodes),
            _ => Arc::new(by_object(pods.values().map(|(_, edges)| &**edges))),
        };
        Self { pods, nodes }
    }
}

fn by_object<'a>(all: impl Iterator<Item = &'a Edges>) -> Nodes {
    let mut nodes = Nodes::new();
    for edges in all {
        let objects = nodes.entry(edges.namespace.clone()).or_default();
        for to in &edges.to {
            objects.entry(to.clone()).or_default().insert(edges.node.clone());
        }
    }
    nodes
}

impl Edges {
    fn of(pod: &Value) -> Self {
        let node = text(pod, &["spec", "nodeName"]).to_owned();
        // A kubelet makes mirror pods itself: what they refer to must open nothing to it.
        let mirror = at(pod, &["metadata", "annotations", MIRROR]).is_some();
        let to = if node.is_empty() || mirror { Vec::new() } else { references(pod) };
        Self { node, namespace: namespace(pod).to_owned(), to }
    }
}

/// What a pod refers to.
pub(crate) fn references(pod: &Value) -> Vec<(Kind, String)> {
    let mut found = HashSet::new();
    let mut add = |kind, name: &str| {
        if !name.is_empty() {
            found.insert((kind, name.to_owned()));
        }
    };
    add(Kind::ServiceAccount, text(pod, &["spec", "serviceAccountName"]));
    for secret in list(pod, &["spec", "imagePullSecrets"]) {
        add(Kind::Secret, text(secret, &["name"]));
    }
    for containers in ["initContainers", "containers", "ephemeralContainers"] {
        for container in list(pod, &["spec", containers]) {
            for source in list(container, &["envFrom"]) {
                add(Kind::Secret, text(source, &["secretRef", "name"]));
                add(Kind::ConfigMap, text(source, &["configMapRef", "name"]));
            }
            for variable in list(container, &["env"]) {
                add(Kind::Secret, text(variable, &["valueFrom", "secretKeyRef", "name"]));
                add(Kind::ConfigMap, text(variable, &["valueFrom", "configMapKeyRef", "name"]));
            }
        }
    }
    for volume in list(pod, &["spec", "volumes"]) {
        for path in SECRETS_OF_VOLUMES {
            add(Kind::Secret, text(volume, path));
        }
        add(Kind::ConfigMap, text(volume, &["configMap", "name"]));
        add(Kind::Claim, text(volume, &["persistentVolumeClaim", "claimName"]));
        if volume.get("ephemeral").is_some() {
            // The claim of an ephemeral volume is named after pod and volume.
            add(Kind::Claim, &format!("{}-{}", name(pod), text(volume, &["name"])));
        }
        for source in list(volume, &["projected", "sources"]) {
            add(Kind::Secret, text(source, &["secret", "name"]));
            add(Kind::ConfigMap, text(source, &["configMap", "name"]));
        }
    }
    for claim in list(pod, &["spec", "resourceClaims"]) {
        add(Kind::ResourceClaim, text(claim, &["resourceClaimName"]));
    }
    for status in list(pod, &["status", "resourceClaimStatuses"]) {
        add(Kind::ResourceClaim, text(status, &["resourceClaimName"]));
    }
    let mut found: Vec<_> = found.into_iter().collect();
    found.sort_unstable_by(|a, b| (a.0 as u8, &a.1).cmp(&(b.0 as u8, &b.1)));
    found
}

/// Where the volume types name secrets.
const SECRETS_OF_VOLUMES: [&[&str]; 10] = [
    &["secret", "secretName"],
    &["azureFile", "secretName"],
    &["cephfs", "secretRef", "name"],
    &["cinder", "secretRef", "name"],
    &["csi", "nodePublishSecretRef", "name"],
    &["flexVolume", "secretRef", "name"],
    &["iscsi", "secretRef", "name"],
    &["rbd", "secretRef", "name"],
    &["scaleIO", "secretRef", "name"],
    &["storageos", "secretRef", "name"],
];

/// All references of all pods that are bound to nodes.
pub(crate) struct Graph(Derived<References>);

impl Graph {
    pub(crate) const fn new() -> Self {
        Self(Derived::new("", "pods"))
    }

    /// Whether a pod bound to `node` refers to the object.
    pub(crate) fn refers(
        &self,
        lookup: &dyn Lookup,
        node: &str,
        kind: Kind,
        in_namespace: &str,
        object: &str,
    ) -> bool {
        let references = self.0.get(lookup, References::next);
        references
            .nodes
            .get(in_namespace)
            .and_then(|objects| objects.get(&(kind, object.to_owned())))
            .is_some_and(|nodes| nodes.contains(node))
    }
}
