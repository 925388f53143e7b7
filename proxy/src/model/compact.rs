//! Small forms of what stands in tens of thousands of objects.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use uuid::Uuid;

/// The cluster addresses of a Service, one of a family at the most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ClusterAddresses {
    v4: Option<Ipv4Addr>,
    v6: Option<Ipv6Addr>,
}

impl ClusterAddresses {
    /// Adds an address; not if there is one of its family already.
    pub(super) fn add(&mut self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(v4) => self.v4.is_none() && self.v4.replace(v4).is_none(),
            IpAddr::V6(v6) => self.v6.is_none() && self.v6.replace(v6).is_none(),
        }
    }

    /// All of them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = IpAddr> + use<> {
        self.v4.map(IpAddr::V4).into_iter().chain(self.v6.map(IpAddr::V6))
    }
}

/// An object's UID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Uid {
    /// What every API server gives.
    Uuid(Uuid),
    /// Anything else, as it came.
    Other(Box<str>),
}

impl Uid {
    /// Keeps a UID in as little memory as it takes.
    pub(crate) fn new(text: &str) -> Self {
        // Only what is written back as it came.
        let uuid = Uuid::try_parse(text).ok().filter(|uuid| uuid.hyphenated().to_string() == text);
        uuid.map_or_else(|| Self::Other(text.into()), Self::Uuid)
    }
}

impl fmt::Display for Uid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uuid(uuid) => uuid.hyphenated().fmt(f),
            Self::Other(text) => f.write_str(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uids_are_told_as_they_came() {
        let lower = "f81d4fae-7dec-11d0-a765-00a0c91e6bf6";
        assert!(matches!(Uid::new(lower), Uid::Uuid(_)));
        for text in [lower, &lower.to_uppercase(), &lower.replace('-', ""), "7", ""] {
            assert_eq!(Uid::new(text).to_string(), text);
        }
    }
}
