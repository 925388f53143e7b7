//! The nodes with what is on them, as the scheduler reckons: pods that are bound, and pods that it
//! has just given to a node although the API server has not said so yet.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use k8s_openapi::api::core::v1::{Node, Pod};
use keelson_api::object::ObjectKey;

use super::{
    affinity::{self, Term},
    requests::{self, Resources},
};

/// A port that a pod takes on its node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct HostPort {
    pub(crate) protocol: String,
    pub(crate) port: i32,
    /// Empty for all addresses.
    pub(crate) ip: String,
}

impl HostPort {
    fn overlaps(&self, other: &Self) -> bool {
        self.protocol == other.protocol
            && self.port == other.port
            && (self.ip.is_empty() || other.ip.is_empty() || self.ip == other.ip)
    }
}

/// A pod, with what the scheduler needs of it worked out once.
#[derive(Clone, Debug)]
pub(crate) struct PodFacts {
    pub(crate) pod: Arc<Pod>,
    pub(crate) key: ObjectKey,
    pub(crate) requests: Resources,
    pub(crate) compared: Resources,
    pub(crate) host_ports: BTreeSet<HostPort>,
    pub(crate) must_avoid: Vec<Term>,
}

impl PodFacts {
    pub(crate) fn of(pod: Arc<Pod>) -> Self {
        Self {
            key: ObjectKey::of(&pod.metadata),
            requests: requests::pod_requests(&pod),
            compared: requests::compared_requests(&pod),
            host_ports: host_ports(&pod),
            must_avoid: affinity::must_avoid(&pod),
            pod,
        }
    }

    pub(crate) fn labels(&self) -> &BTreeMap<String, String> {
        static NONE: BTreeMap<String, String> = BTreeMap::new();
        self.pod.metadata.labels.as_ref().unwrap_or(&NONE)
    }

    pub(crate) fn is_terminating(&self) -> bool {
        self.pod.metadata.deletion_timestamp.is_some()
    }
}

fn host_ports(pod: &Pod) -> BTreeSet<HostPort> {
    let Some(spec) = &pod.spec else { return BTreeSet::new() };
    let sidecars = spec
        .init_containers
        .iter()
        .flatten()
        .filter(|c| c.restart_policy.as_deref() == Some("Always"));
    spec.containers
        .iter()
        .chain(sidecars)
        .flat_map(|container| container.ports.iter().flatten())
        .filter_map(|port| {
            let number = port.host_port.filter(|number| *number > 0)?;
            let ip = port.host_ip.clone().unwrap_or_default();
            let all = matches!(ip.as_str(), "0.0.0.0" | "::");
            Some(HostPort {
                protocol: port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()),
                port: number,
                ip: if all { String::new() } else { ip },
            })
        })
        .collect()
}

/// A node and what is on it.
#[derive(Clone, Debug, Default)]
pub(crate) struct NodeFacts {
    /// `None` for a node that pods are bound to but that is not known.
    pub(crate) node: Option<Arc<Node>>,
    pub(crate) allocatable: Resources,
    pub(crate) requested: Resources,
    pub(crate) compared: Resources,
    pub(crate) pods: HashMap<ObjectKey, PodFacts>,
}

impl NodeFacts {
    pub(crate) fn labels(&self) -> &BTreeMap<String, String> {
        static NONE: BTreeMap<String, String> = BTreeMap::new();
        self.node.as_ref().and_then(|n| n.metadata.labels.as_ref()).unwrap_or(&NONE)
    }

    pub(crate) fn has_port_of(&self, wanted: &BTreeSet<HostPort>) -> bool {
        !wanted.is_empty()
            && self
                .pods
                .values()
                .flat_map(|pod| &pod.host_ports)
                .any(|taken| wanted.iter().any(|port| port.overlaps(taken)))
    }

    fn add(&mut self, facts: PodFacts) {
        self.remove(&facts.key);
        self.requested.add(&facts.requests);
        self.compared.add(&facts.compared);
        self.pods.insert(facts.key.clone(), facts);
    }

    fn remove(&mut self, key: &ObjectKey) -> bool {
        let Some(facts) = self.pods.remove(key) else { return false };
        self.requested.subtract(&facts.requests);
        self.compared.subtract(&facts.compared);
        true
    }
}

/// All nodes, and where each placed pod is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cluster {
    nodes: BTreeMap<String, NodeFacts>,
    placed: HashMap<ObjectKey, String>,
    namespace_labels: HashMap<String, BTreeMap<String, String>>,
}

impl Cluster {
    /// The known nodes.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = (&Arc<Node>, &NodeFacts)> {
        self.nodes.values().filter_map(|facts| facts.node.as_ref().map(|node| (node, facts)))
    }

    pub(crate) fn placed_pods(&self) -> usize {
        self.placed.len()
    }

    pub(crate) fn namespace_labels(&self, namespace: &str) -> &BTreeMap<String, String> {
        static NONE: BTreeMap<String, String> = BTreeMap::new();
        self.namespace_labels.get(namespace).unwrap_or(&NONE)
    }

    pub(crate) fn set_namespace(&mut self, name: &str, labels: Option<BTreeMap<String, String>>) {
        match labels {
            Some(labels) => self.namespace_labels.insert(name.to_owned(), labels),
            None => self.namespace_labels.remove(name),
        };
    }

    /// Takes in a node as it is now.
    pub(crate) fn set_node(&mut self, name: &str, node: Arc<Node>) {
        let facts = self.nodes.entry(name.to_owned()).or_default();
        facts.allocatable = Resources::allocatable(&node);
        facts.node = Some(node);
    }

    /// Forgets a node; pods that are bound to it stay known.
    pub(crate) fn remove_node(&mut self, name: &str) {
        if let Some(facts) = self.nodes.get_mut(name) {
            facts.node = None;
            if facts.pods.is_empty() {
                self.nodes.remove(name);
            }
        }
    }

    /// Reckons a pod to be on a node, in place of what was known of it.
    pub(crate) fn place(&mut self, facts: PodFacts, node: &str) {
        self.remove_pod(&facts.key);
        self.placed.insert(facts.key.clone(), node.to_owned());
        self.nodes.entry(node.to_owned()).or_default().add(facts);
    }

    /// Forgets a placed pod; says whether it was known.
    pub(crate) fn remove_pod(&mut self, key: &ObjectKey) -> bool {
        let Some(node) = self.placed.remove(key) else { return false };
        let Some(facts) = self.nodes.get_mut(&node) else { return false };
        let removed = facts.remove(key);
        if facts.pods.is_empty() && facts.node.is_none() {
            self.nodes.remove(&node);
        }
        removed
    }
}
