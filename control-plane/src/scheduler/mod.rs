//! The scheduler: gives each pod that has no node the node that suits it best.
//!
//! ```text
//! pods, nodes, namespaces ──► Cluster (who is where)    Pending (who waits)
//!       (informers)                   └──────┬──────────────┘
//!                                     plan::best_node  ── a pure function
//!                                            │
//!                         a node ◄───────────┴──────────► none
//!              reckon it there at once,                condition, event, back-off;
//!              bind in the background                  again when something changed
//! ```
//!
//! Handlers of the informers keep [`cluster`] and [`pending`] up to date; one task takes pod after
//! pod and decides in memory, so that two pods never take the same room. Bindings are written
//! concurrently; one that fails gives the room back.
//!
//! Not supported, and said so in the pod's condition: persistent volume claims and resource claims.
//! There is no preemption: a pod of higher priority is tried first, but evicts nobody.

mod affinity;
mod apply;
mod cluster;
pub(crate) mod filter;
mod metrics;
mod pending;
mod plan;
mod requests;
mod score;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use k8s_openapi::api::core::v1::{Node, Pod};
use keelson_api::{
    events::{EventRecorder, EventType},
    object::{ObjectKey, object_reference},
};
use kube::Client;
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;

use self::{
    cluster::{Cluster, PodFacts},
    pending::{Attempt, Pending},
};
use crate::informers::{Change, Informers};

pub use self::metrics::SchedulerMetrics;

/// The `spec.schedulerName` of the pods that this scheduler looks after.
pub const SCHEDULER_NAME: &str = "default-scheduler";

/// How many writes may be under way.
const MAX_WRITES: usize = 32;

struct State {
    cluster: Cluster,
    pending: Pending,
}

struct Scheduler {
    client: Client,
    events: EventRecorder,
    metrics: SchedulerMetrics,
    state: Mutex<State>,
    changed: Notify,
}

/// Schedules pods until `shutdown`.
///
/// The client's user must be one that may bind pods, write their status and record events
/// (`system:kube-scheduler`).
pub async fn run(
    client: Client,
    informers: Arc<Informers>,
    metrics: SchedulerMetrics,
    shutdown: CancellationToken,
) {
    let (events, events_task) =
        EventRecorder::spawn(client.clone(), SCHEDULER_NAME, None, shutdown.clone());
    let scheduler = Arc::new(Scheduler {
        client,
        events,
        metrics,
        state: Mutex::new(State { cluster: Cluster::default(), pending: Pending::default() }),
        changed: Notify::new(),
    });
    if informers.nodes.synced(&shutdown).await
        && informers.pods.synced(&shutdown).await
        && informers.namespaces.synced(&shutdown).await
    {
        scheduler.follow(&informers);
        scheduler.work(&shutdown).await;
    }
    if let Err(error) = events_task.await {
        tracing::debug!(%error, "scheduler's event recorder");
    }
}

impl Scheduler {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn follow(self: &Arc<Self>, informers: &Informers) {
        let this = self.clone();
        informers.namespaces.on_change(move |change| {
            let name = change.key().name().to_owned();
            let labels = change.after.as_ref().map(|ns| ns.metadata.labels.clone());
            this.lock().cluster.set_namespace(&name, labels.map(Option::unwrap_or_default));
        });
        let this = self.clone();
        informers.nodes.on_change(move |change| this.node_changed(change));
        let this = self.clone();
        informers.pods.on_change(move |change| this.pod_changed(change));
    }

    fn node_changed(&self, change: &Change<Node>) {
        let mut state = self.lock();
        let name = change.key().name().to_owned();
        match &change.after {
            Some(node) => {
                state.cluster.set_node(&name, node.clone());
                if may_help(change.before.as_deref(), node) {
                    state.pending.retry_all(Instant::now());
                }
            }
            None => state.cluster.remove_node(&name),
        }
        drop(state);
        self.changed.notify_one();
    }

    fn pod_changed(&self, change: &Change<Pod>) {
        let now = Instant::now();
        let key = change.key();
        let mut state = self.lock();
        let before_uid = change.before.as_ref().and_then(|pod| pod.metadata.uid.as_ref());
        if let Some(pod) = &change.after
            && before_uid.is_some_and(|uid| Some(uid) != pod.metadata.uid.as_ref())
        {
            state.pending.remove(&key);
            state.cluster.remove_pod(&key);
        }
        match change.after.as_ref().filter(|pod| !is_over(pod)) {
            None => {
                state.pending.remove(&key);
                if state.cluster.remove_pod(&key) {
                    state.pending.retry_all(now);
                }
            }
            Some(pod) => match node_of(pod) {
                Some(node) => {
                    let node = node.to_owned();
                    state.pending.remove(&key);
                    let labels = |pod: &Pod| pod.metadata.labels.clone();
                    let moved = change.before.as_ref().is_none_or(|before| {
                        node_of(before).is_none() || labels(before) != labels(pod)
                    });
                    state.cluster.place(PodFacts::of(pod.clone()), &node);
                    if moved {
                        state.pending.retry_where(now, cares_for_others);
                    }
                }
                None if is_ours(pod) => state.pending.set(pod.clone(), now),
                None => {}
            },
        }
        drop(state);
        self.changed.notify_one();
    }

    async fn work(self: &Arc<Self>, shutdown: &CancellationToken) {
        let mut writes: FuturesUnordered<BoxFuture<'static, ()>> = FuturesUnordered::new();
        loop {
            let wake = loop {
                if writes.len() >= MAX_WRITES {
                    break None;
                }
                match self.schedule_one() {
                    Ok(write) => writes.push(write),
                    Err(wake) => break wake,
                }
            };
            let woken = async {
                match wake {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = self.changed.notified() => {}
                Some(()) = writes.next() => {}
                () = woken => {}
            }
        }
    }

    /// Decides on the next pod and returns what there is to write; or, if no pod waits, when the
    /// next will.
    fn schedule_one(self: &Arc<Self>) -> Result<BoxFuture<'static, ()>, Option<Instant>> {
        let started = Instant::now();
        let mut state = self.lock();
        self.metrics.show_queues(state.pending.counts());
        self.metrics.show_cache(state.cluster.nodes().count(), state.cluster.placed_pods());
        let Some(attempt) = state.pending.pop(started) else {
            return Err(state.pending.next_wake());
        };
        let facts = PodFacts::of(attempt.pod.clone());
        let key = facts.key.clone();
        let choice = plan::best_node(&facts, &state.cluster, rand::random());
        self.metrics.algorithm_duration.observe(started.elapsed().as_secs_f64());
        let this = self.clone();
        match choice {
            Ok(node) => {
                state.cluster.place(facts, &node);
                Ok(Box::pin(async move { this.bind(attempt, &node, started).await }))
            }
            Err(reason) => {
                state.pending.failed(&key, Instant::now());
                drop(state);
                self.observe("unschedulable", started);
                let message = reason.to_string();
                Ok(Box::pin(async move { this.report_failure(&attempt.pod, &message).await }))
            }
        }
    }

    fn observe(&self, result: &str, started: Instant) {
        let labels = [metrics::PROFILE, result];
        self.metrics.attempts.with_label_values(&labels).inc();
        self.metrics
            .attempt_duration
            .with_label_values(&labels)
            .observe(started.elapsed().as_secs_f64());
    }

    async fn bind(&self, attempt: Attempt, node: &str, started: Instant) {
        let pod = &attempt.pod;
        match apply::bind(&self.client, pod, node).await {
            Ok(()) => {
                self.observe("scheduled", started);
                self.metrics.attempts_per_pod.observe(f64::from(attempt.number));
                let attempts =
                    if attempt.number > 15 { "15+".to_owned() } else { attempt.number.to_string() };
                self.metrics
                    .sli_duration
                    .with_label_values(&[&attempts])
                    .observe(attempt.since.elapsed().as_secs_f64());
                apply::report_bound(&self.events, pod, node);
            }
            Err(error) => {
                self.observe("error", started);
                let key = ObjectKey::of(&pod.metadata);
                tracing::warn!(pod = %key, node, %error, "binding");
                let now = Instant::now();
                let mut state = self.lock();
                // If it is no longer pending, the watch has brought the node meanwhile.
                if state.pending.refused(&key, now) {
                    state.cluster.remove_pod(&key);
                    state.pending.retry_all(now);
                }
                drop(state);
                self.changed.notify_one();
            }
        }
    }

    async fn report_failure(&self, pod: &Pod, message: &str) {
        self.events.event(
            &object_reference(pod),
            EventType::Warning,
            "FailedScheduling",
            message.to_owned(),
        );
        if let Err(error) =
            apply::report_condition(&self.client, pod, "Unschedulable", message).await
        {
            let key = ObjectKey::of(&pod.metadata);
            tracing::debug!(pod = %key, %error, "condition PodScheduled");
        }
    }
}

fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref().filter(|name| !name.is_empty())
}

/// Whether a pod has run to its end, and takes no room any more.
fn is_over(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// Whether where other pods are can let a pod in: it wants to be near to some, or spread evenly.
fn cares_for_others(pod: &Pod) -> bool {
    pod.spec.as_ref().is_some_and(|spec| {
        spec.affinity.as_ref().is_some_and(|affinity| affinity.pod_affinity.is_some())
            || spec.topology_spread_constraints.as_ref().is_some_and(|rules| !rules.is_empty())
    })
}

/// Whether a pod without a node is for this scheduler to place.
fn is_ours(pod: &Pod) -> bool {
    let name = pod.spec.as_ref().and_then(|s| s.scheduler_name.as_deref());
    pod.metadata.deletion_timestamp.is_none() && name.is_none_or(|name| name == SCHEDULER_NAME)
}

/// Whether a node's change may let a pod in that found no room: heartbeats don't.
fn may_help(before: Option<&Node>, after: &Node) -> bool {
    let Some(before) = before else { return true };
    let taints = |node: &Node| node.spec.as_ref().and_then(|s| s.taints.clone());
    let cordoned = |node: &Node| node.spec.as_ref().and_then(|s| s.unschedulable);
    let room = |node: &Node| node.status.as_ref().and_then(|s| s.allocatable.clone());
    taints(before) != taints(after)
        || cordoned(before) != cordoned(after)
        || room(before) != room(after)
        || before.metadata.labels != after.metadata.labels
}
