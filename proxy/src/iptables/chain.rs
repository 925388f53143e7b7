//! Tables and chains: kube-proxy's names, which other tools look for.

use std::fmt;

use sha2::{Digest, Sha256};

use crate::model::{Endpoint, Protocol};

/// How many characters of a hash a chain's name has.
const HASH: usize = 16;
/// RFC 4648.
const BASE32: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";

/// A table of iptables, in the order in which tables are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Table {
    /// Only for the canary.
    Mangle,
    /// What is rejected, dropped and let through.
    Filter,
    /// Translation.
    Nat,
}

impl Table {
    /// Every table that the proxy writes to.
    pub(crate) const ALL: [Self; 3] = [Self::Mangle, Self::Filter, Self::Nat];

    /// As iptables calls it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Mangle => "mangle",
            Self::Filter => "filter",
            Self::Nat => "nat",
        }
    }
}

/// A chain that has a line or two of each Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Place {
    /// Node ports to be let in, in the filter table: health checks.
    HealthChecks,
    /// Cluster addresses without endpoints.
    RejectedServices,
    /// Addresses for the outside and node ports without endpoints.
    RejectedExternal,
    /// Load balancers' addresses whose clients come from elsewhere than they may.
    Firewall,
    /// Addresses and ports of Services.
    Services,
    /// Node ports.
    NodePorts,
}

impl Place {
    /// All of them.
    pub(crate) const ALL: [Self; 6] = [
        Self::HealthChecks,
        Self::RejectedServices,
        Self::RejectedExternal,
        Self::Firewall,
        Self::Services,
        Self::NodePorts,
    ];

    /// Which table it is in.
    pub(crate) fn table(self) -> Table {
        match self {
            Self::Services | Self::NodePorts => Table::Nat,
            _ => Table::Filter,
        }
    }

    /// The chain's name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::HealthChecks | Self::NodePorts => "KUBE-NODEPORTS",
            Self::RejectedServices | Self::Services => "KUBE-SERVICES",
            Self::RejectedExternal => "KUBE-EXTERNAL-SERVICES",
            Self::Firewall => "KUBE-PROXY-FIREWALL",
        }
    }
}

/// The port of a Service, as chains' names and comments know it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PortName<'a> {
    pub(crate) namespace: &'a str,
    pub(crate) service: &'a str,
    /// Empty if it has none.
    pub(crate) port: &'a str,
    pub(crate) protocol: Protocol,
}

impl fmt::Display for PortName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.service)?;
        if self.port.is_empty() { Ok(()) } else { write!(f, ":{}", self.port) }
    }
}

/// A protocol, as rules name it.
pub(crate) fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    }
}

/// What a chain of one Service port is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Picks one of the cluster's endpoints.
    Cluster,
    /// Picks one of this node's endpoints.
    Local,
    /// Traffic to addresses for the outside and node ports.
    External,
    /// Checks where clients of a load balancer's address come from.
    Firewall,
    /// Translates to one endpoint.
    Endpoint,
}

impl Kind {
    const ALL: [Self; 5] =
        [Self::Cluster, Self::Local, Self::External, Self::Firewall, Self::Endpoint];

    fn prefix(self) -> &'static str {
        match self {
            Self::Cluster => "KUBE-SVC-",
            Self::Local => "KUBE-SVL-",
            Self::External => "KUBE-EXT-",
            Self::Firewall => "KUBE-FW-",
            Self::Endpoint => "KUBE-SEP-",
        }
    }
}

/// A chain of one Service port, in the nat table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct OwnChain {
    kind: Kind,
    hash: [u8; HASH],
}

impl OwnChain {
    /// The chain of this kind of a Service port.
    pub(crate) fn of_port(kind: Kind, name: PortName<'_>) -> Self {
        Self { kind, hash: hash(&format!("{name}{}", protocol_name(name.protocol))) }
    }

    /// The chain of an endpoint of a Service port.
    pub(crate) fn of_endpoint(name: PortName<'_>, endpoint: Endpoint) -> Self {
        let text = format!("{name}{}{endpoint}", protocol_name(name.protocol));
        Self { kind: Kind::Endpoint, hash: hash(&text) }
    }

    /// The chain with this name, if it is one of these.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        let (kind, rest) =
            Kind::ALL.into_iter().find_map(|k| Some((k, name.strip_prefix(k.prefix())?)))?;
        let hash = <[u8; HASH]>::try_from(rest.as_bytes()).ok()?;
        hash.iter().all(|byte| BASE32.contains(byte)).then_some(Self { kind, hash })
    }

    /// What it is for.
    pub(crate) fn kind(self) -> Kind {
        self.kind
    }
}

impl fmt::Display for OwnChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind.prefix())?;
        self.hash.iter().try_for_each(|byte| write!(f, "{}", char::from(*byte)))
    }
}

/// Chains that earlier kube-proxies made for Services and no proxy needs any more.
pub(crate) fn is_outdated(name: &str) -> bool {
    name.starts_with("KUBE-XLB-")
        || (OwnChain::parse(name).is_none()
            && Kind::ALL.iter().any(|kind| name.starts_with(kind.prefix())))
}

fn hash(text: &str) -> [u8; HASH] {
    let digest = Sha256::digest(text.as_bytes());
    // Sixteen characters of five bits are ten bytes.
    let mut name = [0; HASH];
    for (bytes, characters) in digest.chunks(5).zip(name.chunks_mut(8)) {
        let bits = bytes.iter().fold(0u64, |bits, byte| bits << 8 | u64::from(*byte));
        for (n, character) in characters.iter_mut().enumerate() {
            *character = BASE32[(bits >> (35 - 5 * n)) as usize & 31];
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_kube_proxy_gives() {
        let name =
            PortName { namespace: "ns1", service: "svc1", port: "p80", protocol: Protocol::Tcp };
        let chain = OwnChain::of_port(Kind::Cluster, name);
        assert_eq!(chain.to_string(), "KUBE-SVC-XPGD46QRK7WJZT7O");
        let endpoint = Endpoint { address: [10, 180, 0, 1].into(), port: 80 };
        let endpoint = OwnChain::of_endpoint(name, endpoint);
        assert_eq!(endpoint.to_string(), "KUBE-SEP-SXIVWICOYRO3J4NJ");
        for chain in [chain, endpoint] {
            assert_eq!(OwnChain::parse(&chain.to_string()), Some(chain));
        }
        assert_eq!(PortName { port: "", ..name }.to_string(), "ns1/svc1");
    }

    #[test]
    fn other_chains_are_not_taken_for_ours() {
        for (name, outdated) in [
            ("KUBE-SERVICES", false),
            ("KUBE-SVC-short", true),
            ("KUBE-SVC-xpgd46qrk7wjzt7o", true),
            ("KUBE-XLB-XPGD46QRK7WJZT7O", true),
            ("KUBE-KUBELET-CANARY", false),
            ("CNI-HOSTPORT-DNAT", false),
        ] {
            assert_eq!((OwnChain::parse(name), is_outdated(name)), (None, outdated), "{name}");
        }
    }
}
