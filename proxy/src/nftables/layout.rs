//! What the table's layout follows from, and names: maps, sets and chains, and which traffic uses
//! which.
//!
//! Each name has its purpose in the table of the crate's `README.md`.

use super::sources::SourcesId;
use crate::{
    config::{DetectLocal, NodePortAddresses},
    model::Family,
    ruleset::{Lane, Masquerade},
};

/// What of the configuration is in the rules.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    /// Which table this is.
    pub(crate) family: Family,
    /// Which traffic comes from pods; what comes from elsewhere is masqueraded.
    pub(crate) detect_local: DetectLocal,
    /// Masquerade everything that is sent to a cluster address.
    pub(crate) masquerade_all: bool,
    /// The mark of what is to be masqueraded.
    pub(crate) masquerade_mark: u32,
    /// Which of the node's addresses answer on node ports.
    pub(crate) node_port_addresses: NodePortAddresses,
}

/// `address . protocol . port → goto endpoints-N`.
pub(crate) const SERVICES: &str = "services";
/// `address . protocol . port . index → address . port`.
pub(crate) const ENDPOINTS: &str = "endpoints";
/// `protocol . port → goto nodeport-N` or `nodeport-local-N`.
pub(crate) const NODEPORTS: &str = "nodeports";
/// `protocol . port . index → address . port`.
pub(crate) const NODEPORT_ENDPOINTS: &str = "nodeport-endpoints";
/// `protocol . port → goto nodeport-inside-N`.
pub(crate) const NODEPORTS_INSIDE: &str = "nodeports-inside";
/// `protocol . port . index → address . port`.
pub(crate) const NODEPORT_INSIDE_ENDPOINTS: &str = "nodeport-inside-endpoints";
/// `address . protocol . port → goto external-inside-N`.
pub(crate) const SERVICES_INSIDE: &str = "services-inside";
/// `address . protocol . port . index → address . port`.
pub(crate) const INSIDE_ENDPOINTS: &str = "inside-endpoints";
/// `address . protocol . port → goto sources-LIST`: from where clients may come.
pub(crate) const FIREWALL: &str = "firewall";
/// `address . address . protocol . port`: load balancers' addresses by which the node itself may come
/// to them.
pub(crate) const OWN_BALANCERS: &str = "own-balancers";
/// `address . protocol . port → goto reject-at-once`.
pub(crate) const NO_ENDPOINTS: &str = "no-endpoints";
/// `protocol . port → goto reject-at-once`.
pub(crate) const NO_ENDPOINT_NODEPORTS: &str = "no-endpoint-nodeports";
/// Addresses of Services.
pub(crate) const CLUSTER_IPS: &str = "cluster-ips";
/// Ranges that addresses of Services are taken from.
pub(crate) const SERVICE_RANGES: &str = "service-ranges";
/// `endpoint . endpoint`: those that may be their own client.
pub(crate) const HAIRPIN: &str = "hairpin";
/// The node's addresses that answer on node ports.
pub(crate) const NODEPORT_IPS: &str = "nodeport-ips";
/// `client . address . protocol . port → address . port`: where sticky clients went before.
pub(crate) const AFFINITY: &str = "affinity";
/// `address . protocol . port → goto remember-SECONDS`.
pub(crate) const STICKY: &str = "sticky";
/// `protocol . port → goto remember-SECONDS`.
pub(crate) const STICKY_NODEPORTS: &str = "sticky-nodeports";
/// Rejects.
pub(crate) const REJECT: &str = "reject-at-once";

pub(super) const CHECK_ENDPOINTS: &str = "check-endpoints";
pub(super) const CHECK_CLUSTER_IPS: &str = "check-cluster-ips";
pub(super) const REMEMBER: &str = "remember";
pub(super) const FROM_OUTSIDE: &str = "nodeports-from-outside";
pub(super) const FROM_HOST: &str = "nodeports-from-host";

/// The maps of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LaneMaps {
    /// The verdict map.
    pub(crate) verdicts: &'static str,
    /// The endpoints.
    pub(crate) endpoints: &'static str,
    /// The verdict map of those without endpoints; no lane but the first of its address needs one.
    pub(crate) rejects: Option<&'static str>,
    /// The verdict map that says how long a client stays; lanes of one address share it.
    pub(crate) sticky: &'static str,
    /// The verdict map that says from where clients may come; shared likewise.
    pub(crate) firewall: Option<&'static str>,
}

/// The maps in which a lane's traffic is looked up.
pub(crate) fn lane_maps(lane: Lane) -> LaneMaps {
    match lane {
        Lane::Address => LaneMaps {
            verdicts: SERVICES,
            endpoints: ENDPOINTS,
            rejects: Some(NO_ENDPOINTS),
            sticky: STICKY,
            firewall: Some(FIREWALL),
        },
        Lane::AddressInside => LaneMaps {
            verdicts: SERVICES_INSIDE,
            endpoints: INSIDE_ENDPOINTS,
            rejects: None,
            sticky: STICKY,
            firewall: Some(FIREWALL),
        },
        Lane::NodePort => LaneMaps {
            verdicts: NODEPORTS,
            endpoints: NODEPORT_ENDPOINTS,
            rejects: Some(NO_ENDPOINT_NODEPORTS),
            sticky: STICKY_NODEPORTS,
            firewall: None,
        },
        Lane::NodePortInside => LaneMaps {
            verdicts: NODEPORTS_INSIDE,
            endpoints: NODEPORT_INSIDE_ENDPOINTS,
            rejects: None,
            sticky: STICKY_NODEPORTS,
            firewall: None,
        },
    }
}

/// The lane whose endpoints are in this map, if any are.
pub(crate) fn endpoints_lane(map: &str) -> Option<Lane> {
    Lane::ALL.into_iter().find(|lane| lane_maps(*lane).endpoints == map)
}

/// Names one chain that picks an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct PickChain {
    pub(crate) lane: Lane,
    pub(crate) masquerade: Masquerade,
    /// Whether a client that was here before goes where it went then.
    pub(crate) sticky: bool,
    /// How many endpoints there are to pick from.
    pub(crate) count: u32,
}

impl PickChain {
    /// The chain's name.
    pub(crate) fn name(self) -> String {
        let sticky = if self.sticky { STICKY_PREFIX } else { "" };
        format!("{sticky}{}{}", prefix(self.lane, self.masquerade), self.count)
    }

    /// The chain with this name.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        let (sticky, rest) = match name.strip_prefix(STICKY_PREFIX) {
            Some(rest) => (true, rest),
            None => (false, name),
        };
        PREFIXES.iter().find_map(|(lane, masquerade, prefix)| {
            let digits = rest.strip_prefix(prefix)?;
            let count = digits.parse().ok().filter(|n| *n > 0)?;
            let chain = Self { lane: *lane, masquerade: *masquerade, sticky, count };
            (chain.name() == name).then_some(chain)
        })
    }
}

/// Chains of sticky services begin so.
const STICKY_PREFIX: &str = "sticky-";

/// A chain that is made when it is first needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum DynamicChain {
    /// Picks an endpoint.
    Pick(PickChain),
    /// Remembers for so many seconds where a client was sent.
    Remember(u32),
    /// Drops what doesn't come from these ranges.
    Sources(SourcesId),
}

impl DynamicChain {
    /// The chain's name.
    pub(crate) fn name(self) -> String {
        match self {
            Self::Pick(pick) => pick.name(),
            Self::Remember(seconds) => format!("{REMEMBER}-{seconds}"),
            Self::Sources(id) => id.name(),
        }
    }

    /// Whether it leads on to the chain of the same name without "sticky".
    pub(crate) fn is_sticky(self) -> bool {
        matches!(self, Self::Pick(PickChain { sticky: true, .. }))
    }

    /// The chain with this name.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        let seconds = name.strip_prefix(REMEMBER).and_then(|rest| rest.strip_prefix('-'));
        let chain = match (seconds, SourcesId::parse(name)) {
            (Some(seconds), _) => Self::Remember(seconds.parse().ok()?),
            (None, Some(id)) => Self::Sources(id),
            (None, None) => Self::Pick(PickChain::parse(name)?),
        };
        (chain.name() == name).then_some(chain)
    }
}

/// Whose address is hidden is a matter of the chain, so that it costs no lookup.
pub(super) const PREFIXES: [(Lane, Masquerade, &str); 7] = [
    (Lane::Address, Masquerade::OffCluster, "endpoints-"),
    (Lane::Address, Masquerade::Always, "external-"),
    (Lane::Address, Masquerade::Never, "external-local-"),
    (Lane::AddressInside, Masquerade::OffCluster, "external-inside-"),
    (Lane::NodePort, Masquerade::Always, "nodeport-"),
    (Lane::NodePort, Masquerade::Never, "nodeport-local-"),
    (Lane::NodePortInside, Masquerade::OffCluster, "nodeport-inside-"),
];

fn prefix(lane: Lane, masquerade: Masquerade) -> &'static str {
    PREFIXES
        .iter()
        .find(|(l, m, _)| (*l, *m) == (lane, masquerade))
        .map_or("other-", |(_, _, prefix)| prefix)
}
