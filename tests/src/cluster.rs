//! `keelson up`, or the control plane alone, with kubectl.

use std::{
    fs::{self, File},
    io::Write,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Output, Stdio},
    time::Duration,
};

use serde_json::Value;

use crate::{Leftovers, Machine, machine::stdout_of, wait_for};

/// How long anything may take on a busy machine before the test gives up.
pub const DEADLINE: Duration = Duration::from_secs(90);

/// A running cluster of one node, or of none.
#[derive(Debug)]
pub struct Cluster {
    /// The machine it runs on.
    pub machine: Machine,
    before: Leftovers,
    command: &'static str,
    arguments: Vec<String>,
    child: Option<Child>,
}

impl Cluster {
    /// Starts one, and waits until its node is ready.
    ///
    /// # Panics
    /// When it does not get ready; the message has the end of its log.
    pub fn start(arguments: &[&str]) -> Self {
        let mut cluster = Self::prepare(arguments);
        cluster.start_process();
        cluster.wait_ready();
        cluster
    }

    /// A machine on which nothing runs yet, for `keelson up`.
    pub fn prepare(arguments: &[&str]) -> Self {
        Self::prepare_command("up", arguments)
    }

    /// A machine on which nothing runs yet, for the control plane alone: no node ever joins.
    pub fn prepare_control_plane() -> Self {
        Self::prepare_command("control-plane", &[])
    }

    fn prepare_command(command: &'static str, arguments: &[&str]) -> Self {
        let machine = Machine::new();
        let before = Leftovers::now(&machine.netns(), machine.dir(), "");
        let arguments = arguments.iter().map(|a| (*a).to_owned()).collect();
        Self { machine, before, command, arguments, child: None }
    }

    /// Starts the process, without waiting for anything.
    ///
    /// # Panics
    /// When it can't be started.
    pub fn start_process(&mut self) {
        let log =
            File::options().create(true).append(true).open(self.log_path()).expect("the log file");
        let mut command = self.machine.keelson(&[self.command]);
        command
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the log file"))
            .stderr(log);
        self.child = Some(command.spawn().expect("the binary"));
    }

    /// Waits until the API answers and the node is ready.
    ///
    /// # Panics
    /// When that takes too long.
    pub fn wait_ready(&mut self) {
        let log = self.log_path();
        wait_for("the node to be ready", DEADLINE, || {
            if let Some(child) = &mut self.child
                && let Ok(Some(status)) = child.try_wait()
            {
                panic!("keelson up ended: {status}\n{}", tail(&log));
            }
            let output = self.try_kubectl(&[
                "wait",
                "node",
                "--all",
                "--for=condition=Ready",
                "--timeout=1s",
            ]);
            if output.status.success() {
                Ok(())
            } else {
                Err(format!("{}\nlog:\n{}", String::from_utf8_lossy(&output.stderr), tail(&log)))
            }
        });
    }

    /// The id of the process.
    ///
    /// # Panics
    /// When it doesn't run.
    pub fn pid(&self) -> i32 {
        // nsenter without --fork becomes the program it starts.
        self.child.as_ref().expect("a running cluster").id() as i32
    }

    /// Kills the process as an out-of-memory kill or a crash would, and waits for its end.
    ///
    /// # Panics
    /// When it doesn't run.
    pub fn kill_process(&mut self) {
        let mut child = self.child.take().expect("a running cluster");
        child.kill().expect("kill");
        child.wait().expect("wait");
    }

    /// Stops it as Ctrl-C does, and waits for its end.
    ///
    /// # Panics
    /// When it doesn't run, or ends with an error.
    pub fn interrupt(&mut self) {
        let mut child = self.child.take().expect("a running cluster");
        // SAFETY: a signal to a process that we started and have not waited for.
        unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
        let status = child.wait().expect("wait");
        let (command, log) = (self.command, tail(&self.log_path()));
        assert!(status.success(), "keelson {command}: {status}\n{log}");
    }

    /// Waits for the end of a process that ends by itself.
    ///
    /// # Panics
    /// When it doesn't run.
    pub fn wait_end(&mut self) -> ExitStatus {
        self.child.take().expect("a running cluster").wait().expect("wait")
    }

    /// Waits until the process has taken its folders: from then on it heeds signals.
    ///
    /// # Panics
    /// When that takes too long.
    pub fn wait_begun(&self) {
        let path = self.machine.data_dir().join("run/agent.json");
        wait_for("the process to begin", DEADLINE, || {
            let record = fs::read(&path).map_err(|error| error.to_string())?;
            let record: Value = serde_json::from_slice(&record).map_err(|e| e.to_string())?;
            if record["pid"] == self.pid() { Ok(()) } else { Err(format!("{record}")) }
        });
    }

    /// The log of the process.
    pub fn log_path(&self) -> PathBuf {
        self.machine.dir().join("keelson.log")
    }

    /// kubectl with the cluster's kubeconfig, run on the machine.
    pub fn kubectl_command(&self, arguments: &[&str]) -> Command {
        let mut command = self.machine.command("kubectl");
        command
            .env("KUBECONFIG", self.machine.data_dir().join("admin.conf"))
            .env("HOME", self.machine.dir())
            .args(arguments);
        command
    }

    /// Runs kubectl to its end.
    ///
    /// # Panics
    /// When kubectl is missing.
    pub fn try_kubectl(&self, arguments: &[&str]) -> Output {
        self.kubectl_command(arguments).stdin(Stdio::null()).output().expect("kubectl")
    }

    /// Runs kubectl, which must succeed, and returns what it printed.
    ///
    /// # Panics
    /// When it fails.
    pub fn kubectl(&self, arguments: &[&str]) -> String {
        stdout_of(&format!("kubectl {}", arguments.join(" ")), &self.try_kubectl(arguments))
    }

    /// Applies a manifest given as text.
    ///
    /// # Panics
    /// When it is refused.
    pub fn apply(&self, manifest: &str) {
        let output = self.try_with_manifest(&["apply", "-f", "-"], manifest);
        stdout_of("kubectl apply", &output);
    }

    /// Runs kubectl with a manifest on its standard input.
    ///
    /// # Panics
    /// When kubectl is missing.
    pub fn try_with_manifest(&self, arguments: &[&str], manifest: &str) -> Output {
        let mut child = self
            .kubectl_command(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("kubectl");
        // What begins with a brace kubectl takes for JSON.
        let text = if manifest.starts_with('{') {
            format!("---\n{manifest}")
        } else {
            manifest.to_owned()
        };
        child.stdin.take().expect("stdin").write_all(text.as_bytes()).expect("write");
        child.wait_with_output().expect("wait")
    }

    /// An object, or all of a list, as JSON; null if it isn't there.
    pub fn get(&self, arguments: &[&str]) -> Value {
        let mut all = vec!["get", "-o", "json"];
        all.extend_from_slice(arguments);
        serde_json::from_slice(&self.try_kubectl(&all).stdout).unwrap_or(Value::Null)
    }

    /// Waits until an object fulfils a condition, and returns it.
    ///
    /// # Panics
    /// When that takes too long; the message has the object as last seen.
    pub fn wait_object(
        &self,
        what: &str,
        arguments: &[&str],
        holds: impl Fn(&Value) -> bool,
    ) -> Value {
        wait_for(what, DEADLINE, || {
            let object = self.get(arguments);
            if holds(&object) {
                Ok(object)
            } else {
                Err(format!("{object:#}\n{}", tail(&self.log_path())))
            }
        })
    }

    /// Waits until a pod is ready.
    ///
    /// # Panics
    /// When that takes too long.
    pub fn wait_pod_ready(&self, name: &str) -> Value {
        self.wait_object(&format!("pod {name} to be ready"), &["pod", name], pod_is_ready)
    }

    /// Makes the demo image.
    ///
    /// # Panics
    /// When that fails.
    pub fn make_demo_image(&self) {
        let output = self.machine.keelson(&["image", "demo"]).output().expect("the binary");
        stdout_of("keelson image demo", &output);
    }

    /// Makes an image of busybox, with all its programs, named `busybox:test`.
    ///
    /// # Panics
    /// When that fails.
    pub fn make_busybox_image(&self) {
        let archive = self.machine.dir().join("busybox.tar");
        crate::image::write_busybox_archive(&archive, "busybox:test");
        let mut command = self.machine.keelson(&["image", "import"]);
        let output = command.arg(&archive).output().expect("the binary");
        stdout_of("keelson image import", &output);
    }

    /// A GET request to a URL from the machine; its body, or what curl said.
    ///
    /// # Errors
    /// When there was no answer, or one with an error code.
    pub fn fetch(&self, url: &str) -> Result<String, String> {
        fetch_with(self.machine.command("curl"), url)
    }

    /// The same from the machine's neighbour.
    ///
    /// # Errors
    /// As [`Cluster::fetch`].
    pub fn fetch_from_neighbour(&self, url: &str) -> Result<String, String> {
        fetch_with(self.machine.neighbour_command("curl"), url)
    }

    /// Runs `keelson down` and says what it left behind.
    ///
    /// # Panics
    /// When `down` fails.
    pub fn down(&mut self) -> Vec<String> {
        let part = if self.command == "up" { "agent" } else { self.command };
        let path = self.machine.data_dir().join(format!("run/{part}.json"));
        let record = fs::read(path).expect("a record");
        let record: Value = serde_json::from_slice(&record).expect("a record in JSON");
        let cgroup = record["cgroup_root"].as_str().expect("the cgroup's name").to_owned();
        let output = self.machine.keelson(&["down"]).output().expect("the binary");
        stdout_of("keelson down", &output);
        if let Some(mut child) = self.child.take() {
            child.wait().expect("wait");
        }
        Leftovers::now(&self.machine.netns(), self.machine.dir(), &cgroup).since(&self.before)
    }
}

fn fetch_with(mut curl: Command, url: &str) -> Result<String, String> {
    let output = curl
        .args(["--silent", "--show-error", "--fail", "--max-time", "5", url])
        .output()
        .expect("curl");
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// Whether a pod has the condition `Ready`.
pub fn pod_is_ready(pod: &Value) -> bool {
    pod["status"]["conditions"]
        .as_array()
        .is_some_and(|all| all.iter().any(|c| c["type"] == "Ready" && c["status"] == "True"))
}

fn tail(path: &std::path::Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let output = self.machine.keelson(&["down", "--purge"]).output();
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("log of keelson:\n{}", tail(&self.log_path()));
            if let Ok(output) = output {
                eprintln!("keelson down: {}", String::from_utf8_lossy(&output.stdout));
                eprintln!("{}", String::from_utf8_lossy(&output.stderr));
            }
        }
    }
}
