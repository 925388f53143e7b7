//! Legacy Endpoints: one object for each Service, made from the same pods.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::{
    api::core::v1::{EndpointAddress, EndpointPort, EndpointSubset, Endpoints, Pod, Service},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use keelson_api::object::object_reference;

use super::{members, plan::HEADLESS};
use crate::controllers::pods;

/// Says that this controller looks after the object.
pub(crate) const MANAGED_BY: &str = "endpoints.kubernetes.io/managed-by";
/// This controller, in that label.
pub(crate) const MANAGER: &str = "endpoint-controller";
/// Set when not all endpoints have room.
const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";
/// How many addresses the object holds (documented).
const MOST_ADDRESSES: usize = 1_000;

/// The Endpoints object that a Service is to have; what is known is kept where it is not ours.
pub(crate) fn wanted(
    service: &Service,
    selected: &[Arc<Pod>],
    known: Option<&Endpoints>,
) -> Endpoints {
    let (subsets, truncated) = subsets(service, selected);
    let mut endpoints = known.cloned().unwrap_or_else(|| Endpoints {
        metadata: ObjectMeta {
            name: service.metadata.name.clone(),
            namespace: service.metadata.namespace.clone(),
            ..ObjectMeta::default()
        },
        subsets: None,
    });
    let mut labels = service.metadata.labels.clone().unwrap_or_default();
    labels.insert(MANAGED_BY.to_owned(), MANAGER.to_owned());
    labels.remove(HEADLESS);
    if members::is_headless(service) {
        labels.insert(HEADLESS.to_owned(), String::new());
    }
    endpoints.metadata.labels = Some(labels);
    let annotations = endpoints.metadata.annotations.get_or_insert_default();
    if truncated {
        annotations.insert(OVER_CAPACITY.to_owned(), "truncated".to_owned());
    } else {
        annotations.remove(OVER_CAPACITY);
    }
    if annotations.is_empty() {
        endpoints.metadata.annotations = None;
    }
    endpoints.subsets = (!subsets.is_empty()).then_some(subsets);
    endpoints
}

type Ports = Vec<(String, String, i32, Option<String>)>;

fn subsets(service: &Service, selected: &[Arc<Pod>]) -> (Vec<EndpointSubset>, bool) {
    let family = members::families(service).into_iter().next().unwrap_or_default();
    let publish = members::publishes_not_ready(service);
    let headless = members::is_headless(service);
    let mut found: Vec<(bool, Ports, EndpointAddress)> = Vec::new();
    for pod in selected {
        if pods::is_over(pod) || (pods::is_terminating(pod) && !publish) {
            continue;
        }
        let Some(ip) = members::address(pod, &family) else { continue };
        let ports: Ports = members::ports(service, pod)
            .into_iter()
            .map(|p| {
                (
                    p.name.unwrap_or_default(),
                    p.protocol.unwrap_or_default(),
                    p.port.unwrap_or_default(),
                    p.app_protocol,
                )
            })
            .collect();
        // Only a headless Service may have addresses without ports.
        if ports.is_empty() && !headless {
            continue;
        }
        let mut reference = object_reference(&**pod);
        reference.resource_version = None;
        reference.api_version = None;
        let address = EndpointAddress {
            ip,
            hostname: members::hostname(service, pod),
            node_name: pods::node_name(pod).map(str::to_owned),
            target_ref: Some(reference),
        };
        found.push((publish || pods::is_ready(pod), ports, address));
    }
    let truncated = found.len() > MOST_ADDRESSES;
    // Ready ones first: they are the last to be cut off.
    found.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.2.ip.cmp(&b.2.ip)));
    found.truncate(MOST_ADDRESSES);
    let mut grouped: BTreeMap<Ports, (Vec<EndpointAddress>, Vec<EndpointAddress>)> =
        BTreeMap::new();
    for (ready, ports, address) in found {
        let (is_ready, not_ready) = grouped.entry(ports).or_default();
        if ready { is_ready.push(address) } else { not_ready.push(address) }
    }
    let subsets = grouped
        .into_iter()
        .map(|(ports, (ready, not_ready))| EndpointSubset {
            addresses: (!ready.is_empty()).then_some(ready),
            not_ready_addresses: (!not_ready.is_empty()).then_some(not_ready),
            ports: (!ports.is_empty()).then(|| ports.into_iter().map(port).collect()),
        })
        .collect();
    (subsets, truncated)
}

fn port(
    (name, protocol, port, app_protocol): (String, String, i32, Option<String>),
) -> EndpointPort {
    EndpointPort {
        name: (!name.is_empty()).then_some(name),
        protocol: Some(protocol),
        port,
        app_protocol,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn ready_and_not_ready_pods_are_told_apart() {
        let service: Service = serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "d"},
            "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]},
        }))
        .unwrap();
        let pod = |name: &str, ip: &str, ready: &str| {
            let pod = json!({"metadata": {"name": name, "namespace": "d"},
                "spec": {"containers": []},
                "status": {"phase": "Running", "podIP": ip,
                    "conditions": [{"type": "Ready", "status": ready}]}});
            Arc::new(serde_json::from_value(pod).unwrap())
        };
        let pods = [pod("b", "10.0.0.2", "True"), pod("a", "10.0.0.1", "False")];
        let endpoints = wanted(&service, &pods, None);
        let subset = &endpoints.subsets.as_ref().unwrap()[0];
        assert_eq!(subset.addresses.as_ref().unwrap()[0].ip, "10.0.0.2");
        assert_eq!(subset.not_ready_addresses.as_ref().unwrap()[0].ip, "10.0.0.1");
        assert_eq!(subset.ports.as_ref().unwrap()[0].port, 8080);
        assert_eq!(wanted(&service, &pods, Some(&endpoints)), endpoints);
    }
}
