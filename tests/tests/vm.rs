//! What needs a machine of its own: a kernel with cgroup v2 alone, one with SCTP, and systemd as
//! process 1. All are had in virtual machines without KVM; `tests/vm/` makes and runs them.
//!
//! Their consoles are this test's output: they say which kernel and which cgroups ran what.
#![cfg(target_arch = "x86_64")] // the guests' kernel and the machine around it are of this kind

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::Value;

/// What of the embedded runtime's tests does not depend on the kernel's cgroups or their version
/// is left out: a guest without KVM is slow, and they run on the host.
const NOT_IN_GUEST: [&str; 2] =
    ["attaching_joins_the_streams", "no_line_is_lost_and_long_ones_are_split"];

fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Runs a script and returns what it printed.
fn run(script: &str, arguments: &[&Path], more: &[&str]) -> String {
    let output = Command::new(project().join("tests/vm").join(script))
        .args(arguments)
        .args(more)
        .stdin(Stdio::null())
        .output()
        .expect("a script");
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    println!("{printed}");
    eprintln!("{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "tests/vm/{script}: {}", output.status);
    printed
}

/// Programs by the names of their targets, as `make test-units` has built them for some tests.
fn test_programs<const N: usize>(tests: &[&str], names: [&str; N]) -> [PathBuf; N] {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .current_dir(project())
        // The same packages as there: with others cargo would build anew, for other features.
        .args(["test", "--locked", "--workspace", "--exclude", "keelson-tests"])
        .args(tests)
        .args(["--no-run", "--message-format", "json"])
        .stderr(Stdio::inherit())
        .output()
        .expect("cargo");
    assert!(output.status.success(), "cargo test --no-run: {}", output.status);
    names.map(|name| {
        let messages = output.stdout.split(|byte| *byte == b'\n');
        messages
            .filter_map(|line| serde_json::from_slice::<Value>(line).ok())
            .filter(|message| message["target"]["name"] == name)
            .find_map(|message| message["executable"].as_str().map(PathBuf::from))
            .unwrap_or_else(|| panic!("cargo built no {name}"))
    })
}

#[test]
fn the_embedded_runtime_works_with_cgroup_v2() {
    let [tests, helper] =
        test_programs(&["--test", "embedded"], ["embedded", "keelson-runtime-helper"]);
    let left_out: Vec<&str> = NOT_IN_GUEST.iter().flat_map(|name| ["--skip", name]).collect();
    run("embedded", &[&tests, &helper], &left_out);
}

/// Where a machine's kernel has no SCTP, these tests of the proxy say so and do nothing else; the
/// guest's has it, and there a kernel without is a failure.
#[test]
fn the_proxy_leads_sctp_to_its_endpoints() {
    let [tests] = test_programs(&["--lib"], ["keelson_proxy"]);
    let printed = run("proxy", &[&tests], &["packets::sctp_test::"]);
    for backend in ["nftables", "iptables", "userspace"] {
        for family in ["v4", "v6"] {
            let test = format!("{backend}::{family}::every_feature_does_as_documented ... ok");
            assert!(printed.contains(&test), "{test}");
        }
    }
}

#[test]
fn under_systemd_pods_outlive_the_service() {
    let dir = tempfile::tempdir().expect("a folder");
    let installed = Command::new("make")
        .arg("-C")
        .arg(project())
        .arg("install")
        .arg(format!("DESTDIR={}", dir.path().display()))
        .output()
        .expect("make");
    keelson_tests::stdout_of("make install", &installed);
    run("systemd", &[dir.path()], &[]);
}
