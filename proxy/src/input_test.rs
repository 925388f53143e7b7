//! Whatever objects there are: nothing panics, and nothing impossible gets into the rules.

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::{
    DetectLocal, Mode, Objects, Packet, Protocol, ProxyConfig, Snapshot,
    model::Family,
    ruleset::{Action, Unit},
};

/// Addresses as people, tools and attackers write them.
fn address() -> impl Strategy<Value = Value> {
    prop::sample::select(vec![
        "10.96.0.1",
        "10.96.0.2",
        "10.96.0.1",
        "fd00::1",
        "FD00::1",
        "fd00:0:0::2",
        "010.096.0.1",
        "127.0.0.1",
        "::1",
        "169.254.169.254",
        "fe80::1",
        "224.0.0.1",
        "ff02::1",
        "0.0.0.0",
        "::",
        "::ffff:10.0.0.1",
        "255.255.255.255",
        "10.244.0.5",
        "10.244.1.5",
        "fd01::5",
        "192.0.2.1",
        "None",
        "",
        " 10.0.0.1",
        "10.0.0.1/32",
        "not-an-address",
        "1.2.3.4.5",
        "例え",
    ])
    .prop_map(Value::from)
}

fn number() -> impl Strategy<Value = Value> {
    prop::sample::select(vec![
        -1_i64,
        0,
        1,
        80,
        80,
        443,
        8080,
        30_080,
        65_535,
        65_536,
        2_147_483_647,
    ])
    .prop_map(Value::from)
}

fn word() -> impl Strategy<Value = Value> {
    prop::sample::select(vec![
        "TCP",
        "UDP",
        "SCTP",
        "ICMP",
        "",
        "Local",
        "Cluster",
        "ClientIP",
        "None",
        "NodePort",
        "LoadBalancer",
        "ClusterIP",
        "ExternalName",
        "IPv4",
        "IPv6",
        "FQDN",
        "VIP",
        "Proxy",
        "web",
        "\"; flush ruleset; \"",
        "a b\n-A INPUT -j ACCEPT",
        "10.0.0.0/8",
        "0.0.0.0/0",
        "::/0",
        "10.0.0.0/99",
    ])
    .prop_map(Value::from)
}

fn list(of: impl Strategy<Value = Value>) -> impl Strategy<Value = Value> {
    prop::collection::vec(of, 0..4).prop_map(Value::from)
}

prop_compose! {
    fn service()(
        name in prop::sample::select(vec!["a", "b", "c"]),
        kind in word(), ips in list(address()), external in list(address()), vips in list(address()),
        mode in word(), internal in word(), outside in word(), affinity in word(), ranges in list(word()),
        seconds in number(), check in number(),
        ports in prop::collection::vec((word(), word(), number(), number()), 0..4),
    ) -> Value {
        let ports: Vec<Value> = ports
            .into_iter()
            .map(|(name, protocol, port, node)| {
                json!({"name": name, "protocol": protocol, "port": port, "nodePort": node})
            })
            .collect();
        let ingress: Vec<Value> = vips
            .as_array()
            .into_iter()
            .flatten()
            .map(|ip| json!({"ip": ip, "ipMode": mode}))
            .collect();
        json!({
            "metadata": {"name": name, "namespace": "d"},
            "spec": {"type": kind, "clusterIP": ips.get(0).cloned().unwrap_or_default(), "clusterIPs": ips,
                "externalIPs": external, "internalTrafficPolicy": internal, "externalTrafficPolicy": outside,
                "sessionAffinity": affinity, "loadBalancerSourceRanges": ranges, "healthCheckNodePort": check,
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}}, "ports": ports},
            "status": {"loadBalancer": {"ingress": ingress}},
        })
    }
}

prop_compose! {
    fn slice()(
        name in prop::sample::select(vec!["a-1", "a-2", "b-1", "c-1"]),
        service in prop::sample::select(vec!["a", "b", "c", ""]),
        family in word(),
        ports in prop::collection::vec((word(), word(), number()), 0..3),
        endpoints in prop::collection::vec(
            (list(address()), any::<[Option<bool>; 3]>(), prop::sample::select(vec!["here", "elsewhere"])),
            0..6,
        ),
    ) -> Value {
        let ports: Vec<Value> = ports
            .into_iter()
            .map(|(name, protocol, port)| json!({"name": name, "protocol": protocol, "port": port}))
            .collect();
        let endpoints: Vec<Value> = endpoints
            .into_iter()
            .map(|(addresses, [ready, serving, terminating], node)| {
                json!({"addresses": addresses, "nodeName": node, "conditions":
                    {"ready": ready, "serving": serving, "terminating": terminating}})
            })
            .collect();
        json!({"metadata": {"name": name, "namespace": "d", "labels": {"kubernetes.io/service-name": service}},
            "addressType": family, "ports": ports, "endpoints": endpoints})
    }
}

fn read<K: serde::de::DeserializeOwned>(values: Vec<Value>) -> Vec<K> {
    values.into_iter().map(|value| serde_json::from_value(value).unwrap()).collect()
}

proptest! {
    #[test]
    fn nothing_impossible_gets_into_the_rules(
        services in prop::collection::vec(service(), 0..4),
        slices in prop::collection::vec(slice(), 0..5),
    ) {
        let objects = Objects { services: read(services), slices: read(slices), node: None };
        for mode in [Mode::Nftables, Mode::Iptables, Mode::Userspace] {
            let config = ProxyConfig {
                mode,
                node_ips: vec!["192.0.2.1".parse().unwrap()],
                detect_local: DetectLocal::Ranges(vec!["10.244.0.0/16".parse().unwrap()]),
                ..ProxyConfig::new("here")
            };
            let (snapshot, _) = Snapshot::new(config, &objects);
            for unit in snapshot.desired.units() {
                let Unit::Frontend(frontend) = unit else { continue };
                prop_assert_ne!(frontend.port, 0);
                prop_assert_eq!(frontend.address.is_some(), frontend.lane.with_address());
                if let Some(address) = frontend.address {
                    prop_assert_eq!(Family::of(address), frontend.family);
                    prop_assert!(!address.is_loopback() && !address.is_multicast());
                }
                if let Some(Action::Forward { endpoints, .. }) = snapshot.desired.action(&frontend) {
                    prop_assert!(!endpoints.is_empty());
                    prop_assert!(endpoints.windows(2).all(|pair| pair[0] < pair[1]));
                    for endpoint in endpoints.iter() {
                        prop_assert_ne!(endpoint.port, 0);
                        prop_assert_eq!(Family::of(endpoint.address), frontend.family);
                    }
                }
                // The question that leads here has this answer.
                let to = frontend.address.unwrap_or_else(|| "192.0.2.1".parse().unwrap());
                let packet = Packet {
                    from: "10.244.0.9".parse().unwrap(),
                    from_pod_here: true,
                    to,
                    port: frontend.port,
                    protocol: Protocol::Tcp,
                };
                let answer = snapshot.explain(&packet);
                prop_assert!(answer.to_string().contains("verdict"));
            }
            let text = snapshot.rules();
            // A port's name may stand in a comment, but never ends a line or its quotes.
            prop_assert!(!text.contains("\n-A INPUT -j ACCEPT"));
            prop_assert!(!text.contains("\"; flush ruleset"), "{}", text);
        }
    }
}
