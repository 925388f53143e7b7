//! A pod's conditions.

use k8s_openapi::{
    api::core::v1::{ContainerStatus, PodCondition, PodStatus},
    apimachinery::pkg::apis::meta::v1::Time,
};

use super::StatusInput;
use crate::worker::view;

struct Verdict {
    status: bool,
    reason: Option<&'static str>,
    message: Option<String>,
}

impl Verdict {
    fn yes() -> Self {
        Self { status: true, reason: None, message: None }
    }

    fn no(reason: &'static str, message: Option<String>) -> Self {
        Self { status: false, reason: Some(reason), message }
    }
}

/// The conditions that this node sets on every pod.
const OWN: [&str; 4] = ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady"];

/// This node's own conditions from `known`, and everybody else's from `reported`.
pub(crate) fn with_foreign(
    known: Vec<PodCondition>,
    reported: Vec<PodCondition>,
    is_static: bool,
) -> Vec<PodCondition> {
    let own = |condition: &PodCondition| {
        OWN.contains(&condition.type_.as_str()) || (is_static && condition.type_ == "PodScheduled")
    };
    let mut all: Vec<_> = known.into_iter().filter(|condition| own(condition)).collect();
    all.extend(reported.into_iter().filter(|condition| !own(condition)));
    all.sort_by(|a, b| a.type_.cmp(&b.type_));
    all
}

/// All conditions of the pod: those that others set as they were, and this node's own.
pub(crate) fn conditions(
    input: &StatusInput<'_>,
    status: &PodStatus,
    old: &PodStatus,
) -> Vec<PodCondition> {
    let containers_ready = containers_ready(input, status);
    let mut own = vec![
        ("PodReadyToStartContainers", ready_to_start(input)),
        ("Initialized", initialized(input, status)),
        ("Ready", ready(input, &containers_ready, old)),
        ("ContainersReady", containers_ready),
    ];
    if input.is_static {
        own.push(("PodScheduled", Verdict::yes()));
    }
    let old = old.conditions.as_deref().unwrap_or_default();
    let mut all: Vec<PodCondition> = old
        .iter()
        .filter(|condition| !own.iter().any(|(kind, _)| *kind == condition.type_))
        .cloned()
        .collect();
    all.extend(own.into_iter().map(|(kind, verdict)| {
        let before = old.iter().find(|condition| condition.type_ == kind);
        condition(input, kind, verdict, before)
    }));
    all.sort_by(|a, b| a.type_.cmp(&b.type_));
    all
}

fn condition(
    input: &StatusInput<'_>,
    kind: &str,
    verdict: Verdict,
    before: Option<&PodCondition>,
) -> PodCondition {
    let status = if verdict.status { "True" } else { "False" };
    let since = before
        .filter(|before| before.status == status)
        .and_then(|before| before.last_transition_time.clone())
        .unwrap_or(Time(input.now));
    PodCondition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: verdict.reason.map(str::to_owned),
        message: verdict.message,
        last_transition_time: Some(since),
        last_probe_time: None,
        observed_generation: input.pod.metadata.generation,
    }
}

fn ready_to_start(input: &StatusInput<'_>) -> Verdict {
    let ready = input.observed.ready().is_some_and(|sandbox| {
        view::spec(input.pod).host_network == Some(true) || !sandbox.ips.is_empty()
    });
    Verdict { status: ready, reason: None, message: None }
}

fn names<'a>(statuses: impl Iterator<Item = &'a ContainerStatus>) -> Vec<&'a str> {
    statuses.map(|status| status.name.as_str()).collect()
}

fn initialized(input: &StatusInput<'_>, status: &PodStatus) -> Verdict {
    if status.phase.as_deref() == Some("Succeeded") {
        return Verdict { status: true, reason: Some("PodCompleted"), message: None };
    }
    let mains_made = status
        .container_statuses
        .iter()
        .flatten()
        .any(|status| status.state.as_ref().is_some_and(|state| state.waiting.is_none()));
    let incomplete = names(status.init_container_statuses.iter().flatten().filter(|status| {
        let sidecar = view::container(input.pod, &status.name)
            .is_some_and(|(role, _)| role == view::Role::Sidecar);
        if sidecar { status.started != Some(true) && !mains_made } else { !status.ready }
    }));
    if incomplete.is_empty() {
        return Verdict::yes();
    }
    Verdict::no(
        "ContainersNotInitialized",
        Some(format!("containers with incomplete status: [{}]", incomplete.join(" "))),
    )
}

fn containers_ready(input: &StatusInput<'_>, status: &PodStatus) -> Verdict {
    match status.phase.as_deref() {
        Some("Succeeded") => return Verdict::no("PodCompleted", None),
        Some("Failed") => return Verdict::no("PodFailed", None),
        _ => {}
    }
    let sidecars = status.init_container_statuses.iter().flatten().filter(|status| {
        view::container(input.pod, &status.name)
            .is_some_and(|(role, _)| role == view::Role::Sidecar)
    });
    let unready = names(
        sidecars.chain(status.container_statuses.iter().flatten()).filter(|status| !status.ready),
    );
    if unready.is_empty() {
        return Verdict::yes();
    }
    Verdict::no(
        "ContainersNotReady",
        Some(format!("containers with unready status: [{}]", unready.join(" "))),
    )
}

fn ready(input: &StatusInput<'_>, containers_ready: &Verdict, old: &PodStatus) -> Verdict {
    if !containers_ready.status {
        return Verdict {
            status: false,
            reason: containers_ready.reason,
            message: containers_ready.message.clone(),
        };
    }
    let mut missing = Vec::new();
    for gate in view::spec(input.pod).readiness_gates.iter().flatten() {
        let kind = &gate.condition_type;
        let found = old.conditions.iter().flatten().find(|condition| condition.type_ == *kind);
        match found {
            None => missing.push(format!(
                "corresponding condition of pod readiness gate \"{kind}\" does not exist."
            )),
            Some(condition) if condition.status != "True" => missing.push(format!(
                "the status of pod readiness gate \"{kind}\" is not \"True\", but {}",
                condition.status
            )),
            Some(_) => {}
        }
    }
    if missing.is_empty() {
        Verdict::yes()
    } else {
        Verdict::no("ReadinessGatesNotReady", Some(missing.join(", ")))
    }
}
