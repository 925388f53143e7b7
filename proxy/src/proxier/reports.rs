//! What the loop tells: metrics, events and log lines.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Duration,
};

use k8s_openapi::api::core::v1::Service;
use keelson_api::{
    events::{EventRecorder, EventType},
    object::{ObjectKey, reference_by_key},
};

use crate::{
    backend::{Applied, Goal},
    conntrack::Cleaner,
    health::Health,
    health_check::HealthChecks,
    metrics::Metrics,
    model::{
        Family, Problem,
        table::{ServiceTable, WithoutLocal},
    },
    ruleset::{Frontend, Lane, Unit, desired::Desired},
};

/// All that the loop reports to.
pub(crate) struct Reports {
    pub(crate) metrics: Metrics,
    pub(crate) health: Health,
    pub(crate) events: EventRecorder,
    pub(crate) conntrack: Option<Cleaner>,
}

/// What is told of all Services after each commit, whatever came of it.
#[derive(Default)]
pub(super) struct Telling {
    /// Where a policy finds no endpoint on this node.
    local: LocalEndpoints,
    /// Health-check node ports.
    pub(super) health_checks: HealthChecks,
    /// What was told already.
    pub(super) told: Told,
}

impl Telling {
    /// Looks at a Service again. Whom to tell that another one has its health-check node port.
    pub(super) fn note(
        &mut self,
        key: &ObjectKey,
        objects: &ServiceTable,
        families: &[Family],
    ) -> Option<(ObjectKey, Problem)> {
        self.local.note(key, objects, families);
        self.health_checks.note(key, objects)
    }

    /// Tells. Whom to tell that its health-check node port is another Service's node port.
    pub(super) fn tell(
        &mut self,
        metrics: &Metrics,
        families: &[Family],
        desired: &Desired,
    ) -> Vec<(ObjectKey, Problem)> {
        self.local.tell(metrics, families);
        self.health_checks.publish(desired)
    }
}

/// Service ports whose policy is Local and that have endpoints, but none on this node.
#[derive(Debug, Default)]
struct LocalEndpoints(HashMap<ObjectKey, Vec<WithoutLocal>>);

impl LocalEndpoints {
    fn note(&mut self, key: &ObjectKey, objects: &ServiceTable, families: &[Family]) {
        let without = objects.without_local_endpoints(key, families);
        if without.is_empty() {
            self.0.remove(key);
        } else {
            self.0.insert(key.clone(), without);
        }
    }

    fn tell(&self, metrics: &Metrics, families: &[Family]) {
        for family in families {
            let mut counts = (0, 0);
            for one in self.0.values().flatten().filter(|one| one.family == *family) {
                counts.0 += i64::from(one.internal);
                counts.1 += i64::from(one.external);
            }
            metrics.without_local_endpoints(*family, counts.0, counts.1);
        }
    }
}

/// Tells of what is wrong with a Service, as events on it.
pub(super) fn report(
    events: &EventRecorder,
    objects: &ServiceTable,
    key: &ObjectKey,
    problems: &[Problem],
) {
    if problems.is_empty() {
        return;
    }
    let object = reference_by_key::<Service>(key, objects.uid(key));
    for problem in problems {
        tracing::warn!(service = %key, reason = problem.reason, "{}", problem.message);
        events.event(&object, EventType::Warning, problem.reason, problem.message.clone());
    }
}

/// Tells of a commit.
pub(super) fn written(
    reports: &Reports,
    family: Family,
    full: bool,
    took: Duration,
    applied: &Applied,
) {
    reports.metrics.synced(family, full, took);
    reports.metrics.rules(family, &applied.tables);
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

/// Tells that a commit met, and mended, what another program had changed.
pub(super) fn drifted(reports: &Reports, family: Family, cause: &'static str) {
    tracing::warn!(
        cause,
        family = family.as_str(),
        "another program had changed the proxy's rules; they are mended"
    );
    reports.metrics.drifted(cause);
}

/// What there is to tell of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum About {
    /// What is wrong in a Service.
    Service,
    /// What a Service comes to.
    Plan,
    /// A slice.
    Slice,
}

/// What was told of objects, so that a change that has nothing to do with it doesn't tell it again:
/// a Service may have a problem for as long as it lives, and its endpoints come and go.
#[derive(Debug, Default)]
pub(super) struct Told(BTreeMap<(About, ObjectKey), Vec<Problem>>);

impl Told {
    /// Whether these problems of an object are others than the last ones.
    pub(super) fn is_news(&mut self, about: About, key: &ObjectKey, problems: &[Problem]) -> bool {
        // Most objects never have any.
        if problems.is_empty() {
            if !self.0.is_empty() {
                self.0.remove(&(about, key.clone()));
            }
            return false;
        }
        let before = self.0.insert((about, key.clone()), problems.to_vec());
        before.as_deref() != Some(problems)
    }

    /// Notes one more problem of an object that was told.
    pub(super) fn add(&mut self, about: About, key: &ObjectKey, problem: Problem) {
        self.0.entry((about, key.clone())).or_default().push(problem);
    }
}

/// What a backend refuses, as it was told.
#[derive(Debug, Default)]
pub(super) struct Refusals(HashMap<Unit, String>);

impl Refusals {
    /// What is refused of what was written (everything, if nothing is named) and was not refused
    /// for the same reason the last time.
    fn news(&mut self, written: Option<&[Unit]>, applied: &Applied) -> Vec<(Unit, String)> {
        if self.0.is_empty() && applied.refused.is_empty() {
            return Vec::new();
        }
        let mut news = Vec::new();
        let mut still = HashSet::new();
        for (unit, error) in &applied.refused {
            let message = if error.may_pass() {
                format!("keeps its old rules: {error}")
            } else {
                format!("is not served: {error}")
            };
            still.insert(*unit);
            if self.0.get(unit) != Some(&message) {
                self.0.insert(*unit, message.clone());
                news.push((*unit, message));
            }
        }
        let written: Option<HashSet<&Unit>> = written.map(|units| units.iter().collect());
        let was_written = |unit: &Unit| written.as_ref().is_none_or(|units| units.contains(unit));
        self.0.retain(|unit, _| still.contains(unit) || !was_written(unit));
        news
    }
}

/// Frontends that other Services have, in words.
pub(crate) fn conflicts(taken: &[(Frontend, ObjectKey)]) -> impl Iterator<Item = Problem> {
    taken.iter().filter_map(|(frontend, owner)| conflict(frontend, owner))
}

/// Whom to tell that frontends are another Service's from now on.
pub(super) fn losers(
    winner: &ObjectKey,
    won: &[(Frontend, ObjectKey)],
) -> impl Iterator<Item = (ObjectKey, Problem)> {
    won.iter()
        .filter_map(move |(frontend, loser)| Some((loser.clone(), conflict(frontend, winner)?)))
}

/// Lanes of one address are one to people.
fn conflict(frontend: &Frontend, owner: &ObjectKey) -> Option<Problem> {
    let for_everybody = matches!(frontend.lane, Lane::Address | Lane::NodePort);
    for_everybody.then(|| {
        let message = format!("{frontend} is that of the older Service {owner}");
        Problem::new("PortConflict", message)
    })
}

/// So many of the units that one commit was refused are told of one by one.
const REFUSALS_TOLD: usize = 100;

/// Tells of what the kernel refused of what was written, or of everything, if that is news.
pub(super) fn refused(
    reports: &Reports,
    goal: Goal<'_>,
    told: &mut Refusals,
    written: Option<&[Unit]>,
    applied: &Applied,
) {
    for (unit, _) in &applied.refused {
        reports.metrics.failed(unit.family(), false);
    }
    let news = told.news(written, applied);
    if news.len() > REFUSALS_TOLD {
        tracing::error!(
            refused = news.len(),
            "many rules were refused; the first {REFUSALS_TOLD} follow"
        );
    }
    for (unit, message) in news.into_iter().take(REFUSALS_TOLD) {
        match unit {
            Unit::Frontend(frontend) => {
                let Some(owner) = goal.desired.owner(&frontend) else {
                    tracing::error!(%frontend, "the kernel keeps a rule that should go: it {message}");
                    continue;
                };
                let problem = Problem::new("FailedToUpdateRules", format!("{frontend} {message}"));
                report(&reports.events, goal.objects, owner, &[problem]);
            }
            Unit::Address(_, address) => {
                tracing::error!(%address, "the kernel refused an address: it {message}");
            }
            Unit::ServiceRanges(family) => {
                let family = family.as_str();
                tracing::error!(family, "the kernel refused the ranges of Services: it {message}");
            }
        }
    }
}
