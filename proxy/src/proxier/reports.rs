//! What the loop tells: metrics, events and log lines.

use std::{collections::HashMap, time::Duration};

use k8s_openapi::api::core::v1::ObjectReference;
use keelson_api::{
    events::{EventRecorder, EventType},
    object::ObjectKey,
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
    ruleset::Unit,
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
}

impl Telling {
    /// Looks at a Service again.
    pub(super) fn note(&mut self, key: &ObjectKey, objects: &ServiceTable, families: &[Family]) {
        self.local.note(key, objects, families);
        self.health_checks.note(key, objects);
    }

    /// Tells.
    pub(super) fn tell(&mut self, metrics: &Metrics, families: &[Family]) {
        self.local.tell(metrics, families);
        self.health_checks.publish();
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
    let object = ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Service".into()),
        namespace: Some(key.namespace.clone()),
        name: Some(key.name.clone()),
        uid: objects.uid(key),
        ..ObjectReference::default()
    };
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

/// Tells of what the kernel refused.
pub(super) fn refused(reports: &Reports, goal: Goal<'_>, applied: &Applied) {
    for (unit, error) in &applied.refused {
        reports.metrics.failed(unit.family(), false);
        match unit {
            Unit::Frontend(frontend) => {
                let Some(owner) = goal.desired.owner(frontend) else {
                    tracing::error!(%frontend, %error, "the kernel keeps a rule that should go");
                    continue;
                };
                let message = if error.may_pass() {
                    format!("{frontend} keeps its old rules: {error}")
                } else {
                    format!("{frontend} is not served: {error}")
                };
                let problem = Problem::new("FailedToUpdateRules", message);
                report(&reports.events, goal.objects, owner, &[problem]);
            }
            Unit::Address(_, address) => {
                tracing::error!(%address, %error, "the kernel refused an address");
            }
        }
    }
}
