//! Connections, and who answers them.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use nix::sys::socket::{setsockopt, sockopt};

use crate::{
    api::DEADLINE,
    inside::{enter, inside},
};

/// Where endpoints listen.
pub(super) const PORT: u16 = 8080;
/// The Services' port.
const SERVICE_PORT: u16 = 80;
/// Addresses of endpoints.
const ENDPOINTS: &str = "10.200.0.0/16";
/// After so long a connection is tried anew: many times what one takes, far below what is aimed at.
const PATIENCE: Duration = Duration::from_millis(2);
/// After so long a connection is lost.
const LOSS: Duration = Duration::from_secs(1);
/// Clients that connect at the same time, and connections of each, for one figure.
const CLIENTS: usize = 2;
const CONNECTIONS: usize = 500;
/// Between two tries, to leave the processor to what is measured.
const PAUSE: Duration = Duration::from_micros(100);

/// Answers at every endpoint's address with that address.
#[derive(Debug)]
pub(super) struct Listener {
    netns: String,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Listener {
    /// Gives the namespace all endpoints' addresses and listens there.
    pub(super) fn start(netns: &str) -> anyhow::Result<Self> {
        let output = Command::new("ip")
            .args(["-n", netns, "route", "add", "local", ENDPOINTS, "dev", "lo"])
            .output()
            .context("ip")?;
        if !output.status.success() {
            bail!("ip route add local {ENDPOINTS}: {}", String::from_utf8_lossy(&output.stderr));
        }
        let listener = inside(netns, || {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).context("listen for the endpoints")
        })?;
        let stop = Arc::new(AtomicBool::new(false));
        let answer = |listener: TcpListener, stop: Arc<AtomicBool>| {
            move || {
                while !stop.load(Ordering::Relaxed) {
                    // A client that gave up before its connection was accepted is no error here.
                    let Ok((mut stream, _)) = listener.accept() else { continue };
                    if let Ok(SocketAddr::V4(address)) = stream.local_addr() {
                        let _ = stream.write_all(&address.ip().octets());
                    }
                }
            }
        };
        let mut threads = Vec::new();
        for _ in 0..CLIENTS {
            threads.push(thread::spawn(answer(listener.try_clone()?, Arc::clone(&stop))));
        }
        Ok(Self { netns: netns.to_owned(), stop, threads })
    }

    /// Ends it.
    pub(super) fn stop(self) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            while !thread.is_finished() {
                inside(&self.netns, || {
                    // It looks at the flag after the next connection, and another may get that. Once
                    // the last one is gone nobody takes it.
                    let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, PORT));
                    Ok(())
                })?;
            }
            thread.join().map_err(|_| anyhow::anyhow!("the listener panicked"))?;
        }
        Ok(())
    }
}

/// Which endpoint answers at a Service's address, if one does now.
fn ask(service: Ipv4Addr) -> Option<Ipv4Addr> {
    ask_at(service_at(service), PATIENCE, Duration::from_millis(200)).ok()
}

fn ask_at(address: SocketAddr, connect: Duration, answer: Duration) -> io::Result<Ipv4Addr> {
    let mut stream = TcpStream::connect_timeout(&address, connect)?;
    stream.set_read_timeout(Some(answer))?;
    // Closed by a reset: what waits a minute after an orderly end would meet later connections that
    // are translated to the same ports, and make them wait for a second.
    setsockopt(&stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
    let mut address = [0; 4];
    stream.read_exact(&mut address)?;
    Ok(Ipv4Addr::from(address))
}

/// How long one connection takes to be answered by an endpoint, in milliseconds.
///
/// # Errors
/// When it isn't.
pub(super) fn round_trip(service: Ipv4Addr) -> anyhow::Result<f64> {
    let begin = Instant::now();
    ask_at(service_at(service), LOSS, LOSS)
        .with_context(|| format!("{service}:{SERVICE_PORT} does not answer"))?;
    Ok(begin.elapsed().as_secs_f64() * 1e3)
}

/// How many connections a second several clients get answered, each as fast as it can.
///
/// # Errors
/// When one isn't.
pub(super) fn rate(netns: &str, address: SocketAddr) -> anyhow::Result<f64> {
    let begin = Instant::now();
    thread::scope(|scope| {
        let client = || {
            enter(netns)?;
            for _ in 0..CONNECTIONS {
                ask_at(address, LOSS, LOSS)
                    .with_context(|| format!("{address} does not answer"))?;
            }
            anyhow::Ok(())
        };
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(client)).collect();
        clients.into_iter().try_for_each(|client| {
            client.join().map_err(|_| anyhow::anyhow!("connecting panicked"))?
        })
    })?;
    Ok((CLIENTS * CONNECTIONS) as f64 / begin.elapsed().as_secs_f64())
}

/// Where a Service is reached.
pub(super) fn service_at(service: Ipv4Addr) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(service), SERVICE_PORT)
}

/// Connects again and again until an endpoint answers that is wanted; when its answer was there.
/// To be called in the node's namespace.
///
/// # Errors
/// When that takes too long.
pub(super) fn wait_answer(
    service: Ipv4Addr,
    wanted: impl Fn(Ipv4Addr) -> bool,
) -> anyhow::Result<Instant> {
    wait_answer_for(DEADLINE, service, wanted)
}

/// As [`wait_answer`], and no longer than this.
///
/// # Errors
/// When it took longer.
pub(super) fn wait_answer_for(
    longest: Duration,
    service: Ipv4Addr,
    wanted: impl Fn(Ipv4Addr) -> bool,
) -> anyhow::Result<Instant> {
    let start = Instant::now();
    while start.elapsed() < longest {
        if ask(service).is_some_and(&wanted) {
            return Ok(Instant::now());
        }
        thread::sleep(PAUSE);
    }
    bail!("{service}:{SERVICE_PORT}: no answer of the wanted endpoint in {longest:?}")
}

/// Starts [`wait_answer`] for one endpoint on a thread of its own in the node's namespace, and
/// returns once it has connected for the first time.
pub(super) fn watch(
    netns: &str,
    service: Ipv4Addr,
    endpoint: Ipv4Addr,
) -> anyhow::Result<JoinHandle<anyhow::Result<Instant>>> {
    let netns = netns.to_owned();
    let (ready, is_ready) = std::sync::mpsc::channel();
    let thread = thread::spawn(move || {
        enter(&netns)?;
        wait_answer(service, |_| true)?;
        let _ = ready.send(());
        wait_answer(service, |answer| answer == endpoint)
    });
    is_ready.recv_timeout(DEADLINE).context("the Service does not answer before its change")?;
    Ok(thread)
}
