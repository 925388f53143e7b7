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
//! * [`clients`]: who is answered at all.
//! * [`publish`]: makes the server reachable as `kube-system/kube-dns`.
//!
//! Until the zone is complete the cluster's names are answered with SERVFAIL: nobody is told that
//! a name is not there which is.

mod answer;
mod clients;
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
use ipnet::IpNet;
use tokio::net::{TcpListener, UdpSocket};
use tokio_util::sync::CancellationToken;

use self::{answer::Responder, clients::Clients, forward::Forwarder, zone::Zone};
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
    /// The cluster's pods. Their questions are answered, and those of nodes and of this machine;
    /// everybody else's are refused.
    pub pod_ranges: Vec<IpNet>,
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
    let mut answered = config.pod_ranges;
    answered.extend(config.listen.iter().map(|address| IpNet::from(address.ip())));
    let clients = Arc::new(Clients::new(answered));
    let responder = Responder {
        zone: zone.clone(),
        complete: complete.clone(),
        clients: clients.clone(),
        forwarder: Arc::new(Forwarder::new(config.resolv_conf, own)),
        metrics,
    };
    let (mut server, _) = listen(responder, &config.listen).await?;
    follow(&informers, &zone);
    informers.nodes.on_change(move |change| {
        clients.set_node(change.key().name(), change.after.as_deref());
    });
    if informers.namespaces.synced(&shutdown).await
        && informers.services.synced(&shutdown).await
        && informers.endpoint_slices.synced(&shutdown).await
    {
        complete.store(true, Ordering::Release);
    }
    shutdown.cancelled().await;
    server.shutdown_gracefully().await.map_err(|error| DnsError::Server(error.to_string()))
}

/// Binds all addresses; returns which they became.
async fn listen(
    responder: Responder,
    addresses: &[SocketAddr],
) -> Result<(Server<Responder>, Vec<SocketAddr>), DnsError> {
    let mut server = Server::new(responder);
    let mut bound = Vec::new();
    for address in addresses {
        let failed =
            |protocol| move |source| DnsError::Listen { address: *address, protocol, source };
        let socket = UdpSocket::bind(address).await.map_err(failed("udp"))?;
        let address = socket.local_addr().map_err(failed("udp"))?;
        let listener = TcpListener::bind(address).await.map_err(failed("tcp"))?;
        server.register_socket(socket);
        server.register_listener(listener, IDLE, ANSWERS_WAITING);
        bound.push(address);
    }
    Ok((server, bound))
}

fn follow(informers: &Informers, zone: &Arc<RwLock<Zone>>) {
    let kept = zone.clone();
    informers.namespaces.on_change(move |change| {
        let mut zone = kept.write().unwrap_or_else(PoisonError::into_inner);
        zone.set_namespace(change.key().name(), change.after.is_some());
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

#[cfg(test)]
mod tests {
    use hickory_proto::{
        op::{Message, MessageType, OpCode, Query, ResponseCode},
        rr::{Name, RecordType},
    };
    use hickory_server::{net::xfer::Protocol, server::Request};
    use keelson_api::object::ObjectKey;
    use serde_json::json;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
    };

    use super::*;

    fn responder(endpoints: usize) -> Responder {
        let mut zone = Zone::new("cluster.local");
        zone.set_namespace("d", true);
        let service = serde_json::from_value(json!({
            "metadata": {"name": "db", "namespace": "d"}, "spec": {"clusterIP": "None"}}));
        zone.set_service(&ObjectKey::new("d", "db"), Some(&service.unwrap()));
        let endpoints: Vec<_> =
            (1..=endpoints).map(|i| json!({"addresses": [format!("10.244.0.{i}")]})).collect();
        let slice = serde_json::from_value(json!({
            "metadata": {"name": "db-1", "namespace": "d",
                "labels": {"kubernetes.io/service-name": "db"}},
            "addressType": "IPv4", "endpoints": endpoints}));
        zone.set_slice(&ObjectKey::new("d", "db-1"), Some(&slice.unwrap()));
        Responder {
            zone: Arc::new(RwLock::new(zone)),
            complete: Arc::new(AtomicBool::new(true)),
            forwarder: Arc::new(Forwarder::new("/nonexistent/resolv.conf".into(), Vec::new())),
            clients: Arc::new(Clients::new(Vec::new())),
            metrics: DnsMetrics::register(&prometheus::Registry::new()).unwrap(),
        }
    }

    fn question(name: &str) -> Message {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
        message
    }

    async fn over_udp(server: SocketAddr, question: &Message) -> Message {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.send_to(&question.to_vec().unwrap(), server).await.unwrap();
        let mut buffer = vec![0; 4_096];
        let length = socket.recv(&mut buffer).await.unwrap();
        Message::from_vec(&buffer[..length]).unwrap()
    }

    async fn over_tcp(server: SocketAddr, question: &Message) -> Message {
        let bytes = question.to_vec().unwrap();
        let mut stream = TcpStream::connect(server).await.unwrap();
        stream.write_u16(bytes.len().try_into().unwrap()).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        let mut buffer = vec![0; stream.read_u16().await.unwrap().into()];
        stream.read_exact(&mut buffer).await.unwrap();
        Message::from_vec(&buffer).unwrap()
    }

    #[tokio::test]
    async fn strangers_are_refused() {
        let responder = responder(1);
        let bytes = question("db.d.svc.cluster.local.").to_vec().unwrap();
        let asked_from = async |client: &str| {
            let client = client.parse().unwrap();
            let request = Request::from_bytes(bytes.clone(), client, Protocol::Udp).unwrap();
            responder.respond(&request).await.code
        };
        assert_eq!(asked_from("127.0.0.1:5353").await, ResponseCode::NoError);
        assert_eq!(asked_from("203.0.113.5:5353").await, ResponseCode::Refused);
    }

    #[tokio::test]
    async fn questions_are_answered_over_udp_and_tcp() {
        let any = "127.0.0.1:0".parse().unwrap();
        let responder = responder(60);
        let complete = responder.complete.clone();
        let (mut server, bound) = listen(responder, &[any]).await.unwrap();
        let address = bound[0];

        // Too many for a datagram: the client is told to come back over TCP.
        let many = question("db.d.svc.cluster.local.");
        let short = over_udp(address, &many).await;
        assert!(short.metadata.truncation);
        assert_eq!(short.metadata.id, 7);
        let full = over_tcp(address, &many).await;
        assert_eq!(full.answers.len(), 60);
        assert!(full.metadata.authoritative);
        assert_eq!(full.answers[0].ttl, 5);

        let none = over_udp(address, &question("x.d.svc.cluster.local.")).await;
        assert_eq!(none.metadata.response_code, ResponseCode::NXDomain);
        assert_eq!(none.authorities.len(), 1);
        // Nobody to ask.
        let outside = over_udp(address, &question("example.com.")).await;
        assert_eq!(outside.metadata.response_code, ResponseCode::ServFail);
        // An incomplete zone does not say that a name is not there.
        complete.store(false, Ordering::Release);
        let unsure = over_udp(address, &question("x.d.svc.cluster.local.")).await;
        assert_eq!(unsure.metadata.response_code, ResponseCode::ServFail);
        server.shutdown_gracefully().await.unwrap();
    }
}
