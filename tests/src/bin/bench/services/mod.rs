//! How long Services take from the API's answer until packets see them.
//!
//! The endpoints are addresses of the machine's neighbour, where one listener answers with the
//! address it was reached at. Connections are made from the machine, through the Services'
//! addresses: what is measured is what a packet sees, not what the proxy says.

mod change;
mod load;
mod nft;
mod objects;
mod packets;
pub(crate) mod scale;

use std::{path::PathBuf, time::Instant};

use crate::{
    node::Running,
    report::{Figure, Section, Unit},
    services::{nft::Peer, packets::Listener},
    statistics::Samples,
};

/// What all measurements here share.
struct Bench {
    running: Running,
    data_dir: PathBuf,
    netns: String,
    listener: Listener,
    count: usize,
}

/// Loads `count` Services `rounds` times, restarts the process with them, and changes `changes`
/// endpoints.
pub(crate) fn measure(count: usize, rounds: usize, changes: usize) -> anyhow::Result<Section> {
    let running = Running::start()?;
    let machine = &running.cluster.machine;
    let (data_dir, netns) = (running.data_dir(), machine.netns());
    let listener = Listener::start(&machine.neighbour_netns())?;
    let peer = Peer::new(machine.neighbour_netns(), machine.dir().join("beside.nft"), count)?;
    let mut bench = Bench { running, data_dir, netns, listener, count };

    let mut beside_load = Samples::default();
    let (mut loaded, mut created) = (Samples::default(), Samples::default());
    for round in 0..rounds {
        eprintln!("services: load {} of {rounds}", round + 1);
        let load = bench.load()?;
        created.add(load.creating);
        loaded.add(load.reachable);
        beside_load.add(peer.load()?);
        if round + 1 < rounds {
            bench.remove_all()?;
        }
    }

    eprintln!("services: {changes} changed endpoints");
    let changed = bench.change(changes, &peer)?;

    let mut cold = load::Restarts::default();
    let mut warm = load::Restarts::default();
    for round in 0..rounds {
        eprintln!("services: restart {} of {rounds}", round + 1);
        bench.restart(true, &mut cold)?;
        beside_load.add(peer.load()?);
        bench.restart(false, &mut warm)?;
    }
    let elements = nft::elements(&bench.netns)?;
    let Bench { running, listener, .. } = bench;
    let resident = crate::memory::resident(running.cluster.pid())?;
    listener.stop()?;
    drop(peer);
    running.stop();

    let beside = "nft -f, as many elements";
    Ok(Section {
        title: format!(
            "{count} Services of 2 endpoints each; connections from the node, endpoints on another machine; \
             beside it Debian's nft with the same elements in a table of the same shape"
        ),
        command: "tools/bench --only services".to_owned(),
        figures: vec![
            Figure::new("objects created, 8 requests at a time", Unit::Milliseconds, created),
            Figure::new(
                "last create answered → every Service reachable",
                Unit::Milliseconds,
                loaded,
            )
            .beside(beside, beside_load.clone())
            .aim(100.0),
            Figure::new("cold start, no rules: the proxy's syncs", Unit::Milliseconds, cold.synced)
                .beside(beside, beside_load)
                .aim(100.0),
            Figure::new("cold start: exec → API answers", Unit::Milliseconds, cold.answered),
            Figure::new(
                "cold start: exec → last Service reachable",
                Unit::Milliseconds,
                cold.reachable,
            ),
            Figure::new("restart, rules there: the proxy's syncs", Unit::Milliseconds, warm.synced),
            Figure::new(
                "one endpoint changed: answer → first packet at it",
                Unit::Milliseconds,
                changed.packet,
            )
            .beside("nft -f, 2 elements", changed.beside)
            .aim(10.0),
            Figure::new(
                "  of that, in the proxy: event → commit, mean",
                Unit::Milliseconds,
                changed.commit,
            ),
            Figure::new("  update asked → answered", Unit::Milliseconds, changed.answered),
            Figure::new(
                "elements in the kernel's maps and sets",
                Unit::Count,
                Samples::one(elements as f64),
            )
            .beside("needed (1 + 2 for each)", Samples::one((count * 3) as f64)),
            Figure::new(
                "resident, at the end of all this",
                Unit::Megabytes,
                Samples::one(resident),
            ),
        ],
    })
}

/// Waits until the last of the Services answer, from the node.
fn reachable(netns: &str, services: &[objects::Made]) -> anyhow::Result<Instant> {
    crate::inside::inside(netns, || {
        for service in services {
            packets::wait_answer(service.address, |_| true)?;
        }
        Ok(Instant::now())
    })
}

#[cfg(test)]
mod tests {
    use keelson_tests::Machine;

    use super::*;

    #[test]
    fn the_comparison_does_what_the_proxy_does() {
        let machine = Machine::new();
        let (netns, file) = (machine.netns(), machine.dir().join("beside.nft"));
        let peer = Peer::new(netns.clone(), file, 10).unwrap();
        peer.load().unwrap();
        assert_eq!(nft::elements(&netns).unwrap(), 0);
        peer.fill().unwrap();
        assert_eq!(nft::elements(&netns).unwrap(), 30);
        peer.change(3, 77).unwrap();
        assert_eq!(nft::elements(&netns).unwrap(), 30);
        nft::flush(&netns).unwrap();
        assert_eq!(nft::elements(&netns).unwrap(), 0);
    }

    #[test]
    fn a_connection_tells_which_endpoint_it_reached() {
        let machine = Machine::new();
        let listener = Listener::start(&machine.neighbour_netns()).unwrap();
        let service = "10.96.0.7".parse().unwrap();
        let (first, second) = (objects::endpoint_address(0), objects::endpoint_address(1));
        let translate_to = |endpoint| {
            let text = format!(
                "flush ruleset\ntable ip t {{\nchain c {{\ntype nat hook output priority -100\n\
                 ip daddr {service} tcp dport 80 dnat to {endpoint}:{}\n}}\n}}\n",
                packets::PORT
            );
            nft::nft(&machine.netns(), &["-f", "-"], &text).unwrap();
        };
        translate_to(first);
        let seen = packets::watch(&machine.netns(), service, second).unwrap();
        let changing = Instant::now();
        translate_to(second);
        let seen = seen.join().unwrap().unwrap();
        assert!(seen > changing);
        listener.stop().unwrap();
    }
}
