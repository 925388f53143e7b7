//! Objects out of bytes: as people, tools and attackers write them.
//!
//! Each step has its own bytes, up to one that ends it, so that a byte more or less in one step
//! leaves all others as they were. Most choices are usual ones, or nothing would come of most
//! inputs: a Service whose ports no slice has never gets an endpoint.

use std::net::IpAddr;

use serde_json::{Value, json};

use super::source::Source;
use crate::{DetectLocal, Mode, NodePortAddresses, ProxyConfig};

/// Ends a step.
const END: u8 = 0xff;
/// More steps are not taken.
const STEPS: usize = 16;
/// The node's addresses to begin with; later ones are others.
const NODE: [&str; 2] = ["192.0.2.1", "2001:db8::1"];
const NODES: [&[&str]; 5] =
    [&NODE, &["192.0.2.1"], &["192.0.2.9", "2001:db8::9"], &["2001:db8::1"], &["10.96.0.1"]];

/// Addresses of each family that nothing is wrong with.
const USABLE: [[&str; 5]; 2] = [
    ["10.96.0.1", "10.96.0.2", "198.51.100.7", "192.0.2.1", "10.244.0.1"],
    ["fd00:96::1", "fd00:96::2", "2001:db8:51::7", "2001:db8::1", "fd00:10::1"],
];
const ADDRESSES: [&str; 29] = [
    "10.96.0.1",
    "fd00:96::1",
    "10.244.1.5",
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
    "0.0.0.1",
    "::ffff:10.0.0.1",
    "::10.0.0.1",
    "64:ff9b::10.0.0.1",
    "255.255.255.255",
    "240.0.0.1",
    "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    "None",
    "",
    " 10.0.0.1",
    "10.0.0.1/32",
    "not-an-address",
    "1.2.3.4.5",
    "例え",
];
const RANGES: [&str; 19] = [
    "192.0.2.0/25",
    "2001:db8::/64",
    "192.0.2.128/25",
    "192.0.2.64/26",
    "0.0.0.0/0",
    "::/0",
    "128.0.0.0/1",
    "0.0.0.0/1",
    "255.255.255.255/32",
    "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128",
    "0.0.0.0/32",
    "::/128",
    "::ffff:10.0.0.0/104",
    " 10.0.0.7/8 ",
    "10.0.0.0/99",
    "010.0.0.0/8",
    "10.0.0.1",
    "fe80::/10",
    "x",
];
const NUMBERS: [i32; 12] =
    [80, 443, 30_080, 30_081, 1, 0, -1, 65_535, 65_536, i32::MAX, i32::MIN, 8080];
/// What Services and slices agree on: name and protocol.
const PORTS: [(&str, &str); 5] =
    [("web", "TCP"), ("dns", "UDP"), ("", "TCP"), ("s", "SCTP"), ("it's", "TCP")];
const NAMES: [&str; 13] = [
    "web",
    "dns",
    "",
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
const SERVICES: [&str; 8] = ["a", "a", "a", "b", "b", "c", "c", "\"; flush ruleset; \""];
const PROTOCOLS: [Option<&str>; 6] =
    [Some("TCP"), Some("UDP"), Some("SCTP"), None, Some(""), Some("ICMP")];
const KINDS: [&str; 8] = [
    "LoadBalancer",
    "NodePort",
    "LoadBalancer",
    "ClusterIP",
    "NodePort",
    "ExternalName",
    "",
    "Other",
];
const POLICIES: [Option<&str>; 4] = [Some("Cluster"), Some("Local"), None, Some("Other")];
const FAMILIES: [&str; 4] = ["IPv4", "IPv6", "FQDN", ""];
/// Ready, serving and terminating, as they come.
const STATES: [[Option<bool>; 3]; 6] = [
    [None; 3],
    [Some(true), Some(true), Some(false)],
    [Some(false), Some(true), Some(true)],
    [Some(false), Some(false), Some(true)],
    [Some(false), Some(false), Some(false)],
    [Some(true), Some(true), Some(true)],
];

/// What the proxy is told.
#[derive(Clone, Debug)]
pub(super) enum Step {
    /// A Service or EndpointSlice as it is now.
    Is(Value),
    /// One of this kind and name is gone.
    Gone(&'static str, String),
    /// All ranges of Services' addresses.
    Ranges(Vec<&'static str>),
    /// The node's addresses and zone.
    Node(Vec<IpAddr>, Option<&'static str>),
}

/// What an input becomes.
#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) config: ProxyConfig,
    /// How many of the steps were before the proxy is started.
    pub(super) before: usize,
    pub(super) steps: Vec<Step>,
    /// Whether `iptables-restore` takes the rules too: programs take most of the time.
    pub(super) restore: bool,
}

impl Case {
    pub(super) fn read(data: &[u8]) -> Self {
        let mut steps = data.split(|byte| *byte == END);
        let mut source = Source::new(steps.next().unwrap_or_default());
        let config = config(&mut source);
        let (before, restore) = (source.below(8), source.below(4) == 0);
        let steps = steps.take(STEPS).map(|bytes| step(&mut Source::new(bytes)));
        Self { config, before, steps: steps.collect(), restore }
    }
}

fn parsed<T: std::str::FromStr>(texts: &[&str]) -> Vec<T> {
    texts.iter().filter_map(|text| text.parse().ok()).collect()
}

fn config(source: &mut Source<'_>) -> ProxyConfig {
    let detect_local = match source.below(5) {
        0 => DetectLocal::Ranges(parsed(&["10.244.0.0/16", "fd00:10::/64"])),
        1 => DetectLocal::Nothing,
        2 => DetectLocal::Interface("cni0".into()),
        3 => DetectLocal::InterfacePrefix("veth".into()),
        _ => DetectLocal::Ranges(parsed(&["0.0.0.0/0", "10.244.0.0/16", "10.245.0.0/24"])),
    };
    let node_port_addresses = match source.below(3) {
        0 => NodePortAddresses::Primary,
        1 => NodePortAddresses::Ranges(parsed(&["0.0.0.0/0", "::/0"])),
        _ => NodePortAddresses::Ranges(parsed(&["192.0.2.0/25", "2001:db8::/33", "127.0.0.0/8"])),
    };
    let masquerade_all = source.flag();
    let masquerade_bit = source.pick(&[14, 0, 31]);
    // For each change programs are run, for which netlink needs a hundredth of the time.
    let mode = if source.below(16) == 1 { Mode::Iptables } else { Mode::Nftables };
    let localhost_node_ports = source.flag();
    ProxyConfig {
        mode,
        node_ips: parsed(&NODE),
        detect_local,
        node_port_addresses,
        masquerade_all,
        masquerade_bit,
        localhost_node_ports,
        ..ProxyConfig::new("here")
    }
}

fn step(source: &mut Source<'_>) -> Step {
    match source.below(16) {
        0..6 => Step::Is(service(source)),
        6..12 => Step::Is(slice(source)),
        12 => Step::Ranges(source.several(4, |source| source.pick(&RANGES))),
        13 => Step::Gone("Service", source.pick(&SERVICES).to_owned()),
        14 => {
            let service = source.pick(&SERVICES);
            Step::Gone("EndpointSlice", slice_name(source, service))
        }
        _ => Step::Node(
            parsed(source.pick(&NODES)),
            source.pick(&[Some("zone-a"), Some("zone-b"), None]),
        ),
    }
}

/// Addresses of which most are usable.
fn addresses(source: &mut Source<'_>, most: usize) -> Vec<&'static str> {
    source.several(most, |source| match source.below(4) {
        0 => source.pick(&ADDRESSES),
        _ => {
            let family = source.pick(&USABLE);
            source.pick(&family)
        }
    })
}

/// Cluster addresses: of one family or both, or anything.
fn cluster_addresses(source: &mut Source<'_>) -> Vec<&'static str> {
    let which = source.below(2);
    match source.below(8) {
        0..4 => vec![USABLE[0][which], USABLE[1][which]],
        4 => vec![USABLE[0][which]],
        5 => vec![USABLE[1][which]],
        6 => vec![USABLE[1][which], USABLE[0][which]],
        _ => addresses(source, 3),
    }
}

fn number(source: &mut Source<'_>) -> i32 {
    if source.below(4) == 0 { source.pick(&NUMBERS) } else { NUMBERS[source.below(5)] }
}

/// The name and protocol of a port.
fn port(source: &mut Source<'_>) -> (&'static str, Option<&'static str>) {
    if source.below(8) == 7 {
        return (source.pick(&NAMES), source.pick(&PROTOCOLS));
    }
    let (name, protocol) = source.pick(&PORTS);
    (name, Some(protocol))
}

fn service(source: &mut Source<'_>) -> Value {
    let name = source.pick(&SERVICES);
    let ports: Vec<Value> = source.several(4, |source| {
        let (name, protocol) = port(source);
        json!({"name": name, "protocol": protocol, "port": number(source),
               "nodePort": number(source)})
    });
    let cluster = cluster_addresses(source);
    let ingress: Vec<Value> = addresses(source, 3)
        .into_iter()
        .map(|ip| json!({"ip": ip, "ipMode": source.pick(&[Some("VIP"), None, Some("Proxy")])}))
        .collect();
    let labels = match source.below(16) {
        15 => json!({"service.kubernetes.io/service-proxy-name": "other"}),
        _ => json!({}),
    };
    json!({
        "kind": "Service",
        "metadata": {
            "name": name, "namespace": "d", "uid": name, "labels": labels,
            "creationTimestamp": format!("2026-01-01T00:00:0{}Z", source.below(3)),
        },
        "spec": {
            "type": source.pick(&KINDS), "clusterIP": cluster.first(), "clusterIPs": cluster,
            "ipFamilies": source.several(2, |source| source.pick(&FAMILIES)),
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

fn slice_name(source: &mut Source<'_>, service: &str) -> String {
    format!("{service}-{}", source.below(3))
}

fn slice(source: &mut Source<'_>) -> Value {
    let service = source.pick(&SERVICES);
    let name = slice_name(source, service);
    let kind = source.below(8);
    let ports = source.several(4, |source| {
        let (name, protocol) = port(source);
        let number = if source.below(4) == 3 { number(source) } else { source.pick(&[8080, 9090]) };
        json!({"name": name, "protocol": protocol, "port": number})
    });
    let mut labels =
        json!({"kubernetes.io/service-name": source.pick(&[service, service, service, "a", ""])});
    if source.below(16) == 15 {
        labels["service.kubernetes.io/headless"] = "".into();
    }
    let family = match kind {
        0..4 => 0,
        4..7 => 1,
        _ => source.below(4),
    };
    let mut endpoints = source.several(12, |source| endpoint(source, family));
    if source.below(16) == 15 {
        let count = source.number() % 1_100;
        endpoints.extend((0..count).map(|n| {
            json!({"addresses": [pod(family, n / 200 + 3, n % 200)],
            "nodeName": if n % 3 == 0 { "here" } else { "there" }})
        }));
    }
    json!({"kind": "EndpointSlice", "addressType": FAMILIES[family], "ports": ports,
           "metadata": {"name": name, "namespace": "d", "labels": labels}, "endpoints": endpoints})
}

fn pod(family: usize, net: u16, n: u16) -> String {
    if family == 1 { format!("fd00:10::{net:x}:{n:x}") } else { format!("10.244.{net}.{n}") }
}

fn endpoint(source: &mut Source<'_>, family: usize) -> Value {
    let addresses = if source.below(8) == 7 {
        addresses(source, 2).into_iter().map(str::to_owned).collect()
    } else {
        let n = source.byte();
        vec![pod(family, u16::from(n / 5 % 3), u16::from(n % 5 + 1))]
    };
    let [ready, serving, terminating] = if source.below(8) == 7 {
        [(); 3].map(|()| source.pick(&[None, Some(true), Some(false)]))
    } else {
        source.pick(&STATES)
    };
    let names = |source: &mut Source<'_>, names: [&'static str; 2]| {
        source.several(2, |source| json!({"name": source.pick(&names)}))
    };
    json!({
        "addresses": addresses,
        "nodeName": source.pick(&[Some("here"), Some("there"), None]),
        "hints": {"forZones": names(source, ["zone-a", "zone-b"]),
                  "forNodes": names(source, ["here", "there"])},
        "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
    })
}
