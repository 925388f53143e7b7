//! What Services and EndpointSlices mean, as pure functions.
//!
//! ```text
//!   Service ──┐                       ┌─ frontends: address, protocol, port → endpoints
//!             ├─► ServiceTable ──► ───┤
//!   slices ───┘   (one key a time)    └─ addresses: service addresses, hairpin
//! ```
//!
//! [`services`] and [`slices`] take from the API's objects what matters here and refuse what is
//! wrong in them ([`address`], [`ports`]); [`service_ranges`] are where cluster addresses come from;
//! [`eligible`] chooses the endpoints of one service port; [`table`] keeps all of it by service and
//! says which parts of the [ruleset](crate::ruleset) a change touches. Nothing here does I/O.

mod address;
pub(crate) mod compact;
pub(crate) mod eligible;
mod ports;
pub(crate) mod service_ranges;
pub(crate) mod services;
pub(crate) mod slices;
pub(crate) mod table;

use std::{fmt, net::IpAddr, str::FromStr};

/// IPv4 or IPv6: each has a table of its own in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// `NFPROTO_IPV4` or `NFPROTO_IPV6`, which are also `AF_INET` and `AF_INET6`.
    pub(crate) fn protocol_family(self) -> u8 {
        match self {
            Self::V4 => 2,
            Self::V6 => 10,
        }
    }

    /// As it stands in metrics' labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl FromStr for Protocol {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = [Self::Tcp, Self::Udp, Self::Sctp].into_iter();
        let mut named = known.filter(|protocol| protocol.to_string().eq_ignore_ascii_case(text));
        named.next().ok_or_else(|| format!("{text:?} is not a protocol: tcp, udp or sctp is"))
    }
}

impl Protocol {
    /// The protocol that an API field names; TCP if it is absent.
    pub(crate) fn parse(name: Option<&str>) -> Option<Self> {
        match name {
            None | Some("TCP" | "") => Some(Self::Tcp),
            Some("UDP") => Some(Self::Udp),
            Some("SCTP") => Some(Self::Sctp),
            Some(_) => None,
        }
    }

    /// Its number in IP headers.
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// The protocol with this number in IP headers.
    pub(crate) fn from_number(number: u8) -> Option<Self> {
        [Self::Tcp, Self::Udp, Self::Sctp].into_iter().find(|p| p.number() == number)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// Where a connection is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Endpoint {
    pub(crate) address: IpAddr,
    pub(crate) port: u16,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        std::net::SocketAddr::new(self.address, self.port).fmt(f)
    }
}

/// Something in an object that was refused, to be told as an event on the Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    /// The event's reason.
    pub(crate) reason: &'static str,
    /// What is wrong and what becomes of it.
    pub(crate) message: String,
}

impl Problem {
    pub(crate) fn new(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }
}
