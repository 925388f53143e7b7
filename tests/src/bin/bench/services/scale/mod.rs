//! `keelson proxy` alone, and a real kube-proxy if one is named by `KUBE_PROXY`, with more and more
//! Services.
//!
//! Both run on the neighbour, against the API server of the machine, and are asked nothing but what
//! a packet sees; where a figure is the proxy's own, its name says so. Endpoints are addresses of
//! the neighbour itself. The machine has a control plane and no proxy of its own: that one would
//! listen for changes of its rules, and the kernel, which doesn't ask in what namespace somebody
//! listens, would write a message for each element that the measured one makes.

mod change;
mod contestant;
mod written;

use std::{
    fmt, fs,
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::Context;
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use keelson_tests::{Machine, NODE_ADDRESS};
use kube::Api;
use serde_json::Value;

use self::{
    change::{Changed, Fresh},
    contestant::{Account, Contestant, LONGEST, Proxy, contestants},
    written::Ear,
};
use super::{
    nft,
    objects::{self, LABEL, Made, endpoint_address},
    packets::{self, Listener},
};
use crate::{
    api::{self, milliseconds},
    inside::{inside, inside_async},
    memory,
    node::Running,
    report::{Figure, Section, Unit},
    statistics::Samples,
};

/// Connections made for one figure of time.
const CONNECTIONS: usize = 200;
/// How often the rate of connections is measured.
const ROUNDS: usize = 3;
/// Requests under way at once when Services are made.
const AT_ONCE: usize = 64;
/// How long an idle proxy is watched.
const IDLE: Duration = Duration::from_secs(5);
/// A unit of processor time, in milliseconds.
const TICK: f64 = 10.0;

/// How many Services of how many endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    services: usize,
    endpoints: usize,
}

/// Sizes to measure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sizes(pub(crate) Vec<Size>);

/// From a small cluster to what operators have reported as kube-proxy's worst
/// (kubernetes/kubernetes issues 135639 and 139513).
pub(crate) const SIZES: [Size; 8] = {
    const fn of(services: usize, endpoints: usize) -> Size {
        Size { services, endpoints }
    }
    [
        of(100, 2),
        of(1_000, 2),
        of(5_000, 2),
        of(10_000, 2),
        of(30_000, 2),
        of(1, 5_000),
        of(5_006, 50),
        of(44_128, 1),
    ]
};

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.services, self.endpoints)
    }
}

/// Reads sizes: `1000x2,30000x2`, or `all`.
///
/// # Errors
/// When it is neither.
pub(crate) fn sizes(text: &str) -> Result<Sizes, String> {
    match text {
        "all" => Ok(Sizes(SIZES.to_vec())),
        _ => Ok(Sizes(text.split(',').map(size).collect::<Result<_, _>>()?)),
    }
}

fn size(text: &str) -> Result<Size, String> {
    let number = |text: &str| text.parse().ok().filter(|n| *n > 0);
    let parts = text.split_once('x').and_then(|(s, e)| Some((number(s)?, number(e)?)));
    let (services, endpoints) =
        parts.ok_or_else(|| format!("{text:?}: two numbers are wanted, as 1000x2"))?;
    Ok(Size { services, endpoints })
}

/// What is measured when nothing else is asked for: in a few minutes, what tells whether a cost
/// grows with the number of Services.
pub(crate) const USUAL: &str = "100x2,1000x2,10000x2,30000x2";

/// What all measurements here share.
struct Scene {
    running: Running,
    /// In the order in which they were made.
    made: Vec<Made>,
    /// How many endpoints each of them has.
    endpoints: usize,
    fresh: Fresh,
}

/// What was measured of one.
#[derive(Debug, Default)]
struct Measured {
    first: Samples,
    first_sync: Samples,
    full_syncs: Samples,
    first_processor: Samples,
    alone: Changed,
    among_others: Changed,
    restarted: Samples,
    rewritten: Samples,
    resident: Samples,
    processor: Samples,
    through_first: Samples,
    through_last: Samples,
    rate_first: Samples,
    rate_last: Samples,
    rate_direct: Samples,
}

/// Measures each size, and a kube-proxy too if one is named.
pub(crate) fn measure(sizes: &[Size], kube_proxy: Option<PathBuf>) -> anyhow::Result<Vec<Section>> {
    let running = Running::start_control_plane()?;
    let machine = &running.cluster.machine;
    let listener = Listener::start(&machine.neighbour_netns())?;
    // Without the proxy's rules a Service's address leads nowhere, not back to the machine.
    let mut route = machine.neighbour_command("ip");
    let routed = route.args(["route", "add", "10.96.0.0/12", "dev", "lo"]).status()?;
    anyhow::ensure!(routed.success(), "ip route add 10.96.0.0/12: {routed}");
    let kubeconfig = machine.dir().join("neighbour.conf");
    fs::write(&kubeconfig, kubeconfig_for_neighbour(&running)?)?;
    let contestants = contestants(&kubeconfig.display().to_string(), kube_proxy);
    let mut scene = Scene { running, made: Vec::new(), endpoints: 0, fresh: Fresh::new() };
    let mut sections = Vec::new();
    for size in sizes {
        eprintln!("scale: making {size}");
        scene.make(*size)?;
        let mut measured = Vec::new();
        for contestant in &contestants {
            eprintln!("scale: {} with {size}", contestant.name);
            match one(&scene, contestant) {
                Ok(one) => measured.push(one),
                // One that doesn't manage a size at all is no reason not to know the rest.
                Err(error) if !measured.is_empty() => {
                    eprintln!("scale: {} with {size}: {error:#}", contestant.name);
                }
                Err(error) => return Err(error.context(format!("{size} Services"))),
            }
        }
        sections.push(section(*size, &contestants, measured));
    }
    listener.stop()?;
    scene.running.stop();
    Ok(sections)
}

impl Scene {
    /// Makes Services until there are as many of as many endpoints; those there are stay if they
    /// are of use.
    fn make(&mut self, size: Size) -> anyhow::Result<()> {
        let (data_dir, netns) = (self.running.data_dir(), self.running.cluster.machine.netns());
        if self.endpoints != size.endpoints || self.made.len() > size.services {
            self.made.clear();
            inside_async(&netns, || async {
                let client = api::client(&data_dir).await?;
                api::remove_all(&Api::<Service>::default_namespaced(client.clone()), LABEL).await?;
                api::remove_all(&Api::<EndpointSlice>::default_namespaced(client), LABEL).await
            })?;
        }
        self.endpoints = size.endpoints;
        let missing = self.made.len()..size.services;
        let made = inside_async(&netns, || async {
            let client = api::client(&data_dir).await?;
            objects::make_all(&client, missing, size.endpoints, AT_ONCE).await
        })?;
        self.made.extend(made);
        change::prepare(self)
    }
}

/// The administrator's kubeconfig with the machine's own address.
fn kubeconfig_for_neighbour(running: &Running) -> anyhow::Result<String> {
    let text = running.cluster.kubectl(&["config", "view", "--raw", "-o", "json"]);
    let mut config: Value = serde_json::from_str(&text)?;
    let server = &mut config["clusters"][0]["cluster"]["server"];
    let port = server.as_str().and_then(|s| s.rsplit_once(':')).context("no port")?.1.to_owned();
    *server = format!("https://{NODE_ADDRESS}:{port}").into();
    Ok(config.to_string())
}

fn one(scene: &Scene, contestant: &Contestant) -> anyhow::Result<Measured> {
    let (running, made) = (&scene.running, &scene.made);
    let machine = &running.cluster.machine;
    let netns = machine.neighbour_netns();
    nft::flush(&netns)?;
    forget_connections(machine)?;
    let mut measured = Measured::default();
    let started = Instant::now();
    let mut proxy = Proxy::start(machine, contestant)?;
    measured.first.add(milliseconds(started, all_answer(&netns, made)?));
    // Tries from before the rules are remembered for two minutes as going nowhere, and a client that
    // uses one of their ports again would go there too.
    forget_connections(machine)?;
    let account = Account::at_rest(running, &mut proxy)?;
    measured.first_processor.add(memory::ticks(proxy.pid())? * TICK);
    measured.full_syncs.add(account.full_syncs());
    measured.first_sync.add(account.full.sum() / account.full_syncs());
    let (first, last) = (made[0].address, made[made.len() - 1].address);
    inside(&netns, || {
        for _ in 0..CONNECTIONS {
            measured.through_first.add(packets::round_trip(first)?);
            measured.through_last.add(packets::round_trip(last)?);
        }
        Ok(())
    })?;
    for _ in 0..ROUNDS {
        let direct = SocketAddr::new(endpoint_address(0).into(), packets::PORT);
        measured.rate_first.add(packets::rate(&netns, packets::service_at(first))?);
        measured.rate_last.add(packets::rate(&netns, packets::service_at(last))?);
        measured.rate_direct.add(packets::rate(&netns, direct)?);
    }
    measured.alone = change::change(scene, &mut proxy, false)?;
    let ticks = memory::ticks(proxy.pid())?;
    // The time over which it is measured.
    std::thread::sleep(IDLE);
    measured.processor.add((memory::ticks(proxy.pid())? - ticks) / IDLE.as_secs_f64());
    measured.resident.add(memory::resident(proxy.pid())?);
    measured.among_others = change::change(scene, &mut proxy, true)?;
    drop(proxy);
    let ear = Ear::open(&netns)?;
    let mut restarted = Proxy::start(machine, contestant)?;
    let account = Account::at_rest(running, &mut restarted)?;
    measured.restarted.add(account.full.sum() / account.full_syncs());
    measured.rewritten.add(ear.changes()? as f64);
    Ok(measured)
}

fn forget_connections(machine: &Machine) -> anyhow::Result<()> {
    let output = machine.neighbour_command("conntrack").arg("-F").output().context("conntrack")?;
    let said = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "conntrack -F: {said}");
    Ok(())
}

/// When every Service has answered on the neighbour.
fn all_answer(netns: &str, made: &[Made]) -> anyhow::Result<Instant> {
    inside(netns, || {
        // The last one first: the others are there by then, mostly, and cost no time.
        for service in made.iter().rev() {
            packets::wait_answer_for(LONGEST, service.address, |_| true)?;
        }
        Ok(Instant::now())
    })
}

fn section(size: Size, contestants: &[Contestant], mut measured: Vec<Measured>) -> Section {
    let beside = (measured.len() > 1).then(|| measured.remove(1));
    let ours = measured.remove(0);
    let name = contestants.last().map_or("", |contestant| contestant.name);
    let figure = |what: &str, unit, of: fn(&Measured) -> &Samples, aim: Option<f64>| {
        let mut figure = Figure::new(what, unit, of(&ours).clone());
        if let Some(beside) = beside.as_ref().filter(|beside| of(beside).count() > 0) {
            figure = figure.beside(name, of(beside).clone());
        }
        match aim {
            Some(aim) => figure.aim(aim),
            None => figure,
        }
    };
    let elements = size.services * (1 + size.endpoints);
    let large = (80_000..=100_000).contains(&elements);
    let most = size == Size { services: 5_006, endpoints: 50 };
    let first_sync = if most { Some(1_500.0) } else { large.then_some(500.0) };
    let resident = if size.services == 100 { Some(15.0) } else { large.then_some(60.0) };
    let (ms, rate) = (Unit::Milliseconds, Unit::PerSecond);
    Section {
        title: format!(
            "{} alone, {} Services of {} endpoints each",
            contestants[0].name, size.services, size.endpoints
        ),
        command: format!("tools/bench --only scale --sizes {size}"),
        figures: vec![
            figure("exec → every Service reachable", ms, |m| &m.first, None),
            figure(
                "first full sync: last event → commit, by its own account",
                ms,
                |m| &m.first_sync,
                first_sync,
            ),
            figure("  full syncs since its start", Unit::Count, |m| &m.full_syncs, None),
            figure("  processor time since its start", ms, |m| &m.first_processor, None),
            figure(
                "one endpoint changed: answer → first packet at it",
                ms,
                |m| &m.alone.packet,
                Some(10.0),
            ),
            figure(
                "  event → commit, mean, by its own account",
                ms,
                |m| &m.alone.commit,
                Some(1.0),
            ),
            figure(
                "while a hundred others change each second: answer → first packet",
                ms,
                |m| &m.among_others.packet,
                Some(10.0),
            ),
            figure(
                "  event → commit, mean of all, by its own account",
                ms,
                |m| &m.among_others.commit,
                Some(1.0),
            ),
            figure("  others that changed", rate, |m| &m.among_others.others, None),
            figure(
                "restart without change: sync, by its own account",
                ms,
                |m| &m.restarted,
                large.then_some(500.0),
            ),
            figure(
                "  changes that it made to the kernel's tables",
                Unit::Count,
                |m| &m.rewritten,
                Some(1.0),
            ),
            figure("a connection through the first Service", ms, |m| &m.through_first, None),
            figure("a connection through the last Service", ms, |m| &m.through_last, None),
            figure("new connections through the first Service", rate, |m| &m.rate_first, None),
            figure("new connections through the last Service", rate, |m| &m.rate_last, None),
            figure("new connections to an endpoint itself", rate, |m| &m.rate_direct, None),
            figure("resident", Unit::Megabytes, |m| &m.resident, resident),
            figure("processor time when idle", Unit::Percent, |m| &m.processor, None),
        ],
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn sizes_are_read_as_they_are_shown() {
        for all in SIZES {
            assert_eq!(sizes(&all.to_string()), Ok(Sizes(vec![all])));
        }
        assert_eq!(sizes("all"), Ok(Sizes(SIZES.to_vec())));
        assert_eq!(sizes(USUAL).unwrap().0.len(), USUAL.split(',').count());
        for wrong in ["", "5", "5x", "x5", "0x2", "2x0", "1x2x3", "-1x2", "all,5x2", "5x2,"] {
            assert!(sizes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn each_figure_of_both_proxies_is_measured() {
        // kube-proxy's part is played by the proxy itself, told by kube-proxy's flags.
        let folder = tempfile::tempdir().unwrap();
        let stand_in = folder.path().join("stand-in-for-kube-proxy");
        let script = format!("#!/bin/sh\nexec {} proxy \"$@\"\n", Machine::binary().display());
        fs::write(&stand_in, script).unwrap();
        fs::set_permissions(&stand_in, fs::Permissions::from_mode(0o755)).unwrap();
        let sizes = sizes("3x2,4x2").unwrap();
        let sections = measure(&sizes.0, Some(stand_in)).unwrap();
        assert_eq!(sections.len(), 2);
        for figure in sections.iter().flat_map(|section| &section.figures) {
            let figure = figure.to_json();
            let beside = &figure["beside"];
            assert_eq!(beside["what"], "kube-proxy", "{figure}");
            for measured in [&figure["measured"], &beside["measured"]] {
                assert!(measured["n"].as_u64().unwrap() > 0, "{figure}");
            }
            if figure["figure"].as_str().unwrap().contains("changes that it made") {
                assert_eq!(figure["measured"]["max"], 0.0, "{figure}");
            }
        }
    }
}
