//! Services and EndpointSlices as people, tools and attackers write them, and the rules that come
//! of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    process::{Command, Stdio},
};

use k8s_openapi::api::networking::v1::ServiceCIDR;
use keelson_api::object::ObjectKey;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{
    generate::{Case, Step},
    reached::Reached,
};
use crate::{
    Mode, Objects, Origin, Packet, ProxyConfig, Snapshot, Verdict,
    backend::{Applied, Backend, Goal},
    iptables::Rules,
    model::{
        Family,
        service_ranges::ServiceRanges,
        services::Service,
        slices::{Place, Slice},
        table::ServiceTable,
    },
    nftables::apply::Table,
    ruleset::{
        Action, AddressSet, Frontend, Lane, Unit,
        desired::{Desired, ServiceRules},
    },
    start,
};

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
/// Clients outside the cluster.
const CLIENTS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, 99)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 0x99)),
];

/// Makes rules of whatever objects the bytes become, and has kernel and programs take them. In the
/// network namespace of the calling thread, whose rules are replaced.
///
/// # Panics
/// When something doesn't hold that must.
pub fn objects_to_rules(data: &[u8]) {
    try_out(data);
}

/// The same; what was reached.
pub(super) fn try_out(data: &[u8]) -> Reached {
    let Case { config, before, steps, restore } = Case::read(data);
    let (first, rest) = steps.split_at(before.min(steps.len()));
    let mut world = World::new(&config);
    first.iter().for_each(|step| drop(world.take_in(step)));
    let mut backends = FAMILIES.map(|family| open(&config, family));
    for backend in &mut backends {
        backend.remove().expect("the rules of the last input can be removed");
        let applied = backend.synchronize(world.goal()).expect("rules can be written");
        assert_taken(&applied);
    }
    for step in rest {
        let dirty = world.take_in(step);
        for backend in &mut backends {
            let applied = backend.apply(&dirty, world.goal()).expect("a change can be written");
            assert_taken(&applied);
            assert_eq!(applied.rebuilt, None, "a change of an object is a small one");
        }
    }
    let listed = run("nft", &["list", "ruleset"], "");
    if config.mode == Mode::Nftables {
        for family in ["ip", "ip6"] {
            assert!(listed.contains(&format!("table {family} keelson-proxy {{")), "{listed}");
        }
    }
    // Another process knows nothing but the objects as they are now, and what is in force.
    let fresh = world.again(&config);
    for family in FAMILIES {
        let again = open(&config, family).synchronize(fresh.goal());
        let again = again.expect("what is in force can be read back");
        if (again.elements, &again.rebuilt) != (0, &None) {
            let now = run("nft", &["list", "ruleset"], "");
            panic!("a restart writes {}", difference(&listed, &now));
        }
    }
    check_plan(&config, &world, restore);
    world.reached
}

/// Lines that only one of two listings has.
fn difference(before: &str, after: &str) -> String {
    let (before, after): (BTreeSet<_>, BTreeSet<_>) =
        (before.lines().collect(), after.lines().collect());
    let gone = before.difference(&after).map(|line| format!("- {line}"));
    let came = after.difference(&before).map(|line| format!("+ {line}"));
    gone.chain(came).collect::<Vec<_>>().join("\n")
}

fn assert_taken(applied: &Applied) {
    assert!(applied.refused.is_empty(), "refused: {:?}", applied.refused);
}

fn open(config: &ProxyConfig, family: Family) -> Box<dyn Backend> {
    if config.mode == Mode::Iptables {
        let mut rules = Rules::open(start::settings(config, family)).expect("there is iptables");
        rules.probe().expect("iptables takes every kind of rule");
        return Box::new(rules);
    }
    let table = Table::open(start::layout(config, family));
    Box::new(table.expect("there are netfilter sockets"))
}

fn service_cidr(ranges: &[&str]) -> ServiceCIDR {
    read(&json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ranges}}))
}

fn read<K: DeserializeOwned>(object: &Value) -> K {
    serde_json::from_value(object.clone()).expect("objects are made as the API's types are")
}

/// All objects, and what the loop makes of them.
struct World {
    mode: Mode,
    /// As the API has them, by kind and name.
    there: BTreeMap<(String, String), Value>,
    place: Place,
    node: ServiceRules,
    /// Those of Services, once somebody has told of them.
    ranges: Option<Vec<&'static str>>,
    objects: ServiceTable,
    desired: Desired,
    reached: Reached,
}

impl World {
    fn new(config: &ProxyConfig) -> Self {
        let mut world = Self {
            mode: config.mode,
            there: BTreeMap::new(),
            place: Place { node: "here".into(), zone: Some("zone-a".into()) },
            node: ServiceRules::default(),
            ranges: None,
            objects: ServiceTable::default(),
            desired: Desired::default(),
            reached: Reached::default(),
        };
        let addresses = config.node_ips.iter();
        world.node.addresses = addresses.map(|a| (AddressSet::NodeAddresses, *a)).collect();
        world.desired.replace(&ObjectKey::default(), Some(world.node.clone()));
        world
    }

    fn goal(&self) -> Goal<'_> {
        Goal { desired: &self.desired, objects: &self.objects }
    }

    /// One that was told only of what there is now; both want the same.
    fn again(&self, config: &ProxyConfig) -> Self {
        let mut again = Self { place: self.place.clone(), ..Self::new(config) };
        again.node = self.node.clone();
        again.desired.replace(&ObjectKey::default(), Some(self.node.clone()));
        if let Some(ranges) = self.ranges.clone() {
            again.take_in(&Step::Ranges(ranges));
        }
        // The slices come first, and then in another order than they came in.
        for object in self.there.values() {
            again.take_in(&Step::Is(object.clone()));
        }
        let all = |world: &Self| world.desired.units().collect::<BTreeSet<_>>();
        assert_eq!(all(self), all(&again), "how it came about doesn't matter");
        for unit in all(self) {
            let Unit::Frontend(frontend) = unit else { continue };
            assert_eq!(self.desired.action(&frontend), again.desired.action(&frontend));
            assert_eq!(self.desired.owner(&frontend), again.desired.owner(&frontend));
        }
        again
    }

    /// Takes in what is told; what may have to be written.
    fn take_in(&mut self, step: &Step) -> Vec<Unit> {
        let mut dirty: BTreeSet<Unit> = BTreeSet::new();
        let touched = match step {
            Step::Is(object) => {
                let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                let (kind, name) = (text(&object["kind"]), text(&object["metadata"]["name"]));
                let touched = match &*kind {
                    "Service" => self.set_service(&name, object),
                    _ => self.set_slice(&name, object),
                };
                self.there.insert((kind, name), object.clone());
                touched
            }
            Step::Gone(kind, name) => {
                if self.there.remove(&((*kind).to_owned(), name.clone())).is_none() {
                    return Vec::new();
                }
                let key = ObjectKey::new("d", name);
                if *kind == "Service" {
                    self.objects.set_service(&key, None);
                    vec![key]
                } else {
                    self.reached.note("a slice gone");
                    self.objects.set_slice(&key, None)
                }
            }
            Step::Ranges(texts) => {
                let mut ranges = ServiceRanges::default();
                let problems = ranges.set(&service_cidr(texts));
                assert!(problems.iter().all(|problem| !problem.message.is_empty()));
                self.ranges = Some(texts.clone());
                let outcome = self.desired.set_service_ranges(ranges.all());
                if !outcome.dirty.is_empty() {
                    self.reached.note("ranges of services");
                }
                dirty.extend(outcome.dirty);
                Vec::new()
            }
            Step::Node(addresses, zone) => {
                self.reached.note("a node that moved");
                // Without an address of its own the loop keeps those that it knows.
                let set = addresses.iter().map(|a| (AddressSet::NodeAddresses, *a)).collect();
                self.node = ServiceRules { addresses: set, ..ServiceRules::default() };
                let outcome = self.desired.replace(&ObjectKey::default(), Some(self.node.clone()));
                dirty.extend(outcome.dirty);
                self.place.zone = zone.map(str::to_owned);
                let slices: Vec<_> =
                    self.there.iter().map(|(k, o)| (k.clone(), o.clone())).collect();
                slices
                    .into_iter()
                    .filter(|((kind, _), _)| kind == "EndpointSlice")
                    .flat_map(|((_, name), object)| self.set_slice(&name, &object))
                    .collect()
            }
        };
        for key in touched {
            let rules = self.objects.rules(&key, &FAMILIES).map(|(rules, _)| rules);
            let outcome = self.desired.replace(&key, rules);
            self.reached.change(&outcome, &self.desired, self.mode);
            dirty.extend(outcome.dirty);
        }
        self.reached.desired(&self.desired);
        self.reached.choices(&self.objects, &FAMILIES);
        dirty.into_iter().collect()
    }

    fn set_service(&mut self, name: &str, object: &Value) -> Vec<ObjectKey> {
        let (service, problems) = Service::read(&read(object));
        assert!(problems.iter().all(|problem| !problem.message.is_empty()));
        self.reached.problems(&problems);
        if service.is_none() {
            self.reached.note("not served");
        }
        let key = ObjectKey::new("d", name);
        self.objects.set_service(&key, service);
        vec![key]
    }

    fn set_slice(&mut self, name: &str, object: &Value) -> Vec<ObjectKey> {
        let (slice, problems) = Slice::read(&read(object), &self.place);
        self.reached.problems(&problems);
        let touched = self.objects.set_slice(&ObjectKey::new("d", name), slice);
        if touched.len() > 1 {
            self.reached.note("a slice of another service");
        }
        touched
    }
}

/// What must hold of every plan, whoever carries it out.
fn check_plan(config: &ProxyConfig, world: &World, restore: bool) {
    let of_kind = |kind: &str| -> Vec<&Value> {
        world.there.iter().filter(|((k, _), _)| k == kind).map(|(_, object)| object).collect()
    };
    let node = json!({"metadata": {"name": "here",
        "labels": world.place.zone.iter().map(|zone| ("topology.kubernetes.io/zone", zone))
            .collect::<BTreeMap<_, _>>()}});
    let objects = Objects {
        services: of_kind("Service").into_iter().map(read).collect(),
        slices: of_kind("EndpointSlice").into_iter().map(read).collect(),
        service_cidrs: world.ranges.iter().map(|ranges| service_cidr(ranges)).collect(),
        node: Some(read(&node)),
    };
    let config = ProxyConfig {
        node_ips: world.node.addresses.iter().map(|(_, address)| *address).collect(),
        ..config.clone()
    };
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
            explanation_fits(&snapshot, frontend);
        }
        let text = snapshot.rules();
        // A port's name may stand in a comment, but never ends a line or its quotes.
        assert!(!text.contains("\n-A INPUT -j ACCEPT"), "{text}");
        assert!(!text.contains("\"; flush ruleset"), "{text}");
        if mode == Mode::Iptables && restore {
            iptables_takes(&snapshot);
        }
    }
}

/// The question that leads to a frontend has an answer that tells of the same endpoints.
fn explanation_fits(snapshot: &Snapshot, frontend: Frontend) {
    let node = snapshot.node_addresses().iter().find(|a| Family::of(**a) == frontend.family);
    let Some(to) = frontend.address.or(node.copied()) else { return };
    let from = match frontend.family {
        Family::V4 => CLIENTS[0],
        Family::V6 => CLIENTS[1],
    };
    let Frontend { protocol, port, .. } = frontend;
    let packet = Packet { from, from_pod_here: false, to, port, protocol };
    let answer = snapshot.explain(&packet);
    assert!(answer.to_string().contains("verdict"));
    let Some(Action::Forward { endpoints, .. }) = snapshot.desired.action(&frontend) else {
        return;
    };
    let eligible = answer.endpoints.iter().filter(|candidate| candidate.eligible).count();
    let asked = answer.origin == Origin::Outside && frontend.lane == Lane::Address;
    if asked && answer.verdict == Verdict::Forwarded {
        assert_eq!(eligible, endpoints.len(), "{answer}");
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
