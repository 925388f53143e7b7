//! The shim: one small process for each pod, which holds its containers and outlives the agent.
//!
//! It is the parent (the *subreaper*) of all that runs in the pod, holds the ends of their standard
//! streams, writes their log files, writes down how they end, and answers the agent on a unix socket
//! ([`protocol`]). It lives in the pod's own IPC and UTS namespaces, which containers join through
//! it, and in a cgroup of its own beside the agent's, so that neither the agent's death nor a stop of
//! its service touches it.
//!
//! One thread, one `poll` loop ([`server`]), and no state that is not also on disk or in the kernel.
//! It must never lose a line of a log, never forget an exit code, and never need memory or disk that
//! could be exhausted when a container ends.
//!
//! Usage: `keelson-shim <config>`, where `<config>` is JSON ([`Config`]). The command returns once
//! the shim answers on its socket, or with the reason why it can't, on standard error.

mod connection;
mod container;
mod helper;
mod log;
mod pause;
mod protocol;
mod server;
mod sys;

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixListener},
    process::exit,
};

use serde::Deserialize;

/// How a shim is set up. All paths are absolute.
#[derive(Debug, Deserialize)]
struct Config {
    /// The socket to listen on.
    socket: String,
    /// The files of the cgroups to enter: each gets the shim's process id.
    cgroup_procs: Vec<String>,
    /// Have an IPC namespace of one's own.
    new_ipc: bool,
    /// Have a UTS namespace of one's own, with this host name.
    hostname: Option<String>,
    /// Have a process namespace for all containers to share, with a first process in it.
    shared_pid: bool,
    /// Files below `/proc/sys` and what to write into them, after entering the namespaces.
    sysctls: BTreeMap<String, String>,
}

fn main() {
    if let Err(error) = run() {
        let _ = writeln!(io::stderr(), "{error}");
        exit(1);
    }
}

fn run() -> Result<(), String> {
    let mut arguments = std::env::args().skip(1);
    let text = arguments.next().ok_or("usage: keelson-shim <config as JSON>")?;
    let config: Config = serde_json::from_str(&text).map_err(|e| format!("config: {e}"))?;
    let (mut ready, report) = sys::pipe().map_err(|e| format!("pipe: {e}"))?;
    // SAFETY: there is one thread, so the child may do whatever the parent could.
    match unsafe { libc::fork() } {
        -1 => Err(format!("fork: {}", io::Error::last_os_error())),
        0 => {
            drop(ready);
            let mut report = report;
            match set_up(&config) {
                Ok((server, init)) => {
                    sys::detach_stdio();
                    let _ = report.write_all(b"ok");
                    drop(report);
                    server::Server::new(server, init).run();
                    let _ = fs::remove_file(&config.socket);
                    exit(0);
                }
                Err(error) => {
                    let _ = report.write_all(error.as_bytes());
                    exit(1);
                }
            }
        }
        _ => {
            drop(report);
            let mut answer = String::new();
            let _ = ready.read_to_string(&mut answer);
            match answer.as_str() {
                "ok" => Ok(()),
                "" => Err("the shim ended while it was being set up".to_owned()),
                error => Err(error.to_owned()),
            }
        }
    }
}

/// All that must be so before the first answer. Runs in the process that stays.
fn set_up(config: &Config) -> Result<(UnixListener, Option<i32>), String> {
    let last = |what: &str| format!("{what}: {}", io::Error::last_os_error());
    // SAFETY: plain system calls on this process, without pointers.
    unsafe {
        if libc::setsid() == -1 {
            return Err(last("setsid"));
        }
        if libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == -1 {
            return Err(last("becoming a subreaper"));
        }
        libc::signal(libc::SIGHUP, libc::SIG_IGN);
        libc::umask(0o022);
    }
    std::env::set_current_dir("/").map_err(|e| format!("chdir /: {e}"))?;
    let pid = std::process::id().to_string();
    for path in &config.cgroup_procs {
        fs::write(path, &pid).map_err(|e| format!("entering the cgroup {path}: {e}"))?;
    }
    // The kernel should rather kill a container than the process that knows about it. Without
    // CAP_SYS_RESOURCE the score can't be lowered, and the default has to do.
    let _ = fs::write("/proc/self/oom_score_adj", "-998");

    let mut flags = 0;
    if config.new_ipc {
        flags |= libc::CLONE_NEWIPC;
    }
    if config.hostname.is_some() {
        flags |= libc::CLONE_NEWUTS;
    }
    // SAFETY: a plain system call; there is one thread.
    if flags != 0 && unsafe { libc::unshare(flags) } == -1 {
        return Err(last("making the pod's namespaces"));
    }
    if let Some(name) = &config.hostname {
        // SAFETY: the pointer and length are those of a live string.
        if unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) } == -1 {
            return Err(last(&format!("setting the host name {name:?}")));
        }
    }
    for (path, value) in &config.sysctls {
        fs::write(format!("/proc/sys/{path}"), value)
            .map_err(|e| format!("setting /proc/sys/{path} to {value:?}: {e}"))?;
    }
    let _ = fs::remove_file(&config.socket);
    let listener =
        UnixListener::bind(&config.socket).map_err(|e| format!("{}: {e}", config.socket))?;
    fs::set_permissions(&config.socket, fs::Permissions::from_mode(0o600))
        .map_err(|e| format!("{}: {e}", config.socket))?;
    listener.set_nonblocking(true).map_err(|e| format!("{}: {e}", config.socket))?;
    let init = if config.shared_pid {
        Some(pause::spawn().map_err(|e| format!("making the pod's process namespace: {e}"))?)
    } else {
        None
    };
    Ok((listener, init))
}
