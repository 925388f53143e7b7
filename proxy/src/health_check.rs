//! Health-check node ports: where load balancers ask whether this node has endpoints of a Service.
//!
//! A Service of type LoadBalancer with `externalTrafficPolicy: Local` has one. The loop notes what
//! each Service wants and publishes it with the commit; a task here opens and closes listeners and
//! answers from what was published last. A port that can't be had is told by an event on the
//! Service and tried again.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use http::{HeaderValue, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Bytes;
use k8s_openapi::api::core::v1::ObjectReference;
use keelson_api::{
    backoff::Backoff,
    events::{EventRecorder, EventType},
    object::ObjectKey,
};
use tokio::{net::TcpListener, sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{
    config::NodePortAddresses,
    health::{self, Health},
    model::{Family, Problem, table::ServiceTable},
};

/// The first and the longest wait before a port that is taken is tried again.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// The weight that load balancers may give this node: its number of endpoints.
const WEIGHT: &str = "x-load-balancing-endpoint-weight";

/// What is asked for at one port.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Check {
    service: ObjectKey,
    /// The Service's UID, for events.
    uid: Option<String>,
    /// Ready endpoints on this node.
    local: usize,
}

/// All health-check node ports, and the node's addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Checks {
    /// Of two Services with one port the older has it.
    by_port: BTreeMap<u16, Check>,
    node_addresses: BTreeSet<IpAddr>,
}

/// The loop's end: what each Service wants.
#[derive(Debug, Default)]
pub(crate) struct HealthChecks {
    services: BTreeMap<ObjectKey, (u16, i64, Check)>,
    /// Who wants a port, and since when it is there; the first has it.
    claims: BTreeMap<u16, BTreeSet<(i64, ObjectKey)>>,
    node_addresses: BTreeSet<IpAddr>,
    changed: bool,
    published: Option<watch::Sender<Arc<Checks>>>,
}

impl HealthChecks {
    /// Publishes here.
    pub(crate) fn new(published: watch::Sender<Arc<Checks>>) -> Self {
        Self { published: Some(published), ..Self::default() }
    }

    /// Looks at a Service again. Whom to tell that it doesn't get its port, if that is news.
    pub(crate) fn note(
        &mut self,
        key: &ObjectKey,
        objects: &ServiceTable,
    ) -> Option<(ObjectKey, Problem)> {
        let wanted = objects.health_check_port(key).map(|port| {
            let uid = objects.uid(key);
            let check = Check { service: key.clone(), uid, local: objects.local_ready(key) };
            (port, objects.created(key), check)
        });
        let before = match wanted.clone() {
            Some(wanted) => self.services.insert(key.clone(), wanted),
            None => self.services.remove(key),
        };
        self.changed |= before != wanted;
        let claim = |(port, created, _): &(u16, i64, Check)| (*port, (*created, key.clone()));
        let (before, now) = (before.as_ref().map(claim), wanted.as_ref().map(claim));
        if before == now {
            return None;
        }
        if let Some((port, claim)) = before
            && let Some(claims) = self.claims.get_mut(&port)
        {
            claims.remove(&claim);
            if claims.is_empty() {
                self.claims.remove(&port);
            }
        }
        let (port, claim) = now?;
        let claims = self.claims.entry(port).or_default();
        let owner = claims.first().cloned();
        claims.insert(claim.clone());
        let (older, younger) = match owner? {
            owner if owner < claim => (owner.1, claim.1),
            owner => (claim.1, owner.1),
        };
        let message = format!("health check node port {port} is that of the older Service {older}");
        Some((younger, Problem::new("PortConflict", message)))
    }

    /// Takes in the node's addresses.
    pub(crate) fn set_node_addresses(&mut self, addresses: &[IpAddr]) {
        let addresses = addresses.iter().copied().collect();
        self.changed |= self.node_addresses != addresses;
        self.node_addresses = addresses;
    }

    /// Takes over the node's addresses from where they were noted first.
    pub(crate) fn take_node_addresses(&mut self, other: &mut Self) {
        self.node_addresses = std::mem::take(&mut other.node_addresses);
    }

    /// Hands on what was noted.
    pub(crate) fn publish(&mut self) {
        let Some(published) = self.published.as_ref().filter(|_| self.changed) else { return };
        let owners = self.claims.iter().filter_map(|(port, claims)| {
            let (_, owner) = claims.first()?;
            Some((*port, self.services.get(owner)?.2.clone()))
        });
        let by_port = owners.collect();
        let checks = Checks { by_port, node_addresses: self.node_addresses.clone() };
        published.send_replace(Arc::new(checks));
        self.changed = false;
    }
}

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
            match (whole(Family::V4), whole(Family::V6)) {
                // The one listener takes both.
                (_, true) => vec![Ipv6Addr::UNSPECIFIED.into()],
                (true, false) => vec![Ipv4Addr::UNSPECIFIED.into()],
                (false, false) => local_addresses()
                    .into_iter()
                    .filter(|a| served(a) && ranges.iter().any(|range| range.contains(a)))
                    .collect(),
            }
        }
    }
}

fn local_addresses() -> BTreeSet<IpAddr> {
    let Ok(interfaces) = nix::ifaddrs::getifaddrs() else { return BTreeSet::new() };
    interfaces
        .filter_map(|interface| {
            let address = interface.address?;
            match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
                (Some(v4), _) => Some(IpAddr::V4(v4.ip())),
                (_, Some(v6)) => Some(IpAddr::V6(v6.ip())),
                _ => None,
            }
        })
        .collect()
}

/// Answers at one address and port until it is closed.
async fn serve(listening: Arc<Listening>, port: u16, at: SocketAddr, close: CancellationToken) {
    let mut backoff = Backoff::new(RETRY.0, RETRY.1);
    let mut told = false;
    let listener = loop {
        match bind(at).await {
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

/// Where the kernel has no IPv6, all addresses are those of IPv4.
async fn bind(at: SocketAddr) -> io::Result<TcpListener> {
    match TcpListener::bind(at).await {
        Err(error)
            if at.ip() == Ipv6Addr::UNSPECIFIED && error.kind() != io::ErrorKind::AddrInUse =>
        {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, at.port())).await
        }
        result => result,
    }
}

fn tell(listening: &Listening, port: u16, at: SocketAddr, error: &io::Error) {
    let Some(check) = listening.checks.borrow().by_port.get(&port).cloned() else { return };
    let message = format!("health checks at {at} are not answered: {error}; trying again");
    tracing::warn!(service = %check.service, "{message}");
    let object = ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Service".into()),
        namespace: Some(check.service.namespace),
        name: Some(check.service.name),
        uid: check.uid,
        ..ObjectReference::default()
    };
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
        "service": { "namespace": check.service.namespace, "name": check.service.name },
        "localEndpoints": check.local,
        "serviceProxyHealthy": keeps_up,
    });
    let mut response = health::page(status, "application/json", format!("{body:#}"));
    response.headers_mut().insert(WEIGHT, HeaderValue::from(check.local));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn balanced(created: i64, port: u16) -> crate::model::objects::Service {
        let object = serde_json::json!({
            "metadata": {"creationTimestamp": jiff::Timestamp::from_second(created).unwrap().to_string()},
            "spec": {"type": "LoadBalancer", "clusterIP": "10.96.0.1", "healthCheckNodePort": port,
                     "externalTrafficPolicy": "Local", "ports": [{"port": 80}]},
        });
        let object = serde_json::from_value(object).unwrap();
        crate::model::objects::Service::read(&object).0.unwrap()
    }

    #[test]
    fn the_older_service_has_a_port_the_younger_is_told_once_and_takes_over() {
        let (old, new) = (ObjectKey::new("d", "z-old"), ObjectKey::new("d", "a-new"));
        for order in [[(&old, 1), (&new, 2)], [(&new, 2), (&old, 1)]] {
            let (published, mut checks) = watch::channel(Arc::default());
            let (mut health, mut objects) = (HealthChecks::new(published), ServiceTable::default());
            let mut told = Vec::new();
            for (key, created) in order {
                objects.set_service(key, Some(balanced(created, 30_100)));
                told.extend(health.note(key, &objects));
                assert_eq!(health.note(key, &objects), None, "it is no news");
            }
            let [(younger, problem)] = &told[..] else { panic!("{told:?}") };
            assert_eq!((younger, problem.reason), (&new, "PortConflict"));
            assert_eq!(
                problem.message,
                "health check node port 30100 is that of the older Service d/z-old"
            );
            let mut owner = |health: &mut HealthChecks| {
                health.publish();
                checks.borrow_and_update().by_port.get(&30_100).map(|c| c.service.clone())
            };
            assert_eq!(owner(&mut health), Some(old.clone()));
            objects.set_service(&old, Some(balanced(1, 30_101)));
            assert_eq!(health.note(&old, &objects), None);
            assert_eq!(owner(&mut health), Some(new.clone()));
            for key in [&new, &old] {
                objects.set_service(key, None);
                health.note(key, &objects);
            }
            assert_eq!(owner(&mut health), None);
            assert!(health.claims.is_empty() && health.services.is_empty());
        }
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
            (ranges(&["203.0.113.0/24"]), both, &[]),
        ];
        for (configured, families, expected) in table {
            let found = listening_addresses(configured, &node, families);
            let expected: Vec<IpAddr> = expected.iter().map(|t| t.parse().unwrap()).collect();
            assert_eq!(found, expected, "{configured:?}");
        }
    }
}
