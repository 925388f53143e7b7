//! The tasks of a pod: what is begun, and what is made of how it ended.

use std::{net::IpAddr, sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use keelson_api::events::EventType;
use keelson_runtime_shim::runtime::ContainerId;

use super::{
    Worker,
    apply::{self, Outcome},
    backoff,
    desired::Desired,
    knowledge::{Deletion, Failure, Killing, StartFailure, Starting, Volumes},
    plan::{self, Action},
    shown, start, view,
};
use crate::labels;

impl Worker {
    fn address(&self, pod: &Pod) -> Option<IpAddr> {
        if view::spec(pod).host_network == Some(true) {
            self.context.config.node_ips.first().copied()
        } else {
            self.observed.current()?.ips.first().copied()
        }
    }

    /// Starts the task of an action, and remembers that it is under way.
    pub(super) fn begin(&mut self, desired: &Desired, action: Action) {
        let (context, pod) = (Arc::clone(&self.context), Arc::clone(&desired.pod));
        tracing::debug!(pod = view::format_pod(&pod), ?action, "begin");
        match action {
            Action::MountVolumes => {
                self.knowledge.volumes = Volumes::Mounting;
                self.shown = Some(shown(&pod));
                self.tasks
                    .spawn(async move { Outcome::Mounted(context.volumes.mount(&pod).await) });
            }
            Action::RefreshVolumes => {
                self.knowledge.refreshing_volumes = true;
                self.shown = Some(shown(&pod));
                self.tasks
                    .spawn(async move { Outcome::Refreshed(context.volumes.mount(&pod).await) });
            }
            Action::CreateSandbox { attempt } => {
                self.knowledge.creating_sandbox = true;
                if attempt > 0 {
                    let message = "Pod sandbox changed, it will be killed and re-created.";
                    context.pod_event(&pod, EventType::Normal, "SandboxChanged", message);
                }
                self.tasks.spawn(async move {
                    Outcome::SandboxCreated(apply::create_sandbox(&context, &pod, attempt).await)
                });
            }
            Action::StopSandbox(id) => {
                self.knowledge.sandbox_work.insert(id.clone());
                self.tasks.spawn(async move {
                    apply::stop_sandbox(&context, &pod, &id).await;
                    Outcome::SandboxStopped(id)
                });
            }
            Action::RemoveSandbox(id) => {
                self.knowledge.sandbox_work.insert(id.clone());
                self.tasks.spawn(async move {
                    apply::remove_sandbox(&context, &id).await;
                    Outcome::SandboxRemoved(id)
                });
            }
            Action::StartContainer { name, attempt, sandbox, back_off } => {
                let Volumes::Mounted(volumes) = &self.knowledge.volumes else { return };
                let sandbox =
                    self.observed.sandboxes.iter().find(|status| status.id == sandbox).cloned();
                let Some(sandbox) = sandbox else { return };
                self.knowledge.starting.insert(name.clone(), Starting::Preparing);
                let start = start::Start {
                    context,
                    pod,
                    name: name.clone(),
                    attempt,
                    sandbox,
                    back_off,
                    volumes: volumes.clone(),
                    notes: self.notes.0.clone(),
                    cancel: self.starts.clone(),
                };
                self.tasks.spawn(async move { Outcome::ContainerStarted(name, start.run().await) });
            }
            Action::KillContainer { id, grace, why, .. } => {
                self.begin_kill(desired, id, grace, why);
            }
            Action::RemoveContainer(id) => {
                let found = self.observed.containers.iter().find(|status| status.id == id).cloned();
                let Some(status) = found else { return };
                self.knowledge.removing.insert(id.clone());
                self.tasks.spawn(async move {
                    apply::remove_container(&context, &pod, &status).await;
                    Outcome::ContainerRemoved(id)
                });
            }
            Action::UnmountVolumes => {
                self.knowledge.volumes = Volumes::Unmounting;
                let uid = self.uid.clone();
                self.tasks
                    .spawn(async move { Outcome::Unmounted(context.volumes.unmount(&uid).await) });
            }
            Action::DeletePod => {
                self.knowledge.deletion = Deletion::UnderWay;
                self.tasks.spawn(async move {
                    apply::delete_pod(&context, &pod).await;
                    Outcome::PodDeleted
                });
            }
            Action::Finish => {}
        }
    }

    fn begin_kill(
        &mut self,
        desired: &Desired,
        id: ContainerId,
        grace: Duration,
        why: plan::KillReason,
    ) {
        let found = self.observed.containers.iter().find(|status| status.id == id).cloned();
        let Some(status) = found else { return };
        let killing = Killing { deadline: backoff::after(Timestamp::now(), grace) };
        let again = self.knowledge.killing.insert(id.clone(), killing).is_some();
        let kill = apply::Kill {
            context: Arc::clone(&self.context),
            pod: Arc::clone(&desired.pod),
            status,
            address: self.address(&desired.pod),
            grace,
            why,
            again,
        };
        self.tasks.spawn(async move {
            kill.run().await;
            Outcome::ContainerKilled(id)
        });
    }

    /// Takes in how an action ended.
    pub(super) fn take(&mut self, outcome: Outcome) {
        let now = Timestamp::now();
        let pod = Arc::clone(&self.desired.borrow().pod);
        match outcome {
            Outcome::Mounted(Ok(mounted)) => {
                self.mount_failure = None;
                self.knowledge.volumes = Volumes::Mounted(mounted);
            }
            Outcome::Mounted(Err(error)) => {
                let message = error.to_string();
                self.context.pod_event(&pod, EventType::Warning, "FailedMount", message.clone());
                let failure = Failure::after(self.mount_failure.as_ref(), message, now);
                self.mount_failure = Some(failure.clone());
                self.knowledge.volumes = Volumes::Failed(failure);
            }
            Outcome::Refreshed(refreshed) => {
                self.knowledge.refreshing_volumes = false;
                if let Err(error) = refreshed {
                    let message = error.to_string();
                    self.context.pod_event(&pod, EventType::Warning, "FailedMount", message);
                }
            }
            Outcome::Unmounted(Ok(())) => self.knowledge.volumes = Volumes::Unmounted,
            Outcome::Unmounted(Err(error)) => {
                tracing::warn!(pod = view::format_pod(&pod), %error, "volumes not removed");
                let failure = Failure::after(self.mount_failure.as_ref(), error.to_string(), now);
                self.mount_failure = Some(failure.clone());
                self.knowledge.volumes = Volumes::UnmountFailed(failure);
            }
            Outcome::SandboxCreated(made) => {
                self.knowledge.creating_sandbox = false;
                match made {
                    Ok(id) => {
                        self.knowledge.sandbox_failure = None;
                        self.observer.add(id);
                    }
                    Err(message) => {
                        let shown = format!("Failed to create pod sandbox: {message}");
                        let reason = "FailedCreatePodSandBox";
                        self.context.pod_event(&pod, EventType::Warning, reason, shown);
                        let before = self.knowledge.sandbox_failure.as_ref();
                        self.knowledge.sandbox_failure = Some(Failure::after(before, message, now));
                    }
                }
            }
            Outcome::SandboxStopped(id) => {
                self.knowledge.sandbox_work.remove(&id);
                self.knowledge.stopped_sandboxes.insert(id);
            }
            Outcome::SandboxRemoved(id) => {
                self.knowledge.sandbox_work.remove(&id);
                self.knowledge.stopped_sandboxes.remove(&id);
            }
            Outcome::ContainerStarted(name, result) => self.take_start(&pod, name, result, now),
            Outcome::ContainerKilled(id) => {
                self.knowledge.killing.remove(&id);
                self.knowledge.probes.remove(&id);
            }
            Outcome::ContainerRemoved(id) => {
                self.knowledge.removing.remove(&id);
            }
            Outcome::PodDeleted => self.knowledge.deletion = Deletion::Done,
        }
    }

    fn take_start(
        &mut self,
        pod: &Pod,
        name: String,
        result: Result<(), start::StartError>,
        now: Timestamp,
    ) {
        self.knowledge.starting.remove(&name);
        match result {
            // what the probes of a former attempt said does not matter to this one
            Ok(()) => drop(self.knowledge.start_failures.remove(&name)),
            Err(error) => {
                let hash = view::container(pod, &name)
                    .map(|(_, container)| labels::container_hash(container))
                    .unwrap_or_default();
                let before = self
                    .knowledge
                    .start_failures
                    .get(&name)
                    .filter(|before| before.reason == error.reason && before.hash == hash);
                let mut failure =
                    Failure::after(before.map(|before| &before.failure), error.message, now);
                if error.reason == "ErrImagePull" {
                    failure.retry_at = backoff::after(now, backoff::pull_wait(failure.times));
                }
                let failure = StartFailure { reason: error.reason, failure, hash };
                self.knowledge.start_failures.insert(name, failure);
            }
        }
    }

    /// Removes the last traces of the pod.
    pub(super) async fn finish(&mut self, desired: &Desired) {
        let (context, pod) = (Arc::clone(&self.context), Arc::clone(&desired.pod));
        let removed = tokio::task::spawn_blocking(move || apply::remove_files(&context, &pod));
        if let Err(error) = removed.await {
            tracing::warn!(uid = self.uid, %error, "files of a pod that is gone not removed");
        }
        self.context.metrics.forget_probes(&desired.pod);
        self.context.directory.remove(&self.uid);
        tracing::info!(pod = view::format_pod(&desired.pod), "pod is gone");
    }
}
