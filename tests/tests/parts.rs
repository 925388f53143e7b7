//! The parts as processes of their own, and a second node on another machine.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use keelson_tests::{
    DEADLINE, Leftovers, Machine, NEIGHBOUR_ADDRESS, pod_is_ready, stdout_of, wait_for,
    write_busybox_archive,
};
use serde_json::Value;

/// One of the two machines: the test's, or its neighbour.
struct Node {
    name: &'static str,
    netns: String,
    data: PathBuf,
    before: Leftovers,
    children: Vec<Child>,
}

impl Node {
    fn new(machine: &Machine, name: &'static str, netns: String) -> Self {
        let data = machine.dir().join(name);
        let before = Leftovers::now(&netns, &data, "");
        fs::create_dir_all(&data).expect("a folder");
        Self { name, netns, data, before, children: Vec::new() }
    }

    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.netns)).arg("--").arg(program);
        command
    }

    fn keelson(&self, arguments: &[&str]) -> Command {
        let mut command = self.command(Machine::binary());
        command.args(arguments).arg("--data-dir").arg(&self.data);
        command
    }

    fn ask(&self, arguments: &[&str]) -> String {
        let output = self.keelson(arguments).output().expect("the binary");
        stdout_of(&format!("keelson {}", arguments.join(" ")), &output)
    }

    fn log(&self) -> PathBuf {
        self.data.with_extension("log")
    }

    fn start(&mut self, arguments: &[&str]) {
        let log = File::options().create(true).append(true).open(self.log()).expect("a log");
        let mut command = self.keelson(arguments);
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log);
        self.children.push(command.spawn().expect("the binary"));
    }

    /// Agent and proxy, each with what the control plane issued for it.
    fn join(&mut self) {
        let path = |name: &str| self.data.join(name).to_string_lossy().into_owned();
        let (kubelet, proxy) = (path("kubelet.conf"), path("kube-proxy.conf"));
        let config = path("kubelet.yaml");
        let text = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n\
                    failCgroupV1: false\n";
        fs::write(&config, text).expect("config");
        let name = self.name;
        self.start(&["proxy", "--hostname-override", name, "--kubeconfig", &proxy]);
        let agent = ["agent", "--node-name", name, "--kubeconfig", &kubelet, "--config", &config];
        self.start(&agent);
    }

    fn fetch(&self, url: &str) -> Result<String, String> {
        let mut curl = self.command("curl");
        answer(&curl.args(["-sS", "--fail", "-m", "5", url]).output().expect("curl"))
    }

    fn down(&mut self) -> Vec<String> {
        let record = fs::read(self.data.join("run/agent.json")).expect("a record");
        let record: Value = serde_json::from_slice(&record).expect("JSON");
        let cgroup = record["cgroup_root"].as_str().expect("the cgroup's name").to_owned();
        self.ask(&["down"]);
        for mut child in self.children.drain(..) {
            child.wait().expect("wait");
        }
        Leftovers::now(&self.netns, &self.data, &cgroup).since(&self.before)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.keelson(&["down", "--purge"]).output();
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            let log = fs::read_to_string(self.log()).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            let end = lines[lines.len().saturating_sub(60)..].join("\n");
            eprintln!("log of {}:\n{end}", self.name);
        }
    }
}

fn answer(output: &Output) -> Result<String, String> {
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// kubectl on the control plane's machine, as the user of a kubeconfig file.
fn kubectl(node: &Node, kubeconfig: &Path, arguments: &[&str]) -> Result<String, String> {
    let mut command = node.command("kubectl");
    command.env("KUBECONFIG", kubeconfig).env("HOME", &node.data).args(arguments);
    answer(&command.stdin(Stdio::null()).output().expect("kubectl"))
}

/// A pod that answers with its own name, and a Service over all of them.
fn manifest() -> String {
    let pod = |name: &str, node: &str| {
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, labels: {{app: web}}}}, spec: \
             {{nodeName: {node}, containers: [{{name: c, image: 'busybox:test', command: [sh, -c, \
             'echo said; echo {name} > /tmp/index.html; exec httpd -f -p 8080 -h /tmp']}}]}}}}\n---\n"
        )
    };
    // What begins with a brace kubectl takes for JSON.
    "---\n".to_owned()
        + &pod("one", "n1")
        + &pod("two", "n2")
        + "{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {selector: {app: web}, \
           ports: [{port: 80, targetPort: 8080}]}}\n"
}

#[test]
fn the_parts_alone_make_a_cluster_of_two_machines() {
    let machine = Machine::new();
    let mut first = Node::new(&machine, "n1", machine.netns());
    let mut second = Node::new(&machine, "n2", machine.neighbour_netns());
    first.start(&["control-plane", "--node-name", "n1"]);
    let admin = first.data.join("admin.conf");
    wait_for("the API server", DEADLINE, || kubectl(&first, &admin, &["get", "--raw", "/readyz"]));

    // On its own machine the control plane has written what agent and proxy need; for another one
    // it is issued.
    first.join();
    let issue = |arguments: &[&str], file: &str| {
        let output = second.data.join(file).to_string_lossy().into_owned();
        first.ask(&[&["kubeconfig"], arguments, &["-o", &output]].concat());
        PathBuf::from(output)
    };
    let of_node = issue(&["--node", "n2", "--address", NEIGHBOUR_ADDRESS], "kubelet.conf");
    issue(&["--user", "system:kube-proxy"], "kube-proxy.conf");
    second.join();
    let admin_says = |arguments: &[&str]| kubectl(&first, &admin, arguments);
    for name in ["node/n1", "node/n2"] {
        wait_for("both nodes to be ready", DEADLINE, || {
            admin_says(&["wait", "--for=condition=Ready", name, "--timeout=1s"])
        });
    }
    // A node's kubeconfig is a node's, and no more.
    for forbidden in ["secrets", "nodes"] {
        let refused = kubectl(&first, &of_node, &["get", forbidden, "-A"]).expect_err("refused");
        assert!(refused.contains("Forbidden"), "{refused}");
    }

    let archive = machine.dir().join("busybox.tar");
    write_busybox_archive(&archive, "busybox:test");
    let archive = archive.to_string_lossy();
    for node in [&first, &second] {
        node.ask(&["image", "import", &archive]);
    }
    let file = machine.dir().join("web.yaml");
    fs::write(&file, manifest()).expect("a manifest");
    // Service accounts are made a moment after their namespace.
    wait_for("the objects", DEADLINE, || admin_says(&["apply", "-f", &file.to_string_lossy()]));
    for pod in ["one", "two"] {
        wait_for("the pods to be ready", DEADLINE, || {
            let pod = admin_says(&["get", "pod", pod, "-o", "json"])?;
            let pod: Value = serde_json::from_str(&pod).map_err(|e| e.to_string())?;
            if pod_is_ready(&pod) { Ok(()) } else { Err(pod["status"].to_string()) }
        });
    }

    // The Service over both, from both machines and both pods.
    let address = admin_says(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"]);
    let url = format!("http://{}/", address.expect("an address"));
    let both_answer = |from: &str, fetch: &dyn Fn() -> Result<String, String>| {
        let mut seen = BTreeSet::new();
        wait_for(&format!("both pods to answer {from}"), DEADLINE, || {
            seen.insert(fetch()?.trim().to_owned());
            if seen.len() == 2 { Ok(()) } else { Err(format!("only {seen:?}")) }
        });
    };
    both_answer("the first machine", &|| first.fetch(&url));
    both_answer("the second machine", &|| second.fetch(&url));
    for pod in ["one", "two"] {
        both_answer(pod, &|| {
            admin_says(&["exec", pod, "--", "curl", "-sS", "--fail", "-m", "5", "http://web/"])
        });
        assert_eq!(admin_says(&["logs", pod]).expect("a log"), "said\n");
    }
    let status = first.ask(&["status"]);
    for word in
        ["(control-plane, ", "(agent, ", "(proxy, ", "network ", "node        n2: ", "2 of 2"]
    {
        assert!(status.contains(word), "{word} is missing in\n{status}");
    }
    for node in [&mut second, &mut first] {
        let left = node.down();
        assert!(left.is_empty(), "{} left behind: {left:#?}", node.name);
        let routes = node.command("ip").arg("route").output().expect("iproute2");
        let routes = stdout_of("ip route", &routes);
        assert!(!routes.contains("10.244."), "{} left behind: {routes}", node.name);
    }
}
