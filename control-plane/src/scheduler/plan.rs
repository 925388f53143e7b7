//! Where a pod goes, given the cluster: a pure function.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Node;

use super::{
    affinity::Neighbours,
    cluster::{Cluster, NodeFacts, PodFacts},
    filter, score,
};

/// No node can take the pod. The text is the documented one: the number of nodes, then each reason
/// with how many nodes it holds for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Unschedulable(pub(crate) String);

/// The name of the best node for a pod; `choice` picks among equals (0 ≤ choice < 1).
pub(crate) fn best_node(
    pod: &PodFacts,
    cluster: &Cluster,
    choice: f64,
) -> Result<String, Unschedulable> {
    let count = cluster.nodes().count();
    if count == 0 {
        return Err(Unschedulable("no nodes available to schedule pods".to_owned()));
    }
    if let Some(obstacle) = obstacle(pod) {
        return Err(Unschedulable(format!("0/{count} nodes are available: {obstacle}.")));
    }
    let neighbours = Neighbours::of(pod, cluster);
    let mut reasons: BTreeMap<String, usize> = BTreeMap::new();
    let mut possible: Vec<(&Node, &NodeFacts)> = Vec::new();
    for (node, facts) in cluster.nodes() {
        let objections = filter::objections(pod, node, facts, &neighbours);
        if objections.is_empty() {
            possible.push((node, facts));
        }
        for objection in objections {
            *reasons.entry(objection).or_default() += 1;
        }
    }
    let scores = match possible.len() {
        0 => return Err(Unschedulable(message(count, &reasons))),
        1 => vec![0],
        _ => score::scores(pod, &possible, &neighbours),
    };
    let most = scores.iter().copied().max().unwrap_or(0);
    let best: Vec<&Node> = possible
        .iter()
        .zip(&scores)
        .filter(|(_, score)| **score == most)
        .map(|((node, _), _)| *node)
        .collect();
    let chosen = best[((best.len() as f64 * choice) as usize).min(best.len() - 1)];
    Ok(chosen.metadata.name.clone().unwrap_or_default())
}

/// What no node could give.
fn obstacle(pod: &PodFacts) -> Option<String> {
    let spec = pod.pod.spec.as_ref()?;
    if spec.resource_claims.as_ref().is_some_and(|claims| !claims.is_empty()) {
        return Some("resource claims are not supported by this scheduler".to_owned());
    }
    spec.volumes.iter().flatten().find_map(|volume| {
        let claim = &volume.persistent_volume_claim.as_ref()?.claim_name;
        Some(format!("persistentvolumeclaim \"{claim}\" not found"))
    })
}

fn message(count: usize, reasons: &BTreeMap<String, usize>) -> String {
    let mut parts: Vec<String> =
        reasons.iter().map(|(reason, nodes)| format!("{nodes} {reason}")).collect();
    parts.sort();
    format!("0/{count} nodes are available: {}.", parts.join(", "))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::{Value, json};

    use super::*;

    fn cluster(nodes: &[(&str, Value)]) -> Cluster {
        let mut cluster = Cluster::default();
        for (name, extra) in nodes {
            let mut node = json!({
                "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
                "status": {"allocatable": {"cpu": "2", "memory": "4Gi", "pods": "3"}},
            });
            for (key, value) in extra.as_object().unwrap() {
                node[key] = value.clone();
            }
            cluster.set_node(name, Arc::new(serde_json::from_value(node).unwrap()));
        }
        cluster
    }

    fn pod(name: &str, spec: Value) -> PodFacts {
        let mut spec = spec;
        if spec.get("containers").is_none() {
            spec["containers"] = json!([{"name": "c"}]);
        }
        let pod = json!({
            "metadata": {"name": name, "namespace": "default", "labels": {"app": "web"},
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web",
                    "uid": "r", "controller": true}]},
            "spec": spec,
        });
        PodFacts::of(Arc::new(serde_json::from_value(pod).unwrap()))
    }

    fn asking(cpu: &str) -> Value {
        json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": cpu}}}]})
    }

    #[test]
    fn the_reasons_are_the_documented_ones() {
        let cordoned = json!({"spec": {"unschedulable": true}});
        let tainted = json!({"spec": {"taints": [
            {"key": "dedicated", "value": "db", "effect": "NoSchedule"}]}});
        let table = [
            (vec![], json!({}), "no nodes available to schedule pods"),
            (vec![("a", json!({}))], asking("3"), "0/1 nodes are available: 1 Insufficient cpu."),
            (
                vec![("a", json!({})), ("b", cordoned), ("c", tainted), ("d", json!({}))],
                asking("3"),
                "0/4 nodes are available: 1 node(s) had untolerated taint {dedicated: db}, 1 \
                 node(s) were unschedulable, 2 Insufficient cpu.",
            ),
            (
                vec![("a", json!({}))],
                json!({"nodeSelector": {"disk": "ssd"}}),
                "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector.",
            ),
            (
                vec![("a", json!({}))],
                json!({"volumes": [{"name": "v",
                    "persistentVolumeClaim": {"claimName": "data"}}]}),
                "0/1 nodes are available: persistentvolumeclaim \"data\" not found.",
            ),
        ];
        for (nodes, spec, expected) in table {
            let error = best_node(&pod("p", spec), &cluster(&nodes), 0.0).unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
    }

    #[test]
    fn a_node_is_filled_only_as_far_as_it_goes() {
        let mut cluster = cluster(&[("a", json!({}))]);
        for i in 0..2 {
            let pod = pod(&format!("p{i}"), asking("1"));
            let node = best_node(&pod, &cluster, 0.0).unwrap();
            cluster.place(pod, &node);
        }
        let third = pod("p2", asking("1m"));
        assert_eq!(
            best_node(&third, &cluster, 0.0).unwrap_err().to_string(),
            "0/1 nodes are available: 1 Insufficient cpu."
        );
        // One that asks for nothing fits, and then the number of pods is reached.
        let idle = pod("p3", json!({}));
        cluster.place(idle.clone(), &best_node(&idle, &cluster, 0.0).unwrap());
        assert_eq!(
            best_node(&pod("p4", json!({})), &cluster, 0.0).unwrap_err().to_string(),
            "0/1 nodes are available: 1 Too many pods."
        );
        assert!(cluster.remove_pod(&idle.key));
        assert!(best_node(&pod("p4", json!({})), &cluster, 0.0).is_ok());
    }

    #[test]
    fn siblings_spread_over_nodes() {
        let mut cluster = cluster(&[("a", json!({})), ("b", json!({})), ("c", json!({}))]);
        let mut used = std::collections::BTreeSet::new();
        for i in 0..3 {
            let pod = pod(&format!("p{i}"), asking("100m"));
            let node = best_node(&pod, &cluster, 0.5).unwrap();
            used.insert(node.clone());
            cluster.place(pod, &node);
        }
        assert_eq!(used.len(), 3);
    }

    #[test]
    fn host_ports_collide_only_where_addresses_overlap() {
        let with_port = |ip: &str| {
            json!({"containers": [{"name": "c", "ports": [
                {"containerPort": 80, "hostPort": 80, "hostIP": ip, "protocol": "TCP"}]}]})
        };
        let mut cluster = cluster(&[("a", json!({}))]);
        cluster.place(pod("p1", with_port("127.0.0.1")), "a");
        assert!(best_node(&pod("p2", with_port("127.0.0.2")), &cluster, 0.0).is_ok());
        assert_eq!(
            best_node(&pod("p3", with_port("0.0.0.0")), &cluster, 0.0).unwrap_err().to_string(),
            "0/1 nodes are available: 1 node(s) didn't have free ports for the requested pod \
             ports."
        );
    }

    #[test]
    fn pods_that_avoid_each_other_take_a_node_each() {
        let avoiding = json!({"affinity": {"podAntiAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": [
                {"labelSelector": {"matchLabels": {"app": "web"}},
                 "topologyKey": "kubernetes.io/hostname"}]}}});
        let mut cluster = cluster(&[("a", json!({})), ("b", json!({}))]);
        for name in ["p1", "p2"] {
            let pod = pod(name, avoiding.clone());
            let node = best_node(&pod, &cluster, 0.0).unwrap();
            cluster.place(pod, &node);
        }
        assert_eq!(
            best_node(&pod("p3", avoiding), &cluster, 0.0).unwrap_err().to_string(),
            "0/2 nodes are available: 2 node(s) didn't match pod anti-affinity rules."
        );
        // The rule holds from the other side too.
        assert_eq!(
            best_node(&pod("p4", json!({})), &cluster, 0.0).unwrap_err().to_string(),
            "0/2 nodes are available: 2 node(s) didn't satisfy existing pods anti-affinity rules."
        );
    }

    #[test]
    fn the_first_pod_of_a_group_that_stays_together_may_go_anywhere() {
        let together = json!({"affinity": {"podAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": [
                {"labelSelector": {"matchLabels": {"app": "web"}},
                 "topologyKey": "kubernetes.io/hostname"}]}}});
        let mut cluster = cluster(&[("a", json!({})), ("b", json!({}))]);
        let first = pod("p1", together.clone());
        let node = best_node(&first, &cluster, 0.9).unwrap();
        cluster.place(first, &node);
        for choice in [0.0, 0.9] {
            assert_eq!(best_node(&pod("p2", together.clone()), &cluster, choice).unwrap(), node);
        }
    }

    #[test]
    fn an_even_spread_is_kept() {
        let spread = json!({"topologySpreadConstraints": [{
            "maxSkew": 1, "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "DoNotSchedule",
            "labelSelector": {"matchLabels": {"app": "web"}}}]});
        let full = json!({"status": {"allocatable": {"cpu": "2", "memory": "1Gi", "pods": "1"}}});
        let mut cluster = cluster(&[("a", json!({})), ("b", full)]);
        for name in ["p1", "p2", "p3"] {
            let pod = pod(name, spread.clone());
            let node = best_node(&pod, &cluster, 0.0).unwrap();
            cluster.place(pod, &node);
        }
        assert_eq!(
            best_node(&pod("p4", spread), &cluster, 0.0).unwrap_err().to_string(),
            "0/2 nodes are available: 1 Too many pods, 1 node(s) didn't match pod topology spread \
             constraints."
        );
    }
}
