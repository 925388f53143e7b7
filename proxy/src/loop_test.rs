//! The loop against a kernel: changes go in by its queue, packets and the kernel's tables tell what
//! came of them.

use std::{collections::HashSet, net::UdpSocket, time::Duration};

use keelson_api::{events::EventRecorder, object::ObjectKey};
use prometheus::Registry;
use serde_json::json;
use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    DetectLocal, Mode, ProxyConfig,
    conntrack::Cleaner,
    drift::Hearing,
    health::Health,
    metrics::Metrics,
    model::{
        Family,
        services::Service,
        slices::{Place, Slice},
    },
    netns::Namespace,
    proxier::{Proxier, Reports},
    until::{PATIENCE, until},
    watches::{Change, ChangeKind},
};

struct Running {
    queue: mpsc::Sender<Change>,
    registry: Registry,
    /// Ends what hears of others, which holds the queue too.
    _hearing: DropGuard,
    /// Runs out when the loop and its backends are gone.
    over: std::sync::mpsc::Receiver<()>,
}

/// Runs a loop in nftables mode in a namespace.
fn start(host: &Namespace) -> Running {
    start_in(host, Mode::Nftables)
}

/// Runs a loop of a mode, and what hears of others, in a namespace.
fn start_in(host: &Namespace, mode: Mode) -> Running {
    let (queue, changes) = mpsc::channel(100);
    let (registry, shutdown) = (Registry::new(), CancellationToken::new());
    let (end, over) = std::sync::mpsc::channel::<()>();
    let metrics = Metrics::for_mode(&registry, mode).unwrap();
    let hearing = Hearing {
        changes: queue.clone(),
        period: Duration::from_millis(50),
        failures: prometheus::IntCounter::new("failures", "Failures.").unwrap(),
        shutdown: shutdown.clone(),
    };
    host.run(move || {
        let config = ProxyConfig {
            mode,
            families: vec![Family::V4],
            detect_local: DetectLocal::Ranges(vec!["10.244.0.0/16".parse().unwrap()]),
            ..ProxyConfig::new("here")
        };
        let mut chosen = crate::start::choose(&config).unwrap();
        assert_eq!(chosen.mode, mode);
        let conntrack = Some(Cleaner::start(metrics.clone()).unwrap());
        let health = Health::new(&[Family::V4], Duration::from_secs(30));
        let reports = Reports { metrics, health, events: EventRecorder::discard(), conntrack };
        let backends = std::mem::take(&mut chosen.backends);
        let proxier = Proxier::new(backends, &[[192, 0, 2, 1].into()], reports);
        std::thread::spawn(move || {
            let _end = end;
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut tasks = JoinSet::new();
                crate::run::hear_others(&mut tasks, &mut chosen, &[Family::V4], hearing);
                proxier.run(changes).await;
                tasks.shutdown().await;
            });
        });
    });
    Running { queue, registry, _hearing: shutdown.drop_guard(), over }
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

    /// Waits until the first slice was taken in: what would be written is about to be.
    fn took_in_a_slice(&self) {
        let counted = "kubeproxy_sync_proxy_rules_endpoint_changes_total 1";
        until("the slice is taken in", || self.metric(counted));
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
    running.took_in_a_slice();
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

/// How a mode shows that the Service is served by this endpoint, and that it isn't served.
fn serves(host: &Namespace, mode: Mode, endpoint: u8) -> bool {
    let shows = |command: &str, text: &str| host.try_sh(command).1.contains(text);
    match mode {
        Mode::Nftables => has(host, &format!(". 0x00000000 : 10.244.{endpoint}.2 . 5353")),
        Mode::Iptables => {
            shows("iptables-save -t nat", &format!("--to-destination 10.244.{endpoint}.2:5353"))
                && shows("iptables-save -t nat", "-d 10.96.0.10/32")
        }
        Mode::Userspace => {
            shows("ip route show table local proto 75", "10.96.0.10")
                && shows("ss -lun", "10.96.0.10:53")
        }
    }
}

#[test]
fn every_mode_waits_for_the_list_mends_drift_follows_changes_and_ends() {
    for (mode, edit) in [
        (Mode::Nftables, "nft flush ruleset"),
        (Mode::Iptables, "iptables -t nat -F KUBE-SERVICES"),
        (Mode::Userspace, "ip route flush table local proto 75"),
    ] {
        let host = Namespace::new();
        let running = start_in(&host, mode);
        running.send(service());
        running.send(ChangeKind::Services(HashSet::from([ObjectKey::new("d", "dns")])));
        running.send(slice(&[1]));
        running.took_in_a_slice();
        assert!(!serves(&host, mode, 1), "{mode:?}: not before the slices are known");
        running.listed();
        until("the first sync", || serves(&host, mode, 1));
        host.sh(edit);
        until("drift is mended", || serves(&host, mode, 1));
        if mode != Mode::Userspace {
            until("it is counted", || running.metric("keelson_proxy_drift_total{cause="));
        }
        running.send(slice(&[2]));
        until("a change", || serves(&host, mode, 2));

        let Running { queue, _hearing, over, .. } = running;
        drop((queue, _hearing));
        let ended = over.recv_timeout(PATIENCE);
        assert_eq!(ended, Err(std::sync::mpsc::RecvTimeoutError::Disconnected), "{mode:?} ends");
        assert_eq!(serves(&host, mode, 2), mode != Mode::Userspace, "only relays take all away");
    }
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
