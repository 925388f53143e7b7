//! Which pods stand behind a Service, and how: the part that EndpointSlices and legacy Endpoints
//! have in common.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use k8s_openapi::{
    api::{
        core::v1::{Container, Pod, Service, ServicePort},
        discovery::v1::{
            Endpoint, EndpointConditions, EndpointHints, EndpointPort, ForNode, ForZone,
        },
    },
    apimachinery::pkg::util::intstr::IntOrString,
};
use keelson_api::object::object_reference;

use crate::controllers::pods;

/// Labels of nodes, by name.
pub(crate) type Zones = BTreeMap<String, String>;

/// Endpoints that have the same ports, of one address family.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Group {
    /// `IPv4` or `IPv6`.
    pub(crate) family: String,
    pub(crate) ports: Vec<EndpointPort>,
    pub(crate) endpoints: Vec<Endpoint>,
}

/// The address families that a Service has endpoints of.
pub(crate) fn families(service: &Service) -> Vec<String> {
    let families = service.spec.as_ref().and_then(|s| s.ip_families.clone()).unwrap_or_default();
    if families.is_empty() { vec!["IPv4".to_owned()] } else { families }
}

/// Whether a Service has no address of its own.
pub(crate) fn is_headless(service: &Service) -> bool {
    service.spec.as_ref().and_then(|s| s.cluster_ip.as_deref()) == Some("None")
}

/// Whether a Service's endpoints come from pods.
pub(crate) fn selects(service: &Service) -> Option<&BTreeMap<String, String>> {
    let spec = service.spec.as_ref()?;
    if spec.type_.as_deref() == Some("ExternalName") {
        return None;
    }
    spec.selector.as_ref().filter(|selector| !selector.is_empty())
}

/// Whether a Service selects a pod with these labels.
pub(crate) fn selects_labels(service: &Service, labels: Option<&BTreeMap<String, String>>) -> bool {
    let Some(selector) = selects(service) else { return false };
    selector.iter().all(|(key, value)| labels.and_then(|labels| labels.get(key)) == Some(value))
}

/// Whether a Service wants endpoints that are not ready too.
pub(crate) fn publishes_not_ready(service: &Service) -> bool {
    service.spec.as_ref().and_then(|s| s.publish_not_ready_addresses) == Some(true)
}

/// The Service's endpoints, grouped by family and ports, in a stable order.
pub(crate) fn groups(service: &Service, selected: &[Arc<Pod>], zones: &Zones) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for family in families(service) {
        for pod in selected.iter().filter(|pod| !pods::is_over(pod)) {
            let Some(address) = address(pod, &family) else { continue };
            let ports = ports(service, pod);
            let endpoint = endpoint(service, pod, address, zones);
            match groups.iter_mut().find(|g| g.family == family && g.ports == ports) {
                Some(group) => group.endpoints.push(endpoint),
                None => {
                    groups.push(Group { family: family.clone(), ports, endpoints: vec![endpoint] });
                }
            }
        }
    }
    for group in &mut groups {
        give_hints(service, &mut group.endpoints);
    }
    groups
}

/// The pod's address of a family.
pub(crate) fn address(pod: &Pod, family: &str) -> Option<String> {
    let status = pod.status.as_ref()?;
    let all = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str());
    all.chain(status.pod_ip.as_deref())
        .find(|ip| ip.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6() == (family == "IPv6")))
        .map(str::to_owned)
}

/// The Service's ports as the pod has them; a named port that it lacks is left out.
pub(crate) fn ports(service: &Service, pod: &Pod) -> Vec<EndpointPort> {
    let ports = service.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
    ports
        .filter_map(|port| {
            Some(EndpointPort {
                name: Some(port.name.clone().unwrap_or_default()),
                protocol: Some(port.protocol.clone().unwrap_or_else(|| "TCP".to_owned())),
                port: Some(target_port(port, pod)?),
                app_protocol: port.app_protocol.clone(),
            })
        })
        .collect()
}

fn target_port(port: &ServicePort, pod: &Pod) -> Option<i32> {
    match port.target_port.as_ref() {
        None | Some(IntOrString::Int(0)) => Some(port.port),
        Some(IntOrString::Int(number)) => Some(*number),
        Some(IntOrString::String(name)) => {
            let protocol = port.protocol.as_deref().unwrap_or("TCP");
            let spec = pod.spec.as_ref()?;
            let sidecars = spec
                .init_containers
                .iter()
                .flatten()
                .filter(|c| c.restart_policy.as_deref() == Some("Always"));
            spec.containers.iter().chain(sidecars).find_map(|c| named_port(c, name, protocol))
        }
    }
}

fn named_port(container: &Container, name: &str, protocol: &str) -> Option<i32> {
    let ports = container.ports.iter().flatten();
    ports
        .filter(|p| p.name.as_deref() == Some(name))
        .find(|p| p.protocol.as_deref().unwrap_or("TCP") == protocol)
        .map(|p| p.container_port)
}

/// The host name that DNS knows the pod by behind a headless Service.
pub(crate) fn hostname(service: &Service, pod: &Pod) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let belongs = spec.subdomain.is_some() && spec.subdomain == service.metadata.name;
    spec.hostname.clone().filter(|hostname| belongs && !hostname.is_empty())
}

fn endpoint(service: &Service, pod: &Pod, address: String, zones: &Zones) -> Endpoint {
    let serving = pods::is_ready(pod);
    let terminating = pods::is_terminating(pod);
    let ready = publishes_not_ready(service) || (serving && !terminating);
    let node = pods::node_name(pod);
    let mut reference = object_reference(pod);
    reference.resource_version = None;
    reference.api_version = None;
    Endpoint {
        addresses: vec![address],
        conditions: Some(EndpointConditions {
            ready: Some(ready),
            serving: Some(serving),
            terminating: Some(terminating),
        }),
        hostname: hostname(service, pod),
        node_name: node.map(str::to_owned),
        zone: node.and_then(|node| zones.get(node)).cloned(),
        target_ref: Some(reference),
        ..Endpoint::default()
    }
}

/// Hints for `trafficDistribution`: each endpoint serves its own zone (and node).
fn give_hints(service: &Service, endpoints: &mut [Endpoint]) {
    let wanted = service.spec.as_ref().and_then(|s| s.traffic_distribution.as_deref());
    let (by_zone, by_node) = match wanted {
        Some("PreferClose" | "PreferSameZone") => (true, false),
        Some("PreferSameNode") => (true, true),
        _ => return,
    };
    for endpoint in endpoints {
        let ready = endpoint.conditions.as_ref().and_then(|c| c.ready) == Some(true);
        let zones = endpoint.zone.clone().filter(|_| by_zone && ready);
        let nodes = endpoint.node_name.clone().filter(|_| by_node && ready);
        if zones.is_some() || nodes.is_some() {
            endpoint.hints = Some(EndpointHints {
                for_zones: zones.map(|name| vec![ForZone { name }]),
                for_nodes: nodes.map(|name| vec![ForNode { name }]),
            });
        }
    }
}
