//! What the agent and a shim say to each other.
//!
//! Each message is a little-endian `u32` length and that many bytes of JSON. A connection carries
//! requests in one direction and, in the other, one answer for each request (by its `id`) and, after
//! [`Op::Subscribe`], events. An answer that hands out streams carries the descriptors beside its
//! first byte (`SCM_RIGHTS`), in the order standard input, output, error.
//!
//! The version is in every request, so that an agent that was upgraded can still talk to the shims
//! that an older one left behind: fields are only ever added.

use serde::{Deserialize, Serialize};

/// The version of this protocol.
pub(crate) const VERSION: u32 = 1;
/// The longest message that either side takes.
pub(crate) const MAX_MESSAGE: usize = 4 << 20;
/// The bytes that a container's state file is kept at, so that writing the exit code never needs
/// another block of a disk that is full.
pub(crate) const STATE_FILE_SIZE: usize = 512;

/// What the agent asks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    /// [`VERSION`] of the one who asks.
    pub(crate) v: u32,
    /// Comes back in the answer.
    pub(crate) id: u64,
    /// The question.
    pub(crate) op: Op,
}

/// The questions.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Op {
    /// Who are you?
    Hello,
    /// Make a container's process and let it go.
    Start(Box<Start>),
    /// All containers that were started here.
    List,
    /// Send a signal to a container's first process.
    Signal {
        /// The container.
        container: String,
        /// The signal's number.
        signal: i32,
    },
    /// Forget a container that has ended.
    Forget {
        /// The container.
        container: String,
    },
    /// Open the log file anew.
    ReopenLog {
        /// The container.
        container: String,
    },
    /// Set the size of a container's terminal.
    Resize {
        /// The container.
        container: String,
        /// Columns.
        width: u16,
        /// Rows.
        height: u16,
    },
    /// Run one more command in a container.
    Exec(Box<Exec>),
    /// Send a signal to the process of an exec that this connection began.
    SignalExec {
        /// The process, as the answer to [`Op::Exec`] named it.
        pid: i32,
        /// The signal's number.
        signal: i32,
    },
    /// Join the streams of a container's first process.
    Attach {
        /// The container.
        container: String,
        /// Hand out standard input.
        stdin: bool,
        /// Hand out standard output.
        stdout: bool,
        /// Hand out standard error.
        stderr: bool,
    },
    /// Send events on this connection from now on.
    Subscribe,
    /// Kill everything and end.
    Shutdown,
}

/// How to start a container.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Start {
    /// The container.
    pub(crate) container: String,
    /// The program, and its first arguments, that makes the container in a child process. It gets
    /// its report channel as descriptor 3.
    pub(crate) helper: Vec<String>,
    /// The folder with libcontainer's socket on which the made process waits to be let go.
    pub(crate) notify_dir: String,
    /// The log file.
    pub(crate) log_path: String,
    /// The state file, [`STATE_FILE_SIZE`] bytes long.
    pub(crate) state_path: String,
    /// Give it a pipe (or, with `tty`, the terminal) as standard input.
    pub(crate) stdin: bool,
    /// Close standard input after the first attached one ends.
    pub(crate) stdin_once: bool,
    /// Give it a terminal.
    pub(crate) tty: bool,
    /// The file of its cgroup with a line `oom_kill N`; empty for none.
    pub(crate) oom_path: String,
}

/// How to run one more command in a container.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Exec {
    /// The container.
    pub(crate) container: String,
    /// The program that enters the container, with all its arguments.
    pub(crate) helper: Vec<String>,
    /// Hand out standard input.
    pub(crate) stdin: bool,
    /// Hand out standard output.
    pub(crate) stdout: bool,
    /// Hand out standard error.
    pub(crate) stderr: bool,
    /// Run it on a terminal: one descriptor, the terminal's master, is handed out.
    pub(crate) tty: bool,
}

/// What comes back: an answer or an event.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Message {
    /// The answer to the request with this `id`.
    Answer {
        /// The request's.
        id: u64,
        /// What there is to say.
        result: Result<Answer, String>,
    },
    /// A container's first process has ended.
    Exited(State),
    /// The process of an exec that was begun on this connection has ended.
    ExecExited {
        /// Which.
        pid: i32,
        /// Its exit code, or 128 and the signal.
        code: i32,
    },
}

/// The answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// Done.
    Done,
    /// To [`Op::Hello`].
    Hello {
        /// [`VERSION`] of the shim.
        version: u32,
        /// Its process.
        pid: i32,
        /// The first process of the pod's shared process namespace, if it has one.
        init: Option<i32>,
    },
    /// To [`Op::Start`].
    Started {
        /// What is recorded of it.
        state: State,
        /// What could not be done as asked and does no harm.
        warnings: Vec<String>,
    },
    /// To [`Op::List`].
    List(Vec<State>),
    /// To [`Op::Exec`].
    Exec {
        /// The process.
        pid: i32,
    },
    /// To [`Op::Attach`].
    Attached {
        /// The container has a terminal.
        tty: bool,
    },
}

/// What is known of a container's process: also what stands in its state file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    /// The container.
    #[serde(default)]
    pub(crate) container: String,
    /// The process, in the host's namespace.
    #[serde(default)]
    pub(crate) pid: i32,
    /// When it was let go, in nanoseconds since 1970.
    #[serde(default)]
    pub(crate) started: i64,
    /// When it ended, in nanoseconds since 1970; 0 while it runs.
    #[serde(default)]
    pub(crate) finished: i64,
    /// Its exit code, or 128 and the signal.
    #[serde(default)]
    pub(crate) code: i32,
    /// The kernel killed it, or one of its processes, for want of memory.
    #[serde(default)]
    pub(crate) oom: bool,
    /// Why it could not be started, if it could not.
    #[serde(default)]
    pub(crate) error: String,
}

/// What a helper reports on its descriptor 3: one line of JSON.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct HelperReport {
    /// The made process, in the host's namespace.
    #[serde(default)]
    pub(crate) pid: i32,
    /// Why there is none.
    #[serde(default)]
    pub(crate) error: String,
    /// What could not be done as asked and does no harm.
    #[serde(default)]
    pub(crate) warnings: Vec<String>,
}
