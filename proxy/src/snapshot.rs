//! Objects at one moment, and what the proxy would make of them: without a kernel, without root.
//!
//! `keelson proxy --dry-run` and `keelson explain` ask here. It is made by the same steps as in the
//! running proxy, from the same tables.

use std::{net::IpAddr, sync::Arc};

use k8s_openapi::api::{
    core::v1::{Node, Service as ApiService},
    discovery::v1::EndpointSlice,
    networking::v1::ServiceCIDR,
};
use keelson_api::object::ObjectKey;
use tokio::sync::watch;

use crate::{
    backend::Goal,
    config::{DetectLocal, Mode, ProxyConfig},
    explain::Unserved,
    health_check::HealthChecks,
    iptables,
    model::{
        Family, Problem, service_ranges::ServiceRanges, services::Service, slices::Slice,
        table::ServiceTable,
    },
    nftables,
    proxier::conflicts,
    ruleset::{
        AddressSet,
        desired::{Desired, ServiceRules},
    },
    start, userspace, watches,
};

/// Objects as the API or manifests have them.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    /// Services.
    pub services: Vec<ApiService>,
    /// Their endpoints.
    pub slices: Vec<EndpointSlice>,
    /// Ranges that cluster addresses are taken from.
    pub service_cidrs: Vec<ServiceCIDR>,
    /// The node that the proxy runs on.
    pub node: Option<Node>,
}

/// Something in an object that the proxy refuses or does nothing for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The object's kind.
    pub kind: &'static str,
    /// Its namespace and name.
    pub object: ObjectKey,
    /// What is wrong, and what becomes of it.
    pub message: String,
}

/// What the proxy would have in force with these objects.
#[derive(Debug)]
pub struct Snapshot {
    pub(crate) config: ProxyConfig,
    pub(crate) families: Vec<Family>,
    pub(crate) objects: ServiceTable,
    pub(crate) desired: Desired,
    /// Addresses of the node's interfaces, where it is this machine.
    pub(crate) local_addresses: Vec<IpAddr>,
    /// What Services leave to others.
    pub(crate) unserved: Vec<Unserved>,
}

impl Snapshot {
    /// Plans everything, and says what is refused.
    pub fn new(mut config: ProxyConfig, from: &Objects) -> (Self, Vec<Refusal>) {
        let mut refusals = Vec::new();
        let mut refuse = |kind, object: &ObjectKey, problems: Vec<Problem>| {
            refusals.extend(problems.into_iter().map(|problem| Refusal {
                kind,
                object: object.clone(),
                message: problem.message,
            }));
        };
        let place = watches::place(&config.node_name, from.node.as_ref());
        if let Some(node) = &from.node {
            if config.node_ips.is_empty() {
                config.node_ips = watches::node_addresses(node);
            }
            if config.detect_local == DetectLocal::NodeCidr {
                config.detect_local = DetectLocal::Ranges(watches::ranges_of(node));
            }
        }
        let families = config.wanted_families();
        let mut objects = ServiceTable::default();
        if config.mode == Mode::Iptables {
            objects.limit_endpoints(iptables::ENDPOINTS_MAX);
        }
        for object in &from.services {
            let key = ObjectKey::of(&object.metadata);
            let (service, problems) = Service::read(object);
            refuse("Service", &key, problems);
            if service.is_none() {
                let why = "the proxy does nothing for it: it has no cluster address, is an \
                           ExternalName or is another proxy's";
                refuse("Service", &key, vec![Problem::new("NotServed", why)]);
            }
            objects.set_service(&key, service);
        }
        for object in &from.slices {
            let key = ObjectKey::of(&object.metadata);
            let (slice, problems) = Slice::read(object, &place);
            refuse("EndpointSlice", &key, problems);
            objects.set_slice(&key, slice);
        }
        let mut desired = Desired::default();
        let node = ServiceRules {
            addresses: config.node_ips.iter().map(|a| (AddressSet::NodeAddresses, *a)).collect(),
            ..ServiceRules::default()
        };
        desired.replace(&ObjectKey::default(), Some(node));
        let mut ranges = ServiceRanges::default();
        for object in &from.service_cidrs {
            refuse("ServiceCIDR", &ObjectKey::of(&object.metadata), ranges.set(object));
        }
        desired.set_service_ranges(ranges.all());
        let mut keys: Vec<ObjectKey> = objects.keys().cloned().collect();
        // By age: who comes later is who is told that another Service has what it wants.
        keys.sort_by_cached_key(|key| (objects.created(key), key.clone()));
        let mut health_checks = HealthChecks::new(watch::Sender::new(Arc::default()));
        for key in keys {
            let (rules, problems) = objects.rules(&key, &families).unzip();
            refuse("Service", &key, problems.unwrap_or_default());
            let taken = desired.replace(&key, rules).taken;
            refuse("Service", &key, conflicts(&taken).collect());
            if let Some((younger, problem)) = health_checks.note(&key, &objects) {
                refuse("Service", &younger, vec![problem]);
            }
        }
        for (service, problem) in health_checks.publish(&desired) {
            refuse("Service", &service, vec![problem]);
        }
        let unserved = from.services.iter().filter_map(Unserved::of).collect();
        let local_addresses = Vec::new();
        (Self { config, families, objects, desired, local_addresses, unserved }, refusals)
    }

    /// With the addresses of the node's interfaces, which its object need not name.
    #[must_use]
    pub fn with_local_addresses(mut self, addresses: Vec<IpAddr>) -> Self {
        self.local_addresses = addresses;
        self
    }

    /// The node's addresses, as configured or as its object has them.
    pub fn node_addresses(&self) -> &[IpAddr] {
        &self.config.node_ips
    }

    pub(crate) fn goal(&self) -> Goal<'_> {
        Goal { desired: &self.desired, objects: &self.objects }
    }

    /// Everything that would be in force, in the form that the mode's own tools print.
    pub fn rules(&self) -> String {
        let each = self.families.iter().map(|family| match self.config.mode {
            Mode::Nftables => {
                nftables::text::text(&start::layout(&self.config, *family), self.goal())
            }
            Mode::Iptables => {
                let program = match family {
                    Family::V4 => "iptables-restore",
                    Family::V6 => "ip6tables-restore",
                };
                let rules = iptables::text(&start::settings(&self.config, *family), self.goal());
                format!("# {}: input of {program} --noflush\n{rules}", family.as_str())
            }
            Mode::Userspace => userspace::text(*family, &self.desired),
        });
        each.collect::<Vec<_>>().join("\n")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A Service that claims everything that two can quarrel about.
    fn service(name: &str, created: &str) -> ApiService {
        let object = json!({
            "metadata": {"namespace": "default", "name": name, "creationTimestamp": created},
            "spec": {"type": "LoadBalancer", "externalTrafficPolicy": "Local",
                "clusterIP": "10.96.1.1", "clusterIPs": ["10.96.1.1"],
                "externalIPs": ["203.0.113.9"], "healthCheckNodePort": 30200,
                "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30100}]},
        });
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn the_younger_service_is_told_what_the_older_has_in_either_order() {
        let (younger, older) =
            (service("a", "2026-01-02T00:00:00Z"), service("b", "2026-01-01T00:00:00Z"));
        for services in [vec![younger.clone(), older.clone()], vec![older, younger]] {
            let objects = Objects { services, ..Objects::default() };
            let (_, refusals) = Snapshot::new(ProxyConfig::new("n"), &objects);
            let told: Vec<String> =
                refusals.into_iter().map(|r| format!("{}: {}", r.object, r.message)).collect();
            let what = [
                "TCP 10.96.1.1:80",
                "TCP 203.0.113.9:80",
                "TCP node port 30100 (IPv4)",
                "health check node port 30200",
            ];
            let expected =
                what.map(|w| format!("default/a: {w} is that of the older Service default/b"));
            assert_eq!(told, expected);
        }
    }

    #[test]
    fn a_health_check_port_that_is_a_node_port_is_told() {
        let mut checked = service("a", "2026-01-01T00:00:00Z");
        let spec = checked.spec.as_mut().unwrap();
        (spec.cluster_ip, spec.cluster_ips) = (Some("10.96.1.2".into()), None);
        (spec.external_ips, spec.health_check_node_port) = (None, Some(30100));
        spec.ports.as_mut().unwrap()[0].node_port = Some(30101);
        let services = vec![checked, service("b", "2026-01-02T00:00:00Z")];
        let objects = Objects { services, ..Objects::default() };
        let (_, refusals) = Snapshot::new(ProxyConfig::new("n"), &objects);
        let [refusal] = &refusals[..] else { panic!("{refusals:?}") };
        assert_eq!(refusal.object, ObjectKey::new("default", "a"));
        assert!(refusal.message.contains("node port of the Service default/b"), "{refusal:?}");
    }
}
