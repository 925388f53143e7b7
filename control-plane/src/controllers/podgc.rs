//! Pods that nobody else will remove: too many that have ended, those of nodes that are gone, and
//! those that were deleted before they had a node.

use std::{collections::HashMap, sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::{Node, Pod};
use keelson_api::object::ObjectKey;
use kube::{Api, Client};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    error::ControllerError,
    node::eviction::{self, Disruption},
    pods,
};
use crate::informers::Informers;

/// How often is looked (the period of Kubernetes' own).
const PERIOD: Duration = Duration::from_secs(20);
/// How long a node must be gone before its pods go.
const QUARANTINE: Duration = Duration::from_secs(40);

/// Why a pod is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    TooMany,
    NodeGone,
    NeverPlaced,
}

/// Which pods are to go; `gone` says whether a node is known to be gone for long enough.
fn plan(all: &[Arc<Pod>], threshold: usize, gone: impl Fn(&str) -> bool) -> Vec<(Arc<Pod>, Why)> {
    let mut plan = Vec::new();
    let mut over: Vec<&Arc<Pod>> =
        all.iter().filter(|pod| pods::is_over(pod) && !pods::is_terminating(pod)).collect();
    if threshold > 0 && over.len() > threshold {
        over.sort_by_key(|pod| pod.metadata.creation_timestamp.as_ref().map(|time| time.0));
        let surplus = over.len() - threshold;
        plan.extend(over.into_iter().take(surplus).map(|pod| (pod.clone(), Why::TooMany)));
    }
    for pod in all {
        match pods::node_name(pod) {
            Some(node) if gone(node) => plan.push((pod.clone(), Why::NodeGone)),
            None if pods::is_terminating(pod) => plan.push((pod.clone(), Why::NeverPlaced)),
            _ => {}
        }
    }
    plan
}

/// Removes such pods until `shutdown`; `threshold` is how many that have ended may stay (0: all).
pub(crate) async fn run(
    client: Client,
    informers: Arc<Informers>,
    threshold: usize,
    shutdown: CancellationToken,
) {
    if !(informers.nodes.synced(&shutdown).await && informers.pods.synced(&shutdown).await) {
        return;
    }
    let mut missing: HashMap<String, Instant> = HashMap::new();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(PERIOD) => {}
        }
        let all = informers.pods.list();
        let is_missing = |name: &str| informers.nodes.get(&ObjectKey::new("", name)).is_none();
        missing.retain(|name, _| is_missing(name));
        for name in all.iter().filter_map(|pod| pods::node_name(pod)) {
            if is_missing(name) {
                missing.entry(name.to_owned()).or_insert_with(Instant::now);
            }
        }
        let mut gone = Vec::new();
        for (name, since) in &missing {
            if since.elapsed() >= QUARANTINE && is_really_gone(&client, name).await {
                gone.push(name.clone());
            }
        }
        for (pod, why) in plan(&all, threshold, |node| gone.iter().any(|name| name == node)) {
            if let Err(error) = remove(&client, &pod, why).await {
                let key = ObjectKey::of(&pod.metadata);
                tracing::warn!(pod = %key, %error, "pod garbage collection");
            }
        }
    }
}

/// Asks the API server: the cache may be behind.
async fn is_really_gone(client: &Client, name: &str) -> bool {
    let nodes: Api<Node> = Api::all(client.clone());
    matches!(nodes.get_metadata_opt(name).await, Ok(None))
}

async fn remove(client: &Client, pod: &Pod, why: Why) -> Result<(), ControllerError> {
    let message = match why {
        Why::TooMany => "PodGC: too many terminated pods",
        Why::NodeGone => "PodGC: node no longer exists",
        Why::NeverPlaced => "PodGC: unscheduled pod is terminating",
    };
    let target = Disruption { reason: "DeletionByPodGC", message, failed: true };
    eviction::remove(client, pod, target, Some(0)).await
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(name: &str, metadata: Value, spec: Value, phase: &str) -> Arc<Pod> {
        let mut pod = json!({"metadata": metadata, "spec": spec, "status": {"phase": phase}});
        pod["metadata"]["name"] = json!(name);
        pod["spec"]["containers"] = json!([]);
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    #[test]
    fn only_what_nobody_else_removes_goes() {
        let on = |node: &str| json!({"nodeName": node});
        let born =
            |second: u32| json!({"creationTimestamp": format!("2026-01-01T00:00:{second:02}Z")});
        let going = json!({"deletionTimestamp": "2026-01-01T00:00:00Z"});
        let all = [
            pod("young", born(9), on("n1"), "Succeeded"),
            pod("old", born(1), on("n1"), "Failed"),
            pod("running", born(1), on("n1"), "Running"),
            pod("lost", born(1), on("n2"), "Running"),
            pod("waiting", born(1), json!({}), "Pending"),
            pod("unplaced", going.clone(), json!({}), "Pending"),
            pod("ending", going, on("n1"), "Running"),
        ];
        let plan = plan(&all, 1, |node| node == "n2");
        let names: Vec<_> =
            plan.iter().map(|(pod, why)| (pod.metadata.name.as_deref().unwrap(), *why)).collect();
        assert_eq!(
            names,
            [("old", Why::TooMany), ("lost", Why::NodeGone), ("unplaced", Why::NeverPlaced)]
        );
    }
}
