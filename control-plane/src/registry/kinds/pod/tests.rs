use serde_json::json;

use super::*;

fn good() -> Value {
    json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "a", "image": "i:1"}]}})
}

fn problems(change: impl FnOnce(&mut Value)) -> Vec<String> {
    let mut pod = good();
    change(&mut pod);
    default::pod(&mut pod);
    let mut errors = Vec::new();
    validate(&pod, None, "", &mut errors);
    errors.iter().map(ToString::to_string).collect()
}

#[test]
fn a_pod_gets_its_defaults() {
    let mut pod = json!({"spec": {
        "containers": [{
            "name": "a", "image": "host:5000/i",
            "ports": [{"containerPort": 80}],
            "resources": {"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "500m"}},
            "readinessProbe": {"httpGet": {"port": 80}},
            "env": [{"name": "N", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
        }],
        "volumes": [{"name": "e"}, {"name": "s", "secret": {"secretName": "x"}}],
    }});
    default::pod(&mut pod);
    assert_eq!(
        pod["spec"],
        json!({
            "restartPolicy": "Always", "dnsPolicy": "ClusterFirst", "securityContext": {},
            "schedulerName": "default-scheduler", "terminationGracePeriodSeconds": 30,
            "enableServiceLinks": true,
            "containers": [{
                "name": "a", "image": "host:5000/i", "imagePullPolicy": "Always",
                "terminationMessagePath": "/dev/termination-log",
                "terminationMessagePolicy": "File",
                "ports": [{"containerPort": 80, "protocol": "TCP"}],
                "resources": {"limits": {"cpu": "1", "memory": "1Gi"},
                              "requests": {"cpu": "500m", "memory": "1Gi"}},
                "readinessProbe": {
                    "httpGet": {"port": 80, "path": "/", "scheme": "HTTP"},
                    "timeoutSeconds": 1, "periodSeconds": 10, "successThreshold": 1,
                    "failureThreshold": 3,
                },
                "env": [{"name": "N", "valueFrom": {
                    "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.name"}}}],
            }],
            "volumes": [{"name": "e", "emptyDir": {}},
                        {"name": "s", "secret": {"secretName": "x", "defaultMode": 420}}],
        })
    );
    let once = pod.clone();
    default::pod(&mut pod);
    assert_eq!(pod, once, "defaults stay what they are");
}

#[test]
fn images_that_may_move_are_pulled_always() {
    for (image, policy) in [
        ("i", "Always"),
        ("i:latest", "Always"),
        ("i:1", "IfNotPresent"),
        ("host:5000/i", "Always"),
        ("host:5000/i:1", "IfNotPresent"),
        ("i@sha256:00", "IfNotPresent"),
    ] {
        let mut pod = json!({"spec": {"containers": [{"name": "a", "image": image}]}});
        default::pod(&mut pod);
        assert_eq!(pod["spec"]["containers"][0]["imagePullPolicy"], policy, "{image}");
    }
}

#[test]
fn pods_are_checked() {
    type Change = fn(&mut Value);
    let rows: [(Change, &str); 16] = [
        (|_| {}, ""),
        (|p| p["spec"]["containers"] = json!([]), "spec.containers: Required value"),
        (
            |p| p["spec"]["containers"][0]["image"] = "".into(),
            "spec.containers[0].image: Required value",
        ),
        (
            |p| {
                p["spec"]["containers"] =
                    json!([{"name": "a", "image": "i"}, {"name": "a", "image": "i"}]);
            },
            "spec.containers[1].name: Duplicate value: \"a\"",
        ),
        (
            |p| p["spec"]["restartPolicy"] = "Sometimes".into(),
            "spec.restartPolicy: Unsupported value: \"Sometimes\": supported values: \"Always\", \
             \"Never\", \"OnFailure\"",
        ),
        (
            |p| {
                p["spec"]["containers"][0]["volumeMounts"] =
                    json!([{"name": "x", "mountPath": "/x"}]);
            },
            "spec.containers[0].volumeMounts[0].name: Not found: \"x\"",
        ),
        (
            |p| {
                p["spec"]["containers"][0]["resources"] =
                    json!({"limits": {"cpu": "1"}, "requests": {"cpu": "2"}});
            },
            "spec.containers[0].resources.requests: Invalid value: \"2\": must be less than or \
             equal to cpu limit of 1",
        ),
        (
            |p| p["spec"]["containers"][0]["livenessProbe"] = json!({}),
            "spec.containers[0].livenessProbe: Required value: must specify a handler type",
        ),
        (
            |p| {
                p["spec"]["containers"][0]["livenessProbe"] =
                    json!({"exec": {"command": ["a"]}, "tcpSocket": {"port": 1}});
            },
            "spec.containers[0].livenessProbe.tcpSocket: Forbidden: may not specify more than 1 \
             handler type",
        ),
        (
            |p| p["spec"]["containers"][0]["ports"] = json!([{"containerPort": 70_000}]),
            "spec.containers[0].ports[0].containerPort: Invalid value: 70000: must be between 1 \
             and 65535, inclusive",
        ),
        (
            |p| {
                p["spec"]["volumes"] =
                    json!([{"name": "v", "emptyDir": {}, "secret": {"secretName": "s"}}]);
            },
            "spec.volumes[0].secret: Forbidden: may not specify more than 1 volume type",
        ),
        (
            |p| {
                p["spec"]["initContainers"] = json!([{"name": "i", "image": "i",
                    "readinessProbe": {"tcpSocket": {"port": 1}}}]);
            },
            "spec.initContainers[0].readinessProbe: Forbidden: may not be set for init containers \
             without restartPolicy=Always",
        ),
        (
            |p| {
                p["spec"]["initContainers"] = json!([{"name": "i", "image": "i",
                    "restartPolicy": "Always", "readinessProbe": {"tcpSocket": {"port": 1}}}]);
            },
            "",
        ),
        (
            |p| p["spec"]["containers"][0]["env"] = json!([{"name": "A=B"}]),
            "spec.containers[0].env[0].name: Invalid value: \"A=B\": a valid environment variable \
             name must consist only of printable ASCII characters other than '='",
        ),
        (
            |p| p["spec"]["terminationGracePeriodSeconds"] = (-1).into(),
            "spec.terminationGracePeriodSeconds: Invalid value: -1: must be greater than or equal \
             to 0",
        ),
        (
            |p| {
                p["spec"]["volumes"] = json!([{"name": "v", "configMap":
                    {"name": "c", "items": [{"key": "k", "path": "../x"}]}}]);
            },
            "spec.volumes[0].configMap.items[0].path: Invalid value: \"../x\": must not contain \
             '..'",
        ),
    ];
    for (change, expected) in rows {
        let found = problems(change);
        if expected.is_empty() {
            assert!(found.is_empty(), "{found:?}");
        } else {
            assert!(found.iter().any(|f| f == expected), "{expected}: {found:?}");
        }
    }
}

#[test]
fn little_of_a_pod_may_change() {
    let check = |change: fn(&mut Value)| {
        let mut old = good();
        default::pod(&mut old);
        let mut new = old.clone();
        change(&mut new);
        let mut errors = Vec::new();
        validate(&new, Some(&old), "", &mut errors);
        errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    };
    assert_eq!(check(|_| {}), "");
    assert_eq!(check(|p| p["spec"]["containers"][0]["image"] = "j".into()), "");
    assert_eq!(check(|p| p["spec"]["activeDeadlineSeconds"] = 5.into()), "");
    assert_eq!(
        check(|p| p["spec"]["tolerations"] = json!([{"key": "a", "operator": "Exists"}])),
        ""
    );
    let refused = check(|p| p["spec"]["hostname"] = "h".into());
    assert!(
        refused.starts_with(
            "spec: Forbidden: pod updates may not change fields other than \
             `spec.containers[*].image`"
        ),
        "{refused}"
    );
    let removed = check(|p| p["spec"]["containers"] = json!([]));
    assert!(removed.contains("may not add or remove containers"), "{removed}");
}

#[test]
fn service_quality_follows_from_resources() {
    let class = |resources: Value| {
        let mut pod = good();
        pod["spec"]["containers"][0]["resources"] = resources;
        default::pod(&mut pod);
        quality_of_service(&pod)
    };
    assert_eq!(class(json!({})), "BestEffort");
    assert_eq!(class(json!({"requests": {"cpu": "1"}})), "Burstable");
    assert_eq!(class(json!({"limits": {"cpu": "1", "memory": "1Gi"}})), "Guaranteed");
    assert_eq!(class(json!({"limits": {"cpu": "1"}})), "Burstable");
}

#[test]
fn a_binding_places_a_pod_once() {
    let mut pod = good();
    let binding = json!({"metadata": {"name": "p"}, "target": {"kind": "Node", "name": "n"}});
    bind(&mut pod, &binding, Timestamp::UNIX_EPOCH).unwrap();
    assert_eq!(pod["spec"]["nodeName"], "n");
    assert_eq!(pod["status"]["conditions"][0]["type"], "PodScheduled");
    let again = bind(&mut pod, &binding, Timestamp::UNIX_EPOCH).unwrap_err();
    assert_eq!(again.code, 409);
    assert!(again.message.contains("is already assigned to node \"n\""), "{again}");
}
