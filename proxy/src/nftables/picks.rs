//! Chains that are made when they are needed, always one transaction before the first element that
//! points to them: a packet that is under way during a commit sees the new element but an empty
//! chain.
//!
//! Never put a lookup's result into another lookup's key: the kernel takes it, and then the
//! distribution's `nft list ruleset` aborts.

use super::{
    batch::Chain,
    expression::{Ct, Expression, Register, Verdict},
    layout::{AFFINITY, DynamicChain, Layout, OWN_BALANCERS, PickChain, lane_maps},
    steps::{rule, verdict},
};
use crate::{
    model::Family,
    ruleset::{Lane, Masquerade},
};

impl Layout {
    /// A chain that is made when it is needed, with its rules.
    pub(crate) fn dynamic_chain(&self, chain: DynamicChain) -> Chain {
        match chain {
            DynamicChain::Pick(pick) => self.pick_chain(pick),
            DynamicChain::Remember(seconds) => Chain {
                name: chain.name(),
                hook: None,
                rules: vec![rule("where the client was sent", self.remember_for(seconds))],
            },
            DynamicChain::Sources(id) => {
                let (key, words) = (Register::new(0), self.address_length() / 4);
                let steps = vec![
                    self.source_address(key),
                    Expression::NotInSet { set: id.name().into(), key },
                    self.source_address(key),
                    self.destination_address(Register::new(words)),
                    Expression::TransportProtocol { to: Register::new(2 * words) },
                    Expression::TransportHeader {
                        to: Register::new(2 * words + 1),
                        offset: 2,
                        length: 2,
                    },
                    Expression::NotInSet { set: OWN_BALANCERS.into(), key },
                    verdict(Verdict::Drop),
                ];
                Chain { name: chain.name(), hook: None, rules: vec![rule("nobody else", steps)] }
            }
        }
    }

    /// A chain that picks one of so many endpoints.
    fn pick_chain(&self, chain: PickChain) -> Chain {
        let mut rules = Vec::new();
        let mark = match chain.masquerade {
            Masquerade::Always => Some(("hide the client's address", Vec::new())),
            Masquerade::Never => None,
            Masquerade::OffCluster if self.masquerade_all && chain.lane == Lane::Address => {
                Some(("hide the client's address", Vec::new()))
            }
            Masquerade::OffCluster => match self.not_from_pods() {
                Some(steps) => Some(("hide addresses from outside", steps)),
                // Where nobody is known to be a pod, nobody is known not to be one, but only the
                // node itself comes here: its address may be one of those for the outside.
                None if matches!(chain.lane, Lane::AddressInside | Lane::NodePortInside) => {
                    Some(("hide the node's address", Vec::new()))
                }
                None => None,
            },
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
}
