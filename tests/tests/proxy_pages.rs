//! What an operator of kube-proxy looks at, from `keelson proxy` as a process of its own: config file,
//! flags, pages, metrics by a real Prometheus, and what becomes of a config file that changes.

use std::{
    fs::{self, File},
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
};

use keelson_tests::{DEADLINE, Machine, stdout_of, wait_for};
use serde_json::Value;

const CONFIG: &str = "\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
clusterCIDR: 10.244.0.0/16
resourceContainer: /kube-proxy
iptables:
  syncPeriod: 7s
mode: iptables
";

/// A control plane, and room for a proxy beside it.
struct Node {
    machine: Machine,
    children: Vec<Child>,
}

impl Node {
    fn start() -> Self {
        let mut node = Self { machine: Machine::new(), children: Vec::new() };
        let control_plane = node.machine.keelson(&["control-plane", "--node-name", "n1"]);
        node.spawn(control_plane, "control-plane.log");
        wait_for("the API server", DEADLINE, || node.kubectl(&["get", "--raw", "/readyz"]));
        node
    }

    fn kubectl(&self, arguments: &[&str]) -> Result<String, String> {
        let mut kubectl = self.machine.command("kubectl");
        kubectl.env("KUBECONFIG", self.machine.data_dir().join("admin.conf"));
        answer(&run(kubectl.args(arguments)))
    }

    fn spawn(&mut self, mut command: Command, log: &str) {
        let log = File::create(self.path(log)).expect("a log");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.children.push(command.spawn().expect("the program"));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.machine.dir().join(name)
    }

    fn proxy(&self, arguments: &[&str]) -> Command {
        let mut proxy = self.machine.keelson(&["proxy", "--hostname-override", "n1"]);
        proxy.arg("--config").arg(self.path("config.yaml")).args(arguments);
        proxy.arg("--kubeconfig").arg(self.machine.data_dir().join("kube-proxy.conf"));
        proxy
    }

    /// The status and the body of a page.
    fn page(&self, url: &str) -> Result<(String, String), String> {
        let mut curl = self.machine.command("curl");
        curl.args(["-sS", "-m", "5", "-w", "\n%{http_code}", url]);
        let text = answer(&run(&mut curl))?;
        let (body, status) = text.rsplit_once('\n').ok_or("no status")?;
        Ok((status.to_owned(), body.to_owned()))
    }

    fn log(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("log of the proxy:\n{}", self.log("proxy.log"));
        }
    }
}

fn run(command: &mut Command) -> Output {
    command.output().expect("the program")
}

fn answer(output: &Output) -> Result<String, String> {
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

fn pages_are_as_documented(node: &Node) {
    wait_for("the proxy to be healthy", DEADLINE, || {
        let (status, body) = node.page("http://127.0.0.1:10256/healthz")?;
        if status == "200" { Ok(()) } else { Err(format!("{status} {body}")) }
    });
    let (_, healthz) = node.page("http://127.0.0.1:10256/healthz").expect("a page");
    let healthz: Value = serde_json::from_str(&healthz).expect("JSON");
    assert_eq!(healthz["nodeEligible"], true, "{healthz}");
    let (status, livez) = node.page("http://127.0.0.1:10256/livez").expect("a page");
    assert!(status == "200" && !livez.contains("nodeEligible"), "{livez}");
    for (path, expected) in [("healthz", "ok"), ("proxyMode", "iptables")] {
        let found = node.page(&format!("http://127.0.0.1:10249/{path}")).expect("a page");
        assert_eq!(found, ("200".to_owned(), expected.to_owned()), "{path}");
    }
    let (_, configz) = node.page("http://127.0.0.1:10249/configz").expect("a page");
    let configz: Value = serde_json::from_str(&configz).expect("JSON");
    let configz = &configz["kubeproxy.config.k8s.io"];
    assert_eq!(configz["clusterCIDR"], "10.244.0.0/16", "{configz:#}");
    assert_eq!(configz["iptables"]["syncPeriod"], "7s", "{configz:#}");
    assert_eq!(configz["conntrack"]["tcpEstablishedTimeout"], "24h0m0s", "{configz:#}");
    let (_, slis) = node.page("http://127.0.0.1:10249/metrics/slis").expect("a page");
    assert!(slis.contains("kubernetes_healthcheck{name=\"ping\",type=\"healthz\"} 1"), "{slis}");
    assert_eq!(node.page("http://127.0.0.1:10249/debug/pprof/").expect("a page").0, "404");
}

fn prometheus_reads_the_metrics(node: &mut Node) {
    let config = "scrape_configs:\n- job_name: kube-proxy\n  scrape_interval: 1s\n  \
                  static_configs: [{targets: ['127.0.0.1:10249']}]\n";
    fs::write(node.path("prometheus.yml"), config).expect("config");
    let mut prometheus = node.machine.command("prometheus");
    prometheus
        .arg(format!("--config.file={}", node.path("prometheus.yml").display()))
        .arg(format!("--storage.tsdb.path={}", node.path("tsdb").display()))
        .arg("--web.listen-address=127.0.0.1:9090");
    node.spawn(prometheus, "prometheus.log");
    for query in [
        "up==1",
        "kubeproxy_sync_proxy_rules_iptables_total{table=\"nat\",ip_family=\"IPv4\"}>10",
        "kubeproxy_sync_proxy_rules_iptables_last{table=\"filter\",ip_family=\"IPv4\"}",
        "kubeproxy_iptables_ct_state_invalid_dropped_packets_total==0",
        "kubeproxy_iptables_localhost_nodeports_accepted_packets_total==0",
        "histogram_quantile(0.9,kubeproxy_sync_full_proxy_rules_duration_seconds_bucket)",
        "rest_client_requests_total{code=\"200\",method=\"GET\"}>2",
        "kubernetes_build_info{major=\"1\",minor=\"36\"}",
        "kubernetes_feature_enabled{name=\"RemoveStaleTCPConnections\"}==0",
        "time()-process_start_time_seconds<600",
        "process_resident_memory_bytes>1000000",
    ] {
        wait_for(query, DEADLINE, || {
            let mut curl = node.machine.command("curl");
            curl.args(["-sS", "-m", "5", "-G", "--data-urlencode", &format!("query={query}")]);
            let text = answer(&run(curl.arg("http://127.0.0.1:9090/api/v1/query")))?;
            let found: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
            match found["data"]["result"].as_array() {
                Some(result) if !result.is_empty() => Ok(()),
                _ => Err(text),
            }
        });
    }
}

#[test]
fn a_daemon_set_of_kube_proxys_finds_what_it_knows() {
    let mut node = Node::start();
    fs::write(node.path("config.yaml"), CONFIG).expect("a file");

    // What needs full root first, then the proxy itself.
    stdout_of("--init-only", &run(&mut node.proxy(&["--init-only"])));
    let mut cat = node.machine.command("cat");
    let localnet = run(cat.arg("/proc/sys/net/ipv4/conf/all/route_localnet"));
    assert_eq!(stdout_of("cat", &localnet).trim(), "1");
    let mut save = node.machine.command("iptables-save");
    let saved = stdout_of("iptables-save", &run(&mut save));
    assert!(saved.contains("block incoming localnet connections"), "{saved}");
    let proxy = node.proxy(&["-v=2", "--ipvs-scheduler=rr"]);
    node.spawn(proxy, "proxy.log");
    pages_are_as_documented(&node);
    // It would write again what another one removes.
    let beside = run(&mut node.proxy(&["--cleanup"]));
    let said = String::from_utf8_lossy(&beside.stderr).into_owned();
    let keeper = format!("process {} keeps the rules", node.children[1].id());
    assert!(!beside.status.success() && said.contains(&keeper), "{said}");
    let log = node.log("proxy.log");
    for said in [
        "line 5: unknown field \"resourceContainer\"",
        "line 8: key \"mode\" stands here for a second time; the last one counts",
        "--ipvs-scheduler has no effect",
    ] {
        assert!(log.contains(said), "{said} isn't in {log}");
    }
    prometheus_reads_the_metrics(&mut node);
    wait_for("the Node's event", DEADLINE, || {
        let columns = "-o=jsonpath={.items[*]['reportingComponent','type','reason']}";
        let which = "--field-selector=involvedObject.kind=Node,involvedObject.name=n1";
        let told = node.kubectl(&["get", "events", "-A", which, columns])?;
        if told == "kube-proxy Normal Starting" { Ok(()) } else { Err(told) }
    });
    wait_for("the missing Node to be told", DEADLINE, || {
        let log = node.log("proxy.log");
        if log.contains("the cluster has no such Node") { Ok(()) } else { Err(log) }
    });

    // It is asked how it is configured.
    let mut explain =
        node.machine.keelson(&["explain", "packet", "--from", "node", "--port", "443"]);
    explain.args(["--to", "service", "default/kubernetes", "-o", "json", "--kubeconfig"]);
    let output = run(explain.arg(node.machine.data_dir().join("admin.conf")));
    let said: Value = serde_json::from_str(&stdout_of("explain", &output)).expect("JSON");
    let rules = said["rules"].to_string();
    assert!(said["verdict"] == "forwarded" && rules.contains("KUBE-SVC-"), "{said:#}");
    assert_eq!(said["kernel"], serde_json::json!([]), "{said:#}");

    // A wrong file changes nothing, a right one ends it.
    fs::write(node.path("config.yaml"), CONFIG.replace("syncPeriod: 7s", "syncPeriod: often"))
        .expect("a file");
    wait_for("the wrong file to be told", DEADLINE, || {
        let log = node.log("proxy.log");
        if log.contains("going on with the configuration from before") { Ok(()) } else { Err(log) }
    });
    assert_eq!(node.page("http://127.0.0.1:10256/livez").expect("a page").0, "200");
    fs::write(node.path("config.yaml"), CONFIG.replace("7s", "8s")).expect("a file");
    let proxy = &mut node.children[1];
    let status = wait_for("the proxy to end", DEADLINE, || {
        proxy.try_wait().ok().flatten().ok_or_else(|| "it runs".to_owned())
    });
    assert!(!status.success(), "so that it is started again");
    assert!(node.log("proxy.log").contains("it has changed"), "{}", node.log("proxy.log"));

    let written = node.path("written.yaml");
    let write = ["--write-config-to", &written.to_string_lossy(), "--masquerade-all"];
    stdout_of("--write-config-to", &run(&mut node.proxy(&write)));
    let text = fs::read_to_string(&written).expect("a file");
    for line in ["mode: iptables", "syncPeriod: 8s", "masqueradeAll: true", "udpTimeout: 0s"] {
        assert!(text.contains(line), "{line} isn't in {text}");
    }
    let version = stdout_of("--version", &run(&mut node.proxy(&["--version"])));
    assert!(version.starts_with("Kubernetes v1.36"), "{version}");

    // The rules stayed until they are asked to go.
    let chains = || stdout_of("iptables-save", &run(&mut node.machine.command("iptables-save")));
    assert!(chains().contains("KUBE-SVC-"), "{}", chains());
    stdout_of("--cleanup", &run(&mut node.proxy(&["--cleanup"])));
    assert!(!chains().contains("KUBE-SVC-"), "{}", chains());
}
