//! From the API's objects to what the proxy needs of them.
//!
//! What is wrong in an object is refused piece by piece and reported; the rest of the object, and
//! every other object, works on.

use std::{net::IpAddr, sync::Arc, time::Duration};

use ipnet::IpNet;
use jiff::Timestamp;
use k8s_openapi::{
    api::{core::v1 as core, discovery::v1 as discovery},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use keelson_api::object::ObjectKey;

use super::{
    Family, Problem, Protocol,
    address::{external_address, range, usable_address},
    compact::{ClusterAddresses, Uid},
    ports::{port_number, service_ports},
};

/// Services with this label belong to another proxy.
pub(crate) const SERVICE_PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// Headless services carry this label on their slices.
pub(crate) const HEADLESS: &str = "service.kubernetes.io/headless";
/// Names the service of a slice.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// When the change that led to this slice happened.
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// `sessionAffinityConfig.clientIP.timeoutSeconds` if it isn't set.
const AFFINITY_TIMEOUT: Duration = Duration::from_secs(10_800);
/// The most addresses in one slice; the API has 1,000 as its limit.
const SLICE_ENDPOINTS: usize = 1_000;
/// The most ports in one slice; the API has 100 as its limit.
const SLICE_PORTS: usize = 100;
/// How many endpoints that are left out an event names.
const NAMED: usize = 3;
/// How much of a text that is no address an event shows.
const TEXT_MAX: usize = 64;

/// Which endpoints traffic may go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum TrafficPolicy {
    /// Any of the cluster's.
    Cluster,
    /// This node's only.
    Local,
}

impl TrafficPolicy {
    fn parse(name: Option<&str>) -> Self {
        if name == Some("Local") { Self::Local } else { Self::Cluster }
    }
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ServicePort {
    pub(crate) name: Box<str>,
    pub(crate) protocol: Protocol,
    pub(crate) port: u16,
    pub(crate) node_port: Option<u16>,
}

/// What the proxy needs of a Service. There may be tens of thousands, most of which are plain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Service {
    pub(crate) uid: Uid,
    /// Seconds since 1970: of two services that claim one address and port, the older has it.
    pub(crate) created: i64,
    /// Cluster addresses.
    pub(crate) addresses: ClusterAddresses,
    pub(crate) ports: Box<[ServicePort]>,
    pub(crate) internal_policy: TrafficPolicy,
    pub(crate) external_policy: TrafficPolicy,
    /// How long a client stays with its endpoint.
    pub(crate) affinity: Option<Duration>,
    /// What only some Services have; `None` if this one has nothing of it.
    outside: Option<Box<Outside>>,
}

/// How a Service is reached from outside the cluster, but for node ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outside {
    /// `externalIPs`, of the families that it has a cluster address of.
    pub(crate) external_ips: Vec<IpAddr>,
    /// Addresses of load balancers that hand packets on with their own address as the destination
    /// (`ipMode: VIP`).
    pub(crate) load_balancer_ips: Vec<IpAddr>,
    /// Who may use the load balancers' addresses; `None` for everybody.
    pub(crate) source_ranges: Option<Arc<[IpNet]>>,
    /// Where load balancers ask whether this node has endpoints.
    pub(crate) health_check_node_port: Option<u16>,
}

impl Outside {
    /// Nothing.
    const NONE: &Self = &Self {
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: None,
        health_check_node_port: None,
    };
}

impl Service {
    /// Reads a Service. `None` if the proxy has nothing to do with it: it has no address of its
    /// own (headless), is a DNS matter (ExternalName), or is another proxy's.
    pub(crate) fn read(object: &core::Service) -> (Option<Self>, Vec<Problem>) {
        let mut problems = Vec::new();
        let Some(spec) = &object.spec else { return (None, problems) };
        let labels = object.metadata.labels.as_ref();
        if spec.type_.as_deref() == Some("ExternalName")
            || labels.is_some_and(|l| l.contains_key(SERVICE_PROXY_NAME))
        {
            return (None, problems);
        }
        let listed = spec.cluster_ips.as_deref().unwrap_or_default();
        let texts = if listed.is_empty() { spec.cluster_ip.as_slice() } else { listed };
        if texts.is_empty() || texts.iter().any(|t| t.is_empty() || t == "None") {
            return (None, problems);
        }
        let mut addresses = ClusterAddresses::default();
        let mut in_order: Vec<IpAddr> = Vec::new();
        for text in texts {
            match usable_address(text) {
                Ok(address) if addresses.add(address) => in_order.push(address),
                Ok(address) => problems.push(Problem::new(
                    "InvalidClusterIP",
                    format!("cluster address {address} is not served: it is the second one of its family"),
                )),
                Err(why) => problems.push(Problem::new(
                    "InvalidClusterIP",
                    format!("cluster address {text:?} is not served: {why}"),
                )),
            }
        }
        for (family, address) in spec.ip_families.iter().flatten().zip(&in_order) {
            if texts.len() == in_order.len() && family != Family::of(*address).as_str() {
                problems.push(Problem::new(
                    "KubeProxyIncorrectIPVersion",
                    format!("cluster address {address} is not of the family {family} in ipFamilies; it is served as what it is"),
                ));
            }
        }
        let external = matches!(spec.type_.as_deref(), Some("NodePort" | "LoadBalancer"));
        let ports = service_ports(spec, external, &mut problems);
        let balanced = spec.type_.as_deref() == Some("LoadBalancer");
        let mut outside = |what: &str, texts: &mut dyn Iterator<Item = &str>| {
            let mut usable: Vec<IpAddr> = Vec::new();
            for text in texts {
                match external_address(text, addresses) {
                    Ok(address) if usable.contains(&address) => {}
                    Ok(address) => usable.push(address),
                    Err((reason, why)) => problems.push(Problem::new(
                        reason,
                        format!("{what} {text:?} is not served: {why}"),
                    )),
                }
            }
            usable
        };
        let external_ips = outside(
            "external address",
            &mut spec.external_ips.iter().flatten().map(String::as_str),
        );
        let ingress = object
            .status
            .iter()
            .filter_map(|status| status.load_balancer.as_ref()?.ingress.as_ref())
            .flatten()
            // `Proxy`: packets come with an address of the node as their destination.
            .filter(|ingress| balanced && ingress.ip_mode.as_deref() != Some("Proxy"));
        let load_balancer_ips =
            outside("load balancer address", &mut ingress.filter_map(|i| i.ip.as_deref()));
        let source_ranges =
            spec.load_balancer_source_ranges.as_deref().filter(|r| balanced && !r.is_empty());
        let source_ranges = source_ranges.map(|texts| read_ranges(texts, &mut problems));
        let external_policy = TrafficPolicy::parse(
            // External addresses may stand on a Service of any type.
            spec.external_traffic_policy
                .as_deref()
                .filter(|_| external || !external_ips.is_empty()),
        );
        let health_check_node_port = spec
            .health_check_node_port
            .filter(|_| balanced && external_policy == TrafficPolicy::Local)
            .and_then(port_number);
        let affinity = (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
            spec.session_affinity_config
                .as_ref()
                .and_then(|config| config.client_ip.as_ref()?.timeout_seconds)
                .and_then(|seconds| u64::try_from(seconds).ok())
                .filter(|seconds| (1..=86_400).contains(seconds))
                .map_or(AFFINITY_TIMEOUT, Duration::from_secs)
        });
        let outside =
            Outside { external_ips, load_balancer_ips, source_ranges, health_check_node_port };
        let service = Self {
            uid: Uid::new(object.metadata.uid.as_deref().unwrap_or_default()),
            created: created(&object.metadata),
            addresses,
            outside: (outside != *Outside::NONE).then(|| Box::new(outside)),
            ports: ports.into(),
            internal_policy: TrafficPolicy::parse(spec.internal_traffic_policy.as_deref()),
            external_policy,
            affinity,
        };
        (Some(service), problems)
    }

    /// How it is reached from outside.
    pub(crate) fn outside(&self) -> &Outside {
        self.outside.as_deref().unwrap_or(Outside::NONE)
    }
}

/// Ranges of clients. One that can't be read admits nobody.
fn read_ranges(texts: &[String], problems: &mut Vec<Problem>) -> Arc<[IpNet]> {
    let mut ranges: Vec<IpNet> = Vec::new();
    for text in texts {
        match range(text.trim()) {
            Some(range) => ranges.push(range),
            None => problems.push(Problem::new(
                "InvalidSourceRange",
                format!("loadBalancerSourceRanges has {text:?}, which is not a range of addresses and admits nobody"),
            )),
        }
    }
    ranges.sort_unstable();
    ranges.dedup();
    ranges.into()
}

fn created(metadata: &ObjectMeta) -> i64 {
    metadata.creation_timestamp.as_ref().map_or(i64::MAX, |t| t.0.as_second())
}

/// One endpoint of a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SliceEndpoint {
    pub(crate) address: IpAddr,
    pub(crate) ready: bool,
    pub(crate) serving: bool,
    pub(crate) terminating: bool,
    /// Whether it runs on this node.
    pub(crate) local: bool,
    /// Whether it may run on this node: so too when its node isn't named.
    pub(crate) maybe_local: bool,
    /// Whether its hints name this node.
    pub(crate) node_hint: Hint,
    /// Whether its hints name this node's zone.
    pub(crate) zone_hint: Hint,
}

/// Whom an endpoint is meant for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Hint {
    /// It doesn't say.
    #[default]
    Absent,
    /// Clients here, among others.
    Here,
    /// Clients elsewhere.
    Elsewhere,
}

impl Hint {
    fn read<'a>(names: impl Iterator<Item = &'a str>, here: Option<&str>) -> Self {
        let mut hint = Self::Absent;
        for name in names {
            if Some(name) == here {
                return Self::Here;
            }
            hint = Self::Elsewhere;
        }
        hint
    }
}

/// Where the proxy runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    /// The node's name.
    pub(crate) node: String,
    /// Its label `topology.kubernetes.io/zone`.
    pub(crate) zone: Option<String>,
}

/// What the proxy needs of an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slice {
    pub(crate) service: ObjectKey,
    pub(crate) family: Family,
    pub(crate) ports: Box<[(Box<str>, Protocol, u16)]>,
    pub(crate) endpoints: Arc<[SliceEndpoint]>,
    /// When the change that this slice tells of happened.
    pub(crate) triggered: Option<Timestamp>,
}

impl Slice {
    /// Reads an EndpointSlice as it is seen from `place`. `None` if it belongs to no service or
    /// holds names, not addresses.
    pub(crate) fn read(
        object: &discovery::EndpointSlice,
        place: &Place,
    ) -> (Option<Self>, Vec<Problem>) {
        let mut problems = Vec::new();
        let labels = object.metadata.labels.as_ref();
        let label = |name: &str| labels.and_then(|l| l.get(name)).map(String::as_str);
        let family = match object.address_type.as_str() {
            "IPv4" => Family::V4,
            "IPv6" => Family::V6,
            _ => return (None, problems),
        };
        let Some(service) = label(SERVICE_NAME).filter(|name| !name.is_empty()) else {
            return (None, problems);
        };
        if label(HEADLESS).is_some() || label(SERVICE_PROXY_NAME).is_some() {
            return (None, problems);
        }
        let name = object.metadata.name.as_deref().unwrap_or_default();
        let mut ports = Vec::new();
        let listed = object.ports.as_deref().unwrap_or_default();
        if listed.len() > SLICE_PORTS {
            problems.push(too_many("ports", name, listed.len(), SLICE_PORTS));
        }
        for port in listed.iter().take(SLICE_PORTS) {
            let protocol = Protocol::parse(port.protocol.as_deref());
            // A port without a number stands for all ports, which a proxy can't serve.
            let (Some(protocol), Some(number)) = (protocol, port.port) else { continue };
            match port_number(number) {
                Some(number) => {
                    let name = port.name.as_deref().unwrap_or_default();
                    ports.push((name.into(), protocol, number));
                }
                None => problems.push(Problem::new(
                    "InvalidEndpointSlice",
                    format!("port {number} of slice {name} is not a port number and is left out"),
                )),
            }
        }
        let listed = object.endpoints.as_deref().unwrap_or_default();
        if listed.len() > SLICE_ENDPOINTS {
            problems.push(too_many("endpoints", name, listed.len(), SLICE_ENDPOINTS));
        }
        let mut endpoints = Vec::new();
        let mut left_out = Vec::new();
        for endpoint in listed.iter().take(SLICE_ENDPOINTS) {
            // All addresses of an endpoint are the same place; the first is the one to use.
            let Some(text) = endpoint.addresses.first() else { continue };
            match usable_address(text) {
                Ok(address) if Family::of(address) == family => {
                    endpoints.push(slice_endpoint(address, endpoint, place));
                }
                Ok(_) => left_out.push((text, "it is not of the slice's address type")),
                Err(why) => left_out.push((text, why)),
            }
        }
        problems.extend(left_out_of(name, &left_out));
        let triggered = object
            .metadata
            .annotations
            .as_ref()
            .and_then(|a| a.get(TRIGGER_TIME)?.parse::<Timestamp>().ok());
        let namespace = object.metadata.namespace.clone().unwrap_or_default();
        let slice = Self {
            service: ObjectKey::new(namespace, service),
            family,
            ports: ports.into(),
            endpoints: endpoints.into(),
            triggered,
        };
        (Some(slice), problems)
    }
}

fn too_many(what: &str, slice: &str, there: usize, most: usize) -> Problem {
    Problem::new(
        "InvalidEndpointSlice",
        format!("slice {slice} has {there} {what}; those after the first {most} are left out"),
    )
}

/// One event for all of a slice's endpoints that are of no use: there may be a thousand of them, and
/// other events must not be lost for it.
fn left_out_of(slice: &str, endpoints: &[(&String, &'static str)]) -> Option<Problem> {
    // What the API server would never let through may have any length.
    let shown = |text: &str| text.chars().take(TEXT_MAX).collect::<String>();
    let named: Vec<String> = endpoints
        .iter()
        .take(NAMED)
        .map(|(text, why)| format!("{:?}: {why}", shown(text)))
        .collect();
    let message = match endpoints.len() {
        0 => return None,
        count if count > NAMED => format!(
            "{count} endpoints of slice {slice} are left out ({}, and {} more)",
            named.join("; "),
            count - NAMED
        ),
        1 => format!("1 endpoint of slice {slice} is left out ({})", named.join("; ")),
        count => {
            format!("{count} endpoints of slice {slice} are left out ({})", named.join("; "))
        }
    };
    Some(Problem::new("InvalidEndpointSlice", message))
}

fn slice_endpoint(address: IpAddr, endpoint: &discovery::Endpoint, place: &Place) -> SliceEndpoint {
    let conditions = endpoint.conditions.as_ref();
    // Absent means ready (discovery.k8s.io/v1, EndpointConditions).
    let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
    let local = endpoint.node_name.as_deref() == Some(&place.node);
    let hints = endpoint.hints.as_ref();
    let nodes = hints.and_then(|h| h.for_nodes.as_deref()).unwrap_or_default();
    let zones = hints.and_then(|h| h.for_zones.as_deref()).unwrap_or_default();
    SliceEndpoint {
        address,
        ready,
        serving: conditions.and_then(|c| c.serving).unwrap_or(ready),
        terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
        local,
        maybe_local: local || endpoint.node_name.is_none(),
        node_hint: Hint::read(nodes.iter().map(|n| n.name.as_str()), Some(&place.node)),
        zone_hint: Hint::read(zones.iter().map(|z| z.name.as_str()), place.zone.as_deref()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn slice(value: serde_json::Value) -> (Option<Slice>, Vec<Problem>) {
        let place = Place { node: "here".into(), zone: Some("a".into()) };
        Slice::read(&serde_json::from_value(value).unwrap(), &place)
    }

    fn service(value: serde_json::Value) -> (Option<Service>, Vec<Problem>) {
        let object = json!({"metadata": {"name": "s", "namespace": "d"}, "spec": value});
        Service::read(&serde_json::from_value(object).unwrap())
    }

    #[test]
    fn services_without_an_address_are_ignored() {
        for spec in [
            json!({"clusterIP": "None", "ports": [{"port": 80}]}),
            json!({"type": "ExternalName", "externalName": "example.org"}),
            json!({"ports": [{"port": 80}]}),
            json!({"clusterIP": "", "ports": [{"port": 80}]}),
        ] {
            assert_eq!(service(spec.clone()), (None, vec![]), "{spec}");
        }
    }

    #[test]
    fn a_bad_port_or_address_leaves_the_others_alone() {
        let (read, problems) = service(json!({
            "type": "NodePort", "clusterIP": "10.96.0.5", "clusterIPs": ["10.96.0.5", "127.0.0.1"],
            "ports": [{"port": 80, "nodePort": 30080}, {"port": 0}, {"port": 81, "protocol": "X"},
                      {"port": 53, "protocol": "UDP", "name": "dns"}],
        }));
        let read = read.unwrap();
        assert!(read.addresses.iter().eq(["10.96.0.5".parse::<IpAddr>().unwrap()]));
        assert_eq!(read.ports.iter().map(|p| p.port).collect::<Vec<_>>(), [80, 53]);
        assert_eq!(read.ports[0].node_port, Some(30080));
        assert_eq!(problems.len(), 3, "{problems:?}");
    }

    #[test]
    fn addresses_for_the_outside_are_those_of_families_that_it_has() {
        let object = json!({
            "metadata": {"name": "s", "namespace": "d"},
            "spec": {
                "type": "LoadBalancer", "clusterIP": "10.96.0.5", "externalTrafficPolicy": "Local",
                "externalIPs": ["192.0.2.1", "fd00::1", "192.0.2.1", "127.0.0.1"],
                "healthCheckNodePort": 30_100, "ports": [{"port": 80, "nodePort": 0}],
                "loadBalancerSourceRanges": [" 198.51.100.9/24 ", "x"],
            },
            "status": {"loadBalancer": {"ingress": [
                {"ip": "192.0.2.7"}, {"ip": "192.0.2.8", "ipMode": "Proxy"},
                {"ip": "192.0.2.9", "ipMode": "VIP"}, {"hostname": "lb.example"},
            ]}},
        });
        let (read, problems) = Service::read(&serde_json::from_value(object).unwrap());
        let read = read.unwrap();
        let texts = |ips: &[IpAddr]| ips.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(texts(&read.outside().external_ips), ["192.0.2.1"]);
        assert_eq!(texts(&read.outside().load_balancer_ips), ["192.0.2.7", "192.0.2.9"]);
        assert_eq!(
            read.outside().source_ranges.as_deref(),
            Some(&["198.51.100.0/24".parse().unwrap()][..])
        );
        assert_eq!(read.outside().health_check_node_port, Some(30_100));
        assert_eq!(read.ports[0].node_port, None);
        let reasons: Vec<_> = problems.iter().map(|p| p.reason).collect();
        let expected = ["KubeProxyIncorrectIPVersion", "InvalidExternalIP", "InvalidSourceRange"];
        assert_eq!(reasons, expected, "{problems:?}");
    }

    #[test]
    fn a_health_check_port_is_for_load_balancers_with_the_policy_local() {
        for (kind, policy, expected) in [
            ("LoadBalancer", "Local", Some(30_100)),
            ("LoadBalancer", "Cluster", None),
            ("NodePort", "Local", None),
        ] {
            let (read, _) = service(json!({"type": kind, "clusterIP": "10.96.0.5",
                "externalTrafficPolicy": policy, "healthCheckNodePort": 30_100}));
            let found = read.unwrap().outside().health_check_node_port;
            assert_eq!(found, expected, "{kind} {policy}");
        }
    }

    #[test]
    fn a_slice_without_any_use_is_one_event_and_bounded() {
        let endpoints: Vec<_> = (0..3_000).map(|_| json!({"addresses": ["::1"]})).collect();
        let ports: Vec<_> =
            (0..300).map(|n| json!({"name": format!("p{n}"), "port": 80})).collect();
        let (read, problems) = slice(json!({
            "metadata": {"name": "s-1", "namespace": "d", "labels": {"kubernetes.io/service-name": "s"}},
            "addressType": "IPv6", "ports": ports, "endpoints": endpoints,
        }));
        assert_eq!(read.unwrap().ports.len(), SLICE_PORTS);
        let messages: Vec<&str> = problems.iter().map(|p| &*p.message).collect();
        let [ports, endpoints, left_out] = messages[..] else { panic!("{messages:?}") };
        assert_eq!(ports, "slice s-1 has 300 ports; those after the first 100 are left out");
        assert_eq!(
            endpoints,
            "slice s-1 has 3000 endpoints; those after the first 1000 are left out"
        );
        assert!(
            left_out.starts_with("1000 endpoints of slice s-1 are left out (\"::1\""),
            "{left_out}"
        );
        assert!(left_out.ends_with("and 997 more)") && left_out.len() < 300, "{left_out}");
    }

    #[test]
    fn slices_that_are_another_ones_or_nobodys_are_ignored() {
        let read = |label: Option<&str>| {
            let mut labels = json!({"kubernetes.io/service-name": "s"});
            label.into_iter().for_each(|label| labels[label] = "".into());
            slice(json!({"metadata": {"name": "s-1", "namespace": "d", "labels": labels},
                "addressType": "IPv4", "endpoints": [{"addresses": ["10.0.0.1"]}]}))
        };
        assert!(read(None).0.is_some());
        for label in [HEADLESS, SERVICE_PROXY_NAME, SERVICE_NAME] {
            assert_eq!(read(Some(label)), (None, vec![]), "{label}");
        }
    }

    #[test]
    fn absent_conditions_mean_ready_and_serving() {
        let (read, problems) = slice(json!({
            "metadata": {"name": "s-1", "namespace": "d", "labels": {"kubernetes.io/service-name": "s"}},
            "addressType": "IPv4", "ports": [{"name": "", "port": 80}, {"name": "all"}, {"name": "z", "port": 0}],
            "endpoints": [
                {"addresses": ["10.0.0.1"], "nodeName": "here",
                 "hints": {"forNodes": [{"name": "there"}], "forZones": [{"name": "b"}, {"name": "a"}]}},
                {"addresses": ["10.0.0.2"], "conditions": {"ready": false, "serving": true, "terminating": true}},
                {"addresses": ["127.0.0.1"]}, {"addresses": ["fd00::1"]}, {"addresses": []},
            ],
        }));
        let read = read.unwrap();
        assert_eq!(read.ports, [(Box::from(""), Protocol::Tcp, 80)].into());
        let messages: Vec<&str> = problems.iter().map(|p| &*p.message).collect();
        assert_eq!(
            messages,
            [
                "port 0 of slice s-1 is not a port number and is left out",
                "2 endpoints of slice s-1 are left out (\"127.0.0.1\": it is a loopback address; \
                 \"fd00::1\": it is not of the slice's address type)",
            ]
        );
        let [first, second] = &read.endpoints[..] else { panic!("{:?}", read.endpoints) };
        assert!(first.ready && first.serving && !first.terminating && first.local);
        assert_eq!((first.node_hint, first.zone_hint), (Hint::Elsewhere, Hint::Here));
        assert_eq!((second.node_hint, second.zone_hint), (Hint::Absent, Hint::Absent));
        assert!(!second.ready && second.serving && second.terminating && second.maybe_local);
    }
}
