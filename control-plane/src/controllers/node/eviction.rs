//! Pods that must leave a node because of a taint with the effect `NoExecute`.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod, Taint};
use keelson_api::{
    events::{EventRecorder, EventType},
    object::{ObjectKey, object_reference},
};
use kube::{
    Api, Client,
    api::{DeleteParams, Patch, PatchParams, Preconditions},
};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::{
    controllers::{
        error::{ControllerError, Doing, code},
        pods,
        queue::WorkQueue,
    },
    informers::Informers,
    scheduler::filter,
};

const WORKERS: usize = 4;

/// When a pod must leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leave {
    Never,
    Now,
    In(Duration),
}

/// When a pod must leave a node with these taints: at once if one is not tolerated, else when the
/// shortest `tolerationSeconds` of those that cover them is over.
pub(crate) fn leave(pod: &Pod, taints: &[Taint], now: Timestamp) -> Leave {
    let tolerations = pod.spec.as_ref().and_then(|s| s.tolerations.as_deref()).unwrap_or_default();
    let mut soonest: Option<Timestamp> = None;
    for taint in taints.iter().filter(|taint| taint.effect == "NoExecute") {
        let covering: Vec<_> = tolerations.iter().filter(|t| filter::covers(t, taint)).collect();
        if covering.is_empty() {
            return Leave::Now;
        }
        let seconds = covering.iter().filter_map(|t| t.toleration_seconds).min();
        let Some(seconds) =
            seconds.filter(|_| covering.iter().all(|t| t.toleration_seconds.is_some()))
        else {
            continue;
        };
        let since = taint.time_added.as_ref().map_or(now, |time| time.0);
        let wait = jiff::SignedDuration::from_secs(seconds.max(0));
        let at = since.checked_add(wait).unwrap_or(Timestamp::MAX);
        soonest = Some(soonest.map_or(at, |known| known.min(at)));
    }
    match soonest {
        None => Leave::Never,
        Some(at) => match Duration::try_from(at.duration_since(now)) {
            Ok(wait) if !wait.is_zero() => Leave::In(wait),
            _ => Leave::Now,
        },
    }
}

/// Drives pods away as taints ask until `shutdown`.
pub(crate) async fn run(
    client: Client,
    informers: Arc<Informers>,
    events: EventRecorder,
    shutdown: CancellationToken,
) {
    if !(informers.nodes.synced(&shutdown).await && informers.pods.synced(&shutdown).await) {
        return;
    }
    let queue = WorkQueue::new();
    let (add, kept) = (queue.clone(), informers.clone());
    informers.nodes.on_change(move |change| {
        let Some(node) = change.after.as_ref() else { return };
        let name = change.key().name().to_owned();
        if evicting(node).is_empty()
            && change.before.as_ref().is_none_or(|b| evicting(b).is_empty())
        {
            return;
        }
        for pod in kept.pods.list() {
            if pods::node_name(&pod) == Some(&name) {
                add.add(ObjectKey::of(&pod.metadata));
            }
        }
    });
    let (add, kept) = (queue.clone(), informers.clone());
    informers.pods.on_change(move |change| {
        let Some(pod) = change.after.as_ref() else { return };
        let Some(name) = pods::node_name(pod) else { return };
        let node = kept.nodes.get(&ObjectKey::new("", name));
        if node.is_some_and(|node| !evicting(&node).is_empty()) {
            add.add(change.key());
        }
    });
    let work = |key: ObjectKey| {
        let (client, informers, events) = (client.clone(), informers.clone(), events.clone());
        async move { reconcile(&client, &informers, &events, &key).await }
    };
    queue.run("taint-eviction", WORKERS, shutdown, work).await;
}

fn evicting(node: &Node) -> Vec<Taint> {
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    taints.filter(|taint| taint.effect == "NoExecute").cloned().collect()
}

async fn reconcile(
    client: &Client,
    informers: &Informers,
    events: &EventRecorder,
    key: &ObjectKey,
) -> Result<Option<Duration>, ControllerError> {
    let Some(pod) = informers.pods.get(key).filter(|pod| !pods::is_terminating(pod)) else {
        return Ok(None);
    };
    let node = pods::node_name(&pod).and_then(|n| informers.nodes.get(&ObjectKey::new("", n)));
    let Some(node) = node else { return Ok(None) };
    match leave(&pod, &evicting(&node), Timestamp::now()) {
        Leave::Never => Ok(None),
        Leave::In(wait) => Ok(Some(wait)),
        Leave::Now => {
            events.event(
                &object_reference(&*pod),
                EventType::Normal,
                "TaintManagerEviction",
                format!("Marking for deletion Pod {key}"),
            );
            let target = Disruption {
                reason: "DeletionByTaintManager",
                message: "Taint manager: deleting due to NoExecute taint",
                failed: false,
            };
            remove(client, &pod, target, None).await.map(|()| None)
        }
    }
}

/// Why a pod is taken away.
pub(crate) struct Disruption {
    pub(crate) reason: &'static str,
    pub(crate) message: &'static str,
    /// Whether its phase becomes `Failed`, since nobody else will say so.
    pub(crate) failed: bool,
}

/// Says in the pod's condition `DisruptionTarget` why, and deletes it.
pub(crate) async fn remove(
    client: &Client,
    pod: &Pod,
    why: Disruption,
    grace_period: Option<u32>,
) -> Result<(), ControllerError> {
    let key = ObjectKey::of(&pod.metadata);
    let api: Api<Pod> = Api::namespaced(client.clone(), key.namespace());
    if !pods::is_over(pod) {
        let time = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(Timestamp::now());
        let mut patch = json!({
            "metadata": {"uid": pod.metadata.uid},
            "status": {"conditions": [{
                "type": "DisruptionTarget", "status": "True", "reason": why.reason,
                "message": why.message, "lastTransitionTime": time,
            }]},
        });
        if why.failed {
            patch["status"]["phase"] = json!("Failed");
        }
        let patch = Patch::Strategic(patch);
        match api.patch_status(key.name(), &PatchParams::default(), &patch).await {
            Err(error) if code(&error) == 404 => return Ok(()),
            Err(error) => return Err(error).doing(|| format!("mark pod {key}")),
            Ok(_) => {}
        }
    }
    let params = DeleteParams { grace_period_seconds: grace_period, ..DeleteParams::default() }
        .preconditions(Preconditions { uid: pod.metadata.uid.clone(), resource_version: None });
    match api.delete(key.name(), &params).await {
        Err(error) if code(&error) != 404 => Err(error).doing(|| format!("delete pod {key}")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn tolerations_say_how_long_a_pod_may_stay() {
        let now: Timestamp = "2026-01-01T00:01:00Z".parse().unwrap();
        let taint: Taint = serde_json::from_value(json!({"key": "k", "effect": "NoExecute",
            "timeAdded": "2026-01-01T00:00:00Z"}))
        .unwrap();
        let seconds = |s: i64| json!({"key": "k", "operator": "Exists", "tolerationSeconds": s});
        let table: [(Value, Leave); 5] = [
            (json!([]), Leave::Now),
            (json!([{"key": "k", "operator": "Exists"}]), Leave::Never),
            (json!([seconds(300)]), Leave::In(Duration::from_secs(240))),
            (json!([seconds(300), seconds(90)]), Leave::In(Duration::from_secs(30))),
            (json!([seconds(30)]), Leave::Now),
        ];
        for (tolerations, expected) in table {
            let pod: Pod = serde_json::from_value(json!({"metadata": {},
                "spec": {"containers": [], "tolerations": tolerations}}))
            .unwrap();
            assert_eq!(leave(&pod, std::slice::from_ref(&taint), now), expected, "{tolerations}");
        }
        let pod = Pod::default();
        assert_eq!(leave(&pod, &[], now), Leave::Never);
    }
}
