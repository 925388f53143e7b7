//! What a pod is given that it does not say.

use serde_json::{Map, Value, json};

use crate::registry::value::{self, object_at, set_default, set_default_text};

/// Defaults of a pod.
pub(super) fn pod(pod: &mut Value) {
    let Some(spec) = pod.get_mut("spec") else { return };
    spec_defaults(spec);
    for list in ["containers", "initContainers"] {
        for container in items(spec, list) {
            requests_from_limits(container);
        }
    }
    if let Some(resources) = spec.get_mut("resources") {
        copy_limits(resources);
    }
    same_addresses(pod);
}

/// Defaults of a pod template: as of a pod, but requests stay as they are written.
pub(in crate::registry) fn template(template: &mut Value) {
    if let Some(spec) = template.get_mut("spec") {
        spec_defaults(spec);
    }
}

fn items<'a>(value: &'a mut Value, field: &str) -> impl Iterator<Item = &'a mut Value> {
    value.get_mut(field).and_then(Value::as_array_mut).into_iter().flatten()
}

/// Fields that are left out when they say no.
fn drop_false(object: &mut Map<String, Value>, names: &[&str]) {
    for name in names {
        if object.get(*name) == Some(&Value::Bool(false)) {
            object.remove(*name);
        }
    }
}

fn spec_defaults(spec: &mut Value) {
    let host_network = value::flag(spec, &["hostNetwork"]);
    let Some(object) = spec.as_object_mut() else { return };
    set_default_text(object, "dnsPolicy", "ClusterFirst");
    set_default_text(object, "restartPolicy", "Always");
    set_default_text(object, "schedulerName", "default-scheduler");
    set_default(object, "securityContext", json!({}));
    set_default(object, "terminationGracePeriodSeconds", 30);
    set_default(object, "enableServiceLinks", true);
    drop_false(object, &["hostNetwork", "hostPID", "hostIPC"]);
    // `serviceAccount` is an old name of `serviceAccountName`.
    let account = ["serviceAccountName", "serviceAccount"]
        .iter()
        .find_map(|name| object.get(*name).and_then(Value::as_str).filter(|a| !a.is_empty()))
        .map(str::to_owned);
    if let Some(account) = account {
        set_default_text(object, "serviceAccountName", &account);
        object.insert("serviceAccount".to_owned(), account.into());
    }
    for volume in items(spec, "volumes") {
        volume_defaults(volume);
    }
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        for container in items(spec, list) {
            container_defaults(container, host_network);
        }
    }
}

fn container_defaults(container: &mut Value, host_network: bool) {
    let policy = pull_policy(value::text(container, &["image"]));
    let Some(object) = container.as_object_mut() else { return };
    set_default_text(object, "imagePullPolicy", policy);
    set_default_text(object, "terminationMessagePath", "/dev/termination-log");
    set_default_text(object, "terminationMessagePolicy", "File");
    set_default(object, "resources", json!({}));
    drop_false(object, &["stdin", "stdinOnce", "tty"]);
    for port in items(container, "ports") {
        let number = port.get("containerPort").cloned();
        let Some(port) = port.as_object_mut() else { continue };
        set_default_text(port, "protocol", "TCP");
        if let (true, Some(number)) = (host_network, number) {
            set_default(port, "hostPort", number);
        }
    }
    for variable in items(container, "env") {
        field_reference(variable.pointer_mut("/valueFrom/fieldRef"));
    }
    for mount in items(container, "volumeMounts") {
        if let Some(mount) = mount.as_object_mut() {
            drop_false(mount, &["readOnly"]);
        }
    }
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(probe) = container.get_mut(probe).and_then(Value::as_object_mut) {
            set_positive(probe, "timeoutSeconds", 1);
            set_positive(probe, "periodSeconds", 10);
            set_positive(probe, "successThreshold", 1);
            set_positive(probe, "failureThreshold", 3);
            handler_defaults(probe);
        }
    }
    if let Some(lifecycle) = container.get_mut("lifecycle") {
        for hook in ["postStart", "preStop"] {
            if let Some(hook) = lifecycle.get_mut(hook).and_then(Value::as_object_mut) {
                handler_defaults(hook);
            }
        }
    }
}

/// A number whose zero means that nothing was said.
fn set_positive(object: &mut Map<String, Value>, name: &str, number: i64) {
    if object.get(name).and_then(Value::as_i64).unwrap_or(0) == 0 {
        object.insert(name.to_owned(), number.into());
    }
}

fn handler_defaults(handler: &mut Map<String, Value>) {
    if let Some(http) = handler.get_mut("httpGet").and_then(Value::as_object_mut) {
        set_default_text(http, "path", "/");
        set_default_text(http, "scheme", "HTTP");
    }
    if let Some(grpc) = handler.get_mut("grpc").and_then(Value::as_object_mut) {
        set_default(grpc, "service", "");
    }
}

/// `latest`, said or not, may move: it is pulled always. A digest or another tag is not.
fn pull_policy(image: &str) -> &'static str {
    if image.contains('@') {
        return "IfNotPresent";
    }
    let last = image.rsplit('/').next().unwrap_or_default();
    match last.split_once(':') {
        None | Some((_, "latest")) => "Always",
        Some(_) => "IfNotPresent",
    }
}

fn field_reference(reference: Option<&mut Value>) {
    if let Some(reference) = reference.and_then(Value::as_object_mut) {
        set_default_text(reference, "apiVersion", "v1");
    }
}

fn volume_defaults(volume: &mut Value) {
    let Some(object) = volume.as_object_mut() else { return };
    if object.keys().all(|key| key == "name") {
        object.insert("emptyDir".to_owned(), json!({}));
    }
    for source in ["secret", "configMap", "downwardAPI", "projected"] {
        if let Some(source) = object.get_mut(source).and_then(Value::as_object_mut) {
            // 0644
            set_default(source, "defaultMode", 420);
        }
    }
    if let Some(path) = object.get_mut("hostPath").and_then(Value::as_object_mut) {
        set_default(path, "type", "");
    }
    if let Some(downward) = object.get_mut("downwardAPI") {
        for item in items(downward, "items") {
            field_reference(item.get_mut("fieldRef"));
        }
    }
    if let Some(projected) = object.get_mut("projected") {
        for source in items(projected, "sources") {
            if let Some(token) =
                source.get_mut("serviceAccountToken").and_then(Value::as_object_mut)
            {
                set_default(token, "expirationSeconds", 3600);
            }
            if let Some(downward) = source.get_mut("downwardAPI") {
                for item in items(downward, "items") {
                    field_reference(item.get_mut("fieldRef"));
                }
            }
        }
    }
}

fn requests_from_limits(container: &mut Value) {
    if let Some(resources) = container.get_mut("resources") {
        copy_limits(resources);
    }
}

fn copy_limits(resources: &mut Value) {
    let Some(limits) = resources.get("limits").and_then(Value::as_object).cloned() else { return };
    if limits.is_empty() {
        return;
    }
    if let Some(requests) = object_at(resources, "requests") {
        for (name, limit) in limits {
            set_default(requests, &name, limit);
        }
    }
}

/// `podIP` and the first of `podIPs` are one.
fn same_addresses(pod: &mut Value) {
    let first = value::text(pod, &["status", "podIP"]).to_owned();
    if first.is_empty() {
        return;
    }
    if let Some(status) = object_at(pod, "status") {
        let listed = status.get("podIPs").and_then(Value::as_array).is_some_and(|l| !l.is_empty());
        if !listed {
            status.insert("podIPs".to_owned(), json!([{"ip": first}]));
        }
    }
}
