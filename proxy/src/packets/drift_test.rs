//! Other programs that edit the rules: each kind of edit is noticed, mended and counted.

use serde_json::json;

use super::{
    cluster::Api,
    features::{Own, Part, pod},
    fixture::{Addresses, Net, listed},
    load_test::start,
};
use crate::{Mode, model::Family, until::until};

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
            "flush chain X endpoints-2",
            "add rule X nat-output accept",
            "insert rule X nat-prerouting accept",
            "add chain X intruder",
        ]
        .map(|edit| edit.replace("ONE", one).replace("TEN", ten))
        .map(|edit| edit.replace('X', &format!("{} keelson-proxy", if v4 { "ip" } else { "ip6" })))
        .map(|edit| format!("nft '{edit}'"))
        .into(),
        Mode::Iptables => [
            "RUN -t nat -F",
            "RUN -t nat -F; RUN -t nat -X",
            "RUN -t filter -F; RUN -t filter -X",
            "RUN -t nat -F KUBE-SERVICES",
            "RUN -t nat -D PREROUTING 1",
            "RUN -t nat -A KUBE-SERVICES -d TEN -j ACCEPT",
            "RUN -t nat -F KUBE-POSTROUTING",
            "RUN -t mangle -F; RUN -t mangle -X KUBE-PROXY-CANARY",
        ]
        .map(|edit| edit.replace("TEN", ten))
        .map(|edit| edit.replace("RUN", if v4 { "iptables" } else { "ip6tables" }))
        .into(),
        Mode::Userspace => {
            vec![format!("ip -{} route del local {one} dev lo", if v4 { 4 } else { 6 })]
        }
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
    for edit in edits(mode, family) {
        let counted = running.count(counter);
        net.host.sh(&edit);
        until(&format!("{edit} is counted"), || running.count(counter) > counted);
        until(&format!("{edit} is mended"), || rules() == before);
    }
    running.stop();
}

/// Elements come in any order.
fn sorted(listing: &str) -> Vec<String> {
    let split = listing.split([' ', '\n', '\t', ',']);
    let mut words: Vec<String> = split.filter(|w| !w.is_empty()).map(str::to_owned).collect();
    words.sort_unstable();
    words
}
