//! `keelson proxy` told to stop at any moment, with five thousand Services to write: it ends in under
//! a second, and the rules in force are whole.
//!
//! The API server is a stand-in that answers lists and never ends watches: what is tested is the
//! start, and a real one would take longer to fill.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    process::{Child, ExitStatus, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use keelson_tests::{DEADLINE, Machine, inside::inside, stdout_of, wait_for};
use serde_json::{Value, json};

const SERVICES: usize = 5_000;
/// How long a stop may take.
const STOP: Duration = Duration::from_secs(1);
const API_PORT: u16 = 8_001;

fn address(n: usize) -> String {
    format!("10.96.{}.{}", n / 250, n % 250 + 1)
}

fn list(kind: &str, version: &str, items: Vec<Value>) -> Vec<u8> {
    let list = json!({"kind": format!("{kind}List"), "apiVersion": version,
                      "metadata": {"resourceVersion": "1"}, "items": items});
    serde_json::to_vec(&list).expect("JSON")
}

/// What the API has: by path.
fn objects() -> Vec<(&'static str, Vec<u8>)> {
    let metadata = |name: String| json!({"name": name, "namespace": "d", "resourceVersion": "1"});
    let service = |n| {
        json!({"metadata": metadata(format!("s{n}")),
               "spec": {"clusterIP": address(n), "ports": [{"port": 80}]}})
    };
    let slice = |n| {
        let mut metadata = metadata(format!("s{n}-1"));
        metadata["labels"] = json!({"kubernetes.io/service-name": format!("s{n}")});
        json!({"metadata": metadata, "addressType": "IPv4", "ports": [{"port": 8080}],
               "endpoints": [{"addresses": ["10.244.0.5"]}, {"addresses": ["10.244.0.6"]}]})
    };
    vec![
        ("/api/v1/services", list("Service", "v1", (0..SERVICES).map(service).collect())),
        (
            "/apis/discovery.k8s.io/v1/endpointslices",
            list("EndpointSlice", "discovery.k8s.io/v1", (0..SERVICES).map(slice).collect()),
        ),
        ("/api/v1/nodes", list("Node", "v1", Vec::new())),
    ]
}

/// Serves them on the machine until the process ends.
fn serve(machine: &Machine) {
    let bound =
        inside(&machine.netns(), || Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, API_PORT))?));
    let (listener, objects) = (bound.expect("a port"), Arc::new(objects()));
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let objects = Arc::clone(&objects);
            thread::spawn(move || answer(&stream, &objects));
        }
    });
}

/// Answers a connection's requests; one that watches is never heard of again.
fn answer(mut stream: &TcpStream, objects: &[(&str, Vec<u8>)]) -> Option<()> {
    let mut lines = BufReader::new(stream).lines();
    loop {
        let request = lines.next()?.ok()?;
        // None of them has a body but those for events, which go unanswered.
        while !lines.next()?.ok()?.is_empty() {}
        let target = request.split(' ').nth(1)?;
        if target.contains("watch=true") {
            let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\
                        transfer-encoding: chunked\r\n\r\n";
            stream.write_all(head.as_bytes()).ok()?;
            lines.next();
            return None;
        }
        let path = target.split('?').next()?;
        let (_, body) = objects.iter().find(|(known, _)| *known == path)?;
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).ok()?;
        stream.write_all(body).ok()?;
    }
}

struct Proxy<'a> {
    machine: &'a Machine,
    child: Child,
}

impl<'a> Proxy<'a> {
    fn start(machine: &'a Machine, mode: &str) -> Self {
        let kubeconfig = machine.dir().join("stand-in.conf");
        let text = json!({"apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": format!("http://127.0.0.1:{API_PORT}")}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}]});
        fs::write(&kubeconfig, text.to_string()).expect("a kubeconfig");
        let log = machine.dir().join("proxy.log");
        let log = File::options().create(true).append(true).open(log).expect("a log");
        let mut command = machine.keelson(&["proxy", "--hostname-override", "n1"]);
        command.arg("--kubeconfig").arg(kubeconfig);
        command.args(["--proxy-mode", mode, "--bind-address", "10.99.0.1"]);
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log);
        Self { machine, child: command.spawn().expect("the binary") }
    }

    /// Waits until the process listens to signals: it has taken its folder then.
    fn wait_begun(&self) {
        let path = self.machine.data_dir().join("run/proxy.json");
        wait_for("the process to begin", DEADLINE, || {
            let record = fs::read(&path).map_err(|error| error.to_string())?;
            let record: Value = serde_json::from_slice(&record).map_err(|e| e.to_string())?;
            if record["pid"] == self.child.id() { Ok(()) } else { Err(record.to_string()) }
        });
    }

    fn signal(&mut self, signal: i32) -> (ExitStatus, Duration) {
        let begin = Instant::now();
        // SAFETY: a signal to a process that we started and have not waited for.
        unsafe { libc::kill(self.child.id().cast_signed(), signal) };
        let status = self.child.wait().expect("wait");
        (status, begin.elapsed())
    }
}

impl Drop for Proxy<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            let log = fs::read_to_string(self.machine.dir().join("proxy.log")).unwrap_or_default();
            eprintln!("log of the proxy:\n{log}");
        }
    }
}

fn listed(machine: &Machine, script: &str) -> String {
    let output = machine.command("sh").args(["-ec", script]).output().expect("sh");
    stdout_of(script, &output)
}

/// How many Services have rules.
fn written(machine: &Machine, mode: &str) -> usize {
    match mode {
        "iptables" => {
            let saved = listed(machine, "iptables-save -t nat");
            saved.lines().filter(|line| line.starts_with(":KUBE-SVC-")).count()
        }
        _ => {
            let listed = listed(machine, "nft list map ip keelson-proxy services || true");
            listed.matches("goto endpoints-2").count()
        }
    }
}

fn stops_at_any_moment(mode: &str) {
    let machine = Machine::new();
    fs::create_dir_all(machine.data_dir()).expect("a folder");
    serve(&machine);
    // From the very start on, and every so often until everything is written.
    let moments = [0, 20, 60, 120, 200, 300, 450, 700, 1_000, 1_500];
    for (n, moment) in moments.into_iter().enumerate() {
        let mut proxy = Proxy::start(&machine, mode);
        proxy.wait_begun();
        // The moment is what is tested.
        thread::sleep(Duration::from_millis(moment));
        let signal = if n % 2 == 0 { libc::SIGTERM } else { libc::SIGINT };
        let (status, took) = proxy.signal(signal);
        assert!(status.success(), "{mode} after {moment} ms: {status}");
        assert!(took < STOP, "{mode} after {moment} ms: it took {took:?} to stop");
        let written = written(&machine, mode);
        assert!(written == 0 || written == SERVICES, "{mode} after {moment} ms: {written}");
        // So that the next one has everything to write.
        listed(&machine, "nft flush ruleset");
    }
    let _proxy = Proxy::start(&machine, mode);
    wait_for("all Services", DEADLINE, || match written(&machine, mode) {
        SERVICES => Ok(()),
        other => Err(other.to_string()),
    });
}

#[test]
fn the_nftables_mode_stops_at_any_moment() {
    stops_at_any_moment("nftables");
}

#[test]
fn the_iptables_mode_stops_at_any_moment() {
    stops_at_any_moment("iptables");
}
