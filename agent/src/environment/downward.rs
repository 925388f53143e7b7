//! The downward API: what a pod may be told of itself, in variables and in files.

use std::{collections::BTreeMap, fmt::Write, net::IpAddr};

use k8s_openapi::api::core::v1::{Container, ObjectFieldSelector, Pod, ResourceFieldSelector};
use keelson_api::quantity::Quantity;

use super::PodAddresses;

/// What the node's pods may use together, by resource name: the limit of a container without one.
pub type Allocatable = BTreeMap<String, Quantity>;

/// Where a field is asked for: not all are to be had in both places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place<'a> {
    /// A variable, made when the container is: the pod's addresses are known.
    Variable(&'a PodAddresses),
    /// A file, kept fresh: all labels and annotations may be asked for.
    File,
}

/// The value of a `fieldRef`.
///
/// # Errors
/// The path is not one that the API documents for this place.
pub(crate) fn field(
    pod: &Pod,
    selector: &ObjectFieldSelector,
    place: Place<'_>,
) -> Result<String, String> {
    let path = selector.field_path.as_str();
    if let Some(version) = selector.api_version.as_deref().filter(|v| !matches!(*v, "" | "v1")) {
        return Err(format!("unsupported pod version: {version}"));
    }
    let metadata = &pod.metadata;
    let text = |value: &Option<String>| Ok(value.clone().unwrap_or_default());
    if let Some((map, key)) = subscript(path) {
        let map = match map {
            "metadata.labels" => &metadata.labels,
            "metadata.annotations" => &metadata.annotations,
            _ => return Err(format!("fieldPath {path:?} does not support subscript")),
        };
        let value = map.as_ref().and_then(|map| map.get(key));
        return Ok(value.cloned().unwrap_or_default());
    }
    let spec = pod.spec.as_ref();
    match (path, place) {
        ("metadata.name", _) => text(&metadata.name),
        ("metadata.namespace", _) => text(&metadata.namespace),
        ("metadata.uid", _) => text(&metadata.uid),
        ("metadata.labels", Place::File) => Ok(lines(metadata.labels.as_ref())),
        ("metadata.annotations", Place::File) => Ok(lines(metadata.annotations.as_ref())),
        ("spec.nodeName", Place::Variable(_)) => {
            Ok(spec.and_then(|spec| spec.node_name.clone()).unwrap_or_default())
        }
        ("spec.serviceAccountName", Place::Variable(_)) => {
            Ok(spec.and_then(|spec| spec.service_account_name.clone()).unwrap_or_default())
        }
        ("status.hostIP", Place::Variable(addresses)) => Ok(first(&addresses.host_ips)),
        ("status.hostIPs", Place::Variable(addresses)) => Ok(joined(&addresses.host_ips)),
        ("status.podIP", Place::Variable(addresses)) => Ok(first(&addresses.pod_ips)),
        ("status.podIPs", Place::Variable(addresses)) => Ok(joined(&addresses.pod_ips)),
        _ => Err(format!("unsupported fieldPath: {path}")),
    }
}

/// The value of a `resourceFieldRef`, of the given container unless it names another of the pod.
///
/// # Errors
/// There is no such container, or no such resource, or an amount can't be read.
pub(crate) fn resource(
    pod: &Pod,
    container: Option<&Container>,
    selector: &ResourceFieldSelector,
    allocatable: &Allocatable,
) -> Result<String, String> {
    let named = selector.container_name.as_deref().filter(|name| !name.is_empty());
    let container = match named {
        None => container.ok_or("resourceFieldRef needs a containerName here")?,
        Some(name) => find(pod, name).ok_or_else(|| format!("container {name} not found"))?,
    };
    let amount = |quantity: &str, what: &str| {
        Quantity::parse(quantity).map_err(|error| format!("{what} {quantity:?}: {error}"))
    };
    let divisor = match selector.divisor.as_ref().filter(|d| !d.0.is_empty()) {
        Some(divisor) => amount(&divisor.0, "divisor")?,
        None => Quantity::from_units(1),
    };
    let unsupported = || format!("unsupported container resource: {}", selector.resource);
    let (kind, name) = selector.resource.split_once('.').ok_or_else(unsupported)?;
    if !matches!(name, "cpu" | "memory" | "ephemeral-storage") && !name.starts_with("hugepages-") {
        return Err(unsupported());
    }
    let resources = container.resources.as_ref();
    let given = match kind {
        "limits" => resources.and_then(|r| r.limits.as_ref()),
        "requests" => resources.and_then(|r| r.requests.as_ref()),
        _ => return Err(unsupported()),
    };
    let given = given.and_then(|given| given.get(name)).map(|q| amount(&q.0, name)).transpose()?;
    let value = match given.filter(|amount| !amount.is_zero()) {
        Some(amount) => amount,
        // A container without a limit may use what the node has for its pods.
        None if kind == "limits" => {
            allocatable.get(name).cloned().unwrap_or_else(|| Quantity::from_units(0))
        }
        None => Quantity::from_units(0),
    };
    Ok(value.divided_by(&divisor).to_string())
}

fn find<'a>(pod: &'a Pod, name: &str) -> Option<&'a Container> {
    let spec = pod.spec.as_ref()?;
    let init = spec.init_containers.as_deref().unwrap_or_default();
    spec.containers.iter().chain(init).find(|container| container.name == name)
}

/// `map['key']`.
fn subscript(path: &str) -> Option<(&str, &str)> {
    let (map, rest) = path.split_once("['")?;
    Some((map, rest.strip_suffix("']")?))
}

fn first(addresses: &[IpAddr]) -> String {
    addresses.first().map(IpAddr::to_string).unwrap_or_default()
}

fn joined(addresses: &[IpAddr]) -> String {
    addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(",")
}

/// `key="value"`, one a line, sorted.
fn lines(map: Option<&BTreeMap<String, String>>) -> String {
    let lines = map.into_iter().flatten().map(|(key, value)| format!("{key}={}", quoted(value)));
    lines.collect::<Vec<_>>().join("\n")
}

/// A double-quoted string with the escapes that the API documents for these files: those of C, and
/// `\u` for what can't be printed.
fn quoted(value: &str) -> String {
    let mut quoted = String::with_capacity(value.len() + 2);
    quoted.push('"');
    for c in value.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\u{7}' => quoted.push_str("\\a"),
            '\u{8}' => quoted.push_str("\\b"),
            '\u{c}' => quoted.push_str("\\f"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            '\u{b}' => quoted.push_str("\\v"),
            c if c.is_ascii_control() => {
                // Writing to a string can't fail.
                let _ = write!(quoted, "\\x{:02x}", c as u32);
            }
            c if c.is_control() => {
                let _ = write!(quoted, "\\u{:04x}", c as u32);
            }
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> Pod {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "web", "namespace": "team", "uid": "u-1",
                "labels": {"b": "2", "a": "1"}, "annotations": {"note": "a \"b\"\nc\\"}},
            "spec": {"nodeName": "n1", "serviceAccountName": "sa", "containers": [
                {"name": "c", "resources": {"limits": {"memory": "64Mi"},
                    "requests": {"cpu": "125m", "memory": "32Mi"}}},
                {"name": "d"}]},
        }))
        .unwrap()
    }

    fn asked(path: &str) -> ObjectFieldSelector {
        ObjectFieldSelector { field_path: path.to_owned(), api_version: None }
    }

    #[test]
    fn all_documented_fields_are_known_where_they_are_documented() {
        let addresses = PodAddresses {
            host_ips: vec![IpAddr::from([192, 0, 2, 1])],
            pod_ips: vec![IpAddr::from([10, 0, 0, 1]), "fd00::1".parse().unwrap()],
        };
        let (variable, file) = (Place::Variable(&addresses), Place::File);
        for (path, place, expected) in [
            ("metadata.name", variable, Some("web")),
            ("metadata.namespace", file, Some("team")),
            ("metadata.uid", variable, Some("u-1")),
            ("metadata.labels['a']", variable, Some("1")),
            ("metadata.labels['none']", file, Some("")),
            ("metadata.annotations['note']", variable, Some("a \"b\"\nc\\")),
            ("metadata.labels", variable, None),
            ("metadata.labels", file, Some("a=\"1\"\nb=\"2\"")),
            ("metadata.annotations", file, Some("note=\"a \\\"b\\\"\\nc\\\\\"")),
            ("spec.nodeName", variable, Some("n1")),
            ("spec.nodeName", file, None),
            ("spec.serviceAccountName", variable, Some("sa")),
            ("status.hostIP", variable, Some("192.0.2.1")),
            ("status.hostIPs", variable, Some("192.0.2.1")),
            ("status.podIP", variable, Some("10.0.0.1")),
            ("status.podIPs", variable, Some("10.0.0.1,fd00::1")),
            ("status.podIP", file, None),
            ("spec.containers", variable, None),
            ("metadata.name['x']", variable, None),
            ("", file, None),
        ] {
            let found = field(&pod(), &asked(path), place).ok();
            assert_eq!(found.as_deref(), expected, "{path} {place:?}");
        }
    }

    #[test]
    fn resources_are_divided_and_limits_default_to_the_node() {
        let allocatable = Allocatable::from([
            ("cpu".to_owned(), Quantity::from_units(4)),
            ("memory".to_owned(), Quantity::from_bytes(8 << 30)),
        ]);
        for (container, resource_name, divisor, expected) in [
            ("c", "limits.memory", "", Some("67108864")),
            ("c", "limits.memory", "1Mi", Some("64")),
            ("c", "limits.memory", "60Mi", Some("2")),
            ("c", "requests.cpu", "", Some("1")),
            ("c", "requests.cpu", "1m", Some("125")),
            ("c", "limits.cpu", "", Some("4")),
            ("d", "limits.memory", "1Gi", Some("8")),
            ("d", "requests.memory", "", Some("0")),
            ("d", "limits.hugepages-2Mi", "", Some("0")),
            ("d", "limits.gpu", "", None),
            ("d", "memory", "", None),
            ("none", "limits.cpu", "", None),
        ] {
            let selector: ResourceFieldSelector = serde_json::from_value(serde_json::json!({
                "containerName": container, "resource": resource_name, "divisor": divisor,
            }))
            .unwrap();
            let found = resource(&pod(), None, &selector, &allocatable).ok();
            assert_eq!(found.as_deref(), expected, "{container} {resource_name} {divisor}");
        }
    }
}
