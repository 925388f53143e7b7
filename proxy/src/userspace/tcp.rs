//! TCP: a listener, and a task for each connection.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::copy_bidirectional_with_sizes,
    net::{TcpListener, TcpSocket, TcpStream},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    dispatch::{Dispatch, Refusal},
    limits::Quota,
};
use crate::model::{Endpoint, Protocol};

/// Connections that wait to be taken.
const BACKLOG: u32 = 1_024;
/// How much is read at a time, in each direction.
const BUFFER: usize = 16 * 1024;
/// How many endpoints are tried for one connection.
const TRIES: usize = 4;
/// How long an endpoint may take to answer if another one can be tried, and if not.
const CONNECT: (Duration, Duration) = (Duration::from_secs(3), Duration::from_secs(15));
/// How long after the last byte the other end is asked whether it is still there, and how often.
const KEEP_ALIVE: (Duration, Duration, u32) =
    (Duration::from_secs(300), Duration::from_secs(30), 5);
/// The pause after a failure of the system, which would come again at once.
const PAUSE: Duration = Duration::from_millis(100);
/// How long resets may take to be sent.
const END: Duration = Duration::from_secs(1);

/// The connections that came by one address. They outlive their listener, not their address.
#[derive(Clone, Debug, Default)]
pub(super) struct Connections {
    tasks: TaskTracker,
    end: CancellationToken,
}

impl Connections {
    /// Resets all of them, and waits for it: a socket whose address is gone can't tell its peer.
    pub(super) async fn reset(self) {
        self.end.cancel();
        self.tasks.close();
        if tokio::time::timeout(END, self.tasks.wait()).await.is_err() {
            tracing::warn!("connections to a service that is gone don't end");
        }
    }
}

/// A socket that listens.
pub(super) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // Connections of the last run may still be closing.
    socket.set_reuseaddr(true)?;
    super::free_bind(&SockRef::from(&socket), address)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// What a listener works with.
#[derive(Clone, Debug)]
pub(super) struct Relay {
    pub(super) dispatch: Arc<Dispatch>,
    pub(super) quota: Arc<Quota>,
    pub(super) connections: Connections,
}

/// Takes connections until `stop`.
pub(super) async fn serve(listener: TcpListener, relay: Relay, stop: CancellationToken) {
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((client, address)) => {
                let Some(place) = relay.quota.take(Protocol::Tcp) else {
                    relay.quota.exceeded();
                    reset(&client);
                    continue;
                };
                let carried = relay.clone();
                relay.connections.tasks.spawn(async move {
                    let _place = place;
                    tokio::select! {
                        () = carry(&carried, client, address) => {}
                        () = carried.connections.end.cancelled() => {}
                    }
                });
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                tracing::warn!(%error, "can't take connections to a service; trying again");
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(PAUSE) => {}
                }
            }
        }
    }
}

/// One connection, to its end.
async fn carry(relay: &Relay, mut client: TcpStream, address: SocketAddr) {
    // Whatever ends this before both sides have closed is told to both by a reset.
    reset(&client);
    let mut endpoint = match connect(relay, address).await {
        Ok(endpoint) => endpoint,
        Err(refusal) => {
            relay.quota.refused(refusal.as_str());
            return;
        }
    };
    reset(&endpoint);
    for socket in [&client, &endpoint] {
        // They only make it better.
        let _ = socket.set_nodelay(true);
        let (idle, interval, retries) = KEEP_ALIVE;
        let keep_alive =
            TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(retries);
        let _ = SockRef::from(socket).set_tcp_keepalive(&keep_alive);
    }
    if copy_bidirectional_with_sizes(&mut client, &mut endpoint, BUFFER, BUFFER).await.is_ok() {
        for socket in [&client, &endpoint] {
            let _ = SockRef::from(socket).set_linger(None);
        }
    }
}

/// A connection to an endpoint for this client.
async fn connect(relay: &Relay, client: SocketAddr) -> Result<TcpStream, Refusal> {
    let mut tried: Vec<Endpoint> = Vec::new();
    let mut next = relay.dispatch.choose(client.ip(), &tried, Instant::now())?;
    loop {
        let endpoint = next;
        let last = tried.len() + 1 == TRIES || relay.dispatch.is_last(client.ip(), tried.len() + 1);
        let patience = if last { CONNECT.1 } else { CONNECT.0 };
        let connecting = TcpStream::connect(SocketAddr::new(endpoint.address, endpoint.port));
        let error = match tokio::time::timeout(patience, connecting).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => error,
            Err(_) => io::ErrorKind::TimedOut.into(),
        };
        tracing::debug!(%endpoint, %client, %error, "an endpoint can't be reached");
        tried.push(endpoint);
        if tried.len() == TRIES {
            return Err(Refusal::NoEndpoint);
        }
        next = relay.dispatch.choose(client.ip(), &tried, Instant::now())?;
    }
}

/// Makes a reset of the socket's end.
fn reset(socket: &TcpStream) {
    let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
}
