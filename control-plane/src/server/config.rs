//! What an API server is made of.

use std::{
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use serde_json::Value;

use super::security::Answers;
use crate::{
    admission::Admission,
    auth::{Anonymous, Authenticator, Authorizer},
    lookup::Lookup,
    pki::ApiServerTls,
};

/// How an API server is set up.
pub struct ApiServerConfig {
    /// Where the store's file lies (`store.redb` in it). Made if it is missing.
    pub data_dir: PathBuf,
    /// Where to listen, such as `0.0.0.0:6443`; port 0 takes any.
    pub bind_address: SocketAddr,
    /// The address by which pods and nodes reach this server: the endpoint of the `kubernetes`
    /// Service.
    pub advertise_address: IpAddr,
    /// Where Services get their addresses; one range, or an IPv4 and an IPv6 range. The first
    /// decides the family of Services that do not say. The first address of it is the `kubernetes`
    /// Service's.
    pub service_cidrs: Vec<IpNet>,
    /// Where Services get their node ports.
    pub node_ports: RangeInclusive<u16>,
    /// The server's certificate, and the authority of client certificates (optional to clients).
    pub tls: ApiServerTls,
    /// How this server shows itself to kubelets, and what it verifies them against. Without it
    /// logs, exec, attach, port-forward and the node proxy are refused.
    pub kubelet_tls: Option<Arc<rustls::ClientConfig>>,
    /// Makes what decides who may do what, over the server's own watch cache.
    pub security: MakeSecurity,
    /// Where metrics are registered, and what `/metrics` shows.
    pub metrics: prometheus::Registry,
    /// Objects that must exist besides the namespaces and the `kubernetes` Service: the default
    /// roles and bindings. Missing ones are made at start; of roles and bindings with
    /// `rbac.authorization.kubernetes.io/autoupdate: "true"` what is missing in them is added.
    pub bootstrap_objects: Vec<Value>,
    /// Bounds on what clients can make the server do.
    pub limits: Limits,
    /// How long events are kept.
    pub event_ttl: Duration,
}

/// Bounds on what clients can make the server do. The defaults are kube-apiserver's.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Requests that only read, at a time. Watches and streams do not count.
    pub max_reads_in_flight: usize,
    /// Requests that write, at a time.
    pub max_writes_in_flight: usize,
    /// Open connections.
    pub max_connections: usize,
    /// Open connections of one client address (IPv6: of one /64). Three times as many from this
    /// machine itself.
    pub max_connections_per_peer: usize,
    /// How long a client may take to begin: from the handshake to the end of its first request's
    /// head.
    pub header_timeout: Duration,
    /// How long a connection may have nothing to do.
    pub idle_timeout: Duration,
    /// How long a request may take, other than watches and streams.
    pub request_timeout: Duration,
    /// A watch that does not say how long it is to last ends after this to twice this.
    pub min_watch_timeout: Duration,
    /// Size of a request's body, in bytes.
    pub max_body_bytes: usize,
    /// How often a watch that wants them gets a bookmark.
    pub bookmark_interval: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_reads_in_flight: 400,
            max_writes_in_flight: 200,
            max_connections: 4096,
            max_connections_per_peer: 1024,
            header_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(90),
            request_timeout: Duration::from_secs(60),
            min_watch_timeout: Duration::from_secs(1800),
            max_body_bytes: 3 << 20,
            bookmark_interval: Duration::from_secs(60),
        }
    }
}

/// Makes a [`Security`] over the watch cache.
pub type MakeSecurity = Box<
    dyn FnOnce(Arc<dyn Lookup>) -> Result<Security, Box<dyn std::error::Error + Send + Sync>>
        + Send,
>;

/// Who decides who may do what.
#[derive(Clone)]
pub struct Security {
    /// Who asks.
    pub authenticator: Arc<dyn Authenticator>,
    /// Who requests without credentials are made as, if they are served at all.
    pub anonymous: Anonymous,
    /// Whether they may.
    pub authorizer: Arc<dyn Authorizer>,
    /// Whether the object may be so.
    pub admission: Arc<dyn Admission>,
    /// What is answered and not stored.
    pub answers: Arc<Answers>,
}
