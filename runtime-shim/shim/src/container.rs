//! One container: its process, its streams, its log, and who is attached to it.

use std::{
    fs::{File, OpenOptions},
    io::{ErrorKind, Read, Write},
    os::fd::{AsRawFd, RawFd},
};

use crate::{
    log::{LogFile, Stream},
    protocol::{STATE_FILE_SIZE, Start, State},
    sys,
};

/// What is read or written in one go.
const CHUNK: usize = 16 * 1024;

/// Who joined the container's streams. What a slow one has not taken yet makes the container wait.
#[derive(Default)]
pub(crate) struct Attached {
    pub(crate) stdin: Option<File>,
    pub(crate) outputs: [Option<File>; 2],
    pending: [Vec<u8>; 2],
}

impl Attached {
    fn is_behind(&self, stream: Stream) -> bool {
        !self.pending[stream as usize].is_empty()
    }

    /// Writes what it can of what is kept for this one; forgets a reader that is gone.
    pub(crate) fn flush(&mut self) {
        for (output, pending) in self.outputs.iter_mut().zip(&mut self.pending) {
            while !pending.is_empty() {
                let Some(file) = output.as_mut() else {
                    pending.clear();
                    break;
                };
                match file.write(pending) {
                    Ok(n) if n > 0 => {
                        pending.drain(..n);
                    }
                    Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                    Err(e) if e.kind() == ErrorKind::Interrupted => {}
                    _ => {
                        pending.clear();
                        *output = None;
                    }
                }
            }
        }
    }

    fn is_over(&self) -> bool {
        self.stdin.is_none() && self.outputs.iter().all(Option::is_none)
    }
}

/// A container that was started here.
pub(crate) struct Container {
    pub(crate) start: Start,
    pub(crate) state: State,
    /// The ends of its standard output and error; with a terminal, the master is the first.
    pub(crate) outputs: [Option<File>; 2],
    /// The end of its standard input; with a terminal, another handle of the master.
    pub(crate) stdin: Option<File>,
    /// Bytes on their way to its standard input.
    stdin_pending: Vec<u8>,
    stdin_ends: bool,
    pub(crate) log: LogFile,
    pub(crate) attached: Vec<Attached>,
    /// How often its end could not be written down yet; `None` once it was.
    pub(crate) unrecorded: Option<u32>,
}

impl Container {
    pub(crate) fn new(start: Start) -> Container {
        let log = LogFile::new(&start.log_path);
        let state = State { container: start.container.clone(), ..State::default() };
        Container {
            start,
            state,
            outputs: [None, None],
            stdin: None,
            stdin_pending: Vec::new(),
            stdin_ends: false,
            log,
            attached: Vec::new(),
            unrecorded: None,
        }
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.state.finished != 0
    }

    /// Whether more may be read from this stream now.
    pub(crate) fn wants(&self, stream: Stream) -> bool {
        !self.log.is_blocked() && !self.attached.iter().any(|a| a.is_behind(stream))
    }

    /// Moves what the process wrote into the log and to the attached, until there is no more or
    /// somebody is slow.
    pub(crate) fn read_output(&mut self, stream: Stream) {
        let mut chunk = [0; CHUNK];
        while self.wants(stream) {
            let Some(file) = self.outputs[stream as usize].as_mut() else { return };
            match file.read(&mut chunk) {
                Ok(n) if n > 0 => {
                    self.log.append(stream, &chunk[..n], sys::now());
                    for attached in &mut self.attached {
                        if attached.outputs[stream as usize].is_some() {
                            attached.pending[stream as usize].extend_from_slice(&chunk[..n]);
                            attached.flush();
                        }
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                // The end; a terminal says EIO when nobody has it open any more.
                _ => {
                    self.outputs[stream as usize] = None;
                    self.log.end(stream, sys::now());
                    for attached in &mut self.attached {
                        if attached.pending[stream as usize].is_empty() {
                            attached.outputs[stream as usize] = None;
                        }
                    }
                    return;
                }
            }
        }
    }

    /// Takes bytes from an attached one for standard input. More is taken only once these are gone.
    pub(crate) fn read_stdin(&mut self, index: usize) {
        if !self.stdin_pending.is_empty() {
            return;
        }
        let Some(from) = self.attached.get_mut(index).and_then(|a| a.stdin.as_mut()) else {
            return;
        };
        let mut chunk = [0; CHUNK];
        match from.read(&mut chunk) {
            Ok(n) if n > 0 => {
                if self.stdin.is_some() {
                    self.stdin_pending.extend_from_slice(&chunk[..n]);
                }
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return,
            _ => {
                self.attached[index].stdin = None;
                if self.start.stdin_once && !self.start.tty {
                    self.stdin_ends = true;
                }
            }
        }
        self.write_stdin();
    }

    /// Whether bytes wait for the process to read them.
    pub(crate) fn has_stdin_pending(&self) -> bool {
        !self.stdin_pending.is_empty()
    }

    /// Gives the process what it takes of what waits for it.
    pub(crate) fn write_stdin(&mut self) {
        while !self.stdin_pending.is_empty() {
            let Some(file) = self.stdin.as_mut() else {
                self.stdin_pending.clear();
                break;
            };
            match file.write(&self.stdin_pending) {
                Ok(n) if n > 0 => {
                    self.stdin_pending.drain(..n);
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                _ => {
                    self.stdin_pending.clear();
                    self.stdin = None;
                }
            }
        }
        if self.stdin_ends {
            self.stdin = None;
        }
    }

    /// Gives the attached what is kept for them, and forgets those who are gone or have seen the end.
    pub(crate) fn tend_attached(&mut self) {
        let ended = self.has_ended();
        let open = [self.outputs[0].is_some(), self.outputs[1].is_some()];
        for attached in &mut self.attached {
            attached.flush();
            for (at, open) in open.iter().enumerate() {
                if (!open || ended) && attached.pending[at].is_empty() {
                    attached.outputs[at] = None;
                }
            }
            if ended {
                attached.stdin = None;
            }
        }
        self.attached.retain(|a| !a.is_over());
    }

    /// The process ended: reads what it still wrote and notes how it went.
    pub(crate) fn end(&mut self, code: i32) {
        for stream in [Stream::Stdout, Stream::Stderr] {
            self.read_output(stream);
        }
        self.state.finished = sys::now().max(1);
        self.state.code = code;
        self.state.oom = code != 0 && oom_kills(&self.start.oom_path) > 0;
        self.stdin = None;
        self.unrecorded = Some(0);
    }

    /// Writes the state down, in place, so that no further block of the disk is needed.
    pub(crate) fn record(&self) -> std::io::Result<()> {
        let mut text = serde_json::to_vec(&self.state)?;
        if text.len() >= STATE_FILE_SIZE {
            // Only a long error can make it so.
            let short =
                State { error: self.state.error.chars().take(64).collect(), ..self.state.clone() };
            text = serde_json::to_vec(&short)?;
        }
        text.resize(STATE_FILE_SIZE.max(text.len() + 1) - 1, b' ');
        text.push(b'\n');
        let mut file = OpenOptions::new().write(true).open(&self.start.state_path)?;
        file.write_all(&text)?;
        file.sync_data()
    }

    /// The descriptor of an output, for polling.
    pub(crate) fn output_fd(&self, stream: Stream) -> Option<RawFd> {
        self.outputs[stream as usize].as_ref().map(AsRawFd::as_raw_fd)
    }
}

impl Attached {
    /// The descriptor of an output and whether bytes wait for it, for polling.
    pub(crate) fn output_fd(&self, at: usize) -> Option<(RawFd, bool)> {
        self.outputs[at].as_ref().map(|f| (f.as_raw_fd(), !self.pending[at].is_empty()))
    }
}

/// How often the kernel killed something in this cgroup for want of memory: the line `oom_kill N`
/// of `memory.events` (v2) or `memory.oom_control` (v1).
fn oom_kills(path: &str) -> u64 {
    if path.is_empty() {
        return 0;
    }
    std::fs::read_to_string(path)
        .ok()
        .and_then(|text| {
            text.lines().find_map(|l| l.strip_prefix("oom_kill ")?.trim().parse().ok())
        })
        .unwrap_or(0)
}
