//! Whether nodes are still heard of, and the taints that follow: pure functions.

use std::{collections::HashMap, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{
    api::{
        coordination::v1::Lease,
        core::v1::{Node, NodeCondition, Taint},
    },
    apimachinery::pkg::apis::meta::v1::Time,
};
use tokio::time::Instant;

/// Taint of a node that says it is not ready.
pub(crate) const NOT_READY: &str = "node.kubernetes.io/not-ready";
/// Taint of a node that is not heard of.
pub(crate) const UNREACHABLE: &str = "node.kubernetes.io/unreachable";

/// Conditions that a node's agent reports, and which become unknown with it.
const REPORTED: [&str; 4] = ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"];

/// Conditions that keep new pods away while they are `True`.
const PRESSURES: [(&str, &str); 4] = [
    ("MemoryPressure", "node.kubernetes.io/memory-pressure"),
    ("DiskPressure", "node.kubernetes.io/disk-pressure"),
    ("PIDPressure", "node.kubernetes.io/pid-pressure"),
    ("NetworkUnavailable", "node.kubernetes.io/network-unavailable"),
];
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";

/// A node's condition of a type.
pub(crate) fn condition<'n>(node: &'n Node, kind: &str) -> Option<&'n NodeCondition> {
    node.status.as_ref()?.conditions.iter().flatten().find(|c| c.type_ == kind)
}

/// A node's word on whether it is ready: `True`, `False` or `Unknown`.
pub(crate) fn readiness(node: &Node) -> &str {
    condition(node, "Ready").map_or("Unknown", |c| c.status.as_str())
}

/// When each node was last heard of, by this process's own clock: the nodes' clocks may be wrong.
#[derive(Debug, Default)]
pub(crate) struct LastHeard {
    nodes: HashMap<String, (Option<Timestamp>, Option<Timestamp>, Instant)>,
}

impl LastHeard {
    /// Looks at a node and its lease; returns how long nothing new was heard.
    pub(crate) fn silence(&mut self, node: &Node, lease: Option<&Lease>, now: Instant) -> Duration {
        let name = node.metadata.name.clone().unwrap_or_default();
        let heartbeat = condition(node, "Ready")
            .and_then(|c| c.last_heartbeat_time.as_ref())
            .map(|time| time.0);
        let renewal = lease.and_then(|l| l.spec.as_ref()?.renew_time.as_ref().map(|time| time.0));
        let entry = self.nodes.entry(name).or_insert((heartbeat, renewal, now));
        if (entry.0, entry.1) != (heartbeat, renewal) {
            *entry = (heartbeat, renewal, now);
        }
        now.duration_since(entry.2)
    }

    /// Forgets nodes that are gone.
    pub(crate) fn retain(&mut self, is_there: impl Fn(&str) -> bool) {
        self.nodes.retain(|name, _| is_there(name));
    }
}

/// How long a node may be silent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    pub(crate) running: Duration,
    /// Before it has reported anything at all.
    pub(crate) starting: Duration,
}

/// The node with its conditions made unknown, if it has been silent for too long.
pub(crate) fn silenced(
    node: &Node,
    silence: Duration,
    patience: Patience,
    now: Timestamp,
) -> Option<Node> {
    let reported = condition(node, "Ready").is_some();
    if silence <= if reported { patience.running } else { patience.starting } {
        return None;
    }
    let mut changed = node.clone();
    let status = changed.status.get_or_insert_default();
    let conditions = status.conditions.get_or_insert_default();
    for kind in REPORTED {
        match conditions.iter_mut().find(|c| c.type_ == kind) {
            None => conditions.push(NodeCondition {
                type_: kind.to_owned(),
                status: "Unknown".to_owned(),
                reason: Some("NodeStatusNeverUpdated".to_owned()),
                message: Some("Kubelet never posted node status.".to_owned()),
                last_heartbeat_time: node.metadata.creation_timestamp.clone(),
                last_transition_time: Some(Time(now)),
            }),
            Some(known) if known.status != "Unknown" => {
                known.status = "Unknown".to_owned();
                known.reason = Some("NodeStatusUnknown".to_owned());
                known.message = Some("Kubelet stopped posting node status.".to_owned());
                known.last_transition_time = Some(Time(now));
            }
            Some(_) => {}
        }
    }
    (changed != *node).then_some(changed)
}

/// The taints that a node is to have: those that are not ours as they are, and ours by its
/// conditions. `evict` says whether pods may be driven away from it.
pub(crate) fn taints(node: &Node, evict: bool, now: Timestamp) -> Vec<Taint> {
    let known = node.spec.as_ref().and_then(|s| s.taints.clone()).unwrap_or_default();
    let is_ours = |taint: &Taint| {
        let key = taint.key.as_str();
        match taint.effect.as_str() {
            "NoSchedule" => {
                [NOT_READY, UNREACHABLE, UNSCHEDULABLE].contains(&key)
                    || PRESSURES.iter().any(|(_, pressure)| *pressure == key)
            }
            "NoExecute" => [NOT_READY, UNREACHABLE].contains(&key),
            _ => false,
        }
    };
    let mut wanted: Vec<(&str, &str)> = Vec::new();
    let state = match readiness(node) {
        "True" => None,
        "False" => Some(NOT_READY),
        _ => Some(UNREACHABLE),
    };
    if let Some(key) = state {
        wanted.push((key, "NoSchedule"));
        if evict {
            wanted.push((key, "NoExecute"));
        }
    }
    for (kind, key) in PRESSURES {
        if condition(node, kind).is_some_and(|c| c.status == "True") {
            wanted.push((key, "NoSchedule"));
        }
    }
    if node.spec.as_ref().and_then(|s| s.unschedulable) == Some(true) {
        wanted.push((UNSCHEDULABLE, "NoSchedule"));
    }
    let mut taints: Vec<Taint> = known
        .iter()
        .filter(|t| !is_ours(t) || wanted.contains(&(t.key.as_str(), t.effect.as_str())))
        .cloned()
        .collect();
    for (key, effect) in wanted {
        if !taints.iter().any(|t| t.key == key && t.effect == effect) {
            taints.push(Taint {
                key: key.to_owned(),
                effect: effect.to_owned(),
                value: None,
                time_added: Some(Time(now)),
            });
        }
    }
    taints
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const PATIENCE: Patience =
        Patience { running: Duration::from_secs(50), starting: Duration::from_secs(60) };

    fn node(status: &str, spec: Value) -> Node {
        let conditions = if status.is_empty() {
            json!([])
        } else {
            json!([{"type": "Ready", "status": status}])
        };
        serde_json::from_value(json!({"metadata": {"name": "n1"}, "spec": spec,
            "status": {"conditions": conditions}}))
        .unwrap()
    }

    fn now() -> Timestamp {
        "2026-01-01T00:00:00Z".parse().unwrap()
    }

    #[test]
    fn a_silent_node_becomes_unknown() {
        let node = node("True", json!({}));
        let seconds = Duration::from_secs;
        assert!(silenced(&node, seconds(50), PATIENCE, now()).is_none());
        let changed = silenced(&node, seconds(51), PATIENCE, now()).unwrap();
        let ready = condition(&changed, "Ready").unwrap();
        assert_eq!(ready.status, "Unknown");
        assert_eq!(ready.reason.as_deref(), Some("NodeStatusUnknown"));
        let pressure = condition(&changed, "MemoryPressure").unwrap();
        assert_eq!(pressure.reason.as_deref(), Some("NodeStatusNeverUpdated"));
        assert!(silenced(&changed, seconds(99), PATIENCE, now()).is_none());
    }

    #[test]
    fn a_new_node_has_longer() {
        let node = node("", json!({}));
        assert!(silenced(&node, Duration::from_secs(60), PATIENCE, now()).is_none());
        assert!(silenced(&node, Duration::from_secs(61), PATIENCE, now()).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_measured_by_our_clock() {
        let mut heard = LastHeard::default();
        let node = node("True", json!({}));
        assert_eq!(heard.silence(&node, None, Instant::now()), Duration::ZERO);
        tokio::time::advance(Duration::from_secs(30)).await;
        assert_eq!(heard.silence(&node, None, Instant::now()), Duration::from_secs(30));
        let lease: Lease = serde_json::from_value(json!({"metadata": {},
            "spec": {"renewTime": "2001-01-01T00:00:00.000000Z"}}))
        .unwrap();
        assert_eq!(heard.silence(&node, Some(&lease), Instant::now()), Duration::ZERO);
    }

    #[test]
    fn taints_follow_conditions_and_leave_others_alone() {
        let own = json!({"taints": [{"key": "mine", "effect": "NoSchedule"}]});
        let keys = |node: &Node, evict: bool| -> Vec<String> {
            let taints = taints(node, evict, now());
            taints.iter().map(|t| format!("{}:{}", t.key, t.effect)).collect()
        };
        let table: [(Node, bool, &[&str]); 5] = [
            (node("True", own.clone()), true, &["mine:NoSchedule"]),
            (
                node("False", own),
                true,
                &[
                    "mine:NoSchedule",
                    "node.kubernetes.io/not-ready:NoSchedule",
                    "node.kubernetes.io/not-ready:NoExecute",
                ],
            ),
            (node("Unknown", json!({})), false, &["node.kubernetes.io/unreachable:NoSchedule"]),
            (
                node("True", json!({"unschedulable": true})),
                true,
                &["node.kubernetes.io/unschedulable:NoSchedule"],
            ),
            (
                node(
                    "True",
                    json!({"taints": [
                    {"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}]}),
                ),
                true,
                &[],
            ),
        ];
        for (node, evict, expected) in table {
            assert_eq!(keys(&node, evict), expected);
        }
    }
}
