//! kube-proxy's work: Services and EndpointSlices in, kernel rules out.
//!
//! ```text
//!   watches ─► model: ServiceTable ─► ruleset: Desired ─► nftables: one transaction ─► kernel
//!   (API)          (pure)                 (pure)              only the difference
//!                                                                  │
//!                                            conntrack ◄── stale ──┘
//! ```
//!
//! | task or thread | what it owns | what it sends where |
//! |---|---|---|
//! | [`watches`], three tasks | nothing | changes to the loop's queue |
//! | [`drift`], a task | what hears others, by mode | "drift" to the same queue |
//! | [`start`], a task | nothing; the rules of other modes are removed once a family's own are in force | nothing |
//! | [`proxier`], a thread | the whole state, a [`backend`] per family | rules to the kernel; Services to [`health_check`] |
//! | [`conntrack`], a thread | a netlink socket | deletions to the kernel |
//! | [`health`], a task per port | listeners | pages |
//! | [`health_check`], a task, and one per port | listeners | how many endpoints are here |
//!
//! [`start`] chooses the backend; [`leftovers`] removes what others left.
//!
//! The rules stay when the proxy stops, so that Services answer while it is restarted or upgraded;
//! [`cleanup`] removes them. `README.md` in this crate draws the packet's path.

mod backend;
mod condition;
mod config;
mod conntrack;
mod drift;
mod explain;
mod health;
mod health_check;
#[cfg(test)]
mod input_test;
mod iptables;
mod ipvs;
mod leftovers;
#[cfg(test)]
mod loop_test;
mod memory;
mod metrics;
mod model;
#[cfg(test)]
mod netns;
mod nftables;
#[cfg(test)]
mod packets;
mod proxier;
mod ruleset;
#[cfg(test)]
mod run_test;
mod snapshot;
mod start;
mod sysctl;
#[cfg(test)]
mod until;
mod userspace;
mod watches;

#[doc(hidden)]
pub mod bench;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use keelson_api::{events::EventRecorder, metrics::component};
use kube::Client;
use prometheus::Registry;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

pub use config::{
    ConntrackConfig, DetectLocal, Mode, NodePortAddresses, ProxyConfig, REMOVE_STALE_TCP,
};
pub use explain::{Candidate, Explanation, Origin, Packet, Verdict};
pub use model::{Family, Protocol};
pub use snapshot::{Objects, Refusal, Snapshot};

use crate::{
    condition::Condition,
    conntrack::Cleaner,
    drift::Hearing,
    health::{Health, Pages, Server, Slis},
    health_check::{HealthChecks, Listening},
    iptables::canary::Canary,
    metrics::{Metrics, packets::Freshener},
    nftables::monitor::Monitor,
    proxier::{Proxier, Reports},
    start::{Chosen, KERNEL_MIN},
};

/// How long a stop waits for a commit that is under way, where rules outlive the process.
const COMMIT: Duration = Duration::from_millis(300);
/// How long it waits for everything else.
const REST: Duration = Duration::from_millis(500);

/// Why the proxy can't start, or could not clean up.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// The kernel is too old.
    #[error(
        "kernel {found} is too old for the nftables proxy: {}.{} or newer is needed",
        KERNEL_MIN.0, KERNEL_MIN.1
    )]
    KernelTooOld {
        /// The kernel's release.
        found: String,
    },
    /// The kernel refuses a part of the rules that every cluster needs.
    #[error(
        "the kernel refuses a rule of the proxy: {0}; check that nf_tables, nft_nat, nft_masq, \
         nft_numgen, nft_reject and nft_ct can be loaded and that the process has CAP_NET_ADMIN"
    )]
    Kernel(String),
    /// The relays of the userspace mode can't start, or their routes can't be removed.
    #[error("relays of the userspace mode: {0}")]
    Relays(String),
    /// What is in force can't be read.
    #[error("the rules in force can't be read: {0}")]
    Unreadable(String),
    /// The kernel has no IPv6.
    #[error("the kernel has no IPv6")]
    NoIpv6,
    /// iptables is missing, or it or the kernel refuses a rule that every cluster needs.
    #[error("the iptables mode can't be used: {0}")]
    Iptables(String),
    /// A port for health or metrics can't be had.
    #[error("can't listen on {address}: {source}")]
    Listen {
        /// The address as configured.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// A metric's name is taken: two proxies share one registry.
    #[error("can't register metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// A thread or socket can't be had.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A task ended that never should.
    #[error("a part of the proxy ended by itself")]
    Ended,
}

/// Runs the proxy until `shutdown`, with metrics of its own. The rules stay when it ends.
///
/// # Errors
/// When it can't start: the kernel lacks something, or a port is taken. Later trouble is logged,
/// counted and tried again.
pub async fn run(
    config: ProxyConfig,
    client: Client,
    shutdown: CancellationToken,
) -> Result<(), ProxyError> {
    run_with_registry(config, client, Registry::new(), shutdown).await
}

/// As [`run`], with a registry that the caller may print too.
///
/// # Errors
/// As [`run`].
pub async fn run_with_registry(
    mut config: ProxyConfig,
    client: Client,
    registry: Registry,
    shutdown: CancellationToken,
) -> Result<(), ProxyError> {
    // Its parts end with it, however it ends.
    let shutdown = shutdown.child_token();
    // All sockets belong to the network namespace of the thread that opens them: a caller which
    // wants another one runs this on a runtime of a single thread inside it.
    let configz = configz(&config);
    if config.detect_local == DetectLocal::NodeCidr {
        let ranges = watches::pod_cidrs(client.clone(), &config.node_name, &shutdown).await;
        let Some(ranges) = ranges else { return Ok(()) };
        config.detect_local = DetectLocal::Ranges(ranges);
    }
    let Some(mut chosen) = start::choose_patiently(&config, &shutdown).await? else {
        return Ok(());
    };
    let (mode, families) = (chosen.mode, chosen.families());
    let metrics = Metrics::for_mode(&registry, mode)?;
    let modes = (config.mode, mode);
    let condition = Condition::register(&registry, modes, &families, &config.wanted_families())?;
    if let Some(relays) = &chosen.relays {
        relays.register(&registry)?;
    }
    component::register(&registry)?;
    component::register_counts(&registry, metrics::documented::levels(mode))?;
    let conntrack = connection_cleaner(&chosen, &metrics);
    // After the kernel has got what tracks connections for the above: its settings are not there
    // before.
    sysctl::apply(&config.conntrack);
    let health = Health::new(&families, config.sync_period);
    let mut tasks = JoinSet::new();

    let pages = Pages {
        health: health.clone(),
        metrics: metrics.clone(),
        packets: Freshener::new(std::mem::take(&mut chosen.counters), metrics.clone()),
        registry,
        slis: Slis::new()?,
        mode,
        configz,
    };
    for (address, server) in [
        (config.healthz_bind_address, Server::Health),
        (config.metrics_bind_address, Server::Metrics),
    ] {
        let Some(address) = address else { continue };
        listen(&mut tasks, address, server, &config, &pages, &shutdown).await?;
    }

    let (changes, queue) = mpsc::channel(watches::QUEUE);
    let hearing = Hearing {
        changes: changes.clone(),
        period: config.sync_period,
        failures: condition.deaf,
        shutdown: shutdown.clone(),
    };
    hear_others(&mut tasks, &mut chosen, &families, hearing);
    let (events, recorder) = EventRecorder::spawn(
        client.clone(),
        "kube-proxy",
        Some(&config.node_name),
        shutdown.clone(),
    );
    tasks.spawn(async move {
        let _ = recorder.await;
    });
    tasks.spawn(watches::services(client.clone(), changes.clone(), shutdown.clone()));
    let (place, placed) = watch::channel(None);
    tasks.spawn(watches::slices(client.clone(), placed, changes.clone(), shutdown.clone()));
    let node = config.node_name.clone();
    tasks.spawn(watches::node(client, node, place, changes, shutdown.clone()));
    let (published, checks) = watch::channel(Arc::default());
    let listening = Listening {
        checks,
        addresses: config.node_port_addresses.clone(),
        families,
        health: health.clone(),
        events: events.clone(),
    };
    tasks.spawn(health_check::listen(listening, shutdown.clone()));

    let node_ips: Vec<IpAddr> = node_ips(&config);
    let reports = Reports { metrics: metrics.clone(), health, events, conntrack };
    let (in_force, begun) = mpsc::channel(2);
    let proxier = Proxier::new(chosen.backends, &node_ips, reports)
        .paced(config.min_sync_period)
        .with_stale_tcp(config.conntrack.remove_stale_tcp)
        .with_health_checks(HealthChecks::new(published))
        .stopped_by(shutdown.clone())
        .when_in_force(move |family| {
            // There is room for all of them.
            let _ = in_force.try_send(family);
        });
    tasks.spawn(remove_others(mode, metrics, begun, shutdown.clone()));
    let over = CancellationToken::new();
    let ended = over.clone().drop_guard();
    let runtime = tokio::runtime::Handle::current();
    let looping = std::thread::Builder::new()
        .name("proxy".into())
        .spawn(move || {
            // Dropping it tells that the loop is over, however it ended.
            let _ended = ended;
            runtime.block_on(proxier.run(queue));
        })
        .map_err(|source| ProxyError::Io { doing: "start the proxy's thread", source })?;

    let result = tokio::select! {
        () = shutdown.cancelled() => Ok(()),
        () = over.cancelled() => if shutdown.is_cancelled() { Ok(()) } else { Err(ProxyError::Ended) },
    };
    // Everything listens to the token; what hangs anyway goes with the set.
    shutdown.cancel();
    let _ = tokio::time::timeout(REST, async { while tasks.join_next().await.is_some() {} }).await;
    // Without its tasks the loop ends too, and a mode whose rules can't outlive the process takes
    // them away.
    tasks.shutdown().await;
    let patience = if mode == Mode::Userspace { userspace::STOP } else { COMMIT };
    if tokio::time::timeout(patience, over.cancelled()).await.is_err() {
        tracing::warn!(
            mode = mode.as_str(),
            "stopped during a commit: the kernel takes it as a whole, or not at all"
        );
    } else if looping.join().is_err() {
        return Err(ProxyError::Ended);
    }
    result
}

/// Removes what other modes left of each family, once its rules are in force. Programs are run for
/// it, which no change should wait for.
async fn remove_others(
    mode: Mode,
    metrics: Metrics,
    mut begun: mpsc::Receiver<Family>,
    shutdown: CancellationToken,
) {
    loop {
        let family = tokio::select! {
            family = begun.recv() => family,
            () = shutdown.cancelled() => return,
        };
        let Some(family) = family else { return };
        let (metrics, stop) = (metrics.clone(), shutdown.clone());
        let removed = tokio::task::spawn_blocking(move || {
            leftovers::remove_others(mode, family, Some(&metrics), &stop)
        });
        if removed.await.is_err() {
            tracing::error!("rules of other modes stay: their removal panicked");
        }
    }
}

/// Does what needs more than CAP_NET_ADMIN: the kernel's settings. A proxy that is started after it
/// finds them as it wants them.
///
/// # Errors
/// When the mode doesn't work here.
pub fn initialize(config: &ProxyConfig) -> Result<(), ProxyError> {
    start::initialize(config)?;
    sysctl::apply(&config.conntrack);
    Ok(())
}

/// Removes all rules of the proxy, in every mode and family, and those of kube-proxy; nothing
/// happens if there are none.
///
/// # Errors
/// When the kernel refuses.
pub fn cleanup() -> Result<(), ProxyError> {
    leftovers::remove_all()
}

fn kernel(error: impl std::fmt::Display) -> ProxyError {
    ProxyError::Kernel(error.to_string())
}

fn configz(config: &ProxyConfig) -> Arc<str> {
    serde_json::json!({ "kubeproxy.config.k8s.io": config.document() }).to_string().into()
}

fn connection_cleaner(chosen: &Chosen, metrics: &Metrics) -> Option<Cleaner> {
    if !chosen.backends.iter().any(|backend| backend.tracks_connections()) {
        return None;
    }
    match Cleaner::start(metrics.clone()) {
        Ok(cleaner) => Some(cleaner),
        Err(error) => {
            tracing::warn!(%error, "stale UDP connections will not be removed: there is no way to the connection table");
            None
        }
    }
}

/// The node's addresses as far as they are configured, the main one first.
fn node_ips(config: &ProxyConfig) -> Vec<IpAddr> {
    let main = config.bind_address;
    let others = config.node_ips.iter().copied();
    main.into_iter().chain(others.filter(|ip| Some(*ip) != main)).collect()
}

/// Serves pages at an address; if it can't be had now, and that is no reason to end, then later.
async fn listen(
    tasks: &mut JoinSet<()>,
    address: SocketAddr,
    server: Server,
    config: &ProxyConfig,
    pages: &Pages,
    shutdown: &CancellationToken,
) -> Result<(), ProxyError> {
    let (pages, shutdown) = (pages.clone(), shutdown.clone());
    let answer = move |path: String| {
        let pages = pages.clone();
        async move { pages.answer(server, &path).await }
    };
    if config.bind_address_hard_fail {
        let listener = health::bind(address, true, &shutdown)
            .await
            .map_err(|source| ProxyError::Listen { address, source })?;
        tasks.spawn(health::serve(listener, answer, shutdown));
        return Ok(());
    }
    tasks.spawn(async move {
        if let Ok(listener) = health::bind(address, false, &shutdown).await {
            health::serve(listener, answer, shutdown).await;
        }
    });
    Ok(())
}

/// Listens to others who change the rules, as the mode needs it.
fn hear_others(
    tasks: &mut JoinSet<()>,
    chosen: &mut Chosen,
    families: &[Family],
    hearing: Hearing,
) {
    for canary in chosen.canaries.drain(..) {
        if canary.is_told_by_kernel() {
            let family = canary.family().protocol_family();
            let open = move || Ok(Monitor::open(&[], vec![family])?.of_tables(Canary::TABLES));
            tasks.spawn(drift::look_when_told(open, canary, hearing.clone()));
        } else {
            tasks.spawn(drift::look(canary, hearing.clone()));
        }
    }
    if chosen.mode == Mode::Nftables {
        let families: Vec<u8> = families.iter().map(|f| f.protocol_family()).collect();
        let (ports, period) = (chosen.ports.clone(), hearing.period);
        let open = move || Ok(Monitor::open(&ports, families.clone())?.patient(period));
        tasks.spawn(drift::monitor(open, hearing));
    }
}
