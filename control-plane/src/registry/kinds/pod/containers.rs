//! What is wrong with a pod's containers.

use std::collections::BTreeSet;

use keelson_api::quantity::Quantity;
use serde_json::{Value, json};

use super::security;
use crate::{
    registry::{
        kinds::rules::{self, check_supported},
        path::Path,
        value,
    },
    status::FieldError,
};

const PROTOCOLS: &[&str] = &["SCTP", "TCP", "UDP"];

/// What a container is to its pod.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Main,
    Init,
    /// An init container that goes on beside the main ones.
    Sidecar,
    Ephemeral,
}

/// Checks all containers.
pub(super) fn validate(
    spec: &Value,
    volumes: &BTreeSet<&str>,
    path: &Path<'_>,
    errors: &mut Vec<FieldError>,
) {
    let main = value::list(spec, &["containers"]);
    if main.is_empty() {
        errors.push(FieldError::required(path.field("containers"), ""));
    }
    let host_network = value::flag(spec, &["hostNetwork"]);
    let mut names = BTreeSet::new();
    let mut host_ports = BTreeSet::new();
    for list in ["containers", "initContainers", "ephemeralContainers"] {
        let root = path.field(list);
        for (index, container) in value::list(spec, &[list]).iter().enumerate() {
            let at = root.index(index);
            let role = role(list, container, &at, errors);
            name(container, &mut names, &at, errors);
            one(container, role, &at, errors);
            ports(container, host_network, role, &mut host_ports, &at, errors);
            mounts(container, volumes, &at, errors);
        }
    }
}

fn role(list: &str, container: &Value, at: &Path<'_>, errors: &mut Vec<FieldError>) -> Role {
    let policy = value::text(container, &["restartPolicy"]);
    let path = at.field("restartPolicy");
    match (list, policy) {
        ("initContainers", "Always") => Role::Sidecar,
        ("initContainers", "") => Role::Init,
        ("containers", "") => Role::Main,
        ("ephemeralContainers", "") => Role::Ephemeral,
        // Restart rules of single containers are not served.
        ("initContainers", other) => {
            errors.push(FieldError::not_supported(path, other, &["Always"]));
            Role::Init
        }
        (list, _) => {
            errors.push(FieldError::forbidden(path, "may not be set for non-init containers"));
            if list == "containers" { Role::Main } else { Role::Ephemeral }
        }
    }
}

fn name<'a>(
    container: &'a Value,
    names: &mut BTreeSet<&'a str>,
    at: &Path<'_>,
    errors: &mut Vec<FieldError>,
) {
    let name = value::text(container, &["name"]);
    let path = at.field("name");
    if name.is_empty() {
        errors.push(FieldError::required(path, ""));
    } else if let Some(why) = rules::dns_label(name) {
        errors.push(FieldError::invalid(path, name, why));
    } else if !names.insert(name) {
        errors.push(FieldError::duplicate(path, name));
    }
}

fn one(container: &Value, role: Role, at: &Path<'_>, errors: &mut Vec<FieldError>) {
    let text = |field: &str| value::text(container, &[field]);
    let image = text("image");
    if image.is_empty() {
        errors.push(FieldError::required(at.field("image"), ""));
    } else if image.trim() != image {
        errors.push(FieldError::invalid(
            at.field("image"),
            image,
            "must not have leading or trailing whitespace",
        ));
    }
    check_supported(
        at.field("imagePullPolicy"),
        text("imagePullPolicy"),
        &["Always", "IfNotPresent", "Never"],
        errors,
    );
    check_supported(
        at.field("terminationMessagePolicy"),
        text("terminationMessagePolicy"),
        &["FallbackToLogsOnError", "File"],
        errors,
    );
    environment(container, at, errors);
    security::container(container, at, errors);
    resources(container, at, errors);
    for field in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let Some(given) = value::at(container, &[field]) else { continue };
        let path = at.field(field);
        match role {
            Role::Main | Role::Sidecar => probe(given, field, &path, errors),
            Role::Init => errors.push(FieldError::forbidden(
                path,
                "may not be set for init containers without restartPolicy=Always",
            )),
            Role::Ephemeral => {
                errors
                    .push(FieldError::forbidden(path, "cannot be set for an Ephemeral Container"));
            }
        }
    }
    let Some(lifecycle) = value::at(container, &["lifecycle"]) else { return };
    let path = at.field("lifecycle");
    match role {
        Role::Init => errors.push(FieldError::forbidden(
            path,
            "may not be set for init containers without restartPolicy=Always",
        )),
        Role::Ephemeral => {
            errors.push(FieldError::forbidden(path, "cannot be set for an Ephemeral Container"));
        }
        Role::Main | Role::Sidecar => {
            for hook in ["postStart", "preStop"] {
                if let Some(given) = value::at(lifecycle, &[hook]) {
                    let kinds = &["exec", "httpGet", "tcpSocket", "sleep"];
                    handler(given, kinds, &path.field(hook), errors);
                }
            }
        }
    }
}

fn ports<'a>(
    container: &'a Value,
    host_network: bool,
    role: Role,
    taken: &mut BTreeSet<(i64, &'a str, &'a str)>,
    at: &Path<'_>,
    errors: &mut Vec<FieldError>,
) {
    let root = at.field("ports");
    let mut names = BTreeSet::new();
    for (index, port) in value::list(container, &["ports"]).iter().enumerate() {
        let at = root.index(index);
        let name = value::text(port, &["name"]);
        if !name.is_empty() {
            for why in rules::port_name(name) {
                errors.push(FieldError::invalid(at.field("name"), name, why));
            }
            if !names.insert(name) {
                errors.push(FieldError::duplicate(at.field("name"), name));
            }
        }
        let number = value::int(port, &["containerPort"]).unwrap_or(0);
        if number == 0 {
            errors.push(FieldError::required(at.field("containerPort"), ""));
        } else {
            rules::port_number(number, at.field("containerPort"), errors);
        }
        let protocol = value::text(port, &["protocol"]);
        check_supported(at.field("protocol"), protocol, PROTOCOLS, errors);
        let Some(host_port) = value::int(port, &["hostPort"]).filter(|p| *p != 0) else { continue };
        rules::port_number(host_port, at.field("hostPort"), errors);
        if host_network && host_port != number {
            errors.push(FieldError::invalid(
                at.field("containerPort"),
                number,
                "must match `hostPort` when `hostNetwork` is true",
            ));
        }
        // Init containers that end leave their ports to the others.
        let address = value::text(port, &["hostIP"]);
        if role != Role::Init && !taken.insert((host_port, protocol, address)) {
            let shown = format!("{protocol}/{address}/{host_port}");
            errors.push(FieldError::duplicate(at.field("hostPort"), shown));
        }
    }
}

fn mounts(
    container: &Value,
    volumes: &BTreeSet<&str>,
    at: &Path<'_>,
    errors: &mut Vec<FieldError>,
) {
    let root = at.field("volumeMounts");
    let mut paths = BTreeSet::new();
    for (index, mount) in value::list(container, &["volumeMounts"]).iter().enumerate() {
        let at = root.index(index);
        let text = |field: &str| value::text(mount, &[field]);
        if text("name").is_empty() {
            errors.push(FieldError::required(at.field("name"), ""));
        } else if !volumes.contains(text("name")) {
            errors.push(FieldError::not_found(at.field("name"), text("name")));
        }
        if text("mountPath").is_empty() {
            errors.push(FieldError::required(at.field("mountPath"), ""));
        } else if !paths.insert(text("mountPath")) {
            let detail = "must be unique";
            errors.push(FieldError::invalid(at.field("mountPath"), text("mountPath"), detail));
        }
        let (inner, expanded) = (text("subPath"), text("subPathExpr"));
        if !inner.is_empty() && !expanded.is_empty() {
            errors.push(FieldError::invalid(
                at.field("subPathExpr"),
                expanded,
                "subPathExpr and subPath are mutually exclusive",
            ));
        }
        for field in ["subPath", "subPathExpr"] {
            let path = text(field);
            if path.starts_with('/') {
                errors.push(FieldError::invalid(at.field(field), path, "must be a relative path"));
            }
            if path.split('/').any(|part| part == "..") {
                errors.push(FieldError::invalid(at.field(field), path, "must not contain '..'"));
            }
        }
    }
}

fn environment(container: &Value, at: &Path<'_>, errors: &mut Vec<FieldError>) {
    let root = at.field("env");
    for (index, variable) in value::list(container, &["env"]).iter().enumerate() {
        let at = root.index(index);
        let name = value::text(variable, &["name"]);
        if name.is_empty() {
            errors.push(FieldError::required(at.field("name"), ""));
        } else if !name.bytes().all(|b| (b' '..=b'~').contains(&b) && b != b'=') {
            errors.push(FieldError::invalid(
                at.field("name"),
                name,
                "a valid environment variable name must consist only of printable ASCII \
                 characters other than '='",
            ));
        }
        let Some(from) = value::at(variable, &["valueFrom"]) else { continue };
        let path = at.field("valueFrom");
        let sources = from.as_object().map_or(0, serde_json::Map::len);
        if !value::text(variable, &["value"]).is_empty() {
            errors.push(FieldError::invalid(
                path,
                "",
                "may not be specified when `value` is not empty",
            ));
        } else if sources == 0 {
            errors.push(FieldError::invalid(
                path,
                "",
                "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, \
                 `secretKeyRef` or `fileKeyRef`",
            ));
        } else if sources > 1 {
            errors.push(FieldError::invalid(
                path,
                "",
                "may not have more than one field specified at a time",
            ));
        }
        for source in ["configMapKeyRef", "secretKeyRef"] {
            if let Some(reference) = value::at(from, &[source])
                && value::text(reference, &["key"]).is_empty()
            {
                let field = path.field(source);
                errors.push(FieldError::required(field.field("key"), ""));
            }
        }
    }
    let root = at.field("envFrom");
    for (index, source) in value::list(container, &["envFrom"]).iter().enumerate() {
        let at = root.index(index);
        let (map, secret) =
            (value::at(source, &["configMapRef"]), value::at(source, &["secretRef"]));
        match (map, secret) {
            (None, None) => errors.push(FieldError::invalid(
                at,
                "",
                "must specify one of: `configMapRef` or `secretRef`",
            )),
            (Some(_), Some(_)) => errors.push(FieldError::invalid(
                at,
                "",
                "may not have more than one field specified at a time",
            )),
            _ => {}
        }
    }
}

fn resources(container: &Value, at: &Path<'_>, errors: &mut Vec<FieldError>) {
    let root = at.field("resources");
    let quantity = |kind: &str, name: &str| {
        value::at(container, &["resources", kind, name])
            .and_then(Value::as_str)
            .and_then(|text| Quantity::parse(text).ok())
    };
    for kind in ["limits", "requests"] {
        let path = root.field(kind);
        for (name, amount) in value::entries(container, &["resources", kind]) {
            let standard = matches!(name.as_str(), "cpu" | "memory" | "ephemeral-storage")
                || name.starts_with("hugepages-");
            if !standard && !name.contains('/') {
                errors.push(FieldError::invalid(
                    path,
                    name.as_str(),
                    "must be a standard resource for containers",
                ));
            }
            if quantity(kind, name).is_some_and(|q| q.is_negative()) {
                errors.push(FieldError::invalid(
                    path.key(name),
                    amount.clone(),
                    rules::NOT_NEGATIVE,
                ));
            }
        }
    }
    let path = root.field("requests");
    for (name, amount) in value::entries(container, &["resources", "requests"]) {
        let (request, limit) = (quantity("requests", name), quantity("limits", name));
        let overcommits = matches!(name.as_str(), "cpu" | "memory" | "ephemeral-storage");
        match (request, limit) {
            (Some(request), Some(limit)) if !overcommits && request != limit => {
                let detail = format!("must be equal to {name} limit of {limit}");
                errors.push(FieldError::invalid(path, amount.clone(), detail));
            }
            (Some(request), Some(limit)) if request > limit => {
                let detail = format!("must be less than or equal to {name} limit of {limit}");
                errors.push(FieldError::invalid(path, amount.clone(), detail));
            }
            (Some(_), None) if !overcommits => errors.push(FieldError::required(
                root.field("limits"),
                "Limit must be set for non overcommitable resources",
            )),
            _ => {}
        }
    }
}

fn probe(given: &Value, field: &str, path: &Path<'_>, errors: &mut Vec<FieldError>) {
    handler(given, &["exec", "httpGet", "tcpSocket", "grpc"], path, errors);
    let numbers = [
        "initialDelaySeconds",
        "timeoutSeconds",
        "periodSeconds",
        "successThreshold",
        "failureThreshold",
    ];
    for name in numbers {
        let number = value::int(given, &[name]).unwrap_or(0);
        if number < 0 {
            errors.push(FieldError::invalid(path.field(name), number, rules::NOT_NEGATIVE));
        }
    }
    let successes = value::int(given, &["successThreshold"]).unwrap_or(1);
    if field != "readinessProbe" && successes > 1 {
        errors.push(FieldError::invalid(path.field("successThreshold"), successes, "must be 1"));
    }
    if let Some(seconds) = value::int(given, &["terminationGracePeriodSeconds"]) {
        let at = path.field("terminationGracePeriodSeconds");
        if field == "readinessProbe" {
            let detail = "must not be set for readinessProbes";
            errors.push(FieldError::invalid(at, seconds, detail));
        } else if seconds < 1 {
            errors.push(FieldError::invalid(at, seconds, "must be greater than 0"));
        }
    }
}

fn handler(given: &Value, kinds: &[&str], path: &Path<'_>, errors: &mut Vec<FieldError>) {
    let mut found = kinds.iter().filter_map(|kind| Some((*kind, value::at(given, &[kind])?)));
    let Some((kind, action)) = found.next() else {
        errors.push(FieldError::required(path, "must specify a handler type"));
        return;
    };
    for (extra, _) in found {
        let detail = "may not specify more than 1 handler type";
        errors.push(FieldError::forbidden(path.field(extra), detail));
    }
    let at = path.field(kind);
    match kind {
        "exec" if value::list(action, &["command"]).is_empty() => {
            errors.push(FieldError::required(at.field("command"), ""));
        }
        "httpGet" | "tcpSocket" => {
            let port = action.get("port").unwrap_or(&Value::Null);
            rules::port_number_or_name(port, at.field("port"), errors);
            if kind == "httpGet" {
                let scheme = value::text(action, &["scheme"]);
                check_supported(at.field("scheme"), scheme, &["HTTP", "HTTPS"], errors);
            }
        }
        "grpc" => {
            let port = value::int(action, &["port"]).unwrap_or(0);
            rules::port_number(port, at.field("port"), errors);
        }
        "sleep" => {
            let seconds = value::int(action, &["seconds"]).unwrap_or(0);
            if seconds < 0 {
                let shown = json!(seconds);
                let detail = "must be non-negative";
                errors.push(FieldError::invalid(at.field("seconds"), shown, detail));
            }
        }
        _ => {}
    }
}
