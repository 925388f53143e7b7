//! Whose questions are answered: those of pods, of nodes and of this machine.
//!
//! The server listens on the node's address, which others may reach too, and it forwards what it
//! does not know. To answer everybody would make it an open resolver, good for amplifying attacks.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;

/// How often refused questions are spoken of.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Whose questions are answered.
#[derive(Debug)]
pub(super) struct Clients {
    /// The cluster's pods, and this server's own addresses.
    ranges: Vec<IpNet>,
    /// Addresses and pod ranges of nodes, by the node's name.
    nodes: RwLock<HashMap<String, Vec<IpNet>>>,
    refused: Mutex<Refused>,
}

/// What is to be said of refused questions.
#[derive(Debug, Default)]
struct Refused {
    untold: u64,
    told: Option<Instant>,
}

impl Clients {
    pub(super) fn new(ranges: Vec<IpNet>) -> Self {
        Self { ranges, nodes: RwLock::default(), refused: Mutex::default() }
    }

    /// Takes note of a node, or that it is gone.
    pub(super) fn set_node(&self, name: &str, node: Option<&Node>) {
        let mut nodes = self.nodes.write().unwrap_or_else(PoisonError::into_inner);
        match node {
            Some(node) => nodes.insert(name.to_owned(), networks_of(node)),
            None => nodes.remove(name),
        };
    }

    /// Whether a client's questions are answered.
    pub(super) fn are_answered(&self, client: IpAddr) -> bool {
        let client = client.to_canonical();
        let among = |networks: &[IpNet]| networks.iter().any(|network| network.contains(&client));
        client.is_loopback()
            || among(&self.ranges)
            || self
                .nodes
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .values()
                .any(|networks| among(networks))
    }

    /// Counts a refused question. Now and then there is something to say: how many there were.
    pub(super) fn refuse(&self, now: Instant) -> Option<u64> {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.untold += 1;
        if refused.told.is_some_and(|told| now.duration_since(told) < LOG_INTERVAL) {
            return None;
        }
        refused.told = Some(now);
        Some(std::mem::take(&mut refused.untold))
    }
}

/// The addresses of a node and its pods'.
fn networks_of(node: &Node) -> Vec<IpNet> {
    let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    let addresses =
        addresses.filter_map(|address| address.address.parse::<IpAddr>().ok().map(IpNet::from));
    let pods = node.spec.iter().flat_map(|spec| {
        let first = spec.pod_cidr.iter();
        first.chain(spec.pod_cidrs.iter().flatten()).filter_map(|range| range.parse().ok())
    });
    addresses.chain(pods).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn pods_nodes_and_this_machine_are_answered_and_nobody_else() {
        let own = "192.0.2.1/32".parse().unwrap();
        let clients = Clients::new(vec!["10.244.0.0/16".parse().unwrap(), own]);
        let answered = |client: &str| clients.are_answered(client.parse().unwrap());
        for client in
            ["127.0.0.1", "127.8.8.8", "::1", "10.244.3.4", "::ffff:10.244.3.4", "192.0.2.1"]
        {
            assert!(answered(client), "{client}");
        }
        for client in ["192.0.2.2", "10.245.0.1", "203.0.113.5", "fe80::1"] {
            assert!(!answered(client), "{client}");
        }
        let node = serde_json::from_value(json!({
            "spec": {"podCIDR": "172.20.0.0/24"},
            "status": {"addresses": [
                {"type": "InternalIP", "address": "192.0.2.2"}, {"type": "Hostname", "address": "n2"}]}}));
        clients.set_node("n2", Some(&node.unwrap()));
        assert!(answered("192.0.2.2") && answered("172.20.0.9") && !answered("192.0.2.3"));
        clients.set_node("n2", None);
        assert!(!answered("192.0.2.2"));
    }

    #[test]
    fn refused_questions_are_spoken_of_now_and_then() {
        let clients = Clients::new(Vec::new());
        let now = Instant::now();
        assert_eq!(clients.refuse(now), Some(1));
        for _ in 0..3 {
            assert_eq!(clients.refuse(now + LOG_INTERVAL / 2), None);
        }
        assert_eq!(clients.refuse(now + LOG_INTERVAL), Some(4));
    }
}
