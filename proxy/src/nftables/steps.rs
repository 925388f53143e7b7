//! What rules are put together from: conditions on a packet, and keys of maps.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{
    batch::Rule,
    expression::{Comparison, Ct, Expression, Register, Verdict},
    layout::{Layout, NODEPORT_IPS},
    uapi::RTN_LOCAL,
};
use crate::{
    config::{DetectLocal, NodePortAddresses},
    model::Family,
};

/// `IFNAMSIZ`: the kernel's length of an interface's name with the zero byte after it.
const INTERFACE_NAME: usize = 16;

impl Layout {
    fn pod_ranges(&self) -> impl Iterator<Item = &IpNet> {
        let ranges = match &self.detect_local {
            DetectLocal::Ranges(ranges) => &ranges[..],
            _ => &[],
        };
        ranges.iter().filter(|net| Family::of(net.addr()) == self.family)
    }

    /// Conditions, any of which says that a packet comes from a pod.
    pub(super) fn pod_conditions(&self) -> Vec<Vec<Expression>> {
        self.detect(Comparison::Equal)
    }

    /// The condition that a packet doesn't come from a pod; `None` if nobody can tell.
    ///
    /// What the node itself sends has no interface to come in by, so where pods are told by their
    /// interface, the node is not one of them, as with kube-proxy.
    pub(crate) fn not_from_pods(&self) -> Option<Vec<Expression>> {
        let steps = self.detect(Comparison::NotEqual).concat();
        (!steps.is_empty()).then_some(steps)
    }

    fn detect(&self, comparison: Comparison) -> Vec<Vec<Expression>> {
        let register = Register::new(0);
        let interface = |value: Vec<u8>| {
            vec![vec![
                Expression::InputInterface { to: register },
                Expression::Compare { register, comparison, value },
            ]]
        };
        match &self.detect_local {
            DetectLocal::Ranges(_) => {
                self.pod_ranges().map(|range| self.source(range, comparison)).collect()
            }
            DetectLocal::Interface(name) => {
                let mut value = name.clone().into_bytes();
                value.resize(INTERFACE_NAME, 0);
                interface(value)
            }
            DetectLocal::InterfacePrefix(prefix) if !prefix.is_empty() => {
                let mut value = prefix.clone().into_bytes();
                value.truncate(INTERFACE_NAME);
                interface(value)
            }
            DetectLocal::Nothing | DetectLocal::NodeCidr | DetectLocal::InterfacePrefix(_) => {
                Vec::new()
            }
        }
    }

    pub(super) fn address_length(&self) -> u32 {
        match self.family {
            Family::V4 => 4,
            Family::V6 => 16,
        }
    }

    pub(super) fn source_address(&self, to: Register) -> Expression {
        let offset = match self.family {
            Family::V4 => 12,
            Family::V6 => 8,
        };
        Expression::NetworkHeader { to, offset, length: self.address_length() }
    }

    pub(super) fn destination_address(&self, to: Register) -> Expression {
        let offset = match self.family {
            Family::V4 => 16,
            Family::V6 => 24,
        };
        Expression::NetworkHeader { to, offset, length: self.address_length() }
    }

    /// Loads `daddr . protocol . dport` or `protocol . dport` from the first register on; the next
    /// free register comes along.
    pub(super) fn frontend_key(&self, with_address: bool) -> (Vec<Expression>, Register) {
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

    pub(super) fn verdict_lookup(&self, map: &'static str, with_address: bool) -> Vec<Expression> {
        let (mut steps, _) = self.frontend_key(with_address);
        steps.push(Expression::VerdictLookup { map, key: Register::new(0) });
        steps
    }

    pub(super) fn in_network(
        load: Expression,
        network: &IpNet,
        comparison: Comparison,
    ) -> Vec<Expression> {
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

    pub(super) fn source(&self, network: &IpNet, comparison: Comparison) -> Vec<Expression> {
        Self::in_network(self.source_address(Register::new(0)), network, comparison)
    }

    pub(super) fn destination(&self, network: &IpNet, comparison: Comparison) -> Vec<Expression> {
        Self::in_network(self.destination_address(Register::new(0)), network, comparison)
    }

    pub(super) fn in_address_set(&self, set: &'static str) -> Vec<Expression> {
        let key = Register::new(0);
        vec![self.destination_address(key), Expression::InSet { set, key }]
    }

    pub(super) fn set_mark(&self) -> [Expression; 3] {
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

    pub(super) fn new_connection(&self) -> Vec<Expression> {
        // NF_CT_STATE_BIT(IP_CT_NEW)
        const NEW: u32 = 1 << 3;
        bits_set(Expression::Connection { to: Register::new(0), key: Ct::State }, NEW)
    }

    /// Conditions, any of which says that a packet is for an address which answers on node ports.
    pub(super) fn to_the_node(&self) -> Vec<Vec<Expression>> {
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
}

pub(super) fn rule(comment: &str, expressions: Vec<Expression>) -> Rule {
    Rule { comment: comment.to_owned(), expressions }
}

pub(super) fn verdict(verdict: Verdict) -> Expression {
    Expression::Verdict(verdict)
}

/// Goes on if the connection's destination was translated.
pub(super) fn translated_only() -> Vec<Expression> {
    // IPS_DST_NAT
    const TRANSLATED: u32 = 1 << 5;
    bits_set(Expression::Connection { to: Register::new(0), key: Ct::Status }, TRANSLATED)
}

/// Goes on if any of `bits` is set in what `load` loads into the first register.
pub(super) fn bits_set(load: Expression, bits: u32) -> Vec<Expression> {
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
