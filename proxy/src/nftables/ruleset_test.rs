//! Rulesets made from arbitrary objects: the kernel takes them, the distribution's nft prints them,
//! and a restart finds nothing to write.

use std::{
    fmt::Write as _,
    net::{Ipv4Addr, Ipv6Addr},
};

use keelson_api::object::ObjectKey;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{apply::Table, layout::Layout, text::text};
use crate::{
    backend::Goal,
    config::{DetectLocal, NodePortAddresses},
    model::{
        Family,
        services::Service,
        slices::{Place, Slice},
        table::ServiceTable,
    },
    netns::Namespace,
    ruleset::{
        AddressSet, Unit,
        desired::{Desired, ServiceRules},
    },
};

pub(super) const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// Objects as the API has them, read and planned.
#[derive(Default)]
pub(super) struct World {
    pub(super) objects: ServiceTable,
    pub(super) desired: Desired,
}

impl World {
    /// With a node that has an address of each family.
    pub(super) fn new() -> Self {
        let mut world = Self::default();
        let addresses = ["192.0.2.1", "2001:db8::1"];
        let node = ServiceRules {
            addresses: addresses
                .map(|address| (AddressSet::NodeAddresses, address.parse().unwrap()))
                .to_vec(),
            ..ServiceRules::default()
        };
        world.desired.replace(&ObjectKey::default(), Some(node));
        world
    }

    /// Takes in objects; what may have to be written.
    pub(super) fn take_in(&mut self, objects: &[Value]) -> Vec<Unit> {
        let mut dirty = Vec::new();
        for object in objects {
            let name = |field: &str| object["metadata"][field].as_str().unwrap();
            let key = ObjectKey::new(name("namespace"), name("name"));
            let touched = if object["kind"] == "Service" {
                let object = serde_json::from_value(object.clone()).unwrap();
                self.objects.set_service(&key, Service::read(&object).0);
                vec![key]
            } else {
                let object = serde_json::from_value(object.clone()).unwrap();
                let place = Place { node: "here".into(), zone: None };
                self.objects.set_slice(&key, Slice::read(&object, &place).0)
            };
            for key in touched {
                let rules = self.objects.rules(&key, &FAMILIES).map(|(rules, _)| rules);
                dirty.extend(self.desired.replace(&key, rules).dirty);
            }
        }
        dirty.sort_unstable();
        dirty.dedup();
        dirty
    }
}

/// A dual-stack Service with this number.
pub(super) fn service(n: u8, mut spec: Value) -> Value {
    let addresses = [format!("10.96.0.{n}"), format!("fd00:96::{n:x}")];
    spec["clusterIP"] = json!(addresses[0]);
    spec["clusterIPs"] = json!(addresses);
    let ingress = spec["ingress"].take();
    json!({"kind": "Service", "metadata": {"name": format!("s{n}"), "namespace": "d"}, "spec": spec,
           "status": {"loadBalancer": {"ingress": ingress}}})
}

/// The slices of a Service, one for each family, with these endpoints: last byte, ready, on this
/// node.
pub(super) fn slices(n: u8, ports: &Value, endpoints: &[(u8, bool, bool)]) -> Vec<Value> {
    let slice = |family: &str, address: fn(u8) -> String| {
        let endpoints: Vec<Value> = endpoints
            .iter()
            .map(|(last, ready, here)| {
                json!({"addresses": [address(*last)], "conditions": {"ready": ready},
                       "nodeName": if *here { "here" } else { "there" }})
            })
            .collect();
        let label = json!({"kubernetes.io/service-name": format!("s{n}")});
        json!({"kind": "EndpointSlice", "addressType": family, "ports": ports, "endpoints": endpoints,
               "metadata": {"name": format!("s{n}-{family}"), "namespace": "d", "labels": label}})
    };
    vec![
        slice("IPv4", |last| format!("10.244.0.{last}")),
        slice("IPv6", |last| format!("fd00:10::{last:x}")),
    ]
}

/// Something of everything.
pub(super) fn everything() -> World {
    let ports = json!([{"name": "t", "port": 80, "nodePort": 30080}, {"name": "u", "port": 53, "protocol": "UDP"},
                       {"name": "s", "port": 9, "protocol": "SCTP"}]);
    let targets = json!([{"name": "t", "port": 8080}, {"name": "u", "port": 5353, "protocol": "UDP"},
                         {"name": "s", "port": 99, "protocol": "SCTP"}]);
    let local = json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "ports": ports,
        "sessionAffinity": "ClientIP", "externalIPs": ["198.51.100.2", "2001:db8:2::2"],
        "loadBalancerSourceRanges": ["192.0.2.0/24", "10.0.0.7/32", "10.0.0.8/32", "2001:db8:9::/64"],
        "ingress": [{"ip": "198.51.100.1"}, {"ip": "2001:db8:2::1"}]});
    let mut nowhere = local.clone();
    nowhere["ports"] = json!([{"name": "t", "port": 80, "nodePort": 30081}]);
    nowhere["ingress"] = json!([{"ip": "198.51.100.9"}, {"ip": "2001:db8:2::9"}]);
    nowhere["externalIPs"] = json!([]);
    nowhere["loadBalancerSourceRanges"] = json!(["128.0.0.0/1", "2001:db8:9::/64"]);
    let mut objects = vec![
        service(1, json!({"ports": ports})),
        service(2, local),
        service(3, nowhere),
        service(4, json!({"ports": ports, "externalIPs": ["198.51.100.4"]})),
        service(
            5,
            json!({"type": "NodePort", "ports": [{"name": "t", "port": 80, "nodePort": 30085}]}),
        ),
    ];
    objects.extend(slices(1, &targets, &[(1, true, true), (2, true, false), (3, true, false)]));
    objects.extend(slices(2, &targets, &[(4, true, true), (5, true, false), (6, true, false)]));
    objects.extend(slices(3, &targets, &[(7, true, false)]));
    objects.extend(slices(5, &targets, &(1..11).map(|n| (n, true, false)).collect::<Vec<_>>()));
    let mut world = World::new();
    world.take_in(&objects);
    world
}

/// All kinds of configuration.
pub(super) fn layouts(family: Family) -> Vec<Layout> {
    let ranges: Vec<ipnet::IpNet> =
        ["10.244.0.0/16", "10.245.0.0/24", "fd00:10::/64"].map(|r| r.parse().unwrap()).to_vec();
    let any = ["0.0.0.0/0", "192.0.2.0/25", "::/0", "2001:db8::/33"].map(|r| r.parse().unwrap());
    [
        (DetectLocal::Ranges(ranges.clone()), NodePortAddresses::Primary, false),
        (DetectLocal::Interface("cni0".into()), NodePortAddresses::Ranges(any.to_vec()), false),
        (DetectLocal::InterfacePrefix("veth".into()), NodePortAddresses::Ranges(vec![]), false),
        (DetectLocal::InterfacePrefix("".into()), NodePortAddresses::Primary, false),
        (DetectLocal::Ranges(ranges), NodePortAddresses::Primary, true),
        (DetectLocal::Nothing, NodePortAddresses::Primary, true),
        (DetectLocal::Nothing, NodePortAddresses::Primary, false),
    ]
    .map(|(detect_local, node_port_addresses, masquerade_all)| Layout {
        family,
        detect_local,
        masquerade_all,
        masquerade_mark: 0x4000,
        node_port_addresses,
    })
    .to_vec()
}

pub(super) fn table_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip keelson-proxy",
        Family::V6 => "ip6 keelson-proxy",
    }
}

/// Opens a table in a namespace.
pub(super) fn open(host: &Namespace, layout: &Layout) -> Table {
    let layout = layout.clone();
    host.run(move || Table::open(layout).unwrap())
}

/// A listing with its elements in order, since the kernel has them in any.
pub(super) fn normalized(listing: &str) -> String {
    let mut text = String::new();
    let mut rest = listing;
    while let Some((before, after)) = rest.split_once("elements = {") {
        let (elements, after) = after.split_once('}').unwrap();
        let mut elements: Vec<String> = elements
            .split(',')
            .map(|e| e.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        elements.sort();
        text.push_str(before);
        writeln!(text, "elements = {{\n{}\n}}", elements.join("\n")).unwrap();
        rest = after;
    }
    text.push_str(rest);
    text
}

#[test]
fn every_configuration_is_taken_and_printed() {
    let host = Namespace::new();
    let world = everything();
    let goal = Goal { desired: &world.desired, objects: &world.objects };
    for family in FAMILIES {
        for layout in layouts(family) {
            let mut table = open(&host, &layout);
            table.probe().unwrap();
            let applied = table.synchronize(&world.desired).unwrap();
            assert!(applied.refused.is_empty(), "{layout:?}: {applied:?}");
            let listed = host.sh(&format!("nft list table {}", table_name(family)));
            let text = text(&layout, goal);
            pretty_assert(&normalized(&text), &normalized(&listed));
            let again = open(&host, &layout).synchronize(&world.desired).unwrap();
            assert_eq!((again.elements, again.rebuilt), (0, None), "{layout:?}");
        }
    }
}

/// A Service and its slices, with whatever the API server would let through.
fn arbitrary_service() -> impl Strategy<Value = Vec<Value>> {
    let flag = any::<bool>;
    let protocol = prop_oneof![Just("TCP"), Just("UDP"), Just("SCTP")];
    let port = (1u16..5, protocol, 0u16..4, 1u16..=u16::MAX);
    let endpoints = proptest::collection::vec((1u8..30, flag(), flag()), 0..12);
    let ranges = proptest::collection::vec(
        prop_oneof![
            (any::<u32>(), 0u8..=32).prop_map(|(a, l)| format!("{}/{l}", Ipv4Addr::from(a))),
            (any::<u128>(), 0u8..=128).prop_map(|(a, l)| format!("{}/{l}", Ipv6Addr::from(a))),
        ],
        0..8,
    );
    let addresses = proptest::collection::vec((1u8..5, flag()), 0..3);
    let kind = prop_oneof![Just("ClusterIP"), Just("NodePort"), Just("LoadBalancer")];
    let affinity = prop_oneof![Just(None), (1u32..=86_400).prop_map(Some)];
    let spec = (kind, flag(), flag(), affinity, ranges, addresses.clone(), addresses);
    (1u8..7, proptest::collection::vec(port, 1..4), endpoints, spec).prop_map(
        |(n, ports, endpoints, (kind, internal, external, affinity, ranges, vips, ips))| {
            let policy = |local| if local { "Local" } else { "Cluster" };
            let address = |(last, v6): &(u8, bool)| {
                if *v6 { format!("2001:db8:2::{last:x}") } else { format!("198.51.100.{last}") }
            };
            let target = |(i, port): (usize, &(u16, &str, u16, u16))| {
                json!({"name": format!("p{i}"), "port": port.3, "protocol": port.1})
            };
            let published = |(i, port): (usize, &(u16, &str, u16, u16))| {
                json!({"name": format!("p{i}"), "port": port.0, "protocol": port.1,
                       "nodePort": if port.2 == 0 { 0 } else { 30_000 + port.2 }})
            };
            let targets: Value = ports.iter().enumerate().map(target).collect();
            let spec = json!({
                "type": kind, "internalTrafficPolicy": policy(internal),
                "externalTrafficPolicy": policy(external),
                "sessionAffinity": if affinity.is_some() { "ClientIP" } else { "None" },
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": affinity}},
                "loadBalancerSourceRanges": ranges,
                "ports": ports.iter().enumerate().map(published).collect::<Value>(),
                "externalIPs": ips.iter().map(address).collect::<Value>(),
                "ingress": vips.iter().map(|vip| json!({"ip": address(vip)})).collect::<Value>(),
            });
            let mut objects = vec![service(n, spec)];
            objects.extend(slices(n, &targets, &endpoints));
            objects
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// From an empty table, and by changes one after the other.
    #[test]
    fn every_ruleset_is_taken_and_printed(
        services in proptest::collection::vec(arbitrary_service(), 1..8),
        layout in 0usize..7,
        at_once in 0usize..8,
    ) {
        let host = Namespace::new();
        for family in FAMILIES {
            let layout = layouts(family).swap_remove(layout);
            let (begin, rest) = services.split_at(at_once.min(services.len()));
            let mut world = World::new();
            world.take_in(&begin.concat());
            let mut table = open(&host, &layout);
            let applied = table.synchronize(&world.desired).unwrap();
            prop_assert!(applied.refused.is_empty(), "{:?}", applied);
            let list = format!("nft list table {}", table_name(family));
            let goal = Goal { desired: &world.desired, objects: &world.objects };
            pretty_assert(&normalized(&text(&layout, goal)), &normalized(&host.sh(&list)));
            for objects in rest {
                let dirty = world.take_in(objects);
                let applied = table.apply(&dirty, &world.desired).unwrap();
                prop_assert!(applied.refused.is_empty() && applied.rebuilt.is_none(), "{:?}", applied);
            }
            host.sh(&list);
            let again = open(&host, &layout).synchronize(&world.desired).unwrap();
            prop_assert_eq!((again.elements, again.rebuilt), (0, None));
        }
    }
}

/// Compares line by line: two whole listings say little.
fn pretty_assert(text: &str, listed: &str) {
    for (n, (ours, theirs)) in text.lines().zip(listed.lines()).enumerate() {
        assert_eq!(ours, theirs, "line {n}");
    }
    assert_eq!(text.lines().count(), listed.lines().count());
}
