//! What only a whole proxy does: both families at once, health checks, and the node's own range.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::mpsc,
};

use serde_json::{Value, json};

use super::{
    backends::config,
    changes_test::Flow,
    cluster::{Api, Running},
    features::{Own, Part, pod},
    fixture::{Addresses, Answer, From, Net, POD_RANGES},
};
use crate::{
    DetectLocal, Mode,
    model::{Family, Protocol},
    until::{PATIENCE, until},
};

everywhere!(
    a_service_of_both_families_is_served_in_both,
    health_checks_tell_of_endpoints_on_this_node,
    a_node_that_gets_another_zone_or_address_serves_there,
    pods_are_those_in_the_nodes_own_range,
    who_tried_before_the_start_gets_in_with_the_next_try,
);

const OUTSIDE: From = From::Client(1);

fn own(family: Family) -> Own {
    Own { addresses: Addresses(family), n: 1 }
}

fn endpoints(api: &Api, own: Own, pods: Vec<super::features::Pod>) {
    let mut slice = own.slice(0, &Part(8080, pods));
    slice["metadata"]["name"] = own.addresses.0.as_str().into();
    api.set(slice);
}

fn cluster(own: Own) -> SocketAddr {
    SocketAddr::new(own.cluster(), 80)
}

fn a_service_of_both_families_is_served_in_both(mode: Mode, family: Family) {
    let net = Net::new();
    let api = Api::new();
    let other = if family == Family::V4 { Family::V6 } else { Family::V4 };
    let both = [own(family), own(other)];
    let service = |of: &[Own]| {
        let addresses: Vec<_> = of.iter().map(|own| own.cluster()).collect();
        let families: Vec<_> = of.iter().map(|own| own.addresses.0.as_str()).collect();
        both[0].service(json!({"spec": {"type": "NodePort", "clusterIP": addresses[0],
            "clusterIPs": addresses, "ipFamilies": families, "ipFamilyPolicy": "PreferDualStack"}}))
    };
    api.set(service(&both));
    // Other endpoints in each, so that it shows which one was meant.
    endpoints(&api, both[0], vec![pod(1)]);
    endpoints(&api, both[1], vec![pod(2)]);
    let running = Running::start(&net.host, config(mode), &api);
    let served = |own: Own, by: Option<u8>| {
        let node_port = SocketAddr::new(own.addresses.node(), own.node_port());
        for to in [node_port, cluster(own)] {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                until(&format!("{protocol} {to} by {by:?}"), || {
                    match (net.ask_briefly(OUTSIDE, protocol, to), by) {
                        (Answer::By(n, ..), Some(by)) => n == by,
                        // A cluster address that is nobody's goes its way.
                        (Answer::Refused | Answer::Silence, None) => true,
                        _ => false,
                    }
                });
            }
        }
    };
    served(both[0], Some(1));
    served(both[1], Some(2));
    // From two families to one, and back.
    api.set(service(&both[..1]));
    served(both[1], None);
    served(both[0], Some(1));
    api.set(service(&both));
    served(both[1], Some(2));
    running.stop();
}

/// Only with nftables, as with kube-proxy.
#[test]
fn ranges_of_services_come_and_go_with_their_objects() {
    let net = Net::new();
    let api = Api::new();
    let running = Running::start(&net.host, config(Mode::Nftables), &api);
    for own in [Family::V4, Family::V6].map(own) {
        let pod = SocketAddr::new(own.addresses.pod(4), 8080);
        let passes = |expected: bool| {
            until(&format!("{pod} is reached: {expected}"), || {
                let answer = net.ask_briefly(OUTSIDE, Protocol::Tcp, pod);
                matches!(answer, Answer::By(4, ..)) == expected
            });
        };
        let ranges =
            [pod.ip(), own.cluster()].map(|address| own.ranges(&[own.addresses.only(address)]));
        passes(true);
        api.set(ranges[0].clone());
        passes(false);
        api.set(ranges[1].clone());
        passes(true);
        api.set(ranges[0].clone());
        passes(false);
        api.remove("ServiceCIDR", &own.n.to_string());
        passes(true);
    }
    running.stop();
}

fn a_node_that_gets_another_zone_or_address_serves_there(mode: Mode, family: Family) {
    let net = Net::new();
    let own = own(family);
    let api = Api::new();
    api.set(own.service(json!({"spec": {"type": "NodePort"}})));
    let hinted = [pod(1).for_zones(&["zone-a"]), pod(2).for_zones(&["zone-b"])];
    endpoints(&api, own, hinted.into());
    let running = Running::start(&net.host, config(mode), &api);
    let meets = |to: SocketAddr, by: Option<u8>| {
        until(&format!("{to} by {by:?}"), || match net.ask_briefly(OUTSIDE, Protocol::Tcp, to) {
            Answer::By(n, ..) => by == Some(n),
            Answer::Refused => by.is_none(),
            _ => false,
        });
    };
    let usual = [Family::V4, Family::V6].map(|family| Addresses(family).node());
    let others = [Family::V4, Family::V6].map(|family| Addresses(family).node_other());
    let [here, there] = [own.addresses.node(), own.addresses.node_other()]
        .map(|address| SocketAddr::new(address, own.node_port()));
    meets(cluster(own), Some(1));
    meets(here, Some(1));
    api.set_node("zone-b", usual);
    meets(cluster(own), Some(2));
    meets(here, Some(2));
    meets(there, None);
    api.set_node("zone-b", others);
    meets(there, Some(2));
    meets(here, None);
    running.stop();
}

fn health_checks_tell_of_endpoints_on_this_node(mode: Mode, family: Family) {
    const PORT: u16 = 32_100;
    let net = Net::new();
    let own = own(family);
    let api = Api::new();
    let service = |policy: &str| {
        let mut service = own.service(json!({"spec": {"type": "LoadBalancer",
                "externalTrafficPolicy": policy},
            "status": {"loadBalancer": {"ingress": [{"ip": own.balancer()}]}}}));
        if policy == "Local" {
            service["spec"]["healthCheckNodePort"] = PORT.into();
        }
        service
    };
    api.set(service("Local"));
    endpoints(&api, own, vec![pod(1), pod(2), pod(3)]);
    let running = Running::start(&net.host, config(mode), &api);
    let to = SocketAddr::new(own.addresses.node(), PORT);
    let answers = |what: &str, status: &str, count: Option<u64>| {
        until(what, || {
            let Some(page) = get(&net, to) else { return status.is_empty() };
            let (head, body) = page.split_once("\r\n\r\n").unwrap_or_default();
            let body: Value = serde_json::from_str(body).unwrap_or_default();
            head.starts_with(&format!("HTTP/1.1 {status} "))
                && body["localEndpoints"].as_u64() == count
        });
    };
    answers("two are here", "200", Some(2));
    endpoints(&api, own, vec![pod(1).draining(), pod(2), pod(3)]);
    answers("one that terminates doesn't count", "200", Some(1));
    endpoints(&api, own, vec![pod(1).draining(), pod(2)]);
    answers("nor does it if it is the last", "503", Some(0));
    endpoints(&api, own, vec![pod(1), pod(2)]);
    answers("one is here again", "200", Some(1));
    api.set(service("Cluster"));
    answers("without Local nobody is told", "", None);
    running.stop();
}

fn who_tried_before_the_start_gets_in_with_the_next_try(mode: Mode, family: Family) {
    let net = Net::new();
    // Connections are tracked once any rule asks for their state.
    net.host.sh(
        "nft 'add table inet other; add chain inet other c { type filter hook forward priority 0; }; \
              add rule inet other c ct state new counter'",
    );
    let (own, api) = (own(family), Api::new());
    endpoints(&api, own, vec![pod(1)]);
    api.set(own.service(json!({})));
    let flow = Flow::new(&net, OUTSIDE, cluster(own));
    assert_eq!(flow.ask(), None);
    let (done, answered) = mpsc::channel();
    net.ask_patiently(OUTSIDE, Protocol::Tcp, cluster(own), done);
    let tracked = format!(
        "conntrack -L -f {} -d {} 2>/dev/null",
        family.as_str().to_lowercase(),
        own.cluster()
    );
    until("both are tracked", || net.host.sh(&tracked).matches("[UNREPLIED]").count() == 2);
    let running = Running::start(&net.host, config(mode), &api);
    until("datagrams from the same port get in", || flow.ask() == Some(1));
    let answer = answered.recv().unwrap();
    assert!(matches!(answer, Answer::By(1, ..)), "{answer:?}");
    running.stop();
}

/// A page, if anybody answers.
fn get(net: &Net, to: SocketAddr) -> Option<String> {
    net.place(OUTSIDE).run(move || {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        write!(stream, "GET / HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n").ok()?;
        let mut page = String::new();
        stream.read_to_string(&mut page).ok()?;
        Some(page)
    })
}

fn pods_are_those_in_the_nodes_own_range(mode: Mode, family: Family) {
    let net = Net::new();
    let own = own(family);
    let api = Api::new();
    api.set(json!({"kind": "Node", "metadata": {"name": "here"},
        "spec": {"podCIDR": POD_RANGES[0], "podCIDRs": POD_RANGES},
        "status": {"addresses": [{"type": "InternalIP", "address": own.addresses.node()}]}}));
    api.set(own.service(json!({})));
    endpoints(&api, own, vec![pod(1)]);
    let config = crate::ProxyConfig {
        detect_local: DetectLocal::NodeCidr,
        families: vec![family],
        ..config(mode)
    };
    let running = Running::start(&net.host, config, &api);
    let seen = |from: From| match net.ask_briefly(from, Protocol::Tcp, cluster(own)) {
        Answer::By(1, _, address) => Some(address),
        _ => None,
    };
    until("it is served", || seen(OUTSIDE).is_some());
    assert!(own.addresses.nodes().any(|node| Some(node) == seen(OUTSIDE)), "outside is hidden");
    // Relays hide everybody.
    let kept = (mode != Mode::Userspace).then(|| own.addresses.pod(3));
    assert_eq!(seen(From::Pod(3)).filter(|_| kept.is_some()), kept, "pods are not");
    running.stop();
}
