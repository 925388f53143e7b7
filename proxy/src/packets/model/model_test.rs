//! Random changes of Services and slices, for each backend and family; after each, the kernel's
//! answers are those of the reference, and what is in force is what a fresh start makes of it.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::mpsc,
    time::{Instant, SystemTime},
};

use proptest::test_runner::{Config, RngSeed, TestCaseError, TestRunner};

use super::{
    fresh::{empty_node, in_force},
    iptables::Tables,
    nftables::Table,
    packet::{Fate, Rules},
    reference::{Outcome, Pair},
    steps::{Change, SERVICES, Step, steps},
    world::{Kind, Ranges, Slice, Spec, To, World},
};
use crate::{
    Mode,
    model::{Family, Protocol},
    packets::{
        backends::{Proxy, config},
        drift_test::edits,
        features::{Expect, Seen},
        fixture::{Addresses, Answer, From, Net, SILENCE, ask, source},
    },
    until::PATIENCE,
};

everywhere!(the_kernel_answers_as_the_reference);

const CLIENTS: [From; 4] = [From::Client(1), From::Client(2), From::Node, From::Pod(3)];
const PROTOCOLS: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];
/// How many sequences of steps.
const CASES: u32 = 3;
/// Ports that clients use one after the other: no packet meets what is remembered of another one.
const CLIENT_PORTS: std::ops::Range<u16> = 2_000..29_000;
/// How many questions are waited for in vain at the end of a sequence.
const SILENT: usize = 16;

fn the_kernel_answers_as_the_reference(mode: Mode, family: Family) {
    let mut settings = Config {
        cases: CASES,
        max_shrink_iters: 30,
        failure_persistence: None,
        ..Config::default()
    };
    let seed = match settings.rng_seed {
        RngSeed::Fixed(seed) => seed,
        RngSeed::Random => {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
            u64::try_from(now.as_micros()).unwrap()
        }
    };
    settings.rng_seed = RngSeed::Fixed(seed);
    let result = TestRunner::new(settings).run(&steps(), |steps| {
        Run::new(&Net::new(), mode, family, seed).all(steps).map_err(TestCaseError::fail)
    });
    if let Err(why) = result {
        panic!("{why}\nPROPTEST_RNG_SEED={seed} repeats it");
    }
}

/// What others do to the rules shows, whether in what becomes of packets or in the listing: the
/// checks can fail.
#[test]
fn every_edit_makes_a_difference() {
    let families = [Family::V4, Family::V6];
    let modes = [Mode::Nftables, Mode::Iptables].into_iter();
    for (mode, family) in modes.flat_map(|mode| families.map(|family| (mode, family))) {
        let net = Net::new();
        let mut run = Run::new(&net, mode, family, 1);
        run.apply(&Change::Service(1, Some(Spec::PLAIN))).unwrap();
        run.apply(&Change::Slice(0, Some(Slice::plain(&[1, 2])))).unwrap();
        let mut astray = 0;
        for edit in edits(mode, family) {
            run.rules_agree().unwrap();
            net.host.sh(&edit);
            if run.rules_agree().is_err() {
                astray += 1;
            } else {
                assert!(run.a_fresh_start_is_the_same().is_err(), "{mode:?} {edit}");
            }
            run.proxy.as_ref().unwrap().synchronize();
        }
        assert!(astray >= 5, "{mode:?}: {astray} edits led packets astray");
    }
}

/// One sequence of steps.
struct Run<'a> {
    net: &'a Net,
    /// There is none for a moment while it is started again.
    proxy: Option<Proxy<'a>>,
    mode: Mode,
    family: Family,
    world: World,
    dice: u64,
    client_port: u16,
}

impl<'a> Run<'a> {
    fn new(net: &'a Net, mode: Mode, family: Family, seed: u64) -> Self {
        let proxy = Proxy::start(&net.host, &config(mode), family);
        proxy.synchronize();
        let client_port = CLIENT_PORTS.start;
        let proxy = Some(proxy);
        Self { net, proxy, mode, family, world: World::default(), dice: seed, client_port }
    }

    fn all(mut self, steps: Vec<Step>) -> Result<(), String> {
        for step in steps {
            for change in step.clone().changes(&self.world) {
                self.apply(&change)
                    .and_then(|()| self.rules_agree())
                    .and_then(|()| self.packets_agree())
                    .and_then(|()| self.a_fresh_start_is_the_same())
                    .map_err(|why| format!("after {change:?} of {step:?}: {why}"))?;
            }
        }
        self.nobody_answers_who_should_be_silent()
    }

    fn apply(&mut self, change: &Change) -> Result<(), String> {
        self.world.take_in(change);
        let proxy = self.proxy.as_ref().unwrap();
        match change {
            Change::Service(n, Some(spec)) => {
                proxy.take_in(spec.object(*n, self.family));
            }
            Change::Service(n, None) => drop(proxy.remove("Service", &n.to_string())),
            Change::Slice(id, Some(slice)) => {
                proxy.take_in(slice.object(*id, self.family));
            }
            Change::Slice(id, None) => {
                proxy.remove("EndpointSlice", &Slice::name(*id));
            }
            Change::Ranges(ranges) => drop(proxy.set(ranges.object(self.family))),
            Change::Node(here) => {
                proxy.set_node(here.node(self.family));
                for (id, slice) in &self.world.slices {
                    proxy.take_in(slice.object(*id, self.family));
                }
            }
            Change::Restart => {
                let objects = self.world.objects(self.family);
                let host = &self.net.host;
                let node = self.world.here.node(self.family);
                self.proxy = None;
                let (proxy, applied) =
                    Proxy::knowing(host, &config(self.mode), self.family, &node, objects);
                self.proxy = Some(proxy);
                if self.mode != Mode::Userspace
                    && (applied.elements, &applied.rebuilt) != (0, &None)
                {
                    return Err(format!("a restart wrote {applied:?}"));
                }
            }
            Change::Edit(which) => {
                let edits = edits(self.mode, self.family);
                // There may be nothing to edit.
                self.net.host.try_sh(&edits[which % edits.len()]);
                proxy.synchronize();
            }
        }
        Ok(())
    }

    /// The kernel's rules, for everybody and everything.
    fn rules_agree(&self) -> Result<(), String> {
        let host = &self.net.host;
        let rules: Box<dyn Rules> = match self.mode {
            Mode::Nftables => Box::new(Table::read(host, self.family)),
            Mode::Iptables => Box::new(Tables::read(host, self.family)),
            // Relays have none.
            Mode::Userspace => return Ok(()),
        };
        for (from, to, protocol) in self.questions() {
            let (outcome, socket) = (self.outcome(from, to), self.socket(to));
            let found = rules.fates(from, protocol, socket);
            let expected = self.fates(from, to, &outcome);
            // Which of its addresses the node uses is its own choice.
            let indifferent = |fates: BTreeSet<Fate>| -> BTreeSet<Fate> {
                let plain = |fate| match fate {
                    Fate::To(endpoint, _) if from == From::Node => Fate::To(endpoint, false),
                    other => other,
                };
                fates.into_iter().map(plain).collect()
            };
            if indifferent(found.clone()) != indifferent(expected.clone()) {
                return Err(format!(
                    "by the rules {from:?} to {protocol} {to:?} {socket}: {found:?}, not {expected:?}"
                ));
            }
        }
        Ok(())
    }

    /// What the rules should make of a connection.
    fn fates(&self, from: From, to: To, outcome: &Outcome) -> BTreeSet<Fate> {
        let (pairs, seen) = match outcome {
            Ok(found) => found,
            Err(expect) => {
                let nobody =
                    self.world.owner(to).is_none() && self.kept_from_everywhere(to).is_none();
                return [match expect {
                    // The node refuses by itself.
                    Expect::Refused if nobody => Fate::Untouched,
                    Expect::Refused => Fate::Refused,
                    Expect::UnusedPort if self.mode == Mode::Nftables => Fate::Refused,
                    Expect::Unclaimed(_) if self.mode != Mode::Nftables => Fate::Untouched,
                    Expect::UnusedPort | Expect::PassesBy => Fate::Untouched,
                    _ => Fate::Dropped,
                }]
                .into();
            }
        };
        let fate = |(pod, port): &Pair| {
            let endpoint = SocketAddr::new(Addresses(self.family).pod(*pod), *port);
            // A pod never sees itself as the client.
            Fate::To(endpoint, *seen == Seen::Node || from == From::Pod(*pod))
        };
        pairs.iter().map(fate).collect()
    }

    /// Packets: from everybody to everything now and then.
    fn packets_agree(&mut self) -> Result<(), String> {
        // Where there are no rules to be read, packets have to tell all.
        let share = if self.mode == Mode::Userspace { 3 } else { 12 };
        let questions: Vec<_> = self.questions().collect();
        for (from, to, protocol) in questions {
            if !self.roll().is_multiple_of(share) {
                continue;
            }
            let outcome = self.outcome(from, to);
            let silent = outcome
                .as_ref()
                .is_err_and(|e| e.for_backend(self.mode, protocol) == Expect::Silence);
            // It takes iptables a second to refuse TCP, and UDP tells as well.
            let slow = self.mode == Mode::Iptables && protocol == Protocol::Tcp && outcome.is_err();
            if silent || slow {
                continue;
            }
            let first = self.ask(from, to, protocol);
            let wrong =
                |answer| Err(format!("{from:?} to {protocol} {to:?}: {answer:?}, not {outcome:?}"));
            if !self.agrees(&outcome, first, from, protocol) {
                return wrong(first);
            }
            let sticky = self.world.owner(to).and_then(|(spec, ..)| spec.affinity);
            if outcome.is_ok() && sticky.is_some_and(|seconds| seconds > 1) {
                let second = self.ask(from, to, protocol);
                if second != first {
                    return Err(format!(
                        "{from:?} to {protocol} {to:?}: {first:?}, then {second:?}, though sticky"
                    ));
                }
            }
        }
        Ok(())
    }

    /// All who ask, and for what.
    fn questions(&self) -> impl Iterator<Item = (From, To, Protocol)> + use<> {
        // The node's own address is what it says it is: that is not asked of source ranges.
        let limited: Vec<To> = To::all(SERVICES)
            .filter(|to| matches!(to, To::Balancer(..)))
            .filter(|to| {
                self.world.owner(*to).is_some_and(|(spec, ..)| {
                    spec.ranges != Ranges::Anybody && spec.kind == Kind::LoadBalancer
                })
            })
            .collect();
        To::all(SERVICES)
            .flat_map(|to| CLIENTS.map(|from| (from, to)))
            .filter(move |(from, to)| *from != From::Node || !limited.contains(to))
            .flat_map(|(from, to)| PROTOCOLS.map(|protocol| (from, to, protocol)))
    }

    /// What the reference says, as this backend documents it.
    fn outcome(&self, from: From, to: To) -> Outcome {
        let outcome = self.world.outcome(from, to);
        match outcome {
            // Relays listen there for clients inside.
            Err(Expect::NoneHere)
                if self.mode == Mode::Userspace && !matches!(to, To::Cluster(..)) =>
            {
                Err(Expect::NotAdmitted)
            }
            // An address that relays serve is the node's own.
            Err(Expect::PassesBy | Expect::Unclaimed(_))
                if self.mode == Mode::Userspace && self.world.knows_address(to) =>
            {
                Err(Expect::Refused)
            }
            // Only that mode knows ranges.
            Err(Expect::Unclaimed(_)) if self.mode != Mode::Nftables => Err(Expect::PassesBy),
            Err(Expect::Refused) => Err(self.kept_from_everywhere(to).unwrap_or(Expect::Refused)),
            other => other,
        }
    }

    /// As with kube-proxy, iptables' rules against node ports without endpoints count at every
    /// address of the node, whichever have node ports.
    fn kept_from_everywhere(&self, to: To) -> Option<Expect> {
        if self.mode != Mode::Iptables || !to.is_node_port() || self.world.owner(to).is_some() {
            return None;
        }
        self.world.at_any_address(to)?.err()
    }

    fn agrees(&self, outcome: &Outcome, answer: Answer, from: From, protocol: Protocol) -> bool {
        let addresses = Addresses(self.family);
        match (outcome, answer) {
            (Ok((pairs, seen)), Answer::By(pod, port, address)) => {
                let own = match from {
                    From::Client(n) => Some(addresses.client(n)),
                    From::Pod(n) => Some(addresses.pod(n)),
                    From::Node => None,
                };
                // A pod never sees itself as the client, and endpoints of relays see the node.
                let kept =
                    *seen == Seen::Client && self.mode != Mode::Userspace && from != From::Pod(pod);
                pairs.contains(&(pod, port)) && (own.is_none() || kept == (Some(address) == own))
            }
            (Err(expect), answer) => match expect.for_backend(self.mode, protocol) {
                Expect::Refused => answer == Answer::Refused,
                Expect::Closed => answer == Answer::Closed,
                _ => false,
            },
            _ => false,
        }
    }

    fn nobody_answers_who_should_be_silent(&mut self) -> Result<(), String> {
        let silent = |(from, to, protocol): &(From, To, Protocol)| {
            let outcome = self.outcome(*from, *to);
            outcome.is_err_and(|e| e.for_backend(self.mode, *protocol) == Expect::Silence)
        };
        let questions: Vec<_> = self.questions().filter(silent).collect();
        let mut asked = Vec::new();
        for (from, to, protocol) in questions {
            if asked.len() == SILENT || self.roll().is_multiple_of(3) {
                continue;
            }
            let (source, socket) = (self.source(from, to), self.socket(to));
            let (done, answer) = mpsc::channel();
            self.net.place(from).run(move || {
                std::thread::spawn(move || {
                    let _ = done.send(ask(protocol, source, socket, SILENCE));
                });
            });
            asked.push((from, to, protocol, answer));
        }
        for (from, to, protocol, answer) in asked {
            let answer = answer.recv().unwrap();
            if answer != Answer::Silence {
                return Err(format!("{from:?} to {protocol} {to:?}: {answer:?}, not silence"));
            }
        }
        Ok(())
    }

    /// A start from nothing, somewhere else, with the same objects.
    fn a_fresh_start_is_the_same(&self) -> Result<(), String> {
        let host = empty_node(self.family);
        let objects = self.world.objects(self.family);
        let node = self.world.here.node(self.family);
        let _fresh = Proxy::knowing(&host, &config(self.mode), self.family, &node, objects);
        let expected = in_force(&host, self.mode, self.family);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = in_force(&self.net.host, self.mode, self.family);
            if found == expected {
                return Ok(());
            }
            // Relays close what they don't need any more in their own time.
            if self.mode != Mode::Userspace || Instant::now() > deadline {
                let only = |a: &BTreeSet<String>, b: &BTreeSet<String>| {
                    a.difference(b).cloned().collect::<Vec<_>>().join("\n  ")
                };
                return Err(format!(
                    "only after changes:\n  {}\nonly after a fresh start:\n  {}",
                    only(&found, &expected),
                    only(&expected, &found)
                ));
            }
        }
    }

    fn socket(&self, to: To) -> SocketAddr {
        to.socket(Addresses(self.family))
    }

    fn source(&mut self, from: From, to: To) -> SocketAddr {
        self.client_port += 1;
        if !CLIENT_PORTS.contains(&self.client_port) {
            self.client_port = CLIENT_PORTS.start;
        }
        let mut source = source(from, self.socket(to));
        source.set_port(self.client_port);
        source
    }

    fn ask(&mut self, from: From, to: To, protocol: Protocol) -> Answer {
        let (source, socket) = (self.source(from, to), self.socket(to));
        self.net.place(from).run(move || ask(protocol, source, socket, PATIENCE))
    }

    fn roll(&mut self) -> u64 {
        // Knuth's MMIX generator; its upper bits are the good ones.
        self.dice = self
            .dice
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.dice >> 33
    }
}
