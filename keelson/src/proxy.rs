//! The service proxy: its configuration, and the command that runs it alone.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, bail};
use ipnet::IpNet;
use keelson_proxy::{DetectLocal, NodePortAddresses, ProxyConfig};

use crate::{
    cli::ProxyArgs,
    config::{ProxySettings, duration},
    node, notify, run,
};

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
    match settings.mode.as_deref() {
        None | Some("" | "nftables") => {}
        Some("ipvs") => bail!("mode ipvs is deprecated upstream and not served: use mode nftables"),
        Some(other @ ("iptables" | "userspace")) => {
            bail!("mode {other} is not supported yet: use mode nftables");
        }
        Some(other) => bail!("mode {other:?} is unknown: nftables is supported"),
    }
    let mut config = ProxyConfig::new(node_name);
    config.node_ips = node_ips;
    let ranges: Vec<IpNet> = match &settings.cluster_cidr {
        Some(text) => text
            .split(',')
            .map(|range| range.trim().parse().with_context(|| format!("clusterCIDR {range:?}")))
            .collect::<anyhow::Result<_>>()?,
        None => cluster_cidr.into_iter().collect(),
    };
    if !ranges.is_empty() {
        config.detect_local = DetectLocal::Ranges(ranges);
    }
    if let Some(addresses) = &settings.node_port_addresses
        && addresses.iter().any(|a| a != "primary")
    {
        config.node_port_addresses = NodePortAddresses::Ranges(
            addresses
                .iter()
                .map(|range| range.parse().with_context(|| format!("nodePortAddresses {range:?}")))
                .collect::<anyhow::Result<_>>()?,
        );
    }
    if let Some(address) = &settings.healthz_bind_address {
        config.healthz_bind_address = bind_address("healthzBindAddress", address)?;
    }
    if let Some(address) = &settings.metrics_bind_address {
        config.metrics_bind_address = bind_address("metricsBindAddress", address)?;
    }
    let (from, to) = (&settings.conntrack, &mut config.conntrack);
    if from.max_per_core.is_some() {
        to.max_per_core = from.max_per_core;
    }
    if from.min.is_some() {
        to.min = from.min;
    }
    to.tcp_be_liberal = from.tcp_be_liberal.unwrap_or(false);
    for (text, field) in [
        (&from.tcp_established_timeout, &mut to.tcp_established_timeout),
        (&from.tcp_close_wait_timeout, &mut to.tcp_close_wait_timeout),
        (&from.udp_timeout, &mut to.udp_timeout),
        (&from.udp_stream_timeout, &mut to.udp_stream_timeout),
    ] {
        if let Some(text) = text {
            let value = duration::parse(text).map_err(anyhow::Error::msg).context("conntrack")?;
            *field = (value > Duration::ZERO).then_some(value);
        }
    }
    Ok(config)
}

/// An address with a port; empty for none.
fn bind_address(field: &str, text: &str) -> anyhow::Result<Option<SocketAddr>> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse()
        .map(Some)
        .with_context(|| format!("{field} {text:?}: an address with a port is wanted"))
}

/// `keelson proxy`.
///
/// # Errors
/// When it can't start.
pub(crate) fn run(args: &ProxyArgs) -> anyhow::Result<()> {
    let settings = match &args.config {
        Some(path) => ProxySettings::read(path)?,
        None => ProxySettings::default(),
    };
    crate::runtime()?.block_on(async {
        if args.cleanup {
            let cleanup = tokio::task::spawn_blocking(keelson_proxy::cleanup).await;
            cleanup.context("remove the proxy's rules")?.context("remove the proxy's rules")?;
            println!("the proxy's rules are removed");
            return Ok(());
        }
        let name = node::name(
            args.hostname_override.as_deref().or(settings.hostname_override.as_deref()),
        )?;
        let path = args
            .kubeconfig
            .as_ref()
            .or(settings.client_connection.kubeconfig.as_ref())
            .context("--kubeconfig, or clientConnection.kubeconfig in --config, is needed")?;
        let config = config(&settings, &name, Vec::new(), None)?;
        let healthz = config.healthz_bind_address.map_or(0, |address| address.port());
        let shutdown = run::shutdown_on_signal()?;
        let client = run::client(path).await?;
        let proxy = tokio::spawn(keelson_proxy::run(config, client, shutdown.clone()));
        notify::notify("READY=1");
        let watchdog = notify::watchdog(run::healthy(healthz), shutdown);
        let (ended, ()) = tokio::join!(proxy, watchdog);
        ended.context("the proxy")?.context("the proxy")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(mode: &str) -> anyhow::Result<ProxyConfig> {
        let settings = ProxySettings { mode: Some(mode.to_owned()), ..ProxySettings::default() };
        config(&settings, "n", Vec::new(), None)
    }

    #[test]
    fn modes_that_are_not_served_say_what_to_use() {
        assert!(mode("nftables").is_ok());
        for other in ["ipvs", "iptables", "userspace", "x"] {
            assert!(mode(other).unwrap_err().to_string().contains("nftables"), "{other}");
        }
    }

    #[test]
    fn addresses_are_checked() {
        assert_eq!(bind_address("f", "").unwrap(), None);
        assert!(bind_address("f", "127.0.0.1:10249").unwrap().is_some());
        assert!(bind_address("f", "127.0.0.1").is_err());
    }
}
