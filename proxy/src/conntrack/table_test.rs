//! Which connections a real kernel forgets.

use std::{collections::BTreeSet, net::IpAddr};

use super::ConntrackTable;
use crate::{
    backend::Stale,
    model::{Endpoint, Family, Protocol},
    netns::Namespace,
    ruleset::{Frontend, Lane},
};

/// An address by its last part.
fn address(family: Family, last: u8) -> IpAddr {
    match family {
        Family::V4 => [10, 96, 0, last].into(),
        Family::V6 => [0xfd00, 0x96, 0, 0, 0, 0, 0, u16::from(last)].into(),
    }
}

/// Where connections to a Service's address and port went, by the last parts of addresses.
const CONNECTIONS: [(u8, u16, u8, u16); 6] = [
    (1, 80, 11, 8080),
    (1, 80, 12, 8080),
    (1, 81, 11, 8080),
    (1, 80, 11, 9090),
    (2, 80, 11, 8080),
    (2, 82, 12, 9090),
];

/// What is stale: the Service's address, or none for a node port, its port, and the endpoint, or all.
type Way = (Option<u8>, u16, Option<(u8, u16)>);

/// Which of them are there.
fn tracked(host: &Namespace, family: Family) -> BTreeSet<usize> {
    let listed =
        host.sh(&format!("conntrack -L -f {} 2>/dev/null", family.as_str().to_lowercase()));
    let client_port = |line: &str| {
        let port = line.split("sport=").nth(1)?.split(' ').next()?.parse::<usize>().ok()?;
        Some(port - 1000)
    };
    listed.lines().filter_map(client_port).collect()
}

fn forgotten(family: Family, protocol: Protocol, stale: &[Way]) -> BTreeSet<usize> {
    let host = Namespace::new();
    let client = address(family, 99);
    let name = protocol.to_string().to_lowercase();
    let state = match protocol {
        Protocol::Tcp => "--state ESTABLISHED",
        Protocol::Udp => "",
        Protocol::Sctp => "--state ESTABLISHED --orig-vtag 1 --reply-vtag 2",
    };
    for (n, (to, port, endpoint, endpoint_port)) in CONNECTIONS.into_iter().enumerate() {
        let (to, endpoint) = (address(family, to), address(family, endpoint));
        host.sh(&format!(
            "conntrack -I -p {name} -t 300 {state} -s {client} --sport {source} -d {to} --dport {port} \
             -r {endpoint} --reply-port-src {endpoint_port} -q {client} --reply-port-dst {source}",
            source = 1000 + n
        ));
    }
    let before = tracked(&host, family);
    assert_eq!(before.len(), CONNECTIONS.len());
    let stale: Vec<Stale> = stale
        .iter()
        .map(|(to, port, endpoint)| {
            let lane = if to.is_some() { Lane::Address } else { Lane::NodePort };
            let to = to.map(|last| address(family, last));
            let frontend = Frontend { family, lane, address: to, protocol, port: *port };
            let endpoint =
                endpoint.map(|(last, port)| Endpoint { address: address(family, last), port });
            Stale { frontend, endpoint }
        })
        .collect();
    host.run(move || ConntrackTable::open().unwrap().forget(&stale).unwrap());
    before.difference(&tracked(&host, family)).copied().collect()
}

#[test]
fn nothing_but_what_went_the_stale_way_is_forgotten() {
    for family in [Family::V4, Family::V6] {
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
            let table: [(&str, _, &[usize]); 5] = [
                ("an endpoint of an address", (Some(1), 80, Some((11, 8080))), &[0]),
                ("another port of it", (Some(1), 80, Some((11, 9090))), &[3]),
                ("all of an address", (Some(1), 80, None), &[0, 1, 3]),
                ("an endpoint of a node port", (None, 80, Some((11, 8080))), &[0, 4]),
                ("all of a node port", (None, 82, None), &[5]),
            ];
            for (what, stale, expected) in table {
                let found = forgotten(family, protocol, &[stale]);
                assert_eq!(
                    found,
                    expected.iter().copied().collect(),
                    "{family:?} {protocol}: {what}"
                );
            }
        }
    }
    let two = [(Some(1), 81, None), (Some(2), 80, Some((11, 8080)))];
    assert_eq!(forgotten(Family::V4, Protocol::Sctp, &two), [2, 4].into());
}

#[test]
fn of_tcp_to_a_services_own_address_only_what_is_unanswered_is_forgotten() {
    for family in [Family::V4, Family::V6] {
        // One way by the kernel's filter, many by a listing.
        for count in [1, 40] {
            let host = Namespace::new();
            let (client, to) = (address(family, 99), address(family, 1));
            for (source, status) in [(1000, "-u SEEN_REPLY"), (1001, ""), (1002, "")] {
                let port = if source == 1002 { 81 } else { 80 };
                host.sh(&format!(
                    "conntrack -I -p tcp -t 300 --state SYN_SENT {status} -s {client} --sport {source} \
                     -d {to} --dport {port} -r {to} --reply-port-src {port} -q {client} \
                     --reply-port-dst {source}"
                ));
            }
            assert_eq!(tracked(&host, family), [0, 1, 2].into());
            let frontend = Frontend {
                family,
                lane: Lane::Address,
                address: Some(to),
                protocol: Protocol::Tcp,
                port: 80,
            };
            let stale = Stale { frontend, endpoint: Some(Endpoint { address: to, port: 80 }) };
            let stale = vec![stale; count];
            host.run(move || ConntrackTable::open().unwrap().forget(&stale).unwrap());
            assert_eq!(tracked(&host, family), [0, 2].into(), "{family:?}, {count}");
        }
    }
}
