//! The embedded runtime: pods made by this program alone.
//!
//! ```text
//!   run_pod_sandbox   cgroup ─► network namespace, address ─► shim (IPC, UTS) ─► record "ready"
//!   create_container  image's layers ─► overlay ─► spec ─► record
//!   start_container   shim ─► helper ─► libcontainer ─► process, let go
//!   … ends            shim: drains the streams, writes the state file, tells who listens
//! ```
//!
//! * `disk`: what is kept where, and in which order it is written
//! * `shim`: the agent's side of a pod's shim; `helper`: the processes that shims start
//! * `sandboxes`, `containers`, `sessions`, `report`: the calls of [`PodRuntime`]
//! * `rootfs`, `devices`, `host`: what containers are made of
//! * `recover`: what a new instance finds, and removes of what was left half-made
//! * `teardown`: removing everything
//!
//! What is in memory is a copy of the disk and of what the shims say. A process that is killed
//! leaves pods that run on; [`EmbeddedRuntime::open`] finds them again.

mod containers;
mod devices;
mod disk;
mod helper;
mod host;
mod program;
mod recover;
mod report;
mod rootfs;
mod sandboxes;
mod sessions;
mod shim;
mod teardown;

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use tokio::sync::{broadcast, watch};

pub use self::{disk::images_in_use, teardown::Removed};
use self::{
    disk::{ContainerRecord, Disk, Phase, SandboxRecord},
    shim::protocol,
};
use crate::{
    cgroup::Cgroups,
    images::ImageStore,
    network::{Network, NetworkConfig},
    runtime::*,
    spec,
};

/// Events that a slow listener may be behind.
const EVENTS: usize = 4096;

/// How an embedded runtime is set up.
#[derive(Clone, Debug)]
pub struct EmbeddedConfig {
    /// What outlives the machine's restart: records, root file systems (`/var/lib/keelson/runtime`).
    pub root: PathBuf,
    /// What does not: sockets, network namespaces (`/run/keelson`). A short path, for sockets.
    pub run: PathBuf,
    /// The cgroup below the root of each hierarchy that is this runtime's; empty for the root
    /// itself, as a node has it.
    pub cgroup_root: String,
    /// The program, and its first arguments, that ends up in [`helper_main`]. Empty for the running
    /// program itself with `runtime-helper`.
    pub helper: Vec<String>,
    /// The pods' network.
    pub network: NetworkConfig,
}

/// Does what a shim started this process for; `arguments` are those after `runtime-helper`. Returns
/// the exit code. To be called before the process has a second thread, and before it prints.
pub fn helper_main(arguments: &[String]) -> i32 {
    helper::run(arguments)
}

/// The embedded runtime. Cheap to clone; one process at a time may have a root open.
#[derive(Clone)]
pub struct EmbeddedRuntime {
    inner: Arc<Inner>,
}

struct Inner {
    disk: Disk,
    cgroups: Cgroups,
    host: spec::Host,
    network: Network,
    images: ImageStore,
    helper: Vec<String>,
    /// What the helper's path leads to.
    _program: Option<OwnedFd>,
    shim_program: PathBuf,
    boot: String,
    events: broadcast::Sender<RuntimeEvent>,
    sandboxes: Mutex<HashMap<SandboxId, Arc<Sandbox>>>,
    containers: Mutex<HashMap<ContainerId, Arc<Container>>>,
}

/// A sandbox and what is going on with it.
struct Sandbox {
    record: Mutex<SandboxRecord>,
    /// Whether its shim answers.
    alive: watch::Sender<bool>,
    /// Held by whoever makes, stops or removes it.
    changing: tokio::sync::Mutex<()>,
}

/// A container and what is going on with it.
struct Container {
    record: Mutex<ContainerRecord>,
    /// Its process, as the shim says.
    process: watch::Sender<protocol::State>,
    /// Held by whoever starts or removes it.
    changing: tokio::sync::Mutex<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs what reads or writes the disk, mounts or waits for the kernel where that blocks nobody.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(RuntimeError::Internal(format!("runtime: {error}"))),
    }
}

impl Sandbox {
    fn record(&self) -> SandboxRecord {
        lock(&self.record).clone()
    }

    fn is_ready(&self) -> bool {
        *self.alive.borrow() && lock(&self.record).phase == Phase::Ready
    }

    fn status(&self) -> SandboxStatus {
        let record = self.record();
        SandboxStatus {
            state: if self.is_ready() { SandboxState::Ready } else { SandboxState::NotReady },
            ips: record.ips,
            netns: None,
            shim_pid: record.shim_pid.filter(|_| *self.alive.borrow()),
            created_at: record.created_at,
            id: record.id,
            config: record.config,
        }
    }
}

impl EmbeddedRuntime {
    /// Opens the runtime over its folders: finds the pods that run, and removes what an instance that
    /// was killed had begun and not finished.
    ///
    /// # Errors
    /// A folder can't be written, there are no cgroups, or the network can't be set up.
    pub async fn open(config: EmbeddedConfig, images: ImageStore) -> Result<EmbeddedRuntime> {
        let EmbeddedConfig { root, run, cgroup_root, helper, network } = config;
        let network_open = {
            let (root, network) = (root.clone(), network);
            move || Network::open(network, &root.join("addresses"))
        };
        let opened = blocking(move || {
            let disk = Disk::open(&root, &run)?;
            let shim_program = shim::install(&disk.root)?;
            let cgroups = Cgroups::detect(&cgroup_root).map_err(|source| RuntimeError::Io {
                what: "finding the host's cgroups".into(),
                source,
            })?;
            let host = host::look(&cgroups);
            Ok((disk, shim_program, cgroups, host))
        })
        .await?;
        let (disk, shim_program, cgroups, host) = opened;
        let (helper, program) = if helper.is_empty() {
            let program = program::read_only_self()?;
            let path = format!("/proc/{}/fd/{}", std::process::id(), program.as_raw_fd());
            (vec![path, "runtime-helper".to_owned()], Some(program))
        } else {
            (helper, None)
        };
        let runtime = EmbeddedRuntime {
            inner: Arc::new(Inner {
                disk,
                cgroups,
                host,
                network: network_open()?,
                images,
                helper,
                _program: program,
                shim_program,
                boot: disk::boot_id(),
                events: broadcast::channel(EVENTS).0,
                sandboxes: Mutex::default(),
                containers: Mutex::default(),
            }),
        };
        runtime.recover().await?;
        Ok(runtime)
    }

    /// Sets the ranges that new pods get their addresses from: the node's `spec.podCIDRs`. Pods that
    /// have addresses keep them.
    ///
    /// # Errors
    /// The host's packet filter or routes can't be set up for them.
    pub async fn set_pod_ranges(&self, ranges: &[ipnet::IpNet]) -> Result<()> {
        self.inner.network.set_pod_ranges(ranges).await
    }

    /// The images that containers are made from, which must not be removed.
    pub fn images_in_use(&self) -> BTreeSet<ImageId> {
        lock(&self.inner.containers).values().map(|c| lock(&c.record).image_id.clone()).collect()
    }
}

impl Inner {
    fn sandbox(&self, id: &SandboxId) -> Result<Arc<Sandbox>> {
        lock(&self.sandboxes)
            .get(id)
            .cloned()
            .ok_or_else(|| RuntimeError::NotFound(format!("sandbox {id}")))
    }

    fn container(&self, id: &ContainerId) -> Result<Arc<Container>> {
        lock(&self.containers)
            .get(id)
            .cloned()
            .ok_or_else(|| RuntimeError::NotFound(format!("container {id}")))
    }

    fn containers_of(&self, sandbox: &SandboxId) -> Vec<Arc<Container>> {
        lock(&self.containers)
            .values()
            .filter(|c| lock(&c.record).sandbox == *sandbox)
            .cloned()
            .collect()
    }

    fn announce(&self, kind: RuntimeEventKind, sandbox: &Sandbox, container: Option<ContainerId>) {
        let (pod_uid, id) = {
            let record = lock(&sandbox.record);
            (record.config.uid.clone(), record.id.clone())
        };
        // Nobody listening is no error.
        let _ = self.events.send(RuntimeEvent { kind, pod_uid, sandbox: id, container });
    }

    fn network_namespace(&self, record: &SandboxRecord) -> Option<PathBuf> {
        (!record.config.namespaces.host_network).then(|| self.disk.netns(&record.id))
    }

    fn sandbox_status(&self, sandbox: &Sandbox) -> SandboxStatus {
        let mut status = sandbox.status();
        status.netns = self.network_namespace(&lock(&sandbox.record));
        status
    }
}

#[async_trait]
impl PodRuntime for EmbeddedRuntime {
    async fn version(&self) -> Result<RuntimeVersion> {
        Ok(RuntimeVersion { name: "keelson".into(), version: env!("CARGO_PKG_VERSION").into() })
    }

    async fn status(&self) -> RuntimeStatus {
        RuntimeStatus { runtime: Ok(()), network: self.inner.network.readiness() }
    }

    fn events(&self) -> broadcast::Receiver<RuntimeEvent> {
        self.inner.events.subscribe()
    }

    async fn run_pod_sandbox(&self, config: &SandboxConfig) -> Result<SandboxId> {
        Box::pin(self.make_sandbox(config)).await
    }

    async fn stop_pod_sandbox(&self, id: &SandboxId) -> Result<()> {
        match self.inner.sandbox(id) {
            Ok(sandbox) => Box::pin(self.stop_sandbox(&sandbox)).await,
            Err(RuntimeError::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn remove_pod_sandbox(&self, id: &SandboxId) -> Result<()> {
        match self.inner.sandbox(id) {
            Ok(sandbox) => Box::pin(self.remove_sandbox(&sandbox)).await,
            Err(RuntimeError::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn pod_sandbox_status(&self, id: &SandboxId) -> Result<SandboxStatus> {
        Ok(self.inner.sandbox_status(&*self.inner.sandbox(id)?))
    }

    async fn list_pod_sandboxes(&self) -> Result<Vec<SandboxStatus>> {
        let all: Vec<_> = lock(&self.inner.sandboxes).values().cloned().collect();
        Ok(all.iter().map(|s| self.inner.sandbox_status(s)).collect())
    }

    async fn create_container(
        &self,
        sandbox: &SandboxId,
        config: &ContainerConfig,
    ) -> Result<ContainerId> {
        Box::pin(self.make_container(&*self.inner.sandbox(sandbox)?, config)).await
    }

    async fn start_container(&self, id: &ContainerId) -> Result<()> {
        Box::pin(self.let_container_go(&self.inner.container(id)?)).await
    }

    async fn stop_container(&self, id: &ContainerId, grace: Duration) -> Result<()> {
        match self.inner.container(id) {
            Ok(container) => Box::pin(self.end_container(&container, grace)).await,
            Err(RuntimeError::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn remove_container(&self, id: &ContainerId) -> Result<()> {
        match self.inner.container(id) {
            Ok(container) => Box::pin(self.discard_container(&container)).await,
            Err(RuntimeError::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn container_status(&self, id: &ContainerId) -> Result<ContainerStatus> {
        let container = self.inner.container(id)?;
        Ok(self.inner.describe(&container))
    }

    async fn list_containers(&self, sandbox: Option<&SandboxId>) -> Result<Vec<ContainerStatus>> {
        let all: Vec<_> = match sandbox {
            Some(id) => self.inner.containers_of(id),
            None => lock(&self.inner.containers).values().cloned().collect(),
        };
        Ok(all.iter().map(|c| self.inner.describe(c)).collect())
    }

    async fn update_container_resources(
        &self,
        id: &ContainerId,
        resources: &LinuxResources,
    ) -> Result<()> {
        self.limit_container(&self.inner.container(id)?, resources).await
    }

    async fn set_parent_cgroup(&self, path: &str, resources: &LinuxResources) -> Result<()> {
        let (inner, path, resources) =
            (Arc::clone(&self.inner), path.to_owned(), resources.clone());
        blocking(move || {
            let set = || {
                let cgroup = inner.cgroups.pod(&path)?;
                inner.cgroups.create_pod(&cgroup)?;
                inner.cgroups.set_limits(&cgroup, &resources)
            };
            set().map_err(|source| RuntimeError::Io {
                what: format!("limiting the cgroup {path}"),
                source,
            })
        })
        .await
    }

    async fn reopen_container_log(&self, id: &ContainerId) -> Result<()> {
        let container = self.inner.container(id)?;
        let sandbox = lock(&container.record).sandbox.clone();
        let op = protocol::Op::ReopenLog { container: id.0.clone() };
        shim::call(&self.inner.disk.socket(&sandbox), op).await.map(|_| ())
    }

    async fn exec(&self, id: &ContainerId, request: &ExecRequest) -> Result<ExecSession> {
        Box::pin(self.begin_exec(&self.inner.container(id)?, request)).await
    }

    async fn exec_sync(
        &self,
        id: &ContainerId,
        command: &[String],
        timeout: Option<Duration>,
    ) -> Result<ExecOutput> {
        Box::pin(self.exec_to_end(&self.inner.container(id)?, command, timeout)).await
    }

    async fn attach(&self, id: &ContainerId, request: &ExecRequest) -> Result<ExecSession> {
        Box::pin(self.begin_attach(&self.inner.container(id)?, request)).await
    }

    async fn port_forward(&self, id: &SandboxId, port: u16) -> Result<Pin<Box<dyn Duplex>>> {
        let sandbox = self.inner.sandbox(id)?;
        if !sandbox.is_ready() {
            return Err(RuntimeError::Container(format!("sandbox {id} does not run")));
        }
        let netns = self.inner.network_namespace(&lock(&sandbox.record));
        let stream = crate::network::connect_inside(netns, port).await?;
        Ok(Box::pin(stream))
    }

    async fn pull_image(&self, image: &str, auth: &[RegistryAuth]) -> Result<String> {
        let image = self.inner.images.pull(image, auth).await?;
        Ok(image.repo_digests.into_iter().next().unwrap_or(image.id.0))
    }

    async fn image_status(&self, image: &str) -> Result<Option<Image>> {
        let found = self.inner.images.find(image).await?;
        if found.is_none() {
            // said now, and not only by the pull that would follow
            crate::images::check_name(image)?;
        }
        Ok(found)
    }

    async fn list_images(&self) -> Result<Vec<Image>> {
        self.inner.images.list().await
    }

    async fn remove_image(&self, image: &str) -> Result<()> {
        self.inner.images.remove(image, &self.images_in_use()).await
    }

    async fn image_fs_info(&self) -> Result<ImageFsInfo> {
        self.inner.images.fs_info().await
    }

    async fn list_pod_sandbox_stats(&self) -> Result<Vec<SandboxStats>> {
        self.measure().await
    }
}

/// A path that others take as text.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// The first of a pod's addresses, for messages.
fn first_address(ips: &[IpAddr]) -> String {
    ips.first().map_or_else(|| "the host's".to_owned(), ToString::to_string)
}
