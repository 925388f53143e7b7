//! Making, starting, stopping and removing containers.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use jiff::Timestamp;
use tokio::sync::watch;

use super::{
    Container, EmbeddedRuntime, Inner, Sandbox, blocking,
    devices::{all_devices, check_propagation, look_up},
    disk::{self, ContainerRecord, SandboxRecord, failed},
    lock, rootfs,
    shim::{
        self,
        protocol::{self, Answer, Op},
    },
    text,
};
use crate::{cgroup::Cgroups, runtime::*, spec};

/// How long a killed process may take to be gone. The kernel may be writing its memory back.
const KILL_DEADLINE: Duration = Duration::from_secs(60);
/// The exit code of a container whose process could not be made, as container runtimes have it.
const START_FAILED: i32 = 128;
/// A longer seccomp profile is not read.
const MAX_PROFILE: u64 = 8 << 20;

impl EmbeddedRuntime {
    pub(super) async fn make_container(
        &self,
        sandbox: &Sandbox,
        config: &ContainerConfig,
    ) -> Result<ContainerId> {
        let _changing = sandbox.changing.lock().await;
        if !sandbox.is_ready() {
            return Err(RuntimeError::Container(format!(
                "sandbox {}: it does not run, so it can't hold container {}",
                lock(&sandbox.record).id,
                config.name
            )));
        }
        let images = &self.inner.images;
        let image = images
            .find(&config.image)
            .await?
            .ok_or_else(|| RuntimeError::NotFound(format!("image {}", config.image)))?;
        let (image_config, layers) =
            (images.config(&image.id).await?, images.layers(&image.id).await?);
        let pod = sandbox.record();
        let id = ContainerId(disk::new_id());
        let cgroup = self.inner.pod_cgroup(&pod)?.join(id.as_str());
        let record = ContainerRecord {
            id: id.clone(),
            sandbox: pod.id.clone(),
            config: config.clone(),
            created_at: Timestamp::now(),
            image_ref: image.repo_digests.first().cloned().unwrap_or_else(|| image.id.0.clone()),
            image_id: image.id,
            user: LinuxUser::default(),
            stop_signal: spec::stop_signal(config, &image_config)?,
            log_path: pod.config.log_directory.join(&config.log_path),
            cgroup,
        };
        let inner = Arc::clone(&self.inner);
        let made = blocking(move || {
            let id = record.id.clone();
            inner.assemble_container(&pod, record, &image_config, &layers).inspect_err(|_| {
                if let Err(left) = inner.take_container_apart(&id, None) {
                    tracing::warn!(container = %id, error = %left, "could not undo a container that failed");
                }
            })
        })
        .await?;
        let state = protocol::State { container: id.0.clone(), ..protocol::State::default() };
        let container = Arc::new(Container {
            record: Mutex::new(made),
            process: watch::Sender::new(state),
            changing: tokio::sync::Mutex::default(),
        });
        lock(&self.inner.containers).insert(id.clone(), container);
        Ok(id)
    }

    pub(super) async fn let_container_go(&self, container: &Arc<Container>) -> Result<()> {
        let _changing = container.changing.lock().await;
        let known = container.process.borrow().clone();
        if known.finished != 0 {
            return Err(RuntimeError::Container(format!(
                "container {}: it ended, and is not started a second time",
                known.container
            )));
        }
        if known.started != 0 {
            return Ok(());
        }
        let record = lock(&container.record).clone();
        let sandbox = self.inner.sandbox(&record.sandbox)?;
        let start = self.inner.start_order(&record);
        let socket = self.inner.disk.socket(&record.sandbox);
        match shim::call(&socket, Op::Start(Box::new(start))).await {
            Ok((Answer::Started { state, warnings }, _)) => {
                for warning in warnings {
                    tracing::warn!(container = %record.config.name, pod = %record.sandbox, "{warning}");
                }
                container.process.send_if_modified(|known| {
                    // The shim may have told of its end before this answer was read.
                    let first = known.started == 0;
                    if first {
                        *known = state;
                    }
                    first
                });
                self.inner.announce(
                    RuntimeEventKind::ContainerStarted,
                    &sandbox,
                    Some(record.id.clone()),
                );
                Ok(())
            }
            Ok(_) => {
                Err(RuntimeError::Internal("a shim gave the answer to another question".into()))
            }
            Err(error) => {
                // What was half-made, or is made after all because only the answer was late.
                self.clear_cgroup(&record).await?;
                let state = protocol::State {
                    container: record.id.0.clone(),
                    finished: now(),
                    code: START_FAILED,
                    error: error.to_string(),
                    ..protocol::State::default()
                };
                let (inner, id, written) =
                    (Arc::clone(&self.inner), record.id.clone(), state.clone());
                blocking(move || inner.write_state(&id, &written)).await?;
                container.process.send_replace(state);
                self.inner.announce(
                    RuntimeEventKind::ContainerExited,
                    &sandbox,
                    Some(record.id.clone()),
                );
                Err(RuntimeError::Container(error.to_string()))
            }
        }
    }

    /// Ends a container's process: by its stop signal, and by force after `grace`.
    pub(super) async fn end_container(
        &self,
        container: &Arc<Container>,
        grace: Duration,
    ) -> Result<()> {
        let record = lock(&container.record).clone();
        let socket = self.inner.disk.socket(&record.sandbox);
        let mut process = container.process.subscribe();
        let runs = {
            let state = process.borrow();
            state.started != 0 && state.finished == 0
        };
        let answers = self.inner.sandbox(&record.sandbox).is_ok_and(|s| *s.alive.borrow());
        if runs && answers && !grace.is_zero() {
            let op = Op::Signal { container: record.id.0.clone(), signal: record.stop_signal };
            shim::call(&socket, op).await?;
            let ended = process.wait_for(|s| s.finished != 0);
            if tokio::time::timeout(grace, ended).await.is_ok_and(|r| r.is_ok()) {
                return self.clear_cgroup(&record).await;
            }
        }
        // By cgroup and not by process: with the host's process namespace there may be more of them.
        self.clear_cgroup(&record).await?;
        if runs && !answers {
            // Its shim was killed: nobody saw how it ended, but that it did is sure now.
            let mut state = container.process.borrow().clone();
            state.finished = now();
            state.code = 128 + libc::SIGKILL;
            let (inner, id, written) = (Arc::clone(&self.inner), record.id.clone(), state.clone());
            blocking(move || inner.write_state(&id, &written)).await?;
            container.process.send_replace(state);
            return Ok(());
        }
        if runs {
            let ended = process.wait_for(|s| s.finished != 0);
            if tokio::time::timeout(KILL_DEADLINE, ended).await.is_err() {
                return Err(RuntimeError::Timeout {
                    what: format!("killing container {}", record.id),
                    after: KILL_DEADLINE,
                });
            }
        }
        Ok(())
    }

    async fn clear_cgroup(&self, record: &ContainerRecord) -> Result<()> {
        let (inner, path) = (Arc::clone(&self.inner), record.cgroup.clone());
        blocking(move || {
            inner
                .cgroups
                .kill(&path)
                .map(|_| ())
                .map_err(|source| RuntimeError::Io { what: "killing a container".into(), source })
        })
        .await
    }

    pub(super) async fn discard_container(&self, container: &Arc<Container>) -> Result<()> {
        self.end_container(container, Duration::ZERO).await?;
        let _changing = container.changing.lock().await;
        let record = lock(&container.record).clone();
        let socket = self.inner.disk.socket(&record.sandbox);
        if socket.exists() {
            // A shim that is gone has forgotten it anyway.
            let _ = shim::call(&socket, Op::Forget { container: record.id.0.clone() }).await;
        }
        let (inner, id, cgroup) = (Arc::clone(&self.inner), record.id.clone(), record.cgroup);
        blocking(move || inner.take_container_apart(&id, Some(&cgroup))).await?;
        lock(&self.inner.containers).remove(&record.id);
        if let Ok(sandbox) = self.inner.sandbox(&record.sandbox) {
            self.inner.announce(RuntimeEventKind::ContainerRemoved, &sandbox, Some(record.id));
        }
        Ok(())
    }

    pub(super) async fn limit_container(
        &self,
        container: &Arc<Container>,
        resources: &LinuxResources,
    ) -> Result<()> {
        let _changing = container.changing.lock().await;
        let mut record = lock(&container.record).clone();
        let running = container.process.borrow().finished == 0;
        merge(&mut record.config.resources, resources);
        let (inner, written, resources) =
            (Arc::clone(&self.inner), record.clone(), resources.clone());
        blocking(move || {
            // Says no to what this host does not have.
            spec::resources_for_libcontainer(&resources, &inner.host)?;
            if running {
                inner.cgroups.set_limits(&written.cgroup, &resources).map_err(|source| {
                    RuntimeError::Io { what: format!("limits of container {}", written.id), source }
                })?;
            }
            inner.disk.write_container(&written)
        })
        .await?;
        *lock(&container.record) = record;
        Ok(())
    }
}

impl Inner {
    /// Makes a container's files, mounts, cgroup and spec. Blocks.
    fn assemble_container(
        &self,
        pod: &SandboxRecord,
        mut record: ContainerRecord,
        image: &oci_spec::image::ImageConfiguration,
        layers: &[PathBuf],
    ) -> Result<ContainerRecord> {
        let id = record.id.clone();
        let dir = self.disk.container(&id);
        fs::create_dir_all(&dir).map_err(failed("making", &dir))?;
        self.disk.reserve_state(&id)?;
        rootfs::mount_overlay(layers, &dir)?;
        let root = self.disk.rootfs(&id);

        let config = &record.config;
        let accounts = spec::Accounts {
            passwd: rootfs::read_inside(&root, "/etc/passwd")?,
            group: rootfs::read_inside(&root, "/etc/group")?,
        };
        let image_user = image.config().as_ref().and_then(|c| c.user().clone()).unwrap_or_default();
        let user = spec::resolve_user(&config.security, &image_user, &accounts)?;
        let devices = if config.security.privileged {
            all_devices(Path::new("/dev"))
        } else {
            config.devices.iter().map(look_up).collect::<Result<_>>()?
        };
        let localhost_seccomp = match &config.security.seccomp {
            SeccompProfile::Localhost(path) => Some(read_profile(path)?),
            _ => None,
        };
        check_propagation(&config.mounts)?;

        self.cgroups.create(&record.cgroup).map_err(|source| RuntimeError::Io {
            what: "making the container's cgroup".into(),
            source,
        })?;
        let sandbox = self.disk.sandbox(&pod.id);
        let places = spec::Places {
            rootfs: root.clone(),
            shm: sandbox.join("shm"),
            resolv_conf: sandbox.join("resolv.conf"),
            hostname: sandbox.join("hostname"),
            cgroup: Cgroups::absolute(&record.cgroup),
            cgroup_v1: self.cgroups.v1_folders(&record.cgroup),
            netns: self.network_namespace(pod),
            shim_pid: pod.shim_pid.unwrap_or(0),
            pod_init: pod.pod_init,
        };
        let spec = spec::build(&spec::Inputs {
            sandbox: &pod.config,
            container: config,
            image,
            host: &self.host,
            places: &places,
            user: &user,
            devices: &devices,
            localhost_seccomp,
        })?;
        if let Some(process) = spec.process() {
            rootfs::make_dir_inside(&root, process.cwd())?;
        }
        let bundle = dir.join("config.json");
        let json = serde_json::to_vec(&spec)
            .map_err(|e| RuntimeError::Internal(format!("{}: {e}", bundle.display())))?;
        // Not atomically: nobody looks for it before the record is there.
        fs::write(&bundle, json).map_err(failed("writing", &bundle))?;
        fs::set_permissions(&bundle, fs::Permissions::from_mode(0o600))
            .map_err(failed("writing", &bundle))?;
        if let Some(parent) = record.log_path.parent().filter(|p| !p.as_os_str().is_empty()) {
            fs::create_dir_all(parent).map_err(failed("making", parent))?;
        }
        record.user = user;
        self.disk.write_container(&record)?;
        Ok(record)
    }

    /// Removes all that is left of a container, however far it came. Blocks.
    pub(super) fn take_container_apart(
        &self,
        id: &ContainerId,
        cgroup: Option<&Path>,
    ) -> Result<()> {
        if let Some(cgroup) = cgroup {
            self.cgroups
                .remove(cgroup)
                .map_err(|source| RuntimeError::Io { what: "removing a cgroup".into(), source })?;
        }
        let state = self.disk.libcontainer().join(id.as_str());
        match fs::remove_dir_all(&state) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(failed("removing", &state)(e));
            }
            _ => {}
        }
        rootfs::unmount(&self.disk.rootfs(id))?;
        self.disk.discard(&self.disk.container(id))
    }

    fn start_order(&self, record: &ContainerRecord) -> protocol::Start {
        let score = record.config.resources.oom_score_adj.map_or("-".to_owned(), |n| n.to_string());
        let mut helper = self.helper.clone();
        helper.extend([
            "create".to_owned(),
            text(&self.disk.libcontainer()),
            text(&self.disk.container(&record.id)),
            record.id.0.clone(),
            score,
        ]);
        protocol::Start {
            container: record.id.0.clone(),
            helper,
            notify_dir: text(&self.disk.libcontainer().join(record.id.as_str())),
            log_path: if record.config.log_path.as_os_str().is_empty() {
                String::new()
            } else {
                text(&record.log_path)
            },
            state_path: text(&self.disk.state(&record.id)),
            stdin: record.config.stdin,
            stdin_once: record.config.stdin_once,
            tty: record.config.tty,
            oom_path: self.cgroups.oom_file(&record.cgroup).map(|p| text(&p)).unwrap_or_default(),
        }
    }

    /// Notes how a process ended that its shim can't tell of, so that it is found again.
    fn write_state(&self, id: &ContainerId, state: &protocol::State) -> Result<()> {
        let text = serde_json::to_vec(state)
            .map_err(|e| RuntimeError::Internal(format!("state of {id}: {e}")))?;
        disk::write_atomically(&self.disk.state(id), &text)
    }
}

fn now() -> i64 {
    i64::try_from(Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX)
}

/// Takes over what is given, and keeps the rest.
fn merge(old: &mut LinuxResources, new: &LinuxResources) {
    let LinuxResources {
        cpu_period,
        cpu_quota,
        cpu_shares,
        memory_limit,
        pids_limit,
        oom_score_adj,
        cpuset_cpus,
        cpuset_mems,
        unified,
    } = new.clone();
    old.cpu_period = cpu_period.or(old.cpu_period);
    old.cpu_quota = cpu_quota.or(old.cpu_quota);
    old.cpu_shares = cpu_shares.or(old.cpu_shares);
    old.memory_limit = memory_limit.or(old.memory_limit);
    old.pids_limit = pids_limit.or(old.pids_limit);
    old.oom_score_adj = oom_score_adj.or(old.oom_score_adj);
    old.cpuset_cpus = cpuset_cpus.or(old.cpuset_cpus.take());
    old.cpuset_mems = cpuset_mems.or(old.cpuset_mems.take());
    old.unified.extend(unified);
}

fn read_profile(path: &Path) -> Result<Vec<u8>> {
    let size = fs::metadata(path).map_err(failed("reading the seccomp profile", path))?.len();
    if size > MAX_PROFILE {
        return Err(RuntimeError::Invalid(format!(
            "seccomp profile {}: {size} bytes are too many",
            path.display()
        )));
    }
    fs::read(path).map_err(failed("reading the seccomp profile", path))
}
