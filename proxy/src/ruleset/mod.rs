//! What the kernel should hold, independent of how a backend writes it.
//!
//! A ruleset is small independent things, called [`Unit`]s: *frontends* (an address and port that
//! clients use, with the endpoints behind it), *addresses* in a few sets, and the *ranges* that
//! Services' addresses are taken from. A change of a Service touches a few units, and only those are
//! planned and written.

pub(crate) mod desired;
pub(crate) mod slots;

use std::{fmt, net::IpAddr, sync::Arc, time::Duration};

use ipnet::IpNet;

use crate::model::{Endpoint, Family, Protocol};

/// Traffic that finds its endpoints in maps of its own.
///
/// One address and port may have several sets of endpoints, depending on where the client is; each
/// is a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Lane {
    /// Addresses of Services, for everybody: cluster addresses, external ones, load balancers'.
    Address,
    /// Addresses for the outside, for clients from inside, where `externalTrafficPolicy: Local`
    /// keeps those from outside on this node's endpoints.
    AddressInside,
    /// Node ports, for clients from outside the cluster, and for all if there is no other lane.
    NodePort,
    /// Node ports for clients from inside, as with [`Self::AddressInside`].
    NodePortInside,
}

impl Lane {
    /// Every lane.
    pub(crate) const ALL: [Self; 4] =
        [Self::Address, Self::AddressInside, Self::NodePort, Self::NodePortInside];

    /// Whether its frontends have an address of their own.
    pub(crate) fn with_address(self) -> bool {
        matches!(self, Self::Address | Self::AddressInside)
    }
}

/// What a client connects to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Frontend {
    pub(crate) family: Family,
    pub(crate) lane: Lane,
    /// Node ports have none: they are on every address of the node.
    pub(crate) address: Option<IpAddr>,
    pub(crate) protocol: Protocol,
    pub(crate) port: u16,
}

#[cfg(test)]
impl Frontend {
    /// An address and port, for everybody.
    pub(crate) fn at(address: impl Into<IpAddr>, protocol: Protocol, port: u16) -> Self {
        let address = address.into();
        let (family, lane) = (Family::of(address), Lane::Address);
        Self { family, lane, address: Some(address), protocol, port }
    }
}

impl fmt::Display for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(address) => {
                write!(f, "{} {}", self.protocol, std::net::SocketAddr::new(address, self.port))
            }
            None => {
                write!(f, "{} node port {} ({})", self.protocol, self.port, self.family.as_str())
            }
        }
    }
}

/// Whose source address is hidden behind the node's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Masquerade {
    /// That of clients outside the pods' range, as configured.
    OffCluster,
    /// Everybody's.
    Always,
    /// Nobody's: the endpoints are on this node and see the client's address.
    Never,
}

/// What happens to a frontend's traffic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// It goes to one of these (sorted, none twice, at least one).
    Forward {
        /// The choice.
        endpoints: Arc<[Endpoint]>,
        /// Whose address they see.
        masquerade: Masquerade,
        /// How long a client stays with its endpoint.
        affinity: Option<Duration>,
        /// From where clients may come; `None` for anywhere. All others are dropped.
        sources: Option<Arc<[IpNet]>>,
    },
    /// It is dropped: there are endpoints, but none on this node, where the policy wants them.
    Drop,
    /// It is answered with a reset or port unreachable: there is no endpoint at all.
    Reject,
    /// Nothing of its own, as another lane of the same port says it all. It is claimed none the
    /// less, or another Service might have one lane of a port and this one the other.
    Nothing,
}

/// A set of addresses that rules look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum AddressSet {
    /// Cluster addresses of Services: what is sent to them and belongs to no port is rejected.
    ClusterAddresses,
    /// Endpoints that may be their own client.
    Hairpin,
    /// Addresses of this node that answer on node ports.
    NodeAddresses,
}

/// The smallest thing that is planned and written by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Unit {
    /// An address in a set.
    Address(AddressSet, IpAddr),
    /// A frontend with all that belongs to it.
    Frontend(Frontend),
    /// The ranges that cluster addresses of a family are taken from: what is sent to those that no
    /// Service has is dropped.
    ServiceRanges(Family),
}

impl Unit {
    /// Which table it stands in.
    pub(crate) fn family(&self) -> Family {
        match self {
            Self::Address(_, address) => Family::of(*address),
            Self::Frontend(frontend) => frontend.family,
            Self::ServiceRanges(family) => *family,
        }
    }
}
