//! The loop: takes in changes, plans, commits, reports.
//!
//! It runs on a thread of its own, since a commit is a system call that may take as long as the
//! change is large, and it waits for nothing else: what comes in while nothing is going on is
//! committed at once; what comes in during a commit is committed together by the next one.

mod reports;

use std::{
    collections::HashSet,
    net::IpAddr,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use keelson_api::{backoff::Backoff, object::ObjectKey};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    backend::{Backend, Forget, Goal},
    conntrack::stale::{Expected, Tracker},
    health_check::HealthChecks,
    model::{Family, Problem, table::ServiceTable},
    ruleset::{
        AddressSet, Unit,
        desired::{Desired, ServiceRules},
    },
    watches::{Change, ChangeKind},
};

pub(crate) use reports::Reports;
use reports::{LocalEndpoints, refused, report, written};

/// How many changes are taken in before a commit: a flood must not put it off for ever.
const BURST: usize = 100_000;
/// How long after a commit the last packet that didn't see it is surely through.
const SECOND_LOOK: Duration = Duration::from_secs(1);
/// The first and the longest wait before what the kernel refused is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

/// The loop's state. All of it can be rebuilt from the API and the kernel.
pub(crate) struct Proxier {
    backends: Vec<Box<dyn Backend>>,
    families: Vec<Family>,
    objects: ServiceTable,
    desired: Desired,
    reports: Reports,
    listed: Listed,
    dirty: HashSet<Unit>,
    /// Where a policy finds no endpoint on this node.
    local: LocalEndpoints,
    health_checks: HealthChecks,
    /// Which connections the changes since the last commit leave behind.
    stale: Tracker,
    /// Whether TCP connections can be stale.
    tcp: bool,
    /// The shortest time between two commits, and when the next one may come.
    pace: Duration,
    not_before: Option<Instant>,
    /// What is to be done once the rules are in force for the first time.
    once_in_force: Option<Box<dyn FnOnce() + Send>>,
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
    stop: CancellationToken,
}

#[derive(Default)]
struct Listed {
    services: bool,
    slices: bool,
    /// Whether the kernel was compared with what is desired.
    synchronized: bool,
}

impl Proxier {
    /// A loop over these backends, one for each family, which knows of no Service yet. `node_ips`
    /// may be empty: then the node's object tells.
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
            local: LocalEndpoints::default(),
            health_checks: HealthChecks::default(),
            stale: Tracker::default(),
            tcp: false,
            pace: Duration::ZERO,
            not_before: None,
            once_in_force: None,
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
            stop: CancellationToken::new(),
        };
        proxier.set_node_addresses(node_ips);
        proxier
    }

    /// Leaves at least so much time between two commits.
    pub(crate) fn paced(self, pace: Duration) -> Self {
        Self { pace, ..self }
    }

    /// Removes TCP connections to endpoints that are gone too.
    pub(crate) fn with_stale_tcp(self, tcp: bool) -> Self {
        Self { tcp, stale: Tracker::with_tcp(tcp), ..self }
    }

    /// Tells these of Services with health-check node ports.
    pub(crate) fn with_health_checks(mut self, mut health_checks: HealthChecks) -> Self {
        health_checks.take_node_addresses(&mut self.health_checks);
        Self { health_checks, ..self }
    }

    /// Ends the loop before its next commit once this is cancelled, whatever still waits.
    pub(crate) fn stopped_by(self, stop: CancellationToken) -> Self {
        Self { stop, ..self }
    }

    /// Does something once when the rules are in force for the first time.
    pub(crate) fn once_in_force(self, then: impl FnOnce() + Send + 'static) -> Self {
        Self { once_in_force: Some(Box::new(then)), ..self }
    }

    /// Takes in changes and commits them until the queue is closed; then the backends end too.
    pub(crate) async fn run(mut self, mut queue: mpsc::Receiver<Change>) {
        while !self.stop.is_cancelled() {
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
            while let Some(at) = self.not_before.filter(|at| *at > Instant::now()) {
                match tokio::time::timeout_at(at.into(), queue.recv()).await {
                    Ok(Some(change)) => self.take_in(change),
                    Ok(None) => return,
                    Err(_) => break,
                }
            }
            self.commit();
            self.not_before = (!self.pace.is_zero()).then(|| Instant::now() + self.pace);
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
        // An overflow may have lost nothing but news that don't concern us, and when it is only time
        // to look there may be no news at all: the generation tells.
        if matches!(cause, "overflow" | "period")
            && let Some(backend) = self.backends.first_mut()
            && backend.generation().is_some_and(|now| Some(now) == self.generation)
        {
            return;
        }
        self.resync = Some(cause);
    }

    fn set_node_addresses(&mut self, addresses: &[IpAddr]) {
        self.health_checks.set_node_addresses(addresses);
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
        let outcome = self.desired.replace_shared(key, rules, || self.objects.shared_key(key));
        if self.listed.synchronized {
            self.stale.changed(&outcome);
        }
        for (frontend, owner) in outcome.taken {
            let message =
                format!("{frontend} is already that of the older Service {owner} and stays there");
            self.report(key, &[Problem::new("PortConflict", message)]);
        }
        self.dirty.extend(outcome.dirty);
        self.local.note(key, &self.objects, &self.families);
        self.health_checks.note(key, &self.objects);
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
        // After a load there is no need for room for as much again.
        let mut units: Vec<Unit> = std::mem::take(&mut self.dirty).into_iter().collect();
        units.sort_unstable();
        let mut failed = false;
        let goal = Goal { desired: &self.desired, objects: &self.objects };
        for backend in &mut self.backends {
            let begin = Instant::now();
            let family = backend.family();
            let result = if full { backend.synchronize(goal) } else { backend.apply(&units, goal) };
            match result {
                Ok(applied) => {
                    let again = applied.refused.iter().filter(|(_, error)| error.may_pass());
                    self.refused.extend(again.map(|(unit, _)| *unit));
                    written(&self.reports, family, full, begin, &applied);
                    self.reports.metrics.holds(family, backend.units());
                    refused(&self.reports, &self.objects, &self.desired, &applied);
                    forget(&mut **backend, &applied.forget);
                    if !applied.forget.is_empty() {
                        // A packet that was under way may have been remembered after this look.
                        self.look_again_at.get_or_insert_with(|| Instant::now() + SECOND_LOOK);
                        self.look_again.extend(applied.forget);
                    }
                }
                Err(error) => {
                    failed = true;
                    self.reports.metrics.failed(family, full);
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
        self.forget_connections(full);
        self.listed.synchronized = true;
        if let Some(then) = self.once_in_force.take() {
            then();
        }
        if self.refused.is_empty() {
            self.backoff.reset();
        } else if self.retry_at.is_none() {
            self.retry_at = Some(Instant::now() + self.backoff.next_wait());
        }
        self.generation = self.backends.first_mut().and_then(|backend| backend.generation());
        self.settled();
    }

    /// Has connections forgotten that the change leaves behind; after a start, and after rules were
    /// missing, all that don't go where they should.
    fn forget_connections(&mut self, full: bool) {
        let (desired, objects) = (&self.desired, &self.objects);
        let stale = self.stale.settle(desired, objects);
        let tracked = self.backends.iter().any(|backend| backend.tracks_connections());
        let Some(cleaner) = self.reports.conntrack.as_ref().filter(|_| tracked) else { return };
        if full {
            cleaner.compare(Expected::of(desired, objects, &self.families, self.tcp));
        } else {
            cleaner.forget(stale);
        }
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
        self.local.tell(metrics, &self.families);
        self.health_checks.publish();
        self.reports.health.updated();
    }

    fn report(&self, key: &ObjectKey, problems: &[Problem]) {
        report(&self.reports.events, &self.objects, key, problems);
    }
}

fn forget(backend: &mut dyn Backend, forget: &[Forget]) {
    let family = backend.family();
    let own: Vec<Forget> = forget.iter().filter(|f| f.frontend.family == family).cloned().collect();
    if let Err(error) = backend.forget(&own) {
        tracing::warn!(%error, "sticky clients may be sent to endpoints that are gone");
    }
}
