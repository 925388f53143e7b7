//! A loop over backends that do as they are told, and whose clock is a parameter.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use keelson_api::{events::EventRecorder, object::ObjectKey};
use prometheus::Registry;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::{
    backend::{Applied, Backend, BackendError, Forget, Goal},
    conntrack::Cleaner,
    health::Health,
    health_check::{Checks, HealthChecks},
    metrics::Metrics,
    model::{
        Endpoint, Family,
        services::Service,
        slices::{Place, Slice},
    },
    proxier::{Proxier, Reports},
    ruleset::{Action, Frontend, Unit},
    watches::ChangeKind,
};

/// The longest wait of the back-off, with its jitter.
pub(super) const LONGEST: Duration = Duration::from_secs(45);

/// What a backend is told, and what it did.
#[derive(Default)]
pub(super) struct Script {
    /// Nothing can be written.
    pub(super) fails: bool,
    /// Ports that are refused by themselves.
    pub(super) refuses: HashSet<u16>,
    /// Ports that are never served.
    pub(super) never: HashSet<u16>,
    /// A write meets what another program has changed.
    pub(super) drifted: bool,
    /// How long each call takes.
    pub(super) takes: Duration,
    /// Which generation the kernel's tables have, if it tells.
    pub(super) generation: Option<u32>,
    /// What sticky clients are to forget after each write.
    pub(super) forgets: Vec<Forget>,
    /// What was called: everything, or how many units.
    pub(super) calls: Vec<Call>,
    /// What is in force.
    pub(super) held: BTreeMap<Frontend, Vec<Endpoint>>,
}

/// A call of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    All,
    Units(usize),
    Forget(usize),
}

/// A backend that does as the script says.
struct Fake {
    family: Family,
    script: Arc<Mutex<Script>>,
}

impl Fake {
    fn write(&self, call: Call, units: &[Unit], goal: Goal<'_>) -> Result<Applied, BackendError> {
        let mut script = self.script.lock().unwrap();
        script.calls.push(call);
        std::thread::sleep(script.takes);
        if script.fails {
            let (program, message) = ("fake".to_owned(), "as told".to_owned());
            return Err(BackendError::Program { program, message });
        }
        let mut applied = Applied {
            forget: script.forgets.clone(),
            drifted: script.drifted,
            ..Applied::default()
        };
        for unit in units.iter().filter(|unit| unit.family() == self.family) {
            let Unit::Frontend(frontend) = unit else { continue };
            let (program, message) = ("fake".to_owned(), "refused".to_owned());
            if script.refuses.contains(&frontend.port) {
                applied.refused.push((*unit, BackendError::Program { program, message }));
            } else if script.never.contains(&frontend.port) {
                applied.refused.push((*unit, BackendError::Unsupported(message)));
            } else if let Some(action) = goal.desired.action(frontend) {
                let endpoints = match action {
                    Action::Forward { endpoints, .. } => endpoints.to_vec(),
                    _ => Vec::new(),
                };
                script.held.insert(*frontend, endpoints);
                applied.elements += 1;
            } else {
                script.held.remove(frontend);
            }
        }
        Ok(applied)
    }
}

impl Backend for Fake {
    fn family(&self) -> Family {
        self.family
    }

    fn synchronize(&mut self, goal: Goal<'_>) -> Result<Applied, BackendError> {
        let held: Vec<Unit> =
            self.script.lock().unwrap().held.keys().map(|f| Unit::Frontend(*f)).collect();
        let units: Vec<Unit> = goal.desired.units().chain(held).collect();
        self.write(Call::All, &units, goal)
    }

    fn apply(&mut self, units: &[Unit], goal: Goal<'_>) -> Result<Applied, BackendError> {
        self.write(Call::Units(units.len()), units, goal)
    }

    fn forget(&mut self, forget: &[Forget]) -> Result<(), BackendError> {
        self.script.lock().unwrap().calls.push(Call::Forget(forget.len()));
        Ok(())
    }

    fn generation(&mut self) -> Option<u32> {
        self.script.lock().unwrap().generation
    }

    fn units(&self) -> usize {
        self.script.lock().unwrap().held.len()
    }

    fn remove(&mut self) -> Result<(), BackendError> {
        Ok(())
    }
}

/// A loop, the backends' scripts, and a clock that stands still until it is set.
pub(super) struct Trial {
    pub(super) proxier: Proxier,
    pub(super) now: Instant,
    pub(super) health: Health,
    scripts: BTreeMap<Family, Arc<Mutex<Script>>>,
    registry: Registry,
    checks: watch::Receiver<Arc<Checks>>,
}

impl Trial {
    /// A loop over both families that knows that there are no objects yet.
    pub(super) fn new() -> Self {
        Self::with_events(EventRecorder::discard())
    }

    /// As [`Self::new`], with events that go somewhere.
    pub(super) fn with_events(events: EventRecorder) -> Self {
        let mut trial = Self::over(events);
        trial.take_in(ChangeKind::Services(HashSet::new()));
        trial.take_in(ChangeKind::Slices(HashSet::new()));
        trial
    }

    /// A loop that doesn't know yet which objects there are.
    pub(super) fn unlisted() -> Self {
        Self::over(EventRecorder::discard())
    }

    /// As [`Self::new`], with a thread that forgets connections, which this makes.
    pub(super) fn tracking(start: impl FnOnce(Metrics) -> Cleaner) -> Self {
        let mut trial = Self::with(EventRecorder::discard(), |metrics| Some(start(metrics)));
        trial.take_in(ChangeKind::Services(HashSet::new()));
        trial.take_in(ChangeKind::Slices(HashSet::new()));
        trial
    }

    fn over(events: EventRecorder) -> Self {
        Self::with(events, |_| None)
    }

    fn with(events: EventRecorder, cleaner: impl FnOnce(Metrics) -> Option<Cleaner>) -> Self {
        let both = [Family::V4, Family::V6];
        let scripts: BTreeMap<Family, Arc<Mutex<Script>>> =
            both.iter().map(|family| (*family, Arc::default())).collect();
        let registry = Registry::new();
        let metrics = Metrics::register(&registry).unwrap();
        let health = Health::new(&both, Duration::from_secs(30));
        let conntrack = cleaner(metrics.clone());
        let reports = Reports { metrics, health: health.clone(), events, conntrack };
        let backends = scripts.iter().map(|(family, script)| {
            Box::new(Fake { family: *family, script: Arc::clone(script) }) as Box<dyn Backend>
        });
        let (published, checks) = watch::channel(Arc::default());
        let node = [[192, 0, 2, 1].into()];
        let proxier = Proxier::new(backends.collect(), &node, reports)
            .with_health_checks(HealthChecks::new(published));
        Self { proxier, now: Instant::now(), health, scripts, registry, checks }
    }

    /// A script, for when the loop runs elsewhere.
    pub(super) fn script_of(&self, family: Family) -> Arc<Mutex<Script>> {
        Arc::clone(&self.scripts[&family])
    }

    pub(super) fn script(&self, family: Family) -> MutexGuard<'_, Script> {
        self.scripts[&family].lock().unwrap()
    }

    pub(super) fn take_in(&mut self, kind: ChangeKind) {
        self.proxier.take_in(kind.into());
    }

    pub(super) fn commit(&mut self) {
        self.proxier.commit(self.now);
    }

    /// Sets the clock to when the loop wakes by itself: how long that is from now.
    pub(super) fn wake(&mut self) -> Duration {
        let at = self.proxier.wakes_at().expect("there is something to do later");
        let waited = at.saturating_duration_since(self.now);
        self.now = at;
        self.commit();
        waited
    }

    /// Takes in a Service of both families with one endpoint in each, and commits.
    pub(super) fn serve(&mut self, name: &str, port: u16) {
        self.take_in(service(name, json!({"port": port}), json!({})));
        for (family, endpoint) in [("IPv4", "10.244.1.2"), ("IPv6", "fd01::2")] {
            self.take_in(slice(name, family, &[endpoint], port));
        }
        self.commit();
    }

    /// The ports that are served in a family.
    pub(super) fn served(&self, family: Family) -> Vec<u16> {
        let script = self.script(family);
        let mut ports: Vec<u16> = script.held.keys().map(|frontend| frontend.port).collect();
        ports.sort_unstable();
        ports
    }

    pub(super) fn calls(&self, family: Family) -> Vec<Call> {
        std::mem::take(&mut self.script(family).calls)
    }

    /// Whether this line is among the metrics.
    pub(super) fn metric(&self, line: &str) -> bool {
        let text = keelson_api::metrics::encode(&self.registry).unwrap();
        text.lines().any(|found| found == line)
    }

    /// The health-check node ports that were told.
    pub(super) fn checks(&self) -> String {
        format!("{:?}", self.checks.borrow())
    }
}

/// A Service of both families: its number is in its port.
pub(super) fn service(name: &str, port: Value, spec: Value) -> ChangeKind {
    let number = port["port"].as_u64().unwrap();
    let mut object = json!({
        "metadata": {"name": name, "namespace": "d", "uid": name},
        "spec": {"clusterIP": format!("10.96.0.{}", number % 250), "ports": [port],
            "clusterIPs": [format!("10.96.0.{}", number % 250), format!("fd00::{number}")]}});
    object["spec"].as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
    let (service, problems) = Service::read(&serde_json::from_value(object).unwrap());
    assert_eq!(problems, []);
    ChangeKind::Service(ObjectKey::new("d", name), service, problems)
}

pub(super) fn slice(service: &str, family: &str, endpoints: &[&str], port: u16) -> ChangeKind {
    let name = format!("{service}-{}", family.to_lowercase());
    let endpoints: Vec<Value> =
        endpoints.iter().map(|e| json!({"addresses": [e], "nodeName": "here"})).collect();
    let object = json!({"addressType": family, "endpoints": endpoints, "ports": [{"port": port}],
        "metadata": {"name": name, "namespace": "d", "labels": {"kubernetes.io/service-name": service},
            "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": jiff::Timestamp::now().to_string()}}});
    let place = Place { node: "here".into(), zone: None };
    let (slice, problems) = Slice::read(&serde_json::from_value(object).unwrap(), &place);
    ChangeKind::Slice(ObjectKey::new("d", name), slice, problems)
}
