//! Lists of ranges that clients of a load balancer must come from.
//!
//! Each list that any Service has is an interval set and a chain of its own, shared by all that have
//! the same: a commit clones what it touches of an interval set, and so one set for all would make
//! every change as expensive as all lists together. The name is a digest of the list, so that what
//! is in the kernel can be told to be the right one, and nobody can choose ranges that get the name
//! of somebody else's.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use sha2::{Digest, Sha256};

use super::batch::{Bytes, Data, Element};
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

/// A list: first and last address of each range as numbers, ascending, with gaps in between.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sources {
    family: Family,
    ranges: Vec<(u128, u128)>,
}

impl Sources {
    /// The list of these ranges, as far as they are of the family.
    pub(crate) fn new(family: Family, ranges: &[IpNet]) -> Self {
        let of_family = ranges.iter().filter(|range| Family::of(range.addr()) == family);
        let mut sorted: Vec<(u128, u128)> =
            of_family.map(|r| (number(r.network()), number(r.broadcast()))).collect();
        sorted.sort_unstable();
        let mut ranges: Vec<(u128, u128)> = Vec::new();
        for (first, last) in sorted {
            match ranges.last_mut() {
                Some(before) if first <= before.1.saturating_add(1) => {
                    before.1 = before.1.max(last);
                }
                _ => ranges.push((first, last)),
            }
        }
        Self { family, ranges }
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

    /// Its name.
    pub(crate) fn id(&self) -> SourcesId {
        let mut digest = Sha256::new();
        digest.update([self.family.protocol_family()]);
        for (first, last) in &self.ranges {
            digest.update(first.to_be_bytes());
            digest.update(last.to_be_bytes());
        }
        let digest = digest.finalize();
        let mut id = [0; 16];
        id.copy_from_slice(&digest[..16]);
        SourcesId(id)
    }

    /// First and last address of each range.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = (IpAddr, IpAddr)> + '_ {
        let address = |n| address(self.family, n);
        self.ranges.iter().map(move |(first, last)| (address(*first), address(*last)))
    }

    /// The elements of its set: where each range begins, and where it has ended.
    pub(crate) fn elements(&self) -> Vec<Element> {
        let key = |n| match address(self.family, n) {
            IpAddr::V4(v4) => Bytes::from_slice(&v4.octets()),
            IpAddr::V6(v6) => Bytes::from_slice(&v6.octets()),
        };
        let mut elements = Vec::new();
        for (first, last) in &self.ranges {
            elements.push(Element { key: key(*first), data: Data::None });
            // A range without an end goes to the last address there is.
            if *last < highest(self.family) {
                elements.push(Element { key: key(*last + 1), data: Data::IntervalEnd });
            }
        }
        elements
    }

    /// The list that a set in the kernel has; `None` if no list has these elements.
    pub(crate) fn read(family: Family, elements: &[Element]) -> Option<Self> {
        let mut edges = Vec::with_capacity(elements.len());
        for element in elements {
            let key = element.key.as_slice();
            let at = match family {
                Family::V4 => u128::from(u32::from_be_bytes(key.try_into().ok()?)),
                Family::V6 => u128::from_be_bytes(key.try_into().ok()?),
            };
            edges.push((at, element.data == Data::IntervalEnd));
        }
        edges.sort_unstable();
        let mut ranges = Vec::new();
        let mut begun = None;
        for (at, end) in edges {
            match (begun, end) {
                (None, false) => begun = Some(at),
                (Some(first), true) if at > first => {
                    ranges.push((first, at - 1));
                    begun = None;
                }
                _ => return None,
            }
        }
        ranges.extend(begun.map(|first| (first, highest(family))));
        Some(Self { family, ranges })
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

fn address(family: Family, number: u128) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from_bits(number as u32).into(),
        Family::V6 => Ipv6Addr::from_bits(number).into(),
    }
}

fn highest(family: Family) -> u128 {
    match family {
        Family::V4 => u128::from(u32::MAX),
        Family::V6 => u128::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(ranges: &[&str]) -> Vec<String> {
        let ranges: Vec<IpNet> = ranges.iter().map(|r| r.parse().unwrap()).collect();
        let list = Sources::new(Family::of(ranges[0].addr()), &ranges);
        assert_eq!(Sources::read(list.family, &list.elements()), Some(list.clone()));
        assert_eq!(SourcesId::parse(&list.id().name()), Some(list.id()));
        list.ranges().map(|(first, last)| format!("{first}-{last}")).collect()
    }

    #[test]
    fn ranges_that_touch_become_one() {
        for (ranges, expected) in [
            (&["10.0.0.0/8"][..], &["10.0.0.0-10.255.255.255"][..]),
            (&["10.0.1.0/24", "10.0.2.0/24"], &["10.0.1.0-10.0.2.255"]),
            (&["10.0.0.7/32", "10.0.0.0/8"], &["10.0.0.0-10.255.255.255"]),
            (&["10.0.0.2/32", "10.0.0.0/32"], &["10.0.0.0-10.0.0.0", "10.0.0.2-10.0.0.2"]),
            (
                &["255.0.0.0/8", "0.0.0.0/8"],
                &["0.0.0.0-0.255.255.255", "255.0.0.0-255.255.255.255"],
            ),
            (
                &["ff00::/8", "fd00::/64"],
                &[
                    "fd00::-fd00::ffff:ffff:ffff:ffff",
                    "ff00::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
                ],
            ),
        ] {
            assert_eq!(list(ranges), expected);
        }
    }

    #[test]
    fn other_ranges_have_another_name() {
        let id = |family, ranges: &[&str]| {
            let ranges: Vec<IpNet> = ranges.iter().map(|r| r.parse().unwrap()).collect();
            Sources::new(family, &ranges).id()
        };
        let one = id(Family::V4, &["10.0.0.0/8"]);
        assert_eq!(one, id(Family::V4, &["10.128.0.0/9", "10.0.0.0/9", "fd00::/8"]));
        assert_ne!(one, id(Family::V4, &["10.0.0.0/9"]));
        assert_ne!(id(Family::V4, &[]), id(Family::V6, &[]));
    }
}
