//! Processes that are made: a helper is started, and what it reports is taken in.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    process::Stdio,
};

use super::{ExecProcess, Helper, Purpose, Server};
use crate::{
    container::Container,
    helper::spawn_helper,
    protocol::{Answer, Exec, HelperReport, Start},
    sys,
};

impl Server {
    pub(super) fn begin_start(
        &mut self,
        start: Start,
        connection: u64,
        request: u64,
    ) -> Result<(), String> {
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

    pub(super) fn begin_exec(
        &mut self,
        exec: &Exec,
        connection: u64,
        request: u64,
    ) -> Result<(), String> {
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

    pub(super) fn helper_reported(&mut self, at: usize) {
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
