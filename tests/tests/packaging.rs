//! What operators install, and what they scrape.

use std::{
    fs,
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use keelson_tests::{Cluster, DEADLINE, Machine, stdout_of, wait_for};

fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn make(target: &str, destination: &Path) {
    let output = Command::new("make")
        .arg("-C")
        .arg(project())
        .arg(target)
        .arg(format!("DESTDIR={}", destination.display()))
        .output()
        .expect("make");
    stdout_of(&format!("make {target}"), &output);
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let output = Command::new("find").arg(dir).args(["-type", "f"]).output().expect("find");
    String::from_utf8_lossy(&output.stdout).lines().map(PathBuf::from).collect()
}

#[test]
fn units_verify_and_uninstall_leaves_nothing() {
    let dir = tempfile::tempdir().expect("a folder");
    make("install", dir.path());
    let units = dir.path().join("usr/local/lib/systemd/system");
    // The units' programs must exist for the check: the installed binary stands at its place below
    // the folder.
    let checked = tempfile::tempdir().expect("a folder");
    let mut count = 0;
    for entry in fs::read_dir(&units).expect("units").flatten() {
        let text = fs::read_to_string(entry.path()).expect("unit");
        assert!(!text.contains('@'), "{}: not filled in", entry.path().display());
        let text =
            text.replace("/usr/local/bin", &dir.path().join("usr/local/bin").to_string_lossy());
        fs::write(checked.path().join(entry.file_name()), text).expect("unit");
        count += 1;
    }
    assert_eq!(count, 4);
    let units = fs::read_dir(checked.path()).expect("units").flatten().map(|entry| entry.path());
    let output = Command::new("systemd-analyze")
        .arg("verify")
        .args(units)
        .output()
        .expect("systemd-analyze");
    stdout_of("systemd-analyze verify", &output);
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));

    // A config that was changed is the user's; everything else goes.
    let config = dir.path().join("etc/keelson/kubelet.yaml");
    let mut text = fs::read_to_string(&config).expect("config");
    text.push_str("maxPods: 50\n");
    fs::write(&config, text).expect("config");
    make("install", dir.path());
    assert!(
        fs::read_to_string(&config).expect("config").contains("maxPods"),
        "a changed config is kept"
    );
    make("uninstall", dir.path());
    assert_eq!(files(dir.path()), [config]);
}

#[test]
fn systemd_is_told_and_prometheus_is_answered() {
    let socket_dir = tempfile::tempdir().expect("a folder");
    let socket_path = socket_dir.path().join("notify");
    let socket = UnixDatagram::bind(&socket_path).expect("socket");
    socket.set_read_timeout(Some(Duration::from_secs(60))).expect("timeout");

    // SAFETY: no other thread of this test runs yet.
    unsafe {
        std::env::set_var("NOTIFY_SOCKET", &socket_path);
    }
    let mut cluster = Cluster::start(&[]);
    let mut buffer = [0; 256];
    let mut said = Vec::new();
    while !said.iter().any(|line| line == "READY=1") {
        let length = socket.recv(&mut buffer).expect("a message before the time is over");
        said.extend(String::from_utf8_lossy(&buffer[..length]).lines().map(str::to_owned));
    }

    // Prometheus with the config that is shipped, its paths put where this cluster has them.
    cluster.kubectl(&["create", "serviceaccount", "prometheus"]);
    for role in ["system:monitoring", "system:kubelet-api-admin"] {
        let name = role.replace(':', "-");
        cluster.kubectl(&[
            "create",
            "clusterrolebinding",
            &name,
            &format!("--clusterrole={role}"),
            "--serviceaccount=default:prometheus",
        ]);
    }
    let dir = cluster.machine.dir().to_owned();
    fs::write(dir.join("token"), cluster.kubectl(&["create", "token", "prometheus"]))
        .expect("token");
    let config = fs::read_to_string(project().join("manifests/prometheus/prometheus.yml"))
        .expect("config")
        .replace("/etc/prometheus/keelson.token", &dir.join("token").to_string_lossy())
        .replace("/etc/kubernetes/pki", &cluster.machine.data_dir().join("pki").to_string_lossy())
        .replace("scrape_interval: 15s", "scrape_interval: 1s");
    fs::write(dir.join("prometheus.yml"), config).expect("config");
    let mut prometheus = cluster
        .machine
        .command("prometheus")
        .arg(format!("--config.file={}", dir.join("prometheus.yml").display()))
        .arg(format!("--storage.tsdb.path={}", dir.join("tsdb").display()))
        .arg("--web.listen-address=127.0.0.1:9090")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("prometheus");
    let query = |query: &str| -> Result<serde_json::Value, String> {
        let text = cluster.fetch(&format!("http://127.0.0.1:9090/api/v1/query?query={query}"))?;
        serde_json::from_str(&text).map_err(|e| e.to_string())
    };
    wait_for("all targets to be up", DEADLINE, || {
        let answer = query("sum(up)")?;
        if answer["data"]["result"][0]["value"][1] == "3" {
            Ok(())
        } else {
            Err(answer.to_string())
        }
    });
    for name in [
        "apiserver_request_total",
        "kubelet_running_pods",
        "kubelet_node_name",
        "kubeproxy_sync_proxy_rules_duration_seconds_count",
    ] {
        wait_for(name, DEADLINE, || {
            let answer = query(name)?;
            match answer["data"]["result"].as_array() {
                Some(result) if !result.is_empty() => Ok(()),
                _ => Err(answer.to_string()),
            }
        });
    }
    prometheus.kill().expect("kill");
    prometheus.wait().expect("wait");

    let left = cluster.down();
    assert!(left.is_empty(), "left behind: {left:#?}");
}

#[test]
fn wrong_flags_and_configs_are_explained() {
    let machine = Machine::new();
    let said = |arguments: &[&str]| {
        let output =
            machine.command(Machine::binary()).args(arguments).output().expect("the binary");
        assert!(!output.status.success(), "{arguments:?} was taken");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(said(&["up", "--no-such-flag"]).contains("--no-such-flag"));
    assert!(said(&["up", "--cluster-cidr", "x"]).contains("--cluster-cidr"));
    let config = machine.dir().join("kubelet.yaml");
    fs::write(
        &config,
        "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nmaxPods: many\n",
    )
    .expect("write");
    let config = config.to_string_lossy().into_owned();
    let data_dir = machine.data_dir().to_string_lossy().into_owned();
    let error = said(&["up", "--config", &config, "--data-dir", &data_dir]);
    assert!(error.contains("line 3") && error.contains("maxPods"), "{error}");

    let output = machine
        .command(Machine::binary())
        .args(["completions", "bash"])
        .output()
        .expect("the binary");
    assert!(stdout_of("completions", &output).contains("complete"));
}
