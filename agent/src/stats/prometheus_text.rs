//! Usage as Prometheus metrics, under the names of the kubelet and of cAdvisor.

use prometheus::{GaugeVec, Opts, Registry};

use super::Reading;
use crate::pods::PodDirectory;

const NANOS: f64 = 1e9;

/// A family that is filled once and printed.
fn family(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<GaugeVec, prometheus::Error> {
    let family = GaugeVec::new(Opts::new(name, help), labels)?;
    registry.register(Box::new(family.clone()))?;
    Ok(family)
}

/// A pod's and its sandbox's names.
struct PodNames {
    sandbox: String,
    namespace: String,
    pod: String,
}

fn names(pods: &dyn PodDirectory) -> Vec<PodNames> {
    pods.pods()
        .into_iter()
        .filter_map(|pod| {
            let sandbox = pods.runtime_pod(pod.metadata.uid.as_deref()?)?.sandbox?;
            Some(PodNames {
                sandbox: sandbox.id.0,
                namespace: pod.metadata.namespace.clone().unwrap_or_default(),
                pod: pod.metadata.name.clone().unwrap_or_default(),
            })
        })
        .collect()
}

/// `/metrics/resource`.
pub(super) fn resource(
    reading: &Reading,
    pods: &dyn PodDirectory,
) -> Result<String, prometheus::Error> {
    let registry = Registry::new();
    let container = ["container", "namespace", "pod"];
    let pod = ["namespace", "pod"];
    let container_cpu = family(
        &registry,
        "container_cpu_usage_seconds_total",
        "Cumulative cpu time consumed by the container in core-seconds",
        &container,
    )?;
    let container_memory = family(
        &registry,
        "container_memory_working_set_bytes",
        "Current working set of the container in bytes",
        &container,
    )?;
    let pod_cpu = family(
        &registry,
        "pod_cpu_usage_seconds_total",
        "Cumulative cpu time consumed by the pod in core-seconds",
        &pod,
    )?;
    let pod_memory = family(
        &registry,
        "pod_memory_working_set_bytes",
        "Current working set of the pod in bytes",
        &pod,
    )?;
    let node_cpu = family(
        &registry,
        "node_cpu_usage_seconds_total",
        "Cumulative cpu time consumed by the node in core-seconds",
        &[],
    )?;
    let node_memory = family(
        &registry,
        "node_memory_working_set_bytes",
        "Current working set of the node in bytes",
        &[],
    )?;
    let error = family(
        &registry,
        "resource_scrape_error",
        "1 if there was an error while getting container metrics, 0 otherwise",
        &[],
    )?;
    let names = names(pods);
    for stats in &reading.pods {
        let Some(names) = names.iter().find(|n| n.sandbox == stats.id.as_str()) else { continue };
        let labels = [names.namespace.as_str(), names.pod.as_str()];
        pod_cpu.with_label_values(&labels).set(stats.usage.cpu_usage_nanos as f64 / NANOS);
        pod_memory.with_label_values(&labels).set(stats.usage.memory_working_set as f64);
        for one in &stats.containers {
            let labels = [one.name.as_str(), labels[0], labels[1]];
            container_cpu.with_label_values(&labels).set(one.usage.cpu_usage_nanos as f64 / NANOS);
            container_memory.with_label_values(&labels).set(one.usage.memory_working_set as f64);
        }
    }
    let none: [&str; 0] = [];
    node_cpu.with_label_values(&none).set(reading.node.cpu_nanos as f64 / NANOS);
    node_memory.with_label_values(&none).set(reading.node.memory.working_set() as f64);
    error.with_label_values(&none).set(0.0);
    keelson_api::metrics::encode(&registry)
}

/// `/metrics/cadvisor`.
pub(super) fn containers(
    reading: &Reading,
    pods: &dyn PodDirectory,
) -> Result<String, prometheus::Error> {
    let registry = Registry::new();
    let labels = ["container", "id", "namespace", "pod"];
    let one = |name: &str, help: &str| family(&registry, name, help, &labels);
    let cpu = one("container_cpu_usage_seconds_total", "Cumulative cpu time consumed in seconds.")?;
    let usage = one("container_memory_usage_bytes", "Current memory usage in bytes.")?;
    let working_set = one("container_memory_working_set_bytes", "Current working set in bytes.")?;
    let rss = one("container_memory_rss", "Size of RSS in bytes.")?;
    let limit = one("container_spec_memory_limit_bytes", "Memory limit for the container.")?;
    let processes =
        one("container_processes", "Number of processes running inside the container.")?;
    let interface = ["id", "interface", "namespace", "pod"];
    let received = family(
        &registry,
        "container_network_receive_bytes_total",
        "Cumulative count of bytes received",
        &interface,
    )?;
    let sent = family(
        &registry,
        "container_network_transmit_bytes_total",
        "Cumulative count of bytes transmitted",
        &interface,
    )?;
    let cores = family(&registry, "machine_cpu_cores", "Number of logical CPU cores.", &[])?;
    let memory = family(
        &registry,
        "machine_memory_bytes",
        "Amount of memory installed on the machine.",
        &[],
    )?;
    let names = names(pods);
    for stats in &reading.pods {
        let Some(names) = names.iter().find(|n| n.sandbox == stats.id.as_str()) else { continue };
        let whole = ("", stats.id.as_str(), &stats.usage);
        let parts = stats.containers.iter().map(|c| (c.name.as_str(), c.id.as_str(), &c.usage));
        for (container, id, used) in std::iter::once(whole).chain(parts) {
            let labels = [container, id, names.namespace.as_str(), names.pod.as_str()];
            cpu.with_label_values(&labels).set(used.cpu_usage_nanos as f64 / NANOS);
            usage.with_label_values(&labels).set(used.memory_usage as f64);
            working_set.with_label_values(&labels).set(used.memory_working_set as f64);
            rss.with_label_values(&labels).set(used.memory_rss as f64);
            limit.with_label_values(&labels).set(used.memory_limit.unwrap_or(0) as f64);
            processes.with_label_values(&labels).set(used.pids as f64);
        }
        for link in &stats.interfaces {
            let labels = [
                stats.id.as_str(),
                link.name.as_str(),
                names.namespace.as_str(),
                names.pod.as_str(),
            ];
            received.with_label_values(&labels).set(link.rx_bytes as f64);
            sent.with_label_values(&labels).set(link.tx_bytes as f64);
        }
    }
    let none: [&str; 0] = [];
    cores.with_label_values(&none).set(reading.node.cpus as f64);
    memory.with_label_values(&none).set(reading.node.memory.total as f64);
    keelson_api::metrics::encode(&registry)
}
