//! What is in force, without what packets and chance put there: equal for equal objects, however
//! they came about.

use std::collections::{BTreeMap, BTreeSet};

use super::{nftables::Table, world::PORTS};
use crate::{
    Mode, model::Family, netns::Namespace, nftables::layout::DynamicChain,
    packets::fixture::Addresses,
};

/// Maps that have an index in their keys.
const ROWS: [&str; 4] =
    ["endpoints", "inside-endpoints", "nodeport-endpoints", "nodeport-inside-endpoints"];
/// Chains with a line for each Service, which come in any order.
const SHARED: [&str; 5] = [
    "KUBE-SERVICES",
    "KUBE-NODEPORTS",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-PROXY-FIREWALL",
    "KUBE-FIREWALL",
];

/// A namespace with the node's addresses and nothing else.
pub(super) fn empty_node(family: Family) -> Namespace {
    let host = Namespace::new();
    let prefix = if family == Family::V4 { 32 } else { 128 };
    let add = |address| format!("ip addr add {address}/{prefix} dev lo");
    let addresses = Addresses(family);
    let own = addresses.nodes().filter(|address| *address != addresses.loopback());
    host.sh(&own.map(add).collect::<Vec<_>>().join("; "));
    host
}

/// Everything that the proxy put into force.
pub(super) fn in_force(host: &Namespace, mode: Mode, family: Family) -> BTreeSet<String> {
    match mode {
        Mode::Nftables => nftables(&Table::read(host, family)),
        Mode::Iptables => iptables(host, family),
        Mode::Userspace => userspace(host, family),
    }
}

fn nftables(table: &Table) -> BTreeSet<String> {
    let mut lines = BTreeSet::new();
    for name in ROWS {
        let rows = table.rows(name);
        lines.extend(rows.iter().map(|(key, endpoints)| format!("{name} {key}: {endpoints:?}")));
    }
    // What nothing leads to any more goes with a later change, or waits for its next use.
    let used = table.used_chains();
    let in_use = |name: &str| DynamicChain::parse(name).is_none() || used.contains(name);
    let sets = table.sets.iter().filter(|(name, _)| !ROWS.contains(&&***name) && in_use(name));
    for (name, elements) in sets.filter(|(name, _)| *name != "affinity") {
        lines.insert(format!("set {name}"));
        lines.extend(elements.iter().map(|(key, value)| format!("{name} {key}: {value}")));
    }
    let chains = table.chains.iter().filter(|(name, _)| in_use(name));
    lines.extend(chains.map(|(name, chain)| format!("chain {name}: {chain:?}")));
    lines
}

fn iptables(host: &Namespace, family: Family) -> BTreeSet<String> {
    let save = if family == Family::V4 { "iptables-save" } else { "ip6tables-save" };
    let mut lines = BTreeSet::new();
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    let mut table = String::new();
    for line in host.sh(save).lines().filter(|line| !line.starts_with('#')) {
        if let Some(name) = line.strip_prefix('*') {
            table = name.to_owned();
        }
        // Without counters, and with its place where that matters: in its chain, or among its like.
        let line = line.split(" [").next().unwrap();
        let mut place = 0;
        if let Some(rule) = line.strip_prefix("-A ") {
            let chain = rule.split(' ').next().unwrap();
            let mut next = |among: &str| {
                let place = places.entry(format!("{table} {among}")).or_default();
                *place += 1;
                *place
            };
            place = next(chain);
            if SHARED.contains(&chain) && !line.contains("must be the last") {
                place = next(line);
            }
        }
        lines.insert(format!("{table} {place} {line}"));
    }
    lines
}

fn userspace(host: &Namespace, family: Family) -> BTreeSet<String> {
    let version = if family == Family::V4 { 4 } else { 6 };
    let routes = host.sh(&format!("ip -{version} route show table local proto 75"));
    let sockets = host.sh("ss -Hlntu");
    let listeners = sockets.lines().map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        format!("{} {}", words[0], words[4])
    });
    // The node's own server, and where relays send from, are no Service's.
    let served = |line: &String| {
        let port = line.rsplit(':').next().unwrap().parse().unwrap();
        PORTS.contains(&port) || (30_000..32_000).contains(&port)
    };
    let listeners = listeners.filter(served);
    listeners.chain(routes.lines().map(|line| line.trim().to_owned())).collect()
}
