//! Where health checks are answered: one listener for each port and address.

use std::{
    collections::{BTreeMap, BTreeSet},
    future, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use http::{HeaderValue, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Bytes;
use k8s_openapi::api::core::v1::Service;
use keelson_api::{
    backoff::Backoff,
    events::{EventRecorder, EventType},
    object::reference_by_key,
};
use socket2::SockRef;
use tokio::{
    net::{TcpListener, TcpSocket},
    sync::watch,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use super::{Check, Checks};
use crate::{
    addresses::{Moves, local_addresses},
    config::NodePortAddresses,
    health::{self, Health},
    listen::everywhere,
    model::Family,
};

/// The first and the longest wait before a port that is taken is tried again.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// How many connections may wait to be taken.
const BACKLOG: u32 = 128;
/// The weight that load balancers may give this node: its number of endpoints.
const WEIGHT: &str = "x-load-balancing-endpoint-weight";

/// What the listeners' task needs.
pub(crate) struct Listening {
    pub(crate) checks: watch::Receiver<Arc<Checks>>,
    /// On which of the node's addresses.
    pub(crate) addresses: NodePortAddresses,
    pub(crate) families: Vec<Family>,
    pub(crate) health: Health,
    pub(crate) events: EventRecorder,
}

/// Keeps a listener for each port until `shutdown`.
pub(crate) async fn listen(listening: Listening, shutdown: CancellationToken) {
    let listening = Arc::new(listening);
    let mut checks = listening.checks.clone();
    let mut open: BTreeMap<(u16, SocketAddr), CancellationToken> = BTreeMap::new();
    let mut tasks = JoinSet::new();
    let mut moves = looks_at_interfaces(&listening.addresses).then(Moves::default);
    loop {
        let wanted: BTreeSet<(u16, SocketAddr)> = {
            let now = checks.borrow_and_update().clone();
            let addresses =
                listening_addresses(&listening.addresses, &now.node_addresses, &listening.families);
            let on = |port: u16| addresses.iter().map(move |a| (port, SocketAddr::new(*a, port)));
            now.by_port.keys().flat_map(|port| on(*port)).collect()
        };
        open.retain(|at, close| {
            let stays = wanted.contains(at);
            if !stays {
                close.cancel();
            }
            stays
        });
        for at in wanted {
            open.entry(at).or_insert_with(|| {
                let close = shutdown.child_token();
                tasks.spawn(serve(Arc::clone(&listening), at.0, at.1, close.clone()));
                close
            });
        }
        tokio::select! {
            changed = checks.changed() => if changed.is_err() { break },
            () = moved(moves.as_mut()) => {}
            Some(_) = tasks.join_next() => {}
            () = shutdown.cancelled() => break,
        }
    }
    for close in open.values() {
        close.cancel();
    }
    while tasks.join_next().await.is_some() {}
}

/// The addresses to listen on: all at once where every address is meant.
fn listening_addresses(
    configured: &NodePortAddresses,
    node: &BTreeSet<IpAddr>,
    families: &[Family],
) -> Vec<IpAddr> {
    let served = |address: &IpAddr| families.contains(&Family::of(*address));
    match configured {
        NodePortAddresses::Primary => node.iter().copied().filter(served).collect(),
        NodePortAddresses::Ranges(ranges) => {
            let whole = |family| {
                let mut all = ranges.iter().filter(|range| Family::of(range.addr()) == family);
                families.contains(&family) && all.any(|range| range.prefix_len() == 0)
            };
            let in_ranges = |family| {
                let own = local_addresses().into_iter().filter(move |a| Family::of(*a) == family);
                own.filter(|a| served(a) && ranges.iter().any(|range| range.contains(a)))
            };
            match (whole(Family::V4), whole(Family::V6)) {
                // The one listener takes both.
                (_, true) => vec![Ipv6Addr::UNSPECIFIED.into()],
                (true, false) => {
                    let all = IpAddr::from(Ipv4Addr::UNSPECIFIED);
                    std::iter::once(all).chain(in_ranges(Family::V6)).collect()
                }
                (false, false) => in_ranges(Family::V4).chain(in_ranges(Family::V6)).collect(),
            }
        }
    }
}

/// Whether the addresses to listen on are those of interfaces that are in some ranges.
fn looks_at_interfaces(configured: &NodePortAddresses) -> bool {
    match configured {
        NodePortAddresses::Primary => false,
        NodePortAddresses::Ranges(ranges) => ranges.iter().any(|range| range.prefix_len() > 0),
    }
}

/// Waits until there may be other addresses, if that matters.
async fn moved(moves: Option<&mut Moves>) {
    match moves {
        Some(moves) => moves.wait().await,
        None => future::pending().await,
    }
}

/// Answers at one address and port until it is closed.
async fn serve(listening: Arc<Listening>, port: u16, at: SocketAddr, close: CancellationToken) {
    let mut backoff = Backoff::new(RETRY.0, RETRY.1);
    let mut told = false;
    let listener = loop {
        match bind(at, &listening.addresses).await {
            Ok(listener) => break listener,
            Err(error) => {
                if !told {
                    tell(&listening, port, at, &error);
                    told = true;
                }
                tokio::select! {
                    () = tokio::time::sleep(backoff.next_wait()) => {}
                    () = close.cancelled() => return,
                }
            }
        }
    };
    let (checks, health) = (listening.checks.clone(), listening.health.clone());
    let answer = move |_: String| {
        let check = checks.borrow().by_port.get(&port).cloned();
        std::future::ready(page(check.as_ref(), health.keeps_up()))
    };
    health::serve(listener, answer, close).await;
}

/// All addresses of IPv6 are those of both families.
async fn bind(at: SocketAddr, configured: &NodePortAddresses) -> io::Result<TcpListener> {
    if !at.ip().is_unspecified() {
        let socket = if at.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.set_reuseaddr(true)?;
        // One that an interface has just got may not be there for sockets yet.
        if looks_at_interfaces(configured) && at.is_ipv4() {
            SockRef::from(&socket).set_freebind_v4(true)?;
        } else if looks_at_interfaces(configured) {
            SockRef::from(&socket).set_freebind_v6(true)?;
        }
        socket.bind(at)?;
        return socket.listen(BACKLOG);
    }
    match at {
        SocketAddr::V4(_) => TcpListener::bind(at).await,
        SocketAddr::V6(_) => everywhere(at.port()).await,
    }
}

fn tell(listening: &Listening, port: u16, at: SocketAddr, error: &io::Error) {
    let Some(check) = listening.checks.borrow().by_port.get(&port).cloned() else { return };
    let message = format!("health checks at {at} are not answered: {error}; trying again");
    tracing::warn!(service = %check.service, "{message}");
    let object = reference_by_key::<Service>(&check.service, check.uid);
    listening.events.event(&object, EventType::Warning, "FailedToStartServiceHealthcheck", message);
}

/// The documented answer: how many endpoints are here, and whether the proxy keeps up.
fn page(check: Option<&Check>, keeps_up: bool) -> Response<Full<Bytes>> {
    let Some(check) = check else {
        return health::page(StatusCode::NOT_FOUND, "text/plain", "404 page not found\n");
    };
    let status =
        if check.local > 0 && keeps_up { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = serde_json::json!({
        "service": { "namespace": check.service.namespace(), "name": check.service.name() },
        "localEndpoints": check.local,
        "serviceProxyHealthy": keeps_up,
    });
    let mut response = health::page(status, "application/json", format!("{body:#}"));
    response.headers_mut().insert(WEIGHT, HeaderValue::from(check.local));
    response
}

#[cfg(test)]
mod tests {
    use keelson_api::object::ObjectKey;

    use super::*;
    use crate::{netns::Namespace, until::until};

    #[test]
    fn an_address_that_comes_later_answers_too() {
        let host = Namespace::new();
        let check = Check { service: ObjectKey::new("d", "s"), uid: None, local: 1 };
        let by_port = BTreeMap::from([(30_100, check)]);
        let (_published, checks) =
            watch::channel(Arc::new(Checks { by_port, ..Checks::default() }));
        let ranges = ["192.0.2.0/24", "2001:db8::/64"].map(|range| range.parse().unwrap());
        let families = vec![Family::V4, Family::V6];
        let listening = Listening {
            checks,
            addresses: NodePortAddresses::Ranges(ranges.into()),
            health: Health::new(&families, Duration::from_secs(30)),
            families,
            events: EventRecorder::discard(),
        };
        let shutdown = CancellationToken::new();
        let stopping = shutdown.clone();
        // A thread begins in the namespace of the one that starts it.
        let running = host.run(move || {
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                runtime.unwrap().block_on(listen(listening, stopping));
            })
        });
        let listens = |at: &str| host.sh("ss -Hltn").contains(at);
        host.sh("ip address add 192.0.2.1/24 dev lo");
        until("the first one answers", || listens("192.0.2.1:30100"));
        host.sh("ip address add 192.0.2.2/24 dev lo; ip address add 2001:db8::2/64 dev lo");
        host.sh("ip address add 198.51.100.1/24 dev lo");
        until("later ones too", || listens("192.0.2.2:30100") && listens("[2001:db8::2]:30100"));
        assert!(!listens("198.51.100.1:30100"), "it is in no range");
        host.sh("ip address del 192.0.2.2/24 dev lo");
        until("and none that is gone", || !listens("192.0.2.2:30100"));
        assert!(listens("192.0.2.1:30100"));
        shutdown.cancel();
        running.join().unwrap();
    }

    #[test]
    fn a_node_is_chosen_when_it_has_endpoints_and_its_proxy_keeps_up() {
        for (local, keeps_up, status) in [(2, true, 200), (0, true, 503), (2, false, 503)] {
            let check = Check { service: ObjectKey::new("d", "web"), uid: None, local };
            let response = page(Some(&check), keeps_up);
            assert_eq!(response.status().as_u16(), status);
            assert_eq!(response.headers()[WEIGHT], local.to_string());
        }
        assert_eq!(page(None, true).status(), StatusCode::NOT_FOUND);
    }

    #[test]
    fn listeners_are_where_node_ports_are() {
        let node = BTreeSet::from([[192, 0, 2, 1].into(), "2001:db8::1".parse().unwrap()]);
        let ranges = |texts: &[&str]| {
            NodePortAddresses::Ranges(texts.iter().map(|t| t.parse().unwrap()).collect())
        };
        let (v4, both) = (&[Family::V4][..], &[Family::V4, Family::V6][..]);
        type Case<'a> = (NodePortAddresses, &'a [Family], &'a [&'a str]);
        let table: &[Case<'_>] = &[
            (NodePortAddresses::Primary, both, &["192.0.2.1", "2001:db8::1"]),
            (NodePortAddresses::Primary, v4, &["192.0.2.1"]),
            (ranges(&["0.0.0.0/0", "::/0"]), both, &["::"]),
            (ranges(&["0.0.0.0/0", "::/0"]), v4, &["0.0.0.0"]),
            (ranges(&["0.0.0.0/0", "::1/128"]), both, &["0.0.0.0", "::1"]),
            (ranges(&["203.0.113.0/24"]), both, &[]),
        ];
        for (configured, families, expected) in table {
            let found = listening_addresses(configured, &node, families);
            let expected: Vec<IpAddr> = expected.iter().map(|t| t.parse().unwrap()).collect();
            assert_eq!(found, expected, "{configured:?}");
        }
    }
}
