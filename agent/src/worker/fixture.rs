//! Small pods and containers for tests, and a runtime that keeps everything in memory.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::{
    api::core::v1::{Container, Pod, PodSpec, ResourceRequirements},
    apimachinery::pkg::{api::resource::Quantity, apis::meta::v1::ObjectMeta},
};
use keelson_api::events::EventRecorder;
use keelson_runtime_shim::runtime::{
    ContainerConfig, ContainerId, ContainerState, ContainerStatus, Duplex, ExecOutput, ExecRequest,
    ExecSession, Image, ImageFsInfo, ImageId, LinuxResources, PodRuntime, RegistryAuth, Result,
    RuntimeError, RuntimeEvent, RuntimeEventKind, RuntimeStatus, RuntimeVersion, SandboxConfig,
    SandboxId, SandboxState, SandboxStats, SandboxStatus,
};
use tokio::sync::{Semaphore, broadcast};
use tokio_util::sync::CancellationToken;

use super::Context;
use crate::{
    config::AgentConfig,
    directory::PodTable,
    environment::{ContainerEnvironment, EnvironmentError, PodAddresses},
    metrics::Metrics,
    volumes::{MountedVolumes, PodVolumes, SubPathMount, VolumeError},
};

/// A moment, in seconds after the tests' own "now".
pub(crate) fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap() + SignedDuration::from_secs(seconds)
}

/// A container that says nothing but its name and image.
pub(crate) fn container(name: &str) -> Container {
    Container {
        name: name.to_owned(),
        image: Some("app:1".to_owned()),
        image_pull_policy: Some("IfNotPresent".to_owned()),
        ..Default::default()
    }
}

/// A pod `default/web` with these containers.
pub(crate) fn pod(names: &[&str]) -> Pod {
    Pod {
        metadata: ObjectMeta {
            name: Some("web".to_owned()),
            namespace: Some("default".to_owned()),
            uid: Some("uid-1".to_owned()),
            ..Default::default()
        },
        spec: Some(PodSpec {
            containers: names.iter().map(|name| container(name)).collect(),
            restart_policy: Some("Always".to_owned()),
            termination_grace_period_seconds: Some(30),
            ..Default::default()
        }),
        status: None,
    }
}

/// Requests and limits.
pub(crate) fn resources(
    requests: &[(&str, &str)],
    limits: &[(&str, &str)],
) -> ResourceRequirements {
    let list = |pairs: &[(&str, &str)]| {
        let list: BTreeMap<_, _> = pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), Quantity((*value).to_owned())))
            .collect();
        Some(list).filter(|list| !list.is_empty())
    };
    ResourceRequirements { requests: list(requests), limits: list(limits), claims: None }
}

/// A container of sandbox `s0` in some state.
pub(crate) fn in_state(name: &str, attempt: u32, state: ContainerState) -> ContainerStatus {
    ContainerStatus {
        id: ContainerId(format!("{name}-{attempt}")),
        sandbox: SandboxId("s0".to_owned()),
        name: name.to_owned(),
        attempt,
        state,
        created_at: at(-100),
        started_at: Some(at(-100)),
        finished_at: None,
        exit_code: None,
        oom_killed: false,
        reason: String::new(),
        message: String::new(),
        image: "app:1".to_owned(),
        image_id: ImageId("sha256:1".to_owned()),
        image_ref: String::new(),
        pid: None,
        log_path: PathBuf::from("/nonexistent/0.log"),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        user: None,
    }
}

/// A running container.
pub(crate) fn running(name: &str, attempt: u32) -> ContainerStatus {
    in_state(name, attempt, ContainerState::Running)
}

/// A container that ended a second ago.
pub(crate) fn exited(name: &str, attempt: u32, code: i32) -> ContainerStatus {
    ContainerStatus {
        finished_at: Some(at(-1)),
        exit_code: Some(code),
        ..in_state(name, attempt, ContainerState::Exited)
    }
}

/// A sandbox.
pub(crate) fn sandbox(id: &str, attempt: u32, state: SandboxState) -> SandboxStatus {
    SandboxStatus {
        id: SandboxId(id.to_owned()),
        config: SandboxConfig { attempt, ..Default::default() },
        state,
        created_at: at(-100),
        ips: vec!["10.0.0.5".parse().unwrap()],
        netns: None,
        shim_pid: None,
    }
}

#[derive(Default)]
struct World {
    sandboxes: BTreeMap<SandboxId, SandboxStatus>,
    containers: BTreeMap<ContainerId, ContainerStatus>,
    images: Vec<String>,
    calls: Vec<String>,
    exec_codes: BTreeMap<String, i32>,
    panics: BTreeSet<String>,
    next: u32,
}

/// A runtime in memory: containers run until they are told to exit.
pub(crate) struct FakeRuntime {
    world: Mutex<World>,
    events: broadcast::Sender<RuntimeEvent>,
}

impl FakeRuntime {
    /// A runtime with the image `app:1`.
    pub(crate) fn new() -> Arc<Self> {
        let world = World { images: vec!["app:1".to_owned()], ..Default::default() };
        Arc::new(Self { world: Mutex::new(world), events: broadcast::channel(256).0 })
    }

    fn with<T>(&self, change: impl FnOnce(&mut World) -> T) -> T {
        change(&mut self.world.lock().unwrap())
    }

    /// What was asked of it, in order.
    pub(crate) fn calls(&self) -> Vec<String> {
        self.with(|world| world.calls.clone())
    }

    /// How `exec` of a command ends from now on.
    pub(crate) fn exec_code(&self, command: &str, code: i32) {
        self.with(|world| world.exec_codes.insert(command.to_owned(), code));
    }

    /// Panics the next time that this container is started.
    pub(crate) fn panic_at_start(&self, name: &str) {
        self.with(|world| world.panics.insert(name.to_owned()));
    }

    /// Whether that is still to come.
    pub(crate) fn panics_at_start(&self, name: &str) -> bool {
        self.with(|world| world.panics.contains(name))
    }

    /// The newest attempt of a container.
    pub(crate) fn latest(&self, name: &str) -> Option<ContainerStatus> {
        self.with(|world| {
            world
                .containers
                .values()
                .filter(|status| status.name == name)
                .max_by_key(|status| status.attempt)
                .cloned()
        })
    }

    /// Lets the newest attempt of a container end.
    pub(crate) fn exit(&self, name: &str, code: i32) {
        let Some(status) = self.latest(name) else { panic!("no container {name}") };
        self.with(|world| {
            let status = world.containers.get_mut(&status.id).unwrap();
            end(status, code);
        });
        self.tell(&status, RuntimeEventKind::ContainerExited);
    }

    fn tell(&self, status: &ContainerStatus, kind: RuntimeEventKind) {
        let _ = self.events.send(RuntimeEvent {
            kind,
            pod_uid: status.labels.get(crate::labels::POD_UID).cloned().unwrap_or_default(),
            sandbox: status.sandbox.clone(),
            container: Some(status.id.clone()),
        });
    }
}

fn end(status: &mut ContainerStatus, code: i32) {
    status.state = ContainerState::Exited;
    status.finished_at = Some(Timestamp::now());
    status.exit_code = Some(code);
}

fn missing(id: impl ToString) -> RuntimeError {
    RuntimeError::NotFound(id.to_string())
}

#[async_trait]
impl PodRuntime for FakeRuntime {
    async fn version(&self) -> Result<RuntimeVersion> {
        Ok(RuntimeVersion { name: "fake".to_owned(), version: "1".to_owned() })
    }

    async fn status(&self) -> RuntimeStatus {
        RuntimeStatus { runtime: Ok(()), network: Ok(()) }
    }

    fn events(&self) -> broadcast::Receiver<RuntimeEvent> {
        self.events.subscribe()
    }

    async fn run_pod_sandbox(&self, config: &SandboxConfig) -> Result<SandboxId> {
        Ok(self.with(|world| {
            let id = SandboxId(format!("sandbox-{}", world.next));
            world.next += 1;
            world.calls.push(format!("run sandbox {}", config.attempt));
            let status = SandboxStatus {
                id: id.clone(),
                config: config.clone(),
                state: SandboxState::Ready,
                created_at: Timestamp::now(),
                ips: vec!["127.0.0.1".parse().unwrap()],
                netns: None,
                shim_pid: None,
            };
            world.sandboxes.insert(id.clone(), status);
            id
        }))
    }

    async fn stop_pod_sandbox(&self, id: &SandboxId) -> Result<()> {
        self.with(|world| {
            world.calls.push("stop sandbox".to_owned());
            if let Some(sandbox) = world.sandboxes.get_mut(id) {
                sandbox.state = SandboxState::NotReady;
            }
        });
        Ok(())
    }

    async fn remove_pod_sandbox(&self, id: &SandboxId) -> Result<()> {
        self.with(|world| {
            world.calls.push("remove sandbox".to_owned());
            world.sandboxes.remove(id);
            world.containers.retain(|_, status| status.sandbox != *id);
        });
        Ok(())
    }

    async fn pod_sandbox_status(&self, id: &SandboxId) -> Result<SandboxStatus> {
        self.with(|world| world.sandboxes.get(id).cloned()).ok_or_else(|| missing(id))
    }

    async fn list_pod_sandboxes(&self) -> Result<Vec<SandboxStatus>> {
        Ok(self.with(|world| world.sandboxes.values().cloned().collect()))
    }

    async fn create_container(
        &self,
        sandbox: &SandboxId,
        config: &ContainerConfig,
    ) -> Result<ContainerId> {
        Ok(self.with(|world| {
            let id = ContainerId(format!("container-{}", world.next));
            world.next += 1;
            world.calls.push(format!("create {}", config.name));
            let status = ContainerStatus {
                id: id.clone(),
                sandbox: sandbox.clone(),
                created_at: Timestamp::now(),
                started_at: None,
                labels: config.labels.clone(),
                annotations: config.annotations.clone(),
                ..in_state(&config.name, config.attempt, ContainerState::Created)
            };
            world.containers.insert(id.clone(), status);
            id
        }))
    }

    async fn start_container(&self, id: &ContainerId) -> Result<()> {
        let status = self.with(|world| {
            let status = world.containers.get_mut(id).ok_or_else(|| missing(id))?;
            status.state = ContainerState::Running;
            status.started_at = Some(Timestamp::now());
            let status = status.clone();
            world.calls.push(format!("start {}", status.name));
            Ok::<_, RuntimeError>(status)
        })?;
        let panics = self.with(|world| world.panics.remove(&status.name));
        assert!(!panics, "as was asked for");
        self.tell(&status, RuntimeEventKind::ContainerStarted);
        Ok(())
    }

    async fn stop_container(&self, id: &ContainerId, grace: Duration) -> Result<()> {
        let status = self.with(|world| {
            let status = world.containers.get_mut(id).ok_or_else(|| missing(id))?;
            if status.state == ContainerState::Running {
                end(status, 143);
            }
            let status = status.clone();
            world.calls.push(format!(
                "stop {} within {}",
                status.name,
                grace.as_secs_f64().round()
            ));
            Ok::<_, RuntimeError>(status)
        })?;
        self.tell(&status, RuntimeEventKind::ContainerExited);
        Ok(())
    }

    async fn remove_container(&self, id: &ContainerId) -> Result<()> {
        self.with(|world| world.containers.remove(id));
        Ok(())
    }

    async fn container_status(&self, id: &ContainerId) -> Result<ContainerStatus> {
        self.with(|world| world.containers.get(id).cloned()).ok_or_else(|| missing(id))
    }

    async fn list_containers(&self, sandbox: Option<&SandboxId>) -> Result<Vec<ContainerStatus>> {
        Ok(self.with(|world| {
            let all = world.containers.values();
            all.filter(|status| sandbox.is_none_or(|id| status.sandbox == *id)).cloned().collect()
        }))
    }

    async fn update_container_resources(&self, _: &ContainerId, _: &LinuxResources) -> Result<()> {
        Ok(())
    }

    async fn set_parent_cgroup(&self, _: &str, _: &LinuxResources) -> Result<()> {
        Ok(())
    }

    async fn reopen_container_log(&self, id: &ContainerId) -> Result<()> {
        self.with(|world| world.calls.push(format!("reopen {id}")));
        Ok(())
    }

    async fn exec(&self, id: &ContainerId, _: &ExecRequest) -> Result<ExecSession> {
        Err(missing(id))
    }

    async fn exec_sync(
        &self,
        _: &ContainerId,
        command: &[String],
        _: Option<Duration>,
    ) -> Result<ExecOutput> {
        let command = command.join(" ");
        let exit_code = self.with(|world| {
            world.calls.push(format!("exec {command}"));
            world.exec_codes.get(&command).copied().unwrap_or(0)
        });
        Ok(ExecOutput { stdout: Vec::new(), stderr: b"no".to_vec(), exit_code })
    }

    async fn attach(&self, id: &ContainerId, _: &ExecRequest) -> Result<ExecSession> {
        Err(missing(id))
    }

    async fn port_forward(&self, id: &SandboxId, _: u16) -> Result<Pin<Box<dyn Duplex>>> {
        Err(missing(id))
    }

    async fn pull_image(&self, image: &str, _: &[RegistryAuth]) -> Result<String> {
        self.with(|world| {
            world.calls.push(format!("pull {image}"));
            if world.images.iter().any(|known| known == image) {
                return Ok(image.to_owned());
            }
            Err(RuntimeError::ImagePull {
                image: image.to_owned(),
                reason: "no such image".to_owned(),
            })
        })
    }

    async fn image_status(&self, image: &str) -> Result<Option<Image>> {
        Ok(self.with(|world| {
            world.images.iter().any(|known| known == image).then(|| Image {
                id: ImageId(image.to_owned()),
                repo_tags: vec![image.to_owned()],
                repo_digests: vec![],
                size: 1,
                uid: None,
                username: None,
                pinned: false,
                volumes: vec![],
            })
        }))
    }

    async fn list_images(&self) -> Result<Vec<Image>> {
        Ok(Vec::new())
    }

    async fn remove_image(&self, _: &str) -> Result<()> {
        Ok(())
    }

    async fn image_fs_info(&self) -> Result<ImageFsInfo> {
        Ok(ImageFsInfo::default())
    }

    async fn list_pod_sandbox_stats(&self) -> Result<Vec<SandboxStats>> {
        Ok(Vec::new())
    }
}

/// No volumes at all.
pub(crate) struct NoVolumes;

#[async_trait]
impl PodVolumes for NoVolumes {
    async fn mount(&self, _: &Pod) -> std::result::Result<MountedVolumes, VolumeError> {
        Ok(MountedVolumes::default())
    }

    async fn sub_path(
        &self,
        mount: &SubPathMount<'_>,
    ) -> std::result::Result<PathBuf, VolumeError> {
        Ok(mount.volume_path.join(mount.sub_path))
    }

    async fn unmount(&self, _: &str) -> std::result::Result<(), VolumeError> {
        Ok(())
    }

    async fn pods_on_disk(&self) -> Vec<String> {
        Vec::new()
    }
}

/// Literal values only.
pub(crate) struct LiteralEnvironment;

#[async_trait]
impl ContainerEnvironment for LiteralEnvironment {
    async fn resolve(
        &self,
        _: &Pod,
        container: &Container,
        _: &PodAddresses,
    ) -> std::result::Result<Vec<(String, String)>, EnvironmentError> {
        let variables = container.env.iter().flatten();
        Ok(variables
            .map(|variable| (variable.name.clone(), variable.value.clone().unwrap_or_default()))
            .collect())
    }
}

/// A context over `runtime` with all files below `folder` and no API.
pub(crate) fn context(runtime: Arc<FakeRuntime>, folder: &std::path::Path) -> Arc<Context> {
    let mut config = AgentConfig::new("node-1", vec!["192.0.2.10".parse().unwrap()]);
    config.root_dir = folder.join("kubelet");
    config.pod_logs_dir = folder.join("logs");
    config.container_logs_dir = folder.join("containers");
    config.resolv_conf = None;
    Arc::new(Context {
        config,
        runtime,
        volumes: Arc::new(NoVolumes),
        environment: Arc::new(LiteralEnvironment),
        client: None,
        events: EventRecorder::discard(),
        metrics: Metrics::new(&Default::default(), &Default::default()).unwrap(),
        pulls: Semaphore::new(1),
        runtime_name: "fake".to_owned(),
        memory_capacity: 1 << 32,
        directory: PodTable::default(),
        pulse: Arc::default(),
        shutdown: CancellationToken::new(),
    })
}
