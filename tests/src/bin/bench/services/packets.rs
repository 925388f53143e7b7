//! Connections, and who answers them.

use std::{
    io::{Read, Write},
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
/// Between two tries, to leave the processor to what is measured.
const PAUSE: Duration = Duration::from_micros(100);

/// Answers at every endpoint's address with that address.
#[derive(Debug)]
pub(super) struct Listener {
    netns: String,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<()>>,
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
        let thread = thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                while !stop.load(Ordering::Relaxed) {
                    // A client that gave up before its connection was accepted is no error here.
                    let Ok((mut stream, _)) = listener.accept() else { continue };
                    if let Ok(SocketAddr::V4(address)) = stream.local_addr() {
                        let _ = stream.write_all(&address.ip().octets());
                    }
                }
                Ok(())
            }
        });
        Ok(Self { netns: netns.to_owned(), stop, thread })
    }

    /// Ends it.
    pub(super) fn stop(self) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        inside(&self.netns, || {
            // It looks at the flag after the next connection.
            TcpStream::connect((Ipv4Addr::LOCALHOST, PORT)).map(drop).context("wake the listener")
        })?;
        match self.thread.join() {
            Ok(result) => result,
            Err(_) => bail!("the listener panicked"),
        }
    }
}

/// Which endpoint answers at a Service's address, if one does now.
fn ask(service: Ipv4Addr) -> Option<Ipv4Addr> {
    let address = SocketAddr::new(IpAddr::V4(service), SERVICE_PORT);
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE).ok()?;
    stream.set_read_timeout(Some(Duration::from_millis(200))).ok()?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).ok()?;
    Some(Ipv4Addr::from(answer))
}

/// How long one connection takes to be answered by an endpoint, in milliseconds.
///
/// # Errors
/// When it isn't.
pub(super) fn round_trip(service: Ipv4Addr) -> anyhow::Result<f64> {
    let begin = Instant::now();
    ask(service).with_context(|| format!("{service}:{SERVICE_PORT} does not answer"))?;
    Ok(begin.elapsed().as_secs_f64() * 1e3)
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
    let start = Instant::now();
    while start.elapsed() < DEADLINE {
        if ask(service).is_some_and(&wanted) {
            return Ok(Instant::now());
        }
        thread::sleep(PAUSE);
    }
    bail!("{service}:{SERVICE_PORT}: no answer of the wanted endpoint in {DEADLINE:?}")
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
