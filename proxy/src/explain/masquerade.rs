//! Whether the endpoint sees the client's address.

use super::{Origin, Packet};
use crate::{
    config::{DetectLocal, Mode},
    model::{Endpoint, Family},
    ruleset::{Frontend, Lane, Masquerade},
    snapshot::Snapshot,
    start,
};

impl Snapshot {
    /// Whose address an endpoint sees as far as it depends on the client.
    pub(super) fn masquerade(
        &self,
        masquerade: Masquerade,
        frontend: &Frontend,
        packet: &Packet,
        origin: Origin,
    ) -> (bool, &'static str) {
        if self.config.mode == Mode::Userspace {
            return (true, "relays connect with the node's own address");
        }
        match masquerade {
            Masquerade::Always => (true, "the endpoint may be on another node"),
            Masquerade::Never => {
                (false, "the endpoint is on this node (externalTrafficPolicy: Local)")
            }
            Masquerade::OffCluster => self.off_cluster(frontend, packet, origin),
        }
    }

    /// Hidden is who isn't a pod: the node itself too, unless pods are told by a range that its
    /// address is in.
    fn off_cluster(
        &self,
        frontend: &Frontend,
        packet: &Packet,
        origin: Origin,
    ) -> (bool, &'static str) {
        let everybody = frontend.lane == Lane::Address;
        if self.config.masquerade_all && everybody {
            return (true, "masqueradeAll is set");
        }
        if !self.tells_pods(frontend.family) {
            return if everybody {
                (false, "no range of pods is known, so nobody is known to be outside it")
            } else {
                (true, "the node's own address may be one for the outside")
            };
        }
        let pod = match &self.config.detect_local {
            DetectLocal::Ranges(ranges) => ranges.iter().any(|range| range.contains(&packet.from)),
            _ => origin == Origin::Pod,
        };
        match (pod, origin) {
            (true, Origin::Node) => (false, "the node's address is one of the pods' ranges"),
            (true, _) => (false, "the client is a pod"),
            (false, Origin::Node) => {
                (true, "the node is not a pod, so its own address is hidden as well")
            }
            (false, _) => (true, "the client is outside the cluster"),
        }
    }

    /// Whether the rules can tell pods from others.
    fn tells_pods(&self, family: Family) -> bool {
        match self.config.mode {
            Mode::Nftables => start::layout(&self.config, family).not_from_pods().is_some(),
            Mode::Iptables => !start::settings(&self.config, family).pods_are_from().is_empty(),
            Mode::Userspace => false,
        }
    }

    /// What of an answer about masquerading depends on where the endpoints are.
    pub(super) fn with_endpoints(
        &self,
        masquerade: (bool, &'static str),
        endpoints: &[Endpoint],
        packet: &Packet,
    ) -> (bool, &'static str) {
        let own = endpoints.iter().filter(|endpoint| endpoint.address == packet.from).count();
        let all = endpoints.len();
        match masquerade {
            (true, _)
                if self.config.mode != Mode::Userspace
                    && endpoints.iter().all(|e| self.is_the_nodes(e.address)) =>
            {
                (false, "the endpoint is the node itself, so the packet doesn't leave it")
            }
            (false, _) if own > 0 && own == all => (true, "the endpoint is its own client"),
            (false, _) if own > 0 => {
                (false, "unless it is its own client, which sees the node's address")
            }
            other => other,
        }
    }
}
