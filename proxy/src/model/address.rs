//! Addresses out of objects: which of them traffic may be sent to.

use std::net::IpAddr;

use ipnet::IpNet;

use super::compact::ClusterAddresses;

/// An address that traffic may be sent to.
pub(super) fn usable_address(text: &str) -> Result<IpAddr, &'static str> {
    let address: IpAddr = text.parse().map_err(|_| why_no_address(text))?;
    let refused = match address {
        IpAddr::V4(v4) => {
            if v4.is_link_local() {
                Some("it is a link-local address")
            } else if v4.is_broadcast() {
                Some("it is the broadcast address")
            } else {
                None
            }
        }
        IpAddr::V6(v6) => {
            if v6.is_unicast_link_local() {
                Some("it is a link-local address")
            } else if v6.to_ipv4_mapped().is_some() {
                Some("it is an IPv4 address in IPv6 form")
            } else {
                None
            }
        }
    };
    match refused {
        Some(why) => Err(why),
        None if address.is_loopback() => Err("it is a loopback address"),
        None if address.is_multicast() => Err("it is a multicast address"),
        None if address.is_unspecified() => Err("it is the unspecified address"),
        None => Ok(address),
    }
}

/// What is wrong with a text that isn't an address.
///
/// Leading zeros are decimal to some programs and octal to others, so that one would check another
/// address than the other uses (CVE-2021-29923).
fn why_no_address(text: &str) -> &'static str {
    let without_zeros = |part: &str| {
        let digits = part.trim_start_matches('0');
        if digits.is_empty() { "0".to_owned() } else { digits.to_owned() }
    };
    let parts: Vec<String> = text.split('.').map(without_zeros).collect();
    if text.contains('%') {
        "it has a zone, which is another one on every node"
    } else if text.contains('/') {
        "it is a range and not an address"
    } else if parts.join(".").parse::<IpAddr>().is_ok() {
        "its numbers have leading zeros, which some programs read as octal"
    } else {
        "it is not an IP address"
    }
}

/// An address for the outside, which must be of a family that the Service has.
pub(super) fn external_address(
    text: &str,
    own: ClusterAddresses,
) -> Result<IpAddr, (&'static str, &'static str)> {
    let address = usable_address(text).map_err(|why| ("InvalidExternalIP", why))?;
    if own.iter().any(|a| a.is_ipv4() == address.is_ipv4()) {
        Ok(address)
    } else {
        Err(("KubeProxyIncorrectIPVersion", "the Service has no cluster address of its family"))
    }
}

/// A range of addresses, whose first one is written as an address has to be.
pub(super) fn range(text: &str) -> Option<IpNet> {
    let (address, length) = text.split_once('/')?;
    let digits = length.bytes().all(|byte| byte.is_ascii_digit());
    let length = length.parse().ok().filter(|_| digits)?;
    Some(IpNet::new(address.parse().ok()?, length).ok()?.trunc())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_are_no_ones_are_refused() {
        for text in [
            "127.0.0.1",
            "169.254.1.1",
            "224.0.0.1",
            "0.0.0.0",
            "255.255.255.255",
            "010.0.0.1",
            "::1",
            "fe80::1",
            "ff02::1",
            "::ffff:10.0.0.1",
            "",
            "web",
        ] {
            assert!(usable_address(text).is_err(), "{text}");
        }
        assert!(usable_address("10.0.0.1").is_ok() && usable_address("fd00::1").is_ok());
        // Other ways to write one are one.
        let canonical: IpAddr = "fd00::ab".parse().unwrap();
        for text in ["FD00::AB", "fd00:0:0::00ab"] {
            assert_eq!(usable_address(text), Ok(canonical), "{text}");
        }
        for (text, words) in [
            ("010.0.0.1", "leading zeros"),
            ("fe80::1%eth0", "zone"),
            ("10.0.0.0/24", "range"),
            ("10.0.0.256", "not an IP address"),
            ("::ffff:10.0.0.1", "IPv4 address in IPv6 form"),
        ] {
            assert!(usable_address(text).unwrap_err().contains(words), "{text}");
        }
    }

    #[test]
    fn ranges_are_written_as_addresses_are() {
        for (text, expected) in [
            ("10.0.0.7/8", Some("10.0.0.0/8")),
            ("FD00:0::1/64", Some("fd00::/64")),
            ("0.0.0.0/0", Some("0.0.0.0/0")),
            ("010.0.0.0/8", None),
            ("10.0.0.0/+8", None),
            ("10.0.0.0/33", None),
            ("10.0.0.0", None),
            ("fe80::%eth0/64", None),
            ("x/8", None),
        ] {
            assert_eq!(range(text).map(|range| range.to_string()).as_deref(), expected, "{text}");
        }
    }
}
