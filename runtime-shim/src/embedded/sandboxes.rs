//! Making, stopping and removing sandboxes, and watching their shims.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use jiff::Timestamp;
use nix::mount::{MsFlags, mount};
use tokio::sync::watch;

use super::{
    EmbeddedRuntime, Inner, Sandbox, blocking,
    disk::{self, Phase, SandboxRecord, failed},
    first_address, lock, rootfs,
    shim::{
        self,
        protocol::{Answer, Message, Op},
    },
};
use crate::runtime::*;

/// The size of a pod's `/dev/shm`, as container runtimes have it.
const SHM_OPTIONS: &str = "mode=1777,size=65536k";
/// How long a shim whose pod was stopped may take to be gone.
const SHIM_END: Duration = Duration::from_secs(5);

impl EmbeddedRuntime {
    pub(super) async fn make_sandbox(&self, config: &SandboxConfig) -> Result<SandboxId> {
        let inner = &self.inner;
        validate(config)?;
        let id = SandboxId(disk::new_id());
        let record = SandboxRecord {
            id: id.clone(),
            config: config.clone(),
            created_at: Timestamp::now(),
            boot: inner.boot.clone(),
            ips: Vec::new(),
            phase: Phase::Making,
            pod_init: None,
            shim_pid: None,
        };
        match self.assemble_sandbox(record.clone()).await {
            Ok(record) => {
                let sandbox = Arc::new(Sandbox {
                    record: Mutex::new(record),
                    alive: watch::Sender::new(true),
                    changing: tokio::sync::Mutex::default(),
                });
                lock(&inner.sandboxes).insert(id.clone(), Arc::clone(&sandbox));
                self.watch_shim(&sandbox);
                inner.announce(RuntimeEventKind::SandboxChanged, &sandbox, None);
                Ok(id)
            }
            Err(error) => {
                if let Err(left) = self.take_sandbox_apart(&record).await {
                    tracing::warn!(sandbox = %id, error = %left, "could not undo a sandbox that failed");
                }
                Err(error)
            }
        }
    }

    /// The steps of making a sandbox. Each can be found and undone by who comes after: the record is
    /// there before the first, and says "ready" only after the last.
    async fn assemble_sandbox(&self, mut record: SandboxRecord) -> Result<SandboxRecord> {
        let inner = Arc::clone(&self.inner);
        let started = record.clone();
        let (cgroup_procs, sysctls, net_sysctls) =
            blocking(move || inner.lay_out(&started)).await?;

        let inner = &self.inner;
        let attached = async {
            if record.config.namespaces.host_network {
                return Ok(Vec::new());
            }
            let netns = inner.disk.netns(&record.id);
            inner
                .network
                .attach(&record.id, &netns, &record.config.port_mappings, net_sysctls)
                .await
        };
        let namespaces = &record.config.namespaces;
        let config = shim::ShimConfig {
            socket: inner.disk.socket(&record.id),
            cgroup_procs,
            new_ipc: !namespaces.host_ipc,
            hostname: (!namespaces.host_network).then(|| record.config.hostname.clone()),
            shared_pid: namespaces.share_process_namespace && !namespaces.host_pid,
            sysctls,
        };
        // The two that take time know nothing of each other.
        let (ips, spawned) = tokio::join!(attached, shim::spawn(&inner.shim_program, &config));
        record.ips = ips?;
        spawned?;
        if let (Answer::Hello { pid, init, .. }, _) = shim::call(&config.socket, Op::Hello).await? {
            record.shim_pid = Some(pid);
            record.pod_init = init;
        }
        record.phase = Phase::Ready;
        let inner = Arc::clone(&self.inner);
        let written = record.clone();
        blocking(move || inner.disk.write_sandbox(&written)).await?;
        tracing::debug!(sandbox = %record.id, address = first_address(&record.ips), "sandbox made");
        Ok(record)
    }

    pub(super) async fn stop_sandbox(&self, sandbox: &Arc<Sandbox>) -> Result<()> {
        let _changing = sandbox.changing.lock().await;
        let mut record = sandbox.record();
        if record.phase == Phase::Stopped {
            return Ok(());
        }
        for container in self.inner.containers_of(&record.id) {
            self.end_container(&container, Duration::ZERO).await?;
        }
        self.dissolve(&record).await?;
        record.phase = Phase::Stopped;
        let inner = Arc::clone(&self.inner);
        let written = record.clone();
        blocking(move || inner.disk.write_sandbox(&written)).await?;
        *lock(&sandbox.record) = record;
        sandbox.alive.send_replace(false);
        self.inner.announce(RuntimeEventKind::SandboxChanged, sandbox, None);
        Ok(())
    }

    pub(super) async fn remove_sandbox(&self, sandbox: &Arc<Sandbox>) -> Result<()> {
        self.stop_sandbox(sandbox).await?;
        let _changing = sandbox.changing.lock().await;
        let record = sandbox.record();
        for container in self.inner.containers_of(&record.id) {
            self.discard_container(&container).await?;
        }
        self.take_sandbox_apart(&record).await?;
        lock(&self.inner.sandboxes).remove(&record.id);
        self.inner.announce(RuntimeEventKind::SandboxChanged, sandbox, None);
        Ok(())
    }

    /// Ends what runs for a sandbox and gives its network and cgroup back. Its files stay.
    pub(super) async fn dissolve(&self, record: &SandboxRecord) -> Result<()> {
        let inner = &self.inner;
        let socket = inner.disk.socket(&record.id);
        if socket.exists() {
            // A shim that is gone already has nothing more to say.
            let _ = shim::call(&socket, Op::Shutdown).await;
            let gone = async {
                while tokio::net::UnixStream::connect(&socket).await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            };
            if tokio::time::timeout(SHIM_END, gone).await.is_err() {
                inner.kill_shim(record)?;
            }
            let _ = tokio::fs::remove_file(&socket).await;
        }
        if !record.config.namespaces.host_network {
            inner.network.detach(&record.id, &inner.disk.netns(&record.id)).await?;
        }
        let (inner, record) = (Arc::clone(inner), record.clone());
        blocking(move || {
            let path = inner.pod_cgroup(&record)?;
            // Another sandbox of the same pod may be in it: the pod's own folder goes with the last.
            if !inner.shares_cgroup(&record) {
                inner.cgroups.remove(&path).map_err(|source| RuntimeError::Io {
                    what: "removing a cgroup".into(),
                    source,
                })?;
            }
            rootfs::unmount(&inner.disk.sandbox(&record.id).join("shm"))?;
            Ok(())
        })
        .await
    }

    /// Removes all that is left of a sandbox, however far it came.
    pub(super) async fn take_sandbox_apart(&self, record: &SandboxRecord) -> Result<()> {
        if record.phase != Phase::Stopped {
            self.dissolve(record).await?;
        }
        let (inner, id) = (Arc::clone(&self.inner), record.id.clone());
        blocking(move || {
            let dir = inner.disk.sandbox(&id);
            rootfs::unmount(&dir.join("shm"))?;
            inner.disk.discard(&dir)
        })
        .await
    }

    /// Listens to a shim until it is gone.
    pub(super) fn watch_shim(&self, sandbox: &Arc<Sandbox>) {
        let inner = Arc::downgrade(&self.inner);
        let socket = self.inner.disk.socket(&lock(&sandbox.record).id);
        let sandbox = Arc::downgrade(sandbox);
        tokio::spawn(async move {
            let result = listen(&socket, |message| {
                if let Some(inner) = inner.upgrade() {
                    inner.heard(message);
                }
            })
            .await;
            let (Some(inner), Some(sandbox)) = (inner.upgrade(), sandbox.upgrade()) else { return };
            let error = result.err();
            if lock(&sandbox.record).phase == Phase::Ready {
                let id = lock(&sandbox.record).id.clone();
                // Whoever stops the pod holds this, and has told the shim to end.
                if sandbox.changing.try_lock().is_ok() {
                    tracing::warn!(sandbox = %id, ?error, "the shim of a pod is gone");
                }
                sandbox.alive.send_replace(false);
                inner.announce(RuntimeEventKind::SandboxChanged, &sandbox, None);
            }
        });
    }
}

/// Passes on what a shim tells, beginning with what it knows already.
async fn listen(socket: &Path, mut heard: impl FnMut(Message)) -> Result<()> {
    let mut connection = shim::Connection::open(socket).await?;
    connection.call(Op::Subscribe).await?;
    // Asked for after the subscription, so that no end falls between the two.
    if let (Answer::List(states), _) = connection.call(Op::List).await? {
        states.into_iter().for_each(|state| heard(Message::Exited(state)));
    }
    loop {
        heard(connection.next_message().await?);
    }
}

type Layout = (Vec<std::path::PathBuf>, BTreeMap<String, String>, BTreeMap<String, String>);

impl Inner {
    /// Makes the files, cgroups and mounts of a sandbox.
    fn lay_out(&self, record: &SandboxRecord) -> Result<Layout> {
        let config = &record.config;
        let dir = self.disk.sandbox(&record.id);
        fs::create_dir_all(&dir).map_err(failed("making", &dir))?;
        self.disk.write_sandbox(record)?;
        let shm = dir.join("shm");
        if !config.namespaces.host_ipc {
            fs::create_dir_all(&shm).map_err(failed("making", &shm))?;
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            mount(Some("shm"), &shm, Some("tmpfs"), flags, Some(SHM_OPTIONS))
                .map_err(|e| failed("mounting", &shm)(e.into()))?;
        }
        let resolv_conf = dir.join("resolv.conf");
        let text = match &config.dns {
            Some(dns) => render_dns(dns),
            None => fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
        };
        fs::write(&resolv_conf, text).map_err(failed("writing", &resolv_conf))?;
        let name = if config.hostname.is_empty() { &self.host.hostname } else { &config.hostname };
        let hostname = dir.join("hostname");
        fs::write(&hostname, format!("{name}\n")).map_err(failed("writing", &hostname))?;
        if !config.log_directory.as_os_str().is_empty() {
            fs::create_dir_all(&config.log_directory)
                .map_err(failed("making", &config.log_directory))?;
        }

        let io = |source| RuntimeError::Io { what: "setting up the pod's cgroup".into(), source };
        let path = self.pod_cgroup(record)?;
        self.cgroups.create_pod(&path).map_err(io)?;
        self.cgroups.set_limits(&path, &config.resources).map_err(io)?;
        let entrances = self.cgroups.shim_entrances().map_err(io)?;
        let (net, other) = config
            .sysctls
            .iter()
            .map(|(name, value)| (name.replace('.', "/"), value.clone()))
            .partition(|(path, _)| path.starts_with("net/"));
        Ok((entrances, other, net))
    }

    /// Kills a shim that does not end by itself.
    fn kill_shim(&self, record: &SandboxRecord) -> Result<()> {
        let Some(pid) = record.shim_pid.filter(|pid| *pid > 1) else { return Ok(()) };
        // The number may be somebody else's by now.
        let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        if program.starts_with(self.disk.root.join("bin")) {
            tracing::warn!(sandbox = %record.id, pid, "killing a shim that does not end");
            let pid = nix::unistd::Pid::from_raw(pid);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).map_err(|e| {
                RuntimeError::Io { what: format!("killing the shim {pid}"), source: e.into() }
            })?;
        }
        Ok(())
    }

    pub(super) fn pod_cgroup(&self, record: &SandboxRecord) -> Result<std::path::PathBuf> {
        self.cgroups
            .pod(&record.config.cgroup_parent)
            .map_err(|e| RuntimeError::Invalid(format!("the pod's cgroup: {e}")))
    }

    fn shares_cgroup(&self, record: &SandboxRecord) -> bool {
        lock(&self.sandboxes).values().any(|other| {
            let other = lock(&other.record);
            other.id != record.id
                && other.phase != Phase::Stopped
                && other.config.cgroup_parent == record.config.cgroup_parent
        })
    }

    /// Takes in what a shim said.
    fn heard(&self, message: Message) {
        let Message::Exited(state) = message else { return };
        let id = ContainerId(state.container.clone());
        let Ok(container) = self.container(&id) else { return };
        let ended = state.finished != 0;
        let news = container.process.send_if_modified(|known| {
            let news = known.finished == 0 && *known != state;
            if news {
                *known = state;
            }
            news && ended
        });
        if news {
            let sandbox = lock(&container.record).sandbox.clone();
            if let Ok(sandbox) = self.sandbox(&sandbox) {
                self.announce(RuntimeEventKind::ContainerExited, &sandbox, Some(id));
            }
        }
    }
}

fn validate(config: &SandboxConfig) -> Result<()> {
    let refuse = |what: String| Err(RuntimeError::Invalid(what));
    if config.cgroup_parent.is_empty() {
        return refuse(format!("pod {}/{}: no cgroup is named", config.namespace, config.name));
    }
    if config.hostname.len() > 64 || config.hostname.contains(['\0', '\n', '/']) {
        return refuse(format!("host name {:?}: not one that a machine can have", config.hostname));
    }
    for (name, value) in &config.sysctls {
        let name = name.replace('/', ".");
        let ipc = name.starts_with("kernel.shm")
            || name.starts_with("kernel.msg")
            || name == "kernel.sem"
            || name.starts_with("fs.mqueue.");
        let net = name.starts_with("net.");
        let own = (ipc && !config.namespaces.host_ipc) || (net && !config.namespaces.host_network);
        if !own || name.split('.').any(|part| part.is_empty()) || value.contains('\0') {
            return refuse(format!(
                "sysctl {name}: it does not belong to a namespace of the pod's own"
            ));
        }
    }
    let bad = |line: &String| line.contains(['\n', '\0']);
    if config
        .dns
        .iter()
        .any(|d| [&d.servers, &d.searches, &d.options].into_iter().flatten().any(bad))
    {
        return refuse("the pod's DNS configuration has a line break in it".to_owned());
    }
    Ok(())
}

fn render_dns(dns: &DnsConfig) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_has_the_documented_lines() {
        let own = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        let dns = DnsConfig {
            servers: own(&["10.96.0.10", "1.1.1.1"]),
            searches: own(&["default.svc.cluster.local", "svc.cluster.local"]),
            options: own(&["ndots:5"]),
        };
        assert_eq!(
            render_dns(&dns),
            "search default.svc.cluster.local svc.cluster.local\nnameserver 10.96.0.10\n\
             nameserver 1.1.1.1\noptions ndots:5\n"
        );
        assert_eq!(render_dns(&DnsConfig::default()), "");
    }

    #[test]
    fn a_sysctl_of_the_host_is_refused() {
        let mut config = SandboxConfig { cgroup_parent: "a".into(), ..SandboxConfig::default() };
        for (name, fine) in [
            ("net.ipv4.ip_unprivileged_port_start", true),
            ("kernel.shmmax", true),
            ("kernel.panic", false),
            ("net..x", false),
        ] {
            config.sysctls = BTreeMap::from([(name.to_owned(), "1".to_owned())]);
            assert_eq!(validate(&config).is_ok(), fine, "{name}");
        }
        config.namespaces.host_ipc = true;
        config.sysctls = BTreeMap::from([("kernel.shmmax".to_owned(), "1".to_owned())]);
        assert!(validate(&config).is_err());
    }
}
