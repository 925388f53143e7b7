//! The status of one container.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{
        Container, ContainerState, ContainerStateRunning, ContainerStateTerminated,
        ContainerStateWaiting, ContainerStatus, ContainerUser, LinuxContainerUser, Pod,
    },
    apimachinery::pkg::apis::meta::v1::Time,
};
use keelson_runtime_shim::runtime as rt;

use super::StatusInput;
use crate::{
    labels,
    probe::Verdict,
    worker::{
        backoff::{self, Restart},
        knowledge::{Knowledge, StartFailure, Starting},
        view::{self, Role},
    },
};

/// How long a failed pull is shown as such before the status says that it is waited.
const PULL_FAILURE_SHOWN: Duration = Duration::from_secs(2);

/// Until when a failed pull shows as `ErrImagePull`; then as `ImagePullBackOff`.
pub(crate) fn pull_failure_shown_until(failure: &StartFailure) -> Timestamp {
    if failure.is_pull() {
        backoff::after(failure.failure.at, PULL_FAILURE_SHOWN)
    } else {
        failure.failure.at
    }
}

/// Whether a running container has started: its postStart hook ended, its startup probe succeeded.
pub(crate) fn is_started(
    container: &Container,
    status: &rt::ContainerStatus,
    knowledge: &Knowledge,
) -> bool {
    status.state == rt::ContainerState::Running
        && !knowledge.starting.contains_key(&container.name)
        && (container.startup_probe.is_none()
            || knowledge
                .probes
                .get(&status.id)
                .is_some_and(|probes| probes.startup == Verdict::Success))
}

/// Whether a running container passes its readiness probe, or has none.
pub(crate) fn is_ready(
    container: &Container,
    status: &rt::ContainerStatus,
    knowledge: &Knowledge,
) -> bool {
    is_started(container, status, knowledge)
        && (container.readiness_probe.is_none()
            || knowledge
                .probes
                .get(&status.id)
                .is_some_and(|probes| probes.readiness == Verdict::Success))
}

/// The restart count of the attempt after `last`, or after what the pod's object remembers.
pub(crate) fn next_attempt(pod: &Pod, last: Option<&rt::ContainerStatus>, name: &str) -> u32 {
    if let Some(last) = last {
        return last.attempt.saturating_add(1);
    }
    reported(pod, name)
        .filter(|status| status.container_id.is_some())
        .and_then(|status| u32::try_from(status.restart_count).ok())
        .map_or(0, |count| count.saturating_add(1))
}

/// What the pod's object says of a container.
pub(crate) fn reported<'a>(pod: &'a Pod, name: &str) -> Option<&'a ContainerStatus> {
    let status = pod.status.as_ref()?;
    [&status.container_statuses, &status.init_container_statuses]
        .into_iter()
        .flatten()
        .flatten()
        .find(|status| status.name == name)
}

/// The status of one container of the pod.
pub(crate) fn container_status(
    input: &StatusInput<'_>,
    role: Role,
    container: &Container,
) -> ContainerStatus {
    let attempts = input.observed.attempts(&container.name);
    let Some(latest) = attempts.first().copied() else { return absent(input, container) };
    let previous = attempts.iter().skip(1).find(|status| view::ended(status));
    let previous = previous.map(|status| terminated(input, status));
    let started = is_started(container, latest, input.knowledge);
    let (state, last_state) = match latest.state {
        rt::ContainerState::Created => (waiting_to_start(input, container), previous),
        rt::ContainerState::Running => {
            if input.knowledge.starting.get(&container.name) == Some(&Starting::PostStart) {
                (waiting_to_start(input, container), previous)
            } else {
                let started_at = latest.started_at.unwrap_or(latest.created_at);
                let running = ContainerStateRunning { started_at: Some(Time(started_at)) };
                (ContainerState { running: Some(running), ..Default::default() }, previous)
            }
        }
        rt::ContainerState::Exited | rt::ContainerState::Unknown => {
            match waiting_to_restart(input, role, container, latest) {
                Some(waiting) => (waiting, Some(terminated(input, latest))),
                None => (terminated(input, latest), previous),
            }
        }
    };
    let ready = match role {
        Role::Init => view::ended(latest) && view::exit_code(latest) == 0,
        Role::Sidecar | Role::Main => is_ready(container, latest, input.knowledge),
    };
    ContainerStatus {
        name: container.name.clone(),
        image: image_name(container, latest),
        image_id: if latest.image_ref.is_empty() {
            latest.image_id.to_string()
        } else {
            latest.image_ref.clone()
        },
        container_id: Some(container_id(input, latest)),
        restart_count: i32::try_from(latest.attempt).unwrap_or(i32::MAX),
        ready,
        started: Some(started),
        state: Some(state),
        last_state: Some(last_state.unwrap_or_default()),
        allocated_resources: container
            .resources
            .as_ref()
            .and_then(|resources| resources.requests.clone())
            .filter(|requests| !requests.is_empty()),
        resources: (latest.state == rt::ContainerState::Running)
            .then(|| container.resources.clone().unwrap_or_default()),
        user: latest.user.as_ref().map(|user| ContainerUser {
            linux: Some(LinuxContainerUser {
                uid: user.uid,
                gid: user.gid,
                supplemental_groups: Some(user.supplemental_groups.clone())
                    .filter(|groups| !groups.is_empty()),
            }),
        }),
        ..Default::default()
    }
}

/// The image as the user named it: the runtime was asked for it by its id.
fn image_name(container: &Container, status: &rt::ContainerStatus) -> String {
    let named = status.annotations.get(labels::IMAGE).cloned();
    let of_spec = || container.image.clone().filter(|_| labels::is_current(status, container));
    named.or_else(of_spec).unwrap_or_else(|| status.image.clone())
}

/// The status of a container that the runtime does not have.
fn absent(input: &StatusInput<'_>, container: &Container) -> ContainerStatus {
    let reported = reported(input.pod, &container.name);
    let ended_before = reported
        .filter(|status| status.state.as_ref().is_some_and(|state| state.terminated.is_some()));
    let mut status = ContainerStatus {
        name: container.name.clone(),
        image: container.image.clone().unwrap_or_default(),
        started: Some(false),
        last_state: Some(ContainerState::default()),
        restart_count: reported.map_or(0, |status| status.restart_count),
        ..Default::default()
    };
    if !input.stopping {
        status.state = Some(waiting_to_start(input, container));
        return status;
    }
    if let Some(ended) = ended_before {
        return ended.clone();
    }
    // a pod that never got past its init containers has nothing to have lost
    if input.anything_runs() || !was_initialized(input) {
        status.state = Some(waiting_to_start(input, container));
        return status;
    }
    status.state = Some(ContainerState {
        terminated: Some(ContainerStateTerminated {
            exit_code: 137,
            reason: Some("ContainerStatusUnknown".to_owned()),
            message: Some(
                "The container could not be located when the pod was terminated".to_owned(),
            ),
            ..Default::default()
        }),
        ..Default::default()
    });
    status
}

/// Whether all init containers were done once: something after them was made, or the last of them
/// ended well.
fn was_initialized(input: &StatusInput<'_>) -> bool {
    let made = |name: &str| {
        input.observed.latest(name).is_some()
            || reported(input.pod, name).is_some_and(|status| status.container_id.is_some())
    };
    let done = |name: &str| match input.observed.latest(name) {
        Some(latest) => view::ended(latest) && view::exit_code(latest) == 0,
        None => reported(input.pod, name).is_some_and(|status| status.ready),
    };
    view::spec(input.pod).containers.iter().any(|main| made(&main.name))
        || view::containers(input.pod).all(|(role, container)| match role {
            Role::Init => done(&container.name),
            Role::Sidecar => made(&container.name),
            Role::Main => true,
        })
}

fn waiting(reason: &str, message: Option<String>) -> ContainerState {
    ContainerState {
        waiting: Some(ContainerStateWaiting { reason: Some(reason.to_owned()), message }),
        ..Default::default()
    }
}

/// The state of a container that was not started yet.
fn waiting_to_start(input: &StatusInput<'_>, container: &Container) -> ContainerState {
    if let Some(failure) = input.knowledge.start_failures.get(&container.name) {
        return failed_start(input, container, failure);
    }
    let has_init = !view::init_containers(input.pod).is_empty();
    waiting(if has_init { "PodInitializing" } else { "ContainerCreating" }, None)
}

fn failed_start(
    input: &StatusInput<'_>,
    container: &Container,
    failure: &StartFailure,
) -> ContainerState {
    let message = &failure.failure.message;
    if failure.is_pull() && pull_failure_shown_until(failure) <= input.now {
        let image = container.image.as_deref().unwrap_or_default();
        let message = format!("Back-off pulling image \"{image}\": {}: {message}", failure.reason);
        return waiting("ImagePullBackOff", Some(message));
    }
    waiting(failure.reason, Some(message.clone()))
}

/// The state of an ended container that is to start again but does not yet.
fn waiting_to_restart(
    input: &StatusInput<'_>,
    role: Role,
    container: &Container,
    latest: &rt::ContainerStatus,
) -> Option<ContainerState> {
    if input.stopping || !view::restarts(input.pod, role, container, view::exit_code(latest)) {
        return None;
    }
    if let Some(failure) = input.knowledge.start_failures.get(&container.name) {
        return Some(failed_start(input, container, failure));
    }
    match backoff::restart(latest, container, input.longest_back_off, input.now) {
        Restart::Later { wait, .. } => {
            Some(waiting("CrashLoopBackOff", Some(crash_loop_message(input.pod, container, wait))))
        }
        Restart::Now(_) => None,
    }
}

/// The message of `CrashLoopBackOff`.
pub(crate) fn crash_loop_message(pod: &Pod, container: &Container, wait: Duration) -> String {
    format!(
        "back-off {} restarting failed container={} pod={}",
        backoff::go_duration(wait),
        container.name,
        view::format_pod(pod)
    )
}

fn container_id(input: &StatusInput<'_>, status: &rt::ContainerStatus) -> String {
    format!("{}://{}", input.runtime_name, status.id)
}

fn terminated(input: &StatusInput<'_>, status: &rt::ContainerStatus) -> ContainerState {
    // what was said once of an end stays: its message can no longer be read when files are gone
    let id = container_id(input, status);
    let said = reported(input.pod, &status.name).and_then(|reported| {
        [&reported.state, &reported.last_state].into_iter().flatten().find(|state| {
            state.terminated.as_ref().is_some_and(|end| end.container_id.as_ref() == Some(&id))
        })
    });
    if let Some(said) = said {
        return said.clone();
    }
    let exit_code = view::exit_code(status);
    let reason = if status.state == rt::ContainerState::Unknown {
        "ContainerStatusUnknown"
    } else if status.oom_killed {
        "OOMKilled"
    } else if !status.reason.is_empty() {
        &status.reason
    } else if exit_code == 0 {
        "Completed"
    } else {
        "Error"
    };
    ContainerState {
        terminated: Some(ContainerStateTerminated {
            exit_code,
            reason: Some(reason.to_owned()),
            message: Some(status.message.clone()).filter(|message| !message.is_empty()),
            started_at: status.started_at.map(Time),
            finished_at: status.finished_at.map(Time),
            container_id: Some(id),
            signal: None,
        }),
        ..Default::default()
    }
}
