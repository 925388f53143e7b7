use serde_json::{Value, json};

use super::*;
use crate::{ProxyConfig, nftables::sources::SourcesId, snapshot::Objects};

fn snapshot(config: ProxyConfig) -> Snapshot {
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
    let objects = Objects {
        services: services.map(|s| serde_json::from_value(read(s)).unwrap()).to_vec(),
        slices: slices.map(|s| serde_json::from_value(read(s)).unwrap()).to_vec(),
        service_cidrs: vec![serde_json::from_value(ranges).unwrap()],
        node: Some(serde_json::from_value(node).unwrap()),
    };
    let (snapshot, refusals) = Snapshot::new(config, &objects);
    assert_eq!(refusals, []);
    snapshot
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
        (NODE, "10.96.0.1", 80, Forwarded, web, Some(false), &["10.244.1.1:8080"]),
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
        host.run(move || {
            let config = ProxyConfig { mode, families: vec![Family::V4], ..config() };
            let snapshot = snapshot(config);
            let mut chosen = crate::start::choose(&snapshot.config).unwrap();
            assert_eq!(chosen.mode, mode);
            chosen.backends[0].synchronize(snapshot.goal()).unwrap();
        });
        assert_eq!(host.run(ask), [""; 0], "{mode:?}");
        host.sh(edit);
        assert_ne!(host.run(ask), [""; 0], "{mode:?}: after {edit}");
    }
}
