//! Services, EndpointSlices and the node, as the API server tells of them.
//!
//! Objects are cut down to what the proxy needs as they come in and are not kept here: at 30,000
//! Services the difference is hundreds of megabytes.

use std::{collections::HashSet, fmt::Debug, net::IpAddr, time::Instant};

use futures::StreamExt;
use k8s_openapi::{
    api::{
        core::v1::{Node, Service as ApiService},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use keelson_api::object::ObjectKey;
use kube::{
    Api, Client, Resource,
    runtime::{WatchStreamExt, watcher},
};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::model::{
    Problem,
    objects::{HEADLESS, SERVICE_PROXY_NAME, Service, Slice},
};

/// How many changes may wait for the loop before the watches wait too.
pub(crate) const QUEUE: usize = 8_192;
/// The cluster autoscaler's taint of nodes that it is about to delete.
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// Something that the loop has to know.
#[derive(Debug)]
pub(crate) struct Change {
    /// When it came in.
    pub(crate) at: Instant,
    /// What it is.
    pub(crate) kind: ChangeKind,
}

/// What there is to know.
#[derive(Debug)]
pub(crate) enum ChangeKind {
    /// A Service as it is now; `None` if it is gone or not ours.
    Service(ObjectKey, Option<Service>, Vec<Problem>),
    /// A slice as it is now; `None` if it is gone or not ours.
    Slice(ObjectKey, Option<Slice>, Vec<Problem>),
    /// All Services there are: others are gone.
    Services(HashSet<ObjectKey>),
    /// All slices there are: others are gone.
    Slices(HashSet<ObjectKey>),
    /// The node, or that it is gone.
    Node {
        /// Its own addresses.
        addresses: Vec<IpAddr>,
        /// Whether load balancers should send traffic here.
        eligible: bool,
    },
    /// Another program changed the rules; the word is what the metric calls it.
    Drift(&'static str),
}

impl From<ChangeKind> for Change {
    fn from(kind: ChangeKind) -> Self {
        Self { at: Instant::now(), kind }
    }
}

/// Follows Services until `shutdown`.
pub(crate) async fn services(
    client: Client,
    queue: mpsc::Sender<Change>,
    shutdown: CancellationToken,
) {
    let config = watcher::Config::default().labels(&format!("!{SERVICE_PROXY_NAME}"));
    let read = |key, object: Option<ApiService>| {
        let (service, problems) = object.as_ref().map(Service::read).unwrap_or_default();
        ChangeKind::Service(key, service, problems)
    };
    follow(Api::all(client), config, queue, shutdown, read, ChangeKind::Services).await;
}

/// Follows EndpointSlices, as the node called `node` sees them, until `shutdown`.
pub(crate) async fn slices(
    client: Client,
    node: String,
    queue: mpsc::Sender<Change>,
    shutdown: CancellationToken,
) {
    let labels = format!("!{SERVICE_PROXY_NAME},!{HEADLESS}");
    let config = watcher::Config::default().labels(&labels);
    let read = |key, object: Option<EndpointSlice>| {
        let (slice, problems) = object.as_ref().map(|o| Slice::read(o, &node)).unwrap_or_default();
        ChangeKind::Slice(key, slice, problems)
    };
    follow(Api::all(client), config, queue, shutdown, read, ChangeKind::Slices).await;
}

/// Follows the node's own object until `shutdown`.
pub(crate) async fn node(
    client: Client,
    name: String,
    queue: mpsc::Sender<Change>,
    shutdown: CancellationToken,
) {
    let api: Api<Node> = Api::all(client);
    let mut stream = Box::pin(watcher::watch_object(api, &name).default_backoff());
    while let Some(next) = next(&mut stream, &shutdown).await {
        let kind = match next {
            Ok(Some(node)) => node_change(&node),
            // Without its object nobody knows what should come here; keep on serving.
            Ok(None) => continue,
            Err(error) => {
                tracing::warn!(%error, node = name, "the node can't be watched; trying again");
                continue;
            }
        };
        if queue.send(kind.into()).await.is_err() {
            return;
        }
    }
}

fn node_change(node: &Node) -> ChangeKind {
    let addresses = node
        .status
        .iter()
        .flat_map(|status| status.addresses.iter().flatten())
        .filter(|address| address.type_ == "InternalIP")
        .filter_map(|address| address.address.parse().ok())
        .collect();
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    let leaving = node.metadata.deletion_timestamp.is_some()
        || taints.into_iter().any(|taint| taint.key == TO_BE_DELETED);
    ChangeKind::Node { addresses, eligible: !leaving }
}

async fn next<S: futures::Stream + Unpin>(
    stream: &mut S,
    shutdown: &CancellationToken,
) -> Option<S::Item> {
    tokio::select! {
        next = stream.next() => next,
        () = shutdown.cancelled() => None,
    }
}

async fn follow<K>(
    api: Api<K>,
    config: watcher::Config,
    queue: mpsc::Sender<Change>,
    shutdown: CancellationToken,
    read: impl Fn(ObjectKey, Option<K>) -> ChangeKind,
    listed: impl Fn(HashSet<ObjectKey>) -> ChangeKind,
) where
    K: Resource<DynamicType = ()>
        + k8s_openapi::Metadata<Ty = ObjectMeta>
        + Clone
        + DeserializeOwned
        + Debug
        + Send
        + 'static,
{
    let mut stream = Box::pin(watcher(api, config).default_backoff());
    let mut seen = HashSet::new();
    while let Some(event) = next(&mut stream, &shutdown).await {
        let key = |object: &K| ObjectKey::of(object.metadata());
        let kind = match event {
            Ok(watcher::Event::Apply(object)) => read(key(&object), Some(object)),
            Ok(watcher::Event::Delete(object)) => read(key(&object), None),
            Ok(watcher::Event::Init) => {
                seen.clear();
                continue;
            }
            Ok(watcher::Event::InitApply(object)) => {
                seen.insert(key(&object));
                read(key(&object), Some(object))
            }
            Ok(watcher::Event::InitDone) => listed(std::mem::take(&mut seen)),
            Err(error) => {
                tracing::warn!(%error, kind = %K::kind(&()), "the API server can't be watched; trying again");
                continue;
            }
        };
        if queue.send(kind.into()).await.is_err() {
            return;
        }
    }
}
