//! What is refused: old rules stay whole, the rest goes in, and it goes in itself once it can.

use std::{
    collections::HashSet,
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use keelson_api::{events::EventRecorder, object::ObjectKey};
use nix::fcntl::{Flock, FlockArg};
use prometheus::Registry;
use serde_json::{Value, json};

use super::{
    Settings, Variant,
    golden::settings,
    kernel_test::{Proxy, service, slice},
};
use crate::{
    backend::{Applied, Backend, BackendError, Goal},
    config::Mode,
    health::Health,
    metrics::Metrics,
    model::{
        Family,
        services::Service,
        slices::{Place, Slice},
    },
    netns::Namespace,
    proxier::{Proxier, Reports},
    ruleset::Unit,
    until::until,
    watches::ChangeKind,
};

const VARIANTS: [Variant; 2] = [Variant::Nft, Variant::Legacy];

/// Puts a program in the place of `iptables-restore`; `REAL` is the one that was there.
fn replace(proxy: &mut Proxy, folder: &tempfile::TempDir, script: &str) -> PathBuf {
    let path = folder.path().join("iptables-restore");
    let programs = Arc::get_mut(&mut proxy.rules.programs).unwrap();
    let script = script.replace("REAL", &programs.restore.display().to_string());
    let script = script.replace("HERE", &folder.path().display().to_string());
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    programs.restore.clone_from(&path);
    path
}

fn apply(proxy: &mut Proxy, units: &[Unit]) -> Result<Applied, BackendError> {
    proxy.rules.apply(units, Goal { desired: &proxy.desired, objects: &proxy.objects })
}

fn listed(host: &Namespace, variant: Variant) -> String {
    host.sh(match variant {
        Variant::Legacy => "iptables-legacy-save 2>/dev/null | grep -v '^[#:]'",
        _ => "iptables-nft-save 2>/dev/null | grep -v '^[#:]'",
    })
}

fn with_endpoint(n: u8) -> [Value; 2] {
    [service(Family::V4, n, json!({}), Value::Null), slice(Family::V4, n, &[(n, true, true)])]
}

#[test]
fn a_service_that_is_refused_keeps_no_other_out_and_goes_in_once_it_can() {
    for variant in VARIANTS {
        let (host, folder) = (Namespace::new(), tempfile::tempdir().unwrap());
        let mut proxy = Proxy::start(&host, Settings { variant, ..settings(Family::V4) });
        replace(
            &mut proxy,
            &folder,
            "cat > HERE/input\n\
             line=$(grep -n -m 1 10.96.0.66 HERE/input | cut -d : -f 1)\n\
             if [ -n \"$line\" ] && [ -e HERE/refuse ]; then\n\
               echo \"iptables-restore: line $line failed\" >&2; exit 1\n\
             fi\n\
             exec REAL \"$@\" < HERE/input",
        );
        let refuse = folder.path().join("refuse");
        std::fs::write(&refuse, "").unwrap();
        let mut units = Vec::new();
        for object in with_endpoint(1) {
            units.extend(proxy.take_in(object));
        }
        apply(&mut proxy, &units).unwrap();
        let before = listed(&host, variant);
        assert!(before.contains("10.96.0.1/32"), "{before}");

        // At once with a healthy one, and with a change of one that is there.
        let mut units = Vec::new();
        for object in with_endpoint(66).into_iter().chain(with_endpoint(2)) {
            units.extend(proxy.take_in(object));
        }
        units.extend(proxy.take_in(slice(Family::V4, 1, &[(7, true, true)])));
        let applied = apply(&mut proxy, &units).unwrap();
        let [(Unit::Frontend(refused), error)] = &applied.refused[..] else {
            panic!("{applied:?}")
        };
        assert_eq!(refused.address, Some([10, 96, 0, 66].into()));
        let message = error.to_string();
        assert!(message.contains("failed: -") && error.may_pass(), "{message}");
        let rules = listed(&host, variant);
        assert!(
            rules.contains("10.96.0.2/32") && rules.contains("--to-destination 10.244.7.2:8080"),
            "{rules}"
        );
        assert!(!rules.contains("10.96.0.66"), "{rules}");

        let again: Vec<Unit> = applied.refused.iter().map(|(unit, _)| *unit).collect();
        assert_eq!(apply(&mut proxy, &again).unwrap().refused.len(), 1, "still");
        assert_eq!(listed(&host, variant), rules);
        std::fs::remove_file(&refuse).unwrap();
        assert!(apply(&mut proxy, &again).unwrap().refused.is_empty());
        assert!(listed(&host, variant).contains("10.96.0.66/32"));
    }
}

#[test]
fn a_program_that_always_fails_is_no_services_fault() {
    for variant in VARIANTS {
        let (host, folder) = (Namespace::new(), tempfile::tempdir().unwrap());
        let mut proxy = Proxy::start(&host, Settings { variant, ..settings(Family::V4) });
        replace(
            &mut proxy,
            &folder,
            "echo run >> HERE/runs\n\
             [ -e HERE/refuse ] && { echo no memory >&2; exit 2; }\nexec REAL \"$@\"",
        );
        let mut units = Vec::new();
        for object in with_endpoint(1) {
            units.extend(proxy.take_in(object));
        }
        apply(&mut proxy, &units).unwrap();
        let before = listed(&host, variant);
        let runs = || std::fs::read_to_string(folder.path().join("runs")).unwrap().lines().count();
        let ran = runs();
        std::fs::write(folder.path().join("refuse"), "").unwrap();
        let units = proxy.take_in(slice(Family::V4, 1, &[(9, true, true)]));
        let error = apply(&mut proxy, &units).unwrap_err();
        assert!(error.to_string().contains("no memory") && error.may_pass(), "{error}");
        assert!(runs() <= ran + 3, "parts are not tried");
        assert_eq!(listed(&host, variant), before);
        std::fs::remove_file(folder.path().join("refuse")).unwrap();
        let goal = Goal { desired: &proxy.desired, objects: &proxy.objects };
        let applied = proxy.rules.synchronize(goal).unwrap();
        assert!(applied.refused.is_empty() && !applied.drifted, "{applied:?}");
        assert!(listed(&host, variant).contains("--to-destination 10.244.9.2:8080"));
    }
}

#[test]
fn where_nothing_can_be_written_the_proxy_is_late_and_counts_it() {
    let (host, folder) = (Namespace::new(), tempfile::tempdir().unwrap());
    let mut proxy = Proxy::start(&host, settings(Family::V4));
    let script = "[ -e HERE/refuse ] && { echo no memory >&2; exit 4; }\nexec REAL \"$@\"";
    replace(&mut proxy, &folder, script);
    let registry = Registry::new();
    let metrics = Metrics::for_mode(&registry, Mode::Iptables).unwrap();
    let health = Health::new(&[Family::V4], Duration::from_millis(1));
    let events = EventRecorder::discard();
    let reports = Reports { metrics, health: health.clone(), events, conntrack: None };
    let mut proxier = Proxier::new(vec![Box::new(proxy.rules)], &[[192, 0, 2, 1].into()], reports);
    proxier.take_in(ChangeKind::Services(HashSet::new()).into());
    proxier.take_in(ChangeKind::Slices(HashSet::new()).into());
    let mut serve = |endpoint| {
        let key = ObjectKey::new("ns", "svc1");
        let [object, _] = with_endpoint(1);
        let object = Service::read(&serde_json::from_value(object).unwrap()).0;
        proxier.take_in(ChangeKind::Service(key, object, Vec::new()).into());
        let key = ObjectKey::new("ns", "svc1-s");
        let object = slice(Family::V4, 1, &[(endpoint, true, true)]);
        let here = Place { node: "here".into(), zone: None };
        let object = Slice::read(&serde_json::from_value(object).unwrap(), &here).0;
        proxier.take_in(ChangeKind::Slice(key, object, Vec::new()).into());
        proxier.commit(Instant::now());
        proxier.wakes_at()
    };
    assert_eq!(serve(1), None);
    assert!(health.keeps_up());
    std::fs::write(folder.path().join("refuse"), "").unwrap();
    let failed =
        r#"kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total{ip_family="IPv4"}"#;
    let failed = || {
        let text = keelson_api::metrics::encode(&registry).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(failed).map(str::to_owned));
        line.unwrap_or_default()
    };
    let before = failed();
    assert!(serve(9).is_some_and(|at| at > Instant::now()), "it is tried again later");
    assert_ne!(failed(), before);
    until("the proxy is late", || !health.keeps_up());
}

#[test]
fn no_room_for_any_is_no_services_fault_and_no_room_for_one_is() {
    for variant in VARIANTS {
        let (host, folder) = (Namespace::new(), tempfile::tempdir().unwrap());
        let mut proxy = Proxy::start(&host, Settings { variant, ..settings(Family::V4) });
        replace(
            &mut proxy,
            &folder,
            "cat > HERE/input\n\
             if [ -e HERE/full ] && grep -q 'A KUBE-SEP' HERE/input; then\n\
               echo 'line 5: RULE_APPEND failed (No space left on device)' >&2; exit 4\n\
             fi\n\
             exec REAL \"$@\" < HERE/input",
        );
        let mut units = Vec::new();
        for object in (1..4).flat_map(with_endpoint) {
            units.extend(proxy.take_in(object));
        }
        apply(&mut proxy, &units).unwrap();
        let before = listed(&host, variant);
        std::fs::write(folder.path().join("full"), "").unwrap();
        let one = proxy.take_in(slice(Family::V4, 1, &[(101, true, true)]));
        assert_eq!(apply(&mut proxy, &one).unwrap().refused.len(), 1);
        let other = proxy.take_in(slice(Family::V4, 2, &[(102, true, true)]));
        let error = apply(&mut proxy, &[one, other].concat()).unwrap_err();
        assert!(error.to_string().contains("No space left on device"), "{error}");
        assert_eq!(listed(&host, variant), before);
    }
}

#[test]
fn a_refused_service_keeps_what_it_has_and_nothing_else_is_left() {
    for variant in VARIANTS {
        let (host, folder) = (Namespace::new(), tempfile::tempdir().unwrap());
        let with = Settings { variant, ..settings(Family::V4) };
        let refusing = "cat > HERE/input\n\
             if grep -q 10.96.0.66 HERE/input && [ -e HERE/refuse ]; then\n\
               echo 'line 3 failed' >&2; exit 1\n\
             fi\n\
             exec REAL \"$@\" < HERE/input";
        let mut proxy = Proxy::start(&host, with.clone());
        replace(&mut proxy, &folder, refusing);
        let mut units = Vec::new();
        for object in [1, 2, 66].into_iter().flat_map(with_endpoint) {
            units.extend(proxy.take_in(object));
        }
        apply(&mut proxy, &units).unwrap();
        let has = |n: u8| listed(&host, variant).contains(&format!("10.244.{n}.2:8080"));
        assert!(has(1) && has(2) && has(66));

        let refuse = folder.path().join("refuse");
        std::fs::write(&refuse, "").unwrap();
        let mut units = proxy.take_in(slice(Family::V4, 66, &[(67, true, true)]));
        let again = units.clone();
        units.extend(proxy.take_in(slice(Family::V4, 2, &[(3, true, true)])));
        let mut headless = service(Family::V4, 1, json!({}), Value::Null);
        headless["spec"]["clusterIP"] = "None".into();
        units.extend(proxy.take_in(headless));
        let applied = apply(&mut proxy, &units).unwrap();
        assert!(!applied.refused.is_empty() && !applied.drifted, "{applied:?}");
        assert!(has(66) && !has(67) && has(3), "old rules stay, and the rest goes in");
        assert!(!has(1) && !has(2), "{}", listed(&host, variant));
        assert!(!listed(&host, variant).contains("ns/svc1:"), "{}", listed(&host, variant));

        let synchronize = |proxy: &mut Proxy| {
            let goal = Goal { desired: &proxy.desired, objects: &proxy.objects };
            proxy.rules.synchronize(goal).unwrap()
        };
        std::fs::remove_file(&refuse).unwrap();
        assert!(apply(&mut proxy, &again).unwrap().refused.is_empty());
        assert!(!has(66) && has(67), "{}", listed(&host, variant));
        assert_eq!(synchronize(&mut proxy).elements, 0, "nothing was left");
        drop(proxy);

        // The next run knows by the rules alone whose they are.
        std::fs::write(&refuse, "").unwrap();
        let mut proxy = Proxy::start(&host, with);
        for object in [2, 66].into_iter().flat_map(with_endpoint) {
            proxy.take_in(object);
        }
        replace(&mut proxy, &folder, refusing);
        assert_eq!(synchronize(&mut proxy).refused.len(), 1);
        assert!(!has(66) && has(67) && has(2) && !has(3));
        std::fs::remove_file(&refuse).unwrap();
        let mut headless = service(Family::V4, 66, json!({}), Value::Null);
        headless["spec"]["clusterIP"] = "None".into();
        let units = proxy.take_in(headless);
        assert!(apply(&mut proxy, &units).unwrap().refused.is_empty());
        assert!(!has(67) && !has(66), "{}", listed(&host, variant));
        assert_eq!(synchronize(&mut proxy).elements, 0, "nothing was left");
    }
}

#[test]
fn a_lock_that_others_hold_is_no_services_fault() {
    let (host, folder) = (Namespace::new(), tempfile::tempdir().unwrap());
    let with = Settings { variant: Variant::Legacy, ..settings(Family::V4) };
    let mut proxy = Proxy::start(&host, with);
    // The host's own lock is for everybody on it.
    replace(
        &mut proxy,
        &folder,
        "echo run >> HERE/runs\nshift 2\nXTABLES_LOCKFILE=HERE/lock exec REAL -w 1 \"$@\"",
    );
    let mut units = Vec::new();
    for n in 1..5 {
        for object in with_endpoint(n) {
            units.extend(proxy.take_in(object));
        }
    }
    apply(&mut proxy, &units).unwrap();
    let before = listed(&host, Variant::Legacy);
    let runs = || std::fs::read_to_string(folder.path().join("runs")).unwrap().lines().count();
    let ran = runs();

    let lock = std::fs::File::create(folder.path().join("lock")).unwrap();
    let lock = Flock::lock(lock, FlockArg::LockExclusive).unwrap();
    let mut units = Vec::new();
    for n in 1..5 {
        units.extend(proxy.take_in(slice(Family::V4, n, &[(n + 100, true, true)])));
    }
    let error = apply(&mut proxy, &units).unwrap_err();
    assert!(error.to_string().contains("lock") && error.may_pass(), "{error}");
    assert_eq!(runs(), ran + 1, "each further try would wait for the lock again");
    assert_eq!(listed(&host, Variant::Legacy), before);
    drop(lock);
    // As the loop does after a failure: it compares everything.
    let goal = Goal { desired: &proxy.desired, objects: &proxy.objects };
    assert!(proxy.rules.synchronize(goal).unwrap().refused.is_empty());
    let rules = listed(&host, Variant::Legacy);
    for last in 101..105 {
        assert!(rules.contains(&format!("--to-destination 10.244.{last}.2:8080")), "{rules}");
    }
}
