//! Services, EndpointSlices, the ranges of Services' addresses and the node, as the API server tells
//! of them.
//!
//! Objects are cut down to what the proxy needs as they come in and are not kept here: at 30,000
//! Services the difference is hundreds of megabytes.

use std::{
    collections::HashSet,
    fmt::Debug,
    net::IpAddr,
    time::{Duration, Instant},
};

use futures::StreamExt;
use ipnet::IpNet;
use k8s_openapi::{
    api::{
        core::v1::{Node, Service as ApiService},
        discovery::v1::EndpointSlice,
        networking::v1::ServiceCIDR,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use keelson_api::{backoff::Backoff, object::ObjectKey};
use kube::{
    Api, Client, Resource,
    runtime::{WatchStreamExt, watcher},
};
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::model::{
    Problem,
    service_ranges::ServiceRanges,
    services::{SERVICE_PROXY_NAME, Service},
    slices::{HEADLESS, Place, Slice},
};
use crate::patience::Patience;

/// How many changes may wait for the loop before the watches wait too.
pub(crate) const QUEUE: usize = 8_192;
/// The cluster autoscaler's taint of nodes that it is about to delete.
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// How long an API server that doesn't serve a kind, or not to the proxy, is left alone: at first,
/// as it may still be starting, and at the most.
const REFUSED: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(900));

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
    /// All ranges that cluster addresses are taken from, sorted.
    ServiceRanges(Vec<IpNet>),
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

/// Follows the ranges of Services' addresses until `shutdown`. Without the kind, as in clusters
/// before Kubernetes 1.33, or without leave to read it there are none.
pub(crate) async fn service_ranges(
    client: Client,
    queue: mpsc::Sender<Change>,
    shutdown: CancellationToken,
) {
    let (mut told, mut again) = (false, true);
    let mut backoff = Backoff::new(REFUSED.0, REFUSED.1);
    while again {
        let stream = watcher(Api::<ServiceCIDR>::all(client.clone()), watcher::Config::default());
        let Some(code) = follow_ranges(stream.backoff(Patience::new()), &queue, &shutdown).await
        else {
            return;
        };
        if !std::mem::replace(&mut told, true) {
            tracing::info!(
                code,
                "the API server shows no ServiceCIDRs: what is sent to addresses that no Service \
                 has is left to routing"
            );
        }
        // Nothing is known of them, as after a start.
        if queue.send(ChangeKind::ServiceRanges(Vec::new()).into()).await.is_err() {
            return;
        }
        again = tokio::select! {
            () = tokio::time::sleep(backoff.next_wait()) => true,
            () = shutdown.cancelled() => false,
        };
    }
}

/// Follows them until the API server refuses, with which code; or until there is nobody to tell.
async fn follow_ranges(
    stream: impl futures::Stream<Item = watcher::Result<watcher::Event<ServiceCIDR>>>,
    queue: &mpsc::Sender<Change>,
    shutdown: &CancellationToken,
) -> Option<u16> {
    let mut stream = std::pin::pin!(stream);
    let (mut known, mut listed) = (ServiceRanges::default(), ServiceRanges::default());
    let take = |ranges: &mut ServiceRanges, object: &ServiceCIDR| {
        let name = object.metadata.name.as_deref().unwrap_or_default();
        for problem in ranges.set(object) {
            tracing::warn!(name, reason = problem.reason, "ServiceCIDR: {}", problem.message);
        }
    };
    while let Some(event) = next(&mut stream, shutdown).await {
        match event {
            Ok(watcher::Event::Apply(object)) => take(&mut known, &object),
            Ok(watcher::Event::Delete(object)) => {
                known.remove(object.metadata.name.as_deref().unwrap_or_default());
            }
            Ok(watcher::Event::Init) => {
                listed = ServiceRanges::default();
                continue;
            }
            Ok(watcher::Event::InitApply(object)) => {
                take(&mut listed, &object);
                continue;
            }
            Ok(watcher::Event::InitDone) => known = std::mem::take(&mut listed),
            Err(error) => {
                if let Some(code @ (403 | 404)) = code_of(&error) {
                    return Some(code);
                }
                tracing::warn!(%error, kind = "ServiceCIDR", "the API server can't be watched; trying again");
                continue;
            }
        }
        queue.send(ChangeKind::ServiceRanges(known.all()).into()).await.ok()?;
    }
    None
}

/// The code with which the API server answered, if it did.
fn code_of(error: &watcher::Error) -> Option<u16> {
    match error {
        watcher::Error::WatchError(status) => Some(status.code),
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => Some(status.code),
        _ => None,
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
    let mut stream = Box::pin(watcher::watch_object(api, &name).backoff(Patience::new()));
    // What is missing and wasn't told yet: a node that starts registers itself in a moment.
    let (mut missing, mut untold) = (None, None);
    let mut until = tokio::time::Instant::now();
    loop {
        let next = tokio::select! {
            next = next(&mut stream, &shutdown) => next,
            () = tokio::time::sleep_until(until), if untold.is_some() => {
                tracing::warn!(node = name, "{}", untold.take().unwrap_or_default());
                continue;
            }
        };
        let Some(next) = next else { return };
        if let Ok(node) = &next {
            let now = missing_of(node.as_ref());
            if now != missing {
                (missing, untold) = (now, now);
                until = tokio::time::Instant::now() + REGISTERED;
            }
        }
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

/// So long a node may take to register itself, and to tell its addresses, before it is missed.
const REGISTERED: Duration = Duration::from_secs(10);

/// What the proxy lacks of its node, and what comes of it.
fn missing_of(node: Option<&Node>) -> Option<&'static str> {
    match node {
        None => Some(
            "the cluster has no such Node: node ports have no address unless they are configured, and \
             Services whose traffic policy is Local find no endpoint here; if the node has another \
             name, give it with --hostname-override",
        ),
        Some(node) if node_addresses(node).is_empty() => Some(
            "the Node has no InternalIP among its addresses (status.addresses): node ports have no \
             address unless they are configured",
        ),
        Some(_) => None,
    }
}

/// The ranges of a node's pods, once it has some; `None` if `shutdown` came first.
pub(crate) async fn pod_cidrs(
    client: Client,
    name: &str,
    shutdown: &CancellationToken,
) -> Option<Vec<IpNet>> {
    let api: Api<Node> = Api::all(client);
    let mut stream = Box::pin(watcher::watch_object(api, name).backoff(Patience::new()));
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
    let mut stream = Box::pin(watcher(api, config).backoff(Patience::new()));
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
    use kube::core::Status;
    use serde_json::json;

    use super::*;

    fn service_cidr(name: &str, cidrs: &[&str]) -> ServiceCIDR {
        let object = json!({"metadata": {"name": name}, "spec": {"cidrs": cidrs}});
        serde_json::from_value(object).unwrap()
    }

    fn refused(code: u16) -> watcher::Error {
        let status = Status::failure("no", "").with_code(code);
        watcher::Error::InitialListFailed(kube::Error::Api(Box::new(status)))
    }

    /// What is told of these events, and with which code it ended.
    async fn followed(
        events: Vec<watcher::Result<watcher::Event<ServiceCIDR>>>,
    ) -> (Vec<String>, Option<u16>) {
        let (queue, mut told) = mpsc::channel(events.len() + 1);
        let stream = futures::stream::iter(events);
        let code = follow_ranges(stream, &queue, &CancellationToken::new()).await;
        drop(queue);
        let mut all = Vec::new();
        while let Some(change) = told.recv().await {
            let ChangeKind::ServiceRanges(ranges) = change.kind else { panic!("{change:?}") };
            all.push(ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "));
        }
        (all, code)
    }

    #[tokio::test]
    async fn ranges_of_services_are_told_whole_once_they_are_listed() {
        use watcher::Event::{Apply, Delete, Init, InitApply, InitDone};
        let (a, b) = (service_cidr("a", &["10.96.0.0/16"]), service_cidr("b", &["10.97.0.0/16"]));
        let events = vec![
            Err(refused(500)),
            Ok(Init),
            Ok(InitApply(a.clone())),
            Ok(InitApply(service_cidr("bad", &["0.0.0.0/0"]))),
            Ok(InitDone),
            Ok(Apply(b.clone())),
            Ok(Delete(a.clone())),
            // A list that is begun again and breaks off leaves what is known.
            Ok(Init),
            Ok(InitApply(a.clone())),
            Err(refused(500)),
            Ok(Init),
            Ok(InitApply(service_cidr("a", &["10.98.0.0/16"]))),
            Ok(InitDone),
        ];
        let expected =
            ["10.96.0.0/16", "10.96.0.0/16 10.97.0.0/16", "10.97.0.0/16", "10.98.0.0/16"];
        assert_eq!(followed(events).await, (expected.map(str::to_owned).into(), None));
    }

    #[tokio::test]
    async fn an_api_without_ranges_of_services_is_left_alone() {
        for code in [403, 404] {
            let events = vec![Err(refused(code)), Ok(watcher::Event::InitDone)];
            assert_eq!(followed(events).await, (vec![], Some(code)));
            let status = Status::failure("no", "").with_code(code);
            let events = vec![Err(watcher::Error::WatchError(Box::new(status)))];
            assert_eq!(followed(events).await, (vec![], Some(code)));
        }
        assert_eq!(followed(vec![Err(refused(401)), Err(refused(503))]).await, (vec![], None));
    }

    #[test]
    fn what_is_missing_of_a_node_is_named() {
        let node = |status| serde_json::from_value::<Node>(json!({"status": status})).unwrap();
        let missing = |node: Option<Node>| missing_of(node.as_ref()).unwrap_or_default();
        assert!(missing(None).starts_with("the cluster has no such Node"));
        for addresses in [json!([]), json!([{"type": "Hostname", "address": "n"}])] {
            let told = missing(Some(node(json!({"addresses": addresses}))));
            assert!(told.starts_with("the Node has no InternalIP"), "{told}");
        }
        let addresses = json!([{"type": "InternalIP", "address": "192.0.2.1"}]);
        assert_eq!(missing(Some(node(json!({"addresses": addresses})))), "");
    }

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

    #[test]
    fn a_node_that_is_about_to_go_gets_no_traffic_from_load_balancers() {
        let taint = |key: &str| json!([{"key": key, "effect": "NoSchedule"}]);
        for (metadata, taints, expected) in [
            (json!({}), json!([]), true),
            (json!({}), taint("node.kubernetes.io/unschedulable"), true),
            (json!({}), taint("ToBeDeletedByClusterAutoscaler"), false),
            (json!({"deletionTimestamp": "2026-01-01T00:00:00Z"}), json!([]), false),
        ] {
            let node = json!({"metadata": metadata, "spec": {"taints": taints}});
            let change = node_change(&serde_json::from_value(node).unwrap());
            let ChangeKind::Node { eligible, .. } = change else { panic!("{change:?}") };
            assert_eq!(eligible, expected, "{metadata} {taints}");
        }
    }
}
