//! Why no rule is for a packet although a Service has its address or port.

use std::net::IpAddr;

use k8s_openapi::api::core::v1 as core;
use keelson_api::object::ObjectKey;

use super::{Explanation, Packet, Verdict};
use crate::{
    Protocol,
    config::{Mode, NodePortAddresses},
    model::{Family, services::SERVICE_PROXY_NAME},
    ruleset::{AddressSet, Frontend, Lane},
    snapshot::Snapshot,
};

/// What of a Service is left to others, and why.
#[derive(Debug)]
pub(crate) struct Unserved {
    why: String,
    addresses: Vec<IpAddr>,
    node_ports: Vec<(Protocol, u16)>,
}

impl Unserved {
    /// What of a Service is somebody else's.
    pub(crate) fn of(object: &core::Service) -> Option<Self> {
        let key = ObjectKey::of(&object.metadata);
        let spec = object.spec.as_ref()?;
        let ingress =
            object.status.iter().filter_map(|s| s.load_balancer.as_ref()?.ingress.as_ref());
        let ingress = || ingress.clone().flatten();
        let parsed = |texts: &mut dyn Iterator<Item = &String>| -> Vec<IpAddr> {
            texts.filter_map(|text| text.parse().ok()).collect()
        };
        if let Some(other) = object.metadata.labels.as_ref().and_then(|l| l.get(SERVICE_PROXY_NAME))
        {
            let texts = spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip);
            let mut texts = texts
                .chain(spec.external_ips.iter().flatten())
                .chain(ingress().filter_map(|ingress| ingress.ip.as_ref()));
            let ports = spec.ports.iter().flatten().filter_map(|port| {
                let protocol = port.protocol.as_deref().unwrap_or("TCP").parse().ok()?;
                Some((protocol, u16::try_from(port.node_port?).ok()?))
            });
            return Some(Self {
                why: format!(
                    "it is the Service {key}'s, whose label {SERVICE_PROXY_NAME}: {other} leaves it \
                     to another proxy"
                ),
                addresses: parsed(&mut texts),
                node_ports: ports.collect(),
            });
        }
        let by_proxy = ingress().filter(|ingress| ingress.ip_mode.as_deref() == Some("Proxy"));
        let addresses = parsed(&mut by_proxy.filter_map(|ingress| ingress.ip.as_ref()));
        (!addresses.is_empty()).then(|| Self {
            why: format!(
                "it is a load balancer's address of the Service {key} with ipMode: Proxy: packets \
                 go to the load balancer itself, which sends them on to a node port"
            ),
            addresses,
            node_ports: Vec::new(),
        })
    }
}

impl Snapshot {
    /// Why others serve the packet's address.
    pub(super) fn left_to_others(&self, packet: &Packet) -> Option<&str> {
        let mut unserved = self.unserved.iter();
        let found = unserved.find(|unserved| {
            unserved.addresses.contains(&packet.to)
                || self.answers_on_node_ports(packet.to)
                    && unserved.node_ports.contains(&(packet.protocol, packet.port))
        });
        found.map(|unserved| &*unserved.why)
    }

    /// Enters why nobody serves a packet, or that the proxy itself does.
    pub(super) fn not_served(&self, packet: &Packet, answer: &mut Explanation) {
        if let Some(key) = self.health_check(packet) {
            answer.verdict = Verdict::Answered;
            let count = self.objects.local_ready(key);
            answer.reason = match count {
                0 => "none of the Service's endpoints on this node is ready: 503".into(),
                1 => "one of the Service's endpoints on this node is ready: 200".into(),
                n => format!("{n} of the Service's endpoints on this node are ready: 200"),
            };
            answer.service = Some(key.to_string());
            answer.service_port = Some(packet.port.to_string());
            answer.reached_as = Some("health check node port");
        } else if let Some(why) = self.left_to_others(packet) {
            answer.reason = why.to_owned();
        } else if let Some(owner) = self.node_port_elsewhere(packet) {
            let why = self.why_no_node_port(packet.to);
            answer.reason = format!("{} is a node port of {owner}, but {why}", packet.port);
        } else {
            answer.reason = "no Service has this address and port".into();
        }
    }

    /// The Service whose health check node port a packet goes to.
    fn health_check(&self, packet: &Packet) -> Option<&ObjectKey> {
        let to = packet.to;
        let node = self.desired.has_address(AddressSet::NodeAddresses, to);
        let listened = match &self.config.node_port_addresses {
            NodePortAddresses::Primary => node,
            NodePortAddresses::Ranges(ranges) => {
                (node || to.is_loopback() || self.is_the_nodes(to))
                    && ranges.iter().any(|range| range.contains(&to))
            }
        };
        if !listened || packet.protocol != Protocol::Tcp {
            return None;
        }
        let keys = self.objects.keys();
        let wanted = keys.filter(|key| self.objects.health_check_port(key) == Some(packet.port));
        // The older of two has it.
        wanted.min_by_key(|key| (self.objects.created(key), *key))
    }

    /// Whose node port it would be at another address.
    fn node_port_elsewhere(&self, packet: &Packet) -> Option<&ObjectKey> {
        if self.answers_on_node_ports(packet.to) {
            return None;
        }
        let (family, protocol, port) = (Family::of(packet.to), packet.protocol, packet.port);
        let frontend = Frontend { family, lane: Lane::NodePort, address: None, protocol, port };
        self.desired.owner(&frontend)
    }

    /// Why node ports don't answer at an address.
    fn why_no_node_port(&self, to: IpAddr) -> String {
        let known =
            self.desired.has_address(AddressSet::NodeAddresses, to) || self.is_the_nodes(to);
        let outside = match &self.config.node_port_addresses {
            NodePortAddresses::Primary => known,
            NodePortAddresses::Ranges(ranges) => !ranges.iter().any(|range| range.contains(&to)),
        };
        if to.is_loopback() && !self.serves_loopback(to) {
            return match self.config.mode {
                Mode::Nftables => "the nftables mode serves none on loopback".into(),
                Mode::Iptables if to.is_ipv6() => {
                    "the iptables mode serves none on the loopback address of IPv6".into()
                }
                Mode::Iptables | Mode::Userspace => {
                    "none are served on loopback (localhostNodePorts)".into()
                }
            };
        }
        if known || to.is_loopback() && outside {
            format!("node ports don't answer at {to} (nodePortAddresses)")
        } else {
            format!("{to} is not known to be an address of this node")
        }
    }
}
