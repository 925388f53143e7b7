//! Routes to the pods of other nodes, for nodes on one network without a CNI plugin: each node's pod
//! range by that node's address.
//!
//! They are kept by the service proxy's process, since its user may look at all nodes; a kubelet's may
//! look at its own only.

use std::{
    collections::{BTreeMap, HashMap},
    net::Ipv4Addr,
    time::Duration,
};

use futures::TryStreamExt;
use ipnet::Ipv4Net;
use k8s_openapi::api::core::v1::Node;
use keelson_runtime_shim::network::{NodeRoutes, set_node_routes};
use kube::{
    Api, Client, ResourceExt,
    runtime::{WatchStreamExt, watcher},
};
use tokio_util::sync::CancellationToken;

/// How often routes are looked at without a change: others may remove them.
const RESYNC: Duration = Duration::from_secs(60);

/// Another node's address and the addresses of its pods.
type Peer = (Option<Ipv4Addr>, Vec<Ipv4Net>);

/// Keeps the routes until `shutdown`; they stay then, as pods do.
pub(crate) async fn run(client: Client, node_name: String, shutdown: CancellationToken) {
    let mut events =
        Box::pin(watcher(Api::<Node>::all(client), watcher::Config::default()).default_backoff());
    let mut ticks = tokio::time::interval(RESYNC);
    let mut nodes = HashMap::<String, Peer>::new();
    // While a list is read, what it does not have is not gone yet.
    let (mut listed, mut complete) = (HashMap::new(), false);
    let mut told = Vec::new();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = ticks.tick() => {}
            event = events.try_next() => match event {
                Ok(Some(watcher::Event::Init)) => listed.clear(),
                Ok(Some(watcher::Event::InitApply(node))) => {
                    listed.insert(node.name_any(), peer(&node));
                }
                Ok(Some(watcher::Event::InitDone)) => {
                    nodes = std::mem::take(&mut listed);
                    complete = true;
                }
                Ok(Some(watcher::Event::Apply(node))) => {
                    let changed = nodes.insert(node.name_any(), peer(&node));
                    // Nodes report every few seconds.
                    if changed == Some(peer(&node)) {
                        continue;
                    }
                }
                Ok(Some(watcher::Event::Delete(node))) => {
                    nodes.remove(&node.name_any());
                }
                Ok(None) => return,
                Err(error) => {
                    tracing::debug!(%error, "the nodes can't be watched; trying again");
                    continue;
                }
            },
        }
        if !complete {
            continue;
        }
        let problems = match set_node_routes(&wanted(&nodes, &node_name)).await {
            Ok(problems) => problems,
            Err(error) => vec![error.to_string()],
        };
        if problems != told {
            for problem in &problems {
                tracing::warn!("pods of another node can't be reached: {problem}");
            }
            told = problems;
        }
    }
}

fn peer(node: &Node) -> Peer {
    let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    let mut internal = addresses.filter(|address| address.type_ == "InternalIP");
    let spec = node.spec.iter();
    let ranges = spec.flat_map(|spec| spec.pod_cidr.iter().chain(spec.pod_cidrs.iter().flatten()));
    let mut ranges: Vec<Ipv4Net> = ranges.filter_map(|range| range.parse().ok()).collect();
    ranges.dedup();
    (internal.find_map(|address| address.address.parse().ok()), ranges)
}

/// The routes that this node needs. A range that two nodes claim goes to the first by name.
fn wanted(nodes: &HashMap<String, Peer>, own: &str) -> NodeRoutes {
    let sorted: BTreeMap<_, _> = nodes.iter().filter(|(name, _)| *name != own).collect();
    let own_ranges = nodes.get(own).map_or(&[][..], |(_, ranges)| ranges);
    let mut routes = NodeRoutes::new();
    for (address, ranges) in sorted.into_values() {
        let Some(address) = address else { continue };
        for range in ranges.iter().filter(|range| !own_ranges.contains(range)) {
            routes.entry(range.trunc()).or_insert(*address);
        }
    }
    routes
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn each_other_node_gets_a_route() {
        let node = |address: &str, range: &str| {
            let node = serde_json::from_value(json!({
                "spec": {"podCIDR": range, "podCIDRs": [range]},
                "status": {"addresses": [{"type": "Hostname", "address": "x"},
                                         {"type": "InternalIP", "address": address}]}}));
            peer(&node.unwrap())
        };
        let nodes = HashMap::from([
            ("own".to_owned(), node("192.0.2.1", "10.244.0.0/24")),
            ("b".to_owned(), node("192.0.2.2", "10.244.1.0/24")),
            ("six".to_owned(), node("2001:db8::2", "10.244.2.0/24")),
            ("wrong".to_owned(), node("192.0.2.4", "10.244.0.0/24")),
            ("no-range-yet".to_owned(), peer(&Node::default())),
        ]);
        let expected =
            NodeRoutes::from([("10.244.1.0/24".parse().unwrap(), [192, 0, 2, 2].into())]);
        assert_eq!(wanted(&nodes, "own"), expected);
    }
}
