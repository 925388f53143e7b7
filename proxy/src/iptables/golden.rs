//! Rules as text, against files that were looked at.

use std::net::IpAddr;

use serde_json::{Value, json};

use super::{
    Settings, Variant,
    held::{Held, Next},
    kernel_test::{service, slice, take_in},
    restore::Script,
    service::{Look, Rendered},
};
use crate::{
    config::{DetectLocal, NodePortAddresses},
    model::{Family, table::ServiceTable},
    ruleset::desired::Desired,
};

/// Compares with a file beside this one; `KEELSON_GOLDEN=write cargo test -p keelson-proxy golden`
/// writes them anew.
fn check(name: &str, text: &str) {
    let path = format!("{}/src/iptables/golden/{name}.rules", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("KEELSON_GOLDEN").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(
        text, expected,
        "{path} differs; KEELSON_GOLDEN=write cargo test -p keelson-proxy golden writes it anew"
    );
}

/// What one Service, with its objects, adds to the rules.
fn rendered(settings: &Settings, objects: Vec<Value>, commented: bool) -> String {
    let (mut table, mut desired) = (ServiceTable::default(), Desired::default());
    for object in objects {
        take_in(&mut table, &mut desired, settings.family, object);
    }
    let node: [IpAddr; 2] = [[192, 0, 2, 1].into(), "2001:db8::1".parse().unwrap()];
    let look = Look { settings, node: &node, commented };
    let services = table
        .keys()
        .map(|key| (key.clone(), Some(Rendered::of(key, &table, &desired, look))))
        .collect();
    Script::of(&Held::default().plan(&Next { base: None, services, sweep: false })).text()
}

#[test]
fn services_are_written_as_kube_proxy_writes_them() {
    let ports = json!([{"name": "p80", "port": 80, "nodePort": 30_080}]);
    let node_port =
        |policy: &str| json!({"type": "NodePort", "ports": ports, "externalTrafficPolicy": policy});
    let balanced = |address: &str, range: &str, policy: &str| {
        (
            json!({"type": "LoadBalancer", "ports": ports, "externalTrafficPolicy": policy,
                   "healthCheckNodePort": 30_100, "loadBalancerSourceRanges": [range]}),
            json!({"loadBalancer": {"ingress": [{"ip": address}]}}),
        )
    };
    let here_and_there = [(1, true, true), (2, false, true)];
    let (v4, v6) = (Family::V4, Family::V6);
    type Case<'a> = (&'a str, Family, (Value, Value), &'a [(u8, bool, bool)]);
    let cases: [Case<'_>; 12] = [
        ("cluster-ip", v4, (json!({}), Value::Null), &here_and_there),
        ("cluster-ip-v6", v6, (json!({}), Value::Null), &here_and_there),
        ("node-port", v4, (node_port("Cluster"), Value::Null), &here_and_there),
        ("node-port-local", v4, (node_port("Local"), Value::Null), &here_and_there),
        ("node-port-none-local", v4, (node_port("Local"), Value::Null), &here_and_there[1..]),
        ("load-balancer", v4, balanced("198.51.100.1", "192.0.2.0/24", "Cluster"), &here_and_there),
        (
            "load-balancer-local-v6",
            v6,
            balanced("2001:db8:51::1", "2001:db8:2::/64", "Local"),
            &here_and_there,
        ),
        (
            "internal-local",
            v4,
            (json!({"internalTrafficPolicy": "Local"}), Value::Null),
            &here_and_there[1..],
        ),
        ("affinity", v4, (json!({"sessionAffinity": "ClientIP"}), Value::Null), &here_and_there),
        (
            "no-endpoints",
            v4,
            (
                json!({"type": "NodePort", "ports": ports, "externalIPs": ["198.51.100.2"]}),
                Value::Null,
            ),
            &[],
        ),
        ("no-endpoints-v6", v6, (node_port("Cluster"), Value::Null), &[]),
        (
            "terminating",
            v4,
            (node_port("Local"), Value::Null),
            &[(1, true, false), (2, false, true), (3, false, false)],
        ),
    ];
    for (name, family, (spec, status), endpoints) in cases {
        let objects = vec![service(family, 1, spec, status), slice(family, 1, endpoints)];
        check(name, &rendered(&settings(family), objects, true));
    }
    let objects = vec![service(v4, 1, json!({}), Value::Null), slice(v4, 1, &here_and_there)];
    check("uncommented", &rendered(&settings(v4), objects, false));
}

#[test]
fn what_services_share_follows_the_settings() {
    let cidrs = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    let node: [IpAddr; 3] =
        [[192, 0, 2, 1].into(), "2001:db8::1".parse().unwrap(), [192, 0, 2, 3].into()];
    let cases = [
        ("base-v4", settings(Family::V4)),
        ("base-v6", settings(Family::V6)),
        (
            "base-primary",
            Settings {
                node_port_addresses: NodePortAddresses::Primary,
                tcp_be_liberal: true,
                masquerade_mark: 1 << 31,
                ..settings(Family::V4)
            },
        ),
        (
            "base-ranges",
            Settings {
                node_port_addresses: NodePortAddresses::Ranges(cidrs(&[
                    "192.0.2.7/24",
                    "127.0.0.0/8",
                    "2001:db8::/64",
                ])),
                detect_local: DetectLocal::Ranges(cidrs(&["10.1.0.0/16", "10.2.0.0/16"])),
                localhost_node_ports: false,
                ..settings(Family::V4)
            },
        ),
    ];
    for (name, settings) in cases {
        let base = Some(settings.base(&node, true));
        let delta = Held::default().plan(&Next { base, services: Vec::new(), sweep: false });
        check(name, &Script::of(&delta).text());
    }
}

#[test]
fn pods_are_told_by_what_is_configured() {
    let cidrs = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    let mark = |detect_local, masquerade_all| {
        let settings = Settings { detect_local, masquerade_all, ..settings(Family::V4) };
        let objects = vec![
            service(Family::V4, 1, json!({}), Value::Null),
            slice(Family::V4, 1, &[(1, true, true)]),
        ];
        let text = rendered(&settings, objects, false);
        let mark = text.lines().find(|l| l.contains("-j KUBE-MARK-") && l.contains("--dport"));
        mark.map(|line| line.split_once("-SVC-").unwrap().1[17..].to_owned())
    };
    let to = "-d 10.96.0.1/32";
    let then = "-p tcp -m tcp --dport 80 -j KUBE-MARK-MASQ";
    for (detect_local, all, expected) in [
        (DetectLocal::Nothing, false, None),
        (DetectLocal::Nothing, true, Some(format!("{to} {then}"))),
        (
            DetectLocal::Ranges(cidrs(&["10.1.0.0/16", "fd00::/64"])),
            false,
            Some(format!("! -s 10.1.0.0/16 {to} {then}")),
        ),
        (DetectLocal::Ranges(cidrs(&["fd00::/64"])), false, None),
        (DetectLocal::Ranges(cidrs(&["0.0.0.0/0"])), false, None),
        (
            DetectLocal::Ranges(cidrs(&["10.1.0.0/16", "10.2.0.0/16"])),
            false,
            Some(format!("{to} -p tcp -m tcp --dport 80 -j KUBE-MARK-OUTSIDE")),
        ),
        (DetectLocal::Interface("br0".into()), false, Some(format!("{to} ! -i br0 {then}"))),
        (
            DetectLocal::InterfacePrefix("veth".into()),
            false,
            Some(format!("{to} ! -i veth+ {then}")),
        ),
    ] {
        assert_eq!(mark(detect_local.clone(), all), expected, "{detect_local:?}");
    }
}

pub(super) fn settings(family: Family) -> Settings {
    Settings {
        family,
        variant: Variant::Host,
        detect_local: DetectLocal::Ranges(vec![
            "10.244.0.0/16".parse().unwrap(),
            "fd00:244::/32".parse().unwrap(),
        ]),
        masquerade_all: false,
        masquerade_mark: 0x4000,
        node_port_addresses: NodePortAddresses::Ranges(vec![
            "0.0.0.0/0".parse().unwrap(),
            "::/0".parse().unwrap(),
        ]),
        localhost_node_ports: true,
        tcp_be_liberal: false,
    }
}
