//! What only this backend has: its table in a kernel, element by element. What Services mean to
//! packets is tested for all backends in `packets/`.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use keelson_api::object::ObjectKey;
use serde_json::{Value, json};

use super::{
    apply::Table,
    monitor::Monitor,
    ruleset_test::{World, layouts, open, service, slices, table_name},
};
use crate::{
    backend::Applied,
    model::{Family, Protocol},
    netns::Namespace,
    ruleset::{Action, Frontend, Unit, desired::ServiceRules},
    until::{PATIENCE, until},
};

/// Everything between objects and the kernel.
struct Proxy {
    world: World,
    table: Table,
}

impl Proxy {
    fn start(host: &Namespace) -> Self {
        let mut proxy =
            Self { world: World::new(), table: open(host, &layouts(Family::V4).remove(0)) };
        let applied = proxy.table.synchronize(&proxy.world.desired).unwrap();
        assert!(applied.refused.is_empty() && applied.rebuilt.is_some(), "{applied:?}");
        proxy
    }

    fn apply(&mut self, objects: &[Value]) -> Applied {
        let dirty = self.world.take_in(objects);
        let applied = self.table.apply(&dirty, &self.world.desired).unwrap();
        assert!(applied.refused.is_empty() && applied.rebuilt.is_none(), "{applied:?}");
        self.table.forget(&applied.forget).unwrap();
        applied
    }
}

fn web() -> Value {
    service(1, json!({"ports": [{"port": 80}]}))
}

/// Endpoints, of which the odd ones are on this node.
fn endpoints(numbers: &[u8]) -> Vec<Value> {
    let endpoints: Vec<_> = numbers.iter().map(|n| (*n, true, n % 2 == 1)).collect();
    slices(1, &json!([{"port": 8080}]), &endpoints)
}

#[test]
fn a_change_writes_what_it_is() {
    let host = Namespace::new();
    let mut proxy = Proxy::start(&host);
    assert_eq!(proxy.apply(&[web()]).elements, 2, "its address, and that it has no endpoint");
    let first = proxy.apply(&endpoints(&[2, 4, 6])).elements;
    assert_eq!(first, 5, "three endpoints, their verdict, and the reject out");
    assert_eq!(proxy.apply(&endpoints(&[2, 8, 6])).elements, 2, "one endpoint out and in");
    let with_hairpin = proxy.apply(&endpoints(&[2, 1, 6])).elements;
    assert_eq!(with_hairpin, 3, "one that may be its own client is in another set too");
    assert_eq!(proxy.apply(&endpoints(&[6, 1, 2])).elements, 0, "another order is no change");
}

#[test]
fn what_clients_were_remembered_for_goes_with_it() {
    let host = Namespace::new();
    let mut proxy = Proxy::start(&host);
    let sticky =
        |affinity: &str| service(1, json!({"ports": [{"port": 80}], "sessionAffinity": affinity}));
    proxy.apply(&[sticky("ClientIP")]);
    proxy.apply(&endpoints(&[2, 4]));
    let affinity = format!("{} affinity", table_name(Family::V4));
    // As packets leave it: two clients.
    let remember = || {
        host.sh(&format!(
            "nft 'add element {affinity} {{ \
             192.0.2.2 . 10.96.0.1 . tcp . 80 timeout 1000s : 10.244.0.2 . 8080, \
             192.0.2.3 . 10.96.0.1 . tcp . 80 timeout 1000s : 10.244.0.4 . 8080 }}'"
        ));
    };
    let remembered = || {
        let listed = host.sh(&format!("nft list map {affinity}"));
        ["192.0.2.2 .", "192.0.2.3 ."].map(|client| listed.contains(client))
    };
    remember();
    assert_eq!(remembered(), [true, true]);
    proxy.apply(&endpoints(&[4]));
    assert_eq!(remembered(), [false, true], "an endpoint goes");
    proxy.apply(&[sticky("None")]);
    assert_eq!(remembered(), [false, false], "nobody is remembered any more");
}

#[test]
fn what_the_kernel_refuses_keeps_nobody_else_out() {
    let host = Namespace::new();
    let mut proxy = Proxy::start(&host);
    // A key of the wrong length, which no object can lead to.
    let wrong: IpAddr = "fd00::1".parse().unwrap();
    let bad = Frontend { family: Family::V4, ..Frontend::at(wrong, Protocol::Tcp, 80) };
    let rules = ServiceRules { frontends: vec![(bad, Action::Reject)], ..ServiceRules::default() };
    let mut dirty = proxy.world.desired.replace(&ObjectKey::new("d", "bad"), Some(rules)).dirty;
    let others: Vec<Value> =
        (1..=20).map(|n| service(n, json!({"ports": [{"port": 80}]}))).collect();
    dirty.extend(proxy.world.take_in(&others));
    let applied = proxy.table.apply(&dirty, &proxy.world.desired).unwrap();
    let [(unit, error)] = &applied.refused[..] else { panic!("{:?}", applied.refused) };
    assert_eq!(*unit, Unit::Frontend(bad));
    assert!(error.to_string().contains("no-endpoints"), "{error}");
    let listed = host.sh(&format!("nft list map {} no-endpoints", table_name(Family::V4)));
    assert_eq!(listed.matches("goto reject-at-once").count(), 20, "{listed}");
    // A later change of another Service goes in at once.
    let later = service(21, json!({"ports": [{"port": 80}]}));
    assert_eq!(proxy.apply(&[later]).elements, 2);
}

#[test]
fn the_monitor_hears_others_only() {
    let host = Namespace::new();
    let mut proxy = Proxy::start(&host);
    let writing = proxy.table.writing();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (heard, edited) = std::sync::mpsc::channel();
    let (go, started) = std::sync::mpsc::channel();
    host.run(move || {
        std::thread::spawn(move || {
            runtime.block_on(async {
                let mut monitor = Monitor::open(&[writing], vec![2]).unwrap();
                go.send(()).unwrap();
                while heard.send(monitor.heard().await.unwrap()).is_ok() {}
            });
        });
    });
    started.recv().unwrap();
    proxy.apply(&[web()]);
    host.sh("nft 'add table ip other; delete table ip other'");
    assert!(edited.recv_timeout(Duration::from_millis(200)).is_err(), "not ours, or our own");
    host.sh(&format!("nft 'delete table {}'", table_name(Family::V4)));
    edited.recv_timeout(PATIENCE).unwrap();
}

#[test]
fn a_removed_table_leaves_nothing() {
    let host = Namespace::new();
    let mut proxy = Proxy::start(&host);
    proxy.apply(&[web()]);
    for _ in 0..2 {
        proxy.table.remove().unwrap();
        assert_eq!(host.sh("nft list ruleset"), "");
    }
}

#[test]
fn remembered_choices_run_out_in_the_kernel() {
    let host = Namespace::new();
    host.sh("ip addr add 192.0.2.1/24 dev lo; ip addr add 10.244.0.1/24 dev lo; \
         ip route add 10.96.0.0/16 dev lo");
    let mut proxy = Proxy::start(&host);
    let sticky = |seconds: u32| {
        service(
            1,
            json!({"ports": [{"port": 80, "protocol": "UDP"}], "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}}}),
        )
    };
    let target = slices(1, &json!([{"port": 8080, "protocol": "UDP"}]), &[(1, true, true)]);
    proxy.apply(&target);
    let send = || {
        host.run(|| {
            let socket = std::net::UdpSocket::bind("192.0.2.1:0").unwrap();
            socket.send_to(b"?", "10.96.0.1:80").unwrap();
        });
    };
    let affinity = format!("nft list map {} affinity", table_name(Family::V4));
    let listed = || host.sh(&affinity);
    proxy.apply(&[sticky(1000)]);
    send();
    assert!(listed().contains("timeout 16m40s"), "{}", listed());
    // Another time counts from the client's next packet on.
    proxy.apply(&[sticky(1)]);
    let begin = Instant::now();
    send();
    until("the client is forgotten", || !listed().contains("192.0.2.1"));
    assert!(begin.elapsed() >= Duration::from_secs(1));
}
