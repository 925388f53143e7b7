//! `KubeProxyConfiguration`, as far as it is supported.
//!
//! The table names every documented field (Kubernetes 1.36, kubeproxy.config.k8s.io/v1alpha1).

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Deserialize;

use super::{Field, Type};

const LATER: Field = Field::Unsupported;
const TEXT: Field = Field::Supported(Type::Text);
const INTEGER: Field = Field::Supported(Type::Integer);

/// Every documented field.
const FIELDS: &[(&str, Field)] = &[
    ("bindAddress", LATER),
    ("bindAddressHardFail", LATER),
    (
        "clientConnection",
        Field::Object(&[
            ("acceptContentTypes", LATER),
            ("burst", LATER),
            ("contentType", LATER),
            ("kubeconfig", TEXT),
            ("qps", LATER),
        ]),
    ),
    ("clusterCIDR", TEXT),
    ("configSyncPeriod", LATER),
    (
        "conntrack",
        Field::Object(&[
            ("maxPerCore", INTEGER),
            ("min", INTEGER),
            ("tcpBeLiberal", Field::Supported(Type::Bool)),
            ("tcpCloseWaitTimeout", Field::Supported(Type::Duration)),
            ("tcpEstablishedTimeout", Field::Supported(Type::Duration)),
            ("udpStreamTimeout", Field::Supported(Type::Duration)),
            ("udpTimeout", Field::Supported(Type::Duration)),
        ]),
    ),
    ("detectLocal", LATER),
    ("detectLocalMode", LATER),
    ("enableProfiling", LATER),
    ("featureGates", LATER),
    ("healthzBindAddress", TEXT),
    ("hostnameOverride", TEXT),
    ("iptables", LATER),
    ("ipvs", LATER),
    ("logging", LATER),
    ("metricsBindAddress", TEXT),
    ("mode", TEXT),
    ("nftables", LATER),
    ("nodePortAddresses", Field::Supported(Type::Texts)),
    ("oomScoreAdj", LATER),
    ("portRange", LATER),
    ("showHiddenMetricsForVersion", LATER),
    ("windowsRunAsService", LATER),
    ("winkernel", LATER),
];

/// The supported fields; an absent one keeps its documented default.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ProxySettings {
    /// How to reach the API server.
    pub(crate) client_connection: ClientConnection,
    /// Addresses of pods: what comes from elsewhere is masqueraded.
    #[serde(rename = "clusterCIDR")]
    pub(crate) cluster_cidr: Option<String>,
    /// The kernel's connection table.
    pub(crate) conntrack: Conntrack,
    /// `IP:port` of `/healthz`.
    pub(crate) healthz_bind_address: Option<String>,
    /// The node's name.
    pub(crate) hostname_override: Option<String>,
    /// `IP:port` of `/metrics`.
    pub(crate) metrics_bind_address: Option<String>,
    /// `nftables`.
    pub(crate) mode: Option<String>,
    /// Ranges of the addresses that answer on node ports.
    pub(crate) node_port_addresses: Option<Vec<String>>,
}

/// `clientConnection`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ClientConnection {
    pub(crate) kubeconfig: Option<PathBuf>,
}

/// `conntrack`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Conntrack {
    pub(crate) max_per_core: Option<u32>,
    pub(crate) min: Option<u32>,
    pub(crate) tcp_be_liberal: Option<bool>,
    pub(crate) tcp_close_wait_timeout: Option<String>,
    pub(crate) tcp_established_timeout: Option<String>,
    pub(crate) udp_stream_timeout: Option<String>,
    pub(crate) udp_timeout: Option<String>,
}

impl ProxySettings {
    /// Reads a file; what has no effect is logged as a warning.
    ///
    /// # Errors
    /// When the file can't be read or something in it is wrong.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let checked = super::read(
            path,
            "KubeProxyConfiguration",
            "kubeproxy.config.k8s.io/v1alpha1",
            FIELDS,
        )?;
        for field in checked.unsupported {
            tracing::warn!(file = %path.display(), "{field}");
        }
        serde_json::from_value(checked.fields)
            .with_context(|| format!("config file {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_usual_config_is_read() {
        let text = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n\
                    mode: nftables\nclusterCIDR: 10.244.0.0/16\nconntrack:\n  tcpEstablishedTimeout: 24h\n";
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.yaml");
        std::fs::write(&path, text).unwrap();
        let settings = ProxySettings::read(&path).unwrap();
        assert_eq!(settings.mode.as_deref(), Some("nftables"));
        assert_eq!(settings.conntrack.tcp_established_timeout.as_deref(), Some("24h"));
    }

    #[test]
    fn the_table_is_sorted_so_that_nothing_stands_twice() {
        assert!(FIELDS.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }
}
