//! Whether this node can take a pod: what the scheduler has checked is checked again, since static
//! pods never met it and pods may be bound by hand.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use k8s_openapi::api::core::v1::{NodeSelectorTerm, Pod};
use keelson_api::{quantity::Quantity, selector::LabelSelector};
use keelson_runtime_shim::runtime::Protocol;

use crate::{
    container_config::{resources, sandbox},
    worker::view,
};

/// Sysctls that any pod may set: namespaced, and without effect on others; from the documentation.
const SAFE_SYSCTLS: [&str; 13] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
    "net.ipv4.tcp_notsent_lowat",
];

/// Why a pod is refused: `status.reason` and what follows `Pod was rejected: `.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rejection {
    /// One word.
    pub(crate) reason: String,
    /// A sentence.
    pub(crate) message: String,
}

fn rejected(reason: impl Into<String>, message: impl Into<String>) -> Result<(), Rejection> {
    Err(Rejection { reason: reason.into(), message: message.into() })
}

/// What of the node decides.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct NodeView {
    /// The node's name.
    pub(crate) name: String,
    /// Its labels.
    pub(crate) labels: BTreeMap<String, String>,
    /// What pods may request altogether, by resource.
    pub(crate) allocatable: BTreeMap<String, Quantity>,
    /// How many pods.
    pub(crate) max_pods: usize,
    /// Sysctls beyond the safe ones.
    pub(crate) allowed_unsafe_sysctls: Vec<String>,
}

/// Whether the node takes `pod` beside the pods that are `active` on it.
pub(crate) fn admit(pod: &Pod, active: &[Arc<Pod>], node: &NodeView) -> Result<(), Rejection> {
    supported(pod)?;
    sysctls(pod, &node.allowed_unsafe_sysctls)?;
    if !selects(pod, node) {
        return rejected(
            "NodeAffinity",
            "Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector",
        );
    }
    ports(pod, active)?;
    fits(pod, active, node)
}

/// What no pod on this node can have. Running it without would be less than was asked.
fn supported(pod: &Pod) -> Result<(), Rejection> {
    let spec = view::spec(pod);
    let unsupported = |what: &str| {
        rejected("PodFeatureUnsupported", format!("{what} is not supported on this node"))
    };
    if let Some(os) = &spec.os
        && os.name != "linux"
    {
        return rejected(
            "PodOSNotSupported",
            "Failed to admit pod as the OS field doesn't match node OS",
        );
    }
    if spec.host_users == Some(false) {
        return unsupported("a user namespace of its own (hostUsers: false)");
    }
    if spec.runtime_class_name.as_ref().is_some_and(|name| !name.is_empty()) {
        return unsupported("runtimeClassName");
    }
    if spec.resource_claims.as_ref().is_some_and(|claims| !claims.is_empty()) {
        return unsupported("dynamic resource allocation (resourceClaims)");
    }
    let of_pod = spec.security_context.as_ref();
    let mut selinux = of_pod.is_some_and(|context| context.se_linux_options.is_some());
    let mut profiles: Vec<_> =
        of_pod.and_then(|context| context.app_armor_profile.as_ref()).into_iter().collect();
    for (_, container) in view::containers(pod) {
        if container.volume_devices.as_ref().is_some_and(|devices| !devices.is_empty()) {
            return unsupported("a block device in a container (volumeDevices)");
        }
        if let Some(context) = &container.security_context {
            selinux |= context.se_linux_options.is_some();
            profiles.extend(context.app_armor_profile.as_ref());
        }
    }
    if selinux {
        return unsupported("seLinuxOptions");
    }
    if profiles.iter().any(|profile| profile.type_ == "Localhost") {
        return rejected("AppArmor", "Cannot enforce AppArmor: it is not supported on this node");
    }
    Ok(())
}

fn sysctls(pod: &Pod, allowed: &[String]) -> Result<(), Rejection> {
    let context = view::spec(pod).security_context.as_ref();
    for sysctl in context.and_then(|context| context.sysctls.as_deref()).unwrap_or_default() {
        // both spellings are documented
        let name = sysctl.name.replace('/', ".");
        let listed = allowed.iter().any(|pattern| match pattern.strip_suffix('*') {
            Some(prefix) => name.starts_with(prefix),
            None => *pattern == name,
        });
        if !SAFE_SYSCTLS.contains(&name.as_str()) && !listed {
            return rejected(
                "SysctlForbidden",
                format!("forbidden sysctl: {:?} not allowlisted", sysctl.name),
            );
        }
        let host_network = view::spec(pod).host_network == Some(true);
        if name.starts_with("net.") && host_network {
            return rejected(
                "SysctlForbidden",
                format!("forbidden sysctl: {:?} not allowed with host net enabled", sysctl.name),
            );
        }
    }
    Ok(())
}

fn selects(pod: &Pod, node: &NodeView) -> bool {
    let spec = view::spec(pod);
    if !LabelSelector::from_labels(spec.node_selector.iter().flatten()).matches(&node.labels) {
        return false;
    }
    let required =
        spec.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref()).and_then(
            |affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref(),
        );
    let Some(required) = required else { return true };
    required.node_selector_terms.iter().any(|term| term_matches(term, node))
}

/// A term without requirements matches nothing, as documented.
fn term_matches(term: &NodeSelectorTerm, node: &NodeView) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    let matches = |operator: &str, values: &[String], actual: Option<&String>| {
        let number = |text: Option<&String>| text.and_then(|text| text.parse::<i64>().ok());
        match operator {
            "In" => actual.is_some_and(|actual| values.contains(actual)),
            "NotIn" => actual.is_none_or(|actual| !values.contains(actual)),
            "Exists" => actual.is_some(),
            "DoesNotExist" => actual.is_none(),
            "Gt" => matches!((number(actual), number(values.first())), (Some(a), Some(b)) if a > b),
            "Lt" => matches!((number(actual), number(values.first())), (Some(a), Some(b)) if a < b),
            _ => false,
        }
    };
    let values = |values: &Option<Vec<String>>| values.clone().unwrap_or_default();
    expressions.iter().all(|requirement| {
        let actual = node.labels.get(&requirement.key);
        matches(&requirement.operator, &values(&requirement.values), actual)
    }) && fields.iter().all(|requirement| {
        let actual = (requirement.key == "metadata.name").then_some(&node.name);
        matches(&requirement.operator, &values(&requirement.values), actual)
    })
}

/// The host ports that a pod takes; with `hostNetwork` the ones it declares.
fn host_ports(pod: &Pod) -> BTreeSet<(&'static str, u16, Option<IpAddr>)> {
    sandbox::port_mappings(pod)
        .into_iter()
        .map(|port| {
            let protocol = match port.protocol {
                Protocol::Tcp => "TCP",
                Protocol::Udp => "UDP",
                Protocol::Sctp => "SCTP",
            };
            (protocol, port.host_port, port.host_ip)
        })
        .collect()
}

fn ports(pod: &Pod, active: &[Arc<Pod>]) -> Result<(), Rejection> {
    let wanted = host_ports(pod);
    let taken = |(protocol, port, ip): &(&str, u16, Option<IpAddr>)| {
        active.iter().any(|other| {
            host_ports(other).iter().any(|(other_protocol, other_port, other_ip)| {
                protocol == other_protocol
                    && port == other_port
                    && (ip.is_none() || other_ip.is_none() || ip == other_ip)
            })
        })
    };
    match wanted.iter().find(|port| taken(port)) {
        None => Ok(()),
        Some((protocol, port, _)) => rejected(
            "NodePorts",
            format!(
                "Predicate NodePorts failed: node(s) didn't have free ports for the requested pod \
                 ports: {protocol} {port} is taken"
            ),
        ),
    }
}

fn fits(pod: &Pod, active: &[Arc<Pod>], node: &NodeView) -> Result<(), Rejection> {
    if active.len() >= node.max_pods {
        return rejected(
            "OutOfpods",
            format!(
                "Node didn't have enough resource: pods, requested: 1, used: {}, capacity: {}",
                active.len(),
                node.max_pods
            ),
        );
    }
    let mut names: BTreeSet<&str> = BTreeSet::new();
    for (_, container) in view::containers(pod) {
        let requests = container.resources.iter().filter_map(|one| one.requests.as_ref());
        names.extend(requests.flat_map(|requests| requests.keys().map(String::as_str)));
    }
    for name in names {
        let requested = resources::pod_request(pod, name);
        if requested.is_zero() {
            continue;
        }
        let capacity = node.allocatable.get(name).copied().unwrap_or(Quantity::ZERO);
        let used: Quantity = active.iter().map(|other| resources::pod_request(other, name)).sum();
        if used + requested > capacity {
            // as the kubelet shows it: CPU in thousandths, all else in whole units
            let shown = |amount: Quantity| {
                if name == "cpu" { amount.milli() } else { amount.value() }
            };
            return rejected(
                format!("OutOf{name}"),
                format!(
                    "Node didn't have enough resource: {name}, requested: {}, used: {}, capacity: \
                     {}",
                    shown(requested),
                    shown(used),
                    shown(capacity)
                ),
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{ContainerPort, PodSecurityContext, Sysctl};

    use super::*;
    use crate::worker::fixture;

    fn node() -> NodeView {
        NodeView {
            name: "node-1".to_owned(),
            labels: BTreeMap::from([("zone".to_owned(), "a".to_owned())]),
            allocatable: BTreeMap::from([("cpu".to_owned(), Quantity::from_units(2))]),
            max_pods: 3,
            allowed_unsafe_sysctls: vec!["net.core.*".to_owned()],
        }
    }

    fn change(change: impl FnOnce(&mut Pod)) -> Pod {
        let mut pod = fixture::pod(&["a"]);
        change(&mut pod);
        pod
    }

    fn requests(cpu: &str) -> Pod {
        change(|pod| {
            pod.spec.as_mut().unwrap().containers[0].resources =
                Some(fixture::resources(&[("cpu", cpu)], &[]));
        })
    }

    fn port(number: i32) -> Pod {
        change(|pod| {
            pod.spec.as_mut().unwrap().containers[0].ports = Some(vec![ContainerPort {
                container_port: 80,
                host_port: Some(number),
                ..Default::default()
            }]);
        })
    }

    fn sysctl(name: &str) -> Pod {
        change(|pod| {
            pod.spec.as_mut().unwrap().security_context = Some(PodSecurityContext {
                sysctls: Some(vec![Sysctl { name: name.to_owned(), value: "1".to_owned() }]),
                ..Default::default()
            });
        })
    }

    #[test]
    fn pods_that_do_not_fit_are_refused_with_the_documented_reason() {
        let selector = |zone: &str| {
            change(|pod| {
                pod.spec.as_mut().unwrap().node_selector =
                    Some(BTreeMap::from([("zone".to_owned(), zone.to_owned())]));
            })
        };
        let users = change(|pod| pod.spec.as_mut().unwrap().host_users = Some(false));
        let rows: [(Pod, Vec<Pod>, Option<&str>); 12] = [
            (requests("2"), vec![], None),
            (requests("2001m"), vec![], Some("OutOfcpu")),
            (requests("1"), vec![requests("1500m")], Some("OutOfcpu")),
            (requests("0"), vec![requests("1"), requests("1"), requests("0")], Some("OutOfpods")),
            (port(80), vec![port(81)], None),
            (port(80), vec![port(80)], Some("NodePorts")),
            (selector("a"), vec![], None),
            (selector("b"), vec![], Some("NodeAffinity")),
            (users, vec![], Some("PodFeatureUnsupported")),
            (sysctl("net.ipv4.tcp_syncookies"), vec![], None),
            (sysctl("net.core.somaxconn"), vec![], None),
            (sysctl("kernel.msgmax"), vec![], Some("SysctlForbidden")),
        ];
        for (index, (pod, active, reason)) in rows.into_iter().enumerate() {
            let active: Vec<_> = active.into_iter().map(Arc::new).collect();
            let result = admit(&pod, &active, &node());
            assert_eq!(
                result.as_ref().err().map(|rejection| rejection.reason.as_str()),
                reason,
                "row {index}: {result:?}"
            );
        }
    }
}
