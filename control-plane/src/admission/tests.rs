//! The sentences of "Admission Control in Kubernetes", plugin by plugin, through the whole chain.

use serde_json::json;

use super::*;
use crate::auth::{
    authorizers,
    bootstrap::default_rbac,
    fixture::{Objects, node, user},
};

fn object(kind: &str, namespace: Option<&str>, name: &str, more: &Value) -> Value {
    let mut object = json!({
        "apiVersion": "v1", "kind": kind,
        "metadata": { "name": name, "namespace": namespace, "uid": format!("uid-{name}") },
    });
    for (field, value) in more.as_object().unwrap() {
        object[field] = value.clone();
    }
    object
}

fn cluster() -> Arc<Objects> {
    let objects = Objects::of(default_rbac());
    for (name, status) in
        [("a", "Active"), ("kube-node-lease", "Active"), ("ending", "Terminating")]
    {
        objects.add(object("Namespace", None, name, &json!({ "status": { "phase": status } })));
    }
    objects.add(object("ServiceAccount", Some("a"), "default", &json!({})));
    objects.add(object(
        "ServiceAccount",
        Some("a"),
        "quiet",
        &json!({ "automountServiceAccountToken": false, "imagePullSecrets": [{ "name": "pull" }] }),
    ));
    objects.add(object("Node", None, "n1", &json!({})));
    for (pod, on) in [("mine", "n1"), ("theirs", "n2")] {
        let volumes = json!([{ "name": "t", "projected": { "sources": [
            { "serviceAccountToken": { "path": "token" } },
            { "serviceAccountToken": { "path": "vault", "audience": "vault" } } ] } }]);
        objects.add(object(
            "Pod",
            Some("a"),
            pod,
            &json!({ "spec": { "nodeName": on, "volumes": volumes } }),
        ));
    }
    Arc::new(objects)
}

fn chain_of(objects: &Arc<Objects>) -> Chain {
    let lookup = Arc::clone(objects) as Arc<dyn Lookup>;
    let authorizers = Arc::new(authorizers(Arc::clone(&lookup)));
    chain(&lookup, &authorizers)
}

/// A request of `user` for `plural` (`pods`, `pods/status`, `roles.rbac.authorization.k8s.io`).
struct Ask<'a> {
    user: UserInfo,
    operation: Operation,
    plural: &'a str,
    namespace: &'a str,
    name: &'a str,
    old: Option<Value>,
}

impl Ask<'_> {
    fn admit(&self, chain: &Chain, object: Option<&mut Value>) -> Result<(), Refusal> {
        let (resource, subresource) = self.plural.split_once('/').unwrap_or((self.plural, ""));
        let (resource, group) = resource.split_once('.').unwrap_or((resource, ""));
        let request = AdmissionRequest {
            user: &self.user,
            operation: self.operation,
            group,
            resource,
            subresource,
            namespace: self.namespace,
            name: self.name,
            old: self.old.as_ref(),
            dry_run: false,
        };
        chain.admit(&request, object)
    }
}

fn create<'a>(user: UserInfo, plural: &'a str, namespace: &'a str) -> Ask<'a> {
    Ask { user, operation: Operation::Create, plural, namespace, name: "", old: None }
}

fn jane() -> UserInfo {
    user("jane", &["system:masters"])
}

fn plain_pod() -> Value {
    object(
        "Pod",
        Some("a"),
        "web",
        &json!({ "spec": { "containers": [{ "name": "c" }], "initContainers": [{ "name": "i" }] } }),
    )
}

type Change = dyn Fn(&mut Value);

#[test]
fn namespaces() {
    let chain = chain_of(&cluster());
    let refused = |ask: Ask<'_>| ask.admit(&chain, Some(&mut json!({}))).unwrap_err();
    let missing = refused(create(jane(), "configmaps", "missing"));
    assert_eq!((missing.code, missing.message.as_str()), (404, "namespaces \"missing\" not found"));
    let ending = refused(create(jane(), "configmaps", "ending"));
    assert_eq!(
        (ending.code, ending.message.as_str()),
        (
            403,
            "configmaps is forbidden: unable to create new content in namespace ending because it \
             is being terminated"
        )
    );
    let at = |operation, plural, namespace, name| Ask {
        user: jane(),
        operation,
        plural,
        namespace,
        name,
        old: None,
    };
    for name in ["default", "kube-system", "kube-public"] {
        let refusal =
            at(Operation::Delete, "namespaces", "", name).admit(&chain, None).unwrap_err();
        assert_eq!(
            refusal.message,
            format!("namespaces {name:?} is forbidden: this namespace may not be deleted")
        );
    }
    at(Operation::Delete, "namespaces", "", "a").admit(&chain, None).unwrap();
    at(Operation::Delete, "configmaps", "ending", "x").admit(&chain, None).unwrap();
    at(Operation::Update, "configmaps", "ending", "x").admit(&chain, Some(&mut json!({}))).unwrap();
}

#[test]
fn a_plain_pod_gets_all_defaults() {
    let chain = chain_of(&cluster());
    let mut pod = plain_pod();
    create(jane(), "pods", "a").admit(&chain, Some(&mut pod)).unwrap();
    let spec = &pod["spec"];
    assert_eq!(spec["serviceAccountName"], "default");
    assert_eq!(spec["serviceAccount"], "default");
    assert_eq!(spec["priority"], 0);
    assert_eq!(spec["preemptionPolicy"], "PreemptLowerPriority");
    let volume = &spec["volumes"][0];
    let name = volume["name"].as_str().unwrap();
    assert!(name.starts_with("kube-api-access-") && name.len() == 21, "{name}");
    let sources = &volume["projected"]["sources"];
    assert_eq!(volume["projected"]["defaultMode"], 420);
    assert_eq!(
        sources[0]["serviceAccountToken"],
        json!({ "path": "token", "expirationSeconds": 3607 })
    );
    assert_eq!(sources[1]["configMap"]["name"], "kube-root-ca.crt");
    assert_eq!(sources[2]["downwardAPI"]["items"][0]["path"], "namespace");
    for containers in ["containers", "initContainers"] {
        assert_eq!(
            spec[containers][0]["volumeMounts"],
            json!([{ "name": name, "readOnly": true,
                "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount" }])
        );
    }
    assert_eq!(
        spec["tolerations"],
        json!([
            { "key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute",
              "tolerationSeconds": 300 },
            { "key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute",
              "tolerationSeconds": 300 },
        ])
    );
    // Once more changes nothing.
    let before = pod.clone();
    create(jane(), "pods", "a").admit(&chain, Some(&mut pod)).unwrap();
    assert_eq!(pod, before);
}

#[test]
fn what_a_pod_says_counts() {
    let chain = chain_of(&cluster());
    let admit = |change: &dyn Fn(&mut Value)| {
        let mut pod = plain_pod();
        change(&mut pod);
        create(jane(), "pods", "a").admit(&chain, Some(&mut pod)).map(|()| pod)
    };
    let quiet = admit(&|pod| pod["spec"]["serviceAccountName"] = json!("quiet")).unwrap();
    assert_eq!(quiet["spec"].get("volumes"), None);
    assert_eq!(quiet["spec"]["imagePullSecrets"], json!([{ "name": "pull" }]));
    let loud = admit(&|pod| {
        pod["spec"]["serviceAccountName"] = json!("quiet");
        pod["spec"]["automountServiceAccountToken"] = json!(true);
    });
    assert_eq!(loud.unwrap()["spec"]["volumes"].as_array().unwrap().len(), 1);
    let old_name = admit(&|pod| pod["spec"]["serviceAccount"] = json!("quiet")).unwrap();
    assert_eq!(old_name["spec"]["serviceAccountName"], "quiet");
    let own = admit(&|pod| {
        pod["spec"]["initContainers"] = json!([]);
        pod["spec"]["containers"][0]["volumeMounts"] =
            json!([{ "name": "x", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount" }]);
    });
    assert_eq!(own.unwrap()["spec"].get("volumes"), None);
    let tolerant =
        admit(&|pod| pod["spec"]["tolerations"] = json!([{ "operator": "Exists" }])).unwrap();
    assert_eq!(tolerant["spec"]["tolerations"], json!([{ "operator": "Exists" }]));
    let critical =
        admit(&|pod| pod["spec"]["priorityClassName"] = json!("system-node-critical")).unwrap();
    assert_eq!(critical["spec"]["priority"], 2_000_001_000);
    for (field, value, message) in [
        (
            "serviceAccountName",
            json!("none"),
            "pods \"web\" is forbidden: error looking up service account a/none: serviceaccount \
             \"none\" not found",
        ),
        (
            "priorityClassName",
            json!("none"),
            "pods \"web\" is forbidden: no PriorityClass with name none was found",
        ),
    ] {
        let refusal = admit(&|pod| pod["spec"][field] = value.clone()).unwrap_err();
        assert_eq!((refusal.code, refusal.message.as_str()), (403, message));
    }
    assert!(admit(&|pod| pod["spec"]["priority"] = json!(7)).is_err());
}

#[test]
fn malformed_pods_are_left_to_validation() {
    let chain = chain_of(&cluster());
    for mut pod in [
        json!({}),
        json!({ "spec": null }),
        json!({ "spec": [] }),
        json!({ "spec": { "containers": {}, "volumes": 7, "tolerations": "x" } }),
        json!({ "spec": { "containers": [1, null, { "volumeMounts": "x" }] } }),
    ] {
        let _ = create(jane(), "pods", "a").admit(&chain, Some(&mut pod));
        let _ = create(node("n1"), "pods", "a").admit(&chain, Some(&mut pod));
        let _ = create(node("n1"), "nodes", "").admit(&chain, Some(&mut pod));
    }
}

fn mirror() -> Value {
    object(
        "Pod",
        Some("a"),
        "static-n1",
        &json!({
            "metadata": {
                "name": "static-n1", "namespace": "a",
                "annotations": { "kubernetes.io/config.mirror": "hash" },
                "ownerReferences": [{ "apiVersion": "v1", "kind": "Node", "name": "n1",
                    "uid": "uid-n1", "controller": true }],
            },
            "spec": { "nodeName": "n1", "containers": [{ "name": "c" }] },
        }),
    )
}

#[test]
fn kubelets_make_mirror_pods_only() {
    let chain = chain_of(&cluster());
    let admit = |change: &dyn Fn(&mut Value)| {
        let mut pod = mirror();
        change(&mut pod);
        create(node("n1"), "pods", "a").admit(&chain, Some(&mut pod)).map(|()| pod)
    };
    let pod = admit(&|_| {}).unwrap();
    assert_eq!(pod["spec"].get("serviceAccountName"), None);
    assert_eq!(pod["spec"].get("volumes"), None);
    let owner = |field: &'static str, value: Value| {
        move |pod: &mut Value| pod["metadata"]["ownerReferences"][0][field] = value.clone()
    };
    let table: [(&str, Box<Change>); 12] = [
        (
            "can only create mirror pods",
            Box::new(|pod| {
                pod["metadata"]["annotations"] = json!({});
            }),
        ),
        ("spec.nodeName set to itself", Box::new(|pod| pod["spec"]["nodeName"] = json!("n2"))),
        (
            "a single owner reference",
            Box::new(|pod| pod["metadata"]["ownerReferences"] = json!([])),
        ),
        ("an owner reference set to itself", Box::new(owner("name", json!("n2")))),
        ("an owner reference set to itself", Box::new(owner("kind", json!("Pod")))),
        ("a controller owner reference", Box::new(owner("controller", json!(false)))),
        ("must not set blockOwnerDeletion", Box::new(owner("blockOwnerDeletion", json!(true)))),
        ("UID mismatch: expected uid-n1 got x", Box::new(owner("uid", json!("x")))),
        (
            "may not reference service accounts",
            Box::new(|pod| pod["spec"]["serviceAccountName"] = json!("default")),
        ),
        (
            "may not reference secrets",
            Box::new(|pod| {
                pod["spec"]["volumes"] = json!([{ "name": "s", "secret": { "secretName": "s" } }]);
            }),
        ),
        (
            "can not create pods that reference configmaps",
            Box::new(|pod| {
                pod["spec"]["volumes"] = json!([{ "name": "s", "configMap": { "name": "s" } }]);
            }),
        ),
        (
            "may not use ServiceAccountToken volume projections",
            Box::new(|pod| {
                pod["spec"]["volumes"] = json!([{ "name": "t", "projected": {
                    "sources": [{ "serviceAccountToken": { "path": "t" } }] } }]);
            }),
        ),
    ];
    for (message, change) in table {
        let refusal = admit(&*change).unwrap_err();
        // Without its annotation a pod is an ordinary one to the other plugins.
        assert!(refusal.code == 403 && refusal.message.contains(message), "{message}: {refusal:?}");
    }
}

#[test]
fn kubelets_touch_their_own_pods_only() {
    let objects = cluster();
    let chain = chain_of(&objects);
    for (pod, own) in [("mine", true), ("theirs", false)] {
        let old = objects.get("", "pods", Some("a"), pod).unwrap();
        let at = |operation, plural| Ask {
            user: node("n1"),
            operation,
            plural,
            namespace: "a",
            name: pod,
            old: Some((*old).clone()),
        };
        assert_eq!(at(Operation::Delete, "pods").admit(&chain, None).is_ok(), own);
        let mut new = (*old).clone();
        new["status"] = json!({ "phase": "Running" });
        let status = at(Operation::Update, "pods/status");
        assert_eq!(status.admit(&chain, Some(&mut new)).is_ok(), own);
        new["metadata"]["labels"] = json!({ "a": "b" });
        assert!(status.admit(&chain, Some(&mut new)).is_err());
        let mut eviction = json!({ "metadata": { "name": pod } });
        let evicted = at(Operation::Create, "pods/eviction").admit(&chain, Some(&mut eviction));
        assert_eq!(evicted.is_ok(), own);
        assert!(at(Operation::Update, "pods").admit(&chain, Some(&mut new)).is_err());
        // Others are not restricted by this plugin.
        let ask = Ask { user: jane(), ..at(Operation::Delete, "pods") };
        ask.admit(&chain, None).unwrap();
    }
}

#[test]
fn kubelets_get_tokens_for_their_pods_only() {
    let chain = chain_of(&cluster());
    let token = |reference: Value, audiences: Value| {
        let mut body = json!({ "spec": { "boundObjectRef": reference, "audiences": audiences } });
        Ask { name: "default", ..create(node("n1"), "serviceaccounts/token", "a") }
            .admit(&chain, Some(&mut body))
    };
    let pod = |name: &str, uid: &str| json!({ "apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid });
    token(pod("mine", "uid-mine"), json!([])).unwrap();
    token(pod("mine", "uid-mine"), json!(["vault"])).unwrap();
    for (reference, audiences, message) in [
        (json!(null), json!([]), "node requested token not bound to a pod"),
        (pod("mine", ""), json!([]), "node requested token with a pod binding without a uid"),
        (pod("mine", "old"), json!([]), "does not match the UID in record"),
        (pod("none", "x"), json!([]), "pods \"none\" not found"),
        (
            pod("theirs", "uid-theirs"),
            json!([]),
            "node requested token bound to a pod scheduled on a different node",
        ),
        (pod("mine", "uid-mine"), json!(["bank"]), "audience \"bank\" not found in pod spec"),
        (pod("mine", "uid-mine"), json!(["a", "b"]), "node may only request 0 or 1 audiences"),
    ] {
        let refusal = token(reference, audiences).unwrap_err();
        assert!(refusal.message.contains(message), "{refusal:?}");
    }
}

#[test]
fn kubelets_write_their_own_node() {
    let chain = chain_of(&cluster());
    let mut new = object("Node", None, "n1", &json!({}));
    new["metadata"]["labels"] = json!({
        "kubernetes.io/hostname": "n1", "node.kubernetes.io/x": "", "a.kubelet.kubernetes.io/x": "",
        "example.com/x": "", "plain": "",
    });
    create(node("n1"), "nodes", "").admit(&chain, Some(&mut new)).unwrap();
    assert_eq!(
        new["spec"]["taints"],
        json!([{ "key": "node.kubernetes.io/not-ready", "effect": "NoSchedule" }])
    );
    assert!(create(node("n2"), "nodes", "").admit(&chain, Some(&mut new)).is_err());
    let update = |change: &dyn Fn(&mut Value), plural| {
        let mut changed = new.clone();
        change(&mut changed);
        Ask {
            user: node("n1"),
            operation: Operation::Update,
            plural,
            namespace: "",
            name: "n1",
            old: Some(new.clone()),
        }
        .admit(&chain, Some(&mut changed))
    };
    update(&|node| node["status"] = json!({ "phase": "x" }), "nodes/status").unwrap();
    update(&|node| node["metadata"]["labels"]["plain"] = json!("y"), "nodes").unwrap();
    let table: [(&str, &Change); 5] = [
        ("is not allowed to modify labels: x.node-restriction.kubernetes.io/y", &|node| {
            node["metadata"]["labels"]["x.node-restriction.kubernetes.io/y"] = json!("1");
        }),
        ("is not allowed to modify labels: node-role.kubernetes.io/master", &|node| {
            node["metadata"]["labels"]["node-role.kubernetes.io/master"] = json!("");
        }),
        ("is not allowed to modify taints", &|node| node["spec"]["taints"] = json!([])),
        ("is not allowed to modify ownerReferences", &|node| {
            node["metadata"]["ownerReferences"] = json!([{ "kind": "Pod" }]);
        }),
        ("is not allowed to set configSource", &|node| {
            node["spec"]["configSource"] = json!({ "configMap": {} });
        }),
    ];
    for (message, change) in table {
        let refusal = update(change, "nodes").unwrap_err();
        assert!(refusal.message.contains(message), "{refusal:?}");
    }
    let lease = |namespace, name: &str| {
        create(node("n1"), "leases.coordination.k8s.io", namespace)
            .admit(&chain, Some(&mut json!({ "metadata": { "name": name } })))
    };
    lease("kube-node-lease", "n1").unwrap();
    assert!(lease("kube-node-lease", "n2").is_err() && lease("a", "n1").is_err());
}

#[test]
fn nobody_grants_what_they_do_not_hold() {
    const RBAC: &str = "rbac.authorization.k8s.io";
    let objects = cluster();
    let own = |kind: &str, namespace: Option<&str>, name: &str, more: &Value| {
        let mut object = object(kind, namespace, name, more);
        object["apiVersion"] = json!("rbac.authorization.k8s.io/v1");
        object
    };
    let bind = |kind: &str, role: &str, who: &str| json!({ "roleRef": { "kind": kind, "name": role }, "subjects": [{ "kind": "User", "name": who }] });
    let rules = |verbs: &[&str], resource: &str| json!({ "rules": [{ "verbs": verbs, "apiGroups": [""], "resources": [resource] }] });
    objects.add(own("RoleBinding", Some("a"), "admin", &bind("ClusterRole", "admin", "owner")));
    objects.add(own(
        "ClusterRole",
        None,
        "binder",
        &json!({ "rules": [
            { "verbs": ["bind"], "apiGroups": [RBAC], "resources": ["clusterroles"], "resourceNames": ["cluster-admin"] },
            { "verbs": ["escalate"], "apiGroups": [RBAC], "resources": ["roles"], "resourceNames": ["special"] },
        ] }),
    ));
    objects.add(own("RoleBinding", Some("a"), "binder", &bind("ClusterRole", "binder", "binder")));
    let chain = chain_of(&objects);
    let ask = |who: &str, plural: &str, namespace: &str, mut object: Value, old: Option<Value>| {
        let operation = if old.is_some() { Operation::Update } else { Operation::Create };
        let user = user(who, &["staff"]);
        let plural = format!("{plural}.{RBAC}");
        Ask { user, operation, plural: &plural, namespace, name: "", old }
            .admit(&chain, Some(&mut object))
    };
    let role = |name: &str, verbs: &[&str], resource: &str| {
        own("Role", Some("a"), name, &rules(verbs, resource))
    };
    let bound = |role: &str| own("RoleBinding", Some("a"), "b", &bind("ClusterRole", role, "x"));

    ask("owner", "roles", "a", role("r", &["get"], "pods"), None).unwrap();
    let refusal = ask("owner", "roles", "a", role("r", &["get", "update"], "resourcequotas"), None)
        .unwrap_err();
    assert_eq!(
        refusal.message,
        "roles.rbac.authorization.k8s.io \"r\" is forbidden: user \"owner\" (groups=[\"staff\"]) is \
         attempting to grant RBAC permissions not currently held:\n{APIGroups:[\"\"], \
         Resources:[\"resourcequotas\"], Verbs:[\"update\"]}"
    );
    ask("owner", "rolebindings", "a", bound("edit"), None).unwrap();
    assert!(ask("owner", "rolebindings", "a", bound("cluster-admin"), None).is_err());
    assert!(
        ask(
            "owner",
            "clusterroles",
            "",
            own("ClusterRole", None, "c", &rules(&["get"], "pods")),
            None
        )
        .is_err()
    );
    assert_eq!(ask("owner", "rolebindings", "a", bound("none"), None).unwrap_err().code, 404);
    // "… unless they hold escalate" or "bind".
    ask("binder", "roles", "a", role("special", &["*"], "*"), None).unwrap();
    assert!(ask("binder", "roles", "a", role("other", &["*"], "*"), None).is_err());
    ask("binder", "rolebindings", "a", bound("cluster-admin"), None).unwrap();
    assert!(ask("binder", "rolebindings", "a", bound("edit"), None).is_err());
    assert!(
        ask(
            "binder",
            "clusterrolebindings",
            "",
            own("ClusterRoleBinding", None, "b", &bind("ClusterRole", "cluster-admin", "x")),
            None
        )
        .is_err()
    );
    // What changes no permission needs none.
    let mut labelled = role("r", &["*"], "*");
    let old = labelled.clone();
    labelled["metadata"]["labels"] = json!({ "a": "b" });
    ask("nobody", "roles", "a", labelled, Some(old)).unwrap();
    // Aggregation grants what is not known yet.
    let aggregating = own("ClusterRole", None, "c", &json!({ "aggregationRule": {}, "rules": [] }));
    assert!(ask("owner", "clusterroles", "", aggregating, None).is_err());
}
