//! Endpoints and EndpointSlices.

use std::{collections::BTreeSet, net::IpAddr};

use serde_json::Value;

use super::rules::{self, check_supported, immutable};
use crate::{
    registry::{
        Strategy,
        path::Path,
        value::{self, set_default, set_default_text},
    },
    status::FieldError,
};

const MOST_ENDPOINTS: usize = 1000;
const MOST_PORTS: usize = 20_000;
const MOST_ADDRESSES: usize = 100;
const PROTOCOLS: &[&str] = &["SCTP", "TCP", "UDP"];

/// Endpoints.
pub(in crate::registry) static ENDPOINTS: Strategy = Strategy {
    create_on_update: true,
    default: |object| {
        for subset in items(object, "subsets") {
            default_ports(subset, false);
        }
    },
    validate: validate_endpoints,
    columns: &crate::table::ENDPOINTS,
    ..Strategy::PLAIN
};

/// EndpointSlices.
pub(in crate::registry) static ENDPOINT_SLICE: Strategy = Strategy {
    default: |object| default_ports(object, true),
    validate: validate_slice,
    columns: &crate::table::ENDPOINT_SLICE,
    ..Strategy::PLAIN
};

fn items<'a>(value: &'a mut Value, field: &str) -> impl Iterator<Item = &'a mut Value> {
    value.get_mut(field).and_then(Value::as_array_mut).into_iter().flatten()
}

fn default_ports(object: &mut Value, named: bool) {
    for port in items(object, "ports") {
        if let Some(port) = port.as_object_mut() {
            set_default_text(port, "protocol", "TCP");
            if named {
                set_default(port, "name", "");
            }
        }
    }
}

/// Addresses that no endpoint may have.
fn check_endpoint_address(text: &str, path: &Path<'_>, errors: &mut Vec<FieldError>) {
    let Ok(address) = text.parse::<IpAddr>() else {
        let detail = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
        errors.push(FieldError::invalid(path, text, detail));
        return;
    };
    let link_local = match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    let why = if address.is_unspecified() {
        Some(format!("may not be unspecified ({address})"))
    } else if address.is_loopback() {
        Some("may not be in the loopback range (127.0.0.0/8, ::1/128)".to_owned())
    } else if link_local {
        Some("may not be in the link-local range (169.254.0.0/16, fe80::/10)".to_owned())
    } else if address.is_multicast() {
        Some("may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)".to_owned())
    } else {
        None
    };
    errors.extend(why.map(|why| FieldError::invalid(path, text, why)));
}

fn validate_endpoints(new: &Value, _: Option<&Value>, _: &str, errors: &mut Vec<FieldError>) {
    let root = Path::Root.field("subsets");
    for (index, subset) in value::list(new, &["subsets"]).iter().enumerate() {
        let at = root.index(index);
        let (ready, waiting) =
            (value::list(subset, &["addresses"]), value::list(subset, &["notReadyAddresses"]));
        if ready.is_empty() && waiting.is_empty() {
            errors
                .push(FieldError::required(at, "must specify `addresses` or `notReadyAddresses`"));
        }
        for (field, list) in [("addresses", ready), ("notReadyAddresses", waiting)] {
            let list_path = at.field(field);
            for (index, address) in list.iter().enumerate() {
                let item = list_path.index(index);
                check_endpoint_address(value::text(address, &["ip"]), &item.field("ip"), errors);
            }
        }
        check_ports(subset, &at, true, errors);
    }
}

fn check_ports(object: &Value, path: &Path<'_>, label_names: bool, errors: &mut Vec<FieldError>) {
    let ports = value::list(object, &["ports"]);
    let root = path.field("ports");
    let mut names = BTreeSet::new();
    for (index, port) in ports.iter().enumerate() {
        let at = root.index(index);
        let name = value::text(port, &["name"]);
        if name.is_empty() && ports.len() > 1 && label_names {
            errors.push(FieldError::required(at.field("name"), ""));
        } else if let Some(why) = rules::dns_label(name).filter(|_| !name.is_empty()) {
            errors.push(FieldError::invalid(at.field("name"), name, why));
        }
        if !names.insert(name) && !label_names {
            errors.push(FieldError::duplicate(at.field("name"), name));
        }
        check_supported(at.field("protocol"), value::text(port, &["protocol"]), PROTOCOLS, errors);
        if let Some(number) = value::int(port, &["port"]) {
            rules::port_number(number, at.field("port"), errors);
        } else if label_names {
            errors.push(FieldError::required(at.field("port"), ""));
        }
    }
}

fn validate_slice(new: &Value, old: Option<&Value>, _: &str, errors: &mut Vec<FieldError>) {
    let kind = value::text(new, &["addressType"]);
    check_supported("addressType", kind, &["FQDN", "IPv4", "IPv6"], errors);
    if let Some(old) = old {
        immutable(new, old, &["addressType"], rules::IMMUTABLE, errors);
    }
    let endpoints = value::list(new, &["endpoints"]);
    if endpoints.len() > MOST_ENDPOINTS {
        errors.push(FieldError::too_many("endpoints", endpoints.len(), MOST_ENDPOINTS));
        return;
    }
    let ports = value::list(new, &["ports"]);
    if ports.len() > MOST_PORTS {
        errors.push(FieldError::too_many("ports", ports.len(), MOST_PORTS));
        return;
    }
    let root = Path::Root.field("endpoints");
    for (index, endpoint) in endpoints.iter().enumerate() {
        let at = root.index(index);
        let list_path = at.field("addresses");
        let addresses = value::list(endpoint, &["addresses"]);
        if addresses.is_empty() {
            errors.push(FieldError::required(list_path, "must contain at least 1 address"));
        } else if addresses.len() > MOST_ADDRESSES {
            errors.push(FieldError::too_many(list_path, addresses.len(), MOST_ADDRESSES));
        }
        for (index, address) in addresses.iter().enumerate() {
            let text = address.as_str().unwrap_or_default();
            check_slice_address(kind, text, &list_path.index(index), errors);
        }
    }
    check_ports(new, &Path::Root, false, errors);
}

fn check_slice_address(kind: &str, text: &str, path: &Path<'_>, errors: &mut Vec<FieldError>) {
    match (kind, text.parse::<IpAddr>()) {
        ("IPv4", Ok(IpAddr::V6(_)) | Err(_)) => {
            errors.push(FieldError::invalid(path, text, "must be a valid IPv4 address"));
        }
        ("IPv6", Ok(IpAddr::V4(_)) | Err(_)) => {
            errors.push(FieldError::invalid(path, text, "must be a valid IPv6 address"));
        }
        ("IPv4" | "IPv6", Ok(_)) => check_endpoint_address(text, path, errors),
        ("FQDN", _) => {
            let why = rules::dns_subdomain(text.trim_end_matches('.'));
            errors.extend(why.map(|why| FieldError::invalid(path, text, why)));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn slices_are_checked() {
        let slice = |kind: &str, address: &str| {
            json!({"addressType": kind, "endpoints": [{"addresses": [address]}],
                   "ports": [{"name": "", "protocol": "TCP", "port": 80}]})
        };
        let rows = [
            (slice("IPv4", "10.0.0.1"), ""),
            (slice("IPv4", "::2"), "must be a valid IPv4 address"),
            (slice("IPv4", "127.0.0.1"), "loopback"),
            (slice("IPv6", "fd00::1"), ""),
            (slice("", "10.0.0.1"), "addressType: Required value"),
            (slice("X", "10.0.0.1"), "supported values: \"FQDN\", \"IPv4\", \"IPv6\""),
            (json!({"addressType": "IPv4", "endpoints": [{}]}), "at least 1 address"),
            (
                json!({"addressType": "IPv4", "endpoints": vec![json!({}); 1001]}),
                "endpoints: Too many: 1001: must have at most 1000 items",
            ),
        ];
        for (slice, expected) in rows {
            let mut errors = Vec::new();
            validate_slice(&slice, None, "", &mut errors);
            let text = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
            assert!(text.contains(expected) && expected.is_empty() == text.is_empty(), "{text}");
        }
    }
}
