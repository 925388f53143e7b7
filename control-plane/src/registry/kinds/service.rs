//! Services.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::rules::{self, check_supported};
use crate::{
    registry::{
        Strategy,
        path::Path,
        value::{self, set_default, set_default_text},
    },
    status::FieldError,
};

/// Services.
///
/// Cluster addresses and node ports are given by whoever stores the object; here they are kept and
/// checked.
pub(in crate::registry) static SERVICE: Strategy = Strategy {
    create_on_update: true,
    default,
    prepare_create: |object| object["status"] = json!({"loadBalancer": {}}),
    prepare_update,
    validate,
    fields: &[
        ("spec.clusterIP", |o| value::text(o, &["spec", "clusterIP"]).to_owned()),
        ("spec.type", |o| value::text(o, &["spec", "type"]).to_owned()),
    ],
    columns: &crate::table::SERVICE,
    ..Strategy::PLAIN
};

const PROTOCOLS: &[&str] = &["SCTP", "TCP", "UDP"];
const TYPES: &[&str] = &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];
/// Three hours.
const AFFINITY_SECONDS: i64 = 10_800;
const LONGEST_AFFINITY_SECONDS: i64 = 86_400;

fn default(service: &mut Value) {
    let Some(spec) = value::object_at(service, "spec") else { return };
    set_default_text(spec, "sessionAffinity", "None");
    set_default_text(spec, "type", "ClusterIP");
    let text = |spec: &Map<String, Value>, field: &str| {
        spec.get(field).and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    let kind = text(spec, "type");
    if text(spec, "sessionAffinity") == "ClientIP" {
        let config = spec.entry("sessionAffinityConfig").or_insert_with(|| json!({}));
        if value::int(config, &["clientIP", "timeoutSeconds"]).is_none() {
            *config = json!({"clientIP": {"timeoutSeconds": AFFINITY_SECONDS}});
        }
    } else {
        spec.remove("sessionAffinityConfig");
    }
    if kind != "ExternalName" {
        set_default_text(spec, "internalTrafficPolicy", "Cluster");
    }
    let outside = spec.get("externalIPs").and_then(Value::as_array).is_some_and(|l| !l.is_empty());
    if matches!(&*kind, "NodePort" | "LoadBalancer") || outside {
        set_default_text(spec, "externalTrafficPolicy", "Cluster");
    }
    if kind == "LoadBalancer" {
        set_default(spec, "allocateLoadBalancerNodePorts", true);
    }
    for port in spec.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
        let number = port.get("port").cloned().unwrap_or_default();
        if let Some(port) = port.as_object_mut() {
            set_default_text(port, "protocol", "TCP");
            let target = port.get("targetPort");
            if target.is_none_or(|t| t.is_null() || *t == json!(0) || *t == json!("")) {
                port.insert("targetPort".to_owned(), number);
            }
        }
    }
    same_cluster_addresses(spec);
}

/// `clusterIP` and the first of `clusterIPs` are one.
fn same_cluster_addresses(spec: &mut Map<String, Value>) {
    let one = spec.get("clusterIP").and_then(Value::as_str).unwrap_or_default().to_owned();
    let first = spec
        .get("clusterIPs")
        .and_then(|list| list.get(0))
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned();
    if first.is_empty() && !one.is_empty() {
        spec.insert("clusterIPs".to_owned(), json!([one]));
    }
}

fn is_one_of(service: &Value, kinds: &[&str]) -> bool {
    kinds.contains(&value::text(service, &["spec", "type"]))
}

const WITH_CLUSTER_ADDRESS: &[&str] = &["ClusterIP", "NodePort", "LoadBalancer"];
const WITH_NODE_PORTS: &[&str] = &["NodePort", "LoadBalancer"];

/// Keeps what was given to the Service when an update does not speak of it, and drops what its new
/// type has no use for.
fn prepare_update(new: &mut Value, old: &Value, subresource: &str) {
    if !subresource.is_empty() {
        return;
    }
    let (had_address, has_address) =
        (is_one_of(old, WITH_CLUSTER_ADDRESS), is_one_of(new, WITH_CLUSTER_ADDRESS));
    let (had_ports, has_ports) = (is_one_of(old, WITH_NODE_PORTS), is_one_of(new, WITH_NODE_PORTS));
    let old_spec = old.get("spec").unwrap_or(&Value::Null);
    let Some(spec) = value::object_at(new, "spec") else { return };
    let kept = ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"];
    if had_address && has_address {
        let named = spec.get("clusterIP").and_then(Value::as_str).unwrap_or_default();
        if named.is_empty() {
            for field in &kept[..2] {
                value::copy_field(spec, old_spec, field);
            }
        }
        for field in &kept[2..] {
            if spec.get(*field).is_none_or(Value::is_null) {
                value::copy_field(spec, old_spec, field);
            }
        }
    } else if had_address {
        for field in kept {
            if spec.get(field) == old_spec.get(field) {
                spec.remove(field);
            }
        }
        spec.remove("internalTrafficPolicy");
    }
    let old_ports = value::list(old_spec, &["ports"]);
    for port in spec.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
        let same_port = old_ports.iter().find(|old| {
            ["port", "protocol", "name"].iter().all(|f| value::same(port.get(*f), old.get(*f)))
        });
        let Some(before) = same_port.and_then(|old| value::int(old, &["nodePort"])) else {
            continue;
        };
        let given = value::int(port, &["nodePort"]).unwrap_or(0);
        if let Some(port) = port.as_object_mut() {
            if had_ports && has_ports && given == 0 {
                port.insert("nodePort".to_owned(), before.into());
            } else if had_ports && !has_ports && given == before {
                port.remove("nodePort");
            }
        }
    }
    if had_ports && !has_ports {
        for field in
            ["externalTrafficPolicy", "healthCheckNodePort", "allocateLoadBalancerNodePorts"]
        {
            if spec.get(field) == old_spec.get(field) {
                spec.remove(field);
            }
        }
    }
}

fn validate(new: &Value, old: Option<&Value>, subresource: &str, errors: &mut Vec<FieldError>) {
    if subresource == "status" {
        return;
    }
    let spec = new.get("spec").unwrap_or(&Value::Null);
    let kind = value::text(spec, &["type"]);
    let address = value::text(spec, &["clusterIP"]);
    check_supported("spec.type", kind, TYPES, errors);
    let ports = value::list(spec, &["ports"]);
    if ports.is_empty() && address != "None" && kind != "ExternalName" {
        errors.push(FieldError::required("spec.ports", ""));
    }
    check_ports(kind, ports, errors);
    let root = Path::Root.field("spec");
    rules::labels(spec.get("selector"), &root.field("selector"), errors);
    check_supported(
        "spec.sessionAffinity",
        value::text(spec, &["sessionAffinity"]),
        &["ClientIP", "None"],
        errors,
    );
    if let Some(seconds) =
        value::int(spec, &["sessionAffinityConfig", "clientIP", "timeoutSeconds"])
        && !(1..=LONGEST_AFFINITY_SECONDS).contains(&seconds)
    {
        errors.push(FieldError::invalid(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            seconds,
            format!("must be greater than 0 and less than {LONGEST_AFFINITY_SECONDS}"),
        ));
    }
    policies(spec, errors);
    if kind == "ExternalName" {
        external_name(spec, errors);
    }
    addresses(spec, kind, old, errors);
}

fn check_ports(kind: &str, ports: &[Value], errors: &mut Vec<FieldError>) {
    let spec = Path::Root.field("spec");
    let root = spec.field("ports");
    let (mut names, mut numbers, mut node_ports) =
        (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for (index, port) in ports.iter().enumerate() {
        let at = root.index(index);
        let name = value::text(port, &["name"]);
        if name.is_empty() {
            if ports.len() > 1 {
                errors.push(FieldError::required(at.field("name"), ""));
            }
        } else if let Some(why) = rules::dns_label(name) {
            errors.push(FieldError::invalid(at.field("name"), name, why));
        } else if !names.insert(name) {
            errors.push(FieldError::duplicate(at.field("name"), name));
        }
        let number = value::int(port, &["port"]).unwrap_or(0);
        rules::port_number(number, at.field("port"), errors);
        let protocol = value::text(port, &["protocol"]);
        check_supported(at.field("protocol"), protocol, PROTOCOLS, errors);
        if let Some(target) = value::at(port, &["targetPort"]) {
            rules::port_number_or_name(target, at.field("targetPort"), errors);
        }
        if !numbers.insert((protocol, number)) {
            errors.push(FieldError::duplicate(at, json!({"port": number, "protocol": protocol})));
        }
        let node_port = value::int(port, &["nodePort"]).unwrap_or(0);
        if node_port == 0 {
            continue;
        }
        if !WITH_NODE_PORTS.contains(&kind) {
            errors.push(FieldError::forbidden(
                at.field("nodePort"),
                format!("may not be used when `type` is '{kind}'"),
            ));
        } else if !(1..=65535).contains(&node_port) {
            rules::port_number(node_port, at.field("nodePort"), errors);
        } else if !node_ports.insert((protocol, node_port)) {
            errors.push(FieldError::duplicate(at.field("nodePort"), node_port));
        }
    }
}

fn policies(spec: &Value, errors: &mut Vec<FieldError>) {
    for field in ["internalTrafficPolicy", "externalTrafficPolicy"] {
        let policy = value::text(spec, &[field]);
        if !policy.is_empty() {
            check_supported(format_args!("spec.{field}"), policy, &["Cluster", "Local"], errors);
        }
    }
    let policy = value::text(spec, &["ipFamilyPolicy"]);
    if !policy.is_empty() {
        let all = &["PreferDualStack", "RequireDualStack", "SingleStack"];
        check_supported("spec.ipFamilyPolicy", policy, all, errors);
    }
    for (index, family) in value::list(spec, &["ipFamilies"]).iter().enumerate() {
        let text = family.as_str().unwrap_or_default();
        check_supported(format_args!("spec.ipFamilies[{index}]"), text, &["IPv4", "IPv6"], errors);
    }
    for (index, address) in value::list(spec, &["externalIPs"]).iter().enumerate() {
        let text = address.as_str().unwrap_or_default();
        rules::ip_address(text, format_args!("spec.externalIPs[{index}]"), errors);
    }
    for (index, range) in value::list(spec, &["loadBalancerSourceRanges"]).iter().enumerate() {
        let text = range.as_str().unwrap_or_default();
        if text.parse::<ipnet::IpNet>().is_err() {
            errors.push(FieldError::invalid(
                format_args!("spec.loadBalancerSourceRanges[{index}]"),
                text,
                "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)",
            ));
        }
    }
}

fn external_name(spec: &Value, errors: &mut Vec<FieldError>) {
    let name = value::text(spec, &["externalName"]);
    if name.is_empty() {
        errors.push(FieldError::required("spec.externalName", ""));
    } else if let Some(why) = rules::dns_subdomain(name.trim_end_matches('.')) {
        errors.push(FieldError::invalid("spec.externalName", name, why));
    }
}

fn addresses(spec: &Value, kind: &str, old: Option<&Value>, errors: &mut Vec<FieldError>) {
    let address = value::text(spec, &["clusterIP"]);
    let list = value::list(spec, &["clusterIPs"]);
    if kind == "ExternalName" {
        if !address.is_empty() || !list.is_empty() {
            errors.push(FieldError::forbidden(
                "spec.clusterIPs",
                "may not be set when `type` is 'ExternalName'",
            ));
        }
        return;
    }
    if address == "None" && WITH_NODE_PORTS.contains(&kind) {
        errors.push(FieldError::invalid(
            "spec.clusterIPs[0]",
            "None",
            format!("may not be set to 'None' for {kind} services"),
        ));
    }
    let first = list.first().and_then(Value::as_str).unwrap_or_default();
    if !list.is_empty() && first != address {
        errors.push(FieldError::invalid(
            "spec.clusterIPs",
            Value::from(list.to_vec()),
            "first value must match `clusterIP`",
        ));
    }
    for (index, item) in list.iter().enumerate() {
        let text = item.as_str().unwrap_or_default();
        if !matches!(text, "None" | "") {
            rules::ip_address(text, format_args!("spec.clusterIPs[{index}]"), errors);
        }
    }
    // An address once given stays as long as the type needs one.
    if let Some(old) = old
        && is_one_of(old, WITH_CLUSTER_ADDRESS)
    {
        let before = value::text(old, &["spec", "clusterIP"]);
        if !before.is_empty() && before != address {
            let list = Value::from(list.to_vec());
            errors.push(FieldError::invalid("spec.clusterIPs[0]", list, "may not change once set"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(spec: Value, old: Option<Value>) -> Vec<String> {
        let mut service = json!({ "spec": spec });
        default(&mut service);
        let old = old.map(|spec| json!({ "spec": spec }));
        if let Some(old) = &old {
            prepare_update(&mut service, old, "");
        }
        let mut errors = Vec::new();
        validate(&service, old.as_ref(), "", &mut errors);
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn services_are_checked() {
        let rows = [
            (json!({"ports": [{"port": 80}]}), ""),
            (json!({}), "spec.ports: Required value"),
            (json!({"clusterIP": "None"}), ""),
            (
                json!({"ports": [{"port": 70_000}]}),
                "spec.ports[0].port: Invalid value: 70000: must be between 1 and 65535, inclusive",
            ),
            (
                json!({"ports": [{"port": 80}, {"port": 81, "name": "b"}]}),
                "spec.ports[0].name: Required value",
            ),
            (
                json!({"ports": [{"port": 80, "nodePort": 30000}]}),
                "spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'",
            ),
            (json!({"type": "ExternalName"}), "spec.externalName: Required value"),
            (
                json!({"type": "Sideways", "ports": [{"port": 80}]}),
                "spec.type: Unsupported value: \"Sideways\": supported values: \"ClusterIP\", \
                 \"ExternalName\", \"LoadBalancer\", \"NodePort\"",
            ),
        ];
        for (spec, expected) in rows {
            let found = problems(spec.clone(), None);
            if expected.is_empty() {
                assert!(found.is_empty(), "{spec}: {found:?}");
            } else {
                assert!(found.iter().any(|f| f == expected), "{spec}: {found:?}");
            }
        }
    }

    #[test]
    fn an_address_stays() {
        let old = json!({"type": "ClusterIP", "clusterIP": "10.96.0.5", "clusterIPs": ["10.96.0.5"],
                         "ports": [{"port": 80, "protocol": "TCP"}]});
        assert!(problems(json!({"ports": [{"port": 80}]}), Some(old.clone())).is_empty());
        let other = json!({"clusterIP": "10.96.0.6", "ports": [{"port": 80}]});
        assert_eq!(
            problems(other, Some(old)),
            ["spec.clusterIPs[0]: Invalid value: [\"10.96.0.6\"]: may not change once set"]
        );
    }

    #[test]
    fn node_ports_stay_or_go_with_the_type() {
        let old = json!({"spec": {"type": "NodePort", "clusterIP": "10.96.0.5",
            "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30080}]}});
        let mut new =
            json!({"spec": {"type": "NodePort", "ports": [{"port": 80, "protocol": "TCP"}]}});
        prepare_update(&mut new, &old, "");
        assert_eq!(new["spec"]["ports"][0]["nodePort"], 30080);
        new["spec"]["type"] = "ClusterIP".into();
        prepare_update(&mut new, &old, "");
        assert_eq!(new["spec"]["ports"][0].get("nodePort"), None);
    }
}
