//! Pods outlive the process.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
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
    let manifest = "apiVersion: v1\nkind: Pod\nmetadata: {name: fixed}\nspec:\n  containers:\n  - \
                    {name: c, image: 'busybox:test', command: [sleep, '3600']}\n";
    let folder = cluster.machine.data_dir().join("manifests");
    std::fs::write(folder.join("fixed.yaml"), manifest).expect("write");
    let before = container(&cluster.wait_pod_ready("counter"));
    let node = cluster.get(&["nodes"])["items"][0]["metadata"]["name"].clone();
    let fixed = format!("fixed-{}", node.as_str().expect("a node"));
    let mirror = cluster.wait_pod_ready(&fixed)["metadata"]["uid"].clone();
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
        // Writes all the way to the kill: one that was answered must be there.
        let (answered, first) = mpsc::channel();
        let kubectl = |name: &str| cluster.kubectl_command(&["create", "configmap", name]);
        let mut writes: Vec<_> = (0..50)
            .map(|number| format!("kept-{round}-{number}"))
            .map(|name| (kubectl(&name), name))
            .collect();
        let writer = thread::spawn(move || {
            let written = writes.iter_mut().map_while(|(write, name)| {
                let answer = write.output().expect("kubectl");
                let _ = answered.send(());
                answer.status.success().then(|| name.clone())
            });
            written.collect::<Vec<String>>()
        });
        for _ in 0..2 {
            first.recv_timeout(DEADLINE).expect("an answered write");
        }
        cluster.kill_process();
        cluster.start_process();
        cluster.wait_ready();
        for name in writer.join().expect("the writer") {
            assert_eq!(cluster.get(&["configmap", &name])["metadata"]["name"], *name);
        }
    }
    let now = cluster.wait_pod_ready(&fixed)["metadata"]["uid"].clone();
    assert_eq!(now, mirror, "the mirror pod was made anew");
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
    // A signal while it starts ends it cleanly too.
    cluster.start_process();
    cluster.wait_begun();
    cluster.interrupt();
    cluster.start_process();
    cluster.wait_ready();
    stop.store(true, Ordering::Relaxed);
    client.join().expect("the client");
    assert_eq!(failed.load(Ordering::Relaxed), 0, "of {} requests", asked.load(Ordering::Relaxed));
    assert_eq!(before, container(&cluster.wait_pod_ready("counter")));

    let left = cluster.down();
    assert!(left.is_empty(), "left behind: {left:#?}");
}
