//! Other programs that edit the rules: each kind of edit is noticed, mended and counted.

use std::time::Duration;

use serde_json::json;

use super::{
    cluster::{Api, Running},
    features::{Own, Part, pod},
    fixture::{Addresses, Net, listed},
    load_test::{rules_of, start},
};
use crate::{Mode, ProxyConfig, model::Family, until::until};

everywhere!(every_kind_of_edit_is_noticed_mended_and_counted);

/// What another program does to the rules.
pub(super) fn edits(mode: Mode, family: Family) -> Vec<String> {
    let v4 = family == Family::V4;
    let (one, ten) = if v4 { ("10.96.0.1", "10.0.0.1") } else { ("fd00:96::1", "fd00:10::1:9") };
    match mode {
        Mode::Nftables => [
            "flush ruleset",
            "delete table X",
            "flush table X",
            "flush map X services",
            "delete element X endpoints { ONE . tcp . 80 . 0x00000000 }",
            "add element X endpoints { ONE . tcp . 80 . 0x00000007 : TEN . 80 }",
            "delete element X services { ONE . tcp . 80 }",
            "add element X services { TEN . tcp . 80 : drop }",
            "add element X cluster-ips { TEN }",
            "add element X service-ranges { TEN }",
            "flush chain X endpoints-2",
            "add rule X nat-output accept",
            "insert rule X nat-prerouting accept",
            "add chain X intruder",
            "add set X intruder { type inet_service; }",
        ]
        .map(|edit| edit.replace("ONE", one).replace("TEN", ten))
        .map(|edit| nft(&edit, family))
        .into(),
        Mode::Iptables => [
            "RUN -t nat -F",
            "printf '*nat\\nCOMMIT\\n' | RUN-restore",
            "printf '*filter\\nCOMMIT\\n' | RUN-restore",
            "RUN -t nat -F KUBE-SERVICES",
            "RUN -t nat -D PREROUTING 1",
            "RUN -t nat -A KUBE-SERVICES -d TEN -j ACCEPT",
            "RUN -t nat -F KUBE-POSTROUTING",
            "RUN -t mangle -X KUBE-PROXY-CANARY",
        ]
        .map(|edit| edit.replace("TEN", ten))
        .map(|edit| edit.replace("RUN", if v4 { "iptables" } else { "ip6tables" }))
        .into(),
        Mode::Userspace => {
            vec![format!("ip -{} route del local {one} dev lo", if v4 { 4 } else { 6 })]
        }
    }
}

/// An edit of the proxy's table.
fn nft(edit: &str, family: Family) -> String {
    let table = if family == Family::V4 { "ip keelson-proxy" } else { "ip6 keelson-proxy" };
    format!("nft '{}'", edit.replace('X', table))
}

/// What another program does to what rules and elements stand in.
fn declarations(mode: Mode, family: Family) -> Vec<String> {
    let edits = ["chain X filter-forward { policy drop; }", "add table X { flags dormant; }"];
    match mode {
        Mode::Nftables => edits.map(|edit| nft(edit, family)).into(),
        Mode::Iptables | Mode::Userspace => Vec::new(),
    }
}

fn every_kind_of_edit_is_noticed_mended_and_counted(mode: Mode, family: Family) {
    let net = Net::new();
    let own = Own { addresses: Addresses(family), n: 1 };
    let api = Api::new();
    api.set(own.service(json!({"spec": {"type": "NodePort"}})));
    api.set(own.slice(0, &Part(8080, vec![pod(1), pod(2)])));
    let running = start(&net, &api, mode, family);
    let rules = || sorted(&listed(&net, mode, family));
    let before = rules();
    // Relays look after their own.
    let counter = match mode {
        Mode::Userspace => "keelson_proxy_relay_lost_routes_total",
        _ => "keelson_proxy_drift_total",
    };
    for edit in edits(mode, family).into_iter().chain(declarations(mode, family)) {
        let counted = running.count(counter);
        net.host.sh(&edit);
        until(&format!("{edit} is counted"), || running.count(counter) > counted);
        until(&format!("{edit} is mended"), || rules() == before);
    }
    running.stop();
}

#[test]
fn an_edit_by_iptables_nft_is_not_waited_for() {
    for family in [Family::V4, Family::V6] {
        let net = Net::new();
        let iptables = if family == Family::V4 { "iptables" } else { "ip6tables" };
        let version = net.host.sh(&format!("{iptables} --version"));
        assert!(version.contains("nf_tables"), "the kernel tells of nothing else: {version}");
        let own = Own { addresses: Addresses(family), n: 1 };
        let api = Api::new();
        api.set(own.service(json!({"spec": {"type": "NodePort"}})));
        api.set(own.slice(0, &Part(8080, vec![pod(1), pod(2)])));
        let rarely = Duration::from_secs(3600);
        let config = ProxyConfig { sync_period: rarely, ..rules_of(Mode::Iptables, family) };
        let running = Running::start(&net.host, config, &api);
        let jumps = || net.host.sh(&format!("{iptables}-save -t nat")).matches("-j KUBE-S").count();
        until("the first sync", || jumps() > 0);
        let before = jumps();
        // Its own changes are none of others.
        api.set(own.slice(0, &Part(8080, vec![pod(1), pod(2), pod(3)])));
        until("a change", || jumps() > before);
        let before = jumps();
        net.host.sh(&format!("{iptables} -t nat -F KUBE-SERVICES"));
        until("it is mended", || jumps() == before);
        assert_eq!(running.count("keelson_proxy_drift_total"), 1);
        running.stop();
    }
}

/// Elements come in any order.
fn sorted(listing: &str) -> Vec<String> {
    let split = listing.split([' ', '\n', '\t', ',']);
    let mut words: Vec<String> = split.filter(|w| !w.is_empty()).map(str::to_owned).collect();
    words.sort_unstable();
    words
}
