//! Static pods on the embedded runtime: the agent as a whole, without an API server.
//!
//! Needs root, busybox and iproute2. Everything happens in network and mount namespaces of its own,
//! in a folder and a cgroup of its own, and is gone afterwards.

#![allow(clippy::unwrap_used)] // a panic is the failure

use std::{
    fs,
    future::Future,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodStatus};
use keelson_agent::{
    Agent, AgentConfig, AgentParts,
    environment::{AllocatableNow, KubeEnvironment, KubeObjects, ObjectSource},
    pods::PodDirectory,
    volumes::HostVolumes,
};
use keelson_api::events::EventRecorder;
use keelson_runtime_shim::{
    EmbeddedConfig, EmbeddedRuntime,
    images::{FileInImage, ImageOptions, ImageStore},
    network::NetworkConfig,
};
use prometheus::Registry;
use tokio_util::sync::CancellationToken;

const HELPER: &str = "runtime-helper";
const INSIDE: &str = "inside";
const DEADLINE: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some(HELPER) => {
            std::process::exit(keelson_runtime_shim::embedded::helper_main(&arguments[1..]))
        }
        Some(INSIDE) => {
            inside();
            ExitCode::SUCCESS
        }
        // what test runners ask every test program
        Some("--list") => ExitCode::SUCCESS,
        // a filter that names another test
        Some(filter) if !filter.starts_with('-') && !"static_pods_live".contains(filter) => {
            ExitCode::SUCCESS
        }
        _ => in_namespaces(),
    }
}

fn in_namespaces() -> ExitCode {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.arg(INSIDE);
    // SAFETY: unshare and mount are plain system calls, safe between fork and exec.
    unsafe {
        command.pre_exec(|| {
            let none = std::ptr::null::<libc::c_char>();
            let private = libc::MS_REC | libc::MS_PRIVATE;
            if libc::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWNS) != 0
                || libc::mount(none, c"/".as_ptr(), none, private, none.cast()) != 0
            {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let succeeded = command.status().unwrap().success();
    println!("test static_pods_live ... {}", if succeeded { "ok" } else { "FAILED" });
    if succeeded { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn inside() {
    for line in [
        "link set lo up",
        "link add outside type veth peer name wire",
        "addr add 192.0.2.1/24 dev outside",
        "link set outside up",
        "link set wire up",
    ] {
        assert!(Command::new("ip").args(line.split(' ')).status().unwrap().success(), "{line}");
    }
    let tokio = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    tokio.unwrap().block_on(static_pods_live());
}

/// Removes what is left also when the test fails.
struct Node {
    root: tempfile::TempDir,
    cgroup: String,
}

/// An agent that runs.
struct Running {
    runtime: EmbeddedRuntime,
    directory: Arc<dyn PodDirectory>,
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Node {
    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn images(&self) -> ImageStore {
        ImageStore::open(self.path("images"), ImageOptions::default()).unwrap()
    }

    async fn image(&self) {
        let mut files = vec![];
        for name in ["busybox", "sh"] {
            files.push(FileInImage {
                source: "/bin/busybox".into(),
                path: format!("/bin/{name}").into(),
                mode: 0o755,
            });
        }
        for name in ["cat", "sleep", "test", "touch", "rm", "nc"] {
            let script = self.path(name);
            fs::write(&script, format!("#!/bin/sh\nexec /bin/busybox {name} \"$@\"\n")).unwrap();
            files.push(FileInImage {
                source: script,
                path: format!("/bin/{name}").into(),
                mode: 0o755,
            });
        }
        self.images().build_from_files("busybox:test", &files, &Default::default()).await.unwrap();
    }

    async fn agent(&self) -> Running {
        let runtime = EmbeddedRuntime::open(
            EmbeddedConfig {
                root: self.path("lib"),
                run: self.path("run"),
                cgroup_root: self.cgroup.clone(),
                helper: vec![],
                network: NetworkConfig {
                    pod_ranges: vec!["10.123.4.0/24".parse().unwrap()],
                    ..NetworkConfig::default()
                },
            },
            self.images(),
        )
        .await
        .unwrap();
        let mut config = AgentConfig::new("node-1", vec!["192.0.2.1".parse().unwrap()]);
        config.root_dir = self.path("kubelet");
        config.pod_logs_dir = self.path("logs/pods");
        config.container_logs_dir = self.path("logs/containers");
        config.static_pod_path = Some(self.path("manifests"));
        let shutdown = CancellationToken::new();
        let objects: Arc<dyn ObjectSource> = Arc::new(KubeObjects::new(None, shutdown.clone()));
        let allocatable = keelson_agent::allocatable(&config).unwrap();
        let allocatable: AllocatableNow = Arc::new(move || allocatable.clone());
        let volumes =
            HostVolumes::new(&config.root_dir, objects.clone(), allocatable.clone(), &shutdown);
        let events = EventRecorder::discard();
        let agent = Agent::new(AgentParts {
            config,
            client: None,
            runtime: Arc::new(runtime.clone()),
            volumes: Arc::new(volumes.unwrap()),
            environment: Arc::new(KubeEnvironment::new(objects, events.clone(), allocatable)),
            events,
            registry: Registry::new(),
            probe_registry: Registry::new(),
            shutdown: shutdown.clone(),
        })
        .await
        .unwrap();
        let directory = agent.directory();
        Running {
            runtime,
            directory,
            shutdown,
            task: tokio::spawn(async move { agent.run().await.unwrap() }),
        }
    }

    fn manifest(&self, name: &str, text: &str) {
        let aside = self.path("manifests").join(format!(".{name}"));
        fs::write(&aside, text).unwrap();
        fs::rename(aside, self.path("manifests").join(name)).unwrap();
    }
}

impl Running {
    fn pod(&self, name: &str) -> Option<Arc<Pod>> {
        self.directory.pod("default", name)
    }

    fn status(&self, name: &str) -> PodStatus {
        self.pod(name).and_then(|pod| pod.status.clone()).unwrap_or_default()
    }

    fn pid(&self, name: &str, container: &str) -> Option<i32> {
        let uid = self.pod(name)?.metadata.uid.clone()?;
        let runtime = self.directory.runtime_pod(&uid)?;
        runtime.containers.iter().find(|status| status.name == container)?.pid
    }

    async fn until(&self, what: &str, name: &str, done: impl Fn(&PodStatus) -> bool) -> Duration {
        let begun = Instant::now();
        loop {
            let status = self.status(name);
            if done(&status) {
                return begun.elapsed();
            }
            assert!(begun.elapsed() < DEADLINE, "{name} is not {what}: {status:#?}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    async fn gone(&self, name: &str) {
        within(async {
            while self.pod(name).is_some() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }

    /// Ends the agent; the pods run on.
    async fn end(self) -> EmbeddedRuntime {
        self.shutdown.cancel();
        within(self.task).await.unwrap();
        self.runtime
    }
}

async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, what).await.unwrap()
}

fn condition(status: &PodStatus, kind: &str) -> bool {
    status
        .conditions
        .iter()
        .flatten()
        .any(|condition| condition.type_ == kind && condition.status == "True")
}

fn container<'a>(status: &'a PodStatus, name: &str) -> Option<&'a ContainerStatus> {
    status.container_statuses.iter().flatten().find(|status| status.name == name)
}

fn waits_for<'a>(status: &'a PodStatus, name: &str) -> Option<&'a str> {
    container(status, name)?.state.as_ref()?.waiting.as_ref()?.reason.as_deref()
}

const WEB: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  terminationGracePeriodSeconds: 2
  hostAliases: [{ip: 10.9.8.7, hostnames: [friend]}]
  volumes: [{name: data, emptyDir: {}}]
  initContainers:
  - name: prepare
    image: busybox:test
    command: [sh, -c, 'echo hello > /data/text; busybox mkdir /data/part; echo part > /data/part/x']
    volumeMounts: [{name: data, mountPath: /data}]
  containers:
  - name: main
    image: busybox:test
    env: [{name: WHO, value: world}]
    command: [sh, -c, 'trap "exit 0" TERM; echo $(cat /data/text) $(WHO); cat /etc/hosts; cat /part/x; touch /data/ready; while true; do sleep 0.1; done']
    volumeMounts: [{name: data, mountPath: /data}, {name: data, mountPath: /part, subPath: part}]
    resources: {requests: {cpu: 10m}, limits: {memory: 64Mi}}
    readinessProbe: {exec: {command: [test, -e, /data/ready]}, periodSeconds: 1, failureThreshold: 1}
    lifecycle:
      preStop: {exec: {command: [sh, -c, 'echo bye > /proc/1/fd/1']}}
"#;

const CRASH: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: crash}
spec:
  containers:
  - name: main
    image: busybox:test
    command: [sh, -c, 'echo last words > /dev/termination-log; exit 3']
"#;

const JOB: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: job}
spec:
  restartPolicy: Never
  containers: [{name: main, image: 'busybox:test', command: [sh, -c, 'exit 0']}]
"#;

const MISSING: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: missing}
spec:
  containers: [{name: main, image: 'nowhere:1', imagePullPolicy: Never}]
"#;

async fn static_pods_live() {
    let node = Node {
        root: tempfile::Builder::new().prefix("kag").tempdir().unwrap(),
        cgroup: format!("keelson-agent-test-{}", std::process::id()),
    };
    fs::create_dir(node.path("manifests")).unwrap();
    node.image().await;
    let agent = node.agent().await;

    // up: init container, volume, readiness
    node.manifest("web.yaml", WEB);
    agent.until("ready", "web-node-1", |status| condition(status, "Ready")).await;
    let status = agent.status("web-node-1");
    assert_eq!(status.phase.as_deref(), Some("Running"));
    assert_eq!(status.qos_class.as_deref(), Some("Burstable"));
    assert!(status.pod_ip.is_some_and(|ip| ip.starts_with("10.123.4.")));
    let folders = fs::read_dir(node.path("logs/pods")).unwrap().flatten();
    let folder = folders.map(|entry| entry.path()).next().unwrap();
    let log = folder.join("main/0.log");
    let text = fs::read_to_string(&log).unwrap();
    for expected in ["hello world", "10.9.8.7\tfriend", "web-node-1", "stdout F part"] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    assert_eq!(fs::read_dir(node.path("logs/containers")).unwrap().count(), 2);

    // out of readiness and back
    let exec = |agent: &Running, command: &str| {
        let (runtime, command) = (agent.runtime.clone(), command.to_owned());
        let status = agent.status("web-node-1");
        let id = container(&status, "main").unwrap().container_id.clone().unwrap();
        async move {
            use keelson_runtime_shim::{PodRuntime as _, runtime::ContainerId};
            let id = ContainerId(id.rsplit('/').next().unwrap().to_owned());
            let words: Vec<_> = command.split(' ').map(str::to_owned).collect();
            runtime.exec_sync(&id, &words, None).await.unwrap()
        }
    };
    exec(&agent, "rm /data/ready").await;
    let took = agent.until("unready", "web-node-1", |s| !condition(s, "Ready")).await;
    println!("unready was seen after {took:?}");
    exec(&agent, "touch /data/ready").await;
    agent.until("ready again", "web-node-1", |s| condition(s, "Ready")).await;

    // a warm pod
    let begun = Instant::now();
    node.manifest("crash.yaml", CRASH);
    let started = |status: &PodStatus| {
        container(status, "main").is_some_and(|status| status.container_id.is_some())
    };
    agent.until("started", "crash-node-1", started).await;
    println!("from the file to the first start: {:?}", begun.elapsed());
    let loops = |status: &PodStatus| waits_for(status, "main") == Some("CrashLoopBackOff");
    agent.until("in a crash loop", "crash-node-1", loops).await;
    let status = agent.status("crash-node-1");
    let last = container(&status, "main").unwrap().last_state.clone().unwrap().terminated.unwrap();
    assert_eq!((last.exit_code, last.message.as_deref()), (3, Some("last words\n")));

    node.manifest("job.yaml", JOB);
    node.manifest("missing.yaml", MISSING);
    agent.until("done", "job-node-1", |s| s.phase.as_deref() == Some("Succeeded")).await;
    let absent = |status: &PodStatus| waits_for(status, "main") == Some("ErrImageNeverPull");
    agent.until("refused", "missing-node-1", absent).await;

    // the agent goes and comes: nothing restarts
    let before = agent.pid("web-node-1", "main").unwrap();
    drop(agent.end().await);
    let agent = node.agent().await;
    agent.until("ready", "web-node-1", |status| condition(status, "Ready")).await;
    assert_eq!(agent.pid("web-node-1", "main"), Some(before));
    assert_eq!(container(&agent.status("web-node-1"), "main").unwrap().restart_count, 0);
    assert!(Path::new(&format!("/proc/{before}")).exists());

    // down: each file removed ends its pod, and nothing of it stays
    for name in ["web", "crash", "job", "missing"] {
        fs::remove_file(node.path("manifests").join(format!("{name}.yaml"))).unwrap();
    }
    let begun = Instant::now();
    for name in ["web", "crash", "job", "missing"] {
        agent.gone(&format!("{name}-node-1")).await;
    }
    println!("all pods were gone after {:?}", begun.elapsed());
    for folder in ["logs/pods", "logs/containers", "kubelet/pods"] {
        let left: Vec<_> = fs::read_dir(node.path(folder)).unwrap().flatten().collect();
        assert!(left.is_empty(), "{folder}: {left:?}");
    }
    let runtime = agent.end().await;
    runtime.teardown_all().await.unwrap();
    for entry in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        assert!(!entry.path().join(&node.cgroup).exists(), "{}", entry.path().display());
    }
}
