//! A pod's phase: one word for how far it is.

use k8s_openapi::api::core::v1::Pod;
use keelson_runtime_shim::runtime::ContainerState;

use crate::worker::view::{self, Observed, Role};

/// `status.phase`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Not all containers have been started yet.
    Pending,
    /// All were started, and at least one runs or will run again.
    Running,
    /// All ended well and none will be started again.
    Succeeded,
    /// All ended, at least one badly, and none will be started again.
    Failed,
}

impl Phase {
    /// As it stands in the status.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Running => "Running",
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
        }
    }
}

/// Whether the pod came to its end by itself: an init container failed for good, or all main
/// containers ended and none is to be started again.
pub(crate) fn has_ended(pod: &Pod, observed: &Observed) -> bool {
    let done = |role, container: &k8s_openapi::api::core::v1::Container| {
        observed.latest(&container.name).is_some_and(|status| {
            view::ended(status) && !view::restarts(pod, role, container, view::exit_code(status))
        })
    };
    init_failed(pod, observed) || {
        let mains = &view::spec(pod).containers;
        !mains.is_empty() && mains.iter().all(|container| done(Role::Main, container))
    }
}

fn init_failed(pod: &Pod, observed: &Observed) -> bool {
    view::containers(pod).filter(|(role, _)| *role == Role::Init).any(|(role, container)| {
        observed.latest(&container.name).is_some_and(|status| {
            let code = view::exit_code(status);
            view::ended(status) && code != 0 && !view::restarts(pod, role, container, code)
        })
    })
}

/// The phase of a pod that is to go on.
pub(crate) fn running_phase(pod: &Pod, observed: &Observed) -> Phase {
    let sandbox = observed.current().map(|sandbox| &sandbox.id);
    let init_pending = view::containers(pod).any(|(role, container)| match role {
        Role::Main => false,
        Role::Init => !observed
            .latest(&container.name)
            .is_some_and(|status| view::ended(status) && view::exit_code(status) == 0),
        Role::Sidecar => observed
            .latest(&container.name)
            .is_none_or(|status| status.state == ContainerState::Created),
    });
    let mains = &view::spec(pod).containers;
    let any_main = mains.iter().any(|main| {
        sandbox.is_some_and(|sandbox| observed.latest_in(sandbox, &main.name).is_some())
    });
    if init_pending && !any_main {
        return Phase::Pending;
    }
    let all_made = mains.iter().all(|main| {
        observed.latest(&main.name).is_some_and(|status| status.state != ContainerState::Created)
    });
    if all_made { Phase::Running } else { Phase::Pending }
}

/// The phase of a pod that has come to its end, once nothing of it runs.
pub(crate) fn final_phase(pod: &Pod, observed: &Observed) -> Phase {
    let succeeded = view::spec(pod).containers.iter().all(|container| {
        observed
            .latest(&container.name)
            .is_some_and(|status| view::ended(status) && view::exit_code(status) == 0)
    });
    if succeeded && !init_failed(pod, observed) { Phase::Succeeded } else { Phase::Failed }
}
