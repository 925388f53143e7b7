//! Nodes as `kubectl get nodes` shows them.

use jiff::Timestamp;
use serde_json::Value;

use super::{AGE, Columns, NAME, NONE, age, name, text, wide};
use crate::registry::value;

pub(crate) static NODE: Columns = Columns {
    columns: &[
        NAME,
        text("Status"),
        text("Roles"),
        AGE,
        text("Version"),
        wide("Internal-IP"),
        wide("External-IP"),
        wide("OS-Image"),
        wide("Kernel-Version"),
        wide("Container-Runtime"),
    ],
    cells,
};

fn cells(node: &Value, now: Timestamp) -> Vec<Value> {
    let info = |field: &str| value::text(node, &["status", "nodeInfo", field]);
    let known = |text: &str| Value::from(if text.is_empty() { "<unknown>" } else { text });
    vec![
        name(node),
        status(node).into(),
        roles(node).into(),
        age(node, now),
        info("kubeletVersion").into(),
        address(node, "InternalIP"),
        address(node, "ExternalIP"),
        known(info("osImage")),
        known(info("kernelVersion")),
        known(info("containerRuntimeVersion")),
    ]
}

fn status(node: &Value) -> String {
    let ready = value::list(node, &["status", "conditions"])
        .iter()
        .find(|condition| value::text(condition, &["type"]) == "Ready")
        .map(|condition| value::text(condition, &["status"]));
    let mut out = match ready {
        Some("True") => "Ready",
        Some(_) => "NotReady",
        None => "Unknown",
    }
    .to_owned();
    if value::flag(node, &["spec", "unschedulable"]) {
        out.push_str(",SchedulingDisabled");
    }
    out
}

fn roles(node: &Value) -> String {
    let mut roles: Vec<&str> = value::entries(node, &["metadata", "labels"])
        .filter_map(|(key, label)| match key.strip_prefix("node-role.kubernetes.io/") {
            Some(role) => Some(role),
            None if key == "kubernetes.io/role" => label.as_str(),
            None => None,
        })
        .filter(|role| !role.is_empty())
        .collect();
    if roles.is_empty() {
        return NONE.to_owned();
    }
    roles.sort_unstable();
    roles.dedup();
    roles.join(",")
}

fn address(node: &Value, kind: &str) -> Value {
    value::list(node, &["status", "addresses"])
        .iter()
        .find(|address| value::text(address, &["type"]) == kind)
        .map_or(NONE, |address| value::text(address, &["address"]))
        .into()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nodes_read_as_in_kubectl() {
        let node = json!({
            "metadata": {"name": "n", "labels": {"node-role.kubernetes.io/worker": "",
                "node-role.kubernetes.io/control-plane": ""}},
            "spec": {"unschedulable": true},
            "status": {"conditions": [{"type": "Ready", "status": "True"}],
                "addresses": [{"type": "InternalIP", "address": "10.0.0.1"}],
                "nodeInfo": {"kubeletVersion": "v1.36.0"}},
        });
        let cells = cells(&node, Timestamp::UNIX_EPOCH);
        let expected = json!([
            "n",
            "Ready,SchedulingDisabled",
            "control-plane,worker",
            "<unknown>",
            "v1.36.0",
            "10.0.0.1",
            "<none>",
            "<unknown>",
            "<unknown>",
            "<unknown>",
        ]);
        assert_eq!(Value::Array(cells), expected);
    }
}
