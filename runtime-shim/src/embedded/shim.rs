//! The agent's side of a shim: its program, starting one, and talking to it.

// One text for both sides: the shim is a program of its own and can't be a dependency.
#[path = "../../shim/src/protocol.rs"]
pub(super) mod protocol;

use std::{
    collections::BTreeMap,
    fs, io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde::Serialize;
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::UnixStream,
};

use self::protocol::{Answer, MAX_MESSAGE, Message, Op, Request, VERSION};
use super::disk::failed;
use crate::runtime::{Result, RuntimeError};

/// The shim's program, as the build script made it.
static PROGRAM: &[u8] = include_bytes!(env!("KEELSON_SHIM_PROGRAM"));
/// How long a shim may take to be there.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// How long a shim may take to answer what it can answer at once.
const CALL_DEADLINE: Duration = Duration::from_secs(60);

/// Puts the shim's program where it can be run, and says where that is. An older version that pods
/// still run is another file.
pub(super) fn install(root: &Path) -> Result<PathBuf> {
    let digest: String =
        Sha256::digest(PROGRAM).iter().take(8).map(|b| format!("{b:02x}")).collect();
    let path = root.join("bin").join(format!("keelson-shim-{digest}"));
    if fs::metadata(&path).is_ok_and(|m| m.len() == PROGRAM.len() as u64) {
        return Ok(path);
    }
    let dir = root.join("bin");
    let file = tempfile::NamedTempFile::new_in(&dir).map_err(failed("making a file in", &dir))?;
    // Closed for writing before it gets its name, or running it could fail as "text file busy".
    let temporary = file.into_temp_path();
    fs::write(&temporary, PROGRAM).map_err(failed("writing", &path))?;
    fs::set_permissions(&temporary, fs::Permissions::from_mode(0o755))
        .map_err(failed("writing", &path))?;
    temporary.persist(&path).map_err(|e| failed("writing", &path)(e.error))?;
    Ok(path)
}

/// How a shim is set up; the other side is `Config` in the shim's `main`.
#[derive(Debug, Serialize)]
pub(super) struct ShimConfig {
    pub(super) socket: PathBuf,
    pub(super) cgroup_procs: Vec<PathBuf>,
    pub(super) new_ipc: bool,
    pub(super) hostname: Option<String>,
    pub(super) shared_pid: bool,
    pub(super) sysctls: BTreeMap<String, String>,
}

/// Starts a shim and waits until it answers. It is no child of this process afterwards.
pub(super) async fn spawn(program: &Path, config: &ShimConfig) -> Result<()> {
    let text = serde_json::to_string(config)
        .map_err(|e| RuntimeError::Internal(format!("shim config: {e}")))?;
    if config.socket.as_os_str().len() > 100 {
        return Err(RuntimeError::Invalid(format!(
            "{}: too long for a socket's address; choose a shorter data directory",
            config.socket.display()
        )));
    }
    let mut command = tokio::process::Command::new(program);
    command.arg(text).env_clear().stdin(std::process::Stdio::null()).kill_on_drop(true);
    // SAFETY: close_range is a plain system call, safe between fork and exec. Descriptors that
    // libraries forgot to mark must not live on in a process that outlives this one.
    unsafe {
        command.pre_exec(|| {
            libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int);
            Ok(())
        });
    }
    let output = tokio::time::timeout(START_DEADLINE, command.output())
        .await
        .map_err(|_| RuntimeError::Timeout {
            what: "starting a shim".into(),
            after: START_DEADLINE,
        })?
        .map_err(failed("running", program))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(RuntimeError::Container(format!("starting the pod's shim: {}", said.trim())))
}

/// A connection to a shim.
pub(super) struct Connection {
    stream: UnixStream,
    input: Vec<u8>,
    fds: Vec<OwnedFd>,
    next: u64,
}

impl Connection {
    pub(super) async fn open(socket: &Path) -> Result<Connection> {
        let stream = UnixStream::connect(socket).await.map_err(failed("connecting to", socket))?;
        Ok(Connection { stream, input: Vec::new(), fds: Vec::new(), next: 1 })
    }

    /// Asks something and waits for the answer and the descriptors that come with it.
    pub(super) async fn call(&mut self, op: Op) -> Result<(Answer, Vec<OwnedFd>)> {
        let id = self.next;
        self.next += 1;
        let body = serde_json::to_vec(&Request { v: VERSION, id, op })
            .map_err(|e| RuntimeError::Internal(format!("shim request: {e}")))?;
        let length = u32::try_from(body.len())
            .ok()
            .filter(|n| *n as usize <= MAX_MESSAGE)
            .ok_or_else(|| RuntimeError::Invalid("the request is too long for a shim".into()))?;
        let mut frame = length.to_le_bytes().to_vec();
        frame.extend_from_slice(&body);
        self.stream.write_all(&frame).await.map_err(broken)?;
        loop {
            if let Message::Answer { id: of, result } = self.next_message().await?
                && of == id
            {
                let answer = result.map_err(RuntimeError::Container)?;
                return Ok((answer, std::mem::take(&mut self.fds)));
            }
        }
    }

    /// Waits for the next message.
    pub(super) async fn next_message(&mut self) -> Result<Message> {
        loop {
            if let Some(head) = self.input.first_chunk::<4>() {
                let length = u32::from_le_bytes(*head) as usize;
                if length > MAX_MESSAGE {
                    return Err(RuntimeError::Internal("a shim sent too long a message".into()));
                }
                if let Some(body) = self.input.get(4..4 + length) {
                    let message = serde_json::from_slice(body)
                        .map_err(|e| RuntimeError::Internal(format!("a shim's message: {e}")));
                    self.input.drain(..4 + length);
                    return message;
                }
            }
            self.receive().await?;
        }
    }

    async fn receive(&mut self) -> Result<()> {
        let Connection { stream, input, fds, .. } = self;
        let fd = stream.as_raw_fd();
        let got = stream
            .async_io(Interest::READABLE, || {
                let mut chunk = [0; 16 * 1024];
                let mut io = [io::IoSliceMut::new(&mut chunk)];
                let mut control = nix::cmsg_space!([RawFd; 4]);
                let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
                let message = recvmsg::<()>(fd, &mut io, Some(&mut control), flags)
                    .map_err(io::Error::from)?;
                for part in message.cmsgs().map_err(io::Error::from)? {
                    if let ControlMessageOwned::ScmRights(received) = part {
                        for fd in received {
                            // SAFETY: the kernel has just made it ours, and nobody else knows it.
                            fds.push(unsafe { OwnedFd::from_raw_fd(fd) });
                        }
                    }
                }
                let bytes = message.bytes;
                input.extend_from_slice(&chunk[..bytes]);
                Ok(bytes)
            })
            .await
            .map_err(broken)?;
        if got == 0 {
            return Err(broken(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(())
    }
}

fn broken(source: io::Error) -> RuntimeError {
    RuntimeError::Io { what: "talking to a pod's shim".into(), source }
}

/// Asks one thing on a connection of its own.
pub(super) async fn call(socket: &Path, op: Op) -> Result<(Answer, Vec<OwnedFd>)> {
    let ask = async { Connection::open(socket).await?.call(op).await };
    tokio::time::timeout(CALL_DEADLINE, ask).await.map_err(|_| RuntimeError::Timeout {
        what: "asking a pod's shim".into(),
        after: CALL_DEADLINE,
    })?
}
