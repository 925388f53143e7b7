//! The table's chains, rules and maps: all that doesn't depend on any Service.
//!
//! Everything here is made once. The chains that pick one of N endpoints are made for the common N
//! at once and for others when an N is first seen, always one commit before the first element
//! points to them: a packet that is under way during a commit sees the new element but an empty
//! chain.
//!
//! Never put a lookup's result into another lookup's key: the kernel takes it, and then the
//! distribution's `nft list ruleset` aborts.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{
    batch::{Chain, Hook, MapData, Rule, Set},
    expression::{Comparison, Ct, Expression, Register, Verdict},
    layout::*,
    uapi::*,
};
use crate::{
    config::{DetectLocal, NodePortAddresses},
    model::{Family, Protocol},
    ruleset::{Lane, Masquerade},
};

/// Grows when a release changes rules without changing their comments.
const LAYOUT_VERSION: u32 = 2;
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
mod types {
    pub(super) const IPV4_ADDR: u32 = 7;
    pub(super) const IPV6_ADDR: u32 = 8;
    pub(super) const INET_PROTO: u32 = 12;
    pub(super) const INET_SERVICE: u32 = 13;
    pub(super) const MARK: u32 = 19;

    /// A concatenation, as nft packs it: six bits a part.
    pub(super) fn concat(parts: &[u32]) -> u32 {
        parts.iter().fold(0, |all, part| all << 6 | part)
    }
}

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
        let set = |name, key: &[u32], key_length, data| Set {
            name,
            key_type: concat(key),
            key_length,
            data,
            dynamic: None,
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
            set(NO_ENDPOINTS, &with_address[..3], length + 8, MapData::Verdict),
            set(NO_ENDPOINT_NODEPORTS, &without[..2], 8, MapData::Verdict),
            set(CLUSTER_IPS, &[address], length, MapData::None),
            set(HAIRPIN, &[address, address], 2 * length, MapData::None),
            set(NODEPORT_IPS, &[address], length, MapData::None),
            set(STICKY, &with_address[..3], length + 8, MapData::Verdict),
            set(STICKY_NODEPORTS, &without[..2], 8, MapData::Verdict),
            Set {
                name: AFFINITY,
                key_type: concat(&[address, address, INET_PROTO, INET_SERVICE]),
                key_length: 2 * length + 8,
                data: endpoint,
                dynamic: Some(AFFINITY_SIZE),
            },
        ]
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
            nat("nat-prerouting", NF_INET_PRE_ROUTING, self.dispatch(FROM_OUTSIDE)),
            nat("nat-output", NF_INET_LOCAL_OUT, self.dispatch(FROM_HOST)),
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

    /// One chain of each kind.
    pub(crate) fn one_of_each() -> impl Iterator<Item = DynamicChain> {
        let picks = PREFIXES.into_iter().flat_map(|(lane, masquerade, _)| {
            [false, true]
                .map(|sticky| DynamicChain::Pick(PickChain { lane, masquerade, sticky, count: 2 }))
        });
        picks.chain([DynamicChain::Remember(10_800)])
    }

    /// A chain that is made when it is needed, with its rules.
    pub(crate) fn dynamic_chain(&self, chain: DynamicChain) -> Chain {
        match chain {
            DynamicChain::Pick(pick) => self.pick_chain(pick),
            DynamicChain::Remember(seconds) => Chain {
                name: chain.name(),
                hook: None,
                rules: vec![rule("where the client was sent", self.remember_for(seconds))],
            },
        }
    }

    /// A chain that picks one of so many endpoints.
    fn pick_chain(&self, chain: PickChain) -> Chain {
        let mut rules = Vec::new();
        let mark = match chain.masquerade {
            Masquerade::Always => Some(("hide the client's address", Vec::new())),
            Masquerade::Never => None,
            Masquerade::OffCluster if self.masquerade_all => {
                Some(("hide the client's address", Vec::new()))
            }
            // Without a range of pods nobody is known to be off it.
            Masquerade::OffCluster => {
                let steps: Vec<_> =
                    self.cidrs().flat_map(|c| self.source(c, Comparison::NotEqual)).collect();
                (!steps.is_empty()).then_some(("hide addresses from outside", steps))
            }
        };
        if let Some((comment, mut steps)) = mark {
            steps.extend(self.set_mark());
            rules.push(rule(comment, steps));
        }
        if chain.sticky {
            rules.push(rule("where it went before", self.return_to_endpoint()));
            let afresh = PickChain { sticky: false, ..chain };
            rules.push(rule("or afresh", vec![verdict(Verdict::Goto(afresh.name()))]));
            return Chain { name: chain.name(), hook: None, rules };
        }
        let map = lane_maps(chain.lane).endpoints;
        let with_address = chain.lane.with_address();
        let pick = |modulus| {
            let (mut steps, next) = self.frontend_key(with_address);
            steps.push(Expression::Random { to: next, modulus });
            steps.extend(self.translate_by(map));
            steps
        };
        rules.push(rule(&format!("one of {}", chain.count), pick(chain.count)));
        // The verdict may be older than the endpoints that are looked up now, since a commit may
        // come in between. Index 0 is there as long as anybody is.
        rules.push(rule("or the first", pick(1)));
        rules.push(rule("or none: the client tries again", vec![verdict(Verdict::Drop)]));
        Chain { name: chain.name(), hook: None, rules }
    }

    /// A text that differs when the rules do, kept in the table.
    pub(crate) fn fingerprint(&self) -> String {
        let picks: Vec<Chain> = Self::one_of_each().map(|c| self.dynamic_chain(c)).collect();
        let all = format!("{LAYOUT_VERSION} {:?} {:?} {picks:?}", self.sets(), self.chains());
        // FNV-1a: stable over releases of the compiler, and good enough to tell layouts apart.
        let hash = all.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        format!("Kubernetes Services, written by keelson; layout {hash:016x}")
    }

    fn cidrs(&self) -> impl Iterator<Item = &IpNet> {
        let ranges = match &self.detect_local {
            DetectLocal::Ranges(ranges) => &ranges[..],
            _ => &[],
        };
        ranges.iter().filter(|net| Family::of(net.addr()) == self.family)
    }

    fn address_length(&self) -> u32 {
        match self.family {
            Family::V4 => 4,
            Family::V6 => 16,
        }
    }

    fn source_address(&self, to: Register) -> Expression {
        let offset = match self.family {
            Family::V4 => 12,
            Family::V6 => 8,
        };
        Expression::NetworkHeader { to, offset, length: self.address_length() }
    }

    fn destination_address(&self, to: Register) -> Expression {
        let offset = match self.family {
            Family::V4 => 16,
            Family::V6 => 24,
        };
        Expression::NetworkHeader { to, offset, length: self.address_length() }
    }

    /// Loads `daddr . protocol . dport` or `protocol . dport` from the first register on; the next
    /// free register comes along.
    fn frontend_key(&self, with_address: bool) -> (Vec<Expression>, Register) {
        let mut steps = Vec::new();
        let mut next = 0;
        if with_address {
            steps.push(self.destination_address(Register::new(0)));
            next = self.address_length() / 4;
        }
        steps.push(Expression::TransportProtocol { to: Register::new(next) });
        steps.push(Expression::TransportHeader {
            to: Register::new(next + 1),
            offset: 2,
            length: 2,
        });
        (steps, Register::new(next + 2))
    }

    /// Looks up the key from the first register on, and translates to what the map has.
    fn translate_by(&self, map: &'static str) -> [Expression; 2] {
        let first = Register::new(0);
        [
            Expression::MapLookup { map, key: first, to: first },
            Expression::DestinationNat {
                family: self.family.protocol_family(),
                address: first,
                port: Register::new(self.address_length() / 4),
            },
        ]
    }

    fn return_to_endpoint(&self) -> Vec<Expression> {
        let words = self.address_length() / 4;
        let mut steps = vec![
            self.source_address(Register::new(0)),
            self.destination_address(Register::new(words)),
            Expression::TransportProtocol { to: Register::new(2 * words) },
            Expression::TransportHeader { to: Register::new(2 * words + 1), offset: 2, length: 2 },
        ];
        steps.extend(self.translate_by(AFFINITY));
        steps
    }

    fn translated(&self) -> Vec<Rule> {
        // IPS_DST_NAT
        const TRANSLATED: u32 = 1 << 5;
        let mut steps = self.new_connection();
        let status = Expression::Connection { to: Register::new(0), key: Ct::Status };
        steps.extend(bits_set(status, TRANSLATED));
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

    fn remember_for(&self, seconds: u32) -> Vec<Expression> {
        let v6 = self.family == Family::V6;
        let words = self.address_length() / 4;
        let key = Register::new(0);
        let data = Register::new(2 * words + 2);
        vec![
            Expression::Connection { to: key, key: Ct::OriginalSource { v6 } },
            Expression::Connection {
                to: Register::new(words),
                key: Ct::OriginalDestination { v6 },
            },
            Expression::TransportProtocol { to: Register::new(2 * words) },
            Expression::Connection { to: Register::new(2 * words + 1), key: Ct::OriginalPort },
            self.destination_address(data),
            Expression::TransportHeader { to: Register::new(3 * words + 2), offset: 2, length: 2 },
            Expression::UpdateMap { map: AFFINITY, key, data, timeout: u64::from(seconds) * 1_000 },
        ]
    }

    fn verdict_lookup(&self, map: &'static str, with_address: bool) -> Vec<Expression> {
        let (mut steps, _) = self.frontend_key(with_address);
        steps.push(Expression::VerdictLookup { map, key: Register::new(0) });
        steps
    }

    fn in_network(load: Expression, network: &IpNet, comparison: Comparison) -> Vec<Expression> {
        let register = Register::new(0);
        let bytes = |address: IpAddr| match address {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        let mask = bytes(network.netmask());
        let mut steps = vec![load];
        if network.prefix_len() < network.max_prefix_len() {
            let xor = vec![0; mask.len()];
            steps.push(Expression::Bitwise { from: register, to: register, mask, xor });
        }
        let value = bytes(network.network());
        steps.push(Expression::Compare { register, comparison, value });
        steps
    }

    fn source(&self, network: &IpNet, comparison: Comparison) -> Vec<Expression> {
        Self::in_network(self.source_address(Register::new(0)), network, comparison)
    }

    fn destination(&self, network: &IpNet, comparison: Comparison) -> Vec<Expression> {
        Self::in_network(self.destination_address(Register::new(0)), network, comparison)
    }

    fn in_address_set(&self, set: &'static str) -> Vec<Expression> {
        let key = Register::new(0);
        vec![self.destination_address(key), Expression::InSet { set, key }]
    }

    fn set_mark(&self) -> [Expression; 3] {
        let register = Register::new(0);
        [
            Expression::Mark { to: register },
            Expression::Bitwise {
                from: register,
                to: register,
                mask: (!self.masquerade_mark).to_ne_bytes().to_vec(),
                xor: self.masquerade_mark.to_ne_bytes().to_vec(),
            },
            Expression::SetMark { from: register },
        ]
    }

    fn new_connection(&self) -> Vec<Expression> {
        // NF_CT_STATE_BIT(IP_CT_NEW)
        const NEW: u32 = 1 << 3;
        bits_set(Expression::Connection { to: Register::new(0), key: Ct::State }, NEW)
    }

    fn dispatch(&self, node_ports: &str) -> Vec<Rule> {
        let mut rules = vec![rule("services", self.verdict_lookup(SERVICES, true))];
        rules.extend(self.to_the_node().into_iter().map(|mut steps| {
            steps.push(verdict(Verdict::Goto(node_ports.into())));
            rule("node ports", steps)
        }));
        rules
    }

    /// Conditions, any of which says that a packet is for an address which answers on node ports.
    fn to_the_node(&self) -> Vec<Vec<Expression>> {
        let register = Register::new(0);
        match &self.node_port_addresses {
            NodePortAddresses::Primary => vec![self.in_address_set(NODEPORT_IPS)],
            NodePortAddresses::Ranges(ranges) => ranges
                .iter()
                .filter(|range| Family::of(range.addr()) == self.family)
                .map(|range| {
                    let mut steps = vec![
                        Expression::DestinationType { to: register },
                        Expression::Compare {
                            register,
                            comparison: Comparison::Equal,
                            value: RTN_LOCAL.to_ne_bytes().to_vec(),
                        },
                    ];
                    // Node ports are never on loopback in this mode: what comes in there can't be
                    // sent anywhere else without `route_localnet`, which opens the host's own
                    // services to its neighbours (CVE-2020-8558).
                    let loopback = match self.family {
                        Family::V4 => "127.0.0.0/8".parse(),
                        Family::V6 => "::1/128".parse(),
                    };
                    if let Ok(loopback) = loopback {
                        steps.extend(self.destination(&loopback, Comparison::NotEqual));
                    }
                    if range.prefix_len() > 0 {
                        steps.extend(self.destination(range, Comparison::Equal));
                    }
                    steps
                })
                .collect(),
        }
    }

    fn node_ports_from_outside(&self) -> Vec<Rule> {
        let mut rules: Vec<Rule> = self
            .cidrs()
            .map(|cidr| {
                let mut steps = self.source(cidr, Comparison::Equal);
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
                vec![
                    self.source_address(register),
                    self.destination_address(second),
                    Expression::InSet { set: HAIRPIN, key: register },
                    Expression::Masquerade,
                ],
            ),
            rule("marked connections", marked),
        ]
    }

    fn endpoint_checks(&self) -> Vec<Rule> {
        let mut rules =
            vec![rule("services without endpoints", self.verdict_lookup(NO_ENDPOINTS, true))];
        rules.extend(self.to_the_node().into_iter().map(|mut steps| {
            steps.extend(self.verdict_lookup(NO_ENDPOINT_NODEPORTS, false));
            rule("node ports without endpoints", steps)
        }));
        rules
    }

    fn cluster_ip_checks(&self) -> Vec<Rule> {
        let mut steps = self.in_address_set(CLUSTER_IPS);
        steps.push(verdict(Verdict::Goto(REJECT.into())));
        vec![rule("ports that no service has", steps)]
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

fn rule(comment: &str, expressions: Vec<Expression>) -> Rule {
    Rule { comment: comment.to_owned(), expressions }
}

fn verdict(verdict: Verdict) -> Expression {
    Expression::Verdict(verdict)
}

/// Goes on if any of `bits` is set in what `load` loads into the first register.
fn bits_set(load: Expression, bits: u32) -> Vec<Expression> {
    let register = Register::new(0);
    vec![
        load,
        Expression::Bitwise {
            from: register,
            to: register,
            mask: bits.to_ne_bytes().to_vec(),
            xor: vec![0; 4],
        },
        Expression::Compare { register, comparison: Comparison::NotEqual, value: vec![0; 4] },
    ]
}
