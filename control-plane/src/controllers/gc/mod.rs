//! The garbage collector: objects whose owners are gone go too.
//!
//! ```text
//! all resources (metadata only) ──► Graph ──► queue of UIDs ──► look at the object:
//!   types that the process watches                                owners absent      → delete
//!   anyway come from the informers                                owner waits for it → delete
//!                                                                 owner orphans it   → unlink
//! ```
//!
//! A decision is never made from the graph alone: before anything is deleted the object and the
//! owner that seems absent are asked for from the API server.

mod graph;

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::StreamExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use keelson_api::backoff::Backoff;
use kube::{
    Api, Client, Resource,
    api::{
        DeleteParams, DynamicObject, PartialObjectMeta, Patch, PatchParams, Preconditions,
        PropagationPolicy,
    },
    core::ApiResource,
    runtime::watcher::{self, Event},
};
use serde_json::json;
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::graph::{FOREGROUND, Graph, Known, ORPHAN, OwnerState, Stage, Uid, Verdict};
use super::{
    discover::{self, Discovered},
    error::{ControllerError, Doing, code},
    queue::WorkQueue,
};
use crate::informers::{Informer, Informers};

const WORKERS: usize = 8;
/// How often it is looked for resources that are new.
const REDISCOVER: Duration = Duration::from_secs(30);
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LONGEST_RETRY: Duration = Duration::from_secs(30);

struct Types {
    resources: Vec<Discovered>,
    by_kind: HashMap<(String, String), usize>,
}

impl Types {
    /// The number of a resource, given to it now if it is new.
    fn number(&mut self, resource: &Discovered) -> (usize, bool) {
        let key = (resource.resource.group.clone(), resource.resource.kind.clone());
        if let Some(number) = self.by_kind.get(&key) {
            return (*number, false);
        }
        let number = self.resources.len();
        self.resources.push(resource.clone());
        self.by_kind.insert(key, number);
        (number, true)
    }
}

struct Collector {
    client: Client,
    graph: Mutex<Graph>,
    types: Mutex<Types>,
    queue: Arc<WorkQueue<Uid>>,
    tasks: TaskTracker,
    shutdown: CancellationToken,
}

/// Collects garbage until `shutdown`.
pub(crate) async fn run(client: Client, informers: Arc<Informers>, shutdown: CancellationToken) {
    let collector = Arc::new(Collector {
        client,
        graph: Mutex::default(),
        types: Mutex::new(Types { resources: Vec::new(), by_kind: HashMap::new() }),
        queue: WorkQueue::new(),
        tasks: TaskTracker::new(),
        shutdown: shutdown.clone(),
    });
    // Nothing is judged before everything has been seen once.
    let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
    let unseen = loop {
        match collector.watch_new(&informers).await {
            Ok(unseen) => break unseen,
            Err(error) => {
                tracing::debug!(%error, "garbage collector");
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = tokio::time::sleep(backoff.next_wait()) => {}
                }
            }
        }
    };
    for mut seen in unseen {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = seen.wait_for(|seen| *seen) => {}
        }
    }
    let this = collector.clone();
    let rediscovery = async {
        loop {
            tokio::select! {
                () = this.shutdown.cancelled() => return,
                () = tokio::time::sleep(REDISCOVER) => {}
            }
            if let Err(error) = this.watch_new(&informers).await {
                tracing::debug!(%error, "garbage collector");
            }
        }
    };
    let work = |uid: Uid| {
        let this = collector.clone();
        async move { this.look_at(&uid).await.map(|()| None) }
    };
    let queue = collector.queue.clone().run("garbage-collector", WORKERS, shutdown, work);
    futures::future::join(rediscovery, Box::pin(queue)).await;
    collector.tasks.close();
    collector.tasks.wait().await;
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Collector {
    /// Follows all resources that are not followed yet; returns what tells when each is seen.
    async fn watch_new(
        self: &Arc<Self>,
        informers: &Informers,
    ) -> Result<Vec<watch::Receiver<bool>>, ControllerError> {
        let mut unseen = Vec::new();
        for resource in discover::resources(&self.client).await? {
            let is_events = resource.resource.plural == "events";
            if !resource.can("list")
                || !resource.can("watch")
                || !resource.can("delete")
                || is_events
            {
                continue;
            }
            let (number, is_new) = lock(&self.types).number(&resource);
            if !is_new {
                continue;
            }
            match (resource.resource.group.as_str(), resource.resource.plural.as_str()) {
                ("", "pods") => self.follow_informer(&informers.pods, number, &mut unseen),
                ("", "nodes") => self.follow_informer(&informers.nodes, number, &mut unseen),
                ("", "services") => self.follow_informer(&informers.services, number, &mut unseen),
                ("", "endpoints") => {
                    self.follow_informer(&informers.endpoints, number, &mut unseen);
                }
                ("", "namespaces") => {
                    self.follow_informer(&informers.namespaces, number, &mut unseen);
                }
                ("discovery.k8s.io", "endpointslices") => {
                    self.follow_informer(&informers.endpoint_slices, number, &mut unseen);
                }
                ("apps", "replicasets") => {
                    self.follow_informer(&informers.replica_sets, number, &mut unseen);
                }
                ("apps", "deployments") => {
                    self.follow_informer(&informers.deployments, number, &mut unseen);
                }
                _ => {
                    let (sender, receiver) = watch::channel(false);
                    unseen.push(receiver);
                    let this = self.clone();
                    self.tasks.spawn(async move {
                        tokio::select! {
                            () = this.shutdown.cancelled() => {}
                            () = Box::pin(this.follow(resource.resource, number, sender)) => {}
                        }
                    });
                }
            }
        }
        Ok(unseen)
    }

    fn follow_informer<K: Resource<DynamicType = ()> + Send + Sync + 'static>(
        self: &Arc<Self>,
        informer: &Arc<Informer<K>>,
        number: usize,
        unseen: &mut Vec<watch::Receiver<bool>>,
    ) {
        let this = self.clone();
        informer.on_change(move |change| match (&change.before, &change.after) {
            (before, Some(after)) => {
                if let Some(before) = before.as_ref().filter(|b| b.meta().uid != after.meta().uid) {
                    this.gone(before.meta().uid.as_deref().unwrap_or_default());
                }
                this.seen(number, after.meta());
            }
            (Some(before), None) => this.gone(before.meta().uid.as_deref().unwrap_or_default()),
            (None, None) => {}
        });
        unseen.push(informer.seen());
    }

    async fn follow(&self, resource: ApiResource, number: usize, synced: watch::Sender<bool>) {
        let api: Api<PartialObjectMeta<DynamicObject>> =
            Api::all_with(self.client.clone(), &resource);
        let mut events = std::pin::pin!(watcher::watcher(api, watcher::Config::default()));
        let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
        let mut listed: HashSet<Uid> = HashSet::new();
        while let Some(event) = events.next().await {
            match event {
                Ok(event) => {
                    backoff.reset();
                    self.take(number, event, &mut listed, &synced);
                }
                Err(error) => {
                    tracing::debug!(kind = resource.kind, %error, "watch interrupted");
                    tokio::time::sleep(backoff.next_wait()).await;
                }
            }
        }
    }

    fn take(
        &self,
        number: usize,
        event: Event<PartialObjectMeta<DynamicObject>>,
        listed: &mut HashSet<Uid>,
        synced: &watch::Sender<bool>,
    ) {
        match event {
            Event::Apply(object) => self.seen(number, &object.metadata),
            Event::Delete(object) => self.gone(object.metadata.uid.as_deref().unwrap_or_default()),
            Event::Init => listed.clear(),
            Event::InitApply(object) => {
                listed.extend(object.metadata.uid.clone());
                self.seen(number, &object.metadata);
            }
            Event::InitDone => {
                let known = lock(&self.graph).of_resource(number);
                for uid in known.difference(listed) {
                    self.gone(uid);
                }
                *listed = HashSet::new();
                synced.send_replace(true);
            }
        }
    }

    fn seen(&self, resource: usize, metadata: &ObjectMeta) {
        let Some(uid) = metadata.uid.clone() else { return };
        let known = Known {
            resource,
            namespace: metadata.namespace.clone().unwrap_or_default(),
            name: metadata.name.clone().unwrap_or_default(),
            owners: metadata.owner_references.clone().unwrap_or_default(),
            stage: Stage::of(metadata),
        };
        let look_at = lock(&self.graph).set(uid, known);
        for uid in look_at {
            self.queue.add(uid);
        }
    }

    fn gone(&self, uid: &str) {
        let look_at = lock(&self.graph).remove(uid);
        for uid in look_at {
            self.queue.add(uid);
        }
    }

    fn api_of(&self, known: &Known) -> Option<Api<DynamicObject>> {
        let types = lock(&self.types);
        let resource = types.resources.get(known.resource)?;
        Some(self.api(resource, &known.namespace))
    }

    fn api(&self, resource: &Discovered, namespace: &str) -> Api<DynamicObject> {
        if resource.namespaced {
            Api::namespaced_with(self.client.clone(), namespace, &resource.resource)
        } else {
            Api::all_with(self.client.clone(), &resource.resource)
        }
    }

    /// Judges one object.
    async fn look_at(&self, uid: &str) -> Result<(), ControllerError> {
        let Some(known) = lock(&self.graph).get(uid).cloned() else { return Ok(()) };
        let Some(api) = self.api_of(&known) else { return Ok(()) };
        let doing = || format!("look up {}/{}", known.namespace, known.name);
        let live = match api.get_metadata(&known.name).await {
            Ok(live) if live.metadata.uid.as_deref() == Some(uid) => live.metadata,
            Ok(_) => {
                self.gone(uid);
                return Ok(());
            }
            Err(error) if code(&error) == 404 => {
                self.gone(uid);
                return Ok(());
            }
            Err(error) => return Err(error).doing(doing),
        };
        match Stage::of(&live) {
            Stage::Orphaning => return self.orphan_dependents(&api, &live).await,
            Stage::Foreground => return self.go_on_foreground(&api, &live).await,
            Stage::Going => return Ok(()),
            Stage::Alive => {}
        }
        let mut owners = Vec::new();
        for owner in live.owner_references.iter().flatten() {
            let state = self.owner_state(owner, &known.namespace).await?;
            owners.push((owner.uid.clone(), state));
        }
        let has_dependents = !lock(&self.graph).dependents_of(uid).is_empty();
        match graph::verdict(&owners, has_dependents) {
            Verdict::Keep => Ok(()),
            Verdict::Unlink(uids) => self.unlink(&api, &live, &uids).await,
            Verdict::DeleteForeground => {
                self.delete(&api, &live, PropagationPolicy::Foreground).await
            }
            Verdict::Delete => {
                let has =
                    |wanted: &str| live.finalizers.iter().flatten().any(|known| known == wanted);
                let policy = if has(ORPHAN) {
                    PropagationPolicy::Orphan
                } else if has(FOREGROUND) {
                    PropagationPolicy::Foreground
                } else {
                    PropagationPolicy::Background
                };
                self.delete(&api, &live, policy).await
            }
        }
    }

    /// What an owner reference points to: in the graph, or else at the API server.
    async fn owner_state(
        &self,
        owner: &OwnerReference,
        namespace: &str,
    ) -> Result<OwnerState, ControllerError> {
        if let Some(known) = lock(&self.graph).get(&owner.uid) {
            let reachable = known.namespace.is_empty() || known.namespace == namespace;
            return Ok(match known.stage {
                _ if !reachable => OwnerState::Absent,
                Stage::Foreground => OwnerState::Waiting,
                _ => OwnerState::Solid,
            });
        }
        let group = owner.api_version.split_once('/').map_or("", |(group, _)| group);
        let resource = {
            let types = lock(&self.types);
            let key = (group.to_owned(), owner.kind.clone());
            types.by_kind.get(&key).map(|number| types.resources[*number].clone())
        };
        let Some(resource) = resource else {
            return Err(ControllerError::Object(format!(
                "the owner {} {} is of a kind that the API server does not have",
                owner.kind, owner.name
            )));
        };
        // A reference from outside any namespace to something in one can't be followed.
        if resource.namespaced && namespace.is_empty() {
            return Ok(OwnerState::Solid);
        }
        match self.api(&resource, namespace).get_metadata(&owner.name).await {
            Ok(live) if live.metadata.uid.as_deref() == Some(&owner.uid) => {
                Ok(match Stage::of(&live.metadata) {
                    Stage::Foreground => OwnerState::Waiting,
                    _ => OwnerState::Solid,
                })
            }
            Ok(_) => Ok(OwnerState::Absent),
            Err(error) if code(&error) == 404 => Ok(OwnerState::Absent),
            Err(error) => Err(error).doing(|| format!("look up owner {}", owner.name)),
        }
    }

    async fn delete(
        &self,
        api: &Api<DynamicObject>,
        live: &ObjectMeta,
        policy: PropagationPolicy,
    ) -> Result<(), ControllerError> {
        let name = live.name.as_deref().unwrap_or_default();
        let params = DeleteParams {
            propagation_policy: Some(policy),
            // If it got another owner meanwhile, it must stay.
            preconditions: Some(Preconditions {
                uid: live.uid.clone(),
                resource_version: live.resource_version.clone(),
            }),
            ..DeleteParams::default()
        };
        match api.delete(name, &params).await {
            Err(error) if code(&error) != 404 => Err(error).doing(|| format!("delete {name}")),
            _ => Ok(()),
        }
    }

    /// Takes references out of an object.
    async fn unlink(
        &self,
        api: &Api<DynamicObject>,
        live: &ObjectMeta,
        owners: &[Uid],
    ) -> Result<(), ControllerError> {
        let left: Vec<&OwnerReference> = live
            .owner_references
            .iter()
            .flatten()
            .filter(|owner| !owners.contains(&owner.uid))
            .collect();
        self.patch(api, live, json!({"ownerReferences": left})).await
    }

    async fn patch(
        &self,
        api: &Api<DynamicObject>,
        live: &ObjectMeta,
        metadata: serde_json::Value,
    ) -> Result<(), ControllerError> {
        let name = live.name.as_deref().unwrap_or_default();
        let mut patch = json!({"metadata": metadata});
        patch["metadata"]["uid"] = json!(live.uid);
        patch["metadata"]["resourceVersion"] = json!(live.resource_version);
        match api.patch_metadata(name, &PatchParams::default(), &Patch::Merge(patch)).await {
            Err(error) if code(&error) != 404 => Err(error).doing(|| format!("patch {name}")),
            _ => Ok(()),
        }
    }

    async fn remove_finalizer(
        &self,
        api: &Api<DynamicObject>,
        live: &ObjectMeta,
        finalizer: &str,
    ) -> Result<(), ControllerError> {
        let left: Vec<&String> =
            live.finalizers.iter().flatten().filter(|known| *known != finalizer).collect();
        self.patch(api, live, json!({"finalizers": left})).await
    }

    /// Lets an owner go once nothing keeps it waiting.
    async fn go_on_foreground(
        &self,
        api: &Api<DynamicObject>,
        live: &ObjectMeta,
    ) -> Result<(), ControllerError> {
        let uid = live.uid.as_deref().unwrap_or_default();
        let blocking = lock(&self.graph).blocking(uid);
        if blocking.is_empty() {
            return self.remove_finalizer(api, live, FOREGROUND).await;
        }
        for dependent in blocking {
            self.queue.add(dependent);
        }
        Ok(())
    }

    /// Sets an owner's dependents free, then lets it go.
    async fn orphan_dependents(
        &self,
        api: &Api<DynamicObject>,
        live: &ObjectMeta,
    ) -> Result<(), ControllerError> {
        let uid = live.uid.clone().unwrap_or_default();
        let dependents = lock(&self.graph).dependents_of(&uid);
        for dependent in dependents {
            let Some(known) = lock(&self.graph).get(&dependent).cloned() else { continue };
            let Some(theirs) = self.api_of(&known) else { continue };
            match theirs.get_metadata(&known.name).await {
                Ok(object) if object.metadata.uid.as_deref() == Some(&dependent) => {
                    let links = object.metadata.owner_references.iter().flatten();
                    if links.into_iter().any(|owner| owner.uid == uid) {
                        self.unlink(&theirs, &object.metadata, std::slice::from_ref(&uid)).await?;
                    }
                }
                Err(error) if code(&error) != 404 => {
                    return Err(error).doing(|| format!("look up {}", known.name));
                }
                _ => {}
            }
        }
        self.remove_finalizer(api, live, ORPHAN).await
    }
}
