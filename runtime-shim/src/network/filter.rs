//! The packet filter's table of the pods: masquerade of what leaves the cluster, and host ports.
//!
//! It is small and changes seldom, so it is written whole, in one transaction, by the `nft` program;
//! the Services' rules are the proxy's and in another table. Marks and priorities of this table: it
//! uses no marks; its `nat` chains have the standard priorities.

use std::{
    collections::BTreeMap,
    fmt,
    net::{Ipv4Addr, SocketAddrV4},
    process::Stdio,
};

use ipnet::Ipv4Net;
use tokio::io::AsyncWriteExt;

use super::link::PREFIX;
use crate::runtime::{Protocol, Result, RuntimeError};

/// Transport protocols, ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Transport {
    Tcp,
    Udp,
    Sctp,
}

impl From<Protocol> for Transport {
    fn from(protocol: Protocol) -> Transport {
        match protocol {
            Protocol::Tcp => Transport::Tcp,
            Protocol::Udp => Transport::Udp,
            Protocol::Sctp => Transport::Sctp,
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
            Transport::Sctp => "sctp",
        })
    }
}

/// A port of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct HostPort {
    pub(super) protocol: Transport,
    pub(super) port: u16,
    /// Which of the host's addresses; all, if none.
    pub(super) host_address: Option<Ipv4Addr>,
}

impl HostPort {
    /// Whether one packet could be for both.
    pub(super) fn collides_with(&self, other: &HostPort) -> bool {
        self.protocol == other.protocol
            && self.port == other.port
            && (self.host_address.is_none()
                || other.host_address.is_none()
                || self.host_address == other.host_address)
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host_address {
            Some(address) => write!(f, "{address}:{}/{}", self.port, self.protocol),
            None => write!(f, "{}/{}", self.port, self.protocol),
        }
    }
}

/// The whole table as text for `nft -f`, which replaces the old one in the same transaction.
pub(super) fn render(
    table: &str,
    ranges: &[Ipv4Net],
    unmasqueraded: &[Ipv4Net],
    ports: &BTreeMap<HostPort, SocketAddrV4>,
) -> String {
    let list =
        |nets: &[Ipv4Net]| nets.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let mut inside: Vec<Ipv4Net> = ranges.to_vec();
    inside.extend(unmasqueraded);
    // Overlapping intervals in one set would be refused.
    let inside = Ipv4Net::aggregate(&inside);
    // An empty set is no set to nft: before the node has a range there is nothing to hide.
    let masquerade = if ranges.is_empty() {
        String::new()
    } else {
        format!(
            "\n\t\tip saddr {{ {} }} ip daddr != {{ {} }} ip daddr != 224.0.0.0/4 \
             masquerade fully-random comment \"pods to the outside\"",
            list(&Ipv4Net::aggregate(&ranges.to_vec())),
            list(&inside)
        )
    };
    let elements = |lines: Vec<String>| {
        if lines.is_empty() {
            String::new()
        } else {
            format!("\n\t\telements = {{ {} }}", lines.join(",\n\t\t\t"))
        }
    };
    let target = |t: &SocketAddrV4| format!("{} . {}", t.ip(), t.port());
    let any = ports
        .iter()
        .filter(|(p, _)| p.host_address.is_none())
        .map(|(p, t)| format!("{} . {} : {}", p.protocol, p.port, target(t)));
    let at = ports.iter().filter_map(|(p, t)| {
        let address = p.host_address?;
        Some(format!("{address} . {} . {} : {}", p.protocol, p.port, target(t)))
    });
    let own: std::collections::BTreeSet<_> = ports.values().map(|t| *t.ip()).collect();
    let hairpin = own.iter().map(|ip| format!("{ip} . {ip}"));
    let (any, at, hairpin) =
        (elements(any.collect()), elements(at.collect()), elements(hairpin.collect()));
    format!(
        "table ip {table}
delete table ip {table}
table ip {table} {{
\tcomment \"the network of keelson's pods\"
\tmap host-ports {{
\t\ttype inet_proto . inet_service : ipv4_addr . inet_service{any}
\t}}
\tmap host-ports-at {{
\t\ttype ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service{at}
\t}}
\tset hairpin {{
\t\ttype ipv4_addr . ipv4_addr{hairpin}
\t}}
\tchain host-ports-nat {{
\t\tdnat ip to ip daddr . meta l4proto . th dport map @host-ports-at
\t\tdnat ip to meta l4proto . th dport map @host-ports
\t}}
\tchain prerouting {{
\t\ttype nat hook prerouting priority dstnat; policy accept;
\t\tmeta l4proto {{ tcp, udp, sctp }} fib daddr type local jump host-ports-nat
\t}}
\tchain output {{
\t\ttype nat hook output priority -100; policy accept;
\t\tmeta l4proto {{ tcp, udp, sctp }} fib daddr type local jump host-ports-nat
\t}}
\tchain postrouting {{
\t\ttype nat hook postrouting priority srcnat; policy accept;{masquerade}
\t\tip saddr 127.0.0.0/8 oifname \"{PREFIX}*\" masquerade fully-random comment \"host ports on localhost\"
\t\tct status dnat ip saddr . ip daddr @hairpin masquerade fully-random comment \"a pod to itself over its host port\"
\t}}
\tchain guard {{
\t\ttype filter hook prerouting priority raw; policy accept;
\t\tiifname \"{PREFIX}*\" ip daddr 127.0.0.0/8 drop comment \"pods don't reach the node's loopback\"
\t}}
}}
"
    )
}

/// Hands text to `nft -f -`.
pub(super) async fn load(text: String) -> Result<()> {
    run(&["-f", "-"], text).await
}

/// Removes the table. Returns how many there were.
pub(super) async fn remove(table: &str) -> Result<usize> {
    // Declared and deleted in one go: it need not be there.
    match run(&["delete", "table", "ip", table], String::new()).await {
        Ok(()) => Ok(1),
        Err(error) if error.to_string().contains("No such file or directory") => Ok(0),
        Err(error) => Err(error),
    }
}

async fn run(arguments: &[&str], input: String) -> Result<()> {
    let failed = |source| RuntimeError::Io {
        what: "running nft, which the pods' network needs (Debian's package nftables has it)"
            .into(),
        source,
    };
    let mut child = tokio::process::Command::new("nft")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).await.map_err(failed)?;
    }
    let output = child.wait_with_output().await.map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let first: String = said.lines().take(3).collect::<Vec<_>>().join("; ");
    Err(RuntimeError::Internal(format!("nft did not take the pods' rules: {first}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(port: u16, host_address: Option<&str>) -> HostPort {
        HostPort {
            protocol: Transport::Tcp,
            port,
            host_address: host_address.map(|a| a.parse().unwrap()),
        }
    }

    #[test]
    fn ports_collide_only_where_one_packet_could_be_for_both() {
        assert!(port(80, None).collides_with(&port(80, Some("10.0.0.1"))));
        assert!(!port(80, Some("10.0.0.2")).collides_with(&port(80, Some("10.0.0.1"))));
        assert!(!port(80, None).collides_with(&port(81, None)));
        assert_eq!(port(80, Some("10.0.0.1")).to_string(), "10.0.0.1:80/tcp");
    }

    #[test]
    fn elements_and_ranges_are_rendered() {
        let ranges = ["10.244.3.0/24".parse().unwrap()];
        let cluster = ["10.244.0.0/16".parse().unwrap(), "10.96.0.0/12".parse().unwrap()];
        let ports = BTreeMap::from([
            (port(8080, None), "10.244.3.7:80".parse().unwrap()),
            (port(8081, Some("192.0.2.1")), "10.244.3.8:81".parse().unwrap()),
        ]);
        let text = render("t", &ranges, &cluster, &ports);
        assert!(text.contains("tcp . 8080 : 10.244.3.7 . 80"), "{text}");
        assert!(text.contains("192.0.2.1 . tcp . 8081 : 10.244.3.8 . 81"), "{text}");
        assert!(
            text.contains("ip saddr { 10.244.3.0/24 } ip daddr != { 10.96.0.0/12, 10.244.0.0/16 }"),
            "{text}"
        );
        assert!(!render("t", &ranges, &[], &BTreeMap::new()).contains("elements"));
        // Before the node has a range, there must be no empty set: nft refuses one.
        assert!(!render("t", &[], &cluster, &ports).contains("pods to the outside"));
    }
}
