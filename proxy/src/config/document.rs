//! The configuration in force as a `KubeProxyConfiguration`: what `/configz` serves and
//! `--write-config-to` writes, and what reads back as the same configuration.

use std::{net::SocketAddr, time::Duration};

use ipnet::IpNet;
use serde_json::{Value, json};

use super::{DetectLocal, NodePortAddresses, ProxyConfig};

/// The switch that has TCP connections to endpoints that are gone forgotten.
pub const REMOVE_STALE_TCP: &str = "RemoveStaleTCPConnections";

impl ProxyConfig {
    /// Every documented field that has an effect here.
    pub fn document(&self) -> Value {
        let filter = json!({
            "masqueradeAll": self.masquerade_all,
            "masqueradeBit": self.masquerade_bit,
            "minSyncPeriod": duration(self.min_sync_period),
            "syncPeriod": duration(self.sync_period),
        });
        let mut iptables = filter.clone();
        iptables["localhostNodePorts"] = self.localhost_node_ports.into();
        let (mode, ranges, bridge, prefix) = match &self.detect_local {
            DetectLocal::Nothing => ("ClusterCIDR", String::new(), "", ""),
            DetectLocal::Ranges(ranges) => ("ClusterCIDR", texts(ranges).join(","), "", ""),
            DetectLocal::NodeCidr => ("NodeCIDR", String::new(), "", ""),
            DetectLocal::Interface(name) => ("BridgeInterface", String::new(), name.as_str(), ""),
            DetectLocal::InterfacePrefix(prefix) => {
                ("InterfaceNamePrefix", String::new(), "", prefix.as_str())
            }
        };
        let conntrack = &self.conntrack;
        let time = |time: Option<Duration>| duration(time.unwrap_or_default());
        let listen =
            |address: Option<SocketAddr>| address.map(|a| a.to_string()).unwrap_or_default();
        json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "bindAddress": self.bind_address.map_or("0.0.0.0".to_owned(), |a| a.to_string()),
            "bindAddressHardFail": self.bind_address_hard_fail,
            "clusterCIDR": ranges,
            "conntrack": {
                "maxPerCore": conntrack.max_per_core,
                "min": conntrack.min,
                "tcpBeLiberal": conntrack.tcp_be_liberal,
                "tcpCloseWaitTimeout": time(conntrack.tcp_close_wait_timeout),
                "tcpEstablishedTimeout": time(conntrack.tcp_established_timeout),
                "udpStreamTimeout": time(conntrack.udp_stream_timeout),
                "udpTimeout": time(conntrack.udp_timeout),
            },
            "detectLocal": {"bridgeInterface": bridge, "interfaceNamePrefix": prefix},
            "detectLocalMode": mode,
            "featureGates": {REMOVE_STALE_TCP: conntrack.remove_stale_tcp},
            "healthzBindAddress": listen(self.healthz_bind_address),
            "hostnameOverride": self.node_name,
            "iptables": iptables,
            "metricsBindAddress": listen(self.metrics_bind_address),
            "mode": self.mode.as_str(),
            "nftables": filter,
            "nodePortAddresses": match &self.node_port_addresses {
                NodePortAddresses::Primary => vec!["primary".to_owned()],
                NodePortAddresses::Ranges(ranges) => texts(ranges),
            },
        })
    }
}

fn texts(ranges: &[IpNet]) -> Vec<String> {
    ranges.iter().map(IpNet::to_string).collect()
}

/// As Go writes it: `24h0m0s`, `1m30s`, `1.5s`, `0s`.
fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let mut text = String::new();
    if hours > 0 {
        text.push_str(&format!("{hours}h"));
    }
    if hours > 0 || minutes > 0 {
        text.push_str(&format!("{minutes}m"));
    }
    text.push_str(&seconds.to_string());
    let fraction = format!("{:09}", duration.subsec_nanos());
    let fraction = fraction.trim_end_matches('0');
    if !fraction.is_empty() {
        text.push_str(&format!(".{fraction}"));
    }
    text.push('s');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_written_as_go_writes_them() {
        for (millis, text) in [
            (0, "0s"),
            (86_400_000, "24h0m0s"),
            (90_000, "1m30s"),
            (3_600_000, "1h0m0s"),
            (1_500, "1.5s"),
            (20, "0.02s"),
        ] {
            assert_eq!(duration(Duration::from_millis(millis)), text);
        }
    }
}
