//! The Node object, from what the machine has. Pure.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{
        ContainerImage, DaemonEndpoint, Node, NodeAddress, NodeCondition, NodeDaemonEndpoints,
        NodeSpec, NodeStatus, NodeSwapStatus, NodeSystemInfo,
    },
    apimachinery::pkg::{
        api::resource::Quantity as ApiQuantity,
        apis::meta::v1::{ObjectMeta, Time},
    },
};
use keelson_api::{KUBERNETES_VERSION, quantity::Quantity};
use keelson_runtime_shim::runtime::{Image, RuntimeStatus, RuntimeVersion};

use super::machine::{Free, Machine};
use crate::config::AgentConfig;

/// Bytes of memory below which the node is under memory pressure; the kubelet's hard eviction
/// threshold.
const LEAST_MEMORY: u64 = 100 * 1024 * 1024;
/// The part of the disk, in percent, that must be free.
const LEAST_DISK_PERCENT: u64 = 10;
/// The part of the files, in percent, that must be free.
const LEAST_INODES_PERCENT: u64 = 5;
/// Processes that must still be possible to start.
const LEAST_PIDS: u64 = 100;

/// The labels that every node gives itself.
pub(crate) fn labels(config: &AgentConfig) -> BTreeMap<String, String> {
    let mut labels = config.node.labels.clone();
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    for (key, value) in [
        ("kubernetes.io/hostname", config.hostname.as_str()),
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", architecture),
        ("beta.kubernetes.io/os", "linux"),
        ("beta.kubernetes.io/arch", architecture),
    ] {
        labels.entry(key.to_owned()).or_insert_with(|| value.to_owned());
    }
    labels
}

/// What the machine has.
pub(crate) fn capacity(machine: &Machine, config: &AgentConfig) -> BTreeMap<String, Quantity> {
    let bytes = |bytes: u64| Quantity::from_bytes(i64::try_from(bytes).unwrap_or(i64::MAX));
    let mut capacity = BTreeMap::from([
        ("cpu".to_owned(), Quantity::from_units(machine.cpus.into())),
        ("memory".to_owned(), bytes(machine.memory_bytes)),
        ("ephemeral-storage".to_owned(), bytes(machine.disk_bytes)),
        ("pods".to_owned(), Quantity::from_units(config.max_pods.into())),
    ]);
    for (size, number) in &machine.huge_pages {
        capacity.insert(format!("hugepages-{}", bytes(*size)), bytes(size * number));
    }
    capacity
}

/// What pods may have of it: less what is reserved, less the memory below which pods are evicted,
/// less huge pages.
pub(crate) fn allocatable(
    capacity: &BTreeMap<String, Quantity>,
    reserved: &BTreeMap<String, String>,
) -> Result<BTreeMap<String, Quantity>, String> {
    let mut allocatable = capacity.clone();
    let mut take = |name: &str, amount: Quantity| {
        if let Some(left) = allocatable.get_mut(name) {
            *left = if *left < amount { Quantity::ZERO } else { *left - amount };
        }
    };
    for (name, amount) in reserved {
        let amount =
            Quantity::parse(amount).map_err(|error| format!("reserved {name}: {error}"))?;
        take(name, amount);
    }
    take("memory", Quantity::from_bytes(i64::try_from(LEAST_MEMORY).unwrap_or(0)));
    for (name, amount) in capacity {
        if name.starts_with("hugepages-") {
            take("memory", *amount);
        }
        if name == "ephemeral-storage" {
            take(name, Quantity::from_bytes(amount.value() / 100 * 10));
        }
    }
    Ok(allocatable)
}

fn api_list(list: &BTreeMap<String, Quantity>) -> BTreeMap<String, ApiQuantity> {
    list.iter().map(|(name, amount)| (name.clone(), ApiQuantity(amount.to_string()))).collect()
}

/// What the status is made from.
pub(crate) struct Observed<'a> {
    /// The agent's configuration.
    pub(crate) config: &'a AgentConfig,
    /// The machine.
    pub(crate) machine: &'a Machine,
    /// What is free.
    pub(crate) free: Free,
    /// The runtime's name and version.
    pub(crate) version: &'a RuntimeVersion,
    /// Whether the runtime can run pods.
    pub(crate) runtime: &'a RuntimeStatus,
    /// The store's images.
    pub(crate) images: &'a [Image],
    /// What there is.
    pub(crate) capacity: &'a BTreeMap<String, Quantity>,
    /// What pods may have.
    pub(crate) allocatable: &'a BTreeMap<String, Quantity>,
    /// Now.
    pub(crate) now: Timestamp,
}

/// The Node as it is registered.
pub(crate) fn node(observed: &Observed<'_>) -> Node {
    let config = observed.config;
    Node {
        metadata: ObjectMeta {
            name: Some(config.node_name.clone()),
            labels: Some(labels(config)),
            ..Default::default()
        },
        spec: Some(NodeSpec {
            taints: Some(config.node.taints.clone()).filter(|taints| !taints.is_empty()),
            provider_id: config.node.provider_id.clone(),
            ..Default::default()
        }),
        status: Some(status(observed, &NodeStatus::default())),
    }
}

/// The Node's status; what others wrote into `old` stays.
pub(crate) fn status(observed: &Observed<'_>, old: &NodeStatus) -> NodeStatus {
    let Observed { config, machine, version, .. } = observed;
    NodeStatus {
        addresses: Some(addresses(config)),
        capacity: Some(with_foreign(api_list(observed.capacity), old.capacity.as_ref())),
        allocatable: Some(with_foreign(api_list(observed.allocatable), old.allocatable.as_ref())),
        conditions: Some(conditions(observed, old.conditions.as_deref().unwrap_or_default())),
        daemon_endpoints: Some(NodeDaemonEndpoints {
            kubelet_endpoint: Some(DaemonEndpoint { port: config.node.port.into() }),
        }),
        images: Some(images(observed.images, config.node.max_images)),
        node_info: Some(NodeSystemInfo {
            machine_id: machine.machine_id.clone(),
            system_uuid: machine.system_uuid.clone(),
            boot_id: machine.boot_id.clone(),
            kernel_version: machine.kernel_version.clone(),
            os_image: machine.os_image.clone(),
            container_runtime_version: format!("{}://{}", version.name, version.version),
            kubelet_version: KUBERNETES_VERSION.to_owned(),
            // deprecated upstream and empty since 1.33
            kube_proxy_version: String::new(),
            operating_system: "linux".to_owned(),
            architecture: machine.architecture.clone(),
            swap: Some(NodeSwapStatus { capacity: i64::try_from(machine.swap_bytes).ok() }),
        }),
        ..old.clone()
    }
}

/// Extended resources that others reported stay in the list.
fn with_foreign(
    mut own: BTreeMap<String, ApiQuantity>,
    old: Option<&BTreeMap<String, ApiQuantity>>,
) -> BTreeMap<String, ApiQuantity> {
    for (name, amount) in old.into_iter().flatten() {
        if name.contains('/') {
            own.entry(name.clone()).or_insert_with(|| amount.clone());
        }
    }
    own
}

fn addresses(config: &AgentConfig) -> Vec<NodeAddress> {
    let internal = config
        .node_ips
        .iter()
        .map(|ip| NodeAddress { type_: "InternalIP".to_owned(), address: ip.to_string() });
    let hostname = NodeAddress { type_: "Hostname".to_owned(), address: config.hostname.clone() };
    internal.chain([hostname]).collect()
}

/// The largest images first, each with at most five names, as the kubelet lists them.
fn images(images: &[Image], most: i32) -> Vec<ContainerImage> {
    let mut images: Vec<&Image> = images.iter().collect();
    images.sort_by_key(|image| std::cmp::Reverse(image.size));
    if let Ok(most) = usize::try_from(most) {
        images.truncate(most);
    }
    images
        .into_iter()
        .map(|image| ContainerImage {
            names: Some(
                image.repo_digests.iter().chain(&image.repo_tags).take(5).cloned().collect(),
            ),
            size_bytes: i64::try_from(image.size).ok(),
        })
        .collect()
}

fn conditions(observed: &Observed<'_>, old: &[NodeCondition]) -> Vec<NodeCondition> {
    let free = observed.free;
    let percent = |part: u64, whole: u64| {
        // a file system that does not count its files has no last one
        part.saturating_mul(100).checked_div(whole).unwrap_or(100)
    };
    let disk = percent(free.disk_bytes, free.disk_total) < LEAST_DISK_PERCENT
        || percent(free.inodes, free.inodes_total) < LEAST_INODES_PERCENT;
    let pressure = |under: bool, kind: &str, yes: (&str, &str), no: (&str, &str)| {
        let (reason, message) = if under { yes } else { no };
        (kind.to_owned(), under, reason.to_owned(), message.to_owned())
    };
    let problems: Vec<String> = [
        ("container runtime", &observed.runtime.runtime),
        ("container runtime network", &observed.runtime.network),
    ]
    .into_iter()
    .filter_map(|(what, state)| Some(format!("{what} not ready: {}", state.as_ref().err()?)))
    .collect();
    let own = [
        pressure(
            free.memory_bytes < LEAST_MEMORY,
            "MemoryPressure",
            ("KubeletHasInsufficientMemory", "kubelet has insufficient memory available"),
            ("KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
        ),
        pressure(
            disk,
            "DiskPressure",
            ("KubeletHasDiskPressure", "kubelet has disk pressure"),
            ("KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
        ),
        pressure(
            free.pids < LEAST_PIDS,
            "PIDPressure",
            ("KubeletHasInsufficientPID", "kubelet has insufficient PID available"),
            ("KubeletHasSufficientPID", "kubelet has sufficient PID available"),
        ),
        if problems.is_empty() {
            pressure(true, "Ready", ("KubeletReady", "kubelet is posting ready status"), ("", ""))
        } else {
            let message = problems.join(", ");
            pressure(false, "Ready", ("", ""), ("KubeletNotReady", &message))
        },
    ];
    let mut all: Vec<NodeCondition> = old
        .iter()
        .filter(|condition| !own.iter().any(|(kind, ..)| *kind == condition.type_))
        .cloned()
        .collect();
    all.extend(own.into_iter().map(|(kind, yes, reason, message)| {
        let status = if yes { "True" } else { "False" };
        let before = old.iter().find(|before| before.type_ == kind && before.status == status);
        NodeCondition {
            status: status.to_owned(),
            reason: Some(reason),
            message: Some(message),
            last_heartbeat_time: Some(Time(observed.now)),
            last_transition_time: before
                .and_then(|before| before.last_transition_time.clone())
                .or(Some(Time(observed.now))),
            type_: kind,
        }
    }));
    all
}

/// Whether two statuses differ in more than their heartbeats.
pub(crate) fn differ(a: &NodeStatus, b: &NodeStatus) -> bool {
    let plain = |status: &NodeStatus| {
        let mut status = status.clone();
        for condition in status.conditions.iter_mut().flatten() {
            condition.last_heartbeat_time = None;
            // times are written with whole seconds
            condition.last_transition_time = None;
        }
        status
    };
    plain(a) != plain(b)
}

/// The events that go with a change of conditions: reason and whether it is trouble.
pub(crate) fn condition_events(
    old: &[NodeCondition],
    new: &[NodeCondition],
) -> Vec<(&'static str, bool)> {
    let mut events = Vec::new();
    for condition in new {
        let before = old.iter().find(|before| before.type_ == condition.type_);
        if before.is_some_and(|before| before.status == condition.status) {
            continue;
        }
        let yes = condition.status == "True";
        events.extend(match (condition.type_.as_str(), yes) {
            ("MemoryPressure", true) => Some(("NodeHasInsufficientMemory", true)),
            ("MemoryPressure", false) => Some(("NodeHasSufficientMemory", false)),
            ("DiskPressure", true) => Some(("NodeHasDiskPressure", true)),
            ("DiskPressure", false) => Some(("NodeHasNoDiskPressure", false)),
            ("PIDPressure", true) => Some(("NodeHasInsufficientPID", true)),
            ("PIDPressure", false) => Some(("NodeHasSufficientPID", false)),
            ("Ready", true) => Some(("NodeReady", false)),
            ("Ready", false) => Some(("NodeNotReady", true)),
            _ => None,
        });
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn machine() -> Machine {
        Machine {
            cpus: 4,
            memory_bytes: 8 * GIB,
            disk_bytes: 100 * GIB,
            huge_pages: vec![(2 << 20, 512)],
            ..Default::default()
        }
    }

    fn free() -> Free {
        Free {
            memory_bytes: GIB,
            disk_bytes: 50,
            disk_total: 100,
            inodes: 50,
            inodes_total: 100,
            pids: 1000,
        }
    }

    fn made(free: Free, runtime: Result<(), String>, old: &NodeStatus) -> NodeStatus {
        let config = AgentConfig::new("n", vec!["192.0.2.1".parse().unwrap()]);
        let machine = machine();
        let capacity = capacity(&machine, &config);
        let reserved = BTreeMap::from([("cpu".to_owned(), "500m".to_owned())]);
        let allocatable = allocatable(&capacity, &reserved).unwrap();
        let version = RuntimeVersion { name: "r".to_owned(), version: "1".to_owned() };
        let observed = Observed {
            config: &config,
            machine: &machine,
            free,
            version: &version,
            runtime: &RuntimeStatus { runtime, network: Ok(()) },
            images: &[],
            capacity: &capacity,
            allocatable: &allocatable,
            now: Timestamp::UNIX_EPOCH,
        };
        status(&observed, old)
    }

    #[test]
    fn allocatable_is_what_is_left() {
        let status = made(free(), Ok(()), &NodeStatus::default());
        let (capacity, allocatable) = (status.capacity.unwrap(), status.allocatable.unwrap());
        assert_eq!(capacity["hugepages-2Mi"].0, "1Gi");
        assert_eq!(allocatable["cpu"].0, "3500m");
        assert_eq!(allocatable["memory"].0, "7068Mi");
        assert_eq!(allocatable["pods"].0, "110");
    }

    #[test]
    fn conditions_say_what_is_short() {
        let of = |status: &NodeStatus| {
            let conditions = status.conditions.clone().unwrap();
            conditions
                .into_iter()
                .filter(|condition| condition.status == "True")
                .map(|condition| condition.type_)
                .collect::<Vec<_>>()
        };
        let good = made(free(), Ok(()), &NodeStatus::default());
        assert_eq!(of(&good), ["Ready"]);
        let low = Free { memory_bytes: 1, disk_bytes: 9, pids: 1, ..free() };
        let short = made(low, Err("down".to_owned()), &good);
        assert_eq!(of(&short), ["MemoryPressure", "DiskPressure", "PIDPressure"]);
        assert!(differ(&good, &short));
        let events = condition_events(
            good.conditions.as_deref().unwrap(),
            short.conditions.as_deref().unwrap(),
        );
        assert!(events.contains(&("NodeNotReady", true)), "{events:?}");
    }
}
