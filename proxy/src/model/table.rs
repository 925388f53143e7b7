//! All Services and their slices, and what each Service wants of the ruleset.

use std::{
    collections::{BTreeSet, HashMap},
    hash::{DefaultHasher, Hash, Hasher},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use jiff::Timestamp;
use keelson_api::object::ObjectKey;

use super::{
    Endpoint, Family, Problem,
    eligible::{ENDPOINTS_MAX, Eligible},
    services::{Service, ServicePort, TrafficPolicy},
    slices::Slice,
};
use crate::ruleset::{Action, AddressSet, Frontend, Lane, Masquerade, desired::ServiceRules};

/// From so many slices on a Service is planned once for all that comes in together: each plan looks
/// at all of them.
const MANY_SLICES: usize = 16;

/// Every Service and slice, as last seen.
///
/// There may be tens of thousands, most of which stay as they are: keys are shared, and a Service
/// stands beside its slices.
#[derive(Debug, Default)]
pub(crate) struct ServiceTable {
    entries: HashMap<ObjectKey, Box<Entry>>,
    /// Which service a slice was for, as a slice's label may change.
    slice_owner: HashMap<ObjectKey, ObjectKey>,
    /// The most endpoints behind one port, if that is less than can be looked at.
    endpoints_max: Option<usize>,
}

/// A Service with its slices; there is none when both are gone.
#[derive(Debug, Default)]
struct Entry {
    service: Option<Service>,
    /// By the slice's name.
    slices: Vec<(ObjectKey, Slice)>,
}

impl Entry {
    fn place(&self, slice: &ObjectKey) -> Result<usize, usize> {
        self.slices.binary_search_by(|(key, _)| key.cmp(slice))
    }
}

impl ServiceTable {
    /// Plans no more endpoints behind one port than this.
    pub(crate) fn limit_endpoints(&mut self, most: usize) {
        self.endpoints_max = Some(most);
    }

    /// Takes in a Service as it is now; `None` if it is gone or none of ours. Whether it changed.
    pub(crate) fn set_service(&mut self, key: &ObjectKey, service: Option<Service>) -> bool {
        let Some(entry) = self.entries.get_mut(key) else {
            let Some(service) = service else { return false };
            let entry = Entry { service: Some(service), slices: Vec::new() };
            self.entries.insert(key.clone(), Box::new(entry));
            return true;
        };
        let changed = entry.service != service;
        entry.service = service;
        self.drop_empty(key);
        changed
    }

    /// Takes in a slice as it is now; `None` if it is gone. The services that are touched.
    pub(crate) fn set_slice(&mut self, key: &ObjectKey, slice: Option<Slice>) -> Vec<ObjectKey> {
        let mut touched = Vec::new();
        let before = self.slice_owner.remove_entry(key);
        let owner = slice.as_ref().map(|slice| slice.service.clone());
        if let Some((_, before)) = &before
            && Some(before) != owner.as_ref()
        {
            if let Some(entry) = self.entries.get_mut(before)
                && let Ok(place) = entry.place(key)
            {
                entry.slices.remove(place);
            }
            self.drop_empty(before);
            touched.push(before.clone());
        }
        let Some(mut slice) = slice else { return touched };
        let key = before.map_or_else(|| key.clone(), |(key, _)| key);
        let owner = match self.entries.get_key_value(&slice.service) {
            Some((owner, _)) => owner.clone(),
            None => slice.service.clone(),
        };
        slice.service = owner.clone();
        let entry = self.entries.entry(owner.clone()).or_default();
        let same = |b: &Slice| {
            b.ports == slice.ports && b.endpoints == slice.endpoints && b.family == slice.family
        };
        match entry.place(&key) {
            Ok(place) => {
                let known = &mut entry.slices[place].1;
                if !same(known) {
                    touched.push(owner.clone());
                }
                *known = slice;
            }
            Err(place) => {
                touched.push(owner.clone());
                entry.slices.reserve_exact(1);
                entry.slices.insert(place, (key.clone(), slice));
            }
        }
        self.slice_owner.insert(key, owner);
        touched
    }

    fn drop_empty(&mut self, key: &ObjectKey) {
        if self.entries.get(key).is_some_and(|e| e.service.is_none() && e.slices.is_empty()) {
            self.entries.remove(key);
        }
    }

    fn service(&self, key: &ObjectKey) -> Option<&Service> {
        self.entries.get(key)?.service.as_ref()
    }

    /// The UID of a Service, for events on it.
    pub(crate) fn uid(&self, key: &ObjectKey) -> Option<String> {
        self.service(key).map(|service| service.uid.to_string())
    }

    /// When a Service was created, in seconds since 1970.
    pub(crate) fn created(&self, key: &ObjectKey) -> i64 {
        self.service(key).map_or(i64::MAX, |service| service.created)
    }

    /// Whether it takes long to plan a Service.
    pub(crate) fn has_many_slices(&self, key: &ObjectKey) -> bool {
        self.entries.get(key).is_some_and(|entry| entry.slices.len() >= MANY_SLICES)
    }

    /// Every Service's key.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &ObjectKey> {
        self.entries.iter().filter(|(_, entry)| entry.service.is_some()).map(|(key, _)| key)
    }

    /// The key of a Service or of slices without one, to be kept by whoever keeps it too.
    pub(crate) fn shared_key(&self, key: &ObjectKey) -> ObjectKey {
        let known = self.entries.get_key_value(key);
        known.map_or(key, |(key, _)| key).clone()
    }

    /// Every slice's key.
    pub(crate) fn slice_keys(&self) -> impl Iterator<Item = &ObjectKey> {
        self.slice_owner.keys()
    }

    /// When the change that a slice tells of happened.
    pub(crate) fn triggered(&self, slice: &ObjectKey) -> Option<Timestamp> {
        let entry = self.entries.get(self.slice_owner.get(slice)?)?;
        entry.slices[entry.place(slice).ok()?].1.triggered
    }

    /// Each port of a Service in each of these families that it has a cluster address of, with its
    /// endpoints; `None` if there is no such Service.
    pub(crate) fn ports(
        &self,
        key: &ObjectKey,
        families: &[Family],
    ) -> Option<(Vec<PortPlan<'_>>, Vec<Problem>)> {
        let entry = self.entries.get(key)?;
        let service = entry.service.as_ref()?;
        let mut plans = Vec::new();
        let mut problems = Vec::new();
        for address in service.addresses.iter() {
            let family = Family::of(address);
            if !families.contains(&family) {
                continue;
            }
            for port in &*service.ports {
                let slices = entry.slices.iter().map(|(_, slice)| slice);
                let mut eligible = Eligible::of(slices, port, family);
                let most = self.endpoints_max.unwrap_or(ENDPOINTS_MAX);
                for endpoints in [&mut eligible.cluster, &mut eligible.local] {
                    eligible.too_many |= endpoints.len() > most;
                    endpoints.truncate(most);
                }
                if eligible.too_many {
                    problems.push(Problem::new(
                        "TooManyEndpoints",
                        format!(
                            "port {} has more than {most} {} endpoints; all others get no traffic",
                            port.port,
                            family.as_str()
                        ),
                    ));
                }
                plans.push(PortPlan { service, port, family, cluster_ip: address, eligible });
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
        let service = self.service(key)?;
        let (plans, problems) = self.ports(key, families)?;
        let mut rules = ServiceRules {
            created: service.created,
            told: told(service),
            ..ServiceRules::default()
        };
        let addresses = service.addresses.iter().filter(|a| families.contains(&Family::of(*a)));
        rules.addresses.extend(addresses.map(|a| (AddressSet::ClusterAddresses, a)));
        for plan in plans {
            let hairpin = plan.own_clients().map(|e| (AddressSet::Hairpin, e.address));
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
        let ready = |family| {
            let all = self.slices_of(key).filter(|s| s.family == family);
            let local = all.flat_map(|s| s.endpoints.iter()).filter(|e| e.local && e.ready);
            local.map(|endpoint| endpoint.address).collect::<BTreeSet<_>>().len()
        };
        ready(Family::V4).max(ready(Family::V6))
    }

    /// A Service's health-check node port.
    pub(crate) fn health_check_port(&self, key: &ObjectKey) -> Option<u16> {
        self.service(key)?.outside().health_check_node_port
    }

    /// Ports of a Service whose traffic policy is Local and that have endpoints, but none of them
    /// on this node.
    pub(crate) fn without_local_endpoints(
        &self,
        key: &ObjectKey,
        families: &[Family],
    ) -> Vec<WithoutLocal> {
        let Some(service) = self.service(key) else { return Vec::new() };
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
        self.entries.get(key).into_iter().flat_map(|entry| entry.slices.iter().map(|(_, s)| s))
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
        self.service
            .outside()
            .external_ips
            .iter()
            .copied()
            .filter(|a| Family::of(*a) == self.family)
    }

    /// Load balancers' addresses.
    pub(crate) fn load_balancer_ips(&self) -> impl Iterator<Item = IpAddr> {
        self.service
            .outside()
            .load_balancer_ips
            .iter()
            .copied()
            .filter(|a| Family::of(*a) == self.family)
    }

    /// From where clients may use load balancers' addresses; `None` for anywhere. If the Service
    /// names ranges, but none of this family, nobody may.
    pub(crate) fn source_ranges(&self) -> Option<Arc<[IpNet]>> {
        let ranges = self.service.outside().source_ranges.as_ref()?;
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

    /// Endpoints that may come here as their own client.
    ///
    /// Those of other nodes may where the external policy is Local: they are inside, so they are
    /// sent to any endpoint with their own address, and may have come by this node's node port or
    /// by an address that leads here. With another policy everybody's address is hidden there.
    fn own_clients(&self) -> impl Iterator<Item = &Endpoint> {
        let from_elsewhere = match self.service.external_policy {
            TrafficPolicy::Local if self.is_for_outside() => &self.eligible.cluster[..],
            _ => &[],
        };
        self.eligible.hairpin.iter().chain(from_elsewhere)
    }

    /// Whether it has a node port or an address for the outside.
    fn is_for_outside(&self) -> bool {
        self.port.node_port.is_some()
            || self.external_ips().chain(self.load_balancer_ips()).next().is_some()
    }

    fn without_local_endpoints(&self) -> WithoutLocal {
        let nowhere = self.has_endpoints() && self.eligible.local.is_empty();
        let reachable = self.is_for_outside();
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

/// What rules with a Service's name tell of it, besides where its traffic goes.
fn told(service: &Service) -> u64 {
    let mut digest = DefaultHasher::new();
    service.ports.hash(&mut digest);
    [service.internal_policy, service.external_policy].hash(&mut digest);
    service.outside().health_check_node_port.hash(&mut digest);
    digest.finish()
}

fn with_sources(action: &Action, from: Option<Arc<[IpNet]>>) -> Action {
    let mut action = action.clone();
    if let Action::Forward { sources, .. } = &mut action {
        *sources = from;
    }
    action
}
