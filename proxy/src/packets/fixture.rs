//! A node in network namespaces, with clients and pods of both families around it.

use std::{
    fmt::Display,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::mpsc::Sender,
    time::{Duration, Instant},
};

use tokio::net::TcpSocket;

use super::sctp;
use crate::{
    Mode,
    model::{Family, Protocol},
    netns::Namespace,
    until::{PATIENCE, until},
};

/// After so long without an answer there is none. TCP's own second try comes after a second.
pub(super) const SILENCE: Duration = Duration::from_millis(500);
/// After so long a datagram is sent again.
const AGAIN: Duration = Duration::from_millis(200);
/// How many addresses clients outside the cluster have.
pub(super) const CLIENTS: u8 = 16;
/// How many pods there are.
pub(super) const PODS: u8 = 4;
/// Pods listen on both, so that it shows which one was meant.
pub(super) const POD_PORTS: [u16; 2] = [8080, 9090];
/// The number by which an endpoint on the node's own address answers.
pub(super) const ON_NODE: u8 = 100;

/// The addresses of one family that things have.
#[derive(Clone, Copy, Debug)]
pub(super) struct Addresses(pub(super) Family);

impl Addresses {
    fn either(self, v4: [u8; 4], v6: [u16; 8]) -> IpAddr {
        match self.0 {
            Family::V4 => v4.into(),
            Family::V6 => Ipv6Addr::from(v6).into(),
        }
    }

    /// A Service's cluster address.
    pub(super) fn cluster(self, n: u8) -> IpAddr {
        self.either([10, 96, 0, n], [0xfd00, 0x96, 0, 0, 0, 0, 0, n.into()])
    }

    /// An address for the outside.
    pub(super) fn external(self, n: u8) -> IpAddr {
        self.either([198, 51, 100, n], [0x2001, 0xdb8, 0x51, 0, 0, 0, 0, n.into()])
    }

    /// The node's primary address.
    pub(super) fn node(self) -> IpAddr {
        self.either([192, 0, 2, 1], [0x2001, 0xdb8, 2, 0, 0, 0, 0, 1])
    }

    /// Another address of the node.
    pub(super) fn node_other(self) -> IpAddr {
        self.either([203, 0, 113, 1], [0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 1])
    }

    /// The node's address for itself.
    pub(super) fn loopback(self) -> IpAddr {
        self.either([127, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 1])
    }

    /// A client outside the cluster: the first, the second and so on.
    pub(super) fn client(self, n: u8) -> IpAddr {
        self.either([192, 0, 2, 1 + n], [0x2001, 0xdb8, 2, 0, 0, 0, 0, 1 + u16::from(n)])
    }

    /// A pod.
    pub(super) fn pod(self, n: u8) -> IpAddr {
        self.either([10, 244, n, 2], [0xfd00, 0x10, 0, 0, 0, 0, n.into(), 2])
    }

    /// The node's address towards a pod.
    pub(super) fn gateway(self, n: u8) -> IpAddr {
        self.either([10, 244, n, 1], [0xfd00, 0x10, 0, 0, 0, 0, n.into(), 1])
    }

    /// All addresses of the node.
    pub(super) fn nodes(self) -> impl Iterator<Item = IpAddr> {
        let own = [self.node(), self.node_other(), self.loopback()];
        own.into_iter().chain((1..=PODS).map(move |n| self.gateway(n)))
    }

    /// A range with nothing but this address.
    pub(super) fn only(self, address: IpAddr) -> String {
        format!("{address}/{}", if self.0 == Family::V4 { 32 } else { 128 })
    }
}

/// Ranges of pods in both families.
pub(super) const POD_RANGES: [&str; 2] = ["10.244.0.0/16", "fd00:10::/64"];

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum From {
    /// A client outside the cluster, by one of its addresses.
    Client(u8),
    /// The node itself.
    Node,
    /// A pod.
    Pod(u8),
}

/// What came of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Answer {
    /// This endpoint answered on this port, and saw this address.
    By(u8, u16, IpAddr),
    /// It was refused at once.
    Refused,
    /// It was taken and closed without an answer.
    Closed,
    /// Nothing came back.
    Silence,
    /// Something else went wrong.
    Failed(ErrorKind),
}

/// The network.
pub(super) struct Net {
    pub(super) host: Namespace,
    client: Namespace,
    pods: Vec<Namespace>,
    /// Who leads packets without a better way out of the host.
    _nowhere: Namespace,
}

impl Net {
    /// Makes it, with a server in each pod and one on the node. Needs root.
    pub(super) fn new() -> Self {
        let (host, client, nowhere) = (Namespace::new(), Namespace::new(), Namespace::new());
        let both = [Addresses(Family::V4), Addresses(Family::V6)];
        let with_sctp = sctp::available();
        host.sh(
            "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 \
             net.ipv6.conf.default.accept_dad=0 \
             net.ipv4.icmp_ratelimit=0 net.ipv6.icmp.ratelimit=0 net.ipv4.icmp_msgs_per_sec=100000",
        );
        host.join("client", &client, "eth0");
        // A way out of its own: sent back where it came from, a packet would be answered with a
        // redirect.
        host.join("out", &nowhere, "eth0");
        nowhere.sh("ip link set eth0 arp off; sysctl -qw net.ipv6.conf.all.disable_ipv6=1");
        // Each program that is started takes its time, most of all in a virtual machine.
        let mut on_host = Vec::new();
        let mut on_client = Vec::new();
        for a in both {
            let (_, short) = prefixes(a);
            on_host.push(add("client", a.node(), short));
            on_host.push(add("out", a.node_other(), short));
            on_client.extend((1..=CLIENTS).map(|n| add("eth0", a.client(n), short)));
            on_client.push(default_route(a.node()));
            let out = match a.0 {
                Family::V4 => "203.0.113.2",
                Family::V6 => "2001:db8:113::2",
            };
            on_host.push(format!("neigh add {out} dev out lladdr 02:00:00:00:00:01"));
            on_host.push(default_route(out));
        }
        let mut pods = Vec::new();
        for n in 1..=PODS {
            let pod = Namespace::new();
            host.join(&format!("pod{n}"), &pod, "eth0");
            let mut on_pod = Vec::new();
            for a in both {
                let (long, _) = prefixes(a);
                on_host.push(add(&format!("pod{n}"), a.gateway(n), long));
                on_pod.push(add("eth0", a.pod(n), long));
                on_pod.push(default_route(a.gateway(n)));
            }
            ip(&pod, &on_pod);
            for a in both {
                pod.run(move || serve(n, a.pod(n), with_sctp));
            }
            pods.push(pod);
        }
        ip(&client, &on_client);
        ip(&host, &on_host);
        until("the node knows its own addresses", || {
            let local = host.sh("ip -6 route show table local");
            let known = |address: IpAddr| local.contains(&format!("local {address} "));
            Addresses(Family::V6).nodes().all(known)
        });
        for a in both {
            host.run(move || serve(ON_NODE, a.node(), with_sctp));
        }
        let net = Self { host, client, pods, _nowhere: nowhere };
        if with_sctp {
            [&net.host, &net.client].into_iter().chain(&net.pods).for_each(sctp::hasten);
        }
        net
    }

    /// Where somebody is.
    pub(super) fn place(&self, from: From) -> &Namespace {
        match from {
            From::Client(_) => &self.client,
            From::Node => &self.host,
            From::Pod(n) => &self.pods[usize::from(n) - 1],
        }
    }

    /// One connection, with an address of the target's family.
    pub(super) fn ask(&self, from: From, protocol: Protocol, to: SocketAddr) -> Answer {
        let source = source(from, to);
        self.place(from).run(move || ask(protocol, source, to, PATIENCE))
    }

    /// The same, without much patience.
    pub(super) fn ask_briefly(&self, from: From, protocol: Protocol, to: SocketAddr) -> Answer {
        let source = source(from, to);
        self.place(from).run(move || ask(protocol, source, to, SILENCE))
    }

    /// The same where silence is likely, without waiting for it.
    pub(super) fn ask_meanwhile(
        &self,
        from: From,
        protocol: Protocol,
        to: SocketAddr,
        done: Sender<Answer>,
    ) {
        let patience = if protocol == Protocol::Sctp { sctp::SILENCE } else { SILENCE };
        self.ask_for(patience, from, protocol, to, done);
    }

    /// The same where an answer will come at last.
    pub(super) fn ask_patiently(
        &self,
        from: From,
        protocol: Protocol,
        to: SocketAddr,
        done: Sender<Answer>,
    ) {
        self.ask_for(PATIENCE, from, protocol, to, done);
    }

    fn ask_for(
        &self,
        patience: Duration,
        from: From,
        protocol: Protocol,
        to: SocketAddr,
        done: Sender<Answer>,
    ) {
        let source = source(from, to);
        self.place(from).run(move || {
            std::thread::spawn(move || {
                let _ = done.send(ask(protocol, source, to, patience));
            });
        });
    }
}

/// One connection from the namespace of the calling thread.
pub(super) fn ask(
    protocol: Protocol,
    source: SocketAddr,
    to: SocketAddr,
    patience: Duration,
) -> Answer {
    match protocol {
        Protocol::Tcp => answer(ask_tcp(source, to, patience)),
        Protocol::Udp => ask_udp(source, to, patience),
        Protocol::Sctp => answer(sctp::ask(source, to, patience)),
    }
}

/// The address that a client binds to, with any port; only those outside have several.
pub(super) fn source(from: From, to: SocketAddr) -> SocketAddr {
    let addresses = Addresses(Family::of(to.ip()));
    let address = match from {
        From::Client(n) => addresses.client(n),
        _ => addresses.either([0; 4], [0; 8]),
    };
    SocketAddr::new(address, 0)
}

/// Lengths of prefixes: of a pod's network and of others.
fn prefixes(addresses: Addresses) -> (u8, u8) {
    match addresses.0 {
        Family::V4 => (24, 24),
        Family::V6 => (112, 64),
    }
}

fn add(interface: &str, address: IpAddr, prefix: u8) -> String {
    let nodad = if address.is_ipv6() { "nodad" } else { "" };
    format!("addr add {address}/{prefix} dev {interface} {nodad}")
}

fn default_route(via: impl Display) -> String {
    format!("route add default via {via}")
}

/// Commands to `ip`, all with one start of it.
fn ip(namespace: &Namespace, commands: &[String]) {
    namespace.sh(&format!("ip -batch - <<'END'\n{}\nEND", commands.join("\n")));
}

/// Answers each connection with a number, the port and the client's address, until the process
/// ends.
fn serve(n: u8, address: IpAddr, with_sctp: bool) {
    for port in POD_PORTS {
        if with_sctp {
            sctp::serve(n, address, port);
        }
        let listener = TcpListener::bind((address, port)).unwrap();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                if let Ok(peer) = stream.peer_addr() {
                    let _ = write!(stream, "{n} {port} {}", peer.ip());
                }
            }
        });
        let socket = UdpSocket::bind((address, port)).unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 100];
            while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(format!("{n} {port} {}", peer.ip()).as_bytes(), peer);
            }
        });
    }
}

/// One TCP connection.
fn ask_tcp(source: SocketAddr, to: SocketAddr, patience: Duration) -> std::io::Result<String> {
    let mut stream = connect(source, to, patience)?;
    stream.set_read_timeout(Some(patience))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// A connection from a given address, in bounded time.
fn connect(source: SocketAddr, to: SocketAddr, patience: Duration) -> std::io::Result<TcpStream> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let stream = runtime.block_on(async {
        let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.bind(source)?;
        tokio::time::timeout(patience, socket.connect(to)).await?
    })?;
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// One datagram and its answer, from a socket of its own. As clients do, it asks again after a
/// while: datagrams may be lost.
fn ask_udp(source: SocketAddr, to: SocketAddr, patience: Duration) -> Answer {
    let asked = || -> std::io::Result<String> {
        let deadline = Instant::now() + patience;
        let socket = UdpSocket::bind(source)?;
        socket.set_read_timeout(Some(patience.min(AGAIN)))?;
        socket.connect(to)?;
        loop {
            match socket.send(b"?") {
                // That is how the node learns of its own packets that were dropped, also in order
                // to be refused.
                Err(error) if error.kind() == ErrorKind::PermissionDenied => {}
                sent => drop(sent?),
            }
            let mut buffer = [0; 100];
            match socket.recv(&mut buffer) {
                Ok(length) => return Ok(String::from_utf8_lossy(&buffer[..length]).into_owned()),
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => {}
            }
        }
    };
    answer(asked())
}

/// What a client makes of it.
pub(super) fn answer(asked: std::io::Result<String>) -> Answer {
    match asked {
        Ok(text) => {
            let mut words = text.split(' ');
            let mut word = || words.next().unwrap_or_default();
            match (word().parse(), word().parse(), word().parse()) {
                (Ok(n), Ok(port), Ok(seen)) => Answer::By(n, port, seen),
                _ => Answer::Closed,
            }
        }
        Err(error) => match error.kind() {
            ErrorKind::ConnectionRefused => Answer::Refused,
            ErrorKind::ConnectionReset => Answer::Closed,
            ErrorKind::TimedOut | ErrorKind::WouldBlock => Answer::Silence,
            kind => Answer::Failed(kind),
        },
    }
}

/// The rules as the distribution's program lists them.
pub(super) fn listed(net: &Net, mode: Mode, family: Family) -> String {
    let command = match (mode, family) {
        (Mode::Nftables, Family::V4) => "nft -s list table ip keelson-proxy 2>/dev/null || true",
        (Mode::Nftables, Family::V6) => "nft -s list table ip6 keelson-proxy 2>/dev/null || true",
        (Mode::Iptables, Family::V4) => "iptables-save",
        (Mode::Iptables, Family::V6) => "ip6tables-save",
        (Mode::Userspace, Family::V4) => "ip -4 route show table local",
        (Mode::Userspace, Family::V6) => "ip -6 route show table local",
    };
    let listed = net.host.sh(command);
    // Without comments and counters.
    let kept = listed.lines().filter(|line| !line.starts_with('#'));
    kept.map(|line| line.split(" [").next().unwrap_or(line)).collect::<Vec<_>>().join("\n")
}
