//! Which nodes a pod can go to at all, and why not to the others.
//!
//! The reasons are the words that Kubernetes' scheduler uses: people and tools look for them.

use k8s_openapi::api::core::v1::{
    Node, NodeSelectorRequirement, NodeSelectorTerm, Pod, Taint, Toleration,
};
use keelson_api::selector::LabelSelector;

use super::{
    affinity::Neighbours,
    cluster::{NodeFacts, PodFacts},
};

/// Why a node is out of the question; empty if it is not.
pub(crate) fn objections(
    pod: &PodFacts,
    node: &Node,
    facts: &NodeFacts,
    neighbours: &Neighbours<'_>,
) -> Vec<String> {
    if let Some(objection) = first_objection(&pod.pod, node) {
        return vec![objection];
    }
    if facts.has_port_of(&pod.host_ports) {
        return vec!["node(s) didn't have free ports for the requested pod ports".to_owned()];
    }
    let lacking = lacking_resources(pod, facts);
    if !lacking.is_empty() {
        return lacking;
    }
    neighbours.objection(facts).map(str::to_owned).into_iter().collect()
}

/// What speaks against a node whatever is on it.
fn first_objection(pod: &Pod, node: &Node) -> Option<String> {
    let unschedulable = node.spec.as_ref().and_then(|s| s.unschedulable) == Some(true);
    let cordon = Taint {
        key: "node.kubernetes.io/unschedulable".to_owned(),
        effect: "NoSchedule".to_owned(),
        ..Taint::default()
    };
    if unschedulable && !tolerates(pod, &cordon) {
        return Some("node(s) were unschedulable".to_owned());
    }
    if let Some(taint) = untolerated_taint(pod, node) {
        let value = taint.value.as_deref().unwrap_or_default();
        return Some(format!("node(s) had untolerated taint {{{}: {value}}}", taint.key));
    }
    if !matches_node_affinity(pod, node) {
        return Some("node(s) didn't match Pod's node affinity/selector".to_owned());
    }
    None
}

fn lacking_resources(pod: &PodFacts, facts: &NodeFacts) -> Vec<String> {
    pod.requests
        .iter()
        .filter(|(name, wanted)| {
            // What is not asked for can't lack, even on a node that is over-full.
            *wanted > 0 && *wanted > facts.allocatable.get(name) - facts.requested.get(name)
        })
        .map(|(name, _)| match name {
            "pods" => "Too many pods".to_owned(),
            name => format!("Insufficient {name}"),
        })
        .collect()
}

/// The first taint that keeps new pods away and is not tolerated.
pub(crate) fn untolerated_taint<'n>(pod: &Pod, node: &'n Node) -> Option<&'n Taint> {
    node.spec
        .iter()
        .flat_map(|spec| spec.taints.iter().flatten())
        .filter(|taint| matches!(taint.effect.as_str(), "NoSchedule" | "NoExecute"))
        .find(|taint| !tolerates(pod, taint))
}

/// Whether one of the pod's tolerations covers the taint.
pub(crate) fn tolerates(pod: &Pod, taint: &Taint) -> bool {
    pod.spec
        .iter()
        .flat_map(|spec| spec.tolerations.iter().flatten())
        .any(|toleration| covers(toleration, taint))
}

/// Whether a toleration covers a taint, by the documented operators.
pub(crate) fn covers(toleration: &Toleration, taint: &Taint) -> bool {
    let effect = toleration.effect.as_deref().unwrap_or_default();
    if !effect.is_empty() && effect != taint.effect {
        return false;
    }
    let key = toleration.key.as_deref().unwrap_or_default();
    if !key.is_empty() && key != taint.key {
        return false;
    }
    let wanted = toleration.value.as_deref().unwrap_or_default();
    let actual = taint.value.as_deref().unwrap_or_default();
    let numbers = || Some((actual.parse::<i64>().ok()?, wanted.parse::<i64>().ok()?));
    match toleration.operator.as_deref().unwrap_or_default() {
        "" | "Equal" => !key.is_empty() && wanted == actual,
        "Exists" => true,
        "Lt" => numbers().is_some_and(|(actual, wanted)| actual < wanted),
        "Gt" => numbers().is_some_and(|(actual, wanted)| actual > wanted),
        _ => false,
    }
}

/// Whether a node is one that the pod's node selector and required node affinity allow.
pub(crate) fn matches_node_affinity(pod: &Pod, node: &Node) -> bool {
    let Some(spec) = &pod.spec else { return true };
    let labels = node.metadata.labels.as_ref();
    let selected = spec
        .node_selector
        .iter()
        .flatten()
        .all(|(key, value)| labels.and_then(|labels| labels.get(key)) == Some(value));
    let required = spec
        .affinity
        .as_ref()
        .and_then(|a| a.node_affinity.as_ref())
        .and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref());
    selected
        && required.is_none_or(|required| {
            required.node_selector_terms.iter().any(|term| matches_term(term, node))
        })
}

/// Whether a node meets a term: all of its conditions; a term without any means no node.
pub(crate) fn matches_term(term: &NodeSelectorTerm, node: &Node) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    let labels = node.metadata.labels.as_ref();
    let name = node.metadata.name.as_deref();
    all_hold(expressions, |key| labels.and_then(|l| l.get(key)).map(String::as_str))
        && all_hold(fields, |key| if key == "metadata.name" { name } else { None })
}

fn all_hold<'a>(
    requirements: &[NodeSelectorRequirement],
    get: impl Fn(&str) -> Option<&'a str>,
) -> bool {
    let selector = requirements.iter().try_fold(LabelSelector::default(), |selector, r| {
        selector.and(&r.key, &r.operator, r.values.as_deref().unwrap_or_default())
    });
    selector.is_ok_and(|selector| selector.matches_with(get))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn node(value: Value) -> Node {
        serde_json::from_value(value).unwrap()
    }

    fn pod(spec: Value) -> Pod {
        let mut spec = spec;
        spec["containers"] = json!([]);
        serde_json::from_value(json!({"metadata": {}, "spec": spec})).unwrap()
    }

    #[test]
    fn tolerations_cover_taints() {
        let taint = |key: &str, value: &str| Taint {
            key: key.into(),
            value: Some(value.into()),
            effect: "NoSchedule".into(),
            time_added: None,
        };
        let table = [
            (json!({"key": "a", "operator": "Exists"}), taint("a", "x"), true),
            (json!({"key": "a", "value": "x"}), taint("a", "x"), true),
            (json!({"key": "a", "operator": "Equal", "value": "y"}), taint("a", "x"), false),
            (json!({"operator": "Exists"}), taint("a", "x"), true),
            (json!({"operator": "Exists", "effect": "NoExecute"}), taint("a", "x"), false),
            (json!({"key": "b", "operator": "Exists"}), taint("a", "x"), false),
            (json!({"key": "a", "operator": "Gt", "value": "3"}), taint("a", "5"), true),
            (json!({"key": "a", "operator": "Lt", "value": "3"}), taint("a", "5"), false),
            (json!({"key": "a", "operator": "Lt", "value": "x"}), taint("a", "5"), false),
        ];
        for (toleration, taint, covered) in table {
            let parsed: Toleration = serde_json::from_value(toleration.clone()).unwrap();
            assert_eq!(covers(&parsed, &taint), covered, "{toleration} and {taint:?}");
        }
    }

    #[test]
    fn node_affinity_is_any_term_of_all_conditions() {
        let node =
            node(json!({"metadata": {"name": "n1", "labels": {"disk": "ssd", "cpus": "8"}}}));
        let required = |terms: Value| {
            json!({"affinity": {"nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}})
        };
        let table = [
            (json!({"nodeSelector": {"disk": "ssd"}}), true),
            (json!({"nodeSelector": {"disk": "hdd"}}), false),
            (
                required(json!([{"matchExpressions": [
                {"key": "cpus", "operator": "Gt", "values": ["4"]}]}])),
                true,
            ),
            (
                required(json!([{"matchExpressions": [
                {"key": "disk", "operator": "In", "values": ["hdd"]}]},
                {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n1"]}]}
                ])),
                true,
            ),
            (
                required(json!([{"matchExpressions": [
                {"key": "disk", "operator": "Exists"},
                {"key": "zone", "operator": "Exists"}]}])),
                false,
            ),
            (required(json!([{}])), false),
        ];
        for (spec, matches) in table {
            assert_eq!(matches_node_affinity(&pod(spec.clone()), &node), matches, "{spec}");
        }
    }
}
