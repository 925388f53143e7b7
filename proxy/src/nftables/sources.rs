//! Lists of ranges that clients of a load balancer must come from.
//!
//! Each list that any Service has is an interval set and a chain of its own, shared by all that have
//! the same: a commit clones what it touches of an interval set, and so one set for all would make
//! every change as expensive as all lists together. The name is a digest of the list, so that what
//! is in the kernel can be told to be the right one, and nobody can choose ranges that get the name
//! of somebody else's.

use std::fmt;

use ipnet::IpNet;
use sha2::{Digest, Sha256};

use super::{batch::Element, intervals::Intervals};
use crate::{
    model::Family,
    ruleset::{Action, Frontend, Lane, desired::Desired},
};

/// Names of lists begin so.
const PREFIX: &str = "sources-";

/// Which list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SourcesId([u8; 16]);

impl SourcesId {
    /// The name of the list's chain, and of its set.
    pub(crate) fn name(self) -> String {
        format!("{PREFIX}{self}")
    }

    /// The list whose chain or set has this name.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        let digits = name.strip_prefix(PREFIX).filter(|d| d.len() == 32)?;
        let id = Self(u128::from_str_radix(digits, 16).ok()?.to_be_bytes());
        (id.name() == name).then_some(id)
    }
}

impl fmt::Display for SourcesId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// A list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sources(Intervals);

impl Sources {
    /// The list of these ranges, as far as they are of the family.
    pub(crate) fn new(family: Family, ranges: &[IpNet]) -> Self {
        Self(Intervals::new(family, ranges))
    }

    /// The list from which clients of a frontend, in whichever lane, must come.
    pub(crate) fn of(frontend: &Frontend, desired: &Desired) -> Option<Self> {
        let in_lane = |lane| desired.action(&Frontend { lane, ..*frontend });
        // Where this node has no endpoint for clients from outside, those from inside may have
        // some.
        let ranges =
            [Lane::Address, Lane::AddressInside].into_iter().map(in_lane).find_map(|action| {
                match action {
                    Some(Action::Forward { sources, .. }) => Some(sources.as_ref()),
                    _ => None,
                }
            });
        ranges.flatten().map(|ranges| Self::new(frontend.family, ranges))
    }

    /// Whether the node's own address is in it.
    ///
    /// Where a load balancer's address is one of the node's too, the node uses it as its source as
    /// well when it sends something there. kube-proxy lets that through then.
    pub(crate) fn has_node(&self, desired: &Desired) -> bool {
        let mut node = desired.node_addresses().iter();
        node.any(|node| self.0.ranges().any(|(first, last)| (first..=last).contains(node)))
    }

    /// The list that a set in the kernel has; `None` if no list has these elements.
    pub(crate) fn read(family: Family, elements: &[Element]) -> Option<Self> {
        Intervals::read(family, elements).map(Self)
    }

    /// Its name.
    pub(crate) fn id(&self) -> SourcesId {
        let mut digest = Sha256::new();
        digest.update([self.0.family().protocol_family()]);
        for (first, last) in self.0.numbers() {
            digest.update(first.to_be_bytes());
            digest.update(last.to_be_bytes());
        }
        let digest = digest.finalize();
        let mut id = [0; 16];
        id.copy_from_slice(&digest[..16]);
        SourcesId(id)
    }

    /// Its ranges.
    pub(crate) fn intervals(&self) -> &Intervals {
        &self.0
    }

    /// The elements of its set.
    pub(crate) fn elements(&self) -> Vec<Element> {
        self.0.elements()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_ranges_have_another_name() {
        let id = |family, ranges: &[&str]| {
            let ranges: Vec<IpNet> = ranges.iter().map(|r| r.parse().unwrap()).collect();
            Sources::new(family, &ranges).id()
        };
        let one = id(Family::V4, &["10.0.0.0/8"]);
        assert_eq!(SourcesId::parse(&one.name()), Some(one));
        assert_eq!(one, id(Family::V4, &["10.128.0.0/9", "10.0.0.0/9", "fd00::/8"]));
        assert_ne!(one, id(Family::V4, &["10.0.0.0/9"]));
        assert_ne!(id(Family::V4, &[]), id(Family::V6, &[]));
    }
}
