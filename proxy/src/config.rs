//! What the proxy can be told.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use ipnet::IpNet;
use serde::Serialize;

use crate::model::Family;

/// Which of the node's addresses answer on node ports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum NodePortAddresses {
    /// The node's own addresses, as its Node object has them: what kube-proxy's nftables mode does
    /// unless told otherwise.
    Primary,
    /// Every local address in these ranges, except loopback.
    Ranges(Vec<IpNet>),
}

/// The kernel's connection table. A limit or time-out that is `None` or zero stays as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
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
            udp_timeout: None,
            udp_stream_timeout: None,
        }
    }
}

/// What the proxy can be told. Names follow `KubeProxyConfiguration`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ProxyConfig {
    /// The node's name: which endpoints are local, and whose addresses answer on node ports.
    pub node_name: String,
    /// The node's addresses, if they are known; else they come from its Node object.
    pub node_ips: Vec<IpAddr>,
    /// Which families are served.
    #[serde(skip)]
    pub families: Vec<Family>,
    /// Ranges of pods' addresses. What comes to a cluster address from elsewhere is masqueraded.
    pub cluster_cidrs: Vec<IpNet>,
    /// Masquerades everything that is sent to a cluster address.
    pub masquerade_all: bool,
    /// The bit of the packet mark that says "masquerade", from 0 to 31.
    pub masquerade_bit: u8,
    /// Which of the node's addresses answer on node ports.
    pub node_port_addresses: NodePortAddresses,
    /// The connection table.
    pub conntrack: ConntrackConfig,
    /// Where `/healthz` and `/livez` are served; `None` for nowhere.
    pub healthz_bind_address: Option<SocketAddr>,
    /// Where `/metrics`, `/proxyMode` and `/configz` are served; `None` for nowhere.
    pub metrics_bind_address: Option<SocketAddr>,
}

impl ProxyConfig {
    /// The documented defaults, for a node of this name.
    pub fn new(node_name: impl Into<String>) -> Self {
        Self {
            node_name: node_name.into(),
            node_ips: Vec::new(),
            families: vec![Family::V4],
            cluster_cidrs: Vec::new(),
            masquerade_all: false,
            masquerade_bit: 14,
            node_port_addresses: NodePortAddresses::Primary,
            conntrack: ConntrackConfig::default(),
            healthz_bind_address: Some(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 10256)),
            metrics_bind_address: Some(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 10249)),
        }
    }

    /// The packet mark that says "masquerade".
    pub(crate) fn masquerade_mark(&self) -> u32 {
        1 << (self.masquerade_bit & 31)
    }
}
