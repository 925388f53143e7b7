//! Commands in containers, and the streams of processes.

use std::pin::Pin;

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{mpsc, oneshot},
};

use super::Result;

/// The size of a terminal, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// Bytes from a process.
pub type OutputStream = Pin<Box<dyn AsyncRead + Send>>;
/// Bytes to a process. Shutting it down closes the process's standard input.
pub type InputStream = Pin<Box<dyn AsyncWrite + Send>>;

/// A byte stream in both directions.
pub trait Duplex: AsyncRead + AsyncWrite + Send {}
impl<T: AsyncRead + AsyncWrite + Send> Duplex for T {}

/// A command to run in a container, or an attachment to its main process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecRequest {
    /// The command; ignored when attaching.
    pub command: Vec<String>,
    /// Give it standard input.
    pub stdin: bool,
    /// Read its standard output.
    pub stdout: bool,
    /// Read its standard error; not together with `tty`.
    pub stderr: bool,
    /// Run it on a terminal.
    pub tty: bool,
}

/// The ends of a running command (or of an attachment) that the caller holds.
///
/// Dropping it ends the command's streams; an exec'd process whose streams are gone gets `SIGHUP`
/// if it has a terminal, and is otherwise left to find its pipes closed.
pub struct ExecSession {
    /// Standard input, if asked for.
    pub stdin: Option<InputStream>,
    /// Standard output (and error, on a terminal), if asked for.
    pub stdout: Option<OutputStream>,
    /// Standard error, if asked for and not on a terminal.
    pub stderr: Option<OutputStream>,
    /// Changes of the terminal's size; present with `tty`.
    pub resize: Option<mpsc::Sender<TerminalSize>>,
    /// The exit code, once the command ended; for an attachment, once the container did.
    pub exit: oneshot::Receiver<Result<i32>>,
}

/// What a command that was run to its end said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecOutput {
    /// Its standard output, bounded at 16 KiB as the kubelet's probes are.
    pub stdout: Vec<u8>,
    /// Its standard error, bounded likewise.
    pub stderr: Vec<u8>,
    /// Its exit code.
    pub exit_code: i32,
}
