//! Connections: TLS, HTTP/1.1 and HTTP/2.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use http::Request;
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt as _;

use super::{
    core::Core,
    service::{ApiService, Peer},
};

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// A client must have sent the head of its request by then.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long requests that are being served may go on after a shutdown began.
const DRAIN: Duration = Duration::from_secs(5);
/// Wait after an accept that failed for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// HTTP/2 streams of a connection at a time, as kube-apiserver has it.
const STREAMS: u32 = 100;

/// Serves until the shutdown, and then until what was begun is done or [`DRAIN`] is over.
pub(crate) async fn run(core: Arc<Core>, listener: TcpListener, tls: Arc<rustls::ServerConfig>) {
    let acceptor = TlsAcceptor::from(tls);
    let room = Arc::new(Semaphore::new(core.limits.max_connections));
    let graceful = Arc::new(GracefulShutdown::new());
    loop {
        let accepted = tokio::select! {
            () = core.shutdown.cancelled() => break,
            accepted = accept(&listener, &room) => accepted,
        };
        let Some((stream, peer, place)) = accepted else { continue };
        let connection =
            serve(Arc::clone(&core), acceptor.clone(), stream, peer, graceful.watcher());
        core.tasks.spawn(async move {
            connection.await;
            drop(place);
        });
    }
    drop(listener);
    // Nobody else holds it: connections hold watchers.
    if let Some(graceful) = Arc::into_inner(graceful)
        && tokio::time::timeout(DRAIN, graceful.shutdown()).await.is_err()
    {
        tracing::warn!("some requests were cut off by the shutdown");
    }
}

async fn accept(
    listener: &TcpListener,
    room: &Arc<Semaphore>,
) -> Option<(TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit)> {
    // Further clients wait in the kernel's queue.
    let place = Arc::clone(room).acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((stream, peer)) => Some((stream, peer, place)),
        Err(error) => {
            tracing::warn!(%error, "could not accept a connection");
            tokio::time::sleep(ACCEPT_PAUSE).await;
            None
        }
    }
}

async fn serve(
    core: Arc<Core>,
    acceptor: TlsAcceptor,
    stream: TcpStream,
    peer: SocketAddr,
    graceful: hyper_util::server::graceful::Watcher,
) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%peer, %error, "could not set TCP_NODELAY");
    }
    let handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream));
    let stream = match handshake.await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            core.metrics.tls_error();
            tracing::debug!(%peer, %error, "a TLS handshake failed");
            return;
        }
        Err(_) => {
            core.metrics.tls_error();
            return;
        }
    };
    let certificate = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| chain.first())
        .map(|certificate| Arc::from(certificate.as_ref()));
    let info = Peer { certificate };
    let service =
        ApiService::new(Arc::clone(&core)).map_request(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(info.clone());
            request
        });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(64 << 10);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(64 << 10)
        .keep_alive_interval(Some(Duration::from_secs(30)))
        .keep_alive_timeout(Duration::from_secs(15));
    let connection = builder
        .serve_connection_with_upgrades(
            TokioIo::new(stream),
            TowerToHyperService::new(service.map_err(|never: Infallible| match never {})),
        )
        .into_owned();
    if let Err(error) = graceful.watch(connection).await {
        tracing::debug!(%peer, %error, "a connection broke off");
    }
}
