//! Everything together: what is started in which order, and how it ends.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use k8s_openapi::api::core::v1::Node;
use keelson_api::{
    events::{EventRecorder, EventType},
    metrics::component,
    object::{ObjectKey, reference_by_key},
};
use kube::Client;
use prometheus::Registry;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use crate::{
    DetectLocal, Family, Mode, ProxyConfig, ProxyError,
    backend::Goal,
    condition::Condition,
    conntrack::{self, Cleaner, stale::Expected},
    drift::{self, Hearing},
    health::{self, Health, Pages, Server, Slis},
    health_check::{self, HealthChecks, Listening},
    iptables::canary::Canary,
    leftovers,
    metrics::{Metrics, documented, packets::Freshener},
    nftables::monitor::Monitor,
    proxier::{Proxier, Reports},
    start::{self, Chosen},
    sysctl, userspace,
    watches::{self, Change},
};

/// How long a stop waits for a commit that is under way, where rules outlive the process.
const COMMIT: Duration = Duration::from_millis(300);
/// How long it waits for everything else.
const REST: Duration = Duration::from_millis(500);

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
    let (metrics, condition) = register(&registry, &config, &chosen)?;
    let conntrack = connection_cleaner(&chosen, &metrics);
    // After the kernel has got what tracks connections for the above: its settings are not there
    // before.
    let settings = config.conntrack.clone();
    start::blocking(move || sysctl::apply(&settings)).await?;
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
    serve_pages(&mut tasks, &config, &pages, &shutdown).await?;

    let (changes, queue) = mpsc::channel(watches::QUEUE);
    let hearing = Hearing {
        changes: changes.clone(),
        period: config.sync_period,
        failures: condition.deaf,
        shutdown: shutdown.clone(),
    };
    hear_others(&mut tasks, &mut chosen, &families, hearing);
    let node = Some(config.node_name.as_str());
    let (events, recorder) =
        EventRecorder::spawn(client.clone(), "kube-proxy", node, shutdown.clone());
    tasks.spawn(async move {
        // That it has ended is seen, whether it panicked or not.
        let _ = recorder.await;
    });
    // On nodes events carry the node's name as UID, as the kubelet's and kube-proxy's do.
    let itself = ObjectKey::new("", &*config.node_name);
    let itself = reference_by_key::<Node>(&itself, Some(config.node_name.clone()));
    events.event(&itself, EventType::Normal, "Starting", "");
    if mode == Mode::Nftables {
        // The only one that knows what to do with them, as with kube-proxy.
        tasks.spawn(watches::service_ranges(client.clone(), changes.clone(), shutdown.clone()));
    }
    watch_cluster(&mut tasks, &client, &config.node_name, changes, &shutdown);
    let (published, checks) = watch::channel(Arc::default());
    let listening = Listening {
        checks,
        addresses: config.node_port_addresses.clone(),
        families,
        health: health.clone(),
        events: events.clone(),
    };
    tasks.spawn(health_check::listen(listening, shutdown.clone()));

    let reports = Reports { metrics: metrics.clone(), health, events, conntrack };
    let (in_force, begun) = mpsc::channel(2);
    let proxier = Proxier::new(chosen.backends, &node_ips(&config), reports)
        .paced(config.min_sync_period)
        .with_stale_tcp(config.conntrack.remove_stale_tcp)
        .with_health_checks(HealthChecks::new(published))
        .stopped_by(shutdown.clone())
        .when_in_force(move |family, Goal { desired, objects }| {
            let relayed = (mode == Mode::Userspace)
                .then(|| Expected::of(desired, objects, &[family], false).untranslated());
            // There is room for all of them.
            let _ = in_force.try_send((family, relayed));
        });
    tasks.spawn(remove_others(mode, metrics, begun, shutdown.clone()));
    let looping = Looping::start(proxier, queue)?;

    let result = supervise(&mut tasks, &looping.over, &shutdown).await;
    shutdown.cancel();
    looping.stop(tasks, mode).await?;
    result
}

/// Registers what is measured in the mode that was chosen.
fn register(
    registry: &Registry,
    config: &ProxyConfig,
    chosen: &Chosen,
) -> Result<(Metrics, Condition), ProxyError> {
    let (mode, families) = (chosen.mode, chosen.families());
    let metrics = Metrics::for_mode(registry, mode)?;
    let modes = (config.mode, mode);
    let condition = Condition::register(registry, modes, &families, &config.wanted_families())?;
    if let Some(relays) = &chosen.relays {
        relays.register(registry)?;
    }
    component::register(registry)?;
    component::register_counts(registry, documented::levels(mode))?;
    Ok((metrics, condition))
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
            tracing::warn!(
                %error,
                "stale connections will not be removed: there is no way to the connection table"
            );
            None
        }
    }
}

/// The node's addresses as far as they are configured, the main one first.
fn node_ips(config: &ProxyConfig) -> Vec<IpAddr> {
    let main = config.main_address();
    let others = config.node_ips.iter().copied();
    main.into_iter().chain(others.filter(|ip| Some(*ip) != main)).collect()
}

/// Serves health and metrics where the configuration has them.
async fn serve_pages(
    tasks: &mut JoinSet<()>,
    config: &ProxyConfig,
    pages: &Pages,
    shutdown: &CancellationToken,
) -> Result<(), ProxyError> {
    for (address, server) in [
        (config.healthz_bind_address, Server::Health),
        (config.metrics_bind_address, Server::Metrics),
    ] {
        let Some(address) = address else { continue };
        let hard_fail = config.bind_address_hard_fail;
        listen(tasks, address, server, hard_fail, pages, shutdown).await?;
    }
    Ok(())
}

/// Serves pages at an address; if it can't be had now, and that is no reason to end, then later.
async fn listen(
    tasks: &mut JoinSet<()>,
    address: SocketAddr,
    server: Server,
    hard_fail: bool,
    pages: &Pages,
    shutdown: &CancellationToken,
) -> Result<(), ProxyError> {
    let (pages, shutdown) = (pages.clone(), shutdown.clone());
    let answer = move |path: String| {
        let pages = pages.clone();
        async move { pages.answer(server, &path).await }
    };
    if hard_fail {
        let listener = health::bind(address, true, &shutdown)
            .await
            .map_err(|source| ProxyError::Listen { address, source })?;
        tasks.spawn(health::serve(listener, answer, shutdown));
        return Ok(());
    }
    tasks.spawn(async move {
        // Nothing but the end of all keeps it from being had at last.
        if let Ok(listener) = health::bind(address, false, &shutdown).await {
            health::serve(listener, answer, shutdown).await;
        }
    });
    Ok(())
}

/// Listens to others who change the rules, as the mode needs it.
pub(crate) fn hear_others(
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

/// Follows Services, EndpointSlices and the node. Where the node is tells which slices' hints are
/// for here.
fn watch_cluster(
    tasks: &mut JoinSet<()>,
    client: &Client,
    node: &str,
    changes: mpsc::Sender<Change>,
    shutdown: &CancellationToken,
) {
    let (place, placed) = watch::channel(None);
    tasks.spawn(watches::services(client.clone(), changes.clone(), shutdown.clone()));
    tasks.spawn(watches::slices(client.clone(), placed, changes.clone(), shutdown.clone()));
    let node = node.to_owned();
    tasks.spawn(watches::node(client.clone(), node, place, changes, shutdown.clone()));
}

/// Removes what other modes left of each family, once its rules are in force, and has flows forgotten
/// that they translated, where only relays serve. Programs are run for
/// it, which no change should wait for.
async fn remove_others(
    mode: Mode,
    metrics: Metrics,
    mut begun: mpsc::Receiver<(Family, Option<Expected>)>,
    shutdown: CancellationToken,
) {
    loop {
        let begun = tokio::select! {
            begun = begun.recv() => begun,
            () = shutdown.cancelled() => return,
        };
        let Some((family, relayed)) = begun else { return };
        let (metrics, stop) = (metrics.clone(), shutdown.clone());
        let removed = tokio::task::spawn_blocking(move || {
            let removed = leftovers::remove_others(mode, family, Some(&metrics), &stop);
            if let Some(relayed) = relayed {
                conntrack::forget_translated(&relayed);
            }
            removed
        });
        if removed.await.is_err() {
            tracing::error!("rules of other modes stay: their removal panicked");
        }
    }
}

/// Waits for the end that was asked for. A part that ends before, by itself or by a panic, is not
/// missed by anybody else: without a watch, say, the rules would stay as they are for ever.
async fn supervise(
    tasks: &mut JoinSet<()>,
    over: &CancellationToken,
    shutdown: &CancellationToken,
) -> Result<(), ProxyError> {
    tokio::select! {
        // At the end all parts end.
        biased;
        () = shutdown.cancelled() => Ok(()),
        () = over.cancelled() => Err(ProxyError::Ended),
        Some(ended) = tasks.join_next() => {
            if let Err(error) = ended {
                tracing::error!(%error, "a part of the proxy failed");
            }
            Err(ProxyError::Ended)
        }
    }
}

/// The loop on its thread.
struct Looping {
    /// Cancelled when the loop is over, however it ended.
    over: CancellationToken,
    thread: JoinHandle<()>,
}

impl Looping {
    fn start(proxier: Proxier, queue: mpsc::Receiver<Change>) -> Result<Self, ProxyError> {
        let over = CancellationToken::new();
        let ended = over.clone().drop_guard();
        let runtime = tokio::runtime::Handle::current();
        let thread = std::thread::Builder::new()
            .name("proxy".into())
            .spawn(move || {
                let _ended = ended;
                runtime.block_on(proxier.run(queue));
            })
            .map_err(|source| ProxyError::Io { doing: "start the proxy's thread", source })?;
        Ok(Self { over, thread })
    }

    /// Waits until all has ended that was told to; what hangs anyway is ended here.
    async fn stop(self, mut tasks: JoinSet<()>, mode: Mode) -> Result<(), ProxyError> {
        let rest = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(REST, rest).await.is_err() {
            tracing::debug!("tasks take longer than {REST:?} to end");
        }
        // Without them the loop ends too, and a mode whose rules can't outlive the process takes
        // them away.
        tasks.shutdown().await;
        let patience = if mode == Mode::Userspace { userspace::STOP } else { COMMIT };
        if tokio::time::timeout(patience, self.over.cancelled()).await.is_err() {
            tracing::warn!(
                mode = mode.as_str(),
                "stopped during a commit: the kernel takes it as a whole, or not at all"
            );
            return Ok(());
        }
        self.thread.join().map_err(|_| ProxyError::Ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_part_that_ends_or_panics_ends_the_proxy_with_an_error() {
        let long = Duration::from_secs(10);
        let waits = || (CancellationToken::new(), CancellationToken::new());
        for panics in [false, true] {
            let (over, shutdown) = waits();
            let mut tasks = JoinSet::new();
            tasks.spawn(std::future::pending());
            tasks.spawn(async move { assert!(!panics, "as told") });
            let ended = tokio::time::timeout(long, supervise(&mut tasks, &over, &shutdown)).await;
            let ended = ended.expect("it is noticed");
            assert!(matches!(ended, Err(ProxyError::Ended)), "{ended:?}");
        }
        let (over, shutdown) = waits();
        over.cancel();
        let ended = supervise(&mut JoinSet::new(), &over, &shutdown).await;
        assert!(matches!(ended, Err(ProxyError::Ended)), "the loop is one of them: {ended:?}");
        // At the end that was asked for everything ends.
        shutdown.cancel();
        let mut tasks = JoinSet::new();
        tasks.spawn(async {});
        supervise(&mut tasks, &over, &shutdown).await.unwrap();
    }
}
