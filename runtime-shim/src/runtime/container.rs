//! Containers: what they are made from, what they may do, and how they are.

use std::{collections::BTreeMap, path::PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{ContainerId, ImageId, SandboxId};

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
