//! What runs over a set of folders: each part at most once, found and stopped by others through files
//! in the run folder, `PART.lock` and `PART.json`. The parts may be processes of their own, or all
//! in one, which then has the files of all.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File, TryLockError},
    io::{self, Write},
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use clap::Parser;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use crate::{
    cli::{Cli, Command},
    paths::Paths,
};

/// A part of a node, of which one runs at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// API server, store, scheduler, controllers, cluster DNS.
    ControlPlane,
    /// kubelet's work.
    Agent,
    /// kube-proxy's work.
    Proxy,
}

impl Part {
    /// All of them.
    pub(crate) const ALL: [Self; 3] = [Self::ControlPlane, Self::Agent, Self::Proxy];

    /// As the command that runs it alone is called.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::ControlPlane => "control-plane",
            Self::Agent => "agent",
            Self::Proxy => "proxy",
        }
    }
}

/// What others must know of a running process, and `down` of the last one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Its process id.
    pub(crate) pid: i32,
    /// `up`, `agent`, `control-plane`, `proxy`.
    pub(crate) role: String,
    /// The version that wrote this.
    pub(crate) version: String,
    /// The node's name.
    pub(crate) node_name: String,
    /// `https://address:port` of the API server, if it is in the process.
    pub(crate) api_server: Option<String>,
    /// Whether it has told that it is ready.
    pub(crate) ready: bool,
    /// The pods' parent cgroup.
    pub(crate) cgroup_root: String,
}

impl Record {
    /// What is the same for every role.
    pub(crate) fn of_this_process(node_name: &str) -> Self {
        Self {
            // Process ids are below 2^22.
            pid: i32::try_from(std::process::id()).unwrap_or(i32::MAX),
            role: String::new(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node_name: node_name.to_owned(),
            api_server: None,
            ready: false,
            cgroup_root: String::new(),
        }
    }
}

/// Holds parts of the folders for this process until dropped.
#[derive(Debug)]
pub(crate) struct Held {
    _locks: Vec<File>,
    record_paths: Vec<PathBuf>,
    record: Record,
}

fn record_path(paths: &Paths, part: Part) -> PathBuf {
    paths.run.join(format!("{}.json", part.name()))
}

fn lock_path(paths: &Paths, part: Part) -> PathBuf {
    paths.run.join(format!("{}.lock", part.name()))
}

/// How long the child of a process that was killed may hold its locks, and how often is looked.
const LAST_CHILD: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(5);

/// Takes parts for this process.
///
/// # Errors
/// When another process has one of them, or the run folder can't be written.
pub(crate) fn hold(paths: &Paths, parts: &[Part], record: Record) -> anyhow::Result<Held> {
    fs::create_dir_all(&paths.run).with_context(|| format!("folder {}", paths.run.display()))?;
    let locks = parts.iter().map(|part| lock(paths, *part)).collect::<anyhow::Result<_>>()?;
    let record_paths = parts.iter().map(|part| record_path(paths, *part)).collect();
    let held = Held { _locks: locks, record_paths, record };
    held.write()?;
    Ok(held)
}

/// As [`hold`], for a part that can do without: where no files can be made (the run folder is
/// read-only, say) that is warned about, and nothing is held.
///
/// # Errors
/// When another process has one of them.
pub(crate) fn hold_if_possible(
    paths: &Paths,
    parts: &[Part],
    record: Record,
) -> anyhow::Result<Option<Held>> {
    match hold(paths, parts, record) {
        Err(error) if error.chain().any(|cause| cause.is::<io::Error>()) => {
            tracing::warn!(
                "{error:#}; going on without: nothing keeps a second one from starting here, and \
                 `keelson down` doesn't find this one"
            );
            Ok(None)
        }
        held => held.map(Some),
    }
}

fn lock(paths: &Paths, part: Part) -> anyhow::Result<File> {
    let path = lock_path(paths, part);
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("lock {}", path.display()))?;
    let deadline = Instant::now() + LAST_CHILD;
    loop {
        let holder = match lock.try_lock() {
            Ok(()) => return Ok(lock),
            Err(TryLockError::WouldBlock) => read(paths, part)?,
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("lock {}", path.display()));
            }
        };
        let alive = |record: &Record| Path::new("/proc").join(record.pid.to_string()).exists();
        if holder.as_ref().is_none_or(alive) || Instant::now() >= deadline {
            let running = holder
                .map_or_else(String::new, |r| format!(" (keelson {}, process {})", r.role, r.pid));
            bail!(
                "the {} already runs here{running}: stop it with `keelson down{}`, or choose \
                 another folder with --data-dir",
                part.name(),
                paths.flag()
            );
        }
        // A process that was killed while it started a program lives on in that child until the
        // program's first instruction.
        std::thread::sleep(LOOK);
    }
}

impl Held {
    /// Tells others that the process is ready.
    ///
    /// # Errors
    /// When the record can't be written.
    pub(crate) fn ready(&mut self) -> anyhow::Result<()> {
        self.record.ready = true;
        self.write()
    }

    fn write(&self) -> anyhow::Result<()> {
        for path in &self.record_paths {
            let context = || format!("record {}", path.display());
            let temporary = path.with_extension("tmp");
            let mut file = File::create(&temporary).with_context(context)?;
            file.write_all(&serde_json::to_vec(&self.record)?).with_context(context)?;
            fs::rename(&temporary, path).with_context(context)?;
        }
        Ok(())
    }
}

/// The record of the running or the last process with a part.
///
/// # Errors
/// When it is there but can't be read.
pub(crate) fn read(paths: &Paths, part: Part) -> anyhow::Result<Option<Record>> {
    let path = record_path(paths, part);
    match fs::read(&path) {
        Ok(text) => Ok(Some(
            serde_json::from_slice(&text).with_context(|| format!("record {}", path.display()))?,
        )),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("record {}", path.display())),
    }
}

/// Whether a process holds a part now.
pub(crate) fn is_running(paths: &Paths, part: Part) -> bool {
    // The lock, not the process id, tells: ids are used again.
    File::options()
        .write(true)
        .open(lock_path(paths, part))
        .is_ok_and(|lock| matches!(lock.try_lock(), Err(TryLockError::WouldBlock)))
}

/// The records of the processes that run now, each once.
///
/// # Errors
/// When one can't be read.
pub(crate) fn running(paths: &Paths) -> anyhow::Result<Vec<Record>> {
    let mut running: Vec<Record> = Vec::new();
    for part in Part::ALL {
        if is_running(paths, part)
            && let Some(record) = read(paths, part)?
            && !running.iter().any(|known| known.pid == record.pid)
        {
            running.push(record);
        }
    }
    Ok(running)
}

/// Asks the process with a part to end, waits for it, and after `patience` kills it.
/// Returns whether there was one.
///
/// # Errors
/// When it can't be signalled, or is still there after it was killed.
pub(crate) fn stop(paths: &Paths, part: Part, patience: Duration) -> anyhow::Result<bool> {
    if !is_running(paths, part) {
        return Ok(false);
    }
    let record =
        read(paths, part)?.context("something holds the folders, but left no record of itself")?;
    let pid = Pid::from_raw(record.pid);
    for (signal, wait) in [(Signal::SIGTERM, patience), (Signal::SIGKILL, Duration::from_secs(10))]
    {
        if !is_running(paths, part) {
            return Ok(true);
        }
        match kill(pid, signal) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
            Err(error) => return Err(error).with_context(|| format!("signal process {pid}")),
        }
        if wait_stopped(paths, part, wait) {
            return Ok(true);
        }
    }
    bail!("process {pid} did not end");
}

/// Another process of this program that keeps Service rules in this network namespace.
pub(crate) fn other_proxy() -> Option<u32> {
    let network = fs::read_link("/proc/self/ns/net").ok()?;
    let own = std::process::id();
    let own_program = program_of(Path::new("/proc/self"));
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        // the arguments of a process that has ended are gone
        let arguments = fs::read(entry.path().join("cmdline")).ok()?;
        let same = fs::read_link(entry.path().join("ns/net")).is_ok_and(|net| net == network);
        let renamed = || program_of(&entry.path()).is_some_and(|it| Some(it) == own_program);
        (pid != own && same && keeps_rules(&arguments, renamed)).then_some(pid)
    })
}

/// The file that a process runs, whatever it is called: its device and number.
fn program_of(process: &Path) -> Option<(u64, u64)> {
    let file = fs::metadata(process.join("exe")).ok()?;
    Some((file.dev(), file.ino()))
}

/// The process that keeps Service rules in this network namespace, as far as it can be seen: also
/// one in another process namespace that holds these folders.
///
/// # Errors
/// When the record of who holds them can't be read.
pub(crate) fn rule_keeper(paths: &Paths) -> anyhow::Result<Option<u32>> {
    if let Some(other) = other_proxy() {
        return Ok(Some(other));
    }
    if !is_running(paths, Part::Proxy) {
        return Ok(None);
    }
    let holder = read(paths, Part::Proxy)?.and_then(|record| u32::try_from(record.pid).ok());
    // One that is seen and was not found above is in another network.
    Ok(holder.filter(|pid| !Path::new("/proc").join(pid.to_string()).exists()))
}

/// Whether a command line, its parts ended by zeros, is `keelson up` or `keelson proxy`, and not one
/// that only removes or prints. `renamed` tells whether it is this program by another name.
fn keeps_rules(arguments: &[u8], renamed: impl FnOnce() -> bool) -> bool {
    let arguments = arguments.strip_suffix(b"\0").unwrap_or(arguments);
    let parts: Vec<OsString> =
        arguments.split(|byte| *byte == 0).map(|part| OsStr::from_bytes(part).to_owned()).collect();
    let program = parts.first().map(Path::new);
    let named = program.is_some_and(|program| {
        program.ends_with("keelson") || program == Path::new("/proc/self/exe")
    });
    if !(named || renamed()) {
        return false;
    }
    match Cli::try_parse_from(&parts).map(|cli| cli.command) {
        Ok(Command::Up(_)) => true,
        Ok(Command::Proxy(args)) => !(args.cleanup || args.init_only || args.dry_run),
        Ok(_) => false,
        // Of another version, with options that this one doesn't know.
        Err(_) => ["up", "proxy"].iter().any(|command| parts.iter().any(|part| part == command)),
    }
}

/// Waits until nobody holds the part.
fn wait_stopped(paths: &Paths, part: Part, deadline: Duration) -> bool {
    let start = Instant::now();
    while is_running(paths, part) {
        if start.elapsed() > deadline {
            return false;
        }
        // The kernel offers no way to wait for another's flock without taking it; this is the
        // step between two looks.
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

/// Forgets the last processes, after everything of them is gone.
///
/// # Errors
/// When a record can't be removed.
pub(crate) fn forget(paths: &Paths) -> anyhow::Result<()> {
    for part in Part::ALL {
        for path in [record_path(paths, part), lock_path(paths, part)] {
            remove_if_there(&path)?;
        }
    }
    Ok(())
}

fn remove_if_there(path: &Path) -> anyhow::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(role: &str, pid: i32) -> Record {
        Record {
            pid,
            role: role.into(),
            version: "0".into(),
            node_name: "n".into(),
            api_server: None,
            ready: false,
            cgroup_root: String::new(),
        }
    }

    #[test]
    fn who_keeps_rules_is_known_by_its_command_line() {
        for line in [
            "/usr/bin/keelson up --demo",
            "keelson proxy",
            "/proc/self/exe up -x",
            "keelson proxy --cleanup=false",
            "keelson --log-level debug proxy --data-dir /d",
            "keelson --log-format json up",
            "keelson proxy --an-option-of-tomorrow",
        ] {
            assert!(keeps_rules(line.replace(' ', "\0").as_bytes(), || false), "{line}");
        }
        assert!(keeps_rules(b"node\0up\0", || true) && !keeps_rules(b"node\0down\0", || true));
        for line in
            ["keelson down", "keelson image list", "vi up", "", "keelson proxy -v=2 --cleanup"]
        {
            assert!(!keeps_rules(line.replace(' ', "\0").as_bytes(), || false), "{line}");
        }
    }

    #[test]
    fn parts_are_held_by_one_process_each() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(Some(dir.path())).unwrap();
        assert_eq!(running(&paths).unwrap(), []);
        let mut up = hold(&paths, &Part::ALL, record("up", 1)).unwrap();
        assert_eq!(running(&paths).unwrap(), [record("up", 1)]);
        for part in Part::ALL {
            let error = hold(&paths, &[part], record("agent", 2)).unwrap_err().to_string();
            assert!(error.contains("already runs here (keelson up, process 1)"), "{error}");
        }
        up.ready().unwrap();
        assert!(read(&paths, Part::Agent).unwrap().unwrap().ready);
        drop(up);
        assert!(!is_running(&paths, Part::Agent));

        // Processes of their own get along, but `up` needs all parts.
        let _agent = hold(&paths, &[Part::Agent], record("agent", 2)).unwrap();
        let _control_plane =
            hold(&paths, &[Part::ControlPlane], record("control-plane", 3)).unwrap();
        assert!(hold(&paths, &Part::ALL, record("up", 1)).is_err());
        assert_eq!(running(&paths).unwrap(), [record("control-plane", 3), record("agent", 2)]);
        forget(&paths).unwrap();
        assert_eq!(read(&paths, Part::Agent).unwrap(), None);
    }

    #[test]
    fn a_part_that_can_do_without_files_goes_on_where_there_are_none_but_not_beside_another() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(Some(dir.path())).unwrap();
        // A folder that can't be made, by root neither.
        fs::create_dir_all(paths.run.parent().unwrap()).unwrap();
        fs::write(&paths.run, "").unwrap();
        let proxy = || hold_if_possible(&paths, &[Part::Proxy], record("proxy", 1));
        assert!(proxy().unwrap().is_none());
        fs::remove_file(&paths.run).unwrap();
        let held = proxy().unwrap();
        assert!(held.is_some());
        assert!(proxy().is_err(), "another one runs");
    }

    #[test]
    fn the_last_child_of_a_killed_process_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(Some(dir.path())).unwrap();
        let mut ended = std::process::Command::new("true").spawn().unwrap();
        ended.wait().unwrap();
        let killed = record("proxy", ended.id().cast_signed());
        let child = hold(&paths, &[Part::Proxy], killed).unwrap();
        let ends = std::thread::spawn(move || {
            // As long as the child goes on.
            std::thread::sleep(LOOK * 10);
            drop(child);
        });
        hold(&paths, &[Part::Proxy], record("proxy", 1)).unwrap();
        ends.join().unwrap();
    }
}
