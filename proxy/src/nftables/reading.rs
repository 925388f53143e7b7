//! The kernel's elements back into what is held.

use std::sync::Arc;

use super::{
    batch::{Data, Element},
    changes::Changes,
    expression::Verdict,
    held::{Chosen, Held},
    keys::{frontend_key, read_address, read_endpoint, read_frontend, read_own_balancer},
    layout::{self, DynamicChain},
};
use crate::{
    model::{Endpoint, Family},
    ruleset::{AddressSet, Frontend, Lane},
};

/// The kernel's elements, as they are being listed.
#[derive(Debug)]
pub(crate) struct Reading {
    family: Family,
    held: Held,
    /// Those of one map, in the kernel's order, that is, in none.
    endpoints: Vec<(Frontend, u32, Endpoint)>,
    strays: Changes,
}

impl Reading {
    /// Nothing read yet of a table of this family.
    pub(crate) fn new(family: Family) -> Self {
        Self { family, held: Held::default(), endpoints: Vec::new(), strays: Changes::default() }
    }

    /// Which table is read.
    pub(super) fn family(&self) -> Family {
        self.family
    }

    /// Takes in one element of a set as the kernel lists it; what the proxy can't have written is
    /// to be removed. Call [`Self::finish`] after the last.
    pub(crate) fn element(&mut self, set: &'static str, element: &Element) {
        if self.take(set, element).is_none() {
            self.strays.remove(set, element.key);
        }
    }

    /// The frontends of a lane whose endpoints are picked by number, and that number.
    pub(super) fn picks(&self, lane: Lane) -> Vec<(Frontend, u32)> {
        let of_lane = self.held.frontends.iter().filter(|(frontend, _)| frontend.lane == lane);
        of_lane
            .filter_map(|(frontend, held)| match &held.chosen {
                Some(Chosen::Pick(chain)) => Some((*frontend, chain.count)),
                _ => None,
            })
            .collect()
    }

    /// Takes in all endpoints of a frontend, by index.
    pub(super) fn row(&mut self, frontend: Frontend, slots: Arc<[Endpoint]>) {
        self.held.frontends.entry(frontend).or_default().slots = slots;
    }

    /// Makes rows of the endpoints that were taken in one by one.
    pub(crate) fn rows(&mut self) {
        let mut endpoints = std::mem::take(&mut self.endpoints);
        endpoints.sort_unstable();
        // What was listed twice, as the listing was begun again, counts once.
        endpoints.dedup_by_key(|(frontend, index, _)| (*frontend, *index));
        for row in endpoints.chunk_by(|a, b| a.0 == b.0) {
            let frontend = row[0].0;
            let maps = layout::lane_maps(frontend.lane);
            // Only a row without holes from 0 on is of use.
            let whole = row.iter().zip(0..).take_while(|((_, index, _), n)| index == n).count();
            for (_, index, _) in &row[whole..] {
                let key = frontend_key(&frontend).part(&index.to_ne_bytes());
                self.strays.remove(maps.endpoints, key);
            }
            self.row(frontend, row[..whole].iter().map(|(_, _, e)| *e).collect());
        }
    }

    /// All that was read, and what to remove because it makes no sense.
    pub(crate) fn finish(self) -> (Held, Changes) {
        (self.held, self.strays)
    }

    fn take(&mut self, set: &'static str, element: &Element) -> Option<()> {
        let key = element.key.as_slice();
        for lane in Lane::ALL {
            let maps = layout::lane_maps(lane);
            let sets = [
                Some(maps.verdicts),
                Some(maps.endpoints),
                Some(maps.sticky),
                maps.rejects,
                maps.firewall,
            ];
            if !sets.contains(&Some(set)) {
                continue;
            }
            let (frontend, rest) = read_frontend(key, self.family, lane)?;
            if maps.endpoints == set {
                let index = u32::from_ne_bytes(*rest.first_chunk::<4>()?);
                let Data::Value(value) = &element.data else { return None };
                let endpoint = read_endpoint(value.as_slice(), self.family)?;
                self.endpoints.push((frontend, index, endpoint));
                return Some(());
            }
            if maps.verdicts == set {
                let chosen = match &element.data {
                    Data::Verdict(verdict) => Chosen::read(verdict),
                    Data::Foreign => Chosen::Foreign,
                    _ => return None,
                };
                self.held.frontends.entry(frontend).or_default().chosen = Some(chosen);
                return Some(());
            }
            let Data::Verdict(verdict) = &element.data else { return None };
            if maps.sticky == set || maps.firewall == Some(set) {
                let Verdict::Goto(chain) = verdict else { return None };
                match DynamicChain::parse(chain)? {
                    DynamicChain::Remember(seconds) if maps.sticky == set => {
                        self.held.sticky.insert(frontend, seconds);
                    }
                    DynamicChain::Sources(id) if maps.sticky != set => {
                        self.held.enter_sources(frontend, Some(id));
                    }
                    _ => return None,
                }
            } else {
                if *verdict != Verdict::Goto(layout::REJECT.into()) {
                    return None;
                }
                self.held.frontends.entry(frontend).or_default().rejected = true;
            }
            return Some(());
        }
        if set == layout::OWN_BALANCERS {
            self.held.own.insert(read_own_balancer(key, self.family)?);
            return Some(());
        }
        let (address, rest) = read_address(key, self.family)?;
        let set = match set {
            layout::CLUSTER_IPS => AddressSet::ClusterAddresses,
            layout::NODEPORT_IPS => AddressSet::NodeAddresses,
            layout::HAIRPIN => {
                let (second, _) = read_address(rest, self.family)?;
                (second == address).then_some(AddressSet::Hairpin)?
            }
            _ => return None,
        };
        self.held.addresses.insert((set, address));
        Some(())
    }
}
