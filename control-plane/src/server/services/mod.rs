//! Addresses and node ports of Services.
//!
//! What is taken is kept in memory and made again from the Services at start. A write takes what
//! it needs as a [`Reservation`] before the store is asked, keeps it if the store agreed, and gives
//! it back otherwise; so two writes never get the same number, whoever wins.

mod plan;
mod pool;

use std::{
    collections::BTreeSet,
    net::IpAddr,
    ops::RangeInclusive,
    sync::{Mutex, MutexGuard, PoisonError},
};

use ipnet::IpNet;
use serde_json::Value;

use crate::status::FieldError;
use pool::{AddressPool, PortPool};

/// Gives out addresses and node ports.
#[derive(Debug)]
pub(crate) struct ServiceAllocator {
    pools: Mutex<Pools>,
}

#[derive(Debug)]
pub(super) struct Pools {
    pub(super) addresses: Vec<AddressPool>,
    pub(super) ports: PortPool,
}

/// What a Service holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) addresses: BTreeSet<IpAddr>,
    pub(super) ports: BTreeSet<u16>,
}

impl Pools {
    fn take(&mut self, held: &Held) {
        for address in &held.addresses {
            for pool in &mut self.addresses {
                if pool.is_ipv4() == address.is_ipv4() && pool.take(*address).is_err() {
                    tracing::warn!(%address, "a Service has an address that is taken or foreign");
                }
            }
        }
        for port in &held.ports {
            if self.ports.take(*port).is_err() {
                tracing::warn!(port, "a Service has a node port that is taken or foreign");
            }
        }
    }

    pub(super) fn release(&mut self, held: &Held) {
        for address in &held.addresses {
            for pool in &mut self.addresses {
                pool.release(*address);
            }
        }
        for port in &held.ports {
            self.ports.release(*port);
        }
    }
}

/// Numbers taken for a write that is under way. Given back when dropped, unless kept.
#[must_use]
#[derive(Debug)]
pub(crate) struct Reservation<'a> {
    allocator: &'a ServiceAllocator,
    taken: Held,
    /// What the Service held and does not need any more.
    superseded: Held,
}

impl Reservation<'_> {
    /// The write happened.
    pub(crate) fn keep(mut self) {
        self.taken = Held::default();
        let superseded = std::mem::take(&mut self.superseded);
        self.allocator.lock().release(&superseded);
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.allocator.lock().release(&self.taken);
    }
}

impl ServiceAllocator {
    /// Nothing is taken yet but what `services` hold.
    pub(crate) fn new<'a>(
        ranges: &[IpNet],
        ports: RangeInclusive<u16>,
        services: impl IntoIterator<Item = &'a Value>,
    ) -> Self {
        let addresses = ranges.iter().map(|range| AddressPool::new(*range)).collect();
        let mut pools = Pools { addresses, ports: PortPool::new(ports) };
        for service in services {
            pools.take(&plan::held(service));
        }
        Self { pools: Mutex::new(pools) }
    }

    fn lock(&self) -> MutexGuard<'_, Pools> {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The `kubernetes` Service's address.
    pub(crate) fn first_address(&self) -> Option<IpAddr> {
        self.lock().addresses.first().map(AddressPool::first)
    }

    /// Fills in the addresses, families and node ports of a Service, and takes them.
    ///
    /// # Errors
    /// What can't be had.
    pub(crate) fn reserve(
        &self,
        new: &mut Value,
        old: Option<&Value>,
    ) -> Result<Reservation<'_>, Vec<FieldError>> {
        let (taken, superseded) = plan::allocate(&mut self.lock(), new, old)?;
        Ok(Reservation { allocator: self, taken, superseded })
    }

    /// A Service is gone.
    pub(crate) fn release(&self, service: &Value) {
        self.lock().release(&plan::held(service));
    }
}
