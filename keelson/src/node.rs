//! What this machine is called, and where it is reached.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, bail};

/// The node's name: as given (`by` says how that is done), else the host name in lower case (as the
/// kubelet has it).
///
/// # Errors
/// When it is not a DNS subdomain, as a Node's name must be.
pub(crate) fn name(given: Option<&str>, by: &str) -> anyhow::Result<String> {
    let name = match given {
        Some(name) => name.to_owned(),
        None => nix::unistd::gethostname()
            .context("this machine's host name")?
            .to_string_lossy()
            .trim()
            .to_lowercase(),
    };
    if !is_name(&name) {
        bail!("{name:?} can't be a node's name: {NAME} is wanted; give one with {by}");
    }
    Ok(name)
}

/// What a node's name consists of, in words.
pub(crate) const NAME: &str = "a name of lower-case letters, digits, '-' and '.'";

/// Whether this can be a node's name.
pub(crate) fn is_name(name: &str) -> bool {
    let label = |part: &str| {
        !part.is_empty()
            && !part.starts_with('-')
            && !part.ends_with('-')
            && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

/// All addresses of this machine's interfaces.
///
/// # Errors
/// When the kernel doesn't tell.
pub(crate) fn addresses() -> anyhow::Result<Vec<IpAddr>> {
    Ok(interfaces()?.into_iter().map(|(_, address)| address).collect())
}

/// This machine's interfaces with their addresses.
fn interfaces() -> anyhow::Result<Vec<(String, IpAddr)>> {
    let interfaces = nix::ifaddrs::getifaddrs().context("this machine's addresses")?;
    let with_address = interfaces.filter_map(|interface| {
        let address = interface.address?;
        let ip = match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
            (Some(v4), _) => IpAddr::V4(v4.ip()),
            (_, Some(v6)) => IpAddr::V6(v6.ip()),
            _ => return None,
        };
        Some((interface.interface_name, ip))
    });
    Ok(with_address.collect())
}

/// The node's address: as given, else that of the interface with the default route, else the first
/// one that is not only this machine's own.
///
/// # Errors
/// When there is none, or the one given is not this machine's.
pub(crate) fn address(given: Option<IpAddr>) -> anyhow::Result<IpAddr> {
    let interfaces = interfaces()?;
    if let Some(given) = given {
        if interfaces.iter().any(|(_, ip)| *ip == given) {
            return Ok(given);
        }
        bail!("--node-ip {given}: no interface of this machine has that address");
    }
    let routes = std::fs::read_to_string("/proc/net/route").context("/proc/net/route")?;
    choose(&interfaces, default_interface(&routes).as_deref()).context(
        "this machine has no IPv4 address that others can reach it at: give it one, or choose one \
         with --node-ip",
    )
}

/// The interface of the IPv4 default route with the lowest metric, in `/proc/net/route`'s form.
fn default_interface(routes: &str) -> Option<String> {
    routes
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (name, destination, metric, mask) =
                (fields.first()?, fields.get(1)?, fields.get(6)?, fields.get(7)?);
            (*destination == "00000000" && *mask == "00000000")
                .then(|| Some((metric.parse::<u32>().ok()?, (*name).to_owned())))?
        })
        .min()
        .map(|(_, name)| name)
}

fn choose(interfaces: &[(String, IpAddr)], default: Option<&str>) -> Option<IpAddr> {
    let usable = |ip: &IpAddr| match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local() && *ip != Ipv4Addr::UNSPECIFIED,
        IpAddr::V6(_) => false,
    };
    let of_default = interfaces.iter().filter(|(name, _)| Some(name.as_str()) == default);
    of_default.chain(interfaces).map(|(_, ip)| *ip).find(usable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        assert_eq!(name(Some("node-1.example"), "--x").unwrap(), "node-1.example");
        for bad in ["", "Node", "a_b", "-a", "a..b"] {
            let error = name(Some(bad), "--node-name").unwrap_err().to_string();
            assert!(
                error.contains(&format!("{bad:?}")) && error.contains("--node-name"),
                "{error}"
            );
        }
    }

    #[test]
    fn the_default_routes_address_is_chosen() {
        let routes = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\n\
                      eth1\t00000000\t010200C0\t0003\t0\t0\t100\t00000000\t0\n\
                      eth0\t00000000\t010200C0\t0003\t0\t0\t10\t00000000\t0\n\
                      eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\n";
        assert_eq!(default_interface(routes).as_deref(), Some("eth0"));
        let interfaces: Vec<(String, IpAddr)> = [
            ("lo", "127.0.0.1"),
            ("eth1", "192.0.2.9"),
            ("eth0", "169.254.3.3"),
            ("eth0", "192.0.2.2"),
        ]
        .iter()
        .map(|(name, ip)| ((*name).to_owned(), ip.parse().unwrap()))
        .collect();
        assert_eq!(choose(&interfaces, Some("eth0")), Some("192.0.2.2".parse().unwrap()));
        assert_eq!(choose(&interfaces, None), Some("192.0.2.9".parse().unwrap()));
        assert_eq!(choose(&interfaces[..1], None), None);
    }
}
