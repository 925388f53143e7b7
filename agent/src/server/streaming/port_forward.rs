//! port-forward: connections from a client to TCP ports of a pod's own loopback.
//!
//! Over SPDY (also inside a WebSocket) each connection is a pair of streams with the headers `port`,
//! `requestID` and `streamType` (`data`, `error`). Over a WebSocket of channels the ports stand in
//! the query, and each has two channels, data and errors, both beginning with the port as two bytes,
//! the low one first.

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, StatusCode};
use hyper::body::Incoming as RequestBody;
use keelson_runtime_shim::{PodRuntime, runtime::SandboxId};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
    task::JoinSet,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    FORWARD_PROTOCOLS, FORWARD_SPDY_PROTOCOLS, FORWARD_TUNNEL, Transport, Upgrade,
    spdy::{Connection, Stream, StreamOutput},
    upgrade,
    websocket::{self, ChannelOutput, Channels, Incoming, Tunnel},
};
use crate::server::answer::{Answer, refused};

/// How long the second stream of a pair may take after the first.
const PAIRING: Duration = Duration::from_secs(30);
/// Pairs that wait for their second stream.
const MAX_UNPAIRED: usize = 256;
/// Bytes taken from a socket at once.
const PIECE: usize = 32 << 10;
/// Pieces that wait for a pod to take them.
const QUEUE: usize = 16;
/// Ports in one query.
const MAX_PORTS: usize = 64;

/// Upgrades the connection, and forwards in a task of `tasks`.
pub(crate) fn port_forward(
    mut request: Request<RequestBody>,
    runtime: Arc<dyn PodRuntime>,
    sandbox: SandboxId,
    ports: Vec<u16>,
    tasks: &TaskTracker,
    shutdown: CancellationToken,
) -> Answer {
    let (upgrade, answer) = match upgrade(&mut request, &FORWARD_PROTOCOLS, &FORWARD_SPDY_PROTOCOLS)
    {
        Ok(upgraded) => upgraded,
        Err(answer) => return *answer,
    };
    let channels = matches!(upgrade.transport, Transport::WebSocket(p) if p != FORWARD_TUNNEL);
    if channels && (ports.is_empty() || ports.len() > MAX_PORTS) {
        return refused(
            StatusCode::BAD_REQUEST,
            &format!("query parameter \"ports\" must name 1 to {MAX_PORTS} ports"),
        );
    }
    let forward = Forward { runtime, sandbox };
    tasks.spawn(async move {
        tokio::select! {
            () = serve(upgrade, forward, ports) => {}
            () = shutdown.cancelled() => {}
        }
    });
    answer
}

#[derive(Clone)]
struct Forward {
    runtime: Arc<dyn PodRuntime>,
    sandbox: SandboxId,
}

async fn serve(upgrade: Upgrade, forward: Forward, ports: Vec<u16>) {
    let upgraded = match upgrade.pending.await {
        Ok(upgraded) => upgraded,
        Err(error) => {
            tracing::debug!(%error, "port-forward: not upgraded");
            return;
        }
    };
    let connection = match upgrade.transport {
        Transport::WebSocket(FORWARD_TUNNEL) => {
            Connection::start(Tunnel::new(websocket::accept(upgraded).await))
        }
        Transport::WebSocket(_) => {
            let channels = Channels::start(websocket::accept(upgraded).await);
            return forward_channels(channels, forward, &ports).await;
        }
        Transport::Spdy => Connection::start(hyper_util::rt::TokioIo::new(upgraded)),
    };
    match connection {
        Ok(connection) => forward_streams(connection, forward).await,
        Err(error) => tracing::debug!(%error, "port-forward"),
    }
}

/// The first stream of a pair that came.
struct Half {
    stream: Stream,
    since: tokio::time::Instant,
}

async fn forward_streams(mut connection: Connection, forward: Forward) {
    let mut halves: HashMap<String, Half> = HashMap::new();
    let mut pairs = JoinSet::new();
    while let Some(stream) = connection.accept().await {
        while pairs.try_join_next().is_some() {}
        halves.retain(|_, half| half.since.elapsed() < PAIRING);
        // Clients before 1.4 sent no request id; a connection then carried one pair for each port.
        let id = match stream.header("requestid") {
            "" => stream.header("port").to_owned(),
            id => id.to_owned(),
        };
        let (data, error) = match (stream.header("streamtype"), halves.remove(&id)) {
            ("data" | "error", None) if halves.len() < MAX_UNPAIRED => {
                halves.insert(id, Half { stream, since: tokio::time::Instant::now() });
                continue;
            }
            ("data", Some(half)) if half.stream.header("streamtype") == "error" => {
                (stream, half.stream)
            }
            ("error", Some(half)) if half.stream.header("streamtype") == "data" => {
                (half.stream, stream)
            }
            (kind, _) => {
                tracing::debug!(kind, id, "port-forward: a stream that fits no other");
                continue;
            }
        };
        pairs.spawn(forward_pair(data, error, forward.clone()));
    }
    // The client is gone: so are its connections.
    pairs.shutdown().await;
    drop(halves);
    connection.flush().await;
}

async fn forward_pair(data: Stream, error: Stream, forward: Forward) {
    let port: Option<u16> = data.header("port").parse().ok().filter(|port| *port != 0);
    let result = match port {
        Some(port) => {
            let (input, output) = (data.input, data.output);
            carry(&forward, port, input, Sink::Spdy(output)).await
        }
        None => Err(format!("{:?} is not a port", data.header("port"))),
    };
    if let Err(message) = result {
        error.output.send(Bytes::from(message)).await;
    }
    error.output.finish().await;
}

async fn forward_channels(channels: Channels, forward: Forward, ports: &[u16]) {
    let mut inputs = Vec::new();
    let mut carriers = JoinSet::new();
    for (index, port) in ports.iter().copied().enumerate() {
        // At most 64 ports: the numbers fit.
        let number = index as u8 * 2;
        let (data, error) = (channels.output(number), channels.output(number + 1));
        data.send(&port.to_le_bytes()).await;
        error.send(&port.to_le_bytes()).await;
        let (sender, input) = mpsc::channel(QUEUE);
        inputs.push(Some(sender));
        let forward = forward.clone();
        carriers.spawn(async move {
            if let Err(message) = carry(&forward, port, input, Sink::Channel(data)).await {
                error.send(message.as_bytes()).await;
            }
        });
    }
    let (mut reader, writer) = channels.into_parts();
    loop {
        tokio::select! {
            incoming = reader.next() => match incoming {
                Some(Incoming::Bytes { channel, bytes }) if channel % 2 == 0 => {
                    if let Some(Some(sender)) = inputs.get(usize::from(channel / 2)) {
                        let _ = sender.send(bytes).await;
                    }
                }
                Some(Incoming::Closed { channel }) => {
                    if let Some(sender) = inputs.get_mut(usize::from(channel / 2)) {
                        *sender = None;
                    }
                }
                Some(Incoming::Bytes { .. }) => {}
                None => break,
            },
            ended = carriers.join_next() => if ended.is_none() {
                break;
            },
        }
    }
    carriers.shutdown().await;
    let _ = writer.await;
}

enum Sink {
    Spdy(StreamOutput),
    Channel(ChannelOutput),
}

impl Sink {
    async fn send(&self, bytes: &[u8]) -> bool {
        match self {
            Self::Spdy(output) => output.send(Bytes::copy_from_slice(bytes)).await,
            Self::Channel(output) => output.send(bytes).await,
        }
    }
}

/// Connects to the pod's port and carries bytes both ways until both sides are done.
async fn carry(
    forward: &Forward,
    port: u16,
    mut input: mpsc::Receiver<Bytes>,
    output: Sink,
) -> Result<(), String> {
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        format!("error forwarding port {port} to pod {}, {what}: {error}", forward.sandbox)
    };
    let connected = forward.runtime.port_forward(&forward.sandbox, port).await;
    let pod = connected.map_err(|error| failed("connect", &error))?;
    let (mut from_pod, mut to_pod) = tokio::io::split(pod);
    let inward = async {
        while let Some(bytes) = input.recv().await {
            to_pod.write_all(&bytes).await?;
        }
        to_pod.shutdown().await
    };
    let outward = async {
        let mut buffer = vec![0; PIECE];
        loop {
            let read = from_pod.read(&mut buffer).await?;
            if read == 0 || !output.send(&buffer[..read]).await {
                break;
            }
        }
        if let Sink::Spdy(output) = output {
            output.finish().await;
        }
        Ok::<_, std::io::Error>(())
    };
    tokio::pin!(inward, outward);
    // The pod's end decides: a client that has sent all still waits for the answer.
    tokio::select! {
        result = &mut outward => result.map_err(|error| failed("read", &error)),
        result = &mut inward => {
            result.map_err(|error| failed("write", &error))?;
            outward.await.map_err(|error| failed("read", &error))
        }
    }
}
