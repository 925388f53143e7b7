//! The runtime's face: what the agent may ask of whatever runs its pods.
//!
//! The grain is that of the container runtime interface (CRI v1): a pod is a *sandbox* (its
//! namespaces, its network, its cgroup) with containers in it. Every call is idempotent: stopping
//! what is stopped, or removing what is gone, succeeds, so that a caller which was killed between
//! two steps can simply begin again.

mod container;
mod image;
mod sandbox;
mod stats;
mod streams;

use std::{fmt, pin::Pin, time::Duration};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

pub use container::*;
pub use image::*;
pub use sandbox::*;
pub use stats::*;
pub use streams::*;

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub String);

        impl $name {
            /// The identifier as text, as it stands in paths and status fields.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id_type! {
    /// Names one sandbox: 64 hexadecimal digits, never used twice.
    SandboxId
}
id_type! {
    /// Names one container: 64 hexadecimal digits, never used twice.
    ContainerId
}
id_type! {
    /// The digest of an image's config, `sha256:…`: what Kubernetes shows as `imageID`.
    ImageId
}

/// The runtime's result.
pub type Result<T, E = RuntimeError> = std::result::Result<T, E>;

/// Why the runtime could not do what it was asked.
///
/// The variants are the cases in which a caller acts differently.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The sandbox, container or image is not there.
    #[error("{0}: not found")]
    NotFound(String),
    /// The image's name can't be parsed (the waiting reason `InvalidImageName`).
    #[error("image {image:?}: not a valid image reference: {reason}")]
    InvalidImageName {
        /// The name as it was given.
        image: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The image could not be had (the waiting reason `ErrImagePull`).
    #[error("image {image}: {reason}")]
    ImagePull {
        /// The image's full reference.
        image: String,
        /// What the registry or the network said.
        reason: String,
    },
    /// The request asks for something that can't be done, however often it is tried.
    #[error("{0}")]
    Invalid(String),
    /// The request took longer than it was allowed to.
    #[error("{what}: timed out after {after:?}")]
    Timeout {
        /// What took too long.
        what: String,
        /// The bound it was given.
        after: Duration,
    },
    /// The container can't be made or started (the waiting reasons `CreateContainerError`,
    /// `RunContainerError`).
    #[error("{0}")]
    Container(String),
    /// Something that a later try may cure.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, to what.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Anything else that went wrong inside the runtime.
    #[error("{0}")]
    Internal(String),
}

/// The runtime's name and version, as a node's status shows them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuntimeVersion {
    /// `keelson`, `containerd`, …
    pub name: String,
    /// Its version.
    pub version: String,
}

/// Whether the runtime can run pods now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuntimeStatus {
    /// Containers can be made; if not, why.
    pub runtime: std::result::Result<(), String>,
    /// Pods get a network; if not, why.
    pub network: std::result::Result<(), String>,
}

/// Something that happened to a sandbox or a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RuntimeEventKind {
    /// A container's process was let go.
    ContainerStarted,
    /// A container's process ended.
    ContainerExited,
    /// A container was removed.
    ContainerRemoved,
    /// A sandbox changed its state.
    SandboxChanged,
}

/// An event, with enough in it to find the pod that it concerns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuntimeEvent {
    /// What happened.
    pub kind: RuntimeEventKind,
    /// The UID of the pod.
    pub pod_uid: String,
    /// The sandbox.
    pub sandbox: SandboxId,
    /// The container, if it concerns one.
    pub container: Option<ContainerId>,
}

/// Whatever runs pods.
///
/// All methods may be called from any task. None blocks the caller's worker thread. None keeps
/// state that a new instance over the same folders could not find again.
#[async_trait]
pub trait PodRuntime: Send + Sync + 'static {
    /// Name and version.
    async fn version(&self) -> Result<RuntimeVersion>;
    /// Whether pods can run now.
    async fn status(&self) -> RuntimeStatus;
    /// What happens to sandboxes and containers, from now on. A receiver that lags is told so and
    /// must list again.
    fn events(&self) -> broadcast::Receiver<RuntimeEvent>;

    /// Makes a sandbox: cgroup, namespaces, address, shim. Returns when containers can be made.
    async fn run_pod_sandbox(&self, config: &SandboxConfig) -> Result<SandboxId>;
    /// Kills what runs in it and gives its address back. Its containers stay, to be looked at.
    async fn stop_pod_sandbox(&self, id: &SandboxId) -> Result<()>;
    /// Stops it and removes it with all its containers.
    async fn remove_pod_sandbox(&self, id: &SandboxId) -> Result<()>;
    /// One sandbox; [`RuntimeError::NotFound`] if it is gone.
    async fn pod_sandbox_status(&self, id: &SandboxId) -> Result<SandboxStatus>;
    /// All sandboxes.
    async fn list_pod_sandboxes(&self) -> Result<Vec<SandboxStatus>>;

    /// Makes a container; its process waits to be let go.
    async fn create_container(
        &self,
        sandbox: &SandboxId,
        config: &ContainerConfig,
    ) -> Result<ContainerId>;
    /// Lets its process go.
    async fn start_container(&self, id: &ContainerId) -> Result<()>;
    /// Asks it to stop, and kills it after `grace`. Returns when it has ended.
    async fn stop_container(&self, id: &ContainerId, grace: Duration) -> Result<()>;
    /// Kills it if need be and removes it with its writable layer. The log file stays.
    async fn remove_container(&self, id: &ContainerId) -> Result<()>;
    /// One container; [`RuntimeError::NotFound`] if it is gone.
    async fn container_status(&self, id: &ContainerId) -> Result<ContainerStatus>;
    /// All containers, or those of one sandbox.
    async fn list_containers(&self, sandbox: Option<&SandboxId>) -> Result<Vec<ContainerStatus>>;
    /// Changes its cgroup limits while it runs.
    async fn update_container_resources(
        &self,
        id: &ContainerId,
        resources: &LinuxResources,
    ) -> Result<()>;
    /// Makes a cgroup that pods' cgroups will be in (`kubepods/burstable`), if it isn't there, and
    /// sets what is given of its limits.
    async fn set_parent_cgroup(&self, path: &str, resources: &LinuxResources) -> Result<()>;
    /// Opens its log file anew, after somebody renamed the old one.
    async fn reopen_container_log(&self, id: &ContainerId) -> Result<()>;

    /// Runs a command in it and hands out its streams.
    async fn exec(&self, id: &ContainerId, request: &ExecRequest) -> Result<ExecSession>;
    /// Runs a command in it to its end; it is killed after `timeout`, which is then the error.
    async fn exec_sync(
        &self,
        id: &ContainerId,
        command: &[String],
        timeout: Option<Duration>,
    ) -> Result<ExecOutput>;
    /// Joins the streams of its main process.
    async fn attach(&self, id: &ContainerId, request: &ExecRequest) -> Result<ExecSession>;
    /// Connects to a TCP port on the pod's own loopback.
    async fn port_forward(&self, id: &SandboxId, port: u16) -> Result<Pin<Box<dyn Duplex>>>;

    /// Gets an image and unpacks it; returns its `name@digest` reference or id.
    async fn pull_image(&self, image: &str, auth: &[RegistryAuth]) -> Result<String>;
    /// The image, if it is in the store; `image` is a name, a `name@digest` or an id.
    async fn image_status(&self, image: &str) -> Result<Option<Image>>;
    /// All images in the store.
    async fn list_images(&self) -> Result<Vec<Image>>;
    /// Removes an image with all its names; succeeds if it is not there.
    async fn remove_image(&self, image: &str) -> Result<()>;
    /// What images use.
    async fn image_fs_info(&self) -> Result<ImageFsInfo>;

    /// Usage of all pods and their containers.
    async fn list_pod_sandbox_stats(&self) -> Result<Vec<SandboxStats>>;
}
