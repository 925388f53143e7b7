//! Starting one container: image, configuration, creation, start, postStart.

use std::{
    fs, io,
    net::IpAddr,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::core::v1::{Container, Pod};
use keelson_api::events::EventType;
use keelson_runtime_shim::runtime::{ContainerConfig, ContainerId, Mount, SandboxStatus};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{Context, Note, apply::Kill, hooks, plan::KillReason, view};
use crate::{
    container_config::{self, ContainerParts, files, hostname, mounts},
    environment::PodAddresses,
    images,
    volumes::{MountedVolumes, SubPathMount},
};

/// Why a container was not started, in the words of its waiting state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StartError {
    /// `ErrImagePull`, `CreateContainerConfigError`, …
    pub(crate) reason: &'static str,
    /// What a person should know.
    pub(crate) message: String,
}

/// What is to be started, and where.
pub(crate) struct Start {
    /// The agent's parts.
    pub(crate) context: Arc<Context>,
    /// The pod.
    pub(crate) pod: Arc<Pod>,
    /// The container's name.
    pub(crate) name: String,
    /// Its restart count.
    pub(crate) attempt: u32,
    /// Its sandbox.
    pub(crate) sandbox: SandboxStatus,
    /// The wait kept for the restart after this one.
    pub(crate) back_off: Option<Duration>,
    /// The pod's volumes.
    pub(crate) volumes: MountedVolumes,
    /// Told when the process runs and the hook is next.
    pub(crate) notes: mpsc::Sender<Note>,
    /// The pod must stop: what can be given up is.
    pub(crate) cancel: CancellationToken,
}

impl Start {
    /// Starts the container. `Ok` also if the pod was stopped meanwhile.
    pub(crate) async fn run(self) -> Result<(), StartError> {
        let pod = Arc::clone(&self.pod);
        let Some((role, container)) = view::container(&pod, &self.name) else { return Ok(()) };
        let kind = match role {
            view::Role::Init | view::Role::Sidecar => "init_container",
            view::Role::Main => "container",
        };
        let result = self.steps(container).await;
        self.context
            .metrics
            .container_started(kind, result.as_ref().err().map(|error| error.reason));
        result
    }

    async fn steps(&self, container: &Container) -> Result<(), StartError> {
        let image = tokio::select! {
            () = self.cancel.cancelled() => return Ok(()),
            image = images::ensure(&self.context, &self.pod, container) => image?,
        };
        let config = self.configuration(container, &image).await.inspect_err(|error| {
            self.event(
                container,
                EventType::Warning,
                "Failed",
                format!("Error: {}", error.message),
            );
        })?;
        if self.cancel.is_cancelled() {
            return Ok(());
        }
        let id = self.create_and_start(container, &config).await?;
        let hook = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.post_start.as_ref());
        let Some(hook) = hook else { return Ok(()) };
        let _ = self.notes.send(Note::PostStart { container: container.name.clone() }).await;
        let runtime = &*self.context.runtime;
        let ended = tokio::select! {
            () = self.cancel.cancelled() => return Ok(()),
            ended = hooks::run(runtime, &id, container, hook, self.address()) => ended,
        };
        let Err(message) = ended else { return Ok(()) };
        self.event(
            container,
            EventType::Warning,
            "FailedPostStartHook",
            "PostStartHook failed".to_owned(),
        );
        tracing::warn!(pod = view::format_pod(&self.pod), message, "postStart failed");
        self.kill(&id).await;
        Err(StartError { reason: "PostStartHookError", message })
    }

    /// Stops a container whose postStart hook failed, its preStop hook first, as the kubelet does.
    async fn kill(&self, id: &ContainerId) {
        let status = match self.context.runtime.container_status(id).await {
            Ok(status) => status,
            Err(error) => {
                tracing::warn!(container = %id, %error, "container whose postStart failed not stopped");
                return;
            }
        };
        let grace = view::spec(&self.pod).termination_grace_period_seconds.unwrap_or(30);
        let kill = Kill {
            context: Arc::clone(&self.context),
            pod: Arc::clone(&self.pod),
            status,
            address: self.address(),
            grace: Duration::from_secs(u64::try_from(grace).unwrap_or(0)),
            why: KillReason::PostStart,
            again: false,
        };
        kill.run().await;
    }

    fn event(&self, container: &Container, kind: EventType, reason: &str, message: String) {
        self.context.container_event(&self.pod, &container.name, kind, reason, message);
    }

    fn host_network(&self) -> bool {
        view::spec(&self.pod).host_network == Some(true)
    }

    fn pod_ips(&self) -> Vec<IpAddr> {
        if self.host_network() {
            self.context.config.node_ips.clone()
        } else {
            self.sandbox.ips.clone()
        }
    }

    fn address(&self) -> Option<IpAddr> {
        self.pod_ips().first().copied()
    }

    async fn create_and_start(
        &self,
        container: &Container,
        config: &ContainerConfig,
    ) -> Result<ContainerId, StartError> {
        let runtime = &self.context.runtime;
        let created = self
            .context
            .timed("create_container", runtime.create_container(&self.sandbox.id, config));
        let id = created.await.map_err(|error| {
            self.event(container, EventType::Warning, "Failed", format!("Error: {error}"));
            StartError { reason: "CreateContainerError", message: error.to_string() }
        })?;
        self.event(container, EventType::Normal, "Created", "Container created".to_owned());
        if let Err(error) =
            self.context.timed("start_container", runtime.start_container(&id)).await
        {
            self.event(container, EventType::Warning, "Failed", format!("Error: {error}"));
            return Err(StartError { reason: "RunContainerError", message: error.to_string() });
        }
        self.event(container, EventType::Normal, "Started", "Container started".to_owned());
        self.link_log(container, &id, config).await;
        Ok(id)
    }

    async fn configuration(
        &self,
        container: &Container,
        image: &images::Ready,
    ) -> Result<ContainerConfig, StartError> {
        let refused =
            |message: String| StartError { reason: "CreateContainerConfigError", message };
        let addresses = PodAddresses {
            host_ips: self.context.config.node_ips.clone(),
            pod_ips: self.pod_ips(),
        };
        let env = self
            .context
            .environment
            .resolve(&self.pod, container, &addresses)
            .await
            .map_err(|error| refused(error.to_string()))?;
        let planned = mounts::volume_mounts(&self.pod, container, &self.volumes, &env)
            .map_err(|error| refused(error.to_string()))?;
        let mut volume_mounts = Vec::with_capacity(planned.len());
        for planned in planned {
            volume_mounts.push(self.mount(container, planned).await?);
        }
        let own_files = OwnFiles {
            pod_folder: self.pod_folder(),
            container: container.name.clone(),
            hosts: self.hosts_text(&addresses.pod_ips),
            host_network: self.host_network(),
            attempt: self.attempt,
        };
        let written = tokio::task::spawn_blocking(move || own_files.write())
            .await
            .map_err(|error| refused(error.to_string()))?
            .map_err(|error| refused(error.to_string()))?;
        container_config::container_config(ContainerParts {
            config: &self.context.config,
            pod: &self.pod,
            container,
            attempt: self.attempt,
            image_ref: &image.reference,
            image: &image.image,
            env,
            volume_mounts,
            hosts_file: Some(written.hosts),
            termination_file: Some(written.termination),
            back_off: self.back_off,
            memory_capacity: self.context.memory_capacity,
        })
        .map_err(|error| refused(error.to_string()))
    }

    /// The mount as it can be made: a part of a volume is prepared first, and what is not there is
    /// named.
    async fn mount(
        &self,
        container: &Container,
        planned: mounts::PlannedMount,
    ) -> Result<Mount, StartError> {
        let refused =
            |message: String| StartError { reason: "CreateContainerConfigError", message };
        let mut mount = planned.mount;
        if let Some(sub_path) = &planned.sub_path {
            let part = SubPathMount {
                pod_uid: self.pod.metadata.uid.as_deref().unwrap_or_default(),
                container: &container.name,
                index: planned.index,
                volume: &planned.volume,
                volume_path: &mount.host_path,
                sub_path,
            };
            let prepared = self.context.volumes.sub_path(&part).await;
            mount.host_path = prepared.map_err(|error| refused(error.to_string()))?;
        } else if let Err(error) = tokio::fs::symlink_metadata(&mount.host_path).await {
            let path = mount.host_path.display();
            return Err(refused(format!("volume {:?} at {path}: {error}", planned.volume)));
        }
        Ok(mount)
    }

    fn pod_folder(&self) -> PathBuf {
        let uid = self.pod.metadata.uid.as_deref().unwrap_or_default();
        self.context.config.root_dir.join("pods").join(uid)
    }

    /// The text of `/etc/hosts`; with `hostNetwork` what follows the node's own.
    fn hosts_text(&self, ips: &[IpAddr]) -> Box<dyn FnOnce(&str) -> String + Send> {
        let names = hostname::pod_names(&self.pod, &self.context.config.cluster_domain);
        let (pod, ips) = (Arc::clone(&self.pod), ips.to_vec());
        Box::new(move |node_hosts| files::hosts(&pod, &ips, &names, node_hosts))
    }

    /// The link to the container's log for log collectors:
    /// `/var/log/containers/<pod>_<namespace>_<container>-<id>.log`.
    async fn link_log(&self, container: &Container, id: &ContainerId, config: &ContainerConfig) {
        let link =
            log_link(&self.context.config.container_logs_dir, &self.pod, &container.name, id);
        let log = self.sandbox.config.log_directory.join(&config.log_path);
        let made = tokio::task::spawn_blocking(move || {
            if let Some(folder) = link.parent() {
                fs::create_dir_all(folder)?;
            }
            match symlink(&log, &link) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                other => other,
            }
        });
        if let Ok(Err(error)) = made.await {
            tracing::warn!(container = %id, %error, "link to the container's log not made");
        }
    }
}

/// Where the link to a container's log is.
pub(crate) fn log_link(folder: &Path, pod: &Pod, container: &str, id: &ContainerId) -> PathBuf {
    let meta = &pod.metadata;
    folder.join(format!(
        "{}_{}_{container}-{id}.log",
        meta.name.as_deref().unwrap_or_default(),
        meta.namespace.as_deref().unwrap_or_default()
    ))
}

/// Files of the agent that a container gets.
struct OwnFiles {
    pod_folder: PathBuf,
    container: String,
    hosts: Box<dyn FnOnce(&str) -> String + Send>,
    host_network: bool,
    attempt: u32,
}

struct Written {
    hosts: PathBuf,
    termination: PathBuf,
}

impl OwnFiles {
    /// Writes them. Blocks on the file system.
    fn write(self) -> io::Result<Written> {
        let folder = self.pod_folder.join("containers").join(&self.container);
        fs::create_dir_all(&folder)?;
        fs::set_permissions(&self.pod_folder, fs::Permissions::from_mode(0o750))?;
        let node_hosts = if self.host_network {
            fs::read_to_string("/etc/hosts").unwrap_or_default()
        } else {
            String::new()
        };
        let hosts = self.pod_folder.join("etc-hosts");
        let text = (self.hosts)(&node_hosts);
        // written in place: containers that run already have this very file mounted
        if fs::read_to_string(&hosts).ok().as_ref() != Some(&text) {
            fs::write(&hosts, text)?;
            fs::set_permissions(&hosts, fs::Permissions::from_mode(0o644))?;
        }
        let termination = folder.join(self.attempt.to_string());
        fs::write(&termination, "")?;
        // any user of the container may leave its last words
        fs::set_permissions(&termination, fs::Permissions::from_mode(0o666))?;
        Ok(Written { hosts, termination })
    }
}
