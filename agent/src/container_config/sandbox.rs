//! A pod's sandbox: names, address, ports, namespaces, cgroup.

use std::{collections::BTreeMap, net::IpAddr};

use k8s_openapi::api::core::v1::Pod;
use keelson_runtime_shim::runtime::{
    DnsConfig, NamespaceOptions, PortMapping, Protocol, SandboxConfig,
};

use super::{dns, hostname, resources};
use crate::{config::AgentConfig, labels, worker::view};

/// The folder of a pod's logs: `<namespace>_<name>_<uid>`.
pub(crate) fn log_folder(namespace: &str, name: &str, uid: &str) -> String {
    format!("{namespace}_{name}_{uid}")
}

/// The pod's sandbox, and notes about its name servers.
pub(crate) fn sandbox_config(
    config: &AgentConfig,
    pod: &Pod,
    attempt: u32,
    host_dns: &DnsConfig,
) -> Result<(SandboxConfig, Vec<String>), String> {
    let spec = view::spec(pod);
    let meta = &pod.metadata;
    let (name, namespace, uid) = (
        meta.name.clone().unwrap_or_default(),
        meta.namespace.clone().unwrap_or_default(),
        meta.uid.clone().unwrap_or_default(),
    );
    let host_network = spec.host_network == Some(true);
    let names = hostname::pod_names(pod, &config.cluster_domain);
    let hostname = hostname::kernel_hostname(pod, &names)?;
    let (dns, notes) = dns::pod_dns(pod, host_dns, &config.cluster_dns, &config.cluster_domain);
    let sandbox = SandboxConfig {
        attempt,
        hostname: if host_network && spec.hostname_override.is_none() {
            String::new()
        } else {
            hostname
        },
        log_directory: config.pod_logs_dir.join(log_folder(&namespace, &name, &uid)),
        dns: Some(dns),
        port_mappings: if host_network { Vec::new() } else { port_mappings(pod) },
        labels: labels::sandbox_labels(pod),
        annotations: meta.annotations.clone().unwrap_or_default(),
        namespaces: NamespaceOptions {
            host_network,
            host_pid: spec.host_pid == Some(true),
            host_ipc: spec.host_ipc == Some(true),
            share_process_namespace: spec.share_process_namespace == Some(true),
        },
        cgroup_parent: resources::cgroup_parent(pod),
        resources: resources::pod_resources(config, pod),
        sysctls: sysctls(pod),
        name,
        namespace,
        uid,
    };
    Ok((sandbox, notes))
}

fn sysctls(pod: &Pod) -> BTreeMap<String, String> {
    let context = view::spec(pod).security_context.as_ref();
    let sysctls = context.and_then(|context| context.sysctls.as_deref()).unwrap_or_default();
    sysctls.iter().map(|sysctl| (sysctl.name.clone(), sysctl.value.clone())).collect()
}

/// The pod's host ports.
pub(crate) fn port_mappings(pod: &Pod) -> Vec<PortMapping> {
    let ports = view::containers(pod)
        .filter(|(role, _)| *role != view::Role::Init)
        .flat_map(|(_, container)| container.ports.iter().flatten());
    ports
        .filter_map(|port| {
            let host_port = u16::try_from(port.host_port?).ok().filter(|port| *port > 0)?;
            Some(PortMapping {
                protocol: match port.protocol.as_deref() {
                    Some("UDP") => Protocol::Udp,
                    Some("SCTP") => Protocol::Sctp,
                    _ => Protocol::Tcp,
                },
                container_port: u16::try_from(port.container_port).ok()?,
                host_port,
                host_ip: port
                    .host_ip
                    .as_deref()
                    .and_then(|ip| ip.parse::<IpAddr>().ok())
                    .filter(|ip| !ip.is_unspecified()),
            })
        })
        .collect()
}
