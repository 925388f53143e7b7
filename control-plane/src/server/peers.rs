//! How many connections each client address has open: one peer alone never takes all places.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, PoisonError},
};

/// How many times as many connections this machine itself may have: kubelet, proxy, and whoever
/// works on it.
const OWN_FACTOR: usize = 3;

/// The open connections by client address.
#[derive(Debug)]
pub(super) struct Peers {
    limit: usize,
    open: Mutex<HashMap<IpAddr, usize>>,
}

/// A place of one peer, free again when it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    peers: Arc<Peers>,
    peer: IpAddr,
}

impl Peers {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, open: Mutex::default() })
    }

    /// A place for one more connection of `peer` to the address `own`; `None` if it has enough.
    pub(super) fn enter(self: &Arc<Self>, peer: IpAddr, own: Option<IpAddr>) -> Option<Place> {
        let peer = peer.to_canonical();
        let is_own = peer.is_loopback() || own.map(|own| own.to_canonical()) == Some(peer);
        let limit = if is_own { self.limit.saturating_mul(OWN_FACTOR) } else { self.limit };
        let peer = counted_as(peer);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.entry(peer).or_default();
        if *count >= limit {
            return None;
        }
        *count += 1;
        Some(Place { peers: Arc::clone(self), peer })
    }
}

/// Whoever has one IPv6 address usually has its whole /64.
fn counted_as(peer: IpAddr) -> IpAddr {
    match peer {
        IpAddr::V6(ip) if !ip.is_loopback() => Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64).into(),
        ip => ip,
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.peers.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_has_its_share_and_this_machine_more() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let own = Some(ip("192.0.2.1"));
        let rows = [
            ("192.0.2.9", "192.0.2.9", 2),
            ("::ffff:192.0.2.9", "192.0.2.9", 2),
            ("2001:db8::1", "2001:db8::2", 2),
            ("127.0.0.1", "127.0.0.1", 6),
            ("192.0.2.1", "192.0.2.1", 6),
        ];
        for (first, others, limit) in rows {
            let peers = Peers::new(2);
            let mut places = vec![peers.enter(ip(first), own).unwrap()];
            while let Some(place) = peers.enter(ip(others), own) {
                places.push(place);
            }
            assert_eq!(places.len(), limit, "{first}");
            assert!(peers.enter(ip("198.51.100.1"), own).is_some());
            places.pop();
            assert!(peers.enter(ip(others), own).is_some());
            drop(places);
            assert!(peers.open.lock().unwrap().is_empty());
        }
    }
}
