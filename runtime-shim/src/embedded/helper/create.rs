//! Makes a container from its bundle, by libcontainer. Its process then waits to be let go.

use std::{
    fs,
    os::{
        fd::{AsFd, FromRawFd, OwnedFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
};

use libcontainer::{container::builder::ContainerBuilder, syscall::syscall::SyscallType};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use oci_spec::runtime::Spec;

use super::{HelperReport, own_streams, send_terminal, set_oom_score};

pub(super) fn run(
    socket: &UnixStream,
    state: &Path,
    bundle: &Path,
    id: &str,
    oom_score: &str,
) -> Result<HelperReport, String> {
    let config = bundle.join("config.json");
    let spec = Spec::load(&config).map_err(|e| format!("{}: {e}", config.display()))?;
    let process = spec.process().as_ref().ok_or("the spec has no process")?;
    let warnings = set_oom_score(oom_score).into_iter().collect();

    let console = if process.terminal().unwrap_or(false) {
        // Nobody has to accept for the made process to connect and send: the socket's queue holds
        // the terminal until we look.
        let path = state.join(format!("{}.tty", id.get(..24).unwrap_or(id)));
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        Some((path, listener))
    } else {
        own_streams(process.user().uid());
        None
    };

    let result = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_root_path(state)
        .map(|b| b.with_console_socket(console.as_ref().map(|(path, _)| path)))
        .and_then(|b| b.as_init(bundle).with_systemd(false).with_detach(true).build());
    if let Some((path, _)) = &console {
        let _ = fs::remove_file(path);
    }
    let container = result.map_err(|error| explain(&error))?;
    let pid = container.pid().ok_or("libcontainer named no process")?.as_raw();
    if let Some((_, listener)) = console {
        let master = receive_terminal(&listener).map_err(|e| format!("the terminal: {e}"))?;
        send_terminal(socket, master.as_fd()).map_err(|e| format!("the terminal: {e}"))?;
    }
    Ok(HelperReport { pid, error: String::new(), warnings })
}

/// The whole chain of causes in one line, each said once.
fn explain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    text
}

fn receive_terminal(listener: &UnixListener) -> std::io::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    let (sender, _) = listener.accept()?;
    let mut name = [0; 256];
    let mut io = [std::io::IoSliceMut::new(&mut name)];
    let mut control = nix::cmsg_space!([RawFd; 1]);
    let message =
        recvmsg::<()>(sender.as_raw_fd(), &mut io, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = part
            && let Some(fd) = fds.first()
        {
            // SAFETY: the kernel has just made it ours, and nobody else knows it.
            return Ok(unsafe { OwnedFd::from_raw_fd(*fd) });
        }
    }
    Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "it was not handed over"))
}
