//! Routes and listeners: that they come and go with Services, and nothing stays behind.

use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr, TcpListener},
    time::Duration,
};

use super::{
    fixture::{FAMILIES, Flow, Host, Net, ask, cluster, everywhere, node},
    remove_leftovers,
};
use crate::{
    backend::{Backend, BackendError},
    model::{Family, Protocol},
    netns::Namespace,
    ruleset::{Frontend, Lane, Unit, desired::ServiceRules},
    until::until,
};

/// The addresses of our routes.
fn routes(host: &Namespace, family: Family) -> Vec<IpAddr> {
    let version = if family == Family::V4 { 4 } else { 6 };
    let listed = host.sh(&format!("ip -{version} route show table local proto 75"));
    let address = |line: &str| line.split_whitespace().nth(1)?.parse().ok();
    listed.lines().filter_map(address).collect()
}

fn listeners(host: &Namespace) -> Vec<String> {
    let listed = host.sh("ss -Hlntu");
    listed.lines().filter_map(|l| Some(l.split_whitespace().nth(4)?.to_owned())).collect()
}

#[test]
fn routes_come_and_go_with_services_and_none_stays_behind() {
    for family in FAMILIES {
        let net = Net::new(1);
        net.serve(family, 1);
        let mut host = net.relays(family, everywhere);
        host.set(1, &[1]);
        host.set(2, &[]);
        assert_eq!(routes(&net.host, family), [cluster(family, 1), cluster(family, 2)]);
        assert_eq!(host.synchronize().elements, 0, "nothing to do");
        host.replace(2, None);
        assert_eq!(routes(&net.host, family), [cluster(family, 1)]);
        let first = SocketAddr::new(cluster(family, 1), 80);
        assert!(listeners(&net.host).contains(&first.to_string()));

        // A stop takes all away.
        drop(host);
        assert_eq!(routes(&net.host, family), [] as [IpAddr; 0]);
        assert_eq!(listeners(&net.host), [] as [String; 0]);
    }
}

#[test]
fn what_a_killed_run_left_is_taken_over_or_removed() {
    for family in FAMILIES {
        let net = Net::new(1);
        net.serve(family, 1);
        let left = |n: u8| {
            let address = cluster(family, n);
            net.host.sh(&format!("ip route add local {address} dev lo table local proto 75"));
        };
        left(1);
        left(2);
        // Others' routes are theirs.
        net.host.sh(&format!("ip route add local {} dev lo table local", cluster(family, 9)));
        let mut host = net.relays(family, everywhere);
        assert_eq!(routes(&net.host, family), [] as [IpAddr; 0], "no Service has them");
        host.set(1, &[1]);
        left(3);
        let before = host.synchronize();
        assert_eq!(before.elements, 1, "the stray goes, the other one stays");
        assert_eq!(routes(&net.host, family), [cluster(family, 1)]);
        assert_eq!(ask(&net.client, host.service(1)).unwrap(), 1);
        drop(host);

        left(4);
        net.host.run(move || remove_leftovers(family).unwrap());
        assert_eq!(routes(&net.host, family), [] as [IpAddr; 0]);
        let others = net.host.sh("ip route show table local; ip -6 route show table local");
        assert!(others.contains(&format!("local {} ", cluster(family, 9))), "{others}");
    }
}

#[test]
fn routes_that_others_remove_are_mended() {
    for family in FAMILIES {
        let net = Net::new(1);
        net.serve(family, 1);
        let mut host = net.relays(family, everywhere);
        host.set(1, &[1]);
        net.host.sh(&format!("ip route del local {} dev lo table local", cluster(family, 1)));
        until("it is back", || routes(&net.host, family) == [cluster(family, 1)]);
        let family = family.as_str();
        until("it is counted", || {
            host.metric(&format!(
                "keelson_proxy_relay_lost_routes_total{{ip_family=\"{family}\"}} 1"
            ))
        });
        assert_eq!(ask(&net.client, host.service(1)).unwrap(), 1);
    }
}

#[test]
fn an_address_of_the_node_needs_no_route() {
    let net = Net::new(1);
    net.serve(Family::V4, 1);
    let mut host = net.relays(Family::V4, everywhere);
    let frontend = Frontend::at(node(Family::V4), Protocol::Tcp, 80);
    let frontends = vec![(frontend, host.forward(&[1]))];
    host.replace(1, Some(ServiceRules { frontends, ..ServiceRules::default() }));
    assert_eq!(routes(&net.host, Family::V4), [] as [IpAddr; 0]);
    let to = SocketAddr::new(node(Family::V4), 80);
    assert_eq!(ask(&net.client, to).unwrap(), 1);
    host.replace(1, None);
    assert_eq!(ask(&net.client, to).map_err(|e| e.kind()), Err(ErrorKind::ConnectionRefused));
    assert!(net.host.sh("ip route get 192.0.2.1").contains("local"), "and stays the node's");
}

#[test]
fn node_ports_follow_the_nodes_addresses() {
    for (family, extra) in [(Family::V4, "192.0.2.77"), (Family::V6, "2001:db8:2::77")] {
        let net = Net::new(1);
        net.serve(family, 1);
        let mut host = net.relays(family, everywhere);
        host.set(1, &[1]);
        let on = |address: IpAddr| SocketAddr::new(address, 30_080);
        let extra: IpAddr = extra.parse().unwrap();
        let loopback = super::fixture::either(family, [127, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(ask(&net.client, on(node(family))).unwrap(), 1);
        assert_eq!(ask(&net.host, on(loopback)).unwrap(), 1, "where that is asked for");
        let (length, nodad) = if family == Family::V4 { (24, "") } else { (64, "nodad") };
        net.host.sh(&format!("ip addr add {extra}/{length} dev client {nodad}"));
        until("a new address answers", || ask(&net.client, on(extra)).is_ok());
        net.host.sh(&format!("ip addr del {extra}/{length} dev client"));
        until("its listeners are closed", || {
            !listeners(&net.host).contains(&on(extra).to_string())
        });
        // Cluster addresses are no node's addresses.
        let kind = ask(&net.host, on(cluster(family, 1))).map_err(|error| error.kind());
        assert_eq!(kind, Err(ErrorKind::ConnectionRefused));
    }
}

#[test]
fn a_port_that_is_taken_keeps_no_other_out_and_is_tried_again() {
    let net = Net::new(1);
    net.serve(Family::V4, 1);
    let other = net.host.run(|| TcpListener::bind("0.0.0.0:80").unwrap());
    let mut host = net.relays(Family::V4, everywhere);
    let applied = host.set(1, &[1]);
    let [(unit @ Unit::Frontend(frontend), error @ BackendError::Io { .. })] = &applied.refused[..]
    else {
        panic!("{:?}", applied.refused)
    };
    assert_eq!((frontend.lane, frontend.protocol), (Lane::Address, Protocol::Tcp));
    let text = error.to_string();
    let who = format!("listen on TCP 10.96.0.1:80, which process {} (", std::process::id());
    assert!(text.starts_with(&who) && text.contains("in use") && error.may_pass(), "{text}");
    // The Service's other ports are served.
    assert_eq!(ask(&net.client, SocketAddr::new(node(Family::V4), 30_080)).unwrap(), 1);
    drop(other);
    assert!(host.apply(&[*unit]).refused.is_empty());
    assert_eq!(ask(&net.client, host.service(1)).unwrap(), 1);
}

#[test]
fn listeners_are_bounded_and_sctp_is_refused_for_good() {
    let net = Net::new(1);
    net.serve(Family::V4, 1);
    let mut host = net.relays(Family::V4, |settings| settings.limits.listeners = 5);
    // Two protocols on two addresses each.
    assert!(host.set(1, &[1]).refused.is_empty());
    let refused = host.set(2, &[1]).refused;
    assert_eq!(refused.len(), 3, "{refused:?}");
    assert!(refused[0].1.to_string().contains("there are 5 listeners already"));
    host.replace(1, None);
    let units: Vec<Unit> = refused.iter().map(|(unit, _)| *unit).collect();
    assert!(host.apply(&units).refused.is_empty());

    let rules = |host: &Host| {
        let frontend = Frontend::at(cluster(Family::V4, 3), Protocol::Sctp, 80);
        let frontends = vec![(frontend, host.forward(&[1]))];
        Some(ServiceRules { frontends, ..ServiceRules::default() })
    };
    let rules = rules(&host);
    let [(_, error)] = &host.replace(3, rules).refused[..] else { panic!() };
    assert!(!error.may_pass() && error.to_string().contains("SCTP"), "{error}");
}

#[test]
fn everything_is_taken_away_on_request_and_can_be_brought_back() {
    let net = Net::new(1);
    net.serve(Family::V4, 1);
    let mut host = net.relays(Family::V4, everywhere);
    host.set(1, &[1]);
    assert!(host.relays.units() > 0);
    host.relays.remove().unwrap();
    host.relays.remove().unwrap();
    assert_eq!((host.relays.units(), routes(&net.host, Family::V4).len()), (0, 0));
    host.synchronize();
    assert_eq!(ask(&net.client, host.service(1)).unwrap(), 1);
}

#[test]
fn a_port_that_is_taken_on_a_new_address_is_tried_again() {
    let net = Net::new(1);
    net.serve(Family::V4, 1);
    let mut host = net.relays(Family::V4, |settings| {
        everywhere(settings);
        settings.retry = Duration::from_millis(100);
    });
    host.set(1, &[1]);
    let to: SocketAddr = "192.0.2.77:30080".parse().unwrap();
    net.host.sh("sysctl -qw net.ipv4.ip_nonlocal_bind=1");
    let other = net.host.run(move || TcpListener::bind(to).unwrap());
    net.host.sh("ip addr add 192.0.2.77/24 dev client");
    // Datagrams are nobody else's there.
    until("what can be served is", || Flow::new(&net.client, to).ask() == Some(1));
    drop(other);
    until("so is the rest once it is free", || ask(&net.client, to).is_ok());
}
