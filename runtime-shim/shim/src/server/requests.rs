//! What is asked, and what is answered.

use std::os::fd::{AsRawFd, OwnedFd};

use super::Server;
use crate::{
    container::{Attached, Container},
    log::Stream,
    protocol::{self, Answer, Op, Request},
    sys,
};

impl Server {
    pub(super) fn answer(&mut self, connection: u64, request: Request) {
        let id = request.id;
        let result = match request.op {
            Op::Start(start) => match self.begin_start(*start, connection, id) {
                Ok(()) => return,
                Err(error) => Err(error),
            },
            Op::Exec(exec) => match self.begin_exec(&exec, connection, id) {
                Ok(()) => return,
                Err(error) => Err(error),
            },
            Op::Attach { container, stdin, stdout, stderr } => {
                match self.attach(&container, stdin, [stdout, stderr]) {
                    Ok((tty, fds)) => {
                        self.reply(connection, id, Ok(Answer::Attached { tty }), fds);
                        return;
                    }
                    Err(error) => Err(error),
                }
            }
            Op::Hello => Ok(Answer::Hello {
                version: protocol::VERSION,
                pid: i32::try_from(std::process::id()).unwrap_or(0),
                init: self.init,
            }),
            Op::List => {
                Ok(Answer::List(self.containers.values().map(|c| c.state.clone()).collect()))
            }
            Op::Signal { container, signal } => self.running(&container).and_then(|c| match c {
                Some(c) => sys::kill(c.state.pid, signal).map(|()| Answer::Done).map_err(|e| {
                    format!("sending signal {signal} to process {}: {e}", c.state.pid)
                }),
                None => Ok(Answer::Done),
            }),
            Op::Forget { container } => match self.containers.get(&container) {
                Some(c) if !c.has_ended() => Err(format!("container {container} still runs")),
                _ => {
                    self.containers.remove(&container);
                    Ok(Answer::Done)
                }
            },
            Op::ReopenLog { container } => match self.containers.get_mut(&container) {
                Some(c) => c
                    .log
                    .reopen()
                    .map(|()| Answer::Done)
                    .map_err(|e| format!("opening {}: {e}", c.start.log_path)),
                None => Err(format!("container {container} was not started here")),
            },
            Op::Resize { container, width, height } => {
                self.running(&container).and_then(|c| {
                    match c.and_then(|c| c.output_fd(Stream::Stdout).filter(|_| c.start.tty)) {
                        Some(fd) => sys::set_terminal_size(fd, width, height)
                            .map(|()| Answer::Done)
                            .map_err(|e| format!("resizing the terminal of {container}: {e}")),
                        None => Ok(Answer::Done),
                    }
                })
            }
            Op::SignalExec { pid, signal } => {
                if self.execs.iter().any(|e| e.pid == pid && e.connection == connection) {
                    sys::kill(pid, signal)
                        .map(|()| Answer::Done)
                        .map_err(|e| format!("sending signal {signal} to process {pid}: {e}"))
                } else {
                    Ok(Answer::Done)
                }
            }
            Op::Subscribe => {
                if let Some(c) = self.connections.get_mut(&connection) {
                    c.subscribed = true;
                }
                Ok(Answer::Done)
            }
            Op::Shutdown => {
                for container in self.containers.values().filter(|c| !c.has_ended()) {
                    let _ = sys::kill(container.state.pid, libc::SIGKILL);
                }
                for exec in &self.execs {
                    let _ = sys::kill(exec.pid, libc::SIGKILL);
                }
                if let Some(init) = self.init {
                    let _ = sys::kill(init, libc::SIGKILL);
                }
                self.ending = true;
                Ok(Answer::Done)
            }
        };
        self.reply(connection, id, result, Vec::new());
    }

    /// The container if it runs, nothing if it has ended.
    pub(super) fn running(&self, id: &str) -> Result<Option<&Container>, String> {
        match self.containers.get(id) {
            Some(container) if container.has_ended() => Ok(None),
            Some(container) => Ok(Some(container)),
            None => Err(format!("container {id} was not started here")),
        }
    }

    fn attach(
        &mut self,
        id: &str,
        stdin: bool,
        outputs: [bool; 2],
    ) -> Result<(bool, Vec<OwnedFd>), String> {
        let container = self
            .containers
            .get_mut(id)
            .filter(|c| !c.has_ended())
            .ok_or_else(|| format!("container {id} does not run"))?;
        let what = |e| format!("pipes for attaching to {id}: {e}");
        let mut attached = Attached::default();
        let mut fds = Vec::new();
        if stdin {
            let (ours, theirs) = sys::pipe().map_err(what)?;
            sys::set_nonblocking(ours.as_raw_fd()).map_err(what)?;
            attached.stdin = Some(ours);
            fds.push(OwnedFd::from(theirs));
        }
        for (at, wanted) in outputs.into_iter().enumerate() {
            if wanted && !(container.start.tty && at == 1) {
                let (theirs, ours) = sys::pipe().map_err(what)?;
                sys::set_nonblocking(ours.as_raw_fd()).map_err(what)?;
                attached.outputs[at] = Some(ours);
                fds.push(OwnedFd::from(theirs));
            }
        }
        container.attached.push(attached);
        Ok((container.start.tty, fds))
    }
}
