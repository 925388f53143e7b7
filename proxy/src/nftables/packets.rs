//! The table in a kernel, with packets: each test has network namespaces of its own.
//!
//! ```text
//!   client 192.0.2.2 ── host 192.0.2.1, 10.244.N.1 ── endpoint N 10.244.N.2
//! ```

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use keelson_api::object::ObjectKey;
use serde_json::{Value, json};

use super::{apply::Table, golden::layout};
use crate::{
    backend::Applied,
    model::{
        Family, Protocol,
        objects::{Place, Service, Slice},
        table::ServiceTable,
    },
    netns::Namespace,
    ruleset::{
        Action, AddressSet, Frontend, Lane, Unit,
        desired::{Desired, ServiceRules},
    },
};

const PATIENCE: Duration = Duration::from_secs(5);

/// Everything between objects and the kernel.
struct Proxy {
    objects: ServiceTable,
    desired: Desired,
    table: Table,
}

impl Proxy {
    fn start(host: &Namespace) -> Self {
        let table = host.run(|| Table::open(layout(Family::V4)).unwrap());
        let mut proxy =
            Self { objects: ServiceTable::default(), desired: Desired::default(), table };
        let node = ServiceRules {
            created: 0,
            frontends: vec![],
            addresses: vec![(AddressSet::NodeAddresses, [192, 0, 2, 1].into())],
        };
        proxy.desired.replace(&ObjectKey::new("", "node"), Some(node));
        proxy
    }

    fn apply(&mut self, object: Value) -> Applied {
        let key = ObjectKey::new(
            object["metadata"]["namespace"].as_str().unwrap(),
            object["metadata"]["name"].as_str().unwrap(),
        );
        let touched = if object["kind"] == "Service" {
            let (service, problems) = Service::read(&serde_json::from_value(object).unwrap());
            assert_eq!(problems, []);
            self.objects.set_service(&key, service);
            vec![key]
        } else {
            let (slice, problems) = Slice::read(
                &serde_json::from_value(object).unwrap(),
                &Place { node: "here".into(), zone: None },
            );
            assert_eq!(problems, []);
            self.objects.set_slice(&key, slice)
        };
        let mut dirty: Vec<Unit> = Vec::new();
        for key in touched {
            let rules = self.objects.rules(&key, &[Family::V4]).map(|(rules, _)| rules);
            dirty.extend(self.desired.replace(&key, rules).dirty);
        }
        let applied = self.table.apply(&dirty, &self.desired).unwrap();
        assert!(applied.refused.is_empty(), "{:?}", applied.refused);
        self.table.forget(&applied.forget).unwrap();
        applied
    }

    fn synchronize(&mut self) -> Applied {
        let applied = self.table.synchronize(&self.desired).unwrap();
        assert!(applied.refused.is_empty(), "{:?}", applied.refused);
        applied
    }
}

fn service(name: &str, mut spec: Value) -> Value {
    if spec["ports"].is_null() {
        spec["ports"] = json!([{"port": 80, "protocol": "TCP"}]);
    }
    json!({"kind": "Service", "metadata": {"name": name, "namespace": "d"}, "spec": spec})
}

/// A slice whose endpoints are `10.244.N.2`, on this node if N is odd.
fn slice(name: &str, protocol: &str, endpoints: &[u8]) -> Value {
    let endpoints: Vec<Value> = endpoints
        .iter()
        .map(|n| {
            let node = if n % 2 == 1 { "here" } else { "there" };
            json!({"addresses": [format!("10.244.{n}.2")], "nodeName": node})
        })
        .collect();
    json!({
        "kind": "EndpointSlice", "addressType": "IPv4", "endpoints": endpoints,
        "metadata": {"name": format!("{name}-1"), "namespace": "d", "labels": {"kubernetes.io/service-name": name}},
        "ports": [{"port": 8080, "protocol": protocol}],
    })
}

/// A host with a way out, a client and endpoints that answer with their number and the client's address.
struct Net {
    host: Namespace,
    client: Namespace,
    endpoints: Vec<Namespace>,
}

impl Net {
    fn new(endpoints: u8) -> Self {
        let (host, client) = (Namespace::new(), Namespace::new());
        host.sh("sysctl -qw net.ipv4.ip_forward=1");
        host.join("client", &client, "eth0");
        host.sh("ip addr add 192.0.2.1/24 dev client");
        // A way out of its own: sent back where it came from, a packet would be answered with a
        // redirect, which counts against the limit of ICMP answers.
        host.sh(
            "ip link add up0 type veth peer name up1; ip link set up0 up; ip link set up1 up; \
                 ip addr add 203.0.113.1/24 dev up0; ip route add default via 203.0.113.2",
        );
        client.sh("ip addr add 192.0.2.2/24 dev eth0; ip route add default via 192.0.2.1");
        let endpoints = (1..=endpoints)
            .map(|n| {
                let endpoint = Namespace::new();
                host.join(&format!("pod{n}"), &endpoint, "eth0");
                host.sh(&format!("ip addr add 10.244.{n}.1/24 dev pod{n}"));
                endpoint.sh(&format!(
                    "ip addr add 10.244.{n}.2/24 dev eth0; ip route add default via 10.244.{n}.1"
                ));
                endpoint.run(move || serve(n));
                endpoint
            })
            .collect();
        Self { host, client, endpoints }
    }
}

fn serve(n: u8) {
    let listener = TcpListener::bind("0.0.0.0:8080").unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut stream = stream;
            let _ = write!(stream, "{n} {}", stream.peer_addr().unwrap().ip());
        }
    });
    let socket = UdpSocket::bind("0.0.0.0:8080").unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 100];
        while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(format!("{n} {}", peer.ip()).as_bytes(), peer);
        }
    });
}

/// One connection: who answered, and whose address it saw.
fn connect(from: &Namespace, to: &str) -> Result<(u8, IpAddr), std::io::ErrorKind> {
    let to: SocketAddr = to.parse().unwrap();
    from.run(move || {
        let mut stream =
            TcpStream::connect_timeout(&to, Duration::from_millis(700)).map_err(|e| e.kind())?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).map_err(|e| e.kind())?;
        Ok(parse(&text))
    })
}

fn parse(text: &str) -> (u8, IpAddr) {
    let (n, address) = text.split_once(' ').unwrap();
    (n.parse().unwrap(), address.parse().unwrap())
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn every_rule_can_be_listed_and_a_restart_writes_nothing() {
    let host = Namespace::new();
    let mut proxy = Proxy::start(&host);
    assert!(proxy.synchronize().rebuilt.is_some());
    proxy.apply(service(
        "a",
        json!({"clusterIP": "10.96.0.1", "type": "NodePort",
        "ports": [{"port": 80, "nodePort": 30080}]}),
    ));
    proxy.apply(slice("a", "TCP", &[1, 2, 3]));
    proxy.apply(service(
        "b",
        json!({"clusterIP": "10.96.0.2", "type": "NodePort",
        "externalTrafficPolicy": "Local", "ports": [{"port": 80, "nodePort": 30081}]}),
    ));
    proxy.apply(slice("b", "TCP", &[1, 2, 4, 6, 8, 10, 12, 14, 16, 18]));
    proxy.apply(service("c", json!({"clusterIP": "10.96.0.3"})));
    let listed = host.sh("nft list ruleset");
    for text in [
        "table ip keelson-proxy",
        "dnat ip to ip daddr . meta l4proto . th dport . numgen random mod 3 map @endpoints",
        "10.96.0.2 . tcp . 80 : goto endpoints-10",
        "tcp . 30080 : goto nodeport-3",
        "tcp . 30081 : goto nodeport-local-1",
        "tcp . 30081 : goto nodeport-inside-10",
        "10.96.0.3 . tcp . 80 : goto reject-at-once",
        "ip saddr != 10.244.0.0/16",
        "10.244.1.2 . 10.244.1.2",
        "reject with tcp reset",
    ] {
        assert!(listed.contains(text), "{text} isn't in:\n{listed}");
    }

    let before = host.sh("nft -s list ruleset");
    let mut again = Proxy::start(&host);
    again.objects = proxy.objects;
    again.desired = proxy.desired;
    let applied = again.synchronize();
    assert_eq!((applied.elements, applied.rebuilt), (0, None));
    assert_eq!(host.sh("nft -s list ruleset"), before);

    again.table.remove().unwrap();
    assert_eq!(host.sh("nft list ruleset"), "");
    again.table.remove().unwrap();
}

#[test]
fn connections_are_spread_evenly_and_follow_changes() {
    let net = Net::new(3);
    let mut proxy = Proxy::start(&net.host);
    proxy.apply(service("web", json!({"clusterIP": "10.96.0.1"})));
    proxy.apply(slice("web", "TCP", &[1, 2, 3]));
    let mut counts: BTreeMap<u8, u32> = BTreeMap::new();
    for _ in 0..300 {
        let (n, seen) = connect(&net.client, "10.96.0.1:80").unwrap();
        *counts.entry(n).or_default() += 1;
        // What comes from outside the pods' range is masqueraded.
        assert_eq!(seen, ip(&format!("10.244.{n}.1")));
    }
    // 100 of each are expected with a deviation of 8.2; 5 of these are a failure in a million.
    assert!(counts.len() == 3 && counts.values().all(|n| (59..=141).contains(n)), "{counts:?}");

    // From the host itself, from a pod to another one, and from a pod to itself.
    assert!(connect(&net.host, "10.96.0.1:80").is_ok());
    proxy.apply(slice("web", "TCP", &[2]));
    assert_eq!(connect(&net.endpoints[0], "10.96.0.1:80"), Ok((2, ip("10.244.1.2"))));
    proxy.apply(slice("web", "TCP", &[1]));
    assert_eq!(connect(&net.endpoints[0], "10.96.0.1:80"), Ok((1, ip("10.244.1.1"))), "hairpin");

    // Endpoints come and go, one element at a time.
    let applied = proxy.apply(slice("web", "TCP", &[3]));
    assert_eq!(applied.elements, 4, "one endpoint and its hairpin out and in, the verdict stays");
    assert_eq!(connect(&net.client, "10.96.0.1:80").map(|(n, _)| n), Ok(3));
}

#[test]
fn what_has_no_endpoint_is_refused_at_once() {
    let net = Net::new(1);
    let mut proxy = Proxy::start(&net.host);
    proxy.apply(service("web", json!({"clusterIP": "10.96.0.1", "type": "NodePort",
        "ports": [{"port": 80, "nodePort": 30080}, {"port": 53, "protocol": "UDP", "name": "dns"}]})));
    let refused = Err(std::io::ErrorKind::ConnectionRefused);
    for (from, to) in [
        (&net.client, "10.96.0.1:80"),
        (&net.host, "10.96.0.1:80"),
        (&net.client, "192.0.2.1:30080"),
        (&net.host, "192.0.2.1:30080"),
        (&net.endpoints[0], "10.96.0.1:80"),
        // A port that no service has.
        (&net.client, "10.96.0.1:81"),
        (&net.host, "10.96.0.1:81"),
    ] {
        assert_eq!(connect(from, to), refused, "{to}");
    }
    let udp = net.client.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.connect("10.96.0.1:53").unwrap();
        socket.send(b"?").unwrap();
        socket.recv(&mut [0; 10]).map_err(|e| e.kind())
    });
    assert_eq!(udp, Err(std::io::ErrorKind::ConnectionRefused));
    proxy.apply(slice("web", "TCP", &[1]));
    assert!(connect(&net.client, "10.96.0.1:80").is_ok());
}

#[test]
fn node_ports_answer_on_the_nodes_addresses_and_keep_to_their_policy() {
    let net = Net::new(2);
    let mut proxy = Proxy::start(&net.host);
    let spec = |policy| {
        json!({"clusterIP": "10.96.0.1", "type": "NodePort", "externalTrafficPolicy": policy,
               "ports": [{"port": 80, "nodePort": 30080}]})
    };
    proxy.apply(service("web", spec("Cluster")));
    proxy.apply(slice("web", "TCP", &[2]));
    assert_eq!(connect(&net.client, "192.0.2.1:30080"), Ok((2, ip("10.244.2.1"))));
    assert_eq!(connect(&net.host, "192.0.2.1:30080").map(|(n, _)| n), Ok(2));
    // Only the node's primary addresses answer.
    assert!(connect(&net.endpoints[0], "10.244.1.1:30080").is_err());
    assert!(connect(&net.host, "127.0.0.1:30080").is_err());

    // Local: outside sees local endpoints only and keeps its address, inside sees all.
    proxy.apply(service("web", spec("Local")));
    assert_eq!(connect(&net.client, "192.0.2.1:30080"), Err(std::io::ErrorKind::TimedOut));
    assert_eq!(connect(&net.endpoints[0], "192.0.2.1:30080"), Ok((2, ip("10.244.1.2"))));
    assert_eq!(connect(&net.host, "192.0.2.1:30080").map(|(n, _)| n), Ok(2));
    proxy.apply(slice("web", "TCP", &[1, 2]));
    for _ in 0..8 {
        assert_eq!(connect(&net.client, "192.0.2.1:30080"), Ok((1, ip("192.0.2.2"))));
    }
}

#[test]
fn sticky_clients_return_while_their_endpoint_is_there() {
    let net = Net::new(3);
    let mut proxy = Proxy::start(&net.host);
    let spec = |affinity, timeout| {
        json!({"clusterIP": "10.96.0.1", "type": "NodePort", "sessionAffinity": affinity,
               "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": timeout}},
               "ports": [{"port": 80, "nodePort": 30080}]})
    };
    proxy.apply(service("web", spec("ClientIP", 1000)));
    proxy.apply(slice("web", "TCP", &[1, 2, 3]));
    for to in ["10.96.0.1:80", "192.0.2.1:30080"] {
        let (first, _) = connect(&net.client, to).unwrap();
        for _ in 0..15 {
            assert_eq!(connect(&net.client, to).map(|(n, _)| n), Ok(first), "{to}");
        }
    }
    let listed = net.host.sh("nft list ruleset");
    for text in [
        "10.96.0.1 . tcp . 80 : goto sticky-endpoints-3",
        "10.96.0.1 . tcp . 80 : goto remember-1000",
        "update @affinity { ct original ip saddr . ct original ip daddr",
    ] {
        assert!(listed.contains(text), "{text} isn't in:\n{listed}");
    }

    // When its endpoint goes the client gets another one and stays there.
    let (first, _) = connect(&net.client, "10.96.0.1:80").unwrap();
    let others: Vec<u8> = (1..=3).filter(|n| *n != first).collect();
    proxy.apply(slice("web", "TCP", &others));
    let (second, _) = connect(&net.client, "10.96.0.1:80").unwrap();
    assert_ne!(second, first);
    proxy.apply(slice("web", "TCP", &[1, 2, 3]));
    for _ in 0..15 {
        assert_eq!(connect(&net.client, "10.96.0.1:80").map(|(n, _)| n), Ok(second));
    }

    // The time can be changed, and runs out.
    proxy.apply(service("web", spec("ClientIP", 1)));
    let remembered = || net.host.sh("nft list map ip keelson-proxy affinity").contains("elements");
    connect(&net.client, "10.96.0.1:80").unwrap();
    let deadline = Instant::now() + PATIENCE;
    net.host.sh("nft flush map ip keelson-proxy affinity");
    connect(&net.client, "10.96.0.1:80").unwrap();
    assert!(remembered());
    while remembered() {
        assert!(Instant::now() < deadline, "a second is long over");
        std::thread::sleep(Duration::from_millis(50));
    }
    connect(&net.client, "10.96.0.1:80").unwrap();
    proxy.apply(service("web", spec("None", 1)));
    assert!(!remembered());
}

#[test]
fn an_edit_by_another_program_is_mended() {
    let host = Namespace::new();
    let mut proxy = Proxy::start(&host);
    proxy.apply(service("web", json!({"clusterIP": "10.96.0.1"})));
    proxy.apply(slice("web", "TCP", &[1, 2, 3]));
    let before = host.sh("nft -s list ruleset");
    for edit in [
        "flush ruleset",
        "delete element ip keelson-proxy endpoints { 10.96.0.1 . tcp . 80 . 0x00000000 }",
        "add element ip keelson-proxy endpoints { 10.96.0.1 . tcp . 80 . 0x00000007 : 10.0.0.1 . 80 }",
        "add element ip keelson-proxy services { 10.96.0.9 . tcp . 80 : drop }",
        "flush chain ip keelson-proxy endpoints-3",
        "add rule ip keelson-proxy nat-output accept",
        "add chain ip keelson-proxy intruder",
        "delete table ip keelson-proxy",
    ] {
        host.sh(&format!("nft '{edit}'"));
        proxy.synchronize();
        let after = host.sh("nft -s list ruleset");
        assert_eq!(sorted(&after), sorted(&before), "{edit}");
    }
}

fn sorted(listing: &str) -> Vec<&str> {
    let mut words: Vec<&str> =
        listing.split([' ', '\n', '\t', ',']).filter(|w| !w.is_empty()).collect();
    words.sort_unstable();
    words
}

#[test]
fn what_the_kernel_refuses_keeps_nobody_else_out() {
    let host = Namespace::new();
    let mut proxy = Proxy::start(&host);
    // A key of the wrong length, which no object can lead to.
    let bad = Frontend {
        family: Family::V4,
        lane: Lane::Address,
        address: Some(ip("fd00::1")),
        protocol: Protocol::Tcp,
        port: 80,
    };
    let rules =
        ServiceRules { created: 0, frontends: vec![(bad, Action::Reject)], addresses: vec![] };
    let mut dirty = proxy.desired.replace(&ObjectKey::new("d", "bad"), Some(rules)).dirty;
    for n in 1..=20u8 {
        let key = ObjectKey::new("d", n.to_string());
        let object = service(&key.name, json!({"clusterIP": format!("10.96.0.{n}")}));
        let (service, _) = Service::read(&serde_json::from_value(object).unwrap());
        proxy.objects.set_service(&key, service);
        let (rules, _) = proxy.objects.rules(&key, &[Family::V4]).unwrap();
        dirty.extend(proxy.desired.replace(&key, Some(rules)).dirty);
    }
    let applied = proxy.table.apply(&dirty, &proxy.desired).unwrap();
    let [(unit, error)] = &applied.refused[..] else { panic!("{:?}", applied.refused) };
    assert_eq!(*unit, Unit::Frontend(bad));
    assert!(error.to_string().contains("no-endpoints"), "{error}");
    let listed = host.sh("nft list map ip keelson-proxy no-endpoints");
    assert_eq!(listed.matches("goto reject-at-once").count(), 20, "{listed}");
    // A later change of another Service goes in at once.
    let later = proxy.apply(service("later", json!({"clusterIP": "10.96.1.1"})));
    assert_eq!(later.elements, 2);
}

#[test]
fn the_monitor_hears_others_only() {
    let host = Namespace::new();
    let mut proxy = Proxy::start(&host);
    proxy.synchronize();
    let writing = proxy.table.writing();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (heard, edited) = std::sync::mpsc::channel();
    let (go, started) = std::sync::mpsc::channel();
    host.run(move || {
        std::thread::spawn(move || {
            runtime.block_on(async {
                let mut monitor = super::monitor::Monitor::open(&[writing], vec![2]).unwrap();
                go.send(()).unwrap();
                loop {
                    heard.send(monitor.heard().await.unwrap()).unwrap();
                }
            });
        });
    });
    started.recv().unwrap();
    proxy.apply(service("web", json!({"clusterIP": "10.96.0.1"})));
    host.sh("nft 'add table ip other; delete table ip other'");
    assert!(edited.recv_timeout(Duration::from_millis(200)).is_err(), "not ours, or our own");
    let begin = Instant::now();
    host.sh("nft 'delete table ip keelson-proxy'");
    edited.recv_timeout(PATIENCE).unwrap();
    assert!(begin.elapsed() < PATIENCE);
}

#[test]
fn connections_older_than_the_rules_live_on() {
    // A node that reaches, at its own address, what is an endpoint too: its API server.
    let host = Namespace::new();
    host.sh("ip addr add 192.0.2.1/24 dev lo");
    let mut older = host.run(|| {
        let listener = TcpListener::bind("192.0.2.1:6443").unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut byte = [0];
            while stream.read_exact(&mut byte).and_then(|()| stream.write_all(&byte)).is_ok() {}
        });
        let stream = TcpStream::connect("192.0.2.1:6443").unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    });
    let mut exchange = |say: u8| {
        let mut heard = [0];
        older.write_all(&[say]).and_then(|()| older.read_exact(&mut heard)).map(|()| heard[0])
    };
    assert_eq!(exchange(1).unwrap(), 1);
    let mut proxy = Proxy::start(&host);
    proxy.apply(service("api", json!({"clusterIP": "10.96.0.1"})));
    let mut own = slice("api", "TCP", &[1]);
    own["endpoints"] = json!([{"addresses": ["192.0.2.1"]}]);
    own["ports"] = json!([{"port": 6443, "protocol": "TCP"}]);
    proxy.synchronize();
    proxy.apply(own);
    assert_eq!(exchange(2).unwrap(), 2, "the kernel hears of the connection in its middle");
}
