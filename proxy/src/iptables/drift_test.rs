//! Others' edits, where nobody tells of them: a look finds them, or a change that they get in the
//! way of.

use std::time::Duration;

use prometheus::IntCounter;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{
    Settings, Variant,
    golden::settings,
    kernel_test::{Proxy, service, slice},
};
use crate::{
    backend::{Backend, Goal},
    drift::{Hearing, look},
    model::Family,
    netns::Namespace,
    until::PATIENCE,
    watches::ChangeKind,
};

fn program(variant: Variant) -> &'static str {
    if variant == Variant::Legacy { "iptables-legacy" } else { "iptables-nft" }
}

fn listed(host: &Namespace, variant: Variant) -> Vec<String> {
    let listing = host.sh(&format!("{}-save 2>/dev/null", program(variant)));
    let mut rules: Vec<String> =
        listing.lines().filter(|line| line.starts_with("-A")).map(str::to_owned).collect();
    rules.sort_unstable();
    rules
}

fn served(host: &Namespace, variant: Variant) -> Proxy {
    let mut proxy = Proxy::start(host, Settings { variant, ..settings(Family::V4) });
    let mut units = Vec::new();
    for n in 1..4 {
        units.extend(proxy.take_in(service(Family::V4, n, json!({}), Value::Null)));
        units.extend(proxy.take_in(slice(Family::V4, n, &[(n, true, true)])));
    }
    let goal = Goal { desired: &proxy.desired, objects: &proxy.objects };
    assert!(proxy.rules.apply(&units, goal).unwrap().refused.is_empty());
    proxy
}

#[test]
fn edits_that_get_in_the_way_of_a_change_are_mended_with_it_and_told() {
    for variant in [Variant::Nft, Variant::Legacy] {
        let (host, fresh) = (Namespace::new(), Namespace::new());
        let iptables = program(variant);
        for edit in [
            // The line that the change takes away.
            format!("{iptables} -t nat -F KUBE-SERVICES"),
            // A chain that it leads to.
            format!("{iptables} -t nat -F; {iptables} -t nat -X"),
        ] {
            let mut proxy = served(&host, variant);
            host.sh(&edit);
            let mut gone = service(Family::V4, 2, json!({}), Value::Null);
            gone["spec"]["clusterIP"] = "None".into();
            let units = proxy.take_in(gone.clone());
            let goal = Goal { desired: &proxy.desired, objects: &proxy.objects };
            let applied = proxy.rules.apply(&units, goal).unwrap();
            assert!(applied.drifted && applied.refused.is_empty(), "{edit}: {applied:?}");
            let mut other = served(&fresh, variant);
            let units = other.take_in(gone);
            let goal = Goal { desired: &other.desired, objects: &other.objects };
            assert!(!other.rules.apply(&units, goal).unwrap().drifted);
            assert_eq!(listed(&host, variant), listed(&fresh, variant), "{edit}");
            let goal = Goal { desired: &proxy.desired, objects: &proxy.objects };
            assert!(!proxy.rules.synchronize(goal).unwrap().drifted, "it is told once");
        }
    }
}

#[tokio::test]
async fn an_edit_of_the_old_tables_is_noticed_by_the_next_look() {
    let (host, period) = (Namespace::new(), Duration::from_millis(300));
    let proxy = served(&host, Variant::Legacy);
    let canary = proxy.rules.canary();
    assert!(!canary.is_told_by_kernel());
    let (changes, mut queue) = mpsc::channel(10);
    let failures = IntCounter::new("failures", "Failures.").unwrap();
    let shutdown = CancellationToken::new();
    let hearing = Hearing { changes, period, failures, shutdown: shutdown.clone() };
    let looking = tokio::spawn(look(canary, hearing));
    for edit in ["-t nat -D KUBE-SERVICES 1", "-t mangle -X KUBE-PROXY-CANARY"] {
        host.sh(&format!("iptables-legacy {edit}"));
        let told = tokio::time::timeout(PATIENCE, queue.recv()).await;
        let told = told.unwrap_or_else(|_| panic!("nobody noticed {edit}")).unwrap().kind;
        assert!(matches!(told, ChangeKind::Drift("canary")), "{told:?}");
    }
    shutdown.cancel();
    tokio::time::timeout(PATIENCE, looking).await.expect("it ends").unwrap();
}
