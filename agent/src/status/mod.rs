//! A pod's status, computed anew each time from what is there.
//!
//! [`pod_status`] is pure: the pod, what the runtime has of it, what its worker knows, and the time
//! go in; the whole `PodStatus` comes out. `writer` carries it to the API server.

pub(crate) mod conditions;
pub(crate) mod container;
pub(crate) mod phase;
pub(crate) mod qos;
pub(crate) mod writer;

use std::{net::IpAddr, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{ContainerStatus, HostIP, Pod, PodIP, PodStatus},
    apimachinery::pkg::apis::meta::v1::Time,
};
use keelson_runtime_shim::runtime::ContainerState;
use phase::Phase;

use crate::worker::{
    desired::Stop,
    knowledge::Knowledge,
    view::{self, Observed, Role},
};

/// What a status is computed from.
pub(crate) struct StatusInput<'a> {
    /// The pod with the status that was reported last.
    pub(crate) pod: &'a Pod,
    /// What the runtime has.
    pub(crate) observed: &'a Observed,
    /// What the worker knows.
    pub(crate) knowledge: &'a Knowledge,
    /// The pod is on its way down.
    pub(crate) stopping: bool,
    /// Why it was told to stop.
    pub(crate) stop: Option<&'a Stop>,
    /// It ran longer than `activeDeadlineSeconds`.
    pub(crate) past_deadline: bool,
    /// It comes from a manifest, so no scheduler set its conditions.
    pub(crate) is_static: bool,
    /// The node's addresses.
    pub(crate) host_ips: &'a [IpAddr],
    /// What container ids are prefixed with.
    pub(crate) runtime_name: &'a str,
    /// The longest wait of `CrashLoopBackOff`.
    pub(crate) longest_back_off: Duration,
    /// Now.
    pub(crate) now: Timestamp,
}

impl StatusInput<'_> {
    /// Whether a process of the pod runs, or may in a moment.
    pub(crate) fn anything_runs(&self) -> bool {
        !self.knowledge.starting.is_empty()
            || self.observed.containers.iter().any(|status| status.state == ContainerState::Running)
    }
}

/// Computes the pod's status.
pub(crate) fn pod_status(input: &StatusInput<'_>) -> PodStatus {
    let old = input.pod.status.clone().unwrap_or_default();
    if let Some(Stop::Rejected { reason, message }) = input.stop {
        return refused(old, input, reason, message);
    }
    let statuses = |wanted: fn(Role) -> bool| -> Vec<ContainerStatus> {
        view::containers(input.pod)
            .filter(|(role, _)| wanted(*role))
            .map(|(role, container)| container::container_status(input, role, container))
            .collect()
    };
    let init = statuses(|role| role != Role::Main);
    let main = statuses(|role| role == Role::Main);
    let ended = input.stopping && !input.anything_runs();
    let mut status = PodStatus {
        phase: Some(phase(input, ended, &old).as_str().to_owned()),
        start_time: old.start_time.clone().or(Some(Time(input.now))),
        qos_class: Some(
            old.qos_class.clone().unwrap_or_else(|| qos::class(input.pod).as_str().to_owned()),
        ),
        observed_generation: input.pod.metadata.generation,
        init_container_statuses: Some(init).filter(|statuses| !statuses.is_empty()),
        container_statuses: Some(main),
        ..old.clone()
    };
    if input.past_deadline && !view::is_terminal(old.phase.as_deref()) {
        status.reason = Some("DeadlineExceeded".to_owned());
        status.message =
            Some("Pod was active on the node longer than the specified deadline".to_owned());
    }
    set_addresses(&mut status, input);
    status.conditions = Some(conditions::conditions(input, &status, &old));
    status
}

/// The containers that wait for a reason for which they did not wait before.
pub(crate) fn newly_waiting<'a>(
    before: Option<&PodStatus>,
    now: &'a PodStatus,
) -> Vec<(&'a str, &'a str)> {
    fn reasons(status: &PodStatus) -> impl Iterator<Item = (&str, &str)> {
        [&status.init_container_statuses, &status.container_statuses]
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|status| {
                let waiting = status.state.as_ref()?.waiting.as_ref()?;
                Some((status.name.as_str(), waiting.reason.as_deref()?))
            })
    }
    let known: Vec<_> = before.into_iter().flat_map(reasons).collect();
    reasons(now).filter(|reason| !known.contains(reason)).collect()
}

/// Only what a rejected pod needs: it never was on this node.
fn refused(old: PodStatus, input: &StatusInput<'_>, reason: &str, message: &str) -> PodStatus {
    PodStatus {
        phase: Some(Phase::Failed.as_str().to_owned()),
        reason: Some(reason.to_owned()),
        message: Some(format!("Pod was rejected: {message}")),
        start_time: old.start_time.clone().or(Some(Time(input.now))),
        observed_generation: input.pod.metadata.generation,
        qos_class: Some(
            old.qos_class.clone().unwrap_or_else(|| qos::class(input.pod).as_str().to_owned()),
        ),
        ..old
    }
}

fn phase(input: &StatusInput<'_>, ended: bool, old: &PodStatus) -> Phase {
    match old.phase.as_deref() {
        Some("Succeeded") => return Phase::Succeeded,
        Some("Failed") => return Phase::Failed,
        _ => {}
    }
    if ended {
        if input.past_deadline {
            Phase::Failed
        } else {
            phase::final_phase(input.pod, input.observed)
        }
    } else {
        phase::running_phase(input.pod, input.observed)
    }
}

fn set_addresses(status: &mut PodStatus, input: &StatusInput<'_>) {
    let host: Vec<String> = input.host_ips.iter().map(ToString::to_string).collect();
    status.host_ip = host.first().cloned();
    status.host_ips = Some(host.iter().map(|ip| HostIP { ip: ip.clone() }).collect::<Vec<_>>())
        .filter(|ips| !ips.is_empty());
    let Some(sandbox) = input.observed.current() else { return };
    let ips: Vec<String> = if view::spec(input.pod).host_network == Some(true) {
        host
    } else {
        sandbox.ips.iter().map(ToString::to_string).collect()
    };
    // a stopped sandbox has given its address back; the status keeps the last one, as documented
    if !ips.is_empty() {
        status.pod_ip = ips.first().cloned();
        status.pod_ips = Some(ips.into_iter().map(|ip| PodIP { ip }).collect());
    }
}
