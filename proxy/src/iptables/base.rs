//! The chains that all Services share, and how packets get to them.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use ipnet::{IpNet, Ipv4Net};

use super::{
    Settings,
    chain::{Place, Table},
    rule::{Rule, host},
};
use crate::{
    config::{DetectLocal, NodePortAddresses},
    model::Family,
};

/// Marks what is to be masqueraded.
pub(crate) const MARK: &str = "KUBE-MARK-MASQ";
/// Marks it unless it comes from a pod, where pods have several ranges.
pub(crate) const MARK_OUTSIDE: &str = "KUBE-MARK-OUTSIDE";
/// A chain that nothing goes through: if it is gone, somebody flushed the rules.
pub(crate) const CANARY: &str = "KUBE-PROXY-CANARY";
/// Guards loopback. Kubelets make it too, so other rules in it stay.
pub(crate) const GUARD: &str = "KUBE-FIREWALL";
/// Masquerades what was marked.
pub(crate) const POSTROUTING: &str = "KUBE-POSTROUTING";
/// Lets Services' traffic through.
pub(crate) const FORWARD: &str = "KUBE-FORWARD";

/// All chains of fixed content that are the proxy's alone.
pub(crate) const CHAINS: [(Table, &str); 7] = [
    (Table::Mangle, CANARY),
    (Table::Filter, CANARY),
    (Table::Nat, CANARY),
    (Table::Filter, FORWARD),
    (Table::Nat, MARK),
    (Table::Nat, MARK_OUTSIDE),
    (Table::Nat, POSTROUTING),
];

/// Chains that only kube-proxy's ipvs mode has. A clean-up removes them.
pub(crate) const OF_IPVS: [(Table, &str); 6] = [
    (Table::Filter, "KUBE-IPVS-FILTER"),
    (Table::Filter, "KUBE-IPVS-OUT-FILTER"),
    (Table::Filter, "KUBE-NODE-PORT"),
    (Table::Filter, "KUBE-SOURCE-RANGES-FIREWALL"),
    (Table::Nat, "KUBE-LOAD-BALANCER"),
    (Table::Nat, "KUBE-NODE-PORT"),
];

/// A chain of fixed content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BaseChain {
    pub(crate) table: Table,
    pub(crate) name: &'static str,
    pub(crate) rules: Vec<Arc<str>>,
}

/// A rule that must be in a chain which isn't the proxy's alone.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Guest {
    pub(crate) table: Table,
    pub(crate) chain: &'static str,
    pub(crate) rule: Arc<str>,
}

/// All that doesn't depend on Services.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Base {
    pub(crate) chains: Vec<BaseChain>,
    pub(crate) guests: Vec<Guest>,
    /// The last rules of `KUBE-SERVICES`: on which addresses node ports are.
    pub(crate) tail: Vec<Arc<str>>,
}

/// How a pod's traffic is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum FromPods {
    Source(IpNet),
    /// With a `+` at its end: all interfaces whose names begin so.
    Interface(String),
}

impl Settings {
    /// Each way in which pods are known in this family.
    pub(crate) fn pods_are_from(&self) -> Vec<FromPods> {
        match &self.detect_local {
            DetectLocal::Nothing | DetectLocal::NodeCidr => Vec::new(),
            DetectLocal::Ranges(ranges) => ranges
                .iter()
                .filter(|range| Family::of(range.addr()) == self.family)
                .map(|range| FromPods::Source(range.trunc()))
                .collect(),
            DetectLocal::Interface(name) => vec![FromPods::Interface(name.clone())],
            DetectLocal::InterfacePrefix(prefix) => {
                vec![FromPods::Interface(format!("{prefix}+"))]
            }
        }
    }

    /// Whether node ports answer on loopback addresses.
    pub(crate) fn node_ports_on_loopback(&self) -> bool {
        let loopback = IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::LOCALHOST, 8)).trunc();
        self.localhost_node_ports
            && self.family == Family::V4
            && match &self.node_port_addresses {
                NodePortAddresses::Primary => false,
                NodePortAddresses::Ranges(ranges) => {
                    ranges.iter().any(|r| r.contains(&loopback) || loopback.contains(r))
                }
            }
    }

    /// All chains and rules that don't depend on Services. `node` are the node's own addresses.
    pub(crate) fn base(&self, node: &[IpAddr], random_fully: bool) -> Base {
        let mut chains: Vec<BaseChain> = Table::ALL
            .into_iter()
            .map(|table| BaseChain { table, name: CANARY, rules: Vec::new() })
            .collect();
        chains.push(BaseChain { table: Table::Filter, name: FORWARD, rules: self.forward() });
        chains.extend(self.marking(random_fully));
        let mut guests = jumps();
        if self.node_ports_on_loopback() {
            guests.extend(guard());
        }
        Base { chains, guests, tail: self.tail(node) }
    }

    fn mark(&self) -> String {
        format!("{:#x}/{0:#x}", self.masquerade_mark)
    }

    fn forward(&self) -> Vec<Arc<str>> {
        let mut rules = Vec::new();
        if !self.tcp_be_liberal {
            // Such packets would go on untranslated, and the client would answer with a reset.
            rules.push(drops_invalid());
        }
        rules.push(
            Rule::new()
                .comment("kubernetes forwarding rules")
                .words(format_args!("-m mark --mark {}", self.mark()))
                .jump("ACCEPT"),
        );
        rules.push(
            Rule::new()
                .comment("kubernetes forwarding conntrack rule")
                .words("-m conntrack --ctstate RELATED,ESTABLISHED")
                .jump("ACCEPT"),
        );
        rules
    }

    fn marking(&self, random_fully: bool) -> Vec<BaseChain> {
        let masquerade = if random_fully { "MASQUERADE --random-fully" } else { "MASQUERADE" };
        let nat = |name, rules| BaseChain { table: Table::Nat, name, rules };
        let mut postrouting = vec![
            Rule::new().words(format_args!("-m mark ! --mark {}", self.mark())).jump("RETURN"),
            // Taken off again, so that a packet that comes back here isn't masqueraded twice.
            Rule::new().jump(format_args!("MARK --set-xmark {:#x}/0x0", self.masquerade_mark)),
            Rule::new().comment("kubernetes service traffic requiring SNAT").jump(masquerade),
        ];
        if self.node_ports_on_loopback() {
            postrouting.insert(1, counts_localhost());
        }
        let mut chains = vec![
            nat(MARK, vec![Rule::new().jump(format_args!("MARK --set-xmark {}", self.mark()))]),
            nat(POSTROUTING, postrouting),
        ];
        let pods = self.pods_are_from();
        if pods.len() > 1 {
            let mut rules: Vec<Arc<str>> = pods
                .iter()
                .map(|pods| match pods {
                    FromPods::Source(range) => Rule::new().source(*range).jump("RETURN"),
                    FromPods::Interface(name) => {
                        Rule::new().words(format_args!("-i {name}")).jump("RETURN")
                    }
                })
                .collect();
            rules.push(Rule::new().jump(MARK));
            chains.push(nat(MARK_OUTSIDE, rules));
        }
        chains
    }

    fn tail(&self, node: &[IpAddr]) -> Vec<Arc<str>> {
        const COMMENT: &str =
            "kubernetes service nodeports; NOTE: this must be the last rule in this chain";
        let to_node_ports = |rule: Rule| rule.jump(Place::NodePorts.name());
        let ranges = match &self.node_port_addresses {
            NodePortAddresses::Primary => {
                let mut node: Vec<IpAddr> =
                    node.iter().copied().filter(|a| Family::of(*a) == self.family).collect();
                node.sort_unstable();
                node.dedup();
                return node
                    .into_iter()
                    .map(|a| to_node_ports(Rule::new().destination(host(a)).comment(COMMENT)))
                    .collect();
            }
            NodePortAddresses::Ranges(ranges) => ranges,
        };
        let mut ranges: Vec<IpNet> = ranges
            .iter()
            .filter(|range| Family::of(range.addr()) == self.family)
            .map(IpNet::trunc)
            .collect();
        if ranges.iter().any(|range| range.prefix_len() == 0) {
            let all = Rule::new();
            let all = if self.node_ports_on_loopback() {
                all
            } else {
                all.words(format_args!("! -d {}", loopback(self.family)))
            };
            let local = all.comment(COMMENT).words("-m addrtype --dst-type LOCAL");
            return vec![to_node_ports(local)];
        }
        ranges.sort_unstable();
        ranges.dedup();
        let mut tail = Vec::new();
        if !self.node_ports_on_loopback() && !ranges.is_empty() {
            tail.push(
                Rule::new().words(format_args!("-d {}", loopback(self.family))).jump("RETURN"),
            );
        }
        tail.extend(ranges.into_iter().map(|range| {
            let rule = Rule::new().destination(range).comment(COMMENT);
            to_node_ports(rule.words("-m addrtype --dst-type LOCAL"))
        }));
        tail
    }
}

/// Drops what the connection table can't place, in [`FORWARD`].
pub(crate) fn drops_invalid() -> Arc<str> {
    Rule::new().words("-m conntrack --ctstate INVALID").jump("DROP")
}

/// Counts connections to node ports on loopback, in [`POSTROUTING`]: they are all marked, and only
/// their first packet gets there.
pub(crate) fn counts_localhost() -> Arc<str> {
    Rule::new()
        .comment("connections to node ports on loopback")
        .words("-m conntrack --ctorigdst 127.0.0.0/8")
        .end()
}

fn loopback(family: Family) -> &'static str {
    match family {
        Family::V4 => "127.0.0.0/8",
        Family::V6 => "::1/128",
    }
}

/// The ways from the kernel's chains to the proxy's.
fn jumps() -> Vec<Guest> {
    const PORTALS: &str = "kubernetes service portals";
    const EXTERNAL: &str = "kubernetes externally-visible service portals";
    const FIREWALL: &str = "kubernetes load balancer firewall";
    let jump = |table, chain, new, comment, target: &'static str| {
        let rule = if new { Rule::new().words("-m conntrack --ctstate NEW") } else { Rule::new() };
        Guest { table, chain, rule: rule.comment(comment).jump(target) }
    };
    let filter =
        |chain, comment, place: Place| jump(Table::Filter, chain, true, comment, place.name());
    vec![
        filter("INPUT", EXTERNAL, Place::RejectedExternal),
        filter("FORWARD", EXTERNAL, Place::RejectedExternal),
        // The node itself is refused at once too; with kube-proxy it waits.
        filter("OUTPUT", EXTERNAL, Place::RejectedExternal),
        jump(
            Table::Filter,
            "INPUT",
            false,
            "kubernetes health check service ports",
            Place::HealthChecks.name(),
        ),
        filter("FORWARD", PORTALS, Place::RejectedServices),
        filter("OUTPUT", PORTALS, Place::RejectedServices),
        jump(Table::Filter, "FORWARD", false, "kubernetes forwarding rules", FORWARD),
        filter("INPUT", FIREWALL, Place::Firewall),
        filter("FORWARD", FIREWALL, Place::Firewall),
        filter("OUTPUT", FIREWALL, Place::Firewall),
        jump(Table::Nat, "PREROUTING", false, PORTALS, Place::Services.name()),
        jump(Table::Nat, "OUTPUT", false, PORTALS, Place::Services.name()),
        jump(Table::Nat, "POSTROUTING", false, "kubernetes postrouting rules", POSTROUTING),
    ]
}

/// With `route_localnet`, which node ports on loopback need, neighbours could reach what listens on
/// 127.0.0.0/8 (CVE-2020-8558).
pub(crate) fn guard() -> Vec<Guest> {
    let guest = |chain, rule| Guest { table: Table::Filter, chain, rule };
    vec![
        guest("INPUT", Rule::new().jump(GUARD)),
        guest("OUTPUT", Rule::new().jump(GUARD)),
        guest(
            GUARD,
            Rule::new()
                .words("! -s 127.0.0.0/8 -d 127.0.0.0/8")
                .comment("block incoming localnet connections")
                .words("-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT")
                .jump("DROP"),
        ),
    ]
}

/// Every rule that the proxy may have put among others'.
pub(crate) fn all_guests() -> impl Iterator<Item = Guest> {
    jumps().into_iter().chain(guard())
}
