//! Which of the nodes that are possible is best.
//!
//! Each rule gives 0 to 100; the weights are those of Kubernetes' default profile.

use k8s_openapi::api::core::v1::{Node, Pod};

use super::{
    affinity::Neighbours,
    cluster::{NodeFacts, PodFacts},
    filter,
};

const BEST: i64 = 100;
const TAINT_WEIGHT: i64 = 3;
const NODE_AFFINITY_WEIGHT: i64 = 2;
const SPREAD_WEIGHT: i64 = 2;
const POD_AFFINITY_WEIGHT: i64 = 2;

/// The score of each node, in the order given.
pub(crate) fn scores(
    pod: &PodFacts,
    nodes: &[(&Node, &NodeFacts)],
    neighbours: &Neighbours<'_>,
) -> Vec<i64> {
    let raw = |rule: &dyn Fn(&Node, &NodeFacts) -> i64| -> Vec<i64> {
        nodes.iter().map(|(node, facts)| rule(node, facts)).collect()
    };
    let taints = fewer_is_better(&raw(&|node, _| unwelcome(&pod.pod, node)));
    let affinity = more_is_better(&raw(&|node, _| preferred_node(&pod.pod, node)));
    let crowd = fewer_is_better(&raw(&|_, facts| neighbours.crowd(facts)));
    let company = more_is_better(&raw(&|_, facts| neighbours.preference(facts)));
    (0..nodes.len())
        .map(|i| {
            let facts = nodes[i].1;
            least_allocated(pod, facts)
                + balanced(pod, facts)
                + TAINT_WEIGHT * taints[i]
                + NODE_AFFINITY_WEIGHT * affinity[i]
                + SPREAD_WEIGHT * crowd[i]
                + POD_AFFINITY_WEIGHT * company[i]
        })
        .collect()
}

fn fewer_is_better(raw: &[i64]) -> Vec<i64> {
    more_is_better(&raw.iter().map(|value| -value).collect::<Vec<_>>())
}

/// The least becomes 0, the most 100; all equal are all 100.
fn more_is_better(raw: &[i64]) -> Vec<i64> {
    let least = raw.iter().copied().min().unwrap_or(0);
    let most = raw.iter().copied().max().unwrap_or(0);
    let range = most - least;
    raw.iter().map(|value| if range == 0 { BEST } else { (value - least) * BEST / range }).collect()
}

/// How many taints only ask to keep away, and are not tolerated.
fn unwelcome(pod: &Pod, node: &Node) -> i64 {
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    let unwelcome = taints
        .filter(|taint| taint.effect == "PreferNoSchedule" && !filter::tolerates(pod, taint))
        .count();
    i64::try_from(unwelcome).unwrap_or(i64::MAX)
}

fn preferred_node(pod: &Pod, node: &Node) -> i64 {
    let terms = pod
        .spec
        .as_ref()
        .and_then(|s| s.affinity.as_ref())
        .and_then(|a| a.node_affinity.as_ref())
        .and_then(|a| a.preferred_during_scheduling_ignored_during_execution.as_ref());
    terms
        .into_iter()
        .flatten()
        .filter(|term| filter::matches_term(&term.preference, node))
        .map(|term| i64::from(term.weight))
        .sum()
}

/// What would be left free of CPU and memory, in percent, on average.
fn least_allocated(pod: &PodFacts, facts: &NodeFacts) -> i64 {
    let free = |name: &str| {
        let all = facts.allocatable.get(name);
        let used = facts.compared.get(name).saturating_add(pod.compared.get(name));
        if all <= 0 || used > all {
            return 0;
        }
        i64::try_from(i128::from(all - used) * i128::from(BEST) / i128::from(all)).unwrap_or(0)
    };
    (free("cpu") + free("memory")) / 2
}

/// How equal the used shares of CPU and memory would be.
fn balanced(pod: &PodFacts, facts: &NodeFacts) -> i64 {
    let share = |name: &str| {
        let all = facts.allocatable.get(name);
        if all <= 0 {
            return 1.0;
        }
        let used = facts.requested.get(name).saturating_add(pod.requests.get(name));
        // Precision does not matter: these are shares.
        (used as f64 / all as f64).clamp(0.0, 1.0)
    };
    let deviation = (share("cpu") - share("memory")).abs() / 2.0;
    ((1.0 - deviation) * BEST as f64) as i64
}
