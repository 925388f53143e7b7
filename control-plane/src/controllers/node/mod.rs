//! Nodes: whether they are alive ([`health`]), which pods must leave them ([`eviction`]), and which
//! pod addresses are theirs ([`ipam`]).
//!
//! A node that is silent becomes `Unknown`, its pods become not ready so that Services pass them
//! by, and it is tainted. Where no node at all is ready, something else is broken (the network, or
//! this process): then nothing is evicted, as Kubernetes documents it.

pub(crate) mod eviction;
mod health;
pub(crate) mod ipam;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{Node, Pod},
    apimachinery::pkg::apis::meta::v1::Time,
};
use keelson_api::{
    events::{EventRecorder, EventType},
    object::{ObjectKey, object_reference},
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::json;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::health::{LastHeard, Patience};
use super::{
    change::{self, Part},
    error::{ControllerError, Doing, code},
    pods,
    queue::WorkQueue,
};
use crate::informers::Informers;

const WORKERS: usize = 4;
/// How often silent nodes are looked for (`--node-monitor-period`'s default).
const PERIOD: Duration = Duration::from_secs(5);
/// How long a node has before its first report (`--node-startup-grace-period`'s default).
const STARTING: Duration = Duration::from_secs(60);

struct Controller {
    client: Client,
    informers: Arc<Informers>,
    events: EventRecorder,
    heard: Mutex<LastHeard>,
    patience: Patience,
}

/// Watches over nodes until `shutdown`; `grace_period` is how long one may be silent.
pub(crate) async fn run(
    client: Client,
    informers: Arc<Informers>,
    events: EventRecorder,
    grace_period: Duration,
    shutdown: CancellationToken,
) {
    if !(informers.nodes.synced(&shutdown).await
        && informers.pods.synced(&shutdown).await
        && informers.leases.synced(&shutdown).await)
    {
        return;
    }
    let controller = Arc::new(Controller {
        client,
        informers,
        events,
        heard: Mutex::default(),
        patience: Patience { running: grace_period, starting: STARTING },
    });
    let queue = WorkQueue::new();
    let (add, this) = (queue.clone(), controller.clone());
    controller.informers.nodes.on_change(move |change| {
        this.report_change(change.before.as_deref(), change.after.as_deref());
        add.add(change.key());
    });
    let ticking = async {
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(PERIOD) => {}
            }
            controller.forget_gone();
            for node in controller.informers.nodes.list() {
                queue.add(ObjectKey::of(&node.metadata));
            }
        }
    };
    let work = |key: ObjectKey| {
        let this = controller.clone();
        async move { this.reconcile(&key).await.map(|()| None) }
    };
    let working = queue.clone().run("node-lifecycle", WORKERS, shutdown.clone(), work);
    futures::future::join(ticking, Box::pin(working)).await;
}

impl Controller {
    fn report_change(&self, before: Option<&Node>, after: Option<&Node>) {
        let Some(node) = after.or(before) else { return };
        let name = node.metadata.name.as_deref().unwrap_or_default();
        let (event_type, reason, message) = match (before, after) {
            (None, Some(_)) => (
                EventType::Normal,
                "RegisteredNode",
                format!("Node {name} event: Registered Node {name} in Controller"),
            ),
            (Some(_), None) => (
                EventType::Normal,
                "RemovingNode",
                format!("Node {name} event: Removing Node {name} from Controller"),
            ),
            (Some(before), Some(after))
                if health::readiness(before) == "True" && health::readiness(after) != "True" =>
            {
                (
                    EventType::Normal,
                    "NodeNotReady",
                    format!("Node {name} status is now: NodeNotReady"),
                )
            }
            _ => return,
        };
        self.events.event(&object_reference(node), event_type, reason, message);
    }

    fn forget_gone(&self) {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.retain(|name| self.informers.nodes.get(&ObjectKey::new("", name)).is_some());
    }

    async fn reconcile(&self, key: &ObjectKey) -> Result<(), ControllerError> {
        let Some(node) = self.informers.nodes.get(key) else { return Ok(()) };
        let lease = self.informers.leases.get(&ObjectKey::new("kube-node-lease", key.name()));
        let silence = {
            let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
            heard.silence(&node, lease.as_deref(), Instant::now())
        };
        let now = Timestamp::now();
        let nodes: Api<Node> = Api::all(self.client.clone());
        let mut current = (*node).clone();
        if let Some(silenced) = health::silenced(&node, silence, self.patience, now) {
            tracing::warn!(node = %key, ?silence, "node is not heard of");
            if let Some(written) = change::write(&nodes, &current, &silenced, Part::Status).await? {
                current = written;
            }
        }
        let some_ready =
            self.informers.nodes.list().iter().any(|node| health::readiness(node) == "True");
        let taints = health::taints(&current, some_ready, now);
        let known = current.spec.as_ref().and_then(|s| s.taints.clone()).unwrap_or_default();
        if taints != known {
            let mut after = current.clone();
            after.spec.get_or_insert_default().taints = (!taints.is_empty()).then_some(taints);
            change::write(&nodes, &current, &after, Part::Main).await?;
        }
        // A node that says itself that it is not ready still says of its pods what is true.
        if health::condition(&current, "Ready").is_some_and(|c| c.status == "Unknown") {
            self.mark_pods(key).await?;
        }
        Ok(())
    }

    /// Says of a node's pods that they are not ready, since nobody there says so.
    async fn mark_pods(&self, node: &ObjectKey) -> Result<(), ControllerError> {
        for pod in self.informers.pods.list() {
            if pods::node_name(&pod) != Some(node.name()) || !pods::is_ready(&pod) {
                continue;
            }
            let key = ObjectKey::of(&pod.metadata);
            let api: Api<Pod> = Api::namespaced(self.client.clone(), key.namespace());
            let patch = json!({
                "metadata": {"uid": pod.metadata.uid},
                "status": {"conditions": [{
                    "type": "Ready", "status": "False",
                    "lastTransitionTime": Time(Timestamp::now()),
                }]},
            });
            let patch = Patch::Strategic(patch);
            match api.patch_status(key.name(), &PatchParams::default(), &patch).await {
                Err(error) if code(&error) != 404 => {
                    return Err(error).doing(|| format!("mark pod {key}"));
                }
                _ => self.events.event(
                    &object_reference(&*pod),
                    EventType::Warning,
                    "NodeNotReady",
                    "Node is not ready",
                ),
            }
        }
        Ok(())
    }
}
