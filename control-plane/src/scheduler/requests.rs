//! How much of a node a pod asks for.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{Container, Node, Pod},
    apimachinery::pkg::api::resource::Quantity as ApiQuantity,
};
use keelson_api::quantity::Quantity;

/// What a container without a CPU request counts as when nodes are compared, in thousandths of a
/// core (the documented default of the resource scorers).
const UNREQUESTED_CPU: i64 = 100;
/// The same for memory, in bytes.
const UNREQUESTED_MEMORY: i64 = 200 * 1024 * 1024;

/// Amounts of what a node has: CPU in thousandths of a core, memory and storage in bytes, others
/// in their own units.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Resources {
    amounts: BTreeMap<String, i64>,
}

impl Resources {
    /// Reads a resource list; amounts that can't be read count as none.
    pub(crate) fn of(list: Option<&BTreeMap<String, ApiQuantity>>) -> Self {
        let amounts = list
            .into_iter()
            .flatten()
            .filter_map(|(name, amount)| {
                let amount = Quantity::try_from(amount).ok()?;
                let units = if name == "cpu" { amount.milli() } else { amount.value() };
                Some((name.clone(), units))
            })
            .collect();
        Self { amounts }
    }

    /// What a node has for pods.
    pub(crate) fn allocatable(node: &Node) -> Self {
        let status = node.status.as_ref();
        Self::of(status.and_then(|s| s.allocatable.as_ref().or(s.capacity.as_ref())))
    }

    pub(crate) fn get(&self, name: &str) -> i64 {
        self.amounts.get(name).copied().unwrap_or(0)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, i64)> {
        self.amounts.iter().map(|(name, amount)| (name.as_str(), *amount))
    }

    pub(crate) fn set(&mut self, name: &str, amount: i64) {
        self.amounts.insert(name.to_owned(), amount);
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (name, amount) in &other.amounts {
            let sum = self.amounts.entry(name.clone()).or_default();
            *sum = sum.saturating_add(*amount);
        }
    }

    pub(crate) fn subtract(&mut self, other: &Self) {
        for (name, amount) in &other.amounts {
            let rest = self.amounts.entry(name.clone()).or_default();
            *rest = rest.saturating_sub(*amount);
        }
    }

    fn raise_to(&mut self, other: &Self) {
        for (name, amount) in &other.amounts {
            let known = self.amounts.entry(name.clone()).or_default();
            *known = (*known).max(*amount);
        }
    }
}

/// What a pod asks for: its containers and sidecars together, or the largest step of its start,
/// whichever is more, and its overhead (KEP-753 has the rule for sidecars). Requests on the pod
/// itself take the place of the containers' (KEP-2837). The result holds one `pods`.
pub(crate) fn pod_requests(pod: &Pod) -> Resources {
    let mut requests = requests_with(pod, requests_of);
    requests.set("pods", 1);
    requests
}

/// The same CPU and memory for comparing nodes, where a container without requests counts too.
pub(crate) fn compared_requests(pod: &Pod) -> Resources {
    requests_with(pod, |container| {
        let mut requests = requests_of(container);
        for (name, least) in [("cpu", UNREQUESTED_CPU), ("memory", UNREQUESTED_MEMORY)] {
            if !requests.amounts.contains_key(name) {
                requests.set(name, least);
            }
        }
        requests
    })
}

fn requests_of(container: &Container) -> Resources {
    Resources::of(container.resources.as_ref().and_then(|r| r.requests.as_ref()))
}

fn requests_with(pod: &Pod, requests_of: impl Fn(&Container) -> Resources) -> Resources {
    let Some(spec) = &pod.spec else { return Resources::default() };
    let mut running = Resources::default();
    for container in &spec.containers {
        running.add(&requests_of(container));
    }
    let mut sidecars = Resources::default();
    let mut largest_step = Resources::default();
    for container in spec.init_containers.iter().flatten() {
        let requests = requests_of(container);
        if container.restart_policy.as_deref() == Some("Always") {
            sidecars.add(&requests);
            largest_step.raise_to(&sidecars);
        } else {
            let mut step = sidecars.clone();
            step.add(&requests);
            largest_step.raise_to(&step);
        }
    }
    running.add(&sidecars);
    running.raise_to(&largest_step);
    for (name, amount) in
        Resources::of(spec.resources.as_ref().and_then(|r| r.requests.as_ref())).amounts
    {
        running.amounts.insert(name, amount);
    }
    running.add(&Resources::of(spec.overhead.as_ref()));
    running
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn cpu(spec: Value) -> i64 {
        let pod: Pod = serde_json::from_value(json!({"metadata": {}, "spec": spec})).unwrap();
        pod_requests(&pod).get("cpu")
    }

    fn container(cpu: &str) -> Value {
        json!({"name": "c", "resources": {"requests": {"cpu": cpu}}})
    }

    fn sidecar(cpu: &str) -> Value {
        let mut sidecar = container(cpu);
        sidecar["restartPolicy"] = json!("Always");
        sidecar
    }

    #[test]
    fn a_pod_asks_for_the_most_it_ever_needs() {
        let table = [
            (json!({"containers": [container("100m"), container("1")]}), 1100),
            (
                json!({"containers": [container("1")],
                       "initContainers": [container("3"), container("2")]}),
                3000,
            ),
            // A sidecar runs beside what comes after it, and beside the main containers.
            (
                json!({"containers": [container("1")],
                       "initContainers": [container("3"), sidecar("500m"), container("3")]}),
                3500,
            ),
            (json!({"containers": [container("1")], "initContainers": [sidecar("500m")]}), 1500),
            (json!({"containers": [container("1")], "overhead": {"cpu": "250m"}}), 1250),
            (
                json!({"containers": [container("1")], "resources": {"requests": {"cpu": "4"}}}),
                4000,
            ),
            (json!({"containers": [{"name": "c"}]}), 0),
        ];
        for (spec, expected) in table {
            assert_eq!(cpu(spec.clone()), expected, "{spec}");
        }
    }
}
