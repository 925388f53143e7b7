//! Services and EndpointSlices as people, tools and attackers write them, and the rules that come
//! of them.

use std::{
    io::Write as _,
    net::IpAddr,
    process::{Command, Stdio},
};

use k8s_openapi::api::networking::v1::ServiceCIDR;
use keelson_api::object::ObjectKey;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::source::Source;
use crate::{
    DetectLocal, Mode, NodePortAddresses, Objects, Packet, Protocol, ProxyConfig, Snapshot,
    backend::{Applied, Goal},
    model::{
        Family,
        objects::{Place, Service, Slice},
        service_ranges::ServiceRanges,
        table::ServiceTable,
    },
    nftables::apply::Table,
    ruleset::{
        Action, AddressSet, Unit,
        desired::{Desired, ServiceRules},
    },
    start,
};

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
const NODE: [&str; 2] = ["192.0.2.1", "2001:db8::1"];

const ADDRESSES: [&str; 34] = [
    "10.96.0.1",
    "fd00:96::1",
    "10.96.0.2",
    "fd00:96::2",
    "10.244.0.5",
    "fd00:10::5",
    "10.244.1.5",
    "192.0.2.1",
    "2001:db8::1",
    "198.51.100.7",
    "2001:db8:51::7",
    "FD00:96::1",
    "fd00:96:0:0::2",
    "010.096.0.1",
    "fd00:96::1%eth0",
    "127.0.0.1",
    "::1",
    "169.254.169.254",
    "fe80::1",
    "224.0.0.1",
    "ff02::1",
    "0.0.0.0",
    "::",
    "::ffff:10.0.0.1",
    "::10.0.0.1",
    "255.255.255.255",
    "240.0.0.1",
    "None",
    "",
    " 10.0.0.1",
    "10.0.0.1/32",
    "not-an-address",
    "1.2.3.4.5",
    "例え",
];
const RANGES: [&str; 14] = [
    "192.0.2.0/25",
    "2001:db8::/64",
    "0.0.0.0/0",
    "::/0",
    "128.0.0.0/1",
    "255.255.255.255/32",
    "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128",
    "0.0.0.0/32",
    "::/128",
    " 10.0.0.7/8 ",
    "10.0.0.0/99",
    "010.0.0.0/8",
    "fe80::/10",
    "x",
];
const NUMBERS: [i32; 12] =
    [80, 443, 30_080, 30_081, 1, 0, -1, 65_535, 65_536, i32::MAX, i32::MIN, 8080];
const NAMES: [&str; 14] = [
    "web",
    "dns",
    "",
    "a",
    "\"; flush ruleset; \"",
    "a b\n-A INPUT -j ACCEPT",
    "it's",
    "back\\slash",
    "`reboot` $(reboot)",
    "-j",
    "tab\tand\u{0}zero",
    "例え",
    "KUBE-SVC-AAAAAAAAAAAAAAAA",
    "a-name-that-is-longer-than-what-the-kernel-keeps-of-a-comment-a-name-that-is-longer-than-what-\
     the-kernel-keeps-of-a-comment-a-name-that-is-longer-than-what-the-kernel-keeps-of-a-comment-\
     a-name-that-is-longer-than-what-the-kernel-keeps-of-a-comment",
];
const SERVICES: [&str; 4] = ["a", "b", "c", "\"; flush ruleset; \""];
const PROTOCOLS: [Option<&str>; 6] =
    [Some("TCP"), Some("UDP"), Some("SCTP"), None, Some(""), Some("ICMP")];
const KINDS: [&str; 6] = ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName", "", "Other"];
const POLICIES: [Option<&str>; 4] = [Some("Cluster"), Some("Local"), None, Some("Other")];
const SLICE_FAMILIES: [&str; 4] = ["IPv4", "IPv6", "FQDN", ""];

/// Makes rules of whatever objects the bytes become, and has kernel and programs take them. In the
/// network namespace of the calling thread, whose rules are replaced.
///
/// # Panics
/// When something doesn't hold that must.
pub fn objects_to_rules(data: &[u8]) {
    let mut source = Source::new(data);
    let config = config(&mut source);
    let at_once = source.below(8);
    let steps = source.several(12, object);
    let ranges = [(); 2].map(|()| source.several(4, |source| source.pick(&RANGES)));
    let (first, rest) = steps.split_at(at_once.min(steps.len()));

    let mut world = World::new();
    world.take_in_ranges(&ranges[0]);
    first.iter().for_each(|step| drop(world.take_in(step)));
    let mut tables = FAMILIES.map(|family| open(&config, family));
    for table in &mut tables {
        table.remove().expect("the table of the last input can be removed");
        let applied = table.synchronize(&world.desired).expect("the kernel takes a table");
        assert_taken(&applied);
    }
    for n in 0..=rest.len() {
        let dirty = match rest.get(n) {
            Some(step) => world.take_in(step),
            None => world.take_in_ranges(&ranges[1]),
        };
        for table in &mut tables {
            let applied = table.apply(&dirty, &world.desired).expect("the kernel takes a change");
            assert_taken(&applied);
            assert_eq!(applied.rebuilt, None, "a change of an object is a small one");
        }
    }
    let listed = run("nft", &["list", "ruleset"], "");
    for family in ["ip", "ip6"] {
        assert!(listed.contains(&format!("table {family} keelson-proxy {{")), "{listed}");
    }
    for family in FAMILIES {
        let again = open(&config, family).synchronize(&world.desired);
        let again = again.expect("the kernel's table can be read back");
        assert_eq!((again.elements, again.rebuilt), (0, None), "a restart writes nothing");
    }
    check_plan(&config, &steps);
}

fn assert_taken(applied: &Applied) {
    assert!(applied.refused.is_empty(), "the kernel refuses {:?}", applied.refused);
}

fn open(config: &ProxyConfig, family: Family) -> Table {
    Table::open(start::layout(config, family)).expect("there are netfilter sockets")
}

/// What the proxy is told.
fn config(source: &mut Source<'_>) -> ProxyConfig {
    let ranges = |texts: &[&str]| texts.iter().filter_map(|text| text.parse().ok()).collect();
    let detect_local = match source.below(5) {
        0 => DetectLocal::Ranges(ranges(&["10.244.0.0/16", "fd00:10::/64"])),
        1 => DetectLocal::Nothing,
        2 => DetectLocal::Interface("cni0".into()),
        3 => DetectLocal::InterfacePrefix("veth".into()),
        _ => DetectLocal::Ranges(ranges(&["0.0.0.0/0", "10.244.0.0/16", "10.245.0.0/24"])),
    };
    let node_port_addresses = match source.below(3) {
        0 => NodePortAddresses::Primary,
        1 => NodePortAddresses::Ranges(ranges(&["0.0.0.0/0", "::/0"])),
        _ => NodePortAddresses::Ranges(ranges(&["192.0.2.0/25", "2001:db8::/33", "127.0.0.0/8"])),
    };
    ProxyConfig {
        node_ips: NODE.iter().filter_map(|text| text.parse().ok()).collect(),
        detect_local,
        node_port_addresses,
        masquerade_all: source.flag(),
        masquerade_bit: source.pick(&[14, 0, 31]),
        ..ProxyConfig::new("here")
    }
}

/// A step: an object as it is now, or, without a `spec` and without endpoints, one that is gone.
fn object(source: &mut Source<'_>) -> Value {
    match source.below(8) {
        0..3 => service(source),
        3..6 => slice(source),
        6 => {
            json!({"kind": "Service", "metadata": {"name": source.pick(&SERVICES), "namespace": "d"}})
        }
        _ => {
            json!({"kind": "EndpointSlice", "addressType": "IPv4", "endpoints": [],
                   "metadata": slice_metadata(source)})
        }
    }
}

fn addresses(source: &mut Source<'_>, most: usize) -> Vec<&'static str> {
    source.several(most, |source| {
        // Most are usable, or nothing would come of most inputs.
        let end = if source.below(4) == 0 { ADDRESSES.len() } else { 11 };
        ADDRESSES[source.below(end)]
    })
}

fn service(source: &mut Source<'_>) -> Value {
    let name = source.pick(&SERVICES);
    let mut cluster = addresses(source, 3);
    if cluster.is_empty() {
        cluster = vec!["10.96.0.1", "fd00:96::1"];
    }
    let ports: Vec<Value> = source.several(4, |source| {
        json!({"name": source.pick(&NAMES), "protocol": source.pick(&PROTOCOLS),
               "port": number(source), "nodePort": number(source)})
    });
    let ingress: Vec<Value> = addresses(source, 3)
        .into_iter()
        .map(|ip| json!({"ip": ip, "ipMode": source.pick(&[Some("VIP"), None, Some("Proxy")])}))
        .collect();
    json!({
        "kind": "Service",
        "metadata": {
            "name": name, "namespace": "d", "uid": name,
            "creationTimestamp": format!("2026-01-01T00:00:0{}Z", source.below(3)),
        },
        "spec": {
            "type": source.pick(&KINDS), "clusterIP": cluster[0], "clusterIPs": cluster,
            "ipFamilies": source.several(2, |source| source.pick(&SLICE_FAMILIES)),
            "externalIPs": addresses(source, 3), "ports": ports,
            "internalTrafficPolicy": source.pick(&POLICIES),
            "externalTrafficPolicy": source.pick(&POLICIES),
            "sessionAffinity": source.pick(&["None", "ClientIP", ""]),
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": number(source)}},
            "loadBalancerSourceRanges": source.several(4, |source| source.pick(&RANGES)),
            "healthCheckNodePort": number(source),
            "publishNotReadyAddresses": source.flag(),
        },
        "status": {"loadBalancer": {"ingress": ingress}},
    })
}

fn number(source: &mut Source<'_>) -> i32 {
    if source.below(4) == 0 { source.pick(&NUMBERS) } else { NUMBERS[source.below(5)] }
}

fn slice_metadata(source: &mut Source<'_>) -> Value {
    let service = source.pick(&SERVICES);
    json!({"name": format!("{service}-{}", source.below(3)), "namespace": "d",
           "labels": {"kubernetes.io/service-name": source.pick(&[service, service, "a", ""])}})
}

fn slice(source: &mut Source<'_>) -> Value {
    let metadata = slice_metadata(source);
    let ports = source.several(4, |source| {
        json!({"name": source.pick(&NAMES), "protocol": source.pick(&PROTOCOLS),
               "port": number(source)})
    });
    let flag = |source: &mut Source<'_>| source.pick(&[None, Some(true), Some(false)]);
    let endpoints = source.several(12, |source| {
        let zones = source.several(2, |source| json!({"name": source.pick(&["zone-a", "zone-b"])}));
        let nodes = source.several(2, |source| json!({"name": source.pick(&["here", "there"])}));
        json!({
            "addresses": if source.below(4) == 0 {
                addresses(source, 2).into_iter().map(str::to_owned).collect()
            } else {
                vec![format!("10.244.{}.{}", source.below(3), source.below(5))]
            },
            "nodeName": source.pick(&[None, Some("here"), Some("there")]),
            "hints": {"forZones": zones, "forNodes": nodes},
            "conditions": {"ready": flag(source), "serving": flag(source),
                           "terminating": flag(source)},
        })
    });
    json!({"kind": "EndpointSlice", "metadata": metadata, "ports": ports, "endpoints": endpoints,
           "addressType": SLICE_FAMILIES[if source.below(4) == 0 { source.below(4) } else { 0 }]})
}

fn service_cidr(ranges: &[&str]) -> ServiceCIDR {
    read(&json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ranges}}))
}

fn read<K: DeserializeOwned>(object: &Value) -> K {
    serde_json::from_value(object.clone()).expect("objects are made as the API's types are")
}

/// All objects, as the loop has them.
struct World {
    objects: ServiceTable,
    desired: Desired,
}

impl World {
    fn new() -> Self {
        let addresses = NODE.iter().filter_map(|text| text.parse::<IpAddr>().ok());
        let node = ServiceRules {
            addresses: addresses.map(|a| (AddressSet::NodeAddresses, a)).collect(),
            ..ServiceRules::default()
        };
        let mut desired = Desired::default();
        desired.replace(&ObjectKey::default(), Some(node));
        Self { objects: ServiceTable::default(), desired }
    }

    /// Takes in all ranges of Services; what may have to be written.
    fn take_in_ranges(&mut self, texts: &[&str]) -> Vec<Unit> {
        let mut ranges = ServiceRanges::default();
        let problems = ranges.set(&service_cidr(texts));
        assert!(problems.iter().all(|problem| !problem.message.is_empty()));
        self.desired.set_service_ranges(ranges.all()).dirty
    }

    /// Takes in an object; what may have to be written.
    fn take_in(&mut self, object: &Value) -> Vec<Unit> {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let key = ObjectKey::new("d", name);
        let touched = if object["kind"] == "Service" {
            let (service, problems) = Service::read(&read(object));
            assert!(problems.iter().all(|problem| !problem.message.is_empty()));
            self.objects.set_service(&key, service);
            vec![key]
        } else {
            let place = Place { node: "here".into(), zone: Some("zone-a".into()) };
            self.objects.set_slice(&key, Slice::read(&read(object), &place).0)
        };
        let mut dirty = Vec::new();
        for key in touched {
            let rules = self.objects.rules(&key, &FAMILIES).map(|(rules, _)| rules);
            dirty.extend(self.desired.replace(&key, rules).dirty);
        }
        dirty.sort_unstable();
        dirty.dedup();
        dirty
    }
}

/// What must hold of every plan, whoever carries it out.
fn check_plan(config: &ProxyConfig, steps: &[Value]) {
    let of_kind = |kind: &str| -> Vec<&Value> {
        steps.iter().filter(|object| object["kind"] == kind).collect()
    };
    let objects = Objects {
        services: of_kind("Service").into_iter().map(read).collect(),
        slices: of_kind("EndpointSlice").into_iter().map(read).collect(),
        service_cidrs: vec![service_cidr(&RANGES)],
        node: None,
    };
    let node: Vec<IpAddr> = NODE.iter().filter_map(|text| text.parse().ok()).collect();
    for mode in [Mode::Nftables, Mode::Iptables, Mode::Userspace] {
        let (snapshot, _) = Snapshot::new(ProxyConfig { mode, ..config.clone() }, &objects);
        for unit in snapshot.desired.units() {
            let Unit::Frontend(frontend) = unit else { continue };
            assert_ne!(frontend.port, 0);
            assert_eq!(frontend.address.is_some(), frontend.lane.with_address());
            if let Some(address) = frontend.address {
                assert_eq!(Family::of(address), frontend.family);
                assert!(!address.is_loopback() && !address.is_multicast(), "{address}");
            }
            if let Some(Action::Forward { endpoints, .. }) = snapshot.desired.action(&frontend) {
                assert!(!endpoints.is_empty());
                assert!(endpoints.windows(2).all(|pair| pair[0] < pair[1]));
                for endpoint in endpoints.iter() {
                    assert_ne!(endpoint.port, 0);
                    assert_eq!(Family::of(endpoint.address), frontend.family);
                    assert!(!endpoint.address.is_loopback() && !endpoint.address.is_multicast());
                }
            }
            // The question that leads here has an answer.
            let packet = Packet {
                from: IpAddr::from([10, 244, 0, 9]),
                from_pod_here: true,
                to: frontend.address.unwrap_or(node[0]),
                port: frontend.port,
                protocol: Protocol::Tcp,
            };
            assert!(snapshot.explain(&packet).to_string().contains("verdict"));
        }
        let text = snapshot.rules();
        // A port's name may stand in a comment, but never ends a line or its quotes.
        assert!(!text.contains("\n-A INPUT -j ACCEPT"), "{text}");
        assert!(!text.contains("\"; flush ruleset"), "{text}");
        if mode == Mode::Iptables {
            iptables_takes(&snapshot);
        }
    }
}

fn iptables_takes(snapshot: &Snapshot) {
    let goal = Goal { desired: &snapshot.desired, objects: &snapshot.objects };
    for (family, program) in
        [(Family::V4, "iptables-nft-restore"), (Family::V6, "ip6tables-nft-restore")]
    {
        let text = crate::iptables::text(&start::settings(&snapshot.config, family), goal);
        run(program, &[], &text);
    }
}

/// Runs a program that has to succeed; what it printed.
fn run(program: &str, arguments: &[&str], input: &str) -> String {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program} can't be run: {error}"));
    let mut stdin = child.stdin.take().expect("it is a pipe");
    let output = std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input.as_bytes()));
        child.wait_with_output()
    });
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {said}\n{input}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
