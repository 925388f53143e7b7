//! One watch for each type, shared by all loops of the process.
//!
//! An [`Informer`] lists and watches one resource and keeps what it saw in memory; whoever needs
//! the objects reads them there and is told about each change by a callback. So the scheduler, all
//! controllers and cluster DNS together cost one watch and one copy of each object.
//!
//! ```text
//! API server ──list+watch──► Informer ──┬─► store (Arc<K> by namespace and name)
//!                                       └─► handlers: put a key into a work queue, and return
//! ```
//!
//! Handlers run on the informer's task one after the other. They must be quick and never wait:
//! what they do is put keys into queues.

use std::{
    collections::{BTreeMap, HashSet},
    fmt::Debug,
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use futures::StreamExt;
use k8s_openapi::api::{
    apps::v1::{Deployment, ReplicaSet},
    coordination::v1::Lease,
    core::v1::{ConfigMap, Endpoints, Namespace, Node, Pod, Service, ServiceAccount},
    discovery::v1::EndpointSlice,
    rbac::v1::ClusterRole,
};
use kube::{
    Api, Client, Resource,
    runtime::watcher::{self, Event},
};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use keelson_api::{backoff::Backoff, object::ObjectKey};

/// What an informer can hold.
pub trait Watched:
    Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static
{
}

impl<K> Watched for K where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static
{
}

/// One object before and after something happened to it.
#[derive(Clone, Debug)]
pub struct Change<K> {
    /// What was known before; `None` for a new object.
    pub before: Option<Arc<K>>,
    /// What is there now; `None` for a removed object.
    pub after: Option<Arc<K>>,
}

impl<K: Resource> Change<K> {
    /// The object's newest known state.
    pub fn newest(&self) -> Option<&Arc<K>> {
        self.after.as_ref().or(self.before.as_ref())
    }

    /// Its namespace and name.
    pub fn key(&self) -> ObjectKey {
        self.newest().map(|o| ObjectKey::of(o.meta())).unwrap_or_default()
    }
}

type Handler<K> = Arc<dyn Fn(&Change<K>) + Send + Sync>;

/// The present objects of one type, and who wants to hear of their changes.
pub struct Informer<K> {
    objects: RwLock<BTreeMap<ObjectKey, Arc<K>>>,
    handlers: Mutex<Vec<Handler<K>>>,
    /// Held while something is taken in and told, so that all hear of changes in their order.
    order: Mutex<()>,
    synced: watch::Sender<bool>,
}

impl<K: Resource> Default for Informer<K> {
    fn default() -> Self {
        Self {
            objects: RwLock::default(),
            handlers: Mutex::default(),
            order: Mutex::default(),
            synced: watch::Sender::new(false),
        }
    }
}

impl<K: Resource<DynamicType = ()>> Informer<K> {
    /// One object.
    pub fn get(&self, key: &ObjectKey) -> Option<Arc<K>> {
        self.objects.read().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
    }

    /// All objects.
    pub fn list(&self) -> Vec<Arc<K>> {
        self.objects.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// All objects of one namespace.
    pub fn list_in(&self, namespace: &str) -> Vec<Arc<K>> {
        let objects = self.objects.read().unwrap_or_else(PoisonError::into_inner);
        objects
            .range(ObjectKey::new(namespace, "")..)
            .take_while(|(key, _)| key.namespace() == namespace)
            .map(|(_, object)| object.clone())
            .collect()
    }

    /// Calls `handler` for each object that is known now, and from then on for each change.
    ///
    /// Nothing is told twice, and nothing older after something newer. A handler must not change
    /// this informer.
    pub fn on_change(&self, handler: impl Fn(&Change<K>) + Send + Sync + 'static) {
        let handler: Handler<K> = Arc::new(handler);
        let _order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        self.handlers.lock().unwrap_or_else(PoisonError::into_inner).push(handler.clone());
        for object in self.list() {
            handler(&Change { before: None, after: Some(object) });
        }
    }

    /// Waits until the first list is complete; `false` if the process is stopped before.
    pub async fn synced(&self, shutdown: &CancellationToken) -> bool {
        let mut synced = self.synced.subscribe();
        tokio::select! {
            () = shutdown.cancelled() => false,
            known = synced.wait_for(|synced| *synced) => known.is_ok(),
        }
    }

    /// Tells when the first list is complete.
    pub(crate) fn seen(&self) -> watch::Receiver<bool> {
        self.synced.subscribe()
    }

    /// Takes in an object as it is now, and tells the handlers. Objects that are no news are
    /// ignored.
    pub(crate) fn apply(&self, mut object: K) {
        object.meta_mut().managed_fields = None;
        let key = ObjectKey::of(object.meta());
        let after = Arc::new(object);
        let _order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        let before = {
            let mut objects = self.objects.write().unwrap_or_else(PoisonError::into_inner);
            objects.insert(key, after.clone())
        };
        let same = before.as_ref().is_some_and(|before| {
            before.meta().resource_version.is_some()
                && before.meta().resource_version == after.meta().resource_version
        });
        if !same {
            self.tell(&Change { before, after: Some(after) });
        }
    }

    /// Forgets an object, and tells the handlers.
    pub(crate) fn remove(&self, key: &ObjectKey) {
        let _order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.objects.write().unwrap_or_else(PoisonError::into_inner).remove(key);
        if before.is_some() {
            self.tell(&Change { before, after: None });
        }
    }

    fn tell(&self, change: &Change<K>) {
        let handlers = self.handlers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for handler in &handlers {
            handler(change);
        }
    }

    /// Says that all that there is has been taken in.
    pub(crate) fn mark_synced(&self) {
        self.synced.send_replace(true);
    }
}

impl<K: Watched> Informer<K> {
    /// Starts to list and watch.
    fn start(api: Api<K>, config: watcher::Config, tasks: &Tasks) -> Arc<Self> {
        let informer = Arc::new(Self::default());
        let running = informer.clone();
        let shutdown = tasks.shutdown.clone();
        tasks.tracker.spawn(async move {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = Box::pin(running.follow(api, config)) => {}
            }
        });
        informer
    }

    /// Follows the watch for ever; an interrupted one is taken up again with back-off.
    async fn follow(&self, api: Api<K>, config: watcher::Config) {
        let mut events = std::pin::pin!(watcher::watcher(api, config));
        let mut seen = HashSet::new();
        let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
        while let Some(event) = events.next().await {
            match event {
                Ok(event) => {
                    backoff.reset();
                    self.take(event, &mut seen);
                }
                Err(error) => {
                    let wait = backoff.next_wait();
                    tracing::debug!(kind = %K::kind(&()), %error, ?wait, "watch interrupted");
                    tokio::time::sleep(wait).await;
                }
            }
        }
    }

    fn take(&self, event: Event<K>, seen: &mut HashSet<ObjectKey>) {
        match event {
            Event::Apply(object) => self.apply(object),
            Event::Delete(object) => {
                self.remove_as(object);
            }
            Event::Init => seen.clear(),
            Event::InitApply(object) => {
                seen.insert(ObjectKey::of(object.meta()));
                self.apply(object);
            }
            Event::InitDone => {
                let gone: Vec<ObjectKey> = {
                    let objects = self.objects.read().unwrap_or_else(PoisonError::into_inner);
                    objects.keys().filter(|key| !seen.contains(*key)).cloned().collect()
                };
                for key in gone {
                    self.remove(&key);
                }
                *seen = HashSet::new();
                self.mark_synced();
            }
        }
    }

    /// Forgets an object; handlers see its last state, which the watch brought with the removal.
    fn remove_as(&self, mut last: K) {
        last.meta_mut().managed_fields = None;
        let key = ObjectKey::of(last.meta());
        let _order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        let known = self.objects.write().unwrap_or_else(PoisonError::into_inner).remove(&key);
        if known.is_some() {
            self.tell(&Change { before: Some(Arc::new(last)), after: None });
        }
    }
}

const FIRST_RETRY: std::time::Duration = std::time::Duration::from_millis(100);
const LONGEST_RETRY: std::time::Duration = std::time::Duration::from_secs(10);

struct Tasks {
    tracker: TaskTracker,
    shutdown: CancellationToken,
}

/// The informers of all types that the scheduler, the controllers and DNS look at.
pub struct Informers {
    /// Pods.
    pub pods: Arc<Informer<Pod>>,
    /// Nodes.
    pub nodes: Arc<Informer<Node>>,
    /// Services.
    pub services: Arc<Informer<Service>>,
    /// EndpointSlices.
    pub endpoint_slices: Arc<Informer<EndpointSlice>>,
    /// Legacy Endpoints.
    pub endpoints: Arc<Informer<Endpoints>>,
    /// ReplicaSets.
    pub replica_sets: Arc<Informer<ReplicaSet>>,
    /// Deployments.
    pub deployments: Arc<Informer<Deployment>>,
    /// Namespaces.
    pub namespaces: Arc<Informer<Namespace>>,
    /// Service accounts named `default`: the only ones that a controller looks after.
    pub default_accounts: Arc<Informer<ServiceAccount>>,
    /// ConfigMaps named `kube-root-ca.crt`, as above.
    pub root_ca_maps: Arc<Informer<ConfigMap>>,
    /// Cluster roles.
    pub cluster_roles: Arc<Informer<ClusterRole>>,
    /// The nodes' leases.
    pub leases: Arc<Informer<Lease>>,
    tasks: Tasks,
}

impl Informers {
    /// Starts the watches of all types, which go on until `shutdown`.
    ///
    /// The client must be one that may list and watch them all.
    pub fn start(client: &Client, shutdown: &CancellationToken) -> Arc<Self> {
        let tasks = Tasks { tracker: TaskTracker::new(), shutdown: shutdown.clone() };
        let named =
            |name: &str| watcher::Config::default().fields(&format!("metadata.name={name}"));
        let all = watcher::Config::default;
        let informers = Self {
            pods: Informer::start(Api::all(client.clone()), all(), &tasks),
            nodes: Informer::start(Api::all(client.clone()), all(), &tasks),
            services: Informer::start(Api::all(client.clone()), all(), &tasks),
            endpoint_slices: Informer::start(Api::all(client.clone()), all(), &tasks),
            endpoints: Informer::start(Api::all(client.clone()), all(), &tasks),
            replica_sets: Informer::start(Api::all(client.clone()), all(), &tasks),
            deployments: Informer::start(Api::all(client.clone()), all(), &tasks),
            namespaces: Informer::start(Api::all(client.clone()), all(), &tasks),
            default_accounts: Informer::start(Api::all(client.clone()), named("default"), &tasks),
            root_ca_maps: Informer::start(
                Api::all(client.clone()),
                named("kube-root-ca.crt"),
                &tasks,
            ),
            cluster_roles: Informer::start(Api::all(client.clone()), all(), &tasks),
            leases: Informer::start(
                Api::namespaced(client.clone(), "kube-node-lease"),
                all(),
                &tasks,
            ),
            tasks,
        };
        informers.tasks.tracker.close();
        Arc::new(informers)
    }

    /// Waits until all watches have ended after `shutdown`.
    pub async fn stopped(&self) {
        self.tasks.tracker.wait().await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

    use super::*;

    fn pod(namespace: &str, name: &str, version: &str) -> Pod {
        Pod {
            metadata: ObjectMeta {
                namespace: Some(namespace.into()),
                name: Some(name.into()),
                resource_version: Some(version.into()),
                ..ObjectMeta::default()
            },
            ..Pod::default()
        }
    }

    #[test]
    fn handlers_hear_of_what_is_there_and_of_changes_but_not_of_no_news() {
        let informer = Informer::<Pod>::default();
        informer.apply(pod("a", "x", "1"));
        let told = Arc::new(AtomicUsize::new(0));
        let count = told.clone();
        informer.on_change(move |_| {
            count.fetch_add(1, Ordering::SeqCst);
        });
        assert_eq!(told.load(Ordering::SeqCst), 1);
        informer.apply(pod("a", "x", "1"));
        assert_eq!(told.load(Ordering::SeqCst), 1);
        informer.apply(pod("a", "x", "2"));
        informer.remove(&ObjectKey::new("a", "x"));
        informer.remove(&ObjectKey::new("a", "x"));
        assert_eq!(told.load(Ordering::SeqCst), 3);
    }

    #[test]
    fn a_handler_that_comes_late_hears_nothing_old_after_something_new() {
        let informer = Arc::new(Informer::<Pod>::default());
        informer.apply(pod("a", "x", "1"));
        let (told, begun) = (Arc::new(Mutex::new(Vec::new())), std::sync::mpsc::sync_channel(1));
        let (writer, heard) = (informer.clone(), told.clone());
        let (begin, begun) = begun;
        let change = std::thread::spawn(move || {
            begun.recv().unwrap();
            writer.apply(pod("a", "x", "2"));
        });
        informer.on_change(move |change| {
            let version = change.newest().and_then(|pod| pod.metadata.resource_version.clone());
            if version.as_deref() == Some("1") {
                begin.send(()).unwrap();
                // Gives the other thread every chance to come first.
                (0..1000).for_each(|_| std::thread::yield_now());
            }
            heard.lock().unwrap().push(version.unwrap());
        });
        change.join().unwrap();
        assert_eq!(*told.lock().unwrap(), ["1", "2"]);
    }

    #[test]
    fn a_relist_removes_what_is_gone() {
        let informer = Informer::<Pod>::default();
        let mut seen = HashSet::new();
        informer.apply(pod("a", "x", "1"));
        informer.apply(pod("a", "y", "2"));
        informer.apply(pod("ab", "y", "3"));
        assert_eq!(informer.list_in("a").len(), 2);
        informer.take(Event::Init, &mut seen);
        informer.take(Event::InitApply(pod("a", "x", "1")), &mut seen);
        informer.take(Event::InitDone, &mut seen);
        assert_eq!(informer.list().len(), 1);
    }
}
