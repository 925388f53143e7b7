//! Containers that crash, fail their probes, or are not ready.

use std::time::{Duration, Instant};

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

    // The first restarts come after 10 s, the next after 20 s.
    let crash = cluster.wait_object("two restarts", &["pod", "crash"], |pod| {
        pod["status"]["containerStatuses"][0]["restartCount"].as_i64() >= Some(2)
    });
    let restarts = crash["status"]["containerStatuses"][0]["restartCount"].as_i64();
    assert!(restarts <= Some(4), "{restarts:?} restarts so soon");

    let left = cluster.down();
    assert!(left.is_empty(), "left behind: {left:#?}");
}
