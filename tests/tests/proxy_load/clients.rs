//! Clients that connect without pause, or hold on to a connection, and remember what failed.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream, UdpSocket},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use keelson_tests::inside::{enter, inside};
use socket2::{Domain, Protocol, Socket, Type};

/// How long a client waits for its answer: a lost packet of TCP is sent again after a second.
const ANSWER: Duration = Duration::from_millis(2_500);
/// After so long a datagram is sent again, as clients do.
const AGAIN: Duration = Duration::from_millis(200);
/// Between two connections of one client at first: the others want to be heard too. The fewer
/// ports are left the longer it pauses, so that they last where everything takes long.
const PAUSE: Duration = Duration::from_millis(6);
/// After so many connections a client pauses longer by [`PAUSE`].
const SLOWER_AFTER: u16 = 4_000;
/// Between two words of a conversation.
const WORD: Duration = Duration::from_millis(20);
/// Clients use a port after the other from here on. What was on its way when rules were missing
/// stays untranslated in the kernel's memory for minutes, so none is used twice.
const FIRST_PORT: u16 = 33_000;
/// How many ports a client has: for several minutes.
const PORTS: u16 = 16_000;
/// The ports that the kernel gives to whoever doesn't ask for one: neither the clients' nor node
/// ports.
const OTHER_PORTS: &str = "16000 29999";

/// What a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Speaks {
    Tcp,
    Udp,
}

/// Something that failed.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    /// When the client began.
    pub(crate) began: Instant,
    /// When it gave up, or was told.
    pub(crate) ended: Instant,
    /// Who, and what happened.
    pub(crate) what: String,
    /// When the connection was opened, if it was.
    pub(crate) opened: Option<Instant>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    connections: AtomicUsize,
    words: AtomicUsize,
    failures: Mutex<Vec<Failure>>,
}

impl Shared {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn failed(&self, who: &str, began: Instant, broken: Broken) {
        let Broken { opened, asked, error } = broken;
        let failure = Failure {
            began: asked.unwrap_or(began),
            ended: Instant::now(),
            what: format!("{who}: {error}"),
            opened,
        };
        self.failures.lock().expect("no client panicked").push(failure);
    }
}

/// All clients.
#[derive(Debug, Default)]
pub(crate) struct Clients {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// What came of them.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) connections: usize,
    pub(crate) words: usize,
    pub(crate) failures: Vec<Failure>,
}

impl Clients {
    /// Starts one that opens a connection after the other, from the `nth` range of ports in its
    /// namespace.
    pub(crate) fn connect(&mut self, netns: &str, nth: u16, speaks: Speaks, to: SocketAddrV4) {
        let who = format!("{netns} to {speaks:?} {to}");
        let first = FIRST_PORT + nth * PORTS;
        self.spawn(netns, move |shared| {
            for port in first..first + PORTS {
                if shared.stopped() {
                    return;
                }
                let began = Instant::now();
                let asked = ask_once(speaks, port, to);
                shared.connections.fetch_add(1, Ordering::Relaxed);
                if let Err(broken) = asked {
                    shared.failed(&who, began, broken);
                }
                // Nothing to wait for: so the client's rate is held down.
                thread::sleep(PAUSE * u32::from(1 + (port - first) / SLOWER_AFTER));
            }
            panic!("{who}: all {PORTS} ports were used before the test's end");
        });
    }

    /// Starts one that keeps its connection as long as it can, and then makes another.
    pub(crate) fn converse(&mut self, netns: &str, speaks: Speaks, to: SocketAddrV4) {
        let who = format!("{netns} in conversation with {speaks:?} {to}");
        self.spawn(netns, move |shared| {
            while !shared.stopped() {
                let began = Instant::now();
                let conversation = match speaks {
                    Speaks::Tcp => converse_tcp(&shared, to),
                    Speaks::Udp => converse_udp(&shared, to),
                };
                if let Err(broken) = conversation {
                    shared.failed(&who, began, broken);
                }
            }
        });
    }

    fn spawn(&mut self, netns: &str, work: impl FnOnce(Arc<Shared>) + Send + 'static) {
        let (netns, shared) = (netns.to_owned(), Arc::clone(&self.shared));
        self.threads.push(thread::spawn(move || {
            enter(&netns).expect("the client's namespace");
            work(shared);
        }));
    }

    /// Ends them; those under way are waited for.
    pub(crate) fn stop(self) -> Outcome {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("a client");
        }
        let mut failures = self.shared.failures.lock().expect("no client panicked");
        Outcome {
            connections: self.shared.connections.load(Ordering::Relaxed),
            words: self.shared.words.load(Ordering::Relaxed),
            failures: std::mem::take(&mut failures),
        }
    }
}

/// What ended a connection.
struct Broken {
    /// When it was opened, if it was.
    opened: Option<Instant>,
    /// Since when there was no answer, where that is later than its beginning.
    asked: Option<Instant>,
    error: io::Error,
}

impl From<io::Error> for Broken {
    /// It was never opened.
    fn from(error: io::Error) -> Self {
        Self { opened: None, asked: None, error }
    }
}

/// Keeps the clients' ports in a namespace for the clients.
pub(crate) fn reserve_ports(netns: &str) {
    let path = "/proc/sys/net/ipv4/ip_local_port_range";
    inside(netns, || Ok(std::fs::write(path, OTHER_PORTS)?)).expect("the range of ports");
}

/// The number of the endpoint that answers one connection.
pub(crate) fn ask(speaks: Speaks, port: u16, to: SocketAddrV4) -> io::Result<u8> {
    ask_once(speaks, port, to).map_err(|broken| broken.error)
}

fn ask_once(speaks: Speaks, port: u16, to: SocketAddrV4) -> Result<u8, Broken> {
    let mut answer = [0];
    match speaks {
        Speaks::Tcp => {
            let mut stream = connect(port, to)?;
            let opened = Some(Instant::now());
            let read = stream.read_exact(&mut answer);
            read.map_err(|error| Broken { opened, asked: None, error })?;
        }
        Speaks::Udp => {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))?;
            socket.set_read_timeout(Some(AGAIN))?;
            socket.connect(to)?;
            exchange(&socket, &mut answer)?;
        }
    }
    Ok(answer[0])
}

fn connect(port: u16, to: SocketAddrV4) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    if port > 0 {
        socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)).into())?;
    }
    socket.connect_timeout(&SocketAddr::from(to).into(), ANSWER)?;
    socket.set_read_timeout(Some(ANSWER))?;
    Ok(socket.into())
}

/// A datagram and its answer.
fn exchange(socket: &UdpSocket, answer: &mut [u8]) -> io::Result<()> {
    let deadline = Instant::now() + ANSWER;
    loop {
        match socket.send(b"?") {
            // That is how the node learns of its own packets that were dropped.
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {}
            sent => drop(sent?),
        }
        match socket.recv(answer) {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => {}
        }
    }
}

fn converse_tcp(shared: &Shared, to: SocketAddrV4) -> Result<(), Broken> {
    let mut stream = connect(0, to)?;
    let opened = Some(Instant::now());
    stream.set_nodelay(true)?;
    let read = stream.read_exact(&mut [0]);
    read.map_err(|error| Broken { opened, asked: None, error })?;
    while !shared.stopped() {
        let asked = Some(Instant::now());
        let said = stream.write_all(b"?").and_then(|()| stream.read_exact(&mut [0]));
        said.map_err(|error| Broken { opened, asked, error })?;
        shared.words.fetch_add(1, Ordering::Relaxed);
        thread::sleep(WORD);
    }
    Ok(())
}

fn converse_udp(shared: &Shared, to: SocketAddrV4) -> Result<(), Broken> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_read_timeout(Some(AGAIN))?;
    socket.connect(to)?;
    while !shared.stopped() {
        let asked = Some(Instant::now());
        // Whatever becomes of the rules, a datagram that is sent again finds a way.
        exchange(&socket, &mut [0]).map_err(|error| Broken { opened: None, asked, error })?;
        shared.words.fetch_add(1, Ordering::Relaxed);
        thread::sleep(WORD);
    }
    Ok(())
}
