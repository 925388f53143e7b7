//! A rolling update under load: not one failed request.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

use keelson_tests::{Cluster, DEADLINE, wait_for};

const CLIENTS: usize = 4;

#[test]
fn a_rolling_update_loses_no_request() {
    let mut cluster = Cluster::start(&[]);
    cluster.make_demo_image();
    for name in ["deployment.yaml", "service.yaml"] {
        let path = format!("{}/../manifests/examples/{name}", env!("CARGO_MANIFEST_DIR"));
        cluster.kubectl(&["apply", "-f", &path]);
    }
    cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"]);
    let address = cluster.get(&["service", "web"])["spec"]["clusterIP"]
        .as_str()
        .expect("an address")
        .to_owned();
    let url = format!("http://{address}/");
    wait_for("the Service", DEADLINE, || cluster.fetch(&url));

    let (stop, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let (stop, asked) = (Arc::clone(&stop), Arc::clone(&asked));
            let mut curl = cluster.machine.command("curl");
            curl.args([
                "--silent",
                "--show-error",
                "--fail",
                "--max-time",
                "10",
                "--output",
                "/dev/null",
            ])
            .arg(&url);
            thread::spawn(move || {
                let mut failures = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let output = curl.output().expect("curl");
                    asked.fetch_add(1, Ordering::Relaxed);
                    if !output.status.success() {
                        failures.push(String::from_utf8_lossy(&output.stderr).into_owned());
                    }
                }
                failures
            })
        })
        .collect();
    for _ in 0..2 {
        cluster.kubectl(&["rollout", "restart", "deployment/web"]);
        cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=120s"]);
    }
    stop.store(true, Ordering::Relaxed);
    let failures: Vec<String> =
        clients.into_iter().flat_map(|c| c.join().expect("client")).collect();
    let asked = asked.load(Ordering::Relaxed);
    assert!(asked > 100, "only {asked} requests");
    assert!(failures.is_empty(), "{} of {asked} requests failed: {failures:?}", failures.len());

    let left = cluster.down();
    assert!(left.is_empty(), "left behind: {left:#?}");
}
