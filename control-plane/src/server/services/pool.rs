//! Numbers that are given out once: addresses of a range, and node ports.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
};

use ipnet::IpNet;

/// Why a number that was asked for can't be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PoolError {
    #[error("the provided IP is not in the valid range. The range of valid IPs is {0}")]
    AddressOutside(IpNet),
    #[error("the provided port is not in the valid range. The range of valid ports is {0}-{1}")]
    PortOutside(u16, u16),
    #[error("provided IP is already allocated")]
    AddressTaken,
    #[error("provided port is already allocated")]
    PortTaken,
    #[error("range is full")]
    Full,
}

/// Numbers from 0 to `size`, of which the lower part is for those who ask for a certain one: what
/// is given out at will comes from the upper part as long as that lasts.
#[derive(Debug)]
struct Numbers {
    size: u64,
    reserved: u64,
    taken: BTreeSet<u64>,
}

impl Numbers {
    fn new(size: u64, reserved: u64) -> Self {
        Self { size, reserved, taken: BTreeSet::new() }
    }

    fn take(&mut self, number: u64) -> bool {
        number < self.size && self.taken.insert(number)
    }

    fn take_any(&mut self) -> Option<u64> {
        let number =
            self.free_in(self.reserved, self.size).or_else(|| self.free_in(0, self.reserved))?;
        self.taken.insert(number);
        Some(number)
    }

    /// A free number between the two: by chance, or the next one that is free after that.
    fn free_in(&self, from: u64, to: u64) -> Option<u64> {
        if from >= to || self.taken.range(from..to).count() as u64 == to - from {
            return None;
        }
        let start = rand::random_range(from..to);
        let mut candidate = start;
        for taken in self.taken.range(start..to) {
            if *taken != candidate {
                return Some(candidate);
            }
            candidate += 1;
        }
        if candidate < to {
            return Some(candidate);
        }
        candidate = from;
        for taken in self.taken.range(from..start) {
            if *taken != candidate {
                break;
            }
            candidate += 1;
        }
        Some(candidate)
    }
}

/// The addresses of a Service range.
#[derive(Debug)]
pub(crate) struct AddressPool {
    range: IpNet,
    numbers: Numbers,
}

impl AddressPool {
    /// All of the range but its network and, for IPv4, its broadcast address.
    pub(crate) fn new(range: IpNet) -> Self {
        let range = range.trunc();
        let bits = range.max_prefix_len() - range.prefix_len();
        // No more than a million million are ever looked at of an IPv6 range.
        let all = 1u64 << u32::from(bits).min(40);
        let size = match range {
            IpNet::V4(_) => all.saturating_sub(2),
            IpNet::V6(_) => all.saturating_sub(1),
        };
        // KEP-3070: min(max(16, size / 16), 256)
        let reserved = if size > 16 { (size / 16).clamp(16, 256).min(size) } else { 0 };
        Self { range, numbers: Numbers::new(size, reserved) }
    }

    pub(crate) fn is_ipv4(&self) -> bool {
        matches!(self.range, IpNet::V4(_))
    }

    /// The address that the `kubernetes` Service has.
    pub(crate) fn first(&self) -> IpAddr {
        self.address(0)
    }

    fn address(&self, number: u64) -> IpAddr {
        match self.range.network() {
            IpAddr::V4(base) => {
                IpAddr::V4(Ipv4Addr::from(u32::from(base).wrapping_add(number as u32 + 1)))
            }
            IpAddr::V6(base) => {
                IpAddr::V6(Ipv6Addr::from(u128::from(base).wrapping_add(u128::from(number) + 1)))
            }
        }
    }

    fn number(&self, address: IpAddr) -> Option<u64> {
        if !self.range.contains(&address) {
            return None;
        }
        let offset = match (address, self.range.network()) {
            (IpAddr::V4(address), IpAddr::V4(base)) => {
                u128::from(u32::from(address) - u32::from(base))
            }
            (IpAddr::V6(address), IpAddr::V6(base)) => u128::from(address) - u128::from(base),
            _ => return None,
        };
        let number = u64::try_from(offset.checked_sub(1)?).ok()?;
        (number < self.numbers.size).then_some(number)
    }

    pub(crate) fn take(&mut self, address: IpAddr) -> Result<(), PoolError> {
        let number = self.number(address).ok_or(PoolError::AddressOutside(self.range))?;
        if self.numbers.take(number) { Ok(()) } else { Err(PoolError::AddressTaken) }
    }

    pub(crate) fn take_any(&mut self) -> Result<IpAddr, PoolError> {
        let number = self.numbers.take_any().ok_or(PoolError::Full)?;
        Ok(self.address(number))
    }

    pub(crate) fn release(&mut self, address: IpAddr) {
        if let Some(number) = self.number(address) {
            self.numbers.taken.remove(&number);
        }
    }
}

/// The node ports.
#[derive(Debug)]
pub(crate) struct PortPool {
    range: RangeInclusive<u16>,
    numbers: Numbers,
}

impl PortPool {
    pub(crate) fn new(range: RangeInclusive<u16>) -> Self {
        let size = u64::from(range.end().saturating_sub(*range.start())) + 1;
        // KEP-3668: min(max(16, size / 32), 128), and none of a range that small
        let reserved = if size > 16 { (size / 32).clamp(16, 128) } else { 0 };
        Self { range, numbers: Numbers::new(size, reserved) }
    }

    fn number(&self, port: u16) -> Option<u64> {
        self.range.contains(&port).then(|| u64::from(port - self.range.start()))
    }

    pub(crate) fn take(&mut self, port: u16) -> Result<(), PoolError> {
        let outside = PoolError::PortOutside(*self.range.start(), *self.range.end());
        let number = self.number(port).ok_or(outside)?;
        if self.numbers.take(number) { Ok(()) } else { Err(PoolError::PortTaken) }
    }

    pub(crate) fn take_any(&mut self) -> Result<u16, PoolError> {
        let number = self.numbers.take_any().ok_or(PoolError::Full)?;
        Ok(self.range.start() + number as u16) // less than the size of a range of u16
    }

    pub(crate) fn release(&mut self, port: u16) {
        if let Some(number) = self.number(port) {
            self.numbers.taken.remove(&number);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_range_is_given_out_whole_and_once() {
        let mut pool = AddressPool::new("10.96.0.0/27".parse().unwrap());
        assert_eq!(pool.first().to_string(), "10.96.0.1");
        let mut seen = BTreeSet::new();
        // The upper part first: addresses of the lower are left to those who ask for one.
        for _ in 0..14 {
            let address = pool.take_any().unwrap();
            assert!(address > "10.96.0.16".parse::<IpAddr>().unwrap(), "{address}");
            assert!(seen.insert(address));
        }
        while let Ok(address) = pool.take_any() {
            assert!(seen.insert(address));
        }
        assert_eq!(seen.len(), 30);
        assert_eq!(pool.take_any(), Err(PoolError::Full));
        let address = "10.96.0.9".parse().unwrap();
        assert_eq!(pool.take(address), Err(PoolError::AddressTaken));
        pool.release(address);
        assert_eq!(pool.take_any(), Ok(address));
        assert!(pool.take("10.97.0.1".parse().unwrap()).is_err());
        assert!(pool.take("10.96.0.0".parse().unwrap()).is_err());
        assert!(pool.take("10.96.0.31".parse().unwrap()).is_err());
    }

    #[test]
    fn ranges_of_other_sizes_work_too() {
        let mut pool = AddressPool::new("fd00::/64".parse().unwrap());
        assert_eq!(pool.first().to_string(), "fd00::1");
        assert!(pool.take("fd00::10".parse().unwrap()).is_ok());
        assert!(matches!(pool.take_any(), Ok(IpAddr::V6(_))));
        assert_eq!(
            AddressPool::new("10.0.0.0/32".parse().unwrap()).take_any(),
            Err(PoolError::Full)
        );
        let mut ports = PortPool::new(30000..=30001);
        assert!(ports.take(30001).is_ok());
        assert_eq!(ports.take_any(), Ok(30000));
        assert_eq!(ports.take_any(), Err(PoolError::Full));
        assert!(ports.take(80).is_err());
    }

    proptest! {
        #[test]
        fn whatever_is_taken_before_all_the_rest_can_be_had(taken in prop::collection::btree_set(0u64..50, 0..50)) {
            let mut numbers = Numbers::new(50, 10);
            for number in &taken {
                prop_assert!(numbers.take(*number));
            }
            for _ in taken.len()..50 {
                let number = numbers.take_any().unwrap();
                prop_assert!(!taken.contains(&number));
            }
            prop_assert_eq!(numbers.take_any(), None);
        }
    }
}
