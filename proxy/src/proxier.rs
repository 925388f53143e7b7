//! The loop: takes in changes, plans, commits, reports.
//!
//! It runs on a thread of its own, since a commit is a system call that may take as long as the
//! change is large, and it waits for nothing else: what comes in while nothing is going on is
//! committed at once; what comes in during a commit is committed together by the next one.

use std::{
    collections::HashSet,
    net::IpAddr,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use keelson_api::{
    backoff::Backoff,
    events::{EventRecorder, EventType},
    object::ObjectKey,
};
use tokio::sync::mpsc;

use crate::{
    backend::{Applied, Backend, Forget, Goal},
    conntrack::Cleaner,
    health::Health,
    metrics::Metrics,
    model::{Family, Problem, table::ServiceTable},
    ruleset::{
        Action, AddressSet, Frontend, Lane, Unit,
        desired::{Desired, ServiceRules},
    },
    watches::{Change, ChangeKind},
};

/// How many changes are taken in before a commit: a flood must not put it off for ever.
const BURST: usize = 100_000;
/// How long after a commit the last packet that didn't see it is surely through.
const SECOND_LOOK: Duration = Duration::from_secs(1);
/// The first and the longest wait before what the kernel refused is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

/// All that the loop reports to.
pub(crate) struct Reports {
    pub(crate) metrics: Metrics,
    pub(crate) health: Health,
    pub(crate) events: EventRecorder,
    pub(crate) conntrack: Option<Cleaner>,
}

/// The loop's state. All of it can be rebuilt from the API and the kernel.
pub(crate) struct Proxier {
    backends: Vec<Box<dyn Backend>>,
    families: Vec<Family>,
    objects: ServiceTable,
    desired: Desired,
    reports: Reports,
    listed: Listed,
    dirty: HashSet<Unit>,
    /// Frontends whose policy finds no endpoint on this node.
    dropped: HashSet<Frontend>,
    /// When changes that aren't committed yet happened, and when the first of them came in.
    triggered: Vec<(Family, Timestamp)>,
    waiting_since: Option<Instant>,
    resync: Option<&'static str>,
    /// What the kernel refused, to be tried again at `retry_at`; all else goes on meanwhile.
    refused: HashSet<Unit>,
    /// Nothing could be written at all: everything waits for `retry_at`.
    blocked: bool,
    retry_at: Option<Instant>,
    look_again: Vec<Forget>,
    look_again_at: Option<Instant>,
    backoff: Backoff,
    generation: Option<u32>,
}

#[derive(Default)]
struct Listed {
    services: bool,
    slices: bool,
    /// Whether the kernel was compared with what is desired.
    synchronized: bool,
}

impl Proxier {
    /// A loop over these backends, one for each family, which knows of no Service yet. `node_ips` may be empty: then the
    /// node's object tells.
    pub(crate) fn new(
        backends: Vec<Box<dyn Backend>>,
        node_ips: &[IpAddr],
        reports: Reports,
    ) -> Self {
        let families = backends.iter().map(|backend| backend.family()).collect();
        let mut proxier = Self {
            backends,
            families,
            objects: ServiceTable::default(),
            desired: Desired::default(),
            reports,
            listed: Listed::default(),
            dirty: HashSet::new(),
            dropped: HashSet::new(),
            triggered: Vec::new(),
            waiting_since: None,
            resync: None,
            refused: HashSet::new(),
            blocked: false,
            retry_at: None,
            look_again: Vec::new(),
            look_again_at: None,
            backoff: Backoff::new(RETRY.0, RETRY.1),
            generation: None,
        };
        proxier.set_node_addresses(node_ips);
        proxier
    }

    /// Takes in changes and commits them until the queue is closed.
    pub(crate) async fn run(mut self, mut queue: mpsc::Receiver<Change>) {
        loop {
            let timer = self.retry_at.into_iter().chain(self.look_again_at).min();
            let first = match timer {
                Some(at) => match tokio::time::timeout_at(at.into(), queue.recv()).await {
                    Ok(first) => first,
                    Err(_) => {
                        self.due(Instant::now());
                        continue;
                    }
                },
                None => queue.recv().await,
            };
            let Some(first) = first else { return };
            self.take_in(first);
            for _ in 1..BURST {
                match queue.try_recv() {
                    Ok(change) => self.take_in(change),
                    Err(_) => break,
                }
            }
            self.commit();
        }
    }

    /// Does what was put off until now.
    fn due(&mut self, now: Instant) {
        if self.look_again_at.is_some_and(|at| at <= now) {
            self.look_again_at = None;
            let again = std::mem::take(&mut self.look_again);
            for backend in &mut self.backends {
                forget(&mut **backend, &again);
            }
        }
        if self.retry_at.is_some_and(|at| at <= now) {
            self.retry_at = None;
            self.blocked = false;
            self.dirty.extend(self.refused.drain());
            self.commit();
        }
    }

    /// Takes in one change; [`Self::commit`] writes what it touches.
    pub(crate) fn take_in(&mut self, change: Change) {
        let metrics = &self.reports.metrics;
        let touched = match change.kind {
            ChangeKind::Service(key, service, problems) => {
                metrics.service_changes.inc();
                metrics.service_changes_pending.inc();
                let changed = self.objects.set_service(&key, service);
                self.report(&key, &problems);
                if changed { vec![key] } else { Vec::new() }
            }
            ChangeKind::Slice(key, slice, problems) => {
                metrics.endpoint_changes.inc();
                metrics.endpoint_changes_pending.inc();
                let triggered_before = self.objects.triggered(&key);
                let arrived = slice.as_ref().map(|s| (s.family, s.triggered, s.service.clone()));
                let touched = self.objects.set_slice(&key, slice);
                if let Some((family, triggered, service)) = arrived {
                    self.report(&service, &problems);
                    // An old time is told again with every later change of the slice.
                    if let Some(triggered) = triggered.filter(|t| Some(*t) != triggered_before)
                        && self.listed.synchronized
                    {
                        self.triggered.push((family, triggered));
                    }
                }
                touched
            }
            ChangeKind::Services(all) => {
                self.listed.services = true;
                let gone: Vec<ObjectKey> =
                    self.objects.keys().filter(|key| !all.contains(key)).cloned().collect();
                for key in &gone {
                    self.objects.set_service(key, None);
                }
                gone
            }
            ChangeKind::Slices(all) => {
                self.listed.slices = true;
                let gone: Vec<ObjectKey> =
                    self.objects.slice_keys().filter(|key| !all.contains(key)).cloned().collect();
                gone.iter().flat_map(|key| self.objects.set_slice(key, None)).collect()
            }
            ChangeKind::Node { addresses, eligible } => {
                self.reports.health.set_eligible(eligible);
                if !addresses.is_empty() {
                    self.set_node_addresses(&addresses);
                }
                Vec::new()
            }
            ChangeKind::Drift(cause) => {
                self.heard(cause);
                Vec::new()
            }
        };
        if !touched.is_empty() {
            self.reports.health.queued();
            self.waiting_since.get_or_insert(change.at);
            for family in &self.families {
                self.reports.metrics.queued(*family);
            }
        }
        for key in touched {
            self.plan(&key);
        }
    }

    fn heard(&mut self, cause: &'static str) {
        // An overflow may have lost nothing but news that don't concern us: the generation tells.
        if cause == "overflow"
            && let Some(backend) = self.backends.first_mut()
            && backend.generation().is_some_and(|now| Some(now) == self.generation)
        {
            return;
        }
        self.resync = Some(cause);
    }

    fn set_node_addresses(&mut self, addresses: &[IpAddr]) {
        let rules = ServiceRules {
            created: 0,
            frontends: Vec::new(),
            addresses: addresses.iter().map(|a| (AddressSet::NodeAddresses, *a)).collect(),
        };
        // No Service has an empty name.
        let outcome = self.desired.replace(&ObjectKey::default(), Some(rules));
        self.dirty.extend(outcome.dirty);
    }

    fn plan(&mut self, key: &ObjectKey) {
        let (rules, problems) = match self.objects.rules(key, &self.families) {
            Some((rules, problems)) => (Some(rules), problems),
            None => (None, Vec::new()),
        };
        self.report(key, &problems);
        let outcome = self.desired.replace(key, rules);
        for (frontend, owner) in outcome.taken {
            let message =
                format!("{frontend} is already that of the older Service {owner} and stays there");
            self.report(key, &[Problem::new("PortConflict", message)]);
        }
        for unit in outcome.dirty {
            if let Unit::Frontend(frontend) = unit {
                if self.desired.action(&frontend) == Some(&Action::Drop) {
                    self.dropped.insert(frontend);
                } else {
                    self.dropped.remove(&frontend);
                }
            }
            self.dirty.insert(unit);
        }
    }

    /// Writes all that was touched since the last time.
    pub(crate) fn commit(&mut self) {
        if !(self.listed.services && self.listed.slices) {
            return;
        }
        let full = !self.listed.synchronized || self.resync.is_some();
        if self.blocked {
            return;
        }
        if !full && self.dirty.is_empty() {
            self.settled();
            return;
        }
        if let Some(cause) = self.resync.take() {
            tracing::warn!(cause, "another program changed the proxy's rules; mending them");
            self.reports.metrics.drifted(cause);
        }
        let mut units: Vec<Unit> = self.dirty.drain().collect();
        units.sort_unstable();
        let mut failed = false;
        let goal = Goal { desired: &self.desired, objects: &self.objects };
        for backend in &mut self.backends {
            let begin = Instant::now();
            let family = backend.family();
            let result = if full { backend.synchronize(goal) } else { backend.apply(&units, goal) };
            match result {
                Ok(applied) => {
                    self.refused.extend(applied.refused.iter().map(|(unit, _)| *unit));
                    written(&self.reports, family, full, begin, &applied);
                    self.reports.metrics.holds(family, backend.units());
                    refused(&self.reports, &self.objects, &self.desired, &applied);
                    if let Some(cleaner) = &self.reports.conntrack
                        && backend.tracks_connections()
                    {
                        cleaner.forget(applied.aftermath.stale);
                    }
                    forget(&mut **backend, &applied.aftermath.forget);
                    if !applied.aftermath.forget.is_empty() {
                        // A packet that was under way may have been remembered after this look.
                        self.look_again_at.get_or_insert_with(|| Instant::now() + SECOND_LOOK);
                        self.look_again.extend(applied.aftermath.forget);
                    }
                }
                Err(error) => {
                    failed = true;
                    self.reports.metrics.failed(family);
                    tracing::error!(%error, family = family.as_str(), "rules not written; trying again");
                }
            }
        }
        if failed {
            // What the kernel has now is not known for sure: the next try compares everything.
            self.listed.synchronized = false;
            self.blocked = true;
            self.retry_at = Some(Instant::now() + self.backoff.next_wait());
            return;
        }
        self.listed.synchronized = true;
        if self.refused.is_empty() {
            self.backoff.reset();
        } else if self.retry_at.is_none() {
            self.retry_at = Some(Instant::now() + self.backoff.next_wait());
        }
        self.generation = self.backends.first_mut().and_then(|backend| backend.generation());
        self.settled();
    }

    /// Everything that was taken in is in the kernel, but for what it refuses.
    fn settled(&mut self) {
        if !self.refused.is_empty() {
            return;
        }
        let metrics = &self.reports.metrics;
        if let Some(since) = self.waiting_since.take() {
            metrics.committed(since.elapsed());
        }
        for (family, triggered) in self.triggered.drain(..) {
            metrics.programmed(family, triggered);
        }
        metrics.service_changes_pending.set(0);
        metrics.endpoint_changes_pending.set(0);
        for family in &self.families {
            let count = |lane| {
                self.dropped.iter().filter(|f| f.family == *family && f.lane == lane).count() as i64
            };
            metrics.without_local_endpoints(*family, count(Lane::Address), count(Lane::NodePort));
        }
        self.reports.health.updated();
    }

    fn report(&self, key: &ObjectKey, problems: &[Problem]) {
        report(&self.reports.events, &self.objects, key, problems);
    }
}

fn report(events: &EventRecorder, objects: &ServiceTable, key: &ObjectKey, problems: &[Problem]) {
    if problems.is_empty() {
        return;
    }
    let object = ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Service".into()),
        namespace: Some(key.namespace.clone()),
        name: Some(key.name.clone()),
        uid: objects.uid(key).map(str::to_owned),
        ..ObjectReference::default()
    };
    for problem in problems {
        tracing::warn!(service = %key, reason = problem.reason, "{}", problem.message);
        events.event(&object, EventType::Warning, problem.reason, problem.message.clone());
    }
}

fn forget(backend: &mut dyn Backend, forget: &[Forget]) {
    let family = backend.family();
    let own: Vec<Forget> = forget.iter().filter(|f| f.frontend.family == family).cloned().collect();
    if let Err(error) = backend.forget(&own) {
        tracing::warn!(%error, "sticky clients may be sent to endpoints that are gone");
    }
}

fn written(reports: &Reports, family: Family, full: bool, begin: Instant, applied: &Applied) {
    let took = begin.elapsed();
    reports.metrics.synced(family, full, took);
    if let Some(why) = &applied.rebuilt {
        tracing::info!(
            family = family.as_str(),
            why,
            elements = applied.elements,
            ?took,
            "rules made anew"
        );
    } else if full {
        tracing::info!(
            family = family.as_str(),
            elements = applied.elements,
            ?took,
            "rules compared with the kernel's"
        );
    } else {
        tracing::debug!(
            family = family.as_str(),
            elements = applied.elements,
            ?took,
            "rules changed"
        );
    }
}

fn refused(reports: &Reports, objects: &ServiceTable, desired: &Desired, applied: &Applied) {
    for (unit, error) in &applied.refused {
        reports.metrics.failed(unit.family());
        match unit {
            Unit::Frontend(frontend) => {
                let Some(owner) = desired.owner(frontend) else {
                    tracing::error!(%frontend, %error, "the kernel keeps a rule that should go");
                    continue;
                };
                let message = format!("{frontend} keeps its old rules: {error}");
                let problem = Problem::new("FailedToUpdateRules", message);
                report(&reports.events, objects, owner, &[problem]);
            }
            Unit::Address(_, address) => {
                tracing::error!(%address, %error, "the kernel refused an address");
            }
        }
    }
}
