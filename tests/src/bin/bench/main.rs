//! Measures the real binary on this machine, and prints each figure with what it ran beside in the
//! same run, the command that makes it, and the aim.
//!
//! Every part starts clusters of its own, each in a network namespace with a neighbour, and removes
//! them. Moments are taken by a client of the API and by connections, never from what the program
//! says of itself; where a figure is the program's own (a metric), its name says so.
//!
//! Ends with an error only if something could not be measured: an aim that is missed is a fact.

mod api;
mod memory;
mod node;
mod pods;
mod report;
mod runc;
mod services;
mod startup;
mod statistics;

use std::{path::PathBuf, process::Command, thread};

use anyhow::Context;
use clap::{Parser, ValueEnum};
use keelson_tests::{Machine, inside};
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

/// Measures Keelson beside runc, nft and kubectl
#[derive(Debug, Parser)]
#[command(name = "bench", after_help = "KEELSON_BINARY names the binary; it needs root.")]
struct Arguments {
    /// Write everything measured to this file too, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Measure only this; may be given several times
    #[arg(long, value_enum)]
    only: Vec<Part>,
    /// How many clusters are started, and how often Services are loaded
    #[arg(long, default_value_t = 5, value_parser = at_least_one)]
    rounds: usize,
    /// How many pods are created one after the other
    #[arg(long, default_value_t = 40, value_parser = at_least_one)]
    pods: usize,
    /// With how many pods memory is measured
    #[arg(long, default_value_t = 50, value_parser = at_least_one)]
    idle_pods: usize,
    /// How many Services there are
    #[arg(long, default_value_t = 1000, value_parser = at_least_one)]
    services: usize,
    /// With how many Services the proxy alone is measured, and endpoints of each; or `all`
    #[arg(long, value_name = "SERVICESxENDPOINTS,…", value_parser = services::scale::sizes,
          default_value = services::scale::USUAL)]
    sizes: services::scale::Sizes,
    /// How many endpoints are changed one after the other
    #[arg(long, default_value_t = 200, value_parser = at_least_one)]
    changes: usize,
}

/// What can be measured alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// From the start of the process to a ready node; the size of the binary
    Startup,
    /// From the creation of a pod to Running and Ready
    Pods,
    /// Resident and private memory
    Memory,
    /// From Services and endpoints to packets
    Services,
    /// The proxy alone with up to tens of thousands of Services. KUBE_PROXY names a kube-proxy to
    /// run beside it
    Scale,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("at least 1 is needed".to_owned()),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("{error}")),
    }
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    clean_up_when_asked_to_end()?;
    let about = about()?;
    let is_wanted = |part| arguments.only.is_empty() || arguments.only.contains(&part);
    let mut sections = Vec::new();
    if is_wanted(Part::Startup) {
        sections.push(startup::measure(arguments.rounds).context("start-up")?);
    }
    if is_wanted(Part::Pods) {
        sections.push(pods::measure(arguments.pods).context("pods")?);
    }
    if is_wanted(Part::Memory) {
        sections.push(memory::measure(arguments.idle_pods).context("memory")?);
    }
    if is_wanted(Part::Services) {
        let (count, rounds) = (arguments.services, arguments.rounds);
        sections.push(services::measure(count, rounds, arguments.changes).context("services")?);
    }
    if is_wanted(Part::Scale) {
        let kube_proxy = std::env::var_os("KUBE_PROXY").map(PathBuf::from);
        let measured = services::scale::measure(&arguments.sizes.0, kube_proxy);
        sections.extend(measured.context("scale")?);
    }
    for key in ["binary", "version", "machine", "load"] {
        println!("{key}: {}", about[key].as_str().unwrap_or_default());
    }
    print!("\n{}", report::table(&sections));
    if let Some(path) = &arguments.json {
        let text = serde_json::to_string_pretty(&report::to_json(&about, &sections))?;
        std::fs::write(path, text + "\n").with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// What was measured, and where: so that figures of two runs can be compared at all.
fn about() -> anyhow::Result<Value> {
    let said = |program: &std::ffi::OsStr, arguments: &[&str]| -> anyhow::Result<String> {
        let output = Command::new(program).args(arguments).output();
        let output = output.with_context(|| program.to_string_lossy().into_owned())?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let load = std::fs::read_to_string("/proc/loadavg").context("/proc/loadavg")?;
    Ok(json!({
        "binary": Machine::binary().display().to_string(),
        "version": said(Machine::binary().as_os_str(), &["version"])?,
        "machine": format!(
            "Linux {}, {} processors",
            said("uname".as_ref(), &["-r"])?,
            thread::available_parallelism()?
        ),
        "load": format!("{} when it began", load.split(' ').next().unwrap_or_default()),
    }))
}

/// Ctrl-C leaves nothing behind either.
fn clean_up_when_asked_to_end() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate) = {
        let _context = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        eprintln!("stopping, and removing what was made");
        node::clean_up();
        std::process::exit(130);
    });
    Ok(())
}
