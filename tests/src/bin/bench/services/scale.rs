//! `keelson proxy` alone, and a real kube-proxy if there is one, with more and more Services.
//!
//! Both run on the neighbour, against the API server of the machine, and are asked nothing but what
//! a packet sees; where a figure is the proxy's own, its name says so. Endpoints are addresses of
//! the neighbour itself.

use std::{
    fmt,
    fs::{self, File},
    path::PathBuf,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context;
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use keelson_tests::{Machine, wait_for};
use kube::{Api, ResourceExt, api::PostParams};
use serde_json::Value;

use super::{
    load::metric,
    objects::{self, LABEL, Made, endpoint_address},
    packets::{self, Listener},
};
use crate::{
    api::{self, DEADLINE, milliseconds},
    inside::{inside, inside_async},
    memory,
    node::Running,
    report::{Figure, Section, Unit},
    statistics::Samples,
};

/// Endpoints changed for one figure.
const CHANGES: usize = 30;
/// Connections made for one figure.
const CONNECTIONS: usize = 200;

/// How many Services of how many endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    services: usize,
    endpoints: usize,
}

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

/// Reads a size.
///
/// # Errors
/// When it is none.
pub(crate) fn size(text: &str) -> Result<Size, String> {
    let number = |text: &str| text.parse().ok().filter(|n| *n > 0);
    let parts = text.split_once('x').and_then(|(s, e)| Some((number(s)?, number(e)?)));
    let (services, endpoints) =
        parts.ok_or_else(|| format!("{text:?}: two numbers are wanted, as 1000x2"))?;
    Ok(Size { services, endpoints })
}

/// What runs: ours, or kube-proxy.
#[derive(Clone, Debug)]
struct Contestant {
    name: &'static str,
    program: PathBuf,
    arguments: Vec<String>,
}

/// What was measured of one.
#[derive(Debug, Default)]
struct Measured {
    first: Samples,
    first_sync: Samples,
    changed: Samples,
    restarted: Samples,
    resident: Samples,
    processor: Samples,
    through_first: Samples,
    through_last: Samples,
}

/// Measures each size.
pub(crate) fn measure(sizes: &[Size]) -> anyhow::Result<Vec<Section>> {
    let running = Running::start()?;
    let machine = &running.cluster.machine;
    let listener = Listener::start(&machine.neighbour_netns())?;
    // Without the proxy's rules a Service's address leads nowhere, not back to the machine.
    let mut route = machine.neighbour_command("ip");
    let routed = route.args(["route", "add", "10.96.0.0/12", "dev", "lo"]).status()?;
    anyhow::ensure!(routed.success(), "ip route add 10.96.0.0/12: {routed}");
    let kubeconfig = machine.dir().join("neighbour.conf");
    fs::write(&kubeconfig, kubeconfig_for_neighbour(&running)?)?;
    let contestants = contestants(&kubeconfig.display().to_string());
    let mut sections = Vec::new();
    for size in sizes {
        eprintln!("scale: making {size}");
        let made = inside_async(&machine.netns(), || async {
            let client = api::client(&running.data_dir()).await?;
            objects::make_all(&client, 0..size.services, size.endpoints).await
        })?;
        let mut measured = Vec::new();
        for contestant in &contestants {
            eprintln!("scale: {} with {size}", contestant.name);
            measured.push(one(&running, contestant, &made, *size)?);
        }
        sections.push(section(*size, &contestants, measured));
        inside_async(&machine.netns(), || async {
            let client = api::client(&running.data_dir()).await?;
            api::remove_all(&Api::<Service>::default_namespaced(client.clone()), LABEL).await?;
            api::remove_all(&Api::<EndpointSlice>::default_namespaced(client), LABEL).await
        })?;
    }
    listener.stop()?;
    running.stop();
    Ok(sections)
}

/// The administrator's kubeconfig with the machine's own address.
fn kubeconfig_for_neighbour(running: &Running) -> anyhow::Result<String> {
    let text = running.cluster.kubectl(&["config", "view", "--raw", "-o", "json"]);
    let mut config: Value = serde_json::from_str(&text)?;
    let nodes = running.cluster.get(&["nodes"]);
    let addresses = nodes["items"][0]["status"]["addresses"].as_array().cloned();
    let address = addresses
        .into_iter()
        .flatten()
        .find(|address| address["type"] == "InternalIP")
        .context("the node has no address")?;
    let server = &mut config["clusters"][0]["cluster"]["server"];
    let port = server.as_str().and_then(|s| s.rsplit_once(':')).context("no port")?.1.to_owned();
    *server = format!("https://{}:{port}", address["address"].as_str().unwrap_or_default()).into();
    Ok(config.to_string())
}

fn contestants(kubeconfig: &str) -> Vec<Contestant> {
    let common = ["--hostname-override", "neighbour", "--kubeconfig", kubeconfig];
    let ours = ["proxy"].iter().chain(&common).map(|a| (*a).to_owned()).collect();
    let mut all =
        vec![Contestant { name: "keelson proxy", program: Machine::binary(), arguments: ours }];
    if let Some(program) = std::env::var_os("KUBE_PROXY") {
        // The connection table's limit can't be raised everywhere.
        let mode = ["--proxy-mode", "nftables", "--conntrack-max-per-core", "0"];
        let arguments = common.iter().chain(&mode).map(|a| (*a).to_owned()).collect();
        all.push(Contestant { name: "kube-proxy", program: program.into(), arguments });
    }
    all
}

/// A proxy that runs, and is killed in the end.
struct Proxy(Child);

impl Proxy {
    fn start(machine: &Machine, contestant: &Contestant) -> anyhow::Result<Self> {
        let path = machine.dir().join(format!("{}.log", contestant.name.replace(' ', "-")));
        let log = File::options().create(true).append(true).open(path)?;
        let mut command = machine.neighbour_command(&contestant.program);
        command.args(&contestant.arguments).stdin(Stdio::null());
        command.stdout(log.try_clone()?).stderr(log);
        Ok(Self(command.spawn().with_context(|| contestant.program.display().to_string())?))
    }

    fn pid(&self) -> i32 {
        // nsenter without --fork becomes the program it starts.
        self.0.id().cast_signed()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn one(
    running: &Running,
    contestant: &Contestant,
    made: &[Made],
    size: Size,
) -> anyhow::Result<Measured> {
    let machine = &running.cluster.machine;
    let netns = machine.neighbour_netns();
    let _ = machine.neighbour_command("nft").args(["flush", "ruleset"]).status();
    let mut measured = Measured::default();
    let started = Instant::now();
    let proxy = Proxy::start(machine, contestant)?;
    measured.first.add(milliseconds(started, all_answer(&netns, made)?));
    measured.first_sync.add(syncs(running)?);
    inside(&netns, || {
        for _ in 0..CONNECTIONS {
            measured.through_first.add(packets::round_trip(made[0].address)?);
            measured.through_last.add(packets::round_trip(made[made.len() - 1].address)?);
        }
        Ok(())
    })?;
    change(running, made, size, &mut measured.changed)?;
    let ticks = memory::ticks(proxy.pid())?;
    // The time over which it is measured.
    std::thread::sleep(Duration::from_secs(5));
    measured.processor.add((memory::ticks(proxy.pid())? - ticks) / 5.0);
    measured.resident.add(memory::resident(proxy.pid())?);
    drop(proxy);
    let _restarted = Proxy::start(machine, contestant)?;
    measured.restarted.add(syncs(running)?);
    Ok(measured)
}

/// When every Service has answered on the neighbour.
fn all_answer(netns: &str, made: &[Made]) -> anyhow::Result<Instant> {
    inside(netns, || {
        // The last one first: the others are there by then, mostly, and cost no time.
        for service in made.iter().rev() {
            packets::wait_answer(service.address, |_| true)?;
        }
        Ok(Instant::now())
    })
}

/// How long the proxy's syncs took since it was started, by its own account, in milliseconds.
fn syncs(running: &Running) -> anyhow::Result<f64> {
    let name = "kubeproxy_sync_proxy_rules_duration_seconds";
    let seconds = wait_for("the proxy's first sync", DEADLINE, || {
        let url = "http://127.0.0.1:10249/metrics";
        let text = running.cluster.fetch_from_neighbour(url)?;
        let count = metric(&text, &format!("{name}_count")).unwrap_or_default();
        if count == 0.0 {
            return Err("no sync yet".to_owned());
        }
        metric(&text, &format!("{name}_sum")).ok_or_else(|| "no sum".to_owned())
    });
    Ok(seconds * 1e3)
}

/// Replaces the first endpoint of Services, one after the other.
fn change(
    running: &Running,
    made: &[Made],
    size: Size,
    changed: &mut Samples,
) -> anyhow::Result<()> {
    let netns = running.cluster.machine.neighbour_netns();
    inside_async(&running.cluster.machine.netns(), || async {
        let client = api::client(&running.data_dir()).await?;
        let slices: Api<EndpointSlice> = Api::default_namespaced(client);
        for number in 0..CHANGES {
            let service = &made[number * 7 % made.len()];
            let address = endpoint_address(size.services * size.endpoints + number);
            let mut slice = slices.get(&service.slice.name_any()).await?;
            let endpoints = slice.endpoints.as_mut().context("a slice without endpoints")?;
            // All others of a Service with many would have to be missed by chance.
            endpoints.truncate(2);
            endpoints[0].addresses = vec![address.to_string()];
            let first = packets::watch(&netns, service.address, address)?;
            slices.replace(&slice.name_any(), &PostParams::default(), &slice).await?;
            let answered = Instant::now();
            let seen = tokio::task::spawn_blocking(move || first.join()).await?;
            let seen = seen.map_err(|_| anyhow::anyhow!("connecting panicked"))??;
            changed.add(milliseconds(answered, seen));
        }
        Ok(())
    })
}

fn section(size: Size, contestants: &[Contestant], mut measured: Vec<Measured>) -> Section {
    let beside = (measured.len() > 1).then(|| measured.remove(1));
    let ours = measured.remove(0);
    let name = contestants.last().map_or("", |contestant| contestant.name);
    let figure = |what: &str, unit, of: fn(&Measured) -> &Samples, aim: Option<f64>| {
        let mut figure = Figure::new(what, unit, of(&ours).clone());
        if let Some(beside) = &beside {
            figure = figure.beside(name, of(beside).clone());
        }
        match aim {
            Some(aim) => figure.aim(aim),
            None => figure,
        }
    };
    let elements = size.services * (1 + size.endpoints);
    let large = (80_000..=100_000).contains(&elements);
    let ms = Unit::Milliseconds;
    Section {
        title: format!(
            "{} alone, {} Services of {} endpoints each",
            contestants[0].name, size.services, size.endpoints
        ),
        command: format!("tools/bench --only scale --sizes {size}"),
        figures: vec![
            figure("exec → every Service reachable", ms, |m| &m.first, None),
            figure(
                "first sync, by its own account",
                ms,
                |m| &m.first_sync,
                match size {
                    Size { services: 5_006, endpoints: 50 } => Some(1_500.0),
                    _ if large => Some(500.0),
                    _ => None,
                },
            ),
            figure(
                "one endpoint changed: answer → first packet at it",
                ms,
                |m| &m.changed,
                Some(10.0),
            ),
            figure(
                "restart without change: sync, by its own account",
                ms,
                |m| &m.restarted,
                large.then_some(500.0),
            ),
            figure("a connection through the first Service", ms, |m| &m.through_first, None),
            figure("a connection through the last Service", ms, |m| &m.through_last, None),
            figure(
                "resident",
                Unit::Megabytes,
                |m| &m.resident,
                match size.services {
                    100 => Some(15.0),
                    _ if large => Some(60.0),
                    _ => None,
                },
            ),
            figure("processor time when idle", Unit::Percent, |m| &m.processor, None),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_they_are_shown() {
        for all in SIZES {
            assert_eq!(size(&all.to_string()), Ok(all));
        }
        for wrong in ["", "5", "5x", "x5", "0x2", "2x0", "1x2x3", "-1x2"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
