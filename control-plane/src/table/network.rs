//! Services and endpoints.

use jiff::Timestamp;
use serde_json::Value;

use super::{AGE, Columns, NAME, NONE, age, name, or_none, selector::labels_text, text, wide};
use crate::registry::value;

/// As many endpoints and ports are shown.
const SHOWN: usize = 3;

pub(crate) static SERVICE: Columns = Columns {
    columns: &[
        NAME,
        text("Type"),
        text("Cluster-IP"),
        text("External-IP"),
        text("Port(s)"),
        AGE,
        wide("Selector"),
    ],
    cells: service,
};

fn service(service: &Value, now: Timestamp) -> Vec<Value> {
    let field = |field: &str| value::text(service, &["spec", field]);
    vec![
        name(service),
        field("type").into(),
        or_none(field("clusterIP")),
        external(service).into(),
        service_ports(service).into(),
        age(service, now),
        labels_text(value::at(service, &["spec", "selector"])).into(),
    ]
}

fn external(service: &Value) -> String {
    let texts = |list: &[Value]| -> Vec<String> {
        list.iter().filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let own = texts(value::list(service, &["spec", "externalIPs"]));
    let shown = match value::text(service, &["spec", "type"]) {
        "ExternalName" => vec![value::text(service, &["spec", "externalName"]).to_owned()],
        "LoadBalancer" => {
            let given = value::list(service, &["status", "loadBalancer", "ingress"]).iter().map(
                |ingress| match value::text(ingress, &["ip"]) {
                    "" => value::text(ingress, &["hostname"]).to_owned(),
                    address => address.to_owned(),
                },
            );
            let all: Vec<String> = given.chain(own).collect();
            if all.is_empty() {
                return "<pending>".to_owned();
            }
            all
        }
        _ => own,
    };
    if shown.is_empty() { NONE.to_owned() } else { shown.join(",") }
}

fn service_ports(service: &Value) -> String {
    let ports: Vec<String> = value::list(service, &["spec", "ports"])
        .iter()
        .map(|port| {
            let number = value::int(port, &["port"]).unwrap_or(0);
            let protocol = value::text(port, &["protocol"]);
            match value::int(port, &["nodePort"]).unwrap_or(0) {
                0 => format!("{number}/{protocol}"),
                node_port => format!("{number}:{node_port}/{protocol}"),
            }
        })
        .collect();
    if ports.is_empty() { NONE.to_owned() } else { ports.join(",") }
}

pub(crate) static ENDPOINTS: Columns = Columns {
    columns: &[NAME, text("Endpoints"), AGE],
    cells: |object, now| vec![name(object), endpoints(object).into(), age(object, now)],
};

fn some_of(all: &[String], nothing: &str) -> String {
    if all.is_empty() {
        return nothing.to_owned();
    }
    let shown = all.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(",");
    match all.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} + {more} more..."),
    }
}

fn endpoints(object: &Value) -> String {
    let mut all = Vec::new();
    for subset in value::list(object, &["subsets"]) {
        let addresses = || {
            value::list(subset, &["addresses"]).iter().map(|a| value::text(a, &["ip"]).to_owned())
        };
        let ports = value::list(subset, &["ports"]);
        if ports.is_empty() {
            all.extend(addresses());
        }
        for port in ports {
            let number = value::int(port, &["port"]).unwrap_or(0);
            all.extend(addresses().map(|address| {
                if address.contains(':') {
                    format!("[{address}]:{number}")
                } else {
                    format!("{address}:{number}")
                }
            }));
        }
    }
    some_of(&all, NONE)
}

pub(crate) static ENDPOINT_SLICE: Columns = Columns {
    columns: &[NAME, text("AddressType"), text("Ports"), text("Endpoints"), AGE],
    cells: slice,
};

fn slice(object: &Value, now: Timestamp) -> Vec<Value> {
    let ports: Vec<String> = value::list(object, &["ports"])
        .iter()
        .map(|port| {
            value::int(port, &["port"]).map_or_else(|| "*".to_owned(), |port| port.to_string())
        })
        .collect();
    let addresses: Vec<String> = value::list(object, &["endpoints"])
        .iter()
        .flat_map(|endpoint| value::list(endpoint, &["addresses"]))
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect();
    vec![
        name(object),
        value::text(object, &["addressType"]).into(),
        some_of(&ports, "<unset>").into(),
        some_of(&addresses, "<unset>").into(),
        age(object, now),
    ]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn services_read_as_in_kubectl() {
        let object = json!({"metadata": {"name": "s"}, "spec": {
            "type": "NodePort", "clusterIP": "10.96.0.7", "selector": {"b": "2", "a": "1"},
            "ports": [{"port": 80, "nodePort": 30080, "protocol": "TCP"},
                      {"port": 53, "protocol": "UDP"}]}});
        assert_eq!(
            Value::Array(service(&object, Timestamp::UNIX_EPOCH)),
            json!([
                "s",
                "NodePort",
                "10.96.0.7",
                "<none>",
                "80:30080/TCP,53/UDP",
                "<unknown>",
                "a=1,b=2"
            ])
        );
        assert_eq!(external(&json!({"spec": {"type": "LoadBalancer"}})), "<pending>");
    }

    #[test]
    fn many_endpoints_are_cut_short() {
        let addresses: Vec<Value> = (1..=5).map(|i| json!({"ip": format!("10.0.0.{i}")})).collect();
        let object = json!({"subsets": [{"addresses": addresses, "ports": [{"port": 80}]}]});
        assert_eq!(endpoints(&object), "10.0.0.1:80,10.0.0.2:80,10.0.0.3:80 + 2 more...");
        assert_eq!(endpoints(&json!({})), "<none>");
    }
}
