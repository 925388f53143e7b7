//! The table of features with SCTP, and what takes more than one step.

use std::net::SocketAddr;

use serde_json::{Value, json};

use super::{
    backends::{Proxy, config},
    changes_test::{choice_is_even, sticky_clients_are_forgotten, sticky_clients_return},
    features::{Own, Part, pod},
    fixture::{Addresses, Answer, CLIENTS, From, Net, ask, source},
    sctp,
    table_test::run_table,
};
use crate::{
    Mode,
    model::{Family, Protocol},
    until::PATIENCE,
};

everywhere!(
    @ Nftables nftables:
    every_feature_does_as_documented,
    the_choice_is_even,
    sticky_clients_return_while_their_endpoint_is_there,
    sticky_clients_are_forgotten_after_their_time,
    associations_from_one_port_follow_their_service,
    connections_to_endpoints_that_are_gone_are_forgotten
);
everywhere!(
    @ Iptables iptables:
    every_feature_does_as_documented,
    the_choice_is_even,
    sticky_clients_return_while_their_endpoint_is_there,
    sticky_clients_are_forgotten_after_their_time,
    associations_from_one_port_follow_their_service,
    connections_to_endpoints_that_are_gone_are_forgotten
);
// Where nothing is served, nothing changes.
everywhere!(@ Userspace userspace: every_feature_does_as_documented);

const SCTP: [Protocol; 1] = [Protocol::Sctp];

fn every_feature_does_as_documented(mode: Mode, family: Family) {
    if sctp::can_be_tested() {
        run_table(mode, family, &SCTP);
    }
}

fn the_choice_is_even(mode: Mode, family: Family) {
    if sctp::can_be_tested() {
        choice_is_even(mode, family, &SCTP);
    }
}

fn sticky_clients_return_while_their_endpoint_is_there(mode: Mode, family: Family) {
    if sctp::can_be_tested() {
        sticky_clients_return(mode, family, &SCTP);
    }
}

fn sticky_clients_are_forgotten_after_their_time(mode: Mode, family: Family) {
    if sctp::can_be_tested() {
        sticky_clients_are_forgotten(mode, family, &SCTP);
    }
}

fn start(net: &Net, mode: Mode, family: Family) -> (Proxy<'_>, Own) {
    let proxy = Proxy::start(&net.host, &config(mode), family);
    proxy.synchronize();
    (proxy, Own { addresses: Addresses(family), n: 1 })
}

/// A Service with nothing but SCTP: other protocols' connections lead to no look at these.
fn service(own: Own) -> Value {
    own.service(json!({"spec": {"type": "NodePort", "ports": [
        {"name": "s", "port": 80, "nodePort": own.node_port(), "protocol": "SCTP"}]}}))
}

fn part(endpoints: &[u8]) -> Part {
    Part(8080, endpoints.iter().map(|n| pod(*n)).collect())
}

/// To the kernel, associations that follow each other from one port are one connection, for the ten
/// seconds that it remembers one that has ended.
fn associations_from_one_port_follow_their_service(mode: Mode, family: Family) {
    if !sctp::can_be_tested() {
        return;
    }
    let net = Net::new();
    let (proxy, own) = start(&net, mode, family);
    let cluster = SocketAddr::new(own.cluster(), 80);
    let node_port = SocketAddr::new(own.addresses.node(), own.node_port());
    for (from, to) in [
        (From::Client(1), cluster),
        (From::Node, cluster),
        (From::Pod(3), cluster),
        (From::Client(1), node_port),
    ] {
        proxy.set(own.slice(0, &part(&[])));
        proxy.set(service(own));
        let mut source = source(from, to);
        source.set_port(if to == cluster { 20_001 } else { 20_002 });
        let goes = |what: &str, expected: Option<u8>| {
            let patience = if expected.is_some() { PATIENCE } else { sctp::SILENCE };
            let answer = net.place(from).run(move || ask(Protocol::Sctp, source, to, patience));
            let found = match answer {
                Answer::By(n, ..) => Some(n),
                Answer::Refused | Answer::Silence => None,
                other => panic!("{from:?} to {to}: {what}: {other:?}"),
            };
            assert_eq!(found, expected, "{from:?} to {to}: {what}");
        };
        goes("none", None);
        proxy.set(own.slice(0, &part(&[1])));
        goes("from none to one", Some(1));
        proxy.set(own.slice(0, &part(&[2])));
        goes("from one to another", Some(2));
        proxy.set(own.slice(0, &part(&[1, 2, 4])));
        goes("who is well where it is stays there", Some(2));
        proxy.set(own.slice(0, &part(&[])));
        goes("from one to none", None);
        proxy.set(own.slice(0, &part(&[4])));
        goes("and back", Some(4));
        if to == cluster {
            // Now the packet goes its way untranslated, and the kernel remembers that.
            proxy.remove("Service", "1");
            goes("the Service goes", None);
            proxy.set(service(own));
            goes("the Service comes back", Some(4));
        }
    }
}

fn connections_to_endpoints_that_are_gone_are_forgotten(mode: Mode, family: Family) {
    if !sctp::can_be_tested() {
        return;
    }
    let net = Net::new();
    let (proxy, own) = start(&net, mode, family);
    proxy.set(service(own));
    let to = SocketAddr::new(own.cluster(), 80);
    let tracked = |n: u8| {
        let family = if to.is_ipv4() { "ipv4" } else { "ipv6" };
        let pod = own.addresses.pod(n);
        let command = format!("conntrack -L -f {family} -p sctp --reply-src {pod} 2>/dev/null");
        net.host.sh(&command).lines().count()
    };
    proxy.set(own.slice(0, &part(&[1, 2])));
    // So many clients miss one of the two once in thirty thousand times; then others ask.
    let mut clients = (1..=CLIENTS).cycle();
    while tracked(1) == 0 || tracked(2) == 0 {
        for client in clients.by_ref().take(usize::from(CLIENTS)) {
            assert!(matches!(net.ask(From::Client(client), Protocol::Sctp, to), Answer::By(..)));
        }
    }
    let stay = tracked(2);
    proxy.set(own.slice(0, &part(&[2])));
    assert_eq!((tracked(1), tracked(2)), (0, stay), "only those of the endpoint that is gone go");
}
