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

use super::{Field, Type, Unknown, duration};

const KIND: &str = "KubeletConfiguration";
const GROUP: &str = "kubelet.config.k8s.io/v1beta1";

const BOOL: Field = Field::Supported(Type::Bool);
const INTEGER: Field = Field::Supported(Type::Integer);
const TEXT: Field = Field::Supported(Type::Text);
const DURATION: Field = Field::Supported(Type::Duration);
const TEXTS: Field = Field::Supported(Type::Texts);
const AMOUNTS: Field = Field::Supported(Type::Amounts);
const ADDRESS: Field = Field::Supported(Type::Address);
const PORT: Field = Field::Supported(Type::Port);
const COUNT: Field = Field::Supported(Type::Within(0, 2_147_483_647));
const MODE: Field = Field::Supported(Type::OneOf(&["Webhook", "AlwaysAllow"]));
const LATER: Field = Field::Unsupported;

/// The supported fields that Go holds without a pointer: with them, and with the two intervals that
/// may not be zero, a zero or an empty text means the default. kubeadm writes such zeros.
const ZERO_IS_DEFAULT: [&str; 19] = [
    "address",
    "cgroupRoot",
    "clusterDomain",
    "containerLogMaxSize",
    "containerLogMonitorInterval",
    "cpuCFSQuotaPeriod",
    "fileCheckFrequency",
    "healthzBindAddress",
    "maxPods",
    "nodeLeaseDurationSeconds",
    "nodeStatusReportFrequency",
    "nodeStatusUpdateFrequency",
    "podCIDR",
    "podLogsDir",
    "port",
    "providerID",
    "staticPodPath",
    "tlsCertFile",
    "tlsPrivateKeyFile",
];

/// Every documented field.
const FIELDS: &[(&str, Field)] = &[
    ("address", ADDRESS),
    ("allowedUnsafeSysctls", TEXTS),
    (
        "authentication",
        Field::Object(&[
            ("anonymous", Field::Object(&[("enabled", BOOL)])),
            ("webhook", Field::Object(&[("enabled", BOOL), ("cacheTTL", LATER)])),
            ("x509", Field::Object(&[("clientCAFile", TEXT)])),
        ]),
    ),
    ("authorization", Field::Object(&[("mode", MODE), ("webhook", LATER)])),
    ("cgroupDriver", LATER),
    ("cgroupRoot", Field::Supported(Type::Cgroup)),
    ("cgroupsPerQOS", LATER),
    ("clusterDNS", Field::Supported(Type::Addresses)),
    ("clusterDomain", TEXT),
    ("configMapAndSecretChangeDetectionStrategy", LATER),
    ("containerLogMaxFiles", Field::Supported(Type::Within(2, 1_000_000))),
    ("containerLogMaxSize", Field::Supported(Type::Amount)),
    ("containerLogMaxWorkers", LATER),
    ("containerLogMonitorInterval", Field::Supported(Type::DurationWithin(3_000, u64::MAX))),
    ("containerRuntimeEndpoint", LATER),
    ("contentType", LATER),
    ("cpuCFSQuota", BOOL),
    ("cpuCFSQuotaPeriod", Field::Supported(Type::DurationWithin(1, 1_000))),
    ("cpuManagerPolicy", LATER),
    ("cpuManagerPolicyOptions", LATER),
    ("cpuManagerReconcilePeriod", LATER),
    (
        "crashLoopBackOff",
        Field::Object(&[(
            "maxContainerRestartPeriod",
            Field::Supported(Type::DurationWithin(1_000, 300_000)),
        )]),
    ),
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
    ("healthzBindAddress", ADDRESS),
    ("healthzPort", PORT),
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
    ("kubeReserved", AMOUNTS),
    ("kubeReservedCgroup", LATER),
    ("kubeletCgroups", LATER),
    ("localStorageCapacityIsolation", LATER),
    ("logging", LATER),
    ("makeIPTablesUtilChains", LATER),
    ("maxOpenFiles", LATER),
    ("maxParallelImagePulls", Field::Supported(Type::Within(1, 2_147_483_647))),
    ("maxPods", COUNT),
    ("memoryManagerPolicy", LATER),
    ("memoryReservationPolicy", LATER),
    ("memorySwap", LATER),
    ("memoryThrottlingFactor", LATER),
    ("mergeDefaultEvictionSettings", LATER),
    ("nodeLeaseDurationSeconds", COUNT),
    ("nodeStatusMaxImages", Field::Supported(Type::Within(-1, 2_147_483_647))),
    ("nodeStatusReportFrequency", DURATION),
    ("nodeStatusUpdateFrequency", DURATION),
    ("oomScoreAdj", LATER),
    ("podCIDR", Field::Supported(Type::Range)),
    ("podLogsDir", TEXT),
    ("podPidsLimit", INTEGER),
    ("podsPerCore", LATER),
    ("port", PORT),
    ("preloadedImagesVerificationAllowlist", LATER),
    ("protectKernelDefaults", LATER),
    ("providerID", TEXT),
    ("qosReserved", LATER),
    ("readOnlyPort", LATER),
    ("registerNode", BOOL),
    ("registerWithTaints", Field::Supported(Type::Taints)),
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
    ("systemReserved", AMOUNTS),
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
    /// Sysctls beyond the safe ones that pods may set.
    pub(crate) allowed_unsafe_sysctls: Vec<String>,
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
    /// The most images that the node's status lists; -1 for all.
    pub(crate) node_status_max_images: Option<i32>,
    /// Pod addresses of a node that no control plane gives any.
    #[serde(rename = "podCIDR")]
    pub(crate) pod_cidr: Option<ipnet::IpNet>,
    /// Where pods' logs are.
    pub(crate) pod_logs_dir: Option<PathBuf>,
    /// Processes in a pod at most.
    pub(crate) pod_pids_limit: Option<i64>,
    /// The port of the HTTPS API.
    pub(crate) port: Option<u16>,
    /// What the cloud calls the machine.
    #[serde(rename = "providerID")]
    pub(crate) provider_id: Option<String>,
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

/// The fields without those that are set to what means the default.
fn without_zeros(mut fields: serde_json::Value) -> serde_json::Value {
    use serde_json::Value;
    let is_zero = |value: &Value| match value {
        Value::Number(number) => number.as_i64() == Some(0),
        Value::String(text) => {
            text.is_empty() || duration::parse(text).is_ok_and(|given| given.is_zero())
        }
        _ => false,
    };
    if let Some(all) = fields.as_object_mut() {
        all.retain(|name, value| !(ZERO_IS_DEFAULT.contains(&name.as_str()) && is_zero(value)));
    }
    for nested in [
        "/authentication/x509/clientCAFile",
        "/authorization/mode",
        "/crashLoopBackOff/maxContainerRestartPeriod",
    ] {
        if let Some(value) = fields.pointer_mut(nested)
            && is_zero(value)
        {
            *value = Value::Null;
        }
    }
    fields
}

impl KubeletSettings {
    /// Reads a file; what has no effect is logged as a warning.
    ///
    /// # Errors
    /// When the file can't be read or something in it is wrong.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let checked = super::read(path, KIND, GROUP, FIELDS, Unknown::Refused)?;
        for field in checked.unsupported {
            tracing::warn!(file = %path.display(), "{field}");
        }
        let mut settings: Self = serde_json::from_value(without_zeros(checked.fields.clone()))
            .with_context(|| format!("config file {}", path.display()))?;
        // documented: who sets how often the status is computed sets how often it is reported
        if settings.node_status_report_frequency.is_none() {
            settings.node_status_report_frequency = settings.node_status_update_frequency;
        }
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

    fn read(fields: &str) -> anyhow::Result<KubeletSettings> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.yaml");
        let head = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n";
        std::fs::write(&path, format!("{head}{fields}")).unwrap();
        KubeletSettings::read(&path)
    }

    #[test]
    fn zeros_as_kubeadm_writes_them_mean_the_defaults() {
        let settings = read(
            "authentication:\n  anonymous:\n    enabled: false\n  webhook:\n    cacheTTL: 0s\n    enabled: true\n  \
             x509:\n    clientCAFile: /etc/kubernetes/pki/ca.crt\nauthorization:\n  mode: Webhook\n  webhook:\n    \
             cacheAuthorizedTTL: 0s\n    cacheUnauthorizedTTL: 0s\ncgroupDriver: systemd\nclusterDNS:\n- 10.96.0.10\n\
             clusterDomain: cluster.local\ncontainerRuntimeEndpoint: \"\"\ncpuManagerReconcilePeriod: 0s\n\
             crashLoopBackOff: {}\nevictionPressureTransitionPeriod: 0s\nfileCheckFrequency: 0s\n\
             healthzBindAddress: 127.0.0.1\nhealthzPort: 10248\nhttpCheckFrequency: 0s\nimageMaximumGCAge: 0s\n\
             imageMinimumGCAge: 0s\nlogging:\n  flushFrequency: 0\n  options:\n    json:\n      infoBufferSize: \"0\"\n  \
             verbosity: 0\nmemorySwap: {}\nnodeStatusReportFrequency: 0s\nnodeStatusUpdateFrequency: 0s\n\
             rotateCertificates: true\nruntimeRequestTimeout: 0s\nshutdownGracePeriod: 0s\n\
             shutdownGracePeriodCriticalPods: 0s\nstaticPodPath: /etc/kubernetes/manifests\n\
             streamingConnectionIdleTimeout: 0s\nsyncFrequency: 0s\nvolumeStatsAggPeriod: 0s\n",
        )
        .unwrap();
        assert_eq!(settings.file_check_frequency, None);
        assert_eq!(settings.node_status_update_frequency, None);
        assert_eq!(settings.node_status_report_frequency, None);
        assert_eq!(settings.healthz_port, Some(10248));

        let settings = read(
            "maxPods: 0\nport: 0\naddress: ''\npodCIDR: ''\nnodeLeaseDurationSeconds: 0\n\
             containerLogMonitorInterval: 0s\nhealthzPort: 0\nnodeStatusUpdateFrequency: 20s\n\
             crashLoopBackOff: {maxContainerRestartPeriod: 0s}\n",
        )
        .unwrap();
        assert_eq!((settings.max_pods, settings.port, settings.address), (None, None, None));
        assert_eq!((settings.pod_cidr, settings.node_lease_duration_seconds), (None, None));
        assert_eq!(settings.container_log_monitor_interval, None);
        assert_eq!(settings.crash_loop_back_off.max_container_restart_period, None);
        assert_eq!(settings.healthz_port, Some(0), "documented: no port at all");
        let report = settings.node_status_report_frequency;
        assert_eq!(report, Some(Duration::from_secs(20)), "documented to follow");
    }

    #[test]
    fn wrong_values_are_named_with_field_and_line() {
        let rows = [
            ("port: 99999\n", "line 3: port: a port from 0 to 65535 is wanted, not 99999"),
            ("maxPods: -1\n", "line 3: maxPods: a whole number from 0 to 2147483647"),
            ("address: here\n", "line 3: address: an IP address is wanted, not \"here\""),
            ("clusterDNS: [x]\n", "line 3: clusterDNS: a list of IP addresses is wanted"),
            ("podCIDR: 10.1\n", "line 3: podCIDR: a range of addresses"),
            ("authorization:\n  mode: No\n", "line 4: authorization.mode: Webhook or AlwaysAllow"),
            ("cgroupRoot: /a/../..\n", "line 3: cgroupRoot: the path of a cgroup"),
            ("systemReserved: {cpu: x}\n", "line 3: systemReserved: a map of quantities"),
            ("containerLogMaxFiles: 1\n", "line 3: containerLogMaxFiles: a whole number from 2"),
            ("containerLogMonitorInterval: 1s\n", "a duration of at least 3s is wanted"),
            ("cpuCFSQuotaPeriod: 2s\n", "a duration from 1ms to 1s is wanted"),
            (
                "registerWithTaints: [{key: a, effect: No}]\n",
                "line 3: registerWithTaints: a list of",
            ),
            ("maxPods: 1\nmaxPods: 2\n", "line 4: key \"maxPods\" stands here for a second time"),
        ];
        for (fields, expected) in rows {
            let error = format!("{:#}", read(fields).unwrap_err());
            assert!(error.contains(expected), "{fields}: {error}");
        }
    }

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
