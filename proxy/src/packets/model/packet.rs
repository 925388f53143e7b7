//! A packet on its way through rules.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use crate::{
    model::Protocol,
    packets::fixture::{Addresses, From, source},
};

/// The first packet of a connection.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Packet {
    pub(super) source: IpAddr,
    pub(super) destination: SocketAddr,
    pub(super) protocol: Protocol,
    /// Whether the node itself sends it.
    pub(super) from_node: bool,
    /// Whether its destination was changed.
    pub(super) translated: bool,
    pub(super) mark: u32,
    /// Whether it goes on with an address of the node.
    pub(super) hidden: bool,
    /// What keeps it from going on.
    pub(super) stopped: Option<Fate>,
}

/// What comes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fate {
    /// It goes to this endpoint; whether with an address of the node.
    To(SocketAddr, bool),
    Refused,
    Dropped,
    /// Rules leave it alone.
    Untouched,
}

/// Where rules are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hook {
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
}

/// Rules that packets can be walked through.
pub(super) trait Rules {
    /// All ways that a packet can take at a hook; it goes on unless it is stopped.
    fn ask(&self, hook: Hook, packet: Packet) -> Vec<Packet>;

    /// What may come of a connection.
    fn fates(&self, from: From, protocol: Protocol, to: SocketAddr) -> BTreeSet<Fate> {
        let addresses = Addresses(crate::model::Family::of(to.ip()));
        let (address, from_node) = match from {
            From::Client(_) => (source(from, to).ip(), false),
            From::Pod(n) => (addresses.pod(n), false),
            From::Node => (addresses.node(), true),
        };
        let packet = Packet {
            source: address,
            destination: to,
            protocol,
            from_node,
            translated: false,
            mark: 0,
            hidden: false,
            stopped: None,
        };
        let first = if from_node { Hook::Output } else { Hook::Prerouting };
        let mut ways: BTreeSet<Packet> = [packet].into();
        for stage in [Some(first), None, Some(Hook::Postrouting)] {
            let next = ways.into_iter().flat_map(|packet| {
                let routed = if is_node(addresses, packet.destination.ip()) {
                    Hook::Input
                } else {
                    Hook::Forward
                };
                match stage {
                    _ if packet.stopped.is_some() => vec![packet],
                    None if from_node => vec![packet],
                    hook => self.ask(hook.unwrap_or(routed), packet),
                }
            });
            ways = next.collect();
        }
        ways.into_iter().map(Packet::fate).collect()
    }
}

impl Packet {
    fn fate(self) -> Fate {
        match self.stopped {
            Some(fate) => fate,
            None if self.translated => Fate::To(self.destination, self.hidden),
            None => Fate::Untouched,
        }
    }

    /// The same, stopped.
    pub(super) fn stopped(self, fate: Fate) -> Self {
        Self { stopped: Some(fate), ..self }
    }

    /// The same, with another destination.
    pub(super) fn translated(self, destination: SocketAddr) -> Self {
        Self { destination, translated: true, ..self }
    }
}

/// Whether an address is one of the node's.
pub(super) fn is_node(addresses: Addresses, address: IpAddr) -> bool {
    addresses.nodes().any(|node| node == address)
}
