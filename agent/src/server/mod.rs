//! The kubelet's HTTPS API, port 10250: what the API server, Prometheus and operators ask a node.
//!
//! ```text
//!   TLS ─► who asks, and may they? (`access`) ─► what for? (`path`) ─┬─ pods, metrics, statistics
//!                                                                    ├─ `logs`: a file, followed
//!                                                                    └─ `streaming`: upgraded
//! ```
//!
//! `/healthz` is also answered without TLS on a port of its own, for this machine only (10248).
//! Every connection and every stream is a task of the server's: at shutdown they are cancelled and
//! waited for. Connections are bounded; a client that asks too slowly is cut off.

mod access;
mod answer;
mod logs;
mod path;
mod streaming;

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use http::{Method, Request, StatusCode};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use k8s_openapi::api::core::v1::Pod;
use keelson_runtime_shim::{
    PodRuntime,
    runtime::{ContainerState, ContainerStatus, ExecRequest},
};
use kube::Client;
use prometheus::Registry;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use self::access::AccessConfig;
use self::{
    access::{Access, Denied},
    answer::{Answer, json, metrics, refused, text},
    path::{PodPath, Target, is_set},
};
use crate::{
    pods::{PodDirectory, RuntimePod},
    pulse::Pulse,
    stats::Statistics,
};

/// Connections at the same time.
const MAX_CONNECTIONS: usize = 512;
/// How long a TLS handshake, or the head of a request, may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Commands in one exec request.
const MAX_ARGUMENTS: usize = 4096;

/// What the server needs.
pub struct ServerConfig {
    /// Where to listen (`address`, `port`).
    pub address: SocketAddr,
    /// The serving certificate; client certificates are optional, and verified where given.
    pub tls: Arc<rustls::ServerConfig>,
    /// Where `/healthz` is answered without TLS (`healthzBindAddress`, `healthzPort`); nowhere if
    /// absent.
    pub healthz: Option<SocketAddr>,
    /// Who may ask.
    pub access: AccessConfig,
    /// exec, attach, logs and port-forward are served (`enableDebuggingHandlers`).
    pub debugging_handlers: bool,
    /// What `/configz` shows: the KubeletConfiguration in force.
    pub config: serde_json::Value,
    /// Printed at `/metrics`.
    pub metrics: Registry,
    /// Printed at `/metrics/probes`.
    pub probe_metrics: Registry,
}

/// What the server reads from.
pub struct ServerSources {
    /// The node's pods.
    pub pods: Arc<dyn PodDirectory>,
    /// What runs them.
    pub runtime: Arc<dyn PodRuntime>,
    /// What they use.
    pub statistics: Arc<Statistics>,
    /// The API server, for token and access reviews.
    pub client: Option<Client>,
    /// Whether the agent's loop turns, for `/healthz`.
    pub pulse: Arc<Pulse>,
}

/// The server can't be started.
#[derive(Debug, thiserror::Error)]
#[error("kubelet API: listen on {address}: {source}")]
pub struct ListenError {
    /// The address.
    pub address: SocketAddr,
    /// What the system said.
    pub source: std::io::Error,
}

/// A server that listens.
pub struct KubeletServer {
    listener: TcpListener,
    healthz: Option<TcpListener>,
    shared: Arc<Shared>,
}

struct Shared {
    config: ServerConfig,
    sources: ServerSources,
    access: Access,
    streams: TaskTracker,
    shutdown: CancellationToken,
}

impl KubeletServer {
    /// Starts to listen.
    ///
    /// # Errors
    /// When an address is in use or not this machine's.
    pub async fn bind(
        config: ServerConfig,
        sources: ServerSources,
        shutdown: CancellationToken,
    ) -> Result<Self, ListenError> {
        let listen = async |address: SocketAddr| {
            TcpListener::bind(address).await.map_err(|source| ListenError { address, source })
        };
        let listener = listen(config.address).await?;
        let healthz = match config.healthz {
            Some(address) => Some(listen(address).await?),
            None => None,
        };
        let access = Access::new(config.access.clone(), sources.client.clone());
        let shared = Shared { config, sources, access, streams: TaskTracker::new(), shutdown };
        Ok(Self { listener, healthz, shared: Arc::new(shared) })
    }

    /// Serves until the shutdown, and returns when the last connection has ended.
    pub async fn run(self) {
        let Self { listener, healthz, shared } = self;
        let secure = serve_tls(listener, Arc::clone(&shared));
        let plain = async {
            if let Some(healthz) = healthz {
                serve_healthz(healthz, Arc::clone(&shared)).await;
            }
        };
        tokio::join!(secure, plain);
        shared.streams.close();
        shared.streams.wait().await;
    }
}

async fn serve_tls(listener: TcpListener, shared: Arc<Shared>) {
    // HTTP/1.1 alone: streams are upgraded, and the API server's proxy speaks it.
    let mut tls = rustls::ServerConfig::clone(&shared.config.tls);
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let connections = TaskTracker::new();
    while let Some((stream, place)) = next(&listener, &places, &shared.shutdown).await {
        let (acceptor, shared) = (acceptor.clone(), Arc::clone(&shared));
        connections.spawn(async move {
            let _place = place;
            let shutdown = shared.shutdown.clone();
            tokio::select! {
                () = serve_connection(acceptor, stream, shared) => {}
                () = shutdown.cancelled() => {}
            }
        });
    }
    connections.close();
    connections.wait().await;
}

async fn next(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
    shutdown: &CancellationToken,
) -> Option<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let accept = async {
        let place = Arc::clone(places).acquire_owned().await.ok()?;
        loop {
            match listener.accept().await {
                Ok((stream, _)) => return Some((stream, place)),
                // Out of descriptors, or a client that was gone at once: the next may do.
                Err(error) => {
                    tracing::warn!(%error, "kubelet API: connection not accepted");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    };
    tokio::select! {
        accepted = accept => accepted,
        () = shutdown.cancelled() => None,
    }
}

async fn serve_connection(acceptor: TlsAcceptor, stream: TcpStream, shared: Arc<Shared>) {
    let _ = stream.set_nodelay(true);
    let stream = match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%error, "kubelet API: TLS handshake"),
        Err(_) => return,
    };
    let certificate: Option<Arc<[u8]>> = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| chain.first())
        .map(|certificate| Arc::from(certificate.as_ref()));
    let service = service_fn(move |request| {
        let (shared, certificate) = (Arc::clone(&shared), certificate.clone());
        async move { Ok::<_, Infallible>(answer(shared, certificate, request).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HANDSHAKE)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    if let Err(error) = connection.await {
        tracing::debug!(%error, "kubelet API: connection");
    }
}

async fn serve_healthz(listener: TcpListener, shared: Arc<Shared>) {
    let places = Arc::new(Semaphore::new(16));
    let connections = TaskTracker::new();
    while let Some((stream, place)) = next(&listener, &places, &shared.shutdown).await {
        let shared = Arc::clone(&shared);
        let shutdown = shared.shutdown.clone();
        connections.spawn(async move {
            let _place = place;
            let service = service_fn(|request: Request<Incoming>| {
                let answer = match Target::parse(request.uri().path()) {
                    Some(Target::Health) => health(&shared.sources.pulse),
                    _ => refused(StatusCode::NOT_FOUND, "404 page not found"),
                };
                async move { Ok::<_, Infallible>(answer) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HANDSHAKE)
                .serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                _ = connection => {}
                () = shutdown.cancelled() => {}
            }
        });
    }
    connections.close();
    connections.wait().await;
}

/// The kubelet's answer, and its words when its loop no longer turns.
fn health(pulse: &Pulse) -> Answer {
    if pulse.is_alive() {
        text(StatusCode::OK, "ok")
    } else {
        let why = "sync Loop took longer than expected";
        refused(StatusCode::INTERNAL_SERVER_ERROR, why)
    }
}

async fn answer(
    shared: Arc<Shared>,
    certificate: Option<Arc<[u8]>>,
    request: Request<Incoming>,
) -> Answer {
    let Some(target) = Target::parse(request.uri().path()) else {
        return refused(StatusCode::NOT_FOUND, "404 page not found");
    };
    let subresources = target.subresources();
    let checked = shared
        .access
        .check(certificate.as_deref(), request.headers(), request.method(), subresources)
        .await;
    match checked {
        Ok(()) => {}
        Err(Denied::Unauthorized) => return refused(StatusCode::UNAUTHORIZED, "Unauthorized"),
        Err(Denied::Forbidden(why)) => return refused(StatusCode::FORBIDDEN, &why),
        Err(Denied::Unknown(why)) => return refused(StatusCode::INTERNAL_SERVER_ERROR, &why),
    }
    if subresources == ["proxy"] && !shared.config.debugging_handlers {
        let why = "Debug endpoints are disabled (enableDebuggingHandlers)";
        return refused(StatusCode::METHOD_NOT_ALLOWED, why);
    }
    let streams = matches!(target, Target::Exec(..) | Target::Attach(..) | Target::PortForward(..));
    let allowed = matches!(*request.method(), Method::GET | Method::HEAD)
        || (streams && *request.method() == Method::POST);
    if !allowed {
        return refused(StatusCode::METHOD_NOT_ALLOWED, "405: Method Not Allowed");
    }
    route(&shared, target, request).await
}

async fn route(shared: &Shared, target: Target, request: Request<Incoming>) -> Answer {
    let query = path::query(request.uri().query());
    let sources = &shared.sources;
    match target {
        Target::Health => health(&sources.pulse),
        Target::Config => json(&serde_json::json!({"kubeletconfig": shared.config.config})),
        Target::Pods => pod_list(sources.pods.pods().iter().map(AsRef::as_ref)),
        Target::RunningPods => {
            let pods = sources.pods.pods();
            pod_list(pods.iter().map(AsRef::as_ref).filter(|pod| {
                let runtime =
                    pod.metadata.uid.as_deref().and_then(|uid| sources.pods.runtime_pod(uid));
                runtime.is_some_and(|pod| {
                    pod.containers.iter().any(|c| c.state == ContainerState::Running)
                })
            }))
        }
        Target::Metrics => encoded(&shared.config.metrics),
        Target::ProbeMetrics => encoded(&shared.config.probe_metrics),
        Target::ResourceMetrics => measured(sources.statistics.resource_metrics().await),
        Target::ContainerMetrics => measured(sources.statistics.container_metrics().await),
        Target::Summary => {
            let only = is_set(&query, &["only_cpu_and_memory"]);
            match sources.statistics.summary(only).await {
                Ok(summary) => json(&summary),
                Err(error) => refused(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
            }
        }
        Target::Logs(pod, container) => logs::container_logs(shared, &pod, &container, &query),
        Target::Exec(pod, container) => {
            let command: Vec<String> = query
                .iter()
                .filter(|(name, _)| name == "command")
                .map(|(_, v)| v.clone())
                .collect();
            if command.is_empty() || command.len() > MAX_ARGUMENTS {
                let why = format!("you must specify a command of 1 to {MAX_ARGUMENTS} parts");
                return refused(StatusCode::BAD_REQUEST, &why);
            }
            remote(shared, &pod, &container, &query, streaming::Command::Exec, command, request)
        }
        Target::Attach(pod, container) => remote(
            shared,
            &pod,
            &container,
            &query,
            streaming::Command::Attach,
            Vec::new(),
            request,
        ),
        Target::PortForward(pod) => {
            let (_, runtime_pod) = match find(shared, &pod) {
                Ok(found) => found,
                Err(answer) => return *answer,
            };
            let Some(sandbox) = runtime_pod.sandbox else {
                let why = format!("pod {}/{} is not running", pod.namespace, pod.name);
                return refused(StatusCode::NOT_FOUND, &why);
            };
            let ports = query
                .iter()
                .filter(|(name, _)| name == "port" || name == "ports")
                .flat_map(|(_, value)| value.split(','))
                .map(str::parse)
                .collect::<Result<Vec<u16>, _>>();
            match ports {
                Ok(ports) if !ports.contains(&0) => streaming::port_forward(
                    request,
                    Arc::clone(&sources.runtime),
                    sandbox.id,
                    ports,
                    &shared.streams,
                    shared.shutdown.clone(),
                ),
                _ => refused(StatusCode::BAD_REQUEST, "a port must be from 1 to 65535"),
            }
        }
    }
}

fn encoded(registry: &Registry) -> Answer {
    match keelson_api::metrics::encode(registry) {
        Ok(body) => metrics(body),
        Err(error) => refused(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

fn measured(result: Result<String, crate::stats::StatisticsError>) -> Answer {
    match result {
        Ok(body) => metrics(body),
        Err(error) => refused(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

fn pod_list<'a>(pods: impl Iterator<Item = &'a Pod>) -> Answer {
    let items: Vec<&Pod> = pods.collect();
    json(
        &serde_json::json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items}),
    )
}

/// The pod of a path, and what the runtime has of it.
fn find(shared: &Shared, path: &PodPath) -> Result<(Arc<Pod>, RuntimePod), Box<Answer>> {
    let missing = || {
        let why = format!("pod \"{}\" not found in namespace \"{}\"", path.name, path.namespace);
        Box::new(refused(StatusCode::NOT_FOUND, &why))
    };
    let pods = &shared.sources.pods;
    let pod = pods.pod(&path.namespace, &path.name).ok_or_else(missing)?;
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    if path.uid.as_deref().is_some_and(|wanted| wanted != uid) {
        return Err(missing());
    }
    let runtime_pod = pods.runtime_pod(uid).unwrap_or_default();
    Ok((pod, runtime_pod))
}

/// Attempts of a container, the newest first.
fn attempts<'a>(pod: &'a RuntimePod, name: &str) -> Vec<&'a ContainerStatus> {
    let mut attempts: Vec<&ContainerStatus> =
        pod.containers.iter().filter(|container| container.name == name).collect();
    attempts.sort_by_key(|attempt| std::cmp::Reverse(attempt.created_at));
    attempts
}

fn has_container(pod: &Pod, name: &str) -> bool {
    pod.spec.as_ref().is_some_and(|spec| {
        let init = spec.init_containers.iter().flatten().map(|c| &c.name);
        let ephemeral = spec.ephemeral_containers.iter().flatten().map(|c| &c.name);
        spec.containers.iter().map(|c| &c.name).chain(init).chain(ephemeral).any(|n| n == name)
    })
}

fn remote(
    shared: &Shared,
    path: &PodPath,
    container: &str,
    query: &[(String, String)],
    command: streaming::Command,
    arguments: Vec<String>,
    request: Request<Incoming>,
) -> Answer {
    let (pod, runtime_pod) = match find(shared, path) {
        Ok(found) => found,
        Err(answer) => return *answer,
    };
    let full_name = format!("{}_{}", path.name, path.namespace);
    if !has_container(&pod, container) {
        let why = format!("container {container} not found in pod {full_name}");
        return refused(StatusCode::NOT_FOUND, &why);
    }
    let attempts = attempts(&runtime_pod, container);
    let Some(running) = attempts.iter().find(|a| a.state == ContainerState::Running) else {
        let why = format!("container {container} in pod {full_name} is not running");
        return refused(StatusCode::NOT_FOUND, &why);
    };
    // `input` and so on are the kubelet's names; the API's are taken too.
    let tty = is_set(query, &["tty"]);
    let streams = ExecRequest {
        command: arguments,
        stdin: is_set(query, &["input", "stdin"]),
        stdout: is_set(query, &["output", "stdout"]),
        stderr: is_set(query, &["error", "stderr"]) && !tty,
        tty,
    };
    streaming::run(
        request,
        Arc::clone(&shared.sources.runtime),
        running.id.clone(),
        command,
        streams,
        &shared.streams,
        shared.shutdown.clone(),
    )
}
