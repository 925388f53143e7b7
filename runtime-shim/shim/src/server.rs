//! The loop: who asked what, which child ended, which stream has something.
//!
//! ```text
//!   agent ──request──► connection ──► container / exec ──► helper (a short-lived child)
//!         ◄─answer,fd─┘                     ▲                  │ makes the process, reports its
//!         ◄──Exited──────── SIGCHLD ────────┘◄─────────────────┘ id and perhaps a terminal
//! ```
//!
//! A helper's report and the end of the process that it made can be seen in either order, so the
//! ends of processes nobody has claimed yet are kept while a helper is at work.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs::File,
    io::{self, ErrorKind, Read},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    process::Stdio,
};

use crate::{
    connection::Connection,
    container::{Attached, Container},
    helper::{Report, read_report, spawn_helper},
    log::Stream,
    protocol::{self, Answer, Exec, HelperReport, Message, Op, Request, Start},
    sys,
};

/// How often what could not be written is tried again.
const RETRY_MILLIS: i32 = 200;
/// After how many tries an end is announced although the disk does not take the record of it.
const RECORD_TRIES: u32 = 10;
/// The most connections at once.
const MAX_CONNECTIONS: usize = 256;

/// A child that makes a process for us.
struct Helper {
    report: Report,
    connection: u64,
    request: u64,
    purpose: Purpose,
}

enum Purpose {
    Start(Box<Container>),
    /// The ends that the agent gets.
    Exec {
        streams: Vec<OwnedFd>,
        tty: bool,
    },
}

struct ExecProcess {
    pid: i32,
    connection: u64,
}

#[derive(Clone)]
enum Token {
    Listener,
    Signals,
    Connection(u64),
    Helper(usize),
    Output(String, Stream),
    Stdin(String),
    AttachedStdin(String, usize),
    AttachedOutput(String, usize, usize),
}

pub(crate) struct Server {
    listener: UnixListener,
    signals: Option<File>,
    connections: BTreeMap<u64, Connection>,
    next_connection: u64,
    helpers: Vec<Helper>,
    containers: BTreeMap<String, Container>,
    execs: Vec<ExecProcess>,
    /// Helpers whose end was not seen yet: nobody asks how they ended.
    helper_pids: BTreeSet<i32>,
    unclaimed: VecDeque<(i32, i32)>,
    init: Option<i32>,
    ending: bool,
}

impl Server {
    pub(crate) fn new(listener: UnixListener, init: Option<i32>) -> Server {
        Server {
            listener,
            signals: sys::child_signals().ok(),
            connections: BTreeMap::new(),
            next_connection: 0,
            helpers: Vec::new(),
            containers: BTreeMap::new(),
            execs: Vec::new(),
            helper_pids: BTreeSet::new(),
            unclaimed: VecDeque::new(),
            init,
            ending: false,
        }
    }

    pub(crate) fn run(&mut self) {
        loop {
            let (mut polled, tokens) = self.interests();
            let retry =
                self.containers.values().any(|c| c.log.is_blocked() || c.unrecorded.is_some());
            // Without a signal descriptor children are looked for at every turn.
            let timeout = if retry || self.signals.is_none() { RETRY_MILLIS } else { -1 };
            // SAFETY: the array is ours and as long as we say.
            let ready =
                unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, timeout) };
            if ready < 0 && io::Error::last_os_error().kind() != ErrorKind::Interrupted {
                std::thread::sleep(std::time::Duration::from_millis(50));
                continue;
            }
            let mut reports = Vec::new();
            for (entry, token) in polled.iter().zip(tokens) {
                if entry.revents != 0 {
                    self.handle(&token, entry.revents, &mut reports);
                }
            }
            // From the back, so that the places of the others stay right.
            for at in reports.into_iter().rev() {
                self.helper_reported(at);
            }
            self.reap();
            self.tend();
            if self.ending && self.connections.values().all(|c| c.output.is_empty()) {
                return;
            }
        }
    }

    fn interests(&self) -> (Vec<libc::pollfd>, Vec<Token>) {
        let mut polled = Vec::new();
        let mut tokens = Vec::new();
        let mut add = |fd: RawFd, events: libc::c_short, token: Token| {
            polled.push(libc::pollfd { fd, events, revents: 0 });
            tokens.push(token);
        };
        if self.connections.len() < MAX_CONNECTIONS {
            add(self.listener.as_raw_fd(), libc::POLLIN, Token::Listener);
        }
        if let Some(signals) = &self.signals {
            add(signals.as_raw_fd(), libc::POLLIN, Token::Signals);
        }
        for (id, connection) in &self.connections {
            let out = if connection.output.is_empty() { 0 } else { libc::POLLOUT };
            add(connection.socket.as_raw_fd(), libc::POLLIN | out, Token::Connection(*id));
        }
        for (at, helper) in self.helpers.iter().enumerate() {
            add(helper.report.socket.as_raw_fd(), libc::POLLIN, Token::Helper(at));
        }
        for (id, container) in &self.containers {
            for stream in [Stream::Stdout, Stream::Stderr] {
                if let Some(fd) = container.output_fd(stream).filter(|_| container.wants(stream)) {
                    add(fd, libc::POLLIN, Token::Output(id.clone(), stream));
                }
            }
            if let Some(stdin) = container.stdin.as_ref().filter(|_| container.has_stdin_pending())
            {
                add(stdin.as_raw_fd(), libc::POLLOUT, Token::Stdin(id.clone()));
            }
            for (index, attached) in container.attached.iter().enumerate() {
                if let Some(stdin) =
                    attached.stdin.as_ref().filter(|_| !container.has_stdin_pending())
                {
                    add(stdin.as_raw_fd(), libc::POLLIN, Token::AttachedStdin(id.clone(), index));
                }
                for at in 0..2 {
                    if let Some((fd, pending)) = attached.output_fd(at) {
                        // Without events a reader that went away is still reported.
                        let events = if pending { libc::POLLOUT } else { 0 };
                        add(fd, events, Token::AttachedOutput(id.clone(), index, at));
                    }
                }
            }
        }
        (polled, tokens)
    }

    fn handle(&mut self, token: &Token, events: libc::c_short, reports: &mut Vec<usize>) {
        match token {
            Token::Listener => {
                while let Ok((socket, _)) = self.listener.accept() {
                    if socket.set_nonblocking(true).is_err() {
                        continue;
                    }
                    let connection = Connection::new(socket);
                    self.connections.insert(self.next_connection, connection);
                    self.next_connection += 1;
                }
            }
            Token::Signals => {
                let mut buffer = [0; 128 * 8];
                if let Some(signals) = &mut self.signals {
                    while matches!(signals.read(&mut buffer), Ok(n) if n > 0) {}
                }
            }
            Token::Connection(id) => {
                let Some(connection) = self.connections.get_mut(id) else { return };
                connection.flush();
                for request in connection.read() {
                    self.answer(*id, request);
                }
            }
            Token::Helper(at) => {
                if self.helpers.get_mut(*at).is_some_and(|h| read_report(&mut h.report)) {
                    reports.push(*at);
                }
            }
            Token::Output(id, stream) => {
                if let Some(container) = self.containers.get_mut(id) {
                    container.read_output(*stream);
                }
            }
            Token::Stdin(id) => {
                if let Some(container) = self.containers.get_mut(id) {
                    container.write_stdin();
                }
            }
            Token::AttachedStdin(id, index) => {
                if let Some(container) = self.containers.get_mut(id) {
                    container.read_stdin(*index);
                }
            }
            Token::AttachedOutput(id, index, at) => {
                let Some(container) = self.containers.get_mut(id) else { return };
                let Some(attached) = container.attached.get_mut(*index) else { return };
                if events & (libc::POLLERR | libc::POLLHUP) != 0 {
                    attached.outputs[*at] = None;
                }
                attached.flush();
            }
        }
    }

    /// What is tried again or tidied up at every turn.
    fn tend(&mut self) {
        let mut ended = Vec::new();
        for container in self.containers.values_mut() {
            container.log.flush();
            container.tend_attached();
            if let Some(tries) = container.unrecorded {
                let recorded = container.record().is_ok();
                if recorded || tries == RECORD_TRIES {
                    ended.push(Message::Exited(container.state.clone()));
                }
                container.unrecorded = (!recorded && tries < 100 * RECORD_TRIES).then(|| tries + 1);
            }
        }
        for message in &ended {
            for connection in self.connections.values_mut().filter(|c| c.subscribed) {
                connection.queue(message, Vec::new());
            }
        }
        self.connections.retain(|_, c| !c.broken);
    }

    fn reap(&mut self) {
        while let Some((pid, code)) = sys::reap() {
            if self.helper_pids.remove(&pid) {
                continue;
            }
            if !self.claim(pid, code) && !self.helpers.is_empty() {
                self.unclaimed.push_back((pid, code));
            }
        }
        if self.helpers.is_empty() {
            self.unclaimed.clear();
        } else if self.unclaimed.len() > 1024 {
            self.unclaimed.pop_front();
        }
    }

    /// Gives the end of a process to whom it belongs.
    fn claim(&mut self, pid: i32, code: i32) -> bool {
        if let Some(container) =
            self.containers.values_mut().find(|c| c.state.pid == pid && !c.has_ended())
        {
            container.end(code);
            return true;
        }
        if let Some(at) = self.execs.iter().position(|e| e.pid == pid) {
            let exec = self.execs.swap_remove(at);
            if let Some(connection) = self.connections.get_mut(&exec.connection) {
                connection.queue(&Message::ExecExited { pid, code }, Vec::new());
            }
            return true;
        }
        if self.init == Some(pid) {
            self.init = None;
            return true;
        }
        false
    }

    fn reply(
        &mut self,
        connection: u64,
        id: u64,
        result: Result<Answer, String>,
        fds: Vec<OwnedFd>,
    ) {
        if let Some(connection) = self.connections.get_mut(&connection) {
            connection.queue(&Message::Answer { id, result }, fds);
        }
    }

    fn answer(&mut self, connection: u64, request: Request) {
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
    fn running(&self, id: &str) -> Result<Option<&Container>, String> {
        match self.containers.get(id) {
            Some(container) if container.has_ended() => Ok(None),
            Some(container) => Ok(Some(container)),
            None => Err(format!("container {id} was not started here")),
        }
    }

    fn begin_start(&mut self, start: Start, connection: u64, request: u64) -> Result<(), String> {
        let in_making = self.helpers.iter().any(|h| match &h.purpose {
            Purpose::Start(c) => c.start.container == start.container,
            Purpose::Exec { .. } => false,
        });
        if in_making || self.containers.contains_key(&start.container) {
            return Err(format!("container {} was started before", start.container));
        }
        let mut container = Container::new(start);
        let streams = if container.start.tty {
            [Stdio::null(), Stdio::null(), Stdio::null()]
        } else {
            let what = |e| format!("pipes for container {}: {e}", container.start.container);
            let stdin = if container.start.stdin {
                let (theirs, ours) = sys::pipe().map_err(what)?;
                sys::set_nonblocking(ours.as_raw_fd()).map_err(what)?;
                container.stdin = Some(ours);
                Stdio::from(theirs)
            } else {
                Stdio::null()
            };
            let mut ends = Vec::new();
            for output in &mut container.outputs {
                let (ours, theirs) = sys::pipe().map_err(what)?;
                sys::set_nonblocking(ours.as_raw_fd()).map_err(what)?;
                *output = Some(ours);
                ends.push(Stdio::from(theirs));
            }
            let mut ends = ends.into_iter();
            [stdin, ends.next().unwrap_or(Stdio::null()), ends.next().unwrap_or(Stdio::null())]
        };
        let (report, pid) = spawn_helper(&container.start.helper, streams)?;
        self.helper_pids.insert(pid);
        self.helpers.push(Helper {
            report,
            connection,
            request,
            purpose: Purpose::Start(Box::new(container)),
        });
        Ok(())
    }

    fn begin_exec(&mut self, exec: &Exec, connection: u64, request: u64) -> Result<(), String> {
        if self.running(&exec.container)?.is_none() {
            return Err(format!("container {} does not run", exec.container));
        }
        let what = |e| format!("pipes for a command in {}: {e}", exec.container);
        let mut streams = Vec::new();
        let mut theirs = [Stdio::null(), Stdio::null(), Stdio::null()];
        if !exec.tty {
            if exec.stdin {
                let (reading, writing) = sys::pipe().map_err(what)?;
                theirs[0] = Stdio::from(reading);
                streams.push(writing.into());
            }
            for (at, wanted) in [(1, exec.stdout), (2, exec.stderr)] {
                if wanted {
                    let (reading, writing) = sys::pipe().map_err(what)?;
                    theirs[at] = Stdio::from(writing);
                    streams.push(reading.into());
                }
            }
        }
        let (report, pid) = spawn_helper(&exec.helper, theirs)?;
        self.helper_pids.insert(pid);
        self.helpers.push(Helper {
            report,
            connection,
            request,
            purpose: Purpose::Exec { streams, tty: exec.tty },
        });
        Ok(())
    }

    fn helper_reported(&mut self, at: usize) {
        let helper = self.helpers.remove(at);
        let report: HelperReport =
            serde_json::from_slice(&helper.report.input).unwrap_or_else(|_| HelperReport {
                error: "the process that makes it ended without saying why".to_owned(),
                ..HelperReport::default()
            });
        match helper.purpose {
            Purpose::Start(container) => {
                let id = container.start.container.clone();
                let result =
                    self.finish_start(*container, report, helper.report.fds.into_iter().next());
                if result.is_err() {
                    self.containers.remove(&id);
                }
                self.reply(helper.connection, helper.request, result, Vec::new());
            }
            Purpose::Exec { mut streams, tty } => {
                if !report.error.is_empty() {
                    self.reply(helper.connection, helper.request, Err(report.error), Vec::new());
                    return;
                }
                if tty {
                    streams = helper.report.fds;
                }
                self.execs.push(ExecProcess { pid: report.pid, connection: helper.connection });
                let answer = Answer::Exec { pid: report.pid };
                self.reply(helper.connection, helper.request, Ok(answer), streams);
                self.claim_earlier(report.pid);
            }
        }
    }

    fn finish_start(
        &mut self,
        mut container: Container,
        report: HelperReport,
        terminal: Option<OwnedFd>,
    ) -> Result<Answer, String> {
        if !report.error.is_empty() {
            return Err(report.error);
        }
        container.state.pid = report.pid;
        if container.start.tty {
            let master = terminal.ok_or("the terminal was not handed over")?;
            let _ = sys::set_nonblocking(master.as_raw_fd());
            if container.start.stdin {
                container.stdin = master.try_clone().ok().map(File::from);
            }
            container.outputs[0] = Some(File::from(master));
        }
        container.state.started = sys::now();
        // Written before it runs: whoever finds no record may take it that it never ran.
        container.record().map_err(|e| format!("writing {}: {e}", container.start.state_path))?;
        if let Err(error) = let_go(&container.start.notify_dir) {
            let _ = sys::kill(report.pid, libc::SIGKILL);
            return Err(format!("letting the container's process go: {error}"));
        }
        let state = container.state.clone();
        self.containers.insert(container.start.container.clone(), container);
        self.claim_earlier(report.pid);
        Ok(Answer::Started { state, warnings: report.warnings })
    }

    /// Looks whether a process that has just become known has ended already.
    fn claim_earlier(&mut self, pid: i32) {
        if let Some(at) = self.unclaimed.iter().position(|(p, _)| *p == pid)
            && let Some((pid, code)) = self.unclaimed.remove(at)
        {
            self.claim(pid, code);
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

/// Tells a made process that it may go on to run its command.
fn let_go(dir: &str) -> io::Result<()> {
    // The path may be longer than a socket's address can be, hence the detour by the folder.
    std::env::set_current_dir(dir)?;
    let result = UnixStream::connect(Path::new("notify.sock"))
        .and_then(|mut socket| io::Write::write_all(&mut socket, b"start container"));
    std::env::set_current_dir("/")?;
    result
}
