//! Pods that want to be near to others or far from them, and pods spread evenly.
//!
//! Only the documented rules: required terms filter nodes, preferred ones score them. `matchLabelKeys`
//! takes the incoming pod's own values, whether or not the API server has merged them already.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use k8s_openapi::{
    api::core::v1::{Pod, PodAffinityTerm, TopologySpreadConstraint},
    apimachinery::pkg::apis::meta::v1::LabelSelector as ApiLabelSelector,
};
use keelson_api::selector::LabelSelector;

use super::{
    cluster::{Cluster, NodeFacts, PodFacts},
    filter,
};

/// Which pods a term means, and how near is near.
#[derive(Clone, Debug)]
pub(crate) struct Term {
    /// `None` selects no pod.
    selector: Option<LabelSelector>,
    namespaces: BTreeSet<String>,
    /// Namespaces by their labels, besides the named ones.
    namespace_selector: Option<LabelSelector>,
    topology_key: String,
}

impl Term {
    fn of(term: &PodAffinityTerm, pod: &Pod) -> Self {
        let labels = pod.metadata.labels.as_ref();
        let mut selector = readable(term.label_selector.as_ref());
        for (keys, operator) in
            [(&term.match_label_keys, "In"), (&term.mismatch_label_keys, "NotIn")]
        {
            selector = with_own_labels(selector, labels, keys.as_deref(), operator);
        }
        let mut namespaces: BTreeSet<String> = term.namespaces.iter().flatten().cloned().collect();
        // Documented: neither a list nor a selector means the pod's own namespace.
        if namespaces.is_empty() && term.namespace_selector.is_none() {
            namespaces.extend(pod.metadata.namespace.clone());
        }
        Self {
            selector,
            namespaces,
            namespace_selector: readable(term.namespace_selector.as_ref()),
            topology_key: term.topology_key.clone(),
        }
    }

    fn matches(&self, pod: &PodFacts, cluster: &Cluster) -> bool {
        let namespace = pod.key.namespace();
        let in_namespace = self.namespaces.contains(namespace)
            || self
                .namespace_selector
                .as_ref()
                .is_some_and(|s| s.matches(cluster.namespace_labels(namespace)));
        in_namespace && self.selector.as_ref().is_some_and(|s| s.matches(pod.labels()))
    }

    /// How many pods it means are in each domain.
    fn counts<'a>(&self, cluster: &'a Cluster) -> HashMap<&'a str, i64> {
        let mut counts = HashMap::new();
        for (_, facts) in cluster.nodes() {
            let Some(domain) = facts.labels().get(&self.topology_key) else { continue };
            let matching = facts.pods.values().filter(|pod| self.matches(pod, cluster)).count();
            *counts.entry(domain.as_str()).or_default() += i64::try_from(matching).unwrap_or(0);
        }
        counts
    }

    fn count_near(&self, counts: &HashMap<&str, i64>, node: &NodeFacts) -> i64 {
        let domain = node.labels().get(&self.topology_key);
        domain.and_then(|domain| counts.get(domain.as_str())).copied().unwrap_or(0)
    }
}

fn readable(selector: Option<&ApiLabelSelector>) -> Option<LabelSelector> {
    LabelSelector::from_k8s(selector?).ok()
}

fn with_own_labels(
    selector: Option<LabelSelector>,
    labels: Option<&BTreeMap<String, String>>,
    keys: Option<&[String]>,
    operator: &str,
) -> Option<LabelSelector> {
    keys.unwrap_or_default().iter().fold(selector, |selector, key| {
        match labels.and_then(|labels| labels.get(key)) {
            Some(value) => selector?.and(key, operator, std::slice::from_ref(value)).ok(),
            None => selector,
        }
    })
}

/// The pods that a pod must not be near to.
pub(crate) fn must_avoid(pod: &Pod) -> Vec<Term> {
    let affinity = pod.spec.as_ref().and_then(|s| s.affinity.as_ref());
    let terms = affinity
        .and_then(|a| a.pod_anti_affinity.as_ref())
        .and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref());
    terms.into_iter().flatten().map(|term| Term::of(term, pod)).collect()
}

fn must_be_near(pod: &Pod) -> Vec<Term> {
    let affinity = pod.spec.as_ref().and_then(|s| s.affinity.as_ref());
    let terms = affinity
        .and_then(|a| a.pod_affinity.as_ref())
        .and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref());
    terms.into_iter().flatten().map(|term| Term::of(term, pod)).collect()
}

/// Preferred terms with their weights; to be far from is negative.
fn preferred(pod: &Pod) -> Vec<(Term, i64)> {
    let Some(affinity) = pod.spec.as_ref().and_then(|s| s.affinity.as_ref()) else {
        return Vec::new();
    };
    let near = affinity
        .pod_affinity
        .as_ref()
        .and_then(|a| a.preferred_during_scheduling_ignored_during_execution.as_ref());
    let far = affinity
        .pod_anti_affinity
        .as_ref()
        .and_then(|a| a.preferred_during_scheduling_ignored_during_execution.as_ref());
    let weighted = |sign: i64, terms: Option<&Vec<_>>| -> Vec<(Term, i64)> {
        terms
            .into_iter()
            .flatten()
            .map(|t: &k8s_openapi::api::core::v1::WeightedPodAffinityTerm| {
                (Term::of(&t.pod_affinity_term, pod), sign * i64::from(t.weight))
            })
            .collect()
    };
    let mut all = weighted(1, near);
    all.extend(weighted(-1, far));
    all
}

/// One spread rule of a pod, with how many pods of its kind are where.
struct Spread<'a> {
    rule: &'a TopologySpreadConstraint,
    counts: HashMap<&'a str, i64>,
    own: i64,
}

impl<'a> Spread<'a> {
    fn of(
        rule: &'a TopologySpreadConstraint,
        all: &[&TopologySpreadConstraint],
        pod: &PodFacts,
        cluster: &'a Cluster,
    ) -> Self {
        let selector = with_own_labels(
            readable(rule.label_selector.as_ref()),
            pod.pod.metadata.labels.as_ref(),
            rule.match_label_keys.as_deref(),
            "In",
        );
        let means = |other: &PodFacts| {
            other.key.namespace() == pod.key.namespace()
                && selector.as_ref().is_some_and(|s| s.matches(other.labels()))
        };
        let mut counts = HashMap::new();
        for (node, facts) in cluster.nodes() {
            // Nodes that lack any of the keys don't count at all.
            if all.iter().any(|rule| !facts.labels().contains_key(&rule.topology_key)) {
                continue;
            }
            let by_affinity = rule.node_affinity_policy.as_deref() != Some("Ignore");
            if by_affinity && !filter::matches_node_affinity(&pod.pod, node) {
                continue;
            }
            let by_taints = rule.node_taints_policy.as_deref() == Some("Honor");
            if by_taints && filter::untolerated_taint(&pod.pod, node).is_some() {
                continue;
            }
            let Some(domain) = facts.labels().get(&rule.topology_key) else { continue };
            let matching = facts.pods.values().filter(|p| !p.is_terminating() && means(p)).count();
            *counts.entry(domain.as_str()).or_default() += i64::try_from(matching).unwrap_or(0);
        }
        Self { rule, counts, own: i64::from(means(pod)) }
    }

    fn least(&self) -> i64 {
        let wanted = usize::try_from(self.rule.min_domains.unwrap_or(1)).unwrap_or(1);
        if self.counts.len() < wanted {
            return 0;
        }
        self.counts.values().copied().min().unwrap_or(0)
    }
}

fn spread_rules<'a>(pod: &'a Pod, kind: &str) -> Vec<&'a TopologySpreadConstraint> {
    let rules = pod.spec.as_ref().and_then(|s| s.topology_spread_constraints.as_ref());
    rules.into_iter().flatten().filter(|rule| rule.when_unsatisfiable == kind).collect()
}

/// What an incoming pod and the pods that run already ask of its node, worked out once for all
/// nodes.
pub(crate) struct Neighbours<'a> {
    pod: &'a PodFacts,
    near: Vec<(Term, HashMap<&'a str, i64>)>,
    /// No pod at all meets the required terms but the incoming one itself: the first of its kind
    /// may go anywhere.
    first_of_its_kind: bool,
    far: Vec<(&'a Term, HashMap<&'a str, i64>)>,
    /// Topology keys and values where running pods don't want it.
    refused: BTreeSet<(&'a str, &'a str)>,
    spread: Vec<Spread<'a>>,
    preferred: Vec<(Term, i64, HashMap<&'a str, i64>)>,
    preferred_spread: Vec<Spread<'a>>,
}

impl<'a> Neighbours<'a> {
    pub(crate) fn of(pod: &'a PodFacts, cluster: &'a Cluster) -> Self {
        let near: Vec<_> = must_be_near(&pod.pod)
            .into_iter()
            .map(|term| {
                let counts = term.counts(cluster);
                (term, counts)
            })
            .collect();
        let first_of_its_kind = near.iter().all(|(term, counts)| {
            counts.values().all(|count| *count == 0) && term.matches(pod, cluster)
        });
        let mut refused = BTreeSet::new();
        for (_, facts) in cluster.nodes() {
            for other in facts.pods.values() {
                for term in other.must_avoid.iter().filter(|term| term.matches(pod, cluster)) {
                    if let Some(domain) = facts.labels().get(&term.topology_key) {
                        refused.insert((term.topology_key.as_str(), domain.as_str()));
                    }
                }
            }
        }
        let spreads = |kind: &str| {
            let rules = spread_rules(&pod.pod, kind);
            rules.iter().map(|rule| Spread::of(rule, &rules, pod, cluster)).collect()
        };
        Self {
            near,
            first_of_its_kind,
            far: pod.must_avoid.iter().map(|term| (term, term.counts(cluster))).collect(),
            refused,
            spread: spreads("DoNotSchedule"),
            preferred: preferred(&pod.pod)
                .into_iter()
                .map(|(term, weight)| {
                    let counts = term.counts(cluster);
                    (term, weight, counts)
                })
                .collect(),
            preferred_spread: spreads("ScheduleAnyway"),
            pod,
        }
    }

    /// Why the pod can't go to the node, if so, in the words of Kubernetes' scheduler.
    pub(crate) fn objection(&self, node: &NodeFacts) -> Option<&'static str> {
        let labels = node.labels();
        for spread in &self.spread {
            let Some(domain) = labels.get(&spread.rule.topology_key) else {
                return Some(
                    "node(s) didn't match pod topology spread constraints (missing required \
                     label)",
                );
            };
            let here = spread.counts.get(domain.as_str()).copied().unwrap_or(0);
            if here + spread.own - spread.least() > i64::from(spread.rule.max_skew) {
                return Some("node(s) didn't match pod topology spread constraints");
            }
        }
        let near_enough = self.near.iter().all(|(term, counts)| {
            labels.contains_key(&term.topology_key)
                && (self.first_of_its_kind || term.count_near(counts, node) > 0)
        });
        if !near_enough {
            return Some("node(s) didn't match pod affinity rules");
        }
        if self.far.iter().any(|(term, counts)| term.count_near(counts, node) > 0) {
            return Some("node(s) didn't match pod anti-affinity rules");
        }
        let unwanted = self
            .refused
            .iter()
            .any(|(key, domain)| labels.get(*key).is_some_and(|value| value == domain));
        unwanted.then_some("node(s) didn't satisfy existing pods anti-affinity rules")
    }

    /// How much the pod prefers the node: more is better, only comparable between nodes.
    pub(crate) fn preference(&self, node: &NodeFacts) -> i64 {
        self.preferred
            .iter()
            .map(|(term, weight, counts)| weight * term.count_near(counts, node))
            .sum()
    }

    /// How many pods of the same kind are near already: less is better.
    pub(crate) fn crowd(&self, node: &NodeFacts) -> i64 {
        let asked: i64 = self
            .preferred_spread
            .iter()
            .map(|spread| {
                let domain = node.labels().get(&spread.rule.topology_key);
                domain.map_or(i64::MAX / 1_000_000, |domain| {
                    spread.counts.get(domain.as_str()).copied().unwrap_or(0)
                })
            })
            .sum();
        if !self.preferred_spread.is_empty() {
            return asked;
        }
        let owner = keelson_api::object::controller_of(&self.pod.pod.metadata);
        let Some(owner) = owner else { return 0 };
        let siblings = node.pods.values().filter(|other| {
            other.key.namespace() == self.pod.key.namespace()
                && keelson_api::object::controller_of(&other.pod.metadata)
                    .is_some_and(|o| o.uid == owner.uid)
        });
        i64::try_from(siblings.count()).unwrap_or(0)
    }
}
