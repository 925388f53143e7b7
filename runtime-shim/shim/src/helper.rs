//! The children that make processes for us: starting one, and reading its report.

use std::{
    io::{self, ErrorKind},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    process::{Command, Stdio},
};

use crate::{protocol::MAX_MESSAGE, sys};

/// What came from a helper so far.
pub(crate) struct Report {
    pub(crate) socket: UnixStream,
    pub(crate) input: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

/// Reads a helper's report; true once it is whole or there will be no more.
pub(crate) fn read_report(helper: &mut Report) -> bool {
    let mut chunk = [0; 4096];
    loop {
        match sys::receive(&helper.socket, &mut chunk, &mut helper.fds) {
            Ok(0) => return true,
            Ok(n) => {
                helper.input.extend_from_slice(&chunk[..n]);
                if helper.input.last() == Some(&b'\n') || helper.input.len() > MAX_MESSAGE {
                    return true;
                }
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => return false,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(_) => return true,
        }
    }
}

/// Starts a helper with these standard streams and the report channel as descriptor 3.
pub(crate) fn spawn_helper(
    command: &[String],
    streams: [Stdio; 3],
) -> Result<(Report, i32), String> {
    let (program, arguments) = command.split_first().ok_or("no helper is named")?;
    let (ours, theirs) = UnixStream::pair().map_err(|e| format!("socket pair: {e}"))?;
    ours.set_nonblocking(true).map_err(|e| format!("socket pair: {e}"))?;
    let [stdin, stdout, stderr] = streams;
    // Not descriptor 3 itself: duplicating a descriptor onto itself would leave it closing on exec.
    // SAFETY: the descriptor is ours; the duplicate is owned by `theirs` and nobody else.
    let theirs = unsafe {
        let fd = libc::fcntl(theirs.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 10);
        if fd == -1 {
            return Err(format!("socket pair: {}", io::Error::last_os_error()));
        }
        OwnedFd::from_raw_fd(fd)
    };
    let fd = theirs.as_raw_fd();
    let mut child = Command::new(program);
    child.args(arguments).stdin(stdin).stdout(stdout).stderr(stderr).current_dir("/").env_clear();
    // SAFETY: dup2 is safe to call between fork and exec.
    unsafe {
        child.pre_exec(move || {
            if libc::dup2(fd, 3) == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    // The child is taken away by `reap` like all others.
    let child = child.spawn().map_err(|e| format!("starting {program}: {e}"))?;
    let report = Report { socket: ours, input: Vec::new(), fds: Vec::new() };
    Ok((report, i32::try_from(child.id()).unwrap_or(0)))
}
