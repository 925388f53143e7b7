//! Why a packet goes where it goes.
//!
//! A pure function over the same tables that make the rules: [`Snapshot::explain`] looks a packet's
//! addresses up as the rules do, and says which Service has them, by which rule, which endpoints are
//! eligible and why the others are not. [`check`] holds the answer against the kernel.

mod check;
mod masquerade;
mod rules;
mod text;
mod unserved;
mod why;

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;
use serde::Serialize;

use crate::{
    Protocol,
    config::{DetectLocal, Mode, NodePortAddresses},
    model::{Family, services::TrafficPolicy, table::PortPlan},
    nftables::layout,
    ruleset::{Action, AddressSet, Frontend, Lane, Unit},
    snapshot::Snapshot,
};

pub(crate) use unserved::Unserved;
pub use why::Candidate;

/// Where a packet comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// A pod, as far as `detectLocalMode` can tell.
    Pod,
    /// The node itself.
    Node,
    /// Somewhere else.
    Outside,
}

/// The first packet of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// The client.
    pub from: IpAddr,
    /// Whether the client is known to be a pod of this node: where pods are told by their interface
    /// its address doesn't tell.
    pub from_pod_here: bool,
    /// What the client connects to.
    pub to: IpAddr,
    /// And at which port.
    pub port: u16,
    /// And how.
    pub protocol: Protocol,
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It goes to one of the eligible endpoints.
    Forwarded,
    /// It is dropped.
    Dropped,
    /// It is answered with a reset or port unreachable.
    Rejected,
    /// The proxy itself answers it, on a health check node port.
    Answered,
    /// The proxy has no part in it.
    NotServices,
}

/// The answer. It prints itself for people, and serializes for programs.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// The packet in words.
    pub packet: String,
    /// The node whose proxy the answer is for.
    pub node: String,
    /// Where it comes from.
    pub origin: Origin,
    /// What becomes of it.
    pub verdict: Verdict,
    /// And why.
    pub reason: String,
    /// The Service, as namespace/name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// Its port, by name and number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_port: Option<String>,
    /// As what the address belongs to the Service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reached_as: Option<&'static str>,
    /// The rules that it passes, in order.
    pub rules: Vec<String>,
    /// Whether the endpoint sees the node's address instead of the client's, and why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub masquerade: Option<(bool, &'static str)>,
    /// How many seconds the client stays with its endpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub affinity_seconds: Option<u64>,
    /// Every endpoint of the port, and whether it is eligible.
    pub endpoints: Vec<Candidate>,
    /// What is not known, or what else decides.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// What the kernel has otherwise; absent if it wasn't asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<Vec<String>>,
    /// What of the ruleset it meets, whether that should be there or not.
    #[serde(skip)]
    met: BTreeSet<Unit>,
}

impl Snapshot {
    /// Follows a packet through the rules.
    pub fn explain(&self, packet: &Packet) -> Explanation {
        let origin = self.origin(packet);
        let mut answer = Explanation {
            packet: format!("{} {} → {}", packet.protocol, packet.from, at(packet)),
            node: self.config.node_name.clone(),
            origin,
            verdict: Verdict::NotServices,
            reason: String::new(),
            service: None,
            service_port: None,
            reached_as: None,
            rules: Vec::new(),
            masquerade: None,
            affinity_seconds: None,
            endpoints: Vec::new(),
            notes: Vec::new(),
            kernel: None,
            met: BTreeSet::new(),
        };
        let family = Family::of(packet.to);
        if family != Family::of(packet.from) {
            answer.reason = "client and address are of different families".into();
        } else if !self.families.contains(&family) {
            answer.reason = format!("{} is not served", family.as_str());
        } else if self.config.mode == Mode::Userspace && packet.protocol == Protocol::Sctp {
            answer.reason = "SCTP is not relayed in the userspace mode".into();
        } else {
            self.follow(packet, &mut answer);
        }
        answer
    }

    /// The way of a packet that the proxy may have to do with.
    fn follow(&self, packet: &Packet, answer: &mut Explanation) {
        let family = Family::of(packet.to);
        let sets = [AddressSet::ClusterAddresses, AddressSet::NodeAddresses];
        answer.met = sets.map(|set| Unit::Address(set, packet.to)).into();
        for frontend in self.looked_up(packet, answer.origin) {
            answer.met.insert(Unit::Frontend(frontend));
            if let Some(action) = self.desired.action(&frontend) {
                self.describe(packet, frontend, action, answer);
                return;
            }
        }
        answer.met.insert(Unit::ServiceRanges(family));
        if self.desired.has_address(AddressSet::ClusterAddresses, packet.to) {
            self.unused_port(packet, answer);
        } else if let Some(range) = self.unallocated(packet, answer.origin) {
            answer.verdict = Verdict::Dropped;
            answer.reason = match self.left_to_others(packet) {
                Some(why) => format!(
                    "{why}; where nobody else translates it, {range} is a range \
                                      of Services, and this proxy serves none there"
                ),
                None => {
                    format!("no Service has this address, and it is in {range}, a range of theirs")
                }
            };
            answer.rules.push(format!("set {}: {range}", layout::SERVICE_RANGES));
        } else {
            self.not_served(packet, answer);
        }
    }

    fn unused_port(&self, packet: &Packet, answer: &mut Explanation) {
        let (verdict, then) = match self.config.mode {
            Mode::Nftables => (Verdict::Rejected, ""),
            Mode::Iptables => (Verdict::NotServices, "; the iptables mode leaves it to routing"),
            Mode::Userspace => (Verdict::Rejected, "; the kernel itself refuses it"),
        };
        answer.verdict = verdict;
        answer.reason = format!("the address is a Service's, but none has this port{then}");
        if self.config.mode == Mode::Nftables {
            answer.rules.push(format!("set {}: {}", layout::CLUSTER_IPS, packet.to));
        }
    }

    /// The range of Services in which an address is that no Service has, where packets to it are
    /// dropped: on their way through the node or out of it.
    fn unallocated(&self, packet: &Packet, origin: Origin) -> Option<IpNet> {
        let ends_here = origin != Origin::Node && self.is_the_nodes(packet.to);
        if self.config.mode != Mode::Nftables || ends_here {
            return None;
        }
        let ranges = self.desired.service_ranges()?;
        ranges.iter().find(|range| range.contains(&packet.to)).copied()
    }

    fn origin(&self, packet: &Packet) -> Origin {
        let pod = match &self.config.detect_local {
            DetectLocal::Ranges(ranges) => ranges.iter().any(|range| range.contains(&packet.from)),
            DetectLocal::Interface(_) | DetectLocal::InterfacePrefix(_) => packet.from_pod_here,
            DetectLocal::Nothing | DetectLocal::NodeCidr => false,
        };
        let from = packet.from;
        if from.is_loopback() || self.is_the_nodes(from) {
            Origin::Node
        } else if pod {
            Origin::Pod
        } else {
            Origin::Outside
        }
    }

    /// The frontends that a packet's addresses may lead to, as the rules look them up: for clients
    /// inside first among what is for them alone, then among what is for everybody.
    fn looked_up(&self, packet: &Packet, origin: Origin) -> impl Iterator<Item = Frontend> {
        let inside = origin != Origin::Outside;
        let node_port = self.answers_on_node_ports(packet.to);
        let lanes = [
            (Lane::AddressInside, inside),
            (Lane::Address, true),
            (Lane::NodePortInside, inside && node_port),
            (Lane::NodePort, node_port),
        ];
        let packet = *packet;
        lanes.into_iter().filter(|(_, looked_up)| *looked_up).map(move |(lane, _)| Frontend {
            family: Family::of(packet.to),
            lane,
            address: lane.with_address().then_some(packet.to),
            protocol: packet.protocol,
            port: packet.port,
        })
    }

    fn answers_on_node_ports(&self, address: IpAddr) -> bool {
        let node = self.desired.has_address(AddressSet::NodeAddresses, address);
        match &self.config.node_port_addresses {
            NodePortAddresses::Primary => node,
            NodePortAddresses::Ranges(ranges) => {
                let loopback = address.is_loopback();
                let local = node || self.is_the_nodes(address);
                (local && !loopback || loopback && self.serves_loopback(address))
                    && ranges.iter().any(|range| range.contains(&address))
            }
        }
    }

    /// Whether it is an address of the node: of its object, or of one of its interfaces if those are
    /// known, which they are to the node only.
    fn is_the_nodes(&self, address: IpAddr) -> bool {
        self.config.node_ips.contains(&address) || self.local_addresses.contains(&address)
    }

    fn serves_loopback(&self, address: IpAddr) -> bool {
        let possible = match self.config.mode {
            Mode::Nftables => false,
            Mode::Iptables => address.is_ipv4(),
            Mode::Userspace => true,
        };
        possible && self.config.localhost_node_ports
    }

    fn describe(
        &self,
        packet: &Packet,
        frontend: Frontend,
        action: &Action,
        answer: &mut Explanation,
    ) {
        let Some(owner) = self.desired.owner(&frontend) else { return };
        answer.service = Some(owner.to_string());
        let (plans, _) = self.objects.ports(owner, &[frontend.family]).unwrap_or_default();
        let plan = plans.iter().find(|plan| {
            plan.port.protocol == frontend.protocol
                && match frontend.address {
                    Some(_) => plan.port.port == frontend.port,
                    None => plan.port.node_port == Some(frontend.port),
                }
        });
        let Some(plan) = plan else { return };
        let name = if plan.port.name.is_empty() { "" } else { " " };
        answer.service_port = Some(format!("{}{name}{}", plan.port.port, plan.port.name));
        answer.reached_as = Some(reached_as(&frontend, plan));
        let policy = policy(&frontend, plan);
        answer.endpoints =
            why::candidates(plan, self.objects.slices_of(owner), policy == TrafficPolicy::Local);
        self.judge(packet, &frontend, action, policy, answer);
        let filters = self.config.mode != Mode::Userspace;
        let admitted =
            answer.verdict != Verdict::Dropped || filters && matches!(action, Action::Drop);
        answer.rules = self.passes(&frontend, action, owner, plan, admitted);
    }

    fn judge(
        &self,
        packet: &Packet,
        frontend: &Frontend,
        action: &Action,
        policy: TrafficPolicy,
        answer: &mut Explanation,
    ) {
        match action {
            Action::Forward { sources: Some(sources), .. }
                if !admits(sources, packet.from) && !self.is_own_balancer(packet, sources) =>
            {
                answer.verdict = Verdict::Dropped;
                answer.reason = format!("{} is in none of loadBalancerSourceRanges", packet.from);
                if self.config.mode == Mode::Userspace && packet.protocol == Protocol::Tcp {
                    answer.reason.push_str("; a relay closes the connection at once");
                }
                for endpoint in &mut answer.endpoints {
                    endpoint.refuse("the client is not in loadBalancerSourceRanges");
                }
            }
            Action::Forward { endpoints, masquerade, affinity, .. } => {
                answer.verdict = Verdict::Forwarded;
                answer.reason = match (endpoints.len(), policy) {
                    (1, _) => "the one eligible endpoint".into(),
                    (n, TrafficPolicy::Cluster) => format!("one of {n} endpoints at random"),
                    (n, TrafficPolicy::Local) => {
                        format!("one of {n} endpoints on this node at random")
                    }
                };
                answer.affinity_seconds = affinity.map(|affinity| affinity.as_secs());
                let masquerade = self.masquerade(*masquerade, frontend, packet, answer.origin);
                answer.masquerade = Some(self.with_endpoints(masquerade, endpoints, packet));
            }
            Action::Drop => {
                answer.verdict = Verdict::Dropped;
                answer.reason =
                    "the traffic policy is Local, and no endpoint is on this node".into();
                if self.config.mode == Mode::Userspace && !self.serves_others(frontend) {
                    // Where nobody listens the kernel itself answers.
                    answer.verdict = Verdict::Rejected;
                }
            }
            Action::Reject | Action::Nothing => {
                answer.verdict = Verdict::Rejected;
                answer.reason = "the Service has no endpoint that is ready".into();
            }
        }
    }

    /// Whether a packet comes from the very address of a load balancer that it goes to: so it does
    /// from a node that has that address too, and what admits the node admits it.
    fn is_own_balancer(&self, packet: &Packet, sources: &[IpNet]) -> bool {
        let mut node = self.desired.node_addresses().iter();
        self.config.mode != Mode::Userspace
            && packet.from == packet.to
            && node.any(|node| admits(sources, *node))
    }

    /// Whether clients inside are served at the same address and port, so that somebody listens.
    fn serves_others(&self, frontend: &Frontend) -> bool {
        let lane = match frontend.lane {
            Lane::Address => Lane::AddressInside,
            Lane::NodePort => Lane::NodePortInside,
            Lane::AddressInside | Lane::NodePortInside => return false,
        };
        let inside = Frontend { lane, ..*frontend };
        matches!(self.desired.action(&inside), Some(Action::Forward { .. }))
    }
}

fn admits(sources: &[IpNet], client: IpAddr) -> bool {
    sources.iter().any(|range| range.contains(&client))
}

fn at(packet: &Packet) -> String {
    std::net::SocketAddr::new(packet.to, packet.port).to_string()
}

fn reached_as(frontend: &Frontend, plan: &PortPlan<'_>) -> &'static str {
    match frontend.address {
        None => "node port",
        Some(address) if address == plan.cluster_ip => "cluster address",
        Some(address) if plan.load_balancer_ips().any(|a| a == address) => "load balancer address",
        Some(_) => "external address",
    }
}

/// Which policy counts: for clients inside, addresses for the outside are as the cluster's own.
fn policy(frontend: &Frontend, plan: &PortPlan<'_>) -> TrafficPolicy {
    match frontend.lane {
        Lane::AddressInside | Lane::NodePortInside => TrafficPolicy::Cluster,
        Lane::Address if frontend.address == Some(plan.cluster_ip) => plan.service.internal_policy,
        Lane::Address | Lane::NodePort => plan.service.external_policy,
    }
}

#[cfg(test)]
mod tests;
