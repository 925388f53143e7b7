//! The pods' network: routed veth pairs, without a bridge.
//!
//! ```text
//!   pod 10.244.0.5                              node
//!   ┌──────────────────────────┐          ┌───────────────────────────────────────────┐
//!   │ eth0 10.244.0.5/32       │──veth──  │ kl1f3a…   ee:ee:ee:ee:ee:ee               │
//!   │ default via 169.254.1.1  │          │ route 10.244.0.5/32 dev kl1f3a…           │
//!   │ 169.254.1.1 is ee:ee:…   │          │ table keelson-pods: masquerade, host ports│
//!   └──────────────────────────┘          └───────────────────────────────────────────┘
//! ```
//!
//! A pod has one address and sends everything to a gateway that exists only as a permanent neighbour
//! entry; the node forwards by a route for each pod. So packets between two pods pass the node's
//! address translation in both directions, which on a bridge needs `br_netfilter`.
//!
//! * `addresses`: which pod has which address, as files
//! * `link`: namespaces, interfaces, routes
//! * `filter`: the packet filter's table: masquerade and host ports
//! * `routes`: the way to other nodes' pods
//! * `check`: what on the host stands in the way
//!
//! Everything that is done inside a pod's namespace is done on a thread that ends afterwards.

mod addresses;
mod check;
mod filter;
mod link;
mod netns;
mod routes;

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use ipnet::{IpNet, Ipv4Net};

pub(crate) use self::netns::{connect_inside, interface_stats};
use self::{addresses::Addresses, filter::HostPort};
pub use self::{
    check::{Finding, check},
    routes::{NodeRoutes, remove_node_routes, set_node_routes},
};
use crate::runtime::{PortMapping, Result, RuntimeError, SandboxId};

/// How the pods' network is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkConfig {
    /// The ranges that pods of this node get their addresses from. May be empty at first and set
    /// later, when the node knows its range. Pods get IPv4 addresses; other ranges are not used.
    pub pod_ranges: Vec<IpNet>,
    /// Where pods keep their own address as the source: the whole cluster's pod range and the like.
    /// The node's own ranges need not be among them.
    pub unmasqueraded: Vec<IpNet>,
    /// The largest packet on the pods' interfaces; that of the host's default route if absent.
    pub mtu: Option<u32>,
    /// The packet filter's table, which also marks the interfaces as ours. Two runtimes on one host
    /// need two.
    pub table: String,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            pod_ranges: Vec::new(),
            unmasqueraded: Vec::new(),
            mtu: None,
            table: "keelson-pods".to_owned(),
        }
    }
}

/// A sandbox that has a network, as the records say.
pub(crate) struct InUse {
    pub(crate) sandbox: SandboxId,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) ports: Vec<PortMapping>,
}

/// The network of one node's pods.
pub(crate) struct Network {
    config: NetworkConfig,
    addresses: Arc<Addresses>,
    state: Mutex<State>,
    /// Held while the packet filter is written, so that older rules never follow newer ones.
    writing: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    ranges: Vec<Ipv4Net>,
    /// Whether the packet filter is set up for the ranges; if not, why.
    filter: Option<std::result::Result<(), String>>,
    ports: BTreeMap<HostPort, (SandboxId, std::net::SocketAddrV4)>,
}

impl Network {
    /// Reads which addresses are in use. Writes nothing yet.
    pub(crate) fn open(config: NetworkConfig, addresses: &Path) -> Result<Network> {
        if config.table.is_empty()
            || !config.table.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
        {
            return Err(RuntimeError::Invalid(format!(
                "packet filter table {:?}: only letters, digits, - and _",
                config.table
            )));
        }
        Ok(Network {
            addresses: Arc::new(Addresses::open(addresses)?),
            state: Mutex::new(State { ranges: ipv4(&config.pod_ranges), ..State::default() }),
            writing: tokio::sync::Mutex::default(),
            config,
        })
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether pods get a network; if not, why.
    pub(crate) fn readiness(&self) -> std::result::Result<(), String> {
        let state = self.state();
        if state.ranges.is_empty() {
            return Err("the node has no pod range yet".to_owned());
        }
        state.filter.clone().unwrap_or(Ok(()))
    }

    /// Takes the ranges for new pods, and makes forwarding and masquerade so.
    pub(crate) async fn set_pod_ranges(&self, ranges: &[IpNet]) -> Result<()> {
        let ranges = ipv4(ranges);
        if ranges.is_empty() {
            return Err(RuntimeError::Invalid(
                "there is no IPv4 range among the pod ranges".into(),
            ));
        }
        let changed = {
            let mut state = self.state();
            let changed = state.ranges != ranges || !matches!(state.filter, Some(Ok(())));
            state.ranges = ranges;
            changed
        };
        if changed { self.write_filter().await } else { Ok(()) }
    }

    /// Compares with what sandboxes there are: gives back addresses of those that are gone, removes
    /// interfaces that nobody has, and writes the packet filter anew.
    pub(crate) async fn recover(&self, in_use: &[InUse]) -> Result<()> {
        self.addresses.keep_only(in_use)?;
        {
            let mut state = self.state();
            state.ports.clear();
            for sandbox in in_use {
                for port in host_ports(&sandbox.ports, &sandbox.addresses) {
                    state.ports.insert(port.0, (sandbox.sandbox.clone(), port.1));
                }
            }
        }
        let known: Vec<String> = in_use.iter().map(|s| link::host_name(&s.sandbox)).collect();
        link::remove_unknown(&self.config.table, &known).await?;
        let ready = !self.state().ranges.is_empty();
        if ready {
            // A host without a packet filter can still run pods; the status says what is wrong.
            if let Err(error) = self.write_filter().await {
                tracing::warn!(%error, "the pods' packet filter could not be set up");
            }
        }
        Ok(())
    }

    /// Gives a sandbox its namespace, its address and its host ports.
    pub(crate) async fn attach(
        &self,
        sandbox: &SandboxId,
        netns: &Path,
        ports: &[PortMapping],
        sysctls: BTreeMap<String, String>,
    ) -> Result<Vec<IpAddr>> {
        let ranges = self.state().ranges.clone();
        if ranges.is_empty() {
            return Err(RuntimeError::Container(
                "the pod's network: the node has no pod range yet".to_owned(),
            ));
        }
        let ipv6 =
            ports.iter().filter_map(|p| p.host_ip).find(|ip| ip.is_ipv6() && !ip.is_unspecified());
        if let Some(ip) = ipv6 {
            return Err(RuntimeError::Invalid(format!(
                "host port on {ip}: pods have no IPv6 addresses on this node"
            )));
        }
        let address = self.addresses.take(&ranges, sandbox)?;
        let mtu = match self.config.mtu {
            Some(mtu) => mtu,
            None => link::default_mtu().await,
        };
        netns::create(netns, sysctls).await?;
        link::connect(sandbox, netns, address, mtu, &self.config.table).await?;
        let ips = vec![IpAddr::V4(address)];
        let wanted = host_ports(ports, &ips);
        if !wanted.is_empty() {
            {
                let mut state = self.state();
                for (port, _) in &wanted {
                    if let Some((_, (owner, _))) =
                        state.ports.iter().find(|(other, _)| other.collides_with(port))
                    {
                        return Err(RuntimeError::Container(format!(
                            "host port {port} is taken by another pod (sandbox {owner})"
                        )));
                    }
                }
                for (port, target) in wanted {
                    state.ports.insert(port, (sandbox.clone(), target));
                }
            }
            link::allow_loopback_source(sandbox)?;
            self.write_filter().await?;
        }
        Ok(ips)
    }

    /// Takes a sandbox's network away; what is not there any more is as good.
    pub(crate) async fn detach(&self, sandbox: &SandboxId, netns: &Path) -> Result<()> {
        let had_ports = {
            let mut state = self.state();
            let before = state.ports.len();
            state.ports.retain(|_, (owner, _)| owner != sandbox);
            before != state.ports.len()
        };
        if had_ports {
            self.write_filter().await?;
        }
        link::disconnect(sandbox).await?;
        netns::remove(netns).await?;
        self.addresses.release(sandbox)
    }

    async fn write_filter(&self) -> Result<()> {
        let _writing = self.writing.lock().await;
        let text = {
            let state = self.state();
            let ports = state.ports.iter().map(|(port, (_, target))| (*port, *target)).collect();
            filter::render(
                &self.config.table,
                &state.ranges,
                &ipv4(&self.config.unmasqueraded),
                &ports,
            )
        };
        let result = async {
            link::enable_forwarding()?;
            filter::load(text).await
        }
        .await;
        self.state().filter =
            Some(result.as_ref().copied().map_err(|e: &RuntimeError| e.to_string()));
        result
    }

    /// Removes everything that the runtime made in the host's network. Returns how many things.
    pub(crate) async fn teardown(&self) -> Result<usize> {
        let interfaces = link::remove_unknown(&self.config.table, &[]).await?;
        let tables = filter::remove(&self.config.table).await?;
        self.addresses.keep_only(&[])?;
        let mut state = self.state();
        state.ports.clear();
        state.filter = None;
        Ok(interfaces + tables)
    }
}

fn ipv4(ranges: &[IpNet]) -> Vec<Ipv4Net> {
    ranges
        .iter()
        .filter_map(|range| match range {
            IpNet::V4(range) => Some(range.trunc()),
            IpNet::V6(_) => None,
        })
        .collect()
}

/// What the packet filter needs to know of a sandbox's ports.
fn host_ports(
    ports: &[PortMapping],
    addresses: &[IpAddr],
) -> Vec<(HostPort, std::net::SocketAddrV4)> {
    let Some(IpAddr::V4(address)) = addresses.iter().find(|a| a.is_ipv4()) else {
        return Vec::new();
    };
    ports
        .iter()
        .filter(|p| p.host_port != 0)
        .filter_map(|port| {
            let host_address = match port.host_ip {
                Some(IpAddr::V4(ip)) if !ip.is_unspecified() => Some(ip),
                // Refused when the sandbox was made.
                Some(IpAddr::V6(ip)) if !ip.is_unspecified() => return None,
                _ => None,
            };
            let key =
                HostPort { protocol: port.protocol.into(), port: port.host_port, host_address };
            Some((key, std::net::SocketAddrV4::new(*address, port.container_port)))
        })
        .collect()
}

/// Where a namespace is kept, for messages.
fn shown(path: &Path) -> String {
    PathBuf::from(path).display().to_string()
}
