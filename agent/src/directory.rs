//! The node's pods as the workers know them, for all who ask.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use k8s_openapi::api::core::v1::Pod;
use keelson_runtime_shim::runtime::{ContainerState, SandboxState};
use tokio::sync::Notify;

use crate::{
    metrics::Counts,
    pods::{PodDirectory, RuntimePod},
    worker::desired::Origin,
};

struct Entry {
    pod: Arc<Pod>,
    origin: Origin,
    runtime: RuntimePod,
}

/// One entry for each worker. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct PodTable {
    entries: Arc<Mutex<HashMap<String, Entry>>>,
    /// Rings when a pod is new or gone.
    others: Arc<Notify>,
}

impl PodTable {
    fn with<T>(&self, read: impl FnOnce(&mut HashMap<String, Entry>) -> T) -> T {
        // a map stays usable whatever the panic was that left the lock behind
        read(&mut self.entries.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts down what a worker knows.
    pub(crate) fn put(&self, uid: &str, pod: Arc<Pod>, origin: Origin, runtime: RuntimePod) {
        let entry = Entry { pod, origin, runtime };
        if self.with(|entries| entries.insert(uid.to_owned(), entry)).is_none() {
            self.others.notify_one();
        }
    }

    /// Forgets a pod.
    pub(crate) fn remove(&self, uid: &str) {
        if self.with(|entries| entries.remove(uid)).is_some() {
            self.others.notify_one();
        }
    }

    /// Waits until a pod is new or gone; for one task.
    pub(crate) async fn others(&self) {
        self.others.notified().await;
    }

    /// How many pods and containers there are.
    pub(crate) fn counts(&self) -> Counts {
        self.with(|entries| {
            let mut counts = Counts::default();
            for entry in entries.values() {
                match entry.origin {
                    Origin::Api => counts.api_pods += 1,
                    Origin::Static => counts.static_pods += 1,
                    Origin::Orphan => {}
                }
                let sandbox = entry.runtime.sandbox.as_ref();
                let ready = sandbox.is_some_and(|sandbox| sandbox.state == SandboxState::Ready);
                counts.running_pods += i64::from(ready);
                for container in &entry.runtime.containers {
                    *match container.state {
                        ContainerState::Created => &mut counts.created,
                        ContainerState::Running => &mut counts.running,
                        ContainerState::Exited => &mut counts.exited,
                        ContainerState::Unknown => &mut counts.unknown,
                    } += 1;
                }
            }
            counts
        })
    }
}

impl PodDirectory for PodTable {
    fn pods(&self) -> Vec<Arc<Pod>> {
        let mut pods: Vec<Arc<Pod>> = self.with(|entries| {
            entries
                .values()
                .filter(|entry| entry.origin != Origin::Orphan)
                .map(|entry| Arc::clone(&entry.pod))
                .collect()
        });
        pods.sort_by(|a, b| {
            let key = |pod: &Pod| (pod.metadata.namespace.clone(), pod.metadata.name.clone());
            key(a).cmp(&key(b))
        });
        pods
    }

    fn pod(&self, namespace: &str, name: &str) -> Option<Arc<Pod>> {
        self.with(|entries| {
            entries
                .values()
                .filter(|entry| {
                    entry.pod.metadata.namespace.as_deref() == Some(namespace)
                        && entry.pod.metadata.name.as_deref() == Some(name)
                })
                // of two with one name, the one that is not on its way out
                .min_by_key(|entry| entry.pod.metadata.deletion_timestamp.is_some())
                .map(|entry| Arc::clone(&entry.pod))
        })
    }

    fn runtime_pod(&self, uid: &str) -> Option<RuntimePod> {
        self.with(|entries| entries.get(uid).map(|entry| entry.runtime.clone()))
    }
}
