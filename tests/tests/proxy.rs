//! The proxy's commands from outside: why a packet goes where it goes, what the rules would be, and
//! what becomes of a wrong configuration.

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::{Ipv4Addr, TcpStream},
    path::PathBuf,
    process::{Command, Output},
};

use keelson_tests::{Cluster, DEADLINE, Machine, inside::inside, wait_for, wait_until};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
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

/// A kubeconfig of an API server that isn't there.
fn kubeconfig(machine: &Machine) -> PathBuf {
    let path = machine.dir().join("kubeconfig");
    let config = "{apiVersion: v1, kind: Config, current-context: c, \
                  clusters: [{name: c, cluster: {server: 'http://127.0.0.1:1'}}], \
                  contexts: [{name: c, context: {cluster: c, user: u}}], \
                  users: [{name: u, user: {}}]}";
    fs::write(&path, config).expect("a kubeconfig");
    path
}

#[test]
fn a_proxy_that_may_not_change_the_network_says_what_it_lacks_and_ends() {
    let machine = Machine::new();
    let kubeconfig = kubeconfig(&machine);
    for mode in ["userspace", "iptables", "nftables"] {
        let mut proxy = machine.command("setpriv");
        proxy.args(["--bounding-set", "-net_admin", "--inh-caps", "-net_admin"]);
        proxy.arg(Machine::binary()).args(["proxy", "--proxy-mode", mode]);
        proxy.arg("--data-dir").arg(machine.data_dir());
        let output = run({
            proxy.arg("--kubeconfig").arg(&kubeconfig);
            proxy
        });
        let said = text(&output.stderr);
        assert!(!output.status.success(), "{said}");
        for part in [mode, "CAP_NET_ADMIN", "AmbientCapabilities", "securityContext"] {
            assert!(said.contains(part), "{mode}: {said}");
        }
        assert!(!said.contains("again"), "to try again brings no right: {said}");
    }
}

#[test]
fn kernel_settings_that_are_read_only_are_warned_about_and_the_proxy_goes_on() {
    let machine = Machine::new();
    let log = machine.dir().join("log");
    let mut proxy = machine.command("unshare");
    proxy.args(["--mount", "sh", "-ec"]);
    proxy.arg(
        "mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys; \
         exec \"$@\"",
    );
    proxy.arg("sh").arg(Machine::binary()).arg("proxy");
    proxy.arg("--kubeconfig").arg(kubeconfig(&machine)).arg("--data-dir").arg(machine.data_dir());
    let mut proxy = proxy.stderr(File::create(&log).expect("a log")).spawn().expect("unshare");
    let said = || fs::read_to_string(&log).unwrap_or_default();
    wait_for("the warning", DEADLINE, || {
        let said = said();
        let warned = said.lines().any(|line| {
            line.contains("WARN")
                && line.contains("nf_conntrack_tcp_timeout_established")
                && line.contains("Read-only file system")
        });
        if warned { Ok(()) } else { Err(said) }
    });
    wait_until("it to answer", DEADLINE, || {
        let answer = inside(&machine.netns(), || {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, 10_256))?;
            stream.write_all(b"GET /livez HTTP/1.0\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        });
        answer.is_ok_and(|answer| answer.contains("200"))
    });
    let pid = i32::try_from(proxy.id()).expect("a process id");
    kill(Pid::from_raw(pid), Signal::SIGTERM).expect("it runs");
    let status = proxy.wait().expect("it ends");
    assert!(status.success(), "{status}: {}", said());
}
