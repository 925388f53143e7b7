//! Carries out one action. No policy: each function does what it is told, again and again where
//! only a later try can help, and says how it ended.

use std::{fs, io, net::IpAddr, path::Path, sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use keelson_api::{backoff::Backoff, client_error, events::EventType};
use keelson_runtime_shim::runtime::{ContainerId, ContainerStatus, RuntimeError, SandboxId};
use kube::{
    Api,
    api::{DeleteParams, Preconditions},
};

use super::{
    Context, backoff, hooks,
    plan::KillReason,
    start::{StartError, log_link},
    view,
};
use crate::{
    container_config::{dns, sandbox},
    labels,
    volumes::{MountedVolumes, VolumeError},
};

/// The least time that a container has between the asking and the killing once its preStop hook has
/// used up the grace period; the kubelet's.
const LEAST_GRACE: Duration = Duration::from_secs(2);

/// How an action ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The volumes are there, or not.
    Mounted(Result<MountedVolumes, VolumeError>),
    /// The volumes of a running pod are up to date, or not.
    Refreshed(Result<MountedVolumes, VolumeError>),
    /// The volumes are gone, or not.
    Unmounted(Result<(), VolumeError>),
    /// There is a sandbox, or not.
    SandboxCreated(Result<SandboxId, String>),
    /// A sandbox was stopped.
    SandboxStopped(SandboxId),
    /// A sandbox was removed.
    SandboxRemoved(SandboxId),
    /// A container was started, or not.
    ContainerStarted(String, Result<(), StartError>),
    /// A container was stopped.
    ContainerKilled(ContainerId),
    /// A container was removed.
    ContainerRemoved(ContainerId),
    /// The pod's object is gone.
    PodDeleted,
}

fn retrying() -> Backoff {
    Backoff::new(Duration::from_millis(500), Duration::from_secs(30))
}

/// Makes a sandbox.
pub(crate) async fn create_sandbox(
    context: &Context,
    pod: &Pod,
    attempt: u32,
) -> Result<SandboxId, String> {
    let host = match &context.config.resolv_conf {
        Some(path) => tokio::fs::read_to_string(path)
            .await
            .map_err(|error| format!("reading {}: {error}", path.display()))?,
        None => String::new(),
    };
    let host = dns::parse_resolv_conf(&host);
    let (config, notes) = sandbox::sandbox_config(&context.config, pod, attempt, &host)?;
    for note in notes {
        context.pod_event(pod, EventType::Warning, "DNSConfigForming", note);
    }
    let made = context.timed("run_podsandbox", context.runtime.run_pod_sandbox(&config)).await;
    match made {
        Ok(id) => {
            context.metrics.pod_started();
            Ok(id)
        }
        Err(error) => Err(error.to_string()),
    }
}

/// Stops a sandbox, however often it takes.
pub(crate) async fn stop_sandbox(context: &Context, pod: &Pod, id: &SandboxId) {
    let mut backoff = retrying();
    loop {
        match context.timed("stop_podsandbox", context.runtime.stop_pod_sandbox(id)).await {
            Ok(()) | Err(RuntimeError::NotFound(_)) => return,
            Err(error) => {
                let message = format!("error killing pod: failed to stop sandbox {id}: {error}");
                context.pod_event(pod, EventType::Warning, "FailedKillPod", message);
            }
        }
        tokio::time::sleep(backoff.next_wait()).await;
    }
}

/// Removes a sandbox, however often it takes.
pub(crate) async fn remove_sandbox(context: &Context, id: &SandboxId) {
    let mut backoff = retrying();
    loop {
        match context.timed("remove_podsandbox", context.runtime.remove_pod_sandbox(id)).await {
            Ok(()) | Err(RuntimeError::NotFound(_)) => return,
            Err(error) => {
                tracing::warn!(sandbox = %id, %error, "sandbox not removed, trying again");
            }
        }
        tokio::time::sleep(backoff.next_wait()).await;
    }
}

/// What is needed to stop one container.
pub(crate) struct Kill {
    /// The agent's parts.
    pub(crate) context: Arc<Context>,
    /// The pod.
    pub(crate) pod: Arc<Pod>,
    /// Which container.
    pub(crate) status: ContainerStatus,
    /// The pod's address, for an HTTP hook.
    pub(crate) address: Option<IpAddr>,
    /// How long it may take.
    pub(crate) grace: Duration,
    /// Why.
    pub(crate) why: KillReason,
    /// It is being stopped already and shall only be killed sooner.
    pub(crate) again: bool,
}

impl Kill {
    /// Runs the preStop hook, asks the container to stop, has it killed when the grace is over.
    pub(crate) async fn run(self) {
        let name = &self.status.name;
        let message = self.message();
        let mut grace = self.grace;
        if !self.again {
            self.context.container_event(&self.pod, name, EventType::Normal, "Killing", message);
            let asked = Timestamp::now();
            if !grace.is_zero() && self.pre_stop(grace).await {
                let used = backoff::until(asked, Timestamp::now());
                grace = grace.saturating_sub(used).max(LEAST_GRACE);
            }
        }
        let mut backoff = retrying();
        let runtime = &self.context.runtime;
        loop {
            let stopped = runtime.stop_container(&self.status.id, grace);
            match self.context.timed("stop_container", stopped).await {
                Ok(()) | Err(RuntimeError::NotFound(_)) => return,
                Err(error) => {
                    let message = format!(
                        "error killing pod: failed to stop container {name} ({}): {error}",
                        self.status.id
                    );
                    self.context.pod_event(&self.pod, EventType::Warning, "FailedKillPod", message);
                }
            }
            tokio::time::sleep(backoff.next_wait()).await;
        }
    }

    /// The event's message, in the kubelet's words.
    fn message(&self) -> String {
        let name = &self.status.name;
        let probe = |probe: &str| {
            let restarts = view::container(&self.pod, name).is_none_or(|(role, container)| {
                let of_pod = view::spec(&self.pod).restart_policy.as_deref();
                role == view::Role::Sidecar
                    || container.restart_policy.as_deref().or(of_pod) != Some("Never")
            });
            let end = if restarts { ", will be restarted" } else { "" };
            format!("Container {name} failed {probe} probe{end}")
        };
        match self.why {
            KillReason::PodStops => format!("Stopping container {name}"),
            KillReason::Changed => {
                format!("Container {name} definition changed, will be restarted")
            }
            KillReason::Liveness => probe("liveness"),
            KillReason::Startup => probe("startup"),
            KillReason::PostStart => "FailedPostStartHook".to_owned(),
            KillReason::SandboxGone => format!("Stopping container {name}: its sandbox changed"),
        }
    }

    /// Runs the hook, if there is one, within `grace`. Whether there was one.
    async fn pre_stop(&self, grace: Duration) -> bool {
        let found = view::container(&self.pod, &self.status.name);
        let mut container = found.map(|(_, container)| container.clone()).unwrap_or_default();
        container.name.clone_from(&self.status.name);
        let of_spec = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.pre_stop.clone());
        // a pod whose object is gone has its hook in the container's annotations
        let kept = || {
            let json = self.status.annotations.get(labels::PRE_STOP)?;
            serde_json::from_str(json).ok()
        };
        let Some(handler) = of_spec.or_else(kept) else { return false };
        let runtime = &*self.context.runtime;
        let run = hooks::run(runtime, &self.status.id, &container, &handler, self.address);
        match tokio::time::timeout(grace, run).await {
            Ok(Ok(())) => {}
            Ok(Err(message)) => {
                tracing::warn!(pod = view::format_pod(&self.pod), message, "preStop failed");
                self.context.container_event(
                    &self.pod,
                    &self.status.name,
                    EventType::Warning,
                    "FailedPreStopHook",
                    "PreStopHook failed",
                );
            }
            Err(_) => tracing::warn!(
                pod = view::format_pod(&self.pod),
                container = self.status.name,
                ?grace,
                "preStop did not end within the grace period"
            ),
        }
        true
    }
}

/// Removes a container with its log.
pub(crate) async fn remove_container(context: &Context, pod: &Pod, status: &ContainerStatus) {
    let mut backoff = retrying();
    loop {
        let removed = context.runtime.remove_container(&status.id);
        match context.timed("remove_container", removed).await {
            Ok(()) | Err(RuntimeError::NotFound(_)) => break,
            Err(error) => {
                tracing::warn!(container = %status.id, %error, "container not removed, trying again");
            }
        }
        tokio::time::sleep(backoff.next_wait()).await;
    }
    let link = log_link(&context.config.container_logs_dir, pod, &status.name, &status.id);
    let log = status.log_path.clone();
    let message = status.annotations.get(labels::TERMINATION_MESSAGE_FILE).cloned();
    let done = tokio::task::spawn_blocking(move || {
        let _ = fs::remove_file(link);
        if let Some(message) = message {
            let _ = fs::remove_file(message);
        }
        remove_log(&log)
    });
    if let Ok(Err(error)) = done.await {
        tracing::warn!(container = %status.id, %error, "log of a removed container not removed");
    }
}

/// Removes a log file and what was rotated away from it.
fn remove_log(log: &Path) -> io::Result<()> {
    let (Some(folder), Some(name)) = (log.parent(), log.file_name().and_then(|name| name.to_str()))
    else {
        return Ok(());
    };
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        let belongs = entry.file_name().to_str().is_some_and(|other| {
            other == name || other.strip_prefix(name).is_some_and(|rest| rest.starts_with('.'))
        });
        if belongs {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Deletes the pod's object for good, however often it takes.
pub(crate) async fn delete_pod(context: &Context, pod: &Pod) {
    let Some(client) = &context.client else { return };
    let meta = &pod.metadata;
    let namespace = meta.namespace.as_deref().unwrap_or("default");
    let name = meta.name.as_deref().unwrap_or_default();
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let params = DeleteParams {
        grace_period_seconds: Some(0),
        preconditions: Some(Preconditions { uid: meta.uid.clone(), resource_version: None }),
        ..Default::default()
    };
    let mut backoff = retrying();
    loop {
        match pods.delete(name, &params).await {
            Ok(_) => return,
            Err(kube::Error::Api(status)) if status.code == 404 => return,
            // a namesake with another UID, or somebody else wrote at the same moment
            Err(kube::Error::Api(status)) if status.code == 409 => {
                let found = pods.get_metadata_opt(name).await;
                if found.is_ok_and(|found| found.is_none_or(|found| found.metadata.uid != meta.uid))
                {
                    return;
                }
            }
            Err(error) => {
                let error = client_error::shown(&error);
                tracing::warn!(namespace, name, error, "pod not deleted, trying again");
            }
        }
        tokio::time::sleep(backoff.next_wait()).await;
    }
}

/// Removes the last files of a pod that is gone: its logs, their links, its folder. Blocks on the
/// file system.
pub(crate) fn remove_files(context: &Context, pod: &Pod) {
    let meta = &pod.metadata;
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let (namespace, name, uid) = (text(&meta.namespace), text(&meta.name), text(&meta.uid));
    // each is a part of a path: nothing that could lead elsewhere
    let plain = |part: &str| !part.is_empty() && !part.contains('/') && part != "." && part != "..";
    if !plain(&uid) || !plain(&name) || !plain(&namespace) {
        return;
    }
    let gone = |result: io::Result<()>, what: &Path| match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %what.display(), %error, "not removed");
        }
        _ => {}
    };
    let logs = context.config.pod_logs_dir.join(sandbox::log_folder(&namespace, &name, &uid));
    if let Ok(links) = fs::read_dir(&context.config.container_logs_dir) {
        let prefix = format!("{name}_{namespace}_");
        for link in links.flatten() {
            let ours = link.file_name().to_str().is_some_and(|link| link.starts_with(&prefix))
                && fs::read_link(link.path()).is_ok_and(|target| target.starts_with(&logs));
            if ours {
                gone(fs::remove_file(link.path()), &link.path());
            }
        }
    }
    gone(fs::remove_dir_all(&logs), &logs);
    let folder = context.config.root_dir.join("pods").join(&uid);
    let containers = folder.join("containers");
    gone(fs::remove_dir_all(&containers), &containers);
    gone(fs::remove_file(folder.join("etc-hosts")), &folder);
    // only if it is empty: volumes that could not be unmounted must not be emptied
    let _ = fs::remove_dir(&folder);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::fixture;

    #[tokio::test]
    async fn a_container_that_never_restarts_is_not_said_to() {
        let folder = tempfile::tempdir().unwrap();
        let context = fixture::context(fixture::FakeRuntime::new(), folder.path());
        let message = |policy: &str, why| {
            let mut pod = fixture::pod(&["a"]);
            pod.spec.as_mut().unwrap().restart_policy = Some(policy.to_owned());
            let kill = Kill {
                context: Arc::clone(&context),
                pod: Arc::new(pod),
                status: fixture::running("a", 0),
                address: None,
                grace: Duration::ZERO,
                why,
                again: false,
            };
            kill.message()
        };
        assert_eq!(message("Never", KillReason::Liveness), "Container a failed liveness probe");
        assert_eq!(
            message("Always", KillReason::Startup),
            "Container a failed startup probe, will be restarted"
        );
    }
}
