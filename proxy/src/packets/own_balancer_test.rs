//! A node that has a load balancer's address as one of its own sends from that address when it goes
//! there, and is held to source ranges by its real one.

use std::net::SocketAddr;

use serde_json::json;

use super::{
    backends::{Proxy, config},
    features::{Own, Part, pod},
    fixture::{Addresses, Answer, From, Net},
};
use crate::{
    Mode,
    model::{Family, Protocol},
};

#[test]
fn a_node_comes_from_a_load_balancers_own_address_where_its_own_is_admitted() {
    let families = [Family::V4, Family::V6];
    // Relays don't look at who the node is.
    for mode in [Mode::Nftables, Mode::Iptables] {
        let net = Net::new();
        for family in families {
            let own = Own { addresses: Addresses(family), n: 1 };
            let addresses = own.addresses;
            net.host.sh(&format!("ip addr add {} dev lo", addresses.only(own.balancer())));
            let proxy = Proxy::start(&net.host, &config(mode), family);
            proxy.synchronize();
            proxy.set(own.slice(0, &Part(8080, vec![pod(1)])));
            let to = SocketAddr::new(own.balancer(), 80);
            for (policy, admitted, expected) in [
                ("Cluster", addresses.node(), true),
                ("Cluster", addresses.client(1), false),
                ("Local", addresses.node(), true),
                ("Local", addresses.client(1), false),
            ] {
                proxy.set(own.service(json!({"spec": {"type": "LoadBalancer",
                        "externalTrafficPolicy": policy,
                        "loadBalancerSourceRanges": [addresses.only(admitted)]},
                    "status": {"loadBalancer": {"ingress": [{"ip": own.balancer()}]}}})));
                for protocol in [Protocol::Tcp, Protocol::Udp] {
                    let answer = net.ask_briefly(From::Node, protocol, to);
                    let what = format!("{mode:?} {protocol} {to} {policy} for {admitted}");
                    let served = matches!(answer, Answer::By(1, ..));
                    assert_eq!(served, expected, "{what}: {answer:?}");
                    // That is not for others.
                    let stranger = net.ask_briefly(From::Client(2), protocol, to);
                    assert_eq!(stranger, Answer::Silence, "{what}");
                }
            }
            proxy.clear();
        }
    }
}
