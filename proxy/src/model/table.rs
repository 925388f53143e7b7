//! All Services and their slices, and what each Service wants of the ruleset.

use std::collections::{BTreeMap, HashMap};

use jiff::Timestamp;
use keelson_api::object::ObjectKey;

use super::{
    Family, Problem,
    eligible::Eligible,
    objects::{Service, ServicePort, Slice, TrafficPolicy},
};
use crate::ruleset::{Action, AddressSet, Frontend, Lane, Masquerade, desired::ServiceRules};

/// The most endpoints behind one port; each costs an element in the kernel.
const ENDPOINTS_MAX: usize = 65_536;

/// Every Service and slice, as last seen.
#[derive(Debug, Default)]
pub(crate) struct ServiceTable {
    services: HashMap<ObjectKey, Service>,
    /// By service, then by the slice's name.
    slices: HashMap<ObjectKey, BTreeMap<String, Slice>>,
    /// Which service a slice was for, as a slice's label may change.
    slice_owner: HashMap<ObjectKey, ObjectKey>,
}

impl ServiceTable {
    /// Takes in a Service as it is now; `None` if it is gone or none of ours. Whether it changed.
    pub(crate) fn set_service(&mut self, key: &ObjectKey, service: Option<Service>) -> bool {
        match service {
            Some(service) if self.services.get(key) == Some(&service) => false,
            Some(service) => {
                self.services.insert(key.clone(), service);
                true
            }
            None => self.services.remove(key).is_some(),
        }
    }

    /// Takes in a slice as it is now; `None` if it is gone. The services that are touched.
    pub(crate) fn set_slice(&mut self, key: &ObjectKey, slice: Option<Slice>) -> Vec<ObjectKey> {
        let mut touched = Vec::new();
        let owner_before = match &slice {
            Some(slice) => self.slice_owner.insert(key.clone(), slice.service.clone()),
            None => self.slice_owner.remove(key),
        };
        let owner = slice.as_ref().map(|slice| slice.service.clone());
        if let Some(before) = owner_before
            && Some(&before) != owner.as_ref()
            && let Some(slices) = self.slices.get_mut(&before)
        {
            slices.remove(&key.name);
            if slices.is_empty() {
                self.slices.remove(&before);
            }
            touched.push(before);
        }
        if let (Some(owner), Some(slice)) = (owner, slice) {
            let slices = self.slices.entry(owner.clone()).or_default();
            let before = slices.get(&key.name);
            if before.is_none_or(|b| {
                b.ports != slice.ports || b.endpoints != slice.endpoints || b.family != slice.family
            }) {
                touched.push(owner);
            }
            slices.insert(key.name.clone(), slice);
        }
        touched
    }

    /// The UID of a Service, for events on it.
    pub(crate) fn uid(&self, key: &ObjectKey) -> Option<&str> {
        self.services.get(key).map(|service| service.uid.as_str())
    }

    /// Every Service's key.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &ObjectKey> {
        self.services.keys()
    }

    /// Every slice's key.
    pub(crate) fn slice_keys(&self) -> impl Iterator<Item = &ObjectKey> {
        self.slice_owner.keys()
    }

    /// When the change that a slice tells of happened.
    pub(crate) fn triggered(&self, slice: &ObjectKey) -> Option<Timestamp> {
        let owner = self.slice_owner.get(slice)?;
        self.slices.get(owner)?.get(&slice.name)?.triggered
    }

    /// What a Service wants of the ruleset; `None` if there is no such Service.
    pub(crate) fn rules(
        &self,
        key: &ObjectKey,
        families: &[Family],
    ) -> Option<(ServiceRules, Vec<Problem>)> {
        let service = self.services.get(key)?;
        let slices = self.slices.get(key);
        let mut rules = ServiceRules { created: service.created, ..ServiceRules::default() };
        let mut problems = Vec::new();
        for address in &service.addresses {
            let family = Family::of(*address);
            if !families.contains(&family) {
                continue;
            }
            rules.addresses.push((AddressSet::ClusterAddresses, *address));
            for port in &service.ports {
                let mut eligible =
                    Eligible::of(slices.iter().flat_map(|s| s.values()), port, family);
                for endpoints in [&mut eligible.cluster, &mut eligible.local] {
                    if endpoints.len() > ENDPOINTS_MAX {
                        problems.push(Problem::new(
                            "TooManyEndpoints",
                            format!(
                                "port {} has {} endpoints; those after the first {ENDPOINTS_MAX} get no traffic",
                                port.port,
                                endpoints.len()
                            ),
                        ));
                        endpoints.truncate(ENDPOINTS_MAX);
                    }
                }
                let hairpin = eligible.hairpin.iter().map(|e| (AddressSet::Hairpin, e.address));
                rules.addresses.extend(hairpin);
                add_frontends(&mut rules, service, port, family, *address, &eligible);
            }
        }
        rules.addresses.sort_unstable();
        rules.addresses.dedup();
        Some((rules, problems))
    }
}

fn add_frontends(
    rules: &mut ServiceRules,
    service: &Service,
    port: &ServicePort,
    family: Family,
    address: std::net::IpAddr,
    eligible: &Eligible,
) {
    let frontend = |lane, address, port_number| Frontend {
        family,
        lane,
        address,
        protocol: port.protocol,
        port: port_number,
    };
    let forward = |endpoints: &[super::Endpoint], masquerade| {
        if !endpoints.is_empty() {
            Action::Forward { endpoints: endpoints.into(), masquerade, affinity: service.affinity }
        } else if eligible.cluster.is_empty() && eligible.local.is_empty() {
            Action::Reject
        } else {
            // Somebody else's load balancer or node has an endpoint: a try there may succeed.
            Action::Drop
        }
    };
    let inside = match service.internal_policy {
        TrafficPolicy::Cluster => &eligible.cluster,
        TrafficPolicy::Local => &eligible.local,
    };
    rules.frontends.push((
        frontend(Lane::Cluster, Some(address), port.port),
        forward(inside, Masquerade::OffCluster),
    ));
    let Some(node_port) = port.node_port else { return };
    // With `externalTrafficPolicy: Local` the policy doesn't count for clients inside the cluster:
    // their address is known wherever the endpoint is.
    let (outside, inside) = match service.external_policy {
        TrafficPolicy::Cluster => (forward(&eligible.cluster, Masquerade::Always), Action::Nothing),
        TrafficPolicy::Local if eligible.cluster.is_empty() => {
            (forward(&eligible.local, Masquerade::Never), Action::Nothing)
        }
        TrafficPolicy::Local => (
            forward(&eligible.local, Masquerade::Never),
            forward(&eligible.cluster, Masquerade::OffCluster),
        ),
    };
    rules.frontends.push((frontend(Lane::NodePort, None, node_port), outside));
    rules.frontends.push((frontend(Lane::NodePortInside, None, node_port), inside));
}
