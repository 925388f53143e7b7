//! The API server: from connections to the store.
//!
//! ```text
//!   TLS ([accept]) ─────┐
//!                       ├─► [service] ─► [objects], [streams], [nonresource] ─► cache, store
//!   kube::Client ───────┘   who, may they,
//!   (in this process)       which handler
//! ```
//!
//! * [`config`]: what a server is made of.
//! * [`request`], [`negotiate`], [`respond`]: URLs and headers in, answers out.
//! * [`protobuf`]: bodies in that form.
//! * [`core`](self::core): what the handlers share, and their way into the store.
//! * [`objects`]: one set of handlers for all resources.
//! * [`security`]: who decides who may do what.
//! * [`services`]: addresses and node ports.
//! * [`streams`]: what kubelets and pods answer.
//! * [`bootstrap`], [`expiry`]: what is there from the start, and what does not stay.
//!
//! The service is a plain tower service over hyper. There is no filter or routing library in
//! between: resources come and go at run time, so all paths would go to one catch-all; the client's
//! certificate and the pending upgrade travel in the request's extensions, which a layer in between
//! would have to be taught; and in-process callers call the very same service.
//!
//! What is never done: a user is never taken from anything that came over a connection but through
//! the authenticator; [`UserInfo`] in a request's extensions can come from this process only.

mod accept;
mod account_secrets;
mod bootstrap;
mod config;
pub(crate) mod core;
mod expiry;
mod idle;
mod negotiate;
mod nonresource;
pub(crate) mod objects;
mod openapi;
mod peers;
mod protobuf;
mod refusal;
pub(crate) mod request;
mod respond;
mod security;
mod service;
mod services;
mod streams;
#[cfg(test)]
mod tests;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use http::Request;
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt as _;

pub use config::{ApiServerConfig, Limits, MakeSecurity, Security};
pub use respond::{Body, BoxError};
pub use security::{Answers, ClusterSecurity};
pub use service::ApiService;

use self::{bootstrap::Endpoint, core::Core, services::ServiceAllocator};
use crate::{
    auth::UserInfo,
    cache::Cache,
    lookup::Lookup,
    metrics::Metrics,
    registry::Registry,
    status::Status,
    store::{
        Store, StoreError,
        embedded::{EmbeddedOptions, EmbeddedStore},
    },
};

/// How long all tasks may take to end after the shutdown.
const STOP: Duration = Duration::from_secs(10);

/// Why the API server can't start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The data directory can't be made.
    #[error("could not make the data directory {path}: {source}")]
    DataDir {
        /// Which.
        path: std::path::PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The store can't be opened or read.
    #[error("could not open the store: {0}")]
    Store(#[from] StoreError),
    /// The address can't be listened on.
    #[error("could not listen on {address}: {source}; is another API server running?")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// There is nowhere to take the addresses of Services from.
    #[error("no Service address range is configured: name one, such as 10.96.0.0/12")]
    NoServiceRange,
    /// Authentication and authorization can't be set up.
    #[error("could not set up authentication and authorization: {0}")]
    Security(BoxError),
    /// Metrics can't be registered.
    #[error("could not register the metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// What a cluster can't be without can't be made.
    #[error("could not furnish the cluster: {0}")]
    Bootstrap(#[from] Status),
}

/// A running API server.
pub struct ApiServer {
    core: Arc<Core>,
    address: SocketAddr,
}

impl ApiServer {
    /// Opens the store, fills the watch cache, makes what a cluster can't be without, and serves
    /// until `shutdown`. Returns when it is ready.
    ///
    /// # Errors
    /// See [`StartError`]. Nothing is left running then.
    pub async fn start(
        config: ApiServerConfig,
        shutdown: CancellationToken,
    ) -> Result<Self, StartError> {
        // A start that fails takes down what it had begun; so does dropping the parent's token.
        let shutdown = shutdown.child_token();
        let guard = shutdown.clone().drop_guard();
        if config.service_cidrs.is_empty() {
            return Err(StartError::NoServiceRange);
        }
        let listener = TcpListener::bind(config.bind_address)
            .await
            .map_err(|source| StartError::Listen { address: config.bind_address, source })?;
        let address = listener
            .local_addr()
            .map_err(|source| StartError::Listen { address: config.bind_address, source })?;
        let store = open_store(config.data_dir).await?;
        let registry = Registry::builtin();
        let cache = Arc::new(Cache::load(&registry, &*store).await?);
        let tasks = TaskTracker::new();
        tasks.spawn(Arc::clone(&cache).run(Arc::clone(&store), shutdown.clone()));
        cache.reach(store.current_revision().await?).await;

        let metrics = Metrics::register(&config.metrics, Arc::clone(&cache))?;
        let lookup: Arc<dyn Lookup> = cache.clone();
        let security = (config.security)(lookup).map_err(StartError::Security)?;
        let services = cache.list("", "services", None);
        let core = Arc::new(Core {
            registry,
            store,
            services: ServiceAllocator::new(
                &config.service_cidrs,
                config.node_ports,
                services.iter().map(|service| &**service),
            ),
            cache,
            security,
            reads: Arc::new(Semaphore::new(config.limits.max_reads_in_flight)),
            writes: Arc::new(Semaphore::new(config.limits.max_writes_in_flight)),
            limits: config.limits,
            metrics,
            documents: crate::openapi::Documents::default(),
            registered: config.metrics,
            kubelet_tls: config.kubelet_tls,
            advertised: SocketAddr::new(config.advertise_address, address.port()).to_string(),
            bootstrapped: AtomicBool::new(false),
            shutdown,
            tasks,
        });
        let endpoint = Endpoint { address: config.advertise_address, port: address.port() };
        bootstrap::reconcile(&core, endpoint, &config.bootstrap_objects).await?;
        core.bootstrapped.store(true, Ordering::Release);
        core.tasks.spawn(accept::run(Arc::clone(&core), listener, config.tls));
        core.tasks.spawn(account_secrets::run(Arc::clone(&core)));
        core.tasks.spawn(expiry::run(Arc::clone(&core), config.event_ttl));
        guard.disarm();
        tracing::info!(%address, "the API server is ready");
        Ok(Self { core, address })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its watch cache.
    #[must_use]
    pub fn lookup(&self) -> Arc<dyn Lookup> {
        self.core.cache.clone()
    }

    /// Itself as a service. A request with a [`UserInfo`] in its extensions is made as that user.
    #[must_use]
    pub fn service(&self) -> ApiService {
        ApiService::new(Arc::clone(&self.core))
    }

    /// A client in this process, without socket and TLS, that acts as `user` and may do what that
    /// user may. Streams that need an upgrade (exec, attach, port-forward) are not possible with
    /// it: they take a connection.
    #[must_use]
    pub fn client(&self, mut user: UserInfo) -> kube::Client {
        let known = "system:authenticated";
        if !user.groups.iter().any(|group| group == known) {
            user.groups.push(known.to_owned());
        }
        let service = self.service().map_request(move |mut request: Request<_>| {
            request.extensions_mut().insert(user.clone());
            request
        });
        kube::Client::new(service, "default")
    }

    /// Waits until all has ended after the shutdown, and closes the store.
    pub async fn stopped(&self) {
        self.core.shutdown.cancelled().await;
        self.core.tasks.close();
        if tokio::time::timeout(STOP, self.core.tasks.wait()).await.is_err() {
            tracing::warn!("some tasks of the API server did not end in time");
        }
        self.core.store.close().await;
    }
}

async fn open_store(dir: std::path::PathBuf) -> Result<Arc<dyn Store>, StartError> {
    let opened = tokio::task::spawn_blocking(move || {
        std::fs::create_dir_all(&dir)
            .map_err(|source| StartError::DataDir { path: dir.clone(), source })?;
        let path = dir.join("store.redb");
        EmbeddedStore::open(&path, &EmbeddedOptions::default()).map_err(StartError::from)
    })
    .await;
    let store = opened.unwrap_or_else(|error| {
        Err(StoreError::Backend { path: "store.redb".into(), problem: error.to_string() }.into())
    })?;
    Ok(Arc::new(store))
}
