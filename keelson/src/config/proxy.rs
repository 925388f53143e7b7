//! `KubeProxyConfiguration`, as far as it is supported.
//!
//! The table names every documented field (Kubernetes 1.36, kubeproxy.config.k8s.io/v1alpha1).

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::Context;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Field, ProxyFlags, Type, Unknown, Wrong, origin::Origin};

const KIND: &str = "KubeProxyConfiguration";
const GROUP: &str = "kubeproxy.config.k8s.io/v1alpha1";

const BOOL: Field = Field::Supported(Type::Bool);
const DURATION: Field = Field::Supported(Type::Duration);
const COUNT: Field = Field::Supported(Type::Within(0, u32::MAX as i64));
const INTEGER: Field = Field::Supported(Type::Integer);
const TEXT: Field = Field::Supported(Type::Text);
const WATCHES: Field =
    Field::NoEffect("watches are always up to date, and one connection carries all of them");
const WINDOWS: Field = Field::NoEffect("it is for Windows");
const IPVS: Field = Field::NoEffect("there is no ipvs mode; nftables does its work");

/// Every documented field.
const FIELDS: &[(&str, Field)] = &[
    ("bindAddress", TEXT),
    ("bindAddressHardFail", BOOL),
    (
        "clientConnection",
        Field::Object(&[
            ("acceptContentTypes", WATCHES),
            ("burst", WATCHES),
            ("contentType", WATCHES),
            ("kubeconfig", TEXT),
            ("qps", WATCHES),
        ]),
    ),
    ("clusterCIDR", TEXT),
    ("configSyncPeriod", WATCHES),
    (
        "conntrack",
        Field::Object(&[
            ("maxPerCore", COUNT),
            ("min", COUNT),
            ("tcpBeLiberal", BOOL),
            ("tcpCloseWaitTimeout", DURATION),
            ("tcpEstablishedTimeout", DURATION),
            ("udpStreamTimeout", DURATION),
            ("udpTimeout", DURATION),
        ]),
    ),
    ("detectLocal", Field::Object(&[("bridgeInterface", TEXT), ("interfaceNamePrefix", TEXT)])),
    ("detectLocalMode", TEXT),
    ("enableProfiling", Field::NoEffect("there are no Go profiles")),
    ("featureGates", Field::Supported(Type::BoolMap)),
    ("healthzBindAddress", TEXT),
    ("hostnameOverride", TEXT),
    (
        "iptables",
        Field::Object(&[
            ("localhostNodePorts", BOOL),
            ("masqueradeAll", BOOL),
            ("masqueradeBit", INTEGER),
            ("minSyncPeriod", DURATION),
            ("syncPeriod", DURATION),
        ]),
    ),
    (
        "ipvs",
        Field::Object(&[
            ("excludeCIDRs", IPVS),
            ("minSyncPeriod", IPVS),
            ("scheduler", IPVS),
            ("strictARP", IPVS),
            ("syncPeriod", IPVS),
            ("tcpFinTimeout", IPVS),
            ("tcpTimeout", IPVS),
            ("udpTimeout", IPVS),
        ]),
    ),
    ("logging", Field::NoEffect("--v and --logging-format say what is logged")),
    ("metricsBindAddress", TEXT),
    ("mode", TEXT),
    (
        "nftables",
        Field::Object(&[
            ("masqueradeAll", BOOL),
            ("masqueradeBit", INTEGER),
            ("minSyncPeriod", DURATION),
            ("syncPeriod", DURATION),
        ]),
    ),
    ("nodePortAddresses", Field::Supported(Type::Texts)),
    ("oomScoreAdj", Field::Supported(Type::Within(-1000, 1000))),
    ("portRange", Field::NoEffect("node ports are what the Services say")),
    ("showHiddenMetricsForVersion", Field::NoEffect("no metrics are hidden")),
    ("windowsRunAsService", WINDOWS),
    ("winkernel", WINDOWS),
];

/// The supported fields; an absent one keeps its documented default.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ProxySettings {
    /// The node's main address.
    pub(crate) bind_address: Option<String>,
    /// Whether an address that can't be listened on ends the proxy.
    pub(crate) bind_address_hard_fail: Option<bool>,
    /// How to reach the API server.
    pub(crate) client_connection: ClientConnection,
    /// Addresses of pods: what comes from elsewhere is masqueraded.
    #[serde(rename = "clusterCIDR")]
    pub(crate) cluster_cidr: Option<String>,
    /// The kernel's connection table.
    pub(crate) conntrack: Conntrack,
    /// What `detect_local_mode` needs.
    pub(crate) detect_local: DetectLocalNames,
    /// How traffic of pods is told from others'.
    pub(crate) detect_local_mode: Option<String>,
    /// What is switched on beside the documented behaviour.
    pub(crate) feature_gates: BTreeMap<String, bool>,
    /// `IP:port` of `/healthz`.
    pub(crate) healthz_bind_address: Option<String>,
    /// The node's name.
    pub(crate) hostname_override: Option<String>,
    /// Of the iptables mode.
    pub(crate) iptables: PacketFilter,
    /// `IP:port` of `/metrics`.
    pub(crate) metrics_bind_address: Option<String>,
    /// How rules are put into force.
    pub(crate) mode: Option<String>,
    /// Of the nftables mode.
    pub(crate) nftables: PacketFilter,
    /// Ranges of the addresses that answer on node ports.
    pub(crate) node_port_addresses: Option<Vec<String>>,
    /// How unlikely the kernel is to kill the process when memory is short.
    pub(crate) oom_score_adj: Option<i32>,
    /// Where all this comes from.
    #[serde(skip)]
    pub(crate) origin: Origin,
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

/// `detectLocal`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct DetectLocalNames {
    pub(crate) bridge_interface: Option<String>,
    pub(crate) interface_name_prefix: Option<String>,
}

/// `iptables` and `nftables`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct PacketFilter {
    pub(crate) localhost_node_ports: Option<bool>,
    pub(crate) masquerade_all: Option<bool>,
    pub(crate) masquerade_bit: Option<i64>,
    pub(crate) min_sync_period: Option<String>,
    pub(crate) sync_period: Option<String>,
}

impl ProxySettings {
    /// Reads a file, if there is one; flags win over it. What has no effect is logged as a warning.
    ///
    /// # Errors
    /// When the file can't be read or something in it is wrong.
    pub(crate) fn read(path: Option<&Path>, flags: &ProxyFlags) -> anyhow::Result<Self> {
        let mut fields = Value::Object(Map::new());
        let mut origin = Origin::flags(flags.fields());
        if let Some(path) = path {
            let checked = super::read(path, KIND, GROUP, FIELDS, Unknown::Warned)?;
            for field in checked.unsupported {
                tracing::warn!(file = %path.display(), "{field}");
            }
            origin.file(path, checked.text, checked.fields.clone());
            fields = without_nothing(checked.fields);
        }
        for (name, why) in flags.without_effect() {
            tracing::warn!("{name} has no effect: {why}");
        }
        merge(&mut fields, flags.fields());
        let mut settings: Self = serde_json::from_value(fields).with_context(|| match path {
            Some(path) => format!("config file {}", path.display()),
            None => "flags".to_owned(),
        })?;
        settings.origin = origin;
        let blanks = |name: &str| !name.is_empty() && name.trim().is_empty();
        if settings.hostname_override.as_deref().is_some_and(blanks) {
            settings.refuse("hostnameOverride", "a name is wanted, not blanks")?;
        }
        // As kube-proxy has it: an empty name is none, and upper case is lower case.
        settings.hostname_override = settings
            .hostname_override
            .map(|name| name.trim().to_lowercase())
            .filter(|name| !name.is_empty());
        Ok(settings)
    }

    /// Fails with what is wrong with one field, and its place.
    ///
    /// # Errors
    /// Always.
    pub(crate) fn refuse(&self, field: &str, why: &str) -> anyhow::Result<()> {
        let mut wrong = Wrong::default();
        wrong.unless::<()>(field, Err(format!("{field}: {why}")));
        self.origin.check(wrong)
    }
}

/// Without fields that say nothing: absent ones have their defaults. Empty addresses are such too,
/// as with kube-proxy; only a flag can say that nothing is to be served.
fn without_nothing(mut fields: Value) -> Value {
    for address in ["healthzBindAddress", "metricsBindAddress"] {
        if fields[address] == "" {
            fields[address] = Value::Null;
        }
    }
    super::proxy_flags::given(fields)
}

/// Puts the fields of `over` over those of `fields`.
fn merge(fields: &mut Value, over: Value) {
    match (fields, over) {
        (Value::Object(fields), Value::Object(over)) => {
            for (name, value) in over {
                merge(fields.entry(name).or_insert(Value::Null), value);
            }
        }
        (fields, over) => *fields = over,
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
        let flags = ProxyFlags { proxy_mode: Some("iptables".into()), ..ProxyFlags::default() };
        let settings = ProxySettings::read(Some(&path), &flags).unwrap();
        assert_eq!(settings.mode.as_deref(), Some("iptables"), "a flag wins");
        assert_eq!(settings.cluster_cidr.as_deref(), Some("10.244.0.0/16"));
        assert_eq!(settings.conntrack.tcp_established_timeout.as_deref(), Some("24h"));
    }

    #[test]
    fn a_name_of_blanks_is_refused_and_an_empty_one_is_none() {
        let named = |name: &str| {
            let flags = ProxyFlags { hostname_override: Some(name.into()), ..Default::default() };
            Ok::<_, anyhow::Error>(ProxySettings::read(None, &flags)?.hostname_override)
        };
        assert_eq!(named("").unwrap(), None);
        assert_eq!(named(" N1 ").unwrap().as_deref(), Some("n1"));
        assert!(named("  ").unwrap_err().to_string().contains("hostnameOverride"));
    }

    #[test]
    fn the_table_is_sorted_so_that_nothing_stands_twice() {
        assert!(FIELDS.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }

    /// What kubeadm's ConfigMap has when nobody has asked for anything.
    #[test]
    fn a_config_of_all_fields_that_say_nothing_is_that_of_the_defaults() {
        let text = "kind: KubeProxyConfiguration\napiVersion: kubeproxy.config.k8s.io/v1alpha1\n\
            bindAddress: 0.0.0.0\nbindAddressHardFail: false\n\
            clientConnection: {acceptContentTypes: '', burst: 0, contentType: '', qps: 0,\n  \
            kubeconfig: /var/lib/kube-proxy/kubeconfig.conf}\n\
            clusterCIDR: 10.244.0.0/16\nconfigSyncPeriod: 0s\n\
            conntrack: {maxPerCore: null, min: null, tcpBeLiberal: false, tcpCloseWaitTimeout: null,\n  \
            tcpEstablishedTimeout: null, udpStreamTimeout: 0s, udpTimeout: 0s}\n\
            detectLocal: {bridgeInterface: '', interfaceNamePrefix: ''}\ndetectLocalMode: ''\n\
            enableProfiling: false\nhealthzBindAddress: ''\nhostnameOverride: ''\n\
            iptables: {localhostNodePorts: null, masqueradeAll: false, masqueradeBit: null,\n  \
            minSyncPeriod: 0s, syncPeriod: 0s}\n\
            ipvs: {excludeCIDRs: null, minSyncPeriod: 0s, scheduler: '', strictARP: false,\n  \
            syncPeriod: 0s, tcpFinTimeout: 0s, tcpTimeout: 0s, udpTimeout: 0s}\n\
            logging: {flushFrequency: 0, options: {json: {infoBufferSize: '0'}}, verbosity: 0}\n\
            metricsBindAddress: ''\nmode: ''\n\
            nftables: {masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s, syncPeriod: 0s}\n\
            nodePortAddresses: null\noomScoreAdj: null\nportRange: ''\n\
            showHiddenMetricsForVersion: ''\nwinkernel: {enableDSR: false, networkName: ''}\n";
        let checked =
            crate::config::check(text.as_bytes(), KIND, GROUP, FIELDS, Unknown::Warned).unwrap();
        assert_eq!(checked.unsupported, [""; 0], "nothing to be warned about");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.conf");
        std::fs::write(&path, text).unwrap();
        let settings = ProxySettings::read(Some(&path), &ProxyFlags::default()).unwrap();
        let config = |settings: &ProxySettings| {
            let cidr = "10.244.0.0/16".parse().unwrap();
            crate::proxy::config(settings, "n", Vec::new(), Some(cidr)).unwrap()
        };
        assert_eq!(config(&settings), config(&ProxySettings::default()));
        assert_eq!(settings.hostname_override, None);
        let none = ProxyFlags { metrics_bind_address: Some(String::new()), ..Default::default() };
        let settings = ProxySettings::read(Some(&path), &none).unwrap();
        assert_eq!(config(&settings).metrics_bind_address, None, "a flag switches it off");
    }
}
