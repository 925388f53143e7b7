//! The proxy's commands from outside: why a packet goes where it goes, what the rules would be, and
//! what becomes of a wrong configuration.

use std::{
    fs,
    process::{Command, Output},
};

use keelson_tests::{Cluster, DEADLINE, wait_for};
use serde_json::Value;

fn run(mut command: Command) -> Output {
    command.output().expect("the binary")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The tables of nftables on the machine.
fn tables(cluster: &Cluster) -> String {
    let mut nft = cluster.machine.command("nft");
    nft.args(["list", "tables"]);
    text(&run(nft).stdout)
}

#[test]
fn packets_are_explained_and_rules_are_printed_and_removed() {
    let mut cluster = Cluster::start(&[]);
    cluster.make_busybox_image();
    cluster.apply(
        r#"
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  containers:
  - name: c
    image: busybox:test
    command: [sh, -c, 'echo here > /tmp/index.html; exec httpd -f -p 80 -h /tmp']
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80}]}
"#,
    );
    cluster.wait_pod_ready("web");
    let service = cluster.get(&["service", "web"]);
    let address = service["spec"]["clusterIP"].as_str().expect("an address").to_owned();
    wait_for("the Service", DEADLINE, || cluster.fetch(&format!("http://{address}/")));

    // From the API, checked against the kernel.
    let mut explain = cluster.machine.keelson(&["explain", "packet"]);
    explain.args(["--from", "pod", "default/web", "--to", "service", "default/web"]);
    explain.args(["--port", "80", "-o", "json"]);
    let output = run(explain);
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        panic!("{error}: {} {}", text(&output.stdout), text(&output.stderr))
    });
    assert_eq!(answer["verdict"], "forwarded", "{answer:#}");
    assert_eq!(answer["service"], "default/web", "{answer:#}");
    assert_eq!(answer["origin"], "pod", "{answer:#}");
    assert_eq!(answer["endpoints"][0]["eligible"], true, "{answer:#}");
    assert_eq!(answer["kernel"], serde_json::json!([]), "{answer:#}");
    let mut explain = cluster.machine.keelson(&["explain", "packet"]);
    explain.args(["--from", "node", "--to", &address, "--port", "81"]);
    let said = text(&run(explain).stdout);
    assert!(said.contains("rejected"), "{said}");

    // From files, without touching anything.
    let dir = cluster.machine.dir().join("manifests");
    fs::create_dir_all(&dir).expect("a folder");
    fs::write(
        dir.join("a.yaml"),
        "kind: Service\nmetadata: {name: a}\nspec: {clusterIP: 10.96.7.7, ports: [{port: 80}]}\n---\n\
         kind: Service\nmetadata: {name: odd}\nspec: {clusterIP: 127.0.0.1, ports: [{port: 80}]}\n",
    )
    .expect("write");
    for (mode, expected) in [
        ("nftables", "10.96.7.7 . tcp . 80"),
        ("iptables", "KUBE-SERVICES"),
        ("userspace", "route local 10.96.7.7"),
    ] {
        let mut dry = cluster.machine.keelson(&["proxy", "--dry-run", "--proxy-mode", mode]);
        dry.args(["--family", "ipv4", "--services"]).arg(&dir);
        let output = run(dry);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let printed = text(&output.stdout);
        assert!(printed.contains(expected), "{mode}: {printed}");
        let said = text(&output.stderr);
        assert!(said.contains("a.yaml: document 2") && said.contains("loopback"), "{said}");
    }
    assert!(!tables(&cluster).contains("10.96.7.7"));

    // A mode that is not served says what to use.
    for (mode, word) in [("ipvs", "nftables"), ("magic", "userspace")] {
        let mut proxy = cluster.machine.keelson(&["proxy", "--kubeconfig", "/dev/null"]);
        proxy.args(["--proxy-mode", mode]);
        let output = run(proxy);
        let said = text(&output.stderr);
        assert!(!output.status.success() && said.contains(word), "{said}");
    }

    // What a stopped proxy left goes.
    cluster.interrupt();
    assert!(tables(&cluster).contains("keelson-proxy"), "the rules stay when the process stops");
    let output = run(cluster.machine.keelson(&["proxy", "--cleanup"]));
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(!tables(&cluster).contains("keelson-proxy"), "{}", tables(&cluster));
    let left = cluster.down();
    assert!(left.is_empty(), "left behind: {left:#?}");
}
