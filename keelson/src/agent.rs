//! The node: runtime, agent and the kubelet's API, wired together.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail};
use ipnet::IpNet;
use keelson_agent::{
    Agent, AgentConfig, AgentParts, Pulse,
    environment::{KubeEnvironment, KubeObjects},
    server::{AccessConfig, KubeletServer, ServerConfig, ServerSources},
    stats::Statistics,
    volumes::HostVolumes,
};
use keelson_api::{events::EventRecorder, quantity::Quantity};
use keelson_runtime_shim::{
    embedded::{EmbeddedConfig, EmbeddedRuntime},
    images::{ImageOptions, ImageStore},
    network::NetworkConfig,
};
use kube::Client;
use prometheus::Registry;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    cli::{AgentArgs, NodeArgs},
    config::KubeletSettings,
    credentials::Credentials,
    image,
    instance::{self, Part, Record},
    node, notify,
    paths::Paths,
    run::{self, MainTasks},
    serving,
};

/// What a node is started with.
pub(crate) struct NodeOptions {
    pub(crate) name: String,
    pub(crate) address: IpAddr,
    pub(crate) settings: KubeletSettings,
    /// Name servers of pods, where the settings name none.
    pub(crate) cluster_dns: Vec<IpAddr>,
    /// The domain of the cluster, where the settings name none.
    pub(crate) cluster_domain: String,
    /// Where pods keep their own address: the ranges of the cluster.
    pub(crate) cluster_ranges: Vec<IpNet>,
    pub(crate) images: ImageOptions,
    /// The folder of static pods.
    pub(crate) manifests: std::path::PathBuf,
    /// The kubelet API's TLS.
    pub(crate) tls: Arc<rustls::ServerConfig>,
    /// The API server.
    pub(crate) client: Option<Client>,
}

/// A running node.
pub(crate) struct Node {
    pub(crate) images: ImageStore,
    tasks: MainTasks,
    pulse: Arc<Pulse>,
    ready: watch::Receiver<bool>,
    healthz: Option<SocketAddr>,
}

/// Where a data folder's pods have their cgroups: below the root of the machine as a node has them,
/// or, for a folder of its own, below a name made of the folder's.
pub(crate) fn cgroup_root(paths: &Paths, settings: &KubeletSettings) -> String {
    use sha2::{Digest, Sha256};
    use std::os::unix::ffi::OsStrExt;
    if let Some(root) = &settings.cgroup_root {
        return root.trim_matches('/').to_owned();
    }
    let Some(dir) = &paths.data_dir else { return String::new() };
    let digest = Sha256::digest(dir.as_os_str().as_bytes());
    format!("keelson-{:02x}{:02x}{:02x}{:02x}", digest[0], digest[1], digest[2], digest[3])
}

/// The name of the packet filter table of a data folder's pods.
fn network_table(cgroup_root: &str) -> String {
    if cgroup_root.is_empty() { "keelson-pods".to_owned() } else { format!("{cgroup_root}-pods") }
}

/// What the runtime is opened with.
pub(crate) fn runtime_config(
    paths: &Paths,
    cgroup_root: &str,
    cluster_ranges: Vec<IpNet>,
) -> EmbeddedConfig {
    EmbeddedConfig {
        root: paths.runtime.clone(),
        run: paths.run.clone(),
        cgroup_root: cgroup_root.to_owned(),
        helper: Vec::new(),
        network: NetworkConfig {
            unmasqueraded: cluster_ranges,
            table: network_table(cgroup_root),
            ..NetworkConfig::default()
        },
    }
}

impl Node {
    /// Starts it. It all ends after `shutdown`, but for the pods; [`Self::stopped`] waits for that.
    ///
    /// # Errors
    /// When the runtime can't run pods here, or an address is in use.
    pub(crate) async fn start(
        paths: &Paths,
        options: NodeOptions,
        shutdown: &CancellationToken,
    ) -> anyhow::Result<Self> {
        let cgroup_root = cgroup_root(paths, &options.settings);
        std::fs::create_dir_all(&options.manifests)
            .with_context(|| format!("folder of static pods {}", options.manifests.display()))?;
        let (store, image_options) = (image::store_path(paths), options.images.clone());
        let images = tokio::task::spawn_blocking(move || ImageStore::open(store, image_options))
            .await
            .context("image store")??;
        let config = runtime_config(paths, &cgroup_root, options.cluster_ranges.clone());
        let runtime =
            EmbeddedRuntime::open(config, images.clone()).await.context("container runtime")?;
        let tasks = MainTasks::new(shutdown.clone());

        let config = agent_config(paths, &options)?;
        let allocatable = keelson_agent::allocatable(&config)?;
        let allocatable_now: keelson_agent::environment::AllocatableNow =
            Arc::new(move || allocatable.clone());
        let events = match &options.client {
            Some(client) => {
                let (events, task) = EventRecorder::spawn(
                    client.clone(),
                    "kubelet",
                    Some(&options.name),
                    shutdown.clone(),
                );
                tasks.spawn("events", async move { Ok(task.await?) });
                events
            }
            None => EventRecorder::discard(),
        };
        let objects = Arc::new(KubeObjects::new(options.client.clone(), shutdown.clone()));
        let volumes =
            HostVolumes::new(&paths.kubelet, objects.clone(), allocatable_now.clone(), shutdown)
                .with_context(|| format!("volumes in {}", paths.kubelet.display()))?;
        let (registry, probe_registry) = (Registry::new(), Registry::new());
        let port = config.node.port;
        let agent = Agent::new(AgentParts {
            config,
            client: options.client.clone(),
            runtime: Arc::new(runtime.clone()),
            volumes: Arc::new(volumes),
            environment: Arc::new(KubeEnvironment::new(objects, events.clone(), allocatable_now)),
            events,
            registry: registry.clone(),
            probe_registry: probe_registry.clone(),
            shutdown: shutdown.clone(),
        })
        .await?;
        let range = follow_pod_range(runtime.clone(), agent.pod_cidr(), shutdown.clone());
        tasks.spawn("pod range", async move {
            range.await;
            Ok(())
        });
        let (pulse, ready) = (agent.pulse(), agent.node_ready());
        let mut healthz = None;
        if options.settings.enable_server.unwrap_or(true) {
            let server = kubelet_server(
                &options,
                port,
                &agent,
                &runtime,
                (registry, probe_registry),
                shutdown.clone(),
            )
            .await?;
            tasks.spawn("kubelet API", async move {
                server.run().await;
                Ok(())
            });
            healthz = healthz_address(&options.settings);
        }
        tasks.spawn("agent", async move { Ok(agent.run().await?) });
        Ok(Self { images, tasks, pulse, ready, healthz })
    }

    /// Waits until this process has reported its node as ready.
    pub(crate) async fn ready(&self) {
        let mut ready = self.ready.clone();
        if ready.wait_for(|ready| *ready).await.is_err() {
            // the agent has ended, which is told elsewhere
            std::future::pending::<()>().await;
        }
    }

    /// Whether the agent's loop turns.
    pub(crate) fn is_alive(&self) -> bool {
        self.pulse.is_alive()
    }

    /// Whether a part failed.
    ///
    /// # Errors
    /// The first failure.
    pub(crate) fn result(&self) -> anyhow::Result<()> {
        self.tasks.result()
    }

    /// Waits for the end of everything after the shutdown.
    pub(crate) async fn stopped(&self) {
        self.tasks.stopped().await;
    }
}

/// Where `/healthz` is served, if it is.
fn healthz_address(settings: &KubeletSettings) -> Option<SocketAddr> {
    let localhost = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let port = settings.healthz_port.unwrap_or(10248);
    (port != 0).then(|| SocketAddr::new(settings.healthz_bind_address.unwrap_or(localhost), port))
}

/// Hands the node's range of pod addresses on to the runtime, as soon as it is known.
async fn follow_pod_range(
    runtime: EmbeddedRuntime,
    mut range: watch::Receiver<Option<String>>,
    shutdown: CancellationToken,
) {
    loop {
        let ranges: Vec<IpNet> = range
            .borrow_and_update()
            .iter()
            .flat_map(|text| text.split(','))
            .filter_map(|text| text.trim().parse().ok())
            .collect();
        if !ranges.is_empty() {
            match runtime.set_pod_ranges(&ranges).await {
                Ok(()) => warn_of_obstacles().await,
                Err(error) => tracing::error!(?ranges, %error, "pods get no addresses"),
            }
        }
        tokio::select! {
            changed = range.changed() => if changed.is_err() {
                return;
            },
            () = shutdown.cancelled() => return,
        }
    }
}

/// Names what of the host's own set-up stands in the way of pods' packets.
async fn warn_of_obstacles() {
    let findings = tokio::task::spawn_blocking(keelson_runtime_shim::network::check).await;
    for finding in findings.unwrap_or_default() {
        tracing::warn!(effect = finding.effect, remedy = finding.remedy, "{}", finding.what);
    }
}

async fn kubelet_server(
    options: &NodeOptions,
    port: u16,
    agent: &Agent,
    runtime: &EmbeddedRuntime,
    (metrics, probe_metrics): (Registry, Registry),
    shutdown: CancellationToken,
) -> anyhow::Result<KubeletServer> {
    let settings = &options.settings;
    let always_allow = settings.authorization.mode.as_deref() == Some("AlwaysAllow");
    let unspecified = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let config = ServerConfig {
        address: SocketAddr::new(settings.address.unwrap_or(unspecified), port),
        tls: Arc::clone(&options.tls),
        healthz: healthz_address(settings),
        access: AccessConfig {
            anonymous: settings.authentication.anonymous.enabled.unwrap_or(false),
            token_review: settings.authentication.webhook.enabled.unwrap_or(true),
            // Without an API server there is nobody to ask: who is known by certificate may all.
            access_review: !always_allow && options.client.is_some(),
            node_name: options.name.clone(),
        },
        debugging_handlers: settings.enable_debugging_handlers.unwrap_or(true),
        config: settings.shown(),
        metrics,
        probe_metrics,
    };
    let (pods, runtime) = (agent.directory(), Arc::new(runtime.clone()));
    let statistics = Statistics::new(options.name.clone(), runtime.clone(), Arc::clone(&pods));
    let sources = ServerSources {
        pods,
        runtime,
        statistics: Arc::new(statistics),
        client: options.client.clone(),
        pulse: agent.pulse(),
    };
    Ok(KubeletServer::bind(config, sources, shutdown).await?)
}

/// The agent's configuration from the settings and the paths.
fn agent_config(paths: &Paths, options: &NodeOptions) -> anyhow::Result<AgentConfig> {
    let settings = &options.settings;
    let mut config = AgentConfig::new(options.name.clone(), vec![options.address]);
    config.root_dir.clone_from(&paths.kubelet);
    config.pod_logs_dir = settings.pod_logs_dir.clone().unwrap_or_else(|| paths.pod_logs.clone());
    config.container_logs_dir.clone_from(&paths.container_logs);
    config.static_pod_path = Some(options.manifests.clone());
    set(&mut config.file_check_frequency, settings.file_check_frequency);
    config.cluster_dns =
        settings.cluster_dns.clone().unwrap_or_else(|| options.cluster_dns.clone());
    config.cluster_domain =
        settings.cluster_domain.clone().unwrap_or_else(|| options.cluster_domain.clone());
    if let Some(path) = &settings.resolv_conf {
        config.resolv_conf = (!path.is_empty()).then(|| path.into());
    }
    set(&mut config.max_pods, settings.max_pods);
    config.pod_pids_limit = settings.pod_pids_limit.filter(|limit| *limit > 0);
    set(&mut config.cpu_cfs_quota, settings.cpu_cfs_quota);
    set(&mut config.cpu_cfs_quota_period, settings.cpu_cfs_quota_period);
    set(&mut config.seccomp_default, settings.seccomp_default);
    config.max_parallel_image_pulls = parallel_pulls(settings)?;
    if let Some(size) = &settings.container_log_max_size {
        let size = Quantity::parse(size).context("containerLogMaxSize")?.value();
        config.container_log_max_size =
            u64::try_from(size).context("containerLogMaxSize must not be negative")?;
    }
    if let Some(files) = settings.container_log_max_files {
        if files < 2 {
            bail!("containerLogMaxFiles must be at least 2, not {files}");
        }
        config.container_log_max_files = files;
    }
    set(&mut config.container_log_monitor_interval, settings.container_log_monitor_interval);
    set(
        &mut config.max_container_restart_period,
        settings.crash_loop_back_off.max_container_restart_period,
    );
    set(&mut config.node.register, settings.register_node);
    config.node.taints.clone_from(&settings.register_with_taints);
    config.node.provider_id = settings.provider_id.clone().filter(|id| !id.is_empty());
    set(&mut config.node.max_images, settings.node_status_max_images);
    config.allowed_unsafe_sysctls.clone_from(&settings.allowed_unsafe_sysctls);
    config.node.pod_cidr = settings.pod_cidr.map(|range| range.to_string());
    let seconds = |seconds: u32| Duration::from_secs(seconds.into());
    set(&mut config.node.lease_duration, settings.node_lease_duration_seconds.map(seconds));
    set(&mut config.node.status_update_frequency, settings.node_status_update_frequency);
    set(&mut config.node.status_report_frequency, settings.node_status_report_frequency);
    config.node.reserved = reserved(settings)?;
    set(&mut config.node.port, settings.port);
    Ok(config)
}

fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

fn parallel_pulls(settings: &KubeletSettings) -> anyhow::Result<usize> {
    // The kubelet's rule: more than one at a time only when they need not be in line.
    let serialize =
        settings.serialize_image_pulls.unwrap_or(settings.max_parallel_image_pulls.is_none());
    match (serialize, settings.max_parallel_image_pulls) {
        (_, Some(0)) => bail!("maxParallelImagePulls must be at least 1"),
        (true, Some(2..)) => {
            bail!("maxParallelImagePulls needs serializeImagePulls: false");
        }
        (true, _) => Ok(1),
        (false, Some(most)) => Ok(most as usize),
        // No limit is documented; one that no node reaches.
        (false, None) => Ok(64),
    }
}

fn reserved(
    settings: &KubeletSettings,
) -> anyhow::Result<std::collections::BTreeMap<String, String>> {
    let mut sums = std::collections::BTreeMap::<String, Quantity>::new();
    for (field, map) in
        [("systemReserved", &settings.system_reserved), ("kubeReserved", &settings.kube_reserved)]
    {
        for (name, amount) in map {
            let amount = Quantity::parse(amount).with_context(|| format!("{field}.{name}"))?;
            *sums.entry(name.clone()).or_insert(Quantity::ZERO) += amount;
        }
    }
    Ok(sums.into_iter().map(|(name, amount)| (name, amount.to_string())).collect())
}

/// Says what stands in the way of pods on this machine, in warnings.
///
/// # Errors
/// On cgroup v1, where that is not allowed.
pub(crate) fn check_machine(allow_cgroup_v1: bool) -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("root is needed for namespaces, mounts, cgroups and the packet filter: use sudo");
    }
    if !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        if !allow_cgroup_v1 {
            bail!(
                "this machine has cgroup v1, which is refused by default (failCgroupV1): boot with \
                 systemd.unified_cgroup_hierarchy=1, or set failCgroupV1: false in --config"
            );
        }
        tracing::warn!(
            "this machine has cgroup v1, which Kubernetes has put into maintenance; going on"
        );
    }
    Ok(())
}

/// Reads the settings of a node.
///
/// # Errors
/// When the config file can't be read or something in it is wrong.
pub(crate) fn settings(args: &NodeArgs) -> anyhow::Result<KubeletSettings> {
    args.config.as_deref().map_or_else(|| Ok(KubeletSettings::default()), KubeletSettings::read)
}

/// The folder of static pods: that of the command line, of the config, else the usual one.
pub(crate) fn manifests(
    args: &NodeArgs,
    settings: &KubeletSettings,
    paths: &Paths,
) -> std::path::PathBuf {
    let given = args.manifests.as_ref().or(settings.static_pod_path.as_ref());
    given.unwrap_or(&paths.manifests).clone()
}

/// `keelson agent`.
///
/// # Errors
/// When it can't start.
pub(crate) fn run(args: &AgentArgs) -> anyhow::Result<()> {
    let paths = Paths::new(args.data.data_dir.as_deref()).context("data folder")?;
    let settings = settings(&args.node)?;
    check_machine(settings.fail_cgroup_v1 == Some(false))?;
    let (name, address) = (
        node::name(args.node.node_name.as_deref(), "--node-name")?,
        node::address(args.node.node_ip)?,
    );
    run::block_on(async {
        let shutdown = run::shutdown_on_signal()?;
        let mut held = instance::hold(
            &paths,
            &[Part::Agent],
            Record {
                role: "agent".to_owned(),
                cgroup_root: cgroup_root(&paths, &settings),
                ..Record::of_this_process(&name)
            },
        )?;
        let credentials = match &args.kubeconfig {
            Some(path) => Some(Credentials::read(path).await?),
            None => {
                tracing::info!("no --kubeconfig: static pods only");
                None
            }
        };
        let client = credentials.as_ref().map(Credentials::client);
        let facts = credentials.as_ref().and_then(|credentials| credentials.facts.clone());
        let options = NodeOptions {
            tls: serving::serving_tls(&paths, &settings, credentials.as_ref(), &name, address)?,
            cluster_dns: facts.iter().map(|facts| facts.cluster_dns).collect(),
            cluster_domain: facts
                .as_ref()
                .map_or_else(|| "cluster.local".to_owned(), |facts| facts.cluster_domain.clone()),
            cluster_ranges: facts.iter().map(|facts| facts.cluster_cidr).collect(),
            images: image::options(&args.node.registries),
            manifests: manifests(&args.node, &settings, &paths),
            name,
            address,
            settings,
            client,
        };
        let tasks = MainTasks::new(shutdown.clone());
        if let Some(credentials) = credentials {
            credentials.keep_current(&tasks, shutdown.clone());
        }
        let result = async {
            let node = Node::start(&paths, options, &shutdown);
            let Some(node) = run::unless_stopped(node, &shutdown).await? else { return Ok(()) };
            held.ready()?;
            notify::notify("READY=1");
            let healthy = run::healthy(node.healthz, "/healthz");
            let alive = async || node.is_alive() && healthy().await;
            notify::watchdog(alive, shutdown.clone()).await;
            shutdown.cancelled().await;
            run::ended(node.stopped()).await;
            node.result()
        }
        .await;
        // What follows the node ends with it.
        shutdown.cancel();
        run::ended(tasks.stopped()).await;
        result.and(tasks.result())
    })
}
