//! What is refused: old rules stay whole, the rest goes in, and it goes in itself once it can.

use std::{os::unix::fs::PermissionsExt, path::PathBuf, sync::Arc};

use nix::fcntl::{Flock, FlockArg};
use serde_json::{Value, json};

use super::{
    Settings, Variant,
    golden::settings,
    kernel_test::{Proxy, service, slice},
};
use crate::{
    backend::{Applied, Backend, BackendError, Goal},
    model::Family,
    netns::Namespace,
    ruleset::Unit,
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
fn a_program_that_always_fails_leaves_the_rules_as_they_are() {
    for variant in VARIANTS {
        let (host, folder) = (Namespace::new(), tempfile::tempdir().unwrap());
        let mut proxy = Proxy::start(&host, Settings { variant, ..settings(Family::V4) });
        replace(
            &mut proxy,
            &folder,
            "[ -e HERE/refuse ] && { echo no memory >&2; exit 2; }\nexec REAL \"$@\"",
        );
        let mut units = Vec::new();
        for object in with_endpoint(1) {
            units.extend(proxy.take_in(object));
        }
        apply(&mut proxy, &units).unwrap();
        let before = listed(&host, variant);
        std::fs::write(folder.path().join("refuse"), "").unwrap();
        let units = proxy.take_in(slice(Family::V4, 1, &[(9, true, true)]));
        let applied = apply(&mut proxy, &units).unwrap();
        let [(unit, error)] = &applied.refused[..] else { panic!("{applied:?}") };
        assert!(error.to_string().contains("no memory") && error.may_pass(), "{error}");
        assert_eq!(listed(&host, variant), before);
        std::fs::remove_file(folder.path().join("refuse")).unwrap();
        assert!(apply(&mut proxy, &[*unit]).unwrap().refused.is_empty());
        assert!(listed(&host, variant).contains("--to-destination 10.244.9.2:8080"));
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
