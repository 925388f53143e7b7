//! What pods and containers use.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{ContainerId, SandboxId};

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
