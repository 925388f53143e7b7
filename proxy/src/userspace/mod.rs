//! The userspace backend: relays in this process, for where no packet filter may be touched.
//!
//! ```text
//!   Goal ─► plan: Changes ─► apply: the thread of the relays
//!   (proxy's thread, pure)      │
//!                               ├─ routes     a local route for each service address
//!                               ├─ tcp, udp   a listener for each address and port, a task each
//!                               │     └─ dispatch   which endpoint a client gets
//!                               └─ observe    which addresses the node has, and where its pods are
//! ```
//!
//! | task or thread | what it owns | ends |
//! |---|---|---|
//! | `userspace-IPv4`, a thread | routes, listeners, the runtime of all below | with [`Relays`], which waits for it |
//! | two tasks for netlink | sockets to the kernel's routes | with [`routes::Routes`] and [`routes::Monitor`] |
//! | a task per listener | its socket; for UDP the clients and their sockets | when its port has no endpoint any more |
//! | a task per TCP connection | both of its sockets | with the connection, or with its address's route |
//! | a task per UDP client | nothing that outlives it | idle, or when its endpoint is gone |
//!
//! A change of endpoints swaps what a listener's [`dispatch::Dispatch`] knows and touches no socket.
//! Everything here must go when the proxy stops: a route without a listener behind it is a Service
//! that resets connections.
//!
//! **Endpoints see this node's address, never the client's.** That, and what else relays can't do,
//! is in this folder's `README.md`.

mod apply;
mod dispatch;
mod holder;
mod limits;
pub(crate) mod metrics;
mod observe;
mod plan;
mod recent;
mod routes;
mod tcp;
mod text;
mod udp;

#[cfg(test)]
mod event_test;
#[cfg(test)]
mod fixture;
#[cfg(test)]
mod routes_test;
#[cfg(test)]
mod tcp_test;
#[cfg(test)]
mod udp_test;

use std::{
    io,
    sync::mpsc as blocking,
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

use self::{
    apply::{Order, Relaying},
    plan::{Changes, Front},
};
pub(crate) use self::{limits::Limits, metrics::RelayMetrics, text::text};
use crate::{
    backend::{Applied, Backend, BackendError, Forget, Goal},
    config::{DetectLocal, NodePortAddresses},
    model::{Family, Protocol},
    ruleset::Unit,
};

/// How many orders may wait. Whoever orders waits for the answer, so there is never more than one.
const ORDERS: usize = 1;
/// How long a stop waits for listeners and routes to go.
pub(crate) const STOP: Duration = Duration::from_secs(10);
/// What users lose with this mode, for the log.
pub(crate) const WARNING: &str = "this process relays every connection; endpoints and \
    NetworkPolicies see the node's address instead of the client's, connections end when the proxy \
    does, and SCTP is not served";

/// What the relays can be told.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Which family.
    pub(crate) family: Family,
    /// Which clients are pods.
    pub(crate) detect_local: DetectLocal,
    /// Which of the node's addresses answer on node ports.
    pub(crate) node_port_addresses: NodePortAddresses,
    /// Whether loopback is among them, where it is in their ranges.
    pub(crate) localhost_node_ports: bool,
    /// How much there may be of what.
    pub(crate) limits: Limits,
    /// How long UDP clients are remembered.
    pub(crate) udp: UdpTimes,
    /// How long after a failure the node's network is looked at again.
    pub(crate) retry: Duration,
    /// Where it is counted.
    pub(crate) metrics: Option<RelayMetrics>,
}

impl Settings {
    /// What the proxy does unless told otherwise.
    pub(crate) fn new(family: Family) -> Self {
        Self {
            family,
            detect_local: DetectLocal::default(),
            node_port_addresses: NodePortAddresses::Primary,
            localhost_node_ports: true,
            limits: Limits::default(),
            udp: UdpTimes::default(),
            retry: Duration::from_secs(5),
            metrics: None,
        }
    }
}

/// How long an idle UDP client is remembered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UdpTimes {
    /// After a question, or a question and its answer.
    pub(crate) single: Duration,
    /// After a conversation.
    pub(crate) stream: Duration,
    /// An answer so long after the first datagram makes it a conversation.
    pub(crate) stream_after: Duration,
}

impl Default for UdpTimes {
    /// Those of the kernel's connection table.
    fn default() -> Self {
        Self {
            single: Duration::from_secs(30),
            stream: Duration::from_secs(120),
            stream_after: Duration::from_secs(2),
        }
    }
}

/// The relays of one family.
///
/// Sockets and routes are in the network namespace of the thread that opened it, whoever calls it
/// later.
#[derive(Debug)]
pub(crate) struct Relays {
    family: Family,
    orders: Option<mpsc::Sender<Order>>,
    ended: blocking::Receiver<()>,
    rules: usize,
}

impl Relays {
    /// Starts the thread; nothing is listened on yet, and what a killed run left stays until the
    /// first [`Backend::synchronize`].
    ///
    /// # Errors
    /// When there is no thread, runtime or netlink socket to be had.
    pub(crate) fn open(settings: Settings) -> Result<Self, BackendError> {
        let family = settings.family;
        let failed = |doing: &str, source| BackendError::Io { doing: doing.into(), source };
        let (orders, queue) = mpsc::channel(ORDERS);
        let (ready, started) = blocking::channel();
        let (end, ended) = blocking::channel::<()>();
        std::thread::Builder::new()
            .name(format!("userspace-{}", family.as_str()))
            .spawn(move || {
                // Dropped last: then all is closed.
                let _end = end;
                run(settings, queue, &ready);
            })
            .map_err(|source| failed("start the relays' thread", source))?;
        match started.recv() {
            Ok(Ok(())) => {}
            Ok(Err(source)) if source.kind() == io::ErrorKind::PermissionDenied => {
                let doing = "change local routes, for which CAP_NET_ADMIN is needed in the user \
                     namespace that the network namespace belongs to";
                return Err(failed(doing, source));
            }
            Ok(Err(source)) => return Err(failed("start the relays", source)),
            Err(_) => return Err(ended_by_itself()),
        }
        Ok(Self { family, orders: Some(orders), ended, rules: 0 })
    }

    fn order<T>(
        &self,
        order: impl FnOnce(blocking::Sender<Result<T, BackendError>>) -> Order,
    ) -> Result<T, BackendError> {
        let (answer, answered) = blocking::channel();
        let orders = self.orders.as_ref().ok_or_else(ended_by_itself)?;
        orders.try_send(order(answer)).map_err(|_| ended_by_itself())?;
        answered.recv().map_err(|_| ended_by_itself())?
    }

    fn bring(&mut self, changes: Changes, goal: Goal<'_>) -> Result<Applied, BackendError> {
        let mut refused: Vec<(Front, BackendError)> = changes
            .rules
            .iter()
            .filter(|(front, rule)| front.protocol == Protocol::Sctp && rule.is_some())
            .map(|(front, _)| (*front, no_sctp()))
            .collect();
        let brought = self.order(|answer| Order::Bring { changes, answer })?;
        self.rules = brought.rules;
        refused.extend(brought.refused);
        let refused = refused
            .into_iter()
            .map(|(front, error)| {
                (Unit::Frontend(front.frontend(self.family, goal.desired)), error)
            })
            .chain(
                brought
                    .refused_addresses
                    .into_iter()
                    .map(|(set, address, error)| (Unit::Address(set, address), error)),
            )
            .collect();
        Ok(Applied { elements: brought.changed, refused, ..Applied::default() })
    }
}

impl Backend for Relays {
    fn family(&self) -> Family {
        self.family
    }

    fn synchronize(&mut self, goal: Goal<'_>) -> Result<Applied, BackendError> {
        self.bring(Changes::all(self.family, goal.desired), goal)
    }

    fn apply(&mut self, units: &[Unit], goal: Goal<'_>) -> Result<Applied, BackendError> {
        self.bring(Changes::of(self.family, units, goal.desired), goal)
    }

    fn forget(&mut self, _forget: &[Forget]) -> Result<(), BackendError> {
        // A choice that isn't among a port's endpoints any more is never taken.
        Ok(())
    }

    fn units(&self) -> usize {
        self.rules
    }

    fn tracks_connections(&self) -> bool {
        false
    }

    fn remove(&mut self) -> Result<(), BackendError> {
        self.rules = 0;
        self.order(|answer| Order::Remove { answer })
    }
}

impl Drop for Relays {
    /// Ends all relays and takes the routes away, and waits for it.
    fn drop(&mut self) {
        self.orders = None;
        if self.ended.recv_timeout(STOP) == Err(blocking::RecvTimeoutError::Timeout) {
            tracing::error!(
                family = self.family.as_str(),
                "the relays take too long to stop; their routes may stay"
            );
        }
    }
}

/// Removes the routes of relays that were killed, of a family, in this thread's namespace. Nobody
/// may relay there.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn remove_leftovers(family: Family) -> Result<(), BackendError> {
    Relays::open(Settings::new(family))?.remove()
}

/// The thread's life.
fn run(settings: Settings, queue: mpsc::Receiver<Order>, ready: &blocking::Sender<io::Result<()>>) {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(4));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .thread_name("relay")
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = ready.send(Err(error));
            return;
        }
    };
    runtime.block_on(async {
        match Relaying::open(settings).await {
            Ok(relaying) => {
                let _ = ready.send(Ok(()));
                relaying.run(queue).await;
            }
            Err(error) => {
                let _ = ready.send(Err(error));
            }
        }
    });
    let begin = Instant::now();
    runtime.shutdown_timeout(Duration::from_secs(1));
    tracing::debug!(took = ?begin.elapsed(), "relays ended");
}

/// Lets a socket listen where the node has no address of its own.
fn free_bind(socket: &socket2::SockRef<'_>, address: std::net::SocketAddr) -> io::Result<()> {
    if address.is_ipv4() {
        return socket.set_freebind_v4(true);
    }
    socket.set_only_v6(true)?;
    socket.set_freebind_v6(true)
}

fn ended_by_itself() -> BackendError {
    BackendError::Io {
        doing: "reach the relays".into(),
        source: io::Error::new(io::ErrorKind::BrokenPipe, "their thread has ended"),
    }
}

fn no_sctp() -> BackendError {
    BackendError::Unsupported("the userspace mode doesn't relay SCTP; the others serve it".into())
}
