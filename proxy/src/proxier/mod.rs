//! The loop: takes in changes, plans, commits, reports.
//!
//! ```text
//!   watches, drift ─► queue ─► take_in ─► wanted ──┬─► keeper of IPv4 ─► its backend
//!                                     (pure)       └─► keeper of IPv6 ─► its backend
//!                                                           │
//!                      connections, reports, health checks ◄┘ what came of it
//! ```
//!
//! It runs on a thread of its own, since a commit is a system call that may take as long as the
//! change is large, and it waits for nothing else: what comes in while nothing is going on is
//! committed at once; what comes in during a commit is committed together by the next one.
//!
//! Trouble stays where it is. What the kernel refuses by itself (a Service, an address) keeps its
//! old rules and is tried again, while all else goes in; a family in which nothing can be written is
//! tried again by [its keeper](keeper), while the other one goes on.

mod connections;
mod keeper;
mod reports;
#[cfg(test)]
mod tests;
mod wanted;

use std::{
    collections::BTreeMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use keelson_api::object::ObjectKey;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use self::{
    connections::Connections,
    keeper::{Commit, Keeper},
    reports::{About, Telling, report},
    wanted::Wanted,
};
use crate::{
    backend::{Backend, Goal},
    health_check::HealthChecks,
    model::{Family, Problem},
    ruleset::{
        AddressSet,
        desired::{Outcome, ServiceRules},
    },
    watches::{Change, ChangeKind},
};

pub(crate) use reports::{Reports, conflicts};

/// What is to be done for a family at its first commit, with what is desired.
type WhenInForce = Box<dyn FnMut(Family, Goal<'_>) + Send>;

/// How many changes are taken in before a commit: a flood must not put it off for ever.
const BURST: usize = 100_000;

/// The loop's state. All of it can be rebuilt from the API and the kernel.
pub(crate) struct Proxier {
    wanted: Wanted,
    /// One for each family.
    keepers: Vec<Keeper>,
    connections: Connections,
    telling: Telling,
    reports: Reports,
    /// Services whose plan takes long, to be planned by the next commit, and since when.
    unplanned: BTreeMap<ObjectKey, Instant>,
    pace: Pace,
    /// What is to be done when rules of a family are in force for the first time.
    when_in_force: Option<WhenInForce>,
    /// The kernel's number for the state of its tables after the last commit.
    generation: Option<u32>,
    stop: CancellationToken,
}

/// How often there may be a commit.
#[derive(Default)]
struct Pace {
    /// The shortest time between two.
    least: Duration,
    not_before: Option<Instant>,
}

impl Proxier {
    /// A loop over these backends, one for each family, which knows of no Service yet. `node_ips`
    /// may be empty: then the node's object tells.
    pub(crate) fn new(
        backends: Vec<Box<dyn Backend>>,
        node_ips: &[IpAddr],
        mut reports: Reports,
    ) -> Self {
        let keepers: Vec<Keeper> = backends.into_iter().map(Keeper::new).collect();
        let tracked = keepers.iter().any(Keeper::tracks_connections);
        let mut proxier = Self {
            wanted: Wanted::new(keepers.iter().map(Keeper::family).collect()),
            keepers,
            connections: Connections::new(reports.conntrack.take().filter(|_| tracked)),
            telling: Telling::default(),
            reports,
            unplanned: BTreeMap::new(),
            pace: Pace::default(),
            when_in_force: None,
            generation: None,
            stop: CancellationToken::new(),
        };
        let most = proxier.keepers.iter().map(Keeper::endpoints_max).min();
        most.into_iter().for_each(|most| proxier.wanted.objects.limit_endpoints(most));
        proxier.set_node_addresses(node_ips);
        proxier
    }

    /// Leaves at least so much time between two commits.
    pub(crate) fn paced(self, least: Duration) -> Self {
        Self { pace: Pace { least, not_before: None }, ..self }
    }

    /// Removes TCP connections to endpoints that are gone too.
    pub(crate) fn with_stale_tcp(mut self, tcp: bool) -> Self {
        self.connections.count_tcp(tcp);
        self.keepers.iter_mut().for_each(|keeper| keeper.count_tcp(tcp));
        self
    }

    /// Tells these of Services with health-check node ports.
    pub(crate) fn with_health_checks(mut self, mut health_checks: HealthChecks) -> Self {
        health_checks.take_node_addresses(&mut self.telling.health_checks);
        self.telling.health_checks = health_checks;
        self
    }

    /// Ends the loop before its next commit once this is cancelled, whatever still waits.
    pub(crate) fn stopped_by(self, stop: CancellationToken) -> Self {
        Self { stop, ..self }
    }

    /// Does something for each family, once, when its rules are in force for the first time.
    pub(crate) fn when_in_force(self, then: impl FnMut(Family, Goal<'_>) + Send + 'static) -> Self {
        Self { when_in_force: Some(Box::new(then)), ..self }
    }

    /// Takes in changes and commits them until the queue is closed; then the backends end too.
    pub(crate) async fn run(mut self, mut queue: mpsc::Receiver<Change>) {
        while !self.stop.is_cancelled() {
            let first = match self.wakes_at() {
                Some(at) => match tokio::time::timeout_at(at.into(), queue.recv()).await {
                    Ok(first) => first,
                    Err(_) => {
                        self.commit(Instant::now());
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
            while let Some(at) = self.pace.not_before.filter(|at| *at > Instant::now()) {
                match tokio::time::timeout_at(at.into(), queue.recv()).await {
                    Ok(Some(change)) => self.take_in(change),
                    Ok(None) => return,
                    Err(_) => break,
                }
            }
            self.commit(Instant::now());
            let least = self.pace.least;
            self.pace.not_before = (!least.is_zero()).then(|| Instant::now() + least);
        }
    }

    /// When there is something to do though nothing changes.
    pub(crate) fn wakes_at(&self) -> Option<Instant> {
        let keepers = self.keepers.iter().filter_map(Keeper::wakes_at);
        keepers.chain(self.connections.wakes_at()).min()
    }

    /// Takes in one change; [`Self::commit`] writes what it touches.
    pub(crate) fn take_in(&mut self, change: Change) {
        let metrics = &self.reports.metrics;
        let objects = &mut self.wanted.objects;
        let touched = match change.kind {
            ChangeKind::Service(key, service, problems) => {
                metrics.service_changes.inc();
                metrics.service_changes_pending.inc();
                let changed = objects.set_service(&key, service);
                if self.telling.told.is_news(About::Service, &key, &problems) {
                    self.report(&key, &problems);
                }
                if changed { vec![key] } else { Vec::new() }
            }
            ChangeKind::Slice(key, slice, problems) => {
                metrics.endpoint_changes.inc();
                metrics.endpoint_changes_pending.inc();
                let triggered_before = objects.triggered(&key);
                let arrived = slice.as_ref().map(|s| (s.family, s.triggered, s.service.clone()));
                let touched = objects.set_slice(&key, slice);
                let news = self.telling.told.is_news(About::Slice, &key, &problems);
                if let Some((family, triggered, service)) = arrived {
                    if news {
                        self.report(&service, &problems);
                    }
                    // An old time is told again with every later change of the slice.
                    if let Some(triggered) = triggered.filter(|t| Some(*t) != triggered_before)
                        && let Some(keeper) = self.keepers.iter_mut().find(|k| k.family() == family)
                    {
                        keeper.triggered(service, triggered);
                    }
                }
                touched
            }
            ChangeKind::Services(all) => {
                self.wanted.listed.services = true;
                let gone: Vec<ObjectKey> =
                    objects.keys().filter(|key| !all.contains(key)).cloned().collect();
                for key in &gone {
                    self.telling.told.is_news(About::Service, key, &[]);
                    objects.set_service(key, None);
                }
                gone
            }
            ChangeKind::Slices(all) => {
                self.wanted.listed.slices = true;
                let gone: Vec<ObjectKey> =
                    objects.slice_keys().filter(|key| !all.contains(key)).cloned().collect();
                let told = &mut self.telling.told;
                let gone = gone.iter().flat_map(|key| {
                    told.is_news(About::Slice, key, &[]);
                    objects.set_slice(key, None)
                });
                gone.collect()
            }
            ChangeKind::Node { addresses, eligible } => {
                self.reports.health.set_eligible(eligible);
                if !addresses.is_empty() {
                    self.set_node_addresses(&addresses);
                }
                Vec::new()
            }
            ChangeKind::ServiceRanges(ranges) => {
                let outcome = self.wanted.desired.set_service_ranges(ranges);
                self.changed(&outcome, Some(change.at));
                Vec::new()
            }
            ChangeKind::Drift(cause) => {
                self.heard(cause);
                Vec::new()
            }
        };
        if !touched.is_empty() {
            for family in &self.wanted.families {
                self.reports.metrics.queued(*family);
            }
        }
        for key in touched {
            if self.wanted.objects.has_many_slices(&key) {
                self.unplanned.entry(key).or_insert(change.at);
            } else {
                self.plan(&key, change.at);
            }
        }
    }

    fn heard(&mut self, cause: &'static str) {
        // An overflow may have lost nothing but news that don't concern us, and when it is only time
        // to look there may be no news at all: the generation tells.
        if matches!(cause, "overflow" | "period")
            && let Some(keeper) = self.keepers.first_mut()
            && keeper.generation().is_some_and(|now| Some(now) == self.generation)
        {
            return;
        }
        let news =
            self.keepers.iter_mut().filter_map(|keeper| keeper.doubted().then_some(())).count();
        if news > 0 {
            tracing::warn!(cause, "another program changed the proxy's rules; mending them");
            self.reports.metrics.drifted(cause);
        }
    }

    fn set_node_addresses(&mut self, addresses: &[IpAddr]) {
        self.telling.health_checks.set_node_addresses(addresses);
        let rules = ServiceRules {
            addresses: addresses.iter().map(|a| (AddressSet::NodeAddresses, *a)).collect(),
            ..ServiceRules::default()
        };
        // No Service has an empty name.
        let outcome = self.wanted.desired.replace(&ObjectKey::default(), Some(rules));
        self.changed(&outcome, None);
    }

    fn plan(&mut self, key: &ObjectKey, at: Instant) {
        self.unplanned.remove(key);
        let Wanted { objects, desired, families, .. } = &mut self.wanted;
        let (rules, mut problems) = match objects.rules(key, families) {
            Some((rules, problems)) => (Some(rules), problems),
            None => (None, Vec::new()),
        };
        let outcome = desired.replace(&objects.shared_key(key), rules);
        let unchecked = self.telling.note(key, objects, families);
        self.telling.health_checks.touched(&outcome.dirty);
        self.changed(&outcome, Some(at));
        problems.extend(reports::conflicts(&outcome.taken));
        if self.telling.told.is_news(About::Plan, key, &problems) {
            self.report(key, &problems);
        }
        for (loser, problem) in reports::losers(key, &outcome.won) {
            self.report(&loser, std::slice::from_ref(&problem));
            self.telling.told.add(About::Plan, &loser, problem);
        }
        if let Some((loser, problem)) = unchecked {
            self.report(&loser, &[problem]);
        }
    }

    fn changed(&mut self, outcome: &Outcome, at: Option<Instant>) {
        for keeper in &mut self.keepers {
            if keeper.changed(outcome, at) {
                self.reports.health.queued(keeper.family());
            }
        }
    }

    /// Writes all that was touched since the last time, and what is to be tried again by now.
    pub(crate) fn commit(&mut self, now: Instant) {
        if !self.wanted.is_known() {
            return;
        }
        while let Some((key, at)) = self.unplanned.pop_first() {
            self.plan(&key, at);
        }
        let mut keepers: Vec<&mut Keeper> = self.keepers.iter_mut().collect();
        // Who couldn't write the last time may take long to find that out again.
        keepers.sort_by_key(|keeper| keeper.is_blocked());
        let (mut compared, mut stale, mut wrote) = (Vec::new(), Vec::new(), false);
        for keeper in keepers {
            match keeper.commit(self.wanted.goal(), &self.reports, now) {
                Commit::Waits | Commit::Idle => {}
                Commit::Tried { full, first, stale: left } => {
                    wrote = true;
                    if full {
                        compared.push(keeper.family());
                    } else {
                        stale.extend(left);
                    }
                    if let Some(then) = self.when_in_force.as_mut().filter(|_| first) {
                        then(keeper.family(), self.wanted.goal());
                    }
                }
            }
        }
        // After a start, and after rules were missing, no one change tells what is stale.
        self.connections.compare(&self.wanted, &compared);
        self.connections.forget(stale, now);
        self.connections.make_up(&self.wanted, now);
        if wrote {
            self.generation = self.keepers.first_mut().and_then(Keeper::generation);
        }
        let metrics = &self.reports.metrics;
        if !self.keepers.iter().any(Keeper::is_blocked) {
            metrics.service_changes_pending.set(0);
            metrics.endpoint_changes_pending.set(0);
        }
        let unchecked = self.telling.tell(metrics, &self.wanted.families, &self.wanted.desired);
        for (service, problem) in unchecked {
            self.report(&service, &[problem]);
        }
    }

    fn report(&self, key: &ObjectKey, problems: &[Problem]) {
        report(&self.reports.events, &self.wanted.objects, key, problems);
    }
}
