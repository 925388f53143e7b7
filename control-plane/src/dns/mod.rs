//! Cluster DNS: names for Services and pods, and the way out for all others.
//!
//! ```text
//! Services, EndpointSlices, Namespaces ──► Zone ◄── Responder ◄── UDP and TCP
//!              (informers)                             │ not the cluster's
//!                                                      └──► servers of /etc/resolv.conf
//! ```
//!
//! * [`zone`]: the Kubernetes DNS specification, as a pure function of the objects.
//! * [`answer`]: questions and answers on the wire (hickory).
//! * [`forward`]: everything else.
//! * [`publish`]: makes the server reachable as `kube-system/kube-dns`.
//!
//! Until the zone is complete the cluster's names are answered with SERVFAIL: nobody is told that
//! a name is not there which is.

mod answer;
mod forward;
mod metrics;
mod publish;
mod zone;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use hickory_server::Server;
use tokio::net::{TcpListener, UdpSocket};
use tokio_util::sync::CancellationToken;

use self::{answer::Responder, forward::Forwarder, zone::Zone};
use crate::informers::Informers;

pub use self::{
    metrics::DnsMetrics,
    publish::{Published, publish},
};

/// How long a TCP connection may be idle.
const IDLE: Duration = Duration::from_secs(10);
/// How many answers may wait on one TCP connection.
const ANSWERS_WAITING: usize = 32;

/// What cluster DNS must be told.
#[derive(Clone, Debug)]
pub struct DnsConfig {
    /// The cluster's domain (`cluster.local`).
    pub domain: String,
    /// Where to listen, on UDP and TCP.
    pub listen: Vec<SocketAddr>,
    /// The file that names the servers for everything else (`/etc/resolv.conf`).
    pub resolv_conf: PathBuf,
    /// Further addresses that lead to this server, such as the Service's: they are never asked.
    pub own_addresses: Vec<IpAddr>,
}

/// Why cluster DNS can't run.
#[derive(Debug, thiserror::Error)]
pub enum DnsError {
    /// An address can't be listened on.
    #[error("can't listen for DNS on {address}/{protocol}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// `udp` or `tcp`.
        protocol: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The server ended with an error.
    #[error("DNS server: {0}")]
    Server(String),
}

/// Answers DNS questions until `shutdown`.
///
/// # Errors
/// When an address can't be listened on.
pub async fn run(
    informers: Arc<Informers>,
    config: DnsConfig,
    metrics: DnsMetrics,
    shutdown: CancellationToken,
) -> Result<(), DnsError> {
    let zone = Arc::new(RwLock::new(Zone::new(&config.domain)));
    let complete = Arc::new(AtomicBool::new(false));
    let mut own = config.own_addresses.clone();
    own.extend(config.listen.iter().map(SocketAddr::ip));
    let responder = Responder {
        zone: zone.clone(),
        complete: complete.clone(),
        forwarder: Arc::new(Forwarder::new(config.resolv_conf, own)),
        metrics,
    };
    let mut server = Server::new(responder);
    for address in config.listen {
        let failed = |protocol| move |source| DnsError::Listen { address, protocol, source };
        server.register_socket(UdpSocket::bind(address).await.map_err(failed("udp"))?);
        let listener = TcpListener::bind(address).await.map_err(failed("tcp"))?;
        server.register_listener(listener, IDLE, ANSWERS_WAITING);
    }
    follow(&informers, &zone);
    if informers.namespaces.synced(&shutdown).await
        && informers.services.synced(&shutdown).await
        && informers.endpoint_slices.synced(&shutdown).await
    {
        complete.store(true, Ordering::Release);
    }
    shutdown.cancelled().await;
    server.shutdown_gracefully().await.map_err(|error| DnsError::Server(error.to_string()))
}

fn follow(informers: &Informers, zone: &Arc<RwLock<Zone>>) {
    let kept = zone.clone();
    informers.namespaces.on_change(move |change| {
        let mut zone = kept.write().unwrap_or_else(PoisonError::into_inner);
        zone.set_namespace(&change.key().name, change.after.is_some());
    });
    let kept = zone.clone();
    informers.services.on_change(move |change| {
        let mut zone = kept.write().unwrap_or_else(PoisonError::into_inner);
        zone.set_service(&change.key(), change.after.as_deref());
    });
    let kept = zone.clone();
    informers.endpoint_slices.on_change(move |change| {
        let mut zone = kept.write().unwrap_or_else(PoisonError::into_inner);
        zone.set_slice(&change.key(), change.after.as_deref());
    });
}
