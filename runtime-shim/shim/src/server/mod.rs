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

mod making;
mod requests;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs::File,
    io::{self, ErrorKind, Read},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::net::UnixListener,
    },
};

use crate::{
    connection::Connection,
    container::Container,
    helper::{Report, read_report},
    log::Stream,
    protocol::{Answer, Message},
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
}
