//! Sandboxes: what a pod is made from, and how it is.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{LinuxResources, SandboxId};

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
