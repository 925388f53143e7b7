//! How it is said that nobody answers, and who is kept from loopback.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::mpsc,
};

use serde_json::json;

use super::{
    backends::{Proxy, config},
    features::{Own, Part, pod},
    fixture::{Addresses, Answer, From, Net, SILENCE},
};
use crate::{
    Mode, NodePortAddresses,
    model::{Family, Protocol},
};

everywhere!(refusals_are_of_the_documented_kind);

const OUTSIDE: From = From::Client(1);

/// How often clients were told that a destination can't be reached.
fn unreachable(net: &Net, family: Family) -> u64 {
    let host = net.place(OUTSIDE);
    let text = match family {
        Family::V4 => host.sh(
            "awk '/^Icmp: / && !names {split($0, name); names = 1; next} \
             /^Icmp: / {for (i in name) if (name[i] == \"InDestUnreachs\") print $i}' /proc/net/snmp",
        ),
        Family::V6 => host.sh("awk '$1 == \"Icmp6InDestUnreachs\" {print $2}' /proc/net/snmp6"),
    };
    text.trim().parse().unwrap()
}

/// UDP is told by ICMP that the port is unreachable, in each mode: a client takes nothing else for
/// a refusal. TCP gets a reset, but with IPv4 from iptables, which sends ICMP as kube-proxy has it.
fn refusals_are_of_the_documented_kind(mode: Mode, family: Family) {
    let net = Net::new();
    let proxy = Proxy::start(&net.host, &config(mode), family);
    proxy.synchronize();
    let own = Own { addresses: Addresses(family), n: 1 };
    proxy.set(own.service(json!({"spec": {"type": "NodePort", "externalIPs": [own.external()]}})));
    for to in [
        SocketAddr::new(own.cluster(), 80),
        SocketAddr::new(own.external(), 80),
        SocketAddr::new(own.addresses.node(), own.node_port()),
    ] {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let before = unreachable(&net, family);
            assert_eq!(net.ask(OUTSIDE, protocol, to), Answer::Refused, "{protocol} {to}");
            let told = unreachable(&net, family) > before;
            let by_icmp =
                protocol == Protocol::Udp || mode == Mode::Iptables && family == Family::V4;
            assert_eq!(told, by_icmp, "{protocol} {to}");
        }
    }
}

/// CVE-2020-8558: for node ports on loopback the kernel must route its addresses, so that clients
/// on the same network could reach what listens there alone.
#[test]
fn nobody_from_outside_reaches_what_listens_on_loopback() {
    const LOCAL: &str = "127.0.0.1:8099";
    for mode in [Mode::Nftables, Mode::Iptables, Mode::Userspace] {
        let net = Net::new();
        let mut config = config(mode);
        if mode == Mode::Iptables {
            let all = ["0.0.0.0/0", "::/0"].map(|range| range.parse().unwrap());
            config.node_port_addresses = NodePortAddresses::Ranges(all.into());
        }
        let proxy = Proxy::start(&net.host, &config, Family::V4);
        proxy.synchronize();
        let own = Own { addresses: Addresses(Family::V4), n: 1 };
        proxy.set(own.service(json!({"spec": {"type": "NodePort"}})));
        proxy.set(own.slice(0, &Part(8080, vec![pod(1)])));
        let (hears, heard) = mpsc::channel();
        net.host.run(move || {
            let socket = UdpSocket::bind(LOCAL).unwrap();
            std::thread::spawn(move || {
                while socket.recv(&mut [0; 16]).is_ok() && hears.send(()).is_ok() {}
            });
        });
        let reached = |from: From| {
            net.place(from).run(|| {
                UdpSocket::bind("0.0.0.0:0").unwrap().send_to(b"?", LOCAL).unwrap();
            });
            heard.recv_timeout(SILENCE).is_ok()
        };
        assert!(reached(From::Node), "it listens");
        // A client that takes loopback addresses for the node's.
        net.place(OUTSIDE).sh("sysctl -qw net.ipv4.conf.all.route_localnet=1; \
             ip route flush table local 127.0.0.0/8; ip route flush table local 127.0.0.1; \
             ip route add 127.0.0.0/8 via 192.0.2.1");
        assert!(!reached(OUTSIDE), "{mode:?}");
        if mode == Mode::Iptables {
            // It is the guard that keeps it away.
            net.host.sh("iptables -F KUBE-FIREWALL");
            assert!(reached(OUTSIDE), "without the guard");
        }
    }
}
