//! Pods outlive the process.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use keelson_tests::{Cluster, DEADLINE, wait_for};
use serde_json::Value;

fn container(pod: &Value) -> (Value, Value, Value) {
    let status = &pod["status"]["containerStatuses"][0];
    (
        status["containerID"].clone(),
        status["restartCount"].clone(),
        status["state"]["running"]["startedAt"].clone(),
    )
}

#[test]
fn a_killed_process_takes_nothing_along() {
    let mut cluster = Cluster::start(&[]);
    cluster.make_demo_image();
    cluster.make_busybox_image();
    for name in ["deployment.yaml", "service.yaml"] {
        let path = format!("{}/../manifests/examples/{name}", env!("CARGO_MANIFEST_DIR"));
        cluster.kubectl(&["apply", "-f", &path]);
    }
    cluster.apply(
        "{apiVersion: v1, kind: Pod, metadata: {name: counter}, spec: {containers: [{name: c, image: \
         'busybox:test', command: [sh, -c, 'echo pid $$; i=0; while true; do echo line $i; i=$((i+1)); sleep 0.02; done']}]}}",
    );
    let before = container(&cluster.wait_pod_ready("counter"));
    cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"]);
    let address = cluster.get(&["service", "web"])["spec"]["clusterIP"]
        .as_str()
        .expect("an address")
        .to_owned();
    let url = format!("http://{address}/");
    wait_for("the Service", DEADLINE, || cluster.fetch(&url));

    // A client that asks without pause, all the way through.
    let (stop, asked, failed) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicUsize::new(0)),
        Arc::new(AtomicUsize::new(0)),
    );
    let mut curl = cluster.machine.command("curl");
    curl.args(["--silent", "--show-error", "--fail", "--max-time", "5", "--output", "/dev/null"])
        .arg(&url);
    let client = {
        let (stop, asked, failed) = (Arc::clone(&stop), Arc::clone(&asked), Arc::clone(&failed));
        thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                if !curl.status().expect("curl").success() {
                    failed.fetch_add(1, Ordering::Relaxed);
                }
                asked.fetch_add(1, Ordering::Relaxed);
            }
        })
    };

    for round in 0..3 {
        // Something half done at the moment of the kill: a write that was answered must be there.
        let name = format!("kept-{round}");
        cluster.kubectl(&["create", "configmap", &name, "--from-literal=a=b"]);
        cluster.kill_process();
        cluster.start_process();
        cluster.wait_ready();
        assert_eq!(cluster.get(&["configmap", &name])["data"]["a"], "b");
    }
    let after = container(&cluster.wait_pod_ready("counter"));
    assert_eq!(before, after, "the container was started again");

    // The log has every line, in order.
    let log = cluster.kubectl(&["logs", "counter"]);
    let mut lines = log.lines();
    assert!(lines.next().is_some_and(|line| line.starts_with("pid ")), "{log}");
    for (number, line) in lines.enumerate() {
        assert_eq!(line, format!("line {number}"), "a line was lost");
    }

    // A second start finds everything as it was; then the Service has answered all the time.
    cluster.interrupt();
    wait_for("some more requests", Duration::from_secs(20), || {
        static MARK: AtomicUsize = AtomicUsize::new(0);
        let now = asked.load(Ordering::Relaxed);
        let mark = MARK
            .compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed)
            .unwrap_or_else(|m| m);
        if mark > 0 && now > mark + 5 { Ok(()) } else { Err(format!("{now} requests")) }
    });
    cluster.start_process();
    cluster.wait_ready();
    stop.store(true, Ordering::Relaxed);
    client.join().expect("the client");
    assert_eq!(failed.load(Ordering::Relaxed), 0, "of {} requests", asked.load(Ordering::Relaxed));
    assert_eq!(before, container(&cluster.wait_pod_ready("counter")));

    let left = cluster.down();
    assert!(left.is_empty(), "left behind: {left:#?}");
}
