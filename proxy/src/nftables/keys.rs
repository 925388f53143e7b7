//! Keys and data of elements: frontends, endpoints and addresses as bytes, and back.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{
    batch::{Bytes, Data, Element},
    layout,
};
use crate::{
    model::{Endpoint, Family, Protocol},
    ruleset::{AddressSet, Frontend, Lane},
};

pub(super) fn address_bytes(key: Bytes, address: IpAddr) -> Bytes {
    match address {
        IpAddr::V4(v4) => key.part(&v4.octets()),
        IpAddr::V6(v6) => key.part(&v6.octets()),
    }
}

pub(super) fn address_element(set: AddressSet, address: IpAddr) -> (&'static str, Bytes) {
    let key = address_bytes(Bytes::new(), address);
    match set {
        AddressSet::ClusterAddresses => (layout::CLUSTER_IPS, key),
        AddressSet::Hairpin => (layout::HAIRPIN, address_bytes(key, address)),
        AddressSet::NodeAddresses => (layout::NODEPORT_IPS, key),
    }
}

/// The key of a frontend in its verdict maps.
pub(crate) fn frontend_key(frontend: &Frontend) -> Bytes {
    let key = match frontend.address {
        Some(address) => address_bytes(Bytes::new(), address),
        None => Bytes::new(),
    };
    key.part(&[frontend.protocol.number()]).part(&frontend.port.to_be_bytes())
}

/// The key of a load balancer's address and port for who comes from that very address.
pub(super) fn own_balancer_key(frontend: &Frontend) -> Bytes {
    let source = match frontend.address {
        Some(address) => address_bytes(Bytes::new(), address),
        None => Bytes::new(),
    };
    source.part(frontend_key(frontend).as_slice())
}

/// Reads such a key.
pub(super) fn read_own_balancer(bytes: &[u8], family: Family) -> Option<Frontend> {
    let (source, rest) = read_address(bytes, family)?;
    let (frontend, rest) = read_frontend(rest, family, Lane::Address)?;
    (rest.is_empty() && frontend.address == Some(source)).then_some(frontend)
}

pub(super) fn endpoint_bytes(endpoint: Endpoint) -> Bytes {
    address_bytes(Bytes::new(), endpoint.address).part(&endpoint.port.to_be_bytes())
}

/// Takes an address off the front of a key.
pub(super) fn read_address(bytes: &[u8], family: Family) -> Option<(IpAddr, &[u8])> {
    match family {
        Family::V4 => {
            let (address, rest) = bytes.split_first_chunk::<4>()?;
            Some((Ipv4Addr::from(*address).into(), rest))
        }
        Family::V6 => {
            let (address, rest) = bytes.split_first_chunk::<16>()?;
            Some((Ipv6Addr::from(*address).into(), rest))
        }
    }
}

fn read_port(bytes: &[u8]) -> Option<(u16, &[u8])> {
    let (part, rest) = bytes.split_first_chunk::<4>()?;
    let port = u16::from_be_bytes([part[0], part[1]]);
    (port != 0 && part[2..] == [0, 0]).then_some((port, rest))
}

pub(super) fn read_endpoint(bytes: &[u8], family: Family) -> Option<Endpoint> {
    let (address, rest) = read_address(bytes, family)?;
    let (port, rest) = read_port(rest)?;
    rest.is_empty().then_some(Endpoint { address, port })
}

/// Takes a frontend off the front of a key.
pub(super) fn read_frontend(bytes: &[u8], family: Family, lane: Lane) -> Option<(Frontend, &[u8])> {
    let (address, rest) = if lane.with_address() {
        let (address, rest) = read_address(bytes, family)?;
        (Some(address), rest)
    } else {
        (None, bytes)
    };
    let (protocol, rest) = rest.split_first_chunk::<4>()?;
    let protocol = Protocol::from_number(protocol[0]).filter(|_| protocol[1..] == [0, 0, 0])?;
    let (port, rest) = read_port(rest)?;
    Some((Frontend { family, lane, address, protocol, port }, rest))
}

/// Reads an element of the affinity map: what the client connected to, and where it was sent.
pub(crate) fn read_choice(family: Family, element: &Element) -> Option<(Frontend, Endpoint)> {
    let (_, rest) = read_address(element.key.as_slice(), family)?;
    let (frontend, rest) = read_frontend(rest, family, Lane::Address)?;
    let Data::Value(value) = &element.data else { return None };
    let endpoint = read_endpoint(value.as_slice(), family)?;
    rest.is_empty().then_some((frontend, endpoint))
}
