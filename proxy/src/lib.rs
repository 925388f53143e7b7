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
//! | the monitor's task | a netlink socket that hears others | "drift" to the same queue |
//! | [`proxier`], a thread | the whole state, a netlink socket per family | transactions to the kernel |
//! | [`conntrack`], a thread | a netlink socket | deletions to the kernel |
//! | [`health`], a task per port | listeners | pages |
//!
//! The rules stay when the proxy stops, so that Services answer while it is restarted or upgraded;
//! [`cleanup`] removes them. `README.md` in this crate draws the packet's path.

mod backend;
mod config;
mod conntrack;
mod health;
#[cfg(test)]
mod loop_test;
mod metrics;
mod model;
#[cfg(test)]
mod netns;
mod nftables;
mod proxier;
mod ruleset;
#[cfg(test)]
mod run_test;
mod sysctl;
mod watches;

#[doc(hidden)]
pub mod bench;

use std::{io, net::SocketAddr, sync::Arc};

use keelson_api::events::EventRecorder;
use kube::Client;
use prometheus::Registry;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

pub use config::{ConntrackConfig, DetectLocal, Mode, NodePortAddresses, ProxyConfig};
pub use model::Family;

use crate::{
    backend::Backend,
    conntrack::Cleaner,
    health::{Health, Pages, Server},
    metrics::Metrics,
    nftables::{
        apply::Table,
        monitor::{Heard, Monitor},
        rules::Layout,
    },
    proxier::{Proxier, Reports},
    watches::ChangeKind,
};

/// The oldest kernel whose nftables has all that the rules need; kube-proxy's nftables mode asks
/// for the same.
const KERNEL_MIN: (u32, u32) = (5, 13);

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
    // All sockets belong to the network namespace of the thread that opens them: a caller which
    // wants another one runs this on a runtime of a single thread inside it.
    check_kernel()?;
    let metrics = Metrics::register(&registry)?;
    if config.detect_local == DetectLocal::NodeCidr {
        let ranges = watches::pod_cidrs(client.clone(), &config.node_name, &shutdown).await;
        let Some(ranges) = ranges else { return Ok(()) };
        config.detect_local = DetectLocal::Ranges(ranges);
    }
    let mut backends: Vec<Box<dyn Backend>> = Vec::new();
    let mut ports = Vec::new();
    for family in &config.families {
        let mut table = Table::open(layout(&config, *family)).map_err(kernel)?;
        table.probe().map_err(kernel)?;
        ports.push(table.port());
        backends.push(Box::new(table));
    }
    let conntrack = match Cleaner::start(metrics.clone()) {
        Ok(cleaner) => Some(cleaner),
        Err(error) => {
            tracing::warn!(%error, "stale UDP connections will not be removed: there is no way to the connection table");
            None
        }
    };
    // After the kernel has got what tracks connections for the above: its settings are not there
    // before.
    sysctl::apply(&config.conntrack);
    let health = Health::default();
    let mut tasks = JoinSet::new();

    let pages = Pages {
        health: health.clone(),
        metrics: metrics.clone(),
        registry,
        configz: configz(&config),
    };
    for (address, server) in [
        (config.healthz_bind_address, Server::Health),
        (config.metrics_bind_address, Server::Metrics),
    ] {
        let Some(address) = address else { continue };
        let listener =
            health::bind(address).await.map_err(|source| ProxyError::Listen { address, source })?;
        tasks.spawn(health::serve(listener, server, pages.clone(), shutdown.clone()));
    }

    let (changes, queue) = mpsc::channel(watches::QUEUE);
    let families = config.families.iter().map(|f| f.protocol_family()).collect();
    match Monitor::open(&ports, families) {
        Ok(monitor) => {
            tasks.spawn(listen(monitor, changes.clone(), shutdown.clone()));
        }
        Err(error) => tracing::warn!(
            %error, "changes of the rules by other programs will only be seen at the next refusal"
        ),
    }
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

    let reports = Reports { metrics, health, events, conntrack };
    let proxier = Proxier::new(backends, &config.node_ips, reports);
    let (ended, end) = tokio::sync::oneshot::channel();
    let runtime = tokio::runtime::Handle::current();
    std::thread::Builder::new()
        .name("proxy".into())
        .spawn(move || {
            // Dropping the sender tells that the loop is over, however it ended.
            let _ended: tokio::sync::oneshot::Sender<()> = ended;
            runtime.block_on(proxier.run(queue));
        })
        .map_err(|source| ProxyError::Io { doing: "start the proxy's thread", source })?;

    let result = tokio::select! {
        () = shutdown.cancelled() => Ok(()),
        _ = end => if shutdown.is_cancelled() { Ok(()) } else { Err(ProxyError::Ended) },
    };
    // Everything listens to the token; what hangs anyway goes with the set.
    let _ = tokio::time::timeout(std::time::Duration::from_secs(2), async {
        if result.is_ok() {
            while tasks.join_next().await.is_some() {}
        }
    })
    .await;
    result
}

/// Removes all rules of the proxy, in every family; nothing happens if there are none.
///
/// # Errors
/// When the kernel refuses.
pub fn cleanup() -> Result<(), ProxyError> {
    for family in [Family::V4, Family::V6] {
        let config = ProxyConfig::new("");
        let mut table = Table::open(layout(&config, family)).map_err(kernel)?;
        table.remove().map_err(kernel)?;
    }
    Ok(())
}

fn kernel(error: impl std::fmt::Display) -> ProxyError {
    ProxyError::Kernel(error.to_string())
}

fn layout(config: &ProxyConfig, family: Family) -> Layout {
    Layout {
        family,
        detect_local: config.detect_local.clone(),
        masquerade_all: config.masquerade_all,
        masquerade_mark: config.masquerade_mark(),
        node_port_addresses: config.node_port_addresses.clone(),
    }
}

fn configz(config: &ProxyConfig) -> Arc<str> {
    let config = serde_json::to_value(config).unwrap_or_default();
    serde_json::json!({ "kubeproxy.config.k8s.io": config }).to_string().into()
}

fn check_kernel() -> Result<(), ProxyError> {
    let names = nix::sys::utsname::uname().map_err(|errno| ProxyError::Io {
        doing: "ask for the kernel's release",
        source: errno.into(),
    })?;
    let release = names.release().to_string_lossy().into_owned();
    if kernel_is_too_old(&release) {
        return Err(ProxyError::KernelTooOld { found: release });
    }
    Ok(())
}

/// A release that can't be read is tried: the kernel itself says what it lacks.
fn kernel_is_too_old(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) < KERNEL_MIN,
        _ => false,
    }
}

/// Tells the loop when another program changed the proxy's rules.
async fn listen(
    mut monitor: Monitor,
    changes: mpsc::Sender<watches::Change>,
    shutdown: CancellationToken,
) {
    loop {
        let heard = tokio::select! {
            heard = monitor.heard() => heard,
            () = shutdown.cancelled() => return,
        };
        let cause = match heard {
            Ok(Heard::Edited) => "edit",
            Ok(Heard::Overflow) => "overflow",
            Err(error) => {
                tracing::error!(%error, "the monitor of the kernel's tables failed");
                return;
            }
        };
        if changes.send(ChangeKind::Drift(cause).into()).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_kernels_are_named() {
        for (release, old) in [
            ("6.18.44-fc", false),
            ("5.13.0", false),
            ("5.12.19-generic", true),
            ("4.19.0", true),
            ("unknown", false),
        ] {
            assert_eq!(kernel_is_too_old(release), old, "{release}");
        }
    }
}
