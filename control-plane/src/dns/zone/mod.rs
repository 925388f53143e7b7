//! The cluster's zone: what the Kubernetes DNS specification (version 1.1.0) says each Service,
//! endpoint and pod is called. Kept up to date object by object; answering is a pure function.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use hickory_proto::rr::{
    Name, RData, Record, RecordType,
    rdata::{A, AAAA, CNAME, NS, PTR, SOA, SRV, TXT},
};
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use keelson_api::object::ObjectKey;

/// How long answers may be kept, in seconds (CoreDNS' default for cluster names).
const TTL: u32 = 5;
/// The version of the specification, as `dns-version` tells it.
const SPECIFICATION: &str = "1.1.0";

#[derive(Clone, Debug, PartialEq, Eq)]
struct Port {
    name: String,
    protocol: String,
    number: u16,
}

impl Port {
    /// A port of a Service or of a slice; `None` if its number is none.
    fn read(name: Option<&String>, protocol: Option<&String>, number: i32) -> Option<Self> {
        Some(Self {
            name: name.cloned().unwrap_or_default(),
            protocol: protocol.map_or("TCP", String::as_str).to_owned(),
            number: u16::try_from(number).ok()?,
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    /// Has addresses of its own.
    Cluster(Vec<IpAddr>),
    /// Is known by its endpoints.
    Headless,
    /// Is another name.
    External(String),
}

#[derive(Clone, Debug)]
struct ServiceEntry {
    kind: Kind,
    ports: Vec<Port>,
}

#[derive(Clone, Debug)]
struct EndpointEntry {
    address: IpAddr,
    /// Its host name, or its address with dashes.
    label: String,
    ports: Vec<Port>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Zone {
    /// Without a dot at its end, in lower case.
    domain: String,
    namespaces: HashSet<String>,
    services: HashMap<ObjectKey, ServiceEntry>,
    /// Ready endpoints by Service, then by slice.
    endpoints: HashMap<ObjectKey, BTreeMap<String, Vec<EndpointEntry>>>,
    slice_owner: HashMap<ObjectKey, ObjectKey>,
    /// Which Services have an address, theirs or an endpoint's.
    by_address: HashMap<IpAddr, HashSet<ObjectKey>>,
}

/// What the zone knows of a name.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Lookup {
    /// Records, and others that help.
    Records(Vec<Record>, Vec<Record>),
    /// The name is another one's, which may be outside.
    Alias(Box<Record>, Name),
    /// The name is there, but has no such records.
    NoRecords,
    /// There is no such name.
    NoName,
    /// The name is not the cluster's: ask elsewhere.
    NotOurs,
}

impl Zone {
    /// An empty zone for a domain (`cluster.local`).
    pub(crate) fn new(domain: &str) -> Self {
        Self {
            domain: domain.trim_matches('.').to_ascii_lowercase(),
            namespaces: HashSet::new(),
            services: HashMap::new(),
            endpoints: HashMap::new(),
            slice_owner: HashMap::new(),
            by_address: HashMap::new(),
        }
    }

    pub(crate) fn set_namespace(&mut self, name: &str, exists: bool) {
        if exists {
            self.namespaces.insert(name.to_owned());
        } else {
            self.namespaces.remove(name);
        }
    }

    /// Takes in a Service as it is now, or that it is gone.
    pub(crate) fn set_service(&mut self, key: &ObjectKey, service: Option<&Service>) {
        if let Some(old) = self.services.remove(key)
            && let Kind::Cluster(addresses) = old.kind
        {
            for address in addresses {
                self.forget_address(address, key);
            }
        }
        let Some(entry) = service.and_then(service_entry) else { return };
        if let Kind::Cluster(addresses) = &entry.kind {
            for address in addresses {
                self.by_address.entry(*address).or_default().insert(key.clone());
            }
        }
        self.services.insert(key.clone(), entry);
    }

    /// Takes in a slice as it is now, or that it is gone.
    pub(crate) fn set_slice(&mut self, key: &ObjectKey, slice: Option<&EndpointSlice>) {
        if let Some(owner) = self.slice_owner.remove(key)
            && let Some(slices) = self.endpoints.get_mut(&owner)
        {
            let old = slices.remove(key.name()).unwrap_or_default();
            let still: HashSet<IpAddr> = slices.values().flatten().map(|e| e.address).collect();
            if slices.is_empty() {
                self.endpoints.remove(&owner);
            }
            for endpoint in old.iter().filter(|e| !still.contains(&e.address)) {
                self.forget_address(endpoint.address, &owner);
            }
        }
        let Some(slice) = slice else { return };
        let labels = slice.metadata.labels.as_ref();
        let Some(service) = labels.and_then(|l| l.get("kubernetes.io/service-name")) else {
            return;
        };
        let owner = ObjectKey::new(key.namespace(), service);
        let entries = endpoint_entries(slice);
        for entry in &entries {
            self.by_address.entry(entry.address).or_default().insert(owner.clone());
        }
        self.slice_owner.insert(key.clone(), owner.clone());
        self.endpoints.entry(owner).or_default().insert(key.name().to_owned(), entries);
    }

    fn forget_address(&mut self, address: IpAddr, key: &ObjectKey) {
        if let Some(services) = self.by_address.get_mut(&address) {
            services.remove(key);
            if services.is_empty() {
                self.by_address.remove(&address);
            }
        }
    }

    /// Answers for a name, given in full.
    pub(crate) fn lookup(&self, name: &Name, kind: RecordType) -> Lookup {
        let text = name.to_ascii().to_ascii_lowercase();
        let text = text.trim_end_matches('.');
        if let Some(address) = reverse_address(text) {
            return self.reverse(name, address, kind);
        }
        let Some(rest) = text.strip_suffix(&self.domain) else { return Lookup::NotOurs };
        if rest.is_empty() {
            return self.apex(name, kind);
        }
        let Some(rest) = rest.strip_suffix('.') else { return Lookup::NotOurs };
        let labels: Vec<&str> = rest.split('.').collect();
        let empty = |exists: bool| if exists { Lookup::NoRecords } else { Lookup::NoName };
        match labels.as_slice() {
            ["dns-version"] if kind == RecordType::TXT => {
                let text = TXT::new(vec![SPECIFICATION.to_owned()]);
                records(vec![record(name, RData::TXT(text))])
            }
            ["dns-version" | "svc" | "pod" | "dns"] => Lookup::NoRecords,
            ["ns", "dns"] => self.server(name, kind),
            [namespace, "svc" | "pod"] => empty(self.namespaces.contains(*namespace)),
            [address, namespace, "pod"] => self.pod(name, address, namespace, kind),
            [service, namespace, "svc"] => {
                self.service(name, &ObjectKey::new(*namespace, *service), kind)
            }
            [endpoint, service, namespace, "svc"] if !endpoint.starts_with('_') => {
                self.endpoint(name, &ObjectKey::new(*namespace, *service), endpoint, kind)
            }
            [protocol, service, namespace, "svc"] => {
                let key = ObjectKey::new(*namespace, *service);
                let known = self.ports_of(&key).iter().any(|port| port.is_called("", protocol));
                empty(known)
            }
            [port, protocol, service, namespace, "svc"] => {
                let key = ObjectKey::new(*namespace, *service);
                self.port(name, &key, Some((port, protocol)), kind)
            }
            _ => Lookup::NoName,
        }
    }

    /// The record that says for how long a name's absence may be remembered.
    pub(crate) fn authority(&self) -> Option<Record> {
        let apex = self.name("").ok()?;
        let soa = SOA::new(
            self.name("ns.dns.").ok()?,
            self.name("hostmaster.").ok()?,
            1,
            7_200,
            1_800,
            86_400,
            TTL,
        );
        Some(record(&apex, RData::SOA(soa)))
    }

    fn name(&self, prefix: &str) -> Result<Name, hickory_proto::ProtoError> {
        Name::from_ascii(format!("{prefix}{}.", self.domain))
    }

    fn apex(&self, name: &Name, kind: RecordType) -> Lookup {
        let found = match kind {
            RecordType::SOA => self.authority(),
            RecordType::NS => {
                self.name("ns.dns.").ok().map(|server| record(name, RData::NS(NS(server))))
            }
            _ => None,
        };
        found.map_or(Lookup::NoRecords, |found| records(vec![found]))
    }

    /// The name server that the zone names: the Service of cluster DNS.
    fn server(&self, name: &Name, kind: RecordType) -> Lookup {
        match self.services.get(&ObjectKey::new("kube-system", "kube-dns")) {
            Some(ServiceEntry { kind: Kind::Cluster(own), .. }) => addresses(name, own, kind),
            _ => Lookup::NoRecords,
        }
    }

    /// `10-244-0-5.namespace.pod`: the address that the name says, if the namespace exists
    /// (CoreDNS' mode `pods insecure`, which the documentation describes).
    fn pod(&self, name: &Name, address: &str, namespace: &str, kind: RecordType) -> Lookup {
        let address = dashed_address(address);
        match address.filter(|_| self.namespaces.contains(namespace)) {
            Some(address) => addresses(name, &[address], kind),
            None => Lookup::NoName,
        }
    }

    fn service(&self, name: &Name, key: &ObjectKey, kind: RecordType) -> Lookup {
        let Some(service) = self.services.get(key) else { return Lookup::NoName };
        if kind == RecordType::SRV {
            return self.port(name, key, None, kind);
        }
        match &service.kind {
            Kind::Cluster(own) => addresses(name, own, kind),
            Kind::Headless => {
                let mut all: Vec<IpAddr> =
                    self.endpoints_of(key).map(|endpoint| endpoint.address).collect();
                all.sort_unstable();
                all.dedup();
                addresses(name, &all, kind)
            }
            Kind::External(target) => match Name::from_ascii(format!("{target}.")) {
                Ok(target) => {
                    let alias = record(name, RData::CNAME(CNAME(target.clone())));
                    Lookup::Alias(Box::new(alias), target)
                }
                Err(_) => Lookup::NoRecords,
            },
        }
    }

    fn endpoint(&self, name: &Name, key: &ObjectKey, label: &str, kind: RecordType) -> Lookup {
        let found: Vec<IpAddr> = self
            .endpoints_of(key)
            .filter(|endpoint| endpoint.label == label)
            .map(|endpoint| endpoint.address)
            .collect();
        if found.is_empty() { Lookup::NoName } else { addresses(name, &found, kind) }
    }

    /// `_port._protocol.service`: SRV records; without a port those of all.
    fn port(
        &self,
        name: &Name,
        key: &ObjectKey,
        wanted: Option<(&str, &str)>,
        kind: RecordType,
    ) -> Lookup {
        let Some(service) = self.services.get(key) else { return Lookup::NoName };
        let fits = |port: &&Port| {
            wanted.is_none_or(|(name, protocol)| {
                !port.name.is_empty() && port.is_called(name, protocol)
            })
        };
        let base = format!("{}.{}.svc.", key.name(), key.namespace());
        let mut found = Vec::new();
        let mut extra = Vec::new();
        let mut add = |target: &str, port: u16, hosts: &[IpAddr]| {
            let Ok(target) = self.name(target) else { return };
            for address in hosts {
                let addition = record(&target, address_data(*address));
                if !extra.contains(&addition) {
                    extra.push(addition);
                }
            }
            // The weight is shared equally, as CoreDNS does with few targets.
            found.push(record(name, RData::SRV(SRV::new(0, 100, port, target))));
        };
        match &service.kind {
            Kind::Cluster(own) => {
                for port in service.ports.iter().filter(fits) {
                    add(&base, port.number, own);
                }
            }
            Kind::Headless => {
                for endpoint in self.endpoints_of(key) {
                    for port in endpoint.ports.iter().filter(fits) {
                        let target = format!("{}.{base}", endpoint.label);
                        add(&target, port.number, &[endpoint.address]);
                    }
                }
            }
            Kind::External(_) => {}
        }
        match (found.is_empty(), kind) {
            (true, _) if wanted.is_some() => Lookup::NoName,
            (true, _) => Lookup::NoRecords,
            (false, RecordType::SRV) => Lookup::Records(found, extra),
            (false, _) => Lookup::NoRecords,
        }
    }

    /// All ports that a Service is known by.
    fn ports_of(&self, key: &ObjectKey) -> Vec<Port> {
        let Some(service) = self.services.get(key) else { return Vec::new() };
        match service.kind {
            Kind::Headless => self.endpoints_of(key).flat_map(|e| e.ports.clone()).collect(),
            _ => service.ports.clone(),
        }
    }

    fn endpoints_of(&self, key: &ObjectKey) -> impl Iterator<Item = &EndpointEntry> {
        let headless = self.services.get(key).is_some_and(|service| service.kind == Kind::Headless);
        self.endpoints
            .get(key)
            .filter(|_| headless)
            .into_iter()
            .flat_map(|slices| slices.values().flatten())
    }

    fn reverse(&self, name: &Name, address: IpAddr, kind: RecordType) -> Lookup {
        let mut names = Vec::new();
        for key in self.by_address.get(&address).into_iter().flatten() {
            let base = format!("{}.{}.svc.", key.name(), key.namespace());
            match self.services.get(key).map(|service| &service.kind) {
                Some(Kind::Cluster(own)) if own.contains(&address) => names.push(base),
                Some(Kind::Headless) => {
                    let own = self.endpoints_of(key).filter(|e| e.address == address);
                    names.extend(own.map(|e| format!("{}.{base}", e.label)));
                }
                _ => {}
            }
        }
        names.sort();
        names.dedup();
        let found: Vec<Record> = names
            .iter()
            .filter_map(|target| self.name(target).ok())
            .map(|target| record(name, RData::PTR(PTR(target))))
            .collect();
        match (found.is_empty(), kind) {
            (true, _) => Lookup::NotOurs,
            (false, RecordType::PTR) => records(found),
            (false, _) => Lookup::NoRecords,
        }
    }
}

impl Port {
    /// Whether `_name` and `_protocol` mean it; an empty name means any.
    fn is_called(&self, name: &str, protocol: &str) -> bool {
        let is = |label: &str, value: &str| {
            label.strip_prefix('_').is_some_and(|label| label.eq_ignore_ascii_case(value))
        };
        (name.is_empty() || is(name, &self.name)) && is(protocol, &self.protocol)
    }
}

fn service_entry(service: &Service) -> Option<ServiceEntry> {
    let spec = service.spec.as_ref()?;
    let kind = match (spec.type_.as_deref(), spec.cluster_ip.as_deref()) {
        (Some("ExternalName"), _) => {
            let target = spec.external_name.as_deref()?.trim_end_matches('.');
            Kind::External(target.to_ascii_lowercase())
        }
        (_, Some("None")) => Kind::Headless,
        (_, own) => {
            let mut all: Vec<IpAddr> = spec
                .cluster_ips
                .iter()
                .flatten()
                .map(String::as_str)
                .chain(own)
                .filter_map(|address| address.parse().ok())
                .collect();
            all.sort_unstable();
            all.dedup();
            Kind::Cluster(all)
        }
    };
    let ports = spec
        .ports
        .iter()
        .flatten()
        .filter_map(|port| Port::read(port.name.as_ref(), port.protocol.as_ref(), port.port))
        .collect();
    Some(ServiceEntry { kind, ports })
}

fn endpoint_entries(slice: &EndpointSlice) -> Vec<EndpointEntry> {
    let ports: Vec<Port> = slice
        .ports
        .iter()
        .flatten()
        .filter_map(|port| Port::read(port.name.as_ref(), port.protocol.as_ref(), port.port?))
        .collect();
    slice
        .endpoints
        .iter()
        .flatten()
        // Documented: no condition means ready.
        .filter(|e| e.conditions.as_ref().and_then(|c| c.ready) != Some(false))
        .filter_map(|endpoint| {
            let address: IpAddr = endpoint.addresses.first()?.parse().ok()?;
            let label = match endpoint.hostname.as_deref() {
                Some(hostname) if !hostname.is_empty() => hostname.to_ascii_lowercase(),
                _ => address.to_string().replace(['.', ':'], "-"),
            };
            Some(EndpointEntry { address, label, ports: ports.clone() })
        })
        .collect()
}

fn record(name: &Name, data: RData) -> Record {
    Record::from_rdata(name.clone(), TTL, data)
}

fn records(records: Vec<Record>) -> Lookup {
    Lookup::Records(records, Vec::new())
}

fn address_data(address: IpAddr) -> RData {
    match address {
        IpAddr::V4(address) => RData::A(A(address)),
        IpAddr::V6(address) => RData::AAAA(AAAA(address)),
    }
}

fn addresses(name: &Name, all: &[IpAddr], kind: RecordType) -> Lookup {
    let found: Vec<Record> = all
        .iter()
        .filter(|address| match kind {
            RecordType::A => address.is_ipv4(),
            RecordType::AAAA => address.is_ipv6(),
            RecordType::ANY => true,
            _ => false,
        })
        .map(|address| record(name, address_data(*address)))
        .collect();
    if found.is_empty() { Lookup::NoRecords } else { records(found) }
}

/// `10-244-0-5`, or an IPv6 address with dashes for its colons.
fn dashed_address(text: &str) -> Option<IpAddr> {
    if text.split('-').count() == 4
        && let Ok(address) = text.replace('-', ".").parse::<Ipv4Addr>()
    {
        return Some(address.into());
    }
    text.replace('-', ":").parse::<Ipv6Addr>().ok().map(IpAddr::from)
}

/// The address that a name under `in-addr.arpa` or `ip6.arpa` stands for.
fn reverse_address(text: &str) -> Option<IpAddr> {
    if let Some(rest) = text.strip_suffix(".in-addr.arpa") {
        let parts: Vec<u8> =
            rest.split('.').rev().map(str::parse).collect::<Result<_, _>>().ok()?;
        let parts: [u8; 4] = parts.try_into().ok()?;
        return Some(Ipv4Addr::from(parts).into());
    }
    let rest = text.strip_suffix(".ip6.arpa")?;
    let digits: Vec<&str> = rest.split('.').rev().collect();
    if digits.len() != 32 || digits.iter().any(|digit| digit.len() != 1) {
        return None;
    }
    let number = u128::from_str_radix(&digits.concat(), 16).ok()?;
    Some(Ipv6Addr::from(number).into())
}

#[cfg(test)]
mod tests;
