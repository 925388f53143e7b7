//! What other modes and kube-proxy left in the kernel, and its removal.
//!
//! It is removed once the new rules are in force, so that no packet finds neither; where there is
//! nothing of it, nothing is touched.

use tokio_util::sync::CancellationToken;

use crate::{
    ProxyError,
    config::{Mode, ProxyConfig},
    iptables, ipvs,
    metrics::Metrics,
    model::Family,
    nftables::{apply::Table, batch::Batch, look, socket::NftSocket},
    start::{kernel_has_ipv6, layout},
    userspace,
};

/// kube-proxy's own table in its nftables mode.
const KUBE_PROXY_TABLE: &str = "kube-proxy";

/// Removes what other modes and kube-proxy left of a family, in the network namespace of the calling
/// thread. What can't be removed is logged. After `stop` no more is begun.
pub(crate) fn remove_others(
    mode: Mode,
    family: Family,
    metrics: Option<&Metrics>,
    stop: &CancellationToken,
) -> Result<(), ProxyError> {
    let mut result = ipvs::remove_leftovers();
    if let Err(error) = &result {
        tracing::warn!(%error, "what kube-proxy's ipvs mode had stays");
    }
    let mut failed = |error: ProxyError| {
        tracing::warn!(%error, family = family.as_str(), "rules of other modes stay");
        if let Some(metrics) = metrics {
            metrics.cleanup_failed(family);
        }
        result = Err(error);
    };
    if !stop.is_cancelled()
        && let Err(error) = remove_kube_proxy_table(family)
    {
        failed(error);
    }
    if mode != Mode::Nftables
        && !stop.is_cancelled()
        && let Err(error) = remove_table(family)
    {
        failed(error);
    }
    if mode != Mode::Userspace
        && !stop.is_cancelled()
        && let Err(error) = userspace::remove_leftovers(family)
    {
        failed(ProxyError::Relays(error.to_string()));
    }
    let of_iptables = match mode {
        Mode::Iptables => iptables::cleanup_other_variant,
        _ => iptables::cleanup,
    };
    if !stop.is_cancelled()
        && let Err(error) = of_iptables(family)
    {
        failed(ProxyError::Iptables(error.to_string()));
    }
    if !stop.is_cancelled() {
        ipvs::remove_sets();
    }
    result
}

/// Removes the rules of every mode, and kube-proxy's.
///
/// # Errors
/// When something can't be removed; the rest is tried all the same.
pub(crate) fn remove_all() -> Result<(), ProxyError> {
    let mut result = Ok(());
    for family in [Family::V4, Family::V6] {
        if family == Family::V6 && !kernel_has_ipv6() {
            continue;
        }
        result = result.and(remove_table(family));
        result = result.and(remove_others(Mode::Nftables, family, None, &CancellationToken::new()));
    }
    result
}

fn remove_table(family: Family) -> Result<(), ProxyError> {
    let config = ProxyConfig::new("");
    let mut table = Table::open(layout(&config, family)).map_err(ProxyError::kernel)?;
    table.remove().map_err(ProxyError::kernel)
}

fn remove_kube_proxy_table(family: Family) -> Result<(), ProxyError> {
    let mut socket = NftSocket::open().map_err(ProxyError::kernel)?;
    if !look::has_table(&mut socket, family, KUBE_PROXY_TABLE).map_err(ProxyError::kernel)? {
        return Ok(());
    }
    let mut batch = Batch::new(family);
    batch.delete_other_table(KUBE_PROXY_TABLE);
    match socket.commit(&mut batch) {
        Err(error) if error.errno() == Some(libc::ENOENT) => Ok(()),
        Err(error) => Err(ProxyError::kernel(error)),
        Ok(()) => {
            tracing::info!(family = family.as_str(), "kube-proxy's own table is removed");
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netns::Namespace;

    #[test]
    fn what_kube_proxys_ipvs_mode_left_goes_and_others_stay() {
        let host = Namespace::new();
        host.sh("ip link add kube-ipvs0 type bridge; ip addr add 10.96.0.1/32 dev kube-ipvs0");
        // As it has them, but for the sets.
        for rule in [
            "-t nat -N KUBE-SERVICES",
            "-t nat -N KUBE-POSTROUTING",
            "-t nat -N KUBE-NODE-PORT",
            "-t nat -N KUBE-LOAD-BALANCER",
            "-t nat -N KUBE-MARK-MASQ",
            "-t nat -A PREROUTING -j KUBE-SERVICES",
            "-t nat -A OUTPUT -j KUBE-SERVICES",
            "-t nat -A POSTROUTING -j KUBE-POSTROUTING",
            "-t nat -A KUBE-SERVICES -j KUBE-LOAD-BALANCER",
            "-t nat -A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODE-PORT",
            "-t nat -A KUBE-LOAD-BALANCER -j KUBE-MARK-MASQ",
            "-t filter -N KUBE-FORWARD",
            "-t filter -N KUBE-NODE-PORT",
            "-t filter -N KUBE-PROXY-FIREWALL",
            "-t filter -N KUBE-SOURCE-RANGES-FIREWALL",
            "-t filter -N KUBE-IPVS-FILTER",
            "-t filter -N KUBE-IPVS-OUT-FILTER",
            "-t filter -A INPUT -j KUBE-IPVS-FILTER",
            "-t filter -A INPUT -j KUBE-PROXY-FIREWALL",
            "-t filter -A INPUT -j KUBE-NODE-PORT",
            "-t filter -A OUTPUT -j KUBE-IPVS-OUT-FILTER",
            "-t filter -A FORWARD -j KUBE-FORWARD",
            "-t filter -A KUBE-PROXY-FIREWALL -j KUBE-SOURCE-RANGES-FIREWALL",
            "-t filter -N MINE",
            "-t filter -A INPUT -j MINE",
        ] {
            host.sh(&format!("iptables {rule}"));
        }
        host.run(|| remove_all().unwrap());
        let left = host.sh("iptables-save; ip -o link");
        assert!(!left.contains("KUBE-") && !left.contains("kube-ipvs0"), "{left}");
        assert!(left.contains("-A INPUT -j MINE"), "{left}");
    }

    #[test]
    fn the_other_iptables_has_no_rules_beside_those_in_force() {
        let host = Namespace::new();
        // What the host calls iptables writes nftables here.
        host.sh("iptables -t nat -N KUBE-SERVICES; iptables -t nat -A OUTPUT -j KUBE-SERVICES");
        let kept = host.sh("iptables-save -t nat");
        for ipt in ["iptables-legacy -t nat", "ip6tables-legacy -t nat"] {
            host.sh(&format!(
                "{ipt} -N KUBE-SERVICES; {ipt} -A OUTPUT -j KUBE-SERVICES; \
                 {ipt} -N KUBE-SVC-ERIFXISQEP7F7OF4; {ipt} -A PREROUTING -j RETURN; \
                 {ipt} -A KUBE-SERVICES -p udp -j KUBE-SVC-ERIFXISQEP7F7OF4"
            ));
        }
        for family in [Family::V4, Family::V6] {
            let stop = CancellationToken::new();
            host.run(move || remove_others(Mode::Iptables, family, None, &stop).unwrap());
        }
        let left = host.sh("iptables-legacy-save; ip6tables-legacy-save");
        assert!(!left.contains("KUBE-"), "{left}");
        assert_eq!(left.matches("-A PREROUTING -j RETURN").count(), 2, "{left}");
        let rules = |saved: &str| saved.lines().filter(|l| !l.starts_with('#')).count();
        assert_eq!(rules(&host.sh("iptables-save -t nat")), rules(&kept));
    }

    #[test]
    fn where_nothing_is_left_nothing_is_touched() {
        let host = Namespace::new();
        // Of another program that uses iptables.
        host.sh("iptables-nft -t nat -A POSTROUTING -j RETURN; ip6tables-nft -A INPUT -j RETURN");
        let generation = || host.run(|| NftSocket::open().unwrap().generation().unwrap());
        let before = (generation(), host.sh("nft list ruleset"));
        for mode in [Mode::Userspace, Mode::Iptables, Mode::Nftables] {
            for family in [Family::V4, Family::V6] {
                let stop = CancellationToken::new();
                host.run(move || remove_others(mode, family, None, &stop).unwrap());
            }
            assert_eq!((generation(), host.sh("nft list ruleset")), before, "{mode:?}");
        }
    }

    #[test]
    fn kube_proxys_own_tables_go_and_others_stay() {
        let host = Namespace::new();
        host.sh("nft add table ip kube-proxy; nft add table ip6 kube-proxy; nft add table ip mine");
        host.run(|| remove_all().unwrap());
        assert_eq!(host.sh("nft list tables").trim(), "table ip mine");
        host.run(|| remove_all().unwrap());
    }
}
