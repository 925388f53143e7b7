//! Containers that crash, fail their probes, or are not ready.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use keelson_tests::{Cluster, DEADLINE, pod_is_ready, wait_for};

#[test]
fn crashes_back_off_and_probes_act() {
    let mut cluster = Cluster::start(&[]);
    cluster.make_busybox_image();
    cluster.apply(
        r#"
apiVersion: v1
kind: Pod
metadata: {name: crash}
spec:
  containers:
  - {name: c, image: 'busybox:test', command: [sh, -c, 'echo oh no; exit 3']}
---
apiVersion: v1
kind: Pod
metadata: {name: sick}
spec:
  containers:
  - name: c
    image: busybox:test
    command: [sh, -c, 'touch /tmp/well; exec sleep 3600']
    livenessProbe: {exec: {command: [cat, /tmp/well]}, periodSeconds: 1, failureThreshold: 1}
  terminationGracePeriodSeconds: 1
---
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  containers:
  - name: c
    image: busybox:test
    command: [sh, -c, 'touch /tmp/ready; echo here > /tmp/index.html; exec httpd -f -p 80 -h /tmp']
    readinessProbe: {exec: {command: [cat, /tmp/ready]}, periodSeconds: 1, failureThreshold: 1}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80}]}
"#,
    );

    // CrashLoopBackOff with the documented first wait of ten seconds.
    let pod = cluster.wait_object("CrashLoopBackOff", &["pod", "crash"], |pod| {
        pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "CrashLoopBackOff"
    });
    let status = &pod["status"]["containerStatuses"][0];
    let message = status["state"]["waiting"]["message"].as_str().unwrap_or_default();
    assert!(
        message.contains("back-off") && message.contains("restarting failed container=c"),
        "{message}"
    );
    assert_eq!(status["lastState"]["terminated"]["exitCode"], 3, "{pod:#}");
    assert_eq!(status["lastState"]["terminated"]["reason"], "Error", "{pod:#}");
    let events = cluster.kubectl(&["events", "--for", "pod/crash"]);
    assert!(events.contains("BackOff"), "{events}");

    // A failing liveness probe restarts the container.
    cluster.wait_pod_ready("sick");
    cluster.kubectl(&["exec", "sick", "--", "rm", "/tmp/well"]);
    cluster.wait_object("a restart", &["pod", "sick"], |pod| {
        pod["status"]["containerStatuses"][0]["restartCount"] == 1 && pod_is_ready(pod)
    });

    // Unready is out of the Service within a second of the probe, Ready is in again.
    cluster.wait_pod_ready("web");
    let address = cluster.get(&["service", "web"])["spec"]["clusterIP"]
        .as_str()
        .expect("an address")
        .to_owned();
    let url = format!("http://{address}/");
    wait_for("the Service", DEADLINE, || cluster.fetch(&url));
    cluster.kubectl(&["exec", "web", "--", "rm", "/tmp/ready"]);
    let start = Instant::now();
    wait_for("the pod to be out", DEADLINE, || match cluster.fetch(&url) {
        Err(_) => Ok(()),
        Ok(text) => Err(text),
    });
    // At most one period of the probe (1 s) and the second that is promised.
    assert!(start.elapsed() < Duration::from_secs(3), "out after {:?}", start.elapsed());
    cluster.kubectl(&["exec", "web", "--", "touch", "/tmp/ready"]);
    let start = Instant::now();
    wait_for("the pod to be in", DEADLINE, || cluster.fetch(&url));
    assert!(start.elapsed() < Duration::from_secs(3), "in after {:?}", start.elapsed());

    // After the first restart, which comes at once, the waits are 10 s and 20 s, as documented.
    let ended = |restarts: i64| {
        let pod = cluster.wait_object(&format!("{restarts} restarts"), &["pod", "crash"], |pod| {
            let status = &pod["status"]["containerStatuses"][0];
            status["restartCount"] == restarts && !status["state"]["waiting"].is_null()
        });
        let end = &pod["status"]["containerStatuses"][0]["lastState"]["terminated"];
        let time = |field: &str| -> Timestamp {
            end[field].as_str().expect("a time").parse().expect("a time")
        };
        (time("startedAt"), time("finishedAt"))
    };
    let (_, mut before) = ended(1);
    // what crashed can be read meanwhile
    assert_eq!(cluster.kubectl(&["logs", "--previous", "crash"]), "oh no\n");
    for (restarts, wait) in [(2, 10), (3, 20)] {
        let (start, end) = ended(restarts);
        let waited = start.duration_since(before).as_secs();
        assert!((wait..wait + 5).contains(&waited), "{waited} s before restart {restarts}");
        before = end;
    }

    let left = cluster.down();
    assert!(left.is_empty(), "left behind: {left:#?}");
}
