//! Services, EndpointSlices and the node, as the API server tells of them.
//!
//! Objects are cut down to what the proxy needs as they come in and are not kept here: at 30,000
//! Services the difference is hundreds of megabytes.

use std::{collections::HashSet, fmt::Debug, net::IpAddr, time::Instant};

use futures::StreamExt;
use ipnet::IpNet;
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
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::model::{
    Problem,
    objects::{HEADLESS, Place, SERVICE_PROXY_NAME, Service, Slice},
};

/// How many changes may wait for the loop before the watches wait too.
pub(crate) const QUEUE: usize = 8_192;
/// The cluster autoscaler's taint of nodes that it is about to delete.
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// Which zone a node is in.
const ZONE: &str = "topology.kubernetes.io/zone";

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

/// Follows EndpointSlices, as they are seen from where the node is, until `shutdown`. Nothing is
/// read before the node was looked for, since hints are for zones; when it turns out to be in
/// another zone, all are read again.
pub(crate) async fn slices(
    client: Client,
    mut place: watch::Receiver<Option<Place>>,
    queue: mpsc::Sender<Change>,
    shutdown: CancellationToken,
) {
    let labels = format!("!{SERVICE_PROXY_NAME},!{HEADLESS}");
    while !shutdown.is_cancelled() {
        let known = tokio::select! {
            known = place.wait_for(Option::is_some) => known.ok().and_then(|known| known.clone()),
            () = shutdown.cancelled() => return,
        };
        let Some(here) = known else { return };
        let config = watcher::Config::default().labels(&labels);
        let read = |key, object: Option<EndpointSlice>| {
            let read = object.as_ref().map(|o| Slice::read(o, &here));
            let (slice, problems) = read.unwrap_or_default();
            ChangeKind::Slice(key, slice, problems)
        };
        let (api, stop) = (Api::all(client.clone()), shutdown.clone());
        let follow = follow(api, config, queue.clone(), stop, read, ChangeKind::Slices);
        tokio::select! {
            () = follow => return,
            moved = place.changed() => if moved.is_err() { return },
        }
    }
}

/// Follows the node's own object until `shutdown`, and tells `place` where it is.
pub(crate) async fn node(
    client: Client,
    name: String,
    place: watch::Sender<Option<Place>>,
    queue: mpsc::Sender<Change>,
    shutdown: CancellationToken,
) {
    let api: Api<Node> = Api::all(client);
    let mut stream = Box::pin(watcher::watch_object(api, &name).default_backoff());
    while let Some(next) = next(&mut stream, &shutdown).await {
        let here = match &next {
            Ok(Some(node)) => self::place(&name, Some(node)),
            // Without its object nobody knows; what was known stays.
            Ok(None) => place.borrow().clone().unwrap_or_else(|| self::place(&name, None)),
            Err(error) => {
                tracing::warn!(%error, node = name, "the node can't be watched; trying again");
                continue;
            }
        };
        let here = Some(here);
        place.send_if_modified(|known| {
            let moved = *known != here;
            known.clone_from(&here);
            moved
        });
        // Without its object nobody knows what should come here; keep on serving.
        let Ok(Some(node)) = next else { continue };
        if queue.send(node_change(&node).into()).await.is_err() {
            return;
        }
    }
}

/// The ranges of a node's pods, once it has some; `None` if `shutdown` came first.
pub(crate) async fn pod_cidrs(
    client: Client,
    name: &str,
    shutdown: &CancellationToken,
) -> Option<Vec<IpNet>> {
    let api: Api<Node> = Api::all(client);
    let mut stream = Box::pin(watcher::watch_object(api, name).default_backoff());
    while let Some(next) = next(&mut stream, shutdown).await {
        match next {
            Ok(node) => {
                let ranges = node.as_ref().map(ranges_of).unwrap_or_default();
                if !ranges.is_empty() {
                    return Some(ranges);
                }
                tracing::info!(node = name, "waiting for the node's pod ranges (spec.podCIDRs)");
            }
            Err(error) => {
                tracing::warn!(%error, node = name, "the node can't be watched; trying again");
            }
        }
    }
    None
}

/// Where a node is.
pub(crate) fn place(name: &str, node: Option<&Node>) -> Place {
    let labels = node.and_then(|node| node.metadata.labels.as_ref());
    Place { node: name.to_owned(), zone: labels.and_then(|l| l.get(ZONE)).cloned() }
}

/// The ranges of a node's pods.
pub(crate) fn ranges_of(node: &Node) -> Vec<IpNet> {
    let spec = node.spec.iter();
    let texts = spec.flat_map(|spec| spec.pod_cidrs.iter().flatten().chain(&spec.pod_cidr));
    let mut ranges: Vec<IpNet> = texts.filter_map(|text| text.parse().ok()).collect();
    ranges.sort_unstable();
    ranges.dedup();
    ranges
}

/// A node's primary addresses: the first of each family.
pub(crate) fn node_addresses(node: &Node) -> Vec<IpAddr> {
    let status = node.status.iter();
    let listed = status.flat_map(|status| status.addresses.iter().flatten());
    let internal = listed.filter(|address| address.type_ == "InternalIP");
    let mut addresses: Vec<IpAddr> = Vec::new();
    for address in internal.filter_map(|address| address.address.parse::<IpAddr>().ok()) {
        if !addresses.iter().any(|known| known.is_ipv4() == address.is_ipv4()) {
            addresses.push(address);
        }
    }
    addresses
}

fn node_change(node: &Node) -> ChangeKind {
    let addresses = node_addresses(node);
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_nodes_primary_addresses_are_the_first_of_each_family() {
        let internal = |address: &str| json!({"type": "InternalIP", "address": address});
        let node = json!({"status": {"addresses": [
            {"type": "Hostname", "address": "n"}, {"type": "ExternalIP", "address": "203.0.113.9"},
            internal("192.0.2.1"), internal("192.0.2.2"), internal("2001:db8::1"), internal("x"),
            internal("2001:db8::2"),
        ]}});
        let node = serde_json::from_value(node).unwrap();
        let expected: [IpAddr; 2] = ["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        assert_eq!(node_addresses(&node), expected);
    }
}
