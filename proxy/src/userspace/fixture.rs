//! For tests: a host with relays, a client outside and pods, in network namespaces.
//!
//! ```text
//!   client 192.0.2.2 ── host 192.0.2.1, 10.244.N.1 ── pod N 10.244.N.2
//! ```

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use keelson_api::object::ObjectKey;
use prometheus::Registry;

use super::{RelayMetrics, Relays, Settings};
use crate::{
    DetectLocal, NodePortAddresses,
    backend::{Applied, Backend, Goal},
    model::{Endpoint, Family, Protocol, table::ServiceTable},
    netns::Namespace,
    ruleset::{
        Action, AddressSet, Frontend, Lane, Masquerade, Unit,
        desired::{Desired, ServiceRules},
    },
    until::PATIENCE,
};

/// The port that pods answer on.
pub(super) const POD_PORT: u16 = 8080;

/// Every family.
pub(super) const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// One of the two.
pub(super) fn either(family: Family, v4: [u8; 4], v6: [u16; 8]) -> IpAddr {
    match family {
        Family::V4 => v4.into(),
        Family::V6 => Ipv6Addr::from(v6).into(),
    }
}

/// A cluster address.
pub(super) fn cluster(family: Family, n: u8) -> IpAddr {
    either(family, [10, 96, 0, n], [0xfd00, 0x96, 0, 0, 0, 0, 0, n.into()])
}

/// The node's address.
pub(super) fn node(family: Family) -> IpAddr {
    either(family, [192, 0, 2, 1], [0x2001, 0xdb8, 2, 0, 0, 0, 0, 1])
}

/// A pod's endpoint.
pub(super) fn pod(family: Family, n: u8) -> Endpoint {
    let address = either(family, [10, 244, n, 2], [0xfd00, 0x10, 0, 0, 0, 0, n.into(), 2]);
    Endpoint { address, port: POD_PORT }
}

/// The namespaces.
pub(super) struct Net {
    pub(super) host: Namespace,
    pub(super) client: Namespace,
    pub(super) pods: Vec<Namespace>,
}

impl Net {
    /// Makes them. Nobody serves yet.
    pub(super) fn new(pods: u8) -> Self {
        let (host, client) = (Namespace::new(), Namespace::new());
        host.sh("sysctl -qw net.ipv4.icmp_ratelimit=0 net.ipv6.icmp.ratelimit=0");
        host.join("client", &client, "eth0");
        host.sh(
            "ip addr add 192.0.2.1/24 dev client; ip addr add 2001:db8:2::1/64 dev client nodad",
        );
        client
            .sh("ip addr add 192.0.2.2/24 dev eth0; ip addr add 2001:db8:2::2/64 dev eth0 nodad; \
             ip route add default via 192.0.2.1; ip route add default via 2001:db8:2::1");
        let pods = (1..=pods)
            .map(|n| {
                let pod = Namespace::new();
                host.join(&format!("pod{n}"), &pod, "eth0");
                host.sh(&format!(
                    "ip addr add 10.244.{n}.1/24 dev pod{n}; \
                     ip addr add fd00:10::{n}:1/112 dev pod{n} nodad"
                ));
                pod.sh(&format!(
                    "ip addr add 10.244.{n}.2/24 dev eth0; ip route add default via 10.244.{n}.1; \
                     ip addr add fd00:10::{n}:2/112 dev eth0 nodad; \
                     ip route add default via fd00:10::{n}:1"
                ));
                pod
            })
            .collect();
        Self { host, client, pods }
    }

    /// Has a pod answer each TCP connection and datagram with its number.
    pub(super) fn serve(&self, family: Family, n: u8) {
        let endpoint = pod(family, n);
        self.pods[usize::from(n) - 1].run(move || {
            let listener = TcpListener::bind((endpoint.address, endpoint.port)).unwrap();
            std::thread::spawn(move || {
                for mut stream in listener.incoming().flatten() {
                    let _ = stream.write_all(&[n]);
                }
            });
            let socket = UdpSocket::bind((endpoint.address, endpoint.port)).unwrap();
            std::thread::spawn(move || {
                let mut buffer = [0; 16];
                while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
                    let _ = socket.send_to(&[n], peer);
                }
            });
        });
    }

    /// The relays of one family, with small limits and short times where `adjust` says so.
    pub(super) fn relays(
        &self,
        family: Family,
        adjust: impl FnOnce(&mut Settings) + Send + 'static,
    ) -> Host {
        let registry = Registry::new();
        let metrics = RelayMetrics::new().unwrap();
        metrics.register(&registry).unwrap();
        let relays = self.host.run(move || {
            let mut settings = Settings { metrics: Some(metrics), ..Settings::new(family) };
            adjust(&mut settings);
            Relays::open(settings).unwrap()
        });
        let mut desired = Desired::default();
        let node = ServiceRules {
            addresses: vec![(AddressSet::NodeAddresses, node(family))],
            ..ServiceRules::default()
        };
        desired.replace(&ObjectKey::default(), Some(node));
        let mut host = Host { family, relays, registry, desired };
        host.synchronize();
        host
    }
}

/// Settings that most tests change.
pub(super) fn everywhere(settings: &mut Settings) {
    let ranges = ["0.0.0.0/0", "::/0"].map(|range| range.parse().unwrap());
    settings.node_port_addresses = NodePortAddresses::Ranges(ranges.into());
    let pods = ["10.244.0.0/16", "fd00:10::/64"].map(|range| range.parse().unwrap());
    settings.detect_local = DetectLocal::Ranges(pods.into());
}

/// Relays, and what they are told.
pub(super) struct Host {
    family: Family,
    pub(super) relays: Relays,
    registry: Registry,
    desired: Desired,
}

impl Host {
    /// A Service on its cluster address, port 80, and on node port 30080, for both protocols.
    pub(super) fn set(&mut self, n: u8, endpoints: &[u8]) -> Applied {
        self.set_action(n, self.forward(endpoints))
    }

    /// As [`Self::set`], with something else to do.
    pub(super) fn set_action(&mut self, n: u8, action: Action) -> Applied {
        let mut rules = ServiceRules::default();
        let address = cluster(self.family, n);
        rules.addresses.push((AddressSet::ClusterAddresses, address));
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            for (lane, address, port) in
                [(Lane::Address, Some(address), 80), (Lane::NodePort, None, 30_079 + u16::from(n))]
            {
                let frontend = Frontend { family: self.family, lane, address, protocol, port };
                rules.frontends.push((frontend, action.clone()));
            }
        }
        self.replace(n, Some(rules))
    }

    /// Puts in place what a Service wants.
    pub(super) fn replace(&mut self, n: u8, rules: Option<ServiceRules>) -> Applied {
        let key = ObjectKey::new("d", format!("service-{n}"));
        let outcome = self.desired.replace(&key, rules);
        self.apply(&outcome.dirty)
    }

    /// Tells of units again.
    pub(super) fn apply(&mut self, units: &[Unit]) -> Applied {
        let objects = ServiceTable::default();
        let goal = Goal { desired: &self.desired, objects: &objects };
        self.relays.apply(units, goal).unwrap()
    }

    /// Tells of everything.
    pub(super) fn synchronize(&mut self) -> Applied {
        let objects = ServiceTable::default();
        let goal = Goal { desired: &self.desired, objects: &objects };
        self.relays.synchronize(goal).unwrap()
    }

    /// To these pods.
    pub(super) fn forward(&self, endpoints: &[u8]) -> Action {
        if endpoints.is_empty() {
            return Action::Reject;
        }
        Action::Forward {
            endpoints: endpoints.iter().map(|n| pod(self.family, *n)).collect(),
            masquerade: Masquerade::OffCluster,
            affinity: None,
            sources: None,
        }
    }

    /// Where a Service's cluster address and port is.
    pub(super) fn service(&self, n: u8) -> SocketAddr {
        SocketAddr::new(cluster(self.family, n), 80)
    }

    /// Whether a metric has this line.
    pub(super) fn metric(&self, line: &str) -> bool {
        keelson_api::metrics::encode(&self.registry).unwrap().lines().any(|l| l == line)
    }
}

/// A connection.
pub(super) fn connect(from: &Namespace, to: SocketAddr) -> std::io::Result<TcpStream> {
    from.run(move || {
        let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    })
}

/// Which pod answers a connection, if any.
pub(super) fn ask(from: &Namespace, to: SocketAddr) -> std::io::Result<u8> {
    let mut answer = [0];
    connect(from, to)?.read_exact(&mut answer)?;
    Ok(answer[0])
}

/// A UDP client.
pub(super) struct Flow(pub(super) UdpSocket);

impl Flow {
    /// One that was never heard of.
    pub(super) fn new(from: &Namespace, to: SocketAddr) -> Self {
        Self(from.run(move || {
            let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(any).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            socket.connect(to).unwrap();
            socket
        }))
    }

    /// Which pod answers a datagram, if any.
    pub(super) fn ask(&self) -> Option<u8> {
        let mut answer = [0; 16];
        // Refusals of earlier datagrams are told on the next call.
        let _ = self.0.send(b"?");
        self.0.recv(&mut answer).ok().map(|_| answer[0])
    }
}
