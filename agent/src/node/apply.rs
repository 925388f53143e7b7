//! Registers the Node and keeps its status.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, NodeStatus};
use keelson_api::{
    backoff::Backoff,
    client_error,
    events::EventType,
    object::{ObjectKey, reference_by_key},
};
use keelson_runtime_shim::runtime::RuntimeStatus;
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::json;

use super::{NodeInfo, machine::Free, plan};
use crate::{admission::NodeView, worker::Context};

/// How soon a node that is not ready is looked at again: what is missing at the start (a range of
/// addresses for pods) comes within moments, and pods wait for it.
const UNREADY_LOOK: Duration = Duration::from_millis(200);

/// How long a node whose range is known waits for its network after a restart, so that it is not
/// reported as unready, and pods are not sent away, for nothing.
const NETWORK_WAIT: Duration = Duration::from_secs(5);
/// Between two looks at the network meanwhile.
const NETWORK_LOOK: Duration = Duration::from_millis(20);

struct Keeper {
    nodes: Api<Node>,
    context: Arc<Context>,
    info: NodeInfo,
}

/// Registers the Node and keeps its status until the agent stops.
pub(crate) async fn run(client: Client, context: Arc<Context>, info: NodeInfo) {
    let keeper = Keeper { nodes: Api::all(client), context, info };
    let shutdown = keeper.context.shutdown.clone();
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = keeper.keep() => {}
    }
}

impl Keeper {
    async fn keep(&self) {
        let config = &self.context.config.node;
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(7));
        let mut told = false;
        let mut reported: Option<(Timestamp, NodeStatus)> = None;
        loop {
            let wait = match self.once(&mut reported).await {
                Ok(ready) => {
                    backoff.reset();
                    if !told {
                        told = true;
                        self.event(EventType::Normal, "Starting", "Starting kubelet.");
                    }
                    if ready { config.status_update_frequency } else { UNREADY_LOOK }
                }
                Err(error) => {
                    let error = client_error::shown(&error);
                    tracing::warn!(error, "node not registered or its status not written");
                    backoff.next_wait()
                }
            };
            tokio::time::sleep(wait).await;
        }
    }

    /// One look at the machine and at the Node; writes what differs. Says whether the node is ready.
    async fn once(
        &self,
        reported: &mut Option<(Timestamp, NodeStatus)>,
    ) -> Result<bool, kube::Error> {
        let config = &self.context.config;
        let root_dir = config.root_dir.clone();
        let free = tokio::task::spawn_blocking(move || Free::read(&root_dir)).await;
        let free = match free {
            Ok(Ok(free)) => free,
            other => {
                tracing::warn!(?other, "free memory and disk not read");
                return Ok(true);
            }
        };
        let name = &config.node_name;
        let known = self.nodes.get_opt(name).await?;
        if let Some(node) = &known {
            self.tell(node);
        }
        let runtime = self.runtime_status(reported.is_none()).await;
        let images = self.context.runtime.list_images().await.unwrap_or_else(|error| {
            tracing::warn!(%error, "images not listed");
            Vec::new()
        });
        let now = Timestamp::now();
        let observed = plan::Observed {
            config,
            machine: &self.info.machine,
            free,
            version: &self.info.runtime,
            runtime: &runtime,
            images: &images,
            capacity: &self.info.capacity,
            allocatable: &self.info.allocatable,
            now,
        };
        let node = match known {
            Some(node) => self.adopt(node).await?,
            None if config.node.register => {
                let made = self.nodes.create(&PostParams::default(), &plan::node(&observed)).await;
                match made {
                    Ok(node) => node,
                    Err(kube::Error::Api(status)) if status.code == 409 => {
                        self.nodes.get(name).await?
                    }
                    Err(error) => return Err(error),
                }
            }
            None => {
                tracing::warn!(name, "there is no Node of this name, and registering is off");
                return Ok(true);
            }
        };
        self.tell(&node);
        let old = node.status.clone().unwrap_or_default();
        let status = plan::status(&observed, &old);
        let due = reported.as_ref().is_none_or(|(at, _)| {
            now.duration_since(*at).unsigned_abs() >= config.node.status_report_frequency
        });
        let conditions = |status: &NodeStatus| status.conditions.clone().unwrap_or_default();
        let ready = conditions(&status).iter().any(|c| c.type_ == "Ready" && c.status == "True");
        if due || plan::differ(&old, &status) {
            let body = json!({ "status": status });
            let patch = Patch::Strategic(&body);
            self.nodes.patch_status(name, &PatchParams::default(), &patch).await?;
            let before =
                reported.as_ref().map(|(_, status)| conditions(status)).unwrap_or_default();
            for (reason, trouble) in plan::condition_events(&before, &conditions(&status)) {
                let kind = if trouble { EventType::Warning } else { EventType::Normal };
                self.event(kind, reason, &format!("Node {name} status is now: {reason}"));
            }
            *reported = Some((now, status));
        }
        self.info.ready.send_if_modified(|known| std::mem::replace(known, ready) != ready);
        Ok(ready)
    }

    /// How the runtime is. Before the first report, a network that is just being set up is waited for.
    async fn runtime_status(&self, first: bool) -> RuntimeStatus {
        let runtime = &self.context.runtime;
        let has_range = self.info.pod_cidr.borrow().is_some();
        let ready = async {
            loop {
                let status = runtime.status().await;
                if status.network.is_ok() || !first || !has_range {
                    return status;
                }
                tokio::time::sleep(NETWORK_LOOK).await;
            }
        };
        match tokio::time::timeout(NETWORK_WAIT, ready).await {
            Ok(status) => status,
            Err(_) => runtime.status().await,
        }
    }

    /// Gives a Node that was there before the labels that are this node's to give.
    async fn adopt(&self, node: Node) -> Result<Node, kube::Error> {
        let wanted = plan::labels(&self.context.config);
        let labels = node.metadata.labels.clone().unwrap_or_default();
        let missing: serde_json::Map<_, _> = wanted
            .into_iter()
            .filter(|(key, value)| labels.get(key) != Some(value))
            .map(|(key, value)| (key, value.into()))
            .collect();
        if missing.is_empty() {
            return Ok(node);
        }
        let body = json!({ "metadata": { "labels": missing } });
        let name = &self.context.config.node_name;
        self.nodes.patch(name, &PatchParams::default(), &Patch::Strategic(&body)).await
    }

    /// Hands on what others wait for.
    fn tell(&self, node: &Node) {
        let uid = node.metadata.uid.clone();
        self.info.uid.send_if_modified(|known| {
            let changed = *known != uid;
            known.clone_from(&uid);
            changed
        });
        let cidr = node.spec.as_ref().and_then(|spec| spec.pod_cidr.clone());
        self.info.pod_cidr.send_if_modified(|known| {
            let changed = cidr.is_some() && *known != cidr;
            if changed {
                known.clone_from(&cidr);
            }
            changed
        });
        let labels = node.metadata.labels.clone().unwrap_or_default();
        self.info.view.send_if_modified(|view| {
            let changed = view.labels != labels;
            if changed {
                *view = Arc::new(NodeView { labels, ..NodeView::clone(view) });
            }
            changed
        });
    }

    fn event(&self, kind: EventType, reason: &str, message: &str) {
        // events on nodes carry the node's name as UID, as the kubelet's do
        let name = &self.context.config.node_name;
        let node = reference_by_key::<Node>(&ObjectKey::new("", name), Some(name.clone()));
        self.context.events.event(&node, kind, reason, message);
    }
}
