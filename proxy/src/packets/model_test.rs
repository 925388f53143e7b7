//! Random changes of Services and slices; after each, packets go where the [reference](World) says.

use std::sync::mpsc;

use proptest::{
    prelude::*,
    test_runner::{Config, TestCaseError, TestRunner},
};

use super::{
    backends::{Proxy, config},
    features::{Expect, Own, Seen},
    fixture::{Addresses, Answer, From, Net, PODS},
    reference::{Kind, Outcome, Point, Spec, To, World, slice},
};
use crate::{
    Mode,
    model::{Family, Protocol},
};

everywhere!(packets_go_where_the_reference_says);

/// How many Services there are at the most.
const SERVICES: u8 = 3;
/// How many addresses and node ports they quarrel about.
const CLAIMS: u8 = 2;
const CLIENTS: [From; 4] = [From::Client(1), From::Client(2), From::Node, From::Pod(3)];

#[derive(Clone, Debug)]
enum Step {
    Service(u8, Spec),
    RemoveService(u8),
    Slice(u8, u8, Vec<Point>),
    RemoveSlice(u8, u8),
    Restart,
}

fn spec() -> impl Strategy<Value = Spec> {
    let flag = any::<bool>;
    let kind = prop_oneof![Just(Kind::ClusterIp), Just(Kind::NodePort), Just(Kind::LoadBalancer)];
    (0..CLAIMS, 0u8..3, kind, (flag(), flag(), flag(), flag(), flag())).prop_map(
        |(
            claim,
            created,
            kind,
            (external_ip, internal_local, external_local, affinity, ranges),
        )| {
            Spec {
                claim,
                created,
                kind,
                external_ip,
                internal_local,
                external_local,
                affinity,
                ranges,
            }
        },
    )
}

fn point() -> impl Strategy<Value = Point> {
    let state = prop_oneof![
        4 => Just((true, true, false)),
        2 => Just((false, true, true)),
        1 => Just((false, false, true)),
        1 => Just((false, false, false)),
        1 => Just((true, true, true)),
    ];
    let zone = prop_oneof![Just(None), Just(Some(true)), Just(Some(false))];
    (1..=PODS, state, zone).prop_map(|(pod, (ready, serving, terminating), zone)| Point {
        pod,
        ready,
        serving,
        terminating,
        zone,
    })
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let n = 1..=SERVICES;
    let step = prop_oneof![
        5 => (n.clone(), spec()).prop_map(|(n, spec)| Step::Service(n, spec)),
        1 => n.clone().prop_map(Step::RemoveService),
        6 => (n.clone(), 0u8..2, proptest::collection::vec(point(), 0..5))
            .prop_map(|(n, part, points)| Step::Slice(n, part, points)),
        1 => (n, 0u8..2).prop_map(|(n, part)| Step::RemoveSlice(n, part)),
        1 => Just(Step::Restart),
    ];
    proptest::collection::vec(step, 5..20)
}

fn packets_go_where_the_reference_says(mode: Mode, family: Family) {
    let cases =
        Config { cases: 4, max_shrink_iters: 40, failure_persistence: None, ..Config::default() };
    let result = TestRunner::new(cases).run(&steps(), |steps| {
        // Its own for each, as connections of the last one might go on.
        let net = Net::new();
        let mut proxy = Proxy::start(&net.host, &config(mode), family);
        proxy.synchronize();
        let mut world = World::default();
        let own = |n| Own { addresses: Addresses(family), n };
        let last = steps.len() - 1;
        for (i, step) in steps.into_iter().enumerate() {
            match step.clone() {
                Step::Service(n, spec) => {
                    proxy.set(spec.object(own(n)));
                    world.services.insert(n, spec);
                }
                Step::RemoveService(n) => {
                    proxy.remove("Service", &n.to_string());
                    world.services.remove(&n);
                }
                Step::Slice(n, part, points) => {
                    proxy.set(slice(own(n), part, &points));
                    world.slices.insert((n, part), points);
                }
                Step::RemoveSlice(n, part) => {
                    proxy.remove("EndpointSlice", &format!("{n}-{part}"));
                    world.slices.remove(&(n, part));
                }
                Step::Restart => {
                    proxy = proxy.restarted();
                    let applied = proxy.synchronize();
                    if mode != Mode::Userspace {
                        prop_assert_eq!((applied.elements, applied.rebuilt), (0, None));
                    }
                }
            }
            check(&net, &world, mode, family, i == last)
                .map_err(|why| TestCaseError::fail(format!("after {step:?}: {why}")))?;
        }
        Ok(())
    });
    if let Err(why) = result {
        panic!("{why}");
    }
}

/// Asks everybody about everything; what should stay silent only if there is time for it.
fn check(
    net: &Net,
    world: &World,
    mode: Mode,
    family: Family,
    patiently: bool,
) -> Result<(), String> {
    let own = |n| Own { addresses: Addresses(family), n };
    let targets = (1..=SERVICES)
        .flat_map(|n| [To::Cluster(n), To::Balancer(n)])
        .chain((0..CLAIMS).flat_map(|k| [To::External(k), To::NodePort(k)]));
    let mut silent = Vec::new();
    for (to, from) in targets.flat_map(|to| CLIENTS.map(|from| (to, from))) {
        // The node's own address is what it says it is: that is not asked of source ranges.
        if from == From::Node
            && matches!(to, To::Balancer(n) if world.services.get(&n).is_some_and(|s| s.ranges))
        {
            continue;
        }
        let (mut outcome, socket) = (world.outcome(from, to), to.socket(own));
        // Relays listen there for clients inside.
        if mode == Mode::Userspace
            && outcome == Err(Expect::NoneHere)
            && !matches!(to, To::Cluster(_))
        {
            outcome = Err(Expect::NotAdmitted);
        }
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            if expected(&outcome, mode, protocol) == Err(Expect::Silence) {
                if patiently {
                    let (done, answer) = mpsc::channel();
                    net.ask_meanwhile(from, protocol, socket, done);
                    silent.push((from, to, protocol, answer));
                }
                continue;
            }
            // It takes iptables a second to refuse TCP, and UDP tells as well.
            if mode == Mode::Iptables && protocol == Protocol::Tcp && outcome.is_err() {
                continue;
            }
            for _ in 0..2 {
                let answer = net.ask(from, protocol, socket);
                if !agrees(&outcome, answer, mode, from, protocol, own(1).addresses) {
                    return Err(format!(
                        "{from:?} to {protocol} {to:?}: {answer:?}, not {outcome:?}"
                    ));
                }
            }
        }
    }
    for (from, to, protocol, answer) in silent {
        let answer = answer.recv().unwrap();
        if answer != Answer::Silence {
            return Err(format!("{from:?} to {protocol} {to:?}: {answer:?}, not silence"));
        }
    }
    Ok(())
}

fn expected(outcome: &Outcome, mode: Mode, protocol: Protocol) -> Result<(), Expect> {
    match outcome {
        Ok(_) => Ok(()),
        Err(expect) => Err(expect.for_backend(mode, protocol)),
    }
}

fn agrees(
    outcome: &Outcome,
    answer: Answer,
    mode: Mode,
    from: From,
    protocol: Protocol,
    addresses: Addresses,
) -> bool {
    match (outcome, answer) {
        (Ok((pods, seen)), Answer::By(pod, 8080, address)) => {
            let own = match from {
                From::Client(n) => Some(addresses.client(n)),
                From::Pod(n) => Some(addresses.pod(n)),
                From::Node => None,
            };
            // A pod never sees itself as the client, and endpoints of relays see the node.
            let kept = *seen == Seen::Client && mode != Mode::Userspace && from != From::Pod(pod);
            pods.contains(&pod) && (own.is_none() || kept == (Some(address) == own))
        }
        (Err(expect), answer) => match expect.for_backend(mode, protocol) {
            Expect::Refused => answer == Answer::Refused,
            Expect::Closed => answer == Answer::Closed,
            _ => false,
        },
        _ => false,
    }
}
