//! A command's streams, or those of a container's main process, over either transport.
//!
//! Channels (Kubernetes' remote command protocol): 0 standard input, 1 standard output, 2 standard
//! error, 3 the end as a Status in JSON, 4 the terminal's size as JSON.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, StatusCode};
use hyper::body::Incoming as RequestBody;
use keelson_runtime_shim::{
    PodRuntime,
    runtime::{
        ContainerId, ExecRequest, ExecSession, InputStream, OutputStream, RuntimeError,
        TerminalSize,
    },
};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
    task::{JoinHandle, JoinSet},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    REMOTE_PROTOCOLS, REMOTE_SPDY_PROTOCOLS, Transport, Upgrade,
    spdy::{Connection, StreamOutput},
    upgrade,
    websocket::{self, ChannelOutput, Channels, Incoming},
};
use crate::server::answer::{Answer, refused};

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;

/// How long the client may take to open its SPDY streams.
const OPENING: Duration = Duration::from_secs(30);
/// How long output may go on after the command ended: a child of its may still hold the pipe.
const OUTPUT_AFTER_EXIT: Duration = Duration::from_secs(10);
/// Bytes taken from a pipe at once.
const PIECE: usize = 32 << 10;
/// Pieces of input that wait.
const QUEUE: usize = 16;

/// What is asked for.
#[derive(Clone, Debug)]
pub(crate) enum Command {
    /// A new process.
    Exec,
    /// The main process.
    Attach,
}

/// Upgrades the connection, and runs the streams in a task of `tasks`.
pub(crate) fn run(
    mut request: Request<RequestBody>,
    runtime: Arc<dyn PodRuntime>,
    container: ContainerId,
    command: Command,
    streams: ExecRequest,
    tasks: &TaskTracker,
    shutdown: CancellationToken,
) -> Answer {
    if !(streams.stdin || streams.stdout || streams.stderr) {
        return refused(
            StatusCode::BAD_REQUEST,
            "you must specify at least 1 of stdin, stdout, stderr",
        );
    }
    let (upgrade, answer) = match upgrade(&mut request, &REMOTE_PROTOCOLS, &REMOTE_SPDY_PROTOCOLS) {
        Ok(upgraded) => upgraded,
        Err(answer) => return *answer,
    };
    tasks.spawn(async move {
        tokio::select! {
            () = serve(upgrade, runtime, container, command, streams) => {}
            () = shutdown.cancelled() => {}
        }
    });
    answer
}

async fn serve(
    upgrade: Upgrade,
    runtime: Arc<dyn PodRuntime>,
    container: ContainerId,
    command: Command,
    request: ExecRequest,
) {
    let client = match open(upgrade, &request).await {
        Ok(client) => client,
        Err(error) => {
            tracing::debug!(%container, %error, "streams not opened");
            return;
        }
    };
    let session = match command {
        Command::Exec => runtime.exec(&container, &request).await,
        Command::Attach => runtime.attach(&container, &request).await,
    };
    match session {
        Ok(session) => relay(client, session).await,
        Err(error) => client.end(&failure(&error)).await,
    }
}

/// One of the client's streams that it reads.
enum Output {
    WebSocket(ChannelOutput),
    Spdy(StreamOutput),
}

impl Output {
    async fn send(&self, bytes: Bytes) -> bool {
        match self {
            Self::WebSocket(channel) => channel.send(&bytes).await,
            Self::Spdy(stream) => stream.send(bytes).await,
        }
    }

    async fn finish(self) {
        if let Self::Spdy(stream) = self {
            stream.finish().await;
        }
    }
}

/// The client's side of all streams.
struct Client {
    stdin: Option<mpsc::Receiver<Bytes>>,
    resize: Option<mpsc::Receiver<TerminalSize>>,
    stdout: Option<Output>,
    stderr: Option<Output>,
    error: Output,
    /// Cancelled when the client is gone.
    gone: CancellationToken,
    /// Ends when everything is written.
    transport: TransportEnd,
}

enum TransportEnd {
    WebSocket { reader: JoinHandle<()>, writer: JoinHandle<()> },
    Spdy { connection: Connection, watchers: JoinSet<()> },
}

impl Client {
    async fn end(self, status: &Value) {
        drop((self.stdin, self.resize, self.stdout, self.stderr));
        // Success is said too: clients of version 4 and later wait for it.
        self.error.send(Bytes::from(status.to_string())).await;
        self.error.finish().await;
        self.transport.end().await;
    }
}

impl TransportEnd {
    async fn end(self) {
        match self {
            Self::WebSocket { reader, writer } => {
                reader.abort();
                let _ = reader.await;
                let _ = writer.await;
            }
            Self::Spdy { connection, mut watchers } => {
                watchers.shutdown().await;
                connection.flush().await;
            }
        }
    }
}

async fn open(upgrade: Upgrade, request: &ExecRequest) -> Result<Client, String> {
    let upgraded = upgrade.pending.await.map_err(|error| error.to_string())?;
    match upgrade.transport {
        Transport::WebSocket(_) => {
            Ok(over_web_socket(Channels::start(websocket::accept(upgraded).await), request))
        }
        Transport::Spdy => {
            let socket = hyper_util::rt::TokioIo::new(upgraded);
            let connection = Connection::start(socket).map_err(|error| error.to_string())?;
            over_spdy(connection, request).await
        }
    }
}

fn over_web_socket(channels: Channels, request: &ExecRequest) -> Client {
    let output =
        |wanted: bool, channel| wanted.then(|| Output::WebSocket(channels.output(channel)));
    let stdout = output(request.stdout, STDOUT);
    let stderr = output(request.stderr && !request.tty, STDERR);
    let error = Output::WebSocket(channels.output(ERROR));
    let (stdin_sender, stdin) = mpsc::channel(QUEUE);
    let (resize_sender, resize) = mpsc::channel(QUEUE);
    let gone = CancellationToken::new();
    let (mut reader, writer) = channels.into_parts();
    let wants_stdin = request.stdin;
    let client_gone = gone.clone().drop_guard();
    let reader = tokio::spawn(async move {
        let _client_gone = client_gone;
        let mut stdin = wants_stdin.then_some(stdin_sender);
        while let Some(incoming) = reader.next().await {
            match incoming {
                Incoming::Bytes { channel: STDIN, bytes } => {
                    if let Some(sender) = &stdin
                        && sender.send(bytes).await.is_err()
                    {
                        stdin = None;
                    }
                }
                Incoming::Bytes { channel: RESIZE, bytes } => {
                    send_size(&resize_sender, &bytes).await;
                }
                Incoming::Closed { channel: STDIN } => stdin = None,
                Incoming::Bytes { .. } | Incoming::Closed { .. } => {}
            }
        }
    });
    Client {
        stdin: request.stdin.then_some(stdin),
        resize: request.tty.then_some(resize),
        stdout,
        stderr,
        error,
        gone,
        transport: TransportEnd::WebSocket { reader, writer },
    }
}

async fn over_spdy(mut connection: Connection, request: &ExecRequest) -> Result<Client, String> {
    let wanted = 1
        + usize::from(request.stdin)
        + usize::from(request.stdout)
        + usize::from(request.stderr && !request.tty)
        + usize::from(request.tty);
    let (mut stdin, mut stdout, mut stderr, mut error, mut resize) = (None, None, None, None, None);
    let mut watchers = JoinSet::new();
    for _ in 0..wanted {
        let stream = tokio::time::timeout(OPENING, connection.accept())
            .await
            .map_err(|_| format!("the client did not open its {wanted} streams in {OPENING:?}"))?
            .ok_or("the client went away")?;
        match stream.header("streamtype") {
            "stdin" => stdin = Some(stream.input),
            "stdout" => stdout = Some(Output::Spdy(stream.output)),
            "stderr" => stderr = Some(Output::Spdy(stream.output)),
            "error" => error = Some(Output::Spdy(stream.output)),
            "resize" => {
                let (sender, sizes) = mpsc::channel(QUEUE);
                let mut input = stream.input;
                watchers.spawn(async move {
                    while let Some(bytes) = input.recv().await {
                        send_size(&sender, &bytes).await;
                    }
                });
                resize = Some(sizes);
            }
            other => return Err(format!("a stream of the unknown type {other:?}")),
        }
    }
    let error = error.ok_or("the client opened no stream for errors")?;
    let gone = connection.closed();
    Ok(Client {
        stdin,
        resize,
        stdout,
        stderr,
        error,
        gone,
        transport: TransportEnd::Spdy { connection, watchers },
    })
}

/// A terminal's size as clients write it.
#[derive(Deserialize)]
struct Size {
    #[serde(rename = "Width")]
    width: u16,
    #[serde(rename = "Height")]
    height: u16,
}

async fn send_size(sizes: &mpsc::Sender<TerminalSize>, bytes: &[u8]) {
    // Several sizes may stand one after another in one piece.
    for size in
        serde_json::Deserializer::from_slice(bytes).into_iter::<Size>().map_while(Result::ok)
    {
        let _ = sizes.send(TerminalSize { width: size.width, height: size.height }).await;
    }
}

/// Carries everything both ways until the command ends or the client goes.
async fn relay(mut client: Client, session: ExecSession) {
    let mut inputs = JoinSet::new();
    if let (Some(from), Some(to)) = (client.stdin.take(), session.stdin) {
        inputs.spawn(pump_in(from, to));
    }
    if let (Some(mut from), Some(to)) = (client.resize.take(), session.resize) {
        inputs.spawn(async move {
            while let Some(size) = from.recv().await {
                if to.send(size).await.is_err() {
                    return;
                }
            }
        });
    }
    let mut outputs = JoinSet::new();
    for (from, to) in
        [(session.stdout, client.stdout.take()), (session.stderr, client.stderr.take())]
    {
        if let (Some(from), Some(to)) = (from, to) {
            outputs.spawn(pump_out(from, to));
        }
    }
    let exit = tokio::select! {
        exit = session.exit => exit,
        () = client.gone.cancelled() => {
            // Dropping the streams tells the process, as closing a terminal does.
            inputs.shutdown().await;
            outputs.shutdown().await;
            client.transport.end().await;
            return;
        }
    };
    let drained = async { while outputs.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(OUTPUT_AFTER_EXIT, drained).await;
    outputs.shutdown().await;
    inputs.shutdown().await;
    let status = match exit {
        Ok(Ok(0)) => json!({"metadata": {}, "status": "Success"}),
        Ok(Ok(code)) => non_zero(code),
        Ok(Err(error)) => failure(&error),
        Err(_) => failure(&RuntimeError::Internal("the runtime lost the command".to_owned())),
    };
    client.end(&status).await;
}

async fn pump_in(mut from: mpsc::Receiver<Bytes>, mut to: InputStream) {
    while let Some(bytes) = from.recv().await {
        if to.write_all(&bytes).await.is_err() || to.flush().await.is_err() {
            return;
        }
    }
    let _ = to.shutdown().await;
}

async fn pump_out(mut from: OutputStream, to: Output) {
    let mut buffer = vec![0; PIECE];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(read) => {
                if !to.send(Bytes::copy_from_slice(&buffer[..read])).await {
                    break;
                }
            }
        }
    }
    to.finish().await;
}

/// The Status of a command that ended with this code.
fn non_zero(code: i32) -> Value {
    json!({
        "metadata": {},
        "status": "Failure",
        "message": format!("command terminated with non-zero exit code: exit status {code}"),
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
    })
}

/// The Status of a command that could not be run.
fn failure(error: &RuntimeError) -> Value {
    json!({
        "metadata": {},
        "status": "Failure",
        "message": error.to_string(),
        "reason": "InternalError",
        "details": {"causes": [{"message": error.to_string()}]},
        "code": 500,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn sizes_are_read_one_after_another() {
        let (sender, mut sizes) = mpsc::channel(4);
        send_size(&sender, b"{\"Width\":80,\"Height\":24}\n{\"Width\":100,\"Height\":30}nonsense")
            .await;
        assert_eq!(sizes.recv().await, Some(TerminalSize { width: 80, height: 24 }));
        assert_eq!(sizes.recv().await, Some(TerminalSize { width: 100, height: 30 }));
        assert!(sizes.try_recv().is_err());
    }

    #[test]
    fn exit_codes_are_told_as_documented() {
        let status = non_zero(7);
        assert_eq!(status["reason"], "NonZeroExitCode");
        assert_eq!(status["details"]["causes"][0]["message"], "7");
    }
}
