//! The proxy's configuration from a config file's settings, which have the flags in them already.

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, bail};
use ipnet::IpNet;
use keelson_proxy::{DetectLocal, Mode, NodePortAddresses, ProxyConfig, REMOVE_STALE_TCP};
use nix::net::if_::if_nametoindex;

use crate::config::{PacketFilter, ProxySettings, duration};

/// The switch that has a config for `ipvs` served by nftables.
const GATE_IPVS: &str = "ServeIPVSByNftables";
/// The switches that there are.
pub(super) const GATES: [&str; 2] = [GATE_IPVS, REMOVE_STALE_TCP];
/// The usual ports of the pages.
const HEALTHZ_PORT: u16 = 10256;
const METRICS_PORT: u16 = 10249;
/// The longest name of an interface.
const INTERFACE_NAME: usize = 15;

/// The proxy's configuration from the settings.
///
/// # Errors
/// When a value can't be used.
pub(crate) fn config(
    settings: &ProxySettings,
    node_name: &str,
    node_ips: Vec<IpAddr>,
    cluster_cidr: Option<IpNet>,
) -> anyhow::Result<ProxyConfig> {
    let mut config = ProxyConfig::new(node_name);
    config.node_ips = node_ips;
    config.conntrack.remove_stale_tcp = gate(settings, REMOVE_STALE_TCP);
    for name in settings.feature_gates.keys() {
        if !GATES.contains(&name.as_str()) {
            tracing::warn!("featureGates.{name} has no effect here");
        }
    }
    config.mode = mode(settings)?;
    if let Some(text) = settings.bind_address.as_deref().filter(|text| !text.is_empty()) {
        let address: IpAddr = text.parse().with_context(|| format!("bindAddress {text:?}"))?;
        config.bind_address = Some(address).filter(|address| !address.is_unspecified());
        if address.is_ipv6() {
            config.healthz_bind_address = Some((Ipv6Addr::UNSPECIFIED, HEALTHZ_PORT).into());
            config.metrics_bind_address = Some((Ipv6Addr::LOCALHOST, METRICS_PORT).into());
        }
    }
    config.bind_address_hard_fail = settings.bind_address_hard_fail.unwrap_or(false);
    config.detect_local = detect_local(settings, cluster_cidr)?;
    config.node_port_addresses = node_port_addresses(settings, config.mode)?;
    if let Some(address) = &settings.healthz_bind_address {
        config.healthz_bind_address = bind_address("healthzBindAddress", address, HEALTHZ_PORT)?;
    }
    if let Some(address) = &settings.metrics_bind_address {
        config.metrics_bind_address = bind_address("metricsBindAddress", address, METRICS_PORT)?;
    }
    packet_filter(settings, &mut config)?;
    oom_score(settings)?;
    let (from, to) = (&settings.conntrack, &mut config.conntrack);
    if from.max_per_core.is_some() {
        to.max_per_core = from.max_per_core;
    }
    if from.min.is_some() {
        to.min = from.min;
    }
    to.tcp_be_liberal = from.tcp_be_liberal.unwrap_or(false);
    for (name, text, field) in [
        ("tcpEstablishedTimeout", &from.tcp_established_timeout, &mut to.tcp_established_timeout),
        ("tcpCloseWaitTimeout", &from.tcp_close_wait_timeout, &mut to.tcp_close_wait_timeout),
        ("udpTimeout", &from.udp_timeout, &mut to.udp_timeout),
        ("udpStreamTimeout", &from.udp_stream_timeout, &mut to.udp_stream_timeout),
    ] {
        if let Some(value) = period(&format!("conntrack.{name}"), text.as_deref())? {
            *field = (value > Duration::ZERO).then_some(value);
        }
    }
    Ok(config)
}

/// Whether a switch is on.
pub(super) fn gate(settings: &ProxySettings, name: &str) -> bool {
    settings.feature_gates.get(name).copied().unwrap_or(false)
}

fn mode(settings: &ProxySettings) -> anyhow::Result<Mode> {
    match settings.mode.as_deref() {
        None | Some("" | "nftables") => Ok(Mode::Nftables),
        Some("iptables") => Ok(Mode::Iptables),
        Some("userspace") => Ok(Mode::Userspace),
        Some("ipvs") if gate(settings, GATE_IPVS) => {
            tracing::warn!("mode ipvs is served by nftables");
            Ok(Mode::Nftables)
        }
        Some("ipvs") => bail!(
            "mode ipvs is deprecated upstream and not served: use mode nftables, which looks \
             Services up in maps as ipvs does, or set featureGates.{GATE_IPVS}: true to have this \
             config served by it"
        ),
        Some(other) => {
            bail!("mode {other:?} is unknown: nftables, iptables and userspace are supported")
        }
    }
}

fn detect_local(
    settings: &ProxySettings,
    cluster_cidr: Option<IpNet>,
) -> anyhow::Result<DetectLocal> {
    let interface = |field: &str, name: &Option<String>| -> anyhow::Result<String> {
        let name = name.as_deref().unwrap_or_default();
        let fits = |c: char| !c.is_whitespace() && !c.is_control() && !"/\"*".contains(c);
        if name.is_empty() || name.len() > INTERFACE_NAME || !name.chars().all(fits) {
            bail!("detectLocal.{field}: {name:?} can't be an interface's name");
        }
        Ok(name.to_owned())
    };
    match settings.detect_local_mode.as_deref() {
        None | Some("" | "ClusterCIDR") => {
            let ranges: Vec<IpNet> = match settings.cluster_cidr.as_deref() {
                Some(text) if !text.is_empty() => ranges("clusterCIDR", text.split(','))?,
                _ => cluster_cidr.into_iter().collect(),
            };
            let of_v4 = ranges.iter().filter(|range| range.addr().is_ipv4()).count();
            if of_v4 > 1 || ranges.len() - of_v4 > 1 {
                bail!("clusterCIDR: one range for each family is wanted");
            }
            Ok(match ranges.is_empty() {
                true => DetectLocal::Nothing,
                false => DetectLocal::Ranges(ranges),
            })
        }
        Some("NodeCIDR") => Ok(DetectLocal::NodeCidr),
        Some("BridgeInterface") => {
            let name = interface("bridgeInterface", &settings.detect_local.bridge_interface)?;
            Ok(DetectLocal::Interface(name))
        }
        Some("InterfaceNamePrefix") => {
            let names = &settings.detect_local;
            let prefix = interface("interfaceNamePrefix", &names.interface_name_prefix)?;
            Ok(DetectLocal::InterfacePrefix(prefix))
        }
        Some(other) => bail!(
            "detectLocalMode {other:?} is unknown: ClusterCIDR, NodeCIDR, BridgeInterface and \
             InterfaceNamePrefix are supported"
        ),
    }
}

fn ranges<'a>(field: &str, texts: impl IntoIterator<Item = &'a str>) -> anyhow::Result<Vec<IpNet>> {
    let range = |text: &str| {
        let range: IpNet = text.trim().parse().with_context(|| format!("{field} {text:?}"))?;
        Ok(range.trunc())
    };
    texts.into_iter().map(range).collect()
}

/// As kube-proxy's modes have it: nftables on the node's own addresses, the others on all.
fn node_port_addresses(settings: &ProxySettings, mode: Mode) -> anyhow::Result<NodePortAddresses> {
    let texts = settings.node_port_addresses.as_deref().unwrap_or_default();
    match texts {
        [] if mode == Mode::Nftables => Ok(NodePortAddresses::Primary),
        [] => Ok(NodePortAddresses::Ranges(ranges("nodePortAddresses", ["0.0.0.0/0", "::/0"])?)),
        [one] if one == "primary" => Ok(NodePortAddresses::Primary),
        all if all.iter().any(|text| text == "primary") => {
            bail!("nodePortAddresses: primary stands alone")
        }
        all => {
            let texts = all.iter().map(String::as_str);
            Ok(NodePortAddresses::Ranges(ranges("nodePortAddresses", texts)?))
        }
    }
}

/// What the packet filters have of their own. That of iptables is looked at in every mode, as
/// kube-proxy does.
fn packet_filter(settings: &ProxySettings, config: &mut ProxyConfig) -> anyhow::Result<()> {
    let usual = (config.sync_period, config.min_sync_period);
    let mut checked = Checked::of("iptables", &settings.iptables, usual)?;
    let mut filter = &settings.iptables;
    if config.mode == Mode::Nftables {
        filter = &settings.nftables;
        checked = Checked::of("nftables", filter, usual)?;
    }
    config.masquerade_all = filter.masquerade_all.unwrap_or(false);
    config.masquerade_bit = checked.masquerade_bit.unwrap_or(config.masquerade_bit);
    config.localhost_node_ports = filter.localhost_node_ports.unwrap_or(true);
    (config.sync_period, config.min_sync_period) = checked.periods;
    Ok(())
}

/// What of a packet filter's settings has bounds.
struct Checked {
    masquerade_bit: Option<u8>,
    /// `syncPeriod` and `minSyncPeriod`.
    periods: (Duration, Duration),
}

impl Checked {
    fn of(name: &str, filter: &PacketFilter, usual: (Duration, Duration)) -> anyhow::Result<Self> {
        let bit = |bit: i64| u8::try_from(bit).ok().filter(|bit| *bit < 32);
        let masquerade_bit = filter.masquerade_bit.map(|number| {
            bit(number).with_context(|| {
                format!("{name}.masqueradeBit {number}: a bit from 0 to 31 is wanted")
            })
        });
        // As with kube-proxy, 0 in a file is the default.
        let sync = period(&format!("{name}.syncPeriod"), filter.sync_period.as_deref())?;
        let sync = sync.filter(|period| !period.is_zero()).unwrap_or(usual.0);
        let min = period(&format!("{name}.minSyncPeriod"), filter.min_sync_period.as_deref())?;
        if let Some(min) = min.filter(|min| *min > sync) {
            bail!("{name}.minSyncPeriod {min:?}: no more than syncPeriod ({sync:?}) is wanted");
        }
        let periods = (sync, min.unwrap_or(usual.1));
        Ok(Self { masquerade_bit: masquerade_bit.transpose()?, periods })
    }
}

fn oom_score(settings: &ProxySettings) -> anyhow::Result<()> {
    match settings.oom_score_adj {
        Some(score) if !(-1000..=1000).contains(&score) => {
            bail!("oomScoreAdj {score}: a number from -1000 to 1000 is wanted")
        }
        _ => Ok(()),
    }
}

fn period(field: &str, text: Option<&str>) -> anyhow::Result<Option<Duration>> {
    let parse = |text| duration::parse(text).map_err(anyhow::Error::msg);
    text.map(parse).transpose().with_context(|| field.to_owned())
}

/// What is likely an oversight in how pods' traffic is told from others'.
pub(super) fn doubt(detect_local: &DetectLocal) -> Option<String> {
    match detect_local {
        DetectLocal::Nothing => Some(
            "clusterCIDR is empty: nothing tells traffic of pods from others', so what comes from \
             outside the cluster to cluster addresses is not masqueraded"
                .to_owned(),
        ),
        DetectLocal::Interface(name) if if_nametoindex(name.as_str()).is_err() => Some(format!(
            "detectLocal.bridgeInterface {name:?}: there is no such interface yet, and traffic \
                 that doesn't come from it counts as from outside the cluster"
        )),
        _ => None,
    }
}

/// An address, with a port or the usual one; empty for none.
fn bind_address(field: &str, text: &str, port: u16) -> anyhow::Result<Option<SocketAddr>> {
    if text.is_empty() {
        return Ok(None);
    }
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(Some(SocketAddr::new(address, port)));
    }
    text.parse()
        .map(Some)
        .with_context(|| format!("{field} {text:?}: an address with a port is wanted"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn configured(fields: serde_json::Value) -> anyhow::Result<ProxyConfig> {
        config(&serde_json::from_value(fields)?, "n", Vec::new(), None)
    }

    #[test]
    fn modes_that_are_not_served_say_what_to_use() {
        for (name, expected) in [
            ("", Mode::Nftables),
            ("nftables", Mode::Nftables),
            ("iptables", Mode::Iptables),
            ("userspace", Mode::Userspace),
        ] {
            assert_eq!(configured(json!({"mode": name})).unwrap().mode, expected);
        }
        for other in ["ipvs", "x"] {
            let error = configured(json!({"mode": other})).unwrap_err().to_string();
            assert!(error.contains("nftables"), "{error}");
        }
        let gates = json!({"mode": "ipvs", "featureGates": {"ServeIPVSByNftables": true}});
        assert_eq!(configured(gates).unwrap().mode, Mode::Nftables);
    }

    #[test]
    fn fields_have_their_documented_meaning_and_defaults() {
        let all = NodePortAddresses::Ranges(ranges("f", ["0.0.0.0/0", "::/0"]).unwrap());
        let config = configured(json!({"mode": "iptables"})).unwrap();
        assert_eq!(config.node_port_addresses, all);
        assert!(config.localhost_node_ports);
        assert_eq!(config.sync_period, Duration::from_secs(30));
        let config = configured(json!({
            "bindAddress": "2001:db8::1", "clusterCIDR": "10.0.0.0/8,fd00::/8",
            "nftables": {"masqueradeBit": 3, "minSyncPeriod": "2s"}, "iptables": {"masqueradeBit": 4},
            "healthzBindAddress": "[::1]:99", "metricsBindAddress": "",
        }))
        .unwrap();
        assert_eq!(config.node_port_addresses, NodePortAddresses::Primary);
        assert_eq!((config.masquerade_bit, config.min_sync_period.as_secs()), (3, 2));
        assert_eq!(config.bind_address, Some("2001:db8::1".parse().unwrap()));
        assert_eq!(config.healthz_bind_address, Some("[::1]:99".parse().unwrap()));
        assert_eq!(config.metrics_bind_address, None);
        assert!(matches!(config.detect_local, DetectLocal::Ranges(ranges) if ranges.len() == 2));
        let config = configured(json!({"bindAddress": "::", "metricsBindAddress": "::"})).unwrap();
        assert_eq!(config.healthz_bind_address, Some("[::]:10256".parse().unwrap()));
        assert_eq!(config.metrics_bind_address, Some("[::]:10249".parse().unwrap()));
        let bridge = json!({"detectLocalMode": "BridgeInterface", "detectLocal": {"bridgeInterface": "br0"}});
        let found = configured(bridge).unwrap().detect_local;
        assert_eq!(found, DetectLocal::Interface("br0".into()));
    }

    #[test]
    fn values_that_cannot_be_used_are_named() {
        for (fields, named) in [
            (json!({"bindAddress": "here"}), "bindAddress"),
            (json!({"clusterCIDR": "10.0.0.0"}), "clusterCIDR"),
            (json!({"clusterCIDR": "10.0.0.0/8,11.0.0.0/8"}), "clusterCIDR"),
            (json!({"detectLocalMode": "Guess"}), "detectLocalMode"),
            (json!({"detectLocalMode": "BridgeInterface"}), "detectLocal.bridgeInterface"),
            (json!({"nodePortAddresses": ["primary", "10.0.0.0/8"]}), "nodePortAddresses"),
            (json!({"nodePortAddresses": ["x"]}), "nodePortAddresses"),
            (json!({"nftables": {"masqueradeBit": 32}}), "nftables.masqueradeBit"),
            (json!({"iptables": {"masqueradeBit": 32}}), "iptables.masqueradeBit"),
            (json!({"iptables": {"syncPeriod": "-1s"}}), "iptables.syncPeriod"),
            (json!({"iptables": {"minSyncPeriod": "31s"}}), "iptables.minSyncPeriod"),
            (
                json!({"nftables": {"minSyncPeriod": "2s", "syncPeriod": "1s"}}),
                "nftables.minSyncPeriod",
            ),
            (json!({"conntrack": {"udpTimeout": "-1s"}}), "conntrack.udpTimeout"),
            (json!({"oomScoreAdj": 1001}), "oomScoreAdj"),
            (json!({"oomScoreAdj": -1001}), "oomScoreAdj"),
            (json!({"healthzBindAddress": "localhost:1"}), "healthzBindAddress"),
        ] {
            let error = format!("{:#}", configured(fields).unwrap_err());
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn what_is_likely_an_oversight_is_told() {
        let of = |fields| doubt(&configured(fields).unwrap().detect_local).unwrap_or_default();
        let bridge = |name| json!({"detectLocalMode": "BridgeInterface", "detectLocal": {"bridgeInterface": name}});
        assert!(of(json!({})).contains("clusterCIDR"));
        assert!(of(bridge("no-such-bridge")).contains("\"no-such-bridge\""));
        for clear in [
            json!({"clusterCIDR": "10.0.0.0/8"}),
            bridge("lo"),
            json!({"detectLocalMode": "NodeCIDR"}),
        ] {
            assert_eq!(of(clear), "");
        }
    }
}
