//! Objects at one moment, and what the proxy would make of them: without a kernel, without root.
//!
//! `keelson proxy --dry-run` and `keelson explain` ask here. It is made by the same steps as in the
//! running proxy, from the same tables.

use std::net::IpAddr;

use k8s_openapi::api::{
    core::v1::{Node, Service as ApiService},
    discovery::v1::EndpointSlice,
    networking::v1::ServiceCIDR,
};
use keelson_api::object::ObjectKey;

use crate::{
    backend::Goal,
    config::{DetectLocal, Mode, ProxyConfig},
    iptables,
    model::{
        Family, Problem, service_ranges::ServiceRanges, services::Service, slices::Slice,
        table::ServiceTable,
    },
    nftables,
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
        keys.sort_unstable();
        for key in keys {
            let (rules, problems) = objects.rules(&key, &families).unzip();
            refuse("Service", &key, problems.unwrap_or_default());
            let taken = desired.replace(&key, rules).taken;
            let conflicts = taken.into_iter().map(|(frontend, owner)| {
                Problem::new("PortConflict", format!("{frontend} is that of the Service {owner}"))
            });
            refuse("Service", &key, conflicts.collect());
        }
        (Self { config, families, objects, desired, local_addresses: Vec::new() }, refusals)
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
