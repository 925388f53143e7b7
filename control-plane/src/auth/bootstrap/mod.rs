//! The default roles and bindings that Kubernetes documents ("Using RBAC Authorization").
//!
//! They are tables of `Grant`s: `users.rs` for people and components, `controllers.rs` for the
//! controllers, each of which is a service account of `kube-system`. [`default_rbac`] makes objects
//! of them; the API server puts those into the store, and adds at each start what they lack, unless
//! their annotation `rbac.authorization.kubernetes.io/autoupdate` says otherwise.

mod controllers;
mod users;

#[cfg(test)]
mod tests;

use serde_json::{Value, json};

use super::rbac::{GROUP, Rule};

/// One rule of a table. Several words are separated by spaces; the core group is written `core`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Grant {
    /// Verbs, API groups, resources.
    Api(&'static str, &'static str, &'static str),
    /// The same for objects of these names only.
    Named(&'static str, &'static str, &'static str, &'static str),
    /// Verbs and paths.
    Url(&'static str, &'static str),
}

/// A role of a table.
struct Role {
    name: &'static str,
    grants: &'static [Grant],
}

/// Who is bound to a role of a table.
#[derive(Clone, Copy)]
enum Subject {
    User(&'static str),
    Group(&'static str),
    /// A service account of `kube-system`.
    ServiceAccount(&'static str),
}

/// A binding of a table.
struct Binding {
    name: &'static str,
    role: &'static str,
    subjects: &'static [Subject],
}

impl Grant {
    fn rule(&self) -> Rule {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let groups = |text: &str| {
            text.split_whitespace()
                .map(|group| if group == "core" { String::new() } else { group.to_owned() })
                .collect()
        };
        match *self {
            Self::Api(verbs, api_groups, resources) => Rule {
                verbs: words(verbs),
                api_groups: groups(api_groups),
                resources: words(resources),
                ..Rule::default()
            },
            Self::Named(verbs, api_groups, resources, names) => Rule {
                resource_names: words(names),
                ..Self::Api(verbs, api_groups, resources).rule()
            },
            Self::Url(verbs, urls) => {
                Rule { verbs: words(verbs), non_resource_urls: words(urls), ..Rule::default() }
            }
        }
    }
}

/// A table's rules.
pub(crate) fn rules(grants: &[Grant]) -> Vec<Rule> {
    grants.iter().map(Grant::rule).collect()
}

fn metadata(object_name: &str, namespace: Option<&str>) -> Value {
    let mut metadata = json!({
        "name": object_name,
        "labels": { "kubernetes.io/bootstrapping": "rbac-defaults" },
        "annotations": { "rbac.authorization.kubernetes.io/autoupdate": "true" },
    });
    if let Some(namespace) = namespace {
        metadata["namespace"] = json!(namespace);
    }
    metadata
}

fn role_object(kind: &str, metadata: &Value, rules: &[Rule]) -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": kind,
        "metadata": metadata,
        "rules": rules.iter().map(Rule::to_value).collect::<Vec<_>>(),
    })
}

fn binding_object(
    kind: &str,
    metadata: &Value,
    role_kind: &str,
    role: &str,
    subjects: &[Subject],
) -> Value {
    let subjects: Vec<_> = subjects
        .iter()
        .map(|subject| match subject {
            Subject::User(name) => json!({ "apiGroup": GROUP, "kind": "User", "name": name }),
            Subject::Group(name) => json!({ "apiGroup": GROUP, "kind": "Group", "name": name }),
            Subject::ServiceAccount(name) => {
                json!({ "kind": "ServiceAccount", "name": name, "namespace": "kube-system" })
            }
        })
        .collect();
    let mut object = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": kind,
        "metadata": metadata,
        "roleRef": { "apiGroup": GROUP, "kind": role_kind, "name": role },
    });
    if !subjects.is_empty() {
        object["subjects"] = json!(subjects);
    }
    object
}

/// All default ClusterRoles, ClusterRoleBindings, Roles and RoleBindings, in an order in which they
/// can be created (namespaces `kube-system` and `kube-public` first, by the caller).
#[must_use]
pub fn default_rbac() -> Vec<Value> {
    let mut objects = Vec::new();
    for role in users::CLUSTER_ROLES {
        let mut grants = rules(role.grants);
        if role.name == "system:node" {
            grants.extend(super::node::rules::for_all_nodes());
        }
        objects.push(role_object("ClusterRole", &metadata(role.name, None), &grants));
    }
    objects.extend(aggregated());
    for binding in users::CLUSTER_ROLE_BINDINGS {
        objects.push(binding_object(
            "ClusterRoleBinding",
            &metadata(binding.name, None),
            "ClusterRole",
            binding.role,
            binding.subjects,
        ));
    }
    for controller in controllers::CONTROLLERS {
        let role = format!("system:controller:{}", controller.name);
        let metadata = metadata(&role, None);
        objects.push(role_object("ClusterRole", &metadata, &rules(controller.grants)));
        objects.push(binding_object(
            "ClusterRoleBinding",
            &metadata,
            "ClusterRole",
            &role,
            &[Subject::ServiceAccount(controller.name)],
        ));
    }
    for role in users::KUBE_SYSTEM_ROLES {
        let metadata = metadata(role.name, Some("kube-system"));
        objects.push(role_object("Role", &metadata, &rules(role.grants)));
    }
    for binding in users::KUBE_SYSTEM_ROLE_BINDINGS {
        objects.push(binding_object(
            "RoleBinding",
            &metadata(binding.name, Some("kube-system")),
            "Role",
            binding.role,
            binding.subjects,
        ));
    }
    objects
}

/// `admin`, `edit` and `view`: each has its own rules in a role that is labelled for aggregation, and
/// those of the roles below it.
fn aggregated() -> Vec<Value> {
    let mut objects = Vec::new();
    let levels = [("view", users::VIEW), ("edit", users::EDIT), ("admin", users::ADMIN)];
    let mut all: Vec<Rule> = Vec::new();
    for (index, (level, grants)) in levels.iter().enumerate() {
        let own = rules(grants);
        all.extend(own.iter().cloned());
        let label = |level: &str| format!("rbac.authorization.k8s.io/aggregate-to-{level}");
        let part_name = format!("system:aggregate-to-{level}");
        let mut part = role_object("ClusterRole", &metadata(&part_name, None), &own);
        part["metadata"]["labels"][label(level)] = json!("true");
        objects.push(part);
        let mut whole = role_object("ClusterRole", &metadata(level, None), &all);
        whole["aggregationRule"] =
            json!({ "clusterRoleSelectors": [{ "matchLabels": { label(level): "true" } }] });
        // What may be viewed may be edited, and so on.
        if let Some((next, _)) = levels.get(index + 1) {
            whole["metadata"]["labels"][label(next)] = json!("true");
        }
        objects.push(whole);
    }
    objects
}
