//! One node's runtime in namespaces of its own, with an image made of busybox.

use std::{
    collections::BTreeMap,
    future::Future,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use keelson_runtime_shim::{
    EmbeddedConfig, EmbeddedRuntime, PodRuntime,
    images::{FileInImage, ImageOptions, ImageStore},
    network::NetworkConfig,
    runtime::*,
};

const INSIDE: &str = "KEELSON_TEST_INSIDE";
const ROOT: &str = "KEELSON_TEST_ROOT";
const APPLETS: &str = "cat df grep head hostname id ip ls mknod mount nc ps readlink sleep stty touch tty \
                       true umount unshare wc wget";
const DEADLINE: Duration = Duration::from_secs(20);

/// Runs a test's body in a process of its own in new network and mount namespaces.
pub(crate) fn in_namespaces(name: &str, body: impl Future<Output = ()>) {
    if std::env::var_os(INSIDE).is_none() {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", name, "--nocapture", "--test-threads=1"]).env(INSIDE, "1");
        // SAFETY: unshare and mount are plain system calls, safe between fork and exec.
        unsafe {
            command.pre_exec(|| {
                let flags = libc::CLONE_NEWNET | libc::CLONE_NEWNS;
                let none = std::ptr::null::<libc::c_char>();
                let private = libc::MS_REC | libc::MS_PRIVATE;
                if libc::unshare(flags) != 0
                    || libc::mount(none, c"/".as_ptr(), none, private, none.cast()) != 0
                {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let root = tempfile::Builder::new().prefix("krt").tempdir().unwrap();
        command.env(ROOT, root.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        let cgroup = cgroup_of(child.id());
        let output = child.wait_with_output().unwrap();
        sweep(&cgroup);
        let text = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(output.status.success(), "{text}");
        println!("{text}");
        return;
    }
    for line in [
        "link set lo up",
        "link add outside type veth peer name wire",
        "addr add 192.0.2.1/24 dev outside",
        "link set outside up",
        "link set wire up",
    ] {
        assert!(Command::new("ip").args(line.split(' ')).status().unwrap().success(), "{line}");
    }
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(body);
}

fn cgroup_of(pid: u32) -> String {
    format!("keelson-test-{pid}")
}

/// Where a cgroup may be: in each tree of version 1, and in the only one of version 2.
fn cgroup_folders(cgroup: &str) -> Vec<PathBuf> {
    let top = Path::new("/sys/fs/cgroup");
    let trees = std::fs::read_dir(top).unwrap().flatten().map(|tree| tree.path());
    std::iter::once(top.to_owned()).chain(trees).map(|tree| tree.join(cgroup)).collect()
}

/// What a file of a process's cgroup says, of version 1 (in its controller's tree) or 2.
pub(crate) fn in_cgroup(pid: i32, controller: &str, v1: &str, v2: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let top = Path::new("/sys/fs/cgroup");
    let below = |path: &str| path.trim_start_matches('/').to_owned();
    let file = if top.join("cgroup.controllers").exists() {
        let path = text.lines().find_map(|line| line.strip_prefix("0::")).unwrap();
        top.join(below(path)).join(v2)
    } else {
        let mut trees = text.lines().filter_map(|line| {
            let (tree, path) = line.split_once(':')?.1.split_once(':')?;
            Some((tree.to_owned(), path.to_owned()))
        });
        let (tree, path) =
            trees.find(|(tree, _)| tree.split(',').any(|name| name == controller)).unwrap();
        top.join(tree).join(below(&path)).join(v1)
    };
    std::fs::read_to_string(&file)
        .unwrap_or_else(|e| panic!("{}: {e}", file.display()))
        .trim()
        .into()
}

/// Kills and removes what a test that failed left in its cgroups.
fn sweep(cgroup: &str) {
    for top in cgroup_folders(cgroup) {
        let mut dirs = vec![top];
        let mut at = 0;
        while at < dirs.len() {
            let below = std::fs::read_dir(&dirs[at]).into_iter().flatten().flatten();
            let below: Vec<_> =
                below.filter(|e| e.path().is_dir()).map(|entry| entry.path()).collect();
            dirs.extend(below);
            at += 1;
        }
        for dir in dirs.iter().rev().filter(|d| d.exists()) {
            let begun = Instant::now();
            while std::fs::remove_dir(dir).is_err() && begun.elapsed() < DEADLINE {
                let pids = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
                let _ = Command::new("kill").arg("-9").args(pids.lines()).output();
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

/// Waits for something to become true.
pub(crate) async fn until<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let begun = Instant::now();
    while !condition().await {
        assert!(begun.elapsed() < DEADLINE, "not so in time: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub(crate) struct Node {
    pub(crate) runtime: EmbeddedRuntime,
    root: PathBuf,
    cgroup: String,
}

impl Node {
    pub(crate) async fn start() -> Node {
        let root = PathBuf::from(std::env::var_os(ROOT).unwrap());
        let cgroup = cgroup_of(std::process::id());
        let runtime = open(&root, &cgroup).await;
        runtime.set_pod_ranges(&["10.123.4.0/24".parse().unwrap()]).await.unwrap();
        let images = images(&root);
        let file = |source: &Path, path: &str| FileInImage {
            source: source.to_owned(),
            path: path.into(),
            mode: 0o755,
        };
        let busybox = Path::new("/bin/busybox");
        let mut files = vec![file(busybox, "/bin/busybox"), file(busybox, "/bin/sh")];
        for name in APPLETS.split(' ') {
            let script = root.join(name);
            std::fs::write(&script, format!("#!/bin/sh\nexec /bin/busybox {name} \"$@\"\n"))
                .unwrap();
            files.push(file(&script, &format!("/bin/{name}")));
        }
        let config = oci_spec::image::ConfigBuilder::default().build().unwrap();
        images.build_from_files("busybox:test", &files, &config).await.unwrap();
        Node { runtime, root, cgroup }
    }

    /// Drops the runtime, as a crash would, and opens another over the same folders when something
    /// has happened that no runtime has seen.
    pub(crate) async fn reopen(self, meanwhile: impl Future<Output = ()>) -> Node {
        let Node { runtime, root, cgroup } = self;
        drop(runtime);
        meanwhile.await;
        let runtime = open(&root, &cgroup).await;
        Node { runtime, root, cgroup }
    }

    pub(crate) fn sandbox(
        &self,
        name: &str,
        change: impl FnOnce(&mut SandboxConfig),
    ) -> SandboxConfig {
        let mut config = SandboxConfig {
            name: name.into(),
            namespace: "default".into(),
            uid: format!("uid-{name}"),
            hostname: name.into(),
            log_directory: self.root.join("log").join(name),
            cgroup_parent: format!("kubepods/pod{name}"),
            ..SandboxConfig::default()
        };
        change(&mut config);
        config
    }

    pub(crate) async fn pod(
        &self,
        name: &str,
        change: impl FnOnce(&mut SandboxConfig),
    ) -> SandboxId {
        let begun = Instant::now();
        let id = self.runtime.run_pod_sandbox(&self.sandbox(name, change)).await.unwrap();
        println!("sandbox {name} took {:?}", begun.elapsed());
        id
    }

    pub(crate) fn config(
        &self,
        name: &str,
        script: &str,
        change: impl FnOnce(&mut ContainerConfig),
    ) -> ContainerConfig {
        let mut config = ContainerConfig {
            name: name.into(),
            image: "busybox:test".into(),
            command: vec!["sh".into(), "-c".into(), script.into()],
            log_path: format!("{name}/0.log").into(),
            security: ContainerSecurity {
                seccomp: SeccompProfile::RuntimeDefault,
                ..ContainerSecurity::default()
            },
            labels: BTreeMap::from([("name".into(), name.into())]),
            ..ContainerConfig::default()
        };
        change(&mut config);
        config
    }

    pub(crate) async fn container(
        &self,
        pod: &SandboxId,
        name: &str,
        script: &str,
        change: impl FnOnce(&mut ContainerConfig),
    ) -> ContainerId {
        let begun = Instant::now();
        let config = self.config(name, script, change);
        let id = self.runtime.create_container(pod, &config).await.unwrap();
        println!("container {name} took {:?}", begun.elapsed());
        id
    }

    pub(crate) async fn started(&self, pod: &SandboxId, name: &str, script: &str) -> ContainerId {
        let id = self.container(pod, name, script, |_| {}).await;
        self.runtime.start_container(&id).await.unwrap();
        id
    }

    pub(crate) async fn exited(&self, id: &ContainerId) -> ContainerStatus {
        let begun = Instant::now();
        loop {
            let status = self.runtime.container_status(id).await.unwrap();
            if status.state == ContainerState::Exited {
                return status;
            }
            assert!(begun.elapsed() < DEADLINE, "{status:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Removes everything and looks whether anything is left.
    pub(crate) async fn end(self) {
        let shims = shims(&self.root);
        assert!(!shims.is_empty());
        let removed = self.runtime.teardown_all().await.unwrap();
        println!("{removed:?}");
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let root = self.root.to_string_lossy().into_owned();
        let left: Vec<_> = mounts.lines().filter(|l| l.contains(&root)).collect();
        assert!(left.is_empty(), "{left:?}");
        assert_eq!(shims_left(&self.root), Vec::<i32>::new());
        let links = Command::new("ip").args(["-o", "link"]).output().unwrap();
        let links = String::from_utf8_lossy(&links.stdout).into_owned();
        assert!(!links.contains(" kl"), "{links}");
        let tables = Command::new("nft").args(["list", "tables"]).output().unwrap();
        assert!(tables.stdout.is_empty(), "{}", String::from_utf8_lossy(&tables.stdout));
        for left in cgroup_folders(&self.cgroup) {
            assert!(!left.exists(), "{}", left.display());
        }
    }
}

fn images(root: &Path) -> ImageStore {
    ImageStore::open(root.join("images"), ImageOptions::default()).unwrap()
}

async fn open(root: &Path, cgroup: &str) -> EmbeddedRuntime {
    let config = EmbeddedConfig {
        root: root.join("lib"),
        run: root.join("run"),
        cgroup_root: cgroup.to_owned(),
        helper: vec![env!("CARGO_BIN_EXE_keelson-runtime-helper").to_owned()],
        network: NetworkConfig {
            pod_ranges: vec!["10.123.4.0/24".parse().unwrap()],
            ..NetworkConfig::default()
        },
    };
    EmbeddedRuntime::open(config, images(root)).await.unwrap()
}

/// The shims of a root that run.
fn shims(root: &Path) -> Vec<i32> {
    let program = root.join("lib/bin");
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter(|pid| {
            std::fs::read_link(format!("/proc/{pid}/exe"))
                .is_ok_and(|exe: PathBuf| exe.starts_with(&program))
        })
        .collect()
}

fn shims_left(root: &Path) -> Vec<i32> {
    let begun = Instant::now();
    loop {
        let left = shims(root);
        if left.is_empty() || begun.elapsed() > Duration::from_secs(5) {
            return left;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
