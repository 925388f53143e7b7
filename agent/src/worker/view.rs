//! The questions that plan and status both ask about a pod's specification and its containers.

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use keelson_runtime_shim::runtime::{
    ContainerState, ContainerStatus, SandboxId, SandboxState, SandboxStatus,
};

use crate::pods::RuntimePod;

/// A pod's sandboxes and containers as the runtime has them.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Observed {
    /// All of the pod's sandboxes, the newest first.
    pub(crate) sandboxes: Vec<SandboxStatus>,
    /// All of the pod's containers in all of its sandboxes.
    pub(crate) containers: Vec<ContainerStatus>,
}

impl Observed {
    /// Puts what the runtime listed into order.
    pub(crate) fn new(mut sandboxes: Vec<SandboxStatus>, containers: Vec<ContainerStatus>) -> Self {
        sandboxes
            .sort_by_key(|sandbox| std::cmp::Reverse((sandbox.config.attempt, sandbox.created_at)));
        Self { sandboxes, containers }
    }

    /// The newest sandbox.
    pub(crate) fn current(&self) -> Option<&SandboxStatus> {
        self.sandboxes.first()
    }

    /// The newest sandbox, if containers can be made in it.
    pub(crate) fn ready(&self) -> Option<&SandboxStatus> {
        self.current().filter(|sandbox| sandbox.state == SandboxState::Ready)
    }

    /// The attempts of one container, the newest first.
    pub(crate) fn attempts(&self, name: &str) -> Vec<&ContainerStatus> {
        let mut attempts: Vec<_> =
            self.containers.iter().filter(|status| status.name == name).collect();
        attempts.sort_by_key(|status| std::cmp::Reverse((status.attempt, status.created_at)));
        attempts
    }

    /// The newest attempt of one container.
    pub(crate) fn latest(&self, name: &str) -> Option<&ContainerStatus> {
        self.containers
            .iter()
            .filter(|status| status.name == name)
            .max_by_key(|status| (status.attempt, status.created_at))
    }

    /// The newest attempt of one container in one sandbox.
    pub(crate) fn latest_in(&self, sandbox: &SandboxId, name: &str) -> Option<&ContainerStatus> {
        self.latest(name).filter(|status| status.sandbox == *sandbox)
    }

    /// As the rest of the agent sees it.
    pub(crate) fn to_runtime_pod(&self) -> RuntimePod {
        RuntimePod { sandbox: self.current().cloned(), containers: self.containers.clone() }
    }
}

/// Whether the container's process has ended; one that the runtime lost track of counts as ended.
pub(crate) fn ended(status: &ContainerStatus) -> bool {
    matches!(status.state, ContainerState::Exited | ContainerState::Unknown)
}

/// The exit code of an ended container; 137 for one that the runtime lost track of.
pub(crate) fn exit_code(status: &ContainerStatus) -> i32 {
    status.exit_code.unwrap_or(137)
}

/// What a container is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Runs to its end before the next one starts.
    Init,
    /// An init container that stays (KEP-753).
    Sidecar,
    /// One of `spec.containers`.
    Main,
}

/// Whether an init container is restartable, that is, a sidecar.
pub(crate) fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// The pod's specification; an empty one for an object without.
pub(crate) fn spec(pod: &Pod) -> &PodSpec {
    static EMPTY: std::sync::LazyLock<PodSpec> = std::sync::LazyLock::new(PodSpec::default);
    pod.spec.as_ref().unwrap_or(&EMPTY)
}

/// The init containers, in order.
pub(crate) fn init_containers(pod: &Pod) -> &[Container] {
    spec(pod).init_containers.as_deref().unwrap_or_default()
}

/// All containers with what they are for: init containers and sidecars first, in order.
pub(crate) fn containers(pod: &Pod) -> impl Iterator<Item = (Role, &Container)> {
    let init = init_containers(pod).iter().map(|container| {
        (if is_sidecar(container) { Role::Sidecar } else { Role::Init }, container)
    });
    init.chain(spec(pod).containers.iter().map(|container| (Role::Main, container)))
}

/// One container by name.
pub(crate) fn container<'a>(pod: &'a Pod, name: &str) -> Option<(Role, &'a Container)> {
    containers(pod).find(|(_, container)| container.name == name)
}

/// Whether a container that ended with `code` is started again.
pub(crate) fn restarts(pod: &Pod, role: Role, container: &Container, code: i32) -> bool {
    if role == Role::Sidecar {
        return true;
    }
    // KEP-5307: the first rule that fits decides before the policy does
    for rule in container.restart_policy_rules.as_deref().unwrap_or_default() {
        let Some(codes) = &rule.exit_codes else { continue };
        let listed = codes.values.as_deref().unwrap_or_default().contains(&code);
        let fits = if codes.operator == "NotIn" { !listed } else { listed };
        if fits && rule.action == "Restart" {
            return true;
        }
    }
    let policy = container
        .restart_policy
        .as_deref()
        .or(spec(pod).restart_policy.as_deref())
        .unwrap_or("Always");
    match (policy, role) {
        ("Never", _) => false,
        // an init container that succeeded is done, whatever the policy
        ("OnFailure", _) | (_, Role::Init) => code != 0,
        _ => true,
    }
}

/// The container's `$namespace/$name($uid)` as messages show it: `name_namespace(uid)`.
pub(crate) fn format_pod(pod: &Pod) -> String {
    format!(
        "{}_{}({})",
        pod.metadata.name.as_deref().unwrap_or_default(),
        pod.metadata.namespace.as_deref().unwrap_or_default(),
        pod.metadata.uid.as_deref().unwrap_or_default()
    )
}

/// The phases that a pod never leaves.
pub(crate) fn is_terminal(phase: Option<&str>) -> bool {
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// The phase in the pod's object.
pub(crate) fn phase(pod: &Pod) -> Option<&str> {
    pod.status.as_ref()?.phase.as_deref()
}
