//! A monitor whose ears are covered during a load, what happens meanwhile, and others who don't stop.

use std::{
    sync::mpsc::{self, Receiver},
    time::{Duration, Instant},
};

use serde_json::json;

use super::{
    apply::Written,
    batch::Batch,
    monitor::{Ears, Heard, Monitor, Writing},
    refusal_test::set_net_admin,
    ruleset_test::{World, layouts, open, service, slices},
    socket::NftSocket,
};
use crate::{backend::Applied, model::Family, netns::Namespace, until::PATIENCE};

/// What a monitor hears that takes everybody for another program, but may be covered.
fn listen(host: &Namespace, ears: Ears) -> Receiver<Heard> {
    let (heard, hears) = mpsc::channel();
    let (go, started) = mpsc::channel();
    host.run(move || {
        std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let nobody = Writing { port: u32::MAX, ears };
                let mut monitor = Monitor::open(&[nobody], vec![2]).unwrap();
                go.send(()).unwrap();
                while heard.send(monitor.heard().await.unwrap()).is_ok() {}
            });
        });
    });
    started.recv().unwrap();
    hears
}

#[test]
fn a_load_is_not_told_and_what_follows_is() {
    let host = Namespace::new();
    let layout = layouts(Family::V4).remove(0);
    let mut world = World::new();
    world.take_in(&[service(1, json!({"ports": [{"port": 80}]}))]);
    let mut table = open(&host, &layout);
    let hears = listen(&host, table.writing().ears);
    let loaded = table.synchronize(&world.desired).unwrap();
    assert!(loaded.rebuilt.is_some() && loaded.elements > 0, "{loaded:?}");
    let soon = hears.recv_timeout(Duration::from_millis(200));
    assert!(soon.is_err(), "the kernel made a message of every element: {soon:?}");
    let dirty = world.take_in(&slices(1, &json!([{"port": 8080}]), &[(1, true, false)]));
    assert!(table.apply(&dirty, &world.desired).unwrap().elements > 0);
    assert_eq!(hears.recv_timeout(Duration::from_secs(10)), Ok(Heard::Edited));
}

#[test]
fn a_commit_of_others_during_a_load_leaves_doubts() {
    let host = Namespace::new();
    let layout = layouts(Family::V4).remove(0);
    let mut world = World::new();
    world.take_in(&[service(1, json!({"ports": [{"port": 80}]}))]);
    let generation = |host: &Namespace| host.run(|| NftSocket::open().unwrap().generation());
    for (others, doubts) in [(0, Written::All), (1, Written::Unsure), (3, Written::Unsure)] {
        let mut table = open(&host, &layout);
        table.remove().unwrap();
        let before = generation(&host).unwrap();
        for _ in 0..others {
            host.sh("nft 'add table ip other; delete table ip other'");
        }
        let mut applied = Applied::default();
        let written = table.compare_and_write(&world.desired, &mut applied, Some(before));
        assert_eq!(written.unwrap(), doubts, "{others}: {applied:?}");
        assert!(applied.rebuilt.is_some() && applied.elements > 0, "{others}: {applied:?}");
    }
}

#[test]
fn ears_that_the_kernel_keeps_covered_are_given_up() {
    let host = Namespace::new();
    let heard = host.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let ears = Ears::default();
            let own = Writing { port: u32::MAX, ears: ears.clone() };
            let mut monitor = Monitor::open(&[own], vec![2]).unwrap();
            // Who may not listen any more can't begin to again.
            ears.covered(|| set_net_admin(false));
            set_net_admin(true);
            tokio::time::timeout(PATIENCE, monitor.heard()).await
        })
    });
    assert!(heard.expect("it ends").is_err(), "and so another one is opened");
}

/// Long enough to be told from a moment.
const LONGEST: Duration = Duration::from_millis(500);

#[test]
fn who_edits_without_end_is_mended_less_often() {
    let host = Namespace::new();
    let (early, late, by) = host.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut monitor = Monitor::open(&[], vec![2]).unwrap().patient(LONGEST);
            let mut other = NftSocket::open().unwrap();
            let mut took = Vec::new();
            for _ in 0..22 {
                let mut batch = Batch::new(Family::V4);
                batch.add_table("");
                batch.delete_table();
                other.commit(&mut batch).unwrap();
                let begin = Instant::now();
                monitor.heard().await.unwrap();
                took.push(begin.elapsed());
            }
            let late = took.split_off(20);
            (took.into_iter().min(), late.into_iter().min(), monitor.last().cloned())
        })
    });
    assert!(early.unwrap() < LONGEST, "{early:?}");
    assert!(late.unwrap() >= LONGEST, "{late:?}");
    assert!(by.is_some_and(|by| by.pid != 0 && !by.name.is_empty()));
}
