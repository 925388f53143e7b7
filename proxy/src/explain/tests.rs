use k8s_openapi::api::core::v1::Service as ApiService;
use serde_json::{Value, json};

use super::*;
use crate::{ProxyConfig, nftables::sources::SourcesId, snapshot::Objects};

fn snapshot(config: ProxyConfig) -> Snapshot {
    let (snapshot, refusals) = Snapshot::new(config, &objects());
    assert_eq!(refusals, []);
    snapshot
}

fn objects() -> Objects {
    let read = |value: Value| value;
    let service = |name: &str, spec: Value| json!({"metadata": {"name": name, "namespace": "d"}, "spec": spec});
    let slice = |service: &str, endpoints: Value| {
        json!({"metadata": {"name": format!("{service}-1"), "namespace": "d",
                "labels": {"kubernetes.io/service-name": service}},
            "addressType": "IPv4", "ports": [{"port": 8080}], "endpoints": endpoints})
    };
    let balanced = {
        let mut service = service(
            "lb",
            json!({"clusterIP": "10.96.0.2", "type": "LoadBalancer",
            "externalTrafficPolicy": "Local", "sessionAffinity": "ClientIP",
            "loadBalancerSourceRanges": ["203.0.113.0/24"],
            "ports": [{"port": 80, "nodePort": 30080}]}),
        );
        service["status"] = json!({"loadBalancer": {"ingress": [{"ip": "198.51.100.9"}]}});
        service
    };
    let services = [
        service("web", json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]})),
        balanced,
        service(
            "local",
            json!({"clusterIP": "10.96.0.3", "internalTrafficPolicy": "Local",
            "ports": [{"port": 80}]}),
        ),
        service("empty", json!({"clusterIP": "10.96.0.4", "ports": [{"port": 80}]})),
    ];
    let slices = [
        slice(
            "web",
            json!([
            {"addresses": ["10.244.1.1"], "hints": {"forZones": [{"name": "a"}]}},
            {"addresses": ["10.244.2.1"], "hints": {"forZones": [{"name": "b"}]}},
            {"addresses": ["10.244.2.2"], "conditions": {"ready": false}},
            {"addresses": ["10.244.2.3"],
             "conditions": {"ready": false, "serving": true, "terminating": true}}]),
        ),
        slice(
            "lb",
            json!([{"addresses": ["10.244.1.2"], "nodeName": "here"},
                          {"addresses": ["10.244.2.2"], "nodeName": "elsewhere"}]),
        ),
        slice("local", json!([{"addresses": ["10.244.2.2"], "nodeName": "elsewhere"}])),
    ];
    let node = json!({"metadata": {"name": "here", "labels": {"topology.kubernetes.io/zone": "a"}},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}});
    let ranges = json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16"]}});
    Objects {
        services: services.map(|s| serde_json::from_value(read(s)).unwrap()).to_vec(),
        slices: slices.map(|s| serde_json::from_value(read(s)).unwrap()).to_vec(),
        service_cidrs: vec![serde_json::from_value(ranges).unwrap()],
        node: Some(serde_json::from_value(node).unwrap()),
    }
}

fn config() -> ProxyConfig {
    ProxyConfig {
        detect_local: DetectLocal::Ranges(vec!["10.244.0.0/16".parse().unwrap()]),
        ..ProxyConfig::new("here")
    }
}

fn packet(from: &str, to: &str, port: u16) -> Packet {
    Packet {
        from: from.parse().unwrap(),
        from_pod_here: false,
        to: to.parse().unwrap(),
        port,
        protocol: Protocol::Tcp,
    }
}

const POD: &str = "10.244.1.7";
const NODE: &str = "192.0.2.1";
const OUTSIDE: &str = "203.0.113.5";

#[test]
fn a_packet_is_followed_as_the_rules_lead_it() {
    use Verdict::{Dropped, Forwarded, NotServices, Rejected};
    type Case<'a> = (&'a str, &'a str, u16, Verdict, Option<&'a str>, Option<bool>, &'a [&'a str]);
    let (web, lb) = (Some("d/web"), Some("d/lb"));
    let table: &[Case<'_>] = &[
        (POD, "10.96.0.1", 80, Forwarded, web, Some(false), &["10.244.1.1:8080"]),
        (NODE, "10.96.0.1", 80, Forwarded, web, Some(true), &["10.244.1.1:8080"]),
        (OUTSIDE, "10.96.0.1", 80, Forwarded, web, Some(true), &["10.244.1.1:8080"]),
        (POD, "10.96.0.1", 81, Rejected, None, None, &[]),
        (POD, "10.96.9.9", 80, Dropped, None, None, &[]),
        (NODE, "10.96.9.9", 80, Dropped, None, None, &[]),
        (POD, "10.97.9.9", 80, NotServices, None, None, &[]),
        (OUTSIDE, "198.51.100.9", 80, Forwarded, lb, Some(false), &["10.244.1.2:8080"]),
        ("192.0.2.200", "198.51.100.9", 80, Dropped, lb, None, &[]),
        (OUTSIDE, NODE, 30080, Forwarded, lb, Some(false), &["10.244.1.2:8080"]),
        (POD, NODE, 30080, Forwarded, lb, Some(false), &["10.244.1.2:8080", "10.244.2.2:8080"]),
        (POD, "198.51.100.9", 80, Dropped, lb, None, &[]),
        (NODE, "127.0.0.1", 30080, NotServices, None, None, &[]),
        (POD, "10.96.0.3", 80, Dropped, Some("d/local"), None, &[]),
        (POD, "10.96.0.4", 80, Rejected, Some("d/empty"), None, &[]),
        (POD, "fd00::1", 80, NotServices, None, None, &[]),
    ];
    let snapshot = snapshot(config());
    for (from, to, port, verdict, service, masquerade, eligible) in table {
        let answer = snapshot.explain(&packet(from, to, *port));
        let found: Vec<&str> =
            answer.endpoints.iter().filter(|e| e.eligible).map(|e| &*e.endpoint).collect();
        assert_eq!(
            (answer.verdict, answer.service.as_deref(), answer.masquerade.map(|m| m.0), &found[..]),
            (*verdict, *service, *masquerade, *eligible),
            "{answer}"
        );
    }
}

#[test]
fn each_endpoint_has_its_reason() {
    let snapshot = snapshot(config());
    let why =
        |answer: &Explanation| -> Vec<&str> { answer.endpoints.iter().map(|e| e.why).collect() };
    let answer = snapshot.explain(&packet(POD, "10.96.0.1", 80));
    assert_eq!(
        why(&answer),
        [
            "ready, and its hints name this zone",
            "its hints name other zones",
            "not ready",
            "it terminates, and others are ready",
        ]
    );
    let answer = snapshot.explain(&packet(OUTSIDE, "198.51.100.9", 80));
    assert_eq!(
        why(&answer),
        ["ready, and on this node", "on another node, and the traffic policy is Local"]
    );
    assert_eq!(answer.affinity_seconds, Some(10_800));
    assert_eq!(answer.reached_as, Some("load balancer address"));
    assert!(answer.rules.iter().any(|r| r.contains("sticky-external-local-1")), "{answer}");
    let list = answer.rules[0].rsplit_once("goto ").unwrap().1;
    assert!(SourcesId::parse(list).is_some(), "{answer}");
    assert!(snapshot.rules().contains(list), "the list has that name in the kernel");
    let stranger = snapshot.explain(&packet("192.0.2.200", "198.51.100.9", 80));
    let drops = format!("chain {list}: drops who isn't in the set {list}");
    assert_eq!(stranger.rules.last(), Some(&drops), "{stranger}");
}

#[test]
fn what_a_mode_does_otherwise_is_told() {
    use Verdict::{Dropped, NotServices, Rejected};
    for (mode, unused, none_here) in [
        (Mode::Nftables, Rejected, Dropped),
        (Mode::Iptables, NotServices, Dropped),
        (Mode::Userspace, Rejected, Rejected),
    ] {
        let snapshot = snapshot(ProxyConfig { mode, ..config() });
        let verdict = |to, port| snapshot.explain(&packet(POD, to, port)).verdict;
        assert_eq!((verdict("10.96.0.1", 81), verdict("10.96.0.3", 80)), (unused, none_here));
    }
    // Other addresses of the node are known to the node only.
    let ranges = NodePortAddresses::Ranges(vec!["0.0.0.0/0".parse().unwrap()]);
    let snapshot = snapshot(ProxyConfig { node_port_addresses: ranges, ..config() });
    let to_other = packet(OUTSIDE, "203.0.113.1", 30080);
    assert_eq!(snapshot.explain(&to_other).verdict, NotServices);
    let known = snapshot.with_local_addresses(vec!["203.0.113.1".parse().unwrap()]);
    assert_eq!(known.explain(&to_other).verdict, Verdict::Forwarded);
    // A client that is its own endpoint.
    let own = known.explain(&packet("10.244.1.1", "10.96.0.1", 80));
    assert_eq!(own.masquerade, Some((true, "the endpoint is its own client")));
}

#[test]
fn rules_are_named_as_the_mode_has_them() {
    for (mode, expected) in [
        (Mode::Nftables, "map services: 10.96.0.1 . tcp . 80 → goto endpoints-1"),
        (Mode::Iptables, "KUBE-SVC-"),
        (Mode::Userspace, "listener at"),
    ] {
        let snapshot = snapshot(ProxyConfig { mode, ..config() });
        let answer = snapshot.explain(&packet(POD, "10.96.0.1", 80));
        assert!(answer.rules.iter().any(|rule| rule.contains(expected)), "{answer}");
        assert!(snapshot.rules().contains("10.96.0.1"), "{mode:?}");
    }
}

/// Puts the rules for all objects into the kernel.
fn in_force(host: &crate::netns::Namespace, mode: Mode) {
    host.run(move || {
        let snapshot = snapshot(ProxyConfig { mode, families: vec![Family::V4], ..config() });
        let mut chosen = crate::start::choose(&snapshot.config).unwrap();
        assert_eq!(chosen.mode, mode);
        chosen.backends[0].synchronize(snapshot.goal()).unwrap();
    });
}

#[test]
fn the_kernel_is_asked_and_differences_are_told() {
    for (mode, edit) in [
        (Mode::Nftables, "nft flush map ip keelson-proxy endpoints"),
        (Mode::Iptables, "iptables -t nat -F"),
    ] {
        let host = crate::netns::Namespace::new();
        host.sh("ip addr add 192.0.2.1/32 dev lo");
        let ask = move || {
            let config = ProxyConfig { mode, families: vec![Family::V4], ..config() };
            let snapshot = snapshot(config);
            let mut answer = snapshot.explain(&packet(POD, "10.96.0.1", 80));
            snapshot.check(&mut answer).unwrap();
            answer.kernel.unwrap()
        };
        assert_ne!(host.run(ask), [""; 0], "{mode:?}: nothing is there yet");
        in_force(&host, mode);
        assert_eq!(host.run(ask), [""; 0], "{mode:?}");
        host.sh(edit);
        assert_ne!(host.run(ask), [""; 0], "{mode:?}: after {edit}");
    }
}

#[test]
fn what_the_kernel_has_of_services_that_are_gone_is_told() {
    for mode in [Mode::Nftables, Mode::Iptables] {
        let host = crate::netns::Namespace::new();
        host.sh("ip addr add 192.0.2.1/32 dev lo");
        in_force(&host, mode);
        let ask =
            |from: &'static str, to: &'static str, port: u16, gone: &'static [&'static str]| {
                let answer = host.run(move || {
                    let mut objects = objects();
                    let stays = |name: &Option<String>| !gone.contains(&name.as_deref().unwrap());
                    objects.services.retain(|service| stays(&service.metadata.name));
                    let config = ProxyConfig { mode, families: vec![Family::V4], ..config() };
                    let (snapshot, _) = Snapshot::new(config, &objects);
                    let mut answer = snapshot.explain(&packet(from, to, port));
                    snapshot.check(&mut answer).unwrap();
                    answer
                });
                (answer.verdict, answer.kernel.unwrap())
            };
        let rule = |element: &'static str, line: &'static str| match mode {
            Mode::Nftables => element,
            _ => line,
        };
        for (from, to, port, name, expected) in [
            (
                POD,
                "10.96.0.1",
                80,
                "web",
                rule("map services has", "KUBE-SERVICES -d 10.96.0.1/32"),
            ),
            (OUTSIDE, NODE, 30080, "lb", rule("map nodeports has", "-A KUBE-NODEPORTS -p tcp")),
            (OUTSIDE, "198.51.100.9", 80, "lb", rule("map services has", "-d 198.51.100.9/32")),
            (POD, "10.96.0.4", 80, "empty", rule("10.96.0.4 . tcp . 80", "-d 10.96.0.4/32")),
        ] {
            let what = format!("{mode:?} {to}:{port}");
            let gone: &'static [&'static str] = Box::leak(Box::new([name]));
            let (verdict, found) = ask(from, to, port, gone);
            assert!(matches!(verdict, Verdict::Dropped | Verdict::NotServices), "{what}");
            let shown = found.iter().any(|line| line.contains(expected) && line.contains("wants"));
            assert!(shown, "{what}: {found:?}");
            assert_eq!(ask(from, to, port, &[]).1, [""; 0], "{what}: nothing is gone");
            // What others had is not this packet's matter.
            assert_eq!(ask(from, "10.96.0.3", 80, gone).1, [""; 0], "{what}");
        }
    }
}

#[test]
fn the_node_is_hidden_unless_it_is_among_the_pods() {
    let ranges = |range: &str| DetectLocal::Ranges(vec![range.parse().unwrap()]);
    for mode in [Mode::Nftables, Mode::Iptables] {
        for (detect_local, cluster, node_port) in [
            (ranges("10.244.0.0/16"), true, true),
            (ranges("192.0.0.0/8"), false, false),
            // A range of the other family tells nothing.
            (ranges("fd00::/64"), false, true),
            (DetectLocal::Nothing, false, true),
            (DetectLocal::Interface("br0".into()), true, true),
            (DetectLocal::InterfacePrefix("veth".into()), true, true),
        ] {
            let config = ProxyConfig { mode, detect_local: detect_local.clone(), ..config() };
            let snapshot = snapshot(config);
            let hidden = |to, port| {
                let answer = snapshot.explain(&packet(NODE, to, port));
                assert_eq!(answer.origin, Origin::Node);
                answer.masquerade.unwrap().0
            };
            let found = (hidden("10.96.0.1", 80), hidden(NODE, 30080));
            assert_eq!(found, (cluster, node_port), "{mode:?} {detect_local:?}");
        }
    }
    // It is about cluster addresses.
    let all = snapshot(ProxyConfig { masquerade_all: true, ..config() });
    let masquerade = |to, port| all.explain(&packet(POD, to, port)).masquerade.unwrap().0;
    assert_eq!((masquerade("10.96.0.1", 80), masquerade(NODE, 30080)), (true, false));
}

#[test]
fn what_a_service_has_and_nobody_serves_says_why() {
    use Verdict::{Answered, Dropped, NotServices};
    let mut objects = objects();
    let read = |value: Value| serde_json::from_value::<ApiService>(value).unwrap();
    objects.services.push(read(json!({
        "metadata": {"name": "theirs", "namespace": "d",
                     "labels": {"service.kubernetes.io/service-proxy-name": "mesh"}},
        "spec": {"type": "NodePort", "clusterIP": "10.96.0.7", "externalIPs": ["198.51.100.7"],
                 "ports": [{"port": 80, "nodePort": 30090}]}})));
    objects.services.push(read(json!({
        "metadata": {"name": "by-proxy", "namespace": "d",
                     "creationTimestamp": "2020-01-01T00:00:00Z"},
        "spec": {"type": "LoadBalancer", "clusterIP": "10.96.0.8", "externalTrafficPolicy": "Local",
                 "healthCheckNodePort": 32000, "ports": [{"port": 80, "nodePort": 30091}]},
        "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.8", "ipMode": "Proxy"}]}}})));
    for name in ["a-younger", "z-younger"] {
        let mut younger = objects.services.last().unwrap().clone();
        younger.metadata = read(json!({"metadata": {"name": name, "namespace": "d"}})).metadata;
        (younger.status, younger.spec.as_mut().unwrap().ports) = (None, None);
        objects.services.insert(0, younger);
    }
    let everywhere = || NodePortAddresses::Ranges(vec!["0.0.0.0/0".parse().unwrap()]);
    let ranges = NodePortAddresses::Ranges(vec!["203.0.113.0/24".parse().unwrap()]);
    let nowhere = ProxyConfig { node_port_addresses: ranges, ..config() };
    let all = ProxyConfig { node_port_addresses: everywhere(), ..config() };
    let iptables = ProxyConfig { mode: Mode::Iptables, ..all.clone() };
    let iptables = ProxyConfig { localhost_node_ports: false, ..iptables };
    for (config, to, port, verdict, expected) in [
        (&all, "127.0.0.1", 30080, NotServices, "the nftables mode serves none on loopback"),
        (&iptables, "127.0.0.1", 30080, NotServices, "on loopback (localhostNodePorts)"),
        (&nowhere, NODE, 30080, NotServices, "at 192.0.2.1 (nodePortAddresses)"),
        (&all, "192.0.2.77", 30080, NotServices, "not known to be an address of this node"),
        (&all, "198.51.100.8", 80, NotServices, "d/by-proxy with ipMode: Proxy"),
        (&all, "198.51.100.7", 80, NotServices, "the Service d/theirs's, whose label"),
        (&all, NODE, 30090, NotServices, "service-proxy-name: mesh"),
        (&all, "10.96.0.7", 80, Dropped, "service-proxy-name: mesh"),
        (&all, NODE, 32000, Answered, "none of the Service's endpoints on this node is ready"),
        (&nowhere, NODE, 32000, NotServices, "no Service has this address and port"),
        (&all, NODE, 32001, NotServices, "no Service has this address and port"),
    ] {
        let (snapshot, _) = Snapshot::new(config.clone(), &objects);
        let answer = snapshot.explain(&packet(OUTSIDE, to, port));
        assert_eq!(answer.verdict, verdict, "{answer}");
        assert!(answer.reason.contains(expected), "{to}:{port}: {answer}");
        let asked = (verdict == Answered).then_some("d/by-proxy");
        assert_eq!(answer.service.as_deref(), asked, "the older has the port");
    }
}

#[test]
fn hints_that_dont_decide_are_told() {
    let hint = |zone: &str| json!({"forZones": [{"name": zone}]});
    for (first, second, expected) in [
        (
            Some("a"),
            None,
            [
                "ready; its hints are ignored, as another ready endpoint has none",
                "ready; it has no hints, so those of the others are ignored",
            ],
        ),
        (Some("b"), Some("c"), ["ready; hints are ignored, as none of them is for here"; 2]),
        (None, None, ["ready"; 2]),
    ] {
        let mut objects = objects();
        let endpoint = |address: &str, zone: Option<&str>| {
            let mut endpoint = json!({"addresses": [address]});
            zone.into_iter().for_each(|zone| endpoint["hints"] = hint(zone));
            serde_json::from_value(endpoint).unwrap()
        };
        let both = vec![endpoint("10.244.1.1", first), endpoint("10.244.2.1", second)];
        objects.slices[0].endpoints = Some(both);
        let (snapshot, _) = Snapshot::new(config(), &objects);
        let answer = snapshot.explain(&packet(POD, "10.96.0.1", 80));
        let why: Vec<&str> = answer.endpoints.iter().map(|endpoint| endpoint.why).collect();
        assert_eq!(why, expected);
    }
}
