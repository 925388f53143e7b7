//! The short-lived processes that make and enter containers.
//!
//! A shim starts them from the main binary (`keelson runtime-helper …`), since libcontainer changes
//! the process that calls it: it lowers its out-of-memory score, makes it undumpable, and wants to
//! fork from a single thread. What it makes becomes the shim's child as soon as the helper is gone.
//!
//! A helper has the new process's standard streams as its own, and as descriptor 3 a socket to the
//! shim, for its report and a terminal's master. It must not print anything: that would go into the
//! container's log.

mod create;
mod enter;

use std::{
    fs, io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, RawFd},
        unix::net::UnixStream,
    },
    path::Path,
};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::shim::protocol::HelperReport;

/// The descriptor of the report channel.
const REPORT: RawFd = 3;

/// What a helper is to do, from its arguments; see [`run`].
#[derive(Debug, PartialEq, Eq)]
enum Task<'a> {
    Create { state: &'a str, bundle: &'a str, id: &'a str, oom_score: &'a str },
    Enter { bundle: &'a str, pid: i32, tty: bool, command: &'a [String] },
}

/// Does what a shim started this process for, and gives the exit code. The arguments are those after
/// `runtime-helper`. Must be called before the process has a second thread.
pub(super) fn run(arguments: &[String]) -> i32 {
    // A panic's message must not get into a container's log; the report says that one happened.
    std::panic::set_hook(Box::new(|_| {}));
    // SAFETY: the shim gives this descriptor to every helper; nothing else in this process has it.
    let socket = unsafe {
        // In a container's process namespace its processes must not look through this one's
        // descriptors before it has become one of them (CVE-2016-9962).
        libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0);
        if libc::fcntl(REPORT, libc::F_SETFD, libc::FD_CLOEXEC) == -1 {
            return 2;
        }
        UnixStream::from_raw_fd(REPORT)
    };
    let result = match parse(arguments) {
        Some(Task::Create { state, bundle, id, oom_score }) => {
            create::run(&socket, Path::new(state), Path::new(bundle), id, oom_score)
        }
        Some(Task::Enter { bundle, pid, tty, command }) => {
            enter::run(&socket, Path::new(bundle), pid, tty, command)
        }
        None => Err(format!("the shim's helper does not understand {arguments:?}")),
    };
    let report = result.unwrap_or_else(|error| HelperReport { error, ..HelperReport::default() });
    let code = i32::from(!report.error.is_empty());
    let mut line = serde_json::to_vec(&report).unwrap_or_default();
    line.push(b'\n');
    match io::Write::write_all(&mut &socket, &line) {
        Ok(()) => code,
        Err(_) => 1,
    }
}

fn parse(arguments: &[String]) -> Option<Task<'_>> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["create", state, bundle, id, oom_score] => {
            Some(Task::Create { state, bundle, id, oom_score })
        }
        ["enter", bundle, pid, terminal @ ("tty" | "pipes"), "--", _, ..] => Some(Task::Enter {
            bundle,
            pid: pid.parse().ok()?,
            tty: *terminal == "tty",
            command: &arguments[5..],
        }),
        _ => None,
    }
}

/// Hands a terminal's master to the shim. The blank beside it may stand in front of the report.
fn send_terminal(socket: &UnixStream, master: BorrowedFd<'_>) -> io::Result<()> {
    let fds = [master.as_raw_fd()];
    let blank = [io::IoSlice::new(b" ")];
    sendmsg::<()>(
        socket.as_raw_fd(),
        &blank,
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

/// Lets the process that will run open its own standard streams anew (`/dev/stdout`), whoever it
/// runs as.
fn own_streams(uid: u32) {
    for fd in 0..3 {
        // SAFETY: no pointers but to a live structure; the descriptors are this process's own.
        unsafe {
            let mut stat: libc::stat = std::mem::zeroed();
            if libc::fstat(fd, &raw mut stat) == 0 && stat.st_mode & libc::S_IFMT == libc::S_IFIFO {
                libc::fchown(fd, uid, libc::gid_t::MAX);
            }
        }
    }
}

/// Sets this process's out-of-memory score, which what it makes inherits. Lowering it needs a
/// capability that not every host grants: what comes back is then a warning, not a failure.
fn set_oom_score(score: &str) -> Option<String> {
    if score == "-" {
        return None;
    }
    fs::write("/proc/self/oom_score_adj", score).err().map(|e| {
        format!(
            "the out-of-memory score can't be set to {score} ({e}): the runtime lacks \
             CAP_SYS_RESOURCE; the container keeps the score of its shim"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_taken_whole_or_not_at_all() {
        let own = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let line = own("create /run/c /bundle id -");
        assert_eq!(
            parse(&line),
            Some(Task::Create { state: "/run/c", bundle: "/bundle", id: "id", oom_score: "-" })
        );
        let line = own("enter /bundle 12 tty -- sh -c x");
        let Some(Task::Enter { pid: 12, tty: true, command, .. }) = parse(&line) else {
            panic!("not understood")
        };
        assert_eq!(command, ["sh", "-c", "x"]);
        for line in
            ["", "create a b", "enter /b x tty -- sh", "enter /b 1 tty --", "enter /b 1 no -- a"]
        {
            assert_eq!(parse(&own(line)), None, "{line}");
        }
    }
}
