//! Every row of the table of features, explained: the answer is the one that packets get, and the
//! kernel has the rules that the answer names.

use k8s_openapi::api::core::v1::Node;
use serde_json::json;

use super::{
    backends::config,
    features::{Expect, Own, Question, Seen},
    fixture::{Addresses, From, Net},
    rows::table,
};
use crate::{
    DetectLocal, Mode, Objects, Packet, ProxyConfig, Snapshot, Verdict,
    explain::{Explanation, Origin},
    model::{Family, Protocol},
    start,
};

everywhere!(every_feature_is_explained_as_packets_go);

fn every_feature_is_explained_as_packets_go(mode: Mode, family: Family) {
    let net = Net::new();
    let mut failures = Vec::new();
    for config in configs(mode) {
        let snapshot = snapshot(&config, family);
        in_force(&net, &config, family);
        for (n, feature) in table().into_iter().enumerate() {
            if with(mode, feature.config) != config {
                continue;
            }
            let own = Own { addresses: Addresses(family), n: u8::try_from(n).unwrap() + 1 };
            let mut checked = None;
            for question in &feature.questions {
                let to = (question.to)(own);
                for protocol in [Protocol::Tcp, Protocol::Udp] {
                    let packet = Packet {
                        from: address(question.from, own.addresses),
                        from_pod_here: is_pod(question.from, &config.detect_local),
                        to: to.ip(),
                        port: to.port(),
                        protocol,
                    };
                    let mut answer = snapshot.explain(&packet);
                    let expect = (question.but)(mode, family).unwrap_or(question.expect);
                    let expect = expect.for_backend(mode, protocol);
                    if let Some(wrong) = wrong(&answer, expect, question, own) {
                        failures.push(format!("{}: {wrong}\n{answer}", feature.says));
                    }
                    // Reading all rules for each answer would take long.
                    if protocol == Protocol::Tcp && checked.replace(to) != Some(to) {
                        answer = net.host.run({
                            let (config, mut answer) = (config.clone(), answer.clone());
                            move || {
                                self::snapshot(&config, family).check(&mut answer).unwrap();
                                answer
                            }
                        });
                        if answer.kernel.as_ref().is_some_and(|found| !found.is_empty()) {
                            failures.push(format!("{}: not in the kernel\n{answer}", feature.says));
                        }
                    }
                }
            }
        }
        clear(&net, &config, family);
    }
    assert!(failures.is_empty(), "{} answers:\n{}", failures.len(), failures.join("\n"));
}

fn with(mode: Mode, change: fn(&mut ProxyConfig)) -> ProxyConfig {
    let mut config = config(mode);
    change(&mut config);
    config
}

#[test]
fn what_the_kernel_lacks_is_named() {
    let config = config(Mode::Nftables);
    let (net, family) = (Net::new(), Family::V4);
    in_force(&net, &config, family);
    let own = Own { addresses: Addresses(family), n: 1 };
    let to = own.cluster();
    let element = format!("endpoints {{ {to} . tcp . 80 . 0x00000000 }}");
    net.host.sh(&format!("nft delete element ip keelson-proxy '{element}'"));
    let packet = Packet {
        from: Addresses(family).client(1),
        from_pod_here: false,
        to,
        port: 80,
        protocol: Protocol::Tcp,
    };
    let answer = net.host.run(move || {
        let snapshot = snapshot(&config, family);
        let mut answer = snapshot.explain(&packet);
        snapshot.check(&mut answer).unwrap();
        answer
    });
    let found = answer.kernel.unwrap();
    let lacks = format!("map endpoints lacks {{ {to} . tcp . 80 . 0x00000000 : ");
    assert!(found.len() == 1 && found[0].starts_with(&lacks), "{found:?}");
    assert!(!found[0].contains("0x00000001"), "the others are there: {found:?}");
}

/// Each configuration that rows have, once.
fn configs(mode: Mode) -> Vec<ProxyConfig> {
    let mut configs: Vec<ProxyConfig> = Vec::new();
    for feature in table() {
        let config = with(mode, feature.config);
        if !configs.contains(&config) {
            configs.push(config);
        }
    }
    configs
}

/// What there is with all rows of a configuration.
fn snapshot(config: &ProxyConfig, family: Family) -> Snapshot {
    let addresses = Addresses(family);
    let node: Node = serde_json::from_value(json!({
        "metadata": {"name": "here", "labels": {"topology.kubernetes.io/zone": "zone-a"}},
        "status": {"addresses": [{"type": "InternalIP", "address": addresses.node()}]}}))
    .unwrap();
    let mut objects = Objects { node: Some(node), ..Objects::default() };
    for (n, feature) in table().into_iter().enumerate() {
        if with(config.mode, feature.config) != *config {
            continue;
        }
        let own = Own { addresses, n: u8::try_from(n).unwrap() + 1 };
        let service = own.service((feature.service)(own));
        objects.services.push(serde_json::from_value(service).unwrap());
        let ranges = own.ranges(&(feature.ranges)(own));
        objects.service_cidrs.push(serde_json::from_value(ranges).unwrap());
        for (part, slice) in feature.slices.iter().enumerate() {
            objects.slices.push(serde_json::from_value(own.slice(part, slice)).unwrap());
        }
    }
    let config = ProxyConfig { families: vec![family], ..config.clone() };
    let (snapshot, _) = Snapshot::new(config, &objects);
    snapshot.with_local_addresses(vec![
        addresses.node(),
        addresses.node_other(),
        addresses.loopback(),
    ])
}

/// Puts the rules into the kernel. Relays leave none to be asked for.
fn in_force(net: &Net, config: &ProxyConfig, family: Family) {
    if config.mode == Mode::Userspace {
        return;
    }
    let config = config.clone();
    net.host.run(move || {
        let snapshot = snapshot(&config, family);
        let mut chosen = start::choose(&snapshot.config).unwrap();
        assert_eq!(chosen.mode, config.mode);
        let applied = chosen.backends[0].synchronize(snapshot.goal()).unwrap();
        assert!(applied.refused.is_empty(), "{:?}", applied.refused);
    });
}

fn clear(net: &Net, config: &ProxyConfig, family: Family) {
    if config.mode == Mode::Userspace {
        return;
    }
    let config = ProxyConfig { families: vec![family], ..config.clone() };
    net.host.run(move || {
        start::choose(&config).unwrap().backends[0].remove().unwrap();
    });
}

fn address(from: From, addresses: Addresses) -> std::net::IpAddr {
    match from {
        From::Client(n) => addresses.client(n),
        From::Node => addresses.node(),
        From::Pod(n) => addresses.pod(n),
    }
}

/// Whether who explains knows that it is a pod: by its interface here.
fn is_pod(from: From, detect_local: &DetectLocal) -> bool {
    match (from, detect_local) {
        (From::Pod(n), DetectLocal::Interface(name)) => *name == format!("pod{n}"),
        (From::Pod(_), _) => true,
        _ => false,
    }
}

/// What is wrong with an answer, given what comes of such packets.
fn wrong(answer: &Explanation, expect: Expect, question: &Question, own: Own) -> Option<String> {
    let to = (question.to)(own).ip();
    let to_the_node =
        [own.addresses.node(), own.addresses.node_other(), own.addresses.loopback()].contains(&to);
    let verdict = answer.verdict;
    let fits = match expect {
        // Nobody's business.
        Expect::By(..) if matches!(question.expect, Expect::Unclaimed(_)) => {
            return (verdict != Verdict::NotServices)
                .then(|| format!("{:?}: packets get through", question.from));
        }
        Expect::By(..) => verdict == Verdict::Forwarded,
        // Where nobody listens on the node, it is the kernel that refuses.
        Expect::Refused => {
            verdict == Verdict::Rejected || to_the_node && verdict == Verdict::NotServices
        }
        Expect::Closed => verdict == Verdict::Dropped,
        Expect::Silence if matches!(question.expect, Expect::Unclaimed(_)) => {
            verdict == Verdict::Dropped
        }
        _ => matches!(verdict, Verdict::Dropped | Verdict::NotServices),
    };
    if !fits {
        return Some(format!("{:?}: {expect:?} is what packets get", question.from));
    }
    let Expect::By(endpoints, seen) = expect else { return None };
    let expected: std::collections::BTreeSet<String> = endpoints
        .iter()
        .map(|n| match *n {
            super::fixture::ON_NODE => own.addresses.node().to_string(),
            n => own.addresses.pod(n).to_string(),
        })
        .collect();
    let eligible = answer.endpoints.iter().filter(|endpoint| endpoint.eligible);
    let found = eligible
        .map(|endpoint| endpoint.endpoint.parse::<std::net::SocketAddr>().unwrap().ip().to_string())
        .collect();
    if expected != found {
        return Some(format!("{:?}: to {expected:?}", question.from));
    }
    // The node's own address is its address, hidden or not.
    let hidden = answer.masquerade.is_some_and(|(hidden, _)| hidden);
    let right = answer.origin == Origin::Node || hidden == (seen == Seen::Node);
    (!right).then(|| format!("{:?}: endpoints see the {seen:?}", question.from))
}
