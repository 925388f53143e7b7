//! All Services and their slices, and what each Service wants of the ruleset.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use jiff::Timestamp;
use keelson_api::object::ObjectKey;

use super::{
    Endpoint, Family, Problem,
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

    /// Each port of a Service in each of these families that it has a cluster address of, with its
    /// endpoints; `None` if there is no such Service.
    pub(crate) fn ports(
        &self,
        key: &ObjectKey,
        families: &[Family],
    ) -> Option<(Vec<PortPlan<'_>>, Vec<Problem>)> {
        let service = self.services.get(key)?;
        let slices = self.slices.get(key);
        let mut plans = Vec::new();
        let mut problems = Vec::new();
        for address in &service.addresses {
            let family = Family::of(*address);
            if !families.contains(&family) {
                continue;
            }
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
                plans.push(PortPlan { service, port, family, cluster_ip: *address, eligible });
            }
        }
        Some((plans, problems))
    }

    /// What a Service wants of the ruleset; `None` if there is no such Service.
    pub(crate) fn rules(
        &self,
        key: &ObjectKey,
        families: &[Family],
    ) -> Option<(ServiceRules, Vec<Problem>)> {
        let service = self.services.get(key)?;
        let (plans, problems) = self.ports(key, families)?;
        let mut rules = ServiceRules { created: service.created, ..ServiceRules::default() };
        let addresses = service.addresses.iter().filter(|a| families.contains(&Family::of(**a)));
        rules.addresses.extend(addresses.map(|a| (AddressSet::ClusterAddresses, *a)));
        for plan in plans {
            let hairpin = plan.eligible.hairpin.iter().map(|e| (AddressSet::Hairpin, e.address));
            rules.addresses.extend(hairpin);
            plan.add_frontends(&mut rules.frontends);
        }
        rules.addresses.sort_unstable();
        rules.addresses.dedup();
        Some((rules, problems))
    }

    /// How many endpoints of a Service on this node are ready, as its health-check node port
    /// tells: endpoints of several ports or families count once.
    pub(crate) fn local_ready(&self, key: &ObjectKey) -> usize {
        let slices = self.slices.get(key);
        let ready = |family| {
            let all = slices.iter().flat_map(|s| s.values()).filter(|s| s.family == family);
            let local = all.flat_map(|s| s.endpoints.iter()).filter(|e| e.local && e.ready);
            local.map(|endpoint| endpoint.address).collect::<BTreeSet<_>>().len()
        };
        ready(Family::V4).max(ready(Family::V6))
    }

    /// A Service's health-check node port.
    pub(crate) fn health_check_port(&self, key: &ObjectKey) -> Option<u16> {
        self.services.get(key)?.health_check_node_port
    }

    /// Ports of a Service whose traffic policy is Local and that have endpoints, but none of them
    /// on this node.
    pub(crate) fn without_local_endpoints(
        &self,
        key: &ObjectKey,
        families: &[Family],
    ) -> Vec<WithoutLocal> {
        let Some(service) = self.services.get(key) else { return Vec::new() };
        let policies = [service.internal_policy, service.external_policy];
        if !policies.contains(&TrafficPolicy::Local) {
            return Vec::new();
        }
        let (plans, _) = self.ports(key, families).unwrap_or_default();
        let without = plans.iter().map(PortPlan::without_local_endpoints);
        without.filter(|one| one.internal || one.external).collect()
    }

    /// The slices of a Service.
    pub(crate) fn slices_of(&self, key: &ObjectKey) -> impl Iterator<Item = &Slice> {
        self.slices.get(key).into_iter().flat_map(|slices| slices.values())
    }
}

/// Which policy of a Service's port finds no endpoint on this node though there are others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WithoutLocal {
    pub(crate) family: Family,
    pub(crate) internal: bool,
    pub(crate) external: bool,
}

/// One port of a Service in one family, and where its traffic may go.
#[derive(Debug)]
pub(crate) struct PortPlan<'a> {
    pub(crate) service: &'a Service,
    pub(crate) port: &'a ServicePort,
    pub(crate) family: Family,
    /// The Service's cluster address in this family.
    pub(crate) cluster_ip: IpAddr,
    pub(crate) eligible: Eligible,
}

impl PortPlan<'_> {
    /// External addresses, which don't know source ranges.
    pub(crate) fn external_ips(&self) -> impl Iterator<Item = IpAddr> {
        self.service.external_ips.iter().copied().filter(|a| Family::of(*a) == self.family)
    }

    /// Load balancers' addresses.
    pub(crate) fn load_balancer_ips(&self) -> impl Iterator<Item = IpAddr> {
        self.service.load_balancer_ips.iter().copied().filter(|a| Family::of(*a) == self.family)
    }

    /// From where clients may use load balancers' addresses; `None` for anywhere. If the Service
    /// names ranges, but none of this family, nobody may.
    pub(crate) fn source_ranges(&self) -> Option<Arc<[IpNet]>> {
        let ranges = self.service.source_ranges.as_ref()?;
        let of_family = |range: &&IpNet| Family::of(range.addr()) == self.family;
        if ranges.iter().filter(of_family).any(|range| range.prefix_len() == 0) {
            return None;
        }
        if ranges.iter().all(|range| of_family(&range)) {
            return Some(Arc::clone(ranges));
        }
        Some(ranges.iter().filter(of_family).copied().collect())
    }

    /// Where traffic to the cluster address may go.
    pub(crate) fn internal(&self) -> &[Endpoint] {
        match self.service.internal_policy {
            TrafficPolicy::Cluster => &self.eligible.cluster,
            TrafficPolicy::Local => &self.eligible.local,
        }
    }

    /// Whether there is any endpoint at all; without one traffic is rejected and not dropped.
    pub(crate) fn has_endpoints(&self) -> bool {
        !(self.eligible.cluster.is_empty() && self.eligible.local.is_empty())
    }

    fn without_local_endpoints(&self) -> WithoutLocal {
        let nowhere = self.has_endpoints() && self.eligible.local.is_empty();
        let reachable = self.port.node_port.is_some()
            || self.external_ips().chain(self.load_balancer_ips()).next().is_some();
        let local = |policy| nowhere && policy == TrafficPolicy::Local;
        WithoutLocal {
            family: self.family,
            internal: local(self.service.internal_policy),
            external: local(self.service.external_policy) && reachable,
        }
    }

    fn forward(&self, endpoints: &[Endpoint], masquerade: Masquerade) -> Action {
        if !endpoints.is_empty() {
            Action::Forward {
                endpoints: endpoints.into(),
                masquerade,
                affinity: self.service.affinity,
                sources: None,
            }
        } else if self.has_endpoints() {
            // Somebody else's load balancer or node has an endpoint: a try there may succeed.
            Action::Drop
        } else {
            Action::Reject
        }
    }

    /// What happens to traffic to an address for the outside: from anywhere, and from inside.
    ///
    /// With `externalTrafficPolicy: Local` the policy doesn't count for clients inside the
    /// cluster: their address is known wherever the endpoint is.
    fn external(&self) -> (Action, Action) {
        let cluster = &self.eligible.cluster;
        match self.service.external_policy {
            TrafficPolicy::Cluster => (self.forward(cluster, Masquerade::Always), Action::Nothing),
            TrafficPolicy::Local => {
                let outside = self.forward(&self.eligible.local, Masquerade::Never);
                let inside = if cluster.is_empty() {
                    Action::Nothing
                } else {
                    self.forward(cluster, Masquerade::OffCluster)
                };
                (outside, inside)
            }
        }
    }

    fn add_frontends(&self, frontends: &mut Vec<(Frontend, Action)>) {
        let frontend = |lane, address, port| Frontend {
            family: self.family,
            lane,
            address,
            protocol: self.port.protocol,
            port,
        };
        let port = self.port.port;
        frontends.push((
            frontend(Lane::Address, Some(self.cluster_ip), port),
            self.forward(self.internal(), Masquerade::OffCluster),
        ));
        let (outside, inside) = self.external();
        let mut seen = vec![self.cluster_ip];
        let mut add = |address: IpAddr, sources: Option<Arc<[IpNet]>>| {
            if seen.contains(&address) {
                return;
            }
            seen.push(address);
            frontends.push((
                frontend(Lane::Address, Some(address), port),
                with_sources(&outside, sources.clone()),
            ));
            frontends.push((
                frontend(Lane::AddressInside, Some(address), port),
                with_sources(&inside, sources),
            ));
        };
        let sources = self.source_ranges();
        self.load_balancer_ips().for_each(|address| add(address, sources.clone()));
        self.external_ips().for_each(|address| add(address, None));
        if let Some(node_port) = self.port.node_port {
            frontends.push((frontend(Lane::NodePort, None, node_port), outside));
            frontends.push((frontend(Lane::NodePortInside, None, node_port), inside));
        }
    }
}

fn with_sources(action: &Action, from: Option<Arc<[IpNet]>>) -> Action {
    let mut action = action.clone();
    if let Action::Forward { sources, .. } = &mut action {
        *sources = from;
    }
    action
}
