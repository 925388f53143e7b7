//! kube-proxy's flags, under its names. Each stands for a field of the config file.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use clap::Args;
use serde_json::{Map, Value, json};

use super::duration;

/// What kube-proxy takes as flags; a flag wins over the config file.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "As kube-proxy (a flag wins over the config file)")]
pub(crate) struct ProxyFlags {
    /// The node's main address, whose family must be served
    #[arg(long, value_name = "IP")]
    pub(crate) bind_address: Option<String>,
    /// End when a port for health or metrics is taken
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub(crate) bind_address_hard_fail: Option<bool>,
    /// Ranges of pods, one for each family, with commas between them
    #[arg(long, value_name = "CIDR")]
    pub(crate) cluster_cidr: Option<String>,
    /// No effect
    #[arg(long, hide = true, value_name = "FILE")]
    pub(crate) boot_id_file: Option<String>,
    /// No effect: watches are always up to date
    #[arg(long, hide = true, value_name = "DURATION")]
    pub(crate) config_sync_period: Option<String>,
    /// Connections that the kernel tracks for each CPU core; 0 leaves its limit
    #[arg(long, value_name = "N")]
    pub(crate) conntrack_max_per_core: Option<u32>,
    /// Connections that the kernel tracks at the least
    #[arg(long, value_name = "N")]
    pub(crate) conntrack_min: Option<u32>,
    /// Take TCP packets outside the window for valid
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub(crate) conntrack_tcp_be_liberal: Option<bool>,
    /// How long the kernel remembers TCP connections in CLOSE_WAIT
    #[arg(long, value_name = "DURATION", value_parser = duration_text)]
    pub(crate) conntrack_tcp_timeout_close_wait: Option<String>,
    /// How long the kernel remembers idle TCP connections; 0 leaves its setting
    #[arg(long, value_name = "DURATION", value_parser = duration_text)]
    pub(crate) conntrack_tcp_timeout_established: Option<String>,
    /// How long the kernel remembers unanswered UDP flows
    #[arg(long, value_name = "DURATION", value_parser = duration_text)]
    pub(crate) conntrack_udp_timeout: Option<String>,
    /// How long the kernel remembers answered UDP flows
    #[arg(long, value_name = "DURATION", value_parser = duration_text)]
    pub(crate) conntrack_udp_timeout_stream: Option<String>,
    /// How pods' traffic is told from others': ClusterCIDR, NodeCIDR, BridgeInterface or
    /// InterfaceNamePrefix
    #[arg(long, value_name = "MODE")]
    pub(crate) detect_local_mode: Option<String>,
    /// Switches: NAME=true or NAME=false, with commas between them
    #[arg(long, value_name = "NAME=BOOL,…", value_parser = gates)]
    pub(crate) feature_gates: Option<Gates>,
    /// Where /healthz and /livez are served; empty for nowhere
    #[arg(long, value_name = "IP:PORT")]
    pub(crate) healthz_bind_address: Option<String>,
    /// The port of --healthz-bind-address; 0 for nowhere (deprecated)
    #[arg(long, hide = true, value_name = "PORT")]
    pub(crate) healthz_port: Option<u16>,
    /// The node's name; this machine's host name if absent
    #[arg(long, value_name = "NAME")]
    pub(crate) hostname_override: Option<String>,
    /// Node ports on loopback too (iptables mode, IPv4)
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub(crate) iptables_localhost_nodeports: Option<bool>,
    /// The bit of the packet mark that says "masquerade"
    #[arg(long, value_name = "BIT")]
    pub(crate) iptables_masquerade_bit: Option<u8>,
    /// The shortest time between two changes of the rules
    #[arg(long, value_name = "DURATION", value_parser = duration_text)]
    pub(crate) iptables_min_sync_period: Option<String>,
    /// How often rules are looked after; more than 0
    #[arg(long, value_name = "DURATION", value_parser = positive)]
    pub(crate) iptables_sync_period: Option<String>,
    #[command(flatten)]
    pub(crate) ipvs: IpvsFlags,
    /// No effect
    #[arg(long, hide = true, value_name = "N")]
    pub(crate) kube_api_burst: Option<i32>,
    /// No effect
    #[arg(long, hide = true, value_name = "TYPE")]
    pub(crate) kube_api_content_type: Option<String>,
    /// No effect
    #[arg(long, hide = true, value_name = "N")]
    pub(crate) kube_api_qps: Option<f32>,
    /// No effect
    #[arg(long, hide = true, value_name = "FILE")]
    pub(crate) machine_id_file: Option<String>,
    /// Masquerade everything that is sent to a cluster address
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub(crate) masquerade_all: Option<bool>,
    /// Where /metrics, /proxyMode and /configz are served; empty for nowhere
    #[arg(long, value_name = "IP:PORT")]
    pub(crate) metrics_bind_address: Option<String>,
    /// The port of --metrics-bind-address; 0 for nowhere (deprecated)
    #[arg(long, hide = true, value_name = "PORT")]
    pub(crate) metrics_port: Option<u16>,
    /// Which addresses of the node answer on node ports: ranges with commas between them, or
    /// primary
    #[arg(long, value_name = "CIDR,…", value_delimiter = ',')]
    pub(crate) nodeport_addresses: Option<Vec<String>>,
    /// How unlikely the kernel is to kill the process when memory is short, from -1000 to 1000
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) oom_score_adj: Option<i32>,
    /// The bridge that pods are behind (for BridgeInterface)
    #[arg(long, value_name = "NAME")]
    pub(crate) pod_bridge_interface: Option<String>,
    /// How names of pods' interfaces begin (for InterfaceNamePrefix)
    #[arg(long, value_name = "PREFIX")]
    pub(crate) pod_interface_name_prefix: Option<String>,
    /// No effect
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub(crate) profiling: Option<bool>,
    /// How rules are put into force: nftables, iptables or userspace
    #[arg(long, value_name = "MODE")]
    pub(crate) proxy_mode: Option<String>,
    /// No effect
    #[arg(long, hide = true, value_name = "VERSION")]
    pub(crate) show_hidden_metrics_for_version: Option<String>,
}

/// Flags of the ipvs mode, which is not here.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct IpvsFlags {
    /// No effect
    #[arg(long, hide = true, value_name = "CIDR,…")]
    ipvs_exclude_cidrs: Option<String>,
    /// No effect
    #[arg(long, hide = true, value_name = "DURATION")]
    ipvs_min_sync_period: Option<String>,
    /// No effect
    #[arg(long, hide = true, value_name = "NAME")]
    ipvs_scheduler: Option<String>,
    /// No effect
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    ipvs_strict_arp: Option<bool>,
    /// No effect
    #[arg(long, hide = true, value_name = "DURATION")]
    ipvs_sync_period: Option<String>,
    /// No effect
    #[arg(long, hide = true, value_name = "DURATION")]
    ipvs_tcp_timeout: Option<String>,
    /// No effect
    #[arg(long, hide = true, value_name = "DURATION")]
    ipvs_tcpfin_timeout: Option<String>,
    /// No effect
    #[arg(long, hide = true, value_name = "DURATION")]
    ipvs_udp_timeout: Option<String>,
}

/// Switches and whether they are on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Gates(Vec<(String, bool)>);

fn gates(text: &str) -> Result<Gates, String> {
    let each = text.split(',').map(|one| {
        let (name, value) =
            one.trim().split_once('=').ok_or_else(|| format!("{one:?}: NAME=true is wanted"))?;
        let value = value.parse().map_err(|_| format!("{one:?}: true or false is wanted"))?;
        Ok((name.to_owned(), value))
    });
    each.collect::<Result<_, String>>().map(Gates)
}

fn duration_text(text: &str) -> Result<String, String> {
    duration::parse(text).map(|_| text.to_owned())
}

fn positive(text: &str) -> Result<String, String> {
    match duration::parse(text)? {
        Duration::ZERO => Err("more than 0 is wanted".to_owned()),
        _ => Ok(text.to_owned()),
    }
}

impl ProxyFlags {
    /// Flags that were given and do nothing, and why.
    pub(crate) fn without_effect(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        const WATCHES: &str = "watches are always up to date, and one connection carries them";
        const IPVS: &str = "there is no ipvs mode; nftables does its work";
        const MACHINE: &str = "nothing is told by the machine's id";
        let ipvs = &self.ipvs;
        [
            ("--boot-id-file", self.boot_id_file.is_some(), MACHINE),
            ("--config-sync-period", self.config_sync_period.is_some(), WATCHES),
            ("--ipvs-exclude-cidrs", ipvs.ipvs_exclude_cidrs.is_some(), IPVS),
            ("--ipvs-min-sync-period", ipvs.ipvs_min_sync_period.is_some(), IPVS),
            ("--ipvs-scheduler", ipvs.ipvs_scheduler.is_some(), IPVS),
            ("--ipvs-strict-arp", ipvs.ipvs_strict_arp.is_some(), IPVS),
            ("--ipvs-sync-period", ipvs.ipvs_sync_period.is_some(), IPVS),
            ("--ipvs-tcp-timeout", ipvs.ipvs_tcp_timeout.is_some(), IPVS),
            ("--ipvs-tcpfin-timeout", ipvs.ipvs_tcpfin_timeout.is_some(), IPVS),
            ("--ipvs-udp-timeout", ipvs.ipvs_udp_timeout.is_some(), IPVS),
            ("--kube-api-burst", self.kube_api_burst.is_some(), WATCHES),
            ("--kube-api-content-type", self.kube_api_content_type.is_some(), WATCHES),
            ("--kube-api-qps", self.kube_api_qps.is_some(), WATCHES),
            ("--machine-id-file", self.machine_id_file.is_some(), MACHINE),
            ("--profiling", self.profiling == Some(true), "there are no Go profiles; use perf"),
            (
                "--show-hidden-metrics-for-version",
                self.show_hidden_metrics_for_version.is_some(),
                "no metrics are hidden",
            ),
        ]
        .into_iter()
        .filter(|(_, given, _)| *given)
        .map(|(name, _, why)| (name, why))
    }

    /// The fields of the config file that the given flags stand for. kube-proxy has no flags of the
    /// nftables mode: those of iptables count there too.
    pub(crate) fn fields(&self) -> Value {
        let filter = json!({
            "localhostNodePorts": self.iptables_localhost_nodeports,
            "masqueradeAll": self.masquerade_all,
            "masqueradeBit": self.iptables_masquerade_bit,
            "minSyncPeriod": self.iptables_min_sync_period,
            "syncPeriod": self.iptables_sync_period,
        });
        let gates: Option<Map<String, Value>> = self
            .feature_gates
            .as_ref()
            .map(|gates| gates.0.iter().map(|(name, on)| (name.clone(), (*on).into())).collect());
        given(json!({
            "bindAddress": self.bind_address,
            "bindAddressHardFail": self.bind_address_hard_fail,
            "clusterCIDR": self.cluster_cidr,
            "conntrack": {
                "maxPerCore": self.conntrack_max_per_core,
                "min": self.conntrack_min,
                "tcpBeLiberal": self.conntrack_tcp_be_liberal,
                "tcpCloseWaitTimeout": self.conntrack_tcp_timeout_close_wait,
                "tcpEstablishedTimeout": self.conntrack_tcp_timeout_established,
                "udpTimeout": self.conntrack_udp_timeout,
                "udpStreamTimeout": self.conntrack_udp_timeout_stream,
            },
            "detectLocal": {
                "bridgeInterface": self.pod_bridge_interface,
                "interfaceNamePrefix": self.pod_interface_name_prefix,
            },
            "detectLocalMode": self.detect_local_mode,
            "featureGates": gates,
            "healthzBindAddress": at_port(&self.healthz_bind_address, self.healthz_port, "0.0.0.0"),
            "hostnameOverride": self.hostname_override,
            "iptables": filter,
            "nftables": filter,
            "metricsBindAddress": at_port(&self.metrics_bind_address, self.metrics_port, "127.0.0.1"),
            "mode": self.proxy_mode,
            "nodePortAddresses": self.nodeport_addresses.as_ref().map(|all| {
                all.iter().filter(|range| !range.is_empty()).collect::<Vec<_>>()
            }),
            "oomScoreAdj": self.oom_score_adj,
        }))
    }
}

/// An address to serve at, with the port of the deprecated flag unless it has one of its own.
fn at_port(address: &Option<String>, port: Option<u16>, usual: &str) -> Option<String> {
    let Some(port) = port else { return address.clone() };
    if port == 0 {
        return Some(String::new());
    }
    let address = address.as_deref().unwrap_or(usual);
    Some(match address.parse::<IpAddr>() {
        Ok(address) => SocketAddr::new(address, port).to_string(),
        Err(_) => address.to_owned(),
    })
}

/// Without the fields that are null.
pub(super) fn given(value: Value) -> Value {
    match value {
        Value::Object(fields) => fields
            .into_iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(name, value)| (name, given(value)))
            .collect(),
        value => value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_given_stands_for_a_field() {
        let flags = ProxyFlags {
            masquerade_all: Some(true),
            feature_gates: Some(gates("A=true,B=false").unwrap()),
            ..ProxyFlags::default()
        };
        let fields = flags.fields();
        assert_eq!(fields["nftables"], json!({"masqueradeAll": true}));
        assert_eq!(fields["featureGates"], json!({"A": true, "B": false}));
        assert_eq!(fields.get("mode"), None);
        assert!(gates("A").is_err() && gates("A=x").is_err());
    }

    #[test]
    fn deprecated_ports_are_those_of_the_addresses() {
        for (address, port, expected) in [
            (None, None, None),
            (None, Some(0), Some("")),
            (None, Some(99), Some("0.0.0.0:99")),
            (Some("::1"), Some(99), Some("[::1]:99")),
            (Some("192.0.2.1:7"), Some(99), Some("192.0.2.1:7")),
            (Some("192.0.2.1:7"), Some(0), Some("")),
        ] {
            let found = at_port(&address.map(str::to_owned), port, "0.0.0.0");
            assert_eq!(found.as_deref(), expected, "{address:?} {port:?}");
        }
    }
}
