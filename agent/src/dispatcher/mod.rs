//! Decides which pods are taken, and gives each of them a worker.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::core::v1::Pod;
use keelson_api::{events::EventType, object::ObjectKey};
use keelson_runtime_shim::runtime::{RuntimeEvent, SandboxId};
use tokio::{
    sync::{broadcast, mpsc, watch},
    task::JoinSet,
};

use crate::{
    admission, labels,
    leftover::{Leftover, orphan},
    pods::PodDirectory,
    sources::{
        Change,
        mirror::{self, Mirrors},
    },
    status::writer::Target,
    worker::{
        Context, Ended, Handle, Worker,
        desired::{Desired, Origin, Stop},
        view,
    },
};

/// How long a static pod that already runs waits for the API's picture of it after a restart, so
/// that its readiness is carried over.
const MIRROR_WAIT: Duration = Duration::from_secs(3);
/// How often pods and containers are counted.
const COUNTING: Duration = Duration::from_secs(5);
/// How long after a worker's panic another one takes its pod over: what made it fail may still be
/// there.
const TAKE_OVER: Duration = Duration::from_secs(1);
/// How long workers have to come to rest when the agent stops.
const REST: Duration = Duration::from_secs(5);

pub(crate) struct Running {
    handle: Handle,
    origin: Origin,
    key: ObjectKey,
    pod: Arc<Pod>,
    task: tokio::task::Id,
    /// It was refused: it takes nothing from the node.
    rejected: bool,
}

/// Owns all workers: decides which pods are taken, never how they are run.
pub(crate) struct Dispatcher {
    context: Arc<Context>,
    node_view: watch::Receiver<Arc<admission::NodeView>>,
    node_uid: watch::Receiver<Option<String>>,
    workers: HashMap<String, Running>,
    tasks: JoinSet<Ended>,
    uids: HashMap<tokio::task::Id, String>,
    /// The static pods that should run, by UID.
    statics: BTreeMap<String, Arc<Pod>>,
    /// The API's pods for this node, by UID; without mirrors.
    api: HashMap<String, Arc<Pod>>,
    /// Pods that were brought to their end here and that the API still shows.
    finished: BTreeSet<String>,
    leftover: HashMap<String, Leftover>,
    mirrors: Mirrors,
    mirrors_told: watch::Sender<Arc<Mirrors>>,
    api_known: bool,
    orphans_done: bool,
    /// The wait for the API's picture of static pods is over.
    waited: bool,
    take_over: Duration,
}

impl Dispatcher {
    /// A dispatcher that has taken no pod yet.
    pub(crate) fn new(
        context: Arc<Context>,
        node_view: watch::Receiver<Arc<admission::NodeView>>,
        node_uid: watch::Receiver<Option<String>>,
        leftover: HashMap<String, Leftover>,
        mirrors_told: watch::Sender<Arc<Mirrors>>,
    ) -> Self {
        let static_known = context.config.static_pod_path.is_none();
        Self {
            api_known: context.client.is_none(),
            context,
            node_view,
            workers: HashMap::new(),
            tasks: JoinSet::new(),
            uids: HashMap::new(),
            statics: BTreeMap::new(),
            api: HashMap::new(),
            finished: BTreeSet::new(),
            leftover,
            mirrors: Mirrors { static_known, ..Mirrors::default() },
            mirrors_told,
            node_uid,
            orphans_done: false,
            waited: false,
            take_over: TAKE_OVER,
        }
    }

    /// Runs until the agent stops.
    pub(crate) async fn run(
        mut self,
        mut changes: mpsc::Receiver<Change>,
        mut events: broadcast::Receiver<RuntimeEvent>,
    ) {
        let shutdown = self.context.shutdown.clone();
        let mut counting = tokio::time::interval(COUNTING);
        let mut wait = std::pin::pin!(tokio::time::sleep(MIRROR_WAIT));
        if self.mirrors.static_known && self.api_known {
            self.take_orphans().await;
        }
        loop {
            self.context.pulse.beat();
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                event = events.recv() => self.pass_on(event),
                Some(change) = changes.recv() => {
                    self.take(change);
                    self.settle().await;
                }
                Some(ended) = self.tasks.join_next_with_id(), if !self.tasks.is_empty() => {
                    match ended {
                        Ok((task, ended)) => self.take_end(task, ended),
                        Err(error) => {
                            tracing::error!(%error, "worker failed, a new one takes over");
                            self.take_failure(error.id());
                        }
                    }
                    self.settle().await;
                }
                Ok(()) = self.node_uid.changed() => self.tell_mirrors(),
                () = &mut wait, if !self.waited => {
                    self.waited = true;
                    self.settle().await;
                }
                _ = counting.tick() => {
                    self.count();
                    self.retry_refused();
                }
            }
        }
        // the workers see the shutdown themselves and leave their pods alone
        let rest = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(REST, rest).await.is_err() {
            tracing::warn!("a pod's worker did not come to rest");
        }
    }

    fn pass_on(&self, event: Result<RuntimeEvent, broadcast::error::RecvError>) {
        match event {
            Ok(event) => {
                if let Some(worker) = self.workers.get(&event.pod_uid) {
                    worker.handle.changed.notify_one();
                }
            }
            Err(broadcast::error::RecvError::Lagged(missed)) => {
                tracing::warn!(missed, "runtime events missed, looking at all pods");
                for worker in self.workers.values() {
                    worker.handle.changed.notify_one();
                }
            }
            // the runtime is gone for good; workers still look every minute
            Err(broadcast::error::RecvError::Closed) => {}
        }
    }

    fn take(&mut self, change: Change) {
        match change {
            Change::Static(pods) => {
                self.mirrors.static_known = true;
                self.statics = pods
                    .into_iter()
                    .filter_map(|pod| Some((pod.metadata.uid.clone()?, pod)))
                    .collect();
                for (uid, worker) in &self.workers {
                    if worker.origin == Origin::Static && !self.statics.contains_key(uid) {
                        stop(worker);
                    }
                }
            }
            Change::ApiAll(pods) => {
                self.api_known = true;
                self.mirrors.found.clear();
                self.api.clear();
                self.mirrors.listed = true;
                for pod in pods {
                    self.take_api(pod);
                }
                for (uid, worker) in &self.workers {
                    if worker.origin == Origin::Api && !self.api.contains_key(uid) {
                        stop(worker);
                    }
                }
                let api = &self.api;
                self.finished.retain(|uid| api.contains_key(uid));
            }
            Change::ApiPod(pod) => self.take_api(pod),
            Change::ApiGone(pod) => {
                let key = ObjectKey::of(&pod.metadata);
                let uid = pod.metadata.uid.clone().unwrap_or_default();
                if mirror::is_mirror(&pod) {
                    let ours = self.mirrors.found.get(&key);
                    if ours.is_some_and(|found| found.metadata.uid == pod.metadata.uid) {
                        self.mirrors.found.remove(&key);
                    }
                    return;
                }
                self.api.remove(&uid);
                self.finished.remove(&uid);
                if let Some(worker) = self.workers.get_mut(&uid) {
                    worker.pod = Arc::clone(&pod);
                    worker.handle.desired.send_modify(|desired| desired.pod = pod);
                    stop(worker);
                }
            }
        }
    }

    fn take_api(&mut self, pod: Arc<Pod>) {
        let Some(uid) = pod.metadata.uid.clone() else { return };
        let key = ObjectKey::of(&pod.metadata);
        if mirror::is_mirror(&pod) {
            self.mirrors.found.insert(key, pod);
            return;
        }
        if let Some(worker) = self.workers.get_mut(&uid) {
            worker.pod = Arc::clone(&pod);
            worker.handle.desired.send_modify(|desired| desired.pod = Arc::clone(&pod));
        }
        // a namesake whose end was missed
        let replaced: Vec<String> = self
            .api
            .iter()
            .filter(|(other, known)| **other != uid && ObjectKey::of(&known.metadata) == key)
            .map(|(other, _)| other.clone())
            .collect();
        for other in replaced {
            self.api.remove(&other);
            if let Some(worker) = self.workers.get(&other) {
                stop(worker);
            }
        }
        self.api.insert(uid, pod);
    }

    /// Starts what should run and does not, and says what changed for the mirrors.
    async fn settle(&mut self) {
        let mut missing: Vec<(String, Arc<Pod>, Origin)> = Vec::new();
        for (uid, pod) in &self.statics {
            let name_taken =
                self.workers.values().any(|worker| worker.key == ObjectKey::of(&pod.metadata));
            let wait = !self.waited && !self.api_known && self.leftover.contains_key(uid);
            if !name_taken && !wait {
                missing.push((uid.clone(), Arc::clone(pod), Origin::Static));
            }
        }
        for (uid, pod) in &self.api {
            if !self.workers.contains_key(uid) && !self.finished.contains(uid) {
                missing.push((uid.clone(), Arc::clone(pod), Origin::Api));
            }
        }
        // oldest first, as the kubelet admits them
        missing.sort_by_key(|(uid, pod, origin)| {
            let created = pod.metadata.creation_timestamp.as_ref().map(|time| time.0);
            (*origin != Origin::Static, created, uid.clone())
        });
        for (uid, pod, origin) in missing {
            self.start(uid, pod, origin);
        }
        if self.mirrors.static_known && self.api_known && !self.orphans_done {
            self.take_orphans().await;
        }
        self.tell_mirrors();
    }

    fn start(&mut self, uid: String, mut pod: Arc<Pod>, origin: Origin) {
        let leftover = self.leftover.remove(&uid).unwrap_or_default();
        let known = !leftover.sandboxes.is_empty();
        let target = match origin {
            Origin::Api => {
                Some(Target { uid: uid.clone(), status: pod.status.clone().unwrap_or_default() })
            }
            Origin::Static => {
                let mirror = self.mirrors.found.get(&ObjectKey::of(&pod.metadata));
                if let Some(status) = mirror.and_then(|mirror| mirror.status.clone())
                    && known
                {
                    let mut with_status = Pod::clone(&pod);
                    with_status.status = Some(status);
                    pod = Arc::new(with_status);
                }
                mirror.map(|mirror| target_of(mirror))
            }
            Origin::Orphan => None,
        };
        let mut stop = (origin == Origin::Orphan).then_some(Stop::Gone);
        let new = !known
            && origin != Origin::Orphan
            && pod.metadata.deletion_timestamp.is_none()
            && !view::is_terminal(view::phase(&pod));
        if new && let Err(rejection) = self.admit(&pod) {
            let admission::Rejection { reason, message } = rejection;
            tracing::warn!(pod = view::format_pod(&pod), reason, message, "pod refused");
            self.context.pod_event(&pod, EventType::Warning, &reason, message.clone());
            stop = Some(Stop::Rejected { reason, message });
        }
        let rejected = matches!(stop, Some(Stop::Rejected { .. }));
        let desired = Desired { pod: Arc::clone(&pod), origin, stop };
        let sandboxes = leftover.sandboxes.into_iter().map(|sandbox| sandbox.id).collect();
        self.spawn(uid, desired, sandboxes, target, rejected);
    }

    fn spawn(
        &mut self,
        uid: String,
        desired: Desired,
        sandboxes: Vec<SandboxId>,
        target: Option<Target>,
        rejected: bool,
    ) {
        let (origin, pod) = (desired.origin, Arc::clone(&desired.pod));
        let (worker, handle) = Worker::new(Arc::clone(&self.context), desired, sandboxes, target);
        let task = self.tasks.spawn(worker.run()).id();
        self.uids.insert(task, uid.clone());
        let key = ObjectKey::of(&pod.metadata);
        self.workers.insert(uid, Running { handle, origin, key, pod, task, rejected });
    }

    fn admit(&self, pod: &Pod) -> Result<(), admission::Rejection> {
        let active: Vec<Arc<Pod>> = self
            .workers
            .iter()
            .filter(|(_, worker)| !worker.rejected && worker.origin != Origin::Orphan)
            // the workers know phases that the API has not heard of yet
            .filter(|(uid, worker)| {
                let key = &worker.key;
                let known = self.context.directory.pod(key.namespace(), key.name());
                let known = known.filter(|known| known.metadata.uid.as_ref() == Some(uid));
                !view::is_terminal(view::phase(known.as_ref().unwrap_or(&worker.pod)))
            })
            .map(|(_, worker)| Arc::clone(&worker.pod))
            .collect();
        let node = Arc::clone(&self.node_view.borrow());
        admission::admit(pod, &active, &node)
    }

    /// A static pod that was refused gets another chance when there is room for it: nobody else
    /// would ask for it anew. Its worker makes way for a new one.
    fn retry_refused(&self) {
        let refused = |worker: &&Running| worker.rejected && worker.origin == Origin::Static;
        for worker in self.workers.values().filter(refused) {
            if self.admit(&worker.pod).is_ok() {
                stop(worker);
            }
        }
    }

    fn take_end(&mut self, task: tokio::task::Id, ended: Ended) {
        let Some(uid) = self.uids.remove(&task) else { return };
        let ours = self.workers.get(&uid).is_some_and(|worker| worker.task == task);
        if !ours || ended == Ended::Shutdown {
            return;
        }
        self.workers.remove(&uid);
        if self.api.contains_key(&uid) {
            self.finished.insert(uid);
        }
        self.retry_refused();
    }

    /// A worker panicked: after a while a new one looks at what is there. Other pods don't wait for
    /// it, and what becomes of this one meanwhile is told to the new one.
    fn take_failure(&mut self, task: tokio::task::Id) {
        let Some(uid) = self.uids.remove(&task) else { return };
        let Some(failed) = self.workers.remove(&uid) else { return };
        let desired = failed.handle.desired.borrow().clone();
        let target = failed.handle.target.borrow().clone();
        let (worker, handle) = Worker::new(Arc::clone(&self.context), desired, Vec::new(), target);
        let context = Arc::clone(&self.context);
        let task = self.tasks.spawn(take_over(context, uid.clone(), worker, self.take_over));
        self.uids.insert(task.id(), uid.clone());
        self.workers.insert(uid, Running { handle, task: task.id(), ..failed });
    }

    /// What the runtime or the disk has and nobody asks for is brought to its end.
    async fn take_orphans(&mut self) {
        self.orphans_done = true;
        let uids: Vec<String> = self.leftover.keys().cloned().collect();
        for uid in uids {
            let wanted = self.statics.contains_key(&uid) || self.api.contains_key(&uid);
            let Some(leftover) = (!wanted).then(|| self.leftover.get(&uid)).flatten() else {
                continue;
            };
            let pod = Arc::new(orphan(&uid, leftover));
            tracing::info!(pod = view::format_pod(&pod), "pod is asked for by nobody, removing it");
            self.start(uid, pod, Origin::Orphan);
        }
        for uid in self.context.volumes.pods_on_disk().await {
            let wanted = self.statics.contains_key(&uid) || self.api.contains_key(&uid);
            if !wanted && !self.workers.contains_key(&uid) {
                let pod = Arc::new(orphan(&uid, &Leftover::default()));
                self.start(uid, pod, Origin::Orphan);
            }
        }
    }

    fn tell_mirrors(&mut self) {
        self.mirrors.node_uid.clone_from(&self.node_uid.borrow());
        let wanted: BTreeMap<_, _> = self
            .statics
            .values()
            .map(|pod| (ObjectKey::of(&pod.metadata), Arc::clone(pod)))
            .collect();
        self.mirrors.wanted = wanted;
        for worker in self.workers.values().filter(|worker| worker.origin == Origin::Static) {
            let target = self
                .mirrors
                .found
                .get(&worker.key)
                .filter(|mirror| {
                    let hash = |pod: &Pod, key: &str| {
                        pod.metadata.annotations.as_ref().and_then(|all| all.get(key).cloned())
                    };
                    hash(mirror, labels::CONFIG_MIRROR) == hash(&worker.pod, labels::CONFIG_HASH)
                })
                .map(|mirror| target_of(mirror));
            worker.handle.target.send_if_modified(|known| {
                let uid =
                    |target: &Option<Target>| target.as_ref().map(|target| target.uid.clone());
                let changed = uid(known) != uid(&target);
                if changed {
                    *known = target;
                }
                changed
            });
        }
        self.mirrors_told.send_replace(Arc::new(self.mirrors.clone()));
    }

    fn count(&self) {
        let mut counts = self.context.directory.counts();
        counts.mirror_pods = i64::try_from(self.mirrors.found.len()).unwrap_or(i64::MAX);
        self.context.metrics.set_counts(&counts);
    }
}

/// Gives a worker the sandboxes that its pod has, once the runtime tells, and lets it work.
async fn take_over(
    context: Arc<Context>,
    uid: String,
    mut worker: Worker,
    after: Duration,
) -> Ended {
    loop {
        tokio::select! {
            () = context.shutdown.cancelled() => return Ended::Shutdown,
            () = tokio::time::sleep(after) => {}
        }
        match context.runtime.list_pod_sandboxes().await {
            Ok(sandboxes) => {
                let own = sandboxes.into_iter().filter(|sandbox| sandbox.config.uid == uid);
                worker.adopt(own.map(|sandbox| sandbox.id));
                return worker.run().await;
            }
            Err(error) => {
                tracing::warn!(%error, uid, "a failed worker's pod can't be seen; trying again");
            }
        }
    }
}

fn stop(worker: &Running) {
    worker.handle.desired.send_if_modified(|desired| {
        let changed = desired.stop != Some(Stop::Gone);
        desired.stop = Some(Stop::Gone);
        changed
    });
}

fn target_of(pod: &Pod) -> Target {
    Target {
        uid: pod.metadata.uid.clone().unwrap_or_default(),
        status: pod.status.clone().unwrap_or_default(),
    }
}
