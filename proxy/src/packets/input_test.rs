//! What bad objects come to: the documented choice or an event on the Service, and nobody else is
//! harmed.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
};

use serde_json::{Value, json};

use super::{
    cluster::{Api, Running},
    features::{Own, Part},
    fixture::{Addresses, Answer, From, Net, ON_NODE, listed},
    load_test::start,
};
use crate::{
    Mode,
    model::{Family, Protocol},
    netns::Namespace,
    until::until,
};

everywhere!(
    bad_objects_are_told_of_and_harm_nobody,
    of_two_services_the_older_is_served_and_the_other_takes_over,
);

/// Other objects than the API server would make, and what comes of them.
struct Row {
    what: &'static str,
    objects: Vec<Value>,
    /// Words of events on the Service, by reason.
    told: Vec<(&'static str, &'static str)>,
    /// Which pod answers at the Service's cluster address and port 80.
    answers: Option<u8>,
}

/// A port of a Service and its target, TCP only.
const PORTS: &str = "t";

fn own(family: Family, n: u8) -> Own {
    Own { addresses: Addresses(family), n }
}

fn service(own: Own, spec: Value) -> Value {
    let mut row = json!({"spec": {"ports": [{"name": PORTS, "port": 80}]}});
    for (field, value) in spec.as_object().unwrap() {
        row["spec"][field] = value.clone();
    }
    own.service(row)
}

fn slice(own: Own, addresses: &[String]) -> Value {
    let mut object = own.slice(0, &Part(8080, vec![]));
    object["ports"] = json!([{"name": PORTS, "port": 8080}]);
    object["endpoints"] = addresses.iter().map(|a| json!({"addresses": [a]})).collect();
    object
}

fn rows(family: Family) -> Vec<Row> {
    let a = Addresses(family);
    let (v4, n) = (family == Family::V4, |n| own(family, n));
    let pod_address = |n| a.pod(n).to_string();
    let either = |four: &str, six: &str| if v4 { four.to_owned() } else { six.to_owned() };
    let nobodys = [
        ("127.0.0.1", "::1"),
        ("169.254.7.7", "fe80::7"),
        ("224.0.0.7", "ff02::7"),
        ("0.0.0.0", "::"),
        ("::1", "10.0.0.7"),
    ]
    .map(|(four, six)| either(four, six))
    .into_iter()
    .chain([pod_address(1)]);
    let odd_ways = ["::ffff:10.244.9.9", "fe80::7%eth0", "010.244.009.009", "10.244.9.9/32", "web"]
        .map(str::to_owned)
        .into_iter()
        .chain([pod_address(2)]);
    let odd_name = "\"; flush ruleset; \"\n-A INPUT -j ACCEPT";
    let mut named = slice(n(6), &[pod_address(2)]);
    named["ports"][0]["name"] = odd_name.into();
    named["metadata"]["name"] = odd_name.into();
    let mut zero = slice(n(4), &[pod_address(1)]);
    zero["ports"].as_array_mut().unwrap().push(json!({"name": "z", "port": 0}));
    let written = match a.cluster(8) {
        IpAddr::V4(_) => "10.96.0.8".to_owned(),
        IpAddr::V6(_) => "FD00:0096:0:0:0:0:0:0008".to_owned(),
    };
    let mut flood = slice(n(12), &vec![pod_address(2); 3_000]);
    flood["metadata"]["name"] = "flood".into();
    vec![
        Row {
            what: "endpoints where nobody can be",
            objects: vec![service(n(2), json!({})), slice(n(2), &nobodys.collect::<Vec<_>>())],
            told: vec![
                ("InvalidEndpointSlice", "5 endpoints of slice 2-0 are left out"),
                ("InvalidEndpointSlice", "it is a loopback address"),
                ("InvalidEndpointSlice", "it is a link-local address"),
                ("InvalidEndpointSlice", "it is a multicast address"),
            ],
            answers: Some(1),
        },
        Row {
            what: "the node's own address, as of pods in its network",
            objects: vec![service(n(3), json!({})), slice(n(3), &[a.node().to_string()])],
            told: vec![],
            answers: Some(ON_NODE),
        },
        Row {
            what: "ports that are none",
            objects: vec![
                service(
                    n(4),
                    json!({"ports": [
                    {"name": PORTS, "port": 80}, {"name": "z", "port": 0}, {"name": "y", "port": 70_000},
                    {"name": "x", "port": 81, "protocol": "ICMP"}]}),
                ),
                zero,
            ],
            told: vec![
                ("InvalidPort", "port 0 \"z\" is not served"),
                ("InvalidPort", "port 70000 \"y\" is not served"),
                ("InvalidPort", "protocol \"ICMP\" is not known"),
                ("InvalidEndpointSlice", "port 0 of slice 4-0 is not a port number"),
            ],
            answers: Some(1),
        },
        Row {
            what: "names that need escaping",
            objects: vec![service(n(6), json!({"ports": [{"name": odd_name, "port": 80}]})), named],
            told: vec![],
            answers: Some(2),
        },
        Row {
            what: "endpoints that are written in other ways",
            objects: vec![service(n(7), json!({})), slice(n(7), &odd_ways.collect::<Vec<_>>())],
            told: vec![
                ("InvalidEndpointSlice", "it is an IPv4 address in IPv6 form"),
                ("InvalidEndpointSlice", "it has a zone"),
                ("InvalidEndpointSlice", "its numbers have leading zeros"),
            ],
            answers: Some(2),
        },
        Row {
            what: "a cluster address that is written in another way, and an impossible second one",
            objects: vec![
                service(
                    n(8),
                    json!({"clusterIP": written, "clusterIPs": [written, "010.096.000.008"]}),
                ),
                slice(n(8), &[pod_address(1)]),
            ],
            told: vec![("InvalidClusterIP", "its numbers have leading zeros")],
            answers: Some(1),
        },
        Row {
            what: "families that its addresses are not of",
            objects: vec![
                service(
                    n(9),
                    json!({
                        "clusterIPs": [a.cluster(9)], "ipFamilies": [either("IPv6", "IPv4")],
                        "externalIPs": [either("2001:db8::99", "198.51.100.99"), either("127.0.0.9", "::1")],
                        "type": "LoadBalancer", "loadBalancerSourceRanges": ["10.0.0.0/99", "0.0.0.0/0", "::/0"],
                    }),
                ),
                slice(n(9), &[pod_address(2)]),
            ],
            told: vec![
                ("KubeProxyIncorrectIPVersion", "in ipFamilies; it is served as what it is"),
                ("KubeProxyIncorrectIPVersion", "the Service has no cluster address of its family"),
                ("InvalidExternalIP", "it is a loopback address"),
                ("InvalidSourceRange", "\"10.0.0.0/99\", which is not a range"),
            ],
            answers: Some(2),
        },
        Row {
            what: "two addresses of one family",
            objects: vec![
                service(n(10), json!({"clusterIPs": [a.cluster(10), a.cluster(110)]})),
                slice(n(10), &[pod_address(1)]),
            ],
            told: vec![("InvalidClusterIP", "it is the second one of its family")],
            answers: Some(1),
        },
        Row {
            what: "a Service that is its own endpoint",
            objects: vec![service(n(11), json!({})), {
                let mut slice = slice(n(11), &[a.cluster(11).to_string()]);
                slice["ports"][0]["port"] = 80.into();
                slice
            }],
            told: vec![],
            answers: None,
        },
        Row {
            what: "a slice that is too large",
            objects: vec![service(n(12), json!({})), flood],
            told: vec![("InvalidEndpointSlice", "has 3000 endpoints; those after the first 1000")],
            answers: Some(2),
        },
    ]
}

fn told(api: &Api, service: &str, reason: &str, words: &str) {
    until(&format!("an event on Service {service}: {reason}: {words}"), || {
        api.told(service).iter().any(|(r, message)| r == reason && message.contains(words))
    });
}

fn ask(net: &Net, to: IpAddr, port: u16) -> Answer {
    net.ask_briefly(From::Client(1), Protocol::Tcp, SocketAddr::new(to, port))
}

fn by(answer: Answer) -> Option<u8> {
    match answer {
        Answer::By(pod, _, _) => Some(pod),
        _ => None,
    }
}

/// Nothing was refused, and the distribution's tools print what is there.
fn whole(net: &Net, running: &Running, mode: Mode, family: Family) {
    for counter in [
        "kubeproxy_sync_proxy_rules_nftables_sync_failures_total",
        "kubeproxy_sync_proxy_rules_iptables_restore_failures_total",
        "kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total",
    ] {
        assert_eq!(running.count(counter), 0, "{counter}");
    }
    let rules = listed(net, mode, family);
    let address = Addresses(family).cluster(1).to_string();
    assert!(rules.contains(&address), "{rules}");
    assert!(
        !rules.contains("ACCEPT\n-A INPUT")
            && !net.host.sh("iptables -S INPUT").contains("-j ACCEPT")
    );
}

fn bad_objects_are_told_of_and_harm_nobody(mode: Mode, family: Family) {
    let (net, api) = (Net::new(), Api::new());
    let healthy = own(family, 1);
    api.set(service(healthy, json!({})));
    api.set(slice(healthy, &[Addresses(family).pod(3).to_string()]));
    let rows = rows(family);
    let (first, later) = rows.split_at(rows.len() / 2);
    first.iter().flat_map(|row| &row.objects).for_each(|object| api.set(object.clone()));
    let running = start(&net, &api, mode, family);
    later.iter().flat_map(|row| &row.objects).for_each(|object| api.set(object.clone()));
    for row in &rows {
        let name = row.objects[0]["metadata"]["name"].as_str().unwrap();
        for (reason, words) in &row.told {
            told(&api, name, reason, words);
        }
        let to = Addresses(family).cluster(name.parse().unwrap());
        if row.answers.is_some() {
            until(row.what, || by(ask(&net, to, 80)) == row.answers);
        } else {
            assert_eq!(by(ask(&net, to, 80)), None, "{}", row.what);
        }
        if row.told.is_empty() {
            assert_eq!(api.told(name), [], "{}", row.what);
        }
        assert_eq!(by(ask(&net, healthy.cluster(), 80)), Some(3), "after {}", row.what);
    }
    whole(&net, &running, mode, family);
    running.stop();
}

fn of_two_services_the_older_is_served_and_the_other_takes_over(mode: Mode, family: Family) {
    let (net, api) = (Net::new(), Api::new());
    let a = Addresses(family);
    let healthy = own(family, 1);
    // The younger has the name that is listed first, or comes before the older is there.
    let (older, younger) = (own(family, 31), own(family, 20));
    let want = |own: Own, created: &str| {
        let mut object = service(
            own,
            json!({
                "clusterIP": a.cluster(40), "type": "LoadBalancer", "externalIPs": [a.external(40)],
                "ports": [{"name": PORTS, "port": 80, "nodePort": 30_040}],
            }),
        );
        object["metadata"]["creationTimestamp"] = created.into();
        object
    };
    let check = |own: Own, created: &str| {
        let mut object = service(
            own,
            json!({
                "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 30_041,
            }),
        );
        object["metadata"]["creationTimestamp"] = created.into();
        object
    };
    api.set(service(healthy, json!({})));
    api.set(slice(healthy, &[a.pod(3).to_string()]));
    api.set(want(younger, "2026-02-02T00:00:00Z"));
    api.set(slice(younger, &[a.pod(2).to_string()]));
    api.set(check(own(family, 50), "2026-02-02T00:00:00Z"));
    let running = start(&net, &api, mode, family);
    let places = [(a.cluster(40), 80), (a.external(40), 80), (a.node(), 30_040)];
    let served = |n: u8| {
        for (to, port) in places {
            until(&format!("{to} port {port} is served by {n}"), || {
                by(ask(&net, to, port)) == Some(n)
            });
        }
    };
    served(2);

    api.set(want(older, "2026-01-01T00:00:00Z"));
    api.set(slice(older, &[a.pod(1).to_string()]));
    api.set(check(own(family, 51), "2026-01-01T00:00:00Z"));
    served(1);
    for (to, port) in [(a.cluster(40), 80), (a.external(40), 80)] {
        let words = format!("{} is that of the older Service d/31", SocketAddr::new(to, port));
        told(&api, "20", "PortConflict", &words);
    }
    told(&api, "20", "PortConflict", "node port 30040");
    told(
        &api,
        "50",
        "PortConflict",
        "health check node port 30041 is that of the older Service d/51",
    );
    assert_eq!(api.told("31"), []);
    until("the older Service's health check", || {
        health_check(&net.host, a.node()).contains("\"51\"")
    });

    // What becomes of the loser meanwhile changes nothing, and is no news.
    let before = api.told("20").len();
    api.set(slice(younger, &[a.pod(4).to_string()]));
    api.set(slice(healthy, &[a.pod(2).to_string()]));
    until("the change is in force", || by(ask(&net, healthy.cluster(), 80)) == Some(2));
    served(1);
    assert_eq!(api.told("20").len(), before, "{:?}", api.told("20"));

    api.remove("Service", "31");
    api.remove("Service", "51");
    served(4);
    until("the other's health check", || health_check(&net.host, a.node()).contains("\"50\""));
    whole(&net, &running, mode, family);
    running.stop();
}

/// What a health-check node port says.
fn health_check(host: &Namespace, node: IpAddr) -> String {
    host.run(move || {
        let mut text = String::new();
        if let Ok(mut stream) = TcpStream::connect((node, 30_041)) {
            let _ = stream.write_all(b"GET / HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n");
            let _ = stream.read_to_string(&mut text);
        }
        text
    })
}
