use serde_json::{Value, json};

use super::*;

fn zone() -> Zone {
    let mut zone = Zone::new("cluster.local.");
    zone.set_namespace("d", true);
    let service = |name: &str, spec: Value| {
        let value = json!({"metadata": {"name": name, "namespace": "d"}, "spec": spec});
        (ObjectKey::new("d", name), serde_json::from_value::<Service>(value).unwrap())
    };
    let ports = json!([{"name": "http", "port": 80, "protocol": "TCP"}]);
    for (key, service) in [
        service("web", json!({"clusterIP": "10.96.0.9", "ports": ports})),
        service("db", json!({"clusterIP": "None", "ports": ports})),
        service("away", json!({"type": "ExternalName", "externalName": "example.com"})),
    ] {
        zone.set_service(&key, Some(&service));
    }
    zone.set_slice(&ObjectKey::new("d", "db-1"), Some(&slice()));
    zone
}

fn slice() -> EndpointSlice {
    serde_json::from_value(json!({
        "metadata": {"name": "db-1", "namespace": "d",
            "labels": {"kubernetes.io/service-name": "db"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": [
            {"addresses": ["10.244.0.5"], "hostname": "db-0", "conditions": {"ready": true}},
            {"addresses": ["10.244.0.6"], "conditions": {"ready": true}},
            {"addresses": ["10.244.0.7"], "conditions": {"ready": false}},
        ],
    }))
    .unwrap()
}

fn ask(zone: &Zone, name: &str, kind: RecordType) -> Lookup {
    zone.lookup(&Name::from_ascii(name).unwrap(), kind)
}

fn data(lookup: Lookup) -> Vec<String> {
    let Lookup::Records(records, _) = lookup else { panic!("{lookup:?}") };
    let mut all: Vec<String> = records.iter().map(|r| r.data.to_string()).collect();
    all.sort();
    all
}

#[test]
fn names_have_the_records_of_the_specification() {
    let zone = zone();
    let table = [
        ("web.d.svc.cluster.local.", RecordType::A, vec!["10.96.0.9"]),
        ("WEB.D.svc.Cluster.Local.", RecordType::A, vec!["10.96.0.9"]),
        ("db.d.svc.cluster.local.", RecordType::A, vec!["10.244.0.5", "10.244.0.6"]),
        ("db-0.db.d.svc.cluster.local.", RecordType::A, vec!["10.244.0.5"]),
        ("10-244-0-6.db.d.svc.cluster.local.", RecordType::A, vec!["10.244.0.6"]),
        ("10-244-0-9.d.pod.cluster.local.", RecordType::A, vec!["10.244.0.9"]),
        (
            "_http._tcp.web.d.svc.cluster.local.",
            RecordType::SRV,
            vec!["0 100 80 web.d.svc.cluster.local."],
        ),
        (
            "_http._tcp.db.d.svc.cluster.local.",
            RecordType::SRV,
            vec![
                "0 100 8080 10-244-0-6.db.d.svc.cluster.local.",
                "0 100 8080 db-0.db.d.svc.cluster.local.",
            ],
        ),
        ("9.0.96.10.in-addr.arpa.", RecordType::PTR, vec!["web.d.svc.cluster.local."]),
        ("5.0.244.10.in-addr.arpa.", RecordType::PTR, vec!["db-0.db.d.svc.cluster.local."]),
        ("dns-version.cluster.local.", RecordType::TXT, vec!["1.1.0"]),
    ];
    for (name, kind, expected) in table {
        assert_eq!(data(ask(&zone, name, kind)), expected, "{name} {kind}");
    }
}

#[test]
fn what_is_not_there_is_told_from_what_has_no_such_records() {
    let zone = zone();
    let table = [
        ("web.d.svc.cluster.local.", RecordType::AAAA, Lookup::NoRecords),
        ("d.svc.cluster.local.", RecordType::A, Lookup::NoRecords),
        ("svc.cluster.local.", RecordType::A, Lookup::NoRecords),
        ("cluster.local.", RecordType::A, Lookup::NoRecords),
        ("_tcp.web.d.svc.cluster.local.", RecordType::SRV, Lookup::NoRecords),
        ("none.d.svc.cluster.local.", RecordType::A, Lookup::NoName),
        ("x.svc.cluster.local.", RecordType::A, Lookup::NoName),
        ("10-244-0-7.db.d.svc.cluster.local.", RecordType::A, Lookup::NoName),
        ("10-244-0-9.x.pod.cluster.local.", RecordType::A, Lookup::NoName),
        ("_x._tcp.web.d.svc.cluster.local.", RecordType::SRV, Lookup::NoName),
        ("web.d.cluster.local.", RecordType::A, Lookup::NoName),
        ("example.com.", RecordType::A, Lookup::NotOurs),
        ("mycluster.local.", RecordType::A, Lookup::NotOurs),
        ("1.0.0.127.in-addr.arpa.", RecordType::PTR, Lookup::NotOurs),
    ];
    for (name, kind, expected) in table {
        assert_eq!(ask(&zone, name, kind), expected, "{name} {kind}");
    }
    let alias = ask(&zone, "away.d.svc.cluster.local.", RecordType::A);
    assert!(matches!(alias, Lookup::Alias(_, target) if target.to_ascii() == "example.com."));
}

#[test]
fn changes_leave_nothing_behind() {
    let mut zone = zone();
    zone.set_slice(&ObjectKey::new("d", "db-1"), None);
    assert_eq!(ask(&zone, "db.d.svc.cluster.local.", RecordType::A), Lookup::NoRecords);
    assert_eq!(ask(&zone, "5.0.244.10.in-addr.arpa.", RecordType::PTR), Lookup::NotOurs);
    for name in ["web", "db", "away"] {
        zone.set_service(&ObjectKey::new("d", name), None);
    }
    zone.set_namespace("d", false);
    assert_eq!(ask(&zone, "web.d.svc.cluster.local.", RecordType::A), Lookup::NoName);
    assert!(zone.by_address.is_empty() && zone.endpoints.is_empty());
    assert!(zone.slice_owner.is_empty());
}

#[test]
fn the_name_server_has_an_address() {
    let mut zone = zone();
    let name = "ns.dns.cluster.local.";
    assert!(matches!(ask(&zone, name, RecordType::A), Lookup::NoRecords));
    let service = json!({"metadata": {"name": "kube-dns", "namespace": "kube-system"},
        "spec": {"clusterIP": "10.96.0.10", "ports": [{"port": 53, "protocol": "UDP"}]}});
    let service: Service = serde_json::from_value(service).unwrap();
    zone.set_service(&ObjectKey::new("kube-system", "kube-dns"), Some(&service));
    assert_eq!(data(ask(&zone, name, RecordType::A)), ["10.96.0.10"]);
}
