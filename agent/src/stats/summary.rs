//! The Summary as documented (`k8s.io/kubelet/pkg/apis/stats/v1alpha1`).

use jiff::Timestamp;
use keelson_runtime_shim::runtime::{
    ContainerStats, ContainerStatus, ImageFsInfo, InterfaceStats, ResourceUsage, SandboxStats,
};
use serde_json::{Map, Value, json};

use super::{Reading, Statistics, node::FileSystem};

pub(super) fn summary(
    statistics: &Statistics,
    reading: &Reading,
    image_fs: &ImageFsInfo,
    only_cpu_and_memory: bool,
) -> Value {
    let pods: Vec<Value> = reading
        .pods
        .iter()
        .filter_map(|pod| pod_stats(statistics, pod, only_cpu_and_memory))
        .collect();
    json!({"node": node_stats(statistics, reading, image_fs, only_cpu_and_memory), "pods": pods})
}

fn time(at: Timestamp) -> String {
    Timestamp::from_second(at.as_second()).unwrap_or(at).to_string()
}

fn cpu(rate: Option<u64>, at: Timestamp, nanos: u64) -> Value {
    let mut cpu = json!({"time": time(at), "usageCoreNanoSeconds": nanos});
    if let Some(rate) = rate {
        cpu["usageNanoCores"] = rate.into();
    }
    cpu
}

fn memory(usage: &ResourceUsage, at: Timestamp) -> Value {
    let mut memory = json!({
        "time": time(at),
        "usageBytes": usage.memory_usage,
        "workingSetBytes": usage.memory_working_set,
        "rssBytes": usage.memory_rss,
        "pageFaults": usage.page_faults,
        "majorPageFaults": usage.major_page_faults,
    });
    if let Some(limit) = usage.memory_limit {
        memory["availableBytes"] = limit.saturating_sub(usage.memory_working_set).into();
    }
    memory
}

fn network(
    interfaces: &[InterfaceStats],
    default: Option<&InterfaceStats>,
    at: Timestamp,
) -> Value {
    let one = |interface: &InterfaceStats| {
        json!({
            "name": interface.name,
            "rxBytes": interface.rx_bytes,
            "rxErrors": interface.rx_errors,
            "txBytes": interface.tx_bytes,
            "txErrors": interface.tx_errors,
        })
    };
    let mut network = default.map_or_else(|| json!({}), one);
    network["time"] = time(at).into();
    network["interfaces"] = interfaces.iter().map(one).collect();
    network
}

fn file_system(fs: FileSystem, used: Option<(u64, u64)>, at: Timestamp) -> Value {
    let (used_bytes, inodes_used) = used.unwrap_or((
        fs.capacity.saturating_sub(fs.available),
        fs.inodes.saturating_sub(fs.inodes_free),
    ));
    json!({
        "time": time(at),
        "availableBytes": fs.available,
        "capacityBytes": fs.capacity,
        "usedBytes": used_bytes,
        "inodesFree": fs.inodes_free,
        "inodes": fs.inodes,
        "inodesUsed": inodes_used,
    })
}

fn node_stats(
    statistics: &Statistics,
    reading: &Reading,
    image_fs: &ImageFsInfo,
    only_cpu_and_memory: bool,
) -> Value {
    let node = &reading.node;
    let memory = node.memory;
    let mut stats = json!({
        "nodeName": statistics.node_name,
        "startTime": time(statistics.started),
        "cpu": cpu(statistics.rate("node", node.at, node.cpu_nanos), node.at, node.cpu_nanos),
        "memory": {
            "time": time(node.at),
            "availableBytes": memory.available,
            "usageBytes": memory.usage(),
            "workingSetBytes": memory.working_set(),
            "rssBytes": memory.anonymous,
        },
    });
    if only_cpu_and_memory {
        return stats;
    }
    stats["network"] = network(&node.interfaces, node.interfaces.first(), node.at);
    stats["fs"] = file_system(node.root_fs, None, node.at);
    if let Ok(fs) = FileSystem::of(&image_fs.mountpoint) {
        let used = Some((image_fs.used_bytes, image_fs.inodes_used));
        stats["runtime"] = json!({"imageFs": file_system(fs, used, node.at)});
    }
    stats["rlimit"] = json!({
        "time": time(node.at),
        "maxpid": node.processes.max,
        "curproc": node.processes.running,
    });
    stats
}

fn pod_stats(
    statistics: &Statistics,
    stats: &SandboxStats,
    only_cpu_and_memory: bool,
) -> Option<Value> {
    // The sandbox knows its pod; one that no worker knows is about to be removed.
    let (pod, runtime_pod) = statistics.pods.pods().into_iter().find_map(|pod| {
        let runtime_pod = statistics.pods.runtime_pod(pod.metadata.uid.as_deref()?)?;
        let is_its = runtime_pod.sandbox.as_ref().is_some_and(|sandbox| sandbox.id == stats.id);
        is_its.then_some((pod, runtime_pod))
    })?;
    let started = runtime_pod.sandbox.as_ref().map_or(stats.at, |sandbox| sandbox.created_at);
    let containers: Vec<Value> = stats
        .containers
        .iter()
        .map(|container| {
            let status = runtime_pod.containers.iter().find(|c| c.id == container.id);
            container_stats(statistics, container, status, only_cpu_and_memory)
        })
        .collect();
    let usage = &stats.usage;
    let rate = statistics.rate(stats.id.as_str(), stats.at, usage.cpu_usage_nanos);
    let mut value = json!({
        "podRef": {
            "name": pod.metadata.name,
            "namespace": pod.metadata.namespace,
            "uid": pod.metadata.uid,
        },
        "startTime": time(started),
        "containers": containers,
        "cpu": cpu(rate, stats.at, usage.cpu_usage_nanos),
        "memory": memory(usage, stats.at),
    });
    if !only_cpu_and_memory {
        if !stats.interfaces.is_empty() {
            let default = stats.interfaces.iter().find(|i| i.name == "eth0");
            value["network"] = network(&stats.interfaces, default, stats.at);
        }
        value["process_stats"] = json!({"process_count": usage.pids});
    }
    Some(value)
}

fn container_stats(
    statistics: &Statistics,
    stats: &ContainerStats,
    status: Option<&ContainerStatus>,
    only_cpu_and_memory: bool,
) -> Value {
    let usage = &stats.usage;
    let rate = statistics.rate(stats.id.as_str(), stats.at, usage.cpu_usage_nanos);
    let started = status.and_then(|s| s.started_at.or(Some(s.created_at))).unwrap_or(stats.at);
    let mut value = Map::new();
    value.insert("name".to_owned(), stats.name.clone().into());
    value.insert("startTime".to_owned(), time(started).into());
    value.insert("cpu".to_owned(), cpu(rate, stats.at, usage.cpu_usage_nanos));
    value.insert("memory".to_owned(), memory(usage, stats.at));
    if !only_cpu_and_memory {
        let rootfs = json!({
            "time": time(stats.at),
            "usedBytes": stats.rootfs_used_bytes,
            "inodesUsed": stats.rootfs_inodes_used,
        });
        value.insert("rootfs".to_owned(), rootfs);
        if let Some(size) =
            status.and_then(|s| std::fs::metadata(&s.log_path).ok()).map(|m| m.len())
        {
            value.insert("logs".to_owned(), json!({"time": time(stats.at), "usedBytes": size}));
        }
    }
    Value::Object(value)
}
