//! Chains in a kernel: made before they are used, and gone after their use.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{
    apply::Table,
    ruleset_test::{World, layouts, open, service, slices, table_name},
};
use crate::{model::Family, netns::Namespace};

fn chains(host: &Namespace) -> BTreeSet<String> {
    let listed = host.sh(&format!("nft list table {}", table_name(Family::V4)));
    let chains = listed.lines().filter_map(|line| line.trim().strip_prefix("chain "));
    chains.map(str::to_owned).collect()
}

/// A sticky Service with a node port, an external address and so many endpoints.
fn sticky(n: u8, endpoints: u8, seconds: u32) -> Vec<Value> {
    let spec = json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30_000 + u32::from(n)}],
        "externalIPs": [format!("198.51.100.{n}")], "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}}});
    let mut objects = vec![service(n, spec)];
    let points: Vec<_> = (1..=endpoints).map(|e| (e, true, false)).collect();
    objects.extend(slices(n, &json!([{"port": 8080}]), &points));
    objects
}

struct Trial {
    host: Namespace,
    world: World,
    table: Table,
}

impl Trial {
    fn new() -> Self {
        let host = Namespace::new();
        let (layout, world) = (layouts(Family::V4).remove(0), World::new());
        let mut table = open(&host, &layout);
        table.synchronize(&world.desired).unwrap();
        Self { host, world, table }
    }

    fn apply(&mut self, objects: &[Value]) {
        let dirty = self.world.take_in(objects);
        let applied = self.table.apply(&dirty, &self.world.desired).unwrap();
        assert!(applied.refused.is_empty() && applied.rebuilt.is_none(), "{applied:?}");
    }

    /// Takes all endpoints of a Service away, and the Service with them.
    fn remove(&mut self, n: u8) {
        let name = service(n, json!({"ports": []}))["metadata"].clone();
        let key = keelson_api::object::ObjectKey::new(
            name["namespace"].as_str().unwrap(),
            name["name"].as_str().unwrap(),
        );
        self.world.objects.set_service(&key, None);
        let dirty = self.world.desired.replace(&key, None).dirty;
        let applied = self.table.apply(&dirty, &self.world.desired).unwrap();
        assert!(applied.refused.is_empty() && applied.rebuilt.is_none(), "{applied:?}");
    }
}

#[test]
fn chains_grow_with_the_sizes_that_are_in_use_and_with_nothing_else() {
    let mut trial = Trial::new();
    let fixed = chains(&trial.host);
    trial.apply(&sticky(1, 10, 60));
    let of_ten = chains(&trial.host);
    // Up and down, one at a time, as a rollout does it.
    for endpoints in (10..=60).chain((10..60).rev()) {
        trial.apply(&sticky(1, endpoints, 60));
    }
    let added: BTreeSet<_> = chains(&trial.host).difference(&of_ten).cloned().collect();
    assert!(
        added.iter().all(|chain| chain.contains("-11")),
        "only those of the last size: {added:?}"
    );
    // A second Service of the same size needs none; the next change takes what is left.
    trial.apply(&sticky(2, 10, 60));
    assert_eq!(chains(&trial.host), of_ten);
    trial.apply(&sticky(2, 10, 90));
    let of_both = chains(&trial.host);
    assert_eq!(of_both.len(), of_ten.len() + 1, "one for each time-out: {of_both:?}");

    trial.remove(1);
    trial.remove(2);
    trial.apply(&sticky(3, 2, 90));
    trial.remove(3);
    trial.table.apply(&[], &trial.world.desired).unwrap();
    assert_eq!(chains(&trial.host), fixed);
}

#[test]
fn a_restart_removes_what_nothing_leads_to() {
    let mut trial = Trial::new();
    let fixed = chains(&trial.host);
    for endpoints in [3, 20, 40] {
        trial.apply(&sticky(1, endpoints, 60));
    }
    trial.remove(1);
    assert_ne!(chains(&trial.host), fixed);
    let restarted = open(&trial.host, &layouts(Family::V4)[0]).synchronize(&trial.world.desired);
    let restarted = restarted.unwrap();
    assert_eq!((restarted.elements, restarted.rebuilt), (0, None));
    assert_eq!(chains(&trial.host), fixed);

    // What is in use stays, and is known to be.
    trial.table.synchronize(&trial.world.desired).unwrap();
    trial.apply(&sticky(1, 20, 60));
    let used = chains(&trial.host);
    trial.table = open(&trial.host, &layouts(Family::V4)[0]);
    trial.table.synchronize(&trial.world.desired).unwrap();
    trial.table.synchronize(&trial.world.desired).unwrap();
    assert_eq!(chains(&trial.host), used);
    trial.remove(1);
    trial.table.synchronize(&trial.world.desired).unwrap();
    assert_eq!(chains(&trial.host), fixed);
}

#[test]
fn many_sizes_need_many_more_endpoints() {
    let mut trial = Trial::new();
    let fixed = chains(&trial.host).len();
    let mut endpoints = 0;
    for n in 1..=40 {
        trial.apply(&sticky(n, n, 60));
        endpoints += usize::from(n);
        let sizes = chains(&trial.host).len() - fixed;
        // Three lanes, with and without "sticky", and one for the time-out.
        let most = 6 * ((2 * endpoints) as f64).sqrt().ceil() as usize + 1;
        assert!(sizes <= most, "{sizes} chains for {endpoints} endpoints");
    }
    for n in 1..=40 {
        trial.remove(n);
    }
    trial.table.apply(&[], &trial.world.desired).unwrap();
    assert_eq!(chains(&trial.host).len(), fixed);
}
