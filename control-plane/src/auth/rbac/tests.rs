//! The sentences of "Using RBAC Authorization".

use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::auth::{
    fixture::{Objects, path, resource, user},
    messages,
};

fn rule(verbs: &[&str], groups: &[&str], resources: &[&str], names: &[&str]) -> Rule {
    let own = |list: &[&str]| list.iter().map(|&s| s.to_owned()).collect();
    Rule {
        verbs: own(verbs),
        api_groups: own(groups),
        resources: own(resources),
        resource_names: own(names),
        non_resource_urls: vec![],
    }
}

#[test]
fn what_a_rule_matches() {
    let u = user("u", &[]);
    let table = [
        (
            "a plain rule",
            rule(&["get"], &[""], &["pods"], &[]),
            resource(&u, "get", "", "pods", "n", "x"),
            true,
        ),
        (
            "another verb",
            rule(&["get"], &[""], &["pods"], &[]),
            resource(&u, "list", "", "pods", "n", ""),
            false,
        ),
        (
            "another group",
            rule(&["get"], &[""], &["pods"], &[]),
            resource(&u, "get", "apps", "pods", "n", "x"),
            false,
        ),
        (
            "no subresource by its parent",
            rule(&["get"], &[""], &["pods"], &[]),
            resource(&u, "get", "", "pods/log", "n", "x"),
            false,
        ),
        (
            "a subresource by its name",
            rule(&["get"], &[""], &["pods/log"], &[]),
            resource(&u, "get", "", "pods/log", "n", "x"),
            true,
        ),
        (
            "no parent by its subresource",
            rule(&["get"], &[""], &["pods/log"], &[]),
            resource(&u, "get", "", "pods", "n", "x"),
            false,
        ),
        (
            "all resources with all subresources",
            rule(&["get"], &[""], &["*"], &[]),
            resource(&u, "get", "", "pods/log", "n", "x"),
            true,
        ),
        (
            "one subresource of all",
            rule(&["update"], &["*"], &["*/scale"], &[]),
            resource(&u, "update", "apps", "deployments/scale", "n", "x"),
            true,
        ),
        (
            "… and no other",
            rule(&["update"], &["*"], &["*/scale"], &[]),
            resource(&u, "update", "apps", "deployments/status", "n", "x"),
            false,
        ),
        (
            "… nor the object",
            rule(&["update"], &["*"], &["*/scale"], &[]),
            resource(&u, "update", "apps", "deployments", "n", "x"),
            false,
        ),
        (
            "every verb",
            rule(&["*"], &["apps"], &["deployments"], &[]),
            resource(&u, "impersonate", "apps", "deployments", "n", "x"),
            true,
        ),
        (
            "by name",
            rule(&["get"], &[""], &["configmaps"], &["a"]),
            resource(&u, "get", "", "configmaps", "n", "a"),
            true,
        ),
        (
            "another name",
            rule(&["get"], &[""], &["configmaps"], &["a"]),
            resource(&u, "get", "", "configmaps", "n", "b"),
            false,
        ),
        (
            "create cannot be restricted by name",
            rule(&["create"], &[""], &["configmaps"], &["a"]),
            resource(&u, "create", "", "configmaps", "n", ""),
            false,
        ),
        (
            "no path by a resource",
            rule(&["*"], &["*"], &["*"], &[]),
            path(&u, "get", "/metrics"),
            false,
        ),
    ];
    for (sentence, rule, request, expected) in table {
        assert_eq!(rule.allows(&request), expected, "{sentence}");
    }
    let url = |url: &str| Rule {
        verbs: vec!["get".into()],
        non_resource_urls: vec![url.into()],
        ..Rule::default()
    };
    for (pattern, asked, expected) in [
        ("/healthz", "/healthz", true),
        ("/healthz", "/healthz/etcd", false),
        ("/healthz/*", "/healthz/etcd", true),
        ("/healthz/*", "/healthz", false),
        ("*", "/anything", true),
    ] {
        assert_eq!(url(pattern).allows(&path(&u, "get", asked)), expected, "{pattern} {asked}");
    }
    assert!(!url("*").allows(&resource(&u, "get", "", "pods", "", "")));
}

fn role(kind: &str, namespace: Option<&str>, name: &str, rule: &Rule) -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind,
        "metadata": { "name": name, "namespace": namespace },
        "rules": [rule.to_value()],
    })
}

fn binding(kind: &str, namespace: Option<&str>, role: (&str, &str), subjects: &Value) -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind,
        "metadata": { "name": format!("bind-{}", role.1), "namespace": namespace },
        "roleRef": { "apiGroup": GROUP, "kind": role.0, "name": role.1 },
        "subjects": subjects,
    })
}

fn cluster() -> Objects {
    let pods = rule(&["get", "list"], &[""], &["pods"], &[]);
    Objects::of([
        role("ClusterRole", None, "reader", &pods),
        role("Role", Some("a"), "local", &rule(&["delete"], &[""], &["pods"], &[])),
        binding(
            "ClusterRoleBinding",
            None,
            ("ClusterRole", "reader"),
            &json!([{ "kind": "Group", "name": "staff" }]),
        ),
        binding(
            "RoleBinding",
            Some("a"),
            ("ClusterRole", "reader"),
            &json!([
                { "kind": "User", "name": "jane" },
                { "kind": "ServiceAccount", "name": "robot", "namespace": "b" },
            ]),
        ),
        binding(
            "RoleBinding",
            Some("a"),
            ("Role", "local"),
            &json!([{ "kind": "ServiceAccount", "name": "own" }]),
        ),
        binding(
            "RoleBinding",
            Some("c"),
            ("Role", "gone"),
            &json!([{ "kind": "User", "name": "jane" }]),
        ),
    ])
}

#[test]
fn whom_bindings_bind_and_where() {
    let rbac = Rbac::new(Arc::new(cluster()));
    let jane = user("jane", &[]);
    let staff = user("x", &["staff"]);
    let robot = user("system:serviceaccount:b:robot", &[]);
    let own = user("system:serviceaccount:a:own", &[]);
    let table = [
        ("a cluster role binding holds in every namespace", &staff, "list", "z", true),
        ("… and for all of them", &staff, "list", "", true),
        ("a role binding holds in its namespace", &jane, "list", "a", true),
        ("… in no other", &jane, "list", "b", false),
        ("… and not for all", &jane, "list", "", false),
        ("a service account of another namespace", &robot, "get", "a", true),
        ("a service account of the binding's own", &own, "delete", "a", true),
        ("a role lies in its namespace", &own, "delete", "b", false),
    ];
    for (sentence, user, verb, namespace, expected) in table {
        let decision = rbac.authorize(&resource(user, verb, "", "pods", namespace, ""));
        assert_eq!(matches!(decision, Decision::Allow(_)), expected, "{sentence}");
    }
    assert_eq!(
        rbac.authorize(&resource(&jane, "list", "", "pods", "a", "")),
        Decision::Allow(
            "RBAC: allowed by RoleBinding \"bind-reader/a\" of ClusterRole \"reader\" to User \
             \"jane\""
                .into()
        )
    );
    assert_eq!(
        rbac.authorize(&resource(&jane, "list", "", "pods", "c", "")),
        Decision::NoOpinion("RBAC: [role.rbac.authorization.k8s.io \"gone\" not found]".into())
    );
}

#[test]
fn changes_take_effect_at_once_whether_or_not_they_are_counted() {
    for counts in [true, false] {
        let objects = Arc::new(cluster().counting(counts));
        let rbac = Rbac::new(Arc::clone(&objects) as Arc<dyn Lookup>);
        let request = resource(&user("new", &[]), "list", "", "pods", "a", "");
        let allowed = || matches!(rbac.authorize(&request), Decision::Allow(_));
        assert!(!allowed());
        let grant = binding(
            "RoleBinding",
            Some("a"),
            ("ClusterRole", "reader"),
            &json!([{ "kind": "User", "name": "new" }]),
        );
        objects.add(grant.clone());
        assert!(allowed());
        objects.remove(&grant);
        assert!(!allowed());
    }
}

#[test]
fn the_words_of_a_refusal() {
    let x = user("x", &[]);
    for (request, message) in [
        (
            resource(&x, "list", "", "pods", "default", ""),
            "pods is forbidden: User \"x\" cannot list resource \"pods\" in API group \"\" in the \
             namespace \"default\"",
        ),
        (
            resource(&x, "update", "apps", "deployments/scale", "d", "web"),
            "deployments.apps \"web\" is forbidden: User \"x\" cannot update resource \
             \"deployments/scale\" in API group \"apps\" in the namespace \"d\"",
        ),
        (
            resource(&x, "get", "", "nodes", "", "n"),
            "nodes \"n\" is forbidden: User \"x\" cannot get resource \"nodes\" in API group \"\" at \
             the cluster scope",
        ),
        (path(&x, "get", "/metrics"), "forbidden: User \"x\" cannot get path \"/metrics\""),
    ] {
        let refusal = messages::forbidden(&request, "");
        assert_eq!((refusal.code, refusal.message.as_str()), (403, message));
    }
}

#[test]
fn what_is_held_covers_what_is_wanted() {
    let held = |rules: &[Rule], wanted: &Rule| {
        wanted.break_down().iter().all(|part| rules.iter().any(|rule| rule.covers(part)))
    };
    let pods = rule(&["get", "list"], &[""], &["pods"], &[]);
    let all = rule(&["*"], &["*"], &["*"], &[]);
    let table = [
        ("the same", vec![pods.clone()], pods.clone(), true),
        ("less", vec![pods.clone()], rule(&["get"], &[""], &["pods"], &["a"]), true),
        ("more verbs", vec![pods.clone()], rule(&["get", "delete"], &[""], &["pods"], &[]), false),
        ("all verbs", vec![pods.clone()], rule(&["*"], &[""], &["pods"], &[]), false),
        ("all of all", vec![all.clone()], all.clone(), true),
        ("anything by all", vec![all], rule(&["x"], &["y"], &["z/w"], &["v"]), true),
        (
            "all names from one",
            vec![rule(&["get"], &[""], &["pods"], &["a"])],
            rule(&["get"], &[""], &["pods"], &[]),
            false,
        ),
        (
            "in parts",
            vec![rule(&["get"], &[""], &["pods"], &[]), rule(&["list"], &[""], &["pods"], &[])],
            pods,
            true,
        ),
        (
            "one subresource of all",
            vec![rule(&["get"], &["*"], &["*/scale"], &[])],
            rule(&["get"], &["apps"], &["deployments/scale"], &[]),
            true,
        ),
        (
            "… not from one of them",
            vec![rule(&["get"], &["*"], &["deployments/scale"], &[])],
            rule(&["get"], &["*"], &["*/scale"], &[]),
            false,
        ),
    ];
    for (sentence, rules, wanted, expected) in table {
        assert_eq!(held(&rules, &wanted), expected, "{sentence}");
    }
}

#[test]
fn a_decision_takes_microseconds() {
    let objects = Objects::of(crate::auth::bootstrap::default_rbac());
    for n in 0..2000 {
        let subjects = json!([{ "kind": "User", "name": format!("user-{n}") }]);
        let mut bound = binding(
            "RoleBinding",
            Some(&format!("ns-{}", n % 50)),
            ("ClusterRole", "edit"),
            &subjects,
        );
        bound["metadata"]["name"] = json!(format!("b{n}"));
        objects.add(bound);
    }
    let rbac = Rbac::new(Arc::new(objects));
    let request = resource(
        &user("user-7", &["system:authenticated"]),
        "update",
        "apps",
        "deployments",
        "ns-7",
        "x",
    );
    assert!(matches!(rbac.authorize(&request), Decision::Allow(_)));
    let start = std::time::Instant::now();
    for _ in 0..1000 {
        assert!(matches!(rbac.authorize(&request), Decision::Allow(_)));
    }
    // A debug build on a busy machine; far from what reading 2000 bindings each time would take.
    let each = start.elapsed() / 1000;
    assert!(each < std::time::Duration::from_micros(500), "{each:?}");
}
