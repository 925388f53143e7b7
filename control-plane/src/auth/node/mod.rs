//! The node authorizer: a kubelet may do what its node needs, and no more.
//!
//! ```text
//! node ◄── pods bound to it ──► secrets, config maps, claims, service accounts they refer to
//! ```
//!
//! A kubelet reads an object of the right-hand side only if a pod of its node refers to it, reads its
//! own Node, CSINode and Lease only, and gets tokens only of service accounts that its pods run as.
//! What every kubelet may do regardless of which node it is, stands in a table of rules
//! (`rules.rs`). What it may *write* into its objects is the NodeRestriction admission plugin's
//! concern.

mod graph;
pub(crate) mod rules;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use self::graph::Graph;
pub(crate) use self::graph::{Kind, MIRROR, references};
use super::{Attributes, Authorizer, Decision, UserInfo, fields::text, rbac::Rule};
use crate::lookup::Lookup;

/// The group of all kubelets.
pub(crate) const NODES: &str = "system:nodes";

/// The authorizer.
pub struct NodeAuthorizer {
    lookup: Arc<dyn Lookup>,
    graph: Graph,
    rules: Vec<Rule>,
}

/// The node that a user is, if it is one: `system:node:<name>` in the group `system:nodes`.
pub(crate) fn node_name(user: &UserInfo) -> Option<&str> {
    let name = user.username.strip_prefix("system:node:").filter(|name| !name.is_empty())?;
    user.groups.iter().any(|group| group == NODES).then_some(name)
}

type Verdict = Result<(), String>;

impl NodeAuthorizer {
    /// An authorizer over the pods of `lookup`.
    pub fn new(lookup: Arc<dyn Lookup>) -> Self {
        Self { lookup, graph: Graph::new(), rules: rules::for_all_nodes() }
    }

    fn decide(&self, node: &str, request: &Attributes) -> Verdict {
        match (request.group.as_str(), request.resource.as_str()) {
            ("", "secrets") => self.read_of_pods(node, Kind::Secret, request),
            ("", "configmaps") => self.read_of_pods(node, Kind::ConfigMap, request),
            ("", "persistentvolumeclaims") if request.subresource == "status" => {
                only(&request.verb, &["get", "update", "patch"])?;
                self.referred_to(node, Kind::Claim, &request.namespace, &request.name)
            }
            ("", "persistentvolumeclaims") => {
                only(&request.verb, &["get"])?;
                self.read_of_pods(node, Kind::Claim, request)
            }
            ("", "persistentvolumes") => self.volume(node, request),
            ("resource.k8s.io", "resourceclaims") => {
                only(&request.verb, &["get"])?;
                self.read_of_pods(node, Kind::ResourceClaim, request)
            }
            ("storage.k8s.io", "volumeattachments") => self.attachment(node, request),
            ("", "serviceaccounts") => self.token(node, request),
            ("", "nodes") => own_node(node, request),
            ("", "pods") => self.pod(node, request),
            ("coordination.k8s.io", "leases") => own_lease(node, request),
            ("storage.k8s.io", "csinodes") => own_csi_node(node, request),
            _ => self.by_rules(request),
        }
    }

    fn by_rules(&self, request: &Attributes) -> Verdict {
        if self.rules.iter().any(|rule| rule.allows(request)) { Ok(()) } else { Err(String::new()) }
    }

    /// Single objects that a pod of the node refers to.
    fn read_of_pods(&self, node: &str, kind: Kind, request: &Attributes) -> Verdict {
        if !request.subresource.is_empty() {
            return Err("cannot read subresource".to_owned());
        }
        if request.name.is_empty() {
            return Err("No Object name found".to_owned());
        }
        if request.namespace.is_empty() {
            return Err("can only read namespaced object of this type".to_owned());
        }
        if !matches!(request.verb.as_str(), "get" | "list" | "watch") {
            return Err("can only read resources of this type".to_owned());
        }
        self.referred_to(node, kind, &request.namespace, &request.name)
    }

    fn referred_to(&self, node: &str, kind: Kind, namespace: &str, name: &str) -> Verdict {
        if self.graph.refers(&*self.lookup, node, kind, namespace, name) {
            return Ok(());
        }
        Err(format!("no relationship found between node '{node}' and this object"))
    }

    /// Volumes whose claim a pod of the node uses.
    fn volume(&self, node: &str, request: &Attributes) -> Verdict {
        only(&request.verb, &["get"])?;
        if !request.subresource.is_empty() {
            return Err("cannot get subresource".to_owned());
        }
        let volume = self.lookup.get("", "persistentvolumes", None, &request.name);
        let claim =
            |field| volume.as_ref().map_or("", |volume| text(volume, &["spec", "claimRef", field]));
        self.referred_to(node, Kind::Claim, claim("namespace"), claim("name"))
    }

    /// Attachments to the node.
    fn attachment(&self, node: &str, request: &Attributes) -> Verdict {
        only(&request.verb, &["get"])?;
        let attachment =
            self.lookup.get("storage.k8s.io", "volumeattachments", None, &request.name);
        match attachment {
            Some(attachment) if text(&attachment, &["spec", "nodeName"]) == node => Ok(()),
            _ => Err(format!("no relationship found between node '{node}' and this object")),
        }
    }

    fn token(&self, node: &str, request: &Attributes) -> Verdict {
        if request.subresource != "token" {
            // Image pulls with service-account tokens read the account itself.
            only(&request.verb, &["get"])?;
        } else if request.verb != "create" {
            return Err("can only create tokens for individual service accounts".to_owned());
        }
        if request.name.is_empty() {
            return Err("can only create tokens for individual service accounts".to_owned());
        }
        if !matches!(request.subresource.as_str(), "token" | "") {
            return Err("can only create tokens for individual service accounts".to_owned());
        }
        self.referred_to(node, Kind::ServiceAccount, &request.namespace, &request.name)
    }

    fn pod(&self, node: &str, request: &Attributes) -> Verdict {
        match (request.subresource.as_str(), request.verb.as_str()) {
            ("", "get") => self.bound(node, request),
            ("", "list" | "watch") => {
                let own = request
                    .field_selector
                    .iter()
                    .any(|(field, value)| field == "spec.nodeName" && value == node);
                if own {
                    return Ok(());
                }
                if request.name.is_empty() {
                    return Err(
                        "can only list/watch pods with spec.nodeName field selector".to_owned()
                    );
                }
                self.bound(node, request)
            }
            // Which pods, and with what in them, is for NodeRestriction to say.
            ("", "create" | "delete") | ("status", "update" | "patch") | ("eviction", "create") => {
                Ok(())
            }
            _ => self.by_rules(request),
        }
    }

    fn bound(&self, node: &str, request: &Attributes) -> Verdict {
        let pod = self.lookup.get("", "pods", Some(&request.namespace), &request.name);
        match pod {
            Some(pod) if text(&pod, &["spec", "nodeName"]) == node => Ok(()),
            _ => Err(format!("no relationship found between node '{node}' and this object")),
        }
    }
}

fn only(verb: &str, verbs: &[&str]) -> Verdict {
    if verbs.contains(&verb) {
        return Ok(());
    }
    Err(format!("can only {} this", verbs.join(", ")))
}

fn own_node(node: &str, request: &Attributes) -> Verdict {
    match (request.subresource.as_str(), request.verb.as_str()) {
        // The name of a new node is in the object: NodeRestriction looks there.
        ("", "create" | "update" | "patch") | ("status", "update" | "patch") => Ok(()),
        ("", "get" | "list" | "watch") => match request.name.as_str() {
            name if name == node => Ok(()),
            "" => Err(format!("node '{node}' cannot read all nodes, only its own Node object")),
            name => Err(format!("node '{node}' cannot read '{name}', only its own Node object")),
        },
        _ => Err(String::new()),
    }
}

fn own_lease(node: &str, request: &Attributes) -> Verdict {
    // A new lease's name is in the object: NodeRestriction looks there.
    match request.verb.as_str() {
        "create" => {}
        "get" | "update" | "patch" | "delete" if request.name == node => {}
        "get" | "update" | "patch" | "delete" => {
            return Err(
                "can only access node lease with the same name as the requesting node".to_owned()
            );
        }
        _ => {
            return Err("can only get, create, update, patch, or delete a node lease".to_owned());
        }
    }
    if request.namespace != "kube-node-lease" {
        return Err("can only access leases in the \"kube-node-lease\" system namespace".to_owned());
    }
    Ok(())
}

fn own_csi_node(node: &str, request: &Attributes) -> Verdict {
    match request.verb.as_str() {
        "create" => Ok(()),
        "get" | "update" | "patch" | "delete" if request.name == node => Ok(()),
        "get" | "update" | "patch" | "delete" => {
            Err("can only access CSINode with the same name as the requesting node".to_owned())
        }
        _ => Err("can only get, create, update, patch, or delete a CSINode".to_owned()),
    }
}

impl Authorizer for NodeAuthorizer {
    fn authorize(&self, attributes: &Attributes) -> Decision {
        let Some(node) = node_name(&attributes.user) else {
            return Decision::NoOpinion(String::new());
        };
        let decided = if attributes.resource_request {
            self.decide(node, attributes)
        } else {
            self.by_rules(attributes)
        };
        match decided {
            Ok(()) => Decision::Allow(String::new()),
            Err(reason) => Decision::NoOpinion(reason),
        }
    }
}
