//! The runtime's face: what the agent may ask of whatever runs its pods.
//!
//! The grain is that of the container runtime interface (CRI v1): a pod is a *sandbox* (its
//! namespaces, its network, its cgroup) with containers in it. Every call is idempotent: stopping
//! what is stopped, or removing what is gone, succeeds, so that a caller which was killed between
//! two steps can simply begin again.

use std::{collections::BTreeMap, fmt, net::IpAddr, path::PathBuf, pin::Pin, time::Duration};

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{broadcast, mpsc, oneshot},
};

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

/// Which network protocol a port mapping is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// Transmission Control Protocol.
    Tcp,
    /// User Datagram Protocol.
    Udp,
    /// Stream Control Transmission Protocol.
    Sctp,
}

/// A container port that is also open on the host (`hostPort`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// The protocol.
    pub protocol: Protocol,
    /// The port inside the pod.
    pub container_port: u16,
    /// The port on the host.
    pub host_port: u16,
    /// The host's address to listen on; all if absent.
    pub host_ip: Option<IpAddr>,
}

/// What `/etc/resolv.conf` of the pod says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsConfig {
    /// `nameserver` lines.
    pub servers: Vec<String>,
    /// The `search` line.
    pub searches: Vec<String>,
    /// The `options` line.
    pub options: Vec<String>,
}

/// Whose namespaces the pod's containers live in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespaceOptions {
    /// `hostNetwork`: no network namespace and no address of its own.
    pub host_network: bool,
    /// `hostPID`.
    pub host_pid: bool,
    /// `hostIPC`.
    pub host_ipc: bool,
    /// `shareProcessNamespace`: one process namespace for all containers of the pod.
    pub share_process_namespace: bool,
}

/// What a sandbox is made from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SandboxConfig {
    /// The pod's name.
    pub name: String,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's UID.
    pub uid: String,
    /// How often a sandbox was made for this pod before.
    pub attempt: u32,
    /// The host name inside the pod; empty for the host's own (`hostNetwork`).
    pub hostname: String,
    /// The pod's log folder, `/var/log/pods/<namespace>_<name>_<uid>`.
    pub log_directory: PathBuf,
    /// `/etc/resolv.conf`; absent for the host's.
    pub dns: Option<DnsConfig>,
    /// Host ports.
    pub port_mappings: Vec<PortMapping>,
    /// Kept with the sandbox and given back in its status.
    pub labels: BTreeMap<String, String>,
    /// Kept with the sandbox and given back in its status.
    pub annotations: BTreeMap<String, String>,
    /// Which of the host's namespaces are shared.
    pub namespaces: NamespaceOptions,
    /// The pod's cgroup relative to the hierarchy's root
    /// (`kubepods/burstable/pod<uid>`); the runtime makes it.
    pub cgroup_parent: String,
    /// The limits of the pod's cgroup as a whole.
    pub resources: LinuxResources,
    /// `securityContext.sysctls`, already found to be namespaced and allowed.
    pub sysctls: BTreeMap<String, String>,
}

/// Whether a sandbox can hold containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SandboxState {
    /// Its namespaces are there and its shim answers.
    Ready,
    /// It was stopped, or its shim is gone.
    NotReady,
}

/// A sandbox as the runtime sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SandboxStatus {
    /// Its name in the runtime.
    pub id: SandboxId,
    /// What it was made from.
    pub config: SandboxConfig,
    /// Whether it can hold containers.
    pub state: SandboxState,
    /// When it was made.
    pub created_at: Timestamp,
    /// The pod's addresses, the primary one first; empty with `hostNetwork`.
    pub ips: Vec<IpAddr>,
    /// The path of the pod's network namespace; absent with `hostNetwork`.
    pub netns: Option<PathBuf>,
    /// The process id of the shim, for information.
    pub shim_pid: Option<i32>,
}

/// How a mount's later changes on one side are seen on the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountPropagation {
    /// `None`: nothing is seen (rprivate).
    #[default]
    Private,
    /// `HostToContainer` (rslave).
    HostToContainer,
    /// `Bidirectional` (rshared).
    Bidirectional,
}

/// A folder or file of the host inside the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// The absolute path in the container.
    pub container_path: PathBuf,
    /// The absolute path on the host.
    pub host_path: PathBuf,
    /// No writes through this mount.
    pub readonly: bool,
    /// Read-only for mounts below it too (`recursiveReadOnly: Enabled`).
    pub recursive_readonly: bool,
    /// Which way later mounts travel.
    pub propagation: MountPropagation,
}

/// A device of the host inside the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// The path in the container.
    pub container_path: PathBuf,
    /// The path on the host.
    pub host_path: PathBuf,
    /// Any of `r`, `w`, `m`.
    pub permissions: String,
}

/// What a cgroup may use. An absent field leaves the kernel's default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinuxResources {
    /// Microseconds of a period.
    pub cpu_period: Option<u64>,
    /// Microseconds of CPU time in each period; -1 is no limit.
    pub cpu_quota: Option<i64>,
    /// Relative weight, 2 to 262144 (cgroup v1's scale; converted for v2).
    pub cpu_shares: Option<u64>,
    /// Bytes of memory.
    pub memory_limit: Option<i64>,
    /// Processes and threads.
    pub pids_limit: Option<i64>,
    /// Score for the kernel's out-of-memory killer, -1000 to 1000.
    pub oom_score_adj: Option<i32>,
    /// CPUs the container may run on, as `0-3,6`.
    pub cpuset_cpus: Option<String>,
    /// Memory nodes the container may use.
    pub cpuset_mems: Option<String>,
    /// Further files of cgroup v2, by name (`memory.high`).
    pub unified: BTreeMap<String, String>,
}

/// Which system call filter a container runs under.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SeccompProfile {
    /// None at all.
    #[default]
    Unconfined,
    /// The runtime's own default.
    RuntimeDefault,
    /// A profile in a file of the host.
    Localhost(PathBuf),
}

/// What a container's processes may do, and as whom.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerSecurity {
    /// All capabilities, all devices, no seccomp, writable `/sys`.
    pub privileged: bool,
    /// `runAsUser`.
    pub run_as_user: Option<i64>,
    /// `runAsGroup`.
    pub run_as_group: Option<i64>,
    /// User from the image by name, if `run_as_user` is absent; the runtime looks it up in the
    /// image's `/etc/passwd`.
    pub run_as_username: Option<String>,
    /// `supplementalGroups` and `fsGroup`.
    pub supplemental_groups: Vec<i64>,
    /// Only the groups above, none of the image's (`supplementalGroupsPolicy: Strict`).
    pub strict_supplemental_groups: bool,
    /// Capabilities to add to the default set, without `CAP_`; `ALL` for all.
    pub add_capabilities: Vec<String>,
    /// Capabilities to drop from the default set, without `CAP_`; `ALL` for all.
    pub drop_capabilities: Vec<String>,
    /// `readOnlyRootFilesystem`.
    pub readonly_rootfs: bool,
    /// The negation of `allowPrivilegeEscalation`.
    pub no_new_privileges: bool,
    /// The system call filter.
    pub seccomp: SeccompProfile,
    /// `procMount: Unmasked`.
    pub unmasked_proc: bool,
}

/// What a container is made from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ContainerConfig {
    /// The container's name in the pod.
    pub name: String,
    /// How often it was made before in this pod (the restart count).
    pub attempt: u32,
    /// The image, by the reference that [`PodRuntime::pull_image`] or
    /// [`PodRuntime::image_status`] answered with.
    pub image: String,
    /// `command`; the image's entry point if empty.
    pub command: Vec<String>,
    /// `args`; the image's, if this and `command` are empty.
    pub args: Vec<String>,
    /// `workingDir`; the image's if absent.
    pub working_dir: Option<PathBuf>,
    /// Environment in order; it comes after the image's.
    pub env: Vec<(String, String)>,
    /// Mounts, in the order of mounting.
    pub mounts: Vec<Mount>,
    /// Devices.
    pub devices: Vec<Device>,
    /// Kept and given back in the status.
    pub labels: BTreeMap<String, String>,
    /// Kept and given back in the status.
    pub annotations: BTreeMap<String, String>,
    /// The log file, relative to the sandbox's log folder: `<container>/<attempt>.log`.
    pub log_path: PathBuf,
    /// Keep standard input open.
    pub stdin: bool,
    /// Close standard input after the first attach ends.
    pub stdin_once: bool,
    /// Give it a terminal.
    pub tty: bool,
    /// The container's cgroup limits.
    pub resources: LinuxResources,
    /// What it may do, and as whom.
    pub security: ContainerSecurity,
    /// The signal that asks it to stop; the image's, else `SIGTERM`, if absent.
    pub stop_signal: Option<String>,
}

/// Where a container is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContainerState {
    /// Made, its process not let go yet.
    Created,
    /// Its process runs.
    Running,
    /// Its process ended.
    Exited,
    /// The runtime can't tell (its shim is gone without a record).
    Unknown,
}

/// A container as the runtime sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContainerStatus {
    /// Its name in the runtime.
    pub id: ContainerId,
    /// The sandbox it is in.
    pub sandbox: SandboxId,
    /// Its name in the pod.
    pub name: String,
    /// Its attempt (restart count) when made.
    pub attempt: u32,
    /// Where it is in its life.
    pub state: ContainerState,
    /// When it was made.
    pub created_at: Timestamp,
    /// When its process was let go.
    pub started_at: Option<Timestamp>,
    /// When its process ended.
    pub finished_at: Option<Timestamp>,
    /// The exit code; 128 + the signal for a killed process.
    pub exit_code: Option<i32>,
    /// The kernel killed it for memory.
    pub oom_killed: bool,
    /// A short word for why it ended (`Completed`, `Error`, `OOMKilled`, `StartError`).
    pub reason: String,
    /// More about why it ended, for a person.
    pub message: String,
    /// The image as it was asked for.
    pub image: String,
    /// The image's id.
    pub image_id: ImageId,
    /// The image's `name@digest`, if it has one: Kubernetes' `imageID`.
    pub image_ref: String,
    /// Its process id in the host's namespace, while it runs.
    pub pid: Option<i32>,
    /// The absolute path of its log file.
    pub log_path: PathBuf,
    /// As given when it was made.
    pub labels: BTreeMap<String, String>,
    /// As given when it was made.
    pub annotations: BTreeMap<String, String>,
    /// The user the process runs as, once known: uid, gid and further groups.
    pub user: Option<LinuxUser>,
}

/// Whom a process runs as.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinuxUser {
    /// User id.
    pub uid: i64,
    /// Primary group.
    pub gid: i64,
    /// Further groups.
    pub supplemental_groups: Vec<i64>,
}

/// An image in the store.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Image {
    /// The digest of its config.
    pub id: ImageId,
    /// `name:tag` references.
    pub repo_tags: Vec<String>,
    /// `name@sha256:…` references.
    pub repo_digests: Vec<String>,
    /// Bytes of its layers, unpacked or not as the store counts them.
    pub size: u64,
    /// The numeric user of its config, if the config names one.
    pub uid: Option<i64>,
    /// The user's name in its config, if that is not a number.
    pub username: Option<String>,
    /// Never collected as garbage.
    pub pinned: bool,
    /// The volumes its config declares.
    pub volumes: Vec<PathBuf>,
}

/// A user and password, or a token, for a registry.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistryAuth {
    /// User name.
    pub username: String,
    /// Password.
    pub password: String,
    /// Bearer token, instead of user and password.
    pub registry_token: String,
}

impl fmt::Debug for RegistryAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistryAuth").field("username", &self.username).finish_non_exhaustive()
    }
}

/// Space that images use.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ImageFsInfo {
    /// Where the images are.
    pub mountpoint: PathBuf,
    /// Bytes they use.
    pub used_bytes: u64,
    /// Files they use.
    pub inodes_used: u64,
}

/// What a container or pod uses at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ResourceUsage {
    /// CPU time so far, in nanoseconds.
    pub cpu_usage_nanos: u64,
    /// Bytes in use, page cache included.
    pub memory_usage: u64,
    /// Bytes in use less the inactive page cache: what eviction counts.
    pub memory_working_set: u64,
    /// Anonymous and swap cache bytes.
    pub memory_rss: u64,
    /// Minor page faults.
    pub page_faults: u64,
    /// Major page faults.
    pub major_page_faults: u64,
    /// The limit in force, if any.
    pub memory_limit: Option<u64>,
    /// Processes and threads.
    pub pids: u64,
}

/// Usage of one container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContainerStats {
    /// Which container.
    pub id: ContainerId,
    /// Which sandbox.
    pub sandbox: SandboxId,
    /// Its name in the pod.
    pub name: String,
    /// When it was read.
    pub at: Timestamp,
    /// CPU, memory, processes.
    pub usage: ResourceUsage,
    /// Bytes in its writable layer.
    pub rootfs_used_bytes: u64,
    /// Files in its writable layer.
    pub rootfs_inodes_used: u64,
}

/// Counters of one network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceStats {
    /// Interface name.
    pub name: String,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Receive errors.
    pub rx_errors: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Send errors.
    pub tx_errors: u64,
}

/// Usage of one pod and its containers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SandboxStats {
    /// Which sandbox.
    pub id: SandboxId,
    /// When it was read.
    pub at: Timestamp,
    /// The whole pod's cgroup.
    pub usage: ResourceUsage,
    /// The pod's interfaces.
    pub interfaces: Vec<InterfaceStats>,
    /// Its containers.
    pub containers: Vec<ContainerStats>,
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

/// The size of a terminal, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// Bytes from a process.
pub type OutputStream = Pin<Box<dyn AsyncRead + Send>>;
/// Bytes to a process. Shutting it down closes the process's standard input.
pub type InputStream = Pin<Box<dyn AsyncWrite + Send>>;

/// A byte stream in both directions.
pub trait Duplex: AsyncRead + AsyncWrite + Send {}
impl<T: AsyncRead + AsyncWrite + Send> Duplex for T {}

/// A command to run in a container, or an attachment to its main process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecRequest {
    /// The command; ignored when attaching.
    pub command: Vec<String>,
    /// Give it standard input.
    pub stdin: bool,
    /// Read its standard output.
    pub stdout: bool,
    /// Read its standard error; not together with `tty`.
    pub stderr: bool,
    /// Run it on a terminal.
    pub tty: bool,
}

/// The ends of a running command (or of an attachment) that the caller holds.
///
/// Dropping it ends the command's streams; an exec'd process whose streams are gone gets `SIGHUP`
/// if it has a terminal, and is otherwise left to find its pipes closed.
pub struct ExecSession {
    /// Standard input, if asked for.
    pub stdin: Option<InputStream>,
    /// Standard output (and error, on a terminal), if asked for.
    pub stdout: Option<OutputStream>,
    /// Standard error, if asked for and not on a terminal.
    pub stderr: Option<OutputStream>,
    /// Changes of the terminal's size; present with `tty`.
    pub resize: Option<mpsc::Sender<TerminalSize>>,
    /// The exit code, once the command ended; for an attachment, once the container did.
    pub exit: oneshot::Receiver<Result<i32>>,
}

/// What a command that was run to its end said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecOutput {
    /// Its standard output, bounded at 16 KiB as the kubelet's probes are.
    pub stdout: Vec<u8>,
    /// Its standard error, bounded likewise.
    pub stderr: Vec<u8>,
    /// Its exit code.
    pub exit_code: i32,
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
