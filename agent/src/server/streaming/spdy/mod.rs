//! SPDY/3.1, as far as Kubernetes' streams need it: the server's side of a connection.
//!
//! kubectl's port-forward speaks it (also inside a WebSocket), and exec and attach of clients before
//! 1.29. A client opens streams whose headers say what they are; each is then a pair of bytes in and
//! bytes out. There is no flow control in either direction: client-go has none, TCP's does.
//!
//! ```text
//!   socket ─► reader task ─► Connection::accept() ─► Stream { headers, input, output }
//!                 └─► streams' queues (bounded: a slow reader stops the connection, as TCP would)
//!   socket ◄─ writer task ◄─ one queue of frames ◄─ streams' output
//! ```

mod dictionary;
mod frame;

use std::collections::HashMap;

use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::mpsc,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

pub(crate) use frame::FrameError;
use frame::{Codec, Frame, Head};

/// Streams open at the same time on one connection. A port-forward of a browser's many connections
/// needs two each.
const MAX_STREAMS: usize = 1024;
/// Frames that wait on the way from the socket to a stream, and to the socket.
const QUEUE: usize = 16;
/// Reset status 3: the stream is refused.
const REFUSED_STREAM: u32 = 3;

/// What went wrong with a connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpdyError {
    /// The peer does not speak the protocol.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The socket failed.
    #[error("SPDY connection: {0}")]
    Io(#[from] std::io::Error),
}

/// A stream that the client opened.
pub(crate) struct Stream {
    /// Its headers, names in lower case.
    pub(crate) headers: HashMap<String, String>,
    /// What the client sends; ends when the client says so or goes away.
    pub(crate) input: mpsc::Receiver<Bytes>,
    /// What it gets.
    pub(crate) output: StreamOutput,
}

impl Stream {
    /// A header's value.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

/// The sending half of a stream. Dropping it ends the stream for the client.
pub(crate) struct StreamOutput {
    id: u32,
    frames: mpsc::Sender<Outgoing>,
    /// Set when the end was said.
    finished: bool,
}

enum Outgoing {
    Data { stream: u32, bytes: Bytes, fin: bool },
    Reply { stream: u32 },
    Reset { stream: u32, status: u32 },
    Ping { id: u32 },
}

impl StreamOutput {
    /// Sends bytes; false if the connection is gone.
    pub(crate) async fn send(&self, bytes: Bytes) -> bool {
        self.frames.send(Outgoing::Data { stream: self.id, bytes, fin: false }).await.is_ok()
    }

    /// Says that nothing more comes.
    pub(crate) async fn finish(mut self) {
        self.finished = true;
        let end = Outgoing::Data { stream: self.id, bytes: Bytes::new(), fin: true };
        let _ = self.frames.send(end).await;
    }
}

impl Drop for StreamOutput {
    fn drop(&mut self) {
        if !self.finished {
            let end = Outgoing::Data { stream: self.id, bytes: Bytes::new(), fin: true };
            // With a full queue the end of the whole connection must do.
            let _ = self.frames.try_send(end);
        }
    }
}

/// A connection: hands out the streams that the client opens.
pub(crate) struct Connection {
    streams: mpsc::Receiver<Stream>,
    tasks: JoinSet<Result<(), SpdyError>>,
    closed: CancellationToken,
}

impl Connection {
    /// Takes over a socket after the upgrade.
    ///
    /// # Errors
    /// When header compression can't be set up.
    pub(crate) fn start<S>(socket: S) -> Result<Self, SpdyError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (reader, writer) = tokio::io::split(socket);
        let (new_streams, streams) = mpsc::channel(QUEUE);
        let (frames, outgoing) = mpsc::channel(QUEUE);
        let mut tasks = JoinSet::new();
        let closed = CancellationToken::new();
        let (reading, guard) = (Codec::new()?, closed.clone().drop_guard());
        tasks.spawn(async move {
            let _guard = guard;
            read(reader, reading, new_streams, frames).await
        });
        tasks.spawn(write(writer, Codec::new()?, outgoing));
        Ok(Self { streams, tasks, closed })
    }

    /// Cancelled when the client is gone.
    pub(crate) fn closed(&self) -> CancellationToken {
        self.closed.clone()
    }

    /// The next stream; none when the client is done or gone.
    pub(crate) async fn accept(&mut self) -> Option<Stream> {
        self.streams.recv().await
    }

    /// Waits until what the streams' outputs have queued is written, after all of them are dropped.
    pub(crate) async fn flush(mut self) {
        drop(self.streams);
        while self.tasks.join_next().await.is_some() {}
    }
}

async fn read<R: AsyncRead + Unpin>(
    mut socket: R,
    mut codec: Codec,
    new_streams: mpsc::Sender<Stream>,
    frames: mpsc::Sender<Outgoing>,
) -> Result<(), SpdyError> {
    let mut inputs: HashMap<u32, mpsc::Sender<Bytes>> = HashMap::new();
    loop {
        let mut head = [0; Head::LENGTH];
        tokio::select! {
            read = socket.read_exact(&mut head) => match read {
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(()),
                Err(error) => return Err(error.into()),
            },
            // Whoever held the connection is done with it.
            () = new_streams.closed() => return Ok(()),
        }
        let head = Head::parse(head)?;
        let mut payload = vec![0; head.length];
        socket.read_exact(&mut payload).await?;
        match codec.decode(head, payload)? {
            Frame::SynStream { stream, headers, fin } => {
                inputs.retain(|_, input| !input.is_closed());
                if inputs.len() >= MAX_STREAMS {
                    let _ = frames.send(Outgoing::Reset { stream, status: REFUSED_STREAM }).await;
                    continue;
                }
                let (to_stream, input) = mpsc::channel(QUEUE);
                if !fin {
                    inputs.insert(stream, to_stream);
                }
                let output = StreamOutput { id: stream, frames: frames.clone(), finished: false };
                let _ = frames.send(Outgoing::Reply { stream }).await;
                let opened = Stream { headers: headers.into_iter().collect(), input, output };
                if new_streams.send(opened).await.is_err() {
                    return Ok(());
                }
            }
            Frame::Data { stream, bytes, fin } => {
                if let Some(input) = inputs.get(&stream) {
                    let ended =
                        (!bytes.is_empty() && input.send(bytes.into()).await.is_err()) || fin;
                    if ended {
                        inputs.remove(&stream);
                    }
                }
            }
            Frame::Reset { stream, .. } => {
                inputs.remove(&stream);
            }
            Frame::Ping { id } => {
                let _ = frames.send(Outgoing::Ping { id }).await;
            }
            Frame::GoAway => return Ok(()),
            Frame::SynReply { .. } | Frame::Ignored => {}
        }
    }
}

async fn write<W: AsyncWrite + Unpin>(
    mut socket: W,
    mut codec: Codec,
    mut outgoing: mpsc::Receiver<Outgoing>,
) -> Result<(), SpdyError> {
    while let Some(next) = outgoing.recv().await {
        match next {
            Outgoing::Data { stream, bytes, fin } => {
                let mut chunks = bytes.chunks(frame::MAX_PAYLOAD).peekable();
                if chunks.peek().is_none() {
                    socket.write_all(&frame::data(stream, &[], fin)).await?;
                }
                while let Some(chunk) = chunks.next() {
                    let last = fin && chunks.peek().is_none();
                    socket.write_all(&frame::data(stream, chunk, last)).await?;
                }
            }
            Outgoing::Reply { stream } => socket.write_all(&codec.syn_reply(stream)?).await?,
            Outgoing::Reset { stream, status } => {
                socket.write_all(&frame::reset(stream, status)).await?;
            }
            Outgoing::Ping { id } => socket.write_all(&frame::ping(id)).await?,
        }
        if outgoing.is_empty() {
            socket.flush().await?;
        }
    }
    socket.shutdown().await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read_frame(socket: &mut (impl AsyncRead + Unpin), codec: &mut Codec) -> Frame {
        let mut head = [0; Head::LENGTH];
        socket.read_exact(&mut head).await.unwrap();
        let head = Head::parse(head).unwrap();
        let mut payload = vec![0; head.length];
        socket.read_exact(&mut payload).await.unwrap();
        codec.decode(head, payload).unwrap()
    }

    #[tokio::test]
    async fn a_stream_carries_bytes_both_ways() {
        let (mut client, server) = tokio::io::duplex(1 << 16);
        let mut codec = Codec::new().unwrap();
        let mut connection = Connection::start(server).unwrap();
        client.write_all(&codec.syn_stream(1, &[("streamType", "data")])).await.unwrap();
        client.write_all(&frame::data(1, b"ping", true)).await.unwrap();
        let mut stream = connection.accept().await.unwrap();
        assert_eq!(stream.header("streamtype"), "data");
        assert_eq!(stream.input.recv().await.unwrap(), "ping");
        assert!(stream.input.recv().await.is_none());
        assert!(stream.output.send(Bytes::from_static(b"pong")).await);
        stream.output.finish().await;
        assert_eq!(
            read_frame(&mut client, &mut codec).await,
            Frame::SynReply { stream: 1, fin: false }
        );
        let pong = Frame::Data { stream: 1, bytes: b"pong".to_vec(), fin: false };
        assert_eq!(read_frame(&mut client, &mut codec).await, pong);
        let end = Frame::Data { stream: 1, bytes: Vec::new(), fin: true };
        assert_eq!(read_frame(&mut client, &mut codec).await, end);
        drop(client);
        assert!(connection.accept().await.is_none());
        connection.flush().await;
    }
}
