//! What `cargo bench -p keelson-proxy` measures: objects in, commits out, in the network namespace
//! of the calling thread.

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use keelson_api::object::ObjectKey;
use serde_json::json;

use crate::{
    DetectLocal, ProxyConfig,
    model::{
        Family,
        services::Service,
        slices::{Place, Slice},
        table::ServiceTable,
    },
    nftables::apply::Table,
    ruleset::{Unit, desired::Desired},
};

/// What was measured with so many Services.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// From the objects to the desired ruleset.
    pub plan: Duration,
    /// The first write of everything.
    pub load: Duration,
    /// One endpoint replaced, from its slice to the commit: the median.
    pub change: Duration,
    /// … and the 99th of a hundred.
    pub change_p99: Duration,
    /// A restart with nothing to change.
    pub restart: Duration,
    /// Elements written by that restart.
    pub restart_elements: usize,
    /// Resident memory of the process afterwards, in bytes.
    pub resident: u64,
    /// The most that it was during that restart.
    pub restart_peak: u64,
}

fn address(base: u32, n: usize) -> String {
    Ipv4Addr::from(base + u32::try_from(n).unwrap_or(0)).to_string()
}

fn service(n: usize) -> Option<Service> {
    let object: core::Service = serde_json::from_value(json!({
        "metadata": {"name": format!("s{n}"), "namespace": "bench"},
        "spec": {"clusterIP": address(0x0a60_0001, n), "ports": [{"port": 80}]},
    }))
    .ok()?;
    Service::read(&object).0
}

fn slice(n: usize, endpoints: usize, version: usize) -> Option<Slice> {
    let endpoints: Vec<_> = (0..endpoints)
        .map(|e| {
            let shift = if e == 0 { version * 7_000_000 } else { 0 };
            let address = address(0x0b00_0001, n * endpoints + e + shift);
            json!({"addresses": [address], "nodeName": "elsewhere"})
        })
        .collect();
    let object: discovery::EndpointSlice = serde_json::from_value(json!({
        "metadata": {"name": format!("s{n}-1"), "namespace": "bench",
                     "labels": {"kubernetes.io/service-name": format!("s{n}")}},
        "addressType": "IPv4", "endpoints": endpoints, "ports": [{"port": 8080}],
    }))
    .ok()?;
    Slice::read(&object, &Place { node: "here".into(), zone: None }).0
}

/// Loads so many Services of so many endpoints each, changes single endpoints, starts again, and
/// removes everything.
///
/// # Errors
/// When the kernel refuses something.
pub fn measure(services: usize, endpoints: usize) -> Result<Measured, String> {
    let failed = |error: &dyn std::fmt::Display| error.to_string();
    let mut config = ProxyConfig::new("here");
    config.detect_local =
        DetectLocal::Ranges("10.244.0.0/16".parse::<ipnet::IpNet>().into_iter().collect());
    let open = || Table::open(crate::start::layout(&config, Family::V4)).map_err(|e| failed(&e));
    let mut table = open()?;
    table.remove().map_err(|e| failed(&e))?;

    let objects: Vec<_> = (0..services).map(|n| (service(n), slice(n, endpoints, 0))).collect();
    let mut known = ServiceTable::default();
    let mut desired = Desired::default();
    let key = |n: usize| ObjectKey::new("bench", format!("s{n}"));
    let slice_key = |n: usize| ObjectKey::new("bench", format!("s{n}-1"));
    let begin = Instant::now();
    for (n, (service, slice)) in objects.into_iter().enumerate() {
        known.set_service(&key(n), service);
        known.set_slice(&slice_key(n), slice);
    }
    for n in 0..services {
        let rules = known.rules(&key(n), &[Family::V4]).map(|(rules, _)| rules);
        desired.replace(&known.shared_key(&key(n)), rules);
    }
    let plan = begin.elapsed();
    let begin = Instant::now();
    table.synchronize(&desired).map_err(|e| failed(&e))?;
    let load = begin.elapsed();

    let mut changes = Vec::new();
    for round in 0..1_000_usize {
        let n = round * 7919 % services;
        let changed = slice(n, endpoints, 1 + round / services);
        let begin = Instant::now();
        let mut dirty: Vec<Unit> = Vec::new();
        for key in known.set_slice(&slice_key(n), changed) {
            let rules = known.rules(&key, &[Family::V4]).map(|(rules, _)| rules);
            dirty.extend(desired.replace(&key, rules).dirty);
        }
        table.apply(&dirty, &desired).map_err(|e| failed(&e))?;
        changes.push(begin.elapsed());
    }
    changes.sort_unstable();

    drop(table);
    // 5: forget how much it was at most (proc_pid_clear_refs(5)).
    std::fs::write("/proc/self/clear_refs", "5").map_err(|e| failed(&e))?;
    let begin = Instant::now();
    let mut table = open()?;
    let restarted = table.synchronize(&desired).map_err(|e| failed(&e))?;
    let restart = begin.elapsed();
    let (resident, restart_peak) = (memory("VmRSS:"), memory("VmHWM:"));
    table.remove().map_err(|e| failed(&e))?;
    Ok(Measured {
        plan,
        load,
        change: changes[changes.len() / 2],
        change_p99: changes[changes.len() * 99 / 100],
        restart,
        restart_elements: restarted.elements,
        resident,
        restart_peak,
    })
}

/// A line of this process's status, in bytes.
fn memory(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let kilobytes = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}
