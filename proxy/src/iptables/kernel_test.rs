//! The rules in a kernel, by both variants of iptables and in both families: each test has network
//! namespaces of its own.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use keelson_api::object::ObjectKey;
use serde_json::{Value, json};

use super::{Rules, Settings, Variant, golden::settings};
use crate::{
    backend::{Applied, Backend, Goal},
    model::{
        Family,
        services::Service,
        slices::{Place, Slice},
        table::ServiceTable,
    },
    netns::Namespace,
    nftables::socket::NftSocket,
    ruleset::{
        AddressSet, Unit,
        desired::{Desired, ServiceRules},
    },
};

pub(super) const ALL: [(Family, Variant); 4] = [
    (Family::V4, Variant::Nft),
    (Family::V6, Variant::Nft),
    (Family::V4, Variant::Legacy),
    (Family::V6, Variant::Legacy),
];

/// Everything between objects and a backend.
pub(super) struct Proxy {
    pub(super) objects: ServiceTable,
    pub(super) desired: Desired,
    pub(super) rules: Rules,
}

impl Proxy {
    pub(super) fn start(host: &Namespace, settings: Settings) -> Self {
        let family = settings.family;
        let rules = host.run(move || Rules::open(settings).unwrap());
        let mut proxy =
            Self { objects: ServiceTable::default(), desired: Desired::default(), rules };
        let node: IpAddr = match family {
            Family::V4 => [192, 0, 2, 1].into(),
            Family::V6 => "2001:db8::1".parse().unwrap(),
        };
        let node = ServiceRules {
            addresses: vec![(AddressSet::NodeAddresses, node)],
            ..ServiceRules::default()
        };
        proxy.desired.replace(&ObjectKey::new("", "node"), Some(node));
        proxy
    }

    /// Takes in an object; the units that it touches.
    pub(super) fn take_in(&mut self, object: Value) -> Vec<Unit> {
        let (objects, desired) = (&mut self.objects, &mut self.desired);
        take_in(objects, desired, self.rules.family(), object)
    }

    pub(super) fn apply(&mut self, object: Value) -> Applied {
        let units = self.take_in(object);
        let goal = Goal { desired: &self.desired, objects: &self.objects };
        let applied = self.rules.apply(&units, goal).unwrap();
        assert!(applied.refused.is_empty(), "{:?}", applied.refused);
        applied
    }

    pub(super) fn synchronize(&mut self) -> Applied {
        let goal = Goal { desired: &self.desired, objects: &self.objects };
        let applied = self.rules.synchronize(goal).unwrap();
        assert!(applied.refused.is_empty(), "{:?}", applied.refused);
        applied
    }
}

pub(super) fn take_in(
    objects: &mut ServiceTable,
    desired: &mut Desired,
    family: Family,
    object: Value,
) -> Vec<Unit> {
    let key = ObjectKey::new(
        object["metadata"]["namespace"].as_str().unwrap(),
        object["metadata"]["name"].as_str().unwrap(),
    );
    let touched = if object["kind"] == "Service" {
        let (service, problems) = Service::read(&serde_json::from_value(object).unwrap());
        assert_eq!(problems, []);
        objects.set_service(&key, service);
        vec![key]
    } else {
        let place = Place { node: "here".into(), zone: None };
        let (slice, problems) = Slice::read(&serde_json::from_value(object).unwrap(), &place);
        assert_eq!(problems, []);
        objects.set_slice(&key, slice)
    };
    let mut units = Vec::new();
    for key in touched {
        let rules = objects.rules(&key, &[family]).map(|(rules, _)| rules);
        units.extend(desired.replace(&key, rules).dirty);
    }
    units
}

/// A Service `n`, whose cluster address ends with `n`.
pub(super) fn service(family: Family, n: u8, spec: Value, status: Value) -> Value {
    let address = match family {
        Family::V4 => format!("10.96.0.{n}"),
        Family::V6 => format!("fd00:96::{n}"),
    };
    let mut object = json!({
        "kind": "Service", "metadata": {"namespace": "ns", "name": format!("svc{n}")},
        "spec": {"clusterIP": address, "ports": [{"name": "p80", "port": 80}]}, "status": status,
    });
    for (field, value) in spec.as_object().unwrap() {
        object["spec"][field] = value.clone();
    }
    object
}

/// Its endpoints; each by the last number of its address, whether it is on this node, and whether
/// it is ready.
pub(super) fn slice(family: Family, n: u8, endpoints: &[(u8, bool, bool)]) -> Value {
    let endpoints: Vec<Value> = endpoints
        .iter()
        .map(|(last, here, ready)| {
            let address = match family {
                Family::V4 => format!("10.244.{last}.2"),
                Family::V6 => format!("fd00:244:{last}::2"),
            };
            json!({
                "addresses": [address], "nodeName": if *here { "here" } else { "there" },
                "conditions": {"ready": ready, "serving": true, "terminating": !ready},
            })
        })
        .collect();
    let protocol = "TCP";
    json!({
        "metadata": {"namespace": "ns", "name": format!("svc{n}-1"),
                     "labels": {"kubernetes.io/service-name": format!("svc{n}")}},
        "addressType": family.as_str(), "endpoints": endpoints,
        "ports": [{"name": "p80", "port": 8080, "protocol": protocol}],
    })
}

pub(super) fn program(family: Family, variant: Variant) -> String {
    let family = if family == Family::V4 { "iptables" } else { "ip6tables" };
    match variant {
        Variant::Nft => format!("{family}-nft"),
        Variant::Legacy => format!("{family}-legacy"),
        Variant::Host => family.to_owned(),
    }
}

/// All rules, without what changes by itself.
pub(super) fn saved(host: &Namespace, family: Family, variant: Variant) -> String {
    let save = program(family, variant);
    host.sh(&format!("for t in mangle filter nat; do {save}-save -t $t; done 2>/dev/null | grep -v '^#' | sed 's/ \\[.*//'"))
}

fn outside(family: Family, n: u8) -> String {
    match family {
        Family::V4 => format!("192.0.2.{n}"),
        Family::V6 => format!("2001:db8::{n}"),
    }
}

/// Services with every kind of rule.
pub(super) fn everything(family: Family) -> Vec<Value> {
    let range = if family == Family::V4 { "192.0.2.0/25" } else { "2001:db8::/64" };
    let node_port = |n: u16| json!([{"name": "p80", "port": 80, "nodePort": 30_000 + n}]);
    vec![
        service(family, 1, json!({}), Value::Null),
        slice(family, 1, &[(1, true, true), (2, false, true), (3, false, true)]),
        service(family, 2, json!({"type": "NodePort", "ports": node_port(2)}), Value::Null),
        slice(family, 2, &[(2, false, true)]),
        service(
            family,
            3,
            json!({"type": "LoadBalancer", "ports": node_port(3), "externalTrafficPolicy": "Local",
                   "internalTrafficPolicy": "Local", "healthCheckNodePort": 30_103,
                   "externalIPs": [outside(family, 50)], "loadBalancerSourceRanges": [range]}),
            json!({"loadBalancer": {"ingress": [{"ip": outside(family, 40)}]}}),
        ),
        slice(family, 3, &[(1, true, true), (2, false, true)]),
        service(
            family,
            4,
            json!({"type": "NodePort", "ports": node_port(4), "externalTrafficPolicy": "Local",
                   "internalTrafficPolicy": "Local"}),
            Value::Null,
        ),
        slice(family, 4, &[(2, false, true)]),
        service(family, 5, json!({"type": "NodePort", "ports": node_port(5)}), Value::Null),
        service(
            family,
            6,
            json!({"sessionAffinity": "ClientIP", "type": "NodePort", "ports": node_port(6)}),
            Value::Null,
        ),
        slice(family, 6, &[(1, true, true), (2, false, true)]),
    ]
}

#[test]
fn a_restart_writes_nothing_and_a_change_only_what_it_is() {
    for (family, variant) in ALL {
        let host = Namespace::new();
        let with = Settings { variant, ..settings(family) };
        let mut proxy = Proxy::start(&host, with.clone());
        proxy.rules.probe().unwrap();
        assert!(proxy.synchronize().rebuilt.is_some());
        for object in everything(family) {
            proxy.apply(object);
        }
        let before = saved(&host, family, variant);
        let what = format!("{family:?} {variant:?}:\n{before}");

        let mut again = Proxy::start(&host, with.clone());
        (again.objects, again.desired) = (proxy.objects, proxy.desired);
        // Not even for a moment: what is written by iptables-nft the kernel counts.
        let generation = || host.run(|| NftSocket::open().unwrap().generation().unwrap());
        let written = generation();
        again.rules.probe().unwrap();
        let applied = again.synchronize();
        assert_eq!((applied.elements, applied.rebuilt), (0, None), "{what}");
        assert_eq!(saved(&host, family, variant), before);
        assert_eq!(generation(), written, "{family:?} {variant:?}");

        // A fresh start comes to the same rules.
        let other = Namespace::new();
        let mut fresh = Proxy::start(&other, with);
        (fresh.objects, fresh.desired) = (again.objects, again.desired);
        fresh.synchronize();
        assert_eq!(sorted(&saved(&other, family, variant)), sorted(&before), "{what}");

        // One endpoint: its chain, the one that goes, and the one that picks.
        let applied =
            fresh.apply(slice(family, 1, &[(1, true, true), (3, false, true), (4, true, true)]));
        assert_eq!(applied.elements, 4 + 2 + 1, "{what}");
        let applied =
            fresh.apply(slice(family, 1, &[(1, true, true), (3, false, true), (4, true, true)]));
        assert_eq!(applied.elements, 0, "{what}");

        fresh.rules.remove().unwrap();
        let left = saved(&other, family, variant);
        // Loopback is guarded as long as its addresses are routed.
        assert_eq!(left.contains("KUBE-FIREWALL"), family == Family::V4, "{left}");
        other.sh("sysctl -qw net.ipv4.conf.all.route_localnet=0");
        fresh.rules.remove().unwrap();
        let left = saved(&other, family, variant);
        assert!(!left.contains("KUBE-"), "{left}");
        fresh.rules.remove().unwrap();
    }
}

#[test]
fn rules_and_the_packets_that_met_them_are_counted() {
    for variant in [Variant::Nft, Variant::Legacy] {
        let family = Family::V4;
        let host = Namespace::new();
        host.sh("ip addr add 10.244.9.2/32 dev lo");
        let mut proxy = Proxy::start(&host, Settings { variant, ..settings(family) });
        let mut last = proxy.synchronize();
        for object in everything(family) {
            last = proxy.apply(object);
        }
        let iptables = program(family, variant);
        let in_table = |table: &str| {
            let count = format!("{iptables}-save -t {table} 2>/dev/null | grep -c -- ^-A");
            host.sh(&count).trim().parse::<usize>().unwrap()
        };
        let of = |applied: &Applied, table: &str| {
            *applied.tables.iter().find(|counted| counted.table == table).unwrap()
        };
        for table in ["filter", "nat"] {
            assert_eq!(of(&last, table).rules, in_table(table), "{variant:?} {table}");
        }
        let ports = json!([{"name": "p80", "port": 80, "nodePort": 30_007}]);
        let spec = json!({"type": "NodePort", "ports": ports});
        let refused = proxy.apply(service(family, 7, spec, Value::Null));
        assert_eq!((of(&refused, "filter").written, of(&refused, "nat").written), (2, 0));
        let served = proxy.apply(slice(family, 7, &[(9, true, true)]));
        assert_eq!((of(&served, "filter").written, of(&served, "nat").rules), (0, in_table("nat")));

        let counters = proxy.rules.counters();
        let before = counters.read().unwrap();
        assert_eq!((before.invalid_dropped, before.localhost_accepted), (0, 0), "{variant:?}");
        host.run(|| {
            let listener = std::net::TcpListener::bind("10.244.9.2:8080").unwrap();
            for _ in 0..2 {
                std::net::TcpStream::connect("127.0.0.1:30007").unwrap();
                listener.accept().unwrap();
            }
            // The address itself is no node port on loopback.
            std::net::TcpStream::connect("10.244.9.2:8080").unwrap();
        });
        host.sh(&format!(
            "{iptables} -R KUBE-FORWARD 1 -m conntrack --ctstate INVALID -j DROP -c 7 420"
        ));
        let after = counters.read().unwrap();
        assert_eq!((after.invalid_dropped, after.localhost_accepted), (7, 2), "{variant:?}");
    }
}

fn sorted(text: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    lines
}

#[test]
fn edits_are_noticed_and_mended() {
    for (family, variant) in ALL {
        let host = Namespace::new();
        let mut proxy = Proxy::start(&host, Settings { variant, ..settings(family) });
        let mut canary = proxy.rules.canary();
        assert!(!canary.changed().unwrap());
        proxy.synchronize();
        for object in everything(family) {
            proxy.apply(object);
        }
        let before = saved(&host, family, variant);
        let ipt = program(family, variant);
        let endpoint = before.lines().find_map(|l| l.strip_prefix(":KUBE-SEP-")).unwrap();
        let endpoint = endpoint.split(' ').next().unwrap();
        for edit in [
            format!("{ipt} -t nat -F"),
            format!("{ipt} -t nat -F; {ipt} -t nat -X; {ipt} -F; {ipt} -X; {ipt} -t mangle -X"),
            format!("{ipt} -t nat -F KUBE-SEP-{endpoint}"),
            format!("{ipt} -t nat -A KUBE-SEP-{endpoint} -j ACCEPT"),
            format!("{ipt} -t nat -D KUBE-SERVICES 1"),
            format!("{ipt} -t nat -A KUBE-SERVICES -j ACCEPT"),
            format!("{ipt} -t nat -D PREROUTING 1"),
            format!("{ipt} -F KUBE-FORWARD"),
            format!("{ipt} -A KUBE-SERVICES -j ACCEPT"),
            format!("{ipt} -F KUBE-EXTERNAL-SERVICES"),
            format!("{ipt} -t mangle -X KUBE-PROXY-CANARY"),
            format!(
                "{ipt} -t nat -N KUBE-SVC-AAAAAAAAAAAAAAAA; {ipt} -t nat -N KUBE-XLB-AAAAAAAAAAAAAAAA"
            ),
        ] {
            let mut canary_now = proxy.rules.canary();
            assert!(!canary_now.changed().unwrap(), "{variant:?} before {edit}");
            host.sh(&edit);
            let outdated_only = edit.contains("XLB");
            let mut canary_now = proxy.rules.canary();
            assert!(canary_now.changed().unwrap() || outdated_only, "{variant:?} {edit}");
            proxy.synchronize();
            let after = saved(&host, family, variant);
            assert_eq!(sorted(&after), sorted(&before), "{variant:?} {edit}");
        }
    }
}

#[test]
fn foreign_edits_are_noticed_while_endpoints_change_without_pause() {
    let host = Namespace::new();
    let variant = Variant::Nft;
    let mut proxy = Proxy::start(&host, Settings { variant, ..settings(Family::V4) });
    proxy.synchronize();
    proxy.apply(service(Family::V4, 1, json!({}), json!({})));
    proxy.apply(slice(Family::V4, 1, &[(1, true, false)]));
    let mut canary = proxy.rules.canary();
    host.sh("iptables-nft -F KUBE-FORWARD");
    let deadline = Instant::now() + Duration::from_secs(20);
    let noticed = std::thread::spawn(move || {
        while Instant::now() < deadline {
            if canary.changed().unwrap() {
                return true;
            }
        }
        false
    });
    for n in (1..=3).cycle() {
        if noticed.is_finished() {
            break;
        }
        proxy.apply(slice(Family::V4, 1, &[(n, true, false)]));
    }
    assert!(noticed.join().unwrap());
}

#[test]
fn a_foreign_rule_that_leads_to_a_service_doesnt_keep_it_in_force() {
    for (family, variant) in ALL {
        let host = Namespace::new();
        let mut proxy = Proxy::start(&host, Settings { variant, ..settings(family) });
        proxy.synchronize();
        proxy.apply(service(family, 1, json!({}), Value::Null));
        proxy.apply(slice(family, 1, &[(1, true, true)]));
        let rules = saved(&host, family, variant);
        let chain = rules.lines().find_map(|line| line.strip_prefix(":KUBE-SVC-")).unwrap();
        let chain = format!("KUBE-SVC-{}", chain.split(' ').next().unwrap());
        let ipt = program(family, variant);
        host.sh(&format!("{ipt} -t nat -A PREROUTING -p udp -j {chain}"));
        proxy.apply(slice(family, 1, &[]));
        let rules = saved(&host, family, variant);
        let leading: Vec<&str> = rules.lines().filter(|line| line.contains(&chain)).collect();
        assert_eq!(leading, [format!(":{chain} -"), format!("-A PREROUTING -p udp -j {chain}")]);
        assert!(rules.contains("has no endpoints"), "{rules}");
        // It goes once it can.
        host.sh(&format!("{ipt} -t nat -D PREROUTING -p udp -j {chain}"));
        proxy.synchronize();
        assert!(!saved(&host, family, variant).contains(&chain));
    }
}

#[test]
fn many_endpoints_go_without_comments() {
    let host = Namespace::new();
    let mut proxy = Proxy::start(&host, settings(Family::V4));
    proxy.synchronize();
    let many = |count: u32| {
        let endpoints: Vec<Value> = (0..count)
            .map(|n| json!({"addresses": [format!("10.{}.{}.{}", 1 + n / 62_500, n / 250 % 250, 1 + n % 250)]}))
            .collect();
        let mut object = slice(Family::V4, 1, &[]);
        object["endpoints"] = endpoints.into();
        object
    };
    proxy.apply(service(Family::V4, 1, json!({}), Value::Null));
    proxy.apply(service(Family::V4, 2, json!({}), Value::Null));
    proxy.apply(slice(Family::V4, 2, &[(1, true, true)]));
    for (endpoints, commented) in [(999, true), (1_000, false), (999, true)] {
        proxy.apply(many(endpoints));
        let rules = saved(&host, Family::V4, Variant::Host);
        assert_eq!(rules.contains("ns/svc1:p80 -> 10.1.0.1:8080"), commented, "{endpoints}");
        // Of another Service, which has not changed.
        assert_eq!(rules.contains("ns/svc2:p80 -> 10.244.1.2:8080"), commented, "{endpoints}");
        assert_eq!(proxy.synchronize().elements, 0, "{endpoints}");
    }
}

#[test]
fn node_ports_follow_the_nodes_addresses() {
    let host = Namespace::new();
    let with = Settings {
        node_port_addresses: crate::config::NodePortAddresses::Primary,
        ..settings(Family::V4)
    };
    let mut proxy = Proxy::start(&host, with);
    proxy.synchronize();
    let object = |n| service(Family::V4, n, json!({"type": "NodePort"}), Value::Null);
    proxy.apply(object(1));
    let tail = |host: &Namespace| {
        let rules = host.sh("iptables -t nat -S KUBE-SERVICES");
        let last: Vec<&str> = rules.lines().filter(|l| l.contains("KUBE-NODEPORTS")).collect();
        last.iter().map(|l| l.split(' ').nth(3).unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(tail(&host), ["192.0.2.1/32"]);
    let addresses = [[192, 0, 2, 7].into(), [192, 0, 2, 8].into()];
    let node = ServiceRules {
        addresses: addresses.map(|a: IpAddr| (AddressSet::NodeAddresses, a)).into(),
        ..ServiceRules::default()
    };
    let units = proxy.desired.replace(&ObjectKey::new("", "node"), Some(node)).dirty;
    let goal = Goal { desired: &proxy.desired, objects: &proxy.objects };
    proxy.rules.apply(&units, goal).unwrap();
    assert_eq!(tail(&host), ["192.0.2.7/32", "192.0.2.8/32"]);
    // They stay the last ones.
    proxy.apply(object(2));
    proxy.apply(slice(Family::V4, 2, &[(1, true, true)]));
    let rules = host.sh("iptables -t nat -S KUBE-SERVICES");
    assert!(rules.trim_end().ends_with("-j KUBE-NODEPORTS"), "{rules}");
    assert_eq!(proxy.synchronize().elements, 0);
}
