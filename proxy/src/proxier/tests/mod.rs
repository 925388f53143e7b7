//! The loop with backends that fail, refuse and are slow: what is healthy goes in, and what isn't is
//! tried again, each by itself.

mod fixture;

use std::{
    collections::HashSet,
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};

use http::{Request, Response};
use http_body_util::BodyExt;
use keelson_api::{events::EventRecorder, object::ObjectKey};
use kube::{Client, client::Body};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use self::fixture::{Call, LONGEST, Trial, service, slice};
use crate::{
    backend::Forget,
    conntrack::Cleaner,
    model::{Family, Protocol},
    netns::Namespace,
    ruleset::{Frontend, Lane},
    until::{PATIENCE, until},
    watches::ChangeKind,
};

const PENDING: &str = "kubeproxy_sync_proxy_rules_service_changes_pending";

#[test]
fn a_start_compares_the_connections_of_each_family_once() {
    let host = Namespace::new();
    let mut trial = Trial::tracking(|metrics| host.run(move || Cleaner::start(metrics).unwrap()));
    trial.commit();
    for family in ["IPv4", "IPv6"] {
        let metric = "kubeproxy_conntrack_reconciler_sync_duration_seconds_count";
        let once = format!("{metric}{{ip_family=\"{family}\"}} 1");
        until(&once, || trial.metric(&once));
    }
}

#[test]
fn what_a_new_list_lacks_is_gone() {
    let mut trial = Trial::new();
    trial.commit();
    trial.serve("a", 1);
    let both = [Family::V4, Family::V6];
    let endpoints =
        |trial: &Trial, family| -> usize { trial.script(family).held.values().map(Vec::len).sum() };
    assert!(both.iter().all(|family| endpoints(&trial, *family) > 0));
    trial.take_in(ChangeKind::Slices(HashSet::new()));
    trial.commit();
    for family in both {
        assert_eq!((trial.served(family).len(), endpoints(&trial, family)), (1, 0));
    }
    trial.take_in(ChangeKind::Services(HashSet::new()));
    trial.commit();
    assert!(both.iter().all(|family| trial.served(*family).is_empty()));
}

#[test]
fn a_family_that_fails_never_delays_the_other() {
    for (sick, healthy) in [(Family::V6, Family::V4), (Family::V4, Family::V6)] {
        let mut trial = Trial::new();
        trial.script(sick).fails = true;
        trial.commit();
        let first = trial.proxier.wakes_at();
        for (name, port) in [("a", 1), ("b", 2), ("c", 3)] {
            trial.serve(name, port);
            assert_eq!(trial.served(healthy).last(), Some(&port), "in the same commit");
        }
        assert_eq!(trial.calls(healthy)[0], Call::All);
        assert_eq!(trial.calls(sick), [Call::All], "nothing before it is time");
        assert_eq!(trial.proxier.wakes_at(), first, "other changes don't put it off");
        assert!(trial.metric(&format!("{PENDING} 3")), "they are not everywhere yet");
        assert!(trial.health.keeps_up(), "the other family works");

        let mut last = Duration::ZERO;
        for _ in 0..12 {
            let waited = trial.wake();
            // Between a step and one and a half times it, and the steps double.
            assert!(waited > last.mul_f64(1.3) || waited >= Duration::from_secs(30), "{waited:?}");
            assert!(waited <= LONGEST);
            last = waited;
            assert_eq!(trial.calls(sick), [Call::All]);
        }
        assert_eq!(trial.calls(healthy), [], "it is left alone");

        trial.script(sick).fails = false;
        trial.wake();
        assert_eq!(trial.served(sick), [1, 2, 3]);
        assert!(trial.metric(&format!("{PENDING} 0")));
        assert_eq!(trial.proxier.wakes_at(), None);
        // The next failure begins with the first step again.
        trial.script(sick).fails = true;
        trial.serve("d", 4);
        assert!(trial.wake() < Duration::from_millis(200));
    }
}

#[test]
fn what_is_refused_holds_back_itself_only() {
    let mut trial = Trial::new();
    trial.commit();
    trial.script(Family::V4).refuses = [1].into();
    trial.serve("bad", 1);
    trial.serve("good", 2);
    assert_eq!(trial.served(Family::V4), [2], "the healthy rest goes in");
    assert_eq!(trial.served(Family::V6), [1, 2]);

    // What other Services need goes on.
    let lb = json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 31999});
    trial.take_in(service("lb", json!({"port": 3}), lb));
    trial.take_in(slice("lb", "IPv4", &["10.244.1.3"], 3));
    trial.commit();
    assert!(trial.checks().contains("31999"), "{}", trial.checks());
    assert!(trial.metric(&format!("{PENDING} 0")), "all was tried");
    assert!(trial.health.keeps_up());
    // Only what is in force counts as programmed: two of three, and both in the other family.
    let programmed = |family, count| {
        let name = "kubeproxy_network_programming_duration_seconds_count";
        format!("{name}{{ip_family=\"{family}\"}} {count}")
    };
    assert!(trial.metric(&programmed("IPv4", 2)));
    assert!(trial.metric(&programmed("IPv6", 2)));

    trial.calls(Family::V4);
    let mut last = Duration::ZERO;
    for _ in 0..12 {
        let waited = trial.wake();
        assert!(waited > last.mul_f64(1.3) || waited >= Duration::from_secs(30), "{waited:?}");
        assert!(waited <= LONGEST);
        last = waited;
        assert_eq!(trial.calls(Family::V4), [Call::Units(1)], "nothing but the one");
    }
    trial.script(Family::V4).refuses.clear();
    trial.wake();
    assert!(trial.served(Family::V4).contains(&1));
    assert!(trial.metric(&programmed("IPv4", 3)), "now it counts");
    assert_eq!(trial.proxier.wakes_at(), None);
}

#[test]
fn a_change_of_what_was_refused_is_tried_at_once() {
    let mut trial = Trial::new();
    trial.commit();
    trial.script(Family::V4).refuses = [1].into();
    trial.serve("bad", 1);
    trial.script(Family::V4).refuses.clear();
    trial.take_in(slice("bad", "IPv4", &["10.244.1.9"], 1));
    trial.commit();
    assert_eq!(trial.served(Family::V4), [1]);
    assert_eq!(trial.proxier.wakes_at(), None, "there is nothing left to try again");
}

#[test]
fn what_is_never_served_is_not_tried_again() {
    let mut trial = Trial::new();
    trial.script(Family::V4).never = [1].into();
    trial.serve("sctp", 1);
    trial.serve("web", 2);
    assert_eq!(trial.served(Family::V4), [2]);
    assert_eq!(trial.proxier.wakes_at(), None);
    assert!(trial.health.keeps_up());
}

#[test]
fn a_try_that_hangs_is_tried_seldom() {
    let mut trial = Trial::new();
    {
        let mut script = trial.script(Family::V6);
        (script.fails, script.takes) = (true, Duration::from_millis(100));
    }
    trial.commit();
    assert!(trial.wake() >= Duration::from_secs(1), "ten times as long as it took");
}

#[test]
fn drift_is_mended_in_every_family_and_counted_once() {
    let mut trial = Trial::new();
    trial.script(Family::V4).generation = Some(7);
    trial.serve("web", 1);
    for family in [Family::V4, Family::V6] {
        trial.calls(family);
        trial.script(family).held.clear();
    }
    // What another program did is heard as often as it did something.
    for _ in 0..3 {
        trial.take_in(ChangeKind::Drift("edit"));
    }
    trial.commit();
    for family in [Family::V4, Family::V6] {
        assert_eq!((trial.served(family), trial.calls(family)), (vec![1], vec![Call::All]));
    }
    assert!(trial.metric("keelson_proxy_drift_total{cause=\"edit\"} 1"));

    // An overflow that lost nothing.
    trial.take_in(ChangeKind::Drift("overflow"));
    trial.commit();
    assert_eq!(trial.calls(Family::V4), []);
    trial.script(Family::V4).generation = Some(8);
    trial.take_in(ChangeKind::Drift("overflow"));
    trial.commit();
    assert_eq!(trial.calls(Family::V4), [Call::All]);

    // What nobody was heard doing, and got in the way of a change.
    trial.script(Family::V4).drifted = true;
    trial.serve("web", 2);
    assert!(trial.metric("keelson_proxy_drift_total{cause=\"refusal\"} 1"));
}

#[test]
fn each_family_is_told_of_when_it_is_in_force_for_the_first_time() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let telling = Arc::clone(&told);
    let mut trial = Trial::new();
    trial.proxier =
        trial.proxier.when_in_force(move |family, _| telling.lock().unwrap().push(family));
    trial.script(Family::V6).fails = true;
    trial.commit();
    assert_eq!(*told.lock().unwrap(), [Family::V4], "the rules of other modes go for it alone");
    trial.script(Family::V6).fails = false;
    trial.wake();
    trial.take_in(ChangeKind::Drift("edit"));
    trial.commit();
    assert_eq!(*told.lock().unwrap(), [Family::V4, Family::V6], "once");
}

#[test]
fn sticky_clients_forget_again_when_packets_under_way_are_through() {
    let mut trial = Trial::new();
    trial.commit();
    let frontend = Frontend {
        family: Family::V4,
        lane: Lane::NodePort,
        address: None,
        protocol: Protocol::Tcp,
        port: 1,
    };
    trial.script(Family::V4).forgets = vec![Forget { frontend, endpoint: None }];
    trial.serve("web", 1);
    trial.script(Family::V4).forgets.clear();
    trial.calls(Family::V4);
    assert_eq!(trial.wake(), Duration::from_secs(1));
    assert_eq!(trial.calls(Family::V4), [Call::Forget(1)]);
    assert_eq!(trial.proxier.wakes_at(), None);
}

#[test]
fn changes_that_come_during_a_commit_are_written_together() {
    let mut trial = Trial::new();
    trial.commit();
    trial.calls(Family::V4);
    trial.script(Family::V4).takes = Duration::from_millis(300);
    let script = trial.script_of(Family::V4);
    let (queue, changes) = mpsc::channel(100);
    let looping = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(trial.proxier.run(changes));
    });
    let send = |name: &str, port: u16| {
        queue.blocking_send(service(name, json!({"port": port}), json!({})).into()).unwrap();
    };
    send("first", 1);
    // The backend holds its script while it is at work.
    until("the loop begins", || script.try_lock().map_or(true, |script| !script.calls.is_empty()));
    for n in 2..50 {
        send(&format!("s{n}"), n);
    }
    drop(queue);
    looping.join().unwrap();
    let script = script.lock().unwrap();
    assert_eq!(script.held.len(), 49);
    assert!(script.calls.len() <= 3, "{:?}", script.calls);
}

#[test]
fn of_two_services_with_one_port_the_second_gets_an_event() {
    let (sent, mut events) = mpsc::channel::<Value>(10);
    let api = tower::service_fn(move |request: Request<Body>| {
        let sent = sent.clone();
        async move {
            let body = request.into_body().collect().await.unwrap().to_bytes();
            sent.send(serde_json::from_slice(&body).unwrap()).await.unwrap();
            Ok::<_, Infallible>(Response::new(Body::from(body.to_vec())))
        }
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let shutdown = CancellationToken::new();
        let client = Client::new(api, "default");
        let (recorder, writer) =
            EventRecorder::spawn(client, "kube-proxy", Some("here"), shutdown.clone());
        let mut trial = Trial::with_events(recorder);
        for name in ["first", "second"] {
            let port = json!({"port": 80, "nodePort": 30080});
            let address = if name == "first" { "10.96.0.98" } else { "10.96.0.99" };
            let spec = json!({"type": "NodePort", "clusterIP": address, "clusterIPs": [address]});
            trial.take_in(service(name, port, spec));
        }
        trial.commit();
        let event = tokio::time::timeout(PATIENCE, events.recv()).await;
        let event = event.expect("an event in time").unwrap();
        assert_eq!(event["reason"], "PortConflict");
        assert_eq!(event["type"], "Warning");
        assert_eq!(event["involvedObject"]["name"], "second");
        assert_eq!(event["involvedObject"]["uid"], "second");
        assert_eq!(event["source"]["component"], "kube-proxy");
        let message = event["message"].as_str().unwrap();
        assert!(message.contains("30080") && message.contains("d/first"), "{message}");

        // A refusal is told too.
        trial.script(Family::V4).refuses = [7].into();
        trial.serve("bad", 7);
        let event = loop {
            let event = tokio::time::timeout(PATIENCE, events.recv()).await;
            let event = event.expect("an event in time").unwrap();
            // One that repeats is counted up.
            if event["reason"] != Value::Null {
                break event;
            }
        };
        assert_eq!(event["reason"], "FailedToUpdateRules");
        assert_eq!(event["involvedObject"]["name"], "bad");
        shutdown.cancel();
        writer.await.unwrap();
    });
}

#[test]
fn nothing_is_written_before_everything_was_listed() {
    let mut trial = Trial::unlisted();
    trial.serve("web", 1);
    trial.take_in(ChangeKind::Services([ObjectKey::new("d", "web")].into()));
    trial.commit();
    assert_eq!(trial.calls(Family::V4), []);
    let slices = ["web-ipv4", "web-ipv6"].map(|name| ObjectKey::new("d", name));
    trial.take_in(ChangeKind::Slices(slices.into()));
    trial.commit();
    assert_eq!((trial.served(Family::V4), trial.served(Family::V6)), (vec![1], vec![1]));
}
