//! NodeRestriction: kubelets change only their own node and the pods bound to it.
//!
//! The node authorizer decides by URL; this plugin looks into the objects.

use std::{collections::BTreeSet, sync::Arc};

use serde_json::{Map, Value};

use super::{Admission, AdmissionRequest, Operation, Refusal};
use crate::{
    auth::{
        Attributes, Authorizer, Decision,
        fields::{at, list, text, texts, uid},
        node::{Kind, MIRROR, node_name, references},
    },
    lookup::Lookup,
};

pub(crate) struct NodeRestriction {
    lookup: Arc<dyn Lookup>,
    authorizer: Arc<dyn Authorizer>,
}

/// What is asked, by which node.
struct Asked<'a> {
    node: &'a str,
    request: &'a AdmissionRequest<'a>,
    object: Option<&'a Value>,
}

impl Asked<'_> {
    fn refuse(&self, why: impl AsRef<str>) -> Result<(), Refusal> {
        Err(self.request.forbidden(self.object, why.as_ref()))
    }
}

impl Admission for NodeRestriction {
    fn admit(
        &self,
        request: &AdmissionRequest<'_>,
        object: Option<&mut Value>,
    ) -> Result<(), Refusal> {
        let Some(node) = node_name(request.user) else { return Ok(()) };
        let asked = Asked { node, request, object: object.as_deref() };
        match (request.group, request.resource, request.subresource) {
            ("", "pods", "") => self.pod(&asked),
            ("", "pods", "status") => pod_status(&asked),
            ("", "pods", "eviction") => self.eviction(&asked),
            ("", "pods", other) => asked.refuse(format!(
                "unexpected pod subresource {other:?}, only 'status' and 'eviction' are allowed"
            )),
            ("", "nodes", _) => node_object(&asked),
            ("", "persistentvolumeclaims", "status") => claim_status(&asked),
            ("", "serviceaccounts", "token") => self.token(&asked),
            ("coordination.k8s.io", "leases", _) => lease(&asked),
            ("storage.k8s.io", "csinodes", _) => csi_node(&asked),
            _ => Ok(()),
        }
    }
}

impl NodeRestriction {
    pub(crate) fn new(lookup: Arc<dyn Lookup>, authorizer: Arc<dyn Authorizer>) -> Self {
        Self { lookup, authorizer }
    }

    fn pod(&self, asked: &Asked<'_>) -> Result<(), Refusal> {
        let node = asked.node;
        match (asked.request.operation, asked.object) {
            (Operation::Create, Some(pod)) => self.mirror_pod(asked, pod),
            (Operation::Delete, _) => {
                let own =
                    asked.request.old.is_some_and(|pod| text(pod, &["spec", "nodeName"]) == node);
                if own {
                    return Ok(());
                }
                asked.refuse(format!(
                    "node {node:?} can only delete pods with spec.nodeName set to itself"
                ))
            }
            _ => asked.refuse(format!("node {node:?} can only create and delete mirror pods")),
        }
    }

    fn mirror_pod(&self, asked: &Asked<'_>, pod: &Value) -> Result<(), Refusal> {
        let node = asked.node;
        if at(pod, &["metadata", "annotations", MIRROR]).is_none() {
            return asked.refuse(format!(
                "pod does not have {MIRROR:?} annotation, node {node:?} can only create mirror pods"
            ));
        }
        if text(pod, &["spec", "nodeName"]) != node {
            return asked.refuse(format!(
                "node {node:?} can only create pods with spec.nodeName set to itself"
            ));
        }
        let [owner] = list(pod, &["metadata", "ownerReferences"]) else {
            return asked.refuse(format!(
                "node {node:?} can only create pods with a single owner reference set to itself"
            ));
        };
        let of_node = text(owner, &["apiVersion"]) == "v1"
            && text(owner, &["kind"]) == "Node"
            && text(owner, &["name"]) == node;
        if !of_node {
            return asked.refuse(format!(
                "node {node:?} can only create pods with an owner reference set to itself"
            ));
        }
        let flag = |name| at(owner, &[name]).and_then(Value::as_bool).unwrap_or(false);
        if !flag("controller") {
            return asked.refuse(format!(
                "node {node:?} can only create pods with a controller owner reference set to itself"
            ));
        }
        if flag("blockOwnerDeletion") {
            return asked.refuse(format!(
                "node {node:?} must not set blockOwnerDeletion on an owner reference"
            ));
        }
        let Some(found) = self.lookup.get("", "nodes", None, node) else {
            return asked.refuse(format!("error looking up node {node}: nodes {node:?} not found"));
        };
        let given = text(owner, &["uid"]);
        if given != uid(&found) {
            return asked
                .refuse(format!("node {node} UID mismatch: expected {} got {given}", uid(&found)));
        }
        // Else a kubelet could open to itself whatever it likes.
        match references(pod).first() {
            None => Ok(()),
            Some((kind, _)) => asked.refuse(format!(
                "node {node:?} can not create pods that reference {}",
                match kind {
                    Kind::ServiceAccount => "a service account",
                    Kind::Secret => "secrets",
                    Kind::ConfigMap => "configmaps",
                    Kind::Claim => "persistentvolumeclaims",
                    Kind::ResourceClaim => "resourceclaims",
                }
            )),
        }
    }

    fn eviction(&self, asked: &Asked<'_>) -> Result<(), Refusal> {
        let (node, request) = (asked.node, asked.request);
        if request.operation != Operation::Create {
            return asked.refuse("unexpected operation on an eviction");
        }
        let pod_name = request.object_name(asked.object);
        let Some(pod) = self.lookup.get("", "pods", Some(request.namespace), pod_name) else {
            return Err(Refusal::not_found("pods", pod_name));
        };
        if text(&pod, &["spec", "nodeName"]) == node {
            return Ok(());
        }
        asked.refuse(format!("node {node} can only evict pods with spec.nodeName set to itself"))
    }

    fn token(&self, asked: &Asked<'_>) -> Result<(), Refusal> {
        let Some(body) = asked.object else { return Ok(()) };
        let bound = |field| text(body, &["spec", "boundObjectRef", field]);
        if bound("apiVersion") != "v1" || bound("kind") != "Pod" || bound("name").is_empty() {
            return asked.refuse("node requested token not bound to a pod");
        }
        if bound("uid").is_empty() {
            return asked.refuse("node requested token with a pod binding without a uid");
        }
        let namespace = asked.request.namespace;
        let Some(pod) = self.lookup.get("", "pods", Some(namespace), bound("name")) else {
            return Err(Refusal::not_found("pods", bound("name")));
        };
        if uid(&pod) != bound("uid") {
            return asked.refuse(format!(
                "the UID in the bound object reference ({}) does not match the UID in record. The \
                 object might have been deleted and then recreated",
                bound("uid")
            ));
        }
        if text(&pod, &["spec", "nodeName"]) != asked.node {
            return asked
                .refuse("node requested token bound to a pod scheduled on a different node");
        }
        self.audience(asked, &pod, &texts(body, &["spec", "audiences"]))
    }

    /// A token is for the audience that the pod's volumes name (the API server if none), or for one
    /// that nodes are granted by the verb `request-serviceaccounts-token-audience`.
    fn audience(
        &self,
        asked: &Asked<'_>,
        pod: &Value,
        audiences: &[String],
    ) -> Result<(), Refusal> {
        let audience = match audiences {
            [] => "",
            [one] => one,
            _ => return asked.refuse("node may only request 0 or 1 audiences"),
        };
        let of_pod = list(pod, &["spec", "volumes"])
            .iter()
            .flat_map(|volume| list(volume, &["projected", "sources"]))
            .filter_map(|source| source.get("serviceAccountToken"))
            .any(|token| text(token, &["audience"]) == audience);
        if of_pod {
            return Ok(());
        }
        let grant = Attributes {
            user: asked.request.user.clone(),
            verb: "request-serviceaccounts-token-audience".to_owned(),
            resource_request: true,
            resource: audience.to_owned(),
            namespace: asked.request.namespace.to_owned(),
            name: asked.request.name.to_owned(),
            ..Attributes::default()
        };
        match self.authorizer.authorize(&grant) {
            Decision::Allow(_) => Ok(()),
            _ => asked.refuse(format!("audience {audience:?} not found in pod spec volume")),
        }
    }
}

fn pod_status(asked: &Asked<'_>) -> Result<(), Refusal> {
    let node = asked.node;
    let Some(old) = asked.request.old else {
        return asked.refuse("unexpected operation on a pod's status");
    };
    if text(old, &["spec", "nodeName"]) != node {
        return asked.refuse(format!(
            "node {node:?} can only update pod status for pods with spec.nodeName set to itself"
        ));
    }
    let Some(new) = asked.object else { return Ok(()) };
    if differ(old, new, &["metadata", "labels"]) {
        return asked.refuse(format!("node {node:?} cannot update labels through pod status"));
    }
    if differ(old, new, &["status", "resourceClaimStatuses"]) {
        return asked.refuse(format!("node {node:?} cannot update resource claim statuses"));
    }
    Ok(())
}

fn claim_status(asked: &Asked<'_>) -> Result<(), Refusal> {
    let (Some(old), Some(new)) = (asked.request.old, asked.object) else {
        return asked.refuse("unexpected operation on a claim's status");
    };
    let changed = differ(old, new, &["spec"])
        || differ(old, new, &["metadata", "labels"])
        || differ(old, new, &["metadata", "annotations"]);
    if changed {
        return asked.refuse(format!(
            "node {:?} is not allowed to update fields other than status",
            asked.node
        ));
    }
    Ok(())
}

fn node_object(asked: &Asked<'_>) -> Result<(), Refusal> {
    let node = asked.node;
    let requested = asked.request.object_name(asked.object);
    if requested != node {
        return asked.refuse(format!("node {node:?} is not allowed to modify node {requested:?}"));
    }
    let Some(new) = asked.object else { return Ok(()) };
    let old = asked.request.old.unwrap_or(&Value::Null);
    let forbidden = forbidden_labels(old, new);
    if !forbidden.is_empty() {
        let labels = forbidden.into_iter().collect::<Vec<_>>().join(", ");
        return asked.refuse(match asked.request.operation {
            Operation::Create => {
                format!("node {node:?} is not allowed to set the following labels: {labels}")
            }
            _ => format!("is not allowed to modify labels: {labels}"),
        });
    }
    if at(new, &["spec", "configSource"]).is_some_and(|source| !source.is_null()) {
        return asked.refuse(format!("node {node:?} is not allowed to set configSource"));
    }
    match asked.request.operation {
        Operation::Create if !list(new, &["metadata", "ownerReferences"]).is_empty() => {
            asked.refuse(format!("node {node:?} is not allowed to set ownerReferences"))
        }
        Operation::Update if differ(old, new, &["spec", "taints"]) => {
            asked.refuse(format!("node {node:?} is not allowed to modify taints"))
        }
        // An owner that does not exist would have the garbage collector delete the node.
        Operation::Update if differ(old, new, &["metadata", "ownerReferences"]) => {
            asked.refuse(format!("node {node:?} is not allowed to modify ownerReferences"))
        }
        _ => Ok(()),
    }
}

fn lease(asked: &Asked<'_>) -> Result<(), Refusal> {
    if asked.request.namespace != "kube-node-lease" {
        return asked.refuse("can only access leases in the \"kube-node-lease\" system namespace");
    }
    if asked.request.operation == Operation::Create
        && asked.request.object_name(asked.object) != asked.node
    {
        return asked
            .refuse("can only access node lease with the same name as the requesting node");
    }
    Ok(())
}

fn csi_node(asked: &Asked<'_>) -> Result<(), Refusal> {
    if asked.request.operation == Operation::Create
        && asked.request.object_name(asked.object) != asked.node
    {
        return asked.refuse("can only access CSINode with the same name as the requesting node");
    }
    Ok(())
}

/// Whether a field changes; empty is the same as absent.
fn differ(old: &Value, new: &Value, path: &[&str]) -> bool {
    let present = |object| {
        at(object, path).filter(|value| match value {
            Value::Null => false,
            Value::Array(items) => !items.is_empty(),
            Value::Object(fields) => !fields.is_empty(),
            _ => true,
        })
    };
    present(old) != present(new)
}

/// Labels of Kubernetes' own domains that a kubelet may set on its node.
const KUBELET_LABELS: [&str; 11] = [
    "kubernetes.io/hostname",
    "kubernetes.io/arch",
    "kubernetes.io/os",
    "beta.kubernetes.io/arch",
    "beta.kubernetes.io/os",
    "beta.kubernetes.io/instance-type",
    "node.kubernetes.io/instance-type",
    "failure-domain.beta.kubernetes.io/region",
    "failure-domain.beta.kubernetes.io/zone",
    "topology.kubernetes.io/region",
    "topology.kubernetes.io/zone",
];

/// The labels that change and are not a kubelet's to change.
fn forbidden_labels(old: &Value, new: &Value) -> BTreeSet<String> {
    let nothing = Map::new();
    let labels = |object| {
        at(object, &["metadata", "labels"]).and_then(Value::as_object).unwrap_or(&nothing).clone()
    };
    let (old, new) = (labels(old), labels(new));
    old.keys()
        .chain(new.keys())
        .filter(|key| old.get(*key) != new.get(*key) && !is_kubelets(key))
        .cloned()
        .collect()
}

fn is_kubelets(label: &str) -> bool {
    let Some((domain, _)) = label.split_once('/') else { return true };
    let within = |parent: &str| {
        domain.strip_suffix(parent).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    if within("node-restriction.kubernetes.io") {
        return false;
    }
    let kubernetes = within("kubernetes.io") || within("k8s.io");
    !kubernetes
        || KUBELET_LABELS.contains(&label)
        || within("kubelet.kubernetes.io")
        || within("node.kubernetes.io")
}
