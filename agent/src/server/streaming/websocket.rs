//! Kubernetes' streams over WebSocket: one binary message is one piece of one channel, whose number
//! is the first byte.
//!
//! Subprotocols (Kubernetes' API documentation, "WebSocket streaming"): `v5.channel.k8s.io` adds the
//! closing of a channel (255, then its number) to `v4.channel.k8s.io`; `SPDY/3.1+portforward.k8s.io`
//! carries a whole SPDY connection in binary messages.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use futures::{Sink, SinkExt, Stream, StreamExt, stream::SplitSink};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::mpsc,
    task::JoinHandle,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Error, Message,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};

/// The longest message that is taken from a client.
const MAX_MESSAGE: usize = 1 << 20;
/// Messages on the way to the client.
const QUEUE: usize = 16;
/// The channel that says that another is closed.
const CLOSE_CHANNEL: u8 = 255;

/// A WebSocket over an upgraded connection.
pub(super) type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// Takes over a connection after the upgrade.
pub(super) async fn accept(upgraded: Upgraded) -> Socket {
    let config = WebSocketConfig::default()
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE));
    WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(config)).await
}

/// What a client sent on a channel.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Incoming {
    /// Bytes.
    Bytes { channel: u8, bytes: Bytes },
    /// The channel is closed (version 5).
    Closed { channel: u8 },
}

/// The sending end of one channel.
#[derive(Clone)]
pub(super) struct ChannelOutput {
    channel: u8,
    queue: mpsc::Sender<Message>,
}

impl ChannelOutput {
    /// Sends bytes; false if the client is gone.
    pub(super) async fn send(&self, bytes: &[u8]) -> bool {
        let mut message = Vec::with_capacity(bytes.len() + 1);
        message.push(self.channel);
        message.extend_from_slice(bytes);
        self.queue.send(Message::binary(message)).await.is_ok()
    }
}

/// A connection of channels: one task writes; the owner reads.
pub(super) struct Channels {
    incoming: futures::stream::SplitStream<Socket>,
    queue: mpsc::Sender<Message>,
    writer: JoinHandle<()>,
}

impl Channels {
    /// Starts the writing task.
    pub(super) fn start(socket: Socket) -> Self {
        let (sink, incoming) = socket.split();
        let (queue, messages) = mpsc::channel(QUEUE);
        Self { incoming, queue, writer: tokio::spawn(write(sink, messages)) }
    }

    /// The sending end of a channel.
    pub(super) fn output(&self, channel: u8) -> ChannelOutput {
        ChannelOutput { channel, queue: self.queue.clone() }
    }

    /// Takes the connection apart: the reading end, and the writing task, which ends when all
    /// outputs are dropped.
    pub(super) fn into_parts(self) -> (Reader, JoinHandle<()>) {
        (Reader(self.incoming), self.writer)
    }
}

/// The reading end of a connection of channels.
pub(super) struct Reader(futures::stream::SplitStream<Socket>);

impl Reader {
    /// What comes next; none when the client is gone.
    pub(super) async fn next(&mut self) -> Option<Incoming> {
        while let Some(Ok(message)) = self.0.next().await {
            let mut bytes = match message {
                Message::Binary(bytes) => bytes,
                Message::Text(text) => Bytes::from(text),
                Message::Close(_) => return None,
                Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => continue,
            };
            if bytes.is_empty() {
                continue;
            }
            let channel = bytes.split_to(1)[0];
            return Some(match (channel, bytes.first()) {
                (CLOSE_CHANNEL, Some(closed)) => Incoming::Closed { channel: *closed },
                _ => Incoming::Bytes { channel, bytes },
            });
        }
        None
    }
}

async fn write(mut sink: SplitSink<Socket, Message>, mut messages: mpsc::Receiver<Message>) {
    while let Some(message) = messages.recv().await {
        if sink.send(message).await.is_err() {
            return;
        }
    }
    // Clients take a close without this code for a connection that broke.
    let normal = CloseFrame { code: CloseCode::Normal, reason: "".into() };
    let _ = sink.send(Message::Close(Some(normal))).await;
    let _ = sink.close().await;
}

/// A WebSocket as a stream of bytes: what a tunnelled SPDY connection runs over.
pub(super) struct Tunnel {
    socket: Socket,
    /// The rest of a message that did not fit the reader's buffer.
    rest: Bytes,
}

impl Tunnel {
    pub(super) fn new(socket: Socket) -> Self {
        Self { socket, rest: Bytes::new() }
    }
}

fn io_error(error: Error) -> std::io::Error {
    match error {
        Error::Io(error) => error,
        other => std::io::Error::other(other),
    }
}

impl AsyncRead for Tunnel {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        loop {
            if !self.rest.is_empty() {
                let length = self.rest.len().min(buffer.remaining());
                let piece = self.rest.split_to(length);
                buffer.put_slice(&piece);
                return Poll::Ready(Ok(()));
            }
            match ready!(Pin::new(&mut self.socket).poll_next(context)) {
                Some(Ok(Message::Binary(bytes))) => self.rest = bytes,
                Some(Ok(Message::Close(_))) | None => return Poll::Ready(Ok(())),
                Some(Ok(_)) => {}
                Some(Err(Error::ConnectionClosed | Error::AlreadyClosed)) => {
                    return Poll::Ready(Ok(()));
                }
                Some(Err(error)) => return Poll::Ready(Err(io_error(error))),
            }
        }
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        let mut socket = Pin::new(&mut self.socket);
        ready!(socket.as_mut().poll_ready(context)).map_err(io_error)?;
        let message = Message::binary(Bytes::copy_from_slice(bytes));
        socket.start_send(message).map_err(io_error)?;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context).map_err(io_error)
    }

    fn poll_shutdown(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        match ready!(Pin::new(&mut self.socket).poll_close(context)) {
            Ok(()) | Err(Error::ConnectionClosed | Error::AlreadyClosed) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(io_error(error))),
        }
    }
}
