//! The loop against a kernel: changes go in by its queue, packets and the kernel's tables tell what
//! came of them.

use std::{
    collections::HashSet,
    net::UdpSocket,
    time::{Duration, Instant},
};

use keelson_api::{events::EventRecorder, object::ObjectKey};
use prometheus::Registry;
use serde_json::json;
use tokio::sync::mpsc;

use crate::{
    DetectLocal, ProxyConfig,
    conntrack::Cleaner,
    health::Health,
    metrics::Metrics,
    model::{
        Family,
        objects::{Place, Service, Slice},
    },
    netns::Namespace,
    nftables::{apply::Table, monitor::Monitor},
    proxier::{Proxier, Reports},
    watches::{Change, ChangeKind},
};

const PATIENCE: Duration = Duration::from_secs(5);

struct Running {
    queue: mpsc::Sender<Change>,
    registry: Registry,
}

/// Runs a loop, with its monitor, in a namespace.
fn start(host: &Namespace) -> Running {
    let (queue, changes) = mpsc::channel(100);
    let registry = Registry::new();
    let (monitored, metrics) = (queue.downgrade(), Metrics::register(&registry).unwrap());
    host.run(move || {
        let config = ProxyConfig {
            detect_local: DetectLocal::Ranges(vec!["10.244.0.0/16".parse().unwrap()]),
            ..ProxyConfig::new("here")
        };
        let table = Table::open(crate::layout(&config, Family::V4)).unwrap();
        let conntrack = Some(Cleaner::start(metrics.clone()).unwrap());
        let health = Health::default();
        let reports = Reports { metrics, health, events: EventRecorder::discard(), conntrack };
        let writing = table.writing();
        let proxier = Proxier::new(vec![Box::new(table)], &[[192, 0, 2, 1].into()], reports);
        std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut monitor = Monitor::open(&[writing], vec![2]).unwrap();
                tokio::spawn(async move {
                    while monitor.heard().await.is_ok() {
                        let Some(queue) = monitored.upgrade() else { return };
                        let _ = queue.send(ChangeKind::Drift("edit").into()).await;
                    }
                });
                proxier.run(changes).await;
            });
        });
    });
    Running { queue, registry }
}

impl Running {
    fn send(&self, kind: ChangeKind) {
        self.queue.blocking_send(kind.into()).unwrap();
    }

    fn listed(&self) {
        let key = || HashSet::from([ObjectKey::new("d", "dns")]);
        self.send(ChangeKind::Services(key()));
        self.send(ChangeKind::Slices(HashSet::from([ObjectKey::new("d", "dns-1")])));
    }

    fn metric(&self, line: &str) -> bool {
        keelson_api::metrics::encode(&self.registry).unwrap().contains(line)
    }
}

fn service() -> ChangeKind {
    let object = json!({"metadata": {"name": "dns", "namespace": "d"}, "spec": {
        "clusterIP": "10.96.0.10", "type": "NodePort",
        "ports": [{"port": 53, "protocol": "UDP", "nodePort": 30053}]}});
    let (service, problems) = Service::read(&serde_json::from_value(object).unwrap());
    ChangeKind::Service(ObjectKey::new("d", "dns"), service, problems)
}

fn slice(endpoints: &[u8]) -> ChangeKind {
    let endpoints: Vec<_> =
        endpoints.iter().map(|n| json!({"addresses": [format!("10.244.{n}.2")]})).collect();
    let object = json!({"addressType": "IPv4", "endpoints": endpoints,
        "metadata": {"name": "dns-1", "namespace": "d", "labels": {"kubernetes.io/service-name": "dns"},
            "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": jiff::Timestamp::now().to_string()}},
        "ports": [{"port": 5353, "protocol": "UDP"}]});
    let (slice, problems) = Slice::read(
        &serde_json::from_value(object).unwrap(),
        &Place { node: "here".into(), zone: None },
    );
    ChangeKind::Slice(ObjectKey::new("d", "dns-1"), slice, problems)
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn has(host: &Namespace, text: &str) -> bool {
    host.try_sh("nft list table ip keelson-proxy").1.contains(text)
}

#[test]
fn nothing_is_written_before_everything_was_listed_and_drift_is_mended() {
    let host = Namespace::new();
    let running = start(&host);
    running.send(service());
    running.send(ChangeKind::Services(HashSet::from([ObjectKey::new("d", "dns")])));
    running.send(slice(&[1]));
    assert!(!has(&host, "keelson-proxy {"), "not before the slices are known");
    running.send(ChangeKind::Slices(HashSet::from([ObjectKey::new("d", "dns-1")])));
    until("the first sync", || has(&host, "10.96.0.10 . udp . 53 : goto endpoints-1"));

    for edit in ["flush ruleset", "flush map ip keelson-proxy services"] {
        host.sh(&format!("nft {edit}"));
        until(edit, || has(&host, "10.96.0.10 . udp . 53 : goto endpoints-1"));
    }
    until("it is counted", || running.metric("keelson_proxy_drift_total{cause=\"edit\"} "));

    running.send(slice(&[1, 2]));
    until("a change", || has(&host, "10.96.0.10 . udp . 53 : goto endpoints-2"));
    until("its latency is measured", || {
        running.metric("kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"} 1")
    });

    // What is not in a new list is gone.
    running.send(ChangeKind::Services(HashSet::new()));
    until("the service is gone", || !has(&host, "10.96.0.10"));

    // The rules stay.
    running.send(service());
    until("it is back", || has(&host, "10.96.0.10"));
    drop(running);
    assert!(has(&host, "10.96.0.10"));
}

#[test]
fn udp_clients_that_never_pause_follow_their_service() {
    let (host, client) = (Namespace::new(), Namespace::new());
    host.sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv4.icmp_ratelimit=0");
    host.join("client", &client, "eth0");
    host.sh("ip addr add 192.0.2.1/24 dev client; ip link add up0 type veth peer name up1; \
             ip link set up0 up; ip link set up1 up; ip addr add 203.0.113.1/24 dev up0; \
             ip route add default via 203.0.113.2");
    client.sh("ip addr add 192.0.2.2/24 dev eth0; ip route add default via 192.0.2.1");
    let endpoints = [1u8, 2].map(|n| {
        let endpoint = Namespace::new();
        host.join(&format!("pod{n}"), &endpoint, "eth0");
        host.sh(&format!("ip addr add 10.244.{n}.1/24 dev pod{n}"));
        endpoint.sh(&format!(
            "ip addr add 10.244.{n}.2/24 dev eth0; ip route add default via 10.244.{n}.1"
        ));
        endpoint.run(move || {
            let socket = UdpSocket::bind("0.0.0.0:5353").unwrap();
            std::thread::spawn(move || {
                let mut buffer = [0; 16];
                while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
                    let _ = socket.send_to(&[n], peer);
                }
            });
        });
        endpoint
    });
    for to in ["10.96.0.10:53", "192.0.2.1:30053"] {
        let running = start(&host);
        running.send(service());
        running.send(slice(&[]));
        running.listed();
        until("the first sync", || has(&host, "goto reject-at-once"));
        // One socket all along: to the kernel it is one flow.
        let socket = client.run(move || {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            socket.connect(to).unwrap();
            socket
        });
        let ask = || {
            let mut answer = [0; 16];
            // Refusals of earlier datagrams are told on the next call.
            let _ = socket.send(b"?");
            socket.recv(&mut answer).ok().map(|_| answer[0])
        };
        assert_eq!(ask(), None);
        running.send(slice(&[1]));
        until("from none to one", || ask() == Some(1));
        running.send(slice(&[2]));
        until("from one to another", || ask() == Some(2));
        running.send(slice(&[]));
        until("from one to none", || ask().is_none() && ask().is_none());
        drop(running);
    }
    drop(endpoints);
}
