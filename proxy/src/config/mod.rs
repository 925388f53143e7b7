//! What the proxy can be told.

mod document;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use ipnet::IpNet;

pub use document::REMOVE_STALE_TCP;

use crate::model::Family;

/// How rules are put into force.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// nftables, written over netlink.
    #[default]
    Nftables,
    /// iptables, by `iptables-restore`.
    Iptables,
    /// Relays in this process, without any packet filter. Endpoints don't see clients' addresses.
    Userspace,
}

impl Mode {
    /// As it stands in `KubeProxyConfiguration` and on `/proxyMode`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
            Self::Userspace => "userspace",
        }
    }
}

/// How traffic of this node's pods is told from traffic of others (`detectLocalMode`). What comes
/// to a cluster address from elsewhere is masqueraded, and pods may use addresses for the outside
/// as if they were cluster addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DetectLocal {
    /// Nothing is known to come from pods, so nothing is masqueraded for coming from elsewhere.
    #[default]
    Nothing,
    /// Pods are those with a source address in these ranges: `clusterCIDR`.
    Ranges(Vec<IpNet>),
    /// The ranges are the node's own `spec.podCIDRs`, which the proxy waits for at its start.
    NodeCidr,
    /// Pods are behind this interface: `bridgeInterface`.
    Interface(String),
    /// Pods are behind interfaces whose names begin so: `interfaceNamePrefix`.
    InterfacePrefix(String),
}

/// Which of the node's addresses answer on node ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// The node's own addresses, as its Node object has them: what kube-proxy's nftables mode does
    /// unless told otherwise.
    Primary,
    /// Every local address in these ranges; those of loopback only where a mode documents it
    /// ([`ProxyConfig::localhost_node_ports`]).
    Ranges(Vec<IpNet>),
}

/// The kernel's connection table. A limit or time-out that is `None` or zero stays as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConntrackConfig {
    /// Connections for each CPU core.
    pub max_per_core: Option<u32>,
    /// Connections at the least, whatever the number of cores.
    pub min: Option<u32>,
    /// How long an idle TCP connection is remembered.
    pub tcp_established_timeout: Option<Duration>,
    /// How long a TCP connection in CLOSE_WAIT is remembered.
    pub tcp_close_wait_timeout: Option<Duration>,
    /// Takes TCP packets outside the window for valid.
    pub tcp_be_liberal: bool,
    /// Whether TCP connections to endpoints that are gone are forgotten too, and not only UDP and
    /// SCTP: then their clients get a reset at the next packet. Not a field of
    /// `KubeProxyConfiguration`.
    pub remove_stale_tcp: bool,
    /// How long an unanswered UDP flow is remembered.
    pub udp_timeout: Option<Duration>,
    /// How long an answered UDP flow is remembered.
    pub udp_stream_timeout: Option<Duration>,
}

impl Default for ConntrackConfig {
    /// The documented defaults of `KubeProxyConntrackConfiguration`.
    fn default() -> Self {
        Self {
            max_per_core: Some(32_768),
            min: Some(131_072),
            tcp_established_timeout: Some(Duration::from_secs(24 * 3600)),
            tcp_close_wait_timeout: Some(Duration::from_secs(3600)),
            tcp_be_liberal: false,
            remove_stale_tcp: false,
            udp_timeout: None,
            udp_stream_timeout: None,
        }
    }
}

/// What the proxy can be told. Names follow `KubeProxyConfiguration`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyConfig {
    /// The node's name: which endpoints are local, and whose addresses answer on node ports.
    pub node_name: String,
    /// The node's addresses, if they are known; else they come from its Node object.
    pub node_ips: Vec<IpAddr>,
    /// The node's main address (`bindAddress`), whose family must be served unless it stands for
    /// all addresses; none of it is listened on.
    pub bind_address: Option<IpAddr>,
    /// How rules are put into force.
    pub mode: Mode,
    /// Which families are served; empty for all that the kernel has.
    pub families: Vec<Family>,
    /// Which traffic comes from pods of this node or cluster.
    pub detect_local: DetectLocal,
    /// Masquerades everything that is sent to a cluster address.
    pub masquerade_all: bool,
    /// The bit of the packet mark that says "masquerade", from 0 to 31.
    pub masquerade_bit: u8,
    /// How often rules are compared with the kernel's where the kernel doesn't tell of changes.
    pub sync_period: Duration,
    /// The shortest time between two commits.
    pub min_sync_period: Duration,
    /// Which of the node's addresses answer on node ports.
    pub node_port_addresses: NodePortAddresses,
    /// Whether node ports are on loopback too, where that is in their ranges: the iptables mode can
    /// do it for IPv4 only, relays for both families, nftables never.
    pub localhost_node_ports: bool,
    /// The connection table.
    pub conntrack: ConntrackConfig,
    /// Where `/healthz` and `/livez` are served; `None` for nowhere.
    pub healthz_bind_address: Option<SocketAddr>,
    /// Where `/metrics`, `/proxyMode` and `/configz` are served; `None` for nowhere.
    pub metrics_bind_address: Option<SocketAddr>,
    /// Whether one of these that can't be had ends the proxy; else it is tried again and again.
    pub bind_address_hard_fail: bool,
}

impl ProxyConfig {
    /// The documented defaults, for a node of this name.
    pub fn new(node_name: impl Into<String>) -> Self {
        Self {
            node_name: node_name.into(),
            node_ips: Vec::new(),
            bind_address: None,
            mode: Mode::default(),
            families: Vec::new(),
            detect_local: DetectLocal::default(),
            masquerade_all: false,
            masquerade_bit: 14,
            sync_period: Duration::from_secs(30),
            min_sync_period: Duration::ZERO,
            node_port_addresses: NodePortAddresses::Primary,
            localhost_node_ports: true,
            conntrack: ConntrackConfig::default(),
            healthz_bind_address: Some(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 10256)),
            metrics_bind_address: Some(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 10249)),
            bind_address_hard_fail: false,
        }
    }

    /// The packet mark that says "masquerade".
    pub(crate) fn masquerade_mark(&self) -> u32 {
        1 << (self.masquerade_bit & 31)
    }

    /// The node's main address, where the configuration names one and not just all addresses.
    pub(crate) fn main_address(&self) -> Option<IpAddr> {
        self.bind_address.filter(|address| !address.is_unspecified())
    }

    /// The family that must be served; others may be missing from the kernel.
    pub(crate) fn primary_family(&self) -> Family {
        let known = self.main_address().or_else(|| self.node_ips.first().copied());
        known.map(Family::of).or_else(|| self.families.first().copied()).unwrap_or(Family::V4)
    }

    /// The families to serve, the primary one first.
    pub(crate) fn wanted_families(&self) -> Vec<Family> {
        let primary = self.primary_family();
        let mut families = if self.families.is_empty() {
            vec![Family::V4, Family::V6]
        } else {
            self.families.clone()
        };
        families.sort_by_key(|family| *family != primary);
        families
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_family_of_the_nodes_main_address_comes_first() {
        let mut config = ProxyConfig::new("n");
        assert_eq!(config.wanted_families(), [Family::V4, Family::V6]);
        config.node_ips = vec!["2001:db8::1".parse().unwrap(), "192.0.2.1".parse().unwrap()];
        assert_eq!(config.wanted_families(), [Family::V6, Family::V4]);
        config.bind_address = Some("192.0.2.1".parse().unwrap());
        assert_eq!(config.wanted_families(), [Family::V4, Family::V6]);
        config.bind_address = Some("::".parse().unwrap());
        config.node_ips.reverse();
        assert_eq!(
            config.wanted_families(),
            [Family::V4, Family::V6],
            "it is no address of its own"
        );
        config.families = vec![Family::V4];
        assert_eq!(config.wanted_families(), [Family::V4]);
    }
}
