//! The probe tasks of one pod: started with its containers, ended with them.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use k8s_openapi::api::core::v1::{Container, Pod, Probe};
use keelson_runtime_shim::runtime::{ContainerId, ContainerState, ContainerStatus};
use tokio::{sync::mpsc, task::JoinHandle};

use super::{
    Context, Note,
    knowledge::{Knowledge, Starting},
    view::{self, Observed, Role},
};
use crate::{
    probe::{Kind, Prober, Verdict},
    status,
};

/// Ends its task when dropped.
#[derive(Debug)]
struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// All probe tasks of a pod.
#[derive(Debug, Default)]
pub(crate) struct Probers {
    tasks: BTreeMap<(ContainerId, Kind), Task>,
}

/// What the tasks are made with.
pub(crate) struct Surroundings<'a> {
    /// The agent's parts.
    pub(crate) context: &'a Arc<Context>,
    /// The pod.
    pub(crate) pod: &'a Arc<Pod>,
    /// Where verdicts go.
    pub(crate) notes: &'a mpsc::Sender<Note>,
    /// The pod is on its way down.
    pub(crate) stopping: bool,
}

impl Probers {
    /// Starts and ends tasks so that each running container has the ones it needs now.
    pub(crate) fn sync(
        &mut self,
        around: &Surroundings<'_>,
        observed: &Observed,
        knowledge: &mut Knowledge,
    ) {
        let mut wanted = Vec::new();
        for status in &observed.containers {
            if status.state != ContainerState::Running {
                continue;
            }
            let Some((role, container)) = view::container(around.pod, &status.name) else {
                continue;
            };
            if role == Role::Init
                || knowledge.starting.get(&status.name) == Some(&Starting::PostStart)
            {
                continue;
            }
            for (kind, probe) in wanted_probes(container, status, knowledge, around.stopping) {
                wanted.push((status, container, kind, probe));
            }
        }
        let keep = |id: &ContainerId, kind: Kind| {
            wanted
                .iter()
                .any(|(status, _, wanted_kind, _)| status.id == *id && *wanted_kind == kind)
        };
        self.tasks.retain(|(id, kind), _| keep(id, *kind));
        knowledge.probes.retain(|id, _| {
            observed
                .containers
                .iter()
                .any(|status| status.id == *id && status.state == ContainerState::Running)
        });
        let address = address(around, observed);
        for (status, container, kind, probe) in wanted {
            let key = (status.id.clone(), kind);
            if self.tasks.contains_key(&key) {
                continue;
            }
            let seed = seed(around.pod, container, status, kind);
            if let Some(seed) = seed {
                *knowledge.probes.entry(status.id.clone()).or_default().get_mut(kind) = seed;
            }
            let prober = Prober {
                context: Arc::clone(around.context),
                pod: Arc::clone(around.pod),
                container: container.clone(),
                id: status.id.clone(),
                started_at: status.started_at.unwrap_or(status.created_at),
                address,
                kind,
                probe: probe.clone(),
                seed,
                notes: around.notes.clone(),
            };
            self.tasks.insert(key, Task(tokio::spawn(prober.run())));
        }
    }
}

/// The probes that a running container needs now: the startup probe alone until it succeeded; only
/// readiness while the pod stops.
fn wanted_probes<'a>(
    container: &'a Container,
    status: &ContainerStatus,
    knowledge: &Knowledge,
    stopping: bool,
) -> Vec<(Kind, &'a Probe)> {
    let mut wanted = Vec::new();
    let startup = knowledge.probes.get(&status.id).map(|probes| probes.startup);
    if let Some(probe) = &container.startup_probe
        && startup != Some(Verdict::Success)
    {
        // when it has failed there is nothing left to find out: the container is restarted
        if !stopping {
            wanted.push((Kind::Startup, probe));
        }
        return wanted;
    }
    if let Some(probe) = &container.liveness_probe
        && !stopping
    {
        wanted.push((Kind::Liveness, probe));
    }
    if let Some(probe) = &container.readiness_probe {
        wanted.push((Kind::Readiness, probe));
    }
    wanted
}

/// What was reported of this very container before the agent restarted: a restart of the agent
/// must take no pod out of its Services.
fn seed(pod: &Pod, container: &Container, status: &ContainerStatus, kind: Kind) -> Option<Verdict> {
    let reported = status::container::reported(pod, &container.name)?;
    let same = reported
        .container_id
        .as_deref()
        .is_some_and(|id| id.rsplit('/').next() == Some(status.id.as_str()));
    let said = match kind {
        Kind::Startup => reported.started == Some(true),
        Kind::Readiness => reported.ready,
        Kind::Liveness => false,
    };
    (same && said).then_some(Verdict::Success)
}

fn address(around: &Surroundings<'_>, observed: &Observed) -> Option<IpAddr> {
    if view::spec(around.pod).host_network == Some(true) {
        return around.context.config.node_ips.first().copied();
    }
    observed.current()?.ips.first().copied()
}
