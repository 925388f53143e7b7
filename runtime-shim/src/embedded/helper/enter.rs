//! Runs one more command in a container that runs: what `kubectl exec` and exec probes do.
//!
//! libcontainer can do this too, but without the container's seccomp filter (0.7 leaves it out of
//! the spec that it makes for the command), and a command must not be able to do more than the
//! container. So the steps are here, with libcontainer's own functions for the filter and the
//! capabilities; the command gets the container's namespaces, cgroups, user, groups, capabilities,
//! filter, working directory and environment.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs::{self, File},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::{ffi::OsStrExt, net::UnixStream},
    },
    path::{Path, PathBuf},
};

use libcontainer::{capabilities, seccomp, syscall::linux::LinuxSyscall};
use nix::{
    fcntl::OFlag,
    sched::{CloneFlags, setns},
    unistd::{ForkResult, chdir, fork, pipe2, setsid},
};
use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};

use super::{HelperReport, own_streams, send_terminal, set_oom_score};
use crate::cgroup::Cgroups;

pub(super) fn run(
    socket: &UnixStream,
    bundle: &Path,
    pid: i32,
    tty: bool,
    command: &[String],
) -> Result<HelperReport, String> {
    let config = bundle.join("config.json");
    let spec = Spec::load(&config).map_err(|e| format!("{}: {e}", config.display()))?;
    let linux = spec.linux().as_ref().ok_or("the spec has no linux part")?;
    let types: Vec<LinuxNamespaceType> =
        linux.namespaces().iter().flatten().map(|n| n.typ()).collect();
    // Opened before anything is entered: afterwards /proc is another one.
    let namespaces = open_namespaces(pid, &types)?;
    let score = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap_or_default();
    let own = fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
    let warnings =
        if score == own { None } else { set_oom_score(score.trim()) }.into_iter().collect();

    let cgroups = Cgroups::detect("").map_err(|e| format!("cgroups: {e}"))?;
    let path = linux.cgroups_path().clone().unwrap_or_default();
    for entrance in cgroups.entrances(&path) {
        fs::write(&entrance, std::process::id().to_string())
            .map_err(|e| format!("entering the cgroup {}: {e}", entrance.display()))?;
    }

    for (flag, file) in namespaces.iter().filter(|(flag, _)| *flag == CloneFlags::CLONE_NEWPID) {
        setns(file, *flag).map_err(|e| format!("entering the process namespace: {e}"))?;
    }
    let (reading, writing) = pipe2(OFlag::O_CLOEXEC).map_err(|e| format!("pipe: {e}"))?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }.map_err(|e| format!("fork: {e}"))? {
        ForkResult::Parent { child } => {
            drop(writing);
            let mut error = String::new();
            // Ends when the command runs, for the pipe closes on exec.
            File::from(reading).read_to_string(&mut error).map_err(|e| format!("pipe: {e}"))?;
            if !error.is_empty() {
                return Err(error);
            }
            Ok(HelperReport { pid: child.as_raw(), error: String::new(), warnings })
        }
        ForkResult::Child => {
            drop(reading);
            let error = match become_command(socket, &spec, &namespaces, tty, command) {
                Ok(never) => match never {},
                Err(error) => error,
            };
            let _ = File::from(writing).write_all(error.as_bytes());
            // SAFETY: ends the process without running what belongs to the parent.
            unsafe { libc::_exit(126) }
        }
    }
}

fn open_namespaces(
    pid: i32,
    types: &[LinuxNamespaceType],
) -> Result<Vec<(CloneFlags, File)>, String> {
    // The mount namespace last: it takes the paths of the others away.
    let all = [
        (LinuxNamespaceType::Pid, "pid", CloneFlags::CLONE_NEWPID),
        (LinuxNamespaceType::Ipc, "ipc", CloneFlags::CLONE_NEWIPC),
        (LinuxNamespaceType::Uts, "uts", CloneFlags::CLONE_NEWUTS),
        (LinuxNamespaceType::Network, "net", CloneFlags::CLONE_NEWNET),
        (LinuxNamespaceType::Cgroup, "cgroup", CloneFlags::CLONE_NEWCGROUP),
        (LinuxNamespaceType::Mount, "mnt", CloneFlags::CLONE_NEWNS),
    ];
    all.into_iter()
        .filter(|(kind, _, _)| types.contains(kind))
        .map(|(_, name, flag)| {
            let path = format!("/proc/{pid}/ns/{name}");
            File::open(&path).map(|file| (flag, file)).map_err(|e| {
                if e.kind() == io::ErrorKind::NotFound {
                    "the container does not run any more".to_owned()
                } else {
                    format!("{path}: {e}")
                }
            })
        })
        .collect()
}

/// From here on this is the command's process.
fn become_command(
    socket: &UnixStream,
    spec: &Spec,
    namespaces: &[(CloneFlags, File)],
    tty: bool,
    command: &[String],
) -> Result<std::convert::Infallible, String> {
    let process = spec.process().as_ref().ok_or("the spec has no process")?;
    let linux = spec.linux().as_ref().ok_or("the spec has no linux part")?;
    setsid().map_err(|e| format!("setsid: {e}"))?;
    for (flag, file) in namespaces.iter().filter(|(flag, _)| *flag != CloneFlags::CLONE_NEWPID) {
        setns(file, *flag).map_err(|e| format!("entering a namespace ({flag:?}): {e}"))?;
    }
    let uid = process.user().uid();
    let gid = process.user().gid();
    if tty {
        open_terminal(socket, uid).map_err(|e| format!("making a terminal: {e}"))?;
    } else {
        own_streams(uid);
    }
    let no_new_privileges = process.no_new_privileges() == Some(true);
    if no_new_privileges {
        // SAFETY: a plain system call.
        unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    }
    // As root first and as the user second, for either may be the one who is let in.
    let entered = chdir(process.cwd()).is_ok();
    let groups: Vec<libc::gid_t> = process.user().additional_gids().clone().unwrap_or_default();
    set_user(uid, gid, &groups).map_err(|e| format!("becoming user {uid}, group {gid}: {e}"))?;
    let syscall = LinuxSyscall;
    capabilities::reset_effective(&syscall).map_err(|e| format!("capabilities: {e}"))?;
    // Loading a filter takes CAP_SYS_ADMIN or no_new_privs: so before the capabilities go, or as
    // late as can be.
    let load_filter = || match linux.seccomp() {
        Some(filter) => seccomp::initialize_seccomp(filter)
            .map(|_| ())
            .map_err(|e| format!("the seccomp filter: {e}")),
        None => Ok(()),
    };
    if !no_new_privileges {
        load_filter()?;
    }
    if let Some(set) = process.capabilities() {
        capabilities::drop_privileges(set, &syscall).map_err(|e| format!("capabilities: {e}"))?;
    }
    if !entered {
        chdir(process.cwd())
            .map_err(|e| format!("working directory {}: {e}", process.cwd().display()))?;
    }
    let environment = environment(process, uid, tty);
    let program = find(command, &environment)?;
    let strings = |list: &mut dyn Iterator<Item = Vec<u8>>| {
        list.map(|word| CString::new(word).map_err(|_| "a NUL in the command".to_owned()))
            .collect::<Result<Vec<_>, _>>()
    };
    let arguments = strings(&mut command.iter().map(|word| word.clone().into_bytes()))?;
    let variables = strings(
        &mut environment.iter().map(|(name, value)| format!("{name}={value}").into_bytes()),
    )?;
    let path = CString::new(program.as_os_str().as_bytes()).map_err(|_| "a NUL in the command")?;
    if no_new_privileges {
        load_filter()?;
    }
    nix::unistd::execve(&path, &arguments, &variables)
        .map_err(|e| format!("running {}: {e}", program.display()))
}

fn set_user(uid: u32, gid: u32, groups: &[libc::gid_t]) -> io::Result<()> {
    let check = |result: libc::c_long| {
        if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: this process has one thread, so the plain system calls change all of it; the pointer
    // and length are those of a live slice.
    unsafe {
        check(libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0).into())?;
        check(libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()))?;
        check(libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
        check(libc::syscall(libc::SYS_setresuid, uid, uid, uid))?;
        check(libc::prctl(libc::PR_SET_KEEPCAPS, 0, 0, 0, 0).into())
    }
}

/// Makes a terminal in the container's own `/dev/pts`, takes it as standard streams and controlling
/// terminal, and hands its master to the shim.
fn open_terminal(socket: &UnixStream, uid: u32) -> io::Result<()> {
    let check = |result: libc::c_int| {
        if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
    };
    // Not /dev/ptmx, which the image or the container may have replaced by something else.
    let ptmx = fs::OpenOptions::new().read(true).write(true).open("/dev/pts/ptmx")?;
    // SAFETY: the ioctls get the types that they are documented with; the descriptor they give is
    // owned at once; dup2 is on this process's own descriptors.
    unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        check(libc::fstat(ptmx.as_raw_fd(), &raw mut stat))?;
        if stat.st_rdev != libc::makedev(5, 2) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "/dev/pts/ptmx is no terminal"));
        }
        let unlocked: libc::c_int = 0;
        check(libc::ioctl(ptmx.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked))?;
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        let peer = check(libc::ioctl(ptmx.as_raw_fd(), libc::TIOCGPTPEER, flags))?;
        let peer = OwnedFd::from_raw_fd(peer);
        check(libc::fchown(peer.as_raw_fd(), uid, libc::gid_t::MAX))?;
        check(libc::ioctl(peer.as_raw_fd(), libc::TIOCSCTTY, 0))?;
        for fd in 0..3 {
            check(libc::dup2(peer.as_raw_fd(), fd))?;
        }
    }
    send_terminal(socket, ptmx.as_fd())
}

/// The container's environment, with `HOME` from the container's own account file and `TERM` on a
/// terminal if they are not set.
fn environment(process: &Process, uid: u32, tty: bool) -> BTreeMap<String, String> {
    let mut variables: BTreeMap<String, String> = process
        .env()
        .iter()
        .flatten()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    if !variables.contains_key("HOME") {
        let home = fs::read_to_string("/etc/passwd").ok().and_then(|text| {
            text.lines().find_map(|line| {
                let fields: Vec<&str> = line.split(':').collect();
                (fields.get(2)?.parse() == Ok(uid))
                    .then(|| fields.get(5).map(|h| (*h).to_owned()))?
            })
        });
        variables.insert("HOME".into(), home.unwrap_or_else(|| "/".into()));
    }
    if tty {
        variables.entry("TERM".into()).or_insert_with(|| "xterm".into());
    }
    variables
}

/// The program of a command, looked for along `PATH` as a shell does.
fn find(command: &[String], environment: &BTreeMap<String, String>) -> Result<PathBuf, String> {
    let name = command.first().ok_or("no command")?;
    if name.contains('/') {
        return match fs::metadata(name) {
            Ok(_) => Ok(PathBuf::from(name)),
            Err(e) => Err(format!("running {name:?}: {e}")),
        };
    }
    let path = environment.get("PATH").map_or("", String::as_str);
    path.split(':')
        .map(|dir| Path::new(if dir.is_empty() { "." } else { dir }).join(name))
        .find(|candidate| {
            use std::os::unix::fs::PermissionsExt;
            fs::metadata(candidate)
                .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
        })
        .ok_or_else(|| format!("running {name:?}: executable file not found in $PATH"))
}
