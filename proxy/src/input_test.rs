//! More endpoints than anybody has: bounded in time, and nobody else waits.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use keelson_api::{events::EventRecorder, object::ObjectKey};
use prometheus::Registry;

use crate::{
    Mode, ProxyConfig,
    backend::{Applied, Backend, BackendError, Forget, Goal},
    health::Health,
    metrics::Metrics,
    model::{
        Family, Protocol,
        eligible::ENDPOINTS_MAX,
        services::Service,
        slices::{Hint, Slice, SliceEndpoint},
    },
    netns::Namespace,
    proxier::{Proxier, Reports},
    ruleset::{Action, Unit},
    start,
    watches::ChangeKind,
};

/// How long all of it may take on a machine that has much else to do; if every slice were looked at
/// with every other one it would be an hour.
const PATIENCE: Duration = Duration::from_secs(120);
const SLICES: u32 = 1_000;
const EACH: u32 = 1_000;

fn reports() -> Reports {
    Reports {
        metrics: Metrics::register(&Registry::new()).unwrap(),
        health: Health::new(&[Family::V4], Duration::from_secs(30)),
        events: EventRecorder::discard(),
        conntrack: None,
    }
}

fn service(name: &str, address: &str) -> ChangeKind {
    let object = serde_json::json!({"metadata": {"name": name, "namespace": "d"},
        "spec": {"clusterIP": address, "ports": [{"port": 80}]}});
    let (service, problems) = Service::read(&serde_json::from_value(object).unwrap());
    ChangeKind::Service(ObjectKey::new("d", name), service, problems)
}

/// Slice `n` of a Service, with `each` endpoints that no other one has.
fn slice(service: &str, n: u32, each: u32) -> ChangeKind {
    let endpoint = |e: u32| SliceEndpoint {
        address: std::net::Ipv4Addr::from_bits(0x0b00_0001 + n * each + e).into(),
        ready: true,
        serving: true,
        terminating: false,
        local: false,
        maybe_local: false,
        node_hint: Hint::Absent,
        zone_hint: Hint::Absent,
    };
    let slice = Slice {
        service: ObjectKey::new("d", service),
        family: Family::V4,
        ports: [(Box::from(""), Protocol::Tcp, 8080)].into(),
        endpoints: (0..each).map(endpoint).collect(),
        triggered: None,
    };
    ChangeKind::Slice(ObjectKey::new("d", format!("{service}-{n:04}")), Some(slice), Vec::new())
}

fn listed() -> [ChangeKind; 2] {
    let slices = (0..SLICES).map(|n| ObjectKey::new("d", format!("flood-{n:04}")));
    let slices = slices.chain([ObjectKey::new("d", "web-2000")]).collect();
    let services = ["flood", "web"].map(|name| ObjectKey::new("d", name));
    [ChangeKind::Services(services.into()), ChangeKind::Slices(slices)]
}

/// Takes in a million endpoints of one Service and one of another, and commits them.
fn flood(backend: Box<dyn Backend>) -> Proxier {
    let mut proxier = Proxier::new(vec![backend], &[[192, 0, 2, 1].into()], reports());
    let begin = Instant::now();
    proxier.take_in(service("flood", "10.96.0.1").into());
    proxier.take_in(service("web", "10.96.0.2").into());
    proxier.take_in(slice("web", 2_000, 1).into());
    for n in 0..SLICES {
        proxier.take_in(slice("flood", n, EACH).into());
    }
    listed().into_iter().for_each(|change| proxier.take_in(change.into()));
    proxier.commit(Instant::now());
    // One more change of many.
    proxier.take_in(slice("flood", 0, EACH - 1).into());
    proxier.commit(Instant::now());
    assert!(begin.elapsed() < PATIENCE, "it took {:?}", begin.elapsed());
    proxier
}

/// A backend that only looks at what it should do.
struct Looking(std::sync::mpsc::Sender<(usize, usize)>);

impl Looking {
    fn look(&self, goal: Goal<'_>) -> Applied {
        let units: HashSet<Unit> = goal.desired.units().collect();
        let counts = units.iter().filter_map(|unit| match unit {
            Unit::Frontend(frontend) => match goal.desired.action(frontend)? {
                Action::Forward { endpoints, .. } => Some(endpoints.len()),
                _ => None,
            },
            Unit::Address(..) | Unit::ServiceRanges(_) => None,
        });
        let mut counts: Vec<usize> = counts.collect();
        counts.sort_unstable();
        self.0.send((counts[0], counts[1])).unwrap();
        Applied::default()
    }
}

impl Backend for Looking {
    fn family(&self) -> Family {
        Family::V4
    }

    fn synchronize(&mut self, goal: Goal<'_>) -> Result<Applied, BackendError> {
        Ok(self.look(goal))
    }

    fn apply(&mut self, _: &[Unit], goal: Goal<'_>) -> Result<Applied, BackendError> {
        Ok(self.look(goal))
    }

    fn forget(&mut self, _: &[Forget]) -> Result<(), BackendError> {
        Ok(())
    }

    fn units(&self) -> usize {
        0
    }

    fn remove(&mut self) -> Result<(), BackendError> {
        Ok(())
    }
}

#[test]
fn of_a_million_endpoints_as_many_are_planned_as_can_be_served() {
    let (looked, looks) = std::sync::mpsc::channel();
    drop(flood(Box::new(Looking(looked))));
    let looks: Vec<_> = looks.iter().collect();
    assert_eq!(looks, [(1, ENDPOINTS_MAX); 2]);
}

/// The backend of a mode, in a namespace.
fn open(host: &Namespace, mode: Mode, runtime: &tokio::runtime::Handle) -> Box<dyn Backend> {
    let runtime = runtime.clone();
    host.run(move || {
        let _entered = runtime.enter();
        let config = ProxyConfig { mode, families: vec![Family::V4], ..ProxyConfig::new("here") };
        let mut chosen = start::choose(&config).unwrap();
        assert_eq!(chosen.mode, mode);
        chosen.backends.remove(0)
    })
}

fn the_other_service_is_served(mode: Mode, listing: &str, words: &str) {
    let host = Namespace::new();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let proxier = flood(open(&host, mode, runtime.handle()));
    let listed = host.sh(listing);
    assert!(listed.contains(words), "{}", &listed[..listed.len().min(2_000)]);
    drop(proxier);
}

#[test]
fn a_million_endpoints_leave_others_alone_in_nftables() {
    let command = "nft get element ip keelson-proxy services '{ 10.96.0.2 . tcp . 80 }'; \
                   nft get element ip keelson-proxy services '{ 10.96.0.1 . tcp . 80 }'";
    the_other_service_is_served(Mode::Nftables, command, "goto endpoints-1 }");
}

#[test]
fn a_million_endpoints_leave_others_alone_in_userspace() {
    the_other_service_is_served(Mode::Userspace, "ss -Hlnt", "10.96.0.2:80");
}

#[test]
fn a_million_endpoints_leave_others_alone_in_iptables() {
    the_other_service_is_served(Mode::Iptables, "iptables -t nat -S KUBE-SERVICES", "10.96.0.2/32");
}
