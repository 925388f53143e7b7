//! Clients that open connections without pause, while everything else changes.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use serde_json::json;

use super::{
    backends::config,
    cluster::{Api, Running},
    features::{Own, Part, pod},
    fixture::{Addresses, Answer, From, Net, ask, listed, source},
};
use crate::{
    Mode, ProxyConfig,
    model::{Family, Protocol},
    until::until,
};

/// How long a client waits for its answer before it counts as failed.
const ANSWER: Duration = Duration::from_millis(900);
/// How long each of the following goes on.
const STRETCH: Duration = Duration::from_secs(2);
/// Connections between a foreign edit and its mending may fail; for no longer than this, on a
/// machine that does much else.
const MENDED: Duration = Duration::from_secs(5);

/// Clients use a port after the other from here on.
const FIRST_PORT: u16 = 11_000;

/// A connection that failed: when it began, and how.
#[derive(Clone, Debug)]
struct Failure {
    began: Instant,
    what: String,
}

/// Threads that connect and connect.
struct Load {
    stop: Arc<AtomicBool>,
    connections: Arc<AtomicUsize>,
    failures: Arc<Mutex<Vec<Failure>>>,
    threads: Vec<JoinHandle<()>>,
}

/// From where clients connect, and to what.
fn ways(own: Own) -> [(From, SocketAddr); 4] {
    let cluster = SocketAddr::new(own.cluster(), 80);
    let node_port = SocketAddr::new(own.addresses.node(), own.node_port());
    [
        (From::Client(1), cluster),
        (From::Client(2), node_port),
        (From::Pod(3), cluster),
        (From::Node, cluster),
    ]
}

impl Load {
    fn start(net: &Net, own: Own) -> Self {
        let mut load = Self {
            stop: Arc::default(),
            connections: Arc::default(),
            failures: Arc::default(),
            threads: Vec::new(),
        };
        for (from, to) in ways(own) {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                load.connect(net, from, protocol, to);
            }
        }
        load
    }

    fn connect(&mut self, net: &Net, from: From, protocol: Protocol, to: SocketAddr) {
        let (stop, connections, failures) =
            (Arc::clone(&self.stop), Arc::clone(&self.connections), Arc::clone(&self.failures));
        let mut source = source(from, to);
        // What was on its way when rules were missing stays untranslated in the kernel's memory
        // for minutes: no port is used twice.
        source.set_port(FIRST_PORT);
        let thread = net.place(from).run(move || {
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let began = Instant::now();
                    source.set_port(source.port() + 1);
                    let answer = ask(protocol, source, to, ANSWER);
                    connections.fetch_add(1, Ordering::Relaxed);
                    if !matches!(answer, Answer::By(..)) {
                        let what = format!("{from:?} to {protocol} {to}: {answer:?}");
                        failures.lock().unwrap().push(Failure { began, what });
                    }
                    // The others want to be heard too, and ports to be free again.
                    std::thread::sleep(Duration::from_millis(2));
                }
            })
        });
        self.threads.push(thread);
    }

    /// What failed of all that began since the last time; those under way are waited for.
    fn failures(&self) -> Vec<Failure> {
        let now = Instant::now();
        // A client gives up after that at the latest.
        std::thread::sleep(ANSWER + Duration::from_millis(100));
        let mut all = self.failures.lock().unwrap();
        let (before, later) = all.drain(..).partition(|failure| failure.began <= now);
        *all = later;
        before
    }

    fn stop(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().unwrap();
        }
        self.connections.load(Ordering::Relaxed)
    }
}

fn no_failures(what: &str, begin: Instant, failures: &[Failure]) {
    let mut kinds: BTreeMap<&str, Vec<Duration>> = BTreeMap::new();
    for failure in failures {
        kinds.entry(&failure.what).or_default().push(failure.began - begin);
    }
    assert!(kinds.is_empty(), "{what}: {kinds:#?}");
}

pub(super) fn rules_of(mode: Mode, family: Family) -> ProxyConfig {
    ProxyConfig { families: vec![family], sync_period: Duration::from_millis(200), ..config(mode) }
}

pub(super) fn start(net: &Net, api: &Api, mode: Mode, family: Family) -> Running {
    let running = Running::start(&net.host, rules_of(mode, family), api);
    until("the first sync", || {
        running.has_metric("kubeproxy_sync_full_proxy_rules_duration_seconds_count")
    });
    running
}

/// Edits of another program which make connections fail.
fn edits(mode: Mode, family: Family) -> Vec<String> {
    match mode {
        Mode::Nftables => {
            let table = if family == Family::V4 { "ip" } else { "ip6" };
            [
                "nft flush chain X nat-prerouting",
                "nft flush map X endpoints",
                "nft flush table X",
                "nft delete table X",
                "nft flush ruleset",
            ]
            .map(|edit| edit.replace('X', &format!("{table} keelson-proxy")))
            .into()
        }
        Mode::Iptables => {
            let program = if family == Family::V4 { "iptables" } else { "ip6tables" };
            [
                "RUN -t nat -F",
                "RUN -t nat -F KUBE-SERVICES",
                "printf '*nat\\nCOMMIT\\n' | RUN-restore",
            ]
            .map(|edit| edit.replace("RUN", program))
            .into()
        }
        Mode::Userspace => Vec::new(),
    }
}

everywhere!(connections_succeed_whatever_changes);

fn connections_succeed_whatever_changes(mode: Mode, family: Family) {
    let net = Net::new();
    let own = Own { addresses: Addresses(family), n: 1 };
    let api = Api::new();
    api.set(own.service(json!({"spec": {"type": "NodePort"}})));
    api.set(own.slice(0, &Part(8080, vec![pod(1), pod(2)])));
    let mut running = start(&net, &api, mode, family);
    let load = Load::start(&net, own);

    let begin = Instant::now();
    roll(&api, own);
    no_failures("endpoints roll", begin, &load.failures());

    // A relay's listeners end with it; rules stay.
    if mode != Mode::Userspace {
        let begin = Instant::now();
        for _ in 0..3 {
            running.stop();
            running = start(&net, &api, mode, family);
        }
        no_failures("the proxy is stopped and started", begin, &load.failures());
    }

    for other in others(mode).iter().copied() {
        let begin = Instant::now();
        for next in [other, mode] {
            running.stop();
            running = start(&net, &api, next, family);
            let left = if next == mode { other } else { mode };
            until("the other mode's rules go", || !in_force(&net, left, family));
        }
        no_failures(&format!("{} and back", other.as_str()), begin, &load.failures());
    }

    for edit in edits(mode, family) {
        let seen = running.count("keelson_proxy_drift_total");
        net.host.sh(&edit);
        let edited = Instant::now();
        until(&edit, || running.count("keelson_proxy_drift_total") > seen);
        // One change of the rules mends all: when every way is open again, it stays open.
        until(&edit, || ways(own).iter().all(|(from, to)| is_open(&net, *from, *to)));
        let mended = Instant::now();
        let took = mended - edited;
        assert!(took < MENDED, "{edit}: mended after {took:?}");
        // Nothing to wait for: so long connections are made, and none may fail.
        std::thread::sleep(Duration::from_millis(300));
        let mut failures = load.failures();
        failures.retain(|failure| failure.began >= mended);
        no_failures(&edit, mended, &failures);
    }
    let begin = Instant::now();
    // Nothing to wait for: so long connections are made, and none may fail.
    std::thread::sleep(Duration::from_millis(300));
    no_failures("all is mended", begin, &load.failures());

    let connections = load.stop();
    running.stop();
    // A client that got nowhere would prove nothing.
    assert!(connections > 1_000, "{connections} connections");
}

/// Whether a connection is answered, from a port that the kernel chooses.
fn is_open(net: &Net, from: From, to: SocketAddr) -> bool {
    matches!(net.ask_briefly(from, Protocol::Tcp, to), Answer::By(..))
}

/// Modes that this one is changed into, with rules that stay when the proxy stops.
fn others(mode: Mode) -> &'static [Mode] {
    match mode {
        Mode::Nftables => &[Mode::Iptables],
        Mode::Iptables => &[Mode::Nftables],
        Mode::Userspace => &[],
    }
}

/// Whether a mode's rules for the Service are there.
fn in_force(net: &Net, mode: Mode, family: Family) -> bool {
    let rules = listed(net, mode, family);
    rules.contains("KUBE-SVC-") || rules.contains("table ip")
}

/// Endpoints come and go, and at least one is always there.
fn roll(api: &Api, own: Own) {
    let deadline = Instant::now() + STRETCH;
    let sets: [&[u8]; 6] = [&[2, 4], &[4], &[1, 2, 4], &[1], &[1, 3], &[1, 2]];
    for set in sets.iter().cycle() {
        if Instant::now() >= deadline {
            return;
        }
        api.set(own.slice(0, &Part(8080, set.iter().map(|n| pod(*n)).collect())));
        std::thread::sleep(Duration::from_millis(10));
    }
}
