//! What a ReplicaSet needs: a pure function of it, its pods and the time.

use std::{cmp::Reverse, collections::HashMap, sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{
    api::{
        apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus},
        core::v1::Pod,
    },
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
};
use keelson_api::{object::controller_reference, selector::LabelSelector};

use crate::controllers::{
    names,
    pods::{self, Availability},
};

/// How many pods one pass makes or deletes at most.
const BURST: usize = 500;

/// What is to be done.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// How many pods to make.
    pub(crate) create: usize,
    /// Which pods to delete.
    pub(crate) delete: Vec<Arc<Pod>>,
}

/// How many pods are missing, or which are too many.
///
/// `crowd` says how many pods of the same Deployment are on a node.
pub(crate) fn plan(set: &ReplicaSet, own: &[Arc<Pod>], crowd: &HashMap<String, usize>) -> Plan {
    if set.metadata.deletion_timestamp.is_some() {
        return Plan::default();
    }
    let wanted = wanted(set);
    let mut active: Vec<Arc<Pod>> = own.iter().filter(|p| pods::is_active(p)).cloned().collect();
    if active.len() <= wanted {
        return Plan { create: (wanted - active.len()).min(BURST), delete: Vec::new() };
    }
    let surplus = (active.len() - wanted).min(BURST);
    active.sort_by_cached_key(|pod| deletion_rank(pod, crowd));
    active.truncate(surplus);
    Plan { create: 0, delete: active }
}

/// How many pods are asked for.
pub(crate) fn wanted(set: &ReplicaSet) -> usize {
    usize::try_from(set.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1)).unwrap_or(0)
}

type Rank = (bool, u8, bool, i64, Reverse<usize>, Reverse<i64>, Reverse<i32>, Reverse<i64>);

/// Which pod goes first: the documented order. Pods without a node; pending; not ready; of lower
/// `controller.kubernetes.io/pod-deletion-cost`; on nodes with more of their kind; ready for a
/// shorter time; restarted more often; younger.
fn deletion_rank(pod: &Pod, crowd: &HashMap<String, usize>) -> Rank {
    let status = pod.status.as_ref();
    let phase = match pods::phase(pod) {
        "Running" => 2,
        "Unknown" => 1,
        _ => 0,
    };
    let cost = pod
        .metadata
        .annotations
        .as_ref()
        .and_then(|a| a.get("controller.kubernetes.io/pod-deletion-cost"))
        .and_then(|cost| cost.parse::<i32>().ok())
        .unwrap_or(0);
    let node = pods::node_name(pod);
    let on_node = node.and_then(|node| crowd.get(node)).copied().unwrap_or(0);
    let ready_since = pods::condition(pod, "Ready")
        .filter(|c| c.status == "True")
        .and_then(|c| c.last_transition_time.as_ref())
        .map_or(i64::MAX, |time| time.0.as_second());
    let restarts = status
        .and_then(|s| s.container_statuses.as_ref())
        .into_iter()
        .flatten()
        .map(|c| c.restart_count)
        .max()
        .unwrap_or(0);
    let created = pod.metadata.creation_timestamp.as_ref().map_or(i64::MAX, |t| t.0.as_second());
    (
        node.is_some(),
        phase,
        pods::is_ready(pod),
        i64::from(cost),
        Reverse(on_node),
        Reverse(ready_since),
        Reverse(restarts),
        Reverse(created),
    )
}

/// The pod that the set's template describes, with this name.
pub(crate) fn new_pod(set: &ReplicaSet, prefix: &str, name: String) -> Pod {
    let template = set.spec.as_ref().and_then(|s| s.template.clone()).unwrap_or_default();
    let metadata = template.metadata.unwrap_or_default();
    Pod {
        metadata: ObjectMeta {
            name: Some(name),
            generate_name: Some(prefix.to_owned()),
            namespace: set.metadata.namespace.clone(),
            labels: metadata.labels,
            annotations: metadata.annotations,
            finalizers: metadata.finalizers,
            owner_references: Some(vec![controller_reference::<ReplicaSet>(&set.metadata)]),
            ..ObjectMeta::default()
        },
        spec: template.spec,
        status: None,
    }
}

/// The fixed part of its pods' names.
pub(crate) fn pod_prefix(set: &ReplicaSet) -> String {
    names::prefix(set.metadata.name.as_deref().unwrap_or_default())
}

/// Why pods could not be made or deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// `FailedCreate` or `FailedDelete`.
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

/// The status, and when a pod that is ready becomes available.
pub(crate) fn status(
    set: &ReplicaSet,
    own: &[Arc<Pod>],
    failure: Option<&Failure>,
    now: Timestamp,
) -> (ReplicaSetStatus, Option<Duration>) {
    let spec = set.spec.as_ref();
    let min_ready = spec.and_then(|s| s.min_ready_seconds).unwrap_or(0);
    let template_labels = spec
        .and_then(|s| s.template.as_ref())
        .and_then(|t| t.metadata.as_ref())
        .and_then(|m| m.labels.clone())
        .unwrap_or_default();
    let full = LabelSelector::from_labels(&template_labels);
    let (mut all, mut labelled, mut ready, mut available, mut terminating) = (0, 0, 0, 0, 0);
    let mut soonest: Option<Duration> = None;
    for pod in own.iter().filter(|pod| !pods::is_over(pod)) {
        if pods::is_terminating(pod) {
            terminating += 1;
            continue;
        }
        all += 1;
        if pod.metadata.labels.as_ref().is_some_and(|labels| full.matches(labels)) {
            labelled += 1;
        }
        if pods::is_ready(pod) {
            ready += 1;
        }
        match pods::availability(pod, min_ready, now) {
            Availability::Now => available += 1,
            Availability::In(wait) => soonest = Some(soonest.map_or(wait, |s| s.min(wait))),
            Availability::No => {}
        }
    }
    let old = set.status.as_ref();
    let status = ReplicaSetStatus {
        replicas: all,
        fully_labeled_replicas: Some(labelled).filter(|n| *n > 0),
        ready_replicas: Some(ready).filter(|n| *n > 0),
        available_replicas: Some(available).filter(|n| *n > 0),
        terminating_replicas: Some(terminating),
        observed_generation: set.metadata.generation,
        conditions: conditions(old.and_then(|s| s.conditions.as_ref()), failure, now),
    };
    (status, soonest)
}

fn conditions(
    old: Option<&Vec<ReplicaSetCondition>>,
    failure: Option<&Failure>,
    now: Timestamp,
) -> Option<Vec<ReplicaSetCondition>> {
    let is_failure = |c: &&ReplicaSetCondition| c.type_ == "ReplicaFailure";
    let known = old.into_iter().flatten().find(is_failure);
    let mut conditions: Vec<ReplicaSetCondition> =
        old.into_iter().flatten().filter(|c| !is_failure(c)).cloned().collect();
    if let Some(failure) = failure {
        conditions.push(match known.filter(|c| c.reason.as_deref() == Some(failure.reason)) {
            Some(known) => known.clone(),
            None => ReplicaSetCondition {
                type_: "ReplicaFailure".to_owned(),
                status: "True".to_owned(),
                reason: Some(failure.reason.to_owned()),
                message: Some(failure.message.clone()),
                last_transition_time: Some(Time(now)),
            },
        });
    }
    (!conditions.is_empty()).then_some(conditions)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn set(replicas: i32, min_ready: i32) -> ReplicaSet {
        serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "d", "uid": "r", "generation": 3},
            "spec": {"replicas": replicas, "minReadySeconds": min_ready,
                "selector": {"matchLabels": {"app": "web"}},
                "template": {"metadata": {"labels": {"app": "web", "v": "1"}},
                    "spec": {"containers": []}}},
        }))
        .unwrap()
    }

    fn pod(name: &str, extra: Value) -> Arc<Pod> {
        let mut pod = json!({
            "metadata": {"name": name, "labels": {"app": "web"}},
            "spec": {"containers": [], "nodeName": "n1"},
            "status": {"phase": "Running"},
        });
        for (path, value) in extra.as_object().unwrap() {
            *pod.pointer_mut(path).unwrap() = value.clone();
        }
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    fn ready(since: &str) -> Value {
        json!({"/status": {"phase": "Running", "conditions": [
            {"type": "Ready", "status": "True", "lastTransitionTime": since}]}})
    }

    #[test]
    fn what_is_missing_is_made_and_the_least_worthy_are_deleted() {
        let none = HashMap::new();
        assert_eq!(plan(&set(3, 0), &[pod("a", json!({}))], &none).create, 2);
        // Pods that are over or going don't count.
        let going = pod(
            "b",
            json!({"/metadata": {"name": "b",
            "deletionTimestamp": "2026-01-01T00:00:00Z"}}),
        );
        let over = pod("c", json!({"/status": {"phase": "Failed"}}));
        assert_eq!(plan(&set(1, 0), &[going, over], &none).create, 1);

        let pods = [
            pod("old-ready", ready("2026-01-01T00:00:00Z")),
            pod("young-ready", ready("2026-01-02T00:00:00Z")),
            pod("not-ready", json!({})),
            pod("pending", json!({"/status": {"phase": "Pending"}})),
            pod("no-node", json!({"/spec": {"containers": []}})),
        ];
        let order: Vec<String> = plan(&set(0, 0), &pods, &none)
            .delete
            .iter()
            .filter_map(|p| p.metadata.name.clone())
            .collect();
        assert_eq!(order, ["no-node", "pending", "not-ready", "young-ready", "old-ready"]);
    }

    #[test]
    fn a_low_deletion_cost_and_a_crowded_node_go_first() {
        let since = ready("2026-01-01T00:00:00Z")["/status"].clone();
        let cheap = pod(
            "cheap",
            json!({"/status": since, "/metadata": {"name": "cheap",
            "annotations": {"controller.kubernetes.io/pod-deletion-cost": "-1"}}}),
        );
        let crowded = pod("crowded", json!({"/status": since}));
        let alone = pod(
            "alone",
            json!({"/status": since,
            "/spec": {"containers": [], "nodeName": "n2"}}),
        );
        let crowd = HashMap::from([("n1".to_owned(), 3), ("n2".to_owned(), 1)]);
        let order: Vec<String> = plan(&set(0, 0), &[alone, crowded, cheap], &crowd)
            .delete
            .iter()
            .filter_map(|p| p.metadata.name.clone())
            .collect();
        assert_eq!(order, ["cheap", "crowded", "alone"]);
    }

    #[test]
    fn a_pod_is_available_after_it_was_ready_for_long_enough() {
        let now: Timestamp = "2026-01-01T00:00:30Z".parse().unwrap();
        let pods = [
            pod("a", ready("2026-01-01T00:00:00Z")),
            pod("b", ready("2026-01-01T00:00:25Z")),
            pod("c", json!({})),
        ];
        let (status, wait) = status(&set(3, 10), &pods, None, now);
        assert_eq!(status.replicas, 3);
        assert_eq!(status.ready_replicas, Some(2));
        assert_eq!(status.available_replicas, Some(1));
        assert_eq!(status.fully_labeled_replicas, None);
        assert_eq!(status.observed_generation, Some(3));
        assert_eq!(wait, Some(Duration::from_secs(5)));
    }

    #[test]
    fn a_failure_is_a_condition_that_goes_again() {
        let now: Timestamp = "2026-01-01T00:00:30Z".parse().unwrap();
        let failure = Failure { reason: "FailedCreate", message: "no".into() };
        let mut set = set(3, 0);
        set.status = Some(status(&set, &[], Some(&failure), now).0);
        let conditions = set.status.as_ref().unwrap().conditions.as_ref().unwrap();
        assert_eq!(conditions[0].type_, "ReplicaFailure");
        assert_eq!(status(&set, &[], None, now).0.conditions, None);
    }
}
