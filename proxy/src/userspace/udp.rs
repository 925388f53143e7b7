//! UDP: a task for each listener, which owns its clients; each client has a socket to its endpoint
//! and a task that carries the answers back.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use socket2::{Domain, SockRef, Socket, Type};
use tokio::{
    net::UdpSocket,
    task::{AbortHandle, JoinSet},
};
use tokio_util::sync::CancellationToken;

use super::{
    UdpTimes,
    dispatch::{Dispatch, Refusal},
    limits::{Place, Quota},
    recent::Recent,
};
use crate::model::{Endpoint, Protocol};

/// The largest datagram.
const DATAGRAM: usize = 65_535;
/// How many datagrams are carried before others have their turn.
const BURST: usize = 64;
/// The pause after a failure of the system, which would come again at once.
const PAUSE: Duration = Duration::from_millis(100);

/// A socket that takes datagrams.
pub(super) fn listen(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking(), None)?;
    super::free_bind(&SockRef::from(&socket), address)?;
    socket.bind(&address.into())?;
    UdpSocket::from_std(socket.into())
}

/// What a listener works with.
#[derive(Clone, Debug)]
pub(super) struct Relay {
    pub(super) dispatch: Arc<Dispatch>,
    pub(super) quota: Arc<Quota>,
    /// How many clients it may have.
    pub(super) clients: usize,
    /// How long an idle client is kept.
    pub(super) times: UdpTimes,
}

/// A client's way to its endpoint.
#[derive(Debug)]
struct Session {
    endpoint: Endpoint,
    socket: Arc<UdpSocket>,
    used: Arc<Used>,
    answers: AbortHandle,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.answers.abort();
    }
}

/// When something last passed, to the millisecond.
#[derive(Debug)]
struct Used {
    begin: Instant,
    millis: AtomicU64,
}

impl Used {
    fn now() -> Self {
        Self { begin: Instant::now(), millis: AtomicU64::new(0) }
    }

    fn touch(&self) {
        let millis = u64::try_from(self.begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.millis.store(millis, Ordering::Relaxed);
    }

    fn last(&self) -> Instant {
        self.begin + Duration::from_millis(self.millis.load(Ordering::Relaxed))
    }
}

/// Carries datagrams until `stop`; all of its sockets are closed when this returns.
pub(super) async fn serve(socket: UdpSocket, relay: Relay, stop: CancellationToken) {
    let mut server = Server {
        socket: Arc::new(socket),
        sessions: Recent::new(relay.clients),
        tasks: JoinSet::new(),
        relay,
    };
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            () = server.relay.dispatch.changed() => server.part(),
            Some(ended) = server.tasks.join_next_with_id() => {
                if let Ok((id, client)) = ended {
                    server.ended(id, client);
                }
            }
            ready = server.socket.readable() => {
                let carried = ready.and_then(|()| server.carry());
                if let Err(error) = carried {
                    tracing::warn!(%error, "can't take datagrams to a service; trying again");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
    server.tasks.shutdown().await;
}

#[derive(Debug)]
struct Server {
    socket: Arc<UdpSocket>,
    sessions: Recent<SocketAddr, Session>,
    tasks: JoinSet<SocketAddr>,
    relay: Relay,
}

impl Server {
    /// Parts clients from endpoints that are gone; their next datagram goes to another one.
    fn part(&mut self) {
        let dispatch = &self.relay.dispatch;
        self.sessions.retain(|client, session| dispatch.permits(client.ip(), session.endpoint));
    }

    /// A client was idle, or its endpoint refused it.
    fn ended(&mut self, id: tokio::task::Id, client: SocketAddr) {
        // It may have a new session by now.
        if self.sessions.get(&client).is_some_and(|session| session.answers.id() == id) {
            self.sessions.remove(&client);
        }
    }

    /// Takes what has come in. The buffer lives only as long: a node has very many idle listeners.
    fn carry(&mut self) -> io::Result<()> {
        let mut buffer = vec![0; DATAGRAM];
        for _ in 0..BURST {
            match self.socket.try_recv_from(&mut buffer) {
                Ok((length, client)) => self.forward(client, &buffer[..length]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn forward(&mut self, client: SocketAddr, datagram: &[u8]) {
        // A refusal is told by the next call on the socket: it was an earlier datagram's, and this
        // one has another chance.
        for _ in 0..2 {
            let session = match self.session(client) {
                Ok(session) => session,
                Err(refusal) => {
                    if let Some(refusal) = refusal {
                        self.relay.quota.refused(refusal.as_str());
                    }
                    return;
                }
            };
            session.used.touch();
            match SockRef::from(&*session.socket).send(datagram) {
                // What doesn't fit is lost, as datagrams are.
                Ok(_) => return,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::debug!(endpoint = %session.endpoint, %client, %error, "a datagram was refused");
                    self.sessions.remove(&client);
                }
            }
        }
    }

    /// The client's session, or a new one. An error without a refusal was reported already.
    fn session(&mut self, client: SocketAddr) -> Result<&Session, Option<Refusal>> {
        if self.sessions.touch(&client).is_none() {
            let endpoint = self.relay.dispatch.choose(client.ip(), &[], Instant::now())?;
            let place = self.place()?;
            let socket = match connected(endpoint) {
                Ok(socket) => Arc::new(socket),
                Err(error) => {
                    tracing::debug!(%endpoint, %client, %error, "an endpoint can't be reached");
                    return Err(Some(Refusal::NoEndpoint));
                }
            };
            let used = Arc::new(Used::now());
            let answers = self.tasks.spawn(answer(
                Arc::clone(&self.socket),
                client,
                Arc::clone(&socket),
                Arc::clone(&used),
                self.relay.times,
                place,
            ));
            self.sessions.insert(client, Session { endpoint, socket, used, answers });
        }
        self.sessions.get(&client).ok_or(None)
    }

    /// A place for one more client: if there is none at all, that of this listener's client that
    /// was silent longest.
    fn place(&mut self) -> Result<Place, Option<Refusal>> {
        if let Some(place) = self.relay.quota.take(Protocol::Udp) {
            return Ok(place);
        }
        self.relay.quota.exceeded();
        // Its place is free as soon as its task has ended; a later datagram finds it.
        self.sessions.evict();
        Err(None)
    }
}

/// Carries answers back until the client is idle or the endpoint refuses.
async fn answer(
    listener: Arc<UdpSocket>,
    client: SocketAddr,
    socket: Arc<UdpSocket>,
    used: Arc<Used>,
    times: UdpTimes,
    _place: Place,
) -> SocketAddr {
    let mut idle = times.single;
    loop {
        let until = used.last() + idle;
        let Ok(ready) = tokio::time::timeout_at(until.into(), socket.readable()).await else {
            if used.last() + idle <= Instant::now() {
                return client;
            }
            continue;
        };
        if ready.is_err() {
            return client;
        }
        let mut buffer = vec![0; DATAGRAM];
        for _ in 0..BURST {
            match socket.try_recv(&mut buffer) {
                Ok(length) => {
                    if used.begin.elapsed() >= times.stream_after {
                        idle = times.stream;
                    }
                    used.touch();
                    // A client that is gone is its own affair.
                    let _ = listener.send_to(&buffer[..length], client).await;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return client,
            }
        }
    }
}

/// A socket that hears this endpoint only.
fn connected(endpoint: Endpoint) -> io::Result<UdpSocket> {
    let address = SocketAddr::new(endpoint.address, endpoint.port);
    let any: SocketAddr = match address {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = std::net::UdpSocket::bind(any)?;
    socket.set_nonblocking(true)?;
    socket.connect(address)?;
    UdpSocket::from_std(socket)
}
