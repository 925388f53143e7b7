//! What the default roles let whom do, by the sentences of "Using RBAC Authorization".

use std::sync::Arc;

use super::*;
use crate::auth::{
    Authorizer, Decision, authorizers,
    fields::{list, name, namespace, text},
    fixture::{Objects, path, resource, user},
};

#[test]
fn the_documented_defaults() {
    let lookup = Arc::new(Objects::of(default_rbac()));
    // Whom an administrator gave `view`, `edit` and `admin` in `default`.
    for role in ["view", "edit", "admin"] {
        lookup.add(binding_object(
            "RoleBinding",
            &json!({ "name": role, "namespace": "default" }),
            "ClusterRole",
            role,
            &[Subject::User(match role {
                "view" => "viewer",
                "edit" => "editor",
                _ => "owner",
            })],
        ));
    }
    let authorizer = authorizers(lookup);
    let anonymous = user("system:anonymous", &["system:unauthenticated"]);
    let someone = user("someone", &["system:authenticated"]);
    let controller = |name: &str| user(&format!("system:serviceaccount:kube-system:{name}"), &[]);
    let (viewer, editor, owner) = (user("viewer", &[]), user("editor", &[]), user("owner", &[]));
    let scheduler = user("system:kube-scheduler", &[]);
    let proxy = user("system:kube-proxy", &[]);
    let table = [
        ("anonymous users see health", path(&anonymous, "get", "/readyz"), true),
        ("… and the version", path(&anonymous, "get", "/version"), true),
        ("… but no discovery", path(&anonymous, "get", "/apis"), false),
        ("… nor pods", resource(&anonymous, "list", "", "pods", "default", ""), false),
        ("users discover", path(&someone, "get", "/apis/apps/v1"), true),
        ("… and OpenAPI", path(&someone, "get", "/openapi/v3"), true),
        ("… but no metrics", path(&someone, "get", "/metrics"), false),
        (
            "users ask about themselves",
            resource(
                &someone,
                "create",
                "authorization.k8s.io",
                "selfsubjectaccessreviews",
                "",
                "",
            ),
            true,
        ),
        ("view reads pods", resource(&viewer, "watch", "", "pods", "default", ""), true),
        ("… and logs", resource(&viewer, "get", "", "pods/log", "default", "p"), true),
        ("… in its namespace", resource(&viewer, "list", "", "pods", "other", ""), false),
        ("view reads no secrets", resource(&viewer, "get", "", "secrets", "default", "s"), false),
        (
            "view sees no roles",
            resource(&viewer, "list", "rbac.authorization.k8s.io", "roles", "default", ""),
            false,
        ),
        ("view changes nothing", resource(&viewer, "delete", "", "pods", "default", "p"), false),
        ("edit changes", resource(&editor, "patch", "apps", "deployments", "default", "d"), true),
        ("edit views", resource(&editor, "list", "", "pods", "default", ""), true),
        ("edit reads secrets", resource(&editor, "get", "", "secrets", "default", "s"), true),
        ("edit executes", resource(&editor, "create", "", "pods/exec", "default", "p"), true),
        (
            "edit grants nothing",
            resource(&editor, "create", "rbac.authorization.k8s.io", "roles", "default", ""),
            false,
        ),
        (
            "admin grants",
            resource(&owner, "create", "rbac.authorization.k8s.io", "rolebindings", "default", ""),
            true,
        ),
        (
            "admin sets no quota",
            resource(&owner, "update", "", "resourcequotas", "default", "q"),
            false,
        ),
        ("the scheduler binds", resource(&scheduler, "create", "", "pods/binding", "a", "p"), true),
        ("… and reads no secret", resource(&scheduler, "get", "", "secrets", "a", "s"), false),
        (
            "the proxy watches slices",
            resource(&proxy, "watch", "discovery.k8s.io", "endpointslices", "", ""),
            true,
        ),
        (
            "the deployment controller",
            resource(
                &controller("deployment-controller"),
                "create",
                "apps",
                "replicasets",
                "a",
                "",
            ),
            true,
        ),
        (
            "… makes no pods",
            resource(&controller("deployment-controller"), "create", "", "pods", "a", ""),
            false,
        ),
        (
            "the replica set controller does",
            resource(&controller("replicaset-controller"), "create", "", "pods", "a", ""),
            true,
        ),
        (
            "the namespace controller empties",
            resource(
                &controller("namespace-controller"),
                "deletecollection",
                "apps",
                "deployments",
                "a",
                "",
            ),
            true,
        ),
        (
            "no controller of another namespace",
            resource(
                &user("system:serviceaccount:default:replicaset-controller", &[]),
                "create",
                "",
                "pods",
                "a",
                "",
            ),
            false,
        ),
    ];
    for (sentence, attributes, expected) in table {
        let decision = authorizer.authorize(&attributes);
        assert_eq!(matches!(decision, Decision::Allow(_)), expected, "{sentence}: {decision:?}");
    }
}

/// Kind, namespace and name.
fn place(object: &Value) -> (&str, &str, &str) {
    (text(object, &["kind"]), namespace(object), name(object))
}

#[test]
fn names_are_unique_and_bindings_find_their_roles() {
    let all = default_rbac();
    let mut places: Vec<_> = all.iter().map(place).collect();
    let count = places.len();
    places.sort_unstable();
    places.dedup();
    assert_eq!(places.len(), count);
    for object in &all {
        assert_eq!(
            text(object, &["metadata", "labels", "kubernetes.io/bootstrapping"]),
            "rbac-defaults"
        );
        if let Some(role) = object.get("roleRef") {
            let kind = text(role, &["kind"]);
            let in_namespace = if kind == "Role" { namespace(object) } else { "" };
            assert!(places.contains(&(kind, in_namespace, text(role, &["name"]))), "{object}");
        }
        for rule in list(object, &["rules"]) {
            assert!(!list(rule, &["verbs"]).is_empty(), "{object}");
        }
    }
}
