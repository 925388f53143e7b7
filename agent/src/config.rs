//! What the agent is told: the fields of KubeletConfiguration that it honours, and the node's names.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, time::Duration};

use k8s_openapi::api::core::v1::Taint;

/// The agent's configuration.
///
/// [`AgentConfig::new`] has Kubernetes' documented defaults.
#[derive(Clone, Debug, PartialEq)]
pub struct AgentConfig {
    /// The node's name in the API.
    pub node_name: String,
    /// The machine's host name, the node's `Hostname` address.
    pub hostname: String,
    /// The node's addresses, the primary one first.
    pub node_ips: Vec<IpAddr>,
    /// Where the agent keeps its files, `/var/lib/kubelet`.
    pub root_dir: PathBuf,
    /// Where container logs are, `/var/log/pods` (`podLogsDir`).
    pub pod_logs_dir: PathBuf,
    /// Where links to container logs are, `/var/log/containers`.
    pub container_logs_dir: PathBuf,
    /// The folder of static pods (`staticPodPath`); none if absent.
    pub static_pod_path: Option<PathBuf>,
    /// How often that folder is read although nothing was noticed (`fileCheckFrequency`).
    pub file_check_frequency: Duration,
    /// The largest manifest file in bytes.
    pub max_manifest_bytes: u64,
    /// Name servers of pods with the policy `ClusterFirst` (`clusterDNS`).
    pub cluster_dns: Vec<IpAddr>,
    /// The cluster's DNS domain (`clusterDomain`); empty for none.
    pub cluster_domain: String,
    /// The node's own resolver configuration (`resolvConf`); none for an empty one.
    pub resolv_conf: Option<PathBuf>,
    /// The most pods that run here (`maxPods`).
    pub max_pods: u32,
    /// The most processes in each pod (`podPidsLimit`); no limit if absent.
    pub pod_pids_limit: Option<i64>,
    /// Whether CPU limits are enforced (`cpuCFSQuota`).
    pub cpu_cfs_quota: bool,
    /// The period of CPU limits (`cpuCFSQuotaPeriod`).
    pub cpu_cfs_quota_period: Duration,
    /// `RuntimeDefault` for containers that say nothing about seccomp (`seccompDefault`).
    pub seccomp_default: bool,
    /// The most images pulled at once: 1 for `serializeImagePulls`, else `maxParallelImagePulls`.
    pub max_parallel_image_pulls: usize,
    /// The largest container log in bytes before it is rotated (`containerLogMaxSize`).
    pub container_log_max_size: u64,
    /// The most log files of a container (`containerLogMaxFiles`), at least 2.
    pub container_log_max_files: u32,
    /// How often logs are looked at (`containerLogMonitorInterval`).
    pub container_log_monitor_interval: Duration,
    /// The longest wait of `CrashLoopBackOff` (`crashLoopBackOff.maxContainerRestartPeriod`).
    pub max_container_restart_period: Duration,
    /// Sysctls beyond the safe ones that pods may set, `*` at the end as a wildcard
    /// (`allowedUnsafeSysctls`).
    pub allowed_unsafe_sysctls: Vec<String>,
    /// How the node presents itself.
    pub node: NodeConfig,
}

/// How the node presents itself in the API.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeConfig {
    /// Make the Node object if it is not there (`registerNode`).
    pub register: bool,
    /// Labels given to the Node.
    pub labels: BTreeMap<String, String>,
    /// Taints of a Node that is made anew (`registerWithTaints`).
    pub taints: Vec<Taint>,
    /// `spec.providerID`.
    pub provider_id: Option<String>,
    /// The pods' range, if the API server's Node has none (`podCIDR`).
    pub pod_cidr: Option<String>,
    /// How long the lease is good for without being renewed (`nodeLeaseDurationSeconds`); renewed
    /// every quarter of it.
    pub lease_duration: Duration,
    /// How often the status is computed (`nodeStatusUpdateFrequency`).
    pub status_update_frequency: Duration,
    /// How often it is written although nothing changed (`nodeStatusReportFrequency`).
    pub status_report_frequency: Duration,
    /// The most images listed (`nodeStatusMaxImages`); -1 for all.
    pub max_images: i32,
    /// Resources kept for the system, as quantities (`systemReserved` and `kubeReserved` together).
    pub reserved: BTreeMap<String, String>,
    /// The port of the kubelet API, for `status.daemonEndpoints`.
    pub port: u16,
}

impl AgentConfig {
    /// The defaults for a node of this name.
    pub fn new(node_name: impl Into<String>, node_ips: Vec<IpAddr>) -> Self {
        let node_name = node_name.into();
        Self {
            hostname: node_name.clone(),
            node_name,
            node_ips,
            root_dir: "/var/lib/kubelet".into(),
            pod_logs_dir: "/var/log/pods".into(),
            container_logs_dir: "/var/log/containers".into(),
            static_pod_path: None,
            file_check_frequency: Duration::from_secs(20),
            max_manifest_bytes: 10 * 1024 * 1024,
            cluster_dns: Vec::new(),
            cluster_domain: "cluster.local".to_owned(),
            resolv_conf: Some("/etc/resolv.conf".into()),
            max_pods: 110,
            pod_pids_limit: None,
            cpu_cfs_quota: true,
            cpu_cfs_quota_period: Duration::from_millis(100),
            seccomp_default: false,
            max_parallel_image_pulls: 1,
            container_log_max_size: 10 * 1024 * 1024,
            container_log_max_files: 5,
            container_log_monitor_interval: Duration::from_secs(10),
            max_container_restart_period: Duration::from_secs(300),
            allowed_unsafe_sysctls: Vec::new(),
            node: NodeConfig::default(),
        }
    }
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            register: true,
            labels: BTreeMap::new(),
            taints: Vec::new(),
            provider_id: None,
            pod_cidr: None,
            lease_duration: Duration::from_secs(40),
            status_update_frequency: Duration::from_secs(10),
            status_report_frequency: Duration::from_secs(300),
            max_images: 50,
            reserved: BTreeMap::new(),
            port: 10250,
        }
    }
}
