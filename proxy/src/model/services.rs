//! From Services of the API to what the proxy needs of them.
//!
//! What is wrong in an object is refused piece by piece and reported; the rest of the object, and
//! every other object, works on.

use std::{net::IpAddr, sync::Arc, time::Duration};

use ipnet::IpNet;
use k8s_openapi::{api::core::v1 as core, apimachinery::pkg::apis::meta::v1::ObjectMeta};

use super::{
    Family, Problem, Protocol,
    address::{external_address, range, usable_address},
    compact::{ClusterAddresses, Uid},
    ports::{port_number, service_ports},
};

/// Services with this label belong to another proxy.
pub(crate) const SERVICE_PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// `sessionAffinityConfig.clientIP.timeoutSeconds` if it isn't set.
const AFFINITY_TIMEOUT: Duration = Duration::from_secs(10_800);

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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

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
}
