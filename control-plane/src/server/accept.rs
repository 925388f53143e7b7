//! Connections: TLS, HTTP/1.1 and HTTP/2.
//!
//! A place is taken from the accept on, so each step towards a request has its time: the handshake,
//! the first request, and the pauses between requests. The protocol is what the handshake agreed on
//! (ALPN); nothing is guessed from first bytes that may never come.

use std::{
    convert::Infallible,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use http::Request;
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::pki_types::UnixTime;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::Service as _;

use super::{
    core::Core,
    idle::{Busy, ServedBody},
    peers::Peers,
    service::{ApiService, Peer},
};
use crate::pki::{ApiServerTls, client_certificates::ClientAuthority};

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long requests that are being served may go on after a shutdown began.
const DRAIN: Duration = Duration::from_secs(5);
/// Wait after an accept that failed for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long a client may take to agree that an idle connection ends.
const GOODBYE: Duration = Duration::from_secs(10);
/// HTTP/2 streams of a connection at a time, as kube-apiserver has it.
const STREAMS: u32 = 100;

/// Serves until the shutdown, and then until what was begun is done or [`DRAIN`] is over.
pub(crate) async fn run(core: Arc<Core>, listener: TcpListener, tls: ApiServerTls) {
    let acceptor = TlsAcceptor::from(tls.config);
    let clients = tls.clients;
    let room = Arc::new(Semaphore::new(core.limits.max_connections));
    let peers = Peers::new(core.limits.max_connections_per_peer);
    let connections = TaskTracker::new();
    let cut_off = CancellationToken::new();
    loop {
        let accepted = tokio::select! {
            () = core.shutdown.cancelled() => break,
            accepted = accept(&listener, &room) => accepted,
        };
        let Some((stream, peer, place)) = accepted else { continue };
        let own = stream.local_addr().ok().map(|own| own.ip());
        let Some(peers_place) = peers.enter(peer.ip(), own) else {
            tracing::debug!(%peer, "a connection was refused: its peer has too many");
            continue;
        };
        let connection = serve(Arc::clone(&core), acceptor.clone(), clients.clone(), stream, peer);
        let cut_off = cut_off.clone();
        core.tasks.spawn(connections.track_future(async move {
            tokio::select! {
                () = connection => {}
                () = cut_off.cancelled() => {}
            }
            drop((place, peers_place));
        }));
    }
    drop(listener);
    connections.close();
    if tokio::time::timeout(DRAIN, connections.wait()).await.is_err() {
        tracing::warn!("some requests were cut off by the shutdown");
    }
    cut_off.cancel();
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
    clients: ClientAuthority,
    stream: TcpStream,
    peer: SocketAddr,
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
        .filter(|chain| !chain.is_empty())
        .map(|chain| clients.judge(chain, UnixTime::now()));
    let speaks_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    let info = Peer { certificate };
    let api = ApiService::new(Arc::clone(&core));
    let busy = Busy::default();
    let counter = busy.clone();
    let service = service_fn(move |mut request: Request<Incoming>| {
        let served = counter.begin();
        request.extensions_mut().insert(info.clone());
        let answer = api.clone().call(request);
        async move {
            let answer = answer.await?;
            Ok::<_, Infallible>(answer.map(|body| ServedBody { body, _served: served }))
        }
    });
    let limits = &core.limits;
    let stream = TokioIo::new(stream);
    let ended = if speaks_http2 {
        let connection = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .max_concurrent_streams(STREAMS)
            .max_header_list_size(64 << 10)
            .keep_alive_interval(Some(Duration::from_secs(30)))
            .keep_alive_timeout(Duration::from_secs(15))
            .serve_connection(stream, service);
        see_through(&core, &busy, connection, |open| open.graceful_shutdown()).await
    } else {
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            // Counts between requests too.
            .header_read_timeout(limits.header_timeout.max(limits.idle_timeout))
            .max_buf_size(64 << 10)
            .serve_connection(stream, service)
            .with_upgrades();
        see_through(&core, &busy, connection, |open| open.graceful_shutdown()).await
    };
    if let Err(error) = ended {
        tracing::debug!(%peer, %error, "a connection broke off");
    }
}

/// Serves a connection until its end, which the shutdown brings about, or that nothing happens.
async fn see_through<C, E>(
    core: &Core,
    busy: &Busy,
    connection: C,
    say_goodbye: impl FnOnce(Pin<&mut C>),
) -> Result<(), E>
where
    C: Future<Output = Result<(), E>>,
{
    let limits = &core.limits;
    let mut connection = pin!(connection);
    let idle = tokio::select! {
        ended = connection.as_mut() => return ended,
        () = core.shutdown.cancelled() => false,
        () = busy.idle(limits.header_timeout, limits.idle_timeout) => true,
    };
    say_goodbye(connection.as_mut());
    if idle {
        // A client that answers no more is not waited for; requests that came meanwhile are.
        let patience = GOODBYE.min(limits.idle_timeout);
        let silent = busy.idle(patience, patience);
        tokio::select! {
            ended = connection => ended,
            () = silent => Ok(()),
        }
    } else {
        connection.await
    }
}
