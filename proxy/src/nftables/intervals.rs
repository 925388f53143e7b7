//! Ranges of addresses as the kernel's interval sets have them: where each begins and has ended.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::batch::{Bytes, Data, Element};
use crate::model::Family;

/// Ranges: first and last address of each as numbers, ascending, with gaps in between.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Intervals {
    family: Family,
    ranges: Vec<(u128, u128)>,
}

impl Intervals {
    /// These ranges, as far as they are of the family. Those that touch or overlap become one.
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

    /// Of which family they are.
    pub(super) fn family(&self) -> Family {
        self.family
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// First and last address of each range.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = (IpAddr, IpAddr)> + '_ {
        let address = |n| address(self.family, n);
        self.ranges.iter().map(move |(first, last)| (address(*first), address(*last)))
    }

    /// First and last address of each range as numbers.
    pub(super) fn numbers(&self) -> &[(u128, u128)] {
        &self.ranges
    }

    /// The elements of their set: where each range begins, and where it has ended.
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

    /// The ranges that a set with these elements has; `None` if no ranges have these elements.
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
        let list = Intervals::new(Family::of(ranges[0].addr()), &ranges);
        assert_eq!(Intervals::read(list.family, &list.elements()), Some(list.clone()));
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
}
