//! Random Services and slices, and what the kernel then holds, against a reference that is slow
//! and obvious.

use std::collections::{BTreeMap, BTreeSet};

use keelson_api::object::ObjectKey;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{apply::Table, golden::layout};
use crate::{
    model::{
        Family,
        objects::{Place, Service, Slice},
        table::ServiceTable,
    },
    netns::Namespace,
    ruleset::{Unit, desired::Desired},
};

/// One endpoint of a slice: last byte, ready, serving, terminating, on this node.
type Point = (u8, bool, bool, bool, bool);

#[derive(Clone, Debug)]
enum Step {
    Service {
        n: u8,
        created: u8,
        node_port: u8,
        internal_local: bool,
        external_local: bool,
        affinity: bool,
    },
    RemoveService(u8),
    Slice {
        n: u8,
        part: u8,
        points: Vec<Point>,
    },
    RemoveSlice(u8, u8),
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let n = 0u8..4;
    let flag = any::<bool>;
    let point = (1u8..9, flag(), flag(), flag(), flag());
    let step = prop_oneof![
        4 => (n.clone(), 0u8..3, 0u8..3, flag(), flag(), flag()).prop_map(
            |(n, created, node_port, internal_local, external_local, affinity)| Step::Service {
                n, created, node_port, internal_local, external_local, affinity,
            }
        ),
        1 => n.clone().prop_map(Step::RemoveService),
        6 => (n.clone(), 0u8..2, proptest::collection::vec(point, 0..6))
            .prop_map(|(n, part, points)| Step::Slice { n, part, points }),
        1 => (n, 0u8..2).prop_map(|(n, part)| Step::RemoveSlice(n, part)),
        1 => Just(Step::Restart),
    ];
    proptest::collection::vec(step, 1..25)
}

#[derive(Default)]
struct World {
    services: BTreeMap<u8, Value>,
    slices: BTreeMap<(u8, u8), Vec<Point>>,
}

/// What the kernel should do with a frontend: its verdict and its endpoints.
type Expected = BTreeMap<String, (String, BTreeSet<String>)>;

impl World {
    /// Endpoints for which `among` holds, as the documentation has it.
    fn endpoints(&self, n: u8, local_only: bool) -> BTreeSet<String> {
        // Slices are merged first: what any slice says for an endpoint counts.
        let mut all: BTreeMap<u8, Point> = BTreeMap::new();
        for ((service, _), points) in &self.slices {
            for p in points.iter().filter(|_| *service == n) {
                let known = all.entry(p.0).or_insert(*p);
                *known = (p.0, known.1 || p.1, known.2 || p.2, known.3 && p.3, known.4 || p.4);
            }
        }
        let mine: Vec<&Point> = all.values().filter(|p| !local_only || p.4).collect();
        let ready: Vec<&&Point> = mine.iter().filter(|p| p.1).collect();
        let chosen =
            if ready.is_empty() { mine.iter().filter(|p| p.2 && p.3).collect() } else { ready };
        chosen.iter().map(|p| format!("10.244.0.{} . 8080", p.0)).collect()
    }

    fn expected(&self) -> Expected {
        let mut expected = Expected::new();
        let mut order: Vec<(&u8, &Value)> = self.services.iter().collect();
        order.sort_by_key(|(n, spec)| (spec["created"].as_u64(), **n));
        for (n, spec) in order {
            let (cluster, local) = (self.endpoints(*n, false), self.endpoints(*n, true));
            let sticky = if spec["affinity"] == true { "sticky-" } else { "" };
            let verdict = |chain: &str, endpoints: &BTreeSet<String>| {
                let verdict = if !endpoints.is_empty() {
                    format!("goto {sticky}{chain}-{}", endpoints.len())
                } else if cluster.is_empty() && local.is_empty() {
                    "goto reject-at-once".to_owned()
                } else {
                    "drop".to_owned()
                };
                (verdict, endpoints.clone())
            };
            let inside = if spec["internal_local"] == true { &local } else { &cluster };
            expected.insert(format!("10.96.0.{n} . tcp . 80"), verdict("endpoints", inside));
            let port = format!("tcp . {}", 30_000 + spec["node_port"].as_u64().unwrap());
            if expected.contains_key(&port) {
                // The older Service has it. What follows is about the same port.
                continue;
            }
            if spec["external_local"] == true {
                expected.insert(port.clone(), verdict("nodeport-local", &local));
                if !cluster.is_empty() {
                    expected.insert(format!("inside {port}"), verdict("nodeport-inside", &cluster));
                }
            } else {
                expected.insert(port, verdict("nodeport", &cluster));
            }
        }
        expected
    }
}

/// What the kernel says, by way of the distribution's own nft.
fn listed(host: &Namespace) -> Expected {
    let mut found = Expected::new();
    for (map, prefix) in [
        ("services", ""),
        ("no-endpoints", ""),
        ("nodeports", ""),
        ("no-endpoint-nodeports", ""),
        ("nodeports-inside", "inside "),
    ] {
        for (key, verdict) in elements(host, map) {
            let before = found.insert(format!("{prefix}{key}"), (verdict, BTreeSet::new()));
            assert_eq!(before, None, "{key} stands in two maps");
        }
    }
    for (map, prefix) in
        [("endpoints", ""), ("nodeport-endpoints", ""), ("nodeport-inside-endpoints", "inside ")]
    {
        let mut indices: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (key, endpoint) in elements(host, map) {
            let (frontend, index) = key.rsplit_once(" . ").unwrap();
            indices.entry(frontend.to_owned()).or_default().insert(index.to_owned());
            let entry = found.get_mut(&format!("{prefix}{frontend}"));
            assert!(entry.unwrap().1.insert(endpoint), "one endpoint twice");
        }
        for (frontend, indices) in indices {
            let expected = (0..indices.len()).map(|i| format!("0x{i:08x}")).collect();
            assert_eq!(indices, expected, "indices of {frontend} have holes");
        }
    }
    found
}

fn elements(host: &Namespace, map: &str) -> Vec<(String, String)> {
    let text = host.sh(&format!("nft -n list map ip keelson-proxy {map}"));
    let Some((_, elements)) = text.split_once("elements = {") else { return Vec::new() };
    let elements = elements.split('}').next().unwrap();
    elements
        .split(',')
        .map(|element| {
            let (key, value) = element.split_once(" : ").unwrap();
            let words = |t: &str| t.split_whitespace().collect::<Vec<_>>().join(" ");
            (
                words(key).replace(" 6 ", " tcp ").replacen(
                    "6 . ",
                    "tcp . ",
                    usize::from(key.trim().starts_with("6 ")),
                ),
                words(value),
            )
        })
        .collect()
}

struct Proxy {
    objects: ServiceTable,
    desired: Desired,
    table: Table,
}

impl Proxy {
    fn apply(&mut self, touched: &[ObjectKey]) {
        let mut dirty: Vec<Unit> = Vec::new();
        for key in touched {
            let rules = self.objects.rules(key, &[Family::V4]).map(|(rules, _)| rules);
            dirty.extend(self.desired.replace(key, rules).dirty);
        }
        let applied = self.table.apply(&dirty, &self.desired).unwrap();
        assert!(applied.refused.is_empty() && applied.rebuilt.is_none(), "{applied:?}");
    }

    fn service(&mut self, n: u8, spec: Option<&Value>) {
        let service = spec.map(|spec| {
            let policy = |local: &Value| if *local == true { "Local" } else { "Cluster" };
            let node_port = 30_000 + spec["node_port"].as_u64().unwrap();
            let object = json!({
                "metadata": {"name": n.to_string(), "namespace": "d",
                    "creationTimestamp": format!("2026-01-01T00:00:0{}Z", spec["created"])},
                "spec": {"clusterIP": format!("10.96.0.{n}"), "type": "NodePort",
                    "sessionAffinity": if spec["affinity"] == true { "ClientIP" } else { "None" },
                    "internalTrafficPolicy": policy(&spec["internal_local"]),
                    "externalTrafficPolicy": policy(&spec["external_local"]),
                    "ports": [{"port": 80, "nodePort": node_port}]},
            });
            Service::read(&serde_json::from_value(object).unwrap()).0.unwrap()
        });
        let key = ObjectKey::new("d", n.to_string());
        self.objects.set_service(&key, service);
        self.apply(&[key]);
    }

    fn slice(&mut self, n: u8, part: u8, points: Option<&[Point]>) {
        let slice = points.map(|points| {
            let endpoints: Vec<Value> = points
                .iter()
                .map(|(last, ready, serving, terminating, local)| {
                    json!({"addresses": [format!("10.244.0.{last}")],
                        "nodeName": if *local { "here" } else { "there" },
                        "conditions": {"ready": ready, "serving": serving, "terminating": terminating}})
                })
                .collect();
            let object = json!({
                "metadata": {"name": format!("{n}-{part}"), "namespace": "d",
                    "labels": {"kubernetes.io/service-name": n.to_string()}},
                "addressType": "IPv4", "ports": [{"port": 8080}], "endpoints": endpoints,
            });
            Slice::read(&serde_json::from_value(object).unwrap(), &Place { node: "here".into(), zone: None }).0.unwrap()
        });
        let touched = self.objects.set_slice(&ObjectKey::new("d", format!("{n}-{part}")), slice);
        self.apply(&touched);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn the_kernel_holds_what_the_reference_says(steps in steps()) {
        let host = Namespace::new();
        let open = |host: &Namespace| host.run(|| Table::open(layout(Family::V4)).unwrap());
        let mut proxy = Proxy {
            objects: ServiceTable::default(), desired: Desired::default(), table: open(&host),
        };
        proxy.table.synchronize(&proxy.desired).unwrap();
        let mut world = World::default();
        for step in steps {
            match step.clone() {
                Step::Service { n, created, node_port, internal_local, external_local, affinity } => {
                    let spec = json!({"created": created, "node_port": node_port, "affinity": affinity,
                        "internal_local": internal_local, "external_local": external_local});
                    proxy.service(n, Some(&spec));
                    world.services.insert(n, spec);
                }
                Step::RemoveService(n) => {
                    proxy.service(n, None);
                    world.services.remove(&n);
                }
                Step::Slice { n, part, points } => {
                    proxy.slice(n, part, Some(&points));
                    world.slices.insert((n, part), points);
                }
                Step::RemoveSlice(n, part) => {
                    proxy.slice(n, part, None);
                    world.slices.remove(&(n, part));
                }
                Step::Restart => {
                    proxy.table = open(&host);
                    let applied = proxy.table.synchronize(&proxy.desired).unwrap();
                    prop_assert_eq!((applied.elements, applied.rebuilt), (0, None));
                }
            }
            prop_assert_eq!(listed(&host), world.expected(), "after {:?}", step);
        }
    }
}
