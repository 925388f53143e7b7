//! What controllers ask of a pod.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodCondition};

/// A pod's condition of a type.
pub(crate) fn condition<'p>(pod: &'p Pod, kind: &str) -> Option<&'p PodCondition> {
    pod.status.as_ref()?.conditions.iter().flatten().find(|c| c.type_ == kind)
}

/// Whether its condition `Ready` is `True`.
pub(crate) fn is_ready(pod: &Pod) -> bool {
    condition(pod, "Ready").is_some_and(|c| c.status == "True")
}

/// Its phase; empty if it has none yet.
pub(crate) fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or_default()
}

/// Whether it has run to its end.
pub(crate) fn is_over(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

/// Whether it is asked to end.
pub(crate) fn is_terminating(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

/// Whether it runs, or will.
pub(crate) fn is_active(pod: &Pod) -> bool {
    !is_over(pod) && !is_terminating(pod)
}

/// The node that it is bound to.
pub(crate) fn node_name(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref().filter(|name| !name.is_empty())
}

/// Whether and when a pod counts as available.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Availability {
    /// It has been ready for long enough.
    Now,
    /// It will be after this time, if it stays ready.
    In(Duration),
    /// It is not ready.
    No,
}

/// A pod is available once it has been ready for `minReadySeconds`.
pub(crate) fn availability(pod: &Pod, min_ready_seconds: i32, now: Timestamp) -> Availability {
    let Some(ready) = condition(pod, "Ready").filter(|c| c.status == "True") else {
        return Availability::No;
    };
    if min_ready_seconds <= 0 {
        return Availability::Now;
    }
    let Some(since) = &ready.last_transition_time else { return Availability::No };
    let needed = Duration::from_secs(min_ready_seconds.unsigned_abs().into());
    let been = Duration::try_from(now.duration_since(since.0)).unwrap_or_default();
    match needed.checked_sub(been) {
        None | Some(Duration::ZERO) => Availability::Now,
        Some(left) => Availability::In(left),
    }
}
