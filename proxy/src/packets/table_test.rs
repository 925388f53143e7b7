//! Runs the table of features.

use std::{
    collections::BTreeSet,
    sync::mpsc::{self, Receiver},
    time::{Duration, Instant},
};

use super::{
    backends::{Proxy, config},
    features::{Expect, Feature, Own, Question, Seen},
    fixture::{Addresses, Answer, From, Net},
    rows::table,
};
use crate::{
    Mode,
    iptables::Variant,
    model::{Family, Protocol},
};

/// The most connections until every endpoint has been seen. With three endpoints one is missed
/// once in ten million times.
const TRIES: usize = 40;
/// A refusal that takes longer was found by a second try.
const AT_ONCE: Duration = Duration::from_millis(800);

everywhere!(every_feature_does_as_documented);

fn every_feature_does_as_documented(mode: Mode, family: Family) {
    run_table(mode, family, &[Protocol::Tcp, Protocol::Udp]);
}

#[test]
fn every_feature_does_as_documented_by_iptables_legacy_too() {
    for family in [Family::V4, Family::V6] {
        run_table_by(Variant::Legacy, Mode::Iptables, family, &[Protocol::Tcp, Protocol::Udp]);
    }
}

/// Asks every question by each of these protocols.
pub(super) fn run_table(mode: Mode, family: Family, protocols: &[Protocol]) {
    run_table_by(Variant::Host, mode, family, protocols);
}

fn run_table_by(variant: Variant, mode: Mode, family: Family, protocols: &[Protocol]) {
    let net = Net::new();
    let mut failures = Vec::new();
    let mut running: Option<(crate::ProxyConfig, Proxy<'_>)> = None;
    for (n, feature) in table().into_iter().enumerate() {
        let mut wanted = config(mode);
        (feature.config)(&mut wanted);
        let proxy = match running.take() {
            Some((has, proxy)) if has == wanted => proxy,
            other => {
                if let Some((_, proxy)) = other {
                    proxy.clear();
                }
                let proxy = Proxy::start_by(variant, &net.host, &wanted, family);
                proxy.synchronize();
                proxy
            }
        };
        let own = Own { addresses: Addresses(family), n: u8::try_from(n).unwrap() + 1 };
        proxy.set(own.ranges(&(feature.ranges)(own)));
        // In this order only the Service leads to a commit of rules.
        for (part, slice) in feature.slices.iter().enumerate() {
            proxy.set(own.slice(part, slice));
        }
        proxy.set(own.service((feature.service)(own)));
        failures.extend(failures_of(&net, &feature, own, mode, protocols));
        proxy.remove("ServiceCIDR", &own.n.to_string());
        proxy.remove("Service", &own.n.to_string());
        for part in 0..feature.slices.len() {
            proxy.remove("EndpointSlice", &format!("{}-{part}", own.n));
        }
        running = Some((wanted, proxy));
    }
    assert!(failures.is_empty(), "{} of the answers:\n{}", failures.len(), failures.join("\n"));
}

fn failures_of(
    net: &Net,
    feature: &Feature,
    own: Own,
    mode: Mode,
    protocols: &[Protocol],
) -> Vec<String> {
    let mut failures = Vec::new();
    let mut fail = |question: &Question, protocol, expected: &dyn std::fmt::Debug, found| {
        let to = (question.to)(own);
        let Question { from, .. } = question;
        failures.push(format!(
            "{}: {from:?} to {protocol} {to}: {found}, not {expected:?}",
            feature.says
        ));
    };
    let mut silent: Vec<(&Question, Protocol, Expect, Receiver<Answer>)> = Vec::new();
    for question in &feature.questions {
        let but = (question.but)(mode, own.addresses.0);
        for &protocol in protocols {
            let expect = but.unwrap_or(question.expect).for_backend(mode, protocol);
            let to = (question.to)(own);
            match expect {
                Expect::By(endpoints, seen) => {
                    let allowed = pairs(feature, endpoints);
                    match ask_all(net, question.from, protocol, to, &allowed, seen) {
                        Ok(()) => {}
                        Err(found) => fail(question, protocol, &expect, found),
                    }
                }
                // Nobody waits for one silence after another.
                Expect::Silence => {
                    silent.push((
                        question,
                        protocol,
                        expect,
                        later(net, question.from, protocol, to),
                    ));
                }
                _ => {
                    let begin = Instant::now();
                    let found = net.ask(question.from, protocol, to);
                    // The kernel doesn't believe an ICMP error while the client is still calling
                    // `connect`; iptables answers TCP so, as kube-proxy has it, and SCTP knows no
                    // other refusal.
                    let slow = protocol == Protocol::Sctp
                        || mode == Mode::Iptables && protocol == Protocol::Tcp;
                    if begin.elapsed() > AT_ONCE && !slow {
                        fail(question, protocol, &expect, format!("{:?} late", begin.elapsed()));
                    }
                    let expected =
                        if expect == Expect::Closed { Answer::Closed } else { Answer::Refused };
                    if found != expected {
                        fail(question, protocol, &expected, format!("{found:?}"));
                    }
                }
            }
        }
    }
    for (question, protocol, expect, answer) in silent {
        let found = answer.recv().unwrap();
        if found != Answer::Silence {
            fail(question, protocol, &expect, format!("{found:?}"));
        }
    }
    failures
}

fn later(net: &Net, from: From, protocol: Protocol, to: std::net::SocketAddr) -> Receiver<Answer> {
    let (done, answer) = mpsc::channel();
    net.ask_meanwhile(from, protocol, to, done);
    answer
}

/// These endpoints with the ports of the slices that they are in.
fn pairs(feature: &Feature, endpoints: &[u8]) -> BTreeSet<(u8, u16)> {
    let all =
        feature.slices.iter().flat_map(|part| part.1.iter().map(move |pod| (pod.number(), part.0)));
    all.filter(|(n, _)| endpoints.contains(n)).collect()
}

/// Connects until all have answered.
fn ask_all(
    net: &Net,
    from: From,
    protocol: Protocol,
    to: std::net::SocketAddr,
    allowed: &BTreeSet<(u8, u16)>,
    seen: Seen,
) -> Result<(), String> {
    let mut found = BTreeSet::new();
    for _ in 0..TRIES {
        let (n, port, address) = match net.ask(from, protocol, to) {
            Answer::By(n, port, address) => (n, port, address),
            other => return Err(format!("{other:?}")),
        };
        if !allowed.contains(&(n, port)) {
            return Err(format!("answered by {n} on {port}"));
        }
        if !expected_source(from, to.ip(), seen, address) {
            return Err(format!("endpoint {n} saw {address}"));
        }
        found.insert((n, port));
        if found == *allowed {
            return Ok(());
        }
    }
    Err(format!("answered by {found:?} only"))
}

fn expected_source(
    from: From,
    to: std::net::IpAddr,
    seen: Seen,
    address: std::net::IpAddr,
) -> bool {
    let own = Addresses(Family::of(to));
    match (seen, from) {
        (Seen::Client, From::Client(n)) => address == own.client(n),
        (Seen::Client, From::Pod(n)) => address == own.pod(n),
        // The node chooses among its own.
        (Seen::Node, _) | (Seen::Client, From::Node) => own.nodes().any(|n| n == address),
    }
}
