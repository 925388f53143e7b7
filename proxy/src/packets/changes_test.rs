//! What takes more than one step: even choice, clients that return, flows that follow.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::mpsc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{
    backends::{Proxy, config},
    features::{Own, Part, pod},
    fixture::{Addresses, Answer, CLIENTS, From, Net, ON_NODE, listed},
};
use crate::{
    Mode,
    model::{Family, Protocol},
    until::{PATIENCE, until},
};

everywhere!(
    the_choice_is_even,
    sticky_clients_return_while_their_endpoint_is_there,
    sticky_clients_are_forgotten_after_their_time,
    udp_flows_that_never_pause_follow_their_service,
    one_kind_of_service_turns_into_another,
    the_older_of_two_services_has_what_both_claim,
    a_restart_writes_nothing_and_changes_nothing,
    connections_older_than_the_rules_live_on,
    who_tries_before_there_is_a_service_gets_in_with_the_next_try,
    another_time_of_affinity_counts_from_the_next_connection_on,
);

const BOTH: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];

fn start(net: &Net, mode: Mode, family: Family) -> (Proxy<'_>, Own) {
    let proxy = Proxy::start(&net.host, &config(mode), family);
    proxy.synchronize();
    (proxy, Own { addresses: Addresses(family), n: 1 })
}

fn part(endpoints: &[u8]) -> Part {
    Part(8080, endpoints.iter().map(|n| pod(*n)).collect())
}

/// Who answers.
fn who(net: &Net, from: From, protocol: Protocol, to: SocketAddr) -> u8 {
    match net.ask(from, protocol, to) {
        Answer::By(n, ..) => n,
        other => panic!("{from:?} to {protocol} {to}: {other:?}"),
    }
}

fn the_choice_is_even(mode: Mode, family: Family) {
    choice_is_even(mode, family, &BOTH);
}

pub(super) fn choice_is_even(mode: Mode, family: Family, protocols: &[Protocol]) {
    let net = Net::new();
    let (proxy, own) = start(&net, mode, family);
    proxy.set(own.service(json!({"spec": {"type": "NodePort"}})));
    // Told of twice, an endpoint isn't chosen twice as often.
    proxy.set(own.slice(0, &part(&[1, 2])));
    proxy.set(own.slice(1, &part(&[2, 4])));
    let cluster = SocketAddr::new(own.cluster(), 80);
    let node_port = SocketAddr::new(own.addresses.node(), own.node_port());
    for &protocol in protocols {
        for to in [cluster, node_port] {
            let mut counts: BTreeMap<u8, u32> = [(1, 0), (2, 0), (4, 0)].into();
            for _ in 0..300 {
                *counts.entry(who(&net, From::Client(1), protocol, to)).or_default() += 1;
            }
            assert_eq!(counts.len(), 3, "{protocol} {to}: {counts:?}");
            let square: f64 =
                counts.values().map(|n| (f64::from(*n) - 100.0).powi(2) / 100.0).sum();
            // With two degrees of freedom chance exceeds this once in a million times.
            assert!(square < 27.6, "{protocol} {to}: {counts:?}, chi-square {square:.1}");
        }
    }
}

fn sticky(own: Own, seconds: u32) -> Value {
    own.service(json!({"spec": {"type": "LoadBalancer", "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}}},
        "status": {"loadBalancer": {"ingress": [{"ip": own.balancer()}]}}}))
}

fn sticky_clients_return_while_their_endpoint_is_there(mode: Mode, family: Family) {
    sticky_clients_return(mode, family, &BOTH);
}

pub(super) fn sticky_clients_return(mode: Mode, family: Family, protocols: &[Protocol]) {
    let net = Net::new();
    let (proxy, own) = start(&net, mode, family);
    proxy.set(sticky(own, 1000));
    proxy.set(own.slice(0, &part(&[1, 2, 3, 4])));
    for &protocol in protocols {
        for to in [
            SocketAddr::new(own.cluster(), 80),
            SocketAddr::new(own.balancer(), 80),
            SocketAddr::new(own.addresses.node(), own.node_port()),
        ] {
            let ask = || who(&net, From::Client(1), protocol, to);
            let first = ask();
            for _ in 0..10 {
                assert_eq!(ask(), first, "{protocol} {to}");
            }
            // When its endpoint goes the client gets another one and stays there.
            let others: Vec<u8> = (1..=4).filter(|n| *n != first).collect();
            proxy.set(own.slice(0, &part(&others)));
            let second = ask();
            assert_ne!(second, first, "{protocol} {to}");
            proxy.set(own.slice(0, &part(&[1, 2, 3, 4])));
            for _ in 0..10 {
                assert_eq!(ask(), second, "{protocol} {to}");
            }
            // Others choose for themselves.
            let all: BTreeSet<u8> =
                (1..=CLIENTS).map(|n| who(&net, From::Client(n), protocol, to)).collect();
            assert!(all.len() > 1, "{protocol} {to}: everybody goes to {all:?}");
        }
    }
}

fn sticky_clients_are_forgotten_after_their_time(mode: Mode, family: Family) {
    sticky_clients_are_forgotten(mode, family, &BOTH);
}

pub(super) fn sticky_clients_are_forgotten(mode: Mode, family: Family, protocols: &[Protocol]) {
    let net = Net::new();
    let (proxy, own) = start(&net, mode, family);
    proxy.set(sticky(own, 1));
    proxy.set(own.slice(0, &part(&[1, 2, 3, 4])));
    let to = SocketAddr::new(own.cluster(), 80);
    let choices = |protocol| -> Vec<u8> {
        (1..=CLIENTS).map(|n| who(&net, From::Client(n), protocol, to)).collect()
    };
    for &protocol in protocols {
        let first = choices(protocol);
        // Each use starts the time anew, so nothing can be asked while it runs out.
        std::thread::sleep(Duration::from_millis(2100));
        // By chance all would choose alike once in four billion times.
        assert_ne!(choices(protocol), first, "{protocol}");
    }
    // With none to run out, nothing is remembered.
    proxy.set(own.service(json!({})));
    let all: BTreeSet<u8> = (0..40).map(|_| who(&net, From::Client(1), protocols[0], to)).collect();
    assert_eq!(all.len(), 4);
}

/// One socket all along: to the kernel it is one flow.
pub(super) struct Flow(UdpSocket);

impl Flow {
    pub(super) fn new(net: &Net, from: From, to: SocketAddr) -> Self {
        Self(net.place(from).run(move || {
            let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(any).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
            socket.connect(to).unwrap();
            socket
        }))
    }

    pub(super) fn ask(&self) -> Option<u8> {
        let mut answer = [0; 100];
        // Refusals of earlier datagrams are told on the next call.
        let _ = self.0.send(b"?");
        let length = self.0.recv(&mut answer).ok()?;
        std::str::from_utf8(&answer[..length]).ok()?.split(' ').next()?.parse().ok()
    }
}

fn udp_flows_that_never_pause_follow_their_service(mode: Mode, family: Family) {
    let net = Net::new();
    let (proxy, own) = start(&net, mode, family);
    let service =
        own.service(json!({"spec": {"type": "NodePort", "externalIPs": [own.external()]}}));
    for to in [
        SocketAddr::new(own.cluster(), 80),
        SocketAddr::new(own.external(), 80),
        SocketAddr::new(own.addresses.node(), own.node_port()),
    ] {
        for from in [From::Client(1), From::Node, From::Pod(3)] {
            proxy.set(own.slice(0, &part(&[])));
            proxy.set(service.clone());
            let flow = Flow::new(&net, from, to);
            let follows = |what: &str, expected: Option<u8>| {
                // An answer that was under way may come first.
                until(&format!("{from:?} to {to}: {what}"), || flow.ask() == expected);
                assert_eq!(flow.ask(), expected, "{from:?} to {to}: {what}, and stays");
            };
            follows("none", None);
            proxy.set(own.slice(0, &part(&[1])));
            follows("from none to one", Some(1));
            proxy.set(own.slice(0, &part(&[2])));
            follows("from one to another", Some(2));
            proxy.set(own.slice(0, &part(&[1, 2, 4])));
            follows("who is well where it is stays there", Some(2));
            proxy.set(own.slice(0, &part(&[])));
            follows("from one to none", None);
            proxy.set(own.slice(0, &part(&[4])));
            follows("and back", Some(4));
            proxy.remove("Service", "1");
            follows("the Service goes", None);
            proxy.set(service.clone());
            if mode == Mode::Userspace && from == From::Node && to.is_ipv6() {
                // A socket of the node that found its way out while there was no Service keeps to
                // it: IPv6 doesn't look again for a new route in another table.
                let another = Flow::new(&net, from, to);
                until("the Service comes back", || another.ask() == Some(4));
                continue;
            }
            follows("the Service comes back", Some(4));
        }
    }
}

fn one_kind_of_service_turns_into_another(mode: Mode, family: Family) {
    let net = Net::new();
    let (proxy, own) = start(&net, mode, family);
    proxy.set(own.slice(0, &part(&[1])));
    let cluster = SocketAddr::new(own.cluster(), 80);
    let node_port = SocketAddr::new(own.addresses.node(), own.node_port());
    let ask = |protocol, to| match net.ask(From::Client(1), protocol, to) {
        Answer::By(n, ..) => Some(n),
        Answer::Refused => None,
        other => panic!("{protocol} {to}: {other:?}"),
    };
    for protocol in BOTH {
        proxy.set(own.service(json!({})));
        assert_eq!([ask(protocol, cluster), ask(protocol, node_port)], [Some(1), None]);
        proxy.set(own.service(json!({"spec": {"type": "NodePort"}})));
        assert_eq!([ask(protocol, cluster), ask(protocol, node_port)], [Some(1), Some(1)]);
        proxy.set(
            own.service(json!({"spec": {"type": "NodePort", "externalTrafficPolicy": "Local"}})),
        );
        assert_eq!([ask(protocol, cluster), ask(protocol, node_port)], [Some(1), Some(1)]);
        proxy.set(own.service(json!({"spec": {"ports": [
            {"name": "t", "port": 81, "protocol": "TCP"},
            {"name": "u", "port": 81, "protocol": "UDP"}]}})));
        assert_eq!(ask(protocol, SocketAddr::new(own.cluster(), 81)), Some(1));
        assert_eq!(ask(protocol, node_port), None);
        // Another address, and the old one is nobody's.
        proxy.set(own.service(json!({"spec": {"clusterIP": own.addresses.cluster(77)}})));
        assert_eq!(ask(protocol, SocketAddr::new(own.addresses.cluster(77), 80)), Some(1));
    }
}

fn the_older_of_two_services_has_what_both_claim(mode: Mode, family: Family) {
    let net = Net::new();
    let (proxy, first) = start(&net, mode, family);
    let second = Own { n: 2, ..first };
    let service = |own: Own, created: &str| {
        let mut service = own.service(json!({"spec": {"type": "NodePort",
            "externalIPs": [first.external()], "ports": [
            {"name": "t", "port": 80, "nodePort": 30080, "protocol": "TCP"},
            {"name": "u", "port": 80, "nodePort": 30080, "protocol": "UDP"}]}}));
        service["metadata"]["creationTimestamp"] = created.into();
        service
    };
    proxy.set(first.slice(0, &part(&[1])));
    proxy.set(second.slice(0, &part(&[2])));
    let claimed =
        [SocketAddr::new(first.external(), 80), SocketAddr::new(first.addresses.node(), 30080)];
    let has = |owner: u8| {
        for (protocol, to) in BOTH.into_iter().flat_map(|p| claimed.map(|to| (p, to))) {
            assert_eq!(who(&net, From::Client(1), protocol, to), owner, "{protocol} {to}");
        }
    };
    proxy.set(service(second, "2026-01-01T00:00:00Z"));
    has(2);
    proxy.set(service(first, "2025-01-01T00:00:00Z"));
    has(1);
    proxy.set(service(second, "2024-01-01T00:00:00Z"));
    has(2);
    proxy.remove("Service", "2");
    has(1);
}

fn a_restart_writes_nothing_and_changes_nothing(mode: Mode, family: Family) {
    let net = Net::new();
    let (proxy, own) = start(&net, mode, family);
    proxy.set(sticky(own, 1000));
    let second = Own { n: 2, ..own };
    proxy
        .set(second.service(json!({"spec": {"type": "NodePort", "externalTrafficPolicy": "Local",
        "externalIPs": [second.external()]}})));
    let third = Own { n: 3, ..own };
    proxy.set(third.service(json!({"spec": {"type": "NodePort"}})));
    for own in [own, second] {
        proxy.set(own.slice(0, &part(&[1, 2, 3])));
        proxy.set(own.slice(0, &part(&[3, 1])));
        proxy.set(own.slice(1, &part(&[4, 2])));
    }
    let to = SocketAddr::new(own.cluster(), 80);
    let first = who(&net, From::Client(1), Protocol::Tcp, to);
    // What the last change left without use goes now.
    proxy.synchronize();
    let before = listed(&net, mode, family);
    let proxy = proxy.restarted();
    let applied = proxy.synchronize();
    if mode != Mode::Userspace {
        assert_eq!((applied.elements, applied.rebuilt), (0, None));
    }
    assert_eq!(listed(&net, mode, family), before);
    // Only what the kernel keeps is known to another process.
    for _ in 0..if mode == Mode::Userspace { 0 } else { 10 } {
        assert_eq!(who(&net, From::Client(1), Protocol::Tcp, to), first, "sticky over a restart");
    }
    let begin = Instant::now();
    proxy.clear();
    assert_eq!(
        net.ask(
            From::Client(1),
            Protocol::Tcp,
            SocketAddr::new(own.addresses.node(), own.node_port())
        ),
        Answer::Refused
    );
    assert!(begin.elapsed() < PATIENCE);
    // There is nothing to take away a second time.
    proxy.clear();
}

fn connections_older_than_the_rules_live_on(mode: Mode, family: Family) {
    // A node that reaches, at its own address, what is an endpoint too: its API server.
    let net = Net::new();
    let own = Own { addresses: Addresses(family), n: 1 };
    let server = SocketAddr::new(own.addresses.node(), 6443);
    let mut older = net.host.run(move || {
        let listener = TcpListener::bind(server).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut byte = [0];
            while stream.read_exact(&mut byte).and_then(|()| stream.write_all(&byte)).is_ok() {}
        });
        let stream = TcpStream::connect(server).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    });
    let mut exchange = |say: u8| {
        let mut heard = [0];
        older.write_all(&[say]).and_then(|()| older.read_exact(&mut heard)).map(|()| heard[0])
    };
    assert_eq!(exchange(1).unwrap(), 1);
    let (proxy, own) = start(&net, mode, family);
    proxy.set(own.service(json!({})));
    let mut slice = own.slice(0, &part(&[ON_NODE]));
    for port in slice["ports"].as_array_mut().unwrap() {
        port["port"] = server.port().into();
    }
    proxy.set(slice);
    assert_eq!(exchange(2).unwrap(), 2, "the kernel hears of the connection in its middle");
}

fn who_tries_before_there_is_a_service_gets_in_with_the_next_try(mode: Mode, family: Family) {
    let net = Net::new();
    let (proxy, own) = start(&net, mode, family);
    let to = SocketAddr::new(own.cluster(), 80);
    proxy.set(own.slice(0, &part(&[1])));
    for from in [From::Client(1), From::Pod(3), From::Node] {
        if mode == Mode::Userspace && from == From::Node {
            // The node's own socket has found its way out already, and keeps to it.
            continue;
        }
        let (done, answered) = mpsc::channel();
        net.ask_patiently(from, Protocol::Tcp, to, done);
        let trying = format!("ss -Htn state syn-sent dst {to}");
        until("it is tried", || !net.place(from).sh(&trying).is_empty());
        proxy.set(own.service(json!({})));
        let answer = answered.recv().unwrap();
        assert!(matches!(answer, Answer::By(1, ..)), "{from:?}: {answer:?}");
        proxy.remove("Service", "1");
    }
}

fn another_time_of_affinity_counts_from_the_next_connection_on(mode: Mode, family: Family) {
    let net = Net::new();
    let (proxy, own) = start(&net, mode, family);
    let to = SocketAddr::new(own.cluster(), 80);
    proxy.set(own.slice(0, &part(&[1, 2, 3, 4])));
    let choices = || -> Vec<u8> {
        (1..=CLIENTS).map(|n| who(&net, From::Client(n), Protocol::Udp, to)).collect()
    };
    proxy.set(sticky(own, 1000));
    let first = choices();
    proxy.set(sticky(own, 1));
    assert_eq!(choices(), first, "nobody is forgotten by the change itself");
    // Nothing can be asked while it runs out.
    std::thread::sleep(Duration::from_millis(2100));
    assert_ne!(choices(), first, "by chance once in four billion times");
}
