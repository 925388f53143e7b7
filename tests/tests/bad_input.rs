//! What bad input gets: a clear message, the others unharmed, recovery as soon as it is mended.

use std::{fs, os::unix::fs::symlink};

use keelson_tests::{Cluster, pod_is_ready, wait_until};

#[test]
fn broken_manifests_in_the_folder_harm_no_other() {
    let mut cluster = Cluster::start(&[]);
    cluster.make_busybox_image();
    let folder = cluster.machine.data_dir().join("manifests");
    let pod = |name: &str, rest: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  containers:\n  - name: c\n    \
             image: busybox:test\n    command: [sleep, '3600']\n{rest}"
        )
    };
    let log = cluster.log_path();
    let logged = |text: &str| fs::read_to_string(&log).unwrap_or_default().contains(text);

    fs::write(folder.join("good.yaml"), pod("good", "")).expect("write");
    fs::write(folder.join("not-yaml.yaml"), "a: [1,\n b: }").expect("write");
    fs::write(folder.join("unknown-field.yaml"), pod("odd", "    comand: [x]\n")).expect("write");
    fs::write(folder.join("huge.yaml"), vec![b'#'; 100 << 20]).expect("write");
    let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for level in 1..12 {
        let aliases = vec![format!("*a{}", level - 1); 10].join(", ");
        bomb.push_str(&format!("a{level}: &a{level} [{aliases}]\n"));
    }
    fs::write(folder.join("bomb.yaml"), bomb).expect("write");
    symlink("loop-b.yaml", folder.join("loop-a.yaml")).expect("link");
    symlink("loop-a.yaml", folder.join("loop-b.yaml")).expect("link");

    let node = cluster.get(&["nodes"])["items"][0]["metadata"]["name"]
        .as_str()
        .expect("a node")
        .to_owned();
    cluster.wait_object("the mirror pod", &["pod", &format!("good-{node}")], pod_is_ready);
    for name in ["not-yaml.yaml", "unknown-field.yaml", "huge.yaml", "bomb.yaml", "loop-a.yaml"] {
        wait_until(&format!("{name} to be named in the log"), keelson_tests::DEADLINE, || {
            logged(name)
        });
    }

    // A second manifest of the same pod takes nothing from the one that runs, whatever its name.
    let good = format!("good-{node}");
    let runs = cluster.get(&["pod", &good])["metadata"]["uid"].clone();
    fs::write(folder.join("again.yaml"), pod("good", "").replace("3600", "3601")).expect("write");
    wait_until("again.yaml to be named in the log", keelson_tests::DEADLINE, || {
        logged("in another manifest already")
    });
    assert_eq!(cluster.get(&["pod", &good])["metadata"]["uid"], runs);
    fs::remove_file(folder.join("again.yaml")).expect("remove");

    // Mended, it runs at once; removed, it stops.
    fs::write(folder.join("not-yaml.yaml"), pod("mended", "")).expect("write");
    cluster.wait_object("the mended pod", &["pod", &format!("mended-{node}")], pod_is_ready);
    fs::remove_file(folder.join("good.yaml")).expect("remove");
    cluster.wait_object("the removed pod to go", &["pods"], |pods| {
        let items = pods["items"].as_array().cloned().unwrap_or_default();
        !items.is_empty() && items.iter().all(|p| p["metadata"]["name"] != format!("good-{node}"))
    });

    let left = cluster.down();
    assert!(left.is_empty(), "left behind: {left:#?}");
}

#[test]
fn a_port_in_use_is_named_and_nothing_stays() {
    let mut cluster = Cluster::prepare(&[]);
    let mut holder = cluster
        .machine
        .command("busybox")
        .args(["nc", "-l", "-p", "10250"])
        .stdin(std::process::Stdio::piped())
        .spawn()
        .expect("busybox");
    let listening = || {
        let output = cluster.machine.command("ss").args(["-Hltn", "sport = :10250"]).output();
        output.is_ok_and(|output| !output.stdout.is_empty())
    };
    wait_until("the port to be taken", keelson_tests::DEADLINE, listening);
    cluster.start_process();
    let status = cluster.wait_end();
    assert!(!status.success(), "{status}");
    let log = fs::read_to_string(cluster.log_path()).expect("the log");
    assert!(log.contains("kubelet API: listen on") && log.contains(":10250"), "{log}");
    holder.kill().expect("kill");
    holder.wait().expect("wait");
    let left = cluster.down();
    assert!(left.is_empty(), "left behind: {left:#?}");
}

#[test]
fn bad_objects_get_clear_answers() {
    let mut cluster = Cluster::start(&[]);
    cluster.make_busybox_image();

    // The API's refusals.
    let refused = |manifest: &str, words: &[&str]| {
        let output = cluster.try_with_manifest(&["create", "-f", "-"], manifest);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{manifest} was taken");
        for word in words {
            assert!(said.contains(word), "{word:?} is missing in {said}");
        }
    };
    refused(
        "{apiVersion: v1, kind: Pod, metadata: {name: x}, spec: {containers: [{name: c, image: i, comand: [x]}]}}",
        &["unknown field", "comand"],
    );
    refused(
        "{apiVersion: v1, kind: Pod, metadata: {name: X_y}, spec: {containers: [{name: c, image: i}]}}",
        &["metadata.name", "Invalid value"],
    );
    refused(
        "{apiVersion: v1, kind: Pod, metadata: {name: x}, spec: {containers: []}}",
        &["spec.containers", "Required value"],
    );
    refused(
        "{apiVersion: v1, kind: Pod, metadata: {name: x}, spec: {containers: [{name: c, image: i}, {name: c, image: i}]}}",
        &["spec.containers[1].name", "Duplicate value"],
    );
    refused(
        "{apiVersion: v1, kind: Pod, metadata: {name: x}, spec: {containers: 3}}",
        &["containers"],
    );
    cluster.kubectl(&["create", "configmap", "twice"]);
    let again = cluster.try_kubectl(&["create", "configmap", "twice"]);
    assert!(String::from_utf8_lossy(&again.stderr).contains("already exists"), "{again:?}");

    // What the node says, on the pod.
    cluster.apply(
        r#"
apiVersion: v1
kind: Pod
metadata: {name: no-image}
spec: {containers: [{name: c, image: 'nowhere.invalid/none:1'}]}
---
apiVersion: v1
kind: Pod
metadata: {name: no-map}
spec:
  containers:
  - {name: c, image: 'busybox:test', command: [sleep, '3600'], envFrom: [{configMapRef: {name: late}}]}
---
apiVersion: v1
kind: Pod
metadata: {name: good}
spec: {containers: [{name: c, image: 'busybox:test', command: [sleep, '3600']}]}
"#,
    );
    cluster.wait_pod_ready("good");
    let reason = |name: &str, wanted: &[&str]| {
        cluster.wait_object(&format!("{name}: {wanted:?}"), &["pod", name], |pod| {
            let reason = &pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"];
            wanted.iter().any(|w| reason == w)
        })
    };
    reason("no-image", &["ErrImagePull", "ImagePullBackOff"]);
    reason("no-map", &["CreateContainerConfigError"]);
    let events = cluster.kubectl(&["events", "--for", "pod/no-map"]);
    assert!(events.contains("configmap \"late\" not found"), "{events}");
    cluster.kubectl(&["create", "configmap", "late", "--from-literal=A=b"]);
    cluster.wait_pod_ready("no-map");
    assert_eq!(cluster.kubectl(&["exec", "no-map", "--", "sh", "-c", "echo $A"]), "b\n");

    let left = cluster.down();
    assert!(left.is_empty(), "left behind: {left:#?}");
}
