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

use keelson_tests::inside::enter;
use socket2::{Domain, Protocol, Socket, Type};

/// How long a client waits for its answer: a lost packet of TCP is sent again after a second.
const ANSWER: Duration = Duration::from_millis(2_500);
/// After so long a datagram is sent again, as clients do.
const AGAIN: Duration = Duration::from_millis(200);
/// Between two connections of one client: the others want to be heard too.
const PAUSE: Duration = Duration::from_millis(6);
/// Between two words of a conversation.
const WORD: Duration = Duration::from_millis(20);
/// Clients use a port after the other from here on. What was on its way when rules were missing
/// stays untranslated in the kernel's memory for minutes, so none is used twice.
const FIRST_PORT: u16 = 33_000;
/// How many ports a client has.
const PORTS: u16 = 8_000;

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
    /// It was a connection that had worked before.
    pub(crate) established: bool,
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

    fn failed(&self, began: Instant, what: String, established: bool) {
        let failure = Failure { began, ended: Instant::now(), what, established };
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
            for port in (first..first + PORTS).cycle() {
                if shared.stopped() {
                    return;
                }
                let began = Instant::now();
                let asked = ask(speaks, port, to);
                shared.connections.fetch_add(1, Ordering::Relaxed);
                if let Err(error) = asked {
                    shared.failed(began, format!("{who}: {error}"), false);
                }
                thread::sleep(PAUSE);
            }
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
                if let Err((since, error)) = conversation {
                    shared.failed(since.unwrap_or(began), format!("{who}: {error}"), true);
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

/// The number of the endpoint that answers one connection.
pub(crate) fn ask(speaks: Speaks, port: u16, to: SocketAddrV4) -> io::Result<u8> {
    let mut answer = [0];
    match speaks {
        Speaks::Tcp => {
            let mut stream = connect(port, to)?;
            stream.set_read_timeout(Some(ANSWER))?;
            stream.read_exact(&mut answer)?;
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

/// What ended a conversation, and since when there was no answer; the connection itself if there is
/// no such time.
type Ended = (Option<Instant>, io::Error);

fn converse_tcp(shared: &Shared, to: SocketAddrV4) -> Result<(), Ended> {
    let begin = || -> io::Result<TcpStream> {
        let mut stream = connect(0, to)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.read_exact(&mut [0])?;
        Ok(stream)
    };
    let mut stream = begin().map_err(|error| (None, error))?;
    while !shared.stopped() {
        let asked = Instant::now();
        let said = stream.write_all(b"?").and_then(|()| stream.read_exact(&mut [0]));
        said.map_err(|error| (Some(asked), error))?;
        shared.words.fetch_add(1, Ordering::Relaxed);
        thread::sleep(WORD);
    }
    Ok(())
}

fn converse_udp(shared: &Shared, to: SocketAddrV4) -> Result<(), Ended> {
    let begin = || -> io::Result<UdpSocket> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.set_read_timeout(Some(AGAIN))?;
        socket.connect(to)?;
        Ok(socket)
    };
    let socket = begin().map_err(|error| (None, error))?;
    while !shared.stopped() {
        let asked = Instant::now();
        exchange(&socket, &mut [0]).map_err(|error| (Some(asked), error))?;
        shared.words.fetch_add(1, Ordering::Relaxed);
        thread::sleep(WORD);
    }
    Ok(())
}
