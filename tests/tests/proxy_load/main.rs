//! `keelson proxy` as a process under load: killed, restarted, switched from mode to mode, and its
//! rules edited by another program, while endpoints roll and clients connect without pause. Not one
//! connection fails that the documentation does not allow to.

mod changes;
mod clients;
mod node;

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddrV4},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use changes::{BURST, Changes, LAST, burst_address};
use clients::{Clients, Failure, Outcome, Speaks, ask, reserve_ports};
use keelson_tests::{DEADLINE, NODE_ADDRESS, inside::inside, wait_for};
use node::{Mode, Node};

/// So soon after an edit of the rules by another program the last connection may fail.
const MENDED: Duration = Duration::from_secs(1);
/// How long connections go on after a step, so that it is seen what it broke.
const AFTER: Duration = Duration::from_millis(300);

/// What the documentation allows to fail in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Allows {
    Nothing,
    /// Connections that were open before the step's end: they end with the rules that translate
    /// them, or soon after, when the kernel forgets them.
    Established,
    /// Everything, until the step's end: nobody relays, or the rules are gone.
    Everything,
}

/// A step of the test, and when it was.
#[derive(Debug)]
struct Step {
    name: String,
    began: Instant,
    ended: Instant,
    allows: Allows,
}

impl Step {
    fn allows(&self, failure: &Failure) -> bool {
        let during = failure.began <= self.ended && failure.ended >= self.began;
        match self.allows {
            Allows::Nothing => false,
            Allows::Established => {
                let opened = failure.opened.is_some_and(|opened| opened <= self.ended);
                opened && failure.ended >= self.began
            }
            Allows::Everything => during,
        }
    }
}

/// A generator of numbers that can be repeated: `KEELSON_SEED` is its state.
struct Random(u64);

impl Random {
    fn new() -> Self {
        let seed = std::env::var("KEELSON_SEED").ok().and_then(|text| text.parse().ok());
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").subsec_nanos();
        let seed = seed.unwrap_or(u64::from(now) | 1);
        println!("KEELSON_SEED={seed}");
        Self(seed)
    }

    /// xorshift64.
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

struct Test {
    node: Node,
    changes: Changes,
    random: Random,
    steps: Vec<Step>,
}

impl Test {
    fn step(&mut self, name: impl Into<String>, allows: Allows, act: impl FnOnce(&mut Self)) {
        let began = Instant::now();
        act(self);
        let name = name.into();
        self.steps.push(Step { name, began, ended: Instant::now(), allows });
        // Nothing to wait for: so long connections are made, and none may fail.
        thread::sleep(AFTER);
    }

    /// Kills the proxy in the middle of a burst of changes, or of its start, and starts it again.
    fn kill(&mut self, mode: Mode, allows: Allows) {
        self.step(format!("{} killed", mode.as_str()), allows, |test| {
            test.changes.burst();
            test.pause(200);
            test.node.kill_proxy();
            test.node.start_proxy(mode);
            test.pause(400);
            test.node.kill_proxy();
            test.node.start_proxy(mode);
            test.node.wait_in_force(mode);
        });
    }

    fn switch(&mut self, from: Mode, to: Mode, allows: Allows) {
        let abruptly = self.random.below(2) == 0;
        let how = if abruptly { "killed" } else { "stopped" };
        let name = format!("{} {how}, {} started", from.as_str(), to.as_str());
        self.step(name, allows, |test| {
            test.changes.burst();
            test.pause(50);
            if abruptly {
                test.node.kill_proxy();
            } else {
                test.node.stop_proxy();
            }
            test.node.start_proxy(to);
            test.node.wait_in_force(to);
        });
    }

    /// Another program edits the rules. In the iptables mode such edits as leave the canary there
    /// are looked for the more seldom the longer that takes.
    fn edit(&mut self, script: &str, at_once: bool) {
        let before = self.node.metric("keelson_proxy_drift_total").expect("metrics");
        let began = Instant::now();
        // It may take long: `nft` reads the rules again and again while they change.
        self.node.sh(script);
        let edited = Instant::now();
        wait_for(script, DEADLINE, || {
            let now = self.node.metric("keelson_proxy_drift_total")?;
            // A change of an endpoint may meet the edit first, be refused, and mend it.
            let mended = now > before || (!at_once && self.node.iptables_lead_to_services());
            if mended { Ok(()) } else { Err(now.to_string()) }
        });
        // Where it is noticed at once: longer than that nothing may fail.
        let noticed = if at_once { edited } else { Instant::now() };
        let ended = noticed + MENDED;
        let step = Step { name: script.to_owned(), began, ended, allows: Allows::Everything };
        self.steps.push(step);
        thread::sleep(ended.saturating_duration_since(Instant::now()) + AFTER);
    }

    /// A moment that is nobody's choice.
    fn pause(&mut self, milliseconds: u64) {
        thread::sleep(Duration::from_millis(self.random.below(milliseconds)));
    }
}

fn start_clients(node: &Node) -> Clients {
    let address: Ipv4Addr = NODE_ADDRESS.parse().expect("an address");
    let cluster = SocketAddrV4::new([10, 96, 0, 80].into(), 80);
    let node_port = SocketAddrV4::new(address, 30_080);
    let mut clients = Clients::default();
    let (outside, pod, own) = (node.machine.neighbour_netns(), node.pod(3), node.machine.netns());
    for netns in [&outside, &pod, &own] {
        reserve_ports(netns);
        for speaks in [Speaks::Tcp, Speaks::Udp] {
            clients.connect(netns, 0, speaks, cluster);
            clients.connect(netns, 1, speaks, node_port);
        }
    }
    let (cluster, node_port) =
        (SocketAddrV4::new([10, 96, 0, 90].into(), 90), SocketAddrV4::new(address, 30_090));
    for speaks in [Speaks::Tcp, Speaks::Udp] {
        clients.converse(&outside, speaks, node_port);
        clients.converse(&pod, speaks, cluster);
        clients.converse(&own, speaks, cluster);
    }
    clients
}

/// What failed and was not allowed to, by what was going on.
fn judge(steps: &[Step], outcome: &Outcome) -> BTreeMap<String, Vec<Duration>> {
    let mut wrong: BTreeMap<String, Vec<Duration>> = BTreeMap::new();
    for failure in &outcome.failures {
        if steps.iter().any(|step| step.allows(failure)) {
            continue;
        }
        let step = steps.iter().rev().find(|step| step.began <= failure.ended);
        let (name, since) = step.map_or(("the start", failure.began), |s| (&s.name[..], s.began));
        let after = failure.began.saturating_duration_since(since);
        wrong.entry(format!("{name}: {}", failure.what)).or_default().push(after);
    }
    wrong
}

#[test]
fn connections_succeed_whatever_becomes_of_the_process() {
    let mut node = Node::start();
    let changes = Changes::start(&node.machine);
    node.start_proxy(Mode::Nftables);
    node.wait_in_force(Mode::Nftables);
    let clients = start_clients(&node);
    let mut test = Test { node, changes, random: Random::new(), steps: Vec::new() };
    thread::sleep(AFTER);

    for _ in 0..4 {
        test.kill(Mode::Nftables, Allows::Nothing);
    }
    test.switch(Mode::Nftables, Mode::Iptables, Allows::Nothing);
    for _ in 0..2 {
        test.kill(Mode::Iptables, Allows::Nothing);
    }
    // A chain that is written again meanwhile can't be removed.
    for (edit, at_once) in [
        ("iptables -t nat -F KUBE-SERVICES", false),
        ("iptables -t nat -F; iptables -t nat -X || true", false),
        ("nft flush ruleset", true),
    ] {
        test.edit(edit, at_once);
    }
    test.switch(Mode::Iptables, Mode::Nftables, Allows::Nothing);
    test.switch(Mode::Nftables, Mode::Iptables, Allows::Nothing);
    // The rules are there until the relays are; but what they translate is left without them.
    test.switch(Mode::Iptables, Mode::Userspace, Allows::Established);
    test.kill(Mode::Userspace, Allows::Everything);
    test.switch(Mode::Userspace, Mode::Nftables, Allows::Everything);
    for edit in [
        "nft flush chain ip keelson-proxy nat-prerouting",
        "nft flush map ip keelson-proxy endpoints",
        "nft delete table ip keelson-proxy",
        "nft flush ruleset",
    ] {
        test.edit(edit, true);
    }

    test.changes.burst();
    let Test { node, changes, steps, .. } = test;
    let rolled = changes.stop();
    all_is_right(&node);
    let outcome = clients.stop();
    let (connections, words) = (outcome.connections, outcome.words);
    println!("{connections} connections, {words} words, {rolled} changes of endpoints");
    let wrong = judge(&steps, &outcome);
    assert!(wrong.is_empty(), "of {connections} connections failed: {wrong:#?}");
    // Clients that got nowhere, and endpoints that stayed, would prove nothing.
    assert!(connections > 10_000 && words > 1_000 && rolled > 200);
}

/// In the end everything goes where the API says.
fn all_is_right(node: &Node) {
    let netns = node.machine.netns();
    wait_for("the last endpoint alone to answer", DEADLINE, || {
        let address = SocketAddrV4::new([10, 96, 0, 80].into(), 80);
        let answers = inside(&netns, || {
            let asked = (0..20).map(|_| ask(Speaks::Tcp, 0, address));
            Ok(asked.collect::<std::io::Result<Vec<u8>>>()?)
        });
        let answers = answers.map_err(|error| error.to_string())?;
        if answers.iter().all(|n| *n == LAST) { Ok(()) } else { Err(format!("{answers:?}")) }
    });
    for n in 0..BURST {
        wait_for(&format!("Service burst-{n}"), DEADLINE, || {
            let address = SocketAddrV4::new(burst_address(n), 80);
            inside(&netns, || Ok(ask(Speaks::Tcp, 0, address)?)).map_err(|e| e.to_string())
        });
    }
}
