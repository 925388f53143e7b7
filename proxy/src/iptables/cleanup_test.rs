//! What a clean-up takes away, and what it leaves; node ports on loopback, whose setting it sets back.

use super::{
    Settings, Variant, cleanup,
    golden::settings,
    kernel_test::{ALL, Proxy, everything, program, saved},
};
use crate::{model::Family, netns::Namespace};

#[test]
fn a_clean_up_leaves_others_alone() {
    let host = Namespace::new();
    let foreign = "iptables-nft -t nat -A PREROUTING -s 203.0.113.1 -j ACCEPT; \
         iptables-legacy -t nat -N CNI-HOSTPORT-DNAT; iptables-legacy -N KUBE-KUBELET-CANARY";
    host.sh(foreign);
    let listed = |family, variant| saved(&host, family, variant);
    let before = ALL.map(|(family, variant)| listed(family, variant).contains("KUBE-SERVICES"));
    assert_eq!(before, [false; 4]);
    for (family, variant) in ALL {
        let mut proxy = Proxy::start(&host, Settings { variant, ..settings(family) });
        proxy.synchronize();
        everything(family).into_iter().for_each(|object| drop(proxy.apply(object)));
    }
    // As an older kube-proxy has it.
    host.sh(
        "iptables-nft -A INPUT -m comment --comment 'kubernetes service portals' -j KUBE-SERVICES",
    );
    host.sh("sysctl -qw net.ipv4.conf.all.route_localnet=0");
    for _ in 0..2 {
        host.run(|| [Family::V4, Family::V6].map(|family| cleanup(family).unwrap()));
    }
    for (family, variant) in ALL {
        let left = listed(family, variant);
        let ours: Vec<&str> = left
            .lines()
            .filter(|l| l.contains("KUBE-") && !l.contains("KUBE-KUBELET-CANARY"))
            .collect();
        assert!(ours.is_empty(), "{ours:?}");
    }
    assert!(listed(Family::V4, Variant::Nft).contains("-s 203.0.113.1/32 -j ACCEPT"));
    assert!(listed(Family::V4, Variant::Legacy).contains("CNI-HOSTPORT-DNAT"));
    assert!(listed(Family::V4, Variant::Legacy).contains("KUBE-KUBELET-CANARY"));
}

#[test]
fn a_clean_up_leaves_rules_that_lead_to_a_proxys_chain_to_their_owner() {
    for variant in [Variant::Nft, Variant::Legacy] {
        let host = Namespace::new();
        let mut proxy = Proxy::start(&host, Settings { variant, ..settings(Family::V4) });
        proxy.synchronize();
        everything(Family::V4).into_iter().for_each(|object| drop(proxy.apply(object)));
        let rules = saved(&host, Family::V4, variant);
        let service = rules.lines().find_map(|line| line.strip_prefix(":KUBE-SVC-")).unwrap();
        let service = format!("KUBE-SVC-{}", service.split(' ').next().unwrap());
        let ipt = program(Family::V4, variant);
        // As the portmap plugin has it, told to use kube-proxy's chain.
        let foreign = [
            "-A CNI-HOSTPORT-SETMARK -p tcp -m tcp --dport 9999 -j KUBE-MARK-MASQ".to_owned(),
            format!("-A CNI-HOSTPORT-SETMARK -p udp -j {service}"),
        ];
        host.sh(&format!("{ipt} -t nat -N CNI-HOSTPORT-SETMARK"));
        foreign.iter().for_each(|rule| drop(host.sh(&format!("{ipt} -t nat {rule}"))));
        host.sh("sysctl -qw net.ipv4.conf.all.route_localnet=0");
        for _ in 0..2 {
            host.run(|| cleanup(Family::V4).unwrap());
            let rules = saved(&host, Family::V4, variant);
            let left: Vec<&str> = rules.lines().filter(|l| l.contains("KUBE-")).collect();
            let (mark, service) = (":KUBE-MARK-MASQ -".to_owned(), format!(":{service} -"));
            assert_eq!(left, [&mark, &service, &foreign[0], &foreign[1]], "{variant:?}");
        }
        // Without it they go too.
        host.sh(&format!("{ipt} -t nat -F CNI-HOSTPORT-SETMARK"));
        host.run(|| cleanup(Family::V4).unwrap());
        assert!(!saved(&host, Family::V4, variant).contains("KUBE-"), "{variant:?}");
    }
}

#[test]
fn loopback_is_guarded_before_node_ports_answer_there() {
    let route_localnet = "cat /proc/sys/net/ipv4/conf/all/route_localnet";
    for (localhost_node_ports, family, routed) in
        [(true, Family::V4, "1"), (false, Family::V4, "0"), (true, Family::V6, "0")]
    {
        let host = Namespace::new();
        // As a kubelet has it.
        host.sh("iptables -N KUBE-FIREWALL; iptables -A KUBE-FIREWALL -s 203.0.113.9 -j DROP");
        let with = Settings { localhost_node_ports, ..settings(family) };
        let mut proxy = Proxy::start(&host, with);
        proxy.synchronize();
        assert_eq!(host.sh(route_localnet).trim(), routed);
        let rules = saved(&host, Family::V4, Variant::Host);
        assert_eq!(rules.contains("block incoming localnet connections"), routed == "1");
        assert!(rules.contains("-A KUBE-FIREWALL -s 203.0.113.9/32 -j DROP"), "{rules}");
    }
}

#[test]
fn a_clean_up_sets_back_what_the_mode_has_set_and_nothing_else() {
    for (before, variant) in
        [("0", Variant::Nft), ("0", Variant::Legacy), ("1", Variant::Nft), ("1", Variant::Legacy)]
    {
        let host = Namespace::new();
        let setting = "net.ipv4.conf.all.route_localnet";
        host.sh(&format!("sysctl -qw {setting}={before}"));
        for _ in 0..2 {
            // A second start finds the setting as the first one left it.
            let mut proxy = Proxy::start(&host, Settings { variant, ..settings(Family::V4) });
            proxy.synchronize();
            assert_eq!(host.sh(&format!("sysctl -n {setting}")).trim(), "1");
        }
        host.run(|| [Family::V6, Family::V4].map(|family| cleanup(family).unwrap()));
        assert_eq!(host.sh(&format!("sysctl -n {setting}")).trim(), before, "{variant:?}");
        let left = saved(&host, Family::V4, variant);
        assert_eq!(left.contains("block incoming localnet"), before == "1", "{left}");
        assert!(!left.contains("KEELSON-"), "{left}");
    }
}

#[test]
fn a_start_without_node_ports_on_loopback_sets_back_what_another_has_set() {
    for (before, variant) in [("0", Variant::Nft), ("0", Variant::Legacy), ("1", Variant::Nft)] {
        let host = Namespace::new();
        let setting = "net.ipv4.conf.all.route_localnet";
        host.sh(&format!("sysctl -qw {setting}={before}"));
        for (localhost_node_ports, expected) in [(true, "1"), (false, before), (false, before)] {
            let with = Settings { variant, localhost_node_ports, ..settings(Family::V4) };
            let mut proxy = Proxy::start(&host, with);
            proxy.synchronize();
            assert_eq!(host.sh(&format!("sysctl -n {setting}")).trim(), expected, "{variant:?}");
            let rules = saved(&host, Family::V4, variant);
            // Who else has set it needs the guard still.
            assert_eq!(rules.contains("block incoming localnet"), expected == "1", "{rules}");
            let noted = rules.contains("KEELSON-LOCALNET");
            assert_eq!(noted, localhost_node_ports && before == "0", "{rules}");
        }
    }
}
