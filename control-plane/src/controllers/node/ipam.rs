//! A range of pod addresses for each node, out of the cluster's.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use keelson_api::{
    events::{EventRecorder, EventType},
    object::{ObjectKey, object_reference},
};
use kube::{Api, Client};
use tokio_util::sync::CancellationToken;

use crate::{
    controllers::{
        change::{self, Part},
        error::ControllerError,
        queue::WorkQueue,
    },
    informers::Informers,
};

/// The cluster's ranges, and how large a node's part of them is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodRanges {
    /// One range, or one of each family.
    pub cluster: Vec<IpNet>,
    /// Prefix length of a node's IPv4 range.
    pub node_prefix_v4: u8,
    /// Prefix length of a node's IPv6 range.
    pub node_prefix_v6: u8,
}

impl PodRanges {
    /// The first part of each cluster range that overlaps none in use; `None` if one is used up.
    fn next(&self, used: &HashSet<IpNet>) -> Option<Vec<IpNet>> {
        let free = |range: &IpNet| {
            let prefix = match range {
                IpNet::V4(_) => self.node_prefix_v4,
                IpNet::V6(_) => self.node_prefix_v6,
            };
            let overlaps = |part: &IpNet| {
                used.iter().any(|other| other.contains(part) || part.contains(other))
            };
            range.subnets(prefix.max(range.prefix_len())).ok()?.find(|part| !overlaps(part))
        };
        self.cluster.iter().map(free).collect()
    }
}

fn ranges_of(node: &Node) -> Vec<IpNet> {
    let Some(spec) = &node.spec else { return Vec::new() };
    let all = spec.pod_cidrs.iter().flatten().chain(&spec.pod_cidr);
    all.filter_map(|range| range.parse().ok()).collect()
}

/// Gives each node its range until `shutdown`.
pub(crate) async fn run(
    client: Client,
    informers: Arc<Informers>,
    events: EventRecorder,
    ranges: PodRanges,
    shutdown: CancellationToken,
) {
    if ranges.cluster.is_empty() || !informers.nodes.synced(&shutdown).await {
        return;
    }
    let queue = WorkQueue::new();
    let add = queue.clone();
    informers.nodes.on_change(move |change| {
        if change.after.as_ref().is_some_and(|node| ranges_of(node).is_empty()) {
            add.add(change.key());
        }
    });
    // What was given but is not seen yet.
    let given: Mutex<HashMap<ObjectKey, Vec<IpNet>>> = Mutex::default();
    let work = |key: ObjectKey| {
        let (client, informers, events) = (&client, &informers, &events);
        let (given, ranges) = (&given, &ranges);
        async move { reconcile(client, informers, events, given, ranges, &key).await }
    };
    // One worker: two nodes never get the same range.
    queue.run("node-ipam", 1, shutdown, work).await;
}

async fn reconcile(
    client: &Client,
    informers: &Informers,
    events: &EventRecorder,
    given: &Mutex<HashMap<ObjectKey, Vec<IpNet>>>,
    ranges: &PodRanges,
    key: &ObjectKey,
) -> Result<Option<Duration>, ControllerError> {
    let Some(node) = informers.nodes.get(key).filter(|node| ranges_of(node).is_empty()) else {
        return Ok(None);
    };
    let parts = {
        let mut given = given.lock().unwrap_or_else(PoisonError::into_inner);
        given.retain(|other, _| {
            informers.nodes.get(other).is_some_and(|node| ranges_of(&node).is_empty())
        });
        let mut used: HashSet<IpNet> =
            informers.nodes.list().iter().flat_map(|node| ranges_of(node)).collect();
        let others = given.iter().filter(|(other, _)| *other != key);
        used.extend(others.flat_map(|(_, parts)| parts.clone()));
        let parts = given.get(key).cloned().or_else(|| ranges.next(&used));
        if let Some(parts) = &parts {
            given.insert(key.clone(), parts.clone());
        }
        parts
    };
    let Some(parts) = parts else {
        events.event(
            &object_reference(&*node),
            EventType::Normal,
            "CIDRNotAvailable",
            format!("Node {key} status is now: CIDRNotAvailable"),
        );
        return Err(ControllerError::Object(
            "the cluster's pod address range is used up: a larger one is needed".to_owned(),
        ));
    };
    let mut after = (*node).clone();
    let spec = after.spec.get_or_insert_default();
    spec.pod_cidr = parts.first().map(IpNet::to_string);
    spec.pod_cidrs = Some(parts.iter().map(IpNet::to_string).collect());
    let nodes: Api<Node> = Api::all(client.clone());
    change::write(&nodes, &*node, &after, Part::Main).await?;
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_free_part_is_given() {
        let ranges = PodRanges {
            cluster: vec!["10.244.0.0/22".parse().unwrap()],
            node_prefix_v4: 24,
            node_prefix_v6: 64,
        };
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        let mut used = HashSet::new();
        assert_eq!(ranges.next(&used), Some(vec![net("10.244.0.0/24")]));
        // A larger range that somebody chose by hand counts as well.
        used.insert(net("10.244.0.0/23"));
        assert_eq!(ranges.next(&used), Some(vec![net("10.244.2.0/24")]));
        used.insert(net("10.244.2.0/24"));
        used.insert(net("10.244.3.0/24"));
        assert_eq!(ranges.next(&used), None);
    }
}
