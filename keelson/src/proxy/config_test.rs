//! What the settings come to, and how wrong ones are told.

use serde_json::json;

use super::*;
use crate::config::ProxyFlags;

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
    let bridge =
        json!({"detectLocalMode": "BridgeInterface", "detectLocal": {"bridgeInterface": "br0"}});
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

/// What reading this file fails with, after the file's name.
fn refused(body: &str, flags: &ProxyFlags) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.yaml");
    let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
    std::fs::write(&path, format!("{head}{body}")).unwrap();
    let read = ProxySettings::read(Some(&path), flags).and_then(|settings| {
        super::super::node_name(&settings)?;
        config(&settings, "n", Vec::new(), None)
    });
    let error = format!("{:#}", read.unwrap_err());
    error.replace(&format!("config file {}: ", path.display()), "x.yaml: ")
}

#[test]
fn what_is_wrong_in_a_file_is_told_with_file_line_field_value_and_what_is_wanted() {
    for (body, error) in [
        (
            "conntrack: {maxPerCore: -1}\n",
            "line 3: conntrack.maxPerCore: a whole number from 0 to 4294967295 is wanted, not -1",
        ),
        (
            "conntrack:\n  min: 5000000000\noomScoreAdj: 99999999999\n",
            "line 4: conntrack.min: a whole number from 0 to 4294967295 is wanted, not 5000000000; \
             line 5: oomScoreAdj: a whole number from -1000 to 1000 is wanted, not 99999999999",
        ),
        (
            "oomScoreAdj: -2000\n",
            "line 3: oomScoreAdj: a whole number from -1000 to 1000 is wanted, not -2000",
        ),
        (
            "mode: nft\nbindAddress: 10.0.0.300\n",
            "line 3: mode: nftables, iptables or userspace is wanted, not \"nft\"; \
             line 4: bindAddress: an IP address is wanted, not \"10.0.0.300\"",
        ),
        (
            "nodePortAddresses: [1.2.3.4]\nclusterCIDR: 10.0.0.0\n",
            "line 3: nodePortAddresses: ranges of addresses such as 10.1.0.0/16 are wanted, not \
             \"1.2.3.4\"; \
             line 4: clusterCIDR: ranges of addresses such as 10.1.0.0/16 are wanted, not \
             \"10.0.0.0\"",
        ),
        (
            "iptables: {masqueradeBit: 1}\nnftables:\n  masqueradeBit: 99\n",
            "line 5: nftables.masqueradeBit: a bit from 0 to 31 is wanted, not 99",
        ),
        (
            "iptables: {masqueradeBit: 99}\nnftables:\n  masqueradeBit: 1\n",
            "line 3: iptables.masqueradeBit: a bit from 0 to 31 is wanted, not 99",
        ),
        (
            "mode: ''\ndetectLocalMode: BridgeInterface\n",
            "line 4: detectLocal.bridgeInterface: an interface's name is wanted with \
             BridgeInterface, not \"\"",
        ),
        (
            "hostnameOverride: Foo_Bar\n",
            "line 3: hostnameOverride: a name of lower-case letters, digits, '-' and '.' is wanted, \
             not \"Foo_Bar\"",
        ),
        (
            "healthzBindAddress: localhost\n",
            "line 3: healthzBindAddress: an IP address with a port, such as 127.0.0.1:10256, is \
             wanted, not \"localhost\"",
        ),
        ("hostnameOverride: '  '\n", "line 3: hostnameOverride: a name is wanted, not blanks"),
    ] {
        assert_eq!(refused(body, &ProxyFlags::default()), format!("x.yaml: {error}"));
    }
}

#[test]
fn what_is_wrong_in_a_flag_is_not_said_of_the_file() {
    let flags = ProxyFlags { proxy_mode: Some("nft".into()), ..ProxyFlags::default() };
    assert_eq!(
        refused("mode: iptables\nbindAddress: here\n", &flags),
        "x.yaml: line 4: bindAddress: an IP address is wanted, not \"here\"; \
         flags: mode: nftables, iptables or userspace is wanted, not \"nft\""
    );
    let flags = ProxyFlags { hostname_override: Some("a_b".into()), ..ProxyFlags::default() };
    let error = refused("hostnameOverride: n1\n", &flags);
    assert!(error.starts_with("flags: hostnameOverride: ") && error.contains("a_b"), "{error}");
}

#[test]
fn what_is_likely_an_oversight_is_told() {
    let of = |fields| doubt(&configured(fields).unwrap().detect_local).unwrap_or_default();
    let bridge = |name| json!({"detectLocalMode": "BridgeInterface", "detectLocal": {"bridgeInterface": name}});
    assert!(of(json!({})).contains("clusterCIDR"));
    assert!(of(bridge("no-such-bridge")).contains("\"no-such-bridge\""));
    for clear in
        [json!({"clusterCIDR": "10.0.0.0/8"}), bridge("lo"), json!({"detectLocalMode": "NodeCIDR"})]
    {
        assert_eq!(of(clear), "");
    }
}
