//! `KubeletConfiguration`, as far as it is supported.
//!
//! The table names every documented field (Kubernetes 1.36, kubelet.config.k8s.io/v1beta1).

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use k8s_openapi::api::core::v1::Taint;
use serde::{Deserialize, Deserializer};

use super::{Field, Type, duration};

const BOOL: Field = Field::Supported(Type::Bool);
const INTEGER: Field = Field::Supported(Type::Integer);
const TEXT: Field = Field::Supported(Type::Text);
const DURATION: Field = Field::Supported(Type::Duration);
const TEXTS: Field = Field::Supported(Type::Texts);
const TEXT_MAP: Field = Field::Supported(Type::TextMap);
const LATER: Field = Field::Unsupported;

/// Every documented field.
const FIELDS: &[(&str, Field)] = &[
    ("address", TEXT),
    ("allowedUnsafeSysctls", LATER),
    (
        "authentication",
        Field::Object(&[
            ("anonymous", Field::Object(&[("enabled", BOOL)])),
            ("webhook", Field::Object(&[("enabled", BOOL), ("cacheTTL", LATER)])),
            ("x509", Field::Object(&[("clientCAFile", TEXT)])),
        ]),
    ),
    ("authorization", Field::Object(&[("mode", TEXT), ("webhook", LATER)])),
    ("cgroupDriver", LATER),
    ("cgroupRoot", TEXT),
    ("cgroupsPerQOS", LATER),
    ("clusterDNS", TEXTS),
    ("clusterDomain", TEXT),
    ("configMapAndSecretChangeDetectionStrategy", LATER),
    ("containerLogMaxFiles", INTEGER),
    ("containerLogMaxSize", TEXT),
    ("containerLogMaxWorkers", LATER),
    ("containerLogMonitorInterval", DURATION),
    ("containerRuntimeEndpoint", LATER),
    ("contentType", LATER),
    ("cpuCFSQuota", BOOL),
    ("cpuCFSQuotaPeriod", DURATION),
    ("cpuManagerPolicy", LATER),
    ("cpuManagerPolicyOptions", LATER),
    ("cpuManagerReconcilePeriod", LATER),
    ("crashLoopBackOff", Field::Object(&[("maxContainerRestartPeriod", DURATION)])),
    ("enableContentionProfiling", LATER),
    ("enableControllerAttachDetach", LATER),
    ("enableDebugFlagsHandler", LATER),
    ("enableDebuggingHandlers", BOOL),
    ("enableProfilingHandler", LATER),
    ("enableServer", BOOL),
    ("enableSystemLogHandler", LATER),
    ("enableSystemLogQuery", LATER),
    ("enforceNodeAllocatable", LATER),
    ("eventBurst", LATER),
    ("eventRecordQPS", LATER),
    ("evictionHard", LATER),
    ("evictionMaxPodGracePeriod", LATER),
    ("evictionMinimumReclaim", LATER),
    ("evictionPressureTransitionPeriod", LATER),
    ("evictionSoft", LATER),
    ("evictionSoftGracePeriod", LATER),
    ("failCgroupV1", BOOL),
    ("failSwapOn", LATER),
    ("featureGates", LATER),
    ("fileCheckFrequency", DURATION),
    ("hairpinMode", LATER),
    ("healthzBindAddress", TEXT),
    ("healthzPort", INTEGER),
    ("httpCheckFrequency", LATER),
    ("imageGCHighThresholdPercent", LATER),
    ("imageGCLowThresholdPercent", LATER),
    ("imageMaximumGCAge", LATER),
    ("imageMinimumGCAge", LATER),
    ("imagePullCredentialsVerificationPolicy", LATER),
    ("imageServiceEndpoint", LATER),
    ("iptablesDropBit", LATER),
    ("iptablesMasqueradeBit", LATER),
    ("kernelMemcgNotification", LATER),
    ("kubeAPIBurst", LATER),
    ("kubeAPIQPS", LATER),
    ("kubeReserved", TEXT_MAP),
    ("kubeReservedCgroup", LATER),
    ("kubeletCgroups", LATER),
    ("localStorageCapacityIsolation", LATER),
    ("logging", LATER),
    ("makeIPTablesUtilChains", LATER),
    ("maxOpenFiles", LATER),
    ("maxParallelImagePulls", INTEGER),
    ("maxPods", INTEGER),
    ("memoryManagerPolicy", LATER),
    ("memoryReservationPolicy", LATER),
    ("memorySwap", LATER),
    ("memoryThrottlingFactor", LATER),
    ("mergeDefaultEvictionSettings", LATER),
    ("nodeLeaseDurationSeconds", INTEGER),
    ("nodeStatusMaxImages", LATER),
    ("nodeStatusReportFrequency", DURATION),
    ("nodeStatusUpdateFrequency", DURATION),
    ("oomScoreAdj", LATER),
    ("podCIDR", TEXT),
    ("podLogsDir", TEXT),
    ("podPidsLimit", INTEGER),
    ("podsPerCore", LATER),
    ("port", INTEGER),
    ("preloadedImagesVerificationAllowlist", LATER),
    ("protectKernelDefaults", LATER),
    ("providerID", LATER),
    ("qosReserved", LATER),
    ("readOnlyPort", LATER),
    ("registerNode", BOOL),
    ("registerWithTaints", Field::Supported(Type::Objects)),
    ("registryBurst", LATER),
    ("registryPullQPS", LATER),
    ("reservedMemory", LATER),
    ("reservedSystemCPUs", LATER),
    ("resolvConf", TEXT),
    ("rotateCertificates", LATER),
    ("runOnce", LATER),
    ("runtimeRequestTimeout", LATER),
    ("seccompDefault", BOOL),
    ("serializeImagePulls", BOOL),
    ("serverTLSBootstrap", LATER),
    ("showHiddenMetricsForVersion", LATER),
    ("shutdownGracePeriod", LATER),
    ("shutdownGracePeriodByPodPriority", LATER),
    ("shutdownGracePeriodCriticalPods", LATER),
    ("singleProcessOOMKill", LATER),
    ("staticPodPath", TEXT),
    ("staticPodURL", LATER),
    ("staticPodURLHeader", LATER),
    ("streamingConnectionIdleTimeout", LATER),
    ("syncFrequency", LATER),
    ("systemCgroups", LATER),
    ("systemReserved", TEXT_MAP),
    ("systemReservedCgroup", LATER),
    ("tlsCertFile", TEXT),
    ("tlsCipherSuites", LATER),
    ("tlsCurvePreferences", LATER),
    ("tlsMinVersion", LATER),
    ("tlsPrivateKeyFile", TEXT),
    ("topologyManagerPolicy", LATER),
    ("topologyManagerPolicyOptions", LATER),
    ("topologyManagerScope", LATER),
    ("tracing", LATER),
    ("userNamespaces", LATER),
    ("volumePluginDir", LATER),
    ("volumeStatsAggPeriod", LATER),
];

/// The supported fields; an absent one keeps its documented default, which whoever uses it knows.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct KubeletSettings {
    /// The fields as they were read.
    #[serde(skip)]
    read: serde_json::Value,
    /// Where the kubelet's HTTPS API listens.
    pub(crate) address: Option<IpAddr>,
    /// Who may use it.
    pub(crate) authentication: Authentication,
    /// `Webhook` or `AlwaysAllow`.
    pub(crate) authorization: Authorization,
    /// The cgroup below which all pods' are.
    pub(crate) cgroup_root: Option<String>,
    #[serde(rename = "clusterDNS")]
    /// What pods have in `resolv.conf`.
    pub(crate) cluster_dns: Option<Vec<IpAddr>>,
    /// The domain of the cluster's names.
    pub(crate) cluster_domain: Option<String>,
    /// Log files kept for a container.
    pub(crate) container_log_max_files: Option<u32>,
    /// A quantity: the size at which a log is rotated.
    pub(crate) container_log_max_size: Option<String>,
    /// How often logs are looked at.
    #[serde(deserialize_with = "go_duration")]
    pub(crate) container_log_monitor_interval: Option<Duration>,
    /// Whether CPU limits are enforced.
    #[serde(rename = "cpuCFSQuota")]
    pub(crate) cpu_cfs_quota: Option<bool>,
    /// The period that CPU limits count in.
    #[serde(rename = "cpuCFSQuotaPeriod", deserialize_with = "go_duration")]
    pub(crate) cpu_cfs_quota_period: Option<Duration>,
    /// The longest wait between restarts.
    pub(crate) crash_loop_back_off: CrashLoopBackOff,
    /// Whether exec, attach, logs and port-forward are served.
    pub(crate) enable_debugging_handlers: Option<bool>,
    /// Whether the HTTPS API is served at all.
    pub(crate) enable_server: Option<bool>,
    /// Refuse to start on cgroup v1.
    #[serde(rename = "failCgroupV1")]
    pub(crate) fail_cgroup_v1: Option<bool>,
    /// How often the manifest folder is read without a change being seen.
    #[serde(deserialize_with = "go_duration")]
    pub(crate) file_check_frequency: Option<Duration>,
    /// Where `/healthz` listens.
    pub(crate) healthz_bind_address: Option<IpAddr>,
    /// Its port; 0 for none.
    pub(crate) healthz_port: Option<u16>,
    /// Kept for Kubernetes' own processes.
    pub(crate) kube_reserved: BTreeMap<String, String>,
    /// Pulls at the same time.
    pub(crate) max_parallel_image_pulls: Option<u32>,
    /// Pods on this node at most.
    pub(crate) max_pods: Option<u32>,
    /// Seconds that a lease is good for.
    pub(crate) node_lease_duration_seconds: Option<u32>,
    /// How often an unchanged status is reported.
    #[serde(deserialize_with = "go_duration")]
    pub(crate) node_status_report_frequency: Option<Duration>,
    /// How often the status is computed.
    #[serde(deserialize_with = "go_duration")]
    pub(crate) node_status_update_frequency: Option<Duration>,
    /// Pod addresses of a node that no control plane gives any.
    #[serde(rename = "podCIDR")]
    pub(crate) pod_cidr: Option<ipnet::IpNet>,
    /// Where pods' logs are.
    pub(crate) pod_logs_dir: Option<PathBuf>,
    /// Processes in a pod at most.
    pub(crate) pod_pids_limit: Option<i64>,
    /// The port of the HTTPS API.
    pub(crate) port: Option<u16>,
    /// Whether the node makes its own Node object.
    pub(crate) register_node: Option<bool>,
    /// The taints it makes it with.
    pub(crate) register_with_taints: Vec<Taint>,
    /// What `dnsPolicy: Default` copies.
    pub(crate) resolv_conf: Option<String>,
    /// `RuntimeDefault` for pods that say nothing of seccomp.
    pub(crate) seccomp_default: Option<bool>,
    /// One pull at a time.
    pub(crate) serialize_image_pulls: Option<bool>,
    /// The folder of static pods.
    pub(crate) static_pod_path: Option<PathBuf>,
    /// Kept for the system.
    pub(crate) system_reserved: BTreeMap<String, String>,
    /// The HTTPS API's certificate.
    pub(crate) tls_cert_file: Option<PathBuf>,
    /// And its key.
    pub(crate) tls_private_key_file: Option<PathBuf>,
}

/// `authentication`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Authentication {
    pub(crate) anonymous: Switch,
    pub(crate) webhook: Switch,
    pub(crate) x509: X509,
}

/// Something that is on or off.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Switch {
    pub(crate) enabled: Option<bool>,
}

/// `authentication.x509`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct X509 {
    #[serde(rename = "clientCAFile")]
    pub(crate) client_ca_file: Option<PathBuf>,
}

/// `authorization`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Authorization {
    pub(crate) mode: Option<String>,
}

/// `crashLoopBackOff`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct CrashLoopBackOff {
    #[serde(deserialize_with = "go_duration")]
    pub(crate) max_container_restart_period: Option<Duration>,
}

fn go_duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    text.map(|text| duration::parse(&text)).transpose().map_err(serde::de::Error::custom)
}

impl KubeletSettings {
    /// Reads a file; what has no effect is logged as a warning.
    ///
    /// # Errors
    /// When the file can't be read or something in it is wrong.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let checked =
            super::read(path, "KubeletConfiguration", "kubelet.config.k8s.io/v1beta1", FIELDS)?;
        for field in checked.unsupported {
            tracing::warn!(file = %path.display(), "{field}");
        }
        let mut settings: Self = serde_json::from_value(checked.fields.clone())
            .with_context(|| format!("config file {}", path.display()))?;
        settings.read = checked.fields;
        Ok(settings)
    }

    /// What `/configz` shows: the fields that were given, with kind and version.
    pub(crate) fn shown(&self) -> serde_json::Value {
        let mut shown = serde_json::json!({
            "kind": "KubeletConfiguration",
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
        });
        for (name, value) in self.read.as_object().into_iter().flatten() {
            shown[name] = value.clone();
        }
        shown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_usual_config_is_read() {
        let text = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n\
                    staticPodPath: /etc/kubernetes/manifests\nclusterDNS: [10.96.0.10]\n\
                    authentication:\n  anonymous: {enabled: false}\n  x509:\n    clientCAFile: /etc/kubernetes/pki/ca.crt\n\
                    nodeStatusUpdateFrequency: 10s\nmaxPods: 50\ncgroupDriver: systemd\n\
                    registerWithTaints: [{key: a, effect: NoSchedule}]\n";
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.yaml");
        std::fs::write(&path, text).unwrap();
        let settings = KubeletSettings::read(&path).unwrap();
        assert_eq!(settings.max_pods, Some(50));
        assert_eq!(settings.node_status_update_frequency, Some(Duration::from_secs(10)));
        assert_eq!(settings.register_with_taints[0].effect, "NoSchedule");
        assert_eq!(settings.cluster_dns.unwrap().len(), 1);
    }

    #[test]
    fn the_table_is_sorted_so_that_nothing_stands_twice() {
        assert!(FIELDS.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }
}
