//! Commands in containers, and joining their streams.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::AsyncReadExt,
    net::unix::pipe,
    sync::{mpsc, oneshot},
};

use super::{
    Container, EmbeddedRuntime, lock,
    shim::{
        self, Connection,
        protocol::{Answer, Exec, Message, Op},
    },
    text,
};
use crate::runtime::*;

/// What of a command's output is kept: as much as the kubelet keeps of a probe's.
const KEPT_OUTPUT: u64 = 16 * 1024;
/// How long output may still come after a command ended: something that it left behind may hold it.
const OUTPUT_LINGERS: Duration = Duration::from_secs(2);
/// Sizes of a terminal that wait to be set.
const RESIZES: usize = 8;

impl EmbeddedRuntime {
    pub(super) async fn begin_exec(
        &self,
        container: &Arc<Container>,
        request: &ExecRequest,
    ) -> Result<ExecSession> {
        let (connection, pid, fds) = self.enter(container, request).await?;
        let (tell, exit) = oneshot::channel();
        if request.tty {
            let master = fds.into_iter().next().ok_or_else(lost)?;
            let session = terminal_session(&master, request, exit)?;
            tokio::spawn(async move {
                // The master is kept here until the command ended or the caller is gone.
                let _ = tell.send(exit_of(connection, pid).await);
                drop(master);
            });
            return Ok(session);
        }
        tokio::spawn(async move {
            let _ = tell.send(exit_of(connection, pid).await);
        });
        let mut fds = fds.into_iter();
        Ok(ExecSession {
            stdin: input(request.stdin, &mut fds)?,
            stdout: output(request.stdout, &mut fds)?,
            stderr: output(request.stderr, &mut fds)?,
            resize: None,
            exit,
        })
    }

    pub(super) async fn exec_to_end(
        &self,
        container: &Arc<Container>,
        command: &[String],
        timeout: Option<Duration>,
    ) -> Result<ExecOutput> {
        let request = ExecRequest {
            command: command.to_vec(),
            stdout: true,
            stderr: true,
            ..ExecRequest::default()
        };
        let (mut connection, pid, fds) = self.enter(container, &request).await?;
        let mut fds = fds.into_iter();
        let stdout = tokio::spawn(collect(output(true, &mut fds)?));
        let stderr = tokio::spawn(collect(output(true, &mut fds)?));
        let ended = wait_exit(&mut connection, pid);
        let exit_code = match timeout {
            None => ended.await?,
            Some(limit) => match tokio::time::timeout(limit, ended).await {
                Ok(code) => code?,
                Err(_) => {
                    connection.call(Op::SignalExec { pid, signal: libc::SIGKILL }).await?;
                    return Err(RuntimeError::Timeout {
                        what: format!(
                            "command {command:?} in container {}",
                            lock(&container.record).id
                        ),
                        after: limit,
                    });
                }
            },
        };
        let mut kept = [Vec::new(), Vec::new()];
        for (kept, reading) in kept.iter_mut().zip([stdout, stderr]) {
            let abort = reading.abort_handle();
            match tokio::time::timeout(OUTPUT_LINGERS, reading).await {
                Ok(Ok(bytes)) => *kept = bytes,
                _ => abort.abort(),
            }
        }
        let [stdout, stderr] = kept;
        Ok(ExecOutput { stdout, stderr, exit_code })
    }

    /// Begins a command: the connection on which its end is told, its process, its streams.
    async fn enter(
        &self,
        container: &Arc<Container>,
        request: &ExecRequest,
    ) -> Result<(Connection, i32, Vec<OwnedFd>)> {
        if request.command.is_empty() {
            return Err(RuntimeError::Invalid("there is no command to run".into()));
        }
        let record = lock(&container.record).clone();
        let process = running(container)?;
        let mut helper = self.inner.helper.clone();
        helper.extend([
            "enter".to_owned(),
            text(&self.inner.disk.container(&record.id)),
            process.to_string(),
            if request.tty { "tty" } else { "pipes" }.to_owned(),
            "--".to_owned(),
        ]);
        helper.extend(request.command.iter().cloned());
        let exec = Exec {
            container: record.id.0.clone(),
            helper,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr && !request.tty,
            tty: request.tty,
        };
        let mut connection = Connection::open(&self.inner.disk.socket(&record.sandbox)).await?;
        match connection.call(Op::Exec(Box::new(exec))).await? {
            (Answer::Exec { pid }, fds) => Ok((connection, pid, fds)),
            _ => Err(lost()),
        }
    }

    pub(super) async fn begin_attach(
        &self,
        container: &Arc<Container>,
        request: &ExecRequest,
    ) -> Result<ExecSession> {
        running(container)?;
        let record = lock(&container.record).clone();
        let socket = self.inner.disk.socket(&record.sandbox);
        let stdin = request.stdin && record.config.stdin;
        let op = Op::Attach {
            container: record.id.0.clone(),
            stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        let (Answer::Attached { tty }, fds) = shim::call(&socket, op).await? else {
            return Err(lost());
        };
        let mut fds = fds.into_iter();
        let (tell, exit) = oneshot::channel();
        let mut process = container.process.subscribe();
        tokio::spawn(async move {
            let result = match process.wait_for(|s| s.finished != 0).await {
                Ok(state) => Ok(state.code),
                Err(_) => Err(RuntimeError::NotFound("the container was removed".into())),
            };
            let _ = tell.send(result);
        });
        let resize = tty.then(|| {
            let (sender, mut sizes) = mpsc::channel::<TerminalSize>(RESIZES);
            tokio::spawn(async move {
                while let Some(size) = sizes.recv().await {
                    let op = Op::Resize {
                        container: record.id.0.clone(),
                        width: size.width,
                        height: size.height,
                    };
                    // A container that ended has no terminal any more.
                    let _ = shim::call(&socket, op).await;
                }
            });
            sender
        });
        Ok(ExecSession {
            stdin: input(stdin, &mut fds)?,
            stdout: output(request.stdout, &mut fds)?,
            stderr: output(request.stderr && !tty, &mut fds)?,
            resize,
            exit,
        })
    }
}

/// The process of a container that runs.
fn running(container: &Container) -> Result<i32> {
    let state = container.process.borrow();
    if state.started == 0 || state.finished != 0 {
        return Err(RuntimeError::Container(format!(
            "container {}: it does not run",
            lock(&container.record).id
        )));
    }
    Ok(state.pid)
}

fn lost() -> RuntimeError {
    RuntimeError::Internal("a shim did not hand over the streams".into())
}

async fn exit_of(mut connection: Connection, pid: i32) -> Result<i32> {
    wait_exit(&mut connection, pid).await
}

async fn wait_exit(connection: &mut Connection, pid: i32) -> Result<i32> {
    loop {
        if let Message::ExecExited { pid: ended, code } = connection.next_message().await?
            && ended == pid
        {
            return Ok(code);
        }
    }
}

async fn collect(stream: Option<OutputStream>) -> Vec<u8> {
    let mut kept = Vec::new();
    if let Some(mut stream) = stream {
        let _ = (&mut stream).take(KEPT_OUTPUT).read_to_end(&mut kept).await;
        // The rest is read too, for a command whose output nobody reads would wait for ever.
        let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
    }
    kept
}

fn pipe_failed(source: std::io::Error) -> RuntimeError {
    RuntimeError::Io { what: "taking over a command's streams".into(), source }
}

fn input(wanted: bool, fds: &mut impl Iterator<Item = OwnedFd>) -> Result<Option<InputStream>> {
    if !wanted {
        return Ok(None);
    }
    let sender = pipe::Sender::from_owned_fd(fds.next().ok_or_else(lost)?).map_err(pipe_failed)?;
    Ok(Some(Box::pin(sender)))
}

fn output(wanted: bool, fds: &mut impl Iterator<Item = OwnedFd>) -> Result<Option<OutputStream>> {
    if !wanted {
        return Ok(None);
    }
    let receiver =
        pipe::Receiver::from_owned_fd(fds.next().ok_or_else(lost)?).map_err(pipe_failed)?;
    Ok(Some(Box::pin(receiver)))
}

/// The caller's ends of a terminal: all are its master.
fn terminal_session(
    master: &OwnedFd,
    request: &ExecRequest,
    exit: oneshot::Receiver<Result<i32>>,
) -> Result<ExecSession> {
    let open = || master.try_clone().and_then(terminal::Master::new).map_err(pipe_failed);
    let (resize, mut sizes) = mpsc::channel::<TerminalSize>(RESIZES);
    let of_sizes = master.try_clone().map_err(pipe_failed)?;
    tokio::spawn(async move {
        while let Some(size) = sizes.recv().await {
            terminal::resize(of_sizes.as_raw_fd(), size);
        }
    });
    Ok(ExecSession {
        stdin: if request.stdin { Some(Box::pin(open()?)) } else { None },
        stdout: if request.stdout { Some(Box::pin(open()?)) } else { None },
        stderr: None,
        resize: Some(resize),
        exit,
    })
}

mod terminal {
    //! A terminal's master as a stream.

    use std::{
        io::{self, Read, Write},
        os::fd::{AsRawFd, OwnedFd, RawFd},
        pin::Pin,
        task::{Context, Poll, ready},
    };

    use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, unix::AsyncFd};

    use crate::runtime::TerminalSize;

    pub(super) struct Master(AsyncFd<std::fs::File>);

    impl Master {
        pub(super) fn new(fd: OwnedFd) -> io::Result<Master> {
            use nix::fcntl::{FcntlArg, OFlag, fcntl};
            let flags = OFlag::from_bits_truncate(fcntl(&fd, FcntlArg::F_GETFL)?);
            fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
            // SAFETY: the file owns its descriptor, which stays open and the same until it is dropped.
            Ok(Master(unsafe { AsyncFd::register(std::fs::File::from(fd)) }?))
        }
    }

    impl AsyncRead for Master {
        fn poll_read(
            self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buffer: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            loop {
                let mut guard = ready!(self.0.poll_read_ready(cx))?;
                let space = buffer.initialize_unfilled();
                match guard.try_io(|inner| inner.get_ref().read(space)) {
                    Ok(Ok(n)) => {
                        buffer.advance(n);
                        return Poll::Ready(Ok(()));
                    }
                    // Nobody has the other side open any more: that is the end.
                    Ok(Err(e)) if e.raw_os_error() == Some(libc::EIO) => {
                        return Poll::Ready(Ok(()));
                    }
                    Ok(Err(e)) => return Poll::Ready(Err(e)),
                    Err(_) => {}
                }
            }
        }
    }

    impl AsyncWrite for Master {
        fn poll_write(
            self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            loop {
                let mut guard = ready!(self.0.poll_write_ready(cx))?;
                if let Ok(result) = guard.try_io(|inner| inner.get_ref().write(bytes)) {
                    return Poll::Ready(result);
                }
            }
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        /// A terminal has no end of input but the one that is typed.
        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    pub(super) fn resize(fd: RawFd, size: TerminalSize) {
        let size =
            libc::winsize { ws_row: size.height, ws_col: size.width, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the ioctl reads the structure that it is given; a terminal that is gone is an
        // error that means nothing to anybody.
        unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    }
}
