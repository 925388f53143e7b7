//! A Deployment's status and conditions.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::{
    api::apps::v1::{Deployment, DeploymentCondition, DeploymentStatus, ReplicaSet},
    apimachinery::pkg::apis::meta::v1::Time,
};

use super::sizes;

pub(crate) const PROGRESSING: &str = "Progressing";
const AVAILABLE: &str = "Available";
const REPLICA_FAILURE: &str = "ReplicaFailure";
const COMPLETE: &str = "NewReplicaSetAvailable";
const TIMED_OUT: &str = "ProgressDeadlineExceeded";

/// A condition with what it says.
#[derive(Clone, Debug)]
pub(crate) struct Saying {
    pub(crate) status: &'static str,
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

/// The conditions of a Deployment, changed by the documented rules about their times.
#[derive(Clone, Debug, Default)]
pub(crate) struct Conditions(Vec<DeploymentCondition>);

impl Conditions {
    pub(crate) fn of(deployment: &Deployment) -> Self {
        let conditions = deployment.status.as_ref().and_then(|s| s.conditions.clone());
        Self(conditions.unwrap_or_default())
    }

    pub(crate) fn get(&self, kind: &str) -> Option<&DeploymentCondition> {
        self.0.iter().find(|c| c.type_ == kind)
    }

    fn reason(&self, kind: &str) -> Option<&str> {
        self.get(kind)?.reason.as_deref()
    }

    fn remove(&mut self, kind: &str) {
        self.0.retain(|c| c.type_ != kind);
    }

    /// Says something; saying the same again changes nothing.
    pub(crate) fn set(&mut self, kind: &str, saying: Saying, now: Timestamp) {
        let known = self.get(kind);
        if known.is_some_and(|c| {
            c.status == saying.status && c.reason.as_deref() == Some(saying.reason)
        }) {
            return;
        }
        self.refresh(kind, saying, now);
    }

    /// Says something again: the update time is now even if it is the same.
    fn refresh(&mut self, kind: &str, saying: Saying, now: Timestamp) {
        let since = self
            .get(kind)
            .filter(|c| c.status == saying.status)
            .and_then(|c| c.last_transition_time.clone());
        self.remove(kind);
        self.0.push(DeploymentCondition {
            type_: kind.to_owned(),
            status: saying.status.to_owned(),
            reason: Some(saying.reason.to_owned()),
            message: Some(saying.message),
            last_transition_time: since.or(Some(Time(now))),
            last_update_time: Some(Time(now)),
        });
    }
}

/// The seconds that an update may be without progress; `None` for no limit.
fn deadline(deployment: &Deployment) -> Option<i64> {
    let seconds = deployment.spec.as_ref()?.progress_deadline_seconds?;
    (seconds != i32::MAX).then_some(seconds.into())
}

/// Says that a rollout was paused or goes on, so that time paused does not count as being stuck.
pub(crate) fn note_pause(deployment: &Deployment, conditions: &mut Conditions, now: Timestamp) {
    if deadline(deployment).is_none() || conditions.reason(PROGRESSING) == Some(TIMED_OUT) {
        return;
    }
    let paused = deployment.spec.as_ref().and_then(|s| s.paused) == Some(true);
    let said = conditions.reason(PROGRESSING) == Some("DeploymentPaused");
    let saying = match (paused, said) {
        (true, false) => ("DeploymentPaused", "Deployment is paused"),
        (false, true) => ("DeploymentResumed", "Deployment is resumed"),
        _ => return,
    };
    let (reason, message) = saying;
    let saying = Saying { status: "Unknown", reason, message: message.to_owned() };
    conditions.set(PROGRESSING, saying, now);
}

/// The numbers, and the condition `Available`.
pub(crate) fn numbers(
    deployment: &Deployment,
    sets: &[ReplicaSet],
    newest: Option<usize>,
    conditions: &mut Conditions,
    now: Timestamp,
) -> DeploymentStatus {
    let sum = |number: &dyn Fn(&ReplicaSet) -> i32| sets.iter().map(number).sum::<i32>();
    let of = |set: &ReplicaSet| set.status.clone().unwrap_or_default();
    let wanted = deployment.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1);
    let asked = sum(&sizes::size);
    let available = sum(&|set| of(set).available_replicas.unwrap_or(0));
    let updated = newest.map_or(0, |i| of(&sets[i]).replicas);
    let (_, may_miss) = sizes::bounds(deployment);
    let saying = if available >= wanted - may_miss {
        Saying {
            status: "True",
            reason: "MinimumReplicasAvailable",
            message: "Deployment has minimum availability.".to_owned(),
        }
    } else {
        Saying {
            status: "False",
            reason: "MinimumReplicasUnavailable",
            message: "Deployment does not have minimum availability.".to_owned(),
        }
    };
    conditions.set(AVAILABLE, saying, now);
    let some = |number: i32| Some(number).filter(|n| *n != 0);
    DeploymentStatus {
        observed_generation: deployment.metadata.generation,
        replicas: some(sum(&|set| of(set).replicas)),
        updated_replicas: some(updated),
        ready_replicas: some(sum(&|set| of(set).ready_replicas.unwrap_or(0))),
        available_replicas: some(available),
        unavailable_replicas: some((asked - available).max(0)),
        terminating_replicas: Some(sum(&|set| of(set).terminating_replicas.unwrap_or(0))),
        collision_count: deployment.status.as_ref().and_then(|s| s.collision_count),
        conditions: None,
    }
}

/// Puts the conditions into the status.
pub(crate) fn with_conditions(mut status: DeploymentStatus, c: Conditions) -> DeploymentStatus {
    status.conditions = (!c.0.is_empty()).then_some(c.0);
    status
}

/// Judges an update's progress, and says when to look again for being stuck.
pub(crate) fn progress(
    deployment: &Deployment,
    sets: &[ReplicaSet],
    newest: Option<usize>,
    status: &DeploymentStatus,
    conditions: &mut Conditions,
    now: Timestamp,
) -> Option<Duration> {
    note_failure(sets, newest, conditions);
    let Some(deadline) = deadline(deployment) else {
        conditions.remove(PROGRESSING);
        return None;
    };
    let was_complete = status.replicas == status.updated_replicas
        && conditions.reason(PROGRESSING) == Some(COMPLETE);
    if was_complete {
        return None;
    }
    let what = match newest.and_then(|i| sets[i].metadata.name.as_deref()) {
        Some(set) => format!("ReplicaSet \"{set}\""),
        None => {
            format!("Deployment \"{}\"", deployment.metadata.name.as_deref().unwrap_or_default())
        }
    };
    let old = deployment.status.clone().unwrap_or_default();
    let n = |number: Option<i32>| number.unwrap_or(0);
    let wanted = deployment.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1);
    let complete = n(status.updated_replicas) == wanted
        && n(status.replicas) == wanted
        && n(status.available_replicas) == wanted;
    let left_old = |s: &DeploymentStatus| n(s.replicas) - n(s.updated_replicas);
    let progressed = n(status.updated_replicas) > n(old.updated_replicas)
        || left_old(status) < left_old(&old)
        || n(status.ready_replicas) > n(old.ready_replicas)
        || n(status.available_replicas) > n(old.available_replicas);
    if complete {
        let message = format!("{what} has successfully progressed.");
        conditions.set(PROGRESSING, Saying { status: "True", reason: COMPLETE, message }, now);
        return None;
    }
    if progressed {
        let message = format!("{what} is progressing.");
        let saying = Saying { status: "True", reason: "ReplicaSetUpdated", message };
        conditions.refresh(PROGRESSING, saying, now);
    }
    stuck(conditions, deadline, what, now)
}

fn stuck(
    conditions: &mut Conditions,
    deadline: i64,
    what: String,
    now: Timestamp,
) -> Option<Duration> {
    let condition = conditions.get(PROGRESSING)?;
    if matches!(condition.reason.as_deref(), Some(COMPLETE | TIMED_OUT | "DeploymentPaused")) {
        return None;
    }
    let since = condition.last_update_time.as_ref()?.0;
    let left = deadline - now.duration_since(since).as_secs();
    if left > 0 {
        return u64::try_from(left + 1).ok().map(Duration::from_secs);
    }
    let message = format!("{what} has timed out progressing.");
    conditions.set(PROGRESSING, Saying { status: "False", reason: TIMED_OUT, message }, now);
    None
}

/// Shows the failure of the newest set to make pods, or of any if the newest has none.
fn note_failure(sets: &[ReplicaSet], newest: Option<usize>, conditions: &mut Conditions) {
    let failure = |set: &ReplicaSet| {
        let conditions = set.status.as_ref().and_then(|s| s.conditions.as_ref());
        conditions.into_iter().flatten().find(|c| c.type_ == REPLICA_FAILURE).cloned()
    };
    let found = newest
        .and_then(|i| failure(&sets[i]))
        .or_else(|| if newest.is_none() { sets.iter().find_map(failure) } else { None });
    conditions.remove(REPLICA_FAILURE);
    if let Some(found) = found {
        conditions.0.push(DeploymentCondition {
            type_: REPLICA_FAILURE.to_owned(),
            status: found.status,
            reason: found.reason,
            message: found.message,
            last_update_time: found.last_transition_time.clone(),
            last_transition_time: found.last_transition_time,
        });
    }
}
