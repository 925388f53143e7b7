//! What may be wrong in Services and slices, or only looks so.

use std::net::IpAddr;

use super::world::other;
use crate::{model::Family, packets::fixture::Addresses};

/// What is wrong with a Service, or only looks so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Oddity {
    /// Nothing.
    None,
    /// `ipFamilies` are not those of the addresses.
    FamiliesLie,
    /// A second cluster address of the same family, which is another Service's.
    SecondAddress,
    /// External and load balancers' addresses that are none, beside those that are.
    BadAddresses,
    /// Each of its ports stands there twice, the second time by another name.
    TwinPorts,
    /// A protocol that is none, and port 0.
    BadPorts,
    /// Its addresses are written in another way.
    Spelled,
}

/// What is in a slice besides its endpoints, and is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stray {
    OtherFamily,
    Loopback,
    LinkLocal,
    Multicast,
    Unspecified,
    /// An endpoint's own address, as it must not be written.
    Misspelled,
}

/// An address; if asked for, in a way that means the same and isn't the usual one.
pub(super) fn text(address: IpAddr, spelled: bool) -> String {
    match address {
        IpAddr::V6(v6) if spelled => {
            let parts = v6.segments().map(|part| format!("{part:04X}"));
            parts.join(":")
        }
        _ => address.to_string(),
    }
}

/// An address in a way that means different things to different programs.
pub(super) fn misspelled(address: IpAddr) -> String {
    match address {
        IpAddr::V4(_) => format!("0{address}"),
        IpAddr::V6(_) => format!("{address}%eth0"),
    }
}

impl Stray {
    /// Its address in a slice of this family.
    pub(super) fn text(self, family: Family) -> String {
        let v4 = family == Family::V4;
        let one = |one: &str, two: &str| if v4 { one } else { two }.to_owned();
        match self {
            Self::OtherFamily => Addresses(other(family)).pod(4).to_string(),
            Self::Loopback => Addresses(family).loopback().to_string(),
            Self::LinkLocal => one("169.254.7.7", "fe80::7"),
            Self::Multicast => one("224.0.0.7", "ff02::7"),
            Self::Unspecified => one("0.0.0.0", "::ffff:10.244.4.2"),
            Self::Misspelled => misspelled(Addresses(family).pod(4)),
        }
    }
}
