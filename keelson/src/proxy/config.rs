//! The proxy's configuration from a config file's settings, which have the flags in them already.

use std::{
    fmt::Debug,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use ipnet::IpNet;
use keelson_proxy::{
    ConntrackConfig, DetectLocal, Mode, NodePortAddresses, ProxyConfig, REMOVE_STALE_TCP,
};
use nix::net::if_::if_nametoindex;

use crate::config::{Conntrack, PacketFilter, ProxySettings, Wrong, duration};

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
/// When values can't be used: all of them are named, with where they stand.
pub(crate) fn config(
    settings: &ProxySettings,
    node_name: &str,
    node_ips: Vec<IpAddr>,
    cluster_cidr: Option<IpNet>,
) -> anyhow::Result<ProxyConfig> {
    let mut wrong = Wrong::default();
    let mut config = ProxyConfig::new(node_name);
    config.node_ips = node_ips;
    config.conntrack.remove_stale_tcp = gate(settings, REMOVE_STALE_TCP);
    for name in settings.feature_gates.keys() {
        if !GATES.contains(&name.as_str()) {
            tracing::warn!("featureGates.{name} has no effect here");
        }
    }
    let mode = wrong.unless("mode", mode(settings));
    config.mode = mode.unwrap_or_default();
    let main = wrong.unless("bindAddress", main_address(settings)).flatten();
    // That of IPv4 for all addresses is the default.
    config.bind_address = main.filter(|address| *address != Ipv4Addr::UNSPECIFIED);
    if main.is_some_and(|address| address.is_ipv6()) {
        config.healthz_bind_address = Some((Ipv6Addr::UNSPECIFIED, HEALTHZ_PORT).into());
        config.metrics_bind_address = Some((Ipv6Addr::LOCALHOST, METRICS_PORT).into());
    }
    config.bind_address_hard_fail = settings.bind_address_hard_fail.unwrap_or(false);
    config.detect_local = detect_local(settings, cluster_cidr, &mut wrong);
    let answering = node_port_addresses(settings, config.mode);
    if let Some(answering) = wrong.unless("nodePortAddresses", answering) {
        config.node_port_addresses = answering;
    }
    for (field, text, port, address) in [
        (
            "healthzBindAddress",
            &settings.healthz_bind_address,
            HEALTHZ_PORT,
            &mut config.healthz_bind_address,
        ),
        (
            "metricsBindAddress",
            &settings.metrics_bind_address,
            METRICS_PORT,
            &mut config.metrics_bind_address,
        ),
    ] {
        let Some(text) = text else { continue };
        if let Some(found) = wrong.unless(field, bind_address(field, text, port)) {
            *address = found;
        }
    }
    packet_filter(settings, &mut config, mode, &mut wrong);
    wrong.unless("oomScoreAdj", oom_score(settings));
    conntrack(&settings.conntrack, &mut config.conntrack, &mut wrong);
    settings.origin.check(wrong)?;
    Ok(config)
}

/// Whether a switch is on.
pub(super) fn gate(settings: &ProxySettings, name: &str) -> bool {
    settings.feature_gates.get(name).copied().unwrap_or(false)
}

/// Something else than what is wanted in a field.
fn wanted(field: &str, what: &str, found: impl Debug) -> String {
    format!("{field}: {what} is wanted, not {found:?}")
}

fn mode(settings: &ProxySettings) -> Result<Mode, String> {
    match settings.mode.as_deref() {
        None | Some("" | "nftables") => Ok(Mode::Nftables),
        Some("iptables") => Ok(Mode::Iptables),
        Some("userspace") => Ok(Mode::Userspace),
        Some("ipvs") if gate(settings, GATE_IPVS) => {
            tracing::warn!("mode ipvs is served by nftables");
            Ok(Mode::Nftables)
        }
        Some("ipvs") => Err(format!(
            "mode ipvs is deprecated upstream and not served: use mode nftables, which looks \
             Services up in maps as ipvs does, or set featureGates.{GATE_IPVS}: true to have this \
             config served by it"
        )),
        Some(other) => Err(wanted("mode", "nftables, iptables or userspace", other)),
    }
}

fn main_address(settings: &ProxySettings) -> Result<Option<IpAddr>, String> {
    let given = settings.bind_address.as_deref().filter(|text| !text.is_empty());
    let parse = |text: &str| text.parse().map_err(|_| wanted("bindAddress", "an IP address", text));
    given.map(parse).transpose()
}

fn detect_local(
    settings: &ProxySettings,
    cluster_cidr: Option<IpNet>,
    wrong: &mut Wrong,
) -> DetectLocal {
    const MODES: &str = "ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix";
    let mut interface = |field: &str, name: &Option<String>, what: &str| {
        let name = name.as_deref().unwrap_or_default();
        let fits = |c: char| !c.is_whitespace() && !c.is_control() && !"/\"*".contains(c);
        let fits = !name.is_empty() && name.len() <= INTERFACE_NAME && name.chars().all(fits);
        let mode = settings.detect_local_mode.as_deref().unwrap_or_default();
        let message = || format!("{field}: {what} is wanted with {mode}, not {name:?}");
        // Where it is not given at all, the mode is the place to look at.
        let place = if name.is_empty() { "detectLocalMode" } else { field };
        wrong.unless(place, fits.then(|| name.to_owned()).ok_or_else(message))
    };
    let names = &settings.detect_local;
    let found = match settings.detect_local_mode.as_deref() {
        None | Some("" | "ClusterCIDR") => {
            wrong.unless("clusterCIDR", cluster_ranges(settings, cluster_cidr))
        }
        Some("NodeCIDR") => Some(DetectLocal::NodeCidr),
        Some("BridgeInterface") => {
            let what = "an interface's name";
            interface("detectLocal.bridgeInterface", &names.bridge_interface, what)
                .map(DetectLocal::Interface)
        }
        Some("InterfaceNamePrefix") => {
            let what = "the beginning of interfaces' names";
            interface("detectLocal.interfaceNamePrefix", &names.interface_name_prefix, what)
                .map(DetectLocal::InterfacePrefix)
        }
        Some(other) => {
            let unknown = Err(wanted("detectLocalMode", MODES, other));
            wrong.unless("detectLocalMode", unknown)
        }
    };
    found.unwrap_or_default()
}

fn cluster_ranges(
    settings: &ProxySettings,
    cluster_cidr: Option<IpNet>,
) -> Result<DetectLocal, String> {
    let ranges: Vec<IpNet> = match settings.cluster_cidr.as_deref() {
        Some(text) if !text.is_empty() => ranges("clusterCIDR", text.split(','))?,
        _ => cluster_cidr.into_iter().collect(),
    };
    let of_v4 = ranges.iter().filter(|range| range.addr().is_ipv4()).count();
    if of_v4 > 1 || ranges.len() - of_v4 > 1 {
        let given = settings.cluster_cidr.as_deref().unwrap_or_default();
        return Err(wanted("clusterCIDR", "one range for each family", given));
    }
    Ok(match ranges.is_empty() {
        true => DetectLocal::Nothing,
        false => DetectLocal::Ranges(ranges),
    })
}

fn ranges<'a>(field: &str, texts: impl IntoIterator<Item = &'a str>) -> Result<Vec<IpNet>, String> {
    let (mut ranges, mut wrong) = (Vec::new(), Vec::new());
    for text in texts {
        match text.trim().parse::<IpNet>() {
            Ok(range) => ranges.push(range.trunc()),
            Err(_) => wrong.push(format!("{text:?}")),
        }
    }
    if wrong.is_empty() {
        return Ok(ranges);
    }
    let wrong = wrong.join(", ");
    Err(format!("{field}: ranges of addresses such as 10.1.0.0/16 are wanted, not {wrong}"))
}

/// As kube-proxy's modes have it: nftables on the node's own addresses, the others on all.
fn node_port_addresses(settings: &ProxySettings, mode: Mode) -> Result<NodePortAddresses, String> {
    let texts = settings.node_port_addresses.as_deref().unwrap_or_default();
    match texts {
        [] if mode == Mode::Nftables => Ok(NodePortAddresses::Primary),
        [] => Ok(NodePortAddresses::Ranges(ranges("nodePortAddresses", ["0.0.0.0/0", "::/0"])?)),
        [one] if one == "primary" => Ok(NodePortAddresses::Primary),
        all if all.iter().any(|text| text == "primary") => {
            Err(wanted("nodePortAddresses", "primary alone, or ranges", all))
        }
        all => {
            let texts = all.iter().map(String::as_str);
            Ok(NodePortAddresses::Ranges(ranges("nodePortAddresses", texts)?))
        }
    }
}

/// What the packet filters have of their own. That of iptables is looked at in every mode, as
/// kube-proxy does.
fn packet_filter(
    settings: &ProxySettings,
    config: &mut ProxyConfig,
    mode: Option<Mode>,
    wrong: &mut Wrong,
) {
    let usual = (config.sync_period, config.min_sync_period);
    let mut checked = Checked::of("iptables", &settings.iptables, usual, wrong);
    let mut filter = &settings.iptables;
    if mode == Some(Mode::Nftables) {
        filter = &settings.nftables;
        checked = Checked::of("nftables", filter, usual, wrong);
    }
    config.masquerade_all = filter.masquerade_all.unwrap_or(false);
    config.masquerade_bit = checked.masquerade_bit.unwrap_or(config.masquerade_bit);
    config.localhost_node_ports = filter.localhost_node_ports.unwrap_or(true);
    (config.sync_period, config.min_sync_period) = checked.periods;
}

/// What of a packet filter's settings has bounds.
struct Checked {
    masquerade_bit: Option<u8>,
    /// `syncPeriod` and `minSyncPeriod`.
    periods: (Duration, Duration),
}

impl Checked {
    fn of(
        name: &str,
        filter: &PacketFilter,
        usual: (Duration, Duration),
        wrong: &mut Wrong,
    ) -> Self {
        let field = format!("{name}.masqueradeBit");
        let bit = filter.masquerade_bit.and_then(|number| {
            let bit = u8::try_from(number).ok().filter(|bit| *bit < 32);
            wrong.unless(&field, bit.ok_or_else(|| wanted(&field, "a bit from 0 to 31", number)))
        });
        // As with kube-proxy, 0 in a file is the default.
        let sync = period(&format!("{name}.syncPeriod"), filter.sync_period.as_deref(), wrong);
        let sync = sync.filter(|period| !period.is_zero()).unwrap_or(usual.0);
        let field = format!("{name}.minSyncPeriod");
        let min = period(&field, filter.min_sync_period.as_deref(), wrong);
        if let Some(min) = min.filter(|min| *min > sync) {
            let what = format!("no more than syncPeriod ({sync:?})");
            wrong.unless::<()>(&field, Err(wanted(&field, &what, min)));
        }
        Self { masquerade_bit: bit, periods: (sync, min.unwrap_or(usual.1)) }
    }
}

fn oom_score(settings: &ProxySettings) -> Result<(), String> {
    match settings.oom_score_adj {
        Some(score) if !(-1000..=1000).contains(&score) => {
            Err(wanted("oomScoreAdj", "a whole number from -1000 to 1000", score))
        }
        _ => Ok(()),
    }
}

fn conntrack(from: &Conntrack, to: &mut ConntrackConfig, wrong: &mut Wrong) {
    to.max_per_core = from.max_per_core.or(to.max_per_core);
    to.min = from.min.or(to.min);
    to.tcp_be_liberal = from.tcp_be_liberal.unwrap_or(false);
    for (name, text, field) in [
        ("tcpEstablishedTimeout", &from.tcp_established_timeout, &mut to.tcp_established_timeout),
        ("tcpCloseWaitTimeout", &from.tcp_close_wait_timeout, &mut to.tcp_close_wait_timeout),
        ("udpTimeout", &from.udp_timeout, &mut to.udp_timeout),
        ("udpStreamTimeout", &from.udp_stream_timeout, &mut to.udp_stream_timeout),
    ] {
        if let Some(value) = period(&format!("conntrack.{name}"), text.as_deref(), wrong) {
            *field = (value > Duration::ZERO).then_some(value);
        }
    }
}

fn period(field: &str, text: Option<&str>, wrong: &mut Wrong) -> Option<Duration> {
    let found = duration::parse(text?).map_err(|error| format!("{field}: {error}"));
    wrong.unless(field, found)
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
fn bind_address(field: &str, text: &str, port: u16) -> Result<Option<SocketAddr>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(Some(SocketAddr::new(address, port)));
    }
    let what = format!("an IP address with a port, such as 127.0.0.1:{port},");
    text.parse().map(Some).map_err(|_| wanted(field, &what, text))
}

#[cfg(test)]
#[path = "config_test.rs"]
mod tests;
