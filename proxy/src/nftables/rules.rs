//! The table's maps, and the chains and rules that don't depend on any Service.
//!
//! Everything here is made once. What is made when it is needed stands in [`super::picks`].
//!
//! Never put a lookup's result into another lookup's key: the kernel takes it, and then the
//! distribution's `nft list ruleset` aborts.

use keelson_api::hash::fnv1a;

use super::{
    batch::{Chain, Hook, MapData, Rule, Set, SetKind},
    expression::{Comparison, Ct, Expression, Register, Verdict},
    layout::*,
    sources::SourcesId,
    steps::{bits_set, rule, translated_only, verdict},
    uapi::*,
};
use crate::{
    model::{Family, Protocol},
    ruleset::{Lane, Masquerade},
};

/// Grows when a release changes rules without changing their comments.
const LAYOUT_VERSION: u32 = 3;
/// `NF_IP_PRI_NAT_DST`.
const PRIORITY_DSTNAT: i32 = -100;
/// `NF_IP_PRI_NAT_SRC`.
const PRIORITY_SRCNAT: i32 = 100;
/// Rejects what has no endpoint, before translation.
const PRIORITY_BEFORE_DSTNAT: i32 = PRIORITY_DSTNAT - 10;
/// `NF_IP_PRI_FILTER`.
const PRIORITY_FILTER: i32 = 0;
/// Remembers where new connections were sent, right after translation.
const PRIORITY_AFTER_DSTNAT: i32 = PRIORITY_DSTNAT + 10;
/// The most clients that are remembered at a time.
const AFFINITY_SIZE: u32 = 262_144;
/// Chains for so many endpoints are made at the start.
const COMMON_ENDPOINTS: u32 = 8;

/// nft's numbers of data types (`enum datatypes`), which tell `nft list` how to print a key.
pub(super) mod types {
    pub(crate) const IPV4_ADDR: u32 = 7;
    pub(crate) const IPV6_ADDR: u32 = 8;
    pub(crate) const INET_PROTO: u32 = 12;
    pub(crate) const INET_SERVICE: u32 = 13;
    pub(crate) const MARK: u32 = 19;

    /// A concatenation, as nft packs it: six bits a part.
    pub(crate) fn concat(parts: &[u32]) -> u32 {
        parts.iter().fold(0, |all, part| all << 6 | part)
    }
}

impl Layout {
    /// All sets and maps.
    pub(crate) fn sets(&self) -> Vec<Set> {
        use types::{INET_PROTO, INET_SERVICE, MARK, concat};
        let (address, length) = match self.family {
            Family::V4 => (types::IPV4_ADDR, 4),
            Family::V6 => (types::IPV6_ADDR, 16),
        };
        let endpoint =
            MapData::Value { data_type: concat(&[address, INET_SERVICE]), length: length + 4 };
        let set = |name: &'static str, key: &[u32], key_length, data| Set {
            name: name.into(),
            key_type: concat(key),
            key_length,
            data,
            kind: SetKind::Plain,
        };
        let with_address = [address, INET_PROTO, INET_SERVICE, MARK];
        let without = [INET_PROTO, INET_SERVICE, MARK];
        vec![
            set(SERVICES, &with_address[..3], length + 8, MapData::Verdict),
            set(ENDPOINTS, &with_address, length + 12, endpoint),
            set(SERVICES_INSIDE, &with_address[..3], length + 8, MapData::Verdict),
            set(INSIDE_ENDPOINTS, &with_address, length + 12, endpoint),
            set(NODEPORTS, &without[..2], 8, MapData::Verdict),
            set(NODEPORT_ENDPOINTS, &without, 12, endpoint),
            set(NODEPORTS_INSIDE, &without[..2], 8, MapData::Verdict),
            set(NODEPORT_INSIDE_ENDPOINTS, &without, 12, endpoint),
            set(FIREWALL, &with_address[..3], length + 8, MapData::Verdict),
            set(
                OWN_BALANCERS,
                &[address, address, INET_PROTO, INET_SERVICE],
                2 * length + 8,
                MapData::None,
            ),
            set(NO_ENDPOINTS, &with_address[..3], length + 8, MapData::Verdict),
            set(NO_ENDPOINT_NODEPORTS, &without[..2], 8, MapData::Verdict),
            set(CLUSTER_IPS, &[address], length, MapData::None),
            Set {
                kind: SetKind::Intervals,
                ..set(SERVICE_RANGES, &[address], length, MapData::None)
            },
            set(HAIRPIN, &[address, address], 2 * length, MapData::None),
            set(NODEPORT_IPS, &[address], length, MapData::None),
            set(STICKY, &with_address[..3], length + 8, MapData::Verdict),
            set(STICKY_NODEPORTS, &without[..2], 8, MapData::Verdict),
            Set {
                name: AFFINITY.into(),
                key_type: concat(&[address, address, INET_PROTO, INET_SERVICE]),
                key_length: 2 * length + 8,
                data: endpoint,
                kind: SetKind::Dynamic { size: AFFINITY_SIZE },
            },
        ]
    }

    /// The set of a list of source ranges.
    pub(crate) fn source_set(&self, id: SourcesId) -> Set {
        let key_type = match self.family {
            Family::V4 => types::IPV4_ADDR,
            Family::V6 => types::IPV6_ADDR,
        };
        Set {
            name: id.name().into(),
            key_type,
            key_length: self.address_length(),
            data: MapData::None,
            kind: SetKind::Intervals,
        }
    }

    /// All chains that don't depend on a number of endpoints.
    pub(crate) fn chains(&self) -> Vec<Chain> {
        let nat = |name: &str, hook, rules| Chain {
            name: name.into(),
            hook: Some(Hook { kind: "nat", hook, priority: PRIORITY_DSTNAT }),
            rules,
        };
        let filter = |name: &str, hook, priority, rules| Chain {
            name: name.into(),
            hook: Some(Hook { kind: "filter", hook, priority }),
            rules,
        };
        let plain = |name: &str, rules| Chain { name: name.into(), hook: None, rules };
        let check_endpoints = || {
            let mut steps = self.new_connection();
            steps.push(verdict(Verdict::Goto(CHECK_ENDPOINTS.into())));
            vec![rule("new connections", steps)]
        };
        let check_cluster_ips = || {
            let mut steps = self.new_connection();
            steps.push(verdict(Verdict::Goto(CHECK_CLUSTER_IPS.into())));
            vec![rule("what was not translated", steps)]
        };
        vec![
            nat(
                "nat-prerouting",
                NF_INET_PRE_ROUTING,
                self.dispatch(self.pod_conditions(), "services from pods", FROM_OUTSIDE),
            ),
            nat(
                "nat-output",
                NF_INET_LOCAL_OUT,
                // The node itself is inside, whatever its address.
                self.dispatch(vec![Vec::new()], "services from the node", FROM_HOST),
            ),
            Chain {
                name: "nat-postrouting".into(),
                hook: Some(Hook {
                    kind: "nat",
                    hook: NF_INET_POST_ROUTING,
                    priority: PRIORITY_SRCNAT,
                }),
                rules: self.postrouting(),
            },
            filter(
                "filter-prerouting",
                NF_INET_PRE_ROUTING,
                PRIORITY_BEFORE_DSTNAT,
                check_endpoints(),
            ),
            filter("filter-output", NF_INET_LOCAL_OUT, PRIORITY_BEFORE_DSTNAT, check_endpoints()),
            filter("filter-forward", NF_INET_FORWARD, PRIORITY_FILTER, check_cluster_ips()),
            filter(
                "filter-output-translated",
                NF_INET_LOCAL_OUT,
                PRIORITY_FILTER,
                check_cluster_ips(),
            ),
            filter(
                "affinity-prerouting",
                NF_INET_PRE_ROUTING,
                PRIORITY_AFTER_DSTNAT,
                self.translated(),
            ),
            filter("affinity-output", NF_INET_LOCAL_OUT, PRIORITY_AFTER_DSTNAT, self.translated()),
            plain(REMEMBER, self.remember()),
            plain(FROM_OUTSIDE, self.node_ports_from_outside()),
            plain(FROM_HOST, self.node_ports_from_host()),
            plain(CHECK_ENDPOINTS, self.endpoint_checks()),
            plain(CHECK_CLUSTER_IPS, self.cluster_ip_checks()),
            plain(REJECT, self.rejects()),
        ]
    }

    /// The chains that are made before any Service is known.
    pub(crate) fn common_chains() -> impl Iterator<Item = DynamicChain> {
        (1..=COMMON_ENDPOINTS).map(|count| {
            DynamicChain::Pick(PickChain {
                lane: Lane::Address,
                masquerade: Masquerade::OffCluster,
                sticky: false,
                count,
            })
        })
    }

    /// Whether a chain is among those, and stays though nothing may lead to it.
    pub(crate) fn is_common(chain: DynamicChain) -> bool {
        Self::common_chains().any(|common| common == chain)
    }

    /// One chain of each kind.
    pub(crate) fn one_of_each() -> impl Iterator<Item = DynamicChain> {
        let picks = PREFIXES.into_iter().flat_map(|(lane, masquerade, _)| {
            [false, true]
                .map(|sticky| DynamicChain::Pick(PickChain { lane, masquerade, sticky, count: 2 }))
        });
        picks.chain([DynamicChain::Remember(10_800), DynamicChain::Sources(SourcesId::default())])
    }

    /// A text that differs when the rules do, kept in the table.
    pub(crate) fn fingerprint(&self) -> String {
        let picks: Vec<Chain> = Self::one_of_each().map(|c| self.dynamic_chain(c)).collect();
        let all = format!("{LAYOUT_VERSION} {:?} {:?} {picks:?}", self.sets(), self.chains());
        let hash = fnv1a(all.as_bytes());
        format!("Kubernetes Services, written by keelson; layout {hash:016x}")
    }

    fn translated(&self) -> Vec<Rule> {
        let mut steps = self.new_connection();
        steps.extend(translated_only());
        steps.push(verdict(Verdict::Goto(REMEMBER.into())));
        vec![rule("new connections", steps)]
    }

    fn remember(&self) -> Vec<Rule> {
        let v6 = self.family == Family::V6;
        let lookup = |map, address: bool| {
            let mut steps = Vec::new();
            let mut next = 0;
            if address {
                let key = Ct::OriginalDestination { v6 };
                steps.push(Expression::Connection { to: Register::new(0), key });
                next = self.address_length() / 4;
            }
            steps.push(Expression::TransportProtocol { to: Register::new(next) });
            steps.push(Expression::Connection {
                to: Register::new(next + 1),
                key: Ct::OriginalPort,
            });
            steps.push(Expression::VerdictLookup { map, key: Register::new(0) });
            steps
        };
        vec![
            rule("sticky services", lookup(STICKY, true)),
            rule("sticky node ports", lookup(STICKY_NODEPORTS, false)),
        ]
    }

    /// Where new connections go. Clients for whom any of the conditions `inside` holds look for
    /// what is only for them first.
    fn dispatch(&self, inside: Vec<Vec<Expression>>, comment: &str, node_ports: &str) -> Vec<Rule> {
        let mut rules: Vec<Rule> = inside
            .into_iter()
            .map(|mut steps| {
                steps.extend(self.verdict_lookup(SERVICES_INSIDE, true));
                rule(comment, steps)
            })
            .collect();
        rules.push(rule("services", self.verdict_lookup(SERVICES, true)));
        rules.extend(self.to_the_node().into_iter().map(|mut steps| {
            steps.push(verdict(Verdict::Goto(node_ports.into())));
            rule("node ports", steps)
        }));
        rules
    }

    fn node_ports_from_outside(&self) -> Vec<Rule> {
        let mut rules: Vec<Rule> = self
            .pod_conditions()
            .into_iter()
            .map(|mut steps| {
                steps.extend(self.verdict_lookup(NODEPORTS_INSIDE, false));
                rule("from pods", steps)
            })
            .collect();
        rules.push(rule("from anywhere", self.verdict_lookup(NODEPORTS, false)));
        rules
    }

    fn node_ports_from_host(&self) -> Vec<Rule> {
        vec![
            rule("from the node", self.verdict_lookup(NODEPORTS_INSIDE, false)),
            rule("from anywhere", self.verdict_lookup(NODEPORTS, false)),
        ]
    }

    fn postrouting(&self) -> Vec<Rule> {
        let (register, second) = (Register::new(0), Register::new(self.address_length() / 4));
        let mark = self.masquerade_mark;
        let mut marked = bits_set(Expression::Mark { to: register }, mark);
        marked.extend([
            Expression::Mark { to: register },
            Expression::Bitwise {
                from: register,
                to: register,
                mask: (!mark).to_ne_bytes().to_vec(),
                xor: vec![0; 4],
            },
            Expression::SetMark { from: register },
            Expression::Masquerade,
        ]);
        vec![
            rule(
                "endpoints that are their own client",
                [
                    // Others between the same addresses are not ours, and a connection older than
                    // the rules would break with another source port.
                    translated_only(),
                    vec![
                        self.source_address(register),
                        self.destination_address(second),
                        Expression::InSet { set: HAIRPIN, key: register },
                        Expression::Masquerade,
                    ],
                ]
                .concat(),
            ),
            rule("marked connections", marked),
        ]
    }

    fn endpoint_checks(&self) -> Vec<Rule> {
        let mut rules = vec![
            rule("who may come", self.verdict_lookup(FIREWALL, true)),
            rule("services without endpoints", self.verdict_lookup(NO_ENDPOINTS, true)),
        ];
        rules.extend(self.to_the_node().into_iter().map(|mut steps| {
            steps.extend(self.verdict_lookup(NO_ENDPOINT_NODEPORTS, false));
            rule("node ports without endpoints", steps)
        }));
        rules
    }

    fn cluster_ip_checks(&self) -> Vec<Rule> {
        let mut steps = self.in_address_set(CLUSTER_IPS);
        steps.push(verdict(Verdict::Goto(REJECT.into())));
        let mut unallocated = self.in_address_set(SERVICE_RANGES);
        unallocated.push(verdict(Verdict::Drop));
        vec![
            rule("ports that no service has", steps),
            rule("addresses that no service has", unallocated),
        ]
    }

    fn rejects(&self) -> Vec<Rule> {
        let register = Register::new(0);
        let code = match self.family {
            // ICMP_PORT_UNREACH
            Family::V4 => 3,
            // ICMPV6_PORT_UNREACH
            Family::V6 => 4,
        };
        vec![
            rule(
                "TCP",
                vec![
                    Expression::TransportProtocol { to: register },
                    Expression::Compare {
                        register,
                        comparison: Comparison::Equal,
                        value: vec![Protocol::Tcp.number()],
                    },
                    Expression::RejectWithReset,
                ],
            ),
            rule("all else", vec![Expression::RejectWithUnreachable { code }]),
        ]
    }
}
